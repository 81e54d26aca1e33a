//! The one object-safe trait: anything that answers block requests.

use crate::{Request, Response};
use std::future::Future;
use std::pin::Pin;
use tap_host::Errno;

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

/// Anything that answers block requests.
///
/// | node | crate |
/// |---|---|
/// | vbd, scheduler | `tap-core` |
/// | raw, qcow | `tap-images` |
///
/// `submit` starts nothing before the future is polled, but it is where a request gets its place in the order: who calls
/// it polls the future or drops it. Requests of one node may run concurrently and finish in any
/// order; overlapping ones are kept in order by the scheduler above, not by formats. A request outside the disk is
/// answered with `EINVAL`.
pub trait Node: 'static {
    /// Answers `request`, once.
    fn submit(&self, request: Request) -> LocalBoxFuture<Response>;
    /// Size and mode.
    fn info(&self) -> NodeInfo;
    /// Makes everything durable and lets go of files and locks. Called once, when no request is in flight.
    fn close(&self) -> LocalBoxFuture<Result<(), Errno>>;
}
