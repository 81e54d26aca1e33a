//! `tap-img commit`: merges an image that nobody has open into its backing file; see [`Merge`].

use super::convert::Copier;
use super::pump::{Extents, PIECE_SECTORS, TaskSet};
use super::{Failure, Outcome, open_node};
use crate::Console;
use crate::disk::{BackingArgs, DiskHost, DiskOptions, format_parser};
use crate::merge::{Merge, is_own};
use crate::spec::DiskSpec;
use clap::Args;
use std::rc::Rc;
use tap_core::{Lease, LocalBoxFuture, Node, NodeName, Request, nodes};
use tap_host::{BufPool, Errno, SECTOR_BYTES};
use tap_images::{Backing, BackingPolicy, Format, same_path};

tap_host::listed! {
    pub(super) BUGS: Bug;
    MERGE_UNFLUSHED = "merge-unflushed", "a merge is completed before the image below is durable";
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

impl Commit {
    pub(super) async fn run<H: DiskHost>(&self, host: &H, console: &dyn Console) -> Outcome {
        let image = super::image(&self.image, self.format).map_err(Failure::new)?;
        let policy = self.backing.policy();
        let merge = Merge::plan(host, &image, self.base.as_deref(), &policy, self.keep_name).await;
        let Some(mut merge) = merge.map_err(Failure::new)? else {
            self.say(console, "it was merged before");
            return Ok(0);
        };
        let base = open_node(host, &DiskSpec::Image(merge.base.clone()), &self.options(true, None)).await;
        let base = Rc::new(Lease::new(base.map_err(Failure::new)?));
        let merged = self.merge(host, console, &mut merge, &base).await;
        let closed = base.close().await;
        merged?;
        let name = &merge.base.path;
        closed.map_err(|error| Failure::new(merge.failed(error, &format!("close {name}: {error}"))))?;
        let base = &merge.base.path;
        self.say(
            console,
            &match self.keep_name {
                true => format!("merged; it does not need {base} any more, which is gone"),
                false => format!("merged into {base}"),
            },
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

    async fn merge<H: DiskHost>(
        &self,
        host: &H,
        console: &dyn Console,
        merge: &mut Merge,
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
        merge: &mut Merge,
        (image, base): (&Rc<dyn Node>, &Rc<Lease>),
    ) -> Result<(), Failure> {
        let bytes = |sectors: u64| sectors * SECTOR_BYTES;
        let (have, need) = (bytes(image.info().size_sectors), bytes(base.info().size_sectors));
        merge.begin(host, have, need).await.map_err(Failure::new)?;
        let to = Rc::clone(base) as Rc<dyn Node>;
        let copied = self.copy(console, image, &to).await;
        copied.map_err(|error| Failure::new(merge.failed(error, &error.to_string())))?;
        if !host.bug(&MERGE_UNFLUSHED) {
            let (flushed, name) = (base.submit(Request::flush()).await.result, &merge.base.path);
            flushed.map_err(|error| Failure::new(merge.failed(error, &format!("flush {name}: {error}"))))?;
        }
        merge.complete(host).await.map_err(Failure::new)
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
            if is_own(&run.extent.source, own)? {
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
}
