//! The ring at work: taking requests, publishing responses, sleeping, draining.

use crate::completions::{Completions, Done};
use crate::config::{LAYOUT, RingConfig};
use crate::end::{RingCloser, RingEnd, Signal};
use crate::record::{Record, Slot};
use crate::serve::{Job, Target};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;
use tap_abi::blkif::{BlkifRequest, ENTRY_BYTES, Malformed, RawResponse, STATUS_EOPNOTSUPP, STATUS_OKAY};
use tap_abi::ring::{REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD, needs_notify, unconsumed};
use tap_host::{
    BufPool, Errno, Event, EventChannel, Events, Grants, IoBuf, Log, Probe, SECTOR_BYTES, SharedPage,
    SharedPages, Tasks, Time,
};
use zerocopy::IntoBytes;

tap_host::listed! {
    pub(super) BUGS: Bug;
    FLUSH_DATA_UNORDERED = "flush-data-unordered",
        "a request that overlaps the data of an earlier flush with data does not wait for it";
    REFUSED_AS_OK = "refused-as-ok", "a malformed request is answered as if it had been carried out";
    RING_READ_TWICE = "ring-read-twice", "a ring entry is read again after it was checked";
    RECORD_LATE = "record-late", "the in-flight record is written after the request was taken";
    RECORD_GONE_AT_LEAVE = "record-gone-at-leave",
        "the in-flight record is removed when a process leaves its ring in order";
    DEAF_CLOSES = "deaf-closes",
        "a ring whose event channel is lost is closed instead of left to another process";
    RSP_PROD_BELIEVED = "rsp-prod-believed",
        "the index of responses is taken from the page, where the guest can write it";
    NO_SECOND_LOOK = "no-second-look", "the ring is not checked for requests again after asking for an event";
    EARLY_DRAIN = "early-drain", "a ring counts as drained before its last responses are published";
    ARM_WITHOUT_BARRIER = "arm-without-barrier",
        "there is no barrier between asking for an event and the last look at the requests";
    PUBLISH_WITHOUT_BARRIER = "publish-without-barrier",
        "there is no barrier between publishing responses and checking whether an event is due";
    INDEX_BEFORE_RESPONSE = "index-before-response", "the index of responses is stored before the responses";
    TURN_WITHOUT_END = "turn-without-end",
        "requests that are answered at once do not count towards the end of a turn";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    RING_LEFT = "ring-left", "a process left its ring in order";
    RING_REFUSED = "ring-refused", "a ring was closed because of its content";
}

/// The parts of a ring.
pub(crate) struct Parts<H: Grants + Events + SharedPages> {
    /// What requests are served with; each of them shares it.
    pub(crate) target: Rc<Target<H>>,
    pub(crate) config: RingConfig,
    pub(crate) page: H::Page,
    pub(crate) channel: H::Channel,
    pub(crate) record: Option<Record<H::Region>>,
    /// Data buffers.
    pub(crate) pool: BufPool,
}

struct Inner<H: Grants + Events + SharedPages> {
    parts: Parts<H>,
    req_cons: Cell<u32>,
    /// Published responses.
    rsp_prod: Cell<u32>,
    /// Requests taken and not answered.
    in_flight: Cell<u32>,
    /// The request index at which the guest will raise an event.
    armed: Cell<u32>,
    /// Requests taken since other tasks last had their turn.
    taken: Cell<u32>,
    free_slots: RefCell<Vec<u8>>,
    /// Requests of a dead process, to be executed before any other.
    resumed: RefCell<VecDeque<Slot>>,
}

/// A connected ring. Dropping it, or the end of [`BlkifRing::run`], unmaps the page and closes the channel.
pub struct BlkifRing<H: Grants + Events + SharedPages>(Inner<H>);

impl<H> BlkifRing<H>
where
    H: Time + Tasks + Log + Probe + Grants + Events + SharedPages,
{
    pub(crate) fn start(parts: Parts<H>, req_cons: u32, rsp_prod: u32) -> Self {
        assert!(parts.config.limits.batch > 0, "a batch of no requests");
        parts.target.completions.done.borrow_mut().reserve(LAYOUT.entries as usize);
        Self(Inner {
            req_cons: Cell::new(req_cons),
            rsp_prod: Cell::new(rsp_prod),
            in_flight: Cell::new(0),
            // Those to come are greater: the event index is written at the first sleep.
            armed: Cell::new(req_cons),
            taken: Cell::new(0),
            free_slots: RefCell::new((0..LAYOUT.entries as u8).rev().collect()),
            resumed: RefCell::default(),
            parts,
        })
    }

    /// The guest got the response of `slot` before the process died.
    pub(crate) fn slot_is_free(&self, slot: &Slot) {
        if let Some(record) = &self.0.parts.record {
            record.free(slot.number);
        }
    }

    fn occupy(&self, slot: &Slot) {
        self.0.free_slots.borrow_mut().retain(|free| *free != slot.number);
        self.0.in_flight.set(self.0.in_flight.get() + 1);
    }

    /// Answers the request in `slot` with `status`, as a dead process had begun to do.
    pub(crate) fn answer_again(&self, slot: &Slot, status: i16) {
        self.occupy(slot);
        let (id, op) = match BlkifRequest::parse(&slot.entry) {
            Ok(request) => (request.id, request.op as u8),
            Err(Malformed { id, op, .. }) => (id, op),
        };
        self.0.completions().done.borrow_mut().push_back(Done { slot: slot.number, id, op, status });
    }

    /// Executes the request in `slot` again.
    pub(crate) fn take_up(&self, slot: Slot) {
        self.occupy(&slot);
        self.0.resumed.borrow_mut().push_back(slot);
    }

    /// A handle that ends this ring.
    pub fn closer(&self) -> RingCloser {
        RingCloser(Rc::clone(self.0.signal()))
    }

    /// Serves the ring until it is closed or left, or refused because of what the guest wrote. Then waits for the
    /// requests in flight, removes the in-flight record unless another process will continue with it, unmaps the ring
    /// and closes its channel. The record of a refused ring stays until the caller has told the front end: if this
    /// process dies earlier, the ring can be taken over, and is refused again.
    pub async fn run(self) -> RingEnd {
        let ring = &self.0;
        let end = ring.serve().await;
        ring.drain(end).await;
        let (Parts { config, record, .. }, host) = (&ring.parts, ring.host());
        if let (Some(_), Some(name)) = (record, &config.record)
            && (!matches!(end, RingEnd::Left | RingEnd::ChannelGone | RingEnd::Refused(_))
                || host.bug(&RECORD_GONE_AT_LEAVE))
        {
            host.remove_region(name);
        }
        let why = match end {
            RingEnd::Closed => "closed",
            RingEnd::Left => {
                host.mark(&RING_LEFT);
                "left to another process"
            }
            RingEnd::ChannelGone => "event channel gone",
            RingEnd::Refused(why) => {
                host.mark(&RING_REFUSED);
                why
            }
        };
        host.log(Event::RingClosed { dom: config.dom, vbd: config.vbd, why });
        assert_eq!(Rc::strong_count(&ring.parts.target), 1, "a request outlived its ring");
        end
    }
}

impl<H> Inner<H>
where
    H: Time + Tasks + Log + Probe + Grants + Events + SharedPages,
{
    fn host(&self) -> &H {
        &self.parts.target.host
    }

    fn completions(&self) -> &Completions {
        &self.parts.target.completions
    }

    fn signal(&self) -> &Rc<Signal> {
        &self.completions().signal
    }

    async fn serve(&self) -> RingEnd {
        let Parts { channel, .. } = &self.parts;
        // A guest that a dying process did not notify must not wait forever; one event too many does no harm.
        channel.notify();
        self.serve_resumed().await;
        let mut event = pin!(channel.wait());
        loop {
            if let Err(why) = self.take_all().await {
                return RingEnd::Refused(why);
            }
            if let Some(end) = self.signal().end() {
                return end;
            }
            if self.arm() {
                match self.sleep(event.as_mut()).await {
                    Woken::Work => {}
                    Woken::Event(Ok(())) => event.set(channel.wait()),
                    Woken::Event(Err(_)) if self.host().bug(&DEAF_CLOSES) => return RingEnd::Closed,
                    Woken::Event(Err(_)) => return RingEnd::ChannelGone,
                }
            }
            self.publish();
        }
    }

    async fn serve_resumed(&self) {
        self.publish();
        loop {
            let Some(slot) = self.resumed.borrow_mut().pop_front() else { return };
            let job = self.parts.target.look_at(&slot.entry);
            if let Ok(request) = &job {
                let (id, range) = (request.id, request.range());
                self.host().log(Event::RequestResumed { vbd: self.parts.config.vbd, id, range });
            }
            let buf = self.buffer(&job).await;
            self.after_fences(&job).await;
            self.go(slot.number, job, buf);
        }
    }

    /// Takes every request that is on the ring.
    async fn take_all(&self) -> Result<(), &'static str> {
        loop {
            let prod = self.parts.page.load_u32(REQ_PROD);
            let cons = self.req_cons.get();
            let waiting = unconsumed(prod, cons);
            if waiting > LAYOUT.entries || unconsumed(prod, self.rsp_prod.get()) > LAYOUT.entries {
                return Err("more requests than the ring has entries");
            }
            if waiting == 0 {
                return Ok(());
            }
            for _ in 0..waiting {
                if self.signal().is_ending() {
                    return Ok(());
                }
                if self.taken.get() >= self.parts.config.limits.batch {
                    // Counted across calls: requests answered at once would keep this task running forever.
                    self.publish();
                    self.host().yield_now().await;
                    self.taken.set(0);
                    break;
                }
                self.take_one().await;
            }
        }
    }

    fn read_entry(&self, index: u32) -> [u8; ENTRY_BYTES] {
        let mut entry = [0; ENTRY_BYTES];
        self.parts.page.copy_in(LAYOUT.entry_offset(index), &mut entry);
        entry
    }

    async fn take_one(&self) {
        let (host, record) = (self.host(), &self.parts.record);
        let index = self.req_cons.get();
        let entry = self.read_entry(index);
        let mut job = self.parts.target.look_at(&entry);
        if host.bug(&RING_READ_TWICE) && job.is_ok() {
            job = BlkifRequest::parse(&self.read_entry(index)).map(Job);
        }
        let buf = self.buffer(&job).await;
        self.after_fences(&job).await;
        if self.signal().is_ending() {
            return;
        }
        let slot = self.free_slots.borrow_mut().pop().expect("a slot per entry of the ring");
        let late = host.bug(&RECORD_LATE);
        if let Some(record) = record {
            if !late {
                record.take(slot, index, &entry);
            }
            record.set_req_cons(index.wrapping_add(1));
        }
        self.req_cons.set(index.wrapping_add(1));
        self.in_flight.set(self.in_flight.get() + 1);
        if job.is_ok() || !host.bug(&TURN_WITHOUT_END) {
            self.taken.set(self.taken.get() + 1);
        }
        if let Ok(job) = &job {
            host.log(job.taken_event(self.parts.config.vbd));
        }
        self.go(slot, job, buf);
        if let (Some(record), true) = (record, late) {
            record.take(slot, index, &entry);
        }
    }

    /// The buffer that a request needs. While it waits for one, responses still go out.
    async fn buffer(&self, job: &Result<Job, Malformed>) -> Option<IoBuf> {
        let bytes = u64::from(job.as_ref().map_or(0, |job| job.0.count())) * SECTOR_BYTES;
        if bytes == 0 {
            return None;
        }
        let mut alloc = pin!(self.parts.pool.alloc(bytes as usize));
        let buf = poll_fn(|cx| {
            if let Poll::Ready(buf) = alloc.as_mut().poll(cx) {
                return Poll::Ready(buf);
            }
            self.publish();
            self.signal().waiter.wait(cx.waker());
            Poll::Pending
        });
        Some(buf.await.expect("88 sectors are far below the largest buffer"))
    }

    /// Waits for flushes with data that precede `job` on the ring and whose data it overlaps: the disk sees that data
    /// only when their first half is done, and keeps requests in the order in which it sees them. Responses go out
    /// meanwhile.
    async fn after_fences(&self, job: &Result<Job, Malformed>) {
        let Ok(job) = job else { return };
        if self.host().bug(&FLUSH_DATA_UNORDERED) {
            return;
        }
        let range = job.range();
        poll_fn(|cx| {
            if !self.completions().is_fenced(range) {
                return Poll::Ready(());
            }
            self.publish();
            self.signal().waiter.wait(cx.waker());
            Poll::Pending
        })
        .await;
    }

    /// Starts a request that was taken, or answers it if it is malformed.
    fn go(&self, slot: u8, job: Result<Job, Malformed>, buf: Option<IoBuf>) {
        match job {
            Ok(job) => job.start(&self.parts.target, slot, buf),
            Err(bad) => {
                self.parts.target.refused(bad.id, bad.why);
                let status = if self.host().bug(&REFUSED_AS_OK) { STATUS_OKAY } else { bad.status };
                self.completions().done(Done { slot, id: bad.id, op: bad.op, status });
            }
        }
    }

    /// Puts all responses on the ring and publishes them together.
    fn publish(&self) {
        let mut done = self.completions().done.borrow_mut();
        if done.is_empty() {
            return;
        }
        let (Parts { config, page, channel, record, .. }, host) = (&self.parts, self.host());
        let believed = host.bug(&RSP_PROD_BELIEVED);
        let old = if believed { page.load_u32(RSP_PROD) } else { self.rsp_prod.get() };
        let mut new = old;
        if host.bug(&INDEX_BEFORE_RESPONSE) {
            page.store_u32(RSP_PROD, old.wrapping_add(done.len() as u32));
        }
        for Done { slot, id, op, status } in &*done {
            if let Some(record) = record {
                record.answer(*slot, new, *status);
            }
            page.copy_out(LAYOUT.entry_offset(new), RawResponse::new(*id, *op, *status).as_bytes());
            new = new.wrapping_add(1);
        }
        page.store_u32(RSP_PROD, new);
        if !host.bug(&PUBLISH_WITHOUT_BARRIER) {
            page.full_barrier();
        }
        let event = page.load_u32(RSP_EVENT);
        self.rsp_prod.set(new);
        self.in_flight.set(self.in_flight.get() - done.len() as u32);
        for Done { slot, id, status, .. } in done.drain(..) {
            if let Some(record) = record {
                record.free(slot);
            }
            self.free_slots.borrow_mut().push(slot);
            host.log(Event::RequestDone { vbd: config.vbd, id, result: result_of(status) });
        }
        if needs_notify(old, new, event) {
            channel.notify();
        }
    }

    /// Asks for an event at the next request. `false` if a request is already there.
    fn arm(&self) -> bool {
        let (host, page) = (self.host(), &self.parts.page);
        let cons = self.req_cons.get();
        if self.armed.replace(cons.wrapping_add(1)) != cons.wrapping_add(1) {
            page.store_u32(REQ_EVENT, cons.wrapping_add(1));
            if !host.bug(&ARM_WITHOUT_BARRIER) {
                page.full_barrier();
            }
        }
        page.load_u32(REQ_PROD) == cons || host.bug(&NO_SECOND_LOOK)
    }

    async fn sleep(&self, mut event: Pin<&mut impl Future<Output = Result<(), Errno>>>) -> Woken {
        poll_fn(|cx| {
            if self.signal().is_ending() || !self.completions().done.borrow().is_empty() {
                return Poll::Ready(Woken::Work);
            }
            self.signal().waiter.wait(cx.waker());
            let woken = event.as_mut().poll(cx).map(Woken::Event);
            if woken.is_pending() {
                self.taken.set(0);
            }
            woken
        })
        .await
    }

    /// Waits for the requests in flight. A refused ring gets no more responses.
    async fn drain(&self, end: RingEnd) {
        poll_fn(|cx| {
            let last = self.completions().done.borrow().len() as u32 == self.in_flight.get();
            if matches!(end, RingEnd::Refused(_)) || (last && self.host().bug(&EARLY_DRAIN)) {
                let dropped = self.completions().done.borrow_mut().drain(..).count() as u32;
                self.in_flight.set(self.in_flight.get() - dropped);
            } else {
                self.publish();
            }
            if self.in_flight.get() == 0 {
                return Poll::Ready(());
            }
            self.signal().waiter.wait(cx.waker());
            Poll::Pending
        })
        .await;
    }
}

enum Woken {
    /// Responses wait, or the ring should be closed.
    Work,
    /// The guest's event, or the end of the channel.
    Event(Result<(), Errno>),
}

fn result_of(status: i16) -> Result<(), Errno> {
    match status {
        STATUS_OKAY => Ok(()),
        STATUS_EOPNOTSUPP => Err(Errno::EOPNOTSUPP),
        _ => Err(Errno::EIO),
    }
}
