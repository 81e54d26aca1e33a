//! The verdict of a run: the first broken invariant ends it.

use super::Invariant;
use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// A broken invariant.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// Which.
    pub invariant: Invariant,
    /// What was seen, for people.
    pub detail: String,
    /// Virtual time in nanoseconds.
    pub at_ns: u64,
}

#[derive(Default)]
struct State {
    failure: Option<Failure>,
    waker: Option<Waker>,
}

/// Where checkers report; clones share it.
#[derive(Clone, Default)]
pub struct Verdict(Rc<RefCell<State>>);

impl Verdict {
    /// Reports a broken invariant; only the first counts.
    pub fn fail(&self, invariant: Invariant, at_ns: u64, detail: impl Into<String>) {
        let mut state = self.0.borrow_mut();
        if state.failure.is_none() {
            state.failure = Some(Failure { invariant, detail: detail.into(), at_ns });
            if let Some(waker) = state.waker.take() {
                waker.wake();
            }
        }
    }

    /// Whether something is broken.
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
            self.0.borrow_mut().waker = Some(cx.waker().clone());
            let poll = body.as_mut().poll(cx);
            if self.is_broken() { Poll::Ready(()) } else { poll }
        })
        .await;
    }
}
