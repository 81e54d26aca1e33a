//! Where requests end: their results wait for the ring's own task, which publishes them together.

use crate::end::Signal;
use crate::slots::Taken;
use smallvec::SmallVec;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use tap_host::SectorRange;

/// A request with its result.
pub(crate) struct Done {
    pub(crate) taken: Taken,
    pub(crate) status: i16,
}

/// What the requests of a ring leave to the ring's own task.
#[derive(Default)]
pub(crate) struct Completions {
    /// Results that are not published yet, in the order in which they came.
    pub(crate) done: RefCell<VecDeque<Done>>,
    /// Where flushes with data will write, once what was answered before is durable. A request that overlaps one
    /// waits for its end: if it were answered earlier, a successor of this process would write the flush's older
    /// data again, over newer data.
    fenced: RefCell<SmallVec<[(u8, SectorRange); 2]>>,
    /// Wakes the ring's own task.
    pub(crate) signal: Rc<Signal>,
}

impl Completions {
    /// A request ended; its response goes out with the next batch.
    pub(crate) fn done(&self, done: Done) {
        self.done.borrow_mut().push_back(done);
        self.signal.waiter.wake();
    }

    /// The flush in `slot` will write `data`.
    pub(crate) fn fence(&self, slot: u8, data: SectorRange) {
        self.fenced.borrow_mut().push((slot, data));
    }

    /// Whether a flush that has not ended will write in `range`.
    pub(crate) fn is_fenced(&self, range: SectorRange) -> bool {
        self.fenced.borrow().iter().any(|(_, data)| data.overlaps(range))
    }

    /// The flush in `slot` has ended. Its answer, which comes in the same turn, wakes the ring's task.
    pub(crate) fn lift_fence(&self, slot: u8) {
        self.fenced.borrow_mut().retain(|(fenced, _)| *fenced != slot);
    }
}
