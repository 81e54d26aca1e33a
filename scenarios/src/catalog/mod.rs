//! The catalogue of scenarios.

pub mod crash;
pub mod damage;
pub mod nbd;
pub mod ring;
pub mod setup;
pub mod toolstack;

use crate::guest;
use crate::run::Scenario;
use sim::Label;

/// All scenarios, in the order in which they are listed and run.
pub static ALL: &[&Scenario] = &[
    &ring::RING_RAW,
    &ring::TAPDISK_KILLED,
    &crash::RAW_POWER_CUT,
    &crash::QCOW_POWER_CUT,
    &crash::OVERLAY_POWER_CUT,
    &crash::RECOVERY_CRASH,
    &crash::QCOW_ERRORS,
    &crash::RAW_ERRORS,
    &ring::FRONTEND_RECONNECT,
    &ring::HOSTILE_FRONTEND,
    &ring::TWO_GUESTS,
    &ring::RING_POWER_CUT,
    &toolstack::TAPDISK_REPLACED,
    &toolstack::SECOND_TAPDISK,
    &toolstack::GUEST_DESTROYED,
    &toolstack::HOT_PLUG,
    &damage::DAMAGED_IMAGE,
    &nbd::NBD_SPLIT_READS,
    &nbd::NBD_CLIENT_DIES,
    &nbd::NBD_SLOW_CLIENT,
    &nbd::NBD_SERVER_RESTARTS,
    &nbd::NBD_SERVER_POWER_CUT,
    &nbd::NBD_HOSTILE_CLIENT,
    &nbd::NBD_HOSTILE_SERVER,
    &nbd::NBD_CROWD,
];

/// The labels of scenarios.
pub static LABELS: &[&Label] = &[
    &crash::CRASH_AT,
    &crash::FAIL_NTH,
    &ring::KILL_AFTER,
    &ring::RECONNECT_AT,
    &toolstack::REPLACE_AFTER,
    &toolstack::SECOND_AFTER,
    &toolstack::DESTROY_AFTER,
    &guest::TRICK,
    &guest::KEYS,
    &guest::NBD_TRICK,
    &guest::NBD_SHAPE,
    &guest::NBD_LIE,
    &nbd::CLIENT_DIES,
    &nbd::CROWD,
    &damage::DAMAGE,
];

/// The scenario called `name`; `real-image` as well, which needs an image and is not listed.
pub fn find(name: &str) -> Option<&'static Scenario> {
    ALL.iter().chain([&&crash::REAL_IMAGE]).find(|s| s.name == name).copied()
}
