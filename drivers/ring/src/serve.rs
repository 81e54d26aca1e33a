//! One request: from the copy of its entry to its result.

use crate::completions::{Completions, Done};
use crate::config::RingConfig;
use smallvec::SmallVec;
use std::future::Future;
use std::rc::Rc;
use tap_abi::blkif::{
    BlkifOp, BlkifRequest, ENTRY_BYTES, MAX_SEGMENTS, Malformed, STATUS_EOPNOTSUPP, STATUS_ERROR, STATUS_OKAY,
};
use tap_core::{Node, Request, Response};
use tap_host::{
    DomId, Errno, Event, GrantRef, GrantSegment, Grants, IoBuf, IoKind, IoVec, Log, Probe, SECTOR_BYTES,
    SectorRange, Tasks, VbdId,
};

tap_host::listed! {
    pub(super) BUGS: Bug;
    SEGMENT_FIRST_IGNORED = "segment-first-ignored",
        "the data of a segment is taken from the start of its page";
    COPY_IN_FIRST = "copy-in-first",
        "a failure to copy the first segment of a write from the guest goes unnoticed";
    COPY_OUT_IGNORED = "copy-out-ignored",
        "a read whose data could not be copied to the guest is answered as a success";
    FLUSH_DATA_EARLY = "flush-data-early",
        "the data of a flush is written before what the flush covers is durable";
    FLUSH_WRITES_FROZEN = "flush-writes-frozen", "a flush with data is carried out on a read-only disk";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    REQUEST_REFUSED = "request-refused", "a malformed request was answered with an error";
}

/// What the requests of one ring are served with. It outlives none of them.
pub(crate) struct Target<H> {
    pub(crate) host: H,
    node: Rc<dyn Node>,
    dom: DomId,
    vbd: VbdId,
    size_sectors: u64,
    read_only: bool,
    pub(crate) completions: Completions,
}

impl<H: Log + Probe> Target<H> {
    pub(crate) fn new(host: H, node: Rc<dyn Node>, config: &RingConfig) -> Self {
        let info = node.info();
        Self {
            host,
            node,
            dom: config.dom,
            vbd: config.vbd,
            size_sectors: info.size_sectors,
            read_only: info.read_only || config.read_only,
            completions: Completions::default(),
        }
    }

    /// Parses and checks a private copy of an entry.
    pub(crate) fn look_at(&self, entry: &[u8; ENTRY_BYTES]) -> Result<Job, Malformed> {
        let request = BlkifRequest::parse(entry)?;
        let flush_slips = request.op == BlkifOp::Flush && self.host.bug(&FLUSH_WRITES_FROZEN);
        check(&request, self.size_sectors, self.read_only && !flush_slips)?;
        Ok(Job(request))
    }

    pub(crate) fn refused(&self, id: u64, why: &'static str) {
        self.host.mark(&REQUEST_REFUSED);
        self.host.log(Event::RequestRefused { vbd: self.vbd, id, why });
    }

    /// The second half of a flush with data.
    async fn after_flush(
        &self,
        flushed: Result<(), Errno>,
        range: SectorRange,
        data: IoVec,
    ) -> Result<(), Errno> {
        flushed?;
        self.node.submit(Request::write(range, data)).await.result?;
        self.node.submit(Request::flush()).await.result
    }
}

/// The status that the guest gets for the result of a request.
fn status_of(result: Result<(), Errno>) -> i16 {
    match result {
        Ok(()) => STATUS_OKAY,
        Err(Errno::EOPNOTSUPP) => STATUS_EOPNOTSUPP,
        Err(_) => STATUS_ERROR,
    }
}

/// Whether the disk can serve `request`.
fn check(request: &BlkifRequest, size_sectors: u64, read_only: bool) -> Result<(), Malformed> {
    let count = request.count();
    let why = if count > 0 && !SectorRange::new(request.sector, count).fits(size_sectors) {
        "outside the disk"
    } else if read_only && count > 0 && request.op != BlkifOp::Read {
        "write to a read-only disk"
    } else {
        return Ok(());
    };
    Err(Malformed { id: request.id, op: request.op as u8, status: STATUS_ERROR, why })
}

/// A request that was checked.
#[derive(Clone, Copy)]
pub(crate) struct Job(pub(crate) BlkifRequest);

impl std::ops::Deref for Job {
    type Target = BlkifRequest;
    fn deref(&self) -> &BlkifRequest {
        &self.0
    }
}

impl Job {
    /// The sectors it covers; none for a flush without data.
    pub(crate) fn range(&self) -> SectorRange {
        match self.count() {
            0 => SectorRange::default(),
            count => SectorRange::new(self.sector, count),
        }
    }

    pub(crate) fn taken_event(&self, vbd: VbdId) -> Event {
        Event::RequestTaken { vbd, id: self.id, kind: self.kind(), range: self.range() }
    }

    fn kind(&self) -> IoKind {
        match self.op {
            BlkifOp::Read => IoKind::Read,
            BlkifOp::Write => IoKind::Write,
            BlkifOp::Flush => IoKind::Flush,
        }
    }

    fn segments(&self, host: &impl Probe) -> SmallVec<[GrantSegment; MAX_SEGMENTS]> {
        let whole = host.bug(&SEGMENT_FIRST_IGNORED);
        let segments = self.0.segments().iter();
        segments
            .map(|s| GrantSegment {
                gref: GrantRef(s.gref),
                offset: if whole { 0 } else { u16::from(s.first) * SECTOR_BYTES as u16 },
                len: u16::from(s.count()) * SECTOR_BYTES as u16,
            })
            .collect()
    }

    /// Hands the request to the node, in the order of the calls, and spawns a task for the rest. The data of a
    /// write is copied from the guest here, once.
    pub(crate) fn start<H>(self, target: &Rc<Target<H>>, slot: u8, buf: Option<IoBuf>)
    where
        H: Tasks + Log + Probe + Grants,
    {
        let mut bufs: IoVec = buf.into_iter().collect();
        if self.op != BlkifOp::Read
            && let Some(buf) = bufs.first_mut()
            && let Err(error) = self.copy_in(target, buf)
        {
            target.refused(self.id, "its data cannot be copied from the guest");
            return self.end(target, slot, Err(error));
        }
        let node = &target.node;
        let (host, own, key) = (&target.host, Rc::clone(target), self.sector);
        let (role, first) = match self.op {
            BlkifOp::Read => ("read", node.submit(Request::read(self.range(), bufs))),
            BlkifOp::Write => ("write", node.submit(Request::write(self.range(), bufs))),
            BlkifOp::Flush if bufs.is_empty() => ("flush", node.submit(Request::flush())),
            BlkifOp::Flush => {
                let all = self.flush_around(target, slot, bufs);
                return host.spawn("flush", key, async move {
                    let result = all.await.inspect_err(|error| self.failed(&own, *error));
                    self.end(&own, slot, result);
                });
            }
        };
        // One block without inner futures: such a task is made, moved and freed half a million times a second.
        host.spawn(role, key, async move {
            let result = self.answer(&own, first.await);
            self.end(&own, slot, result);
        });
    }

    fn copy_in<H>(&self, target: &Target<H>, buf: &mut [u8]) -> Result<(), Errno>
    where
        H: Tasks + Log + Probe + Grants,
    {
        let (host, dom, segments) = (&target.host, target.dom, self.segments(&target.host));
        let copied = host.copy_in(dom, &segments, buf);
        if copied.is_err() && host.bug(&COPY_IN_FIRST) {
            return host.copy_in(dom, &segments[1..], &mut buf[usize::from(segments[0].len)..]);
        }
        copied
    }

    fn end<H>(&self, target: &Target<H>, slot: u8, result: Result<(), Errno>)
    where
        H: Tasks + Log + Probe + Grants,
    {
        target.completions.done(Done { slot, id: self.id, op: self.op as u8, status: status_of(result) });
    }

    /// The guest gets a status only, and the operator needs to know why.
    fn failed<H: Log>(&self, target: &Target<H>, error: Errno) {
        if error != Errno::EOPNOTSUPP {
            let (vbd, range) = (target.vbd, self.range());
            target.host.log(Event::RequestFailed { vbd, kind: self.kind(), range, error });
        }
    }

    /// The rest of the work, after the node has answered.
    fn answer<H>(&self, target: &Target<H>, response: Response) -> Result<(), Errno>
    where
        H: Tasks + Log + Probe + Grants,
    {
        response.result.inspect_err(|error| self.failed(target, *error))?;
        match (self.op, response.bufs.first()) {
            (BlkifOp::Read, Some(buf)) => target
                .host
                .copy_out(target.dom, &self.segments(&target.host), buf)
                .inspect_err(|_| target.refused(self.id, "its data cannot be copied to the guest"))
                .or_else(|error| if target.host.bug(&COPY_OUT_IGNORED) { Ok(()) } else { Err(error) }),
            _ => Ok(()),
        }
    }

    /// A flush with data: everything before is durable before the data is written, and the data after.
    fn flush_around<H>(
        self,
        target: &Rc<Target<H>>,
        slot: u8,
        data: IoVec,
    ) -> impl Future<Output = Result<(), Errno>> + use<H>
    where
        H: Tasks + Log + Probe + Grants,
    {
        let (own, range) = (Rc::clone(target), self.range());
        let first = own.node.submit(Request::flush());
        own.completions.fence(slot, range);
        async move {
            let flushed = if own.host.bug(&FLUSH_DATA_EARLY) { Ok(()) } else { first.await.result };
            let result = own.after_flush(flushed, range, data).await;
            own.completions.lift_fence(slot);
            result
        }
    }
}
