//! What an administrator does with a disk under load.

use super::admin::{Admin, Outcome, Tapdisk, check_let_go, image};
use super::listeners::Listening;
use super::{DISK_BYTES, Disk, Part};
use crate::check::Invariant;
use crate::formats::{self, Kind};
use crate::guest::RawNbd;
use crate::program::named;
use crate::world::World;
use kernel_model::{ProcessFile, SimHost};
use sim::{Entity, Label};
use std::cell::RefCell;
use std::rc::Rc;
use tap_control::{FOLDER, socket_of};
use tap_core::wait::joined;
use tap_host::{Errno, File, Files, LockKind, OpenMode, SocketAddress, Sockets, Whereabouts};
use tap_images::ImageSpec;

/// An act: the delay before it in 24 bits of nanoseconds, which, for how long in 24 bits of nanoseconds, and with which
/// disk.
pub static CONTROL: Label = Label::packed(
    "control",
    "act {n} of the administrator: after so many ns, which, for so many ns, with which disk ({})",
    &[24, 4, 24, 1],
);
/// Three calls of tap-ctl at the same time: for each the delay in 12 bits of microseconds, and which.
pub static RACE: Label = Label::packed(
    "control-race",
    "three calls of tap-ctl beside one another: each after so many us, and which; whether the disk is open ({})",
    &[12, 4, 12, 4, 12, 4, 1],
);
/// After how many of its effects a tap-ctl gives up.
pub static GIVES_UP: Label = Label::new("control-gives-up", "tap-ctl is killed after {} of its effects");
/// How many bytes of a request a client of the control socket sends.
pub static CUT_REQUEST: Label = Label::new("control-cut", "a client of the control socket sends {} bytes");

/// Longer than the watchdog of a disk allows, in nanoseconds.
const LONG_NS: u64 = 1_300_000_000;
/// Kinds of acts, without "none".
pub(super) const ACTS: u64 = 15;
/// A raw image of half the size.
const SMALL: &str = "/images/small.img";
/// A raw image that another process has.
const BUSY: &str = "/images/busy.img";
/// The image of a disk that no guest uses.
const SPARE: &str = "/images/spare.img";

/// Longer than bytes are on their way to a socket.
const ARRIVED_NS: u64 = 10_000_000;

/// Makes the images that are not those of the disks.
pub(super) fn make_others(world: &World) {
    for (path, bytes) in [(SMALL, DISK_BYTES / 2), (BUSY, DISK_BYTES), (SPARE, 64 << 10)] {
        world.storage.put(path, formats::content_of(&vec![0; bytes as usize]));
    }
}

/// The acts of one life of tapdisk.
pub(super) struct Acts<'a> {
    pub(super) world: &'a World,
    pub(super) admin: &'a Rc<Admin>,
    pub(super) tapdisk: &'a Tapdisk,
    pub(super) listening: &'a Listening,
    pub(super) disks: &'a [Rc<Disk>],
    pub(super) epoch: u32,
}

/// `None` once tapdisk has died: the act has no outcome.
pub(super) type Act = Option<()>;

impl Acts<'_> {
    /// Two commands at the same time, either of which may be the first; how they ended, in their order.
    pub(super) async fn at_once(&self, lines: [String; 2], hold_ns: u64) -> Vec<Outcome> {
        let mut ends = Vec::new();
        for (n, line) in (0..).zip(lines) {
            let (admin, sim) = (Rc::clone(self.admin), self.world.sim.clone());
            let (task, end) = joined(async move {
                sim.sleep_ns(if n == hold_ns % 2 { hold_ns >> 8 } else { 0 }).await;
                admin.ctl(&line).await
            });
            self.world.sim.spawn("beside", n, task);
            ends.push(end);
        }
        let mut outcomes = Vec::new();
        for end in ends {
            outcomes.extend(end.await);
        }
        outcomes
    }

    pub(super) async fn act(&self, entity: Entity, act: u64, disk: &Disk, hold_ns: u64) -> Act {
        match act {
            1 => self.pause_and(disk, hold_ns, "", 0).await,
            2 => self.replace(disk, hold_ns).await,
            3 => self.pause_and(disk, hold_ns, "-a raw:/images/none.img", Errno::ENOENT.0).await,
            4 => self.pause_and(disk, hold_ns, &format!("-a raw:{SMALL}"), Errno::EMEDIUMTYPE.0).await,
            5 => self.busy(disk, hold_ns).await,
            6 | 7 if hold_ns % 4 == 3 => self.shown_anew(disk, hold_ns, act == 7).await,
            6 | 7 => self.reopen(disk, hold_ns, act == 7).await,
            8 => self.look(disk, hold_ns).await,
            9 => self.refused(disk).await,
            10 => self.strangers(entity, disk, hold_ns).await,
            11 => self.strand(disk, hold_ns).await,
            12 => self.crowd(disk, hold_ns).await,
            13 => self.two_minors().await,
            14 => self.renamed(disk, hold_ns).await,
            _ => self.race(entity).await,
        }
    }

    pub(super) async fn done(&self, line: &str) -> Act {
        match self.admin.part {
            Part::Control => self.admin.expect(self.tapdisk, line, 0).await.map(drop),
            Part::Snapshots => self.admin.persist(self.tapdisk, line).await.map(drop),
        }
    }

    pub(super) async fn refuse(&self, line: &str, error: Errno) -> Act {
        self.admin.expect(self.tapdisk, line, error.0).await.map(drop)
    }

    /// Pauses the disk: what was answered before is durable, and the files are nobody's. False if its requests did not
    /// end in time, and it went on.
    pub(super) async fn pause(&self, disk: &Disk) -> Option<bool> {
        let (setup, line) = (disk.setup(), format!("pause {}", disk.at(self.tapdisk)));
        let inv = setup.history.borrow_mut().begin_flush();
        let paused = self.admin.ctl(&line).await;
        if !self.tapdisk.is_alive() {
            return None;
        }
        let late = i32::from(paused.status) == Errno::ETIMEDOUT.0 && self.admin.pauses_may_fail();
        if late || self.admin.may_have_lost(&paused) {
            return self.runs(disk).await.map(|()| false);
        }
        if paused.status != 0 {
            self.world.fail(Invariant::U1, format!("tap-ctl {line} ended with {paused:?}"));
        }
        setup.history.borrow_mut().end_flush(inv);
        check_let_go(self.world, &setup, "while its disk is paused");
        Some(true)
    }

    async fn hold(&self, disk: &Disk, hold_ns: u64) -> Act {
        self.world.sim.sleep_ns(hold_ns).await;
        if !self.tapdisk.is_alive() {
            return None;
        }
        check_let_go(self.world, &disk.setup(), "while its disk is paused");
        self.listed(disk, "paused").await?;
        self.known().await
    }

    /// The disk, of which so many requests wait, stays paused for longer than its watchdog allows: that must be said,
    /// and that they wait for the resume.
    async fn hold_long(&self, disk: &Disk, waiting: u64) -> Act {
        let own = |(minor, _): &(u32, Whereabouts)| disk.minor.get().map(u32::from) == Some(*minor);
        // tap-ctl may have learned late that the disk was paused.
        let before = self.admin.hangs.take();
        let before = before.iter().any(|hang| own(hang) && hang.1 == Whereabouts::Paused);
        self.hold(disk, LONG_NS).await?;
        let said: Vec<_> = self.admin.hangs.borrow().iter().copied().filter(own).collect();
        let right = said.iter().all(|(_, at)| *at == Whereabouts::Paused)
            && (before || said.is_empty() <= (waiting == 0));
        if !right {
            let text =
                format!("{waiting} requests waited for {LONG_NS} ns for a paused disk, and it said {said:?}");
            self.world.fail(Invariant::U1, text);
        }
        Some(())
    }

    /// Pauses the disk, and resumes it with `options`, which has this status; one that fails leaves the disk running.
    pub(super) async fn pause_and(&self, disk: &Disk, hold_ns: u64, options: &str, status: i32) -> Act {
        self.admin.hangs.borrow_mut().clear();
        if !self.pause(disk).await? {
            return Some(());
        }
        self.hold(disk, hold_ns / 2).await?;
        let (waiting, since_ns) = (self.waiting(disk).await?, self.world.sim.now_ns());
        if hold_ns.is_multiple_of(4) {
            self.hold_long(disk, waiting).await?;
        }
        self.hold(disk, hold_ns / 2).await?;
        let held_ns = self.world.sim.now_ns() - since_ns;
        let line = format!("unpause {} {options}", disk.at(self.tapdisk));
        match status {
            0 => self.done(&line).await?,
            _ => _ = self.admin.expect(self.tapdisk, &line, status).await?,
        }
        self.runs(disk).await?;
        if waiting > 0 { self.measured(disk, held_ns).await } else { Some(()) }
    }

    /// The disk runs with its own image.
    pub(super) async fn runs(&self, disk: &Disk) -> Act {
        let setup = disk.setup();
        let line = format!("list -p {} -m {}", self.tapdisk.pid(), disk.minor.get().unwrap_or_default());
        let listed = self.admin.expect(self.tapdisk, &line, 0).await?;
        // A merge that ends pauses it for a moment, and its base is written to.
        let merging = disk.merging.borrow().is_some();
        let end = format!("{}args={}", if merging { "" } else { "state=0 " }, named(&setup.spec));
        if !listed.out.first().is_some_and(|row| row.ends_with(&end)) {
            let text = format!("a running disk is listed as {:?}, not with {end}", listed.out);
            self.world.fail(Invariant::U1, text);
        }
        if !merging {
            setup.check_locks(self.world, false);
        }
        Some(())
    }

    /// Gives the disk a copy of its image.
    async fn replace(&self, disk: &Disk, hold_ns: u64) -> Act {
        if !self.pause(disk).await? {
            return Some(());
        }
        self.hold(disk, hold_ns).await?;
        let (world, setup) = (self.world, disk.setup());
        disk.copies.set(disk.copies.get() + 1);
        let path = format!("/images/disk{}-{}.img", disk.number, disk.copies.get());
        let mut spec = ImageSpec { path: path.clone(), ..setup.spec.clone() };
        if hold_ns.is_multiple_of(2) {
            // In another format.
            let mapped = Kind::mapped(false).model.format().into();
            spec.format = if setup.has_metadata() { formats::RAW } else { mapped };
            if !self.admin.convert(&setup.spec, &spec).await {
                return None;
            }
        } else {
            let content = world.storage.content(&setup.spec.path).unwrap_or_default();
            // A device has other block sizes than a file.
            match setup.has_metadata() || hold_ns % 4 == 1 {
                true => world.storage.put(&path, content),
                false => world.storage.put_device(&path, content),
            }
        }
        let made = world.storage.bytes(&path);
        let line = format!("unpause {} -a {}", disk.at(self.tapdisk), named(&spec));
        let resumed = self.admin.expect(self.tapdisk, &line, 0).await;
        // Without an answer the copy is the disk's only if it was written to: otherwise both show the same.
        if resumed.is_some() || world.storage.bytes(&path) != made {
            disk.move_to(world, spec);
        }
        resumed?;
        self.runs(disk).await
    }

    /// Another process that has the file at `path`, which nobody else has.
    async fn holder(&self, path: &str) -> Option<(SimHost, ProcessFile)> {
        let other = SimHost::start(&self.world.kernel, &self.world.xen, "another", self.world.sim.now_ns());
        let mode = OpenMode { direct: self.admin.limits.direct, ..OpenMode::WRITE };
        let Ok(file) = other.open(path, mode).await else {
            self.world.fail(Invariant::U1, format!("{path}, which nobody has, cannot be opened"));
            return None;
        };
        if file.lock(LockKind::Exclusive).await.is_err() && self.tapdisk.is_alive() {
            self.world.fail(Invariant::D1, format!("{path}, which nobody has, is locked"));
        }
        Some((other, file))
    }

    /// Resumes the disk with an image that another process has.
    async fn busy(&self, disk: &Disk, hold_ns: u64) -> Act {
        let (other, file) = self.holder(BUSY).await?;
        let resumed = self.pause_and(disk, hold_ns, &format!("-a raw:{BUSY}"), Errno::EAGAIN.0).await;
        drop(file);
        other.closed().await;
        resumed
    }

    /// Runs a close to its end: one that is forced may be told that it takes longer.
    async fn close(&self, line: &str) -> Option<Outcome> {
        loop {
            let closed = self.admin.ctl(line).await;
            if !self.tapdisk.is_alive() {
                return None;
            }
            if i32::from(closed.status) != Errno::ETIMEDOUT.0 || !self.admin.pauses_may_fail() {
                return Some(closed);
            }
        }
    }

    /// Closes the disk, perhaps while it is paused or by force, and opens it again. Its guest connects again.
    pub(super) async fn reopen(&self, disk: &Disk, hold_ns: u64, paused: bool) -> Act {
        let (setup, at) = (disk.setup(), disk.at(self.tapdisk));
        let paused = paused && self.pause(disk).await?;
        if paused {
            self.hold(disk, hold_ns).await?;
        }
        let force = if hold_ns.is_multiple_of(2) { "-f" } else { "" };
        let inv = setup.history.borrow_mut().begin_flush();
        let line = format!("close {force} {at}");
        self.admin.priorities.closing(disk.number);
        let closed = self.close(&line).await?;
        self.admin.priorities.closed(disk.number);
        if closed.status == 0 {
            setup.history.borrow_mut().end_flush(inv);
        } else if !self.admin.may_have_lost(&closed) {
            self.world.fail(Invariant::U1, format!("tap-ctl {line} ended with {closed:?}"));
        }
        check_let_go(self.world, &setup, "after a close");
        self.world.sim.sleep_ns(hold_ns).await;
        self.refuse(&format!("pause {at}"), Errno::EINVAL).await?;
        self.done(&format!("open {at} {}", image(&setup.spec, &self.admin.limits))).await?;
        self.admin.priorities.opened(disk.number);
        self.runs(disk).await
    }

    /// Asks for what can be known.
    async fn look(&self, disk: &Disk, hold_ns: u64) -> Act {
        self.runs(disk).await?;
        self.listed(disk, "running").await?;
        self.counted(disk).await?;
        let pid = self.admin.expect(self.tapdisk, &format!("pid -p {}", self.tapdisk.pid()), 0).await?;
        if pid.out != [self.tapdisk.pid().to_string()] {
            self.world.fail(Invariant::U1, format!("a tapdisk says that its number is {:?}", pid.out));
        }
        if hold_ns.is_multiple_of(2) { Some(()) } else { self.shown(disk).await }
    }

    /// What must be refused, and changes nothing.
    async fn refused(&self, disk: &Disk) -> Act {
        let (at, minor) = (disk.at(self.tapdisk), disk.minor.get().unwrap_or_default());
        let opens = image(&disk.setup().spec, &self.admin.limits);
        self.refuse(&format!("attach {at}"), Errno::EEXIST).await?;
        self.refuse(&format!("open {at} {opens}"), Errno::EALREADY).await?;
        self.refuse(&format!("detach {at}"), Errno::EBUSY).await?;
        let freed = self.admin.ctl(&format!("free -m {minor}")).await;
        if freed.status == 0 {
            // Right, if the tapdisk has just died.
            disk.minor.set(None);
        }
        if !self.tapdisk.is_alive() {
            return None;
        }
        if i32::from(freed.status) != Errno::EBUSY.0 {
            self.world.fail(Invariant::U1, format!("a minor number in use was freed: {freed:?}"));
        }
        self.refuse(&format!("unpause {at}"), Errno::EINVAL).await?;
        self.refuse(&format!("attach -p {} -m 4711", self.tapdisk.pid()), Errno::ENOENT).await?;
        let second = self.admin.spawn_beside().await?;
        let taken = self.admin.ctl(&format!("attach -p {} -m {minor}", second.pid())).await;
        second.host.process.ask_to_stop();
        second.ended().await;
        if !self.tapdisk.is_alive() {
            return None;
        }
        if i32::from(taken.status) != Errno::EBUSY.0 {
            self.world.fail(Invariant::U1, format!("a second tapdisk took a minor number: {taken:?}"));
        }
        self.runs(disk).await
    }

    /// Others at the control sockets: one that sends half a request, one whose request is none, a tap-ctl that gives
    /// up.
    async fn strangers(&self, entity: Entity, disk: &Disk, hold_ns: u64) -> Act {
        let sim = &self.world.sim;
        let host = SimHost::start(&self.world.kernel, &self.world.xen, "stranger", entity.0);
        let address = SocketAddress::Unix(socket_of(FOLDER, self.tapdisk.pid()));
        let len = sim.decide(entity, &CUT_REQUEST, 0, |d| d.below(600));
        if let Ok(stream) = host.connect(&address).await {
            let garbage: Vec<u8> = (0..len).map(|i| sim::mix(entity.0 ^ i) as u8).collect();
            let _broken = RawNbd::new(stream).send(&garbage).await;
            sim.sleep_ns(hold_ns).await;
        }
        self.strangers_of_json(entity, &host, hold_ns).await?;
        let steps = sim.decide(entity, &GIVES_UP, 0, |d| 1 + d.below(12));
        self.admin.give_up(&format!("pause {}", disk.at(self.tapdisk)), steps).await;
        // What it had sent arrives before the next request: later it would pause the disk once more.
        sim.sleep_ns(ARRIVED_NS).await;
        if !self.tapdisk.is_alive() {
            return None;
        }
        // It may have asked before it gave up: paused or not, the disk is paused now.
        self.pause_and(disk, hold_ns, "", 0).await
    }

    /// A resume with a missing image fails and leaves the disk paused; otherwise `wrong` is what happened.
    async fn stays_paused(&self, disk: &Disk, hold_ns: u64, wrong: &str) -> Act {
        let unpause = format!("unpause {} -a raw:/images/none.img", disk.at(self.tapdisk));
        self.refuse(&unpause, Errno::ENOENT).await?;
        let line = format!("list -p {} -m {}", self.tapdisk.pid(), disk.minor.get().unwrap_or_default());
        let listed = self.admin.expect(self.tapdisk, &line, 0).await;
        if listed.is_some_and(|listed| !listed.out.first().is_some_and(|row| row.contains("state=0x22a "))) {
            self.world.fail(Invariant::U1, wrong);
        }
        self.world.sim.sleep_ns(hold_ns).await;
        Some(())
    }

    /// A disk whose own image cannot be opened again stays paused until it can.
    async fn strand(&self, disk: &Disk, hold_ns: u64) -> Act {
        if !self.pause(disk).await? {
            return Some(());
        }
        let (setup, at) = (disk.setup(), disk.at(self.tapdisk));
        let (other, file) = self.holder(&setup.spec.path).await?;
        let refused = self.stays_paused(disk, hold_ns, "a disk without image is not listed as paused").await;
        drop(file);
        other.closed().await;
        refused?;
        self.done(&format!("unpause {at}")).await?;
        self.runs(disk).await
    }

    /// While a disk is paused its image gets another name, and another file its own: the disk does not go on with that
    /// one because it cannot have a third.
    async fn renamed(&self, disk: &Disk, hold_ns: u64) -> Act {
        if !self.pause(disk).await? {
            return Some(());
        }
        let (storage, setup, at) = (&self.world.storage, disk.setup(), disk.at(self.tapdisk));
        let (path, aside) = (setup.spec.path.clone(), format!("{}.aside", setup.spec.path));
        storage.rename(&path, &aside);
        storage.put(&path, storage.content(&aside).unwrap_or_default());
        let refused =
            self.stays_paused(disk, hold_ns, "a disk went on with another file of the same name").await;
        storage.rename(&aside, &path);
        refused?;
        self.done(&format!("unpause {at}")).await?;
        self.runs(disk).await
    }

    /// Two that allocate at the same time get two minor numbers.
    async fn two_minors(&self) -> Act {
        let minors = Rc::new(RefCell::new(Vec::new()));
        let ends = [0, 1].map(|i| {
            let (admin, own) = (Rc::clone(self.admin), Rc::clone(&minors));
            let (task, end) = joined(async move {
                let allocated = admin.ctl("allocate").await;
                own.borrow_mut().extend(super::minor_in(&allocated.out));
            });
            self.world.sim.spawn("allocate", i, task);
            end
        });
        for end in ends {
            end.await;
        }
        let minors = minors.take();
        if minors.len() != 2 || minors[0] == minors[1] {
            self.world.fail(Invariant::U1, format!("two that allocated a minor number got {minors:?}"));
            return None;
        }
        for minor in minors {
            let freed = self.admin.ctl(&format!("free -m {minor}")).await;
            if freed.status != 0 {
                self.world
                    .fail(Invariant::U1, format!("a minor number that nobody has is not freed: {freed:?}"));
            }
        }
        self.tapdisk.is_alive().then_some(())
    }

    /// Several calls about one minor number at the same time. Whatever their order was, it can be given back, and then
    /// nobody has the image.
    async fn race(&self, entity: Entity) -> Act {
        self.admin.nobody_has(SPARE).await;
        let outcome = self.admin.expect(self.tapdisk, "allocate", 0).await?;
        let minor = super::minor_in(&outcome.out)?;
        let at = format!("-p {} -m {minor}", self.tapdisk.pid());
        self.done(&format!("attach {at}")).await?;
        let cached = if self.admin.limits.direct { "" } else { "-D" };
        let lines = [
            format!("open {at} -a raw:{SPARE} {cached}"),
            format!("close {at}"),
            format!("detach {at}"),
            format!("pause {at}"),
            format!("unpause {at}"),
            format!("close -f {at}"),
            format!("attach {at}"),
        ];
        let sim = &self.world.sim;
        let kinds = lines.len() as u64;
        let value = sim.decide(entity, &RACE, 0, |d| {
            let mut one = || d.magnitude(8) | (1 + d.below(kinds)) << 12;
            one() | one() << 16 | one() << 32 | d.below(2) << 48
        });
        if value >> 48 == 1 {
            self.done(&lines[0]).await?;
        }
        let mut ends = Vec::new();
        for i in 0..3 {
            let (after_us, which) = (value >> (16 * i) & 0xfff, value >> (16 * i + 12) & 0xf);
            let Some(line) = which.checked_sub(1).and_then(|which| lines.get(which as usize)).cloned() else {
                continue;
            };
            let (admin, own) = (Rc::clone(self.admin), sim.clone());
            let (task, end) = joined(async move {
                own.sleep_ns(after_us * 1000).await;
                admin.ctl(&line).await;
            });
            sim.spawn("race", i, task);
            ends.push(end);
        }
        for end in ends {
            end.await;
        }
        if !self.tapdisk.is_alive() {
            return None;
        }
        for verb in ["close", "detach"] {
            let outcome = self.admin.ctl(&format!("{verb} {at}")).await;
            if self.admin.may_have_lost(&outcome) {
                continue;
            }
            if self.tapdisk.is_alive() && ![0, Errno::ENODEV.0].contains(&i32::from(outcome.status)) {
                self.world.fail(Invariant::U1, format!("tap-ctl {verb} {at} ended with {outcome:?}"));
            }
        }
        self.done(&format!("free -m {minor}")).await?;
        let locks = self.world.storage.locks(SPARE);
        if !locks.is_empty() {
            let text = format!("minor {minor} was given back, but {SPARE} has the locks {locks:?}");
            self.world.fail(Invariant::K1, text);
        }
        Some(())
    }
}
