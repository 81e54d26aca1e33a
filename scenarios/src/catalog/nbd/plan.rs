//! What the scenarios of NBD are made of: servers and clients in processes, their beginning and their end.

use crate::catalog::crash::either;
use crate::catalog::setup::{Setup, cut_after_close, workload};
use crate::check::{Asks, Invariant};
use crate::guest::{DirectDisk, Guest, GuestDisk, Manners, RawNbd, Spread};
use crate::program::{named, tapdisk};
use crate::stack::{Stack, StackLimits};
use crate::workload::{Op, Workload, operations};
use crate::world::World;
use kernel_model::SimHost;
use sim::Entity;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_core::wait::{Receiver, oneshot};
use tap_core::{CacheMode, Disk, DiskConfig, Node};
use tap_host::{Budget, Mark, Share, SocketAddress, Sockets, VbdId};
use tap_images::ImageError;
use tap_nbd::{Client, ClientConfig, Export, Server, ServerLimits};

pub(super) const DISK_BYTES: u64 = 1 << 20;
/// Nothing below fails, so nothing above may.
pub(super) const NO_ERRORS: Manners = Manners { retries: 0, errors_allowed: false, reads: Invariant::G1 };
/// The export of guests.
pub(super) const DISK: &str = "disk";

pub(super) fn address() -> SocketAddress {
    SocketAddress::Unix("/run/tapdisk.nbd".into())
}

/// Whether the server is the program that ships, with the limits that it has.
pub(super) fn shipped(world: &World) -> bool {
    world.setting("shipped-program", &[false, true])
}

/// The least memory of a server's connections: some of every size.
const SERVER_BYTES: usize = 8 << 20;

pub(super) fn server_limits(world: &World) -> ServerLimits {
    ServerLimits {
        requests: world.setting("nbd-requests", &[128, 8, 1]),
        request_bytes: world.setting("nbd-request", &[32 << 20, 64 << 10, 4096]),
        connection_bytes: world.setting("nbd-memory", &[32 << 20, 64 << 10, 4096]),
        receive_bytes: world.setting("nbd-receive", &[256 << 10, 16 << 10]),
        ..ServerLimits::default()
    }
}

pub(super) fn client_config(world: &World) -> ClientConfig {
    ClientConfig {
        export: DISK.into(),
        requests: world.setting("nbd-client-requests", &[64, 4, 1]),
        receive_bytes: world.setting("nbd-client-receive", &[256 << 10, 16 << 10]),
        pause_ns: 100_000,
        pause_most_ns: 1_000_000_000,
        ..ClientConfig::new(address())
    }
}

/// What a server of this world serves, and how.
#[derive(Clone)]
pub(super) struct Plan {
    pub(super) world: World,
    /// Names and disks.
    pub(super) disks: Vec<(&'static str, Setup)>,
    pub(super) limits: StackLimits,
    pub(super) server: ServerLimits,
    /// Memory that others have for themselves.
    taken: Rc<RefCell<Vec<Share>>>,
}

/// A server that runs.
pub(super) struct Served {
    pub(super) host: SimHost,
    pub(super) server: Server<SimHost>,
    stacks: Vec<Stack>,
    /// What the server asked of each disk.
    pub(super) asks: Vec<Rc<Asks>>,
}

impl Served {
    /// Ends in order. What was answered before the disks are closed is durable once they are.
    pub(super) async fn stop(self, world: &World, setup: &Setup) {
        self.server.stop().await;
        check_idle(world, &self, 0);
        let inv = setup.history.borrow_mut().begin_flush();
        for stack in &self.stacks {
            if let Err(error) = stack.disk.close().await {
                world.fail(Invariant::G11, format!("closing the disk failed with {error:?}"));
            }
        }
        setup.history.borrow_mut().end_flush(inv);
        self.host.process.node().kill();
        self.host.process.node().dead().await;
    }
}

/// A server that can be stopped: made of its parts, or the program that ships.
pub(super) enum Running {
    Parts(Served),
    Program(SimHost, Receiver<()>),
}

impl Running {
    /// Starts one in `host`. `None` if that fails.
    pub(super) async fn start(plan: &Plan, host: SimHost) -> Option<Self> {
        if !shipped(&plan.world) {
            return plan.serve(&host).await.map(Self::Parts);
        }
        let (done, ended) = oneshot();
        let (plan, own) = (plan.clone(), host.clone());
        host.process.node().spawn("main", 0, async move {
            plan.program(&own).await;
            let _ = done.send(());
        });
        Some(Self::Program(host, ended))
    }

    pub(super) fn host(&self) -> &SimHost {
        match self {
            Self::Parts(served) => &served.host,
            Self::Program(host, _) => host,
        }
    }

    /// As [`Served::stop`]; a program is asked to.
    pub(super) async fn stop(self, world: &World, setup: &Setup) {
        match self {
            Self::Parts(served) => served.stop(world, setup).await,
            Self::Program(host, ended) => {
                let inv = setup.history.borrow_mut().begin_flush();
                host.process.ask_to_stop();
                let _ = ended.await;
                setup.history.borrow_mut().end_flush(inv);
                host.process.node().kill();
                host.process.node().dead().await;
            }
        }
    }
}

impl Plan {
    /// Draws the limits for one disk called [`DISK`].
    pub(super) fn draw(world: &World) -> (Self, Setup) {
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
            taken: Rc::default(),
        };
        (plan, setup)
    }

    /// Without a disk of ours: somebody else is the server.
    pub(super) fn alone(world: &World) -> Self {
        let limits = StackLimits::draw(world);
        Self {
            world: world.clone(),
            disks: Vec::new(),
            limits,
            server: ServerLimits::default(),
            taken: Rc::default(),
        }
    }

    /// Starts a server in `host`, which opens the images and listens. `None` if that fails.
    pub(super) async fn serve(&self, host: &SimHost) -> Option<Served> {
        let mut exports = Vec::new();
        let (mut stacks, mut asks) = (Vec::new(), Vec::new());
        for (name, setup) in &self.disks {
            let stack = loop {
                match Stack::open(host, &self.world, &setup.spec, &self.limits).await {
                    Ok(stack) => break stack,
                    // The lock of a dead predecessor goes when its last operation has landed.
                    Err(ImageError::InUse { .. }) => self.world.sim.sleep_ns(200_000).await,
                    Err(error) => return self.failed(host, &format!("open its image: {error}")),
                }
            };
            let (name, node) = (String::from(*name), Asks::new(&self.world, stack.node()));
            asks.push(Rc::clone(&node));
            let read_only = name.starts_with("frozen");
            exports.push(Export { name, description: String::new(), node, read_only });
            stacks.push(stack);
        }
        let server = match Server::new(host.clone(), exports, self.server, &self.memory()) {
            Ok(server) => server,
            Err(error) => return self.failed(host, &error.to_string()),
        };
        let listener = match host.listen(&address()).await {
            Ok(listener) => listener,
            Err(error) => return self.failed(host, &format!("listen: {error}")),
        };
        let own = server.clone();
        host.process.node().spawn("serve", 0, async move { own.serve(listener).await });
        Some(Served { host: host.clone(), server, stacks, asks })
    }

    /// The memory of a server's connections.
    fn memory(&self) -> Budget {
        match self.limits.memory_bytes {
            0 => Budget::least(),
            bytes => Budget::new(bytes.max(SERVER_BYTES)),
        }
    }

    /// `tapdisk serve` with the disks of this plan, started again while an image is in use by a predecessor whose last
    /// operation is under way. Ends when it is asked to stop.
    pub(super) async fn program(&self, host: &SimHost) {
        let disks = self.disks.iter().map(|(name, setup)| format!("{name}={}", named(&setup.spec)));
        let disks: Vec<String> = disks.collect();
        let line = format!("serve --nbd {} {} {}", address(), self.limits.images(), disks.join(" "));
        loop {
            let (status, why) = tapdisk(host, &line).await;
            if status == 0 || !host.process.node().is_alive() {
                return;
            }
            if !why.contains("in use") {
                let text = format!("tapdisk {line} ended with status {status}: {why}");
                return self.world.fail(Invariant::L1, text);
            }
        }
    }

    /// `tapdisk serve` in `host` whose disk is the export of this plan's server: gives where it listens.
    pub(super) fn proxy(&self, host: &SimHost) -> SocketAddress {
        let address = SocketAddress::Tcp { host: "::1".into(), port: 10809 };
        // The export and the socket as URIs have them.
        let disk = "disk=nbd+unix:///d%69s%6b?socket=/run/tapdisk%2Enbd";
        let listen = "--nbd tcp:[::1]:10809 --nbd unix:/run/proxy.nbd";
        let line = format!("serve {listen} --connections 3 {} {disk}", self.limits.images());
        let (world, own) = (self.world.clone(), host.clone());
        host.process.node().spawn("main", 0, async move {
            let (status, why) = tapdisk(&own, &line).await;
            if own.process.node().is_alive() {
                let text = format!("tapdisk {line} ended with status {status}: {why}");
                world.fail(Invariant::L1, text);
            }
        });
        address
    }

    fn failed(&self, host: &SimHost, what: &str) -> Option<Served> {
        // A dying process may see anything.
        if host.process.node().is_alive() {
            self.world.fail(Invariant::G11, format!("tapdisk failed to {what}"));
        }
        None
    }

    pub(super) fn process(&self, name: &str, key: u64) -> SimHost {
        SimHost::start(&self.world.kernel, &self.world.xen, name, key)
    }

    /// The operations of a client on a disk of `size_sectors`.
    pub(super) fn operations(&self, who: u64, size_sectors: u64, count: u32) -> Vec<Option<Op>> {
        let entity = Entity::WORLD.child("nbd-ops", who);
        self.world.sim.name_entity(entity, || format!("client {who}"));
        let w = Workload { zeroes: true, ..workload(&self.world, size_sectors, count, 128) };
        operations(&self.world.sim, entity, who, &w)
    }

    /// Connects as often as it takes.
    pub(super) async fn connect(&self, host: &SimHost, config: &ClientConfig) -> Rc<Client<SimHost>> {
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

    /// In some worlds others have all memory that nobody was promised, from now on: requests of other disks, say.
    /// Whoever is served already goes on.
    fn fill(&self, config: &ClientConfig) {
        if !self.world.setting("client-memory-is-taken", &[false, true]) {
            return;
        }
        let figures = config.memory.figures();
        let others = config.memory.stage(0).expect("nothing fits always");
        let free = figures.limit_bytes - (figures.used_bytes - figures.kept_bytes);
        self.taken.borrow_mut().extend(others.try_take(free));
    }

    /// A disk over `connections` connections.
    pub(super) async fn spread(
        &self,
        host: &SimHost,
        config: &ClientConfig,
        connections: usize,
        cache: CacheMode,
    ) -> (Spread, Clients) {
        let (mut disks, mut clients) = (Vec::new(), Vec::new());
        for _ in 0..connections {
            let client = self.connect(host, config).await;
            let node = cache.over(Rc::clone(&client) as Rc<dyn Node>);
            disks.push(DirectDisk::new(node, self.limits.pool_bytes));
            clients.push(client);
        }
        self.fill(config);
        (Spread::new(disks), clients)
    }

    pub(super) fn guest<D: GuestDisk>(&self, disk: D, setup: &Setup, reads: Invariant) -> Guest<D> {
        Guest::new(&self.world, disk, Rc::clone(&setup.history), Manners { reads, ..NO_ERRORS })
    }
}

pub(super) type Clients = Vec<Rc<Client<SimHost>>>;

/// Runs `work` as a task of `host`, until it ends or the process dies.
pub(super) async fn within(host: &SimHost, work: impl Future<Output = ()> + 'static) {
    let (done, finished) = oneshot();
    host.process.node().spawn("main", 0, async move {
        work.await;
        let _ = done.send(());
    });
    either(host.process.node().dead(), finished).await;
}

/// Cuts the power of everything that is in `hosts`.
pub(super) async fn cut_power(world: &World, setup: &Setup, hosts: &[&SimHost]) {
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
pub(super) async fn last_look(plan: &Plan, setup: &Setup, reads: Invariant) {
    let world = &plan.world;
    world.sim.stop_faults();
    let Some(served) = plan.serve(&plan.process("tapdisk", 1000)).await else { return };
    let host = plan.process("client", 1000);
    let (disk, clients) = plan.spread(&host, &client_config(world), 1, CacheMode::WriteBack).await;
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
pub(super) async fn end(plan: &Plan, served: Served, clients: &Clients, setup: &Setup) {
    let world = &plan.world;
    check_connected(world, clients);
    for client in clients {
        if let Err(error) = client.close().await {
            world.fail(Invariant::E4, format!("closing a client failed with {error:?}"));
        }
    }
    served.server.stop().await;
    check_idle(world, &served, 0);
    for stack in &served.stacks {
        if let Err(error) = stack.disk.close().await {
            world.fail(Invariant::G11, format!("closing the disk failed with {error:?}"));
        }
    }
    cut_after_close(world, [setup.spec.path.as_str()]);
    setup.check(world, "in the end").await;
}

/// Each of these clients has the connection with which it began: its server has lived.
pub(super) fn check_connected(world: &World, clients: &Clients) {
    if clients.iter().any(|client| client.connections() != 1) {
        world.fail(Invariant::N1, "a client had to connect again although its server lived");
    }
}

/// No more looks at extents at one time than connections asked for them: each has one answer about extents at most in
/// the making, whatever its client asks for.
pub(super) fn check_looks(world: &World, served: &Served, connections: u32) {
    let most = served.asks.iter().map(|asks| asks.most_looks()).max().unwrap_or_default();
    if most > connections {
        let text = format!("{most} answers about extents were made at once for {connections} connections");
        world.fail(Invariant::M1, text);
    }
}

/// No client has had to connect again: no server has died.
pub(super) fn check_unbroken(world: &World) {
    let again = world.kernel.marks()[Mark::NbdServerBack as usize];
    if again > 0 {
        world.fail(Invariant::N1, format!("clients had to connect again {again} times"));
    }
}

/// Nothing is in flight any more, and only `connections` are open.
pub(super) fn check_idle(world: &World, served: &Served, connections: usize) {
    let (open, used) = (served.server.connections(), served.server.used_bytes());
    let in_flight: usize = served.stacks.iter().map(|stack| stack.disk.slot().in_flight()).sum();
    if (open, used, in_flight) != (connections, 0, 0) {
        let text = format!("{open} connections, {used} bytes and {in_flight} requests are left");
        world.fail(Invariant::K1, format!("{text}; {connections} connections and nothing else should be"));
    }
}

/// The server's process, which is started again when it dies.
#[derive(Clone)]
pub(super) struct Supervisor {
    plan: Plan,
    current: Rc<RefCell<SimHost>>,
    /// Nobody is started any more.
    done: Rc<Cell<bool>>,
}

impl Supervisor {
    /// With a server that starts.
    pub(super) fn new(plan: &Plan) -> Self {
        let current = Rc::new(RefCell::new(plan.process("unused", 0)));
        let supervisor = Self { plan: plan.clone(), current, done: Rc::default() };
        supervisor.start(0);
        supervisor
    }

    /// Kills the server as often as `after` has numbers, each time after so many of its effects.
    pub(super) async fn run(self, after: Vec<u64>) {
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
            if self::shipped(&plan.world) {
                return plan.program(&host).await;
            }
            let served = plan.serve(&host).await;
            // Its disks live as long as the process.
            std::future::pending::<()>().await;
            drop(served);
        });
    }

    /// The server that is left; it has no successor.
    pub(super) fn retire(&self) -> SimHost {
        self.done.set(true);
        self.current.borrow().clone()
    }
}

/// A client with what a tapdisk has above it: overlapping requests are kept apart.
pub(super) async fn client_stack(
    plan: &Plan,
    host: &SimHost,
    config: &ClientConfig,
    cache: CacheMode,
) -> (Rc<Client<SimHost>>, Rc<dyn Node>) {
    let client = plan.connect(host, config).await;
    plan.fill(config);
    let below = Rc::clone(&client) as Rc<dyn Node>;
    let scheduler = plan.limits.scheduler;
    let config = DiskConfig { id: VbdId(0), cache, scheduler };
    (client, Disk::new(host, below, config).node())
}

/// Sends `messages` to the server, takes every reply, and hangs up when the server has.
pub(super) async fn send_all(host: SimHost, messages: Vec<Vec<u8>>) {
    let Ok(stream) = host.connect(&address()).await else { return };
    let raw = RawNbd::new(stream);
    let reader = raw.clone();
    host.process.node().spawn("reads", 0, async move {
        let _ = reader.drain().await;
    });
    for message in &messages {
        if raw.send(message).await.is_err() {
            return;
        }
    }
}

/// Lets what dead clients had asked for end: at most some operations that are stuck for ten seconds each.
pub(super) async fn bury(world: &World, dead: &[SimHost], served: &Served, connections: usize) {
    world.sim.stop_faults();
    for host in dead {
        host.process.node().kill();
        host.process.node().dead().await;
    }
    world.sim.sleep_ns(600_000_000_000).await;
    check_idle(world, served, connections);
}
