//! A guest that has a block device of the host open, as a mount or a back end in the kernel has.
//!
//! Like a file system, it has no two requests in flight of which one changes what the other is about. That matters
//! with Linux's nbd driver, which sends new requests before it repeats those that were in flight when its server died.
//! A driver that keeps the order may get overlapping ones, as some programs have them ([`BlockDisk::overlapping`]).

use super::GuestDisk;
use super::turns::Turns;
use kernel_model::gendisk::{Bio, Opener};
use std::cell::RefCell;
use std::rc::Rc;
use tap_core::ZeroFlags;
use tap_host::{Errno, IoKind, SectorRange};

/// Initial content of a buffer that is read into.
const POISON: u8 = 0xa5;

/// A block device that is open.
#[derive(Clone)]
pub struct BlockDisk {
    opener: Rc<Opener>,
    turns: Turns,
    /// Buffers of requests that have ended.
    spare: Rc<RefCell<Vec<Vec<u8>>>>,
}

impl BlockDisk {
    /// Submits requests through `opener`.
    pub fn new(opener: Opener) -> Self {
        Self { opener: Rc::new(opener), turns: Turns::apart(), spare: Rc::default() }
    }

    /// The same, with requests that overlap.
    pub fn overlapping(opener: Opener) -> Self {
        Self { turns: Turns::default(), ..Self::new(opener) }
    }

    /// A buffer for `range` with any bytes.
    fn buffer(&self, range: SectorRange) -> Vec<u8> {
        let mut data = self.spare.borrow_mut().pop().unwrap_or_default();
        data.resize(range.len_bytes() as usize, 0);
        data
    }

    async fn change(&self, bio: Bio) -> Result<(), Errno> {
        let (result, data) = self.opener.submit(bio).await;
        if !data.is_empty() {
            self.spare.borrow_mut().push(data);
        }
        result
    }

    fn filled(&self, range: SectorRange, fill: impl FnOnce(&mut [u8])) -> Bio {
        let mut data = self.buffer(range);
        fill(&mut data);
        Bio { data, ..Bio::new(IoKind::Write, range) }
    }
}

impl GuestDisk for BlockDisk {
    async fn read<R>(&self, range: SectorRange, look: impl FnOnce(&[u8]) -> R) -> Result<R, Errno> {
        // Bytes missing from an answer must not look like what was there before.
        let mut data = self.buffer(range);
        data.fill(POISON);
        let _turn = self.turns.turn(range, false).await;
        let (result, data) = self.opener.submit(Bio { data, ..Bio::new(IoKind::Read, range) }).await;
        let seen = result.map(|()| look(&data));
        self.spare.borrow_mut().push(data);
        seen
    }

    async fn write(&self, range: SectorRange, fill: impl FnOnce(&mut [u8])) -> Result<(), Errno> {
        let _turn = self.turns.turn(range, true).await;
        self.change(self.filled(range, fill)).await
    }

    async fn write_and_flush(&self, range: SectorRange, fill: impl FnOnce(&mut [u8])) -> Result<(), Errno> {
        let _turn = self.turns.turn(range, true).await;
        let bio = Bio { fua: true, ..self.filled(range, fill) };
        self.flush().await?;
        self.change(bio).await
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.change(Bio::new(IoKind::Flush, SectorRange::default())).await
    }

    async fn write_zeroes(&self, range: SectorRange, flags: ZeroFlags) -> Result<(), Errno> {
        let _turn = self.turns.turn(range, true).await;
        self.change(Bio { unmap: flags.unmap, ..Bio::new(IoKind::WriteZeroes, range) }).await
    }

    async fn discard(&self, range: SectorRange) -> Result<(), Errno> {
        let _turn = self.turns.turn(range, true).await;
        self.change(Bio::new(IoKind::Discard, range)).await
    }

    fn makes_zeros(&self) -> bool {
        self.opener.disk().limits().max_zeroes_sectors > 0
    }

    fn max_sectors(&self) -> u32 {
        // More than one request of the driver, for some of its limits.
        512
    }
}
