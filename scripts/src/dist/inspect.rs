//! What must be true of the package and of its units, whatever is in them.

use super::files::put;
use super::{PROGRAMS, Release, Result, deb, machine_paths, tree};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use xshell::{Shell, cmd};

/// Highest exposure of a unit, in tenths, as `systemd-analyze security` counts it: 0 is a service that may do nothing.
const EXPOSURE_MAX: &str = "25";
/// Folders of the system that units name.
const SYSTEM_UNITS: &str = "/usr/lib/systemd/system";

/// The package: fields, owners and modes, configuration files, scripts; and packing again gives the same bytes.
pub(super) fn package(sh: &Shell, release: &Release) -> Result<()> {
    let deb = &release.deb;
    let version = &release.source.version;
    cmd!(sh, "dpkg --validate-version {version}").quiet().run()?;
    let field = |name: &str| cmd!(sh, "dpkg-deb --field {deb} {name}").quiet().read();
    for name in ["Package", "Version", "Architecture", "Maintainer", "Description", "Installed-Size"] {
        if field(name)?.is_empty() {
            return Err(format!("{} has no field {name}", deb.display()).into());
        }
    }
    let listed = cmd!(sh, "dpkg-deb --contents {deb}").quiet().read()?;
    let mut files = BTreeSet::new();
    for line in listed.lines() {
        files.extend(entry(line)?);
    }
    let with = |start: &str| files.iter().filter(|f| f.starts_with(start)).cloned().collect::<BTreeSet<_>>();
    let conffiles = cmd!(sh, "dpkg-deb --info {deb} conffiles").quiet().read()?;
    let conffiles: BTreeSet<String> = conffiles.lines().map(|line| line.trim().to_owned()).collect();
    if conffiles != with("/etc/") {
        return Err(format!("conffiles are {conffiles:?}, and in /etc there is {:?}", with("/etc/")).into());
    }
    for name in PROGRAMS {
        for file in [format!("/usr/bin/{name}"), format!("/usr/share/man/man1/{name}.1.gz")] {
            if !files.contains(&file) {
                return Err(format!("{} has no {file}", deb.display()).into());
            }
        }
        program(sh, release, name)?;
    }
    documents(&release.tree.join(tree::DOC))?;
    let scripts = release.tree.with_file_name("control");
    cmd!(sh, "dpkg-deb --control {deb} {scripts}").quiet().run()?;
    for name in deb::SCRIPTS.map(|name| scripts.join(name)) {
        cmd!(sh, "sh -n {name}").quiet().run()?;
    }
    fs::remove_dir_all(scripts)?;
    same_again(sh, release)
}

/// The file that a line of `dpkg-deb --contents` is about; `None` for a folder. It must be root's, and nobody else may
/// write to it.
fn entry(line: &str) -> Result<Option<String>> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let (Some(mode), Some(owner), Some(path)) = (words.first(), words.get(1), words.get(5)) else {
        return Err(format!("dpkg-deb lists {line:?}").into());
    };
    let good = ["drwxr-xr-x", "-rwxr-xr-x", "-rw-r--r--"].contains(mode) && *owner == "root/root";
    if !good || words.len() != 6 {
        return Err(format!("owner, mode or kind of a file is wrong: {line}").into());
    }
    Ok((!mode.starts_with('d')).then(|| path.trim_start_matches('.').to_owned()))
}

/// Every link leads to a page that ships, and the licences are all there.
fn documents(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let page = entry?.path();
        if page.extension().is_some_and(|kind| kind == "md") {
            let text = fs::read_to_string(&page)?;
            if let Some(lost) = links(&text).find(|link| !folder.join(link).is_file()) {
                return Err(format!("{} has a link to {lost}, which does not ship", page.display()).into());
            }
        }
    }
    // What the LGPL asks for a program that contains the library.
    let copyright = fs::read_to_string(folder.join("copyright"))?;
    for words in ["GNU Lesser General", "/usr/share/common-licenses/LGPL-2.1", "apt-get source glibc="] {
        if !copyright.contains(words) {
            return Err(format!("the file copyright does not say {words:?}").into());
        }
    }
    Ok(())
}

/// The links of a page to others, without the place in them.
fn links(text: &str) -> impl Iterator<Item = &str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let files = targets.filter(|target| !target.contains("://")).map(|target| target.split('#').next());
    files.flatten().filter(|file| !file.is_empty())
}

/// The first of `paths` that `program` contains, as the name of a folder.
fn contained<'a, P: AsRef<Path>>(program: &[u8], paths: &'a [P]) -> Option<&'a Path> {
    paths.iter().map(AsRef::as_ref).find(|path| {
        let folder = [path.as_os_str().as_encoded_bytes(), b"/"].concat();
        path.components().count() > 1 && program.windows(folder.len()).any(|window| window == folder)
    })
}

/// It needs no library and no loader, names no folder of this machine, and says which revision it is.
fn program(sh: &Shell, release: &Release, name: &str) -> Result<()> {
    let program = release.tree.join("usr/bin").join(name);
    let headers = cmd!(sh, "readelf --wide --program-headers --dynamic {program}").quiet().read()?;
    if let Some(line) = headers.lines().find(|line| line.contains("(NEEDED)") || line.contains(" INTERP ")) {
        return Err(format!("{name} is not static: {}", line.trim()).into());
    }
    let folders: Vec<_> = machine_paths(&release.target)?.into_iter().map(|(path, _)| path).collect();
    if let Some(path) = contained(&fs::read(&program)?, &folders) {
        return Err(format!("{name} names the folder {}", path.display()).into());
    }
    let (said, number) = (cmd!(sh, "{program} --version").quiet().read()?, env!("CARGO_PKG_VERSION"));
    let expected = format!("{name} {number} ({})", release.source.revision);
    if said == expected { Ok(()) } else { Err(format!("{said:?} instead of {expected:?}").into()) }
}

/// Files made at another time, with another umask, give the same package.
fn same_again(sh: &Shell, release: &Release) -> Result<()> {
    let (tree, again) = (&release.tree, release.deb.with_extension("again"));
    cmd!(sh, "find {tree} -exec touch --no-dereference '{}' +").quiet().run()?;
    deb::pack(sh, release, &release.source.version, &again)?;
    if sh.read_binary_file(&again)? != sh.read_binary_file(&release.deb)? {
        return Err(format!("{} and {} differ", release.deb.display(), again.display()).into());
    }
    Ok(fs::remove_file(again)?)
}

/// The units, as systemd's own tool sees them. Without it this is said, and left out.
pub(super) fn units(sh: &Shell, release: &Release) -> Result<()> {
    if cmd!(sh, "systemd-analyze --version").quiet().ignore_stdout().ignore_stderr().run().is_err() {
        eprintln!("dist: systemd-analyze is not installed: THE UNITS WERE NOT CHECKED");
        return Ok(());
    }
    // A root with what the units name, and the targets of this machine.
    let root = release.tree.with_file_name("root");
    let units = root.join("usr/lib/systemd/system");
    for program in ["usr/bin/tapdisk", "usr/bin/tapback", "sbin/modprobe"] {
        put(&root.join(program), b"#!/bin/sh\n", 0o755)?;
    }
    fs::create_dir_all(&units)?;
    let kinds =
        ["-name", "*.target", "-o", "-name", "*.slice", "-o", "-name", "*.socket", "-o", "-name", "*.mount"];
    let found = cmd!(sh, "find {SYSTEM_UNITS} -maxdepth 1 ( {kinds...} ) -exec cp -a '{}' {units} ;");
    found.quiet().run()?;
    let own = release.tree.join("usr/lib/systemd/system");
    let mut names = Vec::new();
    for entry in fs::read_dir(&own)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        fs::copy(own.join(&name), units.join(&name))?;
        names.push(name);
    }
    names.sort();
    let instances: Vec<String> = names.iter().map(|name| name.replace("@.", "@disk.")).collect();
    cmd!(sh, "systemd-analyze --root={root} --man=no verify {instances...}").quiet().run()?;
    for name in &names {
        let unit = own.join(name);
        let arguments = ["security", "--offline=yes", "--no-pager", "--threshold", EXPOSURE_MAX];
        let looked = cmd!(sh, "systemd-analyze {arguments...} {unit}").quiet().ignore_status().output()?;
        let text = String::from_utf8_lossy(&looked.stdout).into_owned();
        let last = text.lines().last().unwrap_or_default();
        if !looked.status.success() {
            return Err(format!("{name} may do too much: {last}").into());
        }
        eprintln!("dist: {name}: {last}");
    }
    Ok(fs::remove_dir_all(root)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_found_wherever_they_are() {
        let text = "See [a](a.md), [b\nc](../b.md#part) and\n[c](https://c/d.md) or [here](#part).";
        assert_eq!(links(text).collect::<Vec<_>>(), ["a.md", "../b.md"]);
    }

    #[test]
    fn a_folder_in_a_program_is_found() {
        let paths = ["/", "/home/me", "/work"].map(Path::new);
        assert_eq!(contained(b"at /home/me/x.rs", &paths), Some(paths[1]));
        assert_eq!(contained(b"at /home/menu/x.rs, /works/y, registry/z", &paths), None);
    }

    #[test]
    fn files_are_roots_and_nobody_else_writes_to_them() {
        let line = |mode: &str, owner: &str| format!("{mode} {owner} 12 2026-11-29 21:35 ./usr/bin/tapdisk");
        let good = entry(&line("-rwxr-xr-x", "root/root")).expect("good");
        assert_eq!(good.as_deref(), Some("/usr/bin/tapdisk"));
        assert_eq!(entry(&line("drwxr-xr-x", "root/root")).expect("a folder"), None);
        for (mode, owner) in
            [("-rwxrwxr-x", "root/root"), ("-rwxr-xr-x", "me/me"), ("-rwsr-xr-x", "root/root")]
        {
            let error = entry(&line(mode, owner)).expect_err("bad").to_string();
            assert!(error.starts_with("owner, mode or kind"), "{error}");
        }
    }
}
