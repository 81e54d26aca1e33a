//! The console of a real process, shared by the mains of `tapdisk` and `tap-img`.
//!
//! The programs themselves are functions over the seam, in `tap-programs`, so that a simulated world can start the same
//! ones. Only this package knows both the programs and the real host.

mod terminal;

pub use terminal::Terminal;

/// The version of the programs, and the commit that they are built from, if that is known: `0.1.0 (0a46d2e11f00)`.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), env!("TAPDISK_REVISION"));
