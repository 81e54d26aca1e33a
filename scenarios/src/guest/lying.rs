//! An NBD server that may lie: it keeps a disk in memory, and its answers are split, reordered, duplicated, incomplete,
//! or about another place.
//!
//! ```text
//!   request ──► the disk ──► chunks ──NBD_SHAPE──► chunks as any server may send them
//!                                                     └──NBD_LIE──► chunks as none may
//! ```
//!
//! The bytes that it sends are always right for the place that they are labelled with. A client that accepts a read
//! only if every byte of it was covered once therefore returns right bytes or an error.

use super::RawNbd;
use super::offer::{Agreed, LESS_BITS, NBD_LESS, Offer, status};
use crate::check::Invariant;
use crate::world::World;
use sim::{Entity, Label, Sim};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_abi::nbd::{
    CHUNK_ERROR, CHUNK_NONE, CHUNK_OFFSET_DATA, CHUNK_OFFSET_HOLE, CMD_BLOCK_STATUS, CMD_DISC, CMD_FLUSH,
    CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, ChunkHeader, ErrorHead, ExtendedChunk, ExtendedRequest,
    Hello, OptionHeader, RequestHeader, SimpleReply, command, error, handshake,
};
use tap_core::wait::Event;
use tap_host::{SECTOR_BYTES, SectorRange, Stream};
use zerocopy::{FromBytes, IntoBytes};

/// How a true answer is split: pieces less one in 3 bits, last piece first in 1, its end in a separate chunk in 1,
/// zeros as holes in 1, its delay in 4 (powers of four in ns); 0 is one chunk at once.
pub static NBD_SHAPE: Label = Label::packed("nbd-shape", "answer {n} has shape {}", &[3, 1, 1, 1, 4]);

/// What is wrong with an answer: kind in 4 bits, a place in 16; 0 for nothing.
pub static NBD_LIE: Label = Label::packed("nbd-lie", "answer {n} is wrong: {}", &[4, 16]);

/// How an honest server reports the failure of a request: an error in 3 bits (0 none), bytes of text in 6, and which
/// data of a read it sends anyway in 2 (none, before it, after it).
pub static NBD_REFUSE: Label = Label::packed("nbd-refuse", "request {n} fails: {}", &[3, 6, 2]);

/// Number of requests after which an honest server hangs up.
pub static NBD_HANG_UP: Label = Label::new("nbd-hang-up", "the server hangs up at request {} of it");

/// The server's disk and its behaviour.
pub struct LyingServer {
    pub(super) world: World,
    sim: Sim,
    disk: RefCell<Vec<u8>>,
    /// The content that would survive a power cut.
    durable: RefCell<Vec<u8>>,
    /// Ranges that differ between the two.
    dirty: RefCell<Vec<(usize, usize)>>,
    offer: Offer,
    mode: ServerMode,
    honest: Cell<bool>,
    shut: Cell<bool>,
    connections: Cell<u64>,
    counts: Cell<Counts>,
    zeroes: RefCell<Vec<(SectorRange, bool)>>,
}

/// Whether a server lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ServerMode {
    /// Its answers are lies.
    Lies,
    /// It follows the protocol, in all the ways that the protocol permits; it may hang up from time to time and refuse
    /// requests.
    Honest {
        /// Connections end after some requests.
        hangs_up: bool,
        /// The next connection may then offer less.
        lessens: bool,
        /// Requests fail.
        refuses: bool,
        /// Only requests of this command fail; 0 for any.
        only: u16,
        /// After a disconnect request, it leaves closing to the client.
        stays_open: bool,
    },
}

/// Counters of requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Flushes.
    pub flushes: u64,
    /// Trims.
    pub trims: u64,
    /// Reads, writes, zeros, trims and flushes that failed for good; a client must not repeat them.
    pub refused: u64,
}

/// One message of an answer.
pub(super) struct Chunk {
    kind: u16,
    cookie: u64,
    done: bool,
    payload: Vec<u8>,
    /// Difference between the length in the header and the payload's.
    longer: i32,
}

/// A request as received.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub(super) command: u16,
    pub(super) flags: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) len: usize,
    /// With an extended header.
    pub(super) extended: bool,
}

/// Bytes queued for one connection.
#[derive(Default)]
pub(super) struct Queue {
    bytes: RefCell<Vec<u8>>,
    some: Event,
    /// Hang up after sending them.
    over: Cell<bool>,
}

impl Queue {
    pub(super) fn put(&self, bytes: &[u8]) {
        if !self.over.get() {
            self.bytes.borrow_mut().extend_from_slice(bytes);
            self.some.set();
        }
    }

    fn hang_up(&self) {
        self.over.set(true);
        self.some.set();
    }
}

impl LyingServer {
    /// A server with a disk of zeros.
    pub fn new(world: &World, offer: Offer, mode: ServerMode) -> Rc<Self> {
        let disk = vec![0; offer.size_bytes as usize];
        Rc::new(Self {
            world: world.clone(),
            sim: world.sim.clone(),
            durable: RefCell::new(disk.clone()),
            disk: RefCell::new(disk),
            dirty: RefCell::default(),
            offer,
            mode,
            honest: Cell::new(false),
            shut: Cell::new(false),
            connections: Cell::new(0),
            counts: Cell::default(),
            zeroes: RefCell::default(),
        })
    }

    /// Sets whether it closes connections as soon as they are made.
    pub fn refuse_connections(&self, refuse: bool) {
        self.shut.set(refuse);
    }

    /// From now on it is honest.
    pub fn become_honest(&self) {
        self.honest.set(true);
    }

    /// The counters of requests.
    pub fn counts(&self) -> Counts {
        self.counts.get()
    }

    /// Ranges of requests for zeros, and whether each asked to keep the space.
    pub fn zeroes(&self) -> Vec<(SectorRange, bool)> {
        self.zeroes.borrow().clone()
    }

    /// Its machine loses power, and with it what was not flushed.
    pub fn power_cut(&self) {
        let mut disk = self.disk.borrow_mut();
        for (from, to) in self.dirty.take() {
            disk[from..to].copy_from_slice(&self.durable.borrow()[from..to]);
        }
    }

    /// Serves one connection to its end.
    pub async fn serve<S: Stream>(self: Rc<Self>, stream: S) {
        let number = self.connections.get() + 1;
        self.connections.set(number);
        let raw = RawNbd::new(stream);
        if self.shut.get() {
            return raw.close();
        }
        let queue = Rc::new(Queue::default());
        let (sends, sender) = (Rc::clone(&queue), raw.clone());
        self.sim.spawn("lies", number, async move {
            loop {
                sends.some.wait().await;
                sends.some.clear();
                let bytes = sends.bytes.take();
                if sender.send(&bytes).await.is_err() || sends.over.get() {
                    return sender.close();
                }
            }
        });
        let _ended = self.run_connection(number, &raw, &queue).await;
        queue.hang_up();
    }

    /// What it offers on connection `number`.
    fn offered(&self, entity: Entity, number: u64) -> Offer {
        let ServerMode::Honest { lessens: true, .. } = self.mode else { return self.offer };
        if number == 1 || self.honest.get() {
            return self.offer;
        }
        let bits = self
            .sim
            .decide(entity, &NBD_LESS, 0, |d| if d.below(4) > 0 { 0 } else { 1 << d.below(LESS_BITS) });
        self.offer.less(bits)
    }

    /// `None` once the client has gone.
    async fn run_connection<S: Stream>(
        self: &Rc<Self>,
        number: u64,
        raw: &RawNbd<S>,
        queue: &Rc<Queue>,
    ) -> Option<()> {
        let entity = Entity::WORLD.child("lying-server", number);
        self.sim.name_entity(entity, || format!("the server on connection {number}"));
        let offer = self.offered(entity, number);
        queue.put(Hello::new(offer.hello).as_bytes());
        let flags = u32::from_be_bytes(raw.take(4).await?.try_into().ok()?);
        let known = u32::from(offer.hello & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES));
        if flags & !known != 0 {
            self.world
                .fail(Invariant::N3, format!("handshake flags {flags:#x} where {known:#x} are offered"));
        }
        let mut agreed = Agreed::default();
        while !agreed.chosen {
            let head = OptionHeader::read_from_bytes(&raw.take(OptionHeader::BYTES).await?).ok()?;
            raw.take(head.len.get() as usize).await?;
            self.option(&offer, head.option.get(), &mut agreed, queue);
        }
        let modest = match self.mode {
            ServerMode::Lies => None,
            ServerMode::Honest { hangs_up, .. } => Some(hangs_up && !self.honest.get()),
        };
        let last = match modest {
            Some(true) => self.sim.decide(entity, &NBD_HANG_UP, 0, |d| d.below(40)),
            _ => 0,
        };
        for n in 0.. {
            let asked = Asked::receive(raw, agreed.extended).await?;
            let data = if asked.command == CMD_WRITE { raw.take(asked.len).await? } else { Vec::new() };
            // Leftovers of an older connection have no effect.
            if asked.command == CMD_DISC && matches!(self.mode, ServerMode::Honest { stays_open: true, .. }) {
                raw.drain().await;
            }
            if asked.command == CMD_DISC || self.connections.get() != number {
                return None;
            }
            if let Some(why) = offer.violation(&asked, agreed.context) {
                self.world.fail(Invariant::N3, format!("{why}: {asked:?} of {offer:?}"));
                return None;
            }
            self.answer(entity, n, &asked, (agreed, &data), queue);
            if last > 0 && u64::from(n) + 1 >= last {
                return None;
            }
        }
        None
    }

    /// Applies a request to the disk.
    fn carry_out(&self, asked: &Asked, data: &[u8]) {
        let (from, to) = (asked.offset as usize, asked.offset as usize + asked.len);
        let mut disk = self.disk.borrow_mut();
        let mut counts = self.counts.get();
        match asked.command {
            CMD_WRITE => disk[from..to].copy_from_slice(data),
            CMD_WRITE_ZEROES | CMD_TRIM => disk[from..to].fill(0),
            _ => {}
        }
        counts.trims += u64::from(asked.command == CMD_TRIM);
        counts.flushes += u64::from(asked.command == CMD_FLUSH);
        self.counts.set(counts);
        if [CMD_WRITE, CMD_WRITE_ZEROES, CMD_TRIM].contains(&asked.command) {
            let own = asked.flags & command::FUA != 0 || !self.offer.caches();
            if own {
                self.durable.borrow_mut()[from..to].copy_from_slice(&disk[from..to]);
            } else {
                self.dirty.borrow_mut().push((from, to));
            }
        } else if asked.command == CMD_FLUSH {
            for (from, to) in self.dirty.take() {
                self.durable.borrow_mut()[from..to].copy_from_slice(&disk[from..to]);
            }
        }
    }

    /// How request `n` fails; 0 if it does not.
    fn refusal(&self, entity: Entity, n: u32, command: u16) -> u64 {
        let ServerMode::Honest { refuses: true, only, .. } = self.mode else { return 0 };
        let one_in = if only == 0 { 8 } else { 2 };
        let value = self.sim.decide(entity, &NBD_REFUSE, n, |d| {
            if d.below(one_in) > 0 { 0 } else { (1 + d.below(7)) | d.below(64) << 3 | d.below(3) << 9 }
        });
        let spared = self.honest.get() || only != 0 && only != command;
        if spared { 0 } else { value }
    }

    /// Counts a request by its result.
    fn note(&self, asked: &Asked, refusal: u64) {
        let mut counts = self.counts.get();
        let passing = [error::ENOMEM, error::ENOTSUP].contains(&refusal_error(refusal));
        let data = [CMD_READ, CMD_WRITE, CMD_WRITE_ZEROES, CMD_TRIM, CMD_FLUSH].contains(&asked.command);
        counts.refused += u64::from(refusal != 0 && !passing && data);
        self.counts.set(counts);
        if asked.command == CMD_WRITE_ZEROES {
            let range =
                SectorRange::new(asked.offset / SECTOR_BYTES, (asked.len as u64 / SECTOR_BYTES) as u32);
            self.zeroes.borrow_mut().push((range, asked.flags & command::NO_HOLE != 0));
        }
    }

    /// Carries out request `n` of a connection and queues its answer.
    fn answer(
        &self,
        entity: Entity,
        n: u32,
        asked: &Asked,
        (agreed, data): (Agreed, &[u8]),
        queue: &Rc<Queue>,
    ) {
        let shape = self.sim.decide(entity, &NBD_SHAPE, n, |d| {
            if d.below(3) > 0 { 0 } else { d.below(64) | (d.below(12) << 6) }
        });
        let lie = match self.mode {
            ServerMode::Lies => self.sim.decide(entity, &NBD_LIE, n, |d| {
                if d.below(6) > 0 { 0 } else { (1 + d.below(15)) | (d.below(1 << 16) << 4) }
            }),
            ServerMode::Honest { .. } => 0,
        };
        let lie = if self.honest.get() { 0 } else { lie };
        let refusal = self.refusal(entity, n, asked.command);
        self.note(asked, refusal);
        if refusal == 0 {
            self.carry_out(asked, data);
        }
        let (from, len) = (asked.offset as usize, asked.len);
        let disk = self.disk.borrow();
        let structured =
            agreed.structured && (asked.command == CMD_READ || asked.command == CMD_BLOCK_STATUS);
        let bytes = if refusal != 0 {
            refused(asked, refusal, agreed.structured)
        } else if structured || agreed.extended {
            let mut chunks = match asked.command {
                CMD_READ => shaped(asked, &disk[from..from + len], shape),
                CMD_BLOCK_STATUS => vec![status(asked, &disk[from..from + len], self.offer.grain_bytes)],
                _ => vec![Chunk::new(asked, CHUNK_NONE, Vec::new())],
            };
            spoil(&mut chunks, asked, &disk, lie);
            wire(&chunks, asked, lie)
        } else {
            let payload = if asked.command == CMD_READ { &disk[from..from + len] } else { &[] };
            simple(asked, payload, lie)
        };
        if lie & 15 == 9 {
            return;
        }
        let (queue, over) = (Rc::clone(queue), lie & 15 == 13);
        let late_ns = if shape >> 6 == 0 { 0 } else { 1 << (2 * (shape >> 6)) };
        let sim = self.sim.clone();
        self.sim.spawn("answer", asked.cookie, async move {
            sim.sleep_ns(late_ns).await;
            queue.put(&bytes);
            if over {
                queue.hang_up();
            }
        });
    }
}

impl Asked {
    /// The next request; `None` at the end of the stream.
    async fn receive<S: Stream>(raw: &RawNbd<S>, extended: bool) -> Option<Self> {
        let head = if extended {
            ExtendedRequest::read_from_bytes(&raw.take(ExtendedRequest::BYTES).await?).ok()?
        } else {
            RequestHeader::read_from_bytes(&raw.take(RequestHeader::BYTES).await?).ok()?.into()
        };
        Some(Self {
            command: head.command.get(),
            flags: head.flags.get(),
            cookie: head.cookie.get(),
            offset: head.offset.get(),
            len: head.len.get() as usize,
            extended,
        })
    }
}

impl Chunk {
    pub(super) fn new(asked: &Asked, kind: u16, payload: Vec<u8>) -> Self {
        Self { kind, cookie: asked.cookie, done: false, payload, longer: 0 }
    }

    /// Data of `disk` from byte `at` on.
    fn data(asked: &Asked, at: u64, bytes: &[u8]) -> Self {
        Self::new(asked, CHUNK_OFFSET_DATA, [&at.to_be_bytes(), bytes].concat())
    }

    fn hole(asked: &Asked, at: u64, len: usize) -> Self {
        Self::new(asked, CHUNK_OFFSET_HOLE, [&at.to_be_bytes()[..], &(len as u32).to_be_bytes()].concat())
    }
}

/// A read's answer as any server may send it.
fn shaped(asked: &Asked, bytes: &[u8], shape: u64) -> Vec<Chunk> {
    let pieces = 1 + (shape & 7) as usize;
    let step = bytes.len().div_ceil(pieces).max(1);
    let mut chunks: Vec<Chunk> = bytes
        .chunks(step)
        .enumerate()
        .map(|(i, piece)| {
            let at = asked.offset + (i * step) as u64;
            let hole = shape & 32 != 0 && piece.iter().all(|byte| *byte == 0);
            if hole { Chunk::hole(asked, at, piece.len()) } else { Chunk::data(asked, at, piece) }
        })
        .collect();
    if shape & 8 != 0 {
        chunks.reverse();
    }
    if shape & 16 != 0 {
        chunks.push(Chunk::new(asked, CHUNK_NONE, Vec::new()));
    }
    chunks
}

/// Makes an answer wrong.
fn spoil(chunks: &mut Vec<Chunk>, asked: &Asked, disk: &[u8], lie: u64) {
    let place = (lie >> 4) as usize;
    let (one, read) = (place % chunks.len(), asked.command == CMD_READ);
    let (from, half) = (asked.offset as usize, asked.len / 2);
    let part = |at: usize, len: usize| Chunk::data(asked, at as u64, &disk[at..at + len]);
    match lie & 15 {
        // One half twice, and the other not at all.
        1 if read => {
            let at = from + half * (place & 1);
            *chunks = vec![part(at, half), part(at, half)];
        }
        // Both halves, and a piece of one of them again.
        2 if read => chunks.insert(one, part(from + half / 2, half)),
        // Another place: before the request, or past its end.
        3 if read => {
            let at = if place & 1 == 0 { from.saturating_sub(512) } else { from + 512 };
            chunks[one] = part(at.min(disk.len() - asked.len), asked.len);
        }
        4 if chunks.len() > 1 || read => drop(chunks.remove(one)),
        5 if read || asked.command == CMD_BLOCK_STATUS => chunks[one].cookie ^= 1 << (place % 6),
        // Not the cookie of another request, which the empty reply would fit.
        5 => chunks[one].cookie ^= 1 << (40 + place % 6),
        6 => chunks[one].longer = if place & 1 == 0 { -1 } else { 1 + place as i32 },
        // A failed part that has data as well. The client sees the error, so this is no lie.
        7 => {
            let mut error = failed(error::EIO, place % 48);
            if place % 5 == 4 {
                error.truncate(place % 6);
            }
            chunks.insert(one, Chunk::new(asked, CHUNK_ERROR, error));
        }
        8 => chunks.push(Chunk::new(asked, CHUNK_NONE, Vec::new())),
        // One half, with an overlap as large as the missing half.
        10 if read => {
            *chunks = vec![part(from, half), part(from + half / 2, half), part(from, asked.len - 2 * half)]
        }
        12 => chunks[one].kind = (place & 0x7fff) as u16,
        14 if read => chunks.insert(one, Chunk::hole(asked, asked.offset + half as u64, place & 1)),
        14 | 15 => chunks.insert(one, Chunk::new(asked, chunks[one].kind, chunks[one].payload.clone())),
        _ => {}
    }
}

/// An error with a text of `text` bytes.
fn failed(error: u32, text: usize) -> Vec<u8> {
    let head = ErrorHead { error: error.into(), message_len: (text as u16).into() };
    [head.as_bytes(), &b"no reason is known for that, or at any rate none that is given here"[..text]]
        .concat()
}

/// The error of an [`NBD_REFUSE`] value; 0 for none.
fn refusal_error(how: u64) -> u32 {
    let errors =
        [0, error::EIO, error::ENOSPC, error::ENOMEM, error::EPERM, error::EINVAL, error::ENOTSUP, 9999];
    errors[(how & 7) as usize]
}

/// The bytes of an answer that reports a failed request, as any server may send it; see [`NBD_REFUSE`].
fn refused(asked: &Asked, how: u64, structured: bool) -> Vec<u8> {
    let error = refusal_error(how);
    if !structured {
        return SimpleReply::new(asked.cookie, error).as_bytes().to_vec();
    }
    let mut chunks = vec![Chunk::new(asked, CHUNK_ERROR, failed(error, (how >> 3) as usize & 63))];
    // All of the data, and all of it wrong: a client that sees the error must ignore it.
    let garbage = || Chunk::data(asked, asked.offset, &vec![0x6b; asked.len]);
    match (how >> 9) & 3 {
        1 if asked.command == CMD_READ => chunks.insert(0, garbage()),
        2 if asked.command == CMD_READ => chunks.push(garbage()),
        _ => {}
    }
    wire(&chunks, asked, 0)
}

/// The bytes of an answer in chunks.
fn wire(chunks: &[Chunk], asked: &Asked, lie: u64) -> Vec<u8> {
    let (kind, place) = (lie & 15, (lie >> 4) as usize);
    let mut bytes = Vec::new();
    if kind == 11 {
        bytes.extend_from_slice(SimpleReply::new(asked.cookie, 0).as_bytes());
    }
    let last = chunks.len().saturating_sub(1);
    for (i, chunk) in chunks.iter().enumerate() {
        // A chunk after the end is what is wrong.
        let done = i == last || kind == 8 && i + 1 == last;
        let len = chunk.payload.len().saturating_add_signed(chunk.longer as isize);
        let (cookie, kind, done) = (chunk.cookie, chunk.kind, done || chunk.done);
        if asked.extended {
            let head = ExtendedChunk::new(cookie, asked.offset, kind, done, len as u64);
            bytes.extend_from_slice(head.as_bytes());
        } else {
            bytes.extend_from_slice(ChunkHeader::new(cookie, kind, done, len as u32).as_bytes());
        }
        bytes.extend_from_slice(&chunk.payload);
    }
    if kind == 13 {
        bytes.truncate(place % bytes.len().max(1));
    }
    bytes
}

/// The bytes of a simple answer.
fn simple(asked: &Asked, payload: &[u8], lie: u64) -> Vec<u8> {
    let place = (lie >> 4) as usize;
    let (cookie, error) = match lie & 15 {
        // Not the cookie of another request: a simple reply has nothing else that identifies its place.
        5 => (asked.cookie ^ 1 << (40 + place % 6), 0),
        7 => (asked.cookie, error::ENOSPC),
        _ => (asked.cookie, 0),
    };
    let mut bytes = SimpleReply::new(cookie, error).as_bytes().to_vec();
    if error == 0 {
        bytes.extend_from_slice(payload);
    }
    match lie & 15 {
        8 => bytes.extend_from_within(..),
        12 => bytes[place % 4] ^= 1,
        13 => bytes.truncate(place % bytes.len()),
        _ => {}
    }
    bytes
}

/// An [`NBD_LIE`] value in words.
pub fn describe_nbd_lie(value: u64) -> &'static str {
    match value & 15 {
        1 => "one half comes twice, the other not at all",
        2 => "a piece of it comes again",
        3 => "it is about another place",
        4 => "a piece is missing",
        5 => "a cookie is another",
        6 => "a length is another",
        7 => "it says that it failed",
        8 => "it continues after its end",
        9 => "it never comes",
        10 => "it has the right number of bytes, some of them twice",
        11 => "a simple reply comes first",
        12 => "a type is another",
        13 => "it is cut, and the server hangs up",
        14 => "it contains a false hole, or one of no length",
        15 => "a chunk comes twice",
        _ => "nothing",
    }
}
