//! Time: CLOCK_MONOTONIC to the nanosecond; sleeping on tokio's timer, which rounds up to milliseconds.

use crate::LinuxHost;
use std::future::Future;
use std::time::{Duration, Instant};
use tap_host::Time;

/// The instant from which times are counted.
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn new() -> Self {
        Self(Instant::now())
    }

    /// Nanoseconds since the start; enough for 584 years.
    pub(crate) fn now_ns(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

impl Time for LinuxHost {
    fn now_ns(&self) -> u64 {
        self.0.clock.now_ns()
    }
    fn sleep_ns(&self, ns: u64) -> impl Future<Output = ()> + 'static {
        tokio::time::sleep(Duration::from_nanos(ns))
    }
}
