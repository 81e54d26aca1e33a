//! Disks that tap-ctl opened and tapback gives to guests.
//!
//! ```text
//!   guest ─ Blkfront ═ ring ═════════════════╗
//!     │ xenstore                             tapdisk control ─ disk ─ image ─ Storage   (may be killed)
//!   tapback ── XENBLKIF_CONNECT ══ ctl<pid> ═╣  (may be killed)
//!   administrator ─ tap-ctl ═════════════════╝
//! ```
//!
//! Whatever dies, is paused, closed by force or replaced: the guest waits, and its requests are carried out once. A
//! device that is closed has none of its pages mapped by anybody.

mod growth;
mod keeper;

use super::Part;
use super::admin::{Admin, check_let_go, image};
use super::minor_in;
use crate::catalog::away;
use crate::catalog::ring::{NO_ERRORS, error_policy, in_guest, kills, not_stuck, operations_of};
use crate::catalog::setup::{Setup, check_pages, cut_after_close_beside};
use crate::catalog::toolstack::refuse;
use crate::check::Invariant;
use crate::formats::{self, Kind};
use crate::guest::{Guest, Hostile, RingDisk};
use crate::machine::{Attached, Machine, Script, XVDB};
use crate::scenario::Scenario;
use crate::world::World;
use growth::Growth;
use keeper::{Keeper, PATH_KEY};
use sim::{Entity, Label};
use std::rc::Rc;
use tap_core::wait::{Receiver, joined};
use tap_host::{Errno, Xenstore, select};
use xen_model::VbdPaths;

/// Guests that get their disks from tapback.
pub static GIVEN: Scenario = Scenario {
    name: "given",
    about: "guests on rings of disks that tap-ctl opened; tapback and tapdisk are killed, stopped and replaced, disks paused, closed by force and made larger",
    storage: &|_| not_stuck(),
    body: &|w| Box::pin(given(w)),
};

/// An act: the delay before it in 24 bits of nanoseconds, which, and for how long in 24 bits of nanoseconds.
pub static GIVEN_ACT: Label = Label::packed(
    "given-act",
    "act {n} of the administrator: after so many ns, which, for so many ns ({})",
    &[24, 4, 24],
);

/// Kinds of acts, without "none".
const ACTS: u64 = 11;
const DISK_BYTES: u64 = 512 << 10;
/// A raw image of another size.
const OTHER: &str = "/images/other.img";
/// A raw image of the same size.
const TWIN: &str = "/images/twin.img";
/// Longer than tapback looks for a disk, and than a drive takes.
const SETTLED_NS: u64 = 40_000_000_000;

/// The administrator's acts under load.
struct Acts<'a> {
    world: &'a World,
    keeper: &'a Rc<Keeper>,
    machine: &'a Rc<Machine>,
    disk: &'a Attached,
    growth: &'a Rc<Growth>,
}

impl Acts<'_> {
    async fn run(&self) {
        let entity = Entity::WORLD.child("given-admin", 0);
        let sim = &self.world.sim;
        sim.name_entity(entity, || "the administrator".into());
        for n in 0..self.world.setting("given-acts", &[4, 2, 8]) {
            let value = sim.decide(entity, &GIVEN_ACT, n, |d| {
                d.magnitude(22) | (1 + d.below(ACTS)) << 24 | d.magnitude(22) << 28
            });
            let (after_ns, act, hold_ns) = (value & 0xff_ffff, value >> 24 & 0xf, value >> 28 & 0xff_ffff);
            if act == 0 {
                continue;
            }
            sim.sleep_ns(after_ns).await;
            self.act(act, hold_ns).await;
        }
    }

    async fn ctl(&self, verb: &str) -> Option<u8> {
        self.keeper.ctl(self.disk, verb).await
    }

    async fn act(&self, act: u64, hold_ns: u64) -> Option<()> {
        let (sim, keeper) = (&self.world.sim, self.keeper);
        match act {
            1 => {
                let before = keeper.alive()?.pid();
                let paused = self.ctl("pause").await? == 0;
                sim.sleep_ns(hold_ns).await;
                if paused && keeper.alive()?.pid() == before {
                    self.resume().await?;
                }
            }
            2 => self.refuse_close().await?,
            3 => self.keeper.force_closed(self.disk, hold_ns).await?,
            4 => self.stop_tapdisk().await,
            5 => self.replace_tapback(hold_ns).await,
            6 => {
                let paused = self.ctl("pause").await? == 0;
                if paused {
                    self.refuse_close().await?;
                    self.keeper.force_closed(self.disk, hold_ns).await?;
                }
            }
            7 => {
                self.ctl("pause").await?;
                sim.sleep_ns(hold_ns).await;
                // What waits is not answered, and not lost.
                keeper.repeated();
                self.stop_tapdisk().await;
            }
            8 => {
                if let Some(host) = self.machine.tapdisk() {
                    host.process.ask_to_stop();
                }
                let _done_or_dead = self.keeper.force_closed(self.disk, hold_ns).await;
                self.replace_tapback(0).await;
            }
            9 => self.other_image(hold_ns).await?,
            10 => self.other_disk(hold_ns).await?,
            _ => self.grow(hold_ns).await?,
        }
        Some(())
    }

    async fn resume(&self) -> Option<()> {
        match self.ctl("unpause").await? {
            0 => Some(()),
            status => {
                self.world.fail(Invariant::U1, format!("tap-ctl unpause ended with {status}"));
                None
            }
        }
    }

    /// A disk that a guest uses is not closed.
    async fn refuse_close(&self) -> Option<()> {
        let opened = self.keeper.opened(self.disk)?;
        // Not while the disk is opened: the keeper would take it for open, although it was closed since.
        let turn = self.keeper.turn.acquire().await;
        let is_connected = || self.world.xen.mapped_from(self.disk.dom) > 0;
        let before = is_connected();
        let status = self.ctl("close").await?;
        if before && is_connected() && i32::from(status) != Errno::EBUSY.0 {
            let text = format!("tap-ctl close of a disk that a guest uses ended with {status}");
            self.world.fail(Invariant::U1, text);
        }
        // It is closed although its image could not be, with EIO.
        if i32::from(status) != Errno::EBUSY.0 {
            opened.at.set(None);
            self.keeper.away.set(true);
            drop(turn);
            self.keeper.ensure().await;
        }
        Some(())
    }

    /// Takes the disk from its guest, opens an image of another size by mistake, or the right one for reading only, and
    /// then the right one.
    async fn other_image(&self, hold_ns: u64) -> Option<()> {
        let opened = self.keeper.opened(self.disk)?;
        let turn = self.keeper.turn.acquire().await;
        if self.keeper.take(self.disk).await? == 0 {
            let has_grown = opened.setup.history.borrow().size_sectors() > opened.setup.size_sectors;
            let wrong = match hold_ns % 2 {
                // As large as the disk was.
                0 if has_grown && hold_ns & 4 != 0 => format!("-a raw:{TWIN} -D"),
                0 => format!("-a raw:{OTHER} -D"),
                _ => format!("{} -R", image(&opened.setup.spec, &self.keeper.admin.limits)),
            };
            let mistaken = self.ctl(&format!("open {wrong}")).await?;
            self.world.sim.sleep_ns(1_000_000_000 + hold_ns).await;
            let status = if mistaken == 0 { self.ctl("close").await? } else { 0 };
            if status != 0 {
                let text = format!("tap-ctl close of a disk that no guest can use ended with {status}");
                self.world.fail(Invariant::U1, text);
            }
        }
        drop(turn);
        self.keeper.ensure().await;
        Some(())
    }

    /// Takes the disk from its guest, and frees its minor number, which another disk of the same size gets. The guest's
    /// own is opened with another number, and named in xenstore.
    async fn other_disk(&self, hold_ns: u64) -> Option<()> {
        let (keeper, opened) = (self.keeper, self.keeper.opened(self.disk)?);
        let turn = keeper.turn.acquire().await;
        // Before tapback has looked at a disk it cannot know that another one has its number since.
        let named = self.key(PATH_KEY).await?;
        let known = self.key("minor-allocation").await?;
        if known.rsplit_once(' ')?.0 != named {
            return None;
        }
        // The turn ends whatever became of it: another tapdisk may have to open the disks.
        let number = match keeper.take(self.disk).await {
            Some(0) => opened.minor.take(),
            _ => None,
        };
        opened.freed.set(number.is_some());
        let _done_or_dead = match number {
            Some(number) => self.give_number_away(number, hold_ns).await,
            None => None,
        };
        drop(turn);
        keeper.ensure().await;
        Some(())
    }

    /// What xenstore has of the disk.
    async fn key(&self, key: &str) -> Option<String> {
        let found = self.machine.toolstack.port.read(&format!("{}/{key}", self.disk.paths.backend)).await;
        String::from_utf8(found.ok()?).ok()
    }

    /// Has another disk with this minor number for a while.
    async fn give_number_away(&self, number: u16, hold_ns: u64) -> Option<()> {
        let (admin, tapdisk) = (&self.keeper.admin, self.keeper.alive()?);
        // With its last number the tapdisk would end.
        let allocated = admin.expect(&tapdisk, "allocate", 0).await?;
        let spare = format!("-p {} -m {}", tapdisk.pid(), minor_in(&allocated.out)?);
        admin.persist(&tapdisk, &format!("attach {spare}")).await?;
        let at = format!("-p {} -m {number}", tapdisk.pid());
        admin.expect(&tapdisk, &format!("detach {at}"), 0).await?;
        admin.expect(&tapdisk, &format!("free -m {number}"), 0).await?;
        let again = admin.expect(&tapdisk, "allocate", 0).await?;
        if minor_in(&again.out)? == number {
            admin.persist(&tapdisk, &format!("attach {at}")).await?;
            admin.persist(&tapdisk, &format!("open {at} -a raw:{TWIN} -D")).await?;
            self.world.sim.sleep_ns(1_000_000_000 + hold_ns).await;
            admin.expect(&tapdisk, &format!("close {at}"), 0).await?;
        }
        Some(())
    }

    /// Asks tapdisk to stop; what is in flight is answered before, and another one goes on.
    async fn stop_tapdisk(&self) {
        // Not while disks are opened in it: that would have to begin again.
        let _turn = self.keeper.turn.acquire().await;
        if let Some(tapdisk) = self.keeper.alive() {
            self.keeper.away.set(true);
            self.keeper.stopped.set(Some(tapdisk.pid()));
            tapdisk.host.process.ask_to_stop();
        }
    }

    /// No data passes through tapback: guests do not notice that it is away.
    async fn replace_tapback(&self, away_ns: u64) {
        if self.machine.spared.get() {
            return;
        }
        self.machine.stop_tapdisk().await;
        self.world.sim.sleep_ns(away_ns).await;
        self.machine.start_tapdisk();
    }
}

async fn given(world: World) {
    let kind = world.setting("image", &Kind::plain());
    let admin = Admin::draw(&world, Part::Control, kind);
    let keeper = Keeper::new(&world, Rc::clone(&admin));
    let script = Rc::clone(&keeper) as Rc<dyn Script>;
    let machine = Machine::through_tapback(&world, admin.limits, script);
    keeper.lives.replace(machine.starts());
    keeper.store.replace(Some(machine.toolstack.port.clone()));
    machine.start_tapdisk();
    let setup = Setup::new(&world, kind, 0, DISK_BYTES).growing();
    world.storage.put(TWIN, formats::content_of(&vec![0; DISK_BYTES as usize]));
    world.storage.put(OTHER, formats::content_of(&vec![0; DISK_BYTES as usize / 2]));
    let disk = machine.new_guest(setup.clone(), 0);
    world.sim.spawn("keeper", 0, Rc::clone(&keeper).keep());
    machine.plug(&disk).await;
    let Some(guest) = boot(&world, &keeper, &disk).await else { return };
    world.sim.spawn("supervisor", 0, Rc::clone(&machine).kill_and_restart(kills(&world, 2, 120)));
    let ops = operations_of(&world, &disk, 0, 60);
    let (g, depth) = (guest.clone(), world.setting("ring-depth", &[32, 8, 1]));
    let (task, finished) = joined(async move { g.run(&ops, depth).await });
    disk.node.spawn("main", 0, task);
    if world.setting("second-disk", &[false, true]) {
        second_disk(&world, &keeper, &machine, &disk).await;
    }
    let hostile = hostile_guest(&world, &machine).await;
    let growth = Growth::follow(&world, &disk, &guest);
    let acts = Acts { world: &world, keeper: &keeper, machine: &machine, disk: &disk, growth: &growth };
    acts.run().await;
    if let Some((guest, gone)) = hostile {
        select(gone, guest.node.dead()).await;
        // Its front end need not release anything, ever.
        machine.destroy(&guest).await;
    }
    end(&world, &keeper, &machine, (&disk, &guest, &growth), finished).await;
}

/// Another guest, which is hostile, with a disk in the same tapdisk.
async fn hostile_guest(world: &World, machine: &Rc<Machine>) -> Option<(Attached, Receiver<()>)> {
    if !world.setting("hostile-neighbour", &[false, false, true]) {
        return None;
    }
    let disk = machine.new_guest(Setup::raw(world, 2, DISK_BYTES), 2);
    // What becomes of its ring is its own affair.
    machine.expect_broken_ring(disk.dom);
    machine.plug(&disk).await;
    let hostile = Hostile::new(world, disk.clone(), machine.starts(), true);
    let w = world.clone();
    let (task, gone) = joined(async move {
        let played = async {
            hostile.connect().await?;
            hostile.play(20).await
        };
        if let Err(error) = played.await {
            w.fail(Invariant::H1, format!("the hostile guest was stopped by {error:?}, not by the back end"));
        }
    });
    disk.node.spawn("hostile", 0, task);
    Some((disk, gone))
}

async fn boot(world: &World, keeper: &Keeper, disk: &Attached) -> Option<Guest<RingDisk>> {
    let guest = disk.boot(world, NO_ERRORS).await?;
    guest.set_error_policy(error_policy(world, Invariant::P1));
    if keeper.admin.writes_through() {
        guest.write_through();
    }
    Some(guest)
}

/// A second disk of the guest, in the same tapdisk, which may only be read in some worlds.
async fn second_disk(world: &World, keeper: &Rc<Keeper>, machine: &Rc<Machine>, first: &Attached) {
    let second = Attached {
        vbd: XVDB,
        paths: VbdPaths::new(machine.kind, first.dom, XVDB),
        setup: Setup::raw(world, 1, DISK_BYTES),
        read_only: world.setting("second-read-only", &[false, false, true]),
        ..first.clone()
    };
    let careless = second.read_only && world.setting("opened-writable", &[false, true]);
    keeper.careless.set(careless);
    machine.plug(&second).await;
    keeper.careless.set(false);
    let Some(guest) = boot(world, keeper, &second).await else { return };
    let (w, g, ops) = (world.clone(), guest.clone(), operations_of(world, &second, 1, 8));
    let read_only = second.read_only;
    in_guest(&second, async move {
        if let Err(error) = g.read_all().await {
            w.fail(Invariant::E4, format!("reading a second disk failed with {error:?}"));
        }
        if read_only {
            refuse(&w, &g, &ops).await;
        } else {
            g.run(&ops, 4).await;
        }
    })
    .await;
    let (w, d) = (world.clone(), second.clone());
    in_guest(&second, async move { d.shut_down(&w, &guest).await }).await;
    machine.unplug(&second).await;
}

/// How the guest's use of its disk ends.
async fn end(
    world: &World,
    keeper: &Rc<Keeper>,
    machine: &Rc<Machine>,
    (disk, guest, growth): (&Attached, &Guest<RingDisk>, &Growth),
    finished: Receiver<()>,
) {
    let how = world
        .setting("given-ends", &["waits", "is destroyed", "is destroyed alone", "starts another kernel"]);
    if how == "is destroyed" || how == "is destroyed alone" {
        away::wait_for_destroyer(world).await;
    }
    match how {
        "is destroyed" => {
            spare(keeper, machine);
            machine.destroy(disk).await;
        }
        "is destroyed alone" => {
            spare(keeper, machine);
            machine.stop_tapdisk().await;
            machine.destroy_alone(disk).await;
            machine.start_tapdisk();
            world.sim.sleep_ns(SETTLED_NS).await;
            machine.check_unmapped(disk);
            keeper.remove(disk).await;
        }
        "starts another kernel" => {
            let _ = finished.await;
            spare(keeper, machine);
            let away_ns = world.setting("away-ns", &[0, 1_000_000_000]);
            machine.stop_tapdisk().await;
            // It connects to a disk that is not open, and waits.
            let absent_ns = world.setting("absent-ns", &[0, 30_000_000_000]);
            if absent_ns > 0 {
                let (keeper, disk) = (Rc::clone(keeper), disk.clone());
                let closed = async move { keeper.force_closed(&disk, absent_ns).await.unwrap_or_default() };
                world.sim.spawn("absence", 0, closed);
            }
            away::another_kernel(world, machine, disk, guest, away_ns).await;
        }
        _ => {
            let _ = finished.await;
            spare(keeper, machine);
            keeper.ensure().await;
            growth.settle().await;
            let (w, g) = (world.clone(), guest.clone());
            in_guest(disk, async move {
                if let Err(error) = g.read_all().await {
                    w.fail(Invariant::E4, format!("reading the whole disk failed with {error:?}"));
                }
            })
            .await;
            keeper.check_named(machine, disk).await;
            away::end_in_order(world, machine, disk, guest).await;
        }
    }
    world.sim.sleep_ns(SETTLED_NS).await;
    machine.stop_tapdisk().await;
    machine.check_leaks();
    let destroyed = how.starts_with("is destroyed");
    over(world, keeper, disk, destroyed).await;
}

/// No more kills; a restart in progress continues.
fn spare(keeper: &Keeper, machine: &Machine) {
    keeper.spared.set(true);
    machine.end_kills();
    if let Some(tapdisk) = keeper.alive() {
        tapdisk.host.process.node().kill_after_steps(u64::MAX);
    }
}

/// The tapdisk ends, and the disk has what its guest made durable.
async fn over(world: &World, keeper: &Keeper, disk: &Attached, destroyed: bool) {
    keeper.over.set(true);
    if let Some(tapdisk) = keeper.alive() {
        tapdisk.host.process.ask_to_stop();
        tapdisk.ended().await;
        if let Some(status) = tapdisk.status().filter(|status| *status != 0)
            && !world.kernel.answers_lost()
        {
            world.fail(Invariant::L1, format!("tapdisk control ended with status {status}"));
        }
    }
    check_let_go(world, &disk.setup, "in the end");
    if destroyed {
        return disk.setup.check(world, "after the guest was destroyed").await;
    }
    // A tapdisk that was killed may have had another disk open, too.
    if world.stats().crashes == 0 {
        check_pages(world);
    }
    cut_after_close_beside(world, [disk.setup.spec.path.as_str()], &[]);
    disk.setup.check_bytes(world, "in the end");
}
