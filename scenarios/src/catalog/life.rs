//! The life of a disk under load: paused, resumed and closed while requests run, some of which are given up half way.

use super::crash::either;
use super::failures::passing_storage;
use super::recovered::last_epoch;
use super::setup::{Setup, workload};
use crate::check::Invariant;
use crate::formats::Kind;
use crate::guest::{DirectDisk, Guest, GuestDisk, Manners};
use crate::limits::StackLimits;
use crate::scenario::Scenario;
use crate::stack::Stack;
use crate::workload::{Workload, operations};
use crate::world::World;
use kernel_model::SimHost;
use sim::{Entity, Label};
use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use tap_core::wait::{Event as Flag, oneshot};
use tap_core::{Node, ZeroFlags};
use tap_host::{Errno, SectorRange, Tasks, Time};

/// Pauses, closes and requests that are given up.
pub static DISK_LIFE: Scenario = Scenario {
    name: "disk-life",
    about: "a disk is paused, resumed and closed under load, and requests are given up half way; power cut at the close",
    storage: &passing_storage,
    body: &|w| Box::pin(disk_life(w)),
};

/// When a request is given up: 0 never.
pub static GIVE_UP: Label = Label::new("give-up", "request {n} is given up after {} ns");
/// What is done to the disk: how long it is left alone before, in 24 bits, for how long it is paused, in 24 bits, and
/// whether nobody waits for the pause.
pub static PAUSE: Label =
    Label::packed("pause", "pause {n}: after so many ns, for so many, unwatched ({})", &[24, 24, 1]);
/// A look at extents: how long the one who looks is idle before, in 24 bits, and from which sector on.
pub static LOOK: Label = Label::packed("look", "look {n}: after so many ns, from sector so ({})", &[24, 40]);
/// When the disk is closed.
pub static CLOSE_AFTER: Label = Label::new("close-after", "the disk is closed after {} ns");

const DISK_BYTES: u64 = 1 << 20;
/// Longer than any request that was given up takes.
const REST_NS: u64 = 60_000_000_000;

/// What the guest and the one who closes know of each other.
struct Life {
    world: World,
    entity: Entity,
    requests: Cell<u32>,
    closing: Cell<bool>,
    /// Nobody but the controller asks for anything.
    paused: Cell<bool>,
    /// The guest has the answers to all that it wanted.
    done: Flag,
}

/// A disk of a guest that loses patience.
#[derive(Clone)]
struct Fickle {
    disk: DirectDisk,
    life: Rc<Life>,
}

impl Fickle {
    /// Runs a request, or gives it up. Only a disk that is being closed refuses any.
    async fn patiently<T>(&self, request: impl Future<Output = Result<T, Errno>>) -> Result<T, Errno> {
        let life = &self.life;
        let number = life.requests.replace(life.requests.get() + 1);
        let after_ns = life
            .world
            .sim
            .decide(life.entity, &GIVE_UP, number, |d| if d.below(8) == 0 { 1 + d.magnitude(22) } else { 0 });
        let late = life.closing.get();
        let mut sleep = (after_ns > 0).then(|| Box::pin(life.world.sim.sleep_ns(after_ns)));
        let mut request = pin!(request);
        let result = poll_fn(|cx| {
            if let Poll::Ready(result) = request.as_mut().poll(cx) {
                return Poll::Ready(Some(result));
            }
            match sleep.as_mut().map(|sleep| sleep.as_mut().poll(cx)) {
                Some(Poll::Ready(())) => Poll::Ready(None),
                _ => Poll::Pending,
            }
        })
        .await;
        match result {
            None => Err(Errno::EINTR),
            Some(Ok(_)) if late => {
                life.world.fail(Invariant::D1, "a disk that was being closed has taken a request");
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

impl GuestDisk for Fickle {
    async fn read<R>(&self, range: SectorRange, look: impl FnOnce(&[u8]) -> R) -> Result<R, Errno> {
        self.patiently(self.disk.read(range, look)).await
    }
    async fn write(&self, range: SectorRange, fill: impl FnOnce(&mut [u8])) -> Result<(), Errno> {
        self.patiently(self.disk.write(range, fill)).await
    }
    async fn flush(&self) -> Result<(), Errno> {
        self.patiently(self.disk.flush()).await
    }
    async fn write_zeroes(&self, range: SectorRange, flags: ZeroFlags) -> Result<(), Errno> {
        self.patiently(self.disk.write_zeroes(range, flags)).await
    }
    async fn discard(&self, range: SectorRange) -> Result<(), Errno> {
        self.patiently(self.disk.discard(range)).await
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
    let (done, finished) = oneshot();
    let (w, s, h) = (world.clone(), setup.clone(), host.clone());
    node.spawn("main", 0, async move {
        live(&w, &s, &h, &limits).await;
        let _ = done.send(());
    });
    either(node.dead(), finished).await;
    setup.cut_power(&world, &[&node]).await;
    setup.check(&world, "after the power cut").await;
    if world.verdict.is_broken() {
        return;
    }
    world.sim.stop_faults();
    last_epoch(&world, &setup, &limits, false, false).await;
}

/// From opening the disk to its close, and to the last request after it.
async fn live(world: &World, setup: &Setup, host: &SimHost, limits: &StackLimits) {
    let stack = match Stack::open(host, world, &setup.spec, limits).await {
        Ok(stack) => Rc::new(stack),
        Err(error) => return world.fail(Invariant::G11, format!("failed to open the image: {error}")),
    };
    let entity = Entity::WORLD.child("life", 0);
    world.sim.name_entity(entity, || "the disk".into());
    let life = Rc::new(Life {
        world: world.clone(),
        entity,
        requests: Cell::new(0),
        closing: Cell::new(false),
        paused: Cell::new(false),
        done: Flag::new(),
    });
    let disk = Fickle {
        disk: DirectDisk::new(stack.node(), limits.pool_bytes).in_pieces(limits.piece_sectors),
        life: Rc::clone(&life),
    };
    let manners = Manners { retries: 0, errors_allowed: true, reads: Invariant::G1 };
    let guest = Guest::new(world, disk, Rc::clone(&setup.history), manners);
    let shape = Workload { zeroes: true, ..workload(world, setup.size_sectors, 120, 88) };
    let who = Entity::WORLD.child("guest", 0);
    world.sim.name_entity(who, || "guest 1".into());
    let ops = operations(&world.sim, who, 0, &shape);
    let (closed, close) = oneshot();
    let (s, g, l, images) = (Rc::clone(&stack), guest.clone(), Rc::clone(&life), setup.clone());
    host.spawn("controller", 0, async move {
        pauses(&l, &s).await;
        close_under_load(&l, &s, &g, &images).await;
        let _ = closed.send(());
    });
    let (l, top, size_sectors) = (Rc::clone(&life), stack.node(), setup.size_sectors);
    host.spawn("inspector", 0, async move { looks(&l, &*top, size_sectors).await });
    guest.run(&ops, limits.guest_depth).await;
    life.done.set();
    let _ = close.await;
    let late = guest.disk().disk.flush().await;
    if late != Err(Errno::ESHUTDOWN) {
        world.fail(Invariant::D1, format!("a flush of a closed disk is answered with {late:?}"));
    }
    // The storage ends what nobody waits for any more.
    host.sleep_ns(world.setting("rest", &[REST_NS, 0])).await;
    let out = guest.disk().disk.buffers_out();
    if world.setting("rest", &[REST_NS, 0]) > 0 && out + stack.disk.slot().in_flight() > 0 {
        let text =
            format!("{out} bytes of buffers are out, {} requests in flight", stack.disk.slot().in_flight());
        world.fail(Invariant::K1, format!("{text}, long after the close"));
    }
}

/// Asks for extents, as a program that copies the disk does. A look that has begun counts as a request.
async fn looks(life: &Life, node: &dyn Node, size_sectors: u64) {
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
        let result = node.extents(range, few(u64::from(n))).await;
        let transient = matches!(result, Err(Errno::EAGAIN | Errno::EINTR));
        if let Err(error) = result
            && !transient
            && (error != Errno::ESHUTDOWN || !life.closing.get())
        {
            world.fail(Invariant::E4, format!("extents of {range} failed with {error:?}"));
        }
    }
}

/// How many extents look number `n` asks for.
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
            // One look, and nobody stays to wait.
            let mut pause = Box::pin(slot.pause());
            poll_fn(|cx| Poll::Ready(_ = pause.as_mut().poll(cx))).await;
            drop(pause);
            world.sim.sleep_ns(value >> 24 & 0xff_ffff).await;
        } else if let Err(error) = slot.pause().await {
            world.fail(Invariant::D1, format!("pausing the disk failed with {error:?}"));
        } else {
            let before = world.storage.counts();
            world.sim.sleep_ns(value >> 24 & 0xff_ffff).await;
            let after = world.storage.counts();
            if slot.in_flight() > 0 || (before.reads, before.writes) != (after.reads, after.writes) {
                let text = format!("a paused disk has {} requests in flight", slot.in_flight());
                world.fail(Invariant::D1, format!("{text}; I/O went on from {before:?} to {after:?}"));
            }
        }
        life.paused.set(false);
        if let Err(error) = slot.resume() {
            world.fail(Invariant::D1, format!("resuming the disk failed with {error:?}"));
        }
    }
}

/// Closes the disk while the guest goes on. What was answered before is durable then.
async fn close_under_load(life: &Life, stack: &Stack, guest: &Guest<Fickle>, setup: &Setup) {
    let (world, slot) = (&life.world, stack.disk.slot());
    let after = world.sim.decide(life.entity, &CLOSE_AFTER, 0, |d| d.magnitude(24));
    if world.setting("close-when-done", &[false, true]) {
        // What a pause held back goes on by itself.
        life.done.wait().await;
    }
    world.sim.sleep_ns(after).await;
    if world.setting("close-paused", &[false, true]) {
        let mut pause = Box::pin(slot.pause());
        poll_fn(|cx| Poll::Ready(_ = pause.as_mut().poll(cx))).await;
    }
    let inv = guest.history.borrow_mut().begin_flush();
    // Looks that have just begun.
    let mut looks: Vec<_> = (0..world.setting("looks-at-close", &[4, 0]))
        .map(|n| {
            let at = slot.info().size_sectors / 4 * n;
            slot.extents(SectorRange::new(at, (slot.info().size_sectors - at) as u32), few(n))
        })
        .collect();
    poll_fn(|cx| {
        looks.retain_mut(|look| look.as_mut().poll(cx).is_pending());
        Poll::Ready(())
    })
    .await;
    life.closing.set(true);
    let mut closes: Vec<_> = (0..world.setting("closes", &[1, 2])).map(|_| slot.close()).collect();
    let mut results = Vec::new();
    poll_fn(|cx| {
        looks.retain_mut(|look| look.as_mut().poll(cx).is_pending());
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
        world.fail(Invariant::D1, format!("two closes at once end with {results:?}"));
    }
    if !looks.is_empty() {
        world.fail(Invariant::D1, "a disk is closed before looks at its extents have ended");
    }
    match result {
        Ok(()) => guest.history.borrow_mut().end_flush(inv),
        Err(error) => world.fail(Invariant::G11, format!("closing the disk failed with {error:?}")),
    }
    if slot.close().await != result {
        world.fail(Invariant::D1, "a second close has another result");
    }
    if slot.pause().await != Err(Errno::ESHUTDOWN) || slot.resume() != Err(Errno::ESHUTDOWN) {
        world.fail(Invariant::D1, "a closed disk can be paused or resumed");
    }
}
