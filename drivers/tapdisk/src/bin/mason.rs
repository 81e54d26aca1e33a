//! `mason` on a real host.

use std::env::args_os;
use std::process::ExitCode;
use tap_linux::{Level, Options, resolve_without_plugins};
use tap_programs::mason::{Cli, run};
use tap_programs::usage;
use tapdisk::{Terminal, VERSION};

/// A wrong command line, as for the other programs.
const UNUSABLE: u8 = 2;

fn main() -> ExitCode {
    // A program with its own C library must not load parts of another.
    if cfg!(target_feature = "crt-static") {
        resolve_without_plugins();
    }
    let cli: Cli = match usage::parse(("mason", VERSION), args_os(), UNUSABLE, &Terminal::new("mason")) {
        Ok(cli) => cli,
        Err(status) => return ExitCode::from(status),
    };
    let options = Options { log_level: Level::Warning, ..Options::default() };
    let run = |host| async move {
        let terminal = Terminal::new("mason");
        let status = run(host, cli, &terminal).await;
        terminal.status(status)
    };
    match tap_linux::run(&options, run) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("mason: failed to {error}");
            ExitCode::FAILURE
        }
    }
}
