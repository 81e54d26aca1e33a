//! Small images made repeatedly over existing files: each command may be stopped anywhere, and everything may fail.
//!
//! The mistakes of a command over an old image, or over a file that it is based on, show only within a few of its dozen
//! operations; so one run has several such commands, and none takes long.

use super::disk::{CLUSTERS, Disk, Made, ON_DEVICE, Old, Params, SPARSE, TASKS};
use super::{Work, cut_after, make, reports};
use crate::formats::Kind;
use crate::scenario::Scenario;
use crate::world::World;
use kernel_model::StorageConfig;
use kernel_model::faults::FaultPlan;
use sim::{Draw, Entity, Label};

/// A smaller version of `image-tools-errors`.
pub static IMAGE_REMADE: Scenario = Scenario {
    name: "image-remade",
    about: "tap-img makes small images again and again over existing files, stopped anywhere; everything may fail",
    storage: &|_| StorageConfig { faults: FaultPlan::ALL, ..StorageConfig::default() },
    body: &|w| Box::pin(remade(w)),
};

/// A command: its action, what is at the target, the format, the cluster size, the options of a copy, and whether the
/// power stays on afterwards.
pub static ROUND: Label = Label::packed("remade-round", "is run (settings {})", &[3, 2, 1, 2, 2, 2, 1]);

const ROUNDS: u32 = 16;
const SIZES: [usize; 4] = [32 << 10, 512, 67 * 512, 192 << 10];

/// The fields of a [`ROUND`].
struct Round([u64; 7]);

impl Round {
    /// Most commands make a new image, or must be refused.
    fn draw(d: &mut Draw) -> u64 {
        let work = [0, 1, 2, 3, 3, 3, 4, 4, 4, 5, 5, 6][d.below(12) as usize];
        let fields = [(d.below(4), 2), (d.below(2), 1), (d.below(3), 2), (d.below(3), 2), (d.below(4), 2)];
        let mut packed = work;
        let mut at = 3;
        for (value, bits) in fields {
            packed |= value << at;
            at += bits;
        }
        packed | u64::from(d.below(4) == 0) << at
    }

    fn unpack(mut value: u64) -> Self {
        let mut take = |bits: u32| {
            let field = value & ((1 << bits) - 1);
            value >>= bits;
            field
        };
        Self([3, 2, 1, 2, 2, 2, 1].map(&mut take))
    }
}

fn pick<T: Copy>(choices: &[T], value: u64) -> T {
    choices[value as usize % choices.len()]
}

/// The command of a round; `None` if there is none. `left` is the path for [`Old::Left`].
fn made(
    world: &World,
    source: &Disk,
    n: u32,
    fields: [u64; 6],
    left: Option<u32>,
) -> Option<(Work, u32, Made)> {
    let [kind, old, format, cluster, tasks, sparse] = fields;
    let work = match kind {
        1 => Work::Convert,
        2 => Work::Into,
        3 => Work::Create,
        4 => Work::Overlay,
        5 | 6 => return Some((Work::Onto, n, Made::onto(source, kind == 6))),
        _ => return None,
    };
    let old = pick(&[Old::New, Old::Shorter, Old::Longer, Old::Left], old);
    let params = Params {
        work,
        place: left.filter(|_| old == Old::Left).unwrap_or(n),
        model: if work == Work::Overlay { Kind::mapped(true) } else { pick(&Kind::plain(), format) }.model,
        tasks: pick(&TASKS, tasks),
        sparse: pick(&SPARSE, sparse),
        cluster: pick(&CLUSTERS, cluster),
        old,
        device: world.setting(ON_DEVICE, &[false, true]),
        quiet: false,
    };
    Some((work, params.place, Made::new(world, source, &params)))
}

async fn remade(world: World) {
    let source = Disk::source(&world, &SIZES);
    // The target of the last command, if the power has been cut since.
    let mut left = None;
    for n in 0..ROUNDS {
        let entity = Entity::WORLD.child("tool-round", u64::from(n));
        let Round([fields @ .., stays_on]) = Round::unpack(world.sim.decide(entity, &ROUND, 0, Round::draw));
        let Some((work, place, made)) = made(&world, &source, n, fields, left) else { continue };
        world.sim.name_entity(entity, || made.line());
        // A command that makes an empty image takes few operations.
        let most = if matches!(work, Work::Create | Work::Overlay) { 8 } else { 24 };
        let cut = cut_after(&world, n, |d| if d.below(4) > 0 { 1 + d.below(most) } else { 0 });
        if make(&world, &source, &made, cut, || stays_on == 0).await {
            reports::brief(&world, &source, &made).await;
        }
        if world.verdict.is_broken() {
            return;
        }
        if work != Work::Onto {
            left = (stays_on == 0).then_some(place);
        }
    }
}
