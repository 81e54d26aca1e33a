//! How the kernel treats a process that does I/O: its priority (ioprio_set(2)), and whether the kernel itself waits for
//! it (prctl(2)).

use tap_host::Errno;

/// The target is one thread, by its number.
const IOPRIO_WHO_PROCESS: i64 = 1;
/// Where the class begins in the priority.
const IOPRIO_CLASS_SHIFT: u8 = 13;

/// Memory for the calling thread does not wait for writes of the kernel.
const PR_SET_IO_FLUSHER: i32 = 57;

/// Sets the I/O priority of the calling thread and of threads that it starts from now on: class 1 (realtime), 2 (best
/// effort) or 3 (idle), level 0 (first) to 7 (last).
///
/// # Errors
/// `EPERM` for realtime without permission, `EINVAL` for a class or level that does not exist.
pub fn set_io_priority(class: u8, level: u8) -> Result<(), Errno> {
    if level > 7 {
        // Linux 6.5 and later interpret the higher bits as a hint of another kind.
        return Err(Errno::EINVAL);
    }
    let priority = i64::from(class) << IOPRIO_CLASS_SHIFT | i64::from(level);
    // SAFETY: the call takes three numbers and touches no memory.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0_i64, priority) };
    if result == 0 { Ok(()) } else { Err(crate::files::errno(&std::io::Error::last_os_error())) }
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
    fn a_priority_is_taken_and_a_wrong_one_refused() {
        assert_eq!(set_io_priority(2, 7), Ok(()));
        assert_eq!(set_io_priority(2, 8), Err(Errno::EINVAL));
        assert_eq!(set_io_priority(7, 0), Err(Errno::EINVAL));
    }
}
