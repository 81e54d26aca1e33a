//! Zeros and discards, and what a range is like.
//!
//! ```text
//!   zeros    mapped ─► zeros in place, the mapping stays     unmapped, nothing below ─► nothing to do
//!            compressed, above a backing file, or where a failed try left a place ─► written like any data
//!   discard  mapped ─► zeros in place                        else ─► stays as it is
//! ```
//!
//! The format cannot say "zeros here" in a mapping, and a mapping is never taken back: what was mapped once stays so.
//! Space inside of a mapped cluster goes back to the host as a hole in the file.

use super::Image;
use super::format::Mapping;
use super::table::Table;
use crate::ImageHost;
use smallvec::smallvec;
use std::rc::Rc;
use tap_core::{Extent, Source, ZeroFlags};
use tap_host::{Bug, Errno, IoVec, SECTOR_BYTES, SectorRange, ZeroMode};

/// Most zeros written at once, in bytes.
const CHUNK_BYTES: u64 = 1 << 20;

/// What has to be done to make a run of bytes zeros.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Work {
    /// It reads as zeros.
    Nothing,
    /// Zeros from this byte of the file on.
    InPlace(u64),
    /// Zeros have to be written as data.
    Write,
}

#[derive(Clone, Copy)]
struct Run {
    start: u64,
    len: u64,
    work: Work,
}

impl<H: ImageHost> Image<H> {
    /// Makes `len` bytes from `start` on zeros.
    pub(super) async fn write_zeroes(
        self: Rc<Self>,
        start: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<(), Errno> {
        let mode = if flags.unmap { ZeroMode::Unmap } else { ZeroMode::Keep };
        if flags.fast {
            // Refused before anything has changed.
            for (index, start, len) in self.by_table(start, len) {
                if self.runs(index, start, len).await?.iter().any(|run| run.work == Work::Write) {
                    return Err(Errno::EOPNOTSUPP);
                }
            }
        }
        for (index, start, len) in self.by_table(start, len) {
            for run in self.runs(index, start, len).await? {
                match run.work {
                    Work::Nothing => {}
                    Work::InPlace(offset) => self.file.zero(offset, run.len, mode, flags.fast).await?,
                    Work::Write => Rc::clone(&self).write_zeros(run.start, run.len).await?,
                }
            }
        }
        Ok(())
    }

    /// Gives back what space of `len` bytes from `start` on can be given back without writing anything.
    pub(super) async fn discard(&self, start: u64, len: u64) -> Result<(), Errno> {
        for (index, start, len) in self.by_table(start, len) {
            for run in self.runs(index, start, len).await? {
                let Work::InPlace(offset) = run.work else { continue };
                match self.file.zero(offset, run.len, ZeroMode::Unmap, true).await {
                    Err(Errno::EOPNOTSUPP) => return Ok(()),
                    result => result?,
                }
            }
        }
        Ok(())
    }

    async fn write_zeros(self: Rc<Self>, start: u64, len: u64) -> Result<(), Errno> {
        let mut done = 0;
        while done < len {
            let part = (len - done).min(CHUNK_BYTES);
            let mut buf = self.file.buffer(part as usize).await?;
            buf.fill(0);
            let bufs: IoVec = smallvec![buf];
            Rc::clone(&self).write(start + done, bufs).await.result?;
            done += part;
        }
        Ok(())
    }

    /// Bytes of table `index`, cut by what has to be done to make them zeros.
    async fn runs(&self, index: usize, start: u64, len: usize) -> Result<Vec<Run>, Errno> {
        let table = self.table(index).await?;
        let mut runs: Vec<Run> = Vec::new();
        self.each_cluster(start, len as u64, |at, len| {
            let work = self.work_at(table.as_deref(), at)?;
            if let Some(last) = runs.last_mut() {
                let goes_on = match (last.work, work) {
                    (Work::InPlace(a), Work::InPlace(b)) => a + last.len == b,
                    (a, b) => a == b,
                };
                if goes_on {
                    last.len += len;
                    return Ok(());
                }
            }
            runs.push(Run { start: at, len, work });
            Ok(())
        })?;
        Ok(runs)
    }

    fn work_at(&self, table: Option<&Table>, at: u64) -> Result<Work, Errno> {
        let cluster = self.cluster(at);
        Ok(match self.mapping_at(table, at)? {
            Mapping::Plain(host) => Work::InPlace(host + at % self.geometry.cluster_bytes()),
            Mapping::Compressed(_) => Work::Write,
            Mapping::Unmapped => {
                let shows_below = self.backing_shows(cluster << self.geometry.cluster_bits)
                    && !self.host.bug(Bug::ZeroesSkippedBelow);
                // What a failed try left may be found at the place after a crash.
                let in_doubt = self.allocator.borrow().suspects.contains_key(&cluster);
                if shows_below || in_doubt { Work::Write } else { Work::Nothing }
            }
        })
    }

    /// What the table says of byte `at` of the disk.
    fn mapping_at(&self, table: Option<&Table>, at: u64) -> Result<Mapping, Errno> {
        let index = self.split(self.cluster(at)).1;
        match table.map_or(Mapping::Unmapped, |t| t.mapping(index, self.geometry.cluster_bits)) {
            // An image that was not opened for writing was not looked through.
            Mapping::Plain(host) if host > self.reach => Err(Errno::EIO),
            mapping => Ok(mapping),
        }
    }

    /// Calls `look` with each part of a cluster in `len` bytes from `start` on: first byte and length.
    fn each_cluster(
        &self,
        start: u64,
        len: u64,
        mut look: impl FnMut(u64, u64) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let (mut at, end, cluster_bytes) = (start, start + len, self.geometry.cluster_bytes());
        while at < end {
            let len = (cluster_bytes - at % cluster_bytes).min(end - at);
            look(at, len)?;
            at += len;
        }
        Ok(())
    }

    /// What `range` is like, from its start on.
    pub(super) async fn extents(&self, range: SectorRange, most: usize) -> Result<Vec<Extent>, Errno> {
        let mut out: Vec<Extent> = Vec::new();
        for (index, start, len) in self.by_table(range.start.0 * SECTOR_BYTES, range.len_bytes()) {
            let table = self.table(index).await?;
            let (mut at, end) = (start, start + len as u64);
            while at < end {
                if out.len() >= most {
                    return Ok(out);
                }
                let len = self.mapped_alike(table.as_deref(), at, end)?;
                match self.mapping_at(table.as_deref(), at)? {
                    // Ends early only when there is no room for more, which ends all of it.
                    Mapping::Unmapped => self.extents_below(at, len, most, &mut out).await?,
                    Mapping::Plain(host) => {
                        let offset = Some(host + at % self.geometry.cluster_bytes());
                        out.push(own(len, offset, false));
                    }
                    Mapping::Compressed(_) => out.push(own(len, None, true)),
                }
                at += len;
            }
        }
        Ok(out)
    }

    /// How many bytes from `at` on, before `end`, are mapped in the same way and without a jump.
    fn mapped_alike(&self, table: Option<&Table>, at: u64, end: u64) -> Result<u64, Errno> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let (mut last, mut len) = (None, 0);
        let done = self.each_cluster(at, end - at, |at, part| {
            let mapping = self.mapping_at(table, at)?;
            let goes_on = match (last.replace(mapping), mapping) {
                (None, _)
                | (Some(Mapping::Unmapped), Mapping::Unmapped)
                | (Some(Mapping::Compressed(_)), Mapping::Compressed(_)) => true,
                (Some(Mapping::Plain(a)), Mapping::Plain(b)) => a + cluster_bytes == b,
                _ => false,
            };
            len += if goes_on { part } else { 0 };
            if goes_on { Ok(()) } else { Err(Errno::EINTR) }
        });
        match done {
            Err(Errno::EINTR) | Ok(()) => Ok(len),
            Err(e) => Err(e),
        }
    }

    /// What is seen through `len` unmapped bytes from `start` on.
    async fn extents_below(
        &self,
        start: u64,
        len: u64,
        most: usize,
        out: &mut Vec<Extent>,
    ) -> Result<(), Errno> {
        let mut below = self.backing_bytes.saturating_sub(start).min(len) / SECTOR_BYTES;
        let nothing = len / SECTOR_BYTES - below;
        let mut at = start / SECTOR_BYTES;
        if let Some(backing) = &self.backing {
            while below > 0 {
                if out.len() >= most {
                    return Ok(());
                }
                let range = SectorRange::new(at, below.min(u64::from(u32::MAX)) as u32);
                for extent in backing.extents(range, most - out.len()).await? {
                    at += extent.count;
                    below -= extent.count;
                    out.push(one_deeper(extent));
                }
            }
        }
        if nothing > 0 && out.len() < most {
            out.push(Extent { count: nothing, source: Source::Nothing, zero: true, allocated: false });
        }
        Ok(())
    }
}

fn own(len_bytes: u64, offset: Option<u64>, compressed: bool) -> Extent {
    let source = Source::Image { depth: 0, offset, compressed };
    Extent { count: len_bytes / SECTOR_BYTES, source, zero: false, allocated: true }
}

fn one_deeper(extent: Extent) -> Extent {
    let source = match extent.source {
        Source::Nothing => Source::Nothing,
        Source::Image { depth, offset, compressed } => Source::Image { depth: depth + 1, offset, compressed },
    };
    Extent { source, ..extent }
}
