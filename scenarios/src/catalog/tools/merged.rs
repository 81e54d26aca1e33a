//! An image is merged into its backing file, again and again until that is done.
//!
//! ```text
//!   top ─► upper ─► lower ─► bottom (raw, or mapped)        stranger ─► the base
//!            └─tap-img commit─►┘  or  lower into bottom
//! ```
//!
//! Each command may be stopped anywhere, the power may fail after it, and everything may fail. What the merged image
//! and those above it show never changes. The base has bytes of both only while it is marked, and then nothing else can
//! be opened above it.

use super::{Tool, cut_after};
use crate::catalog::setup::{CLUSTER_BITS, TABLE_BITS};
use crate::catalog::shown::shown;
use crate::check::Invariant;
use crate::formats::{self, ImageShape, Kind, RAW, Stored, fitting};
use crate::program::named;
use crate::scenario::Scenario;
use crate::world::World;
use kernel_model::faults::FaultPlan;
use kernel_model::{PageMap, Process, ProcessFile, StorageConfig};
use sim::{Draw, Entity, Label};
use tap_host::{File, Files, LockKind, OpenMode};
use tap_images::{ImageSpec, mark_of};

/// Merges of images that nobody has open.
pub static IMAGE_MERGED: Scenario = Scenario {
    name: "image-merged",
    about: "tap-img commit merges images of a chain until it succeeds, stopped anywhere; everything may fail; power cuts",
    // Of a file that is locked nobody changes the mark. What can never be read can never be merged.
    storage: &|_| StorageConfig {
        faults: FaultPlan { found: true, bad_sectors: false, ..FaultPlan::ALL },
        ..StorageConfig::default()
    },
    body: &|w| Box::pin(merged(w)),
};

/// A round: whether the power stays on afterwards, who else has files of the chain open, requests in flight.
pub static MERGE_ROUND: Label = Label::packed("merge-round", "is run (settings {})", &[1, 2, 2]);

/// Rounds in which commands may be stopped.
const ROUNDS: u32 = 4;
const SIZES: [usize; 3] = [64 << 10, 512 << 10, 67 * 512];
const NAMES: [&str; 4] = ["bottom", "lower", "upper", "top"];
const STRANGER: &str = "/images/stranger";

/// A chain of images, and which of them is merged into the one below it.
struct Chain {
    specs: Vec<ImageSpec>,
    /// What each shows.
    views: Vec<Vec<u8>>,
    /// The number of the image that is merged.
    image: usize,
    /// It keeps its name.
    keeps: bool,
    /// An image above the base that nothing was written to.
    stranger: ImageSpec,
    /// The merge was reported done.
    done: bool,
}

impl Chain {
    fn make(world: &World) -> Self {
        let size = world.setting("merge-size", &SIZES);
        let raw = world.setting("merge-bottom", &[Kind::raw(), Kind::mapped(false)]);
        let (mut view, mut specs, mut views) = (PageMap::default(), Vec::new(), Vec::new());
        for (level, name) in NAMES.into_iter().enumerate() {
            let model = if level == 0 { raw.model } else { Kind::mapped(false).model };
            let below: Option<&ImageSpec> = specs.last();
            let spec = ImageSpec { format: model.format().into(), path: format!("/images/{name}") };
            let file = model.make(&shape(world, level, size, below), &mut view);
            world.storage.put(&spec.path, formats::content_of(&file));
            let mut bytes = vec![0; size];
            view.read(0, &mut bytes);
            specs.push(spec);
            views.push(bytes);
        }
        let lowest = world.setting("merge-into-bottom", &[false, true]);
        let image = if lowest { 1 } else { 2 };
        let can_keep = !lowest || raw.model.has_metadata();
        let keeps = can_keep && world.setting("merge-keeps-name", &[false, true]);
        let model = Kind::mapped(false).model;
        let stranger = ImageSpec { format: model.format().into(), path: STRANGER.into() };
        let empty = ImageShape { clusters: Vec::new(), ..shape(world, 4, size, Some(&specs[image - 1])) };
        world.storage.put(STRANGER, formats::content_of(&model.make(&empty, &mut PageMap::default())));
        Self { specs, views, image, keeps, stranger, done: false }
    }

    fn base(&self) -> &ImageSpec {
        &self.specs[self.image - 1]
    }

    /// The command.
    fn line(&self, tasks: u64) -> Vec<String> {
        let (image, base) = (&self.specs[self.image], self.base());
        let keep = if self.keeps { "--keep-name" } else { "" };
        let words = format!(
            "commit {} {keep} -b {} -m {} {}",
            self.backing(),
            base.path,
            [8, 1, 2, 16][tasks as usize % 4],
            named(image)
        );
        words.split_whitespace().map(str::to_owned).collect()
    }

    /// The options that allow all files of the chain.
    fn backing(&self) -> String {
        let raw = self.specs[0].format == RAW;
        let bottom = if raw { format!("--backing {}", named(&self.specs[0])) } else { String::new() };
        format!("--backing {} {bottom}", Kind::mapped(false).model.format())
    }

    /// Checks what every file of the chain shows.
    fn check(&self, world: &World, when: &str) {
        for level in self.image..NAMES.len() {
            self.check_one(world, when, &self.specs[level].path, &self.views[level]);
        }
        let base = &self.base().path;
        match (self.done, self.keeps) {
            (true, true) => {
                let backing = self.backing_of_image(world);
                let below = (self.image > 1).then(|| self.specs[self.image - 2].path.clone());
                if backing != below {
                    fail(
                        world,
                        format!("{when} the merged image has the backing file {backing:?}, not {below:?}"),
                    );
                }
                if world.storage.file_number(base).is_some() {
                    fail(world, format!("{when} {base} is left of a merge"));
                }
            }
            (true, false) => self.check_one(world, when, base, &self.views[self.image]),
            // It may have bytes of both, or be what is left of an image that has given its name away.
            (false, _) if self.is_marked(world) => {}
            (false, true) if world.storage.file_number(base).is_none() => {}
            (false, _) => {
                let either = &self.views[self.image - 1..=self.image];
                if view(world, base, 0).is_ok_and(|bytes| either.contains(&bytes)) {
                    return;
                }
                fail(world, format!("{when} {base} has bytes of two images, but is not marked"));
            }
        }
        if self.done && world.storage.file_number(&mark_of(base)).is_some() {
            fail(world, format!("{when} the mark of {base} is left"));
        }
        if self.image == 2 {
            self.check_one(world, when, &self.specs[0].path, &self.views[0]);
        }
    }

    /// The backing file of the image that is merged.
    fn backing_of_image(&self, world: &World) -> Option<String> {
        let content = world.storage.content(&self.specs[self.image].path)?;
        Kind::mapped(false).model.walk(&content)?.ok()?.backing
    }

    fn is_marked(&self, world: &World) -> bool {
        world.storage.file_number(&mark_of(&self.base().path)).is_some()
    }

    fn check_one(&self, world: &World, when: &str, path: &str, expected: &[u8]) {
        match view(world, path, 0) {
            Err((invariant, text)) => world.fail(invariant, format!("{when} {text}")),
            Ok(bytes) if bytes != expected => {
                let at = bytes.iter().zip(expected).position(|(a, b)| a != b).unwrap_or(bytes.len());
                let text = format!("{when} {path} shows other bytes than before, from byte {at} on");
                fail(world, text);
            }
            Ok(_) => {}
        }
    }

    /// While the base is marked, no other image is merged into it.
    async fn check_strange_merge(&self, world: &World) {
        let base = &self.base().path;
        let bytes = || [base.clone(), mark_of(base)].map(|path| world.storage.bytes(&path));
        let before = bytes();
        // A mark that a crash has left in part says nothing.
        if !before[1].as_ref().is_some_and(|mark| mark.ends_with(b"\n") && !mark.contains(&0)) {
            return;
        }
        let words = format!("commit -q {} -b {base} {}", self.backing(), named(&self.stranger));
        let args: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
        let Some(tool) = Tool::run(world, &args, None).await else { return };
        if tool.status == 0 || before != bytes() {
            fail(world, format!("{words}: status {}, although {base} is partly merged", tool.status));
        }
    }

    /// Another image above the base shows what it showed before the merge, or cannot be opened.
    async fn check_stranger(&self, world: &World, n: u32) {
        let (marked, to) = (self.is_marked(world), format!("/images/out{n}"));
        if marked {
            self.check_strange_merge(world).await;
        }
        let words = format!("convert -S 0 {} -O raw {} {to}", self.backing(), named(&self.stranger));
        let args: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
        let Some(tool) = Tool::run(world, &args, None).await else { return };
        if tool.status != 0 {
            let gone = self.done && self.keeps;
            if !marked && !gone && !world.errors_allowed() {
                fail(world, format!("{STRANGER} cannot be opened: {}", tool.err.join("; ")));
            }
            return;
        }
        let either = &self.views[if self.done { self.image } else { self.image - 1 }..=self.image];
        if !world.storage.bytes(&to).is_some_and(|bytes| either.contains(&bytes)) {
            fail(world, format!("{STRANGER}, above {}, was opened and shows a mixture", self.base().path));
        }
    }
}

fn fail(world: &World, text: String) {
    world.fail(Invariant::C4, text);
}

/// The shape of the image at `level`.
fn shape(world: &World, level: usize, size: usize, below: Option<&ImageSpec>) -> ImageShape {
    let metadata = Kind::mapped(false).model.metadata().expect("it is mapped");
    let bits = ["merge-bits-0", "merge-bits-1", "merge-bits-2", "merge-bits-3", "merge-bits-4"][level];
    let cluster_bits = world.setting(bits, &fitting(&metadata.cluster_bits(), &CLUSTER_BITS));
    let entity = Entity::WORLD.child("merge-level", level as u64);
    world.sim.name_entity(entity, || format!("image {level} of the chain"));
    let clusters = (size as u64).div_ceil(1 << cluster_bits);
    // Which clusters it holds: a pattern of 7 bits.
    let pattern = world.sim.decide(entity, &PATTERN, 0, |d: &mut Draw| d.below(128)) | u64::from(level == 0);
    let held = (0..clusters).filter(|cluster| pattern >> (cluster % 7) & 1 == 1);
    let packs = |cluster: u64| metadata.compresses() && cluster % 5 == 1 && level > 0;
    ImageShape {
        cluster_bits,
        table_bits: fitting(&metadata.table_bits(), &TABLE_BITS)[0],
        size: size as u64,
        backing: below.map(|below| below.path.clone()),
        clusters: held.map(|c| (c, if packs(c) { Stored::Compressed } else { Stored::Plain })).collect(),
        writer: 1000 + level as u32,
        extended: false,
    }
}

/// Which clusters an image of the chain holds.
pub static PATTERN: Label = Label::new("merge-pattern", "holds clusters by the pattern {}");

/// What the image at `path` shows, with the files that its header names.
fn view(world: &World, path: &str, depth: usize) -> Result<Vec<u8>, formats::Broken> {
    let content = world.storage.content(path).unwrap_or_default();
    let mapped = Kind::mapped(false).model;
    let backing = match mapped.walk(&content) {
        Some(Ok(map)) if depth < NAMES.len() => map.backing,
        _ => None,
    };
    let is_mapped = matches!(mapped.walk(&content), Some(Ok(_)));
    let format = if is_mapped { mapped.format().into() } else { RAW };
    let below = match &backing {
        Some(name) => Some((name.as_str(), view(world, name, depth + 1)?)),
        None => None,
    };
    let spec = ImageSpec { format, path: path.to_owned() };
    shown(world, &spec, below.as_ref().map(|(name, bytes)| (*name, &bytes[..])))
}

async fn merged(world: World) {
    let mut chain = Chain::make(&world);
    chain.check(&world, "at first");
    for n in 0..ROUNDS {
        if chain.done && !chain.keeps {
            break;
        }
        let entity = Entity::WORLD.child("merge-round", u64::from(n));
        world.sim.name_entity(entity, || format!("merge {n}"));
        let value = world.sim.decide(entity, &MERGE_ROUND, 0, |d| {
            u64::from(d.below(3) == 0) | d.below(4).saturating_sub(1) << 1 | d.below(4) << 3
        });
        let (cut_then, held, tasks) = (value & 1 == 1, value >> 1 & 3, value >> 3);
        let cut = cut_after(&world, n, |d| if d.below(4) > 0 { 1 + d.below(120) } else { 0 });
        round(&world, &mut chain, (held, tasks, cut, cut_then)).await;
        if world.verdict.is_broken() {
            return;
        }
        chain.check_stranger(&world, n).await;
    }
    world.sim.stop_faults();
    // A power cut may have brought the mark of a merge back that was done.
    if !chain.done || chain.keeps {
        round(&world, &mut chain, (0, 0, None, false)).await;
    }
    let gone = chain.keeps && world.storage.file_number(&chain.base().path).is_none();
    let done = chain.done || gone && !chain.is_marked(&world);
    if !done && !world.verdict.is_broken() && !world.kernel.answers_lost() {
        fail(&world, "nothing fails any more, but the images cannot be merged".to_owned());
    }
    chain.check_stranger(&world, ROUNDS).await;
}

/// One command. Others may hold the base, or the image.
async fn round(
    world: &World,
    chain: &mut Chain,
    (held, tasks, cut, cut_then): (u64, u64, Option<u64>, bool),
) {
    let holder = match held {
        1 => hold(world, &chain.base().path).await,
        2 => hold(world, &chain.specs[3].path).await,
        _ => None,
    };
    let before = world.storage.bytes(&chain.base().path);
    let based = chain.backing_of_image(world).as_ref() == Some(&chain.base().path);
    let args = chain.line(tasks);
    let tool = Tool::run(world, &args, cut).await;
    let done = tool.as_ref().is_some_and(|tool| tool.status == 0);
    if let Some(tool) = &tool {
        // What is left of the image may have the base's name.
        let busy = held == 1 && holder.is_some() && !chain.done && based;
        if busy && (done || world.storage.bytes(&chain.base().path) != before) {
            fail(
                world,
                format!(
                    "tap-img {}: status {}, although another process reads the base",
                    args.join(" "),
                    tool.status
                ),
            );
        }
        if !done {
            // A merge that is done needs no second one, and a name that is gone permits none.
            // A merge that keeps the name cannot be done twice.
            let gone = chain.keeps && before.is_none();
            match busy || chain.done || gone {
                true => tool.refused(world, &args),
                false => _ = tool.worked(world, &args),
            }
        }
    }
    if let Some((process, file)) = holder {
        drop(file);
        process.closed().await;
    }
    if tool.is_none() || cut_then {
        world.power_cut();
    }
    chain.done |= done;
    world.count(|s| s.requests += 1);
    chain.check(world, &format!("after tap-img {}", args.join(" ")));
}

/// Somebody else reads the file at `path`, locked.
async fn hold(world: &World, path: &str) -> Option<(Process, ProcessFile)> {
    let process = world.kernel.process("holder", world.next_boot());
    let file = process.open(path, OpenMode::READ).await.ok()?;
    match file.lock(LockKind::Shared).await {
        Ok(()) => Some((process, file)),
        Err(_) => None,
    }
}
