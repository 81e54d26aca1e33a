//! Sends requests down: single ones with retries, and merged ones with their parts.

use super::Inner;
use super::line::Depth;
use crate::{Request, Response};
use smallvec::SmallVec;
use std::rc::Rc;
use std::task::Waker;
use tap_host::{Errno, Event, IoVec, Log, Probe, SectorRange, Tasks, Time, Tried};

tap_host::listed! {
    pub(super) BUGS: Bug;
    MERGED_ERROR_LOST = "merged-error-lost", "the error of a merged request reaches only its head";
    MERGED_ERROR_SHARED = "merged-error-shared",
        "if a merged request fails, so do all of its parts, also those that nothing is wrong with";
    RETRIED_AT_ONCE = "retried-at-once",
        "what a transient error refused is asked for again without a pause";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    REQUESTS_MERGED = "requests-merged", "contiguous requests were merged";
    MERGED_SPLIT = "merged-split", "a merged request failed and its parts were repeated one by one";
    REQUEST_RETRIED = "request-retried", "a request was repeated after a transient error";
}

/// One part of a merged request.
pub(super) struct Part {
    slot: u32,
    range: SectorRange,
    bufs: IoVec,
    /// Number of its buffers in the merged request.
    count: usize,
    op: crate::Op,
    fua: bool,
}

impl Part {
    pub(super) fn new(slot: u32, request: Request) -> Self {
        let Request { op, range, bufs, fua } = request;
        Self { slot, range, count: bufs.len(), bufs, op, fua }
    }
}

pub(super) type Parts = SmallVec<[Part; 4]>;

/// A merged request: its parts by sector.
pub(super) struct Batch<H: Time + Tasks + Log + Probe> {
    inner: Rc<Inner<H>>,
    parts: Parts,
    answered: usize,
    _depth: Depth<H>,
}

impl<H: Time + Tasks + Log + Probe> Inner<H> {
    /// Sends `request` down, again after transient errors. Not an `async fn`: its future would hold the request twice,
    /// as the argument and as the variable.
    pub(super) fn attempt(&self, mut request: Request) -> impl Future<Output = Response> {
        let (op, range, fua) = (request.op, request.range, request.fua);
        let mut patience = self.limits.patience();
        async move {
            loop {
                self.count(|s| s.lower_requests += 1);
                let response = self.lower.submit(request).await;
                let Err(error) = response.result else { return response };
                if !Tried::Request.may_pass(error) {
                    return response;
                }
                let Some(pause_ns) = patience.next_pause_ns() else { return response };
                self.host.mark(&REQUEST_RETRIED);
                self.host.log(Event::Retried { range, error });
                self.count(|s| s.retries += 1);
                if !self.host.bug(&RETRIED_AT_ONCE) {
                    self.host.sleep_ns(pause_ns).await;
                }
                request = Request { op, range, bufs: response.bufs, fua };
            }
        }
    }
}

impl<H: Time + Tasks + Log + Probe> Batch<H> {
    pub(super) fn new(inner: &Rc<Inner<H>>, parts: Parts, depth: Depth<H>) -> Self {
        Self { inner: Rc::clone(inner), parts, answered: 0, _depth: depth }
    }

    pub(super) async fn run(mut self) {
        let merged = self.merge();
        self.inner.host.mark(&REQUESTS_MERGED);
        self.inner.host.log(Event::Merged { parts: self.parts.len() as u32, range: merged.range });
        self.inner.count(|s| s.merged += self.parts.len() as u64 - 1);
        let response = self.inner.attempt(merged).await;
        self.hand_back(response.bufs);
        match response.result {
            Ok(()) => self.answer_all(|_| Ok(())),
            Err(e) if self.inner.host.bug(&MERGED_ERROR_LOST) => {
                self.answer_all(|part| if part == 0 { Err(e) } else { Ok(()) });
            }
            Err(e) if self.inner.host.bug(&MERGED_ERROR_SHARED) => self.answer_all(|_| Err(e)),
            Err(_) => self.repeat_alone().await,
        }
    }

    fn merge(&mut self) -> Request {
        let first = &self.parts[0];
        let (op, start, fua) = (first.op, first.range.start.0, first.fua);
        let count = self.parts.iter().map(|p| p.range.count).sum();
        assert!(count <= self.inner.limits.merge_sectors, "{count} sectors exceed the merge limit");
        let bufs = self.parts.iter_mut().flat_map(|p| p.bufs.drain(..)).collect();
        Request { op, range: SectorRange::new(start, count), bufs, fua }
    }

    fn hand_back(&mut self, bufs: IoVec) {
        let mut bufs = bufs.into_iter();
        for part in &mut self.parts {
            part.bufs.extend(bufs.by_ref().take(part.count));
            assert_eq!(part.bufs.len(), part.count, "a node answers with the buffers of the request");
        }
    }

    async fn repeat_alone(&mut self) {
        self.inner.host.mark(&MERGED_SPLIT);
        while let Some(part) = self.parts.get_mut(self.answered) {
            let bufs = std::mem::take(&mut part.bufs);
            let request = Request { op: part.op, range: part.range, bufs, fua: part.fua };
            let response = self.inner.attempt(request).await;
            self.answer_next(response);
        }
    }

    fn answer_all(&mut self, result: impl Fn(usize) -> Result<(), Errno>) {
        while let Some(part) = self.parts.get_mut(self.answered) {
            let bufs = std::mem::take(&mut part.bufs);
            self.answer_next(Response { result: result(self.answered), bufs });
        }
    }

    fn answer_next(&mut self, response: Response) {
        let slot = self.parts[self.answered].slot;
        self.answered += 1;
        let woken = self.inner.line.borrow_mut().deliver(slot, response);
        woken.into_iter().for_each(Waker::wake);
    }
}
