//! Power cuts: what each file loses, as decisions.

use super::cuts::CutRecorder;
use super::{Inner, Slot, Storage};
use crate::faults::{IoOp, LOST, NAME_LOST, RUN_LOST, SIZE_PARTLY, SIZES_LOST};
use crate::inode::{Inode, Pending};
use crate::pages::PAGE;
use sim::{Entity, Sim, TraceEvent, mix2, text_hash};
use std::fmt;
use std::rc::Rc;
use tap_host::{IoVec, SECTOR_BYTES};

impl Storage {
    /// The decisions that make [`Storage::power_cut`], now, leave of `name` exactly the sectors that `keep` says (by
    /// position in [`Inode::pending`]) and the first `sizes_kept` size changes. Writes in flight are lost.
    pub fn decisions_of_cut(
        &self,
        name: &str,
        sizes_kept: usize,
        keep: impl Fn(usize) -> u8,
    ) -> Vec<(Entity, &'static sim::Label, u64)> {
        let Some(file) = self.0.files.borrow().get(name).cloned() else { return Vec::new() };
        let inode = file.inode.borrow();
        let mut out: Vec<(Entity, &'static sim::Label, u64)> = Vec::new();
        for (i, p) in inode.pending.iter().enumerate() {
            out.push((self.0.pending_entity(p), &LOST, u64::from(p.sectors & !keep(i))));
        }
        let mut growing = 0;
        let mut size = inode.live.size;
        for slot in self.0.slots.borrow().iter() {
            let Slot::Running(running) = slot else { continue };
            if !running.op.changes() || !Rc::ptr_eq(&running.open.file, &file) {
                continue;
            }
            let mut end = running.offset + running.len;
            if matches!(running.op, IoOp::Zero(_)) {
                end = end.min(size);
                if end <= running.offset {
                    continue;
                }
            }
            growing += u64::from(end > size);
            size = size.max(end);
            for page in running.offset / PAGE as u64..=(end - 1) / PAGE as u64 {
                out.push((running.io.child("page", page), &LOST, 0xff));
            }
        }
        let sizes_lost = (inode.pending_sizes.len() - sizes_kept) as u64 + growing;
        out.push((file.entity, &SIZES_LOST, sizes_lost));
        out.retain(|d| d.2 != 0);
        out
    }

    /// How often the power was cut so far: hosts have the number in bytes 8 to 11 of their boot's id.
    pub fn power_cuts(&self) -> u32 {
        self.0.power_cuts()
    }

    /// Cuts the power: per file a decision for every pending write and size change. Writes in flight count as pending.
    /// Open descriptors stay open on files that can no longer be found; call it when every process is dead.
    pub fn power_cut(&self) {
        let inner = &self.0;
        inner.sim.remark("power", || "the power is cut".into());
        inner.end_outage();
        inner.land_in_flight();
        // What the kernel had yet to close is closed.
        drop(inner.closing.take());
        // A file may live through several power cuts; each is a separate decision.
        let cut = inner.power_cuts.replace(inner.power_cuts.get() + 1);
        inner.undo_exchanges(cut);
        let old = std::mem::take(&mut *inner.files.borrow_mut());
        let mut report = CutRecorder::new(&inner.sim);
        for (name, file) in old {
            let sim = &inner.sim;
            if !file.name_durable.get() && sim.decide(file.entity, &NAME_LOST, cut, |d| d.below(2)) != 0 {
                report.name_lost(&name, &file.inode.borrow().live);
                continue;
            }
            let inode = file.inode.borrow();
            let sizes = inode.pending_sizes.len() as u64;
            let lost = sim.decide(file.entity, &SIZES_LOST, cut, |d| match d.below(3) {
                0 => 0,
                1 => sizes,
                _ => d.below(sizes + 1),
            });
            let run = LostRun(sim.decide(file.entity, &RUN_LOST, cut, |d| LostRun::draw(&inode, d)));
            let mut mood = PowerCutMood::draw(sim, file.entity);
            if run.0 != 0 {
                // With a lost run, that run is what matters.
                mood.lose_of_8 = mood.lose_of_8.saturating_sub(6);
            }
            let mut left = Left { name: text_hash(&name), hash: 0, pages: 0, size: 0 };
            let mut told = report.file(&name, &inode.live);
            let kept = (sizes - lost.min(sizes)) as usize;
            // In whole sectors, because file systems grow by blocks: less would tear a sector that must be old or new.
            let growth = inode.growth(kept) / SECTOR_BYTES;
            let partly = |d: &mut sim::Draw| if growth > 0 && d.below(4) == 0 { d.below(growth) } else { 0 };
            let partly = sim.decide(file.entity, &SIZE_PARTLY, cut, partly).min(growth);
            let content = inode.after_power_cut(kept, partly * SECTOR_BYTES, |_, p| {
                let entity = inner.pending_entity(p);
                let lost = sim.decide(entity, &LOST, 0, |d| mood.lost(p, d)) as u8;
                let kept = p.sectors & !(lost | run.of_page(p.page));
                left.add(p, kept);
                told.wrote(p, kept);
                kept
            });
            left.size = content.size;
            report.left(told, &content);
            sim.trace("power", &left);
            drop(inode);
            let left = inner.file(&name, Inode::durable(content), true, file.born);
            left.device.set(file.device.get());
            inner.files.borrow_mut().insert(name, left);
        }
        inner.keep_cut(report);
    }
}

/// What a power cut left of one file, for the trace: two runs with the same trace have the same bytes.
struct Left {
    name: u64,
    /// Hash of what was kept of each pending write, in order.
    hash: u64,
    pages: u64,
    size: u64,
}

impl Left {
    fn add(&mut self, p: &Pending, kept: u8) {
        if kept == 0 {
            return;
        }
        self.pages += 1;
        self.hash = mix2(self.hash, p.page << 8 | u64::from(kept));
        for sector in (0..8).filter(|i| kept & 1 << i != 0) {
            let at = sector * SECTOR_BYTES as usize;
            let words = p.bytes[at..at + SECTOR_BYTES as usize].as_chunks::<8>().0;
            let sum = words.iter().fold(0, |sum: u64, word| {
                (sum ^ u64::from_le_bytes(*word)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
            });
            self.hash = mix2(self.hash, sum);
        }
    }
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Left { hash, pages, size, .. } = self;
        write!(f, "leaves {size} bytes; of {pages} pending pages something ({hash:016x})")
    }
}

impl TraceEvent for Left {
    fn words(&self) -> [u64; 4] {
        [self.name, self.hash, self.pages, self.size]
    }
}

/// Sectors of a file that revert together, from a [`RUN_LOST`] value.
struct LostRun(u64);

impl LostRun {
    /// In one cut of three: a run around a pending write.
    fn draw(inode: &Inode, d: &mut sim::Draw) -> u64 {
        let pages = inode.pending.len() as u64;
        if pages == 0 || d.below(3) != 0 {
            return 0;
        }
        let page = inode.pending[d.below(pages) as usize].page;
        let count = d.magnitude(14);
        let first = (page * 8 + d.below(8)).saturating_sub(d.below(count));
        count | first << 24
    }

    /// The sectors of `page` that are in it, as a mask.
    fn of_page(&self, page: u64) -> u8 {
        let (first, count) = (self.0 >> 24, self.0 & 0xff_ffff);
        let within = |i: &u64| (first..first + count).contains(&(page * 8 + i));
        (0..8).filter(within).fold(0, |mask, i| mask | 1 << i)
    }
}

/// The character of a seed's power cuts: everything kept, everything lost, or a mix; single sectors torn or not.
struct PowerCutMood {
    lose_of_8: u64,
    torn: bool,
}

impl PowerCutMood {
    fn draw(sim: &Sim, file: Entity) -> Self {
        // Not a decision: it only shapes how decisions are drawn.
        let mut draw = sim::Draw::new(mix2(file.0, sim.swarm().seed()));
        Self { lose_of_8: draw.below(9), torn: draw.below(2) == 0 }
    }

    fn lost(&self, p: &Pending, d: &mut sim::Draw) -> u64 {
        if d.below(8) >= self.lose_of_8 {
            return 0;
        }
        let all = u64::from(p.sectors);
        if self.torn && p.sectors.count_ones() > 1 { d.bits() & all } else { all }
    }
}

impl Inner {
    /// Power fails while operations run: writes count as written and not synchronised.
    fn land_in_flight(&self) {
        let mut slots = self.slots.borrow_mut();
        for slot in slots.iter_mut() {
            let Slot::Running(running) = slot else { continue };
            self.sim.end_span(running.span, || "was running when the power failed".into());
            let landed = self.up_to_bad(running, running.len as usize).unwrap_or(0);
            match running.op {
                IoOp::Write => _ = self.effect_write(running, landed),
                IoOp::Zero(mode) => _ = self.effect_zero(running, mode, landed),
                IoOp::Read | IoOp::Sync => {}
            }
            // Its timer then finds nothing to do.
            running.op = IoOp::Read;
            running.len = 0;
            running.bufs = IoVec::new();
        }
    }
}
