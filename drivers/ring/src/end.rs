//! How a ring ends, and who says so.

use std::cell::Cell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use tap_host::OneWaiter;

/// Why a ring is no longer served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RingEnd {
    /// [`RingCloser::close`] was called; every request that was taken is answered.
    Closed,
    /// [`RingCloser::leave`] was called; every request that was taken is answered, and the record tells a successor.
    Left,
    /// [`RingCloser::abandon`] was called; nothing has been answered since, and the record tells a successor.
    Abandoned,
    /// The guest's indices are impossible; nothing has been answered since.
    Refused(&'static str),
    /// The event channel is no longer usable; the record tells a successor.
    ChannelGone,
}

/// What wakes the ring's own task, and the order to end.
#[derive(Default)]
pub(crate) struct Signal {
    /// How the ring should end.
    end: Cell<Option<RingEnd>>,
    pub(crate) waiter: OneWaiter,
}

impl Signal {
    /// How the ring should end, if it was told to.
    pub(crate) fn end(&self) -> Option<RingEnd> {
        self.end.get()
    }

    /// Whether the ring was told to end.
    pub(crate) fn is_ending(&self) -> bool {
        self.end.get().is_some()
    }
}

/// Ends a ring from outside. One by itself ([`RingCloser::default`]) is for a ring that somebody else serves.
#[derive(Clone, Default)]
pub struct RingCloser(pub(crate) Rc<Signal>);

impl RingCloser {
    /// Makes the ring take no further requests. [`BlkifRing::run`](crate::BlkifRing::run) ends once those in flight are
    /// answered.
    pub fn close(&self) {
        // One that was abandoned stays so: whoever has it next carries out what is in flight.
        if self.0.end() != Some(RingEnd::Abandoned) {
            self.0.end.set(Some(RingEnd::Closed));
        }
        self.0.waiter.wake();
    }

    /// As [`RingCloser::close`], but the ring stays in use: its record is kept, and another process continues where
    /// this one ends. Does nothing to a ring that is being closed.
    pub fn leave(&self) {
        if !self.0.is_ending() {
            self.0.end.set(Some(RingEnd::Left));
            self.0.waiter.wake();
        }
    }

    /// As [`RingCloser::leave`], but nothing is answered any more, as if the process had died: another one carries out
    /// again what is in flight. For a disk whose requests may never end.
    pub fn abandon(&self) {
        self.0.end.set(Some(RingEnd::Abandoned));
        self.0.waiter.wake();
    }

    /// Completes with what the ring was told, once it was. For one waiter.
    pub async fn told(&self) -> RingEnd {
        poll_fn(|cx| match self.0.end() {
            Some(end) => Poll::Ready(end),
            None => {
                self.0.waiter.wait(cx.waker());
                Poll::Pending
            }
        })
        .await
    }
}
