//! What holds for all disks of the process.

use super::{ControlArgs, ControlledHost};
use crate::disk::DiskOptions;
use crate::{Console, Tuning};
use std::future::Future;
use std::rc::Rc;
use tap_control::json::Feed;
use tap_core::Disks;
use tap_host::Budget;

/// What holds for all disks of a process.
pub(super) struct Settings<H: ControlledHost> {
    pub host: H,
    pub tuning: Tuning,
    pub disks: Disks<H>,
    /// What happens to disks.
    pub feed: Feed<H>,
    pub console: Rc<dyn Console>,
    pub memory: Budget,
    pub args: ControlArgs,
}

impl<H: ControlledHost> Settings<H> {
    pub(super) fn options(&self, read_only: bool, direct: bool) -> DiskOptions {
        let write = !read_only && !self.args.images.read_only;
        let options = self.args.images.options(write, &self.memory, &self.tuning);
        DiskOptions { direct: direct || options.direct, ..options }
    }

    /// Limit of NBD clients of one disk.
    pub(super) fn connections(&self) -> usize {
        usize::from(self.args.connections)
    }

    /// How long a request may take before it is mentioned, in nanoseconds; 0 for ever.
    pub(super) fn watchdog_ns(&self) -> u64 {
        u64::from(self.args.watchdog) * 1_000_000_000
    }

    /// How long a disk may take to pause, in seconds.
    pub(super) fn pause_limit_s(&self) -> u64 {
        u64::from(self.args.pause_limit)
    }

    /// Completes when a disk has taken as long as it may to pause, or to close at once.
    pub(super) fn until_late(&self) -> impl Future<Output = ()> {
        self.host.sleep_ns(self.pause_limit_s() * 1_000_000_000)
    }

    /// Where the disk `minor` is served.
    pub(super) fn nbd_socket(&self, minor: u16) -> String {
        format!("{}/nbd{}.{minor}", self.args.folder, self.host.process_id())
    }
}
