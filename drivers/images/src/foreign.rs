//! Formats that no driver reads, by their first bytes: recognition must not take such a file as a raw disk, because a
//! guest would be shown the container instead of the disk in it, and its writes would destroy the image.

/// A format that has no driver.
pub(crate) struct Foreign {
    /// Its name for people.
    pub(crate) name: &'static str,
    /// Offset of its magic bytes in the file.
    at: usize,
    magic: &'static [u8],
}

const fn format(name: &'static str, at: usize, magic: &'static [u8]) -> Foreign {
    Foreign { name, at, magic }
}

/// A fixed VHD is not among them: only its last sector tells it from a raw disk. Neither is LUKS: a guest may encrypt
/// the whole of a raw disk.
static FOREIGN: [Foreign; 11] = [
    format("qcow2", 0, b"QFI\xfb\0\0\0\x02"),
    format("qcow2", 0, b"QFI\xfb\0\0\0\x03"),
    format("VHD", 0, b"conectix"),
    format("VHDX", 0, b"vhdxfile"),
    format("VMDK", 0, b"KDMV"),
    format("VMDK", 0, b"COWD"),
    format("VMDK", 0, b"# Disk DescriptorFile"),
    format("VDI", 64, &0xbeda_107f_u32.to_le_bytes()),
    format("QED", 0, b"QED\0"),
    format("Parallels", 0, b"WithoutFreeSpace"),
    format("Parallels", 0, b"WithouFreSpacExt"),
];

/// The format that a file beginning with `head` claims to have, among those without a driver.
pub(crate) fn foreign(head: &[u8]) -> Option<&'static str> {
    let found = FOREIGN.iter().find(|f| head.get(f.at..).is_some_and(|rest| rest.starts_with(f.magic)));
    found.map(|f| f.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_magic_is_recognised_only_at_its_place() {
        for Foreign { name, at, magic } in &FOREIGN {
            let mut head = vec![0; crate::HEAD_BYTES];
            head[*at..at + magic.len()].copy_from_slice(magic);
            assert_eq!(foreign(&head), Some(*name));
            head.insert(0, 0);
            assert_eq!(foreign(&head), None, "{name}");
            assert_eq!(foreign(&magic[..magic.len() - 1]), None, "{name} cut off");
        }
        // The first version has a driver.
        assert_eq!(foreign(b"QFI\xfb\0\0\0\x01"), None);
    }
}
