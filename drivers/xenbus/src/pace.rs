//! How often a front end may reconnect.
//!
//! ```text
//!   offers   1 2 3 4 5 6 7 8 │ 9   10    11      ...                 one a second, for as long as it continues
//!   pause    none            │ 10ms 20ms  40ms   ... 1 s
//! ```
//!
//! Each connection costs xenstored, which all domains share, about ten of our transactions. A guest that boots, or
//! detaches and reattaches its disk, reconnects a few times; one that does so in a loop is made to wait.

use tap_host::Time;

/// Offers in a row without a pause.
const FREE: u32 = 8;
/// The first pause in nanoseconds; it doubles with each offer.
const PAUSE_NS: u64 = 10_000_000;
/// The longest pause.
const PAUSE_MAX_NS: u64 = 1_000_000_000;
/// Offers that are this far apart, in nanoseconds, do not count as in a row.
const APART_NS: u64 = 10_000_000_000;

/// The history of the offers to one front end.
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[derive(Clone)]
    struct Clock(Cell<u64>);

    impl Time for Clock {
        fn now_ns(&self) -> u64 {
            self.0.get()
        }
        fn sleep_ns(&self, _: u64) -> impl Future<Output = ()> + 'static {
            std::future::ready(())
        }
    }

    #[test]
    fn the_first_are_free_and_pauses_double_up_to_a_second() {
        let (host, mut pace) = (Clock(Cell::new(0)), Pace::default());
        let mut waits_ms = Vec::new();
        for _ in 0..18 {
            let wait_ns = pace.wait_ns(&host);
            waits_ms.push(wait_ns / 1_000_000);
            host.0.set(host.0.get() + wait_ns);
            pace.offered(&host);
        }
        let mut all = vec![0; FREE as usize];
        all.extend([10, 20, 40, 80, 160, 320, 640, 1000, 1000, 1000]);
        assert_eq!(waits_ms, all);
        host.0.set(host.0.get() + APART_NS);
        assert_eq!(pace.wait_ns(&host), 0, "offers far apart do not count as in a row");
        pace.offered(&host);
        assert_eq!(pace.wait_ns(&host), 0);
    }
}
