//! What is behind a back end: who serves its rings.
//!
//! ```text
//!   Backend ── shown, connect, close ──► a node of this process        its rings are served here
//!                                   └──► a disk of another process     which is told to serve them
//! ```

use crate::config::XenHost;
use std::future::Future;
use std::rc::Rc;
use tap_core::wait::{Receiver, joined};
use tap_core::{Node, NodeInfo};
use tap_host::{Errno, SECTOR_BYTES};
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

    /// Has a ring served.
    ///
    /// # Errors
    /// [`ConnectError`]; then nothing of the guest is mapped or bound.
    fn connect(&self, host: &H, ring: RingConfig) -> impl Future<Output = Result<Serving, ConnectError>>;

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

    async fn connect(&self, host: &H, ring: RingConfig) -> Result<Serving, ConnectError> {
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
