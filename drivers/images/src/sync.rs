//! Makes a file durable, once for all concurrent callers.
//!
//! ```text
//!   A: sync ──────────running──────────┐
//!   B:      sync ─ waits for the next ─┴──running──┐  (B's write may have come too late for A's)
//!   C:           sync ─ waits with B ──────────────┘
//! ```

use crate::ImageHost;
use crate::sync_record::SyncRecord;
use std::cell::Cell;
use tap_core::wait::Semaphore;
use tap_host::{Errno, File, FileInfo};

tap_host::listed! {
    pub(super) BUGS: Bug;
    pub(crate) FUA_UNSYNCED = "fua-unsynced", "a write with FUA is answered before it is durable";
    pub(crate) FLUSH_EARLY = "flush-early", "a flush is acknowledged before the file was synchronised";
    FLUSH_FORGETS = "flush-forgets", "a flush succeeds after an earlier one failed";
    DIRECT_FLUSH_FORGETS = "direct-flush-forgets",
        "a flush of a direct file succeeds after an earlier one failed";
    INTERRUPTED_SYNC_LATCHES = "interrupted-sync-latches",
        "a synchronisation that was interrupted counts as one that lost data";
    SYNC_JOINED = "sync-joined", "a flush is answered by a synchronisation that had begun before it";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    SYNC_SHARED = "sync-shared", "one synchronisation served several allocations";
    FLUSH_LATCHED = "flush-latched", "a flush was refused because an earlier one had failed";
}

/// Shares synchronisations of one file, and remembers failed ones.
pub(crate) struct GroupSync<H: ImageHost> {
    turn: Semaphore,
    /// Number of the last synchronisation that was started.
    started: Cell<u64>,
    /// Number and result of the last one that ended.
    ended: Cell<(u64, Result<(), Errno>)>,
    /// Data may be lost, see [`loses`]: every later synchronisation fails.
    lost: Cell<bool>,
    /// The same for a successor of this process, if the host keeps pages for us.
    record: Option<SyncRecord<H>>,
}

/// Whether data may be lost after fdatasync failed with `error`, although the next call would succeed.
///
/// A page cache reports a failure once, and then treats the pages as clean. A drive that failed to flush its cache may
/// have lost it (it was reset, or disconnected and came back), and its next flush has nothing to do; this affects
/// direct files too. `ENOMEM` may come from a device below that failed the writes of pages. Only `EINTR` means that no
/// write was dropped.
fn loses(error: Errno) -> bool {
    error != Errno::EINTR
}

impl<H: ImageHost> GroupSync<H> {
    /// For a locked file. One opened for reading is never synchronised.
    pub(crate) async fn of(host: &H, file: &H::File, info: &FileInfo, write: bool) -> Self {
        let (record, lost) = if write { SyncRecord::take_up(host, file, info).await } else { (None, false) };
        Self {
            turn: Semaphore::new(1),
            started: Cell::new(0),
            ended: Cell::new((0, Ok(()))),
            lost: Cell::new(lost),
            record,
        }
    }

    /// Makes all writes that ended before this call durable.
    pub(crate) async fn sync(&self, host: &H, file: &H::File, direct: bool) -> Result<(), Errno> {
        // A running synchronisation may have missed the caller's writes.
        let enough = self.started.get() + u64::from(!host.bug(&SYNC_JOINED));
        let _turn = self.turn.acquire().await;
        if self.lost.get() && !host.bug(&FLUSH_FORGETS) {
            host.mark(&FLUSH_LATCHED);
            return Err(Errno::EIO);
        }
        let (last, result) = self.ended.get();
        if last >= enough {
            host.mark(&SYNC_SHARED);
            return result;
        }
        let number = self.started.get() + 1;
        self.started.set(number);
        if let Some(record) = &self.record {
            record.begun();
        }
        let result = file.sync_data().await;
        self.ended.set((number, result));
        let exempt = direct && host.bug(&DIRECT_FLUSH_FORGETS);
        let lost = result.is_err_and(|e| loses(e) || host.bug(&INTERRUPTED_SYNC_LATCHES));
        self.lost.set(self.lost.get() || (lost && !exempt));
        if let Some(record) = &self.record {
            record.ended(self.lost.get());
        }
        result
    }
}
