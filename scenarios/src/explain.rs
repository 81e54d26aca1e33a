//! The story of a failure: each decision that is left, in words, and what then happened.

use crate::run::{Outcome, RunSpec};
use crate::workload::{OP, Op};
use kernel_model::faults::{IO_FAULT, describe_fault};
use sim::{Decision, Key};
use std::fmt::Write as _;

/// Disks of scenarios are at most this large; used to show operations, which are taken modulo the disk.
const SHOWN_SECTORS: u64 = 1 << 40;
/// Lines of the trace that a report shows.
const LINES: usize = 60;

/// One decision in words.
pub fn decision(key: &Key, d: &Decision) -> String {
    let who = if d.entity_name.is_empty() { format!("{:016x}", key.entity.0) } else { d.entity_name.clone() };
    let what = if key.label.name == OP.name {
        let op = Op::decode(d.value, SHOWN_SECTORS).map_or("nothing".into(), |op| op.to_string());
        format!("operation {}: {op}", key.attempt)
    } else if key.label.name == IO_FAULT.name {
        describe_fault(d.value)
    } else {
        let value =
            if key.label.words.contains("mask") { format!("{:#010b}", d.value) } else { d.value.to_string() };
        key.label.words.replace("{}", &value)
    };
    format!("{who}: {what}")
}

/// The whole story of a run, for people.
pub fn story(spec: &RunSpec, outcome: &Outcome) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{} with seed {}", spec.scenario.name, spec.seed);
    let _ = writeln!(out, "  {}", spec.scenario.about);
    if let Some(bug) = spec.options.bug {
        let _ = writeln!(out, "  seeded bug {}: {}", bug.name(), bug.sentence());
    }
    let _ = writeln!(out, "\nDecisions that differ from the boring run ({}):", outcome.decisions.len());
    let mut decisions: Vec<_> = outcome.decisions.iter().collect();
    decisions.sort_by_key(|(k, d)| (d.at_ns, **k));
    for (key, d) in decisions {
        let _ = writeln!(out, "  {:>12} ns  {}", d.at_ns, decision(key, d));
    }
    let lines = &outcome.trace.lines;
    let _ = writeln!(out, "\nWhat happened{}:", if lines.len() > LINES { " (the end of it)" } else { "" });
    for line in lines.iter().skip(lines.len().saturating_sub(LINES)) {
        let _ = writeln!(out, "  {line}");
    }
    match &outcome.failure {
        Some(f) => {
            let _ = writeln!(
                out,
                "\nBroken at {} ns: {}: {}\n  {}",
                f.at_ns,
                f.invariant,
                f.invariant.sentence(),
                f.detail
            );
        }
        None => out += "\nNothing is broken.\n",
    }
    out
}
