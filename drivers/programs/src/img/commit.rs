//! `tap-img commit`: merges an image into its backing file.
//!
//! ```text
//!   before             merging                     done                with --keep-name
//!   image ─► base      image ─► base (marked)      image ─► base       image (was base)
//!                        └── what it has ─►┘
//! ```
//!
//! # Contract
//!
//! * Whatever fails, the image shows what it showed, and so does every image above it. The base is marked before its
//!   first byte changes (see [`mark_merging`]); until the command was run again and has succeeded, nothing else can be
//!   opened above the base.
//! * Success: the base shows what the image shows, durably, and the mark is gone.
//! * To keep the name, the files exchange theirs once the merged one is durable. What is left of the image then has the
//!   other name, and is removed together with the mark.

use super::convert::Copier;
use super::pump::{Extents, PIECE_SECTORS, TaskSet};
use super::{Failure, Outcome, open_node};
use crate::Console;
use crate::disk::{BackingArgs, DiskHost, DiskOptions, format_parser};
use crate::spec::DiskSpec;
use clap::Args;
use std::rc::Rc;
use tap_core::{Lease, LocalBoxFuture, Node, NodeName, Request, Source, nodes};
use tap_host::{BufPool, Errno, SECTOR_BYTES};
use tap_images::{
    Backing, BackingPolicy, Description, Format, Formats, ImageFormat, ImageSpec, file_id, folder,
    mark_merging, merging, name_beside, same_path, sync_name, unmark_merged,
};

tap_host::listed! {
    pub(super) BUGS: Bug;
    MERGE_UNFLUSHED = "merge-unflushed", "a merge is completed before the image below is durable";
    MERGE_NEXT = "merge-next", "a merge that is repeated after it was completed merges the next image, too";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    MERGE_REPEATED = "merge-repeated", "a merge that had been cut short was completed";
    MERGE_CLEARED = "merge-cleared", "only what a completed merge had left was removed";
}

#[derive(Args, Debug)]
pub(super) struct Commit {
    /// Format of the image, instead of probing it
    #[arg(short, long, value_parser = format_parser(), value_name = "FORMAT")]
    format: Option<Format>,
    /// The backing file, which must be this one: a command that is repeated then never merges the next one, too
    #[arg(short, long, value_name = "FILE")]
    base: Option<String>,
    /// Give the merged image the name of IMAGE, which images above it know; the name of the backing file is gone then
    #[arg(short, long, requires = "base")]
    keep_name: bool,
    /// Requests in flight
    #[arg(short = 'm', long, default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=64))]
    parallel: u8,
    /// Show progress
    #[arg(short, long)]
    progress: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    backing: BackingArgs,
    /// The image to merge into its backing file
    image: String,
}

/// The two images.
struct Merge {
    /// Continues "failed to".
    what: String,
    image: ImageSpec,
    base: ImageSpec,
    /// What the mark of the base calls the image.
    name: String,
}

impl Commit {
    pub(super) async fn run<H: DiskHost>(&self, host: &H, console: &dyn Console) -> Outcome {
        let image = super::image(&self.image, self.format).map_err(Failure::new)?;
        let about = Formats::shipped().describe(host, &image, false).await.map_err(Failure::new)?;
        if self.is_merged(host, &image, &about).await? && !host.bug(&MERGE_NEXT) {
            host.mark(&MERGE_CLEARED);
            self.say(console, "it was merged before");
            return Ok(0);
        }
        let merge = self.plan(host, image, &about).await?;
        if merging(host, &merge.base.path).await.map_err(Failure::new)?.is_some() {
            host.mark(&MERGE_REPEATED);
        }
        let base = open_node(host, &DiskSpec::Image(merge.base.clone()), &self.options(true, None)).await;
        let base = Rc::new(Lease::new(base.map_err(Failure::new)?));
        let merged = self.merge(host, console, &merge, &base).await;
        let closed = base.close().await;
        merged?;
        closed.map_err(|error| merge.failed(format!("close {}: {error}", merge.base.path)))?;
        self.say(
            console,
            &format!("merged into {}", if self.keep_name { &merge.image } else { &merge.base }.path),
        );
        Ok(0)
    }

    fn say(&self, console: &dyn Console, text: &str) {
        if !self.quiet {
            console.out(&format!("{}: {text}", self.image));
        }
    }

    /// How to open the base, or the image above this node.
    fn options(&self, write: bool, base: Option<(String, Rc<Lease>)>) -> DiskOptions {
        let backing = match base {
            None => self.backing.policy(),
            Some((path, lease)) => BackingPolicy::Ask(Rc::new(move |asked| {
                same_path(asked, &path).then(|| Backing::Open(Rc::new(lease.share())))
            })),
        };
        DiskOptions { write, backing, ..DiskOptions::default() }
    }

    /// Whether the image already is the merged one, and only the rest had to be removed.
    async fn is_merged<H: DiskHost>(
        &self,
        host: &H,
        image: &ImageSpec,
        about: &Description,
    ) -> Result<bool, Failure> {
        let Some(base) = &self.base else { return Ok(false) };
        if about.backing_path.as_ref().is_some_and(|path| same_path(path, base)) {
            return Ok(false);
        }
        let other = merging(host, base).await.map_err(Failure::new)?;
        if other.is_none_or(|other| !same_path(&other, &image.path)) {
            return match &about.backing_path {
                Some(path) => {
                    Err(self
                        .refused(format!("its backing file is {path}, not {base}; it may be merged already")))
                }
                None => Err(self.refused(format!("it has no backing file; {base} may be merged already"))),
            };
        }
        self.check_rest(host, base).await?;
        self.clear(host, base).await?;
        Ok(true)
    }

    /// Fails if the file at `base` is not the rest of the image, which called the base its backing file.
    async fn check_rest<H: DiskHost>(&self, host: &H, base: &str) -> Result<(), Failure> {
        let rest = ImageSpec { format: ImageFormat::Probe, path: base.to_owned() };
        let names = match Formats::shipped().describe(host, &rest, false).await {
            Ok(rest) => rest.backing_path,
            Err(error) if error.errno() == Errno::ENOENT => return Ok(()),
            Err(error) => return Err(Failure::new(error)),
        };
        if names.is_some_and(|path| same_path(&path, base)) {
            return Ok(());
        }
        Err(self.refused(format!(
            "it is not based on {base}, which is partly merged with another file of this name"
        )))
    }

    fn refused(&self, why: String) -> Failure {
        Failure::new(format!("merge {}: {why}", self.image))
    }

    async fn plan<H: DiskHost>(
        &self,
        host: &H,
        image: ImageSpec,
        about: &Description,
    ) -> Result<Merge, Failure> {
        let refused = |why: String| Err(self.refused(why));
        let Some(path) = about.backing_path.clone() else {
            return refused("it has no backing file".to_owned());
        };
        let allowed = match self.backing.policy() {
            BackingPolicy::Refuse => None,
            BackingPolicy::Ask(gate) => gate(&path),
        };
        let format = match allowed {
            // Its bytes are not looked at: they may be those of any format.
            Some(Backing::Any(ImageFormat::As(format))) if !format.info().has_backing => {
                return refused(format!("name its backing file, with --backing {format}:{path}"));
            }
            Some(Backing::File(format) | Backing::Any(format)) => format,
            Some(Backing::Open(_)) | None => {
                return refused(format!(
                    "its backing file {path} may not be opened; allow it with --backing"
                ));
            }
        };
        let Some(name) = name_beside(&path, &image.path) else {
            return refused(format!("name it by its absolute path, since {path} is in another folder"));
        };
        let base = ImageSpec { format, path };
        if self.keep_name {
            self.check_names(host, &image, &base, about.format).await?;
        }
        let what = format!("merge {} into {}", image.path, base.path);
        Ok(Merge { what, image, base, name })
    }

    /// Whether the base can have the image's name.
    async fn check_names<H: DiskHost>(
        &self,
        host: &H,
        image: &ImageSpec,
        base: &ImageSpec,
        format: Format,
    ) -> Result<(), Failure> {
        if folder(&image.path) != folder(&base.path) {
            let why = format!("{} is in another folder, and what is below it is looked for there", base.path);
            return Err(self.refused(why));
        }
        let below = Formats::shipped().describe(host, base, false).await.map_err(Failure::new)?;
        if below.format != format {
            let why = format!(
                "{} has the format {}, and cannot have the name of a {format}",
                base.path, below.format
            );
            return Err(self.refused(why));
        }
        Ok(())
    }

    async fn merge<H: DiskHost>(
        &self,
        host: &H,
        console: &dyn Console,
        merge: &Merge,
        base: &Rc<Lease>,
    ) -> Result<(), Failure> {
        let options = self.options(false, Some((merge.base.path.clone(), Rc::clone(base))));
        let image = open_node(host, &DiskSpec::Image(merge.image.clone()), &options).await;
        let image = image.map_err(Failure::new)?;
        let merged = self.merge_from(host, console, merge, (&image, base)).await;
        // It was only read.
        let _nothing_lost = image.close().await;
        merged
    }

    async fn merge_from<H: DiskHost>(
        &self,
        host: &H,
        console: &dyn Console,
        merge: &Merge,
        (image, base): (&Rc<dyn Node>, &Rc<Lease>),
    ) -> Result<(), Failure> {
        let (have, need) = (image.info().size_sectors, base.info().size_sectors);
        if have != need {
            let [have, need] = [have, need].map(|sectors| sectors * SECTOR_BYTES);
            return Err(self.refused(format!("it has {have} bytes, and {} has {need}", merge.base.path)));
        }
        mark_merging(host, &merge.base.path, &merge.name).await.map_err(Failure::new)?;
        let to = Rc::clone(base) as Rc<dyn Node>;
        let copied = self.copy(console, image, &to).await;
        copied.map_err(|error| merge.failed(error.to_string()))?;
        if !host.bug(&MERGE_UNFLUSHED) {
            let flushed = base.submit(Request::flush()).await.result;
            flushed.map_err(|error| merge.failed(format!("flush {}: {error}", merge.base.path)))?;
        }
        match self.keep_name {
            true => self.exchange(host, merge).await,
            false => {
                unmark_merged(host, &merge.base.path).await.map_err(|error| merge.failed(error.to_string()))
            }
        }
    }

    /// Writes everything that `image` holds itself to `base`.
    async fn copy(
        &self,
        console: &dyn Console,
        image: &Rc<dyn Node>,
        base: &Rc<dyn Node>,
    ) -> Result<(), Errno> {
        let own = nodes(Rc::clone(image)).into_iter().find_map(|(_, node)| node.name());
        let copier = Copier {
            from: Rc::clone(image),
            to: Rc::clone(base),
            pool: BufPool::new(2 * usize::from(self.parallel) * (PIECE_SECTORS * SECTOR_BYTES) as usize),
            to_is_zero: false,
            sparse_sectors: 0,
            salvage: false,
        };
        let mut tasks = TaskSet::new(usize::from(self.parallel));
        let mut outcome = self.feed(console, &copier, own.as_ref(), &mut tasks).await;
        // Even after an error: nothing may be in flight when the base is closed.
        while let Some(result) = tasks.finish().await {
            outcome = outcome.and(result);
        }
        outcome
    }

    async fn feed(
        &self,
        console: &dyn Console,
        copier: &Copier,
        own: Option<&NodeName>,
        tasks: &mut TaskSet<LocalBoxFuture<Result<(), Errno>>>,
    ) -> Result<(), Errno> {
        let total = copier.from.info().size_sectors * SECTOR_BYTES;
        let mut extents = Extents::new(&copier.from);
        let mut done = 0;
        while let Some(run) = extents.next(PIECE_SECTORS).await? {
            done += run.count * SECTOR_BYTES;
            let is_own = match &run.extent.source {
                Source::Nothing => false,
                Source::Node { name, .. } => name.as_ref() == own,
                Source::Unreadable { error, .. } => return Err(*error),
            };
            if is_own {
                let job = copier.clone();
                let work = Box::pin(async move { job.piece(&run).await.map(drop) });
                if let Some(result) = tasks.start(work).await {
                    result?;
                }
            }
            if self.progress && !self.quiet {
                console.progress(done, total);
            }
        }
        Ok(())
    }

    /// The merged image, which is durable, gets the name of the other one, and that one is removed.
    async fn exchange<H: DiskHost>(&self, host: &H, merge: &Merge) -> Result<(), Failure> {
        let [image, base] = [&merge.image.path, &merge.base.path];
        let id = async |path: &str| file_id(host, path).await;
        let before = id(base).await.map_err(|error| merge.failed(format!("look at {base}: {error}")))?;
        if let Err(error) = host.exchange(image, base).await {
            let hint = match error {
                Errno::EXDEV => "; they are on two file systems",
                Errno::EINVAL | Errno::ENOSYS => "; this file system cannot: leave --keep-name out",
                _ => "",
            };
            // It may have happened all the same.
            if id(image).await != Ok(before) {
                return Err(merge.failed(format!("exchange {image} and {base}: {error}{hint}")));
            }
        }
        sync_name(host, image).await.map_err(|error| merge.failed(error.to_string()))?;
        self.clear(host, base).await
    }

    /// Removes what is left of an image that has given its name to the merged one, and then the mark.
    async fn clear<H: DiskHost>(&self, host: &H, base: &str) -> Result<(), Failure> {
        match host.remove(base).await {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(error) => return Err(self.refused(format!("it is merged, but {base} is left: {error}"))),
        }
        // Without the mark nobody would know what the rest is.
        let cleared = async {
            sync_name(host, base).await?;
            unmark_merged(host, base).await
        };
        cleared.await.map_err(|error| self.refused(format!("it is merged, but its mark is left: {error}")))
    }
}

impl Merge {
    fn failed(&self, why: String) -> Failure {
        let Self { what, image, base, .. } = self;
        let next =
            format!("{} is as it was, and {} may be partly merged; run it again", image.path, base.path);
        Failure::new(format!("{what}: {why}; {next}"))
    }
}
