//! `concat`: disks one after the other.
//!
//! ```text
//!   concat  0 ───────── 8 ─────────── 20
//!   below   a: 0 ── 8   b: 0 ─────── 12
//! ```

use super::split::{Layout, Place};
use crate::graph::signature::{Arity, Below, Keeps, Need, Params, Port, Signature};
use std::ops::Range;

pub(super) fn signature() -> Signature {
    Signature {
        name: "concat",
        about: "disks one after the other",
        params: vec![],
        ports: vec![Port {
            name: "parts",
            arity: Arity::Ordered(1),
            need: Need::AsAbove,
            about: "the disks, in order",
        }],
        writable: true,
        keeps: Keeps::Nothing,
        agree: None,
        size: Some(size),
    }
}

fn size(_: &Params, below: &[Below]) -> Result<u64, String> {
    let sum = below.iter().try_fold(0u64, |sum, part| sum.checked_add(part.size_bytes));
    sum.filter(|sum| *sum < 1 << 63)
        .ok_or_else(|| "its disks are larger together than any disk can be".into())
}

/// Where each part ends, in sectors.
pub struct Concat {
    ends: Vec<u64>,
}

impl Concat {
    /// Parts of `sizes` sectors.
    pub fn new(sizes: impl Iterator<Item = u64>) -> Self {
        let mut end = 0;
        let ends = sizes.map(|size| {
            end += size;
            end
        });
        Self { ends: ends.collect() }
    }
}

impl Layout for Concat {
    fn place(&self, sector: u64) -> Place {
        let node = self.ends.partition_point(|end| *end <= sector);
        let start = if node == 0 { 0 } else { self.ends[node - 1] };
        Place { node, sector: sector - start, count: self.ends[node] - sector }
    }

    fn ranges(&self, range: Range<u64>) -> Vec<(usize, Range<u64>)> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let cut = |(node, (start, end)): (usize, (u64, &u64))| {
            let (from, to) = (range.start.max(start), range.end.min(*end));
            (from < to).then(|| (node, from - start..to - start))
        };
        starts.zip(&self.ends).enumerate().filter_map(cut).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::modules::split::testing::same;

    #[test]
    fn a_long_range_is_one_of_each_disk() {
        let concat = Concat::new([8, 0, 12, 3].into_iter());
        assert_eq!(concat.ranges(7..21), [(0, 7..8), (2, 0..12), (3, 0..1)]);
        same(&concat, 23);
    }

    #[test]
    fn sectors_are_found_on_both_sides_of_each_end() {
        // A disk without sectors takes none.
        let concat = Concat::new([8, 0, 12].into_iter());
        for (sector, node, at, count) in [(0, 0, 0, 8), (7, 0, 7, 1), (8, 2, 0, 12), (19, 2, 11, 1)] {
            assert_eq!(concat.place(sector), Place { node, sector: at, count });
        }
    }
}
