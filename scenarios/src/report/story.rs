//! The story of a run: each remaining decision in words, and what then happened.

use super::{Line, Report, Weight};
use crate::spec::{Outcome, RunSpec};
use sim::micros;
use std::fmt::Write as _;

/// Lines that a story shows, if it has more.
const LINES: usize = 80;
/// Of them, those that it shows whatever else there is to show.
const FIRST_LINES: usize = 3;
const LAST_LINES: usize = 6;
/// Lines before and after a decision that belong to it.
const BEFORE: usize = 2;
const AFTER: usize = 3;

/// The whole story of a run, for people.
pub fn story(spec: &RunSpec, outcome: &Outcome) -> String {
    print(&Report::new(spec, outcome))
}

/// The same, of a report.
pub(super) fn print(report: &Report) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{}\n  {}", report.heading, report.about);
    if let Some(mistake) = &report.mistake {
        let _ = writeln!(out, "  {mistake}");
    }
    let count = report.decisions.len();
    let _ =
        writeln!(out, "\nDecisions that differ from the boring run ({count}; times are in microseconds):");
    for d in &report.decisions {
        let _ = writeln!(out, "  {:>14} {}", micros(d.at_ns), d.text);
    }
    print_lines(&mut out, &report.lines);
    match &report.broken {
        Some(b) => {
            let detail = b.detail.replace('\n', "\n  ");
            let (at, invariant, sentence) = (micros(b.at_ns), &b.invariant, b.sentence);
            let _ = writeln!(out, "\nBroken at {at}: {invariant}: {sentence}\n  {detail}");
        }
        None => out += "\nNothing is broken.\n",
    }
    if !report.named.is_empty() {
        out += "\nThe requests that this is about, in the order of their submission:\n";
    }
    for request in &report.named {
        let _ = writeln!(out, "  {request}");
    }
    out
}

/// Prints the trace with the remaining decisions among its lines; of a long trace, the most relevant lines.
fn print_lines(out: &mut String, lines: &[Line]) {
    let all = lines.len();
    let kept = relevant(lines);
    let shown = kept.iter().filter(|k| **k).count();
    let how =
        if shown < all { format!(", the most relevant lines ({shown} of {all})") } else { String::new() };
    let _ = writeln!(out, "\nWhat happened{how}:");
    let mut gap = false;
    for (line, kept) in lines.iter().zip(kept) {
        if kept {
            let _ = writeln!(out, "{}  {line}", if gap { "  ...\n" } else { "" });
            gap = false;
        } else {
            // Omitting a frequent line leaves no gap.
            gap |= line.weight > Weight::None;
        }
    }
}

/// Which lines to show.
pub(super) fn relevant(lines: &[Line]) -> Vec<bool> {
    if lines.len() > LINES { choose(lines) } else { vec![true; lines.len()] }
}

/// Selects the lines to show: decisions with the lines around them, the beginning and the end, then the others by
/// weight and by their distance to what is shown already.
fn choose(lines: &[Line]) -> Vec<bool> {
    let decisions: Vec<usize> = (0..lines.len()).filter(|i| lines[*i].is_decision()).collect();
    // Of a run that was not shrunk, the last ones.
    let decisions = &decisions[decisions.len().saturating_sub(LINES / 4)..];
    let mut kept = vec![false; lines.len()];
    for at in decisions {
        kept[at.saturating_sub(BEFORE)..(at + AFTER + 1).min(lines.len())].fill(true);
    }
    kept[..FIRST_LINES].fill(true);
    kept[lines.len() - LAST_LINES..].fill(true);
    let mut room = LINES.saturating_sub(kept.iter().filter(|k| **k).count());
    for weight in [Weight::Most, Weight::Much, Weight::Some] {
        let distance =
            |at: &usize| decisions.iter().map(|d| d.abs_diff(*at)).min().unwrap_or(lines.len() - at);
        let mut rest: Vec<usize> =
            (0..lines.len()).filter(|i| !kept[*i] && lines[*i].weight == weight).collect();
        rest.sort_by_key(distance);
        rest.truncate(room);
        room -= rest.len();
        rest.into_iter().for_each(|at| kept[at] = true);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog;
    use crate::check::{About, Failure, Invariant};
    use crate::workload::{OP, Op};
    use kernel_model::faults::IO_FAULT;
    use sim::{Decision, Entity, Key, Label, Span, TraceLine};
    use tap_host::{IoKind, SectorRange};

    fn line(at_ns: u64, who: &str, text: String) -> TraceLine {
        TraceLine { at_ns, who: who.into(), text }
    }

    fn told(outcome: &mut Outcome, decisions: &[(&'static Label, u64, u64)]) -> String {
        for (i, (label, value, at_ns)) in decisions.iter().enumerate() {
            let key = Key { entity: Entity(i as u64), label, attempt: 0 };
            let d = Decision { value: *value, at_ns: *at_ns, entity_name: "sync of x".into() };
            outcome.decisions.insert(key, d);
        }
        story(&RunSpec::new(catalog::ALL[0], 7), outcome)
    }

    #[test]
    fn long_traces_are_cut_to_the_relevant_lines() {
        let mut outcome = Outcome::default();
        outcome.trace.lines =
            (0..200).map(|i| line(1, "guest 1", format!("write {i} to {}+8 ok", i * 8))).collect();
        outcome.trace.lines.push(line(2, "power", "the power is cut".into()));
        let op = Op::new(IoKind::Write, SectorRange::new(48, 8)).encode();
        let out = told(&mut outcome, &[(&OP, op, 0)]);
        assert!(out.contains("write 6 to 48+8") && out.contains("the power is cut"), "{out}");
        assert!(!out.contains("write 7 to") && out.contains("of 201)"), "{out}");
    }

    #[test]
    fn lines_around_decisions_are_kept_however_old() {
        let mut outcome = Outcome::default();
        outcome.trace.lines = (0..400).map(|i| line(i * 10, "tapdisk", format!("something {i}"))).collect();
        let out = told(&mut outcome, &[(&IO_FAULT, 6, 1005)]);
        let at = |text: &str| {
            out.lines().position(|l| l.contains(text)).unwrap_or_else(|| panic!("{text}: {out}"))
        };
        let fault = at("*          sync of x: fails with EIO");
        for near in ["something 99", "something 100", "something 101", "something 103", "something 399"] {
            at(near);
        }
        assert!(at("something 100") < fault && fault < at("something 101"), "{out}");
        assert_eq!(out.matches("  ...").count(), 2, "{out}");
    }

    #[test]
    fn requests_that_a_failure_names_are_listed_with_their_times() {
        let mut outcome = Outcome::default();
        let span = |kind, number, name: &str, begin_ns, end_ns| Span {
            track: "guest 1".into(),
            kind,
            number: Some(number),
            name: name.into(),
            begin_ns,
            end_ns,
            outcome: "ok".into(),
            ..Span::default()
        };
        outcome.trace.spans = vec![
            span("write", 1, "write 1 to 8+8", 1_000, Some(2_500)),
            span("write", 2, "write 2 to 64+8", 1_000, Some(2_500)),
            span("read", 9, "read 8+8", 1_001, None),
        ];
        let about = About {
            guest: "guest 1".into(),
            sector: Some(9),
            writes: vec![1],
            reads: vec![9],
            ..About::default()
        };
        let detail = "read 8+8: sector 9 holds zeros".into();
        outcome.failure = Some(Failure { detail, about, at_ns: 3_000, ..Failure::of(Invariant::G1) });
        let out = told(&mut outcome, &[]);
        assert!(out.contains("Broken at 3.000: G1"), "{out}");
        let write = "  write 1 to 8+8 of guest 1: submitted at 1.000, answered at 2.500 (ok)\n";
        let read = "  read 8+8 of guest 1: submitted at 1.001, not answered\n";
        assert!(out.ends_with(&format!("{write}{read}")), "{out}");
    }
}
