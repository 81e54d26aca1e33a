//! The places of requests on the ring: who waits for one gets it in turn, so that requests reach the ring in the order
//! of their submission.

use super::Blkfront;
use std::future::poll_fn;
use std::task::{Poll, Waker};

impl Blkfront {
    /// A slot, in the order in which they are asked for; who asks does not give up.
    pub(super) async fn slot(&self) -> usize {
        let own = &self.0;
        let ticket = own.tickets.replace(own.tickets.get() + 1);
        poll_fn(|cx| {
            if own.open.get()
                && own.turn.get() == ticket
                && let Some(slot) = own.free.borrow_mut().pop()
            {
                own.turn.set(ticket + 1);
                self.wake_next();
                return Poll::Ready(slot);
            }
            own.waiting.borrow_mut().insert(ticket, cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// The next one that waits for a slot looks for it.
    pub(super) fn wake_next(&self) {
        let next = self.0.waiting.borrow_mut().remove(&self.0.turn.get());
        next.into_iter().for_each(Waker::wake);
    }
}
