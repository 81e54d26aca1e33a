//! One connection of a client, from the end of its negotiation on.

use super::negotiate::Terms;
use super::{Call, Inner};
use crate::inlet::{End, Inlet};
use crate::outbox::{Outbox, send_all};
use crate::stop::StopSignal;
use crate::wire::Wire;
use std::cell::Cell;
use std::convert::Infallible;
use std::rc::Rc;
use tap_abi::nbd::command::PAYLOAD_LEN;
use tap_abi::nbd::{
    CHUNK_BLOCK_STATUS, CHUNK_BLOCK_STATUS_EXT, CHUNK_DONE, CHUNK_ERROR_BIT, CHUNK_MAGIC, CHUNK_NONE,
    CHUNK_OFFSET_DATA, CHUNK_OFFSET_HOLE, CMD_BLOCK_STATUS, CMD_DISC, CMD_READ, CMD_WRITE, ChunkHeader,
    EXTENDED_CHUNK_MAGIC, ErrorHead, ExtendedChunk, ExtendedRequest, LongExtent, OffsetData, OffsetHole,
    RequestHeader, SIMPLE_MAGIC, SimpleReply, StatusExtent, StatusHead, error,
};
use tap_core::wait::{Event, Permit, Sender};
use tap_host::{Errno, IoBuf, Log, Probe, SendList, Sockets, Stream, Tasks, Time, copy_from_slice};
use zerocopy::byteorder::big_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

tap_host::listed! {
    pub(super) BUGS: Bug;
    NBD_ERROR_TEXT_LEFT = "nbd-error-text-left", "the text of an error is left unread in the stream";
    NBD_PAYLOAD_UNSAID = "nbd-payload-unsaid",
        "a write with an extended header does not say that its data follows";
    NBD_READ_HALF = "nbd-read-half", "a read whose last chunk has arrived is taken as complete";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    NBD_DATA_DIRECT = "nbd-data-direct", "data of an NBD read was received into its own buffer";
}

/// An unanswered request.
pub(super) struct Pending {
    pub(super) call: Call,
    pub(super) tell: Sender<(Result<(), Errno>, Call)>,
    pub(super) _permit: Permit,
}

pub(super) struct Link<S> {
    pub(super) stream: S,
    pub(super) out: Outbox,
    /// The number of `base:allocation` on this connection.
    context: Option<u32>,
    /// Headers are extended.
    extended: bool,
    /// Why we broke it.
    broken: Cell<Option<&'static str>>,
    /// Set once nothing is received any more.
    pub(super) ended: Event,
}

/// Data of at least this many bytes is received straight into its buffer.
const DIRECT_BYTES: usize = 4096;
/// Extents of one answer that are kept.
const EXTENTS_MAX: usize = 4096;

impl<S: Stream> Link<S> {
    pub(super) fn new(stream: S, terms: &Terms) -> Self {
        let Terms { context, extended, .. } = *terms;
        let (out, broken, ended) = (Outbox::default(), Cell::new(None), Event::new());
        Self { stream, out, context, extended, broken, ended }
    }

    /// Puts `call` on the wire.
    pub(super) fn put(&self, cookie: u64, call: &Call, probe: &impl Probe) {
        self.out.put(|list| {
            let Call { command, offset, len, .. } = *call;
            let announced = self.extended && command == CMD_WRITE && !probe.bug(&NBD_PAYLOAD_UNSAID);
            let flags = call.flags | if announced { PAYLOAD_LEN } else { 0 };
            self.push_header(list, command, flags, cookie, (offset, len));
            call.payload.iter().for_each(|buf| list.push_shared(Rc::clone(buf)));
        });
    }

    fn push_header(&self, list: &mut SendList, command: u16, flags: u16, cookie: u64, place: (u64, u64)) {
        let (offset, len) = place;
        if self.extended {
            list.push_bytes(ExtendedRequest::new(command, flags, cookie, offset, len).as_bytes());
        } else {
            // Requests are at most as long as the server takes, or `RANGE_BYTES_MAX`.
            let header = RequestHeader::new(command, flags, cookie, offset, len as u32);
            list.push_bytes(header.as_bytes());
        }
    }

    /// Breaks the connection; the receiver then sees the reason.
    pub(super) fn give_up(&self, why: &'static str) {
        if self.broken.get().is_none() {
            self.broken.set(Some(why));
        }
        self.stream.abort();
    }

    /// Sends a disconnect; the writer closes the stream after it.
    pub(super) fn leave(&self) {
        self.out.put(|list| self.push_header(list, CMD_DISC, 0, 0, (0, 0)));
        self.out.close();
    }

    /// Sends requests until the outbox is closed.
    pub(super) async fn send_requests(&self) {
        let mut list = SendList::new();
        while self.out.next(&mut list).await.is_some() {
            let (result, rest) = send_all(&self.stream, list).await;
            if result.is_err() {
                self.give_up("a request could not be sent");
                return;
            }
            list = rest;
        }
        self.stream.shutdown();
    }
}

/// What a reader needs to know about the request that a reply belongs to.
struct Target {
    command: u16,
    offset: u64,
    len: u64,
}

/// The receiving half of a link.
pub(super) struct Receiver<'a, H: Sockets> {
    pub(super) inner: &'a Inner<H>,
    pub(super) link: &'a Link<Wire<H::Stream>>,
    pub(super) inlet: &'a mut Inlet<Wire<H::Stream>>,
    /// Never set: a connection is given up by closing it, so that buffers are returned.
    pub(super) stop: &'a StopSignal,
}

type Why = &'static str;

const UNKNOWN_COOKIE: Why = "it answered what nobody had asked";

impl<H: Sockets + Time + Tasks + Log + Probe> Receiver<'_, H> {
    /// Receives replies until the connection ends; returns the reason.
    pub(super) async fn run(mut self) -> Why {
        let Err(why) = self.replies().await;
        self.link.broken.get().unwrap_or(why)
    }

    async fn replies(&mut self) -> Result<Infallible, Why> {
        loop {
            self.need(4).await?;
            let magic = U32::read_from_prefix(self.inlet.unread()).map_or(0, |(magic, _)| magic.get());
            match magic {
                EXTENDED_CHUNK_MAGIC if self.link.extended => {
                    let head: ExtendedChunk = self.value().await?;
                    if self.target(head.cookie.get())?.offset != head.offset.get() {
                        return Err("a reply about another place");
                    }
                    self.chunk(head).await?;
                }
                SIMPLE_MAGIC if !self.link.extended => self.simple().await?,
                CHUNK_MAGIC if self.inner.terms.structured && !self.link.extended => {
                    let head: ChunkHeader = self.value().await?;
                    let (cookie, kind) = (head.cookie.get(), head.kind.get());
                    let (done, len) = (head.flags.get() & CHUNK_DONE != 0, head.len.get());
                    self.chunk(ExtendedChunk::new(cookie, 0, kind, done, u64::from(len))).await?;
                }
                _ => return Err("a reply without its magic number"),
            }
        }
    }

    async fn need(&mut self, count: usize) -> Result<(), Why> {
        self.inlet.need(count, self.stop).await.map_err(why)
    }

    async fn value<T: FromBytes + Immutable + KnownLayout + Unaligned>(&mut self) -> Result<T, Why> {
        self.need(size_of::<T>()).await?;
        let Ok((value, _)) = T::read_from_prefix(self.inlet.unread()) else { return Err("a reply was cut") };
        self.inlet.take(size_of::<T>());
        Ok(value)
    }

    fn target(&self, cookie: u64) -> Result<Target, Why> {
        let pending = self.inner.pending.borrow();
        let call = &pending.get(&cookie).ok_or(UNKNOWN_COOKIE)?.call;
        Ok(Target { command: call.command, offset: call.offset, len: call.len })
    }

    async fn simple(&mut self) -> Result<(), Why> {
        let reply: SimpleReply = self.value().await?;
        let cookie = reply.cookie.get();
        let target = self.target(cookie)?;
        let ok = reply.error.get() == 0;
        if ok && target.command == CMD_BLOCK_STATUS
            || target.command == CMD_READ && self.inner.terms.structured
        {
            return Err("a simple reply where a structured one belongs");
        }
        if ok && target.command == CMD_READ {
            self.covers(cookie, 0, target.len as usize)?;
            self.data(cookie, 0, target.len as usize).await?;
        }
        let result = if ok { Ok(()) } else { Err(errno_of(reply.error.get())) };
        self.finish(cookie, result);
        Ok(())
    }

    /// The payload of a chunk, and what follows from it.
    async fn chunk(&mut self, head: ExtendedChunk) -> Result<(), Why> {
        let cookie = head.cookie.get();
        // No longer payload is valid; a compact header has no room for more.
        let len = usize::try_from(head.len.get()).map_err(|_| "a chunk that does not fit its request")?;
        let target = self.target(cookie)?;
        let done = head.flags.get() & CHUNK_DONE != 0;
        match head.kind.get() {
            CHUNK_NONE if len == 0 && done => {}
            CHUNK_BLOCK_STATUS_EXT
                if self.link.extended && target.command == CMD_BLOCK_STATUS && len > StatusHead::BYTES =>
            {
                if self.has_extents(cookie) {
                    return Err("a block status that comes twice");
                }
                self.long_status(cookie, len).await?;
            }
            CHUNK_OFFSET_DATA if target.command == CMD_READ && len > OffsetData::BYTES => {
                let at: OffsetData = self.value().await?;
                let len = len - OffsetData::BYTES;
                let at = within(&target, at.offset.get(), len as u64)?;
                self.covers(cookie, at, len)?;
                self.data(cookie, at, len).await?;
            }
            CHUNK_OFFSET_HOLE if target.command == CMD_READ && len == OffsetHole::BYTES => {
                let hole: OffsetHole = self.value().await?;
                let at = within(&target, hole.offset.get(), u64::from(hole.len.get()))?;
                self.covers(cookie, at, hole.len.get() as usize)?;
                self.zeros(cookie, at, hole.len.get() as usize);
            }
            CHUNK_BLOCK_STATUS
                if !self.link.extended && target.command == CMD_BLOCK_STATUS && len > size_of::<U32>() =>
            {
                // One context was asked for, so there is one such chunk; more would be memory without a limit.
                if self.has_extents(cookie) {
                    return Err("a block status that comes twice");
                }
                self.status(cookie, len).await?;
            }
            kind if kind & CHUNK_ERROR_BIT != 0 && len >= ErrorHead::BYTES => {
                let head: ErrorHead = self.value().await?;
                let left = self.inner.host.bug(&NBD_ERROR_TEXT_LEFT);
                let rest = if left { 0 } else { len - ErrorHead::BYTES };
                self.inlet.skip(rest, self.stop).await.map_err(why)?;
                let error = errno_of(head.error.get());
                self.with(cookie, |call| call.error = Some(error));
            }
            _ => return Err("a chunk that does not fit its request"),
        }
        if done {
            let mut result = Ok(());
            self.with(cookie, |call| {
                let read = call.command == CMD_READ && !self.inner.host.bug(&NBD_READ_HALF);
                // A read is far below 2^32 bytes.
                let whole = !read || call.got.is_whole(call.len as u32);
                let some = call.command != CMD_BLOCK_STATUS || !call.extents.is_empty();
                let complete = if whole && some { Ok(()) } else { Err(Errno::EIO) };
                result = call.error.map_or(complete, Err);
            });
            self.finish(cookie, result);
        }
        Ok(())
    }

    fn finish(&self, cookie: u64, result: Result<(), Errno>) {
        if result == Err(Errno::ESHUTDOWN) && self.inner.waits_for_successor(cookie) {
            return;
        }
        self.inner.replies.set(self.inner.replies.get() + 1);
        self.inner.finish(cookie, result);
    }

    /// Notes that `len` bytes of a read, from byte `at` on, arrive now: each arrives once.
    fn covers(&self, cookie: u64, at: usize, len: usize) -> Result<(), Why> {
        let mut result = Ok(());
        self.with(cookie, |call| result = call.got.add(at as u32, (at + len) as u32));
        result
    }

    fn has_extents(&self, cookie: u64) -> bool {
        self.inner.pending.borrow().get(&cookie).is_some_and(|p| !p.call.extents.is_empty())
    }

    fn with(&self, cookie: u64, change: impl FnOnce(&mut Call)) {
        if let Some(pending) = self.inner.pending.borrow_mut().get_mut(&cookie) {
            change(&mut pending.call);
        }
    }

    /// The extents of a block status: those that are kept, and the rest.
    async fn status(&mut self, cookie: u64, len: usize) -> Result<(), Why> {
        let context: U32 = self.value().await?;
        let mut left = len - size_of::<U32>();
        if !left.is_multiple_of(StatusExtent::BYTES) || Some(context.get()) != self.link.context {
            return Err("a block status that was not asked for");
        }
        for _ in 0..EXTENTS_MAX.min(left / StatusExtent::BYTES) {
            let extent: StatusExtent = self.value().await?;
            left -= StatusExtent::BYTES;
            let extent = (u64::from(extent.len.get()), extent.state.get());
            self.with(cookie, |call| call.extents.push(extent));
        }
        self.inlet.skip(left, self.stop).await.map_err(why)
    }

    /// The same with extended headers.
    async fn long_status(&mut self, cookie: u64, len: usize) -> Result<(), Why> {
        let head: StatusHead = self.value().await?;
        let mut left = len - StatusHead::BYTES;
        let count = left / LongExtent::BYTES;
        if Some(head.context.get()) != self.link.context
            || !left.is_multiple_of(LongExtent::BYTES)
            || head.count.get() as usize != count
        {
            return Err("a block status that was not asked for");
        }
        for _ in 0..EXTENTS_MAX.min(count) {
            let extent: LongExtent = self.value().await?;
            left -= LongExtent::BYTES;
            // What is known of the state is in its low bits.
            let extent = (extent.len.get(), extent.state.get() as u32);
            self.with(cookie, |call| call.extents.push(extent));
        }
        self.inlet.skip(left, self.stop).await.map_err(why)
    }

    fn zeros(&self, cookie: u64, at: usize, len: usize) {
        self.with(cookie, |call| {
            let mut skip = at;
            let mut left = len;
            for buf in &mut call.bufs {
                let from = skip.min(buf.len());
                let part = left.min(buf.len() - from);
                buf[from..from + part].fill(0);
                skip -= from;
                left -= part;
            }
        });
    }

    /// Receives `len` bytes of a read's data, from byte `at` of the request on.
    async fn data(&mut self, cookie: u64, mut at: usize, len: usize) -> Result<(), Why> {
        let mut left = len;
        while left > 0 {
            let unread = self.inlet.unread();
            let have = unread.len().min(left);
            if have > 0 {
                self.with(cookie, |call| copy_from_slice(&mut call.bufs, at, &unread[..have]));
                self.inlet.take(have);
                at += have;
                left -= have;
            } else if let Some(count) = self.direct(cookie, at, left).await? {
                at += count;
                left -= count;
            } else {
                self.inlet.fill(self.stop).await.map_err(why)?;
            }
        }
        Ok(())
    }

    /// Receives straight into the buffer that contains byte `at` of the request, if the data fills it to its end.
    /// Returns the number of bytes.
    async fn direct(&mut self, cookie: u64, at: usize, left: usize) -> Result<Option<usize>, Why> {
        let mut found = None;
        self.with(cookie, |call| {
            let mut from = at;
            for (index, buf) in call.bufs.iter_mut().enumerate() {
                if from >= buf.len() {
                    from -= buf.len();
                    continue;
                }
                let count = buf.len() - from;
                if count <= left
                    && count >= DIRECT_BYTES
                    && let Ok(empty) = IoBuf::unpooled(0)
                {
                    found = Some((index, from, count, std::mem::replace(buf, empty)));
                }
                return;
            }
        });
        let Some((index, from, count, buf)) = found else { return Ok(None) };
        self.inner.host.mark(&NBD_DATA_DIRECT);
        let (result, buf) = self.inlet.fill_buf(buf, from, self.stop).await;
        self.with(cookie, |call| {
            if let Some(buf) = buf {
                call.bufs[index] = buf;
            }
        });
        result.map_err(why)?;
        Ok(Some(count))
    }
}

/// Where in a request `len` bytes from `offset` on belong.
fn within(target: &Target, offset: u64, len: u64) -> Result<usize, Why> {
    let at = offset.checked_sub(target.offset);
    let fits = |at: &u64| at.checked_add(len).is_some_and(|end| end <= target.len);
    at.filter(fits).map(|at| at as usize).ok_or("data that was not asked for")
}

fn why(end: End) -> Why {
    match end {
        End::Closed => "it closed the connection",
        End::Broken(Errno::ECONNRESET) => "it reset the connection",
        End::Broken(_) => "the connection broke",
        End::Stopped => "the connection was given up",
    }
}

/// The error that the protocol's number stands for; an input/output error for an unknown number.
fn errno_of(number: u32) -> Errno {
    const KNOWN: [u32; 8] = [
        error::EPERM,
        error::EIO,
        error::ENOMEM,
        error::EINVAL,
        error::ENOSPC,
        error::EOVERFLOW,
        error::ENOTSUP,
        error::ESHUTDOWN,
    ];
    if KNOWN.contains(&number) { Errno(number as i32) } else { Errno::EIO }
}
