//! A load client: one NBD connection, a fixed number of requests in flight, sent in batches where possible.
//!
//! It is as cheap as possible, so that the server is what is measured, and implements only what it needs of the
//! protocol: fixed newstyle negotiation with `GO`, simple and structured replies.

use super::Result;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE: u32 = 0x6744_6698;
const STRUCTURED: u32 = 0x668e_33ef;

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Read,
    Write,
    /// Each write is followed by a flush.
    WriteFlush,
}

/// Where requests go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Order {
    /// Anywhere, a fixed pseudo-random sequence.
    Random,
    /// Every piece once, in an order without locality.
    Scattered,
    /// One after the other.
    Sequential,
}

/// A fixed amount of work.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) kind: Kind,
    pub(super) order: Order,
    pub(super) size_bytes: u32,
    pub(super) depth: usize,
    pub(super) requests: u64,
}

/// The duration and median latency of a load, as seen by the client.
pub(super) struct Seen {
    pub(super) requests: u64,
    pub(super) elapsed: Duration,
    pub(super) p50: Duration,
}

/// A connection in its transmission phase.
pub(super) struct Client {
    stream: UnixStream,
    export_bytes: u64,
    buffer: Vec<u8>,
    filled: usize,
}

impl Client {
    /// Connects, as soon as the server listens, and chooses the default export.
    pub(super) fn connect(socket: &Path, patience: Duration) -> Result<Self> {
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(_) if start.elapsed() < patience => std::thread::sleep(Duration::from_millis(5)),
                Err(e) => return Err(format!("connect to {}: {e}", socket.display()).into()),
            }
        };
        let mut client = Self { stream, export_bytes: 0, buffer: vec![0; 1 << 20], filled: 0 };
        client.negotiate()?;
        Ok(client)
    }

    fn negotiate(&mut self) -> Result<()> {
        let mut hello = [0; 18];
        self.stream.read_exact(&mut hello)?;
        if &hello[..8] != b"NBDMAGIC" || hello[8..16] != IHAVEOPT.to_be_bytes() {
            return Err("the server speaks no newstyle NBD".into());
        }
        // Fixed newstyle, no zeroes.
        self.stream.write_all(&3_u32.to_be_bytes())?;
        self.option(8, &[])?;
        self.reply()?;
        self.option(7, &[0; 6])?;
        loop {
            let (kind, data) = self.reply()?;
            match kind {
                1 => return Ok(()),
                3 if data.len() >= 10 && data[..2] == [0, 0] => {
                    self.export_bytes = u64::from_be_bytes(data[2..10].try_into()?);
                }
                3 => {}
                kind => return Err(format!("the server refuses its default export: {kind:#x}").into()),
            }
        }
    }

    fn option(&mut self, number: u32, data: &[u8]) -> Result<()> {
        let mut bytes = IHAVEOPT.to_be_bytes().to_vec();
        bytes.extend(number.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        Ok(self.stream.write_all(&bytes)?)
    }

    fn reply(&mut self) -> Result<(u32, Vec<u8>)> {
        let mut head = [0; 20];
        self.stream.read_exact(&mut head)?;
        if head[..8] != OPTION_REPLY.to_be_bytes() {
            return Err("the server answers an option with something else".into());
        }
        let word = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let mut data = vec![0; word(16).min(1 << 16) as usize];
        self.stream.read_exact(&mut data)?;
        Ok((word(12), data))
    }

    /// Does `load`, from the first request to the last reply.
    pub(super) fn run(&mut self, load: &Load) -> Result<Seen> {
        let mut plan = Plan::new(load, self.export_bytes)?;
        let mut sent_at = vec![Instant::now(); load.depth];
        let mut times = Vec::with_capacity(load.requests.min(1 << 20) as usize);
        let mut out = Vec::new();
        let start = Instant::now();
        for slot in 0..load.depth {
            plan.put(slot, &mut out);
        }
        self.stream.write_all(&out)?;
        let mut done = 0;
        while done < plan.expected() {
            out.clear();
            let slots = self.replies(&mut plan)?;
            let now = Instant::now();
            for slot in slots {
                done += 1;
                if times.len() < times.capacity() {
                    times.push(now - sent_at[slot]);
                }
                if plan.put(slot, &mut out) {
                    sent_at[slot] = now;
                }
            }
            if !out.is_empty() {
                self.stream.write_all(&out)?;
            }
        }
        let elapsed = start.elapsed();
        times.sort_unstable();
        let p50 = times.get(times.len() / 2).copied().unwrap_or_default();
        Ok(Seen { requests: done, elapsed, p50 })
    }

    /// Receives what has arrived, and returns the slots of the complete replies.
    fn replies(&mut self, plan: &mut Plan) -> Result<Vec<usize>> {
        let mut slots = Vec::new();
        while slots.is_empty() {
            let n = match self.stream.read(&mut self.buffer[self.filled..]) {
                Ok(0) => return Err("the server closed the connection".into()),
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Err(e.into()),
            };
            self.filled += n;
            let mut at = 0;
            while let Some((slot, len)) = plan.parse(&self.buffer[at..self.filled])? {
                at += len;
                slots.extend(slot);
            }
            self.buffer.copy_within(at..self.filled, 0);
            self.filled -= at;
        }
        Ok(slots)
    }
}

/// Which request comes next, and what replies mean.
struct Plan {
    load: Load,
    pieces: u64,
    next: u64,
    /// A multiplier coprime to `pieces`.
    stride: u64,
    random: u64,
    payload: Vec<u8>,
    /// Whether the request in flight is a read, by slot.
    reads: Vec<bool>,
    flush_due: Vec<bool>,
}

impl Plan {
    fn new(load: &Load, export_bytes: u64) -> Result<Self> {
        let pieces = export_bytes / u64::from(load.size_bytes);
        if pieces == 0 || load.order == Order::Scattered && load.requests > pieces {
            return Err(format!("an export of {export_bytes} bytes is too small for this load").into());
        }
        let stride = (pieces * 618 / 1000..).find(|s| gcd(*s, pieces) == 1).unwrap_or(1);
        Ok(Self {
            load: *load,
            pieces,
            next: 0,
            stride,
            random: 0x9e37_79b9_7f4a_7c15,
            payload: (0..load.size_bytes).map(|i| (i * 7 + i / 251 + 1) as u8).collect(),
            reads: vec![false; load.depth],
            flush_due: vec![false; load.depth],
        })
    }

    /// Replies to come.
    fn expected(&self) -> u64 {
        if self.load.kind == Kind::WriteFlush { self.load.requests * 2 } else { self.load.requests }
    }

    /// Appends the next request of `slot`, if there is one left.
    fn put(&mut self, slot: usize, out: &mut Vec<u8>) -> bool {
        if std::mem::take(&mut self.flush_due[slot]) {
            self.reads[slot] = false;
            header(out, 3, slot, 0, 0);
            return true;
        }
        if self.next == self.load.requests {
            return false;
        }
        let piece = match self.load.order {
            Order::Sequential => self.next % self.pieces,
            Order::Scattered => self.next * self.stride % self.pieces,
            Order::Random => {
                self.random ^= self.random << 13;
                self.random ^= self.random >> 7;
                self.random ^= self.random << 17;
                self.random % self.pieces
            }
        };
        self.next += 1;
        let read = self.load.kind == Kind::Read;
        self.reads[slot] = read;
        let offset = piece * u64::from(self.load.size_bytes);
        header(out, u16::from(!read), slot, offset, self.load.size_bytes);
        if !read {
            out.extend_from_slice(&self.payload);
            self.flush_due[slot] = self.load.kind == Kind::WriteFlush;
        }
        true
    }

    /// The first reply in `bytes`: its slot if it ends a request, and its length. `None` if it is not complete yet.
    fn parse(&self, bytes: &[u8]) -> Result<Option<(Option<usize>, usize)>> {
        let word = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if bytes.len() < 16 {
            return Ok(None);
        }
        // The upper half of the eight bytes of a cookie is zero.
        let (error, slot, len, last) = match word(0) {
            SIMPLE => {
                let slot = word(12) as usize;
                let data = *self.reads.get(slot).ok_or("a reply to no request")? && word(4) == 0;
                (word(4), slot, 16 + if data { self.load.size_bytes as usize } else { 0 }, true)
            }
            STRUCTURED if bytes.len() < 20 => return Ok(None),
            STRUCTURED => {
                let (flags, kind) = (word(4) >> 16, word(4) & 0xffff);
                let error = if kind & 0x8000 == 0 { 0 } else { kind };
                (error, word(12) as usize, 20 + word(16) as usize, flags & 1 != 0)
            }
            other => return Err(format!("a reply begins with {other:#x}").into()),
        };
        if error != 0 {
            return Err(format!("the server answers with error {error:#x}").into());
        }
        if bytes.len() < len {
            return Ok(None);
        }
        Ok(Some((last.then_some(slot), len)))
    }
}

fn header(out: &mut Vec<u8>, command: u16, slot: usize, offset: u64, len: u32) {
    out.extend(REQUEST.to_be_bytes());
    out.extend(0_u16.to_be_bytes());
    out.extend(command.to_be_bytes());
    out.extend((slot as u64).to_be_bytes());
    out.extend(offset.to_be_bytes());
    out.extend(len.to_be_bytes());
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
