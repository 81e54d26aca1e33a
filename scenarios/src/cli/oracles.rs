//! `bugs --oracles`: breaks each checker in turn, and finds out what notices.

use super::args::{BugsArgs, Common};
use super::in_order::in_order;
use super::output::{Progress, load_run, save_json};
use super::{Exit, Stop};
use crate::check::Oracle;
use crate::hunt::Quarry;
use crate::run::run;
use crate::spec::RunSpec;
use serde::Serialize;
use sim::{RunFile, guard};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Tests that take longer are taken to have noticed.
const TESTS_MAX: Duration = Duration::from_secs(60);

#[derive(Serialize)]
struct JsonOracle {
    oracle: String,
    noticed_by: Option<&'static str>,
    which: String,
}

/// `tapsim bugs --oracles`
pub(super) fn oracles_command(common: &Common, args: &BugsArgs) -> Result<Exit, Stop> {
    let oracles: Vec<Oracle> = if args.bugs.is_empty() {
        Oracle::all().collect()
    } else {
        let find =
            |name: &String| Oracle::find(name).ok_or_else(|| Stop::usage(format!("unknown oracle {name:?}")));
        args.bugs.iter().map(find).collect::<Result<_, _>>()?
    };
    let saved = saved_runs(args)?;
    let tests = build_tests()?;
    if let Some(test) = failing_test(&tests, None)? {
        return Err(Stop::harness(format!("{test} fails although no oracle is broken")));
    }
    println!("{:<22} {:<12} which", "broken oracle", "noticed by");
    let mut progress = Progress::new(Some(oracles.len() as u64));
    let (mut json, mut missed) = (Vec::new(), 0);
    let work = |oracle: &Oracle| what_notices(common, &saved, &tests, *oracle);
    in_order(common.threads(), &oracles, work, |oracle, noticed| {
        let noticed = noticed?;
        missed += u64::from(noticed.is_none());
        let (by, which) = noticed.unzip();
        println!("{:<22} {:<12} {}", oracle.name(), by.unwrap_or("nothing"), which.as_deref().unwrap_or(""));
        json.push(JsonOracle { oracle: oracle.name(), noticed_by: by, which: which.unwrap_or_default() });
        progress.at(json.len() as u64, missed);
        Ok(())
    })?;
    progress.finish();
    if let Some(path) = &common.json {
        save_json(path, &json)?;
    }
    println!("{} passed, {missed} failed", oracles.len() as u64 - missed);
    Ok(if missed > 0 { Exit::Broken } else { Exit::Ok })
}

/// What notices that `oracle` is broken, and by which run or test; or why nothing has to.
fn what_notices(
    common: &Common,
    saved: &[(Quarry, RunFile, RunSpec)],
    tests: &Path,
    oracle: Oracle,
) -> Result<Option<(&'static str, String)>, Stop> {
    if let Some(which) = changed_run(common, saved, oracle) {
        return Ok(Some(("seeded bug", which)));
    }
    if let Some(which) = failing_test(tests, Some(oracle))? {
        return Ok(Some(("test", which)));
    }
    Ok(oracle.excuse().map(|why| ("(excused)", why.into())))
}

/// The saved runs of seeded bugs.
fn saved_runs(args: &BugsArgs) -> Result<Vec<(Quarry, RunFile, RunSpec)>, Stop> {
    let load = |quarry: Quarry| {
        let (file, spec) = load_run(&args.saved.join(format!("{}.run", quarry.name())))?;
        Ok((quarry, file, spec))
    };
    Quarry::all().map(load).collect()
}

/// The first saved run whose result changes when `oracle` is broken.
fn changed_run(common: &Common, saved: &[(Quarry, RunFile, RunSpec)], oracle: Oracle) -> Option<String> {
    saved.iter().find_map(|(quarry, file, spec)| {
        let mut spec = spec.clone();
        spec.options.oracle = Some(oracle);
        let outcome = guard::run(common.guarded(), spec.seed, move || run(&spec));
        let found = outcome.failure.map(|f| f.invariant.to_string());
        match found {
            Some(invariant) if invariant == file.invariant => None,
            Some(other) => Some(format!("{}: {other} instead of {}", quarry.name(), file.invariant)),
            None => Some(format!("{} is no longer found", quarry.name())),
        }
    })
}

/// Builds the tests of this crate's library.
fn build_tests() -> Result<PathBuf, Stop> {
    let args = ["test", "-p", "scenarios", "--lib", "--no-run", "--message-format=json"];
    let output = Command::new("cargo")
        .args(args)
        .stderr(Stdio::null())
        .output()
        .map_err(|e| Stop::harness(format!("failed to start cargo: {e}")))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let messages = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let mut built = messages.filter_map(|m| Some(PathBuf::from(m["executable"].as_str()?)));
    let built = built.next();
    built.ok_or_else(|| Stop::harness(format!("cargo {} built no tests: {}", args.join(" "), output.status)))
}

/// The first test that fails when `oracle` is broken.
fn failing_test(tests: &Path, oracle: Option<Oracle>) -> Result<Option<String>, Stop> {
    let stop = |e: std::io::Error| Stop::harness(format!("failed to run the tests: {e}"));
    let mut command = Command::new(tests);
    command.current_dir(env!("CARGO_MANIFEST_DIR")).env_remove("TAPSIM_ORACLE").stderr(Stdio::null());
    if let Some(oracle) = oracle {
        command.env("TAPSIM_ORACLE", oracle.name());
    }
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(stop)?;
    let mut stdout = child.stdout.take().ok_or_else(|| Stop::harness("the tests have no output"))?;
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        let _ = stdout.read_to_string(&mut text);
        text
    });
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().map_err(stop)? {
            break status;
        }
        if start.elapsed() > TESTS_MAX {
            child.kill().and_then(|()| child.wait()).map_err(stop)?;
            return Ok(Some("the tests time out".into()));
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    if status.success() {
        return Ok(None);
    }
    let text = reader.join().unwrap_or_default();
    let failed = text.lines().find_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"));
    Ok(Some(failed.map_or_else(|| status.to_string(), str::to_string)))
}
