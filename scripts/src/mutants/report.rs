//! The results of the mutants: a table, the survivors, JSON.

use super::sample::Mutant;
use super::trial::Finding;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// The fate of a mutant.
#[derive(Clone, Debug)]
pub(crate) enum Fate {
    /// A sweep noticed it.
    Sweep(Finding),
    /// A test noticed it: executable and test.
    Test(String, String),
    /// Nothing noticed it. Whether a sweep, and whether a test, at least reached it.
    Survived { swept: bool, tested: bool },
    /// It is known to change nothing, with the proof.
    Equivalent(String),
}

/// The whole result.
#[derive(Debug)]
pub(crate) struct Report {
    /// Seed of the sample.
    pub seed: u64,
    /// Places where a slip could be made.
    pub places: usize,
    /// Mutants that do not compile.
    pub dropped: usize,
    /// Entries of the list of equivalents that match no place in the code any more.
    pub stale: Vec<String>,
    /// Every mutant that was tried, with its fate.
    pub fates: Vec<(Mutant, Fate)>,
    /// Whether tests were run.
    pub with_tests: bool,
}

#[derive(Default)]
struct Sums {
    sweep: usize,
    test: usize,
    survived: usize,
    equivalent: usize,
}

impl Sums {
    fn add(&mut self, fate: &Fate) {
        match fate {
            Fate::Sweep(_) => self.sweep += 1,
            Fate::Test(..) => self.test += 1,
            Fate::Survived { .. } => self.survived += 1,
            Fate::Equivalent(_) => self.equivalent += 1,
        }
    }
    /// Percentage of the mutants that are not set aside.
    fn percent(&self, n: usize) -> f64 {
        let all = self.sweep + self.test + self.survived;
        if all == 0 { 100.0 } else { n as f64 * 100.0 / all as f64 }
    }
}

impl Report {
    fn sums_by(&self, of: impl Fn(&Mutant) -> String) -> BTreeMap<String, Sums> {
        let mut sums: BTreeMap<String, Sums> = BTreeMap::new();
        for (mutant, fate) in &self.fates {
            sums.entry(of(mutant)).or_default().add(fate);
        }
        sums
    }

    fn total(&self) -> Sums {
        let mut sums = Sums::default();
        self.fates.iter().for_each(|(_, fate)| sums.add(fate));
        sums
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        let found: Vec<_> =
            self.fates.iter().filter(|(_, f)| matches!(f, Fate::Sweep(_) | Fate::Test(..))).collect();
        let _ = writeln!(out, "Found:");
        for (mutant, fate) in found {
            let by = match fate {
                Fate::Sweep(Finding { scenario, seed: Some(seed), how }) => {
                    format!("{scenario} {seed}: {how}")
                }
                Fate::Sweep(Finding { how, .. }) => format!("a sweep {how}"),
                Fate::Test(executable, test) => format!("{executable}: {test}"),
                Fate::Survived { .. } | Fate::Equivalent(_) => String::new(),
            };
            let _ = writeln!(out, "  {:<44} {:<22} {by}", mutant.place(), mutant.slip.operator);
        }
        let _ = writeln!(out, "\n{}", self.survivors());
        for (title, sums) in [
            ("kind of slip", self.sums_by(|m| m.slip.operator.into())),
            ("crate", self.sums_by(|m| m.file.split('/').nth(1).unwrap_or_default().into())),
        ] {
            let _ = writeln!(
                out,
                "{title:<24} {:>7} {:>7} {:>9} {:>10}",
                "sweep", "test", "survived", "set aside"
            );
            for (name, s) in &sums {
                let _ = writeln!(
                    out,
                    "{name:<24} {:>7} {:>7} {:>9} {:>10}",
                    s.sweep, s.test, s.survived, s.equivalent
                );
            }
            let _ = writeln!(out);
        }
        let all = self.total();
        for entry in &self.stale {
            let _ = writeln!(out, "set aside without a place in the code: {entry}");
        }
        let _ = writeln!(
            out,
            "{} mutants of {} places, sample {:#018x}: {} do not compile, {} set aside",
            self.fates.len() + self.dropped,
            self.places,
            self.seed,
            self.dropped,
            all.equivalent
        );
        let tests = if self.with_tests { all.test } else { 0 };
        let _ = write!(
            out,
            "found by sweeps: {} ({:.1} %), by sweeps or tests: {} ({:.1} %), survived: {}",
            all.sweep,
            all.percent(all.sweep),
            all.sweep + tests,
            all.percent(all.sweep + tests),
            all.survived
        );
        out
    }

    /// The mutants that nothing noticed, with what they change.
    pub(crate) fn survivors(&self) -> String {
        let mut out = String::from("Survived:\n");
        for (mutant, fate) in &self.fates {
            let Fate::Survived { swept, tested } = fate else { continue };
            let reached = match (swept, tested) {
                (true, _) => "reached by sweeps",
                (false, true) => "reached by tests only",
                (false, false) => "reached by nothing that was run",
            };
            let _ = writeln!(
                out,
                "  {} {} ({reached})\n    - {}\n    + {}",
                mutant.place(),
                mutant.slip.operator,
                mutant.slip.was,
                mutant.slip.becomes
            );
        }
        out
    }

    /// For programs.
    pub(crate) fn json(&self) -> Value {
        let mutants = self.fates.iter().map(|(m, fate)| {
            let (found, detail) = match fate {
                Fate::Sweep(f) => ("sweep", json!({"scenario": f.scenario, "seed": f.seed, "how": f.how})),
                Fate::Test(executable, test) => ("test", json!({"executable": executable, "test": test})),
                Fate::Survived { swept, tested } => ("survived", json!({"swept": swept, "tested": tested})),
                Fate::Equivalent(proof) => ("equivalent", json!({"proof": proof})),
            };
            json!({
                "file": m.file, "line": m.line, "operator": m.slip.operator, "source_line": m.source_line,
                "was": m.slip.was, "becomes": m.slip.becomes, "fate": found, "detail": detail,
            })
        });
        let all = self.total();
        json!({
            "seed": format!("{:#018x}", self.seed),
            "places": self.places,
            "dropped": self.dropped,
            "found_by_sweeps": all.sweep,
            "found_by_tests": all.test,
            "survived": all.survived,
            "set_aside": all.equivalent,
            "mutants": mutants.collect::<Vec<_>>(),
        })
    }
}
