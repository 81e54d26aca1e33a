//! What a guest was promised about space: zeros that keep it have it, zeros that give it back have given it.
//!
//! ```text
//!   a write, or zeros that keep their space, answered   ─► writing there needs no space any more
//!   zeros that give it back, begun                      ─► nothing is promised
//!   the same, answered, and nothing asked since         ─► the file has a hole there, where it can
//! ```
//!
//! Requests that overlap are carried out in the order in which they were submitted, so a promise holds when no request
//! that ends it was submitted after the one that made it.

use tap_host::SectorRange;

#[derive(Clone, Copy, Default)]
struct Sector {
    /// Writing here needs no space.
    secured: bool,
    /// The space was given back.
    given: bool,
    /// When something was submitted that may give space back.
    unmapped: u64,
    /// When anything else was submitted.
    touched: u64,
}

/// What requests do about space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wish {
    /// A write, or zeros that keep their space.
    Keep,
    /// Zeros that give it back.
    Unmap,
    /// A discard, which promises nothing.
    Discard,
}

/// The promises about each sector of a disk.
#[derive(Clone)]
pub struct Space {
    sectors: Vec<Sector>,
    clock: u64,
}

impl Space {
    /// Of a disk of which nothing is known.
    pub fn new(size_sectors: u64) -> Self {
        Self { sectors: vec![Sector::default(); size_sectors as usize], clock: 0 }
    }

    fn of(&mut self, range: SectorRange) -> &mut [Sector] {
        let start = range.start.0 as usize;
        &mut self.sectors[start..start + range.count as usize]
    }

    /// A request is submitted; gives its time.
    pub fn begin(&mut self, wish: Wish, range: SectorRange) -> u64 {
        self.clock += 1;
        let now = self.clock;
        for sector in self.of(range) {
            sector.given = false;
            match wish {
                Wish::Keep => sector.touched = now,
                Wish::Unmap | Wish::Discard => {
                    sector.secured = false;
                    sector.unmapped = now;
                }
            }
        }
        now
    }

    /// The request that was submitted at `began` was answered. One that failed may have done anything but take space
    /// from a write.
    pub fn end(&mut self, wish: Wish, is_write: bool, range: SectorRange, began: u64, ok: bool) {
        for sector in self.of(range) {
            match wish {
                Wish::Keep if ok => sector.secured |= sector.unmapped < began,
                // What fails to make zeros may leave a hole.
                Wish::Keep => sector.secured &= is_write,
                Wish::Unmap => sector.given = ok && sector.touched < began && sector.unmapped == began,
                Wish::Discard => {}
            }
        }
    }

    /// Whether a write of `range` needs no space.
    pub fn is_secured(&mut self, range: SectorRange) -> bool {
        self.of(range).iter().all(|sector| sector.secured)
    }

    /// Whether `range` was given back by one request: a file gives back whole blocks.
    pub fn is_given(&mut self, range: SectorRange) -> bool {
        let sectors = self.of(range);
        sectors.iter().all(|sector| sector.given && sector.unmapped == sectors[0].unmapped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promises_follow_the_order_of_submission() {
        let (all, half) = (SectorRange::new(0, 8), SectorRange::new(0, 4));
        let mut space = Space::new(8);
        let keep = space.begin(Wish::Keep, all);
        assert!(!space.is_secured(all), "nothing is promised before the answer");
        space.end(Wish::Keep, false, all, keep, true);
        assert!(space.is_secured(all));
        let (unmap, keep) = (space.begin(Wish::Unmap, half), space.begin(Wish::Keep, half));
        space.end(Wish::Keep, true, half, keep, true);
        space.end(Wish::Unmap, false, half, unmap, true);
        assert!(space.is_secured(all) && !space.is_given(half), "the later one holds, whoever ends first");
        let (keep, unmap) = (space.begin(Wish::Keep, half), space.begin(Wish::Unmap, half));
        space.end(Wish::Unmap, false, half, unmap, true);
        space.end(Wish::Keep, true, half, keep, true);
        assert!(space.is_given(half) && !space.is_secured(half));
        let keep = space.begin(Wish::Keep, all);
        space.end(Wish::Keep, true, all, keep, false);
        assert!(!space.is_given(half) && space.is_secured(SectorRange::new(4, 4)), "a write takes none away");
        let keep = space.begin(Wish::Keep, all);
        space.end(Wish::Keep, false, all, keep, false);
        assert!(!space.is_secured(SectorRange::new(4, 4)), "zeros that fail may");
    }
}
