//! Building blocks of the NBD scenarios: servers and clients in processes, their start and their end.

use super::secure::{SECURED, certificates};
use super::status::check_status;
use crate::catalog::setup::{Setup, check_at_rest, cut_after_close, workload};
use crate::check::{CountingNode, Invariant};
use crate::formats::Kind;
use crate::guest::{DirectDisk, ErrorPolicy, Guest, GuestDisk, RawNbd, Spread};
use crate::limits::StackLimits;
use crate::probes::marked;
use crate::program::{Printed, named, option_of, tapdisk};
use crate::workload::{Op, Workload, operations};
use crate::world::World;
use kernel_model::SimHost;
use sim::Entity;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_core::wait::{Event, joined};
use tap_core::{CacheMode, Disk, DiskConfig, Node};
use tap_host::{Event as LogEvent, Share, SocketAddress, Sockets, VbdId, select};
use tap_nbd::{Client, ClientConfig, ServerLimits};
use tap_programs::Tuning;
use tap_programs::spec::DiskSpec;

pub(super) const DISK_BYTES: u64 = 1 << 20;
/// Nothing below fails, so nothing above may.
pub(in crate::catalog) const NO_ERRORS: ErrorPolicy =
    ErrorPolicy { retries: 0, errors_allowed: false, reads: Invariant::G1 };
/// The export of guests.
pub(super) const DISK: &str = "disk";

pub(super) fn address() -> SocketAddress {
    SocketAddress::Unix("/run/tapdisk.nbd".into())
}

/// Memory for the connections of a server, in bytes: some of every size.
const SERVER_BYTES: usize = 8 << 20;

pub(in crate::catalog) fn server_limits(world: &World) -> ServerLimits {
    ServerLimits {
        requests: world.setting("nbd-requests", &[128, 8, 1]),
        request_bytes: world.setting("nbd-request", &[32 << 20, 64 << 10, 4096]),
        range_bytes: world.setting("nbd-range", &[1 << 40, 64 << 10, 4096]),
        connection_bytes: world.setting("nbd-memory", &[32 << 20, 64 << 10, 4096]),
        receive_bytes: world.setting("nbd-receive", &[256 << 10, 16 << 10]),
        ..ServerLimits::default()
    }
}

pub(in crate::catalog) fn client_config(world: &World) -> ClientConfig {
    ClientConfig {
        export: DISK.into(),
        requests: world.setting("nbd-client-requests", &[64, 4, 1, 0]),
        receive_bytes: world.setting("nbd-client-receive", &[256 << 10, 16 << 10]),
        pause_ns: 100_000,
        pause_most_ns: 1_000_000_000,
        // Some clients take the refusal of a server that ends for an error, and only connect again when their
        // connection is lost.
        refused_ns: world.setting("client-refused", &[60_000_000_000, 0]),
        ..ClientConfig::new(address())
    }
}

/// Address of the server whose disk is another server's export, in a form that URIs can contain.
pub(super) fn tcp_address() -> SocketAddress {
    SocketAddress::Tcp { host: "::1".into(), port: 10810 }
}

/// The export of guests as a disk: with percent signs as in URIs, and as the only one, without a name.
const PROXIED: [&str; 4] = [
    "nbd+unix:///d%69s%6b?socket=/run/tapdisk%2Enbd",
    "nbd:unix:/run/tapdisk.nbd",
    "nbd://[::1]:10810/disk",
    "nbd:[::1]:10810",
];

/// What a server of this world serves, and how.
#[derive(Clone)]
pub(super) struct Plan {
    pub(super) world: World,
    /// Names and disks.
    pub(super) disks: Vec<(&'static str, Setup)>,
    pub(super) limits: StackLimits,
    /// When writes become durable.
    cache: CacheMode,
    pub(super) server: ServerLimits,
    /// It ends when its last client has left.
    ends_with_last: bool,
    /// The option that makes it insist on TLS, or nothing.
    tls: String,
    /// Where the server listens.
    pub(super) addresses: Vec<SocketAddress>,
    /// Memory that is taken from the clients' budget.
    taken: Rc<RefCell<Vec<Share>>>,
    /// Processes that run our client.
    clients: Rc<RefCell<Vec<SimHost>>>,
}

/// `tapdisk serve` in a process.
pub(super) struct Served {
    pub(super) host: SimHost,
    said: Rc<Printed>,
    /// Number of open connections; `idle` is set while it is 0.
    open: Rc<Cell<usize>>,
    idle: Rc<Event>,
    /// It ends when its last client has left.
    ends_with_last: bool,
    /// Counters of the server's requests to each disk, in the order of the command line.
    asks: Rc<RefCell<Vec<Rc<CountingNode>>>>,
}

impl Served {
    /// The counters of the server's requests to each disk.
    pub(super) fn asks(&self) -> Vec<Rc<CountingNode>> {
        self.asks.borrow().clone()
    }

    /// Number of open connections.
    pub(super) fn connections(&self) -> usize {
        self.open.get()
    }

    /// Counts connections by the server's events.
    fn count_connections(&self, world: &World) {
        let (own, open, idle) = (self.host.process.node().entity(), self.open.clone(), self.idle.clone());
        idle.set();
        world.kernel.on_event(move |node, event| match event {
            LogEvent::NbdConnected { .. } if node.entity() == own => {
                open.set(open.get() + 1);
                idle.clear();
            }
            LogEvent::NbdClosed { .. } if node.entity() == own => {
                open.set(open.get() - 1);
                if open.get() == 0 {
                    idle.set();
                }
            }
            _ => {}
        });
    }

    /// Stops in order. What was answered before the disks are closed is durable afterwards.
    pub(super) async fn stop(self, world: &World, setup: &Setup) {
        self.leave(world, setup).await;
        self.host.process.node().kill();
        self.host.process.node().dead().await;
    }

    /// The same without killing the process afterwards.
    async fn leave(&self, world: &World, setup: &Setup) {
        if !self.ends_with_last {
            self.host.process.ask_to_stop();
        }
        let node = self.host.process.node();
        select(node.dead(), self.idle.wait()).await;
        let inv = setup.history.borrow_mut().begin_flush();
        select(node.dead(), self.said.ended()).await;
        // A failure has been reported already.
        match self.said.status() {
            Some(status) => {
                check_idle(world, self, 0);
                if status == 0 {
                    setup.history.borrow_mut().end_flush(inv);
                }
            }
            None => setup.history.borrow_mut().server_died(),
        }
    }
}

impl Plan {
    /// Draws the limits for one disk called [`DISK`].
    pub(super) fn draw(world: &World) -> (Self, Setup) {
        let kind = world.setting("image", &Kind::plain());
        let setup = Setup::new(world, kind, 0, DISK_BYTES);
        // Concurrent requests on several connections, and repeated ones, may take either order.
        setup.history.borrow_mut().relax_order();
        let plan = Self {
            world: world.clone(),
            disks: vec![(DISK, setup.clone())],
            limits: StackLimits::draw(world),
            cache: world.setting("program-cache", &[CacheMode::WriteBack, CacheMode::WriteThrough]),
            server: server_limits(world),
            ends_with_last: false,
            tls: String::new(),
            addresses: vec![address()],
            taken: Rc::default(),
            clients: Rc::default(),
        };
        (plan, setup)
    }

    /// A plan without a disk of ours: the server is another program.
    pub(super) fn alone(world: &World) -> Self {
        let limits = StackLimits::draw(world);
        Self {
            world: world.clone(),
            disks: Vec::new(),
            limits,
            cache: CacheMode::WriteBack,
            server: ServerLimits::default(),
            ends_with_last: false,
            tls: String::new(),
            addresses: vec![address()],
            taken: Rc::default(),
            clients: Rc::default(),
        }
    }

    /// The same for another server at `address`, with the disk `setup`.
    pub(super) fn other(&self, name: &'static str, setup: &Setup, address: SocketAddress) -> Self {
        Self { disks: vec![(name, setup.clone())], addresses: vec![address], ..self.clone() }
    }

    /// Whether clients have to secure their connections.
    pub(super) fn secure(&mut self, tls: bool) {
        self.tls = if tls { certificates(&self.world) } else { String::new() };
    }

    /// Clients also read and write parts of sectors.
    pub(super) fn unaligned(self) -> Self {
        Self { limits: StackLimits { unaligned: true, ..self.limits }, ..self }
    }

    /// Makes the disks read-only.
    pub(super) fn frozen(self) -> Self {
        Self { limits: StackLimits { read_only: true, ..self.limits }, ..self }
    }

    /// Starts a server in `host` and waits until it listens. `None` if it ends before.
    pub(super) async fn serve(&self, host: &SimHost) -> Option<Served> {
        let served = self.start(host);
        let listens = Cell::new(false);
        let said = async { listens.set(served.said.says("listening at").await) };
        select(said, host.process.node().dead()).await;
        listens.get().then_some(served)
    }

    /// Starts a server in `host`.
    pub(super) fn start(&self, host: &SimHost) -> Served {
        let (said, asks) = (Rc::<Printed>::default(), Rc::default());
        let (open, idle) = (Rc::default(), Rc::default());
        let served = Served {
            host: host.clone(),
            said: Rc::clone(&said),
            open,
            idle,
            ends_with_last: self.ends_with_last,
            asks: Rc::clone(&asks),
        };
        served.count_connections(&self.world);
        host.process.node().spawn("main", 0, self.clone().program(host.clone(), said, asks));
        served
    }

    /// Memory of the server in bytes, if it is bounded; 0 is the minimum.
    fn memory_bytes(&self) -> usize {
        match self.limits.memory_bytes {
            0 => 0,
            // Sessions of TLS take as much again.
            bytes => SERVER_BYTES * (1 + usize::from(!self.tls.is_empty())) + bytes * self.disks.len().max(1),
        }
    }

    /// What a server has no options for; `asks` collects the counters of its disks.
    fn tuning(&self, host: &SimHost, asks: Rc<RefCell<Vec<Rc<CountingNode>>>>) -> Tuning {
        let tuning = self.limits.tuning(&self.world, host.process.node(), self.memory_bytes());
        let (world, over, process) = (self.world.clone(), tuning.over_disk, host.process.node().clone());
        let over_disk = Rc::new(move |spec: &DiskSpec, disk: Rc<dyn Node>| {
            let disk = match &over {
                Some(over) => over(spec, disk),
                None => disk,
            };
            let node = CountingNode::new(&world, &process, asks.borrow().len() as u64, disk);
            asks.borrow_mut().push(Rc::clone(&node));
            node as Rc<dyn Node>
        });
        Tuning { server: self.server, over_disk: Some(over_disk), ..tuning }
    }

    fn line(&self) -> String {
        let addresses: Vec<String> = self.addresses.iter().map(|at| format!("--nbd {at}")).collect();
        let disks = self.disks.iter().map(|(name, setup)| match *name {
            "" => named(&setup.spec),
            name => format!("{name}={}", named(&setup.spec)),
        });
        let (disks, connections): (Vec<String>, _) = (disks.collect(), self.server.connections);
        let (addresses, options) = (addresses.join(" "), self.limits.options());
        let cache = option_of(self.cache);
        let (end, tls) = (if self.ends_with_last { "--end-with-last-client" } else { "" }, &self.tls);
        let disks = disks.join(" ");
        format!("serve {addresses} --connections {connections} {options} {cache} {end} {tls} {disks}")
    }

    /// Runs `tapdisk serve` with the disks of this plan, and restarts it while an image is in use by a predecessor's
    /// last operation. Ends when it is asked to stop.
    async fn program(self, host: SimHost, said: Rc<Printed>, asks: Rc<RefCell<Vec<Rc<CountingNode>>>>) {
        let line = self.line();
        loop {
            let tuning = self.tuning(&host, Rc::clone(&asks));
            let status = tapdisk(&self.world, &host, &line, tuning, &said).await;
            let why = said.err.take().join("; ");
            if status != 0 && why.contains("in use") {
                continue;
            }
            let lost = self.world.errors_allowed() && why.contains("may be lost");
            if (status != 0 || !why.is_empty()) && !lost {
                let text = format!("tapdisk {line} ended with status {status}: {why}");
                self.world.fail(Invariant::L1, text);
            }
            return said.end(status);
        }
    }

    /// Starts a `tapdisk serve` in `host` whose disk is the export of this plan's server. Returns its address.
    pub(super) fn proxy(&self, host: &SimHost) -> SocketAddress {
        let address = SocketAddress::Tcp { host: "::1".into(), port: 10809 };
        let disk = match self.tls.is_empty() {
            true => self.world.setting("proxied", &PROXIED),
            false => self.world.setting("proxied-securely", &SECURED),
        };
        let listen = "--nbd tcp:[::1]:10809 --nbd unix:/run/proxy.nbd";
        let line = format!("serve {listen} --connections 3 {} disk={disk}", self.limits.options());
        let tuning = self.limits.tuning(&self.world, host.process.node(), self.memory_bytes());
        let (world, own) = (self.world.clone(), host.clone());
        host.process.node().spawn("main", 0, async move {
            let said = Rc::<Printed>::default();
            let status = tapdisk(&world, &own, &line, tuning, &said).await;
            let why = said.err.take().join("; ");
            world.fail(Invariant::L1, format!("tapdisk {line} ended with status {status}: {why}"));
        });
        address
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

    /// Connects, with as many attempts as it takes.
    pub(super) async fn connect(&self, host: &SimHost, config: &ClientConfig) -> Rc<Client<SimHost>> {
        self.clients.borrow_mut().push(host.clone());
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

    /// In some worlds all memory that is not reserved is taken from now on, as if by other disks. Requests that are
    /// already served continue.
    fn fill(&self, config: &ClientConfig) {
        if !self.world.setting("client-memory-is-taken", &[false, true]) {
            return;
        }
        let figures = config.memory.figures();
        let others = config.memory.stage(0).expect("an empty request always fits");
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
        let guest =
            Guest::new(&self.world, disk, Rc::clone(&setup.history), ErrorPolicy { reads, ..NO_ERRORS });
        if self.cache == CacheMode::WriteThrough {
            guest.write_through();
        }
        guest
    }
}

pub(super) type Clients = Vec<Rc<Client<SimHost>>>;

/// Runs `work` as a task of `host`, until it ends or the process dies.
pub(super) async fn within(host: &SimHost, work: impl Future<Output = ()> + 'static) {
    let (task, finished) = joined(work);
    host.process.node().spawn("main", 0, task);
    select(host.process.node().dead(), finished).await;
}

/// Cuts the power of everything in `hosts`.
pub(super) async fn cut_power(world: &World, setup: &Setup, hosts: &[&SimHost]) {
    let nodes: Vec<_> = hosts.iter().map(|host| host.process.node()).collect();
    setup.cut_power(world, &nodes).await;
    setup.check(world, "after the power cut").await;
}

/// Without faults: everything is read once more through a new server, which is then stopped in order.
pub(super) async fn last_check(plan: &Plan, setup: &Setup, reads: Invariant) {
    let world = &plan.world;
    world.sim.stop_faults();
    let ends_with_last = world.setting("ends-with-last", &[false, true]);
    let plan = &Plan { ends_with_last, ..plan.clone() };
    let Some(served) = plan.serve(&plan.process("tapdisk", 1000)).await else { return };
    let host = plan.process("client", 1000);
    let (disk, clients) = plan.spread(&host, &client_config(world), 1, CacheMode::WriteBack).await;
    if ends_with_last {
        // Not the last one.
        leaves(plan, &plan.process("client", 1001)).await;
    }
    let guest = plan.guest(disk, setup, reads);
    if let Err(error) = guest.read_all().await {
        world.fail(Invariant::G11, format!("reading the whole disk failed with {error:?}"));
    }
    if let (Some(client), Some(asks)) = (clients.first(), served.asks().first()) {
        check_status(world, &**client, &*asks.lower(), setup.size_sectors).await;
    }
    end(plan, served, &clients, setup).await;
    if guest.disk().buffers_out() > 0 {
        world.fail(Invariant::K1, "buffers of the client were not released");
    }
}

/// A client connects and leaves again.
async fn leaves(plan: &Plan, host: &SimHost) {
    let client = plan.connect(host, &client_config(&plan.world)).await;
    if let Err(error) = client.close().await {
        plan.world.fail(Invariant::E4, format!("closing a client that did nothing failed with {error:?}"));
    }
}

/// The clients disconnect, the server is stopped or ends with the last of them, its disks are closed; nothing may be
/// left.
pub(super) async fn end(plan: &Plan, served: Served, clients: &Clients, setup: &Setup) {
    let world = &plan.world;
    check_connected(world, clients);
    for client in clients {
        if let Err(error) = client.close().await {
            world.fail(Invariant::E4, format!("closing a client failed with {error:?}"));
        }
    }
    served.leave(world, setup).await;
    for host in plan.clients.take().iter().chain([&served.host]) {
        check_at_rest(world, host.process.node()).await;
    }
    served.host.process.node().kill();
    served.host.process.node().dead().await;
    cut_after_close(world, [setup.spec.path.as_str()]);
    setup.check(world, "in the end").await;
}

/// Checks that each of these clients has kept its first connection, because its server has not died.
pub(super) fn check_connected(world: &World, clients: &Clients) {
    if clients.iter().any(|client| client.connections() != 1) {
        world.fail(Invariant::N1, "a client had to reconnect although its server lived");
    }
}

/// Checks that a server of aligned requests asked no more of a disk at once than its limits permit: one extents query
/// for each of the clients that ask for a status, and as many requests as may be in flight on all connections.
pub(super) fn check_asks(world: &World, served: &Served, plan: &Plan, [asking, connections]: [u32; 2]) {
    for asks in served.asks() {
        let (queries, requests) = (asks.max_queries(), asks.max_in_flight());
        if queries > asking {
            let text = format!("{queries} block status replies were built concurrently for {asking} clients");
            world.fail(Invariant::M1, text);
        }
        if requests > plan.server.requests * connections {
            let text = format!("{requests} requests were in flight for {connections} connections");
            world.fail(Invariant::M1, text);
        }
    }
}

/// Checks that no client has reconnected, because no server has died.
pub(super) fn check_unbroken(world: &World) {
    let again = marked(&world.kernel, "nbd-server-back");
    if again > 0 {
        world.fail(Invariant::N1, format!("clients had to reconnect {again} times"));
    }
}

/// Checks that nothing is in flight any more, and only `connections` are open.
pub(super) fn check_idle(world: &World, served: &Served, connections: usize) {
    let open = served.connections();
    let in_flight: u32 = served.asks().iter().map(|asks| asks.in_flight()).sum();
    if (open, in_flight) != (connections, 0) {
        let text = format!("{open} connections and {in_flight} requests are left");
        world.fail(Invariant::K1, format!("{text}, expected {connections} connections and no requests"));
    }
}

/// Restarts the server's process when it dies.
#[derive(Clone)]
pub(super) struct Supervisor {
    plan: Plan,
    current: Rc<RefCell<Option<Served>>>,
    /// No server is started any more.
    done: Rc<Cell<bool>>,
}

impl Supervisor {
    /// Starts the first server.
    pub(super) fn new(plan: &Plan) -> Self {
        let supervisor = Self { plan: plan.clone(), current: Rc::default(), done: Rc::default() };
        supervisor.start(0);
        supervisor
    }

    /// Kills the server once for each number in `after`, after that many of its effects.
    pub(super) async fn run(self, after: Vec<u64>) {
        for (i, steps) in after.into_iter().enumerate() {
            let Some(host) = self.current.borrow().as_ref().map(|served| served.host.clone()) else { return };
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
        *self.current.borrow_mut() = Some(self.plan.start(&self.plan.process("tapdisk", key)));
    }

    /// Returns the last server, which has no successor.
    pub(super) fn retire(&self) -> Served {
        self.done.set(true);
        self.current.take().expect("a supervisor has a server until it retires")
    }
}

/// A client with the scheduler that a tapdisk has above it, which orders overlapping requests.
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

/// Sends `messages` to the server, reads every reply, and closes once the server has.
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

/// Waits until the requests of dead clients have ended: at most some operations that hang for ten seconds each.
pub(super) async fn reap_dead_clients(world: &World, dead: &[SimHost], served: &Served, connections: usize) {
    world.sim.stop_faults();
    for host in dead {
        host.process.node().kill();
        host.process.node().dead().await;
    }
    world.sim.sleep_ns(600_000_000_000).await;
    check_idle(world, served, connections);
}
