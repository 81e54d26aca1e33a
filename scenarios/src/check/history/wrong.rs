//! What is wrong with a sector that was read.

use super::WriteId;
use crate::check::Invariant;
use crate::check::frontier::Clock;

/// What was found, in words, and the requests that it is about.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Finding {
    /// In words.
    pub text: String,
    /// Where.
    pub sector: u64,
    /// The writes that matter.
    pub writes: Vec<WriteId>,
    /// When the reads that matter were submitted.
    pub reads: Vec<Clock>,
}

/// What is wrong with a sector.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Wrong {
    /// A version that it may not hold, or may no longer hold.
    Version(Finding),
    /// A version other than the one read after a crash, with no write since.
    Unstable(Finding),
    /// Bytes that were never written to it.
    Foreign(Finding),
}

impl Wrong {
    /// The broken invariant, where a wrong version breaks `version`.
    pub fn invariant(&self, version: Invariant) -> Invariant {
        match self {
            Wrong::Version(_) => version,
            Wrong::Unstable(_) => Invariant::G9,
            Wrong::Foreign(_) => Invariant::G10,
        }
    }

    /// The same, found by a read that was submitted at `inv`.
    pub(super) fn found_by(mut self, inv: Clock) -> Self {
        let (Wrong::Version(found) | Wrong::Unstable(found) | Wrong::Foreign(found)) = &mut self;
        found.reads = vec![inv];
        self
    }

    /// What was found.
    pub fn finding(&self) -> &Finding {
        match self {
            Wrong::Version(found) | Wrong::Unstable(found) | Wrong::Foreign(found) => found,
        }
    }
}

impl std::fmt::Display for Wrong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.finding().text)
    }
}
