//! How the kernel treats a process that does I/O: its priority (ioprio_set(2)), and whether the kernel itself waits for
//! it (prctl(2)).

use crate::files::last_error;
use tap_host::{Errno, IoPriority};

/// The target is one thread, by its number.
const IOPRIO_WHO_PROCESS: i64 = 1;
/// Where the class begins in the priority.
const IOPRIO_CLASS_SHIFT: u8 = 13;

/// Memory for the calling thread does not wait for writes of the kernel.
const PR_SET_IO_FLUSHER: i32 = 57;

/// Sets the I/O priority of the calling thread and of threads that it starts from now on.
///
/// # Errors
/// `EPERM` for realtime without permission (CAP_SYS_NICE or CAP_SYS_ADMIN).
pub fn set_io_priority(priority: IoPriority) -> Result<(), Errno> {
    set_of_thread(raw(priority))
}

/// As the kernel writes it, also in `ioprio` of an entry of io_uring.
pub(crate) fn raw(priority: IoPriority) -> u16 {
    u16::from(priority.class()) << IOPRIO_CLASS_SHIFT | u16::from(priority.level())
}

fn set_of_thread(raw: u16) -> Result<(), Errno> {
    // SAFETY: the call takes three numbers and touches no memory.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0_i64, i64::from(raw)) };
    if result == 0 { Ok(()) } else { Err(last_error()) }
}

/// That of the calling thread, such that it can be set again.
pub(crate) fn of_thread() -> u16 {
    // SAFETY: the call takes two numbers and touches no memory.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, 0_i64) };
    // Kernels before 5.18 report a level of no class, which they do not take.
    u16::try_from(result).ok().filter(|raw| raw >> IOPRIO_CLASS_SHIFT != 0).unwrap_or(0)
}

/// Whether a thread of this process may have `priority`.
///
/// # Errors
/// `EPERM` if not.
pub(crate) fn try_out(priority: IoPriority) -> Result<(), Errno> {
    let _back = AtPriority::new(Some(priority));
    set_io_priority(priority)
}

/// The priority of a thread that works for one file after the other.
///
/// A priority that the kernel took once, and refuses later, leaves the thread with the one of the process: a request
/// that is carried out late is better than one that fails.
pub(crate) struct ThreadPriority {
    /// What it began with: that of the process.
    own: u16,
    now: u16,
}

impl ThreadPriority {
    /// That of the calling thread.
    pub(crate) fn new() -> Self {
        let own = of_thread();
        Self { own, now: own }
    }

    /// The calling thread, which is the one of this, works for a file with this priority from now on.
    pub(crate) fn become_that_of(&mut self, file: Option<IoPriority>) {
        let wanted = file.map_or(self.own, raw);
        if wanted == self.now {
            return;
        }
        self.now = match set_of_thread(wanted) {
            Ok(()) => wanted,
            Err(_) => {
                let _as_well_as_possible = set_of_thread(self.own);
                self.own
            }
        };
    }
}

/// The calling thread has a priority until this is dropped.
pub(crate) struct AtPriority(Option<ThreadPriority>);

impl AtPriority {
    /// Without a priority it keeps that of the process.
    pub(crate) fn new(priority: Option<IoPriority>) -> Self {
        Self(priority.map(|priority| {
            let mut thread = ThreadPriority::new();
            thread.become_that_of(Some(priority));
            thread
        }))
    }
}

impl Drop for AtPriority {
    fn drop(&mut self) {
        if let Some(thread) = &mut self.0 {
            thread.become_that_of(None);
        }
    }
}

/// Says that the kernel's own writes may depend on the calling thread, and on threads that it starts from now on: they
/// get memory without waiting for such a write (`PR_SET_IO_FLUSHER`).
///
/// # Errors
/// `EPERM` without CAP_SYS_RESOURCE, `EINVAL` before Linux 5.6.
pub fn writes_for_the_kernel() -> Result<(), Errno> {
    // SAFETY: the call takes numbers and touches no memory.
    let result = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    if result == 0 { Ok(()) } else { Err(crate::files::errno(&std::io::Error::last_os_error())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_priority_is_taken() {
        let lowest = "best-effort:7".parse().unwrap();
        assert_eq!((set_io_priority(lowest), of_thread()), (Ok(()), 2 << 13 | 7));
    }

    #[test]
    fn a_thread_keeps_the_priority_of_no_file() {
        let [idle, high] = ["idle", "best-effort:1"].map(|text| text.parse::<IoPriority>().unwrap());
        let own = of_thread();
        let mut thread = ThreadPriority::new();
        for (file, seen) in
            [(Some(idle), 3 << 13), (Some(high), 2 << 13 | 1), (None, own), (Some(idle), 3 << 13)]
        {
            thread.become_that_of(file);
            assert_eq!(of_thread(), seen);
        }
        thread.become_that_of(None);
        drop(AtPriority::new(None));
        let at = AtPriority::new(Some(high));
        assert_eq!(of_thread(), 2 << 13 | 1);
        drop(at);
        assert_eq!(of_thread(), own);
        assert_eq!((try_out(idle), of_thread()), (Ok(()), own));
    }
}
