//! One disk of a minor number.
//!
//! ```text
//!             open                pause             resume
//!   attached ──────► running ──────────────► paused ──────► running
//!      ▲                └──────── close ────────┘
//!      └───────────────────────────┘
//! ```

mod commit;
pub(super) mod guests;
mod priority;
mod resize;
mod snapshot;
mod stats;
mod told;

use super::ControlledHost;
use super::open::{Asked, spec_of};
use super::settings::Settings;
use crate::disk::{DiskOptions, OpenError, open_disk, open_node};
use crate::spec::DiskSpec;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_abi::blkif::INFO_READ_ONLY;
use tap_abi::tapctl::{Entry, Image, Params, Text, state};
use tap_control::Refusal;
use tap_control::json::{self, Happened};
use tap_core::wait::{Event as Flag, Receiver, Semaphore, joined};
use tap_core::{Disk, Listed, Node, ParkError, Request, nodes};
use tap_host::{Errno, File, FileId, OpenMode, SECTOR_BYTES, SocketAddress, VbdId, unless};
use tap_images::{Formats, ImageError, sync_file, sync_name};
use tap_nbd::{Export, Server, ServerLimits};

pub(super) use commit::Asked as Merging;
use guests::Guests;
pub(super) use snapshot::Names;

tap_host::listed! {
    pub(super) BUGS: Bug with [commit::BUGS, guests::BUGS, priority::BUGS, resize::BUGS, snapshot::BUGS, told::BUGS];
    RESUMED_WITHOUT = "resumed-without", "a disk whose image cannot be opened again lets requests through without one";
    RESUME_KEEPS_NAME = "resume-keeps-name", "a disk that was resumed with another image opens the first one at the next resume";
    UNMARKED_LATER = "unmarked-later", "a detach is answered before others can have the minor number";
    RESUMED_BY_NAME = "resumed-by-name", "a disk goes on with another file that has got the name of its image";
    NAME_TAKEN_AS_IS = "name-taken-as-is", "a disk is served although its image's name may not be durable";
    CHAIN_TAKEN_AS_IS = "chain-taken-as-is", "a disk is served although an image below its own may not be durable";
    COPY_TAKEN_AS_IS = "copy-taken-as-is", "a disk goes on with a copy of its image that may not be durable";
    PAUSED_UNSAID = "paused-unsaid", "a paused disk is listed as running at the JSON socket";
    PAUSED_CLOSE_ANSWERS = "paused-close-answers", "requests that a pause holds fail when the disk is closed";
    PAUSED_CLOSE_WAITS = "paused-close-waits", "the close of a paused disk waits for requests that the pause holds";
}

tap_host::listed! {
    pub(super) MARKS: Mark with [commit::MARKS, guests::MARKS, priority::MARKS, resize::MARKS, snapshot::MARKS];
    RESUMED_ELSEWHERE = "resumed-elsewhere", "a disk was resumed with another image";
    RESUME_REFUSED = "resume-refused", "a resume failed, and the disk went on with the image that it had";
    RESUME_FAILED = "resume-failed", "a resume failed, and the disk stayed paused";
    CLOSED_PAUSED = "closed-paused", "a paused disk was closed";
}

/// A minor number of this process.
pub(super) struct Vbd<H: ControlledHost> {
    minor: u16,
    pub(super) allocation: String,
    /// Its requests take turns.
    pub turn: Semaphore,
    open: RefCell<Option<Rc<Open<H>>>>,
    was_open: Cell<bool>,
    /// Its close was forced, and is under way.
    pub(super) forced: RefCell<Option<Rc<Forced>>>,
    /// The last merge below its disk.
    job: RefCell<Option<Rc<commit::Job>>>,
    /// Nobody else has the minor number as long as this is open, and locked.
    marker: RefCell<Option<H::File>>,
}

/// A forced close that is under way.
#[derive(Default)]
pub(super) struct Forced {
    /// Somebody was told that it takes longer.
    pub(super) late: Cell<bool>,
    pub(super) ended: Flag,
    pub(super) result: RefCell<Option<Result<(), Refusal>>>,
}

/// Why a disk is closed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Closing {
    /// Somebody asked for it.
    Asked,
    /// Somebody insists.
    Forced,
    /// The process ends.
    Ending,
}

/// Whether an open disk runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Running,
    Pausing,
    Paused,
    /// Paused, and an image could not be opened.
    Stranded,
    Closing,
}

/// An open disk.
struct Open<H: ControlledHost> {
    /// For its files, which have a priority of their own.
    files: H,
    options: DiskOptions,
    /// As tap-ctl gave it.
    name: RefCell<String>,
    stage: Cell<Stage>,
    /// The file of its image, if it is one.
    file: Cell<Option<FileId>>,
    disk: Rc<Disk<H>>,
    /// What its users use.
    node: Rc<dyn Node>,
    /// Those who do so through a ring.
    guests: RefCell<Guests>,
    listed: RefCell<Listed<H>>,
    server: Server<H>,
    /// Completes when the server has ended.
    served: RefCell<Option<Receiver<()>>>,
}

impl<H: ControlledHost> Vbd<H> {
    pub(super) fn new(minor: u16, marker: H::File, allocation: String) -> Self {
        let (turn, open, was_open) = (Semaphore::new(1), RefCell::default(), Cell::new(false));
        let (forced, job, marker) = (RefCell::default(), RefCell::default(), RefCell::new(Some(marker)));
        Self { minor, allocation, turn, open, was_open, forced, job, marker }
    }

    /// Gives the minor number back; afterwards others can have it.
    pub(super) async fn unmark(&self, host: &H) {
        drop(self.marker.take());
        if !host.bug(&UNMARKED_LATER) {
            host.closed().await;
        }
    }

    pub(super) fn minor(&self) -> u16 {
        self.minor
    }

    pub(super) fn is_open(&self) -> bool {
        self.open.borrow().is_some()
    }

    fn opened(&self, what: &str) -> Result<Rc<Open<H>>, Refusal> {
        let open = self.open.borrow().clone();
        open.ok_or_else(|| Refusal::new(Errno::EINVAL, format!("{what}: it has no image open")))
    }

    /// Its line in a list.
    pub(super) fn entry(&self) -> Entry {
        let open = self.open.borrow();
        let state = match open.as_ref().map(|open| open.stage.get()) {
            None if self.was_open.get() => state::CLOSED,
            None | Some(Stage::Running) => 0,
            Some(Stage::Pausing) => state::PAUSE_REQUESTED | state::QUIESCE_REQUESTED,
            Some(Stage::Paused) => PAUSED,
            Some(Stage::Stranded) => PAUSED | state::RESUME_FAILED,
            Some(Stage::Closing) => state::SHUTDOWN_REQUESTED,
        };
        let path = open.as_ref().map_or_else(|| Text::cut(""), |open| Text::cut(&open.name.borrow()));
        Entry { minor: i32::from(self.minor).into(), state: state.into(), path, ..Entry::default() }
    }

    /// The image that is open, as tap-ctl gave it.
    pub(super) fn open_image(&self) -> Option<String> {
        self.open.borrow().as_ref().map(|open| open.name.borrow().clone())
    }

    /// Cuts off its clients and guests at once, without answers.
    pub(super) fn hang_up(&self, host: &H) {
        if let Some(open) = &*self.open.borrow() {
            open.server.hang_up();
            open.leave_guests(host, true);
        }
    }

    /// Its size.
    pub(super) fn image(&self) -> Result<Image, Refusal> {
        let info = self.opened(&format!("describe minor {}", self.minor))?.disk.slot().info();
        Ok(Image {
            sectors: info.size_sectors.into(),
            sector_size: (SECTOR_BYTES as u32).into(),
            info: if info.read_only { INFO_READ_ONLY } else { 0 }.into(),
        })
    }

    /// Opens an image, and serves it.
    pub(super) async fn open(
        self: &Rc<Self>,
        settings: &Settings<H>,
        params: &Params,
    ) -> Result<Image, Refusal> {
        let what = format!("open minor {}", self.minor);
        if let Some(open) = &*self.open.borrow() {
            return Err(Refusal::new(Errno::EALREADY, format!("{what}: it has {} open", open.name.borrow())));
        }
        let asked = Asked::of(params, &what)?;
        let spec = spec_of(&asked.name, &what)?;
        let options = settings.options(asked.read_only, asked.direct);
        let open = self.serve(settings, asked.name, spec, options).await?;
        self.was_open.set(true);
        *self.open.borrow_mut() = Some(Rc::new(open));
        self.tell(settings, Happened::Opened);
        self.image()
    }

    async fn serve(
        self: &Rc<Self>,
        settings: &Settings<H>,
        name: String,
        spec: DiskSpec,
        options: DiskOptions,
    ) -> Result<Open<H>, Refusal> {
        let (host, tuning) = (&priority::files_of_disk(&settings.host), &settings.tuning);
        let listed = settings.disks.reserve(&self.minor.to_string());
        let mut listed = listed.map_err(|why| Refusal::new(Errno::EMFILE, why.to_string()))?;
        let disk = open_disk(host, Formats::shipped(), VbdId(u32::from(self.minor)), &spec, &options).await;
        let disk = Rc::new(disk.map_err(|error| refused(&error))?);
        disk.slot().watch(settings.watchdog_ns());
        self.tell_of_hangs(settings, &disk);
        let durable = make_durable(settings, host, (&spec, &options), disk.node(), false).await;
        if let Err(error) = durable {
            // Nothing was written.
            let _nothing_lost = disk.close().await;
            return Err(refused(&error));
        }
        listed.fill(&name, &disk);
        let node = tuning.disk(&spec, disk.node());
        let exported = self.export(settings, Rc::clone(&node), !options.write).await;
        let (server, served) = match exported {
            Ok(exported) => exported,
            Err(why) => {
                // Nothing was written: what an error of the close could lose is not there.
                let _nothing_lost = disk.close().await;
                return Err(why);
            }
        };
        let file = Cell::new(file_of(host, &name).await);
        Ok(Open {
            files: host.clone(),
            options,
            name: RefCell::new(name),
            stage: Cell::new(Stage::Running),
            file,
            disk,
            node,
            guests: RefCell::default(),
            listed: RefCell::new(listed),
            server,
            served: RefCell::new(Some(served)),
        })
    }

    /// Serves `node` over NBD.
    async fn export(
        self: &Rc<Self>,
        settings: &Settings<H>,
        node: Rc<dyn Node>,
        read_only: bool,
    ) -> Result<(Server<H>, Receiver<()>), Refusal> {
        let (host, minor) = (&settings.host, self.minor);
        let export = Export { name: String::new(), description: format!("minor {minor}"), node, read_only };
        let limits = ServerLimits { connections: settings.connections(), ..settings.tuning.server };
        let server = Server::new(host.clone(), vec![export], limits, &settings.memory);
        let server = server.map_err(|why| Refusal::new(Errno::ENOMEM, why.to_string()))?;
        server.name_disk(VbdId(u32::from(minor)));
        self.tell_of_clients(settings, &server);
        let path = settings.nbd_socket(minor);
        let listener = host.listen_private(&path).await.map_err(|error| {
            let address = SocketAddress::Unix(path);
            Refusal::new(error, format!("open minor {minor}: listen at {address}: {error}"))
        })?;
        let own = server.clone();
        let (task, served) = joined(async move { own.serve(listener).await });
        host.spawn("nbd socket", u64::from(minor), task);
        Ok((server, served))
    }

    /// Lets no more requests through, and closes the image.
    pub(super) async fn pause(&self, settings: &Settings<H>) -> Result<(), Refusal> {
        let what = format!("pause minor {}", self.minor);
        let open = self.opened(&what)?;
        if open.stage.get() != Stage::Running {
            return Ok(());
        }
        if unless(settings.until_late(), self.end_job(settings)).await.is_none() {
            let seconds = settings.pause_limit_s();
            let words = format!("{what}: its merge did not end within {seconds} s; it goes on");
            return Err(Refusal::new(Errno::ETIMEDOUT, words));
        }
        self.park_for(settings, &open).await
    }

    /// Lets no more requests through, and closes the image of a disk that runs.
    async fn park_for(&self, settings: &Settings<H>, open: &Open<H>) -> Result<(), Refusal> {
        let what = format!("pause minor {}", self.minor);
        open.stage.set(Stage::Pausing);
        self.tell(settings, Happened::Pausing);
        let parked = open.disk.park(settings.until_late()).await;
        open.stage.set(if parked.is_ok() { Stage::Paused } else { Stage::Running });
        self.tell(settings, if parked.is_ok() { Happened::Paused } else { Happened::Unpaused });
        match parked {
            Ok(Ok(())) => Ok(()),
            // Everything was made durable before.
            Ok(Err(error)) => {
                let words =
                    format!("{what}: close {}: {error}; it is paused nevertheless", open.name.borrow());
                settings.console.err(&format!("tapdisk: failed to {words}"));
                Ok(())
            }
            Err(ParkError::Late) => {
                let seconds = settings.pause_limit_s();
                let words = format!("{what}: its requests did not end within {seconds} s; it goes on");
                Err(Refusal::new(Errno::ETIMEDOUT, words))
            }
            Err(ParkError::Flush(error)) => {
                Err(Refusal::new(error, format!("{what}: flush it: {error}; it goes on")))
            }
            Err(ParkError::Closed) => Err(Refusal::new(Errno::ESHUTDOWN, format!("{what}: it is closed"))),
        }
    }

    /// Opens the image again, or another one, and lets requests through.
    pub(super) async fn resume(&self, settings: &Settings<H>, params: &Params) -> Result<(), Refusal> {
        let what = format!("resume minor {}", self.minor);
        let open = self.opened(&what)?;
        if open.stage.get() == Stage::Running {
            return Err(Refusal::new(Errno::EINVAL, format!("{what}: it is not paused")));
        }
        let asked = Asked::of(params, &what)?;
        let old = open.name.borrow().clone();
        let name = if asked.name.is_empty() { old.clone() } else { asked.name };
        let Err(why) = self.resume_with(settings, &open, &name, &what, &open.options).await else {
            if name != old {
                settings.host.mark(&RESUMED_ELSEWHERE);
            }
            return Ok(());
        };
        let moved = name != old && !settings.host.bug(&RESUMED_BY_NAME) && {
            let file = open.file.get();
            file.is_some() && file_of(&open.files, &old).await != file
        };
        let back = match name == old || moved {
            true => Err(why.clone()),
            false => self.resume_with(settings, &open, &old, &what, &open.options).await,
        };
        let Err(second) = back else {
            settings.host.mark(&RESUME_REFUSED);
            return Err(Refusal::new(why.error, format!("{}; it goes on with {old}", why.words)));
        };
        settings.host.mark(&RESUME_FAILED);
        open.stage.set(Stage::Stranded);
        self.tell(settings, Happened::Stranded);
        if settings.host.bug(&RESUMED_WITHOUT) {
            let _closed = open.disk.slot().resume();
        }
        let words = match name == old {
            true => format!("{}; it stays paused", why.words),
            false if moved => format!("{}; it stays paused, because {old} is another file now", why.words),
            false => {
                format!("{}; it stays paused, because {old} cannot be opened: {}", why.words, second.error)
            }
        };
        Err(Refusal::new(why.error, words))
    }

    async fn resume_with(
        &self,
        settings: &Settings<H>,
        open: &Open<H>,
        name: &str,
        what: &str,
        options: &DiskOptions,
    ) -> Result<(), Refusal> {
        let spec = spec_of(name, what)?;
        let files = open.files_to_resume(settings);
        let node = open_node(&files, Formats::shipped(), &spec, options).await;
        let node = node.map_err(|error| refused(&error))?;
        let elsewhere = *open.name.borrow() != name;
        let durable =
            make_durable(settings, &files, (&spec, &open.options), Rc::clone(&node), elsewhere).await;
        let fit = match durable {
            Err(error) => {
                let _unused = node.close().await;
                return Err(refused(&error));
            }
            Ok(_) if elsewhere => open.disk.fit(Rc::clone(&node)),
            Ok(is_durable) => open.fit_own(settings, Rc::clone(&node), is_durable),
        };
        let fit = match fit {
            Ok(fit) => fit,
            Err(why) => {
                // It was only looked at.
                let _unused = node.close().await;
                let words = format!("{what}: {name} cannot stand in for the disk's image: {why}");
                return Err(Refusal::new(Errno::EMEDIUMTYPE, words));
            }
        };
        if let Err(error) = open.disk.unpark(fit).await {
            let _unused = node.close().await;
            return Err(Refusal::new(Errno::ESHUTDOWN, format!("{what}: {error}")));
        }
        open.stage.set(Stage::Running);
        open.file.set(file_of(&files, name).await);
        if !settings.host.bug(&RESUME_KEEPS_NAME) {
            name.clone_into(&mut open.name.borrow_mut());
        }
        open.listed.borrow_mut().fill(name, &open.disk);
        self.tell(settings, Happened::Resumed);
        Ok(())
    }

    /// Stops serving the image and closes it. If that is forced, or it is paused, its clients lose their connections at
    /// once, and nothing that is in flight is answered: they can send it to whoever serves the image next. Guests on
    /// rings do so by themselves.
    pub(super) async fn close(&self, settings: &Settings<H>, why: Closing) -> Result<(), Refusal> {
        let Some(open) = self.open.borrow().clone() else { return Ok(()) };
        let force = why == Closing::Forced;
        match why {
            Closing::Asked => self.unused(settings, &open)?,
            Closing::Forced => self.hang_up(&settings.host),
            Closing::Ending => {}
        }
        self.end_job(settings).await;
        if why == Closing::Asked {
            // One may have come meanwhile.
            self.unused(settings, &open)?;
        }
        let paused = open.stage.replace(Stage::Closing) != Stage::Running;
        open.leave_guests(&settings.host, force || paused);
        self.tell(settings, Happened::Closing);
        if paused {
            settings.host.mark(&CLOSED_PAUSED);
        }
        let waits = !force && (!paused || settings.host.bug(&PAUSED_CLOSE_WAITS));
        let closed = if waits {
            open.server.stop().await;
            open.guests_gone().await;
            open.disk.close().await
        } else {
            // Before the disk is closed: requests that are held fail then.
            if !settings.host.bug(&PAUSED_CLOSE_ANSWERS) {
                open.server.hang_up();
            }
            let closed = open.disk.close().await;
            open.server.stop().await;
            open.guests_gone().await;
            closed
        };
        let served = open.served.take();
        if let Some(served) = served {
            served.await;
        }
        self.open.take();
        self.tell(settings, Happened::Closed);
        closed.map_err(|error| {
            let name = open.name.borrow();
            let words = format!("close {name}: {error}; data written since the last flush may be lost");
            Refusal::new(error, words)
        })
    }

    fn state(&self, open: Option<&Rc<Open<H>>>) -> json::State {
        match open.map(|open| open.stage.get()) {
            None if self.was_open.get() => json::State::Closed,
            None => json::State::Attached,
            Some(Stage::Running) => json::State::Running,
            Some(Stage::Pausing) => json::State::Pausing,
            Some(Stage::Paused) => json::State::Paused,
            Some(Stage::Stranded) => json::State::Stranded,
            Some(Stage::Closing) => json::State::Closing,
        }
    }

    /// Its place in a list in JSON.
    pub(super) fn listed(&self, host: &H) -> json::Disk {
        let open = self.open.borrow();
        let open = open.as_ref();
        let state = match self.state(open) {
            json::State::Paused if host.bug(&PAUSED_UNSAID) => json::State::Running,
            state => state,
        };
        let info = open.map(|open| open.disk.slot().info());
        json::Disk {
            minor: self.minor,
            allocation: self.allocation.clone(),
            state,
            image: open.map(|open| open.name.borrow().clone()),
            size_sectors: info.map(|info| info.size_sectors),
            read_only: info.map(|info| info.read_only),
            in_flight: open.map_or(0, |open| open.disk.slot().in_flight() as u64),
            waiting: open.map_or(0, |open| open.disk.slot().waiting() as u64),
            nbd_clients: open.map_or(0, |open| open.server.connections() as u64),
            ionice: open.and_then(|open| open.ionice()),
            guests: open.map_or_else(Vec::new, |open| open.listed_guests()),
        }
    }
}

const PAUSED: i32 = state::PAUSED | state::QUIESCED | state::CLOSED;

/// The file that the image called `name` has now; `None` if it has none, or it cannot be looked at.
async fn file_of<H: ControlledHost>(host: &H, name: &str) -> Option<FileId> {
    let Ok(DiskSpec::Image(image)) = name.parse() else { return None };
    let file = host.open(&image.path, OpenMode::READ).await.ok()?;
    file.info().await.ok().map(|info| info.id)
}

/// Makes an image that is to be served durable, with its name: it takes the place of one whose guest has flushed, or
/// holds what its guest will flush. One that takes the place of another (`elsewhere`) must be; the disk's own is
/// served all the same, and the result says whether it is durable itself. Who copied or renamed it may not have done
/// that, or have been killed before.
async fn make_durable<H: ControlledHost>(
    settings: &Settings<H>,
    host: &H,
    (spec, options): (&DiskSpec, &DiskOptions),
    node: Rc<dyn Node>,
    elsewhere: bool,
) -> Result<bool, OpenError> {
    let own = match spec {
        DiskSpec::Image(image) => Some(&image.path),
        // All images of a graph are below its disk.
        DiskSpec::Mason { .. } => None,
        DiskSpec::Nbd { .. } => return Ok(true),
    };
    if !options.write {
        return Ok(true);
    }
    let mut is_durable = true;
    if !host.bug(&COPY_TAKEN_AS_IS)
        && let Err(error) = node.submit(Request::flush()).await.result
    {
        let path = own.cloned().unwrap_or_else(|| spec.to_string());
        if elsewhere {
            return Err(ImageError::Io { action: "synchronise", path, error }.into());
        }
        // What was lost before fails the flushes of its guest, too.
        settings.console.err(&format!("tapdisk: failed to synchronise {path}: {error}; it is served"));
        is_durable = false;
    }
    // Those of a graph may be new; those below an image were there when it was made.
    let mut names: Vec<String> = Vec::new();
    if !host.bug(&CHAIN_TAKEN_AS_IS) {
        for (_, below) in nodes(node) {
            let is_own = |name: &tap_core::NodeName| own.is_some_and(|own| name.as_str() == own);
            let Some(name) = below.name().filter(|name| !is_own(name)) else { continue };
            // It is open for reading only, and whoever wrote to it last may have been killed.
            match sync_file(host, name.as_str()).await {
                Err(error) if elsewhere => return Err(error.into()),
                Err(error) => settings.console.err(&format!("tapdisk: failed to {error}; it is served")),
                Ok(()) if own.is_none() => names.push(name.to_string()),
                Ok(()) => {}
            }
        }
    }
    if !host.bug(&NAME_TAKEN_AS_IS) {
        for name in own.into_iter().chain(&names) {
            sync_name(host, name).await?;
        }
    }
    Ok(is_durable)
}

fn refused(error: &OpenError) -> Refusal {
    Refusal::new(error.errno().unwrap_or(Errno::EIO), error.to_string())
}
