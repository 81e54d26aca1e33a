//! Requests of any offset and length, and their order.

mod common;

use common::{Disk, World, export, marked, ok, pattern, world};
use std::cell::Cell;
use std::rc::Rc;
use tap_abi::nbd::*;
use tap_core::Op;
use tap_host::{Errno, SectorRange};
use tap_nbd::ServerLimits;

const MIB: usize = 1 << 20;

/// What each request does to the bytes of a disk, and what the disk is asked for it.
#[test]
fn any_offset_and_length_is_served() {
    for structured in [false, true] {
        world(1, false, |w| async move {
            let disk = Disk::new(4 * MIB);
            let old = pattern(4 * MIB, 9);
            disk.bytes.borrow_mut().copy_from_slice(&old);
            w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
            let raw = w.client("client", "disk", structured).await;
            let (mut expected, new) = (old, pattern(2 * MIB, 77));
            let sizes = [1, 3, 510, 511, 512, 513, 1023, 1024, 1025, 20_000, 1_048_590];
            for (i, (at, len)) in
                [0, 1, 511, 512, 700].into_iter().flat_map(|at| sizes.map(|len| (at, len))).enumerate()
            {
                let (cookie, offset) = (i as u64, at as u64);
                match i % 3 {
                    0 | 1 => {
                        raw.request(CMD_WRITE, 0, cookie, offset, len as u32, &new[i..i + len]).await;
                        expected[at..at + len].copy_from_slice(&new[i..i + len]);
                    }
                    _ => {
                        raw.request(CMD_WRITE_ZEROES, 0, cookie, offset, len as u32, b"").await;
                        expected[at..at + len].fill(0);
                    }
                }
                assert_eq!(raw.answer(0).await, ok(cookie), "{len} bytes at {at}");
                raw.request(CMD_READ, 0, cookie, offset, len as u32, b"").await;
                let reply = raw.answer(len).await;
                let (head, read) = reply.data.split_at(if structured { 8 } else { 0 });
                assert!(head.is_empty() || head == offset.to_be_bytes());
                assert!(read == &expected[at..at + len], "{len} bytes read at {at}");
                assert!(*disk.bytes.borrow() == expected, "after {len} bytes at {at}");
            }
            // Only whole sectors are given back.
            disk.seen.borrow_mut().clear();
            for (offset, len) in [(1, 510), (1, 1022), (1, 1023), (511, 1026)] {
                raw.request(CMD_TRIM, 0, 1, offset, len, b"").await;
                assert_eq!(raw.answer(0).await, ok(1));
            }
            let trims = [(1, 1), (1, 2)].map(|(at, count)| (Op::Discard, SectorRange::new(at, count)));
            assert_eq!(*disk.seen.borrow(), trims);
            assert_eq!(marked(&w.kernel, "nbd-edge-awaited"), 0);
        });
    }
}

/// Zeros inside a sector take a read and a write, so they are not fast. Longer ones are as fast as their whole sectors,
/// which come first: a refusal changes nothing.
#[test]
fn fast_zeros_without_a_whole_sector_are_refused_and_change_nothing() {
    let bytes_of = |offset: u64, len: u32| offset as usize..offset as usize + len as usize;
    for (offset, len, refused_by_disk, done) in [
        (1, 100, false, false),
        (300, 400, false, false),
        (0, 511, false, false),
        (1, 2000, true, false),
        (512, 512, true, false),
        (1, 2000, false, true),
        (512, 512, false, true),
    ] {
        world(1, false, |w| async move {
            let disk = Disk::new(MIB);
            disk.bytes.borrow_mut().fill(7);
            w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
            let raw = w.client("client", "disk", false).await;
            disk.fail.set(refused_by_disk.then_some(Errno::EOPNOTSUPP));
            raw.request(CMD_WRITE_ZEROES, command::FAST_ZERO, 5, offset, len, b"").await;
            let reply = raw.answer(0).await;
            let error = if done { 0 } else { error::ENOTSUP };
            assert_eq!((reply.cookie, reply.error), (5, error), "{len} bytes at {offset}");
            let mut want = vec![7; MIB];
            if done {
                want[bytes_of(offset, len)].fill(0);
            }
            assert!(*disk.bytes.borrow() == want, "{len} bytes at {offset}");
            let seen =
                disk.seen.borrow().iter().filter(|(op, _)| *op == Op::Read || *op == Op::Write).count();
            assert!(done || seen == 0, "{seen} requests for {len} bytes at {offset}");
        });
    }
}

#[test]
fn requests_of_no_bytes_do_nothing() {
    world(1, false, |w| async move {
        let disk = Disk::new(MIB);
        w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
        let raw = w.client("client", "disk", true).await;
        for command in [CMD_READ, CMD_WRITE, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES] {
            for offset in [0, 7, 1 << 20] {
                raw.request(command, 0, 9, offset, 0, b"").await;
                let reply = raw.answer(0).await;
                let chunk = (command == CMD_READ).then_some(CHUNK_NONE);
                assert_eq!((reply.cookie, reply.error, reply.chunk), (9, 0, chunk), "{command} at {offset}");
                assert!(reply.data.is_empty());
            }
        }
        assert!(disk.seen.borrow().is_empty());
    });
}

/// Both writes are under way at once; each must keep the bytes of the other.
#[test]
fn writes_that_share_a_sector_keep_each_others_bytes() {
    for (first, second) in [((0, 600), (600, 424)), ((100, 100), (0, 1024)), ((0, 1024), (500, 20))] {
        world(1, false, |w| async move {
            let disk = Disk::new(MIB);
            w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
            let (a, b) = (w.client("a", "disk", false).await, w.client("b", "disk", false).await);
            let mut expected = vec![0; 1024];
            for (client, (at, len), fill) in [(&a, first, 1), (&b, second, 2)] {
                expected[at..at + len].fill(fill);
                client.request(CMD_WRITE, 0, 1, at as u64, len as u32, &vec![fill; len]).await;
            }
            assert_eq!((a.answer(0).await, b.answer(0).await), (ok(1), ok(1)));
            // Where both wrote, either may be the last.
            let bytes = disk.bytes.borrow()[..1024].to_vec();
            let both = |i: usize| {
                (first.0..first.0 + first.1).contains(&i) && (second.0..second.0 + second.1).contains(&i)
            };
            let wrong = (0..1024).find(|i| if both(*i) { bytes[*i] == 0 } else { bytes[*i] != expected[*i] });
            assert_eq!(wrong, None, "{first:?} and {second:?}");
        });
    }
}

/// What the disk saw of `first` and of a later write of the last of its sectors while it held what came to it; and the
/// bytes there at the end.
async fn held_and_overtaken(w: World, first: (u16, u64, u32), between: Option<(u64, u32)>) -> (usize, u8) {
    let disk = Disk::new(MIB);
    let limits = ServerLimits { range_bytes: 64 << 10, ..ServerLimits::default() };
    w.serve(vec![export("disk", &disk)], limits).await;
    let (a, b) = (w.client("a", "disk", false).await, w.client("b", "disk", false).await);
    disk.hold.set(true);
    let (command, at, len) = first;
    let data = vec![1; if command == CMD_WRITE { len as usize } else { 0 }];
    a.request(command, 0, 1, at, len, &data).await;
    if let Some((at, len)) = between {
        a.request(CMD_WRITE, 0, 2, at, len, &vec![2; len as usize]).await;
    }
    w.sim.sleep_ns(1_000_000).await;
    b.request(CMD_WRITE, 0, 3, 160 << 10, 4096, &[3; 4096]).await;
    w.sim.sleep_ns(1_000_000).await;
    let seen = disk.count(Op::Write);
    disk.hold.set(false);
    disk.go.set();
    assert_eq!((a.answer(0).await, b.answer(0).await), (ok(1), ok(3)));
    if between.is_some() {
        assert_eq!(a.answer(0).await, ok(2));
    }
    let byte = disk.bytes.borrow()[160 << 10];
    (seen, byte)
}

/// A client may end in the middle of the bytes of a first or last sector, which are received apart from the others.
#[test]
fn a_write_that_is_cut_changes_nothing() {
    for received in [0, 1, 411, 412, 500, 412 + 4096, 412 + 4096 + 30] {
        world(1, false, move |w| async move {
            let disk = Disk::new(MIB);
            let (_, server) = w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
            let raw = w.client("client", "disk", false).await;
            // The last 412 bytes of a sector, eight whole ones, and 100 bytes.
            let bytes = pattern(412 + 4096 + 100, 5);
            raw.request(CMD_WRITE, 0, 1, 100, bytes.len() as u32, &bytes[..received]).await;
            raw.stream.finish();
            assert_eq!(raw.take(1).await, b"", "{received} bytes");
            w.sim.sleep_ns(1_000_000_000).await;
            assert_eq!((server.connections(), disk.seen.borrow().len()), (0, 0), "{received} bytes");
        });
    }
}

/// A later write is answered after the pieces of an earlier request, and after a write that waits for an unaligned one:
/// if the client of that dies, nothing of it takes effect later.
#[test]
fn a_write_does_not_overtake_what_waits_in_the_server() {
    for (first, between) in [
        ((CMD_WRITE_ZEROES, 0, 200 << 10), None),
        ((CMD_WRITE_ZEROES, 1, 200 << 10), None),
        ((CMD_WRITE, 1, 1000), Some((512, 200 << 10))),
    ] {
        let got = Rc::new(Cell::new(None));
        let put = Rc::clone(&got);
        world(1, false, |w| async move { put.set(Some(held_and_overtaken(w, first, between).await)) });
        assert_eq!(got.get(), Some((0, 3)), "{first:?}");
    }
}
