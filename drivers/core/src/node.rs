//! The one object-safe trait: anything that answers block requests.

use crate::{Request, Response, WaitReport};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use tap_host::{Errno, SECTOR_BYTES, SectorRange};

/// A boxed future of one thread.
pub type LocalBoxFuture<T> = Pin<Box<dyn Future<Output = T> + 'static>>;

/// What holds for a node for as long as it is open.
///
/// Requests are in sectors of 512 bytes whatever the block sizes are: those say what is fast.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NodeInfo {
    /// Size of the disk in sectors of 512 bytes.
    pub size_sectors: u64,
    /// Writes are refused with `EROFS`.
    pub read_only: bool,
    /// Block in bytes, a power of two of at least 512: a write of less, or one that is not aligned to it, has to read
    /// first.
    pub physical_block_bytes: u32,
    /// Granularity of discards in bytes, a power of two of at least 512: what is not aligned to it gives back no space.
    pub discard_bytes: u32,
    /// Sectors that one read or write is carried out with as it is; a larger one is split, which may cost a copy. At
    /// least 1.
    pub max_sectors: u32,
    /// What makes an answered write durable.
    pub durable: Durable,
}

/// What makes an answered write durable.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Durable {
    /// Its answer. A flush succeeds all the same.
    AtAnswer,
    /// A flush, or its own flag FUA.
    AtFlush,
    /// Closing the node; flushes are answered and not carried out.
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
}

/// What a node is called: the path of its file, or the address of its server. Nodes of one graph that hold bytes have
/// names of their own. Clones share the text.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeName(Rc<str>);

impl NodeName {
    /// The node that is called `name`.
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

/// What a run of sectors is like.
#[derive(Clone, PartialEq, Eq, Debug)]
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
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Source {
    /// Nowhere: no image says anything about it, so it reads as zeros.
    Nothing,
    /// A node, which is the one that was asked or one below it; `None` where the node does not know.
    Node {
        /// Which one.
        name: Option<NodeName>,
        /// Byte offset in its file, where the bytes stand there as they are.
        offset: Option<u64>,
        /// They stand there compressed.
        compressed: bool,
    },
}

impl Source {
    /// A node that does not say more.
    pub const UNKNOWN: Source = Source::Node { name: None, offset: None, compressed: false };
}

/// A node below another.
#[derive(Clone)]
pub struct Child {
    /// What it is to its parent: `lower`, `backing`.
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
        let count = u64::from(range.count);
        let all = Extent { count, source: Source::UNKNOWN, zero: false, allocated: true };
        Box::pin(std::future::ready(Ok(vec![all])))
    }
    /// Size, mode, and what else holds for it.
    fn info(&self) -> NodeInfo;
    /// What it is called, where it holds bytes itself. Filters have no name.
    fn name(&self) -> Option<NodeName> {
        None
    }
    /// The nodes directly below it; none once it is closed.
    fn children(&self) -> Vec<Child> {
        Vec::new()
    }
    /// What waits for what in this node; [`wait_report`] has those below it too.
    fn waits(&self) -> Vec<WaitReport> {
        Vec::new()
    }
    /// Makes everything durable and lets go of files and locks. Called once, when no request is in flight.
    fn close(&self) -> LocalBoxFuture<Result<(), Errno>>;
}

/// Most nodes that a walk over a graph visits.
const MAX_NODES: usize = 4096;

/// `node` and all nodes below it, each with how many nodes that hold bytes are above it, from the top down. A node that
/// several parents have is visited with each of them.
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

/// What waits for what in `node` and below: what to print when nothing moves any more.
pub fn wait_report(node: Rc<dyn Node>) -> Vec<WaitReport> {
    nodes(node).iter().flat_map(|(_, node)| node.waits()).collect()
}
