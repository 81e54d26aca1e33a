//! Data and holes of a file.
//!
//! Each boundary costs one lseek, and a call reports many of them: going to another thread and back costs more than
//! dozens of them. FIEMAP would report many at once, but not what is only in the page cache, unless it writes that back
//! first.

use super::{of_rustix, open};
use rustix::fs::{SeekFrom, seek};
use std::os::fd::OwnedFd;
use tap_host::{Errno, FileExtent};

/// Data that one call passes over, in bytes, if that is more than one run: on file systems in memory the kernel looks
/// at each page of it.
const DATA_BYTES_MAX: u64 = 1 << 30;
/// Most runs of one call.
const RUNS_MAX: usize = 4096;

/// What begins at an offset.
enum Run {
    /// Data or a hole up to the offset.
    To(u64, bool),
    /// A hole up to the end of the file.
    HoleToEnd,
    /// Data up to the end of the file.
    DataToEnd,
}

/// The first runs from byte `offset` on, at most `max`.
pub(super) fn look(
    fd: &OwnedFd,
    block_device: bool,
    offset: u64,
    max: usize,
) -> Result<Vec<FileExtent>, Errno> {
    let size = open::size_bytes(fd, block_device)?;
    let (mut at, mut found, mut data_bytes) = (offset, Vec::new(), 0);
    let mut data = None;
    while at < size && found.len() < max.clamp(1, RUNS_MAX) && data_bytes < DATA_BYTES_MAX {
        let (end, is_data) = match run(fd, at, data) {
            Ok(Run::To(end, is_data)) => (end.min(size), is_data),
            Ok(Run::HoleToEnd) => (size, false),
            Ok(Run::DataToEnd) => (size, true),
            // What was found before is true; the next call meets the error first.
            Err(_) if !found.is_empty() => break,
            Err(error) => return Err(error),
        };
        found.push(FileExtent { len_bytes: end - at, data: is_data });
        data_bytes += if is_data { end - at } else { 0 };
        // After a hole comes data, and the other way round, unless the file changes.
        (at, data) = (end, Some(!is_data));
    }
    Ok(found)
}

/// The run that begins at `at`, which probably is data if `data` says so.
fn run(fd: &OwnedFd, at: u64, data: Option<bool>) -> Result<Run, Errno> {
    if data == Some(true)
        && let Ok(hole) = seek(fd, SeekFrom::Hole(at))
        && hole > at
    {
        return Ok(Run::To(hole, true));
    }
    let data = match seek(fd, SeekFrom::Data(at)).map_err(of_rustix) {
        Ok(data) => data,
        Err(Errno(libc::ENXIO)) => return Ok(Run::HoleToEnd),
        // The file system does not know its holes.
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(Run::DataToEnd),
        Err(error) => return Err(error),
    };
    if data > at {
        return Ok(Run::To(data, false));
    }
    match seek(fd, SeekFrom::Hole(at)).map_err(of_rustix) {
        Ok(hole) if hole > at => Ok(Run::To(hole, true)),
        // The file changed between the two calls: there may be data.
        Ok(_) | Err(Errno(libc::ENXIO)) => Ok(Run::To(at + 1, true)),
        Err(error) => Err(error),
    }
}
