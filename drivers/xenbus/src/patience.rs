//! Errors of xenstored that are transient.

use tap_host::{Errno, Patience, Probe, Time, Tried};

tap_host::listed! {
    pub(super) BUGS: Bug;
    STORE_ERROR_ENDS = "store-error-ends", "a transient error of xenstored ends a disk";
}

/// Repetitions of one operation, half a minute in total.
const REPEATS: u32 = 39;

/// Repeats `operation`, which must be safe to run twice, after transient errors.
///
/// # Errors
/// The last one.
pub async fn patiently<H: Time + Probe, T>(
    host: &H,
    operation: impl AsyncFn() -> Result<T, Errno>,
) -> Result<T, Errno> {
    let mut patience = Patience::of(REPEATS);
    loop {
        match operation().await {
            Err(error)
                if Tried::Store.may_pass(error)
                    && !host.bug(&STORE_ERROR_ENDS)
                    && patience.again(host).await => {}
            result => return result,
        }
    }
}
