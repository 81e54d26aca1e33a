//! Trials that pass without a seeded bug of the driver find it.

use super::trial::{DEVICE, DIRECT, End, OVERLAY, PACKED, Trial};
use super::*;
use crate::testing::{Effect, Fault};

/// The number of trials out of `count` that fail with `bug`; all must pass without it.
fn found(bug: &'static str, count: u64, trial: impl Fn(u64) -> Trial) -> u64 {
    let mut found = 0;
    for seed in 0..count {
        let trial = trial(seed);
        if let Err(what) = (Trial { bug: None, ..trial }).run() {
            panic!("without {bug:?}: {what}\n{trial:?}");
        }
        let with = Trial { bug: Some(bug), ..trial };
        // A bug may also violate an assertion of the driver.
        let result = std::panic::catch_unwind(|| with.run());
        found += u64::from(!matches!(result, Ok(Ok(()))));
    }
    found
}

const CRASH: Trial =
    Trial { setup: SMALL, seed: 0, bug: None, fault: None, stop: None, end: End::Crash(128) };

fn crashes(setup: Setup) -> impl Fn(u64) -> Trial {
    move |seed| Trial { setup, seed, stop: Some(5 + seed % 50), ..CRASH }
}

fn kills(setup: Setup) -> impl Fn(u64) -> Trial {
    move |seed| Trial { setup, seed, stop: Some(5 + seed % 50), end: End::Kill, ..CRASH }
}

fn errors(setup: Setup, effect: Effect) -> impl Fn(u64) -> Trial {
    move |seed| {
        let fault = Some(Fault { nth: seed % 50, error: Errno::EIO, effect, sticky: false });
        Trial { setup, seed, fault, end: End::Kill, ..CRASH }
    }
}

macro_rules! finds {
    ($($name:ident: $bug:literal, $trials:expr;)*) => {
        $(#[test] fn $name() { assert!(found($bug, 100, $trials) > 0); })*
    };
}

finds! {
    finds_l1_before_l2: "l1-before-l2", crashes(DEVICE);
    finds_failed_l2_cached: "failed-l2-cached", errors(SMALL, Effect::None);
    finds_mapping_in_memory: "mapping-in-memory", kills(SMALL);
    finds_overlay_drops_rest: "overlay-drops-rest", kills(OVERLAY);
    finds_data_after_mapping_on_a_device: "data-after-mapping", crashes(DEVICE);
    finds_data_after_mapping_above_a_backing_file: "data-after-mapping", crashes(OVERLAY);
    finds_data_after_mapping_in_place_of_compressed_bytes: "data-after-mapping", crashes(PACKED);
    finds_failed_cluster_reused: "failed-cluster-reused", errors(SMALL, Effect::None);
    finds_double_allocation: "double-allocation", kills(Setup { cluster_bits: 16, l2_bits: 6, ..SMALL });
    finds_flush_early: "flush-early", crashes(SMALL);
    finds_frontier_from_last_l1: "frontier-from-last-l1", kills(SMALL);
}

#[test]
fn finds_flush_forgets() {
    let world = World::new(1);
    DIRECT.create(&world);
    let setup = Setup { direct: false, ..SMALL };
    let qcow = setup.open(&world);
    world.switch_on("flush-forgets");
    world.block_on(write(&qcow, 0, 1, 9)).result.unwrap();
    world.fail(Some(Fault { nth: world.ops(), error: Errno::EIO, effect: Effect::None, sticky: false }));
    assert_eq!(flush(&world, &qcow), Err(Errno::EIO));
    assert_eq!(flush(&world, &qcow), Ok(()));
    assert_eq!(all(&world.after_crash(0), &setup.open(&world.after_crash(0)))[0], Some(0));
}

#[test]
fn finds_compressed_in_place() {
    let setup = Setup { cluster_bits: 12, ..SMALL };
    for bug in [None, Some("compressed-in-place")] {
        let world = World::new(1);
        setup.create(&world);
        (0..3).for_each(|cluster| put_compressed(&world, &setup, cluster, 50 + cluster as u8));
        bug.into_iter().for_each(|bug| world.switch_on(bug));
        let qcow = setup.open(&world);
        world.block_on(write(&qcow, 2, 3, 9)).result.unwrap();
        let got = world.block_on(fills(&qcow, 0, 24));
        let want: Vec<_> = (0..24).map(|s| Some(if (2..5).contains(&s) { 9 } else { 50 + s / 8 })).collect();
        assert_eq!(got == Ok(want), bug.is_none());
    }
}
