//! Which bytes of a read have arrived: each once, in any order, in bounded memory.

use smallvec::SmallVec;

/// Most runs of bytes with gaps between them. A server that sends a read's parts in any order leaves a few; one that
/// skips every second byte would leave millions.
const RUNS_MAX: usize = 4096;

/// The bytes that have arrived, as ordered runs that do not touch.
#[derive(Debug, Default)]
pub(super) struct Covered(SmallVec<[(u32, u32); 2]>);

impl Covered {
    /// Notes that bytes `from..to` arrive now; `to` is larger than `from`.
    ///
    /// # Errors
    /// If some of them have arrived before, or there are too many gaps.
    pub(super) fn add(&mut self, from: u32, to: u32) -> Result<(), &'static str> {
        let at = self.0.partition_point(|run| run.1 < from);
        // The first run that ends at or after the new one's beginning: the new one may touch it, and the one after it.
        let touches_before = self.0.get(at).is_some_and(|run| run.1 == from);
        let behind = at + usize::from(touches_before);
        let next = self.0.get(behind).copied();
        if from >= to || next.is_some_and(|run| run.0 < to) {
            return Err("data that came before");
        }
        let touches_behind = next.is_some_and(|run| run.0 == to);
        match (touches_before, touches_behind) {
            (true, true) => {
                let (_, end) = self.0.remove(behind);
                self.0[at].1 = end;
            }
            (true, false) => self.0[at].1 = to,
            (false, true) => self.0[behind].0 = from,
            (false, false) if self.0.len() == RUNS_MAX => return Err("data in more pieces than make sense"),
            (false, false) => self.0.insert(at, (from, to)),
        }
        Ok(())
    }

    /// Whether bytes `0..len` have arrived.
    pub(super) fn is_whole(&self, len: u32) -> bool {
        self.0.as_slice() == [(0, len)]
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn as_a_bitmap_says(parts in prop::collection::vec((0_u32..64, 0_u32..24), 1..40)) {
            let mut covered = Covered::default();
            let mut bytes = [false; 96];
            for (from, len) in parts {
                let range = from as usize..(from + len) as usize;
                let free = len > 0 && bytes[range.clone()].iter().all(|byte| !byte);
                prop_assert_eq!(covered.add(from, from + len).is_ok(), free);
                if free {
                    bytes[range].fill(true);
                }
                let whole = bytes.iter().take_while(|byte| **byte).count();
                let rest = bytes[whole..].iter().any(|byte| *byte);
                prop_assert_eq!(covered.is_whole(whole as u32), whole > 0 && !rest);
            }
        }
    }

    #[test]
    fn gaps_without_number_are_refused() {
        let mut covered = Covered::default();
        for i in 0..RUNS_MAX as u32 {
            assert_eq!(covered.add(2 * i, 2 * i + 1), Ok(()));
        }
        assert!(covered.add(1 << 20, (1 << 20) + 1).is_err());
        assert_eq!(covered.add(1, 2), Ok(()), "filling a gap needs no room");
    }
}
