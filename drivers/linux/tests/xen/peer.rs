//! The other end of grants and channels in dom0: dom0 itself, through the devices for the granting side.
//!
//! ```text
//!     grant           /dev/xen/gntalloc: allocates a page with its grant; mmap at the index that it answers with
//!     end_access      revokes the grant; the kernel keeps trying for as long as the page is mapped
//!     alloc_unbound   /dev/xen/evtchn, opened once per channel
//! ```
//!
//! Numbers and structures are those of Linux's `xen/gntalloc.h` and `xen/evtchn.h`.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{c_int, c_ulong};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use tap_conformance::Peer;
use tap_host::{DomId, Errno, EventChannel, GrantRef, PAGE_BYTES, Port, SharedPage};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

const GNTALLOC: &str = "/dev/xen/gntalloc";
const EVTCHN: &str = "/dev/xen/evtchn";

/// Xen's numbers have no direction, only a size.
const fn number<T>(group: u8, nr: u8) -> c_ulong {
    ((size_of::<T>() as c_ulong) << 16) | ((group as c_ulong) << 8) | nr as c_ulong
}

#[repr(C)]
struct AllocGref {
    dom: u16,
    flags: u16,
    count: u32,
    index: u64,
    gref: u32,
}

#[repr(C)]
struct DeallocGref {
    index: u64,
    count: u32,
}

#[repr(C)]
struct BindUnboundPort {
    remote_dom: u32,
}

#[repr(C)]
struct Notify {
    port: u32,
}

const ALLOC_GREF: c_ulong = number::<AllocGref>(b'G', 5);
const DEALLOC_GREF: c_ulong = number::<DeallocGref>(b'G', 6);
const BIND_UNBOUND_PORT: c_ulong = number::<BindUnboundPort>(b'E', 2);
const NOTIFY: c_ulong = number::<Notify>(b'E', 4);
/// The other side may write.
const WRITABLE: u16 = 1;

const _: () = assert!(ALLOC_GREF == 0x18_4705 && DEALLOC_GREF == 0x10_4706);
const _: () = assert!(BIND_UNBOUND_PORT == 0x04_4502 && NOTIFY == 0x04_4504);

fn errno(error: &io::Error) -> Errno {
    Errno(error.raw_os_error().unwrap_or(Errno::EIO.0))
}

/// # Safety
///
/// `number` is one of `device`'s, and takes a `T` that has no addresses.
unsafe fn ioctl<T>(device: &File, number: c_ulong, argument: &mut T) -> Result<c_int, Errno> {
    // SAFETY: the caller's promise.
    let answer = unsafe { libc::ioctl(device.as_raw_fd(), number, std::ptr::from_mut(argument)) };
    if answer < 0 { Err(errno(&io::Error::last_os_error())) } else { Ok(answer) }
}

/// dom0 as the granting side; clones share it.
#[derive(Clone)]
pub(crate) struct Dom0(Rc<Inner>);

struct Inner {
    gntalloc: File,
    /// The device's offset for the page of each grant.
    indices: RefCell<BTreeMap<GrantRef, u64>>,
}

impl Dom0 {
    pub(crate) fn open() -> Result<Self, String> {
        let gntalloc = File::options().read(true).write(true).open(GNTALLOC);
        let gntalloc = gntalloc.map_err(|e| format!("failed to open {GNTALLOC}: {e}"))?;
        Ok(Self(Rc::new(Inner { gntalloc, indices: RefCell::default() })))
    }
}

impl Peer for Dom0 {
    type Page = OwnPage;
    type Channel = OwnChannel;

    fn dom(&self) -> DomId {
        DomId(0)
    }

    fn grant(&self, to: DomId, writable: bool) -> Result<(GrantRef, OwnPage), Errno> {
        let flags = if writable { WRITABLE } else { 0 };
        let mut alloc = AllocGref { dom: to.0, flags, count: 1, index: 0, gref: 0 };
        // SAFETY: an ioctl of gntalloc.
        unsafe { ioctl(&self.0.gntalloc, ALLOC_GREF, &mut alloc)? };
        let gref = GrantRef(alloc.gref);
        self.0.indices.borrow_mut().insert(gref, alloc.index);
        Ok((gref, OwnPage::map(&self.0.gntalloc, alloc.index)?))
    }

    fn end_access(&self, gref: GrantRef) -> Result<(), Errno> {
        let index = self.0.indices.borrow_mut().remove(&gref).ok_or(Errno::EINVAL)?;
        let mut dealloc = DeallocGref { index, count: 1 };
        // SAFETY: an ioctl of gntalloc.
        unsafe { ioctl(&self.0.gntalloc, DEALLOC_GREF, &mut dealloc)? };
        Ok(())
    }

    fn alloc_unbound(&self, remote: DomId) -> Result<OwnChannel, Errno> {
        OwnChannel::new(remote)
    }
}

/// A page of our own that we have granted.
#[derive(Clone)]
pub(crate) struct OwnPage(Rc<Mapping>);

struct Mapping(NonNull<u8>);

impl OwnPage {
    fn map(gntalloc: &File, index: u64) -> Result<Self, Errno> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let offset = index.cast_signed();
        let fd = gntalloc.as_raw_fd();
        // SAFETY: the kernel chooses the address.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), PAGE_BYTES, access, libc::MAP_SHARED, fd, offset) };
        if start == libc::MAP_FAILED {
            return Err(errno(&io::Error::last_os_error()));
        }
        NonNull::new(start.cast()).map(|start| Self(Rc::new(Mapping(start)))).ok_or(Errno::EIO)
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset + len <= PAGE_BYTES, "{len} bytes at {offset} of a page");
        self.0.0.as_ptr().wrapping_add(offset)
    }

    fn number(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4), "a number at {offset}");
        // SAFETY: aligned and in the page, which is mapped for as long as `self` lives.
        unsafe { AtomicU32::from_ptr(self.at(offset, 4).cast()) }
    }
}

impl SharedPage for OwnPage {
    fn load_u32(&self, offset: usize) -> u32 {
        u32::from_le(self.number(offset).load(Ordering::Acquire))
    }
    fn store_u32(&self, offset: usize, value: u32) {
        self.number(offset).store(value.to_le(), Ordering::Release);
    }
    fn copy_in(&self, offset: usize, private: &mut [u8]) {
        let from = self.at(offset, private.len());
        for (i, byte) in private.iter_mut().enumerate() {
            // SAFETY: in the page.
            *byte = unsafe { from.wrapping_add(i).read_volatile() };
        }
    }
    fn copy_out(&self, offset: usize, private: &[u8]) {
        let to = self.at(offset, private.len());
        for (i, byte) in private.iter().enumerate() {
            // SAFETY: in the page.
            unsafe { to.wrapping_add(i).write_volatile(*byte) };
        }
    }
    fn full_barrier(&self) {
        fence(Ordering::SeqCst);
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `OwnPage::map` with this size, and its address is not used any more.
        let gone = unsafe { libc::munmap(self.0.as_ptr().cast(), PAGE_BYTES) };
        assert!(gone == 0, "failed to unmap our own page: {}", io::Error::last_os_error());
    }
}

/// An end of a channel; the device closes it with its descriptor.
pub(crate) struct OwnChannel {
    device: AsyncFd<File>,
    port: Port,
}

impl OwnChannel {
    fn new(remote: DomId) -> Result<Self, Errno> {
        let mut open = File::options();
        let device = open.read(true).write(true).custom_flags(libc::O_NONBLOCK).open(EVTCHN);
        let device = device.map_err(|e| errno(&e))?;
        let mut bind = BindUnboundPort { remote_dom: remote.0.into() };
        // SAFETY: an ioctl of evtchn.
        let port = unsafe { ioctl(&device, BIND_UNBOUND_PORT, &mut bind)? };
        // SAFETY: a `File` is always the same open descriptor, and stays open while the `AsyncFd` owns it.
        let device = unsafe { AsyncFd::register_with_interest(device, Interest::READABLE) };
        let device = device.map_err(|refused| errno(&refused.into_parts().1))?;
        Ok(Self { device, port: Port(port.cast_unsigned()) })
    }

    /// Takes an event, and lets the next one through.
    fn take(&self) -> Result<(), Errno> {
        let mut port = [0; 4];
        let mut device = self.device.get_ref();
        device.read_exact(&mut port).map_err(|e| errno(&e))?;
        device.write_all(&port).map_err(|e| errno(&e))
    }
}

impl EventChannel for OwnChannel {
    fn notify(&self) {
        let mut notify = Notify { port: self.port.0 };
        // SAFETY: an ioctl of evtchn.
        let sent = unsafe { ioctl(self.device.get_ref(), NOTIFY, &mut notify) };
        assert!(sent.is_ok(), "failed to notify our own port: {sent:?}");
    }

    async fn wait(&self) -> Result<(), Errno> {
        loop {
            let mut ready = self.device.readable().await.map_err(|e| errno(&e))?;
            match self.take() {
                Err(Errno::EAGAIN) => ready.clear_ready(),
                result => return result,
            }
        }
    }

    fn local_port(&self) -> Port {
        self.port
    }
}
