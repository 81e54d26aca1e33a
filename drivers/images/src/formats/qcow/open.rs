//! Opens images.

use super::format::{self, Header, XEN_CHECKSUM_AT, Xen};
use super::{Qcow, Qcow1};
use crate::io::ImageFile;
use crate::map::{self, HostOffset, decode_entries};
use crate::{ImageError, ImageHost, OpenImage, OpenOptions};
use tap_host::{Errno, SECTOR_BYTES};

tap_host::listed! {
    pub(super) BUGS: Bug;
    CHECKSUM_KEPT = "checksum-kept",
        "the checksum of Xen's extended header stays although the L1 table changes";
    BEHIND_HEADER_READ = "behind-header-read",
        "an image is refused if something behind its header cannot be read, whatever it is";
}

/// Bytes of the first read: the header, the backing file's name and the L1 table of most images.
const HEAD_BYTES: u64 = 8192;
/// Bytes of the header with Xen's extension: all that must be readable before it is known what else is in use.
const HEADERS_BYTES: usize = 64;

/// The metadata of an image, without its L2 tables.
pub(super) struct Front<H: ImageHost> {
    pub(super) file: ImageFile<H>,
    pub(super) header: Header,
    /// Byte offsets of L2 tables.
    pub(super) root: Vec<u64>,
    pub(super) backing_name: Option<Vec<u8>>,
}

pub(super) fn refused(path: &str, what: String, advice: &'static str) -> ImageError {
    ImageError::Refused { path: path.to_owned(), format: super::FORMAT.name(), what, advice }
}

impl<H: ImageHost> Front<H> {
    /// Opens the file and reads its header, L1 table and backing file's name.
    pub(super) async fn read(host: &H, path: &str, how: &OpenOptions) -> Result<Self, ImageError> {
        let file = ImageFile::open(host, path, how).await?;
        let io = |error| ImageError::io("read", path)(error);
        let head = read_head(host, &file).await.map_err(io)?;
        let header = format::parse(&head, file.info.size_bytes)
            .map_err(|what| refused(path, what, "check that this is the right file"))?;
        let l1_bytes = header.geometry.root_entries() * 8;
        let l1 = bytes_at(&file, &head, header.geometry.root_at.0, l1_bytes).await.map_err(io)?;
        let mut l1: Vec<u64> = decode_entries(&l1).collect();
        if header.xen.is_some_and(|xen| !xen.l1_big_endian) {
            if how.write {
                let what = "its L1 table has the byte order of the machine that wrote it".to_owned();
                return Err(refused(path, what, "open it read-only, and convert it to write to it"));
            }
            l1.iter_mut().for_each(|entry| *entry = entry.swap_bytes());
        }
        let backing_name = match header.backing {
            Some((offset, len)) => Some(bytes_at(&file, &head, offset, u64::from(len)).await.map_err(io)?),
            None => None,
        };
        Ok(Self { file, header, root: l1, backing_name })
    }

    /// Converts it for the map engine.
    pub(super) fn into_map(self) -> map::Front<H, Qcow1> {
        let Header { geometry, backing, xen } = self.header;
        let header_end = if xen.is_some() { 64 } else { 48 };
        let name = backing.map(|(at, len)| {
            (HostOffset(at)..HostOffset(at + u64::from(len)), "the name of the backing file")
        });
        let fixed = [
            (HostOffset(0)..HostOffset(header_end), "the header"),
            (geometry.root_at..geometry.root_end(), "the L1 table"),
        ];
        let root: Vec<HostOffset> = self.root.into_iter().map(HostOffset).collect();
        // QEMU writes whole sectors of zeros for the L1 table, wherever it begins.
        let l1_bytes = (root.len() as u64 * 8).next_multiple_of(SECTOR_BYTES);
        let padding = geometry.root_at..geometry.root_at + l1_bytes;
        map::Front::new(self.file, geometry, root).with_fixed(padding, fixed.into_iter().chain(name))
    }
}

/// The first bytes, in ordinary memory: a buffer kept would be waited for by the reads after it.
async fn read_head<H: ImageHost>(host: &H, file: &ImageFile<H>) -> Result<Vec<u8>, Errno> {
    let mut head = vec![0; file.info.size_bytes.min(HEAD_BYTES) as usize];
    let Err(error) = file.read_bytes(0, &mut head).await else { return Ok(head) };
    // What lies behind the header may be anything, and that it cannot be read is no reason to refuse the image.
    if head.len() <= HEADERS_BYTES || host.bug(&BEHIND_HEADER_READ) {
        return Err(error);
    }
    head.truncate(HEADERS_BYTES);
    file.read_bytes(0, &mut head).await?;
    Ok(head)
}

/// Reads bytes, from `head` if they are in it.
async fn bytes_at<H: ImageHost>(
    file: &ImageFile<H>,
    head: &[u8],
    offset: u64,
    len: u64,
) -> Result<Vec<u8>, Errno> {
    let within =
        usize::try_from(offset).ok().and_then(|from| head.get(from..from.checked_add(len as usize)?));
    if let Some(bytes) = within {
        return Ok(bytes.to_vec());
    }
    let mut bytes = vec![0; len as usize];
    file.read_bytes(offset, &mut bytes).await?;
    Ok(bytes)
}

/// Opens an image and its backing file.
pub(super) async fn open<H: ImageHost>(host: &H, image: &OpenImage<H>) -> Result<Qcow<H>, ImageError> {
    let (path, options) = (&image.path, &image.options);
    let front = Front::read(host, path, options).await?;
    let backing = match &front.backing_name {
        Some(name) => Some(image.backing(host, name).await?),
        None => None,
    };
    let xen = front.header.xen.filter(|_| options.write);
    let image = front.into_map().survey(host, image).await?;
    let xen = xen.filter(|_| !host.bug(&CHECKSUM_KEPT));
    clear_checksum(image.file(), xen).await.map_err(ImageError::io("clear the checksum of", path))?;
    Ok(image.into_disk(host, backing))
}

/// Clears the checksum of Xen's extended header, which covers the L1 table and is not maintained.
pub(super) async fn clear_checksum<H: ImageHost>(file: &ImageFile<H>, xen: Option<Xen>) -> Result<(), Errno> {
    match xen {
        Some(xen) if xen.checksum != 0 => file.write_bytes(XEN_CHECKSUM_AT, &[0; 4]).await,
        _ => Ok(()),
    }
}
