//! `tap-ctl` and `tapdisk control`, and a client of the control socket that shares no code with them: it speaks bytes.

use crate::server::{TAP_CTL, TAPDISK, tool};
use crate::{Add, Done};
use libtest_mimic::Failed;
use serde_json::Value;
use std::fs::{OpenOptions, metadata};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

pub(crate) fn tests(add: Add) {
    add("control::a_disk_lives_and_ends".into(), &["qemu-io"], Box::new(life));
    add("control::a_client_of_bytes_is_understood".into(), &[], Box::new(bytes));
    add("control::a_client_of_json_is_understood".into(), &[], Box::new(lines));
    add("control::a_killed_tapdisk_leaves_nothing_in_the_way".into(), &["qemu-io"], Box::new(killed));
    add("control::what_a_killed_tapdisk_left_is_removed_by_the_next".into(), &[], Box::new(dead));
    add("control::programs_that_use_flock_see_a_minor_number_in_use".into(), &[], Box::new(markers));
    add("control::a_tapdisk_keeps_nothing_of_who_starts_it".into(), &[], Box::new(keeps_nothing));
    add("control::a_second_signal_ends_what_storage_holds_up".into(), &["qemu-io"], Box::new(held_up));
}

/// A folder for sockets, with an image in it.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Result<Self, Failed> {
        let place = Self(tempfile::tempdir()?);
        std::fs::File::create(place.path("disk"))?.set_len(1 << 20)?;
        std::fs::File::create(place.path("other"))?.set_len(1 << 20)?;
        Ok(place)
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    /// Runs tap-ctl; its exit status, and what it printed.
    pub(crate) fn run(&self, line: &str) -> Result<(i32, String), Failed> {
        self.run_words(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    pub(crate) fn run_words(&self, words: &[String]) -> Result<(i32, String), Failed> {
        let mut command = Command::new(TAP_CTL);
        command.args(["--folder", &self.path("run")]).args(words).stdin(Stdio::null());
        let output = command.output()?;
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        Ok((output.status.code().unwrap_or(-1), said.trim_end().to_owned()))
    }

    pub(crate) fn done(&self, line: &str) -> Result<String, Failed> {
        match self.run(line)? {
            (0, said) => Ok(said),
            (status, said) => Err(format!("tap-ctl {line}: {status}: {said}").into()),
        }
    }

    /// Gives back the minor number of a tapdisk that was killed, once the kernel has closed its files.
    pub(crate) fn free_killed(&self) -> Done {
        for _ in 0..500 {
            if self.run("free -m 0")?.0 == 0 {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err("the minor number of a killed tapdisk is not freed".into())
    }

    /// A new disk: the number of its process.
    fn create(&self) -> Result<u32, Failed> {
        let made = self.done(&format!("create -D -a raw:{}", self.path("disk")))?;
        assert_eq!(made, self.path("run/tapdisk/tapdisk-0"));
        let listed = self.done("list")?;
        let pid = listed.strip_prefix("pid=").and_then(|row| row.split(' ').next()?.parse().ok());
        let pid = pid.ok_or_else(|| format!("the list is {listed}"))?;
        assert_eq!(listed, format!("pid={pid} minor=0 state=0 args=raw:{}", self.path("disk")));
        Ok(pid)
    }

    fn qemu_io(&self, pid: u32, command: &str) -> Done {
        let uri = format!("nbd+unix:///?socket={}", self.path(&format!("run/nbd{pid}.0")));
        tool("qemu-io", &["-f", "raw", "-c", command, &uri]).map(drop)
    }
}

fn life() -> Done {
    let place = Place::new()?;
    assert_eq!(place.done("check")?, "ok");
    let pid = place.create()?;
    let socket = metadata(place.path(&format!("run/ctl{pid}")))?;
    assert!(socket.file_type().is_socket());
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);
    assert_eq!(metadata(place.path("run"))?.permissions().mode() & 0o777, 0o700);
    place.qemu_io(pid, "write -P 7 0 64k")?;
    place.done(&format!("pause -p {pid} -m 0"))?;
    // Nobody has it: another may change it.
    let image = OpenOptions::new().write(true).open(place.path("disk"))?;
    image.write_all_at(&[9; 4096], 65536)?;
    let (status, said) = place.run(&format!("unpause -p {pid} -m 0 -a raw:{}", place.path("none")))?;
    assert!(status == 2 && said.ends_with(&format!("it goes on with raw:{}", place.path("disk"))), "{said}");
    place.qemu_io(pid, "read -P 7 0 64k")?;
    place.qemu_io(pid, "read -P 9 64k 4k")?;
    place.done(&format!("pause -p {pid} -m 0"))?;
    place.done(&format!("unpause -p {pid} -m 0 -a raw:{}", place.path("other")))?;
    place.qemu_io(pid, "read -P 0 0 1M")?;
    place.done(&format!("destroy -p {pid} -m 0"))?;
    assert_eq!(place.done("list")?, "");
    let left = |name: &str| std::fs::read_dir(place.path(name)).map(Iterator::count);
    assert_eq!((left("run")?, left("run/tapdisk")?), (1, 0), "only the folder for minor numbers");
    Ok(())
}

impl Drop for Place {
    /// A test that failed leaves no process behind.
    fn drop(&mut self) {
        let Ok((_, listed)) = self.run("list") else { return };
        for pid in listed.lines().filter_map(|row| row.strip_prefix("pid=")?.split(' ').next()) {
            // It may have ended by itself.
            let _ended = tool("kill", &["-9", pid]);
        }
    }
}

/// A request of 544 bytes, and everything that comes back; sent in pieces of `piece` bytes.
fn ask(path: &str, request: [u8; 544], piece: usize) -> Result<Vec<u8>, Failed> {
    let mut stream = UnixStream::connect(path)?;
    for part in request.chunks(piece) {
        stream.write_all(part)?;
        std::thread::sleep(Duration::from_micros(50));
    }
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

fn request(kind: u8, minor: u8, path: &str) -> [u8; 544] {
    let mut bytes = [0; 544];
    (bytes[0], bytes[2]) = (kind, minor);
    // Flags: through the page cache, which a resume ignores.
    bytes[9] = if kind == 7 { 2 } else { 0 };
    bytes[20..20 + path.len()].copy_from_slice(path.as_bytes());
    bytes
}

fn bytes() -> Done {
    let place = Place::new()?;
    let pid = place.create()?;
    let socket = place.path(&format!("run/ctl{pid}"));
    let answer = ask(&socket, request(3, 0, ""), 544)?;
    assert_eq!((answer.len(), answer[0], &answer[8..12]), (544, 4, &pid.to_le_bytes()[..]));
    for piece in [1, 100] {
        let answer = ask(&socket, request(19, 0, ""), piece)?;
        assert_eq!((answer.len(), answer[0], answer[544]), (2 * 544, 20, 20));
        assert_eq!((answer[8], answer[12], answer[16]), (1, 0, 0), "count, minor, state");
        assert_eq!((answer[552], &answer[556..560]), (0, &[0xff; 4][..]), "the end");
        assert_eq!(
            answer[20..].split(|byte| *byte == 0).next(),
            Some(format!("raw:{}", place.path("disk")).as_bytes())
        );
    }
    for (kind, expected) in [(9, 10), (11, 12), (13, 14)] {
        let answer = ask(&socket, request(kind, 0, ""), 544)?;
        assert_eq!((answer.len(), answer[0], answer[2]), (544, expected, 0), "{kind}");
    }
    let answer = ask(&socket, request(7, 0, &format!("aio:{}", place.path("other"))), 544)?;
    assert_eq!(
        (answer[0], &answer[8..16], &answer[16..20]),
        (8, &2048_u64.to_le_bytes()[..], &[0, 2, 0, 0][..])
    );
    let answer = ask(&socket, request(21, 0, ""), 544)?;
    let length = u64::from_le_bytes(answer[16..24].try_into()?);
    assert_eq!((answer[0], answer.len() as u64, answer[544]), (22, 544 + length, b'{'));
    let answer = ask(&socket, request(9, 5, ""), 544)?;
    assert_eq!((answer[0], answer[8]), (1, 19), "no such device");
    let answer = ask(&socket, request(200, 0, ""), 544)?;
    assert_eq!((answer[0], answer[8]), (1, 22), "no such request");
    place.done(&format!("destroy -p {pid} -m 0")).map(drop)
}

/// A line, and the answer to it: what is true of `ok`, or the number of the error. Sent in pieces of `piece` bytes.
fn ask_json(path: &str, line: &[u8], piece: usize) -> Result<Result<Value, i64>, Failed> {
    let mut stream = UnixStream::connect(path)?;
    for part in line.chunks(piece) {
        stream.write_all(part)?;
        std::thread::sleep(Duration::from_micros(50));
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    assert_eq!(answer.find('\n'), answer.len().checked_sub(1), "one line: {answer}");
    let answer: Value = serde_json::from_str(&answer)?;
    match (answer.get("ok"), answer["error"]["errno"].as_i64()) {
        (Some(ok), None) => Ok(Ok(ok.clone())),
        (None, Some(errno)) if answer["error"]["words"].is_string() => Ok(Err(errno)),
        _ => Err(format!("the answer is {answer}").into()),
    }
}

fn lines() -> Done {
    let place = Place::new()?;
    let pid = place.create()?;
    let socket = place.path(&format!("run/json{pid}"));
    assert_eq!(metadata(&socket)?.permissions().mode() & 0o777, 0o600);
    for piece in [1, 1000] {
        let list = ask_json(&socket, b"{\"verb\":\"list\"}\n", piece)?.expect("it is a request");
        let disk = &list["disks"][0];
        assert_eq!(
            (&disk["minor"], &disk["state"], &disk["size_sectors"]),
            (&0.into(), &"running".into(), &2048.into())
        );
        assert_eq!(disk["image"], format!("raw:{}", place.path("disk")));
    }
    let stats = ask_json(&socket, b"{\"verb\":\"stats\",\"minor\":0}\n", 1000)?.expect("it is a request");
    let told: Value = serde_json::from_str(&place.done(&format!("stats -p {pid}"))?)?;
    assert_eq!(told, stats["disks"]);
    let metrics = place.done(&format!("metrics -p {pid}"))?;
    assert!(metrics.starts_with("# TYPE ") && metrics.ends_with("\n# EOF"), "{metrics}");
    assert!(metrics.contains("\ntapdisk_requests_total{minor=\"0\",operation=\"read\"} 0\n"), "{metrics}");
    for (line, errno) in [
        (&b"{\"verb\":\"list\"}"[..], 22),
        (b"{\"verb\":\"fly\"}\n", 22),
        (b"{\"verb\":\"list\",\"depth\":1}\n", 22),
        (b"\xff\xfe\0\n", 22),
        (b"{\"verb\":\"stats\",\"minor\":9}\n", 19),
    ] {
        assert_eq!(ask_json(&socket, line, 1000)?, Err(errno), "{}", line.escape_ascii());
    }
    // One without an end is cut off.
    let mut stream = UnixStream::connect(&socket)?;
    let cut_off = (0..100).any(|_| stream.write_all(&[b'['; 4096]).is_err());
    assert!(cut_off);
    std::thread::scope(|scope| {
        let ask = || ask_json(&socket, b"{\"verb\":\"list\"}\n", 3).is_ok_and(|answer| answer.is_ok());
        let clients: Vec<_> = (0..10).map(|_| scope.spawn(ask)).collect();
        assert!(clients.into_iter().all(|client| client.join().is_ok_and(|answered| answered)));
    });
    place.done(&format!("destroy -p {pid} -m 0"))?;
    assert!(!std::path::Path::new(&socket).exists());
    Ok(())
}

fn killed() -> Done {
    let place = Place::new()?;
    let first = place.create()?;
    place.qemu_io(first, "write -P 7 0 64k")?;
    tool("kill", &["-9", &first.to_string()])?;
    until_gone(first);
    assert_eq!(place.done("list")?, "minor=0");
    let spawned = place.done("spawn --json")?;
    let pid = spawned.trim_start_matches("{\"pid\":").trim_end_matches('}').parse()?;
    place.done(&format!("attach -p {pid} -m 0"))?;
    place.done(&format!("open -D -p {pid} -m 0 -a raw:{}", place.path("disk")))?;
    place.qemu_io(pid, "read -P 7 0 64k")?;
    place.done(&format!("destroy -p {pid} -m 0")).map(drop)
}

fn until_gone(pid: u32) {
    while std::path::Path::new(&format!("/proc/{pid}/fd/0")).exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn dead() -> Done {
    let place = Place::new()?;
    let first = place.create()?;
    tool("kill", &["-9", &first.to_string()])?;
    until_gone(first);
    let sockets = || -> Result<Vec<String>, Failed> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(place.path("run"))? {
            names.extend(entry?.file_name().into_string().ok().filter(|name| name != "tapdisk"));
        }
        names.sort();
        Ok(names)
    };
    assert_eq!(sockets()?, [format!("ctl{first}"), format!("json{first}"), format!("nbd{first}.0")]);
    assert_eq!(place.done("list")?, "minor=0");
    let spawned = place.done("spawn --json")?;
    let pid = spawned.trim_start_matches("{\"pid\":").trim_end_matches('}');
    assert_eq!(sockets()?, [format!("ctl{pid}"), format!("json{pid}")]);
    // Those of a tapdisk that lives stay.
    place.done("spawn")?;
    assert_eq!(sockets()?.len(), 4);
    Ok(())
}

fn markers() -> Done {
    let place = Place::new()?;
    let pid = place.create()?;
    let marker = std::fs::File::open(place.path("run/tapdisk/tapdisk-0"))?;
    assert!(marker.try_lock().is_err(), "the tapdisk has it");
    place.done(&format!("destroy -p {pid} -m 0"))?;
    place.done("allocate")?;
    let marker = std::fs::File::open(place.path("run/tapdisk/tapdisk-0"))?;
    marker.lock()?;
    assert_eq!(place.run("free -m 0")?.0, 16);
    let spawned = place.done("spawn")?;
    assert_eq!(place.run(&format!("attach -p {spawned} -m 0"))?.0, 16);
    drop(marker);
    place.done(&format!("attach -p {spawned} -m 0"))?;
    Ok(())
}

/// A lock on a descriptor of a script ends with the script.
fn keeps_nothing() -> Done {
    let place = Place::new()?;
    let script = "exec 9> \"$1\"; \"$2\" control --fork --folder \"$3\"";
    let arguments = [&place.path("lock"), TAPDISK, &place.path("run")];
    let output = Command::new("sh").args(["-c", script, "sh"]).args(arguments).output()?;
    let said = String::from_utf8(output.stdout)?;
    let pid = said.trim_end().strip_prefix(&place.path("run/ctl")).ok_or("a socket")?;
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let open = std::fs::read_link(entry?.path())?;
        assert_ne!(open.display().to_string(), place.path("lock"));
    }
    Ok(())
}

fn held_up() -> Done {
    let place = Place::new()?;
    let (socket, number) = (format!("unix:{}", place.path("s")), place.path("pid"));
    let image = format!("raw:{}", place.path("disk"));
    tool(
        TAPDISK,
        &["serve", "--fork", "--pid-file", &number, "--run-dir", &place.path(""), "--nbd", &socket, &image],
    )?;
    let server = std::fs::read_to_string(&number)?.trim_end().to_owned();
    place.done(&format!("create -a nbd:{socket} -- --pause-limit 1"))?;
    let listed = place.done("list")?;
    let pid = listed.strip_prefix("pid=").and_then(|row| row.split(' ').next()).ok_or("a number")?.to_owned();
    tool("kill", &["-STOP", &server])?;
    let uri = format!("nbd+unix:///?socket={}", place.path(&format!("run/nbd{pid}.0")));
    let mut writer = Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write 0 4k", &uri])
        .stdout(Stdio::null())
        .spawn()?;
    while !place.done(&format!("stats -p {pid} -m 0"))?.contains("\"in_flight\":1") {
        std::thread::sleep(Duration::from_millis(5));
    }
    let (status, said) = place.run(&format!("close -f -p {pid} -m 0"))?;
    assert!(status == 110 && said.contains(&format!("nbd:{socket} is in use after 1 s")), "{status}: {said}");
    writer.wait()?;
    tool("kill", &["-TERM", &pid])?;
    std::thread::sleep(Duration::from_millis(1500));
    let (status, said) = place.run(&format!("attach -p {pid} -m 1"))?;
    assert!(status == 108 && said.contains("the tapdisk ends"), "{status}: {said}");
    assert!(std::path::Path::new(&format!("/proc/{pid}/fd/0")).exists(), "it waits for its storage");
    tool("kill", &["-TERM", &pid])?;
    until_gone(pid.parse()?);
    tool("kill", &["-CONT", &server])?;
    tool("kill", &["-TERM", &server]).map(drop)
}
