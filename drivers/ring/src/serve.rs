//! One request: from the copy of its entry to its result.

use crate::completions::{Completions, Done};
use crate::peer::{Bad, Kind, Peer, RingRequest};
use crate::slots::Taken;
use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use tap_abi::blkif::{ENTRY_BYTES, Malformed, STATUS_EOPNOTSUPP, STATUS_ERROR, STATUS_OKAY};
use tap_core::{Node, Request, Response};
use tap_host::{Errno, Event, IoBuf, IoVec, Log, Probe, SectorRange, Tasks, VbdId};

tap_host::listed! {
    pub(super) BUGS: Bug;
    COPY_OUT_IGNORED = "copy-out-ignored",
        "a read whose data could not be copied to the guest is answered as a success";
    FLUSH_DATA_EARLY = "flush-data-early",
        "the data of a flush is written before what the flush covers is durable";
    FLUSH_WRITES_FROZEN = "flush-writes-frozen", "a flush with data is carried out on a read-only disk";
    RING_SIZE_KEPT = "ring-size-kept", "a ring refuses what lies past the end that its disk had at first";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    REQUEST_REFUSED = "request-refused", "a malformed request was answered with an error";
}

/// What the requests of one ring are served with. It outlives none of them.
pub(crate) struct Target<H, P> {
    pub(crate) host: H,
    pub(crate) peer: P,
    node: Rc<dyn Node>,
    vbd: VbdId,
    /// What the disk had when it was looked at last; it may be larger by now, and never smaller.
    size_sectors: Cell<u64>,
    read_only: bool,
    /// Every change is durable when it is answered.
    pub(crate) write_through: Cell<bool>,
    pub(crate) completions: Completions,
}

impl<H: Log + Probe, P: Peer<H>> Target<H, P> {
    pub(crate) fn new(host: H, peer: P, node: Rc<dyn Node>, vbd: VbdId, read_only: bool) -> Self {
        let info = node.info();
        Self {
            host,
            peer,
            node,
            vbd,
            size_sectors: Cell::new(info.size_sectors),
            read_only: info.read_only || read_only,
            write_through: Cell::new(false),
            completions: Completions::default(),
        }
    }

    /// Parses and checks a private copy of an entry.
    pub(crate) fn look_at(&self, entry: &[u8; ENTRY_BYTES]) -> Result<P::Request, Bad> {
        let request = self.peer.parse(entry)?;
        let flush_slips = request.kind() == Kind::Flush && self.host.bug(&FLUSH_WRITES_FROZEN);
        let inside = request.count() == 0 || self.has(SectorRange::new(request.sector(), request.count()));
        check(&request, inside, self.read_only && !flush_slips).map_err(Bad::Answer)?;
        Ok(request)
    }

    /// Whether the disk has all of `range`.
    fn has(&self, range: SectorRange) -> bool {
        if !range.fits(self.size_sectors.get()) && !self.host.bug(&RING_SIZE_KEPT) {
            // A disk has another size only once its image has it, durably.
            self.size_sectors.set(self.node.info().size_sectors);
        }
        range.fits(self.size_sectors.get())
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

    fn end(&self, taken: Taken, result: Result<(), Errno>) {
        self.completions.done(Done { taken, status: status_of(result) });
    }

    /// The other end gets a status only, and the operator needs to know why.
    fn failed(&self, request: &P::Request, error: Errno) {
        if error != Errno::EOPNOTSUPP {
            let (vbd, range) = (self.vbd, request.range());
            self.host.log(Event::RequestFailed { vbd, kind: request.kind().into(), range, error });
        }
    }

    /// The rest of the work, after the node has answered.
    fn answer(&self, request: &P::Request, response: Response) -> Result<(), Errno> {
        response.result.inspect_err(|error| self.failed(request, *error))?;
        match (request.kind(), response.bufs.first()) {
            (Kind::Read, Some(buf)) => self
                .peer
                .copy_out(&self.host, request, buf)
                .inspect_err(|_| self.refused(request.id(), "its data cannot be copied to the guest"))
                .or_else(|error| if self.host.bug(&COPY_OUT_IGNORED) { Ok(()) } else { Err(error) }),
            _ => Ok(()),
        }
    }
}

impl<H: Tasks + Log + Probe, P: Peer<H>> Target<H, P> {
    /// Hands the request to the node, in the order of the calls, and spawns a task for the rest. The data of a
    /// write is copied here, once.
    pub(crate) fn start(self: &Rc<Self>, request: P::Request, taken: Taken, buf: Option<IoBuf>) {
        let mut bufs: IoVec = buf.into_iter().collect();
        if request.kind() != Kind::Read
            && let Some(buf) = bufs.first_mut()
            && let Err(error) = self.peer.copy_in(&self.host, &request, buf)
        {
            self.refused(request.id(), "its data cannot be copied from the guest");
            return self.end(taken, Err(error));
        }
        let (node, fua, range) = (&self.node, self.write_through.get(), request.range());
        let (own, key) = (Rc::clone(self), request.sector());
        let (role, first) = match request.kind() {
            Kind::Read => ("read", node.submit(Request::read(range, bufs))),
            Kind::Write => ("write", node.submit(Request::write(range, bufs).with_fua(fua))),
            Kind::Discard => ("discard", node.submit(Request::discard(range).with_fua(fua))),
            Kind::Flush if bufs.is_empty() => ("flush", node.submit(Request::flush())),
            Kind::Flush => {
                let all = self.flush_around(taken.slot(), range, bufs);
                return self.host.spawn("flush", key, async move {
                    let result = all.await.inspect_err(|error| own.failed(&request, *error));
                    own.end(taken, result);
                });
            }
        };
        // One block without inner futures: such a task is made, moved and freed half a million times a second.
        self.host.spawn(role, key, async move {
            let result = own.answer(&request, first.await);
            own.end(taken, result);
        });
    }

    /// A flush with data: everything before is durable before the data is written, and the data after.
    fn flush_around(
        self: &Rc<Self>,
        slot: u8,
        range: SectorRange,
        data: IoVec,
    ) -> impl Future<Output = Result<(), Errno>> + use<H, P> {
        let own = Rc::clone(self);
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

/// The status that the other end gets for the result of a request.
fn status_of(result: Result<(), Errno>) -> i16 {
    match result {
        Ok(()) => STATUS_OKAY,
        Err(Errno::EOPNOTSUPP) => STATUS_EOPNOTSUPP,
        Err(_) => STATUS_ERROR,
    }
}

/// Whether the disk can serve `request`, whose sectors are `inside` it or not.
fn check(request: &impl RingRequest, inside: bool, read_only: bool) -> Result<(), Malformed> {
    let why = if !inside {
        "outside the disk"
    } else if read_only && request.count() > 0 && request.kind() != Kind::Read {
        "write to a read-only disk"
    } else {
        return Ok(());
    };
    Err(Malformed { id: request.id(), op: request.op(), status: STATUS_ERROR, why })
}
