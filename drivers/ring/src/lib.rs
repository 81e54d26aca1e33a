//! The back end of a blkif ring: takes a guest's block requests out of shared memory and answers them from a
//! [`tap_core::Node`].
//!
//! ```text
//!   guest's page          run() takes, in order            one task per request
//!   +-----------+  copy   +--------------------+  submit   +-------------------+
//!   | requests  |────────►| parse, check, note |──────────►| node, grant copy  |
//!   | responses |◄────────| publish in batches |◄──────────| result            |
//!   +-----------+         +---------+----------+   done    +-------------------+
//!                                   │ every step
//!                           in-flight record (outside the process)
//! ```
//!
//! # Contract
//!
//! * The guest may write anything anywhere at any time. Each entry is copied out once and only the copy is read; a
//!   request that breaks the protocol is answered with an error; impossible indices close the ring.
//! * Each request that was taken is answered exactly once, even if the process dies and is replaced: see
//!   [`record`].
//! * No more requests are held than the ring has entries, and no more memory than [`Limits`] allows. A lack of
//!   buffers delays taking requests, never answering them.
//! * Responses are published together, and the guest is notified only when it asked to be.
//!
//! Follows Xen's `io/ring.h` and `io/blkif.h`: one page, x86_64 layout, READ, WRITE and FLUSH_DISKCACHE. A flush with
//! data flushes, writes and flushes again, the strongest interpretation in use.

mod blkif;
mod completions;
mod config;
mod connect;
mod end;
mod guest;
mod kernel;
mod peer;
pub mod record;
mod reserved;
mod resume;
mod ring;
mod serve;
mod slots;
mod tap;
mod tap_error;

pub use blkif::BlkifRing;
pub use config::{ConnectError, LAYOUT, Limits, RingConfig};
pub use end::{RingCloser, RingEnd};
pub use tap::{TapConfig, TapDisk, TapHost, TapNews, TapOffers};
pub use tap_error::TapError;

tap_host::listed! {
    /// The seeded bugs of this crate.
    pub BUGS: Bug with [
        blkif::BUGS, connect::BUGS, guest::BUGS, kernel::BUGS, reserved::BUGS, ring::BUGS, serve::BUGS, tap::BUGS,
    ];
}

tap_host::listed! {
    /// The marks of this crate.
    pub MARKS: Mark with [blkif::MARKS, connect::MARKS, reserved::MARKS, serve::MARKS, tap::MARKS];
}
