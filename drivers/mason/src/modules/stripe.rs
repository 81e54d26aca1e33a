//! `stripe`: pieces of a disk on several disks in turn, as RAID 0.
//!
//! ```text
//!   stripe  [0][1][2][3][4][5]     of chunks
//!   below   a: [0][2][4]   b: [1][3][5]
//! ```
//!
//! What of a disk below does not fill a chunk, or exceeds the smallest of them, is not used.

use super::split::{Layout, Place};
use crate::graph::signature::{Arity, Below, Keeps, Need, Param, Params, Port, Signature};
use crate::graph::value::{Type, Value};
use std::ops::Range;
use tap_host::{Probe, SECTOR_BYTES};

tap_host::listed! {
    pub(crate) BUGS: Bug;
    STRIPE_RUNS_ON = "stripe-runs-on", "a request goes on in the next chunk of the same disk";
}

pub(super) fn signature() -> Signature {
    Signature {
        name: "stripe",
        about: "pieces of a disk on several disks in turn (RAID 0)",
        params: vec![
            Param::new("chunk", Type::Bytes, "size of a piece")
                .or(Value::Bytes(64 << 10))
                .within(SECTOR_BYTES, 1 << 30)
                .multiple_of(SECTOR_BYTES),
        ],
        ports: vec![Port {
            name: "members",
            arity: Arity::Ordered(1),
            need: Need::AsAbove,
            about: "the disks, in order; the smallest limits all",
        }],
        writable: true,
        keeps: Keeps::Nothing,
        agree: None,
        size: Some(size),
    }
}

fn size(params: &Params, below: &[Below]) -> Result<u64, String> {
    let chunk = params.number(0);
    let least = below.iter().map(|member| member.size_bytes).min().unwrap_or(0);
    match (least / chunk * chunk).checked_mul(below.len() as u64) {
        Some(0) => Err(format!("its smallest disk has less than one chunk of {}", Value::Bytes(chunk))),
        Some(size) if size < 1 << 63 => Ok(size),
        _ => Err("its disks are larger together than any disk can be".into()),
    }
}

/// Chunks of so many sectors on so many disks.
pub struct Stripe {
    chunk: u64,
    /// Sectors that are next to one another, from the beginning of a chunk on.
    run: u64,
    members: u64,
}

impl Stripe {
    /// Chunks of `chunk_sectors` on `members` disks.
    pub fn new(host: &impl Probe, chunk_sectors: u64, members: usize) -> Self {
        let run = if host.bug(&STRIPE_RUNS_ON) { chunk_sectors + 1 } else { chunk_sectors };
        Self { chunk: chunk_sectors, run, members: members as u64 }
    }
}

impl Layout for Stripe {
    fn place(&self, sector: u64) -> Place {
        let (chunk, within) = (sector / self.chunk, sector % self.chunk);
        let node = (chunk % self.members) as usize;
        Place { node, sector: chunk / self.members * self.chunk + within, count: self.run - within }
    }

    /// Neighbouring chunks of one disk are neighbours there, too.
    fn ranges(&self, range: Range<u64>) -> Vec<(usize, Range<u64>)> {
        // How many of the first `sector` sectors are on `member`.
        let before = |sector: u64, member: u64| {
            let row = self.chunk * self.members;
            (sector / row) * self.chunk + (sector % row).saturating_sub(member * self.chunk).min(self.chunk)
        };
        let of = |member: u64| (member as usize, before(range.start, member)..before(range.end, member));
        (0..self.members).map(of).filter(|(_, range)| !range.is_empty()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::modules::split::testing::same;

    #[derive(Clone)]
    struct Plain;
    impl Probe for Plain {}

    #[test]
    fn a_long_range_is_one_of_each_disk() {
        assert_eq!(Stripe::new(&Plain, 8, 3).ranges(7..25), [(0, 7..9), (1, 0..8), (2, 0..8)]);
        for (chunk, members) in [(1, 1), (1, 3), (3, 2), (8, 4)] {
            same(&Stripe::new(&Plain, chunk, members), chunk * members as u64 * 3);
        }
    }

    #[test]
    fn chunks_go_to_the_disks_in_turn() {
        let stripe = Stripe::new(&Plain, 8, 3);
        for (sector, node, at, count) in
            [(0, 0, 0, 8), (8, 1, 0, 8), (23, 2, 7, 1), (24, 0, 8, 8), (37, 1, 13, 3)]
        {
            assert_eq!(stripe.place(sector), Place { node, sector: at, count });
        }
    }

    #[test]
    fn the_smallest_disk_limits_all_and_a_rest_is_not_used() {
        let params = Params(vec![Some(Value::Bytes(4096))]);
        let below =
            |sizes: &[u64]| sizes.iter().map(|&size_bytes| Below { port: 0, size_bytes }).collect::<Vec<_>>();
        assert_eq!(size(&params, &below(&[16384, 13000])), Ok(24576));
        assert!(size(&params, &below(&[16384, 4095])).unwrap_err().contains("4 KiB"));
    }
}
