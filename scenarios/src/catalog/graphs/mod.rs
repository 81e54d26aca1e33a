//! Disks that are graphs: what the guest sees follows from the graph's meaning, through power cuts, deaths of the
//! process and errors.
//!
//! ```text
//!   draw a graph ─► open it as programs do ─► a guest's operations ─► the power is cut, or the process dies
//!                          ▲                                                   │
//!                          └───────────────────────────────────────────────────┘
//!   at last: read all, write, flush, close; then the bytes of the images against the graph's meaning
//! ```

mod drawn;

pub use drawn::GRAPH_NODE;

use super::crash::{direct_align, error_storage, guest_retries, zeroing};
use super::failures::{self, Armed, passing_storage};
use super::recovered::after_cut;
use super::setup::{check_at_rest, check_pages, workload};
use crate::check::{BlockHistory, Initial, Invariant};
use crate::formats;
use crate::guest::{DirectDisk, ErrorPolicy, Guest};
use crate::limits::StackLimits;
use crate::power::{CRASH_AT, power};
use crate::scenario::Scenario;
use crate::stack::Stack;
use crate::workload::{Op, operations};
use crate::world::World;
use drawn::{Drawn, TEXT, draw};
use kernel_model::{SimHost, StorageConfig};
use sim::Entity;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_core::CacheMode;
use tap_core::wait::joined;
use tap_host::{Files, IoKind, LockKind, SECTOR_BYTES, SectorRange, select};
use tap_programs::spec::DiskSpec;

/// Nothing fails for good.
pub static GRAPH_POWER_CUT: Scenario = Scenario {
    name: "graph-power-cut",
    about: "random graphs of disks under load, power cut or process killed at any host operation, the view checked against the graph's meaning",
    storage: &|sim| StorageConfig {
        zeroing: zeroing(sim),
        direct_align_bytes: direct_align(sim),
        ..passing_storage(sim)
    },
    body: &|world| Box::pin(graphs(world)),
};

/// Every operation may fail.
pub static GRAPH_ERRORS: Scenario = Scenario {
    name: "graph-errors",
    about: "random graphs of disks, every host operation may fail, once or for good; what cannot be opened is closed again",
    storage: &error_storage,
    body: &|world| Box::pin(graphs(world)),
};

/// A graph and the history of its disk.
struct Grown {
    drawn: Drawn,
    history: Rc<RefCell<BlockHistory>>,
    limits: StackLimits,
    cache: CacheMode,
    flush_failed: Cell<bool>,
    /// A process was killed and the power was not cut since: what it kept outside of itself is left.
    died: Cell<bool>,
}

const OPS: u32 = 40;
const MAX_SECTORS: u32 = 88;

async fn graphs(world: World) {
    let mut limits = StackLimits::draw(&world);
    if limits.memory_bytes > 0 {
        // A dozen images have more guarantees than one.
        limits.memory_bytes = limits.memory_bytes.max(32 << 20);
    }
    let cache =
        world.setting("cache", &[CacheMode::WriteBack, CacheMode::WriteBack, CacheMode::WriteThrough]);
    let full = world.setting("bodies", &[false, false, false, true]);
    let mut drawn = draw(&world);
    let initial = Initial::Bytes(std::mem::take(&mut drawn.view));
    let history = BlockHistory::new(drawn.places.len() as u64, 1, initial, full);
    let history = Rc::new(RefCell::new(history));
    let grown = Rc::new(Grown {
        drawn,
        history,
        limits,
        cache,
        flush_failed: Cell::new(false),
        died: Cell::new(false),
    });
    for life in 0..2 {
        epoch(&world, &grown, life).await;
        if world.verdict.is_broken() {
            return;
        }
    }
    world.sim.stop_faults();
    world.storage.stop_failures();
    last(&world, &grown).await;
}

/// From one power cut or death of the process to the next.
async fn epoch(world: &World, grown: &Rc<Grown>, life: u32) {
    let host = SimHost::start(&world.kernel, &world.xen, "tapdisk", life.into());
    let node = host.process.node().clone();
    let entity = Entity::WORLD.child("guest", life.into());
    world.sim.name_entity(entity, || format!("guest 1, life {life}"));
    let size_sectors = grown.drawn.places.len() as u64;
    let mut wanted = workload(world, size_sectors, OPS, MAX_SECTORS);
    wanted.zeroes = true;
    let ops = operations(&world.sim, entity, life.into(), &wanted);
    arm(world, &node, life);
    let (w, g, h) = (world.clone(), Rc::clone(grown), host.clone());
    let (task, finished) = joined(async move { work(&w, &g, &h, &ops, life).await });
    node.spawn("main", 0, task);
    select(node.dead(), finished).await;
    world.storage.set_hook(None);
    node.kill();
    node.dead().await;
    let mut history = grown.history.borrow_mut();
    // After a failed synchronisation flushes fail until the power is cut: at the end everything must work.
    if life > 0 || world.setting("graph-cut", &[true, true, false]) {
        world.power_cut();
        history.power_cut();
    } else {
        // The requests of its guest, which is in the same process, end with it.
        history.server_died();
        history.guest_died();
        grown.died.set(true);
    }
    drop(history);
    check_images(world, grown, &format!("after life {}", life + 1));
}

/// Kills the process after as many operations of the storage as the seed says, if it does.
fn arm(world: &World, node: &sim::Node, life: u32) {
    let entity = power(life);
    world.sim.name_entity(entity, || format!("power, life {life}"));
    let most = u64::from(OPS) * 4;
    let after =
        world.sim.decide(entity, &CRASH_AT, 0, |d| if d.below(8) == 0 { 0 } else { 1 + d.below(most) });
    if after > 0 {
        let (at, node) = (world.storage.ops() + after, node.clone());
        world.storage.set_hook(Some(Rc::new(move |op| {
            if op == at {
                node.kill();
            }
        })));
    }
}

async fn work(world: &World, grown: &Grown, host: &SimHost, ops: &[Option<Op>], life: u32) {
    if !world.errors_allowed() {
        failures::arm_outage(world, Armed::Opening);
    }
    let Some(stack) = open(world, grown, host).await else { return };
    if !world.errors_allowed() {
        failures::arm_outage(world, Armed::Open);
    }
    let reads = if life > 0 { after_cut(grown.flush_failed.get()) } else { Invariant::G1 };
    let policy = ErrorPolicy { retries: guest_retries(world), errors_allowed: world.errors_allowed(), reads };
    let guest = guest_of(world, grown, &stack, policy);
    if life > 0 {
        // Some of it is read, the rest stays unresolved.
        for at in (0..world.setting("recovery-reads", &[0, 4, 64])).map(|i| i * 16 % guest_size(grown)) {
            let count = (guest_size(grown) - at).min(16) as u32;
            if let Err(error) = guest.read(SectorRange::new(at, count)).await
                && !world.errors_allowed()
            {
                world.fail(Invariant::G11, format!("reading the disk after a crash failed with {error:?}"));
            }
        }
    }
    guest.set_error_policy(ErrorPolicy { reads: Invariant::G1, ..policy });
    guest.run(ops, grown.limits.guest_depth).await;
    grown.flush_failed.set(grown.flush_failed.get() || guest.flush_failed());
}

fn guest_size(grown: &Grown) -> u64 {
    grown.drawn.places.len() as u64
}

fn guest_of(world: &World, grown: &Grown, stack: &Stack, policy: ErrorPolicy) -> Guest<DirectDisk> {
    let limits = &grown.limits;
    let disk =
        DirectDisk::new(stack.node(), limits.pool_bytes.max(256 << 10)).in_pieces(limits.piece_sectors);
    let guest = Guest::new(world, disk, Rc::clone(&grown.history), policy);
    if grown.cache == CacheMode::WriteThrough {
        guest.write_through();
    }
    guest
}

/// Opens the disk, with retries where operations fail; `None` if that does not help.
async fn open(world: &World, grown: &Grown, host: &SimHost) -> Option<Stack> {
    let spec = DiskSpec::Mason { path: TEXT.to_owned(), disk: None };
    let mut tries = if world.errors_allowed() { world.setting("open-tries", &[1, 4]) } else { 1 };
    loop {
        tries -= 1;
        // What a killed predecessor had may be open a little longer.
        let before = locked(world, grown);
        match Stack::open_disk(host, world, &spec, &grown.limits, grown.cache).await {
            Ok(stack) => {
                check_size(world, grown, &stack);
                check_locks(world, grown);
                return Some(stack);
            }
            Err(error) if !world.errors_allowed() => {
                world.fail(Invariant::G11, format!("failed to {error}"));
                return None;
            }
            Err(_) => {
                host.closed().await;
                check_closed(world, grown, &before, "that could not be opened");
                if !grown.died.get() {
                    check_pages(world);
                }
                if tries == 0 {
                    return None;
                }
                world.sim.sleep_ns(1_000_000).await;
            }
        }
    }
}

fn check_size(world: &World, grown: &Grown, stack: &Stack) {
    let (found, meant) = (stack.node().info().size_sectors, guest_size(grown));
    if found != meant {
        world.fail(Invariant::G11, format!("the disk has {found} sectors, and the graph means {meant}"));
    }
}

/// Each image is locked for what is done with it.
fn check_locks(world: &World, grown: &Grown) {
    for leaf in &grown.drawn.leaves {
        let locks = world.storage.locks(&leaf.path);
        // A reader that was killed may have its lock still, beside that of the next one.
        let is_locked = match leaf.is_written {
            true => locks == [LockKind::Exclusive],
            false => !locks.is_empty() && !locks.contains(&LockKind::Exclusive),
        };
        if !is_locked {
            let text = format!("{} of a graph is in use, and its locks are {locks:?}", leaf.path);
            return world.fail(Invariant::C2, text);
        }
    }
}

/// The images that somebody has locked.
fn locked(world: &World, grown: &Grown) -> Vec<String> {
    let paths = grown.drawn.leaves.iter().map(|leaf| &leaf.path);
    paths.filter(|path| !world.storage.locks(path).is_empty()).cloned().collect()
}

/// No image of a graph is in use, but for those that were `before`.
fn check_closed(world: &World, grown: &Grown, before: &[String], what: &str) {
    if let Some(path) = locked(world, grown).iter().find(|path| !before.contains(path)) {
        world.fail(Invariant::K1, format!("{path} of a graph {what} is still locked"));
    }
}

/// Without faults: everything can be read, written and flushed, and is in the images where the graph means it.
async fn last(world: &World, grown: &Grown) {
    let host = SimHost::start(&world.kernel, &world.xen, "tapdisk", 1000);
    let Some(stack) = open(world, grown, &host).await else {
        return world.fail(Invariant::G11, "the graph cannot be opened after the last crash");
    };
    let reads = after_cut(grown.flush_failed.get());
    let policy = ErrorPolicy { retries: 0, errors_allowed: false, reads };
    let guest = guest_of(world, grown, &stack, policy);
    if let Err(error) = guest.read_all().await {
        return world.fail(Invariant::G11, format!("reading the disk after recovery failed with {error:?}"));
    }
    guest.set_error_policy(ErrorPolicy { reads: Invariant::G1, ..policy });
    let step = guest_size(grown) / 31;
    let write = |i: u64| Op::new(IoKind::Write, SectorRange::new(i * step, 1 + (i % 5) as u32));
    let ops: Vec<Option<Op>> = (0..30).map(|i| Some(write(i))).collect();
    guest.run(&ops, 8).await;
    guest.one(Op::flush()).await;
    if let Err(error) = guest.read_all().await {
        world.fail(Invariant::G11, format!("reading what was written after recovery failed with {error:?}"));
    }
    if let Err(error) = stack.disk.close().await {
        return world.fail(Invariant::G11, format!("closing after recovery failed with {error:?}"));
    }
    host.closed().await;
    check_closed(world, grown, &[], "that was closed");
    if guest.disk().buffers_out() > 0 {
        let text = format!("{} bytes of buffers were not released", guest.disk().buffers_out());
        world.fail(Invariant::K1, text);
    }
    check_pages(world);
    check_at_rest(world, host.process.node()).await;
    check_images(world, grown, "after recovery");
    check_places(world, grown);
}

/// The metadata of images.
fn check_images(world: &World, grown: &Grown, when: &str) {
    for leaf in &grown.drawn.leaves {
        let Some(content) = world.storage.content(&leaf.path) else {
            return world.fail(Invariant::G11, format!("{when} {} is gone", leaf.path));
        };
        if let Some(Err((invariant, text))) = formats::of(leaf.format).walk_whole(&content) {
            world.fail(invariant, format!("{when} {}: {text}", leaf.path));
        }
    }
}

/// What is in raw images is what the guest wrote to the sectors that are there.
fn check_places(world: &World, grown: &Grown) {
    let history = grown.history.borrow();
    for (sector, (leaf, place)) in grown.drawn.places.iter().enumerate() {
        let leaf = &grown.drawn.leaves[*leaf];
        if leaf.format != formats::RAW || !leaf.is_written {
            continue;
        }
        let mut bytes = [0; SECTOR_BYTES as usize];
        let read = |inode: &kernel_model::Inode| inode.base.pages.read(place * SECTOR_BYTES, &mut bytes);
        if world.storage.with_inode(&leaf.path, read).is_none() {
            return;
        }
        if let Err(wrong) = history.check_survivor(sector as u64, &bytes) {
            let text = format!("sector {place} of {} is sector {sector} of the disk: {wrong}", leaf.path);
            return world.fail(Invariant::G1, text);
        }
    }
}
