//! Checks that no change reaches a read-only disk. The disk refuses changes, too, so that a front or a server that
//! passes them on would go unnoticed.

use super::Invariant;
use crate::world::World;
use std::rc::Rc;
use tap_core::{Child, Extent, LocalBoxFuture, Node, NodeInfo, Request, Response};
use tap_host::{Errno, SectorRange};

/// A read-only disk that fails the world when it receives a change.
pub struct Frozen {
    world: World,
    process: sim::Node,
    lower: Rc<dyn Node>,
}

impl Frozen {
    /// `disk`, which is served in `process`, with the check if it is read-only.
    pub fn over(world: &World, process: &sim::Node, disk: Rc<dyn Node>) -> Rc<dyn Node> {
        match disk.info().read_only {
            true => Rc::new(Self { world: world.clone(), process: process.clone(), lower: disk }),
            false => disk,
        }
    }
}

impl Node for Frozen {
    fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
        if request.op.is_write() && self.process.is_alive() {
            let text = format!("a read-only disk received {:?} {}", request.op, request.range);
            self.world.fail(Invariant::D2, text);
        }
        self.lower.submit(request)
    }

    fn extents(&self, range: SectorRange, max: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        self.lower.extents(range, max)
    }

    fn info(&self) -> NodeInfo {
        self.lower.info()
    }

    fn children(&self) -> Vec<Child> {
        vec![Child::lower(Rc::clone(&self.lower))]
    }

    fn freeze(&self) -> LocalBoxFuture<Result<(), Errno>> {
        self.lower.freeze()
    }

    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        self.lower.close()
    }
}
