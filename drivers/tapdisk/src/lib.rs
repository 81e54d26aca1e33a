//! The console of a real process, shared by the mains of `tapdisk` and `tap-img`.
//!
//! The programs themselves are functions over the seam, in `tap-programs`, so that a simulated world can start the same
//! ones. Only this package knows both the programs and the real host.

mod terminal;

pub use terminal::Terminal;
