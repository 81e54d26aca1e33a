//! Minor numbers: a file for each that is taken.
//!
//! `allocate` makes the file, a tapdisk locks it as long as it has the number, `free` removes it unless it is locked. A
//! number that is free again may be given to another disk at once, so whoever locks a file makes sure that it still has
//! its name.

use super::{Ctl, CtlHost, Failure, Launch};
use serde_json::json;
use tap_host::{Errno, File, FileId, Files, IoBuf, IoVec, LockKind, OpenMode};

tap_host::listed! {
    pub(super) BUGS: Bug;
    MINOR_TWICE = "minor-twice", "two processes that allocate a minor number at the same time get the same one";
    FREED_IN_USE = "freed-in-use", "a minor number is freed although a tapdisk has it";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    MINOR_LOST = "minor-lost", "a minor number was taken by another process a moment before";
    MINOR_IN_USE = "minor-in-use", "a minor number was not freed because a tapdisk has it";
}

/// One more than the highest minor number.
const MINORS: u16 = 0xffff;
/// Where the kernel names its drivers' major numbers.
const DEVICES: &str = "/proc/devices";
/// The name of blktap2's block devices there.
const TAPDEV: &str = "tapdev";

/// The file for a minor number in the folder of control sockets.
pub fn marker_of(folder: &str, minor: u16) -> String {
    format!("{}/tapdisk-{minor}", markers_of(folder))
}

/// Names one allocation of a minor number, by its file: after the number was freed and allocated again it is another
/// text.
pub(crate) fn allocation_of(file: FileId) -> String {
    let FileId { device, inode, generation } = file;
    format!("{device:x}-{inode:x}-{generation:x}")
}

fn markers_of(folder: &str) -> String {
    format!("{folder}/tapdisk")
}

/// Whether `path` still names `file`: it may have been freed, and given to another disk, before `file` was locked.
///
/// # Errors
/// Those of looking.
pub(crate) async fn is_named<H: Files>(host: &H, path: &str, file: &H::File) -> Result<bool, Errno> {
    let ours = file.info().await?;
    let named = async { host.open(path, OpenMode::READ).await?.info().await };
    match named.await {
        Ok(named) => Ok(named.id == ours.id),
        Err(Errno::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

impl<H: CtlHost, L: Launch> Ctl<'_, H, L> {
    /// The minor numbers that are taken, in order.
    pub(super) async fn minors(&self) -> Result<Vec<u16>, Failure> {
        let folder = markers_of(&self.folder);
        let names = match self.host.names_in(&folder).await {
            Err(Errno::ENOENT) => Vec::new(),
            names => names.map_err(|error| Failure::new(error, format!("list {folder}: {error}")))?,
        };
        let minor = |name: String| name.strip_prefix("tapdisk-")?.parse().ok();
        let mut minors: Vec<u16> = names.into_iter().filter_map(minor).collect();
        minors.sort_unstable();
        Ok(minors)
    }

    /// Takes the lowest minor number that is free.
    pub(super) async fn allocate(&self) -> Result<u16, Failure> {
        let taken = self.minors().await?;
        for minor in (0..MINORS).filter(|minor| taken.binary_search(minor).is_err()) {
            let path = marker_of(&self.folder, minor);
            match self.host.open(&path, OpenMode::CREATE).await {
                Ok(_) => return Ok(minor),
                Err(Errno::EEXIST) if self.host.bug(&MINOR_TWICE) => return Ok(minor),
                // Somebody else was faster.
                Err(Errno::EEXIST) => self.host.mark(&MINOR_LOST),
                Err(error) => {
                    let hint = if error == Errno::ENOENT { "; the folder is missing" } else { "" };
                    return Err(Failure::new(
                        error,
                        format!("allocate a minor number: {path}: {error}{hint}"),
                    ));
                }
            }
        }
        Err(Failure::new(Errno::ENOSPC, "allocate a minor number: all are taken"))
    }

    pub(super) async fn free(&self, minor: u16) -> Result<(), Failure> {
        let path = marker_of(&self.folder, minor);
        let failure = |error: Errno, hint: &str| {
            Failure::new(error, format!("free minor {minor}: {path}: {error}{hint}"))
        };
        let file = self.host.open(&path, OpenMode::WRITE).await.map_err(|error| {
            failure(error, if error == Errno::ENOENT { "; it is not allocated" } else { "" })
        })?;
        match file.lock(LockKind::Sole).await {
            Err(Errno::EAGAIN) if self.host.bug(&FREED_IN_USE) => {}
            Err(Errno::EAGAIN) => {
                self.host.mark(&MINOR_IN_USE);
                return Err(failure(Errno::EBUSY, "; a tapdisk has it, detach it first"));
            }
            locked => locked.map_err(|error| failure(error, ""))?,
        }
        if !is_named(self.host, &path, &file).await.map_err(|error| failure(error, ""))? {
            return Err(failure(Errno::ENOENT, "; it was freed meanwhile"));
        }
        self.host.remove(&path).await.map_err(|error| failure(error, ""))
    }

    pub(super) async fn check(&self) -> Result<(), Failure> {
        let minor = self.allocate().await?;
        self.free(minor).await?;
        self.say("ok", &json!({ "ok": true }));
        Ok(())
    }

    pub(super) async fn major(&self) -> Result<(), Failure> {
        let none = || Failure::new(Errno::ENODEV, "find a major number: this kernel has no blktap2 module");
        let file = self.host.open(DEVICES, OpenMode::READ).await.map_err(|_| none())?;
        let buf = IoBuf::unpooled(1 << 16)
            .map_err(|error| Failure::new(error, format!("read {DEVICES}: {error}")))?;
        let (read, bufs) = file.read_at(0, IoVec::from_iter([buf])).await;
        let len = read.map_err(|error| Failure::new(error, format!("read {DEVICES}: {error}")))?;
        let major = major_in(&String::from_utf8_lossy(&bufs[0][..len])).ok_or_else(none)?;
        self.say(&major.to_string(), &json!({ "major": major }));
        Ok(())
    }
}

/// The major number of blktap2's block devices in the text of `/proc/devices`.
fn major_in(devices: &str) -> Option<u32> {
    let mut lines = devices.lines().skip_while(|line| !line.starts_with("Block devices"));
    lines.find_map(|line| line.trim().strip_suffix(TAPDEV)?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_number_is_that_of_the_block_device() {
        let text =
            "Character devices:\n  1 mem\n250 tapdev\n\nBlock devices:\n  8 sd\n254 tapdev\n259 blkext\n";
        assert_eq!(major_in(text), Some(254));
        assert_eq!(major_in("Character devices:\n250 tapdev\n\nBlock devices:\n  8 sd\n"), None);
    }
}
