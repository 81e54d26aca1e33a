//! Whose it is: the maintainer, and the file `copyright`, with the licences of everything that is linked into the
//! programs.

use super::Result;
use super::files::root;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use xshell::{Shell, cmd};

const HEAD: &str = "\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: tapdisk
Comment:
 The programs are linked statically. Besides their own sources they contain the
 crates below, Rust's standard library (MIT or Apache-2.0; Copyright the Rust
 Project Developers), parts of the GNU C Library, and of GCC's runtime library
 (GPL-3.0-or-later with the GCC Runtime Library Exception).
";

/// What section 6 of the LGPL asks for: that the library is used, its licence, and how to get its source and to link
/// the programs with another version of it. VERSION is that of Debian's package.
const C_LIBRARY: &str = "
Files: usr/bin/tapdisk usr/bin/tap-ctl usr/bin/tapback usr/bin/tap-img usr/bin/mason
Copyright: Free Software Foundation, Inc. and others (the GNU C Library)
License: LGPL-2.1-or-later
Comment:
 These programs contain parts of the GNU C Library, which is free software: it
 may be redistributed and modified under the terms of the GNU Lesser General
 Public License as published by the Free Software Foundation, version 2.1 or
 any later version. It comes without any warranty. On Debian systems the licence
 is in /usr/share/common-licenses/LGPL-2.1, elsewhere at
 https://www.gnu.org/licenses/old-licenses/lgpl-2.1.html. The source is that of
 Debian's package glibc: `apt-get source glibc=VERSION`, or
 https://snapshot.debian.org/package/glibc/VERSION/.
 .
 The sources of the programs, under the licences below, are complete: `cargo
 xtask dist` links them again, with the C library that is then installed, changed
 or not. They may be modified and reverse engineered for that purpose. `tapdisk
 --version` says which revision of the sources this is.
";

/// Whom to write to: as Debian's tools, from the environment.
pub(super) fn maintainer() -> String {
    let of = |name, otherwise: &str| std::env::var(name).unwrap_or_else(|_| otherwise.to_owned());
    format!("{} <{}>", of("DEBFULLNAME", "Authors of tapdisk"), of("DEBEMAIL", "tapdisk@localhost.invalid"))
}

/// The whole file.
pub(super) fn text(sh: &Shell) -> Result<String> {
    let licences = |path: &Path| -> Result<Vec<String>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().to_ascii_uppercase();
            if ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE"]
                .iter()
                .any(|word| name.starts_with(word))
                && entry.file_type()?.is_file()
            {
                found.push(String::from_utf8_lossy(&fs::read(entry.path())?).trim().to_owned());
            }
        }
        found.sort();
        Ok(found)
    };
    let glibc = cmd!(sh, "dpkg-query --show '--showformat=${source:Version}' libc6-dev").quiet().read();
    // Elsewhere than on Debian nothing has a version that everybody knows.
    let mut text = HEAD.to_owned() + &C_LIBRARY.replace("VERSION", glibc.as_deref().unwrap_or("VERSION"));
    // Each text once, and the crates that have it.
    let mut users: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut stanzas = String::new();
    for (name, licence, folder) in crates(sh)? {
        stanzas += &format!("\nFiles: {name}\nLicense: {licence}\n");
        for licence in licences(&folder)? {
            users.entry(licence).or_default().push(name.clone());
        }
    }
    for licence in licences(&root())? {
        users.entry(licence).or_default().push("tapdisk".to_owned());
    }
    text += "\nFiles: *\nCopyright: the authors of tapdisk\nLicense: MIT or Apache-2.0\n";
    text += &stanzas;
    for (licence, users) in users {
        text += &format!("\n--- {}\n\n{licence}\n", users.join(", "));
    }
    Ok(text)
}

/// The crates of others that are linked in: name and version, licence, folder.
fn crates(sh: &Shell) -> Result<Vec<(String, String, PathBuf)>> {
    let linked = ["-p", "tapdisk", "-e", "normal,no-proc-macro", "--target", "x86_64-unknown-linux-gnu"];
    let tree = cmd!(sh, "cargo tree --locked {linked...} --prefix none --format '{p}|{l}'");
    let tree = tree.quiet().read()?;
    let metadata =
        cmd!(sh, "cargo metadata --locked --filter-platform x86_64-unknown-linux-gnu --format-version 1")
            .quiet()
            .read()?;
    let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
    let mut folders = BTreeMap::new();
    for package in metadata["packages"].as_array().ok_or("cargo metadata has no packages")? {
        if let (Some(name), Some(version), Some(manifest)) =
            (package["name"].as_str(), package["version"].as_str(), package["manifest_path"].as_str())
        {
            folders.insert(format!("{name} {version}"), Path::new(manifest).with_file_name(""));
        }
    }
    let mut found = BTreeMap::new();
    for line in tree.lines() {
        let (package, licence) = line.split_once('|').ok_or_else(|| format!("cargo tree says {line:?}"))?;
        // Packages of the workspace have their path behind the version.
        let mut words = package.split(' ');
        if let (Some(name), Some(version), None) = (words.next(), words.next(), words.next()) {
            let name = format!("{name} {}", version.trim_start_matches('v'));
            let folder = folders.get(&name).ok_or_else(|| format!("cargo metadata has no {name}"))?;
            found.insert(name, (licence.trim_end_matches(" (*)").to_owned(), folder.clone()));
        }
    }
    Ok(found.into_iter().map(|(name, (licence, folder))| (name, licence, folder)).collect())
}
