//! A named disk as a node.
//!
//! ```text
//!   request ─► cache mode ─► scheduler (order, merging, retry) ─► image, and what is below it
//! ```

use crate::spec::DiskSpec;
use std::rc::Rc;
use tap_core::{CacheMode, Node, Scheduler, SchedulerLimits};
use tap_host::Sockets;
use tap_images::{BackingPolicy, ImageError, ImageHost, ImageSpec, OpenOptions, open_image};
use tap_nbd::{Client, ClientConfig};

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
    /// How long to wait for an image that is in use, in nanoseconds. The kernel lets go of the files of a process that
    /// was killed only when its last operations have ended, which may be after it is gone from the process table.
    pub patience_ns: u64,
}

/// Pause between two looks at an image that is in use, in nanoseconds.
const IN_USE_PAUSE_NS: u64 = 10_000_000;

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
    let deadline_ns = host.now_ns().saturating_add(options.patience_ns);
    let image = loop {
        match open_image(host, spec, &open).await {
            Err(ImageError::InUse { .. }) if host.now_ns() < deadline_ns => {
                host.sleep_ns(IN_USE_PAUSE_NS).await;
            }
            result => break result?,
        }
    };
    Ok(options.cache.over(Rc::new(Scheduler::new(host.clone(), image, options.scheduler))))
}

/// What any disk asks of a host.
pub trait DiskHost: ImageHost + Sockets {}
impl<T: ImageHost + Sockets> DiskHost for T {}

/// Opens whatever `spec` names.
///
/// # Errors
/// A sentence that reads on after "failed to".
pub async fn open_any<H: DiskHost>(
    host: &H,
    spec: &DiskSpec,
    options: &DiskOptions,
) -> Result<Rc<dyn Node>, String> {
    match spec {
        DiskSpec::Image(image) => open_disk(host, image, options).await.map_err(|e| e.to_string()),
        DiskSpec::Nbd { address, export } => {
            let config = ClientConfig {
                export: export.clone(),
                read_only: !options.write,
                ..ClientConfig::new(address.clone())
            };
            let client = Client::connect(host.clone(), config).await.map_err(|e| e.to_string())?;
            let scheduler = Scheduler::new(host.clone(), Rc::new(client), options.scheduler);
            Ok(options.cache.over(Rc::new(scheduler)))
        }
    }
}
