//! A whole machine: a toolstack, a tapdisk that may die and come back, guests with front ends.
//!
//! ```text
//!   guest node          Xen           tapdisk node (restarted by its supervisor)
//!   Guest ─ Blkfront ═ ring ═ Backend ─ Vbd ─ Scheduler ─ image ─ Storage
//! ```

use crate::catalog::setup::Setup;
use crate::check::Invariant;
use crate::check::oracle::{Oracle, is_broken};
use crate::program::{named, tapdisk};
use crate::stack::{Stack, StackLimits};
use crate::world::World;
use kernel_model::SimHost;
use sim::Node;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};
use tap_core::wait;
use tap_host::{Budget, DomId, Errno, Signals, Tasks, VbdId, Xenstore};
use tap_images::ImageError;
use tap_xenbus::{Backend, BackendConfig, BackendError, DeviceFilter, Hotplug, lead, supervise};
use xen_model::{VbdPaths, XenPort, attach_vbd, remove_vbd};

/// The number of xvda.
pub const XVDA: VbdId = VbdId(202 << 8);
/// The number of xvdb.
pub const XVDB: VbdId = VbdId(202 << 8 | 1 << 4);
/// The script that marks disks for a tapdisk that watches.
pub const SCRIPT: &str = "block-tapdisk";

/// The number of a guest's node that follows another in its domain.
const NEXT_GUEST: u64 = 1 << 16;

/// How long to wait for an image that a dead process still has: its I/O may be stuck for ten seconds.
const IN_USE_PATIENCE_NS: u64 = 15_000_000_000;

/// One disk of one guest, attached.
#[derive(Clone)]
pub struct Attached {
    /// The guest's domain.
    pub dom: DomId,
    /// Which of its disks.
    pub vbd: VbdId,
    /// Where both ends are in xenstore.
    pub paths: VbdPaths,
    /// The disk.
    pub setup: Setup,
    /// It may only be read, whoever says so.
    pub read_only: bool,
    /// The guest's kernel.
    pub node: Node,
    /// Its access to Xen.
    pub port: XenPort,
}

/// What a machine has and does.
pub struct Machine {
    pub(crate) world: World,
    /// Tells machines of one world apart: a new one starts after a power cut.
    boot: u64,
    limits: StackLimits,
    pub(crate) toolstack: SimHost,
    pub(crate) disks: RefCell<Vec<Attached>>,
    /// tapdisk finds its disks by their script.
    watching: bool,
    /// tapdisk is the program that ships, `tapdisk xen`, with the limits that it has.
    shipped: bool,
    /// It is told to make writes durable before it answers them.
    writes_through: bool,
    tapdisk: RefCell<Option<SimHost>>,
    starts: Rc<Cell<u32>>,
    /// What the running tapdisk has to end yet: its back ends, or the watch for them.
    running: Cell<usize>,
    waiter: RefCell<Option<Waker>>,
    /// Nobody is killed any more.
    pub(crate) spared: Cell<bool>,
    /// Two processes were told to serve one disk at once: one of them does.
    rivals: Cell<bool>,
    /// The guest whose ring may be one that nobody can take up.
    broken: Cell<Option<DomId>>,
    /// Images may not be there: to say so is right.
    absences: Cell<bool>,
    /// How often a tapdisk that watches has tried to open an image, and has told why a disk is not served.
    opened: Cell<u32>,
    told: Cell<u32>,
    /// A tapdisk may hear no events any more, and end; another is started.
    pub(crate) may_go_deaf: Cell<bool>,
    /// The power is off: nothing starts any more.
    pub(crate) off: Cell<bool>,
    /// An image could not be closed; what it lost was told.
    close_failed: Cell<bool>,
}

impl Machine {
    /// A machine without guests, whose tapdisk is told what to serve.
    pub fn new(world: &World, limits: StackLimits) -> Rc<Self> {
        Self::with(world, limits, false)
    }

    /// The same, whose tapdisk may be the program that ships, with its disks on the command line.
    pub fn named(world: &World, limits: StackLimits) -> Rc<Self> {
        let mut machine = Self::with(world, limits, false);
        if let Some(own) = Rc::get_mut(&mut machine) {
            own.shipped = world.setting("shipped-program", &[false, true]);
            own.writes_through = own.shipped && world.setting("program-cache", &[false, true]);
        }
        machine
    }

    /// A machine without guests, whose tapdisk finds by itself what to serve.
    pub fn watching(world: &World, limits: StackLimits) -> Rc<Self> {
        Self::with(world, limits, true)
    }

    fn with(world: &World, limits: StackLimits, watching: bool) -> Rc<Self> {
        let boot = world.next_boot();
        Rc::new(Self {
            toolstack: SimHost::start(&world.kernel, &world.xen, "toolstack", boot),
            boot,
            world: world.clone(),
            limits,
            disks: RefCell::default(),
            watching,
            shipped: watching && world.setting("shipped-program", &[false, true]),
            writes_through: false,
            tapdisk: RefCell::default(),
            starts: Rc::default(),
            running: Cell::new(0),
            waiter: RefCell::default(),
            spared: Cell::new(false),
            rivals: Cell::new(false),
            broken: Cell::new(None),
            may_go_deaf: Cell::new(false),
            absences: Cell::new(false),
            opened: Cell::new(0),
            told: Cell::new(0),
            off: Cell::new(false),
            close_failed: Cell::new(false),
        })
    }

    /// A new guest with `setup` as its disk.
    pub async fn attach(&self, setup: Setup, number: u64) -> Attached {
        self.attach_with(setup, number, false).await
    }

    /// The same, with a disk that it may only read.
    pub async fn attach_read_only(&self, setup: Setup, number: u64) -> Attached {
        self.attach_with(setup, number, true).await
    }

    async fn attach_with(&self, setup: Setup, number: u64, read_only: bool) -> Attached {
        let attached = Attached { read_only, ..self.new_guest(setup, number) };
        let Attached { dom, paths, .. } = &attached;
        if let Err(error) = attach_vbd(&self.toolstack.port, *dom, XVDA, paths, read_only).await {
            self.world.fail(Invariant::K1, format!("the toolstack failed to attach a disk: {error:?}"));
        }
        self.disks.borrow_mut().push(attached.clone());
        attached
    }

    /// A new guest without a disk; what it will have as xvda is `setup`.
    pub fn new_guest(&self, setup: Setup, number: u64) -> Attached {
        self.guest_in(self.world.xen.create_domain(), setup, number)
    }

    /// As [`Machine::new_guest`], in a domain with the number of one that is gone.
    pub fn guest_with_number(&self, setup: Setup, dom: DomId) -> Attached {
        self.world.xen.create_domain_again(dom);
        self.guest_in(dom, setup, NEXT_GUEST)
    }

    fn guest_in(&self, dom: DomId, setup: Setup, number: u64) -> Attached {
        let node = self.world.sim.node("guest", self.boot << 32 | number);
        let port = self.world.xen.attach(dom, &node);
        Attached {
            dom,
            vbd: XVDA,
            paths: VbdPaths::new("vbd", dom, XVDA),
            setup,
            read_only: false,
            node,
            port,
        }
    }

    /// The kernel of a guest is replaced by another: of the first, no grant and no port is left.
    pub async fn next_kernel(&self, disk: &Attached) -> Attached {
        disk.node.kill();
        disk.node.dead().await;
        self.world.xen.reset_grants(disk.dom);
        let next = self.guest_in(disk.dom, disk.setup.clone(), NEXT_GUEST);
        self.disks.borrow_mut().iter_mut().filter(|d| d.dom == disk.dom).for_each(|d| *d = next.clone());
        next
    }

    /// From now on images may be away.
    pub fn expect_absences(&self) {
        self.absences.set(true);
    }

    /// How often a tapdisk that watches has tried to open an image, and has told why a disk is not served; of the
    /// program that ships nothing is known.
    pub fn attempts(&self) -> Option<(u32, u32)> {
        (!self.shipped).then(|| (self.opened.get(), self.told.get()))
    }

    /// The ring of `dom` may be one that nobody can take up; to say so is right.
    pub fn expect_broken_ring(&self, dom: DomId) {
        self.broken.set(Some(dom));
    }

    /// Starts the tapdisk process, which serves all attached disks.
    pub fn start_tapdisk(self: &Rc<Self>) -> SimHost {
        let start = self.starts.replace(self.starts.get() + 1);
        let key = self.boot << 32 | u64::from(start);
        let host = SimHost::start(&self.world.kernel, &self.world.xen, "tapdisk", key);
        host.port.allow_store_errors();
        if self.world.draws_errors() {
            host.port.allow_copy_errors();
        }
        if self.may_go_deaf.get() {
            host.port.allow_deafness();
        }
        let one = self.watching || self.shipped;
        self.running.set(if one { 1 } else { self.disks.borrow().len() });
        let leave = Rc::<wait::Event>::default();
        let (stopped, event) = (host.process.asked_to_stop(), Rc::clone(&leave));
        host.spawn("stop", 0, async move {
            stopped.await;
            event.set();
        });
        if self.shipped {
            host.spawn("main", 0, Rc::clone(self).program(host.clone()));
        } else if self.watching {
            host.spawn("main", 0, Rc::clone(self).watch(host.clone(), leave, None));
        } else {
            for disk in self.disks.borrow().iter() {
                let (key, serving) = (u64::from(disk.dom.0), Rc::clone(self));
                host.spawn("serve", key, serving.serve(host.clone(), disk.clone(), Rc::clone(&leave)));
            }
        }
        *self.tapdisk.borrow_mut() = Some(host.clone());
        if self.running.get() == 0 {
            self.waiter.take().into_iter().for_each(Waker::wake);
        }
        host
    }

    /// Whether tapdisk finds by itself what to serve.
    pub fn is_watching(&self) -> bool {
        self.watching
    }

    /// How often tapdisk was started.
    pub fn starts(&self) -> Rc<Cell<u32>> {
        Rc::clone(&self.starts)
    }

    /// Serves what the toolstack marks with [`SCRIPT`]; with `twin` instead of the image, if there is one.
    async fn watch(self: Rc<Self>, host: SimHost, leave: Rc<wait::Event>, twin: Option<Setup>) {
        let filter = DeviceFilter {
            root: "/local/domain/0/backend/vbd".into(),
            script: SCRIPT.into(),
            records: "ring",
        };
        let (machine, h, l) = (Rc::clone(&self), host.clone(), Rc::clone(&leave));
        let serve = move |device: tap_xenbus::Device| {
            let (machine, h, l, twin) = (Rc::clone(&machine), h.clone(), Rc::clone(&l), twin.clone());
            async move {
                let disks = machine.disks.borrow().clone();
                match disks.into_iter().find(|d| (d.dom, d.vbd) == (device.dom, device.vbd)) {
                    Some(disk) => {
                        let setup = twin.unwrap_or_else(|| disk.setup.clone());
                        machine.serve(h, Attached { setup, ..disk }, l).await;
                    }
                    // It was taken away while tapdisk looked at it; a tapdisk would find that out.
                    None if h.port.read(&format!("{}/state", device.path)).await.is_err() => {}
                    None => {
                        let text = format!("tapdisk serves {}, which is nobody's", device.path);
                        machine.world.fail(Invariant::K1, text);
                    }
                }
            }
        };
        let end = supervise(&host, &filter, &leave, serve).await;
        if let Err(error) = end
            && host.process.node().is_alive()
        {
            self.world.fail(Invariant::L1, format!("tapdisk gave up: {error}"));
        }
        self.one_ended();
    }

    /// Whether writes are durable when they are answered.
    pub fn writes_through(&self) -> bool {
        self.writes_through
    }

    /// `tapdisk xen`, from its command line to its exit status.
    async fn program(self: Rc<Self>, host: SimHost) {
        let cache = if self.writes_through { "--cache writethrough" } else { "" };
        let what = if self.watching {
            format!("--watch --script {SCRIPT}")
        } else {
            let named = |disk: &Attached| format!("{}/xvda={}", disk.dom.0, named(&disk.setup.spec));
            self.disks.borrow().iter().map(named).collect::<Vec<_>>().join(" ")
        };
        let line = format!("xen {} {cache} {what}", self.limits.images());
        let (status, why) = tapdisk(&host, &line).await;
        if status != 0 && host.port.is_deaf() {
            self.respawn(&host);
            return;
        }
        // A ring that nobody can take up stays so, however often it is tried.
        if why.contains("nothing was changed") && !self.watching && host.process.node().is_alive() {
            self.world.fail(Invariant::L1, format!("tapdisk complains: {why}"));
            return;
        }
        // A supervisor starts it again where its image could not be opened: a dead one may have it for ten seconds, and
        // what fails once may work the next time.
        let not_opened = why.contains("in use") || self.world.errors_allowed() && !why.contains("close");
        if status != 0 && !self.watching && host.process.node().is_alive() && not_opened {
            self.respawn(&host);
            return;
        }
        self.close_failed.set(self.close_failed.get() || status != 0);
        // Where operations fail, closing a disk may.
        if status != 0 && host.process.node().is_alive() && !self.world.errors_allowed() {
            self.world.fail(Invariant::L1, format!("tapdisk {line} ended with status {status}: {why}"));
        }
        self.one_ended();
    }

    /// One disk, from opening its image to the end of its back end.
    async fn serve(self: Rc<Self>, host: SimHost, disk: Attached, leave: Rc<wait::Event>) {
        let mut config = BackendConfig::new(disk.paths.backend.clone(), disk.dom, disk.vbd);
        config.record = Some(format!("ring-{}-{}", disk.dom.0, disk.vbd.0));
        config.hotplug = if self.watching { Hotplug::Wait } else { Hotplug::Write };
        config.limits.buffer_bytes = self.limits.pool_bytes;
        config.limits.batch = self.limits.ring_batch;
        let memory = self.limits.budget();
        config.memory = memory.clone();
        let end = if self.watching {
            // Where nobody else leads the disk, every ring can be taken up, or has no guest any more.
            let tell = |why: &str| {
                self.told.set(self.told.get() + 1);
                if why.is_empty() && host.process.node().is_alive() {
                    self.world.fail(Invariant::L1, "tapdisk complains of nothing");
                }
                if why.ends_with("nothing was changed")
                    && !self.rivals.get()
                    && self.broken.get() != Some(disk.dom)
                    && host.process.node().is_alive()
                {
                    self.world.fail(Invariant::L1, format!("tapdisk complains: failed to {why}"));
                }
            };
            lead(&host, &config, &leave, || self.open(&host, &disk, &memory), tell).await
        } else {
            Backend::run(host.clone(), config, || self.open(&host, &disk, &memory), leave).await
        };
        if !host.process.node().is_alive() {
            return;
        }
        if let Err(BackendError::Close { .. } | BackendError::AndClose { .. }) = &end {
            self.close_failed.set(true);
        }
        match end.map_err(first_of) {
            Ok(_) => {}
            // It has been told.
            Err(BackendError::Open { .. }) => return,
            Err(BackendError::NotTaken { .. }) if self.rivals.get() => {}
            Err(BackendError::Deaf { .. }) if self.may_go_deaf.get() => self.respawn(&host),
            Err(BackendError::Close { .. }) if self.world.errors_allowed() => {}
            Err(error @ BackendError::Close { .. }) => self.world.fail(Invariant::G11, error.to_string()),
            Err(error) => self.world.fail(Invariant::L1, format!("the back end gave up: {error}")),
        }
        if !self.watching {
            self.one_ended();
        }
    }

    /// Opens the image of a disk; all of them can be opened.
    async fn open(
        &self,
        host: &SimHost,
        disk: &Attached,
        memory: &Budget,
    ) -> Result<Rc<dyn tap_core::Node>, String> {
        let until_ns = self.world.sim.now_ns() + IN_USE_PATIENCE_NS;
        self.opened.set(self.opened.get() + 1);
        loop {
            let (spec, memory) = (&disk.setup.spec, memory.clone());
            match Stack::open_within(host, &self.world, spec, &self.limits, memory).await {
                Ok(stack) => {
                    if host.process.node().is_alive() {
                        disk.setup.check_locks(&self.world, self.limits.read_only);
                    }
                    return Ok(stack.node());
                }
                // The lock of a dead predecessor goes when its last operation has landed.
                Err(ImageError::InUse { .. }) if self.world.sim.now_ns() < until_ns => {
                    self.world.sim.sleep_ns(200_000).await;
                }
                Err(error) if self.absences.get() && error.errno() == Errno::ENOENT => {
                    return Err(format!("open the image: {error}"));
                }
                // What failed may work the next time; a supervisor starts a program again.
                Err(error) if self.world.errors_allowed() && error.errno() != Errno::EUCLEAN => {
                    self.world.sim.sleep_ns(1_000_000).await;
                }
                Err(error) => {
                    // A dying process may see anything.
                    if host.process.node().is_alive() {
                        self.world.fail(Invariant::G11, format!("tapdisk failed to open its image: {error}"));
                    }
                    return Err(error.to_string());
                }
            }
        }
    }

    /// Has another process try to serve `disk`, which is served, with another image; it must not be able to.
    pub async fn try_to_serve(&self, disk: &Attached, image: &Setup, number: u32, read_only: bool) {
        let host = SimHost::start(&self.world.kernel, &self.world.xen, "second", u64::from(number));
        let limits = StackLimits { read_only, ..self.limits };
        let (world, h) = (self.world.clone(), host.clone());
        let (disk, spec, (done, ended)) = (disk.clone(), image.spec.clone(), wait::oneshot());
        host.spawn("main", 0, async move {
            let mut config = BackendConfig::new(disk.paths.backend.clone(), disk.dom, disk.vbd);
            // Another program knows nothing of ours.
            config.record = (!world.setting("second-is-another-program", &[false, true]))
                .then(|| format!("ring-{}-{}", disk.dom.0, disk.vbd.0));
            let open = async || {
                let stack = Stack::open(&h, &world, &spec, &limits).await;
                stack.map(|stack| stack.node()).map_err(|error| error.to_string())
            };
            if let Ok(end) = Backend::run(h.clone(), config, open, Rc::default()).await {
                world
                    .fail(Invariant::L1, format!("a second tapdisk served the disk, and ended with {end:?}"));
            }
            let _ = done.send(());
        });
        let _ = ended.await;
        host.process.node().kill();
    }

    /// Starts another process that is to serve `disk` with `twin`, an image of the same bytes.
    pub fn start_rival(self: &Rc<Self>, disk: &Attached, twin: &Setup) -> SimHost {
        self.rivals.set(true);
        self.running.set(self.running.get() + 1);
        let host = SimHost::start(&self.world.kernel, &self.world.xen, "second", self.boot);
        let leave = Rc::<wait::Event>::default();
        let (stopped, event) = (host.process.asked_to_stop(), Rc::clone(&leave));
        host.spawn("stop", 0, async move {
            stopped.await;
            event.set();
        });
        if self.watching {
            host.spawn("main", 0, Rc::clone(self).watch(host.clone(), leave, Some(twin.clone())));
        } else {
            let disk = Attached { setup: twin.clone(), ..disk.clone() };
            host.spawn("serve", 0, Rc::clone(self).serve(host.clone(), disk, leave));
        }
        host
    }

    fn one_ended(&self) {
        self.running.set(self.running.get() - 1);
        if let Some(waker) = self.waiter.borrow_mut().take() {
            waker.wake();
        }
    }

    /// The running tapdisk.
    pub fn tapdisk(&self) -> Option<SimHost> {
        self.tapdisk.borrow().clone()
    }

    /// Waits until the running tapdisk has let go of everything.
    pub(crate) async fn all_ended(&self) {
        poll_fn(|cx| {
            if self.running.get() == 0 {
                return Poll::Ready(());
            }
            *self.waiter.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Whether an image could not be closed.
    pub fn close_failed(&self) -> bool {
        self.close_failed.get()
    }

    /// No more kills. A start that is under way goes on.
    pub fn spare(&self) {
        self.spared.set(true);
        if let Some(host) = self.tapdisk() {
            host.process.node().kill_after_steps(u64::MAX);
        }
    }

    fn nodes(&self) -> Vec<Node> {
        let disks = self.disks.borrow();
        let tapdisk = self.tapdisk().map(|host| host.process.node().clone());
        let mut nodes: Vec<Node> = disks.iter().map(|disk| disk.node.clone()).chain(tapdisk).collect();
        nodes.push(self.toolstack.process.node().clone());
        nodes
    }

    /// Everything that runs stops at once, the guests too, and nothing is started in its place.
    pub fn stop(&self) {
        self.off.set(true);
        self.nodes().iter().for_each(Node::kill);
    }

    /// Cuts the power. Files are left, in one of the states that they may be left in, and histories that know it.
    pub async fn power_cut(&self) {
        self.stop();
        for node in self.nodes() {
            node.dead().await;
        }
        self.world.storage.set_hook(None);
        self.world.storage.power_cut();
        self.world.xen.power_cut();
        self.disks.borrow().iter().for_each(|disk| disk.setup.history.borrow_mut().power_cut());
        self.world.count(|s| s.crashes += 1);
    }

    /// Takes all disks away as a toolstack does, and waits until tapdisk has let go of them.
    pub async fn detach_all(&self) {
        let disks = self.disks.borrow().clone();
        if self.watching {
            for disk in &disks {
                self.unplug(disk).await;
            }
            self.tapdisk().iter().for_each(|host| host.process.ask_to_stop());
            return self.all_ended().await;
        }
        for disk in &disks {
            if let Err(error) = self.take_offline(disk).await {
                self.world.fail(Invariant::K1, format!("the toolstack failed to detach a disk: {error:?}"));
            }
        }
        self.all_ended().await;
        for disk in &disks {
            if let Err(error) = remove_vbd(&self.toolstack.port, &disk.paths).await {
                self.world.fail(Invariant::K1, format!("the toolstack failed to remove a disk: {error:?}"));
            }
        }
    }

    pub(crate) async fn take_offline(&self, disk: &Attached) -> Result<(), Errno> {
        let port = &self.toolstack.port;
        port.write(&format!("{}/online", disk.paths.backend), b"0").await?;
        let state = format!("{}/state", disk.paths.backend);
        if port.read(&state).await? != b"6" {
            port.write(&state, b"5").await?;
        }
        Ok(())
    }

    /// Everything of other domains that tapdisk ever had must be given back by now.
    pub fn check_leaks(&self) {
        if is_broken(Oracle::LeftoversIgnored) {
            return;
        }
        let counts = self.world.xen.counts(DomId(0));
        if counts.maps + counts.channels + counts.watches + counts.transactions > 0 {
            self.world.fail(Invariant::K1, format!("the control domain still has {counts:?}"));
        }
        let mut regions = self.world.xen.regions();
        // What is known of a file's synchronisations stays as long as the host is up.
        regions.retain(|name| !name.starts_with("sync-"));
        if !regions.is_empty() {
            self.world
                .fail(Invariant::K1, format!("in-flight records are left over: {}", regions.join(", ")));
        }
    }
}

/// What ended a back end, whether or not its disk could be closed then.
fn first_of(error: BackendError) -> BackendError {
    match error {
        BackendError::AndClose { first, .. } => *first,
        other => other,
    }
}
