//! Images made and read by their bytes alone, without the driver.

use crate::check::Invariant;
use crate::formats::{self, Broken, ImageShape, Stored, fitting};
use crate::world::World;
use kernel_model::PageMap;
use tap_images::{HEAD_BYTES, ImageSpec};

/// Whether the file at the image's path has the magic of its format.
pub(super) fn calls_itself_image(world: &World, spec: &ImageSpec) -> bool {
    let Some(content) = world.storage.content(&spec.path) else { return false };
    let mut head = vec![0; HEAD_BYTES.min(content.size as usize)];
    content.pages.read(0, &mut head);
    formats::of(spec.format).metadata().is_some_and(|metadata| metadata.recognises(&head))
}

/// The bytes of the disk. `below` has path and bytes of the backing file, if there is one.
///
/// # Errors
/// The first broken invariant.
pub(super) fn shown(
    world: &World,
    spec: &ImageSpec,
    below: Option<(&str, &[u8])>,
) -> Result<Vec<u8>, Broken> {
    let gone = || (Invariant::I1, format!("{} does not exist although it was created", spec.path));
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
            return Err((Invariant::I1, format!("{} has the wrong backing file {name}", spec.path)));
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

/// Puts an image of `size_bytes` in place in which every cluster is in use. Returns the bytes of its disk.
pub(super) fn put_used(world: &World, spec: &ImageSpec, size_bytes: u64) -> Vec<u8> {
    let mut bytes = vec![0xa5; size_bytes as usize];
    let model = formats::of(spec.format);
    let Some(metadata) = model.metadata() else {
        world.storage.put_bytes(&spec.path, &bytes);
        return bytes;
    };
    let cluster_bits = fitting(&metadata.cluster_bits(), &[12])[0];
    let shape = ImageShape {
        cluster_bits,
        table_bits: fitting(&metadata.table_bits(), &[9])[0],
        size: size_bytes,
        backing: None,
        clusters: (0..size_bytes.div_ceil(1 << cluster_bits)).map(|c| (c, Stored::Plain)).collect(),
        writer: 1003,
        extended: false,
    };
    let mut view = PageMap::default();
    world.storage.put_bytes(&spec.path, &model.make(&shape, &mut view));
    view.read(0, &mut bytes);
    bytes
}
