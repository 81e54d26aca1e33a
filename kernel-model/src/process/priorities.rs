//! The priority of I/O of a process.

use super::{Kernel, Process, ProcessFile};
use crate::faults::IoOp;
use sim::Node;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_host::{Errno, IoPriority};

/// What a process does with a file, at which priority.
#[derive(Clone, Copy)]
pub struct IoSeen<'a> {
    /// The process.
    pub node: &'a Node,
    /// How the file was called when it was made.
    pub file: &'a str,
    /// What: `read`, `write`, `zero` or `sync`.
    pub what: &'static str,
    /// The priority; `None` is that of the process.
    pub priority: Option<IoPriority>,
}

type Watcher = Rc<dyn Fn(IoSeen<'_>)>;

/// What a kernel knows of priorities.
#[derive(Default)]
pub(super) struct Priorities {
    refuses_realtime: Cell<bool>,
    watchers: RefCell<Vec<Watcher>>,
}

impl Priorities {
    pub(super) fn forget_watchers(&self) {
        self.watchers.take();
    }
}

impl Kernel {
    /// No process may have the priority realtime.
    pub fn refuse_realtime(&self) {
        self.0.priorities.refuses_realtime.set(true);
    }

    /// Tells `watcher` of each operation on a file that a process starts from now on.
    pub fn on_io(&self, watcher: impl Fn(IoSeen<'_>) + 'static) {
        self.0.priorities.watchers.borrow_mut().push(Rc::new(watcher));
    }
}

impl Process {
    pub(super) async fn have_priority(&self, priority: Option<IoPriority>) -> Result<(), Errno> {
        self.alive().await;
        let refused = self.kernel.0.priorities.refuses_realtime.get();
        if refused && priority.is_some_and(IoPriority::is_realtime) {
            return Err(Errno::EPERM);
        }
        self.priority.set(priority);
        Ok(())
    }
}

impl ProcessFile {
    /// Says that `op` starts.
    pub(super) fn seen(&self, op: IoOp) {
        let (node, priority) = (&self.process.node, self.process.priority.get());
        let file = &self.open.open_file().file.name;
        let watchers = self.process.kernel.0.priorities.watchers.borrow();
        watchers.iter().for_each(|watcher| watcher(IoSeen { node, file, what: op.name(), priority }));
    }
}
