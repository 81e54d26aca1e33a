//! The model of xen-blkback, by a front end that puts raw requests on its ring and a device that answers when it is
//! told to.

use kernel_model::gendisk::{BlockDriver, BlockRequest, Gendisk, QueueLimits};
use kernel_model::{Blkback, DeviceNumber, Kernel, Storage, StorageConfig};
use sim::{Config, Scheduling, Sim};
use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;
use tap_abi::blkif::{
    ENTRY_BYTES, OP_DISCARD, OP_FLUSH_DISKCACHE, OP_INDIRECT, OP_READ, OP_WRITE, OP_WRITE_BARRIER,
    STATUS_EOPNOTSUPP, STATUS_ERROR, STATUS_OKAY,
};
use tap_host::{DomId, Errno, IoKind, NbdIndex, VbdId, Watcher, Xenstore};
use xen_model::{GrantedPage, GuestRing, Options, VbdPaths, Xen, XenPort, attach_vbd, remove_vbd};

const DOM0: DomId = DomId(0);
const SIZE_SECTORS: u64 = 256;

/// A device that keeps what it gets.
#[derive(Default)]
struct Held(RefCell<Vec<Rc<BlockRequest>>>);

impl BlockDriver for Held {
    fn queue(&self, request: Rc<BlockRequest>) {
        self.0.borrow_mut().push(request);
    }
}

impl Held {
    /// What it has got so far.
    fn seen(&self) -> Vec<(IoKind, u64, u32)> {
        self.0.borrow().iter().map(|r| (r.kind, r.range.start.0, r.range.count)).collect()
    }

    /// Answers the `nth` request that it ever got.
    fn end(&self, nth: usize, result: Result<(), Errno>) {
        let request = Rc::clone(&self.0.borrow()[nth]);
        assert!(request.end(result), "request {nth} was answered before");
    }
}

/// A disk that is about to be used.
struct Place {
    sim: Sim,
    xen: Xen,
    toolstack: XenPort,
    guest: XenPort,
    paths: VbdPaths,
    disk: Gendisk,
    held: Rc<Held>,
    back: Blkback,
    ring: GuestRing,
}

fn world<F: Future<Output = ()> + 'static>(read_only: bool, body: impl FnOnce(Place) -> F + 'static) {
    scheduled(Scheduling::Fifo, read_only, body);
}

fn scheduled<F: Future<Output = ()> + 'static>(
    scheduling: Scheduling,
    read_only: bool,
    body: impl FnOnce(Place) -> F + 'static,
) {
    let sim = Sim::new(&Config { faults: false, scheduling, ..Config::new(1) });
    let kernel = Kernel::new(&sim, &Storage::new(&sim, StorageConfig::default()));
    let xen = Xen::new(&sim, Options::default());
    let own = sim.clone();
    sim.run(async move { body(Place::new(own, kernel, xen, read_only).await).await }).unwrap();
}

impl Place {
    async fn new(sim: Sim, kernel: Kernel, xen: Xen, read_only: bool) -> Self {
        let disk = kernel.nbd_disk(NbdIndex(0));
        let held = Rc::<Held>::default();
        disk.set_limits(QueueLimits { write_cache: true, max_discard_sectors: 64, ..disk.limits() });
        disk.set_driver(Rc::clone(&held) as Rc<dyn BlockDriver>);
        disk.set_size(SIZE_SECTORS);
        let dom = xen.create_domain();
        let toolstack = xen.attach(DOM0, &sim.node("toolstack", 0));
        let guest = xen.attach(dom, &sim.node("guest", 0));
        let paths = VbdPaths::new("vbd", dom, VbdId(51712));
        attach_vbd(&toolstack, dom, VbdId(51712), &paths, read_only).await.unwrap();
        let back = Blkback::probe(&kernel, &xen, dom, &paths, 0);
        let ring = GuestRing::new(&guest, DOM0).unwrap();
        let number = DeviceNumber::of_nbd(NbdIndex(0)).to_string();
        toolstack.write(&format!("{}/physical-device", paths.backend), number.as_bytes()).await.unwrap();
        assert!(back.has_opened().await);
        ring.publish_in_store(&paths.frontend).await.unwrap();
        let own = Self { sim, xen, toolstack, guest, paths, disk, held, back, ring };
        own.wait_for("state", "4").await;
        own
    }

    /// Waits until the back end has written `value` to `key`.
    async fn wait_for(&self, key: &str, value: &str) {
        let path = format!("{}/{key}", self.paths.backend);
        let watch = self.guest.watch(&path).await.unwrap();
        while self.guest.read(&path).await.as_deref() != Ok(value.as_bytes()) {
            watch.next().await.unwrap();
        }
    }

    fn page(&self, byte: u8) -> GrantedPage {
        let page = GrantedPage::new(&self.guest, DOM0, false).unwrap();
        page.page.write(0, &[byte; 4096]);
        page
    }

    /// Puts a request on the ring, and lets the back end see it.
    async fn ask(&self, entry: &[u8; ENTRY_BYTES]) {
        self.ring.put_raw(entry);
        self.ring.publish();
        self.sim.sleep_ns(2_000_000).await;
    }

    /// The next answer: identifier, operation, status.
    async fn answer(&self) -> (u64, u8, i16) {
        let response = self.ring.next().await.unwrap();
        (response.id.get(), response.op, response.status.get())
    }

    async fn is_unanswered(&self) -> bool {
        self.sim.sleep_ns(2_000_000).await;
        self.ring.take().unwrap().is_none()
    }
}

/// A request on segments (grant, first and last sector).
fn entry(op: u8, id: u64, sector: u64, segments: &[(&GrantedPage, u8, u8)]) -> [u8; ENTRY_BYTES] {
    let mut entry = [0; ENTRY_BYTES];
    (entry[0], entry[1]) = (op, segments.len() as u8);
    entry[8..16].copy_from_slice(&id.to_le_bytes());
    entry[16..24].copy_from_slice(&sector.to_le_bytes());
    for (at, segment) in (24..).step_by(8).zip(segments) {
        entry[at..at + 8].copy_from_slice(&raw(*segment));
    }
    entry
}

fn raw((page, first, last): (&GrantedPage, u8, u8)) -> [u8; 8] {
    let [a, b, c, d] = page.gref.0.to_le_bytes();
    [a, b, c, d, first, last, 0, 0]
}

#[test]
fn a_flush_passes_what_is_open_and_a_barrier_waits_for_it() {
    world(false, |at| async move {
        let page = at.page(7);
        at.ask(&entry(OP_WRITE, 1, 8, &[(&page, 2, 5)])).await;
        assert_eq!(at.held.seen(), [(IoKind::Write, 8, 4)]);
        at.held.0.borrow()[0].with(|bytes| assert_eq!(bytes, [7; 2048]));
        // With data, which goes after the flush.
        at.ask(&entry(OP_FLUSH_DISKCACHE, 2, 16, &[(&page, 0, 0)])).await;
        assert_eq!(at.held.seen()[1..], [(IoKind::Flush, 0, 0)]);
        at.held.end(1, Ok(()));
        at.sim.sleep_ns(1).await;
        assert_eq!(at.held.seen()[2..], [(IoKind::Write, 16, 1)]);
        at.held.end(2, Ok(()));
        assert_eq!(at.answer().await, (2, OP_FLUSH_DISKCACHE, STATUS_OKAY));
        at.ask(&entry(OP_WRITE_BARRIER, 3, 24, &[(&page, 0, 0)])).await;
        at.ask(&entry(OP_FLUSH_DISKCACHE, 4, 0, &[])).await;
        assert_eq!(at.held.seen().len(), 3, "the first write is open");
        at.held.end(0, Ok(()));
        assert_eq!(at.answer().await, (1, OP_WRITE, STATUS_OKAY));
        at.sim.sleep_ns(1).await;
        assert_eq!(at.held.seen()[3..], [(IoKind::Flush, 0, 0), (IoKind::Flush, 0, 0)]);
        at.held.end(4, Ok(()));
        assert_eq!(at.answer().await, (4, OP_FLUSH_DISKCACHE, STATUS_OKAY));
        at.held.end(3, Ok(()));
        at.sim.sleep_ns(1).await;
        assert_eq!(at.held.seen()[5..], [(IoKind::Write, 24, 1)]);
        at.held.end(5, Ok(()));
        assert_eq!(at.answer().await, (3, OP_WRITE_BARRIER, STATUS_OKAY));
    });
}

#[test]
fn data_of_a_read_lies_in_its_segments_when_it_is_answered() {
    world(false, |at| async move {
        let (one, two) = (at.page(9), at.page(9));
        at.ask(&entry(OP_READ, 5, 40, &[(&one, 7, 7), (&two, 0, 1)])).await;
        let request = Rc::clone(&at.held.0.borrow()[0]);
        request.with_mut(|bytes| {
            bytes[..512].fill(1);
            bytes[512..].fill(2);
        });
        request.end(Ok(()));
        assert_eq!(at.answer().await, (5, OP_READ, STATUS_OKAY));
        one.page.with(|bytes| assert!(bytes[..3584] == [9; 3584] && bytes[3584..] == [1; 512]));
        two.page.with(|bytes| assert!(bytes[..1024] == [2; 1024] && bytes[1024..] == [9; 3072]));
        assert_eq!(at.xen.mapped_from(at.guest.dom()), 1, "the ring");
    });
}

#[test]
fn errors_of_the_device_and_requests_that_make_no_sense_fail() {
    world(false, |at| async move {
        let (page, mine) = (at.page(1), GrantedPage::new(&at.guest, DomId(7), false).unwrap());
        let beyond = entry(OP_WRITE, 1, SIZE_SECTORS, &[(&page, 0, 0)]);
        let reversed = entry(OP_WRITE, 2, 0, &[(&page, 3, 2)]);
        let outside = entry(OP_READ, 3, 0, &[(&page, 3, 8)]);
        let empty = entry(OP_READ, 4, 0, &[]);
        let foreign = entry(OP_READ, 5, 0, &[(&page, 0, 7), (&mine, 0, 7)]);
        for (id, entry) in (1..).zip([beyond, reversed, outside, empty, foreign]) {
            at.ask(&entry).await;
            assert_eq!(at.answer().await, (id, entry[0], STATUS_ERROR));
        }
        at.ask(&entry(9, 6, 0, &[])).await;
        assert_eq!(at.answer().await, (6, 9, STATUS_EOPNOTSUPP));
        assert!(at.held.seen().is_empty());
        at.ask(&entry(OP_WRITE, 7, 0, &[(&page, 0, 0)])).await;
        at.held.end(0, Err(Errno::ENOSPC));
        assert_eq!(at.answer().await, (7, OP_WRITE, STATUS_ERROR));
    });
}

#[test]
fn a_disk_that_the_toolstack_has_made_read_only_is_not_changed() {
    world(true, |at| async move {
        let page = at.page(1);
        at.ask(&entry(OP_WRITE, 1, 0, &[(&page, 0, 0)])).await;
        assert_eq!(at.answer().await, (1, OP_WRITE, STATUS_ERROR));
        let info = at.guest.read(&format!("{}/info", at.paths.backend)).await;
        assert_eq!(info.as_deref(), Ok(&b"4"[..]));
        at.ask(&entry(OP_READ, 2, 0, &[(&page, 0, 0)])).await;
        assert_eq!(at.held.seen(), [(IoKind::Read, 0, 1)]);
    });
}

#[test]
fn an_indirect_request_is_one_request_of_the_device() {
    world(false, |at| async move {
        let (table, pages): (_, Vec<_>) = (at.page(0), (0..20).map(|byte| at.page(byte)).collect());
        for (nth, page) in pages.iter().enumerate() {
            table.page.write(nth * 8, &raw((page, 0, 7)));
        }
        let mut request = entry(OP_INDIRECT, 3, 0, &[]);
        (request[1], request[2]) = (OP_WRITE, 20);
        request[28..32].copy_from_slice(&table.gref.0.to_le_bytes());
        at.ask(&request).await;
        assert_eq!(at.held.seen(), [(IoKind::Write, 0, 160)]);
        at.held.0.borrow()[0].with(|bytes| {
            assert!(bytes.chunks(4096).zip(0..).all(|(page, byte)| page == [byte; 4096]));
        });
        at.held.end(0, Ok(()));
        assert_eq!(at.answer().await, (3, OP_WRITE, STATUS_OKAY));
    });
}

#[test]
fn a_discard_holds_up_what_comes_after_it() {
    world(false, |at| async move {
        let mut discard = entry(OP_DISCARD, 1, 16, &[]);
        discard[24..32].copy_from_slice(&32_u64.to_le_bytes());
        at.ask(&discard).await;
        let page = at.page(1);
        at.ask(&entry(OP_READ, 2, 0, &[(&page, 0, 0)])).await;
        assert_eq!(at.held.seen(), [(IoKind::Discard, 16, 32)]);
        at.held.end(0, Ok(()));
        assert_eq!(at.answer().await, (1, OP_DISCARD, STATUS_OKAY));
        at.sim.sleep_ns(1).await;
        assert_eq!(at.held.seen()[1..], [(IoKind::Read, 0, 1)]);
    });
}

#[test]
fn the_device_stays_open_until_the_last_request_of_a_dead_guest() {
    world(false, |at| async move {
        assert_eq!(at.disk.openers(), ["xen-blkback (vbd-1-51712)"]);
        assert!(at.disk.open("a mount", true, true).is_ok(), "its open is not exclusive");
        let page = at.page(3);
        at.ask(&entry(OP_WRITE, 1, 0, &[(&page, 0, 7)])).await;
        at.toolstack.remove(&at.paths.frontend).await.unwrap();
        at.wait_for("state", "6").await;
        at.xen.destroy_domain(at.guest.dom());
        at.sim.sleep_ns(1_000_000_000).await;
        assert_eq!(at.disk.openers().len(), 1, "a request is open");
        at.held.end(0, Ok(()));
        at.back.removed().await;
        assert!(at.disk.openers().is_empty());
        assert_eq!(at.xen.counts(DOM0).maps, 0);
    });
}

#[test]
fn a_disk_without_a_toolstack_is_forgotten() {
    world(false, |at| async move {
        remove_vbd(&at.toolstack, &at.paths).await.unwrap();
        at.back.removed().await;
        assert!(at.disk.openers().is_empty() && at.back.gave_up().is_none());
    });
}

#[test]
fn a_new_size_is_told_with_the_next_request() {
    world(false, |at| async move {
        at.disk.set_size(2 * SIZE_SECTORS);
        assert!(at.is_unanswered().await);
        let page = at.page(1);
        at.ask(&entry(OP_READ, 1, SIZE_SECTORS, &[(&page, 0, 0)])).await;
        assert_eq!(at.held.seen(), [(IoKind::Read, SIZE_SECTORS, 1)]);
        at.wait_for("sectors", "512").await;
    });
}

#[test]
fn its_requests_keep_the_order_of_the_ring() {
    scheduled(Scheduling::Random { one_in: 2, bits: 14 }, false, |at| async move {
        let page = at.page(1);
        for id in 0..8 {
            at.ring.put_raw(&entry(OP_WRITE, id, id, &[(&page, 0, 0)]));
        }
        at.ring.publish();
        at.sim.sleep_ns(1_000_000).await;
        let starts: Vec<u64> = at.held.0.borrow().iter().map(|r| r.range.start.0).collect();
        assert_eq!(starts, (0..8).collect::<Vec<u64>>());
        for nth in [7, 0] {
            at.held.end(nth, Ok(()));
            assert_eq!(at.answer().await.0, nth as u64);
        }
    });
}
