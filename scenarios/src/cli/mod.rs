//! The command line of `tapsim`.

mod args;
mod bench;
mod bugs;
mod crash;
mod fuzz;
mod in_order;
mod junit;
mod oracles;
mod output;
mod paths;
mod replay;
mod report;
mod sweeping;

pub use args::seeds_or_one;
pub use output::{load_run, revision};

use crate::interrupt;
use args::{Cli, Command};
use clap::{CommandFactory, FromArgMatches};
use std::process::ExitCode;

/// Exit statuses of the program; the numbers are part of its interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Exit {
    /// Nothing is broken.
    Ok = 0,
    /// An invariant is broken.
    Broken = 1,
    /// The command line, or a file that it names, is invalid.
    Usage = 2,
    /// Two runs of one seed differ.
    Nondeterminism = 3,
    /// There was nothing to run.
    NothingRan = 4,
    /// The testbed itself failed.
    Harness = 5,
    /// Stopped by Ctrl-C before anything broke.
    Interrupted = interrupt::STATUS,
}

/// An error that ends the program, as one line.
#[derive(Debug)]
pub struct Stop(pub Exit, pub String);

impl Stop {
    /// Wrong usage.
    pub fn usage(text: impl Into<String>) -> Self {
        Self(Exit::Usage, text.into())
    }
    /// A failure of the testbed.
    pub fn harness(text: impl Into<String>) -> Self {
        Self(Exit::Harness, text.into())
    }
}

/// Runs the program.
pub fn main() -> ExitCode {
    crate::run::prepare();
    let parsed = Cli::command().try_get_matches().and_then(|m| Ok((Cli::from_arg_matches(&m)?, m)));
    let (cli, matches) = match parsed {
        Ok(parsed) => parsed,
        Err(help) if !help.use_stderr() => help.exit(),
        Err(error) => {
            eprintln!("tapsim: {}; see tapsim --help", first_sentence(&error.to_string()));
            return ExitCode::from(Exit::Usage as u8);
        }
    };
    let result = args::refuse_without_effect(&matches)
        .and_then(|()| paths::try_outputs(&cli.common, args::uses(&matches, "out")))
        .and_then(|()| {
            interrupt::listen().map_err(|e| Stop::harness(format!("failed to watch for Ctrl-C: {e}")))
        })
        .and_then(|()| dispatch(&cli));
    match result {
        Ok(exit) => ExitCode::from(exit as u8),
        Err(Stop(exit, text)) => {
            eprintln!("tapsim: {text}");
            ExitCode::from(exit as u8)
        }
    }
}

fn dispatch(cli: &Cli) -> Result<Exit, Stop> {
    match cli.command {
        None => sweeping::minute(&cli.common),
        Some(Command::Sweep(ref args)) => sweeping::sweep_command(&cli.common, args),
        Some(Command::Run(ref args)) => replay::run_command(&cli.common, args),
        Some(Command::Replay(ref args)) => replay::replay_command(&cli.common, args),
        Some(Command::Shrink(ref args)) => replay::shrink_command(&cli.common, args),
        Some(Command::Explain(ref args)) => replay::explain_command(&cli.common, args),
        Some(Command::Report(ref args)) => report::report_command(&cli.common, args),
        Some(Command::List) => replay::list_command(&cli.common),
        Some(Command::Bugs(ref args)) => bugs::bugs_command(&cli.common, args),
        Some(Command::Fuzz(ref args)) => fuzz::fuzz_command(&cli.common, args),
        Some(Command::Crash(ref args)) => crash::crash_command(&cli.common, args),
        Some(Command::Bench(ref args)) => bench::bench_command(&cli.common, args),
        Some(Command::Demo) => bugs::demo_command(&cli.common),
    }
}

/// The error as one line: the parser appends usage after an empty line.
fn first_sentence(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).take_while(|l| !l.is_empty()).collect();
    lines.join(" ").trim_start_matches("error: ").to_owned()
}
