//! A run as people look at it: one model, which the story, the page and the trace events of Perfetto print.
//!
//! ```text
//!   trace: lines, spans ┐
//!   decisions           ├─► Report ─► story (text), page (HTML), Perfetto (JSON)
//!   images at the crash ┘
//! ```
//!
//! Nothing here runs inside a world, and a world cannot see whether it is recorded.

pub mod files;
pub mod images;
mod page;
mod perfetto;
pub(crate) mod recorder;
mod story;

pub(crate) use page::escaped;
pub use story::story;

use crate::explain;
use crate::report::images::Images;
use crate::spec::{Outcome, RunSpec};
use crate::workload::OP;
use crate::world::SETTING;
use kernel_model::calls::CALL_FAULT;
use kernel_model::faults::{
    BAD_SECTORS, IO_FAULT, LOST, NAME_LOST, RUN_LOST, SIZE_PARTLY, SIZES_LOST, SYNC_LOST,
};
use sim::{Decision, Key, Label, Span, TraceLine, micros};
use std::ops::Range;
use tap_host::{SECTOR_BYTES, SectorRange};

/// A run.
#[derive(Clone, Debug)]
pub struct Report {
    /// Scenario, seed, and what was switched on.
    pub heading: String,
    /// What the scenario does.
    pub about: &'static str,
    /// The seeded mistake in words, if one was switched on.
    pub mistake: Option<String>,
    /// What broke.
    pub broken: Option<Broken>,
    /// The requests that the failure is about, in the order of their submission.
    pub named: Vec<String>,
    /// The decisions that differ from the boring run, in order of time.
    pub decisions: Vec<Decided>,
    /// What happened, the decisions among it.
    pub lines: Vec<Line>,
    /// Crashes, faults, other decisions and the failure, in order of time.
    pub marks: Vec<Mark>,
    /// Work with a beginning and an end, in the order of the beginnings.
    pub rows: Vec<Row>,
    /// The images at each power cut; without one, at the end.
    pub images: Vec<Images>,
    /// Virtual nanoseconds of the run.
    pub end_ns: u64,
}

/// What broke.
#[derive(Clone, Debug)]
pub struct Broken {
    /// The invariant.
    pub invariant: String,
    /// What it says.
    pub sentence: &'static str,
    /// What was observed.
    pub detail: String,
    /// When.
    pub at_ns: u64,
}

/// A decision.
#[derive(Clone, Debug)]
pub struct Decided {
    /// When it was taken.
    pub at_ns: u64,
    /// In words.
    pub text: String,
    /// It chooses the world or an operation; others are faults, delays and crashes.
    pub is_plan: bool,
}

/// What is marked in the timeline.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum MarkKind {
    /// Power or a process ends.
    Crash,
    /// An operation fails, or loses something.
    Fault,
    /// Any other decision.
    Decision,
    /// A broken invariant is noticed.
    Broken,
}

impl MarkKind {
    /// It in a word.
    pub fn name(self) -> &'static str {
        match self {
            MarkKind::Crash => "crash",
            MarkKind::Fault => "fault",
            MarkKind::Decision => "decision",
            MarkKind::Broken => "broken",
        }
    }
}

/// A moment that is marked in the timeline.
#[derive(Clone, Debug)]
pub struct Mark {
    /// When.
    pub at_ns: u64,
    /// What.
    pub kind: MarkKind,
    /// In words.
    pub text: String,
}

/// How much a line explains the failure.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Weight {
    /// About other places, or too frequent to matter.
    None,
    /// Touches what the remaining operations touch, or no place at all.
    Some,
    /// About the wrong sector, or one of the remaining operations.
    Much,
    /// A decision, a crash, or about a request that the failure names.
    Most,
}

/// A line of the trace, or a decision where it took effect.
#[derive(Clone, Debug)]
pub struct Line {
    /// When.
    pub at_ns: u64,
    /// Who; empty for a decision.
    pub who: String,
    /// What.
    pub text: String,
    /// How much it matters.
    pub weight: Weight,
}

impl Line {
    /// Whether it is a decision.
    pub fn is_decision(&self) -> bool {
        self.who.is_empty()
    }

    /// Whether it is an event of a process: not one of a guest, of Xen, or of the power.
    pub fn is_event(&self) -> bool {
        !self.is_decision() && !self.who.starts_with("guest ") && !matches!(&*self.who, "xen" | "power")
    }
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let who = if self.is_decision() { "*" } else { &self.who };
        write!(f, "{:>14} {who:<10} {}", micros(self.at_ns), self.text)
    }
}

/// What a row of the timeline is about.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Layer {
    /// A guest, or another client.
    Guest,
    /// A ring.
    Ring,
    /// A file.
    Drive,
}

/// Work with a beginning and an end.
#[derive(Clone, Debug)]
pub struct Row {
    /// Where in the stack.
    pub layer: Layer,
    /// Who works.
    pub track: String,
    /// What, and for whom.
    pub name: String,
    /// When it began.
    pub begin_ns: u64,
    /// When it ended; `None` if it never did.
    pub end_ns: Option<u64>,
    /// How it ended.
    pub outcome: String,
    /// Whether it helps to explain the failure.
    pub matters: bool,
}

impl Row {
    /// Whether it ended without success.
    pub fn is_failed(&self) -> bool {
        self.end_ns.is_some() && !self.outcome.starts_with("ok")
    }
}

impl Report {
    /// The report of a run that was recorded with its trace.
    pub fn new(spec: &RunSpec, outcome: &Outcome) -> Self {
        let broken = outcome.failure.as_ref().map(|f| Broken {
            invariant: f.invariant.to_string(),
            sentence: f.invariant.sentence(),
            detail: f.detail.trim_end().to_owned(),
            at_ns: f.at_ns,
        });
        let canary = spec
            .options
            .canary
            .then(|| "the canary: a drive whose fdatasync says ok and does nothing".into());
        let bug = spec.options.bug.map(|bug| format!("seeded bug {}: {}", bug.name(), bug.sentence()));
        let decided = |(key, d): &(&Key, &Decision)| Decided {
            at_ns: d.at_ns,
            text: explain::decision(key, d),
            is_plan: is_plan(key),
        };
        Self {
            heading: spec.heading(),
            about: spec.scenario.about,
            mistake: bug.or(canary),
            broken,
            named: named(outcome).map(|(_, span)| told(span)).collect(),
            decisions: in_order(outcome).iter().map(decided).collect(),
            marks: marks(outcome),
            lines: lines(outcome),
            rows: rows(outcome),
            images: outcome.images.clone(),
            end_ns: outcome.virtual_ns,
        }
    }

    /// Which of the lines tell what happened, if not all can be shown.
    pub fn relevant(&self) -> Vec<bool> {
        story::relevant(&self.lines)
    }

    /// The page; `replay` is the command that repeats the run.
    pub fn page(&self, replay: &str) -> String {
        page::page(self, replay)
    }

    /// The trace events of Perfetto, as JSON.
    pub fn perfetto(&self) -> String {
        perfetto::trace(self)
    }
}

fn is_plan(key: &Key) -> bool {
    key.label.name == SETTING.name || key.label.name == OP.name
}

fn in_order(outcome: &Outcome) -> Vec<(&Key, &Decision)> {
    let mut decisions: Vec<_> = outcome.decisions.iter().collect();
    decisions.sort_by_key(|(k, d)| (d.at_ns, **k));
    decisions
}

/// Maximum number of requests that a failure names.
const NAMED_MAX: usize = 8;

/// The requests that the failure is about, with their places among the spans.
fn named(outcome: &Outcome) -> impl Iterator<Item = (usize, &Span)> {
    let failure = outcome.failure.as_ref();
    let is_named = move |(_, span): &(usize, &Span)| {
        let (Some(failure), Some(number)) = (failure, span.number) else { return false };
        let about = &failure.about;
        let numbers = match span.kind {
            "read" => &about.reads,
            "flush" => return false,
            _ => &about.writes,
        };
        let is_running =
            span.begin_ns <= failure.at_ns && span.end_ns.is_none_or(|end_ns| end_ns >= failure.at_ns);
        let is_there = about.places.iter().any(|place| overlap(&bytes_of(place), &span.bytes));
        let is_numbered = || numbers.iter().take(NAMED_MAX).any(|n| *n == number);
        (span.track == about.guest && is_numbered()) || (is_running && is_there)
    };
    outcome.trace.spans.iter().enumerate().filter(is_named)
}

fn bytes_of(range: &SectorRange) -> Range<u64> {
    let start = range.start.0 * SECTOR_BYTES;
    start..start + range.len_bytes()
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// A request in words, with its times.
fn told(span: &Span) -> String {
    let answer = match span.end_ns {
        Some(end_ns) => format!("answered at {} ({})", micros(end_ns), span.outcome),
        None => "not answered".into(),
    };
    format!("{} of {}: submitted at {}, {answer}", span.name, span.track, micros(span.begin_ns))
}

/// The requests that the failure is about, for people.
pub fn named_requests(outcome: &Outcome) -> Vec<String> {
    named(outcome).map(|(_, span)| told(span)).collect()
}

/// What explains the failure.
struct Interest {
    /// The sector that the failure names, or else the range.
    focus: Vec<SectorRange>,
    /// What the remaining operations read and write.
    touched: Vec<SectorRange>,
    /// The requests that the failure names: who, and how their lines read.
    named: Vec<(String, String)>,
}

impl Interest {
    fn of(outcome: &Outcome) -> Self {
        let failure = outcome.failure.as_ref();
        let detail = failure.map_or("", |f| f.detail.as_str());
        let sector = failure.and_then(|f| f.about.sector);
        let ops = outcome.decisions.iter().filter(|(key, _)| key.label.name == OP.name);
        let touched = ops.filter_map(|(_, d)| explain::operation(d)).map(|op| op.range);
        Self {
            focus: sector.map_or_else(|| ranges_in(detail).collect(), |s| vec![SectorRange::new(s, 1)]),
            touched: touched.filter(|r| r.count > 0).collect(),
            named: named(outcome).map(|(_, span)| (span.track.clone(), span.name.clone())).collect(),
        }
    }

    fn weight(&self, line: &TraceLine) -> Weight {
        let text = line.text.as_str();
        let overlaps = |all: &[SectorRange]| ranges_in(text).any(|r| all.iter().any(|t| t.overlaps(r)));
        let is_chatter = || {
            let answered = text.contains(" answers #") && text.ends_with(" ok");
            answered
                || text.contains(" raises port")
                || text.contains(" writes /")
                || text.contains(" removes /")
        };
        // Reads of other sectors explain nothing.
        let is_read = || text.contains("read ") && !self.focus.is_empty();
        let by_guest = || line.who.starts_with("guest ");
        let is_named = |(who, name): &(String, String)| *who == line.who && mentions(text, name);
        if line.who == "power" || self.named.iter().any(is_named) {
            Weight::Most
        } else if overlaps(&self.focus) || by_guest() && overlaps(&self.touched) && !is_read() {
            Weight::Much
        } else if ranges_in(text).next().is_some() {
            if overlaps(&self.touched) && !is_read() { Weight::Some } else { Weight::None }
        } else if is_chatter() && !self.focus.is_empty() {
            Weight::None
        } else {
            Weight::Some
        }
    }
}

/// Whether `name` ("write 1 to 8+8") is in `text` and does not go on there.
fn mentions(text: &str, name: &str) -> bool {
    text.match_indices(name).any(|(at, _)| !text[at + name.len()..].starts_with(|c: char| c.is_ascii_digit()))
}

/// The ranges of sectors (`8+16`) that a line mentions.
fn ranges_in(line: &str) -> impl Iterator<Item = SectorRange> + '_ {
    line.split([' ', ',', ':']).filter_map(|word| {
        let (start, count) = word.split_once('+')?;
        let count = count.parse().ok().filter(|n| *n > 0)?;
        Some(SectorRange::new(start.parse().ok()?, count))
    })
}

/// The lines of the trace, with the remaining decisions where they took effect.
fn lines(outcome: &Outcome) -> Vec<Line> {
    let interest = Interest::of(outcome);
    let decisions = in_order(outcome).into_iter().filter(|(key, _)| !is_plan(key));
    let mut decisions = decisions.peekable();
    let decided = |key: &Key, d: &Decision| Line {
        at_ns: d.at_ns,
        who: String::new(),
        text: explain::decision(key, d),
        weight: Weight::Most,
    };
    let mut out = Vec::new();
    for line in &outcome.trace.lines {
        while let Some((key, d)) = decisions.next_if(|(_, d)| d.at_ns <= line.at_ns) {
            out.push(decided(key, d));
        }
        let weight = interest.weight(line);
        out.push(Line { at_ns: line.at_ns, who: line.who.clone(), text: line.text.clone(), weight });
    }
    out.extend(decisions.map(|(key, d)| decided(key, d)));
    out
}

/// Labels of decisions by which an operation fails or loses something.
fn is_fault(label: &Label) -> bool {
    let lost = [&LOST, &SIZES_LOST, &SIZE_PARTLY, &RUN_LOST, &NAME_LOST, &SYNC_LOST];
    [&IO_FAULT, &BAD_SECTORS, &CALL_FAULT].into_iter().chain(lost).any(|fault| fault.name == label.name)
}

fn marks(outcome: &Outcome) -> Vec<Mark> {
    let decided = in_order(outcome).into_iter().filter(|(key, _)| !is_plan(key)).map(|(key, d)| Mark {
        at_ns: d.at_ns,
        kind: if is_fault(key.label) { MarkKind::Fault } else { MarkKind::Decision },
        text: explain::decision(key, d),
    });
    let cuts = outcome.trace.lines.iter().filter(|line| line.who == "power" && line.text.ends_with(" cut"));
    let cuts = cuts.map(|l| Mark { at_ns: l.at_ns, kind: MarkKind::Crash, text: l.text.clone() });
    let broken = outcome.failure.iter().map(|f| Mark {
        at_ns: f.at_ns,
        kind: MarkKind::Broken,
        text: format!("{}: {}", f.invariant, f.headline()),
    });
    let mut marks: Vec<Mark> = decided.chain(cuts).chain(broken).collect();
    marks.sort_by_key(|mark| (mark.at_ns, mark.kind));
    marks
}

/// The spans, each with whether it matters.
fn rows(outcome: &Outcome) -> Vec<Row> {
    let interest = Interest::of(outcome);
    let named: Vec<usize> = named(outcome).map(|(at, _)| at).collect();
    // Where the wrong sector and what leads to it are, by file.
    let places = outcome.images.iter().flat_map(|images| &images.files).flat_map(|file| {
        let focus = file.parts.iter().filter(|part| part.focus);
        focus.map(|part| (file.name.as_str(), part.start..part.start + part.len))
    });
    let places: Vec<_> = places.collect();
    let row = |(at, span): (usize, &Span)| {
        let layer = match span.track.as_bytes().first() {
            Some(b'/') => Layer::Drive,
            _ if span.track.starts_with("ring") => Layer::Ring,
            _ => Layer::Guest,
        };
        let of_focus = match layer {
            Layer::Drive => {
                places.iter().any(|(name, bytes)| *name == span.track && overlap(bytes, &span.bytes))
            }
            _ => interest.focus.iter().any(|range| overlap(&bytes_of(range), &span.bytes)),
        };
        let is_sync = matches!(span.kind, "flush" | "sync");
        Row {
            layer,
            track: span.track.clone(),
            name: match layer {
                Layer::Drive => format!("{} for {}", span.kind, span.name),
                _ => span.name.clone(),
            },
            begin_ns: span.begin_ns,
            end_ns: span.end_ns,
            outcome: span.outcome.clone(),
            matters: of_focus || is_sync || !span.outcome.starts_with("ok") || named.contains(&at),
        }
    };
    outcome.trace.spans.iter().enumerate().map(row).collect()
}
