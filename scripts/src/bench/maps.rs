//! What a map of a disk costs: clients that ask for all of its extents.

use super::report::{Measured, Row};
use super::{Bench, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// One line of work: a client, and the file that it looks at.
pub(super) struct Map {
    pub(super) name: &'static str,
    client: Client,
    file: Shape,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Client {
    /// `nbdinfo --map --totals`: many extents of a range at a time.
    NbdInfo,
    /// `qemu-img map`: one extent at a time.
    QemuImg,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// 10 TiB with a thousand pieces of data.
    Sparse,
    /// 30,000 extents, data and holes in turn.
    Runs,
}

pub(super) const MAPS: [Map; 4] = [
    Map { name: "map-sparse-nbdinfo", client: Client::NbdInfo, file: Shape::Sparse },
    Map { name: "map-sparse-qemu", client: Client::QemuImg, file: Shape::Sparse },
    Map { name: "map-runs-nbdinfo", client: Client::NbdInfo, file: Shape::Runs },
    Map { name: "map-runs-qemu", client: Client::QemuImg, file: Shape::Runs },
];

const SPARSE_BYTES: u64 = 10 << 40;
const PIECES: u64 = 1000;
const RUNS: u64 = 30_000;
const BLOCK: u64 = 4096;

impl Shape {
    fn make(self, path: &Path) -> Result<()> {
        let file = File::create(path)?;
        let block = [0x5a; BLOCK as usize];
        match self {
            Shape::Sparse => {
                file.set_len(SPARSE_BYTES)?;
                for piece in 0..PIECES {
                    // Uneven distances.
                    let at = SPARSE_BYTES / PIECES * piece + piece * piece % 997 * (1 << 20);
                    file.write_all_at(&block, at / BLOCK * BLOCK)?;
                }
            }
            Shape::Runs => {
                file.set_len(RUNS * BLOCK)?;
                for run in (0..RUNS).step_by(2) {
                    file.write_all_at(&block, run * BLOCK)?;
                }
            }
        }
        // Otherwise the first server would pay for the allocation.
        file.sync_all()?;
        Ok(())
    }
}

impl Client {
    fn command(self, socket: &Path) -> Command {
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        let mut command = match self {
            Client::NbdInfo => Command::new("nbdinfo"),
            Client::QemuImg => Command::new("qemu-img"),
        };
        match self {
            Client::NbdInfo => command.args(["--map", "--totals", &uri]),
            Client::QemuImg => command.args(["map", "-f", "raw", "--output=json", &uri]),
        };
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    fn is_there(self) -> bool {
        let program = if self == Client::NbdInfo { "nbdinfo" } else { "qemu-img" };
        let asked =
            Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        asked.is_ok_and(|status| status.success())
    }
}

impl Bench {
    /// The figures of `map` for each server. The file is on the file system of the target folder: on a tmpfs a look at
    /// it costs next to nothing.
    pub(super) fn map(&self, map: &Map) -> Result<Vec<Row>> {
        if !map.client.is_there() {
            eprintln!("xtask: {} is left out: its client is not installed", map.name);
            return Ok(Vec::new());
        }
        std::fs::create_dir_all(self.maps_place())?;
        let file = self.maps_place().join("map.raw");
        map.file.make(&file)?;
        let mut rows: Vec<Row> =
            self.servers.iter().map(|server| Row::new("raw", map.name, &server.name)).collect();
        for round in 0..=self.options.rounds {
            let counting = round == self.options.rounds;
            let mut turn: Vec<usize> = (0..self.servers.len()).collect();
            if round % 2 == 1 {
                turn.reverse();
            }
            eprint!("\rraw {}: round {round} of {}   ", map.name, self.options.rounds);
            for at in turn {
                let measured = self.measure_map(map, at, &file, counting);
                rows[at].add(measured.map_err(|e| format!("{}: {}: {e}", self.servers[at].name, map.name))?);
            }
        }
        eprintln!();
        std::fs::remove_file(file)?;
        Ok(rows)
    }

    /// The folder of the files that are looked at.
    pub(super) fn maps_place(&self) -> PathBuf {
        self.programs.join(format!("xtask-bench-{}", std::process::id()))
    }

    fn measure_map(&self, map: &Map, server: usize, file: &Path, counting: bool) -> Result<Measured> {
        let socket = self.place.join("socket");
        let running = self.servers[server].start(&socket, file, "raw")?;
        // It listens once a connection succeeds.
        drop(super::Client::connect(&socket, std::time::Duration::from_secs(10))?);
        let calls = if counting { running.count_calls() } else { None };
        let before = running.cpu()?;
        let start = Instant::now();
        let status = map.client.command(&socket).status()?;
        let elapsed = start.elapsed();
        let cpu = running.cpu()? - before;
        let calls = calls.and_then(|calls| calls.stop());
        if !status.success() {
            return Err(format!("the client ended with {status}").into());
        }
        Ok(Measured { counting, requests: 1, cpu, calls, p50: elapsed, elapsed })
    }
}
