//! Clusters that may or may not be mapped.
//!
//! A cluster whose mapping failed may still be mapped in the file. It stays reserved for its guest cluster, as a
//! suspect: the next try for that guest cluster uses it, and nothing else ever does.

use super::Image;
use super::layout::Layout;
use super::space::Allocator;
use super::{GuestCluster, HostOffset};
use crate::ImageHost;
use std::collections::BTreeMap;
use tap_host::{Errno, Share};

tap_host::listed! {
    pub(super) BUGS: Bug;
    CLUSTER_LEAKED = "cluster-leaked", "each allocation takes one cluster more than it uses";
    FAILED_CLUSTER_REUSED = "failed-cluster-reused",
        "a cluster whose L2 write failed is handed to another owner";
    OUT_OF_REACH = "out-of-reach",
        "a new cluster is placed further out than an image is opened with after a crash";
}

/// Limit of runs in doubt; at the limit allocations fail.
const MAX_SUSPECTS: usize = 1 << 16;
/// Memory of one run, in bytes.
pub(crate) const SUSPECT_BYTES: usize = 64;
/// Commits whose failure can always be remembered.
pub(crate) const DOUBTS: usize = 1024;

/// Places whose mapping is in doubt.
#[derive(Default)]
pub(super) struct Suspects {
    /// By first guest cluster: the count, and the place of the first. Some of a run may be mapped by now.
    runs: BTreeMap<GuestCluster, (u64, HostOffset)>,
    /// By index in the root: the place of the table.
    tables: BTreeMap<usize, HostOffset>,
    /// Memory of the runs.
    share: Option<Share>,
}

impl Suspects {
    /// The place in doubt of guest cluster `cluster`, which is not mapped.
    pub(super) fn place_of(&self, cluster: GuestCluster, cluster_bytes: u64) -> Option<HostOffset> {
        let (first, (count, host)) = self.runs.range(..=cluster).next_back()?;
        (cluster - *first < *count).then(|| *host + (cluster - *first) * cluster_bytes)
    }

    /// Whether a guest cluster from `first` to `last` may be in doubt.
    pub(super) fn any(&self, first: GuestCluster, last: GuestCluster) -> bool {
        self.runs.range(..=last).next_back().is_some_and(|(at, (count, _))| *at + *count > first)
    }

    /// The place in doubt for the table of root entry `index`, which is empty.
    pub(super) fn table(&self, index: usize) -> Option<HostOffset> {
        self.tables.get(&index).copied()
    }

    /// Reserves the place at `offset` for table `index`.
    pub(super) fn suspect_table(&mut self, index: usize, offset: HostOffset) {
        self.tables.insert(index, offset);
    }

    /// Called once the entry of table `index` is written.
    pub(super) fn settle_table(&mut self, index: usize) {
        self.tables.remove(&index);
    }

    /// Called once the guest clusters from `first` to before `end` are mapped. Mapped clusters are never looked up
    /// here, so a run only loses clusters at its ends: splitting it would need memory.
    fn settle(&mut self, first: GuestCluster, end: GuestCluster, cluster_bytes: u64) {
        let from = self.runs.range(..first).next_back().map_or(first, |(start, _)| *start);
        let meet: Vec<(GuestCluster, u64, HostOffset)> = self
            .runs
            .range(from..end)
            .map(|(start, (count, host))| (*start, *count, *host))
            .filter(|(start, count, _)| *start + *count > first && !(*start < first && *start + *count > end))
            .collect();
        for (start, count, host) in meet {
            self.runs.remove(&start);
            if start < first {
                self.runs.insert(start, (first - start, host));
            }
            if start + count > end {
                let gone = end - start;
                self.runs.insert(end, (count - gone, host + gone * cluster_bytes));
            }
        }
        let around = |(start, count): (GuestCluster, u64)| start < first && start + count > end;
        let mut left = self.runs.range(from..end).map(|(start, (count, _))| (*start, *count));
        assert!(
            left.all(|run| run.0 + run.1 <= first || around(run)),
            "a run in doubt ends in mapped clusters"
        );
    }

    /// Releases memory that the suspects do not need.
    fn fit_share(&mut self) {
        let need = self.runs.len() * SUSPECT_BYTES;
        let has = self.share.as_ref().map_or(0, Share::bytes);
        assert!(has >= need, "{} runs in doubt hold only {has} bytes", self.runs.len());
        if let Some(share) = &mut self.share {
            drop(share.split(has - need));
        }
    }
}

impl<H: ImageHost, L: Layout> Image<H, L> {
    /// Allocates `clusters` contiguous new clusters, within reach: a crash may revert the size of the file to that at
    /// open, and references further past it than any disk needs are then taken for damage. So a medium that keeps
    /// failing makes the disk run out of space until the image is opened again.
    pub(super) fn allocate(&self, clusters: u64) -> Result<HostOffset, Errno> {
        let mut space = self.space.borrow_mut();
        let len = clusters.checked_mul(self.geometry.cluster_bytes()).ok_or(Errno::ENOSPC)?;
        let host = space.allocate(len)?;
        if host + len > self.reach && !self.host.bug(&OUT_OF_REACH) {
            space.take_back(host, len);
            return Err(Errno::ENOSPC);
        }
        if self.host.bug(&CLUSTER_LEAKED) {
            space.allocate(self.geometry.cluster_bytes())?;
        }
        Ok(host)
    }

    /// Memory to remember a run in case its mapping fails. Waits for commits in flight, but not for runs in doubt to be
    /// settled.
    ///
    /// # Errors
    /// `ENOMEM` if too much is in doubt already.
    pub(super) async fn doubt(&self) -> Result<Share, Errno> {
        let (stage, many) = (&self.memory.doubts, self.suspects.borrow().runs.len());
        let share = match many {
            MAX_SUSPECTS.. => None,
            _ if many < DOUBTS / 2 => Some(stage.take(SUSPECT_BYTES).await?),
            _ => stage.try_keep(SUSPECT_BYTES),
        };
        share.ok_or(Errno::ENOMEM)
    }

    /// Reserves `count` places from `host` on for the guest clusters from `first` on, whose mapping failed.
    pub(super) fn suspect(&self, first: GuestCluster, count: usize, host: HostOffset, doubt: Share) {
        if self.host.bug(&FAILED_CLUSTER_REUSED) {
            let mut space = self.space.borrow_mut();
            let len = space.end() - host;
            return space.take_back(host, len);
        }
        let mut suspects = self.suspects.borrow_mut();
        suspects.runs.insert(first, (count as u64, host));
        match &mut suspects.share {
            Some(share) => share.join(doubt),
            none => *none = Some(doubt),
        }
        suspects.fit_share();
    }

    /// Called once `count` guest clusters from `first` on are mapped.
    pub(super) fn settled(&self, first: GuestCluster, count: usize) {
        let mut suspects = self.suspects.borrow_mut();
        suspects.settle(first, first + count as u64, self.geometry.cluster_bytes());
        suspects.fit_share();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn clusters_stay_in_doubt_until_they_are_mapped(
            runs in proptest::collection::vec((any::<bool>(), 0..40_u64, 1..9_u64), 1..40)
        ) {
            let mut suspects = Suspects::default();
            // The place of each cluster in doubt; 0 once it is mapped.
            let mut naive = BTreeMap::new();
            for (number, (doubt, first, count)) in runs.into_iter().enumerate() {
                let clusters = first..first + count;
                if !doubt {
                    suspects.settle(GuestCluster(first), GuestCluster(first + count), 1 << 12);
                    naive.extend(clusters.map(|cluster| (cluster, 0)));
                } else if clusters.clone().all(|cluster| !naive.contains_key(&cluster)) {
                    let host = (number as u64 + 1) << 20;
                    suspects.runs.insert(GuestCluster(first), (count, HostOffset(host)));
                    naive.extend(clusters.map(|cluster| (cluster, host + ((cluster - first) << 12))));
                }
                let runs = suspects.runs.len();
                for cluster in (0..50).filter(|cluster| naive.get(cluster) != Some(&0)) {
                    let (guest, place) = (GuestCluster(cluster), naive.get(&cluster).copied());
                    prop_assert_eq!(suspects.place_of(guest, 1 << 12), place.map(HostOffset));
                    prop_assert_eq!(suspects.any(guest, guest), place.is_some());
                }
                suspects.settle(GuestCluster(0), GuestCluster(0), 1 << 12);
                prop_assert_eq!(suspects.runs.len(), runs);
            }
            suspects.settle(GuestCluster(0), GuestCluster(50), 1 << 12);
            prop_assert!(suspects.runs.is_empty());
        }
    }
}
