//! Locks against QEMU's tools, both ways: the second writer is refused, and readers share.
//!
//! If qemu-img or qemu-io is missing the tests are reported as ignored.

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use tap_host::{Errno, File, Files, LockKind, OpenMode};
use tap_linux::{LinuxFile, LinuxHost, Options, run};

/// A test on an image of 64 KiB at a path.
type Body = fn(&str) -> Result<(), Failed>;

fn main() -> ExitCode {
    // One after the other: a process that another test is starting holds our descriptors, and with them our locks,
    // until it has executed the tool.
    let args = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    let mut trials = Vec::new();
    let tests: [(&str, Body); 3] = [
        ("our_writer_keeps_qemu_out", our_writer),
        ("our_reader_shares_with_qemu_readers_only", our_reader),
        ("a_writer_of_qemu_keeps_us_out", their_writer),
    ];
    for (name, test) in tests {
        trials.push(Trial::ignorable_test(name, move || with_qemu(test)));
    }
    libtest_mimic::run(&args, trials).exit_code()
}

fn with_qemu(test: Body) -> Result<Completion, Failed> {
    for tool in ["qemu-img", "qemu-io"] {
        if Command::new(tool).arg("--version").output().is_err() {
            return Ok(Completion::ignored_with(format!("{tool} is not installed")));
        }
    }
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("image.raw");
    std::fs::write(&path, [1; 65536])?;
    test(path.to_str().ok_or("the path is no text")?)?;
    Ok(Completion::Completed)
}

fn with_file(path: &str, mode: OpenMode, body: impl AsyncFnOnce(LinuxFile) + 'static) -> Result<(), Failed> {
    let path = path.to_owned();
    Ok(run(&Options::default(), |host: LinuxHost| async move {
        body(host.open(&path, mode).await?).await;
        Ok::<(), Errno>(())
    })??)
}

/// Closes a file; that happens on another thread.
fn close(file: LinuxFile) {
    drop(file);
    std::thread::sleep(std::time::Duration::from_millis(100));
}

/// What a run of a tool prints if it failed; empty if it succeeded.
fn qemu(tool: &str, args: &[&str]) -> String {
    let output = Command::new(tool).args(args).output().expect("the tool starts");
    // qemu-io prints what failed and exits with 0.
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    if output.status.success() && !text.contains("lock") { String::new() } else { text }
}

fn read(path: &str) -> String {
    qemu("qemu-io", &["-r", "-f", "raw", "-c", "read -P 1 0 4096", path])
}

fn write(path: &str) -> String {
    qemu("qemu-io", &["-f", "raw", "-c", "write -P 1 0 4096", path])
}

/// Two readers at once, by qemu-img.
fn compare(path: &str) -> String {
    qemu("qemu-img", &["compare", "-f", "raw", "-F", "raw", path, path])
}

fn our_writer(path: &str) -> Result<(), Failed> {
    let name = path.to_owned();
    with_file(path, OpenMode::WRITE, async move |file| {
        assert_eq!((write(&name), compare(&name)), (String::new(), String::new()), "not locked yet");
        assert_eq!(file.lock(LockKind::Exclusive).await, Ok(()));
        assert!(write(&name).contains("lock"), "a second writer");
        assert!(read(&name).contains("lock"), "a reader");
        assert!(compare(&name).contains("lock"), "qemu-img");
        close(file);
        assert_eq!((write(&name), compare(&name)), (String::new(), String::new()), "after us");
    })
}

fn our_reader(path: &str) -> Result<(), Failed> {
    let name = path.to_owned();
    with_file(path, OpenMode::READ, async move |file| {
        assert_eq!(file.lock(LockKind::Shared).await, Ok(()));
        assert_eq!((read(&name), compare(&name)), (String::new(), String::new()), "readers share");
        assert!(write(&name).contains("lock"), "a writer");
        close(file);
        assert_eq!(write(&name), "", "a writer after us");
    })
}

/// A qemu-io that holds an image open until it is told to quit.
struct Holder {
    child: Child,
    input: ChildStdin,
}

impl Holder {
    fn start(args: &[&str]) -> Self {
        let mut command = Command::new("qemu-io");
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("qemu-io starts");
        let mut input = child.stdin.take().expect("its input");
        // Its reply shows that it has the image open.
        input.write_all(b"length\n").expect("it listens");
        let mut output = BufReader::new(child.stdout.take().expect("its output"));
        let mut line = String::new();
        output.read_line(&mut line).expect("it answers");
        assert!(line.contains("64 KiB"), "{line}");
        Self { child, input }
    }

    fn quit(mut self) {
        self.input.write_all(b"quit\n").expect("it listens");
        assert!(self.child.wait().expect("it ends").success());
    }
}

fn their_writer(path: &str) -> Result<(), Failed> {
    let name = path.to_owned();
    with_file(path, OpenMode::WRITE, async move |file| {
        let reader = Holder::start(&["-r", "-f", "raw", &name]);
        assert_eq!(file.lock(LockKind::Exclusive).await, Err(Errno::EAGAIN), "a writer beside their reader");
        assert_eq!(file.lock(LockKind::Shared).await, Ok(()), "a reader beside their reader");
        reader.quit();
        assert_eq!(file.lock(LockKind::Exclusive).await, Ok(()), "a writer alone");
        close(file);
    })?;
    let name = path.to_owned();
    with_file(path, OpenMode::WRITE, async move |file| {
        let writer = Holder::start(&["-f", "raw", &name]);
        assert_eq!(file.lock(LockKind::Exclusive).await, Err(Errno::EAGAIN), "a writer beside their writer");
        assert_eq!(file.lock(LockKind::Shared).await, Err(Errno::EAGAIN), "a reader beside their writer");
        writer.quit();
        assert_eq!(file.lock(LockKind::Exclusive).await, Ok(()), "after them");
    })
}
