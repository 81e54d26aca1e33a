//! The queue of requests that may go down, and the choice of leaders.
//!
//! ```text
//!   Queued ──first, depth free──► leads alone, or with neighbours
//!     └──────neighbour leads────► Taken ──► Done
//!                                   └─leader dropped─► Driving ──► Done
//! ```

use super::lower::{Batch, Part};
use super::{Inner, name_of};
use crate::{LocalBoxFuture, Op, Request, Response, Ticket, TicketName};
use smallvec::{SmallVec, smallvec};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
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
    /// Set once the owner's future is dropped: overlapping requests wait for this ticket until the merged request has
    /// ended.
    abandoned: Option<Ticket>,
    /// The parts of the merged request it belongs to.
    batch: Option<Rc<[u32]>>,
}

enum Stage {
    Queued(Request),
    Taken,
    Driving(LocalBoxFuture<()>),
    Done(Response),
    Unused,
}

impl Line {
    pub(super) fn new(depth: usize) -> Self {
        Self { depth_free: depth, queue: VecDeque::new(), slots: Vec::new(), unused: Vec::new() }
    }

    fn enqueue(&mut self, request: Request) -> u32 {
        let (start, kind) = (request.range.start.0, (request.op, request.fua));
        let end = start + u64::from(request.range.count);
        let filled = Slot { stage: Stage::Queued(request), waker: None, abandoned: None, batch: None };
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

    fn free(&mut self, slot: u32) -> Slot {
        self.unused.push(slot);
        let empty = Slot { stage: Stage::Unused, waker: None, abandoned: None, batch: None };
        std::mem::replace(&mut self.slots[slot as usize], empty)
    }

    /// The waker of the first in the queue, if a depth slot is free for it and it sleeps.
    fn next_leader(&mut self) -> Option<Waker> {
        if self.depth_free == 0 {
            return None;
        }
        let first = self.queue.front()?.slot;
        self.slots[first as usize].waker.take()
    }

    fn take_request(&mut self, slot: u32) -> Request {
        match std::mem::replace(&mut self.slots[slot as usize].stage, Stage::Taken) {
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

    /// Stores the answer of a part. The caller wakes or drops the returned values without holding the borrow of the
    /// line.
    pub(super) fn deliver(
        &mut self,
        slot: u32,
        response: Response,
    ) -> (Option<Waker>, Option<Ticket>, Option<Response>) {
        if self.slots[slot as usize].abandoned.is_some() {
            return (None, self.free(slot).abandoned, Some(response));
        }
        let slot = &mut self.slots[slot as usize];
        slot.stage = Stage::Done(response);
        (slot.waker.take(), None, None)
    }

    /// Frees a part that no longer has an owner to answer.
    pub(super) fn give_up(&mut self, slot: u32) -> Option<Ticket> {
        self.free(slot).abandoned
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
    Drive(LocalBoxFuture<()>),
    Done(Response),
}

/// One request's place in the queue.
pub(super) struct Place<H: Time + Tasks + Log + Probe> {
    inner: Rc<Inner<H>>,
    ticket: Option<Ticket>,
    /// `None` once the slot is freed.
    slot: Option<u32>,
    /// The merged request that this request drives.
    driving: Option<LocalBoxFuture<()>>,
    was_held_back: bool,
}

impl<H: Time + Tasks + Log + Probe> Place<H> {
    pub(super) fn take(inner: &Rc<Inner<H>>, request: Request, ticket: Ticket) -> Self {
        let slot = inner.line.borrow_mut().enqueue(request);
        Self {
            inner: Rc::clone(inner),
            ticket: Some(ticket),
            slot: Some(slot),
            driving: None,
            was_held_back: false,
        }
    }

    pub(super) async fn answer(&mut self) -> Response {
        loop {
            match poll_fn(|cx| self.poll_turn(cx)).await {
                Turn::Alone(request, _depth) => return self.inner.attempt(request).await,
                Turn::Done(response) => return response,
                Turn::Drive(work) => self.driving = Some(work),
            }
            poll_fn(|cx| self.poll_drive(cx)).await;
        }
    }

    fn poll_drive(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(work) = &mut self.driving else { return Poll::Ready(()) };
        std::task::ready!(Pin::new(work).poll(cx));
        self.driving = None;
        Poll::Ready(())
    }

    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<Turn<H>> {
        let slot = self.slot.expect("the slot is freed with the last turn");
        let mut line = self.inner.line.borrow_mut();
        let own = &mut line.slots[slot as usize];
        match std::mem::replace(&mut own.stage, Stage::Taken) {
            Stage::Done(response) => {
                self.slot = None;
                if !self.inner.host.bug(&SLOT_KEPT) {
                    line.free(slot);
                }
                return Poll::Ready(Turn::Done(response));
            }
            Stage::Driving(work) => return Poll::Ready(Turn::Drive(work)),
            Stage::Unused => unreachable!("a slot in use"),
            Stage::Taken => {}
            Stage::Queued(request) => {
                own.stage = Stage::Queued(request);
                let is_first = line.queue.front().is_some_and(|q| q.slot == slot);
                if line.depth_free == 0 {
                    if !std::mem::replace(&mut self.was_held_back, true) {
                        self.inner.host.mark(&DEPTH_REACHED);
                    }
                } else if is_first {
                    drop(line);
                    return Poll::Ready(self.lead(slot));
                }
            }
        }
        line.slots[slot as usize].waker = Some(cx.waker().clone());
        Poll::Pending
    }

    fn lead(&mut self, slot: u32) -> Turn<H> {
        let mut line = self.inner.line.borrow_mut();
        line.depth_free -= 1;
        let parts = line.take_batch(self.inner.limits.merge_sectors);
        let turn = if parts.len() == 1 {
            self.slot = None;
            line.free(slot);
            let request = parts.into_iter().next().map(|(_, request)| request);
            Turn::Alone(request.expect("one part"), Depth(Rc::clone(&self.inner)))
        } else {
            let members: Rc<[u32]> = parts.iter().map(|(slot, _)| *slot).collect();
            line.slots[slot as usize].waker = None;
            for member in members.iter() {
                line.slots[*member as usize].batch = Some(Rc::clone(&members));
            }
            let parts = parts.into_iter().map(|(slot, request)| Part::new(slot, request)).collect();
            let batch = Batch::new(&self.inner, parts, Depth(Rc::clone(&self.inner)));
            Turn::Drive(Box::pin(batch.run()))
        };
        // Depth may be left for the new head of the queue.
        let next = line.next_leader();
        drop(line);
        next.into_iter().for_each(Waker::wake);
        turn
    }
}

impl<H: Time + Tasks + Log + Probe> Drop for Place<H> {
    fn drop(&mut self) {
        // A second panic here would abort the process.
        if std::thread::panicking() {
            return;
        }
        let Some(slot) = self.slot.take() else { return };
        let mut line = self.inner.line.borrow_mut();
        let (mut woken, mut work) = (None, self.driving.take());
        let mut unused = None;
        let own = &mut line.slots[slot as usize];
        match std::mem::replace(&mut own.stage, Stage::Taken) {
            Stage::Queued(_) => {
                line.queue.retain(|q| q.slot != slot);
                unused = Some(line.free(slot));
                woken = line.next_leader();
            }
            Stage::Done(_) => {
                // Answered, but it may still drive the other parts.
                if let Some(left) = work.take() {
                    (woken, work) = line.hand_over(slot, left);
                }
                unused = Some(line.free(slot));
            }
            Stage::Unused => unreachable!("a slot in use"),
            stage => {
                if let Stage::Driving(handed) = stage {
                    work = Some(handed);
                }
                own.abandoned = self.ticket.take();
                own.waker = None;
                if let Some(left) = work.take() {
                    (woken, work) = line.hand_over(slot, left);
                }
            }
        }
        drop(line);
        woken.into_iter().for_each(Waker::wake);
        // A merged request without an owner ends here; its effect may still happen.
        drop((work, unused));
    }
}

impl Line {
    /// Hands a merged request whose driver is dropped to the owner of another part; returns it if there is none.
    fn hand_over(
        &mut self,
        from: u32,
        work: LocalBoxFuture<()>,
    ) -> (Option<Waker>, Option<LocalBoxFuture<()>>) {
        let Some(members) = self.slots[from as usize].batch.clone() else { return (None, Some(work)) };
        let heir = members.iter().find(|m| {
            let slot = &self.slots[**m as usize];
            // The slot of an answered part may have been reused by a request of another batch.
            let same = slot.batch.as_ref().is_some_and(|b| Rc::ptr_eq(b, &members));
            **m != from && same && matches!(slot.stage, Stage::Taken) && slot.abandoned.is_none()
        });
        match heir {
            Some(heir) => {
                let slot = &mut self.slots[*heir as usize];
                slot.stage = Stage::Driving(work);
                (slot.waker.take(), None)
            }
            None => (None, Some(work)),
        }
    }
}
