//! The thread of a disk: takes requests from the ring, passes them to the device, answers.

use super::request::{Request, SEGMENTS_PER_PAGE, parse, u64_at};
use super::{Device, Vbd};
use crate::SimHost;
use crate::gendisk::Bio;
use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use tap_abi::blkif::{
    ENTRY_BYTES, OP_DISCARD, OP_FLUSH_DISKCACHE, OP_INDIRECT, OP_READ, OP_WRITE, OP_WRITE_BARRIER,
    RESPONSE_BYTES, STATUS_EOPNOTSUPP, STATUS_ERROR, STATUS_OKAY,
};
use tap_abi::ring::{REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD};
use tap_host::{
    DomId, Either, Errno, EventChannel, GrantRef, Grants, IoKind, OneWaiter, SECTOR_BYTES, SectorRange,
    SharedPage, poll_once, select,
};
use xen_model::{Channel, Mapping};

const SLOTS: u32 = 32;
const FIRST_SLOT: usize = 64;
/// Bytes of an indirect page.
const INDIRECT_BYTES: usize = SEGMENTS_PER_PAGE * 8;
/// The rest after a request that was refused, in nanoseconds.
const REST_NS: u64 = 1_000_000;
/// What is in a buffer until the device has filled it.
const POISON: u8 = 0xa5;

/// What the thread does when it has looked at the ring.
enum Next {
    /// Every request is taken: it waits for an event.
    Event,
    /// As many requests as there may be are open.
    Room,
    /// The ring is impossible, and is never looked at again.
    Nothing,
}

/// A request was refused, and its answer says so.
struct Refused;

/// A front end's ring.
pub(super) struct Ring {
    host: SimHost,
    guest: DomId,
    page: Mapping,
    channel: Channel,
    /// Index after the last request that was taken, and after the last response.
    taken: Cell<u32>,
    answered: Cell<u32>,
    /// Requests that the device has.
    open: Cell<u32>,
    /// Requests that the device ever had.
    numbers: Cell<u64>,
    running: Cell<bool>,
    stopping: Cell<bool>,
    thread: OneWaiter,
    /// Waits for the end of the thread, then of the last request.
    closer: OneWaiter,
}

impl Ring {
    pub(super) fn new(host: &SimHost, guest: DomId, page: Mapping, channel: Channel) -> Self {
        Self {
            host: host.clone(),
            guest,
            page,
            channel,
            taken: Cell::new(0),
            answered: Cell::new(0),
            open: Cell::new(0),
            numbers: Cell::new(0),
            running: Cell::new(false),
            stopping: Cell::new(false),
            thread: OneWaiter::default(),
            closer: OneWaiter::default(),
        }
    }

    /// Starts the thread.
    pub(super) fn start(self: &Rc<Self>, vbd: &Rc<Vbd>, device: &Rc<Device>) {
        self.running.set(true);
        let (ring, vbd, device) = (Rc::clone(self), Rc::clone(vbd), Rc::clone(device));
        self.host.process.node().spawn("xenblkd", 0, async move {
            ring.run(&vbd, &device).await;
            drop((vbd, device));
            ring.running.set(false);
            ring.closer.wake();
        });
    }

    /// Ends the thread; requests that the device has stay open.
    pub(super) async fn stop(&self) {
        self.stopping.set(true);
        self.thread.wake();
        poll_fn(|cx| wait_until(!self.running.get(), &self.closer, cx)).await;
    }

    /// Whether no request is open.
    pub(super) fn is_idle(&self) -> bool {
        self.open.get() == 0
    }

    /// Waits until no request is open, once the thread has ended.
    pub(super) async fn idle(&self) {
        poll_fn(|cx| wait_until(self.is_idle(), &self.closer, cx)).await;
    }

    async fn run(self: &Rc<Self>, vbd: &Vbd, device: &Device) {
        while !self.stopping.get() {
            if let Err(error) = vbd.tell_size(device).await {
                vbd.note(format!("the size cannot be written: {error}"));
            }
            let mut stopped = poll_fn(|cx| wait_until(self.stopping.get(), &self.thread, cx));
            match self.take_all(device).await {
                Next::Event => {
                    if let Either::Second(Err(_)) = select(&mut stopped, self.channel.wait()).await {
                        stopped.await;
                    }
                }
                Next::Room => {
                    let goes_on = |ring: &Self| ring.stopping.get() || ring.open.get() < SLOTS;
                    poll_fn(|cx| wait_until(goes_on(self), &self.thread, cx)).await;
                }
                Next::Nothing => stopped.await,
            }
        }
    }

    async fn take_all(self: &Rc<Self>, device: &Device) -> Next {
        loop {
            let produced = self.page.load_u32(REQ_PROD);
            if produced.wrapping_sub(self.answered.get()) > SLOTS {
                return Next::Nothing;
            }
            while self.taken.get() != produced {
                if self.stopping.get() || self.open.get() == SLOTS {
                    return Next::Room;
                }
                let mut entry = [0; ENTRY_BYTES];
                self.page.copy_in(slot(self.taken.get()), &mut entry);
                self.taken.set(self.taken.get().wrapping_add(1));
                if let Err(Refused) = self.dispatch(device, &entry).await {
                    self.host.process.sim().sleep_ns(REST_NS).await;
                }
            }
            self.page.store_u32(REQ_EVENT, self.taken.get().wrapping_add(1));
            self.page.full_barrier();
            if self.page.load_u32(REQ_PROD) == self.taken.get() {
                return Next::Event;
            }
        }
    }

    async fn dispatch(self: &Rc<Self>, device: &Device, entry: &[u8; ENTRY_BYTES]) -> Result<(), Refused> {
        let (op, id) = (entry[0], u64_at(entry, 8));
        match op {
            OP_READ | OP_WRITE | OP_WRITE_BARRIER | OP_FLUSH_DISKCACHE | OP_INDIRECT => {
                let load = |gref| {
                    let page = self.host.map(self.guest, gref, false).ok()?;
                    let mut bytes = vec![0; INDIRECT_BYTES];
                    page.copy_in(0, &mut bytes);
                    Some(bytes)
                };
                match parse(entry, load) {
                    Ok(request) => self.transfer(device, id, request).await,
                    Err(op) => self.refuse(id, op, STATUS_ERROR),
                }
            }
            OP_DISCARD => self.discard(device, id, (u64_at(entry, 16), u64_at(entry, 24))).await,
            _ => self.refuse(id, op, STATUS_EOPNOTSUPP),
        }
    }

    fn refuse(&self, id: u64, op: u8, status: i16) -> Result<(), Refused> {
        self.respond(id, op, status);
        Err(Refused)
    }

    async fn transfer(self: &Rc<Self>, device: &Device, id: u64, request: Request) -> Result<(), Refused> {
        let (op, is_read) = (request.op, request.kind() == IoKind::Read);
        let disk = device.opener.disk();
        let range = SectorRange::new(request.sector, request.sectors());
        let block = u64::from(disk.limits().logical_block_bytes) / SECTOR_BYTES;
        let is_whole = |piece: &super::request::Piece| {
            let sectors = piece.len_bytes as u64 / SECTOR_BYTES;
            request.sector.is_multiple_of(block) && sectors.is_multiple_of(block)
        };
        if (!is_read && device.read_only)
            || (range.count > 0 && !range.fits(disk.size_sectors()))
            || !request.pieces.iter().all(is_whole)
        {
            return self.refuse(id, op, STATUS_ERROR);
        }
        if op == OP_WRITE_BARRIER {
            poll_fn(|cx| wait_until(self.is_idle(), &self.thread, cx)).await;
        }
        let map = |gref: GrantRef| self.host.map(self.guest, gref, is_read);
        let pages: Result<Vec<Mapping>, Errno> = request.pieces.iter().map(|piece| map(piece.gref)).collect();
        let Ok(pages) = pages else { return self.refuse(id, op, STATUS_ERROR) };
        let mut bio = Bio { data: vec![POISON; request.len_bytes()], ..Bio::new(request.kind(), range) };
        if !is_read {
            each(&request, &pages, |page, offset, data| page.copy_in(offset, &mut bio.data[data]));
        }
        let flush = request.flushes().then(|| Bio::new(IoKind::Flush, SectorRange::default()));
        let flush = flush.map(|flush| device.opener.submit(flush));
        let transfer = (range.count > 0).then(|| device.opener.submit(bio));
        self.open.set(self.open.get() + 1);
        let ring = Rc::clone(self);
        // The device gets it now, in the order of the ring.
        self.begin(Box::pin(async move {
            let flushed = match flush {
                Some(flush) => flush.await.0,
                None => Ok(()),
            };
            let (result, data) = match transfer {
                Some(transfer) if flushed.is_ok() => transfer.await,
                _ => (flushed, Vec::new()),
            };
            if is_read && result.is_ok() {
                each(&request, &pages, |page, offset, bytes| page.copy_out(offset, &data[bytes]));
            }
            drop(pages);
            ring.respond(id, op, if result.is_ok() { STATUS_OKAY } else { STATUS_ERROR });
            ring.open.set(ring.open.get() - 1);
            ring.thread.wake();
            ring.closer.wake();
        }))
        .await;
        Ok(())
    }

    /// Polls `io` once, and lets it go on as a task of its own.
    async fn begin(&self, mut io: Pin<Box<dyn Future<Output = ()>>>) {
        if poll_once(io.as_mut()).await.is_none() {
            let number = self.numbers.replace(self.numbers.get() + 1);
            self.host.process.node().spawn("blkback-io", number, io);
        }
    }

    /// Waits for the device, unlike other requests.
    async fn discard(&self, device: &Device, id: u64, (sector, count): (u64, u64)) -> Result<(), Refused> {
        let disk = device.opener.disk();
        let range = u32::try_from(count).map(|count| SectorRange::new(sector, count));
        let range = range.ok().filter(|range| range.fits(disk.size_sectors()));
        let result = match range {
            Some(range) if !device.read_only => {
                device.opener.submit(Bio::new(IoKind::Discard, range)).await.0
            }
            _ => Err(Errno::EACCES),
        };
        match result {
            Ok(()) => {
                self.respond(id, OP_DISCARD, STATUS_OKAY);
                Ok(())
            }
            Err(Errno::EOPNOTSUPP) => self.refuse(id, OP_DISCARD, STATUS_EOPNOTSUPP),
            Err(_) => self.refuse(id, OP_DISCARD, STATUS_ERROR),
        }
    }

    fn respond(&self, id: u64, op: u8, status: i16) {
        let mut bytes = [0; RESPONSE_BYTES];
        bytes[..8].copy_from_slice(&id.to_le_bytes());
        bytes[8] = op;
        bytes[10..12].copy_from_slice(&status.to_le_bytes());
        let (old, new) = (self.answered.get(), self.answered.get().wrapping_add(1));
        self.answered.set(new);
        self.page.copy_out(slot(old), &bytes);
        self.page.store_u32(RSP_PROD, new);
        self.page.full_barrier();
        if self.page.load_u32(RSP_EVENT) == new {
            self.channel.notify();
        }
    }
}

/// Calls `visit` with each page of a request, the offset in it, and the bytes of the data that lie there.
fn each(
    request: &Request,
    pages: &[Mapping],
    mut visit: impl FnMut(&Mapping, usize, std::ops::Range<usize>),
) {
    let mut at = 0;
    for (piece, page) in request.pieces.iter().zip(pages) {
        visit(page, piece.offset, at..at + piece.len_bytes);
        at += piece.len_bytes;
    }
}

fn slot(index: u32) -> usize {
    FIRST_SLOT + (index % SLOTS) as usize * ENTRY_BYTES
}

fn wait_until(is_so: bool, waiter: &OneWaiter, cx: &Context<'_>) -> Poll<()> {
    if is_so {
        return Poll::Ready(());
    }
    waiter.wait(cx.waker());
    Poll::Pending
}
