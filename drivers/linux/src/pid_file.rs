//! A file with the number of this process, for those who want to signal it (`--pid-file`).
//!
//! It is locked for as long as the process lives, as QEMU locks its own: the number in a file that is locked is that of
//! a living process, and a file that a killed process has left behind is taken over.

use crate::files::{errno, of_rustix};
use rustix::fs::{FileType, FlockOperation, Mode, OFlags, flock, fstat, stat};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use tap_host::Errno;

/// A file with the number of this process; removed when dropped, if it is still the same one.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    file: File,
}

/// Why there is no such file.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PidFileError {
    /// The process that wrote it lives.
    #[error("write the PID file {}: it is in use by another process", .0.display())]
    InUse(PathBuf),
    /// Another kind of file has the path.
    #[error("write the PID file {}: not a regular file", .0.display())]
    NotAFile(PathBuf),
    /// The file has other content.
    #[error("write the PID file {}: it has {} bytes, so it is in use for something else", .0.display(), .1)]
    Other(PathBuf, i64),
    /// A system call failed.
    #[error("write the PID file {}: {}", .0.display(), .1)]
    Call(PathBuf, Errno),
}

/// Longest content of a file that is taken over, in bytes.
const PID_BYTES_MAX: i64 = 32;

impl PidFile {
    /// Writes the number of this process to `path`, readable by everyone, and locks the file.
    ///
    /// # Errors
    /// [`PidFileError`]; the file is then as it was, unless writing it failed.
    pub fn create(path: &Path) -> Result<Self, PidFileError> {
        let failed = |error| PidFileError::Call(path.to_owned(), error);
        // Without waiting for the reader of a pipe.
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        loop {
            let file = rustix::fs::open(path, flags, Mode::from_raw_mode(0o644));
            let file = file.map_err(of_rustix).map_err(failed)?;
            let opened = fstat(&file).map_err(of_rustix).map_err(failed)?;
            if FileType::from_raw_mode(opened.st_mode) != FileType::RegularFile {
                return Err(PidFileError::NotAFile(path.to_owned()));
            }
            if opened.st_size > PID_BYTES_MAX {
                return Err(PidFileError::Other(path.to_owned(), opened.st_size));
            }
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(PidFileError::InUse(path.to_owned())),
                locked => locked.map_err(of_rustix).map_err(failed)?,
            }
            // Its owner may have ended, and removed it, since it was opened.
            if stat(path).is_ok_and(|s| (s.st_dev, s.st_ino) == (opened.st_dev, opened.st_ino)) {
                let mut own = Self { path: path.to_owned(), file: file.into() };
                own.write().map_err(failed)?;
                return Ok(own);
            }
        }
    }

    fn write(&mut self) -> Result<(), Errno> {
        let text = format!("{}\n", std::process::id());
        self.file.set_len(0).and_then(|()| self.file.write_all(text.as_bytes())).map_err(|e| errno(&e))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let own = fstat(&self.file).map(|s| (s.st_dev, s.st_ino));
        if stat(&self.path).map(|s| (s.st_dev, s.st_ino)) == own {
            let _removed = rustix::fs::unlink(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{read_to_string, write};

    #[test]
    fn it_has_the_number_until_the_end_and_one_owner() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("pid");
        write(&path, "1234567890 of a killed process").expect("written");
        let own = PidFile::create(&path).expect("nobody has it locked");
        assert_eq!(read_to_string(&path).expect("readable"), format!("{}\n", std::process::id()));
        assert_eq!(PidFile::create(&path).err(), Some(PidFileError::InUse(path.clone())));
        drop(own);
        assert!(!path.exists());
        let own = PidFile::create(&path).expect("a new one");
        std::fs::remove_file(&path).expect("removed");
        write(&path, "of another").expect("written");
        drop(own);
        assert_eq!(read_to_string(&path).expect("left alone"), "of another");
    }

    /// A link that was made where the file will be does not get its target removed or overwritten.
    #[test]
    fn only_the_name_of_a_link_is_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        for (name, content) in [("small", "7\n"), ("large", "an administrator's file, not a number")] {
            write(path(name), content).expect("written");
            let soft = path(&format!("soft-{name}"));
            let hard = path(&format!("hard-{name}"));
            std::os::unix::fs::symlink(path(name), &soft).expect("a link");
            std::fs::hard_link(path(name), &hard).expect("a link");
            for link in [soft, hard] {
                let own = PidFile::create(&link);
                assert_eq!(own.is_ok(), name == "small", "{own:?}");
                drop(own);
                assert_eq!(link.symlink_metadata().is_ok(), name == "large", "{}", link.display());
                let left = read_to_string(path(name)).expect("the file itself stays");
                let number = format!("{}\n", std::process::id());
                assert_eq!(left, if name == "small" { number } else { content.to_owned() });
            }
        }
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let refused = |path: &Path| PidFile::create(path).err().map(|error| error.to_string());
        let said = refused(folder.path()).expect("a folder");
        assert!(said.starts_with("write the PID file /") && said.contains("EISDIR"), "{said}");
        let said = refused(Path::new("/dev/null")).expect("a device");
        assert_eq!(said, "write the PID file /dev/null: not a regular file");
        let image = folder.path().join("image");
        write(&image, [7; 512]).expect("written");
        let said = refused(&image).expect("a disk");
        assert!(said.ends_with("image: it has 512 bytes, so it is in use for something else"), "{said}");
        assert_eq!(std::fs::read(&image).expect("as it was"), [7; 512]);
        let said = refused(&folder.path().join("gone/pid")).expect("no such folder");
        assert!(said.contains("ENOENT"), "{said}");
    }
}
