//! The conformance suite on the real kernel.
//!
//! ```text
//!   files    {io_uring, threads} × {buffered, direct} × {temporary folder, /dev/shm}
//!   disks    {io_uring, threads} × {buffered, direct} × {loop device of 512, of 4096-byte sectors}
//!   sockets  {unix, TCP}
//!   tasks
//! ```
//!
//! Tests that this machine does not allow (loop devices without root, io_uring under a filter) are reported as ignored,
//! with the reason.

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex, PoisonError};
use tap_conformance::{
    DEVICE_BYTES, Place, Test, files, life, locks, priorities, sockets, tap, tasks, zeros,
};
use tap_host::{Files, OpenMode};
use tap_linux::{AioEngine, LinuxHost, Options, run};

fn main() -> ExitCode {
    let args = Arguments::from_args();
    let devices = [512, 4096].map(|sector| Arc::new(Mutex::new(Device::new(sector))));
    if !args.list {
        for device in &devices {
            // Now, because a child that starts while tests run holds their locks for a moment. Tests that need the
            // device report why there is none.
            let _attached = lock(device).attach();
        }
    }
    let mut trials = Vec::new();
    for (engine, aio) in [("io_uring", AioEngine::IoUring), ("threads", AioEngine::Threads)] {
        for (way, direct) in [("buffered", false), ("direct", true)] {
            for (place, folder) in [("tmp", std::env::temp_dir()), ("shm", "/dev/shm".into())] {
                let all = [files::on_files, files::on_disks, zeros::on_files, zeros::on_disks];
                let more = [locks::on_files, life::on_files, life::on_disks, priorities::on_files];
                for test in all.into_iter().chain(more).flat_map(|list| list()) {
                    let name = format!("{engine}/{way}/{place}/{}", test.name);
                    let folder = folder.clone();
                    trials.push(Trial::ignorable_test(name, move || on_files(test, aio, direct, &folder)));
                }
            }
            for device in &devices {
                for test in
                    [files::on_disks, zeros::on_disks, life::on_disks].into_iter().flat_map(|list| list())
                {
                    let sector = lock(device).sector_bytes;
                    let name = format!("{engine}/{way}/loop-{sector}/{}", test.name);
                    let device = Arc::clone(device);
                    trials.push(Trial::ignorable_test(name, move || on_device(test, aio, direct, &device)));
                }
            }
        }
    }
    for (family, tcp) in [("unix", false), ("tcp", true)] {
        for test in sockets::all() {
            let name = format!("{family}/{}", test.name);
            trials.push(Trial::test(name, move || on_sockets(test, tcp)));
        }
    }
    for test in tasks::all() {
        trials.push(Trial::test(format!("tasks/{}", test.name), move || on_sockets(test, false)));
    }
    trials.push(Trial::test("the_documentation_lists_every_body", documented));
    let conclusion = libtest_mimic::run(&args, trials);
    for device in devices {
        lock(&device).detach();
    }
    conclusion.exit_code()
}

fn documented() -> Result<(), Failed> {
    let text =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/testing/conformance.md"))?;
    let lists = [files::on_files, files::on_disks, zeros::on_files, zeros::on_disks, locks::on_files];
    let more = [life::on_files, life::on_disks, priorities::on_files, tasks::all, sockets::all, tap::all];
    let mut names: Vec<_> = lists
        .into_iter()
        .chain(more)
        .flat_map(|list| list())
        .map(|test: Test<Place<LinuxHost>>| test.name)
        .collect();
    names.sort_unstable();
    // The part about Xen is checked by xen-model.
    let linux = text.split_once("\n# Xen\n").ok_or("there is no part about Xen")?.0;
    let mut rows: Vec<_> =
        linux.lines().filter_map(|l| l.strip_prefix("| `")?.split_once('`')).map(|(n, _)| n).collect();
    rows.retain(|name| !name.contains('/'));
    rows.sort_unstable();
    assert_eq!(rows, names);
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn on_host(
    test: Test<Place<LinuxHost>>,
    aio: AioEngine,
    place: impl FnOnce(LinuxHost) -> Place<LinuxHost>,
) -> Result<(), Failed> {
    let options = Options { aio, ..Options::default() };
    Ok(run(&options, |host| (test.body)(place(host)))??)
}

fn on_files(
    test: Test<Place<LinuxHost>>,
    aio: AioEngine,
    direct: bool,
    folder: &Path,
) -> Result<Completion, Failed> {
    if let Some(reason) = refused(aio) {
        return Ok(Completion::ignored_with(reason));
    }
    let Ok(folder) = tempfile::tempdir_in(folder) else {
        return Ok(Completion::ignored_with(format!("{} cannot be written", folder.display())));
    };
    let path = folder.path().to_str().ok_or("the path is not UTF-8")?.to_owned();
    if direct && !takes_direct(&path) {
        return Ok(Completion::ignored_with(format!("O_DIRECT is refused in {path}")));
    }
    on_host(test, aio, |host| Place { host, folder: path, direct, device: None, tcp: false })?;
    Ok(Completion::Completed)
}

fn on_device(
    test: Test<Place<LinuxHost>>,
    aio: AioEngine,
    direct: bool,
    device: &Mutex<Device>,
) -> Result<Completion, Failed> {
    if let Some(reason) = refused(aio) {
        return Ok(Completion::ignored_with(reason));
    }
    // One at a time: they all write to the same device.
    let mut device = lock(device);
    let path = match device.attach() {
        Ok(path) => path,
        Err(reason) => return Ok(Completion::ignored_with(reason)),
    };
    on_host(test, aio, |host| Place { host, folder: "/".into(), direct, device: Some(path), tcp: false })?;
    Ok(Completion::Completed)
}

fn on_sockets(test: Test<Place<LinuxHost>>, tcp: bool) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().to_str().ok_or("the path is not UTF-8")?.to_owned();
    on_host(test, AioEngine::Auto, |host| Place { host, folder: path, direct: false, device: None, tcp })
}

/// Why the kernel refuses this engine.
fn refused(aio: AioEngine) -> Option<String> {
    run(&Options { aio, ..Options::default() }, |_| async {}).err().map(|e| format!("failed to {e}"))
}

fn takes_direct(folder: &str) -> bool {
    let path = format!("{folder}/direct");
    let mode = OpenMode { direct: true, ..OpenMode::CREATE };
    let opened = run(&Options::default(), |host| async move { host.open(&path, mode).await.is_ok() });
    std::fs::remove_file(format!("{folder}/direct")).is_ok() && opened.is_ok_and(|ok| ok)
}

/// A loop device.
struct Device {
    sector_bytes: u32,
    state: Option<Result<(tempfile::NamedTempFile, String), String>>,
}

impl Device {
    fn new(sector_bytes: u32) -> Self {
        Self { sector_bytes, state: None }
    }

    /// The device's path, or why there is no device.
    fn attach(&mut self) -> Result<String, String> {
        let sector = self.sector_bytes;
        let state = self.state.get_or_insert_with(|| {
            let file = tempfile::NamedTempFile::new().map_err(|e| format!("no temporary file: {e}"))?;
            file.as_file().set_len(2 * DEVICE_BYTES + 4096).map_err(|e| format!("no space: {e}"))?;
            let mut losetup = Command::new("losetup");
            losetup.args(["--find", "--show", "--sector-size", &sector.to_string()]).arg(file.path());
            let output = losetup.output().map_err(|e| format!("losetup cannot be run: {e}"))?;
            if !output.status.success() {
                let why = String::from_utf8_lossy(&output.stderr);
                return Err(format!("loop devices are not permitted: {}", why.trim()));
            }
            Ok((file, String::from_utf8_lossy(&output.stdout).trim().to_owned()))
        });
        state.as_ref().map(|(_, path)| path.clone()).map_err(Clone::clone)
    }

    fn detach(&mut self) {
        if let Some(Ok((_, path))) = self.state.take() {
            let detached = Command::new("losetup").args(["--detach", &path]).status();
            assert!(detached.is_ok_and(|s| s.success()), "{path} could not be detached");
        }
    }
}
