//! Operations in flight: one slot table for the ring or the threads.
//!
//! ```text
//!   Op (future) ──start──► slot, queue ─┐
//!        ▲                              │  driver task, last of the turn:
//!        └──── waker ◄── slot ◄── reap ─┴─ push all, submit once, reap, then sleep on the descriptor
//! ```
//!
//! # Contract
//!
//! * A slot owns the buffers and keeps the file open from the first poll of the operation until its completion was
//!   reaped. Dropping the future only marks the slot as orphaned.
//! * The first operation that is queued in a turn wakes the driver task, which therefore runs after every task that is
//!   ready by then; what those tasks queue goes to the kernel together.
//! * Dropping the engine waits for what is in flight: the kernel may be writing to our memory.

use super::call::{Call, Memory, Wait, memory_of};
use super::ring::Ring;
use super::threads::Threads;
use super::turns::Turns;
use super::{AioEngine, OpenFile, of_rustix};
use crate::spin::Listed;
use crate::watch::watch;
use rustix::io::fcntl_dupfd_cloexec;
use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;
use tap_host::{Errno, IoPriority, IoVec};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What to do, and where.
#[derive(Clone, Copy)]
pub(crate) struct Job {
    pub(crate) call: Call,
    pub(crate) fd: RawFd,
    /// `None` is that of the process.
    pub(crate) priority: Option<IoPriority>,
}

/// Executes operations.
pub(crate) trait Submit {
    /// Readable when completions wait to be reaped.
    fn fd(&self) -> BorrowedFd<'_>;
    /// How many operations it may have at a time, and how many of one disk.
    fn room(&self) -> (usize, usize);
    /// Whether it supports this operation.
    fn does(&self, call: Call) -> bool;
    /// Adds an operation, to be started by the next `submit`.
    ///
    /// # Safety
    /// The descriptor stays open, and the memory valid and untouched, until the completion of `index` was reaped.
    unsafe fn push(&mut self, index: u32, job: Job, memory: &Memory);
    /// Starts what was pushed; what cannot be started now stays queued.
    fn submit(&mut self) -> Result<(), Errno>;
    /// Appends completions: slot, and count or negative error number.
    fn reap(&mut self, done: &mut Vec<(u32, i32)>);
    /// Blocks until there is something to reap.
    fn wait(&mut self) -> Result<(), Errno>;
    /// Whether something pushed has not been started yet.
    fn unsubmitted(&mut self) -> bool;
}

struct Running {
    file: Rc<OpenFile>,
    call: Call,
    bufs: IoVec,
    memory: Memory,
    waker: Option<Waker>,
    orphan: bool,
}

enum Slot {
    Free,
    Running(Running),
    Done(Result<usize, Errno>, IoVec),
}

struct State {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Started by their futures, and whether they are pushed.
    turns: Turns,
    /// Those of them that the driver has not seen yet.
    fresh: usize,
    submit: Box<dyn Submit>,
    driver: Option<Waker>,
}

/// The engine; see the module.
pub(crate) struct Engine {
    state: RefCell<State>,
    kind: AioEngine,
}

impl Engine {
    /// An engine of the requested kind; for [`AioEngine::Auto`] also why io_uring is not used, if it is not.
    ///
    /// # Errors
    /// Why the requested kind is refused.
    pub(crate) fn new(kind: AioEngine) -> Result<(Self, Option<Errno>), Errno> {
        let with = |submit: Box<dyn Submit>, kind| {
            let (room, share_max) = submit.room();
            let (slots, free, turns) = (Vec::new(), Vec::new(), Turns::new(room, share_max));
            let state = State { slots, free, turns, fresh: 0, submit, driver: None };
            Self { state: RefCell::new(state), kind }
        };
        let refused = match kind {
            AioEngine::Threads => None,
            _ => match Ring::new() {
                Ok(ring) => return Ok((with(Box::new(ring), AioEngine::IoUring), None)),
                Err(error) if kind == AioEngine::IoUring => return Err(error),
                Err(error) => Some(error),
            },
        };
        Ok((with(Box::new(Threads::new()?), AioEngine::Threads), refused))
    }

    /// Which kind it is: never [`AioEngine::Auto`].
    pub(crate) fn kind(&self) -> AioEngine {
        self.kind
    }

    /// Whether it can do `call` without blocking this thread.
    pub(crate) fn does(&self, call: Call) -> bool {
        self.state.borrow().submit.does(call)
    }

    fn start(&self, file: Rc<OpenFile>, call: Call, mut bufs: IoVec, waker: &Waker) -> u32 {
        let memory = memory_of(&mut bufs);
        let group = file.group.id;
        let running = Running { file, call, bufs, memory, waker: Some(waker.clone()), orphan: false };
        let mut state = self.state.borrow_mut();
        let index = match state.free.pop() {
            Some(index) => index,
            None => {
                state.slots.push(Slot::Free);
                // Bounded by the number of buffers, far below 2^32.
                (state.slots.len() - 1) as u32
            }
        };
        state.slots[index as usize] = Slot::Running(running);
        state.turns.put(group, index);
        // The driver has seen those that wait for room, and comes again when something ends.
        state.fresh += 1;
        let driver = if state.fresh == 1 { state.driver.take() } else { None };
        drop(state);
        if let Some(driver) = driver {
            driver.wake();
        }
        index
    }

    fn poll(&self, index: u32, waker: &Waker) -> Poll<(Result<usize, Errno>, IoVec)> {
        let mut state = self.state.borrow_mut();
        let slot = &mut state.slots[index as usize];
        match slot {
            Slot::Running(running) => {
                match &mut running.waker {
                    Some(old) => old.clone_from(waker),
                    none => *none = Some(waker.clone()),
                }
                Poll::Pending
            }
            Slot::Done(..) => {
                let Slot::Done(result, bufs) = std::mem::replace(slot, Slot::Free) else { unreachable!() };
                state.free.push(index);
                Poll::Ready((result, bufs))
            }
            Slot::Free => unreachable!("an operation is polled after its end"),
        }
    }

    /// The result is no longer waited for; the effect still happens.
    fn abandon(&self, index: u32) {
        let mut state = self.state.borrow_mut();
        let slot = &mut state.slots[index as usize];
        let dropped = match slot {
            Slot::Running(running) => {
                running.orphan = true;
                (running.waker.take(), Slot::Free)
            }
            _ => {
                let old = std::mem::replace(slot, Slot::Free);
                state.free.push(index);
                (None, old)
            }
        };
        // Dropping buffers may wake a task that accesses this state.
        drop(state);
        drop(dropped);
    }

    /// Pushes as much of the queue as there is room for, and starts it.
    fn flush(&self) -> Result<(), Errno> {
        let mut state = self.state.borrow_mut();
        let State { slots, turns, fresh, submit, .. } = &mut *state;
        *fresh = 0;
        while let Some(index) = turns.next() {
            let Slot::Running(running) = &slots[index as usize] else {
                unreachable!("what is queued has not ended")
            };
            let Running { call, file, memory, .. } = running;
            let job = Job { call: *call, fd: file.fd().as_raw_fd(), priority: file.group.priority.get() };
            // SAFETY: the slot keeps the file and the buffers, and touches neither, until its completion was reaped.
            unsafe { submit.push(index, job, memory) };
        }
        submit.submit()
    }

    /// Takes completions and wakes the tasks that wait for them; returns how many there were.
    fn reap(&self, done: &mut Vec<(u32, i32)>) -> usize {
        self.state.borrow_mut().submit.reap(done);
        let count = done.len();
        for (index, result) in done.drain(..) {
            self.finish(index, result);
        }
        count
    }

    fn finish(&self, index: u32, result: i32) {
        let mut state = self.state.borrow_mut();
        let slot = &mut state.slots[index as usize];
        let Slot::Running(running) = std::mem::replace(slot, Slot::Free) else {
            unreachable!("an operation ends once")
        };
        let Running { bufs, waker, orphan, file, .. } = running;
        state.turns.end(file.group.id);
        if orphan {
            state.free.push(index);
            drop(state);
            drop((bufs, waker, file));
            return;
        }
        let result = usize::try_from(result).map_err(|_| Errno(-result));
        state.slots[index as usize] = Slot::Done(result, bufs);
        drop(state);
        drop(file);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// One turn of the driver task.
    ///
    /// An error of the ring itself, for which no cause is documented in our use of it, stops the process: operations
    /// are in unknown states.
    fn drive(&self, turn: &mut Driver, cx: &mut Context<'_>) {
        // Cleared before reaping: a later completion raises a new event, which wakes this task.
        while let Poll::Ready(ready) = turn.event.poll_read_ready(cx) {
            ready.unwrap_or_else(|e| panic!("failed to wait for file operations: {e}")).clear_ready();
        }
        loop {
            self.flush().unwrap_or_else(|e| panic!("failed to start file operations: {e}"));
            let reaped = self.reap(&mut turn.done);
            if reaped == 0 || self.state.borrow().turns.waiting() == 0 {
                break;
            }
        }
        let mut state = self.state.borrow_mut();
        keep(&mut state.driver, cx.waker());
        let retry = state.submit.unsubmitted();
        drop(state);
        // The kernel was short of memory; nothing signals when it has some again.
        while retry && turn.retry.as_mut().poll(cx).is_ready() {
            turn.retry.as_mut().reset(tokio::time::Instant::now() + RETRY_AFTER);
        }
    }
}

/// How long to wait before retrying an operation that the kernel had no memory to start.
const RETRY_AFTER: Duration = Duration::from_millis(2);

/// The driver task's own state.
struct Driver {
    // Taken off the list before it is closed.
    _listed: Listed,
    event: AsyncFd<OwnedFd>,
    done: Vec<(u32, i32)>,
    retry: Pin<Box<tokio::time::Sleep>>,
}

fn keep(place: &mut Option<Waker>, waker: &Waker) {
    match place {
        Some(old) => old.clone_from(waker),
        none => *none = Some(waker.clone()),
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let mut done = Vec::new();
        let left = || {
            let state = self.state.borrow();
            state.turns.started() + state.turns.waiting() > 0
        };
        while left() {
            let waited = self.flush().and_then(|()| self.state.borrow_mut().submit.wait());
            // Memory that the kernel may still write to must not be freed.
            if waited.is_err() {
                std::process::abort();
            }
            self.reap(&mut done);
        }
    }
}

/// The driver task of `engine`; runs until it is dropped.
///
/// # Errors
/// `EMFILE` or the like if the descriptor cannot be watched.
pub(crate) fn driver(engine: Rc<Engine>) -> Result<impl Future<Output = ()> + 'static, Errno> {
    // A separate descriptor of the same ring or event, so that the two owners are independent.
    let event = fcntl_dupfd_cloexec(engine.state.borrow().submit.fd(), 0).map_err(of_rustix)?;
    let event = watch(event, Interest::READABLE)?;
    let listed = Listed::new(event.as_raw_fd());
    let mut turn =
        Driver { _listed: listed, event, done: Vec::new(), retry: Box::pin(tokio::time::sleep(RETRY_AFTER)) };
    Ok(poll_fn(move |cx| {
        engine.drive(&mut turn, cx);
        Poll::Pending
    }))
}

enum OpState {
    Start(Call, IoVec),
    Refused(Errno, IoVec),
    Running(u32),
    Done,
}

/// An operation: starts when first polled, continues when dropped.
pub(crate) struct Op {
    engine: Rc<Engine>,
    file: Rc<OpenFile>,
    state: OpState,
}

impl Op {
    /// An operation that has not started.
    pub(crate) fn new(engine: &Rc<Engine>, file: &Rc<OpenFile>, call: Call, bufs: IoVec) -> Self {
        Self { engine: Rc::clone(engine), file: Rc::clone(file), state: OpState::Start(call, bufs) }
    }

    /// An operation that fails with `error` when first polled, without any effect.
    pub(crate) fn refused(engine: &Rc<Engine>, file: &Rc<OpenFile>, error: Errno, bufs: IoVec) -> Self {
        Self { engine: Rc::clone(engine), file: Rc::clone(file), state: OpState::Refused(error, bufs) }
    }

    /// Tries it on this thread, if that does not wait for a device.
    fn in_place(&self, call: Call, bufs: &mut IoVec) -> Option<Result<usize, Errno>> {
        let wait = self.file.in_place(call)?;
        let memory = memory_of::<[libc::iovec; 16]>(bufs);
        // SAFETY: `bufs` is borrowed for the duration of the call, and its bytes are accessed by no one else.
        let result = unsafe { call.execute(self.file.fd().as_raw_fd(), &memory, wait) };
        match result {
            Err(Errno::EAGAIN) if wait == Wait::Never => None,
            // On Linux 5.9 and 5.10 this may not be the end of the file (preadv2(2), BUGS): only a read that may wait
            // can tell.
            Ok(0) if wait == Wait::Never => None,
            Err(Errno::EOPNOTSUPP) if wait == Wait::Never => {
                self.file.never_nowait();
                None
            }
            result => Some(result),
        }
    }
}

impl Future for Op {
    type Output = (Result<usize, Errno>, IoVec);
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let OpState::Start(call, ref mut bufs) = self.state {
            // An operation that always finds its data at once must let other tasks run, too.
            let proceed = ready!(tokio::task::coop::poll_proceed(cx));
            proceed.made_progress();
            let mut bufs = std::mem::take(bufs);
            if let Some(result) = self.in_place(call, &mut bufs) {
                self.state = OpState::Done;
                return Poll::Ready((result, bufs));
            }
            let index = self.engine.start(Rc::clone(&self.file), call, bufs, cx.waker());
            self.state = OpState::Running(index);
            return Poll::Pending;
        }
        if let OpState::Refused(error, ref mut bufs) = self.state {
            let bufs = std::mem::take(bufs);
            self.state = OpState::Done;
            return Poll::Ready((Err(error), bufs));
        }
        let OpState::Running(index) = self.state else {
            unreachable!("an operation is polled after its end")
        };
        let ended = ready!(self.engine.poll(index, cx.waker()));
        self.state = OpState::Done;
        Poll::Ready(ended)
    }
}

impl Drop for Op {
    fn drop(&mut self) {
        if let OpState::Running(index) = self.state {
            self.engine.abandon(index);
        }
    }
}
