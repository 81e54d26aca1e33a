//! What is behind a back end: who serves its rings.
//!
//! ```text
//!   Backend ── shown, connect, close ──► a node of this process        its rings are served here
//!                                   └──► a disk of another process     which is told to serve them
//! ```

use crate::config::XenHost;
use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::task::Poll;
use tap_core::wait::{Receiver, joined};
use tap_core::{Node, NodeInfo};
use tap_host::{Errno, OneWaiter, SECTOR_BYTES};
use tap_ring::{BlkifRing, ConnectError, RingCloser, RingConfig, RingEnd};

/// What front ends are told about a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shown {
    /// Its size.
    pub size_sectors: u64,
    /// The block size that writes should have, in bytes.
    pub physical_block_bytes: u32,
    /// Whether it refuses writes.
    pub read_only: bool,
}

impl Shown {
    /// The disk of `node`.
    pub fn of(info: &NodeInfo) -> Self {
        Self {
            size_sectors: info.size_sectors,
            physical_block_bytes: info.physical_block_bytes,
            read_only: info.read_only,
        }
    }

    /// A disk of which only this is known.
    pub fn sized(size_sectors: u64, read_only: bool) -> Self {
        Self { size_sectors, physical_block_bytes: SECTOR_BYTES as u32, read_only }
    }
}

/// How large the disk of a ring is, and how large its front end was told that it is. A disk only becomes larger.
#[derive(Clone)]
pub struct DiskSize(Rc<Sizes>);

struct Sizes {
    known: Cell<u64>,
    told: Cell<u64>,
    waiter: OneWaiter,
}

impl DiskSize {
    /// The size of a disk whose front end is told of `told_sectors`.
    pub fn new(told_sectors: u64) -> Self {
        let (known, told) = (Cell::new(told_sectors), Cell::new(told_sectors));
        Self(Rc::new(Sizes { known, told, waiter: OneWaiter::default() }))
    }

    /// What the front end was told, in sectors: no disk with fewer may be given to it.
    pub fn told_sectors(&self) -> u64 {
        self.0.told.get()
    }

    /// The disk has `size_sectors`, durably, and its ring takes requests for all of them. Returns whether that is news.
    pub fn grew(&self, size_sectors: u64) -> bool {
        let grew = size_sectors > self.0.known.get();
        if grew {
            self.0.known.set(size_sectors);
            self.0.waiter.wake();
        }
        grew
    }

    /// The size that the front end was not told yet, in sectors.
    pub(crate) fn untold_sectors(&self) -> Option<u64> {
        let known = self.0.known.get();
        (known > self.told_sectors()).then_some(known)
    }

    /// The front end was told of `size_sectors`.
    pub(crate) fn tell(&self, size_sectors: u64) {
        self.0.told.set(size_sectors);
    }

    /// Completes once the front end has to be told. Only one task may wait.
    pub(crate) async fn untold(&self) {
        poll_fn(|cx| {
            if self.untold_sectors().is_some() {
                return Poll::Ready(());
            }
            self.0.waiter.wait(cx.waker());
            Poll::Pending
        })
        .await;
    }
}

/// A ring that is served.
pub struct Serving {
    /// Ends it.
    pub closer: RingCloser,
    /// How it ended.
    pub ended: Receiver<RingEnd>,
}

/// Why a disk is not served.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unserved {
    /// Continues "failed to".
    pub words: String,
    /// Whoever serves it is away, and may be back soon: front ends wait.
    pub away: bool,
}

impl From<ConnectError> for Unserved {
    fn from(why: ConnectError) -> Self {
        Self { words: why.to_string(), away: matches!(why, ConnectError::Told { away: true, .. }) }
    }
}

/// A disk, and who serves its rings.
pub trait ServedDisk<H: XenHost> {
    /// A toolstack has said which one it is.
    fn appeared(&self) -> impl Future<Output = ()>;

    /// What front ends are to be told.
    ///
    /// # Errors
    /// Why nobody knows at the moment; where it is [`Unserved::away`], that was waited for.
    fn shown(&self) -> impl Future<Output = Result<Shown, Unserved>>;

    /// Has a ring served, and says in `size` when its disk becomes larger.
    ///
    /// # Errors
    /// [`ConnectError`]; then nothing of the guest is mapped or bound.
    fn connect(
        &self,
        host: &H,
        ring: RingConfig,
        size: &DiskSize,
    ) -> impl Future<Output = Result<Serving, ConnectError>>;

    /// Ends a ring that a predecessor had served, and that its front end does not use any more.
    fn release(&self) -> impl Future<Output = ()>;

    /// Ends the use of the disk. If the device is `over`, none of its rings is served any more.
    ///
    /// # Errors
    /// What was written since the last flush may be lost.
    fn close(&self, over: bool) -> impl Future<Output = Result<(), Errno>>;
}

/// A disk of this process.
impl<H: XenHost> ServedDisk<H> for Rc<dyn Node> {
    async fn appeared(&self) {}

    async fn shown(&self) -> Result<Shown, Unserved> {
        Ok(Shown::of(&self.info()))
    }

    /// Its size does not change while the process lives.
    async fn connect(&self, host: &H, ring: RingConfig, _size: &DiskSize) -> Result<Serving, ConnectError> {
        let vbd = ring.vbd;
        let ring = BlkifRing::connect(host.clone(), ring, Rc::clone(self))?;
        let closer = ring.closer();
        let (task, ended) = joined(ring.run());
        host.spawn("ring", u64::from(vbd.0), task);
        Ok(Serving { closer, ended })
    }

    /// With the predecessor's process its rings ended.
    async fn release(&self) {}

    async fn close(&self, _over: bool) -> Result<(), Errno> {
        Node::close(&**self).await
    }
}
