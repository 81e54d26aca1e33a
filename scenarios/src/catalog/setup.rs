//! What scenarios start from: an image, its backing file, the history of its disk.

use crate::check::{BlockHistory, Initial, Invariant, shipped};
use crate::formats::{self, FormatModel, ImageShape, Kind, RealImage, Stored, fitting, layer_cluster};
use crate::power;
use crate::workload::{Shape, Workload};
use crate::world::World;
use kernel_model::{Content, Inode, PAGE, PageMap};
use sim::{Draw, Node};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_host::{LockKind, SECTOR_BYTES};
use tap_images::ImageSpec;

/// Candidates for cluster sizes, as powers of two, of which a format uses those that it permits.
pub const CLUSTER_BITS: [u32; 4] = [12, 16, 9, 14];
/// See [`CLUSTER_BITS`].
pub const TABLE_BITS: [u32; 3] = [9, 6, 13];

/// A disk under test.
#[derive(Clone)]
pub struct Setup {
    /// What to open.
    pub spec: ImageSpec,
    /// The history of the disk.
    pub history: Rc<RefCell<BlockHistory>>,
    /// Size in sectors.
    pub size_sectors: u64,
    /// Its disk may become larger while it is in use; `size_sectors` is what it has at first.
    pub may_grow: bool,
    /// Bytes in a cluster as a power of two; 9 for a raw image.
    pub cluster_bits: u32,
    /// Path and bytes of the backing file, which must not change.
    base: Option<(String, Rc<Vec<u8>>)>,
    /// Further files below a real image.
    below: Vec<String>,
}

impl Setup {
    /// Makes image `number`, of `size_bytes`.
    pub fn new(world: &World, kind: Kind, number: u32, size_bytes: u64) -> Self {
        let Some(metadata) = kind.model.metadata() else {
            return Self::bare(world, kind, number, size_bytes);
        };
        let cluster_bits = world.setting("cluster-bits", &fitting(&metadata.cluster_bits(), &CLUSTER_BITS));
        let table_bits = world.setting("l2-bits", &fitting(&metadata.table_bits(), &TABLE_BITS));
        Self::with_bits(world, kind, number, size_bytes, (cluster_bits, table_bits))
    }

    /// As [`Setup::new`], for a format with metadata, with the permitted cluster and table sizes nearest to `bits`.
    pub fn with_bits(world: &World, kind: Kind, number: u32, size_bytes: u64, bits: (u32, u32)) -> Self {
        let (model, overlay) = (kind.model, kind.overlay);
        let metadata = model.metadata().expect("a format of clusters has metadata");
        let cluster_bits = fitting(&metadata.cluster_bits(), &[bits.0])[0];
        let table_bits = fitting(&metadata.table_bits(), &[bits.1])[0];
        let mut view = PageMap::default();
        let base_name = format!("base{number}.raw");
        let base =
            overlay.then(|| (format!("/images/{base_name}"), Rc::new(base_bytes(size_bytes, &mut view))));
        let mut clusters = Vec::new();
        if overlay && metadata.compresses() && world.setting("compressed", &[true, false]) {
            let last = (size_bytes >> cluster_bits) - 1;
            clusters = vec![(0, Stored::Compressed), (last / 2, Stored::Plain), (last, Stored::Compressed)];
        }
        let backing = overlay.then_some(base_name);
        let size = size_bytes;
        let extended = metadata.extends() && world.setting("extended-header", &[false, true]);
        let shape = ImageShape { cluster_bits, table_bits, size, backing, clusters, writer: 1001, extended };
        let file = model.make(&shape, &mut view);
        if let Some((path, bytes)) = &base {
            world.storage.put_bytes(path, bytes);
        }
        world.storage.put_bytes(&path(number), &file);
        let initial = if overlay { Initial::Bytes(view) } else { Initial::Zero };
        let setup = Self::with_history(world, kind, number, size_bytes, initial, base);
        Self { cluster_bits, ..setup }
    }

    /// As [`Setup::new`], for the format that scenarios about other things use.
    pub fn mapped(world: &World, number: u32, size_bytes: u64, overlay: bool) -> Self {
        Self::new(world, Kind::mapped(overlay), number, size_bytes)
    }

    /// An image that exists, with a disk of zeros.
    pub fn empty(world: &World, model: &'static dyn FormatModel, number: u32, size_bytes: u64) -> Self {
        Self::with_history(world, Kind::alone(model), number, size_bytes, Initial::Zero, None)
    }

    /// Starts from an image that another program made.
    pub fn real(world: &World, image: &RealImage) -> Self {
        let loaded = image.loaded();
        for (path, content) in &loaded.files {
            world.storage.put(path, content.clone());
        }
        let initial = Initial::Bytes(loaded.view.clone());
        let kind = Kind::alone(loaded.model);
        let setup = Self::with_history(world, kind, 0, loaded.size_bytes, initial, None);
        let below = loaded.files[1..].iter().map(|(path, _)| path.clone()).collect();
        Self {
            spec: ImageSpec { path: loaded.files[0].0.clone(), ..setup.spec },
            cluster_bits: loaded.cluster_bits,
            below,
            ..setup
        }
    }

    /// The current files below the image.
    pub fn below(&self, world: &World) -> Vec<(String, Content)> {
        let base = self.base.iter().map(|(path, _)| path);
        let paths = base.chain(&self.below).cloned();
        paths.filter_map(|path| world.storage.content(&path).map(|content| (path, content))).collect()
    }

    /// Makes raw image `number`.
    pub fn raw(world: &World, number: u32, size_bytes: u64) -> Self {
        Self::new(world, Kind::raw(), number, size_bytes)
    }

    /// An image without metadata: of zeros, or a disk that was in use before. On a disk of zeros, missing and reverted
    /// bytes look like the initial content.
    fn bare(world: &World, kind: Kind, number: u32, size_bytes: u64) -> Self {
        let in_use = world.setting("raw-in-use", &[false, true]);
        let clusters = if in_use { size_bytes >> USED_BITS } else { 0 };
        let shape = ImageShape {
            cluster_bits: USED_BITS,
            table_bits: 0,
            size: size_bytes,
            backing: None,
            clusters: (0..clusters).map(|cluster| (cluster, Stored::Plain)).collect(),
            writer: 1002,
            extended: false,
        };
        let mut view = PageMap::default();
        let file = kind.model.make(&shape, &mut view);
        world.storage.put(&path(number), formats::content_of(&file));
        let initial = if in_use { Initial::Bytes(view) } else { Initial::Zero };
        Self::with_history(world, kind, number, size_bytes, initial, None)
    }

    /// The same on a block device: of the same size for a raw disk; for an image with metadata the device is larger,
    /// and the rest has a previous user's bytes.
    pub fn on_device(self, world: &World) -> Self {
        let path = &self.spec.path;
        let mut content = world.storage.content(path).unwrap_or_default();
        if self.has_metadata() {
            let first = content.size.div_ceil(PAGE as u64);
            content.size = (first * PAGE as u64) + 2 * self.size_sectors * SECTOR_BYTES + DEVICE_SLACK_BYTES;
            let old = Rc::new([0xd7; PAGE]);
            (first..content.size / PAGE as u64).for_each(|i| content.pages.set(i, Some(Rc::clone(&old))));
        }
        world.storage.put_device(path, content);
        self
    }

    /// The current file of the image; of a device the part in use.
    pub fn content(&self, world: &World) -> Content {
        formats::used_content(&world.storage, &self.spec)
    }

    fn with_history(
        world: &World,
        kind: Kind,
        number: u32,
        size_bytes: u64,
        initial: Initial,
        base: Option<(String, Rc<Vec<u8>>)>,
    ) -> Self {
        let size_sectors = size_bytes / SECTOR_BYTES;
        let full = world.setting("bodies", &[false, false, false, false, false, false, false, true]);
        let history = BlockHistory::new(size_sectors, number + 1, initial, full);
        Self {
            spec: ImageSpec { format: kind.model.format().into(), path: path(number) },
            history: Rc::new(RefCell::new(history)),
            size_sectors,
            may_grow: false,
            cluster_bits: 9,
            base,
            below: Vec::new(),
        }
    }

    /// The same disk, which may become larger while it is in use.
    pub fn growing(self) -> Self {
        Self { may_grow: true, ..self }
    }

    /// The size of the disk that its image says now, and the one that it will say after a power cut at least, in
    /// sectors. `None` for what cannot be read from the image at the moment.
    pub fn sizes_of_image(&self, world: &World) -> (Option<u64>, Option<u64>) {
        let of = |content: &Content| match self.model().walk(content) {
            Some(walked) => walked.ok().map(|map| map.size / SECTOR_BYTES),
            None => Some(content.size / SECTOR_BYTES),
        };
        let now = world.storage.content(&self.spec.path).and_then(|content| of(&content));
        (now, world.storage.with_inode(&self.spec.path, |inode| of(&inode.base)).flatten())
    }

    /// A back end has told the guest that the disk has `sectors`: as many as before, or more, and durably so. From now
    /// on the guest may use them.
    pub fn published(&self, world: &World, sectors: u64) {
        let known = self.history.borrow().size_sectors();
        if sectors < known {
            let text = format!("a guest that knew of {known} sectors is told of {sectors}");
            return world.fail(Invariant::G12, text);
        }
        if sectors > known {
            self.check_durable(world, sectors, "a guest is told of");
            self.history.borrow_mut().grow(sectors);
        }
    }

    /// The disk has `sectors`, durably.
    pub fn check_durable(&self, world: &World, sectors: u64, what: &str) {
        if let (_, Some(durable)) = self.sizes_of_image(world)
            && durable < sectors
        {
            let text = format!("{what} {sectors} sectors, of which only {durable} are durable");
            world.fail(Invariant::G12, text);
        }
    }

    /// The same disk with `spec` as its image, above the current one.
    pub fn above(&self, spec: ImageSpec) -> Self {
        let below = [&self.spec.path].into_iter().chain(&self.below).cloned().collect();
        Self { spec, below, ..self.clone() }
    }

    /// The same disk with `spec` as its image, above these files and perhaps its raw base.
    pub fn over(&self, spec: ImageSpec, mut below: Vec<String>) -> Self {
        below.retain(|path| self.base.as_ref().is_none_or(|base| base.0 != *path));
        Self { spec, below, ..self.clone() }
    }

    /// The same disk with `spec` as its image, and nothing below it.
    pub fn alone(&self, spec: ImageSpec) -> Self {
        Self { spec, base: None, below: Vec::new(), ..self.clone() }
    }

    /// The same disk with `spec`, a copy, as its image.
    pub fn moved(self, spec: ImageSpec) -> Self {
        Self { spec, ..self }
    }

    /// The files of the image and of those below it.
    pub fn files(&self) -> impl Iterator<Item = &String> {
        let base = self.base.iter().map(|(path, _)| path);
        [&self.spec.path].into_iter().chain(base).chain(&self.below)
    }

    /// The images below the image, from the top down, without its raw base.
    pub fn images_below(&self) -> &[String] {
        &self.below
    }

    /// The same disk without one of the images below it.
    pub fn without(mut self, path: &str) -> Self {
        self.below.retain(|below| below != path);
        self
    }

    /// The testbed's model of the image's format.
    pub fn model(&self) -> &'static dyn FormatModel {
        formats::of(self.spec.format)
    }

    /// Whether the image contains more than the bytes of the disk.
    pub fn has_metadata(&self) -> bool {
        self.model().has_metadata()
    }

    /// Cuts the power: what runs at `nodes` stops at once, and any part of the bytes that were not durable may be left.
    pub async fn cut_power(&self, world: &World, nodes: &[&Node]) {
        world.storage.set_hook(None);
        for node in nodes {
            node.kill();
            node.dead().await;
        }
        world.power_cut();
        self.history.borrow_mut().power_cut();
    }

    /// As [`Setup::check_bytes`], and runs the shipped check on the image, which must not be open for writing.
    pub async fn check(&self, world: &World, when: &str) {
        self.check_bytes(world, when);
        if !world.verdict.is_broken() {
            shipped::agree(world, &self.spec, when).await;
        }
    }

    /// A crash may leave references past the end of the file; once the image is open for writing there must be none,
    /// even after the next crash. If a synchronisation has failed since there were `failed_syncs` of them, the length
    /// need not be durable, because all later ones fail. The last sector may be added later, once it is durable that it
    /// is missing.
    pub fn check_length(&self, world: &World, failed_syncs: u64) {
        if world.storage.counts().failed_syncs > failed_syncs {
            return;
        }
        let tenses = |inode: &Inode| (self.model().walk(&inode.base), inode.base.size);
        if let Some((Some(Ok(map)), size)) = world.storage.with_inode(&self.spec.path, tenses)
            && map.end > size + SECTOR_BYTES
        {
            let text = format!("a served image has {size} durable bytes, but {} in use", map.end);
            world.fail(Invariant::Q2, text);
        }
    }

    /// While the image is served, no other process may open it, or write to it if it is open read-only; and none may
    /// write to the files below it.
    pub fn check_locks(&self, world: &World, read_only: bool) {
        let top = if read_only { LockKind::Shared } else { LockKind::Exclusive };
        let mut wrong =
            (world.storage.locks(&self.spec.path).first() != Some(&top)).then_some(&self.spec.path);
        for path in self.base.iter().map(|(path, _)| path).chain(&self.below) {
            let locks = world.storage.locks(path);
            if locks.is_empty() || locks.contains(&LockKind::Exclusive) {
                wrong = Some(path);
            }
        }
        if let Some(path) = wrong {
            let locks = world.storage.locks(path);
            world.fail(Invariant::C2, format!("a disk is served, but the locks of {path} are {locks:?}"));
        }
    }

    /// Once a disk is reported closed, its files may be used for something else.
    pub fn check_closed(&self, world: &World) {
        let paths = self.base.iter().map(|(path, _)| path).chain(&self.below).chain([&self.spec.path]);
        if let Some(path) = paths.into_iter().find(|path| world.storage.is_closing(path)) {
            world.fail(Invariant::D1, format!("a disk is reported closed, but {path} is still being closed"));
        }
    }

    /// Checks the bytes of the image and of the files below it.
    pub fn check_bytes(&self, world: &World, when: &str) {
        if let Some((path, bytes)) = &self.base
            && world.storage.bytes(path).as_deref() != Some(bytes)
        {
            world.fail(Invariant::C1, format!("{when} the backing file has changed"));
        }
        if !self.has_metadata() {
            return;
        }
        let Some(content) = world.storage.content(&self.spec.path) else {
            world.fail(Invariant::G11, format!("{when} the image is gone"));
            return;
        };
        if let Some(Err((invariant, text))) = self.model().walk_whole(&content) {
            world.fail(invariant, format!("{when} {text}"));
        }
    }

    /// Whether it has a backing file.
    pub fn is_overlay(&self) -> bool {
        self.base.is_some()
    }

    /// Number of compressed clusters; those that are rewritten lose their owner.
    pub fn compressed_clusters(&self, world: &World) -> u64 {
        let content = self.content(world);
        let Some(Ok(map)) = self.model().walk(&content) else { return 0 };
        map.packed.iter().map(|(.., len)| len.div_ceil(1 << map.cluster_bits) + 1).sum()
    }

    /// Number of clusters of the image that nothing refers to.
    pub fn leaked(&self, world: &World) -> u64 {
        let content = self.content(world);
        self.model().walk(&content).map_or(0, |walked| walked.map_or(0, |map| map.leaked))
    }
}

/// Cuts the power after the images at `paths` were closed successfully: each must keep its content. No other file may
/// have been in use when a process died.
pub fn cut_after_close<'a>(world: &World, paths: impl IntoIterator<Item = &'a str>) {
    check_pages(world);
    cut_after_close_beside(world, paths, &[]);
}

/// The same beside other files, which nobody has opened since a process died that had them. Those of `below` were open
/// for reading: they must keep their content, too, but nobody needs to append to them.
pub fn cut_after_close_beside<'a>(
    world: &World,
    paths: impl IntoIterator<Item = &'a str>,
    below: &'a [String],
) {
    // Once data is lost in unknown places, a close fails as a flush does.
    if world.verdict.is_broken() || world.kernel.answers_lost() {
        return;
    }
    let paths: Vec<&str> = paths.into_iter().collect();
    for path in &paths {
        check_last_cluster(world, path);
    }
    let is_open = |inode: &Inode| !inode.pending.is_empty() || !inode.pending_sizes.is_empty();
    // A power cut takes nothing of a file that is completely durable.
    let open: Vec<(&str, Option<Vec<u8>>)> = paths
        .into_iter()
        .chain(below.iter().map(String::as_str))
        .filter(|path| world.storage.with_inode(path, is_open) == Some(true))
        .map(|path| (path, world.storage.bytes(path)))
        .collect();
    world.power_cut();
    for (path, bytes) in open {
        if world.storage.bytes(path) != bytes {
            world.fail(Invariant::G7, format!("{path} was closed, but lost something in a later power cut"));
        }
    }
}

/// Byte in a page about a file's synchronisations at which the number of power cuts before its boot begins.
const BOOT_AT: usize = 8;
/// Byte at which the state of the file begins; 0 means that nothing was lost.
const LOST_AT: usize = 16;

/// Checks that while no file is in use, no page of this boot says that nothing was lost: closing a file removes such a
/// page.
pub fn check_pages(world: &World) {
    if world.verdict.is_broken() || world.kernel.answers_lost() || world.storage.is_in_use() {
        return;
    }
    for name in world.xen.regions().iter().filter(|name| name.starts_with("sync-")) {
        let Some(page) = world.xen.region_page(name) else { continue };
        let (mut boot, mut lost) = ([0; 4], [0; 4]);
        page.read(BOOT_AT, &mut boot);
        page.read(LOST_AT, &mut lost);
        if boot == world.storage.power_cuts().to_le_bytes() && lost == [0; 4] {
            world.fail(Invariant::K1, format!("the page {name} is left although nothing was lost"));
        }
    }
}

/// Maximum time that the tasks of a process may take to end by themselves, in nanoseconds.
const REST_NS: u64 = 60_000_000_000;

/// Checks that all that `process` served is closed: no task of it is left. A task that waits for an event that never
/// comes would keep its resources as long as the process lives.
pub async fn check_at_rest(world: &World, process: &Node) {
    world.sim.sleep_ns(REST_NS).await;
    let left = process.tasks();
    if !left.is_empty() && process.is_alive() {
        let text = format!("{} has ended its work but has tasks: {}", process.name(), left.join(", "));
        world.fail(Invariant::K1, text);
    }
}

/// A closed image ends with at least a whole cluster, because others append at the end of the file.
fn check_last_cluster(world: &World, path: &str) {
    let content = world.storage.content(path).unwrap_or_default();
    if let Some(map) = formats::ALL.iter().find_map(|model| model.walk(&content)?.ok())
        && map.end > content.size
    {
        let text = format!("{path} was closed with {} bytes, but {} of it are in use", content.size, map.end);
        world.fail(Invariant::Q2, text);
    }
}

fn path(number: u32) -> String {
    format!("/images/disk{number}.img")
}

/// Size of a device beyond twice the disk on it, in bytes: for tables and lost clusters.
const DEVICE_SLACK_BYTES: u64 = 3 << 20;

/// The parts of a disk in use have 2^n bytes.
const USED_BITS: u32 = 12;

/// A base that is a few sectors shorter than the disk, with holes of zeros.
fn base_bytes(size_bytes: u64, view: &mut PageMap) -> Vec<u8> {
    const PIECE: usize = 4096;
    let len = size_bytes as usize - 3 * SECTOR_BYTES as usize;
    let mut bytes = vec![0; size_bytes as usize];
    for (i, piece) in bytes.chunks_exact_mut(PIECE).enumerate() {
        if i % 5 != 4 {
            piece.copy_from_slice(&layer_cluster(1000, i as u64, PIECE));
        }
    }
    bytes.truncate(len);
    view.write(0, &bytes);
    bytes
}

/// Calls `cut` some operations after the first zeros that drop dirty pages.
pub(super) fn cut_after_drop(world: &World, epoch: u32, cut: impl Fn() + 'static) {
    let draw = |d: &mut Draw| {
        // Most bugs show while these pages are repaired.
        let max = [4, 12][d.below(2) as usize];
        1 + d.below(max)
    };
    let after = world.sim.decide(power::power(epoch), &power::CRASH_AT, 0, draw);
    let (storage, dropped, at) = (world.storage.clone(), world.storage.counts().dropped, Cell::new(None));
    world.storage.set_hook(Some(Rc::new(move |op| {
        if at.get().is_none() && storage.counts().dropped > dropped {
            at.set(Some(op + after));
        }
        if at.get() == Some(op) {
            cut();
        }
    })));
}

/// The operations of one epoch; the seed decides their pattern.
pub fn workload(world: &World, size_sectors: u64, count: u32, max_sectors: u32) -> Workload {
    let shape = Shape::ALL[world.mood("shape", Shape::ALL.len() as u64) as usize];
    Workload { shape, count, size_sectors, max_sectors, zeroes: false, long_zeroes: false, flushes: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::broken_by;

    /// What `check_bytes` reports for an overlay after `damage` to the file called `name` (`None` for the image).
    fn reported(
        name: Option<&'static str>,
        damage: impl FnOnce(&mut Content) + 'static,
    ) -> Option<Invariant> {
        broken_by(move |world| async move {
            let setup = Setup::mapped(&world, 0, 1 << 20, true);
            let path = name.unwrap_or(&setup.spec.path);
            let mut content = world.storage.content(path).unwrap();
            damage(&mut content);
            world.storage.put(path, content);
            setup.check_bytes(&world, "here");
        })
    }

    #[test]
    fn damage_is_reported_by_what_it_breaks() {
        assert_eq!(reported(None, |_| {}), None);
        let base = Some("/images/base0.raw");
        assert_eq!(reported(base, |c| c.pages.write(4096 * 7 + 100, &[1])), Some(Invariant::C1));
        assert_eq!(reported(base, |c| c.size += 1), Some(Invariant::C1));
        assert_eq!(reported(None, |c| c.pages.write(0, &[0])), Some(Invariant::Q2));
        let in_place = |c: &mut Content| {
            let (offset, _) = Kind::mapped(true).model.walk(c).unwrap().unwrap().compressed(0).unwrap();
            c.pages.write(offset, &[0xff; 32]);
        };
        assert_eq!(reported(None, in_place), Some(Invariant::Q3), "written into the compressed bytes");
    }

    #[test]
    fn a_missing_image_is_reported() {
        let broken = broken_by(|world| async move {
            let setup = Setup::mapped(&world, 0, 1 << 20, false);
            let other = Setup { spec: ImageSpec { path: path(9), ..setup.spec.clone() }, ..setup };
            other.check_bytes(&world, "here");
        });
        assert_eq!(broken, Some(Invariant::G11));
    }
}
