//! `crash`: power cuts on a given image.

use super::args::{Common, CrashArgs};
use super::output::{
    Progress, SHRINKS, print_failure, print_saved, print_table, report_failure, save_run, verdict, write_json,
};
use super::paths::after;
use super::{Exit, Stop};
use crate::catalog::crash::REAL_IMAGE;
use crate::cpu::cpu_ns;
use crate::crash_states::explore_run;
use crate::explore::Explored;
use crate::formats::RealImage;
use crate::interrupt;
use crate::run::{Effort, run_recorded, shrink_run};
use crate::spec::RunSpec;
use crate::sweep::{SweepSpec, sweep};
use crate::world::RunOptions;
use sim::{TraceLevel, guard};
use std::sync::Arc;

/// Effort of shrinking a bad state.
const EFFORT: Effort = Effort { runs: 3000, ..SHRINKS };

/// `tapsim crash`
pub(crate) fn crash_command(common: &Common, args: &CrashArgs) -> Result<Exit, Stop> {
    let image = Arc::new(RealImage::load(&args.image).map_err(Stop::usage)?);
    let format = image.loaded().model.format();
    if format.name() != args.format {
        return Err(Stop::usage(format!("{} is an image of {format}", image.path())));
    }
    println!("{}", image.describe());
    let options = RunOptions { image: Some(Arc::clone(&image)), ..RunOptions::default() };
    let spec = SweepSpec {
        scenarios: vec![&REAL_IMAGE],
        seeds: args.seeds.clone().unwrap_or(0..500),
        options: options.clone(),
        jobs: common.threads(),
        guarded: common.guarded(),
        shares: None,
        first_only: false,
    };
    let mut progress = Progress::new(Some(spec.seeds.end - spec.seeds.start));
    let report = sweep(&spec, |done, failed| {
        progress.at(done, failed);
        !interrupt::asked()
    });
    progress.finish();
    print_table(&report);
    let mut stored = write_json(common, &report);
    if let Some((seed, _)) = report.scenarios[0].1.failures.first() {
        let run = RunSpec { options: options.clone(), ..RunSpec::new(&REAL_IMAGE, *seed) };
        stored = stored.and(report_failure(common, &run));
    }
    let (explored, bad) = explore_seeds(common, &options, spec.seeds.start, args.explore);
    if args.explore > 0 {
        println!(
            "explored {} seeds: {} crash states opened and read ({} more were duplicates) at {} host operations, {} read completely",
            args.explore, explored.states, explored.duplicates, explored.points, explored.whole
        );
    }
    let bad_states = u64::from(bad.is_some());
    if let Some(spec) = bad {
        stored = stored.and(report_state(common, &spec));
    }
    println!("{} passed, {} failed", report.passed(), report.failed() + bad_states);
    after(verdict(report.failed() + bad_states, Exit::Ok), stored)
}

/// Explores the crash states of `count` seeds.
fn explore_seeds(
    common: &Common,
    options: &RunOptions,
    first: u64,
    count: u64,
) -> (Explored, Option<RunSpec>) {
    let mut sum = Explored::default();
    for seed in (first..first.saturating_add(count)).take_while(|_| !interrupt::asked()) {
        let options = options.clone();
        let (explored, bad) = guard::run(common.guarded(), seed, move || {
            let (outcome, bad) = explore_run(&RunSpec { options, ..RunSpec::new(&REAL_IMAGE, seed) });
            (outcome.explored, bad)
        });
        sum.points += explored.points;
        sum.states += explored.states;
        sum.duplicates += explored.duplicates;
        sum.sectors += explored.sectors;
        sum.whole += explored.whole;
        if bad.is_some() {
            return (sum, bad);
        }
    }
    (sum, None)
}

/// Shrinks, saves and shows a bad state.
fn report_state(common: &Common, spec: &RunSpec) -> Result<(), Stop> {
    let mine = spec.clone();
    let (best, outcome) = guard::run(common.guarded(), spec.seed, move || {
        let recorded = run_recorded(&mine, TraceLevel::Hash);
        let (best, outcome, _) = shrink_run(&mine, &recorded, EFFORT);
        (best, outcome)
    });
    print_failure(common, &best, &outcome);
    let path = save_run(common, &best, &outcome)?;
    print_saved(&path, &best, &outcome)
}

/// Result of measuring the exploration.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub(crate) struct ExploreRate {
    /// Distinct states that were opened and read.
    pub states: u64,
    /// States that had been checked before.
    pub duplicates: u64,
    /// Sectors read through the driver.
    pub sectors: u64,
    /// CPU nanoseconds.
    pub cpu_ns: u64,
}

/// Explores seeds of `scenario` until `states` are reached.
pub(crate) fn explore_rate(
    scenario: &'static crate::scenario::Scenario,
    states: u64,
) -> Result<ExploreRate, String> {
    let mut rate = ExploreRate::default();
    let before = cpu_ns();
    let mut seed = 0;
    while rate.states < states {
        let (outcome, bad) = explore_run(&RunSpec::new(scenario, seed));
        if bad.is_some() {
            let text = outcome.failure.map_or(String::new(), |f| format!("{}: {}", f.invariant, f.detail));
            return Err(format!("{} seed {seed}: {text}", scenario.name));
        }
        rate.states += outcome.explored.states;
        rate.duplicates += outcome.explored.duplicates;
        rate.sectors += outcome.explored.sectors;
        seed += 1;
    }
    rate.cpu_ns = cpu_ns().saturating_sub(before);
    Ok(rate)
}
