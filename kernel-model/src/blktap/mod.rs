//! Linux's blktap2 module: block devices whose requests a process serves through a ring.
//!
//! ```text
//!   control node            TapModule: reserved minors
//!   ring node of a minor    Tap: one process, its ring and data pages ◄── Gendisk ◄── openers in dom0
//! ```
//!
//! There are several such modules, and they differ in what a process notices; see [`TapKind`]. Written from the
//! modules' behaviour, not from their code, and separately from the stack.
//!
//! What a process does wrong, and what the real kernel answers with a signal to it or a halt of the host, is
//! reported as [`TapTrouble`].

mod process;
mod queue;

pub use process::{ProcessTap, TapCall};

use crate::blkfront::SegmentLayout;
use crate::gendisk::{BlockDriver, BlockRequest, Gendisk, QueueLimits};
use queue::{DataPage, Pending, SLOTS};
use sim::{Entity, FaultKind, Label, Node, Sim};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::{Rc, Weak};
use tap_abi::blktap::{FLAG_FLUSH, FLAG_PHYSICAL_SIZE, FLAG_READ_ONLY, FLAG_TRIM, FLAG_TRIM_ZEROES};
use tap_host::{Errno, OneWaiter, SectorRange, TAP_NAME_BYTES};
use xen_model::Page;

/// Whether the block device cannot be removed at this moment, although nobody uses it.
pub(crate) static TAP_BUSY: Label =
    Label::new("tap-busy", "removal {n} meets a program that looks at the device ({})");

/// Whether a call fails for lack of memory.
pub(crate) static TAP_CALL: Label =
    Label::new("tap-call", "call {n} to the blktap2 module fails with ENOMEM ({})");

static TAP_CALL_KIND: FaultKind = FaultKind { name: "tap-call", max_ppm: 300_000 };
static TAP_BUSY_KIND: FaultKind = FaultKind { name: "tap-busy", max_ppm: 400_000 };

/// How long OpenXT's module waits before it looks again at a device of a closed ring, in nanoseconds.
const LOOK_NS: u64 = 5_000_000_000;

/// The labels of this file, for registration.
pub(crate) static LABELS: [&Label; 2] = [&TAP_BUSY, &TAP_CALL];

/// Which module the host has.
///
/// | | XenServer | OpenXT | dkms | 2009 |
/// |---|---|---|---|---|
/// | requests come onto the ring | in poll | at once | | |
/// | after responses that made room | at the next poll | the queue goes on | | |
/// | in flight | 32 | 16 | | |
/// | a process that asks says of the module | it can be used | it can be used | it unmaps data | it lacks 208 |
/// | a closed ring with users of its device | is being closed until they have gone | is closed | | |
/// | freeing a device in use | `EBUSY` | asks to close it, and succeeds | `EBUSY` | succeeds |
///
/// Devices of the last two are never made, so that nothing about requests is modelled. XenServer's 4.19 starts a queue
/// that had stopped again while it looks at responses of the same device; the model leaves that to the next poll, since
/// [`tap_host::TapRing::pull`] promises no more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TapKind {
    /// XenServer's and XCP-ng's 4.19.
    XenServer,
    /// OpenXT's 6.1.
    OpenXt,
    /// blktap-dkms, up to Linux 3.
    Dkms,
    /// Xen's kernels of 2009 and 2010, Linux 2.6.
    Xen2009,
}

impl TapKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::XenServer, Self::OpenXt, Self::Dkms, Self::Xen2009];
    /// Those whose devices can be served.
    pub const SERVED: [Self; 2] = [Self::XenServer, Self::OpenXt];

    /// Whether requests come onto the ring only while the process polls it.
    fn fills_in_poll(self) -> bool {
        self != Self::OpenXt
    }

    /// Whether its devices can have flushes and trims, and it says which of them it knows.
    pub fn says_what_it_knows(self) -> bool {
        matches!(self, Self::Dkms | Self::OpenXt)
    }

    /// The flags of devices that it knows, if it says so.
    fn known_flags(self) -> Option<u64> {
        let all = FLAG_READ_ONLY | FLAG_PHYSICAL_SIZE | FLAG_FLUSH | FLAG_TRIM;
        match self {
            Self::Dkms => Some(all | FLAG_TRIM_ZEROES),
            Self::OpenXt => Some(all),
            Self::XenServer | Self::Xen2009 => None,
        }
    }
}

/// What a process did that a real kernel does not survive, or that ends the process.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TapTrouble {
    /// The host halts.
    Halt(String),
    /// The process is ended by a signal.
    Fault(String),
    /// Memory outside of a request's segments was changed.
    Strayed(String),
}

/// Called with each trouble.
type OnTrouble = Rc<dyn Fn(TapTrouble)>;
/// Called with each block device that is made.
type OnMade = Rc<dyn Fn(Gendisk)>;
/// Chooses how the sectors of a request lie in its pages.
pub type TapLayoutOf = Rc<dyn Fn(SectorRange) -> SegmentLayout>;

struct Module {
    sim: Sim,
    kind: TapKind,
    minors_max: u32,
    /// Data pages of all devices together.
    pages_max: usize,
    pages_used: Cell<usize>,
    /// The devices whose queue has stopped for lack of pages, first come first.
    starved: RefCell<VecDeque<u32>>,
    taps: RefCell<BTreeMap<u32, Rc<Tap>>>,
    trouble: RefCell<Option<OnTrouble>>,
    made: RefCell<Option<OnMade>>,
    layout: RefCell<Option<TapLayoutOf>>,
    removals: Cell<u32>,
    busy_ppm: u32,
    /// Calls that may fail, and how often they do.
    calls: Cell<u32>,
    call_ppm: Cell<u32>,
    refused: RefCell<BTreeMap<TapCall, Errno>>,
}

/// The module of a host; clones share it.
#[derive(Clone)]
pub struct TapModule(Rc<Module>);

impl TapModule {
    /// A module for at most `minors_max` devices, which share `pages_max` pages for data, at least 11.
    pub fn new(sim: &Sim, kind: TapKind, minors_max: u32, pages_max: usize) -> Self {
        assert!(pages_max >= queue::MAX_SEGMENTS, "{pages_max} pages are too few for one request");
        let busy_ppm = sim.swarm().rate_ppm(&TAP_BUSY_KIND);
        Self(Rc::new(Module {
            sim: sim.clone(),
            kind,
            minors_max,
            pages_max,
            pages_used: Cell::new(0),
            starved: RefCell::default(),
            taps: RefCell::default(),
            trouble: RefCell::default(),
            made: RefCell::default(),
            layout: RefCell::default(),
            removals: Cell::new(0),
            busy_ppm,
            calls: Cell::new(0),
            call_ppm: Cell::new(0),
            refused: RefCell::default(),
        }))
    }

    /// From now on calls may fail for lack of memory.
    pub fn allow_errors(&self) {
        self.0.call_ppm.set(self.0.sim.swarm().rate_ppm(&TAP_CALL_KIND));
    }

    /// Whether a call has the memory that it needs.
    fn has_memory(&self) -> Result<(), Errno> {
        let nth = self.0.calls.replace(self.0.calls.get() + 1);
        let fails = self.0.sim.nth_fault(Entity::WORLD, &TAP_CALL, nth, self.0.call_ppm.get(), |_| 1);
        if fails == 0 { Ok(()) } else { Err(Errno::ENOMEM) }
    }

    /// The page of a ring that is open, which the kernel owns.
    pub fn ring_page(&self, minor: u32) -> Option<Page> {
        let taps = self.0.taps.borrow();
        let ring = taps.get(&minor)?.ring.borrow();
        ring.as_ref().map(|ring| ring.page.clone())
    }

    /// Which module it is.
    pub fn kind(&self) -> TapKind {
        self.0.kind
    }

    /// Calls `look` with each trouble.
    pub fn on_trouble(&self, look: impl Fn(TapTrouble) + 'static) {
        *self.0.trouble.borrow_mut() = Some(Rc::new(look));
    }

    /// Calls `look` with each block device that is made, as udev is told of it.
    pub fn on_made(&self, look: impl Fn(Gendisk) + 'static) {
        *self.0.made.borrow_mut() = Some(Rc::new(look));
    }

    /// Sets `layout` to choose how the sectors of each request lie in its pages; by default pages are whole.
    pub fn set_layout(&self, layout: TapLayoutOf) {
        *self.0.layout.borrow_mut() = Some(layout);
    }

    /// The minors that are reserved.
    pub fn minors(&self) -> Vec<u32> {
        self.0.taps.borrow().keys().copied().collect()
    }

    /// The block device of `minor`, if there is one.
    pub fn disk(&self, minor: u32) -> Option<Gendisk> {
        self.0.taps.borrow().get(&minor)?.disk.borrow().clone()
    }

    /// The minors whose ring a process has open, or which the kernel is still closing.
    pub fn open_rings(&self) -> Vec<u32> {
        let taps = self.0.taps.borrow();
        taps.iter().filter(|(_, tap)| tap.is_taken()).map(|(minor, _)| *minor).collect()
    }

    /// Asks for the end of the device `minor`, as an administrator does, where the module has that. Its number is freed
    /// at once if nothing of it is open, and otherwise stays reserved if its process removes the block device. Whether
    /// a process was asked.
    pub fn ask_to_close(&self, minor: u32) -> bool {
        let tap = self.tap(minor).filter(|_| self.0.kind == TapKind::OpenXt);
        tap.is_some_and(|tap| tap.shut_down() && tap.ring.borrow().is_some())
    }

    /// The minors that are reserved and have no name, with the processes that reserved them.
    pub fn unnamed(&self) -> Vec<(u32, Node)> {
        let taps = self.0.taps.borrow();
        let unnamed = taps.values().filter(|tap| tap.name.borrow().is_empty());
        unnamed.map(|tap| (tap.minor, tap.reserved_by.clone())).collect()
    }

    /// Reserves a minor for the process of `node`.
    fn allocate(&self, node: &Node) -> Result<u32, Errno> {
        self.has_memory()?;
        let mut taps = self.0.taps.borrow_mut();
        let minor = (0..self.0.minors_max).find(|minor| !taps.contains_key(minor)).ok_or(Errno::ENOMEM)?;
        taps.insert(minor, Rc::new(Tap::new(&self.0, minor, node)));
        Ok(minor)
    }

    fn tap(&self, minor: u32) -> Option<Rc<Tap>> {
        self.0.taps.borrow().get(&minor).cloned()
    }

    /// Names a device, through sysfs.
    fn set_name(&self, minor: u32, name: &str) -> Result<(), Errno> {
        self.has_memory()?;
        let tap = self.tap(minor).ok_or(Errno::ENOENT)?;
        if self.0.kind == TapKind::Xen2009 {
            // Only while it is paused.
            return Err(Errno::EPERM);
        }
        if name.len() > TAP_NAME_BYTES {
            return Err(Errno::ENAMETOOLONG);
        }
        name.clone_into(&mut tap.name.borrow_mut());
        Ok(())
    }

    /// The devices and their names, from sysfs.
    fn names(&self) -> Result<Vec<(u32, String)>, Errno> {
        self.has_memory()?;
        Ok(self.0.taps.borrow().values().map(|tap| (tap.minor, tap.shown_name())).collect())
    }

    /// Frees a minor.
    fn free(&self, minor: u32) -> Result<(), Errno> {
        // To open the control node.
        self.has_memory()?;
        self.accepts(TapCall::Free)?;
        let kind = self.0.kind;
        let Some(tap) = self.tap(minor) else {
            return Err(if kind == TapKind::Xen2009 { Errno::EINVAL } else { Errno::ENODEV });
        };
        match kind {
            TapKind::OpenXt => {
                tap.shut_down();
                Ok(())
            }
            _ if tap.is_unused() => {
                self.forget(minor);
                Ok(())
            }
            TapKind::Dkms | TapKind::XenServer => Err(Errno::EBUSY),
            TapKind::Xen2009 => Ok(()),
        }
    }

    /// A minor is not reserved any more.
    fn forget(&self, minor: u32) {
        self.0.taps.borrow_mut().remove(&minor);
    }

    /// Pages of the device `of` are free again, which gets nothing by itself: its process has answered, and polls. As
    /// XenServer's module one other device that waits for pages goes on, as OpenXT's all of them.
    fn put_pages(&self, of: u32, count: usize) {
        let module = &self.0;
        module.pages_used.set(module.pages_used.get() - count);
        module.starved.borrow_mut().retain(|minor| *minor != of);
        if module.pages_max - module.pages_used.get() < queue::MAX_SEGMENTS {
            return;
        }
        let most = if module.kind == TapKind::XenServer { 1 } else { usize::MAX };
        for _ in 0..most {
            let Some(minor) = module.starved.borrow_mut().pop_front() else { break };
            if let Some(tap) = self.tap(minor) {
                tap.stopped.set(false);
                tap.call();
            }
        }
    }

    fn trouble(&self, trouble: TapTrouble) {
        let look = self.0.trouble.borrow().clone();
        look.into_iter().for_each(|look| look(trouble.clone()));
    }
}

/// The process that has a ring open.
struct OpenRing {
    node: Node,
    page: Page,
}

/// One reserved device.
struct Tap {
    module: Weak<Module>,
    minor: u32,
    /// The process that has reserved it.
    reserved_by: Node,
    /// Empty until it is named.
    name: RefCell<String>,
    ring: RefCell<Option<OpenRing>>,
    /// The ring's process has let go of it, and the module keeps it until the last opener has closed its device.
    dying: Cell<bool>,
    /// Its end was asked for: it goes together with its block device, and cannot be opened any more.
    shutdown: Cell<bool>,
    disk: RefCell<Option<Gendisk>>,
    /// Requests that are not on the ring.
    queue: RefCell<VecDeque<Rc<BlockRequest>>>,
    /// Nothing calls the process before the next poll.
    stopped: Cell<bool>,
    pending: RefCell<[Option<Pending>; SLOTS]>,
    /// Pages of requests that have ended.
    spare: RefCell<Vec<DataPage>>,
    /// Index after the last request, and after the last response that was looked at.
    req_prod: Cell<u32>,
    rsp_cons: Cell<u32>,
    /// A last opener has closed the device since the last poll.
    was_closed: Cell<bool>,
    /// The process was called and has not noticed.
    called: Cell<bool>,
    caller: OneWaiter,
    /// Waits for the end of the device.
    ended: OneWaiter,
}

impl Tap {
    fn new(module: &Rc<Module>, minor: u32, node: &Node) -> Self {
        Self {
            module: Rc::downgrade(module),
            minor,
            reserved_by: node.clone(),
            name: RefCell::default(),
            ring: RefCell::default(),
            dying: Cell::new(false),
            shutdown: Cell::new(false),
            disk: RefCell::default(),
            queue: RefCell::default(),
            stopped: Cell::new(false),
            pending: RefCell::default(),
            spare: RefCell::default(),
            req_prod: Cell::new(0),
            rsp_cons: Cell::new(0),
            was_closed: Cell::new(false),
            called: Cell::new(false),
            caller: OneWaiter::default(),
            ended: OneWaiter::default(),
        }
    }

    fn module(&self) -> TapModule {
        TapModule(self.module.upgrade().expect("the kernel outlives its devices"))
    }

    fn kind(&self) -> TapKind {
        self.module().kind()
    }

    /// Whether a process has the ring, or the kernel is still closing it.
    fn is_taken(&self) -> bool {
        self.ring.borrow().is_some() || self.dying.get()
    }

    /// Whether nothing keeps it from being freed.
    fn is_unused(&self) -> bool {
        !self.is_taken() && self.disk.borrow().is_none()
    }

    fn shown_name(&self) -> String {
        let name = self.name.borrow();
        if name.is_empty() { self.minor.to_string() } else { name.clone() }
    }

    /// Opens and maps the ring for the process of `node`.
    fn open(self: &Rc<Self>, node: &Node) -> Result<Page, Errno> {
        if self.shutdown.get() {
            return Err(Errno::ENXIO);
        }
        if self.is_taken() {
            return Err(Errno::EBUSY);
        }
        self.module().has_memory()?;
        let page = Page::new();
        // As every ring begins: both events at 1.
        page.store_u32(tap_abi::ring::REQ_EVENT, 1);
        page.store_u32(tap_abi::ring::RSP_EVENT, 1);
        *self.ring.borrow_mut() = Some(OpenRing { node: node.clone(), page: page.clone() });
        [&self.req_prod, &self.rsp_cons].iter().for_each(|index| index.set(0));
        [&self.was_closed, &self.called, &self.stopped].iter().for_each(|flag| flag.set(false));
        let (tap, owner) = (Rc::downgrade(self), node.clone());
        node.on_death(move || {
            if let Some(tap) = tap.upgrade()
                && tap.ring.borrow().as_ref().is_some_and(|ring| ring.node.entity() == owner.entity())
            {
                tap.close();
            }
        });
        Ok(page)
    }

    /// Makes the block device.
    fn create(self: &Rc<Self>, size_sectors: u64, limits: QueueLimits, read_only: bool) -> Result<(), Errno> {
        if self.disk.borrow().is_some() {
            return Err(Errno::EEXIST);
        }
        self.module().has_memory()?;
        let disk = Gendisk::new(&format!("tap{}", self.minor), limits);
        disk.set_size(size_sectors);
        disk.set_read_only(read_only);
        disk.set_driver(Rc::new(Driver(Rc::downgrade(self))));
        *self.disk.borrow_mut() = Some(disk.clone());
        let made = self.module().0.made.borrow().clone();
        made.into_iter().for_each(|made| made(disk.clone()));
        Ok(())
    }

    /// Removes the block device, if nobody uses it.
    fn remove(&self) -> Result<(), Errno> {
        let Some(disk) = self.disk.borrow().clone() else { return Ok(()) };
        self.module().has_memory()?;
        self.module().accepts(TapCall::Remove)?;
        let module = self.module().0;
        let nth = module.removals.replace(module.removals.get() + 1);
        let busy = module.sim.nth_fault(Entity::WORLD, &TAP_BUSY, nth, module.busy_ppm, |_| 1);
        if !disk.openers().is_empty() || busy != 0 {
            return Err(Errno::EBUSY);
        }
        // A device whose end was asked for would be freed here, but its ring is open. Nothing does so later.
        self.disk.take();
        Ok(())
    }

    /// The ring is closed, by its process or by its death: what is in flight fails, and so does all that comes.
    fn close(self: &Rc<Self>) {
        let lives = self.ring.take().is_some_and(|ring| ring.node.is_alive());
        let used = self.disk.borrow().as_ref().is_some_and(|disk| !disk.openers().is_empty());
        if lives && used && self.kind() == TapKind::OpenXt {
            // A user that goes on to read maps its data through the ring's mapping, of which nothing is left. It does
            // so for a process that is killed, too, and nothing in that can prevent it.
            self.halt("its ring is closed by a process that lives, and its device is open".into());
        }
        let mut pages = 0;
        for slot in 0..SLOTS {
            let pending = self.pending.borrow_mut()[slot].take();
            pending.into_iter().for_each(|pending| {
                pages += pending.pages();
                pending.request.end(Err(Errno::EIO));
            });
        }
        self.module().put_pages(self.minor, pages);
        self.dying.set(self.kind() != TapKind::OpenXt);
        self.caller.wake();
        self.fail_queue();
        self.end_if_unused();
        if self.kind() == TapKind::OpenXt {
            self.look_again();
        }
    }

    fn fail_queue(&self) {
        while let Some(request) = self.take_queued() {
            request.end(Err(Errno::EIO));
        }
    }

    fn take_queued(&self) -> Option<Rc<BlockRequest>> {
        self.queue.borrow_mut().pop_front()
    }

    /// The device of a closed ring goes with its last opener.
    fn end_if_unused(&self) {
        let disk = self.disk.borrow().clone();
        if self.ring.borrow().is_some() || disk.as_ref().is_some_and(|disk| !disk.openers().is_empty()) {
            return;
        }
        self.disk.take();
        self.dying.set(false);
        self.ended.wake();
        // The module looks only where it removes a block device.
        if self.shutdown.get() && disk.is_some() {
            self.module().forget(self.minor);
        }
    }

    /// OpenXT's module looks every few seconds whether the device of a closed ring is unused by now.
    fn look_again(self: &Rc<Self>) {
        if self.disk.borrow().is_none() {
            return;
        }
        // Its users get errors from now on, whatever they do.
        self.disk.borrow().iter().for_each(|disk| disk.set_size(0));
        let (tap, sim) = (Rc::clone(self), self.module().0.sim.clone());
        let kernel = sim.node("blktap module", u64::from(self.minor));
        kernel.spawn("look", 0, async move {
            while tap.ring.borrow().is_none() && tap.disk.borrow().is_some() {
                sim.sleep_ns(LOOK_NS).await;
                tap.end_if_unused();
            }
        });
    }

    /// Asks for the end of the device, for the first time, as OpenXT's module does. Whether it was the first time.
    fn shut_down(self: &Rc<Self>) -> bool {
        if self.shutdown.replace(true) {
            return false;
        }
        if self.ring.borrow().is_some() {
            self.send_close();
        } else if self.is_unused() {
            self.module().forget(self.minor);
        }
        true
    }

    /// Calls the process.
    fn call(&self) {
        self.called.set(true);
        self.caller.wake();
    }

    fn send_close(&self) {
        let page = self.ring.borrow().as_ref().map(|ring| ring.page.clone());
        if let Some(page) = page {
            page.write(tap_abi::blktap::MESSAGE, &[tap_abi::blktap::MESSAGE_CLOSE]);
            self.call();
        }
    }
}

/// The device's side of a [`Tap`].
struct Driver(Weak<Tap>);

impl BlockDriver for Driver {
    fn queue(&self, request: Rc<BlockRequest>) {
        let Some(tap) = self.0.upgrade() else {
            request.end(Err(Errno::EIO));
            return;
        };
        tap.queue.borrow_mut().push_back(request);
        if tap.ring.borrow().is_none() {
            return tap.fail_queue();
        }
        let at_once = !tap.kind().fills_in_poll() && tap.fill();
        if at_once {
            tap.push();
        }
        if at_once || !tap.stopped.get() {
            tap.call();
        }
    }

    fn released(&self) {
        let Some(tap) = self.0.upgrade() else { return };
        tap.was_closed.set(true);
        if tap.ring.borrow().is_some() {
            tap.call();
        }
        if tap.dying.get() {
            tap.end_if_unused();
        }
    }
}
