//! `cargo xtask coverage`: which lines no sweep executes.
//!
//! ```text
//!   tapsim, built with counters ─► sweep ─► profile ─► llvm-cov ─► lines with a count of 0, by file
//! ```

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{create_dir_all, read_dir, remove_file};
use std::path::{Path, PathBuf};
use xshell::{Shell, cmd};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const HELP: &str = "\
Shows which lines no sweep executes.

Usage: cargo xtask coverage [OPTIONS] [PATH...]

Arguments:
  PATH...        files and folders [default: drivers/programs/src drivers/core/src/disk.rs drivers/core/src/cache.rs]

Options:
  --seeds A..B   seeds of each scenario [default: 0..300]

It needs rustup's component llvm-tools, and builds into target/coverage.
";

/// What is looked at if nothing is named: the programs that ship, and what builds their disks.
const PATHS: [&str; 3] = ["drivers/programs/src", "drivers/core/src/disk.rs", "drivers/core/src/cache.rs"];

const FOLDER: &str = "target/coverage";

/// For each file its lines with their counts.
type Counts = BTreeMap<String, BTreeMap<u32, u64>>;

pub(crate) fn run(args: &[String]) -> Result<()> {
    let (mut paths, mut seeds) = (Vec::new(), "0..300".to_owned());
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--help" | "-h" => {
                print!("{HELP}");
                return Ok(());
            }
            "--seeds" => seeds = args.next().ok_or("--seeds needs a range, like 0..300")?.clone(),
            option if option.starts_with('-') => {
                return Err(format!("unknown option {option}: see `cargo xtask coverage --help`").into());
            }
            path => paths.push(path.to_owned()),
        }
    }
    if paths.is_empty() {
        paths = PATHS.map(str::to_owned).to_vec();
    }
    let sh = Shell::new()?;
    let tools = tools(&sh)?;
    let lcov = measure(&sh, &tools, &seeds)?;
    let counts = parse(&lcov, &std::env::current_dir()?, &paths);
    if counts.is_empty() {
        return Err(format!("no file of {} is in tapsim", paths.join(", ")).into());
    }
    print!("{}", report(&counts));
    Ok(())
}

/// The folder of LLVM's tools that fit the compiler.
fn tools(sh: &Shell) -> Result<PathBuf> {
    let (root, about) = (cmd!(sh, "rustc --print sysroot").read()?, cmd!(sh, "rustc -vV").read()?);
    let host =
        about.lines().find_map(|line| line.strip_prefix("host: ")).ok_or("rustc does not name its host")?;
    let folder = Path::new(&root).join("lib/rustlib").join(host).join("bin");
    if !folder.join("llvm-cov").exists() {
        return Err("llvm-cov is missing: install it with `rustup component add llvm-tools`".into());
    }
    Ok(folder)
}

/// Builds tapsim with counters and sweeps; returns what llvm-cov exports.
fn measure(sh: &Shell, tools: &Path, seeds: &str) -> Result<String> {
    let profiles = Path::new(FOLDER).join("profiles");
    create_dir_all(&profiles)?;
    let flags = r#"target."cfg(all())".rustflags=["-Cinstrument-coverage"]"#;
    // Programs of the build count, too; what they write is removed below.
    let pattern = std::env::current_dir()?.join(&profiles).join("%p.profraw");
    let build =
        cmd!(sh, "cargo build --release --locked --bin tapsim --target-dir {FOLDER} --config {flags}");
    build.env("LLVM_PROFILE_FILE", &pattern).run()?;
    for old in read_dir(&profiles)? {
        remove_file(old?.path())?;
    }
    let tapsim = format!("{FOLDER}/release/tapsim");
    let sweep = cmd!(sh, "{tapsim} sweep --seeds {seeds}").env("LLVM_PROFILE_FILE", &pattern);
    sweep.ignore_stdout().run()?;
    let (profdata, cov) = (tools.join("llvm-profdata"), tools.join("llvm-cov"));
    let merged = format!("{FOLDER}/merged.profdata");
    cmd!(sh, "{profdata} merge -sparse {profiles} -o {merged}").run()?;
    Ok(cmd!(sh, "{cov} export {tapsim} -instr-profile={merged} -format=lcov").quiet().read()?)
}

/// Reads the counts of the files below `paths` out of LCOV's format.
fn parse(lcov: &str, root: &Path, paths: &[String]) -> Counts {
    let (mut counts, mut file) = (Counts::new(), None);
    for line in lcov.lines() {
        if let Some(path) = line.strip_prefix("SF:") {
            let name = Path::new(path).strip_prefix(root).ok();
            let wanted = name.filter(|name| paths.iter().any(|path| name.starts_with(path)));
            file = wanted.map(|name| name.display().to_string());
        } else if let (Some(file), Some(data)) = (&file, line.strip_prefix("DA:")) {
            let mut numbers = data.split(',');
            let line = numbers.next().and_then(|n| n.parse::<u32>().ok());
            let count = numbers.next().and_then(|n| n.parse::<u64>().ok());
            if let (Some(line), Some(count)) = (line, count) {
                *counts.entry(file.clone()).or_default().entry(line).or_default() += count;
            }
        }
    }
    counts
}

/// A line for each file: how many of its lines are executed, and which are not.
fn report(counts: &Counts) -> String {
    let mut text = String::new();
    for (file, lines) in counts {
        let missed: Vec<u32> =
            lines.iter().filter(|(_, count)| **count == 0).map(|(line, _)| *line).collect();
        let executed = lines.len() - missed.len();
        let ranges = ranges(&missed);
        writeln!(text, "{file}: {executed} of {} lines{ranges}", lines.len())
            .expect("a string takes everything");
    }
    text
}

fn ranges(missed: &[u32]) -> String {
    let mut parts: Vec<(u32, u32)> = Vec::new();
    for line in missed {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == *line => *last = *line,
            _ => parts.push((*line, *line)),
        }
    }
    let show = |(first, last): &(u32, u32)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    let parts: Vec<String> = parts.iter().map(show).collect();
    if parts.is_empty() { String::new() } else { format!("; not {}", parts.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_nothing_executes_are_told() {
        let lcov = "SF:/r/a/x.rs\nDA:1,0\nDA:2,0\nDA:4,0\nDA:5,3\nend_of_record\nSF:/r/b/y.rs\nDA:1,1\n\
                    end_of_record\nSF:/r/a/x.rs\nDA:2,1\nend_of_record\nSF:/other/a/z.rs\nDA:1,0\n";
        let counts = parse(lcov, Path::new("/r"), &["a".to_owned()]);
        assert_eq!(report(&counts), "a/x.rs: 2 of 4 lines; not 1, 4\n");
        let both = parse(lcov, Path::new("/r"), &["a".to_owned(), "b/y.rs".to_owned()]);
        assert_eq!(report(&both), "a/x.rs: 2 of 4 lines; not 1, 4\nb/y.rs: 1 of 1 lines\n");
        assert_eq!(ranges(&[3, 4, 5, 9]), "; not 3-5, 9");
    }
}
