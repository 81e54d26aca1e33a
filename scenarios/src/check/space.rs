//! What a guest was promised about space: zeros that keep it have it, zeros that release it have released it.
//!
//! ```text
//!   a write, or zeros that keep their space, answered   ─► writing there needs no more space
//!   zeros that release it, begun                        ─► nothing is promised
//!   the same, answered, nothing submitted since         ─► the file has a hole there, where it can
//! ```
//!
//! Overlapping requests run in the order of their submission, so a promise holds until a request that ends it is
//! submitted after the one that made it.

use tap_host::SectorRange;

#[derive(Clone, Copy, Default)]
struct Sector {
    /// Writing here needs no space.
    secured: bool,
    /// The space was released.
    given: bool,
    /// Time of the last submission that may release space.
    unmapped: u64,
    /// Time of the last submission of any other kind.
    touched: u64,
}

/// The effect of a request on space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SpaceEffect {
    /// A write, or zeros that keep their space.
    Keep,
    /// Zeros that release it.
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
    /// A disk about which nothing is known.
    pub fn new(size_sectors: u64) -> Self {
        Self { sectors: vec![Sector::default(); size_sectors as usize], clock: 0 }
    }

    fn of(&mut self, range: SectorRange) -> &mut [Sector] {
        let start = range.start.0 as usize;
        &mut self.sectors[start..start + range.count as usize]
    }

    /// A request is submitted. Returns its time.
    pub fn begin(&mut self, effect: SpaceEffect, range: SectorRange) -> u64 {
        self.clock += 1;
        let now = self.clock;
        for sector in self.of(range) {
            sector.given = false;
            match effect {
                SpaceEffect::Keep => sector.touched = now,
                SpaceEffect::Unmap | SpaceEffect::Discard => {
                    sector.secured = false;
                    sector.unmapped = now;
                }
            }
        }
        now
    }

    /// The request submitted at `began` was answered. One that failed may have had any effect, except that a failed
    /// write releases no space.
    pub fn end(&mut self, effect: SpaceEffect, is_write: bool, range: SectorRange, began: u64, ok: bool) {
        for sector in self.of(range) {
            match effect {
                SpaceEffect::Keep if ok => sector.secured |= sector.unmapped < began,
                // A failed request for zeros may leave a hole.
                SpaceEffect::Keep => sector.secured &= is_write,
                SpaceEffect::Unmap => sector.given = ok && sector.touched < began && sector.unmapped == began,
                SpaceEffect::Discard => {}
            }
        }
    }

    /// Whether a write of `range` needs no space.
    pub fn is_secured(&mut self, range: SectorRange) -> bool {
        self.of(range).iter().all(|sector| sector.secured)
    }

    /// Whether one request released all of `range`: a file releases whole blocks.
    pub fn is_released(&mut self, range: SectorRange) -> bool {
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
        let keep = space.begin(SpaceEffect::Keep, all);
        assert!(!space.is_secured(all), "nothing is promised before the answer");
        space.end(SpaceEffect::Keep, false, all, keep, true);
        assert!(space.is_secured(all));
        let (unmap, keep) = (space.begin(SpaceEffect::Unmap, half), space.begin(SpaceEffect::Keep, half));
        space.end(SpaceEffect::Keep, true, half, keep, true);
        space.end(SpaceEffect::Unmap, false, half, unmap, true);
        assert!(
            space.is_secured(all) && !space.is_released(half),
            "the later one counts, whichever ends first"
        );
        let (keep, unmap) = (space.begin(SpaceEffect::Keep, half), space.begin(SpaceEffect::Unmap, half));
        space.end(SpaceEffect::Unmap, false, half, unmap, true);
        space.end(SpaceEffect::Keep, true, half, keep, true);
        assert!(space.is_released(half) && !space.is_secured(half));
        let keep = space.begin(SpaceEffect::Keep, all);
        space.end(SpaceEffect::Keep, true, all, keep, false);
        assert!(
            !space.is_released(half) && space.is_secured(SectorRange::new(4, 4)),
            "a write releases none"
        );
        let keep = space.begin(SpaceEffect::Keep, all);
        space.end(SpaceEffect::Keep, false, all, keep, false);
        assert!(!space.is_secured(SectorRange::new(4, 4)), "failed zeros may");
    }
}
