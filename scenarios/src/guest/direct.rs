//! A guest without Xen that submits requests directly to the node, for format tests and crash exploration.

use super::GuestDisk;
use std::rc::Rc;
use tap_core::{Node, Request, ZeroFlags};
use tap_host::{BufPool, Errno, IoBuf, IoVec, SECTOR_BYTES, SectorRange, copy_from_slice};

/// Initial content of a buffer that is read into.
const POISON: u8 = 0xa5;

/// A disk that is a node of the same process.
#[derive(Clone)]
pub struct DirectDisk {
    node: Rc<dyn Node>,
    pool: BufPool,
    /// Sectors in each buffer of a request except the last; 0 for one buffer per request.
    piece_sectors: u32,
}

/// Buffers of one request, and their share of the pool.
struct Pieces {
    bufs: IoVec,
    _place: Option<IoBuf>,
}

impl DirectDisk {
    /// Submits requests to `node` with at most `pool_bytes` of buffers.
    pub fn new(node: Rc<dyn Node>, pool_bytes: usize) -> Self {
        Self { node, pool: BufPool::new(pool_bytes), piece_sectors: 0 }
    }

    /// Splits requests into buffers of so many sectors, as the segments of a ring do; 0 for one buffer.
    pub fn in_pieces(self, piece_sectors: u32) -> Self {
        Self { piece_sectors, ..self }
    }

    /// Waits for a turn in the queue for buffers without needing one: the history orders the request after those
    /// waiting there.
    async fn turn(&self) -> Result<(), Errno> {
        self.pool.alloc(0).await.map(drop)
    }

    /// Number of bytes of buffers that have not come back.
    pub fn buffers_out(&self) -> usize {
        self.pool.used_bytes()
    }

    async fn buffers(&self, range: SectorRange) -> Result<Pieces, Errno> {
        let whole = self.pool.alloc(range.len_bytes() as usize).await?;
        if self.piece_sectors == 0 || self.piece_sectors >= range.count {
            return Ok(Pieces { bufs: [whole].into_iter().collect(), _place: None });
        }
        let step = self.piece_sectors;
        let lens = (0..range.count).step_by(step as usize).map(|at| (range.count - at).min(step));
        let bufs = lens.map(|sectors| IoBuf::unpooled(sectors as usize * SECTOR_BYTES as usize));
        Ok(Pieces { bufs: bufs.collect::<Result<IoVec, Errno>>()?, _place: Some(whole) })
    }
}

impl GuestDisk for DirectDisk {
    async fn read<R>(&self, range: SectorRange, look: impl FnOnce(&[u8]) -> R) -> Result<R, Errno> {
        let mut pieces = self.buffers(range).await?;
        // Bytes missing from an answer must not look like what was there before.
        pieces.bufs.iter_mut().for_each(|buf| buf.fill(POISON));
        let response = self.node.submit(Request::read(range, pieces.bufs)).await;
        response.result.map(|()| match &response.bufs[..] {
            [one] => look(one),
            many => look(&many.iter().flat_map(|buf| buf.iter().copied()).collect::<Vec<u8>>()),
        })
    }

    async fn write(&self, range: SectorRange, fill: impl FnOnce(&mut [u8])) -> Result<(), Errno> {
        let mut pieces = self.buffers(range).await?;
        match &mut pieces.bufs[..] {
            [one] => fill(one),
            many => {
                let mut bytes = vec![0; range.len_bytes() as usize];
                fill(&mut bytes);
                copy_from_slice(many, 0, &bytes);
            }
        }
        self.node.submit(Request::write(range, pieces.bufs)).await.result
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.node.submit(Request::flush()).await.result
    }

    async fn write_zeroes(&self, range: SectorRange, flags: ZeroFlags) -> Result<(), Errno> {
        self.turn().await?;
        self.node.submit(Request::write_zeroes(range, flags)).await.result
    }

    async fn discard(&self, range: SectorRange) -> Result<(), Errno> {
        self.turn().await?;
        self.node.submit(Request::discard(range)).await.result
    }

    fn makes_zeros(&self) -> bool {
        true
    }

    fn max_sectors(&self) -> u32 {
        128
    }
}
