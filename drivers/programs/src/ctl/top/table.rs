//! Loads as a table, for people.

use super::rates::{Done, Load};
use crate::ctl::list::printable;

/// A line with the names of columns, and one for each disk.
pub(super) fn lines(loads: &[Load]) -> Vec<String> {
    let mut lines = vec![row(&[
        "PID", "MINOR", "READ/s", "WRITE/s", "FLUSH/s", "rMB/s", "wMB/s", "INFL", "WAIT", "rP50", "rP99",
        "wP50", "wP99",
    ])];
    lines[0].push_str(" IMAGE");
    for load in loads {
        let rate = |count: u64, unit: u64| match load.interval_ns {
            Some(ns) if ns > 0 => tenths(count, ns, unit),
            _ => "-".to_owned(),
        };
        let time = |done: &Done, of: fn(&Done) -> Option<u64>| of(done).map_or("-".to_owned(), short);
        let Load { read, write, flush, .. } = load;
        let fields = [
            load.pid.to_string(),
            load.minor.to_string(),
            rate(read.requests, 1),
            rate(write.requests, 1),
            rate(flush.requests, 1),
            rate(read.bytes, 1_000_000),
            rate(write.bytes, 1_000_000),
            load.in_flight.to_string(),
            load.waiting.to_string(),
            time(read, |done| done.p50_ns),
            time(read, |done| done.p99_ns),
            time(write, |done| done.p50_ns),
            time(write, |done| done.p99_ns),
        ];
        let fields = fields.each_ref().map(String::as_str);
        lines.push(format!("{} {}", row(&fields), printable(&load.image)));
    }
    lines
}

fn row(fields: &[&str; 13]) -> String {
    let [pid, minor, reads, writes, flushes, read, written, in_flight, waiting, r50, r99, w50, w99] = fields;
    format!(
        "{pid:>8} {minor:>5} {reads:>9} {writes:>9} {flushes:>8} {read:>7} {written:>7} {in_flight:>4} {waiting:>4} \
         {r50:>6} {r99:>6} {w50:>6} {w99:>6}"
    )
}

/// `count` units of `unit` in each second of `ns`, with one digit behind the point.
fn tenths(count: u64, ns: u64, unit: u64) -> String {
    let divisor = u128::from(ns) * u128::from(unit);
    let tenths = (u128::from(count) * 10_000_000_000 + divisor / 2) / divisor;
    format!("{}.{}", tenths / 10, tenths % 10)
}

/// A time in at most six characters.
fn short(ns: u64) -> String {
    match ns {
        0..10_000 => format!("{ns}ns"),
        10_000..10_000_000 => format!("{}us", ns / 1000),
        10_000_000..10_000_000_000 => format!("{}ms", ns / 1_000_000),
        _ => format!("{}s", ns / 1_000_000_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_rates_of_a_disk() {
        let read = Done { requests: 25, bytes: 3_000_000, p50_ns: Some(1024), p99_ns: Some(229_376) };
        let load = Load {
            pid: 4711,
            minor: 0,
            image: "raw:/a\n".into(),
            interval_ns: Some(2_000_000_000),
            read,
            write: Done::default(),
            flush: Done { requests: 1, ..Done::default() },
            in_flight: 3,
            waiting: 0,
        };
        let new = Load { interval_ns: None, minor: 12, ..load.clone() };
        assert_eq!(
            lines(&[load, new]),
            [
                "     PID MINOR    READ/s   WRITE/s  FLUSH/s   rMB/s   wMB/s INFL WAIT   rP50   rP99   wP50   wP99 IMAGE",
                "    4711     0      12.5       0.0      0.5     1.5     0.0    3    0 1024ns  229us      -      - raw:/a\\n",
                "    4711    12         -         -        -       -       -    3    0 1024ns  229us      -      - raw:/a\\n",
            ]
        );
    }

    #[test]
    fn rates_and_times_are_exact_and_short() {
        assert_eq!(tenths(1, 3_000_000_000, 1), "0.3");
        assert_eq!(tenths(u64::MAX, 1_000_000_000, 1_000_000), "18446744073709.6");
        let times = [9_999, 10_000, 9_999_999, 137_438_953_472].map(short);
        assert_eq!(times, ["9999ns", "10us", "9999us", "137s"]);
    }
}
