//! A run in which every crash state is checked. A state that breaks an invariant becomes an ordinary run.

use crate::power::{CRASH_AT, power};
use crate::run::run;
use crate::spec::{Outcome, RunSpec};
use sim::{Decision, Key, Source};

/// Runs `spec` and explores every crash state. A bad state is returned as a run of its own that ends in it.
pub fn explore_run(spec: &RunSpec) -> (Outcome, Option<RunSpec>) {
    let mut options = spec.options.clone();
    options.explore = true;
    let outcome = run(&RunSpec { options, record: true, ..spec.clone() });
    let replay = outcome.bad_state.as_ref().map(|bad| {
        let mut decisions = outcome.decisions.clone();
        let at_ns = outcome.virtual_ns;
        let mut add = |entity, label, value| {
            let decision = Decision { value, at_ns, entity_name: String::new() };
            decisions.insert(Key { entity, label, attempt: 0 }, decision);
        };
        add(power(0), &CRASH_AT, bad.after_op);
        bad.cut.iter().for_each(|(entity, label, value)| add(*entity, label, *value));
        RunSpec { source: Source::Replay(decisions), record: true, ..spec.clone() }
    });
    (outcome, replay)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::crash::{OVERLAY_POWER_CUT, POWER_CUT};
    use crate::catalog::of_format;
    use crate::check::Invariant;
    use crate::formats::Kind;
    use crate::probes::find_bug;
    use crate::scenario::OfFormat;
    use tap_host::Bug;

    fn first_bad(scenario: &OfFormat, bug: Option<&'static Bug>) -> Option<(u64, Invariant, RunSpec)> {
        let scenario = of_format::of(scenario, Kind::mapped(false).model).unwrap();
        (0..12).find_map(|seed| {
            let (outcome, replay) = explore_run(&RunSpec::new(scenario, seed).with_bug(bug));
            Some((seed, outcome.bad_state?.invariant, replay?))
        })
    }

    #[test]
    fn good_drivers_have_no_bad_states() {
        for scenario in [&POWER_CUT, &OVERLAY_POWER_CUT] {
            assert!(first_bad(scenario, None).is_none());
        }
    }

    #[test]
    fn a_bad_state_becomes_a_run_that_fails_alike() {
        for (bug, scenario) in [
            ("l1-before-l2", &POWER_CUT),
            ("flush-early", &POWER_CUT),
            ("data-after-mapping", &OVERLAY_POWER_CUT),
        ] {
            let (seed, invariant, replay) =
                first_bad(scenario, find_bug(bug)).expect("some crash state shows the bug");
            let outcome = run(&replay);
            let failure = outcome.failure.expect("the replay fails too");
            assert_eq!(failure.invariant, invariant, "{bug:?}, seed {seed}: {}", failure.detail);
        }
    }
}
