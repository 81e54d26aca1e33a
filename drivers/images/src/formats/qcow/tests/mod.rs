//! Tests of the qcow driver on files in memory.

mod behaviour;
mod bugs;
mod chains;
mod faults;
mod hostile;
mod reach;
mod trial;
mod zero;

use super::*;
use crate::testing::World;
use crate::{BackingPolicy, Formats, ImageFormat, NewImage, OpenImage, OpenOptions};
use std::cell::RefCell;
use std::future::Future;
use tap_core::{NodeInfo, Op, Request, Response};
use tap_host::{Budget, Errno, IoBuf, IoVec, SectorRange};

pub(super) const PATH: &str = "/image";
pub(super) const BASE: &str = "/base";

/// How to create and open an image.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup {
    pub(super) sectors: u64,
    pub(super) cluster_bits: u32,
    pub(super) l2_bits: u32,
    /// Sectors of a raw file below it.
    pub(super) base_sectors: Option<u64>,
    pub(super) tables: usize,
    pub(super) direct: bool,
    /// Bytes of garbage on a block device that holds it.
    pub(super) device: Option<usize>,
    /// Clusters 0, 3 and 70 are compressed.
    pub(super) compressed: bool,
}

const COMPRESSED_CLUSTERS: [u64; 3] = [0, 3, 70];
/// Their contents.
const COMPRESSED_FILL: u8 = 230;

pub(super) const SMALL: Setup = Setup {
    sectors: 256,
    cluster_bits: 10,
    l2_bits: 6,
    base_sectors: None,
    tables: 8,
    direct: false,
    device: None,
    compressed: false,
};

pub(super) const RAW: ImageFormat = ImageFormat::As(crate::formats::raw::FORMAT);
pub(super) const QCOW: ImageFormat = ImageFormat::As(FORMAT);

/// Options of a new image.
pub(super) fn layout(cluster_bits: u32, l2_bits: u32) -> Vec<(String, String)> {
    let option = |name: &str, bits: u32| (name.to_owned(), (1_u32 << bits).to_string());
    vec![option(create::CLUSTER_SIZE, cluster_bits), option(create::L2_ENTRIES, l2_bits)]
}

/// Creates an image, as programs do.
pub(super) fn make(world: &World, path: &str, image: NewImage) -> Result<(), ImageError> {
    let (host, path) = (world.clone(), path.to_owned());
    world.block_on(async move { Formats::shipped().create(&host, FORMAT, &path, image).await })
}

/// Opens the image at [`PATH`].
pub(super) async fn open(host: &World, options: &OpenOptions) -> Result<Qcow<World>, ImageError> {
    super::open::open(host, &OpenImage::alone(PATH, FORMAT, Formats::shipped(), options)).await
}

/// The contents of a sector of the base file; never zero.
pub(super) fn base_fill(sector: u64) -> u8 {
    (sector % 100) as u8 + 100
}

impl Setup {
    /// Creates the files in `world`.
    pub(super) fn create(&self, world: &World) {
        if let Some(sectors) = self.base_sectors {
            world.put(BASE, (0..sectors).flat_map(|s| [base_fill(s); 512]).collect());
        }
        if let Some(bytes) = self.device {
            world.put_device(PATH, (0..bytes).map(|i| (i * 7 + i / 512) as u8 | 1).collect());
        }
        let image = NewImage {
            size_bytes: self.sectors * 512,
            backing: self.base_sectors.map(|_| "base".to_owned()),
            existing: self.device.is_some().then(Vec::new),
            options: layout(self.cluster_bits, self.l2_bits),
        };
        make(world, PATH, image).unwrap();
        for cluster in COMPRESSED_CLUSTERS.into_iter().filter(|_| self.compressed) {
            put_compressed(world, self, cluster, COMPRESSED_FILL);
        }
    }

    pub(super) fn options(&self, write: bool) -> OpenOptions {
        OpenOptions {
            write,
            unlocked: false,
            direct: self.direct,
            table_bytes: self.tables * crate::map::table_cost(1 << self.l2_bits),
            // A small cache goes with little memory.
            memory: if self.tables == 1 { Budget::least() } else { Budget::default() },
            backing: BackingPolicy::any(RAW),
        }
    }

    pub(super) fn try_open(&self, world: &World, write: bool) -> Result<Rc<Qcow<World>>, ImageError> {
        let (host, options) = (world.clone(), self.options(write));
        world.block_on(async move { open(&host, &options).await.map(Rc::new) })
    }

    pub(super) fn open(&self, world: &World) -> Rc<Qcow<World>> {
        self.try_open(world, true).unwrap()
    }

    /// The initial contents of `sector`.
    pub(super) fn initial(&self, sector: u64) -> u8 {
        if self.compressed && COMPRESSED_CLUSTERS.contains(&(sector >> (self.cluster_bits - 9))) {
            return COMPRESSED_FILL;
        }
        if self.base_sectors.is_some_and(|n| sector < n) { base_fill(sector) } else { 0 }
    }
}

/// A request whose buffers have the sizes `parts`, in sectors.
pub(super) fn request(op: Op, start: u64, parts: &[u32], fill: u8) -> Request {
    let bufs: IoVec = parts
        .iter()
        .map(|n| {
            let mut buf = IoBuf::unpooled(*n as usize * 512).unwrap();
            buf.fill(fill);
            buf
        })
        .collect();
    Request { op, range: SectorRange::new(start, parts.iter().sum()), bufs, fua: false }
}

pub(super) fn write(qcow: &Qcow<World>, start: u64, sectors: u32, fill: u8) -> LocalBoxFuture<Response> {
    qcow.submit(request(Op::Write, start, &[sectors], fill))
}

pub(super) fn flush(world: &World, qcow: &Qcow<World>) -> Result<(), Errno> {
    world.block_on(qcow.submit(Request::flush())).result
}

/// The first byte of each of `count` sectors; all bytes of a sector are the same, or it is `None`.
pub(super) fn fills(
    qcow: &Qcow<World>,
    start: u64,
    count: u32,
) -> impl Future<Output = Result<Vec<Option<u8>>, Errno>> + use<> {
    let response = qcow.submit(request(Op::Read, start, &[count], 0xee));
    async move {
        let response = response.await;
        response.result?;
        let sector = |s: &[u8]| s.iter().all(|b| *b == s[0]).then_some(s[0]);
        Ok(response.bufs[0].chunks(512).map(sector).collect())
    }
}

/// Every sector of the disk.
pub(super) fn all(world: &World, qcow: &Qcow<World>) -> Vec<Option<u8>> {
    let sectors = qcow.info().size_sectors;
    let parts = (0..sectors).step_by(64).map(|at| fills(qcow, at, (sectors - at).min(64) as u32));
    let parts = world.block_on(futures_util::future::join_all(parts));
    parts.into_iter().flat_map(|p| p.expect("every sector can be read")).collect()
}

pub(super) fn checked(world: &World) -> CheckReport {
    let host = world.clone();
    world.block_on(async move { check(&host, PATH, &OpenOptions::default()).await }).unwrap()
}

/// Writes a compressed cluster of `fill` into an image that is not open, the way QEMU does: at the end of the file.
pub(super) fn put_compressed(world: &World, setup: &Setup, cluster: u64, fill: u8) {
    use std::io::Write;
    let mut image = world.bytes(PATH);
    let geometry = format::parse(&image, image.len() as u64).unwrap().geometry;
    let (l1, l2) = ((cluster >> setup.l2_bits) as usize, (cluster & ((1 << setup.l2_bits) - 1)) as usize);
    let l1_at = geometry.root_at.0 as usize + l1 * 8;
    let mut table = u64::from_be_bytes(image[l1_at..l1_at + 8].try_into().unwrap()) as usize;
    if table == 0 {
        table = image.len().next_multiple_of(1 << setup.cluster_bits);
        image.resize(table + geometry.table_bytes() as usize, 0);
        image[l1_at..l1_at + 8].copy_from_slice(&(table as u64).to_be_bytes());
    }
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(&vec![fill; 1 << setup.cluster_bits]).unwrap();
    let bytes = encoder.finish().unwrap();
    let entry = format::COMPRESSED | (bytes.len() as u64) << (63 - setup.cluster_bits) | image.len() as u64;
    image.extend(bytes);
    image[table + l2 * 8..table + l2 * 8 + 8].copy_from_slice(&entry.to_be_bytes());
    world.put(PATH, image);
}
