//! `disk-load`: load for a block device, with a record of what the device must hold.
//!
//! ```text
//!   device   |  lane 0  |  lane 1  |  lane 2  |  lane 0  |  lane 1  | ...      stripes of 259 sectors
//!                 |          |
//!              one request at a time each: write, read, flush; as many lanes as requests in flight
//! ```
//!
//! It runs in guests of the Xen host (`scripts/xen-host`), which have no libraries: `cargo xtask xen-host` links it
//! statically.
//!
//! # Contract
//!
//! * No sector is in two requests at once, so each lane knows what each of its sectors must hold. Stripes end in the
//!   middle of pages and clusters, so that lanes still share them.
//! * `verify` compares every read, and the whole device at the end. A sector contains its own number and generation;
//!   one that was never written must be zero, so the disk has to be new.
//! * `measure` makes requests of one size, half of them reads, and compares nothing.
//! * What it prints begins with `@load`. Exit status: 0 if nothing was wrong, 1 after a mismatch or an error of the
//!   device, 2 if the command line is invalid.

mod lane;
mod options;
mod pattern;

use lane::{LARGEST_SECTORS, Lane, STRIPE_SECTORS, Shared};
use options::{HELP, Options};
use pattern::{Buffer, SECTOR_BYTES};
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::ExitCode;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// O_DIRECT of Linux on x86-64: bypasses the guest's page cache.
const DIRECT: i32 = 0o40_000;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let options = match Options::parse(&args) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("disk-load: {error}\n\n{HELP}");
            return ExitCode::from(2);
        }
    };
    match load(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("@load failed to {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the load; false if a read returned something other than what was written.
fn load(options: &Options) -> Result<bool> {
    let name = &options.device;
    let say = |e| format!("open {name}: {e}");
    let mut device =
        OpenOptions::new().read(true).write(true).custom_flags(DIRECT).open(name).map_err(say)?;
    let size_sectors = device.seek(SeekFrom::End(0)).map_err(say)? / SECTOR_BYTES as u64;
    if size_sectors / STRIPE_SECTORS < options.depth {
        return Err(format!("use {name}: {size_sectors} sectors are too few for that depth").into());
    }
    // Lives as long as the process: the thread that reads standard input may never end.
    let shared: &'static Shared = Box::leak(Box::default());
    if options.until_told {
        std::thread::spawn(|| match std::io::stdin().read_line(&mut String::new()) {
            Ok(_) => shared.stop.store(true, Relaxed),
            Err(e) => println!("@load failed to read standard input: {e}"),
        });
    }
    println!("@load begins: {size_sectors} sectors, depth {}", options.depth);
    let start = Instant::now();
    let lanes =
        (0..options.depth).map(|number| Lane::new(number, size_sectors, &device, options, shared)).collect();
    let lanes = run(lanes, options, shared)?;
    println!("@load ends after {} ms: {shared}", start.elapsed().as_millis());
    if options.verify {
        compare_all(&device, size_sectors, &lanes, shared)?;
        println!("@load compared {size_sectors} sectors: {shared}");
    }
    Ok(shared.mismatches.load(Relaxed) == 0)
}

/// Runs each lane on a thread until it should stop, and prints progress every second.
fn run<'a>(lanes: Vec<Lane<'a>>, options: &Options, shared: &Shared) -> Result<Vec<Lane<'a>>> {
    let (running, ended) = channel::<()>();
    let end = options.seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    std::thread::scope(|scope| {
        let start = |mut lane: Lane<'a>| {
            let running = running.clone();
            scope.spawn(move || {
                let result = lane.run();
                if result.is_err() {
                    shared.stop.store(true, Relaxed);
                }
                drop(running);
                result.map(|()| lane)
            })
        };
        let threads: Vec<_> = lanes.into_iter().map(start).collect();
        drop(running);
        while ended.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout) {
            if end.is_some_and(|end| Instant::now() >= end) {
                shared.stop.store(true, Relaxed);
            }
            // Silent while measuring: a line costs the host more than a request.
            if options.verify {
                println!("@load goes on: {shared}");
            }
        }
        threads.into_iter().map(|thread| thread.join().map_err(|_| "run a lane: it panicked")?).collect()
    })
}

/// Reads the device from its first to its last sector.
fn compare_all(device: &File, size_sectors: u64, lanes: &[Lane<'_>], shared: &Shared) -> Result<()> {
    let mut buffer = Buffer::new(LARGEST_SECTORS);
    let mut at = 0;
    while at < size_sectors {
        let sectors = LARGEST_SECTORS.min(size_sectors - at);
        let bytes = buffer.sectors(0, sectors);
        device
            .read_exact_at(bytes, at * SECTOR_BYTES as u64)
            .map_err(|e| format!("read {sectors} sectors at {at}: {e}"))?;
        for (sector, found) in (at..).zip(bytes.chunks_exact(SECTOR_BYTES)) {
            let lane = &lanes[(sector / STRIPE_SECTORS) as usize % lanes.len()];
            lane.known.compare(sector, found, shared);
        }
        at += sectors;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE_SECTORS: u64 = 8000;

    /// Loads a file, changes one sector without the load's knowledge, and returns the mismatches before and after.
    fn mismatches(depth: u64, changed_sector: u64) -> (u64, u64) {
        let device = tempfile::tempfile().expect("a file");
        device.set_len(SIZE_SECTORS * SECTOR_BYTES as u64).expect("made larger");
        let line = format!("verify file --requests 300 --depth {depth}");
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let options = Options::parse(&words).expect("good");
        let shared = Shared::default();
        let lanes = (0..depth).map(|n| Lane::new(n, SIZE_SECTORS, &device, &options, &shared)).collect();
        let lanes = run(lanes, &options, &shared).expect("no error");
        compare_all(&device, SIZE_SECTORS, &lanes, &shared).expect("read");
        let before = shared.mismatches.load(Relaxed);
        let place = changed_sector * SECTOR_BYTES as u64;
        device.write_all_at(&[0xff], place + 100).expect("written");
        compare_all(&device, SIZE_SECTORS, &lanes, &shared).expect("read");
        (before, shared.mismatches.load(Relaxed))
    }

    #[test]
    fn a_changed_byte_is_seen_and_nothing_else() {
        for depth in [1, 5] {
            assert_eq!(mismatches(depth, 4000), (0, 1), "depth {depth}");
            // After the last whole stripe.
            assert_eq!(mismatches(depth, SIZE_SECTORS - 1), (0, 1), "depth {depth}");
        }
    }
}
