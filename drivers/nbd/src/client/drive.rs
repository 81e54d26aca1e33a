//! The life of a client: a connection, the next one when it breaks, and the requests in between.
//!
//! ```text
//!   connected ──breaks──► waiting ──► connected: everything in flight is sent again
//!                            │  reconnect_ns are over: requests fail, attempts continue
//!                            └──► the server came back as another disk: requests fail forever
//! ```

use super::link::{Link, Receiver};
use super::negotiate::Terms;
use super::{Breaks, Inner, LinkOf, open};
use crate::inlet::Inlet;
use crate::stop::StopSignal;
use crate::wire::Wire;
use std::pin::pin;
use std::rc::Rc;
use tap_abi::nbd::CMD_FLUSH;
use tap_host::{Errno, Event, Log, Probe, Sockets, Stream, Tasks, Time, unless};

tap_host::listed! {
    pub(super) BUGS: Bug;
    NBD_LOST_AT_BREAK = "nbd-lost-at-break",
        "writes that were in flight when the connection broke are not sent again but answered";
    NBD_FLUSHED_LOST = "nbd-flushed-lost",
        "a connection that breaks counts as a loss although everything was flushed";
    NBD_LESS_IGNORED = "nbd-less-ignored",
        "a server that comes back with fewer capabilities is used as before";
    NBD_BUFFER_KEPT = "nbd-buffer-kept",
        "requests that wait to be sent on a broken connection keep their buffers";
    NBD_ONE_KEPT = "nbd-one-kept", "an NBD client that ends forgets to answer the oldest request";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    NBD_SERVER_BACK = "nbd-server-back", "an NBD client connected again";
    NBD_RESENT = "nbd-resent", "a request was sent again to an NBD server that had been lost";
    NBD_UNFLUSHED_LOST = "nbd-unflushed-lost",
        "an NBD server was lost with answered writes that no flush had covered";
}

type Connected<H> = (Rc<LinkOf<H>>, Inlet<Wire<<H as Sockets>::Stream>>);

/// The progress of the attempts to reconnect.
#[derive(Clone, Copy)]
pub(super) struct Attempt {
    /// Replies received when the attempts began.
    replies: u64,
    /// The next pause in nanoseconds.
    pause_ns: u64,
    /// When requests begin to fail, in nanoseconds.
    deadline_ns: u64,
}

impl<H: Sockets + Time + Tasks + Log + Probe> Inner<H> {
    /// Makes `stream` the connection that requests go to.
    pub(super) fn start(self: &Rc<Self>, stream: Wire<H::Stream>, terms: &Terms) -> Rc<LinkOf<H>> {
        let link = Rc::new(Link::new(stream, terms));
        self.connections.set(self.connections.get() + 1);
        *self.link.borrow_mut() = Some(Rc::clone(&link));
        let own = Rc::clone(&link);
        self.host.spawn("nbd-requests", 0, async move { own.send_requests().await });
        let (inner, own) = (Rc::clone(self), Rc::clone(&link));
        self.host.spawn("nbd-patience", 0, async move {
            unless(own.ended.wait(), inner.watch(&own)).await;
        });
        link
    }

    /// Runs connection after connection, until there can be no more. By then every request is answered.
    pub(super) async fn drive(self: Rc<Self>, link: Rc<LinkOf<H>>, inlet: Inlet<Wire<H::Stream>>) {
        self.connect_again_and_again(link, inlet).await;
        assert!(self.pending.borrow().is_empty(), "a client that has ended holds requests");
    }

    async fn connect_again_and_again(
        self: &Rc<Self>,
        mut link: Rc<LinkOf<H>>,
        mut inlet: Inlet<Wire<H::Stream>>,
    ) {
        loop {
            let stop = StopSignal::default();
            let receiver = Receiver { inner: self, link: &link, inlet: &mut inlet, stop: &stop };
            let why = receiver.run().await;
            self.disconnected(&link, why);
            if self.closed.get() {
                return;
            }
            match self.stop.unless_stopped(pin!(self.reconnect())).await {
                Some(Some(next)) => (link, inlet) = next,
                _ => return,
            }
        }
    }

    fn disconnected(&self, link: &LinkOf<H>, why: &'static str) {
        link.ended.set();
        // Nothing that was sent on it may arrive after the requests that are sent again.
        link.stream.abort();
        // The link is referenced for longer than it lives; its buffers are needed now.
        if !self.host.bug(&NBD_BUFFER_KEPT) {
            link.out.discard();
        }
        if self.closed.get() {
            return;
        }
        self.link.borrow_mut().take();
        self.host.log(Event::NbdServerLost { why });
        if self.answered.get() > self.flushed.get() || self.host.bug(&NBD_FLUSHED_LOST) {
            self.host.mark(&NBD_UNFLUSHED_LOST);
            if self.config.breaks == Breaks::MayLose {
                self.lost.set(true);
            }
        }
    }

    /// Tries until there is a connection again; `None` if the server is no longer the same disk. Connections that break
    /// before anything is answered do not count as progress: pauses continue to grow, and the deadline stays.
    async fn reconnect(self: &Rc<Self>) -> Option<Connected<H>> {
        let answered = self.replies.get();
        let mut attempt = self.attempt.take().filter(|a| a.replies == answered).unwrap_or(Attempt {
            replies: answered,
            pause_ns: 0,
            deadline_ns: self.host.now_ns().saturating_add(self.config.reconnect_ns),
        });
        loop {
            if attempt.pause_ns > 0 {
                self.host.sleep_ns(attempt.pause_ns).await;
            }
            let longer_ns = attempt.pause_ns.saturating_mul(2).min(self.config.pause_most_ns);
            attempt.pause_ns = longer_ns.max(self.config.pause_ns).max(1);
            if self.host.now_ns() >= attempt.deadline_ns && self.refusal.get().is_none() {
                self.host.log(Event::NbdServerGone { why: "it was away for too long" });
                self.give_up(Errno::ENOTCONN);
            }
            // The server is unreachable or misbehaves: try again.
            let Ok((terms, stream, inlet)) = open(&self.host, &self.config, &self.memory).await else {
                continue;
            };
            let less = self.terms.broken_by(&terms).filter(|_| !self.host.bug(&NBD_LESS_IGNORED));
            let Some(why) = less else {
                self.attempt.set(Some(attempt));
                return Some((self.resume(stream, &terms), inlet));
            };
            stream.shutdown();
            self.host.log(Event::NbdServerGone { why });
            self.give_up(Errno::ENOTCONN);
            return None;
        }
    }

    /// Resends everything that was not answered, in the original order.
    fn resume(self: &Rc<Self>, stream: Wire<H::Stream>, terms: &Terms) -> Rc<LinkOf<H>> {
        let link = self.start(stream, terms);
        self.refusal.set(None);
        let cookies: Vec<u64> = self.pending.borrow().keys().copied().collect();
        self.host.mark(&NBD_SERVER_BACK);
        self.host.log(Event::NbdServerBack { resent: cookies.len() as u64 });
        for cookie in cookies {
            self.host.mark(&NBD_RESENT);
            let write = self.pending.borrow().get(&cookie).is_some_and(|p| p.call.is_write());
            if write && self.host.bug(&NBD_LOST_AT_BREAK) {
                self.finish(cookie, Ok(()));
                continue;
            }
            self.put(&link, cookie);
        }
        link
    }

    /// A server that is about to end refused a request. It goes to the next server with everything that is in flight
    /// when the connection ends; false if it was first refused so [`ClientConfig::refused_ns`] ago, by servers that
    /// stay.
    pub(super) fn waits_for_successor(&self, cookie: u64) -> bool {
        let now_ns = self.host.now_ns();
        let mut all = self.pending.borrow_mut();
        let Some(call) = all.get_mut(&cookie).map(|pending| &mut pending.call) else { return false };
        let since_ns = *call.refused_ns.get_or_insert(now_ns);
        now_ns < since_ns.saturating_add(self.config.refused_ns)
    }

    /// Answers a request.
    pub(super) fn finish(&self, cookie: u64, result: Result<(), Errno>) {
        let Some(pending) = self.pending.borrow_mut().remove(&cookie) else { return };
        let call = pending.call;
        if result.is_ok() && call.is_write() && call.flags & tap_abi::nbd::command::FUA == 0 {
            self.answered.set(self.answered.get() + 1);
        }
        if result.is_ok() && call.command == CMD_FLUSH {
            self.flushed.set(self.flushed.get().max(call.covers));
        }
        // The caller may no longer be waiting; the buffers are then dropped here.
        let _ = pending.tell.send((result, call));
    }

    /// Answers everything with `error`, now and from now on.
    pub(super) fn give_up(&self, error: Errno) {
        self.refusal.set(Some(error));
        let cookies: Vec<u64> = self.pending.borrow().keys().copied().collect();
        let kept = usize::from(self.host.bug(&NBD_ONE_KEPT));
        cookies.into_iter().skip(kept).for_each(|cookie| self.finish(cookie, Err(error)));
    }

    /// Breaks `link` when a request has waited too long.
    async fn watch(&self, link: &LinkOf<H>) {
        loop {
            let oldest = self.pending.borrow().values().map(|p| p.call.sent_ns).min();
            let Some(sent_ns) = oldest else {
                self.busy.clear();
                self.busy.wait().await;
                continue;
            };
            let until_ns = sent_ns.saturating_add(self.config.request_ns);
            let now_ns = self.host.now_ns();
            if now_ns >= until_ns {
                return link.give_up("a request was not answered in time");
            }
            self.host.sleep_ns(until_ns - now_ns).await;
        }
    }
}
