//! Live snapshots of a disk that is written to all the time, and whose tapdisk is killed in their midst.

use crate::client::Client;
use crate::control::Place;
use crate::crash::{DISK_BYTES, Model};
use crate::server::{TAP_IMG, tool};
use crate::{Add, Done};
use libtest_mimic::Failed;
use std::collections::BTreeMap;
use std::path::Path;

/// Snapshots that are taken in all.
const SNAPSHOTS: usize = 200;
/// Every round ends with a kill or an orderly end; that many rounds at least.
const SNAPSHOTS_OF_A_ROUND: u64 = 8;
/// Images in the chain before it is flattened. The limit is 64.
const DEPTH: usize = 40;

pub(crate) fn tests(add: Add) {
    add("snapshot::a_disk_keeps_its_name".into(), &["qemu-io"], Box::new(keeps));
    add("snapshot::a_raw_disk_gets_a_new_name".into(), &["qemu-io"], Box::new(renamed));
    add("snapshot::under_load_and_killed".into(), &[], Box::new(under_load));
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
            flatten(&place, &image, &mut kept)?;
            depth = 1;
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

/// Makes one image of the chain.
fn flatten(place: &Place, image: &str, kept: &mut Kept) -> Done {
    let flat = place.path("flat");
    tool(TAP_IMG, &["convert", "-q", "--backing", "qcow", "-O", "qcow", &format!("qcow:{image}"), &flat])?;
    std::fs::rename(flat, image)?;
    for (name, _) in std::mem::take(kept) {
        std::fs::remove_file(name)?;
    }
    Ok(())
}
