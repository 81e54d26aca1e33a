//! The bytes of qcow version 1, big endian, with Xen's extended header.
//!
//! ```text
//!   header │ [extended header] │ [backing file name] │ L1 table │ L2 tables and clusters in any order …
//!
//!   guest byte ─► L1 index (above cluster_bits + l2_bits) ─► L2 index (above cluster_bits) ─► byte in cluster
//!   L1 entry: byte offset of an L2 table, or 0
//!   L2 entry: byte offset of a cluster, or 0; with bit 63: compressed,
//!             length in bytes from bit 63 - cluster_bits on, byte offset below
//! ```

use crate::map::{Compressed, Geometry, HostOffset, Mapping};
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// "QFI\xfb".
pub(super) const MAGIC: u32 = 0x5146_49fb;
/// "XEN\xfb", in the extended header.
pub(super) const XEN_MAGIC: u32 = 0x5845_4efb;
/// Offset of the checksum of the extended header.
pub(super) const XEN_CHECKSUM_AT: u64 = 52;
/// In images without this flag the L1 table has the byte order of the machine that wrote it.
const XEN_L1_BIG_ENDIAN: u32 = 2;
/// The extended header is looked for only in front of an L1 table with this alignment.
const XEN_L1_ALIGN: u64 = 4096;
/// Largest L1 table, in bytes.
pub(super) const MAX_L1_BYTES: u64 = 32 << 20;
/// Longest name of a backing file, in bytes.
pub(super) const MAX_NAME_BYTES: u32 = 1023;
/// Set in L2 entries of compressed clusters.
pub(super) const COMPRESSED: u64 = 1 << 63;

/// The header at byte 0. Fields marked as not used may hold anything.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Debug, PartialEq, Eq)]
#[repr(C)]
pub(super) struct RawHeader {
    /// [`MAGIC`].
    pub(super) magic: U32,
    /// 1.
    pub(super) version: U32,
    /// Byte offset of the name of the backing file in this file; 0 if there is none.
    pub(super) backing_offset: U64,
    /// Length of that name in bytes, at most [`MAX_NAME_BYTES`]. The name has no NUL at its end.
    pub(super) backing_len: U32,
    /// When the backing file was last changed, in seconds since 1970. Not used: copies change it.
    pub(super) backing_mtime: U32,
    /// Size of the disk in bytes.
    pub(super) size_bytes: U64,
    /// Bytes in a cluster, as a power of two: 9 to 16.
    pub(super) cluster_bits: u8,
    /// Entries in an L2 table, as a power of two: 6 to 13.
    pub(super) l2_bits: u8,
    /// Not used.
    pub(super) padding: [u8; 2],
    /// 0: not encrypted. 1: AES, which is refused.
    pub(super) crypt_method: U32,
    /// Byte offset of the L1 table in this file, a multiple of 8. It has an entry for each L2 table that the disk can
    /// have.
    pub(super) l1_offset: U64,
}

const _: () = assert!(size_of::<RawHeader>() == 48);

/// Xen's extended header, at byte 48.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Debug)]
#[repr(C)]
struct RawXenHeader {
    /// [`XEN_MAGIC`].
    magic: U32,
    /// The first four bytes of the MD5 of the L1 table. If it is wrong, other programs ignore the whole extended
    /// header. It is cleared when the image is opened for writing, since it would be wrong after the first new L2
    /// table.
    checksum: U32,
    /// Clusters that tapdisk allocated at once. Not used.
    min_cluster_alloc: U32,
    /// Bit 0: the file is sparse. Bit 1: [`XEN_L1_BIG_ENDIAN`].
    flags: U32,
}

/// The mapping of an L2 entry in an image with clusters of `2^cluster_bits` bytes.
pub(super) fn mapping(entry: u64, cluster_bits: u32) -> Mapping {
    if entry & COMPRESSED != 0 {
        let shift = 63 - cluster_bits;
        let len = (entry & !COMPRESSED) >> shift;
        Mapping::Compressed(Compressed { offset: HostOffset(entry & ((1 << shift) - 1)), len })
    } else if entry == 0 {
        Mapping::Unmapped
    } else {
        Mapping::Plain(HostOffset(entry))
    }
}

/// A valid header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Header {
    pub(super) geometry: Geometry,
    /// Offset and length of the backing file's name.
    pub(super) backing: Option<(u64, u32)>,
    pub(super) xen: Option<Xen>,
}

/// The fields of Xen's extended header that are used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Xen {
    pub(super) checksum: u32,
    pub(super) l1_big_endian: bool,
}

/// Whether a file that begins with `head` claims to be qcow of any version: opening refuses versions other than 1, and
/// none is taken as a raw disk.
pub(super) fn is_qcow(head: &[u8]) -> bool {
    head.starts_with(&MAGIC.to_be_bytes())
}

/// Parses the first bytes of a file of `file_bytes`. The error says what is wrong with them.
pub(super) fn parse(head: &[u8], file_bytes: u64) -> Result<Header, String> {
    let Ok((raw, rest)) = RawHeader::read_from_prefix(head) else {
        return Err(format!("it has only {} bytes", head.len()));
    };
    if raw.magic != MAGIC {
        return Err("it does not begin with the magic bytes of a qcow image".to_owned());
    }
    if raw.version != 1 {
        return Err(format!("it has version {}, not 1", raw.version));
    }
    let geometry = geometry(&raw, file_bytes)?;
    match raw.crypt_method.get() {
        0 => {}
        1 => return Err("it is encrypted with AES".to_owned()),
        n => return Err(format!("it is encrypted with the unknown method {n}")),
    }
    let backing = backing(&raw, file_bytes)?;
    let xen = RawXenHeader::read_from_prefix(rest).ok().map(|(xen, _)| xen);
    let xen = xen.filter(|x| x.magic == XEN_MAGIC && geometry.root_at.0.is_multiple_of(XEN_L1_ALIGN));
    let xen = xen
        .map(|x| Xen { checksum: x.checksum.get(), l1_big_endian: x.flags.get() & XEN_L1_BIG_ENDIAN != 0 });
    Ok(Header { geometry, backing, xen })
}

fn geometry(raw: &RawHeader, file_bytes: u64) -> Result<Geometry, String> {
    let (cluster_bits, l2_bits) = (u32::from(raw.cluster_bits), u32::from(raw.l2_bits));
    if !(9..=16).contains(&cluster_bits) {
        return Err(format!("clusters of 2^{cluster_bits} bytes are outside 2^9 to 2^16"));
    }
    if !(6..=13).contains(&l2_bits) {
        return Err(format!("L2 tables of 2^{l2_bits} entries are outside 2^6 to 2^13"));
    }
    let geometry = Geometry {
        size_bytes: raw.size_bytes.get(),
        cluster_bits,
        table_bits: l2_bits,
        root_at: HostOffset(raw.l1_offset.get()),
    };
    let (size, l1_offset) = (geometry.size_bytes, raw.l1_offset.get());
    if !(512..=i64::MAX as u64).contains(&size) {
        return Err(format!("a disk of {size} bytes is smaller than a sector or larger than a file can be"));
    }
    if geometry.root_entries() * 8 > MAX_L1_BYTES {
        return Err(format!("a disk of {size} bytes needs an L1 table larger than {MAX_L1_BYTES} bytes"));
    }
    let inside = l1_offset <= file_bytes && geometry.root_end().0 <= file_bytes;
    if l1_offset < size_of::<RawHeader>() as u64 || !l1_offset.is_multiple_of(8) || !inside {
        return Err(format!("its L1 table at byte {l1_offset} is not inside the file of {file_bytes} bytes"));
    }
    Ok(geometry)
}

fn backing(raw: &RawHeader, file_bytes: u64) -> Result<Option<(u64, u32)>, String> {
    let (offset, len) = (raw.backing_offset.get(), raw.backing_len.get());
    if offset == 0 {
        return Ok(None);
    }
    if len > MAX_NAME_BYTES {
        return Err(format!("the name of its backing file has {len} bytes, more than {MAX_NAME_BYTES}"));
    }
    let inside = offset.checked_add(u64::from(len)).is_some_and(|end| end <= file_bytes);
    if offset < size_of::<RawHeader>() as u64 || !inside {
        return Err(format!("the name of its backing file at byte {offset} is not inside the file"));
    }
    Ok(Some((offset, len)))
}

/// The header of a new image.
pub(super) fn encode(geometry: &Geometry, backing_len: u32) -> RawHeader {
    RawHeader {
        magic: MAGIC.into(),
        version: 1.into(),
        backing_offset: if backing_len == 0 { 0 } else { size_of::<RawHeader>() as u64 }.into(),
        backing_len: backing_len.into(),
        backing_mtime: 0.into(),
        size_bytes: geometry.size_bytes.into(),
        cluster_bits: geometry.cluster_bits as u8,
        l2_bits: geometry.table_bits as u8,
        padding: [0; 2],
        crypt_method: 0.into(),
        l1_offset: geometry.root_at.0.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> (Geometry, Vec<u8>) {
        let geometry =
            Geometry { size_bytes: 8 << 20, cluster_bits: 12, table_bits: 9, root_at: HostOffset(4096) };
        (geometry, encode(&geometry, 0).as_bytes().to_vec())
    }

    #[test]
    fn headers_beyond_the_limits_are_refused_with_a_reason() {
        let (geometry, good) = sample();
        assert_eq!(parse(&good, 8192).unwrap().geometry, geometry);
        for (at, value, word) in [
            (0, 0, "magic"),
            (7, 2, "version 2"),
            (32, 8, "clusters"),
            (32, 17, "clusters"),
            (33, 5, "L2"),
            (33, 14, "L2"),
            (39, 1, "AES"),
            (39, 7, "unknown method 7"),
            (24, 0x80, "larger"),
            (25, 1, "L1 table larger"),
            (47, 4, "L1 table at"),
            (40, 1, "L1 table at"),
            (15, 47, "backing"),
        ] {
            let mut bad = good.clone();
            bad[at] = value;
            let what = parse(&bad, 8192).unwrap_err();
            assert!(what.contains(word), "{what} at {at}");
        }
        assert!(parse(&good, 4096).is_err(), "the L1 table is past the end");
        assert!(parse(&good[..47], 8192).is_err());
    }

    #[test]
    fn compressed_entries_have_the_length_above_the_offset() {
        let entry = COMPRESSED | 1234 << (63 - 12) | 0x5678;
        assert_eq!(
            mapping(entry, 12),
            Mapping::Compressed(Compressed { offset: HostOffset(0x5678), len: 1234 })
        );
    }

    proptest! {
        #[test]
        fn an_encoded_header_parses_to_the_same(
            size in 512_u64..1 << 40, cluster_bits in 12_u32..=16, l2_bits in 9_u32..=13,
            l1 in 6_u64..1 << 20, name in 0_u32..=1023,
        ) {
            let geometry = Geometry { size_bytes: size, cluster_bits, table_bits: l2_bits, root_at: HostOffset(l1 * 8) };
            let raw = encode(&geometry, name);
            let header = parse(raw.as_bytes(), u64::MAX / 2).unwrap();
            prop_assert_eq!(header.geometry, geometry);
            prop_assert_eq!(header.backing, (name > 0).then_some((48, name)));
        }

        #[test]
        fn any_bytes_parse_or_fail_within_the_limits(mut head in prop::collection::vec(any::<u8>(), 0..128), file in any::<u64>()) {
            let _: Result<Header, String> = parse(&head, file);
            let good = sample().1;
            let n = head.len().min(9);
            head[..n].copy_from_slice(&good[..n]);
            if let Ok(header) = parse(&head, file) {
                prop_assert!(header.geometry.root_end().0 <= file && header.geometry.root_entries() * 8 <= MAX_L1_BYTES);
            }
        }
    }
}
