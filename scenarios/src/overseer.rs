//! Who looks after a program: watches the list of its disks, now and then without haste, and pauses them.
//!
//! ```text
//!   tapdisk ──disks──► Disks ──list, watch──► overseer ──┬─► what it knows is what there is, once nothing changes
//!      ▲                 └────pause, resume──────┘       └─► a paused disk does nothing
//!      └── ends: nothing is left in the list
//! ```
//!
//! It is a task of the program's process, as a control socket would be, and dies with it.

use crate::check::Invariant;
use crate::world::World;
use kernel_model::SimHost;
use sim::{Draw, Entity, Label};
use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use tap_core::{Disks, wait};
use tap_host::{Errno, Tasks};

/// What is done after a change of the list: something else for so long, in 24 bits, then a disk is paused for so long,
/// in 24 bits, and which.
pub(crate) static OVERSEE: Label = Label::packed(
    "oversee",
    "change {n} of the disks: after so many ns, one is paused for so many, which ({})",
    &[24, 24, 8],
);

/// Changes after which it does more than look, of one process.
const CHANGES_MAX: u32 = 12;

/// Looks after one run of a program.
pub(crate) struct Overseer {
    world: World,
    disks: Disks<SimHost>,
    entity: Entity,
    /// Names and states of the disks, as they were seen last.
    known: RefCell<Vec<(String, &'static str)>>,
    /// The program has ended.
    over: wait::Event,
    /// So has this.
    done: wait::Event,
}

impl Overseer {
    /// Looks after the `disks` of a program in `host` from now on, if this world has somebody who does.
    pub(crate) fn start(world: &World, host: &SimHost, disks: &Disks<SimHost>) -> Option<Rc<Self>> {
        if !world.setting("disks-overseen", &[false, true]) {
            return None;
        }
        let node = host.process.node();
        let entity = node.entity().child("overseer", 0);
        world.sim.name_entity(entity, || format!("who looks after {}", node.name()));
        let overseer = Rc::new(Self {
            world: world.clone(),
            disks: disks.clone(),
            entity,
            known: RefCell::default(),
            over: wait::Event::new(),
            done: wait::Event::new(),
        });
        host.spawn("overseer", 0, Rc::clone(&overseer).oversee());
        Some(overseer)
    }

    /// The program has ended; completes once that was noticed.
    pub(crate) async fn end(&self) {
        self.over.set();
        self.done.wait().await;
    }

    async fn oversee(self: Rc<Self>) {
        for n in 0.. {
            let (_, seen) = self.look();
            if n < CHANGES_MAX {
                self.unless_over(self.act(n)).await;
            }
            if !self.unless_over(self.disks.watch(seen)).await {
                break;
            }
        }
        let known = self.known.take();
        if self.look().0 != known {
            let text = format!("a change of the disks was missed: {known:?} were known at the end");
            self.world.fail(Invariant::D3, text);
        }
        self.done.set();
    }

    /// Whether `what` came before the end of the program, or with it.
    async fn unless_over<T>(&self, what: impl Future<Output = T>) -> bool {
        let (mut what, mut over) = (pin!(what), pin!(self.over.wait()));
        poll_fn(|cx| match what.as_mut().poll(cx) {
            Poll::Ready(_) => Poll::Ready(true),
            Poll::Pending => over.as_mut().poll(cx).map(|()| false),
        })
        .await
    }

    /// Notes the disks that there are, and gives them with the number of changes.
    fn look(&self) -> (Vec<(String, &'static str)>, u64) {
        let (listed, seen) = self.disks.list();
        let states: Vec<_> = listed.into_iter().map(|disk| (disk.name, disk.state)).collect();
        if states.iter().any(|(_, state)| *state == "closed") {
            self.world.fail(Invariant::D3, format!("a closed disk is in the list: {states:?}"));
        }
        self.known.borrow_mut().clone_from(&states);
        (states, seen)
    }

    /// What is done after change `n`.
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

    /// Pauses one disk, which may be closed at any time.
    async fn pause(&self, name: &str, ns: u64) {
        let Some(disk) = self.disks.get(name) else { return };
        let slot = disk.slot().clone();
        drop(disk);
        let wrong = |text: String| self.world.fail(Invariant::D1, format!("disk {name}: {text}"));
        match slot.pause().await {
            Ok(()) => {}
            Err(Errno::ESHUTDOWN) => return,
            Err(error) => return wrong(format!("pausing it failed with {error:?}")),
        }
        self.world.sim.sleep_ns(ns).await;
        if slot.in_flight() > 0 {
            wrong(format!(
                "it was paused, is {}, and has {} requests in flight",
                slot.state(),
                slot.in_flight()
            ));
        }
        if let Err(error) = slot.resume()
            && error != Errno::ESHUTDOWN
        {
            wrong(format!("resuming it failed with {error:?}"));
        }
    }
}
