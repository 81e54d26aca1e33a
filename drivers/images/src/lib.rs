//! Image formats: files of the host as disks of a guest.
//!
//! ```text
//!   name, or first bytes ──► Formats ──► Driver ──► open, create, describe, check, grow
//!                            registry    a format's row
//!
//!   Request ──► an image ──► ImageFile ──► tap_host::File
//!               where bytes   whole transfers, alignment,
//!               live          shared and remembered synchronisation
//! ```
//!
//! # Contract
//!
//! * Every image is a [`Node`](tap_core::Node). When a write succeeds, the host's file has accepted both data and
//!   mapping; after a successful flush it survives a crash.
//! * After a crash at any moment an image opens, and every sector reads as one of the versions written to it (or as it
//!   was before), never as anything else. Space that a crash or an error leaves over is lost, not reused.
//! * A failed request can be repeated, and changes no sector outside its range.
//! * The contents of a file are checked before use: a hostile image causes errors, never a panic or an allocation above
//!   the limits.
//! * An image opened for writing is locked against every other process, one opened for reading against writers.

mod calls;
pub mod carve;
mod chain;
mod error;
mod foreign;
mod format;
pub mod formats;
mod grow;
mod io;
pub mod map;
mod memory;
mod merging;
mod registry;
mod sync;
mod sync_record;
mod units;

#[cfg(test)]
mod testing;

pub use calls::{file_id, read_small};
pub use chain::{
    Backing, BackingGate, BackingPolicy, MAX_CHAIN, OpenOptions, folder, name_beside, resolve, same_path,
};
pub use error::ImageError;
pub use format::{
    CheckReport, Description, Format, FormatInfo, ImageFormat, ImageSpec, NewImage, OptionInfo,
};
pub use formats::{SHIPPED, format_called};
pub use io::{ImageFile, sync_file, sync_name};
pub use merging::{check_merging, mark_merging, mark_of, merging, unmark_merged};
pub use registry::{Driver, Formats, HEAD_BYTES, OpenImage};
pub use units::{parse_size, show_size};

use tap_host::{Files, Log, Probe, SharedPages, Tasks, Time};

tap_host::listed! {
    /// The seeded bugs of this crate.
    pub BUGS: Bug with [
        calls::BUGS, formats::BUGS, io::BUGS, map::BUGS, merging::BUGS, registry::BUGS, sync::BUGS,
        sync_record::BUGS,
    ];
}

tap_host::listed! {
    /// The marks of this crate.
    pub MARKS: Mark with [calls::MARKS, io::MARKS, map::MARKS, merging::MARKS, sync::MARKS];
}

/// The parts of a host that images use.
pub trait ImageHost: Files + SharedPages + Time + Tasks + Log + Probe {}
impl<T: Files + SharedPages + Time + Tasks + Log + Probe> ImageHost for T {}
