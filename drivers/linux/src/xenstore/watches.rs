//! Watches, and the events that were not taken yet.
//!
//! Nothing is dropped and nothing grows without limit: an event that is already queued is not added again, and too many
//! different ones become a single event of the watched path itself, which stands for all.

use std::collections::{BTreeMap, VecDeque};
use std::task::{Context, Poll, Waker};

/// Different paths that are kept for one watch.
const EVENTS_MAX: usize = 64;

struct Watch {
    path: String,
    fired: VecDeque<String>,
    /// There is one event, and it stands for all that come.
    merged: bool,
    /// By the number of the waiter.
    waiting: BTreeMap<u64, Waker>,
}

/// The watches of one connection, by token.
#[derive(Default)]
pub(super) struct Watches {
    all: BTreeMap<u64, Watch>,
    /// The last number given to a watch or to a waiter.
    last: u64,
}

impl Watches {
    /// Adds a watch; returns its token, which is never reused.
    pub(super) fn add(&mut self, path: &str) -> u64 {
        self.last += 1;
        let (fired, waiting) = Default::default();
        self.all.insert(self.last, Watch { path: path.to_owned(), fired, merged: false, waiting });
        self.last
    }

    /// Removes a watch; returns its path.
    pub(super) fn remove(&mut self, token: u64) -> Option<String> {
        self.all.remove(&token).map(|watch| watch.path)
    }

    /// `path` has changed. A removed watch may still fire for a while. Returns the wakers of its waiters.
    pub(super) fn fire(&mut self, token: u64, path: &[u8]) -> Vec<Waker> {
        let Some(watch) = self.all.get_mut(&token) else { return Vec::new() };
        watch.add(path);
        std::mem::take(&mut watch.waiting).into_values().collect()
    }

    /// Completes with the first queued event of a watch. Several callers may wait for one watch, each with a number
    /// assigned here: all are woken, and the first to run takes the event.
    pub(super) fn poll(&mut self, token: u64, waiter: &mut Option<u64>, cx: &Context<'_>) -> Poll<String> {
        let Some(watch) = self.all.get_mut(&token) else { unreachable!("a watcher has its watch") };
        if let Some(path) = watch.fired.pop_front() {
            watch.merged = false;
            return Poll::Ready(path);
        }
        let waiter = *waiter.get_or_insert_with(|| {
            self.last += 1;
            self.last
        });
        watch.waiting.insert(waiter, cx.waker().clone());
        Poll::Pending
    }

    /// The waiter with this number no longer waits.
    pub(super) fn forget_waiter(&mut self, token: u64, waiter: u64) {
        if let Some(watch) = self.all.get_mut(&token) {
            watch.waiting.remove(&waiter);
        }
    }

    /// The wakers of all waiters of all watches.
    pub(super) fn everybody(&mut self) -> Vec<Waker> {
        self.all.values_mut().flat_map(|watch| std::mem::take(&mut watch.waiting).into_values()).collect()
    }
}

impl Watch {
    fn add(&mut self, path: &[u8]) {
        // Paths are ASCII. One that is not only tells that something below the watch has changed.
        let path = std::str::from_utf8(path).unwrap_or(&self.path);
        if self.merged || self.fired.iter().any(|fired| fired == path) {
            return;
        }
        if self.fired.len() < EVENTS_MAX {
            self.fired.push_back(path.to_owned());
        } else {
            self.fired = VecDeque::from([self.path.clone()]);
            self.merged = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(watches: &mut Watches, token: u64) -> Vec<String> {
        let mut out = Vec::new();
        while let Poll::Ready(path) = watches.poll(token, &mut None, &Context::from_waker(Waker::noop())) {
            out.push(path);
        }
        out
    }

    #[test]
    fn events_come_in_order_and_once() {
        let mut watches = Watches::default();
        let (a, b) = (watches.add("/a"), watches.add("/a"));
        for path in ["/a", "/a/x", "/a/y", "/a/x"] {
            watches.fire(a, path.as_bytes());
        }
        assert_eq!(taken(&mut watches, a), ["/a", "/a/x", "/a/y"]);
        assert!(taken(&mut watches, a).is_empty() && taken(&mut watches, b).is_empty());
        watches.fire(a, b"/a/x");
        assert_eq!(taken(&mut watches, a), ["/a/x"], "taken, and fired again");
        watches.fire(a, b"\xff");
        assert_eq!(taken(&mut watches, a), ["/a"]);
    }

    #[test]
    fn too_many_become_one_that_stands_for_all() {
        let mut watches = Watches::default();
        let token = watches.add("/a");
        for i in 0..EVENTS_MAX {
            watches.fire(token, format!("/a/{i}").as_bytes());
        }
        assert_eq!(taken(&mut watches, token).len(), EVENTS_MAX);
        for i in 0..10 * EVENTS_MAX {
            watches.fire(token, format!("/a/{i}").as_bytes());
        }
        assert_eq!(taken(&mut watches, token), ["/a"]);
        watches.fire(token, b"/a/new");
        assert_eq!(taken(&mut watches, token), ["/a/new"], "later events are reported again");
    }

    #[test]
    fn all_who_wait_are_woken_once() {
        let mut watches = Watches::default();
        let token = watches.add("/a");
        let cx = Context::from_waker(Waker::noop());
        let (mut first, mut second, mut third) = (None, None, None);
        for _ in 0..3 {
            assert!(watches.poll(token, &mut first, &cx).is_pending());
            assert!(watches.poll(token, &mut second, &cx).is_pending());
            assert!(watches.poll(token, &mut third, &cx).is_pending());
        }
        watches.forget_waiter(token, second.unwrap());
        assert_eq!(watches.fire(token, b"/a").len(), 2);
        assert!(watches.fire(token, b"/a/b").is_empty());
        assert!(watches.poll(token, &mut third, &cx).is_ready());
        assert_eq!(watches.remove(token), Some("/a".into()));
        assert!(watches.fire(token, b"/a").is_empty(), "late");
    }
}
