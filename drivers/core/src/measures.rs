//! What a disk's requests did, by kind, and how long they took: what monitoring shows.
//!
//! A histogram has fixed buckets, four for each power of two, so that to note a time takes a few instructions and no
//! memory, and the difference of two histograms is that of the time between them.

use crate::{Op, Request};
use tap_host::IoKind;

/// The kinds of requests, in the order of their numbers.
pub const KINDS: [IoKind; 5] =
    [IoKind::Read, IoKind::Write, IoKind::Flush, IoKind::WriteZeroes, IoKind::Discard];

/// The first bucket has what took no longer than 2 to the power of this, in nanoseconds.
const FIRST_LOG: u32 = 10;
/// The last one has what took longer than 2 to the power of this, in nanoseconds: more than two minutes.
const LAST_LOG: u32 = 37;
/// Buckets of a power of two, as a power of two.
const SPLIT_LOG: u32 = 2;
/// Number of buckets.
const BUCKETS: usize = ((LAST_LOG - FIRST_LOG) << SPLIT_LOG) as usize + 2;

/// How often requests took how long.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Histogram {
    buckets: [u64; BUCKETS],
    /// Sum of the times, in nanoseconds.
    pub sum_ns: u64,
    /// Longest time, in nanoseconds.
    pub max_ns: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [0; BUCKETS], sum_ns: 0, max_ns: 0 }
    }
}

impl Histogram {
    /// Notes one time.
    pub fn note(&mut self, ns: u64) {
        let last = BUCKETS - 1;
        self.buckets[bucket_of(ns).min(last)] += 1;
        self.sum_ns = self.sum_ns.saturating_add(ns);
        self.max_ns = self.max_ns.max(ns);
    }

    /// How many times were noted.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The buckets, from short to long: the longest time that belongs to one, in nanoseconds, and how often it was
    /// noted. The last one has no longest time.
    pub fn buckets(&self) -> impl Iterator<Item = (Option<u64>, u64)> + '_ {
        self.buckets.iter().enumerate().map(|(at, count)| ((at < BUCKETS - 1).then(|| bound_of(at)), *count))
    }
}

/// The place of the bucket of a time, which may be behind the last one.
fn bucket_of(ns: u64) -> usize {
    // A time that is a bound belongs to the bucket that it bounds.
    let below = ns.saturating_sub(1);
    match below.checked_ilog2() {
        Some(log) if log >= FIRST_LOG => {
            let part = below >> (log - SPLIT_LOG) & ((1 << SPLIT_LOG) - 1);
            1 + ((log - FIRST_LOG) << SPLIT_LOG) as usize + part as usize
        }
        _ => 0,
    }
}

/// The longest time of a bucket, in nanoseconds.
fn bound_of(at: usize) -> u64 {
    match (at as u64).checked_sub(1) {
        None => 1 << FIRST_LOG,
        Some(at) => {
            let (octave, part) = (at >> SPLIT_LOG, at & ((1 << SPLIT_LOG) - 1));
            ((1 << SPLIT_LOG) + part + 1) << (octave + u64::from(FIRST_LOG - SPLIT_LOG))
        }
    }
}

/// What the requests of one kind did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct KindMeasures {
    /// Requests that are not answered yet, including those that wait because the disk is paused.
    pub in_flight: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Sectors of successful requests.
    pub sectors: u64,
    /// How long those that were answered took, from their arrival at the disk: the time in which it was paused counts.
    pub latency: Histogram,
}

/// What a disk's requests did, by kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Measures([KindMeasures; KINDS.len()]);

impl Measures {
    /// What those of one kind did.
    pub fn of(&self, kind: IoKind) -> &KindMeasures {
        &self.0[kind as usize]
    }

    pub(crate) fn of_mut(&mut self, kind: IoKind) -> &mut KindMeasures {
        &mut self.0[kind as usize]
    }
}

/// The kind of `request`.
pub(crate) fn kind_of(request: &Request) -> IoKind {
    match request.op {
        Op::Read => IoKind::Read,
        Op::Write => IoKind::Write,
        Op::Flush => IoKind::Flush,
        Op::WriteZeroes(_) => IoKind::WriteZeroes,
        Op::Discard => IoKind::Discard,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_the_numbers_of_their_places() {
        assert!(KINDS.iter().enumerate().all(|(at, kind)| *kind as usize == at));
    }

    #[test]
    fn a_time_is_in_the_bucket_whose_bounds_it_is_between() {
        let bounds: Vec<u64> = (0..BUCKETS - 1).map(bound_of).collect();
        assert!(bounds.is_sorted_by(|a, b| a < b));
        assert_eq!(&bounds[..6], [1024, 1280, 1536, 1792, 2048, 2560]);
        assert_eq!(bounds.last(), Some(&(1 << LAST_LOG)));
        for (at, bound) in bounds.iter().enumerate() {
            assert_eq!((bucket_of(*bound), bucket_of(bound + 1)), (at, at + 1), "{bound}");
        }
        assert_eq!((bucket_of(0), bucket_of(1)), (0, 0));
        let mut all = Histogram::default();
        for ns in [0, 1024, 1025, 1 << LAST_LOG, (1 << LAST_LOG) + 1, u64::MAX] {
            all.note(ns);
        }
        let noted: Vec<_> = all.buckets().filter(|(_, count)| *count > 0).collect();
        assert_eq!(noted, [(Some(1024), 2), (Some(1280), 1), (Some(1 << LAST_LOG), 1), (None, 2)]);
        assert_eq!((all.count(), all.max_ns, all.sum_ns), (6, u64::MAX, u64::MAX));
    }
}
