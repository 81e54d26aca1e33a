//! Linux's block back end, xen-blkback: a guest's disk over any block device of the host.
//!
//! ```text
//!   front end ══ ring ══ Ring (the thread of a disk) ── Bio ──► Opener ─► Gendisk ─► nbd or blktap2
//!   xenstore  ◄── states, keys ──► Vbd ── opens, closes ─────────┘
//! ```
//!
//! Written from the behaviour of Linux 6.1, not from its code, and separately from the stack's own back end.
//!
//! # Contract
//!
//! * It has the device open from the moment that a toolstack names it until the vbd is removed and its last request is
//!   answered, through all reconnects of the front end. The open is not exclusive: another exclusive one succeeds.
//! * It offers flushes and barriers if the device has a write cache, and discards if the device has them.
//! * Requests go to the device in the order of the ring, and are answered in the order in which the device ends them. A
//!   flush is for what was answered before. A barrier waits for all earlier requests first. The data of either is
//!   written after the flush, and is not durable by itself.
//! * An error of the device is an error of the whole request. After a request that it refuses it rests for a moment.
//! * The size is looked at while requests come: one that has changed is written to xenstore.
//!
//! Absent: several queues or pages for a ring, and persistent grants, which an administrator can switch off, and which
//! the model says are off; the 32-bit layout.

mod request;
mod ring;

use crate::SimHost;
use crate::device_number::DeviceNumber;
use crate::gendisk::Opener;
use crate::process::Kernel;
use ring::Ring;
use sim::Node;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use tap_abi::blkif::INFO_READ_ONLY;
use tap_host::{
    DomId, Either, Errno, Events, GrantRef, Grants, OneWaiter, Port, Transaction, Watcher, Xenstore, select,
};
use xen_model::{VbdPaths, Xen};

/// States of either end, as numbers in xenstore. 0 stands for an end that is not there.
const GONE: u8 = 0;
const INITIALISING: u8 = 1;
const INIT_WAIT: u8 = 2;
const INITIALISED: u8 = 3;
const CONNECTED: u8 = 4;
const CLOSING: u8 = 5;
const CLOSED: u8 = 6;

/// What it announces before there is a device.
const ANNOUNCED: [(&str, &str); 3] =
    [("feature-max-indirect-segments", "256"), ("multi-queue-max-queues", "1"), ("max-ring-page-order", "0")];

/// The device of a disk.
struct Device {
    opener: Opener,
    /// The toolstack lets the guest read only.
    read_only: bool,
    /// The size that the front end was told, in sectors.
    size_sectors: Cell<u64>,
}

/// One disk of a guest.
struct Vbd {
    host: SimHost,
    guest: DomId,
    paths: VbdPaths,
    name: String,
    /// Its own state; what others write in its place does not count.
    state: Cell<u8>,
    device: RefCell<Option<Rc<Device>>>,
    /// The device cannot be opened, or it is open.
    looked: Cell<bool>,
    ring: RefCell<Option<Rc<Ring>>>,
    why: RefCell<Option<String>>,
    removed: Cell<bool>,
    /// Waits for a device, then for the removal.
    watcher: OneWaiter,
}

/// The back end of one disk; clones share it.
#[derive(Clone)]
pub struct Blkback(Rc<Vbd>);

impl Blkback {
    /// Finds the vbd in `paths`, which a toolstack has made for `guest`. `key` tells it from others of the same world.
    pub fn probe(kernel: &Kernel, xen: &Xen, guest: DomId, paths: &VbdPaths, key: u64) -> Self {
        let number = paths.backend.rsplit('/').next().unwrap_or_default();
        let vbd = Rc::new(Vbd {
            host: SimHost::start(kernel, xen, "xen-blkback", key),
            guest,
            paths: paths.clone(),
            name: format!("vbd-{}-{number}", guest.0),
            state: Cell::new(INITIALISING),
            device: RefCell::default(),
            looked: Cell::new(false),
            ring: RefCell::default(),
            why: RefCell::default(),
            removed: Cell::new(false),
            watcher: OneWaiter::default(),
        });
        let own = Rc::clone(&vbd);
        vbd.node().spawn("xenwatch", 0, async move { own.drive().await });
        Self(vbd)
    }

    /// Its part of the kernel, which ends with the host.
    pub fn node(&self) -> &Node {
        self.0.node()
    }

    /// Waits until it has opened the device that the toolstack has named, or has failed to; whether it has it open.
    pub async fn has_opened(&self) -> bool {
        let vbd = &self.0;
        poll_fn(|cx| vbd.wait_until(vbd.looked.get() || vbd.removed.get(), cx)).await;
        vbd.device.borrow().is_some()
    }

    /// Waits until it has forgotten the vbd: nothing of the guest is mapped, and the device is closed.
    pub async fn removed(&self) {
        poll_fn(|cx| self.0.wait_until(self.0.removed.get(), cx)).await;
    }

    /// Why it gave the disk up, as it says in the kernel's log.
    pub fn gave_up(&self) -> Option<String> {
        self.0.why.borrow().clone()
    }
}

impl Vbd {
    fn node(&self) -> &Node {
        self.host.process.node()
    }

    fn wait_until(&self, is_so: bool, cx: &std::task::Context<'_>) -> Poll<()> {
        if is_so {
            return Poll::Ready(());
        }
        self.watcher.wait(cx.waker());
        Poll::Pending
    }

    async fn drive(self: Rc<Self>) {
        if let Err(error) = self.live().await {
            self.note(format!("xenstore fails: {error}"));
        }
        self.remove().await;
    }

    /// Follows the front end and the toolstack until the vbd is to be removed.
    async fn live(self: &Rc<Self>) -> Result<(), Errno> {
        for (key, value) in ANNOUNCED {
            self.host.write(&self.own(key), value.as_bytes()).await?;
        }
        self.set_state(INIT_WAIT).await?;
        let own = self.host.watch(&self.paths.backend).await?;
        let front = self.host.watch(&self.other("state")).await?;
        let mut seen = INITIALISING;
        loop {
            let (Either::First(event) | Either::Second(event)) = select(own.next(), front.next()).await;
            event?;
            if self.read(&self.own("frontend")).await?.is_none() {
                return Ok(());
            }
            let found = self.find_device().await?;
            let state = self.number(&self.other("state")).await?.map_or(GONE, |state| state as u8);
            if state != seen {
                seen = state;
                if !self.front_changed(state).await? {
                    return Ok(());
                }
            } else if found {
                self.may_connect().await?;
            }
        }
    }

    fn own(&self, key: &str) -> String {
        format!("{}/{key}", self.paths.backend)
    }

    fn other(&self, key: &str) -> String {
        format!("{}/{key}", self.paths.frontend)
    }

    async fn read(&self, path: &str) -> Result<Option<String>, Errno> {
        match self.host.read(path).await {
            Ok(value) => Ok(Some(String::from_utf8_lossy(&value).into_owned())),
            Err(Errno::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn number(&self, path: &str) -> Result<Option<u32>, Errno> {
        Ok(self.read(path).await?.and_then(|value| value.parse().ok()))
    }

    /// Writes `pairs`, as they are at each attempt, into its directory, unless the directory has gone.
    async fn write_all(&self, pairs: impl Fn() -> Vec<(&'static str, String)>) -> Result<(), Errno> {
        loop {
            let tx = self.host.transaction().await?;
            match tx.read(&self.own("frontend")).await {
                Err(Errno::ENOENT) => return Ok(()),
                there => there?,
            };
            for (key, value) in pairs() {
                tx.write(&self.own(key), value.as_bytes()).await?;
            }
            match tx.commit().await {
                Err(Errno::EAGAIN) => {}
                result => return result,
            }
        }
    }

    async fn set_state(&self, state: u8) -> Result<(), Errno> {
        if self.state.replace(state) == state {
            return Ok(());
        }
        self.write_all(|| vec![("state", state.to_string())]).await
    }

    fn note(&self, why: String) {
        self.host.process.sim().remark(&self.name, || why.clone());
        self.why.borrow_mut().get_or_insert(why);
    }

    /// The disk cannot be served.
    async fn give_up(&self, why: String) -> Result<(), Errno> {
        self.note(why);
        self.set_state(CLOSING).await
    }

    /// Opens the device once the toolstack has named it; whether it was opened now.
    async fn find_device(&self) -> Result<bool, Errno> {
        if self.looked.get() {
            return Ok(false);
        }
        let Some(text) = self.read(&self.own("physical-device")).await? else { return Ok(false) };
        let mode = self.read(&self.own("mode")).await?.unwrap_or_default();
        let read_only = !mode.contains('w');
        let disk =
            DeviceNumber::parse(&text).and_then(|number| self.host.process.kernel().block_device(number));
        let opened = disk
            .ok_or(Errno::ENXIO)
            .and_then(|disk| disk.open(&format!("xen-blkback ({})", self.name), !read_only, false));
        self.looked.set(true);
        let result = match opened {
            Ok(opener) => {
                let size_sectors = Cell::new(opener.disk().size_sectors());
                *self.device.borrow_mut() = Some(Rc::new(Device { opener, read_only, size_sectors }));
                Ok(true)
            }
            Err(error) => {
                self.give_up(format!("device {text} cannot be opened: {error}")).await.and(Ok(false))
            }
        };
        self.watcher.wake();
        result
    }

    /// The front end has another state. Returns whether the vbd stays.
    async fn front_changed(self: &Rc<Self>, state: u8) -> Result<bool, Errno> {
        match state {
            INITIALISING if self.state.get() == CLOSED => self.set_state(INIT_WAIT).await?,
            INITIALISED | CONNECTED if self.state.get() != CONNECTED => {
                if self.disconnect().await {
                    self.connect_ring().await?;
                    self.may_connect().await?;
                } else {
                    self.give_up("requests of the front end's last ring are not answered".into()).await?;
                }
            }
            CLOSING => self.set_state(CLOSING).await?,
            CLOSED => {
                // A ring with requests that the device has is released when they are answered.
                self.disconnect().await;
                self.set_state(CLOSED).await?;
                return Ok(self.number(&self.own("online")).await? == Some(1));
            }
            GONE => return Ok(false),
            _ => {}
        }
        Ok(true)
    }

    /// Maps the ring that the front end has published.
    async fn connect_ring(&self) -> Result<(), Errno> {
        let number = async |key: &str| self.number(&self.other(key)).await;
        if number("ring-page-order").await?.unwrap_or(0) > 0
            || number("multi-queue-num-queues").await?.unwrap_or(1) != 1
        {
            return self.give_up("the front end wants more pages or queues than were offered".into()).await;
        }
        let protocol = self.read(&self.other("protocol")).await?;
        if protocol.as_deref().is_some_and(|protocol| protocol != "x86_64-abi") {
            return self.give_up(format!("unknown protocol {protocol:?}")).await;
        }
        // A front end that counts its pages numbers them; what an earlier one has left is taken for its own.
        let gref = match number("ring-ref0").await? {
            None => number("ring-ref").await?,
            first => first,
        };
        let (Some(gref), Some(port)) = (gref, number("event-channel").await?) else {
            return self.give_up("the front end has published no ring".into()).await;
        };
        let page = self.host.map(self.guest, GrantRef(gref), true);
        let bound = page.and_then(|page| Ok((page, self.host.bind_interdomain(self.guest, Port(port))?)));
        match bound {
            Ok((page, channel)) => {
                *self.ring.borrow_mut() = Some(Rc::new(Ring::new(&self.host, self.guest, page, channel)));
                Ok(())
            }
            Err(error) => self.give_up(format!("the ring {gref} cannot be mapped: {error}")).await,
        }
    }

    /// Connects if there are a device and a ring.
    async fn may_connect(self: &Rc<Self>) -> Result<(), Errno> {
        let (device, ring) = (self.device.borrow().clone(), self.ring.borrow().clone());
        let (Some(device), Some(ring)) = (device, ring) else { return Ok(()) };
        if self.state.get() == CONNECTED {
            return Ok(());
        }
        let disk = device.opener.disk();
        let (limits, size) = (disk.limits(), disk.size_sectors());
        device.size_sectors.set(size);
        let yes_or_no = |is_so: bool| u8::from(is_so).to_string();
        let discards = limits.max_discard_sectors > 0;
        let mut pairs = vec![
            ("feature-flush-cache", yes_or_no(limits.write_cache)),
            ("feature-barrier", yes_or_no(limits.write_cache)),
            ("feature-discard", yes_or_no(discards)),
            ("feature-persistent", "0".into()),
            ("sectors", size.to_string()),
            ("info", (if device.read_only { INFO_READ_ONLY } else { 0 }).to_string()),
            ("sector-size", limits.logical_block_bytes.to_string()),
            ("physical-sector-size", limits.logical_block_bytes.to_string()),
        ];
        if discards {
            pairs.push(("discard-granularity", limits.logical_block_bytes.to_string()));
            pairs.push(("discard-alignment", "0".into()));
        }
        self.write_all(|| pairs.clone()).await?;
        self.set_state(CONNECTED).await?;
        ring.start(self, &device);
        Ok(())
    }

    /// Tells the front end about a size that has changed, by a state that has not.
    async fn tell_size(&self, device: &Device) -> Result<(), Errno> {
        let size = device.opener.disk().size_sectors();
        if device.size_sectors.replace(size) == size {
            return Ok(());
        }
        let told = || vec![("sectors", size.to_string()), ("state", self.state.get().to_string())];
        self.write_all(told).await
    }

    /// Ends the thread, and releases the ring if none of its requests is open; whether it was.
    async fn disconnect(&self) -> bool {
        let Some(ring) = self.ring.borrow().clone() else { return true };
        ring.stop().await;
        let idle = ring.is_idle();
        if idle {
            self.ring.take();
        }
        idle
    }

    async fn remove(&self) {
        self.disconnect().await;
        if let Err(error) = self.set_state(CLOSED).await {
            self.note(format!("xenstore fails: {error}"));
        }
        let ring = self.ring.borrow().clone();
        if let Some(ring) = ring {
            ring.idle().await;
        }
        self.ring.take();
        self.device.take();
        self.removed.set(true);
        self.watcher.wake();
    }
}
