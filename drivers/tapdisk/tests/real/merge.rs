//! `tap-img commit` on real files: done, refused, and killed again and again.

use crate::client::{Client, WRITE};
use crate::server::{Server, TAP_IMG, tool, tool_after_kill};
use crate::{Add, Done};
use libtest_mimic::Failed;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// Bytes of the disk.
const DISK_BYTES: u64 = 64 << 20;
/// Each image above the lowest holds a piece of this size of every [`STEP`] bytes.
const PIECE: usize = 64 << 10;
const STEP: u64 = 512 << 10;
/// Kills, at most; each comes later than the one before.
const KILLS: u64 = 40;

pub(crate) fn tests(add: Add) {
    add("merge::images_of_a_chain_are_merged".into(), &[], Box::new(merged));
    add("merge::a_merge_is_killed_again_and_again".into(), &[], Box::new(killed));
}

/// A chain of three images, `a` at the bottom, and a copy of what the top shows.
struct Chain {
    folder: TempDir,
}

impl Chain {
    fn make() -> Result<Self, Failed> {
        let chain = Self { folder: tempfile::tempdir()? };
        let size = DISK_BYTES.to_string();
        tool(TAP_IMG, &["create", "-q", "-f", "qcow", "-o", "cluster_size=64k", &chain.text("a"), &size])?;
        for (n, name) in [(1, "b"), (2, "c")] {
            let below = ["a", "b"][n - 1];
            tool(TAP_IMG, &["create", "-q", "-f", "qcow", "-b", below, "-F", "qcow", &chain.text(name)])?;
            chain.write(name, n as u8)?;
        }
        let [top, flat] = [chain.text("c"), chain.text("flat")];
        tool(TAP_IMG, &["convert", "-q", "--backing", "qcow", "-O", "raw", &top, &flat])?;
        Ok(chain)
    }

    /// Writes pieces with `byte` into an image.
    fn write(&self, name: &str, byte: u8) -> Done {
        let image = format!("qcow:{}", self.text(name));
        let server = Server::start(&self.path("socket"), &[&image, "--backing", "qcow"])?;
        let mut client = Client::connect(server.socket())?;
        let shift = u64::from(byte - 1) * PIECE as u64 / 2;
        for at in (0..DISK_BYTES).step_by(STEP as usize) {
            assert_eq!(client.ask(WRITE, at + shift, &vec![byte; PIECE])?, 0);
        }
        drop(client);
        assert!(server.stop()?.success());
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn commit(&self, options: &[&str], base: &str, image: &str) -> Command {
        let mut command = Command::new(TAP_IMG);
        command.args(["commit", "--backing", "qcow"]).args(options);
        command.args(["-b", &self.text(base), &self.text(image)]).stdin(Stdio::null());
        command
    }

    /// `image` shows what the top showed.
    fn shows(&self, image: &str) -> Done {
        let compare = ["compare", "-q", "--backing", "qcow", "-f", "qcow", "-F", "raw"];
        tool_after_kill(TAP_IMG, &[&compare[..], &[&self.text(image), &self.text("flat")]].concat()).map(drop)
    }
}

fn exists(path: &Path) -> bool {
    path.try_exists().is_ok_and(|there| there)
}

/// Runs a command that must fail; returns what it says.
fn refused(mut command: Command) -> Result<String, Failed> {
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.code() == Some(1) { Ok(said) } else { Err(format!("{}: {said}", output.status).into()) }
}

fn merged() -> Done {
    let chain = Chain::make()?;
    // `b` is merged into `a`, and keeps its name, by which `c` knows it.
    let reader = Server::start(
        &chain.path("socket"),
        &[&format!("qcow:{}", chain.text("c")), "--backing", "qcow", "--read-only"],
    )?;
    let said = refused(chain.commit(&["-k"], "a", "b"))?;
    assert!(said.contains("in use by another process"), "{said}");
    drop(reader);
    assert!(chain.commit(&["-k", "-q"], "a", "b").status()?.success());
    assert!(!exists(&chain.path("a")) && !exists(&chain.path("a.merging")));
    chain.shows("c")?;
    let said = refused(chain.commit(&["-k"], "a", "b"))?;
    assert!(said.contains("merged already"), "{said}");
    // `c` into what is below it now.
    let said = refused(chain.commit(&[], "flat", "c"))?;
    assert!(said.contains("its backing file is"), "{said}");
    assert!(chain.commit(&["-q"], "b", "c").status()?.success());
    chain.shows("b")?;
    chain.shows("c")?;
    // Others are kept out while the mark is there.
    std::fs::write(chain.path("b.merging"), "partly merged with the image\nc\n")?;
    let other = ["create", "-q", "-f", "qcow", "-b", "b", "-F", "qcow", &chain.text("d")];
    let said = tool(TAP_IMG, &other).map_err(|why| why.message().unwrap_or_default().to_owned());
    assert!(said.as_ref().is_err_and(|said| said.contains("partly merged with")), "{said:?}");
    chain.shows("c")?;
    assert!(chain.commit(&["-q"], "b", "c").status()?.success());
    tool(TAP_IMG, &other).map(drop)
}

fn killed() -> Done {
    let chain = Chain::make()?;
    let mut kills = 0;
    loop {
        let mut child = chain.commit(&["-k", "-q", "-m", "1"], "a", "b").spawn()?;
        std::thread::sleep(Duration::from_millis(kills));
        if kills < KILLS {
            child.kill()?;
        }
        let status = child.wait()?;
        chain.shows("c")?;
        chain.shows_kept()?;
        if status.success() {
            break;
        }
        if status.code().is_some() && exists(&chain.path("a")) {
            return Err(format!("it ended with {status} after {kills} kills").into());
        }
        if status.code().is_some() {
            // It was killed after it had done all.
            break;
        }
        kills += 1;
    }
    assert!(!exists(&chain.path("a")) && !exists(&chain.path("a.merging")));
    crate::snapshot::check(&chain.text("b"))
}

impl Chain {
    /// While the base has its mark, no other image can be above it.
    fn shows_kept(&self) -> Done {
        let marked = exists(&self.path("a.merging"));
        let _old = std::fs::remove_file(self.path("d"));
        let other = ["create", "-q", "-f", "qcow", "-b", "a", "-F", "qcow", &self.text("d")];
        let made = tool(TAP_IMG, &other);
        // A mark that was cut short says nothing: the base has not changed.
        let text = std::fs::read_to_string(self.path("a.merging")).unwrap_or_default();
        if marked && text.ends_with("b\n") && made.is_ok() {
            return Err("an image was made above one that is partly merged".into());
        }
        Ok(())
    }
}
