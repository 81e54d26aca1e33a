//! What a new process must know to take up the block device of a dead one: a page that outlives both.
//!
//! ```text
//!   0   magic, version, state        u32 each
//!   16  boot id                      16 bytes
//!   32  identity of the disk         4 u64, little-endian
//!   64  token                        16 bytes; the device's identifier in the kernel
//! ```
//!
//! There is one for each disk that is attached, named after the disk's identity, and owned by the process that serves
//! it. It is complete before the device is attached, and the kernel's device is the truth about everything else: a
//! record without a device is of one that was never attached or is gone. So a process may die between any two steps.
//!
//! Whoever takes the device away owns a second page meanwhile, `NAME.leaving`. With a dead owner it means nothing: the
//! device stays.

use crate::disk::DiskHost;
use crate::spec::DiskSpec;
use std::cell::Cell;
use tap_host::{Entropy, Errno, File, Files, OpenMode, Patience, SharedPage, SharedPages, Time};
use tap_images::{ImageFormat, ImageSpec};

tap_host::listed! {
    pub(super) BUGS: Bug;
    DEAD_DETACH_BELIEVED = "dead-detach-believed",
        "a block device that a killed tapdisk detach was about to take away is taken for gone when its stream breaks";
}

const MAGIC: u32 = 0x4442_4e54;
const VERSION: u32 = 1;
const MAGIC_AT: usize = 0;
const VERSION_AT: usize = 4;
const STATE_AT: usize = 8;
const BOOT_AT: usize = 16;
const IDENTITY_AT: usize = 32;
const TOKEN_AT: usize = 64;
/// The page holds nothing.
const EMPTY: u32 = 0;
/// There is or will be a device.
const USED: u32 = 1;

/// Prefix of the names of records.
const RECORDS: &str = "nbd-";
/// Continues the name of a record: who owns that page is taking the device away.
const LEAVING: &str = ".leaving";
/// Prefix of the identifiers of our devices.
pub(super) const OURS: &str = "tapdisk-";
/// How long to wait for a record that another process has, in nanoseconds: a killed one may be about to release it.
const OWNER_PATIENCE_NS: u64 = 2_000_000_000;

/// Which disk it is, whatever its name: the same as long as its file exists.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Identity([u64; 4]);

fn hash(text: &str, seed: u64) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325 ^ seed, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

impl Identity {
    /// That of the disk called `spec`.
    ///
    /// # Errors
    /// Of looking at its file.
    pub(super) async fn of<H: Files>(host: &H, spec: &DiskSpec) -> Result<Self, Errno> {
        match spec {
            DiskSpec::Image(ImageSpec { path, format }) => {
                let id = host.open(path, OpenMode::READ).await?.info().await?.id;
                // The same bytes in another format are another disk.
                let format = match format {
                    ImageFormat::As(format) => format.name(),
                    ImageFormat::Probe => "",
                };
                Ok(Self([hash(format, 0), id.device, id.inode, id.generation]))
            }
            DiskSpec::Mason { path, disk } => {
                let id = host.open(path, OpenMode::READ).await?.info().await?.id;
                let which = hash(disk.as_deref().unwrap_or_default(), hash("mason", 0));
                Ok(Self([which, id.device, id.inode, id.generation]))
            }
            DiskSpec::Nbd { .. } => {
                let text = spec.to_string();
                Ok(Self([hash("nbd", 0), hash(&text, 1), hash(&text, 2), text.len() as u64]))
            }
        }
    }

    fn bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for (to, word) in bytes.chunks_exact_mut(8).zip(self.0) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The name of its record; another disk may have the same.
    fn name(self) -> String {
        let folded = self.0.into_iter().fold(0, |all, word| hash(&format!("{word:x}"), all));
        format!("{RECORDS}{folded:016x}")
    }
}

/// The identifier of a device with this token.
pub(super) fn identifier(token: [u8; 16]) -> String {
    format!("{OURS}{:032x}", u128::from_be_bytes(token))
}

/// Owns the page `name`.
///
/// # Errors
/// `EBUSY` if another process has it for longer than a killed one may; those of the folder.
async fn own<H: SharedPages + Time>(host: &H, name: &str) -> Result<H::Region, Errno> {
    let until_ns = host.now_ns().saturating_add(OWNER_PATIENCE_NS);
    let mut patience = Patience::until();
    loop {
        match host.own_region(name) {
            Err(Errno::EBUSY) if patience.again_before(host, until_ns).await => {}
            page => return page,
        }
    }
}

/// The record of a disk, which is ours until this is dropped.
pub(super) struct Record<H: SharedPages> {
    host: H,
    name: String,
    page: H::Region,
    boot: [u8; 16],
    identity: Identity,
    /// We are taking the device away.
    leaves: Cell<bool>,
}

impl<H: DiskHost + Entropy> Record<H> {
    /// Takes the record of the disk `identity`.
    ///
    /// # Errors
    /// `EBUSY` while another process has it; those of the folder.
    pub(super) async fn take(host: &H, identity: Identity) -> Result<Self, Errno> {
        let (name, boot) = (identity.name(), host.boot_id()?);
        let page = own(host, &name).await?;
        Ok(Self { host: host.clone(), name, page, boot, identity, leaves: Cell::new(false) })
    }

    /// The identifier of the device that an earlier process has attached, or was about to attach.
    pub(super) fn earlier(&self) -> Option<String> {
        let mut identity = [0; 32];
        self.page.copy_in(IDENTITY_AT, &mut identity);
        let (boot, identifier) = read(&self.page)?;
        (boot == self.boot && identity == self.identity.bytes()).then_some(identifier)
    }

    /// A token for a new device.
    pub(super) fn token(&self) -> [u8; 16] {
        let mut token = [0; 16];
        self.host.fill(&mut token);
        token
    }

    /// Notes that the device with this token will be attached.
    pub(super) fn begin(&self, token: [u8; 16]) {
        self.page.store_u32(STATE_AT, EMPTY);
        self.page.copy_out(BOOT_AT, &self.boot);
        self.page.copy_out(IDENTITY_AT, &self.identity.bytes());
        self.page.copy_out(TOKEN_AT, &token);
        self.page.store_u32(VERSION_AT, VERSION);
        self.page.store_u32(MAGIC_AT, MAGIC);
        self.page.store_u32(STATE_AT, USED);
    }

    /// Notes that there is no device: attaching one has failed.
    pub(super) fn clear(&self) {
        self.page.store_u32(STATE_AT, EMPTY);
    }

    /// Notes whether we are taking the device away.
    pub(super) fn set_leaves(&self, leaves: bool) {
        self.leaves.set(leaves);
    }

    /// Whether someone is taking the device away: we, or another process that lives.
    pub(super) fn is_leaving(&self) -> bool {
        self.leaves.get() || self.is_taken()
    }

    /// Whether another process is taking the device away; forgets one that has died over it.
    fn is_taken(&self) -> bool {
        let name = format!("{}{LEAVING}", self.name);
        // Owning would make the page.
        if !self.host.region_names().is_ok_and(|names| names.contains(&name)) {
            return false;
        }
        if self.host.bug(&DEAD_DETACH_BELIEVED) {
            return true;
        }
        match self.host.own_region(&name) {
            Ok(_dead) => {
                self.host.remove_region(&name);
                false
            }
            Err(error) => error == Errno::EBUSY,
        }
    }

    /// Removes the record unless an earlier process has left one: no device was attached since.
    pub(super) fn give_up(self) {
        if self.earlier().is_none() {
            self.remove();
        }
    }

    /// Removes the record of a device that is gone or never came.
    pub(super) fn remove(self) {
        // Whoever took it away may have died over it.
        self.host.remove_region(&format!("{}{LEAVING}", self.name));
        self.host.remove_region(&self.name);
    }
}

/// The boot and the identifier in a record, if it is one.
fn read<P: SharedPage>(page: &P) -> Option<([u8; 16], String)> {
    let head = [MAGIC_AT, VERSION_AT].map(|at| page.load_u32(at));
    if head != [MAGIC, VERSION] || page.load_u32(STATE_AT) == EMPTY {
        return None;
    }
    let (mut boot, mut token) = ([0; 16], [0; 16]);
    page.copy_in(BOOT_AT, &mut boot);
    page.copy_in(TOKEN_AT, &mut token);
    Some((boot, identifier(token)))
}

/// The record of another process for a device, as seen by whoever takes the device away.
pub(super) struct Other<H: SharedPages> {
    host: H,
    name: String,
}

impl<H: SharedPages + Time> Other<H> {
    /// Finds the record of the device called `identifier`.
    pub(super) fn of(host: &H, identifier: &str) -> Option<Self> {
        let names = host.region_names().ok()?;
        names.into_iter().filter(|name| name.starts_with(RECORDS)).find_map(|name| {
            let page = host.region(&name).ok()?;
            let found = read(&page)?.1 == identifier;
            found.then(|| Self { host: host.clone(), name })
        })
    }

    /// Tells the process that serves the device, if there is one, that it is being taken away, for as long as we live
    /// and what is returned is not dropped.
    ///
    /// # Errors
    /// `EBUSY` if another process does the same; those of the folder.
    pub(super) async fn leaves(&self) -> Result<Leaving<H>, Errno> {
        let name = format!("{}{LEAVING}", self.name);
        let page = own(&self.host, &name).await?;
        Ok(Leaving { host: self.host.clone(), name, _page: page })
    }

    /// The device is gone: removes the record, unless a process that serves the device will do that.
    pub(super) fn remove(self) {
        if let Ok(owned) = self.host.own_region(&self.name) {
            self.host.remove_region(&self.name);
            drop(owned);
        }
    }
}

/// Says that a device is being taken away, until it is dropped or its process dies.
pub(super) struct Leaving<H: SharedPages> {
    host: H,
    name: String,
    _page: H::Region,
}

impl<H: SharedPages> Drop for Leaving<H> {
    fn drop(&mut self) {
        self.host.remove_region(&self.name);
    }
}
