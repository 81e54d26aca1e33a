//! `cargo xtask bench nbd`: tapdisk and other NBD servers on the same work, in turn.
//!
//! ```text
//!   for each workload     round 1: A B C   round 2: C B A   round 3: A B C ...     one more: calls counted
//!                         CPU of the server process / requests, from first request to last reply
//! ```
//!
//! What counts is the server's CPU and system calls per request: wall-clock figures of a shared machine vary by a
//! factor of two, these are stable. Comparisons are made round by round, and their median is printed with its range.

mod client;
mod maps;
mod report;
mod server;

use client::{Client, Kind, Load, Order};
use maps::MAPS;
use report::{Measured, Report, Row};
use server::ServerSpec;
use std::path::{Path, PathBuf};
use std::time::Duration;
use xshell::{Shell, cmd};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

pub(crate) const HELP: &str = "\
Measures NBD servers: CPU and system calls per request, and the median time of a request at depth 1.

Usage: cargo xtask bench nbd [OPTIONS]

Options:
  --format raw|qcow      image format (both, one after the other)
  --server NAME=COMMAND  another server; {socket}, {image} and {format} are filled in. Repeatable. Without any, qemu-nbd
                         in its modes (native, io_uring, threads; cache none) if it is installed
  --workload NAME        only this one; repeatable
  --rounds N             rounds of each workload (5)
  --size-mib N           size of the disk (256)
  --dir DIR              where images and sockets are (/dev/shm)
  --requests PERCENT     share of the usual number of requests (100)
  --json FILE            the figures as JSON, too

Workloads: read-q1 read-q32 rewrite-q1 rewrite-q32 alloc-q32 read64k-q4 rewrite64k-q4 sync-q1
           map-sparse-nbdinfo map-sparse-qemu map-runs-nbdinfo map-runs-qemu: a whole map as one request, by nbdinfo
           --map --totals and qemu-img map, of a raw file of 10 TiB with 1000 pieces of data, and of one with 30,000
           extents; the file is in the target folder

Example:
  cargo xtask bench nbd --format raw --workload read-q32 \\
      --server 'nbdkit=nbdkit -f -U {socket} file {image}'
";

/// One line of work.
struct Workload {
    name: &'static str,
    load: Load,
    /// On an image that was just made.
    fresh: bool,
}

const fn load(kind: Kind, order: Order, size_bytes: u32, depth: usize, requests: u64) -> Load {
    Load { kind, order, size_bytes, depth, requests }
}

const WORKLOADS: [Workload; 8] = [
    Workload { name: "read-q1", load: load(Kind::Read, Order::Random, 4096, 1, 30_000), fresh: false },
    Workload { name: "read-q32", load: load(Kind::Read, Order::Random, 4096, 32, 200_000), fresh: false },
    Workload { name: "rewrite-q1", load: load(Kind::Write, Order::Random, 4096, 1, 30_000), fresh: false },
    Workload { name: "rewrite-q32", load: load(Kind::Write, Order::Random, 4096, 32, 200_000), fresh: false },
    Workload { name: "alloc-q32", load: load(Kind::Write, Order::Scattered, 4096, 32, 60_000), fresh: true },
    Workload {
        name: "read64k-q4",
        load: load(Kind::Read, Order::Sequential, 65536, 4, 30_000),
        fresh: false,
    },
    Workload {
        name: "rewrite64k-q4",
        load: load(Kind::Write, Order::Sequential, 65536, 4, 30_000),
        fresh: false,
    },
    Workload { name: "sync-q1", load: load(Kind::WriteFlush, Order::Random, 4096, 1, 10_000), fresh: false },
];

/// What the command line says.
struct Options {
    formats: Vec<String>,
    servers: Vec<ServerSpec>,
    workloads: Vec<String>,
    rounds: usize,
    size_mib: u64,
    dir: PathBuf,
    percent: u64,
    json: Option<PathBuf>,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self> {
        let mut options = Self {
            formats: Vec::new(),
            servers: Vec::new(),
            workloads: Vec::new(),
            rounds: 5,
            size_mib: 256,
            dir: PathBuf::from("/dev/shm"),
            percent: 100,
            json: None,
        };
        let mut args = args.iter();
        while let Some(name) = args.next() {
            let value = args.next().ok_or_else(|| format!("{name} needs a value"))?;
            match name.as_str() {
                "--format" => options.formats.push(value.clone()),
                "--server" => {
                    let (name, command) =
                        value.split_once('=').ok_or("--server wants NAME=COMMAND, with {socket} in it")?;
                    options.servers.push(ServerSpec::new(name, command));
                }
                "--workload" => options.workloads.push(value.clone()),
                "--rounds" => options.rounds = value.parse::<usize>()?.max(1),
                "--size-mib" => options.size_mib = value.parse::<u64>()?.max(16),
                "--dir" => options.dir = PathBuf::from(value),
                "--requests" => options.percent = value.parse::<u64>()?.max(1),
                "--json" => options.json = Some(PathBuf::from(value)),
                other => return Err(format!("unknown option {other}; see cargo xtask bench --help").into()),
            }
        }
        if options.formats.is_empty() {
            options.formats = vec!["raw".into(), "qcow".into()];
        }
        let known =
            |name: &str| WORKLOADS.iter().any(|w| w.name == name) || MAPS.iter().any(|m| m.name == name);
        if let Some(bad) = options.workloads.iter().find(|name| !known(name)) {
            return Err(format!("unknown workload {bad}; see cargo xtask bench --help").into());
        }
        Ok(options)
    }
}

pub(crate) fn run(args: &[String]) -> Result<()> {
    match args.split_first() {
        Some((what, rest)) if what == "nbd" && rest.iter().all(|a| a != "--help" && a != "-h") => {
            nbd(Options::parse(rest)?)
        }
        _ => {
            print!("{HELP}");
            Ok(())
        }
    }
}

fn nbd(options: Options) -> Result<()> {
    let sh = Shell::new()?;
    cmd!(sh, "cargo build --release -p tapdisk").run()?;
    let programs = crate::target_dir(&sh)?.join("release");
    let mut servers = vec![ServerSpec::new(
        "tapdisk",
        &format!("{}/tapdisk serve --nbd unix:{{socket}} {{format}}:{{image}}", programs.display()),
    )];
    servers.extend(if options.servers.is_empty() { qemu(&sh) } else { options.servers.clone() });
    let place = options.dir.join(format!("xtask-bench-{}", std::process::id()));
    std::fs::create_dir_all(&place)?;
    let bench = Bench { sh, options, servers, programs, place };
    let report = bench.all();
    let _ = std::fs::remove_dir_all(bench.maps_place());
    // Images are large: they are removed whatever happened.
    std::fs::remove_dir_all(&bench.place)?;
    let report = report?;
    report.print();
    if let Some(file) = &bench.options.json {
        std::fs::write(file, serde_json::to_string_pretty(&report.json())?)?;
    }
    Ok(())
}

/// qemu-nbd in the modes that differ.
fn qemu(sh: &Shell) -> Vec<ServerSpec> {
    if cmd!(sh, "qemu-nbd --version").quiet().ignore_stdout().ignore_stderr().run().is_err() {
        eprintln!("xtask: qemu-nbd is not installed; name a server to compare with by --server");
        return Vec::new();
    }
    let mode = |aio: &str| {
        let command = format!(
            "qemu-nbd --persistent --shared=0 --cache=none --aio={aio} -f {{format}} -k {{socket}} {{image}}"
        );
        ServerSpec::new(&format!("qemu-nbd {aio}"), &command)
    };
    ["native", "io_uring", "threads"].into_iter().map(mode).collect()
}

struct Bench {
    sh: Shell,
    options: Options,
    servers: Vec<ServerSpec>,
    programs: PathBuf,
    place: PathBuf,
}

impl Bench {
    fn all(&self) -> Result<Report> {
        let mut report = Report::default();
        let chosen = |name: &str| {
            self.options.workloads.is_empty() || self.options.workloads.iter().any(|other| other == name)
        };
        let loads: Vec<&Workload> = WORKLOADS.iter().filter(|w| chosen(w.name)).collect();
        for format in &self.options.formats {
            if !loads.is_empty() {
                let full = self.image(format, "full")?;
                self.fill(&full, format)?;
                for workload in &loads {
                    self.workload(&mut report, format, workload, &full)?;
                }
                std::fs::remove_file(full)?;
            }
            if format == "raw" {
                for map in MAPS.iter().filter(|map| chosen(map.name)) {
                    report.rows.extend(self.map(map)?);
                }
            }
        }
        Ok(report)
    }

    fn workload(&self, report: &mut Report, format: &str, workload: &Workload, full: &Path) -> Result<()> {
        let mut rows: Vec<Row> =
            self.servers.iter().map(|s| Row::new(format, workload.name, &s.name)).collect();
        for round in 0..=self.options.rounds {
            // The last round only counts calls, because counting costs time.
            let counting = round == self.options.rounds;
            let mut turn: Vec<usize> = (0..self.servers.len()).collect();
            if round % 2 == 1 {
                turn.reverse();
            }
            eprint!("\r{format} {}: round {round} of {}   ", workload.name, self.options.rounds);
            for at in turn {
                let image = if workload.fresh { self.image(format, "fresh")? } else { full.to_owned() };
                let measured = self.measure(&self.servers[at], workload, &image, format, counting);
                let measured =
                    measured.map_err(|e| format!("{}: {}: {e}", self.servers[at].name, workload.name))?;
                rows[at].add(measured);
                if workload.fresh {
                    std::fs::remove_file(&image)?;
                }
            }
        }
        eprintln!();
        report.rows.extend(rows);
        Ok(())
    }

    fn measure(
        &self,
        server: &ServerSpec,
        workload: &Workload,
        image: &Path,
        format: &str,
        counting: bool,
    ) -> Result<Measured> {
        let socket = self.place.join("socket");
        let running = server.start(&socket, image, format)?;
        let mut client = Client::connect(&socket, Duration::from_secs(10))?;
        let pieces = self.options.size_mib * (1 << 20) / u64::from(workload.load.size_bytes);
        let mut load = workload.load;
        load.requests = (load.requests * self.options.percent / 100).max(load.depth as u64 * 4);
        if load.order == Order::Scattered {
            load.requests = load.requests.min(pieces);
        } else {
            // Warms up caches and threads.
            client.run(&Load { requests: load.requests / 20 + load.depth as u64, ..load })?;
        }
        let calls = if counting { running.count_calls() } else { None };
        let before = running.cpu()?;
        let seen = client.run(&load)?;
        let cpu = running.cpu()? - before;
        let calls = calls.and_then(|calls| calls.stop());
        Ok(Measured { counting, requests: seen.requests, cpu, calls, p50: seen.p50, elapsed: seen.elapsed })
    }

    /// A new, empty image.
    fn image(&self, format: &str, name: &str) -> Result<PathBuf> {
        let path = self.place.join(format!("{name}.{format}"));
        let (tool, size) = (self.programs.join("tap-img"), format!("{}M", self.options.size_mib));
        cmd!(self.sh, "{tool} create -q -f {format} {path} {size}").quiet().run()?;
        Ok(path)
    }

    /// Writes the whole image once.
    fn fill(&self, image: &Path, format: &str) -> Result<()> {
        let socket = self.place.join("socket");
        let _running = self.servers[0].start(&socket, image, format)?;
        let mut client = Client::connect(&socket, Duration::from_secs(10))?;
        client.run(&load(Kind::Write, Order::Sequential, 1 << 20, 4, self.options.size_mib))?;
        Ok(())
    }
}
