//! An NBD server that does not mean well: it keeps a disk in memory, and what it says of it is cut into pieces, out of
//! order, doubled, missing, or about somebody else.
//!
//! ```text
//!   request ──► the disk ──► chunks ──NBD_SHAPE──► chunks as any server may send them
//!                                                     └──NBD_LIE──► chunks as none may
//! ```
//!
//! The bytes that it sends are always right for the place that it names. So whoever believes it only where every byte
//! of a read was named once reads right bytes or gets an error.

use super::RawNbd;
use sim::{Entity, Label, Sim};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_abi::nbd::{
    BASE_ALLOCATION, CHUNK_BLOCK_STATUS, CHUNK_ERROR, CHUNK_NONE, CHUNK_OFFSET_DATA, CHUNK_OFFSET_HOLE,
    CMD_BLOCK_STATUS, CMD_DISC, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, ChunkHeader, ErrorHead,
    Hello, INFO_BLOCK_SIZE, INFO_EXPORT, InfoBlockSize, InfoExport, OPT_GO, OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY, OptionHeader, OptionReply, REP_ACK, REP_ERR_UNSUP, REP_INFO, REP_META_CONTEXT,
    RequestHeader, SimpleReply, error, export, handshake,
};
use tap_core::wait::Event;
use tap_host::Stream;
use zerocopy::{FromBytes, IntoBytes};

/// How a true answer is cut: pieces less one in 3 bits, last piece first in 1, its end in a chunk of its own in 1, zeros
/// as holes in 1, how long it is kept in 4 (powers of four in ns); 0 is one chunk at once.
pub static NBD_SHAPE: Label = Label::packed("nbd-shape", "answer {n} has shape {}", &[3, 1, 1, 1, 4]);

/// What is wrong with an answer: kind in 4 bits, a place in 16; 0 is nothing.
pub static NBD_LIE: Label = Label::packed("nbd-lie", "answer {n} is wrong: {}", &[4, 16]);

/// The number of `base:allocation` here.
const CONTEXT: u32 = 7;
const SECTOR: usize = 512;

/// What the server has and how it behaves.
pub struct LyingServer {
    sim: Sim,
    disk: RefCell<Vec<u8>>,
    structured: bool,
    request_bytes: u32,
    honest: Cell<bool>,
    connections: Cell<u64>,
}

/// One message of an answer.
struct Chunk {
    kind: u16,
    cookie: u64,
    done: bool,
    payload: Vec<u8>,
    /// More or less than the payload's length, as the header says it.
    longer: i32,
}

/// A request as it came.
#[derive(Clone, Copy)]
struct Asked {
    command: u16,
    cookie: u64,
    offset: u64,
    len: usize,
}

/// What waits to be sent on one connection.
#[derive(Default)]
struct Queue {
    bytes: RefCell<Vec<u8>>,
    some: Event,
    /// Hung up after what is in it.
    over: Cell<bool>,
}

impl Queue {
    fn put(&self, bytes: &[u8]) {
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
    /// With a disk of `size_bytes` zeros; `structured` says whether it knows structured replies.
    pub fn new(sim: &Sim, size_bytes: usize, structured: bool, request_bytes: u32) -> Rc<Self> {
        Rc::new(Self {
            sim: sim.clone(),
            disk: RefCell::new(vec![0; size_bytes]),
            structured,
            request_bytes,
            honest: Cell::new(false),
            connections: Cell::new(0),
        })
    }

    /// From now on it means well.
    pub fn reform(&self) {
        self.honest.set(true);
    }

    /// Serves one connection to its end.
    pub async fn serve<S: Stream>(self: Rc<Self>, stream: S) {
        let number = self.connections.get() + 1;
        self.connections.set(number);
        let raw = RawNbd::new(stream);
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
        let _ended = self.converse(number, &raw, &queue).await;
        queue.hang_up();
    }

    /// `None` when the client has gone.
    async fn converse<S: Stream>(
        self: &Rc<Self>,
        number: u64,
        raw: &RawNbd<S>,
        queue: &Rc<Queue>,
    ) -> Option<()> {
        queue.put(Hello::new(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).as_bytes());
        raw.take(4).await?;
        loop {
            let head = OptionHeader::read_from_bytes(&raw.take(OptionHeader::BYTES).await?).ok()?;
            raw.take(head.len.get() as usize).await?;
            self.option(head.option.get(), queue);
            if head.option.get() == OPT_GO {
                break;
            }
        }
        let entity = Entity::WORLD.child("lying-server", number);
        self.sim.name_entity(entity, || format!("the server on connection {number}"));
        for n in 0.. {
            let head = RequestHeader::read_from_bytes(&raw.take(RequestHeader::BYTES).await?).ok()?;
            let asked = Asked {
                command: head.command.get(),
                cookie: head.cookie.get(),
                offset: head.offset.get(),
                len: head.len.get() as usize,
            };
            let data = if asked.command == CMD_WRITE { raw.take(asked.len).await? } else { Vec::new() };
            // What was left of an older connection comes to nothing.
            if asked.command == CMD_DISC || self.connections.get() != number {
                return None;
            }
            self.answer(entity, n, &asked, &data, queue);
        }
        None
    }

    fn option(&self, option: u32, queue: &Queue) {
        let reply = |kind: u32, data: &[u8]| {
            queue.put(OptionReply::new(option, kind, data.len() as u32).as_bytes());
            queue.put(data);
        };
        match option {
            OPT_STRUCTURED_REPLY if self.structured => reply(REP_ACK, &[]),
            OPT_SET_META_CONTEXT if self.structured => {
                reply(REP_META_CONTEXT, &[&CONTEXT.to_be_bytes(), BASE_ALLOCATION.as_bytes()].concat());
                reply(REP_ACK, &[]);
            }
            OPT_GO => {
                let flags =
                    export::HAS_FLAGS | export::SEND_FLUSH | export::SEND_TRIM | export::SEND_WRITE_ZEROES;
                let size = self.disk.borrow().len() as u64;
                let info = InfoExport { kind: INFO_EXPORT.into(), size: size.into(), flags: flags.into() };
                reply(REP_INFO, info.as_bytes());
                let sizes = InfoBlockSize {
                    kind: INFO_BLOCK_SIZE.into(),
                    minimum: 1.into(),
                    preferred: 4096.into(),
                    maximum: self.request_bytes.into(),
                };
                reply(REP_INFO, sizes.as_bytes());
                reply(REP_ACK, &[]);
            }
            _ => reply(REP_ERR_UNSUP, &[]),
        }
    }

    /// Carries request `n` of a connection out, and says something about it.
    fn answer(&self, entity: Entity, n: u32, asked: &Asked, data: &[u8], queue: &Rc<Queue>) {
        let shape = self.sim.decide(entity, &NBD_SHAPE, n, |d| {
            if d.below(3) > 0 { 0 } else { d.below(64) | (d.below(12) << 6) }
        });
        let lie = self.sim.decide(entity, &NBD_LIE, n, |d| {
            if d.below(6) > 0 { 0 } else { (1 + d.below(15)) | (d.below(1 << 16) << 4) }
        });
        let lie = if self.honest.get() { 0 } else { lie };
        let (from, len) = (asked.offset as usize, asked.len);
        let mut disk = self.disk.borrow_mut();
        match asked.command {
            CMD_WRITE => disk[from..from + len].copy_from_slice(data),
            CMD_WRITE_ZEROES | CMD_TRIM => disk[from..from + len].fill(0),
            _ => {}
        }
        let structured = self.structured && (asked.command == CMD_READ || asked.command == CMD_BLOCK_STATUS);
        let bytes = if structured {
            let mut chunks = match asked.command {
                CMD_READ => shaped(asked, &disk[from..from + len], shape),
                _ => vec![status(asked, &disk[from..from + len])],
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

impl Chunk {
    fn new(asked: &Asked, kind: u16, payload: Vec<u8>) -> Self {
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

/// A read's answer as any server may give it.
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

/// What is known of the disk, sector by sector.
fn status(asked: &Asked, bytes: &[u8]) -> Chunk {
    let mut payload = CONTEXT.to_be_bytes().to_vec();
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for sector in bytes.chunks(SECTOR) {
        let state = if sector.iter().all(|byte| *byte == 0) { 3 } else { 0 };
        match runs.last_mut() {
            Some((len, last)) if *last == state => *len += sector.len() as u32,
            _ => runs.push((sector.len() as u32, state)),
        }
    }
    for (len, state) in runs {
        payload.extend([len.to_be_bytes(), state.to_be_bytes()].concat());
    }
    Chunk::new(asked, CHUNK_BLOCK_STATUS, payload)
}

/// Makes an answer wrong.
fn spoil(chunks: &mut Vec<Chunk>, asked: &Asked, disk: &[u8], lie: u64) {
    let place = (lie >> 4) as usize;
    let (one, read) = (place % chunks.len(), asked.command == CMD_READ);
    let (from, half) = (asked.offset as usize, asked.len / 2);
    let part = |at: usize, len: usize| Chunk::data(asked, at as u64, &disk[at..at + len]);
    match lie & 15 {
        // One half twice, nothing of the other.
        1 if read => {
            let at = from + half * (place & 1);
            *chunks = vec![part(at, half), part(at, half)];
        }
        // Both halves, and a piece that is in them.
        2 if read => chunks.insert(one, part(from + half / 2, half)),
        // Somewhere else: before the request, or past its end.
        3 if read => {
            let at = if place & 1 == 0 { from.saturating_sub(SECTOR) } else { from + SECTOR };
            chunks[one] = part(at.min(disk.len() - asked.len), asked.len);
        }
        4 if chunks.len() > 1 || read => drop(chunks.remove(one)),
        5 => chunks[one].cookie ^= 1 << (place % 6),
        6 => chunks[one].longer = if place & 1 == 0 { -1 } else { 1 + place as i32 },
        // What failed has data as well; the client is told, so this is none.
        7 => chunks.insert(one, Chunk::new(asked, CHUNK_ERROR, failed(error::EIO))),
        8 => chunks.push(Chunk::new(asked, CHUNK_NONE, Vec::new())),
        // Half, with an overlap as large as what is missing.
        10 if read => {
            *chunks = vec![part(from, half), part(from + half / 2, half), part(from, asked.len - 2 * half)]
        }
        12 => chunks[one].kind = (place & 0x7fff) as u16,
        14 if read => chunks.insert(one, Chunk::hole(asked, asked.offset + half as u64, place & 1)),
        14 | 15 => chunks.insert(one, Chunk::new(asked, chunks[one].kind, chunks[one].payload.clone())),
        _ => {}
    }
}

fn failed(error: u32) -> Vec<u8> {
    ErrorHead { error: error.into(), message_len: 0.into() }.as_bytes().to_vec()
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
        // Where one comes after the end, that is what is wrong.
        let done = i == last || kind == 8 && i + 1 == last;
        let len = chunk.payload.len().saturating_add_signed(chunk.longer as isize) as u32;
        let head = ChunkHeader::new(chunk.cookie, chunk.kind, done || chunk.done, len);
        bytes.extend_from_slice(head.as_bytes());
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
        // Not that of another request: a simple reply says nothing else of where its bytes belong.
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
        8 => "it goes on behind its end",
        9 => "it never comes",
        10 => "as many bytes as were asked for, some of them twice",
        11 => "a simple reply comes first",
        12 => "a type is another",
        13 => "it is cut, and the server hangs up",
        14 => "a hole is in it that is none, or of no length",
        15 => "a chunk comes twice",
        _ => "nothing",
    }
}
