//! The same commands for `tap-img` and `qemu-img`, on the same files: statuses, output and JSON.

use crate::server::{TAP_IMG, tool};
use crate::{Add, Done};
use libtest_mimic::Failed;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};

pub(crate) fn tests(add: Add) {
    add("alike::commands_end_and_print_as_those_of_qemu_img".into(), &["qemu-img", "qemu-io"], Box::new(all));
}

/// What is compared besides the exit status.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Of {
    /// Standard output.
    Text,
    /// Standard output as JSON; each key of ours must be there with the same value.
    Json,
    /// That there is an error message, whose words are our own.
    Error,
    /// Nothing.
    Status,
}

/// In order: each command finds the files that the ones before have left.
const COMMANDS: &[(&str, Of)] = &[
    ("create -f qcow new.qcow 1M", Of::Text),
    ("create -q -f qcow new.qcow 3M", Of::Text),
    ("create new.raw 1000", Of::Text),
    ("create -f raw new.raw .5M", Of::Text),
    ("create -f raw new.raw 0x1200", Of::Text),
    ("create -f raw new.raw 1KiBiB", Of::Error),
    ("create -f raw new.raw 0.5", Of::Error),
    ("create -f raw new.raw", Of::Error),
    ("create -q -f qcow -b gone -F raw over.qcow", Of::Error),
    ("create -q -f qcow -b disk -F raw over.qcow", Of::Text),
    ("info disk", Of::Text),
    ("info -U -f raw disk", Of::Text),
    ("info made.qcow", Of::Text),
    ("info odd.qcow", Of::Text),
    ("info above.qcow", Of::Text),
    ("info --output=json above.qcow", Of::Json),
    ("info --output=json --backing-chain above.qcow", Of::Json),
    ("info almost-1M", Of::Text),
    ("info many", Of::Text),
    ("info gone", Of::Error),
    ("map disk", Of::Text),
    ("map --output=json disk", Of::Json),
    ("map -f raw --output=json almost-1M", Of::Json),
    ("convert -f raw -O qcow disk copy.qcow", Of::Text),
    ("convert -n disk gone", Of::Error),
    ("compare -f raw -F qcow disk copy.qcow", Of::Text),
    ("convert -O raw bad.qcow copy.raw", Of::Error),
    ("convert -q --salvage -O raw bad.qcow copy.raw", Of::Text),
    ("compare -f raw -F raw copy.raw salvaged", Of::Text),
    ("compare disk changed", Of::Text),
    ("compare disk short", Of::Text),
    ("compare -s disk short", Of::Text),
    ("compare disk gone", Of::Error),
    ("check disk", Of::Error),
    ("check gone", Of::Error),
    ("info", Of::Error),
    ("info disk disk", Of::Error),
    ("frobnicate disk", Of::Error),
    ("--version", Of::Status),
];

fn prepare(folder: &Path) -> Done {
    let path = |name: &str| folder.join(name).display().to_string();
    tool("qemu-img", &["create", "-q", &path("disk"), "1M"])?;
    tool("qemu-io", &["-f", "raw", "-c", "write -P 5 64k 128k", &path("disk")])?;
    std::fs::copy(path("disk"), path("changed"))?;
    tool("qemu-io", &["-f", "raw", "-c", "write -P 6 192k 512", &path("changed")])?;
    for (name, bytes) in [("short", 512 << 10), ("almost-1M", 1_047_552), ("many", 123_457_024)] {
        std::fs::File::create(path(name))?.set_len(bytes)?;
    }
    tool("qemu-img", &["create", "-q", "-f", "qcow", &path("made.qcow"), "3M"])?;
    tool("qemu-img", &["create", "-q", "-f", "qcow", "-b", "disk", "-F", "raw", &path("above.qcow")])?;
    damage(folder)?;
    // A disk that does not end with a whole sector.
    tool("qemu-img", &["create", "-q", "-f", "qcow", &path("odd.qcow"), "1M"])?;
    let mut odd = std::fs::read(path("odd.qcow"))?;
    odd[24..32].copy_from_slice(&((1_u64 << 20) - 24).to_be_bytes());
    Ok(std::fs::write(path("odd.qcow"), odd)?)
}

/// Makes `bad.qcow`, a copy of `disk` whose cluster 16 does not decompress, and `salvaged`, the rest of it.
fn damage(folder: &Path) -> Done {
    let path = |name: &str| folder.join(name).display().to_string();
    tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow", &path("disk"), &path("bad.qcow")])?;
    let mut bad = std::fs::read(path("bad.qcow"))?;
    let number = |bad: &[u8], at: usize| u64::from_be_bytes(std::array::from_fn(|i| bad[at + i]));
    let table = number(&bad, number(&bad, 40) as usize) as usize;
    let other = number(&bad, table + 17 * 8);
    bad[table + 16 * 8..][..8].copy_from_slice(&(1 << 63 | 100 << 51 | other).to_be_bytes());
    std::fs::write(path("bad.qcow"), bad)?;
    let mut rest = std::fs::read(path("disk"))?;
    rest[16 * 4096..17 * 4096].fill(0);
    Ok(std::fs::write(path("salvaged"), rest)?)
}

/// Exit status and both outputs.
fn run(program: &str, words: &str, folder: &Path) -> Result<(Option<i32>, String, String), Failed> {
    let mut command = Command::new(program);
    let output = command.args(words.split(' ')).current_dir(folder).stdin(Stdio::null()).output()?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok((output.status.code(), text(output.stdout), text(output.stderr)))
}

/// Without what newer versions of qemu-img print about the file below a format.
fn own_part(text: &str) -> &str {
    text.find("Child node").map_or(text, |at| &text[..at])
}

/// The first key of `ours` that `theirs` has not, or with another value.
fn different(ours: &Value, theirs: &Value) -> Option<String> {
    match (ours, theirs) {
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            a.iter().zip(b).find_map(|(a, b)| different(a, b))
        }
        (Value::Object(a), _) => a
            .iter()
            .find_map(|(key, value)| different(value, &theirs[key]).map(|why| format!("{key}: {why}"))),
        _ => (ours != theirs).then(|| format!("{ours} instead of {theirs}")),
    }
}

fn all() -> Done {
    let (a, b) = (tempfile::tempdir()?, tempfile::tempdir()?);
    prepare(a.path())?;
    prepare(b.path())?;
    let mut wrong = Vec::new();
    for (words, of) in COMMANDS {
        let ours = run(TAP_IMG, words, a.path())?;
        let theirs = run("qemu-img", words, b.path())?;
        let same = ours.0 == theirs.0
            && match of {
                Of::Status => true,
                Of::Text => ours.1 == own_part(&theirs.1) && ours.2.is_empty(),
                Of::Error => {
                    ours.1.is_empty() && ours.2.starts_with("tap-img: ") && ours.2.lines().count() == 1
                }
                Of::Json => {
                    let why = different(&serde_json::from_str(&ours.1)?, &serde_json::from_str(&theirs.1)?);
                    if let Some(why) = &why {
                        wrong.push(format!("{words}: {why}"));
                    }
                    why.is_none()
                }
            };
        if !same {
            wrong.push(format!("{words}:\n  ours {ours:?}\n  theirs {theirs:?}"));
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n").into()) }
}
