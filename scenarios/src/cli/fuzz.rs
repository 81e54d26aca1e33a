//! `fuzz`: bytes instead of seeds.

use super::args::{Common, FuzzArgs};
use super::output::{Progress, SHRINK_RUNS, print_failure, revision, save_json};
use super::replay::bug;
use super::{Exit, Stop};
use crate::fuzz::{FuzzReport, FuzzSpec, SUBJECTS, fuzz};
use crate::run::{run_recorded, shrink_run};
use crate::spec::{Outcome, RunSpec};
use serde::Serialize;
use sim::{TraceLevel, guard, text_hash};
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
        progress.elapsed() < args.time
    });
    progress.finish();
    let mut findings = Vec::new();
    for (run, outcome) in &report.findings {
        findings.push(finding(common, run, outcome)?);
    }
    println!("{} inputs kept, {} features reached", report.kept, report.features);
    write_json(common, &spec, &report, findings)?;
    println!("{} passed, {} failed", report.passed, report.failed);
    Ok(match (report.passed + report.failed, report.failed) {
        (0, _) => Exit::NothingRan,
        (_, 0) => Exit::Ok,
        _ => Exit::Broken,
    })
}

/// Shrinks, saves and shows one broken run.
fn finding(common: &Common, run: &RunSpec, outcome: &Outcome) -> Result<JsonFinding, Stop> {
    let (spec, before) = (run.clone(), outcome.clone());
    let (best, outcome, decisions) = guard::run(common.guarded(), 0, move || {
        let recorded = run_recorded(&spec, TraceLevel::Hash);
        if recorded.failure != before.failure {
            return (spec, recorded, None);
        }
        let (best, outcome, _) = shrink_run(&spec, &recorded, SHRINK_RUNS);
        (best, outcome, Some(recorded.decisions.len()))
    });
    let (Some(failure), Some(decisions)) = (&outcome.failure, decisions) else {
        return Err(Stop(Exit::Nondeterminism, "a failing run does not replay".into()));
    };
    let text = best.to_file(&outcome, &revision()).print();
    let keys: String = outcome.decisions.iter().map(|(key, d)| format!("{key:?} {}\n", d.value)).collect();
    let name =
        format!("fuzz-{}-{}-{:08x}.run", best.scenario.name, failure.invariant, text_hash(&keys) as u32);
    let path = common.out.join(name);
    std::fs::create_dir_all(&common.out)
        .and_then(|()| std::fs::write(&path, text))
        .map_err(|e| Stop::usage(format!("failed to save {}: {e}", path.display())))?;
    print_failure(common, &best, &outcome);
    println!("  shrunk from {decisions} to {} decisions", outcome.decisions.len());
    println!("  replay:  cargo tapsim replay {}", path.display());
    println!("  story:   cargo tapsim explain {}\n", path.display());
    Ok(JsonFinding {
        scenario: best.scenario.name,
        invariant: failure.invariant.to_string(),
        detail: failure.detail.clone(),
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
