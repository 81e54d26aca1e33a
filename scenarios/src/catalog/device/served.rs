//! `tapdisk attach` in processes of a world, each started again when it has ended before its time.

use crate::catalog::setup::Setup;
use crate::check::Invariant;
use crate::formats::RAW;
use crate::limits::StackLimits;
use crate::program::{Printed, named, option_of, tapdisk};
use crate::world::World;
use kernel_model::SimHost;
use kernel_model::gendisk::Opener;
use sim::Node;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_core::CacheMode;
use tap_core::wait::Event;
use tap_host::{File, Files, NbdDevices, NbdIndex, OpenMode, select};
use tap_nbd::ServerLimits;
use tap_programs::Tuning;

/// Memory for the connection of a server, in bytes.
const SERVER_BYTES: usize = 8 << 20;
/// Until a process with the last operations of a killed one has ended, in nanoseconds.
const RESTART_NS: u64 = 10_000;

/// By how much a disk grows, in bytes.
const GROWTH_BYTES: u64 = 64 << 10;

/// What the devices of a world have in common.
#[derive(Clone)]
pub(super) struct Plan {
    world: World,
    pub(super) limits: StackLimits,
    cache: CacheMode,
    server: ServerLimits,
    boot: Rc<Cell<u64>>,
    detaches: Rc<Cell<u64>>,
}

impl Plan {
    pub(super) fn draw(world: &World) -> Self {
        let w = world.clone();
        world.kernel.on_nbd_complaint(Rc::new(move |what| w.fail(Invariant::N1, what)));
        world.kernel.nbd_sends_zeroes(world.setting("kernel-sends-zeroes", &[true, false]));
        Self {
            world: world.clone(),
            limits: StackLimits::draw(world),
            cache: world.setting("program-cache", &[CacheMode::WriteBack, CacheMode::WriteThrough]),
            server: ServerLimits {
                requests: world.setting("nbd-requests", &[128, 8, 1]),
                request_bytes: world.setting("nbd-request", &[32 << 20, 64 << 10, 4096]),
                connection_bytes: world.setting("nbd-memory", &[32 << 20, 64 << 10, 4096]),
                receive_bytes: world.setting("nbd-receive", &[256 << 10, 16 << 10]),
                ..ServerLimits::default()
            },
            boot: Rc::default(),
            detaches: Rc::default(),
        }
    }

    /// The machine was started again.
    pub(super) fn next_boot(&self) {
        self.boot.set(self.boot.get() + 1);
    }

    fn tuning(&self, host: &SimHost) -> Tuning {
        let memory = match self.limits.memory_bytes {
            0 => 0,
            bytes => SERVER_BYTES + bytes,
        };
        let tuning = self.limits.tuning(&self.world, host.process.node(), memory);
        Tuning { server: self.server, ..tuning }
    }

    /// Runs `tapdisk detach` on the device of `served`, and returns its status.
    pub(super) async fn detach(&self, served: &Served, options: &str) -> u8 {
        self.detach_for(served, options, u64::MAX).await.unwrap_or(1)
    }

    /// The same, but kills it after `steps` of its effects: it then has no status.
    pub(super) async fn detach_for(&self, served: &Served, options: &str, steps: u64) -> Option<u8> {
        let nth = self.detaches.replace(self.detaches.get() + 1);
        let key = nth << 32 | u64::from(served.number);
        let host = SimHost::start(&self.world.kernel, &self.world.xen, "detach", key);
        let (said, line) = (Rc::<Printed>::default(), format!("detach {options} {}", served.index()));
        let tuning = self.tuning(&host);
        let (world, own, out) = (self.world.clone(), host.clone(), Rc::clone(&said));
        let node = host.process.node();
        node.kill_after_steps(steps);
        node.spawn("main", 0, async move {
            let status = tapdisk(&world, &own, &line, tuning, &out).await;
            out.end(status);
        });
        select(node.dead(), said.ended()).await;
        let status = said.status().filter(|_| node.is_alive());
        node.kill();
        node.dead().await;
        status
    }

    /// Whether the device of `served` is there.
    pub(super) fn is_there(&self, served: &Served) -> bool {
        self.world.kernel.nbd_disk(served.index()).size_sectors() > 0
    }

    /// Checks that no device is left, and no record of one.
    pub(super) async fn check_nothing_left(&self) {
        let host = SimHost::start(&self.world.kernel, &self.world.xen, "looker", self.boot.get());
        let devices = host.attached().await.unwrap_or_default();
        if !devices.is_empty() {
            self.world.fail(Invariant::K1, format!("devices are left: {devices:?}"));
        }
        let mut regions = self.world.xen.regions();
        // A file's record of synchronisations stays until the host reboots.
        regions.retain(|name| !name.starts_with("sync-"));
        if !regions.is_empty() {
            self.world.fail(Invariant::K1, format!("records are left: {}", regions.join(", ")));
        }
    }
}

/// A disk that tapdisk attaches.
pub(super) struct Served {
    plan: Plan,
    pub(super) setup: Setup,
    pub(super) number: u32,
    current: RefCell<Option<(SimHost, Rc<Printed>)>>,
    starts: Cell<u64>,
    index: Cell<Option<NbdIndex>>,
    attached: Event,
    /// A guest has it open.
    opened: Event,
    /// It is no longer killed.
    spared: Cell<bool>,
    /// The image was made larger.
    grown: Cell<bool>,
    /// The device may go.
    leaves: Cell<bool>,
    /// Nothing is started any more.
    off: Cell<bool>,
    gone: Event,
}

impl Served {
    pub(super) fn new(plan: &Plan, setup: Setup, number: u32) -> Rc<Self> {
        Rc::new(Self {
            plan: plan.clone(),
            setup,
            number,
            current: RefCell::default(),
            starts: Cell::new(0),
            index: Cell::new(None),
            attached: Event::new(),
            opened: Event::new(),
            spared: Cell::new(false),
            grown: Cell::new(false),
            leaves: Cell::new(false),
            off: Cell::new(false),
            gone: Event::new(),
        })
    }

    /// Starts a tapdisk, unless none may be started any more.
    pub(super) fn start(self: &Rc<Self>) {
        if self.off.get() {
            return;
        }
        let (world, start) = (&self.plan.world, self.starts.replace(self.starts.get() + 1));
        let key = self.plan.boot.get() << 48 | u64::from(self.number) << 32 | start;
        let host = SimHost::start(&world.kernel, &world.xen, "tapdisk", key);
        let said = Rc::<Printed>::default();
        *self.current.borrow_mut() = Some((host.clone(), Rc::clone(&said)));
        let (own, seen) = (Rc::clone(self), Rc::clone(&said));
        world.sim.spawn("device-name", key, async move { own.note_name(&seen).await });
        host.process.node().spawn("main", 0, Rc::clone(self).program(host.clone(), said));
    }

    /// Notes which device it is, from the first line.
    async fn note_name(&self, said: &Printed) {
        if !said.says("/dev/nbd").await {
            return;
        }
        let line = said.out.borrow().first().cloned().unwrap_or_default();
        let index = line.strip_prefix("/dev/nbd").and_then(|number| number.parse().ok()).map(NbdIndex);
        let before = self.index.replace(index);
        if index.is_none() || before.is_some_and(|before| Some(before) != index) {
            let text = format!("tapdisk attached '{line}' after {before:?}");
            self.plan.world.fail(Invariant::L1, text);
        }
        self.attached.set();
    }

    async fn program(self: Rc<Self>, host: SimHost, said: Rc<Printed>) {
        let (options, cache) = (self.plan.limits.options(), option_of(self.plan.cache));
        let line = format!("attach --keep 100000 {options} {cache} {}", named(&self.setup.spec));
        loop {
            let tuning = self.plan.tuning(&host);
            let status = tapdisk(&self.plan.world, &host, &line, tuning, &said).await;
            let why = said.err.take().join("; ");
            // The last operations of a killed process have not ended.
            let busy = why.contains("in use") || why.contains("another tapdisk has it");
            if status != 0 && busy {
                continue;
            }
            let gone = said.out.borrow().iter().any(|line| line.ends_with(": detached"));
            // Once data is lost in unknown places, a close fails as a flush does.
            let lost = self.plan.world.errors_allowed() && why.contains("may be lost");
            let failed = (status != 0 || !why.is_empty()) && !lost;
            if failed || gone && !self.leaves.get() {
                let text =
                    format!("tapdisk {line} ended with status {status}, its device gone: {gone}; {why}");
                self.plan.world.fail(Invariant::L1, text);
            }
            said.end(status);
            if gone || lost && self.leaves.get() {
                self.gone.set();
            }
            return;
        }
    }

    /// Ends tapdisk after `steps` of its effects, or asks it to end, and starts the next one.
    pub(super) async fn end(self: &Rc<Self>, world: &World, steps: u64, asked: bool) {
        let current = self.current.borrow().clone().filter(|_| !self.spared.get() && !self.off.get());
        let Some((host, said)) = current else { return };
        let node = host.process.node();
        if asked {
            // A device that nobody uses would go with it.
            self.opened.wait().await;
            world.sim.sleep_ns(steps * 1000).await;
            if self.spared.get() || self.off.get() {
                return;
            }
            host.process.ask_to_stop();
            select(node.dead(), said.ended()).await;
            node.kill();
        } else {
            node.kill_after_steps(steps);
        }
        node.dead().await;
        world.count(|s| s.crashes += 1);
        world.sim.sleep_ns(RESTART_NS).await;
        self.grow(world).await;
        self.start();
    }

    /// In some worlds an administrator makes a raw disk larger while nobody serves it, once.
    async fn grow(&self, world: &World) {
        let grows = self.setup.spec.format == RAW && world.setting("image-grows", &[false, true]);
        if !grows || self.grown.replace(true) {
            return;
        }
        let key = self.plan.boot.get() << 32 | u64::from(self.number);
        let host = SimHost::start(&world.kernel, &world.xen, "administrator", key);
        let grown = async {
            let file = host.open(&self.setup.spec.path, OpenMode::WRITE).await?;
            file.set_size(file.info().await?.size_bytes + GROWTH_BYTES).await?;
            file.sync_data().await
        };
        if let Err(error) = grown.await {
            world.fail(Invariant::L1, format!("an image cannot be made larger: {error:?}"));
        }
        host.process.node().kill();
    }

    /// It is killed no more. A restart under way goes on.
    pub(super) fn spare(&self) {
        self.spared.set(true);
        if let Some(node) = self.process() {
            node.kill_after_steps(u64::MAX);
        }
    }

    /// Kills it, for good.
    pub(super) fn stop_at_once(&self) {
        self.off.set(true);
        self.process().iter().for_each(Node::kill);
    }

    /// From now on the device may be taken away.
    pub(super) fn may_go(&self) {
        self.leaves.set(true);
    }

    pub(super) fn ask_to_stop(&self) {
        if let Some((host, _)) = &*self.current.borrow() {
            host.process.ask_to_stop();
        }
    }

    pub(super) fn process(&self) -> Option<Node> {
        self.current.borrow().as_ref().map(|(host, _)| host.process.node().clone())
    }

    /// Waits until it has a device.
    pub(super) async fn attached(&self) {
        self.attached.wait().await;
    }

    /// Waits until tapdisk has noticed that its device is gone, and has ended.
    pub(super) async fn gone(&self) {
        self.gone.wait().await;
    }

    pub(super) fn index(&self) -> NbdIndex {
        self.index.get().unwrap_or(NbdIndex(0))
    }

    /// Someone in the kernel has opened the device.
    pub(super) fn note_user(&self) {
        self.opened.set();
    }

    /// Opens the device for itself.
    pub(super) fn open(&self, who: &str) -> Opener {
        let disk = self.plan.world.kernel.nbd_disk(self.index());
        self.opened.set();
        disk.open(who, true, true).unwrap_or_else(|error| {
            let text = format!("the device of disk {} cannot be opened: {error:?}", self.number);
            self.plan.world.fail(Invariant::P1, text);
            disk.open(who, false, false).expect("not for itself")
        })
    }
}
