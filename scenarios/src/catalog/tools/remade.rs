//! Small images made again and again, over what is there: each command may be stopped anywhere, and everything may
//! fail.
//!
//! What a command over an old image, or over a file that it is made from, must not do shows in a few operations out of
//! a dozen; so there are several such commands in one run, and none that takes long.

use super::disk::{CLUSTERS, CREWS, Disk, Made, ON_DEVICE, Old, SPARSE, Wish};
use super::{Work, cut_after, make, reports};
use crate::formats::Kind;
use crate::scenario::Scenario;
use crate::world::World;
use kernel_model::StorageConfig;
use kernel_model::faults::FaultPlan;
use sim::{Draw, Entity, Label};

/// As `image-tools-errors`, in small.
pub static IMAGE_REMADE: Scenario = Scenario {
    name: "image-remade",
    about: "tap-img makes small images again and again over what is there, stopped anywhere; everything may fail",
    storage: &|_| StorageConfig { faults: FaultPlan::ALL, ..StorageConfig::default() },
    body: &|w| Box::pin(remade(w)),
};

/// A command: what it does, onto what, of which format, how large its clusters are, how it copies, and whether the
/// power stays on after it.
pub static ROUND: Label = Label::packed("remade-round", "is run (settings {})", &[3, 2, 1, 2, 2, 2, 1]);

const ROUNDS: u32 = 16;
const SIZES: [usize; 4] = [32 << 10, 512, 67 * 512, 192 << 10];

/// The fields of a [`ROUND`].
struct Round([u64; 7]);

impl Round {
    /// Most make an image from nothing, or have to be refused.
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

/// What a round makes; `None` if there is none. `left` is the path for [`Old::Left`].
fn made(
    world: &World,
    source: &Disk,
    n: u32,
    fields: [u64; 6],
    left: Option<u32>,
) -> Option<(Work, u32, Made)> {
    let [kind, old, format, cluster, crew, sparse] = fields;
    let work = match kind {
        1 => Work::Convert,
        2 => Work::Into,
        3 => Work::Create,
        4 => Work::Overlay,
        5 | 6 => return Some((Work::Onto, n, Made::onto(source, kind == 6))),
        _ => return None,
    };
    let old = pick(&[Old::New, Old::Shorter, Old::Longer, Old::Left], old);
    let wish = Wish {
        work,
        place: left.filter(|_| old == Old::Left).unwrap_or(n),
        model: if work == Work::Overlay { Kind::mapped(true) } else { pick(&Kind::plain(), format) }.model,
        crew: pick(&CREWS, crew),
        sparse: pick(&SPARSE, sparse),
        cluster: pick(&CLUSTERS, cluster),
        old,
        device: world.setting(ON_DEVICE, &[false, true]),
        quiet: false,
    };
    Some((work, wish.place, Made::new(world, source, &wish)))
}

async fn remade(world: World) {
    let source = Disk::source(&world, &SIZES);
    // The path that the last command was to make something at, if the power has been cut since.
    let mut left = None;
    for n in 0..ROUNDS {
        let entity = Entity::WORLD.child("tool-round", u64::from(n));
        let Round([fields @ .., stays_on]) = Round::unpack(world.sim.decide(entity, &ROUND, 0, Round::draw));
        let Some((work, place, made)) = made(&world, &source, n, fields, left) else { continue };
        world.sim.name_entity(entity, || made.line());
        // What begins with an empty image ends after few operations.
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
