//! Graphs that are opened, and those that cannot be.

use super::Machine;
use std::rc::Rc;
use tap_core::{Node, Request, WaitsFor, ZeroFlags, wait_report};
use tap_host::{Errno, Files, IoBuf, SECTOR_BYTES, SectorRange, Tasks, VbdId};
use tap_images::{BackingPolicy, Formats, ImageFormat, OpenOptions};
use tap_mason::build::build;
use tap_mason::load::load;
use tap_mason::modules::Modules;
use tap_programs::disk::{DiskOptions, open_disk};
use tap_programs::spec::DiskSpec;

fn write(first: u64, count: u32, byte: u8) -> Request {
    let bytes = vec![byte; count as usize * SECTOR_BYTES as usize];
    Request::write(SectorRange::new(first, count), [IoBuf::copy_of(&bytes).unwrap()].into_iter().collect())
}

/// Opens the disk called `spec` with these options, and returns the error, or writes to the disk and closes it.
fn open(machine: &Machine, spec: &str, options: DiskOptions) -> Result<(), String> {
    let spec: DiskSpec = spec.parse().unwrap();
    let result = machine.within(async move |host| {
        let opened = open_disk(&host, Formats::shipped(), VbdId(1), &spec, &options).await;
        let result = match opened {
            Ok(disk) => disk.close().await.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        host.closed().await;
        result
    });
    for path in ["/a.img", "/b.img"] {
        assert_eq!(machine.kernel.storage().locks(path), [], "{path} is closed");
    }
    result
}

fn any() -> DiskOptions {
    DiskOptions { write: true, backing: BackingPolicy::any(ImageFormat::Probe), ..DiskOptions::default() }
}

#[test]
fn what_cannot_be_opened_is_said_in_a_line_and_leaves_nothing_open() {
    let machine = Machine::new();
    machine.put("/a.img", vec![0; 8192]);
    machine.put("/b.img", vec![0; 4096]);
    machine.run("tap-img create -f qcow -b a.img /q.qcow");
    let two = "vm :: disk();\nvm -> concat() => a, b;\na :: raw(\"a.img\");\nb :: raw(\"b.img\");\n";
    for (text, options, words) in [
        (two, any(), ""),
        (
            "vm :: disk();\nvm -> concat() => a, b;\na :: raw(\"a.img\");\nb :: raw(\"c.img\");\n",
            any(),
            "open /c.img: no such file or directory (ENOENT) (node b)",
        ),
        (
            two,
            DiskOptions { write: true, ..DiskOptions::default() },
            "open /a.img for node a: it may not be opened; allow it with --backing raw:/a.img",
        ),
        (
            "vm :: disk();\nvm -> a :: qcow(\"a.img\");\n",
            DiskOptions { backing: BackingPolicy::any(tap_images::formats::raw::FORMAT.into()), ..any() },
            "open /a.img for node a: it may be opened as raw, and the graph says qcow",
        ),
        (
            "vm :: disk(size = 1 MiB);\nvm -> a :: raw(\"a.img\");\n",
            any(),
            "build the graph: `vm` is impossible: it is said to have 1 MiB, and has 8 KiB",
        ),
        (
            "vm :: disk();\nvm -> slice(4 KiB .. 16 KiB) -> a :: raw(\"a.img\");\n",
            any(),
            "build the graph: `vm.slice` is impossible: it ends at 16 KiB, and the disk below it at 8 KiB",
        ),
        (
            "vm :: disk();\nvm -> concat() => a, b;\na :: raw(\"a.img\");\nb :: raw(\"b.img\");\n\
             check size(a) == size(b);\n",
            any(),
            "build the graph: this is not so: size(a), which is 8 KiB, == size(b), which is 4 KiB,",
        ),
        (
            "vm :: disk();\nvm -> a :: raw(\"a.img\");\nvm -> a;\n",
            any(),
            "open /g.mason: /g.mason:3:1: `vm` [lower] takes one disk (M3002); mason check /g.mason shows all",
        ),
        (
            "vm, vm2 :: disk();\nvm -> a :: raw(\"a.img\");\nvm2 -> b :: raw(\"b.img\");\n",
            any(),
            "open /g.mason: it offers the disks vm, vm2; name one",
        ),
    ] {
        machine.put("/g.mason", text);
        match open(&machine, "mason:/g.mason", options) {
            Ok(()) => assert_eq!(words, "", "{text}"),
            Err(found) => assert!(!words.is_empty() && found.starts_with(words), "{text}\n{found}"),
        }
    }
    assert_eq!(
        open(&machine, "mason:vm3@/g.mason", any()).unwrap_err().split(':').next(),
        Some("open /g.mason")
    );
    machine.put("/g.mason", two);
    assert_eq!(open(&machine, "mason:vm@/g.mason", any()), Ok(()));
    assert_eq!(
        open(&machine, "mason:vm9@/g.mason", any()).unwrap_err(),
        "open /g.mason: it offers no disk vm9; there is vm"
    );
}

/// Bytes of a text are not opened as an image's backing file if the image has none.
#[test]
fn a_port_for_a_backing_file_is_for_an_image_that_has_one() {
    let machine = Machine::new();
    machine.put("/a.img", vec![7; 8192]);
    machine.put("/b.img", vec![0; 4096]);
    machine.run("tap-img create -f qcow /q.qcow 8192");
    machine
        .put("/g.mason", "vm :: disk();\nvm -> q :: qcow(\"q.qcow\") -> a;\nreadonly a :: raw(\"a.img\");\n");
    assert_eq!(
        open(&machine, "mason:/g.mason", any()).unwrap_err(),
        "open /q.qcow for node q: it has no backing file, and the graph connects one"
    );
    machine.run("tap-img create -f qcow -b b.img /q.qcow 8192");
    assert_eq!(open(&machine, "mason:/g.mason", any()), Ok(()));
}

/// Nodes above do not know that they overlap.
#[test]
fn requests_of_several_parents_of_a_node_are_kept_in_order() {
    let machine = Machine::new();
    machine.put("/a.img", vec![0; 16 * SECTOR_BYTES as usize]);
    machine.put(
        "/g.mason",
        "vm :: disk();\nshared a :: raw(\"a.img\");\nvm -> concat() => s, t;\n\
         s :: slice(0 sectors .. 12 sectors);\nt :: slice(4 sectors .. 16 sectors);\ns -> a;\nt -> a;\n",
    );
    machine.within(async move |host| {
        let modules = Modules::new(Formats::shipped());
        let mut loaded = load(&host, "/g.mason", &modules.classes).await.unwrap();
        let checked = loaded.check(&modules.classes, &|_| None).unwrap();
        assert!(checked.is_good(), "{:?}", loaded.messages);
        let root = loaded.disk(&modules.classes, None).unwrap();
        let backing = BackingPolicy::any(ImageFormat::Probe);
        let options = OpenOptions { write: true, backing, ..OpenOptions::default() };
        let disk: Rc<dyn Node> =
            build(&host, &modules, &loaded.graph, &checked, root, &options).await.unwrap();
        assert_eq!(disk.info().size_sectors, 24);
        // Sector 4 of the first part is sector 0 of the second one.
        let (first, second) = (disk.submit(write(4, 8, 1)), disk.submit(write(12, 8, 2)));
        let (both, waits) = (
            tap_core::wait::joined(async move {
                let (one, other) = futures_util::future::join(first, second).await;
                assert_eq!((one.result, other.result), (Ok(()), Ok(())));
            }),
            Rc::clone(&disk),
        );
        let (task, done) = both;
        host.node().spawn("both", 0, task);
        host.yield_now().await;
        host.yield_now().await;
        let waiting = wait_report(waits);
        let tickets = waiting.iter().filter(|report| matches!(report.waits_for, WaitsFor::Tickets(_)));
        // The scheduler in between is met once from each parent.
        assert_eq!(tickets.count(), 2, "{waiting:?}");
        done.await;
        disk.close().await.unwrap();
    });
    let bytes = machine.kernel.storage().bytes("/a.img").unwrap();
    assert_eq!(bytes[4 * 512..12 * 512], [2; 8 * 512]);
}

/// They are divided by disks, not by chunks, and only memory that is there is looked at.
#[test]
fn a_request_without_data_may_be_as_long_as_the_disk() {
    let machine = Machine::new();
    machine.put("/a.img", vec![0; 4096]);
    machine.put("/b.img", vec![0; 4096]);
    machine.put(
        "/g.mason",
        "vm :: disk();\nvm -> stripe(chunk = 1 sector) => a, b;\nvolatile a :: ram(1 TiB);\nvolatile b :: ram(1 TiB);\n",
    );
    machine.within(async move |host| {
        let spec: DiskSpec = "mason:/g.mason".parse().unwrap();
        let disk = open_disk(&host, Formats::shipped(), VbdId(1), &spec, &any()).await.unwrap();
        let (node, last) = (disk.node(), u64::from(u32::MAX) - 2);
        for at in [0, 77, last - 2, last + 1] {
            assert_eq!(node.submit(write(at, 2, 9)).await.result, Ok(()));
        }
        let all = SectorRange::new(1, u32::MAX - 2);
        let zeroes = Request::write_zeroes(all, ZeroFlags::default());
        assert_eq!(node.submit(zeroes).await.result, Ok(()));
        for (at, byte) in [(0, 9), (1, 0), (77, 0), (last - 1, 0), (last, 0), (last + 1, 9)] {
            let buf = IoBuf::unpooled(SECTOR_BYTES as usize).unwrap();
            let read = Request::read(SectorRange::new(at, 1), [buf].into_iter().collect());
            let read = node.submit(read).await;
            assert!(read.result == Ok(()) && read.bufs[0].iter().all(|b| *b == byte), "sector {at}");
        }
        disk.close().await.unwrap();
    });
}

/// What is below an image stays as it is, and a disk in memory is as large as its memory.
#[test]
fn a_disk_in_memory_keeps_to_the_limit_of_the_process() {
    let machine = Machine::new();
    machine.put("/a.img", vec![0; 4096]);
    machine.put("/b.img", vec![0; 4096]);
    machine.put("/g.mason", "vm :: disk();\nvm -> r;\nvolatile r :: ram(1 GiB);\n");
    let results = machine.within(async move |host| {
        let spec: DiskSpec = "mason:/g.mason".parse().unwrap();
        let options = DiskOptions { memory: tap_host::Budget::new(1 << 20), ..any() };
        let disk = open_disk(&host, Formats::shipped(), VbdId(1), &spec, &options).await.unwrap();
        let mut results = Vec::new();
        for i in 0..40 {
            results.push(disk.node().submit(write(i * 4096, 64, 5)).await.result);
        }
        // What was released makes room.
        let all = Request::discard(SectorRange::new(0, 40 * 4096));
        assert_eq!(disk.node().submit(all).await.result, Ok(()));
        results.push(disk.node().submit(write(7, 64, 5)).await.result);
        disk.close().await.unwrap();
        results
    });
    assert_eq!((results[0], results[39], results[40]), (Ok(()), Err(Errno::ENOSPC), Ok(())));
}
