//! What `/sys` and `/proc` say about the devices of the nbd driver.

use std::collections::BTreeSet;
use std::fs::{self, read_dir, read_to_string};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use tap_host::{NbdDevice, NbdIndex, SECTOR_BYTES};

/// The system as files show it; the root of a test is a folder.
pub(super) struct Shown {
    root: PathBuf,
}

impl Shown {
    pub(super) fn new() -> Self {
        Self { root: PathBuf::from("/") }
    }

    fn block(&self, index: NbdIndex) -> PathBuf {
        self.root.join(format!("sys/block/nbd{}", index.0))
    }

    /// The device, if it is attached.
    pub(super) fn device(&self, index: NbdIndex) -> Option<NbdDevice> {
        let folder = self.block(index);
        let read = |name: &str| read_to_string(folder.join(name)).ok().map(|text| text.trim_end().to_owned());
        // There as long as the device is attached.
        read("pid")?;
        let sectors: u64 = read("size")?.parse().ok()?;
        Some(NbdDevice {
            index,
            identifier: read("backend").unwrap_or_default(),
            size_bytes: sectors.saturating_mul(SECTOR_BYTES),
            read_only: read("ro")? == "1",
        })
    }

    /// The file with a setting of the device's queue.
    pub(super) fn queue(&self, index: NbdIndex, setting: &str) -> PathBuf {
        self.block(index).join("queue").join(setting)
    }

    /// The folders of the device and its partitions.
    fn folders(&self, index: NbdIndex) -> Vec<PathBuf> {
        let disk = self.block(index);
        let prefix = format!("nbd{}p", index.0);
        let is_part = |path: &PathBuf| name_of(path).starts_with(&prefix);
        let mut found: Vec<PathBuf> = entries(&disk).filter(is_part).collect();
        found.sort_unstable();
        found.insert(0, disk);
        found
    }

    /// Who uses the device or a partition of it, in words, other than process `own`. Mounts of other mount namespaces
    /// are not seen, unless a process there has a file of the device open.
    pub(super) fn users(&self, index: NbdIndex, own: u32) -> Vec<String> {
        let folders = self.folders(index);
        let names: BTreeSet<String> = folders.iter().map(|folder| name_of(folder)).collect();
        let numbers: BTreeSet<String> = folders
            .iter()
            .filter_map(|folder| read_to_string(folder.join("dev")).ok())
            .map(|text| text.trim_end().to_owned())
            .collect();
        let mut found = Vec::new();
        let mounts = read_to_string(self.root.join("proc/self/mountinfo")).unwrap_or_default();
        for line in mounts.lines() {
            let mut words = line.split(' ').skip(2);
            if let (Some(number), _, Some(at)) = (words.next(), words.next(), words.next())
                && numbers.contains(number)
            {
                found.push(format!("the mount at {}", unescaped(at)));
            }
        }
        let swaps = read_to_string(self.root.join("proc/swaps")).unwrap_or_default();
        let swap =
            |line: &str| line.split(' ').next().is_some_and(|path| names.contains(&name_of(Path::new(path))));
        found.extend(swaps.lines().filter(|line| swap(line)).map(|_| "swap".to_owned()));
        for folder in &folders {
            found.extend(entries(&folder.join("holders")).map(|held| name_of(&held)));
        }
        found.extend(self.guests(&numbers));
        found.extend(self.loops(&names));
        found.extend(self.processes(&numbers, own));
        found
    }

    /// The guests that xen-blkback serves one of the devices `numbers` to. It opens a device so that neither another
    /// exclusive open nor `holders` shows it.
    fn guests(&self, numbers: &BTreeSet<String>) -> Vec<String> {
        let serves = |folder: &PathBuf| {
            let text = read_to_string(folder.join("physical_device")).unwrap_or_default();
            let number = text.trim_end().split_once(':').and_then(|(major, minor)| {
                let hex = |digits| u32::from_str_radix(digits, 16).ok();
                Some(format!("{}:{}", hex(major)?, hex(minor)?))
            });
            number.is_some_and(|number| numbers.contains(&number))
        };
        let mut found: Vec<PathBuf> =
            entries(&self.root.join("sys/bus/xen-backend/devices")).filter(serves).collect();
        found.sort_unstable();
        found.iter().map(|folder| format!("xen-blkback ({})", name_of(folder))).collect()
    }

    /// The loop devices over one of the devices called `names`.
    fn loops(&self, names: &BTreeSet<String>) -> Vec<String> {
        let is_over = |folder: &PathBuf| {
            let path = read_to_string(folder.join("loop/backing_file")).unwrap_or_default();
            path.trim_end().strip_prefix("/dev/").is_some_and(|name| names.contains(name))
        };
        let mut found: Vec<PathBuf> = entries(&self.root.join("sys/block")).filter(is_over).collect();
        found.sort_unstable();
        found.iter().map(|folder| name_of(folder)).collect()
    }

    /// The processes that have one of the devices `numbers` open.
    fn processes(&self, numbers: &BTreeSet<String>, own: u32) -> Vec<String> {
        let is_device = |path: &PathBuf| {
            let leads = fs::read_link(path).is_ok_and(|target| target.starts_with(self.root.join("dev")));
            leads
                && fs::metadata(path).is_ok_and(|meta| {
                    let (major, minor) = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
                    meta.file_type().is_block_device() && numbers.contains(&format!("{major}:{minor}"))
                })
        };
        let mut pids: Vec<u32> =
            entries(&self.root.join("proc")).filter_map(|p| name_of(&p).parse().ok()).collect();
        pids.sort_unstable();
        let uses = |pid: &u32| {
            *pid != own && entries(&self.root.join(format!("proc/{pid}/fd"))).any(|fd| is_device(&fd))
        };
        let named = |pid: u32| {
            let name = read_to_string(self.root.join(format!("proc/{pid}/comm"))).unwrap_or_default();
            format!("process {pid} ({})", name.trim_end())
        };
        pids.into_iter().filter(uses).map(named).collect()
    }
}

/// The entries of a folder; none if it cannot be read.
fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()))
}

fn name_of(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// A path as `mountinfo` writes it: some characters are a backslash and three octal digits.
fn unescaped(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut found = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let digits = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match digits {
            Some(byte) => {
                found.push(char::from(byte));
                found.push_str(&part[3..]);
            }
            None => {
                found.push('\\');
                found.push_str(part);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("folders");
        fs::write(path, text).expect("written");
    }

    #[test]
    fn a_device_is_there_while_it_is_attached() {
        let root = tempfile::tempdir().expect("a folder");
        let shown = Shown { root: root.path().to_owned() };
        let (index, path) = (NbdIndex(3), |name: &str| format!("sys/block/nbd3/{name}"));
        write(root.path(), &path("size"), "0\n");
        write(root.path(), &path("ro"), "0\n");
        assert_eq!(shown.device(index), None);
        write(root.path(), &path("pid"), "77\n");
        write(root.path(), &path("size"), "2048\n");
        let device = NbdDevice { index, identifier: String::new(), size_bytes: 1 << 20, read_only: false };
        assert_eq!(shown.device(index), Some(device.clone()));
        write(root.path(), &path("backend"), "tapdisk-1\n");
        write(root.path(), &path("ro"), "1\n");
        let ours = NbdDevice { identifier: "tapdisk-1".into(), read_only: true, ..device };
        assert_eq!(shown.device(index), Some(ours));
        assert!(shown.queue(index, "io_timeout").ends_with("sys/block/nbd3/queue/io_timeout"));
    }

    #[test]
    fn mounts_swaps_and_holders_are_named() {
        let root = tempfile::tempdir().expect("a folder");
        let shown = Shown { root: root.path().to_owned() };
        write(root.path(), "sys/block/nbd1/dev", "43:32\n");
        write(root.path(), "sys/block/nbd1/nbd1p2/dev", "43:34\n");
        assert_eq!(shown.users(NbdIndex(1), 1), Vec::<String>::new());
        let mounts = "36 35 43:34 / /mnt/a\\040b rw - ext4 /dev/nbd1p2 rw\n37 35 43:0 / /other rw - ext4 /dev/nbd0 rw\n";
        write(root.path(), "proc/self/mountinfo", mounts);
        write(root.path(), "proc/swaps", "Filename Type\n/dev/nbd1p1 partition\n/dev/nbd1 partition\n");
        fs::create_dir_all(root.path().join("sys/block/nbd1/nbd1p2/holders")).expect("folders");
        symlink("../dm-0", root.path().join("sys/block/nbd1/nbd1p2/holders/dm-0")).expect("a link");
        assert_eq!(shown.users(NbdIndex(1), 1), ["the mount at /mnt/a b", "swap", "dm-0"]);
    }

    #[test]
    fn guests_of_xen_blkback_and_loop_devices_are_named() {
        let root = tempfile::tempdir().expect("a folder");
        let shown = Shown { root: root.path().to_owned() };
        write(root.path(), "sys/block/nbd1/dev", "43:32\n");
        write(root.path(), "sys/block/nbd1/nbd1p2/dev", "43:34\n");
        let devices = "sys/bus/xen-backend/devices";
        write(root.path(), &format!("{devices}/vbd-3-51712/physical_device"), "2b:20\n");
        write(root.path(), &format!("{devices}/vbd-4-51712/physical_device"), "2b:21\n");
        write(root.path(), &format!("{devices}/vbd-5-51728/physical_device"), "2b:22\n");
        write(root.path(), &format!("{devices}/vif-5-0/state"), "4\n");
        write(root.path(), "sys/block/loop0/loop/backing_file", "/dev/nbd1p2\n");
        write(root.path(), "sys/block/loop1/loop/backing_file", "/dev/nbd12\n");
        let users = ["xen-blkback (vbd-3-51712)", "xen-blkback (vbd-5-51728)", "loop0"];
        assert_eq!(shown.users(NbdIndex(1), 1), users);
    }

    #[test]
    fn escapes_of_paths() {
        for (text, path) in [("/a", "/a"), ("/a\\040b\\134", "/a b\\"), ("/a\\9", "/a\\9"), ("\\", "\\")] {
            assert_eq!(unescaped(text), path);
        }
    }
}
