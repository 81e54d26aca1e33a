//! Waiting on one thread: an event, a semaphore and a oneshot. What chooses among futures, and a waker of one task, are
//! in `tap-host`, which the models reach, too.
//!
//! ```text
//!   Event       set ──► all waiters, until it is cleared
//!   Semaphore   release ──► the first waiter, which owns the permit from then on
//!   oneshot     send ──► the one receiver
//!   joined      a task's end ──► the one receiver
//! ```
//!
//! # Contract
//!
//! * First come, first served: a waiter is never overtaken.
//! * A wake-up is exact: it goes once, to a waiter that can proceed; nothing polls and no timer is involved.
//! * Every future may be dropped at any point. A permit that was handed to it and not taken goes to the next waiter.
//! * `!Send`: one thread, no locks. No waker is called while internal state is borrowed.

mod event;
mod oneshot;
mod semaphore;

pub use event::Event;
pub use oneshot::{Receiver, Sender, joined, oneshot};
pub use semaphore::{Permit, Semaphore};

use std::collections::VecDeque;
use std::task::Waker;

/// A queue of waiters in order of arrival.
#[derive(Default)]
pub(crate) struct Line {
    next: u64,
    waiting: VecDeque<(u64, Waker)>,
}

impl Line {
    /// Puts a waiter at the end, or refreshes the waker of one that has a place.
    pub(crate) fn wait(&mut self, place: &mut Option<u64>, waker: &Waker) {
        if let Some(entry) = place.and_then(|id| self.index(id)).map(|at| &mut self.waiting[at]) {
            entry.1.clone_from(waker);
            return;
        }
        *place = Some(self.next);
        self.waiting.push_back((self.next, waker.clone()));
        self.next += 1;
    }

    /// Gives up a place; returns whether it was in the queue.
    pub(crate) fn leave(&mut self, place: &mut Option<u64>) -> bool {
        match place.take().and_then(|id| self.index(id)) {
            Some(at) => self.waiting.remove(at).is_some(),
            None => false,
        }
    }

    /// Takes the first waiter out of the queue.
    pub(crate) fn pop(&mut self) -> Option<(u64, Waker)> {
        self.waiting.pop_front()
    }

    /// The waker of the first waiter, which keeps its place.
    pub(crate) fn first(&self) -> Option<Waker> {
        self.waiting.front().map(|(_, waker)| waker.clone())
    }

    /// Whether `place` is in the queue.
    pub(crate) fn has(&self, place: Option<u64>) -> bool {
        place.is_some_and(|id| self.index(id).is_some())
    }

    /// Whether `place` is the first in the queue.
    pub(crate) fn is_first(&self, place: Option<u64>) -> bool {
        place.is_some() && self.waiting.front().map(|w| w.0) == place
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Number of waiters.
    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Empties the queue.
    pub(crate) fn take_all(&mut self) -> VecDeque<(u64, Waker)> {
        std::mem::take(&mut self.waiting)
    }

    fn index(&self, id: u64) -> Option<usize> {
        self.waiting.binary_search_by_key(&id, |w| w.0).ok()
    }
}
