//! The trace: one line per typed event, and a rolling hash that two equal runs share.

use crate::mix::mix2;
use std::fmt::Display;

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
    /// A line per event.
    Events,
    /// A line per event and per turn of a task.
    Full,
}

pub(crate) struct Trace {
    level: TraceLevel,
    hash: u64,
    events: u64,
    lines: Vec<String>,
}

/// More lines than anyone reads; a run that prints more loses its first lines.
const LINES_MAX: usize = 400_000;

/// A finished trace.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TraceReport {
    /// The rolling hash of everything.
    pub hash: u64,
    /// Number of events.
    pub events: u64,
    /// Lines, if they were kept.
    pub lines: Vec<String>,
}

impl Trace {
    pub(crate) fn new(level: TraceLevel) -> Self {
        Self { level, hash: 0, events: 0, lines: Vec::new() }
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
        self.lines.push(format!(
            "{:>6}.{:09} {who:<10} {text}",
            now_ns / 1_000_000_000,
            now_ns % 1_000_000_000
        ));
    }

    pub(crate) fn hash(&self) -> u64 {
        self.hash
    }

    pub(crate) fn take(&mut self) -> TraceReport {
        TraceReport { hash: self.hash, events: self.events, lines: std::mem::take(&mut self.lines) }
    }
}

/// The first line in which two traces differ: its number and both texts (empty if one trace has ended).
pub fn first_difference(a: &TraceReport, b: &TraceReport) -> Option<(usize, String, String)> {
    let n = a.lines.len().max(b.lines.len());
    (0..n).find_map(|i| {
        let (x, y) = (a.lines.get(i), b.lines.get(i));
        (x != y).then(|| (i, x.cloned().unwrap_or_default(), y.cloned().unwrap_or_default()))
    })
}
