//! `tap-img check` on images that QEMU made, on a block device, and after `truncate`.

use crate::client::{Client, WRITE};
use crate::server::{Server, TAP_IMG, tool};
use crate::{Add, Done};
use libtest_mimic::{Completion, Failed, Trial};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};

pub(crate) fn tests(add: Add) {
    let add_one = |add: Add, name: &str, needs, test: fn() -> Done| {
        add(format!("check::{name}"), needs, Box::new(test));
    };
    add_one(add, "space_that_qemu_leaves_out_is_not_leaked", &["qemu-img"], padded);
    add_one(add, "a_file_that_was_cut_off_is_damaged", &["qemu-img"], cut_off);
    add_one(
        add,
        "a_table_that_qemu_had_not_written_reads_as_qemu_reads_it",
        &["qemu-img", "qemu-io"],
        unwritten,
    );
}

pub(crate) fn trials() -> Vec<Trial> {
    vec![Trial::ignorable_test("check::an_image_on_a_block_device_has_no_leaks", on_device)]
}

/// Exit status and JSON of `check`.
fn checked(image: &str) -> Result<(Option<i32>, Value), Failed> {
    let args = ["check", "--output", "json", image];
    let output = Command::new(TAP_IMG).args(args).stdin(Stdio::null()).output()?;
    Ok((output.status.code(), serde_json::from_slice(&output.stdout)?))
}

fn is_clean(image: &str) -> Result<Value, Failed> {
    let (status, report) = checked(image)?;
    match (status, &report["leaks"], &report["corruptions"]) {
        (Some(0), Value::Null, Value::Null) => Ok(report),
        _ => Err(format!("check {image}: {status:?}, {report}").into()),
    }
}

/// A disk of clusters that are compressed well, badly, or not at all, and of holes.
fn put_mixed(path: &Path) -> Done {
    let mut rng = ChaCha8Rng::seed_from_u64(41);
    let mut bytes = vec![0; 1 << 20];
    for cluster in bytes.chunks_mut(4096) {
        match rng.next_u64() % 4 {
            0 => cluster.fill(7),
            1 => rng.fill_bytes(&mut cluster[..2000]),
            2 => rng.fill_bytes(cluster),
            _ => {}
        }
    }
    Ok(std::fs::write(path, bytes)?)
}

/// Compressed images on media with blocks of 512 and of 4096 bytes, with clusters of 4096 and of 512 bytes.
fn padded() -> Done {
    let folder = tempfile::tempdir()?;
    let text = |name: &str| folder.path().join(name).display().to_string();
    put_mixed(&folder.path().join("disk"))?;
    tool("qemu-img", &["create", "-q", &text("base"), "1M"])?;
    for block in [512, 4096] {
        for above in [&[][..], &["-b", "base", "-F", "raw"]] {
            let image = text("image");
            let create = ["create", "-q", "-f", "qcow", &image];
            let size = if above.is_empty() { &["1M"][..] } else { &[] };
            tool("qemu-img", &[&create[..], above, size].concat())?;
            let target = format!(
                "driver=qcow,file.driver=blkdebug,file.align={block},file.image.driver=file,file.image.filename={image}"
            );
            let convert = ["convert", "-c", "-n", "-f", "raw", "--target-image-opts", &text("disk"), &target];
            // It ends with 1 although all is there, as the comparison shows.
            Command::new("qemu-img").args(convert).stdin(Stdio::null()).output()?;
            tool(
                TAP_IMG,
                &[
                    "compare",
                    "-q",
                    "--backing",
                    "raw",
                    &format!("qcow:{image}"),
                    &format!("raw:{}", text("disk")),
                ],
            )?;
            let report = is_clean(&image)?;
            assert!(report["compressed-clusters"].as_u64() > Some(60), "{report}");
        }
    }
    Ok(())
}

fn cut_off() -> Done {
    let folder = tempfile::tempdir()?;
    let text = |name: &str| folder.path().join(name).display().to_string();
    put_mixed(&folder.path().join("disk"))?;
    let image = text("image");
    for maker in ["qemu-img", TAP_IMG] {
        tool(maker, &["convert", "-f", "raw", "-O", "qcow", &text("disk"), &image])?;
        let file = std::fs::File::options().write(true).open(&image)?;
        let mut size = file.metadata()?.len();
        while size > 20_000 {
            // By whole clusters, and in the middle of them.
            size -= 18_000;
            file.set_len(size)?;
            let (status, report) = checked(&image)?;
            let found = report["corruptions"].as_u64();
            assert!(status == Some(2) && found > Some(0), "{maker}, {size} bytes: {status:?}, {report}");
            let output = Command::new(TAP_IMG).args(["check", &image]).output()?;
            let said = String::from_utf8_lossy(&output.stdout);
            let words = format!("the end of the file at byte {size}");
            assert!(said.starts_with("ERROR ") && said.contains(&words), "{said}");
        }
        // The first table, and then the L1 table.
        file.set_len(1000)?;
        let output = Command::new(TAP_IMG).args(["check", &image]).output()?;
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(matches!(output.status.code(), Some(1 | 2)), "{said}");
    }
    Ok(())
}

/// The host crashed when QEMU had made the L1 entry of a new table durable, and not yet written the table, which begins
/// at the end of the file. For QEMU what lies past the end is zeros.
fn unwritten() -> Done {
    let folder = tempfile::tempdir()?;
    let text = |name: &str| folder.path().join(name).display().to_string();
    put_mixed(&folder.path().join("disk"))?;
    // A table of QEMU maps 2 MiB.
    let mut bytes = std::fs::read(text("disk"))?;
    bytes.resize(4 << 20, 0);
    std::fs::write(text("disk"), &bytes)?;
    let mut below = bytes.clone();
    below[2 << 20..].fill(5);
    std::fs::write(text("base"), &below)?;
    let (image, base) = (text("image"), text("base"));
    for (packed, above) in [(false, false), (true, false), (false, true)] {
        let mut shown = bytes.clone();
        if above {
            tool("qemu-img", &["create", "-q", "-f", "qcow", "-b", &base, "-F", "raw", &image])?;
            tool("qemu-io", &["-f", "qcow", "-c", "write -P 7 64k 128k", &image])?;
            shown.clone_from(&below);
            shown[64 << 10..][..128 << 10].fill(7);
        } else {
            let compressed: &[&str] = if packed { &["-c"] } else { &[] };
            let convert = [&["convert", "-f", "raw", "-O", "qcow"], compressed].concat();
            // With compression it may end with 1 although all is there.
            Command::new("qemu-img").args(convert).args([&text("disk"), &image]).output()?;
        }
        let mut made = std::fs::read(&image)?;
        let number = |at: usize| u64::from_be_bytes(std::array::from_fn(|i| made[at + i]));
        let root = number(40) as usize;
        assert_eq!((number(24), number(root + 8)), (4 << 20, 0), "two tables, of which one is there");
        let end = made.len().next_multiple_of(1 << made[32]) as u64;
        made[root + 8..root + 16].copy_from_slice(&end.to_be_bytes());
        std::fs::write(&image, made)?;
        let as_is = ["convert", "-O", "raw", "-f", "qcow", &image];
        tool("qemu-img", &[&as_is[..], &[&text("theirs")]].concat())?;
        tool(TAP_IMG, &[&as_is[..], &["--backing", "raw", &text("ours")]].concat())?;
        let (ours, theirs) = (std::fs::read(text("ours"))?, std::fs::read(text("theirs"))?);
        assert!(ours == theirs, "{packed} {above}: both read the same");
        assert!(ours == shown, "{packed} {above}: what was written");
        let (status, report) = checked(&image)?;
        assert!(status == Some(2) && report["corruptions"] == 1, "{status:?}, {report}");
        // What we write there is there for QEMU, too.
        let mut new = shown;
        new[3 << 20..][..1 << 20].fill(6);
        let args = [&*format!("qcow:{image}"), "--backing", "raw"];
        let server = Server::start(&folder.path().join("socket"), &args)?;
        assert_eq!(Client::connect(server.socket())?.ask(WRITE, 3 << 20, &[6; 1 << 20])?, 0);
        assert!(server.stop()?.success());
        tool("qemu-img", &[&as_is[..], &[&text("theirs")]].concat())?;
        assert!(std::fs::read(text("theirs"))? == new, "{packed} {above}: after a write");
        is_clean(&image)?;
    }
    Ok(())
}

/// A loop device, detached when dropped.
struct Loop(String);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

fn on_device() -> Result<Completion, Failed> {
    let folder = tempfile::tempdir()?;
    let (medium, disk) = (folder.path().join("medium"), folder.path().join("disk"));
    // Not zeros: a device holds anything.
    std::fs::write(&medium, vec![0x5a; 8 << 20])?;
    put_mixed(&disk)?;
    let attached = Command::new("losetup").args(["--show", "-f"]).arg(&medium).output();
    let Some(attached) = attached.ok().filter(|output| output.status.success()) else {
        return Ok(Completion::ignored_with("loop devices are not permitted here"));
    };
    let device = Loop(String::from_utf8_lossy(&attached.stdout).trim().to_owned());
    for cluster in ["cluster_size=512", "cluster_size=4k", "cluster_size=64k"] {
        tool(TAP_IMG, &["create", "-q", "-f", "qcow", "-o", cluster, &device.0, "2M"])?;
        assert_eq!(is_clean(&device.0)?["allocated-clusters"], 0, "fresh");
        let (from, to) = (format!("raw:{}", disk.display()), format!("qcow:{}", device.0));
        tool(TAP_IMG, &["create", "-q", "-f", "qcow", "-o", cluster, &device.0, "1M"])?;
        tool(TAP_IMG, &["convert", "-n", "-O", "qcow", &from, &to])?;
        assert!(is_clean(&device.0)?["allocated-clusters"].as_u64() > Some(0));
        tool(TAP_IMG, &["compare", "-q", &from, &to])?;
    }
    Ok(Completion::Completed)
}
