//! Shared memory as the CPUs of a machine see it: others run between any two accesses, and stores may be delayed.
//!
//! Before each access of a page that two domains share, a decision may let tasks of the other domains run. Each process
//! has a store buffer, as on x86 (TSO): a decision keeps a store in the buffer, later ones queue up after it, loads of
//! the same CPU see its content, and a full barrier, a grant copy or an event empties it in order. It is emptied at the
//! latest before time advances.

use crate::page::Page;
use crate::port::XenPort;
use sim::{FaultKind, Label, Timed};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

/// How many turns of others run before an access, in 4 bits, and whether the other side gets a spurious event first.
pub(crate) static OTHER_CPUS: Label =
    Label::packed("other-cpus", "before access {n} other CPUs run: turns, and 16 for an event ({})", &[4, 1]);
pub(crate) static STORE_BUFFERED: Label =
    Label::new("store-buffered", "store {n} stays in the CPU's buffer until the next barrier");

pub(crate) static OTHER_CPUS_KIND: FaultKind = FaultKind { name: "other-cpus", max_ppm: 300_000 };
pub(crate) static STORE_BUFFERED_KIND: FaultKind = FaultKind { name: "store-buffered", max_ppm: 500_000 };

/// A store that the other side does not see yet.
struct Buffered {
    page: Page,
    offset: usize,
    bytes: Vec<u8>,
}

/// The store buffer of a process.
#[derive(Default)]
pub(crate) struct StoreBuffer {
    stores: RefCell<VecDeque<Buffered>>,
    in_use: Cell<bool>,
}

impl XenPort {
    /// The other CPUs may run here. No model may be borrowed.
    #[inline]
    pub(crate) fn other_cpus(&self) {
        if self.xen().0.rates.cpus {
            self.interleave();
        }
    }

    fn interleave(&self) {
        let xen = &self.xen().0;
        let Some((task, nth)) = xen.sim.next_access() else { return };
        let rate = xen.rates.other_cpus;
        let value = xen.sim.nth_fault(task, &OTHER_CPUS, nth, rate, |d| (1 + d.below(15)) | d.below(2) << 4);
        if value == 0 {
            return;
        }
        if value & 16 != 0 {
            self.wake_peers();
        }
        xen.sim.run_others(value & 15);
    }

    /// Loads bytes of a page that others share.
    #[inline]
    pub(crate) fn shared_load(&self, page: &Page, offset: usize, into: &mut [u8]) {
        page.read(offset, into);
        if self.store_buffer().in_use.get() {
            self.see_own_stores(page, offset, into);
        }
    }

    /// A load sees what is in the buffer of its CPU.
    fn see_own_stores(&self, page: &Page, offset: usize, into: &mut [u8]) {
        let buffer = self.store_buffer();
        for store in buffer.stores.borrow().iter().filter(|store| store.page.is(page)) {
            let (from, to) =
                (store.offset.max(offset), (store.offset + store.bytes.len()).min(offset + into.len()));
            if from < to {
                into[from - offset..to - offset]
                    .copy_from_slice(&store.bytes[from - store.offset..to - store.offset]);
            }
        }
    }

    /// Stores bytes into a page that others share: now, or at the next barrier.
    #[inline]
    pub(crate) fn shared_store(&self, page: &Page, offset: usize, bytes: &[u8]) {
        if self.store_buffer().in_use.get() || self.xen().0.rates.cpus && self.is_buffered() {
            self.buffer_store(page, offset, bytes);
        } else {
            page.write_shared(offset, bytes);
        }
    }

    fn buffer_store(&self, page: &Page, offset: usize, bytes: &[u8]) {
        let buffer = self.store_buffer();
        let store = Buffered { page: page.clone(), offset, bytes: bytes.to_vec() };
        buffer.stores.borrow_mut().push_back(store);
        if !buffer.in_use.replace(true) {
            let sim = &self.xen().0.sim;
            sim.call_at(sim.now_ns(), Rc::new(Drain(self.clone())), 0);
        }
    }

    /// Whether the next store stays in the empty buffer.
    fn is_buffered(&self) -> bool {
        let xen = &self.xen().0;
        let nth = self.store_buffer_count();
        xen.sim.nth_fault(self.entity(), &STORE_BUFFERED, nth, xen.rates.store_buffered, |_| 1) != 0
    }

    /// Makes every store of this process visible, in order.
    #[inline]
    pub(crate) fn drain_stores(&self) {
        if self.store_buffer().in_use.get() {
            self.empty_buffer();
        }
    }

    fn empty_buffer(&self) {
        let buffer = self.store_buffer();
        loop {
            let next = buffer.stores.borrow_mut().pop_front();
            let Some(store) = next else { break };
            store.page.write_shared(store.offset, &store.bytes);
        }
        buffer.in_use.set(false);
    }
}

/// Empties the buffer before time advances.
struct Drain(XenPort);

impl Timed for Drain {
    fn fire(self: Rc<Self>, _: u64) {
        self.0.drain_stores();
    }
}
