//! The raw side of a guest: a ring that it owns, pages that it grants, and nothing that prevents it from lying.

use crate::grants::Grant;
use crate::page::Page;
use crate::port::{Channel, XenPort};
use sim::Timed;
use std::cell::Cell;
use std::rc::{Rc, Weak};
use tap_abi::blkif::{BlkifRequest, ENTRY_BYTES, RESPONSE_BYTES, RawResponse};
use tap_host::{DomId, Errno, EventChannel, GrantRef, Port, Transaction, Xenstore};
use zerocopy::FromBytes;

/// Offsets and sizes as a front end knows them from Xen's headers.
const REQ_PROD: usize = 0;
const RSP_PROD: usize = 8;
const RSP_EVENT: usize = 12;
const REQ_EVENT: usize = 4;
const SLOTS: u32 = 32;
const FIRST_SLOT: usize = 64;

/// A page that the back end may use.
#[derive(Debug)]
pub struct GrantedPage {
    /// The page.
    pub page: Page,
    /// Its grant.
    pub gref: GrantRef,
}

impl GrantedPage {
    /// A new page of the port's domain for `back` to use.
    ///
    /// # Errors
    /// `ENOSPC` when the grant table is full.
    pub fn new(port: &XenPort, back: DomId, read_only: bool) -> Result<Self, Errno> {
        let page = Page::new();
        let grant = Grant { page: page.clone(), to: back, read_only };
        Ok(Self { page, gref: port.xen().grant(port.dom(), grant)? })
    }

    /// Ends the grant.
    ///
    /// # Errors
    /// `EBUSY` while it is mapped.
    pub fn end(self, port: &XenPort) -> Result<(), Errno> {
        port.xen().end_access(port.dom(), self.gref)
    }
}

/// What a front end says about its ring besides where it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FrontKeys {
    /// It states its number of pages and queues, one each; the grant is then in `ring-ref0`, and an earlier front end's
    /// `ring-ref` stays.
    pub counted: bool,
    /// An earlier front end had more queues and pages, and left keys that only such a front end has.
    pub leftovers: bool,
}

/// The keys that state numbers, and their values for one page and one queue.
const COUNTS: [(&str, &str); 3] =
    [("ring-page-order", "0"), ("num-ring-pages", "1"), ("multi-queue-num-queues", "1")];

/// A guest's block ring of one page. Its methods do what a well-behaved front end does; anything else can be done
/// through [`GuestRing::page`].
pub struct GuestRing {
    port: XenPort,
    shared: GrantedPage,
    channel: Channel,
    produced: Cell<u32>,
    published: Cell<u32>,
    consumed: Cell<u32>,
    /// The index published when the last event was raised.
    told: Cell<u32>,
}

impl GuestRing {
    /// A fresh ring for `back`.
    ///
    /// # Errors
    /// `ENOSPC` when grants or ports are used up.
    pub fn new(port: &XenPort, back: DomId) -> Result<Self, Errno> {
        let shared = GrantedPage::new(port, back, false)?;
        shared.page.store_u32(REQ_EVENT, 1);
        shared.page.store_u32(RSP_EVENT, 1);
        let channel = port.alloc_unbound(back)?;
        let zero = || Cell::new(0);
        Ok(Self {
            port: port.clone(),
            shared,
            channel,
            produced: zero(),
            published: zero(),
            consumed: zero(),
            told: zero(),
        })
    }

    /// The ring's page.
    pub fn page(&self) -> &Page {
        &self.shared.page
    }
    /// The ring page's grant.
    pub fn ring_ref(&self) -> GrantRef {
        self.shared.gref
    }
    /// The guest's event channel port.
    pub fn event_port(&self) -> Port {
        self.channel.local_port()
    }
    /// The guest's end of the event channel.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }
    /// Closes the guest's end of the event channel: neither side receives events any more.
    pub fn close_channel(&self) {
        self.port.xen().close_port(self.channel.id());
    }
    /// Requests put on the ring whose responses were not taken.
    pub fn outstanding(&self) -> u32 {
        self.produced.get().wrapping_sub(self.consumed.get())
    }

    /// The ring index of the next response to take.
    pub fn consumed(&self) -> u32 {
        self.consumed.get()
    }

    /// Writes to xenstore where the ring is and that the front end in `frontend` is ready (state 3), in one
    /// transaction.
    ///
    /// # Errors
    /// As xenstore's, except `EAGAIN`, after which it retries.
    pub async fn publish_in_store(&self, frontend: &str) -> Result<(), Errno> {
        self.publish_as(frontend, FrontKeys::default(), false).await
    }

    /// The same with the keys of another kind of front end. With `after_counted` the previous front end stated its
    /// number of pages; the keys that only that kind writes are then removed, and no others.
    ///
    /// # Errors
    /// As [`GuestRing::publish_in_store`].
    pub async fn publish_as(
        &self,
        frontend: &str,
        keys: FrontKeys,
        after_counted: bool,
    ) -> Result<(), Errno> {
        let gref = self.ring_ref().0;
        let mut pairs = Vec::new();
        if keys.leftovers {
            pairs.push(("ring-ref0", (gref + 1).to_string()));
            pairs.push(("queue-0/ring-ref", (gref + 1).to_string()));
            pairs.push(("queue-0/event-channel", (self.event_port().0 + 1).to_string()));
            pairs.push(("feature-persistent", "1".into()));
        }
        if keys.counted {
            pairs.extend(COUNTS.map(|(key, one)| (key, one.to_string())));
        }
        pairs.push((if keys.counted { "ring-ref0" } else { "ring-ref" }, gref.to_string()));
        pairs.push(("event-channel", self.event_port().0.to_string()));
        pairs.push(("protocol", "x86_64-abi".into()));
        pairs.push(("state", "3".into()));
        loop {
            let tx = self.port.transaction().await?;
            for (key, _) in COUNTS.iter().filter(|_| after_counted && !keys.counted) {
                tx.remove(&format!("{frontend}/{key}")).await?;
            }
            for (key, value) in &pairs {
                tx.write(&format!("{frontend}/{key}"), value.as_bytes()).await?;
            }
            match tx.commit().await {
                Err(Errno::EAGAIN) => {}
                other => return other,
            }
        }
    }

    /// Puts a request on the ring without publishing it; `false` when the ring is full.
    pub fn put(&self, request: &BlkifRequest) -> bool {
        self.put_entry(&request.encode())
    }

    /// The same with the bytes of any request.
    pub fn put_entry(&self, entry: &[u8; ENTRY_BYTES]) -> bool {
        if self.outstanding() >= SLOTS {
            return false;
        }
        self.put_raw(entry);
        true
    }

    /// Puts any bytes into the next slot, full or not.
    pub fn put_raw(&self, entry: &[u8; ENTRY_BYTES]) {
        let index = self.produced.get();
        self.shared.page.was_loaded(middle(index), true);
        self.store(slot(index), entry);
        self.produced.set(index.wrapping_add(1));
    }

    /// Publishes what was put, and raises the event if the back end asked for it; returns whether it did.
    pub fn publish(&self) -> bool {
        let (old, new) = (self.published.get(), self.produced.get());
        self.published.set(new);
        self.store(REQ_PROD, &new.to_le_bytes());
        self.full_barrier();
        let wanted = self.load_u32(REQ_EVENT);
        // The event index was passed by this very step.
        let passed = (1..=new.wrapping_sub(old)).any(|step| old.wrapping_add(step) == wanted);
        if passed {
            self.told.set(new);
            self.channel.notify();
        }
        passed
    }

    /// Checks, once everything that can happen now has happened, whether the back end sleeps although requests are
    /// published: it asked for an event at a request that it has not read, and the request had been published before it
    /// asked. Call this after a [`GuestRing::publish`] that raised no event.
    pub fn watch_sleep(self: &Rc<Self>, overslept: impl Fn(String) + 'static) {
        let sim = self.port.xen().sim();
        let look = SleepLook { ring: Rc::downgrade(self), overslept };
        sim.call_at(sim.now_ns(), Rc::new(look), u64::from(self.published.get()));
    }

    fn is_overslept(&self) -> bool {
        let page = &self.shared.page;
        let asked = page.load_u32(REQ_EVENT).wrapping_sub(1);
        let mapped = self.port.xen().maps(self.port.dom(), self.shared.gref) > 0;
        mapped
            // An event in transit will announce the request.
            && (0..=SLOTS).contains(&asked.wrapping_sub(self.told.get()))
            && (1..=SLOTS).contains(&self.published.get().wrapping_sub(asked))
            && !page.was_loaded(middle(asked), false)
    }

    /// How many requests the back end has read and not answered; `None` if a back end that had the ring died.
    pub fn unanswered(&self) -> Option<u32> {
        if self.port.xen().is_torn(self.port.dom(), self.shared.gref) {
            return None;
        }
        let (page, published) = (&self.shared.page, self.published.get());
        let open = published.wrapping_sub(page.load_u32(RSP_PROD));
        let unseen = (1..=open.min(SLOTS))
            .take_while(|back| !page.was_loaded(middle(published.wrapping_sub(*back)), false));
        Some(open - unseen.count() as u32)
    }

    /// Continues from the indices in the page, after another CPU of the guest has used the ring.
    pub fn catch_up(&self) {
        let produced = self.shared.page.load_u32(REQ_PROD);
        self.produced.set(produced);
        self.published.set(produced);
        self.consumed.set(self.shared.page.load_u32(RSP_PROD));
    }

    /// The next response, if there is one.
    ///
    /// # Errors
    /// `EPROTO` when the back end claims to have answered more than it was asked.
    pub fn take(&self) -> Result<Option<RawResponse>, Errno> {
        let index = self.consumed.get();
        let ready = self.load_u32(RSP_PROD).wrapping_sub(index);
        if ready == 0 {
            return Ok(None);
        }
        if ready > self.published.get().wrapping_sub(index) {
            return Err(Errno::EPROTO);
        }
        let mut bytes = [0; RESPONSE_BYTES];
        self.load(slot(index), &mut bytes);
        self.consumed.set(index.wrapping_add(1));
        Ok(RawResponse::read_from_bytes(&bytes).ok())
    }

    /// The next response, once there is one.
    ///
    /// # Errors
    /// As [`GuestRing::take`]; `ESHUTDOWN` when the event channel is closed.
    pub async fn next(&self) -> Result<RawResponse, Errno> {
        loop {
            if let Some(response) = self.take()? {
                return Ok(response);
            }
            self.store(RSP_EVENT, &self.consumed.get().wrapping_add(1).to_le_bytes());
            self.full_barrier();
            if let Some(response) = self.take()? {
                return Ok(response);
            }
            self.channel.wait().await?;
        }
    }

    #[inline]
    fn store(&self, offset: usize, bytes: &[u8]) {
        self.port.other_cpus();
        self.port.shared_store(&self.shared.page, offset, bytes);
    }

    #[inline]
    fn load(&self, offset: usize, into: &mut [u8]) {
        self.port.other_cpus();
        self.port.shared_load(&self.shared.page, offset, into);
    }

    #[inline]
    fn load_u32(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.load(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[inline]
    fn full_barrier(&self) {
        self.port.other_cpus();
        self.port.drain_stores();
    }

    /// Releases the ring: the port is closed and the grant is ended.
    ///
    /// # Errors
    /// `EBUSY` while the back end has it mapped; it then stays granted for good.
    pub fn end(self) -> Result<(), Errno> {
        let Self { port, shared, channel, .. } = self;
        drop(channel);
        shared.end(&port)
    }
}

struct SleepLook<F> {
    ring: Weak<GuestRing>,
    overslept: F,
}

impl<F: Fn(String) + 'static> Timed for SleepLook<F> {
    fn fire(self: Rc<Self>, published: u64) {
        let Some(ring) = self.ring.upgrade() else { return };
        if u64::from(ring.published.get()) != published || !ring.is_overslept() {
            return;
        }
        let sim = ring.port.xen().sim();
        match sim.put_back_until_ns(ring.port.node()) {
            // The back end may be awake, with its turn delayed.
            Some(due_ns) => sim.call_at(due_ns, self, published),
            None => {
                (self.overslept)(format!(
                    "the back end sleeps, and request {} on the ring waits",
                    published - 1
                ));
            }
        }
    }
}

/// A byte in the middle of an entry.
fn middle(index: u32) -> usize {
    slot(index) + 40
}

fn slot(index: u32) -> usize {
    FIRST_SLOT + (index & (SLOTS - 1)) as usize * ENTRY_BYTES
}
