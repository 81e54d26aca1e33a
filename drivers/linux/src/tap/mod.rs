//! Devices of the kernel's blktap2 module.
//!
//! ```text
//!   control node ── reserve, free ──► minor N ──► ring node    /dev/xen/blktap-2/blktapN   ring.rs
//!                                              ├► block device /dev/xen/blktap-2/tapdevN
//!                                              └► its name     /sys/class/blktap2/blktapN/name
//! ```
//!
//! The major numbers are the module's choice, and not every module or host makes the nodes: those that are missing are
//! made here. They stay when the device is freed, since another process may have reserved its number by then.

mod ioctl;
mod ring;

pub use ring::{LinuxTap, TapPage};

use crate::LinuxHost;
use crate::files::{blocking, errno, of_rustix};
use rustix::fs::{CWD, FileType, Mode, OFlags, makedev, mkdirat, mknodat, openat, stat, unlinkat};
use std::fs::{OpenOptions, read, read_dir};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use tap_abi::blktap::{AllocatedTap, IOCTL_ALLOC_TAP, IOCTL_FREE_TAP};
use tap_host::{Errno, TAP_NAME_BYTES, TapDevices};

/// Where modules and hosts have the control node.
const CONTROLS: [&str; 3] = ["/dev/xen/blktap-2/control", "/dev/blktap/control", "/dev/blktap-control"];
/// The folder of the nodes.
const FOLDER: &str = "/dev/xen/blktap-2";
/// The folder of what the module says about its devices.
const SHOWN: &str = "/sys/class/blktap2";

/// The first control node that can be opened; the error is that of one that exists, if one does.
fn control() -> Result<OwnedFd, Errno> {
    let mut error = Errno::ENOENT;
    for path in CONTROLS {
        match openat(CWD, path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
            Ok(fd) => return Ok(fd),
            Err(rustix::io::Errno::NOENT) => {}
            Err(other) => error = of_rustix(other),
        }
    }
    Err(error)
}

fn ring_path(minor: u32) -> String {
    format!("{FOLDER}/blktap{minor}")
}

fn block_path(minor: u32) -> String {
    format!("{FOLDER}/tapdev{minor}")
}

/// Makes a node, unless it is there.
fn make_node(path: &str, kind: FileType, major: u32, minor: u32) -> Result<(), Errno> {
    let device = makedev(major, minor);
    if let Ok(found) = stat(path) {
        if FileType::from_raw_mode(found.st_mode) == kind && found.st_rdev == device {
            return Ok(());
        }
        // Of a module that was loaded before, with another major number.
        match unlinkat(CWD, path, rustix::fs::AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(of_rustix(error)),
        }
    }
    match mknodat(CWD, path, kind, Mode::RUSR | Mode::WUSR, device) {
        // udev was faster.
        Err(rustix::io::Errno::EXIST) if stat(path).is_ok_and(|found| found.st_rdev == device) => Ok(()),
        made => made.map_err(of_rustix),
    }
}

fn make_nodes(tap: &AllocatedTap) -> Result<(), Errno> {
    let mode = Mode::RWXU | Mode::RGRP | Mode::XGRP | Mode::ROTH | Mode::XOTH;
    for folder in ["/dev/xen", FOLDER] {
        match mkdirat(CWD, folder, mode) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(of_rustix(error)),
        }
    }
    let minor = tap.minor.get();
    make_node(&ring_path(minor), FileType::CharacterDevice, tap.ring_major.get(), minor)?;
    make_node(&block_path(minor), FileType::BlockDevice, tap.block_major.get(), minor)
}

fn allocate() -> Result<u32, Errno> {
    let control = control()?;
    let mut bytes = [0; size_of::<AllocatedTap>()];
    // SAFETY: on the control node the module writes a structure of this size.
    unsafe { ioctl::on_bytes(&control, IOCTL_ALLOC_TAP, &mut bytes)? };
    let tap = AllocatedTap::from_bytes(&bytes);
    let minor = tap.minor.get();
    if let Err(error) = make_nodes(&tap) {
        // Nobody else knows of it yet, so that nothing keeps it from being freed.
        let _reserved_for_ever = free(minor);
        return Err(error);
    }
    Ok(minor)
}

fn free(minor: u32) -> Result<(), Errno> {
    let control = control()?;
    // SAFETY: on the control node the module takes the number of a device.
    unsafe { ioctl::on_number(&control, IOCTL_FREE_TAP, minor) }
}

fn name(minor: u32, name: &str) -> Result<(), Errno> {
    if name.len() > TAP_NAME_BYTES {
        return Err(Errno::ENAMETOOLONG);
    }
    let file = OpenOptions::new().write(true).open(format!("{SHOWN}/blktap{minor}/name"));
    // A second write would be another name.
    let written =
        file.and_then(|mut file| file.write(name.as_bytes())).map_err(|error| match errno(&error) {
            // Without sysfs nothing is known about the device.
            Errno::ENOENT if !Path::new(SHOWN).exists() => Errno::ENODEV,
            error => error,
        })?;
    if written == name.len() { Ok(()) } else { Err(Errno::EIO) }
}

fn names() -> Result<Vec<(u32, String)>, Errno> {
    let mut names = Vec::new();
    for entry in read_dir(SHOWN).map_err(|error| errno(&error))? {
        let entry = entry.map_err(|error| errno(&error))?;
        let file_name = entry.file_name();
        let minor = file_name.to_str().and_then(|name| name.strip_prefix("blktap")?.parse().ok());
        let Some(minor) = minor else { continue };
        let name = match read(entry.path().join("name")).map_err(|error| errno(&error)) {
            Ok(name) => name,
            // Freed meanwhile.
            Err(Errno::ENOENT | Errno::ENODEV) => continue,
            // Not to be skipped: it may be ours, and would count as freed.
            Err(error) => return Err(error),
        };
        // Programs name their devices as they like; what is no text is not ours.
        if let Ok(name) = String::from_utf8(name) {
            names.push((minor, name.trim_end_matches('\n').to_owned()));
        }
    }
    names.sort_unstable();
    Ok(names)
}

impl TapDevices for LinuxHost {
    type Ring = LinuxTap;

    async fn allocate_tap(&self) -> Result<u32, Errno> {
        blocking(allocate).await
    }

    async fn free_tap(&self, minor: u32) -> Result<(), Errno> {
        blocking(move || free(minor)).await
    }

    async fn name_tap(&self, minor: u32, new: &str) -> Result<(), Errno> {
        let new = new.to_owned();
        blocking(move || name(minor, &new)).await
    }

    async fn tap_names(&self) -> Result<Vec<(u32, String)>, Errno> {
        blocking(names).await
    }

    async fn open_tap(&self, minor: u32) -> Result<LinuxTap, Errno> {
        LinuxTap::open(self, &ring_path(minor))
    }

    fn tap_path(&self, minor: u32) -> String {
        block_path(minor)
    }
}
