//! Opening, and the properties of an open file: kind, size, alignment, and whether it lives in memory.

use super::{Closing, Group, OpenFile, errno, of_rustix};
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, SeekFrom, StatxFlags, fcntl_setfl, fstat, fstatfs, ioctl_blksszget,
    seek, statx,
};
use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use tap_host::{Errno, FileId, OpenMode};

/// Assumed alignment for O_DIRECT if the file system does not report one.
const DIRECT_ALIGN_BYTES: u32 = 4096;
/// The alignment that we require if the file system would accept any.
const SECTOR_BYTES: u32 = 512;

/// statfs(2)'s magic numbers of file systems that live in memory.
const TMPFS: i64 = 0x0102_1994;
const RAMFS: i64 = 0x8584_58f6;

/// Magic numbers of local file systems, about whose files the kernel knows everything: ext2 to ext4, XFS, btrfs, F2FS,
/// ZFS.
const LOCAL: [i64; 5] = [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010, 0x2fc1_2fc1];

/// An open file and its properties.
pub(crate) struct Found {
    fd: OwnedFd,
    mode: OpenMode,
    block_device: bool,
    align_bytes: u32,
    zero_align_bytes: u32,
    in_memory: bool,
    remote: bool,
    id: FileId,
}

impl Found {
    pub(crate) fn into_file(self, closing: &Rc<Closing>, group: Group) -> OpenFile {
        OpenFile {
            fd: Some(Arc::new(self.fd)),
            closing: Rc::clone(closing),
            write: self.mode.write,
            direct: self.mode.direct,
            block_device: self.block_device,
            id: self.id,
            align_bytes: self.align_bytes,
            zero_align_bytes: self.zero_align_bytes,
            in_memory: self.in_memory,
            remote: self.remote,
            // O_DIRECT goes to the device, so it always waits.
            nowait: Cell::new(!self.mode.direct),
            lock: Cell::new(None),
            group,
        }
    }
}

/// Opens a regular file or a block device.
///
/// # Errors
/// As open(2); `EISDIR` for a directory, `ENOTBLK` if it is neither a file nor a block device.
pub(crate) fn open(path: &str, mode: OpenMode) -> Result<Found, Errno> {
    // Non-blocking until the kind is known, so that a FIFO does not wait for its other end.
    let mut flags = OFlags::CLOEXEC | OFlags::NONBLOCK;
    flags |= if mode.write { OFlags::RDWR } else { OFlags::RDONLY };
    if mode.direct {
        flags |= OFlags::DIRECT;
    }
    if mode.create_new {
        flags |= OFlags::CREATE | OFlags::EXCL;
    }
    let fd = rustix::fs::open(path, flags, Mode::from_raw_mode(0o644)).map_err(of_rustix)?;
    let stat = fstat(&fd).map_err(of_rustix)?;
    let block_device = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => false,
        FileType::BlockDevice => true,
        FileType::Directory => return Err(Errno::EISDIR),
        _ => return Err(Errno::ENOTBLK),
    };
    // io_uring would return EAGAIN instead of waiting.
    fcntl_setfl(&fd, flags & OFlags::DIRECT).map_err(of_rustix)?;
    let magic = fstatfs(&fd).map_err(of_rustix)?.f_type as i64;
    // The file system of a device node says nothing about the device.
    let in_memory = !block_device && (magic == TMPFS || magic == RAMFS);
    let remote = !block_device && !in_memory && !LOCAL.contains(&magic);
    let zero_align_bytes = if block_device { sector_bytes(&fd)? } else { 1 };
    let align_bytes = match (mode.direct, block_device) {
        (false, _) => 1,
        (true, true) => zero_align_bytes,
        (true, false) if in_memory => SECTOR_BYTES,
        (true, false) => direct_align_bytes(&fd),
    };
    let id = match block_device {
        // A device can have many nodes; it is identified by its number.
        true => FileId { device: stat.st_rdev, inode: 0, generation: disk_number(stat.st_rdev) },
        false => FileId { device: stat.st_dev, inode: stat.st_ino, generation: born_ns(&fd) },
    };
    Ok(Found { fd, mode, block_device, align_bytes, zero_align_bytes, in_memory, remote, id })
}

/// When a file was created, in nanoseconds: the inode number of a removed file may be reused.
fn born_ns(fd: &OwnedFd) -> u64 {
    let known = statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::BTIME).ok();
    let known = known.filter(|s| StatxFlags::from_bits_retain(s.stx_mask).contains(StatxFlags::BTIME));
    known.map_or(0, |s| {
        (s.stx_btime.tv_sec as u64).wrapping_mul(1_000_000_000) + u64::from(s.stx_btime.tv_nsec)
    })
}

/// The sequence number that Linux (5.15) gives to the medium of a drive or loop device; for a partition that of the
/// whole disk.
fn disk_number(device: u64) -> u64 {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    ["diskseq", "../diskseq"]
        .iter()
        .filter_map(|file| std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/{file}")).ok())
        .find_map(|text| text.trim().parse().ok())
        .unwrap_or(0)
}

/// Whether syncfs(2) reports writes that were given up: since Linux 5.8.
pub(crate) fn syncfs_tells() -> bool {
    let system = rustix::system::uname();
    let mut numbers = system.release().to_str().unwrap_or("").split(['.', '-']).map_while(|n| n.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (5_u32, 8_u32)
}

/// The alignment that the file system reports for O_DIRECT (STATX_DIOALIGN, Linux 6.1).
fn direct_align_bytes(fd: &OwnedFd) -> u32 {
    let known = statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
    let known = known.filter(|s| StatxFlags::from_bits_retain(s.stx_mask).contains(StatxFlags::DIOALIGN));
    let align = known.map(|s| s.stx_dio_mem_align.max(s.stx_dio_offset_align));
    // 0 means that this file does not support it; its reads and writes will fail. Buffers are aligned to 4096.
    align.filter(|a| a.is_power_of_two() && *a <= DIRECT_ALIGN_BYTES).unwrap_or(DIRECT_ALIGN_BYTES)
}

/// Bytes in a logical sector of a block device.
fn sector_bytes(fd: &OwnedFd) -> Result<u32, Errno> {
    ioctl_blksszget(fd).map_err(of_rustix)
}

/// Size in bytes; for a block device the end that lseek finds.
pub(crate) fn size_bytes(fd: &OwnedFd, block_device: bool) -> Result<u64, Errno> {
    if block_device {
        return seek(fd, SeekFrom::End(0)).map_err(of_rustix);
    }
    Ok(fstat(fd).map_err(of_rustix)?.st_size as u64)
}

/// The names in a folder, sorted.
pub(crate) fn names_in(folder: &str) -> Result<Vec<String>, Errno> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|error| errno(&error))? {
        let entry = entry.map_err(|error| errno(&error))?;
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            names.extend(entry.file_name().into_string());
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Makes the directory entry of `path` durable.
pub(crate) fn sync_parent(path: &str) -> Result<(), Errno> {
    let parent = match Path::new(path).parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match rustix::fs::open(parent, flags, Mode::empty()) {
        Ok(dir) => rustix::fs::fsync(&dir).map_err(of_rustix),
        // A folder that may be written but not read: its file system is synchronised as a whole.
        Err(rustix::io::Errno::ACCESS) => {
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = rustix::fs::open(path, flags, Mode::empty()).map_err(of_rustix)?;
            rustix::fs::syncfs(&file).map_err(of_rustix)
        }
        Err(error) => Err(of_rustix(error)),
    }
}
