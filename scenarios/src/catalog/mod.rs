//! The catalogue of scenarios.

pub mod crash;
pub mod setup;

use crate::run::Scenario;
use sim::Label;

/// All scenarios, in the order in which they are listed and run.
pub static ALL: &[&Scenario] = &[&crash::QCOW_POWER_CUT, &crash::OVERLAY_POWER_CUT, &crash::RECOVERY_CRASH, &crash::QCOW_ERRORS];

/// The labels of scenarios.
pub static LABELS: &[&Label] = &[&crash::CRASH_AT];

/// The scenario called `name`.
pub fn find(name: &str) -> Option<&'static Scenario> {
    ALL.iter().find(|s| s.name == name).copied()
}
