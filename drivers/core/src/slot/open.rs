//! Requests that a slot has accepted and not answered yet.

use super::Inner;
use crate::measures::kind_of;
use crate::{Extent, Request, Response};
use std::rc::Rc;
use tap_host::{Errno, IoKind, Log, Probe, Time};

tap_host::listed! {
    pub(super) BUGS: Bug;
    LATENCY_FROM_ADMISSION = "latency-from-admission",
        "the time for which a request waits because its disk is paused is not measured";
    ZEROES_AS_WRITES = "zeroes-as-writes", "requests to zero sectors are measured as writes";
}

/// A request that was accepted, until it is answered or dropped.
pub(super) struct Accepted<H: Time + Log + Probe> {
    inner: Rc<Inner<H>>,
    kind: IoKind,
    sectors: u32,
    since_ns: u64,
}

impl<H: Time + Log + Probe> Accepted<H> {
    pub(super) fn new(inner: &Rc<Inner<H>>, request: &Request) -> Self {
        let kind = match kind_of(request) {
            IoKind::WriteZeroes if inner.host.bug(&ZEROES_AS_WRITES) => IoKind::Write,
            kind => kind,
        };
        inner.measures.borrow_mut().of_mut(kind).in_flight += 1;
        let (inner, since_ns) = (Rc::clone(inner), inner.host.now_ns());
        Self { inner, kind, sectors: request.range.count, since_ns }
    }

    /// It waited, and goes down now.
    pub(super) fn admitted(&mut self) {
        if self.inner.host.bug(&LATENCY_FROM_ADMISSION) {
            self.since_ns = self.inner.host.now_ns();
        }
    }

    pub(super) fn answered(&self, result: Result<(), Errno>) {
        let ns = self.inner.host.now_ns().saturating_sub(self.since_ns);
        let mut measures = self.inner.measures.borrow_mut();
        let own = measures.of_mut(self.kind);
        match result {
            Ok(()) => own.sectors += u64::from(self.sectors),
            Err(_) => own.errors += 1,
        }
        own.latency.note(ns);
    }
}

impl<H: Time + Log + Probe> Drop for Accepted<H> {
    fn drop(&mut self) {
        // A second panic here would abort the process.
        if !std::thread::panicking() {
            self.inner.measures.borrow_mut().of_mut(self.kind).in_flight -= 1;
        }
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
