//! Archives in the format of the kernel's initramfs: cpio, "newc".
//!
//! ```text
//!   header (110 characters of hex) | name, NUL | pad to 4 | data | pad to 4      ...      TRAILER!!!
//! ```
//!
//! Written here and not by `cpio`, because this way it can contain device nodes and files owned by root without root
//! privileges. Follows Documentation/driver-api/early-userspace/buffer-format.rst of Linux. The kernel reads several
//! archives one after the other, and later files replace earlier ones.

use super::Result;
use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTERS: u32 = 0o020_000;

/// An archive that is being written. Paths are relative to the root, without a leading slash; missing parent
/// directories are made; an entry whose path is already present is left out.
pub(super) struct Archive<W> {
    to: W,
    names: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    pub(super) fn new(to: W) -> Self {
        Self { to, names: BTreeSet::new() }
    }

    pub(super) fn directory(&mut self, path: &str) -> Result<()> {
        let path = merged(path);
        self.add(&path, DIRECTORY | 0o755, (0, 0), &[])
    }

    /// `mode` is only the permission bits.
    pub(super) fn file(&mut self, path: &str, mode: u32, data: &[u8]) -> Result<()> {
        let path = merged(path);
        self.add(&path, FILE | mode & 0o7777, (0, 0), data)
    }

    /// A symbolic link. Its own path is used unchanged, so that the links of a merged /usr can be made.
    pub(super) fn link(&mut self, path: &str, target: &str) -> Result<()> {
        self.add(path, LINK | 0o777, (0, 0), target.as_bytes())
    }

    pub(super) fn character_device(&mut self, path: &str, major: u32, minor: u32) -> Result<()> {
        self.add(path, CHARACTERS | 0o600, (major, minor), &[])
    }

    /// A file of this machine, links followed.
    pub(super) fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let say = |e| format!("read {}: {e}", from.display());
        let mode = fs::metadata(from).map_err(say)?.permissions().mode();
        self.file(path, mode, &fs::read(from).map_err(say)?)
    }

    /// A directory of this machine with all its contents.
    pub(super) fn tree(&mut self, path: &str, from: &Path) -> Result<()> {
        let say = |e| format!("read {}: {e}", from.display());
        let mut entries =
            fs::read_dir(from).map_err(say)?.collect::<std::io::Result<Vec<_>>>().map_err(say)?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let name = entry.file_name().into_string().map_err(|n| format!("copy {n:?}: not in UTF-8"))?;
            let inner = if path.is_empty() { name } else { format!("{path}/{name}") };
            let kind = entry.file_type().map_err(say)?;
            if kind.is_dir() {
                self.directory(&inner)?;
                self.tree(&inner, &entry.path())?;
            } else if kind.is_symlink() {
                let target = fs::read_link(entry.path()).map_err(say)?;
                self.link(&merged(&inner), &target.display().to_string())?;
            } else if kind.is_file() {
                self.copy(&inner, &entry.path())?;
            }
        }
        Ok(())
    }

    /// Writes the trailer; without it the kernel would read past the end of the archive.
    pub(super) fn finish(mut self) -> Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.to)
    }

    fn add(&mut self, path: &str, mode: u32, device: (u32, u32), data: &[u8]) -> Result<()> {
        if let Some((above, _)) = path.rsplit_once('/') {
            self.directory(above)?;
        }
        if self.names.insert(path.to_owned()) { self.entry(path, mode, device, data) } else { Ok(()) }
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) -> Result<()> {
        let inode = self.names.len() as u32;
        let size = u32::try_from(data.len()).map_err(|_| format!("pack {name}: larger than 4 GiB"))?;
        let links = if mode & DIRECTORY != 0 && mode & FILE == 0 { 2 } else { 1 };
        let (major, minor) = device;
        // Owner, group, time and the archive's own device are all 0: the same input gives the same bytes.
        let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, name.len() as u32 + 1, 0];
        let mut header = String::from("070701");
        for field in fields {
            header += &format!("{field:08X}");
        }
        self.padded(&[header.as_bytes(), name.as_bytes(), &[0]])?;
        self.padded(&[data])
    }

    fn padded(&mut self, parts: &[&[u8]]) -> Result<()> {
        let mut size = 0;
        for part in parts {
            self.to.write_all(part)?;
            size += part.len();
        }
        Ok(self.to.write_all(&[0; 3][..size.next_multiple_of(4) - size])?)
    }
}

/// The path on a system whose /bin, /sbin and /lib are links into /usr: a directory must not replace such a link.
fn merged(path: &str) -> String {
    let first = path.split('/').next().unwrap_or("");
    if matches!(first, "bin" | "sbin" | "lib" | "lib64") { format!("usr/{path}") } else { path.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names, modes and data of an archive, read by the format's rules.
    fn entries(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut found = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).expect("hex");
                u32::from_str_radix(text, 16).expect("hex") as usize
            };
            let (mode, size, name_size) = (field(1) as u32, field(6), field(11));
            let name = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).expect("a name");
            let start = (110 + name_size).next_multiple_of(4);
            let data = bytes[start..start + size].to_vec();
            bytes = &bytes[(start + size).next_multiple_of(4)..];
            if name == "TRAILER!!!" {
                assert!(bytes.is_empty());
                return found;
            }
            found.push((name, mode, data));
        }
    }

    #[test]
    fn directories_come_first_and_once() {
        let mut archive = Archive::new(Vec::new());
        archive.file("a/b/one", 0o755, b"1").expect("written");
        archive.file("a/b/two", 0o644, b"22222").expect("written");
        archive.file("a/b/two", 0o644, b"left out").expect("written");
        archive.link("a/three", "b/one").expect("written");
        let found = entries(&archive.finish().expect("written"));
        let expected = [
            ("a", 0o040_755, ""),
            ("a/b", 0o040_755, ""),
            ("a/b/one", 0o100_755, "1"),
            ("a/b/two", 0o100_644, "22222"),
            ("a/three", 0o120_777, "b/one"),
        ];
        let expected = expected.map(|(name, mode, data)| (name.to_owned(), mode, data.as_bytes().to_vec()));
        assert_eq!(found, expected);
    }

    #[test]
    fn bin_goes_into_usr() {
        assert_eq!(merged("bin/x"), "usr/bin/x");
        assert_eq!(merged("lib64/y"), "usr/lib64/y");
        assert_eq!(merged("library/z"), "library/z");
        assert_eq!(merged("usr/bin/x"), "usr/bin/x");
    }
}
