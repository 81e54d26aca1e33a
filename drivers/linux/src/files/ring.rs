//! io_uring: operations of one turn go to the kernel in one system call.
//!
//! ```text
//!   push, push, push ──► submission queue ── io_uring_enter ──► kernel
//!   reap ◄──────────── completion queue ◄── posted by the kernel; read without a system call
//! ```
//!
//! The ring's descriptor is readable when there are completions; the event loop watches it like a socket. That rules
//! out IORING_SETUP_DEFER_TASKRUN, under which it does not become readable (seen on Linux 6.18) and an eventfd must be
//! registered: measured, that costs more than it saves (4.3 against 3.1 us of CPU for a direct read at depth 32, and
//! one more system call for each batch).

use super::call::{Call, Memory, errno, zero_flags};
use super::engine::{Job, Submit};
use crate::priority::raw;
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use tap_host::Errno;

/// Operations that the kernel has at a time; the rest wait in our queue. The second is for kernels before 5.12, which
/// count the memory of the ring as locked.
const ENTRIES: [u32; 2] = [1024, 256];
/// As many as a scheduler sends at once.
const OF_ONE_DISK_MAX: usize = 128;
/// Workers of the kernel for operations that it cannot start without waiting, such as writes through the page cache:
/// one that hangs keeps its worker. The kernel's own limit is 4 for each CPU.
const WORKERS_MAX: u32 = 64;
/// IORING_ENTER_GETEVENTS: post completions that wait for this thread.
const GET_EVENTS: u32 = 1;

/// A ring.
pub(crate) struct Ring {
    uring: IoUring,
    /// How many operations it takes.
    entries: u32,
    ftruncate: bool,
}

impl Ring {
    /// A ring for this thread.
    ///
    /// # Errors
    /// `ENOSYS`, `EPERM` if the kernel refuses io_uring; `EOPNOTSUPP` if it lacks operations that we need.
    pub(crate) fn new() -> Result<Self, Errno> {
        let (uring, entries) = Self::build().map_err(|e| errno(&e))?;
        let mut probe = io_uring::Probe::new();
        uring.submitter().register_probe(&mut probe).map_err(|e| errno(&e))?;
        let needed = [opcode::Read::CODE, opcode::Write::CODE, opcode::Readv::CODE, opcode::Writev::CODE];
        let more = [opcode::Fsync::CODE, opcode::Fallocate::CODE];
        if needed.into_iter().chain(more).any(|code| !probe.is_supported(code)) {
            return Err(Errno::EOPNOTSUPP);
        }
        let ftruncate = probe.is_supported(opcode::Ftruncate::CODE);
        // Linux 5.15. Without it only disks that hang differ.
        let _refused = uring.submitter().register_iowq_max_workers(&mut [WORKERS_MAX, 0]);
        Ok(Self { uring, entries, ftruncate })
    }

    /// A ring, and how many operations it takes.
    fn build() -> io::Result<(IoUring, u32)> {
        let mut built = Self::build_for(ENTRIES[0]).map(|uring| (uring, ENTRIES[0]));
        if built.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::ENOMEM)) {
            built = Self::build_for(ENTRIES[1]).map(|uring| (uring, ENTRIES[1]));
        }
        built
    }

    fn build_for(entries: u32) -> io::Result<IoUring> {
        let mut modern = IoUring::builder();
        modern.setup_cqsize(2 * entries).dontfork();
        let plain = modern.clone();
        // Completions are posted when we are in the kernel anyway, not by interrupting us (Linux 6.0).
        modern.setup_single_issuer().setup_coop_taskrun();
        modern.build(entries).or_else(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => plain.build(entries),
            _ => Err(error),
        })
    }

    /// Only a transfer has a priority: the kernel refuses the others with one (`EINVAL`).
    fn entry(Job { call, fd, priority }: Job, memory: &Memory) -> squeue::Entry {
        let (fd, ioprio) = (Fd(fd), priority.map_or(0, raw));
        // UIO_MAXIOV bounds the count, MAX_RW_COUNT the bytes of one call.
        let count = memory.len() as u32;
        let len = |one: &libc::iovec| one.iov_len as u32;
        match (call, memory.as_slice()) {
            (Call::Read(offset), [one]) => {
                opcode::Read::new(fd, one.iov_base.cast(), len(one)).offset(offset).ioprio(ioprio).build()
            }
            (Call::Read(offset), _) => {
                opcode::Readv::new(fd, memory.as_ptr(), count).offset(offset).ioprio(ioprio).build()
            }
            (Call::Write(offset), [one]) => {
                opcode::Write::new(fd, one.iov_base.cast(), len(one)).offset(offset).ioprio(ioprio).build()
            }
            (Call::Write(offset), _) => {
                opcode::Writev::new(fd, memory.as_ptr(), count).offset(offset).ioprio(ioprio).build()
            }
            (Call::SyncData, _) => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
            (Call::SetSize(size), _) => opcode::Ftruncate::new(fd, size).build(),
            (Call::Zero { offset, len, mode }, _) => {
                opcode::Fallocate::new(fd, len).offset(offset).mode(zero_flags(mode)).build()
            }
        }
    }

    fn enter(&mut self, min_complete: u32) -> Result<(), Errno> {
        self.uring.submission().sync();
        let queued = self.uring.submission().len() as u32;
        // SAFETY: no argument is passed.
        let entered =
            unsafe { self.uring.submitter().enter::<libc::sigset_t>(queued, min_complete, GET_EVENTS, None) };
        match entered.map_err(|e| errno(&e)) {
            Ok(_) => Ok(()),
            // Transient: what was not taken stays in the submission queue, and the next turn tries again.
            Err(Errno::EINTR | Errno::EAGAIN | Errno::EBUSY) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl Submit for Ring {
    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring keeps its descriptor open while it lives.
        unsafe { BorrowedFd::borrow_raw(self.uring.as_raw_fd()) }
    }

    fn room(&self) -> (usize, usize) {
        (self.entries as usize, OF_ONE_DISK_MAX)
    }

    fn does(&self, call: Call) -> bool {
        self.ftruncate || !matches!(call, Call::SetSize(_))
    }

    unsafe fn push(&mut self, index: u32, job: Job, memory: &Memory) {
        let entry = Self::entry(job, memory).user_data(u64::from(index));
        // SAFETY: the caller keeps descriptor and memory until the completion is reaped.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        assert!(pushed.is_ok(), "the submission queue holds as many entries as may be in flight");
    }

    fn submit(&mut self) -> Result<(), Errno> {
        if self.uring.submission().is_empty() { Ok(()) } else { self.enter(0) }
    }

    fn reap(&mut self, done: &mut Vec<(u32, i32)>) {
        done.extend(self.uring.completion().map(|c| (c.user_data() as u32, c.result())));
    }

    fn wait(&mut self) -> Result<(), Errno> {
        self.enter(1)
    }

    fn unsubmitted(&mut self) -> bool {
        !self.uring.submission().is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tap_host::ZeroMode;

    /// The first bytes of an entry, as linux/io_uring.h has them: operation, flags, ioprio.
    fn head(call: Call, pieces: usize, priority: &str) -> (u8, u16) {
        let one = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 512 };
        let memory = std::iter::repeat_n(one, pieces).collect();
        let entry = Ring::entry(Job { call, fd: 0, priority: priority.parse().ok() }, &memory);
        // SAFETY: an entry is 64 bytes without padding, all of which are initialised.
        let bytes = unsafe { std::mem::transmute::<squeue::Entry, [u8; 64]>(entry) };
        (bytes[0], u16::from_ne_bytes([bytes[2], bytes[3]]))
    }

    #[test]
    fn transfers_have_their_priority_and_nothing_else_has_one() {
        let idle = 3 << 13;
        assert_eq!(head(Call::Read(0), 1, "idle"), (opcode::Read::CODE, idle));
        assert_eq!(head(Call::Read(0), 2, "idle"), (opcode::Readv::CODE, idle));
        assert_eq!(head(Call::Write(0), 1, "best-effort:7"), (opcode::Write::CODE, 2 << 13 | 7));
        assert_eq!(head(Call::Write(0), 2, "realtime:1"), (opcode::Writev::CODE, 1 << 13 | 1));
        assert_eq!(head(Call::Write(0), 2, "that of the process"), (opcode::Writev::CODE, 0));
        for call in
            [Call::SyncData, Call::SetSize(0), Call::Zero { offset: 0, len: 512, mode: ZeroMode::Unmap }]
        {
            assert_eq!(head(call, 0, "idle").1, 0, "{call:?}");
        }
    }
}
