//! `tap-img` in a simulated host: its effects, output and exit status.

mod damage;

use clap::Parser;
use kernel_model::faults::FaultPlan;
use kernel_model::{Concerned, Content, Kernel, NthFailure, Storage, StorageConfig};
use sim::{Config, Sim};
use std::cell::RefCell;
use std::rc::Rc;
use tap_host::{Errno, Files, LockKind, OpenMode};
use tap_programs::Console;
use tap_programs::img::{Cli, run};

/// Records the output.
#[derive(Default)]
struct Printed {
    out: RefCell<Vec<String>>,
    err: RefCell<Vec<String>>,
}

impl Console for Printed {
    fn out(&self, line: &str) {
        self.out.borrow_mut().push(line.to_owned());
    }
    fn err(&self, line: &str) {
        self.err.borrow_mut().push(line.to_owned());
    }
    fn progress(&self, done_bytes: u64, total_bytes: u64) {
        assert!(done_bytes <= total_bytes);
        self.err.borrow_mut().push(format!("{done_bytes}/{total_bytes}"));
    }
}

/// A machine that runs one command after the other.
struct Machine {
    sim: Sim,
    kernel: Kernel,
}

impl Machine {
    fn new(config: StorageConfig) -> Self {
        let sim = Sim::new(&Config::new(1));
        let kernel = Kernel::new(&sim, &Storage::new(&sim, config));
        Self { sim, kernel }
    }

    fn quiet() -> Self {
        Self::new(StorageConfig { faults: FaultPlan::default(), ..StorageConfig::default() })
    }

    /// Exit status, and the lines of both streams.
    fn run(&self, line: &str) -> (u8, String, String) {
        let cli = Cli::try_parse_from(std::iter::once("tap-img").chain(line.split_whitespace()));
        let cli = cli.unwrap_or_else(|e| panic!("{line}: {e}"));
        let host = self.kernel.process("tap-img", 1);
        let (printed, status) = (Rc::new(Printed::default()), Rc::new(RefCell::new(None)));
        let (p, s) = (Rc::clone(&printed), Rc::clone(&status));
        self.sim.run(async move { *s.borrow_mut() = Some(run(host, cli, &*p).await) }).unwrap();
        let status = status.take().expect("it ends");
        (status, printed.out.borrow().join("\n"), printed.err.borrow().join("\n"))
    }

    /// The output of a command that succeeds.
    fn ok(&self, line: &str) -> String {
        let (status, out, err) = self.run(line);
        assert_eq!((status, err.as_str()), (0, ""), "{line}");
        out
    }

    /// The one line of a command that fails.
    fn fails(&self, line: &str, expected: u8) -> String {
        let (status, out, err) = self.run(line);
        assert_eq!((status, out.as_str()), (expected, ""), "{line}: {err}");
        assert!(!err.contains('\n'), "one line, not {err}");
        err.strip_prefix("tap-img: failed to ").unwrap_or_else(|| panic!("{line}: {err}")).to_owned()
    }

    fn json(&self, line: &str) -> serde_json::Value {
        serde_json::from_str(&self.ok(line)).unwrap()
    }

    /// A raw disk with some bytes and holes.
    fn put_disk(&self, path: &str, len: usize) {
        let bytes: Vec<u8> =
            (0..len).map(|i| if i / 8192 % 3 == 1 { 0 } else { (i / 512 % 250 + 1) as u8 }).collect();
        self.kernel.storage().put_bytes(path, &bytes);
    }
}

#[test]
fn an_image_is_created_shown_and_checked() {
    let machine = Machine::quiet();
    assert_eq!(machine.ok("create -f qcow /a.qcow 1.5M"), "Formatting '/a.qcow', fmt=qcow size=1572864");
    assert_eq!(
        machine.ok("info /a.qcow"),
        "image: /a.qcow\nfile format: qcow\nvirtual size: 1.5 MiB (1572864 bytes)\ndisk size: 8 KiB\n\
         cluster_size: 4096"
    );
    assert_eq!(machine.ok("create -q -f qcow -o cluster_size=64k -b a.qcow /b.qcow"), "");
    let info = machine.json("info --output json /b.qcow");
    assert_eq!(info["virtual-size"], 1_572_864);
    assert_eq!(info["cluster-size"], 65536);
    assert_eq!(info["backing-filename"], "a.qcow");
    assert_eq!(info["full-backing-filename"], "/a.qcow");
    let chain = machine.json("info --output json --backing-chain /b.qcow");
    assert_eq!(chain.as_array().map(Vec::len), Some(2));
    let check = machine.json("check --output json /b.qcow");
    assert_eq!((&check["check-errors"], &check["total-clusters"]), (&0.into(), &24.into()));
    assert!(machine.ok("check /a.qcow").starts_with("No errors were found on the image.\n0/384 = 0.00%"));
    // An existing file is replaced, even if it is longer.
    machine.put_disk("/c", 1 << 20);
    machine.ok("create -f qcow /c 64k");
    assert_eq!(machine.kernel.storage().bytes("/c").unwrap().len(), 8192);
    machine.ok("create /raw 1000");
    assert_eq!(machine.kernel.storage().bytes("/raw"), Some(vec![0; 1024]));
}

/// Before anything is opened for writing: a target with `-n` is not created, and its lock would say only that it is in
/// use.
#[test]
fn a_target_that_is_a_source_is_named_as_such() {
    let machine = Machine::quiet();
    machine.put_disk("/disk", 64 << 10);
    machine.ok("create -q -f qcow -b disk -F raw /top.qcow");
    for (line, which) in [
        ("convert -n -O raw raw:/disk raw:/disk", "it is the same file as /disk, which would be lost"),
        ("convert raw:/disk /disk", "it is the same file as /disk, which would be lost"),
        ("convert -n --backing raw -O raw /top.qcow raw:/disk", "on which /top.qcow is based"),
    ] {
        let text = machine.fails(line, 1);
        assert!(text.contains(which), "{line}: {text}");
    }
}

#[test]
fn a_converted_image_compares_equal_and_stays_sparse() {
    let machine = Machine::quiet();
    machine.put_disk("/disk", 1_000_448);
    machine.ok("convert -f raw -O qcow /disk /a.qcow");
    assert_eq!(machine.ok("compare -f raw /disk /a.qcow"), "Images are identical.");
    let clusters = &machine.json("check --output json /a.qcow")["allocated-clusters"];
    assert_eq!(clusters.as_u64(), Some(163), "245 without 41 holes of two");
    let (status, out, err) = machine.run("convert -p -m 2 -S 0 qcow:/a.qcow raw:/b");
    assert_eq!((status, out.as_str()), (0, ""));
    assert!(err.ends_with("1000448/1000448"), "{err}");
    assert_eq!(machine.kernel.storage().bytes("/b"), machine.kernel.storage().bytes("/disk"));
    // Into a file with other bytes, which zeros must replace. They begin like an image, which a raw target is not.
    let mut before = machine.kernel.storage().bytes("/a.qcow").unwrap();
    before.truncate(4096);
    before.resize(1 << 20, 9);
    machine.kernel.storage().put_bytes("/old", &before);
    machine.ok("convert -n -O raw /a.qcow /old");
    let old = machine.kernel.storage().bytes("/old").unwrap();
    assert_eq!(old[..1_000_448], machine.kernel.storage().bytes("/disk").unwrap());
    assert!(old[1_000_448..].iter().all(|b| *b == 9), "past the end of the source nothing changes");
    assert_eq!(machine.run("compare /a.qcow raw:/old").0, 1);
    machine.ok("create -f qcow -b disk -F raw /over.qcow");
    assert_eq!(machine.ok("compare --backing raw /over.qcow raw:/disk"), "Images are identical.");
}

#[test]
fn differences_in_content_and_size_are_reported() {
    let machine = Machine::quiet();
    let mut bytes = vec![0; 3 << 20];
    machine.kernel.storage().put_bytes("/short", &bytes[..1 << 20]);
    machine.kernel.storage().put_bytes("/a", &bytes);
    bytes[(2 << 20) + 700] = 1;
    machine.kernel.storage().put_bytes("/b", &bytes);
    let compare = |line: &str| {
        let (status, out, err) = machine.run(line);
        assert_eq!(err, "");
        (status, out)
    };
    let at = format!("Content mismatch at offset {}!", (2 << 20) + 512);
    assert_eq!(compare("compare /a /b"), (1, at.clone()));
    assert_eq!(compare("compare /short /b"), (1, format!("Warning: Image size mismatch!\n{at}")));
    let warned = "Warning: Image size mismatch!\nImages are identical.".to_owned();
    assert_eq!(compare("compare /short /a"), (0, warned));
    assert_eq!(compare("compare -s /short /a"), (1, "Strict mode: Image size mismatch!".to_owned()));
    assert_eq!(compare("compare -q /a /b"), (1, String::new()));
}

#[test]
fn maps_report_depth_offset_and_kind() {
    let machine = Machine::quiet();
    machine.put_disk("/disk", 64 << 10);
    machine.ok("create -f qcow -b disk -F raw /top.qcow 96k");
    let refused = machine.fails("map /top.qcow", 1);
    assert!(refused.contains("based on /disk, which may not be opened"), "{refused}");
    let map = machine.json("map --backing raw --output json /top.qcow");
    let run = |at: usize| {
        let run = &map[at];
        (run["start"].as_u64(), run["length"].as_u64(), run["depth"].as_u64(), run["zero"].as_bool())
    };
    assert_eq!(run(0), (Some(0), Some(65536), Some(1), Some(false)));
    assert_eq!((map[0]["offset"].as_u64(), map[0]["data"].as_bool()), (Some(0), Some(true)));
    assert_eq!(run(1), (Some(65536), Some(32768), Some(0), Some(true)));
    assert_eq!(map[1]["present"], false);
    let human = machine.ok("map --backing raw /top.qcow");
    assert_eq!(human.lines().nth(1), Some("0               0x10000         0               /disk"));
}

#[test]
fn maps_open_backing_files_as_the_option_says() {
    let machine = Machine::quiet();
    machine.put_disk("/disk", 64 << 10);
    machine.ok("create -f qcow -b disk -F raw /middle.qcow");
    machine.ok("create -f qcow -b middle.qcow /top.qcow");
    // As raw, the file in the middle has no backing file; the name in it is only bytes.
    machine.kernel.storage().put_bytes("/disk", &[]);
    let mut bytes = machine.kernel.storage().bytes("/middle.qcow").unwrap();
    bytes[4..8].copy_from_slice(&3_u32.to_be_bytes());
    machine.kernel.storage().put_bytes("/middle.qcow", &bytes);
    let human = machine.ok("map --backing raw:/middle.qcow /top.qcow");
    assert!(human.lines().nth(1).is_some_and(|line| line.ends_with(" /middle.qcow")), "{human}");
    for how in ["raw", "probe"] {
        let text = machine.fails(&format!("map --backing {how} /top.qcow"), 1);
        let begin = text.starts_with("use /middle.qcow as backing file of /top.qcow: ");
        assert!(begin && text.contains("an image in the format qcow2"), "{text}");
    }
}

#[test]
fn the_levels_of_a_chain_may_be_opened_as_different_formats() {
    let machine = Machine::quiet();
    machine.put_disk("/disk", 64 << 10);
    machine.ok("create -f qcow -b disk -F raw /middle.qcow");
    machine.ok("create -f qcow -b middle.qcow /top.qcow");
    let compare = |how: &str| format!("compare {how} /top.qcow raw:/disk");
    for one in ["--backing qcow", "--backing raw", "--backing raw:/disk", "--backing qcow:/middle.qcow"] {
        machine.fails(&compare(one), 2);
    }
    for both in [
        "--backing qcow --backing raw:/disk",
        "--backing raw --backing qcow:/middle.qcow",
        "--backing raw:/disk --backing qcow:/middle.qcow",
    ] {
        assert_eq!(machine.ok(&compare(both)), "Images are identical.", "{both}");
    }
}

#[test]
fn a_loop_of_backing_files_is_reported() {
    let machine = Machine::quiet();
    machine.ok("create -f qcow /a.qcow 1M");
    machine.ok("create -f qcow -b a.qcow /b.qcow");
    // The two have names of the same length.
    let mut bytes = machine.kernel.storage().bytes("/b.qcow").unwrap();
    bytes[48] = b'b';
    machine.kernel.storage().put_bytes("/a.qcow", &bytes);
    let text = machine.fails("info --backing-chain /b.qcow", 1);
    assert_eq!(text, "show /b.qcow: /b.qcow is among the images that it is based on");
    let text = machine.fails("map --backing qcow /b.qcow", 1);
    assert!(text.contains("is this image, or one that is based on it"), "{text}");
}

#[test]
fn a_json_map_is_one_array_with_a_run_on_each_line() {
    let machine = Machine::quiet();
    machine.put_disk("/disk", 64 << 10);
    machine.ok("convert -O qcow raw:/disk /a.qcow");
    let text = machine.ok("map --output json /a.qcow");
    let map: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    assert_eq!(map.len(), text.lines().count());
    let mut end = Some(0);
    for run in &map {
        assert_eq!(run["start"].as_u64(), end);
        end = end.zip(run["length"].as_u64()).map(|(end, length)| end + length);
    }
    assert_eq!((map.len(), end), (6, Some(64 << 10)), "{text}");
}

#[test]
fn long_runs_of_zeros_are_compared_and_converted() {
    // More sectors than one request can have, and data at both ends and in between.
    let machine = Machine::quiet();
    machine.ok("create -q -f qcow -o cluster_size=64k /zeros.qcow 3T");
    machine.ok("create -q -f qcow -o cluster_size=64k /end.qcow 3T");
    assert_eq!(machine.ok("compare /zeros.qcow /end.qcow"), "Images are identical.");
    machine.ok("convert -O qcow -o cluster_size=64k /zeros.qcow /copy.qcow");
    let info = machine.json("info --output json /copy.qcow");
    assert_eq!(info["virtual-size"].as_u64(), Some(3 << 40));
    // Data of 4 MiB against zeros of 3 TiB, and the reverse.
    machine.put_disk("/disk", 4 << 20);
    machine.ok("convert -n -O qcow raw:/disk /end.qcow");
    for pair in ["/zeros.qcow /end.qcow", "/end.qcow /zeros.qcow"] {
        let (status, out, _) = machine.run(&format!("compare {pair}"));
        assert_eq!((status, out.as_str()), (1, "Content mismatch at offset 0!"), "{pair}");
    }
    machine.ok("convert -O qcow -o cluster_size=64k /end.qcow /copy.qcow");
    assert_eq!(machine.ok("compare /end.qcow /copy.qcow"), "Images are identical.");
    // Zeros over data.
    machine.ok("convert -n -O qcow /zeros.qcow /copy.qcow");
    assert_eq!(machine.ok("compare /zeros.qcow /copy.qcow"), "Images are identical.");
}

#[test]
fn bad_input_fails_with_one_clear_line() {
    let machine = Machine::quiet();
    machine.put_disk("/disk", 65536);
    machine.ok("create -q -f qcow /a.qcow 1M");
    let mut bytes = machine.kernel.storage().bytes("/a.qcow").unwrap();
    machine.kernel.storage().put_bytes("/cut.qcow", &bytes[..40]);
    let mut newer = bytes.clone();
    newer[4..8].copy_from_slice(&3_u32.to_be_bytes());
    machine.kernel.storage().put_bytes("/v3.qcow", &newer);
    bytes[4096..4104].copy_from_slice(&(1_u64 << 40).to_be_bytes());
    machine.kernel.storage().put_bytes("/bad.qcow", &bytes);
    for (line, status, words) in [
        ("info /gone", 1, "open /gone: no such file"),
        ("info -f qcow /disk", 1, "does not begin with the magic bytes"),
        ("info -f qcow /cut.qcow", 1, "it has only 40 bytes"),
        ("info vhd:/disk", 1, "not a known format"),
        ("info -f raw qcow:/a.qcow", 1, "another format than the option"),
        ("check nbd:localhost:1", 1, "needs a file"),
        ("create /new", 1, "size is missing"),
        ("create -f qcow /new 12x", 1, "'12x' is not a size"),
        ("create -f qcow -o shape=round /new 1M", 1, "unknown option 'shape'"),
        ("create -f qcow -o cluster_size=3k /new 1M", 1, "not a power of two from 512 to 65536"),
        (
            "create /new 18446744073709551615",
            1,
            "a disk of 18446744073709551615 bytes is larger than a file can be",
        ),
        ("create -f qcow -b gone /new 1M", 1, "open /gone"),
        ("info /v3.qcow", 1, "an image in the format qcow2"),
        ("info qcow:/v3.qcow", 1, "it has version 3, not 1"),
        ("convert /v3.qcow /new", 1, "convert it with qemu-img"),
        ("create -b disk /new 1M", 1, "the format has no backing files; use -f qcow"),
        ("create -f qcow -b gone /new", 1, "open /gone"),
        ("check /disk", 63, "no metadata"),
        ("check /gone", 1, "open /gone"),
        ("compare /disk /gone", 2, "open /gone"),
        ("convert /disk /gone/x -n", 1, "open /gone/x"),
        ("convert -n /disk /a.qcow -S 100", 1, "not a multiple of 512"),
        ("convert -n /a.qcow /disk", 1, "the target has 65536 bytes, but 1048576 are needed"),
    ] {
        let text = machine.fails(line, status);
        assert!(text.contains(words), "{line}: {text}");
    }
    let (status, out, err) = machine.run("check /bad.qcow");
    assert_eq!((status, err.as_str()), (2, ""));
    assert!(out.starts_with("ERROR ") && out.contains("1 errors were found"), "{out}");
    assert_eq!(machine.json("info --output json raw:/v3.qcow")["format"], "raw", "the given format");
}

#[test]
fn a_disk_grows_and_keeps_what_it_shows() {
    let machine = Machine::quiet();
    machine.put_disk("/disk", 300 << 10);
    // The second disk ends within a cluster, and the base goes on behind it.
    for (size, cluster, status) in [("300k", "4k", 3), ("70k", "64k", 0), ("101k", "512", 3)] {
        machine
            .ok(&format!("create -q -f qcow -o cluster_size={cluster},l2_entries=64 -b disk /a.qcow {size}"));
        machine.ok("convert -S 0 --backing raw /a.qcow /old");
        assert_eq!(machine.ok("resize --backing raw /a.qcow +10M"), "Image resized.");
        assert_eq!(machine.ok("resize -q --backing raw /a.qcow 11M"), "");
        assert_eq!(machine.json("info --output json /a.qcow")["virtual-size"], 11 << 20);
        machine.ok("resize -q /old 11M");
        machine.ok("compare -q --backing raw /a.qcow /old");
        // The places of older tables, unless they are in the header's cluster.
        let (told, out, err) = machine.run("check /a.qcow");
        assert_eq!((told, err.as_str()), (status, ""), "{out}");
    }
    // It holds what is written to the new part.
    machine.put_disk("/full", 11 << 20);
    machine.ok("create -q -f qcow -o cluster_size=512,l2_entries=64 /plain.qcow 101k");
    machine.ok("resize -q /plain.qcow 11M");
    machine.ok("convert -q -n -O qcow /full qcow:/plain.qcow");
    machine.ok("compare -q /plain.qcow /full");
    machine.ok("resize -q /disk +1");
    assert_eq!(machine.kernel.storage().bytes("/disk").unwrap().len(), (300 << 10) + 512);
}

#[test]
fn a_disk_that_cannot_be_resized_says_why() {
    let machine = Machine::quiet();
    machine.put_disk("/disk", 65536);
    machine.ok("create -q -f qcow /a.qcow 1M");
    machine.ok("create -q -f qcow -o cluster_size=512,l2_entries=64 /small.qcow 1M");
    machine.ok("create -q -f qcow -b disk /b.qcow 1M");
    machine.kernel.storage().put_device("/dev", Content { size: 8 << 20, ..Content::default() });
    let image = machine.kernel.storage().bytes("/a.qcow").unwrap();
    for (line, words) in [
        ("resize /disk 32k", "the disk has 65536 bytes, and what is past byte 32768 would be lost"),
        ("resize /a.qcow 512k", "the disk has 1048576 bytes, and what is past byte 524288 would be lost"),
        ("resize /a.qcow -- -1k", "resize /a.qcow: a disk cannot be made smaller"),
        ("resize /a.qcow +1x", "'1x' is not a size"),
        ("resize /a.qcow +8191P", "too large for clusters of 2^12 bytes"),
        ("resize /disk 9E", "larger than a file can be"),
        ("resize /small.qcow 1T", "too large for clusters of 2^9 bytes"),
        ("resize /b.qcow 2M", "it is based on /disk, which may not be opened; allow it with --backing"),
        ("resize raw:/dev 16M", "it is a block device, whose size is not this program's to change"),
        ("resize /gone 1M", "open /gone"),
        ("resize nbd:localhost:1 1M", "needs a file"),
    ] {
        let text = machine.fails(line, 1);
        assert!(text.contains(words), "{line}: {text}");
    }
    assert_eq!(machine.kernel.storage().bytes("/a.qcow").unwrap(), image, "it is as it was");
}

#[test]
fn check_finds_that_a_file_was_cut_off() {
    let machine = Machine::quiet();
    machine.put_disk("/disk", 64 << 10);
    machine.ok("convert -S 0 -O qcow raw:/disk /a.qcow");
    let bytes = machine.kernel.storage().bytes("/a.qcow").unwrap();
    let end = bytes.len();
    let check = |len: usize| {
        machine.kernel.storage().put_bytes("/a.qcow", &bytes[..len]);
        machine.run("check /a.qcow")
    };
    let warned = |cut: usize| format!("/a.qcow ends at byte {cut}, but its mappings reach byte {end}: ");
    let cut = end - 8192;
    let (status, out, err) = check(cut);
    assert_eq!(status, 2, "{out}");
    let found = format!(
        "ERROR clusters 14 to 15 from byte {cut} on: past the end of the file at byte {cut}\n\
         2 errors were found on the image."
    );
    assert!(out.starts_with(&found), "{out}");
    assert!(err.starts_with("tap-img: warning: ") && err.contains(&warned(cut)), "{err}");
    let json: serde_json::Value =
        serde_json::from_str(&machine.run("check --output json /a.qcow").1).unwrap();
    assert_eq!((&json["corruptions"], &json["leaks"]), (&2.into(), &serde_json::Value::Null));
    // A cluster of which a part is there may never have been written as a whole.
    let (status, out, err) = check(end - 512);
    assert_eq!(status, 0, "{out}");
    assert!(
        out.starts_with("No errors were found on the image.") && err.contains(&warned(end - 512)),
        "{err}"
    );
}

#[test]
fn an_image_on_a_block_device_has_no_leaks() {
    let machine = Machine::quiet();
    machine.put_disk("/disk", 256 << 10);
    let mut content = Content { size: 8 << 20, ..Content::default() };
    content.pages.write(0, &[0x5a; 1 << 20]);
    machine.kernel.storage().put_device("/dev", content);
    for cluster in ["512", "4k", "64k"] {
        machine.ok(&format!("create -q -f qcow -o cluster_size={cluster} /dev 256k"));
        let out = machine.ok("check /dev");
        assert!(out.starts_with("No errors were found on the image.\n0/"), "{out}");
        machine.ok("convert -n -O qcow raw:/disk qcow:/dev");
        let out = machine.ok("check /dev");
        assert!(out.starts_with("No errors were found on the image.\n") && !out.contains("\n0/"), "{out}");
    }
}

#[test]
fn an_image_in_use_is_not_opened() {
    let machine = Machine::quiet();
    machine.ok("create -q -f qcow /a.qcow 1M");
    let guest = machine.kernel.process("tapdisk", 9);
    let held = Rc::new(RefCell::new(None));
    let keep = Rc::clone(&held);
    let open = async move {
        let file = guest.open("/a.qcow", OpenMode::WRITE).await.unwrap();
        tap_host::File::lock(&file, LockKind::Exclusive).await.unwrap();
        *keep.borrow_mut() = Some(file);
    };
    machine.sim.run(open).unwrap();
    for line in ["info /a.qcow", "create -f qcow /a.qcow 2M", "check /a.qcow"] {
        let text = machine.fails(line, 1);
        assert_eq!(text, "lock /a.qcow: it is in use by another process; close it there first", "{line}");
    }
    // A look without a lock, which takes none away.
    machine.ok("create -q /zeros 1M");
    for line in ["info -U", "check -q -U", "map --force-share", "compare -q -U /zeros"] {
        machine.ok(&format!("{line} /a.qcow"));
    }
    machine.ok("convert -U -O qcow /a.qcow /copy.qcow");
    machine.fails("info /a.qcow", 1);
    held.take();
    machine.ok("check -q /a.qcow");
}

#[test]
fn a_full_disk_is_reported_and_the_source_unchanged() {
    let failure = NthFailure {
        n: 30,
        times: NthFailure::FOR_GOOD,
        of: Concerned::All,
        effect: 0,
        error: Errno::ENOSPC,
    };
    let plan = FaultPlan { no_space: true, ..FaultPlan::default() };
    let config = StorageConfig { faults: plan, nth_failure: Some(failure), ..StorageConfig::default() };
    let machine = Machine::new(config);
    machine.put_disk("/disk", 1 << 20);
    let before = machine.kernel.storage().bytes("/disk");
    let text = machine.fails("convert -O qcow raw:/disk /new.qcow", 1);
    assert_eq!(
        text,
        "copy raw:/disk to /new.qcow: no space left on device (ENOSPC); /new.qcow is incomplete"
    );
    assert_eq!(machine.kernel.storage().bytes("/disk"), before);
}
