//! The cost of file operations of 4 KiB: CPU per operation, including threads and kernel workers of this process.
//!
//! `cargo run --release -p tap-linux --example file_cost -- FOLDER [io_uring|threads] [direct]`

use std::cell::Cell;
use std::rc::Rc;
use tap_host::{File, Files, IoBuf, IoVec, OpenMode, Tasks};
use tap_linux::{AioEngine, LinuxHost, Options, run};

const FILE_BYTES: u64 = 512 << 20;
const BLOCK: u64 = 4096;

#[derive(Clone, Copy)]
enum What {
    Read,
    Write,
}

fn cpu_us() -> f64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: `usage` has room for what is written.
    let result = unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) };
    assert_eq!(result, 0);
    // SAFETY: all its bytes were zeroed, and any are valid.
    let usage = unsafe { usage.assume_init() };
    let us = |t: libc::timeval| t.tv_sec as f64 * 1e6 + t.tv_usec as f64;
    us(usage.ru_utime) + us(usage.ru_stime)
}

async fn turns(host: LinuxHost, file: <LinuxHost as Files>::File, what: What, depth: u64, ops: u64) {
    let left = Rc::new(Cell::new(depth));
    for task in 0..depth {
        let (file, left) = (file.clone(), Rc::clone(&left));
        host.spawn("load", task, async move {
            let mut bufs = IoVec::from_iter([IoBuf::unpooled(BLOCK as usize).unwrap()]);
            let mut state = task + 1;
            for _ in 0..ops / depth {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let offset = (state >> 33) % (FILE_BYTES / BLOCK) * BLOCK;
                let (count, back) = match what {
                    What::Read => file.read_at(offset, bufs).await,
                    What::Write => file.write_at(offset, bufs).await,
                };
                assert_eq!(count, Ok(BLOCK as usize));
                bufs = back;
            }
            left.set(left.get() - 1);
        });
    }
    while left.get() > 0 {
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let path = format!("{}/file_cost.tmp", args.first().expect("a folder"));
    let has = |word| args.iter().any(|a| a == word);
    let aio = if has("threads") { AioEngine::Threads } else { AioEngine::Auto };
    let direct = has("direct");
    let name = path.clone();
    run(&Options { aio, ..Options::default() }, |host| async move {
        let file = host.open(&name, OpenMode { direct, ..OpenMode::CREATE }).await.unwrap();
        for mib in 0..FILE_BYTES >> 20 {
            let buf = IoBuf::unpooled(1 << 20).unwrap();
            file.write_at(mib << 20, IoVec::from_iter([buf])).await.0.unwrap();
        }
        let ops = if direct { 30_000 } else { 200_000 };
        for (what, text) in [(What::Read, "read"), (What::Write, "write")] {
            for depth in [1, 32] {
                turns(host.clone(), file.clone(), what, depth, ops / 10).await;
                let (before, start) = (cpu_us(), std::time::Instant::now());
                turns(host.clone(), file.clone(), what, depth, ops).await;
                let (cpu, wall) = (cpu_us() - before, start.elapsed().as_secs_f64() * 1e6);
                let (cpu, wall) = (cpu / ops as f64, wall / ops as f64);
                println!("{text:5} depth {depth:2}: {cpu:6.2} us CPU, {wall:6.2} us wall for each");
            }
        }
    })
    .unwrap();
    std::fs::remove_file(path).unwrap();
}
