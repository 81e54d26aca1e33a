//! A host and a disk for tests: the models' processes combined, and a node in memory.

#![allow(dead_code, unreachable_pub, reason = "each test program uses a part")]

use kernel_model::{Kernel, SimHost, Storage, StorageConfig};
use sim::{Label, Sim};
use std::cell::RefCell;
use std::rc::Rc;
use tap_core::{LocalBoxFuture, Node, NodeInfo, Op, Request, Response};
use tap_host::{Bug, Errno, Mark, bytes_of, copy_from_slice, copy_to_slice};
use xen_model::{Options, Xen, XenPort};

/// The machine of a test.
#[derive(Clone)]
pub struct World {
    pub sim: Sim,
    pub xen: Xen,
    pub kernel: Kernel,
}

impl World {
    pub fn new(config: &sim::Config) -> Self {
        let sim = Sim::new(config);
        let storage = Storage::new(&sim, StorageConfig::default());
        Self { xen: Xen::new(&sim, Options::default()), kernel: Kernel::new(&sim, &storage), sim }
    }

    /// A new process of dom0.
    pub fn process(&self, name: &str, key: u64) -> SimHost {
        SimHost::start(&self.kernel, &self.xen, name, key)
    }

    /// A new domain with a process in it.
    pub fn guest(&self) -> XenPort {
        let dom = self.xen.create_domain();
        self.xen.attach(dom, &self.sim.node("guest", u64::from(dom.0)))
    }

    pub fn plant(&self, bug: &str) {
        self.kernel.plant(Bug::find(tap_ring::BUGS, bug).expect("a bug of rings"));
    }

    pub fn marked(&self, mark: &str) -> u64 {
        self.kernel.marked(Mark::find(tap_ring::MARKS, mark).expect("a mark of rings"))
    }
}

static DISK_LATE: Label = Label::new("test-disk-late", "the disk takes {} ns more");

struct DiskState {
    bytes: Vec<u8>,
    /// Everything that was asked for, in order.
    log: Vec<(Op, u64, u32)>,
    fail: Option<Errno>,
    submitted: u32,
    /// Requests that had to be durable when answered.
    durable: u32,
    /// Closing takes until this ends.
    close_held: bool,
    /// Writes take until this ends.
    writes_held: bool,
}

/// A disk in memory that outlives its processes. Requests take effect when they start and take a decided time.
#[derive(Clone)]
pub struct Disk {
    sim: Sim,
    state: Rc<RefCell<DiskState>>,
    pub read_only: bool,
    /// Takes no time.
    pub instant: bool,
}

impl Disk {
    pub fn new(sim: &Sim, size_sectors: usize) -> Self {
        let state = DiskState {
            bytes: vec![0; size_sectors * 512],
            log: vec![],
            fail: None,
            submitted: 0,
            durable: 0,
            close_held: false,
            writes_held: false,
        };
        Self { sim: sim.clone(), state: Rc::new(RefCell::new(state)), read_only: false, instant: false }
    }
    pub fn log(&self) -> Vec<(Op, u64, u32)> {
        self.state.borrow().log.clone()
    }
    pub fn durable(&self) -> u32 {
        self.state.borrow().durable
    }
    pub fn hold_writes(&self, held: bool) {
        self.state.borrow_mut().writes_held = held;
    }
    pub fn hold_close(&self, held: bool) {
        self.state.borrow_mut().close_held = held;
    }
    pub fn fail_with(&self, error: Option<Errno>) {
        self.state.borrow_mut().fail = error;
    }
    pub fn sectors(&self, start: u64, count: u64) -> Vec<u8> {
        self.state.borrow().bytes[start as usize * 512..(start + count) as usize * 512].to_vec()
    }
    pub fn node(&self) -> Rc<dyn Node> {
        Rc::new(self.clone())
    }
}

impl Node for Disk {
    fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
        let disk = self.clone();
        Box::pin(async move {
            let Request { op, range, mut bufs, fua } = request;
            let (nth, fail) = {
                let mut state = disk.state.borrow_mut();
                state.submitted += 1;
                state.durable += u32::from(fua);
                state.log.push((op, range.start.0, range.count));
                assert!(
                    op == Op::Flush || range.fits(state.bytes.len() as u64 / 512),
                    "outside the disk: {range}"
                );
                assert!(op != Op::Write || !disk.read_only, "write to a read-only disk");
                let at = range.start.0 as usize * 512;
                if op == Op::Write && state.fail.is_none() {
                    let end = at + bytes_of(&bufs);
                    copy_to_slice(&bufs, 0, &mut state.bytes[at..end]);
                }
                (state.submitted, state.fail)
            };
            let late = disk.sim.decide(disk.sim.current(), &DISK_LATE, nth, |d| d.magnitude(16));
            if !disk.instant {
                disk.sim.sleep_ns(10_000 + late).await;
            }
            while op == Op::Write && disk.state.borrow().writes_held {
                disk.sim.sleep_ns(100_000).await;
            }
            if op == Op::Read {
                let state = disk.state.borrow();
                let at = range.start.0 as usize * 512;
                copy_from_slice(&mut bufs, 0, &state.bytes[at..at + range.len_bytes() as usize]);
            }
            Response { result: fail.map_or(Ok(()), Err), bufs }
        })
    }
    fn info(&self) -> NodeInfo {
        NodeInfo::new(self.state.borrow().bytes.len() as u64 / 512, self.read_only)
    }
    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        let disk = self.clone();
        Box::pin(async move {
            while disk.state.borrow().close_held {
                disk.sim.sleep_ns(1_000_000).await;
            }
            Ok(())
        })
    }
}

pub mod front;
