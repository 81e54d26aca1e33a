//! When the power of a world goes: the decision that power cuts and explored crash states have in common.

use sim::{Entity, Label};

/// After how many operations on the host's files the power is cut; 0 is when everything has come to rest.
pub static CRASH_AT: Label = Label::new("crash-at", "the power is cut after {} host operations");

/// Who decides about the power in an epoch.
pub fn power(epoch: u32) -> Entity {
    Entity::WORLD.child("power", u64::from(epoch))
}
