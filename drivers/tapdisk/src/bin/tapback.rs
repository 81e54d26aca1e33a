//! `tapback` on a real host.

use std::env::args_os;
use std::process::ExitCode;
use std::rc::Rc;
use tap_linux::{Options, PidFile, Rings, XenOptions, resolve_without_plugins, run};
use tap_programs::Console;
use tap_programs::tapback::{self, Cli};
use tap_programs::usage;
use tapdisk::{Terminal, VERSION};

/// Exit status if the command line cannot be parsed.
const UNUSABLE: u8 = 2;

fn main() -> ExitCode {
    // A program with its own C library must not load parts of another.
    if cfg!(target_feature = "crt-static") {
        resolve_without_plugins();
    }
    let cli: Cli = match usage::parse(("tapback", VERSION), args_os(), UNUSABLE, &Terminal::new("tapback")) {
        Ok(cli) => cli,
        Err(status) => return ExitCode::from(status),
    };
    match serve(cli) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("tapback: failed to {error}");
            ExitCode::FAILURE
        }
    }
}

/// Serves to the end, and returns the exit status.
fn serve(cli: Cli) -> Result<u8, String> {
    // Kept to the end. Not served without it, because nobody would know whom to stop.
    let _pid_file =
        cli.pid_file.as_deref().map(PidFile::create).transpose().map_err(|error| error.to_string())?;
    let options = Options {
        run_folder: Some(cli.run_dir.clone()),
        xen: Some(XenOptions { rings: Rings::Unused, ..XenOptions::default() }),
        ..Options::default()
    };
    let program = |host| async move {
        let terminal = Rc::new(Terminal::of_service("tapback", None));
        let status = tapback::run(host, cli, Rc::clone(&terminal) as Rc<dyn Console>).await;
        terminal.status(status)
    };
    run(&options, program).map_err(|error| error.to_string())
}
