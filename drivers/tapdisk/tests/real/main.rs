//! The programs on this machine: real files, real sockets, real signals.
//!
//! A test that needs something the machine lacks (QEMU's tools, libnbd's tools, permission to mount) reports itself
//! ignored, with the reason.

mod alike;
mod bad;
mod check;
mod client;
mod control;
mod crash;
mod fork;
mod hangs;
mod merge;
mod peers;
mod priority;
mod server;
mod snapshot;
mod space;
mod tls;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use std::process::{Command, ExitCode};

/// The result of a test.
type Done = Result<(), Failed>;

fn main() -> ExitCode {
    let args = Arguments::from_args();
    let mut trials = Vec::new();
    let mut add = |name: String, needs: &'static [&'static str], test: Box<dyn FnOnce() -> Done + Send>| {
        trials.push(Trial::ignorable_test(name, move || {
            if let Some(missing) = needs.iter().find(|tool| !is_there(tool)) {
                return Ok(Completion::ignored_with(format!("{missing} is not installed")));
            }
            test().map(|()| Completion::Completed)
        }));
    };
    peers::tests(&mut add);
    crash::tests(&mut add);
    bad::tests(&mut add);
    alike::tests(&mut add);
    fork::tests(&mut add);
    control::tests(&mut add);
    priority::tests(&mut add);
    snapshot::tests(&mut add);
    merge::tests(&mut add);
    check::tests(&mut add);
    tls::tests(&mut add);
    trials.extend(space::tests());
    trials.extend(hangs::tests());
    trials.extend(check::trials());
    libtest_mimic::run(&args, trials).exit_code()
}

/// Adds a test, with its name and the tools that it needs.
type Add<'a> = &'a mut dyn FnMut(String, &'static [&'static str], Box<dyn FnOnce() -> Done + Send>);

fn is_there(tool: &str) -> bool {
    Command::new(tool).arg("--version").output().is_ok()
}
