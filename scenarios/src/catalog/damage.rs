//! Damaged images: whatever a file contains, the driver refuses it or serves it as a disk.
//!
//! ```text
//!   made image ──► a few damages ──► check            agrees with the walker
//!                                ──► open to read     readable data matches the bytes
//!                                ──► open to write    then every write stays, and changes nothing else
//! ```
//!
//! The expected data is derived here again, entry by entry and without any check of owners: an image in which two
//! clusters share space may be refused, but if it is opened for writing, the sharing must not show.

use super::setup::{CLUSTER_BITS, TABLE_BITS, cut_after_close};
use crate::check::Invariant;
use crate::formats::{
    self, Broken, Bytes, Claimed, FormatModel, ImageShape, Metadata, Places, RAW, Stored, is_tolerable,
    layer_cluster,
};
use crate::guest::{DirectDisk, GuestDisk};
use crate::limits::StackLimits;
use crate::scenario::OfFormat;
use crate::stack::Stack;
use crate::tag::Tag;
use crate::workload::{Shape, Workload, operations};
use crate::world::World;
use kernel_model::SimHost;
use kernel_model::{Content, PageMap, StorageConfig};
use sim::{Entity, Label};
use std::rc::Rc;
use tap_core::Node;
use tap_host::{IoKind, SECTOR_BYTES, SectorRange};
use tap_images::{BackingPolicy, ImageError, ImageSpec, OpenOptions};

/// One damage: its kind in 3 bits, its place in 13, the value in 48.
pub static DAMAGE: Label =
    Label::packed("damage", "the image is damaged (kind, place, value: {})", &[3, 13, 48]);

/// An image with some invalid contents.
pub static DAMAGED_IMAGE: OfFormat = OfFormat {
    name: "FORMAT-damaged-image",
    about: "FORMAT with damaged header, tables and data: refused, or served as exactly what its bytes say",
    fits: |model| model.has_metadata(),
    storage: |_, _| StorageConfig::default(),
    body: |w, model| Box::pin(damaged_image(w, model)),
    settled: true,
};

const BASE: &str = "/images/below.raw";
const DISK_BYTES: u64 = 256 << 10;
/// A damaged size may be anything; this much of the disk is checked.
const SEEN_BYTES: u64 = 512 << 10;
/// Walking a larger disk takes too much memory.
const WALKED_BYTES: u64 = 64 << 20;
const DAMAGES: u32 = 6;
/// The bytes of headers.
const HEAD_BYTES: usize = 64;
/// Sectors per read.
const STEP: u64 = 8;

async fn damaged_image(world: World, model: &'static dyn FormatModel) {
    let Some(metadata) = model.metadata() else { return };
    let limits = StackLimits::draw(&world);
    let (mut bytes, below, shape) = make(&world, model, metadata);
    let head = bytes.clone();
    let damaged = damage(&world, &mut bytes, &shape, metadata);
    let head_intact = bytes.get(..HEAD_BYTES) == head.get(..HEAD_BYTES);
    let spec =
        ImageSpec { format: model.format().into(), path: format!("/images/damaged.{}", model.format()) };
    world.storage.put_bytes(&spec.path, &bytes);
    world.storage.put_bytes(BASE, &below);
    let disk = Damaged {
        world,
        limits,
        damaged,
        head_intact,
        spec,
        view: View::of(metadata, Bytes(&bytes), Bytes(&below)),
    };
    let done = disk.look().await;
    if let Err(error) = done
        && !damaged
    {
        disk.world.fail(Invariant::G11, format!("failed to use a valid image: {error}"));
    }
    if disk.world.storage.bytes(BASE).as_deref() != Some(&below[..]) {
        disk.world.fail(Invariant::C1, "the backing file has changed");
    }
}

/// An image with clusters of all kinds, and its backing file.
fn make(world: &World, model: &dyn FormatModel, metadata: &dyn Metadata) -> (Vec<u8>, Vec<u8>, ImageShape) {
    let cluster_bits =
        world.setting("cluster-bits", &formats::fitting(&metadata.cluster_bits(), &CLUSTER_BITS));
    let table_bits = world.setting("l2-bits", &formats::fitting(&metadata.table_bits(), &TABLE_BITS));
    let overlay = model.format().info().has_backing && world.setting("overlay", &[false, true]);
    let last = (DISK_BYTES >> cluster_bits) - 1;
    let odd = if metadata.compresses() { Stored::Compressed } else { Stored::Plain };
    let mut clusters: Vec<(u64, Stored)> = [
        (0, Stored::Plain),
        (1, odd),
        (2, Stored::Plain),
        (5, odd),
        (9, Stored::Plain),
        (last / 2, Stored::Plain),
        (last, odd),
    ]
    .into();
    clusters.retain(|c| c.0 <= last);
    clusters.sort_unstable_by_key(|c| c.0);
    clusters.dedup_by_key(|c| c.0);
    let backing = overlay.then(|| "below.raw".to_owned());
    let size = DISK_BYTES;
    let shape =
        ImageShape { cluster_bits, table_bits, size, backing, clusters, writer: 1001, extended: false };
    let below: Vec<u8> = (0..DISK_BYTES / 8192).flat_map(|i| layer_cluster(1000, i, 4096)).collect();
    (model.make(&shape, &mut PageMap::default()), below, shape)
}

/// Damages `bytes` as decided. Returns whether it did.
fn damage(world: &World, bytes: &mut Vec<u8>, shape: &ImageShape, metadata: &dyn Metadata) -> bool {
    let entity = Entity::WORLD.child("damage", 0);
    world.sim.name_entity(entity, || "damage".into());
    let good = Good { places: metadata.places(Bytes(bytes), shape), metadata };
    let mut damaged = false;
    for i in 0..DAMAGES {
        let value = world.sim.decide(entity, &DAMAGE, i, |d| {
            if d.below(3) > 0 { 0 } else { d.bits() & !7 | (1 + d.below(7)) }
        });
        if value & 7 != 0 && !bytes.is_empty() {
            good.apply(bytes, value);
            damaged = true;
        }
    }
    damaged
}

/// An image before it is damaged.
struct Good<'a> {
    places: Places,
    metadata: &'a dyn Metadata,
}

impl Good<'_> {
    /// An offset that is likely to matter.
    fn place(&self, value: u64, len: u64) -> u64 {
        let (tables, cluster_bits) = (&self.places.tables, self.places.cluster_bits);
        let (how, value) = (value & 7, value >> 3);
        match how {
            0 => value,
            1 | 2 => (value % (2 * (len >> cluster_bits) + 2)) << cluster_bits,
            3 => len.saturating_sub(value % 1024),
            4 => tables.get(value as usize % tables.len().max(1)).map_or(0, |at| at + value % 3 * 8),
            5 => value << 20,
            6 => value % (len + 1),
            _ => 0,
        }
    }

    /// Byte offset of one of the first entries of a table.
    fn entry(&self, which: u64) -> usize {
        let Places { tables, root, table_entries, .. } = &self.places;
        let table = tables.get(which as usize % tables.len().max(1)).copied().unwrap_or(root.0);
        (table + (which / 8 % 16 % table_entries) * 8) as usize
    }

    fn apply(&self, bytes: &mut Vec<u8>, damage: u64) {
        let Places { fields, root, cluster_bits, .. } = self.places;
        let (which, value) = (damage >> 3 & 0x1fff, damage >> 16);
        let len = bytes.len() as u64;
        let place = self.place(value, len);
        match damage & 7 {
            1 => {
                let (at, width) = fields[which as usize % fields.len()];
                put(bytes, at, &place.to_be_bytes()[8 - width..]);
            }
            2 if root.1 > 0 => put(bytes, (root.0 + which % root.1 * 8) as usize, &place.to_be_bytes()),
            2 | 3 => put(bytes, self.entry(which), &place.to_be_bytes()),
            4 => {
                let odd = self.metadata.odd_entry(cluster_bits, which, place);
                put(bytes, self.entry(which), &odd.to_be_bytes());
            }
            5 => bytes[(value % len) as usize] ^= which.max(1) as u8 | 1,
            6 => bytes.truncate((value % len) as usize),
            _ => {
                let from = Bytes(bytes).number(self.entry(value) as u64);
                put(bytes, self.entry(which), &from.to_be_bytes());
            }
        }
    }
}

/// Overwrites bytes that exist; an image that was cut short stays so.
fn put(bytes: &mut [u8], at: usize, new: &[u8]) {
    for (i, byte) in new.iter().enumerate() {
        if let Some(old) = bytes.get_mut(at.saturating_add(i)) {
            *old = *byte;
        }
    }
}

/// The first sectors of the disk according to the bytes of an image; `None` for a sector that they do not determine.
struct View {
    sectors: Vec<Option<[u8; SECTOR_BYTES as usize]>>,
    /// Size of the disk in bytes.
    size: u64,
}

impl View {
    fn of(metadata: &dyn Metadata, image: Bytes<'_>, below: Bytes<'_>) -> Self {
        let claims = metadata.claims(image);
        let size = claims.size;
        let mut view = Self { sectors: vec![None; (size.min(SEEN_BYTES) / SECTOR_BYTES) as usize], size };
        let Some(cluster_bits) = claims.cluster_bits else { return view };
        let mut cluster = vec![0; 1 << cluster_bits];
        let per_cluster = cluster.len() / SECTOR_BYTES as usize;
        for (index, sectors) in (0..).zip(view.sectors.chunks_mut(per_cluster)) {
            cluster.fill(0);
            match metadata.claimed(image, index) {
                Claimed::Unmapped if claims.has_backing => below.window(index << cluster_bits, &mut cluster),
                Claimed::Unmapped => {}
                Claimed::At(offset) => image.window(offset, &mut cluster),
                Claimed::Compressed(offset, len) => {
                    if !inflate(image, offset, len, &mut cluster) {
                        continue;
                    }
                }
            }
            for (sector, bytes) in sectors.iter_mut().zip(cluster.as_chunks().0) {
                *sector = Some(*bytes);
            }
        }
        view
    }
}

fn inflate(image: Bytes<'_>, at: u64, len: u64, out: &mut [u8]) -> bool {
    let mut packed = vec![0; len as usize];
    image.window(at, &mut packed);
    let mut inflate = flate2::Decompress::new(false);
    let done = inflate.decompress(&packed, out, flate2::FlushDecompress::Finish);
    done.is_ok() && inflate.total_out() == out.len() as u64
}

struct Damaged {
    world: World,
    limits: StackLimits,
    damaged: bool,
    /// The header is as it was made. In others the walker expects the layout of images that drivers make.
    head_intact: bool,
    spec: ImageSpec,
    view: View,
}

impl Damaged {
    /// Runs all operations on the image. An error is a refusal.
    async fn look(&self) -> Result<(), ImageError> {
        let checked = self.check().await;
        let spec = &self.spec;
        let read = self.read_only().await;
        self.wait_for_the_last();
        let host = SimHost::start(&self.world.kernel, &self.world.xen, "tapdisk", 2);
        let stack = Stack::open(&host, &self.world, spec, &self.limits).await?;
        let disk = DirectDisk::new(stack.node(), self.limits.pool_bytes);
        let mut known = self.view.sectors.clone();
        self.read_all(&disk, &known, "opened to write").await;
        self.write(&disk, &mut known).await;
        self.read_all(&disk, &known, "after writes").await;
        let closed = stack.disk.close().await;
        match closed {
            Ok(()) => cut_after_close(&self.world, [spec.path.as_str()]),
            Err(error) if !self.damaged => {
                self.world.fail(Invariant::G11, format!("closing failed with {error:?}"));
            }
            Err(_) => {}
        }
        drop((disk, stack));
        self.wait_for_the_last();
        let host = SimHost::start(&self.world.kernel, &self.world.xen, "tapdisk", 3);
        match Stack::open(&host, &self.world, spec, &self.limits).await {
            Ok(stack) => {
                let disk = DirectDisk::new(stack.node(), self.limits.pool_bytes);
                self.read_all(&disk, &known, "opened again").await;
            }
            Err(error) => {
                let text = format!("an image that was open for writing cannot be opened again: {error}");
                self.world.fail(Invariant::G11, text);
            }
        }
        checked.and(read)
    }

    /// Runs the shipped check and the walker on the same bytes.
    async fn check(&self) -> Result<(), ImageError> {
        self.wait_for_the_last();
        let host = SimHost::start(&self.world.kernel, &self.world.xen, "tap-img", 0);
        let report = formats::drivers().check(&host, &self.spec, false).await?.unwrap_or_default();
        let content = self.world.storage.content(&self.spec.path).unwrap_or_default();
        if self.view.size > WALKED_BYTES {
            return Ok(());
        }
        match self.walk(&content) {
            Ok(()) if report.problem_count > 0 => {
                let problems = report.problems.join("; ");
                let text = format!("check found problems where the walker found none: {problems}");
                self.world.fail(Invariant::V1, text);
            }
            // A table that QEMU may not have written is not damage, but is reported.
            Err((Invariant::Q5, _)) if report.missing_clusters > 0 => {}
            Err(broken) if report.problem_count == 0 && self.head_intact && !is_tolerable(&broken) => {
                let text = format!("check found nothing, but the walker did: {}", broken.1);
                self.world.fail(Invariant::V1, text);
            }
            _ => {}
        }
        Ok(())
    }

    /// Completes the close of all files, as a process that has ended does.
    fn wait_for_the_last(&self) {
        self.world.storage.close_all();
    }

    async fn read_only(&self) -> Result<(), ImageError> {
        self.wait_for_the_last();
        let host = SimHost::start(&self.world.kernel, &self.world.xen, "tapdisk", 1);
        let options = OpenOptions {
            table_bytes: self.limits.table_bytes,
            backing: BackingPolicy::any(RAW),
            ..OpenOptions::default()
        };
        let node: Rc<dyn Node> = formats::drivers().open(&host, &self.spec, &options).await?;
        let disk = DirectDisk::new(node, self.limits.pool_bytes);
        self.read_all(&disk, &self.view.sectors, "opened to read").await;
        Ok(())
    }

    async fn read_all(&self, disk: &DirectDisk, known: &[Option<[u8; SECTOR_BYTES as usize]>], when: &str) {
        for (i, known) in known.chunks(STEP as usize).enumerate() {
            let range = SectorRange::new(i as u64 * STEP, known.len() as u32);
            let wrong = disk.read(range, |bytes| {
                let mut sectors = bytes.as_chunks().0.iter().zip(known);
                sectors.position(|(got, want)| want.as_ref().is_some_and(|want| want != got))
            });
            let sector = range.start.0;
            self.world.count(|s| s.requests += 1);
            match wrong.await {
                Ok(None) => {}
                Ok(Some(at)) => {
                    let sector = sector + at as u64;
                    self.world.fail(Invariant::G10, format!("{when}: sector {sector} has unexpected bytes"));
                }
                Err(_) if self.damaged => {}
                Err(error) => {
                    self.world.fail(Invariant::E4, format!("{when}: reading {range} failed with {error:?}"));
                }
            }
        }
    }

    /// Writes to the disk; `known` follows the writes.
    async fn write(&self, disk: &DirectDisk, known: &mut [Option<[u8; SECTOR_BYTES as usize]>]) {
        if known.is_empty() {
            return;
        }
        let entity = Entity::WORLD.child("guest", 0);
        self.world.sim.name_entity(entity, || "guest".into());
        let size_sectors = known.len() as u64;
        let workload = Workload {
            shape: Shape::Random,
            count: 24,
            size_sectors,
            max_sectors: 24,
            zeroes: false,
            long_zeroes: false,
            flushes: 0,
        };
        let ops = operations(&self.world.sim, entity, 0, &workload);
        for (i, op) in ops.iter().enumerate().filter_map(|(i, op)| op.map(|op| (i, op))) {
            self.world.count(|s| s.requests += 1);
            let range = op.range;
            let result = match op.kind {
                IoKind::Read | IoKind::WriteZeroes | IoKind::Discard => continue,
                IoKind::Flush => disk.flush().await,
                IoKind::Write => {
                    disk.write(range, |bytes| {
                        for (sector, bytes) in (range.start.0..).zip(bytes.as_chunks_mut::<512>().0) {
                            Tag { writer: 1, op: i as u64, sector }.fill(bytes, true);
                        }
                    })
                    .await
                }
            };
            for sector in range.start.0..range.start.0 + u64::from(range.count) {
                // The result of a failed write is undefined.
                known[sector as usize] = result.is_ok().then(|| {
                    let mut bytes = [0; SECTOR_BYTES as usize];
                    Tag { writer: 1, op: i as u64, sector }.fill(&mut bytes, true);
                    bytes
                });
            }
            if let Err(error) = result
                && !self.damaged
            {
                self.world.fail(Invariant::E4, format!("{op} failed with {error:?}"));
            }
        }
    }

    /// What the walker finds wrong with the metadata or the compressed clusters.
    fn walk(&self, content: &Content) -> Result<(), Broken> {
        let walked = formats::of(self.spec.format).walk(content).expect("damaged images have metadata");
        let map = walked?;
        let mut out = vec![0; 1 << map.cluster_bits];
        let inflate = |cluster| map.read_cluster(content, cluster, &mut out).map(drop);
        map.packed.iter().map(|(cluster, ..)| *cluster).try_for_each(inflate)
    }
}
