//! `--fork` and `--pid-file`: who starts a server from a script knows when it serves, and whom to stop.

use crate::client::{Client, WRITE};
use crate::server::{Server, TAP_IMG, TAPDISK, tool};
use crate::{Add, Done};
use libtest_mimic::Failed;
use std::fs::{read_link, read_to_string};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

pub(crate) fn tests(add: Add) {
    add("fork::a_caller_returns_when_clients_can_connect".into(), &[], Box::new(|| returns(&OURS)));
    add("fork::so_does_that_of_qemu_nbd".into(), &["qemu-nbd"], Box::new(|| returns(&QEMU)));
    add("fork::a_caller_learns_why_nothing_is_served".into(), &[], Box::new(refused));
    add("fork::a_caller_learns_that_the_server_was_killed".into(), &[], Box::new(killed));
    add("fork::sockets_of_a_service_manager_are_not_taken_along".into(), &[], Box::new(passed));
    add("fork::a_pid_file_has_one_living_owner".into(), &[], Box::new(owner));
}

/// A program that serves `disk` at `socket`, and stays.
struct Program {
    line: [&'static str; 9],
    /// It also prints where it listens, stays in its folder, and removes its PID file.
    ours: bool,
}

const OURS: Program = Program {
    line: [TAPDISK, "serve", "--fork", "--pid-file", "pid", "--nbd", "unix:./socket", "raw:disk", "--direct"],
    ours: true,
};
const QEMU: Program = Program {
    line: [
        "qemu-nbd",
        "--fork",
        "--pid-file=pid",
        "--persistent",
        "-fraw",
        "-k",
        "FOLDER/socket",
        "disk",
        "--shared=2",
    ],
    ours: false,
};

/// A folder with a disk.
fn folder() -> Result<tempfile::TempDir, Failed> {
    let folder = tempfile::tempdir()?;
    tool(TAP_IMG, &["create", "-q", &folder.path().join("disk").display().to_string(), "1M"])?;
    Ok(folder)
}

fn serve(folder: &Path, args: &[&str]) -> Result<Output, Failed> {
    let line = ["serve", "--fork", "--nbd", "unix:./socket"];
    Ok(Command::new(TAPDISK).args(line).args(args).current_dir(folder).stdin(Stdio::null()).output()?)
}

fn until(mut reached: impl FnMut() -> bool) {
    while !reached() {
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// As scripts use it: everything that it prints is waited for.
fn returns(program: &Program) -> Done {
    let folder = folder()?;
    let at = |name: &str| folder.path().join(name);
    let line = program.line.map(|word| word.replace("FOLDER", &folder.path().display().to_string()));
    let script = "said=$(\"$@\" 2>&1); echo \"status $?: $said\"";
    let shell = ["-c", script, "sh"];
    let output = Command::new("sh").args(shell).args(&line).current_dir(folder.path()).output()?;
    let said = String::from_utf8(output.stdout)?;
    let lines = if program.ours { "export '': raw:disk, 1 MiB\nlistening at unix:./socket" } else { "" };
    assert_eq!(said, format!("status 0: {lines}\n"));
    let mut client = Client::connect(&at("socket"))?;
    assert_eq!(client.ask(WRITE, 0, &[7; 512])?, 0);
    let pid: u32 = read_to_string(at("pid"))?.trim_end().parse()?;
    let proc = PathBuf::from(format!("/proc/{pid}"));
    for fd in ["fd/0", "fd/1", "fd/2"] {
        assert_eq!(read_link(proc.join(fd))?, Path::new("/dev/null"), "{fd}");
    }
    // After the name of the program: state, parent, process group, session.
    let stat = read_to_string(proc.join("stat"))?;
    let numbers: Vec<&str> = stat.rsplit(") ").next().unwrap_or("").split(' ').collect();
    assert_eq!(numbers[2..4], [pid.to_string(), pid.to_string()], "a session of its own: {stat}");
    drop(client);
    tool("kill", &[&pid.to_string()])?;
    until(|| !at("socket").exists());
    if program.ours {
        until(|| !at("pid").exists());
    }
    assert_eq!(std::fs::read(at("disk"))?[..513], [&[7; 512][..], &[0]].concat());
    Ok(())
}

fn refused() -> Done {
    let folder = folder()?;
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("file"), "")?;
    let other = Server::start(
        &at("other"),
        &[&format!("raw:{}", at("file").display()), "--pid-file", &at("taken").display().to_string()],
    )?;
    for (args, words) in [
        (vec!["raw:gone"], "failed to open gone"),
        (vec!["raw:disk", "--nbd", "unix:gone/socket"], "failed to listen at unix:gone/socket"),
        (vec!["raw:disk", "--nbd", "unix:./other"], "another server is there"),
        (vec!["raw:file"], "in use"),
        (vec!["raw:disk", "--pid-file", "gone/pid"], "failed to write the PID file gone/pid: no such file"),
        (vec!["raw:disk", "--pid-file", "taken"], "failed to write the PID file taken: it is in use"),
        (vec!["raw:disk", "--pid-file", "."], "failed to write the PID file .: "),
        (vec!["raw:disk", "--aio", "io_uring", "--memory", "1"], "--memory"),
    ] {
        let pid_file = if args.contains(&"--pid-file") { vec![] } else { vec!["--pid-file", "pid"] };
        let output = serve(folder.path(), &[&args[..], &pid_file].concat())?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code().is_some_and(|code| code > 0), "{args:?}: {said}");
        assert!(said.starts_with("tapdisk: ") && said.contains(words), "{args:?}: {said}");
        assert_eq!((said.lines().count(), output.stdout.len()), (1, 0), "{args:?}: {said}");
        assert!(!at("socket").exists() && !at("pid").exists(), "{args:?}: something is left");
    }
    assert_eq!(read_to_string(at("taken"))?.lines().count(), 1, "left alone");
    assert!(other.stop()?.success());
    Ok(())
}

/// It is killed while it waits for the server of its disk, which says nothing.
fn killed() -> Done {
    let folder = folder()?;
    let _silent = UnixListener::bind(folder.path().join("silent"))?;
    let line = ["serve", "--fork", "--pid-file", "pid", "--nbd", "unix:./socket", "nbd:unix:./silent"];
    let mut command = Command::new(TAPDISK);
    let child = command.args(line).current_dir(folder.path()).stderr(Stdio::piped()).spawn()?;
    let mut pid = String::new();
    until(|| {
        pid = read_to_string(folder.path().join("pid")).unwrap_or_default();
        pid.ends_with('\n')
    });
    tool("kill", &["-KILL", pid.trim_end()])?;
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let want = "tapdisk: failed to continue in the background: the process there was killed by signal 9\n";
    assert_eq!((output.status.code(), &*said), (Some(1), want));
    Ok(())
}

fn passed() -> Done {
    let folder = folder()?;
    let script = "LISTEN_FDS=1 LISTEN_PID=$$ exec \"$@\"";
    let args = ["-c", script, "sh", TAPDISK, "serve", "--fork", "raw:disk"];
    let output = Command::new("sh").args(args).current_dir(folder.path()).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.starts_with("tapdisk: failed to continue in the background: its sockets"), "{said}");
    Ok(())
}

fn owner() -> Done {
    let folder = folder()?;
    let at = |name: &str| folder.path().join(name).display().to_string();
    let (spec, pid) = (format!("raw:{}", at("disk")), at("pid"));
    let args = [&*spec, "--pid-file", &pid];
    let start = || Server::start(&folder.path().join("socket"), &args);
    let number = || read_to_string(&pid);
    let first = start()?;
    assert_eq!(number()?, format!("{}\n", first.id()));
    first.kill()?;
    assert!(number().is_ok(), "a killed process removes nothing");
    let second = start()?;
    assert_eq!(number()?, format!("{}\n", second.id()));
    assert!(second.stop()?.success());
    assert!(number().is_err(), "it is removed at the end");
    Ok(())
}
