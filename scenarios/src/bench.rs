//! Measures the testbed: simulated requests per second of CPU, memory, and what merging saves. A fixed loop measures
//! the machine, so that figures of different machines, or of one with busy neighbours, can be compared.
//!
//! The reference world is one guest with 32 requests of 4 KiB in flight at random places of a 4 MiB disk, half of them
//! reads, a flush after every 64, on a blkif ring, through scheduler and image, on the drive model, with all checks on.
//! Time is the CPU time of the thread that runs it.

use crate::catalog::setup::Setup;
use crate::catalog::tap;
use crate::check::Invariant;
use crate::cpu::cpu_ns;
use crate::formats::Kind;
use crate::guest::{ErrorPolicy, Guest, GuestDisk};
use crate::limits::StackLimits;
use crate::machine::Machine;
use crate::stall;
use crate::workload::Op;
use crate::world::{RunOptions, World};
use kernel_model::StorageConfig;
use kernel_model::faults::FaultPlan;
use serde::Serialize;
use sim::{Config, DecisionMap, Draw, Sim, Source};
use std::cell::RefCell;
use std::rc::Rc;
use tap_core::wait::joined;
use tap_host::{IoKind, SectorRange};

const DISK_BYTES: u64 = 4 << 20;
const DEPTH: usize = 32;
/// Sectors of a request.
const SECTORS: u64 = 8;
const FLUSH_EVERY: u64 = 64;
/// Nothing fails.
const NO_ERRORS: ErrorPolicy = ErrorPolicy { retries: 0, errors_allowed: false, reads: Invariant::G1 };
/// Depth below the scheduler when merging is measured.
const SHALLOW: usize = 4;

/// What the requests of a guest go through.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Through {
    /// A blkif ring of its own.
    Blkif,
    /// A block device of dom0 and a blktap2 module.
    Blktap,
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub struct BenchSpec {
    /// What the guest's requests go through.
    pub through: Through,
    /// The image below the ring, initially empty, with clusters of 4 KiB if it has any.
    pub disk: Kind,
    /// Number of requests.
    pub requests: u64,
    /// Sequential instead of random, with a depth of four below the scheduler.
    pub sequential: bool,
    /// Whether contiguous requests are merged.
    pub merging: bool,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct BenchResult {
    /// Requests answered.
    pub requests: u64,
    /// CPU nanoseconds.
    pub cpu_ns: u64,
    /// Operations on the host's files.
    pub host_ios: u64,
    /// Copies of data between tapdisk and the other end of its ring.
    pub copies: u64,
    /// Growth of resident bytes after the first tenth of the run.
    pub memory_growth_bytes: i64,
    /// What broke, if anything.
    pub failure: Option<String>,
}

impl BenchResult {
    /// Requests per second of CPU.
    pub fn rate(&self) -> u64 {
        (u128::from(self.requests) * 1_000_000_000 / u128::from(self.cpu_ns.max(1))) as u64
    }
}

/// Rounds of the fixed loop in one calibration, which take some tens of milliseconds.
const ROUNDS: u64 = 100_000;
/// Hashes per round: the operation that a simulated request performs most.
const HASHES: u64 = 64;
const PAGE: usize = 4096;
const ALLOCATIONS: usize = 4;

/// Speed of the machine: rounds of hashing, copying a page and allocating per second of CPU, the best of three.
pub fn calibrate() -> u64 {
    let best = (0..3).map(|_| fixed_loop()).min().unwrap_or(0);
    (u128::from(ROUNDS) * 1_000_000_000 / u128::from(best.max(1))) as u64
}

/// CPU nanoseconds that the loop takes.
fn fixed_loop() -> u64 {
    let before = cpu_ns();
    let mut pages = [vec![1u8; PAGE], vec![2u8; PAGE]];
    let mut kept: Vec<Vec<u8>> = (0..64).map(|_| Vec::new()).collect();
    let mut hash = 0;
    for round in 0..ROUNDS {
        for i in 0..HASHES {
            hash = sim::mix2(hash, round ^ i);
        }
        let [from, to] = &mut pages;
        to.copy_from_slice(from);
        from[hash as usize % PAGE] ^= hash as u8;
        for i in 0..ALLOCATIONS {
            let slot = (hash as usize >> (i * 8)) % kept.len();
            kept[slot] = vec![hash as u8; 64 + (hash as usize >> (i * 4)) % 512];
        }
    }
    std::hint::black_box((pages, kept, hash));
    cpu_ns().saturating_sub(before)
}

/// Resident bytes of this process; 0 if the kernel does not report them.
fn resident_bytes() -> i64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    text.split_whitespace().nth(1).and_then(|n| n.parse::<i64>().ok()).unwrap_or(0) * 4096
}

/// Runs one measurement on this thread.
pub fn measure(spec: BenchSpec) -> BenchResult {
    crate::run::prepare();
    let limits = sim::Limits { turns: u64::MAX, time_ns: u64::MAX };
    // An empty map: every setting has its usual value.
    let source = Source::Replay(DecisionMap::new());
    let sim = Sim::new(&Config { source, limits, faults: false, ..Config::new(1) });
    let storage = StorageConfig { faults: FaultPlan::default(), ..StorageConfig::default() };
    let world = World::new(&sim, storage, RunOptions::default());
    let (verdict, body) = (world.verdict.clone(), reference(world.clone(), spec));
    let result = Rc::new(RefCell::new(None));
    let out = Rc::clone(&result);
    let stalled = sim.run(async move { verdict.guard(async { *out.borrow_mut() = Some(body.await) }).await });
    let failure = world.verdict.failure().map(|f| format!("{}: {}", f.invariant, f.detail));
    let failure = failure.or(stalled.err().map(|s| stall::describe(&s)));
    let Figures { cpu_ns, host_ios, copies, memory_growth_bytes } =
        result.borrow_mut().take().unwrap_or_default();
    BenchResult { requests: world.stats().requests, cpu_ns, host_ios, copies, memory_growth_bytes, failure }
}

/// What a run has cost.
#[derive(Default)]
struct Figures {
    cpu_ns: u64,
    host_ios: u64,
    copies: u64,
    memory_growth_bytes: i64,
}

async fn reference(world: World, spec: BenchSpec) -> Figures {
    let mut limits = StackLimits::draw(&world);
    limits.guest_depth = DEPTH;
    if spec.sequential {
        // A shallow device: requests queue, where they can be merged.
        limits.scheduler.depth = SHALLOW;
    }
    if !spec.merging {
        limits.scheduler.merge_sectors = 0;
    }
    let setup = Setup::new(&world, spec.disk, 0, DISK_BYTES);
    let size = setup.size_sectors;
    match spec.through {
        Through::Blkif => {
            let machine = Machine::new(&world, limits);
            let attached = machine.attach(setup, 0).await;
            machine.start_tapdisk();
            let Some(guest) = attached.boot(&world, NO_ERRORS).await else { return Figures::default() };
            let (task, finished) = joined(work(world, guest, size, spec));
            attached.node.spawn("main", 0, task);
            finished.await.unwrap_or_default()
        }
        Through::Blktap => {
            let Some((node, guest)) = tap::ready(&world, setup, limits).await else {
                return Figures::default();
            };
            let (task, finished) = joined(work(world, guest, size, spec));
            node.spawn("main", 0, task);
            finished.await.unwrap_or_default()
        }
    }
}

/// Makes the requests, and counts.
async fn work<D: GuestDisk>(world: World, guest: Guest<D>, size: u64, spec: BenchSpec) -> Figures {
    let (cpu, ios, copies) = (cpu_ns(), world.storage.counts(), world.kernel.copies());
    let mut draw = Draw::new(1);
    let (mut made, mut cursor, mut warm) = (0, 0, 0);
    let tenth = (spec.requests / 10).max(1);
    while made < spec.requests {
        let n = tenth.min(spec.requests - made).min(100_000);
        let ops: Vec<Option<Op>> =
            (made..made + n).map(|i| Some(next(i, &mut draw, &mut cursor, size, spec))).collect();
        guest.run(&ops, DEPTH).await;
        made += n;
        if warm == 0 {
            warm = resident_bytes();
        }
    }
    let after = world.storage.counts();
    Figures {
        cpu_ns: cpu_ns().saturating_sub(cpu),
        host_ios: after.reads + after.writes + after.syncs - ios.reads - ios.writes - ios.syncs,
        copies: world.kernel.copies() - copies,
        memory_growth_bytes: resident_bytes() - warm,
    }
}

fn next(i: u64, draw: &mut Draw, cursor: &mut u64, size: u64, spec: BenchSpec) -> Op {
    if i % FLUSH_EVERY == FLUSH_EVERY - 1 {
        return Op::flush();
    }
    let at = if spec.sequential {
        *cursor = (*cursor + SECTORS) % size;
        *cursor
    } else {
        draw.below(size / SECTORS) * SECTORS
    };
    let kind = if draw.below(2) == 0 { IoKind::Read } else { IoKind::Write };
    // Runs of one kind, or nothing could be merged.
    let kind = if spec.sequential {
        if (i / 16).is_multiple_of(2) { IoKind::Write } else { IoKind::Read }
    } else {
        kind
    };
    Op::new(kind, SectorRange::new(at, SECTORS as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calibration_measures_the_machine() {
        // Only if the kernel counts CPU time.
        assert!(cpu_ns() == 0 || (1_000..1_000_000_000).contains(&calibrate()), "{}", calibrate());
    }
}
