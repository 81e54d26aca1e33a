//! Tells a task to stop waiting.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Poll, Waker};
use tap_host::OneWaiter;

/// Set once, for one listening task, with a reason.
#[derive(Default)]
pub(crate) struct StopSignal {
    why: Cell<Option<&'static str>>,
    listener: OneWaiter,
}

impl StopSignal {
    /// Sets it; only the first reason counts.
    pub(crate) fn set(&self, why: &'static str) {
        if self.why.get().is_none() {
            self.why.set(Some(why));
        }
        self.wake();
    }

    /// Why it was set.
    pub(crate) fn why(&self) -> Option<&'static str> {
        self.why.get()
    }

    /// Makes the listening task check again, without setting the signal.
    pub(crate) fn wake(&self) {
        self.listener.wake();
    }

    /// Registers `waker` as that of the listening task.
    pub(crate) fn listen(&self, waker: &Waker) {
        self.listener.wait(waker);
    }

    /// The output of `future`, or `None` if the signal is set first; `future` is then not polled again. It is pinned by
    /// the caller, whose own future would otherwise have room for it twice and move it for each request.
    pub(crate) fn unless_stopped<F: Future>(
        &self,
        mut future: Pin<&mut F>,
    ) -> impl Future<Output = Option<F::Output>> {
        poll_fn(move |cx| {
            if self.why.get().is_some() {
                return Poll::Ready(None);
            }
            let done = future.as_mut().poll(cx).map(Some);
            if done.is_pending() {
                self.listen(cx.waker());
            }
            done
        })
    }
}
