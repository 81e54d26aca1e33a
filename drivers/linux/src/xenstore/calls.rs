//! Requests that were made and are not finished.
//!
//! ```text
//!   begin ─► waiting ──answer──► answered ──poll──► gone
//!               └─give_up─► unwanted ──answer──► gone
//! ```
//!
//! A request that is no longer waited for keeps its number until its answer has arrived, so that answers are not mixed
//! up. A transaction that begins for a dropped request is returned to the caller, which ends it.

use super::StoreLost;
use std::collections::BTreeMap;
use std::task::{Context, Poll, Waker};
use tap_abi::xenstore::{MessageHeader, MessageKind, error_number, split_string};
use tap_host::Errno;

/// Requests at a time; more are refused. So many wait only if xenstored does not answer.
const CALLS_MAX: usize = 4096;

/// The payload of an answer, or the error.
pub(super) type Answer = Result<Vec<u8>, Errno>;

struct Call {
    kind: MessageKind,
    state: State,
}

enum State {
    Waiting(Option<Waker>),
    Answered(Answer),
    Unwanted,
}

/// Whether the answer will be taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wanted {
    Yes,
    No,
}

/// What to do after an answer.
#[derive(Debug)]
pub(super) enum Then {
    /// Nothing.
    Done,
    /// Wake the waiting request.
    Wake(Waker),
    /// End this transaction, which no caller wants.
    EndTransaction(u32),
}

/// The requests of one connection, by number.
#[derive(Default)]
pub(super) struct Calls {
    open: BTreeMap<u32, Call>,
    last: u32,
}

impl Calls {
    /// Whether no more requests should be begun, except those that release something.
    pub(super) fn is_full(&self) -> bool {
        self.open.len() >= CALLS_MAX
    }

    /// A new request's number, which is never 0.
    pub(super) fn begin(&mut self, kind: MessageKind, wanted: Wanted) -> u32 {
        loop {
            self.last = self.last.wrapping_add(1);
            // After 2^32 requests the numbers repeat, and an old one may still be in use.
            if self.last != 0 && !self.open.contains_key(&self.last) {
                break;
            }
        }
        let state = match wanted {
            Wanted::Yes => State::Waiting(None),
            Wanted::No => State::Unwanted,
        };
        self.open.insert(self.last, Call { kind, state });
        self.last
    }

    /// Completes with the answer to `request`, once.
    pub(super) fn poll(&mut self, request: u32, cx: &Context<'_>) -> Poll<Answer> {
        match self.open.get_mut(&request) {
            Some(Call { state: State::Waiting(waker), .. }) => {
                *waker = Some(cx.waker().clone());
                Poll::Pending
            }
            _ => match self.open.remove(&request) {
                Some(Call { state: State::Answered(answer), .. }) => Poll::Ready(answer),
                _ => unreachable!("request {request} is polled after its end"),
            },
        }
    }

    /// `request` is no longer waited for, if it was. Returns the transaction that it began, if any.
    pub(super) fn give_up(&mut self, request: u32) -> Option<u32> {
        let call = self.open.get_mut(&request)?;
        match std::mem::replace(&mut call.state, State::Unwanted) {
            State::Answered(answer) => {
                let begun = (call.kind == MessageKind::TransactionStart).then_some(answer);
                self.open.remove(&request);
                begun.and_then(Result::ok).and_then(|payload| transaction_number(&payload).ok())
            }
            State::Waiting(_) | State::Unwanted => None,
        }
    }

    /// xenstored has answered.
    ///
    /// # Errors
    /// An answer to a request that was not made, or of another kind.
    pub(super) fn answer(&mut self, header: &MessageHeader, payload: &[u8]) -> Result<Then, StoreLost> {
        let request = header.request();
        let asked = self.open.get(&request).filter(|call| !matches!(call.state, State::Answered(_)));
        let asked = asked.ok_or(StoreLost::NotAsked(request))?.kind;
        let answer = match header.kind() {
            Ok(kind) if kind == asked => Ok(payload.to_vec()),
            Ok(MessageKind::Error) => Err(error_number(payload).map_or(Errno::EIO, Errno)),
            _ => return Err(StoreLost::OtherKind(asked)),
        };
        Ok(self.settle(request, answer))
    }

    /// There will be no answer to `request`.
    pub(super) fn refuse(&mut self, request: u32, error: Errno) -> Then {
        self.settle(request, Err(error))
    }

    /// There will be no answers at all. Returns the wakers of all waiting requests.
    pub(super) fn refuse_all(&mut self, error: Errno) -> Vec<Waker> {
        let open: Vec<u32> = self.open.keys().copied().collect();
        let all = open.into_iter().map(|request| self.refuse(request, error));
        let woken = all.filter_map(|then| match then {
            Then::Wake(waker) => Some(waker),
            Then::Done | Then::EndTransaction(_) => None,
        });
        woken.collect()
    }

    fn settle(&mut self, request: u32, answer: Answer) -> Then {
        let Some(call) = self.open.get_mut(&request) else { return Then::Done };
        match &mut call.state {
            State::Waiting(waker) => {
                let waker = waker.take();
                call.state = State::Answered(answer);
                waker.map_or(Then::Done, Then::Wake)
            }
            State::Unwanted => {
                let begun = call.kind == MessageKind::TransactionStart;
                self.open.remove(&request);
                let number = answer.ok().filter(|_| begun).and_then(|p| transaction_number(&p).ok());
                number.map_or(Then::Done, Then::EndTransaction)
            }
            State::Answered(_) => Then::Done,
        }
    }
}

/// The number in the answer to the start of a transaction.
///
/// # Errors
/// `EPROTO` for anything but a decimal number above 0.
pub(super) fn transaction_number(payload: &[u8]) -> Result<u32, Errno> {
    let (text, _) = split_string(payload).ok_or(Errno::EPROTO)?;
    let number = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
    number.filter(|number| *number != 0).ok_or(Errno::EPROTO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use MessageKind::{Error, Read, TransactionStart, Write};

    fn poll(calls: &mut Calls, request: u32) -> Poll<Answer> {
        calls.poll(request, &Context::from_waker(Waker::noop()))
    }

    fn answer(calls: &mut Calls, kind: MessageKind, request: u32, payload: &[u8]) -> Result<Then, StoreLost> {
        calls.answer(&MessageHeader::new(kind, request, 0, payload.len()), payload)
    }

    #[test]
    fn answers_find_their_requests_in_any_order() {
        let mut calls = Calls::default();
        let (a, b) = (calls.begin(Read, Wanted::Yes), calls.begin(Read, Wanted::Yes));
        assert!(poll(&mut calls, a).is_pending() && poll(&mut calls, b).is_pending());
        assert!(matches!(answer(&mut calls, Read, b, b"2"), Ok(Then::Wake(_))));
        assert!(matches!(answer(&mut calls, Error, a, b"ENOENT\0"), Ok(Then::Wake(_))));
        assert_eq!(poll(&mut calls, a), Poll::Ready(Err(Errno::ENOENT)));
        assert_eq!(poll(&mut calls, b), Poll::Ready(Ok(b"2".to_vec())));
        assert!(calls.open.is_empty());
    }

    #[test]
    fn what_was_not_asked_ends_the_connection() {
        let mut calls = Calls::default();
        assert_eq!(answer(&mut calls, Read, 1, b"").unwrap_err(), StoreLost::NotAsked(1));
        let a = calls.begin(Read, Wanted::Yes);
        assert_eq!(answer(&mut calls, Write, a, b"").unwrap_err(), StoreLost::OtherKind(Read));
        assert!(answer(&mut calls, Read, a, b"").is_ok());
        assert_eq!(answer(&mut calls, Read, a, b"").unwrap_err(), StoreLost::NotAsked(a), "twice");
    }

    #[test]
    fn an_unknown_error_is_one_of_input_and_output() {
        let mut calls = Calls::default();
        let a = calls.begin(Read, Wanted::Yes);
        assert!(answer(&mut calls, Error, a, b"ENEWER\0").is_ok());
        assert_eq!(poll(&mut calls, a), Poll::Ready(Err(Errno::EIO)));
    }

    #[test]
    fn who_gives_up_leaves_nothing_behind() {
        let mut calls = Calls::default();
        // Before the answer, and after it.
        let (a, b) = (calls.begin(TransactionStart, Wanted::Yes), calls.begin(TransactionStart, Wanted::Yes));
        assert_eq!(calls.give_up(a), None);
        assert!(matches!(answer(&mut calls, TransactionStart, a, b"7\0"), Ok(Then::EndTransaction(7))));
        assert!(matches!(answer(&mut calls, TransactionStart, b, b"8\0"), Ok(Then::Done)));
        assert_eq!(calls.give_up(b), Some(8));
        let (a, b) = (calls.begin(Read, Wanted::Yes), calls.begin(Read, Wanted::Yes));
        assert_eq!(calls.give_up(a), None);
        assert!(matches!(answer(&mut calls, Read, a, b"7\0"), Ok(Then::Done)));
        assert!(matches!(answer(&mut calls, Read, b, b"8\0"), Ok(Then::Done)));
        assert_eq!(calls.give_up(b), None);
        assert_eq!(calls.give_up(b), None, "nothing is left of it");
        assert!(calls.open.is_empty());
    }

    #[test]
    fn an_end_is_everybodys() {
        let mut calls = Calls::default();
        let (a, b) = (calls.begin(Read, Wanted::Yes), calls.begin(Write, Wanted::No));
        let answered = calls.begin(Read, Wanted::Yes);
        assert!(poll(&mut calls, a).is_pending());
        assert!(answer(&mut calls, Read, answered, b"before").is_ok());
        assert_eq!(calls.refuse_all(Errno::ESHUTDOWN).len(), 1);
        assert_eq!(poll(&mut calls, a), Poll::Ready(Err(Errno::ESHUTDOWN)));
        assert_eq!(poll(&mut calls, answered), Poll::Ready(Ok(b"before".to_vec())));
        assert!(calls.open.is_empty(), "{b} is not waited for");
    }

    #[test]
    fn numbers_go_round_without_zero_and_without_those_in_use() {
        let mut calls = Calls { last: u32::MAX - 1, ..Calls::default() };
        assert_eq!(calls.begin(Read, Wanted::Yes), u32::MAX);
        assert_eq!(calls.begin(Read, Wanted::Yes), 1);
        calls.last = u32::MAX - 1;
        assert_eq!(calls.begin(Read, Wanted::Yes), 2);
    }

    #[test]
    fn transactions_have_numbers() {
        assert_eq!(transaction_number(b"12\0"), Ok(12));
        for bad in [&b""[..], b"12", b"0\0", b"-1\0", b"4294967296\0", b"x\0", b"\xff\0", b"\0"] {
            assert_eq!(transaction_number(bad), Err(Errno::EPROTO), "{bad:?}");
        }
    }
}
