//! A guest with a block front end on a ring.

use super::GuestDisk;
use kernel_model::{BLKFRONT_MAX_SECTORS, Blkfront};
use std::cell::RefCell;
use std::rc::Rc;
use tap_host::{Errno, IoKind, SectorRange};

/// A disk behind a ring.
#[derive(Clone)]
pub struct RingDisk {
    front: Blkfront,
    scratch: Rc<RefCell<Vec<u8>>>,
}

impl RingDisk {
    /// Requests through `front`.
    pub fn new(front: Blkfront) -> Self {
        Self { front, scratch: Rc::default() }
    }

    /// The front end.
    pub fn front(&self) -> &Blkfront {
        &self.front
    }
}

impl GuestDisk for RingDisk {
    async fn read<R>(&self, range: SectorRange, look: impl FnOnce(&[u8]) -> R) -> Result<R, Errno> {
        let mut seen = None;
        let gather = |copy: &dyn Fn(usize, &mut [u8])| {
            let mut scratch = self.scratch.borrow_mut();
            scratch.resize(range.len_bytes() as usize, 0);
            copy(0, &mut scratch);
            seen = Some(look(&scratch));
        };
        self.front.io(IoKind::Read, range, |_| {}, gather).await?;
        seen.ok_or(Errno::EIO)
    }

    async fn write(&self, range: SectorRange, fill: impl FnOnce(&mut [u8])) -> Result<(), Errno> {
        let scatter = |copy: &mut dyn FnMut(usize, &[u8])| {
            let mut scratch = self.scratch.borrow_mut();
            scratch.resize(range.len_bytes() as usize, 0);
            fill(&mut scratch);
            copy(0, &scratch);
        };
        self.front.io(IoKind::Write, range, scatter, |_| {}).await
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.front.io(IoKind::Flush, SectorRange::default(), |_| {}, |_| {}).await
    }

    fn max_sectors(&self) -> u32 {
        BLKFRONT_MAX_SECTORS
    }
}
