//! What toolstacks and administrators do: replacing tapdisk, plugging and unplugging disks, destroying guests.

use super::ring::{
    DISK_BYTES, NO_ERRORS, error_policy, finish, in_guest, kills, next_guest, not_stuck, operations_of,
    start, with_errors,
};
use super::setup::Setup;
use crate::check::Invariant;
use crate::guest::{Guest, GuestDisk, RingDisk};
use crate::limits::StackLimits;
use crate::machine::{Attached, Machine, XVDB};
use crate::scenario::Scenario;
use crate::workload::Op;
use crate::world::World;
use kernel_model::faults::FaultPlan;
use sim::{Draw, Entity, Label};
use std::rc::Rc;
use tap_core::wait::joined;
use tap_host::IoKind;
use xen_model::VbdPaths;

/// Time after which tapdisk is asked to stop.
pub static REPLACE_AFTER: Label = Label::new("replace-after", "tapdisk is asked to stop after {} more ns");
/// Time after which the guest is destroyed.
pub static DESTROY_AFTER: Label = Label::new("destroy-after", "the guest is destroyed after {} ns");

/// Time after which a second tapdisk is started.
pub static SECOND_AFTER: Label = Label::new("second-after", "a second tapdisk is started after {} more ns");

/// Whether a disk is unplugged before its guest has used it.
pub static UNUSED: Label = Label::new("unused", "the disk is unplugged before the guest uses it: {}");

/// A second tapdisk, by mistake.
pub static SECOND_TAPDISK: Scenario = Scenario {
    name: "second-tapdisk",
    about: "a second tapdisk is told to serve a disk in use, with another image, or two start at once; the later one changes nothing",
    storage: &|_| not_stuck(),
    body: &|w| Box::pin(second_tapdisk(w)),
};

/// tapdisk is replaced under a running guest.
pub static TAPDISK_REPLACED: Scenario = Scenario {
    name: "tapdisk-replaced",
    about: "a guest on a ring, tapdisk asked to stop under load and followed by another; the guest sees only a pause",
    storage: &|sim| with_errors(sim, FaultPlan::LATENCY),
    body: &|w| Box::pin(tapdisk_replaced(w)),
};

/// A guest is destroyed under load.
pub static GUEST_DESTROYED: Scenario = Scenario {
    name: "guest-destroyed",
    about: "a guest destroyed with requests in flight; the toolstack need not wait, and the next guest finds what was flushed",
    storage: &|_| not_stuck(),
    body: &|w| Box::pin(guest_destroyed(w)),
};

/// A second disk is plugged and unplugged.
pub static HOT_PLUG: Scenario = Scenario {
    name: "hot-plug",
    about: "a tapdisk that watches xenstore; a guest's second disk is plugged and unplugged next to a busy first, tapdisk dies now and then",
    storage: &|sim| with_errors(sim, FaultPlan { stuck: false, ..FaultPlan::LATENCY }),
    body: &|w| Box::pin(hot_plug(w)),
};

async fn tapdisk_replaced(world: World) {
    let setup = Setup::mapped(&world, 0, DISK_BYTES, world.setting("overlay", &[false, true]));
    let Some((machine, guests)) = start(&world, vec![setup]).await else { return };
    let (attached, guest) = &guests[0];
    guest.set_error_policy(error_policy(&world, Invariant::G1));
    let entity = Entity::WORLD.child("replacer", 0);
    world.sim.name_entity(entity, || "administrator".into());
    let draw =
        |i| {
            world
                .sim
                .decide(entity, &REPLACE_AFTER, i, |d| if d.below(4) == 0 { 0 } else { 1 + d.below(1 << 20) })
        };
    let times = (0..4).map(draw).filter(|n| *n > 0).collect();
    world.sim.spawn("replacer", 0, Rc::clone(&machine).replace(times));
    let ops = operations_of(&world, attached, 0, 60);
    let (g, depth) = (guest.clone(), world.setting("ring-depth", &[32, 8, 1]));
    in_guest(attached, async move { g.run(&ops, depth).await }).await;
    machine.end_kills();
    finish(&world, &machine, &guests).await;
}

/// Two processes start to serve one disk at about the same time, with images that were never written to.
async fn two_begin(world: World) {
    let limits = StackLimits::draw(&world);
    let watching = world.setting("rivals-watch", &[false, true]);
    let machine = if watching { Machine::watching(&world, limits) } else { Machine::new(&world, limits) };
    let setup = Setup::mapped(&world, 0, DISK_BYTES, false);
    let twin = Setup::mapped(&world, 1, DISK_BYTES, false);
    let disk = if watching { machine.new_guest(setup, 0) } else { machine.attach(setup, 0).await };
    let first = machine.start_tapdisk();
    let (m, d, w) = (Rc::clone(&machine), disk.clone(), world.clone());
    let (task, started) = joined(async move {
        let entity = Entity::WORLD.child("second", 1);
        w.sim.name_entity(entity, || "administrator".into());
        w.sim.sleep_ns(w.sim.decide(entity, &SECOND_AFTER, 0, |d| d.magnitude(20))).await;
        m.start_rival(&d, &twin)
    });
    world.sim.spawn("administrator", 0, task);
    if watching {
        machine.plug(&disk).await;
    }
    let Some(guest) = disk.boot(&world, NO_ERRORS).await else { return };
    let (g, ops) = (guest.clone(), operations_of(&world, &disk, 0, 60));
    let depth = world.setting("ring-depth", &[32, 8, 1]);
    in_guest(&disk, async move { g.run(&ops, depth).await }).await;
    let Some(second) = started.await else { return };
    // Longer than the second one waits.
    world.sim.sleep_ns(10_000_000_000).await;
    if !watching {
        return finish(&world, &machine, &[(disk, guest)]).await;
    }
    let (w, a) = (world.clone(), disk.clone());
    in_guest(&disk, async move {
        if let Err(error) = guest.read_all().await {
            w.fail(Invariant::E4, format!("reading the whole disk failed with {error:?}"));
        }
        a.shut_down(&w, &guest).await;
    })
    .await;
    machine.unplug(&disk).await;
    [first, second].iter().for_each(|host| host.process.ask_to_stop());
    machine.all_ended().await;
    machine.check_leaks();
}

async fn second_tapdisk(world: World) {
    if world.setting("second-at-start", &[false, true]) {
        return two_begin(world).await;
    }
    let setup = Setup::mapped(&world, 0, DISK_BYTES, false);
    // Of the same size, so that only the image differs.
    let wrong = Setup::raw(&world, 1, DISK_BYTES);
    let Some((machine, guests)) = start(&world, vec![setup]).await else { return };
    let (attached, guest) = &guests[0];
    let (w, m, disk) = (world.clone(), Rc::clone(&machine), attached.clone());
    let (task, left) = joined(async move {
        let entity = Entity::WORLD.child("second", 0);
        w.sim.name_entity(entity, || "administrator".into());
        for i in 0..2 {
            let draw = |d: &mut Draw| if d.below(4) == 0 { 0 } else { 1 + d.below(1 << 21) };
            let after_ns = w.sim.decide(entity, &SECOND_AFTER, i, draw);
            if after_ns > 0 {
                w.sim.sleep_ns(after_ns).await;
                m.try_to_serve(&disk, &wrong, i, false).await;
            }
        }
    });
    world.sim.spawn("administrator", 0, task);
    let ops = operations_of(&world, attached, 0, 60);
    let (g, depth) = (guest.clone(), world.setting("ring-depth", &[32, 8, 1]));
    in_guest(attached, async move { g.run(&ops, depth).await }).await;
    let _ = left.await;
    finish(&world, &machine, &guests).await;
}

async fn guest_destroyed(world: World) {
    let setup = Setup::mapped(&world, 0, DISK_BYTES, world.setting("overlay", &[false, true]));
    let Some((machine, guests)) = start(&world, vec![setup.clone()]).await else { return };
    let (attached, guest) = &guests[0];
    let ops = operations_of(&world, attached, 0, 60);
    let (g, depth) = (guest.clone(), world.setting("ring-depth", &[32, 8, 1]));
    attached.node.spawn("main", 0, async move { g.run(&ops, depth).await });
    let entity = Entity::WORLD.child("destroyer", 0);
    world.sim.name_entity(entity, || "administrator".into());
    let deaths = world.setting("deaths-too", &[false, true]);
    if deaths {
        world.sim.spawn("supervisor", 0, Rc::clone(&machine).kill_and_restart(kills(&world, 3, 600)));
    }
    let after_ns = world.sim.decide(entity, &DESTROY_AFTER, 0, |d| d.below(1 << 22));
    world.sim.sleep_ns(after_ns).await;
    machine.destroy(attached).await;
    machine.end_kills();
    if deaths {
        // The last process's operations complete, and its image is free.
        world.sim.sleep_ns(15_000_000_000).await;
    }
    machine.all_ended().await;
    machine.check_leaks();
    setup.check(&world, "after the guest was destroyed").await;
    // Only the guest crashed: its requests in flight may or may not have taken effect.
    setup.history.borrow_mut().power_cut();
    next_guest(&world, setup, depth, "of a destroyed guest").await;
}

async fn hot_plug(world: World) {
    let machine = Machine::watching(&world, StackLimits::draw(&world));
    machine.start_tapdisk();
    let first = machine.new_guest(Setup::mapped(&world, 0, DISK_BYTES, false), 0);
    machine.plug(&first).await;
    let second = Attached {
        vbd: XVDB,
        paths: VbdPaths::new("vbd", first.dom, XVDB),
        setup: Setup::raw(&world, 1, DISK_BYTES),
        read_only: world.setting("second-read-only", &[false, false, true]),
        ..first.clone()
    };
    let Some(guest) = first.boot(&world, NO_ERRORS).await else { return };
    guest.set_error_policy(error_policy(&world, Invariant::P1));
    machine.allow_losses();
    world.sim.spawn("supervisor", 0, Rc::clone(&machine).kill_and_restart(kills(&world, 2, 900)));
    let (ops, g) = (operations_of(&world, &first, 0, 40), guest.clone());
    let (task, finished) = joined(async move {
        g.run(&ops, 16).await;
    });
    first.node.spawn("main", 0, task);
    for life in 0..3 {
        if !live_once(&world, &machine, &second, life).await {
            return;
        }
    }
    let _ = finished.await;
    machine.end_kills();
    world.sim.stop_faults();
    let (w, a, g) = (world.clone(), first.clone(), guest.clone());
    in_guest(&first, async move {
        if let Err(error) = g.read_all().await {
            w.fail(Invariant::E4, format!("reading the whole disk failed with {error:?}"));
        }
        a.shut_down(&w, &g).await;
    })
    .await;
    machine.unplug(&first).await;
    machine.stop_tapdisk().await;
    machine.check_leaks();
    first.setup.check_bytes(&world, "in the end");
}

/// A disk that the toolstack made read-only is not written to.
pub(super) async fn refuse(world: &World, guest: &Guest<RingDisk>, ops: &[Option<Op>]) {
    for op in ops.iter().flatten().filter(|op| op.kind == IoKind::Write) {
        if guest.disk().write(op.range, |bytes| bytes.fill(0x5a)).await.is_ok() {
            world.fail(Invariant::H1, format!("{op} was carried out on a read-only disk"));
        }
    }
}

/// A disk is plugged in, used, and unplugged.
async fn live_once(world: &World, machine: &Rc<Machine>, disk: &Attached, life: u64) -> bool {
    machine.plug(disk).await;
    let entity = Entity::WORLD.child("life", life);
    world.sim.name_entity(entity, || "administrator".into());
    if world.sim.decide(entity, &UNUSED, 0, |d| u64::from(d.below(4) == 0)) != 0 {
        machine.unplug(disk).await;
        return true;
    }
    let Some(guest) = disk.boot(world, NO_ERRORS).await else { return false };
    guest.set_error_policy(error_policy(world, Invariant::P1));
    let (g, ops) = (guest.clone(), operations_of(world, disk, 1 + life, 8));
    let (w, d): (World, Attached) = (world.clone(), disk.clone());
    in_guest(disk, async move {
        if let Err(error) = g.read_all().await
            && !w.errors_allowed()
        {
            w.fail(Invariant::E4, format!("reading a disk that was plugged in failed with {error:?}"));
        }
        if d.read_only {
            refuse(&w, &g, &ops).await;
        } else {
            g.run(&ops, 4).await;
        }
        d.shut_down(&w, &g as &Guest<RingDisk>).await;
    })
    .await;
    machine.unplug(disk).await;
    true
}
