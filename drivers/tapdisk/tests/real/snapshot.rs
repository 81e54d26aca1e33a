//! Live snapshots of a disk that is written to all the time, and live merges of them; its tapdisk is killed in their
//! midst.

use crate::client::Client;
use crate::control::Place;
use crate::crash::{DISK_BYTES, Flying, Model};
use crate::server::{TAP_IMG, tool};
use crate::{Add, Done};
use libtest_mimic::Failed;
use std::collections::BTreeMap;
use std::path::Path;

/// Snapshots that are taken in all.
const SNAPSHOTS: usize = 200;
/// Every round ends with a kill or an orderly end; that many rounds at least.
const SNAPSHOTS_OF_A_ROUND: u64 = 8;
/// Images in the chain before they are merged. A round adds up to nine.
const DEPTH: usize = 16;

pub(crate) fn tests(add: Add) {
    add("snapshot::a_disk_keeps_its_name".into(), &["qemu-io"], Box::new(keeps));
    add("snapshot::a_raw_disk_gets_a_new_name".into(), &["qemu-io"], Box::new(renamed));
    add("snapshot::taken_and_merged_under_load_and_killed".into(), &[], Box::new(under_load));
}

fn process_of(place: &Place) -> Result<u32, Failed> {
    let listed = place.done("list")?;
    let pid = listed.strip_prefix("pid=").and_then(|row| row.split(' ').next()?.parse().ok());
    pid.ok_or_else(|| format!("the list is {listed}").into())
}

fn qemu_io(command: &str, image: &[&str]) -> Done {
    tool("qemu-io", &[&["-c", command], image].concat()).map(drop)
}

fn keeps() -> Done {
    let place = Place::new()?;
    let (image, kept) = (place.path("a.qcow"), place.path("a.monday"));
    tool(TAP_IMG, &["create", "-q", "-f", "qcow", &image, "4M"])?;
    place.done(&format!("create -D -a qcow:{image} -- --backing qcow"))?;
    let pid = process_of(&place)?;
    let uri = format!("nbd+unix:///?socket={}", place.path(&format!("run/nbd{pid}.0")));
    qemu_io("write -P 7 0 64k", &["-f", "raw", &uri])?;
    let said = place.done(&format!("snapshot -p {pid} -m 0 -k {kept}"))?;
    assert_eq!(said, format!("image=qcow:{image} base=qcow:{kept}"));
    qemu_io("write -P 9 0 4k", &["-f", "raw", &uri])?;
    qemu_io("read -P 9 0 4k", &["-f", "raw", &uri])?;
    qemu_io("read -P 7 4k 60k", &["-f", "raw", &uri])?;
    // Everybody may read what is below, and nobody write to it.
    qemu_io("read -P 7 0 64k", &["-r", "-f", "qcow", &kept])?;
    assert!(qemu_io("read 0 64k", &["-f", "qcow", &kept]).is_err(), "opened for writing");
    let (status, said) = place.run(&format!("snapshot -p {pid} -m 0 -k {kept}"))?;
    assert!(status == 17 && said.contains("is there already"), "{status}: {said}");
    for (name, error, words) in [
        (format!("/proc/{pid}/snap"), 22, "is not in the folder of"),
        (place.path("other\u{1}"), 22, "control characters"),
        (place.path(&"x".repeat(250)), 36, "more than"),
        (place.path(""), 22, "the new name is empty"),
    ] {
        let line = ["snapshot", "-p", &pid.to_string(), "-m", "0", "-k", &name].map(str::to_owned);
        let (status, said) = place.run_words(&line)?;
        assert!(status == error && said.contains(words), "{name}: {status}: {said}");
    }
    qemu_io("read -P 9 0 4k", &["-f", "raw", &uri])?;
    place.done(&format!("destroy -p {pid} -m 0"))?;
    qemu_io("read -P 9 0 4k", &["-r", "-f", "qcow", &image])?;
    qemu_io("read -P 7 4k 60k", &["-r", "-f", "qcow", &image])
}

fn renamed() -> Done {
    let place = Place::new()?;
    let (disk, new) = (place.path("disk"), place.path("new.qcow"));
    let line = |more: &str| format!("create -D -a raw:{disk} -- {more}");
    place.done(&line(""))?;
    let pid = process_of(&place)?;
    let snapshot = |pid: u32, names: &str| place.run(&format!("snapshot -p {pid} -m 0 {names}"));
    let (status, said) = snapshot(pid, &format!("-k {}", place.path("kept")))?;
    assert!(status == 95 && said.contains("qcow:PATH"), "{status}: {said}");
    let (status, said) = snapshot(pid, &format!("-a qcow:{new}"))?;
    assert!(status == 13 && said.contains(&format!("--backing raw:{disk}")), "{status}: {said}");
    place.done(&format!("destroy -p {pid} -m 0"))?;
    place.done(&line(&format!("--backing raw:{disk}")))?;
    let pid = process_of(&place)?;
    let (status, said) = snapshot(pid, &format!("-a qcow:{new}"))?;
    assert_eq!((status, said), (0, format!("image=qcow:{new} base=raw:{disk}")));
    assert_eq!(place.done("list")?, format!("pid={pid} minor=0 state=0 args=qcow:{new}"));
    let uri = format!("nbd+unix:///?socket={}", place.path(&format!("run/nbd{pid}.0")));
    qemu_io("write -P 9 0 4k", &["-f", "raw", &uri])?;
    place.done(&format!("pause -p {pid} -m 0"))?;
    place.done(&format!("unpause -p {pid} -m 0"))?;
    qemu_io("read -P 9 0 4k", &["-f", "raw", &uri])?;
    place.done(&format!("destroy -p {pid} -m 0"))?;
    assert!(std::fs::read(&disk)?.iter().all(|byte| *byte == 0), "the raw image did not change");
    Ok(())
}

/// The images that were kept, and their bytes.
type Kept = BTreeMap<String, Vec<u8>>;

fn under_load() -> Done {
    let place = Place::new()?;
    let image = place.path("a.qcow");
    tool(TAP_IMG, &["create", "-q", "-f", "qcow", &image, &DISK_BYTES.to_string()])?;
    let (mut model, mut kept) = (Model::new(3), Kept::new());
    let (mut taken, mut depth, mut round, mut kills) = (0, 1, 0, 0);
    let mut flying = BTreeMap::new();
    while taken < SNAPSHOTS {
        place.done(&format!("create -D -a qcow:{image} -- --backing qcow"))?;
        let pid = process_of(&place)?;
        let mut client = Client::connect(Path::new(&place.path(&format!("run/nbd{pid}.0"))))?;
        let zeros = vec![0; DISK_BYTES];
        let checked = model.check(&mut client, &flying, &zeros);
        checked.map_err(|why| format!("round {round}: {}", why.message().unwrap_or("")))?;
        let (count, answers) = (1 + model.below(SNAPSHOTS_OF_A_ROUND), 20 + model.below(400));
        let killed = round % 4 != 3;
        let names: Vec<String> = (0..count).map(|n| place.path(&format!("kept-{round}-{n}"))).collect();
        let asked = std::thread::scope(|scope| {
            let asked = scope.spawn(|| {
                let ask = |name: &String| {
                    place.run(&format!("snapshot -p {pid} -m 0 -k {name}")).ok().filter(|said| said.0 == 0)
                };
                names.iter().take_while(|name| ask(name).is_some()).count()
            });
            let written = model.write_until(&mut client, answers);
            if killed {
                tool("kill", &["-9", &pid.to_string()])?;
            }
            let asked = asked.join().expect("it does not panic");
            flying = written?;
            if !killed && asked < names.len() {
                return Err(format!("round {round}: only {asked} snapshots were taken").into());
            }
            Ok::<_, Failed>(asked)
        })?;
        drop(client);
        match killed {
            true => place.free_killed()?,
            false => _ = place.done(&format!("destroy -p {pid} -m 0"))?,
        }
        kills += usize::from(killed);
        for name in &names[..asked] {
            kept.insert(name.clone(), std::fs::read(name)?);
        }
        if let Some((name, _)) =
            kept.iter().find(|(name, bytes)| std::fs::read(name).ok().as_ref() != Some(bytes))
        {
            return Err(format!("round {round}: {name} has changed").into());
        }
        // One more may have been taken without an answer.
        (taken, depth, round) = (taken + asked, depth + asked + 1, round + 1);
        check(&image).map_err(|why| format!("round {round}: {}", why.message().unwrap_or("")))?;
        if depth > DEPTH {
            kept.clear();
            let mut load = Load { place: &place, image: &image, model: &mut model, flying: &mut flying };
            kills +=
                load.merge_all().map_err(|why| format!("round {round}: {}", why.message().unwrap_or("")))?;
            depth = 2;
        }
    }
    assert!(kills >= 30, "{kills} kills in {round} rounds");
    Ok(())
}

/// The image is whole. The kernel may take its time to release the file of a process that has ended.
pub(crate) fn check(image: &str) -> Done {
    for _ in 0..500 {
        let output = std::process::Command::new(TAP_IMG).args(["check", image]).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        match output.status.code() {
            // Clusters that a kill left over.
            Some(0 | 3) => return Ok(()),
            _ if said.contains("in use by another process") => {}
            _ => return Err(said.into()),
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    Err("it stays in use".into())
}

/// The disk, and what is written to it.
struct Load<'a> {
    place: &'a Place,
    image: &'a str,
    model: &'a mut Model,
    flying: &'a mut BTreeMap<u64, Flying>,
}

impl Load<'_> {
    /// Merges all images below the disk into one, from the lowest up, under load; every third time the tapdisk is
    /// killed. Returns how often it was.
    fn merge_all(&mut self) -> Result<usize, Failed> {
        let (mut turn, mut kills) = (0, 0);
        loop {
            let chain = chain_of(self.image)?;
            let [.., above, image, base] = &chain[..] else { return Ok(kills) };
            assert!(chain.len() <= 64, "{above}");
            let killed = turn % 3 == 1;
            self.merge(image, base, killed).map_err(|why| {
                format!("merge {turn}, {image} into {base}: {}", why.message().unwrap_or(""))
            })?;
            (turn, kills) = (turn + 1, kills + usize::from(killed));
            check(self.image)?;
        }
    }

    fn merge(&mut self, image: &str, base: &str, killed: bool) -> Done {
        let place = self.place;
        place.done(&format!("create -D -a qcow:{} -- --backing qcow", self.image))?;
        let pid = process_of(place)?;
        let mut client = Client::connect(Path::new(&place.path(&format!("run/nbd{pid}.0"))))?;
        self.model.check(&mut client, self.flying, &vec![0; DISK_BYTES])?;
        let answers = 20 + self.model.below(200);
        let line = format!("commit -p {pid} -m 0 -w -a qcow:{image} -b {base}");
        let merged = std::thread::scope(|scope| {
            let merged = scope.spawn(|| place.run(&line));
            let written = self.model.write_until(&mut client, answers);
            if killed {
                tool("kill", &["-9", &pid.to_string()])?;
            }
            let merged = merged.join().expect("it does not panic");
            *self.flying = written?;
            merged
        })?;
        drop(client);
        if killed {
            return place.free_killed();
        }
        assert_eq!(merged.0, 0, "{}", merged.1);
        place.done(&format!("destroy -p {pid} -m 0"))?;
        let left = Path::new(base).try_exists()? || Path::new(&format!("{base}.merging")).try_exists()?;
        if left { Err(format!("{base} is left").into()) } else { Ok(()) }
    }
}

/// The image and those below it, as their headers name them.
fn chain_of(image: &str) -> Result<Vec<String>, Failed> {
    let mut chain = vec![image.to_owned()];
    loop {
        let top = chain.last().expect("it has one");
        let bytes = std::fs::read(top)?;
        let at = u64::from_be_bytes(bytes[8..16].try_into()?) as usize;
        let len = u32::from_be_bytes(bytes[16..20].try_into()?) as usize;
        if at == 0 {
            return Ok(chain);
        }
        let name = String::from_utf8(bytes[at..at + len].to_vec())?;
        chain.push(Path::new(top).with_file_name(name).display().to_string());
    }
}
