//! Tests of what differs between the kinds of link.
//!
//! A socket that preserves message boundaries stands in for the kernel's device: each write is a message, as for the
//! device.

use super::link::Link;
use super::*;
use crate::watch::watch;
use crate::{Options, run};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, recv, send, shutdown, socketpair,
    sockopt,
};
use std::cell::Cell;
use std::future::poll_fn;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use tap_abi::xenstore::{MessageHeader, PAYLOAD_BYTES_MAX};
use tap_host::Time;
use tokio::io::Interest;

/// Runs `program` on a client of a device that `kernel` simulates on a thread of its own.
fn with<R, F>(kernel: impl FnOnce(&Kernel) + Send + 'static, program: impl FnOnce(StoreClient) -> F) -> R
where
    R: 'static,
    F: Future<Output = R> + 'static,
{
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    rustix::io::ioctl_fionbio(&ours, true).unwrap();
    let kernel: JoinHandle<Kernel> = std::thread::spawn(|| {
        let device = Kernel(theirs);
        kernel(&device);
        device
    });
    let result = run(&Options::default(), |host| {
        let store = StoreClient::over(&host, Link::device(ours).unwrap(), "the test's device");
        program(store)
    });
    // Not before: what was sent is lost once the other end is closed.
    drop(kernel.join().unwrap());
    result.unwrap()
}

struct Kernel(OwnedFd);

impl Kernel {
    /// The next write, which has to be a whole message.
    fn take(&self) -> (MessageHeader, Vec<u8>) {
        let mut packet = vec![0; 2 * PAYLOAD_BYTES_MAX];
        let (count, _) = recv(&self.0, packet.as_mut_slice(), RecvFlags::empty()).unwrap();
        packet.truncate(count);
        let (header, payload) = packet.split_first_chunk().expect("a header in the first piece");
        let header = MessageHeader::parse(header).unwrap();
        assert_eq!(payload.len(), header.payload_bytes(), "a write is a message");
        (header, payload.to_vec())
    }

    fn send(&self, kind: MessageKind, request: u32, payload: &[u8]) {
        let header = MessageHeader::new(kind, request, 0, payload.len());
        // In pieces, as the device delivers them.
        for piece in [&header.to_bytes()[..], payload] {
            assert_eq!(send(&self.0, piece, SendFlags::empty()), Ok(piece.len()));
        }
    }
}

#[test]
fn each_message_is_one_write() {
    let kernel = |kernel: &Kernel| {
        for _ in 0..100 {
            let (header, payload) = kernel.take();
            assert_eq!(header.kind(), Ok(MessageKind::Read));
            kernel.send(MessageKind::Read, header.request(), &payload);
        }
    };
    with(kernel, |store| async move {
        for i in 0..100 {
            let path = format!("/{}", "x".repeat(i * 30));
            assert_eq!(store.read(&path).await, Ok([path.as_bytes(), b"\0"].concat()));
        }
    });
}

#[test]
fn the_device_has_one_request_at_a_time() {
    let kernel = |kernel: &Kernel| {
        for kind in [MessageKind::Read, MessageKind::TransactionStart, MessageKind::Watch] {
            let (header, _) = kernel.take();
            assert_eq!(header.kind(), Ok(kind));
            // An event is not an answer, so it does not release the next request.
            kernel.send(MessageKind::WatchEvent, header.request(), b"/a\x001\0");
            std::thread::sleep(std::time::Duration::from_millis(20));
            let mut packet = [0; 1];
            let more = recv(&kernel.0, &mut packet, RecvFlags::PEEK | RecvFlags::DONTWAIT);
            assert_eq!(more.err(), Some(rustix::io::Errno::AGAIN), "{kind:?} was not answered yet");
            kernel.send(kind, header.request(), b"7\0");
        }
        // What the two dropped requests had begun is released, still one by one.
        let rest = [MessageKind::Unwatch, MessageKind::Read, MessageKind::TransactionEnd, MessageKind::Read];
        for kind in rest {
            let (header, _) = kernel.take();
            kernel.send(header.kind().unwrap(), header.request(), b"OK\0");
            assert_eq!(header.kind(), Ok(kind));
        }
    };
    with(kernel, |store| async move {
        let mut read = Box::pin(store.read("/a"));
        let mut transaction = Box::pin(store.transaction());
        let mut watch = Box::pin(store.watch("/a"));
        poll_fn(|cx| {
            assert!(read.as_mut().poll(cx).is_pending());
            assert!(transaction.as_mut().poll(cx).is_pending());
            assert!(watch.as_mut().poll(cx).is_pending());
            Poll::Ready(())
        })
        .await;
        drop((transaction, watch));
        assert_eq!(read.await, Ok(b"7\0".to_vec()));
        for _ in 0..2 {
            assert_eq!(store.read("/b").await, Ok(b"OK\0".to_vec()));
        }
    });
}

#[test]
fn a_message_has_a_page_with_its_header() {
    let kernel = |kernel: &Kernel| {
        let (header, payload) = kernel.take();
        assert_eq!(payload.len(), 4080);
        kernel.send(MessageKind::Write, header.request(), b"OK\0");
    };
    with(kernel, |store| async move {
        assert_eq!(store.write("/a", &[7; 4078]).await, Err(Errno::ENOSPC));
        assert_eq!(store.write("/a", &[7; 4077]).await, Ok(()));
    });
}

#[test]
fn a_refused_write_is_one_requests_failure() {
    let kernel = |kernel: &Kernel| {
        let (header, _) = kernel.take();
        // From now on every write to the device fails, while what it sends still arrives.
        shutdown(&kernel.0, Shutdown::Read).unwrap();
        kernel.send(MessageKind::Watch, header.request(), b"OK\0");
        kernel.send(MessageKind::WatchEvent, 0, b"/a/b\x001\0");
    };
    with(kernel, |store| async move {
        let watcher = store.watch("/a").await.unwrap();
        assert_eq!(store.read("/a").await, Err(Errno::EPIPE));
        assert_eq!(store.watch("/a").await.err(), Some(Errno::EPIPE));
        assert_eq!(watcher.next().await, Ok(WatchEvent { path: "/a/b".into() }));
    });
}

#[test]
fn a_socket_may_take_a_part() {
    const MESSAGES: usize = 50;
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    // The kernel's minimum. A message of the largest size is sent in two pieces, and the second one has to wait while
    // the first is still queued.
    sockopt::set_socket_send_buffer_size(&ours, 1).unwrap();
    let (full, is_full) = std::sync::mpsc::channel();
    let server = std::thread::spawn(move || {
        is_full.recv().unwrap();
        for i in 0..MESSAGES {
            let mut header = [0; MessageHeader::BYTES];
            theirs.read_exact(&mut header).unwrap();
            let header = MessageHeader::parse(&header).unwrap();
            let mut payload = vec![0; header.payload_bytes()];
            theirs.read_exact(&mut payload).unwrap();
            let answer = MessageHeader::new(MessageKind::Write, header.request(), 0, 3).to_bytes();
            theirs.write_all(&[&answer[..], b"OK\0"].concat()).unwrap();
            let value = payload.strip_prefix(b"/a\0").expect("the path first");
            assert_eq!(value.len(), i % 2 * 4000);
            assert!(value.iter().enumerate().all(|(at, byte)| *byte == at as u8));
        }
        theirs
    });
    let program = |host: LinuxHost| async move {
        let link = Link::Socket(watch(ours.into(), Interest::READABLE | Interest::WRITABLE).unwrap());
        let store = StoreClient::over(&host, link, "the test's socket");
        let left = Rc::new(Cell::new(MESSAGES));
        for i in 0..MESSAGES {
            let (store, left) = (store.clone(), Rc::clone(&left));
            host.spawn("writer", i as u64, async move {
                let value: Vec<u8> = (0..=255).cycle().take(i % 2 * 4000).collect();
                assert_eq!(store.write("/a", &value).await, Ok(()));
                left.set(left.get() - 1);
            });
        }
        // The writers get their turn, and then the driver.
        host.yield_now().await;
        host.yield_now().await;
        full.send(()).unwrap();
        while left.get() > 0 {
            host.sleep_ns(1_000_000).await;
        }
    };
    run(&Options::default(), program).unwrap();
    drop(server.join().unwrap());
}
