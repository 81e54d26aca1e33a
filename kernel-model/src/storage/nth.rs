//! Failures by number: from the n-th operation on, a number of the concerned operations fail.

use super::Inner;
use crate::calls::Call;
use crate::faults::{Fault, IoOp};
use sim::Entity;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use tap_host::{Errno, ZeroMode};

/// Operations from the n-th on fail: a sweep over `n` reaches every one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NthFailure {
    /// The first one that may fail, counted from 1 over all reads, writes and synchronisations; calls are counted
    /// separately.
    pub n: u64,
    /// How many of the concerned operations fail in a row; [`NthFailure::FOR_GOOD`] until faults stop.
    pub times: u64,
    /// Which operations it concerns.
    pub of: Concerned,
    /// How much of a write lands: 0 nothing, 255 everything.
    pub effect: u8,
    /// The error. `EAGAIN` means a transient error of the host: for a synchronisation or a call that is `EINTR`. Once
    /// `times` operations have failed with it, the next ones are spared, because callers retry only so often.
    pub error: Errno,
}

/// What a failure by number concerns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Concerned {
    /// Every operation.
    All,
    /// All but synchronisations: what was accepted reaches the medium, and nothing takes its place.
    ButSyncs,
    /// Ranges made zeros, and holes.
    Zeros,
    /// Synchronisations.
    Syncs,
    /// Calls other than transfers that can be interrupted.
    Calls,
}

impl NthFailure {
    /// As [`NthFailure::times`]: until faults stop.
    pub const FOR_GOOD: u64 = u64::MAX;

    /// Whether a retry succeeds.
    pub fn is_passing(&self) -> bool {
        self.error == Errno::EAGAIN
    }
}

/// Operations after a row of transient failures that are spared from them.
const SPARED: u64 = 64;

/// How many operations have failed by number, and how many were spared.
#[derive(Default)]
pub(super) struct NthCounts {
    failed: Cell<u64>,
    spared: Cell<u64>,
    calls: Cell<u64>,
}

/// How often one operation, which callers repeat, has failed for now. A repetition by a new task may have the same key
/// as the one before, and would then fail with it for ever.
#[derive(Default)]
pub(super) struct Rows(RefCell<BTreeMap<u64, u32>>);

/// Most transient failures of one operation: fewer than callers repeat it.
const ROW_MAX: u32 = 8;

impl Rows {
    /// Counts a transient failure of `io`. Whether there were enough.
    pub(super) fn ends(&self, io: Entity) -> bool {
        let mut rows = self.0.borrow_mut();
        let failed = rows.entry(io.0).or_default();
        *failed += 1;
        *failed > ROW_MAX
    }
}

/// The effect of a failure by number on one operation.
pub(super) enum Nth {
    Fails(Fault),
    /// No transient failure, drawn or not.
    Spared,
    Nothing,
}

impl Inner {
    /// What an outage, or the failure by number, does to operation number `n`, if there is one.
    pub(super) fn nth(&self, op: IoOp, n: u64) -> Nth {
        if let Some(outage) = self.outage(op).filter(|_| !self.stopped.get()) {
            return outage;
        }
        let Some(nth) = self.config.borrow().nth_failure.filter(|_| !self.stopped.get()) else {
            return Nth::Nothing;
        };
        let concerned = match nth.of {
            // A full disk can still be read, and holes can be made in it.
            _ if nth.error == Errno::ENOSPC && !op.takes_space() => false,
            Concerned::All => true,
            Concerned::ButSyncs => op != IoOp::Sync,
            Concerned::Zeros => matches!(op, IoOp::Zero(_)),
            Concerned::Syncs => op == IoOp::Sync,
            Concerned::Calls => false,
        };
        if n < nth.n || !concerned {
            return Nth::Nothing;
        }
        if !self.one_more(nth) {
            return if self.spares(nth) { Nth::Spared } else { Nth::Nothing };
        }
        Nth::Fails(match (op, nth.error) {
            (IoOp::Zero(ZeroMode::Keep), Errno::ENOSPC) if nth.effect > 0 => {
                Fault::DropsPages(nth.effect < 255)
            }
            (IoOp::Sync, Errno::EAGAIN) => Fault::Error(Errno::EINTR, 0),
            (_, error) => Fault::Error(error, nth.effect),
        })
    }

    /// Whether `call` is interrupted by an outage, or by number: `Some(false)` means that it is spared.
    pub(crate) fn nth_call(&self, call: Call) -> Option<bool> {
        if self.stopped.get() || !call.is_interruptible() {
            return None;
        }
        if let Some(fails) = self.in_outage() {
            return Some(fails);
        }
        let nth = self.config.borrow().nth_failure.filter(|nth| nth.of == Concerned::Calls)?;
        let calls = &self.nth_counts.calls;
        calls.set(calls.get() + 1);
        if calls.get() < nth.n {
            return None;
        }
        if self.one_more(nth) {
            return Some(true);
        }
        self.spares(nth).then_some(false)
    }

    fn one_more(&self, nth: NthFailure) -> bool {
        let failed = &self.nth_counts.failed;
        let fails = failed.get() < nth.times;
        failed.set(failed.get() + u64::from(fails));
        fails
    }

    fn spares(&self, nth: NthFailure) -> bool {
        let spared = &self.nth_counts.spared;
        spared.set(spared.get() + 1);
        nth.is_passing() && spared.get() <= SPARED
    }
}
