//! A counted resource.

use super::Line;
use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// A number of permits; clones share them. With one permit it is a lock that may be held over an await.
#[derive(Clone)]
pub struct Semaphore(Rc<RefCell<State>>);

struct State {
    free: usize,
    line: Line,
    /// Waiters that were handed a released permit and have not taken it yet.
    granted: Vec<u64>,
}

impl Semaphore {
    /// A semaphore with `permits` free permits.
    pub fn new(permits: usize) -> Self {
        Self(Rc::new(RefCell::new(State { free: permits, line: Line::default(), granted: Vec::new() })))
    }

    /// Permits that are not taken.
    pub fn free(&self) -> usize {
        self.0.borrow().free
    }

    /// A permit, if one is free without waiting.
    pub fn try_acquire(&self) -> Option<Permit> {
        let mut state = self.0.borrow_mut();
        // While there are waiters nothing is free: a released permit goes to the first of them.
        state.free = state.free.checked_sub(1)?;
        Some(Permit(self.clone()))
    }

    /// A permit, in turn.
    pub async fn acquire(&self) -> Permit {
        if let Some(permit) = self.try_acquire() {
            return permit;
        }
        let mut place = Place { semaphore: self, id: None };
        poll_fn(|cx| place.poll(cx.waker())).await
    }

    fn release(&self) {
        let mut state = self.0.borrow_mut();
        let Some((id, waker)) = state.line.pop() else {
            state.free += 1;
            return;
        };
        state.granted.push(id);
        drop(state);
        waker.wake();
    }
}

/// One permit; passes to the next waiter when dropped.
pub struct Permit(Semaphore);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.release();
    }
}

struct Place<'a> {
    semaphore: &'a Semaphore,
    id: Option<u64>,
}

impl Place<'_> {
    fn take_grant(&mut self) -> bool {
        let mut state = self.semaphore.0.borrow_mut();
        let Some(at) = state.granted.iter().position(|g| Some(*g) == self.id) else { return false };
        state.granted.swap_remove(at);
        self.id = None;
        true
    }

    fn poll(&mut self, waker: &Waker) -> Poll<Permit> {
        if self.take_grant() {
            return Poll::Ready(Permit(self.semaphore.clone()));
        }
        self.semaphore.0.borrow_mut().line.wait(&mut self.id, waker);
        Poll::Pending
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if self.take_grant() {
            self.semaphore.release();
        } else {
            self.semaphore.0.borrow_mut().line.leave(&mut self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Pool;

    #[test]
    fn permits_are_counted_and_served_in_order() {
        let pool = Pool::new();
        let semaphore = Semaphore::new(2);
        let order = Rc::new(RefCell::new(Vec::new()));
        let held = [semaphore.try_acquire().unwrap(), semaphore.try_acquire().unwrap()];
        assert!(semaphore.try_acquire().is_none());
        for i in 0..4 {
            let (semaphore, order) = (semaphore.clone(), Rc::clone(&order));
            pool.spawn(async move {
                let _permit = semaphore.acquire().await;
                order.borrow_mut().push(i);
            });
        }
        pool.run();
        assert!(order.borrow().is_empty());
        drop(held);
        pool.run();
        assert_eq!(*order.borrow(), [0, 1, 2, 3]);
        assert_eq!(semaphore.free(), 2);
    }

    #[test]
    fn a_permit_handed_to_a_dropped_waiter_passes_to_the_next() {
        let pool = Pool::new();
        let semaphore = Semaphore::new(1);
        let held = semaphore.try_acquire();
        let mut first = Box::pin(semaphore.acquire());
        assert!(pool.poll_once(first.as_mut()).is_pending());
        let mut second = Box::pin(semaphore.acquire());
        assert!(pool.poll_once(second.as_mut()).is_pending());
        drop(held);
        assert!(semaphore.try_acquire().is_none(), "the permit belongs to the first in line");
        drop(first);
        assert!(pool.poll_once(second.as_mut()).is_ready());
        drop(second);
        assert_eq!(semaphore.free(), 1);
    }
}
