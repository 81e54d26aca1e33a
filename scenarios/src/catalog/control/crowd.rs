//! Many at the control socket at once: those who say nothing, and those who wait for a disk whose storage is silent.

use super::verbs::{Act, Acts};
use super::{Disk, minor_in};
use crate::check::Invariant;
use kernel_model::SimHost;
use std::cell::Cell;
use std::rc::Rc;
use tap_abi::tapctl::{Kind, Message};
use tap_control::client::{CallError, Tapdisk};
use tap_control::{CONNECTIONS_MAX, FOLDER, WAITING_OF_ONE_MAX, json_socket_of, socket_of};
use tap_core::wait::joined;
use tap_host::{Errno, Files, SocketAddress, Sockets};

/// Where a server listens that accepts nobody. Our client gives it ten seconds.
const SILENT: &str = "/run/silent.nbd";
/// How long a tapdisk may take to say what it can say at once, in seconds.
const AT_ONCE_S: u64 = 1;
/// How long others get to send their requests, in nanoseconds.
const GATHER_NS: u64 = 1_000_000_000;
/// How long a list may take, in nanoseconds: tap-ctl waits 30 s for a tapdisk that hangs.
const LIST_NS_MAX: u64 = 31_000_000_000;
/// Requests about one disk that are sent at once.
const CROWD: usize = WAITING_OF_ONE_MAX + 4;

impl Acts<'_> {
    /// As many clients as the control sockets take: others wait, but not for ever.
    pub(super) async fn crowd(&self, disk: &Disk, hold_ns: u64) -> Act {
        match hold_ns % 4 {
            0 => self.silent(disk, hold_ns).await,
            2 => self.beside_silent(disk).await,
            3 => self.many_listen().await,
            _ => self.held_up().await,
        }
    }

    /// Some tapdisks hang. A list has everybody's lines, in order, after the time for one of them.
    async fn beside_silent(&self, disk: &Disk) -> Act {
        let sim = &self.world.sim;
        let host = SimHost::start(&self.world.kernel, &self.world.xen, "hangs", sim.now_ns());
        let (pid, minor) = (self.tapdisk.pid(), disk.minor.get().unwrap_or_default());
        let mut listeners = Vec::new();
        for silent in [1, pid + 1_000_000, pid + 1_000_001] {
            listeners.push(host.listen(&SocketAddress::Unix(socket_of(FOLDER, silent))).await);
        }
        let began_ns = sim.now_ns();
        let listed = self.admin.ctl("list").await;
        let took_ns = sim.now_ns() - began_ns;
        drop(listeners);
        host.closed().await;
        if !self.tapdisk.is_alive() {
            return None;
        }
        let number = |row: &String| row.strip_prefix("pid=")?.split(' ').next()?.parse::<u32>().ok();
        let pids: Vec<u32> = listed.out.iter().filter_map(number).collect();
        let own = format!("pid={pid} minor={minor} ");
        let complete = listed.out.iter().any(|row| row.starts_with(&own))
            && pids.is_sorted()
            && [1, pid + 1_000_000, pid + 1_000_001].iter().all(|silent| {
                pids.contains(silent) && listed.err.contains(&format!("tapdisk {silent} (ETIME)"))
            });
        if listed.status != 0 || !complete || took_ns > LIST_NS_MAX {
            let text = format!("beside three tapdisks that hang a list took {took_ns} ns: {listed:?}");
            self.world.fail(Invariant::U1, text);
        }
        Some(())
    }

    /// They send nothing.
    async fn silent(&self, disk: &Disk, hold_ns: u64) -> Act {
        let sim = &self.world.sim;
        let host = SimHost::start(&self.world.kernel, &self.world.xen, "crowd", sim.now_ns());
        let mut silent = Vec::new();
        for path in [socket_of, json_socket_of].map(|path_of| path_of(FOLDER, self.tapdisk.pid())) {
            let address = SocketAddress::Unix(path);
            for _ in 0..CONNECTIONS_MAX {
                silent.extend(host.connect(&address).await.ok());
            }
        }
        sim.sleep_ns(hold_ns).await;
        self.runs(disk).await?;
        self.listed(disk, "running").await
    }

    /// They wait for a disk whose storage is silent. What can be said without it is said, and only so many wait.
    async fn held_up(&self) -> Act {
        let outcome = self.admin.expect(self.tapdisk, "allocate", 0).await?;
        let minor = minor_in(&outcome.out)?;
        let at = format!("-p {} -m {minor}", self.tapdisk.pid());
        self.done(&format!("attach {at}")).await?;
        let sim = &self.world.sim;
        let host = SimHost::start(&self.world.kernel, &self.world.xen, "crowd", sim.now_ns());
        let listener = host.listen(&SocketAddress::Unix(SILENT.into())).await;
        let (admin, line) = (Rc::clone(self.admin), format!("open {at} -D -a nbd:unix:{SILENT}"));
        let (task, opened) = joined(async move { admin.ctl(&line).await });
        sim.spawn("silent disk", 0, task);
        sim.sleep_ns(GATHER_NS).await;
        let pid = self.tapdisk.pid();
        let tapdisk = |limit_s| Tapdisk { host: host.clone(), folder: FOLDER.to_owned(), pid, limit_s };
        let (waiting, many) = (Rc::new(Cell::new(0_usize)), Rc::new(Cell::new(0_usize)));
        let ends: Vec<_> = (0..CROWD as u64)
            .map(|i| {
                let tapdisk = tapdisk(0);
                let (waiting, many) = (Rc::clone(&waiting), Rc::clone(&many));
                let (task, end) = joined(async move {
                    waiting.set(waiting.get() + 1);
                    let answer = tapdisk.call(&Message::new(Kind::Pause, minor)).await;
                    waiting.set(waiting.get() - 1);
                    if matches!(answer, Err(CallError::Refused { error: Errno::EAGAIN, .. })) {
                        many.set(many.get() + 1);
                    }
                });
                host.process.node().spawn("waits", i, task);
                end
            })
            .collect();
        sim.sleep_ns(GATHER_NS).await;
        let listed = tapdisk(AT_ONCE_S).list().await;
        let alive = self.tapdisk.is_alive();
        if alive && let Err(error) = listed {
            let text = format!("{} wait for a silent disk, and others failed to {error}", waiting.get());
            self.world.fail(Invariant::U1, text);
        }
        // The open is one of them.
        if alive && (waiting.get() >= WAITING_OF_ONE_MAX || waiting.get() + many.get() != CROWD) {
            let text = format!("{} wait for one disk, {} were refused", waiting.get(), many.get());
            self.world.fail(Invariant::K1, text);
        }
        for end in ends {
            end.await;
        }
        drop(listener);
        let opened = opened.await;
        if !self.tapdisk.is_alive() {
            return None;
        }
        if opened.is_none_or(|opened| opened.status == 0) {
            self.world.fail(Invariant::U1, "an image whose server is silent was opened");
        }
        self.done(&format!("detach {at}")).await?;
        self.done(&format!("free -m {minor}")).await
    }
}
