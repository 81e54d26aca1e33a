//! Linux's block front end, as far as a back end can see it: a ring, a shadow of every request on it, and the xenbus
//! states.
//!
//! ```text
//!   1 Initialising ─► (back end 2) ring, event channel ─► 3 Initialised ─► (back end 4) ─► 4 Connected
//!        ▲                                                                                     │
//!        └──────── 6 Closed ◄─ (back end 5 or 6) ◄─ 5 Closing ◄── reconnect(), close() ────────┘
//! ```
//!
//! A back end that writes its state 4 again has another size for the disk in use (`size.rs`).
//!
//! The shadow keeps each request until its response has arrived. As in Linux, every request of the shadow is put
//! unchanged on a new ring (after a driver reload, or a resume); so a back end may see a request that its predecessor
//! had already carried out.
//!
//! The pages of an answered request hold poison, bytes that no disk holds; `data.rs` says what that reveals.
//!
//! A response without a request is reported as a protocol violation of the back end, and so is a ring with impossible
//! indices.

mod data;
mod reset;
mod size;
mod slots;

pub use data::{DataPiece, DataPieces, SegmentLayout};

use data::{discard, is_poisoned, pages_for, poison};
use sim::Node;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Poll, Waker};
use tap_abi::blkif::{
    BlkifOp, BlkifRequest, ENTRY_BYTES, MAX_SEGMENTS, RawResponse, STATUS_EOPNOTSUPP, STATUS_OKAY, Segment,
};
use tap_host::{DomId, Errno, IoKind, OneWaiter, SectorRange, Watcher, Xenstore};
use xen_model::{FrontKeys, GrantedPage, GuestRing, VbdPaths, XenPort};

const SLOTS: usize = 32;
const PAGE_SECTORS: u32 = 8;
/// Sectors of the largest request: eleven pages.
pub const BLKFRONT_MAX_SECTORS: u32 = MAX_SEGMENTS as u32 * PAGE_SECTORS;

/// Reports a protocol violation of the back end.
pub type Complaint = Rc<dyn Fn(String)>;
/// Chooses how the sectors of a request lie in its pages.
pub type LayoutOf = Rc<dyn Fn(SectorRange) -> SegmentLayout>;
/// How long it continues to use its disk after it has said that it is closing, in nanoseconds, at its n-th connect.
pub type LingersOf = Rc<dyn Fn(u32) -> u64>;
/// What a back end publishes about its disk once it has connected.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Published {
    /// `sectors`, of 512 bytes.
    pub sectors: Option<u64>,
    /// `sector-size` in bytes.
    pub sector_bytes: Option<u64>,
    /// `info`: whether it may only be read.
    pub read_only: Option<bool>,
    /// `feature-flush-cache`.
    pub flushes: bool,
    /// `feature-discard`, if the front end asks for it.
    pub discards: bool,
    /// `error`, which is left from an earlier attempt.
    pub error: Option<String>,
    /// `hotplug-status`, which toolstacks read.
    pub hotplug: Option<String>,
}
/// Called with it at each connect.
pub type OnPublished = Rc<dyn Fn(&Published)>;
/// Called with the size that the back end publishes for the disk in use, in sectors.
pub type OnResized = Rc<dyn Fn(u64)>;
/// What it writes to xenstore at its n-th connect, from 0.
pub type KeysOf = Rc<dyn Fn(u32) -> FrontKeys>;

#[derive(Default)]
struct Shadow {
    /// Grows with every use, to distinguish an answer to an earlier use.
    turn: u64,
    pages: Vec<GrantedPage>,
    request: Option<[u8; ENTRY_BYTES]>,
    status: Option<i16>,
    waker: Option<Waker>,
}

struct Inner {
    port: XenPort,
    node: Node,
    back: DomId,
    paths: VbdPaths,
    complain: Complaint,
    layout: RefCell<Option<LayoutOf>>,
    keys: RefCell<Option<KeysOf>>,
    lingers: RefCell<Option<LingersOf>>,
    on_published: RefCell<Option<OnPublished>>,
    on_resized: RefCell<Option<OnResized>>,
    /// Of its disk, as it was published last.
    size_sectors: Cell<u64>,
    /// Wakers for another size.
    resized: RefCell<Vec<Waker>>,
    /// It asks the back end about discards, and the back end takes them.
    asks_for_discards: Cell<bool>,
    discards: Cell<bool>,
    /// The previous front end stated its number of pages.
    counted: Cell<bool>,
    /// Grants are ended when their request is answered.
    revokes: Cell<bool>,
    ring: RefCell<Option<Rc<GuestRing>>>,
    /// Requests may go on the ring.
    open: Cell<bool>,
    shadow: RefCell<Vec<Shadow>>,
    free: RefCell<Vec<usize>>,
    /// Of those who asked for a slot, the number of the next, and whose turn it is.
    tickets: Cell<u64>,
    turn: Cell<u64>,
    waiting: RefCell<BTreeMap<u64, Waker>>,
    connects: Cell<u32>,
    /// The ring is being released: the task that takes responses stops.
    closing: Cell<bool>,
    /// A task is taking responses.
    serving: Cell<bool>,
    server: OneWaiter,
    /// Wakers for the next interrupt.
    idle: RefCell<Vec<Waker>>,
    /// Waits for the task to stop.
    closer: OneWaiter,
}

/// A block front end; clones share it.
#[derive(Clone)]
pub struct Blkfront(Rc<Inner>);

impl Blkfront {
    /// A front end that is not connected yet. `complain` is called with each violation by the back end.
    pub fn new(port: &XenPort, node: &Node, back: DomId, paths: VbdPaths, complain: Complaint) -> Self {
        Self(Rc::new(Inner {
            port: port.clone(),
            node: node.clone(),
            back,
            paths,
            complain,
            layout: RefCell::default(),
            keys: RefCell::default(),
            lingers: RefCell::default(),
            on_published: RefCell::default(),
            on_resized: RefCell::default(),
            size_sectors: Cell::new(0),
            resized: RefCell::default(),
            asks_for_discards: Cell::new(false),
            discards: Cell::new(false),
            counted: Cell::new(false),
            revokes: Cell::new(false),
            ring: RefCell::default(),
            open: Cell::new(false),
            shadow: RefCell::new((0..SLOTS).map(|_| Shadow::default()).collect()),
            free: RefCell::new((0..SLOTS).rev().collect()),
            tickets: Cell::new(0),
            turn: Cell::new(0),
            waiting: RefCell::default(),
            connects: Cell::new(0),
            closing: Cell::new(false),
            serving: Cell::new(false),
            server: OneWaiter::default(),
            idle: RefCell::default(),
            closer: OneWaiter::default(),
        }))
    }

    /// Sets `layout` to choose how the sectors of each request lie in its pages; by default pages are whole.
    pub fn set_layout(&self, layout: LayoutOf) {
        *self.0.layout.borrow_mut() = Some(layout);
    }

    /// Sets `keys` to choose the keys of each connect; by default the minimum.
    pub fn set_keys(&self, keys: KeysOf) {
        *self.0.keys.borrow_mut() = Some(keys);
    }

    /// Sets `lingers` to choose how long the disk is still used at each close, as Linux before 5.15 did while it was
    /// mounted.
    pub fn set_lingers(&self, lingers: LingersOf) {
        *self.0.lingers.borrow_mut() = Some(lingers);
    }

    /// Calls `look` at each connect with what the back end says about its disk.
    pub fn on_published(&self, look: OnPublished) {
        *self.0.on_published.borrow_mut() = Some(look);
    }

    /// From now on the grant of a page is ended when its request is answered, as in Linux; otherwise it stays granted.
    pub fn revoke_pages(&self) {
        self.0.revokes.set(true);
    }

    /// From now on it asks whether the back end takes discards, as Linux since 3.2.
    pub fn ask_for_discards(&self) {
        self.0.asks_for_discards.set(true);
    }

    /// How often it was connected.
    pub fn connects(&self) -> u32 {
        self.0.connects.get()
    }

    /// Unanswered requests.
    pub fn outstanding(&self) -> usize {
        self.0.shadow.borrow().iter().filter(|s| s.request.is_some() && s.status.is_none()).count()
    }

    /// Goes through the states to Connected, with a new ring, and puts every request of the shadow on it.
    ///
    /// # Errors
    /// As xenstore's; `ESHUTDOWN` when the back end closes instead.
    pub async fn connect(&self) -> Result<(), Errno> {
        let this = &self.0;
        this.wait_for_back(|s| s == 2).await?;
        let ring = Rc::new(GuestRing::new(&this.port, this.back)?);
        let words = this.keys.borrow().clone();
        let keys = words.map_or_else(FrontKeys::default, |keys| keys(this.connects.get()));
        ring.publish_as(&this.paths.frontend, keys, this.counted.replace(keys.counted)).await?;
        *this.ring.borrow_mut() = Some(Rc::clone(&ring));
        if this.wait_for_back(|s| s == 4 || s >= 5).await? != 4 {
            return Err(Errno::ESHUTDOWN);
        }
        let published = this.published().await?;
        let look = this.on_published.borrow().clone();
        look.into_iter().for_each(|look| look(&published));
        this.discards.set(published.discards);
        this.set_size(published.sectors.unwrap_or(0));
        this.set_state(4).await?;
        this.connects.set(this.connects.get() + 1);
        self.watch_size();
        this.open.set(true);
        for shadow in this.shadow.borrow().iter() {
            if let (Some(request), None) = (&shadow.request, shadow.status)
                && !ring.put_entry(request)
            {
                (this.complain)("the ring has no room for the shadow".into());
            }
        }
        ring.publish();
        // Tasks that waited for a ring continue.
        self.wake_next();
        let (me, responses) = (self.clone(), Rc::clone(&ring));
        this.closing.set(false);
        this.serving.set(true);
        this.node.spawn(
            "responses",
            u64::from(this.connects.get()),
            async move { me.serve(responses).await },
        );
        Ok(())
    }

    /// Takes responses until the ring is released.
    async fn serve(&self, ring: Rc<GuestRing>) {
        while let Some(next) = self.next_response(&ring).await {
            match next {
                Ok(response) => self.answer(response.id.get(), response.status.get()),
                Err(Errno::EPROTO) => {
                    (self.0.complain)("the back end answered more requests than it was given".into());
                    break;
                }
                Err(_) => break,
            }
        }
        // Answers from before the ring was released count.
        while let Ok(Some(response)) = ring.take() {
            self.answer(response.id.get(), response.status.get());
        }
        drop(ring);
        self.0.serving.set(false);
        self.0.closer.wake();
    }

    async fn next_response(&self, ring: &GuestRing) -> Option<Result<RawResponse, Errno>> {
        let mut next = pin!(ring.next());
        poll_fn(|cx| {
            let idle = std::mem::take(&mut *self.0.idle.borrow_mut());
            idle.into_iter().for_each(Waker::wake);
            if self.0.closing.get() {
                return Poll::Ready(None);
            }
            let poll = next.as_mut().poll(cx).map(Some);
            if poll.is_pending() {
                self.0.server.wait(cx.waker());
            }
            poll
        })
        .await
    }

    fn answer(&self, id: u64, status: i16) {
        let (slot, turn) = ((id & 0xff) as usize, id >> 8);
        let mut shadows = self.0.shadow.borrow_mut();
        let known =
            shadows.get_mut(slot).filter(|s| s.turn == turn && s.request.is_some() && s.status.is_none());
        match known {
            Some(shadow) => {
                shadow.status = Some(status);
                if let Some(waker) = shadow.waker.take() {
                    waker.wake();
                }
            }
            None => {
                drop(shadows);
                (self.0.complain)(format!(
                    "a response came for request {id:#x}, which has no request outstanding"
                ));
            }
        }
    }

    /// Closes the ring in an orderly way and connects a new one, as a reloaded driver does: requests that are
    /// unanswered by then are put on the new ring.
    ///
    /// # Errors
    /// As [`Blkfront::connect`].
    pub async fn reconnect(&self) -> Result<(), Errno> {
        self.close().await?;
        self.0.set_state(1).await?;
        self.connect().await
    }

    /// Closes the ring in an orderly way: no more requests are put on it, and the back end unmaps what it has mapped.
    ///
    /// # Errors
    /// As xenstore's.
    pub async fn close(&self) -> Result<(), Errno> {
        let lingers = self.0.lingers.borrow().clone();
        let linger_ns = lingers.map_or(0, |lingers| lingers(self.0.connects.get()));
        self.0.open.set(linger_ns > 0);
        self.0.set_state(5).await?;
        self.0.wait_for_back(|s| s == 5 || s == 6).await?;
        if linger_ns > 0 {
            self.0.port.xen().sim().sleep_ns(linger_ns).await;
            self.0.open.set(false);
        }
        self.0.set_state(6).await?;
        self.0.wait_for_back(|s| s == 6 || s == 2).await?;
        self.drop_ring().await;
        Ok(())
    }

    /// Releases the ring. Anything that the back end still has mapped is a leak of the back end.
    async fn drop_ring(&self) {
        self.0.closing.set(true);
        self.0.server.wake();
        poll_fn(|cx| {
            if !self.0.serving.get() {
                return Poll::Ready(());
            }
            self.0.closer.wait(cx.waker());
            Poll::Pending
        })
        .await;
        let ring = self.0.ring.borrow_mut().take().and_then(Rc::into_inner);
        // It may have read one more request before it stopped.
        if let Some(unanswered) = ring.as_ref().and_then(GuestRing::unanswered).filter(|n| *n > 1) {
            (self.0.complain)(format!(
                "the back end closed its ring, and {unanswered} requests that it had read have no answer"
            ));
        }
        if ring.is_some_and(|ring| ring.end().is_err()) {
            (self.0.complain)("the back end keeps the ring's page mapped after it closed".into());
        }
    }

    /// Ends every grant, once nothing is outstanding.
    ///
    /// # Errors
    /// What is still mapped.
    pub fn release(&self) -> Result<(), String> {
        for shadow in self.0.shadow.borrow_mut().iter_mut() {
            if !shadow.pages.iter().all(is_poisoned) {
                return Err("a page was written after its request was answered".into());
            }
            self.take_back(&mut shadow.pages)?;
        }
        Ok(())
    }

    fn take_back(&self, pages: &mut Vec<GrantedPage>) -> Result<(), String> {
        for page in std::mem::take(pages) {
            let gref = page.gref;
            page.end(&self.0.port).map_err(|e| format!("{gref} cannot be revoked: {e:?}"))?;
        }
        Ok(())
    }

    /// Waits for the next interrupt, even one without a response, and at most `max_ns`: programs continue when their
    /// CPU has time for them, and that may be between any two steps of a back end on another CPU.
    pub async fn idle(&self, max_ns: u64) {
        let mut late = pin!(self.0.port.xen().sim().sleep_ns(max_ns));
        let mut waited = false;
        poll_fn(|cx| {
            if std::mem::replace(&mut waited, true) {
                return Poll::Ready(());
            }
            self.0.idle.borrow_mut().push(cx.waker().clone());
            late.as_mut().poll(cx)
        })
        .await;
    }

    /// Submits one request. `fill` puts the bytes of a write into pieces of granted pages, `look` sees those of a read
    /// in them.
    /// A flush with sectors carries data: with the answer everything before it and the data are durable.
    ///
    /// # Errors
    /// `EIO` when the back end answers with an error, `EOPNOTSUPP` when it does not support the operation.
    pub async fn io(
        &self,
        kind: IoKind,
        range: SectorRange,
        fill: impl FnOnce(DataPieces<'_>),
        look: impl FnOnce(DataPieces<'_>),
    ) -> Result<(), Errno> {
        let slot = self.slot().await;
        let result = self.io_in(slot, kind, range, fill, look).await;
        self.0.free.borrow_mut().push(slot);
        self.wake_next();
        result
    }

    async fn io_in(
        &self,
        slot: usize,
        kind: IoKind,
        range: SectorRange,
        fill: impl FnOnce(DataPieces<'_>),
        look: impl FnOnce(DataPieces<'_>),
    ) -> Result<(), Errno> {
        let layout = self.0.layout.borrow().clone().map_or(SegmentLayout::WHOLE, |layout| layout(range));
        let pages = if kind == IoKind::Discard { 0 } else { pages_for(range.count, layout) };
        let request = self.prepare(slot, kind, range, (layout, pages), fill)?;
        if self.0.open.get() {
            self.post(&request);
        }
        let status = poll_fn(|cx| {
            let mut shadows = self.0.shadow.borrow_mut();
            match shadows[slot].status {
                Some(status) => Poll::Ready(status),
                None => {
                    shadows[slot].waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await;
        let mut shadows = self.0.shadow.borrow_mut();
        let shadow = &mut shadows[slot];
        shadow.request = None;
        let pieces = DataPieces::new(&shadow.pages[..pages], range.count, layout);
        if status == STATUS_OKAY && kind == IoKind::Read {
            look(pieces);
        }
        if !pieces.iter().all(|piece| piece.is_alone()) {
            (self.0.complain)(format!("bytes beside the segments of {kind} {range} were written"));
        }
        shadow.pages[..pages].iter().for_each(poison);
        if self.0.revokes.get() {
            self.take_back(&mut shadow.pages).map_err(|text| (self.0.complain)(text)).ok();
        }
        match status {
            STATUS_OKAY => Ok(()),
            STATUS_EOPNOTSUPP => Err(Errno::EOPNOTSUPP),
            _ => Err(Errno::EIO),
        }
    }
}

/// The steps of one request.
impl Blkfront {
    /// Fills the pages of `slot` and makes the request.
    fn prepare(
        &self,
        slot: usize,
        kind: IoKind,
        range: SectorRange,
        (layout, pages): (SegmentLayout, usize),
        fill: impl FnOnce(DataPieces<'_>),
    ) -> Result<[u8; ENTRY_BYTES], Errno> {
        let mut segments = [Segment { gref: 0, first: 0, last: 0 }; MAX_SEGMENTS];
        let mut shadows = self.0.shadow.borrow_mut();
        let shadow = &mut shadows[slot];
        while shadow.pages.len() < pages {
            let page = GrantedPage::new(&self.0.port, self.0.back, false)?;
            poison(&page);
            shadow.pages.push(page);
        }
        if !shadow.pages[..pages].iter().all(is_poisoned) {
            (self.0.complain)("a page was written after its request was answered".into());
        }
        let pieces = DataPieces::new(&shadow.pages[..pages], range.count, layout);
        segments.iter_mut().zip(pieces.iter()).for_each(|(segment, piece)| *segment = piece.segment());
        if kind != IoKind::Read {
            fill(pieces);
        }
        shadow.turn += 1;
        let op = match kind {
            IoKind::Read => Some(BlkifOp::Read),
            IoKind::Write => Some(BlkifOp::Write),
            IoKind::Flush => Some(BlkifOp::Flush),
            IoKind::Discard if self.0.discards.get() => None,
            IoKind::WriteZeroes | IoKind::Discard => return Err(Errno::EOPNOTSUPP),
        };
        let id = slot as u64 | shadow.turn << 8;
        let request = match op {
            Some(op) => BlkifRequest::new(id, op, range.start.0, &segments[..pages])
                .map_err(|_| Errno::EINVAL)?
                .encode(),
            None => discard(id, range),
        };
        shadow.status = None;
        shadow.request = Some(request);
        Ok(request)
    }

    /// Puts a request on the ring, if there is one.
    fn post(&self, request: &[u8; ENTRY_BYTES]) {
        let Some(ring) = self.0.ring.borrow().clone() else { return };
        if !ring.put_entry(request) {
            (self.0.complain)("the ring is full although a slot is free".into());
        }
        if !ring.publish() {
            let me = self.0.clone();
            ring.watch_sleep(move |text| {
                if me.open.get() {
                    (me.complain)(text);
                }
            });
        }
    }
}

impl Inner {
    async fn set_state(&self, state: u8) -> Result<(), Errno> {
        self.port.write(&format!("{}/state", self.paths.frontend), state.to_string().as_bytes()).await
    }

    /// The keys that Linux reads before it creates the disk.
    async fn published(&self) -> Result<Published, Errno> {
        let read = async |key: &str| match self.port.read(&format!("{}/{key}", self.paths.backend)).await {
            Ok(value) => Ok(Some(String::from_utf8_lossy(&value).into_owned())),
            Err(Errno::ENOENT) => Ok(None),
            Err(error) => Err(error),
        };
        let number = async |key: &str| -> Result<Option<u64>, Errno> {
            Ok(read(key).await?.and_then(|value| value.parse().ok()))
        };
        Ok(Published {
            sectors: number("sectors").await?,
            sector_bytes: number("sector-size").await?,
            read_only: number("info").await?.map(|info| info & 4 != 0),
            flushes: number("feature-flush-cache").await? == Some(1),
            discards: self.asks_for_discards.get() && number("feature-discard").await? == Some(1),
            error: read("error").await?,
            hotplug: read("hotplug-status").await?,
        })
    }

    /// Waits until `wanted` accepts the back end's state.
    async fn wait_for_back(&self, wanted: impl Fn(u8) -> bool) -> Result<u8, Errno> {
        let path = format!("{}/state", self.paths.backend);
        let watch = self.port.watch(&path).await?;
        loop {
            watch.next().await?;
            let value = match self.port.read(&path).await {
                Ok(value) => value,
                Err(Errno::ENOENT) => continue,
                Err(e) => return Err(e),
            };
            let state = std::str::from_utf8(&value).ok().and_then(|s| s.parse().ok()).unwrap_or(0);
            if wanted(state) {
                return Ok(state);
            }
        }
    }
}
