//! What a file says that is an image: read by its bytes alone.

use crate::check::Invariant;
use crate::formats::{self, Broken};
use crate::world::World;
use tap_images::{HEAD_BYTES, ImageSpec};

/// Whether the file at the image's path begins as images of its format do.
pub(super) fn calls_itself_image(world: &World, spec: &ImageSpec) -> bool {
    let Some(content) = world.storage.content(&spec.path) else { return false };
    let mut head = vec![0; HEAD_BYTES.min(content.size as usize)];
    content.pages.read(0, &mut head);
    formats::of(spec.format).metadata().is_some_and(|metadata| metadata.recognises(&head))
}

/// The bytes of the disk. What is not in the image is in `below`: path and bytes of its backing file, if it has one.
///
/// # Errors
/// The first broken invariant.
pub(super) fn shown(
    world: &World,
    spec: &ImageSpec,
    below: Option<(&str, &[u8])>,
) -> Result<Vec<u8>, Broken> {
    let gone = || (Invariant::I1, format!("{} is gone after it was made", spec.path));
    world.storage.inode(&spec.path).ok_or_else(gone)?;
    let content = formats::used_content(&world.storage, spec);
    let Some(map) = formats::of(spec.format).walk_whole(&content) else {
        let mut bytes = vec![0; content.size as usize];
        content.pages.read(0, &mut bytes);
        return Ok(bytes);
    };
    let map = map?;
    let mut bytes = vec![0; map.size as usize];
    if let Some(name) = &map.backing {
        let Some((_, view)) = below.filter(|(path, _)| path == name) else {
            return Err((Invariant::I1, format!("{} names the backing file {name}", spec.path)));
        };
        let shared = bytes.len().min(view.len());
        bytes[..shared].copy_from_slice(&view[..shared]);
    }
    let mut whole = vec![0; 1 << map.cluster_bits];
    for (cluster, part) in (0..).zip(bytes.chunks_mut(1 << map.cluster_bits)) {
        if map.read_cluster(&content, cluster, &mut whole)?.is_some() {
            part.copy_from_slice(&whole[..part.len()]);
        }
    }
    Ok(bytes)
}
