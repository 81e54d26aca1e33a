//! Hunting seeded bugs: which scenario finds one, how fast, and how small it becomes.

use crate::catalog;
use crate::run::{Outcome, RunSpec, run, run_recorded, shrink_run};
use crate::sweep::cpu_ns;
use sim::{TraceLevel, guard};
use tap_host::Bug;

/// What is hunted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Quarry {
    /// A seeded bug.
    Bug(Bug),
    /// The drive whose flush lies.
    Canary,
}

impl Quarry {
    /// Its name.
    pub fn name(self) -> String {
        match self {
            Quarry::Bug(bug) => bug.name(),
            Quarry::Canary => "canary".into(),
        }
    }
}

/// A seeded bug that was found and shrunk.
#[derive(Clone, Debug)]
pub struct Hunted {
    /// The shrunk run.
    pub spec: RunSpec,
    /// What comes of it.
    pub outcome: Outcome,
    /// Seeds tried of each scenario until this run.
    pub seeds: u64,
    /// CPU nanoseconds until the first failing run, over all scenarios.
    pub find_cpu_ns: u64,
    /// Decisions before shrinking.
    pub decisions_before: usize,
    /// Runs that shrinking took.
    pub shrink_runs: u64,
    /// CPU nanoseconds that shrinking took.
    pub shrink_cpu_ns: u64,
}

/// Decisions that a shrunk run of a seeded bug may have: more tell no story.
pub const DECISIONS_MAX: usize = 20;
/// Failing runs that are shrunk until one becomes small enough: where shrinking ends depends on where it begins.
const STARTS: usize = 4;

/// Tries `within` seeds, each in every scenario, until one fails; then shrinks that. If it stays large, it goes on from
/// the next one that fails, a few times, and gives the smallest.
pub fn hunt(quarry: Quarry, within: u64, guarded: bool, shrink_runs: u64) -> Option<Hunted> {
    guard::run(guarded, 0, move || {
        let start = cpu_ns();
        let spec_of = |seed, scenario| {
            let mut spec = RunSpec::new(scenario, seed);
            match quarry {
                Quarry::Bug(bug) => spec.options.bug = Some(bug),
                Quarry::Canary => spec.options.canary = true,
            }
            spec
        };
        let mut failing = (0..within)
            .flat_map(|seed| catalog::ALL.iter().map(move |scenario| spec_of(seed, scenario)))
            .filter(|spec| run(spec).failure.is_some());
        let first = failing.next()?;
        let find_cpu_ns = cpu_ns().saturating_sub(start);
        let mut best = shrunk(&first, shrink_runs, find_cpu_ns);
        for _ in 1..STARTS {
            if best.outcome.decisions.len() <= DECISIONS_MAX {
                break;
            }
            let Some(other) = failing.next() else { break };
            let other = shrunk(&other, shrink_runs, find_cpu_ns);
            let (runs, cpu) =
                (best.shrink_runs + other.shrink_runs, best.shrink_cpu_ns + other.shrink_cpu_ns);
            if other.outcome.decisions.len() < best.outcome.decisions.len() {
                best = other;
            }
            (best.shrink_runs, best.shrink_cpu_ns) = (runs, cpu);
        }
        Some(best)
    })
}

fn shrunk(spec: &RunSpec, shrink_runs: u64, find_cpu_ns: u64) -> Hunted {
    let before = cpu_ns();
    let recorded = run_recorded(spec, TraceLevel::Hash);
    let (best, outcome, shrunk) = shrink_run(spec, &recorded, shrink_runs);
    Hunted {
        seeds: spec.seed + 1,
        find_cpu_ns,
        decisions_before: recorded.decisions.len(),
        shrink_runs: shrunk.runs,
        shrink_cpu_ns: cpu_ns().saturating_sub(before),
        spec: best,
        outcome,
    }
}
