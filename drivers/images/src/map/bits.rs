//! A sparse set of cluster numbers.

use std::collections::{BTreeMap, BTreeSet};
use tap_host::{Share, Stage};

/// Clusters in one part of a [`Bits`].
const PART: u64 = 4096;
/// Number of parts for which memory is taken at once.
const PARTS_AT_ONCE: usize = 16;
/// Memory of a part: its bits, and its entry in the index.
const PART_BYTES: usize = PART as usize / 8 + 64;

/// Memory of a set that is not empty.
#[cfg(test)]
pub(super) const MIN_BYTES: usize = PARTS_AT_ONCE * PART_BYTES;

/// Why a bit could not be set.
pub(super) enum Taken {
    Before,
    NoRoom,
}

impl Taken {
    pub(super) fn text(&self) -> &'static str {
        match self {
            Taken::Before => "overlaps another cluster",
            Taken::NoRoom => "cannot be checked for lack of memory (--memory)",
        }
    }
}

/// The set. Memory grows with the number of parts that are not empty.
pub(super) struct Bits {
    memory: Stage,
    shares: Vec<Share>,
    parts: BTreeMap<u64, usize>,
    #[expect(
        clippy::vec_box,
        reason = "a list of the bits themselves would need twice the memory while it grows"
    )]
    words: Vec<Box<[u64; PART as usize / 64]>>,
    last: Option<(u64, usize)>,
}

impl Bits {
    pub(super) fn new(memory: &Stage) -> Self {
        let (parts, words) = (BTreeMap::new(), Vec::new());
        Self { memory: memory.clone(), shares: Vec::new(), parts, words, last: None }
    }

    /// Sets `count` bits from `first` on. Stops at a bit that was already set or has no memory; returns how many were
    /// set before it, and the reason.
    pub(super) fn set(&mut self, first: u64, count: u64) -> Result<(), (u64, Taken)> {
        let (mut bit, end) = (first, first + count);
        while bit < end {
            let index = self.part(bit / PART).ok_or((bit - first, Taken::NoRoom))?;
            let word = &mut self.words[index][(bit % PART / 64) as usize];
            let (from, len) = (bit % 64, (64 - bit % 64).min(end - bit));
            let mask = u64::MAX >> (64 - len) << from;
            let both = *word & mask;
            if both != 0 {
                let taken = both.trailing_zeros();
                *word |= mask & !(u64::MAX << taken);
                return Err((bit - from + u64::from(taken) - first, Taken::Before));
            }
            *word |= mask;
            bit += len;
        }
        Ok(())
    }

    /// The index of the words of a part.
    fn part(&mut self, part: u64) -> Option<usize> {
        if let Some((last, index)) = self.last
            && last == part
        {
            return Some(index);
        }
        let index = match self.parts.get(&part) {
            Some(index) => *index,
            None => {
                if self.words.len().is_multiple_of(PARTS_AT_ONCE) {
                    self.shares.push(self.memory.try_take(PARTS_AT_ONCE * PART_BYTES)?);
                }
                self.words.push(Box::new([0; PART as usize / 64]));
                self.parts.insert(part, self.words.len() - 1);
                self.words.len() - 1
            }
        };
        self.last = Some((part, index));
        Some(index)
    }

    pub(super) fn has(&self, bit: u64) -> bool {
        self.word(bit / 64) & 1 << (bit % 64) != 0
    }

    /// The 64 bits from `64 * at` on.
    fn word(&self, at: u64) -> u64 {
        let index = self.parts.get(&(at / (PART / 64)));
        index.map_or(0, |index| self.words[*index][(at % (PART / 64)) as usize])
    }

    /// How many numbers below `end` are in either set, or between the last one in their block and the end of that
    /// block. Blocks have `block` numbers: 1, 2, 4 or 8.
    pub(super) fn filled(&self, other: &Bits, end: u64, block: u32) -> u64 {
        let parts: BTreeSet<u64> = self.parts.keys().chain(other.parts.keys()).copied().collect();
        let words = parts.into_iter().flat_map(|part| part * PART / 64..(part + 1) * PART / 64);
        let count = |at: u64| {
            let below = match end.saturating_sub(at * 64) {
                count @ 0..64 => (1 << count) - 1,
                _ => u64::MAX,
            };
            fill_blocks((self.word(at) | other.word(at)) & below, block) & below
        };
        words.map(|at| u64::from(count(at).count_ones())).sum()
    }

    /// A number in both sets.
    pub(super) fn common(&self, other: &Bits) -> Option<u64> {
        self.parts.iter().find_map(|(part, index)| {
            let other = &other.words[*other.parts.get(part)?];
            let words = self.words[*index].iter().zip(other.iter()).enumerate();
            let (at, both) = words.map(|(at, (a, b))| (at as u64, a & b)).find(|(_, both)| *both != 0)?;
            Some(part * PART + at * 64 + u64::from(both.trailing_zeros()))
        })
    }
}

/// Sets all bits after the last one in each block of `block` bits that has any.
fn fill_blocks(word: u64, block: u32) -> u64 {
    if block == 1 || word == 0 {
        return word;
    }
    let whole = (1 << block) - 1;
    (0..64).step_by(block as usize).fold(word, |word, at| match (word >> at & whole).checked_ilog2() {
        Some(last) => word | (whole >> last << last) << at,
        None => word,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tap_host::Budget;

    #[test]
    fn blocks_are_filled_after_their_last_member() {
        let stage = Budget::default().stage(1 << 20).unwrap();
        let (mut a, mut b) = (Bits::new(&stage), Bits::new(&stage));
        // Blocks of eight: members 1 and 4 of one, 7 of another, 0 of one in another part.
        for bit in [1, 15, 2 * PART] {
            assert!(a.set(bit, 1).is_ok());
        }
        assert!(b.set(4, 1).is_ok());
        let filled = |end, block| a.filled(&b, end, block);
        assert_eq!((filled(u64::MAX, 1), filled(u64::MAX, 8)), (4, 5 + 1 + 8));
        assert_eq!(filled(u64::MAX, 2), 4 + 1 + 1, "1 and 15 end their blocks, 4 and the last do not");
        assert_eq!((filled(6, 8), filled(2 * PART + 3, 8)), (3, 5 + 1 + 3), "up to the end");
        assert_eq!((filled(0, 8), filled(64, 1)), (0, 3));
        assert_eq!(filled(4, 8), 3, "a member past the end is none");
    }
}
