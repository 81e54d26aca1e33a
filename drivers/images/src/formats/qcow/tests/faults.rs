//! One operation of the host fails, for each operation in turn.

use super::*;
use crate::testing::{Effect, Fault};

fn failing(world: &World, nth: u64, sticky: bool, effect: Effect) {
    world.fail(Some(Fault { nth: world.ops() + nth, error: Errno::EIO, effect, sticky }));
}

/// Its L1 table is longer than the first read.
const LONG: Setup = Setup { sectors: 80_000, cluster_bits: 9, l2_bits: 6, ..SMALL };

#[test]
fn an_unreadable_image_is_not_opened_as_empty() {
    let world = World::new(1);
    LONG.create(&world);
    let qcow = LONG.open(&world);
    for at in [0, 70_000, 79_999] {
        world.block_on(write(&qcow, at, 1, 5)).result.unwrap();
    }
    world.block_on(qcow.close()).unwrap();
    drop(qcow);
    let mut opened = 0;
    for nth in 0.. {
        let bytes = world.bytes(PATH);
        let world = World::new(1);
        world.put(PATH, bytes);
        failing(&world, nth, false, Effect::None);
        let before = world.ops();
        let Ok(qcow) = LONG.try_open(&world, true) else { continue };
        let fired = world.ops() > before + nth;
        world.fail(None);
        for at in [0, 70_000, 79_999] {
            assert_eq!(world.block_on(fills(&qcow, at, 1)), Ok(vec![Some(5)]), "sector {at}, {nth}");
        }
        opened += 1;
        if !fired {
            break;
        }
    }
    assert!(opened > 0);
}

#[test]
fn opening_gives_up_after_a_bounded_number_of_transient_errors() {
    let world = World::new(1);
    SMALL.create(&world);
    let before = world.ops();
    world.fail(Some(Fault { nth: before, error: Errno::EAGAIN, effect: Effect::None, sticky: true }));
    assert!(SMALL.try_open(&world, true).is_err());
    let tries = world.ops() - before;
    assert!((10..100).contains(&tries), "{tries} operations");
}

#[test]
fn an_image_is_created_completely_or_not_at_all() {
    for device in [false, true] {
        // 2 MiB of L1 table, written in many parts.
        let image = NewImage {
            size_bytes: 8 << 30,
            backing: None,
            existing: Some(Vec::new()),
            options: layout(9, 6),
        };
        for nth in 0.. {
            let world = World::new(1);
            let garbage = vec![0xa5; 3 << 20];
            if device {
                world.put_device(PATH, garbage)
            } else {
                world.put(PATH, garbage)
            }
            failing(&world, nth, false, Effect::None);
            let before = world.ops();
            let made = make(&world, PATH, image.clone());
            if world.ops() > before + nth {
                assert!(made.is_err(), "operation {nth} failed, and create succeeded");
                continue;
            }
            made.unwrap();
            world.fail(None);
            let setup = Setup { sectors: (8 << 30) / 512, cluster_bits: 9, l2_bits: 6, ..SMALL };
            let qcow = setup.open(&world);
            for at in [0, 1 << 20, setup.sectors - 1] {
                assert_eq!(world.block_on(fills(&qcow, at, 1)), Ok(vec![Some(0)]), "sector {at}");
            }
            world.block_on(qcow.close()).unwrap();
            drop(qcow);
            assert_eq!(checked(&world).problems, Vec::<String>::new());
            break;
        }
    }
}

/// The offset of the L2 entry of `cluster`, whose table exists.
fn entry(bytes: &[u8], setup: &Setup, cluster: u64) -> usize {
    let l1 = format::parse(bytes, bytes.len() as u64).unwrap().geometry.root_at.0 as usize;
    let at = l1 + (cluster >> setup.l2_bits) as usize * 8;
    let table = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    table + (cluster & ((1 << setup.l2_bits) - 1)) as usize * 8
}

/// A failed write does not appear after a restart either, if the file can be written.
#[test]
fn a_failed_mapping_is_reverted_in_the_file() {
    let mut reverted = 0;
    for nth in 0..8 {
        let world = World::new(1);
        SMALL.create(&world);
        let qcow = SMALL.open(&world);
        world.block_on(write(&qcow, 0, 1, 5)).result.unwrap();
        failing(&world, nth, false, Effect::All);
        let answer = world.block_on(write(&qcow, 20, 1, 6));
        world.fail(None);
        let bytes = world.bytes(PATH);
        let at = entry(&bytes, &SMALL, 10);
        if answer.result.is_err() {
            assert_eq!(bytes[at..at + 8], [0; 8], "operation {nth}");
            reverted += 1;
        }
    }
    assert!(reverted > 1, "the data's write fails, and the mapping's");
}

/// A table whose root entry could not be written keeps its place, and gets it with the next write.
#[test]
fn a_table_whose_root_entry_failed_is_not_made_twice() {
    for effect in [Effect::None, Effect::All] {
        let world = World::new(1);
        SMALL.create(&world);
        let qcow = SMALL.open(&world);
        // The table is written and synchronised before.
        failing(&world, 2, false, effect);
        assert_eq!(world.block_on(write(&qcow, 20, 1, 6)).result, Err(Errno::EIO));
        world.fail(None);
        let place = world.bytes(PATH).len() as u64 - (8 << SMALL.l2_bits);
        assert_eq!(entry_of_root(&world), 0, "{effect:?}: the table is there, and its entry is not");
        world.block_on(write(&qcow, 20, 1, 7)).result.unwrap();
        assert_eq!(entry_of_root(&world), place, "{effect:?}");
        world.block_on(qcow.close()).unwrap();
        drop(qcow);
        let report = checked(&world);
        assert_eq!((report.problems, report.tables, report.leaked_clusters), (vec![], 1, 0));
    }
}

/// The first entry of the L1 table.
fn entry_of_root(world: &World) -> u64 {
    let bytes = world.bytes(PATH);
    let at = format::parse(&bytes, bytes.len() as u64).unwrap().geometry.root_at.0 as usize;
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn a_cleared_checksum_is_not_written_again() {
    let world = World::new(1);
    SMALL.create(&world);
    let mut bytes = world.bytes(PATH);
    let xen = [0x5845_4efb_u32, 0x1234_5678, 1, 2].map(u32::to_be_bytes).concat();
    bytes[48..64].copy_from_slice(&xen);
    world.put(PATH, bytes);
    let opening = || {
        let before = world.ops();
        drop(SMALL.open(&world));
        world.ops() - before
    };
    let (first, second) = (opening(), opening());
    assert_eq!(second, first - 1);
}

/// Compressed runs share clusters of the file, which count once.
#[test]
fn the_rest_of_a_cluster_of_compressed_bytes_is_not_leaked() {
    let world = World::new(1);
    let setup = Setup { compressed: true, ..SMALL };
    setup.create(&world);
    let qcow = setup.open(&world);
    world.block_on(write(&qcow, 40, 1, 6)).result.unwrap();
    world.block_on(qcow.close()).unwrap();
    let report = checked(&world);
    assert_eq!((report.compressed_clusters, report.plain_clusters, report.leaked_clusters), (3, 1, 0));
}

/// QEMU begins each cluster at the end of the file, which its writes extend to whole blocks of the medium.
#[test]
fn space_up_to_the_end_of_a_block_is_not_leaked() {
    let world = World::new(1);
    let setup = Setup { cluster_bits: 9, ..SMALL };
    setup.create(&world);
    let extend = |by: usize| {
        let mut bytes = world.bytes(PATH);
        bytes.resize(bytes.len().next_multiple_of(4096) + by, 0);
        world.put(PATH, bytes);
    };
    for cluster in [0, 1, 70] {
        put_compressed(&world, &setup, cluster, 3);
        extend(0);
    }
    let counts = || {
        let report = checked(&world);
        (report.problem_count, report.compressed_clusters, report.leaked_clusters)
    };
    assert_eq!(counts(), (0, 3, 0));
    // A block that nothing refers to, and a cluster in front of one that is in use.
    extend(4096 + 512);
    assert_eq!(counts(), (0, 3, 9));
    put_compressed(&world, &setup, 71, 3);
    assert_eq!(counts(), (0, 4, 9));
}

/// Each write that fails on the medium loses its place. References further out than any disk needs would be taken for
/// damage once a crash has reverted the size of the file.
#[test]
fn a_medium_that_keeps_failing_leaves_no_reference_out_of_reach() {
    let setup = Setup { sectors: 4 * 128, cluster_bits: 16, l2_bits: 6, ..SMALL };
    let world = World::new(1);
    setup.create(&world);
    let qcow = setup.open(&world);
    world.block_on(write(&qcow, 0, 1, 1)).result.unwrap();
    flush(&world, &qcow).unwrap();
    let durable = world.bytes(PATH);
    for _ in 0..30 {
        failing(&world, 0, false, Effect::None);
        assert!(world.block_on(write(&qcow, 128, 1, 2)).result.is_err());
    }
    world.fail(None);
    assert_eq!(world.block_on(write(&qcow, 128, 1, 3)).result, Err(Errno::ENOSPC), "1 MiB is lost");
    assert_eq!(world.block_on(fills(&qcow, 128, 1)), Ok(vec![Some(0)]));
    drop(qcow);
    // A crash may revert the size but not the tables.
    let mut left = world.bytes(PATH);
    left.truncate(durable.len());
    let world = World::new(2);
    world.put(PATH, left);
    let qcow = setup.open(&world);
    world.block_on(write(&qcow, 128, 1, 4)).result.unwrap();
    assert_eq!(world.block_on(fills(&qcow, 128, 1)), Ok(vec![Some(4)]));
}
