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
    /// Seeds tried of the scenario that found it.
    pub seeds: u64,
    /// CPU nanoseconds until it was found, over all scenarios.
    pub find_cpu_ns: u64,
    /// Decisions before shrinking.
    pub decisions_before: usize,
    /// Runs that shrinking took.
    pub shrink_runs: u64,
    /// CPU nanoseconds that shrinking took.
    pub shrink_cpu_ns: u64,
}

/// Tries `within` seeds, each in every scenario, until one fails that passes without the quarry; then shrinks that.
pub fn hunt(quarry: Quarry, within: u64, guarded: bool, shrink_runs: u64) -> Option<Hunted> {
    guard::run(guarded, 0, move || {
        let start = cpu_ns();
        let spec = (0..within).find_map(|seed| {
            catalog::ALL.iter().find_map(|scenario| {
                let mut spec = RunSpec::new(scenario, seed);
                match quarry {
                    Quarry::Bug(bug) => spec.options.bug = Some(bug),
                    Quarry::Canary => spec.options.canary = true,
                }
                // A seed that fails anyway proves nothing.
                let caught =
                    run(&spec).failure.is_some() && run(&RunSpec::new(scenario, seed)).failure.is_none();
                caught.then_some(spec)
            })
        })?;
        let found = cpu_ns();
        let recorded = run_recorded(&spec, TraceLevel::Hash);
        let (best, outcome, shrunk) = shrink_run(&spec, &recorded, shrink_runs);
        Some(Hunted {
            seeds: spec.seed + 1,
            find_cpu_ns: found.saturating_sub(start),
            decisions_before: recorded.decisions.len(),
            shrink_runs: shrunk.runs,
            shrink_cpu_ns: cpu_ns().saturating_sub(found),
            spec: best,
            outcome,
        })
    })
}
