//! Exploring crash states: at every operation on the host's files, everything that a power cut could leave.
//!
//! ```text
//!   one run ──operation──operation──operation──►            the history continues
//!                 │          │
//!                 │          └─ base + any subset of the pending writes = states
//!                 │                └─ new? ─ walker ─ the driver's real open ─ read what differs from the base ─ allowed?
//!                 └─ ...
//! ```
//!
//! States are identified by content and by what has been flushed. A state is compared with its base (none of the
//! pending writes): sectors whose bytes or mapping equal those of the base inherit its verdict, all others are read
//! through the driver. One state in 256 is read completely and must agree, and is then written to.
//!
//! A state that breaks an invariant becomes an ordinary run: the decisions of the run so far, the operation at which
//! the power is cut, and what the cut takes.

use crate::check::{BlockHistory, Invariant, Wrong};
use crate::formats::{self, Broken, ImageMap};
use crate::stall;
use kernel_model::faults::FaultPlan;
use kernel_model::{Content, Inode, Kernel, Pending, Process, Storage, StorageConfig};
use sim::{Config, Draw, Entity, FixedMap, Label, Sim, mix2};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use tap_core::{Node, Request};
use tap_host::{Bug, IoBuf, IoVec, SECTOR_BYTES, SectorRange};
use tap_images::{BackingPolicy, ImageFormat, ImageSpec, OpenOptions};

/// Counters of an exploration.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Explored {
    /// Operations after which states were built.
    pub points: u64,
    /// States that were opened and read.
    pub states: u64,
    /// States that had been checked before.
    pub duplicates: u64,
    /// Sectors read through the driver.
    pub sectors: u64,
    /// States that were read completely.
    pub whole: u64,
}

/// A state that breaks an invariant.
#[derive(Clone, Debug)]
pub struct BadState {
    /// Which invariant.
    pub invariant: Invariant,
    /// What was observed.
    pub detail: String,
    /// The operation after which the power is cut.
    pub after_op: u64,
    /// What the power cut takes.
    pub cut: Vec<(Entity, &'static Label, u64)>,
}

/// Up to this many pending pages, all subsets are tried; above, a bounded choice.
const ALL_SUBSETS_OF: usize = 5;
/// Random subsets tried when there are too many.
const RANDOM_SUBSETS: usize = 8;
/// One state in this many is read completely and written to.
const WHOLE_EVERY: u64 = 256;

/// Explores one image in one run.
pub struct Explorer {
    storage: Storage,
    spec: ImageSpec,
    history: Rc<RefCell<BlockHistory>>,
    /// Files below the image.
    below: Vec<(String, Content)>,
    bug: Option<&'static Bug>,
    draw: RefCell<Draw>,
    seen: RefCell<FixedMap<u64, ()>>,
    hashes: RefCell<Hashes>,
    explored: Cell<Explored>,
    bad: RefCell<Option<BadState>>,
    flushes: Cell<u64>,
    /// The number of the next write, as of the last operation.
    newest: Cell<u64>,
    /// The mapping of the live disk at that time.
    live_map: RefCell<Option<Rc<ImageMap>>>,
}

/// Content hashes by page, kept from one operation to the next.
#[derive(Default)]
struct Hashes {
    /// Hashes of the base, sector by sector; absent pages have not been written in this run.
    base: FixedMap<u64, [u64; 8]>,
    /// Their sum.
    sum: u64,
    /// Number, page, sectors and hashes of each pending write.
    pending: VecDeque<(u64, u64, u8, [u64; 8])>,
    /// Scratch space of one state: which sectors of a page later writes have covered.
    covered: FixedMap<u64, u8>,
}

impl Hashes {
    /// Follows the file: pending writes that have completed join the base, new ones are hashed.
    fn follow(&mut self, inode: &Inode) {
        let first = inode.pending.first().map_or(inode.seq(), |p| p.seq);
        while let Some((_, page, sectors, hashes)) = self.pending.pop_front_if(|p| p.0 < first) {
            let base = self.base.entry(page).or_default();
            for i in (0..8).filter(|i| sectors & 1 << i != 0) {
                self.sum ^= base[i] ^ hashes[i];
                base[i] = hashes[i];
            }
        }
        for p in &inode.pending[self.pending.len()..] {
            self.pending.push_back((p.seq, p.page, p.sectors, sector_hashes(p)));
        }
    }

    /// The hash of the base plus the pending writes in `keep`.
    fn of(&mut self, keep: &[u8]) -> u64 {
        self.covered.clear();
        let mut sum = self.sum;
        for ((_, page, sectors, hashes), keep) in self.pending.iter().zip(keep).rev() {
            let covered = self.covered.entry(*page).or_default();
            let fresh = sectors & keep & !*covered;
            if fresh == 0 {
                continue;
            }
            *covered |= fresh;
            let base = self.base.get(page).copied().unwrap_or_default();
            for i in (0..8).filter(|i| fresh & 1 << i != 0) {
                sum ^= hashes[i] ^ base[i];
            }
        }
        sum
    }
}

/// One choice of the writes that survive.
#[derive(Clone)]
struct Choice {
    keep: Vec<u8>,
    sizes: usize,
}

/// A state known to be good, from which others inherit.
#[derive(Clone)]
struct Anchor {
    choice: Choice,
    map: Rc<ImageMap>,
}

impl Anchor {
    fn of(choice: Choice, map: ImageMap) -> Self {
        Self { choice, map: Rc::new(map) }
    }
    fn distance(&self, choice: &Choice) -> usize {
        self.choice.keep.iter().zip(&choice.keep).filter(|(a, b)| a != b).count()
    }
}

impl Explorer {
    /// An explorer of `spec`, whose guest keeps `history`. `below` are the files below the image.
    pub fn new(
        storage: &Storage,
        spec: &ImageSpec,
        history: Rc<RefCell<BlockHistory>>,
        below: Vec<(String, Content)>,
        bug: Option<&'static Bug>,
        seed: u64,
    ) -> Rc<Self> {
        // From now on the history keeps what flushes settle.
        history.borrow_mut().take_settled();
        Rc::new(Self {
            storage: storage.clone(),
            spec: spec.clone(),
            history,
            below,
            bug,
            draw: RefCell::new(Draw::new(seed)),
            seen: RefCell::default(),
            hashes: RefCell::default(),
            explored: Cell::default(),
            bad: RefCell::default(),
            flushes: Cell::new(0),
            newest: Cell::new(0),
            live_map: RefCell::default(),
        })
    }

    /// The counters so far.
    pub fn explored(&self) -> Explored {
        self.explored.get()
    }

    /// The first bad state.
    pub fn bad(&self) -> Option<BadState> {
        self.bad.borrow().clone()
    }

    /// Checks the states after operation `op`; 0 is the state at rest.
    pub fn point(&self, op: u64) {
        if self.bad.borrow().is_some() {
            return;
        }
        self.count(|e| e.points += 1);
        let inode = self.storage.with_inode(&self.spec.path, Inode::clone);
        let Some(inode) = inode else { return };
        let flushed = self.follow_base(&inode);
        let settled = self.history.borrow_mut().take_settled();
        let history = self.history.borrow();
        let anchors = match (self.walk(&inode.base), self.walk(&inode.live)) {
            (Ok(base), Ok(live)) => [Anchor::of(nothing(&inode), base), Anchor::of(everything(&inode), live)],
            (Err((invariant, text)), _) => return self.report(op, &inode, &nothing(&inode), invariant, text),
            (_, Err((invariant, text))) => {
                return self.report(op, &inode, &everything(&inode), invariant, text);
            }
        };
        if flushed {
            // A flush has narrowed what may be there: check both ends again in those places.
            for anchor in &anchors {
                self.check(op, &inode, &anchor.choice, &history, Some(settled.clone()), &anchors);
            }
        }
        // What is there now was there before, except for what the last operation wrote.
        let newest = self.newest.replace(inode.seq());
        let before: Vec<u8> =
            inode.pending.iter().map(|p| if p.seq < newest { p.sectors } else { 0 }).collect();
        let map = self
            .live_map
            .replace(Some(Rc::clone(&anchors[1].map)))
            .unwrap_or_else(|| Rc::clone(&anchors[0].map));
        let before = Anchor { choice: Choice { keep: before, sizes: 0 }, map };
        self.visit(op, &inode, &anchors[1].choice, &history, &[before]);
        for choice in self.choices(&inode) {
            if self.bad.borrow().is_some() {
                return;
            }
            self.visit(op, &inode, &choice, &history, &anchors);
        }
    }

    /// The map of an image; only formats that have metadata are explored.
    fn walk(&self, content: &Content) -> Result<ImageMap, Broken> {
        let nothing = || Err((Invariant::Q2, "images of its format have no metadata to explore".to_owned()));
        formats::of(self.spec.format).walk(content).unwrap_or_else(nothing)
    }

    /// Checks a state unless it was checked before.
    fn visit(&self, op: u64, inode: &Inode, choice: &Choice, history: &BlockHistory, anchors: &[Anchor]) {
        let hash = self.hash(inode, choice);
        if self.seen.borrow_mut().insert(hash, ()).is_some() {
            return self.count(|e| e.duplicates += 1);
        }
        self.check(op, inode, choice, history, None, anchors);
    }

    fn count(&self, change: impl FnOnce(&mut Explored)) {
        let mut explored = self.explored.get();
        change(&mut explored);
        self.explored.set(explored);
    }

    /// Updates the hash of the base. Returns whether a flush has made something durable for the guest.
    fn follow_base(&self, inode: &Inode) -> bool {
        self.hashes.borrow_mut().follow(inode);
        let flushes = self.history.borrow().flushes();
        self.flushes.replace(flushes) != flushes
    }

    /// Subsets of the pending writes: all of few, a bounded choice of many; torn pages; the size early or late.
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
            // Only the newest write makes states that earlier operations did not make.
            let recent = n.saturating_sub(12)..n;
            keeps.extend(recent.clone().map(|out| subset(&|i| i != out)));
            keeps.extend(recent.map(|only| subset(&|i| i == only)));
            let mut draw = self.draw.borrow_mut();
            for round in 0..RANDOM_SUBSETS {
                let pair = [draw.below(n as u64) as usize, draw.below(n as u64) as usize];
                let bits: Vec<bool> = match round % 4 {
                    0 => (0..n).map(|_| draw.below(2) == 0).collect(),
                    1 => (0..n).map(|i| pair.contains(&i)).collect(),
                    _ => (0..n).map(|i| !pair.contains(&i)).collect(),
                };
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

    /// Hash of the bytes of a state, its size, and what was flushed by then.
    fn hash(&self, inode: &Inode, choice: &Choice) -> u64 {
        let sum = self.hashes.borrow_mut().of(&choice.keep);
        mix2(sum ^ size_of(inode, choice.sizes), self.flushes.get())
    }

    fn check(
        &self,
        op: u64,
        inode: &Inode,
        choice: &Choice,
        history: &BlockHistory,
        cells: Option<Vec<SectorRange>>,
        anchors: &[Anchor],
    ) {
        self.count(|e| e.states += 1);
        let content = inode.after_power_cut(choice.sizes, 0, |i, _| choice.keep[i]);
        let map = match self.walk(&content) {
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
            None => {
                let nearest = anchors.iter().min_by_key(|a| a.distance(choice));
                nearest.map_or(Vec::new(), |anchor| affected(inode, choice, anchor, &map, size))
            }
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
            Err(stall) => return Err((Invariant::L1, stall::describe(&stall))),
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
    let node: Rc<dyn Node> = formats::drivers()
        .open(process, spec, &options)
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

/// Writes in several places and reads everything else again, which reveals a wrong idea of free space.
async fn write_probe(node: &Rc<dyn Node>, size: u64) -> Result<(), String> {
    let bytes = async |range: SectorRange| -> Result<IoBuf, String> {
        let mut bufs = IoVec::new();
        bufs.push(IoBuf::unpooled(range.len_bytes() as usize).map_err(|e| e.to_string())?);
        let response = node.submit(Request::read(range, bufs)).await;
        response.result.map_err(|e| format!("reading {range} failed with {e:?}"))?;
        response.bufs.into_iter().next().ok_or_else(|| "a read returned no buffer".to_string())
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

/// None of the pending writes.
fn nothing(inode: &Inode) -> Choice {
    Choice { keep: vec![0; inode.pending.len()], sizes: 0 }
}

/// All pending writes, as the live disk shows them.
fn everything(inode: &Inode) -> Choice {
    Choice { keep: inode.pending.iter().map(|p| p.sectors).collect(), sizes: inode.pending_sizes.len() }
}

fn size_of(inode: &Inode, sizes: usize) -> u64 {
    inode.pending_sizes[..sizes].last().map_or(inode.base.size, |s| s.size)
}

/// The content hash of each sector of a pending page.
fn sector_hashes(p: &Pending) -> [u64; 8] {
    std::array::from_fn(|i| {
        let at = i * SECTOR_BYTES as usize;
        let words = p.bytes[at..at + SECTOR_BYTES as usize].chunks_exact(8);
        let sum = words.fold(0, |h: u64, w| {
            (h ^ u64::from_le_bytes(w.try_into().expect("eight bytes")))
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(29)
        });
        mix2(sum, p.page * 8 + i as u64)
    })
}

/// Guest sectors whose bytes or mapping differ from the anchor's.
fn affected(inode: &Inode, choice: &Choice, anchor: &Anchor, map: &ImageMap, size: u64) -> Vec<SectorRange> {
    let per_cluster = (1_u64 << map.cluster_bits) / SECTOR_BYTES;
    let mut clusters: Vec<u64> = Vec::new();
    // Sectors with another mapping.
    let pairs = map.entries.iter().zip(&anchor.map.entries).enumerate();
    clusters.extend(pairs.filter(|(_, (a, b))| a != b).map(|(i, _)| i as u64));
    // Sectors whose mapped bytes differ: another choice, or past an end of file that was kept earlier.
    let end = size_of(inode, choice.sizes);
    let kept = choice.keep.iter().zip(&anchor.choice.keep);
    let other = inode.pending.iter().zip(kept).filter(|(p, (a, b))| a != b || (p.page + 1) * 4096 > end);
    let mut pages: Vec<u64> = other.map(|(p, _)| p.page).collect();
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
