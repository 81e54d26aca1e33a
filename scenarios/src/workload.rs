//! What guests do: operations drawn from a separate stream, each of them one decision.
//!
//! ChaCha8 makes the list from the seed, and each operation is then put to the engine as a decision. So a shrunk run
//! holds only the few operations that matter, and leaving one out does not change the others.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sim::{Entity, Label, Sim, mix2};
use tap_core::ZeroFlags;
use tap_host::{IoKind, SectorRange};

/// One operation of a guest: kind in 2 bits (0 none, 1 read, 2 flush, 3 write), sectors less one in 8, first sector.
pub static OP: Label = Label::packed("op", "operation {}", &[2, 8, 54]);

/// What a write becomes on a disk that has more than writes: 0 a write, 1 zeros, 2 zeros whose space may be released, 3
/// zeros only if that is fast, 4 a discard; 5 to 8 the same with more sectors than one write has, see [`LONG`].
pub static OP_FORM: Label =
    Label::new("op-form", "operation {n} is not a write but form {}: zeros or a discard");

/// Whether a write is also a flush.
pub static OP_FLUSHES: Label = Label::new("op-flushes", "operation {n} is a flush with data");

/// Factor by which a long form has more sectors.
pub const LONG: u32 = 24;

/// One operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Op {
    /// Which kind.
    pub kind: IoKind,
    /// Its range; empty for a flush.
    pub range: SectorRange,
    /// How zeros are made.
    pub zeroes: ZeroFlags,
    /// The write is also a flush: its answer makes it durable, with everything answered before.
    pub flushes: bool,
}

impl Op {
    /// A read, a write, or another request without flags.
    pub fn new(kind: IoKind, range: SectorRange) -> Self {
        Self { kind, range, zeroes: ZeroFlags::default(), flushes: false }
    }

    /// A flush.
    pub fn flush() -> Self {
        Self::new(IoKind::Flush, SectorRange::default())
    }

    /// The write in the form of an [`OP_FORM`] value, on a disk of `size_sectors`.
    fn formed(self, form: u64, size_sectors: u64) -> Self {
        if form > 4 {
            let room = (size_sectors - self.range.start.0).min(u64::from(u32::MAX)) as u32;
            let range = SectorRange::new(self.range.start.0, (self.range.count * LONG).min(room));
            return Self { range, ..self }.formed(form - 4, size_sectors);
        }
        let (kind, unmap, fast) = match form {
            1 => (IoKind::WriteZeroes, false, false),
            2 => (IoKind::WriteZeroes, true, false),
            3 => (IoKind::WriteZeroes, true, true),
            4 => (IoKind::Discard, false, false),
            _ => return self,
        };
        Self { kind, zeroes: ZeroFlags { unmap, fast }, ..self }
    }

    /// The decision value of this operation.
    pub fn encode(self) -> u64 {
        match self.kind {
            IoKind::Flush => 2,
            kind => {
                let kind = if kind == IoKind::Read { 1 } else { 3 };
                kind | u64::from(self.range.count - 1) << 2 | self.range.start.0 << 10
            }
        }
    }

    /// The operation of a decision value, moved into a disk of `size_sectors`; `None` for no operation.
    pub fn decode(value: u64, size_sectors: u64) -> Option<Self> {
        let start = (value >> 10) % size_sectors;
        let count = (((value >> 2) & 0xff) + 1).min(size_sectors - start) as u32;
        let range = SectorRange::new(start, count);
        match value & 3 {
            1 => Some(Self::new(IoKind::Read, range)),
            2 => Some(Self::flush()),
            3 => Some(Self::new(IoKind::Write, range)),
            _ => None,
        }
    }
}

impl std::fmt::Display for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.kind {
            IoKind::Flush => f.write_str("flush"),
            kind => write!(f, "{kind} {}", self.range),
        }
    }
}

/// The pattern of a guest's operations.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shape {
    /// Random places and sizes.
    Random,
    /// Sequential, so that they merge.
    Sequential,
    /// Repeatedly on a few sectors, so that they overlap.
    Overlapping,
    /// Single writes with flushes between.
    FlushHeavy,
    /// Runs of reads first, then scattered small writes, as of a system that boots.
    BootLike,
    /// Whole blocks in a few places, written, zeroed and flushed concurrently.
    Zeroing,
    /// Large writes that reach every part of the disk, rarely flushed.
    Filling,
}

impl Shape {
    /// Those that a seed draws from.
    pub const ALL: [Shape; 5] =
        [Self::Random, Self::Sequential, Self::Overlapping, Self::FlushHeavy, Self::BootLike];
}

/// Parameters of a guest's operations.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Its pattern.
    pub shape: Shape,
    /// Number of operations.
    pub count: u32,
    /// Size of the disk in sectors.
    pub size_sectors: u64,
    /// Largest operation in sectors (1..=256).
    pub max_sectors: u32,
    /// Some writes are zeros or discards.
    pub zeroes: bool,
    /// One in three of these is longer than a write can be.
    pub long_zeroes: bool,
    /// One write in this many is a flush with data; 0 is none.
    pub flushes: u64,
}

struct Stream(ChaCha8Rng);

impl Stream {
    fn new(seed: u64, stream: u64) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(b"workload");
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(stream);
        Self(rng)
    }
    fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.0.next_u64()) * u128::from(n)) >> 64) as u64
    }
}

/// Draws the operations of `guest` and takes each as a decision. The positions of omitted operations are `None`.
pub fn operations(sim: &Sim, guest: Entity, stream: u64, workload: &Workload) -> Vec<Option<Op>> {
    // How many of a seed's writes are zeros or discards; this only shapes how decisions are drawn.
    let (zeroes_one_in, forms) = match workload.shape {
        // Zeros that keep their space are those that can fail halfway.
        Shape::Zeroing => (2, [1, 1, 1, 1, 2, 2, 3, 4]),
        _ => ([6, 2][mix2(sim.swarm().seed(), stream) as usize % 2], [1, 1, 2, 2, 3, 3, 4, 4]),
    };
    let drawn = if sim.is_replaying() { Vec::new() } else { draw(sim.swarm().seed(), stream, workload) };
    (0..workload.count)
        .map(|i| {
            let value = sim.decide(guest, &OP, i, |_| drawn.get(i as usize).map_or(0, |op| op.encode()));
            let mut op = Op::decode(value, workload.size_sectors)?;
            // A decision from a file may ask for more than this guest can do.
            op.range.count = op.range.count.min(workload.max_sectors);
            if workload.flushes > 0 && op.kind == IoKind::Write {
                op.flushes =
                    sim.decide(guest, &OP_FLUSHES, i, |d| u64::from(d.below(workload.flushes) == 0)) != 0;
            }
            if !workload.zeroes || op.kind != IoKind::Write {
                return Some(op);
            }
            let form = sim.decide(guest, &OP_FORM, i, |d| match d.below(zeroes_one_in) {
                0 => forms[d.below(8) as usize] + if workload.long_zeroes && d.below(3) == 0 { 4 } else { 0 },
                _ => 0,
            });
            let form = if form > 4 && !workload.long_zeroes { form - 4 } else { form };
            Some(op.formed(form, workload.size_sectors))
        })
        .collect()
}

fn draw(seed: u64, stream: u64, w: &Workload) -> Vec<Op> {
    let mut rng = Stream::new(seed, stream);
    // A few hot places make conflicts; the rest of the disk makes allocations.
    let hot: Vec<u64> = (0..4).map(|_| rng.below(w.size_sectors)).collect();
    let mut cursor = rng.below(w.size_sectors);
    let mut ops: Vec<Op> = Vec::new();
    for i in 0..w.count {
        let mut op = draw_one(&mut rng, w, i, &hot, &mut cursor);
        // Programs rewrite, read back and discard what they just wrote.
        if i > 0 && op.kind != IoKind::Flush && rng.below(6) == 0 {
            let before = ops[rng.below(u64::from(i)) as usize];
            op.range = if before.kind == IoKind::Flush { op.range } else { before.range };
        }
        ops.push(op);
    }
    ops
}

fn draw_one(rng: &mut Stream, w: &Workload, i: u32, hot: &[u64], cursor: &mut u64) -> Op {
    let max = u64::from(w.max_sectors);
    let count = match rng.below(4) {
        0 => 1,
        1 => 8.min(max),
        _ => 1 + rng.below(max),
    };
    let mut at = match rng.below(3) {
        0 => hot[rng.below(hot.len() as u64) as usize],
        1 => rng.below(w.size_sectors.div_ceil(8)) * 8,
        _ => rng.below(w.size_sectors),
    };
    let mut chance = |percent| rng.below(100) < percent;
    let (flush, read) = match w.shape {
        Shape::Random => (chance(6), chance(35)),
        Shape::Sequential => (chance(3), chance(20)),
        Shape::Overlapping => (chance(5), chance(30)),
        Shape::FlushHeavy => (chance(40), chance(10)),
        Shape::BootLike => (i > w.count / 2 && chance(15), i < w.count / 2 || chance(20)),
        Shape::Zeroing => (chance(25), chance(10)),
        Shape::Filling => (chance(2), chance(4)),
    };
    match w.shape {
        Shape::Sequential => {
            at = *cursor;
            *cursor = (*cursor + count) % w.size_sectors;
        }
        Shape::BootLike if read => {
            at = *cursor;
            *cursor = (*cursor + count) % w.size_sectors;
        }
        Shape::Filling => {
            // Steps of about five eighths of the disk reach all of its parts in scattered order.
            let parts = u64::from(w.count) * 3 / 4;
            let part = (u64::from(i) * ((parts * 5 / 8) | 1) + rng.below(2)) % parts;
            at = w.size_sectors / parts * part + rng.below(w.size_sectors / parts);
        }
        Shape::Zeroing if at % 8 != 0 => at = hot[0] / 8 * 8,
        Shape::Overlapping => at = hot[0].saturating_add(rng.below(12)) % w.size_sectors,
        _ => {}
    }
    if flush {
        return Op::flush();
    }
    let count = if w.shape == Shape::Filling { max } else { count };
    let count = count.min(w.size_sectors - at) as u32;
    let kind = if read { IoKind::Read } else { IoKind::Write };
    Op::new(kind, SectorRange::new(at, count))
}

#[cfg(test)]
mod tests {
    use super::*;
    use sim::Config;

    #[test]
    fn operations_round_trip() {
        for shape in Shape::ALL {
            let w = Workload {
                shape,
                count: 500,
                size_sectors: 1000,
                max_sectors: 88,
                zeroes: false,
                long_zeroes: false,
                flushes: 0,
            };
            for op in draw(7, 1, &w) {
                assert_eq!(Op::decode(op.encode(), w.size_sectors), Some(op));
                assert!(op.range.fits(w.size_sectors));
            }
        }
        assert_eq!(Op::decode(0, 10), None);
    }

    #[test]
    fn the_stream_never_changes() {
        // Seeds in reports and regressions refer to these operations.
        let w = Workload {
            shape: Shape::Random,
            count: 3,
            size_sectors: 8192,
            max_sectors: 88,
            zeroes: false,
            long_zeroes: false,
            flushes: 0,
        };
        let ops = operations(&Sim::new(&Config::new(1)), Entity(1), 0, &w);
        let text: Vec<String> = ops.iter().map(|o| o.map_or("-".into(), |o| o.to_string())).collect();
        assert_eq!(text, ["read 4720+1", "write 1633+63", "read 7944+8"]);
    }
}
