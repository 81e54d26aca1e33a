//! The back end's half of a disk's life in xenstore: offer, connect, serve, close, and again.
//!
//! ```text
//!            toolstack: both at 1
//!                  │ features, 2
//!                  ▼
//!    ┌───────► Waiting ──front end 3 or 4──► connect ring, sectors ..., 4 ──► Serving (front end 5: also 5)
//!    │             │                              │ bad keys: error, 5           │ front end 6
//!    │ front end 1,│ front end 5 or 6             ▼                              ▼ take no more
//!    │ online      ▼                           Failed ──front end 5 or 6──► Draining
//!    └───────── Closed ◄──────────────── 6 ───────┴──────────── 6, unmapped ─────┘
//!                  │ offline: the image is closed before 6
//!                  ▼ end
//! ```
//!
//! # Contract
//!
//! * Acts on values, not on events: a watch only means "look again". Whatever a front end skips, repeats or undoes
//!   leads to one of the states above or changes nothing.
//! * Every key of the front end is read again at every connect, with limits, and never trusted.
//! * A state is written in a transaction that checks that the directory exists and that nothing else has changed the
//!   state, so a removed device is not recreated and a toolstack's 5 is not overwritten.
//! * A back end that is asked to leave answers what is in flight and ends, without telling the front end.
//! * A front end in state 5 may still use its disk: a mounted disk is not released. A toolstack's request to close
//!   changes nothing for a front end in use; a toolstack that insists removes its nodes.
//! * A front end that reconnects in a loop is made to wait, up to a second each time.
//! * A ring in use that we cannot take over is left alone: nothing is written. One process drives a disk: the owner of
//!   the lock beside its record.
//! * A process that finds its device connected takes over the ring without telling the front end (see
//!   [`tap_ring::record`]).
//! * A disk that has become larger is published in the way of Linux's xen-blkback: `sectors`, and the state 4 once
//!   more, in one transaction. Whoever finds the device connected, and `sectors` smaller than its disk, does so.
//!
//! Follows Xen's `io/xenbus.h` and `io/blkif.h`.

mod config;
mod disk;
mod features;
mod keys;
mod lead;
mod lock;
mod machine;
mod orphans;
mod pace;
mod patience;
mod rules;
mod states;
mod supervise;
mod watches;

pub use config::{BackendConfig, BackendEnd, BackendError, Hotplug, XenHost};
pub use disk::{DiskSize, ServedDisk, Serving, Shown, Unserved};
pub use keys::is_read_only;
pub use lead::lead;
pub use machine::Backend;
pub use orphans::is_device;
pub use patience::patiently;
pub use supervise::{Device, DeviceFilter, supervise};
pub use tap_ring::Limits as RingLimits;

tap_host::listed! {
    /// The seeded bugs of this crate.
    pub BUGS: Bug with [
        features::BUGS, lead::BUGS, lock::BUGS, machine::BUGS, orphans::BUGS, patience::BUGS, states::BUGS,
        supervise::BUGS,
    ];
}

tap_host::listed! {
    /// The marks of this crate.
    pub MARKS: Mark with [machine::MARKS];
}
