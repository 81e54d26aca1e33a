//! The testbed.

pub mod check;
pub mod tag;
