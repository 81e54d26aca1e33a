//! What guests write: sectors that identify their writer.
//!
//! The first 32 bytes of a sector are a tag (guest, write, place, check word); the rest is zero, or in one seed of
//! eight pseudo-random bytes derived from the tag. A sector therefore identifies its version without any search, and a
//! foreign, misplaced or torn one is recognised.

use crate::check::oracle::{Oracle, is_broken};
use sim::{mix, mix2};
use tap_host::SECTOR_BYTES;

const MAGIC: u32 = 0x5441_5053;
const TAG_BYTES: usize = 32;

/// The writer of a sector, and where it belongs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Tag {
    /// The writer: a guest, or a layer of an image made before the run.
    pub writer: u32,
    /// The writer's number of the write.
    pub op: u64,
    /// The sector it was written to.
    pub sector: u64,
}

/// The content of a sector.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// Zeros.
    Zero,
    /// A complete tagged sector.
    Tag(Tag),
    /// A tag with a body that does not match.
    Torn(Tag),
    /// Anything else.
    Foreign,
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Found::Zero => f.write_str("zeros"),
            Found::Tag(t) => write!(f, "write {} of writer {} to sector {}", t.op, t.writer, t.sector),
            Found::Torn(t) => write!(f, "a torn mix with write {} to sector {}", t.op, t.sector),
            Found::Foreign => f.write_str("bytes that were never written there"),
        }
    }
}

impl Tag {
    fn check(self, full: bool) -> u64 {
        mix2(mix2(self.op ^ u64::from(self.writer) << 40, self.sector), 0x6368_6562 | u64::from(full))
    }

    /// Fills one sector (512 bytes). `full` fills its body, too.
    pub fn fill(self, sector: &mut [u8], full: bool) {
        let check = self.check(full);
        let (tag, body) = sector.split_at_mut(TAG_BYTES);
        let head = u64::from(MAGIC) | u64::from(self.writer) << 32;
        for (place, word) in tag.as_chunks_mut().0.iter_mut().zip([head, self.op, self.sector, check]) {
            *place = word.to_le_bytes();
        }
        if full {
            for (i, place) in body.as_chunks_mut().0.iter_mut().enumerate() {
                *place = mix(check ^ i as u64).to_le_bytes();
            }
        } else {
            body.fill(0);
        }
    }

    /// Parses one sector. `full` checks the body, too.
    pub fn find(sector: &[u8], full: bool) -> Found {
        debug_assert_eq!(sector.len() as u64, SECTOR_BYTES);
        let word = |at: usize| u64::from_le_bytes(sector[at..at + 8].try_into().expect("eight bytes"));
        let head = word(0);
        if head as u32 != MAGIC {
            let zero =
                if full { sector.iter().all(|b| *b == 0) } else { head | word(8) | word(16) | word(24) == 0 };
            return if zero { Found::Zero } else { Found::Foreign };
        }
        let tag = Tag { writer: (head >> 32) as u32, op: word(8), sector: word(16) };
        let check = word(24);
        if check == tag.check(false) {
            let torn = full && !is_broken(Oracle::TornAllowed) && sector[TAG_BYTES..].iter().any(|b| *b != 0);
            return if torn { Found::Torn(tag) } else { Found::Tag(tag) };
        }
        if check != tag.check(true) {
            return Found::Foreign;
        }
        let mut words = sector[TAG_BYTES..].chunks_exact(8).enumerate();
        let whole = !full
            || is_broken(Oracle::TornAllowed)
            || words.all(|(i, w)| *w == mix(check ^ i as u64).to_le_bytes());
        if whole { Found::Tag(tag) } else { Found::Torn(tag) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_round_trip_and_damage_is_detected() {
        let tag = Tag { writer: 3, op: 77, sector: 12 };
        for full in [false, true] {
            let mut sector = [0xee; 512];
            tag.fill(&mut sector, full);
            assert_eq!(Tag::find(&sector, true), Found::Tag(tag));
            sector[300] ^= 1;
            assert_eq!(Tag::find(&sector, true), Found::Torn(tag));
            sector[9] ^= 1;
            assert_eq!(Tag::find(&sector, true), Found::Foreign);
        }
        assert_eq!(Tag::find(&[0; 512], true), Found::Zero);
        assert_eq!(Tag::find(&[1; 512], false), Found::Foreign);
    }
}
