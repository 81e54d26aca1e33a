//! A blktap2 device, from its reservation to its end.
//!
//! ```text
//!   reserve ─► open, map ─┬─► create ──► in use ──► asked to stop ──► remove ─┐
//!                         │                                 └─ busy: later ◄──┤
//!                         └─► the ring is served all the time ────────────────┴─► close ─► free
//! ```
//!
//! The ring is served before the device exists: whoever learns of it first reads it at once, and the call that makes it
//! may wait for that.
//!
//! A ring that makes no sense is not served any more: [`TapDisk::run`] says so at once, and the image can be closed,
//! while [`TapDisk::close`] may have to wait for the users of the device.

use crate::config::{LAYOUT, Limits};
use crate::end::RingEnd;
use crate::kernel::Kernel;
use crate::reserved::{Reserved, free_stale};
use crate::ring::{Parts, Ring};
use crate::serve::Target;
use crate::tap_error::TapError;
use std::cell::Cell;
use std::rc::Rc;
use tap_abi::blkif::MAX_SEGMENTS;
use tap_abi::blktap::{DeviceParams, FLAG_FLUSH, FLAG_TRIM};
use tap_core::{Node, wait};
use tap_host::{
    Budget, BufPool, DomId, Entropy, Errno, Event, Log, PAGE_BYTES, Patience, Probe, SharedPages, TapDevices,
    TapRing, Tasks, Time, VbdId, cost_of, select,
};

tap_host::listed! {
    pub(super) BUGS: Bug;
    TAP_ONE_LAYOUT = "tap-one-layout",
        "the size of physical blocks is stated only where one of two kinds of modules reads it";
    TAP_WRITE_BACK = "tap-write-back",
        "writes are not durable when they are answered, although the module has no flushes";
    TAP_FREED_FIRST = "tap-freed-first", "a device is freed before its ring is closed, and not afterwards";
    TAP_CLOSED_IN_USE = "tap-closed-in-use", "a ring is closed although its device cannot be removed yet";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    MODULE_REFUSED = "tap-module-refused", "a module that cannot be worked with was refused";
    TAP_IN_USE = "tap-in-use", "a device could not be removed yet, because it was in use";
    TAP_ASKED = "tap-asked", "the kernel asked to close a device";
}

/// How to serve a device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TapConfig {
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

/// What [`TapDisk::run`] tells while it runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TapNews {
    /// The block device exists.
    Made(TapOffers),
    /// It should end, and will when its last user has closed it.
    InUse,
    /// It is removed, and its number stays reserved: a module that has asked to close a device never frees its number.
    NumberStays,
}

/// The parts of a host that a device needs.
pub trait TapHost: Time + Tasks + Log + Probe + Entropy + SharedPages + TapDevices {}
impl<T: Time + Tasks + Log + Probe + Entropy + SharedPages + TapDevices> TapHost for T {}

/// A device that is reserved and open; nobody sees it before [`TapDisk::run`].
pub struct TapDisk<H: TapHost> {
    ring: Rc<Ring<H, Kernel<H>>>,
    /// How the ring has ended, and that it has.
    end: Rc<Cell<Option<RingEnd>>>,
    gone: Rc<wait::Event>,
    device: Reserved<H>,
    node: Rc<dyn Node>,
    config: TapConfig,
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
        let device = Reserved::new(&host, config.records).await.inspect_err(|error| {
            if let TapError::Name { error: Errno::EPERM, .. } = error {
                host.mark(&MODULE_REFUSED);
            }
        })?;
        let minor = device.minor;
        let ring = match host.open_tap(minor).await {
            Ok(ring) => ring,
            Err(error) => {
                device.give_up(&host).await;
                return Err(match error {
                    Errno::EOPNOTSUPP | Errno::ENOTTY => {
                        host.mark(&MODULE_REFUSED);
                        if error == Errno::ENOTTY { TapError::TooOld } else { TapError::Unmaps }
                    }
                    error => TapError::Open { minor, error },
                });
            }
        };
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
        Ok(Self { ring, end, gone, device, node, config, asked_to_close })
    }

    /// The path of the block device.
    pub fn path(&self) -> String {
        self.host().tap_path(self.device.minor)
    }

    fn host(&self) -> &H {
        self.ring.host()
    }

    /// Makes the block device and serves it until `stop`, or until the kernel asks to close it, and nobody uses it any
    /// more; then removes it. [`TapDisk::close`] has to follow, whatever the result. Requests of users who still have
    /// it open fail from then on, which happens only after an error.
    ///
    /// # Errors
    /// [`TapError::Create`], [`TapError::Remove`], [`TapError::Refused`].
    pub async fn run(&self, stop: impl Future<Output = ()>, tell: impl Fn(TapNews)) -> Result<(), TapError> {
        let (ring, end, ended) = (Rc::clone(&self.ring), Rc::clone(&self.end), Rc::clone(&self.gone));
        // A task of its own: what waits here is not polled with each wake-up of the ring.
        self.host().spawn("tap-ring", u64::from(self.device.minor), async move {
            end.set(Some(ring.run().await));
            drop(ring);
            ended.set();
        });
        let removed = match self.create().await {
            Ok(offers) => {
                tell(TapNews::Made(offers));
                self.remove(stop, &tell).await
            }
            Err(error) => Err(error),
        };
        self.ring.closer().close();
        self.gone.wait().await;
        let refused = match self.end.get() {
            Some(RingEnd::Refused(why)) => Err(TapError::Refused { path: self.path(), why }),
            Some(RingEnd::ChannelGone) => Err(TapError::Refused { path: self.path(), why: RING_GONE }),
            Some(RingEnd::Closed | RingEnd::Left | RingEnd::Abandoned) | None => Ok(()),
        };
        let why = if let Err(TapError::Refused { why, .. }) = refused { why } else { "closed" };
        self.host().log(Event::RingClosed { dom: DomId(0), vbd: VbdId(self.device.minor), why });
        removed.and(refused)
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
        let made = ring.create(&mut bytes).await;
        made.map_err(|error| TapError::Create { path: self.path(), error })?;
        let flags = DeviceParams::from_bytes(&bytes).known_flags();
        let offers = TapOffers { flush: flags & FLAG_FLUSH != 0, trim: flags & FLAG_TRIM != 0 };
        target.write_through.set(!offers.flush && !self.host().bug(&TAP_WRITE_BACK));
        Ok(offers)
    }

    /// Waits until the device should end, and removes it once it is not in use; or until its ring has ended.
    async fn remove(&self, stop: impl Future<Output = ()>, tell: &impl Fn(TapNews)) -> Result<(), TapError> {
        let (host, gone) = (self.host(), &self.gone);
        let asked = async {
            self.asked_to_close.wait().await;
            host.mark(&TAP_ASKED);
        };
        select(select(stop, asked), gone.wait()).await;
        let (mut patience, mut told, mut failures) = (Patience::of(u32::MAX), false, 0);
        while !gone.is_set() {
            match self.ring.parts.target.peer.ring.remove().await {
                Ok(()) => {
                    if self.asked_to_close.is_set() {
                        tell(TapNews::NumberStays);
                    }
                    return Ok(());
                }
                Err(Errno::EBUSY) if !std::mem::replace(&mut told, true) => {
                    host.mark(&TAP_IN_USE);
                    tell(TapNews::InUse);
                }
                Err(Errno::EBUSY) => {}
                Err(error) if failures == TRIES => return Err(TapError::Remove { path: self.path(), error }),
                Err(_) => failures += 1,
            }
            if host.bug(&TAP_CLOSED_IN_USE) {
                return Ok(());
            }
            select(patience.again(host), gone.wait()).await;
        }
        Ok(())
    }

    /// Closes the ring, for as long as the kernel takes, and frees the device.
    pub async fn close(self) {
        let Self { ring, device, config, .. } = self;
        let ring = Rc::into_inner(ring).expect("the ring's task has ended");
        let target = Rc::into_inner(ring.parts.target).expect("no request outlives its ring");
        let host = target.host;
        let early = host.bug(&TAP_FREED_FIRST) && host.free_tap(device.minor).await.is_err();
        target.peer.ring.close().await;
        if early {
            device.end(&host, true)
        } else {
            device.free(&host).await
        }
        // Those that still had users when we began.
        free_stale(&host, config.records).await;
    }
}

/// Why a ring is not served any more whose calls fail.
const RING_GONE: &str = "the kernel does not tell of its requests any more";
/// How often what the kernel has refused for no known reason is tried again.
const TRIES: u32 = 12;

const _: () = assert!(LAYOUT.entries == tap_abi::blktap::SLOTS as u32);
