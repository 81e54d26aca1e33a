//! `tapdisk attach` and `tapdisk detach`: a disk as a block device of the host.
//!
//! ```text
//!   open the disk ─► its record ─┬─ no device: attach one ──────────┬─► report it ─► serve ─┬─ detached
//!                                └─ of a dead tapdisk: take it up ──┘                       └─ asked to stop
//!   asked to stop:   nobody uses it ─► take it away         in use ─► leave it to the next tapdisk
//! ```
//!
//! Through a blktap2 module (`tap.rs`) there is nothing to take up: the kernel fails the requests of a dead tapdisk,
//! and a device in use is served until its users have closed it.
//!
//! # Contract
//!
//! * A device is taken up only if the kernel says that it has the identifier which the record of this very disk has.
//! * Requests that were in flight when a tapdisk died are carried out by the next one; a request that was answered is
//!   not carried out again.
//! * Whatever fails before a device is attached changes nothing.

mod detach;
mod device;
mod record;
mod tap;

pub use detach::DetachArgs;
pub(crate) use detach::run as detach;

use crate::disk::{ImageArgs, disk_summary, memory_summary, open_disk, require_format, stats_summary};
use crate::serve::ServeHost;
use crate::spec::DiskSpec;
use crate::{Console, Tuning};
use clap::{Args, ValueEnum};
use device::{Device, Ended};
use record::{Identity, Record};
use std::path::PathBuf;
use std::rc::Rc;
use std::str::FromStr;
use tap_core::{DiskStatus, Disks, Listed, Node};
use tap_host::{
    Budget, Either, Entropy, Errno, NbdConfig, NbdDevice, NbdDevices, NbdIndex, SECTOR_BYTES, TapDevices,
    VbdId, select,
};
use tap_images::{Formats, show_size};
use tap_nbd::{Export, Server, ServerLimits};

tap_host::listed! {
    pub(super) BUGS: Bug with [device::BUGS, detach::BUGS, record::BUGS];
    DEVICE_OF_ANOTHER = "device-of-another",
        "tapdisk takes up the first block device of ours that it finds, whichever disk's it is";
    DEVICE_NOTED_LATE = "device-noted-late",
        "that a disk has a block device is noted only after it was attached";
    DEVICE_MADE_AGAIN = "device-made-again",
        "a tapdisk that is started again attaches another block device instead of taking up the old one";
    CLAIM_ENOUGH = "claim-enough",
        "a block device that could be opened for ourselves alone counts as unused, whoever else has it open";
}

tap_host::listed! {
    pub(super) MARKS: Mark with [device::MARKS, detach::MARKS];
    DEVICE_ATTACHED = "device-attached", "tapdisk attach made a block device";
    DEVICE_TAKEN_UP = "device-taken-up", "tapdisk attach took up the block device of an earlier one";
    CLAIMED_BUT_USED = "claimed-but-used",
        "a block device was opened for ourselves alone, and someone who does not claim it has it open";
    DEVICE_GREW = "device-grew", "tapdisk attach took up a block device that was smaller than its disk is now";
}

/// The parts of a host that attaching uses.
pub trait AttachHost: ServeHost + NbdDevices + TapDevices + Entropy {}
impl<T: ServeHost + NbdDevices + TapDevices + Entropy> AttachHost for T {}

/// How long to wait for a device that is open for a moment, in nanoseconds: others look at devices as they come.
const BUSY_PATIENCE_NS: u64 = 2_000_000_000;
/// The kernel complains each time.
const BUSY_PAUSE_NS: u64 = 250_000_000;

/// How long the kernel keeps requests that nobody serves unless told otherwise, in seconds.
const KEEP_S: u32 = 600;

/// How a block device is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
enum ViaArg {
    /// The kernel's nbd driver
    #[default]
    Nbd,
    /// A blktap2 module
    Blktap,
}

/// A device on a command line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct DeviceArg(NbdIndex);

impl FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = text.strip_prefix("/dev/").unwrap_or(text);
        let number = name.strip_prefix("nbd");
        if let Some(index) = number.and_then(|number| number.parse().ok()) {
            return Ok(Self(NbdIndex(index)));
        }
        let disk =
            number.and_then(|number| number.split_once('p')).filter(|(disk, _)| disk.parse::<u32>().is_ok());
        let hint = match disk {
            Some((disk, _)) => format!(": it is a partition of /dev/nbd{disk}"),
            None if name.contains("blktap") || name.starts_with("tapdev") => {
                ": a blktap2 module chooses its devices, and SIGTERM to its tapdisk takes one away".into()
            }
            None => String::new(),
        };
        Err(format!("'{text}' is not a device of the kernel's nbd driver, like /dev/nbd0{hint}"))
    }
}

/// The command line of `tapdisk attach`. The main carries out `fork` and `pid_file` before there is a host; in a world
/// they have no effect.
#[derive(Args, Clone, Debug)]
pub struct AttachArgs {
    /// How the block device is made
    #[arg(long, value_enum, default_value_t, value_name = "DRIVER")]
    via: ViaArg,
    /// The device to take, like /dev/nbd3; without it one that is free
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceArg>,
    /// How long the kernel keeps requests while no tapdisk serves the device, before it fails them [default: 600]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    keep: Option<u32>,
    /// Folder for the record of the device, for the next tapdisk; on a tmpfs
    #[arg(long, value_name = "FOLDER", default_value = "/run/tapdisk")]
    pub run_dir: PathBuf,
    #[command(flatten)]
    images: ImageArgs,
    /// Return once the device can be used, and serve in the background; with the status and a message if that failed
    #[arg(long)]
    pub fork: bool,
    /// File for the number of the serving process; removed at the end
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// The disk
    #[arg(value_name = "SPEC")]
    disk: DiskSpec,
}

/// Why a command failed: text that continues "failed to", and the exit status.
struct Failure {
    text: String,
    status: u8,
}

impl Failure {
    fn new(text: impl Into<String>, error: Errno) -> Self {
        Self { text: text.into(), status: u8::try_from(error.0).unwrap_or(1).max(1) }
    }

    /// The driver has refused `what`.
    fn of_driver(what: &str, error: Errno) -> Self {
        let hint = match error {
            Errno::ENODEV => "; the kernel's nbd driver is not there: modprobe nbd",
            Errno::EOPNOTSUPP => {
                "; the kernel's nbd driver is older than Linux 5.14, so that no device could be found again; `tapdisk serve` and nbd-client work with it"
            }
            Errno::EPERM | Errno::EACCES => "; it takes root",
            Errno::EBUSY => "; it is in use: choose another device, or leave out --device",
            Errno::EINVAL => "; is its number too high?",
            _ => "",
        };
        Self::new(format!("{what}: {error}{hint}"), error)
    }
}

/// Runs `tapdisk attach` until the device is detached or it is asked to stop, and returns its exit status.
pub(crate) async fn run<H: AttachHost>(
    host: H,
    args: AttachArgs,
    tuning: Tuning,
    disks: &Disks<H>,
    console: &dyn Console,
) -> u8 {
    let memory = args.images.budget(&tuning);
    let mut listed = None;
    let (mut status, mut tap) = (0, None);
    let served = match args.via {
        ViaArg::Nbd => args.serve(&host, &tuning, disks, (&memory, &mut listed), console).await,
        ViaArg::Blktap => {
            let (served, device) =
                args.serve_tap(&host, &tuning, disks, (&memory, &mut listed), console).await;
            tap = device;
            served.map(|()| None)
        }
    };
    let record = match served {
        Ok(record) => record,
        Err(failure) => {
            console.err(&format!("tapdisk: failed to {}", failure.text));
            status = failure.status;
            None
        }
    };
    // The device is removed, so that nobody is waited for. The module may be asked to close it as long as its ring is
    // open, and would keep its number then: not for as long as the disk takes.
    if status == 0
        && let Some(tap) = tap.take()
    {
        tap.close().await;
    }
    for (disk, error) in disks.close_all().await {
        console.err(&format!(
            "tapdisk: failed to close {}: {error}; data written since the last flush may be lost",
            disk.about
        ));
        status = 1;
    }
    // The disk is closed: whoever attaches it now finds no trace of us.
    if let Some(record) = record {
        record.remove();
    }
    // The kernel may wait for users of the device that cannot be served any more.
    if let Some(tap) = tap {
        tap.close().await;
    }
    status
}

/// What there is to attach.
struct Opened<H: AttachHost> {
    server: Server<H>,
    record: Record<H>,
    status: DiskStatus,
}

impl AttachArgs {
    /// How long the kernel keeps requests that nobody serves, in seconds.
    fn keep_s(&self) -> u32 {
        self.keep.unwrap_or(KEEP_S)
    }

    /// Attaches the disk and serves it; returns the record of a device that is gone.
    async fn serve<H: AttachHost>(
        &self,
        host: &H,
        tuning: &Tuning,
        disks: &Disks<H>,
        (memory, listed): (&Budget, &mut Option<Listed<H>>),
        console: &dyn Console,
    ) -> Result<Option<Record<H>>, Failure> {
        // Registered before there is a device: whoever sees it may send a signal.
        let stopped = host.asked_to_stop();
        let Opened { server, record, status } = self.open(host, tuning, disks, memory, listed).await?;
        let config = NbdConfig {
            index: self.device.map(|device| device.0),
            identifier: String::new(),
            size_bytes: status.info.size_sectors * SECTOR_BYTES,
            flags: server.flags(),
            request_bytes: server.limits().request_bytes,
            patience_s: self.keep_s(),
        };
        let (place, config, look) = match self.place(host, &record, config, &status).await {
            Ok(place) => place,
            Err(failure) => {
                record.give_up();
                return Err(failure);
            }
        };
        let device = Device::serve(host, server, record, config, place);
        let name = device.index.to_string();
        if look && let Err(error) = host.look_for_partitions(device.index).await {
            console.err(&format!("tapdisk: failed to look for partitions on {name}: {error}"));
        }
        console.out(&name);
        console.ready();
        console.out(&format!("{name}: {}", disk_summary(&status)));
        let ended = match select(stopped, device.ended()).await {
            Either::First(_) => device.leave().await,
            Either::Second(ended) => ended,
        };
        if let Some(stats) = listed.as_ref().and_then(Listed::stats) {
            console.out(&format!("{name}: {}", stats_summary(&stats)));
        }
        console.out(&memory_summary(memory));
        let left = format!("left as it is, for the next tapdisk within {} seconds", self.keep_s());
        if let Ended::Lost(error) = ended {
            return Err(Failure::new(
                format!("serve {name} again after its stream broke: {error}; it is {left}"),
                error,
            ));
        }
        let how = if ended == Ended::Gone { "detached" } else { &left };
        console.out(&format!("{name}: {how}"));
        Ok(device.into_record().filter(|_| ended == Ended::Gone))
    }

    /// Opens the disk.
    async fn open_disk<H: AttachHost>(
        &self,
        host: &H,
        tuning: &Tuning,
        disks: &Disks<H>,
        memory: &Budget,
        listed: &mut Option<Listed<H>>,
    ) -> Result<(Rc<dyn Node>, DiskStatus), Failure> {
        let (spec, read_only) = (&self.disk, self.images.read_only);
        require_format(spec).map_err(|why| Failure::new(why, Errno::EINVAL))?;
        let name = spec.to_string();
        let mut place =
            disks.reserve(&name).map_err(|error| Failure::new(error.to_string(), Errno::EBUSY))?;
        let options = self.images.options(!read_only, memory, tuning);
        let disk = open_disk(host, Formats::shipped(), VbdId(0), spec, &options).await;
        let disk = Rc::new(disk.map_err(|error| {
            let errno = error.errno().unwrap_or(Errno::EIO);
            let hint = match errno {
                Errno::EACCES | Errno::EROFS if !read_only => "; with --read-only it need not be writable",
                _ => "",
            };
            Failure::new(format!("{error}{hint}"), errno)
        })?);
        let status = place.fill(&name, &disk);
        *listed = Some(place);
        Ok((tuning.disk(spec, disk.node()), status))
    }

    /// Opens the disk, and takes its record.
    async fn open<H: AttachHost>(
        &self,
        host: &H,
        tuning: &Tuning,
        disks: &Disks<H>,
        memory: &Budget,
        listed: &mut Option<Listed<H>>,
    ) -> Result<Opened<H>, Failure> {
        let (node, status) = self.open_disk(host, tuning, disks, memory, listed).await?;
        let (spec, read_only) = (&self.disk, self.images.read_only);
        let identity = Identity::of(host, spec).await;
        let identity = identity.map_err(|error| Failure::new(format!("look at {spec}: {error}"), error))?;
        let record = Record::take(host, identity).await.map_err(|error| {
            let why = match error {
                Errno::EBUSY => format!("attach {spec}: another tapdisk has it attached"),
                error => format!(
                    "attach {spec}: {error}; its record cannot be kept in {}, which has to be ours alone",
                    self.run_dir.display()
                ),
            };
            Failure::new(why, error)
        })?;
        let export = Export { name: String::new(), description: String::new(), node, read_only };
        // The kernel's requests are never divided: a part of one that is answered with an error would be an I/O error.
        let range_bytes = ServerLimits::default().range_bytes;
        let limits = ServerLimits { connections: 1, negotiating: 1, range_bytes, ..tuning.server };
        let server = Server::new(host.clone(), vec![export], limits, memory);
        let server = server.map_err(|error| Failure::new(error.to_string(), Errno::ENOMEM))?;
        Ok(Opened { server, record, status })
    }

    /// The device, new or taken up, with its stream; whether the kernel should look for partitions.
    async fn place<H: AttachHost>(
        &self,
        host: &H,
        record: &Record<H>,
        config: NbdConfig,
        status: &DiskStatus,
    ) -> Result<((NbdIndex, H::DeviceStream), NbdConfig, bool), Failure> {
        let what = match self.device {
            Some(DeviceArg(index)) => format!("attach {} as {index}", self.disk),
            None => format!("attach {}", self.disk),
        };
        // Reads the kernel's devices before anything is noted: without the driver nothing is.
        let all = host.attached().await.map_err(|error| Failure::of_driver(&what, error))?;
        if let Some(device) = self.earlier(host, record, &all) {
            self.may_take_up(&device, config.size_bytes, status.info.read_only || self.images.read_only)?;
            let config = NbdConfig { index: Some(device.index), identifier: device.identifier, ..config };
            let taken = host.reattach(device.index, &config).await;
            let stream = taken.map_err(|error| {
                Failure::new(format!("take up {}: {error}; it was taken away meanwhile", device.index), error)
            })?;
            host.mark(&DEVICE_TAKEN_UP);
            let grew = device.size_bytes < config.size_bytes;
            if grew {
                host.mark(&DEVICE_GREW);
            }
            return Ok(((device.index, stream), config, grew));
        }
        if all.iter().any(|device| Some(device.index) == config.index) {
            return Err(Failure::of_driver(&what, Errno::EBUSY));
        }
        let token = record.token();
        if !host.bug(&DEVICE_NOTED_LATE) {
            record.begin(token);
        }
        let config = NbdConfig { identifier: record::identifier(token), ..config };
        let place = self.attach(host, &config).await.map_err(|error| {
            record.clear();
            Failure::of_driver(&what, error)
        })?;
        if host.bug(&DEVICE_NOTED_LATE) {
            record.begin(token);
        }
        host.mark(&DEVICE_ATTACHED);
        Ok((place, config, true))
    }

    /// The device that an earlier process has attached for this disk.
    fn earlier<H: AttachHost>(&self, host: &H, record: &Record<H>, all: &[NbdDevice]) -> Option<NbdDevice> {
        let mut all = all.iter();
        let found = if host.bug(&DEVICE_OF_ANOTHER) {
            all.find(|device| device.identifier.starts_with(record::OURS))
        } else {
            let identifier = record.earlier().filter(|_| !host.bug(&DEVICE_MADE_AGAIN))?;
            all.find(|device| device.identifier == identifier)
        };
        found.cloned()
    }

    /// Whether the device of an earlier process suits the disk as it is now.
    fn may_take_up(&self, device: &NbdDevice, size_bytes: u64, read_only: bool) -> Result<(), Failure> {
        let index = device.index;
        let otherwise = format!("or take the device away first: tapdisk detach {index}");
        if let Some(DeviceArg(wanted)) = self.device.filter(|wanted| wanted.0 != index) {
            let text = format!(
                "attach {} as {wanted}: it is {index} already; leave out --device, {otherwise}",
                self.disk
            );
            return Err(Failure::new(text, Errno::EBUSY));
        }
        if size_bytes < device.size_bytes {
            let (now, before) = (show_size(size_bytes), show_size(device.size_bytes));
            let text = format!(
                "take up {index}: it has {before}, and {} now has {now}; restore it, {otherwise}",
                self.disk
            );
            return Err(Failure::new(text, Errno::EINVAL));
        }
        if device.read_only != read_only {
            let (mode, how) = match device.read_only {
                true => ("read-only", "with"),
                false => ("writable", "without"),
            };
            let text = format!("take up {index}: it is {mode}; start tapdisk {how} --read-only, {otherwise}");
            return Err(Failure::new(text, Errno::EINVAL));
        }
        Ok(())
    }

    /// Attaches a new device; waits a moment for one that someone has open.
    async fn attach<H: AttachHost>(
        &self,
        host: &H,
        config: &NbdConfig,
    ) -> Result<(NbdIndex, H::DeviceStream), Errno> {
        let until_ns = host.now_ns().saturating_add(BUSY_PATIENCE_NS);
        loop {
            match host.attach(config).await {
                Err(Errno::EBUSY) if host.now_ns() < until_ns => host.sleep_ns(BUSY_PAUSE_NS).await,
                result => return result,
            }
        }
    }
}

/// Whether others use the device that we have tried to claim. The claim fails beside mounts, swap and other devices;
/// xen-blkback, and programs that open it like any file, are seen only by looking for them.
async fn is_used<H: AttachHost>(host: &H, index: NbdIndex, claim: &Result<H::Claim, Errno>) -> bool {
    if let Err(error) = claim {
        return *error == Errno::EBUSY;
    }
    let used = !host.bug(&CLAIM_ENOUGH) && !host.users(index).await.is_empty();
    if used {
        host.mark(&CLAIMED_BUT_USED);
    }
    used
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_in_dev() {
        for text in ["/dev/nbd12", "nbd12"] {
            assert_eq!(text.parse(), Ok(DeviceArg(NbdIndex(12))));
        }
        for (bad, words) in [
            ("", "like /dev/nbd0"),
            ("nbd", "like /dev/nbd0"),
            ("/dev/nbd3p1", "it is a partition of /dev/nbd3"),
            ("nbdp1", "like /dev/nbd0"),
            ("/dev/sda", "like /dev/nbd0"),
            ("nbd-1", "like /dev/nbd0"),
            ("/dev/xen/blktap-2/tapdev0", "SIGTERM to its tapdisk"),
        ] {
            let why = bad.parse::<DeviceArg>().unwrap_err();
            assert!(why.contains(words), "{why}");
        }
    }

    #[test]
    fn a_failure_says_what_to_do_and_has_its_number_as_status() {
        let failure = |error| Failure::of_driver("attach raw:/a", error);
        for (error, status, words) in [
            (Errno::ENODEV, 19, "modprobe nbd"),
            (Errno::EPERM, 1, "it takes root"),
            (Errno::EBUSY, 16, "another device"),
            (Errno::EOPNOTSUPP, 95, "older than Linux 5.14"),
            (Errno(100_000), 1, "attach raw:/a: error 100000"),
        ] {
            let found = failure(error);
            assert!(found.status == status && found.text.contains(words), "{}", found.text);
        }
    }
}
