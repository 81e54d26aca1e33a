//! Who is at the other end of a unix socket.

use crate::files::errno;
use std::io::Error;
use std::os::fd::{AsRawFd, OwnedFd};
use tap_host::Errno;

/// The user of the process at the other end of `socket`. The number of that process is not asked for: one in a PID
/// namespace that is not below ours has none here, and is reported with 0.
///
/// # Errors
/// As getsockopt(2).
pub(super) fn user_of(socket: &OwnedFd) -> Result<u32, Errno> {
    let mut peer = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    let (option, value) = (libc::SO_PEERCRED, (&raw mut peer).cast());
    // SAFETY: the kernel writes at most `len` bytes to `peer`, which is as large.
    let got = unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, value, &raw mut len) };
    if got == 0 { Ok(peer.uid) } else { Err(errno(&Error::last_os_error())) }
}
