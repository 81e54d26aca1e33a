//! The kernel at the other end: the ring of a blktap2 device, and data in pages that it maps for each request.

use crate::config::LAYOUT;
use crate::peer::{Bad, Kind, Peer, RingRequest};
use smallvec::SmallVec;
use std::cell::RefCell;
use std::rc::Rc;
use tap_abi::blkif::{ENTRY_BYTES, MAX_SEGMENTS, Malformed, Segment};
use tap_abi::blktap::{MESSAGE, MESSAGE_CLOSE, STATUS_ERROR, TapMalformed, TapOp, TapRequest};
use tap_abi::ring::{REQ_PROD, RSP_PROD};
use tap_core::wait;
use tap_host::{Errno, Probe, SECTOR_BYTES, SharedPage, TapDevices, TapRing, TapSegment};

tap_host::listed! {
    pub(super) BUGS: Bug;
    TAP_NOT_PULLED = "tap-not-pulled", "the kernel is not asked for requests after responses have made room";
    TAP_DATA_LATE = "tap-data-late", "the data of a read is copied after its response was published";
    TAP_FIRST_PAGE = "tap-first-page", "the data of every segment is in the first page of its request";
    TAP_CLOSE_UNHEARD = "tap-close-unheard", "the kernel's message to close the device is not read";
    TAP_RESPONSE_EXTRA = "tap-response-extra", "one response more is published than was written";
    TAP_ID_SHIFTED = "tap-id-shifted", "a response has the id of the slot after that of its request";
}

impl RingRequest for TapRequest {
    fn kind(&self) -> Kind {
        match self.op {
            TapOp::Read => Kind::Read,
            TapOp::Write => Kind::Write,
            TapOp::Flush => Kind::Flush,
            TapOp::Trim => Kind::Discard,
        }
    }
    fn op(&self) -> u8 {
        self.op as u8
    }
    fn id(&self) -> u64 {
        u64::from(self.slot)
    }
    fn sector(&self) -> u64 {
        self.sector
    }
    fn count(&self) -> u32 {
        self.count
    }
    fn segments(&self) -> &[Segment] {
        TapRequest::segments(self)
    }
}

type Segments = SmallVec<[TapSegment; MAX_SEGMENTS]>;

/// The kernel, as the user of a blktap2 device reaches it.
pub(crate) struct Kernel<H: TapDevices> {
    pub(crate) ring: H::Ring,
    /// Set when the kernel asks to close the device.
    asked_to_close: Rc<wait::Event>,
    /// Data that a seeded bug has not copied yet.
    late: RefCell<Vec<(Segments, Vec<u8>)>>,
}

impl<H: TapDevices> Kernel<H> {
    pub(crate) fn new(ring: H::Ring, asked_to_close: Rc<wait::Event>) -> Self {
        Self { ring, asked_to_close, late: RefCell::default() }
    }

    fn segments(host: &impl Probe, request: &TapRequest) -> Segments {
        let first_only = host.bug(&TAP_FIRST_PAGE);
        let pages = request.segments().iter().zip(0..);
        pages
            .map(|(segment, page)| TapSegment {
                slot: request.slot,
                page: if first_only { 0 } else { page },
                offset: u16::from(segment.first) * SECTOR_BYTES as u16,
                len: u16::from(segment.count()) * SECTOR_BYTES as u16,
            })
            .collect()
    }

    /// Reads the kernel's message, and clears it, as the kernel waits for.
    fn read_message(&self, host: &impl Probe) {
        let page = self.ring.page();
        let word = page.load_u32(MESSAGE);
        if word as u8 == MESSAGE_CLOSE && !host.bug(&TAP_CLOSE_UNHEARD) {
            page.store_u32(MESSAGE, word & !0xff);
            self.asked_to_close.set();
        }
    }
}

impl<H: TapDevices + Probe> Peer<H> for Kernel<H> {
    type Page = <H::Ring as TapRing>::Page;
    type Request = TapRequest;
    const ID_IS_SLOT: bool = true;

    fn page(&self) -> &Self::Page {
        self.ring.page()
    }

    fn parse(&self, entry: &[u8; ENTRY_BYTES]) -> Result<TapRequest, Bad> {
        TapRequest::parse(entry).map_err(|malformed| match malformed {
            TapMalformed::NoSlot => Bad::Refuse("a request has an id that no slot has"),
            TapMalformed::Answer { slot, op, why } => {
                Bad::Answer(Malformed { id: slot.into(), op, status: STATUS_ERROR, why })
            }
        })
    }

    fn wait(&self) -> impl Future<Output = Result<(), Errno>> {
        self.ring.called()
    }

    /// The kernel puts requests on the ring when it is asked. It does not count for which one it is to call.
    fn ask(&self, host: &H, next: u32) -> bool {
        if !host.bug(&TAP_NOT_PULLED) {
            self.ring.pull();
        }
        self.read_message(host);
        self.page().load_u32(REQ_PROD) == next
    }

    /// It looks at responses only when it is called.
    fn is_due(&self, host: &H, _: u32, new: u32) -> bool {
        if host.bug(&TAP_RESPONSE_EXTRA) {
            self.page().store_u32(RSP_PROD, new.wrapping_add(1));
        }
        if host.bug(&TAP_ID_SHIFTED) {
            let last = LAYOUT.entry_offset(new.wrapping_sub(1));
            let id = self.page().load_u32(last);
            self.page().store_u32(last, (id + 1) % LAYOUT.entries);
        }
        true
    }

    fn call(&self) {
        self.ring.respond();
        let late = self.late.take();
        late.iter().for_each(|(segments, data)| self.ring.copy_out(segments, data));
    }

    fn copy_in(&self, host: &H, request: &TapRequest, private: &mut [u8]) -> Result<(), Errno> {
        self.ring.copy_in(&Self::segments(host, request), private);
        Ok(())
    }

    fn copy_out(&self, host: &H, request: &TapRequest, private: &[u8]) -> Result<(), Errno> {
        let segments = Self::segments(host, request);
        if host.bug(&TAP_DATA_LATE) {
            self.late.borrow_mut().push((segments, private.to_vec()));
        } else {
            self.ring.copy_out(&segments, private);
        }
        Ok(())
    }
}
