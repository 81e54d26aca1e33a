//! Errors of xenstored that go away by themselves.

use tap_host::{Bug, Errno, Probe, Time};

/// Attempts at one operation, for half a minute in all.
const ATTEMPTS: u32 = 40;
/// Before the second of them, in nanoseconds; it doubles with each, up to [`PAUSE_MAX_NS`].
const PAUSE_NS: u64 = 1_000_000;
/// Longest pause between two attempts.
const PAUSE_MAX_NS: u64 = 1_000_000_000;

/// Whether xenstored, or the way to it, may be well again the next time: it was busy or short of memory, a quota was
/// used up, or a message was lost. A connection that is gone for good is `ESHUTDOWN`.
pub(crate) fn is_transient(error: Errno) -> bool {
    matches!(error, Errno::EBUSY | Errno::ENOMEM | Errno::ENOSPC | Errno::EIO | Errno::EINTR)
}

/// Repeats `operation`, which must do no harm twice, after transient errors.
///
/// # Errors
/// The last one.
pub async fn patiently<H: Time + Probe, T>(
    host: &H,
    operation: impl AsyncFn() -> Result<T, Errno>,
) -> Result<T, Errno> {
    let mut pause_ns = PAUSE_NS;
    for _ in 1..ATTEMPTS {
        match operation().await {
            Err(error) if is_transient(error) && !host.bug(Bug::StoreErrorEnds) => {
                host.sleep_ns(pause_ns).await;
                pause_ns = (pause_ns * 2).min(PAUSE_MAX_NS);
            }
            result => return result,
        }
    }
    operation().await
}
