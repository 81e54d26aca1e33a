//! The ring of a device: mapped memory, calls from and to the kernel.
//!
//! The kernel maps the data of a request into our memory when it puts the request on the ring, which most modules do
//! only while we poll the ring; and it takes the data away when we call for its response. An access at another time
//! ends the process with SIGBUS or SIGSEGV. So nothing here keeps an address, and copies are made only on behalf of a
//! request in flight.
//!
//! blktap-dkms takes more away than the data: it unmaps the pages of an answered request, inside the call for its
//! response. Until the next request of that slot there is a hole in our mapping, which the kernel gives to any thread
//! that maps memory at that moment; the next request then replaces that memory, and the end of the ring unmaps it. The
//! hole is there before the call returns, so that nothing this process does afterwards can close it in time. Such a
//! module is found by a question before the first request, and refused.

use super::ioctl::{on_bytes, on_number};
use crate::LinuxHost;
use crate::files::{Closing, blocking, errno, of_rustix};
use crate::watch::watch;
use crate::xen::{copy_from_shared, copy_to_shared};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::future::Future;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use tap_abi::blkif::MAX_SEGMENTS;
use tap_abi::blktap::{
    DeviceParams, IOCTL_CREATE_DEVICE, IOCTL_REMOVE_DEVICE, IOCTL_RESPOND, MAPPED_PAGES, SLOTS,
};
use tap_host::{Errno, PAGE_BYTES, SharedPage, TAP_PARAMS_BYTES, TapRing, TapSegment};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

const MAPPED_BYTES: usize = MAPPED_PAGES * PAGE_BYTES;

/// The memory of a ring: its page, and 11 pages for each slot.
struct Mapping(NonNull<u8>);

impl Mapping {
    fn new(fd: impl AsFd) -> Result<Self, Errno> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address, so no mapping of ours is replaced. What the module maps later lies
        // within this range.
        let start = unsafe { mmap(std::ptr::null_mut(), MAPPED_BYTES, access, MapFlags::SHARED, fd, 0) };
        match start.map(|start| NonNull::new(start.cast())) {
            Ok(Some(start)) => Ok(Self(start)),
            Ok(None) => unreachable!("the kernel never chooses address 0 for a mapping"),
            Err(error) => Err(of_rustix(error)),
        }
    }

    /// The address of `len` bytes at `offset` of page `page`, all in that page.
    fn at(&self, page: usize, offset: usize, len: usize) -> *mut u8 {
        let end = offset.checked_add(len);
        assert!(
            page < MAPPED_PAGES && end.is_some_and(|end| end <= PAGE_BYTES),
            "{len} bytes at {offset} of page {page} of a ring"
        );
        self.0.as_ptr().wrapping_add(page * PAGE_BYTES + offset)
    }

    /// The address of a segment of a request.
    fn data(&self, segment: &TapSegment) -> *mut u8 {
        let TapSegment { slot, page, offset, len } = *segment;
        let (slot, page) = (usize::from(slot), usize::from(page));
        assert!(slot < usize::from(SLOTS) && page < MAX_SEGMENTS, "page {page} of slot {slot} of a ring");
        self.at(1 + slot * MAX_SEGMENTS + page, usize::from(offset), usize::from(len))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this size, and all of it still is: a module that unmaps parts is asked nothing
        // but the question that finds it out. No address of it is used any more. The module's mappings within it go as
        // well.
        let gone = unsafe { munmap(self.0.as_ptr().cast(), MAPPED_BYTES) };
        assert!(gone.is_ok() || std::thread::panicking(), "a ring of our own cannot be unmapped: {gone:?}");
    }
}

/// The page of a ring.
#[derive(Clone)]
pub struct TapPage(Rc<Mapping>);

impl TapPage {
    fn number(&self, offset: usize) -> &AtomicU32 {
        let start = self.0.at(0, offset, size_of::<u32>());
        assert!(start.addr().is_multiple_of(align_of::<AtomicU32>()), "an unaligned number");
        // SAFETY: aligned, in the ring's page, which stays mapped while `self` lives. Within this process only one
        // thread accesses it.
        unsafe { AtomicU32::from_ptr(start.cast()) }
    }
}

impl SharedPage for TapPage {
    fn load_u32(&self, offset: usize) -> u32 {
        u32::from_le(self.number(offset).load(Ordering::Acquire))
    }
    fn store_u32(&self, offset: usize, value: u32) {
        self.number(offset).store(value.to_le(), Ordering::Release);
    }
    fn copy_in(&self, offset: usize, private: &mut [u8]) {
        let from = self.0.at(0, offset, private.len());
        // SAFETY: as many bytes in the ring's page, which stays mapped while `self` lives.
        unsafe { copy_from_shared(from, private) };
    }
    fn copy_out(&self, offset: usize, private: &[u8]) {
        let to = self.0.at(0, offset, private.len());
        // SAFETY: as many bytes in the ring's page, which stays mapped while `self` lives and can be written.
        unsafe { copy_to_shared(to, private) };
    }
    fn full_barrier(&self) {
        fence(Ordering::SeqCst);
    }
}

struct Open {
    /// Another descriptor of the same open file: the watch owns its own.
    watched: AsyncFd<OwnedFd>,
    page: TapPage,
    /// Calls on other threads share it.
    fd: Arc<OwnedFd>,
}

/// A ring that is open and mapped.
pub struct LinuxTap {
    open: Option<Open>,
    closing: Rc<Closing>,
}

/// What the modules of 2009 answer to a call that they do not know, and what their kernels pass on as it is.
const ENOIOCTLCMD: Errno = Errno(515);

/// Asks whether the module leaves our memory alone. The kernel's log has a line about the question, which is that for a
/// device without a size.
///
/// # Errors
/// `EOPNOTSUPP` if it does not, `ENOTTY` if it does not know the call.
fn suits(ring: impl AsFd) -> Result<(), Errno> {
    let mut bytes = DeviceParams::question().to_bytes();
    // SAFETY: on a ring the module reads and writes a structure of this size for this number.
    let answer = unsafe { on_bytes(ring, IOCTL_CREATE_DEVICE, &mut bytes) };
    verdict(answer, &DeviceParams::from_bytes(&bytes))
}

fn verdict(answer: Result<(), Errno>, left: &DeviceParams) -> Result<(), Errno> {
    match answer {
        Err(Errno::EINVAL) if left.says_it_unmaps() => Err(Errno::EOPNOTSUPP),
        Err(Errno::EINVAL) => Ok(()),
        Err(Errno::ENOTTY | ENOIOCTLCMD) => Err(Errno::ENOTTY),
        // It makes a device without a size: none of the modules that are known.
        Ok(()) => Err(Errno::EOPNOTSUPP),
        Err(other) => Err(other),
    }
}

impl LinuxTap {
    pub(super) fn open(host: &LinuxHost, path: &str) -> Result<Self, Errno> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = openat(CWD, path, flags, Mode::empty()).map_err(of_rustix)?;
        // Some modules end a process that polls a ring before it is mapped.
        let page = TapPage(Rc::new(Mapping::new(&fd)?));
        suits(&fd)?;
        let watched = watch(fd.try_clone().map_err(|error| errno(&error))?, Interest::READABLE)?;
        let open = Open { watched, page, fd: Arc::new(fd) };
        Ok(Self { open: Some(open), closing: Rc::clone(host.closing()) })
    }

    fn get(&self) -> &Open {
        self.open.as_ref().expect("a ring is open until it is dropped")
    }

    fn mapping(&self) -> &Mapping {
        &self.get().page.0
    }
}

impl TapRing for LinuxTap {
    type Page = TapPage;

    fn page(&self) -> &TapPage {
        &self.get().page
    }

    async fn create(&self, params: &mut [u8; TAP_PARAMS_BYTES]) -> Result<(), Errno> {
        let (fd, mut bytes) = (Arc::clone(&self.get().fd), *params);
        // On another thread, because the kernel may wait for users of the device.
        *params = blocking(move || {
            // SAFETY: on a ring the module reads and writes a structure of this size for this number.
            unsafe { on_bytes(&*fd, IOCTL_CREATE_DEVICE, &mut bytes)? };
            Ok(bytes)
        })
        .await?;
        Ok(())
    }

    async fn remove(&self) -> Result<(), Errno> {
        let fd = Arc::clone(&self.get().fd);
        // SAFETY: on a ring this ioctl takes no argument.
        blocking(move || unsafe { on_number(&*fd, IOCTL_REMOVE_DEVICE, 0) }).await
    }

    fn pull(&self) {
        let fd = self.get().fd.as_fd();
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        // Whatever it says, the ring itself shows what is there; an interrupted call is made again at the next look.
        let _told = poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&at_once));
    }

    fn called(&self) -> impl Future<Output = Result<(), Errno>> {
        let watched = &self.get().watched;
        async move {
            let mut ready = watched.readable().await.map_err(|_| Errno::ESHUTDOWN)?;
            ready.clear_ready();
            Ok(())
        }
    }

    fn respond(&self) {
        // SAFETY: on a ring this ioctl takes no argument.
        let told = unsafe { on_number(&*self.get().fd, IOCTL_RESPOND, 0) };
        assert!(
            told.is_ok() || std::thread::panicking(),
            "the kernel takes no responses from our own ring: {told:?}"
        );
    }

    fn copy_in(&self, segments: &[TapSegment], private: &mut [u8]) {
        let mut rest = private;
        for segment in segments {
            let (part, later) = rest.split_at_mut(usize::from(segment.len));
            // SAFETY: the segment of a request in flight, which the module has mapped.
            unsafe { copy_from_shared(self.mapping().data(segment), part) };
            rest = later;
        }
    }

    fn copy_out(&self, segments: &[TapSegment], private: &[u8]) {
        let mut rest = private;
        for segment in segments {
            let (part, later) = rest.split_at(usize::from(segment.len));
            // SAFETY: the segment of a read in flight, which the module has mapped so that it can be written.
            unsafe { copy_to_shared(self.mapping().data(segment), part) };
            rest = later;
        }
    }

    async fn close(self) {
        let closing = Rc::clone(&self.closing);
        drop(self);
        closing.ended().await;
    }
}

impl Drop for LinuxTap {
    fn drop(&mut self) {
        let Some(Open { watched, page, fd }) = self.open.take() else { return };
        // The kernel closes a ring once nothing refers to it.
        drop((watched, page));
        self.closing.close(fd, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_known_by_its_answer() {
        let question = DeviceParams::question();
        let knows = |flags: u64| DeviceParams { flags: (question.flags.get() & flags).into(), ..question };
        for (module, answer, left, expected) in [
            ("XenServer", Err(Errno::EINVAL), question, Ok(())),
            ("OpenXT", Err(Errno::EINVAL), knows(0x0f), Ok(())),
            ("dkms", Err(Errno::EINVAL), knows(0x1f), Err(Errno::EOPNOTSUPP)),
            ("Linux 3", Err(Errno::ENOTTY), question, Err(Errno::ENOTTY)),
            ("2009, whose kernel passes on 515", Err(Errno(515)), question, Err(Errno::ENOTTY)),
            ("an unknown one", Ok(()), question, Err(Errno::EOPNOTSUPP)),
            ("another process's ring", Err(Errno::EACCES), question, Err(Errno::EACCES)),
        ] {
            assert_eq!(verdict(answer, &left), expected, "{module}");
        }
    }
}
