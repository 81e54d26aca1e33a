//! The places of the requests in flight. A request that was taken has one until its response is published.

use std::cell::{Cell, RefCell};

/// A request that was taken and has to be answered, once: answering consumes it, and nothing else makes a response.
#[derive(Debug)]
#[must_use]
pub(crate) struct Taken {
    slot: u8,
    id: u64,
    op: u8,
}

impl Taken {
    /// Its place.
    pub(crate) fn slot(&self) -> u8 {
        self.slot
    }
    /// The other end's identifier.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }
    /// The operation as the ring has it.
    pub(crate) fn op(&self) -> u8 {
        self.op
    }
}

/// The slots of a ring.
pub(crate) struct Slots {
    free: RefCell<Vec<u8>>,
    in_flight: Cell<u32>,
}

impl Slots {
    /// `count` free slots.
    pub(crate) fn new(count: u8) -> Self {
        Self { free: RefCell::new((0..count).rev().collect()), in_flight: Cell::new(0) }
    }

    /// Requests taken and not answered.
    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.get()
    }

    /// Whether `slot` exists and no request has it.
    pub(crate) fn is_free(&self, slot: u64) -> bool {
        self.free.borrow().iter().any(|free| u64::from(*free) == slot)
    }

    /// Takes a request into any slot.
    pub(crate) fn take(&self, id: u64, op: u8) -> Taken {
        let slot = self.free.borrow_mut().pop().expect("a slot per entry of the ring");
        self.taken(slot, id, op)
    }

    /// Takes a request into `slot`, which must be free.
    pub(crate) fn take_at(&self, slot: u8, id: u64, op: u8) -> Taken {
        let mut free = self.free.borrow_mut();
        let at = free.iter().position(|free| *free == slot).expect("the slot was found free");
        free.swap_remove(at);
        self.taken(slot, id, op)
    }

    fn taken(&self, slot: u8, id: u64, op: u8) -> Taken {
        self.in_flight.set(self.in_flight.get() + 1);
        Taken { slot, id, op }
    }

    /// The response of a request is published, or never will be.
    pub(crate) fn give_back(&self, taken: Taken) {
        self.in_flight.set(self.in_flight.get() - 1);
        self.free.borrow_mut().push(taken.slot);
    }
}
