//! `fuzz`: bytes instead of seeds.

use super::args::{Common, FuzzArgs};
use super::output::{
    Progress, SHRINKS, how_shrunk, print_failure, print_saved, save_json, save_run_as, verdict,
};
use super::paths::after;
use super::replay::bug;
use super::{Exit, Stop};
use crate::fuzz::{FuzzReport, FuzzSpec, SUBJECTS, fuzz};
use crate::interrupt;
use crate::panics::apart;
use crate::run::{run_recorded, shrink_run};
use crate::spec::{Outcome, RunSpec};
use serde::Serialize;
use sim::{TraceLevel, text_hash};
use std::path::PathBuf;

#[derive(Serialize)]
struct JsonFuzz {
    format: &'static str,
    seed: u64,
    guarded: bool,
    passed: u64,
    failed: u64,
    kept_inputs: usize,
    features: usize,
    findings: Vec<JsonFinding>,
}

#[derive(Serialize)]
struct JsonFinding {
    scenario: &'static str,
    invariant: String,
    detail: String,
    decisions: usize,
    file: PathBuf,
}

/// `tapsim fuzz`
pub(super) fn fuzz_command(common: &Common, args: &FuzzArgs) -> Result<Exit, Stop> {
    let subject = match &args.format {
        Some(name) => SUBJECTS.iter().find(|subject| subject.name == name),
        None => SUBJECTS.first(),
    };
    let subject = subject.ok_or_else(|| Stop::usage("there is nothing to fuzz"))?;
    let spec = FuzzSpec {
        subject,
        seed: args.seed,
        jobs: common.threads(),
        guarded: common.guarded(),
        bug: args.bug.as_deref().map(bug).transpose()?,
    };
    println!(
        "fuzzing {} for {} s from seed {}, {} threads, {}",
        subject.name,
        args.time.as_secs(),
        spec.seed,
        spec.jobs,
        if spec.guarded { "guarded" } else { "not guarded" }
    );
    let mut progress = Progress::new(None);
    let report = fuzz(&spec, |runs, failed| {
        progress.at(runs, failed);
        progress.elapsed() < args.time && !interrupt::asked()
    });
    progress.finish();
    let (mut findings, mut stored) = (Vec::new(), Ok(()));
    for (run, outcome) in &report.findings {
        match finding(common, run, outcome) {
            Ok(found) => findings.push(found),
            Err(stop) if stop.0 == Exit::Nondeterminism => return Err(stop),
            Err(stop) => stored = stored.and(Err(stop)),
        }
    }
    println!("{} inputs kept, {} features reached", report.kept, report.features);
    stored = stored.and(write_json(common, &spec, &report, findings));
    let ran = report.passed + report.failed > 0;
    let unbroken = match spec.bug {
        _ if !ran => Exit::NothingRan,
        Some(bug) if report.failed == 0 && !interrupt::asked() => {
            println!("the seeded bug {} was not found", bug.name());
            Exit::Broken
        }
        _ => Exit::Ok,
    };
    println!("{} passed, {} failed", report.passed, report.failed);
    after(verdict(report.failed, unbroken), stored)
}

/// Shrinks, shows and saves one broken run.
fn finding(common: &Common, run: &RunSpec, outcome: &Outcome) -> Result<JsonFinding, Stop> {
    let (spec, before) = (run.clone(), outcome.clone());
    let shrunk = apart(common.guarded(), 0, move || {
        let recorded = run_recorded(&spec, TraceLevel::Hash);
        if recorded.failure != before.failure {
            return None;
        }
        let (best, outcome, shrunk) = shrink_run(&spec, &recorded, SHRINKS);
        let how = how_shrunk(recorded.decisions.len(), outcome.decisions.len(), &shrunk);
        Some((best, outcome, how))
    });
    let (best, outcome, how) = match shrunk {
        Ok(Some(shrunk)) => shrunk,
        Ok(None) => return Err(Stop(Exit::Nondeterminism, "a failing run does not replay".into())),
        Err(_) => (run.clone(), outcome.clone(), "not shrunk: it blocks its thread for good".into()),
    };
    let failure = outcome.failure.clone().ok_or_else(|| Stop::harness("a shrunk run does not fail"))?;
    print_failure(common, &best, &outcome);
    println!("  {how}");
    let keys: String = outcome.decisions.iter().map(|(key, d)| format!("{key:?} {}\n", d.value)).collect();
    let name =
        format!("fuzz-{}-{}-{:08x}.run", best.scenario.name, failure.invariant, text_hash(&keys) as u32);
    let path = common.out.join(name);
    std::fs::create_dir_all(&common.out)
        .map_err(|e| Stop::usage(format!("failed to create {}: {e}", common.out.display())))?;
    save_run_as(&path, &best, &outcome)?;
    print_saved(&path, &best, &outcome)?;
    Ok(JsonFinding {
        scenario: best.scenario.name,
        invariant: failure.invariant.to_string(),
        detail: failure.detail,
        decisions: outcome.decisions.len(),
        file: path,
    })
}

fn write_json(
    common: &Common,
    spec: &FuzzSpec,
    report: &FuzzReport,
    findings: Vec<JsonFinding>,
) -> Result<(), Stop> {
    let Some(path) = &common.json else { return Ok(()) };
    let json = JsonFuzz {
        format: spec.subject.name,
        seed: spec.seed,
        guarded: spec.guarded,
        passed: report.passed,
        failed: report.failed,
        kept_inputs: report.kept,
        features: report.features,
        findings,
    };
    save_json(path, &json)
}
