//! The guest overwrites fields that only the back end should write: the page is the guest's memory, too.
//!
//! A running back end knows all of these values. One that takes over the ring of a dead one has to read some of them,
//! and may refuse a ring that contradicts its record, but must not trust it.

use super::{Hostile, PATIENCE_NS, RSP_PROD};
use crate::check::Invariant;
use sim::Label;
use tap_host::EventChannel;
use xen_model::GuestRing;

/// What the hostile guest overwrites before it publishes requests: kind in 3 bits, detail in 32.
pub static SCRIBBLE: Label = Label::packed(
    "scribble",
    "the hostile guest writes over (1 the index of responses, 2 the event index, 3 the epoch), 4 raises events, 5 closes its port: {}",
    &[3, 32],
);

/// Byte offsets in the ring's header.
const REQ_EVENT: usize = 4;
const EPOCH: usize = 60;
/// The attempt number of the decision at the end, among those about scribbles.
const AT_THE_END: u32 = 0xffff;

impl Hostile {
    /// Called before the `nth` requests are published; nothing is in flight, so the index of responses is `consumed`.
    pub(super) fn scribble_before(&self, ring: &GuestRing, nth: u32, consumed: u32) {
        if !self.ring_may_break {
            return;
        }
        let rate = self.world.mood("scribbles", 3) * 150_000;
        let value = self.world.sim.nth_fault(self.entity, &SCRIBBLE, nth, rate as u32, |d| {
            (1 + d.below(4)) | d.below(1 << 32) << 3
        });
        let detail = (value >> 3) as u32;
        match value & 7 {
            // Far from the values that the next answers write, so that these are noticed.
            1 => {
                let away = if detail & 1 == 0 {
                    (33 + (detail >> 1)).min(u32::MAX / 2)
                } else {
                    u32::MAX - (detail >> 1) % 40
                };
                ring.page().store_u32(RSP_PROD, consumed.wrapping_add(away));
                self.note_overwrite();
            }
            2 => ring.page().store_u32(REQ_EVENT, detail),
            3 => {
                ring.page().store_u32(EPOCH, detail);
                self.note_overwrite();
                self.epoch_lost.set(true);
            }
            4 => (0..=detail % 8).for_each(|_| ring.channel().notify()),
            _ => {}
        }
    }

    /// Records an overwrite in the current life of the back end, until something restores the value. If the ring is not
    /// mapped yet, its successor has to read it.
    fn note_overwrite(&self) {
        let lives = self.lives.get();
        let life = if self.is_mapped() { lives } else { lives.wrapping_sub(1) };
        self.scribbled.set(self.scribbled.get().or(Some(life)));
    }

    fn is_mapped(&self) -> bool {
        self.world.xen.mapped_from(self.attached.dom) > 0
    }

    /// Whether the back end died while a value that its successor has to read was wrong: it may then refuse the ring.
    pub(super) fn may_be_unrecoverable(&self) -> bool {
        self.scribbled.get().is_some_and(|lives| lives != self.lives.get())
    }

    /// Waits until answers to some of `asked` requests have restored the index of responses. `false` if none will.
    pub(super) async fn index_is_restored(&self, ring: &GuestRing, consumed: u32, asked: u32) -> bool {
        let until = self.world.sim.now_ns() + PATIENCE_NS;
        while !(1..=asked).contains(&ring.page().load_u32(RSP_PROD).wrapping_sub(consumed)) {
            if self.may_be_unrecoverable() {
                return false;
            }
            if self.world.sim.now_ns() > until {
                // It may have been written between the mapping and the first load.
                if self.lives.get() > 1 && !self.is_mapped() {
                    return false;
                }
                self.world.fail(Invariant::X1, "no answer restores the index of responses");
                return false;
            }
            self.world.sim.sleep_ns(20_000).await;
        }
        if !self.epoch_lost.get() {
            self.scribbled.set(None);
        }
        true
    }

    /// Before it leaves, it may close its end of the event channel under the back end.
    pub(super) fn close_channel(&self, ring: &GuestRing) {
        if self.ring_may_break {
            let draw = |d: &mut sim::Draw| if d.below(4) == 0 { 5 } else { 0 };
            if self.world.sim.decide(self.entity, &SCRIBBLE, AT_THE_END, draw) & 7 == 5 {
                ring.close_channel();
            }
        }
    }
}
