//! The queue of requests that may go down, and the choice of leaders.
//!
//! ```text
//!   Queued ──first, depth free──► leads alone, or with neighbours
//!     └──────neighbour leads────► Taken ──► Done
//! ```

use super::lower::{Batch, Part};
use super::{Inner, name_of};
use crate::{LocalBoxFuture, Op, Request, Response, TicketName};
use smallvec::{SmallVec, smallvec};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use tap_host::{Log, Probe, Tasks, Time};

tap_host::listed! {
    pub(super) BUGS: Bug;
    SLOT_KEPT = "slot-kept", "a request that was merged keeps its place in the line once it is answered";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    DEPTH_REACHED = "depth-reached", "the scheduler's depth held a request back";
}

/// Limit of buffers in a merged request; the operating system takes 1024 in one vectored operation.
const MAX_MERGED_BUFS: usize = 512;

/// Requests that are queued or part of a merged request.
pub(super) struct Line {
    depth_free: usize,
    queue: VecDeque<Queued>,
    slots: Vec<Slot>,
    unused: Vec<u32>,
}

/// The fields that the search for neighbours reads, kept together.
#[derive(Clone, Copy)]
struct Queued {
    start: u64,
    end: u64,
    /// Only requests of one kind are merged: the same operation and the same FUA.
    kind: (Op, bool),
    slot: u32,
}

struct Slot {
    stage: Stage,
    waker: Option<Waker>,
}

enum Stage {
    Queued(Request),
    Taken,
    Done(Response),
    Unused,
}

impl Line {
    pub(super) fn new(depth: usize) -> Self {
        Self { depth_free: depth, queue: VecDeque::new(), slots: Vec::new(), unused: Vec::new() }
    }

    /// Puts `request` at the end; returns its slot.
    pub(super) fn enqueue(&mut self, request: Request) -> u32 {
        let (start, kind) = (request.range.start.0, (request.op, request.fua));
        let end = start + u64::from(request.range.count);
        let filled = Slot { stage: Stage::Queued(request), waker: None };
        let slot = match self.unused.pop() {
            Some(slot) => {
                self.slots[slot as usize] = filled;
                slot
            }
            None => {
                self.slots.push(filled);
                (self.slots.len() - 1) as u32
            }
        };
        self.queue.push_back(Queued { start, end, kind, slot });
        slot
    }

    /// Frees `slot`; returns its stage.
    fn free(&mut self, slot: u32) -> Stage {
        self.unused.push(slot);
        let slot = &mut self.slots[slot as usize];
        slot.waker = None;
        std::mem::replace(&mut slot.stage, Stage::Unused)
    }

    /// The waker of the first in the queue, if a depth slot is free for it and it sleeps.
    fn next_leader(&mut self) -> Option<Waker> {
        if self.depth_free == 0 {
            return None;
        }
        let first = self.queue.front()?.slot;
        self.slots[first as usize].waker.take()
    }

    fn replace(&mut self, slot: u32, stage: Stage) -> Stage {
        std::mem::replace(&mut self.slots[slot as usize].stage, stage)
    }

    fn take_request(&mut self, slot: u32) -> Request {
        match self.replace(slot, Stage::Taken) {
            Stage::Queued(request) => request,
            _ => unreachable!("a request in the queue has the stage `Queued`"),
        }
    }

    /// Takes the first request of the queue and its neighbours, ordered by sector.
    fn take_batch(&mut self, merge_sectors: u32) -> SmallVec<[(u32, Request); 1]> {
        let first = self.queue.pop_front().expect("the leader is the first in the queue");
        let mut parts: SmallVec<[(u32, Request); 1]> = smallvec![(first.slot, self.take_request(first.slot))];
        let (mut start, mut end, mut bufs) = (first.start, first.end, parts[0].1.bufs.len());
        while let Some(at) = self.neighbour(first.kind, start, end, merge_sectors) {
            let Stage::Queued(next) = &self.slots[self.queue[at].slot as usize].stage else { break };
            bufs += next.bufs.len();
            if bufs > MAX_MERGED_BUFS {
                break;
            }
            let Some(next) = self.queue.remove(at) else { break };
            let part = (next.slot, self.take_request(next.slot));
            if next.start == end {
                end = next.end;
                parts.push(part);
            } else {
                start = next.start;
                parts.insert(0, part);
            }
        }
        parts
    }

    /// The index in the queue of a request that is adjacent to `start..end`.
    fn neighbour(&self, kind: (Op, bool), start: u64, end: u64, merge_sectors: u32) -> Option<usize> {
        let fits =
            |q: &Queued| q.kind == kind && q.end.max(end) - q.start.min(start) <= u64::from(merge_sectors);
        let touches = |q: &Queued| (q.start == end || q.end == start) && fits(q);
        let (front, back) = self.queue.as_slices();
        // This scan is hot: two plain loops are faster than one over both halves.
        for (at, q) in front.iter().enumerate() {
            if touches(q) {
                return Some(at);
            }
        }
        for (at, q) in back.iter().enumerate() {
            if touches(q) {
                return Some(front.len() + at);
            }
        }
        None
    }

    /// Stores the answer of a part; returns the waker of its owner, to be woken without holding the borrow of the line.
    pub(super) fn deliver(&mut self, slot: u32, response: Response) -> Option<Waker> {
        let slot = &mut self.slots[slot as usize];
        slot.stage = Stage::Done(response);
        slot.waker.take()
    }

    /// The requests in the queue, the first one first.
    pub(super) fn waiting(&self) -> Vec<TicketName> {
        let name = |q: &Queued| TicketName { name: name_of(q.kind.0), number: q.start };
        self.queue.iter().map(name).collect()
    }

    /// Whether all places below are taken.
    pub(super) fn is_full(&self) -> bool {
        self.depth_free == 0
    }

    /// Whether it is empty and everything taken from it was freed.
    pub(super) fn is_idle(&self, depth: usize) -> bool {
        self.depth_free == depth && self.queue.is_empty() && self.unused.len() == self.slots.len()
    }
}

/// A depth slot; passes to the first in the queue when dropped.
pub(super) struct Depth<H: Time + Tasks + Log + Probe>(Rc<Inner<H>>);

impl<H: Time + Tasks + Log + Probe> Drop for Depth<H> {
    fn drop(&mut self) {
        // A second panic here would abort the process.
        if std::thread::panicking() {
            return;
        }
        let mut line = self.0.line.borrow_mut();
        line.depth_free += 1;
        let next = line.next_leader();
        drop(line);
        next.into_iter().for_each(Waker::wake);
    }
}

enum Turn<H: Time + Tasks + Log + Probe> {
    Alone(Request, Depth<H>),
    Lead(LocalBoxFuture<()>),
    Done(Response),
}

impl<H: Time + Tasks + Log + Probe> Inner<H> {
    /// Answers the request in `slot`: alone, as the leader of a merged request, or as a part of one.
    pub(super) async fn answer(self: &Rc<Self>, slot: u32) -> Response {
        if self.limits.merge_sectors > 0 {
            self.host.yield_now().await;
        }
        let mut was_held_back = false;
        loop {
            match poll_fn(|cx| self.poll_turn(slot, &mut was_held_back, cx)).await {
                Turn::Alone(request, _depth) => return self.attempt(request).await,
                Turn::Lead(merged) => merged.await,
                Turn::Done(response) => return response,
            }
        }
    }

    fn poll_turn(
        self: &Rc<Self>,
        slot: u32,
        was_held_back: &mut bool,
        cx: &mut Context<'_>,
    ) -> Poll<Turn<H>> {
        let mut line = self.line.borrow_mut();
        match &line.slots[slot as usize].stage {
            Stage::Done(_) => {
                let kept = self.host.bug(&SLOT_KEPT);
                let stage = if kept { line.replace(slot, Stage::Taken) } else { line.free(slot) };
                let Stage::Done(response) = stage else { unreachable!("the stage was `Done`") };
                return Poll::Ready(Turn::Done(response));
            }
            Stage::Queued(_) if line.depth_free == 0 => {
                if !std::mem::replace(was_held_back, true) {
                    self.host.mark(&DEPTH_REACHED);
                }
            }
            Stage::Queued(_) if line.queue.front().is_some_and(|q| q.slot == slot) => {
                drop(line);
                return Poll::Ready(self.lead(slot));
            }
            Stage::Queued(_) | Stage::Taken => {}
            Stage::Unused => unreachable!("a slot in use"),
        }
        line.slots[slot as usize].waker = Some(cx.waker().clone());
        Poll::Pending
    }

    fn lead(self: &Rc<Self>, slot: u32) -> Turn<H> {
        let mut line = self.line.borrow_mut();
        line.depth_free -= 1;
        let depth = Depth(Rc::clone(self));
        let mut parts = line.take_batch(self.limits.merge_sectors);
        let turn = if parts.len() == 1 {
            line.free(slot);
            let (_, request) = parts.remove(0);
            Turn::Alone(request, depth)
        } else {
            line.slots[slot as usize].waker = None;
            let parts = parts.into_iter().map(|(slot, request)| Part::new(slot, request)).collect();
            Turn::Lead(Box::pin(Batch::new(self, parts, depth).run()))
        };
        // Depth may be left for the new head of the queue.
        let next = line.next_leader();
        drop(line);
        next.into_iter().for_each(Waker::wake);
        turn
    }
}
