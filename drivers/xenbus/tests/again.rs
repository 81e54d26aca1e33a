//! A front end that reconnects again and again.

mod device;

use device::{Device, world};
use sim::Config;
use tap_xenbus::BackendEnd;

#[test]
fn a_front_end_that_begins_anew_in_a_loop_is_made_to_wait() {
    world(&Config { faults: false, ..Config::new(1) }, async |world| {
        let d = Device::new(&world, false).await;
        d.start(0);
        let mut took_ms = Vec::new();
        for _ in 0..24 {
            let before_ns = world.sim.now_ns();
            let front = d.connect().await;
            d.disconnect(front).await;
            d.set_front("state", "1").await;
            took_ms.push((world.sim.now_ns() - before_ns) / 1_000_000);
        }
        assert!(took_ms[..8].iter().all(|ms| *ms < 5), "a few reconnects are not delayed: {took_ms:?}");
        assert!(took_ms[16..].iter().all(|ms| (950..1050).contains(ms)), "{took_ms:?}");
        d.set_back("online", "0").await;
        d.settle().await;
        assert!(world.sim.now_ns() > 8_000_000_000);
        assert_eq!(d.end(), Some(Ok(BackendEnd::Offline)), "a toolstack need not wait");
        d.assert_nothing_held();
    });
}
