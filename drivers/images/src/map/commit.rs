//! Writes mappings, several at a time.
//!
//! ```text
//!   A: entry 3 ─┐
//!   B: entry 9 ─┼─► the first to get the table's turn writes the sectors that hold 3 … 9:
//!   C: entry 5 ─┘   the published entries, and 3, 5, 9
//!                   success: publish them;  failure: none becomes visible
//! ```
//!
//! A failed write may have reached the file. Its entries are not published, and are reverted in the file if that is
//! possible. If it is not, the file is read: an entry that is there is published, because the table is read from there
//! again once it was evicted. In any case each guest cluster keeps the place in the file that such an entry points to
//! (see [`super::doubt`]), and the data there is one of the allowed versions.

use super::HostOffset;
use super::Image;
use super::layout::{Layout, encode_entries};
use super::table::Table;
use crate::ImageHost;
use smallvec::smallvec;
use std::cell::Cell;
use std::ops::Range;
use std::rc::Rc;
use tap_host::{Errno, SECTOR_BYTES};

tap_host::listed! {
    pub(super) BUGS: Bug;
    FAILED_L2_CACHED = "failed-l2-cached", "an L2 entry whose write failed stays in the cache";
    MAPPING_IN_MEMORY = "mapping-in-memory", "a new mapping is kept in memory and not written";
    COMMIT_KEPT = "commit-kept", "a mapping whose write failed stays in the list of mappings to be written";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    COMMIT_SHARED = "commit-shared", "one L2 write carried several entries";
    COMMIT_NOT_UNDONE = "commit-not-undone", "an L2 write failed, and so did the one that should undo it";
}

/// Entries in a sector of a table.
const SECTOR_ENTRIES: usize = SECTOR_BYTES as usize / 8;

/// Contiguous entries of one table that map contiguous clusters of the file.
pub(super) struct Commit {
    /// Indices in the table.
    entries: Range<usize>,
    /// The cluster of the first entry.
    host: HostOffset,
    result: Cell<Option<Result<(), Errno>>>,
}

impl<H: ImageHost, L: Layout> Image<H, L> {
    /// Maps `entries` of `table` to the clusters from `host` on, in the file and then in memory. Runs in a task that is
    /// not dropped half way: a write that takes effect late would undo a later one.
    pub(super) async fn commit(
        &self,
        table: &Rc<Table>,
        entries: Range<usize>,
        host: HostOffset,
    ) -> Result<(), Errno> {
        let own = Rc::new(Commit { entries, host, result: Cell::new(None) });
        table.pending.borrow_mut().push(Rc::clone(&own));
        self.host.yield_now().await;
        let _turn = table.turn.acquire().await;
        if let Some(result) = own.result.get() {
            return result;
        }
        let batch = table.pending.take();
        if batch.len() > 1 {
            self.host.mark(&COMMIT_SHARED);
        }
        let first = batch.iter().map(|c| c.entries.start).min().unwrap_or(0);
        let end = batch.iter().map(|c| c.entries.end).max().unwrap_or(0);
        let result = match self.host.bug(&MAPPING_IN_MEMORY) {
            true => Ok(()),
            false => self.write_entries(table, first..end, &batch).await,
        };
        // Revert to the published entries.
        if result.is_err() && self.write_entries(table, first..end, &[]).await.is_err() {
            self.host.mark(&COMMIT_NOT_UNDONE);
            // If this fails, too, the entries stay in doubt, which `doubt` handles.
            self.publish_found(table, &batch).await.unwrap_or_default();
        }
        if result.is_ok() || self.host.bug(&FAILED_L2_CACHED) {
            self.publish(table, &batch);
        }
        batch.iter().for_each(|commit| commit.result.set(Some(result)));
        if result.is_err() && self.host.bug(&COMMIT_KEPT) {
            table.pending.borrow_mut().push(own);
        }
        result
    }

    fn publish(&self, table: &Table, batch: &[Rc<Commit>]) {
        let mut entries = table.entries.borrow_mut();
        for commit in batch {
            for (i, entry) in entries[commit.entries.clone()].iter_mut().enumerate() {
                *entry = commit.entry::<L>(i, self.geometry.cluster_bytes());
            }
        }
    }

    /// Publishes the entries of `batch` that are in the file.
    async fn publish_found(&self, table: &Table, batch: &[Rc<Commit>]) -> Result<(), Errno> {
        let found = self.read_entries(table.offset).await?;
        let mut entries = table.entries.borrow_mut();
        for commit in batch {
            for (i, at) in commit.entries.clone().enumerate() {
                if found[at] == commit.entry::<L>(i, self.geometry.cluster_bytes()) {
                    entries[at] = found[at];
                }
            }
        }
        Ok(())
    }

    /// Writes the sectors of `table` that hold `entries`: the published ones, and `batch`.
    pub(super) async fn write_entries(
        &self,
        table: &Table,
        entries: Range<usize>,
        batch: &[Rc<Commit>],
    ) -> Result<(), Errno> {
        let span =
            entries.start - entries.start % SECTOR_ENTRIES..entries.end.next_multiple_of(SECTOR_ENTRIES);
        let mut buf = self.file.buffer(span.len() * 8).await?;
        encode_entries(&mut buf, table.entries.borrow()[span.clone()].iter().copied());
        for commit in batch {
            let at = (commit.entries.start - span.start) * 8;
            let entries = 0..commit.entries.len();
            let numbers = entries.map(|i| commit.entry::<L>(i, self.geometry.cluster_bytes()));
            encode_entries(&mut buf[at..], numbers);
        }
        self.file.write((table.offset + span.start as u64 * 8).0, smallvec![buf]).await.0
    }

    /// Writes the root entry for the table at `offset`, in the file and then in memory.
    pub(super) async fn write_root(&self, index: usize, offset: HostOffset) -> Result<(), Errno> {
        // Two writes of one sector must not cross.
        let _turn = self.root_turn.acquire().await;
        // The root need not begin at a sector of the file.
        let shift = (self.geometry.root_at.0 % SECTOR_BYTES / 8) as usize;
        let start = ((index + shift) / SECTOR_ENTRIES * SECTOR_ENTRIES).saturating_sub(shift);
        let end = (index + shift + 1).next_multiple_of(SECTOR_ENTRIES) - shift;
        let span = start..end.min(self.root.borrow().len());
        let result = self.write_root_span(span.clone(), Some((index, offset))).await;
        match result {
            Ok(()) => self.root.borrow_mut()[index] = offset,
            // As for table entries.
            Err(_) => self.write_root_span(span, None).await.unwrap_or_default(),
        }
        result
    }

    async fn write_root_span(
        &self,
        span: Range<usize>,
        entry: Option<(usize, HostOffset)>,
    ) -> Result<(), Errno> {
        let mut buf = self.file.buffer(span.len() * 8).await?;
        encode_entries(&mut buf, self.root.borrow()[span.clone()].iter().map(|table| table.0));
        if let Some((index, offset)) = entry {
            encode_entries(&mut buf[(index - span.start) * 8..], [offset.0]);
        }
        self.file.write((self.geometry.root_at + span.start as u64 * 8).0, smallvec![buf]).await.0
    }
}

impl Commit {
    fn entry<L: Layout>(&self, i: usize, cluster_bytes: u64) -> u64 {
        L::entry(self.host + i as u64 * cluster_bytes)
    }
}
