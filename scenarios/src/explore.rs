//! Exploring crash states: at every operation on the host's files, what a power cut could leave just then.
//!
//! ```text
//!   one run ──operation──operation──operation──►            the history goes on
//!                 │          │
//!                 │          └─ base + any part of what is pending = states
//!                 │                └─ new? ─ walker ─ the driver's real open ─ read what differs from the base ─ allowed?
//!                 └─ ...
//! ```
//!
//! States are told apart by content and by what has been flushed. A state is compared with its base (nothing of what is
//! pending): sectors whose bytes or mapping are those of the base inherit its verdict, all others are read through the
//! driver. One state in 256 is read whole and must agree, and is then written to.
//!
//! A state that breaks something becomes an ordinary run: the decisions of the run so far, the operation at which the
//! power is cut, and what it takes.

use crate::catalog::crash::{CRASH_AT, power};
use crate::check::{BlockHistory, Invariant, Wrong, walker};
use crate::run::{Outcome, RunSpec, run};
use kernel_model::faults::FaultPlan;
use kernel_model::{Content, Inode, Kernel, Pending, Process, Storage, StorageConfig};
use sim::{Config, Decision, Draw, Entity, FixedMap, Key, Label, Sim, Source, mix2};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_core::{Node, Request};
use tap_host::{Bug, IoBuf, IoVec, SECTOR_BYTES, SectorRange};
use tap_images::{BackingPolicy, ImageFormat, ImageSpec, OpenOptions, open_image};
use walker::QcowMap;

/// What exploring came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Explored {
    /// Operations after which states were made.
    pub points: u64,
    /// States that were opened and read.
    pub states: u64,
    /// States that had been seen before.
    pub duplicates: u64,
    /// Sectors read through the driver.
    pub sectors: u64,
    /// States that were read whole.
    pub whole: u64,
}

/// A state that breaks an invariant.
#[derive(Clone, Debug)]
pub struct BadState {
    /// Which.
    pub invariant: Invariant,
    /// What was seen.
    pub detail: String,
    /// The operation after which the power is cut.
    pub after_op: u64,
    /// What the power cut takes.
    pub cut: Vec<(Entity, &'static Label, u64)>,
}

/// Runs `spec` with every crash state explored. A bad state comes back as a run of its own that ends in it.
pub fn explore_run(spec: &RunSpec) -> (Outcome, Option<RunSpec>) {
    let mut options = spec.options.clone();
    options.explore = true;
    let outcome = run(&RunSpec { options, record: true, ..spec.clone() });
    let replay = outcome.bad_state.as_ref().map(|bad| {
        let mut decisions = outcome.decisions.clone();
        let at_ns = outcome.virtual_ns;
        let mut add = |entity, label, value| {
            let decision = Decision { value, at_ns, entity_name: String::new() };
            decisions.insert(Key { entity, label, attempt: 0 }, decision);
        };
        add(power(0), &CRASH_AT, bad.after_op);
        bad.cut.iter().for_each(|(entity, label, value)| add(*entity, label, *value));
        RunSpec { source: Source::Replay(decisions), record: true, ..spec.clone() }
    });
    (outcome, replay)
}

/// All subsets of so many pending pages; above, a bounded choice.
const ALL_SUBSETS_OF: usize = 5;
/// Random subsets where there are too many.
const RANDOM_SUBSETS: usize = 8;
/// One state in so many is read whole and written to.
const WHOLE_EVERY: u64 = 256;

/// An explorer of one image in one run.
pub struct Explorer {
    storage: Storage,
    spec: ImageSpec,
    history: Rc<RefCell<BlockHistory>>,
    /// Files below the image.
    below: Vec<(String, Content)>,
    bug: Option<Bug>,
    draw: RefCell<Draw>,
    seen: RefCell<FixedMap<u64, ()>>,
    /// What is in the base, as a hash per page, and their sum.
    base: RefCell<BaseHash>,
    explored: Cell<Explored>,
    bad: RefCell<Option<BadState>>,
    flushes: Cell<u64>,
}

#[derive(Default)]
struct BaseHash {
    sectors: FixedMap<u64, u64>,
    sum: u64,
    /// The pending writes at the last operation: those that are gone are in the base now.
    pending: Vec<Pending>,
}

/// One choice of what survives.
struct Choice {
    keep: Vec<u8>,
    sizes: usize,
}

impl Explorer {
    /// An explorer of `spec`, whose guest keeps `history`. `below` are the files that it is based on.
    pub fn new(
        storage: &Storage,
        spec: &ImageSpec,
        history: Rc<RefCell<BlockHistory>>,
        below: Vec<(String, Content)>,
        bug: Option<Bug>,
        seed: u64,
    ) -> Rc<Self> {
        Rc::new(Self {
            storage: storage.clone(),
            spec: spec.clone(),
            history,
            below,
            bug,
            draw: RefCell::new(Draw::new(seed)),
            seen: RefCell::default(),
            base: RefCell::default(),
            explored: Cell::default(),
            bad: RefCell::default(),
            flushes: Cell::new(0),
        })
    }

    /// What it came to so far.
    pub fn explored(&self) -> Explored {
        self.explored.get()
    }

    /// The first bad state.
    pub fn bad(&self) -> Option<BadState> {
        self.bad.borrow().clone()
    }

    /// Looks at the states after operation `op`.
    pub fn point(&self, op: u64) {
        if self.bad.borrow().is_some() {
            return;
        }
        self.count(|e| e.points += 1);
        let inode = self.storage.with_inode(&self.spec.path, Inode::clone);
        let Some(inode) = inode else { return };
        let flushed = self.follow_base(&inode);
        let history = self.history.borrow();
        let base_map = match walker::walk(&inode.base) {
            Ok(map) => map,
            Err((invariant, text)) => return self.report(op, &inode, &nothing(&inode), invariant, text),
        };
        if flushed {
            // What may be there has become less: the base itself is looked at again.
            let cells: Vec<SectorRange> = history.recently_settled().to_vec();
            let choice = nothing(&inode);
            self.check(op, &inode, &choice, &base_map, &history, Some(cells));
        }
        for choice in self.choices(&inode) {
            let hash = self.hash(&inode, &choice);
            if self.seen.borrow_mut().insert(hash, ()).is_some() {
                self.count(|e| e.duplicates += 1);
                continue;
            }
            self.check(op, &inode, &choice, &base_map, &history, None);
            if self.bad.borrow().is_some() {
                return;
            }
        }
    }

    fn count(&self, change: impl FnOnce(&mut Explored)) {
        let mut explored = self.explored.get();
        change(&mut explored);
        self.explored.set(explored);
    }

    /// Brings the hash of the base up to date; tells whether a flush has made something durable for the guest.
    fn follow_base(&self, inode: &Inode) -> bool {
        let mut base = self.base.borrow_mut();
        let first = inode.pending.first().map_or(u64::MAX, |p| p.seq);
        let gone: Vec<Pending> = base.pending.iter().filter(|p| p.seq < first).cloned().collect();
        for p in &gone {
            for (sector, hash) in sector_hashes(p, p.sectors) {
                let old = base.sectors.insert(sector, hash).unwrap_or(0);
                base.sum ^= old ^ hash;
            }
        }
        base.pending.clone_from(&inode.pending);
        drop(base);
        let flushes = self.history.borrow().flushes();
        self.flushes.replace(flushes) != flushes
    }

    /// Subsets of what is pending: all of few, a bounded choice of many; torn pages; the size early or late.
    fn choices(&self, inode: &Inode) -> Vec<Choice> {
        let n = inode.pending.len();
        let full = |i: usize| inode.pending[i].sectors;
        let mut keeps: Vec<Vec<u8>> = Vec::new();
        let subset =
            |pick: &dyn Fn(usize) -> bool| (0..n).map(|i| if pick(i) { full(i) } else { 0 }).collect();
        if n <= ALL_SUBSETS_OF {
            keeps.extend((0..1_u32 << n).map(|mask| subset(&|i| mask >> i & 1 == 1)));
        } else {
            keeps.push(subset(&|_| true));
            // Only the newest can make states that earlier operations did not make.
            let recent = n.saturating_sub(12)..n;
            keeps.extend(recent.clone().map(|out| subset(&|i| i != out)));
            keeps.extend(recent.map(|only| subset(&|i| i == only)));
            let mut draw = self.draw.borrow_mut();
            for _ in 0..RANDOM_SUBSETS {
                let bits: Vec<bool> = (0..n).map(|_| draw.below(2) == 0).collect();
                keeps.push(subset(&|i| bits[i]));
            }
        }
        let mut draw = self.draw.borrow_mut();
        if n > 0 {
            // The newest page torn, with everything else and without.
            for others in [true, false] {
                let mut keep: Vec<u8> = subset(&|_| others);
                keep[n - 1] = full(n - 1) & draw.bits() as u8;
                keeps.push(keep);
            }
        }
        let m = inode.pending_sizes.len();
        let mut out = Vec::with_capacity(keeps.len() * 2);
        for keep in keeps {
            if m > 0 {
                out.push(Choice { keep: keep.clone(), sizes: draw.below(m as u64) as usize });
            }
            out.push(Choice { keep, sizes: m });
        }
        out
    }

    /// Of the bytes that a state holds, its size, and what was flushed by then.
    fn hash(&self, inode: &Inode, choice: &Choice) -> u64 {
        let base = self.base.borrow();
        let mut sum = base.sum;
        let mut touched: FixedMap<u64, u64> = FixedMap::default();
        for (p, keep) in inode.pending.iter().zip(&choice.keep) {
            for (sector, hash) in sector_hashes(p, *keep) {
                let old = touched.insert(sector, hash);
                sum ^= hash ^ old.unwrap_or_else(|| base.sectors.get(&sector).copied().unwrap_or(0));
            }
        }
        let size = size_of(inode, choice.sizes);
        mix2(sum ^ size, self.flushes.get())
    }

    fn check(
        &self,
        op: u64,
        inode: &Inode,
        choice: &Choice,
        base_map: &QcowMap,
        history: &BlockHistory,
        cells: Option<Vec<SectorRange>>,
    ) {
        self.count(|e| e.states += 1);
        let content = inode.after_power_cut(choice.sizes, |i, _| choice.keep[i]);
        let map = match walker::walk(&content) {
            Ok(map) => map,
            Err((invariant, text)) => return self.report(op, inode, choice, invariant, text),
        };
        let whole = self.explored.get().states.is_multiple_of(WHOLE_EVERY);
        let size = history.size_sectors();
        let ranges = match cells {
            Some(cells) => cells,
            None if whole => (0..size.div_ceil(128))
                .map(|i| SectorRange::new(i * 128, (size - i * 128).min(128) as u32))
                .collect(),
            None => affected(inode, choice, base_map, &map, size),
        };
        self.count(|e| {
            e.sectors += ranges.iter().map(|r| u64::from(r.count)).sum::<u64>();
            e.whole += u64::from(whole);
        });
        if let Err((invariant, text)) = self.recover(&content, &ranges, history, whole) {
            self.report(op, inode, choice, invariant, text);
        }
    }

    /// Opens the state with the driver, reads `ranges`, and writes to it if `probe`.
    fn recover(
        &self,
        content: &Content,
        ranges: &[SectorRange],
        history: &BlockHistory,
        probe: bool,
    ) -> Result<(), (Invariant, String)> {
        let sim = Sim::new(&Config { faults: false, ..Config::new(0) });
        let quiet = StorageConfig { faults: FaultPlan::default(), ..StorageConfig::default() };
        let storage = Storage::new(&sim, quiet);
        storage.put(&self.spec.path, content.clone());
        for (name, below) in &self.below {
            storage.put(name, below.clone());
        }
        let kernel = Kernel::new(&sim, &storage);
        if let Some(bug) = self.bug {
            kernel.plant(bug);
        }
        let (spec, ranges) = (self.spec.clone(), ranges.to_vec());
        let result: Rc<RefCell<Vec<(SectorRange, IoBuf)>>> = Rc::default();
        let out = Rc::clone(&result);
        let size = history.size_sectors();
        let run = sim.run(async move {
            let process = kernel.process("tapdisk", 0);
            read_all(&process, &spec, &ranges, probe.then_some(size), &out).await
        });
        match run {
            Ok(Ok(())) => {}
            Ok(Err(text)) => return Err((Invariant::G11, text)),
            Err(stall) => return Err((Invariant::L1, stall.report)),
        }
        for (range, bytes) in result.borrow().iter() {
            for (i, sector) in bytes.chunks_exact(SECTOR_BYTES as usize).enumerate() {
                let at = range.start.0 + i as u64;
                history
                    .check_survivor(at, sector)
                    .map_err(|w: Wrong| (w.invariant(Invariant::G7), w.to_string()))?;
            }
        }
        Ok(())
    }

    fn report(&self, op: u64, inode: &Inode, choice: &Choice, invariant: Invariant, detail: String) {
        let keep = |i: usize| choice.keep.get(i).copied().unwrap_or(0);
        let sizes = choice.sizes.min(inode.pending_sizes.len());
        let cut = self.storage.decisions_of_cut(&self.spec.path, sizes, keep);
        self.bad.borrow_mut().get_or_insert(BadState { invariant, detail, after_op: op, cut });
    }
}

async fn read_all(
    process: &Process,
    spec: &ImageSpec,
    ranges: &[SectorRange],
    probe: Option<u64>,
    out: &RefCell<Vec<(SectorRange, IoBuf)>>,
) -> Result<(), String> {
    let backing = BackingPolicy::any(ImageFormat::Probe);
    let options = OpenOptions { write: true, backing, ..OpenOptions::default() };
    let node: Rc<dyn Node> = open_image(process, spec, &options)
        .await
        .map_err(|e| format!("failed to open the image after a crash: {e}"))?;
    for range in ranges {
        let mut bufs = IoVec::new();
        bufs.push(IoBuf::unpooled(range.len_bytes() as usize).map_err(|e| e.to_string())?);
        let response = node.submit(Request::read(*range, bufs)).await;
        response.result.map_err(|e| format!("reading {range} after a crash failed with {e:?}"))?;
        out.borrow_mut().extend(response.bufs.into_iter().map(|buf| (*range, buf)));
    }
    if let Some(size) = probe {
        write_probe(&node, size).await?;
    }
    Ok(())
}

/// Writes here and there, and reads everything else again: a wrong idea of free space shows.
async fn write_probe(node: &Rc<dyn Node>, size: u64) -> Result<(), String> {
    let bytes = async |range: SectorRange| -> Result<IoBuf, String> {
        let mut bufs = IoVec::new();
        bufs.push(IoBuf::unpooled(range.len_bytes() as usize).map_err(|e| e.to_string())?);
        let response = node.submit(Request::read(range, bufs)).await;
        response.result.map_err(|e| format!("reading {range} failed with {e:?}"))?;
        response.bufs.into_iter().next().ok_or_else(|| "a read gave no buffer".to_string())
    };
    let step = (size / 16).max(1);
    let places: Vec<u64> = (0..size).step_by(step as usize).collect();
    let watched: Vec<SectorRange> =
        places.iter().map(|s| SectorRange::new(s + step / 2, 1)).filter(|r| r.fits(size)).collect();
    let mut before = Vec::new();
    for range in &watched {
        before.push(bytes(*range).await?);
    }
    for place in places {
        let range = SectorRange::new(place, 1);
        let mut bufs = IoVec::new();
        bufs.push(IoBuf::copy_of(&[0xa5; SECTOR_BYTES as usize]).map_err(|e| e.to_string())?);
        let response = node.submit(Request::write(range, bufs)).await;
        response.result.map_err(|e| format!("writing {range} after a crash failed with {e:?}"))?;
        if bytes(range).await?.iter().any(|b| *b != 0xa5) {
            return Err(format!("what was written to {range} after a crash is not there"));
        }
    }
    for (range, old) in watched.iter().zip(before) {
        if bytes(*range).await?[..] != old[..] {
            return Err(format!("writing elsewhere after a crash changed {range}"));
        }
    }
    Ok(())
}

/// Nothing of what is pending.
fn nothing(inode: &Inode) -> Choice {
    Choice { keep: vec![0; inode.pending.len()], sizes: 0 }
}

fn size_of(inode: &Inode, sizes: usize) -> u64 {
    inode.pending_sizes[..sizes].last().map_or(inode.base.size, |s| s.size)
}

/// Sector and content hash of each kept sector of a pending page.
fn sector_hashes(p: &Pending, keep: u8) -> impl Iterator<Item = (u64, u64)> + '_ {
    (0..8_u64).filter(move |i| keep & p.sectors & 1 << i != 0).map(|i| {
        let sector = p.page * 8 + i;
        let at = (i * SECTOR_BYTES) as usize;
        let words = p.bytes[at..at + SECTOR_BYTES as usize].chunks_exact(8);
        let sum = words.fold(sector, |h, w| {
            (h ^ u64::from_le_bytes(w.try_into().expect("eight bytes")))
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(29)
        });
        (sector, mix2(sum, sector))
    })
}

/// Guest sectors whose bytes or mapping differ from the base's.
fn affected(inode: &Inode, choice: &Choice, base: &QcowMap, map: &QcowMap, size: u64) -> Vec<SectorRange> {
    let per_cluster = (1_u64 << map.cluster_bits) / SECTOR_BYTES;
    let mut clusters: Vec<u64> = Vec::new();
    // Another mapping.
    let pairs = map.entries.iter().zip(&base.entries).enumerate();
    clusters.extend(pairs.filter(|(_, (a, b))| a != b).map(|(i, _)| i as u64));
    // Other bytes where they are mapped.
    let mut pages: Vec<u64> =
        inode.pending.iter().zip(&choice.keep).filter(|(_, k)| **k != 0).map(|(p, _)| p.page).collect();
    pages.sort_unstable();
    pages.dedup();
    if !pages.is_empty() {
        let cluster_bytes = 1_u64 << map.cluster_bits;
        for (i, entry) in map.entries.iter().enumerate().filter(|(_, e)| **e != 0) {
            let (from, len) = map.compressed(i as u64).unwrap_or((*entry, cluster_bytes));
            let first = pages.partition_point(|p| (p + 1) * 4096 <= from);
            if pages.get(first).is_some_and(|p| p * 4096 < from + len) {
                clusters.push(i as u64);
            }
        }
    }
    clusters.sort_unstable();
    clusters.dedup();
    let mut ranges: Vec<SectorRange> = Vec::new();
    for cluster in clusters {
        let start = cluster * per_cluster;
        let count = per_cluster.min(size.saturating_sub(start)) as u32;
        match ranges.last_mut() {
            Some(last) if last.end() == Some(start) && last.count + count <= 1024 => last.count += count,
            _ if count > 0 => ranges.push(SectorRange::new(start, count)),
            _ => {}
        }
    }
    ranges
}
