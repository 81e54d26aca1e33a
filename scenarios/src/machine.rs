//! A whole machine: a toolstack, a tapdisk that may die and restart, guests with front ends.
//!
//! ```text
//!   guest node          Xen      tapdisk node: `tapdisk xen` (restarted by its supervisor)
//!   Guest ─ Blkfront ═ ring ═ Backend ─ disk ─ image ─ Storage
//! ```
//!
//! This file has the machine and its guests; `tapdisk.rs` runs the program, `respawn.rs` ends it and starts another,
//! `toolstack.rs` plugs and unplugs disks.

use crate::catalog::setup::Setup;
use crate::check::Invariant;
use crate::check::oracle::{Oracle, is_broken};
use crate::limits::StackLimits;
use crate::world::World;
use kernel_model::SimHost;
use sim::Node;
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;

use tap_core::CacheMode;
use tap_host::{DomId, OneWaiter, SharedPages, VbdId, Xenstore};
use xen_model::{VbdPaths, XenPort, attach_vbd, remove_vbd};

/// The number of xvda.
pub const XVDA: VbdId = VbdId(202 << 8);
/// The number of xvdb.
pub const XVDB: VbdId = VbdId(202 << 8 | 1 << 4);
/// The hotplug script that marks disks for a watching tapdisk.
pub const SCRIPT: &str = "block-tapdisk";

/// Names that an administrator may use for the first disk of a guest, and their numbers.
const NAMES: [(&str, VbdId); 6] = [
    ("xvda", XVDA),
    ("51712", XVDA),
    ("0xca00", XVDA),
    ("sda", VbdId(8 << 8)),
    ("hdc", VbdId(22 << 8)),
    ("d20p3", VbdId(1 << 28 | 20 << 8 | 3)),
];

/// Offset of the node of a guest that follows another in its domain.
const NEXT_GUEST: u64 = 1 << 16;

/// A step of a script.
pub(crate) type Step<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// What opens a disk before its guest gets it: a toolstack's hotplug script.
pub(crate) trait Script {
    /// Opens `disk`, and returns where its tapdisk offers it over NBD.
    fn add<'a>(&'a self, disk: &'a Attached) -> Step<'a, String>;
    /// Closes it.
    fn remove<'a>(&'a self, disk: &'a Attached) -> Step<'a, ()>;
    /// Whether a tapdisk may have been away for a while.
    fn was_away(&self) -> bool;
}

/// One attached disk of one guest.
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
    /// It is read-only, whether the program or the toolstack says so.
    pub read_only: bool,
    /// The guest's kernel.
    pub node: Node,
    /// Its access to Xen.
    pub port: XenPort,
}

/// The state of a machine.
pub struct Machine {
    pub(crate) world: World,
    /// Number of the machine in its world; a new one starts after each power cut.
    pub(crate) boot: u64,
    pub(crate) limits: StackLimits,
    /// When writes become durable.
    pub(crate) cache: CacheMode,
    pub(crate) toolstack: SimHost,
    pub(crate) disks: RefCell<Vec<Attached>>,
    /// All disks that the machine ever had, and whether each was opened read-only.
    pub(crate) setups: RefCell<Vec<(Setup, bool)>>,
    /// tapdisk finds its disks by their script.
    pub(crate) watching: bool,
    /// Its program is tapback, and this opens the disks that it gives to guests.
    pub(crate) script: Option<Rc<dyn Script>>,
    /// The type of its guests' back ends.
    pub(crate) kind: &'static str,
    /// How a command line names the disks of its guests, and their number.
    pub(crate) vdev: (&'static str, VbdId),
    pub(crate) tapdisk: RefCell<Option<SimHost>>,
    pub(crate) starts: Rc<Cell<u32>>,
    /// Processes that serve disks and have not ended yet.
    pub(crate) running: Cell<usize>,
    waiter: OneWaiter,
    /// No more kills.
    pub(crate) spared: Cell<bool>,
    /// Two processes were told to serve one disk; one of them does.
    pub(crate) rivals: Cell<bool>,
    /// The guest whose ring may be unrecoverable.
    pub(crate) broken: Cell<Option<DomId>>,
    /// Images may be absent, and a complaint about that is right.
    pub(crate) absences: Cell<bool>,
    /// Number of complaints of tapdisk.
    pub(crate) told: Cell<u32>,
    /// Tapdisk is asked to stop, and so is each that is started in place of one that has lost something.
    pub(crate) stopping: Cell<bool>,
    /// A tapdisk may lose its events, or xenstored, and end; another is then started.
    pub(crate) may_lose: Cell<bool>,
    /// The power is off: nothing starts any more.
    pub(crate) off: Cell<bool>,
    /// An image could not be closed, and the loss was reported.
    pub(crate) close_failed: Cell<bool>,
}

impl Machine {
    /// A machine without guests, whose tapdisk gets its disks on the command line.
    pub fn new(world: &World, limits: StackLimits) -> Rc<Self> {
        Self::with(world, limits, CacheMode::WriteBack, false)
    }

    /// The same, with another cache mode.
    pub fn caching(world: &World, limits: StackLimits, cache: CacheMode) -> Rc<Self> {
        Self::with(world, limits, cache, false)
    }

    /// A machine without guests, whose tapdisk watches xenstore for disks.
    pub fn watching(world: &World, limits: StackLimits) -> Rc<Self> {
        Self::with(world, limits, CacheMode::WriteBack, true)
    }

    /// The same with tapback, for disks that `script` opens.
    pub(crate) fn through_tapback(world: &World, limits: StackLimits, script: Rc<dyn Script>) -> Rc<Self> {
        let kind = world.setting("tapback-type", &["vbd3", "vbd"]);
        let own = Self::parts(world, limits, CacheMode::WriteBack, true);
        Rc::new(Self { script: Some(script), kind, ..own })
    }

    fn with(world: &World, limits: StackLimits, cache: CacheMode, watching: bool) -> Rc<Self> {
        Rc::new(Self::parts(world, limits, cache, watching))
    }

    fn parts(world: &World, limits: StackLimits, cache: CacheMode, watching: bool) -> Self {
        let boot = world.next_boot();
        Self {
            toolstack: SimHost::start(&world.kernel, &world.xen, "toolstack", boot),
            boot,
            world: world.clone(),
            limits,
            cache,
            setups: RefCell::default(),
            disks: RefCell::default(),
            watching,
            script: None,
            kind: "vbd",
            vdev: if watching { NAMES[0] } else { world.setting("vdev", &NAMES) },
            tapdisk: RefCell::default(),
            starts: Rc::default(),
            running: Cell::new(0),
            waiter: OneWaiter::default(),
            spared: Cell::new(false),
            rivals: Cell::new(false),
            broken: Cell::new(None),
            stopping: Cell::new(false),
            may_lose: Cell::new(false),
            absences: Cell::new(false),
            told: Cell::new(0),
            off: Cell::new(false),
            close_failed: Cell::new(false),
        }
    }

    /// Attaches `setup` to a new guest as its disk.
    pub async fn attach(&self, setup: Setup, number: u64) -> Attached {
        self.attach_with(setup, number, false).await
    }

    /// The same, with a read-only disk.
    pub async fn attach_read_only(&self, setup: Setup, number: u64) -> Attached {
        self.attach_with(setup, number, true).await
    }

    async fn attach_with(&self, setup: Setup, number: u64, read_only: bool) -> Attached {
        let attached = Attached { read_only, ..self.new_guest(setup, number) };
        let Attached { dom, vbd, paths, .. } = &attached;
        let port = &self.toolstack.port;
        if self.world.setting("domain-id-known", &[false, true])
            && let Err(error) = port.write("/local/domain/0/domid", b"0").await
        {
            self.world.fail(Invariant::K1, format!("the toolstack failed to write our domain id: {error:?}"));
        }
        if let Err(error) = attach_vbd(port, *dom, *vbd, paths, read_only).await {
            self.world.fail(Invariant::K1, format!("the toolstack failed to attach a disk: {error:?}"));
        }
        self.add(&attached);
        attached
    }

    /// Adds `disk` to the disks of the machine.
    pub(crate) fn add(&self, disk: &Attached) {
        self.disks.borrow_mut().push(disk.clone());
        // The program or the toolstack decides it.
        let read_only = self.limits.read_only || disk.read_only;
        self.setups.borrow_mut().push((disk.setup.clone(), read_only));
    }

    /// A new guest without a disk; `setup` will be its xvda.
    pub fn new_guest(&self, setup: Setup, number: u64) -> Attached {
        self.guest_in(self.world.xen.create_domain(), setup, number)
    }

    /// As [`Machine::new_guest`], in a domain that has the number of an earlier one.
    pub fn guest_with_number(&self, setup: Setup, dom: DomId) -> Attached {
        self.world.xen.create_domain_again(dom);
        self.guest_in(dom, setup, NEXT_GUEST)
    }

    fn guest_in(&self, dom: DomId, setup: Setup, number: u64) -> Attached {
        let node = self.world.sim.node("guest", self.boot << 32 | number);
        let port = self.world.xen.attach(dom, &node);
        Attached {
            dom,
            vbd: self.vdev.1,
            paths: VbdPaths::new(self.kind, dom, self.vdev.1),
            setup,
            read_only: false,
            node,
            port,
        }
    }

    /// Replaces the kernel of a guest, as a reboot does: no grant and no port of the first is left.
    pub async fn next_kernel(&self, disk: &Attached) -> Attached {
        disk.node.kill();
        disk.node.dead().await;
        self.world.xen.reset_grants(disk.dom);
        let next = self.guest_in(disk.dom, disk.setup.clone(), NEXT_GUEST);
        self.disks.borrow_mut().iter_mut().filter(|d| d.dom == disk.dom).for_each(|d| *d = next.clone());
        next
    }

    /// Removes the in-flight record of a disk, which no tapdisk serves now.
    pub fn lose_record(&self, disk: &Attached) {
        let record = format!("ring-{}-{}", disk.dom.0, disk.vbd.0);
        self.world.sim.remark("administrator", || format!("removes the record {record}"));
        self.toolstack.port.remove_region(&record);
    }

    /// From now on images may be absent.
    pub fn expect_absences(&self) {
        self.absences.set(true);
    }

    /// How often tapdisk has tried to open an absent image, and how often it has complained.
    pub fn attempts(&self) -> (u64, u32) {
        (self.world.storage.missing(), self.told.get())
    }

    /// From now on the ring of `dom` may be unrecoverable, and a complaint about that is right.
    pub fn expect_broken_ring(&self, dom: DomId) {
        self.broken.set(Some(dom));
    }

    /// When writes become durable.
    pub fn cache(&self) -> CacheMode {
        self.cache
    }

    /// Whether tapdisk watches xenstore for disks.
    pub fn is_watching(&self) -> bool {
        self.watching
    }

    /// How often tapdisk was started.
    pub fn starts(&self) -> Rc<Cell<u32>> {
        Rc::clone(&self.starts)
    }

    pub(crate) fn wake_waiter(&self) {
        self.waiter.wake();
    }

    /// The running tapdisk.
    pub fn tapdisk(&self) -> Option<SimHost> {
        self.tapdisk.borrow().clone()
    }

    /// Waits until the running tapdisk has released everything.
    pub(crate) async fn all_ended(&self) {
        poll_fn(|cx| {
            if self.running.get() == 0 {
                return Poll::Ready(());
            }
            self.waiter.wait(cx.waker());
            Poll::Pending
        })
        .await;
    }

    /// Whether an image could not be closed.
    pub fn close_failed(&self) -> bool {
        self.close_failed.get()
    }

    /// Ends the kills. A restart in progress continues.
    pub fn end_kills(&self) {
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

    /// Stops everything at once, guests included; nothing is started again.
    pub fn stop(&self) {
        self.off.set(true);
        self.nodes().iter().for_each(Node::kill);
    }

    /// Cuts the power. Files are left in one of their possible states, and the histories know of the cut.
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

    /// Detaches all disks as a toolstack does, and waits until tapdisk has released them.
    pub async fn detach_all(&self) {
        let disks = self.disks.borrow().clone();
        if self.watching {
            for disk in &disks {
                self.unplug(disk).await;
            }
            return self.stop_tapdisk().await;
        }
        for disk in &disks {
            if let Err(error) = self.take_offline(disk, false).await {
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

    /// Checks that everything tapdisk ever had of other domains has been released.
    pub fn check_leaks(&self) {
        if is_broken(Oracle::LeftoversIgnored) {
            return;
        }
        let counts = self.world.xen.counts(DomId(0));
        if counts.maps + counts.channels + counts.watches + counts.transactions > 0 {
            self.world.fail(Invariant::K1, format!("the control domain still has {counts:?}"));
        }
        let mut regions = self.world.xen.regions();
        // A file's record of synchronisations stays until the host reboots. A process with a run folder of its own that
        // was refused the disk leaves the page of its lock there.
        regions.retain(|name| !name.starts_with("sync-") && !name.contains('/'));
        if !regions.is_empty() {
            self.world
                .fail(Invariant::K1, format!("in-flight records are left over: {}", regions.join(", ")));
        }
    }
}
