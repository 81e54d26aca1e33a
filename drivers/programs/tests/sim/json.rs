//! The JSON socket of `tapdisk control`.

use crate::control::{Admin, raw, write};
use crate::{Printed, world};
use clap::Parser;
use kernel_model::SimHost;
use serde_json::{Value, json};
use std::cell::RefCell;
use std::rc::Rc;
use tap_control::json::REQUEST_BYTES_MAX;
use tap_control::{CONNECTIONS_MAX, MESSAGE_NS, json_socket_of};
use tap_host::{Errno, SocketAddress, Sockets, Tasks};
use tap_programs::ctl::{Cli, run};

const FOLDER: &str = "/run/blktap-control";

/// Sends `line` in pieces, and returns the answer; null if there is none.
pub(crate) async fn ask(admin: &Rc<Admin>, pid: u32, line: &[u8], piece: usize) -> Value {
    let answer = raw(admin, &json_socket_of(FOLDER, pid), line, piece).await.unwrap();
    let Some((b'\n', line)) = answer.split_last() else { return Value::Null };
    assert!(!line.contains(&b'\n'), "one line");
    serde_json::from_slice(line).unwrap()
}

/// The list, without what differs between two runs of the same kind.
async fn listed(admin: &Rc<Admin>, pid: u32, piece: usize) -> Value {
    let mut list = ask(admin, pid, b"{\"verb\":\"list\"}\n", piece).await;
    for disk in list["ok"]["disks"].as_array_mut().unwrap() {
        let allocation = disk.as_object_mut().unwrap().remove("allocation");
        assert!(allocation.unwrap().as_str().is_some_and(|text| text.len() > 4));
    }
    list
}

#[test]
fn a_disk_gets_a_priority_of_its_own_if_it_has_files() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        kernel.refuse_realtime();
        let admin = Admin::new(&sim, &kernel, &xen);
        let pid = admin.create("raw:/a").await;
        admin.done("allocate").await;
        let set = format!("set -p {pid} -m 0 --ionice");
        admin.refused(&format!("set -p {pid} -m 1 --ionice idle"), Errno::ENODEV, "has not attached").await;
        admin.done(&format!("attach -p {pid} -m 1")).await;
        admin.refused(&format!("set -p {pid} -m 1 --ionice idle"), Errno::EINVAL, "no image open").await;
        admin.done(&format!("open -p {pid} -m 1 -D -a nbd:unix:{FOLDER}/nbd{pid}.0")).await;
        admin.refused(&format!("set -p {pid} -m 1 --ionice idle"), Errno::EOPNOTSUPP, "another server").await;
        assert_eq!(admin.done(&format!("{set} best-effort:1")).await.trim(), "ionice=best-effort:1");
        for (wrong, error, words) in [
            ("realtime:0", Errno::EPERM, "operation not permitted (EPERM); the tapdisk needs CAP_SYS_NICE"),
            ("idle:1", Errno::EINVAL, "no levels, or none"),
            ("urgent", Errno::EINVAL, "'urgent' is not a class"),
        ] {
            admin.refused(&format!("{set} {wrong}"), error, words).await;
        }
        let list = ask(&admin, pid, b"{\"verb\":\"list\"}\n", 100).await;
        let ionice = |minor: usize| &list["ok"]["disks"][minor]["ionice"];
        assert_eq!((ionice(0), ionice(1)), (&"best-effort:1".into(), &Value::Null));
        assert_eq!(admin.done(&format!("{set} none")).await.trim(), "ionice=none");
    });
}

#[test]
fn disks_are_listed_and_counted() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        let admin = Admin::new(&sim, &kernel, &xen);
        let pid = admin.create("raw:/a").await;
        admin.done("allocate").await;
        admin.done(&format!("attach -p {pid} -m 1")).await;
        let disk = admin.client(pid, 0).await;
        assert_eq!(write(&disk, 3, 7).await, Ok(()));
        let none = json!({
            "minor": 1, "state": "attached", "image": null, "size_sectors": null, "read_only": null,
            "in_flight": 0, "waiting": 0, "nbd_clients": 0, "ionice": null,
        });
        let mut open = json!({
            "minor": 0, "state": "running", "image": "raw:/a", "size_sectors": 2048, "read_only": false,
            "in_flight": 0, "waiting": 0, "nbd_clients": 1, "ionice": null,
        });
        for piece in [1, 7, 100] {
            let list = listed(&admin, pid, piece).await;
            assert_eq!(list, json!({ "ok": { "disks": [open, none] } }));
        }
        let stats = ask(&admin, pid, b"{\"verb\":\"stats\",\"minor\":0}\n{\"verb\":\"stats\"}\n", 100).await;
        let own = &stats["ok"]["disks"][0];
        assert_eq!(
            (&own["writes"], &own["secs"], &own["state"]),
            (&1.into(), &json!([0, 1]), &"running".into())
        );
        // The same from tap-ctl, by either socket; without a minor number only what is open.
        let told: Value = serde_json::from_str(&admin.done(&format!("stats -p {pid} -m 0")).await).unwrap();
        assert_eq!(&told, own);
        let told: Value = serde_json::from_str(&admin.done(&format!("stats -p {pid}")).await).unwrap();
        assert_eq!(told, stats["ok"]["disks"]);
        admin.done(&format!("pause -p {pid} -m 0")).await;
        let (held, waits) = (Rc::clone(&disk), kernel.process("waits", 3));
        waits.spawn("write", 0, async move {
            let _answered_later = write(&held, 4, 7).await;
        });
        sim.sleep_ns(1_000_000_000).await;
        (open["state"], open["waiting"]) = ("paused".into(), 1.into());
        let list = listed(&admin, pid, 100).await;
        assert_eq!(list["ok"]["disks"][0], open);
        admin.done(&format!("close -p {pid} -m 0")).await;
        let list = listed(&admin, pid, 100).await;
        assert_eq!(list["ok"]["disks"][0]["state"], "closed");
        assert_eq!(admin.done(&format!("stats -p {pid}")).await, "[]");
        admin.done(&format!("detach -p {pid} -m 1")).await;
        admin.done(&format!("destroy -p {pid} -m 0")).await;
        admin.refused(&format!("stats -p {pid}"), Errno::ENOENT, "no such process").await;
    });
}

#[test]
fn what_is_no_request_is_refused_with_words() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        let admin = Admin::new(&sim, &kernel, &xen);
        let pid = admin.create("raw:/a").await;
        let long = [&[b' '; REQUEST_BYTES_MAX][..], b"{\"verb\":\"list\"}\n"].concat();
        for (line, errno, name, words) in [
            (&b"{\"verb\":\"fly\"}\n"[..], 22, "EINVAL", "`fly`"),
            (b"{\"verb\":\"list\",\"depth\":1}\n", 22, "EINVAL", "`depth`"),
            (b"\n", 22, "EINVAL", "no object"),
            (b"\xff\0\n", 22, "EINVAL", "no object"),
            (&long, 22, "EINVAL", "more than 65536 bytes"),
            (b"{\"verb\":\"stats\",\"minor\":9}\n", 19, "ENODEV", "has not attached it"),
        ] {
            let answer = ask(&admin, pid, line, 40_000).await;
            let error = &answer["error"];
            assert_eq!((&error["errno"], &error["name"]), (&errno.into(), &name.into()), "{answer}");
            assert!(error["words"].as_str().is_some_and(|all| all.contains(words)), "{answer}");
        }
        // The longest one.
        let longest = [&[b' '; REQUEST_BYTES_MAX - 16][..], b"{\"verb\":\"list\"}\n"].concat();
        assert!(ask(&admin, pid, &longest, 40_000).await["ok"].is_object());
        // A part of a line, and then nothing: it is dropped.
        let started_ns = sim.now_ns();
        assert_eq!(ask(&admin, pid, b"{\"verb\":\"list\"}", 100).await, Value::Null);
        assert!(sim.now_ns() - started_ns >= MESSAGE_NS);
        admin.done(&format!("destroy -p {pid} -m 0")).await;
    });
}

#[test]
fn ten_clients_at_once_are_answered_and_silent_ones_keep_nobody_out() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        let admin = Admin::new(&sim, &kernel, &xen);
        let pid = admin.create("raw:/a").await;
        let silent: Vec<_> =
            (0..CONNECTIONS_MAX as u64).map(|key| kernel.process("silent", 50 + key)).collect();
        let mut streams = Vec::new();
        for host in &silent {
            streams.push(host.connect(&SocketAddress::Unix(json_socket_of(FOLDER, pid))).await.unwrap());
        }
        let answers = Rc::new(RefCell::new(Vec::new()));
        for piece in 1..=CONNECTIONS_MAX {
            let (admin, answers) = (Rc::clone(&admin), Rc::clone(&answers));
            sim.spawn("client", piece as u64, async move {
                let answer = ask(&admin, pid, b"{\"verb\":\"list\"}\n", piece).await;
                answers.borrow_mut().push(answer["ok"]["disks"][0]["minor"].clone());
            });
        }
        // The other socket is not held up.
        admin.done(&format!("pause -p {pid} -m 0")).await;
        assert!(sim.now_ns() < MESSAGE_NS && answers.borrow().is_empty());
        sim.sleep_ns(MESSAGE_NS + 1_000_000_000).await;
        assert_eq!(*answers.borrow(), vec![Value::from(0); CONNECTIONS_MAX]);
        admin.done(&format!("destroy -p {pid} -m 0")).await;
    });
}

/// Runs tap-ctl in a process of its own: what it has printed, and its status once it has ended.
fn runs(admin: &Rc<Admin>, key: u64, line: &str) -> (SimHost, Rc<Printed>, Rc<RefCell<Option<u8>>>) {
    let host = SimHost::start(&admin.kernel, &admin.xen, "tap-ctl", key);
    let (printed, status) = (Rc::new(Printed::default()), Rc::new(RefCell::new(None)));
    let cli = Cli::try_parse_from(std::iter::once("tap-ctl").chain(line.split_whitespace())).unwrap();
    let (own, h, p, s) = (Rc::clone(admin), host.clone(), Rc::clone(&printed), Rc::clone(&status));
    host.spawn("main", 0, async move {
        let ended = run(&h, cli, &*own, &*p).await;
        *s.borrow_mut() = Some(ended);
    });
    (host, printed, status)
}

#[test]
fn who_listens_is_told_what_happens_until_it_is_interrupted() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        let admin = Admin::new(&sim, &kernel, &xen);
        let (all, of_all, status) = runs(&admin, 600, "events");
        let pid = admin.create("raw:/a -- --watchdog 1").await;
        let (_one, of_one, ended) = runs(&admin, 601, &format!("events -p {pid}"));
        sim.sleep_ns(2_000_000_000).await;
        let disk = admin.client(pid, 0).await;
        admin.done(&format!("pause -p {pid} -m 0")).await;
        let (held, waits) = (Rc::clone(&disk), kernel.process("waits", 3));
        waits.spawn("write", 0, async move {
            let _answered_later = write(&held, 4, 7).await;
        });
        sim.sleep_ns(2_000_000_000).await;
        admin.done(&format!("unpause -p {pid} -m 0")).await;
        sim.sleep_ns(100_000_000).await;
        admin.done(&format!("destroy -p {pid} -m 0")).await;
        sim.sleep_ns(2_000_000_000).await;
        // Without the time, which is first.
        let told = |printed: &Printed| -> Vec<String> {
            let lines = printed.lines.borrow();
            lines.iter().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
        };
        let open = |seq: u64, event: &str, state: &str, clients: u64| {
            format!(
                "pid={pid} seq={seq} event={event} minor=0 state={state} nbd_clients={clients} args=raw:/a"
            )
        };
        let mut expected = vec![
            open(2, "state", "running", 0),
            open(3, "clients", "running", 1),
            open(4, "pausing", "pausing", 1),
            open(5, "paused", "paused", 1),
            format!(
                "pid={pid} seq=6 event=hangs minor=0: vbd0 has not answered write 4+1 for 1000 ms: it waits because the disk is paused"
            ),
            open(7, "resumed", "running", 1),
            format!("pid={pid} seq=8 event=hung minor=0: vbd0 is done with write 4+1 after 2000 ms"),
            open(9, "closing", "closing", 1),
            open(10, "clients", "closing", 0),
            format!("pid={pid} seq=11 event=closed minor=0 state=closed nbd_clients=0"),
            format!("pid={pid} seq=12 event=detached minor=0"),
        ];
        assert_eq!(told(&of_one), expected);
        assert_eq!(*ended.borrow(), Some(0), "with its tapdisk");
        // Whoever listens to all looks for new ones each second.
        expected[0] = open(2, "state", "running", 0);
        assert_eq!(told(&of_all), expected);
        assert_eq!(*status.borrow(), None);
        all.process.ask_to_stop();
        sim.sleep_ns(1_000_000).await;
        assert_eq!(*status.borrow(), Some(0), "interrupted");
    });
}

#[test]
fn what_disks_do_is_shown_by_interval_until_there_are_enough() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        let admin = Admin::new(&sim, &kernel, &xen);
        let pid = admin.create("raw:/a").await;
        let disk = admin.client(pid, 0).await;
        assert_eq!(write(&disk, 3, 7).await, Ok(()));
        let (_one, of_one, ended) = runs(&admin, 700, &format!("top -p {pid} -i 1 -n 2 --json"));
        let (all, of_all, status) = runs(&admin, 701, "top -i 2");
        sim.sleep_ns(500_000_000).await;
        for sector in 0..4 {
            assert_eq!(write(&disk, sector, 7).await, Ok(()));
        }
        sim.sleep_ns(2_000_000_000).await;
        let lines: Vec<Value> =
            of_one.lines.borrow().iter().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((lines.len(), *ended.borrow()), (2, Some(0)));
        for (line, requests) in lines.iter().zip([4, 0]) {
            let own = &line["disks"][0];
            assert_eq!(
                (&own["pid"], &own["minor"], &own["image"]),
                (&pid.into(), &0.into(), &"raw:/a".into())
            );
            assert_eq!(own["write"]["requests"], requests, "{line}");
            assert_eq!(
                (&own["write"]["bytes"], &own["read"]["p50_ns"]),
                (&(requests * 512).into(), &Value::Null)
            );
            assert_eq!(line["silent"], json!([]));
        }
        let block = of_all.lines.borrow().clone();
        assert!(block[0].ends_with("wP99 IMAGE") && block[2].is_empty() && block.len() == 3, "{block:?}");
        let columns: Vec<&str> = block[1].split_whitespace().collect();
        assert_eq!((columns[0], columns[3], columns[13]), (&*pid.to_string(), "2.0", "raw:/a"));
        // A tapdisk that was killed is no longer shown.
        admin.started.borrow()[0].host.process.node().kill();
        sim.sleep_ns(2_000_000_000).await;
        assert_eq!(of_all.lines.borrow()[4..], [""]);
        assert_eq!(*status.borrow(), None);
        all.process.ask_to_stop();
        sim.sleep_ns(1_000_000).await;
        assert_eq!(*status.borrow(), Some(0));
    });
}
