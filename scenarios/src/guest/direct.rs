//! A guest without Xen: requests go straight to the node. For format tests and crash exploration.

use super::GuestDisk;
use std::rc::Rc;
use tap_core::{Node, Request, ZeroFlags};
use tap_host::{BufPool, Errno, IoBuf, IoVec, SECTOR_BYTES, SectorRange, copy_from_slice};

/// What is in a buffer before it is read into.
const POISON: u8 = 0xa5;

/// A disk that is a node of the same process.
#[derive(Clone)]
pub struct DirectDisk {
    node: Rc<dyn Node>,
    pool: BufPool,
    /// Sectors in each buffer of a request but its last; 0 where it has one buffer only.
    piece_sectors: u32,
}

/// Buffers of one request, and what they take of the pool.
struct Pieces {
    bufs: IoVec,
    _place: Option<IoBuf>,
}

impl DirectDisk {
    /// Requests to `node` with buffers of at most `pool_bytes`.
    pub fn new(node: Rc<dyn Node>, pool_bytes: usize) -> Self {
        Self { node, pool: BufPool::new(pool_bytes), piece_sectors: 0 }
    }

    /// Has requests in buffers of so many sectors, as a ring has them in its segments; 0 in one buffer.
    pub fn in_pieces(self, piece_sectors: u32) -> Self {
        Self { piece_sectors, ..self }
    }

    /// What needs no buffer waits in the line for buffers all the same: the history has it behind what waits there.
    async fn turn(&self) -> Result<(), Errno> {
        self.pool.alloc(0).await.map(drop)
    }

    /// Whether every buffer came back.
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
        // What is left out of an answer must not look like what was there before.
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
