//! A guest at the other end: a granted page, an event channel, and data in granted pages that the hypervisor copies.

use crate::config::RingConfig;
use crate::peer::{Bad, Peer};
use smallvec::SmallVec;
use std::cell::Cell;
use tap_abi::blkif::{BlkifRequest, ENTRY_BYTES, MAX_SEGMENTS};
use tap_abi::ring::{REQ_EVENT, REQ_PROD, RSP_EVENT, needs_notify};
use tap_host::{
    DomId, Errno, EventChannel, Events, GrantRef, GrantSegment, Grants, Probe, SECTOR_BYTES, SharedPage,
};

tap_host::listed! {
    pub(super) BUGS: Bug;
    SEGMENT_FIRST_IGNORED = "segment-first-ignored",
        "the data of a segment is taken from the start of its page";
    COPY_IN_FIRST = "copy-in-first",
        "a failure to copy the first segment of a write from the guest goes unnoticed";
    NO_SECOND_LOOK = "no-second-look", "the ring is not checked for requests again after asking for an event";
    ARM_WITHOUT_BARRIER = "arm-without-barrier",
        "there is no barrier between asking for an event and the last look at the requests";
    PUBLISH_WITHOUT_BARRIER = "publish-without-barrier",
        "there is no barrier between publishing responses and checking whether an event is due";
}

/// The guest of a blkif ring.
pub(crate) struct Guest<H: Grants + Events> {
    dom: DomId,
    page: H::Page,
    channel: H::Channel,
    /// The request index at which the guest will raise an event.
    armed: Cell<u32>,
}

impl<H: Grants + Events> Guest<H> {
    /// The guest of `config`, from whose ring the requests before `req_cons` were taken.
    pub(crate) fn new(config: &RingConfig, page: H::Page, channel: H::Channel, req_cons: u32) -> Self {
        // Those to come are greater: the event index is written at the first sleep.
        Self { dom: config.dom, page, channel, armed: Cell::new(req_cons) }
    }

    fn segments(host: &impl Probe, request: &BlkifRequest) -> SmallVec<[GrantSegment; MAX_SEGMENTS]> {
        let whole = host.bug(&SEGMENT_FIRST_IGNORED);
        let segments = request.segments().iter();
        segments
            .map(|s| GrantSegment {
                gref: GrantRef(s.gref),
                offset: if whole { 0 } else { u16::from(s.first) * SECTOR_BYTES as u16 },
                len: u16::from(s.count()) * SECTOR_BYTES as u16,
            })
            .collect()
    }
}

impl<H: Grants + Events + Probe> Peer<H> for Guest<H> {
    type Page = H::Page;
    type Request = BlkifRequest;
    const ID_IS_SLOT: bool = false;

    fn page(&self) -> &H::Page {
        &self.page
    }

    fn parse(&self, entry: &[u8; ENTRY_BYTES]) -> Result<BlkifRequest, Bad> {
        BlkifRequest::parse(entry).map_err(Bad::Answer)
    }

    fn wait(&self) -> impl Future<Output = Result<(), Errno>> {
        self.channel.wait()
    }

    fn ask(&self, host: &H, next: u32) -> bool {
        let event = next.wrapping_add(1);
        if self.armed.replace(event) != event {
            self.page.store_u32(REQ_EVENT, event);
            if !host.bug(&ARM_WITHOUT_BARRIER) {
                self.page.full_barrier();
            }
        }
        self.page.load_u32(REQ_PROD) == next || host.bug(&NO_SECOND_LOOK)
    }

    fn is_due(&self, host: &H, old: u32, new: u32) -> bool {
        if !host.bug(&PUBLISH_WITHOUT_BARRIER) {
            self.page.full_barrier();
        }
        needs_notify(old, new, self.page.load_u32(RSP_EVENT))
    }

    fn call(&self) {
        self.channel.notify();
    }

    fn copy_in(&self, host: &H, request: &BlkifRequest, private: &mut [u8]) -> Result<(), Errno> {
        let segments = Self::segments(host, request);
        let copied = host.copy_in(self.dom, &segments, private);
        if copied.is_err() && host.bug(&COPY_IN_FIRST) {
            return host.copy_in(self.dom, &segments[1..], &mut private[usize::from(segments[0].len)..]);
        }
        copied
    }

    fn copy_out(&self, host: &H, request: &BlkifRequest, private: &[u8]) -> Result<(), Errno> {
        host.copy_out(self.dom, &Self::segments(host, request), private)
    }
}
