//! The disk of a guest becomes larger while the guest uses it.
//!
//! ```text
//!   tap-ctl resize, or tap-img resize while the image is closed
//!      └──► sectors, state 4 ──► the guest knows ──► it writes to the new part, and reads it back
//! ```
//!
//! Until the guest knows, it asks for a sector past the end, too: it gets it only once the image has it, durably.

use super::Acts;
use crate::check::Invariant;
use crate::guest::{Guest, GuestDisk as _, RingDisk};
use crate::machine::Attached;
use crate::workload::Op;
use crate::world::World;
use std::cell::Cell;
use std::rc::Rc;
use tap_host::{Errno, IoKind, SECTOR_BYTES, SectorRange};

/// What the disk grows by, in bytes.
const STEPS: [u64; 4] = [64 << 10, 40 << 10, 4 << 10, 600 << 10];
/// The same, if its size may be that of any number of sectors.
const ODD_STEPS: [u64; 4] = [64 << 10, SECTOR_BYTES, 3 * SECTOR_BYTES, 600 << 10];
/// How long a guest may take to know and use the size of a disk that is open, and its tapback too, in nanoseconds.
const KNOWN_NS: u64 = 30_000_000_000;
/// How often that is looked at.
const LOOK_NS: u64 = 10_000_000;

/// What a guest does with the space that its disk gets.
pub(super) struct Growth {
    world: World,
    disk: Attached,
    guest: Guest<RingDisk>,
    /// The sectors that it uses.
    used: Cell<u64>,
    /// Requests past the end that are not answered.
    probes: Cell<u32>,
    /// The size that a command reported, in sectors.
    said: Cell<u64>,
}

impl Growth {
    /// Follows the size of `disk` from now on.
    pub(super) fn follow(world: &World, disk: &Attached, guest: &Guest<RingDisk>) -> Rc<Self> {
        let used = guest.disk().front().size_sectors();
        let own = Rc::new(Self {
            world: world.clone(),
            disk: disk.clone(),
            guest: guest.clone(),
            used: Cell::new(used),
            probes: Cell::new(0),
            said: Cell::new(used),
        });
        disk.node.spawn("growth", 0, Rc::clone(&own).use_new_space());
        own
    }

    async fn use_new_space(self: Rc<Self>) {
        loop {
            let had = self.used.get();
            let has = self.guest.disk().front().grown_past(had).await;
            let across = SectorRange::new(had - 4, (has - had + 4).min(12) as u32);
            let last = SectorRange::new(has - 1, 1);
            for range in [across, last] {
                for kind in [IoKind::Read, IoKind::Write, IoKind::Read] {
                    self.guest.one(Op::new(kind, range)).await;
                }
            }
            self.guest.one(Op::flush()).await;
            self.used.set(has);
        }
    }

    /// The guest asks for the sector past the end of its disk.
    fn probe(self: &Rc<Self>) {
        let own = Rc::clone(self);
        self.probes.set(self.probes.get() + 1);
        self.disk.node.spawn("probe", 0, async move {
            let disk = own.guest.disk();
            let end = disk.front().size_sectors();
            let read = disk.read(SectorRange::new(end, 1), |bytes| bytes.iter().all(|byte| *byte == 0)).await;
            if let Ok(is_zero) = read {
                own.disk.setup.check_durable(&own.world, end + 1, "a request is carried out on a disk of");
                // The guest may know of the sector by now, and have written to it.
                if !is_zero && disk.front().size_sectors() == end {
                    own.world.fail(Invariant::G12, format!("sector {end}, past the end, is not zeros"));
                }
            }
            own.probes.set(own.probes.get() - 1);
        });
    }

    /// The guest of a disk that is open knows its size, and has used it. Nothing is in flight any more.
    pub(super) async fn settle(&self) {
        let front = self.guest.disk().front();
        let until_ns = self.world.sim.now_ns() + KNOWN_NS;
        loop {
            let (size, _) = self.disk.setup.sizes_of_image(&self.world);
            let (size, known) = (size.unwrap_or(0), front.size_sectors());
            if known == size && self.used.get() == known && self.probes.get() == 0 {
                break;
            }
            if self.world.sim.now_ns() >= until_ns {
                let text = format!("a disk has {size} sectors, and its guest knows of {known}");
                return self.world.fail(Invariant::G12, text);
            }
            self.world.sim.sleep_ns(LOOK_NS).await;
        }
        let (said, known) = (self.said.get(), front.size_sectors());
        if known < said {
            let text = format!("a disk was said to have {said} sectors, and its guest knows of {known}");
            self.world.fail(Invariant::G12, text);
        }
    }
}

impl Acts<'_> {
    /// Makes the disk larger: in use, or while its image is closed.
    pub(super) async fn grow(&self, hold_ns: u64) -> Option<()> {
        let keeper = self.keeper;
        // Not while the disk is opened: whoever does so would have to begin again.
        let turn = keeper.turn.acquire().await;
        self.growth.probe();
        let _done_or_dead = match hold_ns >> 1 & 7 {
            0 => self.enlarge_closed(hold_ns).await,
            1 => self.enlarge_paused(hold_ns).await,
            2 | 3 => self.resize_unheard(hold_ns).await,
            4 => {
                if let Some(tapdisk) = keeper.alive() {
                    tapdisk.host.process.node().kill_after_steps(1 + (hold_ns >> 8) % 120);
                }
                self.resize(hold_ns).await
            }
            _ => self.resize(hold_ns).await,
        };
        self.growth.probe();
        drop(turn);
        keeper.ensure().await;
        Some(())
    }

    /// The size that the disk gets, in bytes.
    fn next_size(&self, hold_ns: u64) -> Option<u64> {
        let steps = if self.keeper.admin.limits.direct { STEPS } else { ODD_STEPS };
        let (now, _) = self.disk.setup.sizes_of_image(self.world);
        Some(now? * SECTOR_BYTES + steps[(hold_ns >> 4) as usize % steps.len()])
    }

    /// By tap-ctl, while the guest uses it.
    async fn resize(&self, hold_ns: u64) -> Option<()> {
        let (keeper, to) = (self.keeper, self.next_size(hold_ns)?);
        let (opened, tapdisk) = (keeper.opened(self.disk)?, keeper.alive()?);
        let is_open = opened.at.get() == Some(tapdisk.pid());
        let status = i32::from(self.ctl(&format!("resize -s {to}")).await?);
        if status == 0 {
            self.growth.said.set(to / SECTOR_BYTES);
            self.disk.setup.check_durable(self.world, to / SECTOR_BYTES, "tap-ctl resize made a disk of");
        } else if is_open && !(status == Errno::ETIMEDOUT.0 && keeper.admin.pauses_may_fail()) {
            self.world.fail(Invariant::U1, format!("tap-ctl resize -s {to} ended with {status}"));
        }
        Some(())
    }

    /// The same while no tapback runs, which could publish it.
    async fn resize_unheard(&self, hold_ns: u64) -> Option<()> {
        if self.machine.spared.get() {
            return None;
        }
        self.machine.stop_tapdisk().await;
        let done = self.resize(hold_ns).await;
        self.machine.start_tapdisk();
        done
    }

    /// By tap-img, while no tapdisk has it open.
    async fn enlarge_closed(&self, hold_ns: u64) -> Option<()> {
        if self.keeper.take(self.disk).await? == 0 {
            self.enlarge(hold_ns).await;
        }
        Some(())
    }

    /// By tap-img, while the disk is paused.
    async fn enlarge_paused(&self, hold_ns: u64) -> Option<()> {
        if self.ctl("pause").await? == 0 {
            self.enlarge(hold_ns).await;
            self.resume().await?;
        }
        Some(())
    }

    async fn enlarge(&self, hold_ns: u64) {
        let Some(to) = self.next_size(hold_ns) else { return };
        if self.keeper.admin.enlarge(&self.disk.setup.spec, to).await {
            self.growth.said.set(to / SECTOR_BYTES);
        }
    }
}
