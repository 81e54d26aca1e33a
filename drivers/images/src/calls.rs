//! Calls on whole files, with retries after an interruption.
//!
//! Transfers are retried in `io.rs`, requests by their scheduler. A call that opens, resizes or locks a file has no
//! other retry, and tools do not retry the whole operation.

use crate::ImageHost;
use std::future::Future;
use tap_host::{Errno, File, FileId, IoBuf, IoVec, OpenMode, Patience, Tried};

tap_host::listed! {
    pub(super) BUGS: Bug;
    CLOSE_UNAWAITED = "close-unawaited", "a disk is reported closed while the host is still closing its file";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    pub(crate) OPERATION_REPEATED = "operation-repeated",
        "one operation of a request was repeated after a transient error";
}

/// Retries after transient errors where no scheduler retries the whole: while an image is opened, created or closed,
/// and while what failed zeros left is settled. About three seconds, nearly as long as the scheduler repeats a request.
pub(crate) const LONE_REPEATS: u32 = 12;

/// Makes `call`, and retries it after `EINTR`. An interrupted call may still have had its effect.
pub(crate) async fn uninterrupted<H: ImageHost, T, F: Future<Output = Result<T, Errno>>>(
    host: &H,
    call: impl Fn() -> F,
) -> Result<T, Errno> {
    let mut patience = Patience::of(LONE_REPEATS);
    loop {
        let result = call().await;
        if !result.as_ref().is_err_and(|error| Tried::FileCall.may_pass(*error))
            || !patience.again(host).await
        {
            return result;
        }
        host.mark(&OPERATION_REPEATED);
    }
}

/// Waits until dropped files are closed: once an image is reported closed, its file may be used for something else.
pub(crate) async fn closed<H: ImageHost>(host: &H) {
    if !host.bug(&CLOSE_UNAWAITED) {
        host.closed().await;
    }
}

/// The identity of the file at `path`; `None` if there is none.
///
/// # Errors
/// Those of the host, when there may still be a file.
pub async fn file_id<H: ImageHost>(host: &H, path: &str) -> Result<Option<FileId>, Errno> {
    match uninterrupted(host, || host.open(path, OpenMode::READ)).await {
        Ok(file) => Ok(Some(file.info().await?.id)),
        Err(Errno::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The bytes of the file at `path`, which are at most `max`; `None` if there is none.
///
/// # Errors
/// Those of the host; `EFBIG` for a larger file.
pub async fn read_small<H: ImageHost>(host: &H, path: &str, max: usize) -> Result<Option<Vec<u8>>, Errno> {
    let file = match uninterrupted(host, || host.open(path, OpenMode::READ)).await {
        Ok(file) => file,
        Err(Errno::ENOENT) => return Ok(None),
        Err(error) => return Err(error),
    };
    let size = usize::try_from(file.info().await?.size_bytes).unwrap_or(usize::MAX);
    if size > max {
        return Err(Errno::EFBIG);
    }
    let (mut bytes, mut patience) = (Vec::with_capacity(size), Patience::of(LONE_REPEATS));
    while bytes.len() < size {
        let buf = IoBuf::unpooled(size - bytes.len())?;
        let (result, bufs) = file.read_at(bytes.len() as u64, IoVec::from_iter([buf])).await;
        match result {
            // It has become shorter, unless the read would have had to wait.
            Ok(0) if bytes.len() as u64 >= file.info().await?.size_bytes => break,
            Ok(count) if count > 0 => bytes.extend_from_slice(&bufs[0][..count]),
            Ok(_) | Err(Errno::EINTR | Errno::EAGAIN) if patience.again(host).await => {}
            Ok(_) => return Err(Errno::EAGAIN),
            Err(error) => return Err(error),
        }
    }
    Ok(Some(bytes))
}
