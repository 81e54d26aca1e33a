//! A guest with a block front end on a ring.

use super::GuestDisk;
use super::turns::Turns;
use kernel_model::{BLKFRONT_MAX_SECTORS, Blkfront, DataPieces};
use std::cell::RefCell;
use std::rc::Rc;
use tap_host::{Errno, IoKind, SectorRange};

/// Maximum time that a program is idle.
const IDLE_NS: u64 = 30_000;

/// A disk on a ring.
#[derive(Clone)]
pub struct RingDisk {
    front: Blkfront,
    scratch: Rc<RefCell<Vec<u8>>>,
    turns: Turns,
}

impl RingDisk {
    /// Submits requests through `front`.
    pub fn new(front: Blkfront) -> Self {
        Self { front, scratch: Rc::default(), turns: Turns::default() }
    }

    /// The same, with no two requests in flight of which one changes what the other is about.
    pub fn apart(front: Blkfront) -> Self {
        Self { turns: Turns::apart(), ..Self::new(front) }
    }

    async fn store(
        &self,
        kind: IoKind,
        range: SectorRange,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<(), Errno> {
        let scatter = |pieces: DataPieces<'_>| match pieces.only() {
            Some(one) => one.with_mut(fill),
            None => {
                let mut scratch = self.scratch.borrow_mut();
                scratch.resize(range.len_bytes() as usize, 0);
                fill(&mut scratch);
                let mut rest = &scratch[..];
                for piece in pieces.iter() {
                    let (part, later) = rest.split_at(piece.len_bytes());
                    piece.with_mut(|bytes| bytes.copy_from_slice(part));
                    rest = later;
                }
            }
        };
        let _turn = self.turns.turn(range, true).await;
        self.front.io(kind, range, scatter, |_| {}).await
    }

    /// The front end.
    pub fn front(&self) -> &Blkfront {
        &self.front
    }
}

impl GuestDisk for RingDisk {
    async fn read<R>(&self, range: SectorRange, look: impl FnOnce(&[u8]) -> R) -> Result<R, Errno> {
        let mut seen = None;
        let gather = |pieces: DataPieces<'_>| {
            seen = Some(match pieces.only() {
                Some(one) => one.with(look),
                None => {
                    let mut scratch = self.scratch.borrow_mut();
                    scratch.clear();
                    pieces.iter().for_each(|piece| piece.with(|bytes| scratch.extend_from_slice(bytes)));
                    look(&scratch)
                }
            });
        };
        let _turn = self.turns.turn(range, false).await;
        self.front.io(IoKind::Read, range, |_| {}, gather).await?;
        seen.ok_or(Errno::EIO)
    }

    async fn write(&self, range: SectorRange, fill: impl FnOnce(&mut [u8])) -> Result<(), Errno> {
        self.store(IoKind::Write, range, fill).await
    }

    async fn write_and_flush(&self, range: SectorRange, fill: impl FnOnce(&mut [u8])) -> Result<(), Errno> {
        self.store(IoKind::Flush, range, fill).await
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.front.io(IoKind::Flush, SectorRange::default(), |_| {}, |_| {}).await
    }

    async fn discard(&self, range: SectorRange) -> Result<(), Errno> {
        let _turn = self.turns.turn(range, true).await;
        self.front.io(IoKind::Discard, range, |_| {}, |_| {}).await
    }

    async fn idle(&self) {
        self.front.idle(IDLE_NS).await;
    }

    fn max_sectors(&self) -> u32 {
        BLKFRONT_MAX_SECTORS
    }
}
