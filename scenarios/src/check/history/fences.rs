//! Flushes with data: if their data is on the medium, so is everything that they cover, however they ended.

use super::{BLOCK, BlockHistory, Cell, Finding, WriteId, Wrong};
use crate::check::frontier::{Block, Clock};
use std::collections::BTreeMap;
use tap_host::SectorRange;

/// The fences of a disk.
#[derive(Clone, Default)]
pub(super) struct Fences {
    /// Writes that are also flushes and not known to be durable: their range and time of submission.
    open: BTreeMap<WriteId, (SectorRange, Clock)>,
    /// After a power cut: what cannot be on the medium if the data of the fence is.
    hidden: BTreeMap<WriteId, Vec<(SectorRange, WriteId)>>,
}

impl Fences {
    /// `write` is durable, and so is everything that it covers.
    pub(super) fn lift(&mut self, write: WriteId) {
        self.open.remove(&write);
    }
}

impl BlockHistory {
    /// `write` is also a flush, submitted at `inv`: its data reaches the medium after everything answered before that,
    /// however it ends.
    pub fn fence(&mut self, write: WriteId, range: SectorRange, inv: Clock) {
        self.fences.open.insert(write, (range, inv));
    }

    /// Where the medium may hold the data of flushes that had not succeeded when the power was cut.
    pub fn fenced(&self) -> Vec<SectorRange> {
        let Fences { open, hidden } = &self.fences;
        open.iter().filter(|(write, _)| hidden.contains_key(write)).map(|(_, f)| f.0).collect()
    }

    /// The power is cut: records what the data of each fence rules out.
    pub(super) fn cut_fences(&mut self) {
        let hidden = self.fences.open.iter().map(|(write, (_, inv))| (*write, self.hidden_by(*inv)));
        self.fences.hidden = hidden.collect();
    }

    /// The data of a flush is on the medium, so everything that the flush covers is, too.
    pub(super) fn exclude_hidden(&mut self, fence: WriteId) -> Result<(), Wrong> {
        for (range, write) in self.fences.hidden.remove(&fence).unwrap_or_default() {
            let mut seen = false;
            self.each(range, |b| seen |= b.rule_out(write));
            if seen {
                let text = format!(
                    "sector {} holds write {write}, and write {fence}, a flush with data, is on the medium",
                    range.start.0
                );
                let writes = vec![write, fence];
                return Err(Wrong::Version(Finding { text, sector: range.start.0, writes, reads: vec![] }));
            }
        }
        Ok(())
    }

    /// What cannot be on the medium if everything answered before `inv` is.
    fn hidden_by(&self, inv: Clock) -> Vec<(SectorRange, WriteId)> {
        let mut all = Vec::new();
        for cell in &self.dirty {
            let start = cell * BLOCK;
            let mut add = |block: &Block, range| {
                all.extend(block.hidden_by_flush(inv, self.order).into_iter().map(|write| (range, write)));
            };
            match &self.cells[*cell as usize] {
                Cell::Whole(block) => {
                    add(block, SectorRange::new(start, (self.size_sectors - start).min(BLOCK) as u32));
                }
                Cell::Split(blocks) => {
                    let sectors = (start..self.size_sectors).zip(blocks.iter());
                    sectors.for_each(|(sector, block)| add(block, SectorRange::new(sector, 1)));
                }
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Initial;
    use crate::check::history::tests::sector_of;

    #[test]
    fn the_data_of_a_flush_implies_what_it_covers() {
        for (survives, look_first, fine) in [(true, 8, true), (false, 8, false), (false, 64, false)] {
            let mut h = BlockHistory::new(100, 1, Initial::Zero, false);
            let (one, two) = (SectorRange::new(8, 1), SectorRange::new(64, 1));
            let write = h.begin_write(one);
            h.end_write(write, true);
            let flush = h.begin_flush();
            let fence = h.begin_write(two);
            h.fence(fence, two, flush);
            h.power_cut();
            assert_eq!(h.fenced(), [two]);
            let there = sector_of(&h, if survives { write } else { 0 }, 8);
            let data = sector_of(&h, fence, 64);
            let mut look = |at: u64| {
                let inv = h.begin_read();
                h.check_read(inv, SectorRange::new(at, 1), if at == 8 { &there } else { &data }).is_ok()
            };
            assert_eq!(look(look_first) & look(72 - look_first), fine, "{survives}, {look_first} first");
        }
    }
}
