//! A new image is none of the files that it is made from.
//!
//! A name says little: links, `..` and relative paths lead to the same file. What counts is which file is opened
//! ([`FileId`]), and a file that cannot be looked at may be any. A name that leads nowhere now may lead somewhere
//! later, so whoever empties a file compares once more what it has opened.

use tap_host::{Bug, Errno, FileId};
use tap_images::{Formats, ImageError, ImageFormat, ImageHost, ImageSpec, MAX_CHAIN, file_id};

/// Refuses `target` if it is the file `from`, or, with `follow`, one that `from` is based on; gives all these files. A
/// target that is not there is none of them.
///
/// # Errors
/// Why not, as the end of a sentence.
pub(super) async fn apart<H: ImageHost>(
    host: &H,
    target: &str,
    from: &ImageSpec,
    follow: bool,
) -> Result<Vec<FileId>, String> {
    let unknown = host.bug(Bug::UnknownFileApart);
    let id = match file_id(host, target).await {
        Err(_) if unknown => None,
        id => id.map_err(|e| format!("open {target}: {e}"))?,
    };
    let mut files = Vec::new();
    let mut next = Some(from.clone());
    for _ in 0..MAX_CHAIN {
        let Some(spec) = next.take() else { break };
        let look = |e: Errno| format!("open {}: {e}", spec.path);
        // One that is not there now may be there when it is opened.
        let other = file_id(host, &spec.path).await.map_err(look)?;
        let other = other.ok_or_else(|| look(Errno::ENOENT))?;
        if id == Some(other) {
            let text =
                if spec == *from { String::new() } else { format!(", on which {} is based", from.path) };
            return Err(format!("it is the same file as {}{text}, which would be lost", spec.path));
        }
        files.push(other);
        if follow {
            next = match Formats::shipped().describe(host, &spec).await {
                Ok(image) => image.backing_path.map(|path| ImageSpec { format: ImageFormat::Probe, path }),
                // What is no image of its format leads to no other; that is told where it is opened.
                Err(ImageError::Refused { .. }) => None,
                Err(e) => return Err(e.to_string()),
            };
        }
    }
    Ok(if unknown { Vec::new() } else { files })
}
