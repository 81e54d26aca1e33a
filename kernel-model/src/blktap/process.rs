//! The blktap2 module as a process of dom0 uses it.

use super::{Tap, TapKind, TapModule};
use crate::SimHost;
use crate::gendisk::QueueLimits;
use std::future::{Future, pending, poll_fn};
use std::rc::Rc;
use std::task::Poll;
use tap_abi::blktap::{
    DeviceParams, FLAG_FLUSH, FLAG_PHYSICAL_SIZE, FLAG_READ_ONLY, FLAG_TRIM, FLAG_TRIM_ZEROES,
};
use tap_host::{Errno, TAP_PARAMS_BYTES, TapDevices, TapRing, TapSegment};
use xen_model::Mapping;

/// Sectors of the largest request.
const MAX_SECTORS: u32 = 88;

/// A ring that a process has open.
pub struct ProcessTap {
    host: SimHost,
    tap: Rc<Tap>,
    page: Mapping,
}

/// A call that a test has fail.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum TapCall {
    /// Opening the ring of a device.
    Open,
    /// Removing a block device.
    Remove,
    /// Freeing a device.
    Free,
}

impl TapModule {
    /// From now on `call` fails with `error`, or not any more.
    pub fn refuse(&self, call: TapCall, error: Option<Errno>) {
        let mut refused = self.0.refused.borrow_mut();
        match error {
            Some(error) => refused.insert(call, error),
            None => refused.remove(&call),
        };
    }

    pub(super) fn accepts(&self, call: TapCall) -> Result<(), Errno> {
        self.0.refused.borrow().get(&call).map_or(Ok(()), |error| Err(*error))
    }
}

impl SimHost {
    /// The module, once the process has taken a step.
    async fn tap_module(&self) -> Result<TapModule, Errno> {
        self.takes_a_step().await;
        self.process.kernel().tap_module().ok_or(Errno::ENOENT)
    }

    /// Counts one effect of the process; never completes once it is dead.
    async fn takes_a_step(&self) {
        if !self.process.node().step() {
            pending::<()>().await;
        }
    }
}

impl TapDevices for SimHost {
    type Ring = ProcessTap;

    async fn allocate_tap(&self) -> Result<u32, Errno> {
        self.tap_module().await?.allocate(self.process.node())
    }

    async fn free_tap(&self, minor: u32) -> Result<(), Errno> {
        self.tap_module().await?.free(minor)
    }

    async fn name_tap(&self, minor: u32, name: &str) -> Result<(), Errno> {
        self.tap_module().await?.set_name(minor, name)
    }

    async fn tap_names(&self) -> Result<Vec<(u32, String)>, Errno> {
        self.tap_module().await?.names()
    }

    async fn open_tap(&self, minor: u32) -> Result<ProcessTap, Errno> {
        let module = self.tap_module().await?;
        module.accepts(TapCall::Open)?;
        let absent = if module.kind() == TapKind::Xen2009 { Errno::ENODEV } else { Errno::ENXIO };
        let tap = module.tap(minor).ok_or(absent)?;
        let page = tap.open(self.process.node())?;
        let ring = ProcessTap { host: self.clone(), tap, page: self.port.map_kernel_page(&page) };
        ring.suits().map(|()| ring)
    }

    fn tap_path(&self, minor: u32) -> String {
        format!("/dev/xen/blktap-2/tapdev{minor}")
    }
}

impl ProcessTap {
    /// Whether the process lives on with this call.
    fn step(&self) -> bool {
        self.host.process.node().step()
    }

    fn limits(&self, flags: u64) -> QueueLimits {
        QueueLimits {
            depth: if self.tap.kind() == TapKind::OpenXt { 16 } else { 128 },
            logical_block_bytes: 512,
            max_sectors: MAX_SECTORS,
            max_discard_sectors: if flags & FLAG_TRIM != 0 { u32::MAX } else { 0 },
            max_zeroes_sectors: 0,
            write_cache: flags & FLAG_FLUSH != 0,
            fua: false,
        }
    }

    /// Asks the module for a device without a size, as a real host does before it trusts it with its memory.
    fn suits(&self) -> Result<(), Errno> {
        let mut params = DeviceParams::from_bytes(&[0; TAP_PARAMS_BYTES]);
        params.sector_bytes = 512.into();
        params.physical_bytes = 512.into();
        params.flags = FLAG_TRIM_ZEROES.into();
        match self.create_with(&mut params) {
            Err(Errno::EINVAL) if self.tap.kind() == TapKind::XenServer => Ok(()),
            Err(Errno::EINVAL) if params.flags.get() == 0 => Ok(()),
            Err(Errno::EINVAL) => Err(Errno::EOPNOTSUPP),
            Err(error) => Err(error),
            Ok(()) => unreachable!("a block device without a size"),
        }
    }

    fn create_with(&self, params: &mut DeviceParams) -> Result<(), Errno> {
        match self.tap.kind() {
            TapKind::Xen2009 => Err(Errno::ENOTTY),
            TapKind::XenServer => self.create_as_xenserver(params),
            TapKind::Dkms | TapKind::OpenXt => self.create_as_openxt(params),
        }
    }

    /// As the modules that say what they know check it.
    fn create_as_openxt(&self, params: &mut DeviceParams) -> Result<(), Errno> {
        let flags = params.flags.get() & self.tap.kind().known_flags().unwrap_or_default();
        params.flags = flags.into();
        let logical = params.sector_bytes.get();
        let fits = |bytes: u32, offset: u32| {
            bytes >= logical && bytes.is_power_of_two() && offset < bytes && offset.is_multiple_of(logical)
        };
        let (physical, offset) = (params.physical_bytes_too.get(), params.physical_offset.get());
        if (flags & FLAG_PHYSICAL_SIZE != 0 && !fits(physical, offset))
            || (flags & FLAG_TRIM != 0 && !fits(params.trim_bytes.get(), params.trim_offset.get()))
        {
            return Err(Errno::EINVAL);
        }
        self.create_checked(logical, params.capacity.get(), flags)
    }

    /// As XenServer's module does: what it does not know it ignores.
    fn create_as_xenserver(&self, params: &DeviceParams) -> Result<(), Errno> {
        let physical = params.physical_bytes.get();
        if !physical.is_power_of_two() || physical < 512 {
            return Err(Errno::EINVAL);
        }
        self.create_checked(
            params.sector_bytes.get(),
            params.capacity.get(),
            params.flags.get() & FLAG_READ_ONLY,
        )
    }

    fn create_checked(&self, logical_bytes: u32, capacity: u64, flags: u64) -> Result<(), Errno> {
        if !(512..=4096).contains(&logical_bytes) || !logical_bytes.is_power_of_two() || capacity == 0 {
            return Err(Errno::EINVAL);
        }
        let sectors = capacity.checked_mul(u64::from(logical_bytes) / 512).ok_or(Errno::EINVAL)?;
        self.tap.create(sectors, self.limits(flags), flags & FLAG_READ_ONLY != 0)
    }
}

impl TapRing for ProcessTap {
    type Page = Mapping;

    fn page(&self) -> &Mapping {
        &self.page
    }

    async fn create(&self, bytes: &mut [u8; TAP_PARAMS_BYTES]) -> Result<(), Errno> {
        self.host.takes_a_step().await;
        let mut params = DeviceParams::from_bytes(bytes);
        let made = self.create_with(&mut params);
        *bytes = params.to_bytes();
        made
    }

    async fn remove(&self) -> Result<(), Errno> {
        self.host.takes_a_step().await;
        self.tap.remove()
    }

    fn pull(&self) {
        if self.step() {
            self.tap.poll();
        }
    }

    fn called(&self) -> impl Future<Output = Result<(), Errno>> {
        // As an edge-triggered epoll has it: a call makes the kernel poll the ring, and only what that finds is told.
        poll_fn(|cx| {
            if self.tap.ring.borrow().is_none() {
                return Poll::Ready(Err(Errno::ESHUTDOWN));
            }
            self.tap.caller.wait(cx.waker());
            if self.tap.called.replace(false) && self.tap.poll() {
                return Poll::Ready(Ok(()));
            }
            Poll::Pending
        })
    }

    fn respond(&self) {
        if self.step() {
            self.tap.respond();
        }
    }

    fn copy_in(&self, segments: &[TapSegment], private: &mut [u8]) {
        self.host.process.kernel().count_copy();
        self.tap.data(segments, false, |page, at| private[at..at + page.len()].copy_from_slice(page));
    }

    fn copy_out(&self, segments: &[TapSegment], private: &[u8]) {
        self.host.process.kernel().count_copy();
        if self.step() {
            self.tap.data(segments, true, |page, at| page.copy_from_slice(&private[at..at + page.len()]));
        }
    }

    async fn close(self) {
        self.host.takes_a_step().await;
        self.tap.close();
        let tap = Rc::clone(&self.tap);
        drop(self);
        poll_fn(|cx| {
            if !tap.is_taken() {
                return Poll::Ready(());
            }
            tap.ended.wait(cx.waker());
            Poll::Pending
        })
        .await;
    }
}

impl Drop for ProcessTap {
    fn drop(&mut self) {
        let ours = self.tap.ring.borrow().as_ref().is_some_and(|ring| {
            ring.node.is_alive() && ring.node.entity() == self.host.process.node().entity()
        });
        if ours {
            self.tap.close();
        }
    }
}
