//! Zeros and discards.
//!
//! ```text
//!   zeros    mapped ─► zeros in place, the mapping stays     unmapped, nothing below ─► nothing to do
//!            compressed, above a backing file, or where a failed try left a place ─► written like any data
//!            that keep their space: unmapped ─► written like any data, so that a later write there needs none
//!   discard  mapped ─► zeros in place                        else ─► stays as it is
//! ```
//!
//! The format cannot say "zeros here" in a mapping, and a mapping is never taken back: what was mapped once stays so.
//! Space inside of a mapped cluster goes back to the host as a hole in the file.

use super::Image;
use super::layout::{Layout, Mapping};
use super::table::Table;
use super::{GuestOffset, HostOffset};
use crate::ImageHost;
use crate::memory::{MOST_BYTES, take_some};
use smallvec::smallvec;
use std::rc::Rc;
use tap_core::ZeroFlags;
use tap_host::{Bug, Errno, ZeroMode, cost_of};

/// Most runs that are found at once.
const MAX_RUNS: usize = 64;
/// Tables that are not there and that may be passed in one turn.
const EMPTY_LOOKS: u32 = 256;

/// What has to be done to make a run of bytes zeros.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Work {
    /// It reads as zeros.
    Nothing,
    /// Zeros from there on in the file.
    InPlace(HostOffset),
    /// Zeros have to be written as data.
    Write,
}

/// Where a part of at most `room` bytes ends that begins at `at` of a range up to `end`: with a cluster of
/// `cluster` bytes where it can, since each part would fill the rest of its last cluster.
fn end_of_part((at, end): (GuestOffset, GuestOffset), room: u64, cluster: u64) -> GuestOffset {
    let most = at + room.min(end - at);
    let whole = GuestOffset(most.0 - most.0 % cluster);
    if most < end && whole > at { whole } else { most }
}

#[derive(Clone, Copy)]
struct Run {
    start: GuestOffset,
    len: u64,
    work: Work,
}

/// What is left of a request.
struct Rest {
    at: GuestOffset,
    end: GuestOffset,
    /// Tables that were looked at.
    looks: u32,
    /// The last one was not there.
    was_empty: bool,
}

impl Rest {
    fn new(start: GuestOffset, len: u64) -> Self {
        Self { at: start, end: start + len, looks: 0, was_empty: false }
    }
}

impl<H: ImageHost, L: Layout> Image<H, L> {
    /// Makes `len` bytes from `start` on zeros.
    pub(super) async fn write_zeroes(
        self: Rc<Self>,
        start: GuestOffset,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<(), Errno> {
        let mode = if flags.unmap { ZeroMode::Unmap } else { ZeroMode::Keep };
        if flags.fast {
            // Refused before anything has changed.
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

    /// Gives back what space of `len` bytes from `start` on can be given back without writing anything.
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
        let want = cost_of(len.min(MOST_BYTES as u64) as usize);
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

    /// Bytes of a request from where `rest` begins, cut by what has to be done to make them zeros; `None` at its end.
    /// Between two looks others have their turn.
    async fn runs(&self, rest: &mut Rest, mode: ZeroMode) -> Result<Option<Vec<Run>>, Errno> {
        // Zeros that are to have their space are never there without a mapping.
        let mapped = mode == ZeroMode::Keep && !self.host.bug(Bug::KeptUnmapped);
        while let Some((index, start, len)) = self.by_table(rest.at, rest.end - rest.at).next() {
            let unyielding = self.host.bug(Bug::ZeroesUnyielding);
            if !unyielding && rest.looks > 0 && (rest.looks.is_multiple_of(EMPTY_LOOKS) || !rest.was_empty) {
                self.host.yield_now().await;
            }
            rest.looks += 1;
            self.host.work(1);
            let table = self.table(index).await?;
            let end = start + len as u64;
            rest.was_empty =
                table.is_none() && !mapped && !self.backing_shows(start) && !self.any_doubt(start, end);
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

    /// Whether a cluster within a range is in doubt.
    fn any_doubt(&self, start: GuestOffset, end: GuestOffset) -> bool {
        self.suspects.borrow().any(self.cluster(start), self.cluster(GuestOffset(end.0 - 1)))
    }

    /// At most [`MAX_RUNS`] runs of one table, and where they end.
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
            let goes_on = runs.last().is_some_and(|last| match (last.work, work) {
                (Work::InPlace(a), Work::InPlace(b)) => a + last.len == b,
                (a, b) => a == b,
            });
            let full = runs.len() == MAX_RUNS;
            match runs.last_mut() {
                Some(last) if goes_on => last.len += len,
                _ if full => break,
                _ => runs.push(Run { start: at, len, work }),
            }
            at += len;
        }
        assert!(runs.len() <= MAX_RUNS, "more runs are looked for at once than may be");
        self.host.work((at - start).div_ceil(cluster_bytes));
        Ok((runs, at))
    }

    /// `mapped`: the zeros must have space of their own.
    fn work_at(&self, table: Option<&Table>, at: GuestOffset, mapped: bool) -> Result<Work, Errno> {
        let cluster = self.cluster(at);
        Ok(match self.mapping_at(table, at)? {
            Mapping::Plain(host) => Work::InPlace(host + at.0 % self.geometry.cluster_bytes()),
            Mapping::Compressed(_) => Work::Write,
            Mapping::Unmapped => {
                let shows_below =
                    self.backing_shows(self.start_of(cluster)) && !self.host.bug(Bug::ZeroesSkippedBelow);
                // What a failed try left may be found at the place after a crash.
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
    fn parts_end_with_clusters_and_go_on() {
        let end = |at, end, room| end_of_part((GuestOffset(at), GuestOffset(end)), room, 4096).0;
        assert_eq!(end(5000, 90_000, 65_536), 69_632);
        assert_eq!(end(4096, 8192, 65_536), 8192, "the end");
        assert_eq!(end(4096, 9000, 65_536), 9000, "within a cluster");
        // Less room than a cluster has: no part is empty.
        assert_eq!(end(4096, 8192, 512), 4608);
        assert_eq!(end(4608, 8192, 512), 5120);
    }
}
