//! Decides which work waits for which.
//!
//! ```text
//!   write 8+8   ──claims sectors 8..16 exclusive──┐
//!   read 12+1   ──claims sectors 12..13 shared────┴─► waits for write 8+8
//!   table 3     ──claims tables 3..4 exclusive
//! ```
//!
//! # Contract
//!
//! * A [`Ticket`] claims ranges of numbered spaces. It depends on every ticket with an earlier claim that overlaps one
//!   of its claims, unless both claims are shared.
//! * [`Ticket::ready`] completes when every ticket it depends on was ready and is dropped. It is woken once for that,
//!   and never earlier.
//! * A ticket is kept until it is ready: what waits for it waits for what it waits for. One that is dropped earlier
//!   keeps its claims for good, so that its waiters stop instead of running too early.
//! * A busy range is never refused, and nothing polls. There is no deadlock: a ticket makes all its claims before
//!   others wait for it.
//!
//! The active claims of a space are a plain list, oldest first: there are as many as requests in flight, and a scan of
//! a hundred costs less than a tree. Without a conflict nothing is allocated.
//!
//! ```text
//!   write 8+8 ◄── write 8+8 ◄── write 8+8 ◄── read 10+2      each waits only for the one before it
//! ```
//!
//! The scan goes from the newest to the oldest and skips claims that the tickets found so far already wait for, sector
//! by sector. So a thousand claims of one block make a chain, not half a million edges.

use smallvec::SmallVec;
use std::cell::RefCell;
use std::fmt;
use std::future::{Future, poll_fn};
use std::ops::Range;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// The unit of a claimed range.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum Space {
    /// Sectors of the virtual disk.
    Sectors,
    /// Allocation units of the virtual disk.
    Clusters,
    /// Second-level tables.
    Tables,
    /// Blocks of the host file that are read, changed and written.
    HostBlocks,
}

const SPACES: usize = 4;

/// Whether other tickets may claim the same range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Overlaps other shared claims.
    Shared,
    /// Overlaps no other claim.
    Exclusive,
}

/// The name of a ticket in reports.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct TicketName {
    /// Kind of work ("write").
    pub name: &'static str,
    /// Identifies the work (a sector, a cluster).
    pub number: u64,
}

impl fmt::Display for TicketName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.number)
    }
}

/// What a ticket's work waits for.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum WaitsFor {
    /// Other tickets.
    Tickets(Vec<TicketName>),
    /// One of so many places below, all of which are taken.
    Place(usize),
    /// Its turn in the line for a free place below.
    Turn,
    /// The node below.
    Below,
}

/// A ticket whose work is not done, and what that waits for.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct WaitReport {
    /// The ticket.
    pub ticket: TicketName,
    /// What it waits for.
    pub waits_for: WaitsFor,
}

impl fmt::Display for WaitReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} waits for ", self.ticket)?;
        match &self.waits_for {
            WaitsFor::Tickets(tickets) => {
                for (i, other) in tickets.iter().enumerate() {
                    write!(f, "{}{other}", if i == 0 { "" } else { ", " })?;
                }
                Ok(())
            }
            WaitsFor::Place(depth) => write!(f, "one of the {depth} places below, which are all taken"),
            WaitsFor::Turn => f.write_str("its turn in line, although a place below is free"),
            WaitsFor::Below => f.write_str("the node below"),
        }
    }
}

/// The tickets of one disk or image; clones share them.
#[derive(Clone, Default)]
pub struct Tracker(Rc<RefCell<State>>);

/// A place in the order of work, until dropped. It must be ready by then.
pub struct Ticket {
    tracker: Tracker,
    index: u32,
}

#[derive(Default)]
struct State {
    claims: [Vec<Claim>; SPACES],
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Claims compared and dependencies added.
    steps: u64,
}

#[derive(Clone, Copy)]
struct Claim {
    start: u64,
    end: u64,
    owner: u32,
    access: Access,
}

struct Slot {
    live: bool,
    label: TicketName,
    claims: [u16; SPACES],
    /// Number of tickets it waits for.
    waits_for: u32,
    /// The slots of its waiters.
    successors: SmallVec<[u32; 2]>,
    waker: Option<Waker>,
}

impl Tracker {
    /// A tracker without tickets.
    pub fn new() -> Self {
        Self::default()
    }

    /// A ticket without claims, called `name` and `number` in reports.
    pub fn ticket(&self, name: &'static str, number: u64) -> Ticket {
        let label = TicketName { name, number };
        let mut state = self.0.borrow_mut();
        let index = match state.free.pop() {
            Some(index) => {
                let slot = &mut state.slots[index as usize];
                (slot.live, slot.label) = (true, label);
                index
            }
            None => {
                state.slots.push(Slot {
                    live: true,
                    label,
                    claims: [0; SPACES],
                    waits_for: 0,
                    successors: SmallVec::new(),
                    waker: None,
                });
                (state.slots.len() - 1) as u32
            }
        };
        Ticket { tracker: self.clone(), index }
    }

    /// Every waiting ticket with those it waits for, ordered by name, to print when nothing makes progress.
    pub fn report(&self) -> Vec<WaitReport> {
        let state = self.0.borrow();
        let mut out: Vec<WaitReport> = Vec::new();
        for (index, slot) in state.slots.iter().enumerate().filter(|(_, s)| s.live && s.waits_for > 0) {
            let before = state.slots.iter().filter(|s| s.successors.contains(&(index as u32)));
            let mut waits_for: Vec<TicketName> = before.map(|s| s.label).collect();
            waits_for.sort_unstable();
            out.push(WaitReport { ticket: slot.label, waits_for: WaitsFor::Tickets(waits_for) });
        }
        out.sort_unstable();
        out
    }

    /// The tickets that wait for no other, ordered by name.
    pub fn ready(&self) -> Vec<TicketName> {
        let state = self.0.borrow();
        let ready = state.slots.iter().filter(|s| s.live && s.waits_for == 0);
        let mut names: Vec<TicketName> = ready.map(|s| s.label).collect();
        names.sort_unstable();
        names
    }

    /// Number of tickets.
    pub fn len(&self) -> usize {
        let state = self.0.borrow();
        state.slots.len() - state.free.len()
    }

    /// Claims compared and dependencies added since the tracker was made: a measure of its work.
    pub fn steps(&self) -> u64 {
        self.0.borrow().steps
    }

    /// Whether it has no tickets.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Ticket {
    /// Claims `range` of `space`. An empty range claims nothing.
    ///
    /// # Panics
    /// If other tickets wait for this one: it could have to wait for one of them, and neither would ever be ready.
    pub fn claim(&self, space: Space, range: Range<u64>, access: Access) {
        if range.is_empty() {
            return;
        }
        let state = &mut *self.tracker.0.borrow_mut();
        assert!(
            state.slots[self.index as usize].successors.is_empty(),
            "a claim by a ticket that others wait for"
        );
        let claim = Claim { start: range.start, end: range.end, owner: self.index, access };
        let before = state.before(space as usize, state.claims[space as usize].len(), &claim);
        state.join(&before, self.index);
        state.claims[space as usize].push(claim);
        state.slots[self.index as usize].claims[space as usize] += 1;
    }

    /// Whether every ticket it depends on is dropped.
    pub fn is_ready(&self) -> bool {
        self.tracker.0.borrow().slots[self.index as usize].waits_for == 0
    }

    /// Completes when every ticket it depends on is dropped.
    pub fn ready(&self) -> impl Future<Output = ()> {
        poll_fn(|cx| {
            let slot = &mut self.tracker.0.borrow_mut().slots[self.index as usize];
            if slot.waits_for == 0 {
                return Poll::Ready(());
            }
            match &mut slot.waker {
                Some(waker) => waker.clone_from(cx.waker()),
                none => *none = Some(cx.waker().clone()),
            }
            Poll::Pending
        })
    }
}

impl Claim {
    fn conflicts(&self, later: &Claim) -> bool {
        self.start < later.end
            && later.start < self.end
            && self.owner != later.owner
            && (self.access == Access::Exclusive || later.access == Access::Exclusive)
    }
}

/// Disjoint ranges, in order.
#[derive(Default)]
struct Union(SmallVec<[(u64, u64); 4]>);

impl Union {
    fn add(&mut self, start: u64, end: u64) {
        let from = self.0.partition_point(|range| range.1 < start);
        let to = self.0.partition_point(|range| range.0 <= end);
        if from == to {
            self.0.insert(from, (start, end));
            return;
        }
        self.0[from] = (self.0[from].0.min(start), self.0[to - 1].1.max(end));
        self.0.drain(from + 1..to);
    }

    fn covers(&self, start: u64, end: u64) -> bool {
        let at = self.0.partition_point(|range| range.1 < end);
        self.0.get(at).is_some_and(|range| range.0 <= start)
    }
}

impl State {
    /// The tickets that `claim` has to wait for, among the owners of the first `count` claims of a space: only the
    /// latest ones, since these wait for the others.
    fn before(&mut self, space: usize, count: usize, claim: &Claim) -> SmallVec<[u32; 8]> {
        let mut before: SmallVec<[u32; 8]> = SmallVec::new();
        // The ranges found so far, and those of them that are exclusive.
        let (mut found, mut alone) = (Union::default(), Union::default());
        let mut steps = 0;
        for other in self.claims[space][..count].iter().rev() {
            steps += 1;
            if !other.conflicts(claim) {
                continue;
            }
            let (start, end) = (other.start.max(claim.start), other.end.min(claim.end));
            let exclusive = other.access == Access::Exclusive;
            if (if exclusive { &found } else { &alone }).covers(start, end) {
                continue;
            }
            before.push(other.owner);
            found.add(start, end);
            if exclusive {
                alone.add(start, end);
                if alone.covers(claim.start, claim.end) {
                    break;
                }
            }
        }
        self.steps += steps;
        before
    }

    fn join(&mut self, before: &[u32], index: u32) {
        for b in before {
            let successors = &mut self.slots[*b as usize].successors;
            self.steps += successors.len() as u64 + 1;
            if !successors.contains(&index) {
                successors.push(index);
                self.slots[index as usize].waits_for += 1;
            }
        }
    }

    fn release(&mut self, index: u32) -> SmallVec<[Waker; 4]> {
        let mut woken = SmallVec::new();
        if self.slots[index as usize].waits_for > 0 {
            return woken;
        }
        for (space, claims) in self.claims.iter_mut().enumerate() {
            for _ in 0..std::mem::take(&mut self.slots[index as usize].claims[space]) {
                let at =
                    claims.iter().position(|c| c.owner == index).expect("a counted claim is in its list");
                self.steps += at as u64 + 1;
                claims.remove(at);
            }
        }
        let slot = &mut self.slots[index as usize];
        slot.live = false;
        slot.waker = None;
        for next in std::mem::take(&mut slot.successors) {
            let next = &mut self.slots[next as usize];
            next.waits_for -= 1;
            if next.waits_for == 0 {
                woken.extend(next.waker.take());
            }
        }
        self.free.push(index);
        woken
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // A second panic here would abort the process.
        if std::thread::panicking() {
            return;
        }
        let woken = self.tracker.0.borrow_mut().release(self.index);
        woken.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests;
