//! Every command of the protocol, with every permitted flag; and a server that is stopped under load.

use super::plan::{
    DISK, DISK_BYTES, NO_ERRORS, Plan, Served, address, check_asks, client_config, client_stack, cut_power,
    last_check, within,
};
use crate::catalog::crash::arm_power_cut;
use crate::catalog::setup::Setup;
use crate::check::Invariant;
use crate::guest::{DirectDisk, ErrorPolicy, Gate, RawNbd, Speaker, Step, steps};
use crate::scenario::Scenario;
use crate::world::{World, setting};
use kernel_model::faults::FaultPlan;
use kernel_model::{ProcessStream, SimHost, StorageConfig};
use sim::{Entity, Label, Sim};
use std::cell::RefCell;
use std::rc::Rc;
use tap_core::CacheMode;
use tap_core::wait::Event;
use tap_host::{SECTOR_BYTES, SocketAddress, Sockets};
use tap_nbd::{Breaks, ClientConfig};

/// Time after which a server is asked to stop.
pub static STOP_AFTER: Label = Label::new("stop-after", "the server is asked to stop after {} ns");

/// The whole protocol.
pub static NBD_EVERY_COMMAND: Scenario = Scenario {
    name: "nbd-every-command",
    about: "every NBD command with every flag, valid and invalid, on a disk and on a read-only one, with I/O errors; power cut",
    storage: &storage,
    body: &|w| Box::pin(every_command(w)),
};

/// A server that is stopped in order, repeatedly.
pub static NBD_SERVER_STOPPED: Scenario = Scenario {
    name: "nbd-server-stopped",
    about: "a server is stopped under load and its machine loses power at once: what was answered is there, the rest is sent again",
    storage: &|_| StorageConfig::default(),
    body: &|w| Box::pin(server_stopped(w)),
};

fn storage(sim: &Sim) -> StorageConfig {
    let errors = setting(sim, "nbd-errors", &[false, true]);
    let failing = FaultPlan {
        errors,
        bad_sectors: errors,
        no_space: errors,
        sync_errors: errors,
        ..FaultPlan::LATENCY
    };
    let faults = FaultPlan { short: true, transient: true, ..failing };
    StorageConfig { faults, zeroing: setting(sim, "host-zeroes", &[true, false]), ..StorageConfig::default() }
}

const FROZEN: &str = "frozen";

fn frozen_address() -> SocketAddress {
    SocketAddress::Unix("/run/frozen.nbd".into())
}

async fn every_command(world: World) {
    let (plan, setup) = Plan::draw(&world);
    let mut plan = plan.unaligned();
    // Also less than a stuck disk takes for a request, but more than the bytes of a reply: clients that have finished
    // sending still get all of them.
    plan.server.grace_ns = world.setting("nbd-grace", &[5_000_000_000, 100_000_000]);
    let frozen = Setup::raw(&world, 1, DISK_BYTES);
    frozen.history.borrow_mut().relax_order();
    let still = plan.other(FROZEN, &frozen, frozen_address()).frozen();
    let before = world.storage.bytes(&frozen.spec.path);
    world.storage.set_calm(true);
    let Some(served) = plan.serve(&plan.process("tapdisk", 0)).await else { return };
    let Some(other) = still.serve(&plan.process("frozen", 0)).await else { return };
    world.storage.set_calm(false);
    let host = plan.process("client", 0);
    let nodes = [&served.host, &other.host, &host].map(|host| host.process.node().clone());
    arm_power_cut(&world, &setup, 0, 240, move || nodes.iter().for_each(sim::Node::kill));
    let max = (plan.server.request_bytes / SECTOR_BYTES as u32).min(1024);
    let entity = Entity::WORLD.child("speaker", 0);
    world.sim.name_entity(entity, || "the client".into());
    let all = steps(&world, entity, 70, setup.size_sectors, max);
    let structured = world.setting("nbd-structured", &[true, false]);
    let (w, h, s, depth) = (world.clone(), host.clone(), setup.clone(), plan.limits.guest_depth);
    let (still, steps) = (frozen.clone(), all.clone());
    within(&host, async move {
        let mut speakers = Vec::new();
        // The last one has the other kind of replies, and uses the read-only disk.
        for (who, name, structured) in
            [(1, DISK, structured), (2, DISK, !structured), (3, FROZEN, structured)]
        {
            let address = if name == FROZEN { frozen_address() } else { address() };
            speakers.extend(speaker(&w, &h, (who, &address), name, structured).await);
        }
        if speakers.len() == 3 {
            speak((&w, &h), &speakers, &[s.clone(), s, still], &steps, depth).await;
            speakers.iter().for_each(Speaker::leave);
        }
    })
    .await;
    check_asks(&world, &served, &plan, [2, 2]);
    let flushes =
        |who: usize| all.iter().skip(who).step_by(3).flatten().filter(|step| step.flushes()).count();
    let max = [flushes(0) + flushes(1), flushes(2)];
    for (asks, max) in served.asks().iter().chain(&other.asks()).zip(max) {
        if asks.flushes() > max as u64 {
            let text = format!("{} flushes for {max} requests that need one", asks.flushes());
            world.fail(Invariant::N2, text);
        }
    }
    cut_power(&world, &setup, &[&served.host, &other.host, &host]).await;
    if world.storage.bytes(&frozen.spec.path) != before {
        world.fail(Invariant::N2, "a read-only export has changed");
    }
    last_check(&plan, &setup, Invariant::G7).await;
}

pub(super) async fn speaker(
    world: &World,
    host: &SimHost,
    (number, address): (u64, &SocketAddress),
    name: &str,
    structured: bool,
) -> Option<Speaker<ProcessStream>> {
    let who = Entity::WORLD.child("speaker", number);
    world.sim.name_entity(who, || format!("connection {number} of the client"));
    let raw = RawNbd::new(host.connect(address).await.ok()?);
    let Some(speaker) = Speaker::agree(world, raw, who, name, structured, DISK_BYTES).await else {
        world.fail(Invariant::N2, "the server ended a valid negotiation");
        return None;
    };
    host.process.node().spawn("listens", 0, speaker.clone().listen());
    Some(speaker)
}

/// Sends all requests, each on the connection that its number selects. In some worlds the clients then send nothing
/// more, while the last requests are served.
async fn speak(
    (world, host): (&World, &SimHost),
    speakers: &[Speaker<ProcessStream>],
    disks: &[Setup],
    all: &[Option<Step>],
    depth: usize,
) {
    let (gate, unbegun) = (Gate::default(), Gate::default());
    for (i, step) in all.iter().enumerate() {
        let Some(step) = *step else { continue };
        gate.below(depth.max(1)).await;
        gate.enter();
        let at = i % speakers.len();
        let (speaker, history, gate) = (speakers[at].clone(), Rc::clone(&disks[at].history), gate.clone());
        let unbegun = unbegun.clone();
        unbegun.enter();
        host.process.node().spawn("step", i as u64, async move {
            unbegun.leave();
            speaker.step(step, &history).await;
            gate.leave();
        });
    }
    if world.setting("nbd-half-close", &[false, true]) {
        // Waited for, not polled: the disk may hang for ten seconds as often as it likes.
        unbegun.below(1).await;
        for speaker in speakers {
            speaker.all_sent().await;
        }
        speakers.iter().for_each(Speaker::finish);
    }
    gate.below(1).await;
}

async fn server_stopped(world: World) {
    let (mut plan, setup) = Plan::draw(&world);
    // Also less than the disk takes for a request: it then ends without its reply, and is sent again.
    plan.server.grace_ns = world.setting("nbd-grace", &[5_000_000_000, 1_000_000]);
    let Some(first) = plan.serve(&plan.process("tapdisk", 0)).await else { return };
    let host = plan.process("client", 0);
    let config = ClientConfig { breaks: Breaks::Keep, ..client_config(&world) };
    let ops = plan.operations(0, setup.size_sectors, 60);
    let (last, done) = (Rc::new(RefCell::new(None)), Rc::new(Event::new()));
    let (p, s, keep, tell) = (plan.clone(), setup.clone(), Rc::clone(&last), Rc::clone(&done));
    world.sim.spawn("stops", 0, async move {
        *keep.borrow_mut() = stops(&p, &s, first).await;
        tell.set();
    });
    let (p, h, s) = (plan.clone(), host.clone(), setup.clone());
    within(&host, async move {
        let (_, node) = client_stack(&p, &h, &config, CacheMode::WriteBack).await;
        let disk = DirectDisk::new(node, p.limits.pool_bytes);
        let guest = p.guest(disk, &s, Invariant::P1);
        guest.set_error_policy(ErrorPolicy { reads: Invariant::P1, ..NO_ERRORS });
        guest.run(&ops, p.limits.guest_depth).await;
    })
    .await;
    done.wait().await;
    let Some(served) = last.take() else { return };
    cut_power(&world, &setup, &[&host, &served.host]).await;
    last_check(&plan, &setup, Invariant::G7).await;
}

/// Stops the server, cuts the power of its machine, and starts the next. Returns the last one.
async fn stops(plan: &Plan, setup: &Setup, first: Served) -> Option<Served> {
    let (world, mut served) = (&plan.world, first);
    for n in 1..=3 {
        let entity = Entity::WORLD.child("stop", n);
        world.sim.name_entity(entity, || format!("stop {n}"));
        let after_ns = world.sim.decide(entity, &STOP_AFTER, 0, |d| d.magnitude(22));
        if after_ns > 0 {
            world.sim.sleep_ns(after_ns).await;
            served.stop(world, setup).await;
            world.power_cut();
            served = plan.serve(&plan.process("tapdisk", n)).await?;
        }
    }
    Some(served)
}
