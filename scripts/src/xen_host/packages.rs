//! Debian's packages: finds those needed, downloads them into the cache, and unpacks them there.
//!
//! ```text
//!   apt-cache depends  ->  names  ->  apt-get download  ->  CACHE/debs  ->  dpkg-deb, tar  ->  CACHE/pool
//! ```
//!
//! Nothing is installed. On a machine with a qemu-utils from backports, installing stable's qemu-system-x86 would
//! remove it; and unpacking needs no root. The pool is complete with its own libc, so a program in it runs as `pool's
//! ld.so --library-path pool's libraries PROGRAM`. Long-running commands run under `setpriv --pdeathsig`, so that they
//! end when this process does.

use super::{Result, progress};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use xshell::{Shell, cmd};

/// Metapackages for the current versions; their dependencies are used.
const META: [&str; 2] = ["xen-system-amd64", "linux-image-amd64"];
/// For dom0 and for the emulator.
const NAMED: [&str; 16] = [
    "xen-utils-common",
    "xenstore-utils",
    "bash",
    // flock, for Xen's block script; setpriv, for tests
    "util-linux",
    "libgcc-s1",
    // the user space of the kernel's nbd driver
    "nbd-client",
    // QEMU as a back end (qdisk), for comparison
    "qemu-system-xen",
    // e2fsck, for file systems that guests have made
    "e2fsprogs",
    "busybox-static",
    // what installs the package of this repository
    "dpkg",
    "tar",
    // for the units of that package
    "systemd",
    "qemu-system-x86",
    "qemu-system-common",
    "qemu-system-data",
    "seabios",
];
/// Never used here, and most of the size.
const LEFT_OUT: [&str; 14] = [
    "./usr/share/doc",
    "./usr/share/man",
    "./usr/share/locale",
    "*/kernel/sound",
    "*/kernel/drivers/gpu",
    "*/kernel/drivers/media",
    "*/kernel/drivers/infiniband",
    "*/kernel/drivers/net",
    "*/kernel/drivers/scsi",
    "*/kernel/drivers/staging",
    "*/kernel/drivers/iio",
    "*/kernel/drivers/usb",
    "*/kernel/drivers/hwmon",
    "*/kernel/net",
];

/// Names of packages, each with those that it depends on.
type Graph = BTreeMap<String, Vec<String>>;

/// Unpacked packages.
pub(super) struct Pool {
    /// The directory that stands for `/`.
    pub(super) root: PathBuf,
    /// The packages with their versions: when this changes, what is built from them is rebuilt.
    pub(super) contents: String,
}

impl Pool {
    /// The pool of a cache, made first if it does not exist.
    pub(super) fn open(sh: &Shell, cache: &Path) -> Result<Self> {
        let root = cache.join("pool");
        // Written last, so a pool that has it is complete.
        let stamp = root.join("contents");
        // A pool made before this list was changed is made again.
        let wanted = format!("{META:?} {NAMED:?} {LEFT_OUT:?}\n");
        if let Ok(contents) = fs::read_to_string(&stamp)
            && contents.starts_with(&wanted)
        {
            return Ok(Self { root, contents });
        }
        let debs = download(sh, cache)?;
        if root.exists() {
            fs::remove_dir_all(&root)?;
        }
        for name in ["bin", "sbin", "lib", "lib64"] {
            fs::create_dir_all(root.join("usr").join(name))?;
            std::os::unix::fs::symlink(format!("usr/{name}"), root.join(name))?;
        }
        for (n, deb) in debs.iter().enumerate() {
            if n % 10 == 0 {
                progress(&format!("unpacking package {} of {}", n + 1, debs.len()));
            }
            unpack(deb, &root)?;
        }
        let names = debs.iter().filter_map(|deb| deb.file_name()).map(|n| n.to_string_lossy() + "\n");
        let contents = names.fold(wanted, |contents, name| contents + &name);
        fs::write(stamp, &contents)?;
        Ok(Self { root, contents })
    }

    pub(super) fn libraries(&self) -> PathBuf {
        self.root.join("usr/lib/x86_64-linux-gnu")
    }

    pub(super) fn loader(&self) -> PathBuf {
        self.libraries().join("ld-linux-x86-64.so.2")
    }
}

/// Downloads every package into the cache, except those that are already there.
fn download(sh: &Shell, cache: &Path) -> Result<Vec<PathBuf>> {
    let first = match try_download(sh, cache) {
        Ok(debs) => return Ok(debs),
        Err(error) => error,
    };
    progress(&format!("failed to {first}; refreshing the lists of packages"));
    apt(cmd!(sh, "apt-get -qq update")).map_err(|error| {
        format!("download packages: {first}; nor can the lists be refreshed, which wants root and a network: {error}")
    })?;
    try_download(sh, cache)
}

/// Runs a command of apt and returns what it prints; its first complaint is the error.
fn apt(command: xshell::Cmd<'_>) -> Result<String> {
    let output = command.quiet().ignore_status().output()?;
    if output.status.success() {
        return Ok(String::from_utf8(output.stdout)?);
    }
    let complaints = String::from_utf8_lossy(&output.stderr);
    let first = complaints.lines().find_map(|line| line.strip_prefix("E: "));
    Err(first.map_or_else(|| format!("apt: {}", output.status), str::to_owned).into())
}

fn try_download(sh: &Shell, cache: &Path) -> Result<Vec<PathBuf>> {
    let roots = META.iter().chain(&NAMED);
    let graph = cmd!(
        sh,
        "apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances {roots...}"
    );
    let graph =
        apt(graph).map_err(|e| format!("find Debian's packages (it takes a Debian, with apt): {e}"))?;
    let names = needed(&parse_graph(&graph))?;
    // Run in a folder without packages: apt-get does not print those that it finds there.
    let in_cache = sh.push_dir(cache);
    let uris = apt(cmd!(sh, "apt-get -qq --print-uris download {names...}"))?;
    drop(in_cache);
    let folder = cache.join("debs");
    fs::create_dir_all(&folder)?;
    let _in_folder = sh.push_dir(&folder);
    let files = parse_uris(&uris)?;
    let there = |file: &&Deb| fs::metadata(folder.join(&file.name)).is_ok_and(|m| m.len() == file.size_bytes);
    let missing: Vec<&Deb> = files.iter().filter(|file| !there(file)).collect();
    if !missing.is_empty() {
        let size_bytes: u64 = missing.iter().map(|file| file.size_bytes).sum();
        progress(&format!("downloading {} packages, {} MB", missing.len(), size_bytes / 1_000_000));
        let packages = missing.iter().map(|file| file.package());
        apt(cmd!(
            sh,
            "setpriv --pdeathsig KILL apt-get -qq -o APT::Sandbox::User=root download {packages...}"
        ))
        .map_err(|error| format!("download packages: {error}"))?;
    }
    match files.iter().find(|file| !there(file)) {
        None => Ok(files.iter().map(|file| folder.join(&file.name)).collect()),
        Some(file) => {
            Err(format!("download {}: it is not of the size that apt's lists say", file.name).into())
        }
    }
}

fn unpack(deb: &Path, root: &Path) -> Result<()> {
    let archive = Command::new("dpkg-deb").arg("--fsys-tarfile").arg(deb).stdout(Stdio::piped()).spawn();
    let mut archive = archive.map_err(|e| format!("run dpkg-deb: {e}"))?;
    let stream = archive.stdout.take().ok_or("read from dpkg-deb")?;
    // dpkg-deb ends when its reader does.
    let mut tar = Command::new("setpriv");
    tar.args(["--pdeathsig", "KILL", "tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C"])
        .arg(root);
    tar.args(LEFT_OUT.iter().map(|pattern| format!("--exclude={pattern}")));
    let unpacked = tar.stdin(stream).status();
    // Waited for in any case, otherwise it would stay as a zombie.
    let read = archive.wait()?;
    if unpacked.map_err(|e| format!("run tar: {e}"))?.success() && read.success() {
        return Ok(());
    }
    Err(format!("unpack {} into {}: is the disk full?", deb.display(), root.display()).into())
}

/// A package's file, as `apt-get --print-uris` describes it.
#[derive(Debug, PartialEq, Eq)]
struct Deb {
    name: String,
    size_bytes: u64,
}

impl Deb {
    fn package(&self) -> &str {
        self.name.split('_').next().unwrap_or(&self.name)
    }
}

/// Lines like `'http://...' NAME_VERSION_ARCH.deb SIZE HASH`.
fn parse_uris(text: &str) -> Result<Vec<Deb>> {
    let line = |line: &str| {
        let mut words = line.split_whitespace().skip(1);
        let (name, size) = (words.next()?, words.next()?);
        Some(Deb { name: name.to_owned(), size_bytes: size.parse().ok()? })
    };
    let parsed =
        text.lines().map(|l| line(l).ok_or_else(|| format!("understand apt-get's line {l:?}").into()));
    parsed.collect()
}

/// What `apt-cache depends --recurse` prints: a name at the margin, below it lines like `  Depends: NAME` and
/// ` |PreDepends: NAME`. Virtual packages are in angle brackets; their providers are printed below them and are not
/// used.
fn parse_graph(text: &str) -> Graph {
    let mut graph = Graph::new();
    let mut current = None;
    for line in text.lines() {
        if !line.starts_with(' ') {
            current = Some(graph.entry(line.to_owned()).or_default());
        } else if let (Some((kind, name)), Some(depends)) = (line.split_once(": "), current.as_mut())
            && kind.ends_with("Depends")
            && !name.starts_with('<')
        {
            depends.push(name.to_owned());
        }
    }
    graph
}

/// The packages of [`META`] and [`NAMED`], with their libraries. Other dependencies (an init, Perl, Python) are for
/// systems that people install.
fn needed(graph: &Graph) -> Result<BTreeSet<String>> {
    let behind = |meta: &str, prefix: &str| {
        let versioned = |name: &&String| {
            name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        };
        let found = graph.get(meta).and_then(|depends| depends.iter().find(versioned));
        found.cloned().ok_or_else(|| format!("find a package {prefix}VERSION behind {meta}"))
    };
    let mut todo: Vec<String> = NAMED.map(str::to_owned).into();
    todo.push(behind(META[0], "xen-hypervisor-")?);
    todo.push(behind(META[0], "xen-utils-")?);
    todo.push(behind(META[1], "linux-image-")?);
    let mut found = BTreeSet::new();
    while let Some(name) = todo.pop() {
        let depends = graph.get(&name).ok_or_else(|| format!("find package {name}"))?;
        if found.insert(name) {
            let library = |name: &&String| name.starts_with("lib") || *name == "zlib1g";
            todo.extend(depends.iter().filter(library).cloned());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDS: &str = "\
xen-system-amd64
  Depends: xen-hypervisor-common
  Depends: xen-hypervisor-4.17-amd64
  Depends: xen-utils-4.17
linux-image-amd64
  Depends: linux-image-6.1.0-56-amd64
xen-hypervisor-4.17-amd64
linux-image-6.1.0-56-amd64
  Depends: kmod
 |Depends: initramfs-tools
  Depends: <linux-initramfs-tool>
    dracut
xen-utils-4.17
  PreDepends: libc6
  Depends: python3
  Depends: zlib1g
libc6
  Depends: libgcc-s1
libgcc-s1
  Depends: libc6
zlib1g
";

    fn graph() -> Graph {
        let mut graph = parse_graph(DEPENDS);
        for name in NAMED {
            graph.entry(name.to_owned()).or_default();
        }
        graph
    }

    #[test]
    fn versions_are_found_and_libraries_followed() {
        let mut expected: BTreeSet<String> = NAMED.map(str::to_owned).into();
        let others =
            ["xen-hypervisor-4.17-amd64", "linux-image-6.1.0-56-amd64", "xen-utils-4.17", "libc6", "zlib1g"];
        expected.extend(others.map(str::to_owned));
        assert_eq!(needed(&graph()).expect("all there"), expected);
    }

    #[test]
    fn a_missing_package_is_named() {
        let mut graph = graph();
        graph.remove("seabios");
        assert_eq!(needed(&graph).expect_err("missing").to_string(), "find package seabios");
        graph.remove("xen-system-amd64");
        let error = needed(&graph).expect_err("missing").to_string();
        assert_eq!(error, "find a package xen-hypervisor-VERSION behind xen-system-amd64");
    }

    #[test]
    fn lines_of_apt_are_read() {
        let line =
            "'http://deb.debian.org/debian/pool/main/s/seabios.deb' seabios_1%3a1.16_all.deb 150 SHA256:00\n";
        let deb = Deb { name: "seabios_1%3a1.16_all.deb".into(), size_bytes: 150 };
        assert_eq!(deb.package(), "seabios");
        assert_eq!(parse_uris(line).expect("good"), [deb]);
        assert!(parse_uris("E: something else").is_err());
    }
}
