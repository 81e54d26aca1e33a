//! The ring against the models: a good guest, bad guests, and processes that die.

mod common;

use common::front::{Front, ring_config, workload};
use common::{Disk, World};
use kernel_model::SimHost;
use sim::{Config, Scheduling};
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use tap_abi::blkif::{BlkifOp, BlkifRequest, Segment};
use tap_core::Op;
use tap_host::{DomId, Errno, Event, GrantRef, PAGE_BYTES, Port};
use tap_ring::{BlkifRing, ConnectError, Limits, RingCloser, RingConfig, RingEnd};
use xen_model::Counts;

const DISK_SECTORS: usize = 1024;

struct Bench {
    world: World,
    host: SimHost,
    front: Rc<Front>,
    disk: Disk,
    end: Rc<Cell<Option<RingEnd>>>,
}

impl Bench {
    fn new(world: &World) -> Self {
        let front = Front::new(&world.guest());
        let disk = Disk::new(&world.sim, DISK_SECTORS);
        Self { host: world.process("tapdisk", 0), world: world.clone(), front, disk, end: Rc::default() }
    }

    /// Connects and serves the ring as `config` says.
    fn serve(&self, config: RingConfig) -> RingCloser {
        let ring = BlkifRing::connect(self.host.clone(), config, self.disk.node()).unwrap();
        let (closer, end) = (ring.closer(), Rc::clone(&self.end));
        self.host.process.node().spawn("ring", 0, async move { end.set(Some(ring.run().await)) });
        closer
    }

    async fn settle(&self) {
        self.world.sim.sleep_ns(10_000_000).await;
    }
}

fn world<F: Future<Output = ()> + 'static>(config: &Config, body: impl FnOnce(Bench) -> F) -> World {
    let world = World::new(config);
    world.sim.run(body(Bench::new(&world))).unwrap();
    world
}

fn quiet() -> Config {
    Config { faults: false, ..Config::new(1) }
}

#[test]
fn a_workload_is_served_and_nothing_is_left() {
    for seed in 0..40 {
        let config = Config { scheduling: Scheduling::Random { one_in: 4, bits: 14 }, ..Config::new(seed) };
        world(&config, async move |b| {
            let closer = b.serve(ring_config(&b.front, Some("record")));
            workload(b.world.sim.clone(), Rc::clone(&b.front), 300, 1 + seed as usize % 32, seed)
                .await
                .unwrap();
            closer.close();
            b.settle().await;
            assert_eq!(b.end.get(), Some(RingEnd::Closed));
            assert_eq!(b.world.xen.counts(DomId(0)), Counts::default());
            assert!(b.world.xen.regions().is_empty());
        });
    }
}

#[test]
fn runs_repeat() {
    let run = |seed| {
        let body = async move |b: Bench| {
            b.serve(ring_config(&b.front, None));
            workload(b.world.sim.clone(), Rc::clone(&b.front), 100, 32, seed).await.unwrap();
        };
        world(&Config::new(seed), body).sim.trace_hash()
    };
    assert_eq!(run(3), run(3));
    assert_ne!(run(3), run(4));
}

#[test]
fn few_buffers_delay_and_never_stop() {
    let limits = Limits { buffer_bytes: PAGE_BYTES, batch: 3 };
    world(&quiet(), async move |b| {
        b.serve(RingConfig { limits, ..ring_config(&b.front, Some("record")) });
        workload(b.world.sim.clone(), Rc::clone(&b.front), 300, 32, 5).await.unwrap();
    });
}

#[test]
fn what_is_asked_and_answered_together_needs_one_event_each_way() {
    world(&quiet(), async |mut b| {
        b.disk.instant = true;
        b.serve(ring_config(&b.front, None));
        b.settle().await;
        let before = b.world.xen.notified();
        for _ in 0..10 {
            let request = |id| BlkifRequest::new(id, BlkifOp::Write, 0, &[b.front.segment(0, 0, 0)]).unwrap();
            (0..32).for_each(|id| assert!(b.front.ring.put(&request(id))));
            b.front.ring.publish();
            for _ in 0..32 {
                b.front.ring.next().await.unwrap();
            }
        }
        assert_eq!(b.world.xen.notified() - before, 20);
    });
}

#[test]
fn a_close_does_not_wait_for_a_buffer() {
    let limits = Limits { buffer_bytes: PAGE_BYTES, batch: 32 };
    world(&quiet(), async move |b| {
        let closer = b.serve(RingConfig { limits, ..ring_config(&b.front, Some("record")) });
        let request = |id| BlkifRequest::new(id, BlkifOp::Write, 0, &[b.front.segment(0, 0, 7)]).unwrap();
        (0..32).for_each(|id| assert!(b.front.ring.put(&request(id))));
        b.front.ring.publish();
        b.world.sim.sleep_ns(5_000).await;
        closer.close();
        b.settle().await;
        assert_eq!((b.end.get(), b.disk.log().len()), (Some(RingEnd::Closed), 1));
        assert!(b.front.ring.take().unwrap().is_some() && b.front.ring.take().unwrap().is_none());
    });
}

#[test]
fn answers_go_out_while_a_request_waits_for_a_buffer() {
    let limits = Limits { buffer_bytes: PAGE_BYTES, batch: 32 };
    world(&quiet(), async move |b| {
        b.disk.hold_writes(true);
        b.serve(RingConfig { limits, ..ring_config(&b.front, Some("record")) });
        let write = |id| BlkifRequest::new(id, BlkifOp::Write, 0, &[b.front.segment(0, 0, 7)]).unwrap();
        let flush = BlkifRequest::new(2, BlkifOp::Flush, 0, &[]).unwrap();
        for request in [write(1), flush, write(3)] {
            assert!(b.front.ring.put(&request));
        }
        b.front.ring.publish();
        b.settle().await;
        assert_eq!(b.front.ring.take().unwrap().map(|answer| answer.id.get()), Some(2));
        assert!(b.front.ring.take().unwrap().is_none());
        b.disk.hold_writes(false);
        b.settle().await;
        assert!(b.front.ring.take().unwrap().is_some() && b.front.ring.take().unwrap().is_some());
    });
}

/// Entries that are nearly right, with random bytes in random places.
fn almost(front: &Front, bits: u64) -> [u8; 112] {
    let count = 1 + (bits >> 8) % 11;
    let segments: Vec<Segment> = (0..count).map(|page| front.segment(page as usize, 0, 7)).collect();
    let op = [BlkifOp::Read, BlkifOp::Write, BlkifOp::Flush][bits as usize % 3];
    let mut entry = BlkifRequest::new(bits, op, (bits >> 16) % 1100, &segments).unwrap().encode();
    for nth in 0..(bits >> 40) % 4 {
        let byte = sim::mix2(bits, nth);
        entry[byte as usize % 112] = (byte >> 8) as u8;
    }
    entry
}

#[test]
fn whatever_a_guest_writes_the_disk_sees_only_what_is_right() {
    // The disk asserts that what it is asked for lies within it and may be written.
    let mut refused = 0;
    for seed in 0..300 {
        let config = Config { scheduling: Scheduling::Random { one_in: 4, bits: 14 }, ..Config::new(seed) };
        let limits = Limits { buffer_bytes: 64 << 10, batch: 1 + seed as u32 % 8 };
        let world = world(&config, async move |mut b| {
            b.disk.read_only = seed % 5 == 0;
            let closer = b.serve(RingConfig { limits, ..ring_config(&b.front, Some("record")) });
            let (hostile, nth_load) = (Rc::clone(&b.front), Cell::new(0));
            b.front.ring.page().on_foreign_load(Some(Rc::new(move |offset, _| {
                nth_load.set(nth_load.get() + 1);
                let bits = sim::mix2(seed, nth_load.get());
                if offset >= 64 && bits.is_multiple_of(4) {
                    hostile.ring.page().write(offset, &almost(&hostile, bits));
                }
            })));
            for nth in 0..60 {
                let bits = sim::mix2(seed ^ 0xbad, nth);
                b.front.ring.put_raw(&almost(&b.front, bits));
                match bits % 16 {
                    0 if seed % 3 == 0 => {
                        b.front.ring.page().store_u32((bits >> 8) as usize % 4 * 4, (bits >> 16) as u32 % 64)
                    }
                    0..8 => b.world.sim.sleep_ns(bits >> 46).await,
                    _ => {}
                }
                if b.front.ring.outstanding() > 24 {
                    b.settle().await;
                }
                b.front.ring.publish();
                while let Ok(Some(_)) = b.front.ring.take() {}
            }
            b.settle().await;
            closer.close();
            b.settle().await;
            assert!(b.end.get().is_some(), "seed {seed}");
            assert_eq!(b.world.xen.counts(DomId(0)), Counts::default());
            // The hook holds the ring, which holds the hook.
            b.front.ring.page().on_foreign_load(None);
        });
        refused += world.marked("request-refused");
    }
    assert!(refused > 1000, "{refused}");
}

#[test]
fn a_request_of_eleven_pages_and_parts_of_pages() {
    world(&quiet(), async |b| {
        b.serve(ring_config(&b.front, None));
        for page in 0..11 {
            b.front.pages[page].page.write(0, &[page as u8 + 1; PAGE_BYTES]);
        }
        let mut segments: Vec<Segment> = (0..11).map(|page| b.front.segment(page, 0, 7)).collect();
        segments[3] = b.front.segment(3, 2, 4);
        let write = BlkifRequest::new(7, BlkifOp::Write, 100, &segments).unwrap();
        assert_eq!(b.front.status(&write).await, 0);
        assert_eq!(b.disk.log(), [(Op::Write, 100, 83)]);
        assert_eq!(b.disk.sectors(124, 4), [[4; 1536].as_slice(), &[5; 512]].concat());
        let read = BlkifRequest::new(8, BlkifOp::Read, 124, &[b.front.segment(20, 1, 4)]).unwrap();
        assert_eq!(b.front.status(&read).await, 0);
        let mut got = [9; PAGE_BYTES];
        b.front.pages[20].page.read(0, &mut got);
        assert!(got[..512] == [0; 512] && got[512..2048] == [4; 1536] && got[2048..2560] == [5; 512]);
        assert!(got[2560..].iter().all(|b| *b == 0), "beyond its segment");
    });
}

#[test]
fn flushes_with_and_without_data() {
    world(&quiet(), async |b| {
        b.serve(ring_config(&b.front, None));
        let flush = |id, segments: &[Segment]| BlkifRequest::new(id, BlkifOp::Flush, 8, segments).unwrap();
        // Without data the sector means nothing.
        let pure = BlkifRequest::new(1, BlkifOp::Flush, u64::MAX, &[]).unwrap();
        assert_eq!(b.front.status(&pure).await, 0);
        assert_eq!(b.front.status(&flush(2, &[b.front.segment(0, 0, 7)])).await, 0);
        assert_eq!(
            b.disk.log(),
            [(Op::Flush, 0, 0), (Op::Flush, 0, 0), (Op::Write, 8, 8), (Op::Flush, 0, 0)]
        );
    });
}

#[test]
fn malformed_requests_are_answered_with_errors_and_touch_nothing() {
    let world = world(&quiet(), async |b| {
        b.serve(ring_config(&b.front, Some("record")));
        let size = DISK_SECTORS as u64;
        let page = b.front.segment(0, 0, 7);
        let good = |op, sector, segment| BlkifRequest::new(5, op, sector, &[segment]).unwrap();
        for sector in [size - 7, size, u64::MAX, u64::MAX - 7] {
            assert_eq!(b.front.status(&good(BlkifOp::Read, sector, page)).await, -1);
            assert_eq!(b.front.status(&good(BlkifOp::Write, sector, page)).await, -1);
            assert_eq!(b.front.status(&good(BlkifOp::Flush, sector, page)).await, -1);
        }
        // No such grant: before the disk is asked, or after.
        let absent = Segment { gref: 4000, first: 0, last: 7 };
        assert_eq!(b.front.status(&good(BlkifOp::Write, 0, absent)).await, -1);
        assert!(b.disk.log().is_empty());
        assert_eq!(b.front.status(&good(BlkifOp::Read, 0, absent)).await, -1);
        let entry = good(BlkifOp::Read, 0, page).encode();
        for (at, value, status) in
            [(0, 2, -2), (0, 6, -2), (0, 77, -2), (1, 0, -1), (1, 12, -1), (28, 8, -1), (29, 8, -1)]
        {
            let mut bad = entry;
            bad[at] = value;
            assert_eq!(b.front.call_raw(&bad).await.status.get(), status, "{at} {value}");
        }
        // The ring is as good as before.
        workload(b.world.sim.clone(), Rc::clone(&b.front), 50, 32, 1).await.unwrap();
    });
    assert_eq!(world.marked("request-refused"), 12 + 2 + 7);
    assert_eq!(world.marked("ring-refused"), 0);
}

#[test]
fn a_read_only_disk_is_not_written() {
    for node_says_so in [false, true] {
        world(&quiet(), async move |mut b| {
            b.disk.read_only = node_says_so;
            b.serve(RingConfig { read_only: !node_says_so, ..ring_config(&b.front, None) });
            let request = |op| BlkifRequest::new(1, op, 0, &[b.front.segment(0, 0, 0)]).unwrap();
            assert_eq!(b.front.status(&request(BlkifOp::Write)).await, -1);
            assert_eq!(b.front.status(&request(BlkifOp::Flush)).await, -1);
            assert_eq!(b.front.status(&request(BlkifOp::Read)).await, 0);
            assert_eq!(b.disk.log(), [(Op::Read, 0, 1)]);
        });
    }
}

#[test]
fn errors_of_the_disk_reach_the_guest_and_the_log() {
    world(&quiet(), async |b| {
        let logged = Rc::<RefCell<Vec<_>>>::default();
        let own = Rc::clone(&logged);
        b.world.kernel.on_event(move |_, event| {
            if matches!(event, Event::RequestFailed { .. }) {
                own.borrow_mut().push(event.to_string());
            }
        });
        b.serve(ring_config(&b.front, None));
        let write = BlkifRequest::new(1, BlkifOp::Write, 0, &[b.front.segment(0, 0, 0)]).unwrap();
        for (error, status) in [(Errno::EIO, -1), (Errno::EOPNOTSUPP, -2), (Errno::ENOSPC, -1)] {
            b.disk.fail_with(Some(error));
            assert_eq!(b.front.status(&write).await, status);
        }
        b.disk.fail_with(None);
        assert_eq!(b.front.status(&write).await, 0);
        // What a disk cannot do is no failure of it.
        let failed = |error: Errno| format!("vbd51712 failed to write 0+1: {error}");
        assert_eq!(*logged.borrow(), [Errno::EIO, Errno::ENOSPC].map(failed));
    });
}

#[test]
fn impossible_indices_close_the_ring() {
    for producer in [33, 1000, u32::MAX, 0x8000_0000] {
        let world = world(&quiet(), async move |b| {
            b.serve(ring_config(&b.front, Some("record")));
            b.settle().await;
            b.front.ring.page().store_u32(0, producer);
            xen_notify(&b);
            b.settle().await;
            assert!(matches!(b.end.get(), Some(RingEnd::Refused(_))), "{producer}");
            assert_eq!(b.world.xen.counts(DomId(0)), Counts::default());
            // The next process must refuse it, too, if this one dies before the front end is told.
            assert_eq!(b.world.xen.regions(), ["record"]);
        });
        assert_eq!(world.marked("ring-refused"), 1);
    }
}

#[test]
fn a_producer_that_goes_back_closes_the_ring_after_what_is_in_flight() {
    world(&quiet(), async |b| {
        b.serve(ring_config(&b.front, None));
        workload(b.world.sim.clone(), Rc::clone(&b.front), 10, 4, 1).await.unwrap();
        let request = BlkifRequest::new(1, BlkifOp::Write, 0, &[b.front.segment(0, 0, 0)]).unwrap();
        b.front.ring.put(&request);
        b.front.ring.publish();
        b.world.sim.sleep_ns(5_000).await;
        b.front.ring.page().store_u32(0, 10);
        xen_notify(&b);
        b.settle().await;
        assert!(matches!(b.end.get(), Some(RingEnd::Refused(_))));
        assert!(b.front.ring.take().unwrap().is_none(), "no answer on a ring that was refused");
        assert_eq!(b.world.xen.counts(DomId(0)), Counts::default());
    });
}

fn xen_notify(b: &Bench) {
    tap_host::EventChannel::notify(b.front.ring.channel());
}

#[test]
fn an_entry_is_loaded_once() {
    // The guest changes each entry after its first load to something outside the disk, or to a write.
    let attack = |bug: Option<&'static str>| {
        let reached = Rc::new(RefCell::new(Vec::new()));
        let log = Rc::clone(&reached);
        world(&quiet(), async move |b| {
            if let Some(bug) = bug {
                b.world.plant(bug);
            }
            b.serve(RingConfig { read_only: true, ..ring_config(&b.front, None) });
            b.settle().await;
            let (page, seen) = (b.front.ring.page().clone(), Rc::new(Cell::new(0)));
            b.front.ring.page().on_foreign_load(Some(Rc::new(move |offset, len| {
                if offset >= 64 && len > 4 && seen.replace(seen.get() + 1) > 0 {
                    page.write(offset, &[1]);
                }
            })));
            let request = BlkifRequest::new(1, BlkifOp::Read, 0, &[b.front.segment(0, 0, 0)]).unwrap();
            b.front.ring.put(&request);
            b.front.ring.publish();
            b.settle().await;
            *log.borrow_mut() = b.disk.log();
        });
        reached.take()
    };
    assert_eq!(attack(None), [(Op::Read, 0, 1)]);
    assert_eq!(attack(Some("ring-read-twice")), [(Op::Write, 0, 1)]);
}

#[test]
fn a_close_answers_what_was_taken_and_leaves_the_rest() {
    world(&quiet(), async |b| {
        let closer = b.serve(ring_config(&b.front, Some("record")));
        b.settle().await;
        let request = |id| BlkifRequest::new(id, BlkifOp::Write, 0, &[b.front.segment(0, 0, 0)]).unwrap();
        (0..5).for_each(|id| assert!(b.front.ring.put(&request(id))));
        b.front.ring.publish();
        b.world.sim.sleep_ns(5_000).await;
        closer.close();
        b.front.ring.put(&request(9));
        b.front.ring.publish();
        b.settle().await;
        assert_eq!(b.end.get(), Some(RingEnd::Closed));
        let mut ids = Vec::new();
        while let Some(response) = b.front.ring.take().unwrap() {
            ids.push(response.id.get());
        }
        ids.sort_unstable();
        assert_eq!(ids, [0, 1, 2, 3, 4]);
    });
}

#[test]
fn what_cannot_be_connected_leaves_nothing_behind() {
    for leak in [false, true] {
        world(&quiet(), async move |b| {
            if leak {
                b.world.plant("grant-leaked");
            }
            let good = ring_config(&b.front, Some("record"));
            let connect = |config| BlkifRing::connect(b.host.clone(), config, b.disk.node()).err();
            let no_page = connect(RingConfig { ring_ref: GrantRef(9999), ..good.clone() });
            assert!(matches!(no_page, Some(ConnectError::Map { error: Errno::EINVAL, .. })));
            let no_port = connect(RingConfig { port: Port(77), ..good.clone() });
            assert!(matches!(no_port, Some(ConnectError::Bind { error: Errno::EINVAL, .. })));
            b.front.ring.page().store_u32(8, 1);
            assert_eq!(connect(good.clone()), Some(ConnectError::InUse));
            assert_eq!(connect(RingConfig { record: None, ..good }), Some(ConnectError::InUse));
            assert_eq!(b.world.xen.counts(DomId(0)).maps, u32::from(leak));
            assert_eq!(b.world.xen.counts(DomId(0)).channels, 0);
            assert!(b.world.xen.regions().is_empty());
        });
    }
}
