//! Items from many to one.

use super::{Event, Line};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

/// A bounded first-in-first-out queue; clones share it.
pub struct Queue<T>(Rc<Inner<T>>);

struct Inner<T> {
    capacity: usize,
    state: RefCell<State<T>>,
    /// Set while there is something to pop, or nothing will ever come.
    filled: Event,
}

struct State<T> {
    items: VecDeque<T>,
    closed: bool,
    pushers: Line,
}

impl<T> Clone for Queue<T> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<T> Queue<T> {
    /// An empty queue for at most `capacity` items (at least 1).
    pub fn new(capacity: usize) -> Self {
        let state = State { items: VecDeque::new(), closed: false, pushers: Line::default() };
        Self(Rc::new(Inner { capacity: capacity.max(1), state: RefCell::new(state), filled: Event::new() }))
    }

    /// Appends `item`, in turn, once there is room.
    ///
    /// # Errors
    /// The item itself when the queue is closed.
    pub async fn push(&self, item: T) -> Result<(), T> {
        let mut item = Some(item);
        let mut place = Place { queue: self, id: None };
        let pushed = poll_fn(|cx| {
            let mut state = self.0.state.borrow_mut();
            if state.closed {
                return Poll::Ready(false);
            }
            let in_turn = state.pushers.is_empty() || state.pushers.is_first(place.id);
            if in_turn && state.items.len() < self.0.capacity {
                state.items.extend(item.take());
                return Poll::Ready(true);
            }
            state.pushers.wait(&mut place.id, cx.waker());
            Poll::Pending
        })
        .await;
        drop(place);
        if pushed {
            self.0.filled.set();
        }
        item.map_or(Ok(()), Err)
    }

    /// The first item, or `None` once the queue is closed and empty. One task pops.
    pub async fn pop(&self) -> Option<T> {
        loop {
            if let Some(item) = self.try_pop() {
                return Some(item);
            }
            if self.0.state.borrow().closed {
                return None;
            }
            self.0.filled.clear();
            self.0.filled.wait().await;
        }
    }

    /// The first item, if there is one.
    pub fn try_pop(&self) -> Option<T> {
        let mut state = self.0.state.borrow_mut();
        let item = state.items.pop_front()?;
        let next = state.pushers.first();
        drop(state);
        if let Some(waker) = next {
            waker.wake();
        }
        Some(item)
    }

    /// Refuses further items; what is queued can still be popped.
    pub fn close(&self) {
        let mut state = self.0.state.borrow_mut();
        state.closed = true;
        let refused = state.pushers.take_all();
        drop(state);
        refused.into_iter().for_each(|(_, waker)| waker.wake());
        self.0.filled.set();
    }
}

struct Place<'a, T> {
    queue: &'a Queue<T>,
    id: Option<u64>,
}

impl<T> Drop for Place<'_, T> {
    fn drop(&mut self) {
        if self.id.is_none() {
            return;
        }
        let mut state = self.queue.0.state.borrow_mut();
        let was_first = state.pushers.is_first(self.id);
        state.pushers.leave(&mut self.id);
        let room = state.items.len() < self.queue.0.capacity;
        // The room that this one was woken for, or that is left, is for the next.
        let next = if was_first && room { state.pushers.first() } else { None };
        drop(state);
        if let Some(waker) = next {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Pool;

    #[test]
    fn items_come_in_order_through_one_place() {
        let pool = Pool::new();
        let queue = Queue::new(1);
        for i in 0..5 {
            let queue = queue.clone();
            pool.spawn(async move { queue.push(i).await.unwrap() });
        }
        pool.run();
        let popper = queue.clone();
        let got = pool.start(async move {
            let mut all = Vec::new();
            while let Some(i) = popper.pop().await {
                all.push(i);
            }
            all
        });
        pool.run();
        queue.close();
        pool.run();
        assert_eq!(got.take(), Some(vec![0, 1, 2, 3, 4]));
        let late = pool.start(async move { queue.push(9).await });
        assert_eq!(late.take(), Some(Err(9)));
    }

    #[test]
    fn a_dropped_pusher_passes_its_room_on() {
        let pool = Pool::new();
        let queue = Queue::new(1);
        assert!(pool.poll_once(std::pin::pin!(queue.push(0))).is_ready());
        let mut first = Box::pin(queue.push(1));
        assert!(pool.poll_once(first.as_mut()).is_pending());
        let second = queue.clone();
        let second = pool.start(async move { second.push(2).await });
        assert!(second.get().is_none());
        assert!(pool.poll_once(std::pin::pin!(queue.pop())).is_ready());
        drop(first);
        pool.run();
        assert_eq!(second.take(), Some(Ok(())));
    }
}
