//! Opening an image together with those it is based on.
//!
//! ```text
//!   top.qcow ──names──► base.qcow ──names──► base.raw
//!    written             read only            read only
//! ```
//!
//! The name of a backing file stands in the image, and a guest that once wrote a whole raw disk could have put it
//! there. So an image by itself opens nothing: a [`BackingPolicy`] of the caller decides about every file, and about
//! the format it is read as. Formats are recognised by content only where the caller says so.

use crate::io::{ImageFile, is_transient as passes};
use crate::qcow::{Qcow, QcowLimits};
use crate::raw::Raw;
use crate::{ImageError, ImageHost};
use std::fmt;
use std::rc::Rc;
use tap_core::{LocalBoxFuture, Node};
use tap_host::{Budget, SECTOR_BYTES};

/// How to read a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ImageFormat {
    /// The file is the disk.
    Raw,
    /// qcow version 1.
    Qcow,
    /// qcow if it begins like one, raw otherwise. Not for files whose first sector a guest could write while they
    /// were raw: it would choose the format.
    Probe,
}

/// Gives the format of the file at a path, or `None` to refuse it.
pub type BackingGate = Rc<dyn Fn(&str) -> Option<ImageFormat>>;

/// Which backing files may be opened.
#[derive(Clone, Default)]
pub enum BackingPolicy {
    /// None: an image that names one is refused.
    #[default]
    Refuse,
    /// Asked with the path of every backing file (relative names are resolved against the directory of the image that
    /// names them).
    Ask(BackingGate),
}

impl BackingPolicy {
    /// Any file, as `format`. For images that come from a trusted place.
    pub fn any(format: ImageFormat) -> Self {
        Self::Ask(Rc::new(move |_| Some(format)))
    }

    /// Whether any file may be opened at all.
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

/// A file and its format.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageSpec {
    /// How to read it.
    pub format: ImageFormat,
    /// Where it is.
    pub path: String,
}

/// How to open an image.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// For writing as well; takes the exclusive lock.
    pub write: bool,
    /// Without the host's page cache.
    pub direct: bool,
    /// Bounds of qcow images.
    pub qcow: QcowLimits,
    /// What may be opened below the image.
    pub backing: BackingPolicy,
    /// What all memory of the image, and of everything below it, is taken of.
    pub memory: Budget,
}

/// Most images in one chain.
pub const MAX_CHAIN: usize = 64;

/// Opens the image `spec` and everything below it.
///
/// # Errors
/// [`ImageError`] with the path of the file that is to blame.
pub async fn open_image<H: ImageHost>(
    host: &H,
    spec: &ImageSpec,
    options: &OpenOptions,
) -> Result<Rc<dyn Node>, ImageError> {
    let mut pause_ns = OPEN_PAUSE_NS;
    for _ in 0..OPEN_RETRIES {
        match open_level(host.clone(), spec.clone(), options.clone(), 1).await {
            Err(error) if is_transient(&error) => host.sleep_ns(pause_ns).await,
            other => return other,
        }
        pause_ns *= 2;
    }
    open_level(host.clone(), spec.clone(), options.clone(), 1).await
}

/// What an image says of itself, without what is below it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Description {
    /// Its format: not [`ImageFormat::Probe`].
    pub format: ImageFormat,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// Size of a cluster in bytes, where there are clusters.
    pub cluster_bytes: Option<u64>,
    /// The name of its backing file, as it stands in the image.
    pub backing: Option<String>,
    /// Where that file is, seen from here.
    pub backing_path: Option<String>,
    /// Size of the file in bytes.
    pub file_bytes: u64,
    /// Storage that the file takes up, in bytes.
    pub allocated_bytes: u64,
}

/// Reads what the image `spec` says of itself.
///
/// # Errors
/// [`ImageError`].
pub async fn describe<H: ImageHost>(host: &H, spec: &ImageSpec) -> Result<Description, ImageError> {
    let path = &spec.path;
    if spec.format == ImageFormat::Raw
        || spec.format == ImageFormat::Probe && !Qcow::probe(host, path).await?
    {
        let file = ImageFile::open(host, path, false, false).await?;
        return Ok(Description {
            format: ImageFormat::Raw,
            disk_bytes: file.info.size_bytes.next_multiple_of(SECTOR_BYTES),
            cluster_bytes: None,
            backing: None,
            backing_path: None,
            file_bytes: file.info.size_bytes,
            allocated_bytes: file.info.allocated_bytes,
        });
    }
    let (disk_bytes, cluster_bytes, name, info) = Qcow::describe(host, path).await?;
    // A name that is no text is shown, not followed.
    let backing = name.map(|name| String::from_utf8_lossy(&name).into_owned());
    Ok(Description {
        format: ImageFormat::Qcow,
        disk_bytes,
        cluster_bytes: Some(cluster_bytes),
        backing_path: backing.as_deref().map(|name| resolve(path, name)),
        backing,
        file_bytes: info.size_bytes,
        allocated_bytes: info.allocated_bytes,
    })
}

fn is_transient(error: &ImageError) -> bool {
    !error.is_in_use() && passes(error.errno())
}

/// Requests are repeated after transient errors by the scheduler; while an image is being opened there is none yet.
const OPEN_RETRIES: u32 = 8;
/// Before the first repetition, in nanoseconds; it doubles with each.
const OPEN_PAUSE_NS: u64 = 1_000_000;

fn open_level<H: ImageHost>(
    host: H,
    spec: ImageSpec,
    options: OpenOptions,
    level: usize,
) -> LocalBoxFuture<Result<Rc<dyn Node>, ImageError>> {
    Box::pin(async move {
        let is_qcow = match spec.format {
            ImageFormat::Raw => false,
            ImageFormat::Qcow => true,
            ImageFormat::Probe => Qcow::probe(&host, &spec.path).await?,
        };
        let node: Rc<dyn Node> = if is_qcow {
            Rc::new(Qcow::open_at_level(&host, &spec.path, &options, level).await?)
        } else {
            Rc::new(Raw::open(&host, &spec.path, &options).await?)
        };
        Ok(node)
    })
}

/// Opens the file that the image at `path` is based on, if `options` allow it.
pub(crate) async fn open_backing<H: ImageHost>(
    host: &H,
    path: &str,
    name: &[u8],
    options: &OpenOptions,
    level: usize,
) -> Result<Rc<dyn Node>, ImageError> {
    let refused = |what: String, advice| {
        Err(ImageError::Refused { path: path.to_owned(), format: "qcow", what, advice })
    };
    let Some(name) = std::str::from_utf8(name).ok().filter(|n| !n.is_empty() && !n.contains('\0')) else {
        return refused(
            "the name of its backing file is not text".to_owned(),
            "restore the image from a backup",
        );
    };
    let backing = resolve(path, name);
    if level >= MAX_CHAIN {
        let what = format!("there are more than {MAX_CHAIN} images above {backing}");
        return refused(what, "merge some of them");
    }
    let format = match &options.backing {
        BackingPolicy::Refuse => None,
        BackingPolicy::Ask(allowed) => allowed(&backing),
    };
    let Some(format) = format else {
        return refused(
            format!("it is based on {backing}, which may not be opened"),
            "allow it (--backing raw or --backing qcow), or flatten the image",
        );
    };
    let spec = ImageSpec { format, path: backing.clone() };
    let below = OpenOptions { write: false, ..options.clone() };
    open_level(host.clone(), spec, below, level + 1).await.map_err(|error| ImageError::Backing {
        path: path.to_owned(),
        backing,
        error: Box::new(error),
    })
}

/// Where the file called `name` in `image` is.
pub fn resolve(image: &str, name: &str) -> String {
    match image.rfind('/') {
        Some(slash) if !name.starts_with('/') => format!("{}{name}", &image[..=slash]),
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_names_are_relative_to_the_image() {
        assert_eq!(resolve("/disks/top.qcow", "base"), "/disks/base");
        assert_eq!(resolve("/disks/top.qcow", "/other/base"), "/other/base");
        assert_eq!(resolve("top.qcow", "base"), "base");
        assert_eq!(resolve("/top.qcow", "d/base"), "/d/base");
    }
}
