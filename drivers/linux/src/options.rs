//! The options that a program sets when it starts.

use crate::{AioEngine, Level, LogTo, XenError, XenOptions};
use std::path::PathBuf;
use std::time::Duration;
use tap_host::Errno;

/// How to set up the host; [`Options::default`] suits a daemon.
#[derive(Clone, Debug)]
pub struct Options {
    /// What executes file operations that may wait.
    pub aio: AioEngine,
    /// The least important level that is logged.
    pub log_level: Level,
    /// Where log lines go.
    pub log_to: LogTo,
    /// How long to poll, at most, before going to sleep, if the last wait was no longer than that; zero means never.
    pub poll: Duration,
    /// The folder of [`tap_host::SharedPages`]: on a tmpfs, ours alone. It is made when it is first needed. Without it,
    /// or if it cannot be used, there are no such pages.
    pub run_folder: Option<PathBuf>,
    /// What of Xen is used, by programs that serve its domains.
    pub xen: Option<XenOptions>,
}

/// The default time to poll before sleeping.
pub const POLL_DEFAULT: Duration = Duration::from_micros(32);

impl Default for Options {
    fn default() -> Self {
        let (aio, log_level, log_to) = Default::default();
        Self { aio, log_level, log_to, poll: POLL_DEFAULT, run_folder: None, xen: None }
    }
}

/// Why the host could not be set up.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StartError {
    /// The event loop.
    #[error("set up the event loop: {0}")]
    Runtime(Errno),
    /// The requested engine.
    #[error("{}", aio_text(*aio, *error))]
    Aio {
        /// The engine requested.
        aio: AioEngine,
        /// The kernel's error.
        error: Errno,
    },
    /// Xen.
    #[error(transparent)]
    Xen(#[from] XenError),
}

fn aio_text(aio: AioEngine, error: Errno) -> String {
    match aio {
        AioEngine::IoUring => format!("set up io_uring: {error}; use threads, or let the program choose"),
        AioEngine::Auto | AioEngine::Threads => format!("set up threads for file operations: {error}"),
    }
}
