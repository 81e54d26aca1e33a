//! Outages: for a span of time every operation and call on every file fails for now, as if the host were out of memory.
//!
//! ```text
//!   set ──operations──► it begins ──time──► it ends ──time──► faults as before
//!                       all fail             none passes
//! ```

use super::nth::Nth;
use super::{Inner, Storage};
use crate::faults::{Fault, IoOp};
use std::cell::Cell;
use tap_host::Errno;

/// For how long after an outage no operation fails for now, in nanoseconds: whoever waited it out has few attempts
/// left.
const REST_NS: u64 = 5_000_000_000;

/// The outage of a storage.
#[derive(Default)]
pub(super) struct Outage {
    /// Operations before it begins; `None` if there is to be none.
    left: Cell<Option<u64>>,
    lasts_ns: Cell<u64>,
    /// When it ends, once it has begun.
    ends_ns: Cell<Option<u64>>,
}

impl Storage {
    /// After `operations` more, all operations fail for `lasts_ns` nanoseconds: reads, writes and zeros with `EAGAIN`,
    /// synchronisations and calls that can be interrupted with `EINTR`, and nothing lands. A power cut ends it, or
    /// sees to it that it does not begin.
    pub fn set_outage(&self, operations: u64, lasts_ns: u64) {
        let outage = &self.0.outage;
        outage.left.set(Some(operations));
        outage.lasts_ns.set(lasts_ns);
        outage.ends_ns.set(None);
    }
}

impl Inner {
    /// What the outage, if there is one, does to an operation that begins now.
    pub(super) fn outage(&self, op: IoOp) -> Option<Nth> {
        let outage = &self.outage;
        if let Some(left) = outage.left.get() {
            outage.left.set(left.checked_sub(1));
            if left == 0 {
                outage.ends_ns.set(Some(self.sim.now_ns() + outage.lasts_ns.get()));
            }
        }
        let error = if op == IoOp::Sync { Errno::EINTR } else { Errno::EAGAIN };
        self.in_outage().map(|fails| if fails { Nth::Fails(Fault::Error(error, 0)) } else { Nth::Spared })
    }

    /// Whether what begins now fails for now: `Some(false)` means that it is spared, `None` that there is no outage.
    pub(super) fn in_outage(&self) -> Option<bool> {
        let (ends_ns, now) = (self.outage.ends_ns.get()?, self.sim.now_ns());
        (now < ends_ns + REST_NS).then_some(now < ends_ns)
    }

    pub(super) fn end_outage(&self) {
        self.outage.left.set(None);
        self.outage.ends_ns.set(None);
    }
}
