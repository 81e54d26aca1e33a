//! What reports show of the requests of a guest.

use super::{Guest, ended};
use crate::check::{About, Finding, Invariant, Wrong};
use sim::{Span, SpanId};
use tap_host::{Errno, SECTOR_BYTES, SectorRange};

impl<D> Guest<D> {
    /// A request is submitted: of all that a report shows of it, what is known now.
    #[inline]
    pub(super) fn submits(&self, kind: &'static str, number: u64, range: SectorRange) -> SpanId {
        let bytes = range.start.0 * SECTOR_BYTES..range.start.0 * SECTOR_BYTES + range.len_bytes();
        self.own.world.sim.begin_span(|| Span {
            track: self.own.name.to_string(),
            kind,
            number: Some(number),
            name: match kind {
                "read" => format!("read {range}"),
                "flush" => format!("flush {number}"),
                "discard" => format!("discard {number} of {range}"),
                _ => format!("{kind} {number} to {range}"),
            },
            bytes,
            ..Span::default()
        })
    }

    /// A request is answered.
    #[inline]
    pub(super) fn answered(&self, span: SpanId, result: Result<(), Errno>) {
        self.own.world.sim.end_span(span, || ended(result));
    }

    /// Reports what a request found.
    pub(super) fn wrong(&self, invariant: Invariant, request: &str, wrong: &Wrong) {
        let Finding { sector, writes, reads, .. } = wrong.finding().clone();
        let about = About {
            guest: self.own.name.to_string(),
            sector: Some(sector),
            writes,
            reads,
            places: Vec::new(),
        };
        self.own.world.fail_about(invariant, format!("{request}: {wrong}"), about);
    }
}
