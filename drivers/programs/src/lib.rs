//! The programs of this project as functions.
//!
//! ```text
//!   main (drivers/tapdisk)                a simulated world
//!     builds the real host                  has a host
//!          └────► daemon::run, img::run ◄──────────┘
//!                 arguments, tuning, host, console ─► exit status
//! ```
//!
//! # Contract
//!
//! * A program accesses its machine only through the seam and [`Console`]. So a world can start a program as a process.
//! * Each failure is one line, "PROGRAM: failed to ...", or one about a wrong command line.
//!
//! | module | purpose |
//! |---|---|
//! | [`spec`] | names of disks on a command line |
//! | [`disk`] | a named disk as a node: image, scheduler, cache mode |
//! | [`daemon`] | `tapdisk` |
//! | [`serve`] | `tapdisk serve` |
//! | [`xen`] | `tapdisk xen` |
//! | [`control`] | `tapdisk control` |
//! | [`ctl`] | `tap-ctl` |
//! | [`tapback`] | `tapback` |
//! | [`attach`] | `tapdisk attach`, `tapdisk detach` |
//! | [`tuning`] | settings that are not on the command line |
//! | [`vdev`] | guests' names of disks |
//! | [`img`] | `tap-img` |
//! | [`mason`] | `mason` |
//! | [`usage`] | command lines that cannot be parsed |

pub mod attach;
mod console;
pub mod control;
pub mod ctl;
pub mod daemon;
pub mod disk;
mod help;
pub mod img;
pub mod mason;
mod merge;
mod old_names;
pub mod serve;
mod size;
pub mod spec;
pub mod tapback;
mod tls;
pub mod tuning;
pub mod usage;
pub mod vdev;
pub mod xen;

pub use console::Console;
pub use tap_core::Disks;
pub use tuning::Tuning;

tap_host::listed! {
    /// The seeded bugs of this crate.
    pub BUGS: Bug with [attach::BUGS, control::BUGS, ctl::BUGS, img::BUGS, merge::BUGS, tapback::BUGS, xen::BUGS];
}

tap_host::listed! {
    /// The marks of this crate.
    pub MARKS: Mark with [
        attach::MARKS, control::MARKS, ctl::MARKS, disk::MARKS, merge::MARKS, serve::MARKS, tapback::MARKS,
        xen::MARKS,
    ];
}
