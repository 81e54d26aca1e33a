//! `tapdisk xen`, with guests that use the model of Linux's front end.

use crate::{Daemon, world};
use kernel_model::{Blkfront, DataPieces, Kernel, SimHost};
use sim::Sim;
use std::cell::RefCell;
use std::rc::Rc;
use tap_host::{DomId, Errno, File, Files, IoKind, LockKind, OpenMode, SectorRange, VbdId, Xenstore};
use xen_model::{Counts, VbdPaths, Xen, attach_vbd, remove_vbd};

const XVDA: VbdId = VbdId(51712);
const MIB: usize = 1 << 20;

/// A toolstack, which creates guests.
struct Toolstack {
    sim: Sim,
    xen: Xen,
    host: SimHost,
}

struct Guest {
    paths: VbdPaths,
    front: Blkfront,
    dom: DomId,
}

impl Toolstack {
    fn new(sim: &Sim, kernel: &Kernel, xen: &Xen) -> Self {
        let host = SimHost::start(kernel, xen, "toolstack", 0);
        Self { sim: sim.clone(), xen: xen.clone(), host }
    }

    fn guest(&self) -> Guest {
        let dom = self.xen.create_domain();
        let node = self.sim.node("guest", u64::from(dom.0));
        let port = self.xen.attach(dom, &node);
        let paths = VbdPaths::new("vbd", dom, XVDA);
        let complain = Rc::new(|text: String| panic!("{text}"));
        let front = Blkfront::new(&port, &node, DomId(0), paths.clone(), complain);
        Guest { paths, front, dom }
    }

    async fn write(&self, guest: &Guest, key: &str, value: &str) {
        let path = format!("{}/{key}", guest.paths.backend);
        self.host.write(&path, value.as_bytes()).await.unwrap();
    }

    async fn back(&self, guest: &Guest, key: &str) -> Option<String> {
        let value = self.host.read(&format!("{}/{key}", guest.paths.backend)).await.ok()?;
        Some(String::from_utf8(value).unwrap())
    }

    async fn attach(&self, guest: &Guest) {
        self.attach_for(guest, false).await;
    }

    async fn attach_for(&self, guest: &Guest, read_only: bool) {
        attach_vbd(&self.host.port, guest.dom, XVDA, &guest.paths, read_only).await.unwrap();
    }

    /// Does what xl does for `script=NAME,target=PARAMS`, up to its wait for state 2.
    async fn attach_with_script(&self, guest: &Guest, script: &str, params: &str) {
        // xl writes it in one transaction; here the script comes last, since it makes the disk ours.
        self.attach(guest).await;
        self.write(guest, "params", params).await;
        self.write(guest, "script", &format!("/etc/xen/scripts/{script}")).await;
    }

    async fn take_offline(&self, guest: &Guest) {
        self.write(guest, "online", "0").await;
        self.write(guest, "state", "5").await;
    }

    async fn settle(&self) {
        self.sim.sleep_ns(100_000_000).await;
    }
}

impl Guest {
    async fn write(&self, sector: u64, fill: u8) -> Result<(), Errno> {
        let fill_pages = |pieces: DataPieces<'_>| pieces.only().unwrap().with_mut(|bytes| bytes.fill(fill));
        self.front.io(IoKind::Write, SectorRange::new(sector, 1), fill_pages, |_| {}).await
    }

    async fn read(&self, sector: u64) -> u8 {
        let mut seen = [0; 1];
        let look = |pieces: DataPieces<'_>| pieces.only().unwrap().with(|bytes| seen[0] = bytes[511]);
        self.front.io(IoKind::Read, SectorRange::new(sector, 1), |_| {}, look).await.unwrap();
        seen[0]
    }

    async fn close(&self) {
        self.front.close().await.unwrap();
        self.front.release().unwrap();
    }
}

#[test]
fn named_disks_are_served_until_the_toolstack_removes_them() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; MIB]);
        kernel.storage().put_bytes("/b", &[2; MIB]);
        let tools = Toolstack::new(&sim, &kernel, &xen);
        let (one, two) = (tools.guest(), tools.guest());
        tools.attach(&one).await;
        tools.attach(&two).await;
        let daemon = Daemon::start(&kernel, &xen, 1, "xen 1/xvda=raw:/a 2/xvda=raw:/b");
        one.front.connect().await.unwrap();
        two.front.connect().await.unwrap();
        assert_eq!((one.read(3).await, two.read(3).await), (1, 2));
        one.write(3, 7).await.unwrap();
        assert_eq!((one.read(3).await, two.read(3).await), (7, 2));
        tools.take_offline(&one).await;
        one.close().await;
        tools.settle().await;
        assert_eq!(*daemon.status.borrow(), None, "the other disk is still served");
        assert_eq!(two.read(3).await, 2);
        tools.take_offline(&two).await;
        two.close().await;
        tools.settle().await;
        assert_eq!(*daemon.status.borrow(), Some(0));
        let said = "serving 1/xvda: raw:/a, 1 MiB\nserving 2/xvda: raw:/b, 1 MiB\n\
                    1/xvda: reads 2 (1 KiB), writes 1 (512 B)\n1/xvda: closed\n\
                    2/xvda: reads 3 (1.5 KiB)\n2/xvda: closed\nmemory: ";
        let (text, end) = (daemon.said(), " of 256 MiB in use");
        assert!(text.starts_with(said) && text.ends_with(end) && text.lines().count() == 7, "{text}");
        kernel.storage().power_cut();
        assert_eq!(kernel.storage().bytes("/a").unwrap()[3 * 512..4 * 512], [7; 512]);
    });
}

#[test]
fn a_disk_above_the_limit_is_not_opened_and_the_others_are_served() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; MIB]);
        let tools = Toolstack::new(&sim, &kernel, &xen);
        let guests = [tools.guest(), tools.guest()];
        for guest in &guests {
            tools.attach(guest).await;
        }
        // The image exists, so the limit is the only reason to fail.
        let daemon = Daemon::start_with(&kernel, &xen, 1, "xen 1/xvda=raw:/a 2/xvda=raw:/b", 1);
        guests[0].front.connect().await.unwrap();
        guests[0].write(3, 7).await.unwrap();
        assert_eq!(guests[0].read(3).await, 7);
        let why = "tapdisk: 2/xvda: failed to serve '2/xvda': the process already has 1 disks";
        assert!(daemon.said().contains(why), "{}", daemon.said());
        assert_eq!(daemon.disks.list().0.len(), 1);
        daemon.host.process.ask_to_stop();
        tools.settle().await;
        assert_eq!(*daemon.status.borrow(), Some(1));
    });
}

#[test]
fn a_successor_takes_over_after_a_stop_or_a_crash() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; MIB]);
        let tools = Toolstack::new(&sim, &kernel, &xen);
        let guest = Rc::new(tools.guest());
        tools.attach(&guest).await;
        let first = Daemon::start(&kernel, &xen, 1, "xen 1/xvda=raw:/a");
        guest.front.connect().await.unwrap();
        guest.write(3, 7).await.unwrap();
        let listed = first.disks.list().0;
        let told: Vec<_> = listed.iter().map(|d| (&*d.name, &*d.about, d.state, d.stats.writes)).collect();
        assert_eq!(told, [("1/xvda", "raw:/a", "running", 1)]);
        first.host.process.ask_to_stop();
        tools.settle().await;
        assert_eq!(*first.status.borrow(), Some(0));
        assert!(first.disks.list().0.is_empty() && first.disks.reserve("1/xvda").is_ok());
        assert!(first.said().contains("\n1/xvda: left as it is\nmemory: "), "{}", first.said());
        assert_eq!(xen.counts(DomId(0)), Counts::default());
        assert_eq!(tools.back(&guest, "state").await.as_deref(), Some("4"));
        // The guest submits a request while no tapdisk runs.
        let (sim_of_write, g) = (sim.clone(), Rc::clone(&guest));
        sim_of_write.spawn("write", 0, async move { g.write(4, 8).await.unwrap() });
        tools.settle().await;
        let second = Daemon::start(&kernel, &xen, 2, "xen 1/xvda=raw:/a");
        assert_eq!((guest.read(3).await, guest.read(4).await), (7, 8));
        second.host.process.node().kill();
        second.host.process.node().dead().await;
        let third = Daemon::start(&kernel, &xen, 3, "xen 1/xvda=raw:/a");
        assert_eq!(guest.read(4).await, 8);
        tools.take_offline(&guest).await;
        guest.close().await;
        tools.settle().await;
        assert_eq!(*third.status.borrow(), Some(0));
        assert!(xen.regions().is_empty());
    });
}

#[test]
fn a_disk_that_grew_while_no_tapdisk_ran_is_larger_for_its_guest() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; MIB]);
        let tools = Toolstack::new(&sim, &kernel, &xen);
        let guest = tools.guest();
        let told = Rc::new(RefCell::new(Vec::new()));
        let telling = Rc::clone(&told);
        guest.front.on_resized(Rc::new(move |sectors| telling.borrow_mut().push(sectors)));
        tools.attach(&guest).await;
        let first = Daemon::start(&kernel, &xen, 1, "xen 1/xvda=raw:/a");
        guest.front.connect().await.unwrap();
        assert_eq!((guest.front.size_sectors(), guest.write(2048, 7).await), (2048, Err(Errno::EIO)));
        first.host.process.node().kill();
        first.host.process.node().dead().await;
        kernel.storage().put_bytes("/a", &[1; 2 * MIB]);
        Daemon::start(&kernel, &xen, 2, "xen 1/xvda=raw:/a");
        assert_eq!(guest.front.grown_past(2048).await, 4096);
        guest.write(2048, 7).await.unwrap();
        assert_eq!((guest.read(2048).await, guest.read(4095).await), (7, 1));
        assert_eq!(*told.borrow(), [4096]);
        assert_eq!(tools.back(&guest, "state").await.as_deref(), Some("4"));
    });
}

#[test]
fn the_problem_of_a_vbd_is_reported() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; MIB]);
        let tools = Toolstack::new(&sim, &kernel, &xen);
        let guest = tools.guest();
        tools.attach(&guest).await;
        for (line, why) in [
            ("xen 1/xvdb=raw:/a", "find /local/domain/0/backend/vbd/1/51728 in xenstore"),
            ("xen --type vbd3 1/xvda=raw:/a", "find /local/domain/0/backend/vbd3/1/51712 in xenstore"),
            ("xen 1/xvda=raw:/gone", "/gone"),
        ] {
            let daemon = Daemon::start(&kernel, &xen, 5, line);
            sim.sleep_ns(9_000_000_000).await;
            assert_eq!(*daemon.status.borrow(), Some(1), "{line}");
            assert!(
                daemon.said().starts_with("tapdisk: 1/xvd")
                    && daemon.said().contains(": failed to ")
                    && daemon.said().contains(why),
                "{}",
                daemon.said()
            );
            daemon.host.process.node().kill();
        }
        assert_eq!(tools.back(&guest, "state").await.as_deref(), Some("1"), "no connection was begun");
        // The disks that can be served are served.
        let daemon = Daemon::start(&kernel, &xen, 6, "xen 1/xvdc=raw:/b 1/xvda=raw:/a");
        guest.front.connect().await.unwrap();
        assert_eq!(guest.read(0).await, 1);
        tools.take_offline(&guest).await;
        guest.close().await;
        tools.settle().await;
        assert_eq!(*daemon.status.borrow(), Some(1), "{}", daemon.said());
    });
}

#[test]
fn a_watcher_serves_each_vbd_with_its_script_every_time() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; MIB]);
        kernel.storage().put_bytes("/b", &[2; MIB]);
        let tools = Toolstack::new(&sim, &kernel, &xen);
        let (early, late, other) = (tools.guest(), tools.guest(), tools.guest());
        tools.attach_with_script(&early, "block-tapdisk", "raw:/a").await;
        tools.attach_with_script(&other, "block", "raw:/a").await;
        let daemon = Daemon::start(&kernel, &xen, 1, "xen --watch");
        tools.settle().await;
        assert_eq!(tools.back(&early, "state").await.as_deref(), Some("2"));
        assert_eq!(tools.back(&other, "state").await.as_deref(), Some("1"), "not ours");
        // Until the script has run the back end does not connect.
        sim.spawn("front", 0, {
            let front = early.front.clone();
            async move { front.connect().await.unwrap() }
        });
        tools.settle().await;
        assert_eq!(tools.back(&early, "state").await.as_deref(), Some("2"));
        tools.write(&early, "hotplug-status", "connected").await;
        assert_eq!(early.read(0).await, 1);
        for life in 0..3 {
            tools.attach_with_script(&late, "block-tapdisk", "raw:/b").await;
            tools.write(&late, "hotplug-status", "connected").await;
            late.front.connect().await.unwrap();
            assert_eq!(late.read(life).await, if life == 0 { 2 } else { 9 });
            late.write(life + 1, 9).await.unwrap();
            tools.take_offline(&late).await;
            late.close().await;
            tools.settle().await;
            assert_eq!(tools.back(&late, "state").await.as_deref(), Some("6"));
            remove_vbd(&tools.host.port, &late.paths).await.unwrap();
        }
        daemon.host.process.ask_to_stop();
        tools.settle().await;
        assert_eq!(*daemon.status.borrow(), Some(0));
        // Its successor takes over connected vbds.
        let next = Daemon::start(&kernel, &xen, 2, "xen --watch");
        assert_eq!(early.read(0).await, 1);
        tools.take_offline(&early).await;
        early.close().await;
        tools.settle().await;
        assert_eq!(*next.status.borrow(), None, "a watcher waits for more");
        next.host.process.ask_to_stop();
        tools.settle().await;
        assert_eq!(*next.status.borrow(), Some(0));
        assert_eq!(xen.counts(DomId(0)), Counts::default());
    });
}

#[test]
fn read_only_vbds_share_an_image() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; MIB]);
        let tools = Toolstack::new(&sim, &kernel, &xen);
        let daemon = Daemon::start(&kernel, &xen, 1, "xen --watch");
        let (one, two) = (tools.guest(), tools.guest());
        for guest in [&one, &two] {
            tools.attach_for(guest, true).await;
            tools.write(guest, "params", "raw:/a").await;
            tools.write(guest, "hotplug-status", "connected").await;
            tools.write(guest, "script", "block-tapdisk").await;
            guest.front.connect().await.unwrap();
            assert_eq!(tools.back(guest, "info").await.as_deref(), Some("4"));
            assert_eq!(guest.write(3, 7).await, Err(Errno::EIO));
            assert_eq!(guest.read(3).await, 1);
        }
        let writer = tools.guest();
        tools.attach_with_script(&writer, "block-tapdisk", "raw:/a").await;
        sim.sleep_ns(9_000_000_000).await;
        assert!(tools.back(&writer, "hotplug-error").await.unwrap().contains("in use"), "{}", daemon.said());
    });
}

/// Once its directory is gone a vbd has no mode, as a writable one may have none.
#[test]
fn a_read_only_vbd_that_vanishes_is_not_opened_for_writing() {
    // Between any two requests to xenstore.
    for half_requests in 0..80 {
        world(move |sim, kernel, xen| async move {
            kernel.storage().put_bytes("/a", &[1; MIB]);
            // With another reader nobody can open it for writing.
            let reader = kernel.process("reader", 9);
            let file = reader.open("/a", OpenMode::READ).await.unwrap();
            file.lock(LockKind::Shared).await.unwrap();
            let tools = Toolstack::new(&sim, &kernel, &xen);
            let guest = tools.guest();
            tools.attach_for(&guest, true).await;
            let daemon = Daemon::start(&kernel, &xen, 1, "xen 1/xvda=raw:/a");
            sim.sleep_ns(half_requests * xen_model::Options::default().store_ns / 2).await;
            Xenstore::remove(&tools.host, &guest.paths.backend).await.unwrap();
            sim.sleep_ns(20_000_000_000).await;
            assert!(
                !daemon.said().contains("in use by another process"),
                "{half_requests}: {}",
                daemon.said()
            );
            assert!(daemon.status.borrow().is_some(), "{half_requests}: {}", daemon.said());
        });
    }
}

#[test]
fn a_watcher_reports_failures_to_the_toolstack() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; MIB]);
        let tools = Toolstack::new(&sim, &kernel, &xen);
        let daemon = Daemon::start(&kernel, &xen, 1, "xen --watch");
        tools.settle().await;
        let long = format!("raw:/{}", "ä".repeat(2010));
        for (params, why) in [
            (long.as_str(), "ää"),
            ("raw:/gone", "/gone"),
            ("/a", "raw:/a or qcow:/a"),
            ("vhd:/a", "not a known format"),
            ("", "names no file"),
        ] {
            let guest = tools.guest();
            tools.attach_with_script(&guest, "block-tapdisk", params).await;
            sim.sleep_ns(3_000_000_000).await;
            let error = tools.back(&guest, "hotplug-error").await.unwrap();
            assert!(error.starts_with("failed to ") && error.contains(why), "{params}: {error}");
            assert_eq!(tools.back(&guest, "state").await.as_deref(), Some("2"), "xl waits for it");
            tools.take_offline(&guest).await;
            tools.settle().await;
            assert_eq!(tools.back(&guest, "state").await.as_deref(), Some("6"));
            remove_vbd(&tools.host.port, &guest.paths).await.unwrap();
        }
        assert_eq!(*daemon.status.borrow(), None);
        daemon.host.process.ask_to_stop();
        tools.settle().await;
        assert_eq!(*daemon.status.borrow(), Some(0), "{}", daemon.said());
    });
}

#[test]
fn a_second_process_does_not_touch_a_served_ring() {
    world(|sim, kernel, xen| async move {
        for path in ["/a", "/b"] {
            kernel.storage().put_bytes(path, &[1; MIB]);
        }
        kernel.storage().put_bytes("/small", &[1; MIB / 2]);
        let tools = Toolstack::new(&sim, &kernel, &xen);
        let guest = tools.guest();
        tools.attach(&guest).await;
        let first = Daemon::start(&kernel, &xen, 1, "xen 1/xvda=raw:/a");
        guest.front.connect().await.unwrap();
        for (key, spec, why) in [
            (2, "raw:/b", "another process serves it"),
            (3, "raw:/a", "another process serves it"),
            (4, "raw:/small", "another process serves it"),
        ] {
            let second = Daemon::start(&kernel, &xen, key, &format!("xen 1/xvda={spec}"));
            sim.sleep_ns(12_000_000_000).await;
            assert_eq!(*second.status.borrow(), Some(1), "{spec}");
            assert!(second.said().contains(why), "{}", second.said());
            assert_eq!(
                (tools.back(&guest, "state").await.as_deref(), tools.back(&guest, "error").await),
                (Some("4"), None)
            );
            guest.write(3, key as u8).await.unwrap();
            assert_eq!(guest.read(3).await, key as u8);
        }
        // Nor is the ring taken over with another disk once the first process is dead.
        first.host.process.node().kill();
        first.host.process.node().dead().await;
        let wrong = Daemon::start(&kernel, &xen, 5, "xen 1/xvda=raw:/small");
        // It looks for a while whether the guest is going.
        sim.sleep_ns(2_000_000_000).await;
        assert_eq!(*wrong.status.borrow(), Some(1));
        let why = "the disk has 1024 sectors, and the front end was told 2048";
        assert!(wrong.said().contains(why), "{}", wrong.said());
        let right = Daemon::start(&kernel, &xen, 6, "xen 1/xvda=raw:/a");
        assert_eq!(guest.read(3).await, 4);
        tools.take_offline(&guest).await;
        guest.close().await;
        tools.settle().await;
        assert_eq!(*right.status.borrow(), Some(0));
    });
}

#[test]
fn a_restart_waits_for_a_missing_image() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; MIB]);
        let tools = Toolstack::new(&sim, &kernel, &xen);
        let guest = Rc::new(tools.guest());
        tools.attach_with_script(&guest, "block-tapdisk", "raw:/a").await;
        tools.write(&guest, "hotplug-status", "connected").await;
        let first = Daemon::start(&kernel, &xen, 1, "xen --watch");
        guest.front.connect().await.unwrap();
        guest.write(3, 7).await.unwrap();
        first.host.process.ask_to_stop();
        tools.settle().await;
        let bytes = kernel.storage().bytes("/a").unwrap();
        let host = SimHost::start(&kernel, &xen, "administrator", 9);
        tap_host::Files::remove(&host, "/a").await.unwrap();
        let second = Daemon::start(&kernel, &xen, 2, "xen --watch");
        sim.sleep_ns(4_000_000_000).await;
        assert!(second.said().contains("/a"), "{}", second.said());
        assert_eq!(tools.back(&guest, "state").await.as_deref(), Some("4"));
        kernel.storage().put_bytes("/a", &bytes);
        assert_eq!(guest.read(3).await, 7, "{}", second.said());
    });
}

#[test]
fn a_disk_in_use_is_not_removed() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; MIB]);
        let tools = Toolstack::new(&sim, &kernel, &xen);
        let guest = tools.guest();
        tools.attach(&guest).await;
        let daemon = Daemon::start(&kernel, &xen, 1, "xen 1/xvda=raw:/a");
        guest.front.connect().await.unwrap();
        tools.take_offline(&guest).await;
        sim.sleep_ns(20_000_000_000).await;
        guest.write(3, 7).await.unwrap();
        // Linux before 5.15 sets state 5 for a mounted disk, and continues to use it.
        let state = format!("{}/state", guest.paths.frontend);
        tools.host.write(&state, b"5").await.unwrap();
        sim.sleep_ns(20_000_000_000).await;
        assert_eq!((tools.back(&guest, "state").await.as_deref(), guest.read(3).await), (Some("5"), 7));
        // A tapdisk that starts then continues to serve it, too.
        daemon.host.process.node().kill();
        daemon.host.process.node().dead().await;
        let next = Daemon::start(&kernel, &xen, 2, "xen 1/xvda=raw:/a");
        assert_eq!(guest.read(3).await, 7);
        guest.close().await;
        tools.settle().await;
        assert_eq!(tools.back(&guest, "state").await.as_deref(), Some("6"));
        assert_eq!(*next.status.borrow(), Some(0));
    });
}
