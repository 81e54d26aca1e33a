//! Opens a named disk.

use crate::Tuning;
use crate::spec::{DiskSpec, TlsSpec};
use crate::tls;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use std::rc::Rc;
use std::str::FromStr;
use tap_core::{CacheMode, Disk, DiskConfig, DiskStatus, Node, SchedulerStats};
use tap_host::{Budget, Errno, SECTOR_BYTES, Sockets, VbdId};
use tap_images::{
    Backing, BackingPolicy, Format, Formats, ImageError, ImageFormat, ImageHost, ImageSpec, OpenOptions,
    SHIPPED, format_called, parse_size, same_path, show_size,
};
use tap_mason::build::{BuildError, build};
use tap_mason::load::{LoadError, load};
use tap_mason::modules::Modules;
use tap_nbd::{Client, ClientConfig, ClientError, ClientTls};

tap_host::listed! {
    pub(super) MARKS: Mark;
    IMAGE_AWAITED = "image-awaited", "a program waited for an image that another process had";
    SERVER_AS_DISK = "server-as-disk", "a program opened the export of an NBD server as a disk";
}

/// How to open disks.
#[derive(Clone, Debug, Default)]
pub struct DiskOptions {
    /// Also for writing.
    pub write: bool,
    /// Read without a lock, although another process may be writing.
    pub unlocked: bool,
    /// Bypass the host's page cache.
    pub direct: bool,
    /// When writes become durable.
    pub cache: CacheMode,
    /// Which backing files may be opened.
    pub backing: BackingPolicy,
    /// How long to wait for an image that is in use, in nanoseconds. The kernel releases the files of a killed process
    /// only when its last operations have ended, which may be after the process has left the process table.
    pub patience_ns: u64,
    /// The budget for the memory of the image and everything below it.
    pub memory: Budget,
    /// Limits, and layers over the image.
    pub tuning: Tuning,
}

/// The formats as values of an option.
fn format_values() -> impl Iterator<Item = PossibleValue> {
    let value = |f: &Format| PossibleValue::new(f.name()).help(f.info().about).aliases(f.info().aliases);
    SHIPPED.iter().map(value)
}

/// Parses the name of a format.
pub(crate) fn format_parser() -> impl TypedValueParser<Value = Format> {
    // The parser only accepts names of formats.
    PossibleValuesParser::new(format_values())
        .try_map(|name| format_called(&name).ok_or("it is not a known format"))
}

/// One value of `--backing`.
#[derive(Clone, PartialEq, Eq, Debug)]
enum BackingArg {
    /// No backing file may be opened.
    Refuse,
    /// Any may, as this format.
    Any(ImageFormat),
    /// This one may.
    File(ImageSpec),
}

const REFUSE: &str = "refuse";
const PROBE: &str = "probe";

impl FromStr for BackingArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            REFUSE => return Ok(Self::Refuse),
            PROBE => return Ok(Self::Any(ImageFormat::Probe)),
            name => {
                if let Some(format) = format_called(name) {
                    return Ok(Self::Any(format.into()));
                }
            }
        }
        match text.parse() {
            Ok(DiskSpec::Image(spec @ ImageSpec { format: ImageFormat::As(_), .. })) => Ok(Self::File(spec)),
            Ok(DiskSpec::Nbd { .. } | DiskSpec::Mason { .. }) => Err("a backing file is an image".to_owned()),
            _ => {
                let formats: Vec<&str> = SHIPPED.iter().map(|format| format.name()).collect();
                Err(format!("it is {REFUSE}, {}, {PROBE} or FORMAT:PATH", formats.join(", ")))
            }
        }
    }
}

/// Options for backing files.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct BackingArgs {
    #[arg(long, value_name = "HOW", help = backing_help())]
    backing: Vec<BackingArg>,
}

fn backing_help() -> String {
    let formats: Vec<&str> = SHIPPED.iter().map(|format| format.name()).collect();
    format!(
        "Which backing files may be opened: {REFUSE} (none, the default), {} (any, as this format), {PROBE} (any, in \
         the format it appears to have; not for files that a guest could write as raw disks), FORMAT:PATH (this file; \
         may be repeated, and takes precedence)",
        formats.join(" or ")
    )
}

impl BackingArgs {
    /// The policy for opening: files by name first, then the last value for any file.
    pub(crate) fn policy(&self) -> BackingPolicy {
        let mut files = Vec::new();
        let mut any = None;
        for arg in &self.backing {
            match arg {
                BackingArg::Refuse => any = None,
                BackingArg::Any(format) => any = Some(Backing::Any(*format)),
                BackingArg::File(spec) => files.push(spec.clone()),
            }
        }
        if files.is_empty() && any.is_none() {
            return BackingPolicy::Refuse;
        }
        BackingPolicy::Ask(Rc::new(move |path| {
            let named = files.iter().find(|file| same_path(&file.path, path));
            named.map(|file| file.format.into()).or_else(|| any.clone())
        }))
    }
}

/// How a program that serves disks opens them.
#[derive(Args, Clone, Debug)]
pub struct ImageArgs {
    /// When answered writes are durable: after a flush, at once, or only when tapdisk ends
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    cache: CacheArg,
    /// Bypass the page cache (O_DIRECT)
    #[arg(long)]
    direct: bool,
    /// Refuse writes; images are opened for reading and may be shared with other readers
    #[arg(long)]
    pub read_only: bool,
    #[command(flatten)]
    backing: BackingArgs,
    /// Memory limit of all disks together, for buffers of requests and connections and for tables of images; at least
    /// 16M
    #[arg(long, default_value = "256M", value_name = "SIZE", value_parser = memory_size)]
    memory: usize,
}

/// Smallest memory budget, in bytes: enough for some chains of images, and one large request of each kind.
const MIN_MEMORY_BYTES: u64 = 16 << 20;

fn memory_size(text: &str) -> Result<usize, String> {
    let bytes = parse_size(text)?;
    if bytes < MIN_MEMORY_BYTES {
        return Err(format!("at least {} is needed", show_size(MIN_MEMORY_BYTES)));
    }
    usize::try_from(bytes).map_err(|_| "it is more than this machine can address".to_owned())
}

/// When writes become durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
enum CacheArg {
    /// After a flush, as on any disk
    #[default]
    Writeback,
    /// Before it is answered
    Writethrough,
    /// When tapdisk ends; flushes are answered but not performed
    Unsafe,
}

impl From<CacheArg> for CacheMode {
    fn from(arg: CacheArg) -> Self {
        match arg {
            CacheArg::Writeback => CacheMode::WriteBack,
            CacheArg::Writethrough => CacheMode::WriteThrough,
            CacheArg::Unsafe => CacheMode::Unsafe,
        }
    }
}

/// How long to wait for an image that is in use, in nanoseconds: a killed process may be about to release it.
const IN_USE_PATIENCE_NS: u64 = 2_000_000_000;

impl ImageArgs {
    /// The memory of the process, for all of its disks.
    pub fn budget(&self, tuning: &Tuning) -> Budget {
        tuning.memory.clone().unwrap_or_else(|| Budget::new(self.memory))
    }

    /// The options to open disks with, for writing or not, with memory from `memory`.
    pub fn options(&self, write: bool, memory: &Budget, tuning: &Tuning) -> DiskOptions {
        DiskOptions {
            write,
            unlocked: false,
            direct: self.direct,
            cache: self.cache.into(),
            backing: self.backing.policy(),
            patience_ns: IN_USE_PATIENCE_NS,
            memory: memory.clone(),
            tuning: tuning.clone(),
        }
    }
}

/// The line about memory at the end of a program.
pub(crate) fn memory_summary(memory: &Budget) -> String {
    let figures = memory.figures();
    let (peak, limit) = (show_size(figures.peak_bytes as u64), show_size(figures.limit_bytes as u64));
    format!("memory: at most {peak} of {limit} in use")
}

/// The line about a disk that a program serves.
pub(crate) fn disk_summary(disk: &DiskStatus) -> String {
    let size = show_size(disk.info.size_sectors * SECTOR_BYTES);
    let read_only = if disk.info.read_only { ", read-only" } else { "" };
    format!("{}, {size}{read_only}", disk.about)
}

/// The line about the requests of a disk.
pub(crate) fn stats_summary(stats: &SchedulerStats) -> String {
    let moved = |requests: u64, what: &str, sectors: u64| {
        (requests > 0).then(|| format!("{what} {requests} ({})", show_size(sectors * SECTOR_BYTES)))
    };
    let counted = |requests: u64, what: &str| (requests > 0).then(|| format!("{what} {requests}"));
    let parts = [
        moved(stats.reads, "reads", stats.sectors_read),
        moved(stats.writes, "writes", stats.sectors_written),
        moved(stats.zeroes, "zeroes", stats.sectors_zeroed),
        moved(stats.discards, "discards", stats.sectors_discarded),
        counted(stats.flushes, "flushes"),
        counted(stats.merged, "merged"),
        counted(stats.retries, "retries"),
        counted(stats.errors, "errors"),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    if parts.is_empty() { "no requests".to_owned() } else { parts.join(", ") }
}

/// Fails if `spec` does not name a format: a probed format could be chosen by the guest that wrote the disk.
///
/// # Errors
/// Text that continues "failed to".
pub fn require_format(spec: &DiskSpec) -> Result<(), String> {
    match spec {
        DiskSpec::Image(ImageSpec { format: ImageFormat::Probe, path }) => {
            let names: Vec<String> = SHIPPED.iter().map(|format| format!("{format}:{path}")).collect();
            Err(format!("serve {path}: name its format, {}", names.join(" or ")))
        }
        DiskSpec::Image(_) | DiskSpec::Nbd { .. } | DiskSpec::Mason { .. } => Ok(()),
    }
}

/// Pause between tries to open an image that is in use, in nanoseconds.
const IN_USE_PAUSE_NS: u64 = 10_000_000;

/// The parts of a host that disks use.
pub trait DiskHost: ImageHost + Sockets {}
impl<T: ImageHost + Sockets> DiskHost for T {}

/// Why a disk cannot be opened; the text continues "failed to".
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OpenError {
    /// Its image cannot be opened.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Its server refuses, or does not answer.
    #[error(transparent)]
    Server(#[from] ClientError),
    /// Its graph cannot be read.
    #[error(transparent)]
    Text(#[from] LoadError),
    /// Its graph cannot be opened.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// Its graph has a mistake.
    #[error("open {path}: {what}")]
    Graph {
        /// The file with the text of the graph.
        path: String,
        /// What is wrong, and what to do.
        what: String,
    },
}

impl OpenError {
    /// The error number of a file's failure.
    pub(crate) fn errno(&self) -> Option<Errno> {
        match self {
            Self::Image(error) | Self::Build(BuildError::Image { error, .. }) => Some(error.errno()),
            Self::Text(LoadError::Io { error, .. }) | Self::Build(BuildError::Node { error, .. }) => {
                Some(*error)
            }
            Self::Text(LoadError::Text { .. }) | Self::Build(_) | Self::Graph { .. } => Some(Errno::EINVAL),
            Self::Server(_) => None,
        }
    }
}

/// Opens the image or export `spec` as the disk `id`; images have one of `formats`.
///
/// # Errors
/// [`OpenError`].
pub async fn open_disk<H: DiskHost>(
    host: &H,
    formats: Formats<H>,
    id: VbdId,
    spec: &DiskSpec,
    options: &DiskOptions,
) -> Result<Disk<H>, OpenError> {
    let image = open_node(host, formats, spec, options).await?;
    let config = DiskConfig { id, cache: options.cache, scheduler: options.tuning.scheduler };
    Ok(Disk::new(host, image, config))
}

/// Opens the image or export `spec`, without a disk over it.
///
/// # Errors
/// [`OpenError`].
pub(crate) async fn open_node<H: DiskHost>(
    host: &H,
    formats: Formats<H>,
    spec: &DiskSpec,
    options: &DiskOptions,
) -> Result<Rc<dyn Node>, OpenError> {
    let image: Rc<dyn Node> = match spec {
        DiskSpec::Image(image) => open_image(host, formats, image, options).await?,
        DiskSpec::Nbd { address, export, tls } => {
            let tls = match tls {
                Some(TlsSpec { folder, name }) => {
                    let config = tls::of_client(host, folder).await.map_err(ClientError::Certificates)?;
                    Some(ClientTls { config, name: name.clone() })
                }
                None => None,
            };
            let config = ClientConfig {
                export: export.clone(),
                tls,
                read_only: !options.write,
                memory: options.memory.clone(),
                ..ClientConfig::new(address.clone())
            };
            host.mark(&SERVER_AS_DISK);
            Rc::new(Client::connect(host.clone(), config).await?)
        }
        DiskSpec::Mason { path, disk } => open_graph(host, formats, (path, disk.as_deref()), options).await?,
    };
    Ok(options.tuning.image(spec, image))
}

/// How images are opened with these options.
pub(crate) fn open_options(options: &DiskOptions) -> OpenOptions {
    OpenOptions {
        write: options.write,
        unlocked: options.unlocked,
        direct: options.direct,
        backing: options.backing.clone(),
        memory: options.memory.clone(),
        table_bytes: options.tuning.table_bytes,
    }
}

async fn open_image<H: ImageHost>(
    host: &H,
    formats: Formats<H>,
    spec: &ImageSpec,
    options: &DiskOptions,
) -> Result<Rc<dyn Node>, ImageError> {
    let open = open_options(options);
    until_free(host, options, async || formats.open(host, spec, &open).await, ImageError::is_in_use).await
}

/// What `open` opens, asked again for a while as long as something is in use.
async fn until_free<H: ImageHost, T, E>(
    host: &H,
    options: &DiskOptions,
    open: impl AsyncFn() -> Result<T, E>,
    is_in_use: impl Fn(&E) -> bool,
) -> Result<T, E> {
    let deadline_ns = host.now_ns().saturating_add(options.patience_ns);
    loop {
        match open().await {
            Err(error) if is_in_use(&error) && host.now_ns() < deadline_ns => {
                host.mark(&IMAGE_AWAITED);
                host.sleep_ns(IN_USE_PAUSE_NS).await;
            }
            result => return result,
        }
    }
}

/// Opens a disk of the graph at `path`: `disk`, or the only one.
async fn open_graph<H: ImageHost>(
    host: &H,
    formats: Formats<H>,
    (path, disk): (&str, Option<&str>),
    options: &DiskOptions,
) -> Result<Rc<dyn Node>, OpenError> {
    let modules = Modules::new(formats);
    let mut loaded = load(host, path, &modules.classes).await?;
    let refused = |what| OpenError::Graph { path: path.to_owned(), what };
    let checked = loaded.check(&modules.classes, &|_| None);
    let checked = match checked {
        Some(checked) if checked.is_good() => checked,
        _ => {
            let first = loaded.messages.iter().find(|message| !message.is_warning);
            let line = first.map(|message| loaded.sources.line(message)).unwrap_or_default();
            return Err(refused(format!("{line}; mason check {path} shows all")));
        }
    };
    let root = loaded.disk(&modules.classes, disk).map_err(refused)?;
    let open = open_options(options);
    let opened = until_free(
        host,
        options,
        async || build(host, &modules, &loaded.graph, &checked, root, &open).await,
        |error| matches!(error, BuildError::Image { error, .. } if error.is_in_use()),
    );
    Ok(opened.await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(values: &[&str], path: &str) -> Option<Result<ImageFormat, ImageFormat>> {
        let args = BackingArgs { backing: values.iter().map(|value| value.parse().unwrap()).collect() };
        let BackingPolicy::Ask(gate) = args.policy() else { return None };
        gate(path).map(|backing| match backing {
            Backing::File(format) => Ok(format),
            Backing::Any(format) => Err(format),
            Backing::Open(_) => panic!("no option opens a node"),
        })
    }

    #[test]
    fn backing_files_by_name_precede_the_last_value_for_any() {
        let [raw, qcow] = ["raw", "qcow"].map(|name| ImageFormat::As(format_called(name).unwrap()));
        for (values, path, expected) in [
            (&[][..], "/a", None),
            (&["refuse"], "/a", None),
            (&["raw"], "/a", Some(Err(raw))),
            (&["raw", "refuse"], "/a", None),
            (&["probe"], "/a", Some(Err(ImageFormat::Probe))),
            (&["raw:/a", "qcow"], "/a", Some(Ok(raw))),
            (&["raw:/a", "qcow"], "/b", Some(Err(qcow))),
            (&["qcow:b/./c"], "b//c", Some(Ok(qcow))),
            (&["qcow:/b"], "/a", None),
        ] {
            assert_eq!(asked(values, path), expected, "{values:?} for {path}");
        }
        for bad in ["", "vhd", "/a", "vhd:/a", "nbd:/a", "raw:"] {
            assert!(bad.parse::<BackingArg>().is_err(), "{bad}");
        }
    }
}
