//! The one object-safe trait: anything that answers block requests.

use crate::{Request, Response, WaitReport};
use std::future::Future;
use std::pin::Pin;
use tap_host::{Errno, SectorRange};

/// A boxed future of one thread.
pub type LocalBoxFuture<T> = Pin<Box<dyn Future<Output = T> + 'static>>;

/// What holds for a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NodeInfo {
    /// Size of the disk in sectors of 512 bytes.
    pub size_sectors: u64,
    /// Writes are refused with `EROFS`.
    pub read_only: bool,
}

/// What a run of sectors is like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Sectors, at least 1.
    pub count: u64,
    /// Where the bytes come from.
    pub source: Source,
    /// Reads as zeros for sure.
    pub zero: bool,
    /// Space is allocated for it.
    pub allocated: bool,
}

/// Where the bytes of a run of sectors come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// Nowhere: no image says anything about it, so it reads as zeros.
    Nothing,
    /// The image `depth` levels below the top one (0 is the top one).
    Image {
        /// Levels below the top.
        depth: u32,
        /// Byte offset in that image's file, where the bytes stand there as they are.
        offset: Option<u64>,
        /// They stand there compressed.
        compressed: bool,
    },
}

/// Anything that answers block requests.
///
/// | node | crate |
/// |---|---|
/// | vbd, scheduler | `tap-core` |
/// | image formats | `tap-images` |
/// | NBD client | `tap-nbd` |
///
/// `submit` starts nothing before the future is polled, but it is where a request gets its place in the order: who
/// calls it polls the future or drops it. Requests of one node may run concurrently and finish in any order;
/// overlapping ones are kept in order by the scheduler above, not by formats. A request outside the disk is answered
/// with `EINVAL`.
pub trait Node: 'static {
    /// Answers `request`, once.
    fn submit(&self, request: Request) -> LocalBoxFuture<Response>;
    /// What sectors are like from `range.start` on: at most `most` extents (at least 1), one after the other, that
    /// cover at least one sector and at most `range`, which is within the disk and not empty. How they are cut means
    /// nothing. Requests in flight are seen or not. A node that knows nothing better says that all is data.
    fn extents(&self, range: SectorRange, most: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        let _ = most;
        let source = Source::Image { depth: 0, offset: None, compressed: false };
        let all = Extent { count: u64::from(range.count), source, zero: false, allocated: true };
        Box::pin(std::future::ready(Ok(vec![all])))
    }
    /// Size and mode.
    fn info(&self) -> NodeInfo;
    /// What waits for what here and below: what to print when nothing moves any more.
    fn wait_report(&self) -> Vec<WaitReport> {
        Vec::new()
    }
    /// Makes everything durable and lets go of files and locks. Called once, when no request is in flight.
    fn close(&self) -> LocalBoxFuture<Result<(), Errno>>;
}
