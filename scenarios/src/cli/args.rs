//! The command line.

use super::Stop;
use crate::formats;
use crate::fuzz::SUBJECTS;
use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, Parser, Subcommand, ValueEnum};
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  tapsim                              everything, for 45 seconds
  tapsim demo                         switch a bug on, find it, shrink it, tell its story
  tapsim list                         the scenarios
  tapsim sweep --seeds 0..2000        these seeds of every scenario
  tapsim sweep raw-power-cut --for 60s
  tapsim run raw-power-cut 145        one seed
  tapsim replay FILE --log full       a saved failure, with every line of its trace
  tapsim explain FILE                 a saved failure as a story
  tapsim report FILE                  the same as a page with a timeline
  tapsim fuzz --for 60s               fuzz an image format
  tapsim bugs                         every seeded bug must be found

Ctrl-C stops the work and reports what was done so far.

Exit status: 0 ok, 1 an invariant is broken, 2 wrong usage, 3 two runs of one seed differ, 4 nothing ran,
5 the testbed itself failed, 130 stopped by Ctrl-C.";

/// A tapdisk stack under a deterministic simulator of Linux and Xen, with faults and crashes.
#[derive(Parser, Debug)]
#[command(name = "tapsim", version, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub common: Common,
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// On or off.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Switch {
    /// Yes.
    On,
    /// No.
    Off,
}

/// How much of the trace is printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum LogLevel {
    /// The last events of a failure.
    Tail,
    /// Every event and every turn of a task.
    Full,
}

/// Options of several commands; [`refuse_without_effect`] says of which.
#[derive(Args, Debug, Clone)]
pub(crate) struct Common {
    /// Threads [default: all cores]
    #[arg(long, global = true, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub jobs: Option<u16>,
    /// Whether worlds run inside madsim, which blocks real clocks, randomness and threads
    #[arg(long, global = true, value_enum, default_value = "on")]
    pub guard: Switch,
    /// Also writes the result as JSON to this file
    #[arg(long, global = true, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Also writes the result as JUnit's XML to this file
    #[arg(long, global = true, value_name = "FILE")]
    pub junit: Option<PathBuf>,
    /// How much of the trace is printed
    #[arg(long, global = true, value_enum, default_value = "tail")]
    pub log: LogLevel,
    /// Where failures are saved
    #[arg(long, global = true, value_name = "DIR", default_value = "tapsim-failures")]
    pub out: PathBuf,
}

impl Common {
    /// Number of threads to use.
    pub(super) fn threads(&self) -> usize {
        self.jobs.map_or_else(|| std::thread::available_parallelism().map_or(1, Into::into), usize::from)
    }
    /// Whether worlds run guarded: requested, and built in.
    pub(super) fn guarded(&self) -> bool {
        self.guard == Switch::On && sim::guard::AVAILABLE
    }
}

/// The common options that the command of `matches` uses, and its name; without a command, those of a sweep.
fn used_by(matches: &ArgMatches) -> (&'static [&'static str], &str) {
    let Some((name, of)) = matches.subcommand() else { return (SWEEPS, "") };
    let used: &[&str] = match name {
        "sweep" => SWEEPS,
        "run" => &["guard", "json", "log", "out"],
        "replay" => &["guard", "json", "log"],
        "bugs" if of.get_flag("oracles") => &["jobs", "guard", "json"],
        "bugs" => &["jobs", "guard", "json", "junit", "out"],
        "fuzz" | "crash" => &["jobs", "guard", "json", "log", "out"],
        "bench" => &["guard", "json"],
        "demo" => &["guard", "out"],
        "list" => &["json"],
        _ => &["guard"],
    };
    (used, name)
}

const SWEEPS: &[&str] = &["jobs", "guard", "json", "junit", "log", "out"];

/// Whether the command of `matches` uses the common option `id`.
pub(super) fn uses(matches: &ArgMatches, id: &str) -> bool {
    used_by(matches).0.contains(&id)
}

/// Refuses a common option that the command ignores.
pub(super) fn refuse_without_effect(matches: &ArgMatches) -> Result<(), Stop> {
    let of = matches.subcommand().map_or(matches, |(_, of)| of);
    let given = |id: &&&str| of.value_source(id) == Some(ValueSource::CommandLine);
    match SWEEPS.iter().filter(given).find(|id| !uses(matches, id)) {
        Some(id) => Err(Stop::usage(format!("--{id} has no effect on {}", used_by(matches).1))),
        None => Ok(()),
    }
}

/// The commands.
#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Runs many seeds of scenarios
    Sweep(SweepArgs),
    /// Runs one seed of one scenario
    Run(RunArgs),
    /// Runs a saved failure again
    Replay(FileArgs),
    /// Shrinks a saved failure further
    Shrink(FileArgs),
    /// Tells the story of a saved failure
    Explain(FileArgs),
    /// Makes a page of a saved failure, to look at in a browser; of a folder, a page of each and a table
    Report(ReportArgs),
    /// Lists scenarios, seeded bugs and invariants
    List,
    /// Finds and shrinks every seeded bug
    Bugs(BugsArgs),
    /// Fuzzes a format: crashes, faults and damaged images made from bytes
    Fuzz(FuzzArgs),
    /// Cuts the power on a given image, repeatedly
    Crash(CrashArgs),
    /// Measures the testbed: simulated requests per second of CPU, memory, effect of merging
    Bench(BenchArgs),
    /// Switches a seeded bug on, finds it, shrinks it and tells its story
    Demo,
}

/// Formats of which images can be loaded from files.
fn formats_outside() -> PossibleValuesParser {
    let walkable = formats::ALL.iter().filter(|model| model.has_metadata());
    walkable.map(|model| PossibleValue::new(model.format().name())).collect::<Vec<_>>().into()
}

/// The targets of fuzzing.
fn subjects() -> PossibleValuesParser {
    SUBJECTS.iter().map(|subject| PossibleValue::new(subject.name)).collect::<Vec<_>>().into()
}

/// `crash`
#[derive(Args, Debug, Clone)]
pub(crate) struct CrashArgs {
    /// Format of the image
    #[arg(long, value_parser = formats_outside())]
    pub format: String,
    /// The image; it is read into memory and never written to, and neither are its backing files
    #[arg(long, value_name = "FILE")]
    pub image: PathBuf,
    /// Seeds A up to, not including, B [default: 0..500]
    #[arg(long, value_name = "A..B", value_parser = parse_seeds)]
    pub seeds: Option<Range<u64>>,
    /// Number of seeds for which every crash state is checked
    #[arg(long, default_value_t = 4, value_name = "N")]
    pub explore: u64,
}

/// `bench`
#[derive(Args, Debug, Clone)]
pub(crate) struct BenchArgs {
    /// Guest requests per world
    #[arg(long, default_value_t = 1_000_000, value_name = "N", value_parser = clap::value_parser!(u64).range(1000..=1_000_000_000))]
    pub requests: u64,
    /// Crash states per image
    #[arg(long, default_value_t = 20_000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    pub states: u64,
    /// Runs of each world, of which the best counts
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
}

/// `sweep`
#[derive(Args, Debug, Clone)]
pub(crate) struct SweepArgs {
    /// Scenarios [default: all]
    pub scenarios: Vec<String>,
    /// Seeds A up to, not including, B
    #[arg(long, value_name = "A..B", value_parser = parse_seeds, conflicts_with = "time")]
    pub seeds: Option<Range<u64>>,
    /// Continues with new seeds for this long, such as 60s or 5m
    #[arg(long = "for", value_name = "TIME", value_parser = parse_time, id = "time")]
    pub time: Option<Duration>,
    /// Total number of runs; new scenarios get a larger share
    #[arg(long, value_name = "N", conflicts_with_all = ["time", "seeds"], value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    pub runs: Option<u64>,
    /// First seed [default: 0]
    #[arg(
        long,
        default_value_t = 0,
        hide_default_value = true,
        value_name = "SEED",
        conflicts_with = "seeds"
    )]
    pub from: u64,
    /// Switches a seeded bug on
    #[arg(long, value_name = "NAME")]
    pub bug: Option<String>,
    /// Uses a drive that lies about flushes: must fail
    #[arg(long)]
    pub canary: bool,
    /// Stops at the first failure
    #[arg(long, conflicts_with = "check_determinism")]
    pub stop: bool,
    /// Lists failures, which are neither shrunk nor saved
    #[arg(long)]
    pub no_shrink: bool,
    /// Runs every seed twice, with the guard on and off, and compares
    #[arg(long, conflicts_with = "time")]
    pub check_determinism: bool,
}

/// `run`
#[derive(Args, Debug, Clone)]
pub(crate) struct RunArgs {
    /// The scenario
    pub scenario: String,
    /// The seed
    pub seed: u64,
    /// Switches a seeded bug on
    #[arg(long, value_name = "NAME")]
    pub bug: Option<String>,
    /// Uses a drive that lies about flushes
    #[arg(long)]
    pub canary: bool,
}

/// `replay`, `shrink`, `explain`
#[derive(Args, Debug, Clone)]
pub(crate) struct FileArgs {
    /// A decision file
    pub file: PathBuf,
}

/// `report`
#[derive(Args, Debug, Clone)]
pub(crate) struct ReportArgs {
    /// A decision file, or a folder of them
    pub path: PathBuf,
    /// The page [default: beside the decision file, with the ending html]
    #[arg(long, value_name = "FILE")]
    pub page: Option<PathBuf>,
    /// Also writes the run as trace events in virtual time, for ui.perfetto.dev
    #[arg(long, value_name = "FILE")]
    pub perfetto: Option<PathBuf>,
}

/// `bugs`
#[derive(Args, Debug, Clone)]
pub(crate) struct BugsArgs {
    /// Seeded bugs [default: all, and the canary]; with --oracles, broken oracles
    pub bugs: Vec<String>,
    /// Maximum number of seeds per bug: in the scenario of its saved run first, then in all
    #[arg(long, default_value_t = 2000, value_name = "N")]
    pub within: u64,
    /// Saves each shrunk run as SAVED/BUG.run, which `cargo test` replays
    #[arg(long)]
    pub save: bool,
    /// Only those whose run in SAVED is missing or no longer shows them
    #[arg(long)]
    pub stale: bool,
    /// Breaks each checker in turn instead: a saved run or a test must notice
    #[arg(long, conflicts_with_all = ["save", "stale", "within"])]
    pub oracles: bool,
    /// The folder of saved runs
    #[arg(long, value_name = "DIR", default_value = "scenarios/regressions")]
    pub saved: PathBuf,
}

/// `fuzz`
#[derive(Args, Debug, Clone)]
pub(crate) struct FuzzArgs {
    /// The image format, or the protocol [default: the first]
    #[arg(long, value_parser = subjects())]
    pub format: Option<String>,
    /// How long, such as 60s or 5m
    #[arg(long = "for", value_name = "TIME", value_parser = parse_time, default_value = "60s", id = "time")]
    pub time: Duration,
    /// Switches a seeded bug on, and stops when it is found
    #[arg(long, value_name = "NAME")]
    pub bug: Option<String>,
    /// Seed of the inputs
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

fn parse_seeds(text: &str) -> Result<Range<u64>, String> {
    let bad = || format!("{text:?} is not a range of seeds such as 0..2000");
    let (a, b) = text.split_once("..").ok_or_else(bad)?;
    let (a, b) = (a.trim().parse().map_err(|_| bad())?, b.trim().parse().map_err(|_| bad())?);
    if a >= b {
        return Err(format!("the range {text} is empty: its end is not included"));
    }
    Ok(a..b)
}

fn parse_time(text: &str) -> Result<Duration, String> {
    let bad = || format!("{text:?} is not a time such as 60s, 5m or 1h");
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let n: u64 = number.parse().map_err(|_| bad())?;
    let seconds = match unit {
        "" | "s" => Some(n),
        "m" => n.checked_mul(60),
        "h" => n.checked_mul(3600),
        _ => None,
    };
    seconds.filter(|s| *s > 0).map(Duration::from_secs).ok_or_else(bad)
}

/// Reads a range of seeds, as `--seeds` does, or a single seed.
pub fn seeds_or_one(text: &str) -> Result<Range<u64>, String> {
    match text.trim().parse::<u64>() {
        Ok(seed) if seed < u64::MAX => Ok(seed..seed + 1),
        _ => parse_seeds(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_parses() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        assert_eq!(parse_seeds("3..7"), Ok(3..7));
        assert!(parse_seeds("7..3").is_err() && parse_seeds("7").is_err() && parse_seeds("a..b").is_err());
        assert_eq!(parse_time("5m"), Ok(Duration::from_secs(300)));
        assert!(
            parse_time("5x").is_err()
                && parse_time("0s").is_err()
                && parse_time("99999999999999999999s").is_err()
        );
        assert_eq!(seeds_or_one("9"), Ok(9..10));
    }
}
