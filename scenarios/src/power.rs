//! When a world loses power: the decision that power cuts and explored crash states share.

use sim::{Entity, Label};

/// Number of operations on the host's files after which the power is cut; 0 is once everything is at rest.
pub static CRASH_AT: Label = Label::new("crash-at", "the power is cut after {} host operations");

/// The entity that decides about the power in an epoch.
pub fn power(epoch: u32) -> Entity {
    Entity::WORLD.child("power", u64::from(epoch))
}
