//! What a program chooses when it starts.

use crate::{AioEngine, Level, LogTo};
use tap_host::Errno;

/// How the host is to be; [`Options::default`] is right for a daemon.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Who executes file operations that may wait.
    pub aio: AioEngine,
    /// The least important level that is logged.
    pub log_level: Level,
    /// Where log lines go.
    pub log_to: LogTo,
}

/// Why the host could not be set up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StartError {
    /// The event loop.
    #[error("set up the event loop: {0}")]
    Runtime(Errno),
    /// The engine asked for.
    #[error("{}", aio_text(*aio, *error))]
    Aio {
        /// Which was asked for.
        aio: AioEngine,
        /// What the kernel said.
        error: Errno,
    },
}

fn aio_text(aio: AioEngine, error: Errno) -> String {
    match aio {
        AioEngine::IoUring => format!("set up io_uring: {error}; use threads, or let the program choose"),
        AioEngine::Auto | AioEngine::Threads => format!("set up threads for file operations: {error}"),
    }
}
