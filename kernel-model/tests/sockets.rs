//! What the socket model promises beyond what every kernel does: bounds, and the state that a death leaves.

use kernel_model::{Kernel, Process, ProcessStream, Storage, StorageConfig};
use sim::{Config, Sim};
use tap_host::{Errno, IoBuf, Listener, SendList, SocketAddress, Sockets, Stream, Tasks};

fn world<F: Future<Output = ()> + 'static>(
    seed: u64,
    faults: bool,
    body: impl FnOnce(Sim, Process, Process) -> F,
) {
    let sim = Sim::new(&Config { faults, ..Config::new(seed) });
    let kernel = Kernel::new(&sim, &Storage::new(&sim, StorageConfig::default()));
    let body = body(sim.clone(), kernel.process("server", 0), kernel.process("client", 0));
    sim.run(body).unwrap();
}

fn path() -> SocketAddress {
    SocketAddress::Unix("/run/s".into())
}

/// A connection: the server's end and the client's.
async fn pair(server: &Process, client: &Process) -> (ProcessStream, ProcessStream) {
    let listener = server.listen(&path()).await.unwrap();
    let far = client.connect(&path()).await.unwrap();
    (listener.accept().await.unwrap(), far)
}

/// Sends once; returns the number of bytes sent.
async fn send(stream: &ProcessStream, bytes: &[u8]) -> Result<usize, Errno> {
    let mut list = SendList::new();
    list.push_bytes(bytes);
    let (result, rest) = stream.send(list).await;
    result.map(|()| bytes.len() - rest.len())
}

/// Receives to the end; returns the bytes, and how the stream ended.
async fn drain(stream: &ProcessStream) -> (Vec<u8>, Result<(), Errno>) {
    let mut all = Vec::new();
    loop {
        match stream.recv(IoBuf::unpooled(1000).unwrap(), 0).await {
            (Ok(0), _) => return (all, Ok(())),
            (Ok(n), buf) => all.extend_from_slice(&buf[..n]),
            (Err(error), _) => return (all, Err(error)),
        }
    }
}

#[test]
fn bytes_arrive_whole_and_in_order_however_they_are_cut() {
    for seed in 0..50 {
        world(seed, true, |_, server, client| async move {
            let (near, far) = pair(&server, &client).await;
            let bytes: Vec<u8> = (0..20_000_u32).map(|i| (i / 3) as u8).collect();
            let all = bytes.clone();
            client.spawn("sends", 0, async move {
                let mut at = 0;
                while at < all.len() {
                    at += send(&far, &all[at..]).await.unwrap();
                }
                far.shutdown();
            });
            assert_eq!(drain(&near).await, (bytes, Ok(())), "seed {seed}");
        });
    }
}

#[test]
fn a_buffer_is_bounded_and_makes_room_when_read() {
    world(1, false, |sim, server, client| async move {
        let (near, far) = pair(&server, &client).await;
        let bytes = vec![7; 1 << 20];
        let taken = send(&far, &bytes).await.unwrap();
        assert_eq!(taken, 208 << 10);
        client.spawn("sends", 0, async move {
            assert_eq!(send(&far, &bytes[..1000]).await, Ok(600), "as much as there is room for");
        });
        sim.sleep_ns(1_000_000).await;
        let (got, _) = near.recv(IoBuf::unpooled(600).unwrap(), 0).await;
        assert_eq!(got, Ok(600));
        sim.yield_now().await;
        assert_eq!(drain(&near).await.0.len(), taken);
    });
}

#[test]
fn death_is_an_end_or_a_reset() {
    let mut resets = 0;
    for seed in 0..40 {
        let kept = std::rc::Rc::new(std::cell::Cell::new(false));
        let out = std::rc::Rc::clone(&kept);
        world(seed, true, move |_, server, client| async move {
            let (near, far) = pair(&server, &client).await;
            let sent = send(&far, b"last words").await.unwrap();
            client.node().kill();
            client.node().dead().await;
            let (bytes, end) = drain(&near).await;
            match end {
                Ok(()) => assert_eq!(bytes, b"last words"[..sent]),
                Err(error) => assert_eq!((error, bytes.len()), (Errno::ECONNRESET, 0)),
            }
            assert_eq!(send(&near, b"hello?").await, Err(Errno::EPIPE));
            out.set(end.is_err());
        });
        resets += u32::from(kept.get());
    }
    assert!((1..40).contains(&resets), "{resets} resets of 40");
}

#[test]
fn unread_bytes_reset_the_sender() {
    world(1, false, |_, server, client| async move {
        let (near, far) = pair(&server, &client).await;
        send(&far, b"nobody reads this").await.unwrap();
        near.shutdown();
        assert_eq!(drain(&far).await, (vec![], Err(Errno::ECONNRESET)));
        assert_eq!(drain(&near).await, (vec![], Ok(())), "the stream just ends at this side");
    });
}

#[test]
fn a_path_outlives_its_listener_and_is_taken_over() {
    world(1, false, |_, server, client| async move {
        assert_eq!(client.connect(&path()).await.err(), Some(Errno::ENOENT));
        let listener = server.listen(&path()).await.unwrap();
        assert_eq!(client.listen(&path()).await.err(), Some(Errno::EADDRINUSE));
        server.node().kill();
        server.node().dead().await;
        drop(listener);
        assert_eq!(client.connect(&path()).await.err(), Some(Errno::ECONNREFUSED));
        let again = client.listen(&path()).await.unwrap();
        assert!(client.connect(&path()).await.is_ok());
        drop(again);
        assert_eq!(client.connect(&path()).await.err(), Some(Errno::ENOENT), "it removes its path");
    });
}

#[test]
fn a_finished_sender_still_receives() {
    world(1, false, |_, server, client| async move {
        let (near, far) = pair(&server, &client).await;
        send(&far, b"a").await.unwrap();
        far.finish();
        assert_eq!(send(&far, b"b").await, Err(Errno::EPIPE));
        assert_eq!(drain(&near).await, (b"a".to_vec(), Ok(())));
        send(&near, b"answer").await.unwrap();
        near.shutdown();
        assert_eq!(drain(&far).await, (b"answer".to_vec(), Ok(())));
    });
}
