//! An NBD client that uses the whole protocol: every command, every flag that it permits, every place and size, and
//! what a server must refuse. It parses replies without the stack's code, and checks them.

use super::{Gate, RawNbd, options};
use crate::check::{BlockHistory, Invariant};
use crate::world::World;
use kernel_model::ProcessStream;
use sim::{Entity, Label};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use tap_abi::nbd::{
    CHUNK_BLOCK_STATUS, CHUNK_BLOCK_STATUS_EXT, CHUNK_ERROR_BIT, CHUNK_MAGIC, CHUNK_NONE, CHUNK_OFFSET_DATA,
    CHUNK_OFFSET_HOLE, CMD_BLOCK_STATUS, CMD_CACHE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE,
    CMD_WRITE_ZEROES, EXPORT_PADDING_BYTES, EXTENDED_CHUNK_MAGIC, ExtendedRequest, OPT_EXPORT_NAME,
    OPT_EXTENDED_HEADERS, OPT_GO, OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY, OptionHeader, RequestHeader,
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
    pub extents: Vec<(u64, u32)>,
    /// The same for the depth of the allocation.
    pub depths: Vec<(u64, u32)>,
}

struct Waiting {
    command: u16,
    offset: u64,
    len: u32,
    /// What the chunks before the last one said.
    so_far: Answer,
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
    /// Headers are extended.
    extended: bool,
    /// Contexts were agreed on, which a status needs.
    contexts: bool,
    /// A status has the depth as well.
    depth: bool,
    read_only: bool,
    waiting: RefCell<BTreeMap<u64, Waiting>>,
    next: Cell<u64>,
    turn: Semaphore,
    /// Requests that are not sent yet.
    unsent: Gate,
    /// It sends nothing more, but has a right to its replies.
    finished: Cell<bool>,
}

/// The numbers of the contexts, in the order of their chunks.
const CONTEXTS: [u32; 2] = [1, 2];

/// Adds what a chunk of `kind` says to the answer; `None` if it does not fit the request.
fn add(kind: u16, payload: &[u8], asked: &mut Waiting, extended: bool) -> Option<()> {
    let word = |at: usize| {
        payload.get(at..at + 4).map_or(0, |b| u32::from_be_bytes(b.try_into().unwrap_or_default()))
    };
    let long = |at: usize| u64::from(word(at)) << 32 | u64::from(word(at + 4));
    let (read, status) = (asked.command == CMD_READ, asked.command == CMD_BLOCK_STATUS);
    match kind {
        CHUNK_OFFSET_DATA if read && long(0) == asked.offset => {
            asked.so_far.data = payload.get(8..)?.to_vec();
        }
        CHUNK_OFFSET_HOLE
            if read && payload.len() == 12 && (long(0), word(8)) == (asked.offset, asked.len) =>
        {
            asked.so_far.data = vec![0; asked.len as usize];
        }
        CHUNK_NONE if read && asked.len == 0 && payload.is_empty() => {}
        CHUNK_NONE if extended && !read && !status && payload.is_empty() => {}
        CHUNK_BLOCK_STATUS if status && !extended && payload.len() % 8 == 4 => {
            let one = |at| (u64::from(word(at)), word(at + 4));
            asked.add_extents(word(0), (4..payload.len()).step_by(8).map(one).collect())?;
        }
        CHUNK_BLOCK_STATUS_EXT if status && extended && payload.len() == 8 + 16 * word(4) as usize => {
            let one = |at| (long(at), word(at + 12));
            asked.add_extents(word(0), (8..payload.len()).step_by(16).map(one).collect())?;
        }
        kind if kind & CHUNK_ERROR_BIT != 0 && word(0) != 0 => asked.so_far.error = word(0),
        _ => return None,
    }
    Some(())
}

impl Waiting {
    /// Adds the extents of a context, which comes once and in its place.
    fn add_extents(&mut self, context: u32, extents: Vec<(u64, u32)>) -> Option<()> {
        let Answer { extents: first, depths: second, .. } = &mut self.so_far;
        let (place, id) = if first.is_empty() { (first, CONTEXTS[0]) } else { (second, CONTEXTS[1]) };
        if !place.is_empty() || extents.is_empty() || context != id {
            return None;
        }
        *place = extents;
        Some(())
    }
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
        let extended = structured && world.setting("nbd-extended", &[false, true]);
        let depth = structured && world.setting("nbd-depth", &[false, true]);
        let contexts = structured && !world.setting("nbd-contexts-dropped", &[false, false, false, true]);
        let (size, flags) = if structured {
            let headers = if extended { OPT_EXTENDED_HEADERS } else { OPT_STRUCTURED_REPLY };
            options::ask(&raw, headers, &[]).await?;
            options::ask(&raw, OPT_SET_META_CONTEXT, &options::query(name, depth)).await?;
            if !contexts {
                options::drop_contexts(world, &raw, name).await?;
            }
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
            extended,
            contexts,
            depth,
            read_only,
            waiting: RefCell::default(),
            next: Cell::new(1),
            turn: Semaphore::new(1),
            unsent: Gate::default(),
            finished: Cell::new(false),
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
        let rest = match magic {
            CHUNK_MAGIC => raw.take(16).await?,
            EXTENDED_CHUNK_MAGIC => raw.take(28).await?,
            _ => raw.take(12).await?,
        };
        let number = |at: usize| u32::from_be_bytes(rest[at..at + 4].try_into().unwrap_or_default());
        let cookie = |at: usize| u64::from(number(at)) << 32 | u64::from(number(at + 4));
        let asked = |cookie: u64| self.0.waiting.borrow_mut().remove(&cookie);
        if magic == SIMPLE_MAGIC {
            let Some(asked) = asked(cookie(4)) else {
                return self.wrong("a reply has no request".into());
            };
            let (error, read) = (number(0), asked.command == CMD_READ);
            if self.0.extended || self.0.structured && (read || error != 0) {
                return self.wrong(format!("a simple reply to {} with error {error}", asked.command));
            }
            let len = if read && error == 0 { asked.len as usize } else { 0 };
            let data = raw.take(len).await?;
            let _gone = asked.tell.send(Answer { error, data, ..Answer::default() });
            return Some(());
        }
        let (flags, kind) = ((number(0) >> 16) as u16, number(0) as u16);
        let extended = magic == EXTENDED_CHUNK_MAGIC;
        let payload = raw.take(number(if extended { 24 } else { 12 }) as usize).await?;
        let Some(mut asked) = asked(cookie(4)) else { return self.wrong("a chunk has no request".into()) };
        if extended && (number(20) != 0 || cookie(12) != asked.offset) {
            return self.wrong(format!("a chunk for offset {} instead of {}", cookie(12), asked.offset));
        }
        if add(kind, &payload, &mut asked, extended).is_none() {
            return self.wrong(format!("a chunk of type {kind} to command {}", asked.command));
        }
        // Only the status of two contexts has two chunks.
        let answer = &asked.so_far;
        let more = self.0.depth && !answer.extents.is_empty() && answer.depths.is_empty();
        let right = if self.0.extended { EXTENDED_CHUNK_MAGIC } else { CHUNK_MAGIC };
        if flags != u16::from(!more) || !self.0.structured || magic != right {
            return self.wrong(format!("a chunk with flags {flags}"));
        }
        if more {
            self.0.waiting.borrow_mut().insert(cookie(4), asked);
        } else {
            let _gone = asked.tell.send(asked.so_far);
        }
        Some(())
    }

    /// Whether it may ask for a status.
    pub fn has_contexts(&self) -> bool {
        self.0.contexts
    }

    /// Sends a request and waits for its answer; `None` if the connection ends earlier.
    pub async fn call(&self, command: u16, flags: u16, offset: u64, len: u32, data: &[u8]) -> Option<Answer> {
        let cookie = self.0.next.replace(self.0.next.get() + 1);
        let (tell, told) = oneshot();
        self.0
            .waiting
            .borrow_mut()
            .insert(cookie, Waiting { command, offset, len, so_far: Answer::default(), tell });
        let message = if self.0.extended {
            let payload = if command == CMD_WRITE { command::PAYLOAD_LEN } else { 0 };
            let header = ExtendedRequest::new(command, flags | payload, cookie, offset, u64::from(len));
            [header.as_bytes(), data].concat()
        } else {
            [RequestHeader::new(command, flags, cookie, offset, len).as_bytes(), data].concat()
        };
        self.0.unsent.enter();
        let turn = self.0.turn.acquire().await;
        let sent = self.0.raw.send(&message).await;
        drop(turn);
        self.0.unsent.leave();
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
                let refused = command == CMD_BLOCK_STATUS && !self.0.contexts;
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
            None if self.0.finished.get() => {
                self.wrong(format!("{step:?}, sent before the client finished, has no reply"));
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

    /// Extents are whole sectors within the range asked for; zeros are zeros, and so are holes and what is in no image,
    /// because nothing is below.
    fn status(&self, step: Step, inv: u64, answer: &Answer, history: &RefCell<BlockHistory>) {
        let (range, one) = (step.range, step.flags & command::REQ_ONE != 0);
        history.borrow_mut().end_read(inv);
        for (extents, zeros) in [
            (&answer.extents, (|state| state & STATE_ZERO != 0) as fn(u32) -> bool),
            (&answer.depths, |depth| depth == 0),
        ] {
            let (mut at, mut left) = (range.start.0, u64::from(range.count));
            let mut last = None;
            for (len, state) in extents {
                let count = *len / SECTOR_BYTES;
                if *len == 0 || *len % SECTOR_BYTES != 0 || count > left || last == Some(*state) {
                    self.wrong(format!("status of {range}: {len} bytes {state} at sector {at}"));
                    return;
                }
                let part = SectorRange::new(at, count as u32);
                let bytes = vec![0; if zeros(*state) { part.len_bytes() as usize } else { 0 }];
                if zeros(*state)
                    && let Err(wrong) = history.borrow_mut().check_read(inv, part, &bytes)
                {
                    self.wrong(format!("status of {range}: {part} is reported as zeros: {wrong}"));
                }
                (at, left, last) = (at + count, left - count, Some(*state));
            }
            if one && extents.len() > 1 {
                self.wrong(format!("status of {range} with flags {}: {extents:?}", step.flags));
            }
        }
        let holes = |(_, state): &(u64, u32)| state & STATE_HOLE != 0 && state & STATE_ZERO == 0;
        let deep = |(_, depth): &(u64, u32)| *depth > 1;
        if answer.extents.is_empty() || answer.depths.is_empty() == self.0.depth {
            self.wrong(format!("status of {range}: a context is missing"));
        } else if answer.extents.iter().any(holes) || answer.depths.iter().any(deep) {
            self.wrong(format!("status of {range}: {:?}, {:?}", answer.extents, answer.depths));
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
            // With extended headers the first of these flags announces a payload.
            5 if self.0.extended => flags |= 1 << (6 + step.range.start.0 % 10),
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
        if command == CMD_BLOCK_STATUS && !self.0.contexts {
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

    /// Completes when every request that was begun has been sent. Only one task at a time may wait.
    pub async fn all_sent(&self) {
        self.0.unsent.below(1).await;
    }
}

impl Speaker<ProcessStream> {
    /// Sends nothing more, and receives the replies that are due.
    pub fn finish(&self) {
        self.0.finished.set(true);
        self.0.raw.finish();
    }
}
