//! An administrator of a world: runs the shipped `tap-ctl`, which starts the shipped `tapdisk control`.

use super::Part;
use super::priorities::Priorities;
use crate::catalog::nbd::server_limits;
use crate::catalog::setup::Setup;
use crate::check::Invariant;
use crate::formats::Kind;
use crate::limits::StackLimits;
use crate::program::{Printed, named, option_of, tapdisk};
use crate::world::World;
use clap::Parser as _;
use kernel_model::SimHost;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_control::{FOLDER, socket_of};
use tap_core::CacheMode;
use tap_host::{Errno, Event, File, Files, IoBuf, LockKind, OpenMode, Signals, Whereabouts, select};
use tap_images::ImageSpec;
use tap_programs::Tuning;
use tap_programs::ctl::{Cli, Launch, run};
use tap_programs::img;

/// Memory for the servers of a process, in bytes.
const SERVERS_BYTES: usize = 32 << 20;
/// How often something is tried that a dead process may still hold up.
const TRIES: u32 = 1000;
/// Disks of a process for which it has memory.
const DISKS_MAX: usize = 4;

/// A `tapdisk control` in a process.
#[derive(Clone)]
pub(super) struct Tapdisk {
    pub(super) host: SimHost,
    said: Rc<Printed>,
}

impl Tapdisk {
    pub(super) fn pid(&self) -> u32 {
        self.host.process_id()
    }

    pub(super) fn is_alive(&self) -> bool {
        self.host.process.node().is_alive() && self.said.status().is_none()
    }

    pub(super) async fn ended(&self) {
        select(self.host.process.node().dead(), self.said.ended()).await;
    }

    /// Whether it has printed this to its standard error.
    pub(super) fn has_said(&self, words: &str) -> bool {
        self.said.err.borrow().iter().any(|line| line.contains(words))
    }

    /// Its exit status; `None` while it runs, and if it was killed.
    pub(super) fn status(&self) -> Option<u8> {
        self.said.status()
    }
}

/// What tap-ctl ended with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Outcome {
    pub(super) status: u8,
    /// The lines that it printed.
    pub(super) out: Vec<String>,
    pub(super) err: String,
}

/// The administrator.
pub(super) struct Admin {
    pub(super) world: World,
    pub(super) part: Part,
    /// Options that name backing files.
    backing: String,
    pub(super) limits: StackLimits,
    cache: CacheMode,
    /// How long a disk may take to pause, in seconds. A disk that hangs takes longer than the shortest.
    pause_limit_s: u32,
    /// The processes that were started, in order.
    started: RefCell<Vec<Tapdisk>>,
    calls: Cell<u64>,
    /// What disks said about requests that take long: the minor number, and where the request was.
    pub(super) hangs: Rc<RefCell<Vec<(u32, Whereabouts)>>>,
    pub(super) priorities: Priorities,
    /// The next process is killed after so many of its effects; 0 not at all.
    kill_after: Cell<u64>,
}

impl Launch for Admin {
    async fn tapdisk(&self, folder: &str, options: &[String]) -> Result<u32, String> {
        let key = self.started.borrow().len() as u64;
        let host = SimHost::start(&self.world.kernel, &self.world.xen, "tapdisk", key);
        let said = Rc::<Printed>::default();
        let started = Tapdisk { host: host.clone(), said: Rc::clone(&said) };
        self.started.borrow_mut().push(started);
        let node = host.process.node();
        match self.kill_after.take() {
            0 => {}
            steps => node.kill_after_steps(steps),
        }
        let (limits, cache) = (self.limits.options(), option_of(self.cache));
        let options = options.join(" ");
        let limit = self.pause_limit_s;
        let backing = &self.backing;
        let line = format!(
            "control --folder {folder} --pause-limit {limit} --watchdog 1 {limits} {backing} {cache} {options}"
        );
        let memory = SERVERS_BYTES + DISKS_MAX * self.limits.memory_bytes.max(4 << 20);
        let tuning = self.limits.tuning(&self.world, node, memory);
        let events_kept = self.world.setting("events-kept", &[256, 4, 1]);
        let tuning = Tuning { server: server_limits(&self.world), events_kept, ..tuning };
        let (world, own, out) = (self.world.clone(), host.clone(), Rc::clone(&said));
        node.spawn("main", 0, async move {
            let status = tapdisk(&world, &own, &line, tuning, &out).await;
            out.end(status);
        });
        let (pid, listens) = (host.process_id(), Cell::new(false));
        let path = socket_of(folder, pid);
        select(async { listens.set(said.says(&path).await) }, node.dead()).await;
        if listens.get() { Ok(pid) } else { Err("start tapdisk: it has ended".to_owned()) }
    }
}

impl Admin {
    pub(super) fn draw(world: &World, part: Part, kind: Kind) -> Rc<Self> {
        let limits = StackLimits::draw(world);
        let hangs = Rc::<RefCell<Vec<(u32, Whereabouts)>>>::default();
        let said = Rc::clone(&hangs);
        world.kernel.on_event(move |_, event| {
            if let Event::RequestHangs { vbd, at, .. } = event {
                said.borrow_mut().push((vbd.0, at));
            }
        });
        let backing = if part == Part::Snapshots { bases(world, kind) } else { String::new() };
        let priorities = Priorities::watch(world);
        Rc::new(Self {
            world: world.clone(),
            part,
            backing,
            limits,
            cache: world.setting("program-cache", &[CacheMode::WriteBack, CacheMode::WriteThrough]),
            pause_limit_s: world.setting("pause-limit", &[3600, 1]),
            started: RefCell::default(),
            calls: Cell::new(0),
            hangs,
            priorities,
            kill_after: Cell::new(0),
        })
    }

    /// Whether writes are durable when they are answered.
    pub(super) fn writes_through(&self) -> bool {
        self.cache == CacheMode::WriteThrough
    }

    /// Whether the backing files are named whose format cannot be recognised.
    pub(super) fn names_bases(&self) -> bool {
        !self.backing.is_empty()
    }

    /// Whether a pause may come too late.
    pub(super) fn pauses_may_fail(&self) -> bool {
        self.pause_limit_s < 60
    }

    /// The next tapdisk is killed after `steps` of its effects, if that is not 0.
    pub(super) fn kill_next(&self, steps: u64) {
        self.kill_after.set(steps);
    }

    /// The tapdisk that was started last.
    pub(super) fn newest(&self) -> Option<Tapdisk> {
        self.started.borrow().last().cloned()
    }

    /// Starts another tapdisk beside that of the disks.
    pub(super) async fn spawn_beside(&self) -> Option<Tapdisk> {
        let spawned = self.ctl("spawn").await;
        self.newest().filter(|newest| spawned.status == 0 && newest.is_alive())
    }

    /// Every tapdisk dies.
    pub(super) fn kill_all(&self) {
        self.started.borrow().iter().for_each(|tapdisk| tapdisk.host.process.node().kill());
    }

    /// Gives back the minor numbers that no disk has: whoever had them died.
    pub(super) async fn clean_up(&self, kept: &[u16]) {
        for _ in 0..TRIES {
            let number = |name: &String| name.strip_prefix("tapdisk-")?.parse().ok();
            let mut left: Vec<u16> = self.names().await.1.iter().filter_map(number).collect();
            left.retain(|minor| !kept.contains(minor));
            if left.is_empty() {
                return;
            }
            for minor in left {
                // Until the files of a dead process are closed.
                if self.ctl(&format!("free -m {minor}")).await.status != 0 {
                    self.world.sim.sleep_ns(10_000_000).await;
                }
            }
        }
        self.world.fail(Invariant::K1, "minor numbers of dead tapdisks cannot be given back");
    }

    /// The machine lost its power, and with it what was on its tmpfs.
    pub(super) async fn forget(&self) {
        let host = self.host();
        for name in self.names().await.1 {
            let _gone = host.remove(&format!("{FOLDER}/tapdisk/{name}")).await;
        }
    }

    fn host(&self) -> SimHost {
        let key = self.calls.replace(self.calls.get() + 1);
        SimHost::start(&self.world.kernel, &self.world.xen, "tap-ctl", key)
    }

    /// Runs tap-ctl to its end.
    pub(super) async fn ctl(&self, line: &str) -> Outcome {
        self.run(&self.host(), line).await
    }

    async fn run(&self, host: &SimHost, line: &str) -> Outcome {
        let cli = Cli::try_parse_from(std::iter::once("tap-ctl").chain(line.split_whitespace()));
        let cli = cli.unwrap_or_else(|e| panic!("tap-ctl {line}: {e}"));
        let said = Printed::default();
        self.world.sim.remark("administrator", || format!("tap-ctl {line}"));
        let status = run(host, cli, self, &said).await;
        let (out, err) = (said.out.take(), said.err.take().join("; "));
        self.world.sim.remark("administrator", || format!("tap-ctl {line}: {status} {out:?} {err}"));
        Outcome { status, out, err }
    }

    /// Runs tap-ctl, and kills it after `steps` of its effects: who asked has no answer.
    pub(super) async fn give_up(self: &Rc<Self>, line: &str, steps: u64) {
        let host = self.host();
        let (own, h, line) = (Rc::clone(self), host.clone(), line.to_owned());
        let node = host.process.node();
        node.kill_after_steps(steps);
        let (task, done) = tap_core::wait::joined(async move {
            own.run(&h, &line).await;
        });
        node.spawn("main", 0, task);
        select(node.dead(), done).await;
        node.kill();
        node.dead().await;
    }

    /// Runs tap-ctl about `tapdisk`, and reports if it does not end with `status`. `None` if `tapdisk` has died.
    pub(super) async fn expect(&self, tapdisk: &Tapdisk, line: &str, status: i32) -> Option<Outcome> {
        let outcome = self.ctl(line).await;
        if !tapdisk.is_alive() {
            return None;
        }
        if i32::from(outcome.status) != status {
            let text = format!("tap-ctl {line} ended with status {}, not {status}", outcome.status);
            self.world.fail(Invariant::U1, format!("{text}: {}", outcome.err));
        }
        Some(outcome)
    }

    /// Whether tap-ctl ended with the news that data may be lost, which this world allows: what a file system had given
    /// up was told to a tapdisk that was killed.
    pub(super) fn may_have_lost(&self, outcome: &Outcome) -> bool {
        i32::from(outcome.status) == Errno::EIO.0 && self.world.errors_allowed()
    }

    /// The same until it is done: the last operations of a process that was killed may still have its files.
    pub(super) async fn persist(&self, tapdisk: &Tapdisk, line: &str) -> Option<Outcome> {
        for _ in 0..TRIES {
            let outcome = self.ctl(line).await;
            if !tapdisk.is_alive() {
                return None;
            }
            match i32::from(outcome.status) {
                0 => return Some(outcome),
                status if [Errno::EAGAIN.0, Errno::EBUSY.0].contains(&status) || self.passes(status) => {
                    self.world.sim.sleep_ns(10_000_000).await;
                }
                _ => break,
            }
        }
        self.expect(tapdisk, line, 0).await
    }

    /// Waits for the last operations of a process that was killed with the file at `path` open.
    pub(super) async fn nobody_has(&self, path: &str) {
        for _ in 0..TRIES {
            if self.world.storage.locks(path).is_empty() {
                return;
            }
            self.world.sim.sleep_ns(10_000_000).await;
        }
        self.world.fail(Invariant::K1, format!("{path} stays locked by a process that was killed"));
    }

    /// Writes a new file, as cp does.
    pub(super) async fn write_file(&self, path: &str, bytes: &[u8]) {
        let host = self.host();
        let Ok(file) = host.open(path, OpenMode::CREATE).await else {
            return self.world.fail(Invariant::U1, format!("{path} cannot be made"));
        };
        let mut at = 0;
        while at < bytes.len() {
            let part = &bytes[at..bytes.len().min(at + (64 << 10))];
            let buf = IoBuf::copy_of(part).expect("there is memory for a copy");
            match file.write_at(at as u64, [buf].into_iter().collect()).await.0 {
                Ok(written) => at += written,
                Err(error) => return self.world.fail(Invariant::U1, format!("writing {path}: {error}")),
            }
        }
        drop(file);
        host.closed().await;
    }

    /// Whether a call may end so although the next one does not: a folder could not be synchronised.
    pub(super) fn passes(&self, status: i32) -> bool {
        self.part == Part::Snapshots && status == Errno::EIO.0
    }

    /// Makes `to` a copy of what `from` shows, by tap-img.
    pub(super) async fn convert(&self, from: &ImageSpec, to: &ImageSpec) -> bool {
        let (source, format) = (named(from), to.format.name());
        let line = format!("tap-img convert -q --backing probe -O {format} {source} {}", to.path);
        self.img(&line).await
    }

    /// Makes an image at `top` above `base`, of the same format, by tap-img.
    pub(super) async fn overlay(&self, base: &ImageSpec, top: &str) -> bool {
        let format = base.format.name();
        self.img(&format!("tap-img create -q -f {format} -b {} -F {format} {top}", base.path)).await
    }

    /// Makes the disk of an image that nobody has open larger, by tap-img.
    pub(super) async fn enlarge(&self, image: &ImageSpec, size_bytes: u64) -> bool {
        self.nobody_has(&image.path).await;
        self.img(&format!("tap-img resize -q {} {size_bytes}", named(image))).await
    }

    async fn img(&self, line: &str) -> bool {
        let cli = img::Cli::try_parse_from(line.split_whitespace());
        let cli = cli.unwrap_or_else(|e| panic!("{line}: {e}"));
        let said = Printed::default();
        let host = self.host();
        let status = img::run(host.clone(), cli, &said).await;
        // A process that has ended has no files.
        host.closed().await;
        if status != 0 && self.part == Part::Control {
            let text = format!("{line} ended with status {status}: {}", said.err.take().join("; "));
            self.world.fail(Invariant::I1, text);
        }
        status == 0
    }

    /// The names of sockets, and the minor numbers that are taken.
    pub(super) async fn names(&self) -> (Vec<String>, Vec<String>) {
        let host = self.host();
        let sockets = host.names_in(FOLDER).await.unwrap_or_default();
        (sockets, host.names_in(&format!("{FOLDER}/tapdisk")).await.unwrap_or_default())
    }
}

/// Options of tapdisk that name the backing files in a format that cannot be recognised; none, if they are not named.
fn bases(world: &World, kind: Kind) -> String {
    if !world.setting("bases-named", &[true, true, false]) {
        return String::new();
    }
    let plain = if kind.model.has_metadata() { "base{}.raw" } else { "disk{}.img" };
    (0..2).map(|n| format!("--backing raw:/images/{} ", plain.replace("{}", &n.to_string()))).collect()
}

/// An image as tap-ctl opens it.
pub(super) fn image(spec: &ImageSpec, limits: &StackLimits) -> String {
    format!("-a {}{}", named(spec), if limits.direct { "" } else { " -D" })
}

/// The files of a disk that nobody has open: they are not locked, and completely durable, unless what was lost was
/// said.
pub(super) fn check_let_go(world: &World, setup: &Setup, when: &str) {
    for path in setup.files() {
        let mut locks = world.storage.locks(path);
        if world.stats().crashes > 0 && *path != setup.spec.path {
            // The last operations of a killed tapdisk may still read it.
            locks.retain(|lock| *lock != LockKind::Shared);
        }
        // A descriptor that a killed tapdisk had not locked yet may take its time.
        let closing = world.storage.is_closing(path) && world.stats().crashes == 0;
        if !locks.is_empty() || closing {
            world.fail(Invariant::D1, format!("{when}, {path} is open, with the locks {locks:?}"));
        }
    }
    let dirty = |inode: &kernel_model::Inode| !inode.pending.is_empty() || !inode.pending_sizes.is_empty();
    if world.storage.with_inode(&setup.spec.path, dirty) == Some(true) && !world.errors_allowed() {
        world.fail(Invariant::D1, format!("{when}, {} is not durable", setup.spec.path));
    }
}
