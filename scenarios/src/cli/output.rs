//! Output for people: progress, tables, failures; and the JSON of the same.

use super::args::{Common, LogLevel};
use super::{Exit, Stop};
use crate::interrupt;
use crate::panics::apart;
use crate::probes::MARKS;
use crate::report::files::{page_of, replay, save_page};
use crate::report::named_requests;
use crate::run::{Effort, run, shrink_run};
use crate::spec::{Outcome, RunSpec};
use crate::sweep::SweepReport;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use sim::{RunFile, Shrunk, Source, TraceLevel};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Effort of shrinking a failure of a sweep.
pub(crate) const SHRINKS: Effort = Effort { runs: 20_000, cpu_ns: 60_000_000_000 };
/// Number of events printed for a failure.
const TAIL: usize = 12;

/// The revision of the code, for decision files.
pub fn revision() -> String {
    let out = Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output();
    let text = out
        .ok()
        .filter(|o| o.status.success())
        .map(|o| String::from_utf8_lossy(&o.stdout).trim().to_string());
    text.unwrap_or_else(|| concat!("v", env!("CARGO_PKG_VERSION")).into())
}

/// Progress of long work: a bar on a terminal, a line every few seconds elsewhere.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    total: Option<u64>,
    started: Instant,
    said: Instant,
}

/// Time between two lines of progress without a terminal.
const SAY_EVERY: Duration = Duration::from_secs(5);

impl Progress {
    /// Progress towards `total` runs, or of unknown length.
    pub(super) fn new(total: Option<u64>) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = total.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
            let shape = if total.is_some() {
                "{bar:40} {pos}/{len} runs, {msg} [{elapsed}]"
            } else {
                "{spinner} {pos} runs, {msg} [{elapsed}]"
            };
            bar.set_style(
                ProgressStyle::with_template(shape).unwrap_or_else(|_| ProgressStyle::default_bar()),
            );
            bar
        });
        Self { bar, total, started: Instant::now(), said: Instant::now() }
    }

    /// Shows the progress.
    pub(super) fn at(&mut self, done: u64, failed: u64) {
        match &self.bar {
            Some(bar) => {
                bar.set_position(done);
                bar.set_message(format!("{failed} failed"));
            }
            None if self.said.elapsed() >= SAY_EVERY => {
                self.said = Instant::now();
                let of = self.total.map_or(String::new(), |n| format!(" of {n}"));
                eprintln!("  {done}{of} runs, {failed} failed, {} s", self.started.elapsed().as_secs());
            }
            None => {}
        }
    }

    /// Time since the start.
    pub(super) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Removes the bar.
    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[derive(Serialize)]
struct JsonScenario<'a> {
    scenario: &'a str,
    passed: u64,
    failed: u64,
    guest_requests: u64,
    guest_errors: u64,
    crashes: u64,
    host_ios: u64,
    cpu_ns: u64,
    virtual_ns: u64,
    trace_hash: String,
    failures: Vec<JsonFailure>,
}

#[derive(Serialize)]
struct JsonFailure {
    seed: u64,
    invariant: String,
    detail: String,
}

#[derive(Serialize)]
struct JsonSweep<'a> {
    revision: String,
    guarded: bool,
    passed: u64,
    failed: u64,
    scenarios: Vec<JsonScenario<'a>>,
    marks: Vec<(&'static str, u64)>,
}

/// Writes the report of a sweep as JSON.
pub(crate) fn write_json(common: &Common, report: &SweepReport) -> Result<(), Stop> {
    let Some(path) = &common.json else { return Ok(()) };
    let scenarios = report.scenarios.iter().map(|(s, r)| JsonScenario {
        scenario: s.name,
        passed: r.passed,
        failed: r.failed,
        guest_requests: r.stats.requests,
        guest_errors: r.stats.errors,
        crashes: r.stats.crashes,
        host_ios: r.stats.host_ios,
        cpu_ns: r.cpu_ns,
        virtual_ns: r.virtual_ns,
        trace_hash: format!("{:#018x}", r.hash),
        failures: r
            .failures
            .iter()
            .map(|(seed, f)| JsonFailure {
                seed: *seed,
                invariant: f.invariant.to_string(),
                detail: f.detail.clone(),
            })
            .collect(),
    });
    let sweep = JsonSweep {
        revision: revision(),
        guarded: common.guarded(),
        passed: report.passed(),
        failed: report.failed(),
        scenarios: scenarios.collect(),
        marks: MARKS.iter().map(|m| m.name()).zip(report.marks.iter().copied()).collect(),
    };
    save_json(path, &sweep)
}

/// Writes anything as JSON.
pub(crate) fn save_json(path: &Path, value: &impl Serialize) -> Result<(), Stop> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Stop::harness(format!("failed to encode JSON: {e}")))?;
    std::fs::write(path, text + "\n")
        .map_err(|e| Stop::usage(format!("failed to write {}: {e}", path.display())))
}

/// Prints the table of a sweep.
pub(crate) fn print_table(report: &SweepReport) {
    println!(
        "{:<28} {:>7} {:>7} {:>10} {:>8} {:>10} {:>9} {:>12}  trace hash",
        "scenario", "passed", "failed", "requests", "crashes", "host I/O", "CPU ms", "requests/s"
    );
    for (scenario, r) in &report.scenarios {
        let rate =
            if r.cpu_ns > 0 { r.stats.requests as u128 * 1_000_000_000 / u128::from(r.cpu_ns) } else { 0 };
        println!(
            "{:<28} {:>7} {:>7} {:>10} {:>8} {:>10} {:>9} {:>12}  {:#018x}",
            scenario.name,
            r.passed,
            r.failed,
            r.stats.requests,
            r.stats.crashes,
            r.stats.host_ios,
            r.cpu_ns / 1_000_000,
            rate,
            r.hash
        );
    }
}

/// Runs the failing `spec` again, shrinks it, prints it, saves it, and prints how to replay it. A run that blocks its
/// thread for good is saved as it is.
///
/// # Errors
/// It cannot be saved; it was printed.
pub(crate) fn report_failure(common: &Common, spec: &RunSpec) -> Result<(), Stop> {
    let (guarded, seed) = (common.guarded(), spec.seed);
    let mine = RunSpec { record: true, trace: TraceLevel::Events, ..spec.clone() };
    let recorded = apart(guarded, seed, move || run(&mine));
    let (best, outcome, how) = match recorded {
        Err((lost, outcome)) => (lost, *outcome, "not shrunk: it blocks its thread for good".into()),
        Ok(recorded) => {
            let (mine, before) = (spec.clone(), recorded.clone());
            let shrunk = apart(guarded, seed, move || shrink_run(&mine, &before, SHRINKS));
            match shrunk {
                Ok((best, outcome, shrunk)) => {
                    let how = how_shrunk(recorded.decisions.len(), outcome.decisions.len(), &shrunk);
                    (best, outcome, how)
                }
                Err(_) => {
                    let source = Source::Replay(recorded.decisions.clone());
                    (
                        RunSpec { source, ..spec.clone() },
                        recorded,
                        "not shrunk: a smaller run blocks its thread for good".into(),
                    )
                }
            }
        }
    };
    print_failure(common, &best, &outcome);
    println!("  {how}");
    let path = save_run(common, &best, &outcome)?;
    print_saved(&path, &best, &outcome)
}

/// Makes the page of a saved run, and prints what can be done with both.
///
/// # Errors
/// The page cannot be written.
pub(crate) fn print_saved(path: &Path, spec: &RunSpec, outcome: &Outcome) -> Result<(), Stop> {
    println!("  replay:  {}", replay(path));
    println!("  story:   cargo tapsim explain {}", path.display());
    let page = save_page(path, spec, outcome)
        .map_err(|e| Stop::usage(format!("failed to write {}: {e}", page_of(path).display())))?;
    println!("  page:    {}\n", page.display());
    Ok(())
}

/// How far a run was shrunk, in words.
pub(crate) fn how_shrunk(before: usize, after: usize, shrunk: &Shrunk) -> String {
    let how = format!("shrunk from {before} to {after} decisions in {} runs", shrunk.runs);
    if shrunk.complete { how } else { format!("{how}, then stopped; `tapsim shrink` continues") }
}

/// Saves a run in the folder of failures.
pub(crate) fn save_run(common: &Common, spec: &RunSpec, outcome: &Outcome) -> Result<PathBuf, Stop> {
    let bug = spec.options.bug.map_or(String::new(), |b| format!("-{}", b.name()));
    let path = common.out.join(format!("{}{bug}-{}.run", spec.scenario.name, spec.seed));
    std::fs::create_dir_all(&common.out)
        .map_err(|e| Stop::usage(format!("failed to create {}: {e}", common.out.display())))?;
    save_run_as(&path, spec, outcome)?;
    Ok(path)
}

/// Saves a run as `path`.
pub(crate) fn save_run_as(path: &Path, spec: &RunSpec, outcome: &Outcome) -> Result<(), Stop> {
    std::fs::write(path, spec.to_file(outcome, &revision()).print())
        .map_err(|e| Stop::usage(format!("failed to save {}: {e}", path.display())))
}

/// The program's end: broken if something `failed`, otherwise stopped if the user wanted that, otherwise `unbroken`.
pub(crate) fn verdict(failed: u64, unbroken: Exit) -> Exit {
    match (failed, interrupt::asked()) {
        (0, true) => Exit::Interrupted,
        (0, false) => unbroken,
        _ => Exit::Broken,
    }
}

/// Prints what is broken, with the last events.
pub(crate) fn print_failure(common: &Common, spec: &RunSpec, outcome: &Outcome) {
    let Some(f) = &outcome.failure else { return };
    println!("\n{}: broken {}: {}", spec.heading(), f.invariant, f.invariant.sentence());
    println!("  {}", f.detail.trim_end().replace('\n', "\n  "));
    named_requests(outcome).iter().for_each(|request| println!("    {request}"));
    let lines = &outcome.trace.lines;
    let shown = if common.log == LogLevel::Full { lines.len() } else { TAIL };
    if !lines.is_empty() {
        println!("  last events (times in microseconds):");
    }
    for line in &lines[lines.len().saturating_sub(shown)..] {
        println!("    {line}");
    }
}

/// Reads a decision file.
pub fn load_run(path: &Path) -> Result<(RunFile, RunSpec), Stop> {
    let shown = path.display();
    let size =
        std::fs::metadata(path).map_err(|e| Stop::usage(format!("failed to open {shown}: {e}")))?.len();
    if size > 64 << 20 {
        return Err(Stop::usage(format!("{shown} is {size} bytes long: decision files are much smaller")));
    }
    let text = std::fs::read(path).map_err(|e| Stop::usage(format!("failed to read {shown}: {e}")))?;
    let text = String::from_utf8_lossy(&text);
    let file = RunFile::parse(&text).map_err(|e| Stop::usage(format!("failed to read {shown}: {e}")))?;
    let spec = RunSpec::from_file(&file).map_err(|e| Stop::usage(format!("failed to use {shown}: {e}")))?;
    Ok((file, spec))
}

/// The exit status of an outcome.
pub(crate) fn exit_of(outcome: &Outcome) -> Exit {
    if outcome.failure.is_some() { Exit::Broken } else { Exit::Ok }
}
