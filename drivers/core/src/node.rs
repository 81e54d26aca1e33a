//! The trait [`Node`]: anything that answers block requests.

use crate::{Request, Response, WaitReport};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use tap_host::{Errno, SECTOR_BYTES, SectorRange};

/// A boxed future that stays on one thread.
pub type LocalBoxFuture<T> = Pin<Box<dyn Future<Output = T> + 'static>>;

/// Properties of a node that do not change while it is open.
///
/// Requests are in sectors of 512 bytes whatever the block sizes are: those only say what is fast.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NodeInfo {
    /// Size of the disk in sectors of 512 bytes.
    pub size_sectors: u64,
    /// Writes are refused with `EROFS`.
    pub read_only: bool,
    /// Block size in bytes, a power of two of at least 512: a smaller or unaligned write has to read first.
    pub physical_block_bytes: u32,
    /// Granularity of discards in bytes, a power of two of at least 512: an unaligned part frees no space.
    pub discard_bytes: u32,
    /// Most sectors of a read or write that is not split, at least 1; splitting may cost a copy.
    pub max_sectors: u32,
    /// What makes an answered write durable.
    pub durable: Durable,
}

/// What makes an answered write durable.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Durable {
    /// The answer itself. A flush succeeds and does nothing.
    AtAnswer,
    /// A flush, or the write's FUA flag.
    AtFlush,
    /// Closing the node; flushes are answered but not performed.
    AtClose,
}

impl NodeInfo {
    /// A node of `size_sectors` that works in sectors of 512 bytes, takes requests of any size, and flushes.
    pub fn new(size_sectors: u64, read_only: bool) -> Self {
        Self {
            size_sectors,
            read_only,
            physical_block_bytes: SECTOR_BYTES as u32,
            discard_bytes: SECTOR_BYTES as u32,
            max_sectors: u32::MAX,
            durable: Durable::AtFlush,
        }
    }

    /// What every node asks of a request before it looks at it.
    ///
    /// # Errors
    /// `EINVAL` if `request` is not well formed, `EROFS` if it changes what cannot be written.
    pub fn check(&self, request: &Request) -> Result<(), Errno> {
        if !request.is_well_formed(self.size_sectors) {
            Err(Errno::EINVAL)
        } else if self.read_only && request.op.is_write() {
            Err(Errno::EROFS)
        } else {
            Ok(())
        }
    }
}

/// The name of a node: the path of its file, or the address of its server. Nodes of one graph that hold bytes have
/// different names. Clones share the text.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeName(Rc<str>);

impl NodeName {
    /// A node's name from text.
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A run of sectors with the same properties.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Sectors, at least 1.
    pub count: u64,
    /// Where the bytes come from.
    pub source: Source,
    /// Certain to read as zeros.
    pub zero: bool,
    /// Space is allocated for it.
    pub allocated: bool,
}

/// Where the bytes of a run of sectors come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Source {
    /// Nowhere: no image covers the sectors, so they read as zeros.
    Nothing,
    /// A node: the one that was asked, or one below it.
    Node {
        /// Its name, if known.
        name: Option<NodeName>,
        /// Byte offset in its file, if the bytes are stored there unchanged.
        offset: Option<u64>,
        /// The bytes are stored compressed.
        compressed: bool,
    },
    /// Unknown: the map of these sectors is damaged or cannot be read, and no other try will help. Reads of them fail
    /// as well. Such an extent is neither zeros nor free.
    Unreadable {
        /// The node whose map it is, if known.
        name: Option<NodeName>,
        /// What reading the map failed with.
        error: Errno,
    },
}

impl Source {
    /// A node that reports no details.
    pub const UNKNOWN: Source = Source::Node { name: None, offset: None, compressed: false };

    /// What reading the map failed with, if it did.
    pub fn error(&self) -> Option<Errno> {
        match self {
            Source::Unreadable { error, .. } => Some(*error),
            _ => None,
        }
    }
}

/// A node below another.
#[derive(Clone)]
pub struct Child {
    /// Its role for the parent: `lower`, `backing`.
    pub role: &'static str,
    /// The node.
    pub node: Rc<dyn Node>,
}

impl Child {
    /// The one node below a filter.
    pub fn lower(node: Rc<dyn Node>) -> Self {
        Self { role: "lower", node }
    }
}

/// Anything that answers block requests.
///
/// | node | crate |
/// |---|---|
/// | vbd, scheduler | `tap-core` |
/// | image formats | `tap-images` |
/// | NBD client | `tap-nbd` |
///
/// `submit` starts nothing before the future is polled, but it fixes the request's place in the order. The caller polls
/// the future, and that of `extents`, until it is ready, unless the node is dropped as well. Only [`Slot`](crate::Slot),
/// the top of every disk, allows its callers to drop them. Requests of one node may run concurrently and finish in any
/// order; overlapping ones are kept in order by the scheduler above, not by formats. A request outside the disk fails
/// with `EINVAL`.
pub trait Node: 'static {
    /// Answers `request`, once.
    fn submit(&self, request: Request) -> LocalBoxFuture<Response>;
    /// Describes the sectors from `range.start` on with at most `max` extents (at least 1), one after the other, that
    /// cover at least one sector and at most `range`, which is within the disk and not empty. The cuts between equal
    /// extents mean nothing. Requests in flight may or may not be seen. Damage of a map is no error of the query: it is
    /// an extent, [`Source::Unreadable`]. The default reports all as data.
    fn extents(&self, range: SectorRange, max: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        let _ = max;
        let count = u64::from(range.count);
        let all = Extent { count, source: Source::UNKNOWN, zero: false, allocated: true };
        Box::pin(std::future::ready(Ok(vec![all])))
    }
    /// Size, mode and other fixed properties.
    fn info(&self) -> NodeInfo;
    /// Its name, if it holds bytes itself. Filters have no name.
    fn name(&self) -> Option<NodeName> {
        None
    }
    /// The nodes directly below it; none once it is closed.
    fn children(&self) -> Vec<Child> {
        Vec::new()
    }
    /// Which requests wait for which in this node; [`wait_report`] adds the nodes below it.
    fn waits(&self) -> Vec<WaitReport> {
        Vec::new()
    }
    /// Makes everything durable, and lets other processes read its files from now on: it is read-only for good. Called
    /// when no request that changes it is in flight; after an error it is as before.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where there is no file to share, otherwise those of the files.
    fn freeze(&self) -> LocalBoxFuture<Result<(), Errno>> {
        Box::pin(std::future::ready(Err(Errno::EOPNOTSUPP)))
    }
    /// Makes everything durable and releases files and locks. Called once, when no request is in flight.
    fn close(&self) -> LocalBoxFuture<Result<(), Errno>>;
}

/// Limit of nodes that a walk over a graph visits.
const MAX_NODES: usize = 4096;

/// `node` and all nodes below it, from the top down, each with the number of nodes above it that hold bytes. A node
/// with several parents is listed once for each.
pub fn nodes(node: Rc<dyn Node>) -> Vec<(usize, Rc<dyn Node>)> {
    let mut found = vec![(0, node)];
    let mut at = 0;
    while at < found.len() && found.len() < MAX_NODES {
        let (depth, node) = found[at].clone();
        let below = depth + usize::from(node.name().is_some());
        found.extend(node.children().into_iter().map(|child| (below, child.node)));
        at += 1;
    }
    found
}

/// Which requests wait for which in `node` and below, to print when nothing makes progress.
pub fn wait_report(node: Rc<dyn Node>) -> Vec<WaitReport> {
    nodes(node).iter().flat_map(|(_, node)| node.waits()).collect()
}
