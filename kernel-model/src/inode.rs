//! One file: what reads see, what is durable, and what lies between.
//!
//! ```text
//!   live     base + every write so far           (page cache, or the drive's view)
//!   pending  the writes since, page by page       each may reach the medium or not, sector by sector
//!   base     what survives a power cut
//! ```
//!
//! Size changes are entries of their own, ordered among themselves but not against data: after a power cut the file
//! may be long without its data, or may have lost data because it is short.
//!
//! Sectors that cannot be read (`bad.rs`) belong to the medium: a write mends them in what reads see at once, and in
//! what a power cut leaves once it is durable.

mod bad;

pub use bad::BadSectors;
pub(crate) use bad::sectors_below;

use crate::pages::{PAGE, Page, PageMap, recycle};
use sim::Entity;
use std::collections::BTreeSet;
use std::rc::Rc;
use tap_host::{SECTOR_BYTES, ZeroMode};

const SECTORS: usize = PAGE / SECTOR_BYTES as usize;

thread_local! {
    /// The content of a hole's page once it is recorded as pending.
    static ZERO_PAGE: Rc<Page> = Rc::new([0; PAGE]);
}

/// The sectors of a page that `len` bytes from `within` on touch, as a mask.
fn sectors_of(within: usize, len: usize) -> u8 {
    let first = within / SECTOR_BYTES as usize;
    let last = (within + len - 1) / SECTOR_BYTES as usize;
    (0xff_u8 << first) & (0xff_u8 >> (SECTORS - 1 - last))
}

/// A write to one page that is not yet known to be durable.
#[derive(Clone)]
pub struct Pending {
    /// Order of writes to this file.
    pub seq: u64,
    /// The I/O that made it.
    pub io: Entity,
    /// Page within the file.
    pub page: u64,
    /// Sectors of the page, as a mask.
    pub sectors: u8,
    /// The page right after the write; only `sectors` count.
    pub bytes: Rc<Page>,
}

/// A change of size that is not yet known to be durable.
#[derive(Clone, Copy)]
pub struct PendingSize {
    /// Order, shared with writes.
    pub seq: u64,
    /// New size in bytes.
    pub size: u64,
}

/// The content of a file.
#[derive(Clone, Default)]
pub struct Content {
    /// Bytes below the size.
    pub pages: PageMap,
    /// Size in bytes.
    pub size: u64,
    /// Pages that have space but no bytes: they read as zeros, and look like holes.
    pub reserved: Rc<BTreeSet<u64>>,
    /// Sectors that cannot be read; `pages` has their bytes all the same.
    pub bad: BadSectors,
}

impl Content {
    /// Pages that take up space.
    pub fn allocated_pages(&self) -> u64 {
        let reserved = self.reserved.iter().filter(|page| self.pages.get(**page).is_none());
        (self.pages.present().count() + reserved.count()) as u64
    }

    fn reserve(&mut self, page: u64, keep: bool) {
        if keep != self.reserved.contains(&page) {
            let reserved = Rc::make_mut(&mut self.reserved);
            if keep {
                reserved.insert(page)
            } else {
                reserved.remove(&page)
            };
        }
    }

    fn set_size(&mut self, size: u64) {
        if size < self.size {
            self.pages.truncate(size);
            self.bad.truncate(size);
            if !self.reserved.is_empty() {
                Rc::make_mut(&mut self.reserved).retain(|page| page * (PAGE as u64) < size);
            }
        }
        self.size = size;
    }
}

/// A file's bytes in all three tenses.
#[derive(Clone, Default)]
pub struct Inode {
    /// What reads see.
    pub live: Content,
    /// The minimum that a power cut leaves.
    pub base: Content,
    /// Writes in order.
    pub pending: Vec<Pending>,
    /// Size changes in order.
    pub pending_sizes: Vec<PendingSize>,
    next_seq: u64,
}

impl Inode {
    /// A durable file with this content.
    pub fn durable(content: Content) -> Self {
        Self { live: content.clone(), base: content, ..Self::default() }
    }

    /// The number of the next write; writes below it have happened.
    pub fn seq(&self) -> u64 {
        self.next_seq
    }

    /// Bytes of pending pages.
    pub fn pending_bytes(&self) -> usize {
        self.pending.len() * PAGE
    }

    /// Writes a run of bytes, growing the file.
    pub fn write(&mut self, io: Entity, offset: u64, bytes: &[u8]) {
        self.write_pieces(io, offset, bytes.len() as u64, std::iter::once(bytes));
    }

    /// Writes the first `len` bytes of `pieces`, which are one operation: it is pending once per page, however its
    /// bytes are divided into pieces.
    pub fn write_pieces<'a>(
        &mut self,
        io: Entity,
        mut offset: u64,
        len: u64,
        pieces: impl IntoIterator<Item = &'a [u8]>,
    ) {
        let (first, end) = (self.pending.len(), offset + len);
        if len > 0 && end > self.live.size {
            self.resize(end);
        }
        for piece in pieces {
            let mut bytes = &piece[..piece.len().min((end - offset) as usize)];
            while !bytes.is_empty() {
                let within = (offset % PAGE as u64) as usize;
                let n = bytes.len().min(PAGE - within);
                let page = offset / PAGE as u64;
                let mut sectors = sectors_of(within, n);
                if self.pending.len() > first && self.pending[self.pending.len() - 1].page == page {
                    sectors |= self.pending.pop().map_or(0, |before| before.sectors);
                }
                let after = Rc::clone(self.live.pages.write_in_page(page, within, &bytes[..n]));
                self.live.bad.mend(page, sectors);
                self.pending.push(Pending { seq: self.next_seq, io, page, sectors, bytes: after });
                bytes = &bytes[n..];
                offset += n as u64;
            }
        }
        self.next_seq += 1;
    }

    /// Makes a run of bytes read as zeros, as far as the file goes; whole pages become holes, or keep space without
    /// bytes.
    pub fn zero(&mut self, io: Entity, mut offset: u64, len: u64, mode: ZeroMode) {
        let end = offset.saturating_add(len).min(self.live.size);
        while offset < end {
            let (page, within) = (offset / PAGE as u64, (offset % PAGE as u64) as usize);
            let n = (end - offset).min((PAGE - within) as u64) as usize;
            // The last page becomes a hole as a whole, although the file ends within it.
            let whole = n == PAGE || within == 0 && offset + n as u64 == self.live.size;
            let after = if whole {
                self.live.pages.set(page, None);
                self.live.reserve(page, mode == ZeroMode::Keep);
                ZERO_PAGE.with(Rc::clone)
            } else {
                Rc::clone(self.live.pages.write_in_page(page, within, &[0; PAGE][..n]))
            };
            let sectors = sectors_of(within, n);
            self.live.bad.mend(page, sectors);
            self.pending.push(Pending { seq: self.next_seq, io, page, sectors, bytes: after });
            offset += n as u64;
        }
        self.next_seq += 1;
    }

    /// Drops dirty data in a range, in whole blocks of `block` bytes (a multiple of a sector, at most a page): the
    /// medium's bytes show again, if it has any.
    pub fn drop_pages(&mut self, offset: u64, len: u64, block: u64) {
        let end = offset.saturating_add(len).min(self.live.size) / block * block;
        let mut at = offset.next_multiple_of(block);
        while at < end {
            let (page, within) = (at / PAGE as u64, (at % PAGE as u64) as usize);
            let n = (end - at).min((PAGE - within) as u64) as usize;
            let gone = sectors_of(within, n);
            self.pending.iter_mut().filter(|p| p.page == page).for_each(|p| p.sectors &= !gone);
            self.live.bad.set(page, self.live.bad.of(page) & !gone | self.base.bad.of(page) & gone);
            if gone == 0xff {
                let old = self.base.pages.get(page).cloned();
                self.live.pages.set(page, old);
            } else {
                let mut old = [0; PAGE];
                self.base.pages.read(at, &mut old[..n]);
                self.live.pages.write_in_page(page, within, &old[..n]);
            }
            at += n as u64;
        }
        self.pending.retain(|p| p.sectors != 0);
    }

    /// The drive loses the ability to read `sectors` of `page`, as far as the file has them and none of that page is
    /// waiting to be written. Returns whether it did.
    pub(crate) fn spoil(&mut self, page: u64, sectors: u8) -> bool {
        let sectors = sectors & sectors_below(self.live.size, page);
        let holds = self.live.pages.get(page).is_some() && self.base.pages.get(page).is_some();
        if sectors == 0 || !holds || self.pending.iter().any(|p| p.page == page) {
            return false;
        }
        self.live.bad.set(page, self.live.bad.of(page) | sectors);
        self.base.bad.set(page, self.base.bad.of(page) | sectors);
        true
    }

    /// The run of pages from byte `offset` on that are all present or all holes: its length in bytes, and `true` for
    /// data.
    pub fn extent(&self, offset: u64) -> Option<(u64, bool)> {
        let left = self.live.size.checked_sub(offset).filter(|left| *left > 0)?;
        let page = offset / PAGE as u64;
        let last = (self.live.size - 1) / PAGE as u64;
        let data = self.live.pages.get(page).is_some();
        let end = (page + 1..=last).find(|p| self.live.pages.get(*p).is_some() != data);
        Some((end.map_or(left, |end| end * PAGE as u64 - offset), data))
    }

    /// Whether every byte of a range has its storage.
    pub fn has_space(&self, offset: u64, len: u64) -> bool {
        let end = offset.saturating_add(len);
        let pages = offset / PAGE as u64..end.div_ceil(PAGE as u64);
        end <= self.live.size
            && pages
                .into_iter()
                .all(|page| self.live.pages.get(page).is_some() || self.live.reserved.contains(&page))
    }

    /// Whether any page of a range has storage.
    pub(crate) fn has_some_space(&self, offset: u64, len: u64) -> bool {
        let mut pages = offset / PAGE as u64..offset.saturating_add(len).div_ceil(PAGE as u64);
        pages.any(|page| self.live.pages.get(page).is_some() || self.live.reserved.contains(&page))
    }

    /// Changes the size.
    pub fn resize(&mut self, size: u64) {
        self.live.set_size(size);
        self.pending_sizes.push(PendingSize { seq: self.next_seq, size });
        self.next_seq += 1;
    }

    /// Makes writes and sizes with a number below `seq` durable.
    pub fn harden(&mut self, seq: u64) {
        let split = self.pending_sizes.partition_point(|p| p.seq < seq);
        let mut sizes = self.pending_sizes.drain(..split).peekable();
        let split = self.pending.partition_point(|p| p.seq < seq);
        for p in self.pending.drain(..split) {
            // What a shorter file loses was written before it became shorter.
            while let Some(s) = sizes.next_if(|s| s.seq < p.seq) {
                self.base.set_size(s.size);
            }
            self.base.bad.mend(p.page, p.sectors);
            if p.sectors == 0xff {
                self.base.pages.set(p.page, Some(p.bytes));
            } else {
                apply(&mut self.base.pages, &p, p.sectors);
                recycle(p.bytes);
            }
        }
        sizes.for_each(|s| self.base.set_size(s.size));
        self.base.reserved = Rc::clone(&self.live.reserved);
    }

    /// Writes the oldest half of what is pending to the medium, as a kernel does when much is dirty.
    pub fn write_back_half(&mut self) {
        if let Some(p) = self.pending.get(self.pending.len() / 2) {
            let seq = p.seq;
            self.harden(seq);
        }
    }

    /// Forgets pending writes below `seq` after a failed synchronisation, keeping for each sector what `keep` says
    /// reached the medium. What reads see stays the same, unless `revert`.
    pub fn forget(&mut self, seq: u64, revert: bool, mut keep: impl FnMut(&Pending) -> u8) {
        let split = self.pending.partition_point(|p| p.seq < seq);
        let gone: Vec<Pending> = self.pending.drain(..split).collect();
        let split = self.pending_sizes.partition_point(|p| p.seq < seq);
        let mut sizes = self.pending_sizes.drain(..split).peekable();
        for p in &gone {
            while let Some(s) = sizes.next_if(|s| s.seq < p.seq) {
                self.base.set_size(s.size);
            }
            let kept = keep(p) & p.sectors;
            apply(&mut self.base.pages, p, kept);
            self.base.bad.mend(p.page, kept);
        }
        sizes.for_each(|s| self.base.set_size(s.size));
        if revert {
            for p in &gone {
                let page = self.base.pages.get(p.page).cloned();
                self.live.pages.set(p.page, page);
                self.live.bad.set(p.page, self.base.bad.of(p.page));
            }
            for p in &self.pending {
                apply(&mut self.live.pages, p, p.sectors);
                self.live.bad.mend(p.page, p.sectors);
            }
        }
    }

    /// Bytes by which the file would grow after the first `sizes_kept` size changes.
    pub fn growth(&self, sizes_kept: usize) -> u64 {
        let before = sizes_kept.checked_sub(1).map_or(self.base.size, |last| self.pending_sizes[last].size);
        self.pending_sizes.get(sizes_kept).map_or(0, |next| next.size.saturating_sub(before))
    }

    /// What the medium holds after a power cut: the base, of each pending write the sectors that `keep` says, the first
    /// `sizes_kept` size changes, and `partly` bytes of the next growth: the blocks of one write may be added one by
    /// one.
    pub fn after_power_cut(
        &self,
        sizes_kept: usize,
        partly: u64,
        mut keep: impl FnMut(usize, &Pending) -> u8,
    ) -> Content {
        let mut content = self.base.clone();
        let mut sizes = self.pending_sizes[..sizes_kept.min(self.pending_sizes.len())].iter().peekable();
        for (i, p) in self.pending.iter().enumerate() {
            while let Some(s) = sizes.next_if(|s| s.seq < p.seq) {
                content.set_size(s.size);
            }
            let kept = keep(i, p) & p.sectors;
            if kept != 0 {
                apply(&mut content.pages, p, kept);
                content.bad.mend(p.page, kept);
            }
        }
        sizes.for_each(|s| content.set_size(s.size));
        content.size += partly;
        // Data beyond the size does not exist.
        content.pages.truncate(content.size);
        content.bad.truncate(content.size);
        content
    }
}

/// Copies the sectors of `mask` out of a pending write.
pub fn apply(pages: &mut PageMap, p: &Pending, mask: u8) {
    if mask == 0xff {
        pages.set(p.page, Some(Rc::clone(&p.bytes)));
        return;
    }
    let mut bit = 0;
    while bit < SECTORS {
        if mask & 1 << bit == 0 {
            bit += 1;
            continue;
        }
        let first = bit;
        while bit < SECTORS && mask & 1 << bit != 0 {
            bit += 1;
        }
        let (from, to) = (first * SECTOR_BYTES as usize, bit * SECTOR_BYTES as usize);
        pages.write_in_page(p.page, from, &p.bytes[from..to]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(content: &Content) -> Vec<u8> {
        let mut out = vec![0; content.size as usize];
        content.pages.read(0, &mut out);
        out
    }

    #[test]
    fn a_power_cut_takes_what_was_not_hardened() {
        let mut file = Inode::default();
        file.write(Entity(1), 0, &[1; 1024]);
        file.harden(file.seq());
        file.write(Entity(2), 512, &[2; 1024]);
        assert_eq!(bytes(&file.live), [vec![1; 512], vec![2; 1024]].concat());
        let nothing = file.after_power_cut(0, 0, |_, _| 0);
        assert_eq!(bytes(&nothing), vec![1; 1024]);
        let torn = file.after_power_cut(1, 0, |_, _| 0b100);
        assert_eq!(bytes(&torn), [vec![1; 1024], vec![2; 512]].concat());
        let long_without_data = file.after_power_cut(1, 0, |_, _| 0);
        assert_eq!(bytes(&long_without_data), [vec![1; 1024], vec![0; 512]].concat());
        let short_with_data = file.after_power_cut(0, 0, |_, _| 0xff);
        assert_eq!(bytes(&short_with_data), [vec![1; 512], vec![2; 512]].concat());
    }

    #[test]
    fn a_shorter_file_loses_what_was_written_before_and_not_after() {
        let old = Content { size: 3 * PAGE as u64, ..Content::default() };
        let mut file = Inode::durable(old);
        file.write(Entity(1), 0, &[1; 2 * PAGE]);
        file.resize(0);
        file.resize(PAGE as u64);
        file.write(Entity(2), 0, &[2; 512]);
        let now = [vec![2; 512], vec![0; PAGE - 512]].concat();
        assert_eq!(bytes(&file.live), now);
        assert_eq!(bytes(&file.after_power_cut(2, 0, |_, p| p.sectors)), now, "all of it is kept");
        let longer = bytes(&file.after_power_cut(0, 0, |_, p| p.sectors));
        assert_eq!([longer[0], longer[512], longer[PAGE], longer[2 * PAGE]], [2, 1, 1, 0], "no size is kept");
        let mut failed = file.clone();
        failed.forget(failed.seq(), false, |p| p.sectors);
        file.harden(file.seq());
        assert_eq!((bytes(&file.base), bytes(&failed.base)), (now.clone(), now));
    }

    #[test]
    fn the_pieces_of_one_write_are_pending_once_per_page() {
        let (mut one, mut cut) = (Inode::default(), Inode::default());
        let bytes: Vec<u8> = (0..3 * PAGE).map(|i| (i % 251) as u8).collect();
        one.write(Entity(1), 512, &bytes[..2 * PAGE]);
        cut.write_pieces(Entity(1), 512, 2 * PAGE as u64, [&bytes[..100], &bytes[100..1024], &bytes[1024..]]);
        let what =
            |file: &Inode| -> Vec<(u64, u8)> { file.pending.iter().map(|p| (p.page, p.sectors)).collect() };
        assert_eq!(what(&cut), [(0, 0xfe), (1, 0xff), (2, 1)]);
        assert_eq!((what(&cut), cut.pending_sizes.len()), (what(&one), 1));
        assert_eq!(self::bytes(&cut.after_power_cut(1, 0, |_, p| p.sectors)), self::bytes(&one.live));
    }

    #[test]
    fn zeros_are_holes_that_a_power_cut_may_take() {
        let mut file = Inode::default();
        file.write(Entity(1), 0, &[1; 3 * PAGE]);
        file.harden(file.seq());
        file.zero(Entity(2), 512, 2 * PAGE as u64, ZeroMode::Unmap);
        assert_eq!((file.extent(0), file.extent(PAGE as u64)), (Some((4096, true)), Some((4096, false))));
        assert_eq!(file.live.size, 3 * PAGE as u64);
        let now = bytes(&file.live);
        assert_eq!([now[511], now[512], now[2 * PAGE + 511], now[2 * PAGE + 512]], [1, 0, 0, 1]);
        assert!(bytes(&file.after_power_cut(0, 0, |_, _| 0)).iter().all(|b| *b == 1));
        let torn = bytes(&file.after_power_cut(0, 0, |_, p| if p.page == 1 { 1 } else { 0 }));
        assert_eq!([torn[512], torn[PAGE], torn[PAGE + 512]], [1, 0, 1]);
        file.harden(file.seq());
        assert_eq!(bytes(&file.base), now);
        file.zero(Entity(3), 1 << 40, 10, ZeroMode::Keep);
        assert!(file.pending.is_empty() && file.extent(3 * PAGE as u64).is_none());
    }

    #[test]
    fn zeros_that_keep_their_space_have_it() {
        let mut file = Inode::default();
        file.resize(4 * PAGE as u64);
        assert!(!file.has_space(0, 1));
        file.zero(Entity(1), 0, 3 * PAGE as u64, ZeroMode::Keep);
        assert!(file.has_space(0, 3 * PAGE as u64) && !file.has_space(0, 4 * PAGE as u64));
        assert_eq!((file.extent(0), file.live.allocated_pages()), (Some((4 * PAGE as u64, false)), 3));
        file.zero(Entity(2), PAGE as u64, PAGE as u64, ZeroMode::Unmap);
        assert!(!file.has_space(PAGE as u64, 1) && file.has_space(0, 1));
        file.write(Entity(3), 0, &[1]);
        assert_eq!(file.live.allocated_pages(), 2);
        file.resize(PAGE as u64);
        assert_eq!(file.live.allocated_pages(), 1);
    }

    #[test]
    fn dropped_pages_show_what_the_medium_has() {
        let mut file = Inode::default();
        file.write(Entity(1), 0, &[1; 2 * PAGE]);
        file.harden(file.seq());
        file.write(Entity(2), 0, &[2; 4 * PAGE]);
        file.drop_pages(512, 3 * PAGE as u64, PAGE as u64);
        let now = bytes(&file.live);
        assert_eq!([now[PAGE - 1], now[PAGE], now[2 * PAGE], now[3 * PAGE]], [2, 1, 0, 2]);
        file.harden(file.seq());
        assert_eq!(bytes(&file.base), now, "what was dropped never reaches the medium");
        file.write(Entity(3), 0, &[3; PAGE]);
        file.drop_pages(100, 1500, 512);
        let now = bytes(&file.live);
        assert_eq!([now[511], now[512], now[1535], now[1536]], [3, 2, 2, 3], "whole sectors, of a device");
        file.harden(file.seq());
        assert_eq!(bytes(&file.base), now);
    }

    #[test]
    fn a_failed_sync_forgets_and_may_revert() {
        let mut file = Inode::default();
        file.write(Entity(1), 0, &[1; 512]);
        file.harden(file.seq());
        let mut linux = file.clone();
        linux.write(Entity(2), 0, &[2; 512]);
        let mut btrfs = linux.clone();
        linux.forget(linux.seq(), false, |_| 0);
        assert_eq!((bytes(&linux.live)[0], bytes(&linux.base)[0], linux.pending.len()), (2, 1, 0));
        btrfs.forget(btrfs.seq(), true, |_| 0);
        assert_eq!((bytes(&btrfs.live)[0], bytes(&btrfs.base)[0]), (1, 1));
    }
}
