//! The testbed: worlds made of the stack and the models, guests, checkers, the catalogue, and the program `tapsim`.

pub mod bench;
pub mod catalog;
pub mod check;
pub mod cli;
pub mod explain;
pub mod explore;
pub mod formats;
pub mod front;
pub mod fuzz;
pub mod guest;
pub mod hunt;
pub mod machine;
mod panics;
pub mod program;
mod respawn;
pub mod run;
pub mod scenario;
pub mod stack;
pub mod sweep;
pub mod tag;
mod tapdisk;
mod toolstack;
pub mod workload;
pub mod world;
