//! Nodes: units that are killed as a whole, such as a process or a guest.

use crate::exec::Core;
use crate::mix::Entity;
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::task::{Poll, Waker};

pub(crate) struct NodeInner {
    pub(crate) id: u32,
    pub(crate) name: String,
    pub(crate) entity: Entity,
    pub(crate) alive: Cell<bool>,
    /// Steps until it dies; `u64::MAX` for never.
    steps_left: Cell<u64>,
    steps: Cell<u64>,
    reaped: Cell<bool>,
    /// When the last of its turns delayed so far is due.
    pub(crate) put_back_until_ns: Cell<u64>,
    watchers: RefCell<Vec<Waker>>,
    on_death: RefCell<Vec<Box<dyn FnOnce()>>>,
}

impl NodeInner {
    pub(crate) fn new(id: u32, name: String, entity: Entity) -> Self {
        Self {
            id,
            name,
            entity,
            alive: Cell::new(true),
            steps_left: Cell::new(u64::MAX),
            steps: Cell::new(0),
            reaped: Cell::new(false),
            put_back_until_ns: Cell::new(0),
            watchers: RefCell::default(),
            on_death: RefCell::default(),
        }
    }
    /// At the end of the world there is no clean-up; hooks are only dropped, with what they hold.
    pub(crate) fn finish_quietly(&self) {
        let hooks = std::mem::take(&mut *self.on_death.borrow_mut());
        drop(hooks);
        self.watchers.borrow_mut().clear();
    }
    /// After the tasks are gone: runs what the kernel does for a dead process, then wakes those that wait for its
    /// death.
    pub(crate) fn finish(&self) {
        for hook in std::mem::take(&mut *self.on_death.borrow_mut()) {
            hook();
        }
        self.reaped.set(true);
        self.watchers.borrow_mut().drain(..).for_each(Waker::wake);
    }
}

/// A group of tasks that die together. Handles of models hold one and call [`Node::step`] before every effect.
#[derive(Clone)]
pub struct Node {
    core: Rc<Core>,
    inner: Rc<NodeInner>,
}

impl Node {
    pub(crate) fn new(core: Rc<Core>, inner: Rc<NodeInner>) -> Self {
        Self { core, inner }
    }

    /// Starts a task on this node. Its entity is derived from the node's, `role` and `key`. Nothing happens on a dead
    /// node.
    pub fn spawn(&self, role: &'static str, key: u64, task: impl Future<Output = ()> + 'static) {
        if self.inner.alive.get() {
            self.core.spawn(self.inner.id, role, key, Box::pin(task));
        }
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The entity of the node itself.
    pub fn entity(&self) -> Entity {
        self.inner.entity
    }

    /// Whether it has not been killed.
    pub fn is_alive(&self) -> bool {
        self.inner.alive.get()
    }

    /// Called by every seam handle of the node before an effect. `false` means that the node is dead, perhaps since
    /// this very step: the effect must not happen.
    #[inline]
    #[must_use]
    pub fn step(&self) -> bool {
        if !self.inner.alive.get() {
            return false;
        }
        let left = self.inner.steps_left.get();
        if left != u64::MAX {
            if left == 0 {
                self.kill();
                return false;
            }
            self.inner.steps_left.set(left - 1);
        }
        self.inner.steps.set(self.inner.steps.get() + 1);
        self.core.count_work();
        true
    }

    /// Effects so far; the step at which it died had no effect.
    pub fn steps(&self) -> u64 {
        self.inner.steps.get()
    }

    /// Makes the node die at its `n`-th step from now on (0 is the next one): a kill between any two effects, even if
    /// the scheduler cannot interrupt the code in between.
    pub fn kill_after_steps(&self, n: u64) {
        self.inner.steps_left.set(n);
    }

    /// Postpones a death at its next step by one: for a model that rules out a death between two effects.
    pub fn spare_next_step(&self) {
        if self.inner.steps_left.get() == 0 {
            self.inner.steps_left.set(1);
        }
    }

    /// Kills it: handles are dead at once; tasks are dropped, then death hooks run, before any other task's next turn.
    pub fn kill(&self) {
        if self.inner.alive.replace(false) {
            self.core.doomed.borrow_mut().push(Rc::clone(&self.inner));
        }
    }

    /// Runs `hook` after the node's tasks have been dropped: what a kernel does for a dead process.
    pub fn on_death(&self, hook: impl FnOnce() + 'static) {
        self.inner.on_death.borrow_mut().push(Box::new(hook));
    }

    /// The roles of its tasks that have not ended.
    pub fn tasks(&self) -> Vec<&'static str> {
        let tasks = self.core.tasks.borrow();
        tasks.iter().flatten().filter(|task| task.node == self.inner.id).map(|task| task.role).collect()
    }

    /// Completes when the node is dead and all of its tasks and handles are cleaned up.
    pub fn dead(&self) -> impl Future<Output = ()> + 'static {
        let inner = Rc::clone(&self.inner);
        poll_fn(move |cx| {
            if inner.reaped.get() {
                return Poll::Ready(());
            }
            inner.watchers.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
    }
}
