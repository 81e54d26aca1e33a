//! Reading: a request as pieces that each come from one place.

use super::Image;
use super::format::{Compressed, Mapping};
use super::table::Table;
use crate::ImageHost;
use crate::carve::Carver;
use futures_util::future::join_all;
use smallvec::SmallVec;
use tap_core::{Op, Request, Response};
use tap_host::{Errno, IoVec, SECTOR_BYTES, SectorRange, copy_from_slice};

/// Where bytes of the disk come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    /// Byte offset in the file.
    File(u64),
    /// The same place of the backing file.
    Backing,
    Zeros,
    /// From a byte of a compressed cluster on.
    Compressed(Compressed, usize),
}

/// `len` bytes from byte `start` of the disk on.
#[derive(Clone, Copy)]
struct Piece {
    start: u64,
    len: usize,
    source: Source,
}

type Pieces = SmallVec<[Piece; 4]>;

impl<H: ImageHost> Image<H> {
    pub(super) async fn read(&self, start: u64, bufs: IoVec) -> Response {
        let len = tap_host::bytes_of(&bufs) as u64;
        let pieces = match self.pieces(start, len).await {
            Ok(pieces) => pieces,
            Err(e) => return Response { result: Err(e), bufs },
        };
        if let [piece] = pieces[..] {
            let (result, bufs) = self.read_piece(piece, bufs).await;
            return Response { result, bufs };
        }
        let mut carver = Carver::new(Op::Read, bufs);
        let mut result = Ok(());
        let mut reads = Vec::with_capacity(pieces.len());
        for piece in pieces {
            match carver.take(&self.file, (piece.start - start) as usize, piece.len).await {
                Ok(mut part) => reads.push(async move {
                    let (result, bufs) = self.read_piece(piece, std::mem::take(&mut part.bufs)).await;
                    part.bufs = bufs;
                    (result, part)
                }),
                Err(e) => result = Err(e),
            }
        }
        for (read, part) in join_all(reads).await {
            result = result.and(read);
            carver.put(part);
        }
        Response { result, bufs: carver.finish() }
    }

    async fn pieces(&self, start: u64, len: u64) -> Result<Pieces, Errno> {
        let mut pieces = Pieces::new();
        for (index, start, len) in self.by_table(start, len) {
            match self.table(index).await? {
                Some(table) => self.map(&table, start, len, &mut pieces),
                None => self.unmapped(start, len, &mut pieces),
            }
        }
        Ok(pieces)
    }

    /// Appends where bytes of one table come from.
    fn map(&self, table: &Table, start: u64, len: usize, pieces: &mut Pieces) {
        let cluster_bytes = self.geometry.cluster_bytes();
        let end = start + len as u64;
        let mut at = start;
        while at < end {
            let within = at % cluster_bytes;
            let len = (cluster_bytes - within).min(end - at) as usize;
            let index = self.split(self.cluster(at)).1;
            match table.mapping(index, self.geometry.cluster_bits) {
                Mapping::Unmapped => self.unmapped(at, len, pieces),
                Mapping::Plain(host) => append(pieces, at, len, Source::File(host + within)),
                Mapping::Compressed(run) => append(pieces, at, len, Source::Compressed(run, within as usize)),
            }
            at += len as u64;
        }
    }

    fn unmapped(&self, start: u64, len: usize, pieces: &mut Pieces) {
        let below = match &self.backing {
            Some(_) => self.backing_bytes.saturating_sub(start).min(len as u64) as usize,
            None => 0,
        };
        append(pieces, start, below, Source::Backing);
        append(pieces, start + below as u64, len - below, Source::Zeros);
    }

    async fn read_piece(&self, piece: Piece, mut bufs: IoVec) -> (Result<(), Errno>, IoVec) {
        match piece.source {
            // An image that was not opened for writing was not looked through.
            Source::File(offset) if offset > self.reach => (Err(Errno::EIO), bufs),
            Source::File(offset) => self.file.read(offset, bufs).await,
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

    /// Reads whole sectors that the backing file has.
    async fn read_backing(&self, start: u64, bufs: IoVec) -> (Result<(), Errno>, IoVec) {
        let Some(backing) = &self.backing else { return (Err(Errno::EIO), bufs) };
        let sectors = tap_host::bytes_of(&bufs) as u64 / SECTOR_BYTES;
        let range = SectorRange::new(start / SECTOR_BYTES, sectors as u32);
        let response = backing.submit(Request::read(range, bufs)).await;
        (response.result, response.bufs)
    }

    /// What the disk shows in `len` bytes from `start` on, within one cluster of `table`.
    pub(super) async fn shown(&self, table: &Table, start: u64, len: usize) -> Result<IoVec, Errno> {
        let mut pieces = Pieces::new();
        self.map(table, start, len, &mut pieces);
        let mut all = IoVec::new();
        for piece in pieces {
            let bufs = self.file.buffers(piece.len).await?;
            let (result, bufs) = self.read_piece(piece, bufs).await;
            result?;
            all.extend(bufs);
        }
        Ok(all)
    }
}

/// Adds a piece, to the last one if it goes on where that ends.
fn append(pieces: &mut Pieces, start: u64, len: usize, source: Source) {
    if len == 0 {
        return;
    }
    if let Some(last) = pieces.last_mut() {
        let goes_on = match (last.source, source) {
            (Source::File(a), Source::File(b)) => a + last.len as u64 == b,
            (Source::Backing, Source::Backing) | (Source::Zeros, Source::Zeros) => true,
            _ => false,
        };
        if goes_on {
            last.len += len;
            return;
        }
    }
    pieces.push(Piece { start, len, source });
}
