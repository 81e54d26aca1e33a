//! `run`, `replay`, `shrink`, `explain`, `list`: one run at a time.

use super::args::{Common, FileArgs, LogLevel, RunArgs};
use super::output::{SHRINKS, exit_of, how_shrunk, load_run, print_failure, report_failure, save_json};
use super::paths::{after, try_file};
use super::{Exit, Stop};
use crate::check::Invariant;
use crate::panics::apart;
use crate::probes::{BUGS, find_bug};
use crate::run::{Effort, run_apart, shrink_run};
use crate::scenario::Scenario;
use crate::spec::{Outcome, RunSpec};
use crate::{catalog, interrupt, report};
use serde::Serialize;
use sim::TraceLevel;
use tap_host::Bug;

/// The scenario called `name`.
pub(crate) fn scenario(name: &str) -> Result<&'static Scenario, Stop> {
    catalog::find(name)
        .ok_or_else(|| Stop::usage(format!("unknown scenario {name:?}: `tapsim list` lists the known ones")))
}

/// The seeded bug called `name`.
pub(crate) fn bug(name: &str) -> Result<&'static Bug, Stop> {
    find_bug(name).ok_or_else(|| {
        Stop::usage(format!("unknown seeded bug {name:?}: `tapsim list` lists the known ones"))
    })
}

fn trace_level(common: &Common) -> TraceLevel {
    if common.log == LogLevel::Full { TraceLevel::Full } else { TraceLevel::Events }
}

#[derive(Serialize)]
struct JsonRun {
    scenario: &'static str,
    seed: u64,
    guarded: bool,
    failed: bool,
    invariant: Option<String>,
    detail: Option<String>,
    trace_hash: String,
    events: u64,
    decisions: usize,
    guest_requests: u64,
    host_ios: u64,
    virtual_ns: u64,
}

fn report(common: &Common, spec: &RunSpec, outcome: &Outcome) -> Result<(), Stop> {
    let mut stored = Ok(());
    if let Some(path) = &common.json {
        let json = JsonRun {
            scenario: spec.scenario.name,
            seed: spec.seed,
            guarded: common.guarded(),
            failed: outcome.failure.is_some(),
            invariant: outcome.failure.as_ref().map(|f| f.invariant.to_string()),
            detail: outcome.failure.as_ref().map(|f| f.detail.clone()),
            trace_hash: format!("{:#018x}", outcome.trace.hash),
            events: outcome.trace.events,
            decisions: outcome.decisions.len(),
            guest_requests: outcome.stats.requests,
            host_ios: outcome.stats.host_ios,
            virtual_ns: outcome.virtual_ns,
        };
        stored = save_json(path, &json);
    }
    println!(
        "{} seed {}: {} requests, {} host operations, {} crashes, {} decisions, {}.{:03} virtual s, trace {:#018x}, {}",
        spec.scenario.name,
        spec.seed,
        outcome.stats.requests,
        outcome.stats.host_ios,
        outcome.stats.crashes,
        outcome.decisions.len(),
        outcome.virtual_ns / 1_000_000_000,
        outcome.virtual_ns / 1_000_000 % 1000,
        outcome.trace.hash,
        if common.guarded() { "guarded" } else { "not guarded" },
    );
    stored
}

/// `tapsim run`
pub(crate) fn run_command(common: &Common, args: &RunArgs) -> Result<Exit, Stop> {
    let mut spec = RunSpec::new(scenario(&args.scenario)?, args.seed);
    spec.options.bug = args.bug.as_deref().map(bug).transpose()?;
    spec.options.canary = args.canary;
    spec.trace = trace_level(common);
    spec.record = true;
    let outcome = run_apart(common.guarded(), &spec);
    if common.log == LogLevel::Full {
        outcome.trace.lines.iter().for_each(|line| println!("{line}"));
    }
    let mut stored = report(common, &spec, &outcome);
    if outcome.failure.is_some() {
        stored = stored.and(report_failure(common, &spec));
    }
    println!("{}", closing(&outcome));
    after(exit_of(&outcome), stored)
}

fn closing(outcome: &Outcome) -> &'static str {
    if outcome.failure.is_some() { "0 passed, 1 failed" } else { "1 passed, 0 failed" }
}

/// `tapsim replay`
pub(crate) fn replay_command(common: &Common, args: &FileArgs) -> Result<Exit, Stop> {
    let (file, mut spec) = load_run(&args.file)?;
    spec.trace = trace_level(common);
    spec.record = true;
    let outcome = run_apart(common.guarded(), &spec);
    if common.log == LogLevel::Full {
        outcome.trace.lines.iter().for_each(|line| println!("{line}"));
    }
    let stored = report(common, &spec, &outcome);
    if file.trace_hash != outcome.trace.hash {
        println!(
            "the trace differs from the saved one: the code has changed since revision {}",
            file.revision
        );
    }
    match &outcome.failure {
        Some(_) => print_failure(common, &spec, &outcome),
        None if file.invariant.is_empty() => println!("nothing is broken, as expected"),
        None => println!("nothing is broken any more: {} was when this was saved", file.invariant),
    }
    println!("{}", closing(&outcome));
    after(exit_of(&outcome), stored)
}

/// `tapsim shrink`
pub(crate) fn shrink_command(common: &Common, args: &FileArgs) -> Result<Exit, Stop> {
    let path = &args.file;
    let unwritable = |e| Stop::usage(format!("failed to write {}: {e}", path.display()));
    let (_, spec) = load_run(path)?;
    try_file(path).map_err(unwritable)?;
    let recorded = RunSpec { record: true, ..spec.clone() };
    let before = run_apart(common.guarded(), &recorded);
    if before.failure.is_none() {
        println!("nothing is broken in this run, so there is nothing to shrink");
        return Ok(Exit::Ok);
    }
    let (mine, recorded) = (spec.clone(), before.clone());
    let effort = Effort::of_runs(SHRINKS.runs);
    let shrunk = apart(common.guarded(), spec.seed, move || shrink_run(&mine, &recorded, effort));
    let Ok((best, outcome, shrunk)) = shrunk else {
        return Err(Stop(
            Exit::Broken,
            "a smaller run blocks its thread for good: nothing is changed".into(),
        ));
    };
    std::fs::write(path, best.to_file(&outcome, &super::revision()).print()).map_err(unwritable)?;
    println!("{}: {}", path.display(), how_shrunk(before.decisions.len(), outcome.decisions.len(), &shrunk));
    Ok(if interrupt::asked() { Exit::Interrupted } else { Exit::Ok })
}

/// `tapsim explain`
pub(crate) fn explain_command(common: &Common, args: &FileArgs) -> Result<Exit, Stop> {
    let (_, spec) = load_run(&args.file)?;
    let recorded = RunSpec { record: true, trace: TraceLevel::Events, ..spec.clone() };
    let outcome = run_apart(common.guarded(), &recorded);
    print!("{}", report::story(&spec, &outcome));
    Ok(exit_of(&outcome))
}

#[derive(Serialize)]
struct JsonEntry {
    name: String,
    about: &'static str,
}

#[derive(Serialize)]
struct JsonList {
    scenarios: Vec<JsonEntry>,
    bugs: Vec<JsonEntry>,
    invariants: Vec<JsonEntry>,
}

/// `tapsim list`
pub(crate) fn list_command(common: &Common) -> Result<Exit, Stop> {
    let list = JsonList {
        scenarios: catalog::ALL.iter().map(|s| JsonEntry { name: s.name.into(), about: s.about }).collect(),
        bugs: BUGS.iter().map(|b| JsonEntry { name: b.name().into(), about: b.sentence() }).collect(),
        invariants: Invariant::ALL
            .iter()
            .map(|i| JsonEntry { name: i.to_string(), about: i.sentence() })
            .collect(),
    };
    for (title, entries) in
        [("Scenarios", &list.scenarios), ("Seeded bugs", &list.bugs), ("Invariants", &list.invariants)]
    {
        println!("{title}:");
        for entry in entries {
            println!("  {:<28} {}", entry.name, entry.about);
        }
        println!();
    }
    if let Some(path) = &common.json {
        save_json(path, &list)?;
    }
    Ok(Exit::Ok)
}
