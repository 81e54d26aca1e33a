//! What happens to the disks of a process, for clients that listen.
//!
//! ```text
//!   tell ──► a number, a line ──► the last few lines ──► Ear::next ──► client
//!                                        └── left behind: how many are lost, and the present state
//! ```
//!
//! # Contract
//!
//! * Nobody who tells waits for anybody who listens. Lines are kept once for all, and only the last few.
//! * Who listens gets the state first, then every event after it, in order; or is told how many it has missed, with the
//!   state anew. A state has all events up to its number, and none after.
//! * After [`Feed::end`] nothing more is told. Who listens gets what is kept, and then the end.

use super::news::{Happened, News, Standing};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use tap_core::wait::Event as Flag;
use tap_host::{Probe, Time};

tap_host::listed! {
    pub(super) BUGS: Bug;
    EVENTS_LOST_UNSAID = "events-lost-unsaid", "a client that missed events is not told so";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    EVENTS_LOST = "events-lost", "a client did not take its lines, and was told how many events it has missed";
}

/// How many events are kept for clients that are behind.
pub const EVENTS_KEPT: usize = 256;

/// What happens to disks; clones share it.
pub struct Feed<H>(Rc<Inner<H>>);

struct Inner<H> {
    host: H,
    began_ns: u64,
    kept_max: usize,
    /// The number of the last event.
    told: Cell<u64>,
    kept: RefCell<VecDeque<Rc<Vec<u8>>>>,
    news: Flag,
    over: Flag,
}

impl<H> Clone for Feed<H> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<H: Time + Probe> Feed<H> {
    /// One that keeps at most `kept_max` events, and at least one.
    pub fn new(host: H, kept_max: usize) -> Self {
        let began_ns = host.now_ns();
        Self(Rc::new(Inner {
            host,
            began_ns,
            kept_max: kept_max.max(1),
            told: Cell::new(0),
            kept: RefCell::default(),
            news: Flag::new(),
            over: Flag::new(),
        }))
    }

    /// Something happened to the disk `minor`, which is now as `disk` says, if that has changed.
    pub fn tell(&self, event: Happened, minor: u16, disk: Option<Standing>, words: Option<String>) {
        let inner = &self.0;
        let seq = inner.told.get() + 1;
        let news = News { minor: Some(minor), disk, words, ..News::of(seq, inner.now_ns(), event) };
        let mut kept = inner.kept.borrow_mut();
        if kept.len() == inner.kept_max {
            kept.pop_front();
        }
        kept.push_back(Rc::new(news.line()));
        drop(kept);
        inner.told.set(seq);
        inner.news.set();
        inner.news.clear();
    }

    /// Nothing happens any more.
    pub fn end(&self) {
        self.0.over.set();
        self.0.news.set();
    }

    /// Completes once nothing happens any more.
    pub(super) async fn ended(&self) {
        self.0.over.wait().await;
    }

    /// For a client that begins to listen.
    pub(super) fn listen(&self) -> Ear<H> {
        Ear { feed: Rc::clone(&self.0), heard: None }
    }
}

impl<H: Time> Inner<H> {
    fn now_ns(&self) -> u64 {
        self.host.now_ns().saturating_sub(self.began_ns)
    }
}

/// What one client has heard.
pub(super) struct Ear<H> {
    feed: Rc<Inner<H>>,
    /// Events up to this number; `None` before the first state.
    heard: Option<u64>,
}

impl<H: Time + Probe> Ear<H> {
    /// The next lines, with `present` for the disks as they are; `None` at the end.
    pub(super) async fn next(&mut self, present: impl Fn() -> Vec<Standing>) -> Option<Rc<Vec<u8>>> {
        loop {
            if let Some(lines) = self.take(&present) {
                return Some(lines);
            }
            if self.feed.over.is_set() {
                return None;
            }
            self.feed.news.wait().await;
        }
    }

    /// The next lines, if it has not heard everything.
    fn take(&mut self, present: impl Fn() -> Vec<Standing>) -> Option<Rc<Vec<u8>>> {
        let feed = &self.feed;
        let told = feed.told.get();
        let Some(heard) = self.heard.replace(told) else {
            return Some(Rc::new(feed.state(told, present())));
        };
        let kept = feed.kept.borrow();
        let first = told - kept.len() as u64;
        if heard < first && !feed.host.bug(&EVENTS_LOST_UNSAID) {
            feed.host.mark(&EVENTS_LOST);
            let lost = News { lost: Some(told - heard), ..News::of(told, feed.now_ns(), Happened::Lost) };
            return Some(Rc::new([lost.line(), feed.state(told, present())].concat()));
        }
        let heard = heard.max(first);
        if heard == told {
            return None;
        }
        self.heard = Some(heard + 1);
        Some(Rc::clone(&kept[(heard - first) as usize]))
    }

    /// Leaves out what has happened since.
    pub(super) fn skip(&mut self) {
        self.heard = Some(self.feed.told.get());
    }
}

impl<H: Time> Inner<H> {
    fn state(&self, seq: u64, disks: Vec<Standing>) -> Vec<u8> {
        News { disks: Some(disks), ..News::of(seq, self.now_ns(), Happened::State) }.line()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};
    use tap_host::{Bug, Mark};

    #[derive(Clone)]
    struct Still;

    impl Time for Still {
        fn now_ns(&self) -> u64 {
            5
        }
        fn sleep_ns(&self, _: u64) -> impl Future<Output = ()> + 'static {
            std::future::pending()
        }
    }

    impl Probe for Still {
        fn bug(&self, _: &Bug) -> bool {
            false
        }
        fn mark(&self, _: &Mark) {}
    }

    /// What a client gets now, by event and number; nothing if it has to wait.
    fn hear(ear: &mut Ear<Still>) -> Option<Vec<(Happened, u64)>> {
        let mut next = pin!(ear.next(Vec::new));
        match next.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Pending => Some(Vec::new()),
            Poll::Ready(lines) => Some(
                lines?
                    .split_inclusive(|byte| *byte == b'\n')
                    .map(|line| serde_json::from_slice::<News>(line).unwrap())
                    .map(|news| (news.event, news.lost.unwrap_or(news.seq)))
                    .collect(),
            ),
        }
    }

    #[test]
    fn every_event_is_told_or_counted_as_lost() {
        let feed = Feed::new(Still, 2);
        let tell = || feed.tell(Happened::Clients, 0, None, None);
        tell();
        let mut ear = feed.listen();
        assert_eq!(hear(&mut ear), Some(vec![(Happened::State, 1)]));
        assert_eq!(hear(&mut ear), Some(Vec::new()));
        tell();
        tell();
        assert_eq!(hear(&mut ear), Some(vec![(Happened::Clients, 2)]));
        tell();
        assert_eq!(hear(&mut ear), Some(vec![(Happened::Clients, 3)]));
        (0..3).for_each(|_| tell());
        assert_eq!(hear(&mut ear), Some(vec![(Happened::Lost, 4), (Happened::State, 7)]));
        tell();
        feed.end();
        assert_eq!(hear(&mut ear), Some(vec![(Happened::Clients, 8)]));
        assert_eq!(hear(&mut ear), None);
        assert_eq!(feed.0.kept.borrow().len(), 2);
    }
}
