//! The ioctls of blktap2. Their numbers are plain: they encode neither a direction nor a size.

use crate::files::of_rustix;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};
use std::ffi::c_void;
use std::os::fd::AsFd;
use tap_host::Errno;

struct Plain {
    number: Opcode,
    argument: *mut c_void,
}

// SAFETY: the makers of this structure say what their ioctl does with the argument.
unsafe impl Ioctl for Plain {
    type Output = IoctlOutput;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.number
    }
    fn as_ptr(&mut self) -> *mut c_void {
        self.argument
    }
    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<IoctlOutput> {
        Ok(output)
    }
}

/// Performs an ioctl of blktap2 whose argument is memory of `LEN` bytes.
///
/// # Errors
/// The module's error.
///
/// # Safety
///
/// `fd` is a node of blktap2, where this ioctl reads and writes at most `LEN` bytes.
pub(super) unsafe fn on_bytes<const LEN: usize>(
    fd: impl AsFd,
    number: u32,
    bytes: &mut [u8; LEN],
) -> Result<(), Errno> {
    let call = Plain { number, argument: bytes.as_mut_ptr().cast() };
    // SAFETY: the caller's promise.
    unsafe { ioctl(fd, call) }.map(drop).map_err(of_rustix)
}

/// Performs an ioctl of blktap2 whose argument is a number, or that has none.
///
/// # Errors
/// The module's error.
///
/// # Safety
///
/// `fd` is a node of blktap2, where this ioctl takes no memory.
pub(super) unsafe fn on_number(fd: impl AsFd, number: u32, argument: u32) -> Result<(), Errno> {
    let call = Plain { number, argument: std::ptr::without_provenance_mut(argument as usize) };
    // SAFETY: the caller's promise.
    unsafe { ioctl(fd, call) }.map(drop).map_err(of_rustix)
}
