//! Checks, between two layers of a disk, that the upper asks only what it may, and that the lower answers so.
//!
//! ```text
//!   guest ──► vbd ──► scheduler ──[Contract]──► image
//! ```
//!
//! The contracts are those of `tap_core`'s `Node` and of the scheduler: overlapping requests run one after the other,
//! no more run at once than the depth permits, merged requests keep to their maximum size, extents cover part of the
//! queried range, and a layer is closed once, when it is idle.

use super::{About, Invariant};
use crate::limits::StackLimits;
use crate::world::World;
use sim::micros;
use smallvec::SmallVec;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_core::{Child, Extent, LocalBoxFuture, Node, NodeInfo, Op, Request, Response, SchedulerLimits};
use tap_host::{Errno, SectorRange};

/// Maximum number of buffers of a request. No guest here uses as many; merging stops below what one call takes.
const MERGED_BUFFERS: usize = 512;

/// A node that passes every request on, and fails the world when a request breaks the contract.
pub struct Contract(Rc<Inner>);

struct Inner {
    world: World,
    /// The process of both layers. Its code may run up to its next wait after it was killed.
    process: sim::Node,
    lower: Rc<dyn Node>,
    limits: SchedulerLimits,
    /// Requests that were not merged have several buffers, too.
    in_pieces: bool,
    /// The sectors at the edges of requests have buffers of their own.
    has_edges: bool,
    /// Requests in progress, in order of their numbers.
    running: RefCell<Vec<Running>>,
    /// How many of them have data.
    with_data: Cell<usize>,
    /// Extents queries in progress.
    queries: Cell<u32>,
    next: Cell<u64>,
    closed: Cell<bool>,
    /// The node is below another image, or is being copied, so not all requests come from one scheduler.
    shared: Cell<bool>,
}

struct Running {
    number: u64,
    op: Op,
    range: SectorRange,
    /// Virtual time in nanoseconds.
    since_ns: u64,
}

impl Contract {
    /// A node between a scheduler with these `limits` and `lower`, in `process`.
    pub fn new(world: &World, process: &sim::Node, lower: Rc<dyn Node>, limits: &StackLimits) -> Rc<Self> {
        Rc::new(Self(Rc::new(Inner {
            world: world.clone(),
            process: process.clone(),
            lower,
            limits: limits.scheduler,
            in_pieces: limits.piece_sectors > 0,
            has_edges: limits.unaligned,
            running: RefCell::default(),
            with_data: Cell::new(0),
            queries: Cell::new(0),
            next: Cell::new(0),
            closed: Cell::new(false),
            shared: Cell::new(false),
        })))
    }

    /// Sets whether an image above or a copy uses the node besides the scheduler.
    pub fn set_shared(&self, shared: bool) {
        self.0.shared.set(shared);
    }
}

impl Inner {
    fn violated(&self, text: String) {
        if self.process.is_alive() {
            self.world.fail(Invariant::D2, text);
        }
    }

    fn check_request(&self, request: &Request) {
        let (op, range) = (request.op, request.range);
        let info = self.lower.info();
        if self.closed.get() {
            self.violated(format!("a closed layer received {op:?} {range}"));
        }
        if !request.is_well_formed(info.size_sectors) || info.read_only && op.is_write() {
            self.violated(format!("{op:?} {range} is not valid for a disk of {info:?}"));
        }
        if self.shared.get() {
            return;
        }
        let max = u64::from(self.limits.merge_sectors) * tap_host::SECTOR_BYTES;
        if self.merged(request) > 1 && !self.in_pieces && range.len_bytes() > max {
            self.violated(format!("{op:?} {range} exceeds the maximum size of merged requests"));
        }
        if request.bufs.len() > MERGED_BUFFERS {
            self.violated(format!("{op:?} {range} has {} buffers", request.bufs.len()));
        }
        let running = self.running.borrow();
        let exclusive = |one: &Running| one.op.is_write() || op.is_write();
        if let Some(other) = running.iter().find(|one| one.range.overlaps(range) && exclusive(one)) {
            let since = micros(other.since_ns);
            let text = format!(
                "{op:?} {range} came down while {:?} {} was running, since {since}",
                other.op, other.range
            );
            let about = About { places: vec![range, other.range], ..About::default() };
            if self.process.is_alive() {
                self.world.fail_about(Invariant::D2, text, about);
            }
        }
        let at_once = 1 + self.with_data.get();
        if op.has_data() && at_once > self.limits.depth {
            self.violated(format!("{at_once} reads and writes run at the same time"));
        }
    }

    /// Registers a request, and returns its number.
    fn begin(&self, op: Op, range: SectorRange) -> u64 {
        let number = self.next.replace(self.next.get() + 1);
        let since_ns = self.world.sim.now_ns();
        self.running.borrow_mut().push(Running { number, op, range, since_ns });
        self.with_data.set(self.with_data.get() + usize::from(op.has_data()));
        number
    }

    fn end(&self, number: u64) {
        let mut running = self.running.borrow_mut();
        if let Ok(at) = running.binary_search_by_key(&number, |one| one.number) {
            let ended = running.remove(at);
            self.with_data.set(self.with_data.get() - usize::from(ended.op.has_data()));
        }
    }

    /// How many requests `request` may consist of. Edges that were added to read and keep the rest of their sectors are
    /// part of one.
    fn merged(&self, request: &Request) -> usize {
        let is_edge = |at: usize| self.has_edges && request.bufs[at].len() as u64 == tap_host::SECTOR_BYTES;
        let count = request.bufs.len();
        match count {
            0 | 1 => count,
            2 => count - usize::from(is_edge(0) || is_edge(1)),
            _ => count - usize::from(is_edge(0)) - usize::from(is_edge(count - 1)),
        }
    }

    fn check_extents(&self, range: SectorRange, max: usize, found: &[Extent]) {
        let covered: u64 = found.iter().map(|extent| extent.count).sum();
        let empty = found.iter().any(|extent| extent.count == 0);
        if found.is_empty() || found.len() > max || empty || covered > u64::from(range.count) {
            let text = format!("{} extents of {covered} sectors for {range}, at most {max}", found.len());
            self.violated(text);
        }
    }
}

/// Registers a request while it runs.
struct InFlight(Rc<Inner>, u64);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.end(self.1);
    }
}

/// Counts an extents query while it runs.
struct Query(Rc<Inner>);

impl Drop for Query {
    fn drop(&mut self) {
        self.0.queries.set(self.0.queries.get() - 1);
    }
}

impl Node for Contract {
    fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
        let inner = Rc::clone(&self.0);
        inner.check_request(&request);
        let number = inner.begin(request.op, request.range);
        let lens: SmallVec<[usize; 2]> = request.bufs.iter().map(|buf| buf.len()).collect();
        let (what, answer) = ((request.op, request.range), inner.lower.submit(request));
        let runs = InFlight(inner, number);
        Box::pin(async move {
            let response = answer.await;
            if !response.bufs.iter().map(|buf| buf.len()).eq(lens) {
                runs.0.violated(format!("{:?} {} was answered with other buffers", what.0, what.1));
            }
            response
        })
    }

    fn extents(&self, range: SectorRange, max: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        let inner = Rc::clone(&self.0);
        if inner.closed.get() || max == 0 || range.count == 0 || !range.fits(inner.lower.info().size_sectors)
        {
            inner.violated(format!("{max} extents of {range} were requested"));
        }
        inner.queries.set(inner.queries.get() + 1);
        let answer = inner.lower.extents(range, max);
        let queries = Query(inner);
        Box::pin(async move {
            let found = answer.await;
            if let Ok(found) = &found {
                queries.0.check_extents(range, max, found);
            }
            found
        })
    }

    fn info(&self) -> NodeInfo {
        self.0.lower.info()
    }

    fn children(&self) -> Vec<Child> {
        if self.0.closed.get() { Vec::new() } else { vec![Child::lower(Rc::clone(&self.0.lower))] }
    }

    fn freeze(&self) -> LocalBoxFuture<Result<(), Errno>> {
        let running = self.0.running.borrow().iter().filter(|one| one.op.is_write()).count();
        if self.0.closed.get() || running > 0 {
            self.0.violated(format!("a layer was frozen with {running} changes in flight, or once closed"));
        }
        // From now on it is below another image.
        self.set_shared(true);
        self.0.lower.freeze()
    }

    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        let inner = &self.0;
        let (running, queries) = (inner.running.borrow().len(), inner.queries.get());
        if inner.closed.replace(true) || running > 0 || queries > 0 {
            let text = format!("a layer was closed with {running} requests and {queries} extents queries");
            inner.violated(format!("{text}, or twice"));
        }
        inner.lower.close()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::broken_by;
    use tap_host::{IoBuf, IoVec};

    struct Nothing;

    impl Node for Nothing {
        fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
            Box::pin(async move {
                if request.range.start.0 == 9 {
                    std::future::pending::<()>().await;
                }
                Response { result: Ok(()), bufs: request.bufs }
            })
        }
        fn extents(&self, range: SectorRange, max: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
            let source = tap_core::Source::Nothing;
            let one = Extent { count: u64::from(range.count), source, zero: true, allocated: false };
            Box::pin(async move { Ok(vec![one; max + usize::from(range.start.0 == 9)]) })
        }
        fn info(&self) -> NodeInfo {
            NodeInfo::new(64, false)
        }
        fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
            Box::pin(async { Ok(()) })
        }
    }

    fn violated<F: Future<Output = ()>>(run: impl FnOnce(Rc<Contract>) -> F + 'static) -> bool {
        let found = broken_by(move |world| async move {
            let scheduler = SchedulerLimits { depth: 2, merge_sectors: 4, ..SchedulerLimits::default() };
            let limits = StackLimits { scheduler, ..StackLimits::draw(&world) };
            let host = kernel_model::SimHost::start(&world.kernel, &world.xen, "tapdisk", 0);
            run(Contract::new(&world, host.process.node(), Rc::new(Nothing), &limits)).await;
        });
        assert!(matches!(found, None | Some(Invariant::D2)), "{found:?}");
        found.is_some()
    }

    fn write(at: u64, bufs: &[usize]) -> Request {
        let sectors = bufs.iter().sum::<usize>() as u32;
        let bufs: IoVec = bufs.iter().map(|len| IoBuf::unpooled(len * 512).unwrap()).collect();
        Request::write(SectorRange::new(at, sectors), bufs)
    }

    #[test]
    fn contract_violations_are_reported() {
        assert!(!violated(|node| async move {
            for request in [write(0, &[2, 2]), write(0, &[8]), Request::flush()] {
                drop(node.submit(request).await);
            }
            let _ = node.extents(SectorRange::new(0, 4), 1).await;
            let _ = node.close().await;
        }));
        assert!(violated(|node| async move { drop(node.submit(write(0, &[3, 2])).await) }), "merged too far");
        assert!(violated(|node| async move { drop(node.submit(write(63, &[2])).await) }), "past the end");
        assert!(violated(|node| async move { drop(node.extents(SectorRange::new(9, 4), 1).await) }));
        assert!(violated(|node| async move {
            let (_one, _other) = (node.submit(write(8, &[4])), node.submit(write(10, &[1])));
        }));
        assert!(violated(|node| async move {
            let _all =
                [node.submit(write(0, &[1])), node.submit(write(1, &[1])), node.submit(write(2, &[1]))];
        }));
        assert!(violated(|node| async move {
            let _runs = node.submit(write(9, &[1]));
            let _ = node.close().await;
        }));
        assert!(violated(|node| async move {
            let _looks = node.extents(SectorRange::new(0, 4), 1);
            let _ = node.close().await;
        }));
        assert!(violated(|node| async move {
            let _ = node.close().await;
            drop(node.submit(Request::flush()).await);
        }));
    }
}
