//! Tests specific to the real host, in addition to the conformance suite.

use std::cell::RefCell;
use std::rc::Rc;
use tap_host::{
    BufPool, Entropy, Errno, File, Files, IoBuf, IoVec, Listener, LockKind, OpenMode, SendList,
    SocketAddress, Sockets, Stream, Tasks, Time,
};
use tap_linux::{AioEngine, LinuxHost, Options, run};

fn one(byte: u8, len: usize) -> IoVec {
    let mut buf = IoBuf::unpooled(len).unwrap();
    buf.fill(byte);
    IoVec::from_iter([buf])
}

fn with<R: 'static, F: Future<Output = R> + 'static>(aio: AioEngine, body: impl FnOnce(LinuxHost) -> F) -> R {
    run(&Options { aio, ..Options::default() }, body).unwrap()
}

/// A path on the local file system; these tests are worth most if that is not a tmpfs.
fn path(dir: &tempfile::TempDir, name: &str) -> String {
    dir.path().join(name).to_str().unwrap().to_owned()
}

#[test]
fn many_operations_at_once_all_end_with_their_own_result() {
    for aio in [AioEngine::Threads, AioEngine::Auto] {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = path(&dir, "many");
        with(aio, |host| async move {
            let file = host.open(&path, OpenMode::CREATE).await.unwrap();
            let left = Rc::new(RefCell::new(1000));
            for i in 0..1000_u64 {
                let (file, left) = (file.clone(), Rc::clone(&left));
                host.spawn("writer", i, async move {
                    let (count, _) = file.write_at(i * 512, one(i as u8, 512)).await;
                    assert_eq!(count, Ok(512));
                    let (count, bufs) = file.read_at(i * 512, one(0, 512)).await;
                    assert_eq!(count, Ok(512));
                    assert!(bufs[0].iter().all(|b| *b == i as u8));
                    *left.borrow_mut() -= 1;
                });
            }
            while *left.borrow() > 0 {
                host.sleep_ns(1_000_000).await;
            }
            assert_eq!(file.sync_data().await, Ok(()));
            assert_eq!(file.info().await.unwrap().size_bytes, 512_000);
        });
    }
}

#[test]
fn an_operation_ends_although_its_program_does_not_wait() {
    for aio in [AioEngine::Threads, AioEngine::Auto] {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = path(&dir, "late");
        let name = path.clone();
        with(aio, |host| async move {
            let file = host.open(&name, OpenMode::CREATE).await.unwrap();
            for i in 0..600_u64 {
                let write = file.write_at(i * 4096, one(7, 4096));
                host.spawn("late", i, async move {
                    drop(write.await);
                });
            }
            host.yield_now().await;
        });
        let bytes = std::fs::read(path).unwrap();
        assert_eq!(bytes.len(), 600 * 4096);
        assert!(bytes.iter().all(|b| *b == 7));
    }
}

#[test]
#[should_panic(expected = "a task gives up")]
fn the_panic_of_a_task_is_that_of_the_program() {
    with(AioEngine::Auto, |host| async move {
        host.spawn("bad", 0, async { panic!("a task gives up") });
        std::future::pending::<()>().await;
    });
}

#[test]
fn buffers_of_a_dropped_operation_come_back_when_it_has_ended() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = path(&dir, "dropped");
    with(AioEngine::Threads, |host| async move {
        let pool = BufPool::new(1 << 20);
        let file = host.open(&path, OpenMode::CREATE).await.unwrap();
        let buf = pool.alloc_zeroed(4096).await.unwrap();
        let mut write = Box::pin(file.write_at(0, IoVec::from_iter([buf])));
        std::future::poll_fn(|cx| {
            assert!(write.as_mut().poll(cx).is_pending());
            std::task::Poll::Ready(())
        })
        .await;
        drop(write);
        assert_eq!(pool.used_bytes(), 4096, "the kernel may still read from it");
        while pool.used_bytes() > 0 {
            host.sleep_ns(1_000_000).await;
        }
        assert_eq!(file.info().await.unwrap().size_bytes, 4096);
    });
}

#[test]
fn kinds_of_files_that_cannot_hold_an_image_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = path(&dir, "fifo");
    let name = std::ffi::CString::new(fifo.as_str()).unwrap();
    // SAFETY: the name ends with a zero and lives during the call.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let folder = dir.path().to_str().unwrap().to_owned();
    with(AioEngine::Auto, |host| async move {
        for write in [false, true] {
            let mode = OpenMode { write, ..OpenMode::READ };
            assert_eq!(host.open(&fifo, mode).await.err(), Some(Errno::ENOTBLK));
            assert_eq!(host.open(&folder, mode).await.err(), Some(Errno::EISDIR));
        }
    });
}

#[test]
fn random_bytes_differ() {
    let (a, b) = with(AioEngine::Auto, |host| async move {
        let (mut a, mut b) = ([0; 32], [0; 32]);
        host.fill(&mut a);
        host.fill(&mut b);
        (a, b)
    });
    assert_ne!(a, b);
}

#[test]
fn sockets_carry_bytes_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    for address in [format!("unix:{}", path(&dir, "socket")), "tcp:localhost:0".into()] {
        let address: SocketAddress = address.parse().unwrap();
        with(AioEngine::Auto, |host| async move {
            let listener = host.listen(&address).await.unwrap();
            let at = listener.address();
            host.spawn("echo", 0, async move {
                let stream = listener.accept().await.unwrap();
                loop {
                    let (count, buf) = stream.recv(IoBuf::unpooled(100).unwrap(), 10).await;
                    let count = count.unwrap();
                    if count == 0 {
                        break;
                    }
                    let mut list = SendList::new();
                    list.push_bytes(&buf[10..10 + count]);
                    while !list.is_empty() {
                        let (sent, rest) = stream.send(list).await;
                        sent.unwrap();
                        list = rest;
                    }
                }
            });
            let stream = host.connect(&at).await.unwrap();
            let mut list = SendList::new();
            list.push_bytes(b"hello ");
            list.push_buf(IoBuf::copy_of(b"world").unwrap());
            let (sent, list) = stream.send(list).await;
            assert!(sent.is_ok() && list.is_empty());
            let mut got = Vec::new();
            while got.len() < 11 {
                let (count, buf) = stream.recv(IoBuf::unpooled(4096).unwrap(), 0).await;
                got.extend_from_slice(&buf[..count.unwrap()]);
            }
            assert_eq!(got, b"hello world");
            stream.shutdown();
        });
    }
}

#[test]
fn locks_keep_a_second_writer_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = path(&dir, "locked");
    with(AioEngine::Auto, |host| async move {
        let one = host.open(&path, OpenMode::CREATE).await.unwrap();
        let two = host.open(&path, OpenMode::WRITE).await.unwrap();
        assert_eq!(one.lock(LockKind::Shared).await, Ok(()));
        assert_eq!(two.lock(LockKind::Shared).await, Ok(()));
        assert_eq!(two.lock(LockKind::Exclusive).await, Err(Errno::EAGAIN));
        drop(one);
        assert_eq!(two.lock(LockKind::Exclusive).await, Ok(()));
    });
}

/// tokio's default number of blocking threads.
const WAITING_THREADS: usize = 512;

/// A folder whose files do not live in memory.
const ON_DISK: &str = env!("CARGO_TARGET_TMPDIR");

#[test]
fn closing_a_file_never_holds_up_the_program() {
    let dir = tempfile::tempdir_in(ON_DISK).unwrap();
    let path = path(&dir, "closed");
    let open_here = {
        let path = path.clone();
        move || {
            let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
            links.filter(|l| std::fs::read_link(l.path()).is_ok_and(|to| to.to_str() == Some(&path))).count()
        }
    };
    with(AioEngine::Auto, |host| async move {
        let file = host.open(&path, OpenMode::CREATE).await.unwrap();
        file.write_at(0, one(0, 4096)).await.0.unwrap();
        assert_eq!(file.lock(LockKind::Exclusive).await, Ok(()));
        let second = host.open(&path, OpenMode::WRITE).await.unwrap();
        // All other threads are blocked, as if they waited for storage.
        let gate = std::sync::Arc::new(std::sync::RwLock::new(()));
        let shut = gate.write().unwrap();
        for _ in 0..WAITING_THREADS {
            let gate = std::sync::Arc::clone(&gate);
            tokio::task::spawn_blocking(move || drop(gate.read().unwrap()));
        }
        assert_eq!(open_here(), 2);
        drop(file);
        assert_eq!(open_here(), 2, "it is closed where waiting is allowed");
        drop(shut);
        assert_eq!(second.lock(LockKind::Exclusive).await, Ok(()), "and its lock is waited for");
        assert_eq!(open_here(), 1);
    });
}

/// How much the peer receives of a TCP stream whose sender has filled all buffers and then ends it.
fn received_after(end: impl Fn(&tap_linux::LinuxStream) + 'static) -> (usize, usize) {
    with(AioEngine::Auto, |host| async move {
        let nearby = SocketAddress::Tcp { host: "127.0.0.1".to_owned(), port: 0 };
        let listener = host.listen(&nearby).await.unwrap();
        let near = host.connect(&listener.address()).await.unwrap();
        let far = listener.accept().await.unwrap();
        let sent = Rc::new(RefCell::new(0));
        let (sender, count) = (near.clone(), Rc::clone(&sent));
        host.spawn("sender", 0, async move {
            loop {
                let mut list = SendList::new();
                list.push_buf(IoBuf::unpooled(1 << 20).unwrap());
                while !list.is_empty() {
                    let before = list.len();
                    let (result, rest) = sender.send(list).await;
                    if result.is_err() {
                        return;
                    }
                    *count.borrow_mut() += before - rest.len();
                    list = rest;
                }
            }
        });
        // The peer does not receive, so sending stalls.
        let mut before = usize::MAX;
        while std::mem::replace(&mut before, *sent.borrow()) != *sent.borrow() || before == 0 {
            host.sleep_ns(50_000_000).await;
        }
        end(&near);
        let (mut received, mut buf) = (0, IoBuf::unpooled(1 << 20).unwrap());
        loop {
            let (result, back) = far.recv(buf, 0).await;
            buf = back;
            match result {
                Ok(0) | Err(_) => return (before, received),
                Ok(n) => received += n,
            }
        }
    })
}

#[test]
fn an_aborted_tcp_stream_sends_nothing_any_more() {
    let (sent, received) = received_after(Stream::shutdown);
    assert_eq!(received, sent, "a shutdown lets everything arrive");
    let (sent, received) = received_after(Stream::abort);
    assert!(received < sent, "{received} of {sent} bytes arrived after an abort");
}
