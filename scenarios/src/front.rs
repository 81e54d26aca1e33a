//! The front end of an attached disk: the layout of its requests, the keys in which it publishes its ring, boot and
//! shutdown.

use crate::check::Invariant;
use crate::check::oracle::{Oracle, is_broken};
use crate::guest::{ErrorPolicy, Guest, RingDisk};
use crate::machine::Attached;
use crate::world::World;
use kernel_model::{Blkfront, Complaint, KeysOf, LayoutOf, LingersOf, OnPublished, Published, SegmentLayout};
use sim::{Entity, FaultKind, Label};
use std::rc::Rc;
use tap_host::{DomId, SECTOR_BYTES};
use xen_model::FrontKeys;

/// How the sectors of a request are placed in its pages, if not in whole pages.
pub static SEGMENTS: Label =
    Label::packed("segments", "its pages have (8 less, first sector) {} sectors", &[3, 3]);

static ODD_SEGMENTS: FaultKind = FaultKind { name: "odd-segments", max_ppm: 500_000 };

/// Some guests have requests whose segments are not whole pages.
pub(crate) fn segment_layout(world: &World) -> LayoutOf {
    let (sim, rate_ppm) = (world.sim.clone(), world.sim.swarm().rate_ppm(&ODD_SEGMENTS));
    Rc::new(move |range| {
        if rate_ppm == 0 && !sim.has_given_decisions() {
            return SegmentLayout::WHOLE;
        }
        let entity = sim.derive("segments", range.start.0);
        sim.name_entity(entity, || format!("request for {range}"));
        let value = sim.fault(entity, &SEGMENTS, rate_ppm, |d| d.below(64));
        SegmentLayout { per_page: 8 - (value & 7) as u32, first: (value >> 3 & 7) as u32 }
    })
}

/// In which keys a front end publishes its ring, and which keys its predecessor has left.
pub static FRONT_KEYS: Label =
    Label::packed("front-keys", "front end {n} (counts its pages, finds keys of another kind) {}", &[1, 1]);

static OTHER_FRONT_ENDS: FaultKind = FaultKind { name: "other-front-ends", max_ppm: 700_000 };

/// Some guests have several kinds of front ends, one after the other.
fn front_keys(world: &World, disk: &Attached) -> KeysOf {
    let (sim, rate_ppm) = (world.sim.clone(), world.sim.swarm().rate_ppm(&OTHER_FRONT_ENDS));
    let entity = Entity::WORLD.child("front-keys", u64::from(disk.dom.0) << 32 | u64::from(disk.vbd.0));
    sim.name_entity(entity, || format!("front end of {}", disk.dom));
    Rc::new(move |nth| {
        let value = sim.nth_fault(entity, &FRONT_KEYS, nth, rate_ppm, |d| 1 + d.below(3));
        FrontKeys { counted: value & 1 != 0, leftovers: value & 2 != 0 }
    })
}

/// How long a front end keeps using its disk after it says that it is closing.
pub static LINGERS: Label =
    Label::new("lingers", "front end {n} says that it is closing and uses its disk for {} more ns");

static LINGERING: FaultKind = FaultKind { name: "lingering-front-ends", max_ppm: 500_000 };

fn lingers(world: &World, disk: &Attached) -> LingersOf {
    let (sim, rate_ppm) = (world.sim.clone(), world.sim.swarm().rate_ppm(&LINGERING));
    let entity = Entity::WORLD.child("front-lingers", u64::from(disk.dom.0) << 32 | u64::from(disk.vbd.0));
    sim.name_entity(entity, || format!("front end of {}", disk.dom));
    Rc::new(move |nth| sim.nth_fault(entity, &LINGERS, nth, rate_ppm, |d| d.magnitude(33)))
}

impl Attached {
    /// Compares what a back end publishes about the disk with the truth.
    fn truth(&self, world: &World) -> OnPublished {
        let truth = Published {
            sectors: Some(self.setup.size_sectors),
            sector_bytes: Some(SECTOR_BYTES),
            read_only: Some(self.read_only),
            flushes: true,
            discards: false,
            error: None,
            hotplug: Some("connected".into()),
        };
        let (world, setup) = (world.clone(), self.setup.clone());
        Rc::new(move |published| {
            let mut truth = truth.clone();
            if let Some(sectors) = published.sectors.filter(|_| setup.may_grow) {
                setup.published(&world, sectors);
                truth.sectors = Some(sectors);
            }
            if *published != truth {
                world.fail(
                    Invariant::F1,
                    format!("the back end published {published:?}, the truth is {truth:?}"),
                );
            }
        })
    }

    /// The guest's front end, which reports to the verdict.
    pub fn front(&self, world: &World) -> Blkfront {
        let w = world.clone();
        let complain: Complaint = Rc::new(move |text| {
            if !is_broken(Oracle::AnswersIgnored) {
                w.fail(Invariant::X1, text);
            }
        });
        let front = Blkfront::new(&self.port, &self.node, DomId(0), self.paths.clone(), complain);
        if world.setting("pages-revoked", &[false, true]) {
            front.revoke_pages();
        }
        front.set_layout(segment_layout(world));
        front.set_keys(front_keys(world, self));
        front.on_published(self.truth(world));
        if self.setup.may_grow {
            let (world, setup) = (world.clone(), self.setup.clone());
            front.on_resized(Rc::new(move |sectors| setup.published(&world, sectors)));
        }
        front.set_lingers(lingers(world, self));
        front
    }

    /// Boots a guest on a connected front end.
    pub async fn boot(&self, world: &World, policy: ErrorPolicy) -> Option<Guest<RingDisk>> {
        self.boot_on(world, policy, self.front(world)).await
    }

    /// The same, on a front end that was used before.
    pub async fn boot_on(
        &self,
        world: &World,
        policy: ErrorPolicy,
        front: Blkfront,
    ) -> Option<Guest<RingDisk>> {
        if let Err(error) = front.connect().await {
            world.fail(Invariant::L1, format!("the front end failed to connect: {error:?}"));
            return None;
        }
        Some(Guest::new(world, RingDisk::new(front), Rc::clone(&self.setup.history), policy))
    }

    /// Shuts the guest's disk down in order; every page must be released.
    pub async fn shut_down(&self, world: &World, guest: &Guest<RingDisk>) {
        let front = guest.disk().front();
        if let Err(error) = front.close().await {
            world.fail(Invariant::L1, format!("the front end failed to close: {error:?}"));
        }
        if front.outstanding() > 0 {
            world.fail(Invariant::X1, format!("{} requests were never answered", front.outstanding()));
        }
        if let Err(text) = front.release() {
            world.fail(Invariant::K1, text);
        }
    }
}
