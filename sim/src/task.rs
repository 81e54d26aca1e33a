//! Tasks and their wakers.

use crate::mix::{Entity, FixedMap};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Wake, Waker};

thread_local! {
    /// Task identifiers in the order in which they were woken. A nested run swaps it for its own.
    static WOKEN: RefCell<VecDeque<u64>> = const { RefCell::new(VecDeque::new()) };
}

/// Set in an identifier whose turn was already delayed: it runs without another decision.
const CLEARED: u64 = 1 << 63;

pub(crate) fn push_woken(id: u64) {
    WOKEN.with_borrow_mut(|q| q.push_back(id));
}
pub(crate) fn push_cleared(id: u64) {
    push_woken(id | CLEARED);
}
/// Puts an identifier back at the front, where it was taken from.
pub(crate) fn push_front(id: u64, cleared: bool) {
    WOKEN.with_borrow_mut(|q| q.push_front(if cleared { id | CLEARED } else { id }));
}
/// The next identifier, and whether it runs without a scheduling decision.
pub(crate) fn pop_woken() -> Option<(u64, bool)> {
    WOKEN.with_borrow_mut(VecDeque::pop_front).map(|id| (id & !CLEARED, id & CLEARED != 0))
}
pub(crate) fn swap_woken(mut with: VecDeque<u64>) -> VecDeque<u64> {
    WOKEN.with_borrow_mut(|q| std::mem::swap(q, &mut with));
    with
}

/// slot in the low 32 bits, generation in the next 31.
pub(crate) fn task_id(slot: u32, generation: u32) -> u64 {
    u64::from(slot) | u64::from(generation & 0x7fff_ffff) << 32
}

/// The identifier changes when the shell is used for another task, which happens only when nothing else holds the
/// waker.
struct TaskWaker(AtomicU64);

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        push_woken(self.0.load(Ordering::Relaxed));
    }
    fn wake_by_ref(self: &Arc<Self>) {
        push_woken(self.0.load(Ordering::Relaxed));
    }
}

pub(crate) type BoxedTask = Pin<Box<dyn Future<Output = ()>>>;

/// A task, or the shell of one that has ended and may be reused.
pub(crate) struct Task {
    pub(crate) id: u64,
    pub(crate) entity: Entity,
    pub(crate) role: &'static str,
    pub(crate) key: u64,
    pub(crate) node: u32,
    shared: Arc<TaskWaker>,
    pub(crate) waker: Waker,
    /// Absent while it is polled, and once it has ended.
    pub(crate) future: Cell<Option<BoxedTask>>,
    pub(crate) wakes: Cell<u32>,
    /// Delayed and waiting for its timer: further wakes change nothing.
    pub(crate) put_back: Cell<bool>,
    pub(crate) ordinals: RefCell<Ordinals>,
    /// Accesses of shared memory so far.
    pub(crate) accesses: Cell<u32>,
}

/// Everything about a task except its future.
#[derive(Clone, Copy)]
pub(crate) struct Identity {
    pub(crate) id: u64,
    pub(crate) entity: Entity,
    pub(crate) role: &'static str,
    pub(crate) key: u64,
    pub(crate) node: u32,
}

impl Task {
    pub(crate) fn new(who: Identity, future: BoxedTask) -> Self {
        let shared = Arc::new(TaskWaker(AtomicU64::new(who.id)));
        Self {
            id: who.id,
            entity: who.entity,
            role: who.role,
            key: who.key,
            node: who.node,
            waker: Waker::from(Arc::clone(&shared)),
            shared,
            future: Cell::new(Some(future)),
            wakes: Cell::new(0),
            put_back: Cell::new(false),
            ordinals: RefCell::default(),
            accesses: Cell::new(0),
        }
    }

    /// Whether no waker of the ended task is left anywhere.
    pub(crate) fn is_reusable(&self) -> bool {
        Arc::strong_count(&self.shared) == 2
    }

    /// Turns an ended task's shell into a new task.
    pub(crate) fn reuse(&mut self, who: Identity, future: BoxedTask) {
        self.shared.0.store(who.id, Ordering::Relaxed);
        (self.id, self.entity, self.role, self.key, self.node) =
            (who.id, who.entity, who.role, who.key, who.node);
        self.future.set(Some(future));
        self.wakes.set(0);
        self.put_back.set(false);
        self.ordinals.get_mut().clear();
        self.accesses.set(0);
    }
}

/// Counts how often an entity had a child of one name. Short lists are searched; long ones are hashed.
#[derive(Default)]
pub(crate) struct Ordinals {
    few: Vec<(u64, u32)>,
    many: FixedMap<u64, u32>,
}

impl Ordinals {
    fn clear(&mut self) {
        self.few.clear();
        self.many = FixedMap::default();
    }

    pub(crate) fn next(&mut self, name: u64) -> u32 {
        if self.many.is_empty() {
            if let Some(entry) = self.few.iter_mut().find(|e| e.0 == name) {
                entry.1 += 1;
                return entry.1;
            }
            if self.few.len() < 16 {
                self.few.push((name, 0));
                return 0;
            }
            self.many = self.few.drain(..).collect();
        }
        let count = self.many.entry(name).and_modify(|n| *n += 1).or_insert(0);
        *count
    }
}
