//! Zeros and discards.
//!
//! ```text
//!   zeros    mapped ─► zeros in place, the mapping stays     unmapped, nothing below ─► no work
//!            compressed, above a backing file, or in doubt ─► written like any data
//!            that keep their space: unmapped ─► written like any data, so that a later write there needs none
//!   discard  mapped ─► zeros in place                        else ─► unchanged
//! ```
//!
//! The format has no zero entries, and a mapping is never removed. Space inside a mapped cluster is freed as a hole in
//! the file.

use super::Image;
use super::layout::{Layout, Mapping};
use super::table::Table;
use super::{GuestOffset, HostOffset};
use crate::ImageHost;
use crate::memory::{MAX_BYTES, take_some};
use smallvec::smallvec;
use std::rc::Rc;
use tap_core::ZeroFlags;
use tap_host::{Errno, ZeroMode, cost_of};

tap_host::listed! {
    pub(super) BUGS: Bug;
    KEPT_UNMAPPED = "kept-unmapped", "zeros that must keep their space are skipped where nothing is mapped";
    ZEROES_SKIPPED_BELOW = "zeroes-skipped-below",
        "zeros over a backing file are skipped where nothing is mapped above it";
    ZEROES_UNYIELDING = "zeroes-unyielding", "a request of zeros looks at all of its tables in one turn";
}

/// Limit of runs found at once.
const MAX_RUNS: usize = 64;
/// Missing tables that may be skipped in one turn.
const MAX_SKIPS: u32 = 256;

/// The work to zero a run of bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Work {
    /// It already reads as zeros.
    Nothing,
    /// Zero it in place, from this offset of the file on.
    InPlace(HostOffset),
    /// Write zeros as data.
    Write,
}

/// The end of a part of at most `room` bytes that begins at `at` of a range up to `end`: at the end of a cluster of
/// `cluster` bytes if possible, since each part would fill the rest of its last cluster.
fn end_of_part((at, end): (GuestOffset, GuestOffset), room: u64, cluster: u64) -> GuestOffset {
    let limit = at + room.min(end - at);
    let whole = GuestOffset(limit.0 - limit.0 % cluster);
    if limit < end && whole > at { whole } else { limit }
}

#[derive(Clone, Copy)]
struct Run {
    start: GuestOffset,
    len: u64,
    work: Work,
}

/// The rest of a request.
struct Rest {
    at: GuestOffset,
    end: GuestOffset,
    /// Tables visited so far.
    tables: u32,
    /// The last one was missing and had no work.
    was_empty: bool,
}

impl Rest {
    fn new(start: GuestOffset, len: u64) -> Self {
        Self { at: start, end: start + len, tables: 0, was_empty: false }
    }
}

impl<H: ImageHost, L: Layout> Image<H, L> {
    /// Zeroes `len` bytes from `start` on.
    pub(super) async fn write_zeroes(
        self: Rc<Self>,
        start: GuestOffset,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<(), Errno> {
        let mode = if flags.unmap { ZeroMode::Unmap } else { ZeroMode::Keep };
        if flags.fast {
            // Refuse before anything has changed.
            let mut rest = Rest::new(start, len);
            while let Some(runs) = self.runs(&mut rest, mode).await? {
                let written = |run: &Run| match run.work {
                    Work::Nothing => false,
                    Work::InPlace(offset) => !self.file.is_whole(offset.0, run.len),
                    Work::Write => true,
                };
                if runs.iter().any(written) {
                    return Err(Errno::EOPNOTSUPP);
                }
            }
        }
        let mut rest = Rest::new(start, len);
        while let Some(runs) = self.runs(&mut rest, mode).await? {
            for run in runs {
                match run.work {
                    Work::Nothing => {}
                    Work::InPlace(offset) => self.file.zero(offset.0, run.len, mode, flags.fast).await?,
                    Work::Write => Rc::clone(&self).write_zeros(run.start, run.len).await?,
                }
            }
        }
        Ok(())
    }

    /// Frees as much of `len` bytes from `start` on as possible without writing.
    pub(super) async fn discard(&self, start: GuestOffset, len: u64) -> Result<(), Errno> {
        let mut rest = Rest::new(start, len);
        while let Some(runs) = self.runs(&mut rest, ZeroMode::Unmap).await? {
            for run in runs {
                let Work::InPlace(offset) = run.work else { continue };
                if !self.file.discard(offset.0, run.len).await? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    async fn write_zeros(self: Rc<Self>, start: GuestOffset, len: u64) -> Result<(), Errno> {
        let want = cost_of(len.min(MAX_BYTES as u64) as usize);
        let mut share = take_some(&self.memory.zeros, want).await?;
        let cluster = self.geometry.cluster_bytes();
        let (mut at, end) = (start, start + len);
        loop {
            let room = share.bytes() as u64;
            let to = end_of_part((at, end), room, cluster);
            let mut buf = share.buffer((to - at) as usize)?;
            buf.fill(0);
            Rc::clone(&self).write(at, smallvec![buf]).await.result?;
            at = to;
            if at == end {
                return Ok(());
            }
            drop(share);
            share = take_some(&self.memory.zeros, want).await?;
        }
    }

    /// The next runs of `rest`, by the work to zero them; `None` at its end. Yields between tables.
    async fn runs(&self, rest: &mut Rest, mode: ZeroMode) -> Result<Option<Vec<Run>>, Errno> {
        // Zeros that keep their space need a mapping.
        let mapped = mode == ZeroMode::Keep && !self.host.bug(&KEPT_UNMAPPED);
        while let Some((index, start, len)) = self.by_table(rest.at, rest.end - rest.at).next() {
            let unyielding = self.host.bug(&ZEROES_UNYIELDING);
            if !unyielding && rest.tables > 0 && (rest.tables.is_multiple_of(MAX_SKIPS) || !rest.was_empty) {
                self.host.yield_now().await;
            }
            rest.tables += 1;
            self.host.work(1);
            let table = self.table(index).await?;
            let end = start + len as u64;
            // A cluster in doubt has a table: the mapping that failed was to be written there.
            rest.was_empty = table.is_none() && !mapped && !self.backing_shows(start);
            if rest.was_empty {
                rest.at = end;
                continue;
            }
            let (runs, to) = self.runs_of(table.as_deref(), start, end, mapped)?;
            rest.at = to;
            return Ok(Some(runs));
        }
        Ok(None)
    }

    /// At most [`MAX_RUNS`] runs of one table, and their end.
    fn runs_of(
        &self,
        table: Option<&Table>,
        start: GuestOffset,
        end: GuestOffset,
        mapped: bool,
    ) -> Result<(Vec<Run>, GuestOffset), Errno> {
        let mut runs: Vec<Run> = Vec::new();
        let cluster_bytes = self.geometry.cluster_bytes();
        let mut at = start;
        while at < end {
            let len = (cluster_bytes - at.0 % cluster_bytes).min(end - at);
            let work = self.work_at(table, at, mapped)?;
            let continues = runs.last().is_some_and(|last| match (last.work, work) {
                (Work::InPlace(a), Work::InPlace(b)) => a + last.len == b,
                (a, b) => a == b,
            });
            let full = runs.len() == MAX_RUNS;
            match runs.last_mut() {
                Some(last) if continues => last.len += len,
                _ if full => break,
                _ => runs.push(Run { start: at, len, work }),
            }
            at += len;
        }
        assert!(runs.len() <= MAX_RUNS, "more runs are found at once than the limit");
        self.host.work((at - start).div_ceil(cluster_bytes));
        Ok((runs, at))
    }

    /// `mapped`: the zeros must have space.
    fn work_at(&self, table: Option<&Table>, at: GuestOffset, mapped: bool) -> Result<Work, Errno> {
        let cluster = self.cluster(at);
        Ok(match self.mapping_at(table, at)? {
            Mapping::Plain(host) => Work::InPlace(host + at.0 % self.geometry.cluster_bytes()),
            Mapping::Compressed(_) => Work::Write,
            Mapping::Unmapped => {
                let shows_below =
                    self.backing_shows(self.start_of(cluster)) && !self.host.bug(&ZEROES_SKIPPED_BELOW);
                // After a crash the data of a failed try may appear there.
                let in_doubt = self.suspects.borrow().any(cluster, cluster);
                if mapped || shows_below || in_doubt { Work::Write } else { Work::Nothing }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{GuestOffset, end_of_part};

    #[test]
    fn parts_end_at_clusters_and_are_never_empty() {
        let end = |at, end, room| end_of_part((GuestOffset(at), GuestOffset(end)), room, 4096).0;
        assert_eq!(end(5000, 90_000, 65_536), 69_632);
        assert_eq!(end(4096, 8192, 65_536), 8192, "the end");
        assert_eq!(end(4096, 9000, 65_536), 9000, "within a cluster");
        // Less room than a cluster: no part is empty.
        assert_eq!(end(4096, 8192, 512), 4608);
        assert_eq!(end(4608, 8192, 512), 5120);
    }
}
