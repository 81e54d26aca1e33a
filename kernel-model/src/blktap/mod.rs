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

pub use process::ProcessTap;

use crate::blkfront::SegmentLayout;
use crate::gendisk::{BlockDriver, BlockRequest, Gendisk, QueueLimits};
use queue::{Pending, SLOTS};
use sim::{Entity, FaultKind, Label, Node, Sim};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::{Rc, Weak};
use tap_host::{Errno, OneWaiter, SectorRange};
use xen_model::Page;

/// Whether the block device cannot be removed at this moment, although nobody uses it.
pub(crate) static TAP_BUSY: Label =
    Label::new("tap-busy", "removal {n} meets a program that looks at the device ({})");

/// Whether a call fails for lack of memory.
pub(crate) static TAP_CALL: Label =
    Label::new("tap-call", "call {n} to the blktap2 module fails with ENOMEM ({})");

static TAP_CALL_KIND: FaultKind = FaultKind { name: "tap-call", max_ppm: 300_000 };
static TAP_BUSY_KIND: FaultKind = FaultKind { name: "tap-busy", max_ppm: 400_000 };

/// The labels of this file, for registration.
pub(crate) static LABELS: [&Label; 2] = [&TAP_BUSY, &TAP_CALL];

/// Which module the host has.
///
/// | | requests come onto the ring | after responses | an idle or unknown id | in flight | device made by |
/// |---|---|---|---|---|---|
/// | 2009 | in poll | the queue goes on | is ignored | 32 | 202 |
/// | dkms | in poll | at the next poll | halts the host | 32 | 208, says what it knows |
/// | XenServer | in poll | at the next poll | halts the host | 32 | 208, other layout |
/// | OpenXT | at once | the queue goes on | halts the host | 16 | 208, says what it knows |
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TapKind {
    /// Xen's kernels of 2009 and 2010.
    Xen2009,
    /// blktap-dkms.
    Dkms,
    /// XenServer's and XCP-ng's 4.19.
    XenServer,
    /// OpenXT's 6.1.
    OpenXt,
}

impl TapKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Dkms, Self::XenServer, Self::OpenXt, Self::Xen2009];

    /// Whether requests come onto the ring only while the process polls it.
    fn fills_in_poll(self) -> bool {
        self != Self::OpenXt
    }

    /// Whether its devices can have flushes and trims, and it says which of them it knows.
    pub fn says_what_it_knows(self) -> bool {
        matches!(self, Self::Dkms | Self::OpenXt)
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
/// Chooses how the sectors of a request lie in its pages.
pub type TapLayoutOf = Rc<dyn Fn(SectorRange) -> SegmentLayout>;

struct Module {
    sim: Sim,
    kind: TapKind,
    minors_max: u32,
    /// Data pages for each device.
    pages_max: usize,
    taps: RefCell<BTreeMap<u32, Rc<Tap>>>,
    trouble: RefCell<Option<OnTrouble>>,
    layout: RefCell<Option<TapLayoutOf>>,
    removals: Cell<u32>,
    busy_ppm: u32,
    /// Calls that may fail, and how often they do.
    calls: Cell<u32>,
    call_ppm: Cell<u32>,
}

/// The module of a host; clones share it.
#[derive(Clone)]
pub struct TapModule(Rc<Module>);

impl TapModule {
    /// A module for at most `minors_max` devices, each with `pages_max` pages for data, at least 11.
    pub fn new(sim: &Sim, kind: TapKind, minors_max: u32, pages_max: usize) -> Self {
        assert!(pages_max >= queue::MAX_SEGMENTS, "{pages_max} pages are too few for one request");
        let busy_ppm = sim.swarm().rate_ppm(&TAP_BUSY_KIND);
        Self(Rc::new(Module {
            sim: sim.clone(),
            kind,
            minors_max,
            pages_max,
            taps: RefCell::default(),
            trouble: RefCell::default(),
            layout: RefCell::default(),
            removals: Cell::new(0),
            busy_ppm,
            calls: Cell::new(0),
            call_ppm: Cell::new(0),
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

    /// Asks the process of `minor` to close the device, as an administrator does, where the module has that.
    pub fn ask_to_close(&self, minor: u32) -> bool {
        let tap = self.0.taps.borrow().get(&minor).cloned();
        match tap {
            Some(tap) if matches!(self.0.kind, TapKind::Xen2009 | TapKind::OpenXt) => tap.send_close(),
            _ => false,
        }
    }

    /// Reserves a minor.
    fn allocate(&self) -> Result<u32, Errno> {
        self.has_memory()?;
        let mut taps = self.0.taps.borrow_mut();
        let minor = (0..self.0.minors_max).find(|minor| !taps.contains_key(minor)).ok_or(Errno::ENOMEM)?;
        taps.insert(minor, Rc::new(Tap::new(&self.0, minor)));
        Ok(minor)
    }

    fn tap(&self, minor: u32) -> Option<Rc<Tap>> {
        self.0.taps.borrow().get(&minor).cloned()
    }

    /// Frees a minor.
    fn free(&self, minor: u32) -> Result<(), Errno> {
        // To open the control node.
        self.has_memory()?;
        let kind = self.0.kind;
        let Some(tap) = self.tap(minor) else {
            return Err(if kind == TapKind::Xen2009 { Errno::EINVAL } else { Errno::ENODEV });
        };
        if !tap.is_taken() && tap.disk.borrow().is_none() {
            self.0.taps.borrow_mut().remove(&minor);
            return Ok(());
        }
        match kind {
            TapKind::Dkms | TapKind::XenServer => Err(Errno::EBUSY),
            TapKind::Xen2009 => {
                tap.send_close();
                Err(Errno::EBUSY)
            }
            // It goes once it is closed.
            TapKind::OpenXt => {
                if !tap.freed.replace(true) {
                    tap.send_close();
                }
                Ok(())
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
    ring: RefCell<Option<OpenRing>>,
    /// The ring is closed; its device lives on until its last opener has closed it.
    dying: Cell<bool>,
    /// It is not reserved any more, and goes once it is closed.
    freed: Cell<bool>,
    disk: RefCell<Option<Gendisk>>,
    /// Requests that are not on the ring.
    queue: RefCell<VecDeque<Rc<BlockRequest>>>,
    /// Nothing calls the process before the next poll.
    stopped: Cell<bool>,
    pending: RefCell<[Option<Pending>; SLOTS]>,
    pages_used: Cell<usize>,
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
    fn new(module: &Rc<Module>, minor: u32) -> Self {
        Self {
            module: Rc::downgrade(module),
            minor,
            ring: RefCell::default(),
            dying: Cell::new(false),
            freed: Cell::new(false),
            disk: RefCell::default(),
            queue: RefCell::default(),
            stopped: Cell::new(false),
            pending: RefCell::default(),
            pages_used: Cell::new(0),
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

    /// Opens and maps the ring for the process of `node`.
    fn open(self: &Rc<Self>, node: &Node) -> Result<Page, Errno> {
        if self.freed.get() {
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
        *self.disk.borrow_mut() = Some(disk);
        Ok(())
    }

    /// Removes the block device, if nobody uses it.
    fn remove(&self) -> Result<(), Errno> {
        if self.kind() == TapKind::Xen2009 {
            return Err(Errno::ENOTTY);
        }
        let Some(disk) = self.disk.borrow().clone() else { return Ok(()) };
        self.module().has_memory()?;
        let module = self.module().0;
        let nth = module.removals.replace(module.removals.get() + 1);
        let busy = module.sim.nth_fault(Entity::WORLD, &TAP_BUSY, nth, module.busy_ppm, |_| 1);
        if !disk.openers().is_empty() || busy != 0 {
            return Err(Errno::EBUSY);
        }
        self.disk.take();
        Ok(())
    }

    /// The ring is closed, by its process or by its death: what is in flight fails, and so does all that comes.
    fn close(&self) {
        self.ring.take();
        for slot in 0..SLOTS {
            let pending = self.pending.borrow_mut()[slot].take();
            pending.into_iter().for_each(|pending| {
                pending.request.end(Err(Errno::EIO));
            });
        }
        self.pages_used.set(0);
        self.dying.set(true);
        self.caller.wake();
        self.fail_queue();
        self.end_if_unused();
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
        if self.dying.get() && self.disk.borrow().as_ref().is_none_or(|disk| disk.openers().is_empty()) {
            self.disk.take();
            self.dying.set(false);
            self.ended.wake();
            if self.freed.get() {
                self.module().0.taps.borrow_mut().remove(&self.minor);
            }
        }
    }

    /// Calls the process.
    fn call(&self) {
        self.called.set(true);
        self.caller.wake();
    }

    fn send_close(&self) -> bool {
        let page = self.ring.borrow().as_ref().map(|ring| ring.page.clone());
        let Some(page) = page else { return false };
        page.write(tap_abi::blktap::MESSAGE, &[tap_abi::blktap::MESSAGE_CLOSE]);
        self.call();
        true
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
        tap.end_if_unused();
    }
}
