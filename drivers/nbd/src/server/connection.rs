//! One connection after its negotiation: requests in, replies out.

use super::command::{Job, Kind, Refusal, Rules, error_of};
use super::negotiate::{ALLOCATION_ID, Agreed, DEPTH_ID, Negotiation, why};
use super::reply::{Form, To, is_zero};
use super::status::extents;
use super::{Flow, Inner, Open, STOPPED};
use crate::inlet::Inlet;
use crate::outbox::Outbox;
use crate::stop::StopSignal;
use crate::wire::Wire;
use std::cell::Cell;
use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use tap_abi::nbd::{CMD_DISC, CMD_TRIM, CMD_WRITE, ExtendedRequest, RequestHeader, command};
use tap_core::wait::Semaphore;
use tap_core::{Op, Request, Response};
use tap_host::{
    BufPool, Errno, IoVec, Log, Probe, SECTOR_BYTES, Stage, Stream, Tasks, Time, cost_of, unless,
};
use zerocopy::FromBytes;

tap_host::listed! {
    pub(super) BUGS: Bug;
    NBD_WRONG_COOKIE = "nbd-wrong-cookie", "a reply carries the cookie of the latest request";
    NBD_FLUSH_OWN = "nbd-flush-own",
        "a flush on a connection that wrote nothing is answered without being carried out";
    NBD_FUA_IGNORED = "nbd-fua-ignored", "the flag FUA is ignored";
    NBD_REQUEST_CUT = "nbd-request-cut",
        "the first bytes of a request that was received in two parts are lost";
    NBD_STATUS_AT_ONCE = "nbd-status-at-once",
        "all block status replies that a connection asks for are built at once";
    NBD_TRIM_FROZEN = "nbd-trim-frozen", "a trim on a read-only export is passed to its disk";
    NBD_ZEROES_EARLY = "nbd-zeroes-early", "zeros with the flag FUA are answered before they are durable";
    NBD_ANNOUNCED_KEPT = "nbd-announced-kept",
        "an NBD client that announced a large write and stopped sending it keeps the memory for it";
    NBD_SEAT_LOST = "nbd-seat-lost",
        "a connection that does not end in order keeps the memory that the next one needs";
    NBD_CONTEXTS_MIXED = "nbd-contexts-mixed", "the depth of a block status is sent as its allocation";
    NBD_HOLE_GUESSED = "nbd-hole-guessed", "a read whose first page is zeros is answered as all zeros";
    NBD_LONG_CUT = "nbd-long-cut", "zeros that go to the disk in pieces end with the first piece";
    NBD_LONG_REFUSED = "nbd-long-refused",
        "zeros that the end of their server cuts short fail, although a client could send them to the next";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    NBD_REQUEST_JOINED = "nbd-request-cut", "an NBD request was received in two parts";
    NBD_ROOM_WAITED = "nbd-room-waited", "an NBD connection had as many requests in flight as it may have";
    NBD_PAYLOAD_DIRECT = "nbd-payload-direct", "the payload of an NBD write was received into its own buffer";
    NBD_HOLE_SENT = "nbd-hole-sent", "an NBD read of zeros was answered as a hole";
    NBD_DIVIDED = "nbd-divided", "a change of a long range went to the disk in pieces";
    NBD_REQUEST_REFUSED = "nbd-request-refused", "a wrong NBD request was answered with an error";
}

/// Payload up to this size in bytes stays in the receive buffer until it is complete: a receive of its own would cost
/// more than the copy.
const SMALL_BYTES: usize = 16 << 10;
/// Most bytes of one piece of memory.
const PIECE_BYTES: usize = 4 << 20;

/// A read of at least this many bytes that finds only zeros is answered as a hole.
const HOLE_BYTES_MIN: u64 = 4096;

/// Pieces of memory for `bytes`, in bytes.
fn pieces(bytes: usize) -> impl Iterator<Item = usize> {
    (0..bytes.div_ceil(PIECE_BYTES)).map(move |i| (bytes - i * PIECE_BYTES).min(PIECE_BYTES))
}

/// What these pieces cost a budget.
pub(super) fn cost_of_pieces(bytes: usize) -> usize {
    pieces(bytes).map(cost_of).sum()
}

/// Why a connection without memory for a receive buffer is refused.
const NO_MEMORY: Why = "there is no memory for it";

/// Why a connection ends.
pub(super) type Why = &'static str;

pub(super) struct Connection<H, S> {
    pub(super) server: Rc<Inner<H>>,
    number: u64,
    /// Memory reserved for this connection.
    own: Stage,
    pub(super) stream: S,
    pub(super) agreed: Agreed,
    pool: BufPool,
    pub(super) out: Outbox,
    /// Set when no more requests may be taken.
    pub(super) stop: Rc<StopSignal>,
    /// The client can receive no more replies.
    pub(super) broken: Cell<bool>,
    /// Requests taken whose replies have not been sent.
    pub(super) in_flight: Cell<u32>,
    /// The reading task waits until fewer are in flight.
    waits: Cell<bool>,
    requests: Cell<u64>,
    pub(super) writes: Cell<u64>,
    pub(super) flow: Rc<Flow>,
    /// Allows one list of extents at a time.
    status_turn: Semaphore,
}

/// Serves `stream` to its end, and closes it. Returns why it ended, and how many requests were taken.
pub(super) async fn run<H, S>(server: &Rc<Inner<H>>, number: u64, stream: S, open: Open) -> (Why, u64)
where
    H: Time + Tasks + Log + Probe,
    S: Stream,
{
    let Open { stop, pool, flow } = open;
    let stream = Wire::new(stream);
    // The minimum, until the client has chosen an export.
    let Some(mut inlet) = Inlet::new(stream.clone(), super::RECEIVE_BYTES_MIN, &server.memory.inlets) else {
        return (NO_MEMORY, 0);
    };
    let mut patience = pin!(server.host.sleep_ns(server.limits.negotiation_ns));
    let negotiation = Negotiation::new(server, number, &stream, &mut inlet, &stop).run();
    let agreed = match unless(patience.as_mut(), negotiation).await {
        Some(Ok(agreed)) => agreed,
        Some(Err(why)) => return (stop.why().unwrap_or(why), 0),
        None => return ("the client took too long to choose an export", 0),
    };
    serve(server, number, stream, inlet, agreed, Open { stop, pool, flow }).await
}

/// As [`run`], for a client that does not negotiate: it and we have agreed on the first export and simple replies.
pub(super) async fn transmit<H, S>(server: &Rc<Inner<H>>, number: u64, stream: S, open: Open) -> (Why, u64)
where
    H: Time + Tasks + Log + Probe,
    S: Stream,
{
    let stream = Wire::new(stream);
    let Some(inlet) = Inlet::new(stream.clone(), super::RECEIVE_BYTES_MIN, &server.memory.inlets) else {
        return (NO_MEMORY, 0);
    };
    let agreed = Agreed::beforehand(Rc::clone(&server.exports[0]));
    serve(server, number, stream, inlet, agreed, open).await
}

/// Serves a client with which everything is agreed on.
async fn serve<H, S>(
    server: &Rc<Inner<H>>,
    number: u64,
    stream: Wire<S>,
    mut inlet: Inlet<Wire<S>>,
    agreed: Agreed,
    open: Open,
) -> (Why, u64)
where
    H: Time + Tasks + Log + Probe,
    S: Stream,
{
    let Open { stop, pool, flow } = open;
    inlet.count_receives(Rc::clone(&flow.receives));
    inlet.grow(server.limits.receive_bytes, &server.memory.spare);
    let Some(own) = server.memory.seats.borrow_mut().pop() else {
        // A connection that has given up its place is still open.
        return (NO_MEMORY, 0);
    };
    let connection = Rc::new(Connection {
        server: Rc::clone(server),
        number,
        own,
        stream,
        agreed,
        pool,
        out: Outbox::default(),
        stop,
        in_flight: Cell::new(0),
        waits: Cell::new(false),
        requests: Cell::new(0),
        writes: Cell::new(0),
        flow,
        broken: Cell::new(false),
        status_turn: Semaphore::new(1),
    });
    let sender = Rc::clone(&connection);
    server.host.spawn("nbd-replies", number, async move { sender.send_replies().await });
    let Err(why) = connection.read(&mut inlet).await;
    connection.drain(why).await;
    if why == LEFT || !server.host.bug(&NBD_SEAT_LOST) {
        server.memory.seats.borrow_mut().push(connection.own.clone());
    }
    (why, connection.requests.get())
}

/// The client has ended the connection in an orderly way.
pub(super) const LEFT: Why = "the client left";

impl<H, S> Connection<H, S>
where
    H: Time + Tasks + Log + Probe,
    S: Stream,
{
    pub(super) fn host(&self) -> &H {
        &self.server.host
    }

    /// Takes requests until the connection ends.
    async fn read(self: &Rc<Self>, inlet: &mut Inlet<S>) -> Result<Infallible, Why> {
        loop {
            if let Some(why) = self.stop.why() {
                return Err(why);
            }
            let header = self.header(inlet).await?;
            if header.command.get() == CMD_DISC {
                return Err(LEFT);
            }
            self.room().await?;
            self.requests.set(self.requests.get() + 1);
            self.take(&header, inlet).await?;
        }
    }

    /// The header of the next request.
    async fn header(&self, inlet: &mut Inlet<S>) -> Result<ExtendedRequest, Why> {
        let extended = self.agreed.form == Form::Extended;
        let bytes = if extended { ExtendedRequest::BYTES } else { RequestHeader::BYTES };
        let have = inlet.unread().len();
        if have > 0 && have < bytes {
            self.host().mark(&NBD_REQUEST_JOINED);
            if self.host().bug(&NBD_REQUEST_CUT) {
                inlet.take(have);
            }
        }
        inlet.need(bytes, &self.stop).await.map_err(|end| self.why(end))?;
        let cut = "a request was cut";
        let header = if extended {
            let (copy, _) = <[u8; _]>::read_from_prefix(inlet.unread()).map_err(|_| cut)?;
            ExtendedRequest::parse(&copy)?
        } else {
            let (copy, _) = <[u8; _]>::read_from_prefix(inlet.unread()).map_err(|_| cut)?;
            RequestHeader::parse(&copy)?.into()
        };
        inlet.take(bytes);
        Ok(header)
    }

    /// The reason of the stop signal, or that of the stream.
    pub(super) fn why(&self, end: crate::inlet::End) -> Why {
        self.stop.why().unwrap_or_else(|| why(end))
    }

    /// Waits until one more request may be in flight, and counts it.
    async fn room(&self) -> Result<(), Why> {
        let most = self.server.limits.requests;
        if self.in_flight.get() >= most {
            self.host().mark(&NBD_ROOM_WAITED);
            self.stop.unless_stopped(pin!(self.fewer_than(most))).await;
        }
        if let Some(why) = self.stop.why() {
            return Err(why);
        }
        self.in_flight.set(self.in_flight.get() + 1);
        Ok(())
    }

    pub(super) async fn fewer_than(&self, most: u32) {
        poll_fn(|cx| {
            let waits = self.in_flight.get() >= most;
            self.waits.set(waits);
            if !waits {
                return Poll::Ready(());
            }
            self.stop.listen(cx.waker());
            Poll::Pending
        })
        .await;
    }

    /// Counts replies that were sent, or cannot be sent.
    pub(super) fn release(&self, count: u32) {
        self.in_flight.set(self.in_flight.get() - count);
        if self.waits.get() {
            self.stop.wake();
        }
    }

    /// One request: receives its payload, and starts it or refuses it.
    async fn take(self: &Rc<Self>, header: &ExtendedRequest, inlet: &mut Inlet<S>) -> Result<(), Why> {
        let (limits, agreed) = (&self.server.limits, &self.agreed);
        let extended = agreed.form == Form::Extended;
        let announced = extended && header.flags.get() & command::PAYLOAD_LEN != 0;
        let payload = if header.command.get() == CMD_WRITE || announced { header.len.get() } else { 0 };
        let thaw = header.command.get() == CMD_TRIM && self.host().bug(&NBD_TRIM_FROZEN);
        let rules = Rules {
            export: &agreed.export,
            read_only: agreed.export.is_read_only() && !thaw,
            request_bytes: limits.request_bytes,
            range_bytes: limits.range_bytes,
            status: agreed.contexts.any(),
            extended,
        };
        let taken = match Job::check(header, &rules) {
            Ok(job) => self.start(job, payload as usize, inlet).await,
            Err(_) if payload > u64::from(limits.request_bytes) => Err("a write larger than the maximum"),
            Err(refusal) => {
                let skipped = inlet.skip(payload as usize, &self.stop).await.map_err(|end| self.why(end));
                skipped.map(|()| self.refuse(header, refusal))
            }
        };
        if taken.is_err() {
            // It has no reply, so it is counted nowhere else.
            self.release(1);
        }
        taken
    }

    async fn start(self: &Rc<Self>, job: Job, payload: usize, inlet: &mut Inlet<S>) -> Result<(), Why> {
        match job.kind {
            Kind::Op(op) if op != Op::Flush && job.range.count == 0 => self.nothing(job, op),
            Kind::Op(op) if !job.is_aligned() => self.start_unaligned(job, op, inlet).await?,
            Kind::Op(op) => {
                let mut bufs = IoVec::new();
                if op.has_data() {
                    bufs = self.buffers(job.range.len_bytes() as usize).await?;
                }
                if payload > 0 {
                    self.receiving(true);
                    let received = self.receive(bufs, payload, inlet).await;
                    self.receiving(false);
                    bufs = received?;
                    self.writes.set(self.writes.get() + 1);
                }
                self.submit(job, op, bufs);
            }
            Kind::Long(op, len) => {
                let (own, turn) = (Rc::clone(self), self.claim_long(&job, len));
                self.host().spawn("nbd-long", job.at / SECTOR_BYTES, async move {
                    turn.ready().await;
                    let result = own.long(&job, op, len).await;
                    drop(turn);
                    match result {
                        Some(result) => own.done(job, result),
                        None => own.release(1),
                    }
                });
            }
            Kind::Cache => self.done(job, Ok(())),
            Kind::Status { one } => {
                let own = Rc::clone(self);
                self.host().spawn("nbd-status", job.range.start.0, async move { own.status(job, one).await });
            }
        }
        Ok(())
    }

    /// Notes whether the data of a write is awaited, with its memory already taken.
    pub(super) fn receiving(&self, awaited: bool) {
        self.flow.receiving.set(awaited && !self.host().bug(&NBD_ANNOUNCED_KEPT));
    }

    /// `bytes` of memory, all of it at once.
    pub(super) async fn buffers(&self, bytes: usize) -> Result<IoVec, Why> {
        let taken = async {
            let mut room = self.pool.room(pieces(bytes)).await;
            let mut share = self.server.memory_for(self.number, &self.own, cost_of_pieces(bytes)).await?;
            let mut bufs = IoVec::new();
            for piece in pieces(bytes) {
                bufs.push(room.buffer(&mut share, piece)?);
            }
            Ok::<IoVec, Errno>(bufs)
        };
        let bufs = match self.stop.unless_stopped(pin!(taken)).await {
            Some(Ok(bufs)) => bufs,
            Some(Err(_)) => return Err("a request is larger than a buffer can be"),
            None => return Err(self.stop.why().unwrap_or(STOPPED)),
        };
        // While this task waited, the connection may have broken: then nothing more is started.
        self.stop.why().map_or(Ok(bufs), Err)
    }

    pub(super) async fn receive(
        &self,
        mut bufs: IoVec,
        payload: usize,
        inlet: &mut Inlet<S>,
    ) -> Result<IoVec, Why> {
        if payload <= SMALL_BYTES.min(inlet.capacity() - ExtendedRequest::BYTES) {
            inlet.need(payload, &self.stop).await.map_err(|end| self.why(end))?;
        } else if inlet.unread().len() < payload {
            self.host().mark(&NBD_PAYLOAD_DIRECT);
        }
        if inlet.unread().len() >= payload {
            bufs.iter_mut().for_each(|buf| inlet.take_into(buf));
            return Ok(bufs);
        }
        let mut filled = IoVec::new();
        for buf in bufs {
            let (result, buf) = inlet.fill_buf(buf, 0, &self.stop).await;
            result.map_err(|end| self.why(end))?;
            filled.extend(buf);
        }
        Ok(filled)
    }

    /// Hands a request to the node, in the order of the stream. A request that is answered at once needs no task.
    fn submit(self: &Rc<Self>, job: Job, op: Op, bufs: IoVec) {
        if op == Op::Flush && self.host().bug(&NBD_FLUSH_OWN) && self.writes.get() == 0 {
            return self.done(job, Ok(()));
        }
        if let Some(turn) = self.turn_after_edges(&job, op) {
            let own = Rc::clone(self);
            self.host().spawn("nbd-edges", job.range.start.0, async move {
                turn.ready().await;
                let answer = own.agreed.export.node.submit(Request {
                    op,
                    range: job.range,
                    bufs,
                    fua: own.fua(&job, op),
                });
                drop(turn);
                own.answered(job, op, answer.await);
            });
            return;
        }
        let fua = self.fua(&job, op);
        let node = &self.agreed.export.node;
        let mut answer = node.submit(Request { op, range: job.range, bufs, fua });
        if let Poll::Ready(response) = answer.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return self.answered(job, op, response);
        }
        let own = Rc::clone(self);
        let role = match op {
            Op::Read => "nbd-read",
            Op::Write => "nbd-write",
            Op::Flush => "nbd-flush",
            Op::WriteZeroes(_) => "nbd-zeroes",
            Op::Discard => "nbd-trim",
        };
        self.host().spawn(role, job.range.start.0, async move {
            own.answered(job, op, answer.await);
        });
    }

    /// A change of so many bytes that it goes to the node in pieces, one after the other. A stop ends it between two of
    /// them, because the disk may take minutes for each: `None`, and no reply, so that a client that connects again
    /// sends it again.
    async fn long(self: &Rc<Self>, job: &Job, mut op: Op, len: u64) -> Option<Result<(), Errno>> {
        self.host().mark(&NBD_DIVIDED);
        for piece in job.pieces(op, len, self.server.limits.range_bytes) {
            if piece.range.count == 0 {
                // The rest of a trim, less than a sector.
                continue;
            }
            if self.stop.why().is_some() || self.broken.get() {
                return self.host().bug(&NBD_LONG_REFUSED).then_some(Err(Errno::ESHUTDOWN));
            }
            if let Err(error) = self.piece(piece, op).await {
                return Some(Err(error));
            }
            // Fast zeros are refused at once and without an effect, or not at all: a refusal after a part of them was
            // made would be neither.
            if let Op::WriteZeroes(flags) = &mut op {
                flags.fast = false;
            }
            if self.host().bug(&NBD_LONG_CUT) {
                break;
            }
        }
        Some(Ok(()))
    }

    async fn piece(self: &Rc<Self>, piece: Job, op: Op) -> Result<(), Errno> {
        if !piece.is_aligned() {
            return self.zero_piece(&piece, op).await;
        }
        let (range, fua) = (piece.range, self.fua(&piece, op));
        self.agreed.export.node.submit(Request { op, range, bufs: IoVec::new(), fua }).await.result
    }

    /// Whether the node must make it durable before it answers.
    pub(super) fn fua(&self, job: &Job, op: Op) -> bool {
        let early = matches!(op, Op::WriteZeroes(_)) && self.host().bug(&NBD_ZEROES_EARLY);
        job.fua && !early && !self.host().bug(&NBD_FUA_IGNORED)
    }

    pub(super) fn answered(&self, job: Job, op: Op, response: Response) {
        match response.result {
            Ok(()) if op == Op::Read => self.data(job, response.bufs),
            result => self.done(job, result),
        }
    }

    async fn status(&self, job: Job, one: bool) {
        let at_once = self.host().bug(&NBD_STATUS_AT_ONCE);
        let _turn = if at_once { None } else { Some(self.status_turn.acquire().await) };
        let contexts = self.agreed.contexts;
        let mixed = self.host().bug(&NBD_CONTEXTS_MIXED);
        match extents(self.host(), &self.agreed.export.node, &job, contexts, one).await {
            Ok(found) => self.out.put(|list| {
                if contexts.allocation {
                    self.to(&job).status(list, ALLOCATION_ID, &found.allocation, !contexts.depth);
                }
                if contexts.depth {
                    let id = if mixed { ALLOCATION_ID } else { DEPTH_ID };
                    self.to(&job).status(list, id, &found.depth, true);
                }
            }),
            Err(error) => self.done(job, Err(error)),
        }
    }

    /// The reply to a request of no bytes.
    fn nothing(&self, job: Job, op: Op) {
        match op {
            Op::Read => self.out.put(|list| self.to(&job).nothing(list)),
            _ => self.done(job, Ok(())),
        }
    }

    /// The reply to a read.
    fn data(&self, job: Job, bufs: IoVec) {
        let to = self.to(&job);
        let sectors = if self.host().bug(&NBD_HOLE_GUESSED) { 8 } else { usize::MAX };
        if to.form != Form::Simple && job.len_bytes() >= HOLE_BYTES_MIN && is_zero(&bufs, sectors) {
            self.host().mark(&NBD_HOLE_SENT);
            return self.out.put(|list| to.hole(list, &job));
        }
        self.out.put(|list| to.data(list, &job, bufs));
    }

    /// A reply without data.
    pub(super) fn done(&self, job: Job, result: Result<(), Errno>) {
        let to = self.to(&job);
        self.out.put(|list| match result {
            Ok(()) => to.done(list),
            Err(error) => to.error(list, Refusal(error_of(error), "")),
        });
    }

    /// What identifies the reply to `job`.
    fn to(&self, job: &Job) -> To {
        let cookie = if self.host().bug(&NBD_WRONG_COOKIE) { self.requests.get() } else { job.cookie };
        To { cookie, at: job.at, form: self.agreed.form }
    }

    fn refuse(&self, header: &ExtendedRequest, refusal: Refusal) {
        self.host().mark(&NBD_REQUEST_REFUSED);
        let to = To { cookie: header.cookie.get(), at: header.offset.get(), form: self.agreed.form };
        self.out.put(|list| to.error(list, refusal));
    }
}
