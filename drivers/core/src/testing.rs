//! A small executor with a clock that is moved by hand, and a host for tests.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use tap_host::{Bug, Event, Log, Mark, Probe, Tasks, Time};

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
    marks: RefCell<Vec<Mark>>,
    bugs: RefCell<BTreeSet<Bug>>,
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

/// What a started future came to; shared with the one who started it.
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
        let value = Rc::new(RefCell::new(None));
        let out = Rc::clone(&value);
        let task = self.spawn(async move {
            let result = future.await;
            *out.borrow_mut() = Some(result);
        });
        self.run();
        Outcome { value, task }
    }

    /// Drops a task.
    pub(crate) fn cancel(&self, id: usize) {
        let task = self.0.tasks.borrow_mut().remove(&id);
        drop(task);
    }

    /// Runs until nothing is ready.
    pub(crate) fn run(&self) {
        loop {
            let next = self.0.ready.lock().unwrap().pop_front();
            let Some(id) = next else { return };
            let Some(mut task) = self.0.tasks.borrow_mut().remove(&id) else { continue };
            let waker = Waker::from(Arc::new(TaskWaker(id, Arc::clone(&self.0.ready))));
            if task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
                self.0.tasks.borrow_mut().insert(id, task);
            }
        }
    }

    /// Runs until nothing is ready, moving the clock to the next sleeper as long as there is one.
    pub(crate) fn run_through_time(&self) {
        loop {
            self.run();
            let first = self.0.sleepers.borrow_mut().pop_first();
            let Some(((at, _), waker)) = first else { return };
            self.0.now_ns.set(at);
            waker.wake();
        }
    }

    /// Polls a future with a waker that does nothing.
    pub(crate) fn poll_once<F: Future + ?Sized>(&self, future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    pub(crate) fn switch_on(&self, bug: Bug) {
        self.0.bugs.borrow_mut().insert(bug);
    }
    pub(crate) fn marked(&self, mark: Mark) -> usize {
        self.0.marks.borrow().iter().filter(|m| **m == mark).count()
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
    fn bug(&self, bug: Bug) -> bool {
        self.0.bugs.borrow().contains(&bug)
    }
    fn mark(&self, mark: Mark) {
        self.0.marks.borrow_mut().push(mark);
    }
}
