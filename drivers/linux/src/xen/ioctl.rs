//! The ioctls of Xen's devices: numbers and structures, from Linux's `xen/gntdev.h` and `xen/evtchn.h`.
//!
//! Xen's numbers encode no direction, although the structures go in and out; some ioctls answer with the return value.

use crate::files::of_rustix;
use rustix::ioctl::{Direction, Ioctl, IoctlOutput, Opcode, ioctl, opcode::from_components};
use std::ffi::c_void;
use std::marker::PhantomData;
use std::os::fd::AsFd;
use tap_host::{DomId, Errno, GrantSegment};

/// A structure with the number of the ioctl that takes it.
///
/// # Safety
///
/// The ioctl `OPCODE` accesses nothing but one `Self` and the memory that its addresses point to.
pub(super) unsafe trait Argument {
    /// The ioctl's number.
    const OPCODE: Opcode;
}

const fn number<T>(group: u8, number: u8) -> Opcode {
    from_components(Direction::None, group, number, size_of::<T>())
}

/// Asks for pages of a domain; `index` is where to map them from.
#[repr(C)]
pub(super) struct MapGrantRef {
    pub(super) count: u32,
    pub(super) pad: u32,
    pub(super) index: u64,
    pub(super) dom: u32,
    pub(super) gref: u32,
}

/// Unmaps pages.
#[repr(C)]
pub(super) struct UnmapGrantRef {
    pub(super) index: u64,
    pub(super) count: u32,
    pub(super) pad: u32,
}

/// A list of segments to copy.
#[repr(C)]
pub(super) struct GrantCopy {
    pub(super) count: u32,
    pub(super) segments: *mut CopySegment,
}

/// One segment: on each side an address of ours or a place in a granted page.
#[repr(C)]
pub(super) struct CopySegment {
    pub(super) source: u64,
    pub(super) dest: u64,
    pub(super) len: u16,
    pub(super) flags: u16,
    pub(super) status: i16,
}

/// The source is a grant.
pub(super) const GNTCOPY_SOURCE_GREF: u16 = 1;
/// The destination is a grant.
pub(super) const GNTCOPY_DEST_GREF: u16 = 2;
/// The segment was copied.
pub(super) const GNTST_OKAY: i16 = 0;

/// A place in a granted page, as the union in a segment has it: `u32` reference, `u16` offset, `u16` domain.
pub(super) fn foreign(dom: DomId, segment: GrantSegment) -> u64 {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&segment.gref.0.to_ne_bytes());
    bytes[4..6].copy_from_slice(&segment.offset.to_ne_bytes());
    bytes[6..].copy_from_slice(&dom.0.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

/// Binds another domain's port; the return value is ours.
#[repr(C)]
pub(super) struct BindInterdomain {
    pub(super) dom: u32,
    pub(super) port: u32,
}

/// Closes a port.
#[repr(C)]
pub(super) struct Unbind {
    pub(super) port: u32,
}

/// Raises the event at the other end of a port.
#[repr(C)]
pub(super) struct Notify {
    pub(super) port: u32,
}

/// Empties the queue of events.
#[repr(C)]
pub(super) struct Reset;

// SAFETY: gntdev reads the structure, including the one reference that it has room for, and writes `index`.
unsafe impl Argument for MapGrantRef {
    const OPCODE: Opcode = number::<Self>(b'G', 0);
}
// SAFETY: gntdev reads the structure.
unsafe impl Argument for UnmapGrantRef {
    const OPCODE: Opcode = number::<Self>(b'G', 1);
}
// SAFETY: gntdev reads the structure and the segments, writes their status, and copies as they say.
unsafe impl Argument for GrantCopy {
    const OPCODE: Opcode = number::<Self>(b'G', 8);
}
// SAFETY: evtchn reads the structure.
unsafe impl Argument for BindInterdomain {
    const OPCODE: Opcode = number::<Self>(b'E', 1);
}
// SAFETY: evtchn reads the structure.
unsafe impl Argument for Unbind {
    const OPCODE: Opcode = number::<Self>(b'E', 3);
}
// SAFETY: evtchn reads the structure.
unsafe impl Argument for Notify {
    const OPCODE: Opcode = number::<Self>(b'E', 4);
}
// SAFETY: evtchn ignores the argument.
unsafe impl Argument for Reset {
    const OPCODE: Opcode = number::<Self>(b'E', 5);
}

struct Call<'a, T> {
    argument: *mut T,
    lives: PhantomData<&'a mut T>,
}

// SAFETY: `Argument` says that this number takes a pointer to this structure.
unsafe impl<T: Argument> Ioctl for Call<'_, T> {
    type Output = IoctlOutput;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        T::OPCODE
    }
    fn as_ptr(&mut self) -> *mut c_void {
        self.argument.cast()
    }
    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<IoctlOutput> {
        Ok(output)
    }
}

/// Performs the ioctl and returns its return value.
///
/// # Errors
/// The device's error.
///
/// # Safety
///
/// `fd` is the device that this ioctl belongs to, and the memory at addresses in `argument` may be read or written as
/// the structure says.
pub(super) unsafe fn call<T: Argument>(fd: impl AsFd, argument: &mut T) -> Result<i32, Errno> {
    let call = Call { argument: std::ptr::from_mut(argument), lives: PhantomData };
    // SAFETY: the caller's promise, and that of `Argument`.
    unsafe { ioctl(fd, call) }.map_err(of_rustix)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tap_host::GrantRef;

    /// As a C program with the kernel's headers prints them.
    #[test]
    fn numbers_and_sizes_are_those_of_the_kernel() {
        assert_eq!((MapGrantRef::OPCODE, size_of::<MapGrantRef>()), (0x18_4700, 24));
        assert_eq!((UnmapGrantRef::OPCODE, size_of::<UnmapGrantRef>()), (0x10_4701, 16));
        assert_eq!((GrantCopy::OPCODE, size_of::<GrantCopy>()), (0x10_4708, 16));
        assert_eq!((BindInterdomain::OPCODE, size_of::<BindInterdomain>()), (0x08_4501, 8));
        assert_eq!((Unbind::OPCODE, size_of::<Unbind>()), (0x04_4503, 4));
        assert_eq!((Notify::OPCODE, size_of::<Notify>()), (0x04_4504, 4));
        assert_eq!(Reset::OPCODE, 0x00_4505);
        assert_eq!(size_of::<CopySegment>(), 24);
    }

    #[test]
    fn a_place_in_a_granted_page() {
        let segment = GrantSegment { gref: GrantRef(0x0102_0304), offset: 0x0506, len: 1 };
        let bytes = foreign(DomId(0x0708), segment).to_ne_bytes();
        assert_eq!(u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]), 0x0102_0304);
        assert_eq!(u16::from_ne_bytes([bytes[4], bytes[5]]), 0x0506);
        assert_eq!(u16::from_ne_bytes([bytes[6], bytes[7]]), 0x0708);
    }
}
