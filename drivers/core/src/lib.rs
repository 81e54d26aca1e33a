//! The request engine: the part of a disk that does not depend on its format or on where its requests come from.
//!
//! ```text
//!   ring ──► Slot ──► Scheduler ──► cache mode ──► (graph) ──► image
//!            life     order, depth,                            any Node
//!            cycle    merging, retry
//!           └──────────── a Disk ─────────────┘
//! ```
//!
//! # Contract
//!
//! A [`Node`] takes a [`Request`] and answers it exactly once. A caller may drop the future of a [`Slot`], which then
//! completes the request; below a slot nothing is dropped. Nodes own no thread, clock or file; they are generic over
//! the seam inside and `Rc<dyn Node>` outside.
//!
//! One [`Tracker`] per disk or image decides which request waits for which; all other waiting uses the primitives in
//! [`wait`].

mod cache;
mod disk;
mod disks;
mod lease;
mod measures;
mod node;
mod park;
mod request;
mod scheduler;
mod slot;
mod tracker;
pub mod wait;

#[cfg(test)]
mod testing;

pub use cache::CacheMode;
pub use disk::{Disk, DiskConfig};
pub use disks::{DiskStatus, Disks, ListError, Listed};
pub use lease::Lease;
pub use measures::{Histogram, KINDS, KindMeasures, Measures};
pub use node::{
    Child, Durable, Extent, LocalBoxFuture, Node, NodeInfo, NodeName, Source, nodes, wait_report,
};
pub use park::{ParkError, StandIn, Unfit};
pub use request::{Op, Request, Response, ZeroFlags};
pub use scheduler::{Scheduler, SchedulerLimits, SchedulerStats};
pub use slot::{ExchangeError, Slot};
pub use tracker::{Access, Space, Ticket, TicketName, Tracker, WaitReport, WaitsFor};

tap_host::listed! {
    /// The seeded bugs of this crate.
    pub BUGS: Bug with [disk::BUGS, disks::BUGS, park::BUGS, scheduler::BUGS, slot::BUGS];
}

tap_host::listed! {
    /// The marks of this crate.
    pub MARKS: Mark with [disk::MARKS, park::MARKS, scheduler::MARKS, slot::MARKS];
}
