//! A disk that becomes larger.

use super::{BLOCK, BlockHistory, Cell};

impl BlockHistory {
    /// The disk has become larger; the new part is zeros.
    pub fn grow(&mut self, size_sectors: u64) {
        assert!(size_sectors >= self.size_sectors, "a disk becomes smaller");
        let cells = size_sectors.div_ceil(BLOCK) as usize;
        self.cells.resize(cells, Cell::default());
        self.is_dirty.resize(cells, false);
        self.size_sectors = size_sectors;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Initial;
    use crate::check::history::tests::sector_of;
    use kernel_model::PageMap;
    use tap_host::SectorRange;

    #[test]
    fn the_new_part_of_a_disk_is_zeros_until_it_is_written() {
        for initial in [Initial::Zero, Initial::Bytes(PageMap::default())] {
            let mut h = BlockHistory::new(12, 1, initial, false);
            let old = h.begin_write(SectorRange::new(8, 4));
            h.end_write(old, true);
            h.grow(40);
            assert_eq!(h.size_sectors(), 40);
            let read = |h: &mut BlockHistory, sector: u64, bytes: &[u8]| {
                let inv = h.begin_read();
                h.check_read(inv, SectorRange::new(sector, 1), bytes)
            };
            for sector in [12, 15, 16, 39] {
                assert!(read(&mut h, sector, &[0; 512]).is_ok(), "{sector}");
                assert!(read(&mut h, sector, &[7; 512]).is_err(), "{sector}");
            }
            let new = h.begin_write(SectorRange::new(10, 20));
            h.end_write(new, true);
            for (sector, write) in [(9, old), (10, new), (29, new)] {
                let bytes = sector_of(&h, write, sector);
                assert!(read(&mut h, sector, &bytes).is_ok(), "{sector}");
            }
            assert!(read(&mut h, 12, &[0; 512]).is_err());
        }
    }
}
