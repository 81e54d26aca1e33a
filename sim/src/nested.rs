//! Other CPUs: tasks of other nodes that run between two steps of a turn; and the amount of work in one turn.
//!
//! A turn is not instantaneous: the other CPUs of a machine continue while it runs. At points chosen by a model, ready
//! tasks of other nodes have their turns inside the running one. The running task's own node does not move (it is one
//! thread), time does not move, and there is no second level: a nested turn is not interrupted.

use crate::exec::{Core, Sim};
use crate::mix::Entity;
use crate::task::{Task, pop_woken, push_front, push_woken};
use std::rc::Rc;

/// The work that a task may do in one turn before the engine concludes that the turn never ends.
const ENDLESS: u64 = 4_000_000;

/// The work of a turn: steps of its node and loads of shared memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Work {
    /// How much.
    pub done: u64,
    /// The task's role.
    pub role: &'static str,
    /// The task's key.
    pub key: u64,
}

impl Sim {
    /// Gives up to `most` ready tasks of other living nodes their turn now, inside the running one. The caller must
    /// hold no borrow that they might need. Does nothing outside of tasks, or inside of such a turn.
    pub fn run_others(&self, most: u64) {
        let core = &self.0;
        let Some(me) = core.current.borrow().clone() else { return };
        if core.nested.replace(true) {
            return;
        }
        let work = core.work.get();
        let (mut passed, mut left) = (Vec::new(), most);
        while left > 0 {
            let Some((id, cleared)) = pop_woken() else { break };
            let Some(task) = core.task(id) else { continue };
            if task.node == me.node || !core.is_alive(task.node) {
                passed.push((id, cleared));
                continue;
            }
            left -= 1;
            core.work.set(0);
            // A limit that is reached here will be noticed again outside.
            if core.turn_of(task, cleared).is_some() {
                push_woken(id);
                break;
            }
        }
        for (id, cleared) in passed.into_iter().rev() {
            push_front(id, cleared);
        }
        core.work.set(work);
        core.nested.set(false);
    }

    /// The running task and the number of its accesses so far, this one included; `None` outside of tasks, and inside a
    /// nested turn.
    pub fn next_access(&self) -> Option<(Entity, u32)> {
        if self.0.nested.get() {
            return None;
        }
        let current = self.0.current.borrow();
        let task = current.as_ref()?;
        task.accesses.set(task.accesses.get() + 1);
        Some((task.entity, task.accesses.get()))
    }

    /// Counts one piece of work of the running turn.
    ///
    /// # Panics
    /// If the turn never ends.
    #[inline]
    pub fn count_work(&self) {
        self.0.count_work();
    }

    /// The turn with the most work so far.
    pub fn longest_turn(&self) -> Work {
        self.0.longest.get()
    }
}

impl Core {
    #[inline]
    pub(crate) fn count_work(&self) {
        let work = self.work.get() + 1;
        self.work.set(work);
        assert!(work < ENDLESS, "one turn of a task does not end");
    }

    #[inline]
    pub(crate) fn note_work(&self, task: &Rc<Task>) {
        let done = self.work.get();
        if done > self.longest.get().done {
            self.longest.set(Work { done, role: task.role, key: task.key });
        }
    }

    fn is_alive(&self, node: u32) -> bool {
        self.nodes.borrow().get(node as usize).is_some_and(|node| node.alive.get())
    }
}
