//! `sweep`, and the default without a command.

use super::args::{Common, SweepArgs};
use super::output::{Progress, print_table, report_failure, write_json};
use super::replay::{bug, scenario};
use super::{Exit, Stop};
use crate::catalog;
use crate::run::run;
use crate::scenario::Scenario;
use crate::spec::RunSpec;
use crate::sweep::{SweepReport, SweepSpec, sweep};
use crate::world::RunOptions;
use sim::{TraceLevel, first_difference, guard};
use std::time::Duration;

/// Maximum number of failures of one sweep that are shrunk and shown.
const SHOWN: usize = 3;

/// Without a command: all scenarios, for 45 seconds.
pub(crate) fn minute(common: &Common) -> Result<Exit, Stop> {
    let args = SweepArgs {
        scenarios: Vec::new(),
        seeds: None,
        time: Some(Duration::from_secs(45)),
        runs: None,
        from: 0,
        bug: None,
        canary: false,
        first: false,
        check_determinism: false,
    };
    sweep_command(common, &args)
}

/// `tapsim sweep`
pub(crate) fn sweep_command(common: &Common, args: &SweepArgs) -> Result<Exit, Stop> {
    let scenarios: Vec<&'static Scenario> = if args.scenarios.is_empty() {
        catalog::ALL.to_vec()
    } else {
        args.scenarios.iter().map(|n| scenario(n)).collect::<Result<_, _>>()?
    };
    let options = RunOptions {
        bug: args.bug.as_deref().map(bug).transpose()?,
        canary: args.canary,
        ..RunOptions::default()
    };
    let shares = args.runs.map(|runs| catalog::shares(&scenarios, runs));
    let most = shares.iter().flatten().max().copied();
    let (seeds, time) = match (&args.seeds, args.time) {
        _ if most.is_some() => (args.from..args.from.saturating_add(most.unwrap_or(0)), None),
        (Some(seeds), _) => (seeds.clone(), None),
        (None, Some(time)) => (args.from..u64::MAX, Some(time)),
        (None, None) => (args.from..args.from + 200, None),
    };
    // A range without an end is cut into pieces that are planned one by one.
    let whole = scenarios.len() == catalog::ALL.len() && options.bug.is_none() && !options.canary;
    let mut spec = SweepSpec {
        scenarios,
        seeds: seeds.clone(),
        shares,
        options,
        jobs: common.threads(),
        guarded: common.guarded(),
        first_only: args.first,
    };
    println!(
        "sweeping {} scenarios, {}, {} threads, {}",
        spec.scenarios.len(),
        time.map_or_else(
            || format!("seeds {}..{}", seeds.start, seeds.end),
            |t| format!("{} s from seed {}", t.as_secs(), seeds.start)
        ),
        spec.jobs,
        if spec.guarded { "guarded" } else { "not guarded" }
    );
    let report = match time {
        None => {
            let each = (seeds.end - seeds.start) * spec.scenarios.len() as u64;
            let mut progress = Progress::new(Some(spec.shares.as_ref().map_or(each, |all| all.iter().sum())));
            let report = sweep(&spec, |done, failed| {
                progress.at(done, failed);
                failed == 0 || !args.first
            });
            progress.finish();
            report
        }
        Some(time) => {
            let mut progress = Progress::new(None);
            // Far more seeds than there is time for; the plan consists of chunks and stays small.
            spec.seeds = seeds.start..seeds.start.saturating_add(time.as_secs().saturating_mul(40_000));
            let report = sweep(&spec, |done, failed| {
                progress.at(done, failed);
                progress.elapsed() < time && (failed == 0 || !args.first)
            });
            progress.finish();
            report
        }
    };
    write_json(common, &report)?;
    if args.first && report.failed() > 0 {
        print_first(&report);
        return Ok(Exit::Broken);
    }
    finish(common, &spec, &report, args.check_determinism, whole)
}

/// The failure with the smallest seed.
fn print_first(report: &SweepReport) {
    let failures =
        report.scenarios.iter().flat_map(|(s, r)| r.failures.iter().map(move |f| (f.0, s.name, &f.1)));
    if let Some((seed, name, failure)) = failures.min_by_key(|(seed, ..)| *seed) {
        println!("{name} seed {seed}: broken {}: {}", failure.invariant, failure.detail.trim_end());
    }
    println!("{} passed, {} failed", report.passed(), report.failed());
}

fn finish(
    common: &Common,
    spec: &SweepSpec,
    report: &SweepReport,
    check_determinism: bool,
    whole: bool,
) -> Result<Exit, Stop> {
    print_table(report);
    let failures =
        report.scenarios.iter().flat_map(|(s, r)| r.failures.iter().take(1).map(move |f| (*s, f.0)));
    for (scenario, seed) in failures.take(SHOWN) {
        let run = RunSpec { options: spec.options.clone(), ..RunSpec::new(scenario, seed) };
        report_failure(common, &run)?;
    }
    let ran = report.passed() + report.failed();
    let mut exit = if report.failed() > 0 { Exit::Broken } else { Exit::Ok };
    if ran == 0 {
        exit = Exit::NothingRan;
    }
    if check_determinism && exit == Exit::Ok {
        exit = determinism(spec, report);
    }
    let missed = report.missed();
    if whole && !missed.is_empty() && ran >= 200 * spec.scenarios.len() as u64 {
        let names: Vec<&str> = missed.iter().map(|m| m.name()).collect();
        println!("marks that no run reached: {}", names.join(", "));
        if exit == Exit::Ok {
            exit = Exit::Broken;
        }
    }
    println!("{} passed, {} failed", report.passed(), report.failed());
    Ok(exit)
}

/// Runs the same seeds the other way (guarded if they were not, and the reverse) and compares the traces.
fn determinism(spec: &SweepSpec, report: &SweepReport) -> Exit {
    let other = SweepSpec { guarded: !spec.guarded && guard::AVAILABLE, ..spec.clone() };
    let again = sweep(&other, |_, _| true);
    for ((scenario, a), (_, b)) in report.scenarios.iter().zip(&again.scenarios) {
        if a.hash != b.hash {
            println!("{}: two sweeps of the same seeds differ", scenario.name);
            show_difference(spec, scenario);
            return Exit::Nondeterminism;
        }
    }
    println!(
        "every seed ran twice, {} and {}, with equal traces",
        on_off(spec.guarded),
        on_off(other.guarded)
    );
    Exit::Ok
}

fn on_off(guarded: bool) -> &'static str {
    if guarded { "guarded" } else { "not guarded" }
}

/// Finds the first seed whose two runs differ, and the first line that differs.
fn show_difference(spec: &SweepSpec, scenario: &'static Scenario) {
    for seed in spec.seeds.clone() {
        let one = |guarded: bool| {
            let options = spec.options.clone();
            guard::run(guarded, seed, move || {
                run(&RunSpec { options, trace: TraceLevel::Full, ..RunSpec::new(scenario, seed) }).trace
            })
        };
        let (a, b) = (one(true), one(false));
        if let Some((line, x, y)) = first_difference(&a, &b) {
            println!("  seed {seed}, line {}:\n    {x}\n    {y}", line + 1);
            return;
        }
    }
    println!("  single runs agree: the difference comes from state that an earlier run left");
}
