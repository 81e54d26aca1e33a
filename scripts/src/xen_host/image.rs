//! The boot files: Xen, the kernel, and the root file systems of dom0 and of guests, made from the pool.
//!
//! ```text
//!   pool -> CACHE/image/xen         the hypervisor, for QEMU's multiboot loader
//!           CACHE/image/vmlinux     dom0's kernel; unpacked here, because under emulation that takes minutes
//!           CACHE/image/dom0.cpio   Xen's tools, busybox, modules, and in /domu the same kernel and a guest's files
//!         + a layer for each run    /init, the scripts of scripts/xen-host, programs, files that the user copies in
//! ```
//!
//! dom0 is an initramfs: no disk, no installation, fresh at each boot. Everything from this repository is in the layer,
//! so that changing a script does not rebuild the image; changing this file or the packages does.

use super::cpio::Archive;
use super::packages::Pool;
use super::{Result, progress};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use xshell::{Shell, cmd};

/// Programs from /usr.
const PROGRAMS: [&str; 15] = [
    "bin/bash",
    "bin/dpkg",
    "bin/dpkg-deb",
    "bin/dpkg-query",
    "bin/dpkg-split",
    "bin/flock",
    "bin/setpriv",
    "bin/systemctl",
    "bin/systemd-sysusers",
    "bin/tar",
    "lib/systemd/systemd",
    "libexec/xen-qemu-system-i386",
    "sbin/e2fsck",
    "sbin/nbd-client",
    "sbin/start-stop-daemon",
];
/// Units of systemd, which only some tests start.
const UNITS: [&str; 14] = [
    "basic.target",
    "local-fs.target",
    "local-fs-pre.target",
    "multi-user.target",
    "network.target",
    "paths.target",
    "remote-fs.target",
    "shutdown.target",
    "slices.target",
    "sockets.target",
    "swap.target",
    "sysinit.target",
    "timers.target",
    "umount.target",
];
/// Programs from /usr/lib/xen-VERSION/bin.
const XEN_PROGRAMS: [&str; 8] = [
    "xl",
    "xenstored",
    "xenconsoled",
    "xenconsole",
    "xen-init-dom0",
    "lsevtchn",
    "libxl-save-helper",
    "xen-diag",
];
const DOM0_MODULES: [&str; 13] = [
    "xen-evtchn",
    "xen-gntdev",
    "xen-gntalloc",
    "xen-privcmd",
    "xenfs",
    "xen-blkback",
    "loop",
    "nbd",
    "null_blk",
    "virtio_pci",
    "virtio_blk",
    "ext4",
    "crc32c_generic",
];
const GUEST_MODULES: [&str; 3] = ["xen-blkfront", "ext4", "crc32c_generic"];

/// Files to boot from.
pub(super) struct Image {
    pub(super) xen: PathBuf,
    pub(super) kernel: PathBuf,
    pub(super) dom0: PathBuf,
}

impl Image {
    /// The image of a cache, made first if it is missing or was made from other inputs.
    pub(super) fn open(sh: &Shell, cache: &Path, pool: &Pool) -> Result<Self> {
        let folder = cache.join("image");
        let image =
            Self { xen: folder.join("xen"), kernel: folder.join("vmlinux"), dom0: folder.join("dom0.cpio") };
        let key = key(&pool.contents);
        let stamp = folder.join("key");
        if fs::read_to_string(&stamp).is_ok_and(|made| made == key) {
            return Ok(image);
        }
        progress("making dom0's image");
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(&folder)?;
        let boot = pool.root.join("boot");
        let hypervisor = find(&boot, "xen-", "-amd64.gz")?;
        fs::write(&image.xen, unpacked(&["gzip", "-dc"], &fs::read(hypervisor)?)?)?;
        let packed = fs::read(find(&boot, "vmlinuz-", "")?)?;
        let payload = payload(&packed)?;
        fs::write(&image.kernel, unpacked(unpacker(payload)?, payload)?)?;
        Builder { sh, pool, modules: Modules::index(pool)? }.dom0(&image)?;
        fs::write(stamp, key)?;
        Ok(image)
    }
}

/// A key that changes with the packages and with the code that makes the image.
fn key(contents: &str) -> String {
    let mut hasher = DefaultHasher::new();
    (contents, include_str!("image.rs"), include_str!("cpio.rs")).hash(&mut hasher);
    format!("{:016x}\n", hasher.finish())
}

struct Builder<'a> {
    sh: &'a Shell,
    pool: &'a Pool,
    modules: Modules,
}

impl Builder<'_> {
    fn dom0(&self, image: &Image) -> Result<()> {
        let root = &self.pool.root;
        let mut archive = Archive::new(BufWriter::new(File::create(&image.dom0)?));
        let xen = fs::canonicalize(
            find(&root.join("usr/lib"), "xen-4", "").or_else(|_| find(&root.join("usr/lib"), "xen-", ""))?,
        )?;
        let xen_in_dom0 = xen.strip_prefix(fs::canonicalize(root)?)?.display().to_string();
        let mut programs: Vec<PathBuf> = PROGRAMS.map(|name| root.join("usr").join(name)).into();
        for program in &programs {
            archive.copy(&in_root(root, program)?, program)?;
        }
        for name in XEN_PROGRAMS {
            let program = xen.join("bin").join(name);
            archive.copy(&format!("{xen_in_dom0}/bin/{name}"), &program)?;
            archive.link(&format!("usr/sbin/{name}"), &format!("/{xen_in_dom0}/bin/{name}"))?;
            programs.push(program);
        }
        for entry in fs::read_dir(root.join("usr/bin"))? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            // xenstore-control is a wrapper script for a program that is left out.
            if name.starts_with("xenstore") && name != "xenstore-control" {
                archive.copy(&format!("usr/bin/{name}"), &path)?;
                programs.push(path);
            }
        }
        archive.tree("etc/xen", &root.join("etc/xen"))?;
        // xl always starts qemu with a VNC server, which needs a keyboard map.
        let keyboard = root.join("usr/share/qemu/keymaps/en-us");
        archive.copy(&in_root(root, &keyboard)?, &keyboard)?;
        // Libraries that Rust programs need, in addition to those of Xen's tools.
        let mut libraries: BTreeSet<PathBuf> =
            ["libgcc_s.so.1", "libm.so.6", "libc.so.6"].map(|name| self.pool.libraries().join(name)).into();
        for program in &programs {
            libraries.extend(self.libraries_of(program)?);
        }
        for library in libraries {
            archive.copy(&in_root(root, &library)?, &library)?;
        }
        let loader = self.pool.loader();
        archive.copy(&in_root(root, &loader)?, &loader)?;
        archive.link("usr/lib64/ld-linux-x86-64.so.2", "../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")?;
        self.skeleton(&mut archive, &DOM0_MODULES)?;
        for folder in
            ["var/lib/xen", "var/log/xen", "run/xen", "run/xenstored", "run/lock", "run/xen-hotplug"]
        {
            archive.directory(folder)?;
        }
        // dpkg's own files. It insists on a program that is not used: no package of ours has a library.
        for folder in ["var/lib/dpkg/info", "var/lib/dpkg/updates"] {
            archive.directory(folder)?;
        }
        archive.file("var/lib/dpkg/status", 0o644, b"")?;
        archive.file("var/lib/dpkg/available", 0o644, b"")?;
        archive.file("usr/sbin/ldconfig", 0o755, b"#!/bin/sh\n")?;
        for name in UNITS {
            let unit = root.join("usr/lib/systemd/system").join(name);
            archive.copy(&in_root(root, &unit)?, &unit)?;
        }
        let mut guest = Archive::new(Vec::new());
        self.skeleton(&mut guest, &GUEST_MODULES)?;
        archive.file("domu/base.cpio", 0o644, &guest.finish()?)?;
        archive.copy("domu/vmlinux", &image.kernel)?;
        Ok(archive.finish()?.flush()?)
    }

    /// Directories, busybox, modules: everything that a guest has.
    fn skeleton(&self, archive: &mut Archive<impl Write>, modules: &[&str]) -> Result<()> {
        for name in ["bin", "sbin", "lib", "lib64"] {
            archive.directory(&format!("usr/{name}"))?;
            archive.link(name, &format!("usr/{name}"))?;
        }
        archive.directory("var")?;
        archive.link("var/run", "../run")?;
        for name in ["dev", "proc", "sys", "tmp", "run", "etc", "root", "mnt", "out"] {
            archive.directory(name)?;
        }
        archive.character_device("dev/console", 5, 1)?;
        archive.character_device("dev/null", 1, 3)?;
        archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")?;
        archive.file("etc/group", 0o644, b"root:x:0:\n")?;
        let busybox = self.pool.root.join("usr/bin/busybox");
        archive.copy("usr/bin/busybox", &busybox)?;
        let sh = self.sh;
        for applet in cmd!(sh, "{busybox} --list").quiet().read()?.lines() {
            archive.link(&format!("usr/bin/{applet}"), "busybox")?;
        }
        self.modules.add(archive, modules)
    }

    /// The shared libraries that a program of the pool is linked with, as the pool's own loader finds them.
    fn libraries_of(&self, program: &Path) -> Result<Vec<PathBuf>> {
        let (sh, loader, path) = (self.sh, self.pool.loader(), self.pool.libraries());
        // Where systemd has its own.
        let own = path.join("systemd");
        let text = cmd!(sh, "{loader} --library-path {path}:{own} --list {program}")
            .quiet()
            .read()
            .map_err(|e| format!("find the libraries of {}: {e}", program.display()))?;
        let of_line = |line: &str| {
            let (name, found) = line.trim().split_once(" => ")?;
            let path = PathBuf::from(found.split_whitespace().next()?);
            Some((name.to_owned(), path))
        };
        let mut libraries = Vec::new();
        for (name, library) in text.lines().filter_map(of_line) {
            if !library.starts_with(&path) {
                return Err(
                    format!("find {name} in Debian's packages, which {} needs", program.display()).into()
                );
            }
            libraries.push(library);
        }
        Ok(libraries)
    }
}

/// Where a file of the pool is in dom0.
fn in_root(root: &Path, path: &Path) -> Result<String> {
    Ok(path.strip_prefix(root)?.display().to_string())
}

/// The only entry of a folder whose name matches.
fn find(folder: &Path, prefix: &str, suffix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).map_err(|e| format!("read {}: {e}", folder.display()))?;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(prefix) && name.ends_with(suffix) {
            return Ok(entry.path());
        }
    }
    Err(format!("find {prefix}*{suffix} in {}: remove the cache and try again", folder.display()).into())
}

/// The kernel modules of the pool.
struct Modules {
    /// The kernel's release, like `6.1.0-56-amd64`.
    release: String,
    /// Files by name; `-` and `_` are the same in names of modules.
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl Modules {
    fn index(pool: &Pool) -> Result<Self> {
        let folder = find(&pool.root.join("usr/lib/modules"), "", "")?;
        let release = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut files = BTreeMap::new();
        let mut todo = vec![folder.join("kernel")];
        while let Some(at) = todo.pop() {
            for entry in fs::read_dir(&at).map_err(|e| format!("read {}: {e}", at.display()))? {
                let path = entry?.path();
                if path.is_dir() {
                    todo.push(path);
                } else {
                    files.insert(module_name(&path), path);
                }
            }
        }
        let builtin = fs::read_to_string(folder.join("modules.builtin"))?;
        let builtin = builtin.lines().map(|line| module_name(Path::new(line))).collect();
        Ok(Self { release, files, builtin })
    }

    /// Adds modules, their dependencies, and the dependency list for modprobe.
    fn add(&self, archive: &mut Archive<impl Write>, wanted: &[&str]) -> Result<()> {
        let mut todo: Vec<String> = wanted.iter().map(|name| name.replace('-', "_")).collect();
        let mut direct: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let folder = format!("usr/lib/modules/{}", self.release);
        while let Some(name) = todo.pop() {
            if direct.contains_key(&name) || self.builtin.contains(&name) {
                continue;
            }
            let path = self.files.get(&name).ok_or_else(|| format!("find kernel module {name}"))?;
            let mut data = fs::read(path)?;
            if path.extension().is_some_and(|e| e == "xz") {
                data = unpacked(&["xz", "-dc"], &data)?;
            }
            let depends = depends(&data);
            todo.extend(depends.iter().cloned());
            archive.file(&format!("{folder}/{name}.ko"), 0o644, &data)?;
            direct.insert(name, depends);
        }
        archive.file(&format!("{folder}/modules.dep"), 0o644, modules_dep(&direct).as_bytes())
    }
}

/// `xen-blkback.ko.xz` is `xen_blkback`.
fn module_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.split('.').next().unwrap_or("").replace('-', "_")
}

/// The names in a module's `depends=` of its .modinfo section.
fn depends(module: &[u8]) -> Vec<String> {
    let mark = b"\0depends=";
    let Some(at) = module.windows(mark.len()).position(|window| window == mark) else { return Vec::new() };
    let names = module[at + mark.len()..].split(|&byte| byte == 0).next().unwrap_or(&[]);
    let names = String::from_utf8_lossy(names);
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

/// Each line has a module and, after the colon, all modules that it needs, in reverse order of loading.
fn modules_dep(direct: &BTreeMap<String, Vec<String>>) -> String {
    fn collect(of: &str, direct: &BTreeMap<String, Vec<String>>, found: &mut Vec<String>) {
        for name in direct.get(of).into_iter().flatten().filter(|name| direct.contains_key(*name)) {
            // Moved to the end of the list: modprobe loads from the end.
            found.retain(|other| other != name);
            found.push(name.clone());
            collect(name, direct, found);
        }
    }
    let mut text = String::new();
    for name in direct.keys() {
        let mut found = Vec::new();
        collect(name, direct, &mut found);
        let files: String = found.iter().map(|name| format!(" {name}.ko")).collect();
        text += &format!("{name}.ko:{files}\n");
    }
    text
}

/// The packed kernel inside a bzImage: Documentation/arch/x86/boot.rst, fields setup_sects, payload_offset and
/// payload_length.
fn payload(image: &[u8]) -> Result<&[u8]> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let found = || {
        let setup_sectors = usize::from(*image.get(0x1f1)?);
        let start = (setup_sectors + 1) * 512 + word(0x248)?;
        // The last four bytes are the unpacked size.
        image.get(start..start + word(0x24c)?.checked_sub(4)?)
    };
    if image.get(0x202..0x206) != Some(b"HdrS") {
        return Err("unpack the kernel: it is no bzImage".into());
    }
    found().ok_or_else(|| "unpack the kernel: its header points outside of it".into())
}

fn unpacker(payload: &[u8]) -> Result<&'static [&'static str]> {
    match payload {
        [0xfd, b'7', b'z', ..] => Ok(&["xz", "-dc", "--single-stream"]),
        [0x1f, 0x8b, ..] => Ok(&["gzip", "-dc"]),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(&["zstd", "-dc"]),
        _ => Err("unpack the kernel: it is packed in an unknown way".into()),
    }
}

/// The output of `command` for the input `data`.
fn unpacked(command: &[&str], data: &[u8]) -> Result<Vec<u8>> {
    let say = |e| format!("run {} (install the package of that name): {e}", command[0]);
    let mut process = Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(say)?;
    let mut input = process.stdin.take().ok_or("write to a process")?;
    let output = std::thread::scope(|scope| {
        // A failure shows in the exit status, because the program then gets incomplete input.
        scope.spawn(move || input.write_all(data));
        process.wait_with_output()
    })?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(format!("unpack with {}", command[0]).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_name_what_they_need() {
        assert_eq!(
            depends(b"x\0license=GPL\0depends=virtio-ring,virtio\0retpoline=Y\0"),
            ["virtio_ring", "virtio"]
        );
        assert_eq!(depends(b"x\0depends=\0name=a\0"), Vec::<String>::new());
        assert_eq!(module_name(Path::new("kernel/drivers/xen-blkback.ko.xz")), "xen_blkback");
    }

    #[test]
    fn modprobe_loads_from_the_end() {
        let names = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>();
        let direct = BTreeMap::from([
            ("a".to_owned(), names(&["c", "b"])),
            ("b".to_owned(), names(&["c", "builtin"])),
            ("c".to_owned(), names(&[])),
        ]);
        assert_eq!(modules_dep(&direct), "a.ko: b.ko c.ko\nb.ko: c.ko\nc.ko:\n");
    }

    #[test]
    fn the_kernel_is_found_in_its_image() {
        let mut image = vec![0; 2048];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248] = 16;
        image[0x24c] = 9;
        image[1040..1045].copy_from_slice(&[0x1f, 0x8b, 1, 2, 3]);
        assert_eq!(payload(&image).expect("inside"), [0x1f, 0x8b, 1, 2, 3]);
        assert_eq!(unpacker(&image[1040..]).expect("known")[0], "gzip");
        image[0x24d] = 0xff;
        assert!(payload(&image).is_err());
        assert!(payload(&image[..100]).is_err());
        assert!(unpacker(b"ELF").is_err());
    }
}
