//! An absent image: when its disk is plugged in, and when tapdisk restarts under a guest that uses it.

use super::away::end_in_order;
use super::ring::{DISK_BYTES, KILL_AFTER, NO_ERRORS, not_stuck, operations_of};
use super::setup::Setup;
use crate::check::Invariant;
use crate::guest::{ErrorPolicy, Guest, RingDisk};
use crate::limits::StackLimits;
use crate::machine::{Attached, Machine};
use crate::scenario::Scenario;
use crate::world::World;
use sim::{Entity, Label};
use std::rc::Rc;
use tap_core::wait::joined;
use tap_host::select;

/// How long the image of a connected guest is absent.
pub static ABSENT_FOR: Label = Label::new("absent-for", "the image is absent for {} ns");

/// An image that is absent for a while.
pub static IMAGE_ABSENT: Scenario = Scenario {
    name: "image-absent",
    about: "a disk is plugged in without its image and refused; tapdisk restarts while the image of its guest is absent: it retries, the guest is destroyed, or tapdisk is replaced",
    storage: &|_| not_stuck(),
    body: &|w| Box::pin(image_absent(w)),
};

/// Maximum pause between two attempts to serve a disk, with the time that xenstored may add, in nanoseconds.
const LONGEST_PAUSE_NS: u64 = 35_000_000_000;
/// Number of attempts before the pauses reach their maximum, at the start and after a restart.
const FIRST_ATTEMPTS: u64 = 8;
/// How long a toolstack waits for an end, in nanoseconds.
const TOOLSTACK_WAITS_NS: u64 = 10_000_000_000;

async fn image_absent(world: World) {
    let machine = Machine::watching(&world, StackLimits::draw(&world));
    machine.expect_absences();
    machine.start_tapdisk();
    let setup = Setup::mapped(&world, 0, DISK_BYTES, world.setting("overlay", &[false, true]));
    let disk = machine.new_guest(setup.clone(), 0);
    let image = setup.spec.path.clone();
    let aside = format!("{image}-aside");
    if world.setting("absent-at-plug", &[false, true]) {
        world.storage.rename(&image, &aside);
        machine.plug_without_image(&disk).await;
        world.storage.rename(&aside, &image);
    }
    machine.plug(&disk).await;
    let Some(guest) = disk.boot(&world, NO_ERRORS).await else { return };
    guest.set_error_policy(ErrorPolicy { reads: Invariant::P1, ..NO_ERRORS });
    let (ops, g) = (operations_of(&world, &disk, 0, 40), guest.clone());
    let (task, finished) = joined(async move {
        g.run(&ops, 8).await;
    });
    disk.node.spawn("main", 0, task);
    die(&world, &machine, &guest).await;
    world.storage.rename(&image, &aside);
    let before = machine.attempts();
    machine.start_tapdisk();
    let entity = Entity::WORLD.child("absence", 0);
    world.sim.name_entity(entity, || "administrator".into());
    let absent_ns = world.sim.decide(entity, &ABSENT_FOR, 0, |d| d.magnitude(37));
    world.sim.sleep_ns(absent_ns).await;
    check_attempts(&world, &machine, before, absent_ns);
    match world.setting("absent-until", &["is back", "guest destroyed", "tapdisk replaced"]) {
        "guest destroyed" => {
            machine.destroy(&disk).await;
            world.storage.rename(&aside, &image);
        }
        until => {
            if until == "tapdisk replaced" {
                replace(&world, &machine).await;
            }
            world.storage.rename(&aside, &image);
            check_answered(&world, &machine, &disk, &guest, finished).await;
        }
    }
    machine.stop_tapdisk().await;
    machine.check_leaks();
    // The dead process's last operations complete, and its image is free.
    world.sim.sleep_ns(15_000_000_000).await;
    setup.check(&world, "in the end").await;
}

async fn die(world: &World, machine: &Rc<Machine>, guest: &Guest<RingDisk>) {
    let Some(host) = machine.tapdisk() else { return };
    let entity = Entity::WORLD.child("killer", 0);
    world.sim.name_entity(entity, || "killer".into());
    let after = world.sim.decide(entity, &KILL_AFTER, 0, |d| 1 + d.below(400));
    host.process.node().kill_after_steps(after);
    select(host.process.node().dead(), world.sim.sleep_ns(20_000_000_000)).await;
    host.process.node().kill();
    host.process.node().dead().await;
    guest.history.borrow_mut().server_died();
    world.count(|s| s.crashes += 1);
}

/// Checks that opening is retried at the right rate and reported once.
fn check_attempts(world: &World, machine: &Machine, before: (u64, u32), absent_ns: u64) {
    let ((opened, told), (opened_before, told_before)) = (machine.attempts(), before);
    let max = FIRST_ATTEMPTS + absent_ns / (LONGEST_PAUSE_NS / 2);
    if opened - opened_before > max {
        let text = format!("{} attempts in {absent_ns} ns to open an image", opened - opened_before);
        world.fail(Invariant::L1, text);
    }
    if told - told_before > 1 || (told == told_before && absent_ns > LONGEST_PAUSE_NS) {
        world.fail(Invariant::L1, format!("an absent image was reported {} times", told - told_before));
    }
}

/// Another process takes over while there is nothing to serve yet.
async fn replace(world: &World, machine: &Rc<Machine>) {
    let Some(host) = machine.tapdisk() else { return };
    host.process.ask_to_stop();
    let begun_ns = world.sim.now_ns();
    machine.all_ended().await;
    if world.sim.now_ns() - begun_ns > TOOLSTACK_WAITS_NS {
        world.fail(Invariant::L1, "a tapdisk without an image takes too long to stop");
    }
    host.process.node().kill();
    host.process.node().dead().await;
    machine.start_tapdisk();
}

/// The image is back: what the guest submitted is answered soon.
async fn check_answered(
    world: &World,
    machine: &Rc<Machine>,
    disk: &Attached,
    guest: &Guest<RingDisk>,
    finished: impl Future<Output = Option<()>>,
) {
    let begun_ns = world.sim.now_ns();
    let _ = finished.await;
    if world.sim.now_ns() - begun_ns > LONGEST_PAUSE_NS {
        let text = format!("a guest waited {} ns after its image was back", world.sim.now_ns() - begun_ns);
        world.fail(Invariant::L1, text);
    }
    end_in_order(world, machine, disk, guest).await;
}
