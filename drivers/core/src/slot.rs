//! A place in a graph of nodes whose lower node can be paused, exchanged and closed under load.
//!
//! ```text
//!             pause, exchange        last request ends
//!   Running ─────────────────► Draining ─────────────► Paused ──► exchange: flush, change, next lower node
//!      ▲                          │ resume                │ resume, exchange done
//!      └──────────────────────────┴───────────────────────┘
//!   any of them ──close──► Closing ──last request ends, lower node closed──► Closed
//! ```
//!
//! The top of every disk is a slot: its life cycle is the disk's. A live snapshot, a coalesce and any other change of
//! the graph are exchanges.
//!
//! # Contract
//!
//! * Requests and extent queries that arrive while the slot is draining or paused wait, and go down in order once it
//!   runs again; a flush waits like any other. After `close` all fail with `ESHUTDOWN`, including those that wait.
//! * `Paused` is reached when nothing is in flight, whether or not a caller waits in [`Slot::pause`] for it.
//! * Requests do not notice an exchange: each goes down to either the old node or the new one. Writes answered before
//!   the exchange are durable before the first request reaches the new node, so a flush of the new node alone covers
//!   them. After an error the old node stays.
//! * Exchanges of one slot, and its close, run one after the other. A slot that was paused before an exchange is paused
//!   after it.
//! * The lower node is closed once, with nothing in flight.
//! * If the future of a request or query is dropped after it went down, a task completes it, and it counts as in flight
//!   until then: its effect still happens, and no overlapping request overtakes it. So the nodes below never see a
//!   future dropped. A request that still waits is dropped.

mod open;

use crate::wait::{Event as Flag, Line, Semaphore, joined};
use crate::{
    Child, Extent, LocalBoxFuture, Measures, Node, NodeInfo, Request, Response, WaitReport, wait_report,
};
use open::{Accepted, Answer, Open};
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker, ready};
use tap_host::{Errno, Event, Log, Probe, SectorRange, Tasks, Time, VbdId};

tap_host::listed! {
    pub(super) BUGS: Bug with [open::BUGS];
    GIVEN_UP_FORGOTTEN = "given-up-forgotten", "a request that is dropped half way is no longer waited for";
    SLOT_KEPT = "slot-keeps-itself", "a disk keeps itself alive through what it calls at a change of its state";
    LOOKS_UNCOUNTED = "looks-uncounted", "a query for extents does not count as a request in flight";
    PAUSE_UNWATCHED = "pause-unwatched", "a disk counts as paused while requests are in flight";
    EXCHANGE_UNFLUSHED = "exchange-unflushed",
        "what was answered before an exchange need not be durable after it";
    PAUSE_BESIDE_EXCHANGE = "pause-beside-exchange",
        "a disk counts as paused while its image is being exchanged";
    EXCHANGES_AT_ONCE = "exchanges-at-once", "two exchanges of one disk run at once";
    HELD_ONE_BY_ONE = "held-one-by-one",
        "requests that waited for a disk to run go down one after the other";
    CLOSE_CANCELLED_ENDS = "close-cancelled-ends",
        "a close that is dropped while it waits for requests leaves the disk closed for others and its image open";
}

tap_host::listed! {
    pub(super) MARKS: Mark with [open::MARKS];
    EXCHANGED = "exchanged", "the lower node of a slot was exchanged";
    EXCHANGE_HELD = "exchange-held", "requests waited for the lower node of a slot to be exchanged";
}

/// A [`Node`] whose lower node can be paused, exchanged and closed; clones share it.
pub struct Slot<H>(Rc<Inner<H>>);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Running,
    Draining,
    Paused,
    Closing,
    Closed,
}

impl Stage {
    fn text(self) -> &'static str {
        match self {
            Stage::Running => "running",
            Stage::Draining => "draining",
            Stage::Paused => "paused",
            Stage::Closing => "closing",
            Stage::Closed => "closed",
        }
    }
    fn is_over(self) -> bool {
        matches!(self, Stage::Closing | Stage::Closed)
    }
}

struct Inner<H> {
    host: H,
    id: VbdId,
    lower: RefCell<Rc<dyn Node>>,
    stage: Cell<Stage>,
    /// Set by [`Slot::pause`].
    paused: Cell<bool>,
    /// An exchange is running.
    changing: Cell<bool>,
    in_flight: Cell<usize>,
    /// Set when there is no request in flight.
    idle: Flag,
    /// Set at every change of `stage`, `paused` or `changing`, for callers of `pause` and `exchange`.
    changed: Flag,
    /// Called at every change of `stage`.
    listener: RefCell<Option<Rc<dyn Fn()>>>,
    /// Requests that wait until the slot runs again.
    held: RefCell<Line>,
    /// Serialises exchanges and the close.
    turn: Semaphore,
    close_result: Cell<Option<Result<(), Errno>>>,
    open: Open,
}

impl<H> Clone for Slot<H> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

/// Why an exchange failed. The old node is still there.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ExchangeError<E> {
    /// The slot is closed or closing.
    #[error("the disk is closed")]
    Closed,
    /// Answered writes could not be made durable.
    #[error("flush the disk: {0}")]
    Flush(Errno),
    /// The new node could not be made.
    #[error(transparent)]
    Change(E),
}

impl<H: Time + Log + Tasks + Probe> Slot<H> {
    /// A running slot of the disk `id` over `lower`.
    pub fn new(host: H, id: VbdId, lower: Rc<dyn Node>) -> Self {
        let idle = Flag::new();
        idle.set();
        host.log(Event::VbdState { vbd: id, state: Stage::Running.text() });
        let slot = Self(Rc::new(Inner {
            host,
            id,
            lower: RefCell::new(lower),
            stage: Cell::new(Stage::Running),
            paused: Cell::new(false),
            changing: Cell::new(false),
            in_flight: Cell::new(0),
            idle,
            changed: Flag::new(),
            listener: RefCell::default(),
            held: RefCell::default(),
            turn: Semaphore::new(1),
            close_result: Cell::new(None),
            open: Open::default(),
        }));
        if slot.0.host.bug(&SLOT_KEPT) {
            let own = Rc::clone(&slot.0);
            slot.on_change(move || drop(Rc::clone(&own)));
        }
        slot
    }

    /// Stops admission, then waits until nothing is in flight and no exchange runs. Dropping the future does not resume
    /// the slot.
    ///
    /// # Errors
    /// `EINTR` when the slot was resumed before it was drained, `ESHUTDOWN` when it is closed.
    pub async fn pause(&self) -> Result<(), Errno> {
        let inner = &self.0;
        inner.paused.set(true);
        inner.update();
        loop {
            match inner.stage.get() {
                Stage::Closing | Stage::Closed => return Err(Errno::ESHUTDOWN),
                _ if !inner.paused.get() => return Err(Errno::EINTR),
                Stage::Paused if !inner.changing.get() || inner.host.bug(&PAUSE_BESIDE_EXCHANGE) => {
                    return Ok(());
                }
                Stage::Running | Stage::Draining | Stage::Paused => inner.changed.wait().await,
            }
        }
    }

    /// Admits requests again, waiting ones first; during an exchange, once that has ended. Does nothing on a running
    /// slot.
    ///
    /// # Errors
    /// `ESHUTDOWN` when the slot is closed.
    pub fn resume(&self) -> Result<(), Errno> {
        if self.0.stage.get().is_over() {
            return Err(Errno::ESHUTDOWN);
        }
        self.0.paused.set(false);
        self.0.update();
        self.0.notify();
        Ok(())
    }

    /// Drains the slot, flushes it, and replaces the lower node with the one that `change` makes from it; returns the
    /// old node, which is not closed. Requests that arrive meanwhile wait. Dropping the future early leaves the old
    /// node in place, and the slot runs again once a flush that was begun has ended; what `change` asks of the nodes
    /// below must then end in a task.
    ///
    /// # Errors
    /// [`ExchangeError`]; the old node stays.
    ///
    /// # Panics
    /// When the new node has another size or mode than the old one.
    pub async fn exchange<E>(
        &self,
        change: impl AsyncFnOnce(Rc<dyn Node>) -> Result<Rc<dyn Node>, E>,
    ) -> Result<Rc<dyn Node>, ExchangeError<E>> {
        let inner = &self.0;
        let turn = inner.turn.acquire().await;
        let turn = Some(turn).filter(|_| !inner.host.bug(&EXCHANGES_AT_ONCE));
        let mut running = (Changing::begin(Rc::clone(inner)), turn);
        loop {
            match inner.stage.get() {
                Stage::Closing | Stage::Closed => return Err(ExchangeError::Closed),
                Stage::Paused => break,
                Stage::Running | Stage::Draining => inner.changed.wait().await,
            }
        }
        let old = inner.lower();
        if !inner.host.bug(&EXCHANGE_UNFLUSHED) {
            // In a task, because the future of the exchange may be dropped. The exchange then ends with the flush, so
            // that the old node is not closed or paused beside it.
            let flush = old.submit(Request::flush());
            let (task, flushed) = joined(async move { (flush.await.result, running) });
            inner.host.spawn("flush of exchange", u64::from(inner.id.0), task);
            // The task ends without an answer only together with the process.
            let result;
            (result, running) = flushed.await.ok_or(ExchangeError::Flush(Errno::EIO))?;
            result.map_err(ExchangeError::Flush)?;
        }
        // The old one may be frozen by the change.
        let info = old.info();
        let new = change(Rc::clone(&old)).await.map_err(ExchangeError::Change)?;
        assert_eq!(new.info(), info, "an exchange must keep the size and mode of the node");
        inner.host.mark(if inner.held.borrow().is_empty() { &EXCHANGED } else { &EXCHANGE_HELD });
        *inner.lower.borrow_mut() = new;
        drop(running);
        Ok(old)
    }

    /// Requests and extent queries that were admitted and not yet answered.
    pub fn in_flight(&self) -> usize {
        self.0.in_flight.get()
    }

    /// Requests and extent queries that wait until it runs.
    pub fn waiting(&self) -> usize {
        self.0.held.borrow().len()
    }

    /// What its requests did so far. Those that nodes below are asked by others than the disk's users are not counted.
    pub fn measures(&self) -> Measures {
        *self.0.open.measures.borrow()
    }

    /// Says in an event which request takes longer than `limit_ns`, where it is, and when it ends; 0 says nothing. For
    /// requests that arrive from now on.
    pub fn watch(&self, limit_ns: u64) {
        self.0.open.set_limit(limit_ns);
    }

    /// Calls `listener` with each event about a request that takes long, after it was logged; replaces the one before.
    pub fn on_hang(&self, listener: impl Fn(&Event) + 'static) {
        *self.0.open.heard.borrow_mut() = Some(Rc::new(listener));
    }

    /// Its state: `running`, `draining`, `paused`, `closing` or `closed`.
    pub fn state(&self) -> &'static str {
        self.0.stage.get().text()
    }

    /// Whether it is closed, successfully or not.
    pub fn is_closed(&self) -> bool {
        self.0.stage.get() == Stage::Closed
    }

    /// Calls `listener` at every change of [`Slot::state`], from within the change; replaces the listener set before.
    pub fn on_change(&self, listener: impl Fn() + 'static) {
        *self.0.listener.borrow_mut() = Some(Rc::new(listener));
    }

    /// Returns a function that reports which requests below wait for which; empty once the slot is dropped, which it
    /// does not keep alive.
    pub(crate) fn wait_report_later(&self) -> impl Fn() -> Vec<WaitReport> + use<H> {
        let inner: Weak<Inner<H>> = Rc::downgrade(&self.0);
        move || inner.upgrade().map(|inner| wait_report(inner.lower())).unwrap_or_default()
    }

    async fn close_once(&self) -> Result<(), Errno> {
        let inner = &self.0;
        if !inner.stage.get().is_over() {
            inner.enter(Stage::Closing);
            let refused = inner.held.borrow_mut().take_all();
            refused.into_iter().for_each(|(_, waker)| waker.wake());
        }
        let _turn = inner.turn.acquire().await;
        if let Some(result) = inner.close_result.get() {
            return result;
        }
        if inner.host.bug(&CLOSE_CANCELLED_ENDS) {
            inner.close_result.set(Some(Err(Errno::EINTR)));
        }
        inner.idle.wait().await;
        // If this future is dropped below, the result is lost, and the node must not be closed a second time.
        inner.close_result.set(Some(Err(Errno::EINTR)));
        let result = inner.lower().close().await;
        inner.close_result.set(Some(result));
        inner.open.end();
        inner.enter(Stage::Closed);
        result
    }
}

/// A running exchange; no requests are admitted until it is dropped.
struct Changing<H: Time + Log + Tasks + Probe>(Rc<Inner<H>>);

impl<H: Time + Log + Tasks + Probe> Changing<H> {
    fn begin(inner: Rc<Inner<H>>) -> Self {
        inner.changing.set(true);
        inner.update();
        Self(inner)
    }
}

impl<H: Time + Log + Tasks + Probe> Drop for Changing<H> {
    fn drop(&mut self) {
        // A second panic here would abort the process.
        if !std::thread::panicking() {
            self.0.changing.set(false);
            self.0.update();
            self.0.notify();
        }
    }
}

impl<H> Inner<H> {
    fn lower(&self) -> Rc<dyn Node> {
        Rc::clone(&self.lower.borrow())
    }

    fn notify(&self) {
        self.changed.set();
        self.changed.clear();
    }
}

impl<H: Time + Log + Tasks + Probe> Inner<H> {
    fn enter(&self, stage: Stage) {
        self.stage.set(stage);
        self.host.log(Event::VbdState { vbd: self.id, state: stage.text() });
        self.notify();
        let listener = self.listener.borrow().clone();
        listener.iter().for_each(|listener| listener());
    }

    /// Begins to drain, or admits requests again.
    fn update(&self) {
        let held = self.paused.get() || self.changing.get();
        match self.stage.get() {
            Stage::Running if held => {
                self.enter(Stage::Draining);
                self.settle();
            }
            Stage::Draining | Stage::Paused if !held => {
                self.enter(Stage::Running);
                let first = self.held.borrow().first();
                first.into_iter().for_each(Waker::wake);
            }
            _ => {}
        }
    }

    /// Pauses a draining slot that has nothing in flight.
    fn settle(&self) {
        let idle = self.in_flight.get() == 0 || self.host.bug(&PAUSE_UNWATCHED);
        if self.stage.get() == Stage::Draining && idle {
            self.enter(Stage::Paused);
        }
    }

    fn admit(self: &Rc<Self>) -> Admitted<H> {
        self.in_flight.set(self.in_flight.get() + 1);
        self.idle.clear();
        Admitted(Rc::clone(self))
    }

    /// Admits a request at once, makes it wait, or refuses it.
    fn admission(self: &Rc<Self>) -> Admission<H> {
        match self.stage.get() {
            Stage::Closing | Stage::Closed => Admission::Refused,
            Stage::Running if self.held.borrow().is_empty() => Admission::Now(self.admit()),
            _ => Admission::Later(Held::new(Rc::clone(self))),
        }
    }
}

/// The decision on an arriving request.
enum Admission<H: Time + Log + Tasks + Probe> {
    Now(Admitted<H>),
    Later(Held<H>),
    Refused,
}

/// One request in flight.
struct Admitted<H: Time + Log + Tasks + Probe>(Rc<Inner<H>>);

impl<H: Time + Log + Tasks + Probe> Drop for Admitted<H> {
    fn drop(&mut self) {
        // A second panic here would abort the process.
        if std::thread::panicking() {
            return;
        }
        let left = self.0.in_flight.get() - 1;
        self.0.in_flight.set(left);
        if left == 0 {
            self.0.idle.set();
            self.0.settle();
        }
    }
}

/// A request or query that went down. If dropped before it has ended, a task completes it.
struct Below<H: Time + Log + Tasks + Probe, T: Answer>(Option<Sent<H, T>>);

struct Sent<H: Time + Log + Tasks + Probe, T> {
    admitted: Admitted<H>,
    /// Queries are not measured.
    accepted: Option<Accepted<H>>,
    answer: LocalBoxFuture<T>,
}

impl<H: Time + Log + Tasks + Probe, T: Answer> Sent<H, T> {
    fn answered(&self, answer: &T) {
        if let Some(accepted) = &self.accepted {
            accepted.answered(answer.result());
        }
    }
}

impl<H: Time + Log + Tasks + Probe> Below<H, Response> {
    fn request(admitted: Admitted<H>, accepted: Accepted<H>, request: Request) -> Self {
        accepted.goes_down();
        let answer = admitted.0.lower.borrow().submit(request);
        Self(Some(Sent { admitted, accepted: Some(accepted), answer }))
    }
}

type Extents = Result<Vec<Extent>, Errno>;

impl<H: Time + Log + Tasks + Probe> Below<H, Extents> {
    /// Counted like a request, so that the lower node is not closed or exchanged meanwhile.
    fn extents(admitted: Admitted<H>, range: SectorRange, max: usize) -> LocalBoxFuture<Extents> {
        let answer = admitted.0.lower.borrow().extents(range, max);
        if admitted.0.host.bug(&LOOKS_UNCOUNTED) {
            return answer;
        }
        Box::pin(Self(Some(Sent { admitted, accepted: None, answer })))
    }
}

impl<H: Time + Log + Tasks + Probe, T: Answer> Future for Below<H, T> {
    type Output = T;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let sent = self.0.as_mut().expect("polled after completion");
        let answer = ready!(sent.answer.as_mut().poll(cx));
        sent.answered(&answer);
        self.0 = None;
        Poll::Ready(answer)
    }
}

impl<H: Time + Log + Tasks + Probe, T: Answer> Drop for Below<H, T> {
    fn drop(&mut self) {
        let Some(mut sent) = self.0.take() else { return };
        let inner = Rc::clone(&sent.admitted.0);
        if std::thread::panicking() || inner.host.bug(&GIVEN_UP_FORGOTTEN) {
            return;
        }
        inner.host.spawn("given up", u64::from(inner.id.0), async move {
            let answer = sent.answer.as_mut().await;
            sent.answered(&answer);
        });
    }
}

/// A place in the queue of requests that wait until the slot runs.
struct Held<H: Time + Log + Tasks + Probe> {
    inner: Rc<Inner<H>>,
    place: Option<u64>,
}

impl<H: Time + Log + Tasks + Probe> Held<H> {
    fn new(inner: Rc<Inner<H>>) -> Self {
        // The place is taken here, not at the first poll, to keep the order of submission.
        let mut place = None;
        inner.held.borrow_mut().wait(&mut place, Waker::noop());
        Self { inner, place }
    }

    /// Waits for admission; `None` when the slot is closed.
    async fn admitted(&mut self) -> Option<Admitted<H>> {
        poll_fn(|cx| {
            let mut held = self.inner.held.borrow_mut();
            match self.inner.stage.get() {
                Stage::Closing | Stage::Closed => Poll::Ready(None),
                Stage::Running if held.is_first(self.place) => Poll::Ready(Some(self.inner.admit())),
                _ => {
                    held.wait(&mut self.place, cx.waker());
                    Poll::Pending
                }
            }
        })
        .await
    }
}

impl<H: Time + Log + Tasks + Probe> Drop for Held<H> {
    fn drop(&mut self) {
        // A second panic here would abort the process.
        if std::thread::panicking() {
            return;
        }
        let mut held = self.inner.held.borrow_mut();
        let was_first = held.is_first(self.place);
        held.leave(&mut self.place);
        let next = if was_first && self.inner.stage.get() == Stage::Running { held.first() } else { None };
        drop(held);
        next.into_iter().for_each(Waker::wake);
    }
}

impl<H: Time + Log + Tasks + Probe> Node for Slot<H> {
    fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
        let refuse = |accepted: Accepted<H>, request: Request| {
            accepted.answered(Err(Errno::ESHUTDOWN));
            Response { result: Err(Errno::ESHUTDOWN), bufs: request.bufs }
        };
        let accepted = Accepted::new(&self.0, &request);
        match self.0.admission() {
            Admission::Refused => Box::pin(std::future::ready(refuse(accepted, request))),
            Admission::Now(admitted) => Box::pin(Below::request(admitted, accepted, request)),
            Admission::Later(mut held) => Box::pin(async move {
                let Some(admitted) = held.admitted().await else { return refuse(accepted, request) };
                let below = Below::request(admitted, accepted, request);
                // Frees the place, so that the next one is admitted.
                let _kept = held.inner.host.bug(&HELD_ONE_BY_ONE).then_some(held);
                below.await
            }),
        }
    }

    fn extents(&self, range: SectorRange, max: usize) -> LocalBoxFuture<Extents> {
        match self.0.admission() {
            Admission::Refused => Box::pin(std::future::ready(Err(Errno::ESHUTDOWN))),
            Admission::Now(admitted) => Below::extents(admitted, range, max),
            Admission::Later(mut held) => Box::pin(async move {
                let admitted = held.admitted().await.ok_or(Errno::ESHUTDOWN)?;
                let below = Below::extents(admitted, range, max);
                drop(held);
                below.await
            }),
        }
    }

    fn info(&self) -> NodeInfo {
        self.0.lower.borrow().info()
    }

    fn children(&self) -> Vec<Child> {
        if self.0.stage.get() == Stage::Closed { Vec::new() } else { vec![Child::lower(self.0.lower())] }
    }

    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        let slot = self.clone();
        Box::pin(async move { slot.close_once().await })
    }
}

#[cfg(test)]
mod tests;
