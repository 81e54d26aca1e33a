//! One request: from the copy of its entry to its result.

use crate::ring::{Done, Inner, status_of};
use smallvec::SmallVec;
use std::future::Future;
use std::rc::Rc;
use tap_abi::blkif::{BlkifOp, BlkifRequest, MAX_SEGMENTS, Malformed, STATUS_ERROR};
use tap_core::{Request, Response};
use tap_host::{
    Errno, Event, Events, GrantRef, GrantSegment, Grants, IoBuf, IoKind, IoVec, Log, Probe, SECTOR_BYTES,
    SectorRange, SharedPages, Tasks, Time, VbdId,
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
}

/// Whether the disk can serve `request`.
pub(crate) fn check(request: &BlkifRequest, size_sectors: u64, read_only: bool) -> Result<(), Malformed> {
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
        let kind = match self.op {
            BlkifOp::Read => IoKind::Read,
            BlkifOp::Write => IoKind::Write,
            BlkifOp::Flush => IoKind::Flush,
        };
        Event::RequestTaken { vbd, id: self.id, kind, range: self.range() }
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
    pub(crate) fn start<H>(self, ring: &Rc<Inner<H>>, slot: u8, buf: Option<IoBuf>)
    where
        H: Time + Tasks + Log + Probe + Grants + Events + SharedPages,
    {
        let mut bufs: IoVec = buf.into_iter().collect();
        if self.op != BlkifOp::Read
            && let Some(buf) = bufs.first_mut()
            && let Err(error) = self.copy_in(ring, buf)
        {
            ring.refused(self.id, "its data cannot be copied from the guest");
            return self.end(ring, slot, Err(error));
        }
        let node = &ring.parts.node;
        let (host, own, key) = (&ring.parts.host, Rc::clone(ring), self.sector);
        let (role, first) = match self.op {
            BlkifOp::Read => ("read", node.submit(Request::read(self.range(), bufs))),
            BlkifOp::Write => ("write", node.submit(Request::write(self.range(), bufs))),
            BlkifOp::Flush if bufs.is_empty() => ("flush", node.submit(Request::flush())),
            BlkifOp::Flush => {
                let all = self.flush_around(ring, slot, bufs);
                return host.spawn("flush", key, async move { self.end(&own, slot, all.await) });
            }
        };
        // One block without inner futures: such a task is made, moved and freed half a million times a second.
        host.spawn(role, key, async move {
            let result = self.answer(&own, first.await);
            self.end(&own, slot, result);
        });
    }

    fn copy_in<H>(&self, ring: &Inner<H>, buf: &mut [u8]) -> Result<(), Errno>
    where
        H: Time + Tasks + Log + Probe + Grants + Events + SharedPages,
    {
        let (host, dom, segments) =
            (&ring.parts.host, ring.parts.config.dom, self.segments(&ring.parts.host));
        let copied = host.copy_in(dom, &segments, buf);
        if copied.is_err() && host.bug(&COPY_IN_FIRST) {
            return host.copy_in(dom, &segments[1..], &mut buf[usize::from(segments[0].len)..]);
        }
        copied
    }

    fn end<H>(&self, ring: &Inner<H>, slot: u8, result: Result<(), Errno>)
    where
        H: Time + Tasks + Log + Probe + Grants + Events + SharedPages,
    {
        ring.done(Done { slot, id: self.id, op: self.op as u8, status: status_of(result) });
    }

    /// The rest of the work, after the node has answered.
    fn answer<H>(&self, ring: &Inner<H>, response: Response) -> Result<(), Errno>
    where
        H: Time + Tasks + Log + Probe + Grants + Events + SharedPages,
    {
        response.result?;
        match (self.op, response.bufs.first()) {
            (BlkifOp::Read, Some(buf)) => ring
                .parts
                .host
                .copy_out(ring.parts.config.dom, &self.segments(&ring.parts.host), buf)
                .inspect_err(|_| ring.refused(self.id, "its data cannot be copied to the guest"))
                .or_else(|error| if ring.parts.host.bug(&COPY_OUT_IGNORED) { Ok(()) } else { Err(error) }),
            _ => Ok(()),
        }
    }

    /// A flush with data: everything before is durable before the data is written, and the data after.
    fn flush_around<H>(
        self,
        ring: &Rc<Inner<H>>,
        slot: u8,
        data: IoVec,
    ) -> impl Future<Output = Result<(), Errno>> + use<H>
    where
        H: Time + Tasks + Log + Probe + Grants + Events + SharedPages,
    {
        let (own, range) = (Rc::clone(ring), self.range());
        let first = own.parts.node.submit(Request::flush());
        own.fenced.borrow_mut().push((slot, range));
        async move {
            let flushed = if own.parts.host.bug(&FLUSH_DATA_EARLY) { Ok(()) } else { first.await.result };
            let result = own.after_flush(flushed, range, data).await;
            own.lift_fence(slot);
            result
        }
    }
}

impl<H> Inner<H>
where
    H: Time + Tasks + Log + Probe + Grants + Events + SharedPages,
{
    /// The second half of a flush with data.
    async fn after_flush(
        &self,
        flushed: Result<(), Errno>,
        range: SectorRange,
        data: IoVec,
    ) -> Result<(), Errno> {
        flushed?;
        self.parts.node.submit(Request::write(range, data)).await.result?;
        self.parts.node.submit(Request::flush()).await.result
    }
}
