//! A world with a server in it, a disk in memory, and a client that speaks bytes.

#![allow(dead_code, unreachable_pub, reason = "each test program uses a part")]

pub mod asking;

use kernel_model::{Kernel, Process, ProcessStream, Storage, StorageConfig};
use sim::{Config, Sim};
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use tap_abi::nbd::{
    ChunkHeader, ExportReply, OPT_EXPORT_NAME, OPT_GO, OPT_STRUCTURED_REPLY, OPTION_REPLY_MAGIC,
    OptionHeader, OptionReply, REP_ACK, RequestHeader, SIMPLE_MAGIC, SimpleReply, handshake,
};
use tap_core::wait::Event as Flag;
use tap_core::{Extent, LocalBoxFuture, Node, NodeInfo, Op, Request, Response, Source};
use tap_host::{
    Budget, Errno, IoBuf, Mark, SECTOR_BYTES, SectorRange, SendList, SocketAddress, Sockets, Stream,
    copy_from_slice, copy_to_slice,
};
use tap_nbd::{Export, Server, ServerLimits};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// How often the mark called `name` was reached.
pub fn marked(kernel: &Kernel, name: &str) -> u64 {
    kernel.marked(Mark::find(tap_nbd::MARKS, name).expect("a mark of NBD"))
}

/// Where the server of a test listens.
pub fn address() -> SocketAddress {
    SocketAddress::Unix("/run/nbd".into())
}

/// A disk in memory that counts requests and can hold them.
pub struct Disk {
    pub bytes: RefCell<Vec<u8>>,
    pub read_only: Cell<bool>,
    /// Requests wait for `go`.
    pub hold: Cell<bool>,
    pub go: Flag,
    pub in_flight: Cell<usize>,
    pub most_in_flight: Cell<usize>,
    pub seen: RefCell<Vec<(Op, SectorRange)>>,
    /// Requests with FUA.
    pub durable: Cell<usize>,
    pub fail: Cell<Option<Errno>>,
    /// Zeros from this sector on are not fast.
    pub slow_from: Cell<u64>,
    /// Sectors that were never written.
    pub holes: Cell<bool>,
}

impl Disk {
    pub fn new(size_bytes: usize) -> Rc<Self> {
        Rc::new(Self {
            bytes: RefCell::new(vec![0; size_bytes]),
            read_only: Cell::new(false),
            hold: Cell::new(false),
            go: Flag::new(),
            in_flight: Cell::new(0),
            most_in_flight: Cell::new(0),
            seen: RefCell::default(),
            durable: Cell::new(0),
            fail: Cell::new(None),
            slow_from: Cell::new(u64::MAX),
            holes: Cell::new(false),
        })
    }

    /// A disk whose sectors all have data, so that replies to reads carry it.
    pub fn filled(size_bytes: usize) -> Rc<Self> {
        let disk = Self::new(size_bytes);
        disk.bytes.borrow_mut().fill(0xd1);
        disk
    }

    pub fn count(&self, op: Op) -> usize {
        self.seen.borrow().iter().filter(|(o, _)| *o == op).count()
    }

    fn execute(&self, request: &mut Request) -> Result<(), Errno> {
        if let Some(error) = self.fail.get() {
            return Err(error);
        }
        let end = request.range.start.0 + u64::from(request.range.count);
        if matches!(request.op, Op::WriteZeroes(flags) if flags.fast) && end > self.slow_from.get() {
            return Err(Errno::EOPNOTSUPP);
        }
        let mut bytes = self.bytes.borrow_mut();
        let from = (request.range.start.0 * SECTOR_BYTES) as usize;
        let part = &mut bytes[from..from + request.range.len_bytes() as usize];
        match request.op {
            Op::Read => copy_from_slice(&mut request.bufs, 0, part),
            Op::Write => copy_to_slice(&request.bufs, 0, part),
            Op::WriteZeroes(_) | Op::Discard => part.fill(0),
            Op::Flush => {}
        }
        Ok(())
    }
}

/// The disk as a node.
pub struct DiskNode(pub Rc<Disk>);

impl Node for DiskNode {
    fn submit(&self, mut request: Request) -> LocalBoxFuture<Response> {
        let disk = Rc::clone(&self.0);
        Box::pin(async move {
            assert!(request.is_well_formed(disk.bytes.borrow().len() as u64 / SECTOR_BYTES), "{request:?}");
            disk.seen.borrow_mut().push((request.op, request.range));
            disk.durable.set(disk.durable.get() + usize::from(request.fua));
            disk.in_flight.set(disk.in_flight.get() + 1);
            disk.most_in_flight.set(disk.most_in_flight.get().max(disk.in_flight.get()));
            if disk.hold.get() {
                disk.go.wait().await;
            }
            disk.in_flight.set(disk.in_flight.get() - 1);
            let result = disk.execute(&mut request);
            Response { result, bufs: request.bufs }
        })
    }
    fn extents(&self, range: SectorRange, _most: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        let holes = self.0.holes.get();
        let extent = |at: u64, count| {
            // Every second MiB is a hole.
            let hole = holes && at / 2048 % 2 == 1;
            Extent { count, source: Source::UNKNOWN, zero: hole, allocated: !hole }
        };
        let mut found = Vec::new();
        let (mut at, end) = (range.start.0, range.start.0 + u64::from(range.count));
        while at < end {
            let count = (2048 - at % 2048).min(end - at);
            found.push(extent(at, count));
            at += count;
        }
        Box::pin(std::future::ready(Ok(found)))
    }
    fn info(&self) -> NodeInfo {
        let size_sectors = self.0.bytes.borrow().len() as u64 / SECTOR_BYTES;
        NodeInfo::new(size_sectors, self.0.read_only.get())
    }
    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// The export called `name` of `disk`.
pub fn export(name: &str, disk: &Rc<Disk>) -> Export {
    let node = Rc::new(DiskNode(Rc::clone(disk)));
    Export { name: name.into(), description: format!("about {name}"), node, read_only: false }
}

/// One machine.
#[derive(Clone)]
pub struct World {
    pub sim: Sim,
    pub kernel: Kernel,
}

impl World {
    /// A process.
    pub fn process(&self, name: &str) -> Process {
        self.kernel.process(name, 0)
    }

    /// A server in a process of its own, which listens.
    pub async fn serve(&self, exports: Vec<Export>, limits: ServerLimits) -> (Process, Server<Process>) {
        let process = self.process("server");
        let server = Server::new(process.clone(), exports, limits, &Budget::new(1 << 30)).unwrap();
        let listener = process.listen(&address()).await.unwrap();
        let own = server.clone();
        process.node().spawn("serve", 0, async move { own.serve(listener).await });
        (process, server)
    }

    /// A client that has not said anything yet.
    pub async fn raw(&self, name: &str) -> Raw {
        let process = self.process(name);
        let stream = process.connect(&address()).await.unwrap();
        Raw { stream, structured: false }
    }

    /// A client that has chosen `export`.
    pub async fn client(&self, name: &str, export: &str, structured: bool) -> Raw {
        let mut raw = self.raw(name).await;
        raw.hello().await;
        if structured {
            raw.option(OPT_STRUCTURED_REPLY, b"").await;
            assert_eq!(raw.reply().await.0, REP_ACK);
        }
        raw.structured = structured;
        raw.option(OPT_GO, &go(export, &[])).await;
        raw.replies().await;
        raw
    }
}

/// Runs `body` to its end; `faults` says whether streams are split and delayed.
pub fn world<F: Future<Output = ()> + 'static>(
    seed: u64,
    faults: bool,
    body: impl FnOnce(World) -> F,
) -> u64 {
    let sim = Sim::new(&Config { faults, ..Config::new(seed) });
    let storage = Storage::new(&sim, StorageConfig::default());
    let world = World { kernel: Kernel::new(&sim, &storage), sim: sim.clone() };
    let body = body(world);
    sim.run(body).unwrap();
    sim.trace_hash()
}

/// The data of `GO` and `INFO`.
pub fn go(name: &str, kinds: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(kinds.len() as u16).to_be_bytes());
    kinds.iter().for_each(|kind| data.extend_from_slice(&kind.to_be_bytes()));
    data
}

/// The data of the options about metadata contexts.
pub fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = Vec::new();
    data.extend_from_slice(&(name.len() as u32).to_be_bytes());
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}

/// A reply to a request: its error, and its data or its chunks' payload.
#[derive(PartialEq, Eq, Debug)]
pub struct Reply {
    pub cookie: u64,
    pub error: u32,
    /// The type of the last chunk.
    pub chunk: Option<u16>,
    pub data: Vec<u8>,
}

/// A client that speaks bytes.
pub struct Raw {
    pub stream: ProcessStream,
    pub structured: bool,
}

impl Raw {
    pub async fn send(&self, bytes: &[u8]) -> Result<(), Errno> {
        let mut list = SendList::new();
        list.push_bytes(bytes);
        while !list.is_empty() {
            let (result, rest) = self.stream.send(list).await;
            result?;
            list = rest;
        }
        Ok(())
    }

    /// The next `count` bytes; fewer at the end of the stream.
    pub async fn take(&self, count: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < count {
            let buf = IoBuf::unpooled((count - all.len()).min(64 << 10)).unwrap();
            match self.stream.recv(buf, 0).await {
                (Ok(0) | Err(_), _) => break,
                (Ok(n), buf) => all.extend_from_slice(&buf[..n]),
            }
        }
        all
    }

    async fn value<T: FromBytes + Immutable + KnownLayout>(&self) -> T {
        let bytes = self.take(size_of::<T>()).await;
        T::read_from_bytes(&bytes).unwrap_or_else(|_| panic!("the stream ended"))
    }

    pub async fn hello(&self) {
        let hello = self.take(18).await;
        assert_eq!(&hello[..16], b"NBDMAGICIHAVEOPT");
        let flags = u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        self.send(&flags.to_be_bytes()).await.unwrap();
    }

    pub async fn option(&self, option: u32, data: &[u8]) {
        let mut bytes = OptionHeader::new(option, data.len() as u32).as_bytes().to_vec();
        bytes.extend_from_slice(data);
        self.send(&bytes).await.unwrap();
    }

    /// One reply to an option: its type and data.
    pub async fn reply(&self) -> (u32, Vec<u8>) {
        let head: OptionReply = self.value().await;
        assert_eq!(head.magic.get(), OPTION_REPLY_MAGIC);
        (head.reply.get(), self.take(head.len.get() as usize).await)
    }

    /// All replies to an option.
    pub async fn replies(&self) -> Vec<(u32, Vec<u8>)> {
        let mut all = Vec::new();
        loop {
            let (reply, data) = self.reply().await;
            let last = reply == REP_ACK || reply & 1 << 31 != 0;
            all.push((reply, data));
            if last {
                return all;
            }
        }
    }

    pub async fn export_name(&self, name: &str) -> ExportReply {
        self.option(OPT_EXPORT_NAME, name.as_bytes()).await;
        self.value().await
    }

    pub async fn request(&self, command: u16, flags: u16, cookie: u64, offset: u64, len: u32, data: &[u8]) {
        let mut bytes = RequestHeader::new(command, flags, cookie, offset, len).as_bytes().to_vec();
        bytes.extend_from_slice(data);
        self.send(&bytes).await.unwrap();
    }

    /// The next reply; `len` is the length of its data if it is simple and succeeded.
    pub async fn answer(&self, len: usize) -> Reply {
        let magic: [u8; 4] = self.value().await;
        let mut bytes = magic.to_vec();
        if magic == SIMPLE_MAGIC.to_be_bytes() {
            bytes.extend(self.take(SimpleReply::BYTES - 4).await);
            let head = SimpleReply::read_from_bytes(&bytes).unwrap();
            let data = if head.error.get() == 0 { self.take(len).await } else { Vec::new() };
            return Reply { cookie: head.cookie.get(), error: head.error.get(), chunk: None, data };
        }
        bytes.extend(self.take(ChunkHeader::BYTES - 4).await);
        let head = ChunkHeader::read_from_bytes(&bytes).unwrap();
        assert_eq!(head.flags.get(), 1, "the server sends one chunk");
        let data = self.take(head.len.get() as usize).await;
        let failed = head.kind.get() & 1 << 15 != 0;
        let error = if failed { u32::from_be_bytes(data[..4].try_into().unwrap()) } else { 0 };
        Reply { cookie: head.cookie.get(), error, chunk: Some(head.kind.get()), data }
    }
}

/// The reply of success.
pub fn ok(cookie: u64) -> Reply {
    Reply { cookie, error: 0, chunk: None, data: Vec::new() }
}

/// Bytes that look random.
pub fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i / 512) as u8 ^ (i % 251) as u8 ^ seed).collect()
}
