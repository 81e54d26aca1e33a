//! The catalogue of scenarios.

pub mod absent;
pub mod away;
pub mod bad_sectors;
pub mod control;
mod costs;
pub mod crash;
pub mod created;
pub mod damage;
pub mod device;
pub mod exchange;
pub mod failures;
pub mod graphs;
pub mod latch;
pub mod life;
pub mod nbd;
pub mod of_format;
pub mod read_only;
pub mod recovered;
pub mod ring;
pub mod scale;
pub mod setup;
mod shown;
pub mod tap;
pub mod tools;
pub mod toolstack;
mod until_cut;

use crate::check;
use crate::front;
use crate::guest;
use crate::overseer;
use crate::power;
use crate::scenario::Scenario;
use sim::Label;
use std::sync::LazyLock;

/// All scenarios, in the order in which they are listed and run: those of the formats, then the others.
pub static ALL: LazyLock<Vec<&'static Scenario>> = LazyLock::new(|| {
    of_format::all().iter().map(|made| made.scenario).chain(OTHERS.iter().copied()).collect()
});

/// Scenarios that are not about one format.
static OTHERS: &[&Scenario] = &[
    &tap::TAP_DEVICE,
    &tap::TAP_POWER_CUT,
    &ring::RING_RAW,
    &ring::FRONTEND_RECONNECT,
    &ring::HOSTILE_FRONTEND,
    &ring::TWO_GUESTS,
    &ring::RING_POWER_CUT,
    &latch::FLUSH_ERRORS_AND_DEATHS,
    &toolstack::TAPDISK_REPLACED,
    &toolstack::SECOND_TAPDISK,
    &toolstack::GUEST_DESTROYED,
    &toolstack::HOT_PLUG,
    &away::TAPDISK_AWAY,
    &absent::IMAGE_ABSENT,
    &life::DISK_LIFE,
    &exchange::IMAGE_EXCHANGED,
    &read_only::RING_READ_ONLY,
    &tools::IMAGE_TOOLS,
    &tools::IMAGE_TOOLS_ERRORS,
    &tools::IMAGE_REMADE,
    &tools::IMAGE_MERGED,
    &tools::IMAGE_RESIZED,
    &nbd::NBD_SPLIT_READS,
    &nbd::NBD_CLIENT_DIES,
    &nbd::NBD_SLOW_CLIENT,
    &nbd::NBD_SERVER_RESTARTS,
    &nbd::NBD_SERVER_POWER_CUT,
    &nbd::NBD_FLUSH_ERRORS_AND_DEATHS,
    &nbd::NBD_HOSTILE_CLIENT,
    &nbd::NBD_HOSTILE_SERVER,
    &nbd::NBD_WRONG_GREETING,
    &nbd::NBD_MODEST_SERVER,
    &nbd::NBD_CROWD,
    &nbd::NBD_EVERY_COMMAND,
    &nbd::NBD_BYTES,
    &nbd::NBD_SERVER_STOPPED,
    &nbd::NBD_SERVE_REFUSED,
    &device::NBD_DEVICE,
    &device::NBD_DEVICE_DETACHED,
    &device::BLKBACK_OVER_DEVICE,
    &control::CONTROLLED,
    &control::SNAPSHOTS,
    &control::GIVEN,
    &graphs::GRAPH_POWER_CUT,
    &graphs::GRAPH_ERRORS,
];

/// Those of [`OTHERS`] that have been swept for a long time. A scenario that is neither here nor marked as settled
/// where it is declared is new, and `tapsim sweep --runs` gives it [`NEW_WEIGHT`] times as many runs.
static SETTLED: &[&str] = &[
    "ring-raw",
    "frontend-reconnect",
    "hostile-frontend",
    "two-guests",
    "ring-power-cut",
    "tapdisk-replaced",
    "guest-destroyed",
    "hot-plug",
    "nbd-split-reads",
    "nbd-client-dies",
    "nbd-slow-client",
    "nbd-server-restarts",
    "nbd-server-power-cut",
    "nbd-hostile-client",
];
const NEW_WEIGHT: u64 = 3;

fn is_settled(scenario: &Scenario) -> bool {
    let of_format = of_format::all().iter().find(|made| made.scenario.name == scenario.name);
    of_format.map_or_else(|| SETTLED.contains(&scenario.name), |made| made.settled)
}

/// The share of each of `scenarios` in `runs`; at least one each, so the sum may be slightly larger.
pub fn shares(scenarios: &[&Scenario], runs: u64) -> Vec<u64> {
    let weights: Vec<u64> = scenarios.iter().map(|s| if is_settled(s) { 1 } else { NEW_WEIGHT }).collect();
    let sum: u64 = weights.iter().sum();
    weights
        .iter()
        .map(|weight| ((u128::from(runs) * u128::from(*weight)).div_ceil(sum.max(1).into()) as u64).max(1))
        .collect()
}

/// The labels of scenarios.
pub static LABELS: &[&Label] = &[
    &power::CRASH_AT,
    &tap::LOOKER,
    &tap::STOP_IN_USE,
    &tap::ASK_TO_CLOSE,
    &failures::FAIL_NTH,
    &graphs::GRAPH_NODE,
    &ring::KILL_AFTER,
    &ring::RECONNECT_AT,
    &life::GIVE_UP,
    &life::PAUSE,
    &life::CLOSE_AFTER,
    &life::LOOK,
    &control::CONTROL,
    &control::RACE,
    &control::GIVES_UP,
    &control::CUT_REQUEST,
    &control::JSON_SENT,
    &control::LISTENS,
    &control::PRIORITIES,
    &control::GIVEN_ACT,
    &control::SNAPSHOT,
    &control::SNAPSHOT_DIES,
    &control::BESIDE_MERGE,
    &exchange::EXCHANGE,
    &exchange::PAUSE_BESIDE,
    &toolstack::REPLACE_AFTER,
    &toolstack::SECOND_AFTER,
    &toolstack::DESTROY_AFTER,
    &away::BACK_AFTER,
    &latch::DIES_IN_SYNC,
    &absent::ABSENT_FOR,
    &tools::MERGE_ROUND,
    &tools::PATTERN,
    &tools::RESIZE_ROUND,
    &tools::ROUND,
    &created::ROUND,
    &front::FRONT_KEYS,
    &front::LINGERS,
    &toolstack::UNUSED,
    &guest::SCRIBBLE,
    &guest::TRICK,
    &guest::FLOOD,
    &guest::TOGETHER,
    &guest::KEYS,
    &overseer::OVERSEE,
    &guest::NBD_TRICK,
    &guest::NBD_SHAPE,
    &guest::NBD_LIE,
    &guest::NBD_REFUSE,
    &guest::NBD_GREETING,
    &guest::NBD_HANG_UP,
    &guest::NBD_LESS,
    &guest::NBD_OPTION,
    &check::LOOK_FAILS,
    &scale::LARGE,
    &nbd::CLIENT_DIES,
    &nbd::CROWD,
    &nbd::STOP_AFTER,
    &guest::NBD_STEP,
    &nbd::BYTES_STEP,
    &damage::DAMAGE,
];

/// The scenario called `name`; also `real-image`, which needs an image and is not listed.
pub fn find(name: &str) -> Option<&'static Scenario> {
    ALL.iter().chain([&&crash::REAL_IMAGE]).find(|s| s.name == name).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_shared_by_weight() {
        let names: Vec<&str> = ALL.iter().map(|s| s.name).collect();
        assert!(SETTLED.iter().all(|name| names.contains(name)), "a settled scenario no longer exists");
        let (old, new) = (find("ring-raw").unwrap(), find("second-tapdisk").unwrap());
        assert_eq!(shares(&[old, new], 4000), [1000, 3000]);
        let all = shares(&ALL, 60_000);
        let sum: u64 = all.iter().sum();
        assert!((60_000..60_000 + ALL.len() as u64).contains(&sum) && all.iter().all(|n| *n > 0), "{sum}");
    }
}
