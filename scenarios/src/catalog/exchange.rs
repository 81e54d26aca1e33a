//! The image of a disk is exchanged under load.
//!
//! ```text
//!   snapshot   disk ─► image              copy   disk ─► image
//!              disk ─► overlay ─► image          disk ─► copy
//! ```
//!
//! A snapshot keeps the old image below the new one, with a lease; a copy replaces it. No request may notice either.
//! What was answered before is durable afterwards, what is below an overlay no longer changes, and a replaced image is
//! closed. Operations of the host fail, and the power is cut: what is opened next is the disk's last image.

use super::crash::{arm_power_cut, error_storage, guest_retries, open_under_errors};
use super::recovered::{after_cut, last_epoch};
use super::setup::{Setup, workload};
use crate::check::Invariant;
use crate::formats::{self, Kind};
use crate::guest::{DirectDisk, ErrorPolicy, Guest};
use crate::limits::StackLimits;
use crate::scenario::Scenario;
use crate::stack::Stack;
use crate::workload::{Workload, operations};
use crate::world::World;
use kernel_model::SimHost;
use sim::{Entity, Label};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_core::wait::joined;
use tap_core::{ExchangeError, Lease, Node, Request, Scheduler, SchedulerLimits};
use tap_host::{Budget, Errno, IoBuf, SECTOR_BYTES, SectorRange, select};
use tap_images::{Backing, BackingPolicy, ImageError, ImageFormat, ImageSpec, NewImage, OpenOptions};

/// Snapshots and copies of a disk in use.
pub static IMAGE_EXCHANGED: Scenario = Scenario {
    name: "image-exchanged",
    about: "under load a disk gets snapshots, and copies in place of its image; operations fail; power cuts",
    storage: &error_storage,
    body: &|w| Box::pin(exchanged(w)),
};

/// An exchange: the delay before it in 24 bits of nanoseconds, and its kind: 1 a snapshot, 2 a copy.
pub static EXCHANGE: Label = Label::packed(
    "exchange",
    "exchange {n}: after so many ns, by a snapshot (1) or a copy (2) ({})",
    &[24, 2],
);

/// A pause during exchanges: the delay before it, and its duration, in 24 bits of nanoseconds each; and whether another
/// task waits for it, which the resume interrupts.
pub static PAUSE_BESIDE: Label = Label::packed(
    "pause-beside",
    "pause {n} during exchanges: after so many ns, for so many, by another task ({})",
    &[24, 24, 1],
);

const DISK_BYTES: u64 = 1 << 20;
/// Sectors per copy operation.
const COPY_SECTORS: u32 = 256;

/// The disk: its image, and the files below it.
struct Chain {
    world: World,
    limits: StackLimits,
    /// The setup with the current image of the disk.
    setup: RefCell<Setup>,
    /// Former images below it, and their content when the disk stopped writing to them.
    kept: RefCell<Vec<(String, Vec<u8>)>>,
    /// Number of the next new file.
    next: Cell<u32>,
    flush_failed: Cell<bool>,
    /// Exchanges begun, and ended.
    exchanges: Cell<(u32, u32)>,
    /// An exchange is making the new image.
    changing: Cell<bool>,
    /// The disk is being closed, or is closed.
    closing: Cell<bool>,
}

async fn exchanged(world: World) {
    let limits = StackLimits::draw(&world);
    let setup = Setup::new(&world, world.setting("image", &Kind::all()), 0, DISK_BYTES);
    let chain = Rc::new(Chain {
        world: world.clone(),
        limits,
        setup: RefCell::new(setup),
        kept: RefCell::default(),
        next: Cell::new(1),
        flush_failed: Cell::new(false),
        exchanges: Cell::default(),
        changing: Cell::new(false),
        closing: Cell::new(false),
    });
    for cut in 0..2 {
        chain.changing.set(false);
        chain.closing.set(false);
        epoch(&chain, cut).await;
        if world.verdict.is_broken() {
            return;
        }
    }
    world.sim.stop_faults();
    world.storage.stop_failures();
    let setup = chain.setup.borrow().clone();
    last_epoch(&world, &setup, &limits, false, chain.flush_failed.get()).await;
    chain.check_kept("after recovery");
}

async fn epoch(chain: &Rc<Chain>, cut: u32) {
    let world = &chain.world;
    let setup = chain.setup.borrow().clone();
    let host = SimHost::start(&world.kernel, &world.xen, "tapdisk", u64::from(cut));
    let node = host.process.node().clone();
    let own = node.clone();
    arm_power_cut(world, &setup, cut, 240, move || own.kill());
    let (c, h) = (Rc::clone(chain), host.clone());
    let (task, finished) = joined(async move {
        work(&c, &h, cut).await;
    });
    node.spawn("main", 0, task);
    select(node.dead(), finished).await;
    setup.cut_power(world, &[&node]).await;
    let when = format!("after power cut {}", cut + 1);
    let setup = chain.setup.borrow().clone();
    setup.check(world, &when).await;
    chain.check_kept(&when);
}

/// Opens the disk and runs until all operations and exchanges have ended, or the power is cut.
async fn work(chain: &Rc<Chain>, host: &SimHost, cut: u32) {
    let (world, limits) = (&chain.world, &chain.limits);
    let setup = chain.setup.borrow().clone();
    let Some(stack) = open_under_errors(world, &setup, limits, host).await else { return };
    let stack = Rc::new(stack);
    let reads = if cut > 0 { after_cut(chain.flush_failed.get()) } else { Invariant::G1 };
    let policy = ErrorPolicy { retries: guest_retries(world), errors_allowed: world.errors_allowed(), reads };
    let disk = DirectDisk::new(stack.node(), limits.pool_bytes).in_pieces(limits.piece_sectors);
    let guest = Guest::new(world, disk, Rc::clone(&setup.history), policy);
    let who = Entity::WORLD.child("guest", u64::from(cut));
    world.sim.name_entity(who, || format!("guest 1, epoch {cut}"));
    let shape = Workload { zeroes: true, ..workload(world, setup.size_sectors, 60, 88) };
    let ops = operations(&world.sim, who, u64::from(cut), &shape);
    let mut ends = Vec::new();
    for name in ["exchanges", "other exchanges"].into_iter().take(world.setting("exchangers", &[1, 2])) {
        let (c, s, h) = (Rc::clone(chain), Rc::clone(&stack), host.clone());
        let (task, end) = joined(async move { exchanges(&c, &s, &h, (name, cut)).await });
        host.process.node().spawn(name, 0, task);
        ends.push(end);
    }
    let (c, s, h) = (Rc::clone(chain), Rc::clone(&stack), host.clone());
    host.process.node().spawn("pauses", 0, async move { pauses(&c, &s, &h, cut).await });
    guest.run(&ops, limits.guest_depth).await;
    if world.setting("closed-beside-exchanges", &[false, true]) {
        close(chain, &stack).await;
    }
    for end in ends {
        let _ = end.await;
    }
    if guest.flush_failed() {
        chain.flush_failed.set(true);
    }
}

/// Closes the disk while exchanges may run: one that has begun ends first, and none begins later.
async fn close(chain: &Chain, stack: &Stack) {
    let world = &chain.world;
    chain.closing.set(true);
    let closed = stack.disk.close().await;
    if chain.changing.get() {
        world.fail(Invariant::D1, "a disk is closed while its image is being exchanged");
    }
    let setup = chain.setup.borrow().clone();
    setup.check_closed(world);
    if let Err(error) = closed {
        chain.flush_failed.set(true);
        if !world.errors_allowed() {
            world.fail(Invariant::E4, format!("closing the disk failed with {error:?}"));
        }
    }
}

/// Exchanges the image a few times.
async fn exchanges(chain: &Rc<Chain>, stack: &Stack, host: &SimHost, (name, cut): (&'static str, u32)) {
    let world = &chain.world;
    let entity = Entity::WORLD.child(name, u64::from(cut));
    world.sim.name_entity(entity, || format!("{name}, epoch {cut}"));
    for n in 0..world.setting("exchanges", &[2, 1, 4]) {
        let value = world.sim.decide(entity, &EXCHANGE, n, |d| d.magnitude(22) | (1 + d.below(2)) << 24);
        let is_copy = match value >> 24 {
            0 => continue,
            1 => false,
            _ => true,
        };
        world.sim.sleep_ns(value & 0xff_ffff).await;
        exchange(chain, stack, host, is_copy).await;
    }
}

/// Pauses the disk a few times: it must then do nothing, except for an exchange that begins meanwhile.
async fn pauses(chain: &Chain, stack: &Stack, host: &SimHost, cut: u32) {
    let world = &chain.world;
    let entity = Entity::WORLD.child("pauses", u64::from(cut));
    world.sim.name_entity(entity, || format!("pauses, epoch {cut}"));
    let slot = stack.disk.slot();
    for n in 0..world.setting("pauses-beside", &[0, 3]) {
        let value = world.sim.decide(entity, &PAUSE_BESIDE, n, |d| {
            d.magnitude(22) | d.magnitude(20) << 24 | u64::from(d.below(3) == 0) << 48
        });
        world.sim.sleep_ns(value & 0xff_ffff).await;
        if chain.closing.get() {
            return;
        }
        let pause_ns = value >> 24 & 0xff_ffff;
        if value >> 48 == 1 {
            pause_interrupted(chain, stack, host, pause_ns).await;
            continue;
        }
        match slot.pause().await {
            Err(Errno::ESHUTDOWN) if chain.closing.get() => return,
            Err(error) => world.fail(Invariant::D1, format!("pausing the disk failed with {error:?}")),
            Ok(()) => check_paused(chain, stack, pause_ns).await,
        }
        if let Err(error) = slot.resume()
            && !chain.closing.get()
        {
            world.fail(Invariant::D1, format!("resuming the disk failed with {error:?}"));
        }
    }
}

/// Nothing moves on a paused disk for `ns`, unless an exchange or a close begins.
async fn check_paused(chain: &Chain, stack: &Stack, ns: u64) {
    let (world, slot) = (&chain.world, stack.disk.slot());
    if chain.changing.get() {
        world.fail(Invariant::D1, "a disk is paused while its image is being exchanged");
    }
    let (before, (begun, ended)) = (world.storage.counts(), chain.exchanges.get());
    world.sim.sleep_ns(ns).await;
    let after = world.storage.counts();
    let alone = begun == ended && chain.exchanges.get() == (begun, ended);
    let moved = (before.reads, before.writes, before.syncs) != (after.reads, after.writes, after.syncs);
    if chain.closing.get() {
        return;
    }
    if alone && moved || slot.in_flight() > 0 || slot.state() != "paused" {
        let text = format!("a paused disk is {}, with {} requests in flight", slot.state(), slot.in_flight());
        world.fail(Invariant::D1, format!("{text}; I/O continued from {before:?} to {after:?}"));
    }
}

/// Longer than a task that was woken waits for its turn.
const TURN_NS: u64 = 1_000_000;

/// Another task pauses the disk; this one resumes it after `ns`. A pause that was still waiting fails at once, whatever
/// else it waited for.
async fn pause_interrupted(chain: &Chain, stack: &Stack, host: &SimHost, ns: u64) {
    let (world, slot) = (&chain.world, stack.disk.slot());
    let result = Rc::new(Cell::new(None));
    let (own, out) = (slot.clone(), Rc::clone(&result));
    host.process.node().spawn("pause", 0, async move { out.set(Some(own.pause().await)) });
    world.sim.sleep_ns(TURN_NS + ns).await;
    let before = result.get();
    let resumed = slot.resume();
    world.sim.sleep_ns(TURN_NS).await;
    if chain.closing.get() {
        return;
    }
    let fits = match (before, result.get()) {
        (None, after) => after == Some(Err(Errno::EINTR)),
        (before, _) => before == Some(Ok(())),
    };
    if !fits || resumed != Ok(()) {
        let text =
            format!("a pause ended with {before:?} before the resume, with {:?} after it", result.get());
        world.fail(Invariant::D1, format!("{text}; the resume with {resumed:?}"));
    }
}

async fn exchange(chain: &Rc<Chain>, stack: &Stack, host: &SimHost, is_copy: bool) {
    let world = &chain.world;
    let history = Rc::clone(&chain.setup.borrow().history);
    let inv = history.borrow_mut().begin_flush();
    chain.exchanges.set((chain.exchanges.get().0 + 1, chain.exchanges.get().1));
    let old = RefCell::new(None);
    let change = async |image: Lease| {
        let memory = &stack.memory;
        *old.borrow_mut() = Some(chain.setup.borrow().clone());
        if chain.changing.replace(true) {
            world.fail(Invariant::D1, "two exchanges of one disk run at once");
        }
        let made = match is_copy {
            true => chain.copy(host, memory, image).await,
            false => chain.snapshot(host, memory, image).await,
        };
        chain.changing.set(false);
        made.map_err(|error| (is_passing(&error), error.to_string()))
    };
    let bad = |text: String| {
        if !world.errors_allowed() {
            world.fail(Invariant::E4, text);
        }
    };
    let exchanged = stack.exchange(host, world, &chain.limits, change).await;
    chain.exchanges.set((chain.exchanges.get().0, chain.exchanges.get().1 + 1));
    match exchanged {
        Ok(closed) => {
            history.borrow_mut().end_flush(inv);
            if let Err(error) = closed {
                bad(format!("closing a replaced image failed with {error:?}"));
            }
            if is_copy {
                chain.check_left(&old.take().expect("an exchange that succeeded has changed the image"));
            }
        }
        Err(ExchangeError::Closed) if chain.closing.get() => {}
        Err(ExchangeError::Closed) => world.fail(Invariant::D1, "an exchange found its disk closed"),
        Err(ExchangeError::Flush(error)) => {
            chain.flush_failed.set(true);
            bad(format!("the flush of an exchange failed with {error:?}"));
        }
        Err(ExchangeError::Change((passing, text))) => {
            if !passing {
                bad(format!("failed to {text}"));
            }
        }
    }
}

/// A transient error fails operations that are not retried.
fn is_passing(error: &ImageError) -> bool {
    matches!(error.errno(), Errno::EAGAIN | Errno::EINTR | Errno::ENOMEM | Errno::EBUSY)
}

impl Chain {
    /// A new image above `old`.
    async fn snapshot(
        &self,
        host: &SimHost,
        memory: &Budget,
        old: Lease,
    ) -> Result<Rc<dyn Node>, ImageError> {
        let setup = self.setup.borrow().clone();
        let at = setup.spec.path.clone();
        let name = at.rsplit('/').next().unwrap_or(&at).to_owned();
        let spec = self.create(host, Kind::mapped(true), Some(name)).await?;
        let path = at.clone();
        let gate = move |path: &str| {
            let open = || Backing::Open(Rc::new(old.share()));
            Some(if path == at { open() } else { ImageFormat::Probe.into() })
        };
        let image = self.open(host, memory, &spec, BackingPolicy::Ask(Rc::new(gate))).await?;
        let held = self.world.storage.bytes(&path).unwrap_or_default();
        self.kept.borrow_mut().push((path, held));
        *self.setup.borrow_mut() = setup.above(spec);
        Ok(image)
    }

    /// A new image that holds the content of `old` durably.
    async fn copy(&self, host: &SimHost, memory: &Budget, old: Lease) -> Result<Rc<dyn Node>, ImageError> {
        let world = &self.world;
        let mapped = Kind::mapped(false);
        let others = Kind::plain().into_iter().filter(|kind| kind.model.format() != mapped.model.format());
        let kinds: Vec<Kind> = std::iter::once(mapped).chain(others).collect();
        let spec = self.create(host, world.setting("copy-format", &kinds), None).await?;
        let image = self.open(host, memory, &spec, BackingPolicy::Refuse).await?;
        let copied = copy_all(host, Rc::new(old), Rc::clone(&image)).await;
        copied.map_err(|error| ImageError::Io { action: "copy to", path: spec.path.clone(), error })?;
        let setup = self.setup.borrow().alone(spec);
        *self.setup.borrow_mut() = setup;
        self.kept.borrow_mut().clear();
        Ok(image)
    }

    async fn create(
        &self,
        host: &SimHost,
        kind: Kind,
        backing: Option<String>,
    ) -> Result<ImageSpec, ImageError> {
        let number = self.next.replace(self.next.get() + 1);
        let path = format!("/images/next{number}.img");
        let size_bytes = self.setup.borrow().size_sectors * SECTOR_BYTES;
        let image = NewImage { size_bytes, backing, ..NewImage::default() };
        let format = kind.model.format();
        formats::drivers().create(host, format, &path, image).await?;
        Ok(ImageSpec { format: format.into(), path })
    }

    async fn open(
        &self,
        host: &SimHost,
        memory: &Budget,
        spec: &ImageSpec,
        backing: BackingPolicy,
    ) -> Result<Rc<dyn Node>, ImageError> {
        let limits = &self.limits;
        let options = OpenOptions {
            write: true,
            unlocked: false,
            direct: limits.direct,
            table_bytes: limits.table_bytes,
            backing,
            memory: memory.clone(),
        };
        formats::drivers().open(host, spec, &options).await
    }

    /// What is below an overlay has not changed. A file may have become longer when it was closed.
    fn check_kept(&self, when: &str) {
        for (path, held) in self.kept.borrow().iter() {
            let now = self.world.storage.bytes(path).unwrap_or_default();
            let same = now.get(..held.len()) == Some(held) && now[held.len()..].iter().all(|b| *b == 0);
            if !same {
                self.world.fail(Invariant::C1, format!("{when} {path}, below a snapshot, has other bytes"));
            }
        }
    }

    /// A replaced image is closed, with everything below it.
    fn check_left(&self, old: &Setup) {
        old.check_closed(&self.world);
        for path in old.files() {
            let locks = self.world.storage.locks(path);
            if !locks.is_empty() {
                let text = format!("{path} was replaced, but has the locks {locks:?}");
                self.world.fail(Invariant::C2, text);
            }
        }
    }
}

/// Copies all of `from` to `to`, durably.
async fn copy_all(host: &SimHost, from: Rc<dyn Node>, to: Rc<dyn Node>) -> Result<(), Errno> {
    let limits = SchedulerLimits::default();
    let size_sectors = from.info().size_sectors;
    // Schedulers retry what failed for a moment.
    let from = Scheduler::new(host.clone(), from, limits);
    let to = Scheduler::new(host.clone(), to, limits);
    let mut at = 0;
    while at < size_sectors {
        let range = SectorRange::new(at, (size_sectors - at).min(u64::from(COPY_SECTORS)) as u32);
        let buf = IoBuf::unpooled(range.len_bytes() as usize)?;
        let read = from.submit(Request::read(range, [buf].into_iter().collect())).await;
        read.result?;
        to.submit(Request::write(range, read.bufs)).await.result?;
        at += u64::from(range.count);
    }
    to.submit(Request::flush()).await.result
}
