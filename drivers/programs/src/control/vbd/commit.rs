//! A merge of an image into its backing file, below a disk in use.
//!
//! ```text
//!   disk ─► top ─► … ─► image ─► base ─► …          disk ─► top ─► … ─► image (was base) ─► …
//!                         └─ job ─►┘
//! ```
//!
//! # Contract
//!
//! * Who uses the disk notices two delays, never an error: it is paused for as long as it takes to open its chain anew,
//!   before with a base that can be written to, afterwards without the image that was merged. In between the job moves
//!   what the image holds itself, a piece at a time.
//! * The image keeps its name, by which the one above it knows it; see [`Merge`] for what a crash leaves.
//! * Whatever takes the chain away (a pause, a close) ends the job first. A merge that was ended can be begun again.
//! * The image that the disk writes to is not merged: take a snapshot before.

use super::{ControlledHost, Open, Stage, Vbd, refused};
use crate::control::open::spec_of;
use crate::control::settings::Settings;
use crate::disk::{DiskOptions, open_node};
use crate::merge::{Merge, is_own};
use crate::spec::DiskSpec;
use smallvec::smallvec;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tap_control::Refusal;
use tap_control::json::{self, Happened, JobState};
use tap_core::wait::Event as Flag;
use tap_core::{Lease, Node, Request, Scheduler, nodes};
use tap_host::{Either, Errno, SECTOR_BYTES, SectorRange, Stage as Memory, select};
use tap_images::{Backing, BackingPolicy, Formats, ImageError, ImageFormat, ImageSpec, MAX_CHAIN, same_path};

tap_host::listed! {
    pub(super) BUGS: Bug;
    COMMIT_UNFLUSHED = "commit-unflushed", "a merge below a disk in use is completed before the base is durable";
    COMMIT_SKIPS = "commit-skips", "a merge below a disk in use leaves the last sector of each piece out";
    COMMIT_KEEPS_CHAIN = "commit-keeps-chain", "after a merge the disk goes on with the image that was merged";
    COMMIT_OUTLIVES = "commit-outlives", "a disk is paused while a merge below it still writes";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    COMMIT_DONE = "commit-done", "an image below a disk in use was merged into its base";
    COMMIT_ENDED = "commit-ended", "a merge below a disk in use was ended by whoever took the chain away";
}

/// Most sectors that are moved at once.
const PIECE_SECTORS: u64 = 512;
/// Extents per query.
const MAX_EXTENTS: usize = 64;

/// What is to be merged.
pub(in crate::control) struct Asked {
    /// The image, `TYPE:PATH`.
    pub(in crate::control) image: String,
    /// Its backing file, which must be this one.
    pub(in crate::control) base: String,
    /// At most so many bytes per second.
    pub(in crate::control) rate: Option<u64>,
}

/// A merge.
pub(super) struct Job {
    /// The images, as TYPE:PATH.
    image: String,
    base: String,
    rate: Option<u64>,
    done_bytes: Cell<u64>,
    total_bytes: u64,
    state: RefCell<Result<JobState, Refusal>>,
    stop: Flag,
    ended: Flag,
}

/// What a job works with.
struct Work<H: ControlledHost> {
    settings: Rc<Settings<H>>,
    vbd: Rc<Vbd<H>>,
    open: Rc<Open<H>>,
    merge: Merge,
    image: Rc<dyn Node>,
    /// The same, with what repeats requests.
    reader: Scheduler<H>,
    base: Base,
    memory: Memory,
}

/// The base, open for writing.
struct Base {
    /// Without what orders requests, to freeze it.
    file: Rc<dyn Node>,
    lease: Rc<Lease>,
}

/// The job was told to end.
struct Stopped;

impl Job {
    fn new((image, base): (String, String), total_bytes: u64, rate: Option<u64>) -> Self {
        let (done_bytes, state) = (Cell::new(0), RefCell::new(Ok(JobState::Running)));
        Self { image, base, rate, done_bytes, total_bytes, state, stop: Flag::new(), ended: Flag::new() }
    }

    fn told(&self, minor: u16) -> json::Job {
        let state = self.state.borrow();
        json::Job {
            minor,
            image: self.image.clone(),
            base: self.base.clone(),
            state: state.as_ref().map_or(JobState::Failed, |state| *state),
            done_bytes: self.done_bytes.get(),
            total_bytes: self.total_bytes,
            error: state.as_ref().err().cloned().map(Into::into),
        }
    }

    fn runs(&self) -> bool {
        matches!(*self.state.borrow(), Ok(JobState::Running))
    }
}

fn name_of(image: &ImageSpec) -> String {
    match image.format {
        ImageFormat::As(format) => format!("{format}:{}", image.path),
        ImageFormat::Probe => image.path.clone(),
    }
}

impl<H: ControlledHost> Vbd<H> {
    /// Begins a merge below the disk, and answers once it is under way.
    pub(in crate::control) async fn commit(
        self: &Rc<Self>,
        settings: &Rc<Settings<H>>,
        asked: &Asked,
    ) -> Result<json::Job, Refusal> {
        let what = format!("merge an image below minor {}", self.minor);
        let open = self.opened(&what)?;
        let refuse = |error, words: &str| Err(Refusal::new(error, format!("{what}: {words}")));
        if open.stage.get() != Stage::Running {
            return refuse(Errno::EINVAL, "it is paused; resume it first");
        }
        if open.disk.slot().info().read_only {
            return refuse(Errno::EROFS, "it is read-only");
        }
        if self.merges() {
            return refuse(Errno::EALREADY, "one is being merged; tap-ctl query shows it");
        }
        let DiskSpec::Image(image) = spec_of(&asked.image, &what)? else {
            return refuse(Errno::EINVAL, &format!("{} is no file", asked.image));
        };
        let name = open.name.borrow().clone();
        let host = &open.files;
        let DiskSpec::Image(top) = spec_of(&name, &what)? else {
            return refuse(Errno::EOPNOTSUPP, &format!("{name} is no file"));
        };
        let below = below(host, &top, &open.options.backing)
            .await
            .map_err(|error| Refusal::new(error.errno(), error.to_string()))?;
        if same_path(&top.path, &image.path) {
            return refuse(Errno::EBUSY, "the disk writes to it; take a snapshot, and merge what is below");
        }
        let Some(image_bytes) = below.iter().find(|(path, _)| same_path(path, &image.path)) else {
            return refuse(Errno::ENOENT, &format!("{} is not below the disk", image.path));
        };
        let image_bytes = image_bytes.1;
        let plan = Merge::plan(host, &image, Some(&asked.base), &open.options.backing, true).await;
        let Some(merge) = plan? else {
            let base = name_of(&ImageSpec { path: asked.base.clone(), ..image.clone() });
            let job = Job::new((name_of(&image), base), image_bytes, None);
            job.done_bytes.set(image_bytes);
            *job.state.borrow_mut() = Ok(JobState::Done);
            let told = job.told(self.minor);
            *self.job.borrow_mut() = Some(Rc::new(job));
            return Ok(told);
        };
        self.begin(settings, &open, (merge, image_bytes), asked.rate).await
    }

    /// Opens the chain anew, with a base that can be written to, and starts the job.
    async fn begin(
        self: &Rc<Self>,
        settings: &Rc<Settings<H>>,
        open: &Rc<Open<H>>,
        (mut merge, image_bytes): (Merge, u64),
        rate: Option<u64>,
    ) -> Result<json::Job, Refusal> {
        let what = format!("merge {} below minor {}", merge.image.path, self.minor);
        let name = open.name.borrow().clone();
        let memory = settings.memory.stage((PIECE_SECTORS * SECTOR_BYTES) as usize);
        let memory = memory.map_err(|error| Refusal::new(error, format!("{what}: its memory: {error}")))?;
        self.pause(settings).await?;
        let base = match self.open_base(settings, open, &mut merge, image_bytes).await {
            Ok(base) => base,
            Err(why) => {
                self.go_on(settings, open, &name).await?;
                return Err(why);
            }
        };
        let (path, lease) = (merge.base.path.clone(), Rc::clone(&base.lease));
        let usual = open.options.backing.clone();
        let gate = move |asked: &str| match same_path(asked, &path) {
            true => Some(Backing::Open(Rc::new(lease.share()))),
            false => usual.allowed(asked),
        };
        let options = DiskOptions { backing: BackingPolicy::Ask(Rc::new(gate)), ..open.options.clone() };
        if let Err(why) = self.resume_with(settings, open, &name, &what, &options).await {
            // Nothing was written to it.
            let _nothing_lost = base.lease.close().await;
            let why = merge.give_up(&open.files, why).await;
            self.go_on(settings, open, &name).await?;
            return Err(why);
        }
        let Some(image) = node_of(open, &merge.image.path) else {
            // Open to readers, and without a mark: nothing was written to it.
            let frozen = base.file.freeze().await;
            let _nothing_lost = base.lease.close().await;
            let words = format!("{what}: it is not below the disk any more");
            let why = merge.give_up(&open.files, Refusal::new(Errno::ESTALE, words)).await;
            return Err(match frozen {
                Ok(()) => why,
                Err(error) => {
                    Refusal::new(why.error, format!("{}; its base stays locked: {error}", why.words))
                }
            });
        };
        let names = (name_of(&merge.image), name_of(&merge.base));
        let job = Rc::new(Job::new(names, image_bytes, rate));
        *self.job.borrow_mut() = Some(Rc::clone(&job));
        let (settings, vbd, open) = (Rc::clone(settings), Rc::clone(self), Rc::clone(open));
        let host = open.files.clone();
        let reader = Scheduler::new(host.clone(), Rc::clone(&image), settings.tuning.scheduler);
        let work = Work { settings, vbd, open, merge, image, reader, base, memory };
        let own = Rc::clone(&job);
        host.spawn("commit", u64::from(self.minor), async move { work.run(&own).await });
        Ok(job.told(self.minor))
    }

    /// The base, for writing, and marked.
    async fn open_base(
        &self,
        settings: &Settings<H>,
        open: &Open<H>,
        merge: &mut Merge,
        image_bytes: u64,
    ) -> Result<Base, Refusal> {
        let (host, spec) = (&open.files, DiskSpec::Image(merge.base.clone()));
        let options = DiskOptions { write: true, ..open.options.clone() };
        let node = open_node(host, Formats::shipped(), &spec, &options).await;
        let node = node.map_err(|error| refused(&error))?;
        let base_bytes = node.info().size_sectors * SECTOR_BYTES;
        if let Err(why) = merge.begin(host, image_bytes, base_bytes).await {
            let _nothing_lost = node.close().await;
            return Err(why);
        }
        let scheduler = Scheduler::new(host.clone(), Rc::clone(&node), settings.tuning.scheduler);
        Ok(Base { file: node, lease: Rc::new(Lease::new(Rc::new(scheduler))) })
    }

    /// Tells the job to end, if there is one, and waits for that.
    pub(super) async fn end_job(&self, settings: &Settings<H>) {
        let job = self.job.borrow().clone();
        let Some(job) = job.filter(|job| job.runs() && !settings.host.bug(&COMMIT_OUTLIVES)) else { return };
        job.stop.set();
        job.ended.wait().await;
    }

    /// Whether images below the disk are being merged.
    pub(super) fn merges(&self) -> bool {
        self.job.borrow().as_ref().is_some_and(|job| job.runs())
    }

    /// The last merge below the disk.
    pub(in crate::control) fn query(&self) -> Result<json::Job, Refusal> {
        let job = self.job.borrow();
        let words = || format!("query the merge below minor {}: there was none", self.minor);
        job.as_ref().map(|job| job.told(self.minor)).ok_or_else(|| Refusal::new(Errno::ENOENT, words()))
    }

    /// Ends the merge below the disk, and answers once that is done.
    pub(in crate::control) async fn cancel(&self, settings: &Settings<H>) -> Result<json::Job, Refusal> {
        let none = |why: Refusal| Refusal::new(why.error, why.words.replacen("query", "end", 1));
        self.query().map_err(none)?;
        self.end_job(settings).await;
        self.query()
    }
}

impl<H: ControlledHost> Work<H> {
    async fn run(self, job: &Rc<Job>) {
        let settings = Rc::clone(&self.settings);
        let host = &settings.host;
        let outcome = self.carry_out(job).await;
        match &outcome {
            Ok(JobState::Done) => host.mark(&COMMIT_DONE),
            Ok(_) => host.mark(&COMMIT_ENDED),
            Err(why) => settings.console.err(&format!("tapdisk: failed to {}", why.words)),
        }
        *job.state.borrow_mut() = outcome;
        job.ended.set();
    }

    async fn carry_out(self, job: &Job) -> Result<JobState, Refusal> {
        let moved = self.move_all(job).await;
        let Self { settings, vbd, open, merge, image, reader, base, memory } = self;
        let failed = |error: Errno, why: &str| merge.failed(error, why);
        drop((image, reader, memory));
        // Durable, and open to readers again. The chain has a lease of its own.
        let frozen = match settings.host.bug(&COMMIT_UNFLUSHED) {
            true => Ok(()),
            false => base.file.freeze().await,
        };
        let closed = base.lease.close().await;
        drop(base);
        match moved {
            Ok(Ok(())) => {}
            Ok(Err(Stopped)) => return Ok(JobState::Ended),
            Err(error) => return Err(failed(error, &error.to_string())),
        }
        let path = &merge.base.path;
        frozen.and(closed).map_err(|error| failed(error, &format!("flush {path}: {error}")))?;
        let turn = match select(job.stop.wait(), vbd.turn.acquire()).await {
            Either::First(()) => return Ok(JobState::Ended),
            Either::Second(turn) => turn,
        };
        let same = vbd.open.borrow().as_ref().is_some_and(|now| Rc::ptr_eq(now, &open));
        if !same || open.stage.get() != Stage::Running {
            return Ok(JobState::Ended);
        }
        let completed = vbd.complete(&settings, &open, &merge).await;
        drop(turn);
        completed.map(|()| JobState::Done)
    }

    /// Writes everything that the image holds itself to the base.
    async fn move_all(&self, job: &Job) -> Result<Result<(), Stopped>, Errno> {
        let own = self.image.name();
        let size_sectors = job.total_bytes / SECTOR_BYTES;
        let mut at = 0;
        while at < size_sectors {
            let range = SectorRange::new(at, (size_sectors - at).min(u64::from(u32::MAX)) as u32);
            let extents = self.image.extents(range, MAX_EXTENTS).await?;
            if extents.is_empty() {
                return Err(Errno::EIO);
            }
            for extent in extents {
                let end = at + extent.count;
                let mut from = at;
                while is_own(&extent.source, own.as_ref())? && from < end {
                    if job.stop.is_set() {
                        return Ok(Err(Stopped));
                    }
                    let count = (end - from).min(PIECE_SECTORS);
                    let left_out = u64::from(count > 1 && self.settings.host.bug(&COMMIT_SKIPS));
                    self.move_piece(from, count - left_out).await?;
                    from += count;
                    job.done_bytes.set(from * SECTOR_BYTES);
                    self.pace(job, count).await;
                }
                at = end;
                job.done_bytes.set(at * SECTOR_BYTES);
            }
        }
        Ok(Ok(()))
    }

    async fn move_piece(&self, start: u64, count: u64) -> Result<(), Errno> {
        let range = SectorRange::new(start, count as u32);
        let buf = self.memory.buffer(range.len_bytes() as usize).await?;
        let read = self.reader.submit(Request::read(range, smallvec![buf])).await;
        read.result?;
        self.base.lease.submit(Request::write(range, read.bufs)).await.result
    }

    /// Waits for as long as a piece takes at the rate that was asked for, or until the job is told to end.
    async fn pace(&self, job: &Job, sectors: u64) {
        let Some(rate) = job.rate.filter(|rate| *rate > 0) else { return };
        let pause_ns = (u128::from(sectors * SECTOR_BYTES) * 1_000_000_000 / u128::from(rate)) as u64;
        select(job.stop.wait(), self.settings.host.sleep_ns(pause_ns)).await;
    }
}

impl<H: ControlledHost> Vbd<H> {
    /// The base, which is durable, gets the image's name, and the disk goes on without the image.
    async fn complete(&self, settings: &Settings<H>, open: &Open<H>, merge: &Merge) -> Result<(), Refusal> {
        let failed = |why: &Refusal| merge.failed(why.error, &why.words);
        let name = open.name.borrow().clone();
        self.park_for(settings, open).await.map_err(|why| failed(&why))?;
        let merged = match settings.host.bug(&COMMIT_KEEPS_CHAIN) {
            true => Ok(()),
            false => merge.complete(&open.files).await,
        };
        match self.go_on(settings, open, &name).await {
            Ok(()) => merged,
            Err(why) => Err(match merged {
                Ok(()) => Refusal::new(why.error, format!("{}; the images are merged", why.words)),
                Err(first) => Refusal::new(first.error, format!("{}; {}", first.words, why.words)),
            }),
        }
    }
}

impl<H: ControlledHost> Vbd<H> {
    /// The disk, which is paused, goes on with its chain as it is now.
    pub(super) async fn go_on(
        &self,
        settings: &Settings<H>,
        open: &Open<H>,
        name: &str,
    ) -> Result<(), Refusal> {
        let what = format!("resume minor {}", self.minor);
        let Err(why) = self.resume_with(settings, open, name, &what, &open.options).await else {
            return Ok(());
        };
        open.stage.set(Stage::Stranded);
        self.tell(settings, Happened::Stranded);
        Err(Refusal::new(why.error, format!("{}; it stays paused", why.words)))
    }
}

/// The paths of the images below `top` as their headers name them, and the bytes of their disks. A node keeps the name
/// that its file had when it was opened.
pub(super) async fn below<H: ControlledHost>(
    host: &H,
    top: &ImageSpec,
    policy: &BackingPolicy,
) -> Result<Vec<(String, u64)>, ImageError> {
    let mut found: Vec<(String, u64)> = Vec::new();
    let mut about = Formats::shipped().describe(host, top, true).await?;
    while found.len() < MAX_CHAIN
        && let Some(path) = about.backing_path
    {
        // A guest may have written what looks like an image, with the name of any file.
        let Some(Backing::File(format) | Backing::Any(format)) = policy.allowed(&path) else { break };
        let spec = ImageSpec { format, path };
        about = Formats::shipped().describe(host, &spec, true).await?;
        found.push((spec.path, about.disk_bytes));
    }
    Ok(found)
}

/// The image at `path` in the chain of the disk.
fn node_of<H: ControlledHost>(open: &Open<H>, path: &str) -> Option<Rc<dyn Node>> {
    let all = nodes(open.disk.node()).into_iter().map(|(_, node)| node);
    let mut named = all.filter(|node| node.name().is_some_and(|name| same_path(name.as_str(), path)));
    named.next()
}
