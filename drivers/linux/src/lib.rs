//! The real host: the seam on Linux.
//!
//! ```text
//!   run(options, |host| program)
//!     └─ one thread: tokio current_thread + LocalSet
//!          ├─ tasks of the program, first come, first served
//!          ├─ files/     in place, io_uring or threads
//!          ├─ sockets/   unix and TCP streams
//!          ├─ nbd/       block devices of the kernel's nbd driver
//!          ├─ xen/       grants, event channels, pages that outlive the process
//!          ├─ xenstore/  a client of xenstored
//!          ├─ tap/       devices of the kernel's blktap2 module
//!          └─ log, signals, time
//! ```
//!
//! Before that, [`divide`] may leave the caller's process, and [`PidFile`] says which one it is.
//!
//! The only crate with system calls and with `unsafe`; every `unsafe` says why it is sound. Nothing of the simulator is
//! in its dependencies.
//!
//! # Contract
//!
//! * [`run`] builds everything, runs the program to its end, drops the remaining tasks, and waits for file operations
//!   in flight: the kernel may be writing to our memory.
//! * A task that panics ends the program with its panic. Continuing without it would silently lose a request.
//! * A host belongs to the thread that runs it.

mod background;
mod clock;
mod descriptors;
mod files;
mod lines;
mod log;
mod names;
mod nbd;
mod options;
mod pid_file;
mod priority;
mod signals;
mod sockets;
mod spin;
mod tap;
mod watch;
mod xen;
mod xenstore;

pub use background::{DivideError, Divided, Starting, divide};
pub use descriptors::keep_descriptors;
pub use files::{AioEngine, LinuxFile};
pub use lines::Lines;
pub use log::LogTo;
pub use names::resolve_without_plugins;
pub use nbd::LinuxClaim;
pub use options::{Options, POLL_DEFAULT, StartError};
pub use pid_file::{PidFile, PidFileError};
pub use priority::{set_io_priority, writes_for_the_kernel};
pub use sockets::{LinuxListener, LinuxStream, remove_dead_sockets};
pub use tap::{LinuxTap, TapPage};
pub use tap_host::Level;
pub use xen::{LinuxChannel, LinuxPage, Rings, XenError, XenOptions};
pub use xenstore::{StoreClient, StoreOpenError, StorePlaces, StoreTransaction, StoreWatcher};

use clock::Clock;
use files::{Closing, Engine, Group};
use log::Logger;
use signals::Stop;
use std::any::Any;
use std::cell::{Cell, OnceCell, RefCell};
use std::fmt;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;
use tap_host::{Entropy, Errno, Event, Log, Probe, Tasks};
use tokio::task::{LocalSet, spawn_local};
use xen::{Regions, Xen};

/// The host that a program runs on; clones share it.
#[derive(Clone)]
pub struct LinuxHost(Rc<Inner>, Group);

struct Inner {
    engine: Rc<Engine>,
    /// For what has a priority that io_uring cannot give it.
    threads: OnceCell<Rc<Engine>>,
    /// How many groups of files there were.
    groups: Cell<u64>,
    closing: Rc<Closing>,
    clock: Clock,
    logger: Logger,
    stop: Stop,
    panicked: RefCell<Panicked>,
    inherited: Cell<bool>,
    no_locks: Cell<bool>,
    xen: OnceCell<Xen>,
    run_folder: Option<PathBuf>,
    /// Set once there is a folder for them.
    regions: OnceCell<Regions>,
}

/// The panic of a task, which [`run`] resumes.
#[derive(Default)]
struct Panicked {
    payload: Option<Box<dyn Any + Send>>,
    root: Option<Waker>,
}

impl LinuxHost {
    fn engine(&self) -> &Rc<Engine> {
        &self.0.engine
    }

    /// An engine that gives every operation the priority of its file, once a file has one.
    fn threads(&self) -> Option<&Rc<Engine>> {
        self.0.threads.get()
    }

    /// Makes that engine.
    fn need_threads(&self) -> Result<(), Errno> {
        if self.0.threads.get().is_some() {
            return Ok(());
        }
        let engine = match self.aio() {
            AioEngine::Threads => Rc::clone(self.engine()),
            _ => {
                let engine = Rc::new(Engine::new(AioEngine::Threads)?.0);
                self.spawn("files", 1, files::driver(Rc::clone(&engine))?);
                engine
            }
        };
        self.0.threads.get_or_init(|| engine);
        Ok(())
    }

    fn next_group(&self) -> u64 {
        self.0.groups.set(self.0.groups.get() + 1);
        self.0.groups.get()
    }

    fn closing(&self) -> &Rc<Closing> {
        &self.0.closing
    }

    /// Which engine executes file operations that may wait: never [`AioEngine::Auto`].
    pub fn aio(&self) -> AioEngine {
        self.0.engine.kind()
    }

    /// Writes one line to the log, if `level` is enabled.
    pub fn say(&self, level: Level, text: fmt::Arguments<'_>) {
        self.0.logger.line(level, text);
    }

    fn warn_no_locks(&self, error: Errno) {
        if !self.0.no_locks.replace(true) {
            let text =
                format_args!("file locks do not work here ({error}): nothing keeps a second writer out");
            self.say(Level::Warning, text);
        }
    }
}

/// How long to wait at the end for the reader of the log.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Runs a program on this thread to its end.
///
/// # Errors
/// Which part of the host could not be set up, and why.
///
/// # Panics
/// With the panic of the program or of any of its tasks.
pub fn run<R, F>(options: &Options, program: impl FnOnce(LinuxHost) -> F) -> Result<R, StartError>
where
    R: 'static,
    F: Future<Output = R> + 'static,
{
    spin::set(options.poll);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .on_thread_park(spin::before_park)
        .on_thread_unpark(spin::after_park)
        .build();
    let runtime = runtime.map_err(|e| StartError::Runtime(files::errno(&e)))?;
    let (engine, refused) =
        Engine::new(options.aio).map_err(|e| StartError::Aio { aio: options.aio, error: e })?;
    let inner = Rc::new(Inner {
        engine: Rc::new(engine),
        threads: OnceCell::new(),
        groups: Cell::new(0),
        closing: Rc::default(),
        clock: Clock::new(),
        logger: Logger::new(options.log_level, options.log_to),
        stop: Stop::default(),
        panicked: RefCell::default(),
        inherited: Cell::new(false),
        no_locks: Cell::new(false),
        xen: OnceCell::new(),
        run_folder: options.run_folder.clone(),
        regions: OnceCell::new(),
    });
    let host = LinuxHost(inner, Group::default());
    if let Some(error) = refused {
        let text = format_args!("the kernel refuses io_uring ({error}): file operations go through threads");
        // No reason to worry: a tool that only warns does not mention it.
        host.say(Level::Info, text);
    }
    let local = LocalSet::new();
    let result = runtime.block_on(local.run_until(host.clone().root(options, program)));
    // Tasks are dropped first, while the runtime that owns their sockets and timers still exists.
    let entered = runtime.enter();
    drop(local);
    drop(host);
    drop(entered);
    // Give a reader that still reads the time to receive the last lines.
    Lines::stderr().finish(LAST_LINES);
    result
}

impl LinuxHost {
    async fn root<R: 'static, F: Future<Output = R> + 'static>(
        self,
        options: &Options,
        program: impl FnOnce(LinuxHost) -> F,
    ) -> Result<R, StartError> {
        if let Some(options) = &options.xen {
            let xen = Xen::open(&self, options).await?;
            self.0.xen.get_or_init(|| xen);
        }
        let driver = files::driver(Rc::clone(self.engine())).map_err(StartError::Runtime)?;
        self.spawn("files", 0, driver);
        let result = Rc::new(RefCell::new(None));
        let (main, keep) = (program(self.clone()), Rc::clone(&result));
        let host = self.clone();
        // A task like the others: a root future would be polled for every wake-up of any task.
        self.spawn("main", 0, async move {
            *keep.borrow_mut() = Some(main.await);
            host.wake_root();
        });
        poll_fn(|cx| {
            let mut panicked = self.0.panicked.borrow_mut();
            if let Some(payload) = panicked.payload.take() {
                drop(panicked);
                resume_unwind(payload);
            }
            panicked.root = Some(cx.waker().clone());
            result.borrow_mut().take().map_or(Poll::Pending, |r| Poll::Ready(Ok(r)))
        })
        .await
    }

    fn wake_root(&self) {
        let root = self.0.panicked.borrow_mut().root.take();
        if let Some(root) = root {
            root.wake();
        }
    }
}

/// A task whose panic reaches [`run`].
///
/// It is boxed here, once: tokio moves what it is given five times before and after it runs, and aligns it to 128
/// bytes, which costs the allocator as much again.
fn watched(task: impl Future<Output = ()> + 'static, host: LinuxHost) -> impl Future<Output = ()> {
    let mut task = Box::pin(task);
    poll_fn(move |cx| {
        catch_unwind(AssertUnwindSafe(|| task.as_mut().poll(cx))).unwrap_or_else(|payload| {
            host.0.panicked.borrow_mut().payload = Some(payload);
            host.wake_root();
            Poll::Ready(())
        })
    })
}

impl Tasks for LinuxHost {
    fn spawn(&self, _role: &'static str, _key: u64, task: impl Future<Output = ()> + 'static) {
        // Tasks of the seam are not joined.
        drop(spawn_local(watched(task, self.clone())));
    }

    fn yield_now(&self) -> impl Future<Output = ()> + 'static {
        // A task that wakes itself goes to the end of the queue, after all that are ready. tokio's own yield_now asks
        // the kernel for events first, which costs a system call each time.
        let mut yielded = false;
        poll_fn(move |cx| {
            if yielded {
                return Poll::Ready(());
            }
            yielded = true;
            cx.waker().wake_by_ref();
            Poll::Pending
        })
    }
}

impl Log for LinuxHost {
    fn log(&self, event: Event) {
        self.0.logger.event(event);
    }
}

impl Entropy for LinuxHost {
    fn fill(&self, buf: &mut [u8]) {
        let mut at = 0;
        while at < buf.len() {
            match rustix::rand::getrandom(&mut buf[at..], rustix::rand::GetRandomFlags::empty()) {
                Ok(count) => at += count,
                Err(rustix::io::Errno::INTR) => {}
                // Fails only on kernels before Linux 3.17; identifiers must not be guessable.
                Err(error) => panic!("the kernel gives no random bytes: {error}"),
            }
        }
    }
}

impl Probe for LinuxHost {}
