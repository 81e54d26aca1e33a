//! Block devices of the host, attached by `tapdisk attach` through the kernel's nbd driver.
//!
//! ```text
//!   guest: Opener ─ Gendisk ─ nbd driver (kernel) ══ stream ══ tapdisk attach ─ disk ─ image ─ Storage
//!                             keeps its requests               killed, stopped, started again
//! ```

mod behind;
mod served;

pub use behind::BLKBACK_OVER_DEVICE;

use super::crash::arm_power_cut;
use super::ring::KILL_AFTER;
use super::setup::{Setup, cut_after_close, workload};
use crate::check::Invariant;
use crate::formats::Kind;
use crate::guest::{BlockDisk, ErrorPolicy, Guest};
use crate::scenario::Scenario;
use crate::workload::{Workload, operations};
use crate::world::World;
use kernel_model::StorageConfig;
use served::{Plan, Served};
use sim::{Entity, Node};
use std::rc::Rc;
use tap_core::wait::joined;
use tap_host::select;

/// A device under load whose tapdisk ends and is started again.
pub static NBD_DEVICE: Scenario = Scenario {
    name: "nbd-device",
    about: "block devices of the kernel's nbd driver; tapdisk is killed between any two effects, stopped, started again, cut off",
    storage: &|_| StorageConfig::default(),
    body: &|w| Box::pin(device(w)),
};

/// A device that is taken away under load.
pub static NBD_DEVICE_DETACHED: Scenario = Scenario {
    name: "nbd-device-detached",
    about: "a block device of the kernel's nbd driver is taken away by force while it is busy; what was answered stays",
    storage: &|_| StorageConfig::default(),
    body: &|w| Box::pin(detached(w)),
};

const DISK_BYTES: u64 = 1 << 20;
const NO_ERRORS: ErrorPolicy = ErrorPolicy { retries: 0, errors_allowed: false, reads: Invariant::P1 };

/// About the number of tapdisk's effects from its start until it serves a device.
const ATTACHING_STEPS: u64 = 60;

/// After how many effects each tapdisk ends.
fn ends(world: &World) -> Vec<u64> {
    let entity = Entity::WORLD.child("device-killer", 0);
    world.sim.name_entity(entity, || "the killer of tapdisk".into());
    let draw = |i| {
        world.sim.decide(entity, &KILL_AFTER, i, |d| match d.below(8) {
            0 | 1 => 0,
            2..=4 => 1 + d.below(ATTACHING_STEPS),
            _ => 1 + d.below(400),
        })
    };
    (0..4).map(draw).filter(|n| *n > 0).collect()
}

fn setup(world: &World, kind: Kind, number: u32) -> Setup {
    let setup = Setup::new(world, kind, number, DISK_BYTES);
    // Overlapping requests wait for one another in the guest, after the history has noted them.
    setup.history.borrow_mut().relax_order();
    setup
}

fn setups(world: &World) -> Vec<Setup> {
    let kind = world.setting("image", &Kind::plain());
    let count = world.setting("devices", &[1, 2]);
    (0..count).map(|number| setup(world, kind, number)).collect()
}

/// Runs the operations of a guest on the device of `served`, as a task of `node`.
fn guest_on(
    world: &World,
    served: &Rc<Served>,
    node: &Node,
    depth: usize,
) -> (Guest<BlockDisk>, impl Future<Output = ()> + use<>) {
    let who = u64::from(served.number);
    let opener = served.open("guest");
    let guest = Guest::new(world, BlockDisk::new(opener), Rc::clone(&served.setup.history), NO_ERRORS);
    let entity = Entity::WORLD.child("device-ops", who);
    world.sim.name_entity(entity, || format!("the guest of disk {who}"));
    let load = Workload { zeroes: true, ..workload(world, served.setup.size_sectors, 50, 128) };
    let ops = operations(&world.sim, entity, who, &load);
    let own = guest.clone();
    let (task, done) = joined(async move { own.run(&ops, depth).await });
    node.spawn("guest", who, task);
    (guest, async move {
        let _ = done.await;
    })
}

async fn device(world: World) {
    let plan = Plan::draw(&world);
    let all: Vec<Rc<Served>> =
        setups(&world).into_iter().zip(0..).map(|(s, n)| Served::new(&plan, s, n)).collect();
    start(&world, &all);
    let node = world.sim.node("guest", 0);
    let hosts = all.clone();
    let mortal = node.clone();
    arm_power_cut(&world, &all[0].setup, 0, 240, move || {
        hosts.iter().for_each(|served| served.stop_at_once());
        mortal.kill();
    });
    let mut guests = Vec::new();
    for served in &all {
        select(node.dead(), served.attached()).await;
        if node.is_alive() {
            guests.push(guest_on(&world, served, &node, plan.limits.guest_depth));
        }
    }
    let mut alive = Vec::new();
    for (guest, done) in guests {
        select(node.dead(), done).await;
        alive.push(guest);
    }
    world.sim.stop_faults();
    world.storage.set_hook(None);
    if !node.is_alive() || world.setting("power-fails-at-last", &[false, true]) {
        drop(alive);
        return after_power_cut(&world, &plan, &all, &node).await;
    }
    all.iter().for_each(|served| served.spare());
    for (served, guest) in all.iter().zip(alive) {
        finish(&world, &plan, served, guest).await;
    }
    check_closed(&world, &plan, &all).await;
}

/// Starts a tapdisk for each, and ends one or the other now and then. Returns whether some are asked to end.
fn start(world: &World, all: &[Rc<Served>]) -> bool {
    for served in all {
        served.start();
    }
    let ends = ends(world);
    let asked = world.setting("asked-to-stop", &[false, true]);
    let (w, served) = (world.clone(), all.to_vec());
    world.sim.spawn("supervisor", 0, async move {
        for (i, steps) in ends.into_iter().enumerate() {
            served[i % served.len()].end(&w, steps, asked && i % 2 == 1).await;
        }
    });
    asked
}

/// The machine lost its power: its successor attaches the disks again.
async fn after_power_cut(world: &World, plan: &Plan, all: &[Rc<Served>], guest: &Node) {
    all.iter().for_each(|served| served.stop_at_once());
    let mut nodes: Vec<Node> = all.iter().filter_map(|served| served.process()).collect();
    nodes.push(guest.clone());
    for node in &nodes {
        node.kill();
        node.dead().await;
    }
    world.kernel.power_cut_nbd();
    all[0].setup.cut_power(world, &[]).await;
    all[1..].iter().for_each(|served| served.setup.history.borrow_mut().power_cut());
    world.xen.power_cut();
    plan.next_boot();
    for served in all {
        served.setup.check(world, "after the power cut").await;
        let again = Served::new(plan, served.setup.clone(), served.number);
        again.start();
        again.attached().await;
        let disk = BlockDisk::new(again.open("guest"));
        let policy = ErrorPolicy { reads: Invariant::G7, ..NO_ERRORS };
        let guest = Guest::new(world, disk, Rc::clone(&served.setup.history), policy);
        finish(world, plan, &again, guest).await;
    }
    check_closed(world, plan, all).await;
}

/// Reads everything once more; then the device goes, one way or the other, and nothing is left.
async fn finish(world: &World, plan: &Plan, served: &Rc<Served>, guest: Guest<BlockDisk>) {
    if let Err(error) = guest.read_all().await {
        world.fail(Invariant::E4, format!("reading the whole disk failed with {error:?}"));
    }
    if world.setting("detached-while-open", &[false, true]) {
        let status = plan.detach(served, "").await;
        if status != 16 {
            world.fail(Invariant::L1, format!("a device in use was detached with status {status}"));
        }
        if let Err(error) = guest.read_all().await {
            world.fail(Invariant::E4, format!("a refused detach leaves a disk that fails with {error:?}"));
        }
    }
    drop(guest);
    leave(world, plan, served).await;
}

/// The device goes, one way or the other.
async fn leave(world: &World, plan: &Plan, served: &Rc<Served>) {
    served.may_go();
    if detach_dies(world, plan, served).await {
        return served.gone().await;
    }
    if !world.errors_allowed() && world.setting("goes-with-tapdisk", &[false, true]) {
        served.ask_to_stop();
    } else {
        // Once data is lost in unknown places, the kernel's flush fails.
        let how = if world.errors_allowed() { "--force" } else { "" };
        let status = plan.detach(served, how).await;
        if status != 0 {
            world.fail(Invariant::L1, format!("a device that nobody uses was not detached: status {status}"));
        }
    }
    served.gone().await;
}

/// In some worlds a `tapdisk detach` is killed between two of its effects, and the stream breaks some time later: a
/// device that was not taken away stays, and is served as before. Whether it was taken away.
async fn detach_dies(world: &World, plan: &Plan, served: &Rc<Served>) -> bool {
    let steps = world.setting("detach-dies", &[0, 6, 1, 2, 3, 4, 5, 7, 8, 9, 10, 12, 16]);
    if steps == 0 {
        return false;
    }
    let _killed = plan.detach_for(served, "", steps).await;
    if !plan.is_there(served) {
        return true;
    }
    world.kernel.cut_nbd(served.index());
    let disk = BlockDisk::new(served.open("guest"));
    let guest = Guest::new(world, disk, Rc::clone(&served.setup.history), NO_ERRORS);
    if let Err(error) = guest.read_all().await {
        world
            .fail(Invariant::E4, format!("a detach that was killed leaves a disk that fails with {error:?}"));
    }
    false
}

/// All devices are gone: the disks keep what they have, whatever happens to the machine.
async fn check_closed(world: &World, plan: &Plan, all: &[Rc<Served>]) {
    cut_after_close(world, all.iter().map(|served| served.setup.spec.path.as_str()));
    for served in all {
        served.setup.check(world, "in the end").await;
    }
    plan.check_nothing_left().await;
}

async fn detached(world: World) {
    let plan = Plan::draw(&world);
    let setup = setup(&world, world.setting("image", &Kind::plain()), 0);
    let served = Served::new(&plan, setup, 0);
    served.start();
    served.attached().await;
    let node = world.sim.node("guest", 0);
    let (guest, done) = guest_on(&world, &served, &node, plan.limits.guest_depth);
    guest.set_error_policy(ErrorPolicy { errors_allowed: true, ..NO_ERRORS });
    let after_ns = world.setting("detached-after-us", &[200, 0, 20, 60, 600, 2000]) * 1000;
    world.sim.sleep_ns(after_ns).await;
    served.may_go();
    // Who has it open keeps it, without a server.
    let status = plan.detach(&served, "--force").await;
    if ![0, 16].contains(&status) {
        world.fail(Invariant::L1, format!("a device was detached by force with status {status}"));
    }
    done.await;
    if let Ok(()) = guest.flush().await {
        world.fail(Invariant::E4, "a device that was taken away still answers");
    }
    drop(guest);
    served.gone().await;
    world.sim.stop_faults();
    served.setup.check(&world, "after it was taken away").await;
    let again = Served::new(&plan, served.setup.clone(), 1);
    again.start();
    again.attached().await;
    let disk = BlockDisk::new(again.open("guest"));
    let guest = Guest::new(&world, disk, Rc::clone(&served.setup.history), NO_ERRORS);
    finish(&world, &plan, &again, guest).await;
    check_closed(&world, &plan, &[again]).await;
}
