//! What the processes of a kernel are doing at one time.

use std::cell::Cell;

/// What the processes are doing at one time.
#[derive(Default)]
pub(crate) struct Load {
    /// The turn that counts now, and its work so far.
    turn: Cell<u64>,
    work: Cell<u64>,
    pub(crate) max_work: Cell<u64>,
    /// File operations whose futures are alive and started.
    running: Cell<u64>,
    pub(crate) max_running: Cell<u64>,
    /// Copies of data between a process and the other end of a ring.
    pub(crate) copies: Cell<u64>,
}

impl Load {
    pub(crate) fn add(&self, turn: u64, units: u64) {
        let before = if self.turn.replace(turn) == turn { self.work.get() } else { 0 };
        self.work.set(before + units);
        self.max_work.set(self.max_work.get().max(before + units));
    }

    pub(crate) fn start(&self) {
        self.running.set(self.running.get() + 1);
        self.max_running.set(self.max_running.get().max(self.running.get()));
    }

    pub(crate) fn end(&self) {
        self.running.set(self.running.get() - 1);
    }
}
