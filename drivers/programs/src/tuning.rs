//! Settings that are not on the command line: limits of a program's parts, and layers between them.
//!
//! ```text
//!   ring, NBD ──► [over_disk] ──► Disk ──► [over_image] ──► image
//! ```
//!
//! The mains use the default. Settings for operators are options of the command line instead.

use crate::spec::DiskSpec;
use std::fmt;
use std::rc::Rc;
use tap_control::json::EVENTS_KEPT;
use tap_core::{Node, SchedulerLimits};
use tap_host::Budget;
use tap_images::OpenOptions;
use tap_nbd::ServerLimits;
use tap_xenbus::RingLimits;

/// Returns the replacement of the given node of the given disk.
pub type Layer = Rc<dyn Fn(&DiskSpec, Rc<dyn Node>) -> Rc<dyn Node>>;

/// Limits of the parts of a program, and layers between them.
#[derive(Clone)]
pub struct Tuning {
    /// Limits of the scheduler of each disk.
    pub scheduler: SchedulerLimits,
    /// Memory for the cached tables of one image, in bytes.
    pub table_bytes: usize,
    /// Limits of the ring of each guest.
    pub ring: RingLimits,
    /// Limits of the NBD server; the number of connections is an option of the command line.
    pub server: ServerLimits,
    /// Events that are kept for clients that listen and are behind.
    pub events_kept: usize,
    /// The memory of the process, instead of the size from the command line.
    pub memory: Option<Budget>,
    /// Added over each opened image, below its scheduler.
    pub over_image: Option<Layer>,
    /// Added over each served disk.
    pub over_disk: Option<Layer>,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            scheduler: SchedulerLimits::default(),
            table_bytes: OpenOptions::default().table_bytes,
            ring: RingLimits::default(),
            server: ServerLimits::default(),
            events_kept: EVENTS_KEPT,
            memory: None,
            over_image: None,
            over_disk: None,
        }
    }
}

impl Tuning {
    pub(crate) fn image(&self, spec: &DiskSpec, image: Rc<dyn Node>) -> Rc<dyn Node> {
        through(self.over_image.as_ref(), spec, image)
    }

    pub(crate) fn disk(&self, spec: &DiskSpec, disk: Rc<dyn Node>) -> Rc<dyn Node> {
        through(self.over_disk.as_ref(), spec, disk)
    }
}

fn through(layer: Option<&Layer>, spec: &DiskSpec, node: Rc<dyn Node>) -> Rc<dyn Node> {
    match layer {
        Some(layer) => layer(spec, node),
        None => node,
    }
}

impl fmt::Debug for Tuning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layers = (self.over_image.is_some(), self.over_disk.is_some());
        f.debug_struct("Tuning")
            .field("scheduler", &self.scheduler)
            .field("table_bytes", &self.table_bytes)
            .field("ring", &self.ring)
            .field("server", &self.server)
            .field("events_kept", &self.events_kept)
            .field("memory", &self.memory)
            .field("layers", &layers)
            .finish()
    }
}
