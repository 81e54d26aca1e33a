//! No tapdisk runs for a while: guests wait, reboot or end, or others take their place.

use super::ring::{DISK_BYTES, KILL_AFTER, NO_ERRORS, error_policy, in_guest, operations_of, with_errors};
use super::setup::Setup;
use super::toolstack::DESTROY_AFTER;
use crate::check::Invariant;
use crate::guest::{Guest, RingDisk};
use crate::limits::StackLimits;
use crate::machine::{Attached, Machine};
use crate::scenario::Scenario;
use crate::world::World;
use kernel_model::SimHost;
use kernel_model::faults::FaultPlan;
use sim::{Entity, Label};
use std::rc::Rc;
use tap_core::wait::joined;
use tap_host::{SectorRange, select};

/// Time until tapdisk is started again once a new guest waits for it.
pub static BACK_AFTER: Label = Label::new("back-after", "tapdisk is back after {} more ns");

/// No tapdisk runs for a while.
pub static TAPDISK_AWAY: Scenario = Scenario {
    name: "tapdisk-away",
    about: "tapdisk dies and is not restarted; its guest waits, boots another kernel, is saved and restored, or is destroyed before or during the takeover of its ring, and another may get its number; nothing is left",
    storage: &|sim| with_errors(sim, FaultPlan { stuck: false, ..FaultPlan::LATENCY }),
    body: &|w| Box::pin(tapdisk_away(w)),
};

/// What the guest does while no tapdisk runs.
const MEANWHILE: [&str; 7] = [
    "waits",
    "is destroyed",
    "is destroyed while it is taken up",
    "starts another kernel",
    "is destroyed and another has its number",
    "is saved and goes on in another domain",
    RECORD_LOST,
];
const RECORD_LOST: &str = "starts another kernel once the record of its ring is lost";

async fn tapdisk_away(world: World) {
    let machine = Machine::watching(&world, StackLimits::draw(&world));
    let first = machine.start_tapdisk();
    let foreign =
        if world.setting("foreign-disk", &[false, true]) { Some(machine.plug_foreign().await) } else { None };
    let neighbour = neighbour(&world, &machine).await;
    let setup = Setup::mapped(&world, 0, DISK_BYTES, world.setting("overlay", &[false, true]));
    let disk = machine.new_guest(setup.clone(), 0);
    machine.plug(&disk).await;
    let Some(guest) = disk.boot(&world, NO_ERRORS).await else { return };
    guest.set_error_policy(error_policy(&world, Invariant::P1));
    let end = world.setting("guest-meanwhile", &MEANWHILE);
    if end == RECORD_LOST {
        read_once(&world, &disk, &guest).await;
    }
    let (ops, g) = (operations_of(&world, &disk, 0, 60), guest.clone());
    let (task, finished) = joined(async move {
        g.run(&ops, 16).await;
    });
    disk.node.spawn("main", 0, task);
    kill(&world, &first).await;
    guest.history.borrow_mut().server_died();
    neighbour.iter().for_each(|(_, guest)| guest.history.borrow_mut().server_died());
    world.count(|s| s.crashes += 1);
    let away_ns = world.setting("away-ns", &[10_000, 1_000_000_000, 60_000_000_000]);
    let mut setups = vec![setup];
    match end {
        "waits" => {
            try_another(&world, &machine, &disk).await;
            back_after(&machine, away_ns).await;
            let _ = finished.await;
            end_in_order(&world, &machine, &disk, &guest).await;
        }
        "is destroyed" => {
            machine.destroy_alone(&disk).await;
            back_after(&machine, away_ns).await;
        }
        "is destroyed while it is taken up" => {
            back_after(&machine, away_ns).await;
            wait_for_destroyer(&world).await;
            machine.destroy(&disk).await;
        }
        "is saved and goes on in another domain" => {
            saved_and_restored(&world, &machine, &disk, &guest, away_ns).await;
        }
        "starts another kernel" => another_kernel(&world, &machine, &disk, &guest, away_ns).await,
        RECORD_LOST => {
            lose_record(&machine, &disk, &guest, away_ns).await;
            another_kernel(&world, &machine, &disk, &guest, away_ns).await;
        }
        _ => setups.push(another_guest(&world, &machine, &disk, away_ns).await),
    }
    // Time to process what was there when it started.
    world.sim.sleep_ns(60_000_000_000).await;
    if let Some((disk, guest)) = &neighbour {
        end_in_order(&world, &machine, disk, guest).await;
        setups.push(disk.setup.clone());
    }
    if let Some(paths) = &foreign {
        machine.unplug_foreign(paths).await;
    }
    machine.stop_tapdisk().await;
    machine.check_leaks();
    for setup in setups {
        setup.check(&world, "in the end").await;
    }
}

/// Waits until the domain is to be destroyed.
pub(super) async fn wait_for_destroyer(world: &World) {
    let entity = Entity::WORLD.child("destroyer", 0);
    world.sim.name_entity(entity, || "administrator".into());
    let after_ns = world.sim.decide(entity, &DESTROY_AFTER, 0, |d| d.magnitude(20));
    world.sim.sleep_ns(after_ns).await;
}

/// Kills tapdisk after so many effects, or once it is idle.
async fn kill(world: &World, tapdisk: &SimHost) {
    let entity = Entity::WORLD.child("killer", 0);
    world.sim.name_entity(entity, || "killer".into());
    let after = world.sim.decide(entity, &KILL_AFTER, 0, |d| 1 + d.below(600));
    tapdisk.process.node().kill_after_steps(after);
    // An idle tapdisk would never get that far.
    select(tapdisk.process.node().dead(), world.sim.sleep_ns(20_000_000_000)).await;
    tapdisk.process.node().kill();
    tapdisk.process.node().dead().await;
}

/// In half of the seeds, another guest with a lower number has used its disk and waits.
async fn neighbour(world: &World, machine: &Machine) -> Option<(Attached, Guest<RingDisk>)> {
    if !world.setting("neighbour", &[false, true]) {
        return None;
    }
    let disk = machine.new_guest(Setup::raw(world, 2, DISK_BYTES), 2);
    machine.plug(&disk).await;
    let guest = disk.boot(world, NO_ERRORS).await?;
    guest.set_error_policy(error_policy(world, Invariant::P1));
    let (g, ops) = (guest.clone(), operations_of(world, &disk, 2, 8));
    in_guest(&disk, async move { g.run(&ops, 4).await }).await;
    Some((disk, guest))
}

/// A tapdisk is started with an image of another size or mode than the guest was told.
async fn try_another(world: &World, machine: &Rc<Machine>, disk: &Attached) {
    match world.setting("tried-with", &["nothing", "a smaller image", "an image that may only be read"]) {
        "nothing" => {}
        "a smaller image" => {
            machine.try_to_serve(disk, &Setup::raw(world, 3, DISK_BYTES / 2), 0, false).await;
        }
        _ => machine.try_to_serve(disk, &Setup::raw(world, 3, DISK_BYTES), 0, true).await,
    }
}

async fn back_after(machine: &Rc<Machine>, ns: u64) {
    machine.world.sim.sleep_ns(ns).await;
    machine.start_tapdisk();
}

/// Reads the whole disk, closes the front end and detaches the disk.
pub(super) async fn end_in_order(world: &World, machine: &Machine, disk: &Attached, guest: &Guest<RingDisk>) {
    world.sim.stop_faults();
    let (w, a, g) = (world.clone(), disk.clone(), guest.clone());
    in_guest(disk, async move {
        if let Err(error) = g.read_all().await {
            w.fail(Invariant::E4, format!("reading the whole disk failed with {error:?}"));
        }
        a.shut_down(&w, &g).await;
    })
    .await;
    machine.unplug(disk).await;
}

/// The guest has an answer: a ring that shows one is known to be in use.
async fn read_once(world: &World, disk: &Attached, guest: &Guest<RingDisk>) {
    let (w, g) = (world.clone(), guest.clone());
    in_guest(disk, async move {
        if let Err(error) = g.read(SectorRange::new(0, 8)).await
            && !w.errors_allowed()
        {
            w.fail(Invariant::E4, format!("the first read failed with {error:?}"));
        }
    })
    .await;
}

/// The folder of records is cleaned before tapdisk is back, for a while. Nobody knows then which requests of the ring
/// were taken: tapdisk must not touch it, and the guest goes on waiting.
async fn lose_record(machine: &Rc<Machine>, disk: &Attached, guest: &Guest<RingDisk>, away_ns: u64) {
    machine.expect_broken_ring(disk.dom);
    machine.lose_record(disk);
    back_after(machine, away_ns).await;
    machine.world.sim.sleep_ns(10_000_000_000).await;
    if let Some(host) = machine.tapdisk() {
        host.process.node().kill();
        host.process.node().dead().await;
        guest.history.borrow_mut().server_died();
    }
}

/// Another kernel follows the guest's first at once (kexec), and finds its devices as they are.
pub(super) async fn another_kernel(
    world: &World,
    machine: &Rc<Machine>,
    disk: &Attached,
    before: &Guest<RingDisk>,
    away_ns: u64,
) {
    // Its ring is gone, so no tapdisk can take it over, and a complaint about that is right.
    machine.expect_broken_ring(disk.dom);
    let second = machine.next_kernel(disk).await;
    before.retire();
    let (w, a) = (world.clone(), second.clone());
    let (task, booted) = joined(async move {
        let front = a.front(&w);
        if let Err(error) = front.reset().await {
            w.fail(Invariant::L1, format!("the next kernel failed to reset its device: {error:?}"));
        }
        a.boot_on(&w, NO_ERRORS, front).await
    });
    second.node.spawn("boot", 0, task);
    back_after(machine, away_ns).await;
    let Some(Some(guest)) = booted.await else { return };
    guest.set_error_policy(error_policy(world, Invariant::P1));
    let (g, ops) = (guest.clone(), operations_of(world, &second, 1, 20));
    in_guest(&second, async move { g.run(&ops, 8).await }).await;
    end_in_order(world, machine, &second, &guest).await;
}

/// The guest is saved: its domain ends, and it continues in another on the same image, with a new ring. Unanswered
/// requests may or may not have taken effect, and must not take effect later.
async fn saved_and_restored(
    world: &World,
    machine: &Rc<Machine>,
    disk: &Attached,
    before: &Guest<RingDisk>,
    away_ns: u64,
) {
    machine.destroy_alone(disk).await;
    before.retire();
    let entity = Entity::WORLD.child("back", 0);
    world.sim.name_entity(entity, || "administrator".into());
    let after_ns = world.sim.decide(entity, &BACK_AFTER, 0, |d| d.magnitude(22));
    let (m, s) = (Rc::clone(machine), world.sim.clone());
    world.sim.spawn("start", 0, async move {
        s.sleep_ns(away_ns.min(1_000_000_000)).await;
        back_after(&m, after_ns).await;
    });
    let next = machine.new_guest(disk.setup.clone(), 1);
    machine.plug(&next).await;
    let Some(guest) = next.boot(world, NO_ERRORS).await else { return };
    guest.set_error_policy(error_policy(world, Invariant::P1));
    let (g, ops) = (guest.clone(), operations_of(world, &next, 1, 20));
    in_guest(&next, async move {
        let _ = g.read_all().await;
        g.run(&ops, 8).await;
    })
    .await;
    end_in_order(world, machine, &next, &guest).await;
}

/// The guest is destroyed, and another with a different disk gets its number. Returns the first one's disk.
async fn another_guest(world: &World, machine: &Rc<Machine>, disk: &Attached, away_ns: u64) -> Setup {
    machine.destroy_alone(disk).await;
    world.sim.sleep_ns(away_ns).await;
    let next = machine.guest_with_number(Setup::mapped(world, 1, DISK_BYTES, false), disk.dom);
    let entity = Entity::WORLD.child("back", 0);
    world.sim.name_entity(entity, || "administrator".into());
    let after_ns = world.sim.decide(entity, &BACK_AFTER, 0, |d| d.magnitude(22));
    let m = Rc::clone(machine);
    world.sim.spawn("start", 0, async move { back_after(&m, after_ns).await });
    machine.plug(&next).await;
    let Some(guest) = next.boot(world, NO_ERRORS).await else { return next.setup };
    guest.set_error_policy(error_policy(world, Invariant::P1));
    let (g, ops) = (guest.clone(), operations_of(world, &next, 1, 20));
    in_guest(&next, async move { g.run(&ops, 8).await }).await;
    end_in_order(world, machine, &next, &guest).await;
    next.setup
}
