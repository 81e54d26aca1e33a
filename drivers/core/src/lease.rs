//! Shares one node between several parents.
//!
//! ```text
//!   disk A ──► Lease ─┐
//!   disk B ──► Lease ─┼─► node          closed with the last lease
//!   overlay ─► Lease ─┘
//! ```
//!
//! A parent closes the nodes below it. A node with several parents is leased to each of them, and closed once, with its
//! last lease.
//!
//! # Order
//!
//! Nodes do not order overlapping requests; the scheduler of each disk orders only its own. A node that more than one
//! parent writes to therefore needs another scheduler in between, which sees the requests of all of them:
//!
//! ```text
//!   disk A (slot, scheduler) ──► Lease ─┐
//!   disk B (slot, scheduler) ──► Lease ─┴─► Scheduler ──► image
//! ```

use crate::{Child, Extent, LocalBoxFuture, Node, NodeInfo, Request, Response};
use std::cell::Cell;
use std::rc::Rc;
use tap_host::{Errno, SectorRange};

/// One parent's reference to a node that other parents may share.
///
/// A lease may be dropped without being closed; if it was the last one, the node is dropped without being closed.
pub struct Lease {
    shared: Rc<Shared>,
    held: Cell<bool>,
}

struct Shared {
    node: Rc<dyn Node>,
    leases: Cell<usize>,
}

impl Lease {
    /// The first lease of `node`, which only leases may close from now on.
    pub fn new(node: Rc<dyn Node>) -> Self {
        Self { shared: Rc::new(Shared { node, leases: Cell::new(1) }), held: Cell::new(true) }
    }

    /// Another lease of the same node.
    ///
    /// # Panics
    /// When this one is closed.
    pub fn share(&self) -> Self {
        assert!(self.held.get(), "a lease is shared before it is closed");
        self.shared.leases.set(self.shared.leases.get() + 1);
        Self { shared: Rc::clone(&self.shared), held: Cell::new(true) }
    }

    /// Ends this lease; returns whether it was the last one.
    fn end(&self) -> bool {
        if !self.held.replace(false) {
            return false;
        }
        let left = self.shared.leases.get() - 1;
        self.shared.leases.set(left);
        left == 0
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.end();
    }
}

impl Node for Lease {
    fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
        self.shared.node.submit(request)
    }

    fn extents(&self, range: SectorRange, max: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        self.shared.node.extents(range, max)
    }

    fn info(&self) -> NodeInfo {
        self.shared.node.info()
    }

    fn children(&self) -> Vec<Child> {
        if self.held.get() { vec![Child::lower(Rc::clone(&self.shared.node))] } else { Vec::new() }
    }

    fn freeze(&self) -> LocalBoxFuture<Result<(), Errno>> {
        self.shared.node.freeze()
    }

    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        if self.end() { self.shared.node.close() } else { Box::pin(std::future::ready(Ok(()))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Pool, Script, write};
    use crate::{Scheduler, SchedulerLimits, Slot};
    use tap_host::VbdId;

    #[test]
    fn a_node_is_closed_with_its_last_lease() {
        let (pool, script) = (Pool::new(), Script::default());
        let first = Lease::new(Rc::new(script.clone()));
        let [second, third] = [first.share(), first.share()];
        drop(third);
        for lease in [&first, &first] {
            assert_eq!(pool.start(lease.close()).take(), Some(Ok(())));
        }
        assert_eq!(script.times_closed(), 0, "one lease is left, and closing a lease twice counts once");
        assert_eq!(pool.start(second.submit(write(1, 1))).take().unwrap().result, Ok(()));
        assert_eq!(pool.start(second.close()).take(), Some(Ok(())));
        assert_eq!(script.times_closed(), 1);
    }

    /// Two disks over leases of one node write the same sector. Returns how many writes reached it at once.
    fn at_once(pool: &Pool, script: &Script, node: Rc<dyn Node>) -> usize {
        let first = Lease::new(node);
        let second = first.share();
        let disks = [first, second].map(|lease| {
            let own = Scheduler::new(pool.clone(), Rc::new(lease), SchedulerLimits::default());
            Slot::new(pool.clone(), VbdId(1), Rc::new(own))
        });
        let answers = disks.each_ref().map(|disk| pool.start(disk.submit(write(5, 2))));
        pool.run();
        for _ in 0..2 {
            script.release_now();
            pool.run();
        }
        assert!(answers.iter().all(|answer| answer.take().unwrap().result == Ok(())));
        let closes = disks.each_ref().map(|disk| pool.start(disk.close()));
        assert!(closes.iter().all(|close| close.take() == Some(Ok(()))));
        assert_eq!(script.times_closed(), 1);
        script.max_in_flight()
    }

    #[test]
    fn a_shared_scheduler_orders_the_writes_of_two_parents() {
        let (pool, script) = (Pool::new(), Script::held());
        let scheduler = Scheduler::new(pool.clone(), Rc::new(script.clone()), SchedulerLimits::default());
        assert_eq!(at_once(&pool, &script, Rc::new(scheduler)), 1);
        let (pool, script) = (Pool::new(), Script::held());
        assert_eq!(at_once(&pool, &script, Rc::new(script.clone())), 2, "without it they run concurrently");
    }
}
