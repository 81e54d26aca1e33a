//! Disks over NBD: our client against our server, and clients that are slow, dying or hostile.
//!
//! ```text
//!   client process                                  server process (may be killed and restarted)
//!   Guest ─ [Slot ─ Scheduler ─] Client ═ stream ═ Server ─ Slot ─ Scheduler ─ image ─ Storage
//! ```

mod bytes;
mod crowd;
mod every;
mod greeting;
mod lying;
mod modest;
mod plan;
mod refused;
mod secure;
mod status;

pub use bytes::{BYTES_STEP, NBD_BYTES};
pub use crowd::{CROWD, NBD_CROWD};
pub use every::{NBD_EVERY_COMMAND, NBD_SERVER_STOPPED, STOP_AFTER};
pub use greeting::NBD_WRONG_GREETING;
pub use lying::NBD_HOSTILE_SERVER;
pub use modest::NBD_MODEST_SERVER;
pub use refused::NBD_SERVE_REFUSED;

pub(super) use plan::{NO_ERRORS, client_config, server_limits};

use super::crash::arm_power_cut;
use super::ring::kills;
use super::setup::Setup;
use crate::check::Invariant;
use crate::formats::RAW;
use crate::guest::{DirectDisk, ErrorPolicy, NbdScript, RawNbd};
use crate::scenario::Scenario;
use crate::world::World;
use kernel_model::StorageConfig;
use kernel_model::faults::{FaultPlan, SyncErrors};
use plan::{
    DISK, DISK_BYTES, Plan, Supervisor, address, check_asks, check_connected, check_idle, check_unbroken,
    client_stack, cut_power, end, last_check, reap_dead_clients, send_all, tcp_address, within,
};
use sim::{Entity, Label};
use std::cell::Cell;
use std::rc::Rc;
use tap_abi::nbd::{CMD_BLOCK_STATUS, CMD_READ, CMD_WRITE};
use tap_core::CacheMode;
use tap_core::wait::Event;
use tap_host::Sockets;
use tap_nbd::{Breaks, ClientConfig};

/// Number of effects after which a client is killed.
pub static CLIENT_DIES: Label = Label::new("client-dies", "the client is killed after {} of its effects");

/// Several connections over streams that are split anywhere.
pub static NBD_SPLIT_READS: Scenario = Scenario {
    name: "nbd-split-reads",
    about: "several NBD connections to one export over streams that are split and delayed; a flush on one covers all; power cut",
    storage: &|_| StorageConfig::default(),
    body: &|w| Box::pin(split_reads(w)),
};

/// Clients that die.
pub static NBD_CLIENT_DIES: Scenario = Scenario {
    name: "nbd-client-dies",
    about: "NBD clients die in the middle of requests; another continues, and nothing of the dead ones is left",
    storage: &|_| StorageConfig::default(),
    body: &|w| Box::pin(client_dies(w)),
};

/// A client that reads no replies.
pub static NBD_SLOW_CLIENT: Scenario = Scenario {
    name: "nbd-slow-client",
    about: "an NBD client sends many requests and reads no replies; others are not held up, and memory is bounded",
    storage: &|_| StorageConfig::default(),
    body: &|w| Box::pin(slow_client(w)),
};

/// A server that dies under its client.
pub static NBD_SERVER_RESTARTS: Scenario = Scenario {
    name: "nbd-server-restarts",
    about: "tapdisk is killed between any two of its effects under an NBD client and restarted; the guest sees a pause",
    storage: &|_| StorageConfig::default(),
    body: &|w| Box::pin(server_restarts(w)),
};

/// A server whose syncs fail and that dies.
pub static NBD_FLUSH_ERRORS_AND_DEATHS: Scenario = Scenario {
    name: "nbd-flush-errors-and-deaths",
    about: "syncs fail and lose data once, the NBD server dies in and after them; no later flush says ok before a reboot",
    storage: &|_| StorageConfig {
        faults: FaultPlan { sync_errors: true, sync_interrupted: true, ..FaultPlan::LATENCY },
        sync_errors: SyncErrors::Linux,
        ..StorageConfig::default()
    },
    body: &|w| Box::pin(flush_errors_and_deaths(w)),
};

/// A server whose machine goes down under its client.
pub static NBD_SERVER_POWER_CUT: Scenario = Scenario {
    name: "nbd-server-power-cut",
    about: "the server's machine loses power while the NBD client runs; no flush then hides a loss",
    storage: &|_| StorageConfig::default(),
    body: &|w| Box::pin(server_power_cut(w)),
};

/// A client that sends garbage.
pub static NBD_HOSTILE_CLIENT: Scenario = Scenario {
    name: "nbd-hostile-client",
    about: "an NBD client whose messages are changed, truncated and mixed with garbage; its neighbour is not affected",
    storage: &|_| StorageConfig::default(),
    body: &|w| Box::pin(hostile_client(w)),
};

/// A client that sends given bytes; not listed.
pub static NBD_STREAM: Scenario = Scenario {
    name: "nbd-stream",
    about: "an NBD client that sends given bytes, which a fuzzer makes",
    storage: &|_| StorageConfig::default(),
    body: &|w| Box::pin(stream(w)),
};

async fn split_reads(world: World) {
    let (mut plan, setup) = Plan::draw(&world);
    let connections = world.setting("nbd-connections", &[2, 3, 1]);
    let write_through = world.setting("write-through", &[false, true]);
    let cache = if write_through { CacheMode::WriteThrough } else { CacheMode::WriteBack };
    let mut config = client_config(&world);
    plan.addresses.push(tcp_address());
    let proxied = world.setting("proxy", &[false, false, true]);
    plan.secure(proxied && world.setting("nbd-tls", &[false, true]));
    let Some(served) = plan.serve(&plan.process("tapdisk", 0)).await else { return };
    let proxy = plan.process("proxy", 0);
    if proxied {
        config.address = plan.proxy(&proxy);
    }
    let host = plan.process("client", 0);
    let ops = plan.operations(0, setup.size_sectors, 60);
    let nodes = [&served.host, &proxy, &host].map(|host| host.process.node().clone());
    arm_power_cut(&world, &setup, 0, 240, move || nodes.iter().for_each(sim::Node::kill));
    let (p, h, s) = (plan.clone(), host.clone(), setup.clone());
    within(&host, async move {
        let (disk, _clients) = p.spread(&h, &config, connections, cache).await;
        let guest = p.guest(disk, &s, Invariant::G1);
        if write_through {
            guest.write_through();
        }
        guest.run(&ops, p.limits.guest_depth).await;
    })
    .await;
    check_unbroken(&world);
    cut_power(&world, &setup, &[&served.host, &proxy, &host]).await;
    // The last client has no proxy.
    plan.secure(false);
    last_check(&plan, &setup, Invariant::G7).await;
}

async fn client_dies(world: World) {
    let (plan, setup) = Plan::draw(&world);
    let Some(served) = plan.serve(&plan.process("tapdisk", 0)).await else { return };
    let mut gone = Vec::new();
    for who in 1..=3 {
        let host = plan.process("mortal", who);
        let entity = Entity::WORLD.child("mortal", who);
        world.sim.name_entity(entity, || format!("client {who}"));
        let steps = world.sim.decide(entity, &CLIENT_DIES, 0, |d| 1 + d.below(400));
        host.process.node().kill_after_steps(steps);
        let ops = plan.operations(who, setup.size_sectors, 30);
        let (p, h, s, c) = (plan.clone(), host.clone(), setup.clone(), client_config(&world));
        host.process.node().spawn("main", 0, async move {
            let (disk, _clients) = p.spread(&h, &c, 1, CacheMode::WriteBack).await;
            p.guest(disk, &s, Invariant::G1).run(&ops, p.limits.guest_depth).await;
        });
        gone.push(host);
    }
    let host = plan.process("client", 0);
    let ops = plan.operations(0, setup.size_sectors, 40);
    let (disk, clients) = plan.spread(&host, &client_config(&world), 1, CacheMode::WriteBack).await;
    let guest = plan.guest(disk, &setup, Invariant::G1);
    let (g, depth) = (guest.clone(), plan.limits.guest_depth);
    within(&host, async move { g.run(&ops, depth).await }).await;
    reap_dead_clients(&world, &gone, &served, 1).await;
    if let Err(error) = guest.read_all().await {
        world.fail(Invariant::E4, format!("reading the whole disk failed with {error:?}"));
    }
    end(&plan, served, &clients, &setup).await;
}

async fn slow_client(world: World) {
    let (plan, setup) = Plan::draw(&world);
    let Some(served) = plan.serve(&plan.process("tapdisk", 0)).await else { return };
    let slow = plan.process("slow", 0);
    let awake = Rc::new(Event::new());
    let writes = world.setting("slow-client-writes", &[false, true]);
    let looks = !writes && world.setting("slow-client-looks", &[false, true]);
    // Initial content, far from what the guest changes.
    let mut there = vec![0; 4096];
    if setup.spec.format == RAW
        && let Some(image) = world.storage.content(&setup.spec.path)
    {
        image.pages.read(DISK_BYTES - 4096, &mut there);
    }
    let (h, w, a) = (slow.clone(), world.clone(), Rc::clone(&awake));
    slow.process.node().spawn("main", 0, async move {
        let Ok(stream) = h.connect(&address()).await else { return };
        let raw = RawNbd::new(stream);
        let mut script = NbdScript::negotiation(DISK, false);
        for n in 0..200 {
            let data = if writes { &there[..] } else { &[] };
            if looks {
                script.request(CMD_BLOCK_STATUS, 0, n, 0, DISK_BYTES as u32, &[]);
                continue;
            }
            let command = if writes { CMD_WRITE } else { CMD_READ };
            script.request(command, 0, n, DISK_BYTES - 4096, 4096, data);
        }
        let (reader, watched) = (raw.clone(), w.clone());
        h.process.node().spawn("reads", 0, async move {
            a.wait().await;
            // It is killed at the end, because its stream has no other end.
            let _ = reader.drain().await;
            watched.fail(Invariant::N1, "the server ended the connection of a client that is merely slow");
        });
        for message in &script.0 {
            if raw.send(message).await.is_err() {
                w.fail(Invariant::H2, "the server closed the connection of a client that is merely slow");
                return;
            }
        }
    });
    let host = plan.process("client", 0);
    let ops = plan.operations(0, setup.size_sectors - 8, 60);
    let (disk, clients) = plan.spread(&host, &client_config(&world), 1, CacheMode::WriteBack).await;
    let guest = plan.guest(disk, &setup, Invariant::G1);
    let (g, depth) = (guest.clone(), plan.limits.guest_depth);
    // This completes although the other client reads nothing.
    within(&host, async move { g.run(&ops, depth).await }).await;
    world.sim.stop_faults();
    // No other client wants its connection, so it keeps it without reading.
    let long_ns = 4 * plan.server.grace_ns;
    world.sim.sleep_ns(world.setting("slow-for-ns", &[0, long_ns, long_ns, long_ns])).await;
    awake.set();
    world.sim.sleep_ns(600_000_000_000).await;
    check_connected(&world, &clients);
    check_idle(&world, &served, 2);
    check_asks(&world, &served, &plan, [1, 2]);
    slow.process.node().kill();
    slow.process.node().dead().await;
    if let Err(error) = guest.read_all().await {
        world.fail(Invariant::E4, format!("reading the whole disk failed with {error:?}"));
    }
    end(&plan, served, &clients, &setup).await;
}

async fn server_restarts(world: World) {
    let (plan, setup) = Plan::draw(&world);
    let supervisor = Supervisor::new(&plan);
    let host = plan.process("client", 0);
    let config = ClientConfig { breaks: Breaks::Keep, ..client_config(&world) };
    let ops = plan.operations(0, setup.size_sectors, 60);
    world.sim.spawn("supervisor", 0, supervisor.clone().run(kills(&world, 4, 400)));
    let (p, h, s) = (plan.clone(), host.clone(), setup.clone());
    within(&host, async move {
        let (_, node) = client_stack(&p, &h, &config, CacheMode::WriteBack).await;
        let disk = DirectDisk::new(node, p.limits.pool_bytes);
        p.guest(disk, &s, Invariant::P1).run(&ops, p.limits.guest_depth).await;
    })
    .await;
    cut_power(&world, &setup, &[&host, &supervisor.retire().host]).await;
    last_check(&plan, &setup, Invariant::G7).await;
}

async fn flush_errors_and_deaths(world: World) {
    let (plan, setup) = Plan::draw(&world);
    let supervisor = Supervisor::new(&plan);
    let host = plan.process("client", 0);
    let config = ClientConfig { breaks: Breaks::Keep, ..client_config(&world) };
    let ops = plan.operations(0, setup.size_sectors, 60);
    let retries = world.setting("guest-retries", &[3, 0, 1]);
    world.sim.spawn("supervisor", 0, supervisor.clone().run(kills(&world, 4, 400)));
    let (p, h, s) = (plan.clone(), host.clone(), setup.clone());
    within(&host, async move {
        let (_, node) = client_stack(&p, &h, &config, CacheMode::WriteBack).await;
        let guest = p.guest(DirectDisk::new(node, p.limits.pool_bytes), &s, Invariant::P1);
        guest.set_error_policy(ErrorPolicy { retries, errors_allowed: true, reads: Invariant::P1 });
        guest.run(&ops, p.limits.guest_depth).await;
        // What a successful flush now promises must hold.
        let _ = guest.flush().await;
    })
    .await;
    let last = supervisor.retire();
    let process = last.host.clone();
    if world.setting("stopped-at-the-end", &[false, true]) {
        last.stop(&world, &setup).await;
    }
    cut_power(&world, &setup, &[&host, &process]).await;
    world.xen.power_cut();
    last_check(&plan, &setup, Invariant::E2).await;
}

async fn server_power_cut(world: World) {
    let (plan, setup) = Plan::draw(&world);
    let Some(served) = plan.serve(&plan.process("tapdisk", 0)).await else { return };
    let host = plan.process("client", 0);
    let (_, node) = client_stack(&plan, &host, &client_config(&world), CacheMode::WriteBack).await;
    let guest = plan.guest(DirectDisk::new(node, plan.limits.pool_bytes), &setup, Invariant::G1);
    let ops = plan.operations(0, setup.size_sectors, 30);
    let (g, depth) = (guest.clone(), plan.limits.guest_depth);
    let flushes = world.setting("flushed-before-cut", &[false, true]);
    let flushed = Rc::new(Cell::new(false));
    let all = Rc::clone(&flushed);
    within(&host, async move {
        g.run(&ops, depth).await;
        all.set(flushes && g.flush().await.is_ok());
    })
    .await;
    // The server's machine alone; the guest does not notice.
    served.host.process.node().kill();
    served.host.process.node().dead().await;
    world.power_cut();
    let Some(served) = plan.serve(&plan.process("tapdisk", 1)).await else { return };
    world.sim.sleep_ns(10_000_000).await;
    let (g, w) = (guest.clone(), world.clone());
    guest.set_error_policy(ErrorPolicy { errors_allowed: true, reads: Invariant::G7, ..NO_ERRORS });
    within(&host, async move {
        if let Err(error) = g.flush().await {
            if flushed.get() {
                w.fail(Invariant::E4, format!("a flush with nothing to do failed with {error:?}"));
            }
            // The guest now knows that unflushed data may be gone.
            g.history.borrow_mut().power_cut();
        }
        let _ = g.read_all().await;
    })
    .await;
    let unflushed = guest.flush_failed();
    let (g, w) = (guest.clone(), world.clone());
    within(&host, async move {
        if g.flush().await.is_ok() && unflushed {
            w.fail(Invariant::E2, "a flush succeeded after an earlier one had failed");
        }
    })
    .await;
    cut_power(&world, &setup, &[&host, &served.host]).await;
    last_check(&plan, &setup, Invariant::E2).await;
}

async fn stream(world: World) {
    let (plan, setup) = Plan::draw(&world);
    let Some(served) = plan.serve(&plan.process("tapdisk", 0)).await else { return };
    let bytes = world.options.stream.clone().unwrap_or_default();
    let negotiated = bytes.first().is_some_and(|first| first % 2 == 1);
    let mut script = if negotiated { NbdScript::negotiation(DISK, false).0 } else { Vec::new() };
    script.extend(bytes.get(1..).unwrap_or_default().chunks(1000).map(<[u8]>::to_vec));
    let host = plan.process("client", 0);
    let h = host.clone();
    within(&host, send_all(h, script)).await;
    reap_dead_clients(&world, &[host], &served, 0).await;
    end(&plan, served, &Vec::new(), &setup).await;
}

async fn hostile_client(world: World) {
    let (plan, setup) = Plan::draw(&world);
    let mut plan = plan.unaligned();
    let bad = Setup::raw(&world, 1, DISK_BYTES);
    // First, so that it is also the default export.
    plan.disks.insert(0, ("bad", bad.clone()));
    let Some(served) = plan.serve(&plan.process("tapdisk", 0)).await else { return };
    let mut hostile = Vec::new();
    for who in 1..=2 {
        let host = plan.process("hostile", who);
        let entity = Entity::WORLD.child("hostile-nbd", who);
        world.sim.name_entity(entity, || format!("hostile client {who}"));
        let mut script = NbdScript::session("bad", 30);
        script.spoil(&world.sim, entity);
        host.process.node().spawn("main", 0, send_all(host.clone(), script.0));
        hostile.push(host);
    }
    let host = plan.process("client", 0);
    let ops = plan.operations(0, setup.size_sectors, 40);
    let (disk, clients) = plan.spread(&host, &client_config(&world), 1, CacheMode::WriteBack).await;
    let guest = plan.guest(disk, &setup, Invariant::H2);
    let (g, depth) = (guest.clone(), plan.limits.guest_depth);
    within(&host, async move { g.run(&ops, depth).await }).await;
    reap_dead_clients(&world, &hostile, &served, 1).await;
    if let Err(error) = guest.read_all().await {
        world.fail(Invariant::H2, format!("reading the whole disk failed with {error:?}"));
    }
    end(&plan, served, &clients, &setup).await;
    bad.check_bytes(&world, "in the end");
}
