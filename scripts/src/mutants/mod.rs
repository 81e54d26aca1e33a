//! `cargo xtask mutants`: how many of the slips that engineers make would be noticed.
//!
//! ```text
//!   the tree ──► places ──► sample ──► scratch copy, all mutants in one binary, a number selects one
//!                                          │ those that do not compile are dropped
//!                                          ▼
//!                     sweeps without a mutant: must be clean; note which scenario reaches which mutant
//!                                          ▼
//!                     each mutant: sweeps of the scenarios that reach it, until one fails
//!                                          ▼
//!                     those that no sweep noticed: the tests that reach them
//! ```
//!
//! A mutant that is not reached cannot change anything, so leaving out those runs loses nothing.

mod equivalents;
mod operators;
mod render;
mod report;
mod sample;
mod scratch;
mod trial;

use report::{Fate, Report};
use sample::Mutant;
use scratch::{Executable, Scratch};
use std::collections::{BTreeMap, BTreeSet};
use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use trial::{Limit, Marks, Selection, Sweep, Usage};
use xshell::{Shell, cmd};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const HELP: &str = "\
Puts slips that engineers make into a copy of the stack, one at a time, and counts which of them sweeps and tests notice.

Usage: cargo xtask mutants [OPTIONS]

Options:
  --sample N      mutants to try [default: 150]
  --seed SEED     seed of the sample [default: the last commit that touched code of the drivers]
  --only PATH     files whose path begins like this, such as drivers/ring
  --seeds A..B    seeds of each scenario [default: 0..200]
  --jobs N        trials at a time [default: all cores]
  --sweeps-only   no tests for what the sweeps missed
  --list          only lists the sample; builds nothing
  --json FILE     writes the result as JSON, too
";

/// The options of the command line.
struct Options {
    sample: usize,
    seed: Option<u64>,
    only: String,
    seeds: String,
    jobs: usize,
    sweeps_only: bool,
    list: bool,
    json: Option<PathBuf>,
}

impl Options {
    fn parse(args: &[String]) -> Result<Option<Self>> {
        let mut options = Self {
            sample: 150,
            seed: None,
            only: "drivers/".into(),
            seeds: "0..200".into(),
            jobs: std::thread::available_parallelism().map_or(1, usize::from),
            sweeps_only: false,
            list: false,
            json: None,
        };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value =
                || args.next().ok_or(format!("{arg} needs a value: `cargo xtask mutants --help`"));
            match arg.as_str() {
                "--sample" => options.sample = value()?.parse()?,
                "--seed" => {
                    let text = value()?;
                    let hex = text.strip_prefix("0x").map(|digits| u64::from_str_radix(digits, 16));
                    options.seed = Some(hex.unwrap_or_else(|| text.parse())?);
                }
                "--only" => options.only = value()?.clone(),
                "--seeds" => options.seeds = value()?.clone(),
                "--jobs" => options.jobs = value()?.parse::<usize>()?.max(1),
                "--sweeps-only" => options.sweeps_only = true,
                "--list" => options.list = true,
                "--json" => options.json = Some(std::path::absolute(value()?)?),
                "--help" | "-h" => return Ok(None),
                other => return Err(format!("unknown option {other:?}: `cargo xtask mutants --help`").into()),
            }
        }
        Ok(Some(options))
    }
}

/// `cargo xtask mutants`
pub(crate) fn run(args: &[String]) -> Result<()> {
    let Some(options) = Options::parse(args)? else {
        print!("{HELP}");
        return Ok(());
    };
    let sh = Shell::new()?;
    let top = PathBuf::from(cmd!(sh, "git rev-parse --show-toplevel").quiet().read()?);
    sh.change_dir(&top);
    let equivalents = equivalents::load(&top)?;
    let seed = options.seed.map_or_else(|| sample::usual_seed(&sh), Ok)?;
    let all = sample::all(&sh, &top, &options.only)?;
    let places = all.len();
    let stale = equivalents.iter().filter(|e| options.only == "drivers/" && !all.iter().any(|m| e.is(m)));
    let stale: Vec<String> = stale.map(|e| format!("{} in {}: {}", e.operator, e.file, e.line)).collect();
    // Some will not compile; the surplus is not tried.
    let more = if options.list { options.sample } else { options.sample + options.sample / 2 + 10 };
    let chosen = sample::sample(all, more, seed);
    if options.list {
        for m in &chosen {
            println!("{} {}\n  - {}\n  + {}", m.place(), m.slip.operator, m.slip.was, m.slip.becomes);
        }
        println!("{} of {places} places, sample {seed:#018x}", chosen.len());
        return Ok(());
    }
    let scratch = Scratch::new(&sh, &top)?;
    let (mut kept, gone) = scratch.keep_what_compiles(chosen, |round, dropped| {
        eprintln!("  round {round}: {dropped} mutants do not compile");
    })?;
    // The mutants that were dropped to reach the sample, in its order.
    kept.truncate(options.sample);
    let last = kept.last().map_or(0, |m| m.number);
    let dropped = gone.iter().filter(|m| m.number <= last).count();
    let trials = Trials::prepare(&options, &scratch)?;
    let (aside, tried): (Vec<Mutant>, Vec<Mutant>) =
        kept.into_iter().partition(|m| equivalents.iter().any(|e| e.is(m)));
    let mut fates = trials.run(tried)?;
    for mutant in aside {
        let proof = equivalents.iter().find(|e| e.is(&mutant)).map_or(String::new(), |e| e.proof.clone());
        fates.push((mutant, Fate::Equivalent(proof)));
    }
    fates.sort_by(|a, b| (&a.0.file, a.0.line, a.0.number).cmp(&(&b.0.file, b.0.line, b.0.number)));
    let report = Report { seed, places, dropped, stale, fates, with_tests: !options.sweeps_only };
    if let Some(path) = &options.json {
        std::fs::write(path, format!("{:#}\n", report.json()))?;
    }
    println!("{}", report.text());
    Ok(())
}

/// A mark that was reached before and is not any more: a sweep of all scenarios would fail.
fn missed_mark<'a>(
    before: impl Iterator<Item = &'a Marks>,
    now: impl Iterator<Item = &'a Marks>,
) -> Option<String> {
    let reached: BTreeSet<&String> = now.flatten().filter(|(_, n)| **n > 0).map(|(mark, _)| mark).collect();
    before.flatten().find(|(mark, n)| **n > 0 && !reached.contains(mark)).map(|(mark, _)| mark.clone())
}

/// Everything needed to try a mutant.
struct Trials<'a> {
    options: &'a Options,
    scratch: &'a Scratch,
    tapsim: PathBuf,
    /// For each scenario, its results without a mutant.
    scenarios: BTreeMap<String, Baseline>,
}

/// The results of a scenario without a mutant.
struct Baseline {
    /// The mutants that it reaches.
    reached: BTreeSet<u32>,
    usage: Usage,
    /// How often it reaches each mark.
    marks: Marks,
}

impl<'a> Trials<'a> {
    /// Builds the simulator and sweeps without a mutant.
    fn prepare(options: &'a Options, scratch: &'a Scratch) -> Result<Self> {
        eprintln!("  building the simulator");
        let tapsim = scratch.simulator()?;
        let folder = scratch.folder();
        let list = folder.join("list.json");
        let sh = Shell::new()?;
        cmd!(sh, "{tapsim} list --json {list}").quiet().ignore_stdout().run()?;
        let list: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&list)?)?;
        let names = list["scenarios"].as_array().ok_or("tapsim lists no scenarios")?;
        let names: Vec<String> = names.iter().filter_map(|s| Some(s["name"].as_str()?.to_string())).collect();
        let bar = Bar::new("scenarios without a mutant", names.len());
        let mut scenarios = BTreeMap::new();
        for name in names {
            let reached = folder.join("reached");
            let _ = std::fs::remove_file(&reached);
            let selection = Selection { mutant: 0, reached: Some(reached.clone()) };
            let (seeds, jobs) = (options.seeds.as_str(), options.jobs);
            let sweep = Sweep { tapsim: &tapsim, scenarios: vec![name.clone()], seeds, jobs };
            let (finding, usage) =
                sweep.run(&folder, "baseline", &selection, Limit::FIRST).map_err(|e| e.to_string())?;
            if let Some(f) = finding {
                return Err(format!("{name} fails without a mutant, seed {:?}: {}", f.seed, f.how).into());
            }
            bar.step();
            let marks = trial::marks(&folder.join("baseline.json")).map_err(|e| e.to_string())?;
            scenarios.insert(name, Baseline { reached: trial::reached(&reached), usage, marks });
        }
        Ok(Self { options, scratch, tapsim, scenarios })
    }

    fn run(&self, mutants: Vec<Mutant>) -> Result<Vec<(Mutant, Fate)>> {
        let mut fates = Vec::new();
        let mut missed = Vec::new();
        let swept = self.each("swept", mutants, |mutant| self.sweep(mutant))?;
        for (mutant, finding) in swept {
            match finding {
                Some(finding) => fates.push((mutant, Fate::Sweep(finding))),
                None => missed.push(mutant),
            }
        }
        if self.options.sweeps_only || missed.is_empty() {
            let fate = |m: Mutant| {
                let swept = self.is_swept(&m);
                (m, Fate::Survived { swept, tested: false })
            };
            fates.extend(missed.into_iter().map(fate));
            return Ok(fates);
        }
        let tests = self.prepare_tests()?;
        fates.extend(self.each("tested", missed, |mutant| self.test(mutant, &tests))?);
        Ok(fates)
    }

    /// Runs `work` on each mutant, with the requested number of jobs.
    fn each<T: Send>(
        &self,
        what: &str,
        mutants: Vec<Mutant>,
        work: impl Fn(&Mutant) -> std::result::Result<T, Box<dyn std::error::Error + Send + Sync>> + Sync,
    ) -> Result<Vec<(Mutant, T)>> {
        let bar = Bar::new(what, mutants.len());
        let next = AtomicUsize::new(0);
        let done = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..self.options.jobs {
                scope.spawn(|| {
                    while let Some(mutant) = mutants.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let result = work(mutant);
                        bar.step();
                        done.lock().expect("no panic while results are held").push((mutant.clone(), result));
                    }
                });
            }
        });
        let done = done.into_inner().expect("no panic while results are held");
        let results = done.into_iter().map(|(m, r)| r.map(|r| (m, r)));
        results.collect::<std::result::Result<_, _>>().map_err(|e| e.to_string().into())
    }

    fn is_swept(&self, mutant: &Mutant) -> bool {
        self.scenarios.values().any(|one| one.reached.contains(&mutant.number))
    }

    fn sweep(
        &self,
        mutant: &Mutant,
    ) -> std::result::Result<Option<trial::Finding>, Box<dyn std::error::Error + Send + Sync>> {
        let (that_reach, others): (Vec<_>, Vec<_>) =
            self.scenarios.iter().partition(|(_, one)| one.reached.contains(&mutant.number));
        if that_reach.is_empty() {
            return Ok(None);
        }
        let scenarios: Vec<String> = that_reach.iter().map(|(name, _)| (*name).clone()).collect();
        let sum = |of: fn(&Usage) -> Duration| that_reach.iter().map(|(_, one)| of(&one.usage)).sum();
        // The sweeps without a mutant had all cores.
        let wall = sum(|u| u.wall) * self.options.jobs as u32;
        let limit = Limit::after(Usage { cpu: sum(|u| u.cpu), wall });
        let sweep = Sweep { tapsim: &self.tapsim, scenarios, seeds: &self.options.seeds, jobs: 1 };
        let selection = Selection { mutant: mutant.number, reached: None };
        let name = format!("mutant-{}", mutant.number);
        let finding = sweep.run(&self.scratch.folder(), &name, &selection, limit)?.0;
        if finding.is_some() {
            return Ok(finding);
        }
        let left = trial::marks(&self.scratch.folder().join(format!("{name}.json")))?;
        let others = others.iter().map(|(_, one)| &one.marks).chain([&left]);
        let mark = missed_mark(that_reach.iter().map(|(_, one)| &one.marks), others);
        let finding = |mark| trial::Finding {
            scenario: sweep.scenarios.join(" "),
            seed: None,
            how: format!("no run reaches the mark {mark}"),
        };
        Ok(mark.map(finding))
    }

    /// Builds the tests and runs them without a mutant.
    fn prepare_tests(&self) -> Result<Vec<(Executable, BTreeSet<u32>, Usage)>> {
        eprintln!("  building tests");
        let built = self.scratch.tests()?;
        let folder = self.scratch.folder();
        let bar = Bar::new("tests without a mutant", built.len());
        let mut tests = Vec::new();
        for executable in built {
            let reached = folder.join("reached");
            let _ = std::fs::remove_file(&reached);
            let selection = Selection { mutant: 0, reached: Some(reached.clone()) };
            let (failed, usage) = trial::test(&executable, &folder, "baseline", &selection, Limit::FIRST)
                .map_err(|e| e.to_string())?;
            bar.step();
            if let Some(test) = failed {
                eprintln!("  {} is left out: {test} fails without a mutant", executable.name);
                continue;
            }
            tests.push((executable, trial::reached(&reached), usage));
        }
        // The quick ones first.
        tests.sort_by_key(|(_, _, usage)| usage.wall);
        Ok(tests)
    }

    fn test(
        &self,
        mutant: &Mutant,
        tests: &[(Executable, BTreeSet<u32>, Usage)],
    ) -> std::result::Result<Fate, Box<dyn std::error::Error + Send + Sync>> {
        let selection = Selection { mutant: mutant.number, reached: None };
        let mut tested = false;
        for (executable, reached, usage) in tests {
            if !reached.contains(&mutant.number) {
                continue;
            }
            tested = true;
            let name = format!("mutant-{}", mutant.number);
            let usual = Usage { cpu: usage.cpu, wall: usage.wall * self.options.jobs as u32 };
            let (failed, _) =
                trial::test(executable, &self.scratch.folder(), &name, &selection, Limit::after(usual))?;
            if let Some(test) = failed {
                return Ok(Fate::Test(executable.name.clone(), test));
            }
        }
        Ok(Fate::Survived { swept: self.is_swept(mutant), tested })
    }
}

/// The interval between lines of progress without a terminal.
const SAY_EVERY: Duration = Duration::from_secs(10);
/// Width of the bar in characters.
const WIDTH: usize = 40;

/// Progress: a bar on a terminal, otherwise an occasional line.
struct Bar<'a> {
    what: &'a str,
    total: usize,
    done: AtomicUsize,
    start: Instant,
    said: Mutex<Instant>,
}

impl<'a> Bar<'a> {
    fn new(what: &'a str, total: usize) -> Self {
        Self {
            what,
            total,
            done: AtomicUsize::new(0),
            start: Instant::now(),
            said: Mutex::new(Instant::now()),
        }
    }

    fn step(&self) {
        let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
        let mut said = self.said.lock().expect("no panic while a line is printed");
        let seconds = self.start.elapsed().as_secs();
        if std::io::stderr().is_terminal() {
            let filled = done * WIDTH / self.total.max(1);
            let end = if done == self.total { "\n" } else { "" };
            eprint!(
                "\r{:█<filled$}{:░<rest$} {done}/{} {} [{seconds} s]{end}",
                "",
                "",
                self.total,
                self.what,
                rest = WIDTH - filled
            );
        } else if done == self.total || said.elapsed() >= SAY_EVERY {
            *said = Instant::now();
            eprintln!("  {done} of {} {}, {seconds} s", self.total, self.what);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_that_nobody_reaches_any_more_is_a_finding() {
        let marks =
            |all: &[(&str, u64)]| all.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect::<Marks>();
        let (before, now) = (marks(&[("a", 2), ("b", 1), ("c", 0)]), marks(&[("a", 1), ("b", 0), ("c", 0)]));
        assert_eq!(missed_mark([&before].into_iter(), [&now].into_iter()), Some("b".into()));
        let others = marks(&[("b", 7)]);
        assert_eq!(missed_mark([&before].into_iter(), [&now, &others].into_iter()), None);
    }
}
