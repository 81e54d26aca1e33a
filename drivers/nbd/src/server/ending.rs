//! How connections end: with the replies that are left, or without.

use super::connection::{Connection, LEFT, Why};
use super::negotiate::CLOSED;
use super::{HUNG_UP, STOPPED, Server};
use std::pin::pin;
use tap_host::{Log, Probe, SendList, Stream, Tasks, Time, unless};

tap_host::listed! {
    pub(super) BUGS: Bug;
    NBD_PART_SENT_ENDS = "nbd-part-sent-ends", "a connection that takes a reply in parts is taken as broken";
    NBD_WRITER_KEPT = "nbd-writer-kept", "the task that sends the replies of a connection outlives it";
    pub(super) NBD_DEAF_KEPT = "nbd-deaf-kept",
        "a client that has stopped sending and takes no replies keeps its place";
}

impl<H: Time + Tasks + Log + Probe> Server<H> {
    /// Ends in an orderly way; completes when every connection is closed. Replies that a client does not receive within
    /// [`ServerLimits::grace_ns`](super::ServerLimits::grace_ns) are dropped.
    pub async fn stop(&self) {
        self.end(STOPPED);
        self.0.idle.wait().await;
        let (open, seats) = (self.0.open.borrow().len(), self.0.memory.seats.borrow().len());
        assert_eq!(
            (open, seats),
            (0, self.0.limits.connections),
            "connections, and places for them, at the end"
        );
        assert!(self.0.negotiating.borrow().is_empty(), "a negotiation without a connection");
    }

    /// Ends at once: from now on no reply is sent and no request taken, and streams are closed. Requests in flight go
    /// on; [`Server::stop`] waits for them. Clients see a broken connection, and may repeat on another one what has no
    /// reply.
    pub fn hang_up(&self) {
        self.0.hung_up.set();
        self.end(HUNG_UP);
    }

    fn end(&self, why: Why) {
        self.0.stopping.set();
        self.0.open.borrow().values().for_each(|open| open.stop.set(why));
    }
}

impl<H, S> Connection<H, S>
where
    H: Time + Tasks + Log + Probe,
    S: Stream,
{
    /// Sends replies until the outbox is closed.
    pub(super) async fn send_replies(&self) {
        let mut list = SendList::new();
        while let Some(replies) = self.out.next(&mut list).await {
            if self.server.hung_up.is_set() {
                list = SendList::new();
                self.release(replies);
                continue;
            }
            let (mut result, mut parts) = (Ok(()), 0);
            self.flow.sending.set(true);
            while result.is_ok() && !list.is_empty() {
                parts += 1;
                (result, list) = self.stream.send(list).await;
                self.flow.sends.set(self.flow.sends.get() + 1);
            }
            self.flow.sending.set(false);
            if result.is_err() || (parts > 1 && self.host().bug(&NBD_PART_SENT_ENDS)) {
                // Before the count goes down: the reading task must not start another request.
                self.stop.set("a reply could not be sent");
                list = SendList::new();
            }
            self.release(replies);
        }
    }

    /// Completes when every reply is sent, or with false when the client takes nothing for
    /// [`ServerLimits::grace_ns`](super::ServerLimits::grace_ns). Time that the disk takes is not counted: a client may
    /// have stopped sending and be waiting for it.
    async fn taken(&self) -> bool {
        loop {
            let before = self.flow.seen();
            let grace = self.host().sleep_ns(self.server.limits.grace_ns);
            if unless(grace, self.fewer_than(1)).await.is_some() {
                return true;
            }
            if self.flow.is_stuck(before) && !self.host().bug(&NBD_DEAF_KEPT) {
                return false;
            }
        }
    }

    /// Waits until everything in flight has ended and was sent, and closes the stream.
    pub(super) async fn drain(&self, why: Why) {
        let ended = [LEFT, CLOSED].contains(&why);
        self.broken.set(!ended);
        if unless(self.server.hung_up.wait(), self.parted(ended)).await != Some(true) {
            self.stream.shutdown();
        }
        self.fewer_than(1).await;
        if !self.host().bug(&NBD_WRITER_KEPT) {
            self.out.close();
        }
        self.stream.shutdown();
    }

    /// Waits until everything in flight has ended and was sent; false if its client does not take it.
    async fn parted(&self, ended: bool) -> bool {
        if ended {
            // None once the server stops.
            if let Some(taken) = self.stop.unless_stopped(pin!(self.taken())).await {
                return taken;
            }
        }
        let grace = self.host().sleep_ns(self.server.limits.grace_ns);
        self.in_flight.get() == 0 || unless(grace, self.fewer_than(1)).await.is_some()
    }
}
