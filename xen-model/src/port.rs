//! One process's access to Xen: the seam.

use crate::channels::PortId;
use crate::cpu::StoreBuffer;
use crate::mapping::{MappedGrant, Mapping, Origin};
use crate::page::Page;
use crate::store::Client;
use crate::xen::{DEAF, STORE_LOST, Xen};
use sim::{Entity, Node, Timed};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::task::{Poll, Waker};
use tap_host::{DomId, Errno, EventChannel, Events, Port, SharedPages};

struct Inner {
    xen: Xen,
    node: Node,
    client: Client,
    entity: Entity,
    store_ops: Cell<u32>,
    /// xenstored may refuse requests of this process.
    store_errors: Cell<bool>,
    /// The time until which it refuses everything, in nanoseconds.
    store_away_ns: Cell<u64>,
    /// Copies may fail for some of their segments.
    copy_errors: Cell<bool>,
    /// The event device may fail.
    may_go_deaf: Cell<bool>,
    /// It has failed: no channel delivers events any more.
    deaf: Cell<bool>,
    /// The connection to xenstored is broken for good.
    store_lost: Cell<bool>,
    /// It cannot list the named pages.
    hides_regions: Cell<bool>,
    next_map: Cell<u64>,
    maps: RefCell<BTreeMap<u64, MappedGrant>>,
    channels: RefCell<Vec<PortId>>,
    /// The ownership flags of the named pages that it owns.
    owned: RefCell<Vec<Rc<Cell<bool>>>>,
    stores: StoreBuffer,
    /// Stores to shared pages so far.
    stored: Cell<u32>,
}

/// One process's access to Xen; clones share it. When its node dies, handles are dropped first, then the model unmaps,
/// closes and disconnects what the process had.
#[derive(Clone)]
pub struct XenPort(Rc<Inner>);

impl Xen {
    /// Opens Xen for a process of `dom` that lives on `node`.
    pub fn attach(&self, dom: DomId, node: &Node) -> XenPort {
        let client = Client { dom, conn: self.next_conn() };
        let entity = node.entity().child("xen", u64::from(dom.0));
        self.0.sim.name_entity(entity, || format!("xenstore for {}", node.name()));
        let port = XenPort(Rc::new(Inner {
            xen: self.clone(),
            node: node.clone(),
            client,
            entity,
            store_ops: Cell::new(0),
            store_errors: Cell::new(false),
            store_away_ns: Cell::new(0),
            copy_errors: Cell::new(false),
            may_go_deaf: Cell::new(false),
            hides_regions: Cell::new(false),
            deaf: Cell::new(false),
            store_lost: Cell::new(false),
            next_map: Cell::new(0),
            maps: RefCell::default(),
            channels: RefCell::default(),
            owned: RefCell::default(),
            stores: StoreBuffer::default(),
            stored: Cell::new(0),
        }));
        let dead = port.clone();
        node.on_death(move || dead.release());
        port
    }
}

impl XenPort {
    /// The machine.
    #[inline]
    pub fn xen(&self) -> &Xen {
        &self.0.xen
    }

    /// From now on xenstored may answer this process with transient errors, and the kernel may be short of memory for
    /// mappings, ports and named pages. Most programs cannot handle that.
    pub fn allow_store_errors(&self) {
        self.0.store_errors.set(true);
    }

    /// From now on this process cannot list the named pages.
    pub fn hide_regions(&self) {
        self.0.hides_regions.set(true);
    }

    pub(crate) fn store_away_ns(&self) -> &Cell<u64> {
        &self.0.store_away_ns
    }

    pub(crate) fn copy_errors(&self) -> &Cell<bool> {
        &self.0.copy_errors
    }

    /// From now on this process may at some time stop receiving events, and be told so, as when reads of its device
    /// fail.
    pub fn allow_deafness(&self) {
        self.0.may_go_deaf.set(true);
        self.may_go_deaf_soon();
    }

    /// Whether it no longer receives events.
    pub fn is_deaf(&self) -> bool {
        self.0.deaf.get()
    }

    /// Once in the life of this process its connection to xenstored may break, and be told so: as when xenstored ends.
    /// Others keep theirs.
    pub fn allow_store_loss(&self) {
        let xen = &self.0.xen.0;
        let (sim, rate) = (&xen.sim, xen.rates.store_lost);
        if rate == 0 && !sim.has_given_decisions() {
            return;
        }
        let entity = self.0.entity.child("store-lost", 0);
        sim.name_entity(entity, || format!("xenstore for {}", self.0.node.name()));
        let after_ns = sim.fault(entity, &STORE_LOST, rate, |draw| 1 + draw.magnitude(24));
        if after_ns > 0 {
            sim.call_at(sim.now_ns() + after_ns, Rc::new(LoseStore(self.clone())), 0);
        }
    }

    /// Whether its connection to xenstored is broken.
    pub fn has_lost_store(&self) -> bool {
        self.0.store_lost.get()
    }

    fn may_go_deaf_soon(&self) {
        let xen = &self.0.xen.0;
        let (sim, rate) = (&xen.sim, xen.rates.deaf);
        if !self.0.may_go_deaf.get() || (rate == 0 && !sim.has_given_decisions()) {
            return;
        }
        let entity = self.0.entity.child("deaf", 0);
        sim.name_entity(entity, || format!("events of {}", self.0.node.name()));
        let after_ns = sim.fault(entity, &DEAF, rate, |draw| 1 + draw.magnitude(22));
        if after_ns > 0 {
            sim.call_at(sim.now_ns() + after_ns, Rc::new(GoDeaf(self.clone())), 0);
        }
    }

    /// Records a mapping until it is undone; returns its number.
    pub(crate) fn note_mapping(&self, mapped: MappedGrant) -> u64 {
        let key = self.0.next_map.get();
        self.0.next_map.set(key + 1);
        self.0.maps.borrow_mut().insert(key, mapped);
        key
    }

    pub(crate) fn has_store_errors(&self) -> bool {
        self.0.store_errors.get()
    }

    /// Maps a page of the kernel into the process. Loads and stores count like those of other shared pages.
    pub fn map_kernel_page(&self, page: &Page) -> Mapping {
        Mapping::of_kernel(self, page)
    }

    /// The domain.
    #[inline]
    pub fn dom(&self) -> DomId {
        self.0.client.dom
    }

    #[inline]
    pub(crate) fn node(&self) -> &Node {
        &self.0.node
    }

    pub(crate) fn client(&self) -> Client {
        self.0.client
    }

    pub(crate) fn entity(&self) -> Entity {
        self.0.entity
    }

    pub(crate) fn next_store_op(&self) -> u32 {
        self.0.store_ops.set(self.0.store_ops.get() + 1);
        self.0.store_ops.get()
    }

    #[inline]
    pub(crate) fn store_buffer(&self) -> &StoreBuffer {
        &self.0.stores
    }

    /// The number of the current store.
    pub(crate) fn store_buffer_count(&self) -> u32 {
        self.0.stored.set(self.0.stored.get().wrapping_add(1));
        self.0.stored.get()
    }

    /// A spurious event at the other end of each of its channels.
    pub(crate) fn wake_peers(&self) {
        let channels = self.0.channels.borrow().clone();
        channels.into_iter().for_each(|id| self.0.xen.raise_peer(id));
    }

    /// What the kernel does for a dead process.
    fn release(&self) {
        self.drain_stores();
        for map in std::mem::take(&mut *self.0.maps.borrow_mut()).into_values() {
            self.0.xen.unmap_of_dead(self.dom(), map.dom, map.gref);
        }
        for id in std::mem::take(&mut *self.0.channels.borrow_mut()) {
            self.0.xen.close_port_of_dead(id, self.0.entity);
        }
        self.0.owned.take().iter().for_each(|owned| owned.set(false));
        let wakers = self.0.xen.0.store.borrow_mut().disconnect(self.0.client.conn);
        wakers.into_iter().for_each(std::task::Waker::wake);
    }

    pub(crate) fn disown(&self, owned: &Rc<Cell<bool>>) {
        self.0.owned.borrow_mut().retain(|one| !Rc::ptr_eq(one, owned));
        owned.set(false);
    }

    pub(crate) fn unmap(&self, key: u64) {
        // Already gone if the process died in between.
        if let Some(map) = self.0.maps.borrow_mut().remove(&key) {
            self.0.xen.unmap(self.dom(), map.dom, map.gref);
        }
    }

    /// A new port that waits for `remote` to bind it.
    ///
    /// # Errors
    /// `ENOSPC` when the domain has no port left.
    pub fn alloc_unbound(&self, remote: DomId) -> Result<Channel, Errno> {
        let id = self.0.xen.0.channels.borrow_mut().alloc_unbound(self.dom(), remote)?;
        Ok(self.channel(id))
    }

    fn channel(&self, id: PortId) -> Channel {
        self.0.channels.borrow_mut().push(id);
        Channel { port: self.clone(), id }
    }
}

impl Events for XenPort {
    type Channel = Channel;

    fn bind_interdomain(&self, dom: DomId, remote: Port) -> Result<Channel, Errno> {
        if !self.0.node.step() {
            return Err(Errno::ESHUTDOWN);
        }
        self.memory()?;
        let id = self.0.xen.bind(self.dom(), dom, remote)?;
        self.may_go_deaf_soon();
        Ok(self.channel(id))
    }
}

impl SharedPages for XenPort {
    type Region = Mapping;

    fn region(&self, name: &str) -> Result<Mapping, Errno> {
        if !self.0.node.step() {
            return Err(Errno::ESHUTDOWN);
        }
        self.memory()?;
        let region = self.0.xen.0.regions.borrow_mut().entry(name.into()).or_default().clone();
        Ok(Mapping::new(self.clone(), region.page, Origin::Region { owned: None }))
    }

    fn own_region(&self, name: &str) -> Result<Mapping, Errno> {
        if !self.0.node.step() {
            return Err(Errno::ESHUTDOWN);
        }
        self.memory()?;
        let region = self.0.xen.0.regions.borrow_mut().entry(name.into()).or_default().clone();
        if region.owned.replace(true) {
            return Err(Errno::EBUSY);
        }
        self.0.owned.borrow_mut().push(Rc::clone(&region.owned));
        Ok(Mapping::new(self.clone(), region.page, Origin::Region { owned: Some(region.owned) }))
    }

    fn boot_id(&self) -> Result<[u8; 16], Errno> {
        let mut id = [0; 16];
        id[0] = 1;
        id[4..8].copy_from_slice(&self.0.xen.0.boots.get().to_le_bytes());
        Ok(id)
    }

    fn remove_region(&self, name: &str) {
        if self.0.node.step() {
            self.0.xen.0.regions.borrow_mut().remove(name);
        }
    }

    fn region_names(&self) -> Result<Vec<String>, Errno> {
        if self.0.hides_regions.get() { Err(Errno::EACCES) } else { Ok(self.0.xen.regions()) }
    }
}

/// One end of an event channel; closed when dropped by a living process.
pub struct Channel {
    port: XenPort,
    id: PortId,
}

impl Channel {
    pub(crate) fn id(&self) -> PortId {
        self.id
    }
}

impl EventChannel for Channel {
    fn notify(&self) {
        self.port.other_cpus();
        if self.port.node().step() {
            self.port.drain_stores();
            self.port.xen().notify(self.id);
        }
    }

    fn wait(&self) -> impl Future<Output = Result<(), Errno>> {
        poll_fn(|cx| match self.port.0.xen.0.channels.borrow_mut().poll(self.id, cx.waker()) {
            _ if self.port.0.deaf.get() => Poll::Ready(Err(Errno::ESHUTDOWN)),
            Ok(true) => Poll::Ready(Ok(())),
            Ok(false) => Poll::Pending,
            Err(e) => Poll::Ready(Err(e)),
        })
    }

    fn local_port(&self) -> Port {
        self.id.port
    }
}

/// Makes the event device fail.
struct GoDeaf(XenPort);

impl Timed for GoDeaf {
    fn fire(self: Rc<Self>, _: u64) {
        self.0.0.deaf.set(true);
        let channels = self.0.0.channels.borrow().clone();
        channels.into_iter().for_each(|id| self.0.0.xen.raise(id));
    }
}

/// Breaks the connection to xenstored.
struct LoseStore(XenPort);

impl Timed for LoseStore {
    fn fire(self: Rc<Self>, _: u64) {
        let Inner { xen, client, store_lost, node, .. } = &*self.0.0;
        if node.is_alive() {
            store_lost.set(true);
            let wakers = xen.0.store.borrow_mut().disconnect(client.conn);
            wakers.into_iter().for_each(Waker::wake);
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        if self.port.node().is_alive() {
            self.port.0.channels.borrow_mut().retain(|id| *id != self.id);
            self.port.xen().close_port(self.id);
        }
    }
}
