//! The image tools: what they make, what they report about it, and what a power cut leaves.
//!
//! ```text
//!   source (made by the testbed's own code)      target
//!     any format, some over raw     ── tap-img ──►  any format, new, replaced, or written into
//!                                       │
//!        unchanged, whatever happens    │   status 0: shows the expected bytes, even after a power cut
//!                                       └── info, check, map, compare: true of the bytes that are there
//! ```
//!
//! The tools run as processes, with the functions that ship. The content of an image is read by the walker, which
//! shares no code with them.

mod disk;
mod merged;
mod remade;
mod reports;
mod resized;

use super::failures::passing_storage;
use super::shown::shown;
use super::until_cut::run_until_cut;
use crate::check::Invariant;
use crate::power::{CRASH_AT, power};
use crate::program::Printed;
use crate::scenario::Scenario;
use crate::world::World;
use clap::Parser as _;
use disk::{Disk, Made, Params};
use kernel_model::StorageConfig;
use kernel_model::faults::FaultPlan;
use sim::Draw;
use std::rc::Rc;
use tap_programs::img::{Cli, run};

pub use merged::{IMAGE_MERGED, MERGE_ROUND, PATTERN};
pub use remade::{IMAGE_REMADE, ROUND};
pub use resized::{IMAGE_RESIZED, RESIZE_ROUND};

/// Nothing fails permanently: each command must succeed.
pub static IMAGE_TOOLS: Scenario = Scenario {
    name: "image-tools",
    about: "tap-img makes, copies, maps, compares and checks images, with transient errors and short transfers; power cuts",
    storage: &passing_storage,
    body: &|w| Box::pin(tools(w)),
};

/// Everything may fail, but a command that reports success has succeeded.
pub static IMAGE_TOOLS_ERRORS: Scenario = Scenario {
    name: "image-tools-errors",
    about: "as image-tools, with I/O errors, no space and failed syncs: a command that exits with 0 has done its work",
    storage: &|_| StorageConfig { faults: FaultPlan::ALL, ..StorageConfig::default() },
    body: &|w| Box::pin(tools(w)),
};

/// The action of a command, one per epoch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Work {
    /// `convert` to a new file.
    Convert,
    /// `convert -n` into a file with other bytes.
    Into,
    /// `create`.
    Create,
    /// `create -b`.
    Overlay,
    /// `create -b` of a file onto itself, or onto one that it is based on: always refused.
    Onto,
}

const FIRST: [Work; 5] = [Work::Convert, Work::Into, Work::Create, Work::Overlay, Work::Onto];
const SECOND: [Work; 5] = [Work::Overlay, Work::Create, Work::Convert, Work::Into, Work::Onto];

/// Maximum number of operations before the power is cut: in a copy, and while an empty image is made.
const OPERATIONS: [u64; 2] = [400, 12];

const SIZES: [usize; 4] = [1 << 20, 587 * 512, 3 << 20, 512];

async fn tools(world: World) {
    let source = Disk::source(&world, &SIZES);
    reports::of_source(&world, &source).await;
    for (epoch, choice) in [("tool-first", FIRST), ("tool-second", SECOND)].into_iter().enumerate() {
        let work = world.setting(choice.0, &choice.1);
        one(&world, &source, work, epoch as u32).await;
        if world.verdict.is_broken() {
            return;
        }
    }
}

/// A `tap-img` that has ended.
struct Tool {
    status: u8,
    out: Vec<String>,
    err: Vec<String>,
}

impl Tool {
    /// Runs `tap-img` with these arguments. Kills it after `cut_after` more operations of the storage, if it runs that
    /// long, and then returns `None`.
    async fn run(world: &World, args: &[String], cut_after: Option<u64>) -> Option<Self> {
        let cli = Cli::try_parse_from(std::iter::once("tap-img".into()).chain(args.iter().cloned()));
        let cli = cli.unwrap_or_else(|e| panic!("{}: {e}", args.join(" ")));
        let process = world.kernel.process("tap-img", world.next_boot());
        let printed = Rc::new(Printed::default());
        let (host, console) = (process.clone(), Rc::clone(&printed));
        let main = async move { run(host, cli, &*console).await };
        let status = run_until_cut(world, &process, cut_after, main).await?;
        Some(Self { status, out: printed.out.take(), err: printed.err.take() })
    }

    /// Checks that it failed, with one line that says why.
    fn refused(&self, world: &World, args: &[String]) {
        let told = self.err.len() == 1 && self.err[0].starts_with("tap-img: failed to ");
        if self.status != 1 || !told {
            let (status, said) = (self.status, self.err.join("; "));
            let text = format!("tap-img {}: status {status}: {said}; it should refuse that", args.join(" "));
            world.fail(Invariant::I2, text);
        }
    }

    /// Whether the last line is the reason of a failure, and the others are warnings about damaged parts of a disk.
    fn says_why(&self) -> bool {
        let Some((last, others)) = self.err.split_last() else { return false };
        let warns = |line: &String| line.starts_with("tap-img: warning: ");
        last.starts_with("tap-img: failed to ") && others.iter().all(warns)
    }

    /// Whether it succeeded; if nothing fails permanently it must. A failure must say why.
    fn worked(&self, world: &World, args: &[String]) -> bool {
        let what = || format!("tap-img {}: status {}: {}", args.join(" "), self.status, self.err.join("; "));
        if self.status == 0 {
            return true;
        }
        if !world.errors_allowed() {
            world.fail(Invariant::I1, what());
        } else if !self.says_why() {
            world.fail(Invariant::I2, format!("{}, which does not end with one line of the reason", what()));
        }
        false
    }
}

/// One command that makes an image, perhaps a power cut, and the tools' reports about the image.
async fn one(world: &World, source: &Disk, work: Work, epoch: u32) {
    let made = match work {
        Work::Onto => {
            Made::onto(source, source.base.is_some() && world.setting("tools-onto-base", &[false, true]))
        }
        _ => Made::new(world, source, &Params::settings(world, work, epoch)),
    };
    let most = OPERATIONS[usize::from(!matches!(work, Work::Convert | Work::Into))];
    let cut = cut_after(world, epoch, |d| if d.below(3) == 0 { 1 + d.below(most) } else { 0 });
    let cut_then = || world.setting(CUT_AFTER[epoch as usize], &[true, false]);
    if make(world, source, &made, cut, cut_then).await {
        reports::check(world, source, &made, epoch).await;
        source.check_unchanged(world);
    }
}

/// The operation of the storage after which the power is cut, if it is cut at all.
fn cut_after(world: &World, epoch: u32, draw: impl FnOnce(&mut Draw) -> u64) -> Option<u64> {
    let entity = power(epoch);
    world.sim.name_entity(entity, || format!("power, epoch {epoch}"));
    Some(world.sim.decide(entity, &CRASH_AT, 0, draw)).filter(|after| *after > 0)
}

/// Runs a command that makes an image. The power is cut after `cut` operations, or with `cut_then` once the command has
/// ended. Returns whether the image was made and has the expected content.
async fn make(
    world: &World,
    source: &Disk,
    made: &Made,
    cut: Option<u64>,
    cut_then: impl FnOnce() -> bool,
) -> bool {
    let tool = Tool::run(world, &made.args, cut).await;
    let worked = match &tool {
        Some(tool) if made.refused => {
            tool.refused(world, &made.args);
            Some(false)
        }
        tool => tool.as_ref().map(|tool| tool.worked(world, &made.args)),
    };
    if let (Some(tool), Some(true)) = (&tool, worked)
        && tool.out.is_empty() == made.told
    {
        world.fail(Invariant::I2, format!("{} printed: {}", made.line(), tool.out.join("; ")));
    }
    if worked.is_none() || cut_then() {
        world.power_cut();
    }
    source.check_unchanged(world);
    world.count(|s| s.requests += 1);
    if worked != Some(true) && !world.verdict.is_broken() {
        disk::check_unfinished(world, made, source);
    }
    if worked != Some(true) || world.verdict.is_broken() {
        return false;
    }
    match shown(world, &made.spec, Some(source.below())) {
        Err((invariant, text)) => world.fail(invariant, format!("{}: {text}", made.line())),
        Ok(bytes) if bytes != made.view => {
            let at = bytes.iter().zip(&made.view).position(|(a, b)| a != b);
            let at = at.unwrap_or(bytes.len().min(made.view.len()));
            let text = format!(
                "{} exited with 0, but its image has other bytes from byte {at} on ({} bytes, not {})",
                made.line(),
                bytes.len(),
                made.view.len()
            );
            world.fail(Invariant::I1, text);
        }
        Ok(_) => return true,
    }
    false
}

const CUT_AFTER: [&str; 2] = ["cut-after-first", "cut-after-second"];
