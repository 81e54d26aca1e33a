//! Tests that need a process of their own: signals, and sockets that a service manager passes.
//!
//! The test starts itself again with `TAP_LINUX_CHILD` set, and watches what that process does.

use libtest_mimic::{Arguments, Failed, Trial};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use tap_host::{Errno, IoBuf, Listener, SendList, Signals, SocketAddress, Sockets, Stream};
use tap_linux::{LinuxHost, Options, run};

const CHILD: &str = "TAP_LINUX_CHILD";

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
    let trials = vec![
        Trial::test("the_first_signal_asks", || signal_ends_in_order(libc::SIGTERM)),
        Trial::test("so_does_an_interrupt", || signal_ends_in_order(libc::SIGINT)),
        Trial::test("the_second_signal_ends_at_once", second_signal),
        Trial::test("sockets_of_a_service_manager_are_taken_once", inherits),
        Trial::test("sockets_for_somebody_else_are_left_alone", inherits_nothing),
        Trial::test("a_path_that_nobody_listens_at_is_taken_over", takes_over),
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
