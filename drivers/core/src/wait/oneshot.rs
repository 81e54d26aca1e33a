//! A channel for one value.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

struct State<T> {
    value: Option<T>,
    sender_gone: bool,
    receiver_gone: bool,
    waker: Option<Waker>,
}

/// The sending side.
pub struct Sender<T>(Rc<RefCell<State<T>>>);

/// The receiving side: a future of the value, or of `None` when the sender was dropped without sending.
pub struct Receiver<T>(Rc<RefCell<State<T>>>);

/// A pair that carries one value.
pub fn oneshot<T>() -> (Sender<T>, Receiver<T>) {
    let state = State { value: None, sender_gone: false, receiver_gone: false, waker: None };
    let state = Rc::new(RefCell::new(state));
    (Sender(Rc::clone(&state)), Receiver(state))
}

/// `task` without its output, to be spawned, and the output for whoever waits for its end: `None` if it was dropped
/// before.
pub fn joined<T>(task: impl Future<Output = T>) -> (impl Future<Output = ()>, Receiver<T>) {
    let (done, ended) = oneshot();
    let task = async move {
        // The task has its effect even if nobody waits for it.
        drop(done.send(task.await));
    };
    (task, ended)
}

impl<T> Sender<T> {
    /// Hands `value` over.
    ///
    /// # Errors
    /// The value itself if the receiver was dropped.
    pub fn send(self, value: T) -> Result<(), T> {
        let mut state = self.0.borrow_mut();
        if state.receiver_gone {
            return Err(value);
        }
        state.value = Some(value);
        Ok(())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let mut state = self.0.borrow_mut();
        state.sender_gone = true;
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Future for Receiver<T> {
    type Output = Option<T>;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let mut state = self.0.borrow_mut();
        if let Some(value) = state.value.take() {
            return Poll::Ready(Some(value));
        }
        if state.sender_gone {
            return Poll::Ready(None);
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let mut state = self.0.borrow_mut();
        state.receiver_gone = true;
        let left = (state.value.take(), state.waker.take());
        drop(state);
        drop(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Pool;

    #[test]
    fn a_value_arrives_and_a_dropped_sender_is_reported() {
        let pool = Pool::new();
        let (sender, receiver) = oneshot();
        let got = pool.start(receiver);
        assert!(got.get().is_none());
        sender.send(7).unwrap();
        pool.run();
        assert_eq!(got.take(), Some(Some(7)));

        let (sender, receiver) = oneshot::<u8>();
        let got = pool.start(receiver);
        drop(sender);
        pool.run();
        assert_eq!(got.take(), Some(None));
    }

    /// A waker may drop the woken task, and the receiver with it, at once.
    #[test]
    fn a_waker_may_drop_the_receiver() {
        thread_local! {
            static RECEIVER: RefCell<Option<Receiver<u8>>> = const { RefCell::new(None) };
        }
        struct Drops;
        impl std::task::Wake for Drops {
            fn wake(self: std::sync::Arc<Self>) {
                RECEIVER.take();
            }
        }
        let (sender, mut receiver) = oneshot();
        let waker = Waker::from(std::sync::Arc::new(Drops));
        assert!(Pin::new(&mut receiver).poll(&mut Context::from_waker(&waker)).is_pending());
        RECEIVER.set(Some(receiver));
        drop(sender);
        assert!(RECEIVER.take().is_none());
    }

    #[test]
    fn a_task_is_joined_with_its_output_or_without_it_if_it_was_dropped() {
        let pool = Pool::new();
        let (go, ready) = oneshot::<u8>();
        let (task, ended) = joined(ready);
        pool.spawn(task);
        let got = pool.start(ended);
        assert!(got.get().is_none());
        go.send(7).unwrap();
        pool.run();
        assert_eq!(got.take(), Some(Some(Some(7))));

        let (task, ended) = joined(std::future::pending::<u8>());
        drop(task);
        let got = pool.start(ended);
        assert_eq!(got.take(), Some(None));
    }

    #[test]
    fn a_value_without_a_receiver_is_returned() {
        let (sender, receiver) = oneshot();
        drop(receiver);
        assert_eq!(sender.send(7), Err(7));
    }
}
