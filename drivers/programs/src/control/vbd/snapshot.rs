//! A snapshot of a disk in use: its image stops changing, and a new one above it takes the writes.
//!
//! ```text
//!   before            keep its content as B            a new image N
//!   disk ─► A         disk ─► A (new) ─► B             disk ─► N (new) ─► A
//! ```
//!
//! # Contract
//!
//! * Who uses the disk notices a delay, never an error. What was answered before is in the image below, which no longer
//!   changes and which others may read from then on.
//! * **A crash at any moment leaves the old chain or the new one**, and A always names the disk. The new image is
//!   complete and durable before anything refers to it. To keep the name, the two files exchange theirs in one step,
//!   once the old image has nothing left to be made durable, and that is durable before the new one gets its first
//!   write: until then both chains show the same.
//! * A snapshot that fails leaves the disk running with its image, under its name, and removes the new file. The image
//!   has its name back before it gets its next write: whoever found the new one after a crash would not flush it.
//! * Nothing is made that could not be opened again: the backing file must be one that the process may open.

use super::{ControlledHost, Open, Stage, Vbd, file_of};
use crate::control::open::{check_name, spec_of};
use crate::control::settings::Settings;
use crate::disk::{DiskOptions, OpenError, open_node};
use crate::merge::check_named;
use crate::spec::DiskSpec;
use std::cell::Cell;
use std::future::pending;
use std::rc::Rc;
use tap_control::Refusal;
use tap_control::json::{Happened, Taken};
use tap_core::{ExchangeError, Lease, Node, Request};
use tap_host::{Errno, File, OpenMode, SECTOR_BYTES, unless};
use tap_images::{
    Backing, BackingPolicy, Format, Formats, ImageError, ImageFormat, ImageSpec, NewImage, SHIPPED, file_id,
    folder, name_beside, same_path, sync_name,
};

tap_host::listed! {
    pub(super) BUGS: Bug;
    SNAPSHOT_NAMES_FIRST = "snapshot-names-first",
        "the new image of a snapshot gets the disk's name before the old one is flushed";
    SNAPSHOT_NAME_LATER = "snapshot-name-later",
        "a disk writes to the new image of a snapshot before it is durable that this one has its name";
    SNAPSHOT_KEEPS_LOCK = "snapshot-keeps-lock", "nobody may read the image below a snapshot";
    SNAPSHOT_NOT_UNDONE = "snapshot-not-undone", "a snapshot that failed leaves the new image with the disk's name";
    SNAPSHOT_UNDOES_OTHERS = "snapshot-undoes-others",
        "a snapshot that failed takes the disk's name from a file that somebody else gave it to";
    SNAPSHOT_ANY_BASE = "snapshot-any-base", "a snapshot is taken although its chain could not be opened again";
    SNAPSHOT_ANY_FILE = "snapshot-any-file", "a snapshot gives a file the name of a disk that has another one";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    SNAPSHOT_KEPT = "snapshot-kept", "a snapshot was taken, and the disk kept its name";
    SNAPSHOT_NEW = "snapshot-new", "a snapshot was taken, and the disk got a new name";
    SNAPSHOT_UNDONE = "snapshot-undone", "a snapshot failed after the names were exchanged, and they were exchanged back";
    SNAPSHOT_HAPPENED = "snapshot-happened", "names were exchanged although the call reported an error";
}

/// How the images of a snapshot are called.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::control) enum Names {
    /// The disk keeps its name; the image so far gets this path.
    Keep(String),
    /// The disk goes on with this image (TYPE:PATH), which is made.
    New(String),
}

/// What is to be done.
struct Plan {
    /// Continues "failed to".
    what: String,
    old: ImageSpec,
    old_format: Format,
    format: Format,
    keeps_name: bool,
    /// Where the new image is made.
    made_at: String,
    /// Where it is in the end.
    top: String,
    /// Where the old one is in the end.
    base: String,
    /// What the new image calls it.
    backing: String,
    /// The new image was made.
    is_made: Cell<bool>,
    /// It may have the disk's name.
    may_have_name: Cell<bool>,
    /// It could not be taken back that it has the disk's name.
    keeps_its_name: Cell<bool>,
}

impl<H: ControlledHost> Vbd<H> {
    /// Takes a snapshot.
    pub(in crate::control) async fn snapshot(
        &self,
        settings: &Settings<H>,
        names: &Names,
    ) -> Result<Taken, Refusal> {
        let what = format!("take a snapshot of minor {}", self.minor);
        let open = self.opened(&what)?;
        if open.stage.get() != Stage::Running {
            return Err(Refusal::new(Errno::EINVAL, format!("{what}: it is paused; resume it first")));
        }
        let plan = Plan::of(&open, names, what)?;
        plan.check(&open.files, &open).await?;
        if let Err(why) = plan.take(settings, &open).await {
            return Err(plan.remove(&open.files, why).await);
        }
        let image = format!("{}:{}", plan.format, plan.top);
        settings.host.mark(if plan.keeps_name { &SNAPSHOT_KEPT } else { &SNAPSHOT_NEW });
        open.file.set(file_of(&open.files, &image).await);
        open.name.borrow_mut().clone_from(&image);
        open.listed.borrow_mut().fill(&image, &open.disk);
        self.tell(settings, Happened::Snapshot);
        Ok(Taken { image, base: format!("{}:{}", plan.old_format, plan.base) })
    }
}

impl Plan {
    fn of<H: ControlledHost>(open: &Open<H>, names: &Names, what: String) -> Result<Self, Refusal> {
        let refused = |error, words: String| Err(Refusal::new(error, format!("{what}: {words}")));
        let name = open.name.borrow();
        let DiskSpec::Image(old) = spec_of(&name, &what)? else {
            return refused(Errno::EOPNOTSUPP, format!("{name} is no file, and cannot be below an image"));
        };
        let ImageFormat::As(old_format) = old.format else {
            unreachable!("a disk is opened with its format")
        };
        if open.disk.slot().info().read_only {
            return refused(Errno::EROFS, "it is read-only, and does not change".to_owned());
        }
        let (format, made_at, top, base) = match names {
            Names::Keep(path) => (old_format, path.clone(), old.path.clone(), path.clone()),
            Names::New(name) => match spec_of(name, &what)? {
                DiskSpec::Image(ImageSpec { format: ImageFormat::As(format), path }) => {
                    (format, path.clone(), path, old.path.clone())
                }
                _ => return refused(Errno::EINVAL, format!("{name} is no file that could be made")),
            },
        };
        if !format.info().has_backing {
            let able = SHIPPED.iter().filter(|format| format.info().has_backing);
            let able: Vec<&str> = able.map(|format| format.name()).collect();
            let words = format!(
                "images of the format {format} have none below them; name a new image, such as {}:PATH",
                able.join(":PATH or ")
            );
            return refused(Errno::EOPNOTSUPP, words);
        }
        if same_path(&old.path, &made_at) {
            return refused(Errno::EEXIST, format!("{made_at} is the disk's own image"));
        }
        let keeps_name = matches!(names, Names::Keep(_));
        // What the image that is moved calls the one below it may be relative to its folder.
        if keeps_name && folder(&top) != folder(&base) {
            let words =
                format!("{base} is not in the folder of {top}, where what is below the disk is looked for");
            return refused(Errno::EINVAL, words);
        }
        let Some(backing) = name_beside(&top, &base) else {
            return refused(Errno::EINVAL, format!("name {base} by its absolute path"));
        };
        for name in [format!("{format}:{top}"), format!("{old_format}:{base}")] {
            check_name(&name, &what)?;
        }
        if folder(&made_at).len() == made_at.len() {
            return refused(Errno::EINVAL, "the new name is empty".to_owned());
        }
        Ok(Self {
            what,
            old,
            old_format,
            format,
            keeps_name,
            made_at,
            top,
            base,
            backing,
            is_made: Cell::new(false),
            may_have_name: Cell::new(false),
            keeps_its_name: Cell::new(false),
        })
    }

    fn refuse(&self, error: Errno, words: impl AsRef<str>) -> Refusal {
        Refusal::new(error, format!("{}: {}", self.what, words.as_ref()))
    }

    /// Whether it can be done.
    async fn check<H: ControlledHost>(&self, host: &H, open: &Open<H>) -> Result<(), Refusal> {
        if !self.may_open_base(&open.options.backing) && !host.bug(&SNAPSHOT_ANY_BASE) {
            let words = format!(
                "{} could not be opened below it again; start tapdisk with --backing {}:{0}",
                self.base, self.old_format
            );
            return Err(self.refuse(Errno::EACCES, words));
        }
        if self.keeps_name {
            let about = Formats::shipped().describe(host, &self.old, true).await;
            let named = match about.map(|about| about.backing_path) {
                Ok(Some(below)) => check_named(host, &below).await,
                about => about.map(drop),
            };
            named.map_err(|error| self.refuse(error.errno(), error.to_string()))?;
        }
        self.check_names(host, open).await
    }

    /// Makes the new image, durable with its name.
    async fn make<H: ControlledHost>(&self, host: &H, open: &Open<H>) -> Result<(), Refusal> {
        let size_bytes = open.disk.slot().info().size_sectors * SECTOR_BYTES;
        let image = NewImage { size_bytes, backing: Some(self.backing.clone()), ..NewImage::default() };
        match Formats::shipped().create(host, self.format, &self.made_at, image).await {
            Ok(()) => {
                self.is_made.set(true);
                Ok(())
            }
            Err(error) => {
                // What there is of it is ours, unless it could not be made at all.
                let none =
                    matches!(error, ImageError::Options { .. } | ImageError::Io { action: "create", .. });
                let left = if none { Ok(()) } else { host.remove(&self.made_at).await };
                let left = left.err().map(|error| format!("; {} is left: {error}", self.made_at));
                Err(self.refuse(error.errno(), format!("{error}{}", left.unwrap_or_default())))
            }
        }
    }

    /// The new image's path is free, and the disk's name has the disk's file, which can give it away.
    async fn check_names<H: ControlledHost>(&self, host: &H, open: &Open<H>) -> Result<(), Refusal> {
        match host.open(&self.made_at, OpenMode::READ).await {
            Err(Errno::ENOENT) => {}
            Ok(_) => return Err(self.refuse(Errno::EEXIST, format!("{} is there already", self.made_at))),
            Err(error) => return Err(self.refuse(error, format!("look for {}: {error}", self.made_at))),
        }
        let path = &self.old.path;
        let found = async { host.open(path, OpenMode::READ).await?.info().await };
        let found = found.await.map_err(|error| self.refuse(error, format!("look at {path}: {error}")))?;
        if open.file.get().is_none() {
            let words =
                format!("{path} could not be looked at when it was opened; pause and resume the disk");
            return Err(self.refuse(Errno::ESTALE, words));
        }
        if open.file.get() != Some(found.id) && !host.bug(&SNAPSHOT_ANY_FILE) {
            return Err(self.another_file());
        }
        if self.keeps_name && found.block_device {
            let words = format!("{path} is a block device, whose name a file cannot have; name a new image");
            return Err(self.refuse(Errno::EINVAL, words));
        }
        Ok(())
    }

    fn another_file(&self) -> Refusal {
        self.refuse(Errno::ESTALE, format!("{} is not the file that the disk has open", self.old.path))
    }

    /// Whether the image below could be opened again in the format that it has.
    fn may_open_base(&self, policy: &BackingPolicy) -> bool {
        match policy.allowed(&self.base) {
            Some(Backing::File(ImageFormat::As(format)) | Backing::Any(ImageFormat::As(format))) => {
                format == self.old_format
            }
            // A disk's first bytes may look like those of any format.
            Some(Backing::File(ImageFormat::Probe) | Backing::Any(ImageFormat::Probe)) => {
                self.old_format.info().has_backing
            }
            Some(Backing::Open(_)) | None => false,
        }
    }

    /// Puts the new image above the old one.
    async fn take<H: ControlledHost>(&self, settings: &Settings<H>, open: &Open<H>) -> Result<(), Refusal> {
        let host = &open.files;
        if self.keeps_name {
            self.make(host, open).await?;
        }
        let begun = Cell::new(false);
        let first = self.keeps_name && host.bug(&SNAPSHOT_NAMES_FIRST);
        if first {
            self.exchange_names(host, open).await?;
        }
        let above = async |old: Lease| {
            begun.set(true);
            let base = old.share();
            // Whoever finds the new image after a crash no longer flushes the old one. A cache mode may have left the
            // flush of the exchange out.
            let flushed = base.submit(Request::flush()).await.result;
            flushed.map_err(|error| self.refuse(error, format!("flush it: {error}; it goes on")))?;
            let taken = async {
                match self.keeps_name {
                    true if first => {}
                    true => self.exchange_names(host, open).await?,
                    false => self.make(host, open).await?,
                }
                self.put_above(host, open, old, &base).await
            };
            match taken.await {
                Ok(node) => Ok(node),
                Err(why) => Err(self.take_back(host, open, why).await),
            }
        };
        let limit = async {
            settings.until_late().await;
            if begun.get() {
                // It is drained, and what is left to do is done.
                pending::<()>().await;
            }
        };
        let refused = match unless(limit, open.disk.exchange(above)).await {
            // The old image is still leased.
            Some(Ok(_)) => return Ok(()),
            None => {
                let seconds = settings.pause_limit_s();
                let words = format!("its requests did not end within {seconds} s; it goes on");
                self.refuse(Errno::ETIMEDOUT, words)
            }
            Some(Err(ExchangeError::Closed)) => self.refuse(Errno::ESHUTDOWN, "it is closed"),
            Some(Err(ExchangeError::Flush(error))) => {
                self.refuse(error, format!("flush it: {error}; it goes on"))
            }
            Some(Err(ExchangeError::Change(why))) => why,
        };
        Err(refused)
    }

    /// The new image, opened above `old`, which does not change from now on. Nothing fails afterwards.
    async fn put_above<H: ControlledHost>(
        &self,
        host: &H,
        open: &Open<H>,
        old: Lease,
        base: &Lease,
    ) -> Result<Rc<dyn Node>, Refusal> {
        let node = self.open_above(host, open, old).await;
        let node =
            node.map_err(|error| self.refuse(error.errno().unwrap_or(Errno::EIO), error.to_string()))?;
        let refused = match open.disk.fit(Rc::clone(&node)) {
            Err(why) => self.refuse(Errno::EMEDIUMTYPE, format!("the new image is not fit: {why}")),
            Ok(fit) if host.bug(&SNAPSHOT_KEEPS_LOCK) => return Ok(fit),
            Ok(fit) => match base.freeze().await {
                Ok(()) => return Ok(fit),
                Err(error) => {
                    self.refuse(error, format!("share {} with other readers: {error}", self.old.path))
                }
            },
        };
        // It was only looked at.
        let _unused = node.close().await;
        Err(refused)
    }

    async fn open_above<H: ControlledHost>(
        &self,
        host: &H,
        open: &Open<H>,
        old: Lease,
    ) -> Result<Rc<dyn Node>, OpenError> {
        let base = self.base.clone();
        let gate = move |path: &str| same_path(path, &base).then(|| Backing::Open(Rc::new(old.share())));
        let options = DiskOptions { backing: BackingPolicy::Ask(Rc::new(gate)), ..open.options.clone() };
        let spec = ImageSpec { format: self.format.into(), path: self.top.clone() };
        open_node(host, Formats::shipped(), &DiskSpec::Image(spec), &options).await
    }

    /// The new image and the old one exchange their names, durably.
    async fn exchange_names<H: ControlledHost>(&self, host: &H, open: &Open<H>) -> Result<(), Refusal> {
        let [old, new] = [&self.old.path, &self.made_at];
        // The drain may have taken long.
        if self.has_its_name(host, open).await != Ok(true) && !host.bug(&SNAPSHOT_ANY_FILE) {
            return Err(self.another_file());
        }
        self.may_have_name.set(true);
        if let Err(error) = host.exchange(old, new).await {
            let hint = match error {
                Errno::EXDEV => "; they are on two file systems",
                Errno::EINVAL | Errno::ENOSYS => "; this file system cannot; name a new image instead",
                _ => "",
            };
            if self.has_its_name(host, open).await != Ok(false) {
                return Err(self.refuse(error, format!("exchange {old} and {new}: {error}{hint}")));
            }
            host.mark(&SNAPSHOT_HAPPENED);
        }
        // It was perhaps a symbolic link that got the other name, and leads elsewhere from there.
        if file_id(host, new).await != Ok(open.file.get()) && !host.bug(&SNAPSHOT_ANY_FILE) {
            let words = format!("{new} does not lead to the disk's file, which {old} led to");
            return Err(self.refuse(Errno::ESTALE, words));
        }
        if host.bug(&SNAPSHOT_NAME_LATER) {
            return Ok(());
        }
        for path in [old, new] {
            sync_name(host, path).await.map_err(|error| self.refuse(error.errno(), error.to_string()))?;
        }
        Ok(())
    }

    /// Whether the disk's name has the file that the disk has open.
    async fn has_its_name<H: ControlledHost>(&self, host: &H, open: &Open<H>) -> Result<bool, Errno> {
        Ok(file_id(host, &self.old.path).await? == open.file.get())
    }

    /// The snapshot has failed with `why`: the disk's file gets its name back.
    async fn take_back<H: ControlledHost>(&self, host: &H, open: &Open<H>, why: Refusal) -> Refusal {
        let Err(error) = self.put_back(host, open).await else { return why };
        // Whatever has the name after a crash: the new image shows what the old one has.
        self.keeps_its_name.set(true);
        let [old, new] = [&self.old.path, &self.made_at];
        let words = format!("{old} is the disk in any case, and {new} is below it or of no use");
        Refusal::new(why.error, format!("{}; {words}: {error}", why.words))
    }

    /// The snapshot has failed with `why`: the new image is removed.
    async fn remove<H: ControlledHost>(&self, host: &H, why: Refusal) -> Refusal {
        if !self.is_made.get() || self.keeps_its_name.get() {
            return why;
        }
        // Perhaps it was opened.
        host.closed().await;
        let Err(error) = host.remove(&self.made_at).await else { return why };
        let words = format!("{}; its new image {} is left: {error}", why.words, self.made_at);
        Refusal::new(why.error, words)
    }

    /// The names are as before, durably.
    async fn put_back<H: ControlledHost>(&self, host: &H, open: &Open<H>) -> Result<(), Errno> {
        // Otherwise whatever has the disk's name by now got it from somebody else.
        let ours = self.may_have_name.get() || self.is_made.get() && host.bug(&SNAPSHOT_UNDOES_OTHERS);
        if !ours || host.bug(&SNAPSHOT_NOT_UNDONE) || self.has_its_name(host, open).await? {
            return Ok(());
        }
        let exchanged = host.exchange(&self.old.path, &self.made_at).await;
        if !self.has_its_name(host, open).await? {
            return exchanged.and(Err(Errno::EIO));
        }
        host.mark(&SNAPSHOT_UNDONE);
        for path in [&self.old.path, &self.made_at] {
            sync_name(host, path).await.map_err(|error| error.errno())?;
        }
        Ok(())
    }
}
