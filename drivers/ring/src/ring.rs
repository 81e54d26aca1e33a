//! The ring at work, whoever is at its other end: taking requests, publishing responses, sleeping, draining.

use crate::completions::{Completions, Done};
use crate::config::{LAYOUT, Limits};
use crate::end::{RingCloser, RingEnd, Signal};
use crate::peer::{Bad, Peer, RingRequest};
use crate::record::{EPOCH_AT, Record, Slot};
use crate::serve::Target;
use crate::slots::{Slots, Taken};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;
use tap_abi::blkif::{ENTRY_BYTES, Malformed, RawResponse, STATUS_EOPNOTSUPP, STATUS_OKAY};
use tap_abi::ring::{REQ_PROD, RSP_PROD, unconsumed};
use tap_host::{
    BufPool, Errno, Event, IoBuf, Log, Probe, SECTOR_BYTES, SharedPage, SharedPages, Tasks, Time, VbdId,
};
use zerocopy::IntoBytes;

tap_host::listed! {
    pub(super) BUGS: Bug;
    FLUSH_DATA_UNORDERED = "flush-data-unordered",
        "a request that overlaps the data of an earlier flush with data does not wait for it";
    REFUSED_AS_OK = "refused-as-ok", "a malformed request is answered as if it had been carried out";
    RING_READ_TWICE = "ring-read-twice", "a ring entry is read again after it was checked";
    RECORD_LATE = "record-late", "the in-flight record is written after the request was taken";
    DEAF_CLOSES = "deaf-closes",
        "a ring whose event channel is lost is closed instead of left to another process";
    RSP_PROD_BELIEVED = "rsp-prod-believed",
        "the index of responses is taken from the page, where the guest can write it";
    EARLY_DRAIN = "early-drain", "a ring counts as drained before its last responses are published";
    INDEX_BEFORE_RESPONSE = "index-before-response", "the index of responses is stored before the responses";
    ABANDONED_ANSWERS = "abandoned-answers",
        "requests that end after their ring was abandoned are answered with what became of them";
    TURN_WITHOUT_END = "turn-without-end",
        "requests that are answered at once do not count towards the end of a turn";
}

/// The parts of a ring.
pub(crate) struct Parts<H: SharedPages, P> {
    /// What requests are served with; each of them shares it.
    pub(crate) target: Rc<Target<H, P>>,
    pub(crate) vbd: VbdId,
    pub(crate) limits: Limits,
    pub(crate) record: Option<Record<H::Region>>,
    /// Data buffers.
    pub(crate) pool: BufPool,
}

/// A connected ring.
pub(crate) struct Ring<H: SharedPages, P> {
    pub(crate) parts: Parts<H, P>,
    req_cons: Cell<u32>,
    /// Published responses.
    rsp_prod: Cell<u32>,
    /// Requests taken since other tasks last had their turn.
    taken: Cell<u32>,
    slots: Slots,
    /// Requests of a dead process, to be executed before any other.
    resumed: RefCell<VecDeque<(Slot, Taken)>>,
}

impl<H: Time + Tasks + Log + Probe + SharedPages, P: Peer<H>> Ring<H, P> {
    pub(crate) fn start(parts: Parts<H, P>, req_cons: u32, rsp_prod: u32) -> Self {
        assert!(parts.limits.batch > 0, "a batch of no requests");
        parts.target.completions.done.borrow_mut().reserve(LAYOUT.entries as usize);
        Self {
            req_cons: Cell::new(req_cons),
            rsp_prod: Cell::new(rsp_prod),
            taken: Cell::new(0),
            slots: Slots::new(LAYOUT.entries as u8),
            resumed: RefCell::default(),
            parts,
        }
    }

    /// The guest got the response of `slot` before the process died.
    pub(crate) fn slot_is_free(&self, slot: &Slot) {
        if let Some(record) = &self.parts.record {
            record.free(slot.number);
        }
    }

    fn occupy(&self, slot: &Slot) -> Taken {
        let (id, op) = match self.parts.target.peer.parse(&slot.entry) {
            Ok(request) => (request.id(), request.op()),
            Err(Bad::Answer(Malformed { id, op, .. })) => (id, op),
            Err(Bad::Refuse(_)) => unreachable!("a request that cannot be answered is never recorded"),
        };
        self.slots.take_at(slot.number, id, op)
    }

    /// Answers the request in `slot` with `status`, as a dead process had begun to do.
    pub(crate) fn answer_again(&self, slot: &Slot, status: i16) {
        let taken = self.occupy(slot);
        self.completions().done.borrow_mut().push_back(Done { taken, status });
    }

    /// Executes the request in `slot` again.
    pub(crate) fn take_up(&self, slot: Slot) {
        let taken = self.occupy(&slot);
        self.resumed.borrow_mut().push_back((slot, taken));
    }

    /// A handle that ends this ring.
    pub(crate) fn closer(&self) -> RingCloser {
        RingCloser(Rc::clone(self.signal()))
    }

    /// Serves the ring until it is closed or left, or refused because of what the other end wrote, and waits for the
    /// requests in flight.
    pub(crate) async fn run(&self) -> RingEnd {
        let end = self.serve().await;
        self.drain(end).await;
        match end {
            RingEnd::Closed | RingEnd::Left if self.is_abandoned() => RingEnd::Abandoned,
            end => end,
        }
    }

    /// A ring from which nothing was taken is new again: whoever connects it next need not know that it was connected.
    pub(crate) fn forget_unused(&self) {
        if self.req_cons.get() == 0 && self.rsp_prod.get() == 0 {
            self.peer().page().store_u32(EPOCH_AT, 0);
        }
    }

    pub(crate) fn host(&self) -> &H {
        &self.parts.target.host
    }

    fn peer(&self) -> &P {
        &self.parts.target.peer
    }

    fn completions(&self) -> &Completions {
        &self.parts.target.completions
    }

    fn signal(&self) -> &Rc<Signal> {
        &self.completions().signal
    }

    async fn serve(&self) -> RingEnd {
        let peer = self.peer();
        // A guest that a dying process did not notify must not wait forever; one event too many does no harm.
        peer.call();
        if let Err(why) = self.serve_resumed().await {
            return RingEnd::Refused(why);
        }
        let mut event = pin!(peer.wait());
        loop {
            if let Err(why) = self.take_all().await {
                return RingEnd::Refused(why);
            }
            if let Some(end) = self.signal().end() {
                return end;
            }
            if peer.ask(self.host(), self.req_cons.get()) {
                match self.sleep(event.as_mut()).await {
                    Woken::Work => {}
                    Woken::Event(Ok(())) => event.set(peer.wait()),
                    Woken::Event(Err(_)) if self.host().bug(&DEAF_CLOSES) => return RingEnd::Closed,
                    Woken::Event(Err(_)) => return RingEnd::ChannelGone,
                }
            }
            self.publish();
        }
    }

    async fn serve_resumed(&self) -> Result<(), &'static str> {
        self.publish();
        loop {
            let Some((slot, taken)) = self.resumed.borrow_mut().pop_front() else { return Ok(()) };
            let job = self.look_at(&slot.entry)?;
            if let Ok(request) = &job {
                let (id, range) = (request.id(), request.range());
                self.host().log(Event::RequestResumed { vbd: self.parts.vbd, id, range });
            }
            let buf = self.buffer(&job).await;
            self.after_fences(&job).await;
            self.go(taken, job, buf);
        }
    }

    /// Parses and checks an entry: a request, or one that is answered with an error.
    fn look_at(&self, entry: &[u8; ENTRY_BYTES]) -> Result<Result<P::Request, Malformed>, &'static str> {
        match self.parts.target.look_at(entry) {
            Ok(request) => Ok(Ok(request)),
            Err(Bad::Answer(malformed)) => Ok(Err(malformed)),
            Err(Bad::Refuse(why)) => Err(why),
        }
    }

    /// Takes every request that is on the ring.
    async fn take_all(&self) -> Result<(), &'static str> {
        loop {
            let prod = self.peer().page().load_u32(REQ_PROD);
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
                if self.taken.get() >= self.parts.limits.batch {
                    // Counted across calls: requests answered at once would keep this task running forever.
                    self.publish();
                    self.host().yield_now().await;
                    self.taken.set(0);
                    break;
                }
                self.take_one().await?;
            }
        }
    }

    fn read_entry(&self, index: u32) -> [u8; ENTRY_BYTES] {
        let mut entry = [0; ENTRY_BYTES];
        self.peer().page().copy_in(LAYOUT.entry_offset(index), &mut entry);
        entry
    }

    async fn take_one(&self) -> Result<(), &'static str> {
        let (host, record) = (self.host(), &self.parts.record);
        let index = self.req_cons.get();
        let entry = self.read_entry(index);
        let mut job = self.look_at(&entry)?;
        if host.bug(&RING_READ_TWICE) && job.is_ok() {
            let again = self.peer().parse(&self.read_entry(index));
            job = again.map_err(|bad| match bad {
                Bad::Answer(malformed) => malformed,
                Bad::Refuse(why) => unreachable!("{why}"),
            });
        }
        let (id, op) = job.as_ref().map_or_else(|bad| (bad.id, bad.op), |job| (job.id(), job.op()));
        if P::ID_IS_SLOT && !self.slots.is_free(id) {
            return Err("a request has the id of another in flight");
        }
        let buf = self.buffer(&job).await;
        self.after_fences(&job).await;
        if self.signal().is_ending() {
            return Ok(());
        }
        let taken =
            if P::ID_IS_SLOT { self.slots.take_at(id as u8, id, op) } else { self.slots.take(id, op) };
        let (slot, late) = (taken.slot(), host.bug(&RECORD_LATE));
        if let Some(record) = record {
            if !late {
                record.take(slot, index, &entry);
            }
            record.set_req_cons(index.wrapping_add(1));
        }
        self.req_cons.set(index.wrapping_add(1));
        if job.is_ok() || !host.bug(&TURN_WITHOUT_END) {
            self.taken.set(self.taken.get() + 1);
        }
        if let Ok(job) = &job {
            let (vbd, kind) = (self.parts.vbd, job.kind().into());
            host.log(Event::RequestTaken { vbd, id, kind, range: job.range() });
        }
        self.go(taken, job, buf);
        if let (Some(record), true) = (record, late) {
            record.take(slot, index, &entry);
        }
        Ok(())
    }

    /// The buffer that a request needs. While it waits for one, responses still go out.
    async fn buffer(&self, job: &Result<P::Request, Malformed>) -> Option<IoBuf> {
        let bytes = u64::from(job.as_ref().map_or(0, data_sectors)) * SECTOR_BYTES;
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
    async fn after_fences(&self, job: &Result<P::Request, Malformed>) {
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
    fn go(&self, taken: Taken, job: Result<P::Request, Malformed>, buf: Option<IoBuf>) {
        match job {
            Ok(job) => self.parts.target.start(job, taken, buf),
            Err(bad) => {
                self.parts.target.refused(bad.id, bad.why);
                let status = if self.host().bug(&REFUSED_AS_OK) { STATUS_OKAY } else { bad.status };
                self.completions().done(Done { taken, status });
            }
        }
    }

    /// Puts all responses on the ring and publishes them together.
    fn publish(&self) {
        let mut done = self.completions().done.borrow_mut();
        if done.is_empty() || self.is_abandoned() {
            return;
        }
        let (Parts { vbd, record, .. }, host, peer) = (&self.parts, self.host(), self.peer());
        let page = peer.page();
        let believed = host.bug(&RSP_PROD_BELIEVED);
        let old = if believed { page.load_u32(RSP_PROD) } else { self.rsp_prod.get() };
        let mut new = old;
        if host.bug(&INDEX_BEFORE_RESPONSE) {
            page.store_u32(RSP_PROD, old.wrapping_add(done.len() as u32));
        }
        for Done { taken, status } in &*done {
            if let Some(record) = record {
                record.answer(taken.slot(), new, *status);
            }
            let response = RawResponse::new(taken.id(), taken.op(), *status);
            page.copy_out(LAYOUT.entry_offset(new), response.as_bytes());
            new = new.wrapping_add(1);
        }
        page.store_u32(RSP_PROD, new);
        let is_due = peer.is_due(host, old, new);
        self.rsp_prod.set(new);
        for Done { taken, status } in done.drain(..) {
            if let Some(record) = record {
                record.free(taken.slot());
            }
            host.log(Event::RequestDone { vbd: *vbd, id: taken.id(), result: result_of(status) });
            self.slots.give_back(taken);
        }
        if is_due {
            peer.call();
        }
    }

    /// Whether nothing may be answered any more.
    fn is_abandoned(&self) -> bool {
        self.signal().end() == Some(RingEnd::Abandoned) && !self.host().bug(&ABANDONED_ANSWERS)
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

    /// Waits for the requests in flight. A ring that is refused or abandoned gets no more responses.
    async fn drain(&self, end: RingEnd) {
        poll_fn(|cx| {
            let last = self.completions().done.borrow().len() as u32 == self.slots.in_flight();
            if matches!(end, RingEnd::Refused(_))
                || self.is_abandoned()
                || (last && self.host().bug(&EARLY_DRAIN))
            {
                let done = std::mem::take(&mut *self.completions().done.borrow_mut());
                done.into_iter().for_each(|Done { taken, .. }| self.slots.give_back(taken));
            } else {
                self.publish();
            }
            if self.slots.in_flight() == 0 {
                return Poll::Ready(());
            }
            self.signal().waiter.wait(cx.waker());
            Poll::Pending
        })
        .await;
    }
}

/// Sectors of data that a request has.
fn data_sectors(request: &impl RingRequest) -> u32 {
    if request.segments().is_empty() { 0 } else { request.count() }
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
