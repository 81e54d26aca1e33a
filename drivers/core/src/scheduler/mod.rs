//! Order, depth, merging and retry of the requests of one disk.
//!
//! ```text
//!   submit ──► overlaps something earlier? wait for it      (tracker)
//!          ──► queue up, yield so that others of this turn queue up
//!          ──► first in the queue and a depth slot free: lead
//!                take the contiguous neighbours out of the queue, send one request down,
//!                hand results and buffers back to their owners
//! ```
//!
//! # Contract
//!
//! * **Overlap.** Of two overlapping requests, at least one a write, the one submitted first ends before the other goes
//!   down. Submitted means that [`Node::submit`] was called. Reads share.
//! * **Depth.** At most `depth` reads and writes are below at once; the others wait in a queue, first come, first
//!   served, except neighbours that are merged into an earlier one.
//! * **Merging.** Contiguous queued requests of the same operation and FUA go down as one, without copying. If that
//!   fails, each part is sent again alone, so that an error reaches only the requests whose sectors fail.
//! * **Flush** overtakes everything and is never merged: it covers what was answered before it was submitted.
//! * **Retry.** Transient errors ([`Tried::Request`]) are retried after a pause that doubles, a bounded number of
//!   times; all others are returned at once.
//! * The scheduler has no task: the owners of requests do the work, the leader of a merged request for all its parts. A
//!   [`Slot`](crate::Slot) above completes requests whose caller has dropped them.

mod line;
mod lower;

use crate::{
    Access, Child, Extent, LocalBoxFuture, Node, NodeInfo, Op, Request, Response, Space, Ticket, Tracker,
    WaitReport, WaitsFor,
};
use line::Line;
use std::cell::RefCell;
use std::rc::Rc;
use tap_host::{Errno, Log, Patience, Probe, SectorRange, Tasks, Time, Tried};

tap_host::listed! {
    pub(super) BUGS: Bug with [line::BUGS, lower::BUGS];
    CLAIM_TOO_WIDE = "claim-too-wide",
        "everything past zeros and discards waits for them, not only what they touch";
    EDGE_DROPPED = "edge-dropped", "a write does not wait for an overlapping request in flight";
    CLAIM_IN_PIECES = "claim-in-pieces", "a request claims its range in 64 pieces";
}

tap_host::listed! {
    pub(super) MARKS: Mark with [line::MARKS, lower::MARKS];
    OVERLAP_WAITED = "overlap-waited", "a request waited for an overlapping one";
}

/// Limits of a [`Scheduler`]; the simulator may draw each down to its minimum.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SchedulerLimits {
    /// Reads and writes below at once, at least 1.
    pub depth: usize,
    /// Largest merged request in sectors; 0 turns merging off.
    pub merge_sectors: u32,
    /// Retries of one request after transient errors.
    pub retries: u32,
    /// Pause before the first retry, in nanoseconds; it doubles with each.
    pub backoff_ns: u64,
    /// Limit of the sum of all pauses of one request, in nanoseconds.
    pub backoff_total_ns: u64,
}

impl Default for SchedulerLimits {
    fn default() -> Self {
        Self {
            depth: 128,
            merge_sectors: 1024,
            retries: 12,
            backoff_ns: 1_000_000,
            backoff_total_ns: 10_000_000_000,
        }
    }
}

impl SchedulerLimits {
    fn patience(&self) -> Patience {
        Patience::of(self.retries).with_pauses(self.backoff_ns, self.backoff_total_ns)
    }
}

/// Counters of a scheduler.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SchedulerStats {
    /// Reads answered.
    pub reads: u64,
    /// Writes answered.
    pub writes: u64,
    /// Flushes answered.
    pub flushes: u64,
    /// Zero requests answered.
    pub zeroes: u64,
    /// Discards answered.
    pub discards: u64,
    /// Sectors of successful reads.
    pub sectors_read: u64,
    /// Sectors of successful writes.
    pub sectors_written: u64,
    /// Sectors of successful zero requests.
    pub sectors_zeroed: u64,
    /// Sectors of successful discards.
    pub sectors_discarded: u64,
    /// Requests that went down as part of another one.
    pub merged: u64,
    /// Requests sent down, including retries.
    pub lower_requests: u64,
    /// Retries after transient errors.
    pub retries: u64,
    /// Requests answered with an error.
    pub errors: u64,
}

/// A [`Node`] that orders the requests of one disk: overlapping ones run in the order of submission, a limited number
/// is below at once, contiguous ones are merged, and transient errors are retried. An error reaches only the requests
/// whose sectors fail. A flush overtakes everything; it covers what was answered before.
pub struct Scheduler<H>(Rc<Inner<H>>);

struct Inner<H> {
    host: H,
    lower: Rc<dyn Node>,
    limits: SchedulerLimits,
    tracker: Tracker,
    line: RefCell<Line>,
    stats: Rc<RefCell<SchedulerStats>>,
}

impl<H: Time + Tasks + Log + Probe> Scheduler<H> {
    /// A scheduler over `lower`. A depth of 0 is taken as 1.
    pub fn new(host: H, lower: Rc<dyn Node>, limits: SchedulerLimits) -> Self {
        Self::counting(host, lower, limits, Rc::default())
    }

    /// The same, but adds to existing counters.
    pub(crate) fn counting(
        host: H,
        lower: Rc<dyn Node>,
        limits: SchedulerLimits,
        stats: Rc<RefCell<SchedulerStats>>,
    ) -> Self {
        // Do not merge what the node would split again.
        let merge_sectors = limits.merge_sectors.min(lower.info().max_sectors);
        let limits = SchedulerLimits { depth: limits.depth.max(1), merge_sectors, ..limits };
        Self(Rc::new(Inner {
            host,
            lower,
            limits,
            tracker: Tracker::new(),
            line: RefCell::new(Line::new(limits.depth)),
            stats,
        }))
    }

    /// Work done so far to keep requests in order: claims compared and dependencies added.
    pub fn order_steps(&self) -> u64 {
        self.0.tracker.steps()
    }

    /// Its counters.
    pub fn stats(&self) -> SchedulerStats {
        *self.0.stats.borrow()
    }
}

impl<H: Time + Tasks + Log + Probe> Node for Scheduler<H> {
    fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
        let inner = Rc::clone(&self.0);
        if let Err(error) = inner.lower.info().check(&request) {
            inner.count(|s| s.errors += 1);
            return Box::pin(std::future::ready(Response { result: Err(error), bufs: request.bufs }));
        }
        if request.op == Op::Flush {
            return Box::pin(async move {
                let response = inner.attempt(request).await;
                inner.count_answer(Op::Flush, 0, &response);
                response
            });
        }
        let ticket = inner.ticket(&request);
        Box::pin(async move {
            let (op, sectors) = (request.op, request.range.count);
            if !ticket.is_ready() {
                inner.host.mark(&OVERLAP_WAITED);
                if !(op == Op::Write && inner.host.bug(&EDGE_DROPPED)) {
                    ticket.ready().await;
                }
            }
            // The request moves into the line, and not through the futures of other functions: each would have room for
            // it, and futures of more than a kilobyte are expensive to allocate.
            let slot = inner.line.borrow_mut().enqueue(request);
            let response = inner.answer(slot).await;
            drop(ticket);
            inner.count_answer(op, sectors, &response);
            response
        })
    }

    fn extents(&self, range: SectorRange, max: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        let inner = Rc::clone(&self.0);
        Box::pin(async move {
            let mut patience = inner.limits.patience();
            loop {
                match inner.lower.extents(range, max).await {
                    Err(error) if Tried::Request.may_pass(error) && patience.again(&inner.host).await => {}
                    answer => return answer,
                }
            }
        })
    }

    fn info(&self) -> NodeInfo {
        self.0.lower.info()
    }

    fn children(&self) -> Vec<Child> {
        vec![Child::lower(Rc::clone(&self.0.lower))]
    }

    /// Requests that wait for overlapping ones, in line, or for the node below. Flushes have no ticket.
    fn waits(&self) -> Vec<WaitReport> {
        let Inner { tracker, line, limits, .. } = &*self.0;
        let (mut all, mut ready) = (tracker.report(), tracker.ready());
        let (in_line, is_full) = (line.borrow().waiting(), line.borrow().is_full());
        for ticket in in_line {
            if let Ok(at) = ready.binary_search(&ticket) {
                ready.remove(at);
            }
            let waits_for = if is_full { WaitsFor::Place(limits.depth) } else { WaitsFor::Turn };
            all.push(WaitReport { ticket, waits_for });
        }
        all.extend(ready.into_iter().map(|ticket| WaitReport { ticket, waits_for: WaitsFor::Below }));
        all
    }

    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        let Inner { line, limits, tracker, .. } = &*self.0;
        let idle = line.borrow().is_idle(limits.depth) && tracker.is_empty();
        assert!(idle, "the scheduler holds requests at close");
        self.0.lower.close()
    }
}

/// The name of such work in reports.
fn name_of(op: Op) -> &'static str {
    match op {
        Op::Write => "write",
        Op::WriteZeroes(_) => "zeroes",
        Op::Discard => "discard",
        Op::Read | Op::Flush => "read",
    }
}

impl<H: Time + Tasks + Log + Probe> Inner<H> {
    fn ticket(&self, request: &Request) -> Ticket {
        let access = match request.op {
            Op::Write | Op::WriteZeroes(_) | Op::Discard => Access::Exclusive,
            Op::Read | Op::Flush => Access::Shared,
        };
        let start = request.range.start.0;
        let steps = self.tracker.steps();
        let ticket = self.tracker.ticket(name_of(request.op), start);
        let wide = !matches!(request.op, Op::Read | Op::Write) && self.host.bug(&CLAIM_TOO_WIDE);
        let count = if wide { u64::MAX - start } else { u64::from(request.range.count) };
        let pieces = if self.host.bug(&CLAIM_IN_PIECES) { 64 } else { 1 };
        let (end, step) = (start + count, count.div_ceil(pieces));
        for from in (start..end).step_by(step as usize) {
            ticket.claim(Space::Sectors, from..end.min(from.saturating_add(step)), access);
        }
        self.host.work(self.tracker.steps() - steps);
        ticket
    }

    fn count(&self, change: impl FnOnce(&mut SchedulerStats)) {
        change(&mut self.stats.borrow_mut());
    }

    fn count_answer(&self, op: Op, sectors: u32, response: &Response) {
        let moved = if response.result.is_ok() { u64::from(sectors) } else { 0 };
        self.count(|s| {
            s.errors += u64::from(response.result.is_err());
            match op {
                Op::Read => (s.reads, s.sectors_read) = (s.reads + 1, s.sectors_read + moved),
                Op::Write => (s.writes, s.sectors_written) = (s.writes + 1, s.sectors_written + moved),
                Op::Flush => s.flushes += 1,
                Op::WriteZeroes(_) => {
                    (s.zeroes, s.sectors_zeroed) = (s.zeroes + 1, s.sectors_zeroed + moved);
                }
                Op::Discard => {
                    (s.discards, s.sectors_discarded) = (s.discards + 1, s.sectors_discarded + moved)
                }
            }
        });
    }
}

#[cfg(test)]
mod tests;
