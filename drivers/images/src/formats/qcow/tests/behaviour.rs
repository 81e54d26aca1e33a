//! An image is a disk, without errors and crashes.

use super::*;
use crate::testing::{Effect, Fault};
use proptest::prelude::*;
use tap_host::copy_to_slice;

#[test]
fn an_empty_image_reads_zeros_and_allocates_on_write() {
    let world = World::new(1);
    SMALL.create(&world);
    let qcow = SMALL.open(&world);
    let blocks = NodeInfo { physical_block_bytes: 4096, discard_bytes: 4096, ..NodeInfo::new(256, false) };
    assert_eq!(qcow.info(), blocks);
    assert!(all(&world, &qcow).iter().all(|s| *s == Some(0)));
    // Spans three clusters, unaligned, then again in place.
    for fill in [1, 2] {
        let got = world.block_on(write(&qcow, 3, 4, fill));
        assert_eq!((got.result, got.bufs.len()), (Ok(()), 1));
    }
    assert_eq!(world.marked("cluster-allocated"), 1, "three clusters at once");
    flush(&world, &qcow).unwrap();
    world.block_on(qcow.close()).unwrap();
    assert_eq!(world.block_on(write(&qcow, 0, 1, 1)).result, Err(Errno::ESHUTDOWN));
    let qcow = SMALL.open(&world);
    let want: Vec<_> = (0..256).map(|s| Some(if (3..7).contains(&s) { 2 } else { 0 })).collect();
    assert_eq!(all(&world, &qcow), want);
    drop(qcow);
    let report = checked(&world);
    assert_eq!((report.problem_count, report.tables, report.plain_clusters), (0, 1, 3));
    assert_eq!(report.leaked_clusters, 0);
}

#[test]
fn a_backing_file_shows_through_and_is_copied_up() {
    for cluster_bits in [9, 12, 16] {
        let world = World::new(1);
        let setup = Setup { base_sectors: Some(101), cluster_bits, ..SMALL };
        setup.create(&world);
        let base = world.bytes(BASE);
        let qcow = setup.open(&world);
        world.block_on(write(&qcow, 98, 2, 7)).result.unwrap();
        let want = |s: u64| Some(if (98..100).contains(&s) { 7 } else { setup.initial(s) });
        assert_eq!(all(&world, &qcow), (0..256).map(want).collect::<Vec<_>>());
        assert_eq!(world.marked("copy-up") > 0, cluster_bits > 10);
        assert_eq!(world.bytes(BASE), base);
    }
}

#[test]
fn backing_files_are_opened_only_if_allowed() {
    let world = World::new(1);
    let setup = Setup { base_sectors: Some(10), ..SMALL };
    setup.create(&world);
    let (host, options) = (world.clone(), OpenOptions::default());
    let refused = world.block_on(async move { open(&host, &options).await.err() }).unwrap();
    let text = "open /image as qcow: it is based on /base, which may not be opened; \
                allow it with --backing, or flatten the image";
    assert_eq!(refused.to_string(), text);
    let (host, mut options) = (world.clone(), setup.options(false));
    options.backing = BackingPolicy::any(QCOW);
    world.put(BASE, world.bytes(PATH));
    let refused = world.block_on(async move { open(&host, &options).await.err() }).unwrap();
    let text = "use /base as backing file of /image: open /base as qcow: its backing file /base is this image, or \
                one that is based on it; give it another backing file";
    assert_eq!(refused.to_string(), text, "a loop");
}

#[test]
fn probing_recognises_images_and_takes_all_else_as_raw() {
    let world = World::new(1);
    SMALL.create(&world);
    world.put(BASE, vec![1; 2048]);
    for (path, sectors) in [(PATH, 256), (BASE, 4)] {
        let (host, spec) =
            (world.clone(), crate::ImageSpec { format: ImageFormat::Probe, path: path.to_owned() });
        let node = world
            .block_on(async move { Formats::shipped().open(&host, &spec, &OpenOptions::default()).await });
        assert_eq!(node.unwrap().info().size_sectors, sectors);
    }
    // An image that cannot be read is refused: as raw, its header would be the start of a disk.
    let mut newer = world.bytes(PATH);
    for (version, words) in [(3_u32, "an image in the format qcow2"), (4, "it has version 4, not 1")] {
        newer[4..8].copy_from_slice(&version.to_be_bytes());
        world.put(BASE, newer.clone());
        for (format, refused) in [(ImageFormat::Probe, true), (RAW, false)] {
            let (host, spec) = (world.clone(), crate::ImageSpec { format, path: BASE.to_owned() });
            let node = world.block_on(async move {
                Formats::shipped().open(&host, &spec, &OpenOptions::default()).await
            });
            let text = node.err().map(|e| e.to_string());
            assert_eq!(text.as_ref().is_some_and(|t| t.contains(words)), refused, "{text:?}");
        }
    }
}

/// Whoever says of any backing file that it is raw may not know all of them.
#[test]
fn a_backing_file_that_begins_like_an_image_is_raw_only_by_name() {
    let world = World::new(1);
    let setup = Setup { base_sectors: Some(10), ..SMALL };
    setup.create(&world);
    let open = |policy: BackingPolicy| {
        let (host, mut options) = (world.clone(), setup.options(true));
        options.backing = policy;
        world.block_on(async move { open(&host, &options).await }).map(drop)
    };
    let named = || BackingPolicy::Ask(Rc::new(|_| Some(RAW.into())));
    for head in [&b"QFI\xfb\0\0\0\x01"[..], b"QFI\xfb\0\0\0\x03", b"conectix"] {
        open(BackingPolicy::any(RAW)).unwrap();
        let mut bytes = world.bytes(BASE);
        bytes[..8].copy_from_slice(head);
        world.put(BASE, bytes.clone());
        let refused = open(BackingPolicy::any(RAW)).unwrap_err().to_string();
        assert!(refused.contains("open /base as raw: it begins like an image in the format "), "{refused}");
        assert!(refused.ends_with("with --backing FORMAT:PATH, raw if it is a disk"), "{refused}");
        open(named()).unwrap();
        bytes[0] = 0;
        world.put(BASE, bytes);
    }
}

#[test]
fn a_part_of_a_sector_at_the_end_of_a_disk_is_not_shown() {
    let world = World::new(1);
    SMALL.create(&world);
    let mut bytes = world.bytes(PATH);
    let size = SMALL.sectors * 512;
    for (stored, shown) in
        [(size, SMALL.sectors), (size - 1, SMALL.sectors - 1), (size - 511, SMALL.sectors - 1)]
    {
        bytes[24..32].copy_from_slice(&stored.to_be_bytes());
        world.put(PATH, bytes.clone());
        assert_eq!(SMALL.open(&world).info().size_sectors, shown, "{stored} bytes");
        let (host, spec) = (world.clone(), crate::ImageSpec { format: QCOW, path: PATH.to_owned() });
        let image = world.block_on(async move { Formats::shipped().describe(&host, &spec, false).await });
        assert_eq!(image.unwrap().disk_bytes, shown * 512);
    }
}

#[test]
fn a_reader_without_a_lock_opens_an_image_that_is_written() {
    let world = World::new(1);
    SMALL.create(&world);
    let writer = SMALL.open(&world);
    for unlocked in [false, true] {
        let (host, how) = (world.clone(), OpenOptions { unlocked, ..OpenOptions::default() });
        let reader = world.block_on(async move { open(&host, &how).await.map(drop) });
        assert_eq!(reader.is_err_and(|e| e.is_in_use()), !unlocked);
        let (host, spec) = (world.clone(), crate::ImageSpec { format: QCOW, path: PATH.to_owned() });
        let shown = world.block_on(async move { Formats::shipped().describe(&host, &spec, unlocked).await });
        assert_eq!(shown.is_err_and(|e| e.is_in_use()), !unlocked);
    }
    // The lock of the writer was not given up.
    assert!(SMALL.try_open(&world, true).is_err_and(|e| e.is_in_use()));
    drop(writer);
}

#[test]
fn compressed_clusters_are_read_and_replaced() {
    let world = World::new(1);
    let setup = Setup { cluster_bits: 12, base_sectors: Some(256), ..SMALL };
    setup.create(&world);
    (0..3).for_each(|cluster| put_compressed(&world, &setup, cluster * 2, 50 + cluster as u8));
    let report = checked(&world);
    assert_eq!((report.problem_count, report.compressed_clusters), (0, 3));
    let qcow = setup.open(&world);
    let mut want: Vec<_> = (0..256).map(|s| Some(setup.initial(s))).collect();
    (0..3).for_each(|c| want[c * 16..c * 16 + 8].fill(Some(50 + c as u8)));
    assert_eq!(all(&world, &qcow), want);
    // Covers the end of a compressed cluster, a cluster of the backing file, and the start of the next compressed one.
    world.block_on(write(&qcow, 6, 11, 9)).result.unwrap();
    want[6..17].fill(Some(9));
    assert_eq!(all(&world, &qcow), want);
    drop(qcow);
    assert_eq!(all(&world, &setup.open(&world)), want);
    assert_eq!(checked(&world).compressed_clusters, 1);
    assert!(world.marked("compressed-rewritten") == 1 && world.marked("compressed-read") > 0);
}

#[test]
fn allocations_in_flight_share_syncs_and_mapping_writes() {
    let world = World::new(1);
    let setup = Setup { cluster_bits: 12, base_sectors: Some(256), ..SMALL };
    setup.create(&world);
    let qcow = setup.open(&world);
    let before = world.ops();
    let writes: Vec<_> = (0..16).map(|i| write(&qcow, i * 16, 8, 1)).collect();
    assert!(world.block_on(futures_util::future::join_all(writes)).iter().all(|r| r.result.is_ok()));
    assert!(world.marked("sync-shared") > 0 && world.marked("commit-shared") > 0);
    // Zeros, sync, L1; sixteen times data; and a few syncs and L2 writes for all of them, not sixteen each.
    assert!(world.ops() - before < 3 + 16 + 16, "{} operations", world.ops() - before);
}

#[test]
fn only_a_new_cluster_over_zeros_needs_no_sync() {
    for (setup, syncs) in [(SMALL, 1), (Setup { base_sectors: Some(256), ..SMALL }, 2)] {
        let world = World::new(1);
        setup.create(&world);
        let qcow = setup.open(&world);
        world.block_on(write(&qcow, 0, 2, 1)).result.unwrap();
        let before = world.ops();
        world.block_on(write(&qcow, 2, 2, 1)).result.unwrap();
        assert_eq!(world.ops() - before, 1 + syncs, "data, mapping, and a sync where old bytes would show");
    }
}

/// A failed sync or read does not mean that the place of the data is bad.
#[test]
fn a_failed_sync_loses_no_space() {
    let world = World::new(1);
    let setup = Setup { base_sectors: Some(256), ..SMALL };
    setup.create(&world);
    let qcow = setup.open(&world);
    world.block_on(write(&qcow, 0, 2, 1)).result.unwrap();
    let size = world.bytes(PATH).len();
    // The data is written; its sync fails, and so does every later one.
    let nth = world.ops() + 1;
    world.fail(Some(Fault { nth, error: Errno::EIO, effect: Effect::All, sticky: false }));
    for _ in 0..20 {
        assert_eq!(world.block_on(write(&qcow, 4, 2, 2)).result, Err(Errno::EIO));
    }
    assert!(world.bytes(PATH).len() <= size + 1024, "each write takes new space");
}

/// A full device is closed like any other; its size cannot be set.
#[test]
fn a_full_device_can_be_closed() {
    let mut full = 0;
    // A device that ends within the cluster of the header is full from the start.
    let small = (16 << 10..24 << 10).step_by(512).map(|bytes| (bytes, SMALL.cluster_bits));
    for (bytes, cluster_bits) in small.chain([(8 << 10, 16)]) {
        let world = World::new(1);
        let setup = Setup { device: Some(bytes), cluster_bits, ..SMALL };
        setup.create(&world);
        let qcow = setup.open(&world);
        for start in (0..256).step_by(2) {
            match world.block_on(write(&qcow, start, 2, 9)).result {
                Ok(()) => {}
                Err(error) => {
                    assert_eq!(error, Errno::ENOSPC);
                    full += 1;
                }
            }
        }
        world.block_on(qcow.close()).unwrap();
        assert_eq!(world.bytes(PATH).len(), bytes);
    }
    assert!(full > 0);
}

#[test]
fn a_report_shows_which_work_waits_for_which() {
    let world = World::new(1);
    SMALL.create(&world);
    let qcow = SMALL.open(&world);
    // The first write hangs; the second needs the same cluster, the third the same table.
    world.stop_at(world.ops());
    let writes = [write(&qcow, 0, 1, 1), write(&qcow, 1, 1, 1), write(&qcow, 2, 1, 1)];
    assert!(world.run(futures_util::future::join_all(writes)).is_none());
    let told: Vec<String> = qcow.waits().iter().map(|w| w.to_string()).collect();
    assert_eq!(
        told,
        ["L2 table 0 waits for L2 table 0", "allocation of cluster 0 waits for allocation of cluster 0",]
    );
    world.kill_tasks();
    assert!(qcow.waits().is_empty());
}

#[test]
fn a_dropped_request_still_takes_effect_as_a_whole() {
    let world = World::new(1);
    SMALL.create(&world);
    let qcow = SMALL.open(&world);
    let host = world.clone();
    let request = write(&qcow, 1, 3, 5);
    world.block_on(async move {
        use tap_host::Tasks;
        let dropped = futures_util::future::select(request, Box::pin(host.yield_now())).await;
        drop(dropped);
    });
    let rest = world.block_on(fills(&qcow, 0, 6)).unwrap();
    assert_eq!(rest, [0, 5, 5, 5, 0, 0].map(Some));
}

#[derive(Clone, Debug)]
enum Step {
    /// Disjoint writes at the same time: first sector, sectors of each buffer.
    Write(Vec<(u64, Vec<u32>)>),
    Read(u64, Vec<u32>),
    Flush,
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let parts = || prop::collection::vec(1_u32..9, 1..4);
    let step = prop_oneof![
        6 => prop::collection::vec((0_u64..700, parts()), 1..5).prop_map(Step::Write),
        3 => (0_u64..700, parts()).prop_map(|(at, parts)| Step::Read(at, parts)),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..25)
}

fn setups() -> impl Strategy<Value = Setup> {
    (
        9_u32..=16,
        6_u32..=8,
        prop::option::of(1_u64..700),
        1_usize..4,
        any::<bool>(),
        prop::bool::weighted(0.2),
    )
        .prop_map(|(cluster_bits, l2_bits, base_sectors, tables, direct, device)| Setup {
            sectors: 650,
            cluster_bits,
            l2_bits,
            base_sectors,
            tables,
            direct,
            device: device.then_some(4 << 20),
            compressed: false,
        })
}

fn run_steps(setup: Setup, steps: Vec<Step>, compressed: Vec<u64>, seed: u64, align: u32) {
    let world = World::new(seed);
    setup.create(&world);
    let mut model: Vec<u8> = (0..setup.sectors).map(|s| setup.initial(s)).collect();
    let cluster_sectors = 1_u64 << (setup.cluster_bits - 9);
    if setup.device.is_none() {
        for at in compressed {
            let cluster = at / cluster_sectors;
            put_compressed(&world, &setup, cluster, 99);
            let from = (cluster * cluster_sectors).min(setup.sectors);
            let to = (from + cluster_sectors).min(setup.sectors);
            model[from as usize..to as usize].fill(99);
        }
    }
    world.make_short();
    world.make_shuffled();
    world.set_align(align);
    let mut qcow = setup.open(&world);
    for (number, step) in steps.into_iter().enumerate() {
        match step {
            Step::Write(writes) => {
                let mut taken: Vec<std::ops::Range<u64>> = Vec::new();
                let mut running = Vec::new();
                for (i, (start, parts)) in writes.into_iter().enumerate() {
                    let range = start..start + u64::from(parts.iter().sum::<u32>());
                    let meets = taken.iter().any(|t| t.start < range.end && range.start < t.end);
                    if range.end > setup.sectors || meets {
                        continue;
                    }
                    let fill = (number * 5 + i + 1) as u8;
                    running.push(qcow.submit(request(Op::Write, start, &parts, fill)));
                    model[range.start as usize..range.end as usize].fill(fill);
                    taken.push(range);
                }
                let answers = world.block_on(futures_util::future::join_all(running));
                assert!(answers.iter().all(|a| a.result.is_ok()));
            }
            Step::Read(start, parts) => {
                let count: u32 = parts.iter().sum();
                if start + u64::from(count) <= setup.sectors {
                    let answer = world.block_on(qcow.submit(request(Op::Read, start, &parts, 0xee)));
                    let mut bytes = vec![0; count as usize * 512];
                    copy_to_slice(&answer.bufs, 0, &mut bytes);
                    let want = &model[start as usize..start as usize + count as usize];
                    assert!(bytes.chunks(512).zip(want).all(|(s, w)| s.iter().all(|b| b == w)));
                    assert_eq!(
                        answer.bufs.iter().map(|b| b.len() / 512).collect::<Vec<_>>(),
                        parts.iter().map(|p| *p as usize).collect::<Vec<_>>()
                    );
                }
            }
            Step::Flush => flush(&world, &qcow).unwrap(),
            Step::Reopen => {
                world.block_on(qcow.close()).unwrap();
                qcow = setup.open(&world);
            }
        }
    }
    let want: Vec<_> = model.iter().map(|b| Some(*b)).collect();
    assert_eq!(all(&world, &qcow), want);
    world.block_on(qcow.close()).unwrap();
    assert_eq!(checked(&world).problems, Vec::<String>::new());
    // Data flushed at close survives a power cut.
    assert_eq!(all(&world.after_crash(0), &setup.open(&world.after_crash(0))), want);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]
    #[test]
    fn an_image_is_a_disk(
        setup in setups(), steps in steps(), compressed in prop::collection::vec(0_u64..650, 0..3),
        seed in any::<u64>(), align in prop::sample::select(vec![512_u32, 4096]),
    ) {
        run_steps(setup, steps, compressed, seed, align);
    }
}

/// Runs of many lengths in one request, with memory for some of them at a time: runs that do not fit are not skipped.
#[test]
fn a_large_write_over_runs_of_many_lengths_skips_none() {
    const RUNS: [u64; 8] = [1, 15, 1, 9, 2, 14, 3, 1];
    let setup = Setup { sectors: 4096, cluster_bits: 12, l2_bits: 9, tables: 1, ..SMALL };
    let world = World::new(1);
    setup.create(&world);
    let qcow = setup.open(&world);
    // From the last to the first, so that no run continues its neighbour in the file.
    let mut end = 512_u64;
    for run in RUNS.iter().cycle() {
        let Some(start) = end.checked_sub(*run) else { break };
        world.block_on(write(&qcow, start * 8, *run as u32 * 8, 1)).result.unwrap();
        end = start;
    }
    for (start, sectors, fill) in [(0, 4096, 2), (5, 4000, 3)] {
        world.block_on(write(&qcow, start, sectors, fill)).result.unwrap();
        assert_eq!(world.block_on(fills(&qcow, start, sectors)).unwrap(), vec![Some(fill); sectors as usize]);
    }
}

#[test]
fn a_write_with_fua_is_durable_with_its_mapping_and_nodes_have_names() {
    let world = World::new(1);
    let setup = Setup { base_sectors: Some(10), ..SMALL };
    setup.create(&world);
    let qcow = setup.open(&world);
    let write = Request { fua: true, ..request(Op::Write, 7, &[1], 9) };
    world.block_on(qcow.submit(write)).result.unwrap();
    let after = world.after_crash(0);
    let reader = setup.open(&after);
    assert_eq!(after.block_on(reader.submit(request(Op::Read, 7, &[1], 0))).bufs[0][..], [9; 512]);

    let top = qcow as Rc<dyn tap_core::Node>;
    let names = tap_core::nodes(Rc::clone(&top));
    let names: Vec<_> =
        names.iter().map(|(depth, node)| (*depth, node.name().unwrap().to_string())).collect();
    assert_eq!(names, [(0, PATH.to_owned()), (1, BASE.to_owned())]);
    world.block_on(top.close()).unwrap();
    assert!(top.children().is_empty() && top.name().is_none(), "a closed image has no name and no children");
}
