//! `tapback`: gives disks that tap-ctl opened to Xen's guests.
//!
//! ```text
//!   toolstack ──► backend/vbd3/DOM/VBD ──► tapback ── connect ──► tapdisk control
//!      │ script: tap-ctl create             states, keys            the ring, the image
//!      └ physical-device-path = FOLDER/nbd<pid>.<minor>
//! ```
//!
//! # Contract
//!
//! * Serves every back end of its type, or those that a script marks. The ring is connected once the script has written
//!   `hotplug-status` = `connected`; `physical-device-path` names the disk by the socket where tapdisk offers it over
//!   NBD.
//! * No data passes through it. When it stops, or dies, guests go on; the next one takes the devices over.
//! * When a tapdisk dies, or its disk is closed by force, the guest waits. Once a tapdisk has the minor number's disk
//!   open again, it is given the ring, and carries out what was not answered. `physical-device-path` and `kthread-pid`
//!   then name that one. A disk that has got the number after it was freed is another one.
//! * A device is closed only when its ring is not served any more.
//! * At its begin it takes away the rings of guests whose devices are gone.

mod remote;
mod tapdisks;

use crate::control::ControlledHost;
use crate::help;
use crate::xen::{GuestHost, RECORDS, how, parse_type, record_of, root_of};
use crate::{Console, vdev};
use clap::Parser;
use remote::Remote;
use std::cell::Cell;
use std::path::PathBuf;
use std::rc::Rc;
use tap_control::FOLDER;
use tap_core::wait;
use tap_host::{Budget, DomId, VbdId};
use tap_xenbus::{
    BackendConfig, BackendEnd, BackendError, Device, DeviceFilter, Hotplug, RingLimits, ServedDisk as _,
    is_device, lead, supervise,
};
use tapdisks::{Place, Tapdisks};

tap_host::listed! {
    pub(super) BUGS: Bug with [remote::BUGS, tapdisks::BUGS];
    GONE_GUESTS_STAY = "gone-guests-stay", "a tapback that starts leaves the rings of guests that are gone";
}

tap_host::listed! {
    pub(super) MARKS: Mark with [remote::MARKS, tapdisks::MARKS];
    GIVEN_REFUSED = "given-refused", "tapback said why a guest does not get its disk";
    GIVEN_LEFT = "given-left", "tapback stopped, and left a guest with its disk";
    GONE_GUEST_TAKEN = "gone-guest-taken", "tapback took the ring of a guest that was gone from a tapdisk";
}

/// The parts of a host that tapback uses.
pub trait BackHost: GuestHost + ControlledHost {}
impl<T: GuestHost + ControlledHost> BackHost for T {}

/// The command line of `tapback`.
#[derive(Parser, Clone, Debug)]
#[command(name = "tapback", version, about = "Gives disks that tap-ctl opened to Xen's guests", after_help = help::tapback())]
pub struct Cli {
    /// Folder of the back ends in xenstore
    #[arg(short = 'n', long = "type", value_name = "TYPE", default_value = "vbd3", value_parser = parse_type)]
    kind: String,
    /// Only back ends with this script, by its file name; for types that others serve, too
    #[arg(long, value_name = "NAME")]
    script: Option<String>,
    /// Folder of tapdisk's control sockets, NBD sockets and minor numbers
    #[arg(long, value_name = "FOLDER", default_value = FOLDER)]
    folder: String,
    /// Folder for the records of requests in flight; that of the tapdisks
    #[arg(long, value_name = "FOLDER", default_value = "/run/tapdisk")]
    pub run_dir: PathBuf,
    /// File for the number of the process; removed at the end
    #[arg(short = 'p', long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
}

/// State that all devices share.
struct Shared<H: BackHost> {
    host: H,
    cli: Cli,
    console: Rc<dyn Console>,
    leave: Rc<wait::Event>,
    tapdisks: Rc<Tapdisks<H>>,
    /// Whether anything failed.
    failed: Cell<bool>,
}

/// Runs `tapback` until it is asked to stop, and returns its exit status.
pub async fn run<H: BackHost>(host: H, cli: Cli, console: Rc<dyn Console>) -> u8 {
    let leave = Rc::<wait::Event>::default();
    let (stopped, event) = (host.asked_to_stop(), Rc::clone(&leave));
    host.spawn("stop", 0, async move {
        stopped.await;
        event.set();
    });
    let tapdisks = Rc::new(Tapdisks::new(host.clone(), cli.folder.clone()));
    let shared = Rc::new(Shared { host, cli, console, leave, tapdisks, failed: Cell::new(false) });
    if let Err(why) = shared.watch().await {
        shared.console.err(&format!("tapback: failed to {why}"));
        shared.failed.set(true);
    }
    u8::from(shared.failed.get())
}

impl<H: BackHost> Shared<H> {
    async fn watch(self: &Rc<Self>) -> Result<(), String> {
        let root = root_of(&self.host, &self.cli.kind).await?;
        self.take_gone_guests(&root).await?;
        let marked =
            self.cli.script.as_ref().map_or_else(String::new, |script| format!(" with the script {script}"));
        self.console.out(&format!("watching {root} for vbds{marked}"));
        self.console.ready();
        let filter = DeviceFilter { root, script: self.cli.script.clone(), records: RECORDS };
        let serve = |device| {
            let shared = Rc::clone(self);
            async move { shared.serve(device).await }
        };
        supervise(&self.host, &filter, &self.leave, serve).await.map_err(|error| error.to_string())
    }

    /// Guests may have been destroyed while no tapback ran. A ring is taken once its requests are answered, for which
    /// other guests do not wait.
    async fn take_gone_guests(self: &Rc<Self>, root: &str) -> Result<(), String> {
        if self.host.bug(&GONE_GUESTS_STAY) {
            return Ok(());
        }
        for (place, (dom, vbd)) in self.tapdisks.guests().await? {
            if is_device(&self.host, root, dom, vbd).await.map_err(|error| error.to_string())? {
                continue;
            }
            let (own, key) = (Rc::clone(self), u64::from(dom.0) << 32 | u64::from(vbd.0));
            self.host.spawn("gone guest", key, async move { own.take_gone(place, dom, vbd).await });
        }
        Ok(())
    }

    async fn take_gone(&self, place: Place, dom: DomId, vbd: VbdId) {
        let name = vdev::of_guest(dom, vbd);
        match self.tapdisks.at(place.pid).disconnect(place.minor, dom, vbd).await {
            Ok(()) => {
                self.host.mark(&GONE_GUEST_TAKEN);
                let pid = place.pid;
                self.console.out(&format!("{name}: it is gone; its ring was taken from tapdisk {pid}"));
            }
            Err(why) => self.console.err(&format!("tapback: {name}: failed to {why}")),
        }
    }

    async fn serve(self: &Rc<Self>, device: Device) {
        let Device { path, dom, vbd, .. } = device;
        let config = BackendConfig {
            record: Some(record_of(dom, vbd)),
            hotplug: Hotplug::Wait,
            limits: RingLimits::default(),
            memory: Budget::default(),
            ..BackendConfig::new(path.clone(), dom, vbd)
        };
        let name = vdev::of_guest(dom, vbd);
        let said = Rc::default();
        let disk = || {
            let (tapdisks, console) = (Rc::clone(&self.tapdisks), Rc::clone(&self.console));
            Remote::new(tapdisks, console, path.clone(), dom, vbd, Rc::clone(&said))
        };
        let open = async || Ok(disk());
        let release = async || disk().release().await;
        let tell = |why: &str| {
            self.host.mark(&GIVEN_REFUSED);
            self.console.err(&format!("tapback: {name}: failed to {why}"));
        };
        let end = lead(&self.host, &config, &self.leave, open, tell, release).await;
        self.report_end(&name, end);
    }

    fn report_end(&self, name: &str, end: Result<BackendEnd, BackendError>) {
        match end {
            Ok(end) => {
                if end == BackendEnd::Left {
                    self.host.mark(&GIVEN_LEFT);
                }
                self.console.out(&format!("{name}: {}", how(end)));
            }
            Err(error) => {
                self.console.err(&format!("tapback: {name}: failed to {error}"));
                self.failed.set(true);
            }
        }
    }
}
