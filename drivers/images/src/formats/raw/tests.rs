use super::*;
use crate::OpenOptions;
use crate::testing::{Effect, Fault, World};
use smallvec::smallvec;
use std::future::Future;
use tap_core::ZeroFlags;
use tap_host::IoBuf;

fn open(world: &World, write: bool, direct: bool) -> Result<Rc<Raw<World>>, ImageError> {
    let host = world.clone();
    let options = OpenOptions { write, direct, ..OpenOptions::default() };
    let image = OpenImage::alone("/disk", FORMAT, crate::Formats::shipped(), &options);
    world.block_on(async move { Raw::open(&host, &image).await.map(Rc::new) })
}

fn grow_to(world: &World, path: &str, direct: bool, size_bytes: u64) -> Result<(), ImageError> {
    let host = world.clone();
    let options = OpenOptions { write: true, direct, ..OpenOptions::default() };
    let image = OpenImage::alone(path, FORMAT, crate::Formats::shipped(), &options);
    world.block_on(async move { grow(&host, &image, size_bytes).await })
}

fn submit(raw: &Raw<World>, op: Op, start: u64, bytes: &[u8]) -> impl Future<Output = Response> + use<> {
    let bufs: IoVec = if op == Op::Flush { IoVec::new() } else { smallvec![IoBuf::copy_of(bytes).unwrap()] };
    let range = SectorRange::new(start, (bytes.len() as u64 / SECTOR_BYTES) as u32);
    raw.submit(Request { op, range, bufs, fua: false })
}

#[test]
fn a_created_image_reads_zeros_and_keeps_writes() {
    let world = World::new(1);
    world.make_short();
    let host = world.clone();
    world.block_on(async move { create(&host, "/disk", 64 * 512, None).await }).unwrap();
    let host = world.clone();
    let again = world.block_on(async move { create(&host, "/disk", 64 * 512, None).await }).unwrap_err();
    assert_eq!(again.to_string(), "create /disk: file exists (EEXIST)");
    let raw = open(&world, true, false).unwrap();
    let blocks = NodeInfo { physical_block_bytes: 4096, discard_bytes: 4096, ..NodeInfo::new(64, false) };
    assert_eq!(raw.info(), blocks);
    let got = world.block_on(submit(&raw, Op::Read, 0, &[1; 64 * 512]));
    assert!(got.result.is_ok() && got.bufs[0].iter().all(|b| *b == 0));
    for (start, fill) in (0..16).zip(1..) {
        assert_eq!(world.block_on(submit(&raw, Op::Write, start * 4, &[fill; 2048])).result, Ok(()));
    }
    world.block_on(submit(&raw, Op::Flush, 0, &[])).result.unwrap();
    assert!(
        world.after_crash(0).bytes("/disk").chunks(2048).zip(1..).all(|(c, f)| c.iter().all(|b| *b == f))
    );
    let got = world.block_on(submit(&raw, Op::Read, 0, &[0; 64 * 512]));
    assert_eq!(&got.bufs[0][..], world.bytes("/disk"));
    assert!(world.marked("short-resumed") > 0);
    assert_eq!(world.block_on(submit(&raw, Op::Read, 64, &[0; 512])).result, Err(Errno::EINVAL));
}

#[test]
fn an_operation_is_retried_at_most_twice_after_transient_errors() {
    for op in [Op::Read, Op::Write, Op::WriteZeroes(ZeroFlags { unmap: true, fast: false })] {
        let world = World::new(1);
        world.put("/disk", vec![7; 8192]);
        let raw = open(&world, true, false).unwrap();
        let answer = |error, sticky| {
            let before = world.ops();
            world.fail(Some(Fault { nth: before, error, effect: Effect::None, sticky }));
            let bytes = vec![0; if matches!(op, Op::WriteZeroes(_)) { 0 } else { 4096 }];
            let range = SectorRange::new(0, 8);
            let bufs =
                if bytes.is_empty() { IoVec::new() } else { smallvec![IoBuf::copy_of(&bytes).unwrap()] };
            let result = world.block_on(raw.submit(Request { op, range, bufs, fua: false })).result;
            (result, world.ops() - before)
        };
        assert_eq!(answer(Errno::EAGAIN, false), (Ok(()), 2), "{op:?}");
        assert_eq!(answer(Errno::EAGAIN, true), (Err(Errno::EAGAIN), 3), "{op:?}");
        let (result, operations) = answer(Errno::EIO, true);
        assert_eq!(result, Err(Errno::EIO), "{op:?}");
        // Failed zeros may have dropped dirty pages, which takes more operations to settle.
        assert_eq!(operations == 1, !matches!(op, Op::WriteZeroes(_)), "{op:?}");
    }
}

#[test]
fn the_seeded_bug_takes_a_short_transfer_as_complete() {
    let world = World::new(3);
    world.put("/disk", vec![7; 256 * 512]);
    world.make_short();
    world.switch_on("short-transfer");
    let raw = open(&world, true, false).unwrap();
    let reads = (0..20).map(|_| world.block_on(submit(&raw, Op::Read, 0, &[0; 256 * 512])));
    assert!(reads.filter(|r| r.bufs[0].iter().any(|b| *b != 7)).count() > 0);
}

#[test]
fn locks_keep_writers_apart_until_close() {
    let world = World::new(1);
    world.put("/disk", vec![0; 8192]);
    let writer = open(&world, true, false).unwrap();
    let refused = open(&world, false, false).err().unwrap();
    assert_eq!(refused.to_string(), "lock /disk: it is in use by another process; close it there first");
    world.block_on(writer.close()).unwrap();
    let readers = [open(&world, false, false).unwrap(), open(&world, false, false).unwrap()];
    assert_eq!(world.block_on(submit(&readers[0], Op::Write, 0, &[0; 512])).result, Err(Errno::EROFS));
    assert_eq!(world.block_on(submit(&writer, Op::Read, 0, &[0; 512])).result, Err(Errno::ESHUTDOWN));
}

#[test]
fn a_file_of_any_size_is_shown_up_to_a_whole_sector_and_grows_when_that_is_written() {
    let world = World::new(1);
    world.put("/disk", vec![7; 1000]);
    let writer = open(&world, true, false).unwrap();
    assert_eq!(writer.info().size_sectors, 2);
    world.block_on(submit(&writer, Op::Write, 0, &[8; 512])).result.unwrap();
    assert_eq!(world.bytes("/disk"), [[8; 512].as_slice(), &[7; 488]].concat());
    world.block_on(submit(&writer, Op::Write, 1, &[9; 512])).result.unwrap();
    world.block_on(submit(&writer, Op::Flush, 0, &[])).result.unwrap();
    assert_eq!(world.after_crash(0).bytes("/disk"), [[8; 512], [9; 512]].concat());
    world.block_on(writer.close()).unwrap();
    // The last sector is padded: no byte of the file is left out.
    world.put("/disk", vec![7; 1000]);
    let reader = open(&world, false, false).unwrap();
    assert_eq!(reader.info().size_sectors, 2);
    let read = world.block_on(submit(&reader, Op::Read, 1, &[1; 512]));
    assert_eq!((read.result, &read.bufs[0][487..489]), (Ok(()), &[7, 0][..]));
    let extents = world.block_on(reader.extents(SectorRange::new(0, 2), 8)).unwrap();
    assert_eq!(extents.iter().map(|e| (e.count, e.zero)).collect::<Vec<_>>(), [(2, false)]);
    world.put("/disk", vec![0; 512 * 9]);
    world.set_align(4096);
    assert!(open(&world, true, true).err().unwrap().to_string().contains("direct I/O"));
    let host = world.clone();
    let bad = world.block_on(async move { create(&host, "/new", 513, None).await }).unwrap_err();
    assert!(matches!(bad, ImageError::Options { .. }) && !world.has("/new"));
}

#[test]
fn direct_writes_below_the_alignment_keep_their_neighbours() {
    for seed in 0..20 {
        let world = World::new(seed);
        world.put("/disk", (0..32 * 512).map(|i| (i / 512) as u8).collect());
        world.set_align(4096);
        world.make_shuffled();
        world.make_short();
        let raw = open(&world, true, true).unwrap();
        // Concurrently: two of them share a block, and one spans two.
        let writes = [(1, 1_usize), (3, 2), (7, 3), (16, 8), (25, 1)];
        let all = writes
            .map(|(start, count)| submit(&raw, Op::Write, start, &vec![100 + start as u8; count * 512]));
        let results = world.block_on(futures_util::future::join_all(all));
        assert!(results.iter().all(|r| r.result.is_ok()));
        let bytes = world.bytes("/disk");
        for (sector, got) in bytes.chunks(512).enumerate() {
            let written = writes.iter().find(|(s, n)| (*s as usize..*s as usize + n).contains(&sector));
            let want = written.map_or(sector as u8, |w| 100 + w.0 as u8);
            assert!(got.iter().all(|b| *b == want), "sector {sector} with seed {seed}");
        }
        let got = world.block_on(submit(&raw, Op::Read, 3, &[0; 7 * 512]));
        assert_eq!(got.bufs[0][..], bytes[3 * 512..10 * 512]);
    }
}

#[test]
fn after_a_failed_flush_every_flush_of_a_buffered_file_fails() {
    let world = World::new(1);
    world.put("/disk", vec![0; 8192]);
    let raw = open(&world, true, false).unwrap();
    let flush = |world: &World| world.block_on(submit(&raw, Op::Flush, 0, &[])).result;
    world.block_on(submit(&raw, Op::Write, 0, &[9; 512])).result.unwrap();
    world.fail(Some(Fault { nth: world.ops(), error: Errno::EIO, effect: Effect::None, sticky: false }));
    assert_eq!(flush(&world), Err(Errno::EIO));
    assert_eq!(flush(&world), Err(Errno::EIO));
    assert_eq!(world.marked("flush-latched"), 1);
    world.switch_on("flush-forgets");
    assert_eq!(flush(&world), Ok(()));
    assert_eq!(world.after_crash(0).bytes("/disk")[0], 0, "the data that the bug reports durable is lost");
}

#[test]
fn after_a_failed_flush_every_flush_of_a_direct_file_fails() {
    for (bug, then) in [(None, Err(Errno::EIO)), (Some("direct-flush-forgets"), Ok(()))] {
        let world = World::new(1);
        world.put("/disk", vec![0; 8192]);
        bug.into_iter().for_each(|bug| world.switch_on(bug));
        let raw = open(&world, true, true).unwrap();
        world.block_on(submit(&raw, Op::Write, 0, &[9; 512])).result.unwrap();
        world.fail(Some(Fault { nth: world.ops(), error: Errno::EIO, effect: Effect::None, sticky: false }));
        assert_eq!(world.block_on(submit(&raw, Op::Flush, 0, &[])).result, Err(Errno::EIO));
        assert_eq!(
            world.block_on(submit(&raw, Op::Flush, 0, &[])).result,
            then,
            "the drive's cache may be lost"
        );
    }
}

/// EINTR means that no write was dropped. ENOMEM may come from a write.
#[test]
fn an_interrupted_flush_is_retried() {
    let (memory, interrupted, lost) = (Errno::ENOMEM, Errno::EINTR, Err(Errno::EIO));
    let bug = Some("interrupted-sync-latches");
    for (error, bug, first, then) in [
        (interrupted, None, Ok(()), Ok(())),
        (interrupted, bug, lost, lost),
        (memory, None, Err(memory), lost),
    ] {
        let world = World::new(1);
        world.put("/disk", vec![0; 8192]);
        bug.into_iter().for_each(|bug| world.switch_on(bug));
        let raw = open(&world, true, false).unwrap();
        world.block_on(submit(&raw, Op::Write, 0, &[9; 512])).result.unwrap();
        world.fail(Some(Fault { nth: world.ops(), error, effect: Effect::None, sticky: false }));
        assert_eq!(world.block_on(submit(&raw, Op::Flush, 0, &[])).result, first);
        assert_eq!(world.block_on(submit(&raw, Op::Flush, 0, &[])).result, then);
    }
}

#[test]
fn flushes_share_a_synchronisation_that_began_after_them() {
    let world = World::new(1);
    world.put("/disk", vec![0; 8192]);
    let raw = open(&world, true, false).unwrap();
    let first = submit(&raw, Op::Flush, 0, &[]);
    let late = (0..3).map(|_| submit(&raw, Op::Flush, 0, &[]));
    let write = submit(&raw, Op::Write, 0, &[9; 512]);
    let host = world.clone();
    let late: Vec<_> = late.collect();
    let before = world.ops();
    world.block_on(async move {
        use tap_host::Tasks;
        // The first flush runs while the write completes.
        let first = futures_util::future::join(first, async {
            write.await.result.unwrap();
            host.yield_now().await;
        });
        futures_util::future::join(first, futures_util::future::join_all(late)).await
    });
    assert_eq!(world.ops() - before, 3, "one write, and two synchronisations for four flushes");
    assert_eq!(world.marked("sync-shared"), 2);
}

#[test]
fn zeros_are_made_in_place_or_written_and_reported_as_zero_extents() {
    const PAGE: usize = 4096;
    for refuse in [false, true] {
        let world = World::new(9);
        world.put("/disk", vec![7; 16 * PAGE]);
        if refuse {
            world.refuse_zeroing();
        }
        let raw = open(&world, true, false).unwrap();
        let zero = |start: u64, count: u32, fast| {
            let flags = ZeroFlags { unmap: true, fast };
            let range = SectorRange::new(start * 8, count * 8);
            world.block_on(raw.submit(Request::write_zeroes(range, flags))).result
        };
        assert_eq!(zero(1, 3, true), if refuse { Err(Errno::EOPNOTSUPP) } else { Ok(()) });
        assert_eq!(zero(4, 4, false), Ok(()));
        let discard = Request::discard(SectorRange::new(80, 16));
        assert_eq!(world.block_on(raw.submit(discard)).result, Ok(()));
        let zeros: Vec<u64> =
            (0..16).filter(|p| world.bytes("/disk")[*p as usize * PAGE..][..PAGE] == [0; PAGE]).collect();
        let expected = if refuse { vec![4, 5, 6, 7] } else { vec![1, 2, 3, 4, 5, 6, 7, 10, 11] };
        assert_eq!(zeros, expected);
        let extents = world.block_on(raw.extents(SectorRange::new(24, 64), 1024)).unwrap();
        let seen: Vec<(u64, bool)> = extents.iter().map(|e| (e.count / 8, e.zero)).collect();
        let expected = if refuse {
            vec![(1, false), (4, true), (3, false)]
        } else {
            vec![(5, true), (2, false), (1, true)]
        };
        assert_eq!(seen, expected);
        assert_eq!(zero(15, 2, false), Err(Errno::EINVAL));
    }
}

/// Who zeroes a part of a page reads the rest of it: if that fails, nothing can settle the range.
#[test]
fn parts_of_pages_are_zeroed_by_writing() {
    let world = World::new(9);
    world.put("/disk", vec![7; 4 * 4096]);
    // Zeros in place change nothing.
    world.fail_zeroing(Errno::EOPNOTSUPP);
    for device in [false, true] {
        if device {
            world.put_device("/disk", vec![7; 4 * 4096]);
        }
        let raw = open(&world, true, false).unwrap();
        let zero = |start, count, fast| {
            let flags = ZeroFlags { unmap: true, fast };
            world.block_on(raw.submit(Request::write_zeroes(SectorRange::new(start, count), flags))).result
        };
        let before = world.ops();
        assert_eq!(zero(1, 7, true), Err(Errno::EOPNOTSUPP), "no page is whole");
        assert_eq!(world.ops(), before);
        assert_eq!(zero(1, 7, false), Ok(()));
        assert_eq!(zero(15, 2, false), Ok(()), "parts of two pages");
        assert_eq!(world.ops(), before + 2, "writes");
        let discard = Request::discard(SectorRange::new(17, 14));
        assert_eq!(world.block_on(raw.submit(discard)).result, Ok(()));
        assert_eq!(world.ops(), before + 2);
        let bytes = world.bytes("/disk");
        let zeros: Vec<usize> = (0..32).filter(|s| bytes[s * 512..][..512] == [0; 512]).collect();
        assert_eq!(zeros, [1, 2, 3, 4, 5, 6, 7, 15, 16]);
    }
}

/// The call may have dropped pages of the whole range, so that zeros are the only bytes that it may have.
#[test]
fn a_range_that_cannot_be_zeroed_in_place_is_overwritten_where_it_has_data() {
    let world = World::new(9);
    let bytes: Vec<u8> = [7, 0, 7, 0, 0, 7].iter().flat_map(|fill| [*fill; 2048]).collect();
    world.put("/disk", bytes);
    world.fail_zeroing(Errno::EIO);
    let raw = open(&world, true, false).unwrap();
    let flags = ZeroFlags { unmap: false, fast: false };
    let zeroes = Request::write_zeroes(SectorRange::new(0, 24), flags);
    assert_eq!(world.block_on(raw.submit(zeroes)).result, Err(Errno::EIO));
    assert!(world.bytes("/disk").iter().all(|byte| *byte == 0));
    assert_eq!(world.ops(), 3, "one write for each run of data");
}

/// Giving up ends the use of the file.
#[test]
fn a_range_whose_zeros_fail_is_overwritten_as_long_as_errors_may_pass() {
    let [passing, lasting] = [Errno::EAGAIN, Errno::EIO].map(|error| {
        let world = World::new(9);
        world.put("/disk", vec![7; 8192]);
        world.fail_zeroing(Errno::EIO);
        let raw = open(&world, true, false).unwrap();
        world.fail(Some(Fault { nth: 0, error, effect: Effect::None, sticky: true }));
        let zeroes = Request::write_zeroes(SectorRange::new(0, 8), ZeroFlags { unmap: false, fast: false });
        assert_eq!(world.block_on(raw.submit(zeroes)).result, Err(Errno::EIO));
        world.ops()
    });
    // Each write is also repeated twice.
    assert!(passing > 3 * lasting, "{passing} and {lasting} operations");
}

#[test]
fn a_device_that_made_a_hole_gets_whole_requests_from_then_on() {
    const SECTORS: u32 = 16 << 11;
    let world = World::new(11);
    world.put_device("/disk", vec![7; SECTORS as usize * 512]);
    let raw = open(&world, true, false).unwrap();
    let whole = SectorRange::new(0, SECTORS);
    for ops in [3, 4] {
        assert_eq!(world.block_on(raw.submit(Request::discard(whole))).result, Ok(()));
        assert_eq!(world.ops(), ops, "read a part, punch it, punch the rest; then all at once");
        assert!(world.bytes("/disk").iter().all(|b| *b == 0));
    }
}

#[test]
fn a_device_that_refuses_holes_is_tried_once_and_keeps_its_bytes() {
    const SECTORS: u32 = 16 << 11;
    let world = World::new(10);
    world.put_device("/disk", vec![7; SECTORS as usize * 512]);
    world.refuse_zeroing();
    let raw = open(&world, true, false).unwrap();
    let whole = SectorRange::new(0, SECTORS);
    let fast = ZeroFlags { unmap: true, fast: true };
    assert_eq!(world.block_on(raw.submit(Request::write_zeroes(whole, fast))).result, Err(Errno::EOPNOTSUPP));
    // One part is read and written back.
    assert_eq!((world.ops(), world.bytes("/disk").iter().all(|b| *b == 7)), (2, true));
    for range in [whole, SectorRange::new(1, 5)] {
        assert_eq!(world.block_on(raw.submit(Request::discard(range))).result, Ok(()));
        assert_eq!(
            world.block_on(raw.submit(Request::write_zeroes(range, fast))).result,
            Err(Errno::EOPNOTSUPP)
        );
    }
    assert_eq!((world.ops(), world.bytes("/disk").iter().all(|b| *b == 7)), (2, true));
}

#[test]
fn a_change_with_fua_is_durable_when_answered() {
    for op in [Op::Write, Op::WriteZeroes(ZeroFlags { unmap: false, fast: false })] {
        let world = World::new(1);
        world.put("/disk", vec![7; 8192]);
        let raw = open(&world, true, false).unwrap();
        let request = || {
            let bufs =
                if op.has_data() { smallvec![IoBuf::copy_of(&[0; 512]).unwrap()] } else { IoVec::new() };
            Request { op, range: SectorRange::new(3, 1), bufs, fua: false }
        };
        let left = |world: &World| world.after_crash(0).bytes("/disk")[1536..2048].to_vec();
        world.block_on(raw.submit(request())).result.unwrap();
        assert_eq!(left(&world), [7; 512], "{op:?}: a power cut may lose it");
        world.block_on(raw.submit(request().with_fua(true))).result.unwrap();
        assert_eq!(left(&world), [0; 512], "{op:?}");
    }
}

#[test]
fn a_large_write_reads_only_partly_covered_blocks() {
    let world = World::new(12);
    world.put("/disk", vec![7; 4 << 20]);
    world.set_align(4096);
    let raw = open(&world, true, true).unwrap();
    let before = world.ops();
    assert_eq!(world.block_on(submit(&raw, Op::Write, 1, &vec![9; 2 << 20])).result, Ok(()));
    assert_eq!(world.ops() - before, 3 + 2, "three pieces, the middle one of whole blocks");
    let bytes = world.bytes("/disk");
    let (edge, end) = (512, 512 + (2 << 20));
    assert!(bytes[..edge].iter().chain(&bytes[end..]).all(|b| *b == 7));
    assert!(bytes[edge..end].iter().all(|b| *b == 9));
}

/// The map of the whole disk, with `max` extents asked for at a time: sectors, and whether they are zeros.
fn map(world: &World, raw: &Raw<World>, max: usize) -> Vec<(u64, bool)> {
    let (mut at, size, mut found) = (0, raw.info().size_sectors, Vec::new());
    while at < size {
        let range = SectorRange::new(at, (size - at) as u32);
        let some = world.block_on(raw.extents(range, max)).unwrap();
        assert!(!some.is_empty() && some.len() <= max);
        for extent in some {
            found.push((extent.count, extent.zero));
            at += extent.count;
        }
    }
    assert_eq!(at, size);
    found
}

#[test]
fn few_looks_at_a_file_answer_many_queries_for_extents() {
    let world = World::new(1);
    let bytes: Vec<u8> = (0..4000).flat_map(|sector| [sector as u8 % 2 * 7; 512]).collect();
    let want: Vec<_> = (0..4000).map(|sector| (1, sector % 2 == 0)).collect();
    world.put("/disk", bytes);
    for max in [1, 2, 1024] {
        let raw = open(&world, false, false).unwrap();
        let before = world.looks("/disk");
        assert_eq!(map(&world, &raw, max), want);
        // 16, 64, 256 and 1024 extents, then as many again.
        assert!(world.looks("/disk") - before <= 7, "{} looks", world.looks("/disk") - before);
        world.block_on(raw.close()).unwrap();
    }
}

#[test]
fn a_write_is_seen_by_the_next_query_for_extents() {
    for (op, bug) in [
        (Op::Write, false),
        (Op::WriteZeroes(ZeroFlags { unmap: true, fast: false }), false),
        (Op::Discard, false),
        (Op::Write, true),
    ] {
        let world = World::new(1);
        let fill = if op == Op::Write { 0 } else { 7 };
        world.put("/disk", vec![fill; 64 * 512]);
        if bug {
            world.switch_on("raw-ahead-kept");
        }
        let raw = open(&world, true, false).unwrap();
        assert_eq!(map(&world, &raw, 1), [(64, op == Op::Write)]);
        let bufs =
            if op == Op::Write { smallvec![IoBuf::copy_of(&[9; 8 * 512]).unwrap()] } else { IoVec::new() };
        let request = Request { op, range: SectorRange::new(8, 8), bufs, fua: false };
        world.block_on(raw.submit(request)).result.unwrap();
        let zero = op == Op::Write;
        let seen = map(&world, &raw, 1) == [(8, zero), (8, !zero), (48, zero)];
        assert_eq!(seen, !bug, "{op:?}");
    }
}

#[test]
fn what_is_known_ahead_is_forgotten_after_a_second() {
    let world = World::new(1);
    world.put("/disk", (0..16).flat_map(|sector| [sector % 2 * 7; 512]).collect());
    let raw = open(&world, false, false).unwrap();
    for (sector, wait_ns, looks) in [
        (0, 0, 1),
        (1, ahead::AGE_MAX_NS, 1),
        (2, 1, 2),
        (3, ahead::AGE_MAX_NS, 2),
        (4, ahead::AGE_MAX_NS, 3),
    ] {
        world.advance_ns(wait_ns);
        let found = world.block_on(raw.extents(SectorRange::new(sector, 1), 1)).unwrap();
        assert_eq!((found[0].zero, world.looks("/disk")), (sector % 2 == 0, looks), "sector {sector}");
    }
}

#[test]
fn nothing_is_known_ahead_after_a_write_was_dropped() {
    let world = World::new(1);
    world.put("/disk", vec![0; 64 * 512]);
    let raw = open(&world, true, false).unwrap();
    let mut write = Box::pin(submit(&raw, Op::Write, 8, &[9; 512]));
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    world.stop_at(world.ops());
    assert!(write.as_mut().poll(&mut cx).is_pending());
    drop(write);
    for looks in 1..4 {
        assert_eq!(map(&world, &raw, 1), [(64, true)]);
        assert_eq!(world.looks("/disk"), looks, "it may be carried out at any time");
    }
}

#[test]
fn a_file_grows_to_sizes_with_which_it_can_be_opened() {
    let world = World::new(1);
    world.put("/disk", vec![7; 8192]);
    world.set_align(4096);
    let refused = grow_to(&world, "/disk", true, 8704).unwrap_err().to_string();
    assert!(refused.contains("4096 bytes that direct I/O needs"), "{refused}");
    assert_eq!(world.bytes("/disk"), vec![7; 8192]);
    grow_to(&world, "/disk", true, 12_288).unwrap();
    assert_eq!(open(&world, true, true).unwrap().info().size_sectors, 24);
    grow_to(&world, "/disk", false, 12_800).unwrap();
    assert_eq!(world.after_crash(0).bytes("/disk")[8190..8194], [7, 7, 0, 0]);
}

#[test]
fn a_device_stays_as_large_as_it_is() {
    let world = World::new(1);
    world.put_device("/dev/disk", vec![7; 8192]);
    grow_to(&world, "/dev/disk", false, 8192).unwrap();
    let refused = grow_to(&world, "/dev/disk", false, 16_384).unwrap_err().to_string();
    assert!(refused.contains("extend the device itself"), "{refused}");
}
