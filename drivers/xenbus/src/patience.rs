//! Errors of xenstored that are transient.

use tap_host::{Errno, Probe, Time};

tap_host::listed! {
    pub(super) BUGS: Bug;
    STORE_ERROR_ENDS = "store-error-ends", "a transient error of xenstored ends a disk";
}

/// Attempts at one operation, half a minute in total.
const ATTEMPTS: u32 = 40;
/// Pause before the second attempt, in nanoseconds; it doubles each time, up to [`PAUSE_MAX_NS`].
const PAUSE_NS: u64 = 1_000_000;
/// Longest pause between two attempts.
const PAUSE_MAX_NS: u64 = 1_000_000_000;

/// Whether a retry may succeed: xenstored was busy or short of memory, a quota was used up, or a message was lost. A
/// connection that is gone for good is `ESHUTDOWN`.
pub(crate) fn is_transient(error: Errno) -> bool {
    matches!(error, Errno::EBUSY | Errno::ENOMEM | Errno::ENOSPC | Errno::EIO | Errno::EINTR)
}

/// Repeats `operation`, which must be safe to run twice, after transient errors.
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
            Err(error) if is_transient(error) && !host.bug(&STORE_ERROR_ENDS) => {
                host.sleep_ns(pause_ns).await;
                pause_ns = (pause_ns * 2).min(PAUSE_MAX_NS);
            }
            result => return result,
        }
    }
    operation().await
}
