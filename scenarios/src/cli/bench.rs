//! `bench`: how fast the testbed is.

use super::args::{BenchArgs, Common};
use super::crash::{ExploreRate, explore_rate};
use super::output::save_json;
use super::{Exit, Stop};
use crate::bench::{BenchResult, BenchSpec, Through, calibrate, measure};
use crate::catalog::of_format;
use crate::formats::Kind;
use serde::Serialize;
use sim::guard;

#[derive(Serialize)]
struct JsonRow {
    name: String,
    requests_per_cpu_second: u64,
    calibration: u64,
    requests_per_thousand_rounds: f64,
    host_ios_per_request: f64,
    cpu_ns_per_request: f64,
    copies_per_request: f64,
    memory_growth_bytes_per_million: f64,
    #[serde(flatten)]
    result: BenchResult,
}

/// `tapsim bench`
pub(crate) fn bench_command(common: &Common, args: &BenchArgs) -> Result<Exit, Stop> {
    let (through, requests) = (Through::Blkif, args.requests);
    let spec = |disk, sequential, merging| BenchSpec { through, disk, requests, sequential, merging };
    let random = Kind::plain().into_iter().map(|disk| (disk, "random", spec(disk, false, true)));
    let sequential = Kind::plain().into_iter().flat_map(|disk| {
        let merged = (disk, "sequential, merged", spec(disk, true, true));
        [merged, (disk, "sequential, not merged", spec(disk, true, false))]
    });
    let device = Kind::plain().into_iter().map(|disk| {
        (disk, "random, blktap2", BenchSpec { through: Through::Blktap, ..spec(disk, false, true) })
    });
    let rows = random.chain(device).chain(sequential);
    let rows = rows.map(|(disk, what, spec)| (format!("{disk:?}, {what}"), spec));
    println!(
        "1 guest, 32 requests of 4 KiB in flight, half reads, a flush every 64, 4 MiB disk, all checks on, {}",
        if common.guarded() { "guarded" } else { "not guarded" }
    );
    println!(
        "calibration: {} rounds/s of 64 hashes, a copied page and 4 allocations; measured again with each line",
        calibrate()
    );
    println!(
        "{:<30} {:>12} {:>12} {:>14} {:>12} {:>16} {:>14}",
        "world",
        "requests/s",
        "ns/request",
        "host I/O each",
        "copies each",
        "bytes/M requests",
        "per 1k rounds"
    );
    let mut json = Vec::new();
    for (name, spec) in rows {
        // The best of several runs counts: the load of other processes is not ours.
        let calibration = calibrate();
        let runs = (0..args.rounds).map(|_| guard::run(common.guarded(), 1, move || measure(spec)));
        let Some(result) = runs.min_by_key(|r| r.cpu_ns) else { continue };
        if let Some(failure) = &result.failure {
            return Err(Stop(Exit::Broken, format!("{name}: {failure}")));
        }
        let row = JsonRow {
            name: name.clone(),
            requests_per_cpu_second: result.rate(),
            calibration,
            requests_per_thousand_rounds: per_thousand(result.rate(), calibration),
            host_ios_per_request: result.host_ios as f64 / result.requests.max(1) as f64,
            cpu_ns_per_request: result.cpu_ns as f64 / result.requests.max(1) as f64,
            copies_per_request: result.copies as f64 / result.requests.max(1) as f64,
            memory_growth_bytes_per_million: result.memory_growth_bytes as f64 * 1e6
                / result.requests.max(1) as f64,
            result,
        };
        println!(
            "{:<30} {:>12} {:>12.0} {:>14.3} {:>12.3} {:>16.0} {:>14.1}",
            name,
            row.requests_per_cpu_second,
            row.cpu_ns_per_request,
            row.host_ios_per_request,
            row.copies_per_request,
            row.memory_growth_bytes_per_million,
            row.requests_per_thousand_rounds
        );
        json.push(row);
    }
    let explored = explored(common, args)?;
    if let Some(path) = &common.json {
        save_json(path, &JsonBench { worlds: json, crash_states: explored })?;
    }
    Ok(Exit::Ok)
}

/// A rate relative to the machine's: per thousand rounds of the fixed loop.
fn per_thousand(rate: u64, calibration: u64) -> f64 {
    rate as f64 * 1000.0 / calibration.max(1) as f64
}

#[derive(Serialize)]
struct JsonBench {
    worlds: Vec<JsonRow>,
    crash_states: Vec<JsonStates>,
}

#[derive(Serialize)]
struct JsonStates {
    scenario: &'static str,
    states_per_cpu_second: u64,
    calibration: u64,
    states_per_thousand_rounds: f64,
    #[serde(flatten)]
    rate: ExploreRate,
}

/// Crash states per second: distinct states that the driver opened and read.
fn explored(common: &Common, args: &BenchArgs) -> Result<Vec<JsonStates>, Stop> {
    println!(
        "\n{:<30} {:>12} {:>12} {:>14} {:>16} {:>14}",
        "crash states", "states/s", "ns/state", "duplicates", "sectors each", "per 1k rounds"
    );
    let mut out = Vec::new();
    for scenario in of_format::explored().iter().copied() {
        let (states, calibration) = (args.states, calibrate());
        let rate = guard::run(common.guarded(), 1, move || explore_rate(scenario, states));
        let rate = rate.map_err(|text| Stop(Exit::Broken, text))?;
        let per_second = (u128::from(rate.states) * 1_000_000_000 / u128::from(rate.cpu_ns.max(1))) as u64;
        let ratio = per_thousand(per_second, calibration);
        println!(
            "{:<30} {:>12} {:>12} {:>14} {:>16.1} {:>14.1}",
            scenario.name,
            per_second,
            rate.cpu_ns / rate.states.max(1),
            rate.duplicates,
            rate.sectors as f64 / rate.states.max(1) as f64,
            ratio
        );
        out.push(JsonStates {
            scenario: scenario.name,
            states_per_cpu_second: per_second,
            calibration,
            states_per_thousand_rounds: ratio,
            rate,
        });
    }
    Ok(out)
}
