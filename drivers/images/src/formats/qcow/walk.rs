//! Who owns which bytes of the file: every table and cluster is visited once.
//!
//! ```text
//!   L1 ──► tables, sorted: none may overlap another, the header or the L1 table
//!    └──► each table's entries ──► plain clusters: one bit per cluster of the file, set twice = owned twice
//!                              └─► compressed runs: a second bit, which may be set often, but not with the first
//! ```
//!
//! Opening for writing walks to find the end of what is used; `check` walks to report. Problems go to a [`Report`] that
//! decides whether to go on. Memory grows with what is mapped, one bit per cluster, as long as the budget has room.

use super::format::{Compressed, Geometry, Header, Mapping};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use tap_host::{Share, Stage};

/// What is told of an image that is walked.
pub(super) trait Report {
    /// A problem; `false` stops the walk.
    fn problem(&mut self, what: String) -> bool;
}

/// The first problem is the last.
#[derive(Default)]
pub(super) struct FirstProblem(pub(super) Option<String>);

impl Report for FirstProblem {
    fn problem(&mut self, what: String) -> bool {
        self.0.get_or_insert(what);
        false
    }
}

/// Clusters in one part of a [`Bits`].
const PART: u64 = 4096;
/// Memory for so many parts is taken at once.
const PARTS_AT_ONCE: usize = 16;
/// What a part takes: its bits, and where to find them.
const PART_BYTES: usize = PART as usize / 8 + 64;

/// Why a bit could not be set.
enum Taken {
    Before,
    NoRoom,
}

impl Taken {
    fn text(&self) -> &'static str {
        match self {
            Taken::Before => "lies where another cluster lies",
            Taken::NoRoom => "is one more than there is memory to look at (--memory)",
        }
    }
}

/// A sparse set of cluster numbers.
struct Bits {
    memory: Stage,
    shares: Vec<Share>,
    parts: BTreeMap<u64, usize>,
    #[expect(
        clippy::vec_box,
        reason = "a list of the bits themselves would need twice the memory while it grows"
    )]
    words: Vec<Box<[u64; PART as usize / 64]>>,
    last: Option<(u64, usize)>,
}

impl Bits {
    fn new(memory: &Stage) -> Self {
        let (parts, words) = (BTreeMap::new(), Vec::new());
        Self { memory: memory.clone(), shares: Vec::new(), parts, words, last: None }
    }

    /// Sets `count` bits from `first` on. Stops at one that was set, or behind which there is no room for more; gives
    /// how many were set before, and which it was.
    fn set(&mut self, first: u64, count: u64) -> Result<(), (u64, Taken)> {
        let (mut bit, end) = (first, first + count);
        while bit < end {
            let index = self.part(bit / PART).ok_or((bit - first, Taken::NoRoom))?;
            let word = &mut self.words[index][(bit % PART / 64) as usize];
            let (from, len) = (bit % 64, (64 - bit % 64).min(end - bit));
            let mask = u64::MAX >> (64 - len) << from;
            let both = *word & mask;
            if both != 0 {
                let taken = both.trailing_zeros();
                *word |= mask & !(u64::MAX << taken);
                return Err((bit - from + u64::from(taken) - first, Taken::Before));
            }
            *word |= mask;
            bit += len;
        }
        Ok(())
    }

    /// Where the words of a part are.
    fn part(&mut self, part: u64) -> Option<usize> {
        if let Some((last, index)) = self.last
            && last == part
        {
            return Some(index);
        }
        let index = match self.parts.get(&part) {
            Some(index) => *index,
            None => {
                if self.words.len().is_multiple_of(PARTS_AT_ONCE) {
                    self.shares.push(self.memory.try_take(PARTS_AT_ONCE * PART_BYTES)?);
                }
                self.words.push(Box::new([0; PART as usize / 64]));
                self.parts.insert(part, self.words.len() - 1);
                self.words.len() - 1
            }
        };
        self.last = Some((part, index));
        Some(index)
    }

    fn has(&self, bit: u64) -> bool {
        let word = |i: &usize| self.words[*i][(bit % PART / 64) as usize];
        self.parts.get(&(bit / PART)).is_some_and(|i| word(i) & 1 << (bit % 64) != 0)
    }

    /// A number in both sets.
    fn common(&self, other: &Bits) -> Option<u64> {
        self.parts.iter().find_map(|(part, index)| {
            let other = &other.words[*other.parts.get(part)?];
            let words = self.words[*index].iter().zip(other.iter()).enumerate();
            let (at, both) = words.map(|(at, (a, b))| (at as u64, a & b)).find(|(_, both)| *both != 0)?;
            Some(part * PART + at * 64 + u64::from(both.trailing_zeros()))
        })
    }
}

/// What a range of the file that is not a cluster is for.
enum Owner {
    Header,
    Name,
    L1,
    L2(usize),
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Owner::Header => f.write_str("the header"),
            Owner::Name => f.write_str("the name of the backing file"),
            Owner::L1 => f.write_str("the L1 table"),
            Owner::L2(index) => write!(f, "L2 table {index}"),
        }
    }
}

/// A walk in progress, and what it found.
pub(super) struct Walk {
    geometry: Geometry,
    file_bytes: u64,
    /// No reference may reach further.
    reach: u64,
    /// Header and tables by offset.
    tables: Vec<(Range<u64>, Owner)>,
    plain: Bits,
    compressed: Bits,
    /// The highest end of anything that is referenced.
    pub(super) end: u64,
    /// Plain clusters that are mapped.
    pub(super) plain_clusters: u64,
    /// Compressed clusters that are mapped.
    pub(super) compressed_clusters: u64,
    /// Bytes of compressed clusters.
    pub(super) compressed_bytes: u64,
}

impl Walk {
    pub(super) fn new(header: &Header, file_bytes: u64, memory: &Stage) -> Self {
        let geometry = header.geometry;
        let header_end = if header.xen.is_some() { 64 } else { 48 };
        let l1 = geometry.l1_offset..geometry.l1_end();
        let mut tables = vec![(0..header_end, Owner::Header), (l1, Owner::L1)];
        tables.extend(header.backing.map(|(at, len)| (at..at + u64::from(len), Owner::Name)));
        Self {
            geometry,
            file_bytes,
            reach: geometry.reach(file_bytes),
            plain: Bits::new(memory),
            compressed: Bits::new(memory),
            end: tables.iter().map(|t| t.0.end).max().unwrap_or(0),
            tables,
            plain_clusters: 0,
            compressed_clusters: 0,
            compressed_bytes: 0,
        }
    }

    /// Takes the L1 table. Gives the indices and offsets of the L2 tables that can be read, by offset.
    pub(super) fn take_l1(&mut self, l1: &[u64], report: &mut impl Report) -> Option<Vec<(usize, u64)>> {
        for (index, offset) in l1.iter().copied().enumerate().filter(|(_, offset)| *offset != 0) {
            let end = offset.checked_add(self.geometry.table_bytes()).filter(|end| *end <= self.reach);
            match end {
                Some(end) if offset.is_multiple_of(512) => {
                    self.end = self.end.max(end);
                    self.tables.push((offset..end, Owner::L2(index)));
                }
                _ => {
                    let what = format!(
                        "L2 table {index} at byte {offset} is misplaced or far behind the file's end"
                    );
                    if !report.problem(what) {
                        return None;
                    }
                }
            }
        }
        self.tables.sort_unstable_by_key(|t| t.0.start);
        for pair in self.tables.windows(2).filter(|pair| pair[1].0.start < pair[0].0.end) {
            if !report.problem(format!("{} and {} overlap", pair[0].1, pair[1].1)) {
                return None;
            }
        }
        let readable = self.tables.iter().filter_map(|(range, owner)| match owner {
            Owner::L2(index) => Some((*index, range.start)),
            _ => None,
        });
        Some(readable.collect())
    }

    /// Takes the entries of L2 table `index`; `None` when the report wants no more.
    pub(super) fn take_l2(&mut self, index: usize, entries: &[u64], report: &mut impl Report) -> Option<()> {
        let mut at = 0;
        while let Some(entry) = entries.get(at) {
            let (taken, problem) = match Mapping::of(*entry, self.geometry.cluster_bits) {
                Mapping::Unmapped => (1, None),
                Mapping::Plain(offset) => self.take_plain(offset, &entries[at..]),
                Mapping::Compressed(run) => (1, self.take_compressed(run).err()),
            };
            at += taken;
            let Some(problem) = problem else { continue };
            let (cluster, entry) = (index * entries.len() + at - 1, entries[at - 1]);
            if !report.problem(format!("cluster {cluster} ({entry:#x}) {problem}")) {
                return None;
            }
        }
        Some(())
    }

    /// Takes the run of contiguous clusters that `entries` begin with. Gives how many entries that was, and what is
    /// wrong with the last of them. Images that were filled in order are all runs.
    fn take_plain(&mut self, offset: u64, entries: &[u64]) -> (usize, Option<&'static str>) {
        let bytes = self.geometry.cluster_bytes();
        let fits = self.reach.saturating_sub(offset) / bytes;
        if !offset.is_multiple_of(bytes) || fits == 0 {
            return (1, Some("is misplaced or far behind the file's end"));
        }
        let places = (offset..).step_by(bytes as usize).take(fits as usize);
        let count = entries.iter().zip(places).take_while(|(entry, place)| *entry == place).count();
        let (count, problem) = match self.plain.set(offset / bytes, count as u64) {
            Ok(()) => (count, None),
            Err((before, taken)) => (before as usize + 1, Some(taken.text())),
        };
        self.plain_clusters += count as u64;
        self.end = self.end.max(offset + count as u64 * bytes);
        (count, problem)
    }

    fn take_compressed(&mut self, run: Compressed) -> Result<(), &'static str> {
        let end = run.offset + run.len;
        if run.len == 0 || end > self.file_bytes {
            return Err("is compressed and not inside the file");
        }
        let at = self.tables.partition_point(|t| t.0.end <= run.offset);
        if self.tables.get(at).is_some_and(|t| t.0.start < end) {
            return Err("is compressed and overlaps a table");
        }
        for unit in run.offset / self.geometry.cluster_bytes()..end.div_ceil(self.geometry.cluster_bytes()) {
            // Compressed runs may share.
            if let Err((_, taken @ Taken::NoRoom)) = self.compressed.set(unit, 1) {
                return Err(taken.text());
            }
        }
        self.end = self.end.max(end);
        self.compressed_clusters += 1;
        self.compressed_bytes += run.len;
        Ok(())
    }

    /// Compares clusters with tables and compressed runs, once all tables were taken.
    pub(super) fn finish(&self, report: &mut impl Report) -> Option<()> {
        let bytes = self.geometry.cluster_bytes();
        if let Some(unit) = self.plain.common(&self.compressed)
            && !report.problem(format!("compressed bytes lie in the cluster at byte {}", unit * bytes))
        {
            return None;
        }
        for table in &self.tables {
            let hit = (table.0.start / bytes..table.0.end.div_ceil(bytes)).find(|unit| self.plain.has(*unit));
            if let Some(unit) = hit
                && !report.problem(format!("{} and the cluster at byte {} overlap", table.1, unit * bytes))
            {
                return None;
            }
        }
        Some(())
    }
}
