//! `tapdisk xen`: disks of Xen's guests.
//!
//! ```text
//!   DOM/VDEV=SPEC ...  open every disk ─► one back end each ─┐
//!                                                            ├─► closed by the toolstack, or left at SIGTERM
//!   --watch            a back end for every vbd of our script ┘
//! ```
//!
//! At SIGTERM the guests' requests in flight are answered, the images are closed, and the vbds stay as they are: the
//! next `tapdisk xen` takes them over, and the guests only notice a pause. The same holds after a crash.

use crate::disk::{
    DiskOptions, ImageArgs, disk_summary, memory_summary, open_disk, require_format, stats_summary,
};
use crate::old_names;
use crate::serve::ServeHost;
use crate::spec::DiskSpec;
use crate::vdev;
use crate::{Console, Tuning};
use clap::Args;
use futures_util::future::join_all;
use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;
use std::str::FromStr;
use tap_core::{Disks, Listed, Node, wait};
use tap_host::{Budget, DomId, Errno, VbdId};
use tap_images::Formats;
use tap_xenbus::{
    Backend, BackendConfig, BackendEnd, BackendError, Device, DeviceFilter, Hotplug, XenHost, is_read_only,
    lead, patiently, supervise,
};

tap_host::listed! {
    pub(super) BUGS: Bug;
    MODE_UNREAD = "mode-unread", "the image of a disk that the toolstack made read-only is opened for writing";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    VBD_NAMED = "vbd-named", "tapdisk xen served a vbd of its command line";
    VBD_FOUND = "vbd-found", "tapdisk xen served a vbd that it found by its script";
    VBD_REFUSED = "vbd-refused", "tapdisk xen said why a vbd that it found is not served";
    VBD_FAILED = "vbd-failed", "tapdisk xen said what ended the service of a vbd";
    VBD_LEFT = "vbd-left", "tapdisk xen was asked to stop, and left a vbd as it was";
    VBD_GONE = "vbd-gone", "tapdisk xen closed a vbd whose back end was taken away";
    LEFT_DEAF = "left-deaf", "tapdisk xen ended because it heard no events any more";
}

/// How long to wait for an image that is in use, in nanoseconds. A guest that reboots gets a new vbd while the image of
/// the old one is being closed, which a slow drive may delay; xl waits for ten seconds.
const IN_USE_PATIENCE_NS: u64 = 8_000_000_000;

/// Prefix of the names of in-flight records.
pub(crate) const RECORDS: &str = "ring";

/// The name of the in-flight record of a guest's disk, whichever program serves its ring.
pub(crate) fn record_of(dom: DomId, vbd: VbdId) -> String {
    format!("{RECORDS}-{}-{}", dom.0, vbd.0)
}

/// The parts of a host that serving guests uses.
pub trait GuestHost: ServeHost + XenHost {}
impl<T: ServeHost + XenHost> GuestHost for T {}

/// The command line of `tapdisk xen`.
#[derive(Args, Clone, Debug)]
pub struct XenArgs {
    /// Serve all vbds with our script, as they come and go, instead of those named here
    #[arg(long, conflicts_with = "disks")]
    watch: bool,
    /// With --watch: the file name of the script that marks our vbds
    #[arg(long, value_name = "NAME", default_value = "block-tapdisk", conflicts_with = "disks")]
    script: String,
    /// Folder of the back ends in xenstore
    #[arg(long = "type", value_name = "TYPE", default_value = "vbd", value_parser = parse_type)]
    kind: String,
    /// Folder for the records of requests in flight, for the next tapdisk; on a tmpfs
    #[arg(long, value_name = "FOLDER", default_value = "/run/tapdisk")]
    pub run_dir: PathBuf,
    #[command(flatten)]
    images: ImageArgs,
    /// The vbds with their disks
    #[arg(required_unless_present = "watch", value_name = "DOMAIN/VDEV=SPEC")]
    disks: Vec<GuestDisk>,
}

pub(crate) fn parse_type(text: &str) -> Result<String, String> {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if plain { Ok(text.to_owned()) } else { Err("a type is one name, like vbd".to_owned()) }
}

/// A guest's disk and its image or export.
#[derive(Clone, PartialEq, Eq, Debug)]
struct GuestDisk {
    dom: DomId,
    vbd: VbdId,
    spec: DiskSpec,
}

impl FromStr for GuestDisk {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('=').and_then(|(vbd, spec)| Some((vbd.split_once('/')?, spec)));
        let Some(((dom, vdev), spec)) = parts else {
            return Err("write DOMAIN/VDEV=SPEC, like 3/xvda=raw:/images/a.img".to_owned());
        };
        let dom =
            dom.parse().map_err(|_| format!("'{dom}' is not a domain id; `xl domid NAME` prints it"))?;
        let disk = Self { dom: DomId(dom), vbd: vdev::parse(vdev)?, spec: spec.parse()? };
        require_format(&disk.spec).map_err(|why| format!("failed to {why}"))?;
        Ok(disk)
    }
}

/// The entry of one vbd's disk in the list, once it is open.
type Place<H> = RefCell<Option<Listed<H>>>;

/// State that all disks of a process share.
struct Shared<H> {
    host: H,
    args: XenArgs,
    tuning: Tuning,
    console: Rc<dyn Console>,
    leave: Rc<wait::Event>,
    /// For all disks together.
    memory: Budget,
    /// The open disks, by guest and vbd.
    disks: Disks<H>,
    /// Whether anything failed.
    failed: Cell<bool>,
}

/// Runs `tapdisk xen` until every disk is closed or it is asked to stop, and returns its exit status.
pub async fn run<H: GuestHost>(
    host: H,
    args: XenArgs,
    tuning: Tuning,
    disks: Disks<H>,
    console: Rc<dyn Console>,
) -> u8 {
    let leave = Rc::<wait::Event>::default();
    let (stopped, event) = (host.asked_to_stop(), Rc::clone(&leave));
    host.spawn("stop", 0, async move {
        stopped.await;
        event.set();
    });
    let memory = args.images.budget(&tuning);
    let failed = Cell::new(false);
    let shared = Rc::new(Shared { host, args, tuning, console, leave, memory, disks, failed });
    let outcome = if shared.args.watch { shared.watch().await } else { shared.serve_all().await };
    if let Err(why) = outcome {
        shared.fail(&why);
    }
    shared.console.out(&memory_summary(&shared.memory));
    u8::from(shared.failed.get())
}

impl<H: GuestHost> Shared<H> {
    fn fail(&self, why: &str) {
        self.console.err(&format!("tapdisk: failed to {why}"));
        self.failed.set(true);
    }

    fn config(&self, path: &str, dom: DomId, vbd: VbdId, hotplug: Hotplug) -> BackendConfig {
        BackendConfig {
            record: Some(record_of(dom, vbd)),
            hotplug,
            limits: self.tuning.ring,
            memory: self.memory.clone(),
            ..BackendConfig::new(path, dom, vbd)
        }
    }

    /// Serves the disks of the command line. If some cannot be served the others still are, since their guests wait.
    async fn serve_all(&self) -> Result<(), String> {
        let root = root_of(&self.host, &self.args.kind).await?;
        let serving = self.args.disks.iter().map(|disk| async {
            self.host.mark(&VBD_NAMED);
            let path = format!("{root}/{}/{}", disk.dom.0, disk.vbd.0);
            let config = self.config(&path, disk.dom, disk.vbd, Hotplug::Write);
            let place = Place::default();
            let open = || self.open(&config, &disk.spec, &place);
            let (host, leave) = (self.host.clone(), Rc::clone(&self.leave));
            let end = Backend::run(host, config.clone(), open, leave).await;
            self.leave_if_deaf(&end);
            self.report_end(&config, &place, end);
        });
        join_all(serving).await;
        Ok(())
    }

    /// Opens the disk of an existing vbd, possibly again, and puts its list entry in `place`.
    async fn open(
        &self,
        config: &BackendConfig,
        spec: &DiskSpec,
        place: &Place<H>,
    ) -> Result<Rc<dyn Node>, String> {
        let path = &config.backend_path;
        // Opening for writing locks the image for others, and may write. Read first: without the directory the mode
        // would be that of a writable disk.
        let read_only = is_read_only(&self.host, path).await.map_err(|error| error.to_string())?;
        let write = !self.args.images.read_only && (!read_only || self.host.bug(&MODE_UNREAD));
        match patiently(&self.host, async || self.host.read(&format!("{path}/frontend")).await).await {
            Ok(_) => {}
            Err(Errno::ENOENT) => {
                return Err(format!("find {path} in xenstore; a toolstack makes it"));
            }
            Err(error) => return Err(format!("read {path}/frontend in xenstore: {error}")),
        }
        place.take();
        let name = name(config);
        let mut listed = self.disks.reserve(&name).map_err(|error| error.to_string())?;
        let options = DiskOptions {
            patience_ns: IN_USE_PATIENCE_NS,
            ..self.args.images.options(write, &self.memory, &self.tuning)
        };
        let disk = open_disk(&self.host.apart(), Formats::shipped(), config.vbd, spec, &options).await;
        let disk = Rc::new(disk.map_err(|e| e.to_string())?);
        let status = listed.fill(&spec.to_string(), &disk);
        place.replace(Some(listed));
        self.console.out(&format!("serving {name}: {}", disk_summary(&status)));
        Ok(self.tuning.disk(spec, disk.node()))
    }

    /// Reports the failure of one disk.
    fn report_failure(&self, config: &BackendConfig, why: &str) {
        self.console.err(&format!("tapdisk: {}: failed to {why}", name(config)));
    }

    /// Reports how the disk ended, and its counters.
    fn report_end(&self, config: &BackendConfig, place: &Place<H>, end: Result<BackendEnd, BackendError>) {
        if let Some(stats) = place.take().and_then(|listed| listed.stats()) {
            self.console.out(&format!("{}: {}", name(config), stats_summary(&stats)));
        }
        let end = match end {
            Ok(end) => end,
            Err(error) => {
                self.host.mark(&VBD_FAILED);
                self.report_failure(config, &error.to_string());
                self.failed.set(true);
                return;
            }
        };
        let mark = match end {
            BackendEnd::BackendGone => Some(&VBD_GONE),
            BackendEnd::Left => Some(&VBD_LEFT),
            BackendEnd::Offline | BackendEnd::FrontendGone => None,
        };
        mark.into_iter().for_each(|mark| self.host.mark(mark));
        self.console.out(&format!("{}: {}", name(config), how(end)));
    }

    /// Serves all vbds that a toolstack assigns to us.
    async fn watch(self: &Rc<Self>) -> Result<(), String> {
        let script = self.args.script.clone();
        let root = root_of(&self.host, &self.args.kind).await?;
        self.console.out(&format!("watching {root} for vbds with the script {script}"));
        let filter = DeviceFilter { root, script: Some(script), records: RECORDS };
        let serve = |device| {
            let shared = Rc::clone(self);
            async move { shared.serve_device(device).await }
        };
        supervise(&self.host, &filter, &self.leave, serve).await.map_err(|error| error.to_string())
    }

    async fn serve_device(&self, device: Device) {
        let config = self.config(&device.path, device.dom, device.vbd, Hotplug::Wait);
        self.host.mark(&VBD_FOUND);
        if let Some(note) = old_names::note(&device.params) {
            self.console.err(&format!("tapdisk: {}: {note}", name(&config)));
        }
        let place = Place::default();
        let open = async || self.open(&config, &named(&device.params)?, &place).await;
        // The failure of one disk of many does not fail the process.
        let tell = |why: &str| {
            self.host.mark(&VBD_REFUSED);
            self.report_failure(&config, why);
        };
        // With a process its rings ended.
        let end = lead(&self.host, &config, &self.leave, open, tell, async || {}).await;
        self.leave_if_deaf(&end);
        self.report_end(&config, &place, end);
    }

    /// A process that receives no events can no longer serve any disk, even unused ones: it stops, so that another can.
    fn leave_if_deaf(&self, end: &Result<BackendEnd, BackendError>) {
        if end.as_ref().is_err_and(|error| matches!(error.first(), BackendError::Deaf { .. })) {
            self.host.mark(&LEFT_DEAF);
            self.leave.set();
        }
    }
}

/// The folder of our domain's back ends of this type.
pub(crate) async fn root_of<H: XenHost>(host: &H, kind: &str) -> Result<String, String> {
    let own = match patiently(host, async || host.read("domid").await).await {
        Ok(value) => std::str::from_utf8(&value).ok().and_then(|id| id.trim_end_matches('\0').parse().ok()),
        // A dom0 without the key.
        Err(Errno::ENOENT) => Some(0_u16),
        Err(error) => return Err(format!("read our domain id from xenstore: {error}")),
    };
    let own = own.ok_or("read our domain id from xenstore: it is not a number")?;
    Ok(format!("/local/domain/{own}/backend/{kind}"))
}

/// Parses the name of a disk from a toolstack.
fn named(params: &str) -> Result<DiskSpec, String> {
    let spec = params.parse().map_err(|why| format!("read the name of the disk: {why}"))?;
    require_format(&spec)?;
    Ok(spec)
}

/// How the service of a vbd ended, in words.
pub(crate) fn how(end: BackendEnd) -> &'static str {
    match end {
        BackendEnd::Offline => "closed",
        BackendEnd::FrontendGone => "closed: its front end was taken away",
        BackendEnd::BackendGone => "closed: it was taken away",
        BackendEnd::Left => "left as it is",
    }
}

/// The name of a vbd in messages.
fn name(config: &BackendConfig) -> String {
    vdev::of_guest(config.dom, config.vbd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vbds_with_their_disks_are_parsed() {
        let disk = |text: &str| GuestDisk::from_str(text);
        let spec = "raw:/a=b/c".parse().unwrap();
        assert_eq!(disk("3/xvda=raw:/a=b/c"), Ok(GuestDisk { dom: DomId(3), vbd: VbdId(51712), spec }));
        for (bad, why) in [
            ("xvda=raw:/a", "DOMAIN/VDEV=SPEC"),
            ("3/xvda", "DOMAIN/VDEV=SPEC"),
            ("web/xvda=raw:/a", "xl domid"),
            ("70000/xvda=raw:/a", "xl domid"),
            ("3/vda=raw:/a", "not a guest's disk"),
            ("3/xvda=/a", "name its format, raw:/a or "),
            ("3/xvda=vhd:/a", "not a known format"),
        ] {
            let text = disk(bad).unwrap_err();
            assert!(text.contains(why), "{bad}: {text}");
        }
    }
}
