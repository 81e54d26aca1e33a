//! `tap-ctl` on a real host.

use std::env::{args_os, current_exe};
use std::process::{Command, ExitCode, Stdio};
use tap_linux::{Level, Options, keep_descriptors, resolve_without_plugins};
use tap_programs::ctl::{Cli, Launch, run};
use tap_programs::usage;
use tapdisk::{Terminal, VERSION, make_control_folder};

/// EINVAL, as other failures have their error numbers.
const UNUSABLE: u8 = 22;

/// Starts the `tapdisk` that is beside this program.
struct Beside;

impl Launch for Beside {
    // Blocks the thread, which has nothing else to do.
    async fn tapdisk(&self, folder: &str, options: &[String]) -> Result<u32, String> {
        let mut program = current_exe().map_err(|error| format!("find out where tap-ctl is: {error}"))?;
        program.set_file_name("tapdisk");
        let shown = program.display();
        let mut command = Command::new(&program);
        command.args(["control", "--fork", "--folder", folder]).args(options);
        let started = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
        let started = started.map_err(|error| format!("start {shown}: {error}"))?;
        if !started.status.success() {
            return Err(format!("start {shown}: it ended with {}", started.status));
        }
        let said = String::from_utf8_lossy(&started.stdout);
        let path = said.lines().next().unwrap_or_default();
        let name = path.rsplit_once('/').map_or(path, |(_, name)| name);
        tap_programs::ctl::pid_of(name).ok_or_else(|| format!("understand what {shown} says: {said}"))
    }
}

fn main() -> ExitCode {
    // A program with its own C library must not load parts of another.
    if cfg!(target_feature = "crt-static") {
        resolve_without_plugins();
    }
    let cli: Cli = match usage::parse(("tap-ctl", VERSION), args_os(), UNUSABLE, &Terminal::new("tap-ctl")) {
        Ok(cli) => cli,
        Err(status) => return ExitCode::from(status),
    };
    // The tapdisks that it starts live longer than it does.
    keep_descriptors();
    // Without permission what needs the folder fails, and says so.
    let _made = make_control_folder(&cli.folder);
    let options = Options { log_level: Level::Warning, ..Options::default() };
    let run = |host| async move {
        let terminal = Terminal::new("tap-ctl");
        let status = run(&host, cli, &Beside, &terminal).await;
        terminal.status(status)
    };
    match tap_linux::run(&options, run) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("tap-ctl: failed to {error}");
            ExitCode::FAILURE
        }
    }
}
