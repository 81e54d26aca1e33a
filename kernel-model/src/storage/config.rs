//! The properties of storage, and counts of its operations.

use super::nth::NthFailure;
use crate::faults::{FaultPlan, SyncErrors};

/// The properties of the storage.
#[derive(Clone, Copy, Debug)]
pub struct StorageConfig {
    /// Faults that may be drawn.
    pub faults: FaultPlan,
    /// What a failed fdatasync of a buffered file leaves.
    pub sync_errors: SyncErrors,
    /// The file system supports making ranges zeros (fallocate); otherwise it refuses.
    pub zeroing: bool,
    /// A file writes back dirty data in a range before it makes a hole there. ext4 does not since Linux 6.14: what it
    /// has dropped by then is gone if the hole fails.
    pub holes_write_back: bool,
    /// A full file system has no room for the longer list of extents that a hole makes of a range with storage: it
    /// fails with ENOSPC, as on ext4.
    pub holes_want_space: bool,
    /// fdatasync says ok and does nothing: a canary.
    pub flush_lies: bool,
    /// Fails operations by number.
    pub nth_failure: Option<NthFailure>,
    /// The alignment of offsets and lengths of direct files, in bytes: the sector of the drive below (512 or 4096).
    pub direct_align_bytes: u32,
    /// Pending bytes per file above which the kernel writes back by itself.
    pub write_back_bytes: usize,
}

impl Default for StorageConfig {
    fn default() -> Self {
        Self {
            faults: FaultPlan::LATENCY,
            sync_errors: SyncErrors::Retryable,
            zeroing: true,
            holes_write_back: true,
            holes_want_space: false,
            flush_lies: false,
            nth_failure: None,
            direct_align_bytes: crate::process::DIRECT_ALIGN_BYTES,
            write_back_bytes: 16 << 20,
        }
    }
}

/// Counts of operations on the host's files.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct IoCounts {
    /// Reads, writes and zeros that ended with an error of the medium.
    pub failed: u64,
    /// Zeros that found no space after the dirty pages of their range were gone.
    pub dropped: u64,
    /// Reads.
    pub reads: u64,
    /// Writes, and ranges made zeros.
    pub writes: u64,
    /// Synchronisations.
    pub syncs: u64,
    /// Synchronisations that failed, without those that were interrupted.
    pub failed_syncs: u64,
    /// Bytes read and written.
    pub bytes: u64,
    /// Bytes that writes stored.
    pub written_bytes: u64,
    /// Zeros that were refused because files cannot be made zeros by range.
    pub refused_zeros: u64,
}
