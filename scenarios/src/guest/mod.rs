//! Guests: what they do to a disk, and the history that they keep of it.

mod block;
mod direct;
mod greeting;
mod hostile;
mod lying;
mod nbd;
mod offer;
mod options;
mod reporting;
mod ring;
mod speaker;
mod turns;

pub use block::BlockDisk;
pub use direct::DirectDisk;
pub use greeting::{NBD_GREETING, describe_greeting, draw_greeting, greet, is_wrong};
pub use hostile::{
    FLOOD, HONEST_SECTORS, Hostile, KEYS, SCRIBBLE, TOGETHER, TRICK, describe_keys, describe_trick,
};
pub use lying::{LyingServer, NBD_HANG_UP, NBD_LIE, NBD_REFUSE, NBD_SHAPE, ServerMode, describe_nbd_lie};
pub use nbd::{NBD_TRICK, NbdScript, RawNbd, Spread, describe_nbd_trick};
pub use offer::{NBD_LESS, Offer};
pub use options::NBD_OPTION;
pub use ring::RingDisk;
pub use speaker::{Answer, NBD_STEP, Speaker, Step, steps};

use crate::check::oracle::{Oracle, is_broken};
use crate::check::{BlockHistory, Invariant, Space, SpaceEffect};
use crate::workload::Op;
use crate::world::World;
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::task::Poll;
use tap_core::{Node, ZeroFlags};
use tap_host::{Errno, IoKind, OneWaiter, SECTOR_BYTES, SectorRange};

/// A disk as a guest sees it, whatever serves it.
pub trait GuestDisk: Clone + 'static {
    /// Reads `range` and passes the bytes to `look`.
    fn read<R>(
        &self,
        range: SectorRange,
        look: impl FnOnce(&[u8]) -> R,
    ) -> impl Future<Output = Result<R, Errno>>;
    /// Writes what `fill` puts into the bytes of `range`.
    fn write(
        &self,
        range: SectorRange,
        fill: impl FnOnce(&mut [u8]),
    ) -> impl Future<Output = Result<(), Errno>>;
    /// Writes what `fill` puts into the bytes of `range`. The answer makes it durable, with everything answered before.
    fn write_and_flush(
        &self,
        range: SectorRange,
        fill: impl FnOnce(&mut [u8]),
    ) -> impl Future<Output = Result<(), Errno>> {
        let _ = (range, fill);
        async { Err(Errno::EOPNOTSUPP) }
    }
    /// Flushes.
    fn flush(&self) -> impl Future<Output = Result<(), Errno>>;
    /// Writes zeros to `range`.
    fn write_zeroes(&self, range: SectorRange, flags: ZeroFlags) -> impl Future<Output = Result<(), Errno>> {
        let _ = (range, flags);
        async { Err(Errno::EOPNOTSUPP) }
    }
    /// Discards `range`.
    fn discard(&self, range: SectorRange) -> impl Future<Output = Result<(), Errno>> {
        let _ = range;
        async { Err(Errno::EOPNOTSUPP) }
    }
    /// Whether the disk supports zeros: only those that must be fast may then be refused as slow.
    fn makes_zeros(&self) -> bool {
        false
    }
    /// Pauses submission for a while, for disks where the back end notices idle guests.
    fn idle(&self) -> impl Future<Output = ()> {
        std::future::ready(())
    }
    /// Maximum number of sectors of one request.
    fn max_sectors(&self) -> u32;
}

/// How a guest handles errors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ErrorPolicy {
    /// How often it repeats a failed request.
    pub retries: u32,
    /// Whether requests may fail; if not, an error breaks E4.
    pub errors_allowed: bool,
    /// The invariant that a wrong read breaks.
    pub reads: Invariant,
}

/// Maximum number of sectors of a write that replaces zeros which the disk does not support, and of a read that checks
/// them.
const PART_SECTORS: u64 = 88;

/// A guest and its record of what it did; clones are the same guest.
pub struct Guest<D> {
    /// The history of the disk.
    pub history: Rc<RefCell<BlockHistory>>,
    own: Rc<Own<D>>,
}

/// What belongs to the guest alone.
struct Own<D> {
    world: World,
    name: String,
    disk: D,
    policy: Cell<ErrorPolicy>,
    flush_failed: Cell<bool>,
    write_through: Cell<bool>,
    retired: Cell<bool>,
    /// Promises about space, if they are checked.
    space: RefCell<Option<Space>>,
}

impl<D> Clone for Guest<D> {
    fn clone(&self) -> Self {
        Self { history: Rc::clone(&self.history), own: Rc::clone(&self.own) }
    }
}

impl<D: GuestDisk> Guest<D> {
    /// A guest on `disk` that continues `history`.
    pub fn new(world: &World, disk: D, history: Rc<RefCell<BlockHistory>>, policy: ErrorPolicy) -> Self {
        let name = format!("guest {}", history.borrow().writer());
        history.borrow_mut().allow_failures(policy.errors_allowed);
        let own = Own {
            world: world.clone(),
            name,
            disk,
            policy: Cell::new(policy),
            flush_failed: Cell::new(false),
            write_through: Cell::new(false),
            retired: Cell::new(false),
            space: RefCell::default(),
        };
        Self { history, own: Rc::new(own) }
    }

    /// The disk.
    pub fn disk(&self) -> &D {
        &self.own.disk
    }

    /// Changes how errors are handled.
    pub fn set_error_policy(&self, policy: ErrorPolicy) {
        self.history.borrow_mut().allow_failures(policy.errors_allowed);
        self.own.policy.set(policy);
    }

    /// From now on an answered write is durable.
    pub fn write_through(&self) {
        self.own.write_through.set(true);
    }

    /// Its kernel has ended: requests in flight may or may not have taken effect, and no new ones begin.
    pub fn retire(&self) {
        self.own.retired.set(true);
        self.history.borrow_mut().guest_died();
    }

    /// From now on promises about space are checked, and only a lack of space may fail a request.
    pub fn watch_space(&self) {
        *self.own.space.borrow_mut() = Some(Space::new(self.history.borrow().size_sectors()));
    }

    /// Whether all space of `range` was released, as far as the guest knows.
    pub fn gave_back(&self, range: SectorRange) -> bool {
        self.own.space.borrow_mut().as_mut().is_some_and(|space| space.is_released(range))
    }

    /// A request that affects space begins. Returns its time, and whether it needs no space.
    fn begin_space(&self, effect: SpaceEffect, range: SectorRange) -> Option<(u64, bool)> {
        let mut space = self.own.space.borrow_mut();
        let space = space.as_mut()?;
        let secured = space.is_secured(range);
        Some((space.begin(effect, range), secured))
    }

    /// The request has ended.
    fn end_space(
        &self,
        effect: SpaceEffect,
        is_write: bool,
        range: SectorRange,
        began: Option<(u64, bool)>,
        result: Result<(), Errno>,
    ) {
        let mut space = self.own.space.borrow_mut();
        let (Some(space), Some((began, secured))) = (space.as_mut(), began) else { return };
        let short = is_write && secured && result == Err(Errno::ENOSPC) && space.is_secured(range);
        space.end(effect, is_write, range, began, result.is_ok());
        if short {
            let text = format!("a write to {range}, whose space was promised, failed with ENOSPC");
            self.own.world.fail(Invariant::S1, text);
        }
    }

    /// Marks everything answered as durable if the disk is in write-through mode.
    fn settle(&self, result: Result<(), Errno>) {
        if self.own.write_through.get() && result.is_ok() {
            let mut history = self.history.borrow_mut();
            let inv = history.begin_flush();
            history.end_flush(inv);
        }
    }

    /// Whether a flush has failed.
    pub fn flush_failed(&self) -> bool {
        self.own.flush_failed.get()
    }

    /// Runs all operations, `depth` at a time, each as a separate task, so that leaving one out changes no other.
    pub async fn run(&self, ops: &[Option<Op>], depth: usize) {
        let gate = Gate::default();
        let idles = self.own.world.setting("guest-idles", &[false, false, false, true]);
        for (i, op) in ops.iter().enumerate() {
            let Some(op) = *op else { continue };
            gate.below(depth.max(1)).await;
            gate.enter();
            let (guest, gate) = (self.clone(), gate.clone());
            self.own.world.sim.spawn_once("op", i as u64, async move {
                if idles && i % 2 == 1 {
                    guest.own.disk.idle().await;
                }
                guest.one(op).await;
                gate.leave();
            });
        }
        gate.below(1).await;
    }

    /// Runs one operation until it is answered, repetitions included.
    pub async fn one(&self, op: Op) {
        let mut left = self.own.policy.get().retries;
        loop {
            if self.own.retired.get() {
                return std::future::pending().await;
            }
            let result = match op.kind {
                IoKind::Read => self.read(op.range).await,
                IoKind::Write if op.flushes => self.write_and_flush(op.range).await,
                IoKind::Write => self.write(op.range).await,
                IoKind::Flush => self.flush().await,
                IoKind::WriteZeroes => self.zeroes(op.range, op.zeroes).await,
                IoKind::Discard => self.discard(op.range).await,
            };
            self.own.world.count(|s| s.requests += 1);
            let Err(error) = result else { return };
            self.own.world.count(|s| s.errors += 1);
            // Once data is lost in unknown places, flushes fail, and so do writes that need one.
            let allowed = self.own.policy.get().errors_allowed || self.own.world.kernel.answers_lost();
            if !allowed && !is_broken(Oracle::ErrorsIgnored) {
                self.own
                    .world
                    .fail(Invariant::E4, format!("{op} failed with {error:?} although nothing below it did"));
                return;
            }
            let changes = !matches!(op.kind, IoKind::Read | IoKind::Flush);
            if changes && self.own.world.setting("looks-after-failure", &[false, true]) {
                // What a failed request left is old or new at once, not only after the next successful one.
                for part in parts(op.range) {
                    let _ = self.read(part).await;
                }
            }
            if left == 0 {
                return;
            }
            left -= 1;
            self.own.world.sim.sleep_ns(50_000).await;
        }
    }

    /// Adds a line to the trace.
    #[inline]
    fn remark(&self, text: impl FnOnce() -> String) {
        self.own.world.sim.remark(&self.own.name, text);
    }

    /// Reads once, and checks the result.
    pub async fn read(&self, range: SectorRange) -> Result<(), Errno> {
        let inv = self.history.borrow_mut().begin_read();
        self.remark(|| format!("submits read {range}"));
        let span = self.submits("read", inv, range);
        let check = |bytes: &[u8]| {
            let mut history = self.history.borrow_mut();
            if self.own.world.kernel.answers_lost() {
                // Writes that need a flush may have failed, concurrent ones included.
                history.allow_failures(true);
            }
            history.check_read(inv, range, bytes)
        };
        let checked = self.own.disk.read(range, check).await;
        self.answered(span, checked.as_ref().map_or_else(|error| Err(*error), |_| Ok(())));
        match checked {
            Ok(Ok(())) => {
                self.remark(|| format!("read {range} ok"));
                Ok(())
            }
            Ok(Err(wrong)) => {
                self.wrong(wrong.invariant(self.own.policy.get().reads), &format!("read {range}"), &wrong);
                Ok(())
            }
            Err(error) => {
                self.history.borrow_mut().end_read(inv);
                self.remark(|| format!("read {range} {}", ended(Err(error))));
                Err(error)
            }
        }
    }

    fn payload(&self, write: u64, range: SectorRange, bytes: &mut [u8]) {
        let history = self.history.borrow();
        for (i, sector) in bytes.chunks_exact_mut(SECTOR_BYTES as usize).enumerate() {
            history.payload(write, range.start.0 + i as u64, sector);
        }
    }

    /// Writes once.
    pub async fn write(&self, range: SectorRange) -> Result<(), Errno> {
        let write = self.history.borrow_mut().begin_write(range);
        self.remark(|| format!("submits write {write} to {range}"));
        let span = self.submits("write", write, range);
        let space = self.begin_space(SpaceEffect::Keep, range);
        let fill = |bytes: &mut [u8]| self.payload(write, range, bytes);
        let result = self.own.disk.write(range, fill).await;
        self.end_space(SpaceEffect::Keep, true, range, space, result);
        self.history.borrow_mut().end_write(write, result.is_ok());
        self.settle(result);
        self.remark(|| format!("write {write} to {range} {}", ended(result)));
        self.answered(span, result);
        result
    }

    /// Writes once with a flush.
    async fn write_and_flush(&self, range: SectorRange) -> Result<(), Errno> {
        let (flush, write) = {
            let mut history = self.history.borrow_mut();
            let (flush, write) = (history.begin_flush(), history.begin_write(range));
            history.fence(write, range, flush);
            (flush, write)
        };
        self.remark(|| format!("submits flush {flush} with write {write} to {range}"));
        let span = self.submits("write", write, range);
        let fill = |bytes: &mut [u8]| self.payload(write, range, bytes);
        let result = self.own.disk.write_and_flush(range, fill).await;
        self.remark(|| format!("flush {flush} with write {write} to {range} {}", ended(result)));
        self.answered(span, result);
        let mut history = self.history.borrow_mut();
        history.end_write(write, result.is_ok());
        match result {
            Ok(()) => {
                history.end_flush(flush);
                history.harden(write, range);
            }
            Err(_) => self.own.flush_failed.set(true),
        }
        result
    }

    /// Makes zeros, or writes them as a guest does if the disk does not support zeros.
    async fn zeroes(&self, range: SectorRange, flags: ZeroFlags) -> Result<(), Errno> {
        let write = self.history.borrow_mut().begin_zeros(range);
        self.remark(|| format!("submits zeros {write} to {range}"));
        let span = self.submits("zeros", write, range);
        let effect = if flags.unmap { SpaceEffect::Unmap } else { SpaceEffect::Keep };
        let space = self.begin_space(effect, range);
        let result = self.own.disk.write_zeroes(range, flags).await;
        self.end_space(effect, false, range, space, result);
        self.history.borrow_mut().end_write(write, result.is_ok());
        self.settle(result);
        self.remark(|| format!("zeros {write} to {range} {}", ended(result)));
        self.answered(span, result);
        let slow = result == Err(Errno::EOPNOTSUPP);
        if slow && !flags.fast && self.own.disk.makes_zeros() && !self.own.policy.get().errors_allowed {
            self.own
                .world
                .fail(Invariant::E4, format!("zeros to {range} were refused as slow, but need not be fast"));
        }
        if result == Err(Errno::EOPNOTSUPP) { self.write_parts(range).await } else { result }
    }

    /// Writes zeros to a range that may exceed one request.
    async fn write_parts(&self, range: SectorRange) -> Result<(), Errno> {
        for part in parts(range) {
            self.write(part).await?;
        }
        Ok(())
    }

    /// Discards once; the answer promises nothing.
    async fn discard(&self, range: SectorRange) -> Result<(), Errno> {
        let write = self.history.borrow_mut().begin_discard(range);
        self.remark(|| format!("submits discard {write} of {range}"));
        let span = self.submits("discard", write, range);
        let space = self.begin_space(SpaceEffect::Discard, range);
        let result = self.own.disk.discard(range).await;
        self.end_space(SpaceEffect::Discard, false, range, space, result);
        self.history.borrow_mut().end_write(write, false);
        self.remark(|| format!("discard {write} of {range} {}", ended(result)));
        self.answered(span, result);
        if result == Err(Errno::EOPNOTSUPP) { Ok(()) } else { result }
    }

    /// Flushes once.
    pub async fn flush(&self) -> Result<(), Errno> {
        let inv = self.history.borrow_mut().begin_flush();
        self.remark(|| format!("submits flush {inv}"));
        let span = self.submits("flush", inv, SectorRange::default());
        let result = self.own.disk.flush().await;
        self.remark(|| format!("flush {inv} {}", ended(result)));
        self.answered(span, result);
        match result {
            Ok(()) => self.history.borrow_mut().end_flush(inv),
            Err(_) => self.own.flush_failed.set(true),
        }
        result
    }

    /// Queries up to `max` extents of `range` from `node`, which is the disk. Checks those called zeros as a read of
    /// zeros.
    ///
    /// # Errors
    /// Those of the node.
    pub async fn extents(&self, node: &dyn Node, range: SectorRange, max: usize) -> Result<(), Errno> {
        let inv = self.history.borrow_mut().begin_read();
        let found = node.extents(range, max).await;
        self.remark(|| format!("extents of {range}: {:?}", found.as_ref().map(Vec::len)));
        let mut history = self.history.borrow_mut();
        history.end_read(inv);
        let (mut at, end) = (range.start.0, range.start.0 + u64::from(range.count));
        for extent in found? {
            if extent.count == 0 || extent.count > end - at {
                let text = format!("extents of {range}: {} sectors from {at} on", extent.count);
                self.own.world.fail(Invariant::N2, text);
                return Ok(());
            }
            let part = SectorRange::new(at, extent.count as u32);
            let zeros = vec![0; if extent.zero { part.len_bytes() as usize } else { 0 }];
            if let Some(Err(wrong)) = extent.zero.then(|| history.check_read(inv, part, &zeros)) {
                self.wrong(Invariant::N2, &format!("{part} is reported as zeros"), &wrong);
            }
            at += extent.count;
        }
        if at == range.start.0 {
            self.own.world.fail(Invariant::N2, format!("no extents of {range} were returned"));
        }
        Ok(())
    }

    /// Waits for `ns` nanoseconds.
    pub async fn pause(&self, ns: u64) {
        self.own.world.sim.sleep_ns(ns).await;
    }

    /// Reads the whole disk in large pieces.
    pub async fn read_all(&self) -> Result<(), Errno> {
        let size = self.history.borrow().size_sectors();
        let step = u64::from(self.own.disk.max_sectors());
        // Read these first: what they hold decides what other sectors must hold.
        let fenced = self.history.borrow().fenced();
        for range in fenced {
            self.read(range).await?;
        }
        let mut at = 0;
        while at < size && !self.own.world.verdict.is_broken() {
            let n = step.min(size - at);
            self.read(SectorRange::new(at, n as u32)).await?;
            self.own.world.count(|s| s.requests += 1);
            at += n;
        }
        Ok(())
    }
}

/// Splits a range of zeros, which may be longer than a read or a write.
fn parts(range: SectorRange) -> impl Iterator<Item = SectorRange> {
    let (start, end) = (range.start.0, range.start.0 + u64::from(range.count));
    let part = move |at: u64| SectorRange::new(at, (end - at).min(PART_SECTORS) as u32);
    (start..end).step_by(PART_SECTORS as usize).map(part)
}

/// The result of a request in words.
fn ended(result: Result<(), Errno>) -> String {
    result.map_or_else(|error| format!("failed with {error:?}"), |()| "ok".into())
}

/// Counts entries, and lets one task wait until there are few.
#[derive(Clone, Default)]
pub struct Gate(Rc<GateState>);

#[derive(Default)]
struct GateState {
    inside: Cell<usize>,
    limit: Cell<usize>,
    waiter: OneWaiter,
}

impl Gate {
    /// Enters.
    pub fn enter(&self) {
        self.0.inside.set(self.0.inside.get() + 1);
    }
    /// Leaves.
    pub fn leave(&self) {
        self.0.inside.set(self.0.inside.get() - 1);
        if self.0.inside.get() < self.0.limit.get() {
            self.0.waiter.wake();
        }
    }
    /// Completes when fewer than `n` are inside. Only one task at a time may wait.
    pub async fn below(&self, n: usize) {
        poll_fn(|cx| {
            if self.0.inside.get() < n {
                return Poll::Ready(());
            }
            self.0.limit.set(n);
            self.0.waiter.wait(cx.waker());
            Poll::Pending
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Initial;
    use crate::world::broken_by;
    use tap_core::{LocalBoxFuture, NodeInfo, Request, Response};

    /// Answers every request with one result, and reads with zeros.
    struct Answers(Result<(), Errno>);

    impl Node for Answers {
        fn info(&self) -> NodeInfo {
            NodeInfo::new(64, false)
        }
        fn submit(&self, mut request: Request) -> LocalBoxFuture<Response> {
            request.bufs.iter_mut().for_each(|buf| buf.fill(0));
            let response = Response { result: self.0, bufs: request.bufs };
            Box::pin(async move { response })
        }
        fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
            Box::pin(async { Ok(()) })
        }
    }

    fn reported(result: Result<(), Errno>, reads: Invariant) -> Option<Invariant> {
        broken_by(move |world| async move {
            let history = BlockHistory::new(64, 1, Initial::Zero, false);
            let policy = ErrorPolicy { retries: 0, errors_allowed: false, reads };
            let disk = DirectDisk::new(Rc::new(Answers(result)), 1 << 20);
            let guest = Guest::new(&world, disk, Rc::new(RefCell::new(history)), policy);
            let range = SectorRange::new(3, 2);
            guest.one(Op::new(IoKind::Read, range)).await;
            guest.one(Op::new(IoKind::Write, range)).await;
            guest.one(Op::new(IoKind::Read, range)).await;
        })
    }

    #[test]
    fn unexplained_errors_and_lost_writes_are_reported() {
        assert_eq!(reported(Err(Errno::EIO), Invariant::G1), Some(Invariant::E4));
        assert_eq!(reported(Ok(()), Invariant::H2), Some(Invariant::H2), "the neighbour of a hostile guest");
        assert_eq!(reported(Ok(()), Invariant::G1), Some(Invariant::G1));
    }
}
