//! The figures of a benchmark as a table and as JSON.

use serde_json::{Value, json};
use std::time::Duration;

/// One run of one server.
pub(super) struct Measured {
    /// System calls were counted, which invalidates the times.
    pub(super) counting: bool,
    pub(super) requests: u64,
    pub(super) cpu: Duration,
    pub(super) calls: Option<u64>,
    pub(super) p50: Duration,
    pub(super) elapsed: Duration,
}

/// All runs of one server on one workload.
pub(super) struct Row {
    format: String,
    workload: &'static str,
    server: String,
    /// Microseconds of CPU per request, by round.
    cpu_us: Vec<f64>,
    p50_us: Vec<f64>,
    kilo_requests: Vec<f64>,
    calls: Option<f64>,
}

impl Row {
    pub(super) fn new(format: &str, workload: &'static str, server: &str) -> Self {
        Self {
            format: format.to_owned(),
            workload,
            server: server.to_owned(),
            cpu_us: Vec::new(),
            p50_us: Vec::new(),
            kilo_requests: Vec::new(),
            calls: None,
        }
    }

    pub(super) fn add(&mut self, m: Measured) {
        let requests = m.requests as f64;
        if m.counting {
            self.calls = m.calls.map(|calls| calls as f64 / requests);
            return;
        }
        self.cpu_us.push(m.cpu.as_secs_f64() * 1e6 / requests);
        self.p50_us.push(m.p50.as_secs_f64() * 1e6);
        self.kilo_requests.push(requests / m.elapsed.as_secs_f64() / 1e3);
    }
}

/// All rows; the first server of each workload is the reference for the others.
#[derive(Default)]
pub(super) struct Report {
    pub(super) rows: Vec<Row>,
}

impl Report {
    /// Ratio of the first server's CPU to that of `row`, round by round.
    fn ratios(&self, row: &Row) -> Vec<f64> {
        let same = |r: &&Row| r.format == row.format && r.workload == row.workload;
        let first = self.rows.iter().find(same);
        first
            .map_or_else(Vec::new, |first| first.cpu_us.iter().zip(&row.cpu_us).map(|(a, b)| a / b).collect())
    }

    pub(super) fn print(&self) {
        let mut last = (String::new(), "");
        for row in &self.rows {
            if last != (row.format.clone(), row.workload) {
                println!(
                    "\n{:<6} {:<18} {:<20} {:>10} {:>10} {:>9} {:>9}  tapdisk's CPU / its CPU",
                    "format", "workload", "server", "CPU us/req", "calls/req", "p50 us", "k req/s"
                );
                last = (row.format.clone(), row.workload);
            }
            let ratios = self.ratios(row);
            let against = if row.server == "tapdisk" {
                String::new()
            } else {
                format!("{:.2} ({:.2}..{:.2})", median(&ratios), least(&ratios), most(&ratios))
            };
            println!(
                "{:<6} {:<18} {:<20} {:>10.2} {:>10} {:>9.1} {:>9.1}  {against}",
                row.format,
                row.workload,
                row.server,
                median(&row.cpu_us),
                row.calls.map_or("-".to_owned(), |calls| format!("{calls:.2}")),
                median(&row.p50_us),
                median(&row.kilo_requests),
            );
        }
    }

    pub(super) fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let ratios = self.ratios(row);
            json!({
                "format": row.format,
                "workload": row.workload,
                "server": row.server,
                "cpu-us-per-request": row.cpu_us,
                "cpu-us-per-request-median": median(&row.cpu_us),
                "system-calls-per-request": row.calls,
                "p50-us": median(&row.p50_us),
                "kilo-requests-per-second": median(&row.kilo_requests),
                "tapdisk-cpu-ratio": median(&ratios),
                "tapdisk-cpu-ratio-range": [least(&ratios), most(&ratios)],
            })
        });
        Value::Array(rows.collect())
    }
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values
}

fn median(values: &[f64]) -> f64 {
    sorted(values).get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn least(values: &[f64]) -> f64 {
    sorted(values).first().copied().unwrap_or(f64::NAN)
}

fn most(values: &[f64]) -> f64 {
    sorted(values).last().copied().unwrap_or(f64::NAN)
}
