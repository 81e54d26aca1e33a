//! The console of a real process, shared by the mains of `tapdisk`, `tap-img` and `tap-ctl`.
//!
//! The programs themselves are functions over the seam, in `tap-programs`, so that a simulated world can start the same
//! ones. Only this package knows both the programs and the real host.

mod terminal;

pub use terminal::Terminal;

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;

/// The version of the programs, and the commit that they are built from, if that is known: `0.1.0 (0a46d2e11f00)`.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), env!("TAPDISK_REVISION"));

/// Makes the folder where tap-ctl and tapdisk meet, for our user alone, with the one for minor numbers in it.
///
/// # Errors
/// Text that continues "failed to".
pub fn make_control_folder(folder: &str) -> Result<(), String> {
    let inner = std::path::Path::new(folder).join("tapdisk");
    let made = DirBuilder::new().recursive(true).mode(0o700).create(inner);
    made.map_err(|error| format!("make the folder {folder}: {error}"))
}
