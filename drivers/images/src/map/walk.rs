//! Walks all tables of an image, to open it for writing and to check it.

use super::layout::{Geometry, Layout, Mapping, decode_entries};
use super::owners::{FirstProblem, Owners, Report};
use super::table::{Cache, Table, table_cost};
use super::{HostOffset, Image, Unreadable};
use crate::io::ImageFile;
use crate::memory::ImageStages;
use crate::{CheckReport, ImageHost};
use smallvec::smallvec;
use tap_host::{Errno, IoBuf, cost_of};

tap_host::listed! {
    pub(super) BUGS: Bug;
    pub(super) FRONTIER_FROM_LAST_L1 = "frontier-from-last-l1",
        "the allocator frontier at open is taken from the last L1 entry";
    CHECK_PACKED_PASSED = "check-packed-passed", "a check passes compressed clusters that do not inflate";
}

/// Limit of problems that are described; the others are only counted.
const MAX_DESCRIBED: usize = 100;

/// The result of a walk, with the cache filled up to its limit.
pub(crate) struct Walked {
    pub(crate) cache: Cache,
    /// The end of the highest reference.
    pub(crate) end: HostOffset,
}

/// Why a walk has no result.
pub(crate) enum Stopped {
    /// The image is damaged as described.
    Damaged(String),
    /// It could not be read.
    Failed(Errno),
}

/// Reads table after table in the order of the file, into one reused buffer.
struct TableReader<'a, H: ImageHost> {
    file: &'a ImageFile<H>,
    buf: Option<IoBuf>,
}

impl<'a, H: ImageHost> TableReader<'a, H> {
    async fn new(file: &'a ImageFile<H>, geometry: &Geometry) -> Result<Self, Errno> {
        // A separate stage: it is held while compressed clusters are read.
        let bytes = geometry.table_bytes() as usize;
        let buf = file.budget().stage(cost_of(bytes))?.buffer(bytes).await?;
        Ok(Self { file, buf: Some(buf) })
    }

    async fn read(&mut self, offset: HostOffset) -> Result<impl Iterator<Item = u64> + '_, Errno> {
        let buf = self.buf.take().ok_or(Errno::EIO)?;
        let (result, mut bufs) = self.file.read_patiently(offset.0, smallvec![buf]).await;
        self.buf = bufs.pop();
        result?;
        Ok(decode_entries(self.buf.as_deref().unwrap_or_default()))
    }
}

/// Checks every reference, to find where new clusters may begin. Keeps up to `table_bytes` of tables.
pub(crate) async fn walk<H: ImageHost, L: Layout>(
    host: &H,
    (file, geometry, root): (&ImageFile<H>, &Geometry, &[HostOffset]),
    mut owners: Owners<L>,
    memory: &ImageStages,
    table_bytes: usize,
) -> Result<Walked, Stopped> {
    let mut cache = Cache::new(root.len(), geometry, table_bytes);
    let mut problem = FirstProblem::default();
    if let Some(tables) = owners.take_root(root, &mut problem) {
        let mut reader = TableReader::new(file, geometry).await.map_err(Stopped::Failed)?;
        for (index, offset) in tables {
            if host.bug(&FRONTIER_FROM_LAST_L1)
                && root[index + 1..].iter().any(|table| *table != HostOffset(0))
            {
                continue;
            }
            let entries: Box<[u64]> = reader.read(offset).await.map_err(Stopped::Failed)?.collect();
            if owners.take_table(index, &entries, &mut problem).is_none() {
                break;
            }
            if cache.has_room()
                && let Some(share) = memory.tables.try_keep(table_cost(entries.len()))
            {
                cache.insert(&Table::new(index, offset, entries, share), true);
            }
        }
    }
    if problem.0.is_none() {
        owners.finish(&mut problem);
    }
    match problem.0 {
        Some(what) => Err(Stopped::Damaged(what)),
        None => Ok(Walked { cache, end: owners.end }),
    }
}

impl Report for CheckReport {
    fn problem(&mut self, what: String) -> bool {
        self.problem_count += 1;
        if self.problems.len() < MAX_DESCRIBED {
            self.problems.push(what);
        }
        true
    }

    fn missing(&mut self, clusters: u64, what: impl FnOnce() -> String) {
        self.missing_clusters += clusters;
        if self.problems.len() < MAX_DESCRIBED {
            self.problems.push(what());
        }
    }
}

impl<H: ImageHost, L: Layout> Image<H, L> {
    /// Takes the tables of `root` into `owners`, decompresses every compressed cluster, and fills in `report`. Memory
    /// is bounded by the mapped clusters.
    ///
    /// # Errors
    /// When any of it cannot be read, the action that failed. That is not damage.
    pub(crate) async fn check(
        &self,
        root: &[HostOffset],
        owners: &mut Owners<L>,
        report: &mut CheckReport,
    ) -> Result<(), (&'static str, Errno)> {
        let failed = |error| ("read the tables of", error);
        let tables = owners.take_root(root, report).unwrap_or_default();
        report.tables = tables.len() as u64;
        let mut reader = TableReader::new(&self.file, &self.geometry).await.map_err(failed)?;
        for (index, offset) in tables {
            let entries: Vec<u64> = reader.read(offset).await.map_err(failed)?.collect();
            owners.take_table(index, &entries, report);
            for (at, entry) in entries.iter().enumerate() {
                if let Mapping::Compressed(run) = L::mapping(*entry, &self.geometry) {
                    match self.inflate_or_why(run, true).await {
                        Ok(_) => {}
                        Err(Unreadable::Damaged) if self.host.bug(&CHECK_PACKED_PASSED) => {}
                        Err(Unreadable::Damaged) => {
                            let cluster = index * entries.len() + at;
                            report.problem(format!("cluster {cluster} cannot be decompressed"));
                        }
                        Err(Unreadable::Failed(error)) => {
                            return Err(("read compressed clusters of", error));
                        }
                    }
                }
            }
        }
        owners.finish(report);
        report.plain_clusters = owners.plain_clusters;
        report.compressed_clusters = owners.compressed_clusters;
        report.end_bytes = owners.end.0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hundred_problems_are_described_and_all_are_counted() {
        let mut report = CheckReport::default();
        for i in 0..103_u64 {
            report.missing(1, || format!("run {i}"));
            assert!(report.problem(format!("problem {i}")), "it goes on");
        }
        assert_eq!((report.problems.len(), report.problem_count, report.missing_clusters), (100, 103, 103));
        assert_eq!(report.problems[98..], ["run 49", "problem 49"]);
    }
}
