//! Zeros made where there is a page cache, when a failure takes accepted writes back.
//!
//! ```text
//!   write v2 ──accepted──┐
//!   zeros: drop dirty pages ─► no space, no such command, an error ─► told        reads show v1 again
//!   settle: punch a hole ─► else write zeros ─► else give the file up             reads show zeros: allowed
//! ```
//!
//! | file | zeros that keep their space | holes |
//! |---|---|---|
//! | a file | ext4 drops the dirty pages of the whole blocks before it looks for space (xfs does not) | safe |
//! | a block device | Linux drops the dirty pages before it asks the drive | the same, also where the drive cannot |
//! | with O_DIRECT | safe: there are no dirty pages | safe |
//!
//! v2 is gone then, and v1 must not come back, so the range is made what the failed request may have left: zeros. A hole
//! takes no space. A drive that cannot make holes says so after the pages are gone; it is not asked again.
//!
//! A synchronisation that runs beside such a failure may have missed the pages that were dropped, and what it said of them
//! is void. It is repeated once the range is settled, so that the zeros are durable in their place.

use crate::ImageHost;
use std::cell::Cell;
use std::future::Future;
use tap_core::{Access, Space, Tracker};
use tap_host::{Bug, Errno, File, FileInfo, Mark, Probe, ZeroMode};

/// Attempts to settle a range while the host answers with transient errors.
const ATTEMPTS: u32 = 8;
/// Before the second of them, in nanoseconds; it doubles with each.
const PAUSE_NS: u64 = 1_000_000;

/// The largest sector of a drive, in bytes: what a device refuses of whole ones it refuses for good.
const DRIVE_SECTOR_BYTES: u64 = 4096;

/// The zeros of one file that may cost dirty pages.
#[derive(Default)]
pub(crate) struct KeptZeros {
    /// A block device said that it cannot make holes.
    no_holes: Cell<bool>,
    /// Orders zeros (shared) and the end of a synchronisation beside them (exclusive).
    order: Tracker,
    running: Cell<u32>,
    /// Failures that may have cost dirty pages, and are settled or given up.
    failures: Cell<u64>,
    /// Accepted writes are gone and nothing could be put in their place.
    given_up: Cell<bool>,
}

impl KeptZeros {
    /// Whether the file no longer holds what was answered, so that nothing of it may be used.
    pub(crate) fn gave_up(&self) -> bool {
        self.given_up.get()
    }

    /// Whether making zeros of the file in `mode` may cost dirty pages when it fails.
    pub(crate) fn concerns(info: &FileInfo, mode: ZeroMode) -> bool {
        !info.direct && (info.block_device || mode == ZeroMode::Keep)
    }

    /// Makes a range zeros where that may cost dirty pages. `write_zeros` writes them, where a hole cannot be made.
    pub(crate) async fn zero<H: ImageHost, W: Future<Output = Result<(), Errno>>>(
        &self,
        host: &H,
        (file, info): (&H::File, &FileInfo),
        (offset, len, mode): (u64, u64, ZeroMode),
        write_zeros: impl Fn() -> W,
    ) -> Result<(), Errno> {
        if mode == ZeroMode::Unmap && self.no_holes.get() {
            return Err(Errno::EOPNOTSUPP);
        }
        let ticket = self.order.ticket("zeros", offset);
        ticket.claim(Space::HostBlocks, 0..1, Access::Shared).expect("a new ticket waits for none");
        ticket.ready().await;
        let _running = Running::new(&self.running);
        let result = file.zero_at(offset, len, mode).await;
        let Err(error) = result else { return result };
        let refused = error == Errno::EOPNOTSUPP;
        // The file cannot do it, or the call did not begin: nothing was changed.
        if error == Errno::EAGAIN || refused && (!info.block_device || host.bug(Bug::DeviceTrusted)) {
            return result;
        }
        if host.bug(Bug::FailedZerosLeft) {
            return Err(error);
        }
        host.mark(Mark::FailedZerosSettled);
        let whole = offset.is_multiple_of(DRIVE_SECTOR_BYTES) && len.is_multiple_of(DRIVE_SECTOR_BYTES);
        self.no_holes.set(self.no_holes.get() || refused && whole && mode == ZeroMode::Unmap);
        let settled = settle(host, file, (offset, len), write_zeros).await;
        if settled.is_err() {
            self.given_up.set(true);
        }
        // Only now: a synchronisation that began while the range was being settled has missed the end of that.
        if !host.bug(Bug::FlushBesideFailedZeros) {
            self.failures.set(self.failures.get() + 1);
        }
        // What could not be done without writing has been done by writing.
        if refused && settled.is_ok() { Ok(()) } else { Err(error) }
    }

    /// How many failures there were; to be noted before a synchronisation.
    pub(crate) fn failures(&self) -> u64 {
        self.failures.get()
    }

    /// Whether zeros failed since `failures` was noted, or fail among those that run now: what was synchronised meanwhile
    /// may not be durable.
    pub(crate) async fn failed_since(&self, host: &impl Probe, failures: u64) -> bool {
        if self.running.get() > 0 && !host.bug(Bug::FlushPassesZeros) {
            let ticket = self.order.ticket("synchronisation", 0);
            ticket.claim(Space::HostBlocks, 0..1, Access::Exclusive).expect("a new ticket waits for none");
            ticket.ready().await;
        }
        self.failures.get() != failures
    }
}

/// Zeros in a range whose dirty pages may be gone.
async fn settle<H: ImageHost, W: Future<Output = Result<(), Errno>>>(
    host: &H,
    file: &H::File,
    (offset, len): (u64, u64),
    write_zeros: impl Fn() -> W,
) -> Result<(), Errno> {
    let mut pause_ns = PAUSE_NS;
    for _ in 1..ATTEMPTS {
        if file.zero_at(offset, len, ZeroMode::Unmap).await.is_ok() || write_zeros().await.is_ok() {
            return Ok(());
        }
        host.sleep_ns(pause_ns).await;
        pause_ns *= 2;
    }
    file.zero_at(offset, len, ZeroMode::Unmap).await
}

/// Counts zeros that run.
struct Running<'a>(&'a Cell<u32>);

impl<'a> Running<'a> {
    fn new(count: &'a Cell<u32>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}
