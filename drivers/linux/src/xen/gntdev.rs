//! Pages of other domains: /dev/xen/gntdev.
//!
//! A mapped grant stays valid until we unmap it, whatever its owner does, even if the owner is gone: Xen holds the page
//! for us. Copies go through the hypervisor, which checks the grant each time.

use super::ioctl::{
    CopySegment, GNTCOPY_DEST_GREF, GNTCOPY_SOURCE_GREF, GNTST_OKAY, GrantCopy, MapGrantRef, UnmapGrantRef,
    call, foreign,
};
use super::page::LinuxPage;
use smallvec::SmallVec;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use tap_host::{DomId, Errno, GrantRef, GrantSegment, PAGE_BYTES};

/// Most segments of one ioctl; the kernel takes any number, at the cost of memory.
const SEGMENTS_MAX: usize = 256;

/// The device.
#[derive(Clone)]
pub(super) struct Gntdev(Rc<OwnedFd>);

/// The direction of a copy.
#[derive(Clone, Copy)]
enum Direction {
    In,
    Out,
}

impl Gntdev {
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self(Rc::new(fd))
    }

    /// See [`tap_host::Grants::map`].
    pub(super) fn map(&self, dom: DomId, gref: GrantRef, write: bool) -> Result<LinuxPage, Errno> {
        let mut map = MapGrantRef { count: 1, pad: 0, index: 0, dom: dom.0.into(), gref: gref.0 };
        // SAFETY: the device is gntdev; the structure has no addresses.
        unsafe { call(&*self.0, &mut map)? };
        let (device, index) = (self.clone(), map.index);
        let unmapped = move || {
            let mut unmap = UnmapGrantRef { index, count: 1, pad: 0 };
            // SAFETY: the device is gntdev; the structure has no addresses.
            let given_back = unsafe { call(&*device.0, &mut unmap) };
            assert!(given_back.is_ok(), "failed to unmap our own grant mapping: {given_back:?}");
        };
        LinuxPage::map(&*self.0, map.index, write, Some(Box::new(unmapped)))
    }

    /// See [`tap_host::Grants::copy_in`].
    pub(super) fn copy_in(
        &self,
        dom: DomId,
        segments: &[GrantSegment],
        private: &mut [u8],
    ) -> Result<(), Errno> {
        let memory = private.as_mut_ptr().expose_provenance();
        // SAFETY: the kernel writes only to `private`, which we borrow exclusively.
        unsafe { self.copy(dom, segments, memory, private.len(), Direction::In) }
    }

    /// See [`tap_host::Grants::copy_out`].
    pub(super) fn copy_out(
        &self,
        dom: DomId,
        segments: &[GrantSegment],
        private: &[u8],
    ) -> Result<(), Errno> {
        let memory = private.as_ptr().expose_provenance();
        // SAFETY: the kernel reads `private`.
        unsafe { self.copy(dom, segments, memory, private.len(), Direction::Out) }
    }

    /// # Safety
    ///
    /// `len` bytes at the address `memory` may be read, or written if the direction is `In`.
    unsafe fn copy(
        &self,
        dom: DomId,
        segments: &[GrantSegment],
        memory: usize,
        len: usize,
        direction: Direction,
    ) -> Result<(), Errno> {
        let within = |s: &GrantSegment| usize::from(s.offset) + usize::from(s.len) <= PAGE_BYTES;
        let sum: usize = segments.iter().map(|segment| usize::from(segment.len)).sum();
        if sum != len || !segments.iter().all(within) {
            return Err(Errno::EINVAL);
        }
        let mut at = memory as u64;
        for part in segments.chunks(SEGMENTS_MAX) {
            let mut list: SmallVec<[CopySegment; 16]> = SmallVec::new();
            for segment in part.iter().filter(|segment| segment.len > 0) {
                let theirs = foreign(dom, *segment);
                let (source, dest, flags) = match direction {
                    Direction::In => (theirs, at, GNTCOPY_SOURCE_GREF),
                    Direction::Out => (at, theirs, GNTCOPY_DEST_GREF),
                };
                list.push(CopySegment { source, dest, len: segment.len, flags, status: GNTST_OKAY });
                at += u64::from(segment.len);
            }
            if list.is_empty() {
                continue;
            }
            let mut copy = GrantCopy { count: list.len() as u32, segments: list.as_mut_ptr() };
            // SAFETY: the device is gntdev; there are `count` segments, whose addresses lie in `memory`, which is ours
            // by the caller's promise.
            unsafe { call(&*self.0, &mut copy)? };
            if list.iter().any(|segment| segment.status != GNTST_OKAY) {
                return Err(Errno::EINVAL);
            }
        }
        Ok(())
    }
}
