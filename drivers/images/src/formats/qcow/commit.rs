//! Writing mappings, several at a time.
//!
//! ```text
//!   A: entry 3 ─┐
//!   B: entry 9 ─┼─► the first to get the table's turn writes the sectors that hold 3 … 9:
//!   C: entry 5 ─┘   what is published, and 3, 5, 9
//!                   success: publish them;  failure: none of them is there, as far as anybody is told
//! ```
//!
//! A write that failed may have reached the file. Its entries are not published but taken back in the file, if that is
//! still possible. In any case each of the guest's clusters keeps the place in the file that such an entry points to
//! (see [`super::alloc`]), and what is there is one of the allowed versions.

use super::Image;
use super::table::Table;
use crate::ImageHost;
use smallvec::smallvec;
use std::cell::Cell;
use std::ops::Range;
use std::rc::Rc;
use tap_host::{Bug, Errno, Mark, SECTOR_BYTES};

/// Entries in a sector of a table.
const SECTOR_ENTRIES: usize = SECTOR_BYTES as usize / 8;

/// Contiguous entries of one table that map contiguous clusters of the file.
pub(super) struct Commit {
    /// Indices in the table.
    entries: Range<usize>,
    /// Byte offset of the cluster of the first.
    host: u64,
    result: Cell<Option<Result<(), Errno>>>,
}

impl<H: ImageHost> Image<H> {
    /// Maps `entries` of `table` to the clusters from byte `host` on, in the file and then in memory. Runs in a task
    /// that is not dropped half way: a write that lands late would undo a later one.
    pub(super) async fn commit(
        &self,
        table: &Rc<Table>,
        entries: Range<usize>,
        host: u64,
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
            self.host.mark(Mark::CommitShared);
        }
        let first = batch.iter().map(|c| c.entries.start).min().unwrap_or(0);
        let end = batch.iter().map(|c| c.entries.end).max().unwrap_or(0);
        let result = if self.host.bug(Bug::MappingInMemory) {
            self.unwritten.borrow_mut().push(Rc::clone(table));
            Ok(())
        } else {
            self.write_entries(table, first..end, &batch).await
        };
        if result.is_err() {
            // Back to what everybody is told. If this fails too the entries stay in doubt, which is provided for.
            self.write_entries(table, first..end, &[]).await.unwrap_or_default();
        }
        if result.is_ok() || self.host.bug(Bug::FailedL2Cached) {
            self.publish(table, &batch);
        }
        batch.iter().for_each(|commit| commit.result.set(Some(result)));
        result
    }

    fn publish(&self, table: &Table, batch: &[Rc<Commit>]) {
        let mut entries = table.entries.borrow_mut();
        for commit in batch {
            for (i, entry) in entries[commit.entries.clone()].iter_mut().enumerate() {
                *entry = commit.entry(i, self.geometry.cluster_bytes());
            }
        }
    }

    /// Writes the sectors of `table` that hold `entries`: what is published, and `batch`.
    pub(super) async fn write_entries(
        &self,
        table: &Table,
        entries: Range<usize>,
        batch: &[Rc<Commit>],
    ) -> Result<(), Errno> {
        let end = entries.end.next_multiple_of(SECTOR_ENTRIES).min(self.geometry.l2_entries());
        let span = entries.start - entries.start % SECTOR_ENTRIES..end;
        let mut buf = self.file.buffer(span.len() * 8).await?;
        put_numbers(&mut buf, &table.entries.borrow()[span.clone()]);
        let numbers = buf.as_chunks_mut::<8>().0;
        for commit in batch {
            let at = commit.entries.start - span.start;
            for (i, number) in numbers[at..at + commit.entries.len()].iter_mut().enumerate() {
                *number = commit.entry(i, self.geometry.cluster_bytes()).to_be_bytes();
            }
        }
        self.file.write(table.offset + span.start as u64 * 8, smallvec![buf]).await.0
    }

    /// Enters the L2 table at `offset` in the L1 table, in the file and then in memory.
    pub(super) async fn write_l1(&self, index: usize, offset: u64) -> Result<(), Errno> {
        // Two writes of one sector must not cross.
        let _turn = self.l1_turn.acquire().await;
        // Where the sectors of the file begin depends on where the table does; it need not be at one of them.
        let shift = (self.geometry.l1_offset % SECTOR_BYTES / 8) as usize;
        let start = ((index + shift) / SECTOR_ENTRIES * SECTOR_ENTRIES).saturating_sub(shift);
        let end = (index + shift + 1).next_multiple_of(SECTOR_ENTRIES) - shift;
        let span = start..end.min(self.l1.borrow().len());
        let result = self.write_l1_span(span.clone(), Some((index, offset))).await;
        match result {
            Ok(()) => self.l1.borrow_mut()[index] = offset,
            // As for L2 entries.
            Err(_) => self.write_l1_span(span, None).await.unwrap_or_default(),
        }
        result
    }

    async fn write_l1_span(&self, span: Range<usize>, entry: Option<(usize, u64)>) -> Result<(), Errno> {
        let mut buf = self.file.buffer(span.len() * 8).await?;
        put_numbers(&mut buf, &self.l1.borrow()[span.clone()]);
        if let Some((index, offset)) = entry {
            put_numbers(&mut buf[(index - span.start) * 8..], &[offset]);
        }
        self.file.write(self.geometry.l1_offset + span.start as u64 * 8, smallvec![buf]).await.0
    }
}

impl Commit {
    fn entry(&self, i: usize, cluster_bytes: u64) -> u64 {
        self.host + i as u64 * cluster_bytes
    }
}

fn put_numbers(bytes: &mut [u8], numbers: &[u64]) {
    for (to, number) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(numbers) {
        *to = number.to_be_bytes();
    }
}
