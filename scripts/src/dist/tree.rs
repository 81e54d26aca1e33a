//! The tree of files that is installed.

use super::files::{put, root};
use super::{PROGRAMS, Release, Result, notices};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use xshell::{Shell, cmd};

/// Where each file of drivers/tapdisk goes, and its mode.
const FILES: [(&str, &str, u32); 10] = [
    ("xen/block-tapdisk", "etc/xen/scripts/block-tapdisk", 0o755),
    ("xen/block-tapback", "etc/xen/scripts/block-tapback", 0o755),
    ("package/systemd/tapback.service", "usr/lib/systemd/system/tapback.service", 0o644),
    ("package/defaults/tapback", "etc/default/tapback", 0o644),
    ("package/defaults/tapdisk-xen", "etc/default/tapdisk-xen", 0o644),
    ("package/systemd/tapdisk-xen.service", "usr/lib/systemd/system/tapdisk-xen.service", 0o644),
    ("package/systemd/tapdisk-nbd@.service", "usr/lib/systemd/system/tapdisk-nbd@.service", 0o644),
    ("package/systemd/tapdisk.sysusers", "usr/lib/sysusers.d/tapdisk.conf", 0o644),
    ("package/nbd.conf", "usr/share/doc/tapdisk/examples/nbd.conf", 0o644),
    ("package/xen-blkback.conf", "usr/share/doc/tapdisk/examples/xen-blkback.conf", 0o644),
];
/// Of docs/user.
const DOCUMENTS: [&str; 7] =
    ["deploy.md", "dom0.md", "guests.md", "mason.md", "serve.md", "tap-ctl.md", "tls.md"];
pub(super) const DOC: &str = "usr/share/doc/tapdisk";
const MANUALS: &str = "usr/share/man/man1";

/// Fills `release.tree`.
pub(super) fn make(sh: &Shell, target: &Path, release: &Release) -> Result<()> {
    let tree = &release.tree;
    for (name, program) in PROGRAMS.iter().zip(&release.unstripped) {
        let to = tree.join("usr/bin").join(name);
        put(&to, &fs::read(program)?, 0o755)?;
        cmd!(sh, "strip {to}").quiet().run()?;
    }
    pages(sh, target, release)?;
    let (root, drivers) = (root(), root().join("drivers/tapdisk"));
    for (from, to, mode) in FILES {
        put(&tree.join(to), &read(&drivers.join(from))?, mode)?;
    }
    for name in DOCUMENTS {
        put(&tree.join(DOC).join(name), &read(&root.join("docs/user").join(name))?, 0o644)?;
    }
    put(&tree.join(DOC).join("copyright"), notices::text(sh)?.as_bytes(), 0o644)?;
    let date = format!("@{}", release.source.epoch_s);
    let date = cmd!(sh, "date --utc --rfc-email --date={date}").quiet().read()?;
    let changes = changelog(release, &date);
    packed(sh, &tree.join(DOC).join("changelog.gz"), changes.as_bytes())?;
    normal(tree)
}

/// Man pages and completions. A build of the whole workspace has its examples already.
fn pages(sh: &Shell, target: &Path, release: &Release) -> Result<()> {
    let build = cmd!(sh, "cargo build --quiet --locked --target-dir {target} --workspace --example pages");
    release.source.pass(build).run()?;
    let (program, tree) = (target.join("debug/examples/pages"), &release.tree);
    cmd!(sh, "{program} {tree}").quiet().run()?;
    for entry in fs::read_dir(tree.join(MANUALS))? {
        let page = entry?.path();
        cmd!(sh, "gzip -9n {page}").quiet().run()?;
    }
    Ok(())
}

fn changelog(release: &Release, date: &str) -> String {
    let (version, revision) = (&release.source.version, &release.source.revision);
    let by = notices::maintainer();
    format!(
        "tapdisk ({version}) unstable; urgency=medium\n\n  * Built from revision {revision}.\n\n -- {by}  {date}\n"
    )
}

/// Writes a file packed with gzip, without its name and time.
fn packed(sh: &Shell, path: &Path, data: &[u8]) -> Result<()> {
    let plain = path.with_extension("");
    put(&plain, data, 0o644)?;
    Ok(cmd!(sh, "gzip -9n {plain}").quiet().run()?)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|e| format!("failed to read {}: {e}", path.display()).into())
}

/// Modes that do not depend on the umask: what may be executed stays so, and nobody but the owner writes.
fn normal(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let (path, kind) = entry.map(|entry| (entry.path(), entry.file_type()))?;
        if kind?.is_dir() {
            normal(&path)?;
            continue;
        }
        let executable = fs::metadata(&path)?.permissions().mode() & 0o100 != 0;
        fs::set_permissions(&path, fs::Permissions::from_mode(if executable { 0o755 } else { 0o644 }))?;
    }
    Ok(fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?)
}
