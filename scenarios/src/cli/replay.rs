//! `run`, `replay`, `shrink`, `explain`, `list`: one run at a time.

use super::args::{Common, FileArgs, LogLevel, RunArgs};
use super::output::{SHRINK_RUNS, exit_of, load_run, print_failure, report_failure, save_json};
use super::{Exit, Stop};
use crate::check::Invariant;
use crate::probes::{BUGS, find_bug};
use crate::run::{run, run_recorded, shrink_run};
use crate::scenario::Scenario;
use crate::spec::{Outcome, RunSpec};
use crate::{catalog, explain};
use serde::Serialize;
use sim::{TraceLevel, guard};
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

fn guarded<T: Send + 'static>(common: &Common, spec: &RunSpec, work: fn(&RunSpec) -> T) -> T {
    let spec = spec.clone();
    guard::run(common.guarded(), spec.seed, move || work(&spec))
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
        save_json(path, &json)?;
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
    Ok(())
}

/// `tapsim run`
pub(crate) fn run_command(common: &Common, args: &RunArgs) -> Result<Exit, Stop> {
    let mut spec = RunSpec::new(scenario(&args.scenario)?, args.seed);
    spec.options.bug = args.bug.as_deref().map(bug).transpose()?;
    spec.options.canary = args.canary;
    spec.trace = trace_level(common);
    spec.record = true;
    let outcome = guarded(common, &spec, run);
    if common.log == LogLevel::Full {
        outcome.trace.lines.iter().for_each(|line| println!("{line}"));
    }
    report(common, &spec, &outcome)?;
    if outcome.failure.is_some() {
        report_failure(common, &spec)?;
    }
    println!("{}", closing(&outcome));
    Ok(exit_of(&outcome))
}

fn closing(outcome: &Outcome) -> &'static str {
    if outcome.failure.is_some() { "0 passed, 1 failed" } else { "1 passed, 0 failed" }
}

/// `tapsim replay`
pub(crate) fn replay_command(common: &Common, args: &FileArgs) -> Result<Exit, Stop> {
    let (file, mut spec) = load_run(&args.file)?;
    spec.trace = trace_level(common);
    spec.record = true;
    let outcome = guarded(common, &spec, run);
    if common.log == LogLevel::Full {
        outcome.trace.lines.iter().for_each(|line| println!("{line}"));
    }
    report(common, &spec, &outcome)?;
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
    Ok(exit_of(&outcome))
}

/// `tapsim shrink`
pub(crate) fn shrink_command(common: &Common, args: &FileArgs) -> Result<Exit, Stop> {
    let (_, spec) = load_run(&args.file)?;
    let before = guarded(common, &spec, |spec| run_recorded(spec, TraceLevel::Hash));
    if before.failure.is_none() {
        println!("nothing is broken in this run, so there is nothing to shrink");
        return Ok(Exit::Ok);
    }
    let (best, outcome, runs) = guarded(common, &spec, |spec| {
        let recorded = run_recorded(spec, TraceLevel::Hash);
        let (best, outcome, shrunk) = shrink_run(spec, &recorded, SHRINK_RUNS);
        (best, outcome, shrunk.runs)
    });
    let text = best.to_file(&outcome, &super::revision()).print();
    let path = &args.file;
    std::fs::write(path, text)
        .map_err(|e| Stop::usage(format!("failed to write {}: {e}", path.display())))?;
    println!(
        "{} -> {} decisions in {runs} runs: {}",
        before.decisions.len(),
        outcome.decisions.len(),
        path.display()
    );
    Ok(Exit::Broken)
}

/// `tapsim explain`
pub(crate) fn explain_command(common: &Common, args: &FileArgs) -> Result<Exit, Stop> {
    let (_, spec) = load_run(&args.file)?;
    let outcome = guarded(common, &spec, |spec| run_recorded(spec, TraceLevel::Events));
    print!("{}", explain::story(&spec, &outcome));
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
