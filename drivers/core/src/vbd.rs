//! The life of one virtual disk.
//!
//! ```text
//!             pause              last request ends
//!   Running ─────────► Draining ───────────────────► Paused
//!      ▲                  │ resume                      │ resume
//!      └──────────────────┴─────────────────────────────┘
//!   any of them ──close──► Closing ──last request ends, lower node closed──► Closed
//! ```
//!
//! # Contract
//!
//! * Requests that come while the disk is draining or paused wait and go on in their order after `resume`; a flush
//!   waits like any other. From `close` on all are refused with `ESHUTDOWN`, also those that wait.
//! * `Paused` is reached when no request is in flight, whether or not anybody waits in [`Vbd::pause`] for it.
//! * The lower node is closed once, with no request in flight.
//! * A request whose future is dropped after it went down is carried to its end by a task, and counts as in flight
//!   until then: its effect may still come, and nothing that overlaps it may overtake that. One that waits is
//!   forgotten.

use crate::wait::{Event as Flag, Line, Semaphore};
use crate::{Extent, LocalBoxFuture, Node, NodeInfo, Request, Response, WaitReport};
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use tap_host::{Bug, Errno, Event, Log, Probe, SectorRange, Tasks, VbdId};

/// A [`Node`] with a life cycle; clones share it. It runs, can be paused and resumed (requests that come meanwhile wait
/// and go on in order), and is closed once, after which requests are refused with `ESHUTDOWN`.
pub struct Vbd<H>(Rc<Inner<H>>);

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
}

struct Inner<H> {
    host: H,
    id: VbdId,
    lower: Rc<dyn Node>,
    stage: Cell<Stage>,
    in_flight: Cell<usize>,
    /// Set when there is no request in flight.
    idle: Flag,
    /// Set at every change of stage, for those who wait in `pause`.
    changed: Flag,
    /// Requests that wait for `resume`.
    held: RefCell<Line>,
    close_lock: Semaphore,
    close_result: Cell<Option<Result<(), Errno>>>,
}

impl<H> Clone for Vbd<H> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<H: Log + Tasks + Probe> Vbd<H> {
    /// A running disk above `lower`.
    pub fn new(host: H, id: VbdId, lower: Rc<dyn Node>) -> Self {
        let idle = Flag::new();
        idle.set();
        host.log(Event::VbdState { vbd: id, state: Stage::Running.text() });
        Self(Rc::new(Inner {
            host,
            id,
            lower,
            stage: Cell::new(Stage::Running),
            in_flight: Cell::new(0),
            idle,
            changed: Flag::new(),
            held: RefCell::default(),
            close_lock: Semaphore::new(1),
            close_result: Cell::new(None),
        }))
    }

    /// Stops admission and completes when nothing is in flight. Dropping the future does not resume the disk.
    ///
    /// # Errors
    /// `EINTR` when the disk was resumed before it was drained, `ESHUTDOWN` when it is closed.
    pub async fn pause(&self) -> Result<(), Errno> {
        let inner = &self.0;
        if inner.stage.get() == Stage::Running {
            inner.enter(Stage::Draining);
            inner.settle();
        }
        loop {
            match inner.stage.get() {
                Stage::Paused => return Ok(()),
                Stage::Running => return Err(Errno::EINTR),
                Stage::Closing | Stage::Closed => return Err(Errno::ESHUTDOWN),
                Stage::Draining => inner.changed.wait().await,
            }
        }
    }

    /// Lets requests in again, those first that waited. Does nothing on a running disk.
    ///
    /// # Errors
    /// `ESHUTDOWN` when the disk is closed.
    pub fn resume(&self) -> Result<(), Errno> {
        match self.0.stage.get() {
            Stage::Running => Ok(()),
            Stage::Closing | Stage::Closed => Err(Errno::ESHUTDOWN),
            Stage::Draining | Stage::Paused => {
                self.0.enter(Stage::Running);
                let first = self.0.held.borrow().first();
                first.into_iter().for_each(Waker::wake);
                Ok(())
            }
        }
    }

    /// Requests that were admitted and not answered.
    pub fn in_flight(&self) -> usize {
        self.0.in_flight.get()
    }

    async fn close_once(&self) -> Result<(), Errno> {
        let inner = &self.0;
        if !matches!(inner.stage.get(), Stage::Closing | Stage::Closed) {
            inner.enter(Stage::Closing);
            let refused = inner.held.borrow_mut().take_all();
            refused.into_iter().for_each(|(_, waker)| waker.wake());
        }
        let _turn = inner.close_lock.acquire().await;
        if let Some(result) = inner.close_result.get() {
            return result;
        }
        inner.idle.wait().await;
        // If this future is dropped now, nobody learns how closing went, and nobody may close again.
        inner.close_result.set(Some(Err(Errno::EINTR)));
        let result = inner.lower.close().await;
        inner.close_result.set(Some(result));
        inner.enter(Stage::Closed);
        result
    }
}

impl<H: Log + Probe> Inner<H> {
    fn enter(&self, stage: Stage) {
        self.stage.set(stage);
        self.host.log(Event::VbdState { vbd: self.id, state: stage.text() });
        self.changed.set();
        self.changed.clear();
    }

    /// A draining disk without requests in flight is paused.
    fn settle(&self) {
        let idle = self.in_flight.get() == 0 || self.host.bug(Bug::PauseUnwatched);
        if self.stage.get() == Stage::Draining && idle {
            self.enter(Stage::Paused);
        }
    }

    fn admit(self: &Rc<Self>) -> Admitted<H> {
        self.in_flight.set(self.in_flight.get() + 1);
        self.idle.clear();
        Admitted(Rc::clone(self))
    }
}

/// One request in flight.
struct Admitted<H: Log + Probe>(Rc<Inner<H>>);

impl<H: Log + Probe> Drop for Admitted<H> {
    fn drop(&mut self) {
        // A panic must not meet another one here: it ends everything anyway.
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

/// A request that went down. Dropped before its end, it goes on without anybody who waits for it.
struct Below<H: Log + Tasks + Probe>(Option<(Admitted<H>, LocalBoxFuture<Response>)>);

impl<H: Log + Tasks + Probe> Below<H> {
    fn new(admitted: Admitted<H>, request: Request) -> Self {
        let answer = admitted.0.lower.submit(request);
        Self(Some((admitted, answer)))
    }
}

impl<H: Log + Tasks + Probe> Future for Below<H> {
    type Output = Response;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Response> {
        let (_, answer) = self.0.as_mut().expect("polled after its end");
        let response = ready!(answer.as_mut().poll(cx));
        self.0 = None;
        Poll::Ready(response)
    }
}

impl<H: Log + Tasks + Probe> Drop for Below<H> {
    fn drop(&mut self) {
        let Some((admitted, answer)) = self.0.take() else { return };
        let inner = Rc::clone(&admitted.0);
        if std::thread::panicking() || inner.host.bug(Bug::GivenUpForgotten) {
            return;
        }
        inner.host.spawn("given up", u64::from(inner.id.0), async move {
            drop(answer.await);
            drop(admitted);
        });
    }
}

/// A place among the requests that wait for `resume`.
struct Held<H: Log + Probe> {
    inner: Rc<Inner<H>>,
    place: Option<u64>,
}

impl<H: Log + Probe> Held<H> {
    fn new(inner: Rc<Inner<H>>) -> Self {
        // The place is taken now, not at the first poll, so that the order is that of submission.
        let mut place = None;
        inner.held.borrow_mut().wait(&mut place, Waker::noop());
        Self { inner, place }
    }

    /// `None` when the disk is closed.
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

impl<H: Log + Probe> Drop for Held<H> {
    fn drop(&mut self) {
        // A panic must not meet another one here: it ends everything anyway.
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

impl<H: Log + Tasks + Probe> Node for Vbd<H> {
    fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
        let inner = &self.0;
        let refuse = |request: Request| Response { result: Err(Errno::ESHUTDOWN), bufs: request.bufs };
        match inner.stage.get() {
            Stage::Closing | Stage::Closed => Box::pin(std::future::ready(refuse(request))),
            Stage::Running if inner.held.borrow().is_empty() => {
                let admitted = inner.admit();
                Box::pin(Below::new(admitted, request))
            }
            _ => {
                let mut held = Held::new(Rc::clone(inner));
                Box::pin(async move {
                    let Some(admitted) = held.admitted().await else { return refuse(request) };
                    let below = Below::new(admitted, request);
                    drop(held);
                    below.await
                })
            }
        }
    }

    fn extents(&self, range: SectorRange, most: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        match self.0.stage.get() {
            Stage::Closing | Stage::Closed => Box::pin(std::future::ready(Err(Errno::ESHUTDOWN))),
            Stage::Running | Stage::Draining | Stage::Paused => {
                // Counted like a request: the lower node is not closed under it.
                let (admitted, answer) = (self.0.admit(), self.0.lower.extents(range, most));
                let counted = (!self.0.host.bug(Bug::LooksUncounted)).then_some(admitted);
                Box::pin(async move {
                    let _admitted = counted;
                    answer.await
                })
            }
        }
    }

    fn info(&self) -> NodeInfo {
        self.0.lower.info()
    }

    fn wait_report(&self) -> Vec<WaitReport> {
        self.0.lower.wait_report()
    }

    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        let vbd = self.clone();
        Box::pin(async move { vbd.close_once().await })
    }
}

#[cfg(test)]
mod tests;
