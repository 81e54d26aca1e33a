//! A new image is none of the files that it is made from.
//!
//! A name says little: links, `..` and relative paths lead to the same file. What counts is which file is opened
//! ([`FileId`]).

use tap_host::{File, FileId, Files, OpenMode};
use tap_images::{ImageFormat, ImageHost, ImageSpec, describe};

/// As many images as one chain can have.
const CHAIN_MAX: usize = 64;

/// Refuses `target` if it is the file `from`, or, with `follow`, one that `from` is based on. A target that is not there
/// is none of them.
///
/// # Errors
/// Why not, as the end of a sentence.
pub(super) async fn apart<H: ImageHost>(
    host: &H,
    target: &str,
    from: &ImageSpec,
    follow: bool,
) -> Result<(), String> {
    let Some(id) = id_of(host, target).await else { return Ok(()) };
    let mut next = Some(from.clone());
    for _ in 0..CHAIN_MAX {
        let Some(spec) = next.take() else { break };
        if id_of(host, &spec.path).await == Some(id) {
            let text =
                if spec == *from { String::new() } else { format!(", on which {} is based", from.path) };
            return Err(format!("it is the same file as {}{text}, which would be lost", spec.path));
        }
        if follow {
            // What cannot be read is told where it is opened.
            let below = describe(host, &spec).await.ok().and_then(|image| image.backing_path);
            next = below.map(|path| ImageSpec { format: ImageFormat::Probe, path });
        }
    }
    Ok(())
}

/// Which file `path` is; `None` where there is none that could be opened.
async fn id_of<H: ImageHost>(host: &H, path: &str) -> Option<FileId> {
    let file = Files::open(host, path, OpenMode::READ).await.ok()?;
    file.info().ok().map(|info| info.id)
}
