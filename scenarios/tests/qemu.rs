//! QEMU as a second opinion: our driver reads what QEMU writes, and QEMU reads what our driver writes, byte for byte.
//!
//! ```text
//!   qemu-img create, qemu-io write ──► files ──► simulated storage ──► our driver ──► bytes == qemu-img convert
//!   our driver: create, write      ──► simulated storage ──► files ──► qemu-img compare with what was written
//! ```
//!
//! Without qemu-img or qemu-io the tests report themselves as ignored. (`qemu-img check` does not support qcow version
//! 1; the independent walker checks the metadata instead.)

use kernel_model::SimHost;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use scenarios::formats;
use scenarios::guest::{DirectDisk, GuestDisk};
use scenarios::limits::StackLimits;
use scenarios::stack::Stack;
use scenarios::world::{RunOptions, World};
use sim::{Config, Sim};
use std::path::Path;
use std::process::{Command, ExitCode};
use tap_host::SectorRange;
use tap_images::formats::qcow;
use tap_images::{Formats, ImageSpec, NewImage};

const SECTOR: u64 = 512;
const TOP: &str = "/images/top.qcow";
const BASE: &str = "/images/base.raw";

fn main() -> ExitCode {
    let args = Arguments::from_args();
    let sizes = [("1m", 1 << 20), ("odd", (3 << 20) + 5 * SECTOR), ("10m", 10 << 20)];
    let mut trials = Vec::new();
    for (name, size) in sizes {
        for backing in [false, true] {
            let kind = if backing { "overlay" } else { "plain" };
            let mut add = |group: &str, test: fn(Case) -> Result<(), Failed>| {
                let name = format!("{group}::{kind}-{name}");
                trials.push(Trial::ignorable_test(name, move || with_qemu(Case { size, backing }, test)));
            };
            add("reads_what_qemu_wrote", reads);
            add("writes_on_what_qemu_made", writes);
            add("qemu_reads_what_was_made", makes);
        }
    }
    libtest_mimic::run(&args, trials).exit_code()
}

/// Parameters of an image.
#[derive(Clone, Copy)]
struct Case {
    size: u64,
    backing: bool,
}

impl Case {
    /// Cluster size as qemu-img chooses it.
    fn cluster(self) -> u64 {
        if self.backing { 512 } else { 4096 }
    }
}

fn with_qemu(case: Case, test: fn(Case) -> Result<(), Failed>) -> Result<Completion, Failed> {
    for tool in ["qemu-img", "qemu-io"] {
        if Command::new(tool).arg("--version").output().is_err() {
            return Ok(Completion::ignored_with(format!("{tool} is not installed")));
        }
    }
    test(case)?;
    Ok(Completion::Completed)
}

/// Real files, and a stream of random numbers.
struct Bench {
    folder: tempfile::TempDir,
    rng: ChaCha8Rng,
}

impl Bench {
    fn new(seed: u64) -> Result<Self, Failed> {
        Ok(Self { folder: tempfile::tempdir()?, rng: ChaCha8Rng::seed_from_u64(seed) })
    }

    fn below(&mut self, n: u64) -> u64 {
        self.rng.next_u64() % n
    }

    fn random(&mut self, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.rng.fill_bytes(&mut bytes);
        bytes
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn tool(&self, tool: &str, args: &[&str]) -> Result<String, Failed> {
        let output = Command::new(tool).args(args).current_dir(self.path()).output()?;
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        // qemu-io says "failed" and exits with 0.
        if output.status.success() && !text.contains("failed") {
            return Ok(text.into_owned());
        }
        Err(format!("{tool} {}: {text}", args.join(" ")).into())
    }

    /// Makes a backing file that is slightly shorter than the disk, with holes.
    fn make_base(&mut self, size: u64) -> Result<(), Failed> {
        let mut base = self.random(size - 3 * SECTOR);
        for hole in base.chunks_mut(7000).step_by(3) {
            hole.fill(0);
        }
        Ok(std::fs::write(self.path().join("base.raw"), base)?)
    }

    /// Makes an image with QEMU, with patterns, random bytes and compressed clusters in many places.
    fn make_top(&mut self, case: Case) -> Result<(), Failed> {
        let size = case.size.to_string();
        let mut args = vec!["create", "-q", "-f", "qcow"];
        if case.backing {
            self.make_base(case.size)?;
            args.extend(["-b", "base.raw", "-F", "raw"]);
        }
        args.extend(["top.qcow", &size]);
        self.tool("qemu-img", &args)?;
        let noise = self.random(64 << 10);
        std::fs::write(self.path().join("noise"), noise)?;
        let mut commands = Vec::new();
        for i in 0..60 {
            let cluster = case.cluster();
            commands.push("-c".to_owned());
            if i % 3 == 2 {
                let at = self.below(case.size / cluster) * cluster;
                commands.push(format!("write -c -P {} {at} {cluster}", 1 + i));
                continue;
            }
            let len = SECTOR * (1 + self.below(100));
            let at = SECTOR * self.below((case.size - len) / SECTOR);
            let what = if i % 3 == 0 { format!("-P {}", 100 + i) } else { "-s noise".to_owned() };
            commands.push(format!("write {what} {at} {len}"));
        }
        let mut args = vec!["-t", "unsafe", "-f", "qcow"];
        args.extend(commands.iter().map(String::as_str));
        args.push("top.qcow");
        self.tool("qemu-io", &args)?;
        Ok(())
    }

    /// The disk's bytes as QEMU sees them.
    fn converted(&self) -> Result<Vec<u8>, Failed> {
        self.tool("qemu-img", &["convert", "-f", "qcow", "-O", "raw", "top.qcow", "view.raw"])?;
        Ok(std::fs::read(self.path().join("view.raw"))?)
    }

    /// Loads the real files into a simulated world.
    fn load(&self, world: &World) -> Result<(), Failed> {
        for (name, path) in [("top.qcow", TOP), ("base.raw", BASE)] {
            let real = self.path().join(name);
            if real.exists() {
                world.storage.put_bytes(path, &std::fs::read(real)?);
            }
        }
        Ok(())
    }

    /// Saves the simulated image to a file, and has QEMU compare it with `expected`.
    fn compare(&self, world: &World, expected: &[u8]) -> Result<(), Failed> {
        let image = world.storage.bytes(TOP).ok_or("the image is gone")?;
        std::fs::write(self.path().join("top.qcow"), image)?;
        std::fs::write(self.path().join("expected.raw"), expected)?;
        let text =
            self.tool("qemu-img", &["compare", "-f", "qcow", "-F", "raw", "top.qcow", "expected.raw"])?;
        if !text.contains("identical") {
            return Err(text.into());
        }
        let content = world.storage.content(TOP).ok_or("the image is gone")?;
        let walked = formats::of(qcow::FORMAT.into()).walk(&content).ok_or("qcow has metadata")?;
        walked.map_err(|(rule, text)| format!("{rule}: {text}"))?;
        Ok(())
    }

    /// Random operations on `disk`, repeated on `expected`.
    async fn work(&mut self, disk: &DirectDisk, expected: &mut [u8]) -> Result<(), Failed> {
        let sectors = expected.len() as u64 / SECTOR;
        for _ in 0..200 {
            let count = (1 + self.below(64)).min(sectors);
            let range = SectorRange::new(self.below(sectors - count + 1), count as u32);
            let at = (range.start.0 * SECTOR) as usize..((range.start.0 + count) * SECTOR) as usize;
            match self.below(8) {
                0 => disk.flush().await?,
                1 | 2 => {
                    let same = disk.read(range, |bytes| *bytes == expected[at]).await?;
                    if !same {
                        return Err(format!("reading {range} returned wrong bytes").into());
                    }
                }
                _ => {
                    let bytes = self.random(range.len_bytes());
                    disk.write(range, |buf| buf.copy_from_slice(&bytes)).await?;
                    expected[at].copy_from_slice(&bytes);
                }
            }
        }
        Ok(())
    }
}

/// A world without faults.
fn simulate<F: Future<Output = Result<(), Failed>> + 'static>(
    seed: u64,
    body: impl FnOnce(World) -> F,
) -> Result<(), Failed> {
    let sim = Sim::new(&Config { faults: false, ..Config::new(seed) });
    let world = World::new(&sim, Default::default(), RunOptions::default());
    sim.run(body(world)).map_err(|stall| scenarios::stall::describe(&stall))?
}

async fn open(world: &World) -> Result<(Stack, DirectDisk), Failed> {
    let host = SimHost::start(&world.kernel, &world.xen, "tapdisk", 0);
    let spec = ImageSpec { format: qcow::FORMAT.into(), path: TOP.into() };
    let stack = Stack::open(&host, world, &spec, &StackLimits::draw(world)).await?;
    let disk = DirectDisk::new(stack.node(), 1 << 20);
    Ok((stack, disk))
}

async fn read_all(disk: &DirectDisk, size: u64) -> Result<Vec<u8>, Failed> {
    let mut all = Vec::new();
    let mut at = 0;
    while at < size / SECTOR {
        let count = (size / SECTOR - at).min(u64::from(disk.max_sectors()));
        disk.read(SectorRange::new(at, count as u32), |bytes| all.extend_from_slice(bytes)).await?;
        at += count;
    }
    Ok(all)
}

fn first_difference(a: &[u8], b: &[u8]) -> Result<(), Failed> {
    if a.len() != b.len() {
        return Err(format!("{} bytes instead of {}", a.len(), b.len()).into());
    }
    match a.iter().zip(b).position(|(x, y)| x != y) {
        None => Ok(()),
        Some(at) => Err(format!("byte {at} is {:#x} instead of {:#x}", a[at], b[at]).into()),
    }
}

/// QEMU writes, our driver reads.
fn reads(case: Case) -> Result<(), Failed> {
    for seed in 0..2 {
        let mut bench = Bench::new(seed)?;
        bench.make_top(case)?;
        let expected = bench.converted()?;
        simulate(seed, |world| async move {
            bench.load(&world)?;
            let (stack, disk) = open(&world).await?;
            first_difference(&read_all(&disk, case.size).await?, &expected)?;
            Ok(stack.disk.close().await?)
        })?;
    }
    Ok(())
}

/// QEMU writes, our driver writes more, QEMU reads.
fn writes(case: Case) -> Result<(), Failed> {
    for seed in 10..12 {
        let mut bench = Bench::new(seed)?;
        bench.make_top(case)?;
        let mut expected = bench.converted()?;
        simulate(seed, |world| async move {
            bench.load(&world)?;
            let (stack, disk) = open(&world).await?;
            bench.work(&disk, &mut expected).await?;
            first_difference(&read_all(&disk, case.size).await?, &expected)?;
            stack.disk.close().await?;
            bench.compare(&world, &expected)
        })?;
    }
    Ok(())
}

/// Our driver creates and writes, QEMU reads.
fn makes(case: Case) -> Result<(), Failed> {
    for (seed, cluster_bits, l2_bits) in [(20, None, None), (21, Some(9), Some(6)), (22, Some(16), Some(13))]
    {
        let mut bench = Bench::new(seed)?;
        let mut expected = vec![0; case.size as usize];
        if case.backing {
            bench.make_base(case.size)?;
            let base = std::fs::read(bench.path().join("base.raw"))?;
            expected[..base.len()].copy_from_slice(&base);
        }
        simulate(seed, |world| async move {
            bench.load(&world)?;
            let backing = case.backing.then(|| "base.raw".to_owned());
            let option =
                |name: &str, bits: Option<u32>| Some((name.to_owned(), (1_u32 << bits?).to_string()));
            let options =
                option("cluster_size", cluster_bits).into_iter().chain(option("l2_entries", l2_bits));
            let options = options.collect();
            let image = NewImage { size_bytes: case.size, backing, existing: None, options };
            let host = SimHost::start(&world.kernel, &world.xen, "tap-img", 0);
            Formats::shipped().create(&host, qcow::FORMAT, TOP, image).await?;
            let (stack, disk) = open(&world).await?;
            bench.work(&disk, &mut expected).await?;
            stack.disk.close().await?;
            bench.compare(&world, &expected)
        })?;
    }
    Ok(())
}
