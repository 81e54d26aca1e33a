//! What a report needs besides trace and decisions, taken from a world while it exists.

use super::images::{Images, images};
use crate::world::World;
use sim::{Sim, Span, SpanId};
use std::cell::RefCell;
use std::collections::BTreeMap;
use tap_host::{Event, SECTOR_BYTES, SectorRange, VbdId};

/// Power cuts of which a report has the images.
const CUTS_MAX: usize = 6;

/// From now on requests of rings are spans.
pub(crate) fn record_rings(world: &World) {
    if !world.sim.keeps_lines() {
        return;
    }
    let (sim, open) = (world.sim.clone(), RefCell::<BTreeMap<(VbdId, u64), SpanId>>::default());
    world.kernel.on_event(move |_, event| match event {
        Event::RequestTaken { vbd, id, kind, range } => {
            let span = begin(&sim, vbd, format!("{kind} {range}, #{id}"), range);
            open.borrow_mut().insert((vbd, id), span);
        }
        Event::RequestResumed { vbd, id, range } => {
            let span = begin(&sim, vbd, format!("{range}, #{id}, from the record"), range);
            open.borrow_mut().insert((vbd, id), span);
        }
        Event::RequestDone { vbd, id, result } => {
            if let Some(span) = open.borrow_mut().remove(&(vbd, id)) {
                let outcome = || result.map_or_else(|e| format!("failed with {e:?}"), |()| "ok".into());
                sim.end_span(span, outcome);
            }
        }
        _ => {}
    });
}

fn begin(sim: &Sim, vbd: VbdId, name: String, range: SectorRange) -> SpanId {
    let start = range.start.0 * SECTOR_BYTES;
    let bytes = start..start + range.len_bytes();
    sim.begin_span(|| Span {
        track: format!("ring of {vbd}"),
        kind: "request",
        name,
        bytes,
        ..Span::default()
    })
}

/// The images at each power cut so far, at the last ones if there were many; without one, now.
pub(crate) fn images_of(world: &World) -> Vec<Images> {
    if !world.sim.keeps_lines() {
        return Vec::new();
    }
    let sector = world.verdict.failure().and_then(|f| f.about.sector);
    let cuts = world.storage.cuts();
    if cuts.is_empty() {
        return vec![images(&world.storage.state_now(), None, sector)];
    }
    let numbered = cuts.iter().enumerate().skip(cuts.len().saturating_sub(CUTS_MAX));
    numbered.map(|(n, cut)| images(cut, Some(n + 1), sector)).collect()
}
