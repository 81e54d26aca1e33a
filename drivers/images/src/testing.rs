//! A host in memory: an executor, and files with a volatile page cache, short transfers and errors.

mod file;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use tap_host::{Bug, Errno, Event, LockKind, Log, Mark, Probe, SharedPage, SharedPages, Tasks, Time};

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// How much of a failing operation takes effect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Effect {
    None,
    Half,
    All,
}

/// Operation `nth` (from 0, as the world counts) fails, and all that follow if `sticky`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) nth: u64,
    pub(crate) error: Errno,
    pub(crate) effect: Effect,
    pub(crate) sticky: bool,
}

#[derive(Clone, Default)]
pub(crate) struct World(Rc<Inner>);

#[derive(Default)]
struct Inner {
    tasks: RefCell<BTreeMap<usize, Task>>,
    next: Cell<usize>,
    ready: Arc<Mutex<VecDeque<usize>>>,
    files: RefCell<BTreeMap<String, Rc<Store>>>,
    random: Cell<u64>,
    ops: Cell<u64>,
    now_ns: Cell<u64>,
    stop_at: Cell<Option<u64>>,
    fault: Cell<Option<Fault>>,
    short: Cell<bool>,
    /// Zeros in place fail with this, without an effect.
    zeroing_fails: Cell<Option<Errno>>,
    shuffle: Cell<bool>,
    align: Cell<u32>,
    pages: RefCell<BTreeMap<String, MemPage>>,
    /// Tries left until another process releases every page.
    owned: Cell<u32>,
    bugs: RefCell<BTreeSet<&'static Bug>>,
    marks: RefCell<Vec<&'static Mark>>,
}

/// A change of a file that is not durable yet.
#[derive(Clone)]
enum Change {
    Bytes(u64, Vec<u8>),
    Size(u64),
}

/// A file: its visible bytes, those that survive a crash, and the changes that may.
#[derive(Default)]
struct Store {
    now: RefCell<Vec<u8>>,
    durable: RefCell<Vec<u8>>,
    open: RefCell<Vec<Change>>,
    locks: RefCell<Vec<(usize, LockKind)>>,
    device: Cell<bool>,
    looks: Cell<usize>,
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

fn apply(bytes: &mut Vec<u8>, change: &Change, sector: impl Fn(u64) -> bool) {
    match change {
        Change::Size(size) => bytes.resize(*size as usize, 0),
        Change::Bytes(offset, data) => {
            for (i, byte) in data.iter().enumerate() {
                let at = *offset + i as u64;
                if sector(at / 512) {
                    if bytes.len() <= at as usize {
                        bytes.resize(at as usize + 1, 0);
                    }
                    bytes[at as usize] = *byte;
                }
            }
        }
    }
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let world = Self::default();
        world.0.random.set(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        world.0.align.set(512);
        world
    }
    pub(crate) fn advance_ns(&self, by_ns: u64) {
        self.0.now_ns.set(self.0.now_ns.get() + by_ns);
    }
    /// Drops the pages outside the process, and with them the record of failed synchronisations.
    pub(crate) fn forget_pages(&self) {
        self.0.pages.borrow_mut().clear();
    }
    pub(crate) fn random(&self, below: u64) -> u64 {
        let mut x = self.0.random.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.0.random.set(x);
        (x >> 11) % below
    }

    /// Transfers become short.
    pub(crate) fn make_short(&self) {
        self.0.short.set(true);
    }
    /// Operations take a random number of turns.
    pub(crate) fn make_shuffled(&self) {
        self.0.shuffle.set(true);
    }
    /// Sets the alignment of direct files.
    pub(crate) fn set_align(&self, align: u32) {
        self.0.align.set(align);
    }
    /// Another process owns every page for the first `tries` tries.
    pub(crate) fn owned_by_another(&self, tries: u32) {
        self.0.owned.set(tries);
    }
    pub(crate) fn refuse_zeroing(&self) {
        self.fail_zeroing(Errno::EOPNOTSUPP);
    }
    pub(crate) fn fail_zeroing(&self, error: Errno) {
        self.0.zeroing_fails.set(Some(error));
    }
    pub(crate) fn switch_on(&self, bug: &str) {
        let bug = Bug::find(crate::BUGS, bug).expect("a bug of this crate");
        self.0.bugs.borrow_mut().insert(bug);
    }
    pub(crate) fn marked(&self, mark: &str) -> usize {
        let mark = Mark::find(crate::MARKS, mark).expect("a mark of this crate");
        self.0.marks.borrow().iter().filter(|m| **m == mark).count()
    }
    pub(crate) fn ops(&self) -> u64 {
        self.0.ops.get()
    }
    /// No operation from `nth` on takes effect or completes.
    pub(crate) fn stop_at(&self, nth: u64) {
        self.0.stop_at.set(Some(nth));
    }
    pub(crate) fn fail(&self, fault: Option<Fault>) {
        self.0.fault.set(fault);
    }
    pub(crate) fn fault(&self) -> Option<Fault> {
        self.0.fault.get()
    }

    /// Puts a file in place.
    pub(crate) fn put(&self, path: &str, bytes: Vec<u8>) {
        let store =
            Store { now: RefCell::new(bytes.clone()), durable: RefCell::new(bytes), ..Store::default() };
        self.0.files.borrow_mut().insert(path.to_owned(), Rc::new(store));
    }
    /// Puts a block device in place.
    pub(crate) fn put_device(&self, path: &str, bytes: Vec<u8>) {
        self.put(path, bytes);
        self.store(path).device.set(true);
    }
    pub(crate) fn bytes(&self, path: &str) -> Vec<u8> {
        self.store(path).now.borrow().clone()
    }
    pub(crate) fn looks(&self, path: &str) -> usize {
        self.store(path).looks.get()
    }
    pub(crate) fn has(&self, path: &str) -> bool {
        self.0.files.borrow().contains_key(path)
    }
    fn store(&self, path: &str) -> Rc<Store> {
        Rc::clone(&self.0.files.borrow()[path])
    }

    /// The world after a power cut: the durable bytes of every file, and each sector of each later change with
    /// probability `keep` in 256.
    pub(crate) fn after_crash(&self, keep: u64) -> World {
        let next = World::new(self.random(u64::MAX));
        for (path, store) in self.0.files.borrow().iter() {
            let mut bytes = store.durable.borrow().clone();
            for change in store.open.borrow().iter() {
                let dice = self.random(u64::MAX);
                let kept = |sector: u64| {
                    let mixed = (sector ^ dice).wrapping_mul(0xd6e8_feb8_6659_fd93);
                    (mixed >> 32) % 256 < keep
                };
                match change {
                    Change::Size(_) if !kept(0) => {}
                    change => apply(&mut bytes, change, kept),
                }
            }
            next.put(path, bytes);
            next.store(path).device.set(store.device.get());
        }
        next
    }
    /// The world after the death of the process: all written bytes are there.
    pub(crate) fn as_seen(&self) -> World {
        let next = World::new(self.random(u64::MAX));
        for (path, store) in self.0.files.borrow().iter() {
            next.put(path, store.now.borrow().clone());
            next.store(path).device.set(store.device.get());
        }
        next
    }

    /// Runs `future` to its end; `None` when the world stops first.
    pub(crate) fn run<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> Option<T> {
        let result = Rc::new(RefCell::new(None));
        let out = Rc::clone(&result);
        self.start(async move {
            let value = future.await;
            *out.borrow_mut() = Some(value);
        });
        loop {
            let next = {
                let mut ready = self.0.ready.lock().unwrap();
                let pick = if self.0.shuffle.get() && ready.len() > 1 {
                    self.random(ready.len() as u64) as usize
                } else {
                    0
                };
                ready.remove(pick)
            };
            let Some(id) = next else { break };
            let Some(mut task) = self.0.tasks.borrow_mut().remove(&id) else { continue };
            let waker = Waker::from(Arc::new(TaskWaker(id, Arc::clone(&self.0.ready))));
            if task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
                self.0.tasks.borrow_mut().insert(id, task);
            }
        }
        let value = result.borrow_mut().take();
        assert!(value.is_some() || self.is_stopped(), "deadlock: no task is ready");
        value
    }

    /// Runs `future` to its end in a world that does not stop.
    pub(crate) fn block_on<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        self.run(future).expect("the world does not stop")
    }
    /// Drops every task, like the death of a process.
    pub(crate) fn kill_tasks(&self) {
        let tasks = self.0.tasks.take();
        drop(tasks);
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.0.stop_at.get().is_some_and(|at| self.0.ops.get() >= at)
    }

    fn start(&self, task: impl Future<Output = ()> + 'static) {
        let id = self.0.next.get();
        self.0.next.set(id + 1);
        self.0.tasks.borrow_mut().insert(id, Box::pin(task));
        self.0.ready.lock().unwrap().push_back(id);
    }

    /// Counts an operation; returns its fault, and never completes in a stopped world.
    async fn operation(&self) -> Option<Fault> {
        let turns = if self.0.shuffle.get() { self.random(4) } else { 1 };
        for _ in 0..turns {
            self.yield_now().await;
        }
        if self.is_stopped() {
            std::future::pending::<()>().await;
        }
        let number = self.0.ops.get();
        self.0.ops.set(number + 1);
        self.0.fault.get().filter(|f| f.nth == number || (f.sticky && f.nth < number))
    }

    /// How many bytes of a transfer of `len` are moved.
    fn moved(&self, len: usize, align: u32) -> usize {
        if !self.0.short.get() || len <= align as usize || self.random(3) > 0 {
            return len;
        }
        let part = 1 + self.random(len as u64 - 1) as usize;
        (part - part % align as usize).max(align as usize)
    }
}

impl Time for World {
    fn now_ns(&self) -> u64 {
        self.0.now_ns.get()
    }
    fn sleep_ns(&self, _: u64) -> impl Future<Output = ()> + 'static {
        self.yield_now()
    }
}

impl Tasks for World {
    fn spawn(&self, _: &'static str, _: u64, task: impl Future<Output = ()> + 'static) {
        self.start(task);
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

impl Log for World {
    fn log(&self, _: Event) {}
}

impl Probe for World {
    fn bug(&self, bug: &'static Bug) -> bool {
        self.0.bugs.borrow().contains(bug)
    }
    fn mark(&self, mark: &'static Mark) {
        self.0.marks.borrow_mut().push(mark);
    }
}

/// A page of memory outside the process.
#[derive(Clone)]
pub(crate) struct MemPage(Rc<RefCell<Vec<u8>>>);

impl SharedPage for MemPage {
    fn load_u32(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.copy_in(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }
    fn store_u32(&self, offset: usize, value: u32) {
        self.copy_out(offset, &value.to_le_bytes());
    }
    fn copy_in(&self, offset: usize, private: &mut [u8]) {
        private.copy_from_slice(&self.0.borrow()[offset..offset + private.len()]);
    }
    fn copy_out(&self, offset: usize, private: &[u8]) {
        self.0.borrow_mut()[offset..offset + private.len()].copy_from_slice(private);
    }
    fn full_barrier(&self) {}
}

impl SharedPages for World {
    type Region = MemPage;
    fn region(&self, name: &str) -> Result<MemPage, Errno> {
        let new = || MemPage(Rc::new(RefCell::new(vec![0; 4096])));
        Ok(self.0.pages.borrow_mut().entry(name.to_owned()).or_insert_with(new).clone())
    }
    fn own_region(&self, name: &str) -> Result<MemPage, Errno> {
        match self.0.owned.get().checked_sub(1) {
            Some(left) => {
                self.0.owned.set(left);
                Err(Errno::EBUSY)
            }
            None => self.region(name),
        }
    }
    fn boot_id(&self) -> Result<[u8; 16], Errno> {
        Ok([1; 16])
    }
    fn remove_region(&self, name: &str) {
        self.0.pages.borrow_mut().remove(name);
    }
    fn region_names(&self) -> Result<Vec<String>, Errno> {
        Ok(self.0.pages.borrow().keys().cloned().collect())
    }
}
