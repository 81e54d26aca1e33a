//! Guests on rings: traffic, death of tapdisk, reconnects, several guests.

use super::crash::{arm_power_cut, may_overlay};
use super::failures::{Armed, arm_outage};
use super::setup::{Setup, cut_after_close, workload};
use crate::check::Invariant;
use crate::formats::{FormatModel, Kind};
use crate::guest::{ErrorPolicy, Guest, HONEST_SECTORS, Hostile, RingDisk};
use crate::limits::StackLimits;
use crate::machine::{Attached, Machine};
use crate::scenario::{OfFormat, Scenario};
use crate::workload::{Shape, Workload, operations};
use crate::world::{World, setting};
use kernel_model::faults::FaultPlan;
use kernel_model::{Blkfront, StorageConfig};
use sim::{Entity, Label, Sim};
use std::rc::Rc;
use tap_core::CacheMode;
use tap_core::wait::joined;
use tap_host::{SECTOR_BYTES, select};

/// Number of effects after which tapdisk is killed.
pub static KILL_AFTER: Label = Label::new("kill-after", "tapdisk is killed after {} more effects");
/// Time after which the front end reconnects.
pub static RECONNECT_AT: Label = Label::new("reconnect-at", "the front end reconnects after {} ns");

/// A guest on a ring with a raw disk.
pub static RING_RAW: Scenario = Scenario {
    name: "ring-raw",
    about: "a guest on a blkif ring with a raw disk: order, merging, short transfers; everything released at the end",
    storage: &|_| StorageConfig {
        faults: FaultPlan { short: true, transient: true, ..FaultPlan::LATENCY },
        ..StorageConfig::default()
    },
    body: &|w| Box::pin(ring_raw(w)),
};

/// tapdisk dies and restarts under a running guest.
pub static TAPDISK_KILLED: OfFormat = OfFormat {
    name: "FORMAT-tapdisk-killed",
    about: "FORMAT on a ring, tapdisk killed between any two of its effects and restarted; the guest sees only a pause",
    fits: |model| model.has_metadata(),
    storage: |sim, _| with_errors(sim, FaultPlan::LATENCY),
    body: |w, model| Box::pin(tapdisk_killed(w, model)),
    settled: true,
};

/// The front end reconnects with requests in flight.
pub static FRONTEND_RECONNECT: Scenario = Scenario {
    name: "frontend-reconnect",
    about: "the front end closes and reconnects under load, and puts unanswered requests on the new ring",
    storage: &|_| StorageConfig::default(),
    body: &|w| Box::pin(frontend_reconnect(w)),
};

/// Two guests on one tapdisk.
pub static TWO_GUESTS: Scenario = Scenario {
    name: "two-guests",
    about: "two guests with a disk each on one tapdisk, which dies once; neither is affected by the other",
    storage: &|sim| with_errors(sim, FaultPlan::LATENCY),
    body: &|w| Box::pin(two_guests(w)),
};

/// The whole host goes down under a guest.
pub static RING_POWER_CUT: Scenario = Scenario {
    name: "ring-power-cut",
    about: "a guest on a ring, power cut of the whole host at any host operation; a new machine and a new guest continue",
    storage: &|_| StorageConfig {
        faults: FaultPlan { short: true, transient: true, ..FaultPlan::LATENCY },
        ..StorageConfig::default()
    },
    body: &|w| Box::pin(ring_power_cut(w)),
};

/// A front end that breaks every rule, next to one that follows them.
pub static HOSTILE_FRONTEND: Scenario = Scenario {
    name: "hostile-frontend",
    about: "a front end with bad keys, malformed requests, impossible indices; refused, without disturbing its neighbour",
    storage: &|_| not_stuck(),
    body: &|w| Box::pin(hostile_frontend(w)),
};

/// A toolstack waits for ten seconds; a drive that hangs as long is not tapdisk's fault.
pub(super) fn not_stuck() -> StorageConfig {
    StorageConfig { faults: FaultPlan { stuck: false, ..FaultPlan::LATENCY }, ..StorageConfig::default() }
}

/// In half of the seeds the host's operations fail, too, and the guest must learn of it, whatever dies.
pub(super) fn with_errors(sim: &Sim, plan: FaultPlan) -> StorageConfig {
    let errors = setting(sim, "host-errors", &[false, true]);
    let calls = FaultPlan { calls: errors, calls_interrupted: errors, ..plan };
    let faults = FaultPlan { errors, no_space: errors, short: errors, transient: errors, ..calls };
    StorageConfig { faults, ..StorageConfig::default() }
}

pub(super) const DISK_BYTES: u64 = 1 << 20;
/// Nothing below fails, so nothing above may.
pub(super) const NO_ERRORS: ErrorPolicy =
    ErrorPolicy { retries: 0, errors_allowed: false, reads: Invariant::G1 };

/// How a guest handles the errors of this world; a wrong read breaks `reads`.
pub(super) fn error_policy(world: &World, reads: Invariant) -> ErrorPolicy {
    let errors_allowed = world.errors_allowed();
    ErrorPolicy { retries: if errors_allowed { 2 } else { 0 }, errors_allowed, reads }
}

pub(super) fn operations_of(
    world: &World,
    guest: &Attached,
    number: u64,
    count: u32,
) -> Vec<Option<crate::workload::Op>> {
    let entity = Entity::WORLD.child("guest-ops", number);
    let writer = guest.setup.history.borrow().writer();
    let again = if number + 1 == u64::from(writer) { "" } else { " again" };
    world.sim.name_entity(entity, || format!("guest {writer}{again}"));
    let flushes = world.setting("fences", &[12, 12, 12, 2]);
    let mut w = Workload { flushes, ..workload(world, guest.setup.size_sectors, count, 88) };
    if flushes == 2 {
        // So that later requests on the ring have to wait for such a flush.
        w.shape = Shape::Overlapping;
    }
    operations(&world.sim, entity, number, &w)
}

/// Runs `work` to its end as a task of the guest.
pub(super) async fn in_guest(guest: &Attached, work: impl Future<Output = ()> + 'static) {
    let (task, finished) = joined(work);
    guest.node.spawn("main", 0, task);
    let _ = finished.await;
}

/// Drains without faults, reads everything once more, and shuts the machine down.
pub(super) async fn finish(world: &World, machine: &Rc<Machine>, guests: &[(Attached, Guest<RingDisk>)]) {
    world.sim.stop_faults();
    for (attached, guest) in guests {
        let (w, a, g) = (world.clone(), attached.clone(), guest.clone());
        in_guest(attached, async move {
            if let Err(error) = g.read_all().await {
                w.fail(Invariant::E4, format!("reading the whole disk failed with {error:?}"));
            }
            a.shut_down(&w, &g).await;
        })
        .await;
    }
    machine.detach_all().await;
    machine.check_leaks();
    if !machine.close_failed() {
        cut_after_close(world, guests.iter().map(|(attached, _)| attached.setup.spec.path.as_str()));
    }
    for (attached, _) in guests {
        attached.setup.check_bytes(world, "in the end");
    }
}

/// Cache modes for scenarios without a power cut before a disk is closed.
const ALL_CACHES: [CacheMode; 3] = [CacheMode::WriteBack, CacheMode::WriteThrough, CacheMode::Unsafe];

/// The usual start: attach, start tapdisk, boot.
pub(super) async fn start(
    world: &World,
    setups: Vec<Setup>,
) -> Option<(Rc<Machine>, Vec<(Attached, Guest<RingDisk>)>)> {
    start_with(world, setups, &[CacheMode::WriteBack, CacheMode::WriteThrough]).await
}

/// As [`start`], with one of `caches`.
async fn start_with(
    world: &World,
    setups: Vec<Setup>,
    caches: &[CacheMode],
) -> Option<(Rc<Machine>, Vec<(Attached, Guest<RingDisk>)>)> {
    let limits = StackLimits::draw(world);
    let cache = world.setting("program-cache", caches);
    let machine = Machine::caching(world, limits, cache);
    let mut attached = Vec::new();
    for (number, setup) in setups.into_iter().enumerate() {
        attached.push(machine.attach(setup, number as u64).await);
    }
    let outages = !world.errors_allowed();
    if outages {
        arm_outage(world, Armed::Opening);
    }
    machine.start_tapdisk();
    let mut guests = Vec::new();
    for one in attached {
        let guest = one.boot(world, NO_ERRORS).await?;
        if cache == CacheMode::WriteThrough {
            guest.write_through();
        }
        guests.push((one, guest));
    }
    if outages {
        arm_outage(world, Armed::Open);
    }
    Some((machine, guests))
}

async fn ring_raw(world: World) {
    let setup = Setup::raw(&world, 0, DISK_BYTES);
    let Some((machine, guests)) = start_with(&world, vec![setup], &ALL_CACHES).await else { return };
    let (attached, guest) = &guests[0];
    let ops = operations_of(&world, attached, 0, 120);
    let (g, depth) = (guest.clone(), world.setting("ring-depth", &[32, 8, 1]));
    in_guest(attached, async move { g.run(&ops, depth).await }).await;
    let syncs = world.storage.counts().syncs;
    if machine.cache() == CacheMode::Unsafe && syncs > 0 {
        world.fail(Invariant::D2, format!("a disk that ignores flushes carried out {syncs}"));
    }
    finish(&world, &machine, &guests).await;
}

/// About the number of tapdisk's effects from its start until it has taken over a ring.
const TAKING_UP_STEPS: u64 = 120;

pub(super) fn kills(world: &World, max: u32, steps: u64) -> Vec<u64> {
    let entity = Entity::WORLD.child("killer", 0);
    world.sim.name_entity(entity, || "killer".into());
    let draw = |i| {
        world.sim.decide(entity, &KILL_AFTER, i, |d| match d.below(8) {
            0 | 1 => 0,
            // Soon after its start: while it takes over what its predecessor left.
            2..=4 if i > 0 => 1 + d.below(TAKING_UP_STEPS),
            _ => 1 + d.below(steps),
        })
    };
    (0..max).map(draw).filter(|n| *n > 0).collect()
}

async fn tapdisk_killed(world: World, model: &'static dyn FormatModel) {
    let kind = Kind { model, overlay: may_overlay(&world, model) };
    let setup = Setup::new(&world, kind, 0, DISK_BYTES);
    let Some((machine, guests)) = start_with(&world, vec![setup], &ALL_CACHES).await else { return };
    let (attached, guest) = &guests[0];
    guest.set_error_policy(error_policy(&world, Invariant::P1));
    machine.allow_losses();
    world.sim.spawn("supervisor", 0, Rc::clone(&machine).kill_and_restart(kills(&world, 4, 600)));
    let ops = operations_of(&world, attached, 0, 60);
    let (g, depth) = (guest.clone(), world.setting("ring-depth", &[32, 8, 1]));
    in_guest(attached, async move { g.run(&ops, depth).await }).await;
    machine.end_kills();
    finish(&world, &machine, &guests).await;
}

async fn frontend_reconnect(world: World) {
    let setup = Setup::mapped(&world, 0, DISK_BYTES, false);
    // Requests repeated on the new ring may be carried out twice, and in another order.
    setup.history.borrow_mut().relax_order();
    let Some((machine, guests)) = start(&world, vec![setup]).await else { return };
    let (attached, guest) = &guests[0];
    let deaths = world.setting("deaths-too", &[false, true]);
    if deaths {
        world.sim.spawn("supervisor", 0, Rc::clone(&machine).kill_and_restart(kills(&world, 3, 600)));
    }
    let in_a_loop = !deaths && world.setting("reconnects-in-a-loop", &[false, false, false, true]);
    let ops = operations_of(&world, attached, 0, 60);
    let (g, depth) = (guest.clone(), world.setting("ring-depth", &[32, 8, 1]));
    let (w, front) = (world.clone(), guest.disk().front().clone());
    let (task, reconnected) = joined(async move {
        let entity = Entity::WORLD.child("reconnects", 0);
        w.sim.name_entity(entity, || "front end".into());
        for i in 0..3 {
            let wait_ns =
                w.sim.decide(entity, &RECONNECT_AT, i, |d| if d.below(3) == 0 { 0 } else { d.magnitude(20) });
            if wait_ns == 0 {
                continue;
            }
            w.sim.sleep_ns(wait_ns).await;
            if let Err(error) = front.reconnect().await {
                w.fail(Invariant::L1, format!("the front end failed to reconnect: {error:?}"));
            }
        }
        if in_a_loop {
            reconnect_in_a_loop(&w, &front).await;
        }
    });
    attached.node.spawn("reconnects", 0, task);
    in_guest(attached, async move { g.run(&ops, depth).await }).await;
    let _ = reconnected.await;
    machine.end_kills();
    finish(&world, &machine, &guests).await;
}

/// Number of reconnects of a front end that does nothing else, and their minimum time in nanoseconds: each costs
/// xenstored, which all domains share, a dozen transactions of the back end's domain.
const LOOPS: u64 = 24;
const LOOPS_NS: u64 = 5_000_000_000;

async fn reconnect_in_a_loop(world: &World, front: &Blkfront) {
    let began_ns = world.sim.now_ns();
    for _ in 0..LOOPS {
        if let Err(error) = front.reconnect().await {
            world.fail(Invariant::L1, format!("the front end failed to reconnect: {error:?}"));
        }
    }
    let took_ns = world.sim.now_ns() - began_ns;
    if took_ns < LOOPS_NS {
        world.fail(Invariant::H2, format!("a front end reconnected {LOOPS} times in {took_ns} ns"));
    }
}

async fn two_guests(world: World) {
    let one = Setup::mapped(&world, 0, DISK_BYTES, false);
    let two = Setup::raw(&world, 1, DISK_BYTES);
    let Some((machine, guests)) = start(&world, vec![one, two]).await else { return };
    for (_, guest) in &guests {
        guest.set_error_policy(error_policy(&world, Invariant::P1));
    }
    machine.allow_losses();
    world.sim.spawn("supervisor", 0, Rc::clone(&machine).kill_and_restart(kills(&world, 1, 600)));
    let mut running = Vec::new();
    for (number, (attached, guest)) in guests.iter().enumerate() {
        let ops = operations_of(&world, attached, number as u64, 40);
        let g = guest.clone();
        let (task, finished) = joined(async move {
            g.run(&ops, 16).await;
        });
        attached.node.spawn("main", 0, task);
        running.push(finished);
    }
    for finished in running {
        let _ = finished.await;
    }
    machine.end_kills();
    finish(&world, &machine, &guests).await;
}

async fn ring_power_cut(world: World) {
    let setup = Setup::mapped(&world, 0, DISK_BYTES, world.setting("overlay", &[false, true]));
    let Some((machine, guests)) = start(&world, vec![setup.clone()]).await else { return };
    let depth = world.setting("ring-depth", &[4, 32, 1]);
    let ops = operations_of(&world, &guests[0].0, 0, 60);
    let (m, g) = (Rc::clone(&machine), guests[0].1.clone());
    arm_power_cut(&world, &setup, 0, 240, move || m.stop());
    in_guest(&guests[0].0, async move { g.run(&ops, depth).await }).await;
    machine.power_cut().await;
    setup.check(&world, "after the power cut").await;
    next_guest(&world, setup, depth, "after the power cut").await;
}

/// Another machine and another guest on the disk of a guest that has ended.
pub(super) async fn next_guest(world: &World, setup: Setup, depth: usize, when: &'static str) {
    next_guests(world, vec![setup], depth, when).await;
}

/// The same for several disks.
pub(super) async fn next_guests(world: &World, setups: Vec<Setup>, depth: usize, when: &'static str) {
    let first = setups.len() as u64;
    let Some((machine, guests)) = start(world, setups).await else { return };
    for (number, (attached, guest)) in (first..).zip(&guests) {
        guest.set_error_policy(ErrorPolicy { reads: Invariant::G7, ..NO_ERRORS });
        let (w, g, ops) = (world.clone(), guest.clone(), operations_of(world, attached, number, 20));
        in_guest(attached, async move {
            if let Err(error) = g.read_all().await {
                w.fail(Invariant::G11, format!("reading the disk {when} failed with {error:?}"));
            }
            g.set_error_policy(NO_ERRORS);
            g.run(&ops, depth).await;
        })
        .await;
    }
    finish(world, &machine, &guests).await;
}

/// A machine with two guests, each with a raw disk; in half of the seeds tapdisk watches for them.
async fn two_disks(world: &World) -> (Rc<Machine>, Attached, Attached) {
    let limits = StackLimits::draw(world);
    let setups = [0, 1].map(|number| Setup::raw(world, number, DISK_BYTES));
    let [one, two] = setups;
    if world.setting("rings-watched", &[false, true]) {
        let machine = Machine::watching(world, limits);
        machine.start_tapdisk();
        let (one, two) = (machine.new_guest(one, 0), machine.new_guest(two, 1));
        machine.plug(&one).await;
        machine.plug(&two).await;
        return (machine, one, two);
    }
    let machine = Machine::new(world, limits);
    let (one, two) = (machine.attach(one, 0).await, machine.attach(two, 1).await);
    machine.start_tapdisk();
    (machine, one, two)
}

async fn hostile_frontend(world: World) {
    let (machine, bad, good) = two_disks(&world).await;
    let neighbour = ErrorPolicy { reads: Invariant::H2, ..NO_ERRORS };
    let Some(guest) = good.boot(&world, neighbour).await else { return };
    let above = || {
        let mut bytes = vec![0; ((bad.setup.size_sectors - HONEST_SECTORS) * SECTOR_BYTES) as usize];
        let content = world.storage.content(&bad.setup.spec.path).unwrap_or_default();
        content.pages.read(HONEST_SECTORS * SECTOR_BYTES, &mut bytes);
        bytes
    };
    let before = above();
    let deaths = world.setting("deaths-too", &[false, true]);
    if deaths {
        world.sim.spawn("supervisor", 0, Rc::clone(&machine).kill_and_restart(kills(&world, 3, 400)));
    }
    // An unrecoverable ring ends a process that was told to serve only that.
    let may_break = !deaths || machine.is_watching();
    machine.expect_broken_ring(bad.dom);
    let hostile = Hostile::new(&world, bad.clone(), machine.starts(), may_break);
    let w = world.clone();
    let (task, gone) = joined(async move {
        let played = async {
            hostile.connect().await?;
            hostile.play(40).await
        };
        if let Err(error) = played.await {
            w.fail(Invariant::H1, format!("the hostile guest was stopped by {error:?}, not by the back end"));
        }
    });
    bad.node.spawn("hostile", 0, task);
    let ops = operations_of(&world, &good, 1, 40);
    let g = guest.clone();
    in_guest(&good, async move { g.run(&ops, 16).await }).await;
    select(gone, bad.node.dead()).await;
    machine.end_kills();
    // Its front end need not release anything, ever.
    machine.destroy(&bad).await;
    finish(&world, &machine, &[(good, guest)]).await;
    if above() != before {
        world.fail(Invariant::H1, "a malformed request changed the disk");
    }
}
