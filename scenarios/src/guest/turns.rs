//! Requests that overlap one after the other, as file systems have them.

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};
use tap_host::SectorRange;

/// Whose turn it is. By default no request waits for another; clones share their requests.
#[derive(Clone, Default)]
pub(super) struct Turns(Option<Rc<InFlight>>);

/// The requests that are in flight, and those that wait for them.
#[derive(Default)]
struct InFlight {
    /// Ranges, and whether they are being changed.
    ranges: RefCell<Vec<(SectorRange, bool)>>,
    waiting: RefCell<Vec<Waker>>,
}

/// A request in flight.
pub(super) struct Turn(Rc<InFlight>, (SectorRange, bool));

impl Drop for Turn {
    fn drop(&mut self) {
        let mut ranges = self.0.ranges.borrow_mut();
        if let Some(own) = ranges.iter().position(|range| *range == self.1) {
            ranges.swap_remove(own);
        }
        drop(ranges);
        self.0.waiting.take().into_iter().for_each(Waker::wake);
    }
}

impl Turns {
    /// A request waits until those that are in its way have ended.
    pub(super) fn apart() -> Self {
        Self(Some(Rc::default()))
    }

    /// Waits until no request is in the way of one on `range`, which may change it.
    pub(super) async fn turn(&self, range: SectorRange, changes: bool) -> Option<Turn> {
        let all = self.0.as_ref()?;
        let turn = poll_fn(|cx| {
            let mut ranges = all.ranges.borrow_mut();
            if ranges.iter().any(|(other, changed)| (changes || *changed) && other.overlaps(range)) {
                all.waiting.borrow_mut().push(cx.waker().clone());
                return Poll::Pending;
            }
            ranges.push((range, changes));
            Poll::Ready(Turn(Rc::clone(all), (range, changes)))
        });
        Some(turn.await)
    }
}
