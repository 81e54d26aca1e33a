//! The Debian package: the tree, the control file, the scripts of drivers/tapdisk/package/debian.

use super::files::{put, root};
use super::{Release, Result, notices};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use xshell::{Shell, cmd};

/// Scripts run by dpkg.
pub(super) const SCRIPTS: [&str; 3] = ["postinst", "prerm", "postrm"];

fn control(version: &str, size_kib: u64) -> String {
    let maintainer = notices::maintainer();
    format!(
        "\
Package: tapdisk
Version: {version}
Architecture: amd64
Maintainer: {maintainer}
Installed-Size: {size_kib}
Section: admin
Priority: optional
Suggests: xen-utils-common, nbd-client
Description: disk images for Xen guests and NBD clients, in user space
 The daemon tapdisk serves disk images (raw, qcow) to the block front ends of Xen
 guests, and over NBD. It can be stopped, killed and upgraded while guests run:
 their requests wait for the next one.
 .
 tap-img creates, shows, checks, compares and converts images, with the options
 of qemu-img. mason checks and draws graphs of disks, which are served like images.
 .
 The programs are linked statically, for hosts with an old C library; with Linux
 4.19 or later they use io_uring where the kernel has it, and threads elsewhere.
"
    )
}

/// Makes the package `to` of the tree, called `version`.
pub(super) fn pack(sh: &Shell, release: &Release, version: &str, to: &Path) -> Result<()> {
    let stage = release.tree.with_file_name("stage");
    if stage.exists() {
        fs::remove_dir_all(&stage)?;
    }
    let tree = &release.tree;
    cmd!(sh, "cp -a {tree} {stage}").quiet().run()?;
    let (sums, size_kib) = contents(sh, tree)?;
    let own = stage.join("DEBIAN");
    put(&own.join("control"), control(version, size_kib).as_bytes(), 0o644)?;
    put(&own.join("md5sums"), sums.as_bytes(), 0o644)?;
    let from = root().join("drivers/tapdisk/package/debian");
    put(&own.join("conffiles"), &fs::read(from.join("conffiles"))?, 0o644)?;
    for name in SCRIPTS {
        put(&own.join(name), &fs::read(from.join(name))?, 0o755)?;
    }
    // dpkg-deb refuses a folder that not everybody may read, which a umask can make it.
    fs::set_permissions(&own, fs::Permissions::from_mode(0o755))?;
    let epoch = release.source.epoch_s.to_string();
    // One thread: the packed bytes depend on their number.
    cmd!(sh, "dpkg-deb --root-owner-group -Zxz --threads-max=1 --build {stage} {to}")
        .env("SOURCE_DATE_EPOCH", epoch)
        .quiet()
        .ignore_stdout()
        .run()
        .map_err(|e| format!("dpkg-deb (Debian's package dpkg) makes no package: {e}"))?;
    Ok(fs::remove_dir_all(stage)?)
}

/// The file md5sums, and the size of all files as dpkg counts it.
fn contents(sh: &Shell, tree: &Path) -> Result<(String, u64)> {
    let _in_tree = sh.push_dir(tree);
    let files = cmd!(sh, "find . -type f -printf '%P\\n'").quiet().read()?;
    let mut files: Vec<&str> = files.lines().collect();
    files.sort_unstable();
    let sizes = files.iter().map(|file| Ok(fs::metadata(tree.join(file))?.len().div_ceil(1024)));
    let size_kib = sizes.sum::<std::io::Result<u64>>()?;
    let listed: Vec<&str> = files.into_iter().filter(|file| !file.starts_with("etc/")).collect();
    Ok((cmd!(sh, "md5sum {listed...}").quiet().read()? + "\n", size_kib))
}
