//! A guest with a block front end on a ring.

use super::GuestDisk;
use kernel_model::{BLKFRONT_MAX_SECTORS, Blkfront};
use std::cell::RefCell;
use std::rc::Rc;
use tap_host::{Errno, IoKind, SectorRange};
use xen_model::GrantedPage;

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

/// Bytes in a granted page.
const PAGE: usize = 4096;

impl GuestDisk for RingDisk {
    async fn read<R>(&self, range: SectorRange, look: impl FnOnce(&[u8]) -> R) -> Result<R, Errno> {
        let mut seen = None;
        let len = range.len_bytes() as usize;
        let gather = |pages: &[GrantedPage]| {
            seen = Some(match pages {
                [one] => one.page.with(|bytes| look(&bytes[..len])),
                many => {
                    let mut scratch = self.scratch.borrow_mut();
                    scratch.resize(len, 0);
                    scratch.chunks_mut(PAGE).zip(many).for_each(|(part, p)| p.page.read(0, part));
                    look(&scratch)
                }
            });
        };
        self.front.io(IoKind::Read, range, |_| {}, gather).await?;
        seen.ok_or(Errno::EIO)
    }

    async fn write(&self, range: SectorRange, fill: impl FnOnce(&mut [u8])) -> Result<(), Errno> {
        let len = range.len_bytes() as usize;
        let scatter = |pages: &[GrantedPage]| match pages {
            [one] => one.page.with_mut(|bytes| fill(&mut bytes[..len])),
            many => {
                let mut scratch = self.scratch.borrow_mut();
                scratch.resize(len, 0);
                fill(&mut scratch);
                scratch.chunks(PAGE).zip(many).for_each(|(part, p)| p.page.write(0, part));
            }
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
