//! Third-party tools on our server and on our images, in both directions.
//!
//! ```text
//!   random requests ─┬─ qemu-io over NBD ─► tapdisk serve ─► image ──┐
//!                    └─ qemu-io ─► raw twin ───────────────────────► the same bytes?
//! ```

use crate::server::{Server, TAP_IMG, TAPDISK, tool};
use crate::{Add, Done};
use libtest_mimic::Failed;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Requests of each run.
const REQUESTS: u32 = 5000;
const DISK_BYTES: u64 = 24 << 20;

const QEMU: &[&str] = &["qemu-io", "qemu-img"];

pub(crate) fn tests(add: Add) {
    for kind in ["raw", "qcow", "overlay"] {
        for aio in ["io_uring", "threads"] {
            add(
                format!("peers::qemu_writes_through_the_server::{kind}-{aio}"),
                QEMU,
                Box::new(move || through_server(kind, aio)),
            );
        }
        add(
            format!("peers::the_server_reads_what_qemu_wrote::{kind}"),
            QEMU,
            Box::new(move || shows_qemus(kind)),
        );
    }
    add("peers::nbdinfo_and_nbdcopy".into(), &["nbdinfo", "nbdcopy"], Box::new(libnbd));
    add("peers::only_data_on_a_standard_output_that_was_lent".into(), &["nbdcopy"], Box::new(lent_output));
    add(
        "peers::qemu_and_our_server_serve_any_offset_alike".into(),
        &["qemu-io", "qemu-img", "nbdinfo"],
        Box::new(any_offset),
    );
    add("peers::nbdsh_asks_for_odd_offsets_and_lengths".into(), &["nbdsh"], Box::new(odd_requests));
    add(
        "peers::one_request_covers_more_than_32_bits".into(),
        &["qemu-io", "qemu-img"],
        Box::new(long_requests),
    );
    add(
        "peers::the_depth_of_a_chain_is_that_of_qemu_nbd".into(),
        &["qemu-nbd", "qemu-io", "qemu-img", "nbdinfo"],
        Box::new(depth),
    );
    add(
        "peers::a_read_of_zeros_is_answered_as_qemu_nbd_does".into(),
        &["qemu-nbd", "qemu-img", "nbdsh"],
        Box::new(holes),
    );
    add("peers::tap_img_and_qemu_img_agree".into(), QEMU, Box::new(tools_agree));
}

struct Place {
    folder: tempfile::TempDir,
    rng: ChaCha8Rng,
}

impl Place {
    fn new(seed: u64) -> Result<Self, Failed> {
        Ok(Self { folder: tempfile::tempdir()?, rng: ChaCha8Rng::seed_from_u64(seed) })
    }

    /// In memory if possible: QEMU's qcow driver synchronises with every cluster.
    fn in_memory(seed: u64) -> Result<Self, Failed> {
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())?;
        Ok(Self { folder, rng: ChaCha8Rng::seed_from_u64(seed) })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn below(&mut self, n: u64) -> u64 {
        self.rng.next_u64() % n
    }

    /// Makes an image of `kind` and a raw file with the same content; returns its format.
    fn make(&mut self, kind: &str, tool_of: &str) -> Result<&'static str, Failed> {
        let size = DISK_BYTES.to_string();
        tool(TAP_IMG, &["create", "-q", &self.text("twin"), &size])?;
        let (image, twin) = (self.text("disk"), self.text("twin"));
        match kind {
            "raw" => {
                tool(tool_of, &["create", "-q", "-f", "raw", &image, &size])?;
                return Ok("raw");
            }
            "qcow" => tool(tool_of, &["create", "-q", "-f", "qcow", &image, &size])?,
            _ => {
                // A base with holes, a little shorter than the disk.
                let mut bytes = vec![0; DISK_BYTES as usize - 3 * 512];
                for piece in bytes.chunks_mut(8192) {
                    if self.below(3) > 0 {
                        self.rng.fill_bytes(piece);
                    }
                }
                std::fs::write(self.path("base"), &bytes)?;
                bytes.resize(DISK_BYTES as usize, 0);
                std::fs::write(&twin, &bytes)?;
                tool(tool_of, &["create", "-q", "-f", "qcow", "-b", "base", "-F", "raw", &image, &size])?
            }
        };
        Ok("qcow")
    }

    /// Random requests as commands of qemu-io.
    fn script(&mut self) -> String {
        let mut script = String::new();
        for i in 0..REQUESTS {
            let sectors = if self.below(4) == 0 { 1 + self.below(256) } else { 1 + self.below(16) };
            let start = if self.below(2) == 0 { self.below(2048) } else { self.below(DISK_BYTES / 512) };
            let sectors = sectors.min(DISK_BYTES / 512 - start);
            let (at, len) = (start * 512, sectors * 512);
            // Writing to a string does not fail.
            let _ = match self.below(100) {
                0..2 => writeln!(script, "flush"),
                2..10 => writeln!(script, "write -q -z {at} {len}"),
                10..20 => writeln!(script, "write -q -z -u {at} {len}"),
                // The content after a discard is unspecified: zeros make it certain.
                20..30 => writeln!(script, "discard -q {at} {len}\nwrite -q -z {at} {len}"),
                30..32 => writeln!(script, "write -q -f -P {} {at} {len}", i % 255 + 1),
                32..45 => writeln!(script, "read -q {at} {len}"),
                _ => writeln!(script, "write -q -P {} {at} {len}", i % 255 + 1),
            };
        }
        script
    }
}

/// Runs a script with qemu-io (by default it would flush after every write).
fn qemu_io(target: &str, format: &str, script: &str) -> Done {
    let mut command = Command::new("qemu-io");
    command.args(["-f", format, "-t", "writeback", "-d", "unmap", target]).stdin(Stdio::piped());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut input = child.stdin.take().ok_or("no input")?;
    let script = script.to_owned();
    let feeder = std::thread::spawn(move || input.write_all(script.as_bytes()));
    let output = child.wait_with_output()?;
    let fed = feeder.join().map_err(|_| "feeding qemu-io panicked")?;
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    if !output.status.success() || said.contains("failed") || said.contains("rror") || fed.is_err() {
        return Err(format!("qemu-io {target}: {said}").into());
    }
    Ok(())
}

fn through_server(kind: &'static str, aio: &str) -> Done {
    let mut place = Place::new(11)?;
    let format = place.make(kind, TAP_IMG)?;
    let script = place.script();
    let spec = format!("{format}:{}", place.text("disk"));
    let server = Server::start(&place.path("socket"), &[&spec, "--backing", "raw", "--aio", aio])?;
    qemu_io(&server.uri(), "raw", &script)?;
    qemu_io(&place.text("twin"), "raw", &script)?;
    let compare = ["compare", "-q", "-f", "raw", "-F", "raw"];
    tool("qemu-img", &[&compare[..], &[&server.uri(), &place.text("twin")]].concat())?;
    assert!(server.stop()?.success());
    same_as_twin(&place, format)
}

/// Compares the image, read through QEMU's driver and ours, with its twin, and checks its metadata.
fn same_as_twin(place: &Place, format: &str) -> Done {
    let (disk, twin) = (place.text("disk"), place.text("twin"));
    tool("qemu-img", &["compare", "-q", "-f", format, "-F", "raw", &disk, &twin])?;
    let ours = format!("{format}:{disk}");
    tool(TAP_IMG, &["compare", "-q", "--backing", "raw", &ours, &format!("raw:{twin}")])?;
    if format == "qcow" {
        tool(TAP_IMG, &["check", &disk])?;
    }
    Ok(())
}

fn shows_qemus(kind: &'static str) -> Done {
    let mut place = Place::in_memory(12)?;
    let format = place.make(kind, "qemu-img")?;
    let script = place.script();
    qemu_io(&place.text("disk"), format, &script)?;
    qemu_io(&place.text("twin"), "raw", &script)?;
    let spec = format!("{format}:{}", place.text("disk"));
    let server = Server::start(&place.path("socket"), &[&spec, "--backing", "raw", "--read-only"])?;
    let compare = ["compare", "-q", "-f", "raw", "-F", "raw"];
    tool("qemu-img", &[&compare[..], &[&server.uri(), &place.text("twin")]].concat())?;
    assert!(server.stop()?.success());
    // QEMU leaves clusters that only it can explain; only their content counts.
    let ours = format!("{format}:{}", place.text("disk"));
    tool(TAP_IMG, &["compare", "-q", "--backing", "raw", &ours, &format!("raw:{}", place.text("twin"))])?;
    Ok(())
}

fn libnbd() -> Done {
    let mut place = Place::new(13)?;
    place.make("overlay", TAP_IMG)?;
    let specs = [format!("disk=qcow:{}", place.text("disk")), format!("twin=raw:{}", place.text("twin"))];
    let _server = Server::start(&place.path("socket"), &[&specs[0], &specs[1], "--backing", "raw"])?;
    let uri = |name: &str| format!("nbd+unix:///{name}?socket={}", place.text("socket"));
    let list = tool("nbdinfo", &["--list", &uri("")])?;
    assert!(list.contains("export=\"disk\"") && list.contains("export=\"twin\""), "{list}");
    let info = tool("nbdinfo", &[&uri("disk")])?;
    for word in [
        "export-size: 25165824",
        "can_multi_conn: true",
        "can_fua: true",
        "can_trim: true",
        "base:allocation",
    ] {
        assert!(info.contains(word), "{word} in {info}");
    }
    let shown = tool(TAP_IMG, &["info", &uri("disk")])?;
    assert!(shown.ends_with("virtual size: 24 MiB (25165824 bytes)\ndisk size: unavailable\n"), "{shown}");
    let map = tool("nbdinfo", &["--map", &uri("disk")])?;
    assert!(map.contains("data") && map.contains("zero"), "{map}");
    assert!(tool("nbdinfo", &[&uri("nobody")]).is_err(), "an export that does not exist");
    tool("nbdcopy", &[&uri("disk"), &place.text("copy")])?;
    tool(
        TAP_IMG,
        &["compare", "-q", &format!("raw:{}", place.text("copy")), &format!("raw:{}", place.text("base"))],
    )?;
    // And onto an export, with zeros and several connections.
    tool(TAP_IMG, &["create", "-q", "-f", "qcow", &place.text("new"), &DISK_BYTES.to_string()])?;
    let target = Server::start(&place.path("other"), &[&format!("qcow:{}", place.text("new"))])?;
    tool("nbdcopy", &["--connections=4", "--flush", &uri("twin"), &target.uri()])?;
    assert!(target.stop()?.success());
    let new = format!("qcow:{}", place.text("new"));
    tool(TAP_IMG, &["compare", "-q", &new, &format!("raw:{}", place.text("copy"))])?;
    Ok(())
}

/// nbdcopy starts the server with a socket and its own standard output, where only the disk may appear.
fn lent_output() -> Done {
    let place = Place::new(15)?;
    let bytes: Vec<u8> = (0..DISK_BYTES).map(|i| (i / 512) as u8).collect();
    std::fs::write(place.path("disk"), &bytes)?;
    let spec = format!("raw:{}", place.text("disk"));
    let copy = ["--", "[", TAPDISK, "serve", &spec, "]", "-"];
    let output = Command::new("nbdcopy").args(copy).stdin(Stdio::null()).output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.stdout.len() as u64, DISK_BYTES);
    assert!(output.stdout == bytes, "other bytes");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("listening at unix:") && said.contains("export '': raw:"), "{said}");
    Ok(())
}

/// A file of 1000 bytes and requests that begin and end anywhere, by qemu-io on our server and on the file itself.
fn any_offset() -> Done {
    let mut place = Place::in_memory(16)?;
    for name in ["disk", "twin"] {
        std::fs::write(place.path(name), vec![3; (1 << 20) + 1000])?;
    }
    let mut script = String::new();
    for i in 0..300 {
        let (at, len) = (place.below(1 << 20), 1 + place.below(900));
        let _ = match place.below(3) {
            0 => writeln!(script, "write -q -z {at} {len}"),
            1 => writeln!(script, "read -q {at} {len}"),
            _ => writeln!(script, "write -q -P {} {at} {len}", i % 255 + 1),
        };
    }
    let _ = writeln!(script, "write -q -P 9 1 1048590");
    let server = Server::start(&place.path("socket"), &[&format!("raw:{}", place.text("disk"))])?;
    let info = tool("nbdinfo", &[&server.uri()])?;
    for word in ["export-size: 1049600", "block_size_minimum: 1", "description: raw image"] {
        assert!(info.contains(word), "{word} in {info}");
    }
    qemu_io(&server.uri(), "raw", &script)?;
    qemu_io(&place.text("twin"), "raw", &script)?;
    assert!(server.stop()?.success());
    same_as_twin(&place, "raw")
}

/// What nbd-tester-client sends, and more of its kind: requests at byte 1, of 1,048,590 bytes, up to the last byte.
const ODD_REQUESTS: &str = r#"
import random
random.seed(17)
size = h.get_size()
assert h.get_block_size(nbd.SIZE_MINIMUM) == 1
want = bytearray(h.pread(size, 0))
def check(at, count):
    got = h.pread(count, at)
    assert got == want[at:at + count], f"{count} bytes at {at}"
big = 1048590
places = [(1, big), (0, big), (511, big), (size - big, big), (size - 1, 1), (1, 1), (513, 510), (1, size - 1)]
places += [(random.randrange(size - big), random.choice([1, 7, 511, 512, 513, 4097, big])) for _ in range(60)]
for i, (at, count) in enumerate(places):
    fill = bytes([i % 255 + 1]) * count
    if i % 5 == 4:
        h.zero(count, at)
        fill = bytes(count)
    else:
        h.pwrite(fill, at)
    want[at:at + count] = fill
    check(max(at - 600, 0), min(count + 1200, size - max(at - 600, 0)))
# Neighbours that are written at the same time.
cookies = []
for i in range(600):
    data = nbd.Buffer.from_bytearray(bytearray([i % 251]) * 37)
    cookies.append(h.aio_pwrite(data, 1 + 37 * i))
    want[1 + 37 * i:38 + 37 * i] = bytes([i % 251]) * 37
for cookie in cookies:
    while not h.aio_command_completed(cookie):
        h.poll(-1)
for at in range(0, size, big):
    check(at, min(big, size - at))
try:
    h.pread(big, size - big + 1)
    assert False, "past the end"
except nbd.Error as error:
    assert error.errnum == 22 or "past" in str(error) or "extends" in str(error), error
h.flush()
print("all right")
"#;

fn odd_requests() -> Done {
    let place = Place::in_memory(18)?;
    for (format, name) in [("raw", "disk"), ("qcow", "qdisk")] {
        tool(TAP_IMG, &["create", "-q", "-f", format, &place.text(name), "4M"])?;
        let server = Server::start(
            &place.path("socket"),
            &[&format!("{format}:{}", place.text(name)), "--aio", "threads"],
        )?;
        // The last of these requests is invalid, which libnbd would otherwise refuse itself.
        let before = "h.set_strict_mode(0)";
        // The system's python has the module, others on the path may not.
        let path = format!("PATH=/usr/bin:/bin:{}", std::env::var("PATH")?);
        let said = tool("env", &[&path, "nbdsh", "-c", before, "-u", &server.uri(), "-c", ODD_REQUESTS])?;
        assert!(said.contains("all right"), "{said}");
        assert!(server.stop()?.success());
    }
    Ok(())
}

/// QEMU uses extended headers: one request for the state of 3 TiB, and one to make nearly all of them zeros.
fn long_requests() -> Done {
    let place = Place::new(19)?;
    tool(TAP_IMG, &["create", "-q", &place.text("disk"), "3T"])?;
    let server = Server::start(&place.path("socket"), &[&format!("raw:{}", place.text("disk"))])?;
    let map = |want: &str| -> Done {
        let shown = tool("qemu-img", &["map", "-f", "raw", "--output=json", &server.uri()])?;
        let runs: Vec<serde_json::Value> = serde_json::from_str(&shown)?;
        let runs: Vec<String> =
            runs.iter().map(|run| format!("{} {} {}", run["start"], run["length"], run["data"])).collect();
        assert_eq!(runs.join(", "), want);
        Ok(())
    };
    map("0 3298534883328 false")?;
    qemu_io(&server.uri(), "raw", "write -q -P 7 2T 64k\nwrite -q -P 7 16M 64k\n")?;
    map("0 16777216 false, 16777216 65536 true, 16842752 2199006412800 false, \
         2199023255552 65536 true, 2199023321088 1099511562240 false")?;
    // In pieces, because a range of a disk has at most 2^32 sectors; the edges are read and written.
    qemu_io(&server.uri(), "raw", "write -q -z -n -u 16777217 3298518106110\nread -q -P 7 16M 1\n")?;
    map("0 16777216 false, 16777216 4096 true, 16781312 3298518097920 false, 3298534879232 4096 true")?;
    assert!(server.stop()?.success());
    Ok(())
}

/// The levels of a chain of two images over a raw file, as nbdinfo shows them for our server and for qemu-nbd.
fn depth() -> Done {
    let mut place = Place::in_memory(20)?;
    place.make("overlay", "qemu-img")?;
    // What lies past a shorter base comes from it according to QEMU, and from nowhere according to us.
    std::fs::File::options().write(true).open(place.path("base"))?.set_len(DISK_BYTES)?;
    let (middle, top) = (place.text("disk"), place.text("top"));
    qemu_io(&middle, "qcow", "write -q -P 1 1M 3M\nwrite -q -P 1 20M 64k\n")?;
    tool("qemu-img", &["create", "-q", "-f", "qcow", "-b", "disk", "-F", "qcow", &top])?;
    qemu_io(&top, "qcow", "write -q -P 2 2M 1M\nwrite -q -P 2 10M 1M\n")?;
    let map = |uri: &str| tool("nbdinfo", &["--map=qemu:allocation-depth", uri]);
    let (spec, base) = (format!("qcow:{top}"), format!("raw:{}", place.text("base")));
    let args = [&*spec, "--backing", "qcow", "--backing", &base, "--read-only"];
    let ours = map(&Server::start(&place.path("socket"), &args)?.uri())?;
    let theirs = place.text("theirs");
    let mut server = qemu_nbd(&["-A", "-r", "-f", "qcow"], &theirs, &top)?;
    let shown = map(&format!("nbd+unix:///?socket={theirs}"));
    // It ends with its last client, which may have happened.
    let _ = server.kill();
    server.wait()?;
    assert_eq!(ours, shown?);
    assert!(ours.contains("backing depth 2") && ours.contains("backing depth 3"), "{ours}");
    Ok(())
}

/// Prints how reads are answered, with neighbouring chunks of the same kind as one; `ours` adds what only our server
/// answers as a hole: zeros that were written, and odd offsets.
const CHUNKS: &str = r#"
assert h.get_structured_replies_negotiated()
want = bytearray(8 << 20)
want[4 << 20:5 << 20] = bytes([7]) * (1 << 20)
h.pwrite(bytes(want[3 << 20:5 << 20]), 3 << 20)
def read(at, count):
    chunks = []
    def chunk(data, offset, status, error):
        kind = "hole" if status == nbd.READ_HOLE else "data"
        count = len(data)
        if chunks and chunks[-1][0] == kind and sum(chunks[-1][1:]) == offset:
            _, offset, before = chunks.pop()
            count += before
        chunks.append((kind, offset, count))
    got = h.pread_structured(count, at, chunk)
    assert got == want[at:at + count], f"{count} bytes at {at}"
    return chunks
for place in [(0, 4096), (4096, 1 << 20), (512, 65536), (4 << 20, 65536), ((5 << 20) - 4096, 4096)]:
    print(*read(*place))
if ours:
    for place in [(3 << 20, 1 << 20), (511, 65537), (5 << 20, 4097)]:
        assert read(*place) == [("hole", *place)], place
    for place in [(0, 8 << 20), ((5 << 20) - 512, 8192), ((4 << 20) - 4096, 8192), (1, 4095)]:
        assert read(*place) == [("data", *place)], place
"#;

/// qemu-nbd knows zeros by the allocation. Only libnbd shows how a read was answered.
fn holes() -> Done {
    let place = Place::in_memory(21)?;
    let ask = |uri: &str, ours: bool| {
        let path = format!("PATH=/usr/bin:/bin:{}", std::env::var("PATH")?);
        let first = if ours { "ours = True" } else { "ours = False" };
        tool("env", &[&path, "nbdsh", "-c", first, "-u", uri, "-c", CHUNKS])
    };
    let image = |name: &str, format: &str| {
        tool(TAP_IMG, &["create", "-q", "-f", format, &place.text(name), "8M"])?;
        Ok::<String, Failed>(place.text(name))
    };
    let mut shown = Vec::new();
    for format in ["raw", "qcow"] {
        let spec = format!("{format}:{}", image(format, format)?);
        let server = Server::start(&place.path("socket"), &[&spec])?;
        shown.push(ask(&server.uri(), true)?);
        assert!(server.stop()?.success());
    }
    let theirs = place.text("theirs");
    let mut server = qemu_nbd(&["-f", "raw"], &theirs, &image("other", "raw")?)?;
    shown.push(ask(&format!("nbd+unix:///?socket={theirs}"), false)?);
    // It ends with its last client, which may have happened.
    let _ = server.kill();
    server.wait()?;
    let want = "('hole', 0, 4096)\n('hole', 4096, 1048576)\n('hole', 512, 65536)\n\
                ('data', 4194304, 65536)\n('data', 5238784, 4096)\n";
    assert!(shown.iter().all(|shown| shown == want), "{shown:?}");
    Ok(())
}

/// Starts qemu-nbd at `socket`, and waits for that.
fn qemu_nbd(args: &[&str], socket: &str, image: &str) -> Result<Child, Failed> {
    let child = Command::new("qemu-nbd").args(args).args(["-k", socket, image]).spawn()?;
    while !Path::new(socket).exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Ok(child)
}

fn json(program: &str, args: &[&str]) -> Result<serde_json::Value, Failed> {
    Ok(serde_json::from_str(&tool(program, args)?)?)
}

fn tools_agree() -> Done {
    let mut place = Place::in_memory(14)?;
    place.make("overlay", TAP_IMG)?;
    let script = place.script();
    qemu_io(&place.text("disk"), "qcow", &script)?;
    let disk = place.text("disk");
    let (ours, theirs) = (
        json(TAP_IMG, &["info", "--output", "json", &disk])?,
        json("qemu-img", &["info", "--output=json", &disk])?,
    );
    for key in ["virtual-size", "cluster-size", "format", "actual-size", "backing-filename", "filename"] {
        assert_eq!(ours[key], theirs[key], "{key}");
    }
    let map = |value: serde_json::Value| -> Vec<(u64, u64, u64, bool)> {
        let runs = value.as_array().cloned().unwrap_or_default();
        let number = |run: &serde_json::Value, key: &str| run[key].as_u64().unwrap_or(u64::MAX);
        let zero = |run: &serde_json::Value| run["zero"].as_bool().unwrap_or(false);
        // The tools report the level of zeros differently; neighbours that then look alike are merged.
        let mut merged: Vec<(u64, u64, u64, bool)> = Vec::new();
        for run in &runs {
            let depth = if zero(run) { 0 } else { number(run, "depth") };
            let (start, length) = (number(run, "start"), number(run, "length"));
            match merged.last_mut() {
                Some(last) if last.2 == depth && last.3 == zero(run) => last.1 += length,
                _ => merged.push((start, length, depth, zero(run))),
            }
        }
        merged
    };
    let ours = map(json(TAP_IMG, &["map", "--backing", "raw", "--output", "json", &disk])?);
    let theirs = map(json("qemu-img", &["map", "--output=json", &disk])?);
    assert!(ours == theirs, "maps differ:\n{ours:?}\n{theirs:?}");
    convert_both_ways(&place, &disk)
}

fn convert_both_ways(place: &Place, disk: &str) -> Done {
    tool(
        TAP_IMG,
        &["convert", "--backing", "raw", "-O", "qcow", &format!("qcow:{disk}"), &place.text("flat")],
    )?;
    let compare = |a: &Path, b: &str| {
        let a = a.display().to_string();
        tool("qemu-img", &["compare", "-q", "-f", "qcow", "-F", "qcow", &a, b]).map(drop)
    };
    compare(&place.path("flat"), disk)?;
    tool("qemu-img", &["convert", "-f", "qcow", "-O", "qcow", disk, &place.text("theirs")])?;
    let theirs = format!("qcow:{}", place.text("theirs"));
    tool(TAP_IMG, &["compare", "-q", &theirs, &format!("qcow:{}", place.text("flat"))])?;
    Ok(())
}
