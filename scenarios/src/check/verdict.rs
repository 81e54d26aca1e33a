//! The verdict of a run: the first broken invariant ends it.

use super::Invariant;
use super::oracle::{Oracle, is_broken};
use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use tap_host::{OneWaiter, SectorRange};

/// The requests that a failure is about, for reports.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct About {
    /// The guest that submitted them; empty if that is unknown.
    pub guest: String,
    /// The sector.
    pub sector: Option<u64>,
    /// Its writes, by number.
    pub writes: Vec<u64>,
    /// Its reads, by the step of their submission.
    pub reads: Vec<u64>,
    /// Requests of any guest on these sectors that have no answer yet.
    pub places: Vec<SectorRange>,
}

/// A broken invariant.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// Which invariant.
    pub invariant: Invariant,
    /// What was observed, in words.
    pub detail: String,
    /// Virtual time in nanoseconds.
    pub at_ns: u64,
    /// The requests that it is about.
    pub about: About,
}

impl Failure {
    /// `invariant` is broken; nothing else is known.
    pub fn of(invariant: Invariant) -> Self {
        Self { invariant, detail: String::new(), at_ns: 0, about: About::default() }
    }

    /// The first line of what was observed.
    pub fn headline(&self) -> &str {
        self.detail.lines().next().unwrap_or_default().trim_end()
    }

    /// The kind of failure, which shrinking must keep so that it does not drift to a different one. Leaves out numbers
    /// (of sectors, of writes) and what may change with every decision: the permitted versions and the waiting tasks.
    pub fn kind(&self) -> String {
        let line = self.detail.lines().next().unwrap_or_default();
        let told = match self.invariant {
            // The place of a panic identifies it.
            Invariant::A1 => return format!("{} {line}", self.invariant),
            Invariant::L1 => line.split(':').next().unwrap_or_default(),
            _ => line.split(", but may hold").next().unwrap_or_default(),
        };
        // Which version is wrong, and why, makes no difference to the kind: it is an old one.
        let told = told.split(" (").next().unwrap_or_default();
        let mut kind = format!("{} ", self.invariant);
        let mut in_number = false;
        for c in told.chars() {
            if !c.is_ascii_digit() {
                kind.push(c);
            } else if !in_number {
                kind.push('#');
            }
            in_number = c.is_ascii_digit();
        }
        kind
    }
}

#[derive(Default)]
struct State {
    failure: Option<Failure>,
    guard: OneWaiter,
}

/// Where checkers report; clones share it.
#[derive(Clone, Default)]
pub struct Verdict(Rc<RefCell<State>>);

impl Verdict {
    /// Reports a broken invariant; only the first counts.
    pub fn fail(&self, failure: Failure) {
        let mut state = self.0.borrow_mut();
        if state.failure.is_none() && !is_broken(Oracle::Deaf(failure.invariant)) {
            state.failure = Some(failure);
            state.guard.wake();
        }
    }

    /// Whether an invariant is broken.
    pub fn is_broken(&self) -> bool {
        self.0.borrow().failure.is_some()
    }

    /// The first broken invariant.
    pub fn failure(&self) -> Option<Failure> {
        self.0.borrow().failure.clone()
    }

    /// Runs `body` until it ends or something is reported.
    pub async fn guard(&self, body: impl Future<Output = ()>) {
        let mut body = pin!(body);
        poll_fn(|cx| {
            if self.is_broken() {
                return Poll::Ready(());
            }
            self.0.borrow().guard.wait(cx.waker());
            let poll = body.as_mut().poll(cx);
            if self.is_broken() { Poll::Ready(()) } else { poll }
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(invariant: Invariant, detail: &str) -> String {
        Failure { detail: detail.into(), ..Failure::of(invariant) }.kind()
    }

    #[test]
    fn kinds_keep_what_happened_but_not_where() {
        let zeros = kind(Invariant::G7, "read 0+8: sector 5 holds zeros, but may hold write 3 (answered)");
        assert_eq!(zeros, "G7 read #+#: sector # holds zeros");
        assert_eq!(zeros, kind(Invariant::G7, "read 96+88: sector 103 holds zeros, but may hold write 0"));
        let old =
            kind(Invariant::G7, "read 0+8: sector 5 holds write 2 (overwritten before this read), but may");
        assert_eq!(old, "G7 read #+#: sector # holds write #");
        assert_ne!(kind(Invariant::G1, "a"), kind(Invariant::G7, "a"));
        assert_ne!(kind(Invariant::A1, "x at a.rs:1"), kind(Invariant::A1, "x at a.rs:2"));
        let stuck = kind(Invariant::L1, "the run is stuck: task 1 of dom0\ntask 2");
        assert_eq!(stuck, "L1 the run is stuck");
    }
}
