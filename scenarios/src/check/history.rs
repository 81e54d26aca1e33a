//! The history of one disk: what was submitted, what was answered, and what reads may therefore see.
//!
//! Blocks of eight sectors are kept as one while every request treats them alike, so that 4 KiB requests cost one step;
//! the first request that does not splits the block.

mod endings;
mod fences;
mod growth;
mod wrong;

use super::frontier::{Block, Clock, Order};
use super::oracle::{Oracle, is_broken};
use crate::tag::{Found, Tag};
use fences::Fences;
use kernel_model::PageMap;
use tap_host::{SECTOR_BYTES, SectorRange};
pub use wrong::{Finding, Wrong};

const BLOCK: u64 = 8;

/// A write's number, from 1; unique within a history.
pub type WriteId = u64;

/// Initial content of the disk.
#[derive(Clone, Default)]
pub enum Initial {
    /// Zeros.
    #[default]
    Zero,
    /// Any bytes, by byte offset.
    Bytes(PageMap),
}

#[derive(Clone)]
enum Cell {
    Whole(Block),
    Split(Box<[Block; BLOCK as usize]>),
}

impl Default for Cell {
    fn default() -> Self {
        Cell::Whole(Block::default())
    }
}

/// What the bytes of a sector say about their origin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Seen {
    /// This write, or the initial content for write 0.
    Write(WriteId),
    /// Zeros: of any write of zeros, or the initial content if that was zeros.
    Zeros { initial: bool },
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Seen::Write(0) => f.write_str("its initial content"),
            Seen::Write(write) => write!(f, "write {write}"),
            Seen::Zeros { .. } => f.write_str("zeros"),
        }
    }
}

/// The history of one disk.
#[derive(Clone)]
pub struct BlockHistory {
    cells: Vec<Cell>,
    initial: Initial,
    clock: Clock,
    writer: u32,
    next_write: WriteId,
    /// Running reads in order of submission. These lists are as long as the guest's queue is deep.
    reads: Vec<Clock>,
    /// Running writes.
    running: Vec<(WriteId, SectorRange)>,
    fences: Fences,
    /// Cells with versions that are not durable, and a flag for each cell that is in the list.
    dirty: Vec<u64>,
    is_dirty: Vec<bool>,
    /// Whether bodies of sectors are filled and checked.
    full: bool,
    size_sectors: u64,
    order: Order,
    was_cut: bool,
    /// Reads submitted up to this time may have run twice, because the successor of a dead process repeats them.
    repeated_to: Clock,
    /// Whether writes may fail.
    may_fail: bool,
    /// A write succeeded although an earlier read had shown that it failed; reported with the next read.
    overtaken: Option<Finding>,
    flushes: u64,
    /// What flushes settled, if it is collected.
    settled: Option<Vec<SectorRange>>,
}

impl BlockHistory {
    /// A disk of `size_sectors` that `writer` writes to. `full` fills and checks whole sectors instead of tags only.
    pub fn new(size_sectors: u64, writer: u32, initial: Initial, full: bool) -> Self {
        Self {
            cells: vec![Cell::default(); size_sectors.div_ceil(BLOCK) as usize],
            initial,
            clock: 1,
            writer,
            next_write: 1,
            reads: Vec::new(),
            running: Vec::new(),
            fences: Fences::default(),
            dirty: Vec::new(),
            is_dirty: vec![false; size_sectors.div_ceil(BLOCK) as usize],
            full,
            size_sectors,
            order: Order::Submission,
            was_cut: false,
            repeated_to: 0,
            may_fail: false,
            overtaken: None,
            flushes: 0,
            settled: None,
        }
    }

    /// From now on concurrent overlapping requests may take either order, because the guest itself repeats requests
    /// that may have run before.
    pub fn relax_order(&mut self) {
        self.order = Order::Answer;
    }

    /// The order that a read submitted at `inv` relies on.
    fn order_of_read(&self, inv: Clock) -> Order {
        match self.order {
            _ if inv <= self.repeated_to => Order::Answer,
            Order::Submission if self.may_fail => Order::SubmissionOrFailure,
            order => order,
        }
    }

    /// Whether writes may fail from now on.
    pub fn allow_failures(&mut self, may_fail: bool) {
        self.may_fail = may_fail;
    }

    /// Size of the disk in sectors.
    pub fn size_sectors(&self) -> u64 {
        self.size_sectors
    }

    /// The guest's number in the tags of its sectors.
    pub fn writer(&self) -> u32 {
        self.writer
    }

    fn tick(&mut self) -> Clock {
        self.clock += 1;
        self.clock
    }

    fn oldest_read(&self) -> Clock {
        self.reads.first().copied().unwrap_or(Clock::MAX)
    }

    fn each(&mut self, range: SectorRange, mut f: impl FnMut(&mut Block)) {
        let end = range.start.0 + u64::from(range.count);
        let mut sector = range.start.0;
        while sector < end {
            let cell = &mut self.cells[(sector / BLOCK) as usize];
            let stop = (sector - sector % BLOCK + BLOCK).min(end);
            match cell {
                Cell::Whole(block) if stop - sector == BLOCK => f(block),
                Cell::Whole(block) => {
                    let mut blocks = Box::new(std::array::from_fn(|_| block.clone()));
                    for s in sector..stop {
                        let block: &mut Block = &mut blocks[(s % BLOCK) as usize];
                        f(block);
                    }
                    *cell = Cell::Split(blocks);
                }
                Cell::Split(blocks) => {
                    for s in sector..stop {
                        f(&mut blocks[(s % BLOCK) as usize]);
                    }
                }
            }
            sector = stop;
        }
    }

    /// A write is submitted; its payload is made by [`BlockHistory::payload`].
    pub fn begin_write(&mut self, range: SectorRange) -> WriteId {
        self.begin(range, false)
    }

    /// A write of zeros is submitted.
    pub fn begin_zeros(&mut self, range: SectorRange) -> WriteId {
        self.begin(range, true)
    }

    /// A discard is submitted, which is zeros that may or may not take effect: it ends like a failed write, whatever
    /// the answer.
    pub fn begin_discard(&mut self, range: SectorRange) -> WriteId {
        let write = self.begin(range, true);
        self.each(range, |b| b.may_do_nothing(write));
        write
    }

    fn begin(&mut self, range: SectorRange, zero: bool) -> WriteId {
        let write = self.next_write;
        self.next_write += 1;
        let inv = self.tick();
        self.each(range, |b| b.begin(write, inv, zero));
        self.running.push((write, range));
        let last = (range.start.0 + u64::from(range.count) - 1) / BLOCK;
        for cell in range.start.0 / BLOCK..=last {
            if !std::mem::replace(&mut self.is_dirty[cell as usize], true) {
                self.dirty.push(cell);
            }
        }
        write
    }

    /// Fills the bytes that `write` puts into `sector`.
    pub fn payload(&self, write: WriteId, sector: u64, bytes: &mut [u8]) {
        Tag { writer: self.writer, op: write, sector }.fill(bytes, self.full);
    }

    /// A write was answered.
    pub fn end_write(&mut self, write: WriteId, ok: bool) {
        let Some(at) = self.running.iter().position(|r| r.0 == write) else { return };
        let (_, range) = self.running.swap_remove(at);
        let res = self.tick();
        let (oldest, order) = (self.oldest_read(), self.order);
        let mut missed_by = None;
        self.each(range, |b| missed_by = missed_by.or(b.end(write, res, ok, oldest, order)));
        if let (Some(read), None) = (missed_by, &self.overtaken) {
            let text = format!(
                "write {write} to {range} succeeded, but a read that was submitted after it and answered before it did not see it"
            );
            let sector = range.start.0;
            self.overtaken = Some(Finding { text, sector, writes: vec![write], reads: vec![read] });
        }
    }

    /// The answer to `write` of `range` promised that it is durable.
    pub fn harden(&mut self, write: WriteId, range: SectorRange) {
        self.fences.lift(write);
        let (oldest, order) = (self.oldest_read(), self.order);
        self.each(range, |b| b.hardened(write, oldest, order));
    }

    /// A read is submitted. Returns its time for [`BlockHistory::check_read`].
    pub fn begin_read(&mut self) -> Clock {
        let inv = self.tick();
        self.reads.push(inv);
        inv
    }

    /// A read that was submitted at `inv` was answered without data.
    pub fn end_read(&mut self, inv: Clock) {
        if let Ok(at) = self.reads.binary_search(&inv) {
            self.reads.remove(at);
        }
    }

    /// A read submitted at `inv` returned `bytes` from `range.start` on.
    ///
    /// # Errors
    /// What is wrong with the first wrong sector.
    pub fn check_read(&mut self, inv: Clock, range: SectorRange, bytes: &[u8]) -> Result<(), Wrong> {
        self.end_read(inv);
        let res = self.tick();
        if self.was_cut && is_broken(Oracle::ReadsAfterCut) {
            return Ok(());
        }
        if let Some(found) = self.overtaken.take() {
            return Err(Wrong::Version(found));
        }
        let mut at = 0;
        while at < u64::from(range.count) {
            let sector = range.start.0 + at;
            let whole = sector.is_multiple_of(BLOCK)
                && u64::from(range.count) - at >= BLOCK
                && matches!(self.cells[(sector / BLOCK) as usize], Cell::Whole(_));
            let n = if whole { BLOCK } else { 1 };
            let slice = |i: u64| {
                let from = ((at + i) * SECTOR_BYTES) as usize;
                &bytes[from..from + SECTOR_BYTES as usize]
            };
            let mut seen = None;
            for i in 0..n {
                let found = self.seen(sector + i, slice(i)).map_err(|wrong| wrong.found_by(inv))?;
                if seen.is_some_and(|s| s != found) {
                    // The sectors of the cell were alike until now and differ from here on.
                    seen = None;
                    break;
                }
                seen = Some(found);
            }
            match seen {
                Some(seen) => self.see(SectorRange::new(sector, n as u32), seen, inv, res)?,
                None => {
                    for i in 0..n {
                        let seen = self.seen(sector + i, slice(i)).map_err(|wrong| wrong.found_by(inv))?;
                        self.see(SectorRange::new(sector + i, 1), seen, inv, res)?;
                    }
                }
            }
            at += n;
        }
        if inv <= self.repeated_to {
            // A read that ran across the restart may show what the dead process knew.
            self.revive_failed();
        }
        Ok(())
    }

    fn see(&mut self, range: SectorRange, seen: Seen, inv: Clock, res: Clock) -> Result<(), Wrong> {
        if let Seen::Write(write) = seen {
            self.exclude_hidden(write)?;
        }
        let mut bad = None;
        let order = self.order_of_read(inv);
        self.each(range, |b| {
            let may_be = |b: &mut Block| match seen {
                Seen::Write(write) => b.read(write, inv, res, order),
                Seen::Zeros { initial } => b.read_zeros(initial, inv, res, order),
            };
            if bad.is_none() && !may_be(b) {
                let mut writes: Vec<WriteId> = b.writes().collect();
                let why = match seen {
                    Seen::Write(write) => {
                        let (why, hidden_by) = b.why_hidden(write, inv, res, order);
                        writes = [write].into_iter().chain(hidden_by).chain(writes).collect();
                        format!(" ({why})")
                    }
                    Seen::Zeros { .. } => String::new(),
                };
                bad = Some((why, b.describe_shown(inv, res, order), b.is_settled(), writes));
            }
        });
        match bad {
            None => Ok(()),
            Some((why, versions, settled, writes)) => {
                let sector = range.start.0;
                let text = format!("sector {sector} holds {seen}{why}, but may hold {versions}");
                let found = Finding { text, sector, writes, reads: vec![inv] };
                Err(if settled { Wrong::Unstable(found) } else { Wrong::Version(found) })
            }
        }
    }

    /// The write that put these bytes at `sector`; fails if there was none.
    fn seen(&self, sector: u64, bytes: &[u8]) -> Result<Seen, Wrong> {
        let found = Tag::find(bytes, self.full);
        match found {
            Found::Tag(t)
                if (t.writer == self.writer || is_broken(Oracle::WriterIgnored))
                    && (t.sector == sector || is_broken(Oracle::PlaceIgnored))
                    && t.op < self.next_write =>
            {
                return Ok(Seen::Write(t.op));
            }
            Found::Zero if matches!(self.initial, Initial::Zero) => return Ok(Seen::Zeros { initial: true }),
            _ => {}
        }
        if let Initial::Bytes(pages) = &self.initial {
            let mut was = [0; SECTOR_BYTES as usize];
            pages.read(sector * SECTOR_BYTES, &mut was);
            match found {
                Found::Zero => return Ok(Seen::Zeros { initial: was == *bytes }),
                _ if was == *bytes => return Ok(Seen::Write(0)),
                _ => {}
            }
        }
        let text = format!("sector {sector} holds {found}");
        Err(Wrong::Foreign(Finding {
            text,
            sector,
            writes: self.block(sector).writes().collect(),
            reads: vec![],
        }))
    }

    /// A flush is submitted.
    pub fn begin_flush(&mut self) -> Clock {
        self.tick()
    }

    /// A flush that was submitted at `inv` succeeded.
    pub fn end_flush(&mut self, inv: Clock) {
        self.tick();
        self.flushes += 1;
        if let Some(mut settled) = self.settled.take() {
            settled.extend(self.unsettled());
            self.settled = Some(settled);
        }
        if is_broken(Oracle::FlushForgotten) {
            return;
        }
        let (oldest, order) = (self.oldest_read(), self.order);
        let (cells, is_dirty) = (&mut self.cells, &mut self.is_dirty);
        self.dirty.retain(|cell| {
            let left = match &mut cells[*cell as usize] {
                Cell::Whole(block) => block.flushed(inv, oldest, order),
                Cell::Split(blocks) => {
                    blocks.iter_mut().fold(false, |left, block| block.flushed(inv, oldest, order) | left)
                }
            };
            is_dirty[*cell as usize] = left;
            left
        });
    }

    /// Checks what a sector holds after a power cut, without recording anything.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check_survivor(&self, sector: u64, bytes: &[u8]) -> Result<(), Wrong> {
        let seen = self.seen(sector, bytes)?;
        let block = self.block(sector);
        let may = match seen {
            Seen::Write(write) => block.may_survive(write),
            Seen::Zeros { initial } => block.zeros_may_survive(initial),
        };
        if may || is_broken(Oracle::SurvivorsIgnored) {
            return Ok(());
        }
        let text = format!("sector {sector} holds {seen}, but may hold {}", block.describe_survivors());
        Err(Wrong::Version(Finding { text, sector, writes: block.writes().collect(), reads: vec![] }))
    }

    fn block(&self, sector: u64) -> &Block {
        match &self.cells[(sector / BLOCK) as usize] {
            Cell::Whole(block) => block,
            Cell::Split(blocks) => &blocks[(sector % BLOCK) as usize],
        }
    }

    /// Sectors that may hold more than one version after a power cut, or recently could: whole cells.
    pub fn unsettled(&self) -> impl Iterator<Item = SectorRange> + '_ {
        self.dirty.iter().map(|cell| {
            let start = cell * BLOCK;
            SectorRange::new(start, (self.size_sectors - start).min(BLOCK) as u32)
        })
    }

    /// Ranges of running writes.
    pub fn running(&self) -> impl Iterator<Item = SectorRange> + '_ {
        self.running.iter().map(|(_, range)| *range)
    }

    /// Number of flushes that succeeded.
    pub fn flushes(&self) -> u64 {
        self.flushes
    }

    /// What was unsettled before each flush that succeeded since the last call. The first call starts the collection.
    pub fn take_settled(&mut self) -> Vec<SectorRange> {
        self.settled.replace(Vec::new()).unwrap_or_default()
    }

    /// Logical time, which every event advances.
    pub fn clock(&self) -> Clock {
        self.clock
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Invariant;

    pub(super) fn sector_of(history: &BlockHistory, write: WriteId, sector: u64) -> [u8; 512] {
        let mut bytes = [0; 512];
        if write > 0 {
            history.payload(write, sector, &mut bytes);
        }
        bytes
    }

    #[test]
    fn settled_ranges_are_returned_once() {
        let mut h = BlockHistory::new(100, 1, Initial::Zero, false);
        assert!(h.take_settled().is_empty());
        for start in [8, 32] {
            let write = h.begin_write(SectorRange::new(start, 8));
            h.end_write(write, true);
            let inv = h.begin_flush();
            h.end_flush(inv);
        }
        assert_eq!(h.take_settled(), [SectorRange::new(8, 8), SectorRange::new(32, 8)]);
        assert!(h.take_settled().is_empty());
    }

    #[test]
    fn requests_of_any_shape_are_tracked() {
        let mut h = BlockHistory::new(100, 1, Initial::Zero, true);
        let w = h.begin_write(SectorRange::new(5, 20));
        h.end_write(w, true);
        let inv = h.begin_read();
        let bytes: Vec<u8> =
            (0..32).flat_map(|s| sector_of(&h, if (5..25).contains(&s) { w } else { 0 }, s)).collect();
        h.check_read(inv, SectorRange::new(0, 32), &bytes).unwrap();
        let inv = h.begin_read();
        let old = h.check_read(inv, SectorRange::new(8, 1), &[0; 512]).unwrap_err();
        assert!(old.to_string().contains("holds zeros"), "{old}");
        let inv = h.begin_read();
        let misplaced = sector_of(&h, w, 9);
        let wrong = h.check_read(inv, SectorRange::new(8, 1), &misplaced).unwrap_err();
        assert!(
            wrong.to_string().contains("to sector 9") && wrong.invariant(Invariant::G1) == Invariant::G10
        );
    }

    #[test]
    fn bytes_of_another_writer_are_wrong() {
        let of = |writer| {
            let mut h = BlockHistory::new(64, writer, Initial::Zero, true);
            let w = h.begin_write(SectorRange::new(3, 1));
            h.end_write(w, true);
            (sector_of(&h, w, 3), h)
        };
        let ((_, mut own), (foreign, _)) = (of(1), of(2));
        let inv = own.begin_read();
        let wrong = own.check_read(inv, SectorRange::new(3, 1), &foreign).unwrap_err();
        assert_eq!(wrong.invariant(Invariant::G1), Invariant::G10);
    }

    #[test]
    fn a_report_does_not_contradict_itself() {
        let mut h = BlockHistory::new(64, 1, Initial::Zero, false);
        let range = SectorRange::new(3, 1);
        let first = h.begin_write(range);
        let inv = h.begin_read();
        let second = h.begin_write(range);
        h.end_write(first, true);
        h.end_write(second, true);
        let bytes = sector_of(&h, second, 3);
        let text = h.check_read(inv, range, &bytes).unwrap_err().to_string();
        let may_hold = "write 2 (submitted after this read), \
                        but may hold write 1 (overwritten since this read was submitted)";
        assert!(text.ends_with(may_hold), "{text}");
        let flush = h.begin_flush();
        h.end_flush(flush);
        let old = sector_of(&h, first, 3);
        let text = h.check_survivor(3, &old).unwrap_err().to_string();
        assert!(text.ends_with("holds write 1, but may hold write 2 (answered)"), "{text}");
    }

    #[test]
    fn a_power_cut_takes_only_what_was_not_flushed() {
        let mut h = BlockHistory::new(64, 1, Initial::Zero, false);
        let a = h.begin_write(SectorRange::new(0, 8));
        h.end_write(a, true);
        let flush = h.begin_flush();
        h.end_flush(flush);
        let b = h.begin_write(SectorRange::new(4, 8));
        for (sector, write, ok) in
            [(0, a, true), (0, 0, false), (4, a, true), (4, b, true), (4, 0, false), (9, 0, true)]
        {
            let bytes = sector_of(&h, write, sector);
            assert_eq!(h.check_survivor(sector, &bytes).is_ok(), ok, "{sector} {write}");
        }
        h.power_cut();
        let inv = h.begin_read();
        let bytes = sector_of(&h, b, 4);
        h.check_read(inv, SectorRange::new(4, 1), &bytes).unwrap();
        let inv = h.begin_read();
        let bytes = sector_of(&h, a, 4);
        let wrong = h.check_read(inv, SectorRange::new(4, 1), &bytes).unwrap_err();
        assert_eq!(wrong.invariant(Invariant::G7), Invariant::G9, "another version was read");
        let inv = h.begin_read();
        let wrong = h.check_read(inv, SectorRange::new(0, 1), &[0; 512]).unwrap_err();
        assert_eq!(wrong.invariant(Invariant::G7), Invariant::G7, "it was flushed");
    }
}
