//! Controls which backing files may be opened, and how.
//!
//! ```text
//!   top ──names──► middle ──names──► base
//!   written         read only         read only
//! ```
//!
//! The name of a backing file comes from the image, and a guest that once wrote a whole raw disk could have put it
//! there. So an image alone opens no file: the caller's [`BackingPolicy`] decides about every file, and its format.
//! Formats are recognised by content only where the caller says so.

use crate::format::ImageFormat;
use std::fmt;
use std::rc::Rc;
use tap_core::Node;
use tap_host::Budget;

/// What to use as a backing file.
#[derive(Clone)]
pub enum Backing {
    /// The file, read as an image of this format: the caller means this very file.
    File(ImageFormat),
    /// The file, read as an image of this format: the caller means any file. One that is to be read as a raw disk is
    /// refused if it begins like an image: its bytes would be shown as those of the disk.
    Any(ImageFormat),
    /// A node that already has the file open, such as the lease of an image that is being snapshotted. The image opened
    /// above it closes it.
    Open(Rc<dyn Node>),
}

impl From<ImageFormat> for Backing {
    fn from(format: ImageFormat) -> Self {
        Self::File(format)
    }
}

/// Returns what to use as the backing file at a path, or `None` to refuse it. Called again when opening is retried.
pub type BackingGate = Rc<dyn Fn(&str) -> Option<Backing>>;

/// Which backing files may be opened.
#[derive(Clone, Default)]
pub enum BackingPolicy {
    /// None: an image that names one is refused.
    #[default]
    Refuse,
    /// Called with the path of every backing file (relative names are resolved against the directory of the image that
    /// names them).
    Ask(BackingGate),
}

impl BackingPolicy {
    /// Any file, as `format`. For trusted images.
    pub fn any(format: ImageFormat) -> Self {
        Self::Ask(Rc::new(move |_| Some(Backing::Any(format))))
    }

    /// What to use as the backing file at `path`; `None` if it may not be opened.
    pub fn allowed(&self, path: &str) -> Option<Backing> {
        match self {
            Self::Refuse => None,
            Self::Ask(gate) => gate(path),
        }
    }

    /// Whether it may allow any file.
    pub fn is_asked(&self) -> bool {
        matches!(self, Self::Ask(_))
    }
}

impl fmt::Debug for BackingPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BackingPolicy::Refuse => "Refuse",
            BackingPolicy::Ask(_) => "Ask",
        })
    }
}

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Also for writing; takes the exclusive lock.
    pub write: bool,
    /// Read without a lock, although another process may be writing: what is read may be inconsistent.
    pub unlocked: bool,
    /// Bypass the host's page cache.
    pub direct: bool,
    /// Memory for the cached tables of one image, in bytes, while the budget has room. At least one is cached; tables
    /// in use are not counted.
    pub table_bytes: usize,
    /// Which backing files may be opened.
    pub backing: BackingPolicy,
    /// The budget for all memory of the image and everything below it.
    pub memory: Budget,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            write: false,
            unlocked: false,
            direct: false,
            table_bytes: TABLE_BYTES,
            backing: BackingPolicy::default(),
            memory: Budget::default(),
        }
    }
}

/// Enough for 8 GiB of disk in clusters of 4 KiB, or 128 GiB in clusters of 64 KiB.
const TABLE_BYTES: usize = 17 << 20;

/// Limit of images in one chain.
pub const MAX_CHAIN: usize = 64;

/// The path of the backing file that `image` calls `name`.
pub fn resolve(image: &str, name: &str) -> String {
    match image.rfind('/') {
        Some(slash) if !name.starts_with('/') => format!("{}{name}", &image[..=slash]),
        _ => name.to_owned(),
    }
}

/// A path without its last part: empty, or with a slash at its end.
pub fn folder(path: &str) -> &str {
    path.rfind('/').map_or("", |slash| &path[..=slash])
}

/// What the image at `image` calls the file at `path`, for [`resolve`]; `None` if no name is right.
pub fn name_beside(image: &str, path: &str) -> Option<String> {
    match folder(image) == folder(path) {
        true => Some(path[folder(path).len()..].to_owned()),
        false => path.starts_with('/').then(|| path.to_owned()),
    }
}

/// Whether two paths surely lead to the same file: they differ at most in `//` and `/./`.
pub fn same_path(a: &str, b: &str) -> bool {
    let is_part = |part: &&str| !matches!(*part, "" | ".");
    a.starts_with('/') == b.starts_with('/') && a.split('/').filter(is_part).eq(b.split('/').filter(is_part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_path_may_be_written_in_several_ways() {
        for same in ["/a/b", "//a/b", "/a/./b", "/./a//b"] {
            assert!(same_path("/a/b", same), "{same}");
        }
        for other in ["a/b", "/a/b/c", "/a/../b", "/ab", ""] {
            assert!(!same_path("/a/b", other), "{other}");
        }
        assert!(same_path("./b", "b"));
    }

    #[test]
    fn a_file_is_called_so_that_it_is_found() {
        for (image, path, name) in [
            ("/images/a", "/images/a.old", Some("a.old")),
            ("/images/a", "/kept/a", Some("/kept/a")),
            ("a", "b", Some("b")),
            ("./a", "b", None),
            ("/images/a", "b", None),
        ] {
            assert_eq!(name_beside(image, path).as_deref(), name, "{image} and {path}");
            if let Some(name) = name {
                assert_eq!(resolve(image, name), path);
            }
        }
    }

    #[test]
    fn relative_names_are_relative_to_the_image() {
        assert_eq!(resolve("/disks/top.img", "base"), "/disks/base");
        assert_eq!(resolve("/disks/top.img", "/other/base"), "/other/base");
        assert_eq!(resolve("top.img", "base"), "base");
        assert_eq!(resolve("/top.img", "d/base"), "/d/base");
    }
}
