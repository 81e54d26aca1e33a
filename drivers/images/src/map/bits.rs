//! A sparse set of cluster numbers.

use std::collections::BTreeMap;
use tap_host::{Share, Stage};

/// Clusters in one part of a [`Bits`].
const PART: u64 = 4096;
/// Number of parts for which memory is taken at once.
const PARTS_AT_ONCE: usize = 16;
/// Memory of a part: its bits, and its entry in the index.
const PART_BYTES: usize = PART as usize / 8 + 64;

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
        let word = |i: &usize| self.words[*i][(bit % PART / 64) as usize];
        self.parts.get(&(bit / PART)).is_some_and(|i| word(i) & 1 << (bit % 64) != 0)
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
