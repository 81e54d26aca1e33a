//! Where new clusters go.
//!
//! ```text
//!   header  L1  tables and clusters, live and lost │ frontier ──► never used
//! ```
//!
//! The format has no list of free space, so space is taken from the end only and never given back. On a file, what is
//! behind the frontier reads as zeros; on a block device it holds anything.
//!
//! A cluster whose mapping could not be written may be mapped all the same, as far as the file is concerned. It stays
//! with its guest cluster, as a suspect, and the next try for that guest cluster uses it; nobody else ever does.

use super::Image;
use crate::ImageHost;
use std::collections::BTreeMap;
use tap_host::{Bug, Errno};

/// The frontier, and places whose mapping is in doubt.
pub(super) struct Allocator {
    /// Byte offset, a multiple of the cluster size.
    pub(super) frontier: u64,
    /// Byte offset of the end of a block device.
    limit: u64,
    /// Guest cluster to byte offset.
    pub(super) suspects: BTreeMap<u64, u64>,
    /// L1 index to byte offset.
    pub(super) table_suspects: BTreeMap<usize, u64>,
}

impl Allocator {
    pub(super) fn new(frontier: u64, device_bytes: Option<u64>) -> Self {
        let limit = device_bytes.unwrap_or(i64::MAX as u64);
        Self { frontier, limit, suspects: BTreeMap::new(), table_suspects: BTreeMap::new() }
    }
}

impl<H: ImageHost> Image<H> {
    /// The byte offset of `clusters` contiguous new clusters.
    pub(super) fn allocate(&self, clusters: u64) -> Result<u64, Errno> {
        let mut allocator = self.allocator.borrow_mut();
        let offset = allocator.frontier;
        let end = clusters.checked_mul(self.geometry.cluster_bytes()).and_then(|len| offset.checked_add(len));
        match end {
            Some(end) if end <= allocator.limit => {
                allocator.frontier = end;
                Ok(offset)
            }
            _ => Err(Errno::ENOSPC),
        }
    }

    /// Leaves `count` places from `host` on to the guest clusters from `first` on, whose mapping was not written.
    pub(super) fn suspect(&self, first: u64, count: usize, host: u64) {
        let mut allocator = self.allocator.borrow_mut();
        if self.host.bug(Bug::FailedClusterReused) {
            allocator.frontier = host;
            return;
        }
        let places = (host..).step_by(self.geometry.cluster_bytes() as usize);
        allocator.suspects.extend((first..).zip(places).take(count));
    }

    /// The guest clusters from `first` on are mapped.
    pub(super) fn settled(&self, first: u64, count: usize) {
        let mut allocator = self.allocator.borrow_mut();
        if !allocator.suspects.is_empty() {
            allocator.suspects.retain(|cluster, _| !(first..first + count as u64).contains(cluster));
        }
    }
}
