//! Sockets that killed processes have left behind.

use super::is_stale;
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::process::{Pid, test_kill_process};
use std::path::Path;

/// Removes the sockets in `folder` at which nobody listens, and whose process is gone: `owner` tells it from a name;
/// what has none stays. Nothing is removed while another process begins to listen there: between its bind and its
/// listen its socket looks the same. Its own start removes what is left.
pub fn remove_dead_sockets(folder: &str, owner: impl Fn(&str) -> Option<u32>) {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(directory) = rustix::fs::open(folder, flags, Mode::empty()) else { return };
    // Released with the descriptor.
    if flock(&directory, FlockOperation::NonBlockingLockExclusive).is_err() {
        return;
    }
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for name in entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()) {
        let gone = owner(&name).is_some_and(is_gone);
        let path = Path::new(folder).join(&name).display().to_string();
        if gone && is_stale(&path) {
            // One that cannot be removed is in nobody's way.
            let _removed = rustix::fs::unlink(&path);
        }
    }
}

fn is_gone(pid: u32) -> bool {
    let Some(pid) = pid.try_into().ok().and_then(Pid::from_raw) else { return true };
    // A zombie has no descriptors any more.
    let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    test_kill_process(pid) == Err(rustix::io::Errno::SRCH) || status.contains(") Z ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{File, read_dir, write};
    use std::os::unix::net::UnixListener;

    fn owner(name: &str) -> Option<u32> {
        name.strip_prefix("ctl")?.parse().ok()
    }

    #[test]
    fn only_what_nobody_can_use_is_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        let mut ended = std::process::Command::new("true").spawn().expect("a process");
        let (own, gone) = (std::process::id(), ended.id());
        ended.wait().expect("it ends");
        let names =
            [format!("ctl{own}"), format!("ctl{gone}"), "other".to_owned(), format!("ctl{}", u32::MAX)];
        for name in &names {
            // The standard library leaves the path in place, as a dying process does.
            drop(UnixListener::bind(path(name)).expect("bound"));
        }
        // Of dead processes by their names, and yet in use.
        let _served = UnixListener::bind(path("ctl4194305")).expect("bound");
        write(path("ctl4194306"), "a file").expect("written");
        let left = || {
            let names = read_dir(folder.path()).expect("readable");
            let mut names: Vec<_> = names.map(|entry| entry.expect("readable").file_name()).collect();
            names.sort();
            names.into_iter().map(|name| name.into_string().expect("text")).collect::<Vec<_>>()
        };
        let before = left();
        let starting = File::open(folder.path()).expect("a folder");
        starting.lock().expect("a lock");
        remove_dead_sockets(&folder.path().display().to_string(), owner);
        assert_eq!(left(), before, "another process is starting");
        drop(starting);
        remove_dead_sockets(&folder.path().display().to_string(), owner);
        let mut stay = vec!["ctl4194305".into(), "ctl4194306".into(), names[0].clone(), "other".to_owned()];
        stay.sort();
        assert_eq!(left(), stay);
    }
}
