//! A disk as every program has it.
//!
//! ```text
//!   ring, NBD ──► Vbd ──► Scheduler ──► cache mode ──► image
//!                 life    order, merging, retry        any Node
//! ```
//!
//! The scheduler is above the cache mode: a write that is answered once it is durable is in the way of what overlaps it
//! until then. Were later ones carried out and answered meanwhile, a successor of this process, which finds the first
//! one without an answer, would write it again over them.

use crate::{CacheMode, Node, Scheduler, SchedulerLimits, SchedulerStats, Vbd, WaitReport};
use std::rc::Rc;
use tap_host::{Errno, Log, Probe, Tasks, Time, VbdId};

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
    vbd: Vbd<H>,
    scheduler: Rc<Scheduler<H>>,
}

impl<H: Time + Tasks + Log + Probe> Disk<H> {
    /// Builds a running disk over `image`.
    pub fn new(host: &H, image: Rc<dyn Node>, config: DiskConfig) -> Self {
        let scheduler = Rc::new(Scheduler::new(host.clone(), config.cache.over(image), config.scheduler));
        let vbd = Vbd::new(host.clone(), config.id, Rc::clone(&scheduler) as Rc<dyn Node>);
        Self { vbd, scheduler }
    }

    /// What requests are submitted to.
    pub fn node(&self) -> Rc<dyn Node> {
        Rc::new(self.vbd.clone())
    }

    /// Its life: to pause, resume and close it.
    pub fn vbd(&self) -> &Vbd<H> {
        &self.vbd
    }

    /// What its scheduler has counted.
    pub fn stats(&self) -> SchedulerStats {
        self.scheduler.stats()
    }

    /// Tells what its scheduler has counted, also of a disk that is gone; does not keep it alive.
    pub fn stats_later(&self) -> impl Fn() -> SchedulerStats + use<H> {
        self.scheduler.stats_later()
    }

    /// Work of the order of requests so far: claims compared and dependencies made.
    pub fn order_steps(&self) -> u64 {
        self.scheduler.order_steps()
    }

    /// Tells what waits for what, as long as the disk is there; does not keep it alive.
    pub fn wait_report(&self) -> impl Fn() -> Vec<WaitReport> + use<H> {
        let scheduler = Rc::downgrade(&self.scheduler);
        move || scheduler.upgrade().map(|scheduler| scheduler.wait_report()).unwrap_or_default()
    }

    /// Lets what is in flight end and closes the image; once, and whoever else asks learns how that went.
    ///
    /// # Errors
    /// As the image's.
    pub async fn close(&self) -> Result<(), Errno> {
        self.vbd.close().await
    }
}
