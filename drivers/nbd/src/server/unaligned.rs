//! Requests that begin or end inside a sector.
//!
//! ```text
//!   bytes          ├─────────────────────────────────┤
//!   sectors  │   head   │  whole  │  whole  │   tail   │
//!                 └ read, changed, written ──────┘
//! ```
//!
//! A node only knows whole sectors. So an unaligned read reads the sectors around it, and an unaligned write reads the
//! sectors at its edges first. Between this read and the write of the same sector no other write of it may be
//! submitted, or its bytes would be lost: the edges are claimed, and every write of the export that overlaps a claim
//! waits. Writes that were submitted before are no danger, because the node orders the read after them. Once the last
//! request is submitted, the node orders what follows.

use super::command::Job;
use super::connection::{Connection, Why};
use crate::inlet::Inlet;
use futures_util::future::join_all;
use smallvec::smallvec;
use std::rc::Rc;
use tap_core::{Access, Op, Request, Response, Space, Ticket};
use tap_host::{
    Errno, IoBuf, IoVec, Log, PAGE_BYTES, Probe, SECTOR_BYTES, SectorRange, Share, Stream, Tasks, Time,
};

tap_host::listed! {
    pub(super) BUGS: Bug;
    NBD_PIECE_FORGIVEN = "nbd-piece-forgiven",
        "long zeros whose first or last piece failed are answered with success";
    NBD_EDGES_UNCLAIMED = "nbd-edges-unclaimed",
        "the sectors at the edges of an unaligned write are not claimed, so that two writes of one sector lose bytes";
    NBD_TAIL_UNREAD = "nbd-tail-unread", "an unaligned write does not keep the rest of its last sector";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    NBD_UNALIGNED_WRITE = "nbd-unaligned-write", "a part of a sector was written over NBD";
    NBD_EDGE_AWAITED = "nbd-edge-awaited", "a write waited for an unaligned one of the same sector";
}

/// What the first and the last sector of a request cost, in bytes.
pub(super) const EDGES_COST: usize = 2 * PAGE_BYTES;

const SECTOR: usize = SECTOR_BYTES as usize;

/// How an unaligned request is divided.
#[derive(Clone, Copy)]
struct Parts {
    /// Bytes in the first sector, 0 if that is whole.
    head: usize,
    /// The whole sectors.
    middle: SectorRange,
    /// Bytes in the last sector, 0 if that is whole or the first one.
    tail: usize,
}

impl Parts {
    fn of(job: &Job) -> Self {
        let (start, count) = (job.range.start.0, job.range.count);
        let (skip, cut) = (job.skip as usize, job.cut as usize);
        if count == 1 {
            return Self { head: SECTOR - skip - cut, middle: SectorRange::new(start, 0), tail: 0 };
        }
        let (head, tail) = ((SECTOR - skip) % SECTOR, (SECTOR - cut) % SECTOR);
        let edges = u32::from(head > 0) + u32::from(tail > 0);
        Self { head, middle: SectorRange::new(start + u64::from(head > 0), count - edges), tail }
    }
}

/// Memory for the sectors at the edges.
struct Edges {
    head: Option<IoBuf>,
    tail: Option<IoBuf>,
}

impl Edges {
    fn new(parts: Parts, share: &mut Share) -> Result<Self, Errno> {
        let mut sector = |bytes: usize| (bytes > 0).then(|| share.buffer(SECTOR)).transpose();
        Ok(Self { head: sector(parts.head)?, tail: sector(parts.tail)? })
    }
}

impl<H, S> Connection<H, S>
where
    H: Time + Tasks + Log + Probe,
    S: Stream,
{
    /// Starts a read, a write or zeros that begin or end inside a sector; receives the payload of a write.
    pub(super) async fn start_unaligned(
        self: &Rc<Self>,
        job: Job,
        op: Op,
        inlet: &mut Inlet<S>,
    ) -> Result<(), Why> {
        let parts = Parts::of(&job);
        let bytes = parts.middle.len_bytes() as usize;
        let bufs = if op.has_data() && bytes > 0 { self.buffers(bytes).await? } else { IoVec::new() };
        let own = Rc::clone(self);
        let number = job.range.start.0;
        match op {
            Op::Read => {
                self.host().spawn("nbd-read", number, async move {
                    let response = own.read_around(&job, parts, bufs).await;
                    own.answered(job, op, response);
                });
            }
            Op::Write => {
                self.receiving(true);
                let received = self.receive_parts(parts, bufs, inlet).await;
                self.receiving(false);
                let (edges, bufs) = received?;
                self.writes.set(self.writes.get() + 1);
                let turn = self.claim(&job);
                self.host().spawn("nbd-write", number, async move {
                    let result = own.write_around(&job, parts, &edges, bufs, turn).await;
                    own.done(job, result);
                });
            }
            _ => {
                let turn = self.claim(&job);
                self.host().spawn("nbd-zeroes", number, async move {
                    let result = own.zero_around(&job, op, parts, Some(turn)).await;
                    own.done(job, result);
                });
            }
        }
        Ok(())
    }

    /// Zeros of a piece of a longer request, whose sectors are claimed, that begins or ends inside a sector.
    pub(super) async fn zero_piece(&self, piece: &Job, op: Op) -> Result<(), Errno> {
        let result = self.zero_around(piece, op, Parts::of(piece), None).await;
        if self.host().bug(&NBD_PIECE_FORGIVEN) { Ok(()) } else { result }
    }

    /// The place of a request of `len` bytes, which goes to the node in pieces, among the writes of its sectors: none
    /// that comes later may be answered before its last piece.
    pub(super) fn claim_long(&self, job: &Job, len: u64) -> Ticket {
        let turn = self.agreed.export.edges.ticket("long write", job.at / SECTOR_BYTES);
        let end = job.at.saturating_add(len).div_ceil(SECTOR_BYTES);
        turn.claim(Space::Sectors, job.at / SECTOR_BYTES..end, Access::Exclusive);
        turn
    }

    /// The place of an unaligned write of `job` among the writes of its sectors.
    fn claim(&self, job: &Job) -> Ticket {
        self.host().mark(&NBD_UNALIGNED_WRITE);
        let turn = self.agreed.export.edges.ticket("unaligned write", job.range.start.0);
        if !self.host().bug(&NBD_EDGES_UNCLAIMED) {
            turn.claim(Space::Sectors, sectors(job.range), Access::Exclusive);
        }
        turn
    }

    /// The place of an aligned request, if it has to wait for unaligned writes.
    pub(super) fn turn_after_edges(&self, job: &Job, op: Op) -> Option<Ticket> {
        let edges = &self.agreed.export.edges;
        if edges.is_empty() || !op.is_write() {
            return None;
        }
        let turn = edges.ticket("write", job.range.start.0);
        // Exclusive: while it waits, a later one that overlaps it must not be answered first.
        turn.claim(Space::Sectors, sectors(job.range), Access::Exclusive);
        if turn.is_ready() {
            // It is submitted at once, so no later one needs to wait for it.
            return None;
        }
        self.host().mark(&NBD_EDGE_AWAITED);
        Some(turn)
    }

    /// The payload of a write: the bytes of both edges, and the buffers of the whole sectors.
    async fn receive_parts(
        &self,
        parts: Parts,
        bufs: IoVec,
        inlet: &mut Inlet<S>,
    ) -> Result<([Vec<u8>; 2], IoVec), Why> {
        let head = self.receive_edge(parts.head, inlet).await?;
        let bytes = parts.middle.len_bytes() as usize;
        let bufs = if bytes > 0 { self.receive(bufs, bytes, inlet).await? } else { bufs };
        let tail = self.receive_edge(parts.tail, inlet).await?;
        Ok(([head, tail], bufs))
    }

    async fn receive_edge(&self, bytes: usize, inlet: &mut Inlet<S>) -> Result<Vec<u8>, Why> {
        inlet.need(bytes, &self.stop).await.map_err(|end| self.why(end))?;
        let edge = inlet.unread()[..bytes].to_vec();
        inlet.take(bytes);
        Ok(edge)
    }

    async fn edges(&self, parts: Parts) -> Result<Edges, Errno> {
        Edges::new(parts, &mut self.server.memory.edges.take(EDGES_COST).await?)
    }

    async fn read_around(&self, job: &Job, parts: Parts, bufs: IoVec) -> Response {
        match self.edges(parts).await {
            Ok(edges) => {
                let bufs = edges.head.into_iter().chain(bufs).chain(edges.tail).collect();
                self.agreed.export.node.submit(Request::read(job.range, bufs)).await
            }
            Err(error) => Response { result: Err(error), bufs },
        }
    }

    /// Reads the sectors at the edges, and puts new bytes into them: `None` for zeros.
    async fn changed_edges(
        &self,
        job: &Job,
        parts: Parts,
        new: Option<&[Vec<u8>; 2]>,
    ) -> Result<Edges, Errno> {
        let mut edges = self.edges(parts).await?;
        let last = job.range.start.0 + u64::from(job.range.count) - 1;
        let skip = job.skip as usize;
        for (i, (edge, sector, at, len)) in
            [(&mut edges.head, job.range.start.0, skip, parts.head), (&mut edges.tail, last, 0, parts.tail)]
                .into_iter()
                .enumerate()
        {
            let Some(buf) = edge.take() else { continue };
            let mut buf = match i == 1 && self.host().bug(&NBD_TAIL_UNREAD) {
                true => buf,
                false => self.read_sector(sector, buf).await?,
            };
            match new {
                Some(new) => buf[at..at + len].copy_from_slice(&new[i]),
                None => buf[at..at + len].fill(0),
            }
            *edge = Some(buf);
        }
        Ok(edges)
    }

    async fn read_sector(&self, sector: u64, buf: IoBuf) -> Result<IoBuf, Errno> {
        let request = Request::read(SectorRange::new(sector, 1), smallvec![buf]);
        let mut response = self.agreed.export.node.submit(request).await;
        response.result?;
        response.bufs.pop().ok_or(Errno::EIO)
    }

    async fn write_around(
        &self,
        job: &Job,
        parts: Parts,
        new: &[Vec<u8>; 2],
        bufs: IoVec,
        turn: Ticket,
    ) -> Result<(), Errno> {
        turn.ready().await;
        let edges = self.changed_edges(job, parts, Some(new)).await?;
        let bufs = edges.head.into_iter().chain(bufs).chain(edges.tail).collect();
        let fua = self.fua(job, Op::Write);
        let answer = self.agreed.export.node.submit(Request { fua, ..Request::write(job.range, bufs) });
        // From here on the node keeps the order.
        drop(turn);
        answer.await.result
    }

    /// The whole sectors first: if zeros are to be fast and are not, nothing may have changed.
    async fn zero_around(&self, job: &Job, op: Op, parts: Parts, turn: Option<Ticket>) -> Result<(), Errno> {
        if let Some(turn) = &turn {
            turn.ready().await;
        }
        let (node, fua) = (&self.agreed.export.node, self.fua(job, op));
        if parts.middle.count == 0 && matches!(op, Op::WriteZeroes(flags) if flags.fast) {
            // A read and a write: no faster than the client's.
            return Err(Errno::EOPNOTSUPP);
        }
        if parts.middle.count > 0 {
            let bufs = IoVec::new();
            node.submit(Request { op, range: parts.middle, bufs, fua }).await.result?;
        }
        let edges = self.changed_edges(job, parts, None).await?;
        let last = job.range.start.0 + u64::from(job.range.count) - 1;
        let answers: Vec<_> = [(edges.head, job.range.start.0), (edges.tail, last)]
            .into_iter()
            .filter_map(|(edge, sector)| edge.map(|buf| (SectorRange::new(sector, 1), smallvec![buf])))
            .map(|(range, bufs)| node.submit(Request { fua, ..Request::write(range, bufs) }))
            .collect();
        drop(turn);
        // Together: one that is submitted and not polled could keep others waiting.
        join_all(answers).await.into_iter().try_for_each(|response| response.result)
    }
}

fn sectors(range: SectorRange) -> std::ops::Range<u64> {
    range.start.0..range.start.0.saturating_add(u64::from(range.count))
}
