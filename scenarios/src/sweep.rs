//! Sweeps: many seeds of many scenarios on all cores.

use crate::check::Failure;
use crate::cpu::cpu_ns;
use crate::interrupt;
use crate::panics::apart;
use crate::probes::MARKS;
use crate::run::run;
use crate::scenario::Scenario;
use crate::spec::{Outcome, RunSpec};
use crate::world::{RunOptions, Stats};
use sim::mix2;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use tap_host::Mark;

/// Seeds that one thread takes at a time: entering the guard costs as much as a small run.
const CHUNK: u64 = 16;

/// What to sweep.
#[derive(Clone, Debug)]
pub struct SweepSpec {
    /// Scenarios.
    pub scenarios: Vec<&'static Scenario>,
    /// Seeds of each scenario.
    pub seeds: Range<u64>,
    /// How many of the seeds each scenario gets; all if `None`.
    pub shares: Option<Vec<u64>>,
    /// Settings of every run.
    pub options: RunOptions,
    /// Threads.
    pub jobs: usize,
    /// Whether worlds run inside the guard.
    pub guarded: bool,
    /// End a scenario at its first failure.
    pub first_only: bool,
}

/// Results of one scenario.
#[derive(Clone, Debug, Default)]
pub struct ScenarioReport {
    /// Runs without a failure.
    pub passed: u64,
    /// Runs that failed.
    pub failed: u64,
    /// Sum of the counters.
    pub stats: Stats,
    /// CPU nanoseconds of the runs.
    pub cpu_ns: u64,
    /// Virtual nanoseconds of the runs.
    pub virtual_ns: u64,
    /// The first failures, by seed.
    pub failures: Vec<(u64, Failure)>,
    /// A sum over all trace hashes, independent of the order in which runs end.
    pub hash: u64,
}

/// Results of a sweep.
#[derive(Clone, Debug)]
pub struct SweepReport {
    /// By scenario, in the order asked for.
    pub scenarios: Vec<(&'static Scenario, ScenarioReport)>,
    /// How often each mark was reached.
    pub marks: Vec<u64>,
}

impl SweepReport {
    /// Number of runs that passed.
    pub fn passed(&self) -> u64 {
        self.scenarios.iter().map(|s| s.1.passed).sum()
    }
    /// Number of runs that failed.
    pub fn failed(&self) -> u64 {
        self.scenarios.iter().map(|s| s.1.failed).sum()
    }
    /// Scenarios that did not run.
    pub fn not_run(&self) -> Vec<&'static str> {
        let none = |(_, r): &&(_, ScenarioReport)| r.passed + r.failed == 0;
        self.scenarios.iter().filter(none).map(|(s, _)| s.name).collect()
    }
    /// The first failure of each scenario, the lowest seed first.
    pub fn first_failures(&self) -> Vec<(&'static Scenario, u64, &Failure)> {
        let all = self.scenarios.iter();
        let mut all: Vec<_> =
            all.filter_map(|(s, r)| r.failures.first().map(|(seed, failure)| (*s, *seed, failure))).collect();
        all.sort_by_key(|(_, seed, _)| *seed);
        all
    }
    /// Marks that no run reached.
    pub fn missed(&self) -> Vec<&'static Mark> {
        MARKS.iter().zip(&self.marks).filter(|(_, n)| **n == 0).map(|(m, _)| *m).collect()
    }
}

/// Failures of one scenario that are kept; further ones are only counted.
const FAILURES_KEPT: usize = 8;

struct ChunkResult {
    scenario: usize,
    report: ScenarioReport,
    marks: Vec<u64>,
}

/// Runs the sweep. `progress` is called after every chunk with the runs done and failed; `false` stops the sweep.
pub fn sweep(spec: &SweepSpec, mut progress: impl FnMut(u64, u64) -> bool) -> SweepReport {
    let chunks = plan(spec);
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let broken: Vec<AtomicBool> = spec.scenarios.iter().map(|_| AtomicBool::new(false)).collect();
    let results = Mutex::new(Vec::new());
    let (tell, told) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..spec.jobs.max(1) {
            let tell = tell.clone();
            let (chunks, next, stop, broken, results) = (&chunks, &next, &stop, &broken, &results);
            scope.spawn(move || {
                while let Some((scenario, seeds)) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    if spec.first_only && broken[*scenario].load(Ordering::Relaxed) {
                        continue;
                    }
                    let result = run_chunk(spec, *scenario, seeds.clone());
                    if result.report.failed > 0 {
                        broken[*scenario].store(true, Ordering::Relaxed);
                    }
                    let counts = (result.report.passed + result.report.failed, result.report.failed);
                    results.lock().expect("no panic while results are held").push(result);
                    if tell.send(counts).is_err() {
                        break;
                    }
                }
            });
        }
        drop(tell);
        let (mut done, mut failed) = (0, 0);
        for (n, f) in told {
            done += n;
            failed += f;
            if !progress(done, failed) {
                stop.store(true, Ordering::Relaxed);
            }
        }
    });
    collect(spec, results.into_inner().expect("no panic while results are held"))
}

/// Chunks in the order of seeds, scenarios taking turns. The first ones have one seed, so that a sweep that is stopped
/// soon has seen all scenarios.
fn plan(spec: &SweepSpec) -> Vec<(usize, Range<u64>)> {
    let mut chunks = Vec::new();
    let first = spec.seeds.start;
    let mut start = first;
    while start < spec.seeds.end {
        let size = if start == first { 1 } else { CHUNK };
        let end = start.saturating_add(size).min(spec.seeds.end);
        let seeds = |s: usize| {
            let share = spec.shares.as_ref().and_then(|all| all.get(s)).copied();
            start..share.map_or(end, |n| end.min(first.saturating_add(n)))
        };
        chunks
            .extend((0..spec.scenarios.len()).map(|s| (s, seeds(s))).filter(|(_, seeds)| !seeds.is_empty()));
        start = end;
    }
    chunks
}

fn run_chunk(spec: &SweepSpec, scenario: usize, seeds: Range<u64>) -> ChunkResult {
    let (of, options, first_only) = (spec.scenarios[scenario], spec.options.clone(), spec.first_only);
    let empty = (ScenarioReport::default(), vec![0; MARKS.len()]);
    // Shared, because a thread that a run blocks for good leaves its counts here.
    let counted = Arc::new(Mutex::new(empty));
    let mut rest = seeds;
    while !rest.is_empty() {
        let (out, options, seeds) = (Arc::clone(&counted), options.clone(), rest.clone());
        let ended = apart(spec.guarded, rest.start, move || {
            let mut before = cpu_ns();
            for seed in seeds {
                if interrupt::asked() {
                    break;
                }
                let outcome = run(&RunSpec { options: options.clone(), ..RunSpec::new(of, seed) });
                let now = cpu_ns();
                let taken = now.saturating_sub(std::mem::replace(&mut before, now));
                let failed = outcome.failure.is_some();
                count(&mut out.lock().expect("no panic while results are held"), seed, outcome, taken);
                if failed && first_only {
                    break;
                }
            }
        });
        rest.start = match ended {
            Ok(()) => rest.end,
            Err((lost, outcome)) => {
                count(&mut counted.lock().expect("no panic while results are held"), lost.seed, *outcome, 0);
                if first_only { rest.end } else { lost.seed + 1 }
            }
        };
    }
    let mut counted = counted.lock().expect("no panic while results are held");
    let (report, marks) = std::mem::take(&mut *counted);
    ChunkResult { scenario, report, marks }
}

fn count((report, marks): &mut (ScenarioReport, Vec<u64>), seed: u64, outcome: Outcome, cpu_ns: u64) {
    marks.iter_mut().zip(&outcome.marks).for_each(|(sum, n)| *sum += n);
    add(&mut report.stats, &outcome.stats);
    report.cpu_ns += cpu_ns;
    report.virtual_ns += outcome.virtual_ns;
    report.hash = report.hash.wrapping_add(mix2(outcome.trace.hash, seed));
    match outcome.failure {
        None => report.passed += 1,
        Some(failure) => {
            report.failed += 1;
            if report.failures.len() < FAILURES_KEPT {
                report.failures.push((seed, failure));
            }
        }
    }
}

fn add(sum: &mut Stats, one: &Stats) {
    sum.requests += one.requests;
    sum.errors += one.errors;
    sum.crashes += one.crashes;
    sum.host_ios += one.host_ios;
}

fn collect(spec: &SweepSpec, mut results: Vec<ChunkResult>) -> SweepReport {
    let mut marks = vec![0; MARKS.len()];
    let mut scenarios: Vec<_> = spec.scenarios.iter().map(|s| (*s, ScenarioReport::default())).collect();
    results.sort_by_key(|r| r.scenario);
    for result in results {
        let sum = &mut scenarios[result.scenario].1;
        let one = result.report;
        sum.passed += one.passed;
        sum.failed += one.failed;
        add(&mut sum.stats, &one.stats);
        sum.cpu_ns += one.cpu_ns;
        sum.virtual_ns += one.virtual_ns;
        sum.hash = sum.hash.wrapping_add(one.hash);
        sum.failures.extend(one.failures);
        marks.iter_mut().zip(&result.marks).for_each(|(sum, n)| *sum += n);
    }
    for (_, report) in &mut scenarios {
        report.failures.sort_by_key(|f| f.0);
        report.failures.truncate(FAILURES_KEPT);
    }
    SweepReport { scenarios, marks }
}
