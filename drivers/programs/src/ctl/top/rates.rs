//! What disks did between two looks at their counters.
//!
//! # Contract
//!
//! * Nothing is negative: counters that are less than before began anew, when the disk was opened again, and all that
//!   they count is new.
//! * A disk that was not open before counts from its opening. Of a tapdisk that was not seen before, nothing is known
//!   but what is in flight.

use serde::Serialize;
use tap_control::json::{Latency, Operation, Stats};
use tap_host::Probe;

tap_host::listed! {
    pub(super) BUGS: Bug;
    TOP_SINCE_OPENED = "top-since-opened", "what a disk did before an interval counts as done in it";
    TOP_NEVER_ANEW = "top-never-anew", "counters that began anew are compared with those before";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    TOP_ANEW = "top-anew", "the counters of a disk began anew between two looks at them";
}

/// The counters of the disks of a tapdisk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Sample {
    pub pid: u32,
    /// When, in nanoseconds.
    pub at_ns: u64,
    pub disks: Vec<Stats>,
}

/// What requests of one kind did in an interval.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub(super) struct Done {
    /// Requests that were answered.
    pub requests: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// Half of them took no longer, in nanoseconds.
    pub p50_ns: Option<u64>,
    /// 99 of 100 took no longer, in nanoseconds.
    pub p99_ns: Option<u64>,
}

/// What a disk did in an interval.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(super) struct Load {
    pub pid: u32,
    pub minor: u16,
    /// `TYPE:PATH`.
    pub image: String,
    /// How long the interval was, in nanoseconds; none if nothing was known before.
    pub interval_ns: Option<u64>,
    pub read: Done,
    pub write: Done,
    pub flush: Done,
    /// Requests that are not answered, without those that wait because the disk is paused.
    pub in_flight: u64,
    /// Those that wait because the disk is paused.
    pub waiting: u64,
}

/// What all disks that are in `after` did since `before`.
pub(super) fn loads(host: &impl Probe, before: &[Sample], after: &[Sample]) -> Vec<Load> {
    let mut loads = Vec::new();
    for now in after {
        let then = before.iter().find(|then| then.pid == now.pid);
        for disk in &now.disks {
            let old = then.and_then(|then| then.disks.iter().find(|old| old.minor == disk.minor));
            let old = old.filter(|old| !began_anew(host, old, disk) && !host.bug(&TOP_SINCE_OPENED));
            let done = |name: &str| match then {
                None => Done::default(),
                Some(_) => done(old.and_then(|old| old.operations.get(name)), disk.operations.get(name)),
            };
            loads.push(Load {
                pid: now.pid,
                minor: disk.minor,
                image: disk.name.clone(),
                interval_ns: then.map(|then| now.at_ns.saturating_sub(then.at_ns)),
                read: done("read"),
                write: done("write"),
                flush: done("flush"),
                in_flight: disk.in_flight,
                waiting: disk.waiting,
            });
        }
    }
    loads
}

/// Whether some counter is less than before.
fn began_anew(host: &impl Probe, old: &Stats, new: &Stats) -> bool {
    let less = |name: &String, old: &Operation| {
        let Some(new) = new.operations.get(name) else { return true };
        let count = |bound| count_of(&new.latency, bound);
        new.requests < old.requests
            || new.bytes < old.bytes
            || new.latency.sum_ns < old.latency.sum_ns
            || old.latency.buckets.iter().any(|(bound, old)| count(*bound) < *old)
    };
    let anew = old.operations.iter().any(|(name, old)| less(name, old));
    if anew {
        host.mark(&TOP_ANEW);
    }
    anew && !host.bug(&TOP_NEVER_ANEW)
}

fn count_of(latency: &Latency, bound: Option<u64>) -> u64 {
    latency.buckets.iter().find(|(own, _)| *own == bound).map_or(0, |(_, count)| *count)
}

fn done(old: Option<&Operation>, new: Option<&Operation>) -> Done {
    let Some(new) = new else { return Done::default() };
    let before = |of: fn(&Operation) -> u64| old.map_or(0, of);
    let buckets = new.latency.buckets.iter().map(|(bound, count)| {
        let old = old.map_or(0, |old| count_of(&old.latency, *bound));
        (bound.unwrap_or(new.latency.max_ns), count.abs_diff(old))
    });
    let buckets: Vec<(u64, u64)> = buckets.collect();
    Done {
        requests: new.requests.abs_diff(before(|old| old.requests)),
        bytes: new.bytes.abs_diff(before(|old| old.bytes)),
        p50_ns: percentile(&buckets, 50),
        p99_ns: percentile(&buckets, 99),
    }
}

/// The bound of the bucket that has the request before which `percent` of all come; none without requests.
fn percentile(buckets: &[(u64, u64)], percent: u64) -> Option<u64> {
    let all: u64 = buckets.iter().map(|(_, count)| count).sum();
    let rank = (u128::from(all) * u128::from(percent)).div_ceil(100);
    let mut sum = 0;
    let reached = buckets.iter().find(|(_, count)| {
        sum += u128::from(*count);
        *count > 0 && sum >= rank
    });
    reached.map(|(bound, _)| *bound)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tap_control::json::{ImageStats, State};
    use tap_host::{Bug, Mark};

    #[derive(Clone)]
    struct Right;

    impl Probe for Right {
        fn bug(&self, _: &Bug) -> bool {
            false
        }
        fn mark(&self, _: &Mark) {}
    }

    /// A disk whose reads took as long as `buckets` say, each of 4 KiB.
    fn disk(minor: u16, buckets: &[(Option<u64>, u64)]) -> Stats {
        let requests = buckets.iter().map(|(_, count)| count).sum();
        let sum_ns = buckets.iter().map(|(bound, count)| bound.unwrap_or(1 << 38) * count).sum();
        let latency = Latency { sum_ns, max_ns: 1 << 38, buckets: buckets.to_vec() };
        let read = Operation { requests, bytes: requests * 4096, errors: 0, in_flight: 1, latency };
        let name = "raw:/a".to_owned();
        Stats {
            minor,
            name: name.clone(),
            secs: [0, 0],
            images: [ImageStats { name, hits: [0, 0] }],
            state: State::Running,
            size_sectors: 8,
            read_only: false,
            in_flight: 1,
            waiting: 2,
            reads: requests,
            writes: 0,
            flushes: 0,
            zeroes: 0,
            discards: 0,
            sectors_zeroed: 0,
            sectors_discarded: 0,
            merged: 0,
            retries: 0,
            errors: 0,
            nbd_clients: 0,
            operations: [("read".to_owned(), read)].into(),
        }
    }

    fn sample(pid: u32, at_ns: u64, disks: Vec<Stats>) -> Sample {
        Sample { pid, at_ns, disks }
    }

    const BEFORE: [(Option<u64>, u64); 2] = [(Some(1024), 10), (Some(4096), 1)];

    #[test]
    fn the_difference_is_what_was_done() {
        let before = [sample(17, 1_000, vec![disk(3, &BEFORE)])];
        let after = [(Some(1024), 10), (Some(2048), 98), (Some(4096), 2), (None, 1)];
        let after = [sample(17, 2_000_001_000, vec![disk(3, &after)])];
        let all = loads(&Right, &before, &after);
        let read = Done { requests: 100, bytes: 409_600, p50_ns: Some(2048), p99_ns: Some(4096) };
        assert_eq!(all.len(), 1);
        assert_eq!(
            (all[0].interval_ns, all[0].read, all[0].write),
            (Some(2_000_000_000), read, Done::default())
        );
        assert_eq!((all[0].pid, all[0].minor, all[0].in_flight, all[0].waiting), (17, 3, 1, 2));
        // Nothing happened.
        let still = loads(&Right, &after, &after);
        assert_eq!((still[0].interval_ns, still[0].read), (Some(0), Done::default()));
    }

    #[test]
    fn disks_appear_and_disappear() {
        let before = [sample(17, 0, vec![disk(3, &BEFORE)]), sample(18, 0, vec![disk(4, &BEFORE)])];
        let after = [sample(17, 10, vec![disk(5, &BEFORE)]), sample(19, 10, vec![disk(6, &BEFORE)])];
        let all = loads(&Right, &before, &after);
        let seen: Vec<_> = all.iter().map(|one| (one.minor, one.interval_ns, one.read.requests)).collect();
        // Opened meanwhile, everything is new; of a tapdisk that was not seen before, nothing is known.
        assert_eq!(seen, [(5, Some(10), 11), (6, None, 0)]);
        assert!(loads(&Right, &before, &[]).is_empty());
    }

    #[test]
    fn counters_that_began_anew_are_not_negative() {
        let before = [sample(17, 0, vec![disk(3, &BEFORE)])];
        for anew in [&[(Some(1024), 2)][..], &[], &[(Some(2048), 40)]] {
            let after = [sample(17, 10, vec![disk(3, anew)])];
            let requests = anew.iter().map(|(_, count)| count).sum::<u64>();
            assert_eq!(loads(&Right, &before, &after)[0].read.requests, requests, "{anew:?}");
        }
    }

    #[test]
    fn a_percentile_is_the_bound_of_its_bucket() {
        assert_eq!(percentile(&[], 50), None);
        assert_eq!(percentile(&[(8, 0)], 50), None);
        assert_eq!(percentile(&[(8, 1)], 99), Some(8));
        assert_eq!(percentile(&[(8, 1), (16, 1)], 50), Some(8));
        assert_eq!(percentile(&[(8, 99), (16, 1)], 99), Some(8));
        assert_eq!(percentile(&[(8, 98), (12, 0), (16, 2)], 99), Some(16));
        assert_eq!(percentile(&[(8, u64::MAX / 2)], 99), Some(8));
    }
}
