//! Reads: splits a request into pieces that each come from one place.

use super::Image;
use super::layout::{Compressed, Layout, Mapping};
use super::table::Table;
use super::{GuestOffset, HostOffset};
use crate::ImageHost;
use crate::carve::Carver;
use crate::memory::{PART_BYTES, buffers, take_some};
use futures_util::future::join_all;
use smallvec::SmallVec;
use std::collections::VecDeque;
use tap_core::{Op, Request, Response};
use tap_host::{Errno, IoVec, SECTOR_BYTES, SectorRange, Share, copy_from_slice};

tap_host::listed! {
    pub(super) BUGS: Bug;
    PIECES_UNBOUNDED = "pieces-unbounded", "all pieces of a scattered read are asked for at once";
    PIECES_UNJOINED = "pieces-unjoined", "contiguous clusters are read one by one";
}

/// The source of bytes of the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    /// The file, from this offset on.
    File(HostOffset),
    /// The backing file, at the same offset.
    Backing,
    Zeros,
    /// A compressed cluster, from this byte on.
    Compressed(Compressed, usize),
}

/// `len` bytes of the disk from `start` on.
#[derive(Clone, Copy)]
struct Piece {
    start: GuestOffset,
    len: usize,
    source: Source,
}

type Pieces = SmallVec<[Piece; 4]>;

/// Limit of pieces read at once, so that a large request on a fragmented image leaves memory and turns to others.
const MAX_PIECES: usize = 64;

impl Piece {
    /// The first `len` bytes, and the rest.
    fn cut(self, len: usize) -> (Piece, Piece) {
        let source = match self.source {
            Source::File(offset) => Source::File(offset + len as u64),
            Source::Compressed(run, skip) => Source::Compressed(run, skip + len),
            source => source,
        };
        (Piece { len, ..self }, Piece { start: self.start + len as u64, len: self.len - len, source })
    }
}

impl<H: ImageHost, L: Layout> Image<H, L> {
    pub(super) async fn read(&self, start: GuestOffset, bufs: IoVec) -> Response {
        let len = tap_host::bytes_of(&bufs) as u64;
        let (pieces, mut covered) = match self.pieces(start, len).await {
            Ok(found) => found,
            Err(e) => return Response { result: Err(e), bufs },
        };
        if let [piece] = pieces[..]
            && covered == len
        {
            let (result, bufs) = self.read_piece(piece, bufs).await;
            return Response { result, bufs };
        }
        let mut carver = Carver::new(Op::Read, bufs);
        let mut result = self.read_pieces(start, pieces, &mut carver).await;
        while covered < len && result.is_ok() {
            self.host.yield_now().await;
            result = match self.pieces(start + covered, len - covered).await {
                Ok((next, more)) => {
                    covered += more;
                    self.read_pieces(start, next, &mut carver).await
                }
                Err(error) => Err(error),
            };
        }
        Response { result, bufs: carver.finish() }
    }

    /// Reads `pieces` of a request that starts at `start`, as many at once as fit in memory.
    async fn read_pieces(
        &self,
        start: GuestOffset,
        pieces: Pieces,
        carver: &mut Carver,
    ) -> Result<(), Errno> {
        let at = |piece: &Piece| (piece.start - start) as usize;
        let mut left: VecDeque<Piece> = pieces.into_iter().collect();
        while !left.is_empty() {
            let need = left.iter().map(|piece| carver.cost(at(piece), piece.len)).sum();
            let mut share = take_some(&self.memory.parts, need).await?;
            let mut reads = Vec::with_capacity(left.len());
            while let Some(mut piece) = left.pop_front() {
                if carver.cost(at(&piece), piece.len) > share.bytes() {
                    if !reads.is_empty() {
                        left.push_front(piece);
                        break;
                    }
                    let (now, later) = piece.cut(PART_BYTES);
                    left.push_front(later);
                    piece = now;
                }
                let mut part = carver.take(&mut share, at(&piece), piece.len).expect("its cost was counted");
                reads.push(async move {
                    let (result, bufs) = self.read_piece(piece, std::mem::take(&mut part.bufs)).await;
                    part.bufs = bufs;
                    (result, part)
                });
            }
            let mut result = Ok(());
            for (read, part) in join_all(reads).await {
                result = result.and(read);
                carver.put(part);
            }
            result?;
        }
        Ok(())
    }

    /// The pieces of the first of `len` bytes from `start` on, and the number of bytes in them.
    async fn pieces(&self, start: GuestOffset, len: u64) -> Result<(Pieces, u64), Errno> {
        let mut pieces = Pieces::new();
        for (index, start, len) in self.by_table(start, len) {
            match self.table(index).await? {
                Some(table) => self.map(&table, start, len, &mut pieces),
                None => self.unmapped(start, len, &mut pieces),
            }
            if pieces.len() >= MAX_PIECES && !self.host.bug(&PIECES_UNBOUNDED) {
                break;
            }
        }
        let end = pieces.last().map_or(start, |last| last.start + last.len as u64);
        Ok((pieces, end - start))
    }

    /// Appends the pieces of bytes of one table, up to [`MAX_PIECES`].
    fn map(&self, table: &Table, start: GuestOffset, len: usize, pieces: &mut Pieces) {
        let cluster_bytes = self.geometry.cluster_bytes();
        let end = start + len as u64;
        let mut at = start;
        let max = if self.host.bug(&PIECES_UNBOUNDED) { usize::MAX } else { MAX_PIECES };
        while at < end && pieces.len() < max {
            let within = at.0 % cluster_bytes;
            let len = (cluster_bytes - within).min(end - at) as usize;
            let index = self.split(self.cluster(at)).1;
            match table.mapping::<L>(index, &self.geometry) {
                Mapping::Unmapped => self.unmapped(at, len, pieces),
                Mapping::Plain(host) if self.host.bug(&PIECES_UNJOINED) => {
                    pieces.push(Piece { start: at, len, source: Source::File(host + within) });
                }
                Mapping::Plain(host) => append(pieces, at, len, Source::File(host + within)),
                Mapping::Compressed(run) => append(pieces, at, len, Source::Compressed(run, within as usize)),
            }
            at += len as u64;
        }
        self.host.work((at - start).div_ceil(cluster_bytes));
    }

    fn unmapped(&self, start: GuestOffset, len: usize, pieces: &mut Pieces) {
        let below = match &self.backing {
            Some(_) => self.backing_bytes.saturating_sub(start.0).min(len as u64) as usize,
            None => 0,
        };
        append(pieces, start, below, Source::Backing);
        append(pieces, start + below as u64, len - below, Source::Zeros);
    }

    async fn read_piece(&self, piece: Piece, mut bufs: IoVec) -> (Result<(), Errno>, IoVec) {
        match piece.source {
            // Opening for reading does not check the references.
            Source::File(offset) if offset > self.reach => (Err(Errno::EIO), bufs),
            Source::File(offset) => self.file.read(offset.0, bufs).await,
            Source::Backing => self.read_backing(piece.start, bufs).await,
            Source::Zeros => {
                bufs.iter_mut().for_each(|b| b.fill(0));
                (Ok(()), bufs)
            }
            Source::Compressed(run, skip) => match self.inflate(run).await {
                Ok(bytes) => {
                    copy_from_slice(&mut bufs, 0, &bytes[skip..skip + piece.len]);
                    (Ok(()), bufs)
                }
                Err(e) => (Err(e), bufs),
            },
        }
    }

    /// Reads whole sectors from the backing file.
    async fn read_backing(&self, start: GuestOffset, bufs: IoVec) -> (Result<(), Errno>, IoVec) {
        let Some(backing) = &self.backing else { return (Err(Errno::EIO), bufs) };
        let sectors = tap_host::bytes_of(&bufs) as u64 / SECTOR_BYTES;
        let range = SectorRange::new(start.0 / SECTOR_BYTES, sectors as u32);
        let response = backing.submit(Request::read(range, bufs)).await;
        (response.result, response.bufs)
    }

    /// The contents of `len` bytes of the disk from `start` on, within one cluster of `table`, in memory from `share`.
    pub(super) async fn shown(
        &self,
        table: &Table,
        start: GuestOffset,
        len: usize,
        share: &mut Share,
    ) -> Result<IoVec, Errno> {
        let mut pieces = Pieces::new();
        self.map(table, start, len, &mut pieces);
        let mut all = IoVec::new();
        for piece in pieces {
            let bufs = buffers(share, piece.len)?;
            let (result, bufs) = self.read_piece(piece, bufs).await;
            result?;
            all.extend(bufs);
        }
        Ok(all)
    }
}

/// Adds a piece, joined to the last one if it continues it.
fn append(pieces: &mut Pieces, start: GuestOffset, len: usize, source: Source) {
    if len == 0 {
        return;
    }
    if let Some(last) = pieces.last_mut() {
        let continues = match (last.source, source) {
            (Source::File(a), Source::File(b)) => a + last.len as u64 == b,
            (Source::Backing, Source::Backing) | (Source::Zeros, Source::Zeros) => true,
            _ => false,
        };
        if continues {
            last.len += len;
            return;
        }
    }
    pieces.push(Piece { start, len, source });
}
