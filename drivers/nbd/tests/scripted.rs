//! The client against servers that send what a test tells them to.

mod common;

use common::asking::*;
use common::{World, address, world};
use proptest::prelude::*;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_abi::nbd::*;
use tap_core::Node;
use tap_host::{Errno, IoBuf, Listener, SendList, Sockets, Stream, Time};
use tap_nbd::{Client, ClientConfig};
use zerocopy::IntoBytes;

/// Sends `bytes` to every client that connects.
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

/// A server that answers the first request of each connection with `answer` for the number of the connection. Returns
/// how many connections there were.
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
            // The request has arrived by then.
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

/// More status chunks than were asked for would use memory without limit: the connection breaks, and the request goes
/// to the next one.
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

/// No more than was asked for, nothing past the range, and nothing past a piece that ends within a sector.
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

/// A server's error message is for people: the next reply follows it.
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

/// An error that arrived before the connection broke does not hold for the next connection.
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

/// It has not done the request, and its successor will.
#[test]
fn a_request_that_a_server_refuses_because_it_ends_is_repeated() {
    for structured in [false, true] {
        world(1, false, |w| async move {
            let answer = move |number| {
                let head = ErrorHead { error: error::ESHUTDOWN.into(), message_len: 0.into() };
                let failed = ChunkHeader::new(1, CHUNK_ERROR, true, ErrorHead::BYTES as u32);
                match number {
                    1 if structured => [failed.as_bytes(), head.as_bytes()].concat(),
                    1 => SimpleReply::new(1, error::ESHUTDOWN).as_bytes().to_vec(),
                    _ => SimpleReply::new(1, 0).as_bytes().to_vec(),
                }
            };
            let connections = answers(&w, answer, move |_| greeting(structured)).await;
            let client = Client::connect(w.process("client"), config()).await.unwrap();
            assert_eq!((flush(&client).await, connections.get()), (Ok(()), 2));
        });
    }
}

/// One that refuses and stays would be asked for ever.
#[test]
fn a_request_that_servers_keep_refusing_because_they_end_fails() {
    world(1, false, |w| async move {
        let refused = |_| SimpleReply::new(1, error::ESHUTDOWN).as_bytes().to_vec();
        let connections = answers(&w, refused, |_| greeting(false)).await;
        let client = Client::connect(w.process("client"), config()).await.unwrap();
        assert_eq!((flush(&client).await, connections.get()), (Err(Errno::ESHUTDOWN), 2));
        assert_eq!(client.in_flight(), 0);
    });
}

/// Some servers end a connection when the stream ends, not when they get a disconnect.
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

/// A server that can do less than before is a different one: requests made for the first cannot go to it.
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
            assert_eq!(flush(&client).await, Err(Errno::ENOTCONN));
            assert_eq!(connections.get(), 2);
        });
    }
}

/// As [`greeting`] with everything except `base:allocation`.
fn without_context() -> Vec<u8> {
    let mut bytes = Hello::new(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).as_bytes().to_vec();
    let flags = (export::HAS_FLAGS | export::SEND_FLUSH).into();
    bytes.extend(OptionReply::new(OPT_EXTENDED_HEADERS, REP_ERR_UNSUP, 0).as_bytes());
    bytes.extend(OptionReply::new(OPT_STRUCTURED_REPLY, REP_ACK, 0).as_bytes());
    bytes.extend(OptionReply::new(OPT_SET_META_CONTEXT, REP_ACK, 0).as_bytes());
    bytes.extend(OptionReply::new(OPT_GO, REP_INFO, 12).as_bytes());
    bytes.extend(InfoExport { kind: INFO_EXPORT.into(), size: (1 << 20).into(), flags }.as_bytes());
    bytes.extend(OptionReply::new(OPT_GO, REP_ACK, 0).as_bytes());
    bytes
}

/// What a server sends up to the first request: it knows only `EXPORT_NAME`, or everything but extended headers.
fn greeting(structured: bool) -> Vec<u8> {
    let mut bytes = Hello::new(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).as_bytes().to_vec();
    bytes.extend(OptionReply::new(OPT_EXTENDED_HEADERS, REP_ERR_UNSUP, 0).as_bytes());
    if structured {
        bytes.extend(OptionReply::new(OPT_STRUCTURED_REPLY, REP_ACK, 0).as_bytes());
        bytes.extend(choice(1 << 20));
    } else {
        bytes.extend(OptionReply::new(OPT_STRUCTURED_REPLY, REP_ERR_UNSUP, 0).as_bytes());
        bytes.extend(OptionReply::new(OPT_GO, REP_ERR_UNSUP, 0).as_bytes());
        let flags = (export::HAS_FLAGS | export::SEND_FLUSH).into();
        bytes.extend(ExportReply { size: (1 << 20).into(), flags }.as_bytes());
    }
    bytes
}

/// As [`greeting`] with extended headers, and a large disk.
fn extended_greeting() -> Vec<u8> {
    let mut bytes = Hello::new(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).as_bytes().to_vec();
    bytes.extend(OptionReply::new(OPT_EXTENDED_HEADERS, REP_ACK, 0).as_bytes());
    bytes.extend(choice(1 << 45));
    bytes
}

/// The context and the export.
fn choice(size_bytes: u64) -> Vec<u8> {
    let flags = (export::HAS_FLAGS | export::SEND_FLUSH).into();
    let mut bytes = OptionReply::new(OPT_SET_META_CONTEXT, REP_META_CONTEXT, 19).as_bytes().to_vec();
    bytes.extend([0, 0, 0, 1].iter().chain(BASE_ALLOCATION.as_bytes()).take(19));
    bytes.extend(OptionReply::new(OPT_SET_META_CONTEXT, REP_ACK, 0).as_bytes());
    bytes.extend(OptionReply::new(OPT_GO, REP_INFO, 12).as_bytes());
    bytes.extend(InfoExport { kind: INFO_EXPORT.into(), size: size_bytes.into(), flags }.as_bytes());
    bytes.extend(OptionReply::new(OPT_GO, REP_ACK, 0).as_bytes());
    bytes
}

/// An extended status chunk in the reply to a request at `at`, with `count` in its head and these extents.
fn long_status(at: u64, count: u32, lens: &[u64]) -> Vec<u8> {
    let len = StatusHead::BYTES + lens.len() * LongExtent::BYTES;
    let head = ExtendedChunk::new(1, at, CHUNK_BLOCK_STATUS_EXT, true, len as u64);
    let mut bytes = head.as_bytes().to_vec();
    bytes.extend(StatusHead { context: 1.into(), count: count.into() }.as_bytes());
    for len in lens {
        bytes.extend(
            LongExtent { len: (*len).into(), state: u64::from(STATE_HOLE | STATE_ZERO).into() }.as_bytes(),
        );
    }
    bytes
}

#[test]
fn an_extended_status_has_lengths_of_64_bits_and_must_fit_its_request() {
    for (first, connections) in [
        (long_status(4096, 1, &[1 << 40]), 1),
        (long_status(4096, 2, &[1 << 33, u64::MAX]), 1),
        // Each of these breaks the connection, and the next one is believed.
        (long_status(512, 1, &[1 << 40]), 2),
        (long_status(4096, 3, &[1 << 40]), 2),
        (long_status(4096, 0, &[]), 2),
        (status(true, &[1 << 30]), 2),
        (SimpleReply::new(1, 0).as_bytes().to_vec(), 2),
    ] {
        world(1, false, move |w| async move {
            let answer = move |number| match number {
                1 => first.clone(),
                _ => long_status(4096, 1, &[1 << 41]),
            };
            let made = answers(&w, answer, |_| extended_greeting()).await;
            let client = Client::connect(w.process("client"), config()).await.unwrap();
            let extents = client.extents(tap_host::SectorRange::new(8, 1 << 31), 1024).await.unwrap();
            assert_eq!(extents.iter().map(|e| e.count).sum::<u64>(), 1 << 31);
            assert!(extents.iter().all(|e| e.zero && !e.allocated));
            assert_eq!(made.get(), connections);
        });
    }
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
