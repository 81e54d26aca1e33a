//! What must hold for a recovered disk: it opens, can be read and written to its last sector, and little is lost.

use super::costs::check_reads;
use super::setup::{Setup, check_at_rest, cut_after_close};
use crate::check::oracle::{Oracle, is_broken};
use crate::check::{Invariant, lost_to_error};
use crate::guest::{DirectDisk, ErrorPolicy, Guest, GuestDisk};
use crate::limits::StackLimits;
use crate::probes::marked;
use crate::stack::Stack;
use crate::workload::Op;
use crate::world::World;
use kernel_model::SimHost;
use std::rc::Rc;
use tap_core::ZeroFlags;
use tap_host::{Errno, IoKind, SectorRange};

/// Sectors per write when a disk is filled.
pub(super) const FILL_SECTORS: u32 = 256;

/// A wrong version after a power cut breaks G7; after a failed flush, later flushes did not cover it (E2).
pub(super) fn after_cut(flush_failed: bool) -> Invariant {
    if flush_failed { Invariant::E2 } else { Invariant::G7 }
}

/// The disk after the last crash, without faults: it opens, holds permitted data, is written, flushed, read and closed.
pub(super) async fn last_epoch(
    world: &World,
    setup: &Setup,
    limits: &StackLimits,
    fills: bool,
    flush_failed: bool,
) {
    let host = SimHost::start(&world.kernel, &world.xen, "tapdisk", 1000);
    let failed_syncs = world.storage.counts().failed_syncs;
    let stack = match Stack::open(&host, world, &setup.spec, limits).await {
        Ok(stack) => stack,
        Err(error) => {
            world.fail(Invariant::G11, format!("failed to open the image after the last crash: {error}"));
            return;
        }
    };
    setup.check_length(world, failed_syncs);
    setup.check_locks(world, false);
    // Opening has read all tables.
    check_reads(world, setup, &*stack.node(), limits).await;
    let policy = ErrorPolicy { retries: 0, errors_allowed: false, reads: after_cut(flush_failed) };
    let disk =
        DirectDisk::new(stack.node(), limits.pool_bytes.max(256 << 10)).in_pieces(limits.piece_sectors);
    let guest = Guest::new(world, disk, Rc::clone(&setup.history), policy);
    if let Err(error) = guest.read_all().await {
        world.fail(Invariant::G11, format!("reading the disk after recovery failed with {error:?}"));
        return;
    }
    guest.set_error_policy(ErrorPolicy { reads: Invariant::G1, ..policy });
    if fills {
        fill(&guest, setup.size_sectors).await;
    }
    if let Err(error) = probe(&guest, setup.size_sectors).await {
        world.fail(Invariant::G11, format!("reading what was written after recovery failed with {error:?}"));
    }
    check_reads(world, setup, &*stack.node(), limits).await;
    check_fast_zeros(world, &guest, setup.size_sectors).await;
    if world.storage.is_device(&setup.spec.path) {
        check_discards(world, &guest, setup.size_sectors).await;
    }
    match stack.disk.close().await {
        Ok(()) => cut_after_close(world, [setup.spec.path.as_str()]),
        Err(error) => world.fail(Invariant::G11, format!("closing after recovery failed with {error:?}")),
    }
    if guest.disk().buffers_out() > 0 {
        world.fail(
            Invariant::K1,
            format!("{} bytes of buffers were not released", guest.disk().buffers_out()),
        );
    }
    check_at_rest(world, host.process.node()).await;
    setup.check(world, "after recovery").await;
}

/// Writes the whole disk, so that every cluster is mapped.
async fn fill(guest: &Guest<DirectDisk>, size_sectors: u64) {
    let step = u64::from(FILL_SECTORS);
    let range = |at: u64| SectorRange::new(at, (size_sectors - at).min(step) as u32);
    let starts = (0..size_sectors).step_by(step as usize);
    let ops: Vec<Option<Op>> = starts.map(|at| Some(Op::new(IoKind::Write, range(at)))).collect();
    guest.run(&ops, 8).await;
    guest.one(Op::flush()).await;
}

/// Writes in many places, which reveals what recovery got wrong about free space.
async fn probe(guest: &Guest<DirectDisk>, size_sectors: u64) -> Result<(), Errno> {
    let step = size_sectors / 61;
    let write = |i: u64| Op::new(IoKind::Write, SectorRange::new(i * step, 1 + (i % 9) as u32));
    let ops: Vec<Option<Op>> = (0..60).map(|i| Some(write(i))).collect();
    guest.run(&ops, 8).await;
    guest.one(Op::flush()).await;
    guest.read_all().await
}

/// Makes most of the disk zeros if that is fast, which must not write them.
async fn check_fast_zeros(world: &World, guest: &Guest<DirectDisk>, size_sectors: u64) {
    let max = SectorRange::new(8, size_sectors as u32 - 16);
    let write = guest.history.borrow_mut().begin_zeros(max);
    let before = world.storage.counts().written_bytes;
    let result = guest.disk().write_zeroes(max, ZeroFlags { unmap: true, fast: true }).await;
    guest.history.borrow_mut().end_write(write, result.is_ok());
    let written = world.storage.counts().written_bytes - before;
    match result {
        Ok(()) if written > 0 => {
            world.fail(Invariant::M4, format!("fast zeros to {max} wrote {written} bytes"));
        }
        Ok(()) | Err(Errno::EOPNOTSUPP) => {}
        Err(error) => world.fail(Invariant::E4, format!("fast zeros to {max} failed with {error:?}")),
    }
    if guest.read_all().await.is_err() {
        world.fail(Invariant::G11, "reading zeroed sectors failed");
    }
}

/// Maximum number of bytes that all discards of a disk write together while it is open.
const DISCARDS_WRITE: u64 = 64 << 10;

/// Discards nearly all of the disk, twice: what cannot be released is left as it is, instead of being overwritten with
/// zeros, and earlier data is not lost.
async fn check_discards(world: &World, guest: &Guest<DirectDisk>, size_sectors: u64) {
    let max = SectorRange::new(1, size_sectors as u32 - 2);
    let mut written = 0;
    for _ in 0..2 {
        guest.one(Op::new(IoKind::Write, SectorRange::new(3, 20))).await;
        let before = world.storage.counts();
        guest.one(Op::new(IoKind::Discard, max)).await;
        let after = world.storage.counts();
        written += after.written_bytes - before.written_bytes;
        if written > DISCARDS_WRITE {
            world.fail(Invariant::M4, format!("discards of {max} wrote {written} bytes"));
        }
        let refused = after.refused_zeros - before.refused_zeros;
        if refused > 1 {
            let text = format!("a discard of {max} asked a device {refused} times for what it had refused");
            world.fail(Invariant::M4, text);
        }
        if guest.read(SectorRange::new(0, 48)).await.is_err() {
            world.fail(Invariant::G11, "reading discarded sectors failed");
        }
    }
}

/// Clusters that crashes may cost besides. A direct file ends with a whole block: a process that opens it next appends
/// after that, because the content of the block is unknown.
pub(super) fn lost_tails(world: &World, setup: &Setup, limits: &StackLimits) -> u64 {
    let tail = if limits.direct { u64::from(world.storage.direct_align_bytes()) } else { 0 };
    world.stats().crashes * (tail >> setup.cluster_bits).saturating_sub(1)
}

/// A crash may lose the clusters of writes that were not flushed, an error or a repetition those of its request;
/// nothing else may lose any.
pub(super) fn check_leaks(world: &World, setup: &Setup, leaked_before: u64, max_sectors: u32) {
    let leaked = setup.leaked(world);
    let stats = world.stats();
    let content = setup.content(world);
    // Space where the medium failed is not reused, even if the request succeeded elsewhere. Space released by a
    // repeated request, as a whole or in parts, is known only to the process; a crash loses it.
    let repeated = marked(&world.kernel, "request-retried") + marked(&world.kernel, "merged-split");
    let errors = stats.errors + world.storage.counts().failed;
    let bound = leaked_before
        + stats.lost_clusters
        + (errors + repeated) * lost_to_error(setup.model(), &content, max_sectors);
    if leaked > bound && !is_broken(Oracle::LeaksIgnored) {
        let after = format!("{} crashes, {errors} errors and {repeated} repeated requests", stats.crashes);
        let text = format!("{leaked} clusters are lost after {after}");
        world.fail(Invariant::G13, format!("{text}, at most {bound} are allowed"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::broken_by;

    const DISK_BYTES: u64 = 1 << 20;

    /// What the last epoch reports of an image after `damage`.
    fn reported(damage: impl FnOnce(&mut kernel_model::Content) + 'static) -> Option<Invariant> {
        broken_by(|world| async move {
            let limits = StackLimits::draw(&world);
            let setup = Setup::mapped(&world, 0, DISK_BYTES, false);
            let mut content = world.storage.content(&setup.spec.path).unwrap();
            damage(&mut content);
            let before = setup.leaked(&world);
            world.storage.put(&setup.spec.path, content);
            last_epoch(&world, &setup, &limits, false, false).await;
            check_leaks(&world, &setup, before, 88);
        })
    }

    #[test]
    fn an_image_must_open_and_lose_little() {
        assert_eq!(reported(|_| {}), None);
        assert_eq!(reported(|c| c.pages.write(0, b"garbage!")), Some(Invariant::G11));
        assert_eq!(reported(|c| c.size += 3 << 20), Some(Invariant::G13), "768 clusters without owner");
    }
}
