//! A disk as a block device through a blktap2 module.
//!
//! ```text
//!   open the disk ─► free what dead tapdisks left ─► device ─► report it ─► serve ─► asked to stop ─► unused: remove
//! ```
//!
//! The kernel keeps nothing for a successor: when tapdisk dies its device fails, and goes with its last user.

use super::{AttachArgs, AttachHost, Failure};
use crate::disk::{disk_summary, memory_summary, stats_summary};
use crate::{Console, Tuning};
use tap_core::{DiskStatus, Disks, Listed};
use tap_host::{Budget, Errno};
use tap_ring::{TapConfig, TapDisk, TapError, TapNews};

/// Prefix of the names of the pages that say which devices are ours.
const RECORDS: &str = "tap";

impl Failure {
    fn of_tap(error: &TapError) -> Self {
        let errno = error.errno().unwrap_or(Errno::EIO);
        let hint = match (error, errno) {
            (TapError::Allocate(_), Errno::ENOMEM) => "; all devices of the module are in use",
            (TapError::Name { .. }, Errno::EPERM) => {
                "; the module is one of Linux 2.6, which tapdisk does not work with: use the nbd driver (--via nbd)"
            }
            (_, Errno::EACCES | Errno::EPERM) => "; it takes root, and the run folder has to be ours alone",
            _ => "",
        };
        Self::new(format!("{error}{hint}"), errno)
    }
}

impl AttachArgs {
    /// Attaches the disk through a blktap2 module, and serves it until it is asked to stop and nobody uses it. The
    /// device that comes back, if any, has to be closed; the disk is not used any more.
    pub(super) async fn serve_tap<H: AttachHost>(
        &self,
        host: &H,
        tuning: &Tuning,
        disks: &Disks<H>,
        (memory, listed): (&Budget, &mut Option<Listed<H>>),
        console: &dyn Console,
    ) -> (Result<(), Failure>, Option<TapDisk<H>>) {
        // Registered before there is a device: whoever sees it may send a signal.
        let stopped = host.asked_to_stop();
        let (tap, status) = match self.open_tap(host, tuning, disks, memory, listed).await {
            Ok(opened) => opened,
            Err(failure) => return (Err(failure), None),
        };
        let path = tap.path();
        let tell = |news| match news {
            TapNews::Made(offers) => {
                console.out(&path);
                console.ready();
                console.out(&format!("{path}: {}", disk_summary(&status)));
                if !offers.flush {
                    console.out(&format!(
                        "{path}: the module has no flushes: every write is durable when it is answered"
                    ));
                }
            }
            TapNews::InUse => {
                console.out(&format!("{path}: in use; it is served until its users have closed it"))
            }
            TapNews::NumberStays => console.out(&format!(
                "{path}: the module was asked to close it, and keeps its number until the host is started \
                 again; who wrote to 'remove' waits until interrupted"
            )),
        };
        let ended = tap.run(stopped, tell).await;
        if let Some(stats) = listed.as_ref().and_then(Listed::stats) {
            console.out(&format!("{path}: {}", stats_summary(&stats)));
        }
        console.out(&memory_summary(memory));
        if ended.is_ok() {
            console.out(&format!("{path}: removed"));
        }
        (ended.map_err(|error| Failure::of_tap(&error)), Some(tap))
    }

    /// Opens the disk, and a device that nobody sees yet.
    async fn open_tap<H: AttachHost>(
        &self,
        host: &H,
        tuning: &Tuning,
        disks: &Disks<H>,
        memory: &Budget,
        listed: &mut Option<Listed<H>>,
    ) -> Result<(TapDisk<H>, DiskStatus), Failure> {
        if let Some(device) = self.device {
            let text = format!(
                "attach {} as {}: a blktap2 module chooses its device; leave out --device",
                self.disk, device.0
            );
            return Err(Failure::new(text, Errno::EINVAL));
        }
        if self.keep.is_some() {
            let text = format!(
                "attach {} with --keep: a blktap2 module keeps no requests of a tapdisk that has died; leave it out",
                self.disk
            );
            return Err(Failure::new(text, Errno::EINVAL));
        }
        let (node, status) = self.open_disk(host, tuning, disks, memory, listed).await?;
        let config = TapConfig {
            records: RECORDS,
            limits: tuning.ring,
            read_only: self.images.read_only,
            memory: memory.clone(),
        };
        let tap = TapDisk::open(host.clone(), config, node).await;
        tap.map(|tap| (tap, status)).map_err(|error| Failure::of_tap(&error))
    }
}
