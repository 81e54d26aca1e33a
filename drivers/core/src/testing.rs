//! A small executor with a manual clock, and a host for tests.

use crate::{Extent, LocalBoxFuture, Node, NodeInfo, Op, Request, Response, Source};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use tap_host::{
    Bug, Errno, Event, IoBuf, IoVec, Log, Mark, Probe, SECTOR_BYTES, SectorRange, Tasks, Time,
    copy_from_slice,
};

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Runs tasks in the order of their wake-ups.
#[derive(Clone, Default)]
pub(crate) struct Pool(Rc<Inner>);

#[derive(Default)]
struct Inner {
    tasks: RefCell<BTreeMap<usize, Task>>,
    next: Cell<usize>,
    ready: Arc<Mutex<VecDeque<usize>>>,
    now_ns: Cell<u64>,
    sleepers: RefCell<BTreeMap<(u64, usize), Waker>>,
    events: RefCell<Vec<Event>>,
    marks: RefCell<Vec<&'static Mark>>,
    bugs: RefCell<BTreeSet<&'static Bug>>,
}

struct TaskWaker(usize, Arc<Mutex<VecDeque<usize>>>);

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        let mut ready = self.1.lock().unwrap();
        if !ready.contains(&self.0) {
            ready.push_back(self.0);
        }
    }
}

/// The output of a started future, shared with the caller.
pub(crate) struct Outcome<T> {
    value: Rc<RefCell<Option<T>>>,
    pub(crate) task: usize,
}

impl<T> Outcome<T> {
    pub(crate) fn get(&self) -> std::cell::Ref<'_, Option<T>> {
        self.value.borrow()
    }
    pub(crate) fn take(&self) -> Option<T> {
        self.value.borrow_mut().take()
    }
}

impl Pool {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + 'static) -> usize {
        let id = self.0.next.get();
        self.0.next.set(id + 1);
        self.0.tasks.borrow_mut().insert(id, Box::pin(task));
        self.0.ready.lock().unwrap().push_back(id);
        id
    }

    /// Starts `future` and runs what is ready.
    pub(crate) fn start<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> Outcome<T> {
        let outcome = self.defer(future);
        self.run();
        outcome
    }

    /// Starts `future` without running it.
    pub(crate) fn defer<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> Outcome<T> {
        let value = Rc::new(RefCell::new(None));
        let out = Rc::clone(&value);
        let task = self.spawn(async move {
            let result = future.await;
            *out.borrow_mut() = Some(result);
        });
        Outcome { value, task }
    }

    /// Drops a task.
    pub(crate) fn cancel(&self, id: usize) {
        let task = self.0.tasks.borrow_mut().remove(&id);
        drop(task);
    }

    /// Runs until nothing is ready.
    pub(crate) fn run(&self) {
        while self.turn() {}
    }

    /// Polls the first ready task; returns whether there was one.
    pub(crate) fn turn(&self) -> bool {
        let next = self.0.ready.lock().unwrap().pop_front();
        let Some(id) = next else { return false };
        let Some(mut task) = self.0.tasks.borrow_mut().remove(&id) else { return true };
        let waker = Waker::from(Arc::new(TaskWaker(id, Arc::clone(&self.0.ready))));
        if task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
            self.0.tasks.borrow_mut().insert(id, task);
        }
        true
    }

    /// Runs until nothing is ready or sleeping, moving the clock to each sleeper in turn.
    pub(crate) fn run_through_time(&self) {
        loop {
            self.run();
            let first = self.0.sleepers.borrow_mut().pop_first();
            let Some(((at, _), waker)) = first else { return };
            self.0.now_ns.set(at);
            waker.wake();
        }
    }

    /// Runs for `ns`, moving the clock to each sleeper in turn.
    pub(crate) fn pass(&self, ns: u64) {
        let until = self.0.now_ns.get() + ns;
        loop {
            self.run();
            let mut sleepers = self.0.sleepers.borrow_mut();
            let first = sleepers
                .first_entry()
                .filter(|first| first.key().0 <= until)
                .map(|first| first.remove_entry());
            drop(sleepers);
            let Some(((at, _), waker)) = first else { break };
            self.0.now_ns.set(at);
            waker.wake();
        }
        self.0.now_ns.set(until);
    }

    /// Polls a future with a waker that does nothing.
    pub(crate) fn poll_once<F: Future + ?Sized>(&self, future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    pub(crate) fn switch_on(&self, bug: &str) {
        let bug = Bug::find(crate::BUGS, bug).expect("a bug of this crate");
        self.0.bugs.borrow_mut().insert(bug);
    }
    pub(crate) fn marked(&self, mark: &str) -> usize {
        let mark = Mark::find(crate::MARKS, mark).expect("a mark of this crate");
        self.0.marks.borrow().iter().filter(|m| **m == mark).count()
    }
    /// Tasks that have not ended.
    pub(crate) fn tasks(&self) -> usize {
        self.0.tasks.borrow().len()
    }
    pub(crate) fn logged(&self) -> Vec<Event> {
        self.0.events.borrow().clone()
    }
}

impl Time for Pool {
    fn now_ns(&self) -> u64 {
        self.0.now_ns.get()
    }
    fn sleep_ns(&self, ns: u64) -> impl Future<Output = ()> + 'static {
        let (inner, until) = (Rc::clone(&self.0), self.0.now_ns.get() + ns);
        poll_fn(move |cx| {
            if inner.now_ns.get() >= until {
                return Poll::Ready(());
            }
            let key = inner.next.get();
            inner.next.set(key + 1);
            inner.sleepers.borrow_mut().insert((until, key), cx.waker().clone());
            Poll::Pending
        })
    }
}

impl Tasks for Pool {
    fn spawn(&self, _: &'static str, _: u64, task: impl Future<Output = ()> + 'static) {
        Pool::spawn(self, task);
    }
    fn yield_now(&self) -> impl Future<Output = ()> + 'static {
        let mut yielded = false;
        poll_fn(move |cx| {
            if std::mem::replace(&mut yielded, true) {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
    }
}

impl Log for Pool {
    fn log(&self, event: Event) {
        self.0.events.borrow_mut().push(event);
    }
}

impl Probe for Pool {
    fn bug(&self, bug: &'static Bug) -> bool {
        self.0.bugs.borrow().contains(bug)
    }
    fn mark(&self, mark: &'static Mark) {
        self.0.marks.borrow_mut().push(mark);
    }
}

/// What a [`Script`] does with a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    Ok,
    Fail(Errno),
}

/// A lower node that records its requests. They and its queries stay in flight until they are released.
#[derive(Clone, Default)]
pub(crate) struct Script(Rc<ScriptInner>);

#[derive(Default)]
struct ScriptInner {
    seen: RefCell<Vec<(Op, SectorRange)>>,
    /// Ranges of requests with FUA.
    durable: RefCell<Vec<SectorRange>>,
    /// Answers to requests by (first sector, count); all others succeed.
    answers: RefCell<BTreeMap<(u64, u32), VecDeque<Step>>>,
    bad_sector: Cell<Option<u64>>,
    hold: Cell<bool>,
    go: crate::wait::Event,
    in_flight: Cell<usize>,
    max_in_flight: Cell<usize>,
    closed: Cell<usize>,
    close_error: Cell<Option<Errno>>,
    read_only: Cell<bool>,
}

impl Script {
    pub(crate) fn held() -> Self {
        let script = Self::default();
        script.0.hold.set(true);
        script
    }
    /// Holds all further requests.
    pub(crate) fn hold(&self) {
        self.0.hold.set(true);
        self.0.go.clear();
    }
    /// Releases all requests in flight and all further ones.
    pub(crate) fn release(&self) {
        self.0.hold.set(false);
        self.0.go.set();
    }
    /// Releases only the requests in flight.
    pub(crate) fn release_now(&self) {
        self.0.go.set();
        self.0.go.clear();
    }
    pub(crate) fn answer(&self, range: (u64, u32), steps: &[Step]) {
        self.0.answers.borrow_mut().entry(range).or_default().extend(steps);
    }
    /// Every request that covers `sector` fails with `EIO`.
    pub(crate) fn break_sector(&self, sector: u64) {
        self.0.bad_sector.set(Some(sector));
    }
    /// Closing fails with `error`.
    pub(crate) fn fail_close(&self, error: Errno) {
        self.0.close_error.set(Some(error));
    }
    pub(crate) fn make_read_only(&self) {
        self.0.read_only.set(true);
    }
    pub(crate) fn seen(&self) -> Vec<(Op, SectorRange)> {
        self.0.seen.borrow().clone()
    }
    pub(crate) fn durable(&self) -> Vec<SectorRange> {
        self.0.durable.borrow().clone()
    }
    pub(crate) fn max_in_flight(&self) -> usize {
        self.0.max_in_flight.get()
    }
    pub(crate) fn times_closed(&self) -> usize {
        self.0.closed.get()
    }

    fn result(&self, range: SectorRange) -> Result<(), Errno> {
        let key = (range.start.0, range.count);
        if let Some(Step::Fail(e)) = self.0.answers.borrow_mut().get_mut(&key).and_then(VecDeque::pop_front) {
            return Err(e);
        }
        let bad = |s: u64| s >= range.start.0 && s < range.start.0 + u64::from(range.count);
        if self.0.bad_sector.get().is_some_and(bad) { Err(Errno::EIO) } else { Ok(()) }
    }
}

impl Node for Script {
    fn submit(&self, mut request: Request) -> LocalBoxFuture<Response> {
        let script = self.clone();
        Box::pin(async move {
            let inner = &script.0;
            inner.seen.borrow_mut().push((request.op, request.range));
            if request.fua {
                inner.durable.borrow_mut().push(request.range);
            }
            inner.in_flight.set(inner.in_flight.get() + 1);
            inner.max_in_flight.set(inner.max_in_flight.get().max(inner.in_flight.get()));
            if inner.hold.get() {
                inner.go.wait().await;
            }
            inner.in_flight.set(inner.in_flight.get() - 1);
            if request.op == Op::Read {
                fill_with_sector_numbers(request.range, &mut request.bufs);
            }
            Response { result: script.result(request.range), bufs: request.bufs }
        })
    }
    fn extents(&self, range: SectorRange, _: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        let script = self.clone();
        Box::pin(async move {
            if script.0.hold.get() {
                script.0.go.wait().await;
            }
            let count = u64::from(range.count);
            let all = Extent { count, source: Source::Nothing, zero: true, allocated: false };
            script.result(range).map(|()| vec![all])
        })
    }
    fn info(&self) -> NodeInfo {
        NodeInfo::new(1000, self.0.read_only.get())
    }
    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        self.0.closed.set(self.0.closed.get() + 1);
        Box::pin(std::future::ready(self.0.close_error.get().map_or(Ok(()), Err)))
    }
}

fn fill_with_sector_numbers(range: SectorRange, bufs: &mut [IoBuf]) {
    for i in 0..u64::from(range.count) {
        let sector = [(range.start.0 + i) as u8; SECTOR_BYTES as usize];
        copy_from_slice(bufs, (i * SECTOR_BYTES) as usize, &sector);
    }
}

/// A buffer of `sectors` sectors.
pub(crate) fn sectors(count: u32) -> IoVec {
    std::iter::once(IoBuf::unpooled(count as usize * SECTOR_BYTES as usize).unwrap()).collect()
}

/// A read of `count` sectors from `start`.
pub(crate) fn read(start: u64, count: u32) -> Request {
    Request::read(SectorRange::new(start, count), sectors(count))
}

/// A write of `count` sectors from `start`.
pub(crate) fn write(start: u64, count: u32) -> Request {
    Request::write(SectorRange::new(start, count), sectors(count))
}
