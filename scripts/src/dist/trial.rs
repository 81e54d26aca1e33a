//! The package in the hands of dpkg, in a scratch root: installed, upgraded while disks are served, removal refused,
//! removed, purged. Real guests do the same in `scripts/xen-host/tests/deploy.sh`.

use super::old_kernel::Served;
use super::{Release, Result, deb};
use std::fs;
use std::path::{Path, PathBuf};
use xshell::{Shell, cmd};

/// A root with nothing but what dpkg puts there.
struct Root<'a> {
    sh: &'a Shell,
    folder: PathBuf,
}

impl Root<'_> {
    /// Runs dpkg; its scripts run on this machine and see the root as `DPKG_ROOT`.
    fn dpkg(&self, args: &[&str]) -> Result<std::process::Output> {
        let Self { sh, folder } = self;
        let forced = "script-chrootless,not-root,bad-path";
        let dpkg = cmd!(sh, "dpkg --root={folder} --force-{forced} --log=/dev/null {args...}");
        Ok(dpkg.quiet().ignore_status().output()?)
    }

    /// As [`Root::dpkg`], and it must succeed.
    fn done(&self, args: &[&str]) -> Result<String> {
        let output = self.dpkg(args)?;
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            return Ok(text.into_owned());
        }
        Err(format!("dpkg {}: {}: {text}", args.join(" "), output.status).into())
    }

    /// Everything in the root that is not dpkg's own.
    fn files(&self) -> Result<Vec<String>> {
        let Self { sh, folder } = self;
        let found =
            cmd!(sh, "find {folder} -type f -not -path */var/lib/dpkg/* -printf %P\\n").quiet().read()?;
        Ok(found.lines().map(str::to_owned).collect())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

fn must(good: bool, what: &str) -> Result<()> {
    if good { Ok(()) } else { Err(format!("the package: {what}").into()) }
}

pub(super) fn packaging(sh: &Shell, release: &Release) -> Result<()> {
    let scratch = sh.create_temp_dir()?;
    let root = Root { sh, folder: scratch.path().join("root") };
    for name in ["updates", "info"] {
        fs::create_dir_all(root.path("var/lib/dpkg").join(name))?;
    }
    for name in ["status", "available"] {
        fs::write(root.path("var/lib/dpkg").join(name), "")?;
    }
    let (old, new) = (release.deb.display().to_string(), scratch.path().join("new.deb"));
    deb::pack(sh, release, &format!("{}.1", release.source.version), &new)?;
    let new = new.display().to_string();
    let program = root.path("usr/bin/tapdisk");
    let settings = root.path("etc/default/tapdisk-xen");

    root.done(&["--install", &old])?;
    must(
        sh.read_binary_file(&program)? == sh.read_binary_file(release.tree.join("usr/bin/tapdisk"))?,
        "the program",
    )?;
    fs::write(&settings, "TAPDISK_OPTIONS=--direct\n")?;
    let disk = scratch.path().join("disk");
    fs::File::create(&disk)?.set_len(1 << 20)?;
    let served = Served::start(&[], &program, scratch.path(), &format!("raw:{}", disk.display()), &[])?;

    let said = root.done(&["--install", &new])?;
    let process = said.lines().find(|line| line.contains("still runs the old program"));
    must(
        process.is_some_and(|line| line.contains(": ") && line.contains("tapdisk serve ")),
        "an upgrade says which processes run the old program",
    )?;
    must(served.runs()? && is_deleted(&served)?, "an upgrade keeps the server running")?;
    must(fs::read_to_string(&settings)?.contains("--direct"), "an upgrade keeps settings")?;
    let compare = root.path("usr/bin/tap-img");
    let (uri, raw) = (served.uri(), format!("raw:{}", disk.display()));
    cmd!(sh, "{compare} compare -q -U {raw} {uri}").quiet().run()?;

    let refused = root.dpkg(&["--remove", "tapdisk"])?;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    must(
        !refused.status.success() && text.contains("not removed, because it runs"),
        "removal is refused while a disk is served",
    )?;
    must(served.runs()? && program.exists(), "a refused removal changes nothing")?;

    served.stop()?;
    root.done(&["--remove", "tapdisk"])?;
    must(!program.exists() && settings.exists(), "removal leaves settings, and nothing else")?;
    must(
        root.files()?.iter().all(|file| file.starts_with("etc/")),
        "removal leaves settings, and nothing else",
    )?;
    root.done(&["--install", &new])?;
    must(fs::read_to_string(&settings)?.contains("--direct"), "settings are still there after removal")?;
    root.done(&["--purge", "tapdisk"])?;
    must(root.files()?.is_empty(), &format!("after a purge there is {:?}", root.files()?))
}

/// Whether a process runs a file that was replaced.
fn is_deleted(served: &Served) -> Result<bool> {
    let exe = Path::new("/proc").join(served.id().to_string()).join("exe");
    Ok(fs::read_link(exe)?.to_string_lossy().ends_with(" (deleted)"))
}
