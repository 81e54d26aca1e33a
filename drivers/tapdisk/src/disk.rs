//! A named disk as a node.
//!
//! ```text
//!   request ─► cache mode ─► scheduler (order, merging, retry) ─► image, and what is below it
//! ```

use crate::spec::DiskSpec;
use std::rc::Rc;
use tap_core::{CacheMode, Node, Scheduler, SchedulerLimits};
use tap_images::{BackingPolicy, ImageError, ImageHost, ImageSpec, OpenOptions, open_image};

/// How to open disks.
#[derive(Clone, Debug, Default)]
pub struct DiskOptions {
    /// For reading and writing.
    pub write: bool,
    /// Without the host's page cache.
    pub direct: bool,
    /// When writes become durable.
    pub cache: CacheMode,
    /// What may be opened below an image.
    pub backing: BackingPolicy,
    /// Bounds of the scheduler.
    pub scheduler: SchedulerLimits,
}

/// Opens the image `spec` with its scheduler.
///
/// # Errors
/// [`ImageError`].
pub async fn open_disk<H: ImageHost>(
    host: &H,
    spec: &ImageSpec,
    options: &DiskOptions,
) -> Result<Rc<dyn Node>, ImageError> {
    let open = OpenOptions {
        write: options.write,
        direct: options.direct,
        backing: options.backing.clone(),
        ..OpenOptions::default()
    };
    let image = open_image(host, spec, &open).await?;
    Ok(options.cache.over(Rc::new(Scheduler::new(host.clone(), image, options.scheduler))))
}

/// Opens whatever `spec` names.
///
/// # Errors
/// A sentence that reads on after "failed to".
pub async fn open_any<H: ImageHost>(
    host: &H,
    spec: &DiskSpec,
    options: &DiskOptions,
) -> Result<Rc<dyn Node>, String> {
    match spec {
        DiskSpec::Image(image) => open_disk(host, image, options).await.map_err(|e| e.to_string()),
        DiskSpec::Nbd { .. } => Err(format!("use {spec}: this needs a file")),
    }
}
