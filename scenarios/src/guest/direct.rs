//! A guest without Xen: requests go straight to the node. For format tests and crash exploration.

use super::GuestDisk;
use std::rc::Rc;
use tap_core::{Node, Request, ZeroFlags};
use tap_host::{BufPool, Errno, IoVec, SectorRange};

/// What is in a buffer before it is read into.
const POISON: u8 = 0xa5;

/// A disk that is a node of the same process.
#[derive(Clone)]
pub struct DirectDisk {
    node: Rc<dyn Node>,
    pool: BufPool,
}

impl DirectDisk {
    /// Requests to `node` with buffers of at most `pool_bytes`.
    pub fn new(node: Rc<dyn Node>, pool_bytes: usize) -> Self {
        Self { node, pool: BufPool::new(pool_bytes) }
    }

    /// What needs no buffer waits in the line for buffers all the same: the history has it behind what waits there.
    async fn turn(&self) -> Result<(), Errno> {
        self.pool.alloc(0).await.map(drop)
    }

    /// Whether every buffer came back.
    pub fn buffers_out(&self) -> usize {
        self.pool.used_bytes()
    }
}

impl GuestDisk for DirectDisk {
    async fn read<R>(&self, range: SectorRange, look: impl FnOnce(&[u8]) -> R) -> Result<R, Errno> {
        let mut bufs = IoVec::new();
        let mut buf = self.pool.alloc(range.len_bytes() as usize).await?;
        // What is left out of an answer must not look like what was there before.
        buf.fill(POISON);
        bufs.push(buf);
        let response = self.node.submit(Request::read(range, bufs)).await;
        response.result.map(|()| look(&response.bufs[0]))
    }

    async fn write(&self, range: SectorRange, fill: impl FnOnce(&mut [u8])) -> Result<(), Errno> {
        let mut buf = self.pool.alloc(range.len_bytes() as usize).await?;
        fill(&mut buf);
        let mut bufs = IoVec::new();
        bufs.push(buf);
        self.node.submit(Request::write(range, bufs)).await.result
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

    fn max_sectors(&self) -> u32 {
        128
    }
}
