//! What a disk has done.

use super::{ControlledHost, Vbd};
use std::collections::BTreeMap;
use tap_control::Refusal;
use tap_control::json;
use tap_core::{KINDS, KindMeasures, Measures, Node as _};
use tap_host::{IoKind, SECTOR_BYTES};

impl<H: ControlledHost> Vbd<H> {
    /// Its counters.
    pub(in crate::control) fn stats(&self) -> Result<json::Stats, Refusal> {
        let open = self.opened(&format!("count what minor {} did", self.minor))?;
        let (stats, name) = (open.disk.stats(), open.name.borrow().clone());
        let (slot, secs) = (open.disk.slot(), [stats.sectors_read, stats.sectors_written]);
        Ok(json::Stats {
            minor: self.minor,
            name: name.clone(),
            secs,
            images: [json::ImageStats { name, hits: secs }],
            state: self.state(Some(&open)),
            size_sectors: slot.info().size_sectors,
            read_only: slot.info().read_only,
            in_flight: slot.in_flight() as u64,
            waiting: slot.waiting() as u64,
            reads: stats.reads,
            writes: stats.writes,
            flushes: stats.flushes,
            zeroes: stats.zeroes,
            discards: stats.discards,
            sectors_zeroed: stats.sectors_zeroed,
            sectors_discarded: stats.sectors_discarded,
            merged: stats.merged,
            retries: stats.retries,
            errors: stats.errors,
            nbd_clients: open.server.connections() as u64,
            operations: operations(&slot.measures()),
        })
    }
}

fn operations(measures: &Measures) -> BTreeMap<String, json::Operation> {
    let of = |kind: IoKind| {
        let KindMeasures { in_flight, errors, sectors, latency } = *measures.of(kind);
        let (sum_ns, max_ns) = (latency.sum_ns, latency.max_ns);
        let buckets = latency.buckets().filter(|(_, count)| *count > 0).collect();
        json::Operation {
            requests: latency.count(),
            bytes: sectors * SECTOR_BYTES,
            errors,
            in_flight,
            latency: json::Latency { sum_ns, max_ns, buckets },
        }
    };
    KINDS.map(|kind| (kind.to_string(), of(kind))).into()
}
