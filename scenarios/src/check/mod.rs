//! What must hold, and how violations are reported.

mod asks;
mod contract;
mod frontier;
mod frozen;
mod history;
mod invariant;
mod loss;
pub mod oracle;
pub mod shipped;
mod space;
mod verdict;

pub use asks::{CountingNode, LOOK_FAILS};
pub use contract::Contract;
pub use frontier::{Block, Clock, NEVER, Order, Version};
pub use frozen::Frozen;
pub use history::{BlockHistory, Finding, Initial, WriteId, Wrong};
pub use invariant::Invariant;
pub use loss::{BeforeCut, lost_to_error};
pub use oracle::Oracle;
pub(crate) use oracle::is_broken;
pub use space::{Space, SpaceEffect};
pub use verdict::{About, Failure, Verdict};
