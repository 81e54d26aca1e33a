//! Where new clusters go.
//!
//! ```text
//!   header  L1  tables and clusters, live and lost │ frontier ──► never used
//! ```
//!
//! The format has no list of free space, so space is taken from the end only and never given back. On a file, what is
//! behind the frontier reads as zeros; on a block device it holds anything.
//!
//! What a failed write of data leaves is taken back: to it, or to the next who needs so much. It is then no longer
//! known to be zeros. Where the medium failed, the place is lost: the next would fail there as well. A cluster whose
//! mapping was tried and failed may be mapped all the same, as far as the file is concerned. It stays with its guest
//! cluster, as a suspect, and the next try for that guest cluster uses it; nobody else ever does.

use super::Image;
use crate::ImageHost;
use std::collections::BTreeMap;
use tap_host::{Bug, Errno, Share};

/// Most runs in doubt; allocations are refused where there are so many.
const MAX_SUSPECTS: usize = 1 << 16;
/// Most places that are given back and not the last. Beyond, those that lie first are lost.
const MAX_RETURNED: usize = 256;
/// What one takes of the memory budget, in bytes.
pub(super) const SUSPECT_BYTES: usize = 64;
/// Commits that can always have memory to remember their failure.
pub(super) const DOUBTS: usize = 1024;

/// The frontier, and places whose mapping is in doubt.
pub(super) struct Allocator {
    /// Byte offset, a multiple of the cluster size.
    pub(super) frontier: u64,
    /// Byte offset of the end of a block device.
    limit: u64,
    /// Below this byte offset what was never mapped may hold anything.
    dirty_until: u64,
    /// By first guest cluster: how many, and the byte offset of the first. Some of a run may be mapped by now.
    suspects: BTreeMap<u64, (u64, u64)>,
    /// L1 index to byte offset.
    pub(super) table_suspects: BTreeMap<usize, u64>,
    /// Places that were given back and have others behind them: byte offset and length.
    returned: BTreeMap<u64, u64>,
    /// Memory of the suspects.
    share: Option<Share>,
}

impl Allocator {
    pub(super) fn new(frontier: u64, device_bytes: Option<u64>) -> Self {
        let limit = device_bytes.unwrap_or(i64::MAX as u64);
        let dirty_until = if device_bytes.is_some() { u64::MAX } else { 0 };
        let (suspects, table_suspects) = (BTreeMap::new(), BTreeMap::new());
        Self {
            frontier,
            limit,
            dirty_until,
            suspects,
            table_suspects,
            returned: BTreeMap::new(),
            share: None,
        }
    }

    /// The place in doubt of guest cluster `cluster`, which is not mapped.
    pub(super) fn suspect_of(&self, cluster: u64, cluster_bytes: u64) -> Option<u64> {
        let (first, (count, host)) = self.suspects.range(..=cluster).next_back()?;
        (cluster - first < *count).then(|| host + (cluster - first) * cluster_bytes)
    }

    /// Whether a guest cluster from `first` to `last` may be in doubt.
    pub(super) fn any_suspect(&self, first: u64, last: u64) -> bool {
        self.suspects.range(..=last).next_back().is_some_and(|(at, (count, _))| at + count > first)
    }

    /// Whether a new cluster at byte `host` may hold other bytes than zeros.
    pub(super) fn is_dirty(&self, host: u64) -> bool {
        host < self.dirty_until
    }

    /// Takes `len` bytes from `host` on back, to which nothing can refer. What is the last of the file is new again;
    /// the rest goes to who needs so much next, a request that is repeated above all.
    pub(super) fn take_back(&mut self, host: u64, len: u64) {
        let (mut host, mut end) = (host, host + len);
        if let Some(after) = self.returned.remove(&end) {
            end += after;
        }
        if let Some((before, len)) = self.returned.range(..host).next_back().map(|(at, len)| (*at, *len))
            && before + len == host
        {
            self.returned.remove(&before);
            host = before;
        }
        if end == self.frontier {
            self.frontier = host;
            self.dirty_until = self.dirty_until.max(end);
            return;
        }
        self.returned.insert(host, end - host);
        if self.returned.len() > MAX_RETURNED {
            self.returned.pop_first();
        }
    }

    /// The first place of `len` bytes that was given back. It may hold anything.
    fn reuse(&mut self, len: u64) -> Option<u64> {
        let (host, there) = self.returned.iter().find(|(_, there)| **there >= len)?;
        let (host, there) = (*host, *there);
        self.returned.remove(&host);
        if there > len {
            self.returned.insert(host + len, there - len);
        }
        self.dirty_until = self.dirty_until.max(host + len);
        Some(host)
    }
}

impl<H: ImageHost> Image<H> {
    /// The byte offset of `clusters` contiguous new clusters.
    pub(super) fn allocate(&self, clusters: u64) -> Result<u64, Errno> {
        let mut allocator = self.allocator.borrow_mut();
        let len = clusters.checked_mul(self.geometry.cluster_bytes()).ok_or(Errno::ENOSPC)?;
        if let Some(host) = allocator.reuse(len) {
            return Ok(host);
        }
        let offset = allocator.frontier;
        let end = offset.checked_add(len);
        match end {
            Some(end) if end <= allocator.limit => {
                let lost = u64::from(self.host.bug(Bug::ClusterLeaked)) * self.geometry.cluster_bytes();
                allocator.frontier = end + lost;
                Ok(offset)
            }
            _ => Err(Errno::ENOSPC),
        }
    }

    /// Memory to remember a run with, should its mapping fail. Waits for commits in flight, not for what is in doubt.
    ///
    /// # Errors
    /// `ENOMEM` where too much is in doubt already.
    pub(super) async fn doubt(&self) -> Result<Share, Errno> {
        let (stage, many) = (&self.memory.doubts, self.allocator.borrow().suspects.len());
        let share = match many {
            MAX_SUSPECTS.. => None,
            _ if many < DOUBTS / 2 => Some(stage.take(SUSPECT_BYTES).await?),
            _ => stage.try_keep(SUSPECT_BYTES),
        };
        share.ok_or(Errno::ENOMEM)
    }

    /// Leaves `count` places from `host` on to the guest clusters from `first` on, whose mapping was tried and failed.
    pub(super) fn suspect(&self, first: u64, count: usize, host: u64, doubt: Share) {
        let mut allocator = self.allocator.borrow_mut();
        if self.host.bug(Bug::FailedClusterReused) {
            allocator.frontier = host;
            return;
        }
        allocator.suspects.insert(first, (count as u64, host));
        match &mut allocator.share {
            Some(share) => share.join(doubt),
            none => *none = Some(doubt),
        }
        allocator.fit_share();
    }

    /// The guest clusters from `first` on are mapped.
    pub(super) fn settled(&self, first: u64, count: usize) {
        let mut allocator = self.allocator.borrow_mut();
        allocator.settle(first, first + count as u64, self.geometry.cluster_bytes());
        allocator.fit_share();
    }
}

impl Allocator {
    /// Guest clusters from `first` to before `end` are mapped. What is in doubt is looked up for those only that are
    /// not, so a run loses clusters at its ends alone: one more run would need memory.
    fn settle(&mut self, first: u64, end: u64, cluster_bytes: u64) {
        let from = self.suspects.range(..first).next_back().map_or(first, |(start, _)| *start);
        let meet: Vec<(u64, u64, u64)> = self
            .suspects
            .range(from..end)
            .map(|(start, (count, host))| (*start, *count, *host))
            .filter(|(start, count, _)| start + count > first && !(*start < first && start + count > end))
            .collect();
        for (start, count, host) in meet {
            self.suspects.remove(&start);
            if start < first {
                self.suspects.insert(start, (first - start, host));
            }
            if start + count > end {
                let gone = end - start;
                self.suspects.insert(end, (count - gone, host + gone * cluster_bytes));
            }
        }
    }

    /// Gives back what the suspects do not need.
    fn fit_share(&mut self) {
        let need = self.suspects.len() * SUSPECT_BYTES;
        let has = self.share.as_ref().map_or(0, Share::bytes);
        assert!(has >= need, "{} clusters in doubt are counted with {has} bytes", self.suspects.len());
        if let Some(share) = &mut self.share {
            drop(share.split(has - need));
        }
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
            let mut allocator = Allocator::new(0, None);
            // The place of each cluster in doubt; 0 once it is mapped.
            let mut naive = BTreeMap::new();
            for (number, (doubt, first, count)) in runs.into_iter().enumerate() {
                let clusters = first..first + count;
                if !doubt {
                    allocator.settle(first, first + count, 1 << 12);
                    naive.extend(clusters.map(|cluster| (cluster, 0)));
                } else if clusters.clone().all(|cluster| !naive.contains_key(&cluster)) {
                    let host = (number as u64 + 1) << 20;
                    allocator.suspects.insert(first, (count, host));
                    naive.extend(clusters.map(|cluster| (cluster, host + ((cluster - first) << 12))));
                }
                let runs = allocator.suspects.len();
                for cluster in (0..50).filter(|cluster| naive.get(cluster) != Some(&0)) {
                    prop_assert_eq!(allocator.suspect_of(cluster, 1 << 12), naive.get(&cluster).copied());
                    prop_assert_eq!(allocator.any_suspect(cluster, cluster), naive.contains_key(&cluster));
                }
                allocator.settle(0, 0, 1 << 12);
                prop_assert_eq!(allocator.suspects.len(), runs);
            }
            allocator.settle(0, 50, 1 << 12);
            prop_assert!(allocator.suspects.is_empty());
        }
    }

    #[test]
    fn what_is_given_back_is_used_before_anything_new() {
        let mut allocator = Allocator::new(10 << 12, None);
        allocator.take_back(2 << 12, 1 << 12);
        allocator.take_back(4 << 12, 1 << 12);
        assert_eq!(allocator.reuse(2 << 12), None, "there is something between");
        allocator.take_back(3 << 12, 1 << 12);
        assert_eq!(allocator.reuse(2 << 12), Some(2 << 12));
        assert!(allocator.is_dirty(2 << 12), "a part of the write that failed may be there");
        assert_eq!(allocator.reuse(1 << 12), Some(4 << 12));
        assert_eq!((allocator.reuse(1 << 12), allocator.frontier), (None, 10 << 12));
        allocator.take_back(8 << 12, 1 << 12);
        allocator.take_back(9 << 12, 1 << 12);
        assert_eq!(allocator.frontier, 8 << 12, "what is last is taken back with all that is free before it");
        assert!(allocator.is_dirty(9 << 12) && !allocator.is_dirty(10 << 12));
        allocator.take_back(7 << 12, 1 << 12);
        assert_eq!(allocator.frontier, 7 << 12);
        for place in 0..2 * MAX_RETURNED as u64 {
            allocator.take_back(place << 14, 1 << 12);
            allocator.frontier = u64::MAX << 12;
        }
        assert_eq!(allocator.returned.len(), MAX_RETURNED);
    }
}
