//! An example of a driver: a separate format in a separate crate. `docs/dev/writing-a-driver.md` walks through it.
//!
//! ```text
//!   byte 0      header: magic, size of the disk in bytes; nothing else in the first 4096 bytes
//!   byte 4096   table: for each cluster of the disk the byte offset of its cluster in the file; 0 for none
//!   then        clusters of 4096 bytes, in the order in which they were first written
//! ```
//!
//! Numbers have 64 bits and are big endian. The table is as long as the disk needs, rounded up to pages of 512 entries:
//! each is a table of the map engine ([`tap_images::map`]), which serves all requests. The file has no root, since the
//! pages are at fixed places: the root is computed when an image is opened. There are no backing files.
//!
//! # Order of writes
//!
//! * A new image: its length, sync, header, sync, its name. Without the header the file is not an image, and with it
//!   the table is zeros, whatever the file held before.
//! * A new cluster: data, then its entry, as the map engine orders them.

use std::rc::Rc;
use tap_core::{LocalBoxFuture, Node};
use tap_host::SECTOR_BYTES;
use tap_images::map::{Front, Frontier, Geometry, HostOffset, Layout, Mapping};
use tap_images::{CheckReport, Description, Format, FormatInfo, ImageError, ImageFile, ImageHost};
use tap_images::{NewImage, OpenImage, OpenOptions, sync_name};

tap_host::listed! {
    /// The seeded bugs of this crate.
    pub BUGS: Bug;
    EXAMPLE_HEADER_EARLY = "example-header-early",
        "a new image of the example format gets its header before its empty table is durable";
}

/// The format.
pub const FORMAT: Format = Format::new(&FormatInfo {
    name: "example",
    aliases: &[],
    about: "A header and one table of clusters",
    options: &[],
    has_backing: false,
});

const MAGIC: [u8; 8] = *b"TAPTABLE";
const HEADER_BYTES: u64 = 16;
const TABLE_AT: u64 = 4096;
/// The root of a disk of this size takes 4 MiB of memory.
const MAX_DISK_BYTES: u64 = 1 << 40;

/// The meaning of entries.
struct Table;

impl Layout for Table {
    const TABLE: &'static str = "page";
    type Allocator = Frontier;

    fn mapping(entry: u64, _: &Geometry) -> Mapping {
        if entry == 0 { Mapping::Unmapped } else { Mapping::Plain(HostOffset(entry)) }
    }

    fn entry(host: HostOffset) -> u64 {
        host.0
    }
}

/// The geometry of a disk of `size_bytes`, or the problem with that size.
fn geometry(size_bytes: u64) -> Result<Geometry, String> {
    let fits = (SECTOR_BYTES..=MAX_DISK_BYTES).contains(&size_bytes);
    if !fits || !size_bytes.is_multiple_of(SECTOR_BYTES) {
        let range = format!("{SECTOR_BYTES} to {MAX_DISK_BYTES}, a multiple of {SECTOR_BYTES}");
        return Err(format!("a size of {size_bytes} bytes is not from {range}"));
    }
    // The root is not in the file.
    Ok(Geometry { size_bytes, cluster_bits: 12, table_bits: 9, root_at: HostOffset(0) })
}

/// Byte offset of the end of the table.
fn table_end(geometry: &Geometry) -> u64 {
    TABLE_AT + geometry.root_entries() * geometry.table_bytes()
}

/// Opens the file at `path` and reads its header. The header is checked here, the table by the map engine.
async fn read<H: ImageHost>(host: &H, path: &str, how: &OpenOptions) -> Result<Front<H, Table>, ImageError> {
    let file = ImageFile::open(host, path, how).await?;
    let mut header = [0; HEADER_BYTES as usize];
    file.read_bytes(0, &mut header).await.map_err(ImageError::io("read", path))?;
    let (magic, size) = header.split_at(MAGIC.len());
    let size_bytes = size.iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
    let file_bytes = file.info.size_bytes;
    let checked = match geometry(size_bytes) {
        _ if magic != MAGIC => Err("it does not begin with the magic bytes of the format".to_owned()),
        Ok(geometry) if table_end(&geometry) > file_bytes => {
            Err(format!("its table extends past the end of the file of {file_bytes} bytes"))
        }
        other => other,
    };
    let advice = "check that this is the right file";
    let refused = |what| ImageError::Refused { path: path.to_owned(), format: FORMAT.name(), what, advice };
    let geometry = checked.map_err(refused)?;
    let pages = (0..geometry.root_entries()).map(|page| HostOffset(TABLE_AT + page * geometry.table_bytes()));
    let header = (HostOffset(0)..HostOffset(HEADER_BYTES), "the header");
    let padding = header.0.end..HostOffset(TABLE_AT);
    Ok(Front::new(file, geometry, pages.collect()).with_fixed(padding, [header]))
}

async fn create<H: ImageHost>(host: &H, path: &str, image: &NewImage) -> Result<(), ImageError> {
    let refused = |what| ImageError::Options { path: path.to_owned(), format: FORMAT.name(), what };
    let geometry = geometry(image.size_bytes).map_err(refused)?;
    let file = ImageFile::create(host, path, image.existing.as_deref()).await?;
    if file.info.block_device {
        return Err(refused("a block device cannot be emptied; create it in a file".to_owned()));
    }
    let write = async {
        // The file is empty, so the new length reads as zeros.
        file.set_size(table_end(&geometry)).await?;
        if !host.bug(&EXAMPLE_HEADER_EARLY) {
            file.sync().await?;
        }
        file.write_bytes(0, &[MAGIC, geometry.size_bytes.to_be_bytes()].concat()).await?;
        file.sync().await
    };
    write.await.map_err(ImageError::io("write", path))?;
    sync_name(host, path).await
}

/// Its registry entry.
pub struct Driver;

impl<H: ImageHost> tap_images::Driver<H> for Driver {
    fn format(&self) -> Format {
        FORMAT
    }

    fn recognises(&self, head: &[u8]) -> bool {
        head.starts_with(&MAGIC)
    }

    fn open(&self, host: H, image: OpenImage<H>) -> LocalBoxFuture<Result<Rc<dyn Node>, ImageError>> {
        Box::pin(async move {
            let front = read(&host, &image.path, &image.options).await?;
            Ok(Rc::new(front.survey(&host, &image).await?.into_disk(&host, None)) as Rc<dyn Node>)
        })
    }

    fn create(&self, host: H, path: String, image: NewImage) -> LocalBoxFuture<Result<(), ImageError>> {
        Box::pin(async move { create(&host, &path, &image).await })
    }

    fn describe(
        &self,
        host: H,
        path: String,
        how: OpenOptions,
    ) -> LocalBoxFuture<Result<Description, ImageError>> {
        Box::pin(async move { Ok(read(&host, &path, &how).await?.describe(FORMAT)) })
    }

    fn check(
        &self,
        host: H,
        path: String,
        how: OpenOptions,
    ) -> Option<LocalBoxFuture<Result<CheckReport, ImageError>>> {
        Some(Box::pin(async move { read(&host, &path, &how).await?.check(&host, &path).await }))
    }
}
