//! The tasks of the kernel that serve a device: requests out, replies in, timers.

use super::{CUT, Command, DEVICE_CUT, Device, LOOK_AGAIN_NS};
use crate::sockets::ProcessStream;
use sim::{Timed, mix2};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use tap_abi::nbd::{
    CMD_DISC, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, REQUEST_MAGIC, SIMPLE_MAGIC,
    command,
};
use tap_host::{Errno, IoBuf, IoKind, SECTOR_BYTES, SendList, Stream, unless};

/// Bytes of a request without its data.
const REQUEST_BYTES: usize = 28;
/// Bytes of a reply without its data.
const REPLY_BYTES: usize = 16;

fn handle(command: &Command) -> u64 {
    u64::from(command.cookie) << 32 | u64::from(command.tag)
}

fn header(kind: u16, flags: u16, handle: u64, offset: u64, len: u32) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    // The kernel does not look at its order.
    bytes[8..16].copy_from_slice(&handle.to_le_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// A command as its message.
fn message(of: &Command) -> SendList {
    let request = &of.request;
    let kind = match request.kind {
        IoKind::Read => CMD_READ,
        IoKind::Write => CMD_WRITE,
        IoKind::Flush => CMD_FLUSH,
        IoKind::WriteZeroes => CMD_WRITE_ZEROES,
        IoKind::Discard => CMD_TRIM,
    };
    let keeps = request.kind == IoKind::WriteZeroes && !request.unmap;
    let flags = if request.fua { command::FUA } else { 0 } | if keeps { command::NO_HOLE } else { 0 };
    let range = request.range;
    // Bios are smaller than 4 GiB.
    let len = u32::try_from(range.len_bytes()).unwrap_or(u32::MAX);
    let mut list = SendList::new();
    list.push_bytes(&header(kind, flags, handle(of), range.start.0 * SECTOR_BYTES, len));
    if request.kind == IoKind::Write {
        request.with(|bytes| list.push_bytes(bytes));
    }
    list
}

async fn send_all(stream: &ProcessStream, mut list: SendList) -> Result<(), Errno> {
    while !list.is_empty() {
        let (result, rest) = stream.send(list).await;
        result?;
        list = rest;
    }
    Ok(())
}

/// Tells the server that the device is taken away, if it can still be told.
pub(super) async fn send_disconnect(stream: &ProcessStream) {
    let mut list = SendList::new();
    list.push_bytes(&header(CMD_DISC, 0, 0, 0, 0));
    let _gone = send_all(stream, list).await;
}

/// Receives exactly `len` bytes.
async fn receive(stream: &ProcessStream, len: usize) -> Option<Vec<u8>> {
    let (mut buf, mut at) = (IoBuf::unpooled(len).ok()?, 0);
    while at < len {
        let (result, back) = stream.recv(buf, at).await;
        buf = back;
        match result {
            Ok(0) | Err(_) => return None,
            Ok(count) => at += count,
        }
    }
    Some(buf[..len].to_vec())
}

/// What becomes of the next request.
enum Next {
    Send(ProcessStream, u32),
    Fail,
}

impl Device {
    /// Sends requests, one after the other, for as long as the kernel lives.
    pub(super) async fn send_all(self: Rc<Self>) {
        loop {
            self.any_waiting().await;
            let next = self.next().await;
            self.begin_sending().await;
            self.send_one(next).await;
            self.end_sending();
        }
    }

    async fn send_one(self: &Rc<Self>, next: Next) {
        let Some(mut command) = self.waiting.borrow_mut().pop_front() else { return };
        let Next::Send(stream, number) = next else {
            command.request.end(Err(Errno::EIO));
            return;
        };
        let n = self.messages.replace(self.messages.get() + 1);
        if self.is_cut(n) {
            self.waiting.borrow_mut().push_front(command);
            return self.end_stream(number);
        }
        command.cookie += 1;
        command.stream = number;
        let (tag, list, timer) = (command.tag, message(&command), handle(&command));
        // The reply may come before the whole message is sent.
        self.sent.borrow_mut().insert(tag, command);
        self.look_again_at(timer);
        if send_all(&stream, list).await.is_err() {
            self.end_stream(number);
            self.requeue(timer);
        }
    }

    async fn any_waiting(&self) {
        poll_fn(|cx| {
            if !self.waiting.borrow().is_empty() {
                return Poll::Ready(());
            }
            self.sender.wait(cx.waker());
            Poll::Pending
        })
        .await;
    }

    /// Waits until the first request can be sent or has to fail.
    async fn next(&self) -> Next {
        let patience_ns = self.config.borrow().as_ref().map_or(0, |config| config.patience_ns);
        let ready = poll_fn(|cx| {
            let config = self.config.borrow();
            match config.as_ref() {
                Some(config) if !config.line.dead => {
                    Poll::Ready(Next::Send(config.line.stream.clone(), config.line.number))
                }
                Some(config) if !config.disconnected && !self.waiting.borrow().is_empty() => {
                    self.sender.wait(cx.waker());
                    Poll::Pending
                }
                _ => Poll::Ready(Next::Fail),
            }
        });
        let waited = unless(self.kernel.sim().sleep_ns(patience_ns), ready).await;
        waited.unwrap_or_else(|| {
            if let Some(config) = &mut *self.config.borrow_mut() {
                config.disconnected = true;
            }
            Next::Fail
        })
    }

    fn is_cut(&self, n: u64) -> bool {
        let sim = self.kernel.sim();
        let rate_ppm = sim.swarm().rate_ppm(&CUT);
        let entity = self.kernel.node().entity().child("message", mix2(u64::from(self.index), n));
        let cut = sim.fault(entity, &DEVICE_CUT, rate_ppm, |_| 1) != 0;
        if cut {
            sim.name_entity(entity, || format!("message {n} of nbd{}", self.index));
        }
        cut
    }

    /// Sets the timer of a request that was sent.
    fn look_again_at(self: &Rc<Self>, handle: u64) {
        let sim = self.kernel.sim();
        sim.call_at(sim.now_ns() + LOOK_AGAIN_NS, Rc::clone(self) as Rc<dyn Timed>, handle);
    }

    /// Has a request sent again, unless it was answered or sent since.
    fn requeue(&self, sent_as: u64) {
        let mut sent = self.sent.borrow_mut();
        if sent.get(&(sent_as as u32)).is_some_and(|command| handle(command) == sent_as)
            && let Some(command) = sent.remove(&(sent_as as u32))
        {
            self.waiting.borrow_mut().push_back(command);
            self.sender.wake();
        }
    }

    /// Takes replies until the stream ends.
    pub(super) async fn receive_all(&self, stream: ProcessStream, number: u32) {
        while let Some(reply) = receive(&stream, REPLY_BYTES).await {
            let word =
                |at: usize| u32::from_be_bytes([reply[at], reply[at + 1], reply[at + 2], reply[at + 3]]);
            let mut own = [0; 8];
            own.copy_from_slice(&reply[8..]);
            let own = u64::from_le_bytes(own);
            if word(0) != SIMPLE_MAGIC {
                return self.complain("a reply without its magic number");
            }
            let found =
                self.sent.borrow().get(&(own as u32)).map(|c| (Rc::clone(&c.request), handle(c), c.stream));
            let Some((request, sent_as, on)) = found else {
                // What was failed meanwhile may still be answered.
                if !self.is_over(number) {
                    self.complain(&format!("a reply {own:#x} without a request"));
                }
                return;
            };
            if sent_as != own || on != number {
                return self.complain(&format!("a reply {own:#x} to what was sent again as {sent_as:#x}"));
            }
            if word(4) == 0 && request.kind == IoKind::Read {
                let Some(data) = receive(&stream, request.range.len_bytes() as usize).await else { return };
                request.with_mut(|bytes| bytes.copy_from_slice(&data));
            }
            self.sent.borrow_mut().remove(&(own as u32));
            request.end(if word(4) == 0 { Ok(()) } else { Err(Errno::EIO) });
        }
    }

    /// Whether the stream `number` is no longer the device's.
    fn is_over(&self, number: u32) -> bool {
        let config = self.config.borrow();
        config
            .as_ref()
            .is_none_or(|config| config.line.dead || config.line.number != number || config.disconnected)
    }
}

impl Timed for Device {
    fn fire(self: Rc<Self>, sent_as: u64) {
        let on = self.sent.borrow().get(&(sent_as as u32)).filter(|c| handle(c) == sent_as).map(|c| c.stream);
        let Some(on) = on else { return };
        if self.streams.get() == on { self.look_again_at(sent_as) } else { self.requeue(sent_as) }
    }
}
