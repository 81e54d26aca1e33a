//! A flag that is set or clear.

use super::Line;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::Poll;

/// A flag to wait for. Setting it twice is setting it once.
#[derive(Default)]
pub struct Event {
    set: Cell<bool>,
    line: RefCell<Line>,
}

impl Event {
    /// An event that is clear.
    pub fn new() -> Self {
        Self::default()
    }

    /// Releases all waiters, and those that arrive until [`Event::clear`]. Present waiters are released even if it is
    /// cleared before they are polled.
    pub fn set(&self) {
        self.set.set(true);
        let woken = self.line.borrow_mut().take_all();
        woken.into_iter().for_each(|(_, waker)| waker.wake());
    }

    /// Makes later waiters wait again.
    pub fn clear(&self) {
        self.set.set(false);
    }

    /// Whether it is set.
    pub fn is_set(&self) -> bool {
        self.set.get()
    }

    /// Completes once the event is set.
    pub async fn wait(&self) {
        let mut place = Place { event: self, id: None };
        poll_fn(|cx| {
            let mut line = self.line.borrow_mut();
            // A waiter no longer queued was released by `set`.
            if self.set.get() || (place.id.is_some() && !line.has(place.id)) {
                return Poll::Ready(());
            }
            line.wait(&mut place.id, cx.waker());
            Poll::Pending
        })
        .await;
    }
}

struct Place<'a> {
    event: &'a Event,
    id: Option<u64>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.event.line.borrow_mut().leave(&mut self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Pool;
    use std::rc::Rc;

    #[test]
    fn set_releases_all_waiters_even_if_cleared_at_once() {
        let pool = Pool::new();
        let event = Rc::new(Event::new());
        let done = Rc::new(Cell::new(0));
        for _ in 0..3 {
            let (event, done) = (Rc::clone(&event), Rc::clone(&done));
            pool.spawn(async move {
                event.wait().await;
                done.set(done.get() + 1);
            });
        }
        pool.run();
        assert_eq!(done.get(), 0);
        event.set();
        event.clear();
        pool.run();
        assert_eq!(done.get(), 3);
        let late = pool.start(async move { event.wait().await });
        assert!(late.get().is_none());
    }

    #[test]
    fn a_dropped_waiter_leaves_no_trace() {
        let pool = Pool::new();
        let event = Event::new();
        {
            let mut waiting = std::pin::pin!(event.wait());
            assert!(pool.poll_once(waiting.as_mut()).is_pending());
        }
        assert!(event.line.borrow().is_empty());
    }
}
