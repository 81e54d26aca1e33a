//! Disks over NBD: our client against our server, and clients that are slow, dying or hostile.
//!
//! ```text
//!   client process                                  server process (may be killed and started again)
//!   Guest ─ [Vbd ─ Scheduler ─] Client ═ stream ═ Server ─ Vbd ─ Scheduler ─ image ─ Storage
//! ```

use super::crash::{arm_power_cut, either};
use super::ring::kills;
use super::setup::{Setup, workload};
use crate::check::Invariant;
use crate::guest::{DirectDisk, Guest, GuestDisk, Manners, NbdScript, RawNbd, Spread};
use crate::host::SimHost;
use crate::run::Scenario;
use crate::stack::{Stack, StackLimits};
use crate::workload::{Op, Workload, operations};
use crate::world::World;
use kernel_model::StorageConfig;
use sim::{Entity, Label};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_abi::nbd::{CMD_READ, CMD_WRITE};
use tap_core::wait::{Event, oneshot};
use tap_core::{Node, Scheduler, Vbd};
use tap_host::{SocketAddress, Sockets, VbdId};
use tap_images::ImageError;
use tap_nbd::{Breaks, Client, ClientConfig, Export, Server, ServerLimits};

/// After how many of its effects a client is killed.
pub static CLIENT_DIES: Label = Label::new("client-dies", "the client is killed after {} of its effects");

/// Several connections over streams that are cut anywhere.
pub static NBD_SPLIT_READS: Scenario = Scenario {
    name: "nbd-split-reads",
    about: "several NBD connections to one export over streams that are cut and late; a flush on one covers all; power cut",
    storage: |_| StorageConfig::default(),
    body: |w| Box::pin(split_reads(w)),
};

/// Clients that die.
pub static NBD_CLIENT_DIES: Scenario = Scenario {
    name: "nbd-client-dies",
    about: "NBD clients die in the middle of requests; another goes on, and nothing of the dead is left",
    storage: |_| StorageConfig::default(),
    body: |w| Box::pin(client_dies(w)),
};

/// A client that takes no replies.
pub static NBD_SLOW_CLIENT: Scenario = Scenario {
    name: "nbd-slow-client",
    about: "an NBD client asks for much and takes no replies; others are not held up, and memory is bounded",
    storage: |_| StorageConfig::default(),
    body: |w| Box::pin(slow_client(w)),
};

/// A server that dies under its client.
pub static NBD_SERVER_RESTARTS: Scenario = Scenario {
    name: "nbd-server-restarts",
    about: "tapdisk is killed between any two of its effects under an NBD client and started again; the guest sees a pause",
    storage: |_| StorageConfig::default(),
    body: |w| Box::pin(server_restarts(w)),
};

/// A server whose machine goes down under its client.
pub static NBD_SERVER_POWER_CUT: Scenario = Scenario {
    name: "nbd-server-power-cut",
    about: "the server's machine loses its power while the NBD client lives; no flush then says that nothing is lost",
    storage: |_| StorageConfig::default(),
    body: |w| Box::pin(server_power_cut(w)),
};

/// A client that sends garbage.
pub static NBD_HOSTILE_CLIENT: Scenario = Scenario {
    name: "nbd-hostile-client",
    about: "an NBD client whose messages are changed, cut and mixed with garbage; its neighbour notices nothing",
    storage: |_| StorageConfig::default(),
    body: |w| Box::pin(hostile_client(w)),
};

const DISK_BYTES: u64 = 1 << 20;
/// Nothing below fails, so nothing above may.
const NO_ERRORS: Manners = Manners { retries: 0, errors_allowed: false, reads: Invariant::G1 };
/// The export of guests.
const DISK: &str = "disk";

fn address() -> SocketAddress {
    SocketAddress::Unix("/run/tapdisk.nbd".into())
}

fn server_limits(world: &World) -> ServerLimits {
    ServerLimits {
        requests: world.setting("nbd-requests", &[128, 8, 1]),
        request_bytes: world.setting("nbd-request", &[32 << 20, 64 << 10, 4096]),
        connection_bytes: world.setting("nbd-memory", &[32 << 20, 64 << 10, 4096]),
        receive_bytes: world.setting("nbd-receive", &[256 << 10, 16 << 10]),
        ..ServerLimits::default()
    }
}

fn client_config(world: &World) -> ClientConfig {
    ClientConfig {
        export: DISK.into(),
        requests: world.setting("nbd-client-requests", &[64, 4, 1]),
        receive_bytes: world.setting("nbd-client-receive", &[256 << 10, 16 << 10]),
        pause_ns: 100_000,
        pause_most_ns: 2_000_000,
        ..ClientConfig::new(address())
    }
}

/// What a server of this world serves, and how.
#[derive(Clone)]
struct Plan {
    world: World,
    /// Names and disks.
    disks: Vec<(&'static str, Setup)>,
    limits: StackLimits,
    server: ServerLimits,
}

/// A server that runs.
struct Served {
    host: SimHost,
    server: Server<SimHost>,
    stacks: Vec<Stack>,
}

impl Plan {
    /// Draws the limits for one disk called [`DISK`].
    fn draw(world: &World) -> (Self, Setup) {
        let qcow = world.setting("image", &["raw", "qcow"]) == "qcow";
        let setup =
            if qcow { Setup::qcow(world, 0, DISK_BYTES, false) } else { Setup::raw(world, 0, DISK_BYTES) };
        // Requests on several connections, or repeated ones, may go either way.
        setup.history.borrow_mut().relax_order();
        let plan = Self {
            world: world.clone(),
            disks: vec![(DISK, setup.clone())],
            limits: StackLimits::draw(world),
            server: server_limits(world),
        };
        (plan, setup)
    }

    /// Starts a server in `host`, which opens the images and listens. `None` if that fails.
    async fn serve(&self, host: &SimHost) -> Option<Served> {
        let mut exports = Vec::new();
        let mut stacks = Vec::new();
        for (name, setup) in &self.disks {
            let stack = loop {
                match Stack::open(host, &self.world, &setup.spec, &self.limits).await {
                    Ok(stack) => break stack,
                    // The lock of a dead predecessor goes when its last operation has landed.
                    Err(ImageError::InUse { .. }) => self.world.sim.sleep_ns(200_000).await,
                    Err(error) => return self.failed(host, &format!("open its image: {error}")),
                }
            };
            let (name, node) = (String::from(*name), stack.node());
            exports.push(Export { name, description: String::new(), node, read_only: false });
            stacks.push(stack);
        }
        let server = match Server::new(host.clone(), exports, self.server) {
            Ok(server) => server,
            Err(error) => return self.failed(host, &error.to_string()),
        };
        let listener = match host.listen(&address()).await {
            Ok(listener) => listener,
            Err(error) => return self.failed(host, &format!("listen: {error}")),
        };
        let own = server.clone();
        host.process.node().spawn("serve", 0, async move { own.serve(listener).await });
        Some(Served { host: host.clone(), server, stacks })
    }

    fn failed(&self, host: &SimHost, what: &str) -> Option<Served> {
        // A dying process may see anything.
        if host.process.node().is_alive() {
            self.world.fail(Invariant::G11, format!("tapdisk failed to {what}"));
        }
        None
    }

    fn process(&self, name: &str, key: u64) -> SimHost {
        SimHost::start(&self.world.kernel, &self.world.xen, name, key)
    }

    /// The operations of a client on a disk of `size_sectors`.
    fn operations(&self, who: u64, size_sectors: u64, count: u32) -> Vec<Option<Op>> {
        let entity = Entity::WORLD.child("nbd-ops", who);
        self.world.sim.name_entity(entity, || format!("client {who}"));
        let w = Workload { zeroes: true, ..workload(&self.world, size_sectors, count, 128) };
        operations(&self.world.sim, entity, who, &w)
    }

    /// Connects as often as it takes.
    async fn connect(&self, host: &SimHost, config: &ClientConfig) -> Rc<Client<SimHost>> {
        loop {
            match Client::connect(host.clone(), config.clone()).await {
                Ok(client) => return Rc::new(client),
                Err(error) => {
                    self.world.sim.remark("client", || format!("failed to {error}"));
                    self.world.sim.sleep_ns(1_000_000).await;
                }
            }
        }
    }

    /// A disk over `connections` connections.
    async fn spread(&self, host: &SimHost, config: &ClientConfig, connections: usize) -> (Spread, Clients) {
        let (mut disks, mut clients) = (Vec::new(), Vec::new());
        for _ in 0..connections {
            let client = self.connect(host, config).await;
            disks.push(DirectDisk::new(Rc::clone(&client) as Rc<dyn Node>, self.limits.pool_bytes));
            clients.push(client);
        }
        (Spread::new(disks), clients)
    }

    fn guest<D: GuestDisk>(&self, disk: D, setup: &Setup, reads: Invariant) -> Guest<D> {
        Guest::new(&self.world, disk, Rc::clone(&setup.history), Manners { reads, ..NO_ERRORS })
    }
}

type Clients = Vec<Rc<Client<SimHost>>>;

/// Runs `work` as a task of `host`, until it ends or the process dies.
async fn within(host: &SimHost, work: impl Future<Output = ()> + 'static) {
    let (done, finished) = oneshot();
    host.process.node().spawn("main", 0, async move {
        work.await;
        let _ = done.send(());
    });
    either(host.process.node().dead(), finished).await;
}

/// Cuts the power of everything that is in `hosts`.
async fn cut_power(world: &World, setup: &Setup, hosts: &[&SimHost]) {
    world.storage.set_hook(None);
    for host in hosts {
        host.process.node().kill();
        host.process.node().dead().await;
    }
    world.storage.power_cut();
    setup.history.borrow_mut().power_cut();
    world.count(|s| s.crashes += 1);
    setup.check(world, "after the power cut").await;
}

/// Without faults: everything is read once more through a new server, which is then stopped in order.
async fn last_look(plan: &Plan, setup: &Setup, reads: Invariant) {
    let world = &plan.world;
    world.sim.stop_faults();
    let Some(served) = plan.serve(&plan.process("tapdisk", 1000)).await else { return };
    let host = plan.process("client", 1000);
    let (disk, clients) = plan.spread(&host, &client_config(world), 1).await;
    let guest = plan.guest(disk, setup, reads);
    if let Err(error) = guest.read_all().await {
        world.fail(Invariant::G11, format!("reading the whole disk failed with {error:?}"));
    }
    end(plan, served, &clients, setup).await;
    if guest.disk().buffers_out() > 0 {
        world.fail(Invariant::K1, "buffers of the client were not given back");
    }
}

/// Clients leave, the server is stopped, its disks are closed; nothing may be left.
async fn end(plan: &Plan, served: Served, clients: &Clients, setup: &Setup) {
    let world = &plan.world;
    for client in clients {
        if let Err(error) = client.close().await {
            world.fail(Invariant::E4, format!("closing a client failed with {error:?}"));
        }
    }
    served.server.stop().await;
    check_idle(world, &served, 0);
    for stack in &served.stacks {
        if let Err(error) = stack.vbd.close().await {
            world.fail(Invariant::G11, format!("closing the disk failed with {error:?}"));
        }
    }
    setup.check(world, "in the end").await;
}

/// Nothing is in flight any more, and only `connections` are open.
fn check_idle(world: &World, served: &Served, connections: usize) {
    let (open, used) = (served.server.connections(), served.server.used_bytes());
    let in_flight: usize = served.stacks.iter().map(|stack| stack.vbd.in_flight()).sum();
    if (open, used, in_flight) != (connections, 0, 0) {
        let text = format!("{open} connections, {used} bytes and {in_flight} requests are left");
        world.fail(Invariant::K1, format!("{text}; {connections} connections and nothing else should be"));
    }
}

async fn split_reads(world: World) {
    let (plan, setup) = Plan::draw(&world);
    let connections = world.setting("nbd-connections", &[2, 3, 1]);
    let write_through = world.setting("write-through", &[false, true]);
    let config = ClientConfig { write_through, ..client_config(&world) };
    let Some(served) = plan.serve(&plan.process("tapdisk", 0)).await else { return };
    let host = plan.process("client", 0);
    let ops = plan.operations(0, setup.size_sectors, 60);
    let nodes = [served.host.process.node().clone(), host.process.node().clone()];
    arm_power_cut(&world, &setup, 0, 240, move || nodes.iter().for_each(sim::Node::kill));
    let (p, h, s) = (plan.clone(), host.clone(), setup.clone());
    within(&host, async move {
        let (disk, _clients) = p.spread(&h, &config, connections).await;
        let guest = p.guest(disk, &s, Invariant::G1);
        if write_through {
            guest.write_through();
        }
        guest.run(&ops, p.limits.guest_depth).await;
    })
    .await;
    cut_power(&world, &setup, &[&served.host, &host]).await;
    last_look(&plan, &setup, Invariant::G7).await;
}

async fn client_dies(world: World) {
    let (plan, setup) = Plan::draw(&world);
    let config = client_config(&world);
    let Some(served) = plan.serve(&plan.process("tapdisk", 0)).await else { return };
    let mut gone = Vec::new();
    for who in 1..=3 {
        let host = plan.process("mortal", who);
        let entity = Entity::WORLD.child("mortal", who);
        world.sim.name_entity(entity, || format!("client {who}"));
        let steps = world.sim.decide(entity, &CLIENT_DIES, 0, |d| 1 + d.below(400));
        host.process.node().kill_after_steps(steps);
        let ops = plan.operations(who, setup.size_sectors, 30);
        let (p, h, s, c) = (plan.clone(), host.clone(), setup.clone(), config.clone());
        host.process.node().spawn("main", 0, async move {
            let (disk, _clients) = p.spread(&h, &c, 1).await;
            p.guest(disk, &s, Invariant::G1).run(&ops, p.limits.guest_depth).await;
        });
        gone.push(host);
    }
    let host = plan.process("client", 0);
    let ops = plan.operations(0, setup.size_sectors, 40);
    let (disk, clients) = plan.spread(&host, &config, 1).await;
    let guest = plan.guest(disk, &setup, Invariant::G1);
    let (g, depth) = (guest.clone(), plan.limits.guest_depth);
    within(&host, async move { g.run(&ops, depth).await }).await;
    world.sim.stop_faults();
    for host in &gone {
        host.process.node().kill();
        host.process.node().dead().await;
    }
    // What they had asked for ends: at most some operations that are stuck for ten seconds each, one after the other.
    world.sim.sleep_ns(600_000_000_000).await;
    check_idle(&world, &served, 1);
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
    let (h, w, a) = (slow.clone(), world.clone(), Rc::clone(&awake));
    slow.process.node().spawn("main", 0, async move {
        let Ok(stream) = h.connect(&address()).await else { return };
        let raw = RawNbd::new(stream);
        let mut script = NbdScript::negotiation(DISK, false);
        for n in 0..200 {
            let data = if writes { vec![0; 4096] } else { Vec::new() };
            // Zeros, far from what the guest does to the disk.
            let command = if writes { CMD_WRITE } else { CMD_READ };
            script.request(command, 0, n, DISK_BYTES - 4096, 4096, &data);
        }
        let reader = raw.clone();
        h.process.node().spawn("reads", 0, async move {
            a.wait().await;
            let _ = reader.drain().await;
        });
        for message in &script.0 {
            if raw.send(message).await.is_err() {
                w.fail(Invariant::H2, "the server closed the connection of a client that is only slow");
                return;
            }
        }
    });
    let host = plan.process("client", 0);
    let ops = plan.operations(0, setup.size_sectors - 8, 60);
    let (disk, clients) = plan.spread(&host, &client_config(&world), 1).await;
    let guest = plan.guest(disk, &setup, Invariant::G1);
    let (g, depth) = (guest.clone(), plan.limits.guest_depth);
    // This ends although the other client takes nothing.
    within(&host, async move { g.run(&ops, depth).await }).await;
    let (used, most) = (served.server.used_bytes(), served.server.limits().memory_bytes());
    if used > most {
        world.fail(Invariant::K1, format!("the server holds {used} bytes, at most {most} should be"));
    }
    world.sim.stop_faults();
    awake.set();
    world.sim.sleep_ns(600_000_000_000).await;
    check_idle(&world, &served, 2);
    slow.process.node().kill();
    slow.process.node().dead().await;
    if let Err(error) = guest.read_all().await {
        world.fail(Invariant::E4, format!("reading the whole disk failed with {error:?}"));
    }
    end(&plan, served, &clients, &setup).await;
}

/// The server's process, which is started again when it dies.
#[derive(Clone)]
struct Supervisor {
    plan: Plan,
    current: Rc<RefCell<SimHost>>,
    /// Nobody is started any more.
    done: Rc<Cell<bool>>,
}

impl Supervisor {
    /// With a server that starts.
    fn new(plan: &Plan) -> Self {
        let current = Rc::new(RefCell::new(plan.process("unused", 0)));
        let supervisor = Self { plan: plan.clone(), current, done: Rc::default() };
        supervisor.start(0);
        supervisor
    }

    /// Kills the server as often as `after` has numbers, each time after so many of its effects.
    async fn run(self, after: Vec<u64>) {
        for (i, steps) in after.into_iter().enumerate() {
            let host = self.current.borrow().clone();
            host.process.node().kill_after_steps(steps);
            host.process.node().dead().await;
            if self.done.get() {
                return;
            }
            self.plan.world.count(|s| s.crashes += 1);
            self.plan.world.sim.sleep_ns(10_000).await;
            self.start(i as u64 + 1);
        }
    }

    /// Starts a server as a task of its own process, which can die while it starts.
    fn start(&self, key: u64) {
        if self.done.get() {
            return;
        }
        let host = self.plan.process("tapdisk", key);
        *self.current.borrow_mut() = host.clone();
        let plan = self.plan.clone();
        host.clone().process.node().spawn("main", 0, async move {
            let served = plan.serve(&host).await;
            // Its disks live as long as the process.
            std::future::pending::<()>().await;
            drop(served);
        });
    }

    /// The server that is left; it has no successor.
    fn retire(&self) -> SimHost {
        self.done.set(true);
        self.current.borrow().clone()
    }
}

/// A client with what a tapdisk has above it: overlapping requests are kept apart.
async fn client_stack(plan: &Plan, host: &SimHost, config: &ClientConfig) -> Rc<dyn Node> {
    let client = plan.connect(host, config).await;
    let scheduler = Scheduler::new(host.clone(), client as Rc<dyn Node>, plan.limits.scheduler);
    Rc::new(Vbd::new(host.clone(), VbdId(0), Rc::new(scheduler) as Rc<dyn Node>))
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
        let node = client_stack(&p, &h, &config).await;
        let disk = DirectDisk::new(node, p.limits.pool_bytes);
        p.guest(disk, &s, Invariant::P1).run(&ops, p.limits.guest_depth).await;
    })
    .await;
    cut_power(&world, &setup, &[&host, &supervisor.retire()]).await;
    last_look(&plan, &setup, Invariant::G7).await;
}

async fn server_power_cut(world: World) {
    let (plan, setup) = Plan::draw(&world);
    let Some(served) = plan.serve(&plan.process("tapdisk", 0)).await else { return };
    let host = plan.process("client", 0);
    let node = client_stack(&plan, &host, &client_config(&world)).await;
    let guest = plan.guest(DirectDisk::new(node, plan.limits.pool_bytes), &setup, Invariant::G1);
    let ops = plan.operations(0, setup.size_sectors, 30);
    let (g, depth) = (guest.clone(), plan.limits.guest_depth);
    within(&host, async move { g.run(&ops, depth).await }).await;
    // The server's machine alone: the guest does not know of it.
    served.host.process.node().kill();
    served.host.process.node().dead().await;
    world.storage.power_cut();
    world.count(|s| s.crashes += 1);
    let Some(served) = plan.serve(&plan.process("tapdisk", 1)).await else { return };
    world.sim.sleep_ns(10_000_000).await;
    let g = guest.clone();
    guest.set_manners(Manners { errors_allowed: true, reads: Invariant::G7, ..NO_ERRORS });
    within(&host, async move {
        if g.flush().await.is_err() {
            // The guest knows now that what it had not flushed may be gone.
            g.history.borrow_mut().power_cut();
        }
        let _ = g.read_all().await;
    })
    .await;
    let unflushed = guest.flush_failed();
    let (g, w) = (guest.clone(), world.clone());
    within(&host, async move {
        if g.flush().await.is_ok() && unflushed {
            w.fail(Invariant::E2, "a flush succeeds after an earlier one had failed");
        }
    })
    .await;
    cut_power(&world, &setup, &[&host, &served.host]).await;
    last_look(&plan, &setup, Invariant::E2).await;
}

async fn hostile_client(world: World) {
    let (mut plan, setup) = Plan::draw(&world);
    let bad = Setup::raw(&world, 1, DISK_BYTES);
    // First, so that it is also the one without a name.
    plan.disks.insert(0, ("bad", bad.clone()));
    let Some(served) = plan.serve(&plan.process("tapdisk", 0)).await else { return };
    let mut hostile = Vec::new();
    for who in 1..=2 {
        let host = plan.process("hostile", who);
        let entity = Entity::WORLD.child("hostile-nbd", who);
        world.sim.name_entity(entity, || format!("hostile client {who}"));
        let mut script = NbdScript::session("bad", 30);
        script.spoil(&world.sim, entity);
        let h = host.clone();
        host.process.node().spawn("main", 0, async move {
            let Ok(stream) = h.connect(&address()).await else { return };
            let raw = RawNbd::new(stream);
            let reader = raw.clone();
            h.process.node().spawn("reads", 0, async move {
                let _ = reader.drain().await;
            });
            for message in &script.0 {
                if raw.send(message).await.is_err() {
                    return;
                }
            }
        });
        hostile.push(host);
    }
    let host = plan.process("client", 0);
    let ops = plan.operations(0, setup.size_sectors, 40);
    let (disk, clients) = plan.spread(&host, &client_config(&world), 1).await;
    let guest = plan.guest(disk, &setup, Invariant::H2);
    let (g, depth) = (guest.clone(), plan.limits.guest_depth);
    within(&host, async move { g.run(&ops, depth).await }).await;
    world.sim.stop_faults();
    for host in &hostile {
        host.process.node().kill();
        host.process.node().dead().await;
    }
    world.sim.sleep_ns(600_000_000_000).await;
    check_idle(&world, &served, 1);
    if let Err(error) = guest.read_all().await {
        world.fail(Invariant::H2, format!("reading the whole disk failed with {error:?}"));
    }
    end(&plan, served, &clients, &setup).await;
    bad.check_bytes(&world, "in the end");
}
