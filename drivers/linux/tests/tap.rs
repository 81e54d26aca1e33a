//! The conformance suite's bodies about blktap2 on a real module: the same that kernel-model/tests/tap.rs runs.
//!
//! Without a module every test is reported as ignored. `cargo xtask xen-host test blktap-device --blktap-module FILE`
//! runs it in an emulated dom0.

use libtest_mimic::{Arguments, Completion, Trial};
use std::path::Path;
use std::process::ExitCode;
use tap_conformance::{Place, tap};
use tap_linux::{Options, run};

/// Where modules have their control node.
const CONTROLS: [&str; 3] = ["/dev/xen/blktap-2/control", "/dev/blktap/control", "/dev/blktap-control"];

fn main() -> ExitCode {
    let mut args = Arguments::from_args();
    // A body counts on being alone.
    args.test_threads = Some(1);
    let trials = tap::all().into_iter().map(|test| {
        Trial::ignorable_test(test.name, move || {
            if !CONTROLS.iter().any(|path| Path::new(path).exists()) {
                return Ok(Completion::ignored_with("there is no blktap2 module"));
            }
            let body = test.body;
            run(&Options::default(), move |host| {
                body(Place { host, folder: "/tmp".into(), direct: false, device: None, tcp: false })
            })
            .map_err(|error| error.to_string())??;
            Ok(Completion::Completed)
        })
    });
    libtest_mimic::run(&args, trials.collect()).exit_code()
}
