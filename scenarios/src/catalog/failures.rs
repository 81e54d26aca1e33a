//! Consecutive failures: which operations of the host fail, and how.

use crate::world::{World, setting};
use kernel_model::faults::FaultPlan;
use kernel_model::{Concerned, NthFailure, StorageConfig};
use sim::{Draw, Entity, Label, Sim};
use tap_host::Errno;

/// Which operation on the host's files fails, from 1; 0 for none.
pub static FAIL_NTH: Label = Label::new("fail-nth", "host operation number {} fails");

/// Maximum number of consecutive transient failures: fewer than any part of the stack retries.
const PASSING_IN_A_ROW: [u64; 4] = [5, 3, 4, 2];

/// In half of the seeds operations fail besides other faults: one, some in a row, or all from one on.
pub(super) fn lasting(sim: &Sim) -> Option<NthFailure> {
    const FOR_GOOD: u64 = NthFailure::FOR_GOOD;
    let n = number(sim, |d| if d.below(2) == 0 { 0 } else { 1 + d.below(120) });
    (n > 0).then(|| NthFailure {
        n,
        times: setting(sim, "failure-lasts", &[1, 1, 1, FOR_GOOD, 24, FOR_GOOD, 2, 3]),
        of: setting(sim, "failure-of", &[Concerned::All, Concerned::ButSyncs, Concerned::Zeros]),
        effect: setting(sim, "failure-effect", &[0, 255, 128]),
        error: setting(sim, "failure-error", &[Errno::EIO, Errno::ENOSPC]),
    })
}

/// Transient failures only: in half of the seeds some consecutive operations fail.
pub(super) fn passing(sim: &Sim) -> Option<NthFailure> {
    let n = number(sim, |d| if d.below(2) == 0 { 0 } else { 1 + d.magnitude(9) });
    (n > 0).then(|| NthFailure {
        n,
        times: setting(sim, "passing-in-a-row", &PASSING_IN_A_ROW),
        of: setting(
            sim,
            "passing-of",
            &[Concerned::All, Concerned::Syncs, Concerned::Calls, Concerned::Zeros],
        ),
        effect: 0,
        error: Errno::EAGAIN,
    })
}

/// Storage on which nothing fails permanently, and some consecutive operations fail.
pub(super) fn passing_storage(sim: &Sim) -> StorageConfig {
    StorageConfig { faults: FaultPlan::PASSING, nth_failure: passing(sim), ..StorageConfig::default() }
}

/// When an outage is armed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Armed {
    Opening,
    Open,
}

/// Where nothing fails for good: in half of the seeds everything fails for now, before or once the disk is open, for
/// less time than a request is repeated. To be called at both moments.
pub(super) fn arm_outage(world: &World, now: Armed) {
    let lasts_ns = world.setting("outage-ns", &[0, 0, 1_000_000_000, 50_000_000]);
    if lasts_ns > 0 && now == world.setting("outage-armed", &[Armed::Open, Armed::Opening]) {
        world.storage.set_outage(world.setting("outage-after", &[30, 1, 8, 100]), lasts_ns);
    }
}

/// In half of the seeds some synchronisations fail, one or a few in a row.
pub(super) fn losing_syncs(sim: &Sim) -> Option<NthFailure> {
    let n = number(sim, |d| if d.below(2) == 0 { 0 } else { 1 + d.below(200) });
    (n > 0).then(|| NthFailure {
        n,
        times: setting(sim, "failure-lasts", &[1, 1, 2, 5]),
        of: Concerned::Syncs,
        effect: 0,
        error: Errno::EIO,
    })
}

fn number(sim: &Sim, draw: impl FnOnce(&mut Draw) -> u64) -> u64 {
    let entity = Entity::WORLD.child("nth-failure", 0);
    let n = sim.decide(entity, &FAIL_NTH, 0, draw);
    sim.name_entity(entity, || "storage".into());
    n
}
