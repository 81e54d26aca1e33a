//! References past the end of the file that crashes leave.

use super::*;
use crate::testing::{Effect, Fault};

const SETUP: Setup = Setup { sectors: 16384, cluster_bits: 12, l2_bits: 9, tables: 8, ..SMALL };

/// A disk with its four tables, with one cluster each, durable.
fn with_tables() -> (World, Rc<Qcow<World>>) {
    let world = World::new(1);
    SETUP.create(&world);
    let qcow = SETUP.open(&world);
    for table in 0..4 {
        world.block_on(write(&qcow, table * 4096, 1, 1)).result.unwrap();
    }
    flush(&world, &qcow).unwrap();
    (world, qcow)
}

/// The offset of the L2 entry of `cluster`.
fn entry_of(bytes: &[u8], cluster: u64) -> usize {
    let l1 = format::parse(bytes, bytes.len() as u64).unwrap().geometry.root_at.0 as usize;
    let at = l1 + (cluster >> 9) as usize * 8;
    let table = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    table + (cluster & 511) as usize * 8
}

/// A power cut in the middle of a writeback: the kernel had written an L2 sector (in place, in existing blocks) but not
/// yet the size of the file or the L2 sectors of other clusters. That state is allowed, and opens. From then on the
/// disk must be usable to its last cluster.
#[test]
fn after_a_crash_left_a_reference_past_the_end_the_whole_disk_works() {
    let (world, qcow) = with_tables();
    let durable = world.bytes(PATH);
    // 4 MiB that are never flushed, up to cluster 2000.
    let last = 2000_u64;
    for cluster in last - 1023..=last {
        world.block_on(write(&qcow, cluster * 8, 8, 2)).result.unwrap();
    }
    let seen = world.bytes(PATH);
    drop(qcow);
    // The power cut leaves the durable bytes, and the L2 entry of cluster 2000.
    let mut left = durable.clone();
    let at = entry_of(&left, last);
    left[at..at + 8].copy_from_slice(&seen[at..at + 8]);
    let world = World::new(2);
    world.put(PATH, left);
    let qcow = SETUP.open(&world);
    for cluster in 0..2048 {
        world.block_on(write(&qcow, cluster * 8, 8, 3)).result.unwrap();
    }
    flush(&world, &qcow).unwrap();
    let bad: Vec<u64> = (0..2048).filter(|c| world.block_on(fills(&qcow, c * 8, 8)).is_err()).collect();
    assert!(
        bad.is_empty(),
        "{} of 2048 clusters that were written and flushed read as EIO, first {}",
        bad.len(),
        bad[0]
    );
}

/// The same crash twice: of the second round of writes only one L2 sector is durable. Each state is allowed, so the
/// image opens.
#[test]
fn after_two_crashes_that_revert_the_size_the_image_opens() {
    let (world, qcow) = with_tables();
    drop(qcow);
    let mut world = world;
    for (first, last) in [(977_u64, 2000_u64), (1, 1999)] {
        let qcow = SETUP.open(&world);
        // Opening has made all of it durable.
        let mut left = world.bytes(PATH);
        for cluster in (first..=last).filter(|c| c % 512 != 0) {
            world.block_on(write(&qcow, cluster * 8, 8, 2)).result.unwrap();
        }
        let seen = world.bytes(PATH);
        drop(qcow);
        let at = entry_of(&left, last);
        left[at..at + 8].copy_from_slice(&seen[at..at + 8]);
        world = World::new(2);
        world.put(PATH, left);
    }
    let opened = SETUP.try_open(&world, true).err().map(|e| e.to_string());
    assert_eq!(opened, None);
}

/// A file that ends within an unreferenced cluster has nothing to recover: opening it for writing leaves its size
/// unchanged.
#[test]
fn opening_an_undamaged_image_does_not_change_its_size() {
    let world = World::new(1);
    SETUP.create(&world);
    let before = [world.bytes(PATH), vec![0; 512]].concat();
    let size = before.len();
    world.put(PATH, before);
    drop(SETUP.open(&world));
    assert_eq!((world.bytes(PATH).len(), world.marked("size-recovered")), (size, 0));
}

/// The size is durable before anything is served, whatever is interrupted meanwhile.
#[test]
fn an_interrupted_open_does_not_serve_a_file_whose_size_is_not_durable() {
    let (world, qcow) = with_tables();
    let durable = world.bytes(PATH);
    world.block_on(write(&qcow, 2000 * 8, 8, 2)).result.unwrap();
    let mut left = durable.clone();
    let at = entry_of(&left, 2000);
    left[at..at + 8].copy_from_slice(&world.bytes(PATH)[at..at + 8]);
    let (mut refused, mut opened) = (0, 0);
    for nth in 0..40 {
        let world = World::new(2);
        world.put(PATH, left.clone());
        world.fail(Some(Fault { nth, error: Errno::EINTR, effect: Effect::None, sticky: true }));
        match SETUP.try_open(&world, true) {
            Ok(_) => {
                opened += 1;
                assert!(world.after_crash(0).bytes(PATH).len() > durable.len(), "operation {nth}");
            }
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 3 && opened > 0, "{refused} refused, {opened} opened");
}
