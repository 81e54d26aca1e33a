//! Failing synchronisations and dying processes together: the result of a flush also binds later processes.

use super::failures::losing_syncs;
use super::ring::{DISK_BYTES, in_guest, kills, next_guests, operations_of, start};
use super::setup::Setup;
use crate::check::Invariant;
use crate::formats::Kind;
use crate::guest::ErrorPolicy;
use crate::machine::Machine;
use crate::scenario::Scenario;
use crate::world::World;
use kernel_model::StorageConfig;
use kernel_model::faults::{FaultPlan, SyncErrors};
use sim::{Entity, Label};
use std::cell::Cell;
use std::rc::Rc;
use tap_core::wait::joined;

/// Failed flushes, a tapdisk that dies, a power cut.
pub static FLUSH_ERRORS_AND_DEATHS: Scenario = Scenario {
    name: "flush-errors-and-deaths",
    about: "syncs fail and lose data once, tapdisk dies in and after them; no later flush says ok before a reboot",
    storage: &|sim| StorageConfig {
        faults: FaultPlan {
            sync_errors: true,
            sync_interrupted: true,
            calls_interrupted: true,
            ..FaultPlan::LATENCY
        },
        sync_errors: SyncErrors::Linux,
        nth_failure: losing_syncs(sim),
        ..StorageConfig::default()
    },
    body: &|w| Box::pin(flush_errors_and_deaths(w)),
};

/// A synchronisation fails, and tapdisk dies before it learns of that.
pub static DIES_IN_SYNC: Label =
    Label::new("dies-in-sync", "tapdisk dies before it learns that a synchronisation failed");

/// Kills tapdisk in some synchronisations that fail.
fn die_in_syncs(world: &World, machine: &Rc<Machine>) {
    let (w, machine, seen) = (world.clone(), Rc::clone(machine), Cell::new(world.storage.losses()));
    let entity = Entity::WORLD.child("killer", 1);
    world.sim.name_entity(entity, || "killer in syncs".into());
    // A power cut removes the hook.
    world.storage.set_hook(Some(Rc::new(move |_| {
        let losses = w.storage.losses();
        if seen.replace(losses) == losses || machine.spared.get() {
            return;
        }
        if w.sim.decide(entity, &DIES_IN_SYNC, losses as u32, |d| u64::from(d.below(2) == 0)) > 0
            && let Some(host) = machine.tapdisk()
        {
            host.process.node().kill();
            machine.respawn(&host);
        }
    })));
}

async fn flush_errors_and_deaths(world: World) {
    let first = Setup::new(&world, world.setting("image", &Kind::plain()), 0, DISK_BYTES);
    // Each disk asks the file system, which reports the error to the first of them only.
    let second = world.setting("disks", &[1, 2]) == 2;
    let setups: Vec<Setup> =
        std::iter::once(first).chain(second.then(|| Setup::raw(&world, 1, DISK_BYTES))).collect();
    let Some((machine, guests)) = start(&world, setups.clone()).await else { return };
    let retries = world.setting("guest-retries", &[3, 0, 1]);
    machine.allow_losses();
    die_in_syncs(&world, &machine);
    for (_, guest) in &guests {
        guest.set_error_policy(ErrorPolicy { retries, errors_allowed: true, reads: Invariant::P1 });
        guest.history.borrow_mut().relax_order();
    }
    world.sim.spawn("supervisor", 0, Rc::clone(&machine).kill_and_restart(kills(&world, 4, 400)));
    let depth = world.setting("ring-depth", &[8, 32, 1]);
    let count = if second { 40 } else { 80 };
    let mut running = Vec::new();
    for (number, (attached, guest)) in guests.iter().enumerate() {
        let ops = operations_of(&world, attached, number as u64, count);
        let g = guest.clone();
        let (task, finished) = joined(async move {
            g.run(&ops, depth).await;
        });
        attached.node.spawn("main", 0, task);
        running.push(finished);
    }
    for finished in running {
        let _ = finished.await;
    }
    machine.end_kills();
    // What a successful flush now promises must hold.
    for (attached, guest) in &guests {
        let g = guest.clone();
        in_guest(attached, async move { _ = g.flush().await }).await;
    }
    machine.power_cut().await;
    world.sim.stop_faults();
    world.storage.stop_failures();
    for setup in &setups {
        setup.check(&world, "after the power cut").await;
    }
    next_guests(&world, setups, depth, "after the power cut").await;
}
