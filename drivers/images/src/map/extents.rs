//! Extents of a range.

use super::Image;
use super::layout::{Layout, Mapping};
use super::table::Table;
use super::{GuestOffset, HostOffset};
use crate::ImageHost;
use tap_core::{Extent, Source};
use tap_host::{Errno, SECTOR_BYTES, SectorRange, Tried};

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
            Mapping::Compressed(run) if !self.is_in_file(run) => Err(Errno::EIO),
            mapping => Ok(mapping),
        }
    }

    /// The first `max` extents of `range`, or fewer, so that a turn does not take long. Errors of tables and entries
    /// are extents, unless another try may succeed.
    pub(super) async fn extents(&self, range: SectorRange, max: usize) -> Result<Vec<Extent>, Errno> {
        let mut out: Vec<Extent> = Vec::new();
        let mut tables = 0;
        for (index, start, len) in self.by_table(GuestOffset(range.start.0 * SECTOR_BYTES), range.len_bytes())
        {
            if tables == TABLES_MAX || out.len() >= max {
                return Ok(out);
            }
            let table = match self.table(index).await {
                Err(error) if Tried::Request.may_pass(error) => return Err(error),
                Err(error) => {
                    tables += 1;
                    out.push(self.unreadable(len as u64, error));
                    continue;
                }
                Ok(table) => table,
            };
            tables += usize::from(table.is_some());
            let (mut at, end) = (start, start + len as u64);
            while at < end {
                if out.len() >= max {
                    return Ok(out);
                }
                let len = self.mapped_alike(table.as_deref(), at, end);
                match self.mapping_at(table.as_deref(), at) {
                    // Ends early only when `out` is full, which also ends the loop.
                    Ok(Mapping::Unmapped) => self.extents_below(at, len, max, &mut out).await?,
                    Ok(Mapping::Plain(host)) => {
                        let offset = Some(host + at.0 % self.geometry.cluster_bytes());
                        out.push(self.own(len, offset, false));
                    }
                    Ok(Mapping::Compressed(_)) => out.push(self.own(len, None, true)),
                    Err(error) => out.push(self.unreadable(len, error)),
                }
                at += len;
            }
        }
        Ok(out)
    }

    /// The number of bytes from `at` on, before `end`, that are mapped in the same way and contiguously.
    fn mapped_alike(&self, table: Option<&Table>, start: GuestOffset, end: GuestOffset) -> u64 {
        let cluster_bytes = self.geometry.cluster_bytes();
        let (mut last, mut at) = (None, start);
        while at < end {
            let mapping = self.mapping_at(table, at);
            let continues = match (last.replace(mapping), mapping) {
                (None, _)
                | (Some(Ok(Mapping::Unmapped)), Ok(Mapping::Unmapped))
                | (Some(Ok(Mapping::Compressed(_))), Ok(Mapping::Compressed(_))) => true,
                (Some(Ok(Mapping::Plain(a))), Ok(Mapping::Plain(b))) => {
                    a + cluster_bytes == b || self.host.bug(&EXTENTS_JOINED)
                }
                (Some(Err(a)), Err(b)) => a == b,
                _ => false,
            };
            if !continues {
                break;
            }
            at = end.min(at + (cluster_bytes - at.0 % cluster_bytes));
        }
        at - start
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

    /// An extent whose entries cannot be used.
    fn unreadable(&self, len_bytes: u64, error: Errno) -> Extent {
        let source = Source::Unreadable { name: Some(self.file.name.clone()), error };
        Extent { count: len_bytes / SECTOR_BYTES, source, zero: false, allocated: true }
    }

    /// An extent of this image.
    fn own(&self, len_bytes: u64, offset: Option<HostOffset>, compressed: bool) -> Extent {
        let (name, offset) = (Some(self.file.name.clone()), offset.map(|offset| offset.0));
        let source = Source::Node { name, offset, compressed };
        Extent { count: len_bytes / SECTOR_BYTES, source, zero: false, allocated: true }
    }
}
