//! Raw images: the file is the disk.

use super::{FormatModel, ImageShape, Metadata, layer_cluster};
use kernel_model::PageMap;
use tap_images::Format;
use tap_images::formats::raw;

/// The model.
pub(super) struct Raw;

impl FormatModel for Raw {
    fn format(&self) -> Format {
        raw::FORMAT
    }

    /// Clusters that the image does not hold are zeros.
    fn make(&self, shape: &ImageShape, view: &mut PageMap) -> Vec<u8> {
        let mut file = vec![0; shape.size as usize];
        let bytes = 1 << shape.cluster_bits;
        for (cluster, _) in &shape.clusters {
            let at = cluster * bytes;
            let held =
                &layer_cluster(shape.writer, *cluster, bytes as usize)[..bytes.min(shape.size - at) as usize];
            file[at as usize..][..held.len()].copy_from_slice(held);
            view.write(at, held);
        }
        file
    }

    fn metadata(&self) -> Option<&dyn Metadata> {
        None
    }
}
