//! The back end against the model's xenstore, a toolstack, good and bad front ends.

mod device;

use device::common::World;
use device::common::front::{Front, workload};
use device::{Device, world};
use sim::{Config, Scheduling};
use std::cell::RefCell;
use std::rc::Rc;
use tap_abi::blkif::{BlkifOp, BlkifRequest};
use tap_abi::xenbus::XenbusState;
use tap_core::wait;
use tap_host::{DomId, Errno, Mark, Transaction, Xenstore};
use tap_xenbus::{BackendEnd, BackendError, DeviceFilter, Hotplug, supervise};
use xen_model::Counts;

fn quiet() -> Config {
    Config { faults: false, ..Config::new(1) }
}

fn busy(seed: u64) -> Config {
    Config { scheduling: Scheduling::Random { one_in: 4, bits: 16 }, ..Config::new(seed) }
}

#[test]
fn a_device_lives_twice_and_is_taken_away() {
    for seed in 0..40 {
        let world = world(&busy(seed), async |world| {
            let d = Device::new(&world, false).await;
            d.start(0);
            let front = d.connect().await;
            for (key, value) in [
                ("sectors", "1024"),
                ("sector-size", "512"),
                ("physical-sector-size", "512"),
                ("info", "0"),
                ("mode", "w"),
                ("feature-flush-cache", "1"),
                ("max-ring-page-order", "0"),
                ("hotplug-status", "connected"),
            ] {
                assert_eq!(d.back(key).await.as_deref(), Some(value), "{key}");
            }
            d.work(&front, 100).await;
            d.disconnect(front).await;
            d.set_front("state", "1").await;
            let front = d.connect().await;
            d.work(&front, 50).await;
            d.set_back("online", "0").await;
            d.set_back("state", "5").await;
            d.until_back(XenbusState::Closing).await;
            d.disconnect(front).await;
            d.settle().await;
            assert_eq!(d.end(), Some(Ok(BackendEnd::Offline)));
            d.assert_nothing_held();
        });
        assert_eq!(world.kernel.marked(Mark::find(tap_xenbus::MARKS, "reconnected").unwrap()), 1);
    }
}

/// Everything that a guest does with a device, on back ends that die after the given numbers of effects.
fn live_with_deaths(seed: u64, deaths: Vec<u64>) -> (u64, World) {
    let steps = Rc::new(RefCell::new(0));
    let first_steps = Rc::clone(&steps);
    let world = world(&busy(seed), async move |world| {
        let d = Device::new(&world, false).await;
        let (supervised, doomed) = (d.clone(), deaths);
        let first = d.start(0);
        if let Some(after) = doomed.first() {
            first.kill_after_steps(*after);
        }
        let mut node = first.clone();
        world.sim.spawn("supervisor", 0, async move {
            for nth in 1.. {
                node.dead().await;
                node = supervised.start(nth);
                if let Some(after) = doomed.get(nth as usize) {
                    node.kill_after_steps(*after);
                }
            }
        });
        let front = d.connect().await;
        d.work(&front, 30).await;
        d.disconnect(front).await;
        d.set_front("state", "1").await;
        let front = d.connect().await;
        d.work(&front, 10).await;
        d.set_back("online", "0").await;
        d.set_back("state", "5").await;
        d.disconnect(front).await;
        d.settle().await;
        assert_eq!(d.end(), Some(Ok(BackendEnd::Offline)));
        assert_eq!(d.back("error").await, None);
        d.assert_nothing_held();
        *first_steps.borrow_mut() = first.steps();
    });
    (steps.take(), world)
}

#[test]
fn a_device_survives_a_death_of_its_back_end_at_any_effect() {
    let mut resumed = 0;
    for seed in 0..2 {
        let (steps, _) = live_with_deaths(seed, vec![]);
        for after in 0..=steps {
            let (_, world) = live_with_deaths(seed, vec![after]);
            resumed += world.marked("record-resumed");
        }
    }
    assert!(resumed > 100, "{resumed}");
}

#[test]
fn a_device_survives_several_deaths() {
    for seed in 0..300 {
        live_with_deaths(seed, (0..5).map(|n| sim::mix2(seed, n) % 250).collect());
    }
}

#[test]
fn what_is_in_flight_when_a_front_end_closes_is_answered_also_by_a_successor() {
    for dies in [false, true] {
        world(&quiet(), async move |world| {
            let d = Device::new(&world, false).await;
            let node = d.start(0);
            let front = d.connect().await;
            let segments = [front.segment(0, 0, 0)];
            for id in 0..8 {
                assert!(front.ring.put(&BlkifRequest::new(id, BlkifOp::Write, id, &segments).unwrap()));
            }
            front.ring.publish();
            world.sim.sleep_ns(1_000).await;
            assert_eq!(d.disk.log().len(), 8, "taken");
            if dies {
                node.kill();
            }
            d.set_front("state", "5").await;
            if dies {
                d.start(1);
            }
            d.until_back(XenbusState::Closing).await;
            d.set_front("state", "6").await;
            d.until_back(XenbusState::Closed).await;
            for _ in 0..8 {
                assert_eq!(front.ring.take().unwrap().expect("an answer each").status.get(), 0);
            }
            assert_eq!(d.disk.log().len(), if dies { 16 } else { 8 });
            assert_eq!(d.back("error").await, None);
        });
    }
}

#[test]
fn what_a_front_end_must_not_say_is_told_and_closed() {
    for (key, value) in [
        ("ring-ref", "x"),
        ("ring-ref", "4096"),
        ("ring-ref", "-1"),
        ("event-channel", ""),
        ("event-channel", "99999"),
        ("protocol", "x86_32-abi"),
        ("protocol", "x86_64-abi\0"),
        ("ring-page-order", "1"),
        ("num-ring-pages", "2"),
        ("multi-queue-num-queues", "4"),
    ] {
        world(&quiet(), async move |world| {
            let d = Device::new(&world, false).await;
            d.start(0);
            d.until_back(XenbusState::InitWait).await;
            let front = Front::new(&d.guest);
            // Wrong until it is ready: the keys are not read earlier.
            front.ring.publish_in_store(&format!("{}/elsewhere", d.paths.frontend)).await.unwrap();
            for own in ["ring-ref", "event-channel", "protocol"] {
                let right = d.read(&format!("{}/elsewhere", d.paths.frontend), own).await.unwrap();
                d.set_front(own, &right).await;
            }
            d.set_front(key, value).await;
            d.set_front("state", "3").await;
            d.until_back(XenbusState::Closing).await;
            let error = d.back("error").await.unwrap();
            assert!(error.starts_with("failed to ") && error.len() > 20, "{key} {value}: {error}");
            assert_eq!(world.xen.mapped_from(d.guest.dom()), 0);
            // The next driver behaves.
            d.set_front("state", "6").await;
            d.until_back(XenbusState::Closed).await;
            d.guest.remove(&format!("{}/{key}", d.paths.frontend)).await.unwrap();
            d.set_front("state", "1").await;
            let front = d.connect().await;
            assert_eq!(d.back("error").await, None);
            d.work(&front, 10).await;
        });
    }
}

#[test]
fn a_ring_that_cannot_be_ends_the_connection() {
    let world = world(&quiet(), async |world| {
        let d = Device::new(&world, false).await;
        d.start(0);
        let front = d.connect().await;
        front.ring.page().store_u32(0, 77);
        tap_host::EventChannel::notify(front.ring.channel());
        d.until_back(XenbusState::Closing).await;
        assert!(d.back("error").await.unwrap().starts_with("failed to serve the ring: "));
        assert_eq!(world.xen.mapped_from(d.guest.dom()), 0);
        d.set_front("state", "6").await;
        d.until_back(XenbusState::Closed).await;
    });
    assert_eq!(world.marked("ring-refused"), 1);
}

#[test]
fn a_host_that_is_short_of_memory_is_waited_for_and_then_told_of() {
    for (short_ns, served) in [(1_000_000_000, true), (3_000_000_000, false)] {
        world(&quiet(), async move |world| {
            let d = Device::new(&world, false).await;
            d.start(0);
            d.until_back(XenbusState::InitWait).await;
            world.xen.run_short(short_ns);
            let front = Front::new(&d.guest);
            front.ring.publish_in_store(&d.paths.frontend).await.unwrap();
            d.until_back(if served { XenbusState::Connected } else { XenbusState::Closing }).await;
            assert_eq!(world.xen.mapped_from(d.guest.dom()) > 0, served);
            assert_eq!(d.back("error").await.is_none_or(|e| !e.contains("ENOMEM")), served);
        });
    }
}

#[test]
fn ends_that_vanish() {
    for (front_end, connected) in [(true, true), (true, false), (false, true), (false, false)] {
        world(&quiet(), async move |world| {
            let d = Device::new(&world, false).await;
            d.start(0);
            if connected {
                let front = d.connect().await;
                d.work(&front, 5).await;
            } else {
                d.until_back(XenbusState::InitWait).await;
            }
            let gone = if front_end { &d.paths.frontend } else { &d.paths.backend };
            d.toolstack.remove(gone).await.unwrap();
            d.settle().await;
            let end = if front_end { BackendEnd::FrontendGone } else { BackendEnd::BackendGone };
            assert_eq!(d.end(), Some(Ok(end)));
            let left = d.toolstack.read(&d.paths.backend).await;
            assert_eq!(left.is_ok(), front_end, "a removed directory is not made again");
            // A toolstack that removes the front end by force waits for this.
            assert_eq!(d.back("state").await.as_deref(), front_end.then_some("6"));
            d.assert_nothing_held();
        });
    }
}

#[test]
fn a_process_that_leaves_is_followed_by_another_and_the_front_end_does_not_notice() {
    let mut resumed = 0;
    for seed in 0..60 {
        let world = world(&busy(seed), async move |world| {
            let d = Device::new(&world, false).await;
            d.start(0);
            let front = d.connect().await;
            let (leaver, worked) = (d.clone(), Rc::new(std::cell::Cell::new(false)));
            let done = Rc::clone(&worked);
            let (sim, f) = (world.sim.clone(), Rc::clone(&front));
            world.sim.spawn("work", 0, async move {
                workload(sim, f, 300, 32, seed).await.unwrap();
                done.set(true);
            });
            for nth in 1..4 {
                world.sim.sleep_ns(20_000 + sim::mix2(seed, nth) % 50_000).await;
                leaver.leave.set();
                d.settle().await;
                assert_eq!(d.ends.borrow_mut().pop(), Some(Ok(BackendEnd::Left)));
                assert_eq!((d.back("state").await.as_deref(), d.back("error").await), (Some("4"), None));
                assert_eq!(
                    world.xen.counts(DomId(0)),
                    Counts::default(),
                    "nothing is held between processes"
                );
                leaver.leave.clear();
                d.start(nth);
            }
            d.settle().await;
            assert!(worked.get(), "the workload came to its end");
            d.disconnect(front).await;
        });
        assert!(world.marked("ring-left") == 3, "{}", world.marked("ring-left"));
        resumed += world.marked("record-resumed");
    }
    assert_eq!(resumed, 0, "an orderly leave leaves nothing in flight");
}

#[test]
fn who_leaves_before_anything_is_connected_leaves_what_there_is() {
    world(&quiet(), async |world| {
        let d = Device::new(&world, false).await;
        d.start(0);
        d.until_back(XenbusState::InitWait).await;
        d.leave.set();
        d.settle().await;
        assert_eq!((d.end(), d.back("state").await.as_deref()), (Some(Ok(BackendEnd::Left)), Some("2")));
        d.leave.clear();
        d.start(1);
        let front = d.connect().await;
        d.work(&front, 20).await;
    });
}

#[test]
fn a_guest_that_is_destroyed_leaves_nothing_mapped() {
    world(&quiet(), async |world| {
        let d = Device::new(&world, false).await;
        d.start(0);
        let front = d.connect().await;
        d.work(&front, 5).await;
        world.xen.destroy_domain(d.guest.dom());
        d.toolstack.remove(&d.paths.frontend).await.unwrap();
        d.set_back("online", "0").await;
        d.set_back("state", "5").await;
        d.settle().await;
        assert_eq!(d.back("state").await.as_deref(), Some("6"));
        assert_eq!(d.end(), Some(Ok(BackendEnd::FrontendGone)));
        d.assert_nothing_held();
    });
}

/// A process starts where its predecessor died while the front end closed, and offers the device again. The state that
/// the toolstack writes to have it closed is the one that is there already.
#[test]
fn a_device_that_is_taken_offline_meanwhile_is_not_offered_anew() {
    for after_ns in (0..100_000).step_by(500) {
        world(&quiet(), async move |world| {
            let d = Device::new(&world, false).await;
            d.set_back("state", "5").await;
            d.start(0);
            world.sim.sleep_ns(after_ns).await;
            loop {
                let tx = d.toolstack.transaction().await.unwrap();
                tx.write(&format!("{}/online", d.paths.backend), b"0").await.unwrap();
                tx.write(&format!("{}/state", d.paths.backend), b"5").await.unwrap();
                // Both write the same nodes.
                if tx.commit().await != Err(Errno::EAGAIN) {
                    break;
                }
            }
            d.settle().await;
            assert_eq!(d.end(), Some(Ok(BackendEnd::Offline)), "offline after {after_ns} ns");
            assert_eq!(d.back("state").await.as_deref(), Some("6"));
        });
    }
}

#[test]
fn a_disk_in_use_is_served_for_as_long_as_its_front_end_uses_it() {
    world(&quiet(), async |world| {
        let d = Device::new(&world, false).await;
        d.start(0);
        let front = d.connect().await;
        d.set_back("online", "0").await;
        d.set_back("state", "5").await;
        world.sim.sleep_ns(60_000_000_000).await;
        d.work(&front, 20).await;
        // It was asked to close, and does not: its disk is mounted.
        d.set_front("state", "5").await;
        world.sim.sleep_ns(60_000_000_000).await;
        d.work(&front, 20).await;
        assert_eq!((d.back("state").await.as_deref(), d.end()), (Some("5"), None));
        d.disconnect(front).await;
        d.settle().await;
        assert_eq!(d.end(), Some(Ok(BackendEnd::Offline)));
        d.assert_nothing_held();
    });
}

#[test]
fn a_toolstack_is_told_when_the_image_is_closed_and_not_before() {
    world(&quiet(), async |world| {
        let d = Device::new(&world, false).await;
        d.start(0);
        let front = d.connect().await;
        d.work(&front, 5).await;
        d.disk.hold_close(true);
        d.set_back("online", "0").await;
        d.set_back("state", "5").await;
        d.set_front("state", "5").await;
        d.set_front("state", "6").await;
        world.sim.sleep_ns(30_000_000_000).await;
        assert_eq!((d.back("state").await.as_deref(), d.end()), (Some("5"), None));
        d.disk.hold_close(false);
        d.settle().await;
        assert_eq!(d.end(), Some(Ok(BackendEnd::Offline)));
        assert_eq!(d.back("state").await.as_deref(), Some("6"));
    });
}

#[test]
fn a_read_only_disk_says_so() {
    world(&quiet(), async |world| {
        let d = Device::new(&world, true).await;
        d.start(0);
        let front = d.connect().await;
        assert_eq!(
            (d.back("info").await.as_deref(), d.back("mode").await.as_deref()),
            (Some("4"), Some("r"))
        );
        let segments = [front.segment(0, 0, 0)];
        let write =
            tap_abi::blkif::BlkifRequest::new(1, tap_abi::blkif::BlkifOp::Write, 0, &segments).unwrap();
        assert_eq!(front.status(&write).await, -1);
    });
}

#[test]
fn a_front_end_that_names_no_protocol_speaks_ours() {
    world(&quiet(), async |world| {
        let d = Device::new(&world, false).await;
        d.start(0);
        d.until_back(XenbusState::InitWait).await;
        let front = Front::new(&d.guest);
        d.set_front("ring-ref", &front.ring.ring_ref().0.to_string()).await;
        d.set_front("event-channel", &front.ring.event_port().0.to_string()).await;
        d.set_front("state", "3").await;
        d.until_back(XenbusState::Connected).await;
        d.work(&front, 5).await;
    });
}

#[test]
fn a_hotplug_script_is_waited_for() {
    world(&quiet(), async |world| {
        let mut d = Device::new(&world, false).await;
        d.config.hotplug = Hotplug::Wait;
        d.start(0);
        d.until_back(XenbusState::InitWait).await;
        let front = Front::new(&d.guest);
        front.ring.publish_in_store(&d.paths.frontend).await.unwrap();
        d.settle().await;
        assert_eq!(d.back("state").await.unwrap(), "2");
        d.set_back("hotplug-status", "connected").await;
        d.until_back(XenbusState::Connected).await;
        d.work(&front, 5).await;
    });
}

#[test]
fn a_directory_of_somebody_else_is_refused() {
    for (key, value) in
        [("frontend-id", "7"), ("frontend", "/local/domain/7/device/vbd/1"), ("frontend", "x")]
    {
        world(&quiet(), async move |world| {
            let d = Device::new(&world, false).await;
            d.set_back(key, value).await;
            d.start(0);
            d.settle().await;
            assert!(matches!(d.end(), Some(Err(BackendError::NotOurs { .. }))), "{key} {value}");
            d.assert_nothing_held();
        });
    }
}

#[test]
fn whatever_a_front_end_does_nothing_is_left() {
    for seed in 0..300 {
        world(&busy(seed), async move |world| {
            let d = Device::new(&world, false).await;
            d.start(0);
            let front = Front::new(&d.guest);
            for nth in 0..40_u64 {
                let bits = sim::mix2(seed, nth);
                let any = ["", "0", "1", "2", "3", "4", "5", "6", "7", "99", "x86_64-abi", "8", "\u{fffd}"];
                let value = any[(bits >> 8) as usize % any.len()];
                match bits % 8 {
                    0..4 => d.set_front("state", value).await,
                    4 => d.set_front("ring-ref", value).await,
                    5 => front.ring.publish_in_store(&d.paths.frontend).await.unwrap(),
                    6 => {
                        front
                            .ring
                            .page()
                            .store_u32(((bits >> 16) % 16) as usize * 4, (bits >> 32) as u32 % 40);
                        tap_host::EventChannel::notify(front.ring.channel());
                    }
                    _ => world.sim.sleep_ns(bits >> 40).await,
                }
            }
            let state = d.guest.read(&format!("{}/state", d.paths.backend)).await;
            assert_ne!(state, Err(Errno::ENOENT), "seed {seed}");
            d.toolstack.remove(&d.paths.frontend).await.unwrap();
            d.settle().await;
            assert_eq!(d.end(), Some(Ok(BackendEnd::FrontendGone)), "seed {seed}");
            d.assert_nothing_held();
        });
    }
}

#[test]
fn records_that_cannot_be_listed_end_a_tapdisk_that_watches() {
    world(&quiet(), async |world| {
        let host = world.process("tapdisk", 0);
        host.port.hide_regions();
        let filter = DeviceFilter {
            root: "/local/domain/0/backend/vbd".into(),
            script: Some("block-tapdisk".into()),
            records: "ring",
        };
        let end = supervise(&host, &filter, &wait::Event::new(), |_| std::future::ready(())).await;
        assert_eq!(end, Err(BackendError::Records { error: Errno::EACCES }));
    });
}
