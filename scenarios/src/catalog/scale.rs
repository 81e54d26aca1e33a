//! Size: large requests, images whose clusters are scattered, odd sizes, many requests for one block. Their cost is an
//! invariant like any other.
//!
//! ```text
//!   write clusters backwards ─► large reads, writes, zeros,  ┐
//!   or alternating              discards                     │
//!                               writes of one block          ├─ at once ─► read all, close, count
//!                               small reads at the end       ┘
//! ```

use super::crash::{arm_power_cut, may_overlay};
use super::setup::{Setup, cut_after_close, cut_after_drop, workload};
use crate::check::Invariant;
use crate::formats::{FormatModel, Kind, fitting};
use crate::guest::{DirectDisk, ErrorPolicy, Guest};
use crate::limits::StackLimits;
use crate::scenario::OfFormat;
use crate::stack::Stack;
use crate::workload::{Op, Shape, Workload, operations};
use crate::world::{World, setting};
use kernel_model::faults::FaultPlan;
use kernel_model::{Inode, PAGE, SimHost, StorageConfig};
use sim::{Entity, Label};
use std::rc::Rc;
use tap_core::wait::joined;
use tap_core::{Node, Request, ZeroFlags};
use tap_host::{IoBuf, IoKind, IoVec, SECTOR_BYTES, SectorRange};

/// What a large request does; 0 for none.
pub static LARGE: Label = Label::new(
    "large",
    "large request {n} has form {}: 1 a read, 2 zeros, 3 zeros whose space may be released, 4 a discard, 5 zeros if fast, 6 a write",
);

/// Maximum number of large requests.
const LARGE_REQUESTS: u32 = 4;
/// Size of the largest read or write, in sectors.
const DATA_SECTORS: u64 = 1024;
/// The last sectors, which no large request touches.
const TAIL_SECTORS: u64 = 16;
/// Maximum work per turn: one table of the largest size used here, twice.
const WORK_PER_TURN: u64 = 2 * 4096;
/// Maximum number of concurrent file operations of a large request: its pieces, and a few more.
const OPERATIONS_PER_REQUEST: u64 = 70;

/// Small reads during the large requests, and the time between them in nanoseconds.
const SMALL_READS: u32 = 16;
const SMALL_READ_EVERY_NS: u64 = 5_000;
/// Maximum time of a small read if no file operation takes longer than 12,000 ns: a table, the data, and the same for
/// the requests that hold the memory for it. A large request takes a hundred times as long.
const SMALL_READ_NS: u64 = 200_000;

/// An image with clusters as small as possible, and large requests.
pub static SCALE: OfFormat = OfFormat {
    name: "FORMAT-scale",
    about: "large requests on FORMAT that is scattered over its file, with many for one block; costs are bounded",
    fits: |model| model.has_metadata(),
    storage: |_, _| StorageConfig {
        faults: FaultPlan { short: true, ..FaultPlan::LATENCY },
        ..StorageConfig::default()
    },
    body: |world, model| Box::pin(scale(world, model)),
    settled: false,
};

/// A file system that is full for a while. A file that is the disk is sparse, or in use.
pub static FULL: OfFormat = OfFormat {
    name: "FORMAT-full",
    about: "FORMAT on a file system that is full for a long time, then has space again: nothing is lost, what is answered stays, and hardly anything leaks",
    fits: |_| true,
    storage: |sim, model| match model.has_metadata() {
        true => StorageConfig { faults: FaultPlan::LATENCY, ..StorageConfig::default() },
        false => StorageConfig {
            faults: FaultPlan { short: true, transient: true, ..FaultPlan::LATENCY },
            zeroing: setting(sim, "host-zeroes", &[true, true, false]),
            holes_want_space: setting(sim, "holes-want-space", &[false, true]),
            holes_write_back: setting(sim, "holes-write-back", &[true, false]),
            ..StorageConfig::default()
        },
    },
    body: |world, model| Box::pin(full(world, model)),
    settled: false,
};

/// Maximum number of clusters that may be lost while there is no space.
const MAX_LEAKED: u64 = 64;
/// Number of requests while there is no space.
const FULL_REQUESTS: u32 = 40;
/// Number of power cuts while there is no space.
const FULL_CUTS: u32 = 6;

async fn full(world: World, model: &'static dyn FormatModel) {
    const DISK_BYTES: u64 = (1 << 20) + 1536;
    let overlay = may_overlay(&world, model);
    let setup = Setup::new(&world, Kind { model, overlay }, 0, DISK_BYTES);
    let limits = StackLimits::draw(&world);
    let depth = world.setting("full-depth", &[1, 8]);
    // Number of power cuts while there is no space.
    let cuts = world.setting("cut-while-full", &[0, FULL_CUTS]);
    let mut left = None;
    for epoch in 0..cuts.max(1) {
        left = without_space(&world, &setup, &limits, (epoch, cuts > 0), depth).await;
        world.storage.set_full(false);
        if world.verdict.is_broken() {
            return;
        }
    }
    world.sim.stop_faults();
    let (served, leaked) = match left {
        Some((served, leaked)) => (served, Some(leaked)),
        None => {
            let host = SimHost::start(&world.kernel, &world.xen, "tapdisk", u64::from(cuts));
            let Some(served) = serve(&world, &setup, &host, &limits, Invariant::G7).await else { return };
            (served, None)
        }
    };
    with_space_again(&world, &setup, &limits, served).await;
    let Some(leaked) = leaked else { return };
    let more = setup.leaked(&world).saturating_sub(leaked);
    // With one request at a time, only the edges of its ranges in several groups may be left.
    if depth == 1 && more > MAX_LEAKED {
        world.fail(Invariant::G13, format!("{more} clusters were lost while there was no space"));
    }
}

/// Requests with space, then without. Returns the disk, and the number of unreferenced clusters before; `None` if the
/// power was cut or an invariant is broken.
async fn without_space(
    world: &World,
    setup: &Setup,
    limits: &StackLimits,
    (epoch, cut): (u32, bool),
    depth: usize,
) -> Option<(Served, u64)> {
    let host = SimHost::start(&world.kernel, &world.xen, "tapdisk", u64::from(epoch));
    let node = host.process.node().clone();
    let (w, setup_of, own, limits) = (world.clone(), setup.clone(), node.clone(), *limits);
    let (task, handed_over) = joined(async move {
        let (world, setup) = (w, setup_of);
        let reads = if epoch == 0 { Invariant::G1 } else { Invariant::G7 };
        let served = serve(&world, &setup, &host, &limits, reads).await?;
        served.guest.watch_space();
        let first = full_operations(&world, &setup, 2 * epoch, 10);
        served.guest.run(&first, depth).await;
        if epoch == 0 {
            check_given_back(&world, &setup, &served.guest);
        }
        let leaked = setup.leaked(&world);
        world.storage.set_full(true);
        // Zeroed sectors that kept their space have room for this.
        let kept = first.iter().flatten().filter(|op| op.kind == IoKind::WriteZeroes && !op.zeroes.unmap);
        let again: Vec<Option<Op>> = kept.map(|op| Some(Op::new(IoKind::Write, op.range))).collect();
        served.guest.run(&again, depth).await;
        if cut {
            match epoch % 2 {
                0 => arm_power_cut(&world, &setup, epoch, u64::from(FULL_REQUESTS) * 3, move || own.kill()),
                _ => cut_after_drop(&world, epoch, move || own.kill()),
            }
        }
        served.guest.run(&full_operations(&world, &setup, 2 * epoch + 1, FULL_REQUESTS), depth).await;
        Some((served, leaked))
    });
    node.spawn("main", 0, task);
    let left = handed_over.await.flatten();
    if !cut || world.verdict.is_broken() {
        return left;
    }
    drop(left);
    setup.cut_power(world, &[&node]).await;
    setup.check(world, "after a power cut while there was no space").await;
    None
}

/// A disk in use, and its guest.
struct Served {
    stack: Stack,
    guest: Guest<DirectDisk>,
    /// The invariant that a wrong read breaks.
    reads: Invariant,
}

fn error_policy(errors_allowed: bool, reads: Invariant) -> ErrorPolicy {
    ErrorPolicy { retries: 0, errors_allowed, reads }
}

/// Opens the image for a guest whose requests may fail.
async fn serve(
    world: &World,
    setup: &Setup,
    host: &SimHost,
    limits: &StackLimits,
    reads: Invariant,
) -> Option<Served> {
    let stack = match Stack::open(host, world, &setup.spec, limits).await {
        Ok(stack) => stack,
        Err(error) => {
            world.fail(Invariant::G11, format!("failed to open the image: {error}"));
            return None;
        }
    };
    let disk =
        DirectDisk::new(stack.node(), limits.pool_bytes.max(256 << 10)).in_pieces(limits.piece_sectors);
    let policy = error_policy(true, reads);
    let guest = Guest::new(world, disk, Rc::clone(&setup.history), policy);
    Some(Served { stack, guest, reads })
}

fn full_operations(world: &World, setup: &Setup, stream: u32, count: u32) -> Vec<Option<Op>> {
    let mut load = Workload { zeroes: true, ..workload(world, setup.size_sectors, count, 64) };
    // Concurrent flushes with requests that fail for lack of space.
    if stream % 4 == 3 {
        load.shape = Shape::FlushHeavy;
    }
    let guest = Entity::WORLD.child("guest", 0).child("epoch", u64::from(stream));
    operations(&world.sim, guest, u64::from(stream), &load)
}

/// With space again, everything works as before.
async fn with_space_again(world: &World, setup: &Setup, limits: &StackLimits, served: Served) {
    let Served { stack, guest, reads } = served;
    guest.set_error_policy(error_policy(false, reads));
    guest.run(&full_operations(world, setup, 2 * FULL_CUTS, 10), limits.guest_depth).await;
    if guest.read_all().await.is_err() || stack.disk.close().await.is_err() {
        return world.fail(Invariant::L1, "with space again, the disk could not be read and closed");
    }
    cut_after_close(world, [setup.spec.path.as_str()]);
    setup.check(world, "at the end").await;
}

/// Whole pages that the guest released are holes of the file. (Zeros over a backing file have to be written; after a
/// failed request, so have those over what it may have left.)
fn check_given_back(world: &World, setup: &Setup, guest: &Guest<DirectDisk>) {
    const PAGE_SECTORS: u64 = 8;
    let clusters = setup.has_metadata();
    if !world.storage.makes_holes() || clusters && (setup.is_overlay() || setup.cluster_bits < 12) {
        return;
    }
    let content = world.storage.content(&setup.spec.path).unwrap_or_default();
    let map = setup.model().walk(&content).and_then(Result::ok);
    for page in 0..setup.size_sectors / PAGE_SECTORS {
        if !guest.gave_back(SectorRange::new(page * PAGE_SECTORS, PAGE_SECTORS as u32)) {
            continue;
        }
        let at = page * PAGE as u64;
        let place = match &map {
            Some(map) => {
                map.host_offset(at >> map.cluster_bits).map(|host| host + at % (1 << map.cluster_bits))
            }
            None => Some(at),
        };
        let takes_space = |inode: &Inode| place.is_some_and(|at| inode.has_space(at, PAGE as u64));
        if world.storage.with_inode(&setup.spec.path, takes_space) == Some(true) {
            let text =
                format!("bytes {at}+{PAGE} of the disk were released, but still take space in the file");
            return world.fail(Invariant::S2, text);
        }
    }
}

async fn scale(world: World, model: &'static dyn FormatModel) {
    let size_bytes = world.setting("scale-size", &[(6 << 20) + 1536, (1 << 20) + 512, 3 << 20]);
    let Some(metadata) = model.metadata() else { return };
    let table_bits = world.setting("scale-l2-bits", &fitting(&metadata.table_bits(), &[12, 6, 9]));
    let setup = Setup::with_bits(&world, Kind::alone(model), 0, size_bytes, (9, table_bits));
    // Its requests are larger than merged ones.
    let limits = StackLimits { piece_sectors: 0, ..StackLimits::draw(&world) };
    let host = SimHost::start(&world.kernel, &world.xen, "tapdisk", 0);
    let stack = match Stack::open(&host, &world, &setup.spec, &limits).await {
        Ok(stack) => stack,
        Err(error) => return world.fail(Invariant::G11, format!("failed to open the image: {error}")),
    };
    let policy = ErrorPolicy { retries: 0, errors_allowed: false, reads: Invariant::G1 };
    let disk = DirectDisk::new(stack.node(), limits.pool_bytes.max(4 << 20));
    let guest = Guest::new(&world, disk, Rc::clone(&setup.history), policy);
    guest.run(&scattered(&world, &setup, table_bits), 1).await;
    let ops = at_once(&world, setup.size_sectors);
    // A host with even delays shows how long requests wait for each other.
    let even = world.setting("host-is-even", &[false, true]);
    if even {
        world.sim.stop_faults();
    }
    let (w, node, at) = (world.clone(), stack.node(), setup.size_sectors - TAIL_SECTORS / 2);
    let (task, waited) = joined(async move { longest_small_read(&w, &*node, at).await });
    world.sim.spawn("small reads", 0, task);
    guest.run(&ops, usize::MAX).await;
    check_costs(&world, &stack, &ops);
    let longest_ns = waited.await.unwrap_or_default();
    // Requests for one block run one by one, so fewer than this run below the scheduler, large ones included.
    let has_room = limits.scheduler.depth >= 2 * LARGE_REQUESTS as usize;
    if even && has_room && longest_ns > SMALL_READ_NS {
        let text = format!("during large requests, a read of one sector took {longest_ns} ns");
        world.fail(Invariant::M5, text);
    }
    world.sim.stop_faults();
    if let Err(error) = guest.read_all().await {
        return world.fail(Invariant::L1, format!("reading the disk failed with {error:?}"));
    }
    if let Err(error) = stack.disk.close().await {
        return world.fail(Invariant::L1, format!("closing failed with {error:?}"));
    }
    cut_after_close(&world, [setup.spec.path.as_str()]);
    let memory = stack.memory.clone();
    drop((stack, guest));
    let figures = memory.figures();
    if figures.used_bytes > figures.kept_bytes {
        world.fail(Invariant::M3, format!("the disk is closed, but its memory is {figures:?}"));
    }
    setup.check(&world, "at the end").await;
}

/// Reads one sector at `at` repeatedly. Returns the time of the slowest read in nanoseconds.
async fn longest_small_read(world: &World, node: &dyn Node, at: u64) -> u64 {
    let mut longest_ns = 0;
    for _ in 0..SMALL_READS {
        world.sim.sleep_ns(SMALL_READ_EVERY_NS).await;
        let began_ns = world.sim.now_ns();
        let buf = IoBuf::unpooled(SECTOR_BYTES as usize).expect("a sector is not too large");
        let response = node.submit(Request::read(SectorRange::new(at, 1), IoVec::from_iter([buf]))).await;
        if let Err(error) = response.result {
            world.fail(Invariant::E4, format!("a read of a sector failed with {error:?}"));
        }
        longest_ns = longest_ns.max(world.sim.now_ns() - began_ns);
    }
    longest_ns
}

/// Writes that scatter neighbouring clusters of the disk in the file, and one for each of the first tables. Backwards,
/// no cluster follows its neighbour in the file; alternating, every second one does.
fn scattered(world: &World, setup: &Setup, table_bits: u32) -> Vec<Option<Op>> {
    let count: u64 = world.setting("scattered", &[300, 0, 40]);
    let cluster_sectors = (1 << setup.cluster_bits) / SECTOR_BYTES;
    let is_body = |at: &u64| at + TAIL_SECTORS < setup.size_sectors;
    let clusters: Vec<u64> = match world.setting("scattered-by-turns", &[false, true]) {
        true => (1..=count).step_by(2).chain((2..=count).step_by(2)).collect(),
        false => (1..=count).rev().collect(),
    };
    let write = |at| Some(Op::new(IoKind::Write, SectorRange::new(at, 1)));
    let all = (0..8).map(|table| table << table_bits).chain(clusters);
    all.map(|cluster| cluster * cluster_sectors).filter(is_body).map(write).collect()
}

/// Large requests, many for one block, and small ones.
fn at_once(world: &World, size_sectors: u64) -> Vec<Option<Op>> {
    let body = size_sectors - TAIL_SECTORS;
    let mut ops: Vec<Option<Op>> = (0..LARGE_REQUESTS)
        .map(|i| {
            let form = world.sim.decide(Entity::WORLD.child("large", 0), &LARGE, i, |d| d.below(7));
            let all = SectorRange::new(0, body as u32);
            let zeroes =
                |unmap, fast| Op { zeroes: ZeroFlags { unmap, fast }, ..Op::new(IoKind::WriteZeroes, all) };
            let data = |kind| Op::new(kind, SectorRange::new(0, DATA_SECTORS.min(body) as u32));
            match form {
                1 => Some(data(IoKind::Read)),
                2 => Some(zeroes(false, false)),
                3 => Some(zeroes(true, false)),
                4 => Some(Op::new(IoKind::Discard, all)),
                5 => Some(zeroes(true, true)),
                6 => Some(data(IoKind::Write)),
                _ => None,
            }
        })
        .collect();
    let crowd = world.setting("one-block", &[0, 64, 12]);
    let block = SectorRange::new(body, 8);
    ops.extend((0..crowd).map(|_| Some(Op::new(IoKind::Write, block))));
    ops.extend((0..4).map(|i| Some(Op::new(IoKind::Read, SectorRange::new(body + 8 + i, 1)))));
    ops
}

fn check_costs(world: &World, stack: &Stack, ops: &[Option<Op>]) {
    let work = world.kernel.max_work();
    if work > WORK_PER_TURN {
        world.fail(Invariant::M1, format!("one turn did {work} units of work"));
    }
    let requests = ops.iter().flatten().count() as u64;
    let large = ops[..LARGE_REQUESTS as usize].iter().flatten().count() as u64;
    let (running, max) =
        (world.kernel.max_running(), (large.max(1)) * OPERATIONS_PER_REQUEST + requests - large);
    if running > max {
        let text = format!(
            "{running} file operations ran concurrently for {requests} requests, {large} of them large"
        );
        world.fail(Invariant::M1, text);
    }
    let stats = stack.disk.stats();
    let answered = stats.reads + stats.writes + stats.zeroes + stats.discards;
    let (steps, max) = (stack.disk.order_steps(), answered * (3 * requests + 8));
    if steps > max {
        let text =
            format!("ordering {answered} requests took {steps} steps, with {requests} of them concurrent");
        world.fail(Invariant::M2, text);
    }
}
