//! Requests that a slot has accepted and not answered yet: what is measured of them, and which of them take too long.

use super::Inner;
use crate::measures::kind_of;
use crate::wait::Event as Flag;
use crate::{Extent, Measures, Request, Response, WaitReport, WaitsFor, wait_report};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_host::{Errno, Event, IoKind, Log, Probe, SectorRange, Tasks, Time, Whereabouts, select};

tap_host::listed! {
    pub(super) BUGS: Bug;
    LATENCY_FROM_ADMISSION = "latency-from-admission",
        "the time for which a request waits because its disk is paused is not measured";
    ZEROES_AS_WRITES = "zeroes-as-writes", "requests to zero sectors are measured as writes";
    HANG_UNSAID = "hang-unsaid", "nothing is said about a request that takes too long while its disk is paused";
    HANG_ELSEWHERE = "hang-elsewhere", "a request that waits for a paused disk is said to be at the image";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    HANG_SAID = "hang-said", "a request was said to take too long";
    HANG_ENDED = "hang-ended", "a request that was said to take too long was answered";
}

/// Hears what is said about requests that take long.
pub(super) type Heard = Rc<dyn Fn(&Event)>;

/// The open requests of a slot.
#[derive(Default)]
pub(super) struct Open {
    pub(super) measures: RefCell<Measures>,
    rows: RefCell<Rows>,
    /// How long a request may take before it is said, in nanoseconds; 0 for ever.
    limit_ns: Cell<u64>,
    /// Hears what is said about them.
    pub(super) heard: RefCell<Option<Heard>>,
    /// A task looks at them.
    watched: Cell<bool>,
    /// Set once there will be no more.
    over: Rc<Flag>,
}

/// A place for each request; places are used again.
#[derive(Default)]
struct Rows {
    all: Vec<Row>,
    free: Vec<u32>,
}

#[derive(Clone, Copy)]
struct Row {
    kind: IoKind,
    range: SectorRange,
    since_ns: u64,
    state: State,
    said: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    Held,
    Down,
}

impl Open {
    fn row(&self, at: u32) -> Row {
        self.rows.borrow().all[at as usize]
    }

    fn change(&self, at: u32, change: impl FnOnce(&mut Row)) {
        change(&mut self.rows.borrow_mut().all[at as usize]);
    }

    fn insert(&self, row: Row) -> u32 {
        let mut rows = self.rows.borrow_mut();
        match rows.free.pop() {
            Some(at) => {
                rows.all[at as usize] = row;
                at
            }
            None => {
                rows.all.push(row);
                u32::try_from(rows.all.len() - 1).expect("requests are bounded by memory")
            }
        }
    }

    fn remove(&self, at: u32) {
        let mut rows = self.rows.borrow_mut();
        rows.all[at as usize].state = State::Free;
        rows.free.push(at);
    }

    fn say(&self, host: &impl Log, event: Event) {
        host.log(event);
        let heard = self.heard.borrow().clone();
        heard.iter().for_each(|heard| heard(&event));
    }

    pub(super) fn set_limit(&self, limit_ns: u64) {
        self.limit_ns.set(limit_ns);
    }

    pub(super) fn end(&self) {
        self.over.set();
    }
}

/// A request that was accepted, until it is answered or dropped.
pub(super) struct Accepted<H: Time + Log + Tasks + Probe> {
    inner: Rc<Inner<H>>,
    at: u32,
}

impl<H: Time + Log + Tasks + Probe> Accepted<H> {
    /// A request that waits until [`Accepted::goes_down`].
    pub(super) fn new(inner: &Rc<Inner<H>>, request: &Request) -> Self {
        let kind = match kind_of(request) {
            IoKind::WriteZeroes if inner.host.bug(&ZEROES_AS_WRITES) => IoKind::Write,
            kind => kind,
        };
        let open = &inner.open;
        open.measures.borrow_mut().of_mut(kind).in_flight += 1;
        let (range, since_ns) = (request.range, inner.host.now_ns());
        let at = open.insert(Row { kind, range, since_ns, state: State::Held, said: false });
        if open.limit_ns.get() > 0 && !open.watched.replace(true) {
            watch(inner);
        }
        Self { inner: Rc::clone(inner), at }
    }

    pub(super) fn goes_down(&self) {
        let now_ns = self.inner.host.bug(&LATENCY_FROM_ADMISSION).then(|| self.inner.host.now_ns());
        self.inner.open.change(self.at, |row| {
            row.state = State::Down;
            row.since_ns = now_ns.unwrap_or(row.since_ns);
        });
    }

    pub(super) fn answered(&self, result: Result<(), Errno>) {
        let Row { kind, range, since_ns, .. } = self.inner.open.row(self.at);
        let ns = self.inner.host.now_ns().saturating_sub(since_ns);
        let mut measures = self.inner.open.measures.borrow_mut();
        let own = measures.of_mut(kind);
        match result {
            Ok(()) => own.sectors += u64::from(range.count),
            Err(_) => own.errors += 1,
        }
        own.latency.note(ns);
    }
}

impl<H: Time + Log + Tasks + Probe> Drop for Accepted<H> {
    fn drop(&mut self) {
        // A second panic here would abort the process.
        if std::thread::panicking() {
            return;
        }
        let Inner { host, id, open, .. } = &*self.inner;
        let Row { kind, range, since_ns, said, .. } = open.row(self.at);
        open.measures.borrow_mut().of_mut(kind).in_flight -= 1;
        open.remove(self.at);
        if said {
            host.mark(&HANG_ENDED);
            let for_ms = host.now_ns().saturating_sub(since_ns) / NS_PER_MS;
            open.say(host, Event::RequestHung { vbd: *id, kind, range, for_ms });
        }
    }
}

const NS_PER_MS: u64 = 1_000_000;

/// Starts the task that says which requests take too long. It ends when it finds no open request.
fn watch<H: Time + Log + Tasks + Probe>(inner: &Rc<Inner<H>>) {
    let (weak, host, over) = (Rc::downgrade(inner), inner.host.clone(), Rc::clone(&inner.open.over));
    inner.host.spawn("watchdog", u64::from(inner.id.0), async move {
        loop {
            let Some(inner) = weak.upgrade() else { return };
            let Some(pause_ns) = look(&inner) else {
                inner.open.watched.set(false);
                return;
            };
            drop(inner);
            select(host.sleep_ns(pause_ns), over.wait()).await;
            if over.is_set() {
                return;
            }
        }
    });
}

/// Says which requests take too long, and returns when to look again; `None` if there are none.
fn look<H: Time + Log + Tasks + Probe>(inner: &Rc<Inner<H>>) -> Option<u64> {
    let Inner { host, id, open, .. } = &**inner;
    let (now_ns, limit_ns) = (host.now_ns(), open.limit_ns.get());
    let (mut late, mut next_ns) = (Vec::new(), None);
    for row in open.rows.borrow_mut().all.iter_mut().filter(|row| row.state != State::Free) {
        let left_ns = (row.since_ns + limit_ns).saturating_sub(now_ns);
        if left_ns == 0 && !row.said {
            row.said = true;
            late.push(*row);
        }
        // What was said is only looked at again to see whether it is still there.
        let again_ns = if row.said { limit_ns } else { left_ns };
        next_ns = Some(next_ns.map_or(again_ns, |next: u64| next.min(again_ns)));
    }
    if late.is_empty() {
        return next_ns;
    }
    let below = wait_report(inner.lower());
    for row in late {
        if row.state == State::Held && host.bug(&HANG_UNSAID) {
            continue;
        }
        host.mark(&HANG_SAID);
        let at = match row.state {
            State::Held if !host.bug(&HANG_ELSEWHERE) => Whereabouts::Paused,
            _ => whereabouts(&row, &below),
        };
        let for_ms = now_ns.saturating_sub(row.since_ns) / NS_PER_MS;
        open.say(host, Event::RequestHangs { vbd: *id, kind: row.kind, range: row.range, for_ms, at });
    }
    next_ns
}

/// Where a request is that went down.
fn whereabouts(row: &Row, below: &[WaitReport]) -> Whereabouts {
    // As the scheduler calls them.
    let name = match row.kind {
        IoKind::Read => "read",
        IoKind::Write => "write",
        IoKind::WriteZeroes => "zeroes",
        IoKind::Discard => "discard",
        IoKind::Flush => return Whereabouts::Image,
    };
    let is_own =
        |report: &&WaitReport| report.ticket.name == name && report.ticket.number == row.range.start.0;
    match below.iter().find(is_own).map(|report| &report.waits_for) {
        Some(WaitsFor::Tickets(before)) => match before.first() {
            Some(first) => Whereabouts::Behind { what: first.name, sector: first.number },
            None => Whereabouts::Image,
        },
        Some(WaitsFor::Place(_) | WaitsFor::Turn) => Whereabouts::Line,
        Some(WaitsFor::Below) | None => Whereabouts::Image,
    }
}

/// What a request or a query is answered with.
pub(super) trait Answer: 'static {
    fn result(&self) -> Result<(), Errno>;
}

impl Answer for Response {
    fn result(&self) -> Result<(), Errno> {
        self.result
    }
}

impl Answer for Result<Vec<Extent>, Errno> {
    fn result(&self) -> Result<(), Errno> {
        self.as_ref().map(drop).map_err(|error| *error)
    }
}
