//! Disks whose storage hangs, beside one whose storage does not: their file system is frozen.

use crate::server::{Server, tool};
use crate::space::Mounted;
use libtest_mimic::{Completion, Failed, Trial};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Disks that hang, and clients of each, with sixteen requests at a time (QEMU's limit): more requests than the engine
/// has at a time.
const DISKS: u32 = 6;
const CLIENTS: u32 = 4;
const REQUESTS: u32 = 16;

pub(crate) fn tests() -> Vec<Trial> {
    // Not io_uring: in some runs (Linux 6.18) a flush waits there, in the kernel, beside writes through the page cache
    // that hang.
    vec![Trial::ignorable_test("hangs::disks_that_hang_do_not_stop_others/threads", || hang("threads"))]
}

/// A frozen file system: what writes to it waits until this is dropped.
struct Frozen<'a>(&'a Path);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _thawed = Command::new("fsfreeze").arg("-u").arg(self.0).status();
    }
}

/// Processes that end with the test.
struct Children(Vec<Child>);

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ended = child.kill();
            let _reaped = child.wait();
        }
    }
}

/// A qemu-io that carries these commands out.
fn qemu_io(server: &Server, disk: &str, commands: &[String]) -> Result<Child, Failed> {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "raw"]).args(commands.iter().flat_map(|command| ["-c", command]));
    command.arg(format!("nbd+unix:///{disk}?socket={}", server.socket().display()));
    Ok(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?)
}

fn hang(engine: &'static str) -> Result<Completion, Failed> {
    if ["qemu-io", "fsfreeze"].into_iter().any(|tool| !crate::is_there(tool)) {
        return Ok(Completion::ignored_with("qemu-io or fsfreeze is not installed"));
    }
    let folder = tempfile::tempdir()?;
    let mounted = match Mounted::new(folder.path(), 48 << 20)? {
        Ok(mounted) => mounted,
        Err(why) => return Ok(Completion::ignored_with(why)),
    };
    let mut specs = vec![format!("well=raw:{}", folder.path().join("well").display())];
    specs
        .extend((0..DISKS).map(|n| format!("hangs{n}=raw:{}", mounted.path().join(n.to_string()).display())));
    for spec in &specs {
        let path = spec.split_once("raw:").map_or("", |(_, path)| path);
        std::fs::File::create(path)?.set_len(8 << 20)?;
    }
    let fixed = ["--aio", engine, "--memory", "1G", "--connections", "32"];
    let args: Vec<&str> = fixed.into_iter().chain(specs.iter().map(String::as_str)).collect();
    let server = Server::start(&folder.path().join("socket"), &args)?;
    tool("sync", &[])?;
    let frozen = Frozen(mounted.path());
    tool("fsfreeze", &["-f", &mounted.path().display().to_string()])?;
    let mut clients = Children(Vec::new());
    for (disk, client) in (0..DISKS).flat_map(|disk| (0..CLIENTS).map(move |client| (disk, client))) {
        // Nothing is contiguous, so nothing is merged.
        let at = |n: u32| (n * CLIENTS + client) * 64;
        let writes: Vec<String> = (0..REQUESTS).map(|n| format!("aio_write {}k 4k", at(n))).collect();
        clients.0.push(qemu_io(&server, &format!("hangs{disk}"), &writes)?);
    }
    std::thread::sleep(Duration::from_secs(1));
    let commands = ["write -P 7 1M 64k", "flush", "read -P 7 1M 64k"].map(str::to_owned);
    let mut well = Children(vec![qemu_io(&server, "well", &commands)?]);
    let mut ended = None;
    for _ in 0..2000 {
        ended = well.0[0].try_wait()?;
        if ended.is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let states: Vec<_> = clients.0.iter_mut().map(Child::try_wait).collect();
    drop(frozen);
    let status = ended.ok_or("a disk waits for the storage of others")?;
    assert!(status.success(), "{status}");
    // Each of them has as many requests as there once were threads for all disks.
    let hang = states.iter().filter(|state| matches!(state, Ok(None))).count();
    assert!(2 * hang >= states.len(), "the storage of the others was not silent: {states:?}");
    Ok(Completion::Completed)
}
