//! From the queue of the block device onto the ring, and back.

use super::{Tap, TapKind, TapTrouble};
use crate::blkfront::SegmentLayout;
use crate::gendisk::BlockRequest;
use std::rc::Rc;
use tap_abi::blkif::{RESPONSE_BYTES, RingLayout};
use tap_abi::blktap::{OP_FLUSH, OP_READ, OP_TRIM, OP_WRITE, STATUS_OKAY, decode_response};
use tap_abi::blktap::{encode_data, encode_dataless};
use tap_abi::ring::{REQ_PROD, RSP_PROD};
use tap_host::{Errno, IoKind, PAGE_BYTES, SECTOR_BYTES, TapSegment};

/// Requests on the ring.
pub(super) const SLOTS: usize = 32;
/// Pages of a request.
pub(super) const MAX_SEGMENTS: usize = 11;
/// Bytes of an entry that a request without data sets; the rest is what was there.
const DATALESS_BYTES: usize = 32;
/// What is in a page where no data is.
const POISON: u8 = 0xa5;

const LAYOUT: RingLayout = RingLayout::X86_64;

/// The bytes of one page of data.
pub(super) type DataPage = Box<[u8; PAGE_BYTES]>;

/// A request on the ring.
pub(super) struct Pending {
    pub(super) request: Rc<BlockRequest>,
    op: u8,
    /// First and last sector in each page.
    segments: Vec<(u8, u8)>,
    pages: Vec<DataPage>,
}

impl Pending {
    /// A request with its data in `segments`, in pages out of `spare` as far as there are any. A read finds there what
    /// its opener had in its buffer, so that the opener recognises bytes that nobody stored.
    fn new(request: Rc<BlockRequest>, segments: Vec<(u8, u8)>, spare: &mut Vec<DataPage>) -> Self {
        let op = match request.kind {
            IoKind::Read => OP_READ,
            IoKind::Write => OP_WRITE,
            IoKind::Flush => OP_FLUSH,
            IoKind::Discard => OP_TRIM,
            IoKind::WriteZeroes => panic!("the device takes no such requests"),
        };
        let page = |(first, last): &(u8, u8)| {
            let mut page = spare.pop().unwrap_or_else(|| Box::new([POISON; PAGE_BYTES]));
            let own = bytes_of(*first, *last);
            page[..own.start].fill(POISON);
            page[own.end..].fill(POISON);
            page
        };
        let pages = segments.iter().map(page).collect();
        let mut pending = Self { request: Rc::clone(&request), op, segments, pages };
        request.with(|data| pending.each(|page, at| page.copy_from_slice(&data[at..at + page.len()])));
        pending
    }

    /// Pages that it has.
    pub(super) fn pages(&self) -> usize {
        self.pages.len()
    }

    /// Calls `visit` with the bytes of each segment, and where they are in the request's data.
    fn each(&mut self, mut visit: impl FnMut(&mut [u8], usize)) {
        let mut at = 0;
        for ((first, last), page) in self.segments.iter().zip(&mut self.pages) {
            let bytes = &mut page[bytes_of(*first, *last)];
            let len = bytes.len();
            visit(bytes, at);
            at += len;
        }
    }

    /// Whether something was stored beside the segments.
    fn has_strayed(&self) -> bool {
        self.segments.iter().zip(&self.pages).any(|((first, last), page)| {
            let own = bytes_of(*first, *last);
            let (before, after) = (&page[..own.start], &page[own.end..]);
            before.iter().chain(after).any(|byte| *byte != POISON)
        })
    }
}

fn bytes_of(first: u8, last: u8) -> std::ops::Range<usize> {
    let sector = SECTOR_BYTES as usize;
    usize::from(first) * sector..(usize::from(last) + 1) * sector
}

impl Tap {
    fn page(&self) -> Option<xen_model::Page> {
        self.ring.borrow().as_ref().map(|ring| ring.page.clone())
    }

    /// poll(2): puts requests on the ring. Whether the process is told that there is something to read.
    pub(super) fn poll(&self) -> bool {
        let Some(page) = self.page() else { return false };
        let kind = self.kind();
        let work = if kind.fills_in_poll() {
            self.stopped.set(false);
            let filled = self.disk.borrow().is_some() && self.fill();
            self.push();
            filled
        } else {
            self.stopped.set(false);
            if self.fill() {
                self.push();
            }
            page.load_u32(RSP_PROD) != page.load_u32(REQ_PROD)
        };
        let message = kind != TapKind::XenServer && page.load_u32(tap_abi::blktap::MESSAGE) & 0xff != 0;
        let closed = self.was_closed.replace(false);
        work || message || closed
    }

    /// Moves requests from the queue into slots, until one of both ends, or memory does. Whether there were any.
    pub(super) fn fill(&self) -> bool {
        let Some(page) = self.page() else { return false };
        let module = self.module().0;
        let mut any = false;
        loop {
            let next = self.queue.borrow().front().cloned();
            let Some(request) = next else { break };
            let layout = module.layout.borrow().clone();
            let layout = layout.map_or(SegmentLayout::WHOLE, |layout| layout(request.range));
            let slot = self.pending.borrow().iter().position(Option::is_none);
            let on_ring = self.req_prod.get().wrapping_sub(self.rsp_cons.get()) as usize;
            let Some(slot) = slot.filter(|_| on_ring < SLOTS) else {
                self.stopped.set(true);
                break;
            };
            let segments = match request.kind {
                IoKind::Read | IoKind::Write => layout.segments(request.range.count),
                _ => Vec::new(),
            };
            let pages_used = module.pages_used.get() + segments.len();
            if pages_used > module.pages_max {
                self.stopped.set(true);
                let mut starved = module.starved.borrow_mut();
                if !starved.contains(&self.minor) {
                    starved.push_back(self.minor);
                }
                break;
            }
            self.take_queued();
            module.pages_used.set(pages_used);
            let pending = Pending::new(request, segments, &mut self.spare.borrow_mut());
            let (range, at) = (pending.request.range, LAYOUT.entry_offset(self.req_prod.get()));
            if pending.segments.is_empty() {
                let trim = if pending.op == OP_TRIM { u64::from(range.count) } else { 0 };
                let entry = encode_dataless(slot as u8, pending.op, range.start.0, trim);
                page.write(at, &entry[..DATALESS_BYTES]);
            } else {
                page.write(at, &encode_data(slot as u8, pending.op, range.start.0, &pending.segments));
            }
            self.pending.borrow_mut()[slot] = Some(pending);
            self.req_prod.set(self.req_prod.get().wrapping_add(1));
            any = true;
        }
        any
    }

    /// Shows the requests to the process.
    pub(super) fn push(&self) {
        if let Some(page) = self.page() {
            page.store_u32(REQ_PROD, self.req_prod.get());
        }
    }

    /// The process has called: looks at its responses.
    pub(super) fn respond(&self) {
        let Some(page) = self.page() else { return };
        let (kind, rsp_prod) = (self.kind(), page.load_u32(RSP_PROD));
        let count = rsp_prod.wrapping_sub(self.rsp_cons.get());
        if count as usize > SLOTS {
            return self.halt(format!("{count} responses on a ring of {SLOTS}"));
        }
        while self.rsp_cons.get() != rsp_prod {
            let mut bytes = [0; RESPONSE_BYTES];
            page.read(LAYOUT.entry_offset(self.rsp_cons.get()), &mut bytes);
            self.rsp_cons.set(self.rsp_cons.get().wrapping_add(1));
            let response = decode_response(&bytes);
            let id = response.id.get();
            let slot = usize::try_from(id).ok().filter(|slot| *slot < SLOTS);
            let pending = slot.and_then(|slot| self.pending.borrow_mut()[slot].take());
            match pending {
                Some(pending) => self.finish(pending, response.op, response.status.get()),
                None => return self.halt(format!("a response to #{id}, which is not in flight")),
            }
        }
        if kind == TapKind::OpenXt {
            self.stopped.set(false);
            if self.fill() {
                self.push();
            }
            self.call();
        }
    }

    fn finish(&self, mut pending: Pending, op: u8, status: i16) {
        let is_other = op != pending.op;
        if is_other || pending.has_strayed() {
            let (range, kind) = (pending.request.range, pending.request.kind);
            let what = if is_other { "answered as another operation" } else { "its pages changed elsewhere" };
            self.module().trouble(TapTrouble::Strayed(format!("{kind} of {range}: {what}")));
        }
        self.module().put_pages(self.minor, pending.pages());
        let result = if status == STATUS_OKAY && !is_other { Ok(()) } else { Err(Errno::EIO) };
        let request = Rc::clone(&pending.request);
        if pending.op == OP_READ {
            request.with_mut(|data| {
                pending.each(|page, at| data[at..at + page.len()].copy_from_slice(page));
            });
        }
        self.spare.borrow_mut().append(&mut pending.pages);
        request.end(result);
    }

    pub(super) fn halt(&self, why: String) {
        self.module().trouble(TapTrouble::Halt(format!("tap{}: {why}", self.minor)));
    }

    /// Access of the process to the data of requests, in the order of `segments`: `visit` gets the bytes of each, and
    /// where they are in the whole.
    pub(super) fn data(&self, segments: &[TapSegment], store: bool, mut visit: impl FnMut(&mut [u8], usize)) {
        let mut at = 0;
        for segment in segments {
            let TapSegment { slot, page, offset, len } = *segment;
            let mut pending = self.pending.borrow_mut();
            let pending = pending.get_mut(usize::from(slot)).and_then(Option::as_mut);
            let op = pending.as_ref().map(|pending| pending.op);
            let Some(bytes) = pending.and_then(|pending| pending.pages.get_mut(usize::from(page))) else {
                let why = format!("tap{}: access to page {page} of slot {slot}, which has none", self.minor);
                return self.module().trouble(TapTrouble::Fault(why));
            };
            // Some modules map the data of a write so that it can only be read.
            if store && op != Some(OP_READ) {
                let why = format!("tap{}: store into the data of a write in slot {slot}", self.minor);
                return self.module().trouble(TapTrouble::Fault(why));
            }
            let range = usize::from(offset)..usize::from(offset) + usize::from(len);
            visit(&mut bytes[range], at);
            at += usize::from(len);
        }
    }
}
