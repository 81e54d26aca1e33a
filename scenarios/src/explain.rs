//! The story of a failure: each remaining decision in words, and what then happened.

use crate::guest::{
    KEYS, NBD_LIE, NBD_TRICK, TRICK, describe_keys, describe_nbd_lie, describe_nbd_trick, describe_trick,
};
use crate::spec::{Outcome, RunSpec};
use crate::workload::{OP, Op};
use crate::world::SETTING;
use kernel_model::calls::{CALL_FAULT, describe_call_fault};
use kernel_model::faults::{IO_FAULT, describe_fault};
use sim::{Decision, Key};
use std::fmt::Write as _;
use tap_host::SectorRange;

/// Upper bound of a scenario's disk; operations are shown modulo the disk.
const SHOWN_SECTORS: u64 = 1 << 40;
/// Lines of the trace that a report shows.
const LINES: usize = 60;

/// One decision in words.
pub fn decision(key: &Key, d: &Decision) -> String {
    let who = if d.entity_name.is_empty() { format!("{:016x}", key.entity.0) } else { d.entity_name.clone() };
    let is = |label: &sim::Label| key.label.name == label.name;
    let what = if is(&SETTING) && !d.entity_name.is_empty() {
        // The name contains the setting and its value.
        return who;
    } else if is(&OP) {
        let op = Op::decode(d.value, SHOWN_SECTORS).map_or("nothing".into(), |op| op.to_string());
        format!("operation {}: {op}", key.attempt)
    } else if is(&IO_FAULT) {
        describe_fault(d.value)
    } else if is(&CALL_FAULT) {
        describe_call_fault(d.value)
    } else if is(&TRICK) {
        format!("trick {}: {}", key.attempt, describe_trick(d.value))
    } else if is(&NBD_TRICK) {
        format!("message {}: {}", key.attempt, describe_nbd_trick(d.value))
    } else if is(&NBD_LIE) {
        format!("answer {} is wrong: {}", key.attempt, describe_nbd_lie(d.value))
    } else if is(&KEYS) {
        describe_keys(d.value).into()
    } else {
        in_words(key, d.value)
    };
    format!("{who}: {what}")
}

/// A decision by the words of its label: `{} ns` is a time, `(mask)` a set of sectors, `{n}` the attempt.
fn in_words(key: &Key, value: u64) -> String {
    let words = key.label.words.replace("{n}", &key.attempt.to_string());
    if let Some(words) = words.strip_suffix(" (mask)") {
        return words.replace("sectors {}", &sectors_of(value));
    }
    words.replace("{} ns", &time(value)).replace("{}", &value.to_string())
}

/// A time in the largest unit that leaves it exact to a thousandth.
fn time(ns: u64) -> String {
    let (unit, name) = match ns {
        0..1_000 => return format!("{ns} ns"),
        1_000..1_000_000 => (1_000, "us"),
        1_000_000..1_000_000_000 => (1_000_000, "ms"),
        _ => (1_000_000_000, "s"),
    };
    let text = format!("{}.{:03}", ns / unit, ns % unit * 1000 / unit);
    format!("{} {name}", text.trim_end_matches('0').trim_end_matches('.'))
}

/// The sectors of a page whose bits are set, in words.
fn sectors_of(mask: u64) -> String {
    if mask & 0xff == 0xff {
        return "all sectors".into();
    }
    let set: Vec<String> = (0..8).filter(|i| mask & 1 << i != 0).map(|i| i.to_string()).collect();
    format!("{} {}", if set.len() == 1 { "sector" } else { "sectors" }, set.join(", "))
}

/// The whole story of a run, for people.
pub fn story(spec: &RunSpec, outcome: &Outcome) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{} with seed {}", spec.scenario.name, spec.seed);
    let _ = writeln!(out, "  {}", spec.scenario.about);
    if let Some(bug) = spec.options.bug {
        let _ = writeln!(out, "  seeded bug {}: {}", bug.name(), bug.sentence());
    }
    if spec.options.canary {
        let _ = writeln!(out, "  the canary: a drive whose fdatasync says ok and does nothing");
    }
    let _ = writeln!(out, "\nDecisions that differ from the boring run ({}):", outcome.decisions.len());
    let mut decisions: Vec<_> = outcome.decisions.iter().collect();
    decisions.sort_by_key(|(k, d)| (d.at_ns, **k));
    for (key, d) in decisions {
        let _ = writeln!(out, "  {:>12} ns  {}", d.at_ns, decision(key, d));
    }
    print_trace(&mut out, outcome);
    match &outcome.failure {
        Some(f) => {
            let _ = writeln!(
                out,
                "\nBroken at {} ns: {}: {}\n  {}",
                f.at_ns,
                f.invariant,
                f.invariant.sentence(),
                f.detail.trim_end().replace('\n', "\n  ")
            );
        }
        None => out += "\nNothing is broken.\n",
    }
    out
}

/// How much a line explains the failure.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Weight {
    /// About other places, or too frequent to matter.
    None,
    /// Touches what the remaining operations touch, or no place at all.
    Some,
    /// A remaining decision, or about the wrong sector.
    Most,
}

/// Prints the trace with the remaining decisions among its lines; of a long trace, the most relevant lines.
fn print_trace(out: &mut String, outcome: &Outcome) {
    let lines = interleaved(outcome);
    let all = lines.len();
    let kept = if all > LINES { choose(&lines) } else { vec![true; all] };
    let shown = kept.iter().filter(|k| **k).count();
    let how = if shown < all {
        format!(", the most relevant lines ({shown} of {all} lines)")
    } else {
        String::new()
    };
    let _ = writeln!(out, "\nWhat happened{how}:");
    let mut gap = false;
    for ((text, weight), kept) in lines.iter().zip(kept) {
        if kept {
            let _ = writeln!(out, "{}  {text}", if gap { "  ...\n" } else { "" });
            gap = false;
        } else {
            // Omitting a frequent line leaves no gap.
            gap |= *weight > Weight::None;
        }
    }
}

/// Selects the lines to show: the most relevant, and the last of the others as far as there is room.
fn choose(lines: &[(String, Weight)]) -> Vec<bool> {
    let mut kept = vec![false; lines.len()];
    let mut room = LINES;
    for wanted in [Weight::Most, Weight::Some] {
        for (i, _) in lines.iter().enumerate().rev().filter(|(_, line)| line.1 == wanted) {
            if room == 0 {
                return kept;
            }
            kept[i] = true;
            room -= 1;
        }
    }
    kept
}

/// The lines of the trace, with the remaining decisions where they took effect.
fn interleaved(outcome: &Outcome) -> Vec<(String, Weight)> {
    let (focus, touched) = (focus(outcome), touched(outcome));
    let told = |d: &(&Key, &Decision)| d.0.label.name != SETTING.name && d.0.label.name != OP.name;
    let mut decisions: Vec<_> = outcome.decisions.iter().filter(told).collect();
    decisions.sort_by_key(|(k, d)| (d.at_ns, **k));
    let mut decisions = decisions.into_iter().peekable();
    let mut out = Vec::new();
    for line in &outcome.trace.lines {
        while let Some((key, d)) = decisions.next_if(|(_, d)| time_of(line).is_some_and(|t| d.at_ns <= t)) {
            out.push((decided(key, d), Weight::Most));
        }
        out.push((line.clone(), weight(line, &focus, &touched)));
    }
    out.extend(decisions.map(|(key, d)| (decided(key, d), Weight::Most)));
    out
}

fn decided(key: &Key, d: &Decision) -> String {
    let (s, ns) = (d.at_ns / 1_000_000_000, d.at_ns % 1_000_000_000);
    format!("{s:>6}.{ns:09} * {}", decision(key, d))
}

/// The time at the start of a line of the trace, in nanoseconds.
fn time_of(line: &str) -> Option<u64> {
    let (s, ns) = line.split_whitespace().next()?.split_once('.')?;
    Some(s.parse::<u64>().ok()? * 1_000_000_000 + ns.parse::<u64>().ok()?)
}

fn weight(line: &str, focus: &[SectorRange], touched: &[SectorRange]) -> Weight {
    let overlaps = |all: &[SectorRange]| ranges_in(line).any(|r| all.iter().any(|t| t.overlaps(r)));
    let is_chatter = || {
        let answered = line.contains(" answers #") && line.ends_with(" ok");
        answered || line.contains(" raises port") || line.contains(" writes /") || line.contains(" removes /")
    };
    // Reads of other sectors explain nothing.
    let is_read = || line.contains("read ") && !focus.is_empty();
    if overlaps(focus) {
        Weight::Most
    } else if ranges_in(line).next().is_some() {
        if overlaps(touched) && !is_read() { Weight::Some } else { Weight::None }
    } else if is_chatter() && !focus.is_empty() {
        Weight::None
    } else {
        Weight::Some
    }
}

/// The sector that the failure names, or else the range.
fn focus(outcome: &Outcome) -> Vec<SectorRange> {
    let detail = outcome.failure.as_ref().map_or("", |f| f.detail.as_str());
    let mut words = detail.split([' ', ',', ':']);
    let sector = words.find(|w| *w == "sector").and_then(|_| words.next()?.parse().ok());
    match sector {
        Some(sector) => vec![SectorRange::new(sector, 1)],
        None => ranges_in(detail).collect(),
    }
}

/// What the remaining operations read and write.
fn touched(outcome: &Outcome) -> Vec<SectorRange> {
    let ops = outcome.decisions.iter().filter(|(key, _)| key.label.name == OP.name);
    let ranges = ops.filter_map(|(_, d)| Op::decode(d.value, SHOWN_SECTORS)).map(|op| op.range);
    ranges.filter(|r| r.count > 0).collect()
}

/// The ranges of sectors (`8+16`) that a line mentions.
fn ranges_in(line: &str) -> impl Iterator<Item = SectorRange> + '_ {
    line.split([' ', ',', ':']).filter_map(|word| {
        let (start, count) = word.split_once('+')?;
        let count = count.parse().ok().filter(|n| *n > 0)?;
        Some(SectorRange::new(start.parse().ok()?, count))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use sim::{Entity, Label};

    fn words(label: &'static Label, attempt: u32, value: u64, name: &str) -> String {
        let key = Key { entity: Entity(0xabc), label, attempt };
        decision(&key, &Decision { value, at_ns: 0, entity_name: name.into() })
    }

    #[test]
    fn decisions_read_well() {
        assert_eq!(words(&SETTING, 0, 2, "cluster-bits is 9"), "cluster-bits is 9");
        assert_eq!(
            words(&sim::WAKE, 3, 1_234, "tapdisk op 7"),
            "tapdisk op 7: its turn 3 is delayed by 1.234 us"
        );
        assert_eq!(
            words(&kernel_model::faults::LOST, 0, 0b1001, "write of x, page 3"),
            "write of x, page 3: the power cut takes sectors 0, 3 of the page"
        );
        assert_eq!(words(&IO_FAULT, 0, 6, "sync of x"), "sync of x: fails with EIO");
        assert_eq!(words(&OP, 5, 3 | 7 << 2 | 16 << 10, "guest"), "guest: operation 5: write 16+8");
        assert_eq!(words(&sim::WAKE, 0, 5, ""), "0000000000000abc: its turn 0 is delayed by 5 ns");
        assert_eq!(
            (time(20_000_000), time(999), time(10_000_000_000)),
            ("20 ms".into(), "999 ns".into(), "10 s".into())
        );
    }

    #[test]
    fn every_label_has_words_for_its_value() {
        crate::run::prepare();
        for label in
            kernel_model::faults::LABELS.iter().chain(&xen_model::LABELS).chain(crate::catalog::LABELS)
        {
            let text = words(label, 1, 1, "entity");
            assert!(!text.contains(['{', '}']) && text.len() > "entity: ".len(), "{}: {text}", label.name);
        }
    }

    fn told(detail: &str, lines: Vec<String>, decisions: &[(&'static Label, u64, u64)]) -> String {
        let mut outcome = Outcome::default();
        outcome.trace.lines = lines;
        outcome.failure = Some(crate::check::Failure {
            invariant: crate::check::Invariant::G1,
            detail: detail.into(),
            at_ns: 0,
        });
        for (i, (label, value, at_ns)) in decisions.iter().enumerate() {
            let key = Key { entity: Entity(i as u64), label, attempt: 0 };
            let d = Decision { value: *value, at_ns: *at_ns, entity_name: "sync of x".into() };
            outcome.decisions.insert(key, d);
        }
        let mut out = String::new();
        print_trace(&mut out, &outcome);
        out
    }

    #[test]
    fn long_traces_are_cut_to_the_relevant_lines() {
        let line = |i: u64| format!("  0.000000001 guest write {i} to {}+8 ok", i * 8);
        let power = "  0.000000002 power the power is cut".to_string();
        let lines: Vec<String> = (0..200).map(line).chain([power]).collect();
        let op = Op::decode(3 | 7 << 2 | 48 << 10, 1 << 20).unwrap().encode();
        let out = told("", lines, &[(&OP, op, 0)]);
        assert!(out.contains("write 6 to 48+8") && out.contains("the power is cut"), "{out}");
        assert!(!out.contains("write 7 to") && out.contains("2 of 201 lines"), "{out}");
    }

    #[test]
    fn lines_about_the_wrong_sector_are_shown_however_old() {
        let early = "  0.000000001 guest submits write 3 to 100+8".to_string();
        let chatter = (0..400).map(|i| format!("  0.{:09} guest something {i}", i + 5));
        let lines = [early].into_iter().chain(chatter).collect();
        let out = told("read 96+8: sector 103 holds zeros", lines, &[(&IO_FAULT, 6, 7)]);
        assert!(out.contains("write 3 to 100+8") && out.contains("something 399"), "{out}");
        let fault = out.lines().position(|l| l.contains("* sync of x: fails with EIO")).unwrap();
        assert!(fault < out.lines().position(|l| l.contains("something 399")).unwrap(), "{out}");
        assert_eq!(out.matches("...").count(), 2, "{out}");
    }
}
