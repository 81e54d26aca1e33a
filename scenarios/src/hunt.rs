//! Hunting seeded bugs: which scenario finds one, how fast, and how far it shrinks; and whether a saved run still does
//! what it was saved for.

use crate::catalog;
use crate::cpu::cpu_ns;
use crate::interrupt;
use crate::panics::apart;
use crate::probes::BUGS;
use crate::run::{Effort, run, run_apart, run_recorded, shrink_run};
use crate::scenario::Scenario;
use crate::spec::{Outcome, RunSpec};
use sim::{RunFile, TraceLevel};
use tap_host::Bug;

/// What is hunted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Quarry {
    /// A seeded bug.
    Bug(&'static Bug),
    /// The drive that lies about flushes.
    Canary,
}

impl Quarry {
    /// All seeded bugs, and the canary.
    pub fn all() -> impl Iterator<Item = Quarry> {
        BUGS.iter().copied().map(Quarry::Bug).chain([Quarry::Canary])
    }
    /// The quarry that a run has switched on.
    pub fn of(spec: &RunSpec) -> Option<Quarry> {
        spec.options.bug.map(Quarry::Bug).or(spec.options.canary.then_some(Quarry::Canary))
    }
    /// Its name.
    pub fn name(self) -> String {
        match self {
            Quarry::Bug(bug) => bug.name().into(),
            Quarry::Canary => "canary".into(),
        }
    }
}

/// A seeded bug that was found and shrunk.
#[derive(Clone, Debug)]
pub struct Hunted {
    /// The shrunk run.
    pub spec: RunSpec,
    /// The outcome of it.
    pub outcome: Outcome,
    /// Seeds tried until the first catch, in the nearby scenario or else in all.
    pub seeds: u64,
    /// CPU nanoseconds until the first catch, over all scenarios.
    pub find_cpu_ns: u64,
    /// Decisions before shrinking.
    pub decisions_before: usize,
    /// Number of runs that shrinking took.
    pub shrink_runs: u64,
    /// CPU nanoseconds that shrinking it took.
    pub shrink_cpu_ns: u64,
}

/// Maximum number of decisions that a shrunk run should have.
pub const DECISIONS_MAX: usize = 20;
/// Maximum number of catches that are shrunk to get below [`DECISIONS_MAX`].
const CATCHES: usize = 3;

/// Tries `within` seeds in the scenario `near`, which found it before, then as many in every scenario, until one fails
/// that passes without the quarry, and shrinks it. If the shrunk run is too large, the next catches are tried, too, and
/// the smallest is returned. Ctrl-C ends the search, and shrinking.
pub fn hunt(
    quarry: Quarry,
    near: Option<&'static Scenario>,
    within: u64,
    guarded: bool,
    effort: Effort,
) -> Option<Hunted> {
    let found = apart(guarded, 0, move || {
        let start = cpu_ns();
        let at = move |seed| near.into_iter().map(move |s| spec_of(quarry, s, seed));
        let everywhere = move |seed| catalog::ALL.iter().map(move |s| spec_of(quarry, s, seed));
        let specs = (0..within).flat_map(at).chain((0..within).flat_map(everywhere));
        let mut caught = specs.take_while(|_| !interrupt::asked()).filter(is_caught);
        let first = caught.next()?;
        let found = cpu_ns();
        let mut best = shrunk(&first, effort);
        for _ in 1..CATCHES {
            if best.outcome.decisions.len() <= DECISIONS_MAX {
                break;
            }
            let Some(next) = caught.next() else { break };
            let other = shrunk(&next, effort);
            if other.outcome.decisions.len() < best.outcome.decisions.len() {
                best = other;
            }
        }
        best.find_cpu_ns = found.saturating_sub(start);
        best.seeds = first.seed.saturating_add(1);
        Some(best)
    });
    // A bug that makes a run block its thread is found, too.
    found.unwrap_or_else(|(spec, outcome)| Some(unshrunk(spec, *outcome)))
}

fn unshrunk(spec: RunSpec, outcome: Outcome) -> Hunted {
    Hunted {
        seeds: spec.seed.saturating_add(1),
        spec,
        decisions_before: outcome.decisions.len(),
        outcome,
        find_cpu_ns: 0,
        shrink_runs: 0,
        shrink_cpu_ns: 0,
    }
}

fn spec_of(quarry: Quarry, scenario: &'static Scenario, seed: u64) -> RunSpec {
    let mut spec = RunSpec::new(scenario, seed);
    match quarry {
        Quarry::Bug(bug) => spec.options.bug = Some(bug),
        Quarry::Canary => spec.options.canary = true,
    }
    spec
}

/// A seed that fails without the quarry proves nothing.
fn is_caught(spec: &RunSpec) -> bool {
    run(spec).failure.is_some() && run(&RunSpec::new(spec.scenario, spec.seed)).failure.is_none()
}

fn shrunk(spec: &RunSpec, effort: Effort) -> Hunted {
    let start = cpu_ns();
    let recorded = run_recorded(spec, TraceLevel::Hash);
    let (best, outcome, shrunk) = shrink_run(spec, &recorded, effort);
    Hunted {
        spec: best,
        outcome,
        seeds: 0,
        find_cpu_ns: 0,
        decisions_before: recorded.decisions.len(),
        shrink_runs: shrunk.runs,
        shrink_cpu_ns: cpu_ns().saturating_sub(start),
    }
}

/// Why the result of a saved run differs from its file.
#[derive(Clone, Debug)]
pub enum Unexpected {
    /// `option expect` is neither `pass` nor `fail`.
    BadExpectation(String),
    /// It must fail and does not.
    NotBroken,
    /// It must not fail, or must break another invariant.
    Broken(Box<Outcome>),
    /// It has a seeded bug and also fails without it.
    BrokenWithout(Box<Outcome>),
    /// It has a seeded bug and more decisions than [`DECISIONS_MAX`].
    TooLarge(usize),
}

impl std::fmt::Display for Unexpected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let told = |outcome: &Outcome| {
            outcome.failure.as_ref().map_or(String::new(), |f| format!("{}: {}", f.invariant, f.detail))
        };
        match self {
            Self::BadExpectation(other) => write!(f, "expect={other} is neither pass nor fail"),
            Self::NotBroken => f.write_str("nothing is broken any more"),
            Self::Broken(outcome) => write!(f, "it breaks something else than saved: {}", told(outcome)),
            Self::BrokenWithout(outcome) => write!(f, "it fails without its bug, too: {}", told(outcome)),
            Self::TooLarge(n) => write!(f, "it has {n} decisions, at most {DECISIONS_MAX} are allowed"),
        }
    }
}

/// Replays a saved run. With a seeded bug, or with `option expect=fail`, it must break the invariant that the file
/// names; otherwise, or with `option expect=pass`, none. A run with a seeded bug must also pass without the bug.
///
/// # Errors
/// The unexpected result.
pub fn check_saved(file: &RunFile, spec: &RunSpec, guarded: bool) -> Result<(), Unexpected> {
    let recorded = |spec: &RunSpec| {
        run_apart(guarded, &RunSpec { record: true, trace: TraceLevel::Events, ..spec.clone() })
    };
    let planted = Quarry::of(spec).is_some();
    let must_fail = match file.option("expect") {
        None => planted,
        Some("fail") => true,
        Some("pass") => false,
        Some(other) => return Err(Unexpected::BadExpectation(other.into())),
    };
    let outcome = recorded(spec);
    match &outcome.failure {
        None if must_fail => return Err(Unexpected::NotBroken),
        Some(f) if !must_fail || f.invariant.to_string() != file.invariant => {
            return Err(Unexpected::Broken(Box::new(outcome)));
        }
        _ => {}
    }
    if planted {
        let mut without = spec.clone();
        (without.options.bug, without.options.canary) = (None, false);
        let outcome = recorded(&without);
        if outcome.failure.is_some() {
            return Err(Unexpected::BrokenWithout(Box::new(outcome)));
        }
        if file.decisions.len() > DECISIONS_MAX {
            return Err(Unexpected::TooLarge(file.decisions.len()));
        }
    }
    Ok(())
}
