//! The trace: one line per typed event, and a rolling hash that two equal runs share.
//!
//! Reports also get *spans*: work with a beginning and an end. Neither lines nor spans enter the hash, and nothing in a
//! world can see whether they are kept.

use crate::mix::mix2;
use std::fmt::{self, Display};
use std::ops::Range;

/// Something that happened, as numbers for the hash and as text for people.
pub trait TraceEvent: Display {
    /// Numbers that differ whenever the event does.
    fn words(&self) -> [u64; 4];
}

/// How much of the trace is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum TraceLevel {
    /// The hash only.
    #[default]
    Hash,
    /// A line per event, and spans.
    Events,
    /// The same, and a line per turn of a task.
    Full,
}

/// A time as traces and stories show it: microseconds with three decimals, without the unit.
pub fn micros(ns: u64) -> String {
    format!("{}.{:03}", ns / 1000, ns % 1000)
}

/// A line of a trace.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TraceLine {
    /// Virtual time in nanoseconds.
    pub at_ns: u64,
    /// Who did it.
    pub who: String,
    /// What happened.
    pub text: String,
}

impl Display for TraceLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>14} {:<10} {}", micros(self.at_ns), self.who, self.text)
    }
}

/// Identifies a span of a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SpanId(u32);

/// Work with a beginning and an end.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Span {
    /// Who works: a guest, a ring, a file.
    pub track: String,
    /// The kind of work ("write").
    pub kind: &'static str,
    /// Its number on the track, if it has one, such as that of a guest's write.
    pub number: Option<u64>,
    /// What it is about, and for whom.
    pub name: String,
    /// The bytes of the disk or file that it is about; empty if none.
    pub bytes: Range<u64>,
    /// When it began.
    pub begin_ns: u64,
    /// When it ended; `None` if it never did.
    pub end_ns: Option<u64>,
    /// How it ended.
    pub outcome: String,
}

pub(crate) struct Trace {
    level: TraceLevel,
    hash: u64,
    events: u64,
    lines: Vec<TraceLine>,
    spans: Vec<Span>,
}

/// More lines than anyone reads; a run that prints more loses its first lines.
const LINES_MAX: usize = 400_000;
/// The same for spans; a run that has more loses its last ones.
const SPANS_MAX: usize = 400_000;

/// A finished trace.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TraceReport {
    /// The rolling hash of everything.
    pub hash: u64,
    /// Number of events.
    pub events: u64,
    /// Lines, if they were kept.
    pub lines: Vec<TraceLine>,
    /// Spans in the order of their beginnings, if they were kept.
    pub spans: Vec<Span>,
}

impl Trace {
    pub(crate) fn new(level: TraceLevel) -> Self {
        Self { level, hash: 0, events: 0, lines: Vec::new(), spans: Vec::new() }
    }

    #[inline]
    pub(crate) fn turn(&mut self, entity: u64, now_ns: u64, describe: impl FnOnce() -> String) {
        self.hash = (self.hash.rotate_left(7) ^ entity ^ now_ns).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        if self.level == TraceLevel::Full {
            let text = describe();
            self.line(now_ns, "~", &text);
        }
    }

    #[inline]
    pub(crate) fn event(&mut self, now_ns: u64, who: &str, event: &impl TraceEvent) {
        self.events += 1;
        let [a, b, c, d] = event.words();
        self.hash = mix2(mix2(self.hash, a ^ now_ns), b).wrapping_add(mix2(c, d));
        if self.level != TraceLevel::Hash {
            let text = event.to_string();
            self.line(now_ns, who, &text);
        }
    }

    #[inline]
    pub(crate) fn keeps_lines(&self) -> bool {
        self.level != TraceLevel::Hash
    }

    #[cold]
    pub(crate) fn line(&mut self, now_ns: u64, who: &str, text: &str) {
        if self.lines.len() == LINES_MAX {
            self.lines.drain(..LINES_MAX / 2);
        }
        self.lines.push(TraceLine { at_ns: now_ns, who: who.into(), text: text.into() });
    }

    #[cold]
    pub(crate) fn begin(&mut self, span: Span) -> SpanId {
        if self.spans.len() == SPANS_MAX {
            return SpanId::default();
        }
        self.spans.push(span);
        SpanId(self.spans.len() as u32)
    }

    /// Ends a span; of several ends the first counts.
    #[cold]
    pub(crate) fn end(&mut self, id: SpanId, now_ns: u64, outcome: String) {
        let span = (id.0 as usize).checked_sub(1).and_then(|at| self.spans.get_mut(at));
        if let Some(span) = span.filter(|span| span.end_ns.is_none()) {
            span.end_ns = Some(now_ns);
            span.outcome = outcome;
        }
    }

    /// The spans that have not ended.
    pub(crate) fn open(&self) -> Vec<Span> {
        self.spans.iter().filter(|span| span.end_ns.is_none()).cloned().collect()
    }

    pub(crate) fn hash(&self) -> u64 {
        self.hash
    }

    pub(crate) fn take(&mut self) -> TraceReport {
        TraceReport {
            hash: self.hash,
            events: self.events,
            lines: std::mem::take(&mut self.lines),
            spans: std::mem::take(&mut self.spans),
        }
    }
}

/// The first line in which two traces differ: its number and both texts (empty if one trace has ended).
pub fn first_difference(a: &TraceReport, b: &TraceReport) -> Option<(usize, String, String)> {
    let n = a.lines.len().max(b.lines.len());
    (0..n).find_map(|i| {
        let (x, y) = (a.lines.get(i), b.lines.get(i));
        let text = |line: Option<&TraceLine>| line.map_or(String::new(), ToString::to_string);
        (x != y).then(|| (i, text(x), text(y)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_ends_once_and_an_unknown_one_never() {
        let mut trace = Trace::new(TraceLevel::Events);
        let id = trace.begin(Span { begin_ns: 5, ..Span::default() });
        trace.end(SpanId::default(), 6, "of another".into());
        trace.end(id, 7, "ok".into());
        trace.end(id, 9, "again".into());
        let span = &trace.take().spans[0];
        assert_eq!((span.begin_ns, span.end_ns, span.outcome.as_str()), (5, Some(7), "ok"));
    }

    #[test]
    fn lines_show_microseconds() {
        let line = TraceLine { at_ns: 1_288_007, who: "guest 1".into(), text: "submits".into() };
        assert_eq!(line.to_string(), "      1288.007 guest 1    submits");
    }
}
