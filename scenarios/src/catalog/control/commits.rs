//! Images below a disk in use are merged, while everything else goes on.
//!
//! ```text
//!   disk ─► top ─► … ─► image ─► base ─► …       commit -a image:   disk ─► top ─► … ─► image (was base) ─► …
//! ```

use super::Disk;
use super::admin::Outcome;
use super::verbs::{Act, Acts};
use crate::check::Invariant;
use crate::formats::Kind;
use crate::world::World;
use sim::{Entity, Label};
use tap_host::Errno;
use tap_images::mark_of;

/// What is done while images are merged.
pub static BESIDE_MERGE: Label = Label::new(
    "beside-merge",
    "{}: 1 a pause, 2 a close, 3 a snapshot, 4 a cancel, 5 a second merge, 6 another file gets the image's name",
);

/// How often a merge is looked at, in nanoseconds.
const LOOK_NS: u64 = 1_000_000;
/// How often, at most.
const LOOKS: u32 = 100_000;

impl Disk {
    /// The image of a merge, and the one that it is merged into, if there are two below the disk.
    fn merges(&self, which: u64) -> Option<(String, String)> {
        let setup = self.setup();
        let below = setup.images_below();
        let count = below.len().checked_sub(1).filter(|count| *count > 0)?;
        let at = which as usize % count;
        Some((below[at].clone(), below[at + 1].clone()))
    }

    /// The merge is over: the disk has the image or not, and whoever reads these two finds what is there.
    fn merged(&self, world: &World, done: bool) {
        let Some((image, base)) = self.merging.borrow().clone() else { return };
        if done {
            let without = self.setup().without(&base);
            *self.setup.borrow_mut() = without;
            for left in [base.clone(), mark_of(&base)] {
                if world.storage.file_number(&left).is_some() {
                    world.fail(Invariant::C4, format!("{left} is left of a merge that was reported done"));
                }
            }
            self.merging.take();
            let content = world.storage.content(&image);
            let walked = content.and_then(|content| Kind::mapped(false).model.walk_whole(&content));
            if let Some(Err((invariant, text))) = walked {
                world.fail(invariant, format!("after a merge {image}: {text}"));
            }
            let bytes = world.storage.bytes(&image).unwrap_or_default();
            self.left.borrow_mut().push((image, bytes));
        } else {
            self.look_again(world);
            self.merging.take();
        }
    }
}

impl Acts<'_> {
    /// Begins a merge. `None` in the inner option if it was refused, which must be right.
    async fn begin_commit(&self, disk: &Disk, hold_ns: u64, wait: bool) -> Option<Option<Outcome>> {
        let Some((image, base)) = disk.merges(hold_ns) else { return Some(None) };
        let rate = ["", "-r 1M", "-r 40M"][(hold_ns >> 8) as usize % 3];
        let format = Kind::mapped(false).model.format();
        let wait = if wait { "-w" } else { "" };
        let line = format!("commit {} {wait} -a {format}:{image} -b {base} {rate}", disk.at(self.tapdisk));
        let other = !self.is_mapped(&base);
        disk.left.borrow_mut().retain(|(path, _)| *path != image && *path != base);
        *disk.merging.borrow_mut() = Some((image.clone(), base.clone()));
        let begun = self.admin.ctl(&line).await;
        if !self.tapdisk.is_alive() {
            return None;
        }
        if begun.status == 0 && !other {
            return Some(Some(begun));
        }
        let status = i32::from(begun.status);
        let late = status == Errno::ETIMEDOUT.0 && self.admin.pauses_may_fail();
        // Another merge was cut short, which must be completed first; or somebody who was killed still reads the base.
        let marked = status == Errno::EBUSY.0 && self.has_marks(disk);
        let passes =
            self.admin.passes(status) || self.admin.may_have_lost(&begun) || status == Errno::EAGAIN.0;
        // The disk has grown since the image below was its own.
        let larger = disk.size_of_image(self.world).is_some_and(|size| size > super::DISK_BYTES);
        let refused = other && [Errno::EMEDIUMTYPE.0, Errno::EACCES.0].contains(&status)
            || larger && status == Errno::EMEDIUMTYPE.0;
        if !late && !marked && !passes && !refused {
            self.world.fail(Invariant::U1, format!("tap-ctl {line} ended with {begun:?}"));
        }
        disk.merged(self.world, false);
        self.goes_on(disk).await?;
        Some(None)
    }

    /// Whether the file has the format of the images above it.
    fn is_mapped(&self, path: &str) -> bool {
        let content = self.world.storage.content(path);
        let walked = content.and_then(|content| Kind::mapped(false).model.walk(&content));
        matches!(walked, Some(Ok(_)))
    }

    fn has_marks(&self, disk: &Disk) -> bool {
        disk.setup().files().any(|path| self.world.storage.file_number(&mark_of(path)).is_some())
    }

    /// A second merge of the same images: one is under way, or was done, or failed and is begun again.
    fn check_second(&self, second: &Outcome) {
        let right = [0, Errno::EALREADY.0, Errno::EINVAL.0, Errno::ENOENT.0].contains(&second.status.into());
        let late = i32::from(second.status) == Errno::ETIMEDOUT.0 && self.admin.pauses_may_fail();
        if self.tapdisk.is_alive() && !right && !late && !self.admin.passes(second.status.into()) {
            self.world.fail(Invariant::U1, format!("a second merge ended with {second:?}"));
        }
    }

    /// Another file gets the name of the image while it is merged: that one is not given away.
    async fn misplace(&self, disk: &Disk) -> Act {
        let storage = &self.world.storage;
        let Some((image, _)) = disk.merging.borrow().clone() else { return Some(()) };
        let (number, aside) = (storage.file_number(&image), format!("{image}.aside"));
        storage.rename(&image, &aside);
        storage.put(&image, storage.content(&aside).unwrap_or_default());
        let other = storage.file_number(&image);
        let done = self.wait_for_commit(disk).await;
        let is_there = storage.file_number(&image) == other && storage.file_number(&aside) == number;
        if !is_there {
            let text = format!("a merge gave away {image}, which another file has by now: {done:?}");
            self.world.fail(Invariant::U1, text);
        }
        storage.rename(&aside, &image);
        done?;
        // The other one may have been opened by its name. Storage that hangs answers at last.
        self.resume(disk).await?;
        while !self.pause(disk).await? {}
        self.resume(disk).await
    }

    /// Waits until the merge is over; returns whether the image was merged.
    async fn wait_for_commit(&self, disk: &Disk) -> Option<bool> {
        for _ in 0..LOOKS {
            let told = self.admin.ctl(&format!("query {}", disk.at(self.tapdisk))).await;
            if !self.tapdisk.is_alive() {
                return None;
            }
            let state = told.out.first().and_then(|line| line.strip_prefix("state=")?.split(' ').next());
            match (told.status, state) {
                (0, Some("running")) => self.world.sim.sleep_ns(LOOK_NS).await,
                (0, Some("done")) => return Some(true),
                (0, Some("ended")) => return Some(false),
                (status, _) => {
                    let late = i32::from(status) == Errno::ETIMEDOUT.0 && self.admin.pauses_may_fail();
                    let misplaced = i32::from(status) == Errno::ESTALE.0;
                    if !late
                        && !misplaced
                        && !self.admin.passes(status.into())
                        && !self.admin.may_have_lost(&told)
                    {
                        self.world.fail(Invariant::U1, format!("a merge ended with {told:?}"));
                    }
                    return Some(false);
                }
            }
        }
        self.world.fail(Invariant::L1, "a merge does not end");
        None
    }

    async fn commit(&self, disk: &Disk, hold_ns: u64) -> Act {
        if self.begin_commit(disk, hold_ns, hold_ns % 2 == 1).await?.is_none() {
            return Some(());
        }
        let done = self.wait_for_commit(disk).await?;
        disk.merged(self.world, done);
        self.goes_on(disk).await
    }

    /// The disk runs, unless it was said that it could not be resumed.
    async fn goes_on(&self, disk: &Disk) -> Act {
        if self.tapdisk.has_said("it stays paused") {
            self.resume(disk).await?;
        }
        self.runs(disk).await
    }

    /// Merges, below a disk that has as many images as they need.
    pub(super) async fn commits(&self, entity: Entity, disk: &Disk, hold_ns: u64) -> Act {
        let depth = self.world.setting("commit-depth", &[2, 3, 4]);
        for _ in 0..depth {
            let keeps = disk.setup().has_metadata();
            if disk.setup().images_below().len() < depth && self.refusal(disk, keeps).is_none() {
                self.take_snapshot(disk, hold_ns, keeps).await?;
                // Each of them is to get something.
                self.world.sim.sleep_ns(hold_ns >> 2).await;
            }
        }
        match self.world.sim.decide(entity, &BESIDE_MERGE, 0, |d| d.below(7)) {
            0 => self.commit(disk, hold_ns).await,
            beside => self.commit_beside(entity, disk, hold_ns, beside).await,
        }
    }

    /// A merge, and something else meanwhile.
    async fn commit_beside(&self, entity: Entity, disk: &Disk, hold_ns: u64, beside: u64) -> Act {
        if self.begin_commit(disk, hold_ns, false).await?.is_none() {
            return Some(());
        }
        let at = disk.at(self.tapdisk);
        self.world.sim.sleep_ns(hold_ns >> 4).await;
        match beside {
            1 => self.pause_and(disk, hold_ns, "", 0).await?,
            2 => self.reopen(disk, hold_ns, false).await?,
            3 => self.snapshot(entity, disk, hold_ns, true).await?,
            4 => _ = self.admin.ctl(&format!("cancel {at}")).await,
            5 => {
                let (image, base) = disk.merging.borrow().clone()?;
                let format = Kind::mapped(false).model.format();
                let second = self.admin.ctl(&format!("commit {at} -a {format}:{image} -b {base}")).await;
                self.check_second(&second);
            }
            6 => self.misplace(disk).await?,
            _ => {}
        }
        if !self.tapdisk.is_alive() {
            return None;
        }
        let done = self.wait_for_commit(disk).await?;
        disk.merged(self.world, done);
        self.goes_on(disk).await?;
        // The images above one that is partly merged.
        if done { Some(()) } else { self.commit(disk, hold_ns >> 12).await }
    }
}
