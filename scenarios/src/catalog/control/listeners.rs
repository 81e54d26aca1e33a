//! Clients that listen for events at the JSON socket, beside everything else; they share no code with ours.
//!
//! Whoever applies the events to the first state has what a list shows in the end. No number is missing, unless that
//! was said. Nobody waits for a listener that rests, and nothing is left of one that hangs up.

use super::admin::{Admin, Tapdisk};
use crate::check::Invariant;
use crate::guest::RawNbd;
use crate::world::World;
use clap::Parser as _;
use kernel_model::SimHost;
use serde_json::Value;
use sim::{Entity, Label};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use tap_control::{FOLDER, json_socket_of};
use tap_core::wait::{Event, Receiver, joined};
use tap_host::{Errno, IoBuf, SocketAddress, Sockets, Stream, Tasks, select, unless};
use tap_programs::Console;
use tap_programs::ctl::{Cli, run};

/// What a listener does: which kind, and for how long it rests in 24 bits of nanoseconds.
pub static LISTENS: Label = Label::packed(
    "control-listens",
    "listener {n} is of the kind (0: there is none), and rests for so many ns ({})",
    &[3, 24],
);

/// Listeners of a life of tapdisk, at most.
pub(super) const LISTENERS: u32 = 2;
/// How often an administrator looks whether the listeners know what a list shows, at most.
pub(super) const LOOKS: u32 = 40;
/// How long it waits before it looks again, in nanoseconds.
pub(super) const AGAIN_NS: u64 = 25_000_000;
pub(super) const EVENTS: &[u8] = b"{\"verb\":\"events\"}\n";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Reads whatever arrives.
    Reads,
    /// Rests before it reads again.
    Rests,
    /// Reads for a while, and hangs up.
    HangsUp,
    /// tap-ctl, about one tapdisk.
    Ctl,
    /// tap-ctl, about all.
    CtlOfAll,
}

/// What a listener knows.
#[derive(Default)]
struct View {
    disks: BTreeMap<u64, Value>,
    /// The number of the last event that it knows of.
    seq: Option<u64>,
    ns: u64,
    /// It was told that events are lost, and must get the state next.
    lost: bool,
}

/// The states that an event may leave a disk in; none, if it says nothing about it.
fn states_of(event: &str) -> Option<&'static [&'static str]> {
    Some(match event {
        "attached" => &["attached"],
        "opened" | "resumed" | "unpaused" | "snapshot" | "resized" => &["running"],
        "pausing" => &["pausing"],
        "paused" => &["paused"],
        "stranded" => &["stranded"],
        "closing" => &["closing"],
        "closed" => &["closed"],
        "clients" => &["running", "pausing", "paused", "stranded", "closing"],
        "set" => &["running", "paused", "stranded"],
        "hangs" | "hung" => &[],
        _ => return None,
    })
}

impl View {
    /// Applies a line.
    fn hear(&mut self, line: &Value) -> Option<()> {
        let (seq, ns, event) = (line["seq"].as_u64()?, line["ns"].as_u64()?, line["event"].as_str()?);
        if ns < self.ns {
            return None;
        }
        self.ns = ns;
        let was_lost = std::mem::take(&mut self.lost);
        match (event, self.seq) {
            ("state", known) if known.is_none() || (was_lost && known == Some(seq)) => {
                let minor = |disk: &Value| Some((disk["minor"].as_u64()?, disk.clone()));
                self.disks = line["disks"].as_array()?.iter().map(minor).collect::<Option<_>>()?;
            }
            _ if was_lost => return None,
            ("lost", Some(known)) => {
                let lost = line["lost"].as_u64().filter(|lost| *lost > 0 && known + lost == seq);
                self.lost = lost.is_some();
                lost?;
            }
            (event, Some(known)) if seq == known + 1 => {
                let minor = line["minor"].as_u64()?;
                if event == "detached" {
                    self.disks.remove(&minor)?;
                } else if let states @ [_, ..] = states_of(event)? {
                    let disk = &line["disk"];
                    let right = disk["minor"] == minor && states.iter().any(|state| disk["state"] == *state);
                    self.disks.insert(minor, right.then(|| disk.clone())?);
                }
            }
            _ => return None,
        }
        self.seq = Some(seq);
        Some(())
    }
}

/// A listener.
pub(super) struct Listener {
    kind: Kind,
    entity: Entity,
    rest_ns: u64,
    view: RefCell<View>,
    /// It hears no more.
    over: Cell<bool>,
    /// The tapdisk ended its stream in order.
    ended: Cell<bool>,
    /// It rests no more.
    hurries: Event,
    world: World,
    pid: u32,
}

impl Listener {
    /// Whether it knows these disks, or nothing yet.
    pub(super) fn knows(&self, disks: &BTreeMap<u64, Value>) -> bool {
        let view = self.view.borrow();
        view.seq.is_none() || view.disks == *disks
    }

    /// What it knows, in words.
    pub(super) fn known(&self) -> String {
        format!("{:?}", self.view.borrow().disks)
    }

    fn hear(&self, text: &[u8]) {
        let line = serde_json::from_slice::<Value>(text).unwrap_or(Value::Null);
        if line["pid"].as_u64().is_some_and(|pid| pid != u64::from(self.pid)) {
            return;
        }
        if line["error"]["errno"] == Errno::EAGAIN.0 {
            // Others were faster.
            return self.over.set(true);
        }
        let known = self.view.borrow().seq;
        if self.view.borrow_mut().hear(&line).is_none() {
            let text = String::from_utf8_lossy(text);
            self.world.fail(Invariant::U1, format!("who listens and knows event {known:?} was told {text}"));
        }
    }

    async fn rest(&self) {
        select(self.world.sim.sleep_ns(self.rest_ns), self.hurries.wait()).await;
    }

    /// As a client of its own.
    async fn listen(&self, host: SimHost) {
        let Ok(stream) = host.connect(&SocketAddress::Unix(json_socket_of(FOLDER, self.pid))).await else {
            return;
        };
        if RawNbd::new(stream.clone()).send(EVENTS).await.is_err() {
            return;
        }
        let heard = async {
            let mut ahead = Vec::new();
            while let Ok(buf) = IoBuf::unpooled(1 << 10) {
                if self.kind == Kind::Rests {
                    self.rest().await;
                }
                let (count, buf) = stream.recv(buf, 0).await;
                let Ok(count) = count else { return };
                if count == 0 {
                    self.ended.set(ahead.is_empty());
                    return;
                }
                ahead.extend_from_slice(&buf[..count]);
                while let Some(end) = ahead.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = ahead.drain(..=end).collect();
                    self.hear(&line);
                }
            }
        };
        match self.kind {
            Kind::HangsUp => _ = unless(self.world.sim.sleep_ns(self.rest_ns), heard).await,
            _ => heard.await,
        }
    }

    /// By tap-ctl.
    async fn print(self: &Rc<Self>, host: SimHost, admin: &Admin) -> Option<u8> {
        let one = if self.kind == Kind::Ctl { format!("-p {}", self.pid) } else { String::new() };
        let line = format!("tap-ctl events --json {one}");
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap_or_else(|e| panic!("{line}: {e}"));
        let status = run(&host, cli, admin, &Heard(Rc::clone(self))).await;
        self.ended.set(self.kind == Kind::Ctl && status == 0);
        Some(status)
    }
}

/// What tap-ctl prints.
struct Heard(Rc<Listener>);

impl Console for Heard {
    fn out(&self, line: &str) {
        self.0.hear(line.as_bytes());
    }
    fn err(&self, line: &str) {
        self.0.world.sim.remark("listener", || line.to_owned());
    }
    fn progress(&self, _: u64, _: u64) {}
}

/// The listeners of one life of tapdisk.
pub(super) struct Listening {
    all: Vec<(Rc<Listener>, SimHost, Receiver<Option<u8>>)>,
}

impl Listening {
    /// Starts them.
    pub(super) fn start(world: &World, admin: &Rc<Admin>, tapdisk: &Tapdisk, epoch: u32) -> Self {
        let mut all = Vec::new();
        for n in 0..LISTENERS {
            let entity = Entity::WORLD.child("listener", u64::from(epoch << 8 | n));
            world.sim.name_entity(entity, || format!("listener {n}, epoch {epoch}"));
            let value = world.sim.decide(entity, &LISTENS, n, |d| d.below(6) | d.magnitude(24) << 3);
            let kind = match value & 7 {
                0 => continue,
                1 => Kind::Reads,
                2 => Kind::Rests,
                3 => Kind::HangsUp,
                4 => Kind::Ctl,
                _ => Kind::CtlOfAll,
            };
            let listener = Rc::new(Listener {
                kind,
                entity,
                rest_ns: value >> 3,
                view: RefCell::default(),
                over: Cell::new(false),
                ended: Cell::new(false),
                hurries: Event::new(),
                world: world.clone(),
                pid: tapdisk.pid(),
            });
            let host = SimHost::start(&world.kernel, &world.xen, "listener", u64::from(epoch << 8 | n));
            let (own, admin, at) = (Rc::clone(&listener), Rc::clone(admin), host.clone());
            let (task, end) = joined(async move {
                let status = match own.kind {
                    Kind::Ctl | Kind::CtlOfAll => own.print(at, &admin).await,
                    _ => {
                        own.listen(at).await;
                        None
                    }
                };
                own.over.set(true);
                status
            });
            host.spawn("main", 0, task);
            all.push((listener, host, end));
        }
        Self { all }
    }

    /// Those that still listen, and do not rest.
    pub(super) fn awake(&self) -> impl Iterator<Item = &Rc<Listener>> {
        let listeners = self.all.iter().map(|(listener, ..)| listener);
        listeners.filter(|own| !own.over.get() && (own.kind != Kind::Rests || own.hurries.is_set()))
    }

    /// From now on nobody rests.
    pub(super) fn hurry(&self) {
        self.all.iter().for_each(|(listener, ..)| listener.hurries.set());
    }

    /// The tapdisk has ended, by itself (`in_order`) or not: so do they.
    pub(super) async fn end(self, world: &World, in_order: bool) {
        for (listener, host, end) in self.all {
            if !in_order {
                host.process.node().kill();
                continue;
            }
            if listener.kind == Kind::CtlOfAll {
                host.process.ask_to_stop();
            }
            let status = unless(world.sim.sleep_ns(u64::from(LOOKS) * AGAIN_NS), end).await;
            let who = world.sim.name_of(listener.entity);
            let known = listener.view.borrow().disks.len();
            if listener.ended.get() && known > 0 {
                world.fail(Invariant::U1, format!("{who} was told everything, and knows of {known} disks"));
            }
            let status = status.map(Option::flatten);
            if status.is_none() || (listener.kind == Kind::CtlOfAll && status != Some(Some(0))) {
                let text = format!("{who} still listens to a tapdisk that has ended, or failed: {status:?}");
                world.fail(Invariant::U1, text);
            }
            host.process.node().kill();
        }
    }
}
