//! Waiting for one of several things, on one thread.
//!
//! ```text
//!   OneWaiter   wake ──► the one task that waits
//!   select      the first of two; both ready: the first that is named
//!   unless      a future, unless a limit comes first; both ready: the future
//!   poll_once   a look that does not wait
//! ```
//!
//! # Contract
//!
//! * The order is biased and fixed: futures are polled as they are named, and none is drawn among several that are
//!   ready. A world that runs twice takes the same turns twice.
//! * Both futures are dropped when the first completes. To keep one, pass a pinned reference.
//! * No waker is called while internal state is borrowed.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::{Poll, Waker};

/// The waker of the one task that waits here. A second task that waits takes the place of the first, so that with more
/// than one an event is needed.
#[derive(Default)]
pub struct OneWaiter(Cell<Option<Waker>>);

impl OneWaiter {
    /// Has the next [`OneWaiter::wake`] call `waker`. Whoever waits looks at the condition before or after, in the same
    /// poll.
    pub fn wait(&self, waker: &Waker) {
        let own = self.0.take().filter(|own| own.will_wake(waker));
        self.0.set(Some(own.unwrap_or_else(|| waker.clone())));
    }

    /// Wakes the task that waits, once. Without one nothing happens, and nothing is kept for later.
    pub fn wake(&self) {
        if let Some(waker) = self.0.take() {
            waker.wake();
        }
    }
}

/// The output of one of two futures.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Either<A, B> {
    /// That of the first.
    First(A),
    /// That of the second.
    Second(B),
}

/// The output of the future that completes first; of `first` when both are ready. `second` is polled only while `first`
/// is pending.
pub async fn select<A: Future, B: Future>(first: A, second: B) -> Either<A::Output, B::Output> {
    let (mut first, mut second) = (pin!(first), pin!(second));
    poll_fn(|cx| match first.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Either::First(output)),
        Poll::Pending => second.as_mut().poll(cx).map(Either::Second),
    })
    .await
}

/// The output of `future`, or `None` if `limit` completes before. `limit` is polled only while `future` is pending.
pub async fn unless<T>(limit: impl Future, future: impl Future<Output = T>) -> Option<T> {
    match select(future, limit).await {
        Either::First(output) => Some(output),
        Either::Second(_) => None,
    }
}

/// The output of `future` if one poll is enough; it is then dropped, unless it is a reference.
pub async fn poll_once<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    poll_fn(|cx| {
        Poll::Ready(match future.as_mut().poll(cx) {
            Poll::Ready(output) => Some(output),
            Poll::Pending => None,
        })
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::{pending, ready};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Wake};

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn now<F: Future>(future: F) -> Poll<F::Output> {
        pin!(future).poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn a_wake_up_goes_to_the_task_that_waits_and_only_once() {
        let (old, new) = (Arc::new(Woken::default()), Arc::new(Woken::default()));
        let waiter = OneWaiter::default();
        waiter.wake();
        waiter.wait(&Waker::from(Arc::clone(&old)));
        waiter.wait(&Waker::from(Arc::clone(&new)));
        waiter.wait(&Waker::from(Arc::clone(&new)));
        assert_eq!(new.0.load(Ordering::Relaxed), 0, "a wake-up is not kept for who comes later");
        waiter.wake();
        waiter.wake();
        assert_eq!((old.0.load(Ordering::Relaxed), new.0.load(Ordering::Relaxed)), (0, 1));
        assert_eq!(Arc::strong_count(&new), 1, "a waker that was called is not kept");
    }

    #[test]
    fn the_first_that_is_named_wins_and_spares_the_second() {
        let polled = Cell::new(false);
        let second = async { polled.set(true) };
        assert_eq!(now(select(ready(1), second)), Poll::Ready(Either::First(1)));
        assert!(!polled.get());
        assert_eq!(now(select(pending::<()>(), ready(2))), Poll::Ready(Either::Second(2)));
        assert!(now(select(pending::<()>(), pending::<()>())).is_pending());
    }

    #[test]
    fn a_limit_that_comes_with_the_output_is_too_late() {
        assert_eq!(now(unless(ready(()), ready(1))), Poll::Ready(Some(1)));
        assert_eq!(now(unless(ready(()), pending::<u8>())), Poll::Ready(None));
        assert!(now(unless(pending::<()>(), pending::<u8>())).is_pending());
    }

    #[test]
    fn a_look_ends_at_once() {
        assert_eq!(now(poll_once(ready(1))), Poll::Ready(Some(1)));
        assert_eq!(now(poll_once(pending::<u8>())), Poll::Ready(None));
    }
}
