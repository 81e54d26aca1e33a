//! Bad input: one clear line and a status, or an NBD error; nothing is lost and the server continues.

use crate::client::{Client, WRITE};
use crate::server::{Server, TAP_IMG, TAPDISK, tool};
use crate::{Add, Done};
use libtest_mimic::Failed;
use std::fs::Permissions;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::Command;

pub(crate) fn tests(add: Add) {
    add("bad::an_unservable_disk_is_reported_in_one_line".into(), &[], Box::new(refused));
    add("bad::garbage_costs_a_client_its_connection".into(), &[], Box::new(garbage));
    add("bad::an_image_is_served_once".into(), &[], Box::new(once));
    add("bad::an_image_is_not_created_over_its_source".into(), &[], Box::new(itself));
    add("bad::an_unread_log_stops_no_disk".into(), &[], Box::new(unread_log));
    add("bad::a_hangup_ends_in_order".into(), &[], Box::new(hangup));
    add("bad::one_of_several_servers_started_at_once_listens".into(), &[], Box::new(at_once));
    add("bad::a_server_ends_with_the_parent_that_passed_its_socket".into(), &[], Box::new(orphan));
    add("bad::a_full_standard_output_is_reported_with_the_name".into(), &[], Box::new(full_output));
    add("bad::a_folder_need_not_be_readable".into(), &["setpriv"], Box::new(unreadable_folder));
    add("bad::an_image_that_may_not_be_opened_has_a_hint".into(), &["setpriv"], Box::new(denied));
    add("bad::qemu_respects_the_lock".into(), &["qemu-io", "qemu-img"], Box::new(locked));
}

fn refused() -> Done {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    tool(TAP_IMG, &["create", "-q", &path("disk"), "1M"])?;
    std::fs::write(path("cut"), b"QFI\xfb")?;
    let (disk, good) = (format!("raw:{}", path("disk")), format!("unix:{}", path("s")));
    for (args, words) in [
        (vec!["--nbd", &good, &format!("raw:{}", path("gone"))], "open"),
        (vec!["--nbd", &good, &format!("qcow:{}", path("disk"))], "magic bytes"),
        (vec!["--nbd", &good, &format!("qcow:{}", path("cut"))], "only 4 bytes"),
        (vec!["--nbd", &good, &path("disk")], "name its format"),
        (vec!["--nbd", &good, &format!("raw:{}", folder.path().display())], "directory"),
        (vec!["--nbd", &good, &disk, &format!("b={disk}")], "need names"),
        (vec!["--nbd", &good, &format!("a={disk}"), &format!("b={disk}")], "in use"),
        (vec![&disk], "no address"),
        (vec!["--nbd", &format!("unix:{}/gone/s", folder.path().display()), &disk], "listen at"),
        (vec!["--nbd", "192.0.2.1:1", &disk], "listen at"),
        (vec!["--nbd", &format!("unix:{}", folder.path().display()), &disk], "a file or folder is there"),
        (vec!["--nbd", &format!("unix:{}", path("disk")), &disk], "a file or folder is there"),
        (vec!["--nbd", &good, &format!("nbd:unix:{}", path("disk"))], "a file or folder has this path"),
        (vec!["--nbd", &good, "raw:/dev/zero"], "not a regular file or block device"),
    ] {
        let output = Command::new(TAPDISK).arg("serve").args(&args).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), said.lines().count()), (Some(1), 1), "{args:?}: {said}");
        assert!(said.starts_with("tapdisk: failed to ") && said.contains(words), "{args:?}: {said}");
        assert!(output.stdout.is_empty(), "{args:?}");
    }
    for args in [["--nbd", "nowhere", "raw:/x"], ["--nbd", "unix:/x", "vhd:/x"], ["--cache", "no", "raw:/x"]]
    {
        let output = Command::new(TAPDISK).arg("serve").args(args).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), said.lines().count()), (Some(2), 1), "{args:?}: {said}");
        assert!(said.ends_with("; see tapdisk serve --help\n"), "{args:?}: {said}");
    }
    Ok(())
}

fn full_output() -> Done {
    let folder = tempfile::tempdir()?;
    let disk = folder.path().join("disk").display().to_string();
    tool(TAP_IMG, &["create", "-q", &disk, "1M"])?;
    let full = std::fs::File::options().write(true).open("/dev/full")?;
    let output = Command::new(TAP_IMG).args(["info", &disk]).stdout(full).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.starts_with("tap-img: failed to print: ") && said.lines().count() == 1, "{said}");
    Ok(())
}

/// A folder that may be written and searched, but not listed: its file system is synchronised instead.
/// That of an image that may be read is to read it.
fn denied() -> Done {
    let user = ["--reuid=65534", "--clear-groups"];
    if !Command::new("setpriv").args(user).arg("true").status().is_ok_and(|status| status.success()) {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    let mode = |name: &str, mode| std::fs::set_permissions(path(name), Permissions::from_mode(mode));
    // The program must be within reach of another user.
    std::fs::copy(TAPDISK, path("tapdisk"))?;
    mode("", 0o777)?;
    for (name, bits, hint) in [("open", 0o444, "; with --read-only"), ("shut", 0o400, "; nor may it be read")]
    {
        tool(TAP_IMG, &["create", "-q", &path(name), "1M"])?;
        mode(name, bits)?;
        let (socket, image) = (format!("unix:{}", path("s")), format!("raw:{}", path(name)));
        let line = [&path("tapdisk"), "serve", "--run-dir", &path(""), "--nbd", &socket, &image];
        let output = Command::new("setpriv").args(user).args(line).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && said.contains(hint), "{name}: {said}");
    }
    Ok(())
}

fn unreadable_folder() -> Done {
    let folder = tempfile::tempdir()?;
    let drop_box = folder.path().join("box");
    std::fs::create_dir(&drop_box)?;
    // The program must be within reach of another user.
    let program = folder.path().join("tap-img");
    std::fs::copy(TAP_IMG, &program)?;
    for (path, mode) in [(folder.path(), 0o755), (&program, 0o755), (&drop_box, 0o333)] {
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode))?;
    }
    let (program, disk) = (program.display().to_string(), drop_box.join("disk").display().to_string());
    let user = ["--reuid=65534", "--clear-groups"];
    if Command::new("setpriv").args(user).arg("true").status().is_ok_and(|status| status.success()) {
        let create = [&program, "create", "-q", "-f", "qcow", &disk, "1M"];
        tool("setpriv", &[&user[..], &create].concat())?;
        tool(TAP_IMG, &["check", &disk])?;
    }
    Ok(())
}

fn garbage() -> Done {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    tool(TAP_IMG, &["create", "-q", &path("disk"), "1M"])?;
    let server = Server::start(&folder.path().join("socket"), &[&format!("raw:{}", path("disk"))])?;
    let mut good = Client::connect(server.socket())?;
    for n in 0..20_u8 {
        let mut stream = UnixStream::connect(server.socket())?;
        let bytes: Vec<u8> = (0..4096_u32).map(|i| (i * 31 + u32::from(n) * 77) as u8).collect();
        // The server may close while we write.
        let _ = stream.write_all(&bytes);
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert!(rest.len() < 4096, "{} bytes of answer to garbage", rest.len());
        assert_eq!(good.ask(WRITE, 0, &[n; 512])?, 0);
        assert_eq!(good.read(0, 512)?, [n; 512]);
    }
    // Out of range, and by a byte.
    assert_eq!(good.ask(WRITE, 1 << 20, &[0; 512])?, 28);
    assert_eq!(good.ask(WRITE, (1 << 20) - 511, &[0; 512])?, 28);
    assert!(server.stop()?.success());
    Ok(())
}

fn once() -> Done {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    tool(TAP_IMG, &["create", "-q", &path("disk"), "1M"])?;
    let spec = format!("raw:{}", path("disk"));
    let first = Server::start(&folder.path().join("a"), &[&spec])?;
    // A second one at the same socket, and a second one of the same image.
    for (socket, words) in [("a", "in use"), ("b", "in use")] {
        let address = format!("unix:{}", path(socket));
        let output = Command::new(TAPDISK).args(["serve", "--nbd", &address, &spec]).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && said.contains(words), "{socket}: {said}");
    }
    assert_eq!(Client::connect(first.socket())?.ask(WRITE, 0, &[1; 512])?, 0);
    assert!(first.stop()?.success());
    // Readers share.
    let a = Server::start(&folder.path().join("a"), &[&spec, "--read-only"])?;
    let b = Server::start(&folder.path().join("b"), &[&spec, "--read-only"])?;
    assert_eq!(Client::connect(b.socket())?.read(0, 512)?, [1; 512]);
    assert_eq!(Client::connect(a.socket())?.ask(WRITE, 0, &[2; 512])?, 1, "not permitted");
    Ok(())
}

fn locked() -> Done {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    tool("qemu-img", &["create", "-q", "-f", "qcow", &path("disk"), "1M"])?;
    let server = Server::start(&folder.path().join("a"), &[&format!("qcow:{}", path("disk"))])?;
    let refused = tool("qemu-io", &["-f", "qcow", "-c", "write 0 4k", &path("disk")]).unwrap_err();
    assert!(refused.message().unwrap_or("").contains("lock"), "{refused:?}");
    let refused = tool("qemu-img", &["info", &path("disk")]).unwrap_err();
    assert!(refused.message().unwrap_or("").contains("lock"), "{refused:?}");
    assert!(server.stop()?.success());
    tool("qemu-io", &["-f", "qcow", "-c", "write 0 4k", &path("disk")])?;
    Ok(())
}

/// Overwriting an input is refused under any of its names, and no file changes.
fn itself() -> Done {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    tool(TAP_IMG, &["create", "-q", &path("base"), "1M"])?;
    std::fs::write(path("base"), vec![7; 1 << 20])?;
    tool(TAP_IMG, &["create", "-q", "-f", "qcow", "-b", "base", "-F", "raw", &path("middle")])?;
    tool(TAP_IMG, &["create", "-q", "-f", "qcow", "-b", "middle", "-F", "qcow", &path("top")])?;
    std::fs::create_dir(path("sub"))?;
    std::fs::hard_link(path("base"), path("hard"))?;
    std::os::unix::fs::symlink(path("base"), path("soft"))?;
    let files = || -> Result<Vec<_>, Failed> {
        ["base", "middle", "top"].iter().map(|name| Ok(std::fs::read(path(name))?)).collect()
    };
    let before = files()?;
    for (below, target) in [
        ("base", "base"),
        ("base", "hard"),
        ("base", "soft"),
        ("hard", "base"),
        ("base", "sub/../base"),
        ("top", "top"),
        ("top", "middle"),
        ("top", "soft"),
    ] {
        let below = path(below);
        let create = ["create", "-q", "-f", "qcow", "-b", &below, &path(target)];
        let convert = ["convert", "-q", "--backing", "probe", &below, &path(target)];
        for args in [&create[..], &convert[..], &[&convert[..], &["-n"]].concat()] {
            let output = Command::new(TAP_IMG).args(args).output()?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.code() == Some(1) && said.contains("the same file"), "{args:?}: {said}");
            assert!(files()? == before, "{args:?} changed a file");
        }
    }
    Ok(())
}

/// Standard error is a pipe that is full from the start and never read.
fn unread_log() -> Done {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    tool(TAP_IMG, &["create", "-q", &path("disk"), "1M"])?;
    let (near, full) = UnixStream::pair()?;
    full.set_nonblocking(true)?;
    let mut filler = full.try_clone()?;
    while filler.write(&[b'x'; 4096]).is_ok() {}
    full.set_nonblocking(false)?;
    let socket = folder.path().join("socket");
    let mut server =
        Server::start_with(&socket, &[&format!("raw:{}", path("disk"))], OwnedFd::from(full).into())?;
    drop(filler);
    for n in 0..50_u8 {
        // Each connection is a line or two.
        let mut client = Client::connect(&socket)?;
        assert_eq!(client.ask(WRITE, 0, &[n; 512])?, 0);
        assert_eq!(client.read(0, 512)?, [n; 512]);
    }
    let ended = server.signal("TERM")?;
    assert!(ended.success(), "{ended}");
    drop(near);
    Ok(())
}

fn hangup() -> Done {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    tool(TAP_IMG, &["create", "-q", &path("disk"), "1M"])?;
    let mut server = Server::start(&folder.path().join("socket"), &[&format!("raw:{}", path("disk"))])?;
    let ended = server.signal("HUP")?;
    assert!(ended.success() && !folder.path().join("socket").exists(), "{ended}");
    Ok(())
}

/// Several servers start at a socket that a dead one left: exactly one listens, and the path leads to it.
fn at_once() -> Done {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    tool(TAP_IMG, &["create", "-q", &path("disk"), "1M"])?;
    let (socket, spec) = (folder.path().join("socket"), format!("raw:{}", path("disk")));
    for _ in 0..10 {
        Server::start(&socket, &[&spec])?.kill()?;
        let begun = (0..4)
            .map(|_| Server::begin(&socket, &[&spec, "--read-only"], std::process::Stdio::null()))
            .collect::<Result<Vec<_>, _>>()?;
        let listening: Vec<_> = begun.into_iter().filter_map(|begun| begun.listens().ok()).collect();
        assert_eq!(listening.len(), 1, "servers that listen at one path");
        assert_eq!(Client::connect(&socket)?.read(0, 512)?, [0; 512]);
    }
    Ok(())
}

/// As libnbd starts a server: a listening socket as descriptor 3, whose number and owner are in the environment.
fn orphan() -> Done {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    tool(TAP_IMG, &["create", "-q", &path("disk"), "1M"])?;
    // A shell cannot easily make a listening socket, so the test passes one of its own to the server.
    let listener = std::os::unix::net::UnixListener::bind(path("socket"))?;
    let script = "exec 3<&0 </dev/null; LISTEN_FDS=1 sh -c 'LISTEN_PID=$$ exec \"$@\"' sh \"$@\" & echo $! >\"$PIDFILE\"; wait $!";
    let mut parent = Command::new("sh")
        .args(["-c", script, "sh", TAPDISK, "serve", &format!("raw:{}", path("disk"))])
        .env("PIDFILE", path("pid"))
        .stdin(OwnedFd::from(listener))
        .stdout(std::process::Stdio::null())
        .spawn()?;
    let mut client = loop {
        if let Ok(client) = Client::connect(&folder.path().join("socket")) {
            break client;
        }
        std::thread::yield_now();
    };
    assert_eq!(client.read(0, 512)?, [0; 512]);
    let pid: u32 = std::fs::read_to_string(path("pid"))?.trim().parse()?;
    parent.kill()?;
    parent.wait()?;
    // It must end; the test runner sets the time limit.
    while std::fs::read_link(format!("/proc/{pid}/exe")).is_ok() {
        std::thread::yield_now();
    }
    Ok(())
}
