//! Locks at the byte positions that QEMU uses, so that its tools and ours exclude each other.
//!
//! ```text
//!   byte 100 + n   held by users of permission n          n: 0 consistent read, 1 write,
//!   byte 200 + n   held by those who do not share it         2 write unchanged, 3 resize
//! ```
//!
//! All locks are read locks, so any number of processes can hold a byte. A process first takes its bytes and then
//! checks whether another one uses what it does not share, or does not share what it uses; of two that do so at the
//! same time at least one sees the other. The locks belong to the open file (F_OFD_SETLK): unlike POSIX locks they are
//! not lost when another descriptor of the same file is closed.
//!
//! `Sole` is that of a writer and flock(2) besides: the kernel keeps the two apart, and programs of other origin that
//! lock the markers of minor numbers know only the latter. Images have none: udev leaves a block device alone while
//! somebody has such a lock on it, and NFS makes one of the two kinds out of the other.
//!
//! Specification: QEMU's `block/file-posix.c` and the section "Image locking" of its manual.

use super::{last_error, of_rustix};
use rustix::fs::{FlockOperation, flock};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use tap_host::{Errno, LockKind};

const USED_BASE: i64 = 100;
const UNSHARED_BASE: i64 = 200;
/// Permissions have numbers below this.
const PERMISSIONS: i64 = 5;

const READ: u8 = 1;
const WRITE: u8 = 2;
const WRITE_UNCHANGED: u8 = 4;
const RESIZE: u8 = 8;

/// Permissions as bit sets: those used, and those that no other process may use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Claim {
    used: u8,
    unshared: u8,
}

impl Claim {
    const NONE: Claim = Claim { used: 0, unshared: 0 };

    fn of(kind: LockKind) -> Self {
        match kind {
            LockKind::Shared => Self { used: READ, unshared: WRITE | RESIZE },
            LockKind::Exclusive | LockKind::Sole => {
                Self { used: READ | WRITE | RESIZE, unshared: READ | WRITE | WRITE_UNCHANGED | RESIZE }
            }
        }
    }
}

/// Takes the lock of an open file, or changes it from `before`.
///
/// # Errors
/// `EAGAIN` in conflict with another open file; the lock is then as before. The file system's error if it has no such
/// locks.
pub(crate) fn take(file: BorrowedFd<'_>, before: Option<LockKind>, kind: LockKind) -> Result<(), Errno> {
    let (fd, was_sole) = (file.as_raw_fd(), before == Some(LockKind::Sole));
    let before = before.map_or(Claim::NONE, Claim::of);
    let claim = Claim::of(kind);
    let both = Claim { used: before.used | claim.used, unshared: before.unshared | claim.unshared };
    let whole = || match (was_sole, kind == LockKind::Sole) {
        (false, true) => flock(file, FlockOperation::NonBlockingLockExclusive).map_err(of_rustix),
        (true, false) => flock(file, FlockOperation::Unlock).map_err(of_rustix),
        _ => Ok(()),
    };
    let taken = apply(fd, both).and_then(|()| look(fd, claim)).and_then(|()| whole());
    let back = apply(fd, if taken.is_ok() { claim } else { before });
    taken.and(back)
}

/// Holds the bytes of `claim` and no others.
fn apply(fd: RawFd, claim: Claim) -> Result<(), Errno> {
    for (base, bits) in [(USED_BASE, claim.used), (UNSHARED_BASE, claim.unshared)] {
        for n in 0..PERMISSIONS {
            let kind = if bits >> n & 1 == 1 { libc::F_RDLCK } else { libc::F_UNLCK };
            fcntl_byte(fd, libc::F_OFD_SETLK, kind, base + n)?;
        }
    }
    Ok(())
}

/// Checks that no other process conflicts with `claim`.
fn look(fd: RawFd, claim: Claim) -> Result<(), Errno> {
    for (base, bits) in [(UNSHARED_BASE, claim.used), (USED_BASE, claim.unshared)] {
        for n in (0..PERMISSIONS).filter(|n| bits >> n & 1 == 1) {
            // If a write lock would conflict, another process holds the byte.
            if fcntl_byte(fd, libc::F_OFD_GETLK, libc::F_WRLCK, base + n)? != libc::F_UNLCK {
                return Err(Errno::EAGAIN);
            }
        }
    }
    Ok(())
}

/// One lock call on one byte; returns the kind that the kernel wrote back.
fn fcntl_byte(fd: RawFd, command: libc::c_int, kind: libc::c_int, byte: i64) -> Result<libc::c_int, Errno> {
    let mut lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: `lock` is a valid flock, which the kernel reads and writes only during the call.
    let result = unsafe { libc::fcntl(fd, command, &raw mut lock) };
    match result {
        0 => Ok(libc::c_int::from(lock.l_type)),
        // POSIX allows either error for a conflict.
        _ => match last_error() {
            Errno::EACCES => Err(Errno::EAGAIN),
            error => Err(error),
        },
    }
}
