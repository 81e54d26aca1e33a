//! Simulated Xen: what a back end sees of the hypervisor and of xenstored, and the raw side of a guest.
//!
//! ```text
//!    guest's node                         Xen                       back end's node
//!   +--------------+      +---------------------------------+      +--------------+
//!   | GuestRing    |─────►| pages, grant tables             |◄─────| XenPort      |
//!   | raw writes   |      | event channels (levels)         |      | (the seam:   |
//!   | of any bytes |      | xenstored (tree, watches, tx)   |      |  Grants,     |
//!   +--------------+      | named pages outside processes   |      |  Events, ..) |
//!                         +---------------------------------+      +--------------+
//! ```
//!
//! # Contract
//!
//! * [`Xen`] holds all state; [`XenPort`] is one process's access to it and implements the seam.
//! * A process that is killed has no further effect: its port asks [`sim::Node::step`] before each store, copy, event
//!   and xenstore operation. Afterwards the model cleans up as the kernel would: mappings, channels, watches and
//!   transactions are released, named pages stay.
//! * Guests are not trusted and not checked: [`Page`]s take any bytes at any time, and [`Page::on_foreign_load`] lets
//!   a guest change them between two loads of a back end.
//! * Latencies and conflicts are decisions ([`LABELS`]); 0 means at once and without conflict.
//!
//! This side of a ring is written from Xen's headers and shares no logic with the back end, otherwise both would agree
//! on the same mistakes.

mod channels;
mod copies;
mod cpu;
mod event;
mod grants;
mod guest;
mod mapping;
mod page;
mod port;
mod store;
mod store_port;
mod toolstack;
mod xen;

pub use event::XenEvent;
pub use grants::Grant;
pub use guest::{FrontKeys, GrantedPage, GuestRing};
pub use mapping::Mapping;
pub use page::Page;
pub use port::{Channel, XenPort};
pub use store::{Access, Perms, Quota};
pub use store_port::{StoreTransaction, StoreWatcher};
pub use toolstack::{VbdPaths, attach_vbd, remove_vbd};
pub use xen::{Counts, LABELS, Options, Xen};

#[cfg(test)]
mod tests;
