//! Extents of a range.

use super::Image;
use super::layout::{Layout, Mapping};
use super::table::Table;
use super::{GuestOffset, HostOffset};
use crate::ImageHost;
use tap_core::{Extent, Source};
use tap_host::{Errno, SECTOR_BYTES, SectorRange};

tap_host::listed! {
    pub(super) BUGS: Bug;
    EXTENTS_JOINED = "extents-joined", "a map reports clusters that lie apart in the file as one run";
}

/// Most tables that one query goes through; ranges without a table cost next to nothing.
const TABLES_MAX: usize = 32;

impl<H: ImageHost, L: Layout> Image<H, L> {
    /// The mapping of the byte at `at`.
    pub(super) fn mapping_at(&self, table: Option<&Table>, at: GuestOffset) -> Result<Mapping, Errno> {
        let index = self.split(self.cluster(at)).1;
        match table.map_or(Mapping::Unmapped, |t| t.mapping::<L>(index, &self.geometry)) {
            // Opening for reading does not check the references.
            Mapping::Plain(host) if host > self.reach => Err(Errno::EIO),
            mapping => Ok(mapping),
        }
    }

    /// Calls `visit` with each part of a cluster in `len` bytes from `start` on: first byte and length.
    fn each_cluster(
        &self,
        start: GuestOffset,
        len: u64,
        mut visit: impl FnMut(GuestOffset, u64) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let (mut at, end, cluster_bytes) = (start, start + len, self.geometry.cluster_bytes());
        while at < end {
            let len = (cluster_bytes - at.0 % cluster_bytes).min(end - at);
            visit(at, len)?;
            at += len;
        }
        Ok(())
    }

    /// The first `max` extents of `range`, or fewer, so that a turn does not take long.
    pub(super) async fn extents(&self, range: SectorRange, max: usize) -> Result<Vec<Extent>, Errno> {
        let mut out: Vec<Extent> = Vec::new();
        let mut tables = 0;
        for (index, start, len) in self.by_table(GuestOffset(range.start.0 * SECTOR_BYTES), range.len_bytes())
        {
            if tables == TABLES_MAX {
                return Ok(out);
            }
            let table = self.table(index).await?;
            tables += usize::from(table.is_some());
            let (mut at, end) = (start, start + len as u64);
            while at < end {
                if out.len() >= max {
                    return Ok(out);
                }
                let len = self.mapped_alike(table.as_deref(), at, end)?;
                match self.mapping_at(table.as_deref(), at)? {
                    // Ends early only when `out` is full, which also ends the loop.
                    Mapping::Unmapped => self.extents_below(at, len, max, &mut out).await?,
                    Mapping::Plain(host) => {
                        let offset = Some(host + at.0 % self.geometry.cluster_bytes());
                        out.push(self.own(len, offset, false));
                    }
                    Mapping::Compressed(_) => out.push(self.own(len, None, true)),
                }
                at += len;
            }
        }
        Ok(out)
    }

    /// The number of bytes from `at` on, before `end`, that are mapped in the same way and contiguously.
    fn mapped_alike(&self, table: Option<&Table>, at: GuestOffset, end: GuestOffset) -> Result<u64, Errno> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let (mut last, mut len) = (None, 0);
        let done = self.each_cluster(at, end - at, |at, part| {
            let mapping = self.mapping_at(table, at)?;
            let continues = match (last.replace(mapping), mapping) {
                (None, _)
                | (Some(Mapping::Unmapped), Mapping::Unmapped)
                | (Some(Mapping::Compressed(_)), Mapping::Compressed(_)) => true,
                (Some(Mapping::Plain(a)), Mapping::Plain(b)) => {
                    a + cluster_bytes == b || self.host.bug(&EXTENTS_JOINED)
                }
                _ => false,
            };
            len += if continues { part } else { 0 };
            if continues { Ok(()) } else { Err(Errno::EINTR) }
        });
        match done {
            Err(Errno::EINTR) | Ok(()) => Ok(len),
            Err(e) => Err(e),
        }
    }

    /// The extents below `len` unmapped bytes from `start` on.
    async fn extents_below(
        &self,
        start: GuestOffset,
        len: u64,
        max: usize,
        out: &mut Vec<Extent>,
    ) -> Result<(), Errno> {
        let mut below = self.backing_bytes.saturating_sub(start.0).min(len) / SECTOR_BYTES;
        let nothing = len / SECTOR_BYTES - below;
        let mut at = start.0 / SECTOR_BYTES;
        if let Some(backing) = &self.backing {
            while below > 0 {
                if out.len() >= max {
                    return Ok(());
                }
                let range = SectorRange::new(at, below.min(u64::from(u32::MAX)) as u32);
                for extent in backing.extents(range, max - out.len()).await? {
                    at += extent.count;
                    below -= extent.count;
                    out.push(extent);
                }
            }
        }
        if nothing > 0 && out.len() < max {
            out.push(Extent { count: nothing, source: Source::Nothing, zero: true, allocated: false });
        }
        Ok(())
    }

    /// An extent of this image.
    fn own(&self, len_bytes: u64, offset: Option<HostOffset>, compressed: bool) -> Extent {
        let (name, offset) = (Some(self.file.name.clone()), offset.map(|offset| offset.0));
        let source = Source::Node { name, offset, compressed };
        Extent { count: len_bytes / SECTOR_BYTES, source, zero: false, allocated: true }
    }
}
