//! Storage, clients and tapdisks that do not answer.

use crate::control::{Admin, read, write};
use crate::{Daemon, world};
use kernel_model::Kernel;
use sim::Sim;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_abi::tapctl::{Kind, MESSAGE_BYTES, Message, Params, Text};
use tap_control::client::{CallError, Tapdisk};
use tap_control::{Answer, CONNECTIONS_MAX, Control, FOLDER, TapCtl, Verbs, socket_of};
use tap_host::{Errno, IoBuf, Listener, SendList, Signals, SocketAddress, Sockets, Stream, Tasks};
use zerocopy::IntoBytes;

const SECOND_NS: u64 = 1_000_000_000;
const IMAGE: &str = "nbd:unix:/run/s";
const SERVE: &str = "serve --nbd unix:/run/s raw:/a";

/// A disk whose storage has gone away under a write. Returns the write's outcome, once it has one.
async fn stuck(admin: &Rc<Admin>, kernel: &Kernel, sim: &Sim) -> (u32, Rc<Cell<Option<Result<(), Errno>>>>) {
    let server = Daemon::start(kernel, &admin.xen, 1, SERVE);
    sim.sleep_ns(1_000_000).await;
    admin.done(&format!("create -a {IMAGE} -- --pause-limit 2")).await;
    let pid = admin.started.borrow()[0].host.process_id();
    let disk = admin.client(pid, 0).await;
    server.host.process.node().kill();
    let (outcome, host) = (Rc::new(Cell::new(None)), kernel.process("slow client", 2));
    let put = Rc::clone(&outcome);
    host.spawn("write", 0, async move { put.set(Some(write(&disk, 3, 7).await)) });
    sim.sleep_ns(1_000_000).await;
    (pid, outcome)
}

#[test]
fn a_close_is_forced_although_storage_does_not_answer() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        let admin = Admin::new(&sim, &kernel, &xen);
        let (pid, outcome) = stuck(&admin, &kernel, &sim).await;
        let (own, closed) = (Rc::clone(&admin), Rc::new(RefCell::new(None)));
        let put = Rc::clone(&closed);
        sim.spawn("close", 0, async move {
            let ended = own.ctl(&format!("close -p {pid} -m 0")).await;
            *put.borrow_mut() = Some(ended);
        });
        sim.sleep_ns(SECOND_NS).await;
        assert_eq!(admin.done("list").await, format!("pid={pid} minor=0 state=0x40 args={IMAGE}"));
        let force = format!("close -f -p {pid} -m 0");
        let (began_ns, words) = (sim.now_ns(), format!("{IMAGE} is in use after 2 s"));
        admin.refused(&force, Errno::ETIMEDOUT, &words).await;
        assert!((2..3).contains(&((sim.now_ns() - began_ns) / SECOND_NS)));
        admin.refused(&force, Errno::ETIMEDOUT, &words).await;
        for verb in [&format!("open -a {IMAGE}"), "detach", "pause", "unpause", "close"] {
            let (verb, options) = verb.split_once(' ').unwrap_or((verb, ""));
            let line = format!("{verb} -p {pid} -m 0 {options}");
            admin.refused(&line, Errno::EBUSY, "its close was forced").await;
        }
        assert_eq!((outcome.get(), closed.borrow().clone()), (None, None));
        // Its storage answers again: what was under way ends.
        let _server = Daemon::start(&kernel, &xen, 2, SERVE);
        sim.sleep_ns(10 * SECOND_NS).await;
        assert_eq!(*closed.borrow(), Some((0, String::new())));
        assert!(admin.started.borrow()[0].said().contains("whose close was forced: it is closed now"));
        admin.done(&force).await;
        assert_eq!(admin.done("list").await, format!("pid={pid} minor=0 state=0x2"));
        assert_eq!(outcome.get(), None, "a client may notice a delay, never an error");
        admin.done(&format!("open -p {pid} -m 0 -a {IMAGE}")).await;
        sim.sleep_ns(10 * SECOND_NS).await;
        assert_eq!(outcome.get(), Some(Ok(())));
        assert_eq!(read(&admin.client(pid, 0).await, 3).await, 7);
    });
}

#[test]
fn a_process_that_cannot_end_says_why() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        kernel.storage().put_bytes("/b", &[1; 1 << 20]);
        let admin = Admin::new(&sim, &kernel, &xen);
        let (pid, outcome) = stuck(&admin, &kernel, &sim).await;
        admin.done("allocate").await;
        admin.done(&format!("attach -p {pid} -m 1")).await;
        admin.done(&format!("open -p {pid} -m 1 -a raw:/b")).await;
        let (host, status) = {
            let started = admin.started.borrow();
            (started[0].host.clone(), Rc::clone(&started[0].status))
        };
        host.process.ask_to_stop();
        sim.sleep_ns(SECOND_NS).await;
        assert!(kernel.storage().locks("/b").is_empty(), "no disk waits for another");
        sim.sleep_ns(2 * SECOND_NS).await;
        let said = admin.started.borrow()[0].said();
        assert!(said.contains("minor 0 is not closed yet") && !said.contains("minor 1"), "{said}");
        assert_eq!((*status.borrow(), outcome.get()), (None, None));
        let _server = Daemon::start(&kernel, &xen, 2, SERVE);
        sim.sleep_ns(10 * SECOND_NS).await;
        assert_eq!((*status.borrow(), outcome.get()), (Some(0), Some(Ok(()))));
    });
}

async fn send(stream: &impl Stream, message: &Message) {
    let mut list = SendList::new();
    list.push_bytes(message.as_bytes());
    while !list.is_empty() {
        let (sent, rest) = stream.send(list).await;
        sent.unwrap();
        list = rest;
    }
}

/// A tapdisk that takes a request, and answers with `answer`, or not at all.
fn answers(kernel: &Kernel, pid: u32, answer: Option<Message>) {
    let host = kernel.process("foreign tapdisk", u64::from(pid));
    host.clone().spawn("main", 0, async move {
        let listener = host.listen_private(&socket_of(FOLDER, pid)).await.unwrap();
        loop {
            let stream = listener.accept().await.unwrap();
            let (mut have, mut buf) = (0, IoBuf::unpooled(MESSAGE_BYTES).unwrap());
            while have < MESSAGE_BYTES {
                let (count, back) = stream.recv(buf, have).await;
                (have, buf) = (have + count.unwrap(), back);
            }
            match &answer {
                Some(answer) => send(&stream, answer).await,
                // Until the client leaves.
                None => drop(stream.recv(buf, 0).await),
            }
        }
    });
}

#[test]
fn a_client_does_not_wait_longer_than_it_was_told() {
    world(|sim, kernel, xen| async move {
        let admin = Admin::new(&sim, &kernel, &xen);
        answers(&kernel, 70_001, None);
        sim.sleep_ns(1_000_000).await;
        for verb in ["pause", "close", "close -f", "destroy"] {
            let began_ns = sim.now_ns();
            let line = format!("{verb} -p 70001 -m 3 -t 5");
            admin.refused(&line, Errno::ETIME, "within 5 s; it may still").await;
            assert_eq!((sim.now_ns() - began_ns) / SECOND_NS, 5, "{line}");
        }
        // Without a limit of its own.
        let began_ns = sim.now_ns();
        admin.refused("stats -p 70001 -m 3", Errno::ETIME, "within 30 s").await;
        assert_eq!((sim.now_ns() - began_ns) / SECOND_NS, 30);
    });
}

#[test]
fn tapdisks_that_hang_cost_a_list_one_wait_and_nobody_else_a_line() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a", &[1; 1 << 20]);
        kernel.storage().put_bytes("/b", &[1; 1 << 20]);
        let admin = Admin::new(&sim, &kernel, &xen);
        // Some have lower numbers than those that answer, some higher.
        let silent = [1, 2, 70_001, 70_002, 70_003];
        silent.iter().for_each(|pid| answers(&kernel, *pid, None));
        answers(&kernel, 70_004, Some(Message::error(3, 16, "be so good")));
        let (first, second) = (admin.create("raw:/a").await, admin.create("raw:/b").await);
        let began_ns = sim.now_ns();
        let said = admin.done("list").await;
        assert_eq!((sim.now_ns() - began_ns) / SECOND_NS, 30);
        let late = |pid: &u32| {
            let path = socket_of(FOLDER, *pid);
            format!(
                "tap-ctl: failed to list tapdisk {pid} (ETIME): get an answer from {path} within 30 s; \
                 it may still carry the request out"
            )
        };
        let mut expected: Vec<String> = silent.iter().map(late).collect();
        expected.push("tap-ctl: failed to list tapdisk 70004 (EBUSY): be so good".to_owned());
        for pid in [1, 2] {
            expected.push(format!("pid={pid}"));
        }
        expected.push(format!("pid={first} minor=0 state=0 args=raw:/a"));
        expected.push(format!("pid={second} minor=1 state=0 args=raw:/b"));
        for pid in 70_001..=70_004 {
            expected.push(format!("pid={pid}"));
        }
        assert_eq!(said.lines().collect::<Vec<_>>(), expected);
        for (pid, minor) in [(first, 0), (second, 1)] {
            admin.done(&format!("destroy -p {pid} -m {minor}")).await;
        }
    });
}

/// tapdisk3 puts some error numbers into its answers as they are, and others as the kernel has them.
#[test]
fn an_error_of_another_tapdisk_may_be_negative() {
    world(|sim, kernel, xen| async move {
        let admin = Admin::new(&sim, &kernel, &xen);
        let numbers = [16, -16, 0, i32::MIN];
        for (i, number) in (70_001..).zip(numbers) {
            answers(&kernel, i, Some(Message::error(3, number, "")));
        }
        sim.sleep_ns(1_000_000).await;
        for (i, error) in (70_001..).zip([Errno::EBUSY, Errno::EBUSY, Errno::EIO, Errno::EIO]) {
            admin.refused(&format!("pause -p {i} -m 3"), error, "have tapdisk do ").await;
        }
    });
}

/// Its line in a list would be two.
#[test]
fn an_image_whose_name_has_control_characters_is_refused() {
    world(|sim, kernel, xen| async move {
        kernel.storage().put_bytes("/a\nb", &[1; 1 << 20]);
        let admin = Admin::new(&sim, &kernel, &xen);
        admin.done("spawn").await;
        let pid = admin.started.borrow()[0].host.process_id();
        admin.done("allocate").await;
        admin.done(&format!("attach -p {pid} -m 0")).await;
        let tapdisk =
            Tapdisk { host: kernel.process("raw client", 1), folder: FOLDER.to_owned(), pid, limit_s: 0 };
        for name in ["raw:/a\nb", "raw:/a\u{1b}[2J", "\u{7f}raw:/a"] {
            let params = Params { path: Text::new(name).unwrap(), ..Params::default() };
            let refused = tapdisk.call(&Message::with(Kind::Open, 0, &params)).await;
            let Err(CallError::Refused { error: Errno::EINVAL, words }) = refused else {
                panic!("{refused:?}")
            };
            assert!(words.contains("control characters") && !words.contains(char::is_control), "{words}");
        }
        assert_eq!(admin.done("list").await, format!("pid={pid} minor=0 state=0"));
    });
}

/// Answers with more than a socket holds.
struct Talks;

impl Verbs for Talks {
    async fn carry_out(&self, _kind: Kind, message: Message) -> Answer {
        match message.cookie() {
            0 => Message::new(Kind::PidRsp, 0).into(),
            minor => Answer::text(minor, "x".repeat(1 << 20)),
        }
    }
}

#[test]
fn a_client_that_does_not_take_its_answer_loses_its_place() {
    world(|sim, kernel, _xen| async move {
        let (host, path) = (kernel.process("tapdisk", 1), socket_of(FOLDER, 70_001));
        let listener = host.listen_private(&path).await.unwrap();
        let control = Control::new(host.clone(), TapCtl(Rc::new(Talks)));
        host.spawn("main", 0, async move { control.serve(listener, std::future::pending()).await });
        let client = |key| kernel.process("client", key);
        let mut deaf = Vec::new();
        for key in 0..CONNECTIONS_MAX as u64 {
            let stream = client(key).connect(&SocketAddress::Unix(path.clone())).await.unwrap();
            send(&stream, &Message::new(Kind::Stats, 1)).await;
            deaf.push(stream);
        }
        let own = client(99);
        let ask = async |limit_s| {
            let heard = Tapdisk { host: own.clone(), folder: FOLDER.to_owned(), pid: 70_001, limit_s };
            heard.call(&Message::new(Kind::Pid, 0)).await.map(drop)
        };
        sim.sleep_ns(1_000_000).await;
        let late = ask(5).await;
        assert!(matches!(late, Err(CallError::Late { .. })), "{late:?}");
        assert_eq!(ask(10).await, Ok(()));
        drop(deaf);
    });
}
