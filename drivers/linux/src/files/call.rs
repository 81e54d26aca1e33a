//! One operation on a descriptor, executed by the ring, a thread or the caller itself.
//!
//! This is where memory is passed to the kernel: an operation reads or writes the buffers that its `iovec`s point to.
//! The code that executes one guarantees that the buffers stay alive, and that nothing else touches them, until it has
//! ended.

use smallvec::SmallVec;
use std::os::fd::RawFd;
use tap_host::{Errno, IoVec, ZeroMode};

/// Most pieces of memory in one call (UIO_MAXIOV); the rest is left for the next.
pub(crate) const IOV_MAX: usize = 1024;

/// What to do, without the memory to do it with.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Call {
    /// preadv at a byte offset.
    Read(u64),
    /// pwritev at a byte offset.
    Write(u64),
    /// fdatasync.
    SyncData,
    /// ftruncate to a size in bytes.
    SetSize(u64),
    /// fallocate that makes a range read as zeros.
    Zero { offset: u64, len: u64, mode: ZeroMode },
}

/// Where the bytes of an operation are. A list of several pieces is on the heap, so that a slot can move while the
/// kernel reads it.
pub(crate) type Memory = SmallVec<[libc::iovec; 1]>;

/// The memory of `bufs`, as much as one call takes.
#[inline]
pub(crate) fn memory_of<A: smallvec::Array<Item = libc::iovec>>(bufs: &mut IoVec) -> SmallVec<A> {
    bufs.iter_mut()
        .take(IOV_MAX)
        .map(|b| libc::iovec { iov_base: b.as_mut_ptr().cast(), iov_len: b.len() })
        .collect()
}

/// The flags of fallocate(2) for `mode`; neither changes the size.
pub(crate) fn zero_flags(mode: ZeroMode) -> i32 {
    libc::FALLOC_FL_KEEP_SIZE
        | match mode {
            ZeroMode::Unmap => libc::FALLOC_FL_PUNCH_HOLE,
            ZeroMode::Keep => libc::FALLOC_FL_ZERO_RANGE,
        }
}

/// Whether an operation may wait for a device.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait {
    /// It may.
    Allowed,
    /// `EAGAIN` instead (RWF_NOWAIT); reads only. A count of 0 then means nothing.
    Never,
}

impl Call {
    /// Executes the operation on this thread and returns its count.
    ///
    /// # Safety
    /// `memory` is valid, for writing too if this is a read, and not touched by anything else meanwhile.
    pub(crate) unsafe fn execute(
        self,
        fd: RawFd,
        memory: &[libc::iovec],
        wait: Wait,
    ) -> Result<usize, Errno> {
        loop {
            // SAFETY: by this function's contract; the other arguments are plain numbers.
            let result = unsafe { self.system_call(fd, memory, wait) };
            match usize::try_from(result) {
                Ok(count) => return Ok(count),
                Err(_) => match last_error() {
                    Errno::EINTR => {}
                    error => return Err(error),
                },
            }
        }
    }

    /// # Safety
    /// As [`Call::execute`].
    unsafe fn system_call(self, fd: RawFd, memory: &[libc::iovec], wait: Wait) -> isize {
        // Fits loff_t; `LinuxFile` refuses larger values.
        let off = |offset: u64| offset as libc::off_t;
        let count = memory.len() as libc::c_int;
        match (self, memory) {
            (Call::Read(offset), _) if wait == Wait::Never => {
                // SAFETY: by this function's contract.
                unsafe { libc::preadv2(fd, memory.as_ptr(), count, off(offset), libc::RWF_NOWAIT) }
            }
            (Call::Read(offset), [one]) => {
                // SAFETY: by this function's contract.
                unsafe { libc::pread(fd, one.iov_base, one.iov_len, off(offset)) }
            }
            (Call::Read(offset), _) => {
                // SAFETY: by this function's contract.
                unsafe { libc::preadv(fd, memory.as_ptr(), count, off(offset)) }
            }
            (Call::Write(offset), [one]) => {
                // SAFETY: by this function's contract.
                unsafe { libc::pwrite(fd, one.iov_base, one.iov_len, off(offset)) }
            }
            (Call::Write(offset), _) => {
                // SAFETY: by this function's contract.
                unsafe { libc::pwritev(fd, memory.as_ptr(), count, off(offset)) }
            }
            (Call::SyncData, _) => {
                // SAFETY: no memory is involved.
                unsafe { libc::fdatasync(fd) as isize }
            }
            (Call::SetSize(size), _) => {
                // SAFETY: no memory is involved.
                unsafe { libc::ftruncate(fd, off(size)) as isize }
            }
            (Call::Zero { offset, len, mode }, _) => {
                // SAFETY: no memory is involved.
                unsafe { libc::fallocate(fd, zero_flags(mode), off(offset), off(len)) as isize }
            }
        }
    }
}

/// The error of the system call that failed last on this thread.
pub(crate) fn last_error() -> Errno {
    errno(&std::io::Error::last_os_error())
}

/// The error number of a standard library error; `EIO` if it has none.
pub(crate) fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno)
}
