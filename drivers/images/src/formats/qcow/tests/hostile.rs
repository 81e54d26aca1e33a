//! Hostile and damaged images.

use super::*;
use proptest::prelude::*;

/// An image with some tables and clusters, as bytes.
fn sample() -> Vec<u8> {
    let world = World::new(1);
    SMALL.create(&world);
    let qcow = SMALL.open(&world);
    for start in (0..250).step_by(30) {
        world.block_on(write(&qcow, start, 3, 7)).result.unwrap();
    }
    world.block_on(qcow.close()).unwrap();
    put_compressed(&world, &SMALL, 127, 3);
    world.bytes(PATH)
}

fn opened(bytes: Vec<u8>, write: bool) -> (World, Result<Rc<Qcow<World>>, ImageError>) {
    let world = World::new(1);
    world.put(PATH, bytes);
    let qcow = SMALL.try_open(&world, write);
    (world, qcow)
}

/// The offset of an entry of L1, or of the first table.
fn entry_at(bytes: &[u8], table: bool, index: usize) -> usize {
    let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let l1 = number(40);
    if table { number(l1) + index * 8 } else { l1 + index * 8 }
}

fn with(bytes: &[u8], at: usize, number: u64) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + 8].copy_from_slice(&number.to_be_bytes());
    bytes
}

#[test]
fn bad_references_are_refused_for_writing_with_a_reason() {
    let good = sample();
    let (l1, l2) = (entry_at(&good, false, 0), entry_at(&good, true, 5));
    let cluster = u64::from_be_bytes(good[entry_at(&good, true, 0)..][..8].try_into().unwrap());
    let table = u64::from_be_bytes(good[l1..l1 + 8].try_into().unwrap());
    for (at, number, words) in [
        (l1, 1 << 60, "L2 table 0 at byte 1152921504606846976 is misplaced"),
        (l1, table + 8, "L2 table 0 at byte"),
        (l1 + 8, table, "L2 table 0 and L2 table 1 overlap"),
        (l1, 0, "no problem: the clusters of the table only leak"),
        (l1, 4096, "overlap"),
        (l2, cluster, "cluster 5 (0x2400) overlaps another cluster"),
        (l2, cluster + 512, "cluster 5 (0x2600) is misplaced"),
        (l2, 1 << 61, "far past"),
        (l2, table, "L2 table 0 and the cluster at byte 8192 overlap"),
        (l2, format::COMPRESSED | 5, "is compressed and not inside"),
        (l2, format::COMPRESSED | 5 << 53 | 4096, "is compressed and overlaps a table"),
        (l2, format::COMPRESSED | 5 << 53 | cluster, "compressed data overlaps the cluster"),
    ] {
        let (_, qcow) = opened(with(&good, at, number), true);
        match qcow {
            Ok(_) => assert!(number == 0, "{words}"),
            Err(e) => assert!(e.to_string().contains(words), "{e} should say {words:?}"),
        }
    }
}

#[test]
fn undamaged_parts_of_a_damaged_image_can_be_read() {
    let good = sample();
    let bad = with(&good, entry_at(&good, true, 15), 1 << 61);
    let (world, qcow) = opened(bad, false);
    let qcow = qcow.unwrap();
    assert_eq!(world.block_on(fills(&qcow, 30, 1)), Err(Errno::EIO));
    assert_eq!(world.block_on(fills(&qcow, 60, 1)), Ok(vec![Some(7)]));
    drop(qcow);
    assert_eq!(checked(&world).problem_count, 1);
    // A compressed cluster that does not decompress.
    let mut bad = good.clone();
    let end = bad.len();
    bad[end - 4..].fill(0xff);
    let (world, qcow) = opened(bad, true);
    let qcow = qcow.unwrap();
    assert_eq!(world.block_on(fills(&qcow, 254, 2)), Err(Errno::EIO));
    assert_eq!(world.block_on(write(&qcow, 254, 1, 1)).result, Err(Errno::EIO), "the rest would be lost");
    assert_eq!(world.block_on(write(&qcow, 254, 2, 1)).result, Ok(()));
    assert_eq!(world.block_on(fills(&qcow, 254, 2)), Ok(vec![Some(1); 2]));
}

/// Clusters of two sectors, 64 to a table.
#[test]
fn extents_name_exactly_what_is_damaged() {
    let good = sample();
    let (cluster, packed) = (entry_at(&good, true, 15), entry_at(&good, true, 16));
    let bad = with(&with(&good, cluster, 1 << 61), packed, format::COMPRESSED | 5 << 53 | good.len() as u64);
    for (bytes, want) in [
        (good.clone(), vec![]),
        (bad, vec![(30, 4)]),
        (with(&good, entry_at(&good, false, 1), 1 << 60), vec![(128, 128)]),
        (with(&good, entry_at(&good, false, 0), good.len() as u64), vec![(0, 128)]),
    ] {
        let (world, qcow) = opened(bytes, false);
        let qcow = qcow.unwrap();
        for max in [1, 3, 1024] {
            let (mut at, mut found) = (0, Vec::new());
            while at < 256 {
                let range = SectorRange::new(at, (256 - at) as u32);
                let extents = world.block_on(qcow.extents(range, max)).unwrap();
                assert!((1..=max).contains(&extents.len()));
                for extent in extents {
                    if extent.source.error().is_some() {
                        assert!(!extent.zero && extent.allocated);
                        found.push((at, extent.count));
                    }
                    at += extent.count;
                }
            }
            assert_eq!((at, &found), (256, &want), "{max}");
        }
    }
}

#[test]
fn a_file_that_was_cut_off_is_damaged() {
    let world = World::new(1);
    SMALL.create(&world);
    let qcow = SMALL.open(&world);
    // One cluster each in two tables: table, cluster, table, cluster.
    for start in [0, 128] {
        world.block_on(write(&qcow, start, 2, 7)).result.unwrap();
    }
    world.block_on(qcow.close()).unwrap();
    drop(qcow);
    let good = world.bytes(PATH);
    let last = good.len() - 1024;
    let counts = |len: usize| {
        world.put(PATH, good[..len].to_vec());
        let report = checked(&world);
        (report.problem_count, report.missing_clusters, report.problems)
    };
    assert_eq!(counts(good.len()), (0, 0, vec![]));
    assert_eq!(counts(last + 512), (0, 0, vec![]), "the rest may never have been written");
    let what = format!("cluster 64 from byte {last} on: past the end of the file at byte {last}");
    assert_eq!(counts(last), (0, 1, vec![what]));
    // Half of the second table.
    let table = last - 1024;
    let what = format!("L2 table 1 at byte {table} extends past the end of the file at byte {}", table + 256);
    assert_eq!(counts(table + 256), (1, 0, vec![what.clone()]));
    let refused = SMALL.try_open(&world, true).err().unwrap().to_string();
    assert!(refused.contains(&what), "{refused}");
    let qcow = SMALL.try_open(&world, false).unwrap();
    assert_eq!(world.block_on(fills(&qcow, 128, 1)), Err(Errno::EIO));
    assert_eq!(world.block_on(fills(&qcow, 0, 1)), Ok(vec![Some(7)]));
    drop(qcow);
    assert_eq!(counts(good.len() - 4096 + 256).0, 2, "both tables");
}

/// QEMU makes the L1 entry durable before it writes the table, at the end of the file.
#[test]
fn a_table_that_was_never_written_is_empty() {
    let setup = Setup { base_sectors: Some(256), ..SMALL };
    for packed in [false, true] {
        let world = World::new(1);
        setup.create(&world);
        let qcow = setup.open(&world);
        world.block_on(write(&qcow, 0, 2, 7)).result.unwrap();
        world.block_on(qcow.close()).unwrap();
        drop(qcow);
        if packed {
            // A file that does not end with a cluster.
            put_compressed(&world, &setup, 3, 5);
        }
        let bytes = world.bytes(PATH);
        let end = bytes.len().next_multiple_of(1024) as u64;
        world.put(PATH, with(&bytes, entry_at(&bytes, false, 1), end));
        let report = checked(&world);
        let what = format!("L2 table 1 at byte {end} lies past the end of the file at byte {}", bytes.len());
        assert_eq!((report.problem_count, report.missing_clusters), (0, 1));
        assert_eq!((report.problems, report.leaked_clusters), (vec![what], 0));
        let below: Vec<_> = (128..256).map(|sector| Some(base_fill(sector))).collect();
        for write in [false, true] {
            let qcow = setup.try_open(&world, write).unwrap();
            let extents = world.block_on(qcow.extents(SectorRange::new(0, 256), 1024)).unwrap();
            assert!(extents.iter().all(|extent| extent.source.error().is_none()), "{extents:?}");
            assert_eq!(world.block_on(fills(&qcow, 128, 128)).unwrap(), below);
        }
        let qcow = setup.open(&world);
        world.block_on(write(&qcow, 130, 2, 9)).result.unwrap();
        world.block_on(qcow.close()).unwrap();
        drop(qcow);
        let report = checked(&world);
        assert_eq!((report.problems, report.leaked_clusters, report.tables), (vec![], 0, 2));
        let qcow = setup.open(&world);
        assert_eq!(world.block_on(fills(&qcow, 130, 3)), Ok(vec![Some(9), Some(9), Some(base_fill(132))]));
        assert_eq!(world.block_on(fills(&qcow, 0, 1)), Ok(vec![Some(7)]));
    }
}

#[test]
fn any_other_table_past_the_end_is_damage() {
    let world = World::new(1);
    SMALL.create(&world);
    let qcow = SMALL.open(&world);
    world.block_on(write(&qcow, 0, 2, 7)).result.unwrap();
    world.block_on(qcow.close()).unwrap();
    let good = world.bytes(PATH);
    let (first, second) = (entry_at(&good, false, 0), entry_at(&good, false, 1));
    let end = good.len() as u64;
    let allowed = with(&good, second, end);
    for (bytes, what) in [
        (allowed.clone(), None),
        (with(&good, second, end + 1024), Some("L2 table 1")),
        (with(&good, second, end + 512), Some("L2 table 1")),
        ([&allowed[..], &[0; 256]].concat(), Some("L2 table 1")),
        (with(&allowed, first, end + 1024), Some("L2 table 0")),
        (with(&allowed, first, 1 << 60), Some("L2 table 0")),
        (with(&allowed, entry_at(&good, true, 20), end + 1024), Some("L2 table 1")),
        (with(&allowed, entry_at(&good, true, 20), end), Some("L2 table 1")),
    ] {
        let (world, qcow) = opened(bytes, true);
        let refused = qcow.err().map(|e| e.to_string());
        assert_eq!(refused.is_some(), what.is_some(), "{refused:?}");
        let report = checked(&world);
        assert_eq!(report.problem_count > 0, what.is_some(), "{:?}", report.problems);
        if let (Some(refused), Some(what)) = (refused, what) {
            assert!(refused.contains(what), "{refused}");
        }
    }
    // A device does not grow.
    world.put_device(PATH, allowed);
    let refused = SMALL.try_open(&world, true).err().unwrap().to_string();
    assert!(refused.contains("L2 table 1 at byte"), "{refused}");
}

#[test]
fn damaged_references_past_the_end_are_counted_once() {
    let good = sample();
    let past = good.len().next_multiple_of(1024) as u64 + 1024;
    let (fifth, sixth) = (entry_at(&good, true, 5), entry_at(&good, true, 6));
    for (bytes, missing) in
        [(with(&good, fifth, past + 512), 0), (with(&with(&good, fifth, past), sixth, past), 1)]
    {
        let world = World::new(1);
        world.put(PATH, bytes);
        let report = checked(&world);
        let counts = (report.problem_count, report.missing_clusters);
        assert_eq!(counts, (1, missing), "{:?}", report.problems);
    }
}

/// The stream of a compressed cluster may end before the bytes that the entry names.
#[test]
fn extents_and_reads_agree_on_compressed_clusters_past_the_end() {
    let good = sample();
    let table = u64::from_be_bytes(good[entry_at(&good, false, 1)..][..8].try_into().unwrap()) as usize;
    let at = table + 63 * 8;
    let entry = u64::from_be_bytes(good[at..at + 8].try_into().unwrap());
    let past = format::COMPRESSED | 5 << 53 | good.len() as u64;
    for (entry, want) in [(entry + (50 << 53), Ok(vec![Some(3); 2])), (past, Err(Errno::EIO))] {
        let (world, qcow) = opened(with(&good, at, entry), false);
        let qcow = qcow.unwrap();
        assert_eq!(world.block_on(fills(&qcow, 254, 2)), want);
        let extents = world.block_on(qcow.extents(SectorRange::new(254, 2), 8)).unwrap();
        let found: Vec<_> = extents.iter().map(|extent| extent.source.error()).collect();
        assert_eq!(found, [want.err()]);
        drop(qcow);
        assert!(checked(&world).problem_count > 0);
    }
}

#[test]
fn space_before_an_l1_table_elsewhere_can_be_lost() {
    let mut bytes = sample();
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    let world = World::new(1);
    let leaked = |bytes: &[u8]| {
        world.put(PATH, bytes.to_vec());
        let report = checked(&world);
        assert_eq!(report.problems, Vec::<String>::new());
        report.leaked_clusters
    };
    let before = leaked(&bytes);
    let (l1, end) = (entry_at(&bytes, false, 0), bytes.len() as u64);
    let mut bytes = with(&bytes, 40, end);
    bytes.extend_from_within(l1..l1 + 512);
    // The place of the old one is a block of four clusters.
    assert_eq!(leaked(&bytes) - before, 4);
}

#[test]
fn check_reports_every_double_owner_within_runs() {
    let setup = Setup { cluster_bits: 9, ..SMALL };
    let world = World::new(1);
    setup.create(&world);
    let qcow = setup.open(&world);
    // Clusters 0 to 9 are one run, and so are 64 to 73, in another table.
    for start in [0, 64] {
        world.block_on(write(&qcow, start, 10, 7)).result.unwrap();
    }
    world.block_on(qcow.close()).unwrap();
    let mut bytes = world.bytes(PATH);
    let first = entry_at(&bytes, true, 0);
    let place = u64::from_be_bytes(bytes[first..first + 8].try_into().unwrap());
    // Clusters 20 to 29 overlap that run; 3 of them are in a gap of it.
    for (i, at) in (20..30).enumerate() {
        bytes = with(&bytes, entry_at(&bytes, true, at), place + i as u64 * 512);
    }
    for gap in 4..7 {
        bytes = with(&bytes, entry_at(&bytes, true, gap), 0);
    }
    world.put(PATH, bytes);
    let report = checked(&world);
    assert_eq!((report.problem_count, report.plain_clusters), (7, 27), "{:?}", report.problems);
    let named = |n: u32| report.problems.iter().any(|p| p.starts_with(&format!("cluster {n} ")));
    assert!((20..30).all(|n| named(n) != (24..27).contains(&n)), "{:?}", report.problems);
}

#[test]
fn images_of_old_tapdisk_open() {
    let mut bytes = sample();
    let xen = |flags: u32, checksum: u32| [0x5845_4efb, checksum, 1, flags].map(u32::to_be_bytes).concat();
    bytes[48..64].copy_from_slice(&xen(2, 0x1234_5678));
    let (world, qcow) = opened(bytes.clone(), true);
    assert_eq!(world.block_on(fills(&qcow.unwrap(), 0, 1)), Ok(vec![Some(7)]));
    assert_eq!(world.bytes(PATH)[48..64], xen(2, 0), "only the checksum is cleared");

    bytes[48..64].copy_from_slice(&xen(0, 0));
    let (l1, end) = (entry_at(&bytes, false, 0), entry_at(&bytes, false, 2));
    bytes[l1..end].as_chunks_mut::<8>().0.iter_mut().for_each(|e| e.reverse());
    let refused = opened(bytes.clone(), true).1.err().unwrap().to_string();
    assert!(refused.contains("byte order"), "{refused}");
    let (world, qcow) = opened(bytes, false);
    assert_eq!(world.block_on(fills(&qcow.unwrap(), 0, 1)), Ok(vec![Some(7)]));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
    /// No contents of a file make the driver panic, and an image that opens for writing can be written.
    #[test]
    fn damage_never_panics(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>(), any::<bool>()), 1..8),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = sample();
        // The places of references: the header, L1, and the first table.
        let places: Vec<usize> = (0..48).chain(4096..4096 + 16).chain(8192..8192 + 512).collect();
        for (index, value, small) in changes {
            let at = places[index.index(places.len())] / 8 * 8;
            let value = if small { value % 0x8000 / 512 * 512 } else { value };
            bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        for write in [false, true] {
            let (world, qcow) = opened(bytes.clone(), write);
            let Ok(qcow) = qcow else { continue };
            let sectors = qcow.info().size_sectors;
            for start in (0..sectors.min(512)).step_by(16) {
                let parts = (sectors - start).min(16) as u32;
                let read = world.block_on(qcow.submit(request(Op::Read, start, &[parts], 0)));
                prop_assert!(read.result.is_ok() || read.result == Err(Errno::EIO));
            }
            if write {
                let answer = world.block_on(qcow.submit(request(Op::Write, 0, &[1], 9))).result;
                prop_assert!(answer.is_ok() || answer == Err(Errno::EIO));
            }
            let host = world.clone();
            world.block_on(qcow.close()).unwrap();
            world.block_on(async move { check(&host, PATH, &OpenOptions::default()).await }).unwrap();
        }
    }
}
