//! Calls about files as a whole: which file is behind a name, and once more after an interruption.
//!
//! Transfers are repeated where they are made (`io.rs`), requests by their scheduler. Nobody repeats a call that opens,
//! sizes or locks a file, and where it is made by a tool there is no second try of the whole either.

use crate::ImageHost;
use crate::patience::Patience;
use std::future::Future;
use tap_host::{Bug, Errno, File, FileId, Mark, OpenMode};

/// Repetitions of one call that was interrupted.
const REPEATS: u32 = 8;

/// Makes `call`, again after `EINTR`. A call that was interrupted may have had its effect all the same.
pub(crate) async fn uninterrupted<H: ImageHost, T, F: Future<Output = Result<T, Errno>>>(
    host: &H,
    call: impl Fn() -> F,
) -> Result<T, Errno> {
    let mut patience = Patience::of(REPEATS);
    loop {
        let result = call().await;
        if !matches!(result, Err(Errno::EINTR)) || !patience.again(host).await {
            return result;
        }
        host.mark(Mark::OperationRepeated);
    }
}

/// Completes when what was dropped is closed: who is told that an image is closed may take its file for something else.
pub(crate) async fn closed<H: ImageHost>(host: &H) {
    if !host.bug(Bug::CloseUnawaited) {
        host.closed().await;
    }
}

/// Which file `path` is; `None` where there is none.
///
/// # Errors
/// As the host's, when there may be one all the same.
pub async fn file_id<H: ImageHost>(host: &H, path: &str) -> Result<Option<FileId>, Errno> {
    match uninterrupted(host, || host.open(path, OpenMode::READ)).await {
        Ok(file) => Ok(Some(file.info().await?.id)),
        Err(Errno::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}
