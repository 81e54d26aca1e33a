//! The sending side of a stream: messages put in during one turn of the executor go out in one send.
//!
//! A task with a message puts it in and wakes the writer. The executor runs tasks in the order of their wake-ups, so
//! the writer runs after every task that was ready at the same time, and takes what all of them have put in.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::Poll;
use tap_host::{Errno, OneWaiter, SendList, Stream};

#[derive(Default)]
pub(crate) struct Outbox {
    list: RefCell<SendList>,
    /// Messages in `list`.
    messages: Cell<u32>,
    closed: Cell<bool>,
    writer: OneWaiter,
}

impl Outbox {
    /// Puts one message in; drops it if the outbox is closed.
    pub(crate) fn put(&self, message: impl FnOnce(&mut SendList)) {
        if self.closed.get() {
            return;
        }
        message(&mut self.list.borrow_mut());
        self.messages.set(self.messages.get() + 1);
        self.writer.wake();
    }

    /// Lets the writer end once everything is sent.
    pub(crate) fn close(&self) {
        self.closed.set(true);
        self.writer.wake();
    }

    /// Drops everything unsent, including its buffers, and lets the writer end.
    pub(crate) fn discard(&self) {
        drop(self.list.take());
        self.messages.set(0);
        self.close();
    }

    /// Swaps everything to be sent with `spare`, an empty list, and returns the number of messages; `None` when the
    /// outbox is closed and empty.
    pub(crate) async fn next(&self, spare: &mut SendList) -> Option<u32> {
        poll_fn(|cx| {
            let messages = self.messages.take();
            if messages > 0 {
                std::mem::swap(spare, &mut self.list.borrow_mut());
                return Poll::Ready(Some(messages));
            }
            if self.closed.get() {
                return Poll::Ready(None);
            }
            self.writer.wait(cx.waker());
            Poll::Pending
        })
        .await
    }
}

/// Sends all of `list`; returns it, empty after success.
pub(crate) async fn send_all<S: Stream>(stream: &S, mut list: SendList) -> (Result<(), Errno>, SendList) {
    while !list.is_empty() {
        let (result, rest) = stream.send(list).await;
        list = rest;
        if result.is_err() {
            return (result, list);
        }
    }
    (Ok(()), list)
}
