//! Commands on damaged images, and on a medium that fails.

use super::Machine;
use kernel_model::faults::FaultPlan;
use kernel_model::{Concerned, Content, NthFailure, StorageConfig};
use tap_host::Errno;

const DISK_BYTES: usize = 1 << 20;
/// Bytes that each table of the image maps.
const TABLE_SPAN: usize = 64 * 4096;

/// Bytes of the disk that are damaged in [`damage`]: what only a read finds, and what the map says.
const DAMAGED: [(usize, usize); 3] = [(5 * 4096, 4096), (7 * 4096, 4096), (2 * TABLE_SPAN, TABLE_SPAN)];

/// Makes `/a.qcow` of `/disk`, and damages it: cluster 5 is far out, cluster 7 does not decompress, and the third table
/// cannot be read.
fn damage(machine: &Machine) {
    let options = "-S 0 -O qcow -o cluster_size=4k,l2_entries=64";
    machine.ok(&format!("convert {options} raw:/disk /a.qcow"));
    let mut bytes = machine.kernel.storage().bytes("/a.qcow").unwrap();
    let number = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let root = number(&bytes, 40) as usize;
    let table = number(&bytes, root) as usize;
    let cluster = number(&bytes, table + 3 * 8);
    let mut put = |at: usize, entry: u64| bytes[at..at + 8].copy_from_slice(&entry.to_be_bytes());
    put(table + 5 * 8, 1 << 61);
    put(table + 7 * 8, 1 << 63 | 100 << 51 | cluster);
    put(root + 2 * 8, 1 << 60);
    machine.kernel.storage().put_bytes("/a.qcow", &bytes);
}

/// A disk without zeros, and its damaged image.
fn damaged() -> (Machine, Vec<u8>) {
    let machine = Machine::quiet();
    let bytes: Vec<u8> = (0..DISK_BYTES).map(|i| (i / 512 % 250 + 1) as u8).collect();
    machine.kernel.storage().put_bytes("/disk", &bytes);
    damage(&machine);
    (machine, bytes)
}

#[test]
fn a_map_goes_on_after_damage_and_names_it() {
    let (machine, _) = damaged();
    let (status, out, err) = machine.run("map --output json /a.qcow");
    let map: Vec<serde_json::Value> = serde_json::from_str(&out).unwrap();
    let number = |run: &serde_json::Value, key: &str| run[key].as_u64().unwrap() as usize;
    let end = map.iter().fold(0, |end, run| {
        assert_eq!(number(run, "start"), end);
        end + number(run, "length")
    });
    assert_eq!((status, end), (1, DISK_BYTES));
    let marked: Vec<_> = map.iter().filter(|run| run["damaged"] == true).collect();
    let marked: Vec<_> = marked.iter().map(|run| (number(run, "start"), number(run, "length"))).collect();
    // A map does not read clusters.
    assert_eq!(marked, [DAMAGED[0], DAMAGED[2]]);
    let named =
        |(at, len): (usize, usize)| format!("damaged for {len} bytes from byte {at} on: input/output error");
    let lines: Vec<&str> = err.lines().collect();
    assert_eq!(lines.len(), 3, "{err}");
    assert!(lines[0].contains(&named(DAMAGED[0])) && lines[1].contains(&named(DAMAGED[2])), "{err}");
    let total = DAMAGED[0].1 + DAMAGED[2].1;
    let last = format!(
        "tap-img: failed to read all of the map of /a.qcow: it is damaged, for {total} bytes of the disk"
    );
    assert_eq!(lines[2], last);
    let (status, out, _) = machine.run("map /a.qcow");
    let places = out.lines().filter(|line| line.contains("damaged")).count();
    assert_eq!((status, places), (1, 2), "{out}");
    assert!(out.ends_with(" /a.qcow"), "the last table is there: {out}");
}

/// Damage of the backing file is found through the image above it.
#[test]
fn damage_below_an_image_is_found_as_well() {
    let (machine, _) = damaged();
    machine.ok("create -q -f qcow -b a.qcow /top.qcow");
    let (status, out, err) = machine.run("map --backing qcow --output json /top.qcow");
    let map: Vec<serde_json::Value> = serde_json::from_str(&out).unwrap();
    let marked: Vec<_> = map.iter().filter(|run| run["damaged"] == true).map(|run| &run["depth"]).collect();
    assert_eq!((status, marked, err.lines().count()), (1, vec![&1.into(), &1.into()], 3));
}

#[test]
fn a_copy_fails_at_damage_unless_it_is_to_salvage() {
    let (machine, mut disk) = damaged();
    for command in ["convert /a.qcow /new", "compare /a.qcow raw:/disk"] {
        let (status, _, err) = machine.run(command);
        assert!(status != 0 && err.contains("input/output error (EIO)"), "{command}: {status}, {err}");
    }
    for (at, len) in DAMAGED {
        disk[at..at + len].fill(0);
    }
    let warnings: Vec<String> = DAMAGED
        .iter()
        .map(|(at, len)| {
            let what =
                format!("{len} bytes of /a.qcow from byte {at} on cannot be read: input/output error (EIO)");
            format!("tap-img: warning: {what}; /new has zeros there")
        })
        .collect();
    // A new file, and one whose bytes zeros must replace.
    machine.kernel.storage().put_bytes("/new", &vec![9; DISK_BYTES]);
    for options in ["-n", "", "-m 1", "-S 0"] {
        let (status, out, err) = machine.run(&format!("convert --salvage {options} /a.qcow /new"));
        assert_eq!((status, out.as_str()), (0, ""), "{err}");
        assert_eq!(err.lines().collect::<Vec<_>>(), warnings, "{options}");
        assert!(machine.kernel.storage().bytes("/new").unwrap() == disk, "{options}");
    }
    assert_eq!(machine.run("convert --salvage -q /a.qcow /new"), (0, String::new(), String::new()));
}

/// A medium that fails for good, from its `n`-th operation on.
fn failing(n: u64, of: Concerned) -> Machine {
    failing_times(n, NthFailure::FOR_GOOD, of)
}

/// A medium that fails so many times, from its `n`-th operation on.
fn failing_times(n: u64, times: u64, of: Concerned) -> Machine {
    let failure = NthFailure { n, times, of, effect: 0, error: Errno::EIO };
    let faults = FaultPlan::default();
    Machine::new(StorageConfig { faults, nth_failure: Some(failure), ..StorageConfig::default() })
}

/// A disk without zeros, and its image, which has several tables.
fn undamaged() -> (Vec<u8>, Vec<u8>) {
    let bytes: Vec<u8> = (0..DISK_BYTES).map(|i| (i / 512 % 250 + 1) as u8).collect();
    let machine = Machine::quiet();
    machine.kernel.storage().put_bytes("/disk", &bytes);
    machine.ok("convert -O qcow -o l2_entries=64 raw:/disk /a.qcow");
    (bytes, machine.kernel.storage().bytes("/a.qcow").unwrap())
}

/// The map says of everything below a table that it cannot be read. Another read may still succeed.
#[test]
fn a_read_that_fails_once_loses_nothing() {
    let (bytes, image) = undamaged();
    let (mut whole, mut ended) = (0, 0);
    for n in 1..40 {
        let machine = failing_times(n, 1, Concerned::ButSyncs);
        machine.kernel.storage().put_bytes("/a.qcow", &image);
        let (status, out, err) = machine.run("convert --salvage -m 1 /a.qcow /new");
        if status == 0 {
            assert_eq!((out.as_str(), err.as_str()), ("", ""), "{n}");
            assert!(machine.kernel.storage().bytes("/new").unwrap() == bytes, "{n}");
        } else {
            assert!(err.contains("tap-img: failed to ") && !err.contains("warning"), "{n}: {err}");
        }
        *(if status == 0 { &mut whole } else { &mut ended }) += 1;
    }
    assert!(whole > 30 && ended > 0, "{whole} copies were whole, {ended} could not begin");
}

#[test]
fn a_medium_that_fails_for_good_ends_every_command() {
    let (bytes, image) = undamaged();
    let (mut failed, mut mapped, mut salvaged) = (0, 0, 0);
    for n in 1..40 {
        for command in ["map /a.qcow", "convert /a.qcow /new", "convert --salvage /a.qcow /new"] {
            let machine = failing(n, Concerned::ButSyncs);
            machine.kernel.storage().put_bytes("/a.qcow", &image);
            let (status, out, err) = machine.run(command);
            assert!(status == 0 || err.contains("tap-img: failed to "), "{n}, {command}: {err}");
            failed += u32::from(status == 1);
            mapped += u32::from(status == 1 && out.contains("damaged"));
            // What is there is right, and what is named is all that is not.
            if command.contains("convert") && status == 0 {
                let new = machine.kernel.storage().bytes("/new").unwrap();
                let wrong = bytes.chunks(512).zip(new.chunks(512)).filter(|(old, new)| old != new);
                assert!(wrong.clone().all(|(_, new)| new.iter().all(|b| *b == 0)), "{n}, {command}");
                assert_eq!(wrong.count() > 0, !err.is_empty(), "{n}, {command}: {err}");
                salvaged += u32::from(!err.is_empty());
            }
        }
    }
    assert!(
        failed > 20 && mapped > 0 && salvaged > 0,
        "{failed} failed, {mapped} mapped, {salvaged} salvaged"
    );
}

#[test]
fn zeros_that_cannot_be_written_fail_a_copy() {
    let machine = failing(1, Concerned::Zeros);
    // Zeros inside of clusters, which only reading finds.
    machine.put_disk("/disk", 64 << 10);
    machine.ok("convert -S 0 -O qcow raw:/disk /a.qcow");
    machine.kernel.storage().put_bytes("/old", &[9; 64 << 10]);
    let text = machine.fails("convert -n -O raw /a.qcow raw:/old", 1);
    assert!(text.contains("input/output error") && text.ends_with("/old is incomplete"), "{text}");
}

/// A file of 2 TiB that holds only its two ends. What a check does depends on what is mapped, not on the size: a step,
/// or a bit, for each cluster of the file would exceed the memory that it may use.
#[test]
fn a_check_of_a_huge_sparse_file_is_short() {
    const SIZE: u64 = 2 << 40;
    const BLOCK: u64 = 4096;
    // The L1 table at the front, or near the end with everything else; and how many blocks are in use.
    for (root, used) in [(48, 3), (SIZE - 3 * BLOCK, 4)] {
        let (table, cluster) = (SIZE - 2 * BLOCK, SIZE - BLOCK);
        let mut head = [0; 48];
        head[..8].copy_from_slice(&[0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 1]);
        head[24..32].copy_from_slice(&(1_u64 << 20).to_be_bytes());
        // Clusters of 512 bytes, of which a table maps 512.
        head[32..34].copy_from_slice(&[9, 9]);
        head[40..].copy_from_slice(&root.to_be_bytes());
        let mut content = Content { size: SIZE, ..Content::default() };
        content.pages.write(0, &head);
        content.pages.write(root, &table.to_be_bytes());
        content.pages.write(table + 8, &cluster.to_be_bytes());
        let machine = Machine::quiet();
        machine.kernel.storage().put("/a.qcow", content);
        let (status, out, err) = machine.run("check --output json /a.qcow");
        let report: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!((status, err.as_str()), (3, ""), "{out}");
        assert_eq!(report["leaks"], (SIZE / BLOCK - used) * 8, "{out}");
        assert_eq!((&report["corruptions"], &report["allocated-clusters"]), (&().into(), &1.into()), "{out}");
    }
}
