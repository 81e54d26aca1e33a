//! Disks get I/O priorities by tap-ctl, beside everything else.

use super::Disk;
use super::admin::{Admin, Tapdisk};
use crate::check::Invariant;
use crate::world::World;
use sim::{Entity, Label};
use std::rc::Rc;
use tap_core::wait::{Receiver, joined};
use tap_host::{Errno, IoPriority};

/// What is set for a disk: after how many nanoseconds, in 24 bits, and which.
pub static PRIORITIES: Label = Label::packed(
    "control-priority",
    "the disk gets its I/O priority {n} after so many ns, and this one ({})",
    &[24, 3],
);

/// How often a disk gets one in a life of tapdisk, at most.
const TIMES: u32 = 4;
/// What may be asked for, the third only perhaps with success, and the last one never. The first is to look only.
const ASKED: [&str; 7] =
    ["", "idle", "best-effort:7", "realtime:2", "best-effort:0", "none", "best-effort:8"];

/// Starts whoever sets priorities in one life of tapdisk.
pub(super) fn start(
    world: &World,
    admin: &Rc<Admin>,
    tapdisk: &Tapdisk,
    (disk, epoch): (&Rc<Disk>, u32),
) -> Option<Receiver<()>> {
    let who = u64::from(epoch << 8 | disk.number);
    let entity = Entity::WORLD.child("priorities", who);
    world
        .sim
        .name_entity(entity, || format!("whoever sets priorities of disk {}, epoch {epoch}", disk.number));
    let values: Vec<u64> = (0..TIMES)
        .map(|n| world.sim.decide(entity, &PRIORITIES, n, |d| d.magnitude(24) | d.below(8) << 24))
        .filter(|value| value >> 24 != 0)
        .collect();
    if values.is_empty() {
        return None;
    }
    let sets = Sets {
        world: world.clone(),
        admin: Rc::clone(admin),
        tapdisk: tapdisk.clone(),
        disk: Rc::clone(disk),
    };
    let (task, end) = joined(async move {
        for value in values {
            sets.world.sim.sleep_ns(value & 0xff_ffff).await;
            if sets.one(ASKED[(value >> 24) as usize - 1]).await.is_none() {
                return;
            }
        }
    });
    world.sim.spawn("priorities", who, task);
    Some(end)
}

/// Whoever sets priorities of one disk.
struct Sets {
    world: World,
    admin: Rc<Admin>,
    tapdisk: Tapdisk,
    disk: Rc<Disk>,
}

impl Sets {
    /// Sets one. `None` once tapdisk has died.
    async fn one(&self, asked: &'static str) -> Option<()> {
        let (priorities, number) = (&self.admin.priorities, self.disk.number);
        if !self.tapdisk.is_alive() {
            return None;
        }
        let wanted = asked.parse::<IoPriority>();
        let sets = wanted.is_ok() || asked == "none";
        let wanted = wanted.ok();
        let before = priorities.of(number);
        if sets {
            priorities.change(number, |disk| {
                disk.any_of.push(wanted);
                disk.asked = Some(wanted);
            });
        }
        let option = if asked.is_empty() { String::new() } else { format!("--ionice {asked}") };
        let outcome = self.admin.ctl(&format!("set {} {option}", self.disk.at(&self.tapdisk))).await;
        if !self.tapdisk.is_alive() {
            return None;
        }
        priorities.change(number, |disk| disk.asked = None);
        let after = priorities.of(number);
        // Closed meanwhile, it may have got the priority before or after that.
        let apart = before.closes != after.closes;
        match i32::from(outcome.status) {
            0 if apart && sets => priorities.change(number, |disk| disk.any_of = vec![None, wanted]),
            0 if sets => priorities.change(number, |disk| disk.any_of = vec![wanted]),
            _ if sets && apart => priorities.change(number, |disk| disk.any_of = vec![None]),
            _ if sets => priorities.change(number, |disk| disk.any_of = before.any_of.clone()),
            _ => {}
        }
        let right = match Errno(outcome.status.into()) {
            Errno(0) => sets || asked.is_empty(),
            Errno::EPERM => wanted.is_some_and(IoPriority::is_realtime) && priorities.refuses_realtime,
            Errno::EINVAL => !sets && !asked.is_empty() || !before.is_open || !after.is_open || apart,
            // Its close was forced.
            Errno::EBUSY => !before.is_open || !after.is_open || apart,
            // Others wait for the disk.
            Errno::EAGAIN => true,
            _ => false,
        };
        let shown = priorities.of(number).any_of;
        let shown = match shown[..] {
            [only] => Some(format!("ionice={}", only.map_or("none".into(), |one| one.to_string()))),
            _ => None,
        };
        let differs = outcome.status == 0 && shown.is_some_and(|shown| outcome.out != [shown]);
        if !right || differs {
            let text = format!("tap-ctl set {option} ended with {outcome:?}, and the disk has {after:?}");
            self.world.fail(Invariant::U1, text);
        }
        Some(())
    }
}
