//! tapdisk is killed at random moments, again and again: what was answered is there when it is back.
//!
//! The page cache outlives the process, so every answered write counts, flushed or not. A write in flight may or may
//! not have taken effect; which one is remembered once it was seen.

use crate::client::{Client, FLUSH, WRITE};
use crate::server::{MASON, Server, TAP_IMG, tool};
use crate::{Add, Done};
use libtest_mimic::Failed;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::path::Path;

const SECTOR: usize = 512;
pub(crate) const DISK_BYTES: usize = SECTORS as usize * SECTOR;
const SECTORS: u64 = (4 << 20) / SECTOR as u64;
const DEPTH: usize = 16;
/// Kills of each disk; five disks make 250.
const KILLS: u64 = 50;

pub(crate) fn tests(add: Add) {
    for (name, direct) in
        [("raw", false), ("raw", true), ("qcow", false), ("overlay", false), ("graph", false)]
    {
        let test = format!("killed_and_started_again::{name}{}", if direct { "-direct" } else { "" });
        add(test, &[], Box::new(move || killed(name, direct)));
    }
}

/// What the disk holds, sector by sector: the number of the write that was last answered, 0 for none.
pub(crate) struct Model {
    known: Vec<u64>,
    next: u64,
    rng: ChaCha8Rng,
}

/// An unanswered write.
pub(crate) struct Flying {
    number: u64,
    start: u64,
    count: u64,
}

impl Model {
    /// A disk of zeros.
    pub(crate) fn new(seed: u64) -> Self {
        Self { known: vec![0; SECTORS as usize], next: 1, rng: ChaCha8Rng::seed_from_u64(seed) }
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.rng.next_u64() % n
    }

    fn payload(number: u64, start: u64, count: u64) -> Vec<u8> {
        let sector = |s: u64| {
            let mut bytes = [number as u8; SECTOR];
            bytes[..8].copy_from_slice(&number.to_le_bytes());
            bytes[8..16].copy_from_slice(&s.to_le_bytes());
            bytes
        };
        (start..start + count).flat_map(sector).collect()
    }

    /// A range that overlaps no write in flight: the result of overlapping writes is not determined.
    fn place(&mut self, flying: &BTreeMap<u64, Flying>) -> Option<(u64, u64)> {
        let count = 1 + self.below(24);
        let start = if self.below(2) == 0 { self.below(SECTORS / 16) } else { self.below(SECTORS) };
        let count = count.min(SECTORS - start);
        let meets = |f: &Flying| f.start < start + count && start < f.start + f.count;
        (!flying.values().any(meets)).then_some((start, count))
    }

    /// Writes until `answers` replies have arrived, and returns the writes then in flight.
    pub(crate) fn write_until(
        &mut self,
        client: &mut Client,
        answers: u64,
    ) -> Result<BTreeMap<u64, Flying>, Failed> {
        let mut flying = BTreeMap::new();
        let (mut answered, mut sent) = (0, 0_u64);
        while answered < answers {
            while flying.len() < DEPTH {
                let number = self.next;
                self.next += 1;
                if self.below(40) == 0 {
                    client.send(FLUSH, number, 0, 0, &[])?;
                    flying.insert(number, Flying { number, start: 0, count: 0 });
                } else if let Some((start, count)) = self.place(&flying) {
                    client.send(
                        WRITE,
                        number,
                        start * SECTOR as u64,
                        0,
                        &Self::payload(number, start, count),
                    )?;
                    flying.insert(number, Flying { number, start, count });
                } else {
                    break;
                }
                sent += 1;
            }
            let reply = client.reply()?;
            let Some(done) = flying.remove(&reply.cookie) else {
                return Err("a reply without a request".into());
            };
            if reply.error != 0 {
                return Err(format!("a request failed with {}", reply.error).into());
            }
            self.known[done.start as usize..(done.start + done.count) as usize].fill(done.number);
            answered += 1;
        }
        assert!(sent >= answered);
        Ok(flying)
    }

    /// Reads everything: each sector holds the last answered write, or one that was in flight over it.
    pub(crate) fn check(&mut self, client: &mut Client, flying: &BTreeMap<u64, Flying>, base: &[u8]) -> Done {
        let all = client.read(0, (SECTORS * SECTOR as u64) as u32)?;
        for (s, bytes) in all.chunks(SECTOR).enumerate() {
            let known = self.known[s];
            let expected = |number: u64| match number {
                0 => base[s * SECTOR..(s + 1) * SECTOR].to_vec(),
                number => Self::payload(number, s as u64, 1),
            };
            if bytes == expected(known) {
                continue;
            }
            let over = |f: &&Flying| (f.start..f.start + f.count).contains(&(s as u64));
            let Some(new) = flying.values().filter(over).find(|f| bytes == expected(f.number)) else {
                let found = u64::from_le_bytes(bytes[..8].try_into()?);
                return Err(format!("sector {s} holds {found:#x}, write {known} was answered").into());
            };
            self.known[s] = new.number;
        }
        Ok(())
    }
}

/// A graph of 4 MiB: a stripe over a raw and a qcow image, then a qcow image over a base of 1 MiB.
const GRAPH: &str = "\
mason 1;

vm :: disk(size = 4 MiB);
vm -> qos :: throttle(rate = 400 MiB/s, burst = 64 KiB) -> both :: concat() => striped, top :: qcow(\"top.qcow\");
striped :: stripe(chunk = 24 KiB);
striped => a :: raw(\"a.img\"), b :: qcow(\"b.qcow\");
readonly base :: raw(\"base.raw\");
top [backing] -> base;
";

/// Makes the images of [`GRAPH`] in `folder`, and returns what its disk holds, and how it is served.
fn graph(folder: &Path) -> Result<(Vec<u8>, Vec<String>), Failed> {
    let at = |name: &str| folder.join(name).display().to_string();
    let mut disk = vec![0; DISK_BYTES];
    disk[3 << 20..].iter_mut().enumerate().for_each(|(i, b)| *b = (i / SECTOR % 251) as u8);
    std::fs::write(at("base.raw"), &disk[3 << 20..])?;
    tool(TAP_IMG, &["create", "-q", &at("a.img"), "1536K"])?;
    tool(TAP_IMG, &["create", "-q", "-f", "qcow", &at("b.qcow"), "1536K"])?;
    tool(TAP_IMG, &["create", "-q", "-f", "qcow", "-b", "base.raw", "-F", "raw", &at("top.qcow")])?;
    std::fs::write(at("disk.mason"), GRAPH)?;
    let checked = tool(MASON, &["check", &at("disk.mason")])?;
    assert!(checked.starts_with("vm: 4 MiB, 7 nodes below\n"), "{checked}");
    let mut args = vec![format!("mason:{}", at("disk.mason"))];
    for (format, name) in [("raw", "a.img"), ("qcow", "b.qcow"), ("qcow", "top.qcow"), ("raw", "base.raw")] {
        args.extend(["--backing".to_owned(), format!("{format}:{}", at(name))]);
    }
    Ok((disk, args))
}

fn killed(kind: &str, direct: bool) -> Done {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    let show = |path: &Path| path.display().to_string();
    let mut base = vec![0; SECTORS as usize * SECTOR];
    let image = path("disk.img");
    let mut args = vec!["--backing".to_owned(), "raw".to_owned()];
    match kind {
        "graph" => {
            (base, args) = graph(folder.path())?;
            String::new()
        }
        "raw" => tool(TAP_IMG, &["create", "-q", &show(&image), "4M"])?,
        "qcow" => tool(TAP_IMG, &["create", "-q", "-f", "qcow", &show(&image), "4M"])?,
        _ => {
            base.iter_mut().enumerate().for_each(|(i, b)| *b = (i / SECTOR % 251) as u8);
            std::fs::write(path("base.raw"), &base)?;
            tool(TAP_IMG, &["create", "-q", "-f", "qcow", "-b", "base.raw", "-F", "raw", &show(&image)])?
        }
    };
    let format = if kind == "raw" { "raw" } else { "qcow" };
    if kind != "graph" {
        args.push(format!("{format}:{}", show(&image)));
    }
    if direct {
        args.push("--direct".to_owned());
    }
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut model = Model::new(7 + u64::from(direct));
    let socket = path("socket");
    let mut flying = BTreeMap::new();
    for round in 0..=KILLS {
        // The socket path of a dead process is taken over.
        let server = Server::start(&socket, &args)?;
        let mut client = Client::connect(server.socket())?;
        assert_eq!(client.size_bytes, SECTORS * SECTOR as u64);
        model.check(&mut client, &flying, &base).map_err(|e| format!("round {round}: {}", text(&e)))?;
        if round == KILLS {
            assert!(server.stop()?.success());
            break;
        }
        let answers = 1 + model.below(120);
        flying = model.write_until(&mut client, answers)?;
        server.kill()?;
    }
    let images: &[&str] = match kind {
        "graph" => &["b.qcow", "top.qcow"],
        "raw" => &[],
        _ => &["disk.img"],
    };
    for image in images {
        let image = path(image);
        let output = std::process::Command::new(TAP_IMG).args(["check", &show(&image)]).output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        // Clusters that were allocated but not yet mapped at a kill are leaked, which is harmless.
        assert!(matches!(output.status.code(), Some(0 | 3)), "{}: {said}", output.status);
    }
    Ok(())
}

fn text(failed: &Failed) -> String {
    failed.message().unwrap_or("").to_owned()
}
