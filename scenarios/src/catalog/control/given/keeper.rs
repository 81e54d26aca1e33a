//! The administrator of disks that guests have: sees to it that a tapdisk has all of them open.

use super::super::admin::{Admin, Tapdisk, image};
use super::super::minor_in;
use crate::catalog::ring::KILL_AFTER;
use crate::catalog::setup::Setup;
use crate::check::Invariant;
use crate::machine::{Attached, Machine, Script, Step};
use crate::world::World;
use sim::Entity;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_control::FOLDER;
use tap_core::wait::{Event as Flag, Semaphore};
use tap_host::{Errno, Xenstore};
use xen_model::{VbdPaths, XenPort};

/// Where xenstore names a disk.
pub(super) const PATH_KEY: &str = "physical-device-path";
/// How often tapdisk is killed at most.
const KILLS: u32 = 3;

/// A disk that a guest has, and the process that had it open last.
pub(super) struct Opened {
    pub(super) paths: VbdPaths,
    pub(super) setup: Setup,
    pub(super) read_only: bool,
    pub(super) minor: Cell<Option<u16>>,
    /// Its number was freed, and xenstore does not name its new one yet.
    pub(super) freed: Cell<bool>,
    pub(super) at: Cell<Option<u32>>,
}

/// The administrator, who sees to it that a tapdisk has all disks open.
pub(super) struct Keeper {
    pub(super) world: World,
    pub(super) admin: Rc<Admin>,
    pub(super) disks: RefCell<Vec<Rc<Opened>>>,
    pub(super) turn: Semaphore,
    pub(super) kills: Cell<u32>,
    /// No more kills.
    pub(super) spared: Cell<bool>,
    /// A tapdisk was away.
    pub(super) away: Cell<bool>,
    /// The last one that was asked to stop.
    pub(super) stopped: Cell<Option<u32>>,
    /// Nothing is opened any more.
    pub(super) over: Cell<bool>,
    /// Disks that may only be read are opened for writing, too.
    pub(super) careless: Cell<bool>,
    /// Counts the processes that serve guests, and those that give them their disks.
    pub(super) lives: RefCell<Rc<Cell<u32>>>,
    /// The toolstack's xenstore, once there is one.
    pub(super) store: RefCell<Option<XenPort>>,
    /// Set when the first tapdisk runs.
    pub(super) begun: Flag,
}

/// How xenstore names a disk.
pub(super) fn place_of(pid: u32, minor: u16) -> String {
    format!("{FOLDER}/nbd{pid}.{minor}")
}

impl Keeper {
    pub(super) fn new(world: &World, admin: Rc<Admin>) -> Rc<Self> {
        Rc::new(Self {
            world: world.clone(),
            admin,
            disks: RefCell::default(),
            turn: Semaphore::new(1),
            kills: Cell::new(0),
            spared: Cell::new(false),
            away: Cell::new(false),
            stopped: Cell::new(None),
            over: Cell::new(false),
            careless: Cell::new(false),
            lives: RefCell::default(),
            store: RefCell::default(),
            begun: Flag::new(),
        })
    }

    /// The tapdisk that can be asked.
    pub(super) fn alive(&self) -> Option<Tapdisk> {
        self.admin.newest().filter(|newest| newest.is_alive() && self.stopped.get() != Some(newest.pid()))
    }

    /// After how many of its effects the next tapdisk is killed; 0 not at all.
    fn next_kill(&self) -> u64 {
        let nth = self.kills.replace(self.kills.get() + 1);
        if self.spared.get() || nth >= KILLS {
            return 0;
        }
        let entity = Entity::WORLD.child("given-killer", 0);
        self.world.sim.name_entity(entity, || "the killer of tapdisk".into());
        self.world.sim.decide(entity, &KILL_AFTER, nth, |d| match d.below(4) {
            0 | 1 => 0,
            2 => 1 + d.below(150),
            _ => 1 + d.below(900),
        })
    }

    /// A tapdisk that has every disk open.
    pub(super) async fn ensure(&self) -> Tapdisk {
        let _turn = self.turn.acquire().await;
        loop {
            if let Some(tapdisk) = self.begin().await {
                return tapdisk;
            }
            self.world.sim.sleep_ns(20_000).await;
        }
    }

    async fn begin(&self) -> Option<Tapdisk> {
        let tapdisk = match self.alive() {
            Some(tapdisk) => tapdisk,
            None => {
                if let Some(stopped) = self.admin.newest() {
                    stopped.ended().await;
                }
                self.admin.kill_next(self.next_kill());
                let spawned = self.admin.ctl("spawn").await;
                self.admin.newest().filter(|newest| spawned.status == 0 && newest.is_alive())?
            }
        };
        let disks = self.disks.borrow().clone();
        for disk in disks.iter().filter(|disk| disk.at.get() != Some(tapdisk.pid())) {
            self.open(&tapdisk, disk).await?;
        }
        self.begun.set();
        Some(tapdisk)
    }

    async fn open(&self, tapdisk: &Tapdisk, disk: &Opened) -> Option<()> {
        if disk.minor.get().is_none() {
            let allocated = self.admin.expect(tapdisk, "allocate", 0).await?;
            disk.minor.set(minor_in(&allocated.out));
        }
        let at = format!("-p {} -m {}", tapdisk.pid(), disk.minor.get()?);
        let read_only = if disk.read_only && !self.careless.get() { "-R" } else { "" };
        self.attach(tapdisk, &at).await?;
        let opens = image(&disk.setup.spec, &self.admin.limits);
        self.admin.persist(tapdisk, &format!("open {at} {read_only} {opens}")).await?;
        disk.at.set(Some(tapdisk.pid()));
        self.name(tapdisk, disk).await;
        Some(())
    }

    /// A disk that has another number, or that tapback never found where xenstore names it, has to be named anew.
    async fn name(&self, tapdisk: &Tapdisk, disk: &Opened) {
        let (Some(store), Some(minor)) = (self.store.borrow().clone(), disk.minor.get()) else { return };
        let key = async |key: &str| store.read(&format!("{}/{key}", disk.paths.backend)).await.ok();
        let Some(named) = key(PATH_KEY).await else { return };
        let known = key("minor-allocation").await.unwrap_or_default();
        let is_known = known.starts_with(&[named.as_slice(), b" "].concat());
        if !disk.freed.get() && is_known && named.ends_with(format!(".{minor}").as_bytes()) {
            return;
        }
        let path = format!("{}/{PATH_KEY}", disk.paths.backend);
        let written = store.write(&path, place_of(tapdisk.pid(), minor).as_bytes()).await;
        if disk.freed.replace(false) {
            // The number may be the old one, which tapback does not take.
            let _there_or_not = store.remove(&format!("{}/minor-allocation", disk.paths.backend)).await;
        }
        if let Err(error) = written {
            self.world.fail(Invariant::U1, format!("write {path}: {error:?}"));
        }
    }

    /// A disk that was closed keeps its minor number in the process.
    async fn attach(&self, tapdisk: &Tapdisk, at: &str) -> Option<()> {
        let attached = self.admin.ctl(&format!("attach {at}")).await;
        if !tapdisk.is_alive() {
            return None;
        }
        if i32::from(attached.status) == Errno::EEXIST.0 {
            return Some(());
        }
        match attached.status {
            0 => Some(()),
            _ => self.admin.persist(tapdisk, &format!("attach {at}")).await.map(drop),
        }
    }

    /// Has another tapdisk whenever one has ended.
    pub(super) async fn keep(self: Rc<Self>) {
        self.begun.wait().await;
        loop {
            let Some(tapdisk) = self.admin.newest() else { return };
            tapdisk.ended().await;
            if self.over.get() {
                return;
            }
            self.away.set(true);
            let lives = Rc::clone(&self.lives.borrow());
            lives.set(lives.get() + 1);
            if !tapdisk.host.process.node().is_alive() {
                self.world.count(|stats| stats.crashes += 1);
            }
            self.repeated();
            tapdisk.host.process.node().kill();
            tapdisk.host.process.node().dead().await;
            self.world.sim.sleep_ns(10_000).await;
            self.ensure().await;
        }
    }

    /// What was not answered is carried out again by the next tapdisk.
    pub(super) fn repeated(&self) {
        self.disks.borrow().iter().for_each(|disk| disk.setup.history.borrow_mut().server_died());
    }

    /// Asks the tapdisk that has the disk for something; `None` if it died meanwhile.
    pub(super) async fn ctl(&self, disk: &Attached, verb: &str) -> Option<u8> {
        let (opened, tapdisk) = (self.opened(disk)?, self.alive()?);
        let at = format!("-p {} -m {}", tapdisk.pid(), opened.minor.get()?);
        let status = self.admin.ctl(&format!("{verb} {at}")).await.status;
        tapdisk.is_alive().then_some(status)
    }

    /// Takes the disk from its guest, which waits, and opens it again.
    pub(super) async fn force_closed(&self, disk: &Attached, hold_ns: u64) -> Option<()> {
        let turn = self.turn.acquire().await;
        self.take(disk).await?;
        self.world.sim.sleep_ns(hold_ns).await;
        drop(turn);
        self.ensure().await;
        Some(())
    }

    /// Takes the disk from its guest. Requests are submitted until it is gone: what is left then is carried out again,
    /// although some of it may have been carried out without an answer. `None` if the tapdisk died meanwhile.
    pub(super) async fn take(&self, disk: &Attached) -> Option<u8> {
        self.away.set(true);
        let opened = self.opened(disk)?;
        let status = self.ctl(disk, "close -f").await;
        self.repeated();
        // It is closed although its image could not be, with EIO.
        if status.is_some() {
            opened.at.set(None);
        }
        status
    }

    pub(super) fn opened(&self, disk: &Attached) -> Option<Rc<Opened>> {
        self.disks.borrow().iter().find(|opened| opened.paths == disk.paths).cloned()
    }

    /// xenstore names the tapdisk that has the disk.
    pub(super) async fn check_named(&self, machine: &Machine, disk: &Attached) {
        let (Some(opened), Some(tapdisk)) = (self.opened(disk), self.alive()) else { return };
        let Some(minor) = opened.minor.get() else { return };
        for (key, right) in
            [(PATH_KEY, place_of(tapdisk.pid(), minor)), ("kthread-pid", tapdisk.pid().to_string())]
        {
            let found = machine.toolstack.port.read(&format!("{}/{key}", disk.paths.backend)).await;
            if found.as_deref() != Ok(right.as_bytes()) {
                let found = found.map(|value| String::from_utf8_lossy(&value).into_owned());
                self.world.fail(Invariant::U1, format!("{key} is {found:?}, and the disk is at {right}"));
            }
        }
    }
}

impl Script for Keeper {
    fn add<'a>(&'a self, disk: &'a Attached) -> Step<'a, String> {
        Box::pin(async move {
            let known = self.opened(disk);
            let opened = known.unwrap_or_else(|| {
                let (paths, setup, read_only) = (disk.paths.clone(), disk.setup.clone(), disk.read_only);
                let opened = Opened {
                    paths,
                    setup,
                    read_only,
                    minor: Cell::new(None),
                    freed: Cell::new(false),
                    at: Cell::new(None),
                };
                let opened = Rc::new(opened);
                self.disks.borrow_mut().push(Rc::clone(&opened));
                opened
            });
            let tapdisk = self.ensure().await;
            let minor = opened.minor.get().expect("it is open");
            place_of(tapdisk.pid(), minor)
        })
    }

    fn remove<'a>(&'a self, disk: &'a Attached) -> Step<'a, ()> {
        Box::pin(async move {
            let Some(opened) = self.opened(disk) else { return };
            // A tapdisk that begins must not open it again.
            let turn = self.turn.acquire().await;
            self.disks.borrow_mut().retain(|known| !Rc::ptr_eq(known, &opened));
            let (Some(minor), Some(tapdisk)) = (opened.minor.get(), self.alive()) else { return };
            if opened.at.get() != Some(tapdisk.pid()) {
                return;
            }
            // The last one does not end with its last disk: other guests may come.
            let at = format!("-p {} -m {minor}", tapdisk.pid());
            // Nobody uses it any more. What a tapdisk that was killed may have lost is said once.
            if self.world.kernel.answers_lost() {
                self.admin.ctl(&format!("close {at}")).await;
            }
            self.admin.expect(&tapdisk, &format!("close {at}"), 0).await;
            drop(turn);
        })
    }

    fn was_away(&self) -> bool {
        self.away.get() || self.alive().is_none()
    }
}
