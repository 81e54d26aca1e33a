//! The programs of this project as functions.
//!
//! ```text
//!   main (drivers/tapdisk)                a simulated world
//!     builds the real host                  has a host
//!          └────► serve::run, xen::run, img::run ◄────┘
//!                 arguments, tuning, host, console ─► exit status
//! ```
//!
//! # Contract
//!
//! * Everything a program does to its machine goes through the seam or through [`Console`]. So a world can start a
//!   program as a process.
//! * Failures are one line each, which reads "PROGRAM: failed to ...", or tells what is wrong with the command
//!   line.
//!
//! | module | what it is for |
//! |---|---|
//! | [`spec`] | how disks are named on a command line |
//! | [`disk`] | a named disk as a node: image, scheduler, cache mode |
//! | [`daemon`] | `tapdisk` |
//! | [`serve`] | `tapdisk serve` |
//! | [`xen`] | `tapdisk xen` |
//! | [`tuning`] | what the command line does not say |
//! | [`vdev`] | disks as guests name them |
//! | [`img`] | `tap-img` |
//! | [`usage`] | command lines that cannot be parsed |

mod console;
pub mod daemon;
pub mod disk;
mod help;
pub mod img;
pub mod serve;
pub mod spec;
pub mod tuning;
pub mod usage;
pub mod vdev;
pub mod xen;

pub use console::Console;
pub use tap_core::Disks;
pub use tuning::Tuning;
