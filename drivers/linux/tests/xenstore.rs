//! The client against a small xenstored, on a socket.

mod xenstored;

use std::cell::Cell;
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use tap_abi::xenstore::MessageKind;
use tap_host::{Errno, Tasks, Time, Transaction, WatchEvent, Watcher, Xenstore, poll_once};
use tap_linux::{LinuxHost, Options, StoreClient, StorePlaces, StoreWatcher, run};
use xenstored::{ENDS, SILENCE, STORM, State, Xenstored};

/// Runs `body` with a client of a new xenstored.
fn with<F>(body: impl FnOnce(LinuxHost, Rc<Xenstored>, StoreClient) -> F + 'static)
where
    F: Future<Output = ()> + 'static,
{
    let server = Rc::new(Xenstored::start());
    let program = |host: LinuxHost| async move {
        let store = StoreClient::open(&host, &server.place()).await.unwrap();
        body(host, server, store).await;
    };
    run(&Options::default(), program).unwrap();
}

/// Waits until xenstored's state fulfils `condition`.
async fn until(host: &LinuxHost, server: &Xenstored, condition: impl Fn(&State) -> bool) {
    while !condition(&server.state()) {
        host.sleep_ns(1_000_000).await;
    }
}

async fn next(watcher: &StoreWatcher) -> String {
    watcher.next().await.unwrap().path
}

#[test]
fn values_are_any_bytes() {
    with(|_, _, store| async move {
        let value: Vec<u8> = (0..=255).cycle().take(4096 - 5).collect();
        store.write("/a/b", &value).await.unwrap();
        assert_eq!(store.read("/a/b").await, Ok(value));
        assert_eq!(store.read("/a").await, Ok(Vec::new()));
        store.write("/a/b", b"").await.unwrap();
        assert_eq!(store.read("/a/b").await, Ok(Vec::new()));
        assert_eq!(store.read("/a/c").await, Err(Errno::ENOENT));
        assert_eq!(store.remove("/a/c").await, Ok(()), "absent below a parent");
        assert_eq!(store.remove("/x/y").await, Err(Errno::ENOENT));
        store.remove("/a").await.unwrap();
        assert_eq!(store.read("/a/b").await, Err(Errno::ENOENT));
    });
}

#[test]
fn what_no_message_can_carry_is_not_sent() {
    with(|_, server, store| async move {
        let long = format!("/{}", "a".repeat(3072));
        for bad in ["", "/a\0/b", long.as_str()] {
            assert_eq!(store.read(bad).await, Err(Errno::EINVAL));
            assert_eq!(store.write(bad, b"").await, Err(Errno::EINVAL));
            assert_eq!(store.remove(bad).await, Err(Errno::EINVAL));
            assert_eq!(store.directory(bad).await, Err(Errno::EINVAL));
            assert_eq!(store.watch(bad).await.err(), Some(Errno::EINVAL));
        }
        assert_eq!(store.write("/a", &[0; 4096 - 2]).await, Err(Errno::ENOSPC));
        assert!(server.state().asked.is_empty());
    });
}

#[test]
fn directories_are_sorted_and_may_be_large() {
    with(|_, server, store| async move {
        assert_eq!(store.directory("/").await.unwrap(), ["tool"]);
        assert!(store.directory("/tool").await.unwrap().is_empty());
        assert_eq!(store.directory("/absent").await, Err(Errno::ENOENT));
        let mut names: Vec<String> = (0..2000).map(|i| format!("name-{i:0>30}")).collect();
        for name in &names {
            server.state().tree.write(&format!("/large/{name}"), b"").unwrap();
        }
        assert_eq!(store.directory("/large").await.as_ref(), Ok(&names));
        // A directory that changes while it is read is read again.
        server.state().disturbances = 3;
        names.splice(0..0, (0..3).map(|i| format!("disturbance-{i}")));
        assert_eq!(store.directory("/large").await.as_ref(), Ok(&names));
        assert_eq!(server.state().disturbances, 0);
        // But not forever.
        server.state().disturbances = u32::MAX;
        assert_eq!(store.directory("/large").await, Err(Errno::EAGAIN));
        server.state().disturbances = 0;
        let name = "x".repeat(1000);
        for i in 0..1100 {
            server.state().tree.write(&format!("/larger/{name}{i}"), b"").unwrap();
        }
        assert_eq!(store.directory("/larger").await, Err(Errno::EOVERFLOW));
        assert!(store.read("/tool").await.is_ok());
    });
}

#[test]
fn a_transaction_happens_at_once_or_not_at_all() {
    with(|host, server, store| async move {
        let watcher = store.watch("/a").await.unwrap();
        assert_eq!(next(&watcher).await, "/a");
        let transaction = store.transaction().await.unwrap();
        transaction.write("/a/x", b"1").await.unwrap();
        transaction.write("/a/y", b"2").await.unwrap();
        transaction.remove("/a/x").await.unwrap();
        assert_eq!(transaction.read("/a/y").await, Ok(b"2".to_vec()));
        assert_eq!(transaction.read("/a/x").await, Err(Errno::ENOENT));
        assert_eq!(store.read("/a/y").await, Err(Errno::ENOENT));
        transaction.commit().await.unwrap();
        assert_eq!(store.read("/a/y").await, Ok(b"2".to_vec()));
        assert_eq!((next(&watcher).await, next(&watcher).await), ("/a/x".into(), "/a/y".into()));

        let transaction = store.transaction().await.unwrap();
        transaction.write("/a/y", b"mine").await.unwrap();
        store.write("/a/y", b"theirs").await.unwrap();
        assert_eq!(transaction.commit().await, Err(Errno::EAGAIN));
        assert_eq!(store.read("/a/y").await, Ok(b"theirs".to_vec()));

        let transaction = store.transaction().await.unwrap();
        transaction.write("/a/y", b"dropped").await.unwrap();
        drop(transaction);
        until(&host, &server, |state| state.transaction_count() == 0).await;
        assert_eq!(store.read("/a/y").await, Ok(b"theirs".to_vec()));
        let ends =
            server.state().kinds().into_iter().filter(|(kind, _)| *kind == MessageKind::TransactionEnd);
        assert_eq!(ends.map(|(_, transaction)| transaction).collect::<Vec<_>>(), [1, 2, 3], "each once");
    });
}

#[test]
fn watches_fire_for_what_others_change() {
    with(|host, server, store| async move {
        let other = StoreClient::open(&host, &server.place()).await.unwrap();
        let (top, leaf) = (store.watch("/a").await.unwrap(), store.watch("/a/b/c").await.unwrap());
        assert_eq!((next(&top).await, next(&leaf).await), ("/a".into(), "/a/b/c".into()));
        other.write("/a/b/c", b"1").await.unwrap();
        other.write("/ab", b"1").await.unwrap();
        assert_eq!((next(&top).await, next(&leaf).await), ("/a/b/c".into(), "/a/b/c".into()));
        other.remove("/a").await.unwrap();
        assert_eq!(next(&top).await, "/a");
        assert!(poll_once(leaf.next()).await.is_none());
        drop(top);
        until(&host, &server, |state| state.watch_count() == 1).await;
        // Several may wait for one watch; a dropped waiter takes no event with it.
        let mut dropped = Box::pin(leaf.next());
        assert!(poll_once(dropped.as_mut()).await.is_none());
        let mut waits = pin!(leaf.next());
        assert!(poll_once(waits.as_mut()).await.is_none());
        other.write("/a/b/c", b"2").await.unwrap();
        drop(dropped);
        assert_eq!(waits.await, Ok(WatchEvent { path: "/a/b/c".into() }));
    });
}

#[test]
fn whoever_gives_up_leaves_nothing_behind() {
    with(|host, server, store| async move {
        store.write("/a", b"1").await.unwrap();
        for _ in 0..50 {
            assert!(poll_once(store.read("/absent")).await.is_none());
            assert!(poll_once(store.watch("/a")).await.is_none());
            assert!(poll_once(store.transaction()).await.is_none());
            assert!(poll_once(store.write("/b", b"2")).await.is_none());
            assert_eq!(store.read("/a").await, Ok(b"1".to_vec()), "answers stay with their requests");
        }
        // The answer has arrived and was not taken.
        let mut transaction = Box::pin(store.transaction());
        assert!(poll_once(transaction.as_mut()).await.is_none());
        store.read("/a").await.unwrap();
        drop(transaction);
        until(&host, &server, |state| state.transaction_count() == 0 && state.watch_count() == 0).await;
        let count = |kind| server.state().kinds().into_iter().filter(|(asked, _)| *asked == kind).count();
        assert_eq!((count(MessageKind::TransactionStart), count(MessageKind::TransactionEnd)), (51, 51));
        assert_eq!((count(MessageKind::Watch), count(MessageKind::Unwatch)), (50, 50));
        assert_eq!(store.read("/b").await, Ok(b"2".to_vec()), "dropping does not cancel a request");
    });
}

/// Many requests of many tasks at once.
async fn crowd(host: &LinuxHost, store: &StoreClient) {
    let left = Rc::new(Cell::new(500));
    for i in 0..500_u64 {
        let (store, left) = (store.clone(), Rc::clone(&left));
        host.spawn("crowd", i, async move {
            let path = format!("/crowd/{i}");
            let value = vec![i as u8; 8 * i as usize];
            store.write(&path, &value).await.unwrap();
            assert_eq!(store.read(&path).await, Ok(value));
            assert_eq!(store.read(&format!("{path}/absent")).await, Err(Errno::ENOENT));
            left.set(left.get() - 1);
        });
    }
    while left.get() > 0 {
        host.sleep_ns(1_000_000).await;
    }
    assert_eq!(store.directory("/crowd").await.unwrap().len(), 500);
}

#[test]
fn requests_need_not_wait_for_each_other() {
    with(|host, _, store| async move { crowd(&host, &store).await });
}

#[test]
fn answers_may_come_byte_by_byte() {
    with(|host, server, store| async move {
        server.state().byte_by_byte = true;
        let watcher = store.watch("/crowd").await.unwrap();
        crowd(&host, &store).await;
        assert_eq!(next(&watcher).await, "/crowd", "a registration, or more events than are kept");
    });
}

#[test]
fn a_slow_xenstored_is_waited_for() {
    with(|host, server, store| async move {
        server.pause();
        let left = Rc::new(Cell::new(300));
        for i in 0..300_u64 {
            let (store, left) = (store.clone(), Rc::clone(&left));
            host.spawn("writer", i, async move {
                store.write(&format!("/slow/{i}"), &[i as u8; 4000]).await.unwrap();
                left.set(left.get() - 1);
            });
        }
        host.yield_now().await;
        // More than any socket buffers.
        let mut last = pin!(store.read("/slow/299"));
        for _ in 0..20 {
            assert!(poll_once(last.as_mut()).await.is_none());
            host.sleep_ns(1_000_000).await;
        }
        server.resume();
        assert!(last.await == Ok(vec![299_u64 as u8; 4000]));
        assert_eq!(left.get(), 0, "in the order in which they were made");
    });
}

#[test]
fn a_storm_of_events_costs_nothing_but_detail() {
    with(|_, _, store| async move {
        let (quiet, read) = (store.watch("/quiet").await.unwrap(), store.watch("/read").await.unwrap());
        assert_eq!(next(&read).await, "/read");
        for _ in 0..3 {
            store.read(STORM).await.unwrap();
        }
        let mut seen = vec![next(&quiet).await, next(&read).await];
        assert_eq!(seen, ["/quiet", "/read"]);
        assert!(poll_once(quiet.next()).await.is_none() && poll_once(read.next()).await.is_none());
        store.write("/quiet/now", b"").await.unwrap();
        seen.push(next(&quiet).await);
        assert_eq!(seen[2], "/quiet/now");
    });
}

#[test]
fn the_end_of_the_connection_is_everybodys() {
    for end in ENDS {
        with(move |host, _, store| async move {
            let watcher = Rc::new(store.watch("/a").await.unwrap());
            assert_eq!(next(&watcher).await, "/a");
            let transaction = store.transaction().await.unwrap();
            // Each in a task of its own, which only its own waker wakes.
            let left = Rc::new(Cell::new(2));
            let (reader, fires, done) =
                (store.clone(), Rc::clone(&watcher), [0, 1].map(|_| Rc::clone(&left)));
            let [read, fired] = done;
            host.spawn("reader", 0, async move {
                assert_eq!(reader.read(SILENCE).await, Err(Errno::ESHUTDOWN), "{end}");
                read.set(read.get() - 1);
            });
            host.spawn("watcher", 0, async move {
                assert_eq!(fires.next().await, Err(Errno::ESHUTDOWN), "{end}");
                fired.set(fired.get() - 1);
            });
            host.yield_now().await;
            assert_eq!(store.read(end).await, Err(Errno::ESHUTDOWN), "{end}");
            while left.get() > 0 {
                host.sleep_ns(1_000_000).await;
            }
            assert_eq!(store.write("/a", b"").await, Err(Errno::ESHUTDOWN));
            assert_eq!(store.watch("/a").await.err(), Some(Errno::ESHUTDOWN));
            assert_eq!(store.transaction().await.err(), Some(Errno::ESHUTDOWN));
            assert_eq!(watcher.next().await, Err(Errno::ESHUTDOWN));
            assert_eq!(transaction.commit().await, Err(Errno::ESHUTDOWN));
        });
    }
}

#[test]
fn a_connection_lasts_as_long_as_its_last_user() {
    with(|host, server, store| async move {
        let clone = store.clone();
        let watcher = store.watch("/a").await.unwrap();
        drop((store, clone));
        assert_eq!(next(&watcher).await, "/a");
        server.state().tree.write("/b", b"").unwrap();
        let other = StoreClient::open(&host, &server.place()).await.unwrap();
        other.write("/a/b", b"").await.unwrap();
        assert_eq!(next(&watcher).await, "/a/b");
        drop(watcher);
        until(&host, &server, |state| state.connection_count() == 1).await;
        assert!(server.state().kinds().contains(&(MessageKind::Unwatch, 0)), "what was queued was sent");
        drop(other);
        until(&host, &server, |state| state.connection_count() == 0).await;
    });
}

#[test]
fn what_is_never_answered_is_bounded() {
    with(|_, _, store| async move {
        let mut refused = 0;
        for _ in 0..5000 {
            if let Some(answer) = poll_once(store.read(SILENCE)).await {
                assert_eq!(answer, Err(Errno::EBUSY));
                refused += 1;
            }
        }
        assert_eq!(refused, 5000 - 4096);
    });
}

#[test]
fn a_place_without_xenstored_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    drop(std::os::unix::net::UnixListener::bind(path("left")).unwrap());
    std::fs::write(path("file"), b"").unwrap();
    let places = [
        (path("absent"), Errno::ENOENT),
        (path("left"), Errno::ECONNREFUSED),
        (path("file"), Errno::ENODEV),
        ("/dev/null".to_owned(), Errno::ENODEV),
    ];
    for (place, error) in places {
        let program = |host: LinuxHost| async move {
            let refused = StoreClient::open(&host, &StorePlaces::only(&place)).await.err().unwrap();
            assert_eq!(refused.tried, [(place.clone(), error)]);
            assert!(refused.to_string().contains(&format!("{place}: {error}")), "{refused}");
        };
        run(&Options::default(), program).unwrap();
    }
}
