//! Tasks and their wakers.

use crate::mix::{Entity, FixedMap};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Wake, Waker};

thread_local! {
    /// Task identifiers in the order in which they were woken. A nested run swaps it for its own.
    static WOKEN: RefCell<VecDeque<u64>> = const { RefCell::new(VecDeque::new()) };
}

/// Set in an identifier whose turn was already put back: it runs without asking again.
const CLEARED: u64 = 1 << 63;

pub(crate) fn push_woken(id: u64) {
    WOKEN.with_borrow_mut(|q| q.push_back(id));
}
pub(crate) fn push_cleared(id: u64) {
    push_woken(id | CLEARED);
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

struct TaskWaker(u64);

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        push_woken(self.0);
    }
    fn wake_by_ref(self: &Arc<Self>) {
        push_woken(self.0);
    }
}

type BoxedTask = Pin<Box<dyn Future<Output = ()>>>;

pub(crate) struct Task {
    pub(crate) id: u64,
    pub(crate) entity: Entity,
    pub(crate) role: &'static str,
    pub(crate) key: u64,
    pub(crate) node: u32,
    pub(crate) waker: Waker,
    pub(crate) future: RefCell<Option<BoxedTask>>,
    pub(crate) wakes: Cell<u32>,
    /// Put back and waiting for its timer: further wakes change nothing.
    pub(crate) put_back: Cell<bool>,
    pub(crate) ordinals: RefCell<Ordinals>,
}

impl Task {
    pub(crate) fn new(
        id: u64,
        entity: Entity,
        role: &'static str,
        key: u64,
        node: u32,
        future: BoxedTask,
    ) -> Self {
        Self {
            id,
            entity,
            role,
            key,
            node,
            waker: Waker::from(Arc::new(TaskWaker(id))),
            future: RefCell::new(Some(future)),
            wakes: Cell::new(0),
            put_back: Cell::new(false),
            ordinals: RefCell::default(),
        }
    }
}

/// Counts how often an entity had a child of one name. Short lists are searched; long ones are hashed.
#[derive(Default)]
pub(crate) struct Ordinals {
    few: Vec<(u64, u32)>,
    many: FixedMap<u64, u32>,
}

impl Ordinals {
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
