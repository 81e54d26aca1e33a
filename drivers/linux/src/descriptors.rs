//! Descriptors that the process was started with.

use rustix::io::{FdFlags, fcntl_setfd};
use std::fs::read_dir;
use std::os::fd::{BorrowedFd, RawFd};

/// The first descriptor behind the standard streams.
const FIRST: RawFd = 3;

/// From now on no program that this one starts inherits what is open now, but for the standard streams. A script that
/// holds a lock on a descriptor would otherwise lend it to a tapdisk, which lives longer.
pub fn keep_descriptors() {
    let Ok(open) = read_dir("/proc/self/fd") else { return };
    for number in open.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<RawFd>().ok()) {
        if number >= FIRST {
            // SAFETY: only the kernel uses the number, and it returns an error if it is not open.
            let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
            // What has been closed since the look is not inherited.
            let _closed = fcntl_setfd(borrowed, FdFlags::CLOEXEC);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::fcntl_getfd;

    #[test]
    fn what_is_open_is_not_inherited_any_more() {
        let file = std::fs::File::open("/proc/self/status").expect("it is there");
        fcntl_setfd(&file, FdFlags::empty()).expect("it is open");
        keep_descriptors();
        assert_eq!(fcntl_getfd(&file), Ok(FdFlags::CLOEXEC));
    }
}
