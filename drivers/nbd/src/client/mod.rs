//! The client: a [`Node`] whose disk is an export of a server.
//!
//! ```text
//!   submit ──► Call ──► pending, by cookie ──► Link: Outbox ──► stream
//!                           │     ▲                  Inlet  ◄──
//!                           │     └── answered ◄───────┘
//!                           └── sent again when the connection broke
//! ```
//!
//! # Contract
//!
//! * Connects with `GO`, extended headers or structured replies, and `base:allocation` where the server has them,
//!   otherwise with `EXPORT_NAME` and simple replies. What the server cannot do is substituted: zeros are written,
//!   discards are dropped, a flush without `FLUSH` does nothing, extents without `base:allocation` are data. Requests
//!   larger than it accepts are split.
//! * **A connection that breaks** is re-established, after pauses that double, and what was in flight is sent again.
//!   Requests wait for it until [`ClientConfig::reconnect_ns`] is over; from then on they fail with `ENOTCONN`, while
//!   attempts continue. A request that is not answered within [`ClientConfig::request_ns`] breaks the connection. A
//!   server that comes back with a smaller size or fewer capabilities is another disk: every later request fails.
//! * **Repeated requests**: the caller keeps overlapping requests apart, so carrying out a request twice changes
//!   nothing. Only a server that still carries out requests of a broken connection, later than those of a new one,
//!   could bring back old bytes. The protocol has no fence against that. A broken connection is aborted, so nothing
//!   still in transit arrives late; a server that died carries nothing out, and ours starts nothing more once it sees
//!   that the connection broke. That leaves the requests that wait in the server's receive buffer.
//! * **A server that lies** is not believed: a read gets every byte exactly once, or fails. A reply that does not fit
//!   its request (a wrong place, bytes that arrived before, too many pieces, an unknown cookie) breaks the connection.
//! * **Flush**: a flush makes durable what was answered before. If the connection breaks in between, the server may
//!   have died and come back without writes that it had answered, and a flush on the new connection would say nothing
//!   about them. So with [`Breaks::MayLose`] each flush that should cover such writes fails with `EIO`, and, because
//!   what was lost stays lost, so does every later flush, until the disk is opened again. With [`Breaks::Keep`] the
//!   caller asserts that the server's machine lives on, and with it everything that was answered: a server on the same
//!   machine that accepts writes into the host's page cache before it answers, as ours does. With FUA nothing is lost.

mod covered;
mod drive;
mod link;
mod negotiate;

use crate::wire::Wire;
use covered::Covered;
use drive::Attempt;
use link::{Link, Pending};
use negotiate::{Memory, Terms, negotiate};
use rustls::pki_types::ServerName;
use smallvec::SmallVec;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::pending;
use std::rc::Rc;
use std::sync::Arc;
use tap_abi::nbd::{
    CMD_BLOCK_STATUS, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, STATE_HOLE, STATE_ZERO,
    command, export,
};
use tap_core::wait::{Event as Flag, Semaphore, oneshot};
use tap_core::{Extent, LocalBoxFuture, Node, NodeInfo, NodeName, Op, Request, Response, Source, ZeroFlags};
use tap_host::{
    Budget, Errno, IoBuf, IoVec, Log, Probe, SECTOR_BYTES, SectorRange, SocketAddress, Sockets, Stage, Tasks,
    Time, copy_from_slice, copy_to_slice, cost_of, unless,
};

tap_host::listed! {
    pub(super) BUGS: Bug with [drive::BUGS, link::BUGS, negotiate::BUGS];
    NBD_INLET_ANEW = "nbd-inlet-anew",
        "an NBD client that reconnects asks for memory that the requests waiting for it may hold";
    NBD_GREETING_AWAITED = "nbd-greeting-awaited", "an NBD client waits for a greeting without limit";
    NBD_FLUSH_AFTER_BREAK = "nbd-flush-after-break",
        "a flush succeeds although the connection broke between it and a write that was answered";
    NBD_CLOSED_CONNECTS = "nbd-closed-connects",
        "an NBD client that is closed while it has no connection continues to look for one";
}

tap_host::listed! {
    pub(super) MARKS: Mark with [drive::MARKS, link::MARKS];
    NBD_SPLIT = "nbd-split", "a request was larger than the NBD server takes";
}

/// What becomes of answered writes that were not flushed when the connection breaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Breaks {
    /// They may be lost: the server's machine may have gone down.
    #[default]
    MayLose,
    /// They are still there: only the connection or the server's process can go.
    Keep,
}

/// How a connection to a server is secured.
#[derive(Clone, Debug)]
pub struct ClientTls {
    /// Whom to trust, and our own certificate.
    pub config: Arc<rustls::ClientConfig>,
    /// The name that the server's certificate must be for.
    pub name: ServerName<'static>,
}

/// How to reach a server, and how long to wait for it.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Where it listens.
    pub address: SocketAddress,
    /// The export's name; empty for the default one.
    pub export: String,
    /// How the connection is secured; nothing is asked of a server that cannot do that. Without it, a server that
    /// requires TLS refuses us.
    pub tls: Option<ClientTls>,
    /// Writes are refused, even if the server accepts them.
    pub read_only: bool,
    /// What a broken connection means for answered writes.
    pub breaks: Breaks,
    /// Requests on the wire at one time, at least 1.
    pub requests: usize,
    /// Receive buffer in bytes, 16 KiB to 4 MiB.
    pub receive_bytes: usize,
    /// Longest time for connecting and choosing the export, in nanoseconds.
    pub connect_ns: u64,
    /// Longest time for one request in nanoseconds. A flush, or zeros over a large range, may take a server minutes;
    /// the host detects a dead machine sooner (TCP keepalive).
    pub request_ns: u64,
    /// First pause between two attempts to connect again, in nanoseconds; doubles up to `pause_most_ns`.
    pub pause_ns: u64,
    /// Longest pause between two attempts in nanoseconds.
    pub pause_most_ns: u64,
    /// How long requests wait for a server that went away or stopped answering, in nanoseconds.
    pub reconnect_ns: u64,
    /// How long a request is repeated that servers refuse because they end, in nanoseconds; 0 is as other clients do.
    pub refused_ns: u64,
    /// The budget from which the receive buffer and parts of requests are taken.
    pub memory: Budget,
}

impl ClientConfig {
    /// The default export at `address`, with timeouts that survive a restart of the server.
    pub fn new(address: SocketAddress) -> Self {
        Self {
            address,
            export: String::new(),
            tls: None,
            read_only: false,
            breaks: Breaks::default(),
            requests: 64,
            receive_bytes: 256 << 10,
            connect_ns: 10_000_000_000,
            request_ns: 300_000_000_000,
            pause_ns: 100_000_000,
            pause_most_ns: 5_000_000_000,
            reconnect_ns: 60_000_000_000,
            refused_ns: 60_000_000_000,
            memory: Budget::default(),
        }
    }
}

/// Why a client could not be made.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ClientError {
    /// No server answers.
    #[error("connect to {0}: {1}; {advice}", advice = advice(*.1))]
    Connect(SocketAddress, Errno),
    /// The certificates that [`ClientConfig::tls`] should come from cannot be used.
    #[error("{0}")]
    Certificates(String),
    /// The memory of the process is not enough.
    #[error("connect to {0}: there is no memory for it; give more (--memory), or serve fewer disks")]
    Memory(SocketAddress),
    /// The connection broke, or took too long, before the export was chosen.
    #[error("agree with the server at {0}: {1}")]
    Negotiation(SocketAddress, &'static str),
    /// The server refuses the export.
    #[error("open the export '{1}' at {0}: the server says: {2}")]
    Refused(SocketAddress, String, String),
}

fn advice(error: Errno) -> &'static str {
    match error {
        Errno::EHOSTUNREACH => "is the name of the host right?",
        Errno::ENOTSOCK => "a file or folder has this path",
        Errno::EACCES => "the socket belongs to another user",
        _ => "is the server running?",
    }
}

/// A disk served over NBD; clones share it. Ends with [`Node::close`].
pub struct Client<H: Sockets>(Rc<Inner<H>>);

impl<H: Sockets> Clone for Client<H> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

struct Inner<H: Sockets> {
    host: H,
    config: ClientConfig,
    /// What the first connection negotiated; later ones offer no less.
    name: NodeName,
    terms: Terms,
    link: RefCell<Option<Rc<LinkOf<H>>>>,
    /// Unanswered requests, sent or not.
    pending: RefCell<BTreeMap<u64, Pending>>,
    /// Set when there is one more.
    busy: Flag,
    next: Cell<u64>,
    permits: Semaphore,
    /// The error with which all requests are answered.
    refusal: Cell<Option<Errno>>,
    closed: Cell<bool>,
    /// Set by `close`, for the task of `drive` while it is between two connections.
    stop: crate::stop::StopSignal,
    /// Writes that were answered, and how many of them a flush has covered.
    answered: Cell<u64>,
    flushed: Cell<u64>,
    /// Answered writes may be gone.
    lost: Cell<bool>,
    /// Replies received from the server.
    replies: Cell<u64>,
    attempt: Cell<Option<Attempt>>,
    connections: Cell<u64>,
    memory: Memory,
    /// Memory for parts of requests larger than the server accepts, and for zeros if it cannot make them.
    parts: Stage,
}

/// One request on the wire.
#[derive(Debug, Default)]
struct Call {
    command: u16,
    flags: u16,
    offset: u64,
    len: u64,
    /// Where the data of a read goes.
    bufs: IoVec,
    /// The data of a write.
    payload: SmallVec<[Rc<IoBuf>; 1]>,
    /// The answer to a block status: bytes and state.
    extents: Vec<(u64, u32)>,
    /// The bytes of a read that have arrived.
    got: Covered,
    error: Option<Errno>,
    /// For a flush: the writes that it covers.
    covers: u64,
    sent_ns: u64,
    refused_ns: Option<u64>,
}

impl Call {
    fn new(command: u16, flags: u16, range: SectorRange) -> Self {
        let (offset, len) = (range.start.0 * SECTOR_BYTES, range.len_bytes());
        Self { command, flags, offset, len, ..Self::default() }
    }
    fn is_write(&self) -> bool {
        matches!(self.command, CMD_WRITE | CMD_WRITE_ZEROES | CMD_TRIM)
    }
}

/// Most bytes of one request without payload: small enough for every server.
const RANGE_BYTES_MAX: u64 = 1 << 30;
/// Most bytes of one query for extents with extended headers. Zeros and trims of that size could take longer than
/// [`ClientConfig::request_ns`].
const LONG_QUERY_BYTES_MAX: u64 = 1 << 40;
/// Most bytes of the buffer that a split request goes through.
const PART_BYTES_MAX: u32 = 1 << 20;
const SECTOR: u32 = SECTOR_BYTES as u32;

impl<H: Sockets + Time + Tasks + Log + Probe> Client<H> {
    /// Connects, and returns the export as a node.
    ///
    /// # Errors
    /// [`ClientError`]; a failed first connection is not retried.
    pub async fn connect(host: H, config: ClientConfig) -> Result<Self, ClientError> {
        let memory = Memory::of(&config)?;
        let name = NodeName::new(&config.address.to_string());
        let (terms, stream, inlet) = open(&host, &config, &memory).await?;
        let part = cost_of(terms.request_bytes.min(PART_BYTES_MAX) as usize);
        let parts = config.memory.stage(part).map_err(|_| ClientError::Memory(config.address.clone()))?;
        let inner = Rc::new(Inner {
            permits: Semaphore::new(config.requests.max(1)),
            host,
            config,
            name,
            terms,
            link: RefCell::default(),
            pending: RefCell::default(),
            busy: Flag::new(),
            next: Cell::new(1),
            refusal: Cell::new(None),
            closed: Cell::new(false),
            stop: crate::stop::StopSignal::default(),
            answered: Cell::new(0),
            flushed: Cell::new(0),
            lost: Cell::new(false),
            replies: Cell::new(0),
            attempt: Cell::new(None),
            connections: Cell::new(0),
            memory,
            parts,
        });
        let link = inner.start(stream, &terms);
        let own = Rc::clone(&inner);
        inner.host.spawn("nbd-client", 0, async move { own.drive(link, inlet).await });
        Ok(Self(inner))
    }

    /// Connections made so far, including the first one.
    pub fn connections(&self) -> u64 {
        self.0.connections.get()
    }

    /// Unanswered requests.
    pub fn in_flight(&self) -> usize {
        self.0.pending.borrow().len()
    }
}

type LinkOf<H> = Link<Wire<<H as Sockets>::Stream>>;
type Opened<S> = (Terms, Wire<S>, crate::inlet::Inlet<Wire<S>>);

/// One attempt to reach the export.
async fn open<H>(host: &H, config: &ClientConfig, memory: &Memory) -> Result<Opened<H::Stream>, ClientError>
where
    H: Sockets + Time + Probe,
{
    let address = &config.address;
    let patience = async {
        if host.bug(&NBD_GREETING_AWAITED) { pending().await } else { host.sleep_ns(config.connect_ns).await }
    };
    let attempt = async {
        let stream = host.connect(address).await.map_err(|e| ClientError::Connect(address.clone(), e))?;
        let stream = Wire::new(stream);
        let anew = if host.bug(&NBD_INLET_ANEW) { Some(Memory::of(config)?) } else { None };
        let (terms, inlet) = negotiate(host, &stream, config, anew.as_ref().unwrap_or(memory)).await?;
        Ok((terms, stream, inlet))
    };
    let late = || ClientError::Negotiation(address.clone(), "it took too long");
    unless(patience, attempt).await.unwrap_or_else(|| Err(late()))
}

impl<H: Sockets + Time + Tasks + Log + Probe> Inner<H> {
    fn info(&self) -> NodeInfo {
        let read_only = self.config.read_only || self.terms.has(export::READ_ONLY);
        NodeInfo {
            physical_block_bytes: self.terms.block_bytes,
            discard_bytes: self.terms.block_bytes,
            max_sectors: self.terms.request_bytes / SECTOR,
            ..NodeInfo::new(self.terms.size_bytes / SECTOR_BYTES, read_only)
        }
    }

    /// Flag for requests that change the disk, durable when answered if `fua`.
    fn flag(&self, fua: bool) -> u16 {
        if fua && self.terms.has(export::SEND_FUA) { command::FUA } else { 0 }
    }

    async fn execute(self: &Rc<Self>, request: Request) -> Response {
        if let Err(error) = self.info().check(&request) {
            return Response { result: Err(error), bufs: request.bufs };
        }
        let (op, range, fua) = (request.op, request.range, request.fua);
        match op {
            Op::Read | Op::Write if range.len_bytes() > u64::from(self.terms.request_bytes) => {
                self.host.mark(&NBD_SPLIT);
                self.split(request, fua).await
            }
            Op::Read => self.read(range, request.bufs).await,
            Op::Write => self.write(range, request.bufs, fua).await,
            Op::Flush => Response { result: self.flush().await, bufs: request.bufs },
            Op::WriteZeroes(flags) => {
                Response { result: self.write_zeroes(range, flags, fua).await, bufs: request.bufs }
            }
            Op::Discard => Response { result: self.discard(range, fua).await, bufs: request.bufs },
        }
    }

    async fn read(self: &Rc<Self>, range: SectorRange, bufs: IoVec) -> Response {
        let call = Call { bufs, ..Call::new(CMD_READ, 0, range) };
        let (result, call) = self.call(call).await;
        Response { result, bufs: call.bufs }
    }

    async fn write(self: &Rc<Self>, range: SectorRange, bufs: IoVec, fua: bool) -> Response {
        let payload = bufs.into_iter().map(Rc::new).collect();
        let call = Call { payload, ..Call::new(CMD_WRITE, self.flag(fua), range) };
        let (result, call) = self.call(call).await;
        // If the host still holds what it has sent, this returns a copy; the original returns to its pool from there.
        let back = |buf| Rc::try_unwrap(buf).or_else(|shared: Rc<IoBuf>| IoBuf::copy_of(&shared)).ok();
        let bufs: IoVec = call.payload.into_iter().filter_map(back).collect();
        let result = if result.is_ok() { self.durable(fua).await } else { result };
        Response { result, bufs }
    }

    /// A request larger than the server accepts, part by part through a buffer.
    async fn split(self: &Rc<Self>, request: Request, fua: bool) -> Response {
        let Request { op, range, mut bufs, .. } = request;
        let part_sectors = self.terms.request_bytes.min(PART_BYTES_MAX) / SECTOR;
        let (mut at, mut result) = (0, Ok(()));
        while at < range.count && result.is_ok() {
            let part = SectorRange::new(range.start.0 + u64::from(at), part_sectors.min(range.count - at));
            let from = at as usize * SECTOR as usize;
            result = self.part((op, fua), part, from, &mut bufs).await;
            at += part.count;
        }
        Response { result, bufs }
    }

    async fn part(
        self: &Rc<Self>,
        (op, fua): (Op, bool),
        part: SectorRange,
        from: usize,
        bufs: &mut IoVec,
    ) -> Result<(), Errno> {
        let mut own = self.parts.buffer(part.len_bytes() as usize).await?;
        if op == Op::Read {
            let response = self.read(part, IoVec::from_iter([own])).await;
            response.result?;
            let data = response.bufs.first().ok_or(Errno::EIO)?;
            copy_from_slice(bufs, from, data);
            return Ok(());
        }
        copy_to_slice(bufs, from, &mut own);
        self.write(part, IoVec::from_iter([own]), fua).await.result
    }

    async fn write_zeroes(
        self: &Rc<Self>,
        range: SectorRange,
        flags: ZeroFlags,
        fua: bool,
    ) -> Result<(), Errno> {
        let can_be_fast = self.terms.has(export::SEND_WRITE_ZEROES | export::SEND_FAST_ZERO);
        if flags.fast && !can_be_fast {
            return Err(Errno::EOPNOTSUPP);
        }
        if !self.terms.has(export::SEND_WRITE_ZEROES) {
            return self.write_as_data(range, fua).await;
        }
        let keep = if flags.unmap { 0 } else { command::NO_HOLE };
        let fast = if flags.fast { command::FAST_ZERO } else { 0 };
        self.ranges(CMD_WRITE_ZEROES, keep | fast, range, fua).await
    }

    /// Writes zeros as data, for a server that cannot make them.
    async fn write_as_data(self: &Rc<Self>, range: SectorRange, fua: bool) -> Result<(), Errno> {
        let part_sectors = self.terms.request_bytes.min(PART_BYTES_MAX) / SECTOR;
        let mut at = 0;
        while at < range.count {
            let part = SectorRange::new(range.start.0 + u64::from(at), part_sectors.min(range.count - at));
            let mut zeros = self.parts.buffer(part.len_bytes() as usize).await?;
            zeros.fill(0);
            self.write(part, IoVec::from_iter([zeros]), fua).await.result?;
            at += part.count;
        }
        Ok(())
    }

    async fn discard(self: &Rc<Self>, range: SectorRange, fua: bool) -> Result<(), Errno> {
        if !self.terms.has(export::SEND_TRIM) {
            return Ok(());
        }
        self.ranges(CMD_TRIM, 0, range, fua).await
    }

    /// A request without data over a range of any length, piece by piece.
    async fn ranges(
        self: &Rc<Self>,
        command: u16,
        flags: u16,
        range: SectorRange,
        fua: bool,
    ) -> Result<(), Errno> {
        let flags = flags | self.flag(fua);
        let part_sectors = (RANGE_BYTES_MAX / SECTOR_BYTES) as u32;
        let mut at = 0;
        while at < range.count {
            let part = SectorRange::new(range.start.0 + u64::from(at), part_sectors.min(range.count - at));
            self.call(Call::new(command, flags, part)).await.0?;
            at += part.count;
        }
        self.durable(fua).await
    }

    /// If writes must be durable when answered, a server without `FUA` is flushed after each.
    async fn durable(self: &Rc<Self>, fua: bool) -> Result<(), Errno> {
        let needed = fua && !self.terms.has(export::SEND_FUA);
        if needed { self.flush().await } else { Ok(()) }
    }

    async fn flush(self: &Rc<Self>) -> Result<(), Errno> {
        if !self.terms.has(export::SEND_FLUSH) {
            return Ok(());
        }
        let covers = self.answered.get();
        let call = Call { covers, ..Call::new(CMD_FLUSH, 0, SectorRange::default()) };
        self.call(call).await.0?;
        if self.lost.get() && !self.host.bug(&NBD_FLUSH_AFTER_BREAK) {
            return Err(Errno::EIO);
        }
        Ok(())
    }

    async fn extents(self: &Rc<Self>, range: SectorRange, most: usize) -> Result<Vec<Extent>, Errno> {
        let source = Source::Node { name: Some(self.name.clone()), offset: None, compressed: false };
        let data = |count| Extent { count, source: source.clone(), zero: false, allocated: true };
        if self.terms.context.is_none() {
            return Ok(vec![data(u64::from(range.count))]);
        }
        let most_bytes = if self.terms.extended { LONG_QUERY_BYTES_MAX } else { RANGE_BYTES_MAX };
        let asked = SectorRange::new(range.start.0, range.count.min((most_bytes / SECTOR_BYTES) as u32));
        let (result, call) = self.call(Call::new(CMD_BLOCK_STATUS, 0, asked)).await;
        result?;
        let mut found = Vec::with_capacity(call.extents.len());
        let mut left = u64::from(asked.count);
        for (len, state) in &call.extents {
            let count = (len / SECTOR_BYTES).min(left);
            let (zero, allocated) = (state & STATE_ZERO != 0, state & STATE_HOLE == 0);
            if count > 0 {
                found.push(Extent { count, source: source.clone(), zero, allocated });
                left -= count;
            }
            if left == 0 || found.len() >= most || !len.is_multiple_of(SECTOR_BYTES) {
                break;
            }
        }
        if found.is_empty() {
            // Less than a sector: it may be anything.
            found.push(data(1));
        }
        Ok(found)
    }

    /// Sends a request, repeatedly if needed, and waits for its answer.
    async fn call(self: &Rc<Self>, call: Call) -> (Result<(), Errno>, Call) {
        let permit = self.permits.acquire().await;
        if let Some(error) = self.refusal.get() {
            return (Err(error), call);
        }
        let cookie = self.next.replace(self.next.get() + 1);
        let (tell, told) = oneshot();
        self.pending.borrow_mut().insert(cookie, Pending { call, tell, _permit: permit });
        self.busy.set();
        if let Some(link) = &*self.link.borrow() {
            self.put(link, cookie);
        }
        told.await.unwrap_or_else(|| (Err(Errno::EIO), Call::default()))
    }

    /// Puts a pending request into the outbox.
    fn put(&self, link: &LinkOf<H>, cookie: u64) {
        let mut pending = self.pending.borrow_mut();
        let Some(Pending { call, .. }) = pending.get_mut(&cookie) else { return };
        call.sent_ns = self.host.now_ns();
        call.got.clear();
        call.error = None;
        call.extents.clear();
        link.put(cookie, call, &self.host);
    }

    async fn close(self: &Rc<Self>) -> Result<(), Errno> {
        let unflushed = self.answered.get() > self.flushed.get();
        let result = match self.refusal.get() {
            _ if self.info().read_only => Ok(()),
            Some(error) if unflushed => Err(error),
            Some(_) => Ok(()),
            // Do not wait for an unreachable server if there is nothing to flush.
            None if !unflushed && !self.lost.get() => Ok(()),
            None => self.flush().await,
        };
        self.closed.set(true);
        if !self.host.bug(&NBD_CLOSED_CONNECTS) {
            self.stop.set("the client is closed");
        }
        self.give_up(Errno::ESHUTDOWN);
        let link = self.link.borrow_mut().take();
        if let Some(link) = link {
            link.leave();
        }
        result
    }
}

impl<H: Sockets + Time + Tasks + Log + Probe> Node for Client<H> {
    fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
        let inner = Rc::clone(&self.0);
        Box::pin(async move { inner.execute(request).await })
    }
    fn extents(&self, range: SectorRange, most: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        let inner = Rc::clone(&self.0);
        Box::pin(async move { inner.extents(range, most).await })
    }
    fn info(&self) -> NodeInfo {
        self.0.info()
    }
    fn name(&self) -> Option<NodeName> {
        Some(self.0.name.clone())
    }
    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        let inner = Rc::clone(&self.0);
        Box::pin(async move { inner.close().await })
    }
}
