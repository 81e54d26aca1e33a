//! `tap-img compare`.

use super::open_node;
use super::pump::{Extents, PIECE_SECTORS, Run, TaskSet, is_zero, read};
use super::{Failure, Outcome, SourceArgs};
use crate::Console;
use crate::disk::{DiskHost, format_parser};
use clap::Args;
use std::rc::Rc;
use tap_core::Node;
use tap_host::{BufPool, Errno, SECTOR_BYTES};
use tap_images::Format;

#[derive(Args, Debug)]
pub(super) struct Compare {
    /// Format of the first image, instead of probing it
    #[arg(short, long, value_parser = format_parser(), value_name = "FORMAT")]
    format: Option<Format>,
    /// Format of the second image
    #[arg(short = 'F', long, value_parser = format_parser(), value_name = "FORMAT")]
    second_format: Option<Format>,
    /// Disks of different sizes differ, even if the longer one ends with zeros
    #[arg(short, long)]
    strict: bool,
    /// Show progress
    #[arg(short, long)]
    progress: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// Requests in flight
    #[arg(short = 'm', long, default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=64))]
    parallel: u8,
    #[command(flatten)]
    reading: SourceArgs,
    /// The first image
    first: String,
    /// The second image
    second: String,
}

const DIFFERENT: u8 = 1;
const CANNOT_OPEN: u8 = 2;
const CANNOT_READ: u8 = 4;

impl Compare {
    pub(super) async fn run<H: DiskHost>(&self, host: &H, console: &dyn Console) -> Outcome {
        let mut disks = Vec::new();
        for (file, format) in [(&self.first, self.format), (&self.second, self.second_format)] {
            let spec = super::disk(file, format).map_err(Failure::with(CANNOT_OPEN))?;
            disks.push(
                open_node(host, &spec, &self.reading.options()).await.map_err(Failure::with(CANNOT_OPEN))?,
            );
        }
        let say = |line: &str| {
            if !self.quiet {
                console.out(line);
            }
        };
        let sizes = (disks[0].info().size_sectors, disks[1].info().size_sectors);
        if self.strict && sizes.0 != sizes.1 {
            say("Strict mode: Image size mismatch!");
            return Ok(DIFFERENT);
        }
        let different = self.first_difference(&disks[0], &disks[1], console).await;
        let different = different.map_err(|e| Failure {
            status: CANNOT_READ,
            text: format!("compare {} with {}: {e}", self.first, self.second),
        })?;
        // As QEMU's tool: it warns once it has compared the part that both have.
        if sizes.0 != sizes.1 && different.is_none_or(|sector| sector >= sizes.0.min(sizes.1)) {
            say("Warning: Image size mismatch!");
        }
        if let Some(sector) = different {
            say(&format!("Content mismatch at offset {}!", sector * SECTOR_BYTES));
            return Ok(DIFFERENT);
        }
        say("Images are identical.");
        Ok(0)
    }

    /// The first sector that differs; the shorter disk is extended with zeros.
    async fn first_difference(
        &self,
        a: &Rc<dyn Node>,
        b: &Rc<dyn Node>,
        console: &dyn Console,
    ) -> Result<Option<u64>, Errno> {
        let pool = BufPool::new(2 * usize::from(self.parallel) * (PIECE_SECTORS * SECTOR_BYTES) as usize);
        let total = a.info().size_sectors.max(b.info().size_sectors);
        let mut walk = Walk { a: Extents::new(a), b: Extents::new(b), left: (None, None), at: 0, total };
        let mut tasks = TaskSet::new(usize::from(self.parallel));
        let mut found: Option<u64> = None;
        let note = |found: &mut Option<u64>, new: Option<u64>| *found = (*found).into_iter().chain(new).min();
        while let Some((start, count, parts)) = walk.next().await? {
            if self.progress {
                console.progress(start * SECTOR_BYTES, total * SECTOR_BYTES);
            }
            if parts == (false, false) {
                continue;
            }
            let (a, b, pool) = (Rc::clone(a), Rc::clone(b), pool.clone());
            let work = Box::pin(async move {
                let a = if parts.0 { Some(read(&a, &pool, start, count).await?) } else { None };
                let b = if parts.1 { Some(read(&b, &pool, start, count).await?) } else { None };
                Ok::<_, Errno>(difference(a.as_deref(), b.as_deref()).map(|sector| start + sector))
            });
            if let Some(done) = tasks.start(work).await {
                note(&mut found, done?);
            }
            if found.is_some() {
                break;
            }
        }
        while let Some(done) = tasks.finish().await {
            note(&mut found, done?);
        }
        if self.progress {
            console.progress(total * SECTOR_BYTES, total * SECTOR_BYTES);
        }
        Ok(found)
    }
}

/// Both disks side by side, split where the extents of either change.
struct Walk {
    a: Extents,
    b: Extents,
    /// The rest of the runs that were split.
    left: (Option<Run>, Option<Run>),
    at: u64,
    total: u64,
}

impl Walk {
    /// The next run: first sector, count, and which of the disks have data to read there.
    async fn next(&mut self) -> Result<Option<(u64, u64, (bool, bool))>, Errno> {
        if self.at == self.total {
            return Ok(None);
        }
        if self.left.0.is_none() {
            self.left.0 = self.a.next(PIECE_SECTORS).await?;
        }
        if self.left.1.is_none() {
            self.left.1 = self.b.next(PIECE_SECTORS).await?;
        }
        let ends = [&self.left.0, &self.left.1].into_iter().flatten().map(|run| run.start + run.count);
        let end = ends.min().unwrap_or(self.total);
        let start = std::mem::replace(&mut self.at, end);
        let has_data = |run: &Option<Run>| run.as_ref().is_some_and(|run| !run.extent.zero);
        let parts = (has_data(&self.left.0), has_data(&self.left.1));
        for left in [&mut self.left.0, &mut self.left.1] {
            if let Some(run) = left {
                let rest = run.start + run.count - end;
                (run.start, run.count) = (end, rest);
                if rest == 0 {
                    *left = None;
                }
            }
        }
        Ok(Some((start, end - start, parts)))
    }
}

/// The first sector that differs; `None` data is zeros.
fn difference(a: Option<&[u8]>, b: Option<&[u8]>) -> Option<u64> {
    const SECTOR: usize = SECTOR_BYTES as usize;
    let at = match (a, b) {
        (Some(a), Some(b)) if a == b => None,
        (Some(a), Some(b)) => a.chunks(SECTOR).zip(b.chunks(SECTOR)).position(|(a, b)| a != b),
        (Some(one), None) | (None, Some(one)) => one.chunks(SECTOR).position(|sector| !is_zero(sector)),
        (None, None) => None,
    };
    at.map(|at| at as u64)
}
