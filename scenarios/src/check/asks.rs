//! What an NBD server asks of a disk, counted between them.
//!
//! A look at extents gives as few of them as a disk may, and takes as long, if the world says so: an answer about many
//! takes many looks then. Where operations may fail, a look may as well: tables that cannot be read.

use super::Invariant;
use crate::world::World;
use sim::{Draw, Entity, Label};
use std::cell::Cell;
use std::rc::Rc;
use tap_core::{Child, Extent, LocalBoxFuture, Node, NodeInfo, Op, Request, Response};
use tap_host::{Errno, SectorRange};

/// Whether a look at extents fails.
pub static LOOK_FAILS: Label = Label::new("look-fails", "look {n} at extents fails");

/// A node that passes everything on and counts.
pub struct Asks(Rc<Inner>);

struct Inner {
    world: World,
    entity: Entity,
    lower: Rc<dyn Node>,
    /// Most sectors that a look tells about; 0 is all that the disk does.
    cut_sectors: u64,
    /// How long a look takes at least, in nanoseconds: tables that are not in memory.
    late_ns: u64,
    flushes: Cell<u64>,
    /// Requests and looks that have not ended.
    running: Cell<u32>,
    looks: Cell<u32>,
    most_looks: Cell<u32>,
    /// Looks that have begun.
    begun: Cell<u32>,
    /// The turn in which the last look ended.
    turn: Cell<u64>,
}

impl Asks {
    /// Above `lower`, which is disk `number` of `process`.
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
            looks: Cell::new(0),
            most_looks: Cell::new(0),
            begun: Cell::new(0),
            turn: Cell::new(u64::MAX),
        })))
    }

    /// Flushes that were asked for.
    pub fn flushes(&self) -> u64 {
        self.0.flushes.get()
    }

    /// Requests and looks at extents that have not ended.
    pub fn in_flight(&self) -> u32 {
        self.0.running.get()
    }

    /// Most looks at extents at one time.
    pub fn most_looks(&self) -> u32 {
        self.0.most_looks.get()
    }
}

/// A request or a look, until its end.
struct Runs(Rc<Inner>);

impl Runs {
    fn begin(inner: &Rc<Inner>) -> Self {
        inner.running.set(inner.running.get() + 1);
        Self(Rc::clone(inner))
    }
}

impl Drop for Runs {
    fn drop(&mut self) {
        self.0.running.set(self.0.running.get() - 1);
    }
}

impl Inner {
    /// Whether the next look fails.
    fn fails(&self) -> bool {
        let n = self.begun.replace(self.begun.get() + 1);
        let draw = |d: &mut Draw| u64::from(d.below(8) == 0);
        self.world.errors_allowed() && self.world.sim.decide(self.entity, &LOOK_FAILS, n, draw) != 0
    }
}

/// A look at extents, until its end.
struct Looks(Rc<Inner>);

impl Looks {
    fn begin(inner: &Rc<Inner>) -> Self {
        inner.looks.set(inner.looks.get() + 1);
        inner.most_looks.set(inner.most_looks.get().max(inner.looks.get()));
        Self(Rc::clone(inner))
    }

    /// What is told of `found`. Others have their turn between two looks.
    fn end(self, found: &mut Vec<Extent>) {
        let turn = self.0.world.sim.turns();
        if self.0.turn.replace(turn) == turn {
            self.0.world.fail(Invariant::M1, "two looks at extents in one turn");
        }
        if self.0.cut_sectors > 0 {
            found.truncate(1);
            found.iter_mut().for_each(|extent| extent.count = extent.count.min(self.0.cut_sectors));
        }
    }
}

impl Drop for Looks {
    fn drop(&mut self) {
        self.0.looks.set(self.0.looks.get() - 1);
    }
}

impl Node for Asks {
    fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
        self.0.flushes.set(self.0.flushes.get() + u64::from(request.op == Op::Flush));
        if request.op.is_write() && self.0.lower.info().read_only {
            let text =
                format!("a disk that may only be read is asked for {:?} {}", request.op, request.range);
            self.0.world.fail(Invariant::N2, text);
        }
        let (runs, answer) = (Runs::begin(&self.0), self.0.lower.submit(request));
        Box::pin(async move {
            let response = answer.await;
            drop(runs);
            response
        })
    }

    fn extents(&self, range: SectorRange, most: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        let (runs, looks) = (Runs::begin(&self.0), Looks::begin(&self.0));
        let answer = self.0.lower.extents(range, most);
        Box::pin(async move {
            let inner = &looks.0;
            if inner.late_ns > 0 {
                inner.world.sim.sleep_ns(inner.late_ns).await;
            }
            let mut found = answer.await;
            if inner.fails() {
                return Err(Errno::EIO);
            }
            if let Ok(found) = &mut found {
                looks.end(found);
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

    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        self.0.lower.close()
    }
}
