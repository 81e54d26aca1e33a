//! The mark of an image into which the one above it is being merged.
//!
//! ```text
//!   top ─► image ─► base          base.merging: "image"
//!            └─merge─►┘
//! ```
//!
//! While the merge runs, and after one that a crash has cut short, the base has some of the bytes of both. The image
//! above it still shows the same, since it covers whatever it has given away. Every other image would show a mixture.
//! So the base is marked, durably, before its first byte changes: only the image that is being merged may be opened
//! above it, and the merge can be completed. The mark is a file beside the base, because not every format has room for
//! one.

use crate::io::{ImageFile, sync_name};
use crate::{ImageError, ImageHost, OpenOptions, file_id, read_small, resolve, same_path};
use tap_host::Errno;

tap_host::listed! {
    pub(super) BUGS: Bug;
    MERGE_MARK_IGNORED = "merge-mark-ignored", "an image is opened above one that has bytes of another";
    pub(crate) MERGE_MARK_STAYS = "merge-mark-stays", "a new image takes over the mark of a file that had its name before";
    MERGE_MARK_LATER = "merge-mark-later", "a merge begins before the mark of the image below is durable";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    MERGE_KEEPS_OUT = "merge-keeps-out", "an image could not be opened above one that is partly merged";
}

/// Precedes the name of the image in a mark.
const HEAD: &str = "partly merged with the image\n";
/// More than a mark may have, in bytes: a path of 4096 bytes.
const MAX_BYTES: usize = 4 << 10 << 1;

/// The path of the mark of the image at `base`.
pub fn mark_of(base: &str) -> String {
    format!("{base}.merging")
}

/// The path of the image that is being merged into the one at `base`; `None` if there is none.
///
/// # Errors
/// [`ImageError`] when the mark cannot be read.
pub async fn merging<H: ImageHost>(host: &H, base: &str) -> Result<Option<String>, ImageError> {
    let path = mark_of(base);
    let bytes = read_small(host, &path, MAX_BYTES).await.map_err(ImageError::io("read", &path))?;
    // A crash may leave a part of it: then nothing was merged yet.
    let name = bytes.as_deref().and_then(|bytes| {
        let name = bytes.strip_prefix(HEAD.as_bytes())?.strip_suffix(b"\n")?;
        std::str::from_utf8(name).ok().filter(|name| !name.contains('\0'))
    });
    Ok(name.map(|name| resolve(base, name)))
}

/// Marks the image at `base`, durably: the one that it calls `name` is being merged into it.
///
/// # Errors
/// [`ImageError`], also if another one is.
pub async fn mark_merging<H: ImageHost>(host: &H, base: &str, name: &str) -> Result<(), ImageError> {
    let path = mark_of(base);
    let io = |error| ImageError::io("mark", &path)(error);
    let other = merging(host, base).await?;
    if let Some(other) = &other
        && !same_path(other, &resolve(base, name))
    {
        return Err(ImageError::Merging { path: base.to_owned(), other: other.clone() });
    }
    let how = OpenOptions { write: true, ..OpenOptions::default() };
    let file = match ImageFile::create(host, &path, None).await {
        // Of a merge that was cut short: nobody knows whether it is durable.
        Err(error) if error.errno() == Errno::EEXIST => ImageFile::open(host, &path, &how).await?,
        created => created?,
    };
    // One that is complete may be all that says that the base has bytes of both: it is not written again.
    if other.is_none() {
        let text = format!("{HEAD}{name}\n");
        file.write_bytes(0, text.as_bytes()).await.map_err(io)?;
        file.set_size(text.len() as u64).await.map_err(io)?;
    }
    if host.bug(&MERGE_MARK_LATER) {
        return Ok(());
    }
    file.sync_to_close().await.map_err(io)?;
    drop(file);
    host.closed().await;
    sync_name(host, &path).await
}

/// Removes the mark of the image at `base`, durably.
///
/// # Errors
/// [`ImageError`].
pub async fn unmark_merged<H: ImageHost>(host: &H, base: &str) -> Result<(), ImageError> {
    let path = mark_of(base);
    match host.remove(&path).await {
        // A call that was interrupted may have had its effect.
        Ok(()) | Err(Errno::ENOENT) => sync_name(host, &path).await,
        Err(error) => Err(ImageError::io("remove", &path)(error)),
    }
}

/// Fails if an image other than the one at `above` is being merged into the one at `base`.
///
/// # Errors
/// [`ImageError`].
pub async fn check_merging<H: ImageHost>(host: &H, base: &str, above: &str) -> Result<(), ImageError> {
    let Some(other) = merging(host, base).await? else { return Ok(()) };
    let same = same_path(&other, above) || {
        let id = async |path: &str| file_id(host, path).await.map_err(ImageError::io("open", path));
        let other = id(&other).await?;
        other.is_some() && other == id(above).await?
    };
    if same || host.bug(&MERGE_MARK_IGNORED) {
        return Ok(());
    }
    host.mark(&MERGE_KEEPS_OUT);
    Err(ImageError::Merging { path: base.to_owned(), other })
}
