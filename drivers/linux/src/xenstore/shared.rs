//! The state shared by the users of a connection and its driver.
//!
//! ```text
//!   users ──► outbox ──► driver ──► xenstored
//!      ▲ calls, watches ◄── driver ◄──┘
//! ```
//!
//! No task is woken while this is borrowed.

use super::StoreLost;
use super::calls::{Answer, Calls, Then, Wanted};
use super::link::Limits;
use super::watches::Watches;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::task::{Context, Poll, Waker};
use tap_abi::xenstore::{MessageHeader, MessageKind, NO_TRANSACTION, split_string};
use tap_host::Errno;

/// A message on its way out.
pub(super) struct Outgoing {
    /// The number of its request.
    pub(super) request: u32,
    /// Header and payload.
    pub(super) bytes: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// In use.
    Open,
    /// No user is left.
    Closing,
    /// xenstored can no longer be reached.
    Lost,
}

/// One connection.
pub(super) struct Shared {
    state: RefCell<State>,
    limits: Limits,
}

struct State {
    stage: Stage,
    calls: Calls,
    watches: Watches,
    outbox: VecDeque<Outgoing>,
    /// The request that the next one has to wait for.
    unanswered: Option<u32>,
    sender: Option<Waker>,
}

impl State {
    /// Queues a message. Returns its request's number, and the waker of the driver that must send it.
    fn send(
        &mut self,
        kind: MessageKind,
        transaction: u32,
        parts: &[&[u8]],
        wanted: Wanted,
    ) -> (u32, Option<Waker>) {
        let request = self.calls.begin(kind, wanted);
        let payload_bytes = parts.iter().map(|part| part.len()).sum();
        let header = MessageHeader::new(kind, request, transaction, payload_bytes).to_bytes();
        let mut bytes = Vec::with_capacity(header.len() + payload_bytes);
        bytes.extend_from_slice(&header);
        parts.iter().for_each(|part| bytes.extend_from_slice(part));
        self.outbox.push_back(Outgoing { request, bytes });
        (request, self.sender.take())
    }

    /// Ends a transaction that no caller wants.
    fn abort(&mut self, transaction: u32) -> Option<Waker> {
        self.send(MessageKind::TransactionEnd, transaction, &[b"F\0"], Wanted::No).1
    }

    /// `request` is finished, and `then` follows. Returns the wakers of tasks that can continue.
    fn done(&mut self, request: u32, then: Then) -> Vec<Waker> {
        let next =
            self.unanswered.take_if(|unanswered| *unanswered == request).and_then(|_| self.sender.take());
        let other = match then {
            Then::Done => None,
            Then::Wake(waker) => Some(waker),
            Then::EndTransaction(transaction) => self.abort(transaction),
        };
        next.into_iter().chain(other).collect()
    }
}

impl Shared {
    /// A connection over a link with these limits.
    pub(super) fn new(limits: Limits) -> Self {
        let (calls, watches, outbox, unanswered, sender) = Default::default();
        let state = State { stage: Stage::Open, calls, watches, outbox, unanswered, sender };
        Self { state: RefCell::new(state), limits }
    }

    /// Changes the state, and then wakes the wakers that `change` returns.
    fn change<R, W: IntoIterator<Item = Waker>>(&self, change: impl FnOnce(&mut State) -> (R, W)) -> R {
        let (result, wakers) = change(&mut self.state.borrow_mut());
        wakers.into_iter().for_each(Waker::wake);
        result
    }

    /// Most bytes of payload of one message.
    pub(super) fn payload_bytes_max(&self) -> usize {
        self.limits.payload_bytes
    }

    /// Makes a request whose payload is the concatenation of `parts`; returns its number, for [`Shared::poll_answer`]
    /// or [`Shared::give_up`].
    ///
    /// # Errors
    /// `ESHUTDOWN` once the connection is lost, `EBUSY` while too many requests are unanswered, `E2BIG`.
    pub(super) fn request(&self, kind: MessageKind, transaction: u32, parts: &[&[u8]]) -> Result<u32, Errno> {
        self.change(|state| {
            let payload_bytes: usize = parts.iter().map(|part| part.len()).sum();
            let refused = match state.stage {
                Stage::Lost => Some(Errno::ESHUTDOWN),
                _ if payload_bytes > self.limits.payload_bytes => Some(Errno::E2BIG),
                _ if state.calls.is_full() => Some(Errno::EBUSY),
                _ => None,
            };
            if let Some(error) = refused {
                return (Err(error), None);
            }
            let (request, sender) = state.send(kind, transaction, parts, Wanted::Yes);
            (Ok(request), sender)
        })
    }

    /// Completes with the answer to a request, once.
    pub(super) fn poll_answer(&self, request: u32, cx: &Context<'_>) -> Poll<Answer> {
        self.state.borrow_mut().calls.poll(request, cx)
    }

    /// The answer to a request is not wanted any more; it may have been taken already.
    pub(super) fn give_up(&self, request: u32) {
        self.change(|state| {
            let begun = state.calls.give_up(request);
            ((), begun.and_then(|transaction| state.abort(transaction)))
        });
    }

    /// Ends a transaction without effect, and without waiting.
    pub(super) fn abort(&self, transaction: u32) {
        self.change(|state| match state.stage {
            Stage::Lost => ((), None),
            _ => ((), state.abort(transaction)),
        });
    }

    /// Events with the returned token are kept from now on.
    pub(super) fn add_watch(&self, path: &str) -> u64 {
        self.state.borrow_mut().watches.add(path)
    }

    /// Forgets a watch; xenstored is told, without waiting, if it was told of the watch.
    pub(super) fn remove_watch(&self, token: u64, told: bool) {
        self.change(|state| {
            let path = state.watches.remove(token).filter(|_| told && state.stage != Stage::Lost);
            let sender = path.and_then(|path| {
                let token = token.to_string();
                let parts = [path.as_bytes(), b"\0", token.as_bytes(), b"\0"];
                state.send(MessageKind::Unwatch, NO_TRANSACTION, &parts, Wanted::No).1
            });
            ((), sender)
        });
    }

    /// Completes with the next event of a watch. Until then `waiter` identifies the waiter, until
    /// [`Shared::forget_waiter`].
    pub(super) fn poll_event(
        &self,
        token: u64,
        waiter: &mut Option<u64>,
        cx: &Context<'_>,
    ) -> Poll<Result<String, Errno>> {
        let mut state = self.state.borrow_mut();
        if state.stage == Stage::Lost {
            return Poll::Ready(Err(Errno::ESHUTDOWN));
        }
        state.watches.poll(token, waiter, cx).map(Ok)
    }

    /// A waiter no longer waits for an event.
    pub(super) fn forget_waiter(&self, token: u64, waiter: u64) {
        self.state.borrow_mut().watches.forget_waiter(token, waiter);
    }

    /// No more requests will be made. What is queued is still sent.
    pub(super) fn close(&self) {
        self.change(|state| {
            if state.stage == Stage::Open {
                state.stage = Stage::Closing;
            }
            ((), state.sender.take())
        });
    }

    /// For the driver: the next message to send, once it may be sent; `None` when there will be no more.
    pub(super) fn next_message(&self) -> impl Future<Output = Option<Outgoing>> {
        poll_fn(|cx| {
            let mut state = self.state.borrow_mut();
            if state.unanswered.is_none() {
                if let Some(message) = state.outbox.pop_front() {
                    state.unanswered = self.limits.one_at_a_time.then_some(message.request);
                    return Poll::Ready(Some(message));
                }
                if state.stage != Stage::Open {
                    return Poll::Ready(None);
                }
            }
            state.sender = Some(cx.waker().clone());
            Poll::Pending
        })
    }

    /// For the driver: the message of `request` could not be sent.
    pub(super) fn refused(&self, request: u32, error: Errno) {
        self.change(|state| {
            let then = state.calls.refuse(request, error);
            ((), state.done(request, then))
        });
    }

    /// For the driver: a message has arrived.
    ///
    /// # Errors
    /// An impossible message; nothing that arrives after it can be trusted.
    pub(super) fn arrived(&self, header: &MessageHeader, payload: &[u8]) -> Result<(), StoreLost> {
        if header.kind() == Ok(MessageKind::WatchEvent) {
            let (path, token) = event(payload).ok_or(StoreLost::BadEvent)?;
            self.change(|state| ((), state.watches.fire(token, path)));
            return Ok(());
        }
        self.change(|state| match state.calls.answer(header, payload) {
            Ok(then) => (Ok(()), state.done(header.request(), then)),
            Err(lost) => (Err(lost), Vec::new()),
        })
    }

    /// For the driver: the connection is gone. All users are told.
    pub(super) fn lost(&self) {
        self.change(|state| {
            state.stage = Stage::Lost;
            state.outbox.clear();
            let mut wakers = state.watches.everybody();
            let refused = state.calls.refuse_all(Errno::ESHUTDOWN);
            wakers.extend(refused);
            ((), wakers)
        });
    }
}

/// Path and token of an event.
fn event(payload: &[u8]) -> Option<(&[u8], u64)> {
    let (path, rest) = split_string(payload)?;
    let (token, _) = split_string(rest)?;
    Some((path, std::str::from_utf8(token).ok()?.parse().ok()?))
}
