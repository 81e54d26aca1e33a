//! Disks that an administrator creates, pauses, replaces and destroys by tap-ctl, under load.
//!
//! ```text
//!   guest ─ NBD client ══ nbd<pid>.<minor> ══╗
//!                                            tapdisk control ─ disk ─ image ─ Storage
//!   administrator ─ tap-ctl ══ ctl<pid> ═════╝  (may be killed)
//! ```
//!
//! A guest may notice a delay, never an error. A paused disk has let go of its files, and what was answered before is
//! durable. What tap-ctl reports as done is done, and what was refused changes nothing. When tapdisk is killed, or the
//! power fails, the administrator opens the disks again with a new one.

mod admin;
mod commits;
mod crowd;
mod events;
mod given;
mod json;
mod listeners;
mod openmetrics;
mod priorities;
mod resizes;
mod setters;
mod snapshots;
mod tops;
mod verbs;

use super::crash::arm_power_cut;
use super::nbd::{NO_ERRORS, client_config};
use super::ring::KILL_AFTER;
use super::setup::{Setup, check_at_rest, check_pages, cut_after_close_beside, workload};
use crate::check::Invariant;
use crate::formats::Kind;
use crate::guest::{DirectDisk, ErrorPolicy, Guest, Spread};
use crate::scenario::Scenario;
use crate::workload::{Workload, operations};
use crate::world::World;
use admin::{Admin, Tapdisk, check_let_go, image};
use kernel_model::{SimHost, StorageConfig};
use listeners::Listening;
use sim::Entity;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_control::FOLDER;
use tap_core::Node;
use tap_core::wait::joined;
use tap_host::{SocketAddress, select};
use tap_images::ImageSpec;
use tap_nbd::{Breaks, Client, ClientConfig};

pub use commits::BESIDE_MERGE;
pub use given::{GIVEN, GIVEN_ACT};
pub use json::JSON_SENT;
pub use listeners::LISTENS;
pub use setters::PRIORITIES;
pub use snapshots::{SNAPSHOT, SNAPSHOT_DIES, SNAPSHOTS};
pub use verbs::{CONTROL, CUT_REQUEST, GIVES_UP, RACE};

/// Disks under control.
pub static CONTROLLED: Scenario = Scenario {
    name: "controlled",
    about: "disks are paused, resumed with other images, closed and opened by tap-ctl under load; tapdisk is killed; power cuts",
    storage: &|_| StorageConfig::default(),
    body: &|w| Box::pin(lives(w, Part::Control)),
};

/// What an administrator does with the disks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// Everything that the old protocol has.
    Control,
    /// Snapshots.
    Snapshots,
}

const DISK_BYTES: u64 = 512 << 10;
/// How often tapdisk is started, at most, before the last time.
const EPOCHS: u32 = 2;

/// A disk, and where its bytes are.
struct Disk {
    number: u32,
    setup: RefCell<Setup>,
    /// Its minor number, once it has one.
    minor: Cell<Option<u16>>,
    /// Copies of its image that were made so far.
    copies: Cell<u32>,
    /// The size that was said last, in bytes.
    told_bytes: Cell<u64>,
    /// Images that it had before, as they were when it let go of them.
    left: RefCell<Vec<(String, Vec<u8>)>>,
    /// An image below it that may have been merged into the next one, and that one.
    merging: RefCell<Option<(String, String)>>,
    /// A snapshot whose outcome is not known.
    pending: RefCell<Option<snapshots::Pending>>,
    /// A snapshot may have been taken although that was not said: a power cut may undo or redo it.
    doubt: Cell<bool>,
}

impl Disk {
    fn new(world: &World, kind: Kind, number: u32) -> Rc<Self> {
        let setup = Setup::new(world, kind, number, DISK_BYTES);
        // Requests are sent again on a new connection, in any order.
        setup.history.borrow_mut().relax_order();
        let (setup, minor) = (RefCell::new(setup), Cell::new(None));
        let (copies, left, merging) = (Cell::new(0), RefCell::default(), RefCell::default());
        let (pending, doubt, told_bytes) = (RefCell::default(), Cell::new(false), Cell::new(DISK_BYTES));
        Rc::new(Self { number, setup, minor, copies, told_bytes, left, merging, pending, doubt })
    }

    /// It is open, and with that it is durable which files it has.
    fn opened(&self) {
        self.pending.take();
        self.merging.take();
    }

    fn setup(&self) -> Setup {
        self.setup.borrow().clone()
    }

    /// It has another image from now on, which is a copy of the one before.
    fn move_to(&self, world: &World, spec: ImageSpec) {
        let old = self.setup().spec.path;
        let bytes = world.storage.bytes(&old).unwrap_or_default();
        self.left.borrow_mut().push((old, bytes));
        let same = spec.format == self.setup().spec.format;
        // A copy in another format has what the chain showed, and nothing below it.
        let moved = if same { self.setup().moved(spec) } else { self.setup().alone(spec) };
        *self.setup.borrow_mut() = moved;
    }

    /// Images that it had before no longer change.
    fn check_left(&self, world: &World) {
        for (path, bytes) in &*self.left.borrow() {
            if world.storage.bytes(path).as_ref() != Some(bytes) {
                let text = format!("{path} has changed, although disk {} has another image", self.number);
                world.fail(Invariant::U1, text);
            }
        }
    }

    /// `-p PID -m MINOR`.
    fn at(&self, tapdisk: &Tapdisk) -> String {
        format!("-p {} -m {}", tapdisk.pid(), self.minor.get().expect("it has a minor number"))
    }
}

impl verbs::Acts<'_> {
    /// A few acts, one after the other, until tapdisk has died.
    async fn run(&self) {
        let (role, label, count, kinds) = match self.admin.part {
            Part::Control => ("administrator", &CONTROL, "control-acts", verbs::ACTS),
            Part::Snapshots => ("snapshots", &SNAPSHOT, "snapshot-acts", snapshots::ACTS),
        };
        let entity = Entity::WORLD.child(role, u64::from(self.epoch));
        let sim = &self.world.sim;
        sim.name_entity(entity, || format!("the administrator, epoch {}", self.epoch));
        for n in 0..self.world.setting(count, &[4, 2, 8]) {
            let value = sim.decide(entity, label, n, |d| {
                d.magnitude(22) | (1 + d.below(kinds)) << 24 | d.magnitude(22) << 28 | d.below(2) << 52
            });
            let (after_ns, act) = (value & 0xff_ffff, value >> 24 & 0xf);
            let (hold_ns, which) = (value >> 28 & 0xff_ffff, value >> 52 & 1);
            if act == 0 {
                continue;
            }
            sim.sleep_ns(after_ns).await;
            if !self.tapdisk.is_alive() {
                return;
            }
            let disk = &self.disks[which as usize % self.disks.len()];
            let own = entity.child("act", u64::from(n));
            let done = match self.admin.part {
                Part::Control => self.act(own, act, disk, hold_ns).await,
                Part::Snapshots => self.act_snapshot(own, act, disk, hold_ns).await,
            };
            if done.is_none() {
                return;
            }
        }
    }
}

async fn lives(world: World, part: Part) {
    let kinds = if part == Part::Snapshots { Kind::all() } else { Kind::plain() };
    let kind = world.setting("image", &kinds);
    let admin = Admin::draw(&world, part, kind);
    let count = world.setting("controlled-disks", &[1, 2]);
    let disks: Vec<Rc<Disk>> = (0..count).map(|number| Disk::new(&world, kind, number)).collect();
    verbs::make_others(&world);
    let killer = Entity::WORLD.child("control-killer", 0);
    world.sim.name_entity(killer, || "the killer of tapdisk".into());
    for epoch in 0..EPOCHS {
        let steps = world.sim.decide(killer, &KILL_AFTER, epoch, |d| match d.below(4) {
            0 | 1 => 0,
            2 => 1 + d.below(100),
            _ => 1 + d.below(800),
        });
        admin.kill_next(steps);
        self::epoch(&world, &admin, &disks, epoch).await;
        if world.verdict.is_broken() {
            return;
        }
    }
    world.sim.stop_faults();
    world.storage.set_hook(None);
    last(&world, &admin, &disks).await;
}

/// Has a new tapdisk, with all disks open. `None` if it was killed before.
async fn start(world: &World, admin: &Rc<Admin>, disks: &[Rc<Disk>]) -> Option<Tapdisk> {
    let kept: Vec<u16> = disks.iter().filter_map(|disk| disk.minor.get()).collect();
    admin.priorities.begin();
    admin.clean_up(&kept).await;
    let mut tapdisk: Option<Tapdisk> = None;
    for disk in disks {
        let opens = image(&disk.setup().spec, &admin.limits);
        if tapdisk.is_none() && disk.minor.get().is_none() {
            let created = admin.ctl(&format!("create {opens}")).await;
            let newest = admin.newest()?;
            disk.minor.set(minor_in(&created.out));
            if !newest.is_alive() {
                // What it had begun is taken back; its marker may be left if it could not be.
                return None;
            }
            if admin.passes(created.status.into()) {
                // What it had begun was taken back.
                return None;
            }
            if created.status != 0 || disk.minor.get().is_none() {
                world.fail(Invariant::U1, format!("tap-ctl create ended with {created:?}"));
                return None;
            }
            disk.opened();
            tapdisk = Some(newest);
            continue;
        }
        if tapdisk.is_none() {
            let spawned = admin.ctl("spawn").await;
            tapdisk = admin.newest().filter(|newest| spawned.status == 0 && newest.is_alive());
        }
        let own = tapdisk.as_ref()?;
        if disk.minor.get().is_none() {
            disk.minor.set(minor_in(&admin.expect(own, "allocate", 0).await?.out));
        }
        admin.persist(own, &format!("attach {}", disk.at(own))).await?;
        admin.persist(own, &format!("open {} {opens}", disk.at(own))).await?;
        disk.opened();
    }
    tapdisk
}

/// The minor number in the path that tap-ctl prints.
fn minor_in(lines: &[String]) -> Option<u16> {
    lines.first()?.rsplit_once("tapdisk-")?.1.parse().ok()
}

/// Guests and an administrator work until both have finished, or tapdisk dies.
async fn epoch(world: &World, admin: &Rc<Admin>, disks: &[Rc<Disk>], epoch: u32) {
    let host = SimHost::start(&world.kernel, &world.xen, "guests", u64::from(epoch));
    let (own, guests) = (Rc::clone(admin), host.process.node().clone());
    arm_power_cut(world, &disks[0].setup(), epoch, 240, move || {
        guests.kill();
        own.kill_all();
    });
    if let Some(tapdisk) = start(world, admin, disks).await {
        let mut ends = Vec::new();
        for disk in disks {
            let (task, end) = joined(load(
                world.clone(),
                Rc::clone(admin),
                host.clone(),
                (Rc::clone(disk), epoch),
                tapdisk.clone(),
            ));
            host.process.node().spawn("guest", u64::from(disk.number), task);
            ends.push(end);
        }
        for disk in disks {
            ends.extend(setters::start(world, admin, &tapdisk, (disk, epoch)));
        }
        let listening = Listening::start(world, admin, &tapdisk, epoch);
        let acts = verbs::Acts { world, admin, tapdisk: &tapdisk, listening: &listening, disks, epoch };
        acts.run().await;
        for end in ends {
            select(tapdisk.ended(), end).await;
        }
        if tapdisk.is_alive() {
            listening.hurry();
            acts.known().await;
        }
        if tapdisk.is_alive() {
            host.process.node().kill();
            destroy(world, admin, &tapdisk, disks).await;
            return listening.end(world, tapdisk.status() == Some(0)).await;
        }
        listening.end(world, false).await;
    }
    world.count(|stats| stats.crashes += 1);
    host.process.node().kill();
    admin.kill_all();
    over(world, admin, disks, epoch).await;
}

/// tapdisk is dead, and so are its guests: by itself, or because the power failed.
async fn over(world: &World, admin: &Rc<Admin>, disks: &[Rc<Disk>], epoch: u32) {
    world.storage.set_hook(None);
    // What only a process lost may be lost for good when the power fails in a later life.
    let setting = if epoch == 0 { "power-fails-with-tapdisk" } else { "power-fails-later" };
    let power = world.setting(setting, &[false, true]);
    if power {
        world.power_cut();
        world.xen.power_cut();
        admin.forget().await;
    }
    let doubtful = admin.newest().is_some_and(|tapdisk| tapdisk.has_said(snapshots::DOUBT));
    for disk in disks {
        disk.settle(world, power, doubtful);
        disk.check_size(world, "after the end of its tapdisk");
        let setup = disk.setup();
        match power {
            true => {
                disk.minor.set(None);
                setup.history.borrow_mut().power_cut();
            }
            false => {
                setup.history.borrow_mut().server_died();
                setup.history.borrow_mut().guest_died();
            }
        }
        disk.check_left(world);
        if power {
            setup.check(world, &format!("after power cut {}", epoch + 1)).await;
        }
    }
}

/// A guest's client, and its load.
async fn load(
    world: World,
    admin: Rc<Admin>,
    host: SimHost,
    (disk, epoch): (Rc<Disk>, u32),
    tapdisk: Tapdisk,
) {
    let guest = guest(&world, &admin, &host, &disk, &tapdisk).await;
    let who = u64::from(epoch) << 8 | u64::from(disk.number);
    let entity = Entity::WORLD.child("control-ops", who);
    world.sim.name_entity(entity, || format!("the guest of disk {}, epoch {epoch}", disk.number));
    // Every image of a chain is to get something.
    let count = if admin.part == Part::Snapshots { 120 } else { 40 };
    let load = Workload { zeroes: true, ..workload(&world, disk.setup().size_sectors, count, 128) };
    let ops = operations(&world.sim, entity, who, &load);
    guest.run(&ops, admin.limits.guest_depth).await;
}

async fn guest(
    world: &World,
    admin: &Rc<Admin>,
    host: &SimHost,
    disk: &Disk,
    tapdisk: &Tapdisk,
) -> Guest<Spread> {
    let minor = disk.minor.get().expect("it has a minor number");
    let address = SocketAddress::Unix(format!("{FOLDER}/nbd{}.{minor}", tapdisk.pid()));
    // What closes the disk makes everything durable before.
    let breaks = Breaks::Keep;
    let config = ClientConfig { export: String::new(), address, breaks, ..client_config(world) };
    let client = loop {
        match Client::connect(host.clone(), config.clone()).await {
            Ok(client) => break Rc::new(client) as Rc<dyn Node>,
            // The disk may be closed at this moment.
            Err(error) => {
                world.sim.remark("client", || format!("failed to {error}"));
                world.sim.sleep_ns(1_000_000).await;
            }
        }
    };
    let spread = Spread::new(vec![DirectDisk::new(client, admin.limits.pool_bytes)]);
    let reads = if world.stats().crashes > 0 { Invariant::G7 } else { Invariant::G1 };
    let guest =
        Guest::new(world, spread, Rc::clone(&disk.setup().history), ErrorPolicy { reads, ..NO_ERRORS });
    if admin.writes_through() {
        guest.write_through();
    }
    guest
}

/// Gives everything back: afterwards nothing is left of `tapdisk` and its disks.
async fn destroy(world: &World, admin: &Rc<Admin>, tapdisk: &Tapdisk, disks: &[Rc<Disk>]) {
    let power = world.setting("power-fails-at-last", &[false, true]);
    for disk in disks {
        let setup = disk.setup();
        let inv = setup.history.borrow_mut().begin_flush();
        let line = format!("destroy {}", disk.at(tapdisk));
        let mut destroyed = admin.ctl(&line).await;
        let lost = admin.may_have_lost(&destroyed);
        if lost {
            // It is closed, and that it lost something was said.
            destroyed = admin.ctl(&line).await;
        }
        if tapdisk.host.process.node().is_alive() && destroyed.status != 0 {
            world.fail(Invariant::U1, format!("tap-ctl destroy ended with {destroyed:?}"));
        }
        // Killed while it closed, it may have closed nothing.
        if destroyed.status != 0 {
            setup.history.borrow_mut().server_died();
            setup.history.borrow_mut().guest_died();
            continue;
        }
        setup.history.borrow_mut().guest_died();
        if !lost {
            setup.history.borrow_mut().end_flush(inv);
        }
        disk.minor.set(None);
        check_let_go(world, &setup, "after a destroy");
        disk.check_left(world);
    }
    tapdisk.ended().await;
    if !tapdisk.host.process.node().is_alive() {
        world.count(|stats| stats.crashes += 1);
    }
    if let Some(status) = tapdisk.status().filter(|status| *status != 0) {
        world.fail(Invariant::L1, format!("tapdisk control ended with status {status}"));
    }
    if tapdisk.host.process.node().is_alive() {
        check_nothing_left(world, admin, tapdisk).await;
    }
    if power && disks.iter().all(|disk| disk.minor.get().is_none() && !disk.doubt.get()) {
        world.storage.set_hook(None);
        if world.stats().crashes == 0 {
            check_pages(world);
        }
        let files: Vec<Vec<String>> =
            disks.iter().map(|disk| disk.setup().files().cloned().collect()).collect();
        let below: Vec<String> = files.iter().flat_map(|chain| chain[1..].to_vec()).collect();
        cut_after_close_beside(world, files.iter().map(|chain| chain[0].as_str()), &below);
        disks.iter().for_each(|disk| disk.setup().history.borrow_mut().power_cut());
    }
}

async fn check_nothing_left(world: &World, admin: &Rc<Admin>, tapdisk: &Tapdisk) {
    check_at_rest(world, tapdisk.host.process.node()).await;
    let (mut sockets, minors) = admin.names().await;
    sockets.retain(|name| {
        [format!("ctl{}", tapdisk.pid()), format!("json{}", tapdisk.pid())].contains(name)
            || name.starts_with(&format!("nbd{}.", tapdisk.pid()))
    });
    if !sockets.is_empty() || !minors.is_empty() {
        let left = [sockets, minors].concat().join(", ");
        world.fail(Invariant::K1, format!("a tapdisk has ended in order, but {left} is left"));
    }
}

/// Without faults: everything is read once more.
async fn last(world: &World, admin: &Rc<Admin>, disks: &[Rc<Disk>]) {
    admin.kill_next(0);
    let Some(tapdisk) = start(world, admin, disks).await else {
        return world.fail(Invariant::G11, "the disks cannot be opened at last");
    };
    let host = SimHost::start(&world.kernel, &world.xen, "guests", u64::from(EPOCHS));
    for disk in disks {
        disk.setup().check_locks(world, false);
        let guest = guest(world, admin, &host, disk, &tapdisk).await;
        if let Err(error) = guest.read_all().await {
            world.fail(Invariant::G11, format!("reading the whole disk failed with {error:?}"));
        }
    }
    host.process.node().kill();
    destroy(world, admin, &tapdisk, disks).await;
    for disk in disks {
        disk.check_size(world, "in the end");
        disk.setup().check(world, "in the end").await;
    }
}
