//! A file system runs full under a disk, and has space again.

use crate::Done;
use crate::client::{Client, FLUSH, WRITE};
use crate::server::{Server, TAP_IMG, tool};
use libtest_mimic::{Completion, Trial};
use std::path::Path;
use std::process::Command;

/// NBD's number for it.
const ENOSPC: u32 = 28;

/// A small file system in memory; unmounted when dropped.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

pub(crate) fn test() -> Trial {
    Trial::ignorable_test("a_full_file_system_is_an_error_that_passes", || {
        let folder = tempfile::tempdir()?;
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=8m", "tapdisk-test"])
            .arg(folder.path())
            .output();
        if !mount.is_ok_and(|m| m.status.success()) {
            return Ok(Completion::ignored_with("mounting is not permitted here"));
        }
        let mounted = Mounted(folder.path());
        full(mounted.0)?;
        Ok(Completion::Completed)
    })
}

fn full(folder: &Path) -> Done {
    let path = |name: &str| folder.join(name).display().to_string();
    let image = path("disk.qcow");
    tool(TAP_IMG, &["create", "-q", "-f", "qcow", &image, "64M"])?;
    std::fs::write(path("filler"), vec![1; 5 << 20])?;
    // The socket needs no space, but a place that is not full.
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
    // What was answered is there, and the server goes on.
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
