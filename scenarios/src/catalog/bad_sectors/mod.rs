//! Sectors of the host's files that cannot be read until they are written, and nothing else that fails.
//!
//! ```text
//!   epoch 1 ...                                                                       last epoch
//!   open, operations, overwrite all and read it, [read all: sectors are good again]   open, read all, write, close
//!            each failure is explained                                  ╳ power cut     no more faults
//!            by a bad sector that the request needs
//! ```
//!
//! Errors of single operations look alike from far away: one of them fails, and the next one on the same place
//! succeeds. Here a place fails for whoever reads it. So it can be said which requests must succeed: those that need
//! no bad sector.

mod causes;

use super::crash::{direct_align, may_overlay, zeroing};
use super::recovered::{check_leaks, last_epoch, lost_tails};
use super::setup::{Setup, workload};
use crate::check::oracle::{Oracle, is_broken};
use crate::check::{BeforeCut, Invariant};
use crate::formats::Kind;
use crate::guest::{DirectDisk, ErrorPolicy, Guest, GuestDisk};
use crate::limits::StackLimits;
use crate::scenario::OfFormat;
use crate::stack::Stack;
use crate::workload::{Op, operations};
use crate::world::World;
use causes::Causes;
use kernel_model::faults::FaultPlan;
use kernel_model::{SimHost, StorageConfig};
use sim::Entity;
use std::rc::Rc;
use tap_core::ZeroFlags;
use tap_core::wait::joined;
use tap_host::{Errno, IoKind, SectorRange};

/// One format, alone or over a backing file, in a file or on a device.
pub static BAD_SECTORS: OfFormat = OfFormat {
    name: "FORMAT-bad-sectors",
    about: "sectors below FORMAT cannot be read until they are written: only requests that need them fail; power cuts",
    fits: |_| true,
    storage: |sim, _| StorageConfig {
        faults: FaultPlan { bad_sectors: true, ..FaultPlan::LATENCY },
        zeroing: zeroing(sim),
        direct_align_bytes: direct_align(sim),
        ..StorageConfig::default()
    },
    body: |w, model| {
        let overlay = may_overlay(&w, model);
        Box::pin(bad_sectors(w, Kind { model, overlay }))
    },
    settled: false,
};

const DISK_BYTES: u64 = 512 << 10;
const EPOCHS: u32 = 2;
const OPS: u32 = 40;
const MAX_SECTORS: u32 = 88;
/// Sectors of the writes that replace all of the disk: whole pages, however the disk lies in its files.
const STEP: u32 = 64;

async fn bad_sectors(world: World, kind: Kind) {
    let limits = StackLimits::draw(&world);
    let setup = Setup::new(&world, kind, 0, DISK_BYTES);
    let on_device = world.setting("on-device", &[false, false, true]);
    let setup = if on_device { setup.on_device(&world) } else { setup };
    let leaked_before = setup.leaked(&world) + setup.compressed_clusters(&world);
    for epoch in 0..EPOCHS {
        let host = SimHost::start(&world.kernel, &world.xen, "tapdisk", u64::from(epoch));
        let (w, s, h) = (world.clone(), setup.clone(), host.clone());
        let (task, served) = joined(async move {
            if let Some(stack) = open(&w, &s, &limits, &h).await {
                serve(&w, &s, &limits, &stack, epoch).await;
            }
        });
        host.process.node().spawn("main", 0, task);
        served.await;
        if world.verdict.is_broken() {
            return;
        }
        cut_power(&world, &setup, &host).await;
        setup.check(&world, &format!("after power cut {}", epoch + 1)).await;
    }
    world.sim.stop_faults();
    last_epoch(&world, &setup, &limits, false, false).await;
    let tails = lost_tails(&world, &setup, &limits);
    check_leaks(&world, &setup, leaked_before + tails, MAX_SECTORS);
}

async fn cut_power(world: &World, setup: &Setup, host: &SimHost) {
    let content = || world.storage.content(&setup.spec.path).unwrap_or_default();
    let before = BeforeCut::capture(setup.model(), &content(), setup.history.borrow().running());
    setup.cut_power(world, &[host.process.node()]).await;
    world.count(|s| s.lost_clusters += before.map_or(0, |before| before.max_lost(&content())));
}

/// Opens the disk; `None` if what it consists of cannot be read.
async fn open(world: &World, setup: &Setup, limits: &StackLimits, host: &SimHost) -> Option<Stack> {
    let causes = Causes::new(world, setup, limits.direct);
    let before = causes.before(world);
    match Stack::open(host, world, &setup.spec, limits).await {
        Ok(stack) => Some(stack),
        Err(error) => {
            if !causes.explain_opening(world, &before) && !is_broken(Oracle::ErrorsIgnored) {
                let text = format!("failed to open the image although all that this reads is good: {error}");
                world.fail(Invariant::E4, text);
            }
            None
        }
    }
}

async fn serve(world: &World, setup: &Setup, limits: &StackLimits, stack: &Stack, epoch: u32) {
    let disk =
        DirectDisk::new(stack.node(), limits.pool_bytes.max(128 << 10)).in_pieces(limits.piece_sectors);
    let disk =
        Judged { disk, world: world.clone(), causes: Rc::new(Causes::new(world, setup, limits.direct)) };
    let policy = ErrorPolicy {
        retries: world.setting("guest-retries", &[0, 1, 3]),
        errors_allowed: true,
        reads: if epoch == 0 { Invariant::G1 } else { Invariant::G7 },
    };
    let guest = Guest::new(world, disk, Rc::clone(&setup.history), policy);
    let entity = Entity::WORLD.child("guest", u64::from(epoch));
    world.sim.name_entity(entity, || format!("guest 1, epoch {epoch}"));
    let mut workload = workload(world, setup.size_sectors, OPS, MAX_SECTORS);
    workload.zeroes = true;
    let ops = operations(&world.sim, entity, u64::from(epoch), &workload);
    guest.run(&ops, limits.guest_depth).await;
    if world.setting("overwritten", &[false, true]) {
        overwrite(&guest, setup.size_sectors).await;
    }
    if world.setting("good-again", &[false, true]) {
        // Nothing that could not be read may have been taken for something else.
        world.storage.set_calm(true);
        if let Err(error) = guest.read_all().await {
            let text = format!("reading the disk failed with {error:?} although its sectors are good again");
            world.fail(Invariant::E4, text);
        }
        world.storage.set_calm(false);
    }
}

/// Writes all of the disk, and reads it back.
async fn overwrite(guest: &Guest<Judged>, size_sectors: u64) {
    for kind in [IoKind::Write, IoKind::Read] {
        for at in (0..size_sectors).step_by(STEP as usize) {
            let range = SectorRange::new(at, (size_sectors - at).min(u64::from(STEP)) as u32);
            guest.one(Op::new(kind, range)).await;
        }
    }
    guest.one(Op::flush()).await;
}

/// A disk of whose failures each must have its cause.
#[derive(Clone)]
struct Judged {
    disk: DirectDisk,
    world: World,
    causes: Rc<Causes>,
}

impl Judged {
    async fn judge<R>(
        &self,
        kind: IoKind,
        range: SectorRange,
        request: impl Future<Output = Result<R, Errno>>,
    ) -> Result<R, Errno> {
        let before = self.causes.before(&self.world);
        let result = request.await;
        if let Err(error) = result
            && error != Errno::EOPNOTSUPP
            && !self.causes.explain(&self.world, &before, kind, range)
            && !is_broken(Oracle::ErrorsIgnored)
        {
            let text = format!("{kind} {range} failed with {error:?} although it needs no bad sector");
            self.world.fail(Invariant::E4, text);
        }
        result
    }
}

impl GuestDisk for Judged {
    async fn read<R>(&self, range: SectorRange, look: impl FnOnce(&[u8]) -> R) -> Result<R, Errno> {
        self.judge(IoKind::Read, range, self.disk.read(range, look)).await
    }

    async fn write(&self, range: SectorRange, fill: impl FnOnce(&mut [u8])) -> Result<(), Errno> {
        self.judge(IoKind::Write, range, self.disk.write(range, fill)).await
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.judge(IoKind::Flush, SectorRange::default(), self.disk.flush()).await
    }

    async fn write_zeroes(&self, range: SectorRange, flags: ZeroFlags) -> Result<(), Errno> {
        self.judge(IoKind::WriteZeroes, range, self.disk.write_zeroes(range, flags)).await
    }

    async fn discard(&self, range: SectorRange) -> Result<(), Errno> {
        self.judge(IoKind::Discard, range, self.disk.discard(range)).await
    }

    fn makes_zeros(&self) -> bool {
        true
    }

    fn max_sectors(&self) -> u32 {
        self.disk.max_sectors()
    }
}
