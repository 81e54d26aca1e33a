//! A well-behaved front end with a workload that checks what comes back.

use sim::{Sim, mix2};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use tap_abi::blkif::{BlkifOp, BlkifRequest, RawResponse, Segment};
use tap_host::{Budget, DomId, VbdId};
use tap_ring::{Limits, RingConfig};
use xen_model::{GrantedPage, GuestRing, XenPort};

/// Sectors that one slot of the workload has for itself.
pub const SECTORS_PER_SLOT: u64 = 16;

pub struct Front {
    pub guest: XenPort,
    pub ring: GuestRing,
    pub pages: Vec<GrantedPage>,
    /// What the workload's part of the disk holds.
    pub expected: RefCell<Vec<u8>>,
}

pub fn ring_config(front: &Front, record: Option<&str>) -> RingConfig {
    RingConfig {
        dom: front.guest.dom(),
        vbd: VbdId(51712),
        ring_ref: front.ring.ring_ref(),
        port: front.ring.event_port(),
        record: record.map(str::to_string),
        limits: Limits::default(),
        read_only: false,
        memory: Budget::default(),
    }
}

impl Front {
    pub fn new(guest: &XenPort) -> Rc<Self> {
        let pages = (0..32).map(|_| GrantedPage::new(guest, DomId(0), false).unwrap()).collect();
        let ring = GuestRing::new(guest, DomId(0)).unwrap();
        let expected = RefCell::new(vec![0; 32 * SECTORS_PER_SLOT as usize * 512]);
        Rc::new(Self { guest: guest.clone(), ring, pages, expected })
    }

    pub fn segment(&self, page: usize, first: u8, last: u8) -> Segment {
        Segment { gref: self.pages[page].gref.0, first, last }
    }

    /// Sends one request and waits for its answer.
    pub async fn call(&self, request: &BlkifRequest) -> RawResponse {
        self.call_raw(&request.encode()).await
    }

    pub async fn call_raw(&self, entry: &[u8; 112]) -> RawResponse {
        self.ring.put_raw(entry);
        self.ring.publish();
        let response = self.ring.next().await.unwrap();
        let bytes = zerocopy::IntoBytes::as_bytes(&response).to_vec();
        assert!(bytes[9] == 0 && bytes[12..].iter().all(|b| *b == 0), "padding is not zero: {bytes:?}");
        response
    }

    pub async fn status(&self, request: &BlkifRequest) -> i16 {
        let response = self.call(request).await;
        assert_eq!((response.id.get(), response.op), (request.id, request.op as u8));
        response.status.get()
    }
}

struct Expected {
    slot: usize,
    read: Option<(u64, u64)>,
}

/// Keeps `depth` requests on the ring until `count` are answered. Each slot has sectors and a page of its own; what
/// is read must be what was written last.
pub async fn workload(sim: Sim, front: Rc<Front>, count: u64, depth: usize, seed: u64) -> Result<(), String> {
    let mut free: Vec<usize> = (0..depth).rev().collect();
    let mut waiting: BTreeMap<u64, Expected> = BTreeMap::new();
    let (mut sent, mut answered) = (0, 0);
    while answered < count {
        while sent < count
            && let Some(slot) = free.pop()
        {
            let bits = mix2(seed, sent);
            let (id, request) = make(&front, slot, sent, bits);
            waiting.insert(id, request.1);
            assert!(front.ring.put(&request.0));
            sent += 1;
            if bits.is_multiple_of(3) {
                break;
            }
        }
        front.ring.publish();
        let mut next = Some(front.ring.next().await.map_err(|e| e.to_string())?);
        while let Some(response) = next {
            let expected = waiting.remove(&response.id.get()).ok_or("an answer without a request")?;
            if response.status.get() != 0 {
                return Err(format!("request {:#x} failed", response.id.get()));
            }
            if let Some((sector, sectors)) = expected.read {
                let mut got = vec![0; sectors as usize * 512];
                front.pages[expected.slot].page.read(0, &mut got);
                let at = sector as usize * 512;
                if got != front.expected.borrow()[at..at + got.len()] {
                    return Err(format!("read of {sector}+{sectors} returned other data"));
                }
            }
            free.push(expected.slot);
            answered += 1;
            next = front.ring.take().map_err(|e| e.to_string())?;
        }
    }
    // Leave time for a surplus answer.
    sim.sleep_ns(10_000_000).await;
    match front.ring.take() {
        Ok(None) => Ok(()),
        _ => Err("a surplus answer".into()),
    }
}

fn make(front: &Front, slot: usize, nth: u64, bits: u64) -> (u64, (BlkifRequest, Expected)) {
    let id = bits << 16 | nth;
    let sectors = 1 + (bits >> 8) % 8;
    let sector = slot as u64 * SECTORS_PER_SLOT + (bits >> 16) % (SECTORS_PER_SLOT - sectors + 1);
    let segment = front.segment(slot, 0, sectors as u8 - 1);
    let (op, read) = match (bits >> 32) % 8 {
        0 => (BlkifOp::Flush, None),
        1..4 => (BlkifOp::Read, Some((sector, sectors))),
        _ => (BlkifOp::Write, None),
    };
    let bytes = sectors as usize * 512;
    if op == BlkifOp::Write {
        let pattern: Vec<u8> = (0..bytes).map(|i| mix2(bits, i as u64 / 16) as u8).collect();
        front.pages[slot].page.write(0, &pattern);
        front.expected.borrow_mut()[sector as usize * 512..][..bytes].copy_from_slice(&pattern);
    } else {
        front.pages[slot].page.write(0, &vec![0xee; bytes]);
    }
    let segments = if op == BlkifOp::Flush { &[][..] } else { &[segment][..] };
    (id, (BlkifRequest::new(id, op, sector, segments).unwrap(), Expected { slot, read }))
}
