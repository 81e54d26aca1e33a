//! SIGTERM, SIGINT and SIGHUP: the first one asks the program to end in an orderly way, a second one ends it at once. A
//! SIGHUP that was ignored when the program started (nohup) stays ignored. Sockets that were passed by a parent
//! (LISTEN_FDS) are served for as long as that parent lives, unless it is process 1.

use crate::watch::watch;
use crate::{Level, LinuxHost};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use tap_host::Signals;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{Signal, signal};

/// Whether the program was asked to stop. Until the program waits for that, the signals end the process as usual.
#[derive(Default)]
pub(crate) struct Stop {
    asked: Cell<bool>,
    /// Readable once the parent whose sockets are served has ended.
    parent: RefCell<Option<Rc<AsyncFd<OwnedFd>>>>,
}

impl Stop {
    /// From now on the end of the parent asks the program to stop.
    pub(crate) fn with_parent(&self) {
        let Some(parent) = rustix::process::getppid().filter(|pid| *pid != Pid::INIT) else { return };
        // If the kernel does not support such descriptors, or the parent has just ended, its end is not watched.
        let Ok(fd) = pidfd_open(parent, PidfdFlags::NONBLOCK) else { return };
        if rustix::process::getppid() == Some(parent)
            && let Ok(fd) = watch(fd, Interest::READABLE)
        {
            *self.parent.borrow_mut() = Some(Rc::new(fd));
        }
    }
}

impl Signals for LinuxHost {
    fn process_id(&self) -> u32 {
        std::process::id()
    }

    fn asked_to_stop(&self) -> impl Future<Output = ()> + 'static {
        let host = self.clone();
        // Registered by the call, so that no signal is missed between it and the first poll.
        let signals: Result<Vec<Signal>, _> = handled().into_iter().map(|n| signal(n.into())).collect();
        async move {
            let Ok(mut signals) = signals else {
                // Without handlers the signals end the process, which is the best we can do.
                host.say(
                    Level::Warning,
                    format_args!("signals cannot be watched: they end the process at once"),
                );
                return std::future::pending().await;
            };
            // Known once the sockets that the parent passed were taken, which may be after the call.
            let parent = host.0.stop.parent.borrow().clone();
            if !host.0.stop.asked.get() {
                any(&mut signals, parent.as_deref()).await;
                host.0.stop.asked.set(true);
                by_default();
            }
        }
    }
}

/// The signals that ask the program to stop.
fn handled() -> Vec<libc::c_int> {
    [libc::SIGTERM, libc::SIGINT, libc::SIGHUP]
        .into_iter()
        .filter(|n| *n != libc::SIGHUP || !is_ignored(*n))
        .collect()
}

fn is_ignored(number: libc::c_int) -> bool {
    // SAFETY: a sigaction of zeros is valid, and the kernel fills it in during the call.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: `action` is valid, and no action is changed.
    let told = unsafe { libc::sigaction(number, std::ptr::null(), &raw mut action) };
    told == 0 && action.sa_sigaction == libc::SIG_IGN
}

/// Completes when a signal arrives, or the parent ends.
async fn any(signals: &mut [Signal], parent: Option<&AsyncFd<OwnedFd>>) {
    std::future::poll_fn(|cx| {
        let signalled = signals.iter_mut().any(|signal| signal.poll_recv(cx).is_ready());
        if signalled || parent.is_some_and(|fd| fd.poll_read_ready(cx).is_ready()) {
            return std::task::Poll::Ready(());
        }
        std::task::Poll::Pending
    })
    .await;
}

/// From now on the signals end the process, whatever its thread is doing.
fn by_default() {
    // A hangup that follows a hangup comes from the same closed terminal.
    for number in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: the default action runs no function of ours.
        let old = unsafe { libc::signal(number, libc::SIG_DFL) };
        assert_ne!(old, libc::SIG_ERR, "both signals can be set");
    }
}
