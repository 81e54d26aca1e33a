//! Descriptors that the process was started with.

use rustix::io::{FdFlags, fcntl_setfd};
use std::fs::read_dir;
use std::os::fd::{BorrowedFd, RawFd};

/// The first descriptor behind the standard streams.
const FIRST: RawFd = 3;

/// The descriptors behind the standard streams that are open.
fn open_descriptors() -> Vec<RawFd> {
    let Ok(open) = read_dir("/proc/self/fd") else { return Vec::new() };
    let numbers = open.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<RawFd>().ok());
    numbers.filter(|number| *number >= FIRST).collect()
}

/// Closes what is open, but for the standard streams and `kept`. Nothing else may use the process's descriptors: it has
/// just begun.
pub(crate) fn close_descriptors_but(kept: &[RawFd]) {
    for number in open_descriptors().into_iter().filter(|number| !kept.contains(number)) {
        // SAFETY: nobody owns it, since the process has opened nothing but `kept` yet. One that was closed since the
        // look, which is that of the folder, is only refused.
        let _closed = unsafe { libc::close(number) };
    }
}

/// From now on no program that this one starts inherits what is open now, but for the standard streams. A script that
/// holds a lock on a descriptor would otherwise lend it to a tapdisk, which lives longer.
pub fn keep_descriptors() {
    for number in open_descriptors() {
        // SAFETY: only the kernel uses the number, and it returns an error if it is not open.
        let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
        // What has been closed since the look is not inherited.
        let _closed = fcntl_setfd(borrowed, FdFlags::CLOEXEC);
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
