//! Ensures that a new image is not one of the files that it is made from.
//!
//! Paths cannot be compared: links, `..` and relative paths may lead to the same file. The identity of the opened file
//! counts ([`FileId`]), and a file that cannot be opened may be any. A path that does not exist now may exist later, so
//! the identity is checked again on the open file before it is truncated.

use tap_host::{Errno, FileId};
use tap_images::{Formats, ImageError, ImageFormat, ImageHost, ImageSpec, MAX_CHAIN, file_id};

tap_host::listed! {
    pub(super) BUGS: Bug;
    UNKNOWN_FILE_APART = "unknown-file-apart", "a file that cannot be examined is taken as a different file";
}

/// Fails if `target` is the file `from` or, with `follow`, a file below it; returns all these files. A target that does
/// not exist is none of them. With `unlocked` the files may be in use.
///
/// # Errors
/// The reason, as the end of a sentence.
pub(super) async fn apart<H: ImageHost>(
    host: &H,
    target: &str,
    from: &ImageSpec,
    (follow, unlocked): (bool, bool),
) -> Result<Vec<FileId>, String> {
    let unknown = host.bug(&UNKNOWN_FILE_APART);
    let id = match file_id(host, target).await {
        Err(_) if unknown => None,
        id => id.map_err(|e| format!("open {target}: {e}"))?,
    };
    let mut files = Vec::new();
    let mut next = Some(from.clone());
    for _ in 0..MAX_CHAIN {
        let Some(spec) = next.take() else { break };
        let cannot_open = |e: Errno| format!("open {}: {e}", spec.path);
        // A source that does not exist now may exist when it is opened.
        let other = file_id(host, &spec.path).await.map_err(cannot_open)?;
        let other = other.ok_or_else(|| cannot_open(Errno::ENOENT))?;
        if id == Some(other) {
            let text =
                if spec == *from { String::new() } else { format!(", on which {} is based", from.path) };
            return Err(format!("it is the same file as {}{text}, which would be lost", spec.path));
        }
        files.push(other);
        if follow {
            next = match Formats::shipped().describe(host, &spec, unlocked).await {
                Ok(image) => image.backing_path.map(|path| ImageSpec { format: ImageFormat::Probe, path }),
                // A file that is not an image of its format has no file below it; opening it reports that.
                Err(ImageError::Refused { .. }) => None,
                Err(e) => return Err(e.to_string()),
            };
        }
    }
    Ok(if unknown { Vec::new() } else { files })
}
