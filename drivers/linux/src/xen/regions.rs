//! Named pages that survive the process: files of one page each, in a folder of ours on a tmpfs.

use super::page::LinuxPage;
use crate::files::of_rustix;
use rustix::fs::{
    AtFlags, CWD, Dir, FallocateFlags, FileType, FlockOperation, Mode, OFlags, fallocate, flock, fstat,
    mkdirat, openat, unlinkat,
};
use std::os::fd::OwnedFd;
use std::path::Path;
use tap_host::{Errno, PAGE_BYTES};

/// The folder, open.
pub(crate) struct Regions(OwnedFd);

impl Regions {
    /// Opens the folder; makes it and its parents if it does not exist.
    ///
    /// # Errors
    /// What the kernel says; `EACCES` if others could put their own files into it.
    pub(super) fn open(folder: &Path) -> Result<Self, Errno> {
        make(folder)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = openat(CWD, folder, flags, Mode::empty()).map_err(of_rustix)?;
        let stat = fstat(&fd).map_err(of_rustix)?;
        let writable_for_others = Mode::from_raw_mode(stat.st_mode).intersects(Mode::WGRP | Mode::WOTH);
        if writable_for_others || stat.st_uid != rustix::process::geteuid().as_raw() {
            return Err(Errno::EACCES);
        }
        Ok(Self(fd))
    }

    /// See [`tap_host::SharedPages::region`].
    pub(super) fn region(&self, name: &str) -> Result<LinuxPage, Errno> {
        map(&self.file(name)?)
    }

    /// See [`tap_host::SharedPages::own_region`]. The lock is the open file's, which the mapping keeps open.
    pub(super) fn own(&self, name: &str) -> Result<LinuxPage, Errno> {
        loop {
            let fd = self.file(name)?;
            match flock(&fd, FlockOperation::NonBlockingLockExclusive).map_err(of_rustix) {
                Ok(()) => {}
                Err(Errno::EAGAIN) => return Err(Errno::EBUSY),
                Err(error) => return Err(error),
            }
            // The previous owner may have removed the name between our two calls: the locked file then has no name.
            if fstat(&fd).map_err(of_rustix)?.st_nlink > 0 {
                return map(&fd);
            }
        }
    }

    /// The file of a page, with its memory.
    fn file(&self, name: &str) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = openat(&self.0, file_name(name)?, flags, Mode::RUSR | Mode::WUSR).map_err(of_rustix)?;
        let stat = fstat(&fd).map_err(of_rustix)?;
        let page = PAGE_BYTES as u64;
        let expected = u64::try_from(stat.st_size).is_ok_and(|size| size == 0 || size == page);
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || !expected {
            return Err(Errno::EINVAL);
        }
        // Memory that is missing now would raise SIGBUS later.
        fallocate(&fd, FallocateFlags::empty(), 0, page).map_err(of_rustix)?;
        Ok(fd)
    }

    /// See [`tap_host::SharedPages::remove_region`].
    ///
    /// # Errors
    /// The kernel's error, except `ENOENT`.
    pub(super) fn remove(&self, name: &str) -> Result<(), Errno> {
        match unlinkat(&self.0, file_name(name)?, AtFlags::empty()).map_err(of_rustix) {
            Err(Errno::ENOENT) => Ok(()),
            result => result,
        }
    }

    /// See [`tap_host::SharedPages::region_names`].
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn names(&self) -> Result<Vec<String>, Errno> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.0).map_err(of_rustix)? {
            let entry = entry.map_err(of_rustix)?;
            // Files with other kinds of names are not ours.
            if let Ok(name) = entry.file_name().to_str()
                && file_name(name).is_ok()
            {
                names.push(name.to_owned());
            }
        }
        names.sort_unstable();
        Ok(names)
    }
}

/// See [`tap_host::SharedPages::boot_id`].
///
/// # Errors
/// What the kernel says.
pub(super) fn boot_id() -> Result<[u8; 16], Errno> {
    let text =
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(|e| crate::files::errno(&e))?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&digits, 16).map(u128::to_be_bytes).map_err(|_| Errno::EINVAL)
}

fn map(fd: &OwnedFd) -> Result<LinuxPage, Errno> {
    LinuxPage::map(fd, 0, true, None)
}

/// Makes a folder for ourselves.
fn make(folder: &Path) -> Result<(), Errno> {
    match mkdirat(CWD, folder, Mode::RWXU).map_err(of_rustix) {
        Err(Errno::EEXIST) => Ok(()),
        Err(Errno::ENOENT) => {
            let above = folder.parent().filter(|above| !above.as_os_str().is_empty()).ok_or(Errno::ENOENT)?;
            make(above)?;
            mkdirat(CWD, folder, Mode::RWXU).map_err(of_rustix)
        }
        result => result,
    }
}

/// The name of a file in the folder itself.
fn file_name(name: &str) -> Result<&str, Errno> {
    let plain = !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\0']);
    if plain { Ok(name) } else { Err(Errno::EINVAL) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use tap_host::SharedPage;

    #[test]
    fn a_page_outlives_its_mapping_and_not_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("a/b");
        let regions = Regions::open(&folder).unwrap();
        let page = regions.region("x").unwrap();
        assert_eq!(page.load_u32(4092), 0);
        page.store_u32(4092, 7);
        let meta = fs::metadata(folder.join("x")).unwrap();
        assert_eq!((meta.mode() & 0o777, meta.len(), meta.blocks() * 512), (0o600, 4096, 4096));
        drop(page);
        let again = Regions::open(&folder).unwrap().region("x").unwrap();
        assert_eq!(again.load_u32(4092), 7);
        regions.remove("x").unwrap();
        regions.remove("x").unwrap();
        assert_eq!(again.load_u32(4092), 7, "removing a name does not affect existing mappings");
        assert_eq!(regions.region("x").unwrap().load_u32(4092), 0);
    }

    #[test]
    fn a_page_is_owned_as_long_as_it_is_mapped() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("r");
        let (one, other) = (Regions::open(&folder).unwrap(), Regions::open(&folder).unwrap());
        let page = one.own("x").unwrap();
        let clone = page.clone();
        drop(page);
        assert_eq!(other.own("x").err(), Some(Errno::EBUSY), "the file is closed but still mapped");
        other.region("x").unwrap();
        drop(clone);
        let again = other.own("x").unwrap();
        one.remove("x").unwrap();
        one.own("x").unwrap();
        drop(again);
    }

    #[test]
    fn bytes_at_any_place() {
        let dir = tempfile::tempdir().unwrap();
        let regions = Regions::open(&dir.path().join("r")).unwrap();
        let (page, other) = (regions.region("x").unwrap(), regions.region("x").unwrap());
        let bytes: Vec<u8> = (1..=250).collect();
        for (offset, len) in [(0, 250), (1, 250), (7, 1), (8, 8), (9, 23), (3846, 250), (4096, 0), (4095, 1)]
        {
            page.copy_out(offset, &[0; 250][..len]);
            page.copy_out(offset, &bytes[..len]);
            let mut seen = vec![0; len];
            other.copy_in(offset, &mut seen);
            assert_eq!(seen, bytes[..len], "{len} at {offset}");
        }
        page.copy_out(16, &[1, 2, 3, 4]);
        assert_eq!(other.load_u32(16), 0x0403_0201);
        other.store_u32(16, 0x0807_0605);
        let mut seen = [0; 6];
        page.copy_in(15, &mut seen);
        assert_eq!(seen[1..5], [5, 6, 7, 8]);
    }

    #[test]
    #[should_panic(expected = "5 bytes at 4092 of a page")]
    fn nothing_is_read_behind_a_page() {
        let dir = tempfile::tempdir().unwrap();
        let regions = Regions::open(&dir.path().join("r")).unwrap();
        regions.region("x").unwrap().copy_in(4092, &mut [0; 5]);
    }

    #[test]
    fn what_others_may_have_put_there_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("r");
        let regions = Regions::open(&folder).unwrap();
        fs::write(folder.join("long"), [0; 4097]).unwrap();
        symlink("long", folder.join("link")).unwrap();
        fs::create_dir(folder.join("folder")).unwrap();
        for bad in ["long", "link", "folder", "", ".", "..", "../x", "a/b", "a\0"] {
            assert!(regions.region(bad).is_err(), "{bad:?}");
        }
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(Regions::open(&folder).err(), Some(Errno::EACCES));
    }
}
