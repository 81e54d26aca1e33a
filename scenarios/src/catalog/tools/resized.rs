//! A disk is made larger, again and again.
//!
//! ```text
//!   base (raw, shorter or longer than the disk, or none)
//!     └── image ──tap-img resize──► larger ──► larger ──► ...
//! ```
//!
//! Each command may be stopped anywhere, the power may fail after it, and everything may fail. The disk has its old
//! size or the new one then (a raw one: or one in between), and the new one if the command said so. It shows what it
//! showed, and zeros in the new part.

use super::{Tool, cut_after};
use crate::catalog::setup::{CLUSTER_BITS, TABLE_BITS};
use crate::catalog::shown::shown;
use crate::check::Invariant;
use crate::formats::{self, ImageShape, Kind, RAW, Stored, fitting};
use crate::program::named;
use crate::scenario::Scenario;
use crate::world::World;
use kernel_model::faults::FaultPlan;
use kernel_model::{PageMap, StorageConfig};
use sim::{Entity, Label};
use tap_host::{Files, LockKind, OpenMode, SECTOR_BYTES};
use tap_images::ImageSpec;

/// Images that nobody has open are resized.
pub static IMAGE_RESIZED: Scenario = Scenario {
    name: "image-resized",
    about: "tap-img resize makes disks larger, over shorter and longer backing files, stopped anywhere; everything may fail; power cuts",
    // What can never be read can never be copied.
    storage: &|_| StorageConfig {
        faults: FaultPlan { found: true, bad_sectors: false, ..FaultPlan::ALL },
        ..StorageConfig::default()
    },
    body: &|w| Box::pin(resized(w)),
};

/// A round: whether the power stays on afterwards, what is asked for, how much the disk grows.
pub static RESIZE_ROUND: Label = Label::packed("resize-round", "is run (settings {})", &[1, 2, 3]);

/// Rounds in which commands may be stopped.
const ROUNDS: u32 = 4;
const SIZES: [u64; 3] = [64 << 10, 67 * SECTOR_BYTES, 256 << 10];
/// What a disk grows by: within a cluster, within a table, past tables.
const STEPS: [u64; 8] = [40 << 10, SECTOR_BYTES, 600 << 10, 3 * SECTOR_BYTES, 9 << 10, 3 << 20, 64 << 10, 0];
/// What the base has, in sectors, besides what the disk has.
const BASES: [Option<i64>; 6] = [Some(300), None, Some(2400), Some(-20), Some(0), Some(5)];
const IMAGE: &str = "/images/disk";
const BASE: &str = "/images/base";

/// A disk, and what it shows.
struct Resized {
    spec: ImageSpec,
    base: Option<Vec<u8>>,
    /// At first; the rest is zeros.
    view: Vec<u8>,
    /// As it was seen last.
    size_bytes: u64,
    /// The sizes that it may have: the one that a command reported last, and those that were asked for since, in bytes.
    sizes: Vec<u64>,
}

/// What a command asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Asks {
    /// A larger disk.
    To,
    /// The same, as a difference.
    By,
    /// A smaller disk.
    Less,
    /// A larger disk, which somebody has open.
    InUse,
}

impl Resized {
    fn make(world: &World) -> Self {
        let size = world.setting("resize-size", &SIZES);
        let kind = world.setting("resize-format", &[Kind::mapped(true), Kind::raw()]);
        let mut view = PageMap::default();
        let more = kind.overlay.then(|| world.setting("resize-base", &BASES)).flatten();
        let base = more.map(|more| {
            let bytes = (size as i64 + more * SECTOR_BYTES as i64) as u64;
            let raw = Kind::raw().model;
            let clusters = (0..bytes.div_ceil(1 << 12)).map(|c| (c, Stored::Plain)).collect();
            let shape = ImageShape { cluster_bits: 12, size: bytes, clusters, ..raw_shape(1000) };
            let file = raw.make(&shape, &mut view);
            world.storage.put(BASE, formats::content_of(&file));
            file
        });
        let shape = shape(world, kind, size, base.is_some());
        let file = kind.model.make(&shape, &mut view);
        world.storage.put(IMAGE, formats::content_of(&file));
        let mut bytes = vec![0; size as usize];
        view.read(0, &mut bytes);
        let spec = ImageSpec { format: kind.model.format().into(), path: IMAGE.to_owned() };
        Self { spec, base, view: bytes, size_bytes: size, sizes: vec![size] }
    }

    /// The command, and the size that the disk has after it.
    fn line(&self, asks: Asks, step: u64) -> (Vec<String>, u64) {
        let to = self.size_bytes + step;
        let size = match asks {
            Asks::By => format!("+{step}"),
            Asks::Less => (self.size_bytes - SECTOR_BYTES).to_string(),
            Asks::To | Asks::InUse => to.to_string(),
        };
        let words = format!("resize --backing raw:{BASE} {} {size}", named(&self.spec));
        (words.split_whitespace().map(str::to_owned).collect(), to)
    }

    /// Checks size and bytes of the disk.
    fn check(&mut self, world: &World, when: &str) {
        let below = self.base.as_ref().map(|bytes| (BASE, &bytes[..]));
        let bytes = match shown(world, &self.spec, below) {
            Ok(bytes) => bytes,
            Err((invariant, text)) => return world.fail(invariant, format!("{when}: {text}")),
        };
        self.size_bytes = bytes.len() as u64;
        if !self.may_have(self.size_bytes) {
            let (size, sizes) = (self.size_bytes, &self.sizes);
            return fail(
                world,
                format!("{when} the disk has {size} bytes, and can only have one of {sizes:?}"),
            );
        }
        let view = self.shows();
        if bytes != view {
            let at = bytes.iter().zip(&view).position(|(a, b)| a != b).unwrap_or_default();
            let part = if at >= self.view.len() { "new part" } else { "old part" };
            fail(world, format!("{when} the disk has other bytes in its {part}, from byte {at} on"));
        }
    }

    /// Whether it may have this size, in bytes. That of a raw disk is the size of its file, which file systems may
    /// extend block by block.
    fn may_have(&self, size: u64) -> bool {
        let (least, most) = (self.sizes.iter().min(), self.sizes.iter().max());
        let between = least.is_some_and(|least| *least <= size) && most.is_some_and(|most| size <= *most);
        self.sizes.contains(&size) || (self.spec.format == RAW && between)
    }

    /// What it should show.
    fn shows(&self) -> Vec<u8> {
        let mut view = self.view.clone();
        view.resize(self.size_bytes as usize, 0);
        view
    }

    /// The power fails. What the disk shows afterwards stays.
    fn cut_power(&mut self, world: &World, when: &str) {
        world.power_cut();
        self.check(world, when);
        self.sizes = vec![self.size_bytes];
    }

    /// The driver shows the same as the bytes do.
    async fn check_read(&self, world: &World, n: u32) {
        let to = format!("/images/out{n}");
        let words = format!("convert -S 0 --backing raw:{BASE} {} -O raw {to}", named(&self.spec));
        let args: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
        let Some(tool) = Tool::run(world, &args, None).await else { return };
        if tool.worked(world, &args) && world.storage.bytes(&to).as_ref() != Some(&self.shows()) {
            fail(world, format!("{words}: the copy has other bytes than the disk"));
        }
    }
}

fn fail(world: &World, text: String) {
    world.fail(Invariant::G12, text);
}

fn raw_shape(writer: u32) -> ImageShape {
    let (clusters, backing) = (Vec::new(), None);
    ImageShape { cluster_bits: 9, table_bits: 6, size: 0, backing, clusters, writer, extended: false }
}

fn shape(world: &World, kind: Kind, size: u64, based: bool) -> ImageShape {
    let shape = ImageShape { size, ..raw_shape(1001) };
    let Some(metadata) = kind.model.metadata() else {
        let clusters = (0..size >> shape.cluster_bits).map(|c| (c, Stored::Plain)).collect();
        return ImageShape { clusters, ..shape };
    };
    let cluster_bits =
        world.setting("resize-cluster-bits", &fitting(&metadata.cluster_bits(), &CLUSTER_BITS));
    let table_bits =
        world.setting("resize-table-bits", &fitting(&metadata.table_bits(), &[6, TABLE_BITS[0]]));
    // Whether it holds its last cluster, which may be a part of one, and how.
    let last = world.setting("resize-last", &[None, Some(Stored::Plain), Some(Stored::Compressed)]);
    let last = last.filter(|how| *how == Stored::Plain || metadata.compresses());
    let count = size.div_ceil(1 << cluster_bits);
    let held = (0..count - 1).filter(|cluster| cluster % 3 != 1).map(|cluster| (cluster, Stored::Plain));
    let extended = metadata.extends() && world.setting("resize-extended", &[false, true]);
    ImageShape {
        cluster_bits,
        table_bits,
        backing: based.then(|| BASE.to_owned()),
        clusters: held.chain(last.map(|how| (count - 1, how))).collect(),
        extended,
        ..shape
    }
}

async fn resized(world: World) {
    let mut disk = Resized::make(&world);
    disk.check(&world, "at first");
    for n in 0..ROUNDS {
        let entity = Entity::WORLD.child("resize-round", u64::from(n));
        world.sim.name_entity(entity, || format!("resize {n}"));
        let value = world.sim.decide(entity, &RESIZE_ROUND, 0, |d| {
            u64::from(d.below(3) == 0) | d.below(7).saturating_sub(3) << 1 | d.below(8) << 3
        });
        let asks = [Asks::To, Asks::By, Asks::Less, Asks::InUse][(value >> 1 & 3) as usize];
        let cut = cut_after(&world, n, |d| if d.below(4) > 0 { 1 + d.below(60) } else { 0 });
        round(&world, &mut disk, asks, STEPS[(value >> 3 & 7) as usize], cut).await;
        if value & 1 == 0 {
            disk.cut_power(&world, "after a power cut");
        }
        if world.verdict.is_broken() {
            return;
        }
        disk.check_read(&world, n).await;
    }
    world.sim.stop_faults();
    let reached = round(&world, &mut disk, Asks::To, STEPS[0], None).await;
    if !reached && !world.verdict.is_broken() && !world.kernel.answers_lost() {
        fail(&world, "nothing fails any more, but the disk cannot be made larger".to_owned());
    }
    disk.check_read(&world, ROUNDS).await;
}

/// One command. Returns whether it reported success.
async fn round(world: &World, disk: &mut Resized, asks: Asks, step: u64, cut: Option<u64>) -> bool {
    let holder = world.kernel.process("holder", world.next_boot());
    let held = match asks {
        Asks::InUse => match holder.open(IMAGE, OpenMode::READ).await {
            Ok(file) => tap_host::File::lock(&file, LockKind::Shared).await.is_ok().then_some(file),
            Err(_) => None,
        },
        _ => None,
    };
    let before = world.storage.bytes(IMAGE);
    let (args, to_bytes) = disk.line(asks, step);
    let tool = Tool::run(world, &args, cut).await;
    let when = format!("after tap-img {}", args.join(" "));
    let refuses = asks == Asks::Less || held.is_some();
    if !refuses {
        disk.sizes.push(to_bytes);
    }
    let mut worked = false;
    if let Some(tool) = &tool {
        if refuses {
            tool.refused(world, &args);
            if before != world.storage.bytes(IMAGE) {
                fail(world, format!("{when} the file has changed, although the command was refused"));
            }
        } else {
            worked = tool.worked(world, &args);
        }
    }
    if worked {
        disk.sizes = vec![to_bytes];
    }
    drop(held);
    holder.closed().await;
    world.count(|s| s.requests += 1);
    match tool {
        None => disk.cut_power(world, &when),
        Some(_) => disk.check(world, &when),
    }
    worked
}
