//! `tapdisk serve` as a process of a simulated host, with our client as another.

use crate::{Daemon, world};
use kernel_model::Kernel;
use smallvec::smallvec;
use std::rc::Rc;
use tap_core::{Node, Request, ZeroFlags};
use tap_host::{Errno, IoBuf, IoVec, SectorRange, SocketAddress, Sockets, VbdId};
use tap_images::Formats;
use tap_programs::disk::{DiskOptions, open_disk};

async fn client(kernel: &Kernel, name: &str) -> Result<Rc<dyn Node>, String> {
    let host = kernel.process(format!("client of {name}"), 77);
    let options = DiskOptions { write: true, ..DiskOptions::default() };
    let spec = format!("nbd+unix:///{name}?socket=/run/s").parse()?;
    let disk =
        open_disk(&host, Formats::shipped(), VbdId(0), &spec, &options).await.map_err(|e| e.to_string())?;
    Ok(disk.node())
}

pub(crate) fn bytes(fill: u8, sectors: usize) -> IoVec {
    let mut buf = IoBuf::unpooled(sectors * 512).unwrap();
    buf.fill(fill);
    smallvec![buf]
}

#[test]
fn disks_are_served_until_the_process_is_asked_to_stop() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        kernel.storage().put_bytes("/b", &[2; 1 << 20]);
        let daemon = Daemon::start(&kernel, &xen, 1, "serve --nbd unix:/run/s a=raw:/a b=raw:/b");
        sim.sleep_ns(1_000_000).await;
        let lines = "export 'a': raw:/a, 1 MiB\nexport 'b': raw:/b, 1 MiB\nlistening at unix:/run/s";
        assert_eq!((daemon.said(), daemon.printed.ready.get()), (lines.to_owned(), Some(3)));
        let disk = client(&kernel, "a").await.unwrap();
        let write = Request::write(SectorRange::new(3, 2), bytes(7, 2));
        assert_eq!(disk.submit(write).await.result, Ok(()));
        let zeroes = Request::write_zeroes(SectorRange::new(4, 1), ZeroFlags::default());
        assert_eq!(disk.submit(zeroes).await.result, Ok(()));
        let read = disk.submit(Request::read(SectorRange::new(2, 4), bytes(0, 4))).await;
        let seen: Vec<u8> = read.bufs[0].chunks(512).map(|s| s[0]).collect();
        assert_eq!((read.result, seen), (Ok(()), vec![1, 7, 0, 1]));
        assert!(client(&kernel, "c").await.err().unwrap().contains("'c'"), "no such export");
        let other = client(&kernel, "b").await.unwrap();
        let read = other.submit(Request::read(SectorRange::new(0, 1), bytes(0, 1))).await;
        assert_eq!(read.bufs[0][0], 2);
        let (listed, seen) = daemon.disks.list();
        let told: Vec<_> = listed.iter().map(|disk| (&*disk.name, disk.state, disk.stats.reads)).collect();
        assert_eq!(told, [("a", "running", 1), ("b", "running", 1)]);
        daemon.host.process.ask_to_stop();
        sim.sleep_ns(10_000_000_000).await;
        assert_eq!(*daemon.status.borrow(), Some(0));
        assert!(daemon.disks.list().0.is_empty() && daemon.disks.watch(seen).await > seen);
        let said = daemon.said();
        let told = "export 'a': reads 1 (2 KiB), writes 1 (1 KiB), zeroes 1 (512 B)\nexport 'b': reads 1 (512 B)\nmemory";
        assert!(said.contains(told), "{said}");
        // The writes are durable without a flush by the client.
        kernel.storage().power_cut();
        assert_eq!(kernel.storage().bytes("/a").unwrap()[3 * 512..5 * 512], [[7; 512], [0; 512]].concat());
    });
}

#[test]
fn a_server_may_end_with_its_last_client() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        let line = "serve --end-with-last-client --nbd unix:/run/s raw:/a";
        let daemon = Daemon::start(&kernel, &xen, 1, line);
        sim.sleep_ns(60_000_000_000).await;
        assert_eq!(*daemon.status.borrow(), None, "before the first");
        // One that asks for an export that does not exist has chosen none.
        assert!(client(&kernel, "other").await.is_err());
        sim.sleep_ns(1_000_000_000).await;
        let (first, last) = (client(&kernel, "").await.unwrap(), client(&kernel, "").await.unwrap());
        // One that never chooses is not waited for.
        let silent =
            kernel.process("silent", 0).connect(&SocketAddress::Unix("/run/s".into())).await.unwrap();
        first.close().await.unwrap();
        sim.sleep_ns(1_000_000_000).await;
        assert_eq!(last.submit(Request::write(SectorRange::new(0, 1), bytes(7, 1))).await.result, Ok(()));
        last.close().await.unwrap();
        sim.sleep_ns(1_000_000_000).await;
        assert_eq!(*daemon.status.borrow(), Some(0));
        drop(silent);
        kernel.storage().power_cut();
        assert_eq!(kernel.storage().bytes("/a").unwrap()[..513], [&[7; 512][..], &[1]].concat());
    });
}

#[test]
fn unsafe_ignores_flushes_and_writethrough_makes_writes_durable() {
    for (mode, durable) in [("unsafe", false), ("writethrough", true)] {
        world(move |sim, kernel, xen| async move {
            kernel.storage().put_bytes("/a", &[1; 65536]);
            let daemon =
                Daemon::start(&kernel, &xen, 1, &format!("serve --cache {mode} --nbd unix:/run/s raw:/a"));
            sim.sleep_ns(1_000_000).await;
            let disk = client(&kernel, "").await.unwrap();
            let write = Request::write(SectorRange::new(0, 8), bytes(9, 8));
            assert_eq!(disk.submit(write).await.result, Ok(()));
            if !durable {
                assert_eq!(disk.submit(Request::flush()).await.result, Ok(()));
            }
            let inode = kernel.storage().inode("/a").unwrap();
            assert_eq!(inode.pending.is_empty(), durable, "{mode}");
            daemon.host.process.ask_to_stop();
            sim.sleep_ns(10_000_000_000).await;
            assert_eq!(*daemon.status.borrow(), Some(0));
            assert!(
                kernel.storage().inode("/a").unwrap().pending.is_empty(),
                "the end makes all writes durable"
            );
        });
    }
}

#[test]
fn disks_above_the_limit_and_double_names_are_refused() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 65536]);
        for (disks, why) in [
            ("a=raw:/a b=raw:/b", "serve 'b': the process already has 1 disks"),
            ("a=raw:/a a=raw:/b", "serve 'a' twice"),
        ] {
            let line = format!("serve --nbd unix:/run/s {disks}");
            let daemon = Daemon::start_with(&kernel, &xen, 1, &line, 1);
            sim.sleep_ns(1_000_000_000).await;
            assert_eq!(*daemon.status.borrow(), Some(1));
            assert!(daemon.said().contains(why), "{}", daemon.said());
            assert!(daemon.disks.reserve("c").is_ok(), "all disks are closed and their names freed");
        }
    });
}

#[test]
fn an_unservable_disk_ends_the_process_with_one_line() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 65536]);
        let first = Daemon::start(&kernel, &xen, 1, "serve --nbd unix:/run/s raw:/a");
        sim.sleep_ns(1_000_000).await;
        for (line, words) in [
            ("serve --nbd unix:/run/t raw:/a", "lock /a: it is in use"),
            ("serve --nbd unix:/run/s --read-only raw:/b", "open /b"),
            ("serve --nbd unix:/run/t /a", "name its format"),
            ("serve raw:/a", "lock /a"),
        ] {
            let daemon = Daemon::start(&kernel, &xen, 2, line);
            sim.sleep_ns(5_000_000_000).await;
            assert_eq!(*daemon.status.borrow(), Some(1), "{line}");
            assert!(daemon.said().contains(words) && !daemon.said().contains('\n'), "{}", daemon.said());
            assert_eq!(daemon.printed.ready.get(), None, "{line}");
        }
        kernel.storage().put_bytes("/b", &[1; 65536]);
        let taken = Daemon::start(&kernel, &xen, 3, "serve --nbd unix:/run/s raw:/b");
        sim.sleep_ns(1_000_000).await;
        let text = "tapdisk: failed to listen at unix:/run/s: address already in use (EADDRINUSE); another server is there";
        assert_eq!(taken.said(), text);
        assert_eq!(*first.status.borrow(), None, "the first one continues");
        assert_eq!(
            client(&kernel, "").await.unwrap().submit(Request::flush()).await.result,
            Ok::<(), Errno>(())
        );
        first.host.process.node().kill();
    });
}
