//! Checkers that no seeded bug sets off: each is shown what it must report.

use scenarios::catalog::setup::Setup;
use scenarios::check::Invariant;
use scenarios::run::{RunSpec, Scenario, run};
use scenarios::world::World;
use sim::{DecisionMap, Source};

/// The invariant that a world with this life breaks.
fn broken(body: fn(World)) -> Option<Invariant> {
    use std::cell::Cell;
    thread_local!(static BODY: Cell<Option<fn(World)>> = const { Cell::new(None) });
    static ODD: Scenario = Scenario {
        name: "odd",
        about: "what a test does to it",
        storage: |_| Default::default(),
        body: |world| {
            Box::pin(async move {
                if let Some(body) = BODY.get() {
                    body(world);
                }
            })
        },
    };
    BODY.set(Some(body));
    // The boring world: every setting is the first of its list.
    let spec = RunSpec { source: Source::Replay(DecisionMap::new()), ..RunSpec::new(&ODD, 0) };
    run(&spec).failure.map(|f| f.invariant)
}

const SIZE: u64 = 1 << 20;

#[test]
fn a_setup_that_nobody_touched_is_in_order() {
    assert_eq!(broken(|w| Setup::qcow(&w, 0, SIZE, true).check_bytes(&w, "now")), None);
}

#[test]
fn c1_a_changed_backing_file() {
    let body = |w: World| {
        let setup = Setup::qcow(&w, 0, SIZE, true);
        let mut below = w.storage.bytes("/images/base0.raw").expect("there is a backing file");
        below[70_000] ^= 1;
        w.storage.put_bytes("/images/base0.raw", &below);
        setup.check_bytes(&w, "now");
    };
    assert_eq!(broken(body), Some(Invariant::C1));
}

#[test]
fn g11_an_image_that_is_gone() {
    let body = |w: World| {
        let mut setup = Setup::qcow(&w, 0, SIZE, false);
        setup.spec.path = "/images/elsewhere".into();
        setup.check_bytes(&w, "now");
    };
    assert_eq!(broken(body), Some(Invariant::G11));
}

/// An image whose first mapped cluster is said to be at `entry`.
fn damaged(w: &World, entry: u64) {
    let setup = Setup::qcow(w, 0, SIZE, true);
    let mut bytes = w.storage.bytes(&setup.spec.path).expect("there is an image");
    let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes")) as usize;
    let table = number(number(40));
    assert!(table > 0, "the boring world has an image with a mapped first cluster");
    bytes[table..table + 8].copy_from_slice(&entry.to_be_bytes());
    w.storage.put_bytes(&setup.spec.path, &bytes);
    setup.check_bytes(w, "now");
}

#[test]
fn q2_a_cluster_that_is_misplaced() {
    assert_eq!(broken(|w| damaged(&w, 0x201)), Some(Invariant::Q2));
}

#[test]
fn q3_compressed_bytes_behind_the_end() {
    assert_eq!(broken(|w| damaged(&w, 1 << 63 | 1 << 60 | 0xff_ffff)), Some(Invariant::Q3));
}

#[test]
fn a1_a_panic() {
    assert_eq!(broken(|_| panic!("on purpose")), Some(Invariant::A1));
}
