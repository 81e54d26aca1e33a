//! Disks that have become larger, or smaller, when a process takes them over.

mod device;

use device::common::Disk;
use device::common::front::Front;
use device::{Device, world};
use sim::Config;
use std::cell::Cell;
use std::rc::Rc;
use tap_host::{Either, Mark, Watcher, Xenstore, select};
use tap_xenbus::BackendError;

fn quiet() -> Config {
    Config { faults: false, ..Config::new(1) }
}

/// The device of `d` with another disk under it.
fn with_disk(d: &Device, sectors: usize) -> Device {
    Device { disk: Disk::new(&d.world.sim, sectors), ..d.clone() }
}

/// A connected front end, whose back end has died.
async fn abandoned(d: &Device) -> Rc<Front> {
    let node = d.start(0);
    let front = d.connect().await;
    d.work(&front, 20).await;
    node.kill();
    node.dead().await;
    front
}

/// Whether the state of the back end was written since the last call.
async fn was_written<W: Watcher>(d: &Device, watch: &W) -> bool {
    matches!(select(watch.next(), d.world.sim.sleep_ns(1)).await, Either::First(_))
}

#[test]
fn a_larger_disk_is_published_whoever_dies_on_the_way() {
    let survived = Rc::new(Cell::new(false));
    for steps in 1.. {
        let lives = Rc::clone(&survived);
        let world = world(&quiet(), async move |world| {
            let d = Device::new(&world, false).await;
            let front = abandoned(&d).await;
            let watch = d.guest.watch(&format!("{}/state", d.paths.backend)).await.unwrap();
            assert!(was_written(&d, &watch).await, "a new watch fires once");
            let larger = with_disk(&d, 2048);
            let node = larger.start(1);
            node.kill_after_steps(steps);
            d.settle().await;
            lives.set(node.is_alive());
            if !node.is_alive() {
                larger.start(2);
                d.settle().await;
            }
            assert_eq!(d.back("sectors").await.as_deref(), Some("2048"), "{steps}");
            assert_eq!(d.back("state").await.as_deref(), Some("4"), "{steps}");
            assert!(was_written(&d, &watch).await, "{steps}: the front end has to look");
            // Nothing is published twice.
            d.set_back("other", "1").await;
            d.settle().await;
            assert!(!was_written(&d, &watch).await, "{steps}");
            assert_eq!(d.end(), None, "{steps}");
            drop(front);
        });
        assert!(world.kernel.marked(Mark::find(tap_xenbus::MARKS, "growth-found").unwrap()) > 0, "{steps}");
        if survived.get() {
            return;
        }
    }
}

#[test]
fn a_front_end_that_has_not_looked_yet_finds_the_larger_size() {
    world(&quiet(), async |world| {
        let d = Device::new(&world, false).await;
        let node = d.start(0);
        let front = d.connect().await;
        node.kill();
        node.dead().await;
        // It was told, and has not said so: whoever comes next connects its ring.
        d.set_front("state", "3").await;
        with_disk(&d, 2048).start(1);
        d.settle().await;
        assert_eq!(d.back("sectors").await.as_deref(), Some("2048"));
        d.set_front("state", "4").await;
        d.settle().await;
        assert_eq!(d.back("state").await.as_deref(), Some("4"));
        drop(front);
    });
}

#[test]
fn a_smaller_disk_is_not_put_under_a_front_end() {
    world(&quiet(), async |world| {
        let d = Device::new(&world, false).await;
        let _front = abandoned(&d).await;
        for (told, disk, nth) in [("1024", 1023, 1), ("nonsense", 4096, 2), ("18446744073709551616", 4096, 3)]
        {
            d.set_back("sectors", told).await;
            with_disk(&d, disk).start(nth);
            world.sim.sleep_ns(5_000_000_000).await;
            let Some(Err(BackendError::NotTaken { why, .. })) = d.end() else {
                panic!("{told}: {:?}", d.end())
            };
            assert!(why.contains(&format!("has {disk} sectors, and the front end was told {told}")), "{why}");
            assert_eq!(d.back("sectors").await.as_deref(), Some(told));
        }
    });
}
