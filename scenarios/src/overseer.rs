//! An overseer of a program: watches the list of its disks, from time to time after a delay, and pauses them.
//!
//! ```text
//!   tapdisk ──disks──► Disks ──list, watch──► overseer ──┬─► its copy of the list is right once changes stop
//!      ▲                 └────pause, resume──────┘       └─► a paused disk does nothing
//!      └── ends: the list is empty
//! ```
//!
//! It is a task in the program's process, as a control socket would be, and dies with it.

use crate::check::Invariant;
use crate::world::World;
use kernel_model::SimHost;
use sim::{Draw, Entity, Label};
use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;
use tap_core::{Disks, wait};
use tap_host::{Errno, Tasks, unless};

/// What happens after a change of the list: a delay of 24 bits of nanoseconds, then a pause of a disk of 24 bits of
/// nanoseconds, and which disk.
pub(crate) static OVERSEE: Label = Label::packed(
    "oversee",
    "change {n} of the disks: after so many ns, one is paused for so many, which ({})",
    &[24, 24, 8],
);

/// Number of changes per process after which it does more than read the list.
const CHANGES_MAX: u32 = 12;

/// Oversees one run of a program.
pub(crate) struct Overseer {
    world: World,
    disks: Disks<SimHost>,
    pauses: bool,
    entity: Entity,
    /// Names and states of the disks, as last read.
    known: RefCell<Vec<(String, &'static str)>>,
    /// The program has ended.
    over: wait::Event,
    /// The overseer has ended, too.
    done: wait::Event,
}

impl Overseer {
    /// Oversees the `disks` of a program in `host` from now on, if the seed has an overseer.
    /// With `pauses` it also pauses them.
    pub(crate) fn start(
        world: &World,
        host: &SimHost,
        disks: &Disks<SimHost>,
        pauses: bool,
    ) -> Option<Rc<Self>> {
        if !world.setting("disks-overseen", &[false, true]) {
            return None;
        }
        let node = host.process.node();
        let entity = node.entity().child("overseer", 0);
        world.sim.name_entity(entity, || format!("overseer of {}", node.name()));
        let overseer = Rc::new(Self {
            world: world.clone(),
            disks: disks.clone(),
            pauses,
            entity,
            known: RefCell::default(),
            over: wait::Event::new(),
            done: wait::Event::new(),
        });
        host.spawn("overseer", 0, Rc::clone(&overseer).oversee());
        Some(overseer)
    }

    /// The program has ended. Completes once the overseer has noticed.
    pub(crate) async fn end(&self) {
        self.over.set();
        self.done.wait().await;
    }

    async fn oversee(self: Rc<Self>) {
        for n in 0.. {
            let (_, seen) = self.look();
            if self.pauses && n < CHANGES_MAX {
                self.unless_over(self.act(n)).await;
            }
            if !self.unless_over(self.disks.watch(seen)).await {
                break;
            }
        }
        let known = self.known.take();
        if self.look().0 != known {
            let text = format!("a change of the disks was missed: the list at the end was {known:?}");
            self.world.fail(Invariant::D3, text);
        }
        self.done.set();
    }

    /// Whether `what` completed no later than the program ended.
    async fn unless_over<T>(&self, what: impl Future<Output = T>) -> bool {
        unless(self.over.wait(), what).await.is_some()
    }

    /// Reads the list. Returns the disks and the number of changes.
    fn look(&self) -> (Vec<(String, &'static str)>, u64) {
        let (listed, seen) = self.disks.list();
        let states: Vec<_> = listed.into_iter().map(|disk| (disk.name, disk.state)).collect();
        if states.iter().any(|(_, state)| *state == "closed") {
            self.world.fail(Invariant::D3, format!("a closed disk is in the list: {states:?}"));
        }
        self.known.borrow_mut().clone_from(&states);
        (states, seen)
    }

    /// Acts after change `n`.
    async fn act(&self, n: u32) {
        let draw = |d: &mut Draw| {
            let pause = if d.below(3) == 0 { 0 } else { d.magnitude(20) };
            if d.below(4) == 0 { 0 } else { d.magnitude(20) | pause << 24 | d.below(3) << 48 }
        };
        let value = self.world.sim.decide(self.entity, &OVERSEE, n, draw);
        let (after_ns, pause_ns, which) = (value & 0xff_ffff, value >> 24 & 0xff_ffff, value >> 48 & 0xff);
        if after_ns > 0 {
            self.world.sim.sleep_ns(after_ns).await;
        }
        let (listed, _) = self.disks.list();
        if pause_ns > 0 && !listed.is_empty() {
            self.pause(&listed[which as usize % listed.len()].name, pause_ns).await;
        }
    }

    /// Pauses one disk, which may close at any time.
    async fn pause(&self, name: &str, ns: u64) {
        let Some(disk) = self.disks.get(name) else { return };
        let slot = disk.slot().clone();
        drop(disk);
        let wrong = |text: String| self.world.fail(Invariant::D1, format!("disk {name}: {text}"));
        match slot.pause().await {
            Ok(()) => {}
            Err(Errno::ESHUTDOWN) => return,
            Err(error) => return wrong(format!("the pause failed with {error:?}")),
        }
        self.world.sim.sleep_ns(ns).await;
        if slot.in_flight() > 0 {
            wrong(format!(
                "it was paused, but is {} and has {} requests in flight",
                slot.state(),
                slot.in_flight()
            ));
        }
        if let Err(error) = slot.resume()
            && error != Errno::ESHUTDOWN
        {
            wrong(format!("the resume failed with {error:?}"));
        }
    }
}
