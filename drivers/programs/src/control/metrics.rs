//! Disks as text in the format of OpenMetrics 1.0, for whatever collects metrics.
//!
//! ```text
//!   # TYPE tapdisk_requests counter
//!   # HELP tapdisk_requests Requests that were answered.
//!   tapdisk_requests_total{minor="0",operation="read"} 3
//!   # EOF
//! ```
//!
//! What changes in the life of a disk is no label, so that a series lasts as long as its disk. Numbers are printed
//! exactly, without floating point.

use std::fmt::Write;
use tap_control::json::{Disk, Latency, Operation, State, Stats};
use tap_host::{Probe, SECTOR_BYTES};

tap_host::listed! {
    pub(super) BUGS: Bug;
    METRICS_NOT_SUMMED = "metrics-not-summed", "a bucket of the metrics has only what is between its bounds";
}

/// Bounds of buckets, as powers of two of nanoseconds: about 1 us to 137 s.
const BOUNDS_LOG: std::ops::RangeInclusive<u32> = 10..=37;

const STATES: [(State, &str); 7] = [
    (State::Attached, "attached"),
    (State::Closed, "closed"),
    (State::Running, "running"),
    (State::Pausing, "pausing"),
    (State::Paused, "paused"),
    (State::Stranded, "stranded"),
    (State::Closing, "closing"),
];

/// The metrics of a process: all minor numbers, and the counters of those that are open.
pub(super) fn exposition(host: &impl Probe, listed: &[Disk], counted: &[Stats]) -> String {
    let mut text = Text(String::new());
    text.family("tapdisk_image", "info", None, "The image of the disk.");
    for disk in listed {
        if let Some(image) = &disk.image {
            let labels = [("minor", &*disk.minor.to_string()), ("image", image)];
            text.sample("tapdisk_image_info", &labels, "1");
        }
    }
    text.family("tapdisk_state", "stateset", None, "What the disk does.");
    for disk in listed {
        for (state, name) in STATES {
            let is = if disk.state == state { "1" } else { "0" };
            text.sample("tapdisk_state", &[("minor", &disk.minor.to_string()), ("tapdisk_state", name)], is);
        }
    }
    text.of_disks("tapdisk_size_bytes", "Size of the disk.", listed, |disk| {
        Some(disk.size_sectors? * SECTOR_BYTES)
    });
    text.of_disks("tapdisk_waiting", "Requests that wait because the disk is paused.", listed, |disk| {
        disk.image.as_ref().map(|_| disk.waiting)
    });
    text.of_disks("tapdisk_nbd_clients", "Clients that are connected over NBD.", listed, |disk| {
        disk.image.as_ref().map(|_| disk.nbd_clients)
    });
    text.family("tapdisk_merged", "counter", None, "Requests that went to the image as a part of another.");
    for disk in counted {
        text.number("tapdisk_merged_total", &[("minor", &disk.minor.to_string())], disk.merged);
    }
    text.family("tapdisk_retries", "counter", None, "Requests that were sent to the image again.");
    for disk in counted {
        text.number("tapdisk_retries_total", &[("minor", &disk.minor.to_string())], disk.retries);
    }
    text.by_operation("tapdisk_requests", "counter", "Requests that were answered.", counted, |one| {
        one.requests
    });
    text.by_operation("tapdisk_errors", "counter", "Requests that failed.", counted, |one| one.errors);
    text.by_operation("tapdisk_bytes", "counter", "Bytes of requests that succeeded.", counted, |one| {
        one.bytes
    });
    text.by_operation("tapdisk_in_flight", "gauge", "Requests that are not answered yet.", counted, |one| {
        one.in_flight
    });
    text.latencies(host, counted);
    text.0.push_str("# EOF\n");
    text.0
}

struct Text(String);

impl Text {
    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        self.0.write_fmt(line).expect("there is room for text");
        self.0.push('\n');
    }

    fn family(&mut self, name: &str, kind: &str, unit: Option<&str>, help: &str) {
        self.line(format_args!("# TYPE {name} {kind}"));
        if let Some(unit) = unit {
            self.line(format_args!("# UNIT {name} {unit}"));
        }
        self.line(format_args!("# HELP {name} {help}"));
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: &str) {
        let labels: Vec<String> =
            labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        self.line(format_args!("{name}{{{}}} {value}", labels.join(",")));
    }

    fn number(&mut self, name: &str, labels: &[(&str, &str)], value: u64) {
        self.sample(name, labels, &value.to_string());
    }

    /// A gauge of each disk that has a value.
    fn of_disks(&mut self, name: &str, help: &str, disks: &[Disk], value: impl Fn(&Disk) -> Option<u64>) {
        self.family(name, "gauge", unit_of(name), help);
        for disk in disks {
            if let Some(value) = value(disk) {
                self.number(name, &[("minor", &disk.minor.to_string())], value);
            }
        }
    }

    fn by_operation(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        disks: &[Stats],
        value: impl Fn(&Operation) -> u64,
    ) {
        self.family(name, kind, unit_of(name), help);
        let sample = if kind == "counter" { format!("{name}_total") } else { name.to_owned() };
        for disk in disks {
            for (operation, one) in &disk.operations {
                let labels = [("minor", &*disk.minor.to_string()), ("operation", operation)];
                self.number(&sample, &labels, value(one));
            }
        }
    }

    fn latencies(&mut self, host: &impl Probe, disks: &[Stats]) {
        let (name, help) = ("tapdisk_latency_seconds", "Time from the arrival of requests to their answer.");
        self.family(name, "histogram", unit_of(name), help);
        for disk in disks {
            for (operation, one) in &disk.operations {
                let minor = disk.minor.to_string();
                let labels = [("minor", &*minor), ("operation", operation)];
                let mut below_ns = None;
                for log in BOUNDS_LOG {
                    let bound_ns = 1_u64 << log;
                    let count = up_to(&one.latency, below_ns, Some(bound_ns));
                    let le = seconds(bound_ns);
                    self.number(&format!("{name}_bucket"), &[labels[0], labels[1], ("le", &le)], count);
                    if host.bug(&METRICS_NOT_SUMMED) {
                        below_ns = Some(bound_ns);
                    }
                }
                self.number(&format!("{name}_bucket"), &[labels[0], labels[1], ("le", "+Inf")], one.requests);
                self.number(&format!("{name}_count"), &labels, one.requests);
                self.sample(&format!("{name}_sum"), &labels, &seconds(one.latency.sum_ns));
            }
        }
    }
}

/// How many requests took longer than `below_ns` and at most `bound_ns`.
fn up_to(latency: &Latency, below_ns: Option<u64>, bound_ns: Option<u64>) -> u64 {
    let within = |bound: u64| Some(bound) > below_ns && bound_ns.is_none_or(|most| bound <= most);
    let counts = latency.buckets.iter().filter(|(bound, _)| within(bound.unwrap_or(u64::MAX)));
    counts.map(|(_, count)| count).sum()
}

/// The unit is the end of a name.
fn unit_of(name: &str) -> Option<&'static str> {
    ["bytes", "seconds"]
        .into_iter()
        .find(|unit| name.strip_suffix(unit).is_some_and(|rest| rest.ends_with('_')))
}

/// Nanoseconds as a decimal number of seconds.
fn seconds(ns: u64) -> String {
    let text = format!("{}.{:09}", ns / 1_000_000_000, ns % 1_000_000_000);
    let short = text.trim_end_matches('0');
    if short.ends_with('.') { format!("{short}0") } else { short.to_owned() }
}

/// A value between quotation marks.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_texts_are_exact() {
        assert_eq!(seconds(1024), "0.000001024");
        assert_eq!(seconds(1 << 37), "137.438953472");
        assert_eq!((seconds(0), seconds(2_000_000_000)), ("0.0".into(), "2.0".into()));
        assert_eq!(escaped("raw:/a \"b\"\\c\nd"), "raw:/a \\\"b\\\"\\\\c\\nd");
        assert_eq!(
            (unit_of("tapdisk_bytes"), unit_of("tapdisk_waiting"), unit_of("xbytes")),
            (Some("bytes"), None, None)
        );
    }

    #[test]
    fn buckets_have_all_that_took_no_longer() {
        let latency =
            Latency { sum_ns: 0, max_ns: 0, buckets: vec![(Some(1024), 2), (Some(1280), 3), (None, 1)] };
        let up_to = |bound| up_to(&latency, None, bound);
        assert_eq!((up_to(Some(1024)), up_to(Some(2048)), up_to(Some(1 << 37)), up_to(None)), (2, 5, 5, 6));
    }
}
