//! Our client on a server that follows the protocol, in all the ways that the protocol permits.

use super::plan::{Clients, DISK_BYTES, NO_ERRORS, Plan, address, client_config, client_stack, within};
use crate::catalog::setup::check_at_rest;
use crate::check::{BlockHistory, Initial, Invariant};
use crate::guest::{DirectDisk, ErrorPolicy, Guest, LyingServer, Offer, ServerMode};
use crate::scenario::Scenario;
use crate::workload::Op;
use crate::world::World;
use kernel_model::{SimHost, StorageConfig};
use std::cell::RefCell;
use std::rc::Rc;
use tap_abi::nbd::{CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES};
use tap_core::{CacheMode, Node};
use tap_host::{IoKind, Listener, SECTOR_BYTES, SectorRange, Sockets};
use tap_nbd::{Breaks, Client, ClientConfig};

/// Servers of all kinds.
pub static NBD_MODEST_SERVER: Scenario = Scenario {
    name: "nbd-modest-server",
    about: "our NBD client on servers that follow the protocol but can do less, fail requests, hang up or come back with less; power cut",
    storage: &|_| StorageConfig::default(),
    body: &|w| Box::pin(modest_server(w)),
};

/// How long a closed client is watched for attempts to connect, in nanoseconds.
const QUIET_NS: u64 = 20_000_000_000;

/// Maximum number of attempts to connect in that time: pauses double from 100 µs to 1 s.
const ATTEMPTS_MAX: u64 = 14 + 20;

/// The only command that a server refuses; 0 for any.
const REFUSED: [u16; 6] = [0, CMD_TRIM, CMD_WRITE_ZEROES, CMD_FLUSH, CMD_WRITE, CMD_READ];

/// Starts `server` in a separate process. `None` if that fails.
async fn listen(plan: &Plan, server: &Rc<LyingServer>, key: u64) -> Option<SimHost> {
    let far = plan.process("server", key);
    let listener = far.listen(&address()).await.ok()?;
    let (own, process) = (Rc::clone(server), far.process.clone());
    far.process.node().spawn("serve", 0, async move {
        while let Ok(stream) = listener.accept().await {
            process.node().spawn("connection", 0, Rc::clone(&own).serve(stream));
        }
    });
    Some(far)
}

async fn modest_server(world: World) {
    let plan = Plan::alone(&world);
    let offer = Offer::draw(&world, DISK_BYTES);
    let hangs_up = world.setting("nbd-hangs-up", &[false, true]);
    let lessens = hangs_up && world.setting("nbd-lessens", &[false, true]);
    let refuses = world.setting("nbd-refuses", &[false, true]);
    let only = if refuses { world.setting("nbd-refuses-only", &REFUSED) } else { 0 };
    let stays_open = world.setting("nbd-stays-open", &[false, true]);
    let mode = ServerMode::Honest { hangs_up, lessens, refuses, only, stays_open };
    let server = LyingServer::new(&world, offer, mode);
    let Some(far) = listen(&plan, &server, 0).await else { return };
    let size_sectors = DISK_BYTES / SECTOR_BYTES;
    let mut history =
        BlockHistory::new(size_sectors, 1, Initial::Zero, world.setting("bodies", &[false, true]));
    history.relax_order();
    let history = Rc::new(RefCell::new(history));
    let write_through = world.setting("write-through", &[false, true]);
    let read_only = world.setting("opened-read-only", &[false, false, false, true]);
    let config = ClientConfig { breaks: Breaks::Keep, read_only, ..client_config(&world) };
    let cache = if write_through { CacheMode::WriteThrough } else { CacheMode::WriteBack };
    let errors_allowed = lessens || refuses || read_only || offer.is_read_only();
    let ops = plan.operations(0, size_sectors, 60);
    let host = plan.process("client", 0);
    let left = Rc::new(RefCell::new(None));
    let (p, h, past, all, keep) =
        (plan.clone(), host.clone(), Rc::clone(&history), ops.clone(), Rc::clone(&left));
    within(&host, async move {
        let (client, node) = client_stack(&p, &h, &config, cache).await;
        let disk = DirectDisk::new(Rc::clone(&node), p.limits.pool_bytes);
        let guest = Guest::new(&p.world, disk, past, ErrorPolicy { errors_allowed, ..NO_ERRORS });
        if write_through {
            guest.write_through();
        }
        h.process.node().spawn("looks", 0, looks(guest.clone(), Rc::clone(&node), size_sectors));
        guest.run(&all, p.limits.guest_depth).await;
        *keep.borrow_mut() = Some((client, node));
    })
    .await;
    let Some((client, node)) = left.take() else { return };
    if !hangs_up && client.connections() != 1 {
        world.fail(Invariant::N1, "a client had to reconnect to a server that follows the protocol");
    }
    check_counts(&world, &server, &offer, &ops, errors_allowed || hangs_up);
    check_zeroes(&world, &server, &ops);
    check_refused(&world, &server, hangs_up || plan.limits.scheduler.merge_sectors > 0);
    if world.setting("leaves", &[false, true]) {
        leave(&plan, &server, &far, &offer, &client, &node, &history).await;
        check_at_rest(&world, host.process.node()).await;
    }
    host.process.node().kill();
    far.process.node().kill();
    far.process.node().dead().await;
    server.refuse_connections(false);
    server.become_honest();
    server.power_cut();
    history.borrow_mut().power_cut();
    world.count(|s| s.crashes += 1);
    world.sim.stop_faults();
    let Some(_far) = listen(&plan, &server, 2).await else { return };
    let host = plan.process("client", 1);
    let config = ClientConfig { breaks: Breaks::Keep, ..client_config(&world) };
    let (disk, clients): (_, Clients) = plan.spread(&host, &config, 1, CacheMode::WriteBack).await;
    let guest = Guest::new(&world, disk, history, ErrorPolicy { reads: Invariant::G7, ..NO_ERRORS });
    if let Err(error) = guest.read_all().await {
        world.fail(Invariant::E4, format!("reading the whole disk failed with {error:?}"));
    }
    if clients.iter().any(|client| client.in_flight() > 0) || guest.disk().buffers_out() > 0 {
        world.fail(Invariant::K1, "requests or buffers of the client are left");
    }
}

/// Queries extents concurrently with everything else.
async fn looks(guest: Guest<DirectDisk>, node: Rc<dyn Node>, size_sectors: u64) {
    for at in 0..12 {
        let from = at * 160 + at;
        let range = SectorRange::new(from, (size_sectors - from).min(400) as u32);
        // Errors here are also seen by the guest.
        let _ = guest.extents(&*node, range, [4096, 1, 3][at as usize % 3]).await;
        guest.pause(200_000).await;
    }
}

/// Checks that the guest's requests reached the server, and no others did.
fn check_counts(world: &World, server: &LyingServer, offer: &Offer, ops: &[Option<Op>], uncertain: bool) {
    if uncertain {
        return;
    }
    let of = |kind| ops.iter().flatten().filter(|op| op.kind == kind).count() as u64;
    let (asked, counts) = (of(IoKind::Flush), server.counts());
    // A server with more features is not asked for more.
    let through = world.setting("write-through", &[false, true]) && !offer.has_fua();
    if counts.flushes > asked && !through || counts.flushes == 0 && asked > 0 && offer.caches() {
        let text = format!("{} flushes reached the server, but {asked} were submitted", counts.flushes);
        world.fail(Invariant::N3, text);
    }
    // Adjacent ones are merged.
    let trims = if offer.has_trim() { of(IoKind::Discard) } else { 0 };
    if counts.trims > trims || counts.trims == 0 && trims > 0 {
        world.fail(Invariant::N3, format!("{} trims of {trims} reached the server", counts.trims));
    }
}

/// Checks that what the server refused failed for the guest, too. `uncertain`: the parts of a failed merged request are
/// retried one by one, and each may succeed; so may a request that is sent again.
fn check_refused(world: &World, server: &LyingServer, uncertain: bool) {
    let refused = server.counts().refused;
    if !uncertain && refused > 0 && world.stats().errors == 0 {
        world.fail(Invariant::N3, format!("{refused} requests were refused, but none failed"));
    }
}

/// Checks that zeros keep their space exactly where the guest wants that.
fn check_zeroes(world: &World, server: &LyingServer, ops: &[Option<Op>]) {
    let wanted = |range: SectorRange, keep: bool| {
        let alike = |op: &&Op| op.kind == IoKind::WriteZeroes && op.zeroes.unmap != keep;
        ops.iter().flatten().filter(alike).any(|op| op.range.overlaps(range))
    };
    if let Some((range, keep)) = server.zeroes().into_iter().find(|(range, keep)| !wanted(*range, *keep)) {
        world.fail(
            Invariant::N3,
            format!("zeros to {range} reached the server with their space kept: {keep}"),
        );
    }
}

/// The client is closed in order, perhaps while its server is away, and must not reconnect.
async fn leave(
    plan: &Plan,
    server: &Rc<LyingServer>,
    far: &SimHost,
    offer: &Offer,
    client: &Client<SimHost>,
    node: &Rc<dyn Node>,
    history: &Rc<RefCell<BlockHistory>>,
) {
    let world = &plan.world;
    let away = world.setting("server-away", &["not", "dead", "shut"]);
    let mut again = None;
    if away != "not" {
        far.process.node().kill();
        far.process.node().dead().await;
    }
    if away == "shut" {
        server.refuse_connections(true);
        again = listen(plan, server, 1).await;
        let before = far.process.connections_established();
        world.sim.sleep_ns(QUIET_NS).await;
        let attempts = far.process.connections_established() - before;
        if attempts > ATTEMPTS_MAX {
            let text = format!("{attempts} attempts to connect in 20 s to a server that refuses them");
            world.fail(Invariant::N3, text);
        }
    }
    let inv = history.borrow_mut().begin_flush();
    if node.close().await.is_ok() {
        history.borrow_mut().end_flush(inv);
    }
    if client.in_flight() > 0 {
        world.fail(Invariant::K1, "requests of a closed client are left");
    }
    let range = SectorRange::new(0, 8);
    if offer.context && offer.go && client.extents(range, 8).await.is_ok() {
        world.fail(Invariant::D1, "a closed client answered an extents query");
    }
    // The server may accept a connection only now that the client made before it was closed.
    let before = far.process.connections_established();
    if away == "dead" {
        again = listen(plan, server, 1).await;
    }
    world.sim.sleep_ns(QUIET_NS).await;
    if far.process.connections_established() != before {
        world.fail(Invariant::N3, "a closed client reconnected");
    }
    if let Some(again) = again {
        again.process.node().kill();
        again.process.node().dead().await;
    }
}
