//! Tells a task to stop waiting.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Poll, Waker};

/// Set once, for one listening task, with a reason.
#[derive(Default)]
pub(crate) struct StopSignal {
    why: Cell<Option<&'static str>>,
    waker: Cell<Option<Waker>>,
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
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Registers `waker` as that of the listening task.
    pub(crate) fn listen(&self, waker: &Waker) {
        let own = self.waker.take().filter(|own| own.will_wake(waker));
        self.waker.set(Some(own.unwrap_or_else(|| waker.clone())));
    }

    /// The output of `future`, or `None` if the signal is set first; `future` is then dropped.
    pub(crate) async fn unless_stopped<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        let mut future = pin!(future);
        poll_fn(|cx| {
            if self.why.get().is_some() {
                return Poll::Ready(None);
            }
            let done = future.as_mut().poll(cx).map(Some);
            if done.is_pending() {
                self.listen(cx.waker());
            }
            done
        })
        .await
    }
}

/// The output of `future`, or `None` if `limit` completes before; `future` is then dropped.
pub(crate) async fn first<T>(
    mut limit: Pin<&mut impl Future<Output = ()>>,
    future: impl Future<Output = T>,
) -> Option<T> {
    let mut future = pin!(future);
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(value) => Poll::Ready(Some(value)),
        Poll::Pending => limit.as_mut().poll(cx).map(|()| None),
    })
    .await
}
