//! One run: a scenario, decisions, a verdict.

use crate::check::oracle::{Oracle, break_for_run, is_broken};
use crate::check::{Failure, Invariant};
use crate::cpu::cpu_ns;
use crate::explore::Explored;
use crate::probes::MARKS;
use crate::report::recorder::{images_of, record_rings};
use crate::spec::{Outcome, RunSpec};
use crate::world::World;
use crate::{catalog, front, interrupt, panics, stall, workload, world};
use sim::{Config, DecisionMap, Limits, Scheduling, Sim, Source, TraceLevel, Witness, register_labels};
use std::sync::Once;

/// Turns and virtual time after which a run counts as stuck, far above what any scenario needs.
const LIMITS: Limits = Limits { turns: 20_000_000, time_ns: 4_000_000_000_000 };

/// Maximum number of steps and loads of shared memory in one turn of one task: several times what a full ring of the
/// largest requests takes.
const TURN_WORK_MAX: u64 = 1500;

static LABELS: Once = Once::new();

/// Registers all labels for the reader of decision files.
pub fn prepare() {
    LABELS.call_once(|| {
        register_labels(&[
            &sim::WAKE,
            &workload::OP,
            &workload::OP_FORM,
            &workload::OP_FLUSHES,
            &front::SEGMENTS,
            &world::SETTING,
        ]);
        register_labels(kernel_model::faults::LABELS);
        register_labels(&xen_model::LABELS);
        register_labels(catalog::LABELS);
        panics::catch_places();
    });
}

fn scheduling(seed: u64) -> Scheduling {
    let mut draw = sim::Draw::new(sim::mix2(seed, 0x7363_6865_6475_6c65));
    match draw.below(3) {
        0 => Scheduling::Fifo,
        _ => Scheduling::Random { one_in: 2 << draw.below(6), bits: 4 + draw.below(14) as u32 },
    }
}

/// Runs `spec` to its end on this thread.
pub fn run(spec: &RunSpec) -> Outcome {
    prepare();
    break_for_run(spec.options.oracle);
    let scheduling = match spec.source {
        Source::Seed => scheduling(spec.seed),
        // Delays of turns are decisions of the map.
        _ => Scheduling::Random { one_in: u32::MAX, bits: 0 },
    };
    let sim = Sim::new(&Config {
        source: spec.source.clone(),
        record: spec.record,
        trace: spec.trace,
        scheduling,
        limits: LIMITS,
        ..Config::new(spec.seed)
    });
    let storage = (spec.scenario.storage)(&sim);
    let world = World::new(&sim, storage, spec.options.clone());
    record_rings(&world);
    let body = (spec.scenario.body)(world.clone());
    let verdict = world.verdict.clone();
    panics::begin(spec, &sim);
    let result = panics::inside(|| sim.run(async move { verdict.guard(body).await }));
    match result {
        Ok(Ok(())) => {}
        Ok(Err(_)) if is_broken(Oracle::StallIgnored) => {}
        Ok(Err(stall)) => world.fail(Invariant::L1, stall::describe(&stall)),
        Err(place) => world.fail(Invariant::A1, place),
    }
    let longest = sim.longest_turn();
    if longest.done > TURN_WORK_MAX {
        let sim::Work { done, role, .. } = longest;
        let text = format!("a turn of task {role} is too long: {done} steps and loads");
        world.fail(Invariant::T1, text);
    }
    let images = panics::inside(|| images_of(&world)).unwrap_or_default();
    let (trace, decisions) = sim.finish();
    let mut outcome = Outcome {
        failure: world.verdict.failure(),
        trace,
        decisions,
        marks: MARKS.iter().map(|mark| world.kernel.marked(mark)).collect(),
        stats: world.stats(),
        virtual_ns: sim.now_ns(),
        explored: world.explorer().map_or(Explored::default(), |e| e.explored()),
        bad_state: world.explorer().and_then(|e| e.bad()),
        images,
    };
    // After a panic the world is in no state that its destructors expect.
    panics::dropping_engine();
    let witness = sim.witness();
    let dropped = panics::inside(move || {
        world.kernel.halt();
        drop((world, sim));
    });
    if outcome.failure.is_none()
        && let Some((invariant, detail)) = left_over(dropped, &witness)
    {
        outcome.failure = Some(Failure { detail, at_ns: outcome.virtual_ns, ..Failure::of(invariant) });
    }
    outcome
}

/// What is wrong with a world that has been dropped.
fn left_over(dropped: Result<(), String>, witness: &Witness) -> Option<(Invariant, String)> {
    match dropped {
        Err(place) => Some((Invariant::A1, format!("while the world was dropped: {place}"))),
        Ok(()) if !witness.is_gone() && !is_broken(Oracle::Deaf(Invariant::M7)) => {
            Some((Invariant::M7, "the engine of the run was not freed with its world".into()))
        }
        Ok(()) => None,
    }
}

/// Runs `spec` once on a thread that can be given up, guarded if asked for; whatever happens to it, it has an outcome.
pub(crate) fn run_apart(guarded: bool, spec: &RunSpec) -> Outcome {
    let mine = spec.clone();
    panics::apart(guarded, spec.seed, move || run(&mine)).unwrap_or_else(|(_, outcome)| *outcome)
}

/// How much work shrinking may be; then it ends with the best so far, as it does after Ctrl-C.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Runs.
    pub runs: u64,
    /// CPU time in nanoseconds.
    pub cpu_ns: u64,
}

impl Effort {
    /// As many runs, however long they take.
    pub const fn of_runs(runs: u64) -> Self {
        Self { runs, cpu_ns: u64::MAX }
    }
}

/// Shrinks a failing run while its failure keeps its [kind](Failure::kind). Returns the remaining decisions and the
/// number of runs taken.
pub fn shrink_run(spec: &RunSpec, outcome: &Outcome, effort: Effort) -> (RunSpec, Outcome, sim::Shrunk) {
    // The guard hides the real clock, but not the kernel's account of this thread.
    let end_ns = cpu_ns().saturating_add(effort.cpu_ns);
    let stop = || interrupt::asked() || (effort.cpu_ns < u64::MAX && cpu_ns() >= end_ns);
    let limits = sim::ShrinkLimits { runs: effort.runs, stop: &stop };
    let class = outcome.failure.as_ref().map(Failure::kind);
    let candidate = |map: &DecisionMap| RunSpec {
        source: Source::Replay(map.clone()),
        record: true,
        trace: TraceLevel::Hash,
        ..spec.clone()
    };
    let shrunk = sim::shrink(&outcome.decisions, limits, |map| {
        let outcome = run(&candidate(map));
        (outcome.failure.map(|f| f.kind()) == class).then_some(outcome.decisions)
    });
    let best = RunSpec { trace: TraceLevel::Events, ..candidate(&shrunk.decisions) };
    let outcome = run(&best);
    (best, outcome, shrunk)
}

/// Runs `spec` again with everything recorded.
pub fn run_recorded(spec: &RunSpec, trace: TraceLevel) -> Outcome {
    run(&RunSpec { record: true, trace, ..spec.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Scenario;
    use kernel_model::StorageConfig;

    static PANICS: Scenario = Scenario {
        name: "panics",
        about: "a task that panics",
        storage: &|_| StorageConfig::default(),
        body: &|w| {
            Box::pin(async move {
                w.sim.spawn("task", 0, async { assert_eq!(1, 2, "a broken promise") });
                w.sim.sleep_ns(1).await;
            })
        },
    };

    #[test]
    fn a_panic_of_a_task_is_a_finding_with_its_place() {
        let failure = run(&RunSpec::new(&PANICS, 0)).failure.unwrap();
        assert_eq!(failure.invariant, Invariant::A1);
        assert!(
            failure.detail.contains("a broken promise") && failure.detail.contains("run.rs:"),
            "{}",
            failure.detail
        );
        assert!(run(&RunSpec::new(catalog::ALL[0], 0)).failure.is_none(), "the next run is not affected");
    }

    struct Falls;
    impl Drop for Falls {
        fn drop(&mut self) {
            panic!("a broken destructor");
        }
    }

    static FALLS_AT_THE_END: Scenario = Scenario {
        name: "falls-at-the-end",
        about: "a task panics, and so does a value that another holds when the world is dropped",
        storage: &|_| StorageConfig::default(),
        body: &|w| {
            Box::pin(async move {
                let falls = Falls;
                w.sim.spawn("holder", 0, async move {
                    let _falls = falls;
                    std::future::pending().await
                });
                w.sim.sleep_ns(1).await;
                w.sim.spawn("task", 0, async { panic!("a broken promise") });
                w.sim.sleep_ns(1).await;
            })
        },
    };

    #[test]
    fn a_panic_while_a_world_is_dropped_does_not_hide_the_first() {
        let failure = run(&RunSpec::new(&FALLS_AT_THE_END, 0)).failure.unwrap();
        assert!(failure.detail.starts_with("a broken promise"), "{}", failure.detail);
        assert!(run(&RunSpec::new(catalog::ALL[0], 0)).failure.is_none(), "the next run is not affected");
    }
}
