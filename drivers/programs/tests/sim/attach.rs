//! `tapdisk attach` and `tapdisk detach` as processes of a simulated host, with its kernel's nbd driver.

use crate::{Daemon, world};
use kernel_model::gendisk::{Bio, Opener};
use kernel_model::{Kernel, SimHost};
use sim::Sim;
use tap_host::{Errno, File, Files, IoKind, NbdConfig, NbdDevices, NbdIndex, OpenMode, SectorRange};
use xen_model::Xen;

const SECOND_NS: u64 = 1_000_000_000;

fn write(start: u64, fill: u8) -> Bio {
    Bio { data: vec![fill; 512], ..Bio::new(IoKind::Write, SectorRange::new(start, 1)) }
}

async fn read(opener: &Opener, start: u64) -> Result<u8, Errno> {
    let (result, data) =
        opener.submit(Bio { data: vec![0; 512], ..Bio::new(IoKind::Read, SectorRange::new(start, 1)) }).await;
    result.map(|()| data[0])
}

fn records(xen: &Xen) -> usize {
    xen.regions().iter().filter(|name| name.starts_with("nbd-")).count()
}

/// Runs a command to its end; its status and what it says.
async fn ends(sim: &Sim, kernel: &Kernel, xen: &Xen, key: u64, line: &str) -> (u8, String) {
    let daemon = Daemon::start(kernel, xen, key, line);
    while daemon.status.borrow().is_none() {
        sim.sleep_ns(SECOND_NS).await;
    }
    let status = daemon.status.borrow().unwrap_or(u8::MAX);
    (status, daemon.said())
}

async fn kill(daemon: &Daemon) {
    daemon.host.process.node().kill();
    daemon.host.process.node().dead().await;
}

#[test]
fn a_device_is_there_until_it_is_detached() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        let daemon = Daemon::start(&kernel, &xen, 1, "attach raw:/a");
        sim.sleep_ns(SECOND_NS).await;
        assert_eq!(
            (daemon.said(), daemon.printed.ready.get()),
            ("/dev/nbd0\n/dev/nbd0: raw:/a, 1 MiB".into(), Some(1))
        );
        let disk = kernel.nbd_disk(NbdIndex(0));
        assert_eq!((disk.size_sectors(), disk.is_read_only(), records(&xen)), (2048, false, 1));
        let mount = disk.open("mount", true, true).unwrap();
        assert_eq!(read(&mount, 2047).await, Ok(1));
        assert_eq!(mount.submit(write(7, 9)).await.0, Ok(()));
        let (status, said) = ends(&sim, &kernel, &xen, 2, "detach /dev/nbd0").await;
        assert_eq!(status, 16);
        assert!(said.contains("detach /dev/nbd0: it is in use by mount; with --force"), "{said}");
        drop(mount);
        let reader = disk.open("reader", false, false).unwrap();
        let (status, said) = ends(&sim, &kernel, &xen, 3, "detach nbd0").await;
        assert!(status == 16 && said.contains("in use by reader"), "{said}");
        assert_eq!(read(&reader, 7).await, Ok(9));
        drop(reader);
        assert_eq!(ends(&sim, &kernel, &xen, 4, "detach nbd0").await, (0, "/dev/nbd0: detached".into()));
        sim.sleep_ns(SECOND_NS).await;
        assert_eq!(*daemon.status.borrow(), Some(0));
        assert!(daemon.said().ends_with("/dev/nbd0: detached"), "{}", daemon.said());
        assert_eq!((disk.size_sectors(), records(&xen)), (0, 0));
        kernel.storage().power_cut();
        assert_eq!(kernel.storage().bytes("/a").unwrap()[7 * 512..][..513], [&[9; 512][..], &[1]].concat());
    });
}

#[test]
fn a_device_in_use_is_taken_up_by_the_next_tapdisk_and_grows_with_its_disk() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        let first = Daemon::start(&kernel, &xen, 1, "attach --device /dev/nbd3 raw:/a");
        sim.sleep_ns(SECOND_NS).await;
        let disk = kernel.nbd_disk(NbdIndex(3));
        let mount = disk.open("mount", true, true).unwrap();
        first.host.process.ask_to_stop();
        sim.sleep_ns(SECOND_NS).await;
        assert_eq!(*first.status.borrow(), Some(0));
        let left = "/dev/nbd3: left as it is, for the next tapdisk within 600 seconds";
        assert!(first.said().ends_with(left), "{}", first.said());
        let (status, said) = ends(&sim, &kernel, &xen, 2, "attach --read-only raw:/a").await;
        assert!(status == 22 && said.contains("it is writable; start tapdisk without --read-only"), "{said}");
        let (status, said) = ends(&sim, &kernel, &xen, 3, "attach --device nbd4 raw:/a").await;
        assert!(status == 16 && said.contains("it is /dev/nbd3 already"), "{said}");
        kernel.storage().put_bytes("/b", &[2; 1 << 20]);
        let other = Daemon::start(&kernel, &xen, 4, "attach raw:/b");
        sim.sleep_ns(SECOND_NS).await;
        assert!(other.said().starts_with("/dev/nbd0\n"), "{}", other.said());
        // A request that nobody serves waits.
        let waiting = read(&mount, 0);
        let larger = Daemon::start(&kernel, &xen, 5, "attach raw:/a");
        assert_eq!(waiting.await, Ok(1));
        assert!(larger.said().starts_with("/dev/nbd3"), "{}", larger.said());
        kill(&larger).await;
        let host = SimHost::start(&kernel, &xen, "resizer", 77);
        let file = host.open("/a", OpenMode::WRITE).await.unwrap();
        file.set_size(512 << 10).await.unwrap();
        let (status, said) = ends(&sim, &kernel, &xen, 6, "attach raw:/a").await;
        assert!(status == 22 && said.contains("it has 1 MiB, and raw:/a now has 512 KiB"), "{said}");
        assert_eq!(records(&xen), 2);
        file.set_size(2 << 20).await.unwrap();
        let grown = Daemon::start(&kernel, &xen, 7, "attach raw:/a");
        sim.sleep_ns(SECOND_NS).await;
        assert_eq!((disk.size_sectors(), read(&mount, 4095).await), (4096, Ok(0)));
        kill(&grown).await;
        drop(mount);
        let (status, said) = ends(&sim, &kernel, &xen, 8, "detach --force nbd3").await;
        assert_eq!((status, records(&xen)), (0, 1), "{said}");
    });
}

#[test]
fn what_cannot_be_attached_changes_nothing() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        let host = SimHost::start(&kernel, &xen, "other", 77);
        let foreign = NbdConfig {
            index: Some(NbdIndex(2)),
            identifier: "another".into(),
            size_bytes: 512,
            flags: 0,
            request_bytes: 4096,
            patience_s: 1,
        };
        let (index, _stream) = host.attach(&foreign).await.unwrap();
        let before = host.attached().await;
        let _open = kernel.nbd_disk(NbdIndex(4)).open("udev", false, false).unwrap();
        for (key, refusal, line, status, words) in [
            (1, Some(Errno::ENODEV), "attach raw:/a", 19, "modprobe nbd"),
            (2, Some(Errno::EOPNOTSUPP), "attach raw:/a", 95, "older than Linux 5.14"),
            (3, Some(Errno::EPERM), "attach raw:/a", 1, "it takes root"),
            (4, Some(Errno::EPERM), "detach nbd0", 1, "it takes root"),
            (5, None, "attach --device nbd2 raw:/a", 16, "it is in use: choose another device"),
            (6, None, "attach --device nbd4 raw:/a", 16, "it is in use: choose another device"),
            (7, None, "attach --device nbd99 raw:/a", 22, "is its number too high?"),
            (8, None, "attach raw:/missing", 2, "no such file"),
            (9, None, "attach /a", 22, "name its format, raw:/a or"),
            (10, None, "detach /dev/nbd2", 1, "it is not of tapdisk"),
            (11, None, "detach --force /dev/nbd2", 1, "it is not of tapdisk"),
            (12, None, "detach /dev/nbd0", 6, "nothing is attached there"),
            (13, None, "attach --via blktap --device nbd0 raw:/a", 22, "leave out --device"),
            (14, None, "attach --via blktap --keep 9 raw:/a", 22, "a blktap2 module keeps no requests"),
        ] {
            kernel.refuse_nbd(refusal);
            let (ended, said) = ends(&sim, &kernel, &xen, key, line).await;
            let one = said.starts_with("tapdisk: failed to ") && said.contains(words) && !said.contains('\n');
            assert!(ended == status && one, "{line}: {ended}: {said}");
            kernel.refuse_nbd(None);
            assert_eq!((host.attached().await, records(&xen)), (before.clone(), 0), "{line}");
        }
        assert_eq!(index, NbdIndex(2));
        assert_eq!(kernel.storage().bytes("/a").unwrap(), [1; 1 << 20]);
    });
}

#[test]
fn a_stream_that_cannot_be_had_again_is_tried_for_and_then_reported() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        let daemon = Daemon::start(&kernel, &xen, 1, "attach raw:/a");
        sim.sleep_ns(SECOND_NS).await;
        let mount = kernel.nbd_disk(NbdIndex(0)).open("mount", true, true).unwrap();
        for error in [Errno::EMFILE, Errno::ENOMEM] {
            // What passes in time is not noticed.
            kernel.refuse_nbd(Some(error));
            kernel.cut_nbd(NbdIndex(0));
            sim.sleep_ns(SECOND_NS).await;
            kernel.refuse_nbd(None);
            assert_eq!((read(&mount, 0).await, *daemon.status.borrow()), (Ok(1), None), "{error}");
        }
        kernel.refuse_nbd(Some(Errno::EMFILE));
        kernel.cut_nbd(NbdIndex(0));
        sim.sleep_ns(10 * SECOND_NS).await;
        assert_eq!(*daemon.status.borrow(), Some(24));
        let said = daemon.said();
        let why = "failed to serve /dev/nbd0 again after its stream broke: too many open files (EMFILE); it is left";
        assert!(said.contains(why), "{said}");
        kernel.refuse_nbd(None);
        let waiting = read(&mount, 0);
        let _next = Daemon::start(&kernel, &xen, 2, "attach raw:/a");
        assert_eq!(waiting.await, Ok(1), "for the next tapdisk");
    });
}

#[test]
fn a_detach_that_fails_lets_the_device_stay() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        let daemon = Daemon::start(&kernel, &xen, 1, "attach raw:/a");
        sim.sleep_ns(SECOND_NS).await;
        kernel.refuse_nbd_detach(Some(Errno::ENOMEM));
        let (status, said) = ends(&sim, &kernel, &xen, 2, "detach nbd0").await;
        assert!(status == 12 && said.contains("failed to detach /dev/nbd0: "), "{said}");
        assert_eq!(records(&xen), 1);
        // As any device that stays it gets another stream, and goes on.
        kernel.cut_nbd(NbdIndex(0));
        let mount = kernel.nbd_disk(NbdIndex(0)).open("mount", true, true).unwrap();
        assert_eq!((read(&mount, 0).await, *daemon.status.borrow()), (Ok(1), None));
        drop(mount);
        daemon.host.process.ask_to_stop();
        sim.sleep_ns(SECOND_NS).await;
        assert!(daemon.said().contains("/dev/nbd0: left as it is"), "{}", daemon.said());
        kernel.refuse_nbd_detach(None);
        // Nobody serves it: the kernel has nothing to write, and cannot say so.
        let (status, said) = ends(&sim, &kernel, &xen, 3, "detach --force nbd0").await;
        assert_eq!((status, said), (0, "/dev/nbd0: detached".into()));
        assert_eq!(records(&xen), 0);
    });
}

#[test]
fn a_detach_that_dies_lets_the_device_stay_or_takes_it_away() {
    // More effects than it has.
    for steps in 1..32 {
        world(|sim, kernel, xen| async move {
            kernel.storage().put_bytes("/a", &[1; 1 << 20]);
            let daemon = Daemon::start(&kernel, &xen, 1, "attach raw:/a");
            sim.sleep_ns(SECOND_NS).await;
            let detach = Daemon::start(&kernel, &xen, 2, "detach nbd0");
            detach.host.process.node().kill_after_steps(steps);
            sim.sleep_ns(SECOND_NS).await;
            let gone = kernel.nbd_disk(NbdIndex(0)).size_sectors() == 0;
            assert!(gone || !detach.host.process.node().is_alive(), "{steps}: {}", detach.said());
            kernel.cut_nbd(NbdIndex(0));
            sim.sleep_ns(SECOND_NS).await;
            assert_eq!(*daemon.status.borrow(), gone.then_some(0), "{steps}: {}", daemon.said());
            if !gone {
                let mount = kernel.nbd_disk(NbdIndex(0)).open("mount", true, true).unwrap();
                assert_eq!(read(&mount, 0).await, Ok(1), "{steps}");
                drop(mount);
                let (status, said) = ends(&sim, &kernel, &xen, 3, "detach nbd0").await;
                assert_eq!((status, said), (0, "/dev/nbd0: detached".into()), "{steps}");
                sim.sleep_ns(SECOND_NS).await;
            }
            assert_eq!(records(&xen), 0, "{steps}");
        });
    }
}
