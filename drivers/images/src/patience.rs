//! How often, and after which pauses, something is tried that may pass.
//!
//! Pauses double from 1 ms on, and end at a second, where what is waited for is no longer a moment's trouble.

use tap_host::Time;

/// Before the second try, in nanoseconds; it doubles with each.
const PAUSE_NS: u64 = 1_000_000;
/// The longest pause, in nanoseconds.
const PAUSE_MAX_NS: u64 = 1_000_000_000;

/// What is left of the patience with one operation.
pub(crate) struct Patience {
    repeats: u32,
    pause_ns: u64,
}

impl Patience {
    /// To try once, and `repeats` times more.
    pub(crate) fn of(repeats: u32) -> Self {
        Self { repeats, pause_ns: PAUSE_NS }
    }

    /// Takes one repetition and waits until it is due; `false`, at once, where none is left.
    pub(crate) async fn again(&mut self, host: &impl Time) -> bool {
        if self.repeats == 0 {
            return false;
        }
        host.sleep_ns(self.pause_ns).await;
        self.repeats -= 1;
        self.pause_ns = (self.pause_ns * 2).min(PAUSE_MAX_NS);
        true
    }
}
