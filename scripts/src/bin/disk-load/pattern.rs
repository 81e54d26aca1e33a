//! The content of sectors, and memory for them.

/// Bytes of a sector, the unit of a block device.
pub(crate) const SECTOR_BYTES: usize = 512;
const PAGE_BYTES: usize = 4096;
const WORD_BYTES: usize = 8;

/// Fills a sector. Its first two words are its number and its generation; the others are derived from them, so that a
/// part of another sector or of another generation is detected.
pub(crate) fn fill(bytes: &mut [u8], seed: u64, sector: u64, generation: u32) {
    let mut random = Random(seed ^ sector.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(generation) << 40);
    for (n, word) in bytes.chunks_exact_mut(WORD_BYTES).enumerate() {
        let value = match n {
            0 => sector,
            1 => u64::from(generation),
            _ => random.next(),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// What a sector claims to be.
pub(crate) fn described(bytes: &[u8]) -> String {
    let word = |n: usize| {
        let word = bytes[n * WORD_BYTES..].first_chunk().copied();
        u64::from_le_bytes(word.unwrap_or_default())
    };
    if bytes.iter().all(|&byte| byte == 0) {
        return "zeros".to_owned();
    }
    format!("what says it is sector {} of generation {}", word(0), word(1))
}

/// A sequence of numbers (SplitMix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `end`, which is not 0.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// Memory for direct transfers.
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    /// Offset of the first whole page.
    start: usize,
}

impl Buffer {
    /// Room for `sectors`, and for one page before them.
    pub(crate) fn new(sectors: u64) -> Self {
        let bytes = vec![0; 2 * PAGE_BYTES + sectors as usize * SECTOR_BYTES];
        let start = bytes.as_ptr().align_offset(PAGE_BYTES);
        Self { bytes, start }
    }

    /// Memory for `sectors` from sector `skip` of a page on; `skip` is at most 8.
    pub(crate) fn sectors(&mut self, skip: u64, sectors: u64) -> &mut [u8] {
        let start = self.start + skip as usize * SECTOR_BYTES;
        &mut self.bytes[start..start + sectors as usize * SECTOR_BYTES]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sector_and_generation_is_its_own() {
        let filled = |seed, sector, generation| {
            let mut bytes = [0; SECTOR_BYTES];
            fill(&mut bytes, seed, sector, generation);
            bytes
        };
        let one = filled(1, 7, 3);
        assert_eq!(described(&one), "what says it is sector 7 of generation 3");
        assert_eq!(described(&[0; SECTOR_BYTES]), "zeros");
        assert_eq!(one, filled(1, 7, 3));
        for other in [filled(2, 7, 3), filled(1, 8, 3), filled(1, 7, 4)] {
            // Every single word of the body differs.
            assert!(one.chunks(8).zip(other.chunks(8)).skip(2).all(|(a, b)| a != b));
        }
    }

    #[test]
    fn transfers_start_where_they_are_asked_to() {
        let mut buffer = Buffer::new(256);
        assert_eq!(buffer.sectors(0, 256).as_ptr().align_offset(PAGE_BYTES), 0);
        let last = buffer.sectors(8, 256);
        assert_eq!((last.len(), last.as_ptr().align_offset(PAGE_BYTES)), (256 * SECTOR_BYTES, 0));
        assert_eq!(buffer.sectors(3, 1).as_ptr().align_offset(PAGE_BYTES), 5 * SECTOR_BYTES);
    }
}
