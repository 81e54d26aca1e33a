//! The life of a disk under load: paused, resumed and closed while requests run, some of which are cancelled.

use super::failures::{Armed, arm_outage, passing_storage};
use super::recovered::last_epoch;
use super::setup::{Setup, workload};
use crate::check::Invariant;
use crate::formats::Kind;
use crate::guest::{DirectDisk, ErrorPolicy, Guest, GuestDisk};
use crate::limits::StackLimits;
use crate::scenario::Scenario;
use crate::stack::Stack;
use crate::workload::{Workload, operations};
use crate::world::World;
use kernel_model::SimHost;
use sim::{Draw, Entity, Label};
use std::cell::Cell;
use std::future::{Future, pending, poll_fn};
use std::rc::Rc;
use std::task::Poll;
use tap_core::wait::{Event as Flag, joined};
use tap_core::{Extent, Node, ZeroFlags};
use tap_host::{Errno, SectorRange, Tasks, Time, poll_once, select, unless};

/// Pauses, closes and cancelled requests.
pub static DISK_LIFE: Scenario = Scenario {
    name: "disk-life",
    about: "a disk is paused, resumed and closed under load, and requests are cancelled in progress; power cut at the close",
    storage: &passing_storage,
    body: &|w| Box::pin(disk_life(w)),
};

/// When a request is cancelled: 0 for never.
pub static GIVE_UP: Label = Label::new("give-up", "request {n} is cancelled after {} ns");
/// A pause: the delay before it and its duration, in 24 bits of nanoseconds each, and whether nothing waits for it.
pub static PAUSE: Label =
    Label::packed("pause", "pause {n}: after so many ns, for so many, unwatched ({})", &[24, 24, 1]);
/// An extents query: the delay before it in 24 bits of nanoseconds, and its first sector.
pub static LOOK: Label =
    Label::packed("look", "extents query {n}: after so many ns, from sector so ({})", &[24, 40]);
/// When the disk is closed.
pub static CLOSE_AFTER: Label = Label::new("close-after", "the disk is closed after {} ns");

const DISK_BYTES: u64 = 1 << 20;
/// Longer than any cancelled request takes.
const REST_NS: u64 = 60_000_000_000;

/// State that the guest and the closing task share.
struct Life {
    world: World,
    entity: Entity,
    requests: Cell<u32>,
    /// One request in so many is cancelled.
    one_in: u64,
    closing: Cell<bool>,
    /// Only the controller submits requests.
    paused: Cell<bool>,
    /// The guest has all its answers.
    done: Flag,
}

/// A disk of a guest that cancels requests.
#[derive(Clone)]
struct ImpatientDisk {
    disk: DirectDisk,
    life: Rc<Life>,
}

impl ImpatientDisk {
    /// Runs a request, or cancels it. Only a disk that is closing may refuse one.
    async fn run_or_cancel<T>(&self, request: impl Future<Output = Result<T, Errno>>) -> Result<T, Errno> {
        let life = &self.life;
        let number = life.requests.replace(life.requests.get() + 1);
        let draw = |d: &mut Draw| if d.below(life.one_in) == 0 { 1 + d.magnitude(22) } else { 0 };
        let after_ns = life.world.sim.decide(life.entity, &GIVE_UP, number, draw);
        let late = life.closing.get();
        let enough =
            async { if after_ns > 0 { life.world.sim.sleep_ns(after_ns).await } else { pending().await } };
        match unless(enough, request).await {
            None => Err(Errno::EINTR),
            Some(Ok(_)) if late => {
                life.world.fail(Invariant::D1, "a closing disk has accepted a request");
                Err(Errno::EIO)
            }
            // Zeros that cannot be made fast.
            Some(Err(Errno::EOPNOTSUPP)) => Err(Errno::EOPNOTSUPP),
            Some(Err(error)) if error != Errno::ESHUTDOWN || !life.closing.get() => {
                life.world.fail(Invariant::E4, format!("request {number} failed with {error:?}"));
                Err(error)
            }
            Some(result) => result,
        }
    }
}

impl GuestDisk for ImpatientDisk {
    async fn read<R>(&self, range: SectorRange, look: impl FnOnce(&[u8]) -> R) -> Result<R, Errno> {
        self.run_or_cancel(self.disk.read(range, look)).await
    }
    async fn write(&self, range: SectorRange, fill: impl FnOnce(&mut [u8])) -> Result<(), Errno> {
        self.run_or_cancel(self.disk.write(range, fill)).await
    }
    async fn flush(&self) -> Result<(), Errno> {
        self.run_or_cancel(self.disk.flush()).await
    }
    async fn write_zeroes(&self, range: SectorRange, flags: ZeroFlags) -> Result<(), Errno> {
        self.run_or_cancel(self.disk.write_zeroes(range, flags)).await
    }
    async fn discard(&self, range: SectorRange) -> Result<(), Errno> {
        self.run_or_cancel(self.disk.discard(range)).await
    }
    fn makes_zeros(&self) -> bool {
        true
    }
    fn max_sectors(&self) -> u32 {
        self.disk.max_sectors()
    }
}

async fn disk_life(world: World) {
    let limits = StackLimits::draw(&world);
    let setup = Setup::new(&world, world.setting("image", &Kind::all()), 0, DISK_BYTES);
    let host = SimHost::start(&world.kernel, &world.xen, "tapdisk", 0);
    let node = host.process.node().clone();
    let (w, s, h) = (world.clone(), setup.clone(), host.clone());
    let (task, finished) = joined(async move {
        live(&w, &s, &h, &limits).await;
    });
    node.spawn("main", 0, task);
    select(node.dead(), finished).await;
    setup.cut_power(&world, &[&node]).await;
    setup.check(&world, "after the power cut").await;
    if world.verdict.is_broken() {
        return;
    }
    world.sim.stop_faults();
    last_epoch(&world, &setup, &limits, false, false).await;
}

/// Opens the disk, closes it, and waits for the last request after that.
async fn live(world: &World, setup: &Setup, host: &SimHost, limits: &StackLimits) {
    arm_outage(world, Armed::Opening);
    let stack = match Stack::open(host, world, &setup.spec, limits).await {
        Ok(stack) => Rc::new(stack),
        Err(error) => return world.fail(Invariant::G11, format!("failed to open the image: {error}")),
    };
    arm_outage(world, Armed::Open);
    let entity = Entity::WORLD.child("life", 0);
    world.sim.name_entity(entity, || "the disk".into());
    let life = Rc::new(Life {
        world: world.clone(),
        entity,
        requests: Cell::new(0),
        one_in: [8, 2, 4][world.mood("give-up-one-in", 3) as usize],
        closing: Cell::new(false),
        paused: Cell::new(false),
        done: Flag::new(),
    });
    let disk = ImpatientDisk {
        disk: DirectDisk::new(stack.node(), limits.pool_bytes).in_pieces(limits.piece_sectors),
        life: Rc::clone(&life),
    };
    let policy = ErrorPolicy { retries: 0, errors_allowed: true, reads: Invariant::G1 };
    let guest = Guest::new(world, disk, Rc::clone(&setup.history), policy);
    let shape = Workload { zeroes: true, ..workload(world, setup.size_sectors, 120, 88) };
    let who = Entity::WORLD.child("guest", 0);
    world.sim.name_entity(who, || "guest 1".into());
    let ops = operations(&world.sim, who, 0, &shape);
    let (s, g, l, images) = (Rc::clone(&stack), guest.clone(), Rc::clone(&life), setup.clone());
    let (task, close) = joined(async move {
        pauses(&l, &s).await;
        close_under_load(&l, &s, &g, &images).await;
    });
    host.spawn("controller", 0, task);
    let (l, top, size_sectors) = (Rc::clone(&life), stack.node(), setup.size_sectors);
    host.spawn("inspector", 0, async move { query_extents(&l, &*top, size_sectors).await });
    guest.run(&ops, limits.guest_depth).await;
    life.done.set();
    let _ = close.await;
    let late = guest.disk().disk.flush().await;
    if late != Err(Errno::ESHUTDOWN) {
        world.fail(Invariant::D1, format!("a flush of a closed disk was answered with {late:?}"));
    }
    // The storage completes what no task waits for any more.
    host.sleep_ns(world.setting("rest", &[REST_NS, 0])).await;
    let out = guest.disk().disk.buffers_out();
    if world.setting("rest", &[REST_NS, 0]) > 0 && out + stack.disk.slot().in_flight() > 0 {
        let text =
            format!("{out} bytes of buffers are out, {} requests in flight", stack.disk.slot().in_flight());
        world.fail(Invariant::K1, format!("{text}, long after the close"));
    }
}

/// Queries extents, as a program that copies the disk does. A query in progress counts as a request.
async fn query_extents(life: &Life, node: &dyn Node, size_sectors: u64) {
    let world = &life.world;
    for n in 0..world.setting("looks", &[200, 0]) {
        let value =
            world.sim.decide(life.entity, &LOOK, n, |d| d.magnitude(16) | d.below(size_sectors) << 24);
        world.sim.sleep_ns(value & 0xff_ffff).await;
        if life.closing.get() {
            return;
        }
        if life.paused.get() {
            continue;
        }
        let at = (value >> 24) % size_sectors;
        let range = SectorRange::new(at, (size_sectors - at) as u32);
        let query = node.extents(range, few(u64::from(n)));
        if n % 4 == 3 {
            // Dropped half way: it counts as in flight until it has ended below.
            poll_once(query).await;
            continue;
        }
        let result = query.await;
        let damaged =
            |found: Vec<Extent>| found.iter().find_map(|extent| extent.source.error()).map_or(Ok(()), Err);
        let result = result.and_then(damaged);
        let transient = matches!(result, Err(Errno::EAGAIN | Errno::EINTR));
        if let Err(error) = result
            && !transient
            && (error != Errno::ESHUTDOWN || !life.closing.get())
        {
            world.fail(Invariant::E4, format!("extents of {range} failed with {error:?}"));
        }
    }
}

/// Number of extents that query `n` asks for.
fn few(n: u64) -> usize {
    [64, 1, 3, 2][n as usize % 4]
}

/// Pauses and resumes the disk a few times.
async fn pauses(life: &Life, stack: &Stack) {
    let (world, slot) = (&life.world, stack.disk.slot());
    for n in 0..world.setting("pauses", &[2, 0, 5]) {
        let value = world.sim.decide(life.entity, &PAUSE, n, |d| {
            d.magnitude(23) | d.magnitude(23) << 24 | d.below(3).min(1) << 48
        });
        if value == 0 {
            continue;
        }
        world.sim.sleep_ns(value & 0xff_ffff).await;
        life.paused.set(true);
        if value >> 48 & 1 != 0 {
            // Polled once and dropped, so that nothing waits for it.
            poll_once(slot.pause()).await;
            world.sim.sleep_ns(value >> 24 & 0xff_ffff).await;
        } else if let Err(error) = slot.pause().await {
            world.fail(Invariant::D1, format!("pausing the disk failed with {error:?}"));
        } else {
            let before = world.storage.counts();
            world.sim.sleep_ns(value >> 24 & 0xff_ffff).await;
            let after = world.storage.counts();
            if slot.in_flight() > 0 || (before.reads, before.writes) != (after.reads, after.writes) {
                let text = format!("a paused disk has {} requests in flight", slot.in_flight());
                world.fail(Invariant::D1, format!("{text}; I/O continued from {before:?} to {after:?}"));
            }
        }
        life.paused.set(false);
        if let Err(error) = slot.resume() {
            world.fail(Invariant::D1, format!("resuming the disk failed with {error:?}"));
        }
        admit_all(world, stack).await;
        if slot.state() == "running" && slot.waiting() > 0 {
            world.fail(Invariant::D1, format!("{} requests wait for a disk that runs", slot.waiting()));
        }
    }
}

/// Lets every request that waits for the disk take its turn; each wakes the next. Unless turns are delayed this takes
/// less time than any I/O.
async fn admit_all(world: &World, stack: &Stack) {
    const ROUNDS: usize = 200;
    let (slot, none) = (stack.disk.slot(), world.sim.node("nothing", 0));
    for _ in 0..ROUNDS {
        if slot.waiting() == 0 {
            return;
        }
        if let Some(until_ns) = world.sim.put_back_until_ns(&none) {
            world.sim.sleep_ns(until_ns - world.sim.now_ns()).await;
        }
        world.sim.sleep_ns(1).await;
    }
}

/// Closes the disk while the guest runs. What was answered before is then durable.
async fn close_under_load(life: &Life, stack: &Stack, guest: &Guest<ImpatientDisk>, setup: &Setup) {
    let (world, slot) = (&life.world, stack.disk.slot());
    let after = world.sim.decide(life.entity, &CLOSE_AFTER, 0, |d| d.magnitude(24));
    if world.setting("close-when-done", &[false, true]) {
        // What a pause held back continues by itself.
        life.done.wait().await;
    }
    world.sim.sleep_ns(after).await;
    if world.setting("close-paused", &[false, true]) {
        poll_once(slot.pause()).await;
    }
    let inv = guest.history.borrow_mut().begin_flush();
    // Queries that have just begun.
    let mut queries: Vec<_> = (0..world.setting("looks-at-close", &[4, 0]))
        .map(|n| {
            let at = slot.info().size_sectors / 4 * n;
            slot.extents(SectorRange::new(at, (slot.info().size_sectors - at) as u32), few(n))
        })
        .collect();
    poll_fn(|cx| {
        queries.retain_mut(|query| query.as_mut().poll(cx).is_pending());
        Poll::Ready(())
    })
    .await;
    life.closing.set(true);
    if slot.in_flight() > 0 && world.setting("close-cancelled", &[false, true]) {
        // Dropped while it waits for requests in flight; the next one closes the disk.
        let mut close = slot.close();
        poll_fn(|cx| Poll::Ready(_ = close.as_mut().poll(cx))).await;
    }
    let mut closes: Vec<_> = (0..world.setting("closes", &[1, 2])).map(|_| slot.close()).collect();
    let mut results = Vec::new();
    poll_fn(|cx| {
        queries.retain_mut(|query| query.as_mut().poll(cx).is_pending());
        closes.retain_mut(|close| match close.as_mut().poll(cx) {
            Poll::Ready(result) => {
                results.push(result);
                false
            }
            Poll::Pending => true,
        });
        if closes.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    setup.check_closed(world);
    let result = results[0];
    if results.iter().any(|other| *other != result) {
        world.fail(Invariant::D1, format!("two concurrent closes ended with {results:?}"));
    }
    if !queries.is_empty() {
        world.fail(Invariant::D1, "a disk was closed before its extents queries had ended");
    }
    match result {
        Ok(()) => guest.history.borrow_mut().end_flush(inv),
        Err(error) => world.fail(Invariant::G11, format!("closing the disk failed with {error:?}")),
    }
    if slot.close().await != result {
        world.fail(Invariant::D1, "a second close returned another result");
    }
    if slot.pause().await != Err(Errno::ESHUTDOWN) || slot.resume() != Err(Errno::ESHUTDOWN) {
        world.fail(Invariant::D1, "a closed disk could be paused or resumed");
    }
}
