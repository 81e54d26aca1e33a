//! Latent sector errors: places of a medium that cannot be read until they are written.
//!
//! ```text
//!   first operation on a page ──"after" more operations──► its sectors cannot be read ──written──► mended for good
//!                                                           (not while the page waits to be written)
//! ```
//!
//! Whether a place is bad is one decision for each page of a file and boot, keyed by the place: whoever reads it, and
//! however often, gets the same. What an operation on a bad place does is what Linux does:
//!
//! - A buffered read works in pages. It returns what lies before the first page with a bad sector, or fails.
//! - A direct read works in blocks of the drive. It fails as a whole; of some places it returns what lies before.
//! - A buffered write of a part of a page reads the page first. It stores what lies before that page, or fails. So do
//!   zeros and holes in a file, which fail as a whole.
//! - A write of whole pages, and a direct write of whole blocks, mends what it covers: reads see that at once, and a
//!   power cut once it is durable. So do zeros of a device, and a size below the place.
//! - Synchronisations do not read.
//!
//! Bytes are not lost by this: once faults stop, every sector can be read again. A sector that a power cut tears is not
//! made bad by it: it is old or new, as the rules of power cuts say.

use super::{FileState, Inner, Running, Storage};
use crate::faults::{BAD_SECTORS, Fault, IoOp};
use crate::inode::{BadSectors, Inode};
use crate::pages::PAGE;
use sim::Draw;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use tap_host::SECTOR_BYTES;

/// What was decided about the pages of a file that were used in this boot.
#[derive(Default)]
pub(super) struct Places(RefCell<BTreeMap<u64, Place>>);

#[derive(Clone, Copy)]
struct Place {
    /// The sectors that become bad, as a mask; none of a page that stays good, or whose time has come.
    sectors: u8,
    /// How many operations the storage has had by then.
    due: u64,
    /// Direct reads are short before it.
    is_short: bool,
}

impl Place {
    /// The place of a [`BAD_SECTORS`] value that is drawn when the storage has had `ops` operations.
    fn decode(value: u64, ops: u64) -> Self {
        Self { sectors: value as u8, is_short: value & 0x100 != 0, due: ops + (value >> 9 & 0x7fff) }
    }

    /// The value of the [`BAD_SECTORS`] decision for a page that has some: one sector, a few, or all; from now on, or
    /// later.
    fn draw(d: &mut Draw) -> u64 {
        let sectors = match d.below(3) {
            0 => 1 << d.below(8),
            1 => (0xff >> d.below(8)) << d.below(4) & 0xff,
            _ => 0xff,
        };
        let after = if d.below(2) == 0 { 0 } else { d.magnitude(10) };
        sectors | d.below(2) << 8 | after << 9
    }
}

impl Storage {
    /// The sectors of a file that cannot be read now; none once faults have stopped.
    pub fn bad_sectors(&self, name: &str) -> BadSectors {
        let files = self.0.files.borrow();
        let file = files.get(name).filter(|_| self.0.has_bad_sectors());
        file.map_or_else(BadSectors::default, |file| file.inode.borrow().live.bad.clone())
    }
}

/// Sectors that became unreadable: the name of the file, the page, and the sectors as a mask.
pub type Spoilt = (String, u64, u8);

impl Storage {
    /// Calls `look` with all sectors that have become unreadable since the beginning, in that order.
    pub fn spoilt<R>(&self, look: impl FnOnce(&[Spoilt]) -> R) -> R {
        look(&self.0.spoilt.borrow())
    }
}

impl Inner {
    /// Whether there may be bad sectors.
    fn has_bad_sectors(&self) -> bool {
        self.plan().bad_sectors
            && !self.calm.get()
            && !self.stopped.get()
            && !self.sim.have_faults_stopped()
            && (self.rates.bad_sectors > 0 || self.sim.has_given_decisions())
    }

    /// How much of an operation on `landed` bytes happens; `None` if it fails because of bad sectors.
    pub(super) fn up_to_bad(&self, running: &Running, landed: usize) -> Option<usize> {
        if landed == 0 || running.op == IoOp::Sync || !self.has_bad_sectors() {
            return Some(landed);
        }
        let file = &running.open.file;
        let range = running.offset..running.offset + landed as u64;
        self.age(file, &range);
        let inode = file.inode.borrow();
        if inode.live.bad.is_empty() {
            return Some(landed);
        }
        let bad = self.first_bad(running, &inode, &range)?;
        let good = (bad.saturating_sub(range.start) as usize).min(landed);
        // A part of a page is not stored on its own: a short write that ends within a bad page still stores it.
        let short = matches!(running.fault, Fault::Short(_)) && running.op == IoOp::Write;
        let whole = PAGE.min(running.len as usize);
        if good == 0 && short && whole == PAGE && range.start.is_multiple_of(PAGE as u64) {
            return Some(whole);
        }
        (good > 0).then_some(good)
    }

    /// Where the first byte is that the operation cannot reach; `None` if it fails as a whole.
    fn first_bad(&self, running: &Running, inode: &Inode, range: &Range<u64>) -> Option<u64> {
        let (page_bytes, device, direct) = (PAGE as u64, running.open.file.device.get(), running.open.direct);
        let end = range.end.min(inode.live.size.next_multiple_of(page_bytes));
        let is_part = |page: u64| page * page_bytes < range.start || (page + 1) * page_bytes > range.end;
        for page in range.start / page_bytes..end.div_ceil(page_bytes) {
            let sectors = inode.live.bad.of(page);
            if sectors == 0 {
                continue;
            }
            let start = (page * page_bytes).max(range.start);
            match running.op {
                IoOp::Read if direct => {
                    let block = u64::from(self.direct_align());
                    let bad = bad_block(page, sectors, block, range);
                    let Some(bad) = bad else { continue };
                    let is_short = running.open.file.places.0.borrow().get(&page).is_some_and(|p| p.is_short);
                    return is_short.then_some(bad);
                }
                IoOp::Read => return Some(start),
                IoOp::Write if !direct && is_part(page) => return Some(start),
                IoOp::Zero(_) if !device && is_part(page) && range.end < inode.live.size => return None,
                IoOp::Zero(_) if !device && page * page_bytes < range.start => return None,
                IoOp::Write | IoOp::Zero(_) | IoOp::Sync => {}
            }
        }
        Some(u64::MAX)
    }

    /// Decides about the pages of `range` that are used for the first time, and spoils those whose time has come.
    fn age(&self, file: &FileState, range: &Range<u64>) {
        let mut inode = file.inode.borrow_mut();
        let end = range.end.min(inode.live.size);
        for page in range.start / PAGE as u64..end.div_ceil(PAGE as u64) {
            let mut places = file.places.0.borrow_mut();
            let place = places.entry(page).or_insert_with(|| self.decide_place(file, page));
            if place.sectors != 0 && place.due <= self.ops.get() && inode.spoil(page, place.sectors) {
                let (sectors, name) = (place.sectors, &file.name);
                place.sectors = 0;
                self.spoilt.borrow_mut().push((name.clone(), page, sectors));
                self.sim.remark("drive", || {
                    format!(
                        "sectors {sectors:#04x} (mask) of page {page} of {name} cannot be read from now on"
                    )
                });
            }
        }
    }

    fn decide_place(&self, file: &FileState, page: u64) -> Place {
        let entity = file.entity.child("place", page);
        self.sim.name_entity(entity, || format!("page {page} of {}", file.name));
        let rate = self.rates.bad_sectors;
        let value = self.sim.nth_fault(entity, &BAD_SECTORS, self.power_cuts.get(), rate, Place::draw);
        Place::decode(value, self.ops.get())
    }
}

/// The first block of `block` bytes within `range` that has one of the bad `sectors` of `page`.
fn bad_block(page: u64, sectors: u8, block: u64, range: &Range<u64>) -> Option<u64> {
    let bad = (0..8).filter(|i| sectors & 1 << i != 0).map(|i| page * PAGE as u64 + i * SECTOR_BYTES);
    bad.map(|at| at / block * block).find(|at| *at + block > range.start && *at < range.end)
}
