//! Block status: what the extents of a disk are in each metadata context.

use super::command::Job;
use std::rc::Rc;
use tap_abi::nbd::{STATE_HOLE, STATE_ZERO};
use tap_core::{Extent, Node, NodeName, Source, nodes};
use tap_host::{Errno, Probe, SECTOR_BYTES, SectorRange, Tasks};

tap_host::listed! {
    pub(super) BUGS: Bug;
    NBD_STATUS_SOLID = "nbd-status-solid", "a server reports holes as data";
}

/// Metadata contexts that were chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Contexts {
    /// `base:allocation`.
    pub(super) allocation: bool,
    /// `qemu:allocation-depth`.
    pub(super) depth: bool,
}

impl Contexts {
    /// Whether `BLOCK_STATUS` may be asked for.
    pub(super) fn any(self) -> bool {
        self.allocation || self.depth
    }
}

/// Most extents in one reply, and of one query to a node.
const EXTENTS_MAX: usize = 1024;
/// Queries for one reply: a reply may be short, so that no other request waits long.
const LOOKS_MAX: usize = 32;

/// Runs of bytes with the same state, in each of the contexts; empty where a context was not chosen.
#[derive(Default)]
pub(super) struct Found {
    pub(super) allocation: Vec<(u64, u32)>,
    pub(super) depth: Vec<(u64, u32)>,
}

/// The levels of a chain of images by the names of their nodes, the topmost is 1.
struct Levels(Vec<(NodeName, u32)>);

impl Levels {
    fn below(node: &Rc<dyn Node>) -> Self {
        let named =
            nodes(Rc::clone(node)).into_iter().filter_map(|(above, node)| Some((node.name()?, above)));
        Self(named.map(|(name, above)| (name, above as u32 + 1)).collect())
    }

    /// The level that the bytes of `extent` come from, 0 for none.
    fn of(&self, extent: &Extent) -> u32 {
        let name = match &extent.source {
            Source::Nothing => return 0,
            // Reported as data: a client that reads it gets the error.
            Source::Node { name, .. } | Source::Unreadable { name, .. } => name.as_ref(),
        };
        let level = self.0.iter().find(|(known, _)| Some(known) == name);
        level.map_or(1, |(_, level)| *level)
    }
}

/// Appends a run, or makes the last one longer.
fn append(runs: &mut Vec<(u64, u32)>, len: u64, state: u32) {
    match runs.last_mut() {
        Some(last) if last.1 == state => last.0 += len,
        _ => runs.push((len, state)),
    }
}

/// The extents of `job`, or of a part from its start on: at most one of each context if `one`. Other tasks have their
/// turn in between.
pub(super) async fn extents<H: Tasks + Probe>(
    host: &H,
    node: &Rc<dyn Node>,
    job: &Job,
    contexts: Contexts,
    one: bool,
) -> Result<Found, Errno> {
    let range = job.range;
    let most = if one { 1 } else { EXTENTS_MAX };
    let levels = contexts.depth.then(|| Levels::below(node));
    let mut found = Found::default();
    let (mut at, end) = (range.start.0, range.start.0 + u64::from(range.count));
    let mut looks = 0;
    // One more than is sent, so that the last one sent is complete, unless the query ends early.
    while at < end && found.allocation.len().max(found.depth.len()) <= most && looks < LOOKS_MAX {
        if looks > 0 {
            host.yield_now().await;
        }
        looks += 1;
        let before = at;
        let asked = SectorRange::new(at, (end - at) as u32);
        // A client that wants one extent mostly gets it from the first two.
        let ask = if one && looks == 1 { 2 } else { EXTENTS_MAX };
        for extent in node.extents(asked, ask).await? {
            let hole = if extent.allocated || host.bug(&NBD_STATUS_SOLID) { 0 } else { STATE_HOLE };
            let state = hole | if extent.zero { STATE_ZERO } else { 0 };
            // Only the bytes that were asked for.
            let before = if at == range.start.0 { u64::from(job.skip) } else { 0 };
            let after = if at + extent.count == end { u64::from(job.cut) } else { 0 };
            let len = extent.count * SECTOR_BYTES - before - after;
            if contexts.allocation {
                append(&mut found.allocation, len, state);
            }
            if let Some(levels) = &levels {
                append(&mut found.depth, len, levels.of(&extent));
            }
            at += extent.count;
        }
        assert!(at <= end, "a node reports no more sectors than it is asked about");
        if at == before {
            return Err(Errno::EIO);
        }
    }
    found.allocation.truncate(most);
    found.depth.truncate(most);
    Ok(found)
}
