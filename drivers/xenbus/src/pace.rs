//! How often a front end may begin anew.
//!
//! ```text
//!   offers   1 2 3 4 5 6 7 8 │ 9   10    11      ...                 one a second, for as long as it goes on so
//!   pause    none            │ 10ms 20ms  40ms   ... 1 s
//! ```
//!
//! Each connection costs xenstored, which all domains share, some ten transactions of ours. A guest that boots, or takes
//! its disk away and back, begins anew a few times; one that does so in a loop is made to wait.

use tap_host::Time;

/// Offers in a row without a pause.
const FREE: u32 = 8;
/// The first pause in nanoseconds; it doubles with each offer.
const PAUSE_NS: u64 = 10_000_000;
/// The longest pause.
const PAUSE_MAX_NS: u64 = 1_000_000_000;
/// Offers that are so far apart, in nanoseconds, are not in a row.
const APART_NS: u64 = 10_000_000_000;

/// What is known of the offers to one front end.
#[derive(Default)]
pub(crate) struct Pace {
    last_ns: u64,
    in_a_row: u32,
}

impl Pace {
    /// How long the next offer is to wait, in nanoseconds.
    pub(crate) fn wait_ns(&self, host: &impl Time) -> u64 {
        let Some(more) = self.in_a_row.checked_sub(FREE) else { return 0 };
        let pause_ns = PAUSE_MAX_NS.min(PAUSE_NS << more.min(10));
        (self.last_ns + pause_ns).saturating_sub(host.now_ns())
    }

    /// An offer is made.
    pub(crate) fn offered(&mut self, host: &impl Time) {
        let now_ns = host.now_ns();
        self.in_a_row = if now_ns - self.last_ns < APART_NS { self.in_a_row + 1 } else { 1 };
        self.last_ns = now_ns;
    }
}
