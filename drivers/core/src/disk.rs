//! A disk: the stack of nodes that every program builds over an image.
//!
//! ```text
//!   ring, NBD ──► Slot ──► Scheduler ──► cache mode ──► Lease ──► image
//!                 life     order, merging, retry                  any Node
//!                          └───────── rebuilt when the image is exchanged ─────────┘
//! ```
//!
//! The scheduler is above the cache mode, so that a write-through write blocks overlapping requests until it is
//! durable. Otherwise a later write could be performed and answered first; a successor of this process would then find
//! the earlier one unanswered, and repeat it over the later one.

use crate::{
    CacheMode, ExchangeError, Lease, Node, NodeInfo, Scheduler, SchedulerLimits, SchedulerStats, Slot,
    WaitReport,
};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_host::{Errno, Log, Probe, Tasks, Time, VbdId};

tap_host::listed! {
    pub(super) BUGS: Bug;
    WRITTEN_THROUGH_LATER = "written-through-later",
        "a disk that writes through answers writes before they are durable";
    UNSAFE_FLUSHED = "unsafe-flushed", "a disk whose flushes are to be left out carries them out";
    LEASE_UNCOUNTED = "lease-uncounted",
        "the old image is closed after an exchange although the new one is based on it";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    WRITES_THROUGH = "writes-through", "a disk was built whose writes are durable when answered";
    FLUSHES_LEFT_OUT = "flushes-left-out", "a disk was built whose flushes are answered and not carried out";
}

/// How to build a disk over an image.
#[derive(Clone, Copy, Debug)]
pub struct DiskConfig {
    /// Names the disk in events.
    pub id: VbdId,
    /// When writes become durable.
    pub cache: CacheMode,
    /// Bounds of its scheduler.
    pub scheduler: SchedulerLimits,
}

/// A disk.
pub struct Disk<H> {
    host: H,
    config: DiskConfig,
    /// The properties of its image, which every other image in its place has, too. Only its size changes, while the
    /// image is away.
    image_info: Rc<Cell<NodeInfo>>,
    slot: Slot<H>,
    below: RefCell<Below<H>>,
    /// Summed over all schedulers it has had.
    stats: Rc<RefCell<SchedulerStats>>,
    /// Steps of the earlier schedulers.
    steps_before: Cell<u64>,
}

/// What is in the slot.
struct Below<H> {
    scheduler: Rc<Scheduler<H>>,
    image: Rc<Lease>,
}

impl<H: Time + Tasks + Log + Probe> Disk<H> {
    /// Builds a running disk over `image`.
    pub fn new(host: &H, image: Rc<dyn Node>, config: DiskConfig) -> Self {
        match config.cache {
            CacheMode::WriteBack => {}
            CacheMode::WriteThrough => host.mark(&WRITES_THROUGH),
            CacheMode::Unsafe => host.mark(&FLUSHES_LEFT_OUT),
        }
        let (image_info, stats) = (Rc::new(Cell::new(image.info())), Rc::default());
        let below = Below::new(host, image, &config, &stats);
        let slot = Slot::new(host.clone(), config.id, Rc::clone(&below.scheduler) as Rc<dyn Node>);
        let (host, below, steps_before) = (host.clone(), RefCell::new(below), Cell::new(0));
        Self { host, config, image_info, slot, below, stats, steps_before }
    }

    /// The node to submit requests to.
    pub fn node(&self) -> Rc<dyn Node> {
        Rc::new(self.slot.clone())
    }

    /// The slot, to pause, resume and close the disk.
    pub fn slot(&self) -> &Slot<H> {
        &self.slot
    }

    /// Replaces the disk's image under load with the one that `change` makes: see [`Slot::exchange`]. `change` gets a
    /// lease of the old image, and may keep it below the new one (a snapshot) or not (a coalesce). The disk gives up
    /// its own lease; the old image is closed if no other lease is left.
    ///
    /// # Errors
    /// [`ExchangeError`]: the disk still has the old image. The inner result is that of closing the old image, once the
    /// disk has the new one.
    ///
    /// # Panics
    /// When the new image has another size or mode than the old one.
    pub async fn exchange<E>(
        &self,
        change: impl AsyncFnOnce(Lease) -> Result<Rc<dyn Node>, E>,
    ) -> Result<Result<(), Errno>, ExchangeError<E>> {
        let old = self.swap(change).await?;
        Ok(old.close().await)
    }

    /// As [`Disk::exchange`], and returns what was below the slot, for the caller to close.
    pub(crate) async fn swap<E>(
        &self,
        change: impl AsyncFnOnce(Lease) -> Result<Rc<dyn Node>, E>,
    ) -> Result<Rc<dyn Node>, ExchangeError<E>> {
        let swap = async |_: Rc<dyn Node>| {
            let image = Rc::clone(&self.below.borrow().image);
            let uncounted = self.host.bug(&LEASE_UNCOUNTED);
            let lease = if uncounted { Lease::new(image) } else { image.share() };
            let new = Below::new(&self.host, change(lease).await?, &self.config, &self.stats);
            let top = Rc::clone(&new.scheduler) as Rc<dyn Node>;
            let old = self.below.replace(new);
            self.steps_before.set(self.steps_before.get() + old.scheduler.order_steps());
            Ok(top)
        };
        self.slot.exchange(swap).await
    }

    pub(crate) fn host(&self) -> &H {
        &self.host
    }

    pub(crate) fn image_info(&self) -> &Rc<Cell<NodeInfo>> {
        &self.image_info
    }

    /// The counters, summed over all its schedulers.
    pub fn stats(&self) -> SchedulerStats {
        *self.stats.borrow()
    }

    /// Returns a function that reads the counters. It works after the disk is dropped, and does not keep it alive.
    pub fn stats_later(&self) -> impl Fn() -> SchedulerStats + use<H> {
        let stats = Rc::clone(&self.stats);
        move || *stats.borrow()
    }

    /// Work done so far to keep requests in order: claims compared and dependencies added.
    pub fn order_steps(&self) -> u64 {
        self.steps_before.get() + self.below.borrow().scheduler.order_steps()
    }

    /// Returns a function that reports which requests wait for which; empty once the disk is dropped, which it does not
    /// keep alive.
    pub fn wait_report(&self) -> impl Fn() -> Vec<WaitReport> + use<H> {
        self.slot.wait_report_later()
    }

    /// Waits for the requests in flight and closes the image, once; further calls return the same result.
    ///
    /// # Errors
    /// Those of closing the image.
    pub async fn close(&self) -> Result<(), Errno> {
        self.slot.close().await
    }
}

impl<H: Time + Tasks + Log + Probe> Below<H> {
    fn new(host: &H, image: Rc<dyn Node>, config: &DiskConfig, stats: &Rc<RefCell<SchedulerStats>>) -> Self {
        let image = Rc::new(Lease::new(image));
        let cache = match config.cache {
            CacheMode::WriteThrough if host.bug(&WRITTEN_THROUGH_LATER) => CacheMode::WriteBack,
            CacheMode::Unsafe if host.bug(&UNSAFE_FLUSHED) => CacheMode::WriteBack,
            cache => cache,
        };
        let lower = cache.over(Rc::clone(&image) as Rc<dyn Node>);
        let scheduler = Scheduler::counting(host.clone(), lower, config.scheduler, Rc::clone(stats));
        Self { scheduler: Rc::new(scheduler), image }
    }
}
