//! Processes that die between any two effects, and their successors: the guest notices nothing but a pause.

mod common;

use common::front::{Front, ring_config, workload};
use common::{Disk, World};
use sim::{Config, Scheduling};
use std::cell::RefCell;
use std::rc::Rc;
use tap_host::{DomId, Errno, Time};
use tap_ring::{BlkifRing, ConnectError, Limits, RingConfig, RingEnd};

const REQUESTS: u64 = 40;

/// How a run of dying processes ended.
#[derive(Default)]
struct Outcome {
    /// The workload came to its end.
    served: bool,
    /// Why a process gave the ring up.
    refused: Option<String>,
    /// The first process.
    first: Option<sim::Node>,
    resumed: u64,
    responses_resumed: u64,
}

/// Runs the workload on processes that die after the given numbers of effects, and then on one that does not.
fn run(seed: u64, depth: usize, deaths: &[u64], bug: Option<&'static str>) -> Outcome {
    let config = Config { scheduling: Scheduling::Random { one_in: 4, bits: 14 }, ..Config::new(seed) };
    let config = Config { limits: sim::Limits { time_ns: 2_000_000_000, ..config.limits }, ..config };
    let world = World::new(&config);
    if let Some(bug) = bug {
        world.plant(bug);
    }
    let outcome = Rc::new(RefCell::new(Outcome::default()));
    let (shared, deaths, inside) = (Rc::clone(&outcome), deaths.to_vec(), world.clone());
    let body = async move {
        let world = inside;
        let front = Front::new(&world.guest());
        let disk = Disk::new(&world.sim, 1024);
        let limits = Limits {
            buffer_bytes: [2 << 20, 64 << 10, 4096][seed as usize % 3],
            batch: [32, 3, 1][seed as usize / 3 % 3],
        };
        let config = RingConfig { limits, ..ring_config(&front, Some("record")) };
        let supervisor = supervise(world.clone(), config, disk, deaths, Rc::clone(&shared));
        world.sim.spawn("supervisor", 0, supervisor);
        let result = workload(world.sim.clone(), front, REQUESTS, depth, seed).await;
        shared.borrow_mut().served = result.is_ok();
        let held = world.xen.counts(DomId(0));
        assert!(held.maps <= 1 && held.channels <= 1, "dead processes still hold something: {held:?}");
    };
    let ended = world.sim.run(body);
    let mut outcome = outcome.take();
    outcome.served &= ended.is_ok();
    outcome.resumed = world.marked("record-resumed");
    outcome.responses_resumed = world.marked("response-resumed");
    outcome
}

async fn supervise(
    world: World,
    config: RingConfig,
    disk: Disk,
    deaths: Vec<u64>,
    outcome: Rc<RefCell<Outcome>>,
) {
    for nth in 0.. {
        let host = world.process("tapdisk", nth);
        let node = host.process.node().clone();
        if let Some(steps) = deaths.get(nth as usize) {
            node.kill_after_steps(*steps);
        }
        outcome.borrow_mut().first.get_or_insert(node.clone());
        let (config, disk, outcome_of_ring) = (config.clone(), disk.clone(), Rc::clone(&outcome));
        let process = node.clone();
        node.spawn("ring", 0, async move {
            let ring = loop {
                match BlkifRing::connect(host.clone(), config.clone(), disk.node()) {
                    // The dead process still holds it.
                    Err(ConnectError::Bind { error: Errno::EINVAL, .. }) if process.is_alive() => {
                        host.sleep_ns(1_000_000).await;
                    }
                    result => break result,
                }
            };
            let refused = match ring {
                Ok(ring) => match ring.run().await {
                    RingEnd::Closed => return,
                    end => format!("{end:?}"),
                },
                // The process may have died in the middle of it.
                Err(_) if !process.is_alive() => return,
                Err(error) => error.to_string(),
            };
            if process.is_alive() {
                outcome_of_ring.borrow_mut().refused = Some(refused);
            }
        });
        node.dead().await;
    }
}

#[test]
fn a_guest_does_not_notice_a_death_at_any_effect() {
    let (mut resumed, mut responses_resumed) = (0, 0);
    for (seed, depth) in [(1, 32), (2, 5), (3, 1)] {
        let steps = run(seed, depth, &[], None).first.unwrap().steps();
        assert!(steps > REQUESTS * 5, "{steps} steps");
        for n in 0..=steps {
            let outcome = run(seed, depth, &[n], None);
            assert_eq!(
                (outcome.served, outcome.refused),
                (true, None),
                "seed {seed}, death after {n} effects"
            );
            resumed += outcome.resumed;
            responses_resumed += outcome.responses_resumed;
        }
    }
    assert!(resumed > 100 && responses_resumed > 10, "{resumed} {responses_resumed}");
}

#[test]
fn nor_several_deaths_in_a_row() {
    for seed in 0..1000 {
        let deaths: Vec<u64> = (0..6).map(|n| sim::mix2(seed, n) % 120).collect();
        let outcome = run(seed, 1 + seed as usize % 32, &deaths, None);
        assert_eq!((outcome.served, outcome.refused), (true, None), "seed {seed}, deaths after {deaths:?}");
    }
}

#[test]
fn seeded_bugs_are_noticed() {
    for bug in ["lost-at-reconnect", "response-twice", "record-late"] {
        let caught = (0..300).find(|n| {
            let outcome = run(1, 32, &[*n], Some(bug));
            !outcome.served || outcome.refused.is_some()
        });
        assert!(caught.is_some(), "{bug:?}");
    }
}

fn one_ring(body: impl AsyncFnOnce(World, Rc<Front>, Disk) + 'static) {
    let world = World::new(&Config { faults: false, ..Config::new(1) });
    let inside = world.clone();
    world
        .sim
        .run(async move {
            let front = Front::new(&inside.guest());
            let disk = Disk::new(&inside.sim, 1024);
            body(inside, front, disk).await;
        })
        .unwrap();
}

/// Serves a few requests and dies.
async fn die(world: &World, front: &Rc<Front>, disk: &Disk, seed: u64) {
    let host = world.process("tapdisk", seed);
    let ring = BlkifRing::connect(host.clone(), ring_config(front, Some("record")), disk.node()).unwrap();
    host.process.node().spawn("ring", 0, async move {
        ring.run().await;
    });
    workload(world.sim.clone(), Rc::clone(front), 5, 2, seed).await.unwrap();
    host.process.node().kill();
    host.process.node().dead().await;
}

#[test]
fn the_record_of_another_ring_is_replaced() {
    one_ring(async |world, old, disk| {
        die(&world, &old, &disk, 0).await;
        // The guest makes a new ring with the numbers of the old one, as after a reboot of its kernel.
        let page = old.ring.page();
        page.write(0, &[0; 4096]);
        page.store_u32(4, 1);
        page.store_u32(12, 1);
        let host = world.process("tapdisk", 1);
        let ring = BlkifRing::connect(host.clone(), ring_config(&old, Some("record")), disk.node()).unwrap();
        drop(ring);
        // A different ring altogether.
        let new = Front::new(&world.guest());
        let ring = BlkifRing::connect(host.clone(), ring_config(&new, Some("record")), disk.node()).unwrap();
        host.process.node().spawn("ring", 0, async move {
            ring.run().await;
        });
        workload(world.sim.clone(), new, 20, 8, 9).await.unwrap();
        assert_eq!(world.marked("record-resumed"), 0);
    });
}

#[test]
fn a_damaged_record_is_refused_and_kept() {
    for (offset, value) in [(28, 6_u32), (64, 9), (64, 1), (64, 0x402)] {
        one_ring(async move |world, front, disk| {
            die(&world, &front, &disk, 0).await;
            world.xen.region_page("record").unwrap().store_u32(offset, value);
            let host = world.process("tapdisk", 1);
            let refused = BlkifRing::connect(host, ring_config(&front, Some("record")), disk.node()).err();
            assert!(matches!(refused, Some(ConnectError::Record(_))), "{offset} {value}: {refused:?}");
            assert_eq!(world.xen.regions(), ["record"], "the record is kept for debugging");
            assert_eq!(world.xen.counts(DomId(0)).maps, 0);
        });
    }
}

#[test]
fn a_used_ring_without_its_record_is_refused() {
    one_ring(async |world, front, disk| {
        die(&world, &front, &disk, 0).await;
        world.xen.clear_regions();
        let host = world.process("tapdisk", 1);
        let refused = BlkifRing::connect(host, ring_config(&front, Some("record")), disk.node()).err();
        assert_eq!(refused, Some(ConnectError::InUse));
    });
}

#[test]
fn a_ring_that_was_served_and_has_lost_its_record_is_refused() {
    // At whichever effect its process dies: answers may be in the slots of requests before the first is published.
    for effects in 0..120 {
        one_ring(async move |world, front, disk| {
            let host = world.process("tapdisk", 0);
            let node = host.process.node().clone();
            node.kill_after_steps(effects);
            let ring = BlkifRing::connect(host.clone(), ring_config(&front, Some("record")), disk.node());
            if let Ok(ring) = ring {
                node.spawn("ring", 0, async move {
                    ring.run().await;
                });
            }
            let requests = workload(world.sim.clone(), Rc::clone(&front), 8, 8, 1);
            world.sim.spawn("guest", 0, async move { drop(requests.await) });
            world.sim.sleep_ns(20_000_000).await;
            node.kill();
            node.dead().await;
            // It marks a ring before it takes a request.
            let was_served = front.ring.page().load_u32(60) != 0;
            let log = disk.log().len();
            assert!(was_served || log == 0, "{effects}");
            for record in [None, Some("record")] {
                world.xen.clear_regions();
                let host = world.process("tapdisk", 1 + u64::from(record.is_some()));
                let ring = BlkifRing::connect(host, ring_config(&front, record), disk.node());
                let expected = was_served.then_some(ConnectError::InUse);
                assert_eq!(ring.err(), expected, "after {effects} effects");
            }
        });
    }
}
