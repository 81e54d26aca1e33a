//! The I/O priorities of disks, and whether all I/O has them.
//!
//! What is set for one disk holds for every operation that its tapdisk starts on one of its files, whoever opened that,
//! until the disk is closed; and for those of no other disk.

use crate::check::Invariant;
use crate::world::World;
use kernel_model::IoSeen;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use tap_host::IoPriority;

/// What a disk's files may have.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Allowed {
    /// One, unless it is being set.
    pub(super) any_of: Vec<Option<IoPriority>>,
    /// What somebody has asked for who has no answer yet.
    pub(super) asked: Option<Option<IoPriority>>,
    pub(super) is_open: bool,
    /// How often it was closed.
    pub(super) closes: u32,
}

impl Default for Allowed {
    fn default() -> Self {
        Self { any_of: vec![None], asked: None, is_open: true, closes: 0 }
    }
}

/// What the files of all disks may have, by the number of the disk.
#[derive(Clone)]
pub(super) struct Priorities {
    disks: Rc<RefCell<BTreeMap<u32, Allowed>>>,
    pub(super) refuses_realtime: bool,
}

/// The disk whose file this is; `None` for those of none.
fn disk_of(file: &str) -> Option<u32> {
    let name = file.strip_prefix("/images/")?;
    let numbered = ["disk", "base"].iter().find_map(|prefix| name.strip_prefix(prefix))?;
    let end = numbered.find(|char: char| !char.is_ascii_digit()).unwrap_or(numbered.len());
    numbered[..end].parse().ok()
}

impl Priorities {
    /// Looks at every operation from now on.
    pub(super) fn watch(world: &World) -> Self {
        let refuses_realtime = world.setting("realtime-refused", &[false, true]);
        if refuses_realtime {
            world.kernel.refuse_realtime();
        }
        let watching = Self { disks: Rc::default(), refuses_realtime };
        let (own, reporter) = (watching.clone(), world.clone());
        world.kernel.on_io(move |seen: IoSeen<'_>| {
            let Some(number) = disk_of(seen.file).filter(|_| seen.node.name() == "tapdisk") else { return };
            let allowed = own.of(number);
            if !allowed.any_of.contains(&seen.priority) {
                let shown =
                    |priority: &Option<IoPriority>| priority.map_or("none".into(), |one| one.to_string());
                let (has, may): (_, Vec<String>) =
                    (shown(&seen.priority), allowed.any_of.iter().map(shown).collect());
                let text = format!("a {} of a file of disk {number} has the priority {has}", seen.what);
                let text = format!("{text}, and the disk has {} ({})", may.join(" or "), seen.file);
                reporter.fail(Invariant::U2, text);
            }
        });
        watching
    }

    pub(super) fn of(&self, number: u32) -> Allowed {
        self.disks.borrow().get(&number).cloned().unwrap_or_default()
    }

    pub(super) fn change(&self, number: u32, change: impl FnOnce(&mut Allowed)) {
        change(self.disks.borrow_mut().entry(number).or_default());
    }

    /// A new tapdisk has the disks.
    pub(super) fn begin(&self) {
        self.disks.take();
    }

    /// The disk is being closed.
    pub(super) fn closing(&self, number: u32) {
        self.change(number, |disk| disk.is_open = false);
    }

    /// It is closed, and with that has no priority, unless one comes that is on its way.
    pub(super) fn closed(&self, number: u32) {
        self.change(number, |disk| {
            disk.any_of = std::iter::once(None).chain(disk.asked).collect();
            disk.closes += 1;
        });
    }

    pub(super) fn opened(&self, number: u32) {
        self.change(number, |disk| disk.is_open = true);
    }
}
