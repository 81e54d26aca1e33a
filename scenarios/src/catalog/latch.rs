//! Synchronisations that fail and processes that die, together: what a flush said holds for all who come later.

use super::ring::{DISK_BYTES, in_guest, kills, next_guest, operations_of, start};
use super::setup::Setup;
use crate::check::Invariant;
use crate::guest::Manners;
use crate::run::Scenario;
use crate::world::World;
use kernel_model::StorageConfig;
use kernel_model::faults::{FaultPlan, SyncErrors};
use std::rc::Rc;

/// Failed flushes, a tapdisk that dies, a power cut.
pub static FLUSH_ERRORS_AND_DEATHS: Scenario = Scenario {
    name: "flush-errors-and-deaths",
    about: "syncs fail and lose data once, tapdisk dies in and after them; no later flush says ok before a reboot",
    storage: |_| StorageConfig {
        faults: FaultPlan {
            sync_errors: true,
            sync_interrupted: true,
            calls_interrupted: true,
            ..FaultPlan::LATENCY
        },
        sync_errors: SyncErrors::Linux,
        ..StorageConfig::default()
    },
    body: |w| Box::pin(flush_errors_and_deaths(w)),
};

async fn flush_errors_and_deaths(world: World) {
    let qcow = world.setting("image", &["raw", "qcow"]) == "qcow";
    let setup =
        if qcow { Setup::qcow(&world, 0, DISK_BYTES, false) } else { Setup::raw(&world, 0, DISK_BYTES) };
    let Some((machine, guests)) = start(&world, vec![setup.clone()]).await else { return };
    let (attached, guest) = &guests[0];
    let retries = world.setting("guest-retries", &[3, 0, 1]);
    guest.set_manners(Manners { retries, errors_allowed: true, reads: Invariant::P1 });
    guest.history.borrow_mut().relax_order();
    machine.allow_deafness();
    world.sim.spawn("supervisor", 0, Rc::clone(&machine).supervise(kills(&world, 4, 400)));
    let ops = operations_of(&world, attached, 0, 80);
    let (g, depth) = (guest.clone(), world.setting("ring-depth", &[8, 32, 1]));
    in_guest(attached, async move { g.run(&ops, depth).await }).await;
    machine.spare();
    // What a flush that says ok now promises, holds.
    let g = guest.clone();
    in_guest(attached, async move { _ = g.flush().await }).await;
    machine.power_cut().await;
    world.sim.stop_faults();
    setup.check(&world, "after the power cut").await;
    next_guest(&world, setup, depth, "after the power cut").await;
}
