//! Power cuts: the machine stops at a moment that the seed chooses; the image must then open and hold permitted data.
//!
//! ```text
//!   epoch 1            epoch 2 ...             last epoch
//!   open, operations   open, operations        open, read all, write, flush, read all, close
//!        ╳ power cut        ╳ power cut         no more faults
//! ```

use super::failures::{self, Armed, passing_storage};
use super::recovered::{FILL_SECTORS, after_cut, check_leaks, last_epoch, lost_tails};
use super::setup::{Setup, cut_after_drop, workload};
use crate::check::{BeforeCut, Invariant};
use crate::explore::Explorer;
use crate::formats::{self, FormatModel, Kind, RAW};
use crate::guest::{DirectDisk, ErrorPolicy, Guest};
use crate::limits::StackLimits;
use crate::power::{CRASH_AT, power};
use crate::probes::marked;
use crate::scenario::{OfFormat, Scenario};
use crate::stack::Stack;
use crate::workload::{LONG, Op, Shape, operations};
use crate::world::{World, setting};
use kernel_model::SimHost;
use kernel_model::StorageConfig;
use kernel_model::faults::{FaultPlan, SyncErrors};
use sim::{Entity, Sim};
use std::cell::Cell;
use std::rc::Rc;
use tap_core::wait::joined;
use tap_host::{IoKind, SECTOR_BYTES, SectorRange, select};

/// One power cut, or two where a recovery has nothing to do: a raw file has nothing between the guest and the file, so
/// the rules are the same.
pub static POWER_CUT: OfFormat = OfFormat {
    name: "FORMAT-power-cut",
    about: "FORMAT under load with zeros and discards, power cut at any host operation, recovery checked sector by sector",
    fits: |_| true,
    storage: |sim, _| StorageConfig {
        zeroing: zeroing(sim),
        direct_align_bytes: direct_align(sim),
        ..passing_storage(sim)
    },
    body: |w, model| {
        let cuts = if model.has_metadata() { 1 } else { 2 };
        Box::pin(power_cuts(w, model, Plan { cuts, ..PLAIN }))
    },
    settled: true,
};

/// Above a raw backing file, some clusters compressed.
pub static OVERLAY_POWER_CUT: OfFormat = OfFormat {
    name: "FORMAT-overlay-power-cut",
    about: "FORMAT over a backing file, with compressed clusters: partial writes copy up, power cut, recovery checked",
    fits: |model| model.format().info().has_backing,
    storage: |sim, _| StorageConfig {
        faults: FaultPlan { short: true, ..FaultPlan::LATENCY },
        zeroing: zeroing(sim),
        direct_align_bytes: direct_align(sim),
        ..StorageConfig::default()
    },
    body: |w, model| Box::pin(power_cuts(w, model, Plan { overlay: true, ops: 30, ..PLAIN })),
    settled: true,
};

/// Whether the host can zero ranges of files.
pub(super) fn zeroing(sim: &Sim) -> bool {
    setting(sim, "host-zeroes", &[true, true, false])
}

/// The sector size of the drive below direct files.
pub(super) fn direct_align(sim: &Sim) -> u32 {
    setting(sim, "direct-align", &[512, 4096])
}

/// Crashes during the recovery from a crash.
pub static RECOVERY_CRASH: OfFormat = OfFormat {
    name: "FORMAT-recovery-crash",
    about: "power cut, then again and again within the first host operations of each recovery of FORMAT",
    fits: |model| model.has_metadata(),
    storage: |sim, _| passing_storage(sim),
    body: |w, model| {
        let overlay = may_overlay(&w, model);
        Box::pin(power_cuts(w, model, Plan { overlay, cuts: 4, ops: 24, recovery_only: true, ..PLAIN }))
    },
    settled: true,
};

/// A disk that is filled to its last cluster, and again after each cut: by then all bounds of a format must hold.
pub static FILLED_POWER_CUT: OfFormat = OfFormat {
    name: "FORMAT-filled-power-cut",
    about: "a disk in FORMAT is filled, power cut; filled again to its last cluster, and every sector read",
    fits: |model| model.has_metadata(),
    storage: |_, _| StorageConfig {
        faults: FaultPlan { short: true, ..FaultPlan::LATENCY },
        ..StorageConfig::default()
    },
    body: |w, model| Box::pin(power_cuts(w, model, Plan { cuts: 2, fills: true, ..PLAIN })),
    settled: false,
};

/// Errors of every kind, with a guest that repeats failed requests. If the file is the disk, the guest depends on what
/// the host leaves of a failed call.
pub static ERRORS: OfFormat = OfFormat {
    name: "FORMAT-errors",
    about: "FORMAT, every host operation may fail, once or for good, with any part of its effect; the guest repeats; then a power cut",
    fits: |_| true,
    storage: |sim, _| error_storage(sim),
    body: |w, model| {
        let overlay = may_overlay(&w, model);
        Box::pin(power_cuts(w, model, Plan { overlay, cuts: 2, ..PLAIN }))
    },
    settled: true,
};

/// A few blocks of a disk that are written, zeroed and flushed repeatedly: if the file is the disk, the only data at
/// risk is what the host drops of its cache before zeros fail.
pub static ZEROS: OfFormat = OfFormat {
    name: "FORMAT-zeros",
    about: "a few blocks of a FORMAT disk are written, zeroed and flushed concurrently, and zeros fail in every way; power cuts",
    fits: |model| !model.has_metadata(),
    storage: |sim, _| error_storage(sim),
    body: |w, model| Box::pin(power_cuts(w, model, Plan { cuts: 6, ops: 20, zeros: true, ..PLAIN })),
    settled: false,
};

/// The image for counting crash states: 8 MiB in 4 KiB clusters.
pub static EXPLORE: OfFormat = OfFormat {
    name: "explore-FORMAT",
    about: "FORMAT of 8 MiB in clusters of 4 KiB, every crash state checked",
    fits: |model| model.has_metadata(),
    storage: |_, _| StorageConfig::default(),
    body: |w, model| Box::pin(power_cuts(w, model, Plan { ops: 120, ..PLAIN })),
    settled: true,
};

/// The same over a backing file.
pub static EXPLORE_OVERLAY: OfFormat = OfFormat {
    name: "explore-FORMAT-overlay",
    about: "FORMAT of 8 MiB in clusters of 4 KiB over a backing file, every crash state checked",
    fits: |model| model.format().info().has_backing,
    storage: |_, _| StorageConfig::default(),
    body: |w, model| Box::pin(power_cuts(w, model, Plan { overlay: true, ops: 120, ..PLAIN })),
    settled: true,
};

/// Small clusters, of which a filled disk has many.
fn filled(world: &World, model: &dyn FormatModel) -> u32 {
    let bits = model.metadata().map_or(9..=9, |metadata| metadata.cluster_bits());
    world.setting("filled-cluster-bits", &formats::fitting(&bits, &[12, 11, 10]))
}

/// Puts some images above a backing file, if the format permits.
pub(super) fn may_overlay(world: &World, model: &dyn FormatModel) -> bool {
    model.format().info().has_backing && world.setting("overlay", &[false, true])
}

/// An image that another program made.
pub static REAL_IMAGE: Scenario = Scenario {
    name: "real-image",
    about: "a given image under load, power cut at any host operation, recovery checked sector by sector",
    storage: &|_| StorageConfig {
        faults: FaultPlan { short: true, ..FaultPlan::LATENCY },
        ..StorageConfig::default()
    },
    body: &|w| {
        let image = w.options.image.clone();
        let model = image.map_or(formats::of(RAW), |image| image.loaded().model);
        Box::pin(power_cuts(w, model, Plan { cuts: 2, ..PLAIN }))
    },
};

pub(super) fn error_storage(sim: &Sim) -> StorageConfig {
    // Not `SyncErrors::Reverts`: it reverts answered writes of a running disk, which nothing above can prevent.
    let modes = [SyncErrors::Retryable, SyncErrors::Linux, SyncErrors::Latched];
    StorageConfig {
        faults: FaultPlan::ALL,
        sync_errors: setting(sim, "sync-errors", &modes),
        zeroing: zeroing(sim),
        holes_write_back: setting(sim, "holes-write-back", &[true, false]),
        direct_align_bytes: direct_align(sim),
        nth_failure: failures::lasting(sim),
        ..StorageConfig::default()
    }
}

/// Parameters of a scenario.
#[derive(Clone, Copy)]
struct Plan {
    overlay: bool,
    cuts: u32,
    ops: u32,
    /// The disk is filled to its last cluster, and again after every cut.
    fills: bool,
    /// The disk is small, and much of it is zeroed.
    zeros: bool,
    /// After the first cut, power is cut within the first operations of the recovery.
    recovery_only: bool,
}

const PLAIN: Plan =
    Plan { overlay: false, cuts: 1, ops: 40, fills: false, zeros: false, recovery_only: false };

const DISK_BYTES: u64 = 1 << 20;
/// Size of a disk that is filled: larger than the slack in a format's bounds.
const FILLED_BYTES: u64 = 4 << 20;
/// Size of a disk that is zeroed.
const ZEROS_BYTES: u64 = 96 << 10;
/// Size of the disk whose crash states are counted.
const EXPLORED_BYTES: u64 = 8 << 20;

async fn power_cuts(world: World, model: &'static dyn FormatModel, plan: Plan) {
    let mut limits = StackLimits::draw(&world);
    if plan.fills {
        limits.pool_bytes = limits.pool_bytes.max(2 * FILL_SECTORS as usize * SECTOR_BYTES as usize);
    }
    let kind = Kind { model, overlay: plan.overlay };
    let setup = match world.options.image.clone() {
        Some(image) => Setup::real(&world, &image),
        None if world.options.explore => Setup::with_bits(&world, kind, 0, EXPLORED_BYTES, (12, 9)),
        None if plan.fills => Setup::with_bits(&world, kind, 0, FILLED_BYTES, (filled(&world, model), 13)),
        None => Setup::new(&world, kind, 0, if plan.zeros { ZEROS_BYTES } else { DISK_BYTES }),
    };
    let on_file = plan.fills || world.options.explore || world.options.image.is_some();
    let on_device = !on_file && world.setting("on-device", &[false, false, true]);
    let setup = if on_device { setup.on_device(&world) } else { setup };
    let leaked_before = setup.leaked(&world) + setup.compressed_clusters(&world);
    let flush_failed = Rc::new(Cell::new(false));
    for cut in 0..plan.cuts {
        epoch(&world, &setup, &limits, plan, cut, &flush_failed).await;
        if world.verdict.is_broken() {
            return;
        }
    }
    world.sim.stop_faults();
    world.storage.stop_failures();
    last_epoch(&world, &setup, &limits, plan.fills, flush_failed.get()).await;
    let tails = lost_tails(&world, &setup, &limits);
    // Zeros on a device may be long.
    let max_sectors = plan.max_sectors() * if on_device { LONG } else { 1 };
    check_leaks(&world, &setup, leaked_before + tails, max_sectors);
}

impl Plan {
    /// Maximum number of sectors in a request.
    fn max_sectors(self) -> u32 {
        match self {
            Self { fills: true, .. } => FILL_SECTORS,
            Self { zeros: true, .. } => 24,
            _ => 88,
        }
    }
}

async fn epoch(
    world: &World,
    setup: &Setup,
    limits: &StackLimits,
    plan: Plan,
    cut: u32,
    flush_failed: &Rc<Cell<bool>>,
) {
    let recovering = cut > 0 && plan.recovery_only;
    let host = SimHost::start(&world.kernel, &world.xen, "tapdisk", u64::from(cut));
    let node = host.process.node().clone();
    let count = if recovering { 6 } else { plan.ops };
    let guest = Entity::WORLD.child("guest", u64::from(cut));
    world.sim.name_entity(guest, || format!("guest 1, epoch {cut}"));
    let mut workload = workload(world, setup.size_sectors, count, plan.max_sectors());
    workload.zeroes = !plan.fills;
    // A device makes them in several parts, and a file has holes and data in the same part.
    workload.long_zeroes = workload.zeroes && (plan.zeros || world.storage.is_device(&setup.spec.path));
    if plan.fills {
        workload.shape = Shape::Filling;
    } else if plan.zeros {
        workload.shape = Shape::Zeroing;
    }
    let ops = operations(&world.sim, guest, u64::from(cut), &workload);
    let own = node.clone();
    if plan.zeros && cut % 2 == 1 {
        cut_after_drop(world, cut, move || own.kill());
    } else {
        let max = if recovering { 24 } else { u64::from(plan.ops) * 4 };
        arm_power_cut(world, setup, cut, max, move || own.kill());
    }
    let (w, s, l, f) = (world.clone(), setup.clone(), *limits, Rc::clone(flush_failed));
    let h = host.clone();
    let (task, finished) = joined(async move {
        work(&w, &s, &l, &h, &ops, &f, cut > 0).await;
    });
    node.spawn("main", 0, task);
    select(node.dead(), finished).await;
    world.storage.set_hook(None);
    world.storage.set_refusing(false);
    if let Some(explorer) = world.explorer().filter(|_| cut == 0) {
        // The last flush may have no operation after it.
        look(world, &explorer, 0);
    }
    node.kill();
    node.dead().await;
    let live = world.storage.content(&setup.spec.path).unwrap_or_default();
    let before = BeforeCut::capture(setup.model(), &live, setup.history.borrow().running());
    world.power_cut();
    let left = world.storage.content(&setup.spec.path).unwrap_or_default();
    world.count(|s| s.lost_clusters += before.map_or(0, |before| before.max_lost(&left)));
    setup.history.borrow_mut().power_cut();
    setup.check(world, &format!("after power cut {}", cut + 1)).await;
}

/// Calls `cut` after as many more operations of the storage as the seed says, if it cuts at all.
pub(super) fn arm_power_cut(world: &World, setup: &Setup, epoch: u32, max: u64, cut: impl Fn() + 'static) {
    let entity = power(epoch);
    world.sim.name_entity(entity, || format!("power, epoch {epoch}"));
    if world.options.explore && epoch == 0 {
        return explore(world, setup);
    }
    let after =
        world.sim.decide(entity, &CRASH_AT, 0, |d| if d.below(8) == 0 { 0 } else { 1 + d.below(max) });
    if after > 0 {
        let at = world.storage.ops() + after;
        world.storage.set_hook(Some(Rc::new(move |op| {
            if op == at {
                cut();
            }
        })));
    }
}

/// Explores all crash states from now on; the power itself is cut only once everything is at rest.
fn explore(world: &World, setup: &Setup) {
    let below = setup.below(world);
    let history = Rc::clone(&setup.history);
    let seed = world.sim.swarm().seed();
    let explorer = Explorer::new(&world.storage, &setup.spec, history, below, world.options.bug, seed);
    world.set_explorer(Rc::clone(&explorer));
    let (w, start) = (world.clone(), world.storage.ops());
    world.storage.set_hook(Some(Rc::new(move |op| {
        look(&w, &explorer, op - start);
    })));
}

fn look(world: &World, explorer: &Explorer, op: u64) {
    explorer.point(op);
    if let Some(bad) = explorer.bad() {
        world.fail(bad.invariant, bad.detail);
    }
}

/// What happens between power-on and the power cut.
async fn work(
    world: &World,
    setup: &Setup,
    limits: &StackLimits,
    host: &SimHost,
    ops: &[Option<Op>],
    flush_failed: &Cell<bool>,
    recovered: bool,
) {
    let outages = !world.errors_allowed() && !world.options.explore;
    if outages {
        failures::arm_outage(world, Armed::Opening);
    }
    let Some(stack) = open_under_errors(world, setup, limits, host).await else { return };
    if outages {
        failures::arm_outage(world, Armed::Open);
    }
    let policy = ErrorPolicy {
        retries: guest_retries(world),
        errors_allowed: world.errors_allowed(),
        reads: if recovered { after_cut(flush_failed.get()) } else { Invariant::G1 },
    };
    let disk = DirectDisk::new(stack.node(), limits.pool_bytes).in_pieces(limits.piece_sectors);
    let guest = Guest::new(world, disk, Rc::clone(&setup.history), policy);
    if recovered {
        // Some of it is read, the rest stays unresolved.
        let some = u64::from(guest_window(world));
        for at in (0..some).map(|i| i * 16 % setup.size_sectors) {
            if let Err(error) = guest.read(SectorRange::new(at, 16)).await
                && !world.errors_allowed()
            {
                world.fail(Invariant::G11, format!("reading the disk after a crash failed with {error:?}"));
            }
        }
    }
    guest.set_error_policy(ErrorPolicy {
        reads: if recovered { policy.reads } else { Invariant::G1 },
        ..policy
    });
    let first = if world.storage.is_device(&setup.spec.path) { flush_beside_discard(world) } else { 0 };
    if first > 0 {
        let range = SectorRange::new(0, 64);
        guest.one(Op::new(IoKind::Write, range)).await;
        guest.run(&[Some(Op::flush()), Some(Op::new(IoKind::Discard, range))], 2).await;
    }
    let on_file = world.errors_allowed() && !world.storage.is_device(&setup.spec.path);
    if on_file {
        write_to_failing_disk(world, &guest, setup.size_sectors).await;
    }
    if first < 2 {
        guest.run(ops, limits.guest_depth).await;
    }
    if on_file && world.setting("filled-after-errors", &[false, true]) {
        fill(world, &guest, setup.size_sectors).await;
    }
    flush_failed.set(flush_failed.get() || guest.flush_failed());
}

/// In some worlds all writes fail for a while: each may waste the space allocated for it.
async fn write_to_failing_disk(world: &World, guest: &Guest<DirectDisk>, size_sectors: u64) {
    let count = world.setting("written-in-vain", &[0, 0, 24, 12]);
    world.storage.set_refusing(count > 0);
    for n in 0..count {
        guest.one(Op::new(IoKind::Write, SectorRange::new(n * 88 % (size_sectors - 88), 88))).await;
    }
    world.storage.set_refusing(false);
}

/// Writes the whole disk once failures are no longer consecutive, and reads it: the space lost to errors must leave
/// room for the rest.
async fn fill(world: &World, guest: &Guest<DirectDisk>, size_sectors: u64) {
    world.storage.stop_failures();
    let part = |at: u64| SectorRange::new(at, (size_sectors - at).min(64) as u32);
    for at in (0..size_sectors).step_by(64) {
        guest.one(Op::new(IoKind::Write, part(at))).await;
    }
    world.storage.set_calm(true);
    for at in (0..size_sectors).step_by(64) {
        let given_up = marked(&world.kernel, "file-given-up") > 0;
        if let Err(error) = guest.read(part(at)).await
            && !given_up
        {
            let text = format!("reading {} failed with {error:?} although nothing below it did", part(at));
            return world.fail(Invariant::E4, text);
        }
    }
    world.storage.set_calm(false);
}

/// Whether a guest of a device begins with a concurrent flush and discard (1), followed by a power cut (2): a drive
/// that refuses a discard for the first time may lose dirty pages.
fn flush_beside_discard(world: &World) -> u32 {
    world.setting("flush-beside-discard", &[0, 1, 2, 2])
}

/// Opens a disk, with retries where operations fail; `None` if that does not help before the next power cut.
pub(super) async fn open_under_errors(
    world: &World,
    setup: &Setup,
    limits: &StackLimits,
    host: &SimHost,
) -> Option<Stack> {
    let mut tries = if world.errors_allowed() { world.setting("open-tries", &[1, 4]) } else { 1 };
    let failed_syncs = world.storage.counts().failed_syncs;
    loop {
        tries -= 1;
        match Stack::open(host, world, &setup.spec, limits).await {
            Ok(stack) => {
                setup.check_length(world, failed_syncs);
                setup.check_locks(world, false);
                return Some(stack);
            }
            Err(_) if world.errors_allowed() && tries == 0 => return None,
            Err(_) if world.errors_allowed() => world.sim.sleep_ns(1_000_000).await,
            Err(error) => {
                world.fail(Invariant::G11, format!("failed to open the image after a crash: {error}"));
                return None;
            }
        }
    }
}

/// How often a guest repeats failed requests.
pub(super) fn guest_retries(world: &World) -> u32 {
    if world.errors_allowed() { world.setting("guest-retries", &[3, 0, 1]) } else { 0 }
}

fn guest_window(world: &World) -> u32 {
    world.setting("recovery-reads", &[0, 4, 64])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::of_format;
    use crate::crash_states::explore_run;
    use crate::probes::find_bug;
    use crate::run::{run, run_recorded};
    use crate::spec::RunSpec;
    use sim::{Source, TraceLevel};

    /// A power cut makes a decision for each page of each operation, and the trace hash covers what it leaves.
    #[test]
    fn replays_of_power_cuts_leave_the_same_bytes() {
        let mapped = [&POWER_CUT, &OVERLAY_POWER_CUT, &RECOVERY_CRASH, &ERRORS]
            .map(|scenario| of_format::of(scenario, Kind::mapped(false).model).unwrap());
        for scenario in mapped.into_iter().chain(of_format::of(&POWER_CUT, Kind::raw().model)) {
            for seed in 0..40 {
                let first = run_recorded(&RunSpec::new(scenario, seed), TraceLevel::Hash);
                let source = Source::Replay(first.decisions);
                let again = run(&RunSpec { source, ..RunSpec::new(scenario, seed) });
                assert_eq!(first.trace.hash, again.trace.hash, "{} seed {seed}", scenario.name);
            }
        }
    }

    #[test]
    fn the_last_flush_is_checked_though_no_operation_follows() {
        static FEW: Scenario = Scenario {
            name: "few",
            about: "a power cut after a few operations",
            storage: &passing_storage,
            body: &|w| Box::pin(power_cuts(w, Kind::mapped(false).model, Plan { ops: 3, ..PLAIN })),
        };
        let found = (0..200).find_map(|seed| {
            let spec = RunSpec::new(&FEW, seed).with_bug(find_bug("flush-early"));
            let (outcome, replay) = explore_run(&spec);
            outcome.bad_state.filter(|bad| bad.after_op == 0).and(replay)
        });
        assert!(run(&found.expect("some run ends with a flush")).failure.is_some());
    }
}
