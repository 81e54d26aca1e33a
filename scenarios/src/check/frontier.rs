//! The versions that one block of sectors may hold.
//!
//! A *version* is a write as seen by one sector. Two clocks decide whether a version may still be seen: that of the
//! running disk (a read sees nothing older than what was answered before it began) and that of the medium (a power cut
//! leaves nothing older than what was flushed). A version is dropped once neither can show it.

use super::oracle::{Oracle, is_broken};
use smallvec::SmallVec;

/// Logical time: a counter that every event of a history advances.
pub type Clock = u64;

/// Not yet.
pub const NEVER: Clock = Clock::MAX;

/// One write as seen by a sector. Write 0 is the initial content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Version {
    /// Number of the write.
    pub write: u64,
    /// It wrote zeros, which do not identify their writer.
    pub zero: bool,
    /// When it was submitted.
    pub inv: Clock,
    /// When it was answered; [`NEVER`] while it runs.
    pub res: Clock,
    /// It was answered with an error, or is a discard, and may or may not have taken effect.
    pub failed: bool,
    /// When it became stale on the running disk: reads submitted later may not see it.
    pub stale_at: Clock,
    /// When the first read that saw it was answered.
    pub seen_at: Clock,
    /// A power cut cannot restore it, because a later write is durable.
    pub superseded: bool,
    /// One of several versions that the medium may hold after a crash; a read settles which.
    pub unresolved: bool,
    /// It was unresolved and has been read, which rules the others out.
    pub settled: bool,
    /// When the read was submitted that came later, did not see it and was answered while it ran: the write must fail,
    /// or the order is violated. [`NEVER`] if there is none.
    pub missed: Clock,
}

/// How two overlapping requests are ordered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// The one answered before the other was submitted comes first; concurrent requests may take either order.
    Answer,
    /// The one submitted first comes first, as a single ring with an ordering scheduler promises.
    Submission,
    /// As `Submission`, except that a running write may yet fail: the server may know of the failure before the
    /// submitter does.
    SubmissionOrFailure,
}

impl Version {
    fn is_zero(&self, initial: bool) -> bool {
        self.zero || (initial && self.write == 0)
    }

    /// It and its state, in words.
    fn words(&self, overwritten: &str) -> String {
        let state = match (self.res, self.failed, self.stale_at) {
            (NEVER, _, _) => "running",
            (_, true, _) => "failed",
            (_, _, NEVER) => "answered",
            _ => overwritten,
        };
        match self.write {
            0 if state == "answered" => "its initial content".into(),
            0 => format!("its initial content ({state})"),
            write => format!("write {write} ({state})"),
        }
    }

    fn before(&self, other: &Version, order: Order) -> bool {
        self.before_time(other.inv, order)
    }

    /// Whether it comes before whatever was submitted at `inv`.
    fn before_time(&self, inv: Clock, order: Order) -> bool {
        match order {
            Order::Answer => self.res < inv,
            Order::Submission | Order::SubmissionOrFailure => self.inv < inv,
        }
    }

    /// Whether neither a read nor a power cut can show it any longer.
    fn is_gone(&self, oldest_read: Clock) -> bool {
        self.superseded && self.stale_at < oldest_read
    }
}

fn listed(words: impl Iterator<Item = String>) -> String {
    let words: Vec<String> = words.collect();
    if words.is_empty() { "nothing known".into() } else { words.join(", ") }
}

/// The state of a run of equal sectors.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Block {
    /// In order of submission.
    versions: SmallVec<[Version; 2]>,
}

impl Default for Block {
    fn default() -> Self {
        let initial = Version {
            write: 0,
            zero: false,
            inv: 0,
            res: 0,
            failed: false,
            stale_at: NEVER,
            seen_at: NEVER,
            superseded: false,
            unresolved: false,
            settled: false,
            missed: NEVER,
        };
        Self { versions: [initial].into_iter().collect() }
    }
}

impl Block {
    /// A write was submitted; `zero` if it is one of zeros.
    pub fn begin(&mut self, write: u64, inv: Clock, zero: bool) {
        self.versions.push(Version {
            write,
            zero,
            inv,
            res: NEVER,
            failed: false,
            stale_at: NEVER,
            seen_at: NEVER,
            superseded: false,
            unresolved: false,
            settled: false,
            missed: NEVER,
        });
    }

    /// `write`, which runs, may do nothing whatever its answer is: nobody is told that it did, so it counts as failed
    /// before it is answered.
    pub fn may_do_nothing(&mut self, write: u64) {
        self.versions.iter_mut().filter(|v| v.write == write).for_each(|v| v.failed = true);
    }

    /// A write was answered. `oldest_read` is the submission time of the oldest running read. If the write succeeded
    /// although a read has already shown that it did not, returns when that read was submitted.
    pub fn end(
        &mut self,
        write: u64,
        res: Clock,
        ok: bool,
        oldest_read: Clock,
        order: Order,
    ) -> Option<Clock> {
        let at = self.versions.iter().position(|v| v.write == write)?;
        self.versions[at].res = res;
        self.versions[at].failed = !ok;
        if ok {
            let done = self.versions[at];
            for v in &mut self.versions {
                if v.before(&done, order) {
                    v.stale_at = v.stale_at.min(res);
                }
            }
            self.prune(oldest_read);
            return (done.missed != NEVER).then_some(done.missed);
        }
        None
    }

    /// Drops what neither a read nor a power cut can show any longer.
    fn prune(&mut self, oldest_read: Clock) {
        self.versions.retain(|v| !v.is_gone(oldest_read));
    }

    /// Whether a read from `inv` to `res` may have seen `write`. If so, records what that implies.
    pub fn read(&mut self, write: u64, inv: Clock, res: Clock, order: Order) -> bool {
        let Some(seen) = self.versions.iter().find(|v| v.write == write).copied() else { return false };
        if !self.shows(&seen, inv, res, order) {
            return false;
        }
        if self.versions.len() == 1 {
            self.versions[0].seen_at = seen.seen_at.min(res);
            return true;
        }
        if seen.unresolved && !is_broken(Oracle::SettledForgotten) {
            // The medium held one of several; this read settles which.
            self.versions.retain(|v| !v.unresolved || v.write == write);
            if let Some(v) = self.versions.iter_mut().find(|v| v.write == write) {
                v.unresolved = false;
                v.settled = true;
            }
        }
        for v in &mut self.versions {
            let later = seen.inv < v.inv && v.inv < inv;
            if v.res == NEVER && later && order == Order::SubmissionOrFailure {
                v.missed = v.missed.min(inv);
            }
            let overtaken = v.before(&seen, order) && v.write != write;
            // A failed write that would have hidden the version read had no effect.
            let never = v.failed && v.res < inv && seen.before(v, order);
            // A version that was seen before and then replaced cannot return.
            let replaced = v.write != write && v.seen_at < inv;
            if overtaken || never || replaced {
                v.stale_at = v.stale_at.min(res);
            }
            if v.write == write {
                v.seen_at = v.seen_at.min(res);
            }
        }
        true
    }

    /// Whether a read from `inv` to `res` may have seen the version `seen`.
    fn shows(&self, seen: &Version, inv: Clock, res: Clock, order: Order) -> bool {
        if seen.inv >= res || (seen.stale_at < inv && !is_broken(Oracle::StaleAllowed)) {
            return false;
        }
        // In order of submission, a read sees nothing that was submitted after it, and nothing that a write submitted
        // between the two has replaced.
        let may_fail = |w: &Version| w.res == NEVER && order == Order::SubmissionOrFailure;
        let replaced = |w: &Version| !w.failed && !may_fail(w) && w.inv > seen.inv && w.inv < inv;
        order == Order::Answer
            || is_broken(Oracle::OrderIgnored)
            || (seen.inv <= inv && !self.versions.iter().any(replaced))
    }

    /// Whether a read from `inv` to `res` may have seen zeros; `initial` if the disk held zeros initially. Records what
    /// that implies, as far as it is clear which zeros they were.
    pub fn read_zeros(&mut self, initial: bool, inv: Clock, res: Clock, order: Order) -> bool {
        if is_broken(Oracle::ZerosAnywhere) {
            return true;
        }
        let shown = |v: &&Version| v.is_zero(initial) && self.shows(v, inv, res, order);
        let candidates: SmallVec<[Version; 4]> = self.versions.iter().filter(shown).copied().collect();
        match &candidates[..] {
            [] => false,
            [only] => self.read(only.write, inv, res, order),
            several => {
                if several.iter().all(|v| v.unresolved) {
                    // The medium held one of these and keeps it.
                    self.versions.retain(|v| !v.unresolved || v.is_zero(initial));
                }
                true
            }
        }
    }

    /// Whether a power cut now may leave zeros; `initial` as for reads.
    pub fn zeros_may_survive(&self, initial: bool) -> bool {
        self.versions.iter().any(|v| !v.superseded && v.is_zero(initial))
    }

    /// A flush submitted at `flush_inv` succeeded: writes answered before that are durable. Returns whether anything is
    /// still not durable.
    pub fn flushed(&mut self, flush_inv: Clock, oldest_read: Clock, order: Order) -> bool {
        // Versions are in order of submission, and the latest of the durable writes hides all earlier ones.
        let latest = self.versions.iter().rfind(|w| !w.failed && w.res < flush_inv).map(|w| w.inv);
        if let Some(inv) = latest {
            self.supersede(inv, oldest_read, order);
        }
        self.versions.len() > 1
    }

    /// The writes that cannot return once everything answered before `flush_inv` is durable.
    pub fn hidden_by_flush(&self, flush_inv: Clock, order: Order) -> SmallVec<[u64; 2]> {
        let durable = self.versions.iter().filter(|w| !w.failed && w.res < flush_inv);
        let Some(latest) = durable.max_by_key(|w| w.inv) else { return SmallVec::new() };
        self.versions.iter().filter(|v| v.before(latest, order)).map(|v| v.write).collect()
    }

    /// After a power cut, `write` turns out not to be what the medium holds. Returns whether it had been read already.
    pub fn rule_out(&mut self, write: u64) -> bool {
        if self.versions.len() > 1 {
            self.versions.retain(|v| v.write != write || !v.unresolved);
        }
        self.is_settled() && self.versions[0].write == write
    }

    /// The answer to `write` promised that this write is durable.
    pub fn hardened(&mut self, write: u64, oldest_read: Clock, order: Order) {
        if let Some(inv) = self.versions.iter().find(|v| v.write == write).map(|v| v.inv) {
            self.supersede(inv, oldest_read, order);
        }
    }

    /// The write that was submitted at `inv` is durable.
    fn supersede(&mut self, inv: Clock, oldest_read: Clock, order: Order) {
        let mut any_gone = false;
        for v in self.versions.as_mut_slice() {
            v.superseded |= v.before_time(inv, order);
            any_gone |= v.is_gone(oldest_read);
        }
        if any_gone {
            self.prune(oldest_read);
        }
    }

    /// Whether a read has settled the versions that a crash left, with no write since.
    pub fn is_settled(&self) -> bool {
        matches!(&self.versions[..], [only] if only.settled)
    }

    /// Whether a power cut now may leave `write`.
    pub fn may_survive(&self, write: u64) -> bool {
        self.versions.iter().any(|v| v.write == write && !v.superseded)
    }

    /// The writes that a power cut now may leave.
    pub fn survivors(&self) -> impl Iterator<Item = u64> + '_ {
        self.versions.iter().filter(|v| !v.superseded).map(|v| v.write)
    }

    /// The writes that a power cut may leave, for reports.
    pub fn describe_survivors(&self) -> String {
        let survivors = self.versions.iter().filter(|v| !v.superseded);
        listed(survivors.map(|v| v.words("overwritten")))
    }

    /// The writes that a read from `inv` to `res` may see, for reports.
    pub fn describe_shown(&self, inv: Clock, res: Clock, order: Order) -> String {
        let shown = self.versions.iter().filter(|v| self.shows(v, inv, res, order));
        listed(shown.map(|v| v.words("overwritten since this read was submitted")))
    }

    /// Why a read from `inv` to `res` may not see `write`, for reports, and the write that hides it.
    pub fn why_hidden(&self, write: u64, inv: Clock, res: Clock, order: Order) -> (String, Option<u64>) {
        let Some(v) = self.versions.iter().find(|v| v.write == write) else {
            return ("replaced long ago".into(), None);
        };
        if v.inv >= res || (order != Order::Answer && v.inv > inv) {
            return ("submitted after this read".into(), None);
        }
        let newer = self.versions.iter().find(|w| !w.failed && w.inv > v.inv && w.inv < inv);
        match newer {
            _ if v.stale_at < inv => ("overwritten before this read".into(), newer.map(|w| w.write)),
            Some(w) => {
                let text = format!("overwritten by write {}, which was submitted before this read", w.write);
                (text, Some(w.write))
            }
            None => ("replaced".into(), None),
        }
    }

    /// The writes whose versions are still of interest.
    pub fn writes(&self) -> impl Iterator<Item = u64> + '_ {
        self.versions.iter().map(|v| v.write)
    }

    /// The process that serves the disk died. A failed write that was not overwritten may be in the file, whatever that
    /// process showed since.
    pub fn server_died(&mut self, order: Order) {
        let versions = self.versions.clone();
        let written_over =
            |v: &Version| versions.iter().any(|w| !w.failed && w.res != NEVER && v.before(w, order));
        self.versions.iter_mut().filter(|v| v.failed && !written_over(v)).for_each(|v| v.stale_at = NEVER);
    }

    /// The power was cut at `now`: keeps the versions that may survive, all equally possible until one is read.
    pub fn power_cut(&mut self, now: Clock) {
        self.versions.retain(|v| !v.superseded);
        let several = self.versions.len() > 1;
        for v in &mut self.versions {
            *v = Version {
                write: v.write,
                zero: v.zero,
                inv: now,
                res: now,
                failed: false,
                stale_at: NEVER,
                seen_at: NEVER,
                superseded: false,
                unresolved: several,
                settled: v.settled && !several,
                missed: NEVER,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY: Order = Order::Answer;

    #[test]
    fn a_write_that_a_later_read_did_not_see_must_fail() {
        for (ok, broken) in [(true, true), (false, false)] {
            let mut b = Block::default();
            b.begin(1, 1, false);
            assert!(!b.clone().read(0, 2, 3, Order::Submission), "nothing fails here");
            assert!(b.read(0, 2, 3, Order::SubmissionOrFailure));
            assert_eq!(b.end(1, 4, ok, NEVER, Order::Submission), broken.then_some(2), "{ok}");
        }
        let mut b = Block::default();
        b.begin(1, 2, false);
        assert!(b.read(0, 1, 3, Order::SubmissionOrFailure), "submitted before it");
        assert_eq!(b.end(1, 4, true, NEVER, Order::Submission), None);
        assert!(!b.read(0, 5, 6, Order::SubmissionOrFailure));
    }

    #[test]
    fn a_discard_that_runs_may_have_done_nothing() {
        let mut b = Block::default();
        b.begin(1, 1, false);
        b.end(1, 2, true, NEVER, Order::Submission);
        b.begin(2, 3, true);
        assert!(!b.clone().read(1, 4, 5, Order::Submission), "zeros replace what was there");
        b.may_do_nothing(2);
        assert!(b.clone().read_zeros(false, 4, 5, Order::Submission));
        assert!(b.read(1, 4, 5, Order::Submission));
    }

    #[test]
    fn reads_see_old_or_new_while_a_write_runs_and_never_go_back() {
        let mut b = Block::default();
        b.begin(1, 10, false);
        assert!(b.read(0, 11, 12, ANY));
        assert!(b.read(1, 13, 14, ANY), "the write runs and may have taken effect");
        assert!(!b.read(0, 15, 16, ANY), "it has taken effect");
        b.end(1, 20, true, NEVER, ANY);
        assert!(!b.read(0, 21, 22, ANY));
        assert!(b.read(1, 21, 22, ANY));
    }

    #[test]
    fn concurrent_writes_settle_in_one_order() {
        let mut b = Block::default();
        b.begin(1, 1, false);
        b.begin(2, 2, false);
        b.end(1, 3, true, NEVER, ANY);
        b.end(2, 4, true, NEVER, ANY);
        assert!(b.read(1, 5, 6, ANY));
        assert!(b.read(2, 5, 6, ANY), "concurrent reads may differ");
        assert!(b.read(2, 7, 8, ANY));
        assert!(!b.read(1, 9, 10, ANY), "only one order is possible");
    }

    #[test]
    fn a_failed_write_settles_as_old_or_new() {
        let mut b = Block::default();
        b.begin(1, 1, false);
        b.end(1, 2, false, NEVER, ANY);
        let mut other = b.clone();
        assert!(b.read(0, 3, 4, ANY));
        assert!(!b.read(1, 5, 6, ANY), "a write has no effect after its answer");
        assert!(other.read(1, 3, 4, ANY));
        assert!(!other.read(0, 5, 6, ANY));
        assert!(b.may_survive(1), "but the medium may hold it");
        b.server_died(ANY);
        let mut overwritten = b.clone();
        assert!(b.read(1, 7, 8, ANY), "and so may the file that the next process reads");
        assert!(!b.read(0, 9, 10, ANY));
        overwritten.begin(2, 7, false);
        overwritten.end(2, 8, true, NEVER, ANY);
        overwritten.server_died(ANY);
        assert!(!overwritten.read(1, 9, 10, ANY));
    }

    #[test]
    fn flushed_writes_survive_and_running_ones_may() {
        let mut b = Block::default();
        b.begin(1, 1, false);
        b.end(1, 2, true, NEVER, ANY);
        assert!(b.may_survive(0) && b.may_survive(1));
        b.begin(2, 3, false);
        assert!(b.flushed(4, NEVER, ANY));
        assert!(!b.may_survive(0));
        assert_eq!(b.survivors().collect::<Vec<_>>(), [1, 2]);
        b.power_cut(9);
        let mut seen = b.clone();
        assert!(!seen.is_settled());
        assert!(seen.read(2, 10, 11, ANY) && !seen.read(1, 12, 13, ANY));
        assert!(seen.is_settled());
        seen.power_cut(20);
        assert_eq!(seen.survivors().collect::<Vec<_>>(), [2]);
        assert!(seen.is_settled(), "after another crash, too");
        seen.begin(3, 30, false);
        assert!(!seen.is_settled(), "until it is written");
        assert_eq!(b.survivors().count(), 2);
    }

    #[test]
    fn a_durable_write_does_not_make_others_durable() {
        let mut b = Block::default();
        for write in [1, 2] {
            b.begin(write, write * 10, false);
            b.end(write, write * 10 + 1, true, NEVER, ANY);
        }
        b.hardened(1, NEVER, ANY);
        assert!(!b.may_survive(0) && b.may_survive(1) && b.may_survive(2));
        b.hardened(2, NEVER, ANY);
        assert_eq!(b.survivors().collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn an_older_read_may_see_what_a_flush_replaced() {
        let mut b = Block::default();
        b.begin(1, 5, false);
        // A read that began at 3 still runs.
        b.end(1, 6, true, 3, ANY);
        b.flushed(7, 3, ANY);
        assert!(b.clone().read(0, 3, 9, ANY), "it began before the write");
        assert!(!b.read(0, 8, 9, ANY));
    }

    #[test]
    fn zeros_may_be_of_any_visible_writer() {
        let mut b = Block::default();
        assert!(b.clone().read_zeros(true, 1, 2, ANY) && !b.clone().read_zeros(false, 1, 2, ANY));
        b.begin(1, 3, false);
        b.end(1, 4, true, NEVER, ANY);
        assert!(!b.clone().read_zeros(true, 5, 6, ANY), "the initial zeros are gone");
        b.begin(2, 7, true);
        b.end(2, 8, true, NEVER, ANY);
        assert!(b.clone().read_zeros(false, 9, 10, ANY) && !b.read(1, 9, 10, ANY));
        b.flushed(11, NEVER, ANY);
        b.begin(3, 12, false);
        b.end(3, 13, true, NEVER, ANY);
        assert!(b.zeros_may_survive(false) && b.may_survive(3) && !b.may_survive(1));
        b.flushed(14, NEVER, ANY);
        assert!(!b.zeros_may_survive(true));
        // A discard is zeros that may or may not have taken effect: its answer promises nothing.
        b.begin(4, 15, true);
        b.end(4, 16, false, NEVER, ANY);
        let mut kept = b.clone();
        assert!(kept.read(3, 17, 18, ANY) && !kept.read_zeros(false, 19, 20, ANY));
        assert!(b.read_zeros(false, 17, 18, ANY) && !b.read(3, 19, 20, ANY));
    }

    #[test]
    fn a_crash_leaves_one_of_several_zeros() {
        let mut b = Block::default();
        for (write, zero) in [(1, true), (2, false)] {
            b.begin(write, 10 * write, zero);
            b.end(write, 10 * write + 1, true, NEVER, ANY);
        }
        b.power_cut(30);
        assert!(b.clone().read(2, 31, 32, ANY));
        assert!(b.read_zeros(true, 31, 32, ANY), "the initial ones, or those of write 1");
        assert!(!b.read(2, 33, 34, ANY) && b.read_zeros(true, 33, 34, ANY));
    }

    #[test]
    fn submission_order_permits_no_reordering() {
        let ordered = Order::Submission;
        let mut b = Block::default();
        b.begin(1, 1, false);
        b.begin(2, 2, false);
        b.end(2, 4, true, NEVER, ordered);
        b.end(1, 5, true, NEVER, ordered);
        assert!(!b.clone().read(1, 6, 7, ordered), "the second write was submitted later");
        assert!(b.clone().read(2, 6, 7, ordered));
        b.begin(3, 8, false);
        assert!(!b.clone().read(3, 7, 9, ordered), "a read does not see what was submitted after it");
        assert!(!b.clone().read(2, 9, 10, ordered), "and waits for what was submitted before it");
        b.end(3, 11, false, NEVER, ordered);
        assert!(b.clone().read(2, 9, 12, ordered) && b.read(3, 9, 12, ordered), "which may have failed");
    }
}
