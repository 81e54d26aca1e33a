//! Stream sockets.

use crate::tasks::TaskHost;
use crate::{OrFail, Outcome, Place, Test, holds, pattern, same, same_bytes, tests};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_host::{Errno, IoBuf, Listener, SendList, SocketAddress, Sockets, Stream};

/// What bodies about sockets need from a host.
pub trait SocketHost: Sockets + TaskHost {}
impl<T: Sockets + TaskHost> SocketHost for T {}

/// All bodies.
pub fn all<H: SocketHost>() -> Vec<Test<Place<H>>> {
    tests![
        nobody_listens_where_nobody_did,
        a_closed_listener_is_gone,
        an_address_is_listened_at_once,
        the_listener_knows_its_address,
        a_private_listener_serves_its_own_user,
        bytes_are_echoed,
        a_receive_fills_a_part_of_its_buffer,
        bytes_wait_to_be_received_in_any_cut,
        a_list_is_sent_in_order,
        the_end_comes_behind_the_last_byte,
        an_aborted_stream_ends_at_both_ends,
        a_dropped_stream_ends,
        a_running_receive_ends_with_its_stream,
        who_sends_to_nobody_is_told,
        a_slow_reader_holds_its_writer_back,
        both_directions_run_at_once,
        connections_do_not_mix,
        clones_are_one_stream,
    ]
}

type Pair<H> = (<H as Sockets>::Stream, <H as Sockets>::Stream);

async fn a_private_listener_serves_its_own_user<H: SocketHost>(place: Place<H>) -> Outcome {
    let path = place.path("private");
    let listener = place.host.listen_private(&path).await.or_fail("listen")?;
    same("its address", listener.address(), SocketAddress::Unix(path.clone()))?;
    let (near, far) = between(&place, listener).await?;
    send_beside(&place, &near, b"abc".to_vec());
    same_bytes("what arrives", &receive(&far, 3, 3).await.or_fail("receive")?, b"abc")?;
    let again = place.host.listen_private(&path).await.or_fail("listen where nobody does any more")?;
    same("a second one", place.host.listen_private(&path).await.err(), Some(Errno::EADDRINUSE))?;
    drop(again);
    Ok(())
}

/// Both ends of a connection: the one that connected, and the one that accepted.
async fn pair<H: SocketHost>(place: &Place<H>) -> Result<Pair<H>, String> {
    let listener = place.host.listen(&place.address("socket")).await.or_fail("listen")?;
    between(place, listener).await
}

/// Both ends of a connection to `listener`.
async fn between<H: SocketHost>(place: &Place<H>, listener: H::Listener) -> Result<Pair<H>, String> {
    let address = listener.address();
    let accepted = Rc::new(RefCell::new(None));
    let put = Rc::clone(&accepted);
    place.host.spawn("accept", 0, async move {
        let stream = listener.accept().await;
        *put.borrow_mut() = Some(stream);
    });
    let near = place.host.connect(&address).await.or_fail("connect")?;
    loop {
        if let Some(far) = accepted.borrow_mut().take() {
            return Ok((near, far.or_fail("accept")?));
        }
        place.host.sleep_ns(1_000_000).await;
    }
}

/// Sends everything.
async fn send<S: Stream>(stream: &S, mut list: SendList) -> Result<(), Errno> {
    while !list.is_empty() {
        let before = list.len();
        let (sent, rest) = stream.send(list).await;
        sent?;
        assert!(rest.len() < before, "a send that succeeds sends something");
        list = rest;
    }
    Ok(())
}

/// Sends from a task of its own, since a connection may hold no more than a few bytes.
fn send_beside<H: SocketHost>(place: &Place<H>, stream: &H::Stream, bytes: Vec<u8>) {
    let stream = stream.clone();
    place.host.spawn("sender", bytes.len() as u64, async move {
        // The receiver notices if anything is missing.
        let _sent = send_bytes(&stream, &bytes).await;
    });
}

async fn send_bytes<S: Stream>(stream: &S, bytes: &[u8]) -> Result<(), Errno> {
    for chunk in bytes.chunks(1 << 20) {
        let mut list = SendList::new();
        list.push_buf(IoBuf::copy_of(chunk)?);
        send(stream, list).await?;
    }
    Ok(())
}

/// Receives until `len` bytes have arrived or the peer ends, at most `cut` at a time.
async fn receive<S: Stream>(stream: &S, len: usize, cut: usize) -> Result<Vec<u8>, Errno> {
    let mut bytes = Vec::new();
    let cut = cut.min(len);
    let mut buf = IoBuf::unpooled(cut)?;
    while bytes.len() < len {
        // Into the end of the buffer, so that no more arrives than is wanted.
        let from = cut - cut.min(len - bytes.len());
        let (count, back) = stream.recv(buf, from).await;
        buf = back;
        match count? {
            0 => break,
            count => bytes.extend_from_slice(&buf[from..from + count]),
        }
    }
    Ok(bytes)
}

async fn nobody_listens_where_nobody_did<H: SocketHost>(place: Place<H>) -> Outcome {
    if place.tcp {
        // A port that was free a moment ago.
        let listener = place.host.listen(&place.address("")).await.or_fail("listen")?;
        let address = listener.address();
        drop(listener);
        return same("connect", place.host.connect(&address).await.err(), Some(Errno::ECONNREFUSED));
    }
    same("connect", place.host.connect(&place.address("missing")).await.err(), Some(Errno::ENOENT))
}

async fn a_closed_listener_is_gone<H: SocketHost>(place: Place<H>) -> Outcome {
    let listener = place.host.listen(&place.address("socket")).await.or_fail("listen")?;
    let address = listener.address();
    drop(listener);
    let gone = if place.tcp { Errno::ECONNREFUSED } else { Errno::ENOENT };
    same("connect", place.host.connect(&address).await.err(), Some(gone))?;
    let listener = place.host.listen(&address).await.or_fail("listen at the same address again")?;
    same("address", listener.address(), address)
}

async fn an_address_is_listened_at_once<H: SocketHost>(place: Place<H>) -> Outcome {
    let listener = place.host.listen(&place.address("socket")).await.or_fail("listen")?;
    let second = place.host.listen(&listener.address()).await;
    same("a second listener", second.err(), Some(Errno::EADDRINUSE))?;
    let stream = place.host.connect(&listener.address()).await;
    holds("the first one still listens", stream.is_ok())
}

async fn the_listener_knows_its_address<H: SocketHost>(place: Place<H>) -> Outcome {
    let asked = place.address("socket");
    let listener = place.host.listen(&asked).await.or_fail("listen")?;
    match listener.address() {
        SocketAddress::Tcp { host, port } => {
            same("host", host.as_str(), "127.0.0.1")?;
            holds("the system chose a port", port != 0)
        }
        address => same("address", address, asked),
    }
}

async fn bytes_are_echoed<H: SocketHost>(place: Place<H>) -> Outcome {
    let (near, far) = pair(&place).await?;
    place.host.spawn("echo", 0, async move {
        while let Ok(bytes) = receive(&far, 1000, 1000).await
            && !bytes.is_empty()
            && send_bytes(&far, &bytes).await.is_ok()
        {}
    });
    for (tag, len) in [(1, 1000), (2, 20_000), (3, 3000)] {
        let bytes = pattern(tag, len);
        send_beside(&place, &near, bytes.clone());
        same_bytes("the echo", &receive(&near, len, 777).await.or_fail("receive")?, &bytes)?;
    }
    near.shutdown();
    Ok(())
}

async fn a_receive_fills_a_part_of_its_buffer<H: SocketHost>(place: Place<H>) -> Outcome {
    let (near, far) = pair(&place).await?;
    send_bytes(&near, b"abcdef").await.or_fail("send")?;
    let mut buf = IoBuf::copy_of(&[b'.'; 16]).or_fail("make a buffer")?;
    let mut have = 4;
    while have < 10 {
        let (count, back) = far.recv(buf, have).await;
        let count = count.or_fail("receive")?;
        holds("a receive returns at least one byte", count > 0)?;
        have += count;
        buf = back;
    }
    same_bytes("before the part", &buf[..4], b"....")?;
    same_bytes("the part", &buf[4..10], b"abcdef")?;
    same_bytes("after the received bytes", &buf[10..], b"......")
}

async fn bytes_wait_to_be_received_in_any_cut<H: SocketHost>(place: Place<H>) -> Outcome {
    let (near, far) = pair(&place).await?;
    let bytes = pattern(4, 5000);
    let whole = bytes.clone();
    place.host.spawn("sender", 0, async move {
        for chunk in whole.chunks(613) {
            let _sent = send_bytes(&near, chunk).await;
        }
    });
    let mut got = Vec::new();
    for cut in [1, 2, 700, 1, 4096].into_iter().cycle() {
        if got.len() >= bytes.len() {
            break;
        }
        let len = cut.min(bytes.len() - got.len());
        got.extend(receive(&far, len, cut).await.or_fail("receive")?);
    }
    same_bytes("what came", &got, &bytes)
}

async fn a_list_is_sent_in_order<H: SocketHost>(place: Place<H>) -> Outcome {
    let (near, far) = pair(&place).await?;
    let (mut list, mut want) = (SendList::new(), Vec::new());
    for i in 0..1500_usize {
        let piece = pattern(i as u8, 1 + i % 70);
        want.extend_from_slice(&piece);
        if i % 3 == 0 {
            list.push_buf(IoBuf::copy_of(&piece).or_fail("make a buffer")?);
        } else {
            list.push_bytes(&piece);
        }
    }
    list.advance(30);
    let want = &want[30..];
    let got = Rc::new(RefCell::new(None));
    let (put, len) = (Rc::clone(&got), want.len());
    place.host.spawn("receive", 0, async move {
        let bytes = receive(&far, len, 4096).await;
        *put.borrow_mut() = Some(bytes);
    });
    send(&near, list).await.or_fail("send a list")?;
    loop {
        let taken = got.borrow_mut().take();
        if let Some(bytes) = taken {
            return same_bytes("the list", &bytes.or_fail("receive")?, want);
        }
        place.host.sleep_ns(1_000_000).await;
    }
}

async fn the_end_comes_behind_the_last_byte<H: SocketHost>(place: Place<H>) -> Outcome {
    let (near, far) = pair(&place).await?;
    place.host.spawn("sender", 0, async move {
        let _sent = send_bytes(&near, &pattern(1, 3000)).await;
        near.shutdown();
        // Stays open until the other side has seen the end.
        drop(receive(&near, 1, 1).await);
    });
    same_bytes("what came", &receive(&far, 9999, 1000).await.or_fail("receive")?, &pattern(1, 3000))?;
    for _ in 0..3 {
        same("after the end", receive(&far, 1, 1).await, Ok(Vec::new()))?;
    }
    Ok(())
}

async fn an_aborted_stream_ends_at_both_ends<H: SocketHost>(place: Place<H>) -> Outcome {
    let (near, far) = pair(&place).await?;
    send_bytes(&near, &pattern(1, 64)).await.or_fail("send")?;
    same_bytes("before", &receive(&far, 64, 64).await.or_fail("receive")?, &pattern(1, 64))?;
    near.abort();
    // Either an end or an error.
    let after = receive(&far, 1, 1).await;
    holds("nothing comes afterwards", after.is_err() || after == Ok(Vec::new()))?;
    holds("nor here", !receive(&near, 1, 1).await.is_ok_and(|bytes| !bytes.is_empty()))?;
    holds("and nothing can be sent", send_bytes(&near, b"too late").await.is_err())
}

async fn a_dropped_stream_ends<H: SocketHost>(place: Place<H>) -> Outcome {
    let (near, far) = pair(&place).await?;
    send_bytes(&near, b"last words").await.or_fail("send")?;
    drop(near);
    same("what came", receive(&far, 9999, 1000).await, Ok(b"last words".to_vec()))
}

async fn a_running_receive_ends_with_its_stream<H: SocketHost>(place: Place<H>) -> Outcome {
    let (near, far) = pair(&place).await?;
    let ended = Rc::new(Cell::new(0));
    for stream in [near.clone(), far] {
        let ended = Rc::clone(&ended);
        place.host.spawn("receive", 0, async move {
            // At both ends, either an end or an error.
            if !receive(&stream, 1, 1).await.is_ok_and(|bytes| !bytes.is_empty()) {
                ended.set(ended.get() + 1);
            }
        });
    }
    place.host.sleep_ns(1_000_000).await;
    same("receives that ended before", ended.get(), 0)?;
    near.shutdown();
    while ended.get() < 2 {
        place.host.sleep_ns(1_000_000).await;
    }
    let mut list = SendList::new();
    list.push_bytes(b"too late");
    same("send", near.send(list).await.0, Err(Errno::EPIPE))
}

async fn who_sends_to_nobody_is_told<H: SocketHost>(place: Place<H>) -> Outcome {
    let (near, far) = pair(&place).await?;
    drop(far);
    // TCP learns this from the reply to its first segment.
    let mut ended = Ok(());
    while ended.is_ok() {
        ended = send_bytes(&near, b"is anybody there?").await;
        place.host.sleep_ns(1_000_000).await;
    }
    holds("the error says so", matches!(ended, Err(Errno::EPIPE | Errno::ECONNRESET)))
}

async fn a_slow_reader_holds_its_writer_back<H: SocketHost>(place: Place<H>) -> Outcome {
    // More than any system keeps for a connection.
    const LEN: usize = 48 << 20;
    let (near, far) = pair(&place).await?;
    let sent = Rc::new(Cell::new(0));
    let ended = Rc::new(Cell::new(None));
    let (count, end) = (Rc::clone(&sent), Rc::clone(&ended));
    place.host.spawn("writer", 0, async move {
        let bytes = pattern(6, 1 << 20);
        while count.get() < LEN && end.get().is_none() {
            match send_bytes(&near, &bytes).await {
                Ok(()) => count.set(count.get() + bytes.len()),
                Err(error) => end.set(Some(error)),
            }
        }
    });
    for _ in 0..20 {
        place.host.sleep_ns(1_000_000).await;
    }
    let want = pattern(6, 1 << 20);
    same_bytes("a part", &receive(&far, 1 << 20, 100_000).await.or_fail("receive")?, &want)?;
    holds("memory between two ends is bounded", sent.get() < LEN)?;
    drop(far);
    while ended.get().is_none() {
        place.host.sleep_ns(1_000_000).await;
    }
    holds("a blocked writer sees the end", sent.get() < LEN)
}

async fn both_directions_run_at_once<H: SocketHost>(place: Place<H>) -> Outcome {
    const LEN: usize = 1 << 20;
    let (near, far) = pair(&place).await?;
    let done = Rc::new(Cell::new(0));
    for (stream, tag) in [(near.clone(), 1), (far.clone(), 2)] {
        let done = Rc::clone(&done);
        place.host.spawn("writer", u64::from(tag), async move {
            if send_bytes(&stream, &pattern(tag, LEN)).await.is_ok() {
                done.set(done.get() + 1);
            }
        });
    }
    for (stream, tag) in [(near, 2), (far, 1)] {
        let done = Rc::clone(&done);
        place.host.spawn("reader", u64::from(tag), async move {
            if receive(&stream, LEN, 1 << 20).await == Ok(pattern(tag, LEN)) {
                done.set(done.get() + 1);
            }
        });
    }
    while done.get() < 4 {
        place.host.sleep_ns(1_000_000).await;
    }
    Ok(())
}

async fn connections_do_not_mix<H: SocketHost>(place: Place<H>) -> Outcome {
    let listener = place.host.listen(&place.address("socket")).await.or_fail("listen")?;
    let address = listener.address();
    let host = place.host.clone();
    place.host.spawn("accept", 0, async move {
        while let Ok(stream) = listener.accept().await {
            host.spawn("echo", 0, async move {
                while let Ok(bytes) = receive(&stream, 100, 100).await
                    && !bytes.is_empty()
                    && send_bytes(&stream, &bytes).await.is_ok()
                {}
            });
        }
    });
    let mut streams = Vec::new();
    for _ in 0..20 {
        streams.push(place.host.connect(&address).await.or_fail("connect")?);
    }
    for (tag, stream) in streams.iter().enumerate() {
        send_beside(&place, stream, pattern(tag as u8, 500));
    }
    for (tag, stream) in streams.iter().enumerate().rev() {
        let echo = receive(stream, 500, 500).await.or_fail("receive")?;
        same_bytes("the echo of the own bytes", &echo, &pattern(tag as u8, 500))?;
    }
    Ok(())
}

async fn clones_are_one_stream<H: SocketHost>(place: Place<H>) -> Outcome {
    let (near, far) = pair(&place).await?;
    let clone = near.clone();
    send_bytes(&near, b"one ").await.or_fail("send")?;
    drop(near);
    send_bytes(&clone, b"two").await.or_fail("send on the clone")?;
    drop(clone);
    same("what came", receive(&far, 100, 100).await, Ok(b"one two".to_vec()))
}
