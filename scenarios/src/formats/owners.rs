//! Ownership of the space of an image's file, which all walkers share.

use super::{Broken, ImageMap, PACKED_TWICE};
use crate::check::{Invariant, Oracle, is_broken};
use kernel_model::Content;
use std::ops::Range;

/// Maximum number of tracked clusters of a file: 128 MiB of bits. No image here has as many.
const CLUSTERS_MAX: u64 = 1 << 30;

/// Blocks of 4096 bytes.
const BLOCK_BITS: u32 = 12;

/// Host space by owner: whole clusters as bits, compressed extents as ranges.
pub(super) struct Owners {
    cluster_bits: u32,
    bits: Vec<u64>,
    extents: Vec<(u64, u64)>,
    owned: u64,
    /// The first cluster after everything that is owned.
    end: u64,
    /// The same in bytes: a table need not fill its clusters.
    end_bytes: u64,
    /// See [`Owners::fill`].
    filled: Range<u64>,
}

impl Owners {
    pub(super) fn new(cluster_bits: u32) -> Self {
        Self {
            cluster_bits,
            bits: Vec::new(),
            extents: Vec::new(),
            owned: 0,
            end: 0,
            end_bytes: 0,
            filled: 0..0,
        }
    }

    /// Assigns bytes of the file, and their clusters, to an owner.
    ///
    /// # Errors
    /// They already have an owner.
    pub(super) fn take(&mut self, offset: u64, len: u64, what: impl Fn() -> String) -> Result<(), Broken> {
        let first = offset >> self.cluster_bits;
        let last = (offset + len - 1) >> self.cluster_bits;
        if last >= CLUSTERS_MAX {
            return broken(Invariant::Q2, format!("{} lies on host cluster {last}, far out", what()));
        }
        if (last / 64 + 1) as usize > self.bits.len() {
            self.bits.resize((last / 64 + 1) as usize, 0);
        }
        self.end = self.end.max(last + 1);
        self.end_bytes = self.end_bytes.max(offset + len);
        for cluster in first..=last {
            let (word, bit) = ((cluster / 64) as usize, 1 << (cluster % 64));
            if self.bits[word] & bit != 0 && !is_broken(Oracle::SharedClusters) {
                return broken(
                    Invariant::Q2,
                    format!("{} lies on host cluster {cluster}, which has another owner", what()),
                );
            }
            self.bits[word] |= bit;
            self.owned += 1;
        }
        Ok(())
    }

    /// Assigns bytes of the file to a compressed cluster. Such extents may share clusters with each other, but not
    /// bytes, and share no cluster with anything else.
    pub(super) fn take_extent(&mut self, offset: u64, len: u64) {
        self.extents.push((offset, len));
    }

    /// Assigns the clusters of these bytes of the file that have no owner once all others have taken theirs.
    pub(super) fn fill(&mut self, bytes: Range<u64>) {
        self.filled = bytes;
    }

    fn take_filled(&mut self) {
        let Range { start, end } = self.filled;
        for cluster in start >> self.cluster_bits..end.div_ceil(1 << self.cluster_bits) {
            if !self.owns(cluster) {
                let word = (cluster / 64) as usize;
                self.bits.resize(self.bits.len().max(word + 1), 0);
                self.bits[word] |= 1 << (cluster % 64);
                self.owned += 1;
                self.end = self.end.max(cluster + 1);
            }
        }
    }

    /// Stores in `map` the number of unowned clusters and the end of the used space.
    ///
    /// # Errors
    /// A compressed extent overlaps another, or a cluster that has another owner.
    pub(super) fn finish(mut self, content: &Content, map: &mut ImageMap) -> Result<(), Broken> {
        self.extents.sort_unstable();
        for pair in self.extents.windows(2) {
            if pair[0].0 + pair[0].1 > pair[1].0 && !is_broken(Oracle::OverlappingExtents) {
                return broken(
                    Invariant::Q2,
                    format!("{:#x} and {:#x} {PACKED_TWICE}", pair[0].0, pair[1].0),
                );
            }
        }
        let mut last_cluster = None;
        for (offset, len) in std::mem::take(&mut self.extents) {
            let first = offset >> self.cluster_bits;
            let end = (offset + len.max(1) - 1) >> self.cluster_bits;
            for cluster in first..=end {
                if last_cluster == Some(cluster) {
                    continue;
                }
                last_cluster = Some(cluster);
                self.take(cluster << self.cluster_bits, 1, || {
                    format!("the compressed extent at {offset:#x}")
                })?;
            }
        }
        self.take_filled();
        // After a crash the file may be shorter than what it maps.
        let clusters = content.size.div_ceil(1 << self.cluster_bits);
        let beyond = (clusters..self.end).filter(|cluster| self.owns(*cluster)).count() as u64;
        map.leaked = clusters - (self.owned - beyond);
        map.padding = self.padding(clusters);
        map.end = self.end_bytes;
        Ok(())
    }

    fn owns(&self, cluster: u64) -> bool {
        self.bits.get((cluster / 64) as usize).is_some_and(|word| word >> (cluster % 64) & 1 == 1)
    }

    /// The first `clusters` without owner that have one before them in the same block of 4096 bytes, and none after.
    fn padding(&self, clusters: u64) -> u64 {
        let (mut padding, mut owned_before) = (0, false);
        if self.cluster_bits >= BLOCK_BITS {
            return 0;
        }
        let mut run = 0;
        for cluster in 0..clusters {
            if (cluster << self.cluster_bits).is_multiple_of(1 << BLOCK_BITS) {
                padding += run;
                (run, owned_before) = (0, false);
            }
            owned_before |= self.owns(cluster);
            run = if self.owns(cluster) { 0 } else { run + u64::from(owned_before) };
        }
        padding + run
    }
}

pub(super) fn broken<T>(invariant: Invariant, text: String) -> Result<T, Broken> {
    Err((invariant, text))
}

/// The entries of a table.
pub(super) fn be_words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|w| u64::from_be_bytes(w.try_into().expect("eight bytes")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_follows_an_owner_in_its_block() {
        let mut owners = Owners::new(9);
        // Of the first block the first and the fifth cluster, of the second one none, of the third one the last.
        for (offset, len) in [(0, 100), (4 * 512, 512), (2 * 4096 + 7 * 512, 512)] {
            owners.take(offset, len, || "it".into()).unwrap();
        }
        let mut map = ImageMap::default();
        owners.finish(&Content { size: 4 * 4096, ..Content::default() }, &mut map).unwrap();
        assert_eq!((map.leaked, map.padding), (32 - 3, 3));
    }
}
