//! SIGTERM and SIGINT: the first asks the program to end in order, a second one ends it at once.

use crate::{Level, LinuxHost};
use std::cell::Cell;
use std::future::Future;
use tap_host::Signals;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Whether the program was asked to stop. Until somebody waits for that, the signals end the process as usual.
#[derive(Default)]
pub(crate) struct Stop(Cell<bool>);

impl Signals for LinuxHost {
    fn asked_to_stop(&self) -> impl Future<Output = ()> + 'static {
        let host = self.clone();
        // Registered by the call, so that none is missed between it and the first poll.
        let signals = [SignalKind::terminate(), SignalKind::interrupt()].map(signal);
        async move {
            let [Ok(mut terminate), Ok(mut interrupt)] = signals else {
                // Without handlers the signals end the process, which is the best there is.
                host.say(
                    Level::Warning,
                    format_args!("signals cannot be watched: they end the process at once"),
                );
                return std::future::pending().await;
            };
            if !host.0.stop.0.get() {
                either(&mut terminate, &mut interrupt).await;
                host.0.stop.0.set(true);
                by_default();
            }
        }
    }
}

/// Completes when one of both arrives.
async fn either(a: &mut Signal, b: &mut Signal) {
    std::future::poll_fn(|cx| {
        if a.poll_recv(cx).is_ready() || b.poll_recv(cx).is_ready() {
            return std::task::Poll::Ready(());
        }
        std::task::Poll::Pending
    })
    .await;
}

/// From now on the signals end the process, whatever its thread is doing.
fn by_default() {
    for number in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: the default action is no function of ours.
        let old = unsafe { libc::signal(number, libc::SIG_DFL) };
        debug_assert_ne!(old, libc::SIG_ERR, "both signals can be set");
    }
}
