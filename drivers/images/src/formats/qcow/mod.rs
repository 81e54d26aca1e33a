//! qcow version 1: clusters on demand, above an optional backing file.
//!
//! The map engine (`crate::map`) maps the disk and orders writes. This module has the specifics of the format: its
//! bytes (`format`), and how an image is opened, created, checked and made larger.
//!
//! # What is supported
//!
//! Clusters of 512 bytes to 64 KiB, L2 tables of 64 to 8192 entries, compressed clusters (read, and replaced when
//! written), backing files. Not encryption. Images with Xen's extended header open as plain qcow, which they also are.
//! Opening for writing clears the header's checksum, which covers the L1 table and would become stale, so that other
//! readers ignore the extension as they do after a crash. Old images with a little-endian L1 table open read-only.

mod create;
mod format;
mod grow;
mod open;

use crate::map::{Frontier, Geometry, HostOffset, Layout, MappedDisk, Mapping};
use crate::{
    CheckReport, Description, Format, FormatInfo, ImageError, ImageHost, NewImage, OpenImage, OpenOptions,
    OptionInfo,
};
use open::Front;
use std::rc::Rc;
use tap_core::{LocalBoxFuture, Node};

tap_host::listed! {
    pub(crate) BUGS: Bug with [create::BUGS, grow::BUGS, open::BUGS];
}

/// The format.
pub const FORMAT: Format = Format::new(&FormatInfo {
    name: "qcow",
    aliases: &[],
    about: "QEMU copy-on-write, version 1",
    options: &[
        OptionInfo { name: create::CLUSTER_SIZE, values: "512 to 64k" },
        OptionInfo { name: create::L2_ENTRIES, values: "64 to 8192" },
    ],
    has_backing: true,
});

/// Its registry entry.
pub struct Driver;

impl<H: ImageHost> crate::Driver<H> for Driver {
    fn format(&self) -> Format {
        FORMAT
    }

    fn recognises(&self, head: &[u8]) -> bool {
        format::is_qcow(head)
    }

    fn open(&self, host: H, image: OpenImage<H>) -> LocalBoxFuture<Result<Rc<dyn Node>, ImageError>> {
        Box::pin(async move { Ok(Rc::new(open::open(&host, &image).await?) as Rc<dyn Node>) })
    }

    fn create(&self, host: H, path: String, image: NewImage) -> LocalBoxFuture<Result<(), ImageError>> {
        Box::pin(async move { create::create(&host, &path, &image).await })
    }

    fn describe(
        &self,
        host: H,
        path: String,
        how: OpenOptions,
    ) -> LocalBoxFuture<Result<Description, ImageError>> {
        Box::pin(async move { describe(&host, &path, &how).await })
    }

    fn check(
        &self,
        host: H,
        path: String,
        how: OpenOptions,
    ) -> Option<LocalBoxFuture<Result<CheckReport, ImageError>>> {
        Some(Box::pin(async move { check(&host, &path, &how).await }))
    }

    fn grow(
        &self,
        host: H,
        image: OpenImage<H>,
        size_bytes: u64,
    ) -> Option<LocalBoxFuture<Result<(), ImageError>>> {
        Some(Box::pin(async move { grow::grow(&host, &image, size_bytes).await }))
    }
}

async fn describe<H: ImageHost>(host: &H, path: &str, how: &OpenOptions) -> Result<Description, ImageError> {
    let front = Front::read(host, path, how).await?;
    let backing = front.backing_name.as_deref().map(|name| String::from_utf8_lossy(name).into_owned());
    let backing_path = backing.as_deref().map(|name| crate::resolve(path, name));
    Ok(Description { backing, backing_path, ..front.into_map().describe(FORMAT) })
}

async fn check<H: ImageHost>(host: &H, path: &str, how: &OpenOptions) -> Result<CheckReport, ImageError> {
    Front::read(host, path, how).await?.into_map().check(host, path).await
}

/// An open qcow image.
type Qcow<H> = MappedDisk<H, Qcow1>;

/// The entries of qcow's tables.
struct Qcow1;

impl Layout for Qcow1 {
    const TABLE: &'static str = "L2 table";
    type Allocator = Frontier;

    fn mapping(entry: u64, geometry: &Geometry) -> Mapping {
        format::mapping(entry, geometry.cluster_bits)
    }

    fn entry(host: HostOffset) -> u64 {
        host.0
    }
}

#[cfg(test)]
mod tests;
