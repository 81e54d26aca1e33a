//! The catalogue as tests: saved runs first, among them one of every seeded bug, then seeds of every scenario.
//!
//! ```text
//!   regression::FILE      a saved run has the expected result
//!   scenario::NAME        a few seeds of a scenario, inside the guard
//!   determinism::NAME     guarded, not guarded and replayed from its decisions: the same trace
//! ```
//!
//! | variable | meaning |
//! |---|---|
//! | `TAPSIM_SEED` | one seed, or `A..B`, instead of the usual ones |
//! | `TAPSIM_SEEDS` | `A..B` |
//! | `MADSIM_TEST_SEED`, `MADSIM_TEST_NUM` | the first seed and how many |
//! | `TAPSIM_REPLAY` | a decision file: only that is run |
//!
//! `scenarios/regressions` holds one shrunk run per seeded bug, named after it, which proves that the bug is still
//! caught and that the same decisions are harmless without it; a bug without a run fails. `cargo tapsim bugs --stale
//! --save` makes those that are missing or no longer show their bug. (`cargo tapsim bugs` proves that each bug is found
//! from seeds alone.) A run that once found a real bug is kept there, too: without a bug it must pass. A file can state
//! its expected result with a line `option expect=pass` or `option expect=fail`.

use kernel_model::{SimHost, StorageConfig};
use libtest_mimic::{Arguments, Failed, Trial};
use scenarios::catalog;
use scenarios::cli::{load_run, revision, seeds_or_one};
use scenarios::hunt::{Quarry, Unexpected, check_saved};
use scenarios::report::files::save_page;
use scenarios::run::{Effort, prepare, run, run_recorded, shrink_run};
use scenarios::scenario::Scenario;
use scenarios::spec::{Outcome, RunSpec};
use scenarios::sweep::SweepSpec;
use scenarios::world::RunOptions;
use sim::{RunFile, Source, TraceLevel, guard};
use std::cell::Cell;
use std::fmt::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use tap_core::{LocalBoxFuture, Node, NodeInfo, Request, Response, Scheduler, SchedulerLimits};
use tap_host::{Errno, IoBuf, SectorRange, Tasks};

/// Seeds of each scenario.
const SEEDS: Range<u64> = 0..150;
/// Seeds of each scenario whose traces are compared.
const COMPARED: Range<u64> = 0..3;
/// Effort of shrinking; with more, runs would become smaller.
const EFFORT: Effort = Effort { runs: 4000, cpu_ns: 60_000_000_000 };
/// Number of events printed for a failure.
const TAIL: usize = 12;

fn main() -> ExitCode {
    prepare();
    let args = Arguments::from_args();
    match trials(|name| std::env::var(name).ok()) {
        Ok(trials) => libtest_mimic::run(&args, trials).exit_code(),
        Err(text) => {
            eprintln!("scenarios: {text}");
            ExitCode::from(2)
        }
    }
}

/// What the environment asks for.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Usual,
    Seeds(Range<u64>),
    Replay(PathBuf),
}

fn asked(env: impl Fn(&str) -> Option<String>) -> Result<Asked, String> {
    let one = |name: &str| env(name).map(|value| (name.to_string(), value));
    let first = one("MADSIM_TEST_SEED").or_else(|| one("MADSIM_TEST_NUM"));
    let set: Vec<(String, String)> = [one("TAPSIM_REPLAY"), one("TAPSIM_SEED"), one("TAPSIM_SEEDS"), first]
        .into_iter()
        .flatten()
        .collect();
    let (name, value) = match &set[..] {
        [] => return Ok(Asked::Usual),
        [only] => only,
        [a, b, ..] => return Err(format!("{} and {} are both set: set one of them", a.0, b.0)),
    };
    let bad = |e| format!("{name}: {e}");
    match name.as_str() {
        "TAPSIM_REPLAY" => Ok(Asked::Replay(value.into())),
        "TAPSIM_SEEDS" if !value.contains("..") => {
            Err(format!("{name}: {value:?} is not a range of seeds such as 0..2000"))
        }
        "TAPSIM_SEED" | "TAPSIM_SEEDS" => seeds_or_one(value).map(Asked::Seeds).map_err(bad),
        _ => {
            let number = |name: &str, usual: u64| {
                env(name).map_or(Ok(usual), |v| {
                    v.trim().parse::<u64>().map_err(|_| format!("{name}: {v:?} is not a number"))
                })
            };
            let (first, count) = (number("MADSIM_TEST_SEED", 0)?, number("MADSIM_TEST_NUM", 1)?);
            let end = first.checked_add(count).filter(|_| count > 0);
            end.map(|end| Asked::Seeds(first..end))
                .ok_or_else(|| format!("MADSIM_TEST_NUM: {count} seeds from {first} on are none or too many"))
        }
    }
}

fn trials(env: impl Fn(&str) -> Option<String>) -> Result<Vec<Trial>, String> {
    let seeds = match asked(env)? {
        Asked::Usual => SEEDS,
        Asked::Seeds(seeds) => seeds,
        Asked::Replay(path) => {
            // Tests run in the folder of their package, but paths are given relative to the workspace.
            let top = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("").join(&path);
            let path = if path.exists() { path } else { top };
            load_run(&path).map_err(|stop| stop.1)?;
            let name = format!("replay::{}", path.display());
            return Ok(vec![Trial::test(name, move || replay(&path))]);
        }
    };
    let mut trials = Vec::new();
    let files = regressions()?;
    for quarry in Quarry::all() {
        let path = files.iter().find(|p| p.file_stem().is_some_and(|s| s.to_string_lossy() == quarry.name()));
        let path = path.cloned();
        trials.push(Trial::test(format!("regression::of-bug::{}", quarry.name()), move || {
            saved_bug(quarry, path.as_deref())
        }));
    }
    for path in files {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        trials.push(Trial::test(format!("regression::{stem}"), move || regression(&path)));
    }
    for scenario in catalog::ALL.iter().copied() {
        let seeds = seeds.clone();
        trials.push(Trial::test(format!("scenario::{}", scenario.name), move || sweep(scenario, seeds)));
    }
    for scenario in catalog::ALL.iter().copied() {
        trials.push(Trial::test(format!("determinism::{}", scenario.name), move || deterministic(scenario)));
    }
    trials.push(Trial::test("environment", environment));
    trials.push(Trial::test("panics", panics));
    trials.push(Trial::test("panics-in-line", panics_in_line));
    trials.push(Trial::test("documents", documents));
    Ok(trials)
}

fn regressions() -> Result<Vec<PathBuf>, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions");
    let entries =
        std::fs::read_dir(&folder).map_err(|e| format!("failed to list {}: {e}", folder.display()))?;
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| format!("failed to list {}: {e}", folder.display()))?.path();
        if path.extension().is_some_and(|e| e == "run") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Checks the number of scenarios wherever a document states it.
fn documents() -> Result<(), Failed> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("");
    let mut files: Vec<PathBuf> =
        ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"].map(|f| top.join(f)).into();
    let list = |folder: &Path| -> Result<Vec<PathBuf>, String> {
        let entries =
            std::fs::read_dir(folder).map_err(|e| format!("failed to list {}: {e}", folder.display()))?;
        Ok(entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect())
    };
    for entry in list(&top.join("docs"))? {
        let inside = if entry.is_dir() { list(&entry)? } else { vec![entry] };
        files.extend(inside.into_iter().filter(|file| file.extension().is_some_and(|e| e == "md")));
    }
    let mut seen = 0;
    for file in files {
        let text =
            std::fs::read_to_string(&file).map_err(|e| format!("failed to read {}: {e}", file.display()))?;
        for (before, _) in text.match_indices(" scenarios").map(|(at, _)| text.split_at(at)) {
            let digits = before.rfind(|c: char| !c.is_ascii_digit()).map_or(0, |at| at + 1);
            let Ok(count) = before[digits..].parse::<usize>() else { continue };
            // A smaller number counts some of them.
            if count > 9 && count != catalog::ALL.len() {
                let there = catalog::ALL.len();
                return Err(
                    format!("{}: says {count} scenarios, but there are {there}", file.display()).into()
                );
            }
            seen += 1;
        }
    }
    if seen == 0 { Err("no document states the number of scenarios".into()) } else { Ok(()) }
}

/// Runs `work` on `spec` inside the guard.
fn guarded<T: Send + 'static>(spec: &RunSpec, work: fn(&RunSpec) -> T) -> T {
    let spec = spec.clone();
    guard::run(guard::AVAILABLE, spec.seed, move || work(&spec))
}

fn recorded(spec: &RunSpec) -> Outcome {
    guarded(spec, |spec| run_recorded(spec, TraceLevel::Events))
}

fn replay(path: &Path) -> Result<(), Failed> {
    let (_, spec) = load_run(path).map_err(|stop| stop.1)?;
    let outcome = recorded(&spec);
    match outcome.failure {
        None => Ok(()),
        Some(_) => Err(describe(&spec, &outcome, path).into()),
    }
}

fn regression(path: &Path) -> Result<(), Failed> {
    let (file, spec) = load_run(path).map_err(|stop| stop.1)?;
    let mut without = spec.clone();
    (without.options.bug, without.options.canary) = (None, false);
    check_saved(&file, &spec, guard::AVAILABLE).map_err(|why| {
        let told = match &why {
            Unexpected::Broken(outcome) => describe(&spec, outcome, path),
            Unexpected::BrokenWithout(outcome) => describe(&without, outcome, path),
            _ => format!("  saved:    {}\n", path.display()),
        };
        let again =
            if Quarry::of(&spec).is_some() { "  save again: cargo tapsim bugs --stale --save\n" } else { "" };
        Failed::from(format!("{why}\n{told}{again}"))
    })
}

/// Checks that the seeded bug has a saved run; `regression` checks its result.
fn saved_bug(quarry: Quarry, path: Option<&Path>) -> Result<(), Failed> {
    let name = quarry.name();
    let make = format!("make it with: cargo tapsim bugs {name} --save");
    let path = path.ok_or_else(|| format!("{name} has no saved run; {make}"))?;
    let (_, spec) = load_run(path).map_err(|stop| stop.1)?;
    if Quarry::of(&spec) == Some(quarry) {
        return Ok(());
    }
    Err(format!("{} is not a run of {name}; {make}", path.display()).into())
}

fn sweep(scenario: &'static Scenario, seeds: Range<u64>) -> Result<(), Failed> {
    let broken = guard::run(guard::AVAILABLE, seeds.start, move || {
        seeds.into_iter().find(|seed| run(&RunSpec::new(scenario, *seed)).failure.is_some())
    });
    match broken {
        None => Ok(()),
        Some(seed) => Err(shrunk_failure(&RunSpec::new(scenario, seed))),
    }
}

/// Shrinks and saves a failing run, and prints how to repeat it.
fn shrunk_failure(spec: &RunSpec) -> Failed {
    let (best, outcome) = guarded(spec, |spec| {
        let all = run_recorded(spec, TraceLevel::Hash);
        let (best, outcome, _) = shrink_run(spec, &all, EFFORT);
        (best, outcome)
    });
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("tapsim-failures");
    let path = folder.join(format!("{}-{}.run", spec.scenario.name, spec.seed));
    let saved = std::fs::create_dir_all(&folder)
        .and_then(|()| std::fs::write(&path, best.to_file(&outcome, &revision()).print()));
    let mut text = describe(&best, &outcome, &path);
    let _ = match saved.and_then(|()| save_page(&path, &best, &outcome)) {
        Ok(page) => writeln!(text, "  page:     {}", page.display()),
        Err(error) => writeln!(text, "  (failed to save it: {error})"),
    };
    let _ = writeln!(
        text,
        "  unshrunk: TAPSIM_SEED={} cargo test -p scenarios --test scenarios scenario::{}",
        spec.seed, spec.scenario.name
    );
    text.into()
}

fn describe(spec: &RunSpec, outcome: &Outcome, path: &Path) -> String {
    let mut text = String::new();
    if let Some(f) = &outcome.failure {
        let _ = writeln!(text, "{}: broken {}", spec.heading(), f.invariant);
        let _ = writeln!(text, "  {}\n  {}\n  last events:", f.invariant.sentence(), f.detail.trim_end());
    }
    let lines = &outcome.trace.lines;
    for line in &lines[lines.len().saturating_sub(TAIL)..] {
        let _ = writeln!(text, "    {line}");
    }
    let path = path.display();
    let _ = writeln!(text, "  saved:    {path}\n  replay:   cargo tapsim replay {path}");
    let _ = writeln!(text, "  or:       TAPSIM_REPLAY={path} cargo test -p scenarios --test scenarios");
    text
}

fn deterministic(scenario: &'static Scenario) -> Result<(), Failed> {
    for seed in COMPARED {
        let spec = RunSpec::new(scenario, seed);
        let first = guarded(&spec, |spec| run_recorded(spec, TraceLevel::Hash));
        let other = spec.clone();
        let bare = guard::run(false, seed, move || run(&other));
        if first.trace.hash != bare.trace.hash {
            return Err(format!("seed {seed}: the trace differs with the guard on and off").into());
        }
        // What is kept for a report does not change the run.
        let reported = recorded(&spec);
        if first.trace.hash != reported.trace.hash {
            return Err(format!("seed {seed}: the trace differs when a report is made of it").into());
        }
        // Through a file: the decisions of a run can be saved and read again.
        let file = spec.to_file(&first, "none");
        let read = RunFile::parse(&file.print()).map_err(|e| format!("seed {seed}: {e}"))?;
        let again = guarded(&RunSpec { source: Source::Replay(read.decisions), ..spec }, run);
        if first.trace.hash != again.trace.hash {
            return Err(
                format!("seed {seed}: the trace differs when it is replayed from its decisions").into()
            );
        }
    }
    Ok(())
}

struct Falls;
impl Drop for Falls {
    fn drop(&mut self) {
        panic!("a broken destructor");
    }
}

static FALLS_TWICE: Scenario = Scenario {
    name: "falls-twice",
    about: "a panic meets another one in a destructor, in every fourth seed",
    storage: &|_| StorageConfig::default(),
    body: &|w| {
        Box::pin(async move {
            let falls = w.setting("falls", &[false, false, false, true]);
            w.sim.spawn("task", 0, async move {
                let _falls = falls.then(|| Falls);
                assert!(!falls, "a broken promise");
            });
            w.sim.sleep_ns(1).await;
        })
    },
};

/// A node whose third request panics.
struct Panics(Cell<u32>);

impl Node for Panics {
    fn info(&self) -> NodeInfo {
        NodeInfo::new(4096, false)
    }
    fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
        self.0.set(self.0.get() + 1);
        let fails = self.0.get() == 3;
        Box::pin(async move {
            assert!(!fails, "a broken node");
            std::future::pending::<()>().await;
            Response { result: Ok(()), bufs: request.bufs }
        })
    }
    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

static PANICS_BELOW: Scenario = Scenario {
    name: "panics-below",
    about: "a node panics while requests are in line above it, merged and alone, and others wait for them",
    storage: &|_| StorageConfig::default(),
    body: &|w| {
        Box::pin(async move {
            let host = SimHost::start(&w.kernel, &w.xen, "tapdisk", 0);
            let limits = SchedulerLimits { depth: 3, merge_sectors: 16, ..SchedulerLimits::default() };
            let scheduler = Rc::new(Scheduler::new(host.clone(), Rc::new(Panics(Cell::new(0))), limits));
            for at in [0, 8, 100, 200, 208, 300, 400, 4, 204] {
                let buf = IoBuf::unpooled(4096).expect("a small buffer");
                let write = Request::write(SectorRange::new(at, 8), [buf].into_iter().collect());
                let answer = scheduler.submit(write);
                host.spawn("op", at, async move { drop(answer.await) });
            }
            w.sim.sleep_ns(1).await;
        })
    },
};

/// A panic of the stack is a finding also if requests stand in line: their destructors do not panic again.
fn panics_in_line() -> Result<(), Failed> {
    let spec = RunSpec { trace: TraceLevel::Events, record: true, ..RunSpec::new(&PANICS_BELOW, 0) };
    let outcome = guarded(&spec, run);
    let failure = outcome.failure.as_ref().ok_or("nothing is broken")?;
    let story = scenarios::report::story(&spec, &outcome);
    let told = failure.invariant.to_string() == "A1" && failure.detail.starts_with("a broken node at ");
    if told && !failure.detail.contains("and while that unwound") && story.contains("a broken node") {
        return Ok(());
    }
    Err(story.into())
}

/// A panic during a panic is a finding, and the sweep continues. Not a test of the library, because the threads that
/// are given up keep the panic hook, which the usual harness restores at its end.
fn panics() -> Result<(), Failed> {
    for guarded in [false, true] {
        let spec = SweepSpec {
            scenarios: vec![&FALLS_TWICE, catalog::ALL[0]],
            seeds: 0..40,
            shares: None,
            options: RunOptions::default(),
            jobs: 2,
            guarded,
            first_only: false,
        };
        let report = scenarios::sweep::sweep(&spec, |_, _| true);
        let (falls, other) = (&report.scenarios[0].1, &report.scenarios[1].1);
        assert_eq!((falls.passed + falls.failed, other.passed), (40, 40));
        assert!(falls.failed > 2 && falls.passed > 20, "{falls:?}");
        let (_, first) = &falls.failures[0];
        assert_eq!(first.invariant.to_string(), "A1");
        assert!(first.detail.contains("a broken promise") && first.detail.contains("a broken destructor"));
    }
    Ok(())
}

/// The variables work as documented, and invalid values are refused.
fn environment() -> Result<(), Failed> {
    let of =
        |pairs: &[(&str, &str)]| asked(|name| pairs.iter().find(|p| p.0 == name).map(|p| p.1.to_string()));
    assert_eq!(of(&[]), Ok(Asked::Usual));
    assert_eq!(of(&[("TAPSIM_SEED", "7")]), Ok(Asked::Seeds(7..8)));
    assert_eq!(of(&[("TAPSIM_SEED", "7..9")]), Ok(Asked::Seeds(7..9)));
    assert_eq!(of(&[("TAPSIM_SEEDS", "0..5")]), Ok(Asked::Seeds(0..5)));
    assert_eq!(of(&[("MADSIM_TEST_SEED", "3"), ("MADSIM_TEST_NUM", "4")]), Ok(Asked::Seeds(3..7)));
    assert_eq!(of(&[("MADSIM_TEST_NUM", "4")]), Ok(Asked::Seeds(0..4)));
    for bad in [
        &[("TAPSIM_SEED", "x")][..],
        &[("TAPSIM_SEED", "")],
        &[("TAPSIM_SEEDS", "5")],
        &[("TAPSIM_SEEDS", "5..5")],
        &[("MADSIM_TEST_SEED", "-1")],
        &[("MADSIM_TEST_NUM", "0")],
        &[("MADSIM_TEST_SEED", "18446744073709551615"), ("MADSIM_TEST_NUM", "2")],
        &[("TAPSIM_SEED", "1"), ("TAPSIM_SEEDS", "1..2")],
        &[("TAPSIM_SEED", "1"), ("MADSIM_TEST_NUM", "2")],
    ] {
        let answer = of(bad);
        assert!(answer.as_ref().is_err_and(|text| !text.contains('\n')), "{bad:?} returns {answer:?}");
    }
    Ok(())
}
