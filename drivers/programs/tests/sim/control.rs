//! `tapdisk control` as processes of a simulated host, and `tap-ctl` as others.

use crate::serve::bytes;
use crate::{Daemon, Printed, world};
use clap::Parser;
use kernel_model::{Kernel, SimHost};
use sim::Sim;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_abi::tapctl::{Kind, MESSAGE_BYTES, Message};
use tap_core::{Node, Request};
use tap_host::{Errno, IoBuf, SectorRange, SendList, Signals, SocketAddress, Sockets, Stream, Tasks};
use tap_images::{Formats, NewImage};
use tap_programs::ctl::{Cli, Launch, run};
use tap_programs::disk::{DiskOptions, open_disk};
use xen_model::Xen;

/// A host on which tap-ctl is run.
pub(crate) struct Admin {
    sim: Sim,
    pub(crate) kernel: Kernel,
    pub(crate) xen: Xen,
    pub(crate) started: RefCell<Vec<Daemon>>,
    calls: Cell<u64>,
}

/// Starts tapdisks as processes of the same host.
impl Launch for Admin {
    async fn tapdisk(&self, folder: &str, options: &[String]) -> Result<u32, String> {
        let line = format!("control --folder {folder} {}", options.join(" "));
        let key = 1000 + self.started.borrow().len() as u64;
        let daemon = Daemon::start(&self.kernel, &self.xen, key, &line);
        self.sim.sleep_ns(1_000_000).await;
        let pid = daemon.host.process_id();
        let said = daemon.said();
        self.started.borrow_mut().push(daemon);
        if said.ends_with(&format!("/ctl{pid}")) { Ok(pid) } else { Err(said) }
    }
}

impl Admin {
    pub(crate) fn new(sim: &Sim, kernel: &Kernel, xen: &Xen) -> Rc<Self> {
        let (sim, kernel, xen) = (sim.clone(), kernel.clone(), xen.clone());
        Rc::new(Self { sim, kernel, xen, started: RefCell::default(), calls: Cell::new(1) })
    }

    /// Runs tap-ctl, and returns its exit status and what it printed.
    pub(crate) async fn ctl(self: &Rc<Self>, line: &str) -> (u8, String) {
        let cli = Cli::try_parse_from(std::iter::once("tap-ctl").chain(line.split_whitespace()));
        let cli = cli.unwrap_or_else(|e| panic!("{line}: {e}"));
        let key = self.calls.replace(self.calls.get() + 1);
        let host = SimHost::start(&self.kernel, &self.xen, "tap-ctl", key);
        let printed = Printed::default();
        let status = run(&host, cli, &**self, &printed).await;
        (status, printed.lines.borrow().join("\n"))
    }

    pub(crate) async fn done(self: &Rc<Self>, line: &str) -> String {
        let (status, said) = self.ctl(line).await;
        assert_eq!(status, 0, "tap-ctl {line}: {said}");
        said
    }

    pub(crate) async fn refused(self: &Rc<Self>, line: &str, error: Errno, words: &str) {
        let (status, said) = self.ctl(line).await;
        assert_eq!(i32::from(status), error.0, "tap-ctl {line}: {said}");
        assert!(said.starts_with("tap-ctl: failed to ") && said.contains(words), "tap-ctl {line}: {said}");
    }

    /// A new disk: its tapdisk's number.
    pub(crate) async fn create(self: &Rc<Self>, image: &str) -> u32 {
        let path = self.done(&format!("create -a {image}")).await;
        let minor = self.started.borrow().len() - 1;
        assert_eq!(path, format!("/run/blktap-control/tapdisk/tapdisk-{minor}"));
        self.started.borrow().last().unwrap().host.process_id()
    }

    pub(crate) async fn client(&self, pid: u32, minor: u16) -> Rc<dyn Node> {
        let host = self.kernel.process(format!("client of {pid}"), u64::from(minor));
        let options = DiskOptions { write: true, ..DiskOptions::default() };
        let spec = format!("nbd:unix:/run/blktap-control/nbd{pid}.{minor}").parse().unwrap();
        open_disk(&host, Formats::shipped(), tap_host::VbdId(0), &spec, &options).await.unwrap().node()
    }
}

pub(crate) async fn write(disk: &Rc<dyn Node>, sector: u64, fill: u8) -> Result<(), Errno> {
    disk.submit(Request::write(SectorRange::new(sector, 1), bytes(fill, 1))).await.result
}

pub(crate) async fn read(disk: &Rc<dyn Node>, sector: u64) -> u8 {
    let read = disk.submit(Request::read(SectorRange::new(sector, 1), bytes(0, 1))).await;
    read.result.unwrap();
    read.bufs[0][0]
}

#[test]
fn a_disk_is_created_listed_counted_and_destroyed() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        let admin = Admin::new(&sim, &kernel, &xen);
        assert_eq!(admin.done("check").await, "ok");
        assert_eq!(admin.done("list").await, "");
        let pid = admin.create("aio:/a").await;
        assert_eq!(admin.done("list").await, format!("pid={pid} minor=0 state=0 args=aio:/a"));
        assert_eq!(admin.done(&format!("pid -p {pid}")).await, pid.to_string());
        let disk = admin.client(pid, 0).await;
        assert_eq!(write(&disk, 3, 7).await, Ok(()));
        let stats = admin.done(&format!("stats -p {pid} -m 0")).await;
        assert!(stats.contains("\"secs\":[0,1]") && stats.contains("\"nbd_clients\":1"), "{stats}");
        let listed = admin.done("list --json -t aio -f /a").await;
        let expected = format!(r#"[{{"file":"/a","minor":0,"pid":{pid},"state":0,"type":"aio"}}]"#);
        assert_eq!(listed, expected);
        assert_eq!(admin.done("list -t qcow").await, "");
        assert_eq!(admin.done("allocate").await, "/run/blktap-control/tapdisk/tapdisk-1");
        assert_eq!(
            admin.done("list").await,
            format!("pid={pid} minor=0 state=0 args=aio:/a\nminor=1"),
            "a minor number without a tapdisk"
        );
        admin.done("free -m 1").await;
        admin.done(&format!("destroy -p {pid} -m 0")).await;
        assert_eq!(admin.done("list").await, "");
        sim.sleep_ns(1_000_000_000).await;
        let ended = *admin.started.borrow()[0].status.borrow();
        assert_eq!(ended, Some(0), "with its last minor number");
        // Closed, it is durable.
        kernel.storage().power_cut();
        assert_eq!(kernel.storage().bytes("/a").unwrap()[3 * 512], 7);
    });
}

#[test]
fn a_paused_disk_lets_go_of_its_image_and_its_users_wait() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        let admin = Admin::new(&sim, &kernel, &xen);
        let pid = admin.create("raw:/a").await;
        let disk = admin.client(pid, 0).await;
        assert_eq!(write(&disk, 3, 7).await, Ok(()));
        admin.done(&format!("pause -p {pid} -m 0")).await;
        admin.done(&format!("pause -p {pid} -m 0")).await;
        assert_eq!(admin.done("list").await, format!("pid={pid} minor=0 state=0x2a args=raw:/a"));
        // Everything is durable, and another process may open the file for writing.
        assert!(kernel.storage().inode("/a").unwrap().pending.is_empty());
        let other = kernel.process("another", 1);
        let options = DiskOptions { write: true, ..DiskOptions::default() };
        let spec = "raw:/a".parse().unwrap();
        let opened =
            open_disk(&other, Formats::shipped(), tap_host::VbdId(1), &spec, &options).await.unwrap();
        let own: Rc<dyn Node> = opened.node();
        assert_eq!(write(&own, 5, 9).await, Ok(()));
        let (late, host) = (Rc::new(RefCell::new(None)), kernel.process("waiting client", 2));
        let (put, waiting) = (Rc::clone(&late), Rc::clone(&disk));
        host.spawn("read", 0, async move {
            let seen = read(&waiting, 5).await;
            *put.borrow_mut() = Some(seen);
        });
        sim.sleep_ns(100_000_000_000).await;
        assert_eq!(*late.borrow(), None);
        admin.refused(&format!("unpause -p {pid} -m 0"), Errno::EAGAIN, "stays paused").await;
        assert_eq!(admin.done("list").await, format!("pid={pid} minor=0 state=0x22a args=raw:/a"));
        own.close().await.unwrap();
        admin.done(&format!("unpause -p {pid} -m 0")).await;
        sim.sleep_ns(1_000_000_000).await;
        assert_eq!(*late.borrow(), Some(9), "what was written meanwhile is seen");
        admin.refused(&format!("unpause -p {pid} -m 0"), Errno::EINVAL, "it is not paused").await;
        admin.done(&format!("destroy -p {pid} -m 0")).await;
    });
}

#[test]
fn a_disk_goes_on_with_another_image_or_with_its_own() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        kernel.storage().put_bytes("/small", &[2; 1 << 19]);
        let admin = Admin::new(&sim, &kernel, &xen);
        let host = kernel.process("tap-img", 1);
        let format = tap_images::format_called("qcow").unwrap();
        let image = NewImage { size_bytes: 1 << 20, backing: None, existing: None, options: Vec::new() };
        Formats::shipped().create(&host, format, "/b", image).await.unwrap();
        let pid = admin.create("raw:/a").await;
        let disk = admin.client(pid, 0).await;
        let unpause = |image: &str| format!("unpause -p {pid} -m 0 -a {image}");
        for (image, error, words) in [
            ("raw:/nowhere", Errno::ENOENT, "; it goes on with raw:/a"),
            (
                "raw:/small",
                Errno::EMEDIUMTYPE,
                "it has 1024 sectors, and the disk has 2048; it goes on with raw:/a",
            ),
            ("vhd:/a", Errno::EINVAL, "'vhd' is not a known format"),
            ("/a", Errno::EINVAL, "name the format"),
        ] {
            admin.done(&format!("pause -p {pid} -m 0")).await;
            admin.refused(&unpause(image), error, words).await;
            assert_eq!(read(&disk, 3).await, 1);
        }
        admin.done(&format!("pause -p {pid} -m 0")).await;
        admin.done(&unpause("qcow:/b")).await;
        assert_eq!(admin.done("list").await, format!("pid={pid} minor=0 state=0 args=qcow:/b"));
        assert_eq!((read(&disk, 3).await, write(&disk, 3, 8).await, read(&disk, 3).await), (0, Ok(()), 8));
        // The name is that of the image it has now.
        admin.done(&format!("pause -p {pid} -m 0")).await;
        admin.done(&format!("unpause -p {pid} -m 0")).await;
        assert_eq!(read(&disk, 3).await, 8);
        assert_eq!(kernel.storage().bytes("/a").unwrap()[3 * 512], 1);
        admin.done(&format!("destroy -p {pid} -m 0")).await;
    });
}

#[test]
fn a_paused_disk_can_be_closed_and_opened_again() {
    for force in ["", " -f"] {
        world(move |sim, kernel, xen| async move {
            kernel.storage().put_bytes("/a", &[1; 1 << 20]);
            let admin = Admin::new(&sim, &kernel, &xen);
            let pid = admin.create("raw:/a").await;
            let disk = admin.client(pid, 0).await;
            admin.done(&format!("pause -p {pid} -m 0")).await;
            let (late, host) = (Rc::new(RefCell::new(None)), kernel.process("waiting client", 2));
            let put = Rc::clone(&late);
            host.spawn("write", 0, async move {
                let result = write(&disk, 5, 9).await;
                *put.borrow_mut() = Some(result);
            });
            sim.sleep_ns(1_000_000_000).await;
            admin.done(&format!("close{force} -p {pid} -m 0")).await;
            assert_eq!(admin.done("list").await, format!("pid={pid} minor=0 state=0x2"));
            // Closed is closed.
            admin.done(&format!("close -p {pid} -m 0")).await;
            assert!(
                !admin.kernel.storage().is_closing("/a") && admin.kernel.storage().locks("/a").is_empty()
            );
            // The client's own business is to try again.
            admin.done(&format!("open -p {pid} -m 0 -a raw:/a")).await;
            sim.sleep_ns(60_000_000_000).await;
            assert_eq!(*late.borrow(), Some(Ok(())));
            let disk = admin.client(pid, 0).await;
            assert_eq!(read(&disk, 5).await, 9);
            admin.done(&format!("destroy -p {pid} -m 0")).await;
        });
    }
}

#[test]
fn several_disks_of_one_process_and_a_minor_number_of_one_process_only() {
    world(|sim, kernel, xen| async move {
        for path in ["/a", "/b"] {
            kernel.storage().put_bytes(path, &[1; 1 << 20]);
        }
        let admin = Admin::new(&sim, &kernel, &xen);
        let first = admin.create("raw:/a").await;
        assert_eq!(admin.done("allocate").await, "/run/blktap-control/tapdisk/tapdisk-1");
        admin.done(&format!("attach -p {first} -m 1")).await;
        admin.refused(&format!("attach -p {first} -m 1"), Errno::EEXIST, "has it already").await;
        admin.refused(&format!("attach -p {first} -m 2"), Errno::ENOENT, "allocate it first").await;
        admin.done(&format!("open -p {first} -m 1 -a raw:/b -R -D")).await;
        let both =
            format!("pid={first} minor=0 state=0 args=raw:/a\npid={first} minor=1 state=0 args=raw:/b");
        assert_eq!(admin.done(&format!("list -p {first}")).await, both);
        let disk = admin.client(first, 1).await;
        assert_eq!(write(&disk, 0, 1).await, Err(Errno::EROFS));
        let said = admin.done("spawn").await;
        let second = admin.started.borrow()[1].host.process_id();
        assert_eq!(said, second.to_string());
        admin.refused(&format!("attach -p {second} -m 1"), Errno::EBUSY, "another tapdisk has it").await;
        admin.refused("free -m 1", Errno::EBUSY, "detach it first").await;
        admin.refused(&format!("detach -p {first} -m 1"), Errno::EBUSY, "close it first").await;
        admin.refused(&format!("open -p {second} -m 1 -a raw:/b"), Errno::ENODEV, "not attached").await;
        admin.refused(&format!("open -p {first} -m 0 -a raw:/b"), Errno::EALREADY, "raw:/a open").await;
        admin.done(&format!("close -p {first} -m 1")).await;
        admin.done(&format!("detach -p {first} -m 1")).await;
        admin.done(&format!("attach -p {second} -m 1")).await;
        admin.refused(&format!("open -p {second} -m 1 -a raw:/a"), Errno::EAGAIN, "in use").await;
        assert_eq!(admin.done(&format!("list -p {second}")).await, format!("pid={second} minor=1 state=0"));
        // Asked to stop, it leaves no socket; killed, it leaves one that nobody mistakes for a tapdisk.
        admin.started.borrow()[1].host.process.ask_to_stop();
        sim.sleep_ns(1_000_000_000).await;
        assert_eq!(*admin.started.borrow()[1].status.borrow(), Some(0));
        admin.started.borrow()[0].host.process.node().kill();
        sim.sleep_ns(1_000_000_000).await;
        assert_eq!(admin.done("list").await, "minor=0\nminor=1");
        for minor in [0, 1] {
            admin.done(&format!("free -m {minor}")).await;
        }
        admin.refused("free -m 1", Errno::ENOENT, "not allocated").await;
    });
}

#[test]
fn what_create_has_begun_is_taken_back() {
    world(|sim, kernel, xen| async move {
        let admin = Admin::new(&sim, &kernel, &xen);
        admin.refused("create -a raw:/nowhere", Errno::ENOENT, "open /nowhere").await;
        admin.refused("create -a raw:/nowhere -- --connections 9", Errno::ENOENT, "open /nowhere").await;
        sim.sleep_ns(1_000_000_000).await;
        assert_eq!(admin.started.borrow().len(), 2);
        assert!(admin.started.borrow().iter().all(|daemon| *daemon.status.borrow() == Some(0)));
        assert_eq!(admin.done("list").await, "");
        for (option, what) in [
            ("-r", "local storage"),
            ("-e 3", "chain of another"),
            ("-2 raw:/b", "second image"),
            ("-s", "second image"),
            ("-C /log", "changed blocks"),
            ("-E", "encrypted"),
        ] {
            admin.refused(&format!("create -a raw:/a {option}"), Errno::EOPNOTSUPP, what).await;
        }
        let long = format!("create -a raw:/{}", "a".repeat(251));
        admin.refused(&long, Errno::ENAMETOOLONG, "254 bytes").await;
        assert_eq!(admin.started.borrow().len(), 2, "nothing was begun");
        admin.refused("pause -p 9999 -m 0", Errno::ENOENT, "no such process").await;
        admin.refused("major", Errno::ENODEV, "no blktap2 module").await;
    });
}

#[test]
fn a_disk_that_cannot_pause_in_time_goes_on() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        let admin = Admin::new(&sim, &kernel, &xen);
        let serve = "serve --nbd unix:/run/s raw:/a";
        let server = Daemon::start(&kernel, &xen, 1, serve);
        sim.sleep_ns(1_000_000).await;
        let path = admin.done("create -a nbd:unix:/run/s -- --pause-limit 1").await;
        assert!(path.ends_with("-0"));
        let pid = admin.started.borrow()[0].host.process_id();
        let disk = admin.client(pid, 0).await;
        server.host.process.node().kill();
        let host = kernel.process("slow client", 2);
        let (slow, done) = (Rc::clone(&disk), Rc::new(Cell::new(false)));
        let put = Rc::clone(&done);
        host.spawn("write", 0, async move {
            put.set(write(&slow, 3, 7).await.is_ok());
        });
        sim.sleep_ns(1_000_000).await;
        admin.refused(&format!("pause -p {pid} -m 0"), Errno::ETIMEDOUT, "within 1 s; it goes on").await;
        assert_eq!(admin.done("list").await, format!("pid={pid} minor=0 state=0 args=nbd:unix:/run/s"));
        assert!(!done.get());
        let _server = Daemon::start(&kernel, &xen, 2, serve);
        sim.sleep_ns(10_000_000_000).await;
        assert!(done.get());
        assert_eq!(read(&disk, 3).await, 7);
    });
}

/// Sends `bytes` to a control socket in pieces of `piece` bytes, and returns what comes back.
pub(crate) async fn messages(
    admin: &Rc<Admin>,
    pid: u32,
    bytes: &[u8],
    piece: usize,
) -> Result<Vec<u8>, Errno> {
    raw(admin, &tap_control::socket_of("/run/blktap-control", pid), bytes, piece).await
}

/// The same, for the socket at `path`.
pub(crate) async fn raw(admin: &Rc<Admin>, path: &str, bytes: &[u8], piece: usize) -> Result<Vec<u8>, Errno> {
    let host = admin.kernel.process("raw client", u64::from(piece as u32));
    let stream = host.connect(&SocketAddress::Unix(path.to_owned())).await?;
    'parts: for part in bytes.chunks(piece) {
        let mut list = SendList::new();
        list.push_bytes(part);
        while !list.is_empty() {
            let (sent, rest) = stream.send(list).await;
            // It was refused before it was all there.
            if sent == Err(Errno::EPIPE) {
                break 'parts;
            }
            sent?;
            list = rest;
        }
        admin.sim.sleep_ns(1_000).await;
    }
    let (mut answer, mut buf) = (Vec::new(), IoBuf::unpooled(4096)?);
    loop {
        let (count, back) = stream.recv(buf, 0).await;
        buf = back;
        match count {
            // Reset, because the other end has not read everything.
            Ok(0) | Err(Errno::ECONNRESET) => return Ok(answer),
            Err(error) => return Err(error),
            Ok(count) => answer.extend_from_slice(&buf[..count]),
        }
    }
}

#[test]
fn messages_may_be_split_and_strange_ones_are_refused() {
    use zerocopy::{FromBytes, IntoBytes};
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        let admin = Admin::new(&sim, &kernel, &xen);
        let pid = admin.create("raw:/a").await;
        let list = Message::new(Kind::List, 0xffff);
        for piece in [1, 3, MESSAGE_BYTES] {
            let answer = messages(&admin, pid, list.as_bytes(), piece).await.unwrap();
            assert_eq!(answer.len(), 2 * MESSAGE_BYTES, "one disk and the end");
        }
        // What is no request, or nobody knows, or is not available.
        for (number, error) in [
            (0, Errno::EINVAL),
            (1, Errno::EINVAL),
            (6, Errno::EINVAL),
            (37, Errno::EINVAL),
            (24, Errno::EOPNOTSUPP),
        ] {
            let mut bytes = Message::new(Kind::Pid, 0).as_bytes().to_vec();
            bytes[0] = number;
            let answer = messages(&admin, pid, &bytes, MESSAGE_BYTES).await.unwrap();
            let answer = Message::read_from_bytes(&answer).unwrap();
            assert_eq!(answer.kind(), Some(Kind::Error), "{number}");
            assert_eq!(answer.body::<tap_abi::tapctl::Outcome>().error.get(), error.0);
        }
        // Less than a request, and then nothing: it is dropped, and keeps nobody out.
        let started = sim.now_ns();
        let answer = messages(&admin, pid, &list.as_bytes()[..200], 200).await.unwrap();
        assert!(answer.is_empty() && sim.now_ns() - started >= tap_control::MESSAGE_NS);
        let silent: Vec<_> =
            (0..tap_control::CONNECTIONS_MAX as u64).map(|key| kernel.process("silent", 50 + key)).collect();
        let mut streams = Vec::new();
        for host in &silent {
            let address = SocketAddress::Unix(format!("/run/blktap-control/ctl{pid}"));
            streams.push(host.connect(&address).await.unwrap());
        }
        assert_eq!(admin.done("list").await, format!("pid={pid} minor=0 state=0 args=raw:/a"));
        admin.done(&format!("destroy -p {pid} -m 0")).await;
    });
}

#[test]
fn a_process_that_is_asked_to_stop_closes_its_disks() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        kernel.storage().put_bytes("/b", &[2; 1 << 20]);
        let admin = Admin::new(&sim, &kernel, &xen);
        let pid = admin.create("raw:/a").await;
        admin.done("allocate").await;
        admin.done(&format!("attach -p {pid} -m 1")).await;
        admin.done(&format!("open -p {pid} -m 1 -a raw:/b")).await;
        let (first, second) = (admin.client(pid, 0).await, admin.client(pid, 1).await);
        assert_eq!((write(&first, 3, 7).await, write(&second, 3, 8).await), (Ok(()), Ok(())));
        admin.done(&format!("pause -p {pid} -m 1")).await;
        // A client that says nothing does not hold it up.
        let address = SocketAddress::Unix(format!("/run/blktap-control/ctl{pid}"));
        let silent = kernel.process("silent", 9).connect(&address).await.unwrap();
        let daemon = admin.started.borrow()[0].host.clone();
        let asked_ns = sim.now_ns();
        daemon.process.ask_to_stop();
        while admin.started.borrow()[0].status.borrow().is_none() {
            sim.sleep_ns(1_000_000).await;
        }
        let ended = *admin.started.borrow()[0].status.borrow();
        assert_eq!(ended, Some(0));
        assert!(sim.now_ns() - asked_ns < tap_control::MESSAGE_NS / 2);
        drop(silent);
        for minor in [0, 1] {
            admin.done(&format!("free -m {minor}")).await;
        }
        kernel.storage().power_cut();
        for (path, fill) in [("/a", 7), ("/b", 8)] {
            assert_eq!(kernel.storage().bytes(path).unwrap()[3 * 512], fill);
            assert!(kernel.storage().locks(path).is_empty());
        }
    });
}

#[test]
fn a_process_ends_although_an_attach_failed_at_last() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        let admin = Admin::new(&sim, &kernel, &xen);
        let pid = admin.create("raw:/a").await;
        admin.done(&format!("close -p {pid} -m 0")).await;
        // Several at once, of which the detach is one.
        for key in 1..=4_u64 {
            let (own, line) = (Rc::clone(&admin), format!("attach -p {pid} -m {}", 100 + key));
            sim.spawn("attach", key, async move {
                own.ctl(&line).await;
            });
        }
        admin.done(&format!("detach -p {pid} -m 0")).await;
        sim.sleep_ns(1_000_000_000).await;
        let ended = *admin.started.borrow()[0].status.borrow();
        assert_eq!(ended, Some(0));
    });
}

#[test]
fn what_tap_ctl_does_not_ask_is_answered_too() {
    use tap_abi::tapctl::{Image, Minors, Outcome, Params, Text};
    use zerocopy::{FromBytes, IntoBytes};
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        let admin = Admin::new(&sim, &kernel, &xen);
        let pid = admin.create("raw:/a").await;
        let ask = async |message: Message| {
            let answer = messages(&admin, pid, message.as_bytes(), MESSAGE_BYTES).await.unwrap();
            Message::read_from_bytes(&answer).unwrap()
        };
        let image: Image = ask(Message::new(Kind::DiskInfo, 0)).await.body();
        assert_eq!((image.sectors.get(), image.sector_size.get()), (2048, 512));
        let minors: Minors = ask(Message::new(Kind::ListMinors, 0xffff)).await.body();
        assert_eq!((minors.count.get(), minors.list[0].get()), (1, 0));
        for minor in 1..70 {
            admin.done("allocate").await;
            admin.done(&format!("attach -p {pid} -m {minor}")).await;
        }
        let minors: Minors = ask(Message::new(Kind::ListMinors, 0xffff)).await.body();
        assert_eq!((minors.count.get(), minors.list[62].get()), (63, 62), "as many as there is room for");
        let busy = ask(Message::new(Kind::Exit, 0)).await;
        assert_eq!((busy.kind(), busy.body::<Outcome>().error.get()), (Some(Kind::Error), Errno::EBUSY.0));
        // A name of 255 bytes was cut by whoever sent it.
        let mut open =
            Message::with(Kind::Open, 1, &Params { path: Text::new("raw:/a").unwrap(), ..Params::default() });
        let bytes = open.as_mut_bytes();
        bytes[20 + 6..20 + 255].fill(b'a');
        let refused = ask(open).await;
        assert_eq!(refused.body::<Outcome>().error.get(), Errno::ENAMETOOLONG.0);
    });
}
