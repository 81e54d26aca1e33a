//! What `tap-ctl top` shows of a disk, beside its counters.

use super::Disk;
use super::verbs::{Act, Acts};
use crate::check::Invariant;
use serde_json::Value;
use std::rc::Rc;
use tap_core::wait::joined;

/// How long tap-ctl gets to look at the counters for the first time, in nanoseconds.
const FIRST_LOOK_NS: u64 = 10_000_000;
/// Shortest interval, in nanoseconds.
const INTERVAL_NS: u64 = 1_000_000_000;

impl Acts<'_> {
    /// Of an interval no more is shown than was done since before it.
    pub(super) async fn shown(&self, disk: &Disk) -> Act {
        let before = self.stats_in_json(disk).await?;
        let shown = self.admin.expect(self.tapdisk, &self.top_line(), 0).await?;
        self.compare(disk, &shown.out, &before).await
    }

    /// The same, while the disk is closed and opened again: its counters begin anew.
    pub(super) async fn shown_anew(&self, disk: &Disk, hold_ns: u64, paused: bool) -> Act {
        let (admin, line) = (Rc::clone(self.admin), self.top_line());
        let (task, shown) = joined(async move { admin.ctl(&line).await });
        self.world.sim.spawn("top", 0, task);
        let began_ns = self.world.sim.now_ns();
        self.world.sim.sleep_ns(FIRST_LOOK_NS).await;
        let reopened = self.reopen(disk, hold_ns, paused).await;
        // Otherwise tap-ctl may have looked for the second time before it was closed.
        let in_time = self.world.sim.now_ns() - began_ns < INTERVAL_NS;
        let shown = shown.await;
        reopened?;
        if !self.tapdisk.is_alive() {
            return None;
        }
        match shown {
            Some(shown) if shown.status == 0 && in_time => self.compare(disk, &shown.out, &Value::Null).await,
            Some(shown) if shown.status == 0 => Some(()),
            other => {
                self.world.fail(Invariant::U1, format!("tap-ctl top ended with {other:?}"));
                None
            }
        }
    }

    fn top_line(&self) -> String {
        format!("top -p {} -i 1 -n 1 --json", self.tapdisk.pid())
    }

    /// `out` is what was shown of an interval that began after the counters were `before`.
    async fn compare(&self, disk: &Disk, out: &[String], before: &Value) -> Act {
        let after = self.stats_in_json(disk).await?;
        let shown: Value = out.first().and_then(|line| serde_json::from_str(line).ok()).unwrap_or_default();
        let all = shown["disks"].as_array();
        let own = all
            .and_then(|all| all.iter().find(|one| one["minor"].as_u64() == disk.minor.get().map(u64::from)));
        // It may have been closed at the second look.
        let right = all.is_some() && own.is_none_or(|own| is_within(own, before, &after) == Some(true));
        if !right {
            let text =
                format!("tap-ctl top shows {shown}, with the counters {before} before and {after} after");
            self.world.fail(Invariant::U1, text);
        }
        Some(())
    }
}

/// Whether a disk did what is shown between two looks at its counters.
fn is_within(shown: &Value, before: &Value, after: &Value) -> Option<bool> {
    let mut right = shown["interval_ns"].as_u64()? >= INTERVAL_NS;
    for kind in ["read", "write", "flush"] {
        let own = &shown[kind];
        for field in ["requests", "bytes"] {
            let old = before["operations"][kind][field].as_u64().unwrap_or(0);
            right &= own[field].as_u64()? <= after["operations"][kind][field].as_u64()? - old;
        }
        let (half, most) = (own["p50_ns"].as_u64(), own["p99_ns"].as_u64());
        right &= half <= most
            && half.is_some() == (own["requests"].as_u64()? > 0)
            && half.is_some() == most.is_some();
    }
    Some(right)
}
