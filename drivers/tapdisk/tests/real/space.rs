//! A file system under a disk runs full, and later has space again.

use crate::Done;
use crate::client::{Client, FLUSH, WRITE};
use crate::server::{Server, TAP_IMG, tool};
use libtest_mimic::{Completion, Failed, Trial};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// NBD's error number.
const ENOSPC: u32 = 28;

/// A small file system in a file; unmounted when dropped.
pub(crate) struct Mounted(PathBuf);

impl Mounted {
    /// One of so many bytes, in `folder`; or why there is none.
    pub(crate) fn new(folder: &Path, bytes: u64) -> Result<Result<Self, &'static str>, Failed> {
        let (device, at) = (folder.join("ext4.img"), folder.join("mnt"));
        std::fs::create_dir(&at)?;
        std::fs::File::create(&device)?.set_len(bytes)?;
        let made = Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&device).output();
        if !made.is_ok_and(|m| m.status.success()) {
            return Ok(Err("mkfs.ext4 is not installed"));
        }
        let mount = Command::new("mount").args(["-o", "loop"]).arg(&device).arg(&at).output();
        match mount.is_ok_and(|m| m.status.success()) {
            true => Ok(Ok(Self(at))),
            false => Ok(Err("mounting is not permitted here")),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // The last operations of a server that was killed may still have files there.
        for _ in 0..100 {
            if Command::new("umount").arg(&self.0).stderr(Stdio::null()).status().is_ok_and(|s| s.success()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

pub(crate) fn tests() -> Vec<Trial> {
    let zeros = |engine: &'static str| {
        Trial::ignorable_test(format!("zeros_that_fail_bring_nothing_back::{engine}"), move || zeros(engine))
    };
    vec![passing(), zeros("threads"), zeros("io_uring")]
}

/// ext4 drops the dirty pages of a range before it finds that there is no space to zero it.
fn zeros(engine: &'static str) -> Result<Completion, Failed> {
    let folder = tempfile::tempdir()?;
    let mounted = match Mounted::new(folder.path(), 48 << 20)? {
        Ok(mounted) => mounted,
        Err(why) => return Ok(Completion::ignored_with(why)),
    };
    for format in ["raw", "qcow"] {
        zeros_on_full(mounted.path(), folder.path(), engine, format)?;
    }
    Ok(Completion::Completed)
}

fn zeros_on_full(folder: &Path, outside: &Path, engine: &str, format: &str) -> Done {
    const LEN: u32 = 1 << 20;
    let image = folder.join("disk").display().to_string();
    tool(TAP_IMG, &["create", "-q", "-f", format, &image, "16M"])?;
    let args = [&format!("{format}:{image}"), "--aio", engine];
    let server = Server::start(&outside.join("socket"), &args)?;
    let mut client = Client::connect(server.socket())?;
    let filled = |byte: u8| vec![byte; LEN as usize];
    const AT: u64 = 4 << 20;
    assert_eq!(client.ask(WRITE, AT, &filled(1))?, 0);
    assert_eq!(client.ask(FLUSH, 0, &[])?, 0);
    let filler = folder.join("filler");
    let mut dd = Command::new("dd");
    let full = dd.args(["if=/dev/zero", "bs=64k", "conv=fsync"]);
    let full = full.arg(format!("of={}", filler.display())).output()?;
    assert!(!full.status.success(), "the file system is not full");
    assert_eq!(client.ask(WRITE, AT, &filled(2))?, 0, "an overwrite takes no space");
    // On a raw disk the missing space is that of a hole in the file, before what was written.
    let refused = client.zero(0, AT as u32 + LEN)?;
    let now = client.read(AT, LEN)?;
    let old = now.iter().position(|byte| *byte == 1);
    assert_eq!(old, None, "{format}: zeros ended with {refused}, and overwritten bytes are back");
    assert_eq!(client.ask(FLUSH, 0, &[])?, 0);
    if format == "raw" {
        assert_eq!(refused, ENOSPC);
    }
    assert!(server.stop()?.success());
    std::fs::remove_file(filler)?;
    std::fs::remove_file(image)?;
    Ok(())
}

fn passing() -> Trial {
    Trial::ignorable_test("a_full_file_system_is_an_error_that_passes", || {
        let folder = tempfile::tempdir()?;
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=8m", "tapdisk-test"])
            .arg(folder.path())
            .output();
        if !mount.is_ok_and(|m| m.status.success()) {
            return Ok(Completion::ignored_with("mounting is not permitted here"));
        }
        let mounted = Mounted(folder.path().to_path_buf());
        full(mounted.path())?;
        Ok(Completion::Completed)
    })
}

fn full(folder: &Path) -> Done {
    let path = |name: &str| folder.join(name).display().to_string();
    let image = path("disk.qcow");
    tool(TAP_IMG, &["create", "-q", "-f", "qcow", &image, "64M"])?;
    std::fs::write(path("filler"), vec![1; 5 << 20])?;
    // The socket takes no space, but must be in a place that is not full.
    let outside = tempfile::tempdir()?;
    let server = Server::start(&outside.path().join("socket"), &[&format!("qcow:{image}")])?;
    let mut client = Client::connect(server.socket())?;
    let payload = |n: u64| vec![n as u8 + 1; 65536];
    let mut written = 0;
    let refused = loop {
        let error = client.ask(WRITE, written * 65536, &payload(written))?;
        if error != 0 {
            break error;
        }
        written += 1;
        assert!(written < 128, "8 MiB are never full");
    };
    assert_eq!(refused, ENOSPC);
    assert!(written > 20, "{written} pieces fitted");
    // What was answered is there, and the server continues.
    for n in 0..written {
        assert_eq!(client.read(n * 65536, 65536)?, payload(n), "piece {n}");
    }
    std::fs::remove_file(path("filler"))?;
    for n in written..written + 30 {
        assert_eq!(client.ask(WRITE, n * 65536, &payload(n))?, 0, "there is space again");
    }
    assert_eq!(client.ask(FLUSH, 0, &[])?, 0);
    assert!(server.stop()?.success());
    let said = tool(TAP_IMG, &["check", &image])?;
    assert!(said.starts_with("No errors were found"), "{said}");
    let server = Server::start(&outside.path().join("socket"), &[&format!("qcow:{image}"), "--read-only"])?;
    let mut client = Client::connect(server.socket())?;
    for n in 0..written + 30 {
        assert_eq!(client.read(n * 65536, 65536)?, payload(n), "piece {n} after all");
    }
    Ok(())
}
