//! What is said of a format, and of an image, in terms that all formats share.

use std::fmt;
use tap_host::FileId;

/// What is known of a format without looking at an image.
#[derive(Debug)]
pub struct FormatInfo {
    /// Its name in options, messages and JSON.
    pub name: &'static str,
    /// Other names that options take.
    pub aliases: &'static [&'static str],
    /// What it is, for help texts; no full stop.
    pub about: &'static str,
    /// Options of a new image.
    pub options: &'static [OptionInfo],
    /// An image may be based on another file.
    pub has_backing: bool,
}

/// An option of a new image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OptionInfo {
    /// What stands in front of `=`.
    pub name: &'static str,
    /// What may stand after it.
    pub values: &'static str,
}

/// A format.
#[derive(Clone, Copy)]
pub struct Format(&'static FormatInfo);

impl Format {
    /// The format that `info` speaks of.
    pub const fn new(info: &'static FormatInfo) -> Self {
        Self(info)
    }
    /// What is known of it.
    pub fn info(self) -> &'static FormatInfo {
        self.0
    }
    /// Its name.
    pub fn name(self) -> &'static str {
        self.0.name
    }
    /// Whether `name` is its name, or one of its other names.
    pub fn is_called(self, name: &str) -> bool {
        self.0.name == name || self.0.aliases.contains(&name)
    }
}

impl PartialEq for Format {
    fn eq(&self, other: &Self) -> bool {
        self.0.name == other.0.name
    }
}
impl Eq for Format {}

impl fmt::Debug for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.name)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.name)
    }
}

/// How to read a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ImageFormat {
    /// As an image of this format.
    As(Format),
    /// As what it begins like. Not for files whose first sector a guest could write while they were raw: it would
    /// choose the format.
    Probe,
}

impl ImageFormat {
    /// Its name in options.
    pub fn name(self) -> &'static str {
        match self {
            ImageFormat::As(format) => format.name(),
            ImageFormat::Probe => "probe",
        }
    }
}

impl From<Format> for ImageFormat {
    fn from(format: Format) -> Self {
        Self::As(format)
    }
}

/// A file and its format.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageSpec {
    /// How to read it.
    pub format: ImageFormat,
    /// Where it is.
    pub path: String,
}

/// A new image.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NewImage {
    /// Size of the disk in bytes, a multiple of 512.
    pub size_bytes: u64,
    /// Name of the file that shows where nothing was written; relative to the image's directory.
    pub backing: Option<String>,
    /// Make it of the file that is at the path, whose content is lost, or on the block device there; unless it is one
    /// of these. `None`: nothing may be there. A host that interrupts that (`EINTR`) may have made the file: then it is
    /// there (`EEXIST`), empty.
    pub existing: Option<Vec<FileId>>,
    /// Names and values of options of the format.
    pub options: Vec<(String, String)>,
}

/// What an image says of itself, without what is below it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Description {
    /// Its format.
    pub format: Format,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// Size of a cluster in bytes, where there are clusters.
    pub cluster_bytes: Option<u64>,
    /// The name of its backing file, as it stands in the image. One that is no text is shown, not followed.
    pub backing: Option<String>,
    /// Where that file is, seen from here.
    pub backing_path: Option<String>,
    /// Size of the file in bytes.
    pub file_bytes: u64,
    /// Storage that the file takes up, in bytes.
    pub allocated_bytes: u64,
}

/// What a check found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CheckReport {
    /// Problems, the first hundred in words.
    pub problems: Vec<String>,
    /// Number of problems.
    pub problem_count: u64,
    /// Tables that map clusters.
    pub tables: u64,
    /// Plain clusters that are mapped.
    pub plain_clusters: u64,
    /// Compressed clusters that are mapped.
    pub compressed_clusters: u64,
    /// Clusters of the file that nothing refers to: lost by a crash or an error, and harmless. An estimate when there
    /// are problems or compressed clusters. What would lie between the end of the file and `end_bytes` counts as there.
    pub leaked_clusters: u64,
    /// Size of the file in bytes.
    pub file_bytes: u64,
    /// The end in bytes of the last thing that is referred to; above `file_bytes` only after a crash.
    pub end_bytes: u64,
}
