//! A disk as every program has it.
//!
//! ```text
//!   ring, NBD ──► Slot ──► Scheduler ──► cache mode ──► Lease ──► image
//!                 life     order, merging, retry                  any Node
//!                          └──────── made anew when the image is exchanged ────────┘
//! ```
//!
//! The scheduler is above the cache mode: a write that is answered once it is durable is in the way of what overlaps it
//! until then. Were later ones carried out and answered meanwhile, a successor of this process, which finds the first
//! one without an answer, would write it again over them.

use crate::{
    CacheMode, ExchangeError, Lease, Node, Scheduler, SchedulerLimits, SchedulerStats, Slot, WaitReport,
};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_host::{Bug, Errno, Log, Mark, Probe, Tasks, Time, VbdId};

/// How to build a disk over an image.
#[derive(Clone, Copy, Debug)]
pub struct DiskConfig {
    /// What it is called in events.
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
    slot: Slot<H>,
    below: RefCell<Below<H>>,
    /// Of all its schedulers together.
    stats: Rc<RefCell<SchedulerStats>>,
    /// Steps of the schedulers before this one.
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
            CacheMode::WriteThrough => host.mark(Mark::WritesThrough),
            CacheMode::Unsafe => host.mark(Mark::FlushesLeftOut),
        }
        let stats = Rc::default();
        let below = Below::new(host, image, &config, &stats);
        let slot = Slot::new(host.clone(), config.id, Rc::clone(&below.scheduler) as Rc<dyn Node>);
        let (host, below, steps_before) = (host.clone(), RefCell::new(below), Cell::new(0));
        Self { host, config, slot, below, stats, steps_before }
    }

    /// What requests are submitted to.
    pub fn node(&self) -> Rc<dyn Node> {
        Rc::new(self.slot.clone())
    }

    /// Its life: to pause, resume and close it.
    pub fn slot(&self) -> &Slot<H> {
        &self.slot
    }

    /// Puts the image that `change` makes in place of the one that the disk has, under load: see [`Slot::exchange`].
    /// `change` gets a lease of the old image, and may keep it below the new one (a snapshot) or not (a coalesce). The
    /// disk gives up its own; the old image is closed if no other lease of it is left.
    ///
    /// # Errors
    /// [`ExchangeError`]: the disk still has the old image. The inner result is that of closing the old image, when
    /// the disk has the new one.
    ///
    /// # Panics
    /// When the new image has another size or mode than the old one.
    pub async fn exchange<E>(
        &self,
        change: impl AsyncFnOnce(Lease) -> Result<Rc<dyn Node>, E>,
    ) -> Result<Result<(), Errno>, ExchangeError<E>> {
        let swap = async |_: Rc<dyn Node>| {
            let image = Rc::clone(&self.below.borrow().image);
            let uncounted = self.host.bug(Bug::LeaseUncounted);
            let lease = if uncounted { Lease::new(image) } else { image.share() };
            let new = Below::new(&self.host, change(lease).await?, &self.config, &self.stats);
            let top = Rc::clone(&new.scheduler) as Rc<dyn Node>;
            let old = self.below.replace(new);
            self.steps_before.set(self.steps_before.get() + old.scheduler.order_steps());
            Ok(top)
        };
        let old = self.slot.exchange(swap).await?;
        Ok(old.close().await)
    }

    /// What its schedulers have counted.
    pub fn stats(&self) -> SchedulerStats {
        *self.stats.borrow()
    }

    /// Returns what its schedulers have counted, also of a disk that is gone; does not keep it alive.
    pub fn stats_later(&self) -> impl Fn() -> SchedulerStats + use<H> {
        let stats = Rc::clone(&self.stats);
        move || *stats.borrow()
    }

    /// Work of the order of requests so far: claims compared and dependencies made.
    pub fn order_steps(&self) -> u64 {
        self.steps_before.get() + self.below.borrow().scheduler.order_steps()
    }

    /// Returns what waits for what, as long as the disk exists; does not keep it alive.
    pub fn wait_report(&self) -> impl Fn() -> Vec<WaitReport> + use<H> {
        self.slot.wait_report_later()
    }

    /// Lets what is in flight end and closes the image; once, and every further call returns the same result.
    ///
    /// # Errors
    /// As the image's.
    pub async fn close(&self) -> Result<(), Errno> {
        self.slot.close().await
    }
}

impl<H: Time + Tasks + Log + Probe> Below<H> {
    fn new(host: &H, image: Rc<dyn Node>, config: &DiskConfig, stats: &Rc<RefCell<SchedulerStats>>) -> Self {
        let image = Rc::new(Lease::new(image));
        let cache = match config.cache {
            CacheMode::WriteThrough if host.bug(Bug::WrittenThroughLater) => CacheMode::WriteBack,
            CacheMode::Unsafe if host.bug(Bug::UnsafeFlushed) => CacheMode::WriteBack,
            cache => cache,
        };
        let lower = cache.over(Rc::clone(&image) as Rc<dyn Node>);
        let scheduler = Scheduler::counting(host.clone(), lower, config.scheduler, Rc::clone(stats));
        Self { scheduler: Rc::new(scheduler), image }
    }
}
