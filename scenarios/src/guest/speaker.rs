//! An NBD client that uses the whole protocol: every command, every flag that it permits, every place and size, and
//! what a server must refuse. It parses replies without the stack's code, and checks them.

use super::{RawNbd, options};
use crate::check::{BlockHistory, Invariant};
use crate::world::World;
use sim::{Entity, Label};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use tap_abi::nbd::{
    CHUNK_BLOCK_STATUS, CHUNK_ERROR_BIT, CHUNK_MAGIC, CHUNK_NONE, CHUNK_OFFSET_DATA, CMD_BLOCK_STATUS,
    CMD_CACHE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, EXPORT_PADDING_BYTES,
    OPT_EXPORT_NAME, OPT_GO, OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY, OptionHeader, RequestHeader,
    SIMPLE_MAGIC, STATE_HOLE, STATE_ZERO, command, error, export, handshake,
};
use tap_core::wait::{Semaphore, Sender, oneshot};
use tap_host::{SECTOR_BYTES, SectorRange, Stream};
use zerocopy::IntoBytes;

/// One request: command in 4 bits (0 none, then read, write, flush, trim, zeroes, cache, status), flags in 5, first
/// sector in 11, sectors less one in 11, the kind of invalidity in 3.
pub static NBD_STEP: Label = Label::packed("nbd-step", "request {n}: {}", &[4, 5, 11, 11, 3]);

const COMMANDS: [u16; 7] =
    [CMD_READ, CMD_WRITE, CMD_FLUSH, CMD_TRIM, CMD_WRITE_ZEROES, CMD_CACHE, CMD_BLOCK_STATUS];

/// The request described by a value of [`NBD_STEP`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    command: u16,
    flags: u16,
    range: SectorRange,
    wrong: u64,
}

impl Step {
    /// The request of a value, on a disk of `size_sectors`, with at most `max` sectors of data.
    pub fn decode(value: u64, size_sectors: u64, max: u32) -> Option<Self> {
        let command = *COMMANDS.get(((value & 15) as usize).checked_sub(1)?)?;
        let legal = command::FUA
            | match command {
                CMD_READ => command::DF,
                CMD_WRITE_ZEROES => command::NO_HOLE | command::FAST_ZERO,
                CMD_BLOCK_STATUS => command::REQ_ONE,
                _ => 0,
            };
        let start = ((value >> 9) & 0x7ff) % size_sectors;
        let data = command == CMD_READ || command == CMD_WRITE;
        let max = if data { u64::from(max) } else { u64::MAX };
        let count = (((value >> 20) & 0x7ff) + 1).min(size_sectors - start).min(max);
        let range = SectorRange::new(start, count as u32);
        Some(Self { command, flags: (value >> 4) as u16 & legal, range, wrong: (value >> 31) & 7 })
    }

    /// Whether the server flushes the disk for it.
    pub fn flushes(self) -> bool {
        self.command == CMD_FLUSH || self.changes() && self.flags & command::FUA != 0
    }

    fn changes(self) -> bool {
        matches!(self.command, CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES)
    }
}

/// The requests of `who`, each one decision.
pub fn steps(world: &World, who: Entity, count: u32, size_sectors: u64, max: u32) -> Vec<Option<Step>> {
    let one = |n| {
        let value = world.sim.decide(who, &NBD_STEP, n, |d| {
            let command = [1, 1, 2, 2, 2, 3, 4, 5, 5, 6, 7][d.below(11) as usize];
            let count = if d.below(8) == 0 { d.below(2048) } else { d.below(96) };
            // A few places, so that requests overlap.
            let start = if d.below(2) == 0 { d.below(48) * 8 } else { d.below(2048) };
            let wrong = if d.below(12) == 0 { 1 + d.below(7) } else { 0 };
            command | d.below(32) << 4 | start << 9 | count << 20 | wrong << 31
        });
        Step::decode(value, size_sectors, max)
    };
    (0..count).map(one).collect()
}

/// A reply: an error, or the data.
#[derive(Default, Debug)]
pub struct Answer {
    /// The protocol's number of an error, or 0.
    pub error: u32,
    /// The bytes of a read.
    pub data: Vec<u8>,
    /// The extents of a status: bytes and state.
    pub extents: Vec<(u32, u32)>,
}

struct Waiting {
    command: u16,
    offset: u64,
    len: u32,
    tell: Sender<Answer>,
}

/// A client on one connection; clones share it.
pub struct Speaker<S>(Rc<Inner<S>>);

impl<S> Clone for Speaker<S> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

struct Inner<S> {
    world: World,
    raw: RawNbd<S>,
    /// Replies come in chunks.
    structured: bool,
    read_only: bool,
    waiting: RefCell<BTreeMap<u64, Waiting>>,
    next: Cell<u64>,
    turn: Semaphore,
}

impl<S: Stream> Speaker<S> {
    /// Negotiates the export `name` with a server, and checks its replies. `None` if the connection ends earlier.
    pub async fn agree(
        world: &World,
        raw: RawNbd<S>,
        who: Entity,
        name: &str,
        structured: bool,
        size_bytes: u64,
    ) -> Option<Self> {
        raw.take(18).await?;
        let padded = world.setting("nbd-padding", &[false, true]);
        let offered =
            if padded { handshake::FIXED_NEWSTYLE } else { handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES };
        raw.send(&u32::from(offered).to_be_bytes()).await.ok()?;
        options::try_options(world, &raw, who, name).await?;
        let (size, flags) = if structured {
            options::ask(&raw, OPT_STRUCTURED_REPLY, &[]).await?;
            options::ask(&raw, OPT_SET_META_CONTEXT, &options::query(name)).await?;
            let (_, info) = options::ask(&raw, OPT_GO, &options::choice(name)).await?;
            let export = info.into_iter().find(|(_, data)| data.len() == 12 && data[..2] == [0, 0])?.1;
            (export[2..10].to_vec(), export[10..].to_vec())
        } else {
            let head = OptionHeader::new(OPT_EXPORT_NAME, name.len() as u32);
            raw.send(&[head.as_bytes(), name.as_bytes()].concat()).await.ok()?;
            let export = raw.take(10).await?;
            if padded && raw.take(EXPORT_PADDING_BYTES).await? != [0; EXPORT_PADDING_BYTES] {
                return None;
            }
            (export[..8].to_vec(), export[8..].to_vec())
        };
        let flags = u16::from_be_bytes(flags.try_into().ok()?);
        let read_only = flags & export::READ_ONLY != 0;
        let changes = export::SEND_TRIM | export::SEND_WRITE_ZEROES | export::SEND_FAST_ZERO;
        if u64::from_be_bytes(size.try_into().ok()?) != size_bytes
            || flags & export::HAS_FLAGS == 0
            || read_only != name.starts_with("frozen")
            || (flags & changes == changes) == read_only
            || (flags & export::SEND_DF != 0) != structured
        {
            world.fail(Invariant::N2, format!("export '{name}' is offered with flags {flags:#x}"));
        }
        let inner = Inner {
            world: world.clone(),
            raw,
            structured,
            read_only,
            waiting: RefCell::default(),
            next: Cell::new(1),
            turn: Semaphore::new(1),
        };
        Some(Self(Rc::new(inner)))
    }

    /// Receives replies until the stream ends.
    pub async fn listen(self) {
        while self.reply().await.is_some() {}
        // Waiting requests learn that no reply will come.
        self.0.waiting.borrow_mut().clear();
    }

    fn wrong(&self, text: String) -> Option<()> {
        self.0.world.fail(Invariant::N2, text);
        None
    }

    async fn reply(&self) -> Option<()> {
        let raw = &self.0.raw;
        let magic = u32::from_be_bytes(raw.take(4).await?.try_into().ok()?);
        let rest = raw.take(if magic == CHUNK_MAGIC { 16 } else { 12 }).await?;
        let number = |at: usize| u32::from_be_bytes(rest[at..at + 4].try_into().unwrap_or_default());
        let cookie = |at: usize| u64::from(number(at)) << 32 | u64::from(number(at + 4));
        let asked = |cookie: u64| self.0.waiting.borrow_mut().remove(&cookie);
        if magic == SIMPLE_MAGIC {
            let Some(asked) = asked(cookie(4)) else {
                return self.wrong("a reply has no request".into());
            };
            let (error, read) = (number(0), asked.command == CMD_READ);
            if self.0.structured && (read || error != 0) {
                return self.wrong(format!("a simple reply to {} with error {error}", asked.command));
            }
            let len = if read && error == 0 { asked.len as usize } else { 0 };
            let data = raw.take(len).await?;
            let _gone = asked.tell.send(Answer { error, data, ..Answer::default() });
            return Some(());
        }
        let (flags, kind) = ((number(0) >> 16) as u16, number(0) as u16);
        let payload = raw.take(number(12) as usize).await?;
        let Some(asked) = asked(cookie(4)) else { return self.wrong("a chunk has no request".into()) };
        let mut answer = Answer::default();
        let word = |at: usize| {
            payload.get(at..at + 4).map_or(0, |b| u32::from_be_bytes(b.try_into().unwrap_or_default()))
        };
        let offset = u64::from(word(0)) << 32 | u64::from(word(4));
        match kind {
            CHUNK_OFFSET_DATA if asked.command == CMD_READ && offset == asked.offset => {
                answer.data = payload[8..].to_vec();
            }
            CHUNK_NONE if asked.command == CMD_READ && asked.len == 0 && payload.is_empty() => {}
            CHUNK_BLOCK_STATUS if asked.command == CMD_BLOCK_STATUS && payload.len() % 8 == 4 => {
                answer.extents = (4..payload.len()).step_by(8).map(|at| (word(at), word(at + 4))).collect();
            }
            kind if kind & CHUNK_ERROR_BIT != 0 && word(0) != 0 => answer.error = word(0),
            _ => return self.wrong(format!("a chunk of type {kind} to command {}", asked.command)),
        }
        if flags != 1 || !self.0.structured || magic != CHUNK_MAGIC {
            return self.wrong(format!("a chunk with flags {flags}"));
        }
        let _gone = asked.tell.send(answer);
        Some(())
    }

    /// Whether replies come in chunks, which a status needs.
    pub fn is_structured(&self) -> bool {
        self.0.structured
    }

    /// Sends a request and waits for its answer; `None` if the connection ends earlier.
    pub async fn call(&self, command: u16, flags: u16, offset: u64, len: u32, data: &[u8]) -> Option<Answer> {
        let cookie = self.0.next.replace(self.0.next.get() + 1);
        let (tell, told) = oneshot();
        self.0.waiting.borrow_mut().insert(cookie, Waiting { command, offset, len, tell });
        let header = RequestHeader::new(command, flags, cookie, offset, len);
        let turn = self.0.turn.acquire().await;
        let sent = self.0.raw.send(&[header.as_bytes(), data].concat()).await;
        drop(turn);
        if sent.is_err() {
            self.0.waiting.borrow_mut().remove(&cookie);
        }
        told.await
    }

    /// Carries out `step` on the disk of `history`, and checks the result.
    pub async fn step(&self, step: Step, history: &RefCell<BlockHistory>) {
        let world = &self.0.world;
        world.count(|s| s.requests += 1);
        if step.wrong > 0 {
            let size_sectors = history.borrow().size_sectors();
            return self.refused(step, size_sectors).await;
        }
        let Step { command, flags, range, .. } = step;
        world.sim.remark("speaker", || format!("asks {command} with flags {flags} of {range}"));
        let (offset, len) = (range.start.0 * SECTOR_BYTES, range.len_bytes() as u32);
        if self.0.read_only && step.changes() {
            let data = vec![0x77; if command == CMD_WRITE { len as usize } else { 0 }];
            if let Some(answer) = self.call(command, flags, offset, len, &data).await
                && answer.error != error::EPERM
            {
                self.wrong(format!("command {command} on a read-only export: error {}", answer.error));
            }
            return;
        }
        match command {
            CMD_WRITE | CMD_WRITE_ZEROES | CMD_TRIM => self.change(step, history).await,
            CMD_FLUSH => {
                let inv = history.borrow_mut().begin_flush();
                let answer = self.call(command, flags, 0, 0, &[]).await;
                if self.succeeded(step, answer.as_ref()) {
                    history.borrow_mut().end_flush(inv);
                }
            }
            CMD_CACHE => {
                let answer = self.call(command, flags, offset, len, &[]).await;
                self.succeeded(step, answer.as_ref());
            }
            _ => {
                let inv = history.borrow_mut().begin_read();
                let asked = self.call(command, flags, offset, len, &[]).await;
                let refused = command == CMD_BLOCK_STATUS && !self.0.structured;
                if refused && asked.as_ref().is_some_and(|answer| answer.error == error::EINVAL) {
                    return history.borrow_mut().end_read(inv);
                }
                match asked.filter(|answer| self.succeeded(step, Some(answer))) {
                    Some(answer) if command == CMD_READ => self.read(inv, range, &answer, history),
                    Some(answer) => self.status(step, inv, &answer, history),
                    None => history.borrow_mut().end_read(inv),
                }
            }
        }
    }

    async fn change(&self, step: Step, history: &RefCell<BlockHistory>) {
        let Step { command, flags, range, .. } = step;
        let (offset, len) = (range.start.0 * SECTOR_BYTES, range.len_bytes() as u32);
        let (mut data, write) = (Vec::new(), {
            let mut history = history.borrow_mut();
            if command == CMD_WRITE { history.begin_write(range) } else { history.begin_zeros(range) }
        });
        if command == CMD_WRITE {
            data = vec![0; len as usize];
            for (i, sector) in data.chunks_exact_mut(SECTOR_BYTES as usize).enumerate() {
                history.borrow().payload(write, range.start.0 + i as u64, sector);
            }
        }
        let answer = self.call(command, flags, offset, len, &data).await;
        let slow =
            answer.as_ref().is_some_and(|a| a.error == error::ENOTSUP && flags & command::FAST_ZERO != 0);
        let ok = !slow && self.succeeded(step, answer.as_ref());
        let mut history = history.borrow_mut();
        // A trim promises nothing.
        history.end_write(write, ok && command != CMD_TRIM);
        if ok && command != CMD_TRIM && flags & command::FUA != 0 {
            history.harden(write, range);
        }
    }

    /// Whether it was answered with success.
    fn succeeded(&self, step: Step, answer: Option<&Answer>) -> bool {
        match answer {
            Some(answer) if answer.error == 0 => true,
            Some(answer) if !self.0.world.errors_allowed() => {
                let text = format!("{step:?} failed with error {}", answer.error);
                self.0.world.fail(Invariant::E4, text);
                false
            }
            _ => false,
        }
    }

    fn read(&self, inv: u64, range: SectorRange, answer: &Answer, history: &RefCell<BlockHistory>) {
        if answer.data.len() as u64 != range.len_bytes() {
            history.borrow_mut().end_read(inv);
            self.wrong(format!("{} bytes for a read of {range}", answer.data.len()));
        } else if let Err(wrong) = history.borrow_mut().check_read(inv, range, &answer.data) {
            self.0.world.fail(wrong.invariant(Invariant::G1), format!("read {range}: {wrong}"));
        }
    }

    /// Extents are whole sectors within the range asked for; zeros are zeros, and so are holes, because nothing is
    /// below.
    fn status(&self, step: Step, inv: u64, answer: &Answer, history: &RefCell<BlockHistory>) {
        let (range, one) = (step.range, step.flags & command::REQ_ONE != 0);
        let mut history = history.borrow_mut();
        history.end_read(inv);
        let (mut at, mut left) = (range.start.0, u64::from(range.count));
        let mut last = None;
        for (len, state) in &answer.extents {
            let count = u64::from(*len) / SECTOR_BYTES;
            if *len == 0 || u64::from(*len) % SECTOR_BYTES != 0 || count > left || last == Some(*state) {
                self.wrong(format!("status of {range}: {len} bytes {state} at sector {at}"));
                return;
            }
            let part = SectorRange::new(at, count as u32);
            if state & STATE_HOLE != 0 && state & STATE_ZERO == 0 {
                self.wrong(format!("status of {range}: {part} is a hole that is not zeros"));
            }
            if state & STATE_ZERO != 0 {
                let zeros = vec![0; part.len_bytes() as usize];
                if let Err(wrong) = history.check_read(inv, part, &zeros) {
                    self.wrong(format!("status of {range}: {part} is reported as zeros: {wrong}"));
                }
            }
            (at, left, last) = (at + count, left - count, Some(*state));
        }
        if answer.extents.is_empty() || one && answer.extents.len() > 1 {
            self.wrong(format!("status of {range} with flags {}: {:?}", step.flags, answer.extents));
        }
    }

    /// An invalid request must be refused with the right error, and changes nothing. A request that begins or ends
    /// inside a sector, or has no bytes, is valid; here such a one only changes something if that is past the end.
    async fn refused(&self, step: Step, size_sectors: u64) {
        let (mut command, mut flags) = (step.command, step.flags);
        let (mut offset, mut len) = (step.range.start.0 * SECTOR_BYTES, step.range.len_bytes() as u32);
        let mut why = error::EINVAL;
        match step.wrong {
            1 | 2 => {
                (offset, len) = if step.wrong == 1 { (offset + 1, len) } else { (offset, len - 7) };
                let size_bytes = size_sectors * SECTOR_BYTES;
                if step.changes() {
                    (offset, why) = (size_bytes - u64::from(len) + 1, error::ENOSPC);
                } else if offset + u64::from(len) <= size_bytes {
                    why = 0;
                }
            }
            3 => {
                offset = size_sectors * SECTOR_BYTES - u64::from(len) + SECTOR_BYTES;
                why = if step.changes() { error::ENOSPC } else { error::EINVAL };
            }
            4 => {
                len = 0;
                why = if command == CMD_BLOCK_STATUS { error::EINVAL } else { 0 };
            }
            5 => flags |= 1 << (5 + step.range.start.0 % 11),
            6 => command = 8 + (step.range.start.0 % 900) as u16,
            _ => {
                offset = u64::MAX - 511;
                why = if step.changes() { error::ENOSPC } else { error::EINVAL };
            }
        }
        // A flush covers everything, whatever its range.
        if command == CMD_FLUSH && step.wrong != 5 {
            return;
        }
        if self.0.read_only && step.changes() && step.wrong != 5 && step.wrong != 6 {
            why = error::EPERM;
        }
        if command == CMD_BLOCK_STATUS && !self.0.structured {
            why = error::EINVAL;
        }
        let data = vec![0x66; if command == CMD_WRITE { len as usize } else { 0 }];
        let answer = self.call(command, flags, offset, len, &data).await;
        let failed = |answer: &Answer| why == 0 && answer.error != 0 && self.0.world.errors_allowed();
        if let Some(answer) = answer.filter(|answer| answer.error != why && !failed(answer)) {
            let text = format!("command {command} with flags {flags:#x}, {len} bytes at {offset}");
            self.wrong(format!("{text}: error {} instead of {why}", answer.error));
        }
    }

    /// Disconnects in order.
    pub fn leave(&self) {
        self.0.raw.close();
    }
}
