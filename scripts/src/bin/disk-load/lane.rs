//! One request at a time, and what its sectors must hold.

use super::Result;
use super::options::Options;
use super::pattern::{Buffer, Random, SECTOR_BYTES, described, fill};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

/// Consecutive sectors of a lane: a prime, so that borders of lanes coincide with no other borders.
pub(crate) const STRIPE_SECTORS: u64 = 259;
/// 128 KiB, which blkfront splits into more than one request.
pub(crate) const LARGEST_SECTORS: u64 = 256;
const SMALLEST_SECTORS: u64 = 8;
/// The first mismatches are described; all are counted.
const DESCRIBED: u64 = 20;

/// The state shared by lanes and the main thread.
#[derive(Default)]
pub(crate) struct Shared {
    pub(crate) stop: AtomicBool,
    pub(crate) mismatches: AtomicU64,
    /// Requests begun so far, to stop at the right number.
    begun: AtomicU64,
    done: AtomicU64,
    longest_ms: AtomicU64,
}

impl fmt::Display for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = |of: &AtomicU64| of.load(Relaxed);
        let (done, longest_ms) = (value(&self.done), value(&self.longest_ms));
        write!(f, "requests {done}, longest {longest_ms} ms, MISMATCHES {}", value(&self.mismatches))
    }
}

/// A lane with its own stripes of the device.
pub(crate) struct Lane<'a> {
    number: u64,
    size_sectors: u64,
    device: &'a File,
    options: &'a Options,
    shared: &'a Shared,
    pub(crate) known: Known,
    generation: u32,
    random: Random,
    buffer: Buffer,
}

impl<'a> Lane<'a> {
    pub(crate) fn new(
        number: u64,
        size_sectors: u64,
        device: &'a File,
        options: &'a Options,
        shared: &'a Shared,
    ) -> Self {
        // Sectors after the last whole stripe belong to no lane: they are never written, and compared at the end.
        let all = size_sectors / STRIPE_SECTORS;
        let stripes = all / options.depth + u64::from(number < all % options.depth);
        Self {
            number,
            size_sectors,
            device,
            options,
            shared,
            known: Known {
                generations: vec![0; (stripes * STRIPE_SECTORS) as usize],
                depth: options.depth,
                seed: options.seed,
            },
            generation: 0,
            random: Random(Random(options.seed).next() ^ number),
            buffer: Buffer::new(LARGEST_SECTORS),
        }
    }

    /// Makes requests until it should stop.
    pub(crate) fn run(&mut self) -> Result<()> {
        let limit = self.options.requests.unwrap_or(u64::MAX);
        while !self.shared.stop.load(Relaxed) && self.shared.begun.fetch_add(1, Relaxed) < limit {
            let start = Instant::now();
            self.request()?;
            self.shared.longest_ms.fetch_max(start.elapsed().as_millis() as u64, Relaxed);
            self.shared.done.fetch_add(1, Relaxed);
        }
        Ok(())
    }

    fn request(&mut self) -> Result<()> {
        let kind = self.random.below(16);
        if !self.options.verify {
            let sectors = self.options.size_sectors;
            let at = self.random.below(self.size_sectors / sectors) * sectors;
            return if kind < 8 { self.write(at, sectors, 0) } else { self.read(at, sectors, 0) };
        }
        let sectors = SMALLEST_SECTORS + self.random.below(LARGEST_SECTORS - SMALLEST_SECTORS + 1);
        let stripes = self.known.generations.len() as u64 / STRIPE_SECTORS;
        let stripe = self.random.below(stripes) * self.options.depth + self.number;
        let at = stripe * STRIPE_SECTORS + self.random.below(STRIPE_SECTORS - sectors + 1);
        // A transfer need not begin at a page boundary of the guest's memory.
        let skip = self.random.below(9);
        match kind {
            0 => Ok(self.device.sync_data().map_err(|e| format!("flush: {e}"))?),
            1..=8 => self.write(at, sectors, skip),
            _ => self.read(at, sectors, skip),
        }
    }

    fn write(&mut self, at: u64, sectors: u64, skip: u64) -> Result<()> {
        self.generation += 1;
        let bytes = self.buffer.sectors(skip, sectors);
        if self.options.verify {
            self.known.write(at, bytes, self.generation);
        }
        let written = self.device.write_all_at(bytes, at * SECTOR_BYTES as u64);
        Ok(written.map_err(|e| format!("write {sectors} sectors at {at}: {e}"))?)
    }

    fn read(&mut self, at: u64, sectors: u64, skip: u64) -> Result<()> {
        let bytes = self.buffer.sectors(skip, sectors);
        let read = self.device.read_exact_at(bytes, at * SECTOR_BYTES as u64);
        read.map_err(|e| format!("read {sectors} sectors at {at}: {e}"))?;
        if self.options.verify {
            for (sector, found) in (at..).zip(bytes.chunks_exact(SECTOR_BYTES)) {
                self.known.compare(sector, found, self.shared);
            }
        }
        Ok(())
    }
}

/// What the sectors of a lane must hold.
pub(crate) struct Known {
    /// The generation of each sector of the lane's stripes, one stripe after the other; 0: never written.
    generations: Vec<u32>,
    depth: u64,
    seed: u64,
}

impl Known {
    /// Fills `bytes` with the data for a write to the sectors from `at` on, and remembers it.
    fn write(&mut self, at: u64, bytes: &mut [u8], generation: u32) {
        for (sector, bytes) in (at..).zip(bytes.chunks_exact_mut(SECTOR_BYTES)) {
            fill(bytes, self.seed, sector, generation);
            self.generations[place(sector, self.depth)] = generation;
        }
    }

    /// Compares what was read of one sector.
    pub(crate) fn compare(&self, sector: u64, found: &[u8], shared: &Shared) {
        let generation = self.generations.get(place(sector, self.depth)).copied().unwrap_or(0);
        let mut expected = [0; SECTOR_BYTES];
        if generation > 0 {
            fill(&mut expected, self.seed, sector, generation);
        }
        if found != expected && shared.mismatches.fetch_add(1, Relaxed) < DESCRIBED {
            println!(
                "@load mismatch: sector {sector} should be of generation {generation} (0: zeros), and has {}",
                described(found)
            );
        }
    }
}

/// The position of a sector in its lane's list, if `depth` lanes share the device.
fn place(sector: u64, depth: u64) -> usize {
    let stripe = sector / STRIPE_SECTORS / depth;
    (stripe * STRIPE_SECTORS + sector % STRIPE_SECTORS) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn places_of_a_lane_are_all_its_sectors_once() {
        let lanes = 3;
        for lane in 0..lanes {
            let mine = |sector: &u64| sector / STRIPE_SECTORS % lanes == lane;
            let places: BTreeSet<usize> =
                (0..12 * STRIPE_SECTORS).filter(mine).map(|sector| place(sector, lanes)).collect();
            let expected: BTreeSet<usize> = (0..4 * STRIPE_SECTORS as usize).collect();
            assert_eq!(places, expected, "lane {lane}");
        }
    }
}
