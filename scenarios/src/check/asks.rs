//! Counts what an NBD server asks of a disk, from a layer between the two.
//!
//! If the world says so, an extents query returns as few extents as the contract permits, and takes time; a reply about
//! many extents then needs many queries. Where operations may fail, a query may fail as well, as if tables were
//! unreadable.

use super::Invariant;
use crate::world::World;
use sim::{Draw, Entity, Label};
use std::cell::Cell;
use std::rc::Rc;
use tap_core::{Child, Extent, LocalBoxFuture, Node, NodeInfo, Op, Request, Response};
use tap_host::{Errno, SectorRange};

/// Whether an extents query fails.
pub static LOOK_FAILS: Label = Label::new("look-fails", "extents query {n} fails");

/// A node that passes every request on and counts it.
pub struct CountingNode(Rc<Inner>);

struct Inner {
    world: World,
    entity: Entity,
    lower: Rc<dyn Node>,
    /// Maximum number of sectors that a query describes; 0 is no limit.
    cut_sectors: u64,
    /// Minimum time of a query in nanoseconds, as for tables that are not in memory.
    late_ns: u64,
    flushes: Cell<u64>,
    /// Requests and queries in progress.
    running: Cell<u32>,
    max_running: Cell<u32>,
    queries: Cell<u32>,
    max_queries: Cell<u32>,
    /// Queries started.
    begun: Cell<u32>,
    /// The turn in which the last query ended.
    turn: Cell<u64>,
}

impl CountingNode {
    /// Wraps `lower`, which is disk `number` of `process`.
    pub fn new(world: &World, process: &sim::Node, number: u64, lower: Rc<dyn Node>) -> Rc<Self> {
        let entity = process.entity().child("asks", number);
        world.sim.name_entity(entity, || format!("disk {number} of {}", process.name()));
        Rc::new(Self(Rc::new(Inner {
            world: world.clone(),
            entity,
            lower,
            cut_sectors: world.setting("extents-cut", &[0, 8, 40]),
            late_ns: world.setting("extents-late", &[0, 20_000, 20_000]),
            flushes: Cell::new(0),
            running: Cell::new(0),
            max_running: Cell::new(0),
            queries: Cell::new(0),
            max_queries: Cell::new(0),
            begun: Cell::new(0),
            turn: Cell::new(u64::MAX),
        })))
    }

    /// The disk below.
    pub fn lower(&self) -> Rc<dyn Node> {
        Rc::clone(&self.0.lower)
    }

    /// Flushes submitted.
    pub fn flushes(&self) -> u64 {
        self.0.flushes.get()
    }

    /// Requests and extents queries in progress.
    pub fn in_flight(&self) -> u32 {
        self.0.running.get()
    }

    /// Maximum number of requests and extents queries in progress at one time.
    pub fn max_in_flight(&self) -> u32 {
        self.0.max_running.get()
    }

    /// Maximum number of extents queries in progress at one time.
    pub fn max_queries(&self) -> u32 {
        self.0.max_queries.get()
    }
}

/// Counts a request or query while it runs.
struct InFlight(Rc<Inner>);

impl InFlight {
    fn begin(inner: &Rc<Inner>) -> Self {
        inner.running.set(inner.running.get() + 1);
        inner.max_running.set(inner.max_running.get().max(inner.running.get()));
        Self(Rc::clone(inner))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.running.set(self.0.running.get() - 1);
    }
}

impl Inner {
    /// Whether the next query fails.
    fn next_fails(&self) -> bool {
        let n = self.begun.replace(self.begun.get() + 1);
        let draw = |d: &mut Draw| u64::from(d.below(8) == 0);
        self.world.errors_allowed() && self.world.sim.decide(self.entity, &LOOK_FAILS, n, draw) != 0
    }
}

/// Counts an extents query while it runs.
struct Query(Rc<Inner>);

impl Query {
    fn begin(inner: &Rc<Inner>) -> Self {
        inner.queries.set(inner.queries.get() + 1);
        inner.max_queries.set(inner.max_queries.get().max(inner.queries.get()));
        Self(Rc::clone(inner))
    }

    /// Cuts `found` to what the query returns. Other tasks must run between two queries.
    fn end(self, found: &mut Vec<Extent>) {
        let turn = self.0.world.sim.turns();
        if self.0.turn.replace(turn) == turn {
            self.0.world.fail(Invariant::M1, "two extents queries in one turn");
        }
        if self.0.cut_sectors > 0 {
            found.truncate(1);
            found.iter_mut().for_each(|extent| extent.count = extent.count.min(self.0.cut_sectors));
        }
    }
}

impl Drop for Query {
    fn drop(&mut self) {
        self.0.queries.set(self.0.queries.get() - 1);
    }
}

impl Node for CountingNode {
    fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
        self.0.flushes.set(self.0.flushes.get() + u64::from(request.op == Op::Flush));
        if request.op.is_write() && self.0.lower.info().read_only {
            let text = format!("a read-only disk received {:?} {}", request.op, request.range);
            self.0.world.fail(Invariant::N2, text);
        }
        let (runs, answer) = (InFlight::begin(&self.0), self.0.lower.submit(request));
        Box::pin(async move {
            let response = answer.await;
            drop(runs);
            response
        })
    }

    fn extents(&self, range: SectorRange, max: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        let (runs, queries) = (InFlight::begin(&self.0), Query::begin(&self.0));
        let answer = self.0.lower.extents(range, max);
        Box::pin(async move {
            let inner = &queries.0;
            if inner.late_ns > 0 {
                inner.world.sim.sleep_ns(inner.late_ns).await;
            }
            let mut found = answer.await;
            if inner.next_fails() {
                return Err(Errno::EIO);
            }
            if let Ok(found) = &mut found {
                queries.end(found);
            }
            drop(runs);
            found
        })
    }

    fn info(&self) -> NodeInfo {
        self.0.lower.info()
    }

    fn children(&self) -> Vec<Child> {
        vec![Child::lower(Rc::clone(&self.0.lower))]
    }

    fn freeze(&self) -> LocalBoxFuture<Result<(), Errno>> {
        self.0.lower.freeze()
    }

    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        self.0.lower.close()
    }
}
