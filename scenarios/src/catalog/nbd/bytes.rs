//! Requests that begin and end inside sectors, on several connections at once.
//!
//! ```text
//!   sectors   │         │         │         │
//!   lanes       ├──0──┤├───1───┤├───2───┤      each has one writer, which knows its bytes
//!   pairs     a run of whole sectors, and a part of it, written at once: outside it only the former may be there
//! ```
//!
//! Neighbouring lanes share sectors, so a write of one lane reads and rewrites bytes of others. In half of the worlds
//! operations of the host fail: what a failed request was to write may be there or not, byte by byte, and nothing else
//! may have changed.

use super::every::speaker;
use super::plan::{DISK, Plan, address, within};
use crate::check::Invariant;
use crate::guest::{Answer, Speaker};
use crate::scenario::Scenario;
use crate::world::{World, setting};
use kernel_model::faults::FaultPlan;
use kernel_model::{ProcessStream, SimHost, StorageConfig};
use sim::{Entity, Label, Sim};
use std::collections::BTreeMap;
use tap_abi::nbd::{
    CMD_BLOCK_STATUS, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, STATE_ZERO, command, error,
};
use tap_core::wait::joined;
use tap_host::SECTOR_BYTES;

/// One step of a writer: what it does in 3 bits (0 nothing, then write, zeroes, trim, read, status, pair), the first
/// byte in its lane in 11, bytes less one in 11, a flag in 1.
pub static BYTES_STEP: Label = Label::packed("nbd-bytes", "step {n}: {}", &[3, 11, 11, 1]);

/// Any offset and any length.
pub static NBD_BYTES: Scenario = Scenario {
    name: "nbd-bytes",
    about: "NBD clients read, write, zero and trim parts of sectors that they share, with I/O errors; nobody loses a byte",
    storage: &storage,
    body: &|w| Box::pin(bytes(w)),
};

fn storage(sim: &Sim) -> StorageConfig {
    let errors = setting(sim, "nbd-errors", &[false, true]);
    let failing = FaultPlan { errors, bad_sectors: errors, no_space: errors, ..FaultPlan::LATENCY };
    let faults = FaultPlan { short: true, transient: true, ..failing };
    StorageConfig { faults, ..StorageConfig::default() }
}

const LANES: usize = 6;
const STEPS: u32 = 12;
/// Where the first lane begins, in bytes: inside a sector.
const BEGIN: usize = 100;
/// Sizes of a lane in bytes: several in a sector, about one, more than two, and more than goes to the node at once.
const LANE_BYTES: [usize; 6] = [700, 100, 1500, 513, LONG_BYTES, LONG_BYTES];
const LONG_BYTES: usize = 10_000;
/// Offsets and lengths in a long lane are this many times those in others.
const LONG_TIMES: usize = 8;
/// The first sector of the pairs, at least; each writer has some for itself.
const PAIRS_AT: usize = 64;
const PAIR_SECTORS: usize = 4;
/// Enough for all lanes.
const MIN_REQUEST_BYTES: u32 = 64 << 10;
const SECTOR: usize = SECTOR_BYTES as usize;

async fn bytes(world: World) {
    let (plan, setup) = Plan::draw(&world);
    let mut plan = plan.unaligned();
    plan.server.request_bytes = plan.server.request_bytes.max(MIN_REQUEST_BYTES);
    world.storage.set_calm(true);
    let Some(served) = plan.serve(&plan.process("tapdisk", 0)).await else { return };
    let host = plan.process("client", 0);
    let (w, h) = (world.clone(), host.clone());
    within(&host, async move {
        let mut speakers = Vec::new();
        for number in 1..=3 {
            speakers.extend(speaker(&w, &h, (number, &address()), DISK, number < 3).await);
        }
        if speakers.len() == 3 {
            lanes(&w, &h, &speakers).await;
            speakers.iter().for_each(Speaker::leave);
        }
    })
    .await;
    served.stop(&world, &setup).await;
}

/// A writer and its lane.
struct Lane {
    world: World,
    host: SimHost,
    /// Its connection, and one for what it does at the same time.
    speakers: [Speaker<ProcessStream>; 2],
    number: usize,
    entity: Entity,
    /// Its first byte on the disk.
    at: usize,
    /// The first sector of the pairs.
    pairs_at: usize,
    /// What it must hold.
    known: Vec<u8>,
    /// What else it may hold, where changes have failed since: the values by place.
    doubt: BTreeMap<usize, Vec<u8>>,
}

async fn lanes(world: &World, host: &SimHost, speakers: &[Speaker<ProcessStream>]) {
    let lane_bytes = world.setting("lane-bytes", &LANE_BYTES);
    let end = (BEGIN + LANES * lane_bytes).next_multiple_of(SECTOR);
    if call(world, &speakers[0], CMD_WRITE_ZEROES, 0, 0, end, &[]).await.is_none() {
        return;
    }
    world.storage.set_calm(false);
    let mut ends = Vec::new();
    for number in 0..LANES {
        let entity = Entity::WORLD.child("lane", number as u64);
        world.sim.name_entity(entity, || format!("the writer of lane {number}"));
        let own = |n: usize| speakers[(number + n) % speakers.len()].clone();
        let lane = Lane {
            world: world.clone(),
            host: host.clone(),
            speakers: [own(0), own(1)],
            number,
            entity,
            at: BEGIN + number * lane_bytes,
            pairs_at: PAIRS_AT.max(end / SECTOR) + number * PAIR_SECTORS,
            known: vec![0; lane_bytes],
            doubt: BTreeMap::new(),
        };
        let (task, finished) = joined(lane.run());
        host.process.node().spawn("lane", number as u64, task);
        ends.push(finished);
    }
    let mut all = Vec::new();
    for finished in ends {
        let Some(lane) = finished.await else { return };
        all.push(lane);
    }
    let Some(Ok(read)) = call(world, &speakers[0], CMD_READ, 0, 0, end, &[]).await else { return };
    let right = |at: usize| match at.checked_sub(BEGIN).and_then(|at| all.get(at / lane_bytes)) {
        Some(lane) => lane.may_hold(at - lane.at, read.data[at]),
        None => read.data[at] == 0,
    };
    if let Some(at) = (0..end).find(|at| !right(*at)) {
        world.fail(Invariant::G1, format!("at the end byte {at} is not what its writer knows"));
    }
}

/// What a request that failed was answered with.
struct Failed;

/// A request that must succeed, unless operations of the host fail in this world, and return as many bytes as a read
/// asks for; `None` ends the run.
async fn call(
    world: &World,
    speaker: &Speaker<ProcessStream>,
    command: u16,
    flags: u16,
    at: usize,
    len: usize,
    data: &[u8],
) -> Option<Result<Answer, Failed>> {
    let answer = speaker.call(command, flags, at as u64, len as u32, data).await;
    let read = if command == CMD_READ { len } else { 0 };
    match answer {
        Some(answer) if answer.error == 0 && answer.data.len() == read => Some(Ok(answer)),
        Some(answer) if world.errors_allowed() && matches!(answer.error, error::EIO | error::ENOSPC) => {
            Some(Err(Failed))
        }
        answer => {
            let answer = answer.map(|answer| (answer.error, answer.data.len()));
            let text = format!("command {command} of {len} bytes at {at}: {answer:?} (error, bytes)");
            world.fail(Invariant::N2, text);
            None
        }
    }
}

impl Lane {
    /// Does all its steps; returns itself, with what it knows.
    async fn run(mut self) -> Self {
        let is_long = self.known.len() == LONG_BYTES;
        let (times, whats) = if is_long {
            // Zeros go to the node in pieces.
            (LONG_TIMES, [1, 2, 2, 2, 2, 3, 4, 4, 5, 6])
        } else {
            (1, [1, 1, 1, 2, 3, 4, 4, 5, 6, 6])
        };
        for n in 0..STEPS {
            let value = self.world.sim.decide(self.entity, &BYTES_STEP, n, |d| {
                let what = whats[d.below(10) as usize];
                let len = if d.below(2) == 0 { d.below(16) } else { d.below(2048) };
                what | d.below(2048) << 3 | len << 14 | d.below(2) << 25
            });
            let from = (value >> 3 & 0x7ff) as usize * times % self.known.len();
            let len = ((value >> 14 & 0x7ff) as usize * times + 1).min(self.known.len() - from);
            let flag = value >> 25 & 1 == 1;
            let done = match value & 7 {
                1 => self.write(n, from, len, flag).await,
                2 => self.zero(from, len, flag).await,
                3 => self.trim(from, len).await,
                4 => self.read(from, len).await,
                5 => self.status(from, len).await,
                6 => self.pair(n, from % LANE_BYTES[2], len, flag).await,
                _ => Some(()),
            };
            if done.is_none() || self.world.verdict.is_broken() {
                break;
            }
        }
        self
    }

    fn may_hold(&self, at: usize, byte: u8) -> bool {
        self.known[at] == byte || self.doubt.get(&at).is_some_and(|others| others.contains(&byte))
    }

    /// Byte `at` was changed to `byte`, or may have been if that failed.
    fn changed(&mut self, at: usize, byte: u8, result: &Result<Answer, Failed>) {
        if result.is_ok() {
            self.known[at] = byte;
            self.doubt.remove(&at);
        } else if !self.may_hold(at, byte) {
            self.doubt.entry(at).or_default().push(byte);
        }
    }

    async fn ask(
        &self,
        command: u16,
        flags: u16,
        from: usize,
        len: usize,
        data: &[u8],
    ) -> Option<Result<Answer, Failed>> {
        self.world.count(|s| s.requests += 1);
        call(&self.world, &self.speakers[0], command, flags, self.at + from, len, data).await
    }

    fn lost(&self, text: String) -> Option<()> {
        self.world.fail(Invariant::G1, format!("lane {}: {text}", self.number));
        None
    }

    async fn write(&mut self, n: u32, from: usize, len: usize, durable: bool) -> Option<()> {
        let bytes: Vec<u8> =
            (0..len).map(|i| (n as usize * 37 + self.number * 11 + i * 7) as u8 | 1).collect();
        let result = self.ask(CMD_WRITE, if durable { command::FUA } else { 0 }, from, len, &bytes).await?;
        bytes.into_iter().enumerate().for_each(|(i, byte)| self.changed(from + i, byte, &result));
        self.read(from, len).await
    }

    async fn zero(&mut self, from: usize, len: usize, keep: bool) -> Option<()> {
        let flags = if keep { command::NO_HOLE } else { 0 };
        let result = self.ask(CMD_WRITE_ZEROES, flags, from, len, &[]).await?;
        (from..from + len).for_each(|at| self.changed(at, 0, &result));
        self.read(from, len).await
    }

    /// Whole sectors may hold anything that they held, or zeros; parts of sectors must be left alone.
    async fn trim(&mut self, from: usize, len: usize) -> Option<()> {
        let trimmed = self.ask(CMD_TRIM, 0, from, len, &[]).await?;
        let (start, end) = (self.at + from, self.at + from + len);
        let whole = start.next_multiple_of(SECTOR)..end / SECTOR * SECTOR;
        let read = self.ask(CMD_READ, 0, 0, self.known.len(), &[]).await?;
        let (Ok(_), Ok(read)) = (&trimmed, &read) else {
            whole.for_each(|at| self.changed(at - self.at, 0, &Err(Failed)));
            return Some(());
        };
        for (i, byte) in read.data.iter().copied().enumerate() {
            if byte == 0 && whole.contains(&(self.at + i)) {
                self.changed(i, 0, &trimmed);
            } else if !self.may_hold(i, byte) {
                return self.lost(format!("byte {i} changed by a trim of {len} bytes from {from}"));
            }
        }
        Some(())
    }

    async fn read(&self, from: usize, len: usize) -> Option<()> {
        let Ok(Answer { data: read, .. }) = self.ask(CMD_READ, 0, from, len, &[]).await? else {
            return Some(());
        };
        match (0..len).find(|i| !self.may_hold(from + i, read[*i])) {
            Some(i) => self.lost(format!("byte {} is {}, not {}", from + i, read[i], self.known[from + i])),
            None => Some(()),
        }
    }

    /// What is reported as zeros is zeros, and nothing is reported about other bytes.
    async fn status(&self, from: usize, len: usize) -> Option<()> {
        if !self.speakers[0].has_contexts() {
            return Some(());
        }
        let Ok(Answer { extents, .. }) = self.ask(CMD_BLOCK_STATUS, 0, from, len, &[]).await? else {
            return Some(());
        };
        let mut at = from;
        for (bytes, state) in extents {
            let end = at + bytes as usize;
            if bytes == 0 || end > from + len {
                self.world.fail(Invariant::N2, format!("a status of {len} bytes has one of {bytes}"));
                return None;
            }
            if state & STATE_ZERO != 0 && (at..end).any(|at| !self.may_hold(at, 0)) {
                return self.lost(format!("bytes {at}..{end} are reported as zeros"));
            }
            at = end;
        }
        Some(())
    }

    /// Whole sectors and a part of them are written at once. If one fails, nothing is known about them.
    async fn pair(&self, n: u32, from: usize, len: usize, first: bool) -> Option<()> {
        let at = self.pairs_at * SECTOR;
        let whole = PAIR_SECTORS * SECTOR;
        let (from, len) = (from + 1, len.min(whole - from - 2));
        let (below, above) = ((n * 2) as u8 | 0x80, (n * 2 + 1) as u8);
        let part = (at + from, vec![above; len]);
        let both = [(at, vec![below; whole]), part];
        let both = if first {
            both
        } else {
            let [a, b] = both;
            [b, a]
        };
        let mut ends = Vec::new();
        for ((at, bytes), speaker) in both.into_iter().zip(self.speakers.clone()) {
            let world = self.world.clone();
            let write = async move { call(&world, &speaker, CMD_WRITE, 0, at, bytes.len(), &bytes).await };
            let (task, finished) = joined(write);
            self.host.process.node().spawn("pair", at as u64, task);
            ends.push(finished);
        }
        let mut has_failed = false;
        for finished in ends {
            has_failed |= finished.await??.is_err();
        }
        let read = call(&self.world, &self.speakers[0], CMD_READ, 0, at, whole, &[]).await?;
        let (false, Ok(Answer { data: read, .. })) = (has_failed, read) else { return Some(()) };
        let wrong = (0..whole).find(|i| {
            let inside = (from..from + len).contains(i);
            read[*i] != below && !(inside && read[*i] == above)
        });
        match wrong {
            Some(i) => self.lost(format!("byte {i} of a pair is {}, not {below} or {above}", read[i])),
            None => Some(()),
        }
    }
}
