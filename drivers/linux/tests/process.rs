//! Tests that need a process of their own: signals, and sockets that a service manager passes.
//!
//! The test starts itself again with `TAP_LINUX_CHILD` set, and watches what that process does.

use libtest_mimic::{Arguments, Failed, Trial};
use std::fs::Permissions;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use tap_host::{Errno, IoBuf, Listener, SendList, Signals, SocketAddress, Sockets, Stream};
use tap_linux::{LinuxHost, Options, run};

const CHILD: &str = "TAP_LINUX_CHILD";
/// Where the child listens.
const PATH: &str = "TAP_LINUX_PATH";
/// The user "nobody".
const NOBODY: libc::uid_t = 65534;

fn main() -> ExitCode {
    match std::env::var(CHILD).as_deref() {
        Ok("stop") => child(|host| async move {
            let asked = host.asked_to_stop();
            say("ready");
            asked.await;
            // Latched: asking again gives the same answer at once.
            host.asked_to_stop().await;
            say("stopping");
            // Too busy to react: a second signal must not depend on this thread.
            loop {
                std::thread::park();
            }
        }),
        Ok("orderly") => child(|host| async move {
            let asked = host.asked_to_stop();
            say("ready");
            asked.await;
            say("stopping");
        }),
        Ok("private") => child(|host| async move {
            let path = std::env::var(PATH).expect("the parent names it");
            let Ok(listener) = host.listen_private(&path).await else { return say("nobody listens") };
            // From now on only what the listener looks at keeps others out.
            std::fs::set_permissions(&path, Permissions::from_mode(0o666)).expect("it is ours");
            say("ready");
            let Ok(stream) = listener.accept().await else { return say("nobody came") };
            let mut list = SendList::new();
            list.push_bytes(b"hello");
            if stream.send(list).await.0.is_err() {
                say("nobody listens");
            }
        }),
        Ok("inherit") => child(|host| async move {
            let listeners = host.inherited();
            say(&format!("{} then {}", listeners.len(), host.inherited().len()));
            let Some(listener) = listeners.first() else { return };
            say(&listener.address().to_string());
            let Ok(stream) = listener.accept().await else { return say("nobody came") };
            let mut list = SendList::new();
            list.push_bytes(b"hello");
            if stream.send(list).await.0.is_err() {
                say("nobody listens");
            }
        }),
        _ => tests(),
    }
}

fn child<F: Future<Output = ()> + 'static>(body: impl FnOnce(LinuxHost) -> F) -> ExitCode {
    match run(&Options::default(), body) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("failed to {error}"));
            ExitCode::FAILURE
        }
    }
}

fn say(line: &str) {
    let mut out = std::io::stdout();
    out.write_all(format!("{line}\n").as_bytes()).and_then(|()| out.flush()).expect("the parent listens");
}

fn tests() -> ExitCode {
    let args = Arguments::from_args();
    let is_root = std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0);
    let divides = Command::new("unshare").args(["--pid", "--fork", "true"]).stderr(Stdio::null()).status();
    let divides = is_root && divides.is_ok_and(|status| status.success());
    let trials = vec![
        Trial::test("the_first_signal_asks", || signal_ends_in_order(libc::SIGTERM)),
        Trial::test("so_does_an_interrupt", || signal_ends_in_order(libc::SIGINT)),
        Trial::test("the_second_signal_ends_at_once", second_signal),
        Trial::test("sockets_of_a_service_manager_are_taken_once", inherits),
        Trial::test("sockets_for_somebody_else_are_left_alone", inherits_nothing),
        Trial::test("a_path_that_nobody_listens_at_is_taken_over", takes_over),
        Trial::test("a_private_listener_refuses_another_user", refuses_others).with_ignored_flag(!is_root),
        Trial::test("a_private_listener_serves_root_of_another_pid_namespace", serves_other_namespaces)
            .with_ignored_flag(!divides),
        Trial::test("what_is_no_socket_is_not_removed", leaves_files),
    ];
    libtest_mimic::run(&args, trials).exit_code()
}

/// This program as a child of the given kind.
fn again(kind: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program has a path"));
    command.env(CHILD, kind).stdout(Stdio::piped());
    command
}

fn lines(child: &mut Child) -> impl Iterator<Item = String> + use<> {
    BufReader::new(child.stdout.take().expect("a pipe")).lines().map(|line| line.expect("text"))
}

fn signal(child: &Child, number: i32) {
    // SAFETY: the call takes two numbers; the child has not been waited for, so its number is its own.
    let result = unsafe { libc::kill(child.id().cast_signed(), number) };
    assert_eq!(result, 0);
}

fn signal_ends_in_order(number: i32) -> Result<(), Failed> {
    let mut child = again("orderly").spawn()?;
    let mut lines = lines(&mut child);
    assert_eq!(lines.next().as_deref(), Some("ready"));
    signal(&child, number);
    assert_eq!(lines.next().as_deref(), Some("stopping"));
    assert!(child.wait()?.success());
    Ok(())
}

fn second_signal() -> Result<(), Failed> {
    let mut child = again("stop").spawn()?;
    let mut lines = lines(&mut child);
    assert_eq!(lines.next().as_deref(), Some("ready"));
    signal(&child, libc::SIGTERM);
    assert_eq!(lines.next().as_deref(), Some("stopping"));
    signal(&child, libc::SIGINT);
    assert_eq!(child.wait()?.signal(), Some(libc::SIGINT));
    Ok(())
}

/// Starts the child through a shell, which knows the process number in advance.
fn with_socket(listener: UnixListener, pid: &str) -> Result<(Vec<String>, String, ExitStatus), Failed> {
    let path = listener.local_addr()?.as_pathname().ok_or("a path")?.to_owned();
    let mut command = Command::new("sh");
    command.args(["-c", &format!("LISTEN_FDS=1 LISTEN_PID={pid} exec \"$0\" 3<&0")]);
    command.arg(std::env::current_exe()?).env(CHILD, "inherit");
    command.stdin(std::os::fd::OwnedFd::from(listener)).stdout(Stdio::piped());
    let mut child = command.spawn()?;
    drop(command);
    let mut said = lines(&mut child);
    let mut all = vec![said.next().unwrap_or_default()];
    let mut got = String::new();
    if all[0] != "0 then 0" {
        UnixStream::connect(path)?.read_to_string(&mut got)?;
    }
    all.extend(said);
    Ok((all, got, child.wait()?))
}

fn inherits() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("socket");
    let (said, got, status) = with_socket(UnixListener::bind(&path)?, "$$")?;
    assert_eq!(said, ["1 then 0".to_owned(), format!("unix:{}", path.display())]);
    assert_eq!(got, "hello");
    assert!(status.success());
    assert!(path.exists(), "the path belongs to the service manager");
    Ok(())
}

fn inherits_nothing() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let (said, _, status) = with_socket(UnixListener::bind(folder.path().join("socket"))?, "1")?;
    assert_eq!(said, ["0 then 0"]);
    assert!(status.success());
    Ok(())
}

fn takes_over() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("socket");
    // The standard library leaves the path in place, as a dying process does.
    drop(UnixListener::bind(&path)?);
    let address = SocketAddress::Unix(path.to_str().ok_or("a path")?.to_owned());
    run(&Options::default(), |host| async move {
        let listener = host.listen(&address).await.expect("the path is taken over");
        let (near, far) = (host.connect(&address).await.expect("it is served"), listener.accept().await);
        let mut list = SendList::new();
        list.push_bytes(b"x");
        assert_eq!(near.send(list).await.0, Ok(()));
        let buf = IoBuf::unpooled(8).expect("memory");
        assert_eq!(far.expect("a connection").recv(buf, 0).await.0, Ok(1));
    })?;
    assert!(!path.exists(), "a listener removes its path");
    Ok(())
}

/// `child` listens at `path` privately. What it says on standard error once it has served us, whom it serves once.
fn serves_us(mut child: Child, path: &Path) -> Result<String, Failed> {
    let mut got = String::new();
    UnixStream::connect(path)?.read_to_string(&mut got)?;
    assert_eq!(got, "hello");
    let mut said = String::new();
    child.stderr.take().ok_or("a pipe")?.read_to_string(&mut said)?;
    assert!(child.wait()?.success());
    Ok(said)
}

fn refuses_others() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755))?;
    let path = folder.path().join("socket");
    let mut child = again("private").env(PATH, &path).stderr(Stdio::piped()).spawn()?;
    assert_eq!(lines(&mut child).next().as_deref(), Some("ready"));
    let at = path.clone();
    let other = std::thread::spawn(move || {
        // SAFETY: the call takes three numbers. Unlike that of the C library it is about this thread alone.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
        assert_eq!(changed, 0);
        let mut got = String::new();
        UnixStream::connect(at)?.read_to_string(&mut got).map(|_| got)
    });
    assert_eq!(other.join().expect("no panic")?, "", "it is heard nevertheless");
    let said = serves_us(child, &path)?;
    assert!(said.contains("user 65534 may not connect"), "{said}");
    Ok(())
}

/// There the process at the other end has no number.
fn serves_other_namespaces() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("socket");
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child"]).arg(std::env::current_exe()?).env(CHILD, "private");
    let mut child = command.env(PATH, &path).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    assert_eq!(lines(&mut child).next().as_deref(), Some("ready"));
    assert_eq!(serves_us(child, &path)?, "");
    Ok(())
}

fn leaves_files() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("file");
    std::fs::write(&path, "precious")?;
    let address = SocketAddress::Unix(path.to_str().ok_or("a path")?.to_owned());
    let refused = run(&Options::default(), |host| async move { host.listen(&address).await.err() })?;
    assert_eq!(refused, Some(Errno::ENOTSOCK));
    assert_eq!(std::fs::read_to_string(path)?, "precious");
    Ok(())
}
