//! A page that other domains can write at any moment.
//!
//! No reference to its bytes ever exists: a number is loaded and stored atomically, bytes are copied word by word with
//! volatile accesses, so that the compiler neither reads a byte twice nor assumes that it still holds what was read.

use crate::files::of_rustix;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use tap_host::{Errno, PAGE_BYTES, SharedPage};

/// Called when a page is no longer mapped.
type Unmapped = Box<dyn Fn()>;

/// A mapped page; clones share the mapping.
#[derive(Clone)]
pub struct LinuxPage(Rc<Inner>);

struct Inner {
    start: NonNull<u8>,
    writable: bool,
    unmapped: Option<Unmapped>,
}

impl LinuxPage {
    /// Maps the page of `fd` at `offset`. `unmapped` is called once the mapping is gone, and also if mapping fails.
    ///
    /// # Errors
    /// The kernel's error.
    pub(super) fn map(
        fd: impl AsFd,
        offset: u64,
        writable: bool,
        unmapped: Option<Unmapped>,
    ) -> Result<Self, Errno> {
        let access = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: the kernel chooses the address, so no mapping of ours is replaced.
        let start = unsafe { mmap(std::ptr::null_mut(), PAGE_BYTES, access, MapFlags::SHARED, fd, offset) };
        match start.map(|start| NonNull::new(start.cast())) {
            Ok(Some(start)) => Ok(Self(Rc::new(Inner { start, writable, unmapped }))),
            Ok(None) => unreachable!("the kernel never chooses address 0 for a mapping"),
            Err(error) => {
                if let Some(unmapped) = unmapped {
                    unmapped();
                }
                Err(of_rustix(error))
            }
        }
    }

    /// The address of `len` bytes at `offset`, all in the page.
    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        let end = offset.checked_add(len);
        assert!(end.is_some_and(|end| end <= PAGE_BYTES), "{len} bytes at {offset} of a page");
        self.0.start.as_ptr().wrapping_add(offset)
    }

    fn writable_at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(self.0.writable, "write to a page that is mapped read-only");
        self.at(offset, len)
    }

    fn number(&self, start: *mut u8) -> &AtomicU32 {
        assert!(start.addr().is_multiple_of(align_of::<AtomicU32>()), "an unaligned number");
        // SAFETY: aligned, in the page (`at`), which stays mapped while `self` lives. Within this process only one
        // thread accesses it; other domains access it with atomic instructions of their processors.
        unsafe { AtomicU32::from_ptr(start.cast()) }
    }
}

/// Bytes that are copied at a time.
const WORD: usize = size_of::<u64>();

/// Copies memory that others can write into `private`.
///
/// # Safety
///
/// As many bytes as `private` has are mapped from `from` on.
pub(crate) unsafe fn copy_from_shared(from: *const u8, private: &mut [u8]) {
    let (mut from, mut rest) = (from, private);
    while !rest.is_empty() {
        let whole = rest.len() >= WORD && from.addr().is_multiple_of(WORD);
        let len = if whole { WORD } else { 1 };
        let (now, later) = rest.split_at_mut(len);
        if whole {
            // SAFETY: a whole aligned word of the caller's memory.
            let word = unsafe { from.cast::<u64>().read_volatile() };
            now.copy_from_slice(&word.to_ne_bytes());
        } else {
            // SAFETY: a byte of the caller's memory.
            now[0] = unsafe { from.read_volatile() };
        }
        from = from.wrapping_add(len);
        rest = later;
    }
}

/// Copies `private` into memory that others can read and write.
///
/// # Safety
///
/// As many bytes as `private` has are mapped from `to` on, and can be written.
pub(crate) unsafe fn copy_to_shared(to: *mut u8, private: &[u8]) {
    let (mut to, mut rest) = (to, private);
    while !rest.is_empty() {
        let word = rest.first_chunk::<WORD>().filter(|_| to.addr().is_multiple_of(WORD));
        let len = match word {
            Some(word) => {
                // SAFETY: a whole aligned word of the caller's memory.
                unsafe { to.cast::<u64>().write_volatile(u64::from_ne_bytes(*word)) };
                WORD
            }
            None => {
                // SAFETY: a byte of the caller's memory.
                unsafe { to.write_volatile(rest[0]) };
                1
            }
        };
        to = to.wrapping_add(len);
        rest = &rest[len..];
    }
}

impl SharedPage for LinuxPage {
    fn load_u32(&self, offset: usize) -> u32 {
        u32::from_le(self.number(self.at(offset, 4)).load(Ordering::Acquire))
    }

    fn store_u32(&self, offset: usize, value: u32) {
        self.number(self.writable_at(offset, 4)).store(value.to_le(), Ordering::Release);
    }

    fn copy_in(&self, offset: usize, private: &mut [u8]) {
        let from = self.at(offset, private.len());
        // SAFETY: as many bytes in the page, which stays mapped while `self` lives.
        unsafe { copy_from_shared(from, private) };
    }

    fn copy_out(&self, offset: usize, private: &[u8]) {
        let to = self.writable_at(offset, private.len());
        // SAFETY: as many bytes in the page, which stays mapped while `self` lives and can be written.
        unsafe { copy_to_shared(to, private) };
    }

    fn full_barrier(&self) {
        fence(Ordering::SeqCst);
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this size, and its address is not used any more.
        let gone = unsafe { munmap(self.start.as_ptr().cast(), PAGE_BYTES) };
        assert!(
            gone.is_ok() || std::thread::panicking(),
            "a mapping of our own cannot be unmapped: {gone:?}"
        );
        if let Some(unmapped) = &self.unmapped {
            unmapped();
        }
    }
}
