//! The minor numbers of a process, and what is asked of them.

use super::metrics;
use super::settings::Settings;
use super::vbd::guests::{Wanted, id_of, not_connected};
use super::vbd::{Closing, Merging, Names, Vbd};
use super::{ControlArgs, ControlledHost};
use crate::ctl::{allocation_of, is_named, marker_of};
use crate::{Console, Tuning};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use tap_abi::tapctl::{ALL, Kind, Message, Minors, Params, PidOf};
use tap_control::{Answer, Refusal, Verbs, json};
use tap_core::Disks;
use tap_core::wait::{Event as Flag, Permit, joined};
use tap_host::{Budget, DomId, Either, Errno, File, GrantRef, LockKind, OpenMode, Port, VbdId, select};

tap_host::listed! {
    pub(super) BUGS: Bug;
    DETACHED_OPEN = "detached-open", "a minor number is given up although its disk is open";
    TURN_UNCHECKED = "turn-unchecked", "a disk is opened at a minor number that was given up while the request waited";
    ATTACHED_UNMARKED = "attached-unmarked", "a minor number is taken although another process has it";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    LAST_DETACHED = "last-detached", "a controlled tapdisk ended with its last minor number";
    MINOR_TAKEN = "minor-taken", "a minor number was refused because another process has it";
    DETACH_BUSY = "detach-busy", "a minor number was not given up because its disk was open";
}

/// Limit of minor numbers that one process has.
const MINORS_MAX: usize = 1024;

/// The minor numbers of a process.
pub(super) struct Vbds<H: ControlledHost> {
    settings: Rc<Settings<H>>,
    /// `None` while one is being taken.
    all: RefCell<BTreeMap<u16, Option<Rc<Vbd<H>>>>>,
    /// It has had one.
    had: Cell<bool>,
    /// Set once the last one was given up, or the process was told that it gets none.
    ended: Flag,
    /// All disks are closed, and none is opened any more.
    ending: Cell<bool>,
}

impl<H: ControlledHost> Vbds<H> {
    pub(super) fn new(
        host: H,
        args: ControlArgs,
        memory: Budget,
        tuning: Tuning,
        disks: Disks<H>,
        console: Rc<dyn Console>,
    ) -> Self {
        let feed = json::Feed::new(host.clone(), tuning.events_kept);
        let settings = Rc::new(Settings { host, tuning, disks, feed, console, memory, args });
        let (had, ending) = (Cell::new(false), Cell::new(false));
        Self { settings, all: RefCell::default(), had, ended: Flag::new(), ending }
    }

    /// Completes once a minor number was given up and none is left.
    pub(super) async fn last_detached(&self) {
        self.ended.wait().await;
    }

    /// Closes all disks, each beside the others; returns what could not be done.
    pub(super) async fn close_all(&self) -> Vec<String> {
        self.ending.set(true);
        let host = &self.settings.host;
        let mut closing = Vec::new();
        for vbd in self.attached() {
            let (minor, settings) = (u64::from(vbd.minor()), Rc::clone(&self.settings));
            let (task, closed) = joined(async move {
                let _turn = vbd.turn.acquire().await;
                vbd.close(&settings, Closing::Ending).await
            });
            host.spawn("close", minor, task);
            closing.push(closed);
        }
        let closed = async {
            let mut failures = Vec::new();
            for closed in closing {
                // One without an answer ends only with the process.
                failures.extend(closed.await.and_then(Result::err).map(|why| why.words));
            }
            failures
        };
        let late = async {
            self.settings.until_late().await;
            for vbd in self.attached().into_iter().filter(|vbd| vbd.is_open()) {
                let text = "its storage does not answer; a second SIGTERM ends the process without it";
                let minor = vbd.minor();
                self.settings.console.err(&format!("tapdisk: minor {minor} is not closed yet: {text}"));
            }
            std::future::pending().await
        };
        match select(closed, late).await {
            Either::First(failures) | Either::Second(failures) => failures,
        }
    }

    fn get(&self, minor: u16, what: &str) -> Result<Rc<Vbd<H>>, Refusal> {
        let vbd = self.all.borrow().get(&minor).cloned().flatten();
        vbd.ok_or_else(|| {
            let words = format!("{what} minor {minor}: this tapdisk has not attached it");
            Refusal::new(Errno::ENODEV, words)
        })
    }

    /// The same, once the requests about it that came before have been carried out.
    async fn turn(&self, minor: u16, what: &str) -> Result<(Rc<Vbd<H>>, Permit), Refusal> {
        let vbd = self.get(minor, what)?;
        if vbd.closes_late() {
            let words = format!("{what} minor {minor}: its close was forced, and waits for its storage");
            return Err(Refusal::new(Errno::EBUSY, words));
        }
        let turn = vbd.turn.acquire().await;
        if self.ending.get() {
            return Err(Refusal::new(Errno::ESHUTDOWN, format!("{what} minor {minor}: the tapdisk ends")));
        }
        // One of them may have given it up.
        if self.settings.host.bug(&TURN_UNCHECKED) || Rc::ptr_eq(&vbd, &self.get(minor, what)?) {
            return Ok((vbd, turn));
        }
        Err(Refusal::new(Errno::ENODEV, format!("{what} minor {minor}: it was detached meanwhile")))
    }

    async fn attach(&self, minor: u16) -> Result<(), Refusal> {
        let what = format!("attach minor {minor}");
        if self.ending.get() {
            return Err(Refusal::new(Errno::ESHUTDOWN, format!("{what}: the tapdisk ends")));
        }
        if self.all.borrow().contains_key(&minor) {
            return Err(Refusal::new(Errno::EEXIST, format!("{what}: this tapdisk has it already")));
        }
        if minor == ALL || self.all.borrow().len() >= MINORS_MAX {
            let words = format!("{what}: the process already has {MINORS_MAX}; start another one");
            return Err(Refusal::new(Errno::ENOSPC, words));
        }
        self.all.borrow_mut().insert(minor, None);
        let marker = self.mark(minor, &what).await;
        let mut all = self.all.borrow_mut();
        match marker {
            Ok((marker, allocation)) => {
                let vbd = Rc::new(Vbd::new(minor, marker, allocation));
                all.insert(minor, Some(Rc::clone(&vbd)));
                vbd.tell(&self.settings, json::Happened::Attached);
                self.had.set(true);
                Ok(())
            }
            Err(why) => {
                all.remove(&minor);
                drop(all);
                self.end_if_last();
                Err(why)
            }
        }
    }

    /// Ends the process if it had minor numbers and none is left, or on its way.
    fn end_if_last(&self) {
        if self.had.get() && self.all.borrow().is_empty() {
            self.settings.host.mark(&LAST_DETACHED);
            self.ended.set();
        }
    }

    /// Locks the file that says that a minor number is in use, and returns which allocation of the number that is.
    async fn mark(&self, minor: u16, what: &str) -> Result<(H::File, String), Refusal> {
        let host = &self.settings.host;
        let path = marker_of(&self.settings.args.folder, minor);
        let refusal =
            |error: Errno, hint: &str| Refusal::new(error, format!("{what}: {path}: {error}{hint}"));
        let file = host.open(&path, OpenMode::WRITE).await.map_err(|error| {
            refusal(
                error,
                if error == Errno::ENOENT { "; allocate it first, by tap-ctl allocate" } else { "" },
            )
        })?;
        match file.lock(LockKind::Sole).await {
            Err(_) if host.bug(&ATTACHED_UNMARKED) => {}
            Err(Errno::EAGAIN) => {
                host.mark(&MINOR_TAKEN);
                return Err(refusal(Errno::EBUSY, "; another tapdisk has it"));
            }
            locked => locked.map_err(|error| refusal(error, ""))?,
        }
        // Freed between the two calls, it may be somebody else's by now.
        match is_named(host, &path, &file).await {
            Ok(true) => {
                let info = file.info().await.map_err(|error| refusal(error, ""))?;
                Ok((file, allocation_of(info.id)))
            }
            Ok(false) => Err(refusal(Errno::ENOENT, "; it was freed meanwhile")),
            Err(error) => Err(refusal(error, "")),
        }
    }

    async fn detach(&self, minor: u16) -> Result<(), Refusal> {
        let (vbd, _turn) = self.turn(minor, "detach").await?;
        if vbd.is_open() && !self.settings.host.bug(&DETACHED_OPEN) {
            self.settings.host.mark(&DETACH_BUSY);
            let words = format!("detach minor {minor}: it has an image open; close it first");
            return Err(Refusal::new(Errno::EBUSY, words));
        }
        self.all.borrow_mut().remove(&minor);
        self.settings.feed.tell(json::Happened::Detached, minor, None, None);
        vbd.unmark(&self.settings.host).await;
        self.end_if_last();
        Ok(())
    }

    fn exit(&self) -> Result<(), Refusal> {
        let minors = self.all.borrow().len();
        if minors > 0 {
            return Err(Refusal::new(
                Errno::EBUSY,
                format!("end: it has {minors} minor numbers; detach them"),
            ));
        }
        self.ended.set();
        Ok(())
    }

    async fn outcome(&self, kind: Kind, message: &Message) -> Result<Answer, Refusal> {
        let (minor, settings) = (message.cookie(), &self.settings);
        let done = |kind: Kind| Message::new(kind.answer().expect("a request has an answer"), minor).into();
        match kind {
            Kind::Pid => {
                let pid = PidOf { pid: settings.host.process_id().cast_signed().into() };
                Ok(Message::with(Kind::PidRsp, minor, &pid).into())
            }
            Kind::List => Ok(Answer::list(self.attached().iter().map(|vbd| vbd.entry()).collect())),
            Kind::ListMinors => Ok(Message::with(Kind::ListMinorsRsp, minor, &self.minors()).into()),
            Kind::Exit => self.exit().map(|()| Answer::nothing()),
            Kind::Attach => self.attach(minor).await.map(|()| done(kind)),
            Kind::Detach => self.detach(minor).await.map(|()| done(kind)),
            Kind::Stats => {
                let stats = self.get(minor, "count what")?.stats()?;
                let text = serde_json::to_string(&stats).expect("maps have texts as keys");
                Ok(Answer::text(minor, text))
            }
            Kind::DiskInfo => {
                let image = self.get(minor, "describe")?.image()?;
                Ok(Message::with(Kind::DiskInfoRsp, minor, &image).into())
            }
            Kind::Open => {
                let (vbd, _turn) = self.turn(minor, "open").await?;
                let params: Params = message.body();
                if params.req_timeout_s.get() != 0 {
                    let text =
                        "warning: requests have no time limit here; that of tap-ctl (-t) has no effect";
                    settings.console.err(&format!("tapdisk: {text}"));
                }
                let image = vbd.open(settings, &params).await?;
                Ok(Message::with(Kind::OpenRsp, minor, &image).into())
            }
            Kind::Close => {
                let (vbd, _turn) = self.turn(minor, "close").await?;
                vbd.close(settings, Closing::Asked).await.map(|()| done(kind))
            }
            // Not in its turn: what came before may wait for storage.
            Kind::ForceShutdown => {
                self.get(minor, "close")?.close_at_once(settings).await.map(|()| done(kind))
            }
            Kind::Pause => {
                let (vbd, _turn) = self.turn(minor, "pause").await?;
                vbd.pause(settings).await.map(|()| done(kind))
            }
            Kind::Resume => {
                let (vbd, _turn) = self.turn(minor, "resume").await?;
                vbd.resume(settings, &message.body()).await.map(|()| done(kind))
            }
            Kind::XenblkifConnect => {
                self.connect(minor, &Wanted::of(&message.body())?, None).map(|_| done(kind))
            }
            // Not in its turn, because it waits for requests of the guest; by the guest, because others do not say the
            // minor number.
            Kind::XenblkifDisconnect => {
                let id = id_of(&message.body(), "disconnect a guest")?;
                let vbd = self.attached().into_iter().find(|vbd| vbd.has_guest(id));
                let vbd = vbd.ok_or_else(|| not_connected(id))?;
                vbd.disconnect(settings, id).await.map(|()| done(kind))
            }
            other => {
                let words = format!("carry out {other:?}: this tapdisk cannot do that");
                Err(Refusal::new(Errno::EOPNOTSUPP, words))
            }
        }
    }

    /// At once: whoever asks and does not wait for the answer knows that a later request comes later.
    fn connect(&self, minor: u16, wanted: &Wanted, allocation: Option<&str>) -> Result<json::Guest, Refusal> {
        let vbd = self.get(minor, "connect a guest to")?;
        if allocation.is_some_and(|known| known != vbd.allocation) {
            let words = format!(
                "connect a guest to minor {minor}: the number was freed since the guest got its disk, and is another \
                 disk's"
            );
            return Err(Refusal::new(Errno::EMEDIUMTYPE, words));
        }
        if self.ending.get() || vbd.closes_late() {
            let words = format!("connect a guest to minor {minor}: it is being closed");
            return Err(Refusal::new(Errno::ESHUTDOWN, words));
        }
        vbd.connect(&self.settings, wanted)
    }

    /// What a request in JSON is answered with.
    async fn reply(&self, request: json::Request) -> Result<json::Reply, Refusal> {
        match request {
            json::Request::List {} => Ok(json::Reply::List(json::Disks { disks: self.listed() })),
            json::Request::Snapshot { minor, keep, image } => {
                let names = match (keep, image) {
                    (Some(path), None) => Names::Keep(path),
                    (None, Some(image)) => Names::New(image),
                    _ => {
                        let words = format!("take a snapshot of minor {minor}: give one of keep and image");
                        return Err(Refusal::new(Errno::EINVAL, words));
                    }
                };
                let (vbd, _turn) = self.turn(minor, "take a snapshot of").await?;
                vbd.snapshot(&self.settings, &names).await.map(json::Reply::Snapshot)
            }
            json::Request::Commit { minor, image, base, rate } => {
                let (vbd, _turn) = self.turn(minor, "merge an image below").await?;
                let asked = Merging { image, base, rate };
                vbd.commit(&self.settings, &asked).await.map(json::Reply::Job)
            }
            json::Request::Query { minor } => {
                self.get(minor, "query the merge below")?.query().map(json::Reply::Job)
            }
            // Not in its turn: the merge itself may wait for that.
            json::Request::Cancel { minor } => {
                let vbd = self.get(minor, "end the merge below")?;
                vbd.cancel(&self.settings).await.map(json::Reply::Job)
            }
            json::Request::Resize { minor, size_bytes } => {
                let (vbd, _turn) = self.turn(minor, "resize").await?;
                vbd.resize(&self.settings, size_bytes).await.map(json::Reply::Resized)
            }
            json::Request::Set { minor, ionice } => {
                let (vbd, _turn) = self.turn(minor, "set the priority of").await?;
                vbd.set(&self.settings, ionice.as_deref()).await.map(json::Reply::Set)
            }
            json::Request::Connect {
                minor,
                domid,
                devid,
                ring_ref,
                port,
                allocation,
                size_sectors,
                read_only,
            } => {
                let id = (DomId(domid), VbdId(devid));
                let (ring_ref, port) = (GrantRef(ring_ref), Port(port));
                let wanted = Wanted { id, ring_ref, port, size_sectors: Some(size_sectors), read_only };
                self.connect(minor, &wanted, allocation.as_deref()).map(json::Reply::Guest)
            }
            json::Request::Stats { minor } => {
                let disks = match minor {
                    Some(minor) => vec![self.get(minor, "count what")?.stats()?],
                    None => self.counted(),
                };
                Ok(json::Reply::Stats(json::Disks { disks }))
            }
            json::Request::Metrics {} => {
                let text = metrics::exposition(&self.settings.host, &self.listed(), &self.counted());
                Ok(json::Reply::Metrics(json::Metrics { text }))
            }
            json::Request::Events {} => unreachable!("events have no single answer"),
        }
    }

    fn listed(&self) -> Vec<json::Disk> {
        self.attached().iter().map(|vbd| vbd.listed(&self.settings.host)).collect()
    }

    /// The counters of those that are open; others have none.
    fn counted(&self) -> Vec<json::Stats> {
        self.attached().iter().filter_map(|vbd| vbd.stats().ok()).collect()
    }

    fn attached(&self) -> Vec<Rc<Vbd<H>>> {
        self.all.borrow().values().flatten().cloned().collect()
    }

    /// The first minor numbers, as many as a message has room for.
    fn minors(&self) -> Minors {
        let mut minors = Minors::default();
        let mut count = 0;
        for (place, vbd) in minors.list.iter_mut().zip(self.attached()) {
            *place = i32::from(vbd.minor()).into();
            count += 1;
        }
        Minors { count: count.into(), ..minors }
    }
}

impl<H: ControlledHost> Verbs for Vbds<H> {
    async fn carry_out(&self, kind: Kind, message: Message) -> Answer {
        match self.outcome(kind, &message).await {
            Ok(answer) => answer,
            Err(Refusal { error, words }) => {
                self.settings.console.err(&format!("tapdisk: failed to {words}"));
                Message::error(message.cookie(), error.0, &words).into()
            }
        }
    }
}

impl<H: ControlledHost> json::Verbs<H> for Vbds<H> {
    async fn carry_out(&self, request: json::Request) -> Result<json::Reply, Refusal> {
        let outcome = self.reply(request).await;
        if let Err(why) = &outcome {
            self.settings.console.err(&format!("tapdisk: failed to {}", why.words));
        }
        outcome
    }

    fn feed(&self) -> &json::Feed<H> {
        &self.settings.feed
    }

    fn present(&self) -> Vec<json::Standing> {
        self.attached().iter().map(|vbd| vbd.standing(&self.settings.host)).collect()
    }
}
