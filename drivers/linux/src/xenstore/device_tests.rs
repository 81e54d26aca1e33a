//! The kernel's device, played by a socket that keeps messages apart: each write is one, as for the device.

use super::link::Link;
use super::*;
use crate::{Options, run};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, recv, send, shutdown, socketpair,
};
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;
use tap_abi::xenstore::{MessageHeader, PAYLOAD_BYTES_MAX};

/// Runs `program` on a client of a device that `kernel` plays on a thread of its own.
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
        // As the device gives them: in pieces.
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
        // From now on every write to the device fails, and what it has to tell still arrives.
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
