//! Connecting: mapping, binding, and taking over what a dead process left.

use crate::blkif::BlkifRing;
use crate::config::{ConnectError, RingConfig};
use crate::guest::Guest;
use crate::record::{EPOCH_AT, Identity, Record};
use crate::resume::{Plan, plan};
use crate::ring::{Parts, Ring};
use crate::serve::Target;
use std::rc::Rc;
use tap_abi::blkif::MAX_SEGMENTS;
use tap_abi::ring;
use tap_core::Node;
use tap_host::{
    BufPool, Event, Events, Grants, Log, PAGE_BYTES, Probe, SharedPage, SharedPages, Tasks, Time, cost_of,
};

tap_host::listed! {
    pub(super) BUGS: Bug;
    RESPONSE_TWICE = "response-twice",
        "a request that ended while the ring was reconnecting is answered twice";
    GRANT_LEAKED = "grant-leaked", "a mapped grant is not unmapped when connecting fails";
    LOST_AT_RECONNECT = "lost-at-reconnect",
        "requests in the in-flight record are not executed after a restart";
    BEGUN_STATUS_LOST = "begun-status-lost",
        "a failed answer that was begun when the process died arrives as a success";
    RESUMED_FORGOTTEN = "resumed-forgotten",
        "a request that was taken over from a dead process is no longer in the record";
    EPOCH_IGNORED = "epoch-ignored",
        "the record of an earlier ring with the same grant and port is taken for that of a new one";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    RECORD_RESUMED = "record-resumed", "a request was taken over from the in-flight record";
    RESPONSE_RESUMED = "response-resumed", "a response that a dead process had begun was completed";
}

impl<H> BlkifRing<H>
where
    H: Time + Tasks + Log + Probe + Grants + Events + SharedPages,
{
    /// Maps the ring and binds its channel. A ring with a matching record is continued where the dead process
    /// stopped; any other has to be fresh. Nothing is served before [`BlkifRing::run`].
    ///
    /// # Errors
    /// See [`ConnectError`]; after an error nothing stays mapped or bound.
    pub fn connect(host: H, config: RingConfig, node: Rc<dyn Node>) -> Result<Self, ConnectError> {
        let RingConfig { dom, ring_ref: gref, port, .. } = config;
        // Each request has one buffer, and a request that has one never asks for another.
        let stage = config.memory.stage(cost_of(MAX_SEGMENTS * PAGE_BYTES)).map_err(ConnectError::Memory)?;
        let pool = BufPool::of_stage(config.limits.buffer_bytes, stage);
        let page = host.map(dom, gref, true).map_err(|error| ConnectError::Map { dom, gref, error })?;
        let channel = match host.bind_interdomain(dom, port) {
            Ok(channel) => channel,
            Err(error) => {
                if host.bug(&GRANT_LEAKED) {
                    std::mem::forget(page);
                }
                return Err(ConnectError::Bind { dom, port, error });
            }
        };
        let (record, plan) = match &config.record {
            None => (None, fresh(&page).map(|()| None)?),
            Some(name) => {
                let region =
                    host.region(name).map_err(|error| ConnectError::Region { name: name.clone(), error })?;
                let record = Record::new(region);
                let plan = open_record(&host, &config, &page, &record).inspect_err(|error| {
                    // The record is of another ring. One that contradicts itself is kept for debugging.
                    if *error == ConnectError::InUse {
                        host.remove_region(name);
                    }
                })?;
                (Some(record), plan)
            }
        };
        host.log(Event::RingConnected { dom, vbd: config.vbd });
        let req_cons = plan.as_ref().map_or(0, |(plan, _)| plan.req_cons);
        let guest = Guest::new(&config, page, channel, req_cons);
        let target = Rc::new(Target::new(host, guest, node, config.vbd, config.read_only));
        let parts = Parts { target, vbd: config.vbd, limits: config.limits, record, pool };
        let ring = match plan {
            None => Ring::start(parts, 0, 0),
            Some((plan, rsp_prod)) => Self::resume(parts, plan, rsp_prod),
        };
        Ok(Self { ring, config })
    }

    fn resume(parts: Parts<H, Guest<H>>, plan: Plan, rsp_prod: u32) -> Ring<H, Guest<H>> {
        let host = parts.target.host.clone();
        if let Some(record) = &parts.record {
            // The last request may be noted but not counted in `req_cons`; after its answer no trace of it would be
            // left.
            record.set_req_cons(plan.req_cons);
        }
        let forget = parts.record.as_ref().filter(|_| host.bug(&RESUMED_FORGOTTEN));
        plan.taken.iter().for_each(|slot| forget.iter().for_each(|record| record.free(slot.number)));
        let ring = Ring::start(parts, plan.req_cons, rsp_prod);
        for slot in plan.given {
            if host.bug(&RESPONSE_TWICE) {
                ring.answer_again(&slot, 0);
            } else {
                ring.slot_is_free(&slot);
            }
        }
        for begun in plan.begun {
            host.mark(&RESPONSE_RESUMED);
            ring.answer_again(&begun.slot, if host.bug(&BEGUN_STATUS_LOST) { 0 } else { begun.status });
        }
        for slot in plan.taken {
            if !host.bug(&LOST_AT_RECONNECT) {
                host.mark(&RECORD_RESUMED);
                ring.take_up(slot);
            }
        }
        ring
    }
}

/// Finds out how to continue, or starts a record for a fresh ring.
fn open_record<H: Time + Probe, P: SharedPage, R: SharedPage>(
    host: &H,
    config: &RingConfig,
    page: &P,
    record: &Record<R>,
) -> Result<Option<(Plan, u32)>, ConnectError> {
    let RingConfig { dom, vbd, ring_ref, port, .. } = *config;
    let identity = |epoch| Identity { dom, vbd, ring_ref, port, epoch };
    let epoch = page.load_u32(EPOCH_AT);
    let found = record.identity().filter(|found| found.epoch == epoch || host.bug(&EPOCH_IGNORED));
    if found.is_some_and(|found| found.epoch != 0 && found == identity(found.epoch)) {
        let rsp_prod = page.load_u32(ring::RSP_PROD);
        let content = record.load().map_err(ConnectError::Record)?;
        return Ok(Some((plan(content, rsp_prod).map_err(ConnectError::Record)?, rsp_prod)));
    }
    fresh(page)?;
    // Any number that an earlier ring is unlikely to have had.
    let epoch = (host.now_ns() >> 10) as u32 | 1;
    record.reset(identity(epoch));
    page.store_u32(EPOCH_AT, epoch);
    Ok(None)
}

/// A ring that nobody has served: none of its requests was answered, and it has no epoch. A process that served it
/// before may have written responses over requests, and have died before it published the first of them.
fn fresh<P: SharedPage>(page: &P) -> Result<(), ConnectError> {
    let is_fresh = page.load_u32(ring::RSP_PROD) == 0 && page.load_u32(EPOCH_AT) == 0;
    if is_fresh { Ok(()) } else { Err(ConnectError::InUse) }
}
