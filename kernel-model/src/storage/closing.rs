//! Descriptors that are closed late.
//!
//! Linux closes a file when the last call that uses it has ended, and closing may wait: for dirty data, for a server,
//! for the kernel's own threads, which tear down the rings of a killed process. Until then the lock is held, even by a
//! process that is no longer visible.

use super::{Inner, OpenFile, Storage};
use crate::calls::CLOSE_LATE;
use sim::text_hash;
use std::cell::Cell;
use std::ops::Deref;
use std::rc::Rc;

/// A descriptor of a process. Its open file is closed some time after it was dropped.
pub(crate) struct Descriptor {
    storage: Rc<Inner>,
    open: Rc<OpenFile>,
    late_ns: u64,
    /// When everything that the process has dropped will be closed.
    process: Rc<Cell<u64>>,
}

impl Descriptor {
    pub(crate) fn open_file(&self) -> &Rc<OpenFile> {
        &self.open
    }
}

impl Deref for Descriptor {
    type Target = OpenFile;
    fn deref(&self) -> &OpenFile {
        &self.open
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        if self.late_ns > 0 {
            let until_ns = self.storage.sim.now_ns() + self.late_ns;
            self.process.set(self.process.get().max(until_ns));
            self.storage.closing.borrow_mut().push((until_ns, Rc::clone(&self.open)));
        }
    }
}

impl Storage {
    /// Whether somebody has a file locked, as everybody has whose disk is not closed, or a file is still being closed.
    pub fn is_in_use(&self) -> bool {
        self.0.close_due();
        let locked = self.0.files.borrow().values().any(|file| !file.locks.borrow().is_empty());
        locked || !self.0.closing.borrow().is_empty()
    }
}

impl Inner {
    /// A descriptor of the process that `process` belongs to, to be closed with a delay that is decided now.
    pub(crate) fn descriptor(self: &Rc<Self>, open: Rc<OpenFile>, process: &Rc<Cell<u64>>) -> Rc<Descriptor> {
        let late_ns = self.close_late_ns(&open.file.name);
        Rc::new(Descriptor { storage: Rc::clone(self), open, late_ns, process: Rc::clone(process) })
    }

    fn close_late_ns(&self, name: &str) -> u64 {
        let rate = self.call_rates.close_late;
        if self.is_calm() || rate == 0 && !self.sim.has_given_decisions() {
            return 0;
        }
        let entity = self.sim.derive("close-call", text_hash(name));
        self.sim
            .name_entity(entity, || format!("close of {name} by {}", self.sim.name_of(self.sim.current())));
        self.sim.fault(entity, &CLOSE_LATE, rate, |d| d.magnitude(24))
    }

    /// Closes what is due; while it is calm, everything.
    pub(crate) fn close_due(&self) {
        let now_ns = self.sim.now_ns();
        let mut closing = self.closing.borrow_mut();
        if !closing.is_empty() {
            closing.retain(|(until_ns, _)| *until_ns > now_ns && !self.is_calm());
        }
    }
}
