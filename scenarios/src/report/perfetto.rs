//! A run as trace events, which Perfetto (ui.perfetto.dev) and other viewers of Chrome's format show.
//!
//! Work that overlaps on one track is put on threads of its own, because events of one thread must be nested.

use super::{Layer, MarkKind, Report, Row};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The process of marks and of events.
const RUN: u32 = 0;

/// The trace, with times in virtual microseconds.
pub(super) fn trace(report: &Report) -> String {
    let mut events = vec![process(RUN, "the run"), thread(RUN, 0, "marks")];
    let place = |layer: Layer| 1 + layer as u32;
    for (layer, name) in [(Layer::Guest, "guests"), (Layer::Ring, "rings"), (Layer::Drive, "files")] {
        events.push(process(place(layer), name));
    }
    for mark in &report.marks {
        let scope = if matches!(mark.kind, MarkKind::Crash | MarkKind::Broken) { "g" } else { "t" };
        let name = format!("{}: {}", mark.kind.name(), mark.text);
        events.push(
            json!({ "ph": "i", "s": scope, "pid": RUN, "tid": 0, "ts": micros(mark.at_ns), "name": name }),
        );
    }
    let mut tracks: BTreeMap<(Layer, &str), Vec<&Row>> = BTreeMap::new();
    for row in &report.rows {
        tracks.entry((row.layer, &row.track)).or_default().push(row);
    }
    let mut threads = 1;
    for ((layer, track), rows) in tracks {
        let mut ends: Vec<u64> = Vec::new();
        for row in rows {
            let end_ns = row.end_ns.unwrap_or(report.end_ns).max(row.begin_ns);
            let free = ends.iter().position(|end| *end <= row.begin_ns);
            let at = free.unwrap_or_else(|| {
                let name =
                    if ends.is_empty() { track.to_owned() } else { format!("{track} ({})", ends.len() + 1) };
                events.push(thread(place(layer), threads + ends.len() as u32, &name));
                ends.push(0);
                ends.len() - 1
            });
            ends[at] = end_ns.max(row.begin_ns + 1);
            let outcome = if row.end_ns.is_some() { &row.outcome } else { "never ended" };
            events.push(json!({
                "ph": "X", "pid": place(layer), "tid": threads + at as u32, "ts": micros(row.begin_ns),
                "dur": micros(end_ns - row.begin_ns), "name": row.name,
                "args": { "outcome": outcome, "matters": row.matters },
            }));
        }
        threads += ends.len() as u32;
    }
    let mut who: BTreeMap<&str, u32> = BTreeMap::new();
    for line in report.lines.iter().filter(|line| line.is_event()) {
        let next = threads + who.len() as u32;
        let tid = *who.entry(&line.who).or_insert_with(|| {
            events.push(thread(RUN, next, &line.who));
            next
        });
        events.push(json!({ "ph": "i", "s": "t", "pid": RUN, "tid": tid, "ts": micros(line.at_ns), "name": line.text }));
    }
    json!({ "displayTimeUnit": "ns", "traceEvents": events }).to_string()
}

/// Microseconds; exact to a nanosecond for runs of less than a month.
fn micros(ns: u64) -> f64 {
    ns as f64 / 1000.0
}

fn process(pid: u32, name: &str) -> Value {
    json!({ "ph": "M", "pid": pid, "name": "process_name", "args": { "name": name } })
}

fn thread(pid: u32, tid: u32, name: &str) -> Value {
    json!({ "ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": { "name": name } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog;
    use crate::spec::{Outcome, RunSpec};
    use sim::{Span, TraceLine};

    #[test]
    fn work_that_overlaps_is_on_threads_of_its_own() {
        let span = |track: &str, begin_ns, end_ns| Span {
            track: track.into(),
            kind: "write",
            name: format!("write at {begin_ns}"),
            begin_ns,
            end_ns,
            outcome: "ok".into(),
            ..Span::default()
        };
        let mut outcome = Outcome { virtual_ns: 9_000, ..Outcome::default() };
        outcome.trace.spans = vec![
            span("guest 1", 1_000, Some(3_000)),
            span("guest 1", 2_001, None),
            span("guest 1", 3_000, Some(4_000)),
            span("/images/x", 1_000, Some(1_000)),
        ];
        outcome.trace.lines =
            vec![TraceLine { at_ns: 1_500, who: "tapdisk".into(), text: "vbd1 is running".into() }];
        let report = Report::new(&RunSpec::new(catalog::ALL[0], 0), &outcome);
        let trace: Value = serde_json::from_str(&trace(&report)).expect("it is JSON");
        let events = trace["traceEvents"].as_array().expect("a list");
        let of = |phase: &str| events.iter().filter(|e| e["ph"] == phase).cloned().collect::<Vec<_>>();
        let work = of("X");
        let placed: Vec<_> = work.iter().map(|e| (&e["pid"], &e["tid"], &e["ts"], &e["dur"])).collect();
        let (guests, files) = (json!(1), json!(3));
        assert_eq!(placed[0], (&guests, &json!(1), &json!(1.0), &json!(2.0)));
        assert_eq!(placed[1], (&guests, &json!(2), &json!(2.001), &json!(6.999)), "it never ended");
        assert_eq!(placed[2], (&guests, &json!(1), &json!(3.0), &json!(1.0)), "its place is free again");
        assert_eq!(placed[3], (&files, &json!(3), &json!(1.0), &json!(0.0)));
        assert!(of("M").iter().any(|e| e["tid"] == 2 && e["args"]["name"] == "guest 1 (2)"), "{trace}");
        assert_eq!(of("i")[0]["name"], "vbd1 is running");
    }
}
