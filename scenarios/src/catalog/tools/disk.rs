//! The input of the tools, and what they are to make of it.

use super::Work;
use crate::catalog::setup::TABLE_BITS;
use crate::catalog::shown::{calls_itself_image, put_used, shown};
use crate::check::Invariant;
use crate::formats::{FormatModel, ImageShape, Kind, RAW, Stored, fitting, layer_cluster};
use crate::program::named;
use crate::world::World;
use kernel_model::{Content, PAGE, PageMap};
use tap_images::ImageSpec;

/// A disk made by the testbed's own code.
pub(super) struct Disk {
    pub(super) spec: ImageSpec,
    /// The bytes of the disk.
    pub(super) view: Vec<u8>,
    /// The raw file below it: path and bytes.
    pub(super) base: Option<(String, Vec<u8>)>,
    /// All its files, which no tool may change.
    files: Vec<(String, Vec<u8>)>,
}

/// Size of the runs of data or zeros on a raw disk, in bytes.
const STEP: usize = 8192;
const BASE: &str = "/images/base.raw";
/// Repeated, it makes a path that does not fit into the first sector of an image based on that file.
const LONG_FOLDER: &str = "disks-of-a-customer-with-long-names/";

/// Data with holes of zeros, `size` bytes.
fn bytes(writer: u32, size: usize) -> Vec<u8> {
    let mut all = vec![0; size.next_multiple_of(STEP)];
    for (i, step) in all.chunks_exact_mut(STEP).enumerate() {
        if i % 3 != 1 {
            step.copy_from_slice(&layer_cluster(writer, i as u64, STEP));
        }
    }
    all.truncate(size);
    all
}

impl Disk {
    /// What an image above it shows where it holds nothing itself.
    pub(super) fn below(&self) -> (&str, &[u8]) {
        (&self.spec.path, &self.view)
    }

    /// The source of this world, with one of these sizes.
    pub(super) fn source(world: &World, sizes: &[usize]) -> Self {
        let size = world.setting("tools-size", sizes);
        let kind = world.setting("tools-source", &Kind::all());
        let path = |name: &str| {
            let long = world.setting("tools-long-names", &[false, true]);
            let folder = if long { LONG_FOLDER.repeat(15) } else { String::new() };
            format!("/images/{folder}{name}")
        };
        let Some(metadata) = kind.model.metadata() else {
            return Self::raw(world, &path("base.raw"), bytes(1000, size));
        };
        let mut view = PageMap::default();
        let base = kind.overlay.then(|| (BASE.to_owned(), bytes(1000, size - size / 4 / 512 * 512)));
        if let Some((path, bytes)) = &base {
            world.storage.put_bytes(path, bytes);
            view.write(0, bytes);
        }
        let cluster_bits = world.setting("cluster-bits", &fitting(&metadata.cluster_bits(), &[12, 16, 9]));
        let packs = |c: u64| metadata.compresses() && c % 7 == 1;
        let last = ((size as u64).div_ceil(1 << cluster_bits)) - 1;
        let mut clusters: Vec<(u64, Stored)> = (0..=last)
            .filter(|c| c % 7 < 3)
            .map(|c| (c, if packs(c) { Stored::Compressed } else { Stored::Plain }))
            .collect();
        if !clusters.iter().any(|(c, _)| *c == last) {
            clusters.push((last, Stored::Plain));
        }
        let shape = ImageShape {
            cluster_bits,
            table_bits: world.setting("l2-bits", &fitting(&metadata.table_bits(), &TABLE_BITS)),
            size: size as u64,
            backing: base.as_ref().map(|_| BASE.to_owned()),
            clusters,
            writer: 1001,
            extended: false,
        };
        let file = kind.model.make(&shape, &mut view);
        let path = path(&format!("source.{}", kind.model.format()));
        world.storage.put_bytes(&path, &file);
        let mut shown = vec![0; size];
        view.read(0, &mut shown);
        let files = base.iter().cloned().chain([(path.clone(), file)]).collect();
        Self { spec: ImageSpec { format: kind.model.format().into(), path }, view: shown, base, files }
    }

    /// A raw disk of these bytes, perhaps with holes where it has zeros.
    pub(super) fn raw(world: &World, path: &str, view: Vec<u8>) -> Self {
        let sparse = world.setting("tools-holes", &[false, true]);
        let mut content = Content { size: view.len() as u64, ..Content::default() };
        for (i, page) in view.chunks(PAGE).enumerate() {
            if !sparse || page.iter().any(|byte| *byte != 0) {
                content.pages.write((i * PAGE) as u64, page);
            }
        }
        world.storage.put(path, content);
        let files = vec![(path.to_owned(), view.clone())];
        Self { spec: ImageSpec { format: RAW, path: path.to_owned() }, view, base: None, files }
    }

    /// The disk as an argument of a tool.
    pub(super) fn arg(&self) -> String {
        named(&self.spec)
    }

    /// Checks that no tool has changed its source.
    pub(super) fn check_unchanged(&self, world: &World) {
        for (path, bytes) in &self.files {
            if world.storage.bytes(path).as_ref() != Some(bytes) {
                world.fail(Invariant::C1, format!("{path} was changed by a tool that should only read it"));
            }
        }
    }
}

/// A command that makes or fills an image, and the expected content of that image.
pub(super) struct Made {
    pub(super) args: Vec<String>,
    pub(super) spec: ImageSpec,
    pub(super) view: Vec<u8>,
    /// The source as its backing file.
    pub(super) overlay: bool,
    /// The requested cluster size in bytes.
    pub(super) cluster_bytes: Option<u64>,
    /// Its header is written last, so that it is complete, or the previous image, whenever it is recognised.
    whole_or_nothing: bool,
    /// The command prints a line about the image.
    pub(super) told: bool,
    /// The command must refuse.
    pub(super) refused: bool,
    /// The bytes of the previous image.
    old: Option<Vec<u8>>,
}

/// What is at the target's path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Old {
    /// Nothing.
    New,
    /// A disk of one sector.
    Shorter,
    /// One three times as large.
    Longer,
    /// Whatever the previous command has left there before a power cut.
    Left,
}

/// Parameters of a command.
pub(super) struct Params {
    pub(super) work: Work,
    /// Part of the target's path.
    pub(super) place: u32,
    pub(super) model: &'static dyn FormatModel,
    /// Options of a copy.
    pub(super) tasks: &'static str,
    pub(super) sparse: &'static str,
    /// The cluster size, in bytes.
    pub(super) cluster: Option<u64>,
    pub(super) old: Old,
    /// A longer previous image is on a block device.
    pub(super) device: bool,
    /// The command prints nothing about what it creates.
    pub(super) quiet: bool,
}

/// The setting whether previous images are on block devices.
pub(super) const ON_DEVICE: &str = "old-on-device";
pub(super) const TASKS: [&str; 3] = ["-m 8", "-m 1", "-m 3"];
pub(super) const SPARSE: [&str; 4] = ["-S 4k", "-S 0", "-S 512", "-S 64k"];
pub(super) const CLUSTERS: [Option<u64>; 3] = [None, Some(512), Some(65536)];

impl Params {
    /// Parameters drawn as settings of this world.
    pub(super) fn settings(world: &World, work: Work, epoch: u32) -> Self {
        let of = |first: &'static str, second: &'static str| if epoch == 0 { first } else { second };
        let kind = match work {
            Work::Overlay => Kind::mapped(true),
            _ => world.setting(of("tool-format-first", "tool-format-second"), &Kind::plain()),
        };
        let copies = matches!(work, Work::Convert | Work::Into);
        let option = |name, choices: &[&'static str]| if copies { world.setting(name, choices) } else { "" };
        let old = world.setting(of("tool-target-first", "tool-target-second"), &["new", "shorter", "longer"]);
        Self {
            work,
            place: epoch,
            model: kind.model,
            tasks: option(of("tool-crew-first", "tool-crew-second"), &TASKS),
            sparse: option(of("tool-sparse-first", "tool-sparse-second"), &SPARSE),
            cluster: world.setting(of("tool-cluster-first", "tool-cluster-second"), &CLUSTERS),
            old: match old {
                "shorter" => Old::Shorter,
                "longer" => Old::Longer,
                _ => Old::New,
            },
            device: world.setting(ON_DEVICE, &[false, true]),
            quiet: world.setting("tools-quiet", &[false, true]),
        }
    }
}

impl Made {
    pub(super) fn new(world: &World, source: &Disk, params: &Params) -> Self {
        let Params { work, model, place, .. } = *params;
        let spec = ImageSpec { format: model.format().into(), path: format!("/images/target{place}") };
        let size = source.view.len() as u64;
        let mut args: Vec<String> = Vec::new();
        let mut add = |words: &str| args.extend(words.split_whitespace().map(str::to_owned));
        let creates = matches!(work, Work::Create | Work::Overlay);
        add(if creates { "create" } else { "convert" });
        if creates && params.quiet {
            add("-q");
        }
        if matches!(work, Work::Convert | Work::Into) {
            add(params.tasks);
            add(params.sparse);
            add("--backing raw");
        }
        let has_clusters = model.format().info().options.iter().any(|option| option.name == "cluster_size");
        let cluster_bytes = params.cluster.filter(|_| has_clusters && work != Work::Into);
        if let Some(bytes) = cluster_bytes {
            add(&format!("-o cluster_size={bytes}"));
        }
        let mut view = source.view.clone();
        let old = match (work, params.old) {
            (Work::Into, _) => {
                add("-n");
                let old = put_used(world, &spec, view.len() as u64 + 4096);
                view.extend(&old[view.len()..]);
                None
            }
            (_, Old::New) => None,
            (_, Old::Shorter) => Some(put_used(world, &spec, 512)),
            (_, Old::Longer) => {
                let old = put_used(world, &spec, 3 * view.len() as u64);
                // An image with a fixed size shows more than a raw copy of a smaller source.
                if model.has_metadata() && params.device {
                    to_device(world, &spec.path);
                }
                Some(old)
            }
            (_, Old::Left) => shown(world, &spec, Some(source.below())).ok(),
        };
        match work {
            Work::Create => {
                view = vec![0; view.len()];
                add(&format!("{} {size}", named(&spec)));
            }
            Work::Overlay => {
                add(&format!(
                    "-b {} -F {}",
                    source.spec.path,
                    named(&source.spec).split(':').next().unwrap_or_default()
                ));
                add(&named(&spec));
            }
            Work::Convert | Work::Into => add(&format!("{} {}", source.arg(), named(&spec))),
            Work::Onto => unreachable!("`onto` builds this command"),
        }
        let whole_or_nothing = model.has_metadata() && matches!(work, Work::Create | Work::Overlay);
        Self {
            args,
            spec,
            view,
            overlay: work == Work::Overlay,
            cluster_bytes,
            whole_or_nothing,
            told: creates && !params.quiet,
            refused: false,
            old,
        }
    }

    /// A new image over `source` at the path of `source` itself, or, with `base`, of the file below it.
    pub(super) fn onto(source: &Disk, base: bool) -> Self {
        let below = source.base.as_ref().filter(|_| base);
        let path = below.map_or_else(|| source.spec.path.clone(), |(path, _)| path.clone());
        let spec = ImageSpec { format: Kind::mapped(true).model.format().into(), path };
        let args = ["create", "-b", &source.spec.path, &named(&spec)].map(str::to_owned).to_vec();
        Self {
            args,
            spec,
            view: source.view.clone(),
            overlay: false,
            cluster_bytes: None,
            whole_or_nothing: false,
            told: false,
            refused: true,
            old: None,
        }
    }

    /// The command line.
    pub(super) fn line(&self) -> String {
        format!("tap-img {}", self.args.join(" "))
    }
}

/// After a command that has failed or was stopped: an incomplete image is not recognised as one.
pub(super) fn check_unfinished(world: &World, made: &Made, source: &Disk) {
    if !made.whole_or_nothing || !calls_itself_image(world, &made.spec) {
        return;
    }
    let what = match shown(world, &made.spec, Some(source.below())) {
        Ok(bytes) if bytes == made.view || made.old.as_ref() == Some(&bytes) => return,
        Ok(bytes) => format!("it is an image of {} other bytes", bytes.len()),
        Err((_, text)) => text,
    };
    let text =
        format!("{} did not exit with 0, but what it left is recognised as an image: {what}", made.line());
    world.fail(Invariant::I1, text);
}

/// Turns a file into a block device with the same bytes, and some more.
fn to_device(world: &World, path: &str) {
    let mut content = world.storage.content(path).unwrap_or_default();
    content.size = content.size.next_multiple_of(PAGE as u64) + DEVICE_SLACK_BYTES;
    world.storage.put_device(path, content);
}

/// Additional size of a device, in bytes: a copy with other clusters may need more space than the old image.
const DEVICE_SLACK_BYTES: u64 = 1 << 20;
