//! Disks get snapshots by tap-ctl, under load.
//!
//! ```text
//!   disk ─► A        snapshot -k B:   disk ─► A (new) ─► B
//!                    snapshot -a N:   disk ─► N (new) ─► A
//! ```
//!
//! A guest may notice a delay, never an error. Whenever tapdisk or the power fails, the disk has its old chain or the
//! new one, and what is below a snapshot that was taken no longer changes, until it is merged (`commits.rs`).

use super::Disk;
use super::verbs::{Act, Acts};
use crate::catalog::setup::Setup;
use crate::check::Invariant;
use crate::formats::{self, Kind};
use crate::program::named;
use crate::scenario::Scenario;
use crate::world::World;
use kernel_model::faults::FaultPlan;
use kernel_model::{Inode, StorageConfig};
use sim::{Entity, Label};
use tap_host::Errno;
use tap_images::{ImageSpec, MAX_CHAIN, mark_of, resolve};

/// Snapshots of disks under control.
pub static SNAPSHOTS: Scenario = Scenario {
    name: "snapshots",
    about: "disks get snapshots by tap-ctl under load, and images below them are merged; folders fail; tapdisk is killed; power cuts",
    storage: &|_| StorageConfig {
        faults: FaultPlan { names: true, ..FaultPlan::LATENCY },
        ..StorageConfig::default()
    },
    body: &|w| Box::pin(super::lives(w, super::Part::Snapshots)),
};

/// An act: the delay before it in 24 bits of nanoseconds, which, for how long in 24 bits of nanoseconds, and with which
/// disk.
pub static SNAPSHOT: Label = Label::packed(
    "snapshot",
    "act {n} of the administrator: after so many ns, which, for so many ns, with which disk ({})",
    &[24, 4, 24, 1],
);
/// After how many of its effects tapdisk is killed during a snapshot.
pub static SNAPSHOT_DIES: Label =
    Label::new("snapshot-dies", "tapdisk is killed after {} more of its effects");

/// Kinds of acts, without "none".
pub(super) const ACTS: u64 = 15;
/// How often a task looks whether the new image is there, in nanoseconds: it takes longer to make one.
const LOOK_NS: u64 = 1000;
/// What tap-ctl says when it could not take a snapshot back.
pub(super) const DOUBT: &str = "is the disk in any case";
/// A file that is no image of a disk.
const OTHER: &str = "/images/spare.img";

/// A snapshot that was asked for.
#[derive(Clone)]
pub(super) struct Pending {
    /// The disk's image before.
    old: ImageSpec,
    /// Which file that is.
    number: Option<u64>,
    /// The disk keeps its name.
    keeps: bool,
    /// Where the new image is made.
    made: ImageSpec,
}

impl Disk {
    /// The next snapshot.
    fn plan(&self, world: &World, keeps: bool) -> Pending {
        self.copies.set(self.copies.get() + 1);
        let old = self.setup().spec;
        let path = format!("/images/disk{}-{}.img", self.number, self.copies.get());
        let format = Kind::mapped(false).model.format().into();
        let (number, made) = (world.storage.file_number(&old.path), ImageSpec { format, path });
        Pending { old, number, keeps, made }
    }

    /// The disk has the new image.
    fn took(&self, pending: &Pending) {
        let Pending { old, keeps, made, .. } = pending.clone();
        let setup = self.setup();
        let (top, base) = match keeps {
            true => (ImageSpec { path: old.path, ..made.clone() }, ImageSpec { path: made.path, ..old }),
            false => (made, old),
        };
        *self.setup.borrow_mut() = setup.moved(base).above(top);
    }

    /// Finds out which chain the disk has, after its tapdisk or the power has failed. Until it is open again, and with
    /// that durable, the next power cut may decide otherwise.
    pub(super) fn settle(&self, world: &World, power: bool, doubtful: bool) {
        let pending = self.pending.borrow().clone();
        let merging = self.merging.borrow().is_some();
        self.doubt.set(self.doubt.get() || pending.is_some() || merging);
        let new = pending.as_ref().filter(|pending| !pending.keeps).and_then(|pending| {
            // What was made as a whole is the disk's, whether it was put above the old image or not.
            let content = world.storage.content(&pending.made.path)?;
            let walked = formats::of(pending.made.format).walk_whole(&content)?;
            walked.is_ok().then(|| pending.made.clone())
        });
        self.look(world, new, pending.as_ref());
        // One that could not be taken back goes on with the file that is below the new image.
        if pending.is_some() && !doubtful {
            self.check_durable(world);
        }
        if power {
            self.doubt.set(false);
        }
    }

    /// Looks which files the disk has now, after a merge below it that may have been completed.
    pub(super) fn look_again(&self, world: &World) {
        self.look(world, None, None);
    }

    /// Looks which files the disk has now, with `top` or its own image as the first: other ones than before only if a
    /// snapshot was not answered, or could not be taken back. The file that was written to is among them.
    fn look(&self, world: &World, top: Option<ImageSpec>, pending: Option<&Pending>) {
        let setup = self.setup();
        let top = top.unwrap_or_else(|| match pending {
            // Its type may have changed with the image.
            Some(pending) => pending.old.clone(),
            None => setup.spec.clone(),
        });
        let found = setup.over(top.clone(), chain(world, &top.path));
        let files = |setup: &Setup| setup.files().cloned().collect::<Vec<_>>();
        if files(&found) == files(&setup) {
            return;
        }
        let merged = self.merging.borrow().clone().map(|(_, base)| setup.clone().without(&base));
        if merged.is_some_and(|merged| files(&merged) == files(&found)) {
            *self.setup.borrow_mut() = found;
            return;
        }
        let number = pending.and_then(|pending| pending.number);
        let there = |path: &String| world.storage.file_number(path) == number;
        let whole = number.is_none() || files(&found).iter().any(there);
        if !self.doubt.get() || !whole {
            let text =
                format!("the disk had {}, and has {}", files(&setup).join(", "), files(&found).join(", "));
            world.fail(Invariant::C3, text);
        }
        *self.setup.borrow_mut() = found;
    }

    /// Whoever finds the new image does not write to the one below it, and so does not flush it either.
    fn check_durable(&self, world: &World) {
        let setup = self.setup();
        let Some(base) = setup.files().nth(1) else { return };
        // Its last cluster may be growing to a whole one.
        let pending = |inode: &Inode| !inode.pending.is_empty();
        if world.storage.with_inode(base, pending) == Some(true) && !world.kernel.answers_lost() {
            world.fail(Invariant::C3, format!("{base} is below the disk, but a power cut would change it"));
        }
    }
}

/// The files below the image at `path`, as the headers name them.
fn chain(world: &World, path: &str) -> Vec<String> {
    let model = Kind::mapped(false).model;
    let mut below: Vec<String> = Vec::new();
    while below.len() < MAX_CHAIN {
        let at = below.last().map_or(path, String::as_str);
        let walked = world.storage.content(at).and_then(|content| model.walk(&content)?.ok());
        let Some(name) = walked.and_then(|map| map.backing) else { break };
        below.push(resolve(at, &name));
    }
    below
}

impl Acts<'_> {
    pub(super) async fn act_snapshot(&self, entity: Entity, act: u64, disk: &Disk, hold_ns: u64) -> Act {
        match act {
            1..=3 => self.snapshot(entity, disk, hold_ns, true).await,
            4 | 5 => self.snapshot(entity, disk, hold_ns, false).await,
            6 if hold_ns % 2 == 1 => self.resize(entity, disk, hold_ns).await,
            6 => self.pause_and(disk, hold_ns, "", 0).await,
            7 => self.reopen(disk, hold_ns, false).await,
            8 => self.reopen(disk, hold_ns, true).await,
            9 => self.refused_snapshots(disk).await,
            10 => self.snapshot_beside(disk, hold_ns).await,
            11 => self.snapshot_renamed(disk, hold_ns).await,
            13..=15 => self.commits(entity, disk, hold_ns).await,
            _ => self.copied(disk, hold_ns).await,
        }
    }

    /// `snapshot` with what names the images of `pending`.
    fn line(&self, disk: &Disk, pending: &Pending) -> String {
        let Pending { keeps, made, .. } = pending;
        let names = match keeps {
            true => format!("-k {}", made.path),
            false => format!("-a {}:{}", made.format.name(), made.path),
        };
        format!("snapshot {} {names}", disk.at(self.tapdisk))
    }

    /// With what a snapshot of the disk is refused, if it must be.
    pub(super) fn refusal(&self, disk: &Disk, keeps: bool) -> Option<Errno> {
        let raw = !disk.setup().has_metadata();
        // A copy has another name.
        let own = disk.setup().spec.path == format!("/images/disk{}.img", disk.number);
        match (raw, keeps, own && self.admin.names_bases()) {
            (true, true, _) => Some(Errno::EOPNOTSUPP),
            (true, false, false) => Some(Errno::EACCES),
            _ => None,
        }
    }

    pub(super) async fn snapshot(&self, entity: Entity, disk: &Disk, hold_ns: u64, keeps: bool) -> Act {
        let world = self.world;
        if let Some(error) = self.refusal(disk, keeps) {
            let line = self.line(disk, &disk.plan(world, keeps));
            self.refuse(&line, error).await?;
            return self.runs(disk).await;
        }
        let dies = |d: &mut sim::Draw| if d.below(3) == 0 { 1 + d.below(45) } else { 0 };
        let steps = world.sim.decide(entity, &SNAPSHOT_DIES, 0, dies);
        if steps > 0 {
            self.tapdisk.host.process.node().kill_after_steps(steps);
        }
        self.take_snapshot(disk, hold_ns, keeps).await
    }

    /// A snapshot that nothing refuses.
    pub(super) async fn take_snapshot(&self, disk: &Disk, hold_ns: u64, keeps: bool) -> Act {
        let (world, pending) = (self.world, disk.plan(self.world, keeps));
        let line = self.line(disk, &pending);
        if hold_ns % 4 == 3 {
            // It speaks of a file that had this name before.
            let mark = "partly merged with the image\n/images/somebody\n";
            world.storage.put_bytes(&mark_of(&pending.made.path), mark.as_bytes());
        }
        let inv = disk.setup().history.borrow_mut().begin_flush();
        *disk.pending.borrow_mut() = Some(pending.clone());
        let taken = self.admin.ctl(&line).await;
        if !self.tapdisk.is_alive() {
            return None;
        }
        disk.pending.take();
        if taken.status == 0 {
            disk.setup().history.borrow_mut().end_flush(inv);
            disk.took(&pending);
            disk.look(world, None, None);
            disk.check_durable(world);
            let base = if keeps { &pending.made.path } else { &pending.old.path };
            let bytes = world.storage.bytes(base).unwrap_or_default();
            disk.left.borrow_mut().push((base.clone(), bytes));
            return self.runs(disk).await;
        }
        self.failed(disk, &pending, hold_ns, &taken).await
    }

    /// The snapshot was not taken: the disk runs with the file that it had, whatever that is called.
    async fn failed(
        &self,
        disk: &Disk,
        pending: &Pending,
        hold_ns: u64,
        taken: &super::admin::Outcome,
    ) -> Act {
        let late = i32::from(taken.status) == Errno::ETIMEDOUT.0 && self.admin.pauses_may_fail();
        // A folder that cannot be synchronised.
        let folder = i32::from(taken.status) == Errno::EIO.0;
        if !late && !folder && !self.admin.may_have_lost(taken) {
            self.world.fail(Invariant::U1, format!("tap-ctl snapshot ended with {taken:?}"));
        }
        let before = disk.setup().files().count();
        let told = taken.err.contains(DOUBT);
        disk.doubt.set(disk.doubt.get() || told);
        disk.look(self.world, None, Some(pending));
        if disk.setup().files().count() != before {
            // The chain is that of its name once it is opened again.
            return self.pause_and(disk, hold_ns, "", 0).await;
        }
        let left = self.world.storage.file_number(&pending.made.path).is_some();
        if left && !told {
            let text = format!("a snapshot that failed has left {}: {taken:?}", pending.made.path);
            self.world.fail(Invariant::U1, text);
        }
        self.runs(disk).await
    }

    /// What must be refused, and changes nothing.
    async fn refused_snapshots(&self, disk: &Disk) -> Act {
        let (at, own) = (disk.at(self.tapdisk), disk.setup().spec);
        let format = Kind::mapped(false).model.format();
        self.refuse(&format!("snapshot {at} -a raw:/images/none.img"), Errno::EOPNOTSUPP).await?;
        self.refuse(&format!("snapshot {at} -a {format}:{}", own.path), Errno::EEXIST).await?;
        if self.refusal(disk, false).is_none() {
            self.refuse(&format!("snapshot {at} -a {format}:{OTHER}"), Errno::EEXIST).await?;
        }
        self.refuse(&format!("commit {at} -a {} -b {OTHER}", named(&own)), Errno::EBUSY).await?;
        self.refuse(&format!("commit {at} -a {format}:{OTHER} -b {OTHER}"), Errno::ENOENT).await?;
        if self.pause(disk).await? {
            self.refuse(&format!("commit {at} -a {format}:{OTHER} -b {OTHER}"), Errno::EINVAL).await?;
            let line = self.line(disk, &disk.plan(self.world, disk.setup().has_metadata()));
            self.refuse(&line, Errno::EINVAL).await?;
            self.done(&format!("unpause {at}")).await?;
        }
        self.runs(disk).await
    }

    /// The disk's name has another file: that one is not given away.
    async fn snapshot_renamed(&self, disk: &Disk, hold_ns: u64) -> Act {
        let (storage, path) = (&self.world.storage, disk.setup().spec.path);
        let keeps = disk.setup().has_metadata();
        if self.refusal(disk, keeps).is_some() {
            return Some(());
        }
        let pending = disk.plan(self.world, keeps);
        let (aside, made) = (format!("{path}.aside"), pending.made.path.clone());
        let rename = {
            let (storage, path, aside) = (storage.clone(), path.clone(), aside.clone());
            move || {
                storage.rename(&path, &aside);
                storage.put(&path, storage.content(&aside).unwrap_or_default());
            }
        };
        // Before it is asked for, or once the new image is being made.
        let late = keeps && hold_ns % 2 == 1;
        if late {
            let (sim, storage, alive) = (self.world.sim.clone(), storage.clone(), self.tapdisk.clone());
            self.world.sim.spawn("renames", 0, async move {
                while alive.is_alive() && storage.file_number(&made).is_none() {
                    sim.sleep_ns(LOOK_NS).await;
                }
                rename();
            });
        } else {
            rename();
        }
        let refused = self.admin.ctl(&self.line(disk, &pending)).await;
        if storage.file_number(&aside).is_none() {
            // The new image could not be made, or was gone at once.
            return self.tapdisk.is_alive().then_some(());
        }
        if storage.file_number(&aside) != pending.number || storage.file_number(&path) == pending.number {
            let text = format!("a snapshot gave away the file that has the disk's name by now: {refused:?}");
            self.world.fail(Invariant::U1, text);
        }
        storage.rename(&aside, &path);
        if !self.tapdisk.is_alive() {
            return None;
        }
        let left = storage.file_number(&pending.made.path).is_some();
        let folder = self.admin.passes(refused.status.into());
        let slow = i32::from(refused.status) == Errno::ETIMEDOUT.0 && self.admin.pauses_may_fail();
        if left || !folder && !slow && i32::from(refused.status) != Errno::ESTALE.0 {
            let text = format!("a snapshot of a disk whose name has another file: {refused:?}, left {left}");
            self.world.fail(Invariant::U1, text);
        }
        self.runs(disk).await
    }

    /// The disk goes on with a copy of its image that nobody has made durable, neither its bytes nor its name.
    async fn copied(&self, disk: &Disk, hold_ns: u64) -> Act {
        if !self.pause(disk).await? {
            return Some(());
        }
        let (storage, setup) = (&self.world.storage, disk.setup());
        disk.copies.set(disk.copies.get() + 1);
        let path = format!("/images/disk{}-{}.img", disk.number, disk.copies.get());
        let bytes = storage.bytes(&setup.spec.path).unwrap_or_default();
        self.admin.write_file(&path, &bytes).await;
        let mut spec = ImageSpec { path: path.clone(), ..setup.spec.clone() };
        let mut below: Vec<String> = setup.files().skip(1).cloned().collect();
        if setup.has_metadata() && hold_ns % 2 == 1 {
            // The copy is below an image that is durable itself.
            disk.copies.set(disk.copies.get() + 1);
            let top = format!("/images/disk{}-{}.img", disk.number, disk.copies.get());
            if self.admin.overlay(&spec, &top).await {
                below.insert(0, std::mem::replace(&mut spec.path, top));
            }
        }
        self.world.sim.sleep_ns(hold_ns).await;
        let (made, doubted) = (storage.bytes(&spec.path), disk.doubt.replace(false));
        let line = format!("unpause {} -a {}", disk.at(self.tapdisk), named(&spec));
        let resumed = self.admin.ctl(&line).await;
        if self.tapdisk.is_alive() && self.admin.passes(resumed.status.into()) {
            // It goes on with its own image, unless that cannot be made durable either.
            self.resume(disk).await?;
            return self.runs(disk).await;
        }
        // Without an answer the copy is the disk's only if it was written to: otherwise both show the same.
        let alive = self.tapdisk.is_alive();
        if alive || storage.bytes(&spec.path) != made {
            disk.left.borrow_mut().push((setup.spec.path.clone(), bytes));
            *disk.setup.borrow_mut() = setup.over(spec, below);
        } else {
            disk.doubt.set(doubted);
        }
        if !alive {
            return None;
        }
        if resumed.status != 0 {
            self.world.fail(Invariant::U1, format!("tap-ctl {line} ended with {resumed:?}"));
        }
        self.runs(disk).await
    }

    /// The disk runs, whether it was paused or not.
    pub(super) async fn resume(&self, disk: &Disk) -> Act {
        let line = format!("unpause {}", disk.at(self.tapdisk));
        let mut resumed = self.admin.ctl(&line).await;
        while self.tapdisk.is_alive() && self.admin.passes(resumed.status.into()) {
            resumed = self.admin.ctl(&line).await;
        }
        if self.tapdisk.is_alive() && ![0, Errno::EINVAL.0].contains(&i32::from(resumed.status)) {
            self.world.fail(Invariant::U1, format!("a disk is not resumed: {resumed:?}"));
        }
        self.tapdisk.is_alive().then_some(())
    }

    /// A snapshot and a pause at the same time.
    async fn snapshot_beside(&self, disk: &Disk, hold_ns: u64) -> Act {
        if self.refusal(disk, true).is_some() {
            return Some(());
        }
        let pending = disk.plan(self.world, true);
        *disk.pending.borrow_mut() = Some(pending.clone());
        let lines = [self.line(disk, &pending), format!("pause {}", disk.at(self.tapdisk))];
        let outcomes = self.at_once(lines, hold_ns).await;
        if !self.tapdisk.is_alive() {
            return None;
        }
        disk.pending.take();
        if outcomes[0].status == 0 {
            disk.took(&pending);
        }
        let told = outcomes[0].err.contains(DOUBT);
        disk.doubt.set(disk.doubt.get() || told);
        disk.look(self.world, None, Some(&pending));
        // The pause may have come too late.
        self.resume(disk).await?;
        if told {
            return self.pause_and(disk, hold_ns, "", 0).await;
        }
        self.runs(disk).await
    }
}
