//! Descriptions of formats and images in terms that all formats share.

use std::fmt;
use tap_host::FileId;

/// Static properties of a format.
#[derive(Debug)]
pub struct FormatInfo {
    /// Its name in options, messages and JSON.
    pub name: &'static str,
    /// Other names that options take.
    pub aliases: &'static [&'static str],
    /// A short description for help texts; no full stop.
    pub about: &'static str,
    /// Options of a new image.
    pub options: &'static [OptionInfo],
    /// An image may have a backing file.
    pub has_backing: bool,
}

/// An option of a new image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OptionInfo {
    /// The part before `=`.
    pub name: &'static str,
    /// Describes the values after `=`.
    pub values: &'static str,
}

/// A format.
#[derive(Clone, Copy)]
pub struct Format(&'static FormatInfo);

impl Format {
    /// The format described by `info`.
    pub const fn new(info: &'static FormatInfo) -> Self {
        Self(info)
    }
    /// Its properties.
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
    /// Recognised by its first bytes. Not for files whose first sector a guest could write while they were raw: the
    /// guest would choose the format.
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
    /// Name of the backing file, whose content shows where nothing was written; relative to the image's directory.
    pub backing: Option<String>,
    /// `Some`: overwrite the file or block device at the path, unless it is one of these. `None`: the path must not
    /// exist. If the host interrupts the call that makes the file (`EINTR`), the retry may find it (`EEXIST`), empty.
    pub existing: Option<Vec<FileId>>,
    /// Names and values of the format's options.
    pub options: Vec<(String, String)>,
}

/// The properties of an image, without its backing file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Description {
    /// Its format.
    pub format: Format,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// Size of a cluster in bytes, if it has clusters.
    pub cluster_bytes: Option<u64>,
    /// The name of its backing file, as stored in the image. A name that is not valid text is shown but never opened.
    pub backing: Option<String>,
    /// The path of that file.
    pub backing_path: Option<String>,
    /// Size of the file in bytes.
    pub file_bytes: u64,
    /// Space allocated to the file, in bytes.
    pub allocated_bytes: u64,
}

/// The result of a check.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CheckReport {
    /// Descriptions of the first hundred problems and runs of missing clusters.
    pub problems: Vec<String>,
    /// Number of problems.
    pub problem_count: u64,
    /// Mapped clusters of which not even a part is in the file, because it was truncated, or the host crashed before
    /// they were flushed. One more for a table that begins where the file ends: QEMU makes the reference to a new table
    /// durable before it writes the table, so a crash may leave that.
    pub missing_clusters: u64,
    /// Tables that map clusters.
    pub tables: u64,
    /// Mapped clusters that are not compressed.
    pub plain_clusters: u64,
    /// Mapped clusters that are compressed.
    pub compressed_clusters: u64,
    /// Clusters of the file that nothing refers to: lost by a crash or an error, and harmless. Of clusters smaller than
    /// 4096 bytes, those from a reference up to the end of its block of so many bytes do not count: QEMU leaves them
    /// out. An estimate when there are problems.
    pub leaked_clusters: u64,
    /// Size of the file in bytes.
    pub file_bytes: u64,
    /// The end of the highest reference, in bytes; above `file_bytes` only after a crash.
    pub end_bytes: u64,
}
