//! What a look at the file found beyond what was asked for.
//!
//! ```text
//!   asked        ├──┤
//!   looked at    ├──────┼──┼────┼─────┼──┤      one trip to another thread
//!   next answers     ├──┤  ├──┤                 from here
//! ```
//!
//! A look at the holes of a file is made on another thread, and the way there costs more than what is done there.
//! Clients ask for few extents at a time, QEMU for one, in the order of the disk. So a look takes more than was asked
//! for, the more the longer questions follow one another, and the rest answers the next ones.
//!
//! # Contract
//!
//! * What is kept is true until a request changes the file: its beginning drops what is kept, and what is found while
//!   it runs is not kept. One that is dropped before its end may still change the file at any later time, so nothing is
//!   kept from then on.
//! * Nothing is kept of a file that others may write to, because it was opened without a lock; and of no file for
//!   longer than [`AGE_MAX_NS`], because others may ignore the lock, and some file systems have none.
//! * At most [`AHEAD_MAX`] runs are kept.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use tap_host::{FileExtent, Probe};

tap_host::listed! {
    pub(super) BUGS: Bug;
    RAW_AHEAD_KEPT = "raw-ahead-kept", "a raw disk says what it knew of its holes before a write";
}

/// Runs that the first look takes.
const AHEAD_MIN: usize = 16;
/// Most runs that a look takes.
pub(super) const AHEAD_MAX: usize = 1024;

/// How long runs are kept, in nanoseconds.
pub(super) const AGE_MAX_NS: u64 = 1_000_000_000;

/// The runs of a file that are known.
pub(super) struct Ahead {
    may_keep: Cell<bool>,
    /// One after the other, from byte `at` on.
    runs: RefCell<VecDeque<FileExtent>>,
    at: Cell<u64>,
    /// When they were looked for.
    since_ns: Cell<u64>,
    /// Where the last look ended, and how many runs it took.
    looked_to: Cell<u64>,
    count: Cell<usize>,
    /// Requests that are changing the file.
    running: Cell<u32>,
    /// Requests that have begun to.
    changes: Cell<u64>,
}

/// A request that changes the file, while it runs.
pub(super) struct Change<'a>(Option<&'a Ahead>);

impl Ahead {
    /// Nothing is known. `locked`: only requests change the file.
    pub(super) fn new(locked: bool) -> Self {
        Self {
            may_keep: Cell::new(locked),
            runs: RefCell::default(),
            at: Cell::new(0),
            since_ns: Cell::new(0),
            looked_to: Cell::new(0),
            count: Cell::new(0),
            running: Cell::new(0),
            changes: Cell::new(0),
        }
    }

    /// A request begins to change the file.
    pub(super) fn change(&self, probe: &impl Probe) -> Change<'_> {
        self.running.set(self.running.get() + 1);
        if !probe.bug(&RAW_AHEAD_KEPT) {
            self.forget();
        }
        Change(Some(self))
    }

    fn forget(&self) {
        self.changes.set(self.changes.get() + 1);
        self.runs.borrow_mut().clear();
    }

    /// For [`Ahead::keep`]; taken before the look. `None` if nothing may be kept.
    pub(super) fn stamp(&self) -> Option<u64> {
        (self.may_keep.get() && self.running.get() == 0).then(|| self.changes.get())
    }

    /// How many runs to look for at byte `at` if `max` are needed.
    pub(super) fn count(&self, at: u64, max: usize) -> usize {
        if self.stamp().is_none() {
            return max;
        }
        let goes_on = at >= self.looked_to.get() && self.count.get() > 0;
        let count = if goes_on { 4 * self.count.get() } else { AHEAD_MIN };
        self.count.set(count.min(AHEAD_MAX));
        self.count.get().max(max)
    }

    /// Keeps what a look at byte `at` found that began at `since_ns`.
    pub(super) fn keep(&self, stamp: Option<u64>, since_ns: u64, at: u64, mut found: Vec<FileExtent>) {
        if stamp.is_none() || stamp != self.stamp() {
            return;
        }
        found.truncate(AHEAD_MAX);
        self.looked_to.set(at + found.iter().map(|run| run.len_bytes).sum::<u64>());
        self.at.set(at);
        self.since_ns.set(since_ns);
        *self.runs.borrow_mut() = found.into();
    }

    /// The first known runs in the bytes `at..end`, at most `max`; none if the first byte is not known at `now_ns`.
    /// What lies before is dropped.
    pub(super) fn take(&self, now_ns: u64, at: u64, end: u64, max: usize) -> Vec<FileExtent> {
        let mut runs = self.runs.borrow_mut();
        if now_ns.saturating_sub(self.since_ns.get()) > AGE_MAX_NS {
            runs.clear();
        }
        let mut start = self.at.get();
        if at < start {
            return Vec::new();
        }
        while let Some(first) = runs.front()
            && start + first.len_bytes <= at
        {
            start += first.len_bytes;
            runs.pop_front();
        }
        self.at.set(start);
        let mut found = Vec::new();
        for run in runs.iter().take(max) {
            let run_end = start + run.len_bytes;
            found.push(FileExtent { len_bytes: run_end - start.max(at), data: run.data });
            start = run_end;
            // An overlay asks for one cluster at a time, and there may be many runs after it.
            if start >= end {
                break;
            }
        }
        found
    }
}

impl Change<'_> {
    /// It has ended.
    pub(super) fn end(mut self) {
        if let Some(ahead) = self.0.take() {
            ahead.running.set(ahead.running.get() - 1);
        }
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        // It may still be carried out, at any time.
        if let Some(ahead) = self.0.take() {
            ahead.may_keep.set(false);
            ahead.forget();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_takes_more_and_more_up_to_a_limit() {
        let ahead = Ahead::new(true);
        let mut at = 0;
        for want in [AHEAD_MIN, 4 * AHEAD_MIN, 16 * AHEAD_MIN, AHEAD_MAX, AHEAD_MAX] {
            assert_eq!(ahead.count(at, 1), want);
            ahead.keep(ahead.stamp(), 0, at, vec![FileExtent { len_bytes: 4096, data: true }; want]);
            at += 4096 * want as u64;
        }
        assert_eq!(ahead.count(0, 1), AHEAD_MIN, "elsewhere");
        assert_eq!(ahead.count(0, 2 * AHEAD_MAX), 2 * AHEAD_MAX, "what is needed is looked for");
    }

    /// What is copied for a question does not depend on how much is known.
    #[test]
    fn no_more_is_taken_than_was_asked_for() {
        let run = |i: usize| FileExtent { len_bytes: 4096, data: i.is_multiple_of(2) };
        let known = || {
            let ahead = Ahead::new(true);
            ahead.keep(ahead.stamp(), 0, 8192, (0..AHEAD_MAX).map(run).collect());
            ahead
        };
        let taken = |at, end, max| {
            let found = known().take(0, at, end, max);
            (found.len(), found.first().map_or(0, |first| first.len_bytes))
        };
        assert_eq!(taken(8192, 8192 + 4096, usize::MAX), (1, 4096));
        assert_eq!(taken(8192, 8192 + 4097, usize::MAX), (2, 4096));
        assert_eq!(taken(8192 + 512, 8192 + 4096, usize::MAX), (1, 3584), "the rest of a run");
        assert_eq!(taken(8192 + 4096, u64::MAX, 3), (3, 4096));
        assert_eq!(taken(8192, u64::MAX, usize::MAX).0, AHEAD_MAX);
        assert_eq!((taken(0, u64::MAX, 3).0, taken(8192 + (4 << 20), u64::MAX, 3).0), (0, 0), "not known");
    }
}
