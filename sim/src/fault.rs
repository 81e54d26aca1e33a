//! Fault switches: which kinds of faults a seed has, and at which rates.
//!
//! Swarm testing: a run with every fault at a low rate finds less than many runs that each have a few kinds at a high
//! rate. So per seed each kind is off with probability one half; otherwise its rate is drawn from a wide range.

use crate::decide::Draw;
use crate::mix::{mix2, text_hash};

/// A kind of fault, with the rate in parts per million that it has at its heaviest.
pub struct FaultKind {
    /// Unique name, kebab case.
    pub name: &'static str,
    /// The heaviest rate.
    pub max_ppm: u32,
}

/// The fault rates of one seed. They are not decisions (single faults are), so a replay needs no rates.
#[derive(Clone, Copy, Debug)]
pub struct Swarm {
    seed: u64,
    on: bool,
}

impl Swarm {
    /// The switches of `seed`; all off unless `on`.
    pub fn new(seed: u64, on: bool) -> Self {
        Self { seed, on }
    }

    /// The seed, to derive shapes of distributions from (never decisions).
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The rate of `kind` in parts per million; 0 when it is off in this seed.
    pub fn rate_ppm(&self, kind: &FaultKind) -> u32 {
        if !self.on {
            return 0;
        }
        let mut draw = Draw::new(mix2(self.seed ^ 0x0073_7761_726d, text_hash(kind.name)));
        if draw.below(2) == 0 {
            return 0;
        }
        // Spread over a factor of 64, so that some seeds see one such fault and others little else.
        kind.max_ppm >> draw.below(7)
    }
}
