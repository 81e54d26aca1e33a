//! The I/O priority of one disk, as the kernel sees it.

use crate::control::Place;
use crate::server::{TAP_CTL, tool};
use crate::{Add, Done};
use libtest_mimic::Failed;
use serde_json::Value;
use std::os::unix::fs::MetadataExt;

pub(crate) fn tests(add: Add) {
    let tools = &["qemu-io", "ionice"];
    add("priority::one_disk_has_its_own/io_uring".into(), tools, Box::new(|| one_of_two("io_uring")));
    add("priority::one_disk_has_its_own/threads".into(), tools, Box::new(|| one_of_two("threads")));
    add("priority::realtime_needs_a_permission".into(), &["setpriv"], Box::new(realtime));
}

/// What the kernel says about the threads that work for files, each once.
fn of_workers(pid: u32) -> Result<Vec<String>, Failed> {
    let mut seen = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = task?.path();
        if std::fs::read_to_string(path.join("comm"))?.trim_end() == "file" {
            let tid = path.file_name().and_then(|name| name.to_str()).ok_or("a thread has a number")?;
            seen.push(tool("ionice", &["-p", tid])?.trim_end().to_owned());
        }
    }
    seen.sort_unstable();
    seen.dedup();
    Ok(seen)
}

fn one_of_two(aio: &str) -> Done {
    let place = Place::new()?;
    place.done(&format!("create -D -a raw:{} -- --aio {aio}", place.path("disk")))?;
    let listed = place.done("list")?;
    let pid = listed.strip_prefix("pid=").and_then(|row| row.split(' ').next()?.parse().ok());
    let pid: u32 = pid.ok_or("there is a tapdisk")?;
    place.done("allocate")?;
    place.done(&format!("attach -p {pid} -m 1"))?;
    place.done(&format!("open -p {pid} -m 1 -D -a raw:{}", place.path("other")))?;
    let at = |minor: u32| format!("-p {pid} -m {minor}");
    let write = |minor: u32| {
        let uri = format!("nbd+unix:///?socket={}", place.path(&format!("run/nbd{pid}.{minor}")));
        tool(
            "qemu-io",
            &["-f", "raw", "-c", "write -P 7 0 64k", "-c", "flush", "-c", "read -P 7 0 64k", &uri],
        )
        .map(drop)
    };
    assert_eq!(place.done(&format!("set {}", at(0)))?, "ionice=none");
    assert_eq!(place.done(&format!("set {} --ionice best-effort:7", at(0)))?, "ionice=best-effort:7");
    write(0)?;
    // A file in memory needs no thread.
    let in_memory = tool("stat", &["-f", "-c", "%T", &place.path("disk")])?.trim_end() == "tmpfs";
    if !in_memory {
        assert_eq!(of_workers(pid)?, ["best-effort: prio 7"]);
    }
    let json: Value = serde_json::from_str(&place.done(&format!("--json set {} --ionice idle", at(0)))?)?;
    assert_eq!(json, serde_json::json!({ "minor": 0, "ionice": "idle" }));
    assert_eq!(place.done(&format!("set {}", at(1)))?, "ionice=none");
    write(1)?;
    for (minor, ionice) in [(0, "idle"), (1, "best-effort:5")] {
        place.done(&format!("set {} --ionice {ionice}", at(minor)))?;
    }
    for (minor, seen) in [(0, "idle"), (1, "best-effort: prio 5"), (0, "idle")] {
        // The thread that was idle for longest may have done nothing since the disk before.
        write(minor)?;
        assert!(in_memory || of_workers(pid)?.contains(&seen.to_owned()), "{seen}");
    }
    let (status, said) = place.run(&format!("set {} --ionice best-effort:8", at(0)))?;
    assert!(status == 22 && said.contains("'8' is not from 0 to 7, or none"), "{status}: {said}");
    assert_eq!(place.done(&format!("set {}", at(0)))?, "ionice=idle");
    place.done(&format!("close {}", at(0)))?;
    let (status, said) = place.run(&format!("set {}", at(0)))?;
    assert!(status == 22 && said.contains("it has no image open"), "{status}: {said}");
    place.done(&format!("open {} -D -a raw:{}", at(0), place.path("disk")))?;
    assert_eq!(place.done(&format!("set {}", at(0)))?, "ionice=none");
    Ok(())
}

fn realtime() -> Done {
    let place = Place::new()?;
    let (folder, image) = (place.path("run"), format!("raw:{}", place.path("disk")));
    let create = [TAP_CTL, "--folder", &folder, "create", "-D", "-a", &image];
    // Only root could have it.
    let is_root = std::fs::metadata("/proc/self")?.uid() == 0;
    match is_root {
        true => tool("setpriv", &[&["--bounding-set", "-sys_nice,-sys_admin"], &create[..]].concat())?,
        false => tool(create[0], &create[1..])?,
    };
    let listed = place.done("list")?;
    let pid = listed.strip_prefix("pid=").and_then(|row| row.split(' ').next());
    let at = format!("-p {} -m 0", pid.ok_or("there is a tapdisk")?);
    place.done(&format!("set {at} --ionice best-effort:3"))?;
    let (status, said) = place.run(&format!("set {at} --ionice realtime:1"))?;
    assert!(status == 1 && said.contains("the tapdisk needs CAP_SYS_NICE for it"), "{status}: {said}");
    assert_eq!(place.done(&format!("set {at}"))?, "ionice=best-effort:3");
    Ok(())
}
