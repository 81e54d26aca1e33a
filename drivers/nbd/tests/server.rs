//! The server against a client that speaks bytes.

mod common;

use common::{Disk, World, export, go, marked, meta, ok, pattern, world};
use std::rc::Rc;
use tap_abi::nbd::*;
use tap_core::{Op, ZeroFlags};
use tap_host::{Budget, Errno, SectorRange, Stream};
use tap_nbd::{Export, ExportError, Server, ServerLimits};
use zerocopy::{FromBytes, IntoBytes};

const MIB: usize = 1 << 20;

#[test]
fn options_are_answered() {
    world(1, false, |w| async move {
        let disk = Disk::new(8 * MIB);
        let read_only = Export { read_only: true, ..export("frozen", &disk) };
        w.serve(vec![export("disk", &disk), read_only], ServerLimits::default()).await;
        let raw = w.raw("client").await;
        raw.hello().await;
        raw.option(OPT_LIST, b"").await;
        let name = |name: &str| [&(name.len() as u32).to_be_bytes(), name.as_bytes()].concat();
        let listed = |n: &str| (REP_SERVER, [name(n), format!("about {n}").into_bytes()].concat());
        assert_eq!(raw.replies().await, [listed("disk"), listed("frozen"), (REP_ACK, vec![])]);
        raw.option(99, b"what").await;
        assert_eq!(raw.reply().await.0, REP_ERR_UNSUP);
        raw.option(OPT_STARTTLS, b"").await;
        let (reply, why) = raw.reply().await;
        assert!(reply == REP_ERR_POLICY && String::from_utf8(why).unwrap().contains("TLS"));
        raw.option(OPT_LIST, b"x").await;
        assert_eq!(raw.reply().await.0, REP_ERR_INVALID);
        raw.option(77, &vec![0; 100_000]).await;
        assert_eq!(raw.reply().await.0, REP_ERR_TOO_BIG);
        for (bytes, reply) in [(8 << 10, REP_ERR_UNSUP), ((8 << 10) + 1, REP_ERR_TOO_BIG)] {
            raw.option(77, &vec![0; bytes]).await;
            assert_eq!(raw.reply().await.0, reply, "{bytes} bytes");
        }
        raw.option(OPT_SET_META_CONTEXT, &meta("disk", &[BASE_ALLOCATION])).await;
        assert_eq!(raw.reply().await.0, REP_ERR_INVALID, "structured replies come first");
        raw.option(OPT_LIST_META_CONTEXT, &meta("disk", &[])).await;
        let context = |id: u32| (REP_META_CONTEXT, [&id.to_be_bytes(), BASE_ALLOCATION.as_bytes()].concat());
        let depth = |id: u32| (REP_META_CONTEXT, [&id.to_be_bytes(), ALLOCATION_DEPTH.as_bytes()].concat());
        assert_eq!(raw.replies().await, [context(0), depth(0), (REP_ACK, vec![])]);
        raw.option(OPT_STRUCTURED_REPLY, b"").await;
        assert_eq!(raw.reply().await.0, REP_ACK);
        raw.option(OPT_SET_META_CONTEXT, &meta("disk", &["qemu:x", BASE_ALLOCATION])).await;
        assert_eq!(raw.replies().await, [context(1), (REP_ACK, vec![])]);
        raw.option(OPT_SET_META_CONTEXT, &meta("disk", &["base:"])).await;
        assert_eq!(raw.replies().await, [(REP_ACK, vec![])], "a whole namespace cannot be chosen");
        raw.option(OPT_LIST_META_CONTEXT, &meta("disk", &["base:"])).await;
        assert_eq!(raw.replies().await, [context(0), (REP_ACK, vec![])]);
        raw.option(OPT_SET_META_CONTEXT, &meta("disk", &[ALLOCATION_DEPTH])).await;
        assert_eq!(raw.replies().await, [depth(2), (REP_ACK, vec![])]);
        raw.option(OPT_LIST_META_CONTEXT, &meta("disk", &["qemu:"])).await;
        assert_eq!(raw.replies().await, [depth(0), (REP_ACK, vec![])]);
        raw.option(OPT_INFO, &go("nobody", &[])).await;
        assert_eq!(raw.reply().await.0, REP_ERR_UNKNOWN);
        raw.option(OPT_GO, b"\0").await;
        assert_eq!(raw.reply().await.0, REP_ERR_INVALID);
        raw.option(OPT_INFO, &go("frozen", &[INFO_DESCRIPTION])).await;
        let infos = raw.replies().await;
        let frozen = InfoExport::read_from_bytes(&infos[0].1).unwrap();
        let flags = export::READ_ONLY | export::CAN_MULTI_CONN | export::SEND_DF;
        assert_eq!(frozen.flags.get() & flags, flags);
        assert_eq!(frozen.flags.get() & (export::SEND_TRIM | export::SEND_WRITE_ZEROES), 0);
        assert_eq!(infos[1], (REP_INFO, b"\0\x02about frozen".to_vec()));
        raw.option(OPT_GO, &go("disk", &[INFO_NAME, INFO_BLOCK_SIZE])).await;
        let infos = raw.replies().await;
        assert_eq!(infos[1], (REP_INFO, b"\0\x01disk".to_vec()));
        let sizes = InfoBlockSize::read_from_bytes(&infos[2].1).unwrap();
        assert_eq!((sizes.minimum.get(), sizes.maximum.get()), (1, 32 << 20));
        assert_eq!(infos[3].0, REP_ACK);
        raw.request(CMD_FLUSH, 0, 5, 0, 0, b"").await;
        assert_eq!(raw.answer(0).await, ok(5));
    });
}

#[test]
fn the_old_way_in_and_the_ways_out() {
    world(1, false, |w| async move {
        let disk = Disk::new(MIB);
        let (_, server) = w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
        let raw = w.raw("old").await;
        raw.take(18).await;
        raw.send(&0_u32.to_be_bytes()).await.unwrap();
        let reply = raw.export_name("").await;
        assert_eq!((reply.size.get(), reply.flags.get() & export::SEND_DF), (MIB as u64, 0));
        assert_eq!(raw.take(124).await, [0; 124], "zeros unless both sides opt out");
        raw.request(CMD_READ, 0, 1, 0, 512, b"").await;
        assert_eq!(raw.answer(512).await.data, [0; 512]);
        raw.request(CMD_DISC, 0, 0, 0, 0, b"").await;
        assert_eq!(raw.take(1).await, b"", "closed");
        let raw = w.raw("no such").await;
        raw.hello().await;
        raw.option(OPT_EXPORT_NAME, b"nobody").await;
        assert_eq!(raw.take(1).await, b"");
        let raw = w.raw("abort").await;
        raw.hello().await;
        raw.option(OPT_ABORT, b"").await;
        assert_eq!((raw.reply().await.0, raw.take(1).await.len()), (REP_ACK, 0));
        let raw = w.raw("unknown flags").await;
        raw.send(&0x8000_0000_u32.to_be_bytes()).await.unwrap();
        assert_eq!(raw.take(19).await.len(), 18);
        let raw = w.raw("silent").await;
        assert_eq!(raw.take(19).await.len(), 18, "patience ends");
        assert_eq!(server.connections(), 0);
    });
}

/// Every command that changes or reads the disk, over streams that are split anywhere.
async fn commands(w: World, structured: bool, len: usize) {
    let disk = Disk::new(8 * MIB);
    let (process, _) = w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
    let raw = w.client("client", "disk", structured).await;
    let data = pattern(len, 3);
    raw.request(CMD_WRITE, 0, 1, 4096, data.len() as u32, &data).await;
    assert_eq!(raw.answer(0).await, ok(1));
    assert!(disk.bytes.borrow()[4096..4096 + data.len()] == data);
    raw.request(CMD_READ, command::DF, 2, 512, len as u32, b"").await;
    let reply = raw.answer(len).await;
    let (head, read) = reply.data.split_at(if structured { 8 } else { 0 });
    assert_eq!((reply.cookie, reply.error), (2, 0));
    assert_eq!(reply.chunk, structured.then_some(CHUNK_OFFSET_DATA));
    assert!(head.is_empty() || head == 512_u64.to_be_bytes());
    assert!(read[..3584] == [0; 3584] && read[3584..] == data[..len - 3584]);
    raw.request(CMD_WRITE, command::FUA, 3, 0, 512, &data[..512]).await;
    assert_eq!((raw.answer(0).await, disk.durable.get(), disk.count(Op::Flush)), (ok(3), 1, 0));
    raw.request(CMD_TRIM, 0, 4, 0, 1024, b"").await;
    raw.request(CMD_WRITE_ZEROES, command::NO_HOLE | command::FAST_ZERO, 5, 4096, 4096, b"").await;
    raw.request(CMD_CACHE, 0, 6, 0, 8 << 20, b"").await;
    raw.request(CMD_FLUSH, 0, 7, 0, 0, b"").await;
    for cookie in 4..8 {
        assert_eq!(raw.answer(0).await, ok(cookie));
    }
    let zeroes = Op::WriteZeroes(ZeroFlags { unmap: false, fast: true });
    assert_eq!((disk.count(zeroes), disk.count(Op::Discard), disk.count(Op::Flush)), (1, 1, 1));
    assert!(disk.bytes.borrow()[4096..8192] == [0; 4096]);
    assert_eq!(process.node().name(), "server");
}

#[test]
fn commands_are_carried_out() {
    for structured in [false, true] {
        world(1, false, |w| commands(w, structured, 5 * MIB));
    }
}

#[test]
fn commands_are_carried_out_over_streams_that_are_cut() {
    for seed in 0..60 {
        world(seed, true, |w| commands(w, seed % 2 == 0, 96 << 10));
    }
}

#[test]
fn a_read_of_zeros_is_answered_as_a_hole() {
    world(1, false, |w| async move {
        let disk = Disk::new(MIB);
        disk.bytes.borrow_mut()[3 << 16] = 1;
        w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
        let raw = w.client("client", "disk", true).await;
        for (flags, offset, len, hole) in [
            (0, 0, 1 << 16, true),
            (command::DF, 4096, 4096, true),
            (0, 7, 5000, true),
            (0, 0, 4095, false),
            (0, 0, (3 << 16) + 1, false),
            (0, 3 << 16, 1 << 16, false),
            (0, (3 << 16) + 512, 1 << 16, true),
        ] {
            raw.request(CMD_READ, flags, 4, offset, len, b"").await;
            let reply = raw.answer(0).await;
            let (kind, size) =
                if hole { (CHUNK_OFFSET_HOLE, 12) } else { (CHUNK_OFFSET_DATA, 8 + len as usize) };
            assert_eq!((reply.chunk, reply.data.len()), (Some(kind), size), "{len} bytes at {offset}");
            assert_eq!(reply.data[..8], offset.to_be_bytes());
            assert!(!hole || reply.data[8..] == len.to_be_bytes());
        }
        assert_eq!(marked(&w.kernel, "nbd-hole-sent"), 4);
        let old = w.client("old", "disk", false).await;
        old.request(CMD_READ, 0, 5, 0, 1 << 16, b"").await;
        assert_eq!(old.answer(1 << 16).await.data, [0; 1 << 16], "a simple reply has no other way");
    });
}

#[test]
fn wrong_requests_are_refused_and_the_connection_goes_on() {
    world(1, false, |w| async move {
        let disk = Disk::new(MIB);
        let frozen = Export { read_only: true, ..export("frozen", &disk) };
        let limits = ServerLimits { request_bytes: 65_536, ..ServerLimits::default() };
        w.serve(vec![export("disk", &disk), frozen], limits).await;
        let raw = w.client("client", "disk", true).await;
        let big = 1 << 20;
        for (command, flags, offset, len, error) in [
            (CMD_READ, 0, big - 1, 2, error::EINVAL),
            (CMD_READ, 0, big + 1, 0, error::EINVAL),
            (CMD_WRITE, 0, big + 1, 0, error::EINVAL),
            (CMD_READ, 0, big, 512, error::EINVAL),
            (CMD_READ, 0, u64::MAX - 511, 512, error::EINVAL),
            (CMD_READ, 0, 0, 65_536 + 512, error::EINVAL),
            (CMD_READ, 1 << 9, 0, 512, error::EINVAL),
            (CMD_WRITE, 0, big - 512, 1024, error::ENOSPC),
            (CMD_WRITE, 0, big - 7, 8, error::ENOSPC),
            (CMD_TRIM, 0, big - 512, 1024, error::ENOSPC),
            (CMD_BLOCK_STATUS, 0, 0, 512, error::EINVAL),
            (CMD_BLOCK_STATUS, 0, 0, u32::MAX - 511, error::EINVAL),
            (8, 0, 0, 512, error::EINVAL),
        ] {
            let data = if command == CMD_WRITE { vec![1; len as usize] } else { Vec::new() };
            raw.request(command, flags, 9, offset, len, &data).await;
            let reply = raw.answer(0).await;
            assert_eq!((reply.cookie, reply.error), (9, error), "command {command} at {offset}, {len} bytes");
            assert!(!reply.data[6..].is_empty(), "it says why");
        }
        assert!(disk.seen.borrow().is_empty());
        disk.fail.set(Some(Errno::ETIMEDOUT));
        raw.request(CMD_READ, 0, 10, 0, 512, b"").await;
        assert_eq!(raw.answer(0).await.error, error::EIO);
        let raw = w.client("reader", "frozen", false).await;
        for command in [CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES] {
            let data: &[u8] = if command == CMD_WRITE { &[1; 512] } else { b"" };
            raw.request(command, 0, 1, 0, 512, data).await;
            assert_eq!(raw.answer(0).await.error, error::EPERM);
        }
        assert_eq!(marked(&w.kernel, "nbd-request-refused"), 16);
    });
}

#[test]
fn block_status_tells_holes_and_is_bounded() {
    world(1, false, |w| async move {
        let disk = Disk::new(4 * MIB);
        disk.holes.set(true);
        w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
        let mut raw = w.raw("client").await;
        raw.hello().await;
        raw.structured = true;
        raw.option(OPT_STRUCTURED_REPLY, b"").await;
        raw.reply().await;
        raw.option(OPT_SET_META_CONTEXT, &meta("disk", &[BASE_ALLOCATION])).await;
        raw.replies().await;
        raw.option(OPT_GO, &go("disk", &[])).await;
        raw.replies().await;
        let status = |len: u32, state: u32| StatusExtent { len: len.into(), state: state.into() };
        for (flags, extents) in [
            (0, vec![status(1 << 20, 0), status(1 << 20, 3), status(1 << 20, 0), status(512 << 10, 3)]),
            (command::REQ_ONE, vec![status(1 << 20, 0)]),
        ] {
            raw.request(CMD_BLOCK_STATUS, flags, 4, 0, 7 << 19, b"").await;
            let reply = raw.answer(0).await;
            assert_eq!((reply.cookie, reply.chunk), (4, Some(CHUNK_BLOCK_STATUS)));
            let (id, found) = reply.data.split_at(4);
            assert_eq!((id, found), (&[0, 0, 0, 1][..], extents.as_slice().as_bytes()));
        }
        // Bytes inside a sector.
        for (offset, len, extents) in [
            (1, 700, vec![status(700, 0)]),
            ((1 << 20) - 100, 101, vec![status(100, 0), status(1, 3)]),
            ((2 << 20) - 1, 3, vec![status(1, 3), status(2, 0)]),
        ] {
            raw.request(CMD_BLOCK_STATUS, 0, 4, offset, len, b"").await;
            let reply = raw.answer(0).await;
            assert_eq!(&reply.data[4..], extents.as_slice().as_bytes(), "{len} bytes at {offset}");
        }
    });
}

/// A client goes on where a status ended, which must suit its own block size.
#[test]
fn a_status_that_is_short_ends_with_a_page() {
    world(1, false, |w| async move {
        let disk = Disk::new(5 << 30);
        w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
        let mut raw = w.raw("client").await;
        raw.hello().await;
        raw.option(OPT_STRUCTURED_REPLY, b"").await;
        raw.option(OPT_SET_META_CONTEXT, &meta("disk", &[BASE_ALLOCATION])).await;
        raw.option(OPT_GO, &go("disk", &[])).await;
        raw.structured = true;
        for _ in 0..3 {
            raw.replies().await;
        }
        for (offset, len, got) in
            [(0, u32::MAX, u32::MAX - 4095), (4096, u32::MAX - 4095, u32::MAX - 4095), (0, 8192, 8192)]
        {
            raw.request(CMD_BLOCK_STATUS, 0, 4, offset, len, b"").await;
            let reply = raw.answer(0).await;
            let extent = StatusExtent { len: got.into(), state: 0.into() };
            assert_eq!(&reply.data[4..], extent.as_bytes(), "{len} bytes at {offset}");
        }
    });
}

#[test]
fn garbage_ends_one_connection_only() {
    world(1, false, |w| async move {
        let disk = Disk::new(MIB);
        let (_, server) = w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
        let good = w.client("good", "disk", true).await;
        let bad = w.client("bad", "disk", true).await;
        bad.request(CMD_READ, 0, 1, 0, 512, b"").await;
        bad.send(&[0xaa; 60]).await.unwrap();
        assert_eq!(bad.answer(0).await.cookie, 1, "earlier requests are answered");
        assert_eq!(bad.take(1).await, b"");
        let huge = w.client("huge", "disk", true).await;
        huge.request(CMD_WRITE, 0, 1, 0, u32::MAX - 511, b"").await;
        assert_eq!(huge.take(1).await, b"");
        good.request(CMD_FLUSH, 0, 2, 0, 0, b"").await;
        assert_eq!(good.answer(0).await, ok(2));
        w.sim.sleep_ns(1_000_000).await;
        assert_eq!(server.connections(), 1);
    });
}

#[test]
fn connections_requests_and_memory_are_bounded() {
    world(1, false, |w| async move {
        let disk = Disk::filled(MIB);
        let limits = ServerLimits {
            connections: 2,
            requests: 3,
            request_bytes: 8192,
            connection_bytes: 8192,
            ..ServerLimits::LEAST
        };
        let (_, server) = w.serve(vec![export("disk", &disk)], limits).await;
        let few = w.client("few", "disk", true).await;
        let large = w.client("large", "disk", true).await;
        let third = w.raw("third").await;
        third.hello().await;
        third.option(OPT_GO, &go("disk", &[])).await;
        assert_eq!(third.reply().await, (REP_ERR_POLICY, b"there are too many connections".to_vec()));
        third.option(OPT_EXPORT_NAME, b"disk").await;
        assert_eq!(third.take(1).await, b"", "there is no other way to refuse");
        disk.hold.set(true);
        for cookie in 0..10 {
            few.request(CMD_FLUSH, 0, cookie, 0, 0, b"").await;
            large.request(CMD_READ, 0, cookie, 0, 8192, b"").await;
        }
        w.sim.sleep_ns(1_000_000).await;
        assert_eq!(disk.in_flight.get(), 3 + 1);
        disk.hold.set(false);
        disk.go.set();
        for cookie in 0..10 {
            assert_eq!(few.answer(0).await, ok(cookie));
            assert_eq!(large.answer(0).await.data.len(), 8 + 8192);
        }
        assert_eq!(server.connections(), 2);
    });
}

#[test]
fn limits_of_nothing_are_the_least() {
    world(1, false, |w| async move {
        let disk = Disk::new(MIB);
        let limits = ServerLimits {
            connections: 0,
            negotiating: 0,
            requests: 0,
            request_bytes: 0,
            connection_bytes: 0,
            receive_bytes: 0,
            ..ServerLimits::LEAST
        };
        w.serve(vec![export("disk", &disk)], limits).await;
        let raw = w.client("client", "disk", true).await;
        raw.request(CMD_READ, 0, 1, 0, 512, b"").await;
        assert_eq!(raw.answer(512).await.error, 0);
    });
}

#[test]
fn who_says_nothing_does_not_keep_others_out() {
    world(1, false, |w| async move {
        let disk = Disk::new(MIB);
        let limits = ServerLimits { negotiating: 3, connections: 1, ..ServerLimits::default() };
        let (_, server) = w.serve(vec![export("disk", &disk)], limits).await;
        let served = w.client("served", "disk", true).await;
        let mut mute = Vec::new();
        for i in 0..10 {
            mute.push(w.raw(&format!("mute {i}")).await);
            w.sim.sleep_ns(1_000_000).await;
            assert!(server.connections() <= 1 + 3);
        }
        assert_eq!(mute[6].take(100).await.len(), 18, "the oldest are closed, after their greeting");
        served.stream.shutdown();
        w.sim.sleep_ns(1_000_000).await;
        let next = w.client("next", "disk", true).await;
        next.request(CMD_READ, 0, 1, 0, 512, b"").await;
        assert_eq!(next.answer(0).await.data.len(), 8 + 512);
    });
}

#[test]
fn who_sends_no_more_gets_its_replies_or_loses_its_place() {
    world(1, false, |w| async move {
        let disk = Disk::filled(4 * MIB);
        let limits = ServerLimits { grace_ns: 1_000_000_000, ..ServerLimits::default() };
        let (_, server) = w.serve(vec![export("disk", &disk)], limits).await;
        let patient = w.client("patient", "disk", true).await;
        let deaf = w.client("deaf", "disk", true).await;
        disk.hold.set(true);
        for raw in [&patient, &deaf] {
            raw.request(CMD_READ, 0, 1, 0, 1 << 20, b"").await;
            raw.stream.finish();
        }
        // The disk may take as long as it wants.
        w.sim.sleep_ns(30_000_000_000).await;
        assert_eq!((server.connections(), disk.in_flight.get()), (2, 2));
        disk.hold.set(false);
        disk.go.set();
        assert_eq!(patient.answer(0).await.data.len(), 8 + (1 << 20));
        assert_eq!(patient.take(1).await, b"");
        w.sim.sleep_ns(2_100_000_000).await;
        assert_eq!((server.connections(), server.used_bytes()), (0, 0), "it took no memory");
    });
}

#[test]
fn a_client_that_reads_nothing_holds_up_itself_only() {
    world(1, false, |w| async move {
        let disk = Disk::filled(4 * MIB);
        let limits = ServerLimits { requests: 4, ..ServerLimits::default() };
        let (_, server) = w.serve(vec![export("disk", &disk)], limits).await;
        let slow = w.client("slow", "disk", true).await;
        for cookie in 0..100 {
            slow.request(CMD_READ, 0, cookie, 0, 1 << 20, b"").await;
        }
        let quick = w.client("quick", "disk", true).await;
        for cookie in 0..100 {
            quick.request(CMD_READ, 0, cookie, 0, 65_536, b"").await;
            assert_eq!(quick.answer(0).await.data.len(), 8 + 65_536);
        }
        assert_eq!(disk.count(Op::Read), 100 + 4);
        for cookie in 0..100 {
            assert_eq!(slow.answer(0).await.cookie, cookie);
        }
        assert_eq!(server.connections(), 2);
    });
}

#[test]
fn a_client_that_dies_leaves_nothing_and_starts_nothing() {
    world(1, false, |w| async move {
        let disk = Disk::new(MIB);
        let limits = ServerLimits { requests: 2, ..ServerLimits::default() };
        let (_, server) = w.serve(vec![export("disk", &disk)], limits).await;
        let raw = w.client("client", "disk", true).await;
        disk.hold.set(true);
        for cookie in 0..5 {
            raw.request(CMD_WRITE, 0, cookie, cookie * 512, 512, &[1; 512]).await;
        }
        w.sim.sleep_ns(1_000_000).await;
        raw.stream.shutdown();
        w.sim.sleep_ns(1_000_000).await;
        assert_eq!((server.connections(), disk.in_flight.get()), (1, 2));
        disk.hold.set(false);
        disk.go.set();
        w.sim.sleep_ns(10_000_000).await;
        assert_eq!((server.connections(), disk.in_flight.get()), (0, 0));
        assert_eq!(
            disk.count(Op::Write),
            2,
            "requests not started when the client left are not started later"
        );
    });
}

#[test]
fn stopping_is_orderly() {
    world(1, false, |w| async move {
        let disk = Disk::filled(MIB);
        let limits = ServerLimits { grace_ns: 1_000_000_000, ..ServerLimits::default() };
        let (process, server) = w.serve(vec![export("disk", &disk)], limits).await;
        let raw = w.client("client", "disk", true).await;
        let _mute = w.raw("mute").await;
        let deaf = w.client("deaf", "disk", true).await;
        disk.hold.set(true);
        raw.request(CMD_WRITE, 0, 1, 0, 512, &[7; 512]).await;
        deaf.request(CMD_READ, 0, 1, 0, 1 << 20, b"").await;
        w.sim.sleep_ns(1_000_000).await;
        let own = server.clone();
        let stopped = Rc::new(tap_core::wait::Event::new());
        let tell = Rc::clone(&stopped);
        process.node().spawn("stop", 0, async move {
            own.stop().await;
            tell.set();
        });
        w.sim.sleep_ns(1_000_000).await;
        assert!(!stopped.is_set(), "requests are in flight");
        raw.request(CMD_FLUSH, 0, 2, 0, 0, b"").await;
        let before = w.sim.now_ns();
        disk.hold.set(false);
        disk.go.set();
        assert_eq!(raw.answer(0).await, ok(1));
        assert_eq!(raw.take(1).await, b"", "the second one came too late");
        stopped.wait().await;
        assert!(w.sim.now_ns() - before <= 1_001_000_000, "a client that reads nothing is given up");
        assert_eq!((server.connections(), disk.count(Op::Flush)), (0, 0));
        assert_eq!(disk.seen.borrow()[0], (Op::Write, SectorRange::new(0, 1)));
    });
}

#[test]
fn exports_are_checked() {
    let disk = Disk::new(512);
    world(1, false, |w| async move {
        let process = w.process("server");
        let new = |exports: Vec<Export>| {
            Server::new(process.clone(), exports, ServerLimits::LEAST, &Budget::default()).err()
        };
        assert_eq!(new(vec![]), Some(ExportError::None));
        assert_eq!(new(vec![export("a", &disk), export("a", &disk)]), Some(ExportError::Twice("a".into())));
        let long = "x".repeat(4097);
        assert_eq!(new(vec![export(&long, &disk)]), Some(ExportError::TooLong(long.clone())));
        let wordy = Export { description: long, ..export("a", &disk) };
        assert_eq!(new(vec![wordy]), Some(ExportError::TooLong("a".into())));
        assert_eq!(new(vec![export("a", &disk)]), None);
    });
}

/// What is reserved for each connection is a share of the memory, so that many fit into little of it.
#[test]
fn many_connections_fit_into_little_memory() {
    world(1, false, |w| async move {
        let disk = Disk::new(MIB);
        let made = |connections| {
            let limits = ServerLimits { connections, ..ServerLimits::default() };
            Server::new(w.process("server"), vec![export("disk", &disk)], limits, &Budget::new(16 << 20))
        };
        assert!(made(100).is_ok());
        assert_eq!(made(1000).err(), Some(ExportError::Memory(16 << 20)));
    });
}
