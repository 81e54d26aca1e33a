//! Stream sockets between processes of the simulated hosts. Unix paths and TCP names behave alike, except that a unix
//! path outlives its dead listener and is taken over by the next.
//!
//! ```text
//!   send ──cut──► [ on the way ──late──► [ arrived ──cut──► recv        a Pipe for each direction
//!                 └── together at most the buffer's size ──┘
//! ```
//!
//! # Faults
//!
//! | fault | effect |
//! |---|---|
//! | send cut | a send takes only the first bytes |
//! | late | bytes arrive later; never out of order |
//! | receive cut | a receive returns only the first of the available bytes |
//! | small buffer | a connection holds 208 KiB in each direction, or 64 KiB, 4 KiB, 512 bytes |
//! | abort | bytes in transit are lost, and the peer is told |
//! | reset | the peer's death breaks the stream, and bytes in transit are lost; otherwise they arrive, and then the end
//! |
//!
//! Closing a stream with unreceived bytes resets it, as on Linux. Nothing is ever lost, duplicated or changed on a
//! living stream.

use crate::process::Process;
use sim::{Draw, Entity, FaultKind, Label, Sim, Timed, text_hash};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::{Future, pending, poll_fn};
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};
use tap_host::{Errno, IoBuf, Listener, OneWaiter, SendList, SocketAddress, Sockets, Stream};

/// How many bytes a send takes.
pub static SEND_CUT: Label = Label::new("send-cut", "only {} bytes are taken");
/// How much longer than the minimum bytes are in transit.
pub static ARRIVE_LATE: Label = Label::new("arrive-late", "the bytes arrive {} ns later");
/// How many bytes a receive returns.
pub static RECV_CUT: Label = Label::new("recv-cut", "only {} bytes are received");
/// How large the buffers of a connection are.
pub static SOCKET_BUFFER: Label = Label::new("socket-buffer", "its buffers have size {} (0 is the largest)");
/// Whether the death of the other end resets a stream.
pub static PEER_RESET: Label = Label::new("peer-reset", "the death of the other end resets the stream");

static CUT: FaultKind = FaultKind { name: "socket-cut", max_ppm: 500_000 };
static LATE: FaultKind = FaultKind { name: "socket-late", max_ppm: 300_000 };
static SMALL: FaultKind = FaultKind { name: "socket-small", max_ppm: 1_000_000 };
static RESET: FaultKind = FaultKind { name: "socket-reset", max_ppm: 700_000 };

/// Sizes of buffers in bytes.
const BUFFER_BYTES: [usize; 4] = [208 << 10, 64 << 10, 4096, 512];
/// Minimum time from a send to a receive in nanoseconds.
const TRANSIT_NS: u64 = 3_000;
/// Maximum number of connections that wait to be accepted.
const BACKLOG: usize = 128;
/// The first port that is chosen if none is requested.
const FIRST_FREE_PORT: u16 = 32_768;

/// All sockets of the simulated hosts.
#[derive(Default)]
pub(crate) struct Network {
    listeners: RefCell<BTreeMap<SocketAddress, Rc<Door>>>,
    established: Cell<u64>,
}

impl Network {
    /// The paths of unix sockets, also of those without a listener.
    pub(crate) fn paths(&self) -> Vec<String> {
        let path = |address: &SocketAddress| match address {
            SocketAddress::Unix(path) => Some(path.clone()),
            SocketAddress::Tcp { .. } => None,
        };
        self.listeners.borrow().keys().filter_map(path).collect()
    }
}

/// Where connections wait to be accepted.
#[derive(Default)]
struct Door {
    open: Cell<bool>,
    waiting: RefCell<VecDeque<Wire>>,
    acceptor: OneWaiter,
}

/// One end's view of a connection.
#[derive(Clone)]
struct Wire {
    inward: Rc<Pipe>,
    outward: Rc<Pipe>,
}

impl Wire {
    fn other_end(&self) -> Wire {
        Wire { inward: Rc::clone(&self.outward), outward: Rc::clone(&self.inward) }
    }

    /// This end ends the stream, and discards what has not arrived.
    fn abort(&self) {
        if self.outward.closed.replace(true) {
            return;
        }
        self.inward.give_up();
        self.outward.lose_on_the_way();
        self.outward.put(Item::End { reset: true });
        self.outward.writer.wake();
    }

    /// This end sends no more, and still receives.
    fn finish(&self) {
        if !self.outward.closed.get() && !self.outward.finished.replace(true) {
            self.outward.put(Item::End { reset: false });
            self.outward.writer.wake();
        }
    }

    /// This end is closed; `died` by the death of its process.
    fn close(&self, died: bool) {
        if self.outward.closed.replace(true) {
            return;
        }
        let unread = !self.inward.arrived.borrow().is_empty() || !self.inward.on_the_way.borrow().is_empty();
        self.inward.give_up();
        let reset = died && self.outward.is_reset_by_death();
        if reset {
            self.outward.lose();
        }
        self.outward.put(Item::End { reset: reset || unread });
        self.outward.writer.wake();
    }
}

/// An item in transit.
enum Item {
    Bytes(Vec<u8>),
    End { reset: bool },
}

/// One direction of a connection.
struct Pipe {
    sim: Sim,
    entity: Entity,
    capacity: usize,
    on_the_way: RefCell<VecDeque<Item>>,
    /// When the last of them arrives.
    last_arrival_ns: Cell<u64>,
    /// Bytes that wait to be received.
    arrived: RefCell<VecDeque<u8>>,
    /// Bytes in both.
    held: Cell<usize>,
    /// The result of the next receive, once nothing more will arrive.
    ended: Cell<Option<Result<usize, Errno>>>,
    /// The sending end was closed.
    closed: Cell<bool>,
    /// The sending end sends no more.
    finished: Cell<bool>,
    /// The receiving end was closed.
    given_up: Cell<bool>,
    sends: Cell<u64>,
    receives: Cell<u64>,
    reader: OneWaiter,
    writer: OneWaiter,
}

impl Pipe {
    fn new(sim: &Sim, connection: Entity, name: &'static str, capacity: usize) -> Rc<Self> {
        let entity = connection.child(name, 0);
        sim.name_entity(entity, || format!("{}, {name}", sim.name_of(connection)));
        Rc::new(Self {
            sim: sim.clone(),
            entity,
            capacity,
            on_the_way: RefCell::default(),
            last_arrival_ns: Cell::new(0),
            arrived: RefCell::default(),
            held: Cell::new(0),
            ended: Cell::new(None),
            closed: Cell::new(false),
            finished: Cell::new(false),
            given_up: Cell::new(false),
            sends: Cell::new(0),
            receives: Cell::new(0),
            reader: OneWaiter::default(),
            writer: OneWaiter::default(),
        })
    }

    /// A fault of the `n`-th operation of its kind here.
    fn fault(
        &self,
        role: &'static str,
        n: u64,
        label: &'static Label,
        kind: &'static FaultKind,
        draw: impl FnOnce(&mut Draw) -> u64,
    ) -> u64 {
        let rate_ppm = self.sim.swarm().rate_ppm(kind);
        let entity = self.entity.child(role, n);
        let value = self.sim.fault(entity, label, rate_ppm, draw);
        if value != 0 {
            self.sim.name_entity(entity, || format!("{}, {role} {n}", self.sim.name_of(self.entity)));
        }
        value
    }

    /// How many of `count` bytes an operation moves.
    fn cut(&self, role: &'static str, n: u64, label: &'static Label, count: usize) -> usize {
        match self.fault(role, n, label, &CUT, |d| d.magnitude(12)) {
            0 => count,
            most => count.min(usize::try_from(most).unwrap_or(usize::MAX)),
        }
    }

    fn is_reset_by_death(&self) -> bool {
        self.fault("death", 0, &PEER_RESET, &RESET, |_| 1) != 0
    }

    /// Sends a part of `list`.
    fn send(self: &Rc<Self>, list: &mut SendList, waker: &Waker) -> Poll<Result<(), Errno>> {
        if self.closed.get() || self.finished.get() || self.given_up.get() {
            return Poll::Ready(Err(Errno::EPIPE));
        }
        let room = self.capacity - self.held.get();
        if room == 0 {
            self.writer.wait(waker);
            return Poll::Pending;
        }
        let n = self.sends.replace(self.sends.get() + 1);
        let count = self.cut("send", n, &SEND_CUT, room.min(list.len()));
        let mut bytes = Vec::with_capacity(count);
        for piece in list.slices(usize::MAX) {
            let part = piece.len().min(count - bytes.len());
            bytes.extend_from_slice(&piece[..part]);
        }
        list.advance(count);
        self.held.set(self.held.get() + count);
        self.put(Item::Bytes(bytes));
        Poll::Ready(Ok(()))
    }

    /// Sends an item on its way.
    fn put(self: &Rc<Self>, item: Item) {
        let late = match item {
            Item::Bytes(_) => {
                self.fault("send", self.sends.get() - 1, &ARRIVE_LATE, &LATE, |d| d.magnitude(22))
            }
            Item::End { .. } => 0,
        };
        let soonest = self.sim.now_ns() + TRANSIT_NS + late;
        let at_ns = soonest.max(self.last_arrival_ns.get());
        self.last_arrival_ns.set(at_ns);
        self.on_the_way.borrow_mut().push_back(item);
        self.sim.call_at(at_ns, Rc::clone(self) as Rc<dyn Timed>, 0);
    }

    /// Drops what is in transit or was not received.
    fn lose(&self) {
        self.arrived.borrow_mut().clear();
        self.lose_on_the_way();
    }

    fn lose_on_the_way(&self) {
        for item in self.on_the_way.borrow_mut().iter_mut() {
            *item = Item::Bytes(Vec::new());
        }
        self.held.set(self.arrived.borrow().len());
    }

    /// The receiving end is closed.
    fn give_up(&self) {
        self.given_up.set(true);
        self.lose();
        self.ended.set(Some(Ok(0)));
        self.reader.wake();
        self.writer.wake();
    }

    /// Receives into `buf`.
    fn recv(&self, buf: &mut [u8], waker: &Waker) -> Poll<Result<usize, Errno>> {
        let mut arrived = self.arrived.borrow_mut();
        let count = arrived.len().min(buf.len());
        if count == 0 {
            if let Some(end) = self.ended.get() {
                return Poll::Ready(end);
            }
            self.reader.wait(waker);
            return Poll::Pending;
        }
        let n = self.receives.replace(self.receives.get() + 1);
        let count = self.cut("receive", n, &RECV_CUT, count);
        for (own, byte) in buf.iter_mut().zip(arrived.drain(..count)) {
            *own = byte;
        }
        self.held.set(self.held.get() - count);
        self.writer.wake();
        Poll::Ready(Ok(count))
    }
}

impl Timed for Pipe {
    fn fire(self: Rc<Self>, _: u64) {
        let item = self.on_the_way.borrow_mut().pop_front();
        match item {
            // A receiver that has given up gets nothing more.
            _ if self.given_up.get() => {}
            Some(Item::Bytes(bytes)) => self.arrived.borrow_mut().extend(bytes),
            Some(Item::End { reset }) => {
                self.ended.set(Some(if reset { Err(Errno::ECONNRESET) } else { Ok(0) }));
            }
            None => {}
        }
        self.reader.wake();
    }
}

/// A connected socket of a process.
#[derive(Clone)]
pub struct ProcessStream(Rc<Endpoint>);

struct Endpoint {
    process: Process,
    wire: Wire,
}

impl Endpoint {
    fn open(process: &Process, wire: Wire) -> ProcessStream {
        let own = wire.clone();
        // What the kernel does for a dead process.
        process.node().on_death(move || own.close(true));
        ProcessStream(Rc::new(Self { process: process.clone(), wire }))
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if self.process.node().is_alive() {
            self.wire.close(false);
        }
    }
}

impl ProcessStream {
    /// Ends only our direction: the peer sees the end, and may still answer.
    pub fn finish(&self) {
        if self.0.process.node().step() {
            self.0.wire.finish();
        }
    }
}

impl Stream for ProcessStream {
    fn recv(&self, buf: IoBuf, from: usize) -> impl Future<Output = (Result<usize, Errno>, IoBuf)> + 'static {
        let (node, pipe) = (self.0.process.node().clone(), Rc::clone(&self.0.wire.inward));
        let mut buf = Some(buf);
        poll_fn(move |cx| {
            let Some(into) = buf.as_mut().filter(|_| node.step()) else { return Poll::Pending };
            let Poll::Ready(result) = pipe.recv(&mut into[from..], cx.waker()) else { return Poll::Pending };
            buf.take().map_or(Poll::Pending, |buf| Poll::Ready((result, buf)))
        })
    }

    fn send(&self, list: SendList) -> impl Future<Output = (Result<(), Errno>, SendList)> + 'static {
        let (node, pipe) = (self.0.process.node().clone(), Rc::clone(&self.0.wire.outward));
        let mut list = list;
        poll_fn(move |cx| {
            if !node.step() {
                return Poll::Pending;
            }
            pipe.send(&mut list, cx.waker()).map(|result| (result, std::mem::take(&mut list)))
        })
    }

    fn shutdown(&self) {
        if self.0.process.node().step() {
            self.0.wire.close(false);
        }
    }

    fn abort(&self) {
        if self.0.process.node().step() {
            self.0.wire.abort();
        }
    }
}

/// A listening socket of a process.
pub struct ProcessListener {
    process: Process,
    address: SocketAddress,
    door: Rc<Door>,
}

impl Listener for ProcessListener {
    type Stream = ProcessStream;

    async fn accept(&self) -> Result<ProcessStream, Errno> {
        let node = self.process.node();
        poll_fn(|cx| {
            if !node.step() {
                return Poll::Pending;
            }
            let Some(wire) = self.door.waiting.borrow_mut().pop_front() else {
                self.door.acceptor.wait(cx.waker());
                return Poll::Pending;
            };
            Poll::Ready(Ok(Endpoint::open(&self.process, wire)))
        })
        .await
    }

    fn address(&self) -> SocketAddress {
        self.address.clone()
    }
}

/// No more connections are accepted at `door`.
fn shut(door: &Door, died: bool) {
    door.open.set(false);
    let waiting = std::mem::take(&mut *door.waiting.borrow_mut());
    waiting.into_iter().for_each(|wire| wire.close(died));
}

impl Drop for ProcessListener {
    fn drop(&mut self) {
        if !self.process.node().is_alive() {
            return;
        }
        shut(&self.door, false);
        self.process.network().listeners.borrow_mut().remove(&self.address);
    }
}

/// A new connection of `entity`, as one of its ends sees it.
fn new_wire(sim: &Sim, entity: Entity) -> Wire {
    let (last, rate_ppm) = (BUFFER_BYTES.len() as u64 - 1, sim.swarm().rate_ppm(&SMALL));
    let size = sim.fault(entity, &SOCKET_BUFFER, rate_ppm, |d| 1 + d.below(last));
    let capacity = BUFFER_BYTES[size.min(last) as usize];
    let outward = Pipe::new(sim, entity, "to the listener", capacity);
    let inward = Pipe::new(sim, entity, "from the listener", capacity);
    Wire { inward, outward }
}

impl Process {
    /// A stream to `kernel`, which has the other end; `key` tells those of one process apart.
    pub(crate) fn pair(&self, kernel: &Process, key: u64) -> (ProcessStream, ProcessStream) {
        let entity = self.sim().derive("device-stream", key);
        self.sim().name_entity(entity, || format!("{}'s stream of device {key}", self.node().name()));
        let wire = new_wire(self.sim(), entity);
        (Endpoint::open(self, wire.other_end()), Endpoint::open(kernel, wire))
    }

    /// Connections that were established on this machine so far, accepted or not.
    pub fn connections_established(&self) -> u64 {
        self.network().established.get()
    }
}

impl Sockets for Process {
    type Listener = ProcessListener;
    type Stream = ProcessStream;

    async fn listen(&self, address: &SocketAddress) -> Result<ProcessListener, Errno> {
        if !self.node().step() {
            pending::<()>().await;
        }
        let mut listeners = self.network().listeners.borrow_mut();
        let mut address = address.clone();
        if let SocketAddress::Tcp { host, port: 0 } = &address {
            let taken = |port: &u16| {
                let host = host.clone();
                listeners.get(&SocketAddress::Tcp { host, port: *port }).is_some_and(|door| door.open.get())
            };
            let free = (FIRST_FREE_PORT..).find(|port| !taken(port)).ok_or(Errno::EADDRNOTAVAIL)?;
            address = SocketAddress::Tcp { host: host.clone(), port: free };
        }
        if listeners.get(&address).is_some_and(|door| door.open.get()) {
            return Err(Errno::EADDRINUSE);
        }
        let door = Rc::new(Door::default());
        door.open.set(true);
        listeners.insert(address.clone(), Rc::clone(&door));
        let own = Rc::downgrade(&door);
        self.node().on_death(move || {
            // The path stays, without a listener.
            if let Some(door) = Weak::upgrade(&own) {
                shut(&door, true);
            }
        });
        Ok(ProcessListener { process: self.clone(), address, door })
    }

    /// All processes of the simulated hosts are root's.
    async fn listen_private(&self, path: &str) -> Result<ProcessListener, Errno> {
        self.listen(&SocketAddress::Unix(path.to_owned())).await
    }

    async fn connect(&self, address: &SocketAddress) -> Result<ProcessStream, Errno> {
        if !self.node().step() {
            pending::<()>().await;
        }
        let sim = self.sim();
        let shown = address.to_string();
        let entity = sim.derive("connection", text_hash(&shown));
        sim.name_entity(entity, || format!("{}'s connection to {shown}", self.node().name()));
        sim.sleep_ns(TRANSIT_NS).await;
        let door = self.network().listeners.borrow().get(address).map(Rc::clone);
        let Some(door) = door else {
            let unix = matches!(address, SocketAddress::Unix(_));
            return Err(if unix { Errno::ENOENT } else { Errno::ECONNREFUSED });
        };
        if !door.open.get() || door.waiting.borrow().len() >= BACKLOG || !self.node().step() {
            return Err(Errno::ECONNREFUSED);
        }
        let wire = new_wire(sim, entity);
        door.waiting.borrow_mut().push_back(wire.other_end());
        self.network().established.set(self.network().established.get() + 1);
        door.acceptor.wake();
        Ok(Endpoint::open(self, wire))
    }

    fn inherited(&self) -> Vec<ProcessListener> {
        Vec::new()
    }
}
