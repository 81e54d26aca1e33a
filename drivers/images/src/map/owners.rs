//! The owner of each byte of the file, found by visiting every table and cluster once.
//!
//! ```text
//!   root ──► tables, sorted: none may overlap another, the header or the root
//!    └───► each table's entries ──► plain clusters: one bit per cluster of the file, set twice = owned twice
//!                               └─► compressed runs: a second bit, which may be set often, but not with the first
//! ```
//!
//! Opening for writing walks to find the end of the used space; `check` walks to report. Problems go to a [`Report`],
//! which decides whether to continue. Memory grows with the mapped clusters, one bit each, within the budget.

use super::HostOffset;
use super::bits::{Bits, Taken};
use super::layout::{Compressed, Geometry, Layout, Mapping};
use std::marker::PhantomData;
use std::ops::Range;
use tap_host::Stage;

/// Receives the problems that a walk finds.
pub(crate) trait Report {
    /// Reports a problem; `false` stops the walk.
    fn problem(&mut self, what: String) -> bool;

    /// Reports that `clusters`, or a table, which counts as one, lie past the end of the file. A crash may leave that
    /// if they were never flushed, so opening for writing continues.
    fn missing(&mut self, clusters: u64, what: impl FnOnce() -> String) {
        let _ = (clusters, what);
    }
}

/// Stops at the first problem.
#[derive(Default)]
pub(crate) struct FirstProblem(pub(crate) Option<String>);

impl Report for FirstProblem {
    fn problem(&mut self, what: String) -> bool {
        self.0.get_or_insert(what);
        false
    }
}

/// The largest usual block of a medium.
const BLOCK_BYTES: u64 = 4096;

/// The owner of a range of the file that is not a cluster.
enum Owner {
    Fixed(&'static str),
    Table(usize),
}

impl Owner {
    fn name<L: Layout>(&self) -> String {
        match self {
            Owner::Fixed(name) => (*name).to_owned(),
            Owner::Table(index) => format!("{} {index}", L::TABLE),
        }
    }
}

/// A walk in progress, and its findings.
pub(crate) struct Owners<L: Layout> {
    geometry: Geometry,
    file_bytes: u64,
    /// No reference may end past it.
    reach: HostOffset,
    /// The table that may lie past the end of the file.
    unwritten: Option<usize>,
    /// Ranges that are not clusters, by offset.
    tables: Vec<(Range<HostOffset>, Owner)>,
    plain: Bits,
    compressed: Bits,
    /// The end of the highest reference.
    pub(crate) end: HostOffset,
    /// Mapped clusters that are not compressed.
    pub(crate) plain_clusters: u64,
    /// Mapped clusters that are compressed.
    pub(crate) compressed_clusters: u64,
    layout: PhantomData<L>,
}

impl<L: Layout> Owners<L> {
    /// A walk of a file of `file_bytes`, with the named ranges of `fixed`. Table `unwritten` may lie past its end.
    pub(crate) fn new(
        geometry: Geometry,
        (file_bytes, reach, unwritten): (u64, HostOffset, Option<usize>),
        fixed: impl IntoIterator<Item = (Range<HostOffset>, &'static str)>,
        memory: &Stage,
    ) -> Self {
        let fixed = fixed.into_iter().map(|(range, name)| (range, Owner::Fixed(name)));
        let tables: Vec<_> = fixed.collect();
        Self {
            geometry,
            file_bytes,
            reach,
            unwritten,
            plain: Bits::new(memory),
            compressed: Bits::new(memory),
            end: tables.iter().map(|t| t.0.end).max().unwrap_or_default(),
            tables,
            plain_clusters: 0,
            compressed_clusters: 0,
            layout: PhantomData,
        }
    }

    /// Takes the root. Returns the indices and offsets of the tables that can be read, by offset.
    pub(crate) fn take_root(
        &mut self,
        root: &[HostOffset],
        report: &mut impl Report,
    ) -> Option<Vec<(usize, HostOffset)>> {
        for (index, offset) in root.iter().copied().enumerate().filter(|(_, at)| *at != HostOffset(0)) {
            let end = offset.0.checked_add(self.geometry.table_bytes()).map(HostOffset);
            let end = end.filter(|end| *end <= self.reach && offset.0.is_multiple_of(512));
            self.end = self.end.max(end.unwrap_or_default());
            let what = match end {
                Some(end) if end.0 > self.file_bytes && self.unwritten != Some(index) => {
                    format!("extends past the end of the file at byte {}", self.file_bytes)
                }
                Some(end) => {
                    self.tables.push((offset..end, Owner::Table(index)));
                    continue;
                }
                None => "is misplaced or far past the end of the file".to_owned(),
            };
            if !report.problem(format!("{} {index} at byte {} {what}", L::TABLE, offset.0)) {
                return None;
            }
        }
        self.tables.sort_unstable_by_key(|t| t.0.start);
        for pair in self.tables.windows(2).filter(|pair| pair[1].0.start < pair[0].0.end) {
            if !report.problem(format!("{} and {} overlap", pair[0].1.name::<L>(), pair[1].1.name::<L>())) {
                return None;
            }
        }
        let readable = self.tables.iter().filter_map(|(range, owner)| match owner {
            Owner::Table(index) => Some((*index, range.start)),
            _ => None,
        });
        Some(readable.collect())
    }

    /// Takes the entries of table `index`; `None` when the report stops the walk.
    pub(crate) fn take_table(
        &mut self,
        index: usize,
        entries: &[u64],
        report: &mut impl Report,
    ) -> Option<()> {
        let mut at = 0;
        while let Some(entry) = entries.get(at) {
            let (taken, problem) = match L::mapping(*entry, &self.geometry) {
                Mapping::Unmapped => (1, None),
                Mapping::Plain(offset) => {
                    let (taken, problem) = self.take_plain(offset, &entries[at..]);
                    let good = taken as u64 - u64::from(problem.is_some());
                    self.find_missing((index * entries.len() + at) as u64, offset, good, report);
                    (taken, problem)
                }
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

    /// Takes the run of contiguous clusters that `entries` begin with. Returns the number of entries, and the problem
    /// of the last of them. Images that were filled in order consist of runs.
    fn take_plain(&mut self, offset: HostOffset, entries: &[u64]) -> (usize, Option<&'static str>) {
        let bytes = self.geometry.cluster_bytes();
        let fits = self.reach.0.saturating_sub(offset.0) / bytes;
        if !offset.0.is_multiple_of(bytes) || fits == 0 {
            return (1, Some("is misplaced or far past the end of the file"));
        }
        let places = (0..fits).map(|n| offset + n * bytes);
        let alike = entries.iter().zip(places).take_while(|(entry, place)| **entry == L::entry(*place));
        let count = alike.count();
        let (count, problem) = match self.plain.set(offset.0 / bytes, count as u64) {
            Ok(()) => (count, None),
            Err((before, taken)) => (before as usize + 1, Some(taken.text())),
        };
        self.plain_clusters += count as u64;
        self.end = self.end.max(offset + count as u64 * bytes);
        (count, problem)
    }

    /// Reports those of `count` clusters from `cluster` on, which lie at `offset`, of which not even a part is in the
    /// file. The last one may be there in part: the rest was never written.
    fn find_missing(&self, cluster: u64, offset: HostOffset, count: u64, report: &mut impl Report) {
        let bytes = self.geometry.cluster_bytes();
        let there = self.file_bytes.saturating_sub(offset.0).div_ceil(bytes);
        if there >= count {
            return;
        }
        report.missing(count - there, || {
            let (first, last) = (cluster + there, cluster + count - 1);
            let which = if first == last {
                format!("cluster {first}")
            } else {
                format!("clusters {first} to {last}")
            };
            let at = offset.0 + there * bytes;
            format!("{which} from byte {at} on: past the end of the file at byte {}", self.file_bytes)
        });
    }

    fn take_compressed(&mut self, run: Compressed) -> Result<(), &'static str> {
        let end = run.offset + run.len;
        if run.len == 0 || end.0 > self.file_bytes {
            return Err("is compressed and not inside the file");
        }
        let at = self.tables.partition_point(|t| t.0.end <= run.offset);
        if self.tables.get(at).is_some_and(|t| t.0.start < end) {
            return Err("is compressed and overlaps a table");
        }
        for unit in
            run.offset.0 / self.geometry.cluster_bytes()..end.0.div_ceil(self.geometry.cluster_bytes())
        {
            match self.compressed.set(unit, 1) {
                // Compressed runs may share a cluster.
                Ok(()) | Err((_, Taken::Before)) => {}
                Err((_, taken @ Taken::NoRoom)) => return Err(taken.text()),
            }
        }
        self.end = self.end.max(end);
        self.compressed_clusters += 1;
        Ok(())
    }

    /// Compares clusters with tables and compressed runs, once all tables are taken.
    pub(crate) fn finish(&self, report: &mut impl Report) -> Option<()> {
        self.find_unwritten(report)?;
        let bytes = self.geometry.cluster_bytes();
        if let Some(unit) = self.plain.common(&self.compressed)
            && !report.problem(format!("compressed data overlaps the cluster at byte {}", unit * bytes))
        {
            return None;
        }
        for table in &self.tables {
            let hit =
                (table.0.start.0 / bytes..table.0.end.0.div_ceil(bytes)).find(|unit| self.plain.has(*unit));
            if let Some(unit) = hit
                && !report.problem(format!(
                    "{} and the cluster at byte {} overlap",
                    table.1.name::<L>(),
                    unit * bytes
                ))
            {
                return None;
            }
        }
        Some(())
    }

    /// Reports the table that lies past the end of the file. It was the last thing to be allocated, so anything after
    /// it was cut off with it.
    fn find_unwritten(&self, report: &mut impl Report) -> Option<()> {
        let unwritten =
            |owner: &Owner| matches!(owner, Owner::Table(index) if Some(*index) == self.unwritten);
        let Some((range, owner)) = self.tables.iter().find(|(_, owner)| unwritten(owner)) else {
            return Some(());
        };
        let what = |verb| {
            let (name, at) = (owner.name::<L>(), range.start.0);
            format!("{name} at byte {at} {verb} past the end of the file at byte {}", self.file_bytes)
        };
        if self.end > range.end {
            return report.problem(what("extends")).then_some(());
        }
        report.missing(1, || what("lies"));
        Some(())
    }

    /// Clusters of the first `space_bytes` of the file that nothing refers to, and that are not in `padding`. Called
    /// last: from then on all that is used counts as clusters.
    ///
    /// Space between a reference and the end of its block of [`BLOCK_BYTES`] is no loss: QEMU begins every cluster at
    /// the end of the file, which its writes extend to whole blocks of the medium.
    pub(crate) fn lost(
        &mut self,
        padding: Range<HostOffset>,
        space_bytes: u64,
        report: &mut impl Report,
    ) -> u64 {
        let bytes = self.geometry.cluster_bytes();
        let ranges = self.tables.iter().map(|(range, _)| range.start.0..range.end.0);
        let ranges = ranges.chain(std::iter::once(padding.start.0..padding.end.0));
        for unit in ranges.flat_map(|range| range.start / bytes..range.end.div_ceil(bytes)) {
            // Clusters near them have memory for these bits already.
            if let Err((_, taken @ Taken::NoRoom)) = self.plain.set(unit, 1) {
                report.problem(format!("the space that is lost {}", taken.text()));
                return 0;
            }
        }
        let units = space_bytes.div_ceil(bytes);
        let block = (BLOCK_BYTES / bytes).max(1) as u32;
        units - self.plain.filled(&self.compressed, units, block)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Frontier;
    use super::*;
    use crate::CheckReport;
    use crate::map::bits::MIN_BYTES;
    use tap_host::Budget;

    struct Tables;

    impl Layout for Tables {
        const TABLE: &'static str = "table";
        type Allocator = Frontier;
        fn mapping(entry: u64, _geometry: &Geometry) -> Mapping {
            if entry == 0 { Mapping::Unmapped } else { Mapping::Plain(HostOffset(entry)) }
        }
        fn entry(host: HostOffset) -> u64 {
            host.0
        }
    }

    /// An image of a header, a table and two clusters, walked with `bytes` of memory.
    fn walked(bytes: usize, report: &mut CheckReport) -> Owners<Tables> {
        let geometry =
            Geometry { size_bytes: 64 << 12, cluster_bits: 12, table_bits: 6, root_at: HostOffset(64) };
        let (stage, file_bytes) = (Budget::default().stage(bytes).unwrap(), 4 << 12);
        let header = (HostOffset(0)..HostOffset(72), "the header");
        let sizes = (file_bytes, geometry.reach(file_bytes), None);
        let mut owners = Owners::new(geometry, sizes, [header], &stage);
        let tables = owners.take_root(&[HostOffset(1 << 12)], report);
        assert_eq!(tables, Some(vec![(0, HostOffset(1 << 12))]));
        let mut entries = vec![0; 64];
        entries[..2].copy_from_slice(&[2 << 12, 3 << 12]);
        owners.take_table(0, &entries, report);
        owners.finish(report);
        owners
    }

    #[test]
    fn clusters_and_tables_next_to_them_share_memory() {
        let mut report = CheckReport::default();
        let mut owners = walked(MIN_BYTES, &mut report);
        let lost = owners.lost(HostOffset(0)..HostOffset(0), 4 << 12, &mut report);
        assert_eq!((lost, report.problems), (0, vec![]));
    }

    #[test]
    fn lack_of_memory_for_what_is_lost_is_one_problem() {
        let mut report = CheckReport::default();
        let mut owners = walked(MIN_BYTES, &mut report);
        let everything = HostOffset(0)..HostOffset(1 << 60);
        let lost = owners.lost(everything, 1 << 60, &mut report);
        let what = "the space that is lost cannot be checked for lack of memory (--memory)".to_owned();
        assert_eq!((lost, report.problem_count, report.problems), (0, 1, vec![what]));
    }
}
