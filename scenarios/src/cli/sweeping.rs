//! `sweep`, and the default without a command.

use super::args::{Common, SweepArgs};
use super::junit::{self, Case};
use super::output::{Progress, print_table, report_failure, verdict, write_json};
use super::paths::after;
use super::replay::{bug, scenario};
use super::{Exit, Stop};
use crate::check::Failure;
use crate::run::run;
use crate::scenario::Scenario;
use crate::spec::RunSpec;
use crate::sweep::{ScenarioReport, SweepReport, SweepSpec, sweep};
use crate::world::RunOptions;
use crate::{catalog, interrupt};
use sim::{TraceLevel, first_difference, guard};
use std::ops::Range;
use std::time::Duration;

/// Maximum number of failures of one sweep that are shrunk; the others are listed.
const SHOWN: usize = 3;
/// Seeds of a sweep that is not told how many.
const SEEDS: u64 = 200;

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
        stop: false,
        no_shrink: false,
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
    let spec = SweepSpec {
        seeds: seeds(args, shares.as_deref())?,
        scenarios,
        shares,
        options,
        jobs: common.threads(),
        guarded: common.guarded(),
        first_only: args.stop,
    };
    println!(
        "sweeping {} scenarios, {}, {} threads, {}",
        spec.scenarios.len(),
        args.time.map_or_else(
            || format!("seeds {}..{}", spec.seeds.start, spec.seeds.end),
            |t| format!("{} s from seed {}", t.as_secs(), spec.seeds.start)
        ),
        spec.jobs,
        on_off(spec.guarded)
    );
    let each = (spec.seeds.end - spec.seeds.start).saturating_mul(spec.scenarios.len() as u64);
    let total = spec.shares.as_ref().map_or(each, |all| all.iter().sum());
    let mut progress = Progress::new(args.time.is_none().then_some(total));
    let once = spec.scenarios.len() as u64;
    let report = sweep(&spec, |done, failed| {
        progress.at(done, failed);
        // However short the time is, every scenario runs once.
        let in_time = args.time.is_none_or(|time| done < once || progress.elapsed() < time);
        in_time && (failed == 0 || !args.stop) && !interrupt::asked()
    });
    progress.finish();
    finish(common, args, &spec, &report)
}

/// The seeds of a sweep: of a sweep that takes a time, far more than there is time for.
fn seeds(args: &SweepArgs, shares: Option<&[u64]>) -> Result<Range<u64>, Stop> {
    if let Some(seeds) = &args.seeds {
        return Ok(seeds.clone());
    }
    let longest = shares.and_then(|shares| shares.iter().max().copied());
    let timed = args.time.map(|time| time.as_secs().saturating_mul(40_000));
    let seeds = args.from..args.from.saturating_add(longest.or(timed).unwrap_or(SEEDS));
    if seeds.is_empty() {
        return Err(Stop::usage(format!(
            "--from {}: the last seed of a sweep is {}",
            args.from,
            u64::MAX - 1
        )));
    }
    Ok(seeds)
}

fn finish(common: &Common, args: &SweepArgs, spec: &SweepSpec, report: &SweepReport) -> Result<Exit, Stop> {
    print_table(report);
    // Whatever cannot be written, the rest is printed.
    let stored =
        write_json(common, report).and(junit::save(common.junit.as_deref(), "sweep", &cases(report)));
    let stored = stored.and(show_failures(common, args, spec, report));
    let ran = report.passed() + report.failed();
    let mut exit = verdict(report.failed(), if ran == 0 { Exit::NothingRan } else { Exit::Ok });
    let not_run = report.not_run();
    if !not_run.is_empty() && ran > 0 && (interrupt::asked() || report.failed() == 0) {
        println!("{} scenarios did not run: {}", not_run.len(), not_run.join(", "));
    }
    if args.check_determinism && exit == Exit::Ok {
        exit = determinism(spec, report);
    }
    let missed = report.missed();
    let whole = args.scenarios.is_empty() && args.bug.is_none() && !args.canary;
    if whole && !missed.is_empty() && ran >= 200 * spec.scenarios.len() as u64 {
        let names: Vec<&str> = missed.iter().map(|m| m.name()).collect();
        println!("marks that no run reached: {}", names.join(", "));
        if exit == Exit::Ok {
            exit = Exit::Broken;
        }
    }
    println!("{} passed, {} failed", report.passed(), report.failed());
    after(exit, stored)
}

/// Shows the failures of a sweep, the lowest seeds first.
fn show_failures(
    common: &Common,
    args: &SweepArgs,
    spec: &SweepSpec,
    report: &SweepReport,
) -> Result<(), Stop> {
    let shown = if args.stop { 1 } else { SHOWN };
    let mut stored = Ok(());
    for (i, (scenario, seed, failure)) in report.first_failures().into_iter().enumerate() {
        let run = RunSpec { options: spec.options.clone(), ..RunSpec::new(scenario, seed) };
        if args.no_shrink || i >= shown || interrupt::asked() {
            println!("{}: broken {}: {}", run.heading(), failure.invariant, failure.headline());
            println!("  run:     {}", run.command());
        } else {
            stored = stored.and(report_failure(common, &run));
        }
    }
    stored
}

/// A row for each scenario.
fn cases(report: &SweepReport) -> Vec<Case> {
    let case = |(scenario, r): &(&'static Scenario, ScenarioReport)| {
        let first = r.failures.first().map(|(_, failure)| {
            let detail = |(seed, f): &(u64, Failure)| format!("seed {seed}: {}: {}\n", f.invariant, f.detail);
            let headline =
                format!("broken {}, {} of {} runs", failure.invariant, r.failed, r.passed + r.failed);
            (headline, r.failures.iter().map(detail).collect())
        });
        Case { name: scenario.name.into(), cpu_ns: r.cpu_ns, failure: first }
    };
    report.scenarios.iter().map(case).collect()
}

/// Runs the same seeds the other way (guarded if they were not, and the reverse) and compares the traces.
fn determinism(spec: &SweepSpec, report: &SweepReport) -> Exit {
    let other = SweepSpec { guarded: !spec.guarded && guard::AVAILABLE, ..spec.clone() };
    let again = sweep(&other, |_, _| !interrupt::asked());
    if interrupt::asked() {
        println!("the seeds were not all run a second time");
        return Exit::Interrupted;
    }
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
