//! Extended headers: 64-bit lengths in requests and replies.

mod common;

use common::{Disk, Raw, World, export, go, meta, world};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_abi::nbd::{
    BASE_ALLOCATION, CHUNK_BLOCK_STATUS_EXT, CHUNK_ERROR, CHUNK_NONE, CHUNK_OFFSET_DATA, CMD_BLOCK_STATUS,
    CMD_CACHE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, EXTENDED_CHUNK_MAGIC,
    ExtendedChunk, ExtendedRequest, LongExtent, OPT_EXPORT_NAME, OPT_EXTENDED_HEADERS, OPT_GO,
    OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY, REP_ACK, REP_ERR_EXT_HEADER_REQD, REP_ERR_INVALID,
    StatusHead, command, error,
};
use tap_core::{Op, ZeroFlags};
use tap_host::{SectorRange, Stream};
use tap_nbd::ServerLimits;
use zerocopy::{FromBytes, IntoBytes};

const MIB: usize = 1 << 20;

/// A client that has chosen `disk` with extended headers.
async fn client(w: &World) -> Raw {
    let raw = w.raw("client").await;
    raw.hello().await;
    raw.option(OPT_EXTENDED_HEADERS, b"").await;
    assert_eq!(raw.reply().await.0, REP_ACK);
    raw.option(OPT_SET_META_CONTEXT, &meta("disk", &[BASE_ALLOCATION])).await;
    raw.replies().await;
    raw.option(OPT_GO, &go("disk", &[])).await;
    assert_eq!(raw.replies().await.pop().unwrap().0, REP_ACK);
    raw
}

/// Sends a request, and returns the kind and the payload of its one chunk.
async fn ask(raw: &Raw, command: u16, flags: u16, offset: u64, len: u64, data: &[u8]) -> (u16, Vec<u8>) {
    let flags = if command == CMD_WRITE { flags | command::PAYLOAD_LEN } else { flags };
    let cookie = offset ^ 0xc00c_1e00_0000_0000;
    let header = ExtendedRequest::new(command, flags, cookie, offset, len);
    raw.send(&[header.as_bytes(), data].concat()).await.unwrap();
    let head = ExtendedChunk::read_from_bytes(&raw.take(ExtendedChunk::BYTES).await).expect("a chunk");
    assert_eq!((head.magic.get(), head.flags.get()), (EXTENDED_CHUNK_MAGIC, 1));
    assert_eq!((head.cookie.get(), head.offset.get()), (cookie, offset));
    (head.kind.get(), raw.take(head.len.get() as usize).await)
}

async fn done(raw: &Raw, command: u16, flags: u16, offset: u64, len: u64, data: &[u8]) {
    assert_eq!(ask(raw, command, flags, offset, len, data).await, (CHUNK_NONE, Vec::new()), "{command}");
}

async fn refused(raw: &Raw, command: u16, flags: u16, offset: u64, len: u64, data: &[u8]) -> u32 {
    let (kind, payload) = ask(raw, command, flags, offset, len, data).await;
    assert_eq!(kind, CHUNK_ERROR, "{command}");
    u32::from_be_bytes(payload[..4].try_into().unwrap())
}

fn at(offset: u64, data: &[u8]) -> (u16, Vec<u8>) {
    (CHUNK_OFFSET_DATA, [&offset.to_be_bytes(), data].concat())
}

#[test]
fn they_are_agreed_on_before_the_export_is_chosen() {
    world(1, false, |w| async move {
        let disk = Disk::new(MIB);
        w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
        let raw = w.raw("client").await;
        raw.hello().await;
        raw.option(OPT_EXTENDED_HEADERS, b"x").await;
        assert_eq!(raw.reply().await.0, REP_ERR_INVALID);
        raw.option(OPT_EXTENDED_HEADERS, b"").await;
        assert_eq!(raw.reply().await.0, REP_ACK);
        raw.option(OPT_STRUCTURED_REPLY, b"").await;
        assert_eq!(raw.reply().await.0, REP_ERR_EXT_HEADER_REQD);
        // The reply to it has no room for them.
        raw.option(OPT_EXPORT_NAME, b"disk").await;
        assert_eq!(raw.take(1).await, b"");
        let raw = client(&w).await;
        raw.request(CMD_READ, 0, 1, 0, 512, &[0; 4]).await;
        assert_eq!(raw.take(1).await, b"", "a compact header is garbage now");
    });
}

#[test]
fn every_command_has_its_extended_reply() {
    world(1, false, |w| async move {
        let disk = Disk::new(4 * MIB);
        disk.holes.set(true);
        w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
        let raw = client(&w).await;
        done(&raw, CMD_WRITE, command::FUA, 700, 1000, &[7; 1000]).await;
        assert_eq!(ask(&raw, CMD_READ, command::DF, 699, 3, b"").await, at(699, &[0, 7, 7]));
        assert_eq!(ask(&raw, CMD_READ, 0, 9, 0, b"").await, (CHUNK_NONE, Vec::new()));
        done(&raw, CMD_CACHE, 0, 0, 4 << 20, b"").await;
        done(&raw, CMD_FLUSH, 0, 0, 0, b"").await;
        done(&raw, CMD_WRITE_ZEROES, command::NO_HOLE, 701, 2, b"").await;
        done(&raw, CMD_TRIM, 0, 1 << 20, 100, b"").await;
        assert_eq!(ask(&raw, CMD_READ, 0, 700, 4, b"").await, at(700, &[7, 0, 0, 7]));
        let (kind, payload) = ask(&raw, CMD_BLOCK_STATUS, 0, 1, (4 << 20) - 1, b"").await;
        assert_eq!(kind, CHUNK_BLOCK_STATUS_EXT);
        let (head, found) = StatusHead::read_from_prefix(&payload).unwrap();
        assert_eq!((head.context.get(), head.count.get()), (1, 4));
        let found = <[LongExtent]>::ref_from_bytes(found).unwrap();
        let found: Vec<_> = found.iter().map(|extent| (extent.len.get(), extent.state.get())).collect();
        assert_eq!(found, [((1 << 20) - 1, 0), (1 << 20, 3), (1 << 20, 0), (1 << 20, 3)]);
        for (command, flags, offset, len, data, why) in [
            (CMD_READ, 0, 4 << 20, 1, &b""[..], error::EINVAL),
            (CMD_WRITE_ZEROES, 0, 1, 1 << 40, b"", error::ENOSPC),
            (CMD_TRIM, 0, u64::MAX, u64::MAX, b"", error::ENOSPC),
            (CMD_BLOCK_STATUS, 0, 0, u64::MAX, b"", error::EINVAL),
            (CMD_READ, 0, 0, 1 << 33, b"", error::EINVAL),
            (99, 0, 0, 1, b"", error::EINVAL),
            // The payload is skipped.
            (CMD_READ, command::PAYLOAD_LEN, 0, 5, b"extra", error::EINVAL),
            (CMD_BLOCK_STATUS, command::PAYLOAD_LEN, 0, 600, &[1; 600], error::EINVAL),
        ] {
            assert_eq!(
                refused(&raw, command, flags, offset, len, data).await,
                why,
                "{command} {offset} {len}"
            );
        }
        let before = disk.seen.borrow().len();
        let header = ExtendedRequest::new(CMD_WRITE, command::PAYLOAD_LEN, 1, 0, 1 << 32);
        raw.send(header.as_bytes()).await.unwrap();
        assert_eq!(raw.take(1).await, b"", "a write that no server takes ends the connection");
        assert_eq!(disk.seen.borrow().len(), before);
    });
}

/// The changes that `disk` saw: what, first sector, sectors.
fn changes(disk: &Rc<Disk>) -> Vec<(Op, SectorRange)> {
    disk.seen.borrow().iter().filter(|(op, _)| op.is_write()).copied().collect()
}

#[test]
fn a_long_change_reaches_the_disk_in_pieces_that_are_whole_sectors() {
    world(1, false, |w| async move {
        let disk = Disk::new(MIB);
        disk.bytes.borrow_mut().fill(7);
        let limits = ServerLimits { range_bytes: 64 << 10, ..ServerLimits::default() };
        w.serve(vec![export("disk", &disk)], limits).await;
        let raw = client(&w).await;
        let zeroes = Op::WriteZeroes(ZeroFlags { unmap: true, fast: false });
        done(&raw, CMD_WRITE_ZEROES, 0, 0, 200 << 10, b"").await;
        let range = |start, count| SectorRange::new(start, count);
        let want = [(0, 128), (128, 128), (256, 128), (384, 16)];
        assert_eq!(changes(&disk), want.map(|(start, count)| (zeroes, range(start, count))));
        disk.seen.borrow_mut().clear();
        done(&raw, CMD_TRIM, 0, (512 << 10) + 1, 100 << 10, b"").await;
        assert_eq!(changes(&disk), [(1025, 127), (1152, 72)].map(|(s, c)| (Op::Discard, range(s, c))));
        done(&raw, CMD_WRITE_ZEROES, command::FUA, (300 << 10) + 1, (100 << 10) - 2, b"").await;
        let bytes = disk.bytes.borrow();
        let zeros: Vec<bool> = bytes.iter().map(|byte| *byte == 0).collect();
        let edges = [(300 << 10) + 1, (400 << 10) - 1];
        assert!(
            !zeros[edges[0] - 1] && zeros[edges[0]..edges[1]].iter().all(|zero| *zero) && !zeros[edges[1]]
        );
    });
}

/// `len` bytes of fast zeros in pieces of 64 KiB, over a disk that refuses them from sector `slow_from` on: the error
/// of the reply, whether the disk has changed, and which pieces were to be fast.
fn fast_zeros(slow_from: u64, offset: u64, len: u64) -> (u32, bool, Vec<bool>) {
    let out = Rc::new(RefCell::new(None));
    let own = Rc::clone(&out);
    world(1, false, move |w| async move {
        let disk = Disk::new(MIB);
        disk.bytes.borrow_mut().fill(7);
        disk.slow_from.set(slow_from);
        let limits = ServerLimits { range_bytes: 64 << 10, ..ServerLimits::default() };
        w.serve(vec![export("disk", &disk)], limits).await;
        let raw = client(&w).await;
        let (kind, payload) = ask(&raw, CMD_WRITE_ZEROES, command::FAST_ZERO, offset, len, b"").await;
        let failed = kind == CHUNK_ERROR;
        let error = if failed { u32::from_be_bytes(payload[..4].try_into().unwrap()) } else { 0 };
        let zeros = |op| matches!(op, Op::WriteZeroes(flags) if flags.fast);
        let fast = changes(&disk).into_iter().map(|(op, _)| zeros(op)).collect();
        let (from, to) = (offset as usize, (offset + len) as usize);
        let bytes = disk.bytes.borrow();
        let changed = bytes.iter().any(|byte| *byte != 7);
        assert!(!changed || bytes[from..to].iter().all(|byte| *byte == 0), "all of it or nothing");
        *own.borrow_mut() = Some((error, changed, fast));
    });
    out.take().unwrap()
}

#[test]
fn only_the_first_piece_of_fast_zeros_is_refused() {
    assert_eq!(fast_zeros(u64::MAX, 0, 200 << 10), (0, true, vec![true, false, false, false]));
    assert_eq!(fast_zeros(0, 0, 200 << 10), (error::ENOTSUP, false, vec![true]));
    assert_eq!(fast_zeros(128, 0, 200 << 10), (0, true, vec![true, false, false, false]));
    // The last piece is a part of a sector, which takes a read and a write.
    assert_eq!(fast_zeros(u64::MAX, 0, (64 << 10) + 5).0, 0);
}

#[test]
fn a_stop_ends_a_long_change_between_its_pieces() {
    for command in [CMD_WRITE_ZEROES, CMD_TRIM] {
        world(1, false, move |w| async move {
            let disk = Disk::new(MIB);
            let limits = ServerLimits { range_bytes: 64 << 10, ..ServerLimits::default() };
            let (process, server) = w.serve(vec![export("disk", &disk)], limits).await;
            let raw = w.client("client", "disk", true).await;
            disk.hold.set(true);
            // The second one waits for the first.
            for cookie in [1, 2] {
                raw.request(command, 0, cookie, 0, 1 << 20, b"").await;
            }
            w.sim.sleep_ns(1_000_000).await;
            assert_eq!(changes(&disk).len(), 1);
            let (own, stopped) = (server.clone(), Rc::new(Cell::new(false)));
            let tell = Rc::clone(&stopped);
            process.node().spawn("stop", 0, async move {
                own.stop().await;
                tell.set(true);
            });
            w.sim.sleep_ns(1_000_000).await;
            assert!(!stopped.get(), "a piece is under way");
            disk.go.set();
            assert_eq!(raw.take(1).await, b"", "the stream ends, and neither has a reply");
            w.sim.sleep_ns(1_000_000).await;
            assert_eq!((stopped.get(), changes(&disk).len()), (true, 1));
        });
    }
}

/// A client that connects again can send it again, and does not take it for failed.
#[test]
fn a_server_that_hangs_up_answers_nothing_more() {
    world(1, false, |w| async move {
        let disk = Disk::new(MIB);
        let (process, server) = w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
        let raw = w.client("client", "disk", true).await;
        disk.hold.set(true);
        raw.request(CMD_WRITE_ZEROES, 0, 1, 0, 4096, b"").await;
        w.sim.sleep_ns(1_000_000).await;
        // The reply is ready before the connection has noticed.
        server.hang_up();
        disk.go.set();
        let asked_ns = w.sim.now_ns();
        assert_eq!(raw.take(1).await, b"", "the stream ends without a reply");
        assert!(w.sim.now_ns() - asked_ns < ServerLimits::default().grace_ns, "at once");
        let (own, stopped) = (server.clone(), Rc::new(Cell::new(false)));
        let tell = Rc::clone(&stopped);
        process.node().spawn("stop", 0, async move {
            own.stop().await;
            tell.set(true);
        });
        w.sim.sleep_ns(1_000_000).await;
        assert_eq!((stopped.get(), changes(&disk).len()), (true, 1), "it was carried out");
    });
}

/// Its client is gone, and whoever comes next waits for it.
#[test]
fn a_long_change_ends_between_its_pieces_when_its_connection_breaks() {
    world(1, false, |w| async move {
        let disk = Disk::new(MIB);
        let limits = ServerLimits { range_bytes: 64 << 10, ..ServerLimits::default() };
        let (_process, _server) = w.serve(vec![export("disk", &disk)], limits).await;
        let raw = w.client("client", "disk", true).await;
        disk.hold.set(true);
        raw.request(CMD_WRITE_ZEROES, 0, 1, 0, 1 << 20, b"").await;
        w.sim.sleep_ns(1_000_000).await;
        raw.stream.abort();
        w.sim.sleep_ns(1_000_000).await;
        disk.go.set();
        w.sim.sleep_ns(1_000_000).await;
        assert_eq!(changes(&disk).len(), 1);
    });
}
