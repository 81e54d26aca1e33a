//! The conformance suite on the models: the same bodies that drivers/linux/tests/conformance.rs runs on the real kernel.
//!
//! Each body runs in a few worlds: a quiet one, then ones with short transfers and late turns, which every caller must
//! take.

use kernel_model::faults::FaultPlan;
use kernel_model::{Kernel, Process, Storage, StorageConfig};
use libtest_mimic::{Arguments, Completion, Trial};
use sim::{Config, Sim};
use std::process::ExitCode;
use tap_conformance::{Outcome, Place, Test, files, life, locks, sockets, tasks, zeros};

/// What the models do not do, and why; the list that docs/testing/conformance.md has.
const DIFFERENT: &[(&str, &str)] = &[(
    "a_folder_that_is_missing_holds_no_file",
    "the storage model knows names, not folders: every path can be created",
)];

fn main() -> ExitCode {
    let args = Arguments::from_args();
    let mut trials = Vec::new();
    for (way, direct) in [("buffered", false), ("direct", true)] {
        let lists = [files::on_files, files::on_disks, zeros::on_files, zeros::on_disks];
        let more = [locks::on_files, life::on_files, life::on_disks];
        for test in lists.into_iter().chain(more).flat_map(|list| list()) {
            trials.push(trial(format!("{way}/{}", test.name), test, direct, false));
        }
    }
    for test in tasks::all() {
        trials.push(trial(format!("tasks/{}", test.name), test, false, false));
    }
    for (family, tcp) in [("unix", false), ("tcp", true)] {
        for test in sockets::all() {
            trials.push(trial(format!("{family}/{}", test.name), test, false, tcp));
        }
    }
    libtest_mimic::run(&args, trials).exit_code()
}

fn trial(name: String, test: Test<Place<Process>>, direct: bool, tcp: bool) -> Trial {
    Trial::ignorable_test(name, move || {
        if let Some((_, why)) = DIFFERENT.iter().find(|(name, _)| *name == test.name) {
            return Ok(Completion::ignored_with(why));
        }
        let short = FaultPlan { short: true, ..FaultPlan::LATENCY };
        for (seed, faults) in [(1, FaultPlan::default()), (2, FaultPlan::LATENCY), (3, short), (4, short)] {
            in_world(seed, faults, &test, direct, tcp).map_err(|e| format!("with seed {seed}: {e}"))?;
        }
        Ok(Completion::Completed)
    })
}

fn in_world(seed: u64, faults: FaultPlan, test: &Test<Place<Process>>, direct: bool, tcp: bool) -> Outcome {
    let sim = Sim::new(&Config::new(seed));
    let kernel = Kernel::new(&sim, &Storage::new(&sim, StorageConfig { faults, ..StorageConfig::default() }));
    let host = kernel.process("conformance", 1);
    let running = (test.body)(Place { host, folder: "/images".into(), direct, device: None, tcp });
    sim.run(running).map_err(|e| format!("the world does not end: {e:?}"))?
}
