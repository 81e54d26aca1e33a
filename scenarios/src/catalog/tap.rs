//! Block devices of dom0 through each kind of blktap2 module: `tapdisk attach --via blktap`, the program that ships.
//!
//! ```text
//!   a program of dom0 ─► Gendisk ─► TapModule (one of four) ═ ring ═ tapdisk attach ─► image
//!   a looker opens and closes the device ┘        │                 killed, stopped, asked to close
//!                        another device, and a number that another program has reserved
//! ```
//!
//! Two of the modules are refused, and nothing may be left of the attempt.

use super::crash::arm_power_cut;
use super::ring::{DISK_BYTES, NO_ERRORS, error_policy, kills, with_errors};
use super::setup::{Setup, check_at_rest, cut_after_close, workload};
use crate::check::Invariant;
use crate::formats::Kind;
use crate::front::segment_layout;
use crate::guest::{BlockDisk, ErrorPolicy, Guest, GuestDisk};
use crate::limits::StackLimits;
use crate::program::{Printed, named, option_of, tapdisk};
use crate::scenario::Scenario;
use crate::workload::{Op, Workload, operations};
use crate::world::World;
use kernel_model::faults::FaultPlan;
use kernel_model::gendisk::Gendisk;
use kernel_model::{SimHost, StorageConfig, TapKind, TapModule, TapTrouble};
use sim::{Entity, Label};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_core::CacheMode;
use tap_core::wait::joined;
use tap_host::{SharedPages, TapDevices, select};

/// When another program looks at the device, and for how long, in nanoseconds.
pub static LOOKER: Label =
    Label::packed("looker", "look {n} at the device: after ns, for ns ({})", &[24, 24]);
/// After how many nanoseconds tapdisk is asked to end although the device is in use.
pub static STOP_IN_USE: Label = Label::new("stop-in-use", "tapdisk is asked to end after {} ns");

/// After how many nanoseconds the module is asked to close the device, once nobody uses it any more.
pub static ASK_TO_CLOSE: Label =
    Label::new("ask-to-close", "the module is asked to close the device after {} ns");

/// dom0's device, whatever happens to its tapdisk.
pub static TAP_DEVICE: Scenario = Scenario {
    name: "tap-device",
    about: "a block device of dom0 through every kind of blktap2 module; tapdisk is killed, stopped and asked to close",
    storage: &|sim| with_errors(sim, FaultPlan::LATENCY),
    body: &|w| Box::pin(tap_device(w)),
};

/// The same until the host loses power.
pub static TAP_POWER_CUT: Scenario = Scenario {
    name: "tap-power-cut",
    about: "a block device of dom0 through every kind of blktap2 module, power cut at any host operation",
    storage: &|_| StorageConfig {
        faults: FaultPlan { short: true, transient: true, ..FaultPlan::LATENCY },
        ..StorageConfig::default()
    },
    body: &|w| Box::pin(tap_power_cut(w)),
};

/// Minors of a module: few, so that a leak is noticed.
const MINORS: u32 = 8;
/// The modules that are drawn; those that are refused take a small part of the runs.
const KINDS: [TapKind; 10] = {
    let [xenserver, openxt] = TapKind::SERVED;
    let (dkms, old) = (TapKind::Dkms, TapKind::Xen2009);
    [xenserver, openxt, xenserver, openxt, xenserver, openxt, xenserver, openxt, dkms, old]
};
/// In this time every module has noticed that a device is unused, in nanoseconds.
const NOTICED_NS: u64 = 6_000_000_000;
/// The number of the neighbour's first process; that of the stranger is above.
const NEIGHBOUR: u64 = 100;
/// How long the end of a tapdisk may take, in nanoseconds of virtual time.
const END_NS: u64 = 120_000_000_000;

/// A host with a module, and the disk that its tapdisk serves.
pub(super) struct Dom0 {
    world: World,
    pub(super) module: TapModule,
    setup: Setup,
    pub(super) limits: StackLimits,
    cache: CacheMode,
    starts: Cell<u64>,
    /// Sets how the guest of the moment handles errors: it has to live with the death of tapdisk.
    guest: RefCell<Option<SetPolicy>>,
    deaths: Cell<u32>,
    /// The number that another program has reserved.
    strangers: Cell<Option<u32>>,
    /// The number whose device a module was asked to close that never frees such a number.
    asked: Cell<Option<u32>>,
    /// The last tapdisk has said that closing the disk may have lost data.
    lost: Cell<bool>,
}

/// Changes how a guest handles errors.
type SetPolicy = Box<dyn Fn(ErrorPolicy)>;

/// A tapdisk, and what it prints.
pub(super) struct Attached {
    pub(super) host: SimHost,
    said: Rc<Printed>,
    minor: Cell<Option<u32>>,
}

impl Dom0 {
    /// A host with one of `kinds` of modules.
    pub(super) fn new(world: &World, setup: Setup, kinds: &[TapKind]) -> Rc<Self> {
        let dom0 = Rc::new(Self::drawn(world, setup, kinds));
        let (own, nth) = (Rc::downgrade(&dom0), Cell::new(0_u32));
        dom0.module.on_made(move |disk| {
            let Some(dom0) = own.upgrade() else { return };
            let nth = nth.replace(nth.get() + 1);
            dom0.world.sim.spawn("looker", u64::from(nth), Rc::clone(&dom0).look(disk, nth));
        });
        dom0
    }

    fn drawn(world: &World, setup: Setup, kinds: &[TapKind]) -> Self {
        let kind = world.setting("tap-module", kinds);
        let pages = world.setting("tap-pages", &[704, 22, 33]);
        let module = TapModule::new(&world.sim, kind, MINORS, pages);
        module.set_layout(segment_layout(world));
        let w = world.clone();
        module.on_trouble(move |trouble| {
            let (TapTrouble::Halt(text) | TapTrouble::Fault(text) | TapTrouble::Strayed(text)) = &trouble;
            w.fail(Invariant::X1, format!("the kernel found that tapdisk broke the protocol: {text}"));
        });
        if world.draws_errors() {
            module.allow_errors();
        }
        world.kernel.load_tap(&module);
        Self::with_module(world, setup, module)
    }

    fn with_module(world: &World, setup: Setup, module: TapModule) -> Self {
        Self {
            world: world.clone(),
            module,
            setup,
            limits: StackLimits::draw(world),
            cache: world.setting("program-cache", &[CacheMode::WriteBack, CacheMode::WriteThrough]),
            starts: Cell::new(0),
            guest: RefCell::default(),
            deaths: Cell::new(0),
            strangers: Cell::new(None),
            asked: Cell::new(None),
            lost: Cell::new(false),
        }
    }

    /// What tapdisk ends with if it cannot work with the module: the status and some words.
    fn refusal(&self) -> Option<(u8, &'static str)> {
        match self.module.kind() {
            TapKind::Dkms => Some((95, "it is blktap-dkms")),
            TapKind::Xen2009 => Some((1, "one of Linux 2.6")),
            TapKind::XenServer | TapKind::OpenXt => None,
        }
    }

    /// Another program reserves a number, and a run folder that is older than this boot has pages of ours.
    async fn stranger(&self) {
        if !self.world.setting("tap-stranger", &[false, true]) {
            return;
        }
        let host = SimHost::start(&self.world.kernel, &self.world.xen, "stranger", NEIGHBOUR + 1);
        // There may be no memory for it.
        if let Ok(minor) = host.allocate_tap().await {
            self.strangers.set(Some(minor));
            let _unnamed = host.name_tap(minor, "stranger").await;
        }
        drop(host.own_region("tap-0123456789abcdef0123456789abcdef"));
    }

    /// Starts a tapdisk that attaches the disk; with `kill_after`, it dies after so many effects.
    pub(super) fn start(self: &Rc<Self>, kill_after: Option<u64>) -> Rc<Attached> {
        let world = &self.world;
        let nth = self.starts.replace(self.starts.get() + 1);
        let host = SimHost::start(&world.kernel, &world.xen, "tapdisk", nth);
        let node = host.process.node();
        let (dom0, own) = (Rc::downgrade(self), node.clone());
        // Before the kernel fails what is in flight.
        node.on_death(move || {
            if let Some(dom0) = dom0.upgrade().filter(|_| !own.is_alive()) {
                dom0.died();
            }
        });
        kill_after.into_iter().for_each(|steps| node.kill_after_steps(steps));
        let attached = Rc::new(Attached { host: host.clone(), said: Rc::default(), minor: Cell::new(None) });
        let (dom0, own) = (Rc::clone(self), Rc::clone(&attached));
        node.spawn("main", 0, async move { dom0.program(&own).await });
        attached
    }

    async fn program(&self, attached: &Attached) {
        let (options, cache) = (self.limits.options(), option_of(self.cache));
        let line = format!("attach --via blktap {options} {cache} {}", named(&self.setup.spec));
        let Attached { host, said, .. } = attached;
        loop {
            let tuning = self.limits.tuning(&self.world, host.process.node(), self.limits.memory_bytes);
            let status = tapdisk(&self.world, host, &line, tuning, said).await;
            let why = said.err.take().join("; ");
            // The last operations of a killed process have not ended.
            if status != 0 && why.contains("in use by another process") && self.deaths.get() > 0 {
                continue;
            }
            self.lost.set(why.contains("may be lost"));
            let (expected, words) = self.refusal().unwrap_or_default();
            let is_right = status == expected && why.contains(words) && (expected != 0 || why.is_empty());
            if !is_right && !self.world.errors_allowed() {
                let text = format!("tapdisk {line} ended with status {status}, not {expected}: {why}");
                self.world.fail(Invariant::L1, text);
            }
            return said.end(status);
        }
    }

    /// tapdisk has died: from now on the device fails, and what was answered stays.
    fn died(&self) {
        self.deaths.set(self.deaths.get() + 1);
        self.world.count(|s| s.crashes += 1);
        self.setup.history.borrow_mut().server_died();
        if let Some(set_policy) = &*self.guest.borrow() {
            set_policy(ErrorPolicy { retries: 0, errors_allowed: true, reads: Invariant::P1 });
        }
    }

    /// The block device of `attached`, once it says that it is there; `None` if it ends before.
    pub(super) async fn device(&self, attached: &Attached) -> Option<Gendisk> {
        let there = Cell::new(false);
        let said = async { there.set(attached.said.says("/dev/xen/blktap-2/tapdev").await) };
        select(said, attached.host.process.node().dead()).await;
        if !there.get() {
            return None;
        }
        let line = attached.said.out.borrow().first().cloned()?;
        let minor: u32 = line.rsplit("tapdev").next()?.parse().ok()?;
        attached.minor.set(Some(minor));
        let disk = self.module.disk(minor)?;
        self.check_device(&disk);
        Some(disk)
    }

    /// Compares what the kernel was told about the disk with the truth.
    fn check_device(&self, disk: &Gendisk) {
        let (told, truth) = (disk.size_sectors(), self.setup.size_sectors);
        let knows = self.module.kind().says_what_it_knows();
        let flushes = disk.limits().write_cache;
        if told != truth || disk.is_read_only() != self.limits.read_only || flushes != knows {
            let text = format!(
                "the kernel was told {told} sectors (read-only {}, flushes {flushes}), the truth is {truth}",
                disk.is_read_only()
            );
            self.world.fail(Invariant::F1, text);
        }
    }

    /// Opens the device for a program that reads and writes it, and whose reads break `reads` if they are wrong.
    fn open(&self, disk: &Gendisk, reads: Invariant) -> Option<Guest<BlockDisk>> {
        let opener = match disk.open("guest", true, false) {
            Ok(opener) => opener,
            Err(error) => {
                self.world.fail(Invariant::L1, format!("the device cannot be opened: {error}"));
                return None;
            }
        };
        let policy = error_policy(&self.world, reads);
        let history = Rc::clone(&self.setup.history);
        let guest = Guest::new(&self.world, BlockDisk::overlapping(opener), history, policy);
        self.opened_by(&guest);
        Some(guest)
    }

    /// `guest` uses the device until [`Dom0::close`].
    pub(super) fn opened_by<D: GuestDisk>(&self, guest: &Guest<D>) {
        // A device that takes no flushes promises this, too.
        if self.cache == CacheMode::WriteThrough || !self.module.kind().says_what_it_knows() {
            guest.write_through();
        }
        let own = guest.clone();
        *self.guest.borrow_mut() = Some(Box::new(move |policy| own.set_error_policy(policy)));
    }

    pub(super) fn close<D: GuestDisk>(&self, guest: Guest<D>) {
        self.guest.take();
        drop(guest);
    }

    pub(super) fn operations(&self, number: u64, count: u32) -> Vec<Option<Op>> {
        let entity = Entity::WORLD.child("guest-ops", number);
        self.world.sim.name_entity(entity, || format!("program {number}"));
        let shape = workload(&self.world, self.setup.size_sectors, count, 352);
        operations(&self.world.sim, entity, number, &Workload { zeroes: true, ..shape })
    }

    /// Another program opens the device for a while, as udev and people do.
    async fn look(self: Rc<Self>, disk: Gendisk, nth: u32) {
        let entity = Entity::WORLD.child("looker", 0);
        self.world.sim.name_entity(entity, || "looker".into());
        let value = self.world.sim.decide(entity, &LOOKER, nth, |d| match d.below(2) {
            0 => 0,
            _ => (1 + d.magnitude(23)) | d.magnitude(24) << 24,
        });
        let (after_ns, for_ns) = (value & 0xff_ffff, value >> 24 & 0xff_ffff);
        if after_ns == 0 {
            return;
        }
        self.world.sim.sleep_ns(after_ns).await;
        if let Ok(_opener) = disk.open("looker", false, false) {
            self.world.sim.sleep_ns(for_ns).await;
        }
    }

    /// Runs `work` as a program of dom0.
    async fn in_program(&self, work: impl Future<Output = ()> + 'static) {
        let (task, finished) = joined(work);
        self.world.sim.node("program", self.starts.get()).spawn("main", 0, task);
        let _ = finished.await;
    }

    /// One life of the device: its tapdisk is killed after `kill_after` effects, or lives on.
    async fn live(self: &Rc<Self>, ops: Vec<Option<Op>>, kill_after: Option<u64>) -> Option<Rc<Attached>> {
        let attached = self.start(kill_after);
        let Some(disk) = self.device(&attached).await else {
            self.ended(&attached).await;
            return None;
        };
        let guest = self.open(&disk, Invariant::P1)?;
        let depth = self.world.setting("device-depth", &[32, 8, 1, 48]);
        let (world, own, g) = (self.world.clone(), Rc::clone(&attached), guest.clone());
        let has_died = move || !own.host.process.node().is_alive();
        self.in_program(async move {
            match g.read_all().await {
                Err(error) if !has_died() && !world.errors_allowed() => {
                    world.fail(Invariant::E4, format!("reading the whole disk failed with {error:?}"));
                }
                _ => g.run(&ops, depth).await,
            }
        })
        .await;
        self.close(guest);
        Some(attached)
    }

    /// Waits until `attached` has ended, or has died.
    pub(super) async fn ended(&self, attached: &Attached) {
        select(attached.said.ended(), attached.host.process.node().dead()).await;
    }

    /// Asks tapdisk to end, unless the kernel has done so. It does once nobody uses the device; what was answered is
    /// durable then.
    pub(super) async fn stop(&self, attached: &Attached, ask: bool) {
        if ask {
            attached.host.process.ask_to_stop();
        }
        let inv = self.setup.history.borrow_mut().begin_flush();
        let late = Cell::new(false);
        let limit = async {
            self.world.sim.sleep_ns(END_NS).await;
            late.set(true);
        };
        select(self.ended(attached), limit).await;
        match attached.said.status() {
            Some(0) => self.setup.history.borrow_mut().end_flush(inv),
            None if late.get() => {
                self.world.fail(Invariant::L1, "tapdisk does not end, although nobody uses its device")
            }
            _ => {}
        }
    }

    /// Nothing of any tapdisk is left: the last one has freed what dead ones left.
    pub(super) async fn check_leaks(&self, attached: &Attached) {
        self.world.sim.sleep_ns(NOTICED_NS).await;
        let (mut minors, rings) = (self.module.minors(), self.module.open_rings());
        let pages: Vec<_> =
            self.world.xen.regions().into_iter().filter(|name| name.starts_with("tap-")).collect();
        let strangers = self.strangers.get();
        let is_there = strangers.is_none_or(|number| minors.contains(&number));
        // The kernel says nowhere that a number without a name belongs to nobody: it stays if its process died between
        // reserving and naming it, and at no other time.
        let unnamed = self.module.unnamed();
        let unknown: Vec<u32> =
            unnamed.iter().filter(|(_, node)| !node.is_alive()).map(|(minor, _)| *minor).collect();
        let excused = [strangers, self.asked.get()];
        minors.retain(|minor| !excused.contains(&Some(*minor)) && !unknown.contains(minor));
        if !rings.is_empty() || !pages.is_empty() || !minors.is_empty() || !is_there {
            let text = format!(
                "minors {minors:?}, open rings {rings:?} and pages {pages:?} are left, and {strangers:?}, which is another's, is {}",
                if is_there { "there" } else { "gone" }
            );
            self.world.fail(Invariant::K1, text);
        }
        check_at_rest(&self.world, attached.host.process.node()).await;
    }
}

/// A program of dom0 on a device whose tapdisk runs within `limits`, for measurements.
pub(crate) async fn ready(
    world: &World,
    setup: Setup,
    limits: StackLimits,
) -> Option<(sim::Node, Guest<BlockDisk>)> {
    let dom0 = Rc::new(Dom0 { limits, ..Dom0::drawn(world, setup, &TapKind::SERVED) });
    let attached = dom0.start(None);
    let disk = dom0.device(&attached).await?;
    Some((world.sim.node("program", 0), dom0.open(&disk, Invariant::G1)?))
}

async fn tap_device(world: World) {
    let setup = Setup::new(&world, world.setting("image", &Kind::plain()), 0, DISK_BYTES);
    let dom0 = Dom0::new(&world, setup.clone(), &KINDS);
    dom0.stranger().await;
    if dom0.refusal().is_some() {
        // The first may lack memory before it gets so far.
        dom0.ended(&dom0.start(None)).await;
        world.sim.stop_faults();
        let attached = dom0.start(None);
        dom0.ended(&attached).await;
        dom0.check_leaks(&attached).await;
        return setup.check_bytes(&world, "after the refusal");
    }
    let (neighbour, gone) = joined(Rc::clone(&dom0).neighbour());
    world.sim.spawn("neighbour", 0, neighbour);
    let deaths = kills(&world, 3, 500);
    for (nth, steps) in (0_u32..).zip(deaths) {
        let ops = dom0.operations(u64::from(nth), 30);
        if let Some(attached) = dom0.live(ops, Some(steps)).await {
            attached.host.process.node().kill();
        }
    }
    dom0.last_life(gone).await;
    if !world.verdict.is_broken() && !dom0.lost.get() {
        cut_after_close(&world, [setup.spec.path.as_str()]);
    }
    setup.check_bytes(&world, "in the end");
}

impl Dom0 {
    /// Another disk of the module, whose data is in the same pages.
    async fn neighbour(self: Rc<Self>) {
        let world = &self.world;
        if !world.setting("tap-neighbour", &[false, true]) {
            return;
        }
        let setup = Setup::new(world, Kind::plain()[0], 1, DISK_BYTES);
        let own = Rc::new(Self::with_module(world, setup, self.module.clone()));
        own.starts.set(NEIGHBOUR);
        let attached = own.start(None);
        let Some(disk) = own.device(&attached).await else { return own.ended(&attached).await };
        let Some(guest) = own.open(&disk, Invariant::P1) else { return };
        let (ops, depth) = (own.operations(NEIGHBOUR, 60), world.setting("device-depth", &[32, 8, 1, 48]));
        let g = guest.clone();
        own.in_program(async move { g.run(&ops, depth).await }).await;
        own.close(guest);
        own.stop(&attached, true).await;
    }

    /// A tapdisk that is not killed, and the end of everything, `others` included.
    async fn last_life(self: &Rc<Self>, others: impl Future<Output = Option<()>>) {
        let world = &self.world;
        let asks = world.setting("tap-asked-to-close", &[false, true]);
        let early = world.setting("tap-stopped-in-use", &[false, true]);
        let mut attached = self.start(None);
        let mut disk = self.device(&attached).await;
        if disk.is_none() && world.errors_allowed() {
            // It ended because of an error, and the next one meets none.
            world.sim.stop_faults();
            attached = self.start(None);
            disk = self.device(&attached).await;
        }
        let Some(disk) = disk else {
            return world.fail(Invariant::L1, "a tapdisk that nothing kept from it made no device");
        };
        let Some(guest) = self.open(&disk, Invariant::P1) else { return };
        let (ops, depth) = (self.operations(9, 40), world.setting("device-depth", &[32, 8, 1, 48]));
        if early {
            let entity = Entity::WORLD.child("stopper", 0);
            world.sim.name_entity(entity, || "administrator".into());
            let ns = world.sim.decide(entity, &STOP_IN_USE, 0, |d| d.magnitude(22));
            let (w, process) = (world.clone(), attached.host.process.clone());
            world.sim.spawn("stopper", 0, async move {
                w.sim.sleep_ns(ns).await;
                process.ask_to_stop();
            });
        }
        let g = guest.clone();
        self.in_program(async move { g.run(&ops, depth).await }).await;
        world.sim.stop_faults();
        let (w, g) = (world.clone(), guest.clone());
        self.in_program(async move {
            if let Err(error) = g.read_all().await {
                w.fail(Invariant::E4, format!("reading the whole disk failed with {error:?}"));
            }
        })
        .await;
        self.close(guest);
        drop(disk);
        // The looker has closed it by then.
        world.sim.sleep_ns(1 << 25).await;
        let asked = asks && self.ask_to_close(&attached);
        // Both may come, in any order.
        let signalled = !asked || world.setting("tap-asked-twice", &[false, true]);
        self.stop(&attached, signalled).await;
        let _ = others.await;
        if early {
            // It may have ended while a looker had the device of a dead one, which the next one frees.
            world.sim.sleep_ns(NOTICED_NS).await;
            attached = self.start(None);
            if self.device(&attached).await.is_some() {
                self.stop(&attached, true).await;
            }
        }
        self.check_leaks(&attached).await;
    }
}

impl Dom0 {
    /// An administrator has the module close the device of `attached`, after a while. Not all modules have that.
    fn ask_to_close(self: &Rc<Self>, attached: &Attached) -> bool {
        let minor = attached.minor.get().filter(|_| self.module.kind() == TapKind::OpenXt);
        let Some(minor) = minor else { return false };
        let entity = Entity::WORLD.child("asker", 0);
        self.world.sim.name_entity(entity, || "administrator".into());
        let ns = self.world.sim.decide(entity, &ASK_TO_CLOSE, 0, |d| d.magnitude(24));
        let own = Rc::clone(self);
        self.world.sim.spawn("asker", 0, async move {
            own.world.sim.sleep_ns(ns).await;
            // It may have ended before.
            if own.module.ask_to_close(minor) {
                own.asked.set(Some(minor));
            }
        });
        true
    }
}

async fn tap_power_cut(world: World) {
    let setup = Setup::new(&world, world.setting("image", &Kind::plain()), 0, DISK_BYTES);
    let dom0 = Dom0::new(&world, setup.clone(), &TapKind::SERVED);
    let attached = dom0.start(None);
    let node = attached.host.process.node().clone();
    if let Some(disk) = dom0.device(&attached).await
        && let Some(guest) = dom0.open(&disk, Invariant::G1)
    {
        guest.set_error_policy(NO_ERRORS);
        let program = world.sim.node("program", 0);
        let nodes = [node.clone(), program.clone()];
        arm_power_cut(&world, &setup, 0, 240, move || nodes.iter().for_each(sim::Node::kill));
        let (g, ops, depth) =
            (guest.clone(), dom0.operations(0, 60), world.setting("device-depth", &[32, 8, 1, 48]));
        let (task, finished) = joined(async move { g.run(&ops, depth).await });
        program.spawn("main", 0, task);
        let _ = finished.await;
        dom0.close(guest);
        setup.cut_power(&world, &[&node, &program]).await;
    }
    if world.verdict.is_broken() {
        return;
    }
    setup.check(&world, "after the power cut").await;
    let next = Dom0::new(&world, setup.clone(), &TapKind::SERVED);
    next.after_cut().await;
    if !world.verdict.is_broken() {
        cut_after_close(&world, [setup.spec.path.as_str()]);
    }
    setup.check_bytes(&world, "in the end");
}

impl Dom0 {
    /// The host is up again: everything that was durable is there.
    pub(super) async fn after_cut(self: &Rc<Self>) {
        let world = &self.world;
        let attached = self.start(None);
        let Some(disk) = self.device(&attached).await else { return };
        let Some(guest) = self.open(&disk, Invariant::G7) else { return };
        guest.set_error_policy(ErrorPolicy { reads: Invariant::G7, ..NO_ERRORS });
        let (w, g, ops) = (world.clone(), guest.clone(), self.operations(1, 20));
        self.in_program(async move {
            if let Err(error) = g.read_all().await {
                w.fail(Invariant::G11, format!("reading the disk after the power cut failed with {error:?}"));
            }
            g.set_error_policy(NO_ERRORS);
            g.run(&ops, 8).await;
        })
        .await;
        self.close(guest);
        drop(disk);
        world.sim.stop_faults();
        self.stop(&attached, true).await;
        self.check_leaks(&attached).await;
    }
}
