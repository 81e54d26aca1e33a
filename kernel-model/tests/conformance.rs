//! The conformance suite on the models: the same bodies that drivers/linux/tests/conformance.rs runs on the real
//! kernel.
//!
//! Each body runs in a few worlds: a quiet one, then ones with short transfers and late turns, which every caller must
//! handle.

use kernel_model::faults::FaultPlan;
use kernel_model::{Content, DIRECT_ALIGN_BYTES, Kernel, Process, Storage, StorageConfig};
use libtest_mimic::{Arguments, Completion, Trial};
use sim::{Config, Sim};
use std::process::ExitCode;
use tap_conformance::{
    DEVICE_BYTES, Outcome, Place, Test, files, life, locks, priorities, sockets, tasks, zeros,
};

/// The bodies that the models do not pass, and why; docs/testing/conformance.md has the same list.
const DIFFERENT: &[(&str, &str)] = &[(
    "a_folder_that_is_missing_holds_no_file",
    "the storage model knows names, not folders: every path can be created",
)];

fn main() -> ExitCode {
    let args = Arguments::from_args();
    let mut trials = Vec::new();
    for (mode, direct) in [("buffered", false), ("direct", true)] {
        let lists = [files::on_files, files::on_disks, zeros::on_files, zeros::on_disks];
        let more = [locks::on_files, life::on_files, life::on_disks, priorities::on_files];
        for test in lists.into_iter().chain(more).flat_map(|list| list()) {
            trials.push(trial(format!("{mode}/{}", test.name), test, Disk { direct, ..FILE }));
        }
        for (sector, refuses) in [(512, false), (4096, false), (512, true)] {
            let kind = if refuses { "-without-zeros" } else { "" };
            for test in [files::on_disks, zeros::on_disks, life::on_disks].into_iter().flat_map(|list| list())
            {
                let disk = Disk { direct, device: Some(sector), refuses, ..FILE };
                trials.push(trial(format!("{mode}/device-{sector}{kind}/{}", test.name), test, disk));
            }
        }
    }
    for test in tasks::all() {
        trials.push(trial(format!("tasks/{}", test.name), test, FILE));
    }
    for (family, tcp) in [("unix", false), ("tcp", true)] {
        for test in sockets::all() {
            trials.push(trial(format!("{family}/{}", test.name), test, Disk { tcp, ..FILE }));
        }
    }
    libtest_mimic::run(&args, trials).exit_code()
}

/// What a body runs on.
#[derive(Clone, Copy)]
struct Disk {
    direct: bool,
    /// A block device with sectors of this many bytes.
    device: Option<u32>,
    /// Its drive does not support making zeros.
    refuses: bool,
    tcp: bool,
}

const FILE: Disk = Disk { direct: false, device: None, refuses: false, tcp: false };

fn trial(name: String, test: Test<Place<Process>>, disk: Disk) -> Trial {
    Trial::ignorable_test(name, move || {
        if let Some((_, why)) = DIFFERENT.iter().find(|(name, _)| *name == test.name) {
            return Ok(Completion::ignored_with(why));
        }
        let short = FaultPlan { short: true, ..FaultPlan::LATENCY };
        for (seed, faults) in [(1, FaultPlan::default()), (2, FaultPlan::LATENCY), (3, short), (4, short)] {
            in_world(seed, faults, &test, disk).map_err(|e| format!("with seed {seed}: {e}"))?;
        }
        Ok(Completion::Completed)
    })
}

fn in_world(seed: u64, faults: FaultPlan, test: &Test<Place<Process>>, disk: Disk) -> Outcome {
    let sim = Sim::new(&Config::new(seed));
    let config = StorageConfig {
        faults,
        zeroing: !disk.refuses,
        direct_align_bytes: disk.device.unwrap_or(DIRECT_ALIGN_BYTES),
        ..StorageConfig::default()
    };
    let storage = Storage::new(&sim, config);
    let device = disk.device.map(|_| "/dev/disk".to_owned());
    if let Some(path) = &device {
        storage.put_device(path, Content { size: DEVICE_BYTES, ..Content::default() });
    }
    let host = Kernel::new(&sim, &storage).process("conformance", 1);
    let place = Place { host, folder: "/images".into(), direct: disk.direct, device, tcp: disk.tcp };
    let running = (test.body)(place);
    sim.run(running).map_err(|e| format!("the world does not end: {e:?}"))?
}
