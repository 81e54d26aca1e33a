//! Order, depth, merging and retry of the requests of one disk.
//!
//! ```text
//!   submit ──► overlaps something earlier? wait for it      (tracker)
//!          ──► line up, let the others of this turn line up
//!          ──► first of the line and a depth slot free: lead
//!                take the contiguous neighbours out of the line, send one request down,
//!                hand results and buffers back to their owners
//! ```
//!
//! # Contract
//!
//! * **Overlap.** Of two overlapping requests, one of them a write, the one that was submitted first ends before the
//!   other goes down. Submitted means that [`Node::submit`] was called; whoever calls it then polls or drops the
//!   future. Reads share.
//! * **Depth.** At most `depth` reads and writes are below at once; the others wait in a line, first come, first
//!   served, but for those that are taken along as neighbours of an earlier one.
//! * **Merging.** Contiguous requests of one kind, FUA or not, that stand in the line together go down as one, without
//!   copying.
//!   An error of the whole is found out part by part: each part is sent again alone, so that an error reaches those
//!   requests whose sectors fail, and no other.
//! * **Flush** overtakes everything and is never merged: it covers what was answered before it was submitted.
//! * **Retry.** Errors that go away by themselves (`EAGAIN`, `EINTR`, `EBUSY`, `ENOMEM`) are retried after a pause that
//!   doubles, a bounded number of times; all others are answered at once.
//! * There is no task of its own: the owners of requests do the work. A merged request whose leader is dropped is
//!   carried on by the owner of another part.

mod line;
mod lower;

use crate::{
    Access, Child, Extent, LocalBoxFuture, Node, NodeInfo, Op, Request, Response, Space, Ticket, Tracker,
    WaitReport,
};
use line::{Line, Place};
use lower::Patience;
use std::cell::RefCell;
use std::rc::Rc;
use tap_host::{Bug, Errno, Log, Mark, Probe, SectorRange, Tasks, Time};

/// Bounds of a [`Scheduler`]; every one may be drawn down to its least value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SchedulerLimits {
    /// Reads and writes below at once, at least 1.
    pub depth: usize,
    /// Largest merged request in sectors; 0 turns merging off.
    pub merge_sectors: u32,
    /// How often one request is repeated after transient errors.
    pub retries: u32,
    /// Pause before the first repetition, in nanoseconds; it doubles with each.
    pub backoff_ns: u64,
    /// Sum of all pauses of one request, in nanoseconds, above which it is not repeated again.
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

/// What a scheduler has done since it was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SchedulerStats {
    /// Reads answered.
    pub reads: u64,
    /// Writes answered.
    pub writes: u64,
    /// Flushes answered.
    pub flushes: u64,
    /// Requests to write zeros answered.
    pub zeroes: u64,
    /// Discards answered.
    pub discards: u64,
    /// Sectors of successful reads.
    pub sectors_read: u64,
    /// Sectors of successful writes.
    pub sectors_written: u64,
    /// Sectors that were made zeros without being written.
    pub sectors_zeroed: u64,
    /// Sectors of successful discards.
    pub sectors_discarded: u64,
    /// Requests that went down as a part of another one.
    pub merged: u64,
    /// Requests sent down, repetitions included.
    pub lower_requests: u64,
    /// Repetitions after transient errors.
    pub retries: u64,
    /// Requests answered with an error.
    pub errors: u64,
}

/// A [`Node`] that puts the requests of one disk in order: overlapping ones run as they were submitted, at most so many
/// are below at once, contiguous ones go down together, and transient errors are retried. An error reaches the requests
/// whose sectors fail and no others. A flush overtakes everything; it covers what was answered before.
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
    /// A scheduler above `lower`. A depth of 0 is taken as 1.
    pub fn new(host: H, lower: Rc<dyn Node>, limits: SchedulerLimits) -> Self {
        Self::counting(host, lower, limits, Rc::default())
    }

    /// The same, counted together with those that counted in `stats` before.
    pub(crate) fn counting(
        host: H,
        lower: Rc<dyn Node>,
        limits: SchedulerLimits,
        stats: Rc<RefCell<SchedulerStats>>,
    ) -> Self {
        // What a node would split again is not merged.
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

    /// Work of the order of requests so far: claims compared and dependencies made.
    pub fn order_steps(&self) -> u64 {
        self.0.tracker.steps()
    }

    /// What it has done.
    pub fn stats(&self) -> SchedulerStats {
        *self.0.stats.borrow()
    }
}

impl<H: Time + Tasks + Log + Probe> Node for Scheduler<H> {
    fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
        let inner = Rc::clone(&self.0);
        if let Err(error) = check(&request, inner.lower.info()) {
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
            let response = inner.run(request, ticket).await;
            inner.count_answer(op, sectors, &response);
            response
        })
    }

    fn extents(&self, range: SectorRange, most: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        let inner = Rc::clone(&self.0);
        Box::pin(async move {
            let mut patience = Patience::new(&inner.limits);
            loop {
                let answer = inner.lower.extents(range, most).await;
                let Some(pause_ns) = answer.as_ref().err().and_then(|error| patience.after(*error)) else {
                    return answer;
                };
                inner.host.sleep_ns(pause_ns).await;
            }
        })
    }

    fn info(&self) -> NodeInfo {
        self.0.lower.info()
    }

    fn children(&self) -> Vec<Child> {
        vec![Child::lower(Rc::clone(&self.0.lower))]
    }

    /// Requests that wait for overlapping ones.
    fn waits(&self) -> Vec<WaitReport> {
        self.0.tracker.report()
    }

    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        let Inner { line, limits, tracker, .. } = &*self.0;
        let idle = line.borrow().is_idle(limits.depth) && tracker.is_empty();
        assert!(idle, "a disk is closed, and its scheduler holds requests");
        self.0.lower.close()
    }
}

fn check(request: &Request, info: NodeInfo) -> Result<(), Errno> {
    match request.op {
        _ if !request.is_well_formed(info.size_sectors) => Err(Errno::EINVAL),
        op if op.is_write() && info.read_only => Err(Errno::EROFS),
        _ => Ok(()),
    }
}

impl<H: Time + Tasks + Log + Probe> Inner<H> {
    fn ticket(&self, request: &Request) -> Ticket {
        let (name, access) = match request.op {
            Op::Write => ("write", Access::Exclusive),
            Op::WriteZeroes(_) => ("zeroes", Access::Exclusive),
            Op::Discard => ("discard", Access::Exclusive),
            Op::Read | Op::Flush => ("read", Access::Shared),
        };
        let start = request.range.start.0;
        let steps = self.tracker.steps();
        let ticket = self.tracker.ticket(name, start);
        let wide = !matches!(request.op, Op::Read | Op::Write) && self.host.bug(Bug::ClaimTooWide);
        let count = if wide { u64::MAX - start } else { u64::from(request.range.count) };
        let pieces = if self.host.bug(Bug::ClaimInPieces) { 64 } else { 1 };
        let (end, step) = (start + count, count.div_ceil(pieces));
        for from in (start..end).step_by(step as usize) {
            let claimed = ticket.claim(Space::Sectors, from..end.min(from.saturating_add(step)), access);
            claimed.expect("nobody waits for a ticket that is new");
        }
        self.host.work(self.tracker.steps() - steps);
        ticket
    }

    async fn run(self: &Rc<Self>, request: Request, ticket: Ticket) -> Response {
        if !ticket.is_ready() {
            self.host.mark(Mark::OverlapWaited);
            if !(request.op == Op::Write && self.host.bug(Bug::EdgeDropped)) {
                ticket.ready().await;
            }
        }
        let mut place = Place::take(self, request, ticket);
        if self.limits.merge_sectors > 0 {
            self.host.yield_now().await;
        }
        place.answer().await
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
