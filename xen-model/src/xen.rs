//! The machine: domains and all state that outlives a process.

use crate::channels::{Channels, PortId};
use crate::copies::{COPY_ERROR, COPY_ERROR_KIND, NO_MEMORY, NO_MEMORY_KIND};
use crate::cpu::{OTHER_CPUS, OTHER_CPUS_KIND, STORE_BUFFERED, STORE_BUFFERED_KIND};
use crate::event::XenEvent;
use crate::grants::{Grant, GrantTable};
use crate::page::Page;
use crate::store::{Quota, Store};
use sim::{Entity, FaultKind, Label, Sim, Timed};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use tap_host::{DomId, Errno, GrantRef, Port};

pub(crate) static EVENT_LATE: Label = Label::new("event-late", "event {n} arrives {} ns late");
pub(crate) static EVENT_AGAIN: Label =
    Label::new("event-again", "event {n} arrives again {} ns later, as a spurious event");
pub(crate) static DEAF: Label = Label::new("deaf", "the device for events fails after {} ns");
pub(crate) static STORE_LOST: Label =
    Label::new("store-lost", "the connection to xenstored breaks after {} ns");
pub(crate) static STORE_LATE: Label = Label::new("store-late", "operation {n} takes {} ns more");
pub(crate) static WATCH_LATE: Label = Label::new("watch-late", "watch event {n} comes {} ns late");
pub(crate) static STORE_CONFLICT: Label = Label::new("store-conflict", "the transaction must be repeated");
pub(crate) static CLOSE_LATE: Label =
    Label::new("close-late", "port {n} of the dead process is closed {} ns late");

pub(crate) static STORE_ERROR: Label = Label::new(
    "store-error",
    "the operation fails (1 EBUSY, 2 ENOMEM, 3 EIO, 4 EBUSY for a second or two, 5 EIO of a commit that was done, 6 ENOSPC): {}",
);

/// The labels of this model's decisions.
pub static LABELS: [&Label; 13] = [
    &EVENT_LATE,
    &STORE_LATE,
    &WATCH_LATE,
    &STORE_CONFLICT,
    &CLOSE_LATE,
    &STORE_ERROR,
    &OTHER_CPUS,
    &STORE_BUFFERED,
    &COPY_ERROR,
    &NO_MEMORY,
    &EVENT_AGAIN,
    &DEAF,
    &STORE_LOST,
];

static EVENT_LATE_KIND: FaultKind = FaultKind { name: "event-late", max_ppm: 500_000 };
static EVENT_AGAIN_KIND: FaultKind = FaultKind { name: "event-again", max_ppm: 300_000 };
static DEAF_KIND: FaultKind = FaultKind { name: "deaf", max_ppm: 300_000 };
static STORE_LOST_KIND: FaultKind = FaultKind { name: "store-lost", max_ppm: 300_000 };
static STORE_LATE_KIND: FaultKind = FaultKind { name: "store-late", max_ppm: 500_000 };
static STORE_CONFLICT_KIND: FaultKind = FaultKind { name: "store-conflict", max_ppm: 300_000 };
static STORE_ERROR_KIND: FaultKind = FaultKind { name: "store-error", max_ppm: 30_000 };
static CLOSE_LATE_KIND: FaultKind = FaultKind { name: "close-late", max_ppm: 500_000 };

/// The parent entity of the ports of all domains.
const PORTS: Entity = Entity::WORLD.child("event-channel", 0);

/// The properties of a machine.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// xenstored's limits for guests.
    pub quota: Quota,
    /// Minimum duration of a xenstore operation in nanoseconds.
    pub store_ns: u64,
    /// Longest delay of an event, as a power of two of nanoseconds.
    pub event_late_bits: u32,
    /// Spurious events may follow an event.
    pub events_again: bool,
    /// Longest delay of xenstored, as a power of two of nanoseconds.
    pub store_late_bits: u32,
    /// Longest time that a dead process keeps a port, as a power of two of nanoseconds.
    pub close_late_bits: u32,
    /// Each domain has its own CPUs: others run between two accesses of shared memory, and stores arrive late.
    /// Otherwise the whole machine has one CPU, which sees its own stores at once.
    pub other_cpus: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            quota: Quota::default(),
            store_ns: 5_000,
            event_late_bits: 18,
            events_again: false,
            store_late_bits: 22,
            close_late_bits: 24,
            other_cpus: true,
        }
    }
}

/// The resources of others that a domain holds, for leak checks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Mapped grants.
    pub maps: u32,
    /// Event channel ports, except those of dead processes.
    pub channels: u32,
    /// Watches.
    pub watches: u32,
    /// Transactions.
    pub transactions: u32,
}

pub(crate) struct Rates {
    pub(crate) event_late: u32,
    pub(crate) event_again: u32,
    pub(crate) deaf: u32,
    pub(crate) store_lost: u32,
    pub(crate) store_late: u32,
    pub(crate) conflict: u32,
    pub(crate) close_late: u32,
    pub(crate) store_error: u32,
    pub(crate) copy_error: u32,
    pub(crate) no_memory: u32,
    pub(crate) other_cpus: u32,
    pub(crate) store_buffered: u32,
    /// Whether either of the two above can happen.
    pub(crate) cpus: bool,
}

/// A named page outside processes.
#[derive(Clone, Default)]
pub(crate) struct Region {
    pub(crate) page: Page,
    /// Whether a process owns it; belongs to the page, not to the name.
    pub(crate) owned: Rc<Cell<bool>>,
}

pub(crate) struct Inner {
    pub(crate) sim: Sim,
    pub(crate) options: Options,
    pub(crate) rates: Rates,
    /// By domain number; `None` once destroyed.
    pub(crate) grants: RefCell<Vec<Option<GrantTable>>>,
    pub(crate) channels: RefCell<Channels>,
    pub(crate) store: RefCell<Store>,
    pub(crate) regions: RefCell<BTreeMap<String, Region>>,
    pub(crate) maps_held: RefCell<BTreeMap<DomId, u32>>,
    /// Ports of dead processes that the kernel has yet to close.
    dying: RefCell<BTreeSet<PortId>>,
    /// The time until which the control domain's kernel has no memory, in nanoseconds.
    pub(crate) short_until_ns: Cell<u64>,
    next_conn: Cell<u64>,
    /// How often the host went down.
    pub(crate) boots: Cell<u32>,
    notified: Cell<u32>,
}

/// The machine; clones share it.
#[derive(Clone)]
pub struct Xen(pub(crate) Rc<Inner>);

impl Xen {
    /// A machine with only the control domain.
    pub fn new(sim: &Sim, options: Options) -> Self {
        let swarm = sim.swarm();
        let (other_cpus, store_buffered) =
            (swarm.rate_ppm(&OTHER_CPUS_KIND), swarm.rate_ppm(&STORE_BUFFERED_KIND));
        let rates = Rates {
            other_cpus,
            store_buffered,
            cpus: options.other_cpus && (other_cpus + store_buffered > 0 || sim.has_given_decisions()),
            event_late: swarm.rate_ppm(&EVENT_LATE_KIND),
            event_again: swarm.rate_ppm(&EVENT_AGAIN_KIND),
            deaf: swarm.rate_ppm(&DEAF_KIND),
            store_lost: swarm.rate_ppm(&STORE_LOST_KIND),
            store_late: swarm.rate_ppm(&STORE_LATE_KIND),
            conflict: swarm.rate_ppm(&STORE_CONFLICT_KIND),
            close_late: swarm.rate_ppm(&CLOSE_LATE_KIND),
            store_error: swarm.rate_ppm(&STORE_ERROR_KIND),
            copy_error: swarm.rate_ppm(&COPY_ERROR_KIND),
            no_memory: swarm.rate_ppm(&NO_MEMORY_KIND),
        };
        Self(Rc::new(Inner {
            sim: sim.clone(),
            options,
            rates,
            grants: RefCell::new(vec![Some(GrantTable::default())]),
            channels: RefCell::default(),
            store: RefCell::new(Store::new(options.quota)),
            regions: RefCell::default(),
            maps_held: RefCell::default(),
            dying: RefCell::default(),
            short_until_ns: Cell::new(0),
            next_conn: Cell::new(0),
            notified: Cell::new(0),
            boots: Cell::new(0),
        }))
    }

    /// The engine.
    pub fn sim(&self) -> &Sim {
        &self.0.sim
    }

    /// Makes a domain; numbers are never reused.
    pub fn create_domain(&self) -> DomId {
        let mut grants = self.0.grants.borrow_mut();
        let dom = DomId(u16::try_from(grants.len()).expect("fewer than 65536 domains per world"));
        grants.push(Some(GrantTable::default()));
        drop(grants);
        self.trace(XenEvent::DomainCreated { dom });
        self.fire_special("@introduceDomain");
        dom
    }

    /// Makes a domain with the number of an earlier one, as Xen does once it has used all numbers.
    ///
    /// # Panics
    /// If that domain never existed, or still exists.
    pub fn create_domain_again(&self, dom: DomId) {
        let gone = self.0.grants.borrow_mut()[usize::from(dom.0)].replace(GrantTable::default());
        assert!(gone.is_none(), "{dom} still exists");
        self.trace(XenEvent::DomainCreated { dom });
        self.fire_special("@introduceDomain");
    }

    /// Resets the domain's grant table: another kernel has started in it. What is mapped stays so.
    pub fn reset_grants(&self, dom: DomId) {
        if let Some(table) = &mut self.0.grants.borrow_mut()[usize::from(dom.0)] {
            table.reset();
        }
    }

    /// Ends a domain: its grants and ports are gone. Pages that others have mapped live as long as the mappings. The
    /// caller kills the guest's node first; the toolstack removes xenstore's directories.
    pub fn destroy_domain(&self, dom: DomId) {
        self.0.grants.borrow_mut()[usize::from(dom.0)] = None;
        let ports = self.0.channels.borrow().of(dom);
        ports.into_iter().for_each(|id| self.close_port(id));
        self.trace(XenEvent::DomainDestroyed { dom });
        self.fire_special("@releaseDomain");
    }

    /// The whole machine went down, and every node with it: domains, xenstore and named pages are gone.
    pub fn power_cut(&self) {
        let count = self.0.grants.borrow().len();
        for dom in (1..count).filter(|dom| self.0.grants.borrow()[*dom].is_some()) {
            self.destroy_domain(DomId(dom as u16));
        }
        // Ports of dead processes that the kernel had yet to close: that kernel is gone.
        let ports = self.0.channels.borrow().of(DomId(0));
        ports.into_iter().for_each(|id| self.close_port(id));
        *self.0.store.borrow_mut() = Store::new(self.0.options.quota);
        self.clear_regions();
    }

    fn fire_special(&self, name: &str) {
        let wakers = self.0.store.borrow_mut().fire_special(name);
        wakers.into_iter().for_each(std::task::Waker::wake);
    }

    /// Forgets named pages: the host went down.
    pub fn clear_regions(&self) {
        self.0.boots.set(self.0.boots.get() + 1);
        self.0.regions.borrow_mut().clear();
    }

    /// Names of the named pages.
    pub fn regions(&self) -> Vec<String> {
        self.0.regions.borrow().keys().cloned().collect()
    }

    /// The named page, for inspection or damage.
    pub fn region_page(&self, name: &str) -> Option<Page> {
        self.0.regions.borrow().get(name).map(|region| region.page.clone())
    }

    /// What `dom` holds now.
    pub fn counts(&self, dom: DomId) -> Counts {
        let store = self.0.store.borrow();
        let dying = self.0.dying.borrow();
        Counts {
            maps: self.0.maps_held.borrow().get(&dom).copied().unwrap_or(0),
            channels: self.0.channels.borrow().of(dom).iter().filter(|id| !dying.contains(id)).count() as u32,
            watches: store.watch_count(dom) as u32,
            transactions: store.transaction_count(dom) as u32,
        }
    }

    /// How many mappings of `dom`'s pages exist.
    pub fn mapped_from(&self, dom: DomId) -> u32 {
        self.0.grants.borrow().get(usize::from(dom.0)).and_then(Option::as_ref).map_or(0, GrantTable::mapped)
    }

    /// Events raised since the start, for comparison with requests.
    pub fn notified(&self) -> u32 {
        self.0.notified.get()
    }

    fn table<T>(&self, dom: DomId, op: impl FnOnce(&mut GrantTable) -> Result<T, Errno>) -> Result<T, Errno> {
        let mut grants = self.0.grants.borrow_mut();
        grants.get_mut(usize::from(dom.0)).and_then(Option::as_mut).ok_or(Errno::EINVAL).and_then(op)
    }

    /// Lets a domain use a page of `dom`.
    ///
    /// # Errors
    /// `ENOSPC` when the table is full, `EINVAL` if there is no such domain.
    pub fn grant(&self, dom: DomId, grant: Grant) -> Result<GrantRef, Errno> {
        self.table(dom, |table| table.allocate(grant))
    }

    /// Frees an entry.
    ///
    /// # Errors
    /// `EBUSY` while it is mapped, `EINVAL` if there is no such entry.
    pub fn end_access(&self, dom: DomId, gref: GrantRef) -> Result<(), Errno> {
        self.table(dom, |table| table.end_access(gref))
    }

    /// The number of mappings of an entry.
    pub fn maps(&self, dom: DomId, gref: GrantRef) -> u32 {
        self.table(dom, |table| Ok(table.maps(gref))).unwrap_or(0)
    }

    /// Whether a process died while it had an entry mapped.
    pub(crate) fn is_torn(&self, dom: DomId, gref: GrantRef) -> bool {
        self.table(dom, |table| Ok(table.is_torn(gref))).unwrap_or(false)
    }

    /// Unmaps a grant of a process that died.
    pub(crate) fn unmap_of_dead(&self, by: DomId, dom: DomId, gref: GrantRef) {
        let torn = self.table(dom, |table| {
            table.tear(gref);
            Ok(())
        });
        // Its domain may be gone.
        torn.ok();
        self.unmap(by, dom, gref);
    }

    pub(crate) fn map(&self, by: DomId, dom: DomId, gref: GrantRef, write: bool) -> Result<Page, Errno> {
        let page = self.table(dom, |table| table.map(gref, by, write))?;
        *self.0.maps_held.borrow_mut().entry(by).or_default() += 1;
        self.trace(XenEvent::Mapped { by, dom, gref });
        Ok(page)
    }

    pub(crate) fn unmap(&self, by: DomId, dom: DomId, gref: GrantRef) {
        if let Some(Some(table)) = self.0.grants.borrow_mut().get_mut(usize::from(dom.0)) {
            table.unmap(gref);
        }
        *self.0.maps_held.borrow_mut().get_mut(&by).expect("it holds this one") -= 1;
        self.trace(XenEvent::Unmapped { by, dom, gref });
    }

    /// Raises the event at the other end of `id`, now or later.
    pub(crate) fn notify(&self, id: PortId) {
        self.0.notified.set(self.0.notified.get().wrapping_add(1));
        let Some((nth, peer)) = self.0.channels.borrow_mut().count_raised(id) else { return };
        let entity = Entity(sim::mix2(PORTS.0, u64::from(id.dom.0) << 32 | u64::from(id.port.0)));
        let late_ns = self.0.sim.decide(entity, &EVENT_LATE, nth, |draw| {
            if draw.ppm(self.0.rates.event_late) { draw.magnitude(self.0.options.event_late_bits) } else { 0 }
        });
        self.0.sim.name_entity(entity, || format!("event channel {} of {}", id.port, id.dom));
        self.trace(XenEvent::Notified { dom: id.dom, port: id.port, late_ns });
        if late_ns == 0 {
            self.raise(peer);
        } else {
            self.raise_in(late_ns, peer);
        }
        let rate = self.0.rates.event_again;
        if self.0.options.events_again && (rate > 0 || self.0.sim.has_given_decisions()) {
            let bits = self.0.options.event_late_bits;
            let again_ns =
                self.0.sim.nth_fault(entity, &EVENT_AGAIN, nth, rate, |draw| 1 + draw.magnitude(bits));
            if again_ns > 0 {
                self.raise_in(late_ns + again_ns, peer);
            }
        }
    }

    fn raise_in(&self, ns: u64, id: PortId) {
        let at_ns = self.0.sim.now_ns() + ns;
        self.0.sim.call_at(at_ns, Rc::clone(&self.0) as Rc<dyn Timed>, id.token());
    }

    /// A spurious event at the other end of `id`.
    pub(crate) fn raise_peer(&self, id: PortId) {
        let peer = self.0.channels.borrow_mut().peer(id);
        if let Some(peer) = peer {
            self.raise(peer);
        }
    }

    pub(crate) fn raise(&self, id: PortId) {
        let waker = self.0.channels.borrow_mut().raise(id);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    pub(crate) fn bind(&self, dom: DomId, remote: DomId, remote_port: Port) -> Result<PortId, Errno> {
        self.0.grants.borrow().get(usize::from(remote.0)).and_then(Option::as_ref).ok_or(Errno::ESRCH)?;
        let id = self.0.channels.borrow_mut().bind(dom, remote, remote_port)?;
        self.trace(XenEvent::Bound { dom, port: id.port, remote, remote_port });
        Ok(id)
    }

    pub(crate) fn close_port(&self, id: PortId) {
        let waker = self.0.channels.borrow_mut().close(id);
        self.trace(XenEvent::Closed { dom: id.dom, port: id.port });
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Closes a port of a dead process, now or later: a kernel releases resources one by one, and a successor may start
    /// before that is finished.
    pub(crate) fn close_port_of_dead(&self, id: PortId, process: Entity) {
        let late_ns = self.0.sim.decide(process, &CLOSE_LATE, id.port.0, |draw| {
            if draw.ppm(self.0.rates.close_late) { draw.magnitude(self.0.options.close_late_bits) } else { 0 }
        });
        if late_ns == 0 {
            self.close_port(id);
        } else {
            let at_ns = self.0.sim.now_ns() + late_ns;
            self.0.dying.borrow_mut().insert(id);
            self.0.sim.call_at(at_ns, Rc::new(LateClose(self.clone())), id.token());
        }
    }

    pub(crate) fn trace(&self, event: XenEvent<'_>) {
        self.0.sim.trace("xen", &event);
    }

    pub(crate) fn next_conn(&self) -> u64 {
        self.0.next_conn.set(self.0.next_conn.get() + 1);
        self.0.next_conn.get()
    }
}

impl Timed for Inner {
    fn fire(self: Rc<Self>, token: u64) {
        Xen(self).raise(PortId::from_token(token));
    }
}

/// Ports of dead processes that are still open.
struct LateClose(Xen);

impl Timed for LateClose {
    fn fire(self: Rc<Self>, token: u64) {
        let id = PortId::from_token(token);
        self.0.0.dying.borrow_mut().remove(&id);
        // Does nothing for a port that is gone with its domain.
        self.0.close_port(id);
    }
}
