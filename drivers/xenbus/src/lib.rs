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
//! * Acts on values, not on events: a watch only means "look again". Whatever a front end skips, repeats or takes back
//!   leads to one of the states above or changes nothing.
//! * Every key of the front end is read anew at every connect, with limits, and never trusted.
//! * A state is written in a transaction that checks that the directory is there and that nobody else moved on, so a
//!   removed device is not made again and a toolstack's 5 is not overwritten.
//! * Who is asked to leave answers what is in flight and goes, without a word to the front end.
//! * A front end that says 5 may still use its disk: one that is mounted is not let go of. What a toolstack wishes
//!   changes nothing for a front end in use; it takes its nodes away if it means it.
//! * A front end that begins anew in a loop is made to wait, up to a second each time.
//! * A ring that is served, and cannot be taken up by us, is left alone: nothing is written. One process leads a disk:
//!   the owner of the lock beside its record.
//! * A process that finds its device connected takes the ring up again without a word to the front end
//!   (see [`tap_ring::record`]).
//!
//! Follows Xen's `io/xenbus.h` and `io/blkif.h`.

mod config;
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

pub use config::{BackendConfig, BackendEnd, BackendError, Hotplug, XenHost};
pub use lead::lead;
pub use machine::Backend;
pub use patience::patiently;
pub use supervise::{Device, DeviceFilter, supervise};
