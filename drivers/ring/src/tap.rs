//! A blktap2 device, from its reservation to its end.
//!
//! ```text
//!   allocate ─► open, map ─┬─► create ──► in use ──► asked to stop ──► remove ─┐
//!                          │                                 └─ busy: later ◄──┤
//!                          └─► the ring is served all the time ────────────────┴─► close ─► free
//! ```
//!
//! The ring is served before the device exists: whoever learns of it first reads it at once, and the call that makes it
//! may wait for that.
//!
//! The kernel does not free a device whose process has died. A page with the device's name, which the process owns as
//! long as it lives, tells others which devices are left: each process frees those at its start, and at its end those
//! that had users until then.

use crate::config::{LAYOUT, Limits};
use crate::end::RingEnd;
use crate::kernel::Kernel;
use crate::ring::{Parts, Ring};
use crate::serve::Target;
use std::cell::Cell;
use std::rc::Rc;
use tap_abi::blkif::MAX_SEGMENTS;
use tap_abi::blktap::{DeviceParams, FLAG_FLUSH, FLAG_TRIM, OldDeviceParams};
use tap_core::{Node, wait};
use tap_host::{
    Budget, BufPool, DomId, Errno, Event, Log, PAGE_BYTES, Patience, Probe, SharedPages, TapDevices, TapRing,
    Tasks, Time, VbdId, cost_of, select,
};

tap_host::listed! {
    pub(super) BUGS: Bug;
    TAP_ONE_LAYOUT = "tap-one-layout",
        "the size of physical blocks is stated only where one of two kinds of modules reads it";
    TAP_WRITE_BACK = "tap-write-back",
        "writes are not durable when they are answered, although the module has no flushes";
    TAP_FREED_FIRST = "tap-freed-first", "a device is freed before its ring is closed, and not afterwards";
    TAP_CLOSED_IN_USE = "tap-closed-in-use", "a ring is closed although its device cannot be removed yet";
    TAP_STALE_STAYS = "tap-stale-stays", "the devices that dead processes left are not freed";
    TAP_OPEN_FAILED = "tap-open-failed", "a device whose ring cannot be opened is not freed";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    TAP_OLD_CALL = "tap-old-call", "a device was made with the call of older modules";
    TAP_IN_USE = "tap-in-use", "a device could not be removed yet, because it was in use";
    TAP_STALE = "tap-stale", "a device that a dead process had left was freed";
    TAP_ASKED = "tap-asked", "the kernel asked to close a device";
}

/// How to serve a device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TapConfig {
    /// A name for people, for old modules.
    pub name: String,
    /// Prefix of the names of pages that say which devices are ours ([`SharedPages`]).
    pub records: &'static str,
    /// Memory and fairness.
    pub limits: Limits,
    /// Writes are refused, even if the node would accept them.
    pub read_only: bool,
    /// The budget from which data buffers are taken, within the limits.
    pub memory: Budget,
}

/// What the device offers to its users.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TapOffers {
    /// Flushes; without them every write is durable when it is answered.
    pub flush: bool,
    /// Discards.
    pub trim: bool,
}

/// Why a device could not be served.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TapError {
    /// There is no memory for a single request.
    #[error("take memory for the device: {0}; give more (--memory)")]
    Memory(Errno),
    /// There is no module.
    #[error(
        "find a blktap2 module in the kernel: {0}; load it (modprobe blktap), or use the nbd driver (--via nbd)"
    )]
    NoModule(Errno),
    /// No device can be reserved.
    #[error("reserve a blktap2 device: {0}")]
    Allocate(Errno),
    /// The page that says whose device it is.
    #[error("own {name}, the record of the device: {error}")]
    Record {
        /// The page's name.
        name: String,
        /// Why.
        error: Errno,
    },
    /// Its ring.
    #[error("open the ring of blktap2 device {minor}: {error}")]
    Open {
        /// The device.
        minor: u32,
        /// Why.
        error: Errno,
    },
    /// The block device.
    #[error("make block device {path}: {error}")]
    Create {
        /// Its path.
        path: String,
        /// Why.
        error: Errno,
    },
    /// The kernel broke the protocol.
    #[error("serve {path}: {why}; its users get errors until they close it")]
    Refused {
        /// Its path.
        path: String,
        /// What the kernel did.
        why: &'static str,
    },
}

impl TapError {
    /// What the host answered, if that was it.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Memory(error) | Self::NoModule(error) | Self::Allocate(error) => Some(*error),
            Self::Record { error, .. } | Self::Open { error, .. } | Self::Create { error, .. } => {
                Some(*error)
            }
            Self::Refused { .. } => None,
        }
    }
}

/// What [`TapDisk::run`] tells while it runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TapNews {
    /// The block device exists.
    Made(TapOffers),
    /// It should end, and will when its last user has closed it.
    InUse,
}

/// The parts of a host that a device needs.
pub trait TapHost: Time + Tasks + Log + Probe + SharedPages + TapDevices {}
impl<T: Time + Tasks + Log + Probe + SharedPages + TapDevices> TapHost for T {}

/// A device that is reserved and open; nobody sees it before [`TapDisk::run`].
pub struct TapDisk<H: TapHost> {
    ring: Rc<Ring<H, Kernel<H>>>,
    /// How the ring has ended, and that it has.
    end: Rc<Cell<Option<RingEnd>>>,
    gone: Rc<wait::Event>,
    minor: u32,
    node: Rc<dyn Node>,
    config: TapConfig,
    /// Owned as long as we live; names a device that has to be freed.
    record: Option<H::Region>,
    asked_to_close: Rc<wait::Event>,
}

impl<H: TapHost> TapDisk<H> {
    /// Frees the devices that dead processes have left, reserves one and opens its ring.
    ///
    /// # Errors
    /// [`TapError`]; no device stays reserved.
    pub async fn open(host: H, config: TapConfig, node: Rc<dyn Node>) -> Result<Self, TapError> {
        // Each request has one buffer, and a request that has one never asks for another.
        let stage = config.memory.stage(cost_of(MAX_SEGMENTS * PAGE_BYTES)).map_err(TapError::Memory)?;
        let pool = BufPool::of_stage(config.limits.buffer_bytes, stage);
        let alone = alone(&host, config.records).await;
        free_stale(&host, config.records).await;
        let minor = host.allocate_tap().await.map_err(|error| match error {
            Errno::ENOENT | Errno::ENODEV => TapError::NoModule(error),
            error => TapError::Allocate(error),
        })?;
        let opened = open_ring(&host, minor, &config).await;
        if opened.is_err() && !host.bug(&TAP_OPEN_FAILED) {
            free(&host, minor).await;
        }
        let (record, ring) = opened?;
        drop(alone);
        host.log(Event::RingConnected { dom: DomId(0), vbd: VbdId(minor) });
        let asked_to_close = Rc::<wait::Event>::default();
        let peer = Kernel::new(ring, Rc::clone(&asked_to_close));
        let target = Target::new(host, peer, Rc::clone(&node), VbdId(minor), config.read_only);
        // Until it is known whether flushes will come.
        target.write_through.set(true);
        let target = Rc::new(target);
        let parts = Parts { target, vbd: VbdId(minor), limits: config.limits, record: None, pool };
        let ring = Rc::new(Ring::start(parts, 0, 0));
        let (end, gone) = (Rc::default(), Rc::default());
        Ok(Self { ring, end, gone, minor, node, config, record: Some(record), asked_to_close })
    }

    /// The path of the block device.
    pub fn path(&self) -> String {
        self.host().tap_path(self.minor)
    }

    fn host(&self) -> &H {
        self.ring.host()
    }

    /// Makes the block device and serves it until `stop`, or until the kernel asks to close it, and nobody uses it any
    /// more. Then removes and frees it. Requests of users who still have it open fail only if the module cannot say
    /// that it is in use.
    ///
    /// # Errors
    /// [`TapError::Create`], [`TapError::Refused`]; the device is freed all the same.
    pub async fn run(self, stop: impl Future<Output = ()>, tell: impl Fn(TapNews)) -> Result<(), TapError> {
        let Self { ring, gone, .. } = &self;
        let (ring, end, ended) = (Rc::clone(ring), Rc::clone(&self.end), Rc::clone(gone));
        // A task of its own: what waits here is not polled with each wake-up of the ring.
        self.host().spawn("tap-ring", u64::from(self.minor), async move {
            end.set(Some(ring.run().await));
            drop(ring);
            ended.set();
        });
        let made = self.create().await;
        if let Ok(offers) = &made {
            tell(TapNews::Made(*offers));
            self.remove(stop, &tell).await;
        }
        self.ring.closer().close();
        gone.wait().await;
        let refused = match self.end.get() {
            Some(RingEnd::Refused(why)) => Some(TapError::Refused { path: self.path(), why }),
            _ => None,
        };
        let why = if let Some(TapError::Refused { why, .. }) = refused { why } else { "closed" };
        self.host().log(Event::RingClosed { dom: DomId(0), vbd: VbdId(self.minor), why });
        self.close().await;
        made?;
        refused.map_or(Ok(()), Err)
    }

    /// Makes the block device.
    async fn create(&self) -> Result<TapOffers, TapError> {
        let (info, target) = (self.node.info(), &self.ring.parts.target);
        let physical_bytes = info.physical_block_bytes.min(PAGE_BYTES as u32);
        let read_only = self.config.read_only || info.read_only;
        let mut params = DeviceParams::new(info.size_sectors, physical_bytes, read_only);
        if self.host().bug(&TAP_ONE_LAYOUT) {
            params.physical_bytes_too = 0.into();
        }
        let mut bytes = params.to_bytes();
        let ring = &target.peer.ring;
        let made = match ring.create(&mut bytes).await {
            Err(Errno::ENOTTY | ENOIOCTLCMD) => {
                self.host().mark(&TAP_OLD_CALL);
                let params = OldDeviceParams::new(&self.config.name, info.size_sectors);
                ring.create_old(&params.to_bytes()).await.map(|()| 0)
            }
            other => other.map(|()| DeviceParams::from_bytes(&bytes).known_flags()),
        };
        let flags = made.map_err(|error| TapError::Create { path: self.path(), error })?;
        let offers = TapOffers { flush: flags & FLAG_FLUSH != 0, trim: flags & FLAG_TRIM != 0 };
        target.write_through.set(!offers.flush && !self.host().bug(&TAP_WRITE_BACK));
        Ok(offers)
    }

    /// Waits until the device should end, and removes it once it is not in use; or until its ring has ended.
    async fn remove(&self, stop: impl Future<Output = ()>, tell: &impl Fn(TapNews)) {
        let gone = &self.gone;
        let asked = async {
            self.asked_to_close.wait().await;
            self.host().mark(&TAP_ASKED);
        };
        select(select(stop, asked), gone.wait()).await;
        let (mut patience, mut told) = (Patience::of(u32::MAX), false);
        while !gone.is_set()
            // Some modules remove it when the ring is closed.
            && !matches!(self.ring.parts.target.peer.ring.remove().await, Ok(()) | Err(Errno::ENOTTY | ENOIOCTLCMD))
            && !self.host().bug(&TAP_CLOSED_IN_USE)
        {
            if !std::mem::replace(&mut told, true) {
                self.host().mark(&TAP_IN_USE);
                tell(TapNews::InUse);
            }
            select(patience.again(self.host()), gone.wait()).await;
        }
    }

    /// Closes the ring, for as long as the kernel takes, and frees the device.
    async fn close(self) {
        let Self { ring, minor, config, record, .. } = self;
        let ring = Rc::into_inner(ring).expect("the ring's task has ended");
        let target = Rc::into_inner(ring.parts.target).expect("no request outlives its ring");
        let host = target.host;
        let freed = host.bug(&TAP_FREED_FIRST) && host.free_tap(minor).await.is_err();
        target.peer.ring.close().await;
        let _alone = alone(&host, config.records).await;
        // Otherwise the record tells the next process of it.
        if freed || free(&host, minor).await {
            host.remove_region(&record_of(config.records, minor));
        }
        drop(record);
        // Those that still had users when we began.
        free_stale(&host, config.records).await;
    }
}

/// The name of the page that says that device `minor` is ours.
fn record_of(records: &str, minor: u32) -> String {
    format!("{records}-{minor}")
}

async fn open_ring<H: TapHost>(
    host: &H,
    minor: u32,
    config: &TapConfig,
) -> Result<(H::Region, H::Ring), TapError> {
    let name = record_of(config.records, minor);
    let record = match host.own_region(&name) {
        Ok(record) => record,
        Err(error) => return Err(TapError::Record { name, error }),
    };
    match host.open_tap(minor).await {
        Ok(ring) => Ok((record, ring)),
        Err(error) => {
            host.remove_region(&name);
            Err(TapError::Open { minor, error })
        }
    }
}

/// Frees a device that is closed, for which the kernel may take a moment. Whether it is not reserved any more.
async fn free<H: TapHost>(host: &H, minor: u32) -> bool {
    let mut patience = Patience::of(FREE_TRIES);
    loop {
        let freed = host.free_tap(minor).await;
        if is_free(freed) {
            return true;
        }
        if !patience.again(host).await {
            return false;
        }
    }
}

/// Whether a device is free after an attempt to free it.
fn is_free(freed: Result<(), Errno>) -> bool {
    matches!(freed, Ok(()) | Err(Errno::ENODEV | Errno::EINVAL | Errno::ENXIO))
}

/// How long to wait for another process that reserves or frees a device, in nanoseconds. It takes milliseconds; one
/// that stands still must not stop all others.
const ALONE_PATIENCE_NS: u64 = 2_000_000_000;

/// Keeps other processes from reserving and freeing devices until this is dropped: the number of a device that is freed
/// is at once that of another, before its record says so.
async fn alone<H: TapHost>(host: &H, records: &str) -> Option<H::Region> {
    let until_ns = host.now_ns().saturating_add(ALONE_PATIENCE_NS);
    let mut patience = Patience::until();
    loop {
        match host.own_region(&format!("{records}.lock")) {
            Ok(page) => return Some(page),
            Err(Errno::EBUSY) if patience.again_before(host, until_ns).await => {}
            // The record cannot be owned either, which says why.
            Err(_) => return None,
        }
    }
}

/// What the modules of 2009 answer to a call that they do not know, and what their kernels pass on as it is.
const ENOIOCTLCMD: Errno = Errno(515);

/// How often a device that should be closed by now is tried to be freed.
const FREE_TRIES: u32 = 12;

/// Frees the devices whose processes have died, unless they still have users.
async fn free_stale<H: TapHost>(host: &H, records: &str) {
    let names = host.region_names().unwrap_or_default();
    let minors = names.iter().filter_map(|name| name.strip_prefix(records)?.strip_prefix('-')?.parse().ok());
    for minor in minors {
        let name = record_of(records, minor);
        // Its owner lives.
        let Ok(_ours) = host.own_region(&name) else { continue };
        if host.bug(&TAP_STALE_STAYS) || !is_free(host.free_tap(minor).await) {
            continue;
        }
        host.mark(&TAP_STALE);
        host.remove_region(&name);
    }
}

const _: () = assert!(LAYOUT.entries == tap_abi::blktap::SLOTS as u32);
