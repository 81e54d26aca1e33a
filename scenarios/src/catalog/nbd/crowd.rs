//! More clients than connections, most of them idle or stuck: the well-behaved ones must be served.

use super::plan::{
    DISK, NO_ERRORS, Plan, Served, address, client_config, end, reap_dead_clients, server_limits,
};
use crate::catalog::setup::Setup;
use crate::check::Invariant;
use crate::guest::{DirectDisk, ErrorPolicy, Guest, NbdScript, RawNbd};
use crate::probes::marked;
use crate::scenario::Scenario;
use crate::world::World;
use kernel_model::faults::FaultPlan;
use kernel_model::{ProcessStream, SimHost, StorageConfig};
use sim::{Entity, Label};
use std::cell::Cell;
use std::rc::Rc;
use tap_abi::nbd::{CMD_DISC, CMD_READ, CMD_WRITE};
use tap_core::Node;
use tap_host::{SECTOR_BYTES, SectorRange, Sockets};

/// What a client of the crowd does.
pub static CROWD: Label = Label::new(
    "crowd",
    "it is of kind {}: 1 silent, 2 sends half a negotiation, 3 never reads, 4 reads slowly, 5 and 6 read, 7 never reads and stays, \
     8 does so with large requests, 9 stops in the middle of a large write",
);

/// Clients that send nothing or read nothing.
pub static NBD_CROWD: Scenario = Scenario {
    name: "nbd-crowd",
    about: "a crowd that connects and never speaks, sends requests and never reads, or stops in a write; a client that reads is served soon",
    // Nothing hangs for ten seconds, because the time that clients wait for each other is measured.
    storage: &|_| StorageConfig {
        faults: FaultPlan { stuck: false, ..FaultPlan::LATENCY },
        ..StorageConfig::default()
    },
    body: &|w| Box::pin(crowd(w)),
};

/// Maximum time until a well-behaved client is served, in nanoseconds: a few slow clients before it, and twice the time
/// that a client may take for its last replies.
const WITHIN_NS: u64 = 25_000_000_000;
/// How long the server waits for a client that reads nothing.
const GRACE_NS: u64 = 1_000_000_000;
const CROWD_SIZE: u64 = 8;
/// Number of receives of a slow client, and the time between them in nanoseconds.
const SLOW_LOOKS: u64 = 6;
const SLOW_NS: u64 = 400_000_000;
const READS: u64 = 200;
const READ_BYTES: u32 = 4096;
/// Sectors of a large read or write.
const LARGE_SECTORS: u32 = 1024;

async fn crowd(world: World) {
    let (mut plan, setup) = Plan::draw(&world);
    plan.server.connections = world.setting("nbd-slots", &[4, 2, 8]);
    // The crowd is larger than the smallest number of those that may negotiate.
    plan.server.negotiating = world.setting("nbd-negotiating", &[16, 4, 8]);
    plan.server.grace_ns = GRACE_NS;
    let Some(served) = plan.serve(&plan.process("tapdisk", 0)).await else { return };
    write_first(&world, &plan, &setup).await;
    let over = Rc::new(Cell::new(false));
    let mut hosts = Vec::new();
    // In some worlds most clients do the same, so that they wait for each other, too.
    let usual = world.setting("crowd-kind", &[0, 3, 7, 8, 9]);
    for who in 0..CROWD_SIZE {
        let entity = Entity::WORLD.child("crowd", who);
        world.sim.name_entity(entity, || format!("client {who} of the crowd"));
        let kind = world.sim.decide(entity, &CROWD, 0, |d| match d.below(2) {
            0 if usual > 0 => usual,
            _ => d.below(10),
        });
        if kind > 0 {
            let host = plan.process("crowd", who);
            host.process.node().spawn(
                "main",
                0,
                run_client(world.clone(), host.clone(), kind, Rc::clone(&over)),
            );
            hosts.push(host);
        }
    }
    world.sim.sleep_ns(1_000_000_000).await;
    let host = plan.process("client", 0);
    let asked_ns = world.sim.now_ns();
    let soon = Rc::new(Cell::new(false));
    let (w, since) = (world.clone(), Rc::clone(&soon));
    world.sim.spawn("patience", 0, async move {
        w.sim.sleep_ns(WITHIN_NS).await;
        if !since.get() {
            w.fail(Invariant::L1, "a client that wants to read has not been served for 25 s");
        }
    });
    let client = plan.connect(&host, &client_config(&world)).await;
    let disk = DirectDisk::new(Rc::clone(&client) as Rc<dyn Node>, plan.limits.pool_bytes);
    let guest = plan.guest(disk, &setup, Invariant::G1);
    guest.set_error_policy(ErrorPolicy { reads: Invariant::G1, ..NO_ERRORS });
    // Also more than a connection's reserved memory.
    for sectors in [1, LARGE_SECTORS.min(setup.size_sectors as u32)] {
        if let Err(error) = guest.read(SectorRange::new(0, sectors)).await {
            world.fail(Invariant::H2, format!("reading failed with {error:?}"));
        }
    }
    soon.set(true);
    let waited_ms = (world.sim.now_ns() - asked_ns) / 1_000_000;
    world.sim.remark("client", || format!("was served within {waited_ms} ms"));
    rest(&world, &guest).await;
    over.set(true);
    check_bounds(&world, &plan, &served);
    reap_dead_clients(&world, &hosts, &served, 1).await;
    let clients = vec![client];
    end(&plan, served, &clients, &setup).await;
}

/// Writes the sectors that the crowd reads: a reply to a read of zeros would take no memory.
async fn write_first(world: &World, plan: &Plan, setup: &Setup) {
    let client = plan.connect(&plan.process("writer", 0), &client_config(world)).await;
    let disk = DirectDisk::new(Rc::clone(&client) as Rc<dyn Node>, plan.limits.pool_bytes);
    let range = SectorRange::new(0, LARGE_SECTORS.min(setup.size_sectors as u32));
    if let Err(error) = plan.guest(disk, setup, Invariant::G1).write(range).await {
        world.fail(Invariant::H2, format!("writing before the crowd comes failed with {error:?}"));
    }
    if let Err(error) = client.close().await {
        world.fail(Invariant::E4, format!("closing a client failed with {error:?}"));
    }
}

/// Writes, and then idles while other clients want its connection: it must keep it.
async fn rest(world: &World, guest: &Guest<DirectDisk>) {
    if let Err(error) = guest.write(SectorRange::new(0, 1)).await {
        world.fail(Invariant::H2, format!("writing failed with {error:?}"));
    }
    let back = || marked(&world.kernel, "nbd-server-back");
    let before = back();
    world.sim.sleep_ns(world.setting("rest", &[3 * GRACE_NS, 0])).await;
    if let Err(error) = guest.read(SectorRange::new(0, 1)).await {
        world.fail(Invariant::H2, format!("reading after a pause failed with {error:?}"));
    }
    if back() != before {
        world.fail(Invariant::H2, "a client that was idle for a while was disconnected");
    }
}

/// Checks that no more connections are open than the limits permit: a replaced one may still be ending.
fn check_bounds(world: &World, plan: &Plan, served: &Served) {
    let (open, limits) = (served.connections(), plan.server);
    if open > limits.connections + 2 * limits.negotiating {
        world.fail(Invariant::K1, format!("the server has {open} connections, with limits of {limits:?}"));
    }
}

/// Runs one client of the crowd. An idle one reconnects whenever it is disconnected.
async fn run_client(world: World, host: SimHost, kind: u64, over: Rc<Cell<bool>>) {
    while !over.get() {
        if let Ok(stream) = host.connect(&address()).await
            && run_connection(&world, RawNbd::new(stream), kind).await
        {
            return;
        }
        world.sim.sleep_ns(50_000_000).await;
    }
}

/// Bytes of a large read or write that this server accepts.
fn large_bytes(world: &World) -> u32 {
    server_limits(world).request_bytes.min(LARGE_SECTORS * SECTOR_BYTES as u32)
}

/// One connection. Returns whether the client is done.
async fn run_connection(world: &World, raw: RawNbd<ProcessStream>, kind: u64) -> bool {
    let mut script = NbdScript::negotiation(DISK, kind == 2).0.concat();
    if kind <= 2 {
        // It sends nothing, or stops in the middle of an option.
        script.truncate(if kind == 1 { 0 } else { script.len() - 5 });
        let _gone = raw.send(&script).await;
        raw.drain().await;
        return false;
    }
    if raw.take(18).await.is_none() {
        return false;
    }
    let mut requests = NbdScript(Vec::new());
    let read_bytes = if kind == 8 { large_bytes(world) } else { READ_BYTES };
    for n in 0..if kind == 9 { 0 } else { READS } {
        requests.request(CMD_READ, 0, n, 0, read_bytes, &[]);
    }
    if kind == 9 {
        // Less than it announces, so that none of it is ever written.
        requests.request(CMD_WRITE, 0, 0, 0, large_bytes(world), &[0; SECTOR_BYTES as usize]);
    }
    if kind == 6 {
        requests.request(CMD_DISC, 0, 0, 0, 0, &[]);
    }
    script.extend(requests.0.concat());
    let reader = raw.clone();
    let sent = async move {
        let sent = raw.send(&script).await;
        if kind < 6 {
            raw.finish();
        }
        sent
    };
    if kind == 3 || kind >= 7 {
        let _gone = sent.await;
        return std::future::pending().await;
    }
    world.sim.spawn_once("sends", 0, async move {
        // A failed send is ignored: the received bytes are checked.
        let _sent = sent.await;
    });
    let mut got = 0;
    for _ in 0..if kind == 4 { SLOW_LOOKS } else { 0 } {
        got += reader.some().await;
        world.sim.sleep_ns(SLOW_NS).await;
    }
    got += reader.drain().await;
    let whole = READS * u64::from(READ_BYTES);
    if got > u64::from(READ_BYTES) && got < whole {
        world.fail(Invariant::H2, format!("a client that reads got {got} bytes of {whole}"));
    }
    got >= whole
}
