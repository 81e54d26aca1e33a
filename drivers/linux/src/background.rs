//! A program that continues in the background, and says so when it is ready (`--fork`).
//!
//! ```text
//!   caller ── fork ──► waits for a byte ── ready ──► exits with 0
//!               │              ▲    └── the end of the pipe: exits with the status of the other
//!               └─► new session, standard input from /dev/null ── starts ── ready: a byte; standard output and
//!                                                                             error to /dev/null
//! ```
//!
//! The process is divided before anything else exists: no thread, no event loop, no io_uring, no lock on a file. So
//! nothing is shared between the two but open descriptors. Until it is ready, the process in the background prints to
//! the caller's streams.

use crate::descriptors::close_descriptors_but;
use crate::files::{errno, of_rustix};
use crate::sockets::passed_sockets;
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, WaitOptions, setsid, waitpid};
use std::io::{ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use tap_host::Errno;

/// Which of the two processes this is.
#[derive(Debug)]
pub enum Divided {
    /// The one that was started. The other one is ready or has ended: this is the exit status to end with.
    Caller(u8),
    /// The one in the background.
    Background(Starting),
}

/// Why a program cannot continue in the background.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DivideError {
    /// Its sockets belong to a parent that would take its end for that of the service.
    #[error(
        "continue in the background: its sockets come from another process (LISTEN_FDS), which watches this one"
    )]
    Sockets,
    /// The process in the background was killed by a signal before it was ready.
    #[error("continue in the background: the process there was killed by signal {0}")]
    Killed(i32),
    /// A system call failed.
    #[error("continue in the background: {0}: {1}")]
    Call(&'static str, Errno),
}

/// A process in the background whose caller waits.
#[derive(Debug)]
pub struct Starting {
    caller: PipeWriter,
    null: OwnedFd,
}

/// Divides the process in two. The process in the background is the leader of a new session, and reads nothing from
/// standard input; it keeps its folder, so that relative paths stay valid. The caller returns from here when the other
/// one is ready ([`Starting::ready`]) or has ended.
///
/// # Errors
/// [`DivideError`], in the caller; or in the process in the background, whose end with a status then ends the caller's
/// wait.
///
/// # Panics
/// If the process has more than one thread: the others would be missing from the process in the background.
pub fn divide() -> Result<Divided, DivideError> {
    if passed_sockets() > 0 {
        return Err(DivideError::Sockets);
    }
    let failed = |call| move |error| DivideError::Call(call, error);
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    let null = null.map_err(of_rustix).map_err(failed("/dev/null"))?;
    let (mut answer, caller) = std::io::pipe().map_err(|e| failed("pipe")(errno(&e)))?;
    // Without /proc the number is not known.
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    assert_eq!(threads, 1, "a process with threads is not divided");
    // SAFETY: the process has one thread, so that memory and locks are in a consistent state on both sides, and the new
    // process may do whatever this one may.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(failed("fork")(errno(&std::io::Error::last_os_error())));
    }
    if let Some(pid) = Pid::from_raw(pid) {
        drop(caller);
        return wait(&mut answer, pid).map(Divided::Caller);
    }
    drop(answer);
    setsid().map_err(of_rustix).map_err(failed("setsid"))?;
    rustix::stdio::dup2_stdin(&null).map_err(of_rustix).map_err(failed("dup2"))?;
    Ok(Divided::Background(Starting { caller, null }))
}

/// Waits until the process in the background is ready or has ended.
fn wait(answer: &mut PipeReader, pid: Pid) -> Result<u8, DivideError> {
    let mut byte = [0];
    let ready = loop {
        match answer.read(&mut byte) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            read => break matches!(read, Ok(1)),
        }
    };
    if ready {
        return Ok(0);
    }
    let ended = loop {
        match waitpid(Some(pid), WaitOptions::empty()) {
            Err(rustix::io::Errno::INTR) => {}
            ended => break ended.map_err(of_rustix).map_err(|error| DivideError::Call("waitpid", error))?,
        }
    };
    let status = ended.map(|(_, status)| status);
    if let Some(signal) = status.and_then(|status| status.terminating_signal()) {
        return Err(DivideError::Killed(signal));
    }
    // A process that ended before it was ready has failed, whatever it says.
    let code = status.and_then(|status| status.exit_status()).unwrap_or(1);
    Ok(u8::try_from(code).unwrap_or(u8::MAX).max(1))
}

impl Starting {
    /// Closes every descriptor that the process was started with, but for the standard streams: a script that holds a
    /// lock on one of them would otherwise lend it to this process, which lives longer. Called before anything is
    /// opened.
    pub fn keep_nothing(&self) {
        close_descriptors_but(&[self.caller.as_raw_fd(), self.null.as_raw_fd()]);
    }

    /// Lets the caller end with success. From now on what this process prints goes nowhere.
    ///
    /// # Errors
    /// Of dup2(2), in which case the caller still waits.
    pub fn ready(mut self) -> Result<(), Errno> {
        rustix::stdio::dup2_stdout(&self.null).map_err(of_rustix)?;
        rustix::stdio::dup2_stderr(&self.null).map_err(of_rustix)?;
        // If the caller has been killed meanwhile, nobody waits.
        let _gone = self.caller.write_all(&[0]);
        Ok(())
    }
}
