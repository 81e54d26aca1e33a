//! A blktap2 device against the models of the modules.

mod common;

use common::{Disk, World};
use kernel_model::gendisk::{Bio, Gendisk, Opener};
use kernel_model::{TapCall, TapKind, TapModule, TapTrouble};
use sim::Config;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_abi::blktap::{LAYOUT, MESSAGE};
use tap_core::{Op, wait};
use tap_host::{Budget, Errno, IoKind, SectorRange, SharedPage, SharedPages, TapDevices, TapRing};
use tap_ring::{Limits, TapConfig, TapDisk, TapError, TapNews};

const DISK_SECTORS: usize = 1024;
/// More than any test needs.
const MEMORY: usize = 64 << 20;
/// More than OpenXT's module needs to notice that the device of a closed ring is unused, in nanoseconds.
const LOOK_NS: u64 = 6_000_000_000;

fn config() -> TapConfig {
    TapConfig { records: "tap", limits: Limits::default(), read_only: false, memory: Budget::new(MEMORY) }
}

/// A module, a disk, and a process that serves it.
#[derive(Clone)]
struct Bench {
    world: World,
    module: TapModule,
    disk: Rc<Disk>,
    stop: Rc<wait::Event>,
    news: Rc<RefCell<Vec<TapNews>>>,
    end: Rc<RefCell<Option<Result<(), TapError>>>>,
    trouble: Rc<RefCell<Vec<TapTrouble>>>,
    processes: Rc<Cell<u64>>,
    /// Processes that have ended in an orderly way.
    closed: Rc<Cell<u64>>,
}

impl Bench {
    fn new(world: &World, kind: TapKind, pages: usize) -> Self {
        let module = TapModule::new(&world.sim, kind, 4, pages);
        world.kernel.load_tap(&module);
        let trouble = Rc::<RefCell<Vec<TapTrouble>>>::default();
        let seen = Rc::clone(&trouble);
        module.on_trouble(move |trouble| seen.borrow_mut().push(trouble));
        Self {
            world: world.clone(),
            module,
            disk: Rc::new(Disk::new(&world.sim, DISK_SECTORS)),
            stop: Rc::default(),
            news: Rc::default(),
            end: Rc::default(),
            trouble,
            processes: Rc::default(),
            closed: Rc::default(),
        }
    }

    /// Starts a process that serves the disk.
    fn serve(&self) -> sim::Node {
        let nth = self.processes.replace(self.processes.get() + 1);
        let host = self.world.process("tapdisk", nth);
        let (own, h) = (self.clone(), host.clone());
        let node = host.process.node().clone();
        node.spawn("main", 0, async move {
            let end = match TapDisk::open(h, config(), own.disk.node()).await {
                Err(error) => Err(error),
                Ok(tap) => {
                    let (stop, news) = (Rc::clone(&own.stop), Rc::clone(&own.news));
                    let tell = |what| news.borrow_mut().push(what);
                    let end = tap.run(async move { stop.wait().await }, tell).await;
                    *own.end.borrow_mut() = Some(end.clone());
                    tap.close().await;
                    end
                }
            };
            *own.end.borrow_mut() = Some(end);
            own.closed.set(own.closed.get() + 1);
        });
        node
    }

    async fn settle(&self) {
        self.world.sim.sleep_ns(50_000_000).await;
    }

    async fn opened(&self) -> (Gendisk, Opener) {
        self.settle().await;
        let disk = self.module.disk(0).expect("there is a device");
        let opener = disk.open("test", true, false).unwrap();
        (disk, opener)
    }

    fn nothing_is_left(&self) {
        assert_eq!((self.module.minors(), self.module.open_rings()), (vec![], vec![]));
        assert_eq!(self.world.xen.regions(), [""; 0]);
        assert_eq!(*self.trouble.borrow(), []);
    }
}

fn run<F: Future<Output = ()> + 'static>(kind: TapKind, pages: usize, body: impl FnOnce(Bench) -> F) {
    let world = World::new(&Config { faults: false, ..Config::new(1) });
    let bench = Bench::new(&world, kind, pages);
    world.sim.run(body(bench)).unwrap_or_else(|stall| panic!("{kind:?}: {stall:?}"));
}

fn write(start: u64, count: u32, byte: u8) -> Bio {
    let range = SectorRange::new(start, count);
    Bio { data: vec![byte; range.len_bytes() as usize], ..Bio::new(IoKind::Write, range) }
}

fn read(start: u64, count: u32) -> Bio {
    Bio { kind: IoKind::Read, ..write(start, count, 0) }
}

#[test]
fn a_disk_is_served_with_every_module() {
    for kind in TapKind::SERVED {
        // With few pages the queue stops again and again.
        for pages in [11, 22, 352] {
            run(kind, pages, async move |b| {
                b.serve();
                let (disk, opener) = b.opened().await;
                assert_eq!(disk.size_sectors(), DISK_SECTORS as u64);
                let writes = (0..64_u64).map(|n| opener.submit(write(n * 16, 16, n as u8)));
                for (result, _) in futures_util::future::join_all(writes).await {
                    assert_eq!(result, Ok(()), "{kind:?}");
                }
                let (result, data) = opener.submit(read(0, DISK_SECTORS as u32)).await;
                assert_eq!(result, Ok(()), "{kind:?}");
                for (n, part) in data.chunks(16 * 512).enumerate() {
                    assert!(part.iter().all(|byte| *byte == n as u8), "{kind:?}: {n}");
                }
                drop(opener);
                b.stop.set();
                b.settle().await;
                assert_eq!(*b.end.borrow(), Some(Ok(())), "{kind:?}");
                b.nothing_is_left();
            });
        }
    }
}

#[test]
fn flushes_are_offered_where_they_can_be_and_writes_are_durable_elsewhere() {
    for kind in TapKind::SERVED {
        run(kind, 352, async move |b| {
            b.serve();
            let (disk, opener) = b.opened().await;
            let flushes = kind == TapKind::OpenXt;
            assert_eq!(disk.limits().write_cache, flushes, "{kind:?}");
            assert_eq!(disk.limits().max_discard_sectors > 0, flushes, "{kind:?}");
            opener.submit(write(0, 8, 1)).await.0.unwrap();
            opener.submit(Bio::new(IoKind::Flush, SectorRange::default())).await.0.unwrap();
            let ops: Vec<_> = b.disk.log().iter().map(|(op, ..)| *op).collect();
            let expected = if flushes { vec![Op::Write, Op::Flush] } else { vec![Op::Write] };
            assert_eq!((ops, b.disk.durable()), (expected, u32::from(!flushes)), "{kind:?}");
            if flushes {
                let trim = Bio::new(IoKind::Discard, SectorRange::new(8, 1000));
                opener.submit(trim).await.0.unwrap();
                assert_eq!(b.disk.log().last(), Some(&(Op::Discard, 8, 1000)));
            }
        });
    }
}

#[test]
fn a_device_in_use_is_served_until_it_is_closed() {
    for kind in TapKind::SERVED {
        run(kind, 352, async move |b| {
            b.serve();
            let (_, opener) = b.opened().await;
            b.stop.set();
            b.settle().await;
            assert_eq!(b.news.borrow().last(), Some(&TapNews::InUse), "{kind:?}");
            opener.submit(write(0, 8, 1)).await.0.unwrap();
            drop(opener);
            b.world.sim.sleep_ns(2_000_000_000).await;
            assert_eq!(*b.end.borrow(), Some(Ok(())), "{kind:?}");
            b.nothing_is_left();
        });
    }
}

#[test]
fn what_a_dead_process_leaves_is_freed_once_it_is_unused() {
    for kind in TapKind::SERVED {
        run(kind, 352, async move |b| {
            let node = b.serve();
            let (_, opener) = b.opened().await;
            node.kill();
            b.settle().await;
            assert_eq!(opener.submit(read(0, 8)).await.0, Err(Errno::EIO), "{kind:?}");
            // The next one leaves it alone, and gets another.
            b.serve();
            b.settle().await;
            assert_eq!(b.module.minors(), [0, 1], "{kind:?}");
            drop(opener);
            // At its end there is nobody left who uses it.
            b.stop.set();
            b.world.sim.sleep_ns(LOOK_NS).await;
            b.nothing_is_left();
            b.stop.clear();
            b.serve().kill();
            let node = b.serve();
            b.settle().await;
            node.kill();
            b.settle().await;
            assert_eq!(b.module.minors(), [0], "{kind:?}");
            // The next one frees it before it takes its own.
            b.serve();
            b.settle().await;
            assert_eq!((b.module.minors(), b.world.xen.regions().len()), (vec![0], 1), "{kind:?}");
        });
    }
}

#[test]
fn a_device_of_another_is_never_freed() {
    for kind in TapKind::SERVED {
        run(kind, 352, async move |b| {
            // Pages that outlived a boot, or the module: one as they were named once, one of a token.
            let other = b.world.process("other", 9);
            for page in ["tap-0", "tap-00112233445566778899aabbccddeeff"] {
                drop(other.own_region(page).unwrap());
            }
            assert_eq!((other.allocate_tap().await, other.allocate_tap().await), (Ok(0), Ok(1)));
            other.name_tap(1, "another's").await.unwrap();
            let ring = other.open_tap(1).await.unwrap();
            b.serve();
            b.settle().await;
            assert_eq!(b.module.minors(), [0, 1, 2], "{kind:?}");
            assert_eq!(b.world.xen.regions().len(), 1, "{kind:?}: its own");
            assert_eq!(ring.page().load_u32(MESSAGE) & 0xff, 0, "{kind:?}: nobody asks for its end");
            b.stop.set();
            b.settle().await;
            assert_eq!((b.module.minors(), b.world.xen.regions()), (vec![0, 1], vec![]), "{kind:?}");
        });
    }
}

#[test]
fn modules_that_cannot_be_worked_with_are_refused() {
    for (kind, expected) in [
        (TapKind::Dkms, TapError::Unmaps),
        (TapKind::Xen2009, TapError::Name { minor: 0, error: Errno::EPERM }),
    ] {
        run(kind, 352, async move |b| {
            b.serve();
            b.settle().await;
            assert_eq!(*b.end.borrow(), Some(Err(expected)));
            b.nothing_is_left();
        });
    }
}

#[test]
fn a_removal_that_fails_for_no_known_reason_is_reported() {
    for kind in TapKind::SERVED {
        for passes in [true, false] {
            run(kind, 352, async move |b| {
                b.serve();
                b.settle().await;
                b.module.refuse(TapCall::Remove, Some(Errno::EIO));
                b.stop.set();
                b.settle().await;
                assert_eq!(*b.end.borrow(), None, "{kind:?}: it is tried again");
                if passes {
                    b.module.refuse(TapCall::Remove, None);
                }
                b.world.sim.sleep_ns(10 * LOOK_NS).await;
                let path = "/dev/xen/blktap-2/tapdev0".to_owned();
                let error = Err(TapError::Remove { path, error: Errno::EIO });
                assert_eq!(*b.end.borrow(), Some(if passes { Ok(()) } else { error }), "{kind:?}");
                assert!(!b.news.borrow().contains(&TapNews::InUse), "{kind:?}: nobody uses it");
                b.nothing_is_left();
            });
        }
    }
}

#[test]
fn a_device_that_can_neither_be_opened_nor_freed_is_freed_by_the_next_process() {
    for kind in TapKind::SERVED {
        run(kind, 352, async move |b| {
            b.module.refuse(TapCall::Open, Some(Errno::EMFILE));
            b.module.refuse(TapCall::Free, Some(Errno::ENOMEM));
            b.serve();
            b.world.sim.sleep_ns(10 * LOOK_NS).await;
            let error = TapError::Open { minor: 0, error: Errno::EMFILE };
            assert_eq!(*b.end.borrow(), Some(Err(error)), "{kind:?}");
            assert_eq!((b.module.minors(), b.world.xen.regions().len()), (vec![0], 1), "{kind:?}");
            b.module.refuse(TapCall::Open, None);
            b.module.refuse(TapCall::Free, None);
            b.serve();
            b.settle().await;
            assert_eq!((b.module.minors(), b.world.xen.regions().len()), (vec![0], 1), "{kind:?}");
            b.stop.set();
            b.settle().await;
            b.nothing_is_left();
        });
    }
}

#[test]
fn devices_of_several_processes_come_and_go_at_once() {
    for kind in TapKind::SERVED {
        run(kind, 352, async move |b| {
            // One ends while two begin.
            b.serve();
            b.settle().await;
            b.stop.set();
            b.world.sim.sleep_ns(10_000).await;
            b.stop.clear();
            b.serve();
            b.serve();
            b.settle().await;
            assert_eq!(
                b.news.borrow().iter().filter(|news| matches!(news, TapNews::Made(_))).count(),
                3,
                "{kind:?}"
            );
            assert_eq!((b.module.minors().len(), b.module.open_rings().len()), (2, 2), "{kind:?}");
            b.stop.set();
            b.settle().await;
            b.nothing_is_left();
        });
    }
}

#[test]
fn the_kernel_can_ask_to_close() {
    run(TapKind::OpenXt, 352, async move |b| {
        b.serve();
        let (_, opener) = b.opened().await;
        assert!(b.module.ask_to_close(0));
        b.settle().await;
        opener.submit(write(0, 8, 1)).await.0.unwrap();
        assert_eq!(b.news.borrow().last(), Some(&TapNews::InUse));
        drop(opener);
        b.world.sim.sleep_ns(2_000_000_000).await;
        assert_eq!(*b.end.borrow(), Some(Ok(())));
        // The module frees the number with the device only, while no ring is open: never.
        assert_eq!(b.news.borrow().last(), Some(&TapNews::NumberStays));
        assert_eq!((b.module.minors(), b.module.open_rings()), (vec![0], vec![]));
        assert_eq!(b.world.xen.regions(), [""; 0]);
        assert_eq!(*b.trouble.borrow(), []);
    });
}

#[test]
fn devices_that_starve_each_other_come_to_rest() {
    for kind in TapKind::SERVED {
        // With 11 XenServer's module forgets one of them: an entry in its list of those who wait may be of a device
        // that has gone on by itself, and takes the only wake-up.
        run(kind, 22, async move |b| {
            b.serve();
            b.settle().await;
            b.serve();
            b.settle().await;
            let disks = [0, 1].map(|minor| b.module.disk(minor).expect("both are there"));
            let openers: Vec<_> = disks.iter().map(|disk| disk.open("test", true, false).unwrap()).collect();
            let mut writes = Vec::new();
            for n in 0..64_u64 {
                openers.iter().for_each(|opener| writes.push(opener.submit(write(n * 16, 16, n as u8))));
            }
            for (result, _) in futures_util::future::join_all(writes).await {
                assert_eq!(result, Ok(()), "{kind:?}");
            }
            drop(openers);
            b.stop.set();
            b.settle().await;
            b.nothing_is_left();
        });
    }
}

#[test]
fn what_cannot_be_served_changes_nothing() {
    let world = World::new(&Config { faults: false, ..Config::new(1) });
    let host = world.process("tapdisk", 0);
    let disk = Disk::new(&world.sim, DISK_SECTORS);
    let w = world.clone();
    let body = async move {
        let refused = async |host| TapDisk::open(host, config(), disk.node()).await.err();
        assert_eq!(refused(host.clone()).await, Some(TapError::NoModule(Errno::ENOENT)));
        let module = TapModule::new(&w.sim, TapKind::XenServer, 1, 352);
        w.kernel.load_tap(&module);
        assert_eq!(host.allocate_tap().await, Ok(0));
        assert_eq!(refused(host.clone()).await, Some(TapError::Allocate(Errno::ENOMEM)));
        assert_eq!(host.free_tap(0).await, Ok(()));
        let no_memory = TapConfig { memory: Budget::new(4096), ..config() };
        let error = TapDisk::open(host.clone(), no_memory, disk.node()).await.err();
        assert!(matches!(error, Some(TapError::Memory(_))), "{error:?}");
        assert!(module.minors().is_empty() && w.xen.regions().is_empty(), "{:?}", w.xen.regions());
    };
    world.sim.run(body).unwrap();
}

#[test]
fn a_ring_that_the_kernel_fills_with_nonsense_is_given_up() {
    // No slot has the first id; the second is in flight already; the third is right.
    for (id, served) in [(32, false), (0, false), (1, true)] {
        run(TapKind::XenServer, 352, async move |b| {
            b.disk.hold_writes(true);
            b.serve();
            let (_, opener) = b.opened().await;
            let page = b.module.ring_page(0).expect("the ring is open");
            let (changed, second) = (page.clone(), LAYOUT.entry_offset(1));
            page.on_foreign_load(Some(Rc::new(move |offset, _| {
                if offset == second {
                    changed.write(second + 8, &[id]);
                }
            })));
            let writes = [opener.submit(write(0, 8, 1)), opener.submit(write(8, 8, 1))];
            let both = futures_util::future::join_all(writes);
            let (world, disk) = (b.world.clone(), Rc::clone(&b.disk));
            b.world.sim.spawn("later", 0, async move {
                world.sim.sleep_ns(10_000_000).await;
                disk.hold_writes(false);
            });
            let results: Vec<_> = both.await.into_iter().map(|(result, _)| result).collect();
            let expected = if served { Ok(()) } else { Err(Errno::EIO) };
            assert_eq!(results, [expected, expected], "{id}");
            b.settle().await;
            // It is told at once, and the kernel closes the ring once nobody has the device open.
            let refused = matches!(*b.end.borrow(), Some(Err(TapError::Refused { .. })));
            assert_eq!((refused, b.closed.get()), (!served, 0), "{id}");
            drop(opener);
            b.settle().await;
            assert_eq!(b.closed.get(), u64::from(!served), "{id}");
        });
    }
}
