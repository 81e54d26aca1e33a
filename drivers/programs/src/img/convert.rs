//! `tap-img convert`.

use super::apart::apart;
use super::damage::{Losses, Lost, is_damage, read_rest};
use super::open_node;
use super::pump::{Extents, PIECE_SECTORS, Run, TaskSet, is_zero, read};
use super::target::{Target, TargetOptions};
use super::{Failure, Outcome, SourceArgs};
use crate::Console;
use crate::disk::{DiskHost, DiskOptions, format_parser};
use crate::spec::DiskSpec;
use clap::Args;
use smallvec::smallvec;
use std::rc::Rc;
use tap_core::{CacheMode, LocalBoxFuture, Node, Request, ZeroFlags};
use tap_host::{BufPool, Errno, FileId, IoBuf, SECTOR_BYTES, SectorRange};
use tap_images::{Format, ImageFormat, parse_size};

tap_host::listed! {
    pub(super) BUGS: Bug;
    COPY_UNCLOSED = "copy-unclosed", "a copy is reported done before its target is closed";
}

#[derive(Args, Debug)]
pub(super) struct Convert {
    /// Format of the source, instead of probing it
    #[arg(short, long, value_parser = format_parser(), value_name = "FORMAT")]
    format: Option<Format>,
    /// Format of the new image
    #[arg(short = 'O', long, value_parser = format_parser(), default_value = "raw", value_name = "FORMAT")]
    output_format: Format,
    #[command(flatten)]
    options: TargetOptions,
    /// Write into an existing image instead of creating one; it must be large enough
    #[arg(short = 'n', long)]
    no_create: bool,
    /// Skip runs of zeros of at least this size; 0 copies everything
    #[arg(short = 'S', long, default_value = "4k", value_name = "SIZE")]
    sparse: String,
    /// Replace what cannot be read by zeros, and name it, instead of failing
    #[arg(long)]
    salvage: bool,
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
    reading: SourceArgs,
    /// The image to copy
    source: String,
    /// The image to create
    target: String,
}

/// Copies one disk onto another.
#[derive(Clone)]
pub(super) struct Copier {
    pub(super) from: Rc<dyn Node>,
    pub(super) to: Rc<dyn Node>,
    pub(super) pool: BufPool,
    /// The target reads as zeros, so zeros need not be written.
    pub(super) to_is_zero: bool,
    /// Least number of zero sectors to skip; 0 skips none.
    pub(super) sparse_sectors: u64,
    /// Zeros replace what cannot be read.
    pub(super) salvage: bool,
}

/// The copy of one piece; returns what could not be read.
type Piece = LocalBoxFuture<Result<Vec<Lost>, Errno>>;

impl Convert {
    pub(super) async fn run<H: DiskHost>(&self, host: &H, console: &dyn Console) -> Outcome {
        let sparse = parse_size(&self.sparse).map_err(|e| Failure::new(format!("use -S: {e}")))?;
        if !sparse.is_multiple_of(SECTOR_BYTES) {
            return Err(Failure::new(format!("use -S {}: it is not a multiple of 512", self.sparse)));
        }
        let source = super::disk(&self.source, self.format).map_err(Failure::new)?;
        let options = self.reading.options();
        let from = open_node(host, &source, &options).await.map_err(Failure::new)?;
        let mut files = Vec::new();
        if let (DiskSpec::Image(from), Ok(DiskSpec::Image(to))) = (&source, super::disk(&self.target, None)) {
            let follow = options.backing.is_asked();
            let copy = |why| Failure::new(format!("copy {} to {}: {why}", self.source, self.target));
            files = apart(host, &to.path, from, (follow, options.unlocked)).await.map_err(copy)?;
        }
        let to = self.open_target(host, from.info().size_sectors, files).await?;
        let copier = Copier {
            pool: BufPool::new(2 * usize::from(self.parallel) * (PIECE_SECTORS * SECTOR_BYTES) as usize),
            to_is_zero: !self.no_create,
            sparse_sectors: sparse / SECTOR_BYTES,
            salvage: self.salvage,
            from,
            to,
        };
        let copied = self.copy(&copier, console).await;
        let closed = if host.bug(&COPY_UNCLOSED) { Ok(()) } else { copier.to.close().await };
        copied.and(closed).map_err(|e| {
            let (from, to) = (&self.source, &self.target);
            Failure::new(format!("copy {from} to {to}: {e}; {to} is incomplete"))
        })?;
        copier.from.close().await.map_err(|e| Failure::new(format!("close {}: {e}", self.source)))?;
        Ok(0)
    }

    /// Opens or creates the target, which must not be one of `apart`.
    async fn open_target<H: DiskHost>(
        &self,
        host: &H,
        size_sectors: u64,
        apart: Vec<FileId>,
    ) -> Result<Rc<dyn Node>, Failure> {
        let mut spec = super::disk(&self.target, None).map_err(Failure::new)?;
        let mut format = self.output_format;
        if let DiskSpec::Image(image) = &mut spec {
            match image.format {
                ImageFormat::As(named) => format = named,
                ImageFormat::Probe => image.format = format.into(),
            }
        }
        match &spec {
            _ if self.no_create => {}
            DiskSpec::Image(image) => {
                let (path, size_bytes) = (image.path.clone(), size_sectors * SECTOR_BYTES);
                let target = Target { format, path, size_bytes, backing: None, apart };
                target.create(host, &self.options).await.map_err(Failure::new)?;
            }
            DiskSpec::Nbd { .. } => {
                let text = format!("create {spec}: an export exists already; write into it with -n");
                return Err(Failure::new(text));
            }
            DiskSpec::Mason { .. } => {
                let text = format!("create {spec}: a graph is no image; write into its disk with -n");
                return Err(Failure::new(text));
            }
        }
        // Durable only at the end: a copy interrupted by a crash was never reported complete.
        let cache = CacheMode::Unsafe;
        let options = DiskOptions { write: true, cache, ..DiskOptions::default() };
        let node = open_node(host, &spec, &options).await.map_err(Failure::new)?;
        let have = node.info().size_sectors;
        if have < size_sectors {
            let text = format!(
                "copy {} to {}: the target has {} bytes, but {} are needed",
                self.source,
                self.target,
                have * SECTOR_BYTES,
                size_sectors * SECTOR_BYTES
            );
            return Err(Failure::new(text));
        }
        Ok(node)
    }

    async fn copy(&self, copier: &Copier, console: &dyn Console) -> Result<(), Errno> {
        let mut tasks = TaskSet::new(usize::from(self.parallel));
        let mut losses = Losses::default();
        let mut outcome = self.feed(copier, &mut tasks, &mut losses, console).await;
        // Even after an error: nothing may be in flight when the target is closed.
        while let Some(result) = tasks.finish().await {
            outcome = outcome.and(result.map(|lost| self.note(lost, &mut losses, console)));
        }
        losses.into_runs().for_each(|lost| self.warn(lost, console));
        outcome
    }

    /// Keeps what was lost, to name it in order when the copy has ended.
    fn note(&self, lost: Vec<Lost>, losses: &mut Losses, console: &dyn Console) {
        for early in lost.into_iter().filter_map(|lost| losses.add(lost)) {
            self.warn(early, console);
        }
    }

    fn warn(&self, lost: Lost, console: &dyn Console) {
        if !self.quiet {
            let text = lost.text(&self.source);
            console.err(&format!("tap-img: warning: {text}; {} has zeros there", self.target));
        }
    }

    /// Passes one piece after the other to `tasks`, up to the first error.
    async fn feed(
        &self,
        copier: &Copier,
        tasks: &mut TaskSet<Piece>,
        losses: &mut Losses,
        console: &dyn Console,
    ) -> Result<(), Errno> {
        let total = copier.from.info().size_sectors * SECTOR_BYTES;
        let mut extents = Extents::new(&copier.from);
        let mut done = 0;
        loop {
            let run = match extents.next(PIECE_SECTORS).await {
                // Reading it shows what is there.
                Err(error) if self.salvage && is_damage(error) => extents.skip(PIECE_SECTORS),
                run => match run? {
                    Some(run) => run,
                    None => return Ok(()),
                },
            };
            done += run.count * SECTOR_BYTES;
            let job = copier.clone();
            let work: Piece = Box::pin(async move { job.piece(&run).await });
            if let Some(result) = tasks.start(work).await {
                self.note(result?, losses, console);
            }
            if self.progress && !self.quiet {
                console.progress(done, total);
            }
        }
    }
}

impl Copier {
    /// Copies a run; returns what could not be read.
    pub(super) async fn piece(&self, run: &Run) -> Result<Vec<Lost>, Errno> {
        let (start, count) = (run.start, run.count);
        if run.extent.zero {
            return self.zeros(start, count).await.map(|()| Vec::new());
        }
        if !self.salvage {
            let buf = read(&self.from, &self.pool, start, count).await?;
            return self.data(start, buf).await.map(|()| Vec::new());
        }
        let is_unreadable = run.extent.source.error().is_some();
        let error = match read(&self.from, &self.pool, start, count).await {
            Err(error) if is_damage(error) => error,
            result => return self.data(start, result?).await.map(|()| Vec::new()),
        };
        let all = Lost { start, count, error };
        if is_unreadable && self.is_still_unreadable(&all).await? {
            return self.zeros(start, count).await.map(|()| vec![all]);
        }
        let (buf, lost) = read_rest(&self.from, &self.pool, all).await?;
        self.data(start, buf).await.map(|()| lost)
    }

    /// Whether the map still says of all of `lost` that it cannot be read. Then smaller reads find nothing, and a table
    /// may map millions of sectors.
    async fn is_still_unreadable(&self, lost: &Lost) -> Result<bool, Errno> {
        let range = SectorRange::new(lost.start, lost.count as u32);
        match self.from.extents(range, 1).await {
            Ok(extents) => Ok(extents
                .first()
                .is_some_and(|first| first.count >= lost.count && first.source.error().is_some())),
            Err(error) if is_damage(error) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Writes bytes, without the zeros that can be skipped.
    async fn data(&self, start: u64, buf: IoBuf) -> Result<(), Errno> {
        let runs = runs(&buf, self.sparse_sectors);
        if let [(false, _, _)] = runs[..] {
            return self.write(start, buf).await;
        }
        for (zero, at, len) in runs {
            if zero {
                self.zeros(start + at, len).await?;
                continue;
            }
            let from = (at * SECTOR_BYTES) as usize;
            let mut part = IoBuf::unpooled((len * SECTOR_BYTES) as usize)?;
            part.copy_from_slice(&buf[from..from + (len * SECTOR_BYTES) as usize]);
            self.write(start + at, part).await?;
        }
        Ok(())
    }

    async fn zeros(&self, start: u64, count: u64) -> Result<(), Errno> {
        if self.to_is_zero {
            return Ok(());
        }
        let range = SectorRange::new(start, count as u32);
        let flags = ZeroFlags { unmap: true, fast: false };
        self.to.submit(Request::write_zeroes(range, flags)).await.result
    }

    async fn write(&self, start: u64, buf: IoBuf) -> Result<(), Errno> {
        let range = SectorRange::new(start, (buf.len() as u64 / SECTOR_BYTES) as u32);
        self.to.submit(Request::write(range, smallvec![buf])).await.result
    }
}

/// Splits `bytes` into runs of zeros and data: whether zeros, first sector, sectors. Zeros are found in steps of
/// `sparse` sectors.
fn runs(bytes: &[u8], sparse: u64) -> Vec<(bool, u64, u64)> {
    let sectors = bytes.len() as u64 / SECTOR_BYTES;
    if sparse == 0 {
        return vec![(false, 0, sectors)];
    }
    let mut runs: Vec<(bool, u64, u64)> = Vec::new();
    for (i, step) in bytes.chunks((sparse * SECTOR_BYTES) as usize).enumerate() {
        let (zero, len) = (is_zero(step), step.len() as u64 / SECTOR_BYTES);
        match runs.last_mut() {
            Some(last) if last.0 == zero => last.2 += len,
            _ => runs.push((zero, i as u64 * sparse, len)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_zeros_are_found_in_steps() {
        let mut bytes = vec![0; 10 * 512];
        bytes[5 * 512] = 1;
        assert_eq!(runs(&bytes, 0), [(false, 0, 10)]);
        assert_eq!(runs(&bytes, 4), [(true, 0, 4), (false, 4, 4), (true, 8, 2)]);
        bytes[0] = 1;
        assert_eq!(runs(&bytes, 8), [(false, 0, 8), (true, 8, 2)]);
    }
}
