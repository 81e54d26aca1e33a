//! Events of the stack in the trace.

use sim::TraceEvent;
use tap_host::Event;

/// An event of the stack, for the trace.
pub(crate) struct Traced(pub(crate) Event);

impl std::fmt::Display for Traced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}
impl TraceEvent for Traced {
    fn words(&self) -> [u64; 4] {
        self.0.words()
    }
}
