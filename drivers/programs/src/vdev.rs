//! Guests' names of disks, and their numbers in xenstore.
//!
//! ```text
//!   xvd, disk < 16, partition < 16    202 << 8 | disk << 4 | partition
//!   xvd, others                         1 << 28 | disk << 8 | partition
//!   sd, disk < 16, partition < 16       8 << 8 | disk << 4 | partition
//!   hd, disks 0, 1                      3 << 8 | disk << 6 | partition
//!   hd, disks 2, 3                     22 << 8 | (disk - 2) << 6 | partition
//! ```
//!
//! The syntax of Xen's tools: `xvda1`, `sda`, `hdc2`, `d0p1` (of the kind of xvd), or the number itself.
//!
//! Specification: xen-vbd-interface(7).

use tap_host::{DomId, VbdId};

/// Disks of the kind of xvd have numbers below this.
const DISKS: u32 = 1 << 20;

/// The number of the disk `name`.
///
/// # Errors
/// A sentence.
pub fn parse(name: &str) -> Result<VbdId, String> {
    let number = if name.starts_with(|c: char| c.is_ascii_digit()) {
        let digits = name.strip_prefix("0x");
        digits.map_or_else(|| name.parse().ok(), |digits| u32::from_str_radix(digits, 16).ok())
    } else if let Some(rest) = name.strip_prefix("xvd") {
        letters(rest).and_then(|(disk, partition)| xvd(disk, partition))
    } else if let Some(rest) = name.strip_prefix("sd") {
        letters(rest).and_then(|(disk, partition)| sd(disk, partition))
    } else if let Some(rest) = name.strip_prefix("hd") {
        letters(rest).and_then(|(disk, partition)| hd(disk, partition))
    } else {
        name.strip_prefix('d').and_then(numbered).and_then(|(disk, partition)| xvd(disk, partition))
    };
    number.map(VbdId).ok_or_else(|| {
        format!(
            "'{name}' is not a guest's disk; write xvda, xvda1, sda, hda, d0p1, or a number such as 51712"
        )
    })
}

/// A guest's disk in messages: `3/xvda`.
pub fn of_guest(dom: DomId, vbd: VbdId) -> String {
    format!("{}/{}", dom.0, show(vbd))
}

/// The name of a disk's number; the number itself if it has none.
pub fn show(vbd: VbdId) -> String {
    let number = vbd.0;
    let (kind, disk, partition) = match number >> 8 {
        202 => ("xvd", number >> 4 & 15, number & 15),
        8 => ("sd", number >> 4 & 15, number & 15),
        3 => ("hd", number >> 6 & 3, number & 63),
        22 => ("hd", 2 + (number >> 6 & 3), number & 63),
        major if major >> 20 == 1 => ("xvd", number >> 8 & (DISKS - 1), number & 255),
        _ => return number.to_string(),
    };
    let mut name = String::new();
    let mut rest = disk + 1;
    while rest > 0 {
        rest -= 1;
        name.insert(0, char::from(b'a' + (rest % 26) as u8));
        rest /= 26;
    }
    let partition = if partition == 0 { String::new() } else { partition.to_string() };
    let text = format!("{kind}{name}{partition}");
    // Some numbers have no name.
    if parse(&text) == Ok(vbd) { text } else { number.to_string() }
}

fn xvd(disk: u32, partition: u32) -> Option<u32> {
    match (disk, partition) {
        (0..16, 0..16) => Some(202 << 8 | disk << 4 | partition),
        (0..DISKS, 0..256) => Some(1 << 28 | disk << 8 | partition),
        _ => None,
    }
}

fn sd(disk: u32, partition: u32) -> Option<u32> {
    (disk < 16 && partition < 16).then_some(8 << 8 | disk << 4 | partition)
}

fn hd(disk: u32, partition: u32) -> Option<u32> {
    match (disk, partition) {
        (0..2, 0..64) => Some(3 << 8 | disk << 6 | partition),
        (2..4, 0..64) => Some(22 << 8 | (disk - 2) << 6 | partition),
        _ => None,
    }
}

/// `ab12` as disk 27, partition 12.
fn letters(text: &str) -> Option<(u32, u32)> {
    let end = text.find(|c: char| !c.is_ascii_lowercase()).unwrap_or(text.len());
    let (name, partition) = text.split_at(end);
    let mut disk = 0_u32;
    for letter in name.bytes() {
        disk = disk.checked_mul(26)?.checked_add(u32::from(letter - b'a') + 1)?;
    }
    Some((disk.checked_sub(1)?, partition_of(partition)?))
}

/// `0p1` as disk 0, partition 1.
fn numbered(text: &str) -> Option<(u32, u32)> {
    let (disk, partition) = match text.split_once('p') {
        Some((_, "")) => return None,
        Some(both) => both,
        None => (text, ""),
    };
    let digits = disk.bytes().all(|b| b.is_ascii_digit());
    Some((disk.parse().ok().filter(|_| digits)?, partition_of(partition)?))
}

/// A partition number; empty text is the whole disk, 0.
fn partition_of(text: &str) -> Option<u32> {
    if text.is_empty() {
        return Some(0);
    }
    let digits = text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
    text.parse().ok().filter(|_| digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_convert_both_ways() {
        for (name, number) in [
            ("xvda", 51712),
            ("xvda1", 51713),
            ("xvdb", 51728),
            ("xvdp15", 51967),
            ("xvdq", 1 << 28 | 16 << 8),
            ("xvda16", 1 << 28 | 16),
            ("xvdaa", 1 << 28 | 26 << 8),
            ("sda", 2048),
            ("sdb3", 2067),
            ("hda", 768),
            ("hdb63", 895),
            ("hdc", 5632),
            ("hdd1", 5697),
        ] {
            assert_eq!(parse(name), Ok(VbdId(number)), "{name}");
            assert_eq!(show(VbdId(number)), name);
        }
        for (name, number) in
            [("51712", 51712), ("0xca00", 51712), ("d0", 51712), ("d1p2", 51730), ("d16", 268_439_552)]
        {
            assert_eq!(parse(name), Ok(VbdId(number)), "{name}");
        }
        for number in [0, 5, 65535, 1 << 29, 3 << 8 | 255] {
            assert_eq!(show(VbdId(number)), number.to_string());
        }
    }

    #[test]
    fn other_names_are_refused() {
        for bad in [
            "",
            "xvd",
            "xvd1",
            "xvdA",
            "xvda01",
            "xvda256",
            "xvda1x",
            "sdq",
            "sda16",
            "hde",
            "hda64",
            "d",
            "dp1",
            "d0p",
            "d+1",
            "vda",
            "99999999999",
            "0x",
            "0xfffffffff",
            "xvdzzzzzzzz",
            "xvda-1",
        ] {
            assert!(parse(bad).is_err(), "{bad}: {:?}", parse(bad));
        }
    }
}
