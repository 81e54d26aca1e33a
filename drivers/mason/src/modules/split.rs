//! Requests that are answered by several parts of the disks below.
//!
//! ```text
//!   request  4 ─────────────── 12            of the node
//!   pieces   4 ──── 8 │ 8 ──── 12            the first piece is of one disk below, the second of the next
//! ```
//!
//! Pieces run beside one another, a limited number at once. A piece that does not end where a buffer ends gets a buffer
//! of its own, and its bytes are copied; if there is no memory for all of these at once, the pieces run one after the
//! other, in small steps. A request without data may be as long as the disk: it becomes one range of each node below.

use std::future::ready;
use std::ops::Range;
use std::rc::Rc;
use tap_core::{Child, Durable, Extent, LocalBoxFuture, Node, NodeInfo, Op, Request, Response};
use tap_host::{Budget, Errno, SECTOR_BYTES, SectorRange, Stage};
use tap_images::carve::{Carver, cost_of_list};

tap_host::listed! {
    pub(crate) BUGS: Bug;
    FLUSH_OF_FIRST = "flush-of-first", "a flush reaches only the first of several nodes below";
    FUA_NOT_PASSED = "fua-not-passed", "a write that must be durable when it is answered is passed on as any other";
    PIECE_ERROR_LOST = "piece-error-lost", "the error of any piece but the first is forgotten";
}

tap_host::listed! {
    pub(crate) MARKS: Mark;
    PIECE_COPIED = "piece-copied", "a piece of a request ended within a buffer, and was copied";
    PIECES_IN_STEPS = "pieces-in-steps", "there was no memory for all pieces of a request at once";
}

/// Pieces of a request that run at once, at most.
const AT_ONCE: usize = 64;
/// Largest step of a piece while memory is short, in bytes.
const STEP_BYTES: usize = 64 << 10;

/// Where sectors of a disk are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// Which node below.
    pub node: usize,
    /// The sector there.
    pub sector: u64,
    /// How many sectors from there on are next to one another, at least 1.
    pub count: u64,
}

/// Which sector of which node below each sector of a disk is.
pub trait Layout: 'static {
    /// Where `sector`, which is in the disk, is.
    fn place(&self, sector: u64) -> Place;
    /// The ranges of the nodes below that together are `range`, for requests without data: they may be much longer
    /// than those with data. There are at most as many as nodes below.
    fn ranges(&self, range: Range<u64>) -> Vec<(usize, Range<u64>)>;
}

/// A node whose sectors are those of the nodes below it, in another order.
pub struct Split<H, L> {
    inner: Rc<Inner<H, L>>,
}

struct Inner<H, L> {
    host: H,
    layout: L,
    info: NodeInfo,
    roles: &'static str,
    below: Vec<Rc<dyn Node>>,
    copies: Stage,
}

/// A piece of a request.
#[derive(Clone, Copy)]
struct Piece {
    node: usize,
    /// Where it begins in the request, in sectors.
    at: u64,
    range: SectorRange,
}

impl<H: tap_images::ImageHost, L: Layout> Split<H, L> {
    /// A disk of `size_sectors` over `below`, which has the `role`.
    ///
    /// # Errors
    /// `ENOMEM` if `memory` is too small.
    pub fn new(
        host: H,
        layout: L,
        size_sectors: u64,
        role: &'static str,
        below: Vec<Rc<dyn Node>>,
        memory: &Budget,
    ) -> Result<Self, Errno> {
        let copies = memory.stage(cost_of_list(STEP_BYTES)).map_err(|_| Errno::ENOMEM)?;
        let infos = below.iter().map(|node| node.info());
        let info = NodeInfo { size_sectors, ..together(infos) };
        Ok(Self { inner: Rc::new(Inner { host, layout, info, roles: role, below, copies }) })
    }
}

/// What holds for all of `infos`; the size is left at zero.
pub(crate) fn together(infos: impl Iterator<Item = NodeInfo>) -> NodeInfo {
    let least = NodeInfo { durable: Durable::AtAnswer, ..NodeInfo::new(0, false) };
    infos.fold(least, |all, one| NodeInfo {
        size_sectors: 0,
        read_only: all.read_only || one.read_only,
        physical_block_bytes: all.physical_block_bytes.max(one.physical_block_bytes),
        discard_bytes: all.discard_bytes.max(one.discard_bytes),
        max_sectors: all.max_sectors.min(one.max_sectors),
        durable: all.durable.max(one.durable),
    })
}

impl<H: tap_images::ImageHost, L: Layout> Inner<H, L> {
    /// At most [`AT_ONCE`] pieces of `range`, from sector `at` of the request on.
    fn pieces(&self, range: SectorRange, mut at: u64) -> Vec<Piece> {
        let mut pieces = Vec::new();
        while at < u64::from(range.count) && pieces.len() < AT_ONCE {
            let place = self.layout.place(range.start.0 + at);
            let count = place.count.min(u64::from(range.count) - at);
            pieces.push(Piece { node: place.node, at, range: SectorRange::new(place.sector, count as u32) });
            at += count;
        }
        pieces
    }

    async fn run(self: Rc<Self>, request: Request) -> Response {
        if request.op == Op::Flush {
            return Response { result: self.flush().await, bufs: request.bufs };
        }
        let fua = request.fua && !self.host.bug(&FUA_NOT_PASSED);
        let first = self.layout.place(request.range.start.0);
        if first.count >= u64::from(request.range.count) {
            let range = SectorRange::new(first.sector, request.range.count);
            return self.below[first.node].submit(Request { range, fua, ..request }).await;
        }
        if !request.op.has_data() {
            return Response { result: self.no_data(&request, fua).await, bufs: request.bufs };
        }
        let (op, range) = (request.op, request.range);
        let mut carver = Carver::new(op, request.bufs);
        let (mut result, mut at) = (Ok(()), 0);
        while at < u64::from(range.count) && result.is_ok() {
            let pieces = self.pieces(range, at);
            at += pieces.iter().map(|piece| u64::from(piece.range.count)).sum::<u64>();
            result = self.data(op, &mut carver, &pieces, fua).await;
        }
        Response { result, bufs: carver.finish() }
    }

    async fn flush(&self) -> Result<(), Errno> {
        let count = if self.host.bug(&FLUSH_OF_FIRST) { 1 } else { self.below.len() };
        let flushes = self.below[..count].iter().map(|node| node.submit(Request::flush()));
        let results = all(flushes).await;
        results.into_iter().try_for_each(|response| response.result)
    }

    async fn no_data(&self, request: &Request, fua: bool) -> Result<(), Errno> {
        if matches!(request.op, Op::WriteZeroes(flags) if flags.fast) {
            // One piece might be refused after another one was changed.
            return Err(Errno::EOPNOTSUPP);
        }
        let start = request.range.start.0;
        let ranges = self.layout.ranges(start..start + u64::from(request.range.count));
        let answers = ranges.into_iter().map(|(node, range)| {
            let (op, range) = (request.op, SectorRange::new(range.start, (range.end - range.start) as u32));
            self.below[node].submit(Request { op, range, bufs: Default::default(), fua })
        });
        let answers: Vec<Response> = all(answers).await;
        self.first_error(answers.into_iter().map(|answer| answer.result))
    }

    fn first_error(&self, mut results: impl Iterator<Item = Result<(), Errno>>) -> Result<(), Errno> {
        if self.host.bug(&PIECE_ERROR_LOST) {
            return results.next().unwrap_or(Ok(()));
        }
        results.try_for_each(|result| result)
    }

    /// Reads or writes some pieces of a request.
    async fn data(&self, op: Op, carver: &mut Carver, pieces: &[Piece], fua: bool) -> Result<(), Errno> {
        let bytes = |piece: &Piece| ((piece.at * SECTOR_BYTES) as usize, piece.range.len_bytes() as usize);
        let cost = pieces.iter().map(bytes).map(|(at, len)| carver.cost(at, len)).sum();
        if cost > 0 {
            self.host.mark(&PIECE_COPIED);
        }
        match self.copies.try_take(cost) {
            Some(mut share) => {
                let mut parts = Vec::new();
                let mut taken = Ok(());
                for piece in pieces {
                    let (at, len) = bytes(piece);
                    match carver.take(&mut share, at, len) {
                        Ok(part) => parts.push(part),
                        Err(error) => taken = Err(error),
                    }
                }
                let answers: Vec<Response> = match taken {
                    Ok(()) => {
                        let sent = pieces.iter().zip(&mut parts).map(|(piece, part)| {
                            let bufs = std::mem::take(part.bufs());
                            self.below[piece.node].submit(Request { op, range: piece.range, bufs, fua })
                        });
                        all(sent).await
                    }
                    Err(_) => Vec::new(),
                };
                let mut results = Vec::new();
                for (i, answer) in answers.into_iter().enumerate() {
                    *parts[i].bufs() = answer.bufs;
                    results.push(answer.result);
                }
                parts.into_iter().for_each(|part| carver.put(part));
                taken.and_then(|()| self.first_error(results.into_iter()))
            }
            None => {
                self.host.mark(&PIECES_IN_STEPS);
                self.in_steps(op, carver, pieces, fua).await
            }
        }
    }

    /// One small step after the other.
    async fn in_steps(&self, op: Op, carver: &mut Carver, pieces: &[Piece], fua: bool) -> Result<(), Errno> {
        for piece in pieces {
            let mut done = 0;
            while done < piece.range.count {
                let count = (piece.range.count - done).min((STEP_BYTES as u64 / SECTOR_BYTES) as u32);
                let range = SectorRange::new(piece.range.start.0 + u64::from(done), count);
                let at = ((piece.at + u64::from(done)) * SECTOR_BYTES) as usize;
                let len = range.len_bytes() as usize;
                let mut share = self.copies.take(carver.cost(at, len)).await?;
                let mut part = carver.take(&mut share, at, len)?;
                let bufs = std::mem::take(part.bufs());
                let answer = self.below[piece.node].submit(Request { op, range, bufs, fua }).await;
                *part.bufs() = answer.bufs;
                carver.put(part);
                answer.result?;
                done += count;
            }
        }
        Ok(())
    }
}

/// The results of all of `futures`, which run beside one another.
pub(crate) async fn all<T: 'static>(futures: impl Iterator<Item = LocalBoxFuture<T>>) -> Vec<T> {
    futures_util::future::join_all(futures).await
}

impl<H: tap_images::ImageHost, L: Layout> Node for Split<H, L> {
    fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
        if let Err(error) = self.inner.info.check(&request) {
            return Box::pin(ready(Response { result: Err(error), bufs: request.bufs }));
        }
        Box::pin(Rc::clone(&self.inner).run(request))
    }

    fn extents(&self, range: SectorRange, max: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        let place = self.inner.layout.place(range.start.0);
        let count = place.count.min(u64::from(range.count)) as u32;
        self.inner.below[place.node].extents(SectorRange::new(place.sector, count), max)
    }

    fn info(&self) -> NodeInfo {
        self.inner.info
    }

    fn children(&self) -> Vec<Child> {
        let child = |node: &Rc<dyn Node>| Child { role: self.inner.roles, node: Rc::clone(node) };
        self.inner.below.iter().map(child).collect()
    }

    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        let closes: Vec<_> = self.inner.below.iter().map(|node| node.close()).collect();
        Box::pin(async move { all(closes.into_iter()).await.into_iter().collect() })
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::Layout;

    /// Checks that `layout`, of a disk of `sectors`, has the same places for ranges as for single sectors.
    pub(crate) fn same(layout: &impl Layout, sectors: u64) {
        for from in 0..sectors {
            for to in from + 1..=sectors {
                let places = (from..to).map(|sector| layout.place(sector));
                let mut single: Vec<(usize, u64)> = places.map(|place| (place.node, place.sector)).collect();
                let ranges = layout.ranges(from..to).into_iter();
                let mut found: Vec<(usize, u64)> =
                    ranges.flat_map(|(node, range)| range.map(move |at| (node, at))).collect();
                single.sort_unstable();
                found.sort_unstable();
                assert_eq!(single, found, "{from}..{to}");
            }
        }
    }
}
