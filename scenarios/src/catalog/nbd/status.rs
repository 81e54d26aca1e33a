//! What a server says of the space of a disk, beside what the disk itself says.

use crate::check::Invariant;
use crate::world::World;
use tap_core::Node;
use tap_host::SectorRange;

/// What a server says of the space of its idle disk is what the disk says.
pub(super) async fn check_status(world: &World, client: &dyn Node, disk: &dyn Node, size_sectors: u64) {
    let (told, known) = (states(client, size_sectors).await, states(disk, size_sectors).await);
    if told.is_some() && known.is_some() && told != known {
        let text = format!("a disk that is {known:?} is said to be {told:?} (end, has space, is zeros)");
        world.fail(Invariant::N2, text);
    }
}

/// Of each run of equal sectors where it ends, whether it has space, and whether it is zeros; `None` where a look
/// fails.
async fn states(node: &dyn Node, size_sectors: u64) -> Option<Vec<(u64, bool, bool)>> {
    let (mut runs, mut at): (Vec<(u64, bool, bool)>, u64) = (Vec::new(), 0);
    while at < size_sectors {
        let found = node.extents(SectorRange::new(at, (size_sectors - at) as u32), 64).await.ok()?;
        if found.is_empty() || found.iter().any(|extent| extent.source.error().is_some()) {
            return None;
        }
        for extent in found {
            at += extent.count;
            match runs.last_mut() {
                Some(last) if (last.1, last.2) == (extent.allocated, extent.zero) => last.0 = at,
                _ => runs.push((at, extent.allocated, extent.zero)),
            }
        }
    }
    Some(runs)
}
