//! The server: exports nodes to any client that connects.
//!
//! ```text
//!   serve(listener) ──► connection task: negotiate, then read requests ──► Node::submit ──┐ ready at once, or
//!                       reply task: send what has queued up ◄─── Outbox ◄────────────────┘ a task per request
//! ```
//!
//! # Contract
//!
//! * **Options**: `LIST`, `INFO`, `GO`, `EXPORT_NAME`, `ABORT`, `STRUCTURED_REPLY`, `EXTENDED_HEADERS`,
//!   `LIST_META_CONTEXT` and `SET_META_CONTEXT` (`base:allocation`, `qemu:allocation-depth`), `STARTTLS`. All others
//!   are answered with `ERR_UNSUP`. The empty name is the first export, unless an export has that name.
//! * **TLS**: a server with certificates ([`Server::with_tls`]) answers every option but `STARTTLS` and `ABORT` with
//!   `ERR_TLS_REQD` until the handshake is done. A client that sends anything between `STARTTLS` and its answer loses
//!   its connection: such plain text must not be taken for what is sent securely. Without certificates `STARTTLS` is
//!   refused. The handshake is a part of [`ServerLimits::negotiation_ns`].
//! * **Commands**: `READ` (always one chunk, so `DF` changes nothing; 4 KiB or more of zeros are a hole, but not in
//!   simple replies), `WRITE`, `FLUSH`, `TRIM`, `WRITE_ZEROES`, `CACHE` (answered, nothing is read), `BLOCK_STATUS`,
//!   `DISC`. `FUA` goes down with the request.
//!   Offsets and lengths are any number of bytes. A write of a part of a sector reads the rest first, and holds off
//!   other writes of that sector; a trim is narrowed to whole sectors; a request of no bytes does nothing.
//! * **Several connections**: a flush covers what was answered on all of them, because every connection passes it to
//!   the same node, whose contract guarantees that.
//! * **Memory** comes from the one budget of the process. Each connection has a reserve of its own, enough for usual
//!   requests; larger requests wait their turn when there is no more. While one waits, the oldest connection whose
//!   client takes no reply, or sends none of the data it announced, for [`ServerLimits::grace_ns`] is closed.
//! * **Limits**: each connection has memory, requests in flight and a receive buffer of its own, and is not read from
//!   while any of them is used up. So a client that sends too much, or takes no replies, holds up only itself. The
//!   total is bounded, see [`ServerLimits::memory_bytes`].
//! * **Places**: a client that has chosen an export has one of [`ServerLimits::connections`]; if there is none left, it
//!   is told so and may try again. A client that has not chosen yet has one of [`ServerLimits::negotiating`]; if there
//!   are more, the oldest is closed. A client that has stopped sending gets the replies it asked for, and loses its
//!   place when it takes none of them for [`ServerLimits::grace_ns`]; any other client that takes nothing loses its
//!   place when another wants it.
//! * **Errors**: a client that breaks the protocol loses its connection, with one event that says why. The requests
//!   that it sent before are finished.
//! * **After a broken connection** no more of its requests are started: once a reply could not be sent, requests that
//!   the client had sent and that were not yet read are dropped. A client that reconnects and repeats requests relies
//!   on this.
//! * [`Server::stop`] ends in an orderly way: no new connection or request is taken, those in flight end, their replies
//!   are sent, streams are closed. Nodes are left to their owner. Zeros and trims of so many bytes that they go to the
//!   node in pieces end with the piece that is under way, and get no reply.
//! * [`Server::hang_up`] ends at once: no reply is sent any more. A client that connects again repeats what has none.

mod command;
mod connection;
mod ending;
mod limits;
mod memory;
mod negotiate;
mod reply;
mod status;
mod unaligned;

pub use limits::ServerLimits;

use crate::stop::StopSignal;
use ending::NBD_DEAF_KEPT;
use limits::RECEIVE_BYTES_MIN;
use memory::Memory;
use rustls::ServerConfig;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use tap_core::wait::Event as Flag;
use tap_core::{Node, Tracker};
use tap_host::{
    Budget, BufPool, Errno, Event, Listener, Log, Probe, Share, Stage, Stream, Tasks, Time, VbdId, unless,
};

tap_host::listed! {
    pub(super) BUGS: Bug with [status::BUGS, connection::BUGS, ending::BUGS, unaligned::BUGS];
    NBD_LAST_IS_FIRST = "nbd-last-is-first",
        "a server that ends with its last client ends with the first that leaves";
    NBD_MEMORY_KEPT = "nbd-memory-kept", "a client that takes no replies keeps memory that others wait for";
}

tap_host::listed! {
    pub(super) MARKS: Mark with [connection::MARKS, unaligned::MARKS];
}

/// A node that clients can choose.
#[derive(Clone)]
pub struct Export {
    /// The name that clients ask for; at most 4096 bytes.
    pub name: String,
    /// For people; at most 4096 bytes.
    pub description: String,
    /// The node that serves it.
    pub node: Rc<dyn Node>,
    /// Writes are refused, even if the node accepts them.
    pub read_only: bool,
}

impl Export {
    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only || self.node.info().read_only
    }
    pub(crate) fn size_sectors(&self) -> u64 {
        // Offsets are 64 bits of bytes.
        self.node.info().size_sectors.min(u64::MAX / tap_host::SECTOR_BYTES)
    }
}

/// An export with what its connections share.
pub(crate) struct Served {
    export: Export,
    /// Writes of parts of sectors that have not submitted their last request, and the writes that wait for them.
    pub(crate) edges: Tracker,
}

impl Served {
    fn new(export: Export) -> Self {
        Self { export, edges: Tracker::new() }
    }
}

impl Deref for Served {
    type Target = Export;

    fn deref(&self) -> &Export {
        &self.export
    }
}

/// Why a server cannot be built from its exports.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ExportError {
    /// There is none.
    #[error("serve anything: there is no export")]
    None,
    /// A name or description is longer than the protocol allows.
    #[error("export '{0}': its name or description is longer than 4096 bytes; choose a shorter one")]
    TooLong(String),
    /// The memory of the process is not enough.
    #[error(
        "serve: its memory of {0} bytes is not enough; give more (--memory), serve fewer disks, or take fewer clients (--connections)"
    )]
    Memory(usize),
    /// Two exports have the same name.
    #[error("export '{0}' twice; give each export a name of its own")]
    Twice(String),
}

/// A server; clones share it.
pub struct Server<H>(Rc<Inner<H>>);

pub(crate) struct Inner<H> {
    pub(crate) host: H,
    pub(crate) exports: Vec<Rc<Served>>,
    pub(crate) limits: ServerLimits,
    next: Cell<u64>,
    /// Its disk, in events, if the process has servers of others.
    vbd: Cell<Option<VbdId>>,
    /// Every connection that is open.
    open: RefCell<BTreeMap<u64, Open>>,
    /// Called whenever a connection was opened or has ended.
    listener: RefCell<Option<Rc<dyn Fn()>>>,
    /// The connections that have not chosen an export.
    negotiating: RefCell<BTreeSet<u64>>,
    /// Set by [`Server::stop`] and [`Server::hang_up`].
    stopping: Flag,
    /// Set by [`Server::hang_up`].
    hung_up: Flag,
    /// Set while no connection is open.
    idle: Flag,
    /// A client has chosen an export.
    chosen: Cell<bool>,
    /// Set when no connection is open any more after one had chosen an export.
    left: Flag,
    /// How connections are secured, which every client must then accept.
    tls: Option<Arc<ServerConfig>>,
    /// A task is looking for connections on which nothing moves.
    looking: Cell<bool>,
    memory: Memory,
}

/// A connection that is open.
#[derive(Clone)]
pub(crate) struct Open {
    /// Tells it to end.
    stop: Rc<StopSignal>,
    /// Memory of its requests.
    pool: BufPool,
    flow: Rc<Flow>,
}

/// Whether its client takes replies, and sends the data it announced.
#[derive(Default)]
pub(crate) struct Flow {
    /// A send is under way.
    sending: Cell<bool>,
    /// Sends that have ended.
    sends: Cell<u64>,
    /// The data of a write is awaited, with its memory already taken.
    receiving: Cell<bool>,
    /// Receives that have ended.
    receives: Rc<Cell<u64>>,
}

/// The transfers under way at some moment: for each direction, how many had ended before.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Transfers {
    send: Option<u64>,
    receive: Option<u64>,
}

impl Flow {
    /// A value that changes as soon as the client has taken or sent something.
    fn seen(&self) -> Transfers {
        Transfers {
            send: self.sending.get().then(|| self.sends.get()),
            receive: self.receiving.get().then(|| self.receives.get()),
        }
    }

    /// Whether a transfer has been under way since `before` was recorded, without progress.
    fn is_stuck(&self, before: Transfers) -> bool {
        let now = self.seen();
        (before.send.is_some() && now.send == before.send)
            || (before.receive.is_some() && now.receive == before.receive)
    }
}

impl<H> Clone for Server<H> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

/// Why a client that has chosen an export is refused.
pub(crate) const FULL: &str = "there are too many connections";

/// How long the server waits after a connection could not be accepted, in nanoseconds.
const ACCEPT_PAUSE_NS: u64 = 100_000_000;

/// How a stream has ended that was served without negotiation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Parted {
    /// The client has disconnected.
    InOrder,
    /// The server stops.
    Stopped,
    /// The stream broke, or the client broke the protocol.
    Broken,
}

/// Why connections end when the server does.
pub(crate) const STOPPED: &str = "the server stops";
/// Why connections end when the server does at once.
const HUNG_UP: &str = "the server hangs up";

impl<H: Time + Tasks + Log + Probe> Server<H> {
    /// A server of `exports`, with memory from `memory`; values of `limits` that are out of range are clamped.
    ///
    /// # Errors
    /// [`ExportError`].
    pub fn new(
        host: H,
        exports: Vec<Export>,
        limits: ServerLimits,
        memory: &Budget,
    ) -> Result<Self, ExportError> {
        Self::build(host, exports, limits, memory, None)
    }

    /// As [`Server::new`]; clients must secure their connections as `tls` says.
    ///
    /// # Errors
    /// [`ExportError`].
    pub fn with_tls(
        host: H,
        exports: Vec<Export>,
        limits: ServerLimits,
        memory: &Budget,
        tls: Arc<ServerConfig>,
    ) -> Result<Self, ExportError> {
        Self::build(host, exports, limits, memory, Some(tls))
    }

    fn build(
        host: H,
        exports: Vec<Export>,
        limits: ServerLimits,
        memory: &Budget,
        tls: Option<Arc<ServerConfig>>,
    ) -> Result<Self, ExportError> {
        if exports.is_empty() {
            return Err(ExportError::None);
        }
        for (i, export) in exports.iter().enumerate() {
            if export.name.len().max(export.description.len()) > tap_abi::nbd::STRING_BYTES_MAX {
                return Err(ExportError::TooLong(export.name.clone()));
            }
            if exports[..i].iter().any(|other| other.name == export.name) {
                return Err(ExportError::Twice(export.name.clone()));
            }
        }
        let limits = limits.in_range().within(memory);
        let limit = memory.figures().limit_bytes;
        let memory = Memory::new(&limits, memory, tls.is_some()).map_err(|_| ExportError::Memory(limit))?;
        let idle = Flag::new();
        idle.set();
        Ok(Self(Rc::new(Inner {
            host,
            exports: exports.into_iter().map(Served::new).map(Rc::new).collect(),
            limits,
            next: Cell::new(1),
            vbd: Cell::new(None),
            open: RefCell::default(),
            listener: RefCell::default(),
            negotiating: RefCell::default(),
            stopping: Flag::new(),
            hung_up: Flag::new(),
            idle,
            chosen: Cell::new(false),
            left: Flag::new(),
            looking: Cell::new(false),
            tls,
            memory,
        })))
    }

    /// Names its disk in events, for a process that has a server for each of several.
    pub fn name_disk(&self, vbd: VbdId) {
        self.0.vbd.set(Some(vbd));
    }

    /// The limits that apply to clients.
    pub fn limits(&self) -> ServerLimits {
        self.0.limits
    }

    /// What the first export can do for a client of [`Server::transmit`]: the protocol's transmission flags.
    pub fn flags(&self) -> u16 {
        negotiate::flags_of(&self.0.exports[0], false)
    }

    /// Calls `listener` whenever a connection was opened or has ended, from within the change; replaces the one before.
    pub fn on_change(&self, listener: impl Fn() + 'static) {
        *self.0.listener.borrow_mut() = Some(Rc::new(listener));
    }

    /// Connections that are open now.
    pub fn connections(&self) -> usize {
        self.0.open.borrow().len()
    }

    /// Bytes of memory that requests of all connections hold now.
    pub fn used_bytes(&self) -> usize {
        self.0.open.borrow().values().map(|open| open.pool.used_bytes()).sum()
    }

    /// Accepts connections of `listener` until the server is stopped. Several may run at the same time.
    pub async fn serve<L: Listener>(&self, listener: L) {
        let inner = &self.0;
        let mut stopping = pin!(inner.stopping.wait());
        loop {
            let Some(accepted) = unless(stopping.as_mut(), listener.accept()).await else { return };
            match accepted {
                Ok(stream) => self.take(stream),
                Err(_) => {
                    inner.refused("it could not be accepted");
                    let pause = inner.host.sleep_ns(ACCEPT_PAUSE_NS);
                    if unless(stopping.as_mut(), pause).await.is_none() {
                        return;
                    }
                }
            }
        }
    }

    /// Serves one connected stream in a task of its own; closes it if the limits or a stop require that.
    pub fn take<S: Stream>(&self, stream: S) {
        let inner = &self.0;
        if inner.stopping.is_set() {
            inner.refused(STOPPED);
            return stream.shutdown();
        }
        inner.make_room();
        let (number, open) = inner.admit();
        inner.negotiating.borrow_mut().insert(number);
        let own = Rc::clone(inner);
        inner.host.spawn("nbd-connection", number, async move {
            own.host.log(Event::NbdConnected { connection: number, vbd: own.vbd.get() });
            let (why, requests) = connection::run(&own, number, stream, open).await;
            own.dismiss(number, requests, why);
        });
    }

    /// Serves a stream whose client and we have agreed beforehand: on the first export, with simple replies. Polled to
    /// its end; nothing of the stream is carried out any more then.
    pub async fn transmit<S: Stream>(&self, stream: S) -> Parted {
        let inner = &self.0;
        if inner.stopping.is_set() {
            stream.shutdown();
            return Parted::Stopped;
        }
        let (number, open) = inner.admit();
        inner.host.log(Event::NbdConnected { connection: number, vbd: inner.vbd.get() });
        let (why, requests) = connection::transmit(inner, number, stream, open).await;
        inner.dismiss(number, requests, why);
        match why {
            connection::LEFT => Parted::InOrder,
            STOPPED | HUNG_UP => Parted::Stopped,
            _ => Parted::Broken,
        }
    }

    /// Completes once the last client has left: one had chosen an export, and no open connection has.
    pub async fn left(&self) {
        self.0.left.wait().await;
    }
}

impl<H: Log + Tasks + Time + Probe> Inner<H> {
    /// A new connection, with its number.
    fn admit(&self) -> (u64, Open) {
        let number = self.next.replace(self.next.get() + 1);
        let pool = BufPool::new(self.limits.connection_bytes);
        let open = Open { stop: Rc::default(), pool, flow: Rc::default() };
        self.open.borrow_mut().insert(number, open.clone());
        self.idle.clear();
        self.changed();
        (number, open)
    }

    fn changed(&self) {
        let listener = self.listener.borrow().clone();
        listener.iter().for_each(|listener| listener());
    }

    /// A connection has ended.
    fn dismiss(&self, number: u64, requests: u64, why: &'static str) {
        self.host.log(Event::NbdClosed { connection: number, requests, why, vbd: self.vbd.get() });
        self.open.borrow_mut().remove(&number);
        self.negotiating.borrow_mut().remove(&number);
        self.changed();
        if self.open.borrow().is_empty() {
            self.idle.set();
        }
        // A connection that has not chosen an export is not a client yet.
        let none = self.open.borrow().len() == self.negotiating.borrow().len();
        if self.chosen.get() && (none || self.host.bug(&NBD_LAST_IS_FIRST)) {
            self.left.set();
        }
    }

    /// Takes a place among the clients that have chosen, for connection `number`; false if all are taken. In that case
    /// a search starts for a place that is not in use.
    pub(crate) fn seat(self: &Rc<Self>, number: u64) -> bool {
        let seated = self.open.borrow().len() - self.negotiating.borrow().len();
        if seated < self.limits.connections {
            let seated = self.negotiating.borrow_mut().remove(&number);
            self.chosen.set(self.chosen.get() || seated);
            return seated;
        }
        self.look_for_place(number);
        false
    }

    /// Starts a search for a connection on which nothing moves, on behalf of connection `number`.
    fn look_for_place(self: &Rc<Self>, number: u64) {
        if !self.looking.replace(true) {
            let own = Rc::clone(self);
            self.host.spawn("nbd-places", number, async move { own.free_place().await });
        }
    }

    /// `bytes` of memory for a request of connection `number`, whose reserve is `own`.
    pub(crate) async fn memory_for(
        self: &Rc<Self>,
        number: u64,
        own: &Stage,
        bytes: usize,
    ) -> Result<Share, Errno> {
        if let Some(share) = own.try_take(bytes) {
            return Ok(share);
        }
        if bytes <= own.guarantee_bytes() {
            return own.take(bytes).await;
        }
        let mut taken = pin!(self.memory.large.take(bytes));
        loop {
            if !self.host.bug(&NBD_MEMORY_KEPT) {
                self.look_for_place(number);
            }
            let pause = self.host.sleep_ns(self.limits.grace_ns);
            if let Some(share) = unless(pause, taken.as_mut()).await {
                return share;
            }
        }
    }

    /// Takes the place of the oldest connection on which nothing moves for [`ServerLimits::grace_ns`]: its client takes
    /// no reply, or does not send the data it announced.
    async fn free_place(self: Rc<Self>) {
        let seen = |open: &BTreeMap<u64, Open>| -> Vec<_> {
            open.iter().map(|(n, o)| (*n, o.flow.seen())).collect()
        };
        let before = seen(&self.open.borrow());
        self.host.sleep_ns(self.limits.grace_ns).await;
        self.looking.set(false);
        let open = self.open.borrow();
        let deaf = before.iter().find_map(|(n, seen)| open.get(n).filter(|o| o.flow.is_stuck(*seen)));
        if let Some(deaf) = deaf.filter(|_| !self.host.bug(&NBD_DEAF_KEPT)) {
            deaf.stop.set("it took no reply, or sent no data, while others wanted its place");
        }
    }
}

impl<H: Log> Inner<H> {
    fn refused(&self, why: &'static str) {
        self.host.log(Event::NbdRefused { connection: self.next.get(), why, vbd: self.vbd.get() });
    }

    /// Closes the oldest connection that has not chosen yet, if their number is at its limit: it has had the longest
    /// time, and a silent client must not keep out others.
    fn make_room(&self) {
        let oldest = self.negotiating.borrow().first().copied();
        if self.negotiating.borrow().len() < self.limits.negotiating {
            return;
        }
        let Some(oldest) = oldest else { return };
        self.negotiating.borrow_mut().remove(&oldest);
        if let Some(open) = self.open.borrow().get(&oldest) {
            open.stop.set("others wanted to choose an export meanwhile");
        }
        assert!(self.negotiating.borrow().len() < self.limits.negotiating, "there is no room to negotiate");
    }

    /// The export called `name`.
    pub(crate) fn export(&self, name: &str) -> Option<&Rc<Served>> {
        let named = self.exports.iter().find(|export| export.name == name);
        named.or_else(|| self.exports.first().filter(|_| name.is_empty()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_stuck_if_a_transfer_began_before_and_has_not_gone_on() {
        let count = |cell: &Cell<u64>| cell.set(cell.get() + 1);
        let flow = Flow::default();
        assert!(!flow.is_stuck(flow.seen()), "nothing is under way");
        for (under_way, ended) in [(&flow.sending, &flow.sends), (&flow.receiving, &*flow.receives)] {
            let idle = flow.seen();
            under_way.set(true);
            assert!(!flow.is_stuck(idle), "it has only begun");
            let before = flow.seen();
            assert!(flow.is_stuck(before));
            count(ended);
            assert!(!flow.is_stuck(before), "slow is not stuck");
            under_way.set(false);
        }
    }
}
