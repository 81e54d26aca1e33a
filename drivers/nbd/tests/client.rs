//! The client against our server, against poorer ones, and against servers that die, lie or change.

mod common;

use common::{Disk, World, address, export, world};
use kernel_model::{Process, ProcessStream};
use proptest::prelude::*;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_abi::nbd::*;
use tap_core::{Node, Op, Request, ZeroFlags};
use tap_host::{
    Errno, IoBuf, IoVec, Listener, Mark, SECTOR_BYTES, SectorRange, SendList, Sockets, Stream, Time,
    bytes_of, copy_from_slice, copy_to_slice,
};
use tap_nbd::{Breaks, Client, ClientConfig, ClientError, Export, ServerLimits};
use zerocopy::{FromBytes, IntoBytes};

const MIB: usize = 1 << 20;

/// Patience that suits virtual time.
fn config() -> ClientConfig {
    ClientConfig {
        request_ns: 1_000_000_000,
        pause_ns: 1_000_000,
        pause_most_ns: 8_000_000,
        reconnect_ns: 500_000_000,
        ..ClientConfig::new(address())
    }
}

/// Buffers of the given lengths, filled with `byte`.
fn bufs(lens: &[usize], byte: u8) -> IoVec {
    let one = |len: &usize| {
        let mut buf = IoBuf::unpooled(*len).unwrap();
        buf.fill(byte);
        buf
    };
    lens.iter().map(one).collect()
}

fn joined(bufs: &IoVec) -> Vec<u8> {
    bufs.iter().flat_map(|buf| buf.to_vec()).collect()
}

fn range(start: u64, bytes: usize) -> SectorRange {
    SectorRange::new(start, (bytes as u64 / SECTOR_BYTES) as u32)
}

async fn write(node: &dyn Node, start: u64, len: usize, byte: u8) -> Result<(), Errno> {
    let response = node.submit(Request::write(range(start, len), bufs(&[len], byte))).await;
    assert_eq!((response.bufs.len(), bytes_of(&response.bufs)), (1, len), "buffers come back");
    response.result
}

async fn read(node: &dyn Node, start: u64, len: usize) -> Result<Vec<u8>, Errno> {
    let response = node.submit(Request::read(range(start, len), bufs(&[len], 0xee))).await;
    assert_eq!(bytes_of(&response.bufs), len, "buffers come back");
    response.result.map(|()| joined(&response.bufs))
}

async fn flush(node: &dyn Node) -> Result<(), Errno> {
    node.submit(Request::flush()).await.result
}

async fn everything(w: World, limits: ServerLimits) {
    let disk = Disk::new(4 * MIB);
    disk.holes.set(true);
    let (_, server) = w.serve(vec![export("disk", &disk)], limits).await;
    let client = Client::connect(w.process("client"), config()).await.unwrap();
    assert_eq!((client.info().size_sectors, client.info().read_only), (8192, false));
    let mut data = bufs(&[512, 9 << 10, 60 << 10, 1024], 0);
    let len = bytes_of(&data);
    let bytes: Vec<u8> = (0..len).map(|i| (i / 7) as u8).collect();
    copy_from_slice(&mut data, 0, &bytes);
    let response = client.submit(Request::write(range(3, len), data)).await;
    assert_eq!(response.result, Ok(()));
    assert!(joined(&response.bufs) == bytes);
    assert!(disk.bytes.borrow()[3 * 512..][..len] == bytes);
    let response =
        client.submit(Request::read(range(3, len), bufs(&[1024, 32 << 10, len - (33 << 10)], 1))).await;
    assert_eq!(response.result, Ok(()));
    let mut got = vec![0; len];
    copy_to_slice(&response.bufs, 0, &mut got);
    assert!(got == bytes);
    let zeroes = ZeroFlags { unmap: true, fast: true };
    assert_eq!(client.submit(Request::write_zeroes(range(3, 4096), zeroes)).await.result, Ok(()));
    assert_eq!(client.submit(Request::discard(range(11, 512))).await.result, Ok(()));
    assert_eq!(flush(&client).await, Ok(()));
    let kept = ZeroFlags { unmap: false, fast: false };
    assert_eq!(client.submit(Request::write_zeroes(range(3, 4096), kept)).await.result, Ok(()));
    let made = [Op::WriteZeroes(zeroes), Op::WriteZeroes(kept), Op::Discard].map(|op| disk.count(op));
    assert_eq!(made, [1, 1, 1]);
    let extents = client.extents(range(0, 3 * MIB), 1024).await.unwrap();
    let found: Vec<_> = extents.iter().map(|e| (e.count, e.zero, e.allocated)).collect();
    assert_eq!(found, [(2048, false, true), (2048, true, false), (2048, false, true)]);
    disk.fail.set(Some(Errno::ENOSPC));
    assert_eq!(write(&client, 0, 512, 1).await, Err(Errno::ENOSPC));
    assert_eq!(read(&client, 0, 512).await, Err(Errno::ENOSPC));
    assert_eq!(client.submit(Request::discard(range(11, 512))).await.result, Err(Errno::ENOSPC));
    let zeroes = Request::write_zeroes(range(3, 4096), ZeroFlags { unmap: true, fast: false });
    assert_eq!(client.submit(zeroes).await.result, Err(Errno::ENOSPC));
    disk.fail.set(None);
    let outside = client.submit(Request::discard(SectorRange::new(8191, 2))).await;
    assert_eq!(outside.result, Err(Errno::EINVAL));
    assert_eq!(client.close().await, Ok(()));
    assert_eq!(write(&client, 0, 512, 1).await, Err(Errno::ESHUTDOWN));
    w.sim.sleep_ns(1_000_000_000).await;
    assert_eq!((server.connections(), client.in_flight()), (0, 0));
}

#[test]
fn everything_comes_through() {
    world(1, false, |w| everything(w, ServerLimits::default()));
    let small = ServerLimits { request_bytes: 4096, requests: 2, ..ServerLimits::LEAST };
    world(1, false, |w| async move {
        everything(w.clone(), small).await;
        assert!(w.kernel.marks()[Mark::NbdSplit as usize] >= 2);
    });
}

#[test]
fn everything_comes_through_streams_that_are_cut() {
    for seed in 0..40 {
        world(seed, true, |w| everything(w, ServerLimits::default()));
    }
}

/// A server that knows `EXPORT_NAME` and simple replies only, and has `flags`.
async fn poor_server(process: Process, stream: ProcessStream, flags: u16, disk: Rc<Disk>) {
    let _alive = &process;
    let raw = common::Raw { stream, structured: false };
    raw.send(Hello::new(handshake::FIXED_NEWSTYLE).as_bytes()).await.unwrap();
    raw.take(4).await;
    loop {
        let head = OptionHeader::read_from_bytes(&raw.take(16).await).unwrap();
        raw.take(head.len.get() as usize).await;
        if head.option.get() == OPT_EXPORT_NAME {
            break;
        }
        raw.send(OptionReply::new(head.option.get(), REP_ERR_UNSUP, 0).as_bytes()).await.unwrap();
    }
    let size = disk.bytes.borrow().len() as u64;
    let reply = ExportReply { size: size.into(), flags: (flags | export::HAS_FLAGS).into() };
    raw.send(reply.as_bytes()).await.unwrap();
    raw.send(&[0; EXPORT_PADDING_BYTES]).await.unwrap();
    loop {
        let bytes = raw.take(28).await;
        let Ok(head) = RequestHeader::read_from_bytes(&bytes) else { return };
        let (at, len) = (head.offset.get() as usize, head.len.get() as usize);
        let mut answer = SimpleReply::new(head.cookie.get(), 0).as_bytes().to_vec();
        match head.command.get() {
            CMD_READ => answer.extend_from_slice(&disk.bytes.borrow()[at..at + len]),
            CMD_WRITE => {
                let data = raw.take(len).await;
                disk.bytes.borrow_mut()[at..at + len].copy_from_slice(&data);
            }
            CMD_FLUSH => disk.seen.borrow_mut().push((Op::Flush, SectorRange::default())),
            CMD_DISC => return,
            other => panic!("the client asks for {other}, which was not offered"),
        }
        if raw.send(&answer).await.is_err() {
            return;
        }
    }
}

#[test]
fn a_server_that_can_little_is_enough() {
    for (flags, write_through) in [(0, false), (export::SEND_FLUSH, true)] {
        world(1, false, move |w| async move {
            let disk = Disk::new(4 * MIB);
            let process = w.process("server");
            let listener = process.listen(&address()).await.unwrap();
            let (own, d) = (process.clone(), Rc::clone(&disk));
            process.node().spawn("serve", 0, async move {
                let stream = listener.accept().await.unwrap();
                poor_server(own, stream, flags, d).await;
            });
            let config = ClientConfig { write_through, ..config() };
            let client = Client::connect(w.process("client"), config).await.unwrap();
            write(&client, 0, 3 * MIB, 7).await.unwrap();
            let zeroes = |fast| Request::write_zeroes(range(1, 2 * MIB), ZeroFlags { unmap: true, fast });
            assert_eq!(client.submit(zeroes(true)).await.result, Err(Errno::EOPNOTSUPP));
            assert_eq!(client.submit(zeroes(false)).await.result, Ok(()));
            assert_eq!(client.submit(Request::discard(range(0, 512))).await.result, Ok(()));
            let bytes = read(&client, 0, 3 * MIB).await.unwrap();
            assert!(bytes[..512] == [7; 512] && bytes[512..512 + 2 * MIB].iter().all(|b| *b == 0));
            assert!(bytes[512 + 2 * MIB..].iter().all(|b| *b == 7));
            assert!(client.extents(range(0, 4 * MIB), 1024).await.unwrap()[0].allocated);
            assert_eq!(flush(&client).await, Ok(()));
            // One for each write where they are to be durable, and the one that was asked for.
            let flushes = if write_through { 1 + 2 + 1 } else { 0 };
            assert_eq!(disk.count(Op::Flush), flushes);
        });
    }
}

#[test]
fn what_cannot_be_is_refused_with_a_reason() {
    world(1, false, |w| async move {
        let process = w.process("client");
        let error = Client::connect(process.clone(), config()).await.err();
        assert_eq!(error, Some(ClientError::Connect(address(), Errno::ENOENT)));
        let disk = Disk::new(MIB);
        let frozen = Export { read_only: true, ..export("frozen", &disk) };
        w.serve(vec![export("disk", &disk), frozen], ServerLimits::default()).await;
        let named = |name: &str| ClientConfig { export: name.into(), ..config() };
        let error = Client::connect(process.clone(), named("nobody")).await.err().unwrap();
        assert_eq!(
            error.to_string(),
            "open the export 'nobody' at unix:/run/nbd: the server says: there is no export of this name"
        );
        let client = Client::connect(process, named("frozen")).await.unwrap();
        assert!(client.info().read_only);
        assert_eq!(write(&client, 0, 512, 1).await, Err(Errno::EROFS));
        assert_eq!(client.close().await, Ok(()));
    });
}

#[test]
fn a_server_that_dies_and_comes_back_is_a_pause() {
    for seed in 0..60 {
        world(seed, seed > 0, |w| async move {
            let disk = Disk::new(MIB);
            let (process, _) = w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
            let config = ClientConfig { breaks: Breaks::Keep, ..config() };
            let client = Client::connect(w.process("client"), config).await.unwrap();
            write(&client, 0, 65_536, 1).await.unwrap();
            disk.hold.set(true);
            let host = w.process("guest");
            for i in 0..20_u64 {
                let client = client.clone();
                host.node().spawn("write", i, async move {
                    write(&client, 256 + i * 8, 4096, i as u8 + 1).await.unwrap();
                    assert_eq!(flush(&client).await, Ok(()));
                });
            }
            w.sim.sleep_ns(20_000).await;
            process.node().kill();
            process.node().dead().await;
            disk.hold.set(false);
            w.sim.sleep_ns(30_000_000).await;
            let in_flight = client.in_flight();
            assert!(in_flight > 0, "they wait");
            w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
            w.sim.sleep_ns(400_000_000).await;
            assert_eq!(client.in_flight(), 0);
            for i in 0..20 {
                assert_eq!(read(&client, 256 + i * 8, 4096).await.unwrap(), [i as u8 + 1; 4096]);
            }
            assert_eq!(w.kernel.marks()[Mark::NbdServerBack as usize], 1);
            assert!(w.kernel.marks()[Mark::NbdResent as usize] >= in_flight as u64);
        });
    }
}

/// A write, perhaps a flush, then the server dies and comes back; what a flush then says, twice.
fn flushes_after_a_break(config: ClientConfig, flush_before: bool) -> [Result<(), Errno>; 2] {
    let results = Rc::new(std::cell::Cell::new(None));
    let out = Rc::clone(&results);
    world(1, false, move |w| async move {
        let disk = Disk::new(MIB);
        let (process, _) = w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
        let client = Client::connect(w.process("client"), config).await.unwrap();
        write(&client, 0, 4096, 1).await.unwrap();
        if flush_before {
            flush(&client).await.unwrap();
        }
        process.node().kill();
        process.node().dead().await;
        w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
        w.sim.sleep_ns(100_000_000).await;
        write(&client, 8, 4096, 1).await.unwrap();
        out.set(Some([flush(&client).await, flush(&client).await]));
    });
    results.take().unwrap()
}

#[test]
fn a_flush_promises_nothing_that_a_dead_server_may_have_lost() {
    let keep = ClientConfig { breaks: Breaks::Keep, ..config() };
    let through = ClientConfig { write_through: true, ..config() };
    assert_eq!(flushes_after_a_break(config(), false), [Err(Errno::EIO); 2]);
    assert_eq!(flushes_after_a_break(config(), true), [Ok(()); 2]);
    assert_eq!(flushes_after_a_break(keep, false), [Ok(()); 2]);
    assert_eq!(flushes_after_a_break(through, false), [Ok(()); 2]);
}

#[test]
fn a_server_that_stays_away_is_given_up_and_taken_again() {
    world(1, false, |w| async move {
        let disk = Disk::new(MIB);
        let (process, _) = w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
        let client = Client::connect(w.process("client"), config()).await.unwrap();
        write(&client, 0, 512, 1).await.unwrap();
        process.node().kill();
        let before = w.sim.now_ns();
        assert_eq!(write(&client, 0, 512, 2).await, Err(Errno::EIO));
        let waited = w.sim.now_ns() - before;
        assert!((500_000_000..520_000_000).contains(&waited), "{waited}");
        assert_eq!(read(&client, 0, 512).await, Err(Errno::EIO));
        w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
        w.sim.sleep_ns(10_000_000).await;
        assert_eq!(read(&client, 0, 512).await.unwrap(), [1; 512]);
        assert_eq!(client.close().await, Err(Errno::EIO), "the first write may be lost");
    });
}

#[test]
fn another_disk_in_its_place_is_refused_for_good() {
    for change in 0..3 {
        world(1, false, move |w| async move {
            let disk = Disk::new(MIB);
            let (process, _) = w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
            let client = Client::connect(w.process("client"), config()).await.unwrap();
            process.node().kill();
            process.node().dead().await;
            let other = if change == 0 { Disk::new(2 * MIB) } else { Disk::new(MIB) };
            other.read_only.set(change == 1);
            let request_bytes = if change == 2 { 4096 } else { 32 << 20 };
            let limits = ServerLimits { request_bytes, ..ServerLimits::default() };
            w.serve(vec![export("disk", &other)], limits).await;
            assert_eq!(read(&client, 0, 512).await, Err(Errno::EIO));
            w.sim.sleep_ns(1_000_000_000).await;
            assert_eq!(write(&client, 0, 512, 1).await, Err(Errno::EIO));
            assert!(other.seen.borrow().is_empty());
            assert_eq!(client.close().await, Ok(()));
        });
    }
}

#[test]
fn a_request_that_takes_too_long_is_sent_again() {
    world(1, false, |w| async move {
        let disk = Disk::new(MIB);
        let (_, server) = w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
        let client = Client::connect(w.process("client"), config()).await.unwrap();
        disk.hold.set(true);
        let (c, host) = (client.clone(), w.process("guest"));
        host.node().spawn("write", 0, async move { write(&c, 0, 512, 5).await.unwrap() });
        w.sim.sleep_ns(1_100_000_000).await;
        assert_eq!((server.connections(), disk.in_flight.get()), (2, 2));
        disk.hold.set(false);
        disk.go.set();
        w.sim.sleep_ns(1_000_000).await;
        assert_eq!((client.in_flight(), server.connections()), (0, 1));
        assert_eq!(read(&client, 0, 512).await.unwrap(), [5; 512]);
    });
}

/// Sends `bytes` to whoever connects, again and again.
fn against_garbage(bytes: Vec<u8>) {
    world(1, false, |w| async move {
        let process = w.process("server");
        let listener = process.listen(&address()).await.unwrap();
        process.node().spawn("serve", 0, async move {
            while let Ok(stream) = listener.accept().await {
                let mut list = SendList::new();
                list.push_bytes(&bytes);
                while !list.is_empty() {
                    let (Ok(()), rest) = stream.send(list).await else { break };
                    list = rest;
                }
            }
        });
        let config = ClientConfig { connect_ns: 1_000_000, ..config() };
        if let Ok(client) = Client::connect(w.process("client"), config).await {
            if client.info().size_sectors >= 8 {
                let _ = read(&client, 0, 4096).await;
                let _ = client.extents(range(0, 4096), 1024).await;
                let _ = write(&client, 0, 512, 1).await;
            }
            let _ = client.close().await;
        }
    });
}

/// A server that answers the first request of each connection with `answer`, given the number of the connection.
/// Gives how many connections there were.
async fn answers(
    w: &World,
    answer: impl Fn(u32) -> Vec<u8> + 'static,
    greeting: impl Fn(u32) -> Vec<u8> + 'static,
) -> Rc<Cell<u32>> {
    let process = w.process("server");
    let listener = process.listen(&address()).await.unwrap();
    let connections = Rc::new(Cell::new(0));
    let (host, count) = (process.clone(), Rc::clone(&connections));
    process.node().spawn("serve", 0, async move {
        let mut open = Vec::new();
        while let Ok(stream) = listener.accept().await {
            count.set(count.get() + 1);
            let say = |bytes: Vec<u8>| {
                let mut list = SendList::new();
                list.push_bytes(&bytes);
                stream.send(list)
            };
            say(greeting(count.get())).await.0.unwrap();
            // The request is there by then.
            host.sleep_ns(1_000_000).await;
            say(answer(count.get())).await.0.unwrap();
            open.push(stream);
        }
    });
    connections
}

/// A status chunk with these lengths in it.
fn status(done: bool, lens: &[u32]) -> Vec<u8> {
    let len = 4 + lens.len() * StatusExtent::BYTES;
    let mut bytes = ChunkHeader::new(1, CHUNK_BLOCK_STATUS, done, len as u32).as_bytes().to_vec();
    bytes.extend(1_u32.to_be_bytes());
    for (i, len) in lens.iter().enumerate() {
        let state = if i % 2 == 0 { 0 } else { STATE_ZERO };
        bytes.extend(StatusExtent { len: (*len).into(), state: state.into() }.as_bytes());
    }
    bytes
}

/// More status chunks than were asked for would be memory without a limit: the connection breaks, the next one is
/// asked.
#[test]
fn a_block_status_comes_once() {
    world(1, false, |w| async move {
        let twice = |number| match number {
            1 => [status(false, &[512]), status(true, &[512])].concat(),
            _ => status(true, &[2048]),
        };
        let connections = answers(&w, twice, |_| greeting(true)).await;
        let client = Client::connect(w.process("client"), config()).await.unwrap();
        let extents = client.extents(range(0, 4096), 1024).await.unwrap();
        assert_eq!(extents.iter().map(|e| e.count).collect::<Vec<_>>(), [4]);
        assert_eq!(connections.get(), 2);
    });
}

/// No more than was asked for, nothing behind the range, and nothing behind a piece that ends within a sector.
#[test]
fn a_block_status_is_cut_to_what_was_asked_for() {
    let found = |lens: &'static [u32], most: usize| {
        let found = Rc::new(RefCell::new(Vec::new()));
        let own = Rc::clone(&found);
        world(1, false, move |w| async move {
            answers(&w, move |_| status(true, lens), |_| greeting(true)).await;
            let client = Client::connect(w.process("client"), config()).await.unwrap();
            let extents = client.extents(range(0, 4096), most).await.unwrap();
            own.borrow_mut().extend(extents.iter().map(|e| (e.count, e.zero)));
        });
        found.take()
    };
    assert_eq!(found(&[512, 1024, 2560], 9), [(1, false), (2, true), (5, false)]);
    assert_eq!(found(&[512, 1024, 2560], 2), [(1, false), (2, true)]);
    assert_eq!(found(&[512, 8192, 512], 9), [(1, false), (7, true)]);
    assert_eq!(found(&[1024, 700, 1024], 9), [(2, false), (1, true)]);
    assert_eq!(found(&[100, 1024], 9), [(1, false)], "less than a sector may be anything");
}

/// What a server says of an error is for people: the next reply comes behind it.
#[test]
fn the_words_of_an_error_are_passed_over() {
    world(1, false, |w| async move {
        let words = |_| {
            let text = b"the disk is on fire";
            let len = (ErrorHead::BYTES + text.len()) as u32;
            let head = ErrorHead { error: error::EIO.into(), message_len: (text.len() as u16).into() };
            let failed =
                [ChunkHeader::new(1, CHUNK_ERROR, true, len).as_bytes(), head.as_bytes(), text].concat();
            [failed, SimpleReply::new(2, 0).as_bytes().to_vec()].concat()
        };
        let connections = answers(&w, words, |_| greeting(true)).await;
        let client = Client::connect(w.process("client"), config()).await.unwrap();
        let (c, host) = (client.clone(), w.process("guest"));
        host.node().spawn("read", 0, async move { assert_eq!(read(&c, 0, 512).await, Err(Errno::EIO)) });
        w.sim.sleep_ns(1).await;
        assert_eq!(flush(&client).await, Ok(()));
        assert_eq!((connections.get(), client.in_flight()), (1, 0));
    });
}

/// What a connection said of a request before it broke is not what the next one says.
#[test]
fn an_error_of_a_connection_that_broke_is_forgotten() {
    world(1, false, |w| async move {
        let answer = |number| {
            let head = ErrorHead { error: error::EIO.into(), message_len: 0.into() };
            let failed = ChunkHeader::new(1, CHUNK_ERROR, false, ErrorHead::BYTES as u32);
            match number {
                1 => [failed.as_bytes(), head.as_bytes(), b"no reply begins like this"].concat(),
                _ => ChunkHeader::new(1, CHUNK_NONE, true, 0).as_bytes().to_vec(),
            }
        };
        let connections = answers(&w, answer, |_| greeting(true)).await;
        let client = Client::connect(w.process("client"), config()).await.unwrap();
        assert_eq!((flush(&client).await, connections.get()), (Ok(()), 2));
    });
}

/// Some servers end a connection when it does, not when they are told so.
#[test]
fn a_client_that_is_closed_ends_its_stream() {
    world(1, false, |w| async move {
        let process = w.process("server");
        let listener = process.listen(&address()).await.unwrap();
        let ended = Rc::new(Cell::new(false));
        let own = Rc::clone(&ended);
        process.node().spawn("serve", 0, async move {
            let stream = listener.accept().await.unwrap();
            let mut list = SendList::new();
            list.push_bytes(&greeting(true));
            stream.send(list).await.0.unwrap();
            let mut buf = IoBuf::unpooled(4096).unwrap();
            loop {
                let (received, back) = stream.recv(buf, 0).await;
                if received.unwrap() == 0 {
                    break own.set(true);
                }
                buf = back;
            }
        });
        let client = Client::connect(w.process("client"), config()).await.unwrap();
        assert_eq!(client.close().await, Ok(()));
        w.sim.sleep_ns(1_000_000_000).await;
        assert!(ended.get());
    });
}

/// A server that knows less than before is another one: what was asked of the first cannot be asked of it.
#[test]
fn a_server_that_comes_back_with_less_is_refused() {
    for (first, then) in [(greeting(true), greeting(false)), (greeting(true), without_context())] {
        world(1, false, move |w| async move {
            // Garbage breaks the first connection.
            let connections = answers(
                &w,
                |number| if number == 1 { vec![7; 64] } else { SimpleReply::new(1, 0).as_bytes().to_vec() },
                move |number| if number == 1 { first.clone() } else { then.clone() },
            )
            .await;
            let client = Client::connect(w.process("client"), config()).await.unwrap();
            assert_eq!(flush(&client).await, Err(Errno::EIO));
            assert_eq!(connections.get(), 2);
        });
    }
}

/// Nobody is left who tries to reach a server that is away.
#[test]
fn a_client_that_is_closed_tries_no_more() {
    world(1, false, |w| async move {
        let disk = Disk::new(MIB);
        let (process, _) = w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
        let client = Client::connect(w.process("client"), config()).await.unwrap();
        process.node().kill();
        w.sim.sleep_ns(20_000_000).await;
        assert_eq!(client.close().await, Ok(()), "nothing was written");
        let (_, server) = w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
        w.sim.sleep_ns(1_000_000_000).await;
        assert_eq!((client.connections(), server.connections()), (1, 0));
    });
}

/// As [`greeting`] with everything, but for the allocation of the disk.
fn without_context() -> Vec<u8> {
    let mut bytes = Hello::new(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).as_bytes().to_vec();
    let flags = (export::HAS_FLAGS | export::SEND_FLUSH).into();
    bytes.extend(OptionReply::new(OPT_STRUCTURED_REPLY, REP_ACK, 0).as_bytes());
    bytes.extend(OptionReply::new(OPT_SET_META_CONTEXT, REP_ACK, 0).as_bytes());
    bytes.extend(OptionReply::new(OPT_GO, REP_INFO, 12).as_bytes());
    bytes.extend(InfoExport { kind: INFO_EXPORT.into(), size: (1 << 20).into(), flags }.as_bytes());
    bytes.extend(OptionReply::new(OPT_GO, REP_ACK, 0).as_bytes());
    bytes
}

/// A server's words up to the first request: it knows nothing but `EXPORT_NAME`, or everything.
fn greeting(structured: bool) -> Vec<u8> {
    let mut bytes = Hello::new(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).as_bytes().to_vec();
    let flags = (export::HAS_FLAGS | export::SEND_FLUSH).into();
    if structured {
        bytes.extend(OptionReply::new(OPT_STRUCTURED_REPLY, REP_ACK, 0).as_bytes());
        bytes.extend(OptionReply::new(OPT_SET_META_CONTEXT, REP_META_CONTEXT, 19).as_bytes());
        bytes.extend([0, 0, 0, 1].iter().chain(BASE_ALLOCATION.as_bytes()).take(19));
        bytes.extend(OptionReply::new(OPT_SET_META_CONTEXT, REP_ACK, 0).as_bytes());
        bytes.extend(OptionReply::new(OPT_GO, REP_INFO, 12).as_bytes());
        bytes.extend(InfoExport { kind: INFO_EXPORT.into(), size: (1 << 20).into(), flags }.as_bytes());
        bytes.extend(OptionReply::new(OPT_GO, REP_ACK, 0).as_bytes());
    } else {
        bytes.extend(OptionReply::new(OPT_STRUCTURED_REPLY, REP_ERR_UNSUP, 0).as_bytes());
        bytes.extend(OptionReply::new(OPT_GO, REP_ERR_UNSUP, 0).as_bytes());
        bytes.extend(ExportReply { size: (1 << 20).into(), flags }.as_bytes());
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn whatever_a_server_says_nothing_breaks(
        structured: bool,
        chunks in proptest::collection::vec((0..8_u16, any::<bool>(), 1..4_u64, 0..6000_u32, any::<u8>()), 0..8),
        flip in proptest::option::of((0..4000_usize, 1..255_u8)),
    ) {
        let mut bytes = greeting(structured);
        for (kind, done, cookie, len, fill) in chunks {
            let kind = match kind { 6 => CHUNK_ERROR, 7 => CHUNK_ERROR_OFFSET, kind => kind };
            if structured {
                bytes.extend(ChunkHeader::new(cookie, kind, done, len).as_bytes());
                bytes.extend(vec![fill % 3; len as usize]);
            } else {
                bytes.extend(SimpleReply::new(cookie, u32::from(fill % 7 == 6) * 5).as_bytes());
                bytes.extend(vec![fill; 4096]);
            }
        }
        if let Some((at, with)) = flip {
            let at = at % bytes.len();
            bytes[at] ^= with;
        }
        against_garbage(bytes);
    }
}
