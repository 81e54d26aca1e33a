//! `tapdisk detach`: takes a block device away.
//!
//! A device that is in use is refused, since its requests would fail. The process that serves it notices, closes the
//! disk and ends.

use super::record::{OURS, Other};
use super::{AttachHost, DeviceArg, Failure, is_used};
use crate::Console;
use clap::Args;
use std::path::PathBuf;
use tap_host::{Errno, NbdClaim, NbdIndex};

tap_host::listed! {
    pub(super) BUGS: Bug;
    DETACHED_IN_USE = "detached-in-use", "tapdisk detach takes away a block device that someone uses";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    DETACH_REFUSED = "detach-refused", "tapdisk detach refused a block device that is in use";
    DETACHED = "detached", "tapdisk detach took a block device away";
}

/// How long to wait until a device is gone, in nanoseconds.
const GONE_PATIENCE_NS: u64 = 5_000_000_000;
const GONE_PAUSE_NS: u64 = 10_000_000;

/// The command line of `tapdisk detach`.
#[derive(Args, Clone, Debug)]
pub struct DetachArgs {
    /// Even if it is in use: requests that are not answered fail
    #[arg(long)]
    force: bool,
    /// Folder of the records of devices
    #[arg(long, value_name = "FOLDER", default_value = "/run/tapdisk")]
    pub run_dir: PathBuf,
    /// The device, like /dev/nbd0
    #[arg(value_name = "DEVICE")]
    device: DeviceArg,
}

/// Runs `tapdisk detach`, and returns its exit status.
pub(crate) async fn run<H: AttachHost>(host: H, args: DetachArgs, console: &dyn Console) -> u8 {
    match args.detach(&host).await {
        Ok(()) => {
            host.mark(&DETACHED);
            console.out(&format!("{}: detached", args.device.0));
            0
        }
        Err(failure) => {
            console.err(&format!("tapdisk: failed to {}", failure.text));
            failure.status
        }
    }
}

/// Whether a device with this identifier is attached.
async fn is_there<H: AttachHost>(host: &H, index: NbdIndex, identifier: &str) -> Result<bool, Errno> {
    let all = host.attached().await?;
    Ok(all.iter().any(|device| device.index == index && device.identifier == identifier))
}

impl DetachArgs {
    async fn detach<H: AttachHost>(&self, host: &H) -> Result<(), Failure> {
        let index = self.device.0;
        let what = format!("detach {index}");
        let of_driver = |error| Failure::of_driver(&what, error);
        let all = host.attached().await.map_err(of_driver)?;
        let Some(device) = all.into_iter().find(|device| device.index == index) else {
            return Err(Failure::new(format!("{what}: nothing is attached there"), Errno::ENXIO));
        };
        if !device.identifier.starts_with(OURS) {
            let text =
                format!("{what}: it is not of tapdisk; `nbd-client -d {index}` detaches those of nbd-client");
            return Err(Failure::new(text, Errno::EPERM));
        }
        let force = self.force || host.bug(&DETACHED_IN_USE);
        let claim = if force { None } else { Some(self.claim(host).await?) };
        let record = Other::of(host, &device.identifier);
        // Until the end: the stream may break before its server has read that the device goes.
        let _leaving = match &record {
            Some(record) => Some(record.leaves().await.map_err(|error| {
                let why = match error {
                    Errno::EBUSY => ": another process is detaching it",
                    _ => "; that it leaves cannot be noted",
                };
                Failure::new(format!("{what}: {error}{why}"), error)
            })?),
            None => None,
        };
        host.detach(index).await.map_err(of_driver)?;
        drop(claim);
        let until_ns = host.now_ns().saturating_add(GONE_PATIENCE_NS);
        while is_there(host, index, &device.identifier).await.map_err(of_driver)? {
            if host.now_ns() >= until_ns {
                let users = self.who(host).await;
                let text = format!(
                    "{what}: its requests fail from now on, and it goes when it is closed by {users}"
                );
                return Err(Failure::new(text, Errno::EBUSY));
            }
            host.sleep_ns(GONE_PAUSE_NS).await;
        }
        record.into_iter().for_each(Other::remove);
        Ok(())
    }

    /// Has the device for ourselves, with everything written.
    async fn claim<H: AttachHost>(&self, host: &H) -> Result<H::Claim, Failure> {
        let index = self.device.0;
        let claim = host.claim(index).await;
        if is_used(host, index, &claim).await {
            host.mark(&DETACH_REFUSED);
            let users = self.who(host).await;
            let text = format!("detach {index}: it is in use by {users}; with --force their requests fail");
            return Err(Failure::new(text, Errno::EBUSY));
        }
        let claim = claim.map_err(|error| Failure::of_driver(&format!("open {index}"), error))?;
        if let Err(error) = claim.sync().await {
            let text =
                format!("write what the kernel has kept for {index}: {error}; with --force it is lost");
            return Err(Failure::new(text, error));
        }
        Ok(claim)
    }

    async fn who<H: AttachHost>(&self, host: &H) -> String {
        let users = host.users(self.device.0).await;
        if users.is_empty() { "someone who cannot be seen from here".to_owned() } else { users.join(", ") }
    }
}
