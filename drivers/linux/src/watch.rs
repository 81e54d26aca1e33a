//! Descriptors whose readiness tokio watches.

use crate::files::errno;
use std::os::fd::OwnedFd;
use tap_host::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Watches a descriptor of our own, which does not block.
///
/// # Errors
/// `EMFILE` or the like if it cannot be watched.
pub(crate) fn watch(fd: OwnedFd, interest: Interest) -> Result<AsyncFd<OwnedFd>, Errno> {
    // SAFETY: an `OwnedFd` is always the same open descriptor, and stays open while the `AsyncFd` owns it.
    let watched = unsafe { AsyncFd::register_with_interest(fd, interest) };
    watched.map_err(|refused| errno(&refused.into_parts().1))
}
