//! Timers in nanoseconds.

use crate::exec::Core;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// Something that acts at a time of its own, such as a drive that finishes an operation. Unlike a task it belongs to
/// no node and outlives every kill.
pub trait Timed {
    /// Called once at the requested time, with the given token.
    fn fire(self: Rc<Self>, token: u64);
}

pub(crate) enum Action {
    Wake(Waker),
    /// A task whose turn was delayed.
    Run(u64),
    Call(Rc<dyn Timed>, u64),
}

struct Slot {
    seq: u64,
    action: Option<Action>,
}

/// A heap of (time, sequence, slot); a cancelled slot leaves its heap entry until that surfaces or the heap is cleaned,
/// so that cancelled long sleeps in a loop do not accumulate.
#[derive(Default)]
pub(crate) struct Timers {
    heap: BinaryHeap<Reverse<(u64, u64, u32)>>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    next_seq: u64,
    live: usize,
}

impl Timers {
    pub(crate) fn add(&mut self, at_ns: u64, action: Action) -> (u32, u64) {
        let seq = self.next_seq;
        self.next_seq += 1;
        let slot = Slot { seq, action: Some(action) };
        let index = match self.free.pop() {
            Some(index) => {
                self.slots[index as usize] = slot;
                index
            }
            None => {
                self.slots.push(slot);
                (self.slots.len() - 1) as u32
            }
        };
        self.live += 1;
        self.heap.push(Reverse((at_ns, seq, index)));
        (index, seq)
    }

    fn take(&mut self, index: u32, seq: u64) -> Option<Action> {
        let slot = &mut self.slots[index as usize];
        if slot.seq != seq {
            return None;
        }
        let action = slot.action.take()?;
        self.live -= 1;
        self.free.push(index);
        Some(action)
    }

    pub(crate) fn cancel(&mut self, index: u32, seq: u64) {
        let action = self.take(index, seq);
        if action.is_some() && self.heap.len() > 64 && self.heap.len() > 4 * self.live {
            let slots = &self.slots;
            let mut heap = std::mem::take(&mut self.heap).into_vec();
            heap.retain(|Reverse((_, seq, i))| {
                let slot = &slots[*i as usize];
                slot.seq == *seq && slot.action.is_some()
            });
            self.heap = heap.into();
        }
    }

    fn replace_waker(&mut self, index: u32, seq: u64, waker: &Waker) {
        let slot = &mut self.slots[index as usize];
        if slot.seq == seq
            && let Some(Action::Wake(old)) = &mut slot.action
        {
            old.clone_from(waker);
        }
    }

    /// The next action and its time.
    pub(crate) fn pop(&mut self) -> Option<(u64, Action)> {
        while let Some(Reverse((at, seq, index))) = self.heap.pop() {
            if let Some(action) = self.take(index, seq) {
                return Some((at, action));
            }
        }
        None
    }
}

/// Sleeps until a virtual time. Made by [`crate::Sim::sleep_ns`].
pub struct Sleep {
    core: Rc<Core>,
    until_ns: u64,
    timer: Option<(u32, u64)>,
}

impl Sleep {
    pub(crate) fn new(core: Rc<Core>, until_ns: u64) -> Self {
        Self { core, until_ns, timer: None }
    }
}

impl Future for Sleep {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.core.now.get() >= self.until_ns {
            return Poll::Ready(());
        }
        let mut timers = self.core.timers.borrow_mut();
        match self.timer {
            Some((index, seq)) => timers.replace_waker(index, seq, cx.waker()),
            None => {
                let timer = timers.add(self.until_ns, Action::Wake(cx.waker().clone()));
                drop(timers);
                self.timer = Some(timer);
            }
        }
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some((index, seq)) = self.timer {
            self.core.timers.borrow_mut().cancel(index, seq);
        }
    }
}
