//! The client against our server, against servers with fewer features, and against servers that die, lie or change.

mod common;

use common::asking::*;
use common::{Disk, World, address, export, marked, world};
use kernel_model::{Process, ProcessStream};
use std::rc::Rc;
use tap_abi::nbd::*;
use tap_core::{CacheMode, Node, Op, Request, ZeroFlags};
use tap_host::{Errno, Listener, SectorRange, Sockets, bytes_of, copy_from_slice, copy_to_slice};
use tap_nbd::{Breaks, Client, ClientConfig, ClientError, Export, ServerLimits};
use zerocopy::{FromBytes, IntoBytes};

const MIB: usize = 1 << 20;

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
fn holes_arrive_as_zeros() {
    world(1, false, |w| async move {
        let disk = Disk::new(MIB);
        disk.bytes.borrow_mut()[1 << 16] = 5;
        w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
        let client = Client::connect(w.process("client"), config()).await.unwrap();
        for (start, len, holes) in [(0, 1 << 16, 1), (0, MIB, 1), (136, 9 << 10, 2)] {
            let lens = [512, len - 1024, 512];
            let response = client.submit(Request::read(range(start, len), bufs(&lens, 0xee))).await;
            assert_eq!(response.result, Ok(()));
            assert!(joined(&response.bufs) == disk.bytes.borrow()[start as usize * 512..][..len]);
            assert_eq!(marked(&w.kernel, "nbd-hole-sent"), holes, "{len} bytes at sector {start}");
        }
    });
}

#[test]
fn everything_comes_through() {
    world(1, false, |w| everything(w, ServerLimits::default()));
    let small = ServerLimits { request_bytes: 4096, requests: 2, ..ServerLimits::LEAST };
    world(1, false, |w| async move {
        everything(w.clone(), small).await;
        assert!(marked(&w.kernel, "nbd-split") >= 2);
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
            let cache = if write_through { CacheMode::WriteThrough } else { CacheMode::WriteBack };
            let client = Client::connect(w.process("client"), config()).await.unwrap();
            let client = cache.over(Rc::new(client));
            write(&*client, 0, 3 * MIB, 7).await.unwrap();
            let zeroes = |fast| Request::write_zeroes(range(1, 2 * MIB), ZeroFlags { unmap: true, fast });
            assert_eq!(client.submit(zeroes(true)).await.result, Err(Errno::EOPNOTSUPP));
            assert_eq!(client.submit(zeroes(false)).await.result, Ok(()));
            assert_eq!(client.submit(Request::discard(range(0, 512))).await.result, Ok(()));
            let bytes = read(&*client, 0, 3 * MIB).await.unwrap();
            assert!(bytes[..512] == [7; 512] && bytes[512..512 + 2 * MIB].iter().all(|b| *b == 0));
            assert!(bytes[512 + 2 * MIB..].iter().all(|b| *b == 7));
            assert!(client.extents(range(0, 4 * MIB), 1024).await.unwrap()[0].allocated);
            assert_eq!(flush(&*client).await, Ok(()));
            // One for each write if writes must be durable, and the one that was requested.
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
            assert_eq!(marked(&w.kernel, "nbd-server-back"), 1);
            assert!(marked(&w.kernel, "nbd-resent") >= in_flight as u64);
        });
    }
}

/// A write, perhaps a flush, then the server dies and comes back; the results of two flushes after that.
fn flushes_after_a_break(
    config: ClientConfig,
    cache: CacheMode,
    flush_before: bool,
) -> [Result<(), Errno>; 2] {
    let results = Rc::new(std::cell::Cell::new(None));
    let out = Rc::clone(&results);
    world(1, false, move |w| async move {
        let disk = Disk::new(MIB);
        let (process, _) = w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
        let client = Client::connect(w.process("client"), config).await.unwrap();
        let client = cache.over(Rc::new(client));
        write(&*client, 0, 4096, 1).await.unwrap();
        if flush_before {
            flush(&*client).await.unwrap();
        }
        process.node().kill();
        process.node().dead().await;
        w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
        w.sim.sleep_ns(100_000_000).await;
        write(&*client, 8, 4096, 1).await.unwrap();
        out.set(Some([flush(&*client).await, flush(&*client).await]));
    });
    results.take().unwrap()
}

#[test]
fn a_flush_promises_nothing_that_a_dead_server_may_have_lost() {
    let keep = ClientConfig { breaks: Breaks::Keep, ..config() };
    let (back, through) = (CacheMode::WriteBack, CacheMode::WriteThrough);
    assert_eq!(flushes_after_a_break(config(), back, false), [Err(Errno::EIO); 2]);
    assert_eq!(flushes_after_a_break(config(), back, true), [Ok(()); 2]);
    assert_eq!(flushes_after_a_break(keep, back, false), [Ok(()); 2]);
    assert_eq!(flushes_after_a_break(config(), through, false), [Ok(()); 2]);
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
        assert_eq!(write(&client, 0, 512, 2).await, Err(Errno::ENOTCONN));
        let waited = w.sim.now_ns() - before;
        assert!((500_000_000..520_000_000).contains(&waited), "{waited}");
        assert_eq!(read(&client, 0, 512).await, Err(Errno::ENOTCONN));
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
            let other = if change == 0 { Disk::new(MIB / 2) } else { Disk::new(MIB) };
            other.read_only.set(change == 1);
            let request_bytes = if change == 2 { 4096 } else { 32 << 20 };
            let limits = ServerLimits { request_bytes, ..ServerLimits::default() };
            w.serve(vec![export("disk", &other)], limits).await;
            assert_eq!(read(&client, 0, 512).await, Err(Errno::ENOTCONN));
            w.sim.sleep_ns(1_000_000_000).await;
            assert_eq!(write(&client, 0, 512, 1).await, Err(Errno::ENOTCONN));
            assert!(other.seen.borrow().is_empty());
            assert_eq!(client.close().await, Ok(()));
        });
    }
}

/// It has grown: users of the client keep the size that they were told.
#[test]
fn a_larger_disk_in_its_place_is_taken() {
    world(1, false, |w| async move {
        let disk = Disk::new(MIB);
        let (process, _) = w.serve(vec![export("disk", &disk)], ServerLimits::default()).await;
        let client = Client::connect(w.process("client"), config()).await.unwrap();
        let sectors = client.info().size_sectors;
        process.node().kill();
        process.node().dead().await;
        let larger = Disk::new(2 * MIB);
        w.serve(vec![export("disk", &larger)], ServerLimits::default()).await;
        assert_eq!(write(&client, 0, 512, 1).await, Ok(()));
        assert_eq!(read(&client, 0, 512).await.unwrap(), [1; 512]);
        assert_eq!(client.info().size_sectors, sectors);
        assert!(!larger.seen.borrow().is_empty());
        client.close().await.unwrap();
    });
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

/// No task is left that tries to reach a server that is away.
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
