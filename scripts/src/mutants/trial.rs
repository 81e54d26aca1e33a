//! One mutant against sweeps and tests, each in a process of its own with limits.

use super::scratch::Executable;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::CommandExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Memory of a trial, in KiB of address space: a mutant may allocate without limit.
const MEMORY_KIB: u64 = 6 << 20;
/// Ticks per second in `/proc/PID/stat`.
const TICKS: u64 = 100;
/// The interval between two checks of a trial.
const LOOK: Duration = Duration::from_millis(10);

/// How a trial ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum End {
    /// With this exit status.
    Exit(i32),
    /// By this signal.
    Signal(i32),
    /// It took too long and was stopped.
    TooLong,
}

/// The limits of a trial.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit {
    /// Processor time.
    pub cpu: Duration,
    /// Wall-clock time.
    pub wall: Duration,
}

impl Limit {
    /// For a trial that usually takes `usual`: enough for a slow machine, but finite.
    pub(crate) fn after(usual: Usage) -> Self {
        Self { cpu: usual.cpu * 4 + Duration::from_secs(10), wall: usual.wall * 10 + Duration::from_secs(60) }
    }
    /// For a trial whose usual time is not known yet.
    pub(crate) const FIRST: Self = Self { cpu: Duration::from_secs(1800), wall: Duration::from_secs(3600) };
}

/// The time that a trial took.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Usage {
    /// Processor time.
    pub cpu: Duration,
    /// Time.
    pub wall: Duration,
}

/// Which mutant is selected, and where reached mutants are recorded.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selection {
    /// Number of the mutant; 0 is none.
    pub mutant: u32,
    /// A file for the numbers of all that are reached.
    pub reached: Option<PathBuf>,
}

/// Runs `program` to its end; its output goes to the file `output`.
pub(crate) fn run(
    program: &Path,
    args: &[String],
    folder: &Path,
    selection: &Selection,
    output: &Path,
    limit: Limit,
) -> Result<(End, Usage)> {
    let out = std::fs::File::create(output)?;
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("ulimit -v {MEMORY_KIB}; exec \"$@\"")).arg("sh").arg(program).args(args);
    command.current_dir(folder).env("TAPSIM_MUTANT", selection.mutant.to_string());
    command.env_remove("TAPSIM_MUTANTS_REACHED").process_group(0);
    if let Some(path) = &selection.reached {
        command.env("TAPSIM_MUTANTS_REACHED", path);
    }
    let start = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out).spawn()?;
    let mut usage = Usage::default();
    loop {
        if let Some(status) = child.try_wait()? {
            usage.wall = start.elapsed();
            let end = match (status.code(), status.signal()) {
                (Some(code), _) => End::Exit(code),
                (None, signal) => End::Signal(signal.unwrap_or(0)),
            };
            return Ok((end, usage));
        }
        usage = Usage { cpu: cpu_time(child.id()).unwrap_or(usage.cpu), wall: start.elapsed() };
        if usage.cpu > limit.cpu || usage.wall > limit.wall {
            stop(&mut child)?;
            return Ok((End::TooLong, usage));
        }
        std::thread::sleep(LOOK);
    }
}

/// Ends a trial and the processes that it started.
fn stop(child: &mut Child) -> Result<()> {
    // The group has the number of its first process.
    Command::new("kill").args(["-KILL", "--", &format!("-{}", child.id())]).stderr(Stdio::null()).status()?;
    child.wait()?;
    Ok(())
}

fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may contain anything, including spaces and parentheses; numbers follow it.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let ticks = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    Some(Duration::from_millis(ticks * 1000 / TICKS))
}

/// The numbers in a file of reached mutants.
pub(crate) fn reached(path: &Path) -> BTreeSet<u32> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

/// What a sweep noticed.
#[derive(Clone, Debug)]
pub(crate) struct Finding {
    /// The scenario.
    pub scenario: String,
    /// The seed, if there is one.
    pub seed: Option<u64>,
    /// What broke.
    pub how: String,
}

/// A sweep of scenarios.
#[derive(Clone, Debug)]
pub(crate) struct Sweep<'a> {
    /// The simulator.
    pub tapsim: &'a Path,
    /// Names of scenarios.
    pub scenarios: Vec<String>,
    /// `A..B`
    pub seeds: &'a str,
    /// Threads.
    pub jobs: usize,
}

impl Sweep<'_> {
    /// Sweeps until something fails; returns the failure and the time taken. `name` names the files that the trial
    /// leaves in `folder`.
    pub(crate) fn run(
        &self,
        folder: &Path,
        name: &str,
        selection: &Selection,
        limit: Limit,
    ) -> Result<(Option<Finding>, Usage)> {
        let json = folder.join(format!("{name}.json"));
        let _ = std::fs::remove_file(&json);
        let mut args: Vec<String> = vec!["sweep".into()];
        args.extend(self.scenarios.iter().cloned());
        let jobs = self.jobs.to_string();
        let options = ["--stop", "--no-shrink", "--seeds", self.seeds, "--jobs", &jobs, "--json"];
        args.extend(options.map(String::from));
        args.push(json.display().to_string());
        let output = folder.join(format!("{name}.out"));
        let (end, usage) = run(self.tapsim, &args, folder, selection, &output, limit)?;
        let crashed = |how: String| Finding { scenario: self.scenarios.join(" "), seed: None, how };
        let finding = match end {
            End::Exit(0) => None,
            End::Exit(1) => Some(first_failure(&json).unwrap_or_else(|| crashed("exit status 1".into()))),
            End::Exit(2) => return Err(format!("tapsim refuses {args:?}: see {}", output.display()).into()),
            End::Exit(code) => Some(crashed(format!("exit status {code}"))),
            End::Signal(signal) => Some(crashed(format!("signal {signal}"))),
            End::TooLong => Some(crashed("does not end".into())),
        };
        Ok((finding, usage))
    }
}

/// How often a sweep reached each mark, by name.
pub(crate) type Marks = BTreeMap<String, u64>;

/// The marks that a sweep reports.
pub(crate) fn marks(json: &Path) -> Result<Marks> {
    let report: Value = serde_json::from_str(&std::fs::read_to_string(json)?)?;
    Ok(serde_json::from_value::<Vec<(String, u64)>>(report["marks"].clone())?.into_iter().collect())
}

/// The first failure that a sweep reports.
fn first_failure(json: &Path) -> Option<Finding> {
    let report: Value = serde_json::from_str(&std::fs::read_to_string(json).ok()?).ok()?;
    let scenarios = report["scenarios"].as_array()?;
    let failures = scenarios.iter().filter_map(|s| Some((s["scenario"].as_str()?, s["failures"].get(0)?)));
    let (scenario, failure) = failures.min_by_key(|(_, failure)| failure["seed"].as_u64())?;
    let how = failure["invariant"].as_str().unwrap_or_default().to_string();
    Some(Finding { scenario: scenario.into(), seed: failure["seed"].as_u64(), how })
}

/// Runs the tests of one executable; returns whether they notice the mutant, and the time taken.
pub(crate) fn test(
    tests: &Executable,
    folder: &Path,
    name: &str,
    selection: &Selection,
    limit: Limit,
) -> Result<(Option<String>, Usage)> {
    let output = folder.join(format!("{name}.out"));
    let (end, usage) = run(&tests.path, &[], &tests.folder, selection, &output, limit)?;
    let how = match end {
        End::Exit(0) => None,
        End::TooLong => Some("does not end".into()),
        End::Signal(signal) => Some(format!("signal {signal}")),
        End::Exit(code) => Some(failed_test(&output).unwrap_or(format!("exit status {code}"))),
    };
    Ok((how, usage))
}

/// The name of the first test that failed.
fn failed_test(output: &Path) -> Option<String> {
    let text = String::from_utf8_lossy(&std::fs::read(output).ok()?).into_owned();
    let line = text.lines().find(|line| line.starts_with("test ") && line.ends_with("FAILED"))?;
    Some(line.split_whitespace().nth(1)?.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(text: &str, limit: Limit) -> End {
        let folder = tempfile::tempdir().unwrap();
        let (args, none) = (["-c".to_string(), text.to_string()], Selection::default());
        run(Path::new("/bin/sh"), &args, folder.path(), &none, &folder.path().join("out"), limit).unwrap().0
    }

    #[test]
    fn trials_end() {
        let second = Limit { cpu: Duration::from_secs(1), wall: Duration::from_secs(100) };
        assert_eq!(shell("exit 3", second), End::Exit(3));
        assert_eq!(shell("kill -9 $$", second), End::Signal(9));
        assert_eq!(shell("while :; do :; done", second), End::TooLong);
        let moment = Limit { cpu: Duration::from_secs(1), wall: Duration::from_millis(100) };
        assert_eq!(shell("sleep 100 & sleep 100", moment), End::TooLong);
    }

    #[test]
    fn reports_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let json = folder.path().join("sweep.json");
        let of = |name: &str, seed: u64| serde_json::json!({"scenario": name, "failures": [{"seed": seed, "invariant": "G7"}]});
        let none = serde_json::json!({"scenario": "c", "failures": []});
        let report = serde_json::json!({ "scenarios": [none, of("a", 7), of("b", 2)] });
        std::fs::write(&json, report.to_string()).unwrap();
        let found = first_failure(&json).unwrap();
        assert_eq!((found.scenario.as_str(), found.seed, found.how.as_str()), ("b", Some(2), "G7"));
        std::fs::write(&json, "3\n12\n3\n").unwrap();
        assert_eq!(reached(&json), BTreeSet::from([3, 12]));
        std::fs::write(&json, r#"{"marks": [["a", 3], ["b", 0]]}"#).unwrap();
        assert_eq!(marks(&json).unwrap(), BTreeMap::from([("a".into(), 3), ("b".into(), 0)]));
        std::fs::write(&json, "test a::b ... ok\ntest a::c ... FAILED\n").unwrap();
        assert_eq!(failed_test(&json), Some("a::c".into()));
    }
}
