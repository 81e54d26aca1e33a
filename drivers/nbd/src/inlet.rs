//! The receiving side of a stream: one large buffer, filled by one receive at a time and read in place.
//!
//! ```text
//!   buffer  │ taken ░░░░│ unread: whole requests ... a part of one │ free ───────────│
//!                       start                                      end
//! ```

use crate::stop::StopSignal;
use std::cell::Cell;
use std::pin::pin;
use std::rc::Rc;
use tap_host::{Errno, IoBuf, PAGE_BYTES, Stage, Stream, cost_of};

/// Why nothing more is received.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum End {
    /// The peer has sent its last byte.
    Closed,
    /// The stream is broken.
    Broken(Errno),
    /// The stop signal was set.
    Stopped,
}

pub(crate) struct Inlet<S> {
    stream: S,
    /// `None` for good once a receive was abandoned.
    buf: Option<IoBuf>,
    start: usize,
    end: usize,
    /// Receives that have ended.
    receives: Rc<Cell<u64>>,
}

impl<S: Stream> Inlet<S> {
    /// An inlet that holds at most `bytes` (a page to 4 MiB) of received data, in memory from `memory`; `None` if there
    /// is no room for it.
    pub(crate) fn new(stream: S, bytes: usize, memory: &Stage) -> Option<Self> {
        let buf = buffer(bytes.max(PAGE_BYTES), memory)?;
        Some(Self { stream, buf: Some(buf), start: 0, end: 0, receives: Rc::default() })
    }

    /// Counts receives that end in `receives`, so that others can see whether anything moves.
    pub(crate) fn count_receives(&mut self, receives: Rc<Cell<u64>>) {
        self.receives = receives;
    }

    /// Receives once into `buf`, from byte `from` on.
    async fn receive(
        &self,
        buf: IoBuf,
        from: usize,
        stop: &StopSignal,
    ) -> Option<(Result<usize, Errno>, IoBuf)> {
        let received = stop.unless_stopped(pin!(self.stream.recv(buf, from))).await;
        self.receives.set(self.receives.get() + 1);
        received
    }

    /// Enlarges it to `bytes`, if that is more and `memory` has them without using what other connections need to
    /// begin.
    pub(crate) fn grow(&mut self, bytes: usize, memory: &Stage) {
        if bytes <= self.capacity() {
            return;
        }
        if let Some(mut larger) = buffer(bytes, memory) {
            let unread = self.end - self.start;
            larger[..unread].copy_from_slice(self.unread());
            (self.start, self.end, self.buf) = (0, unread, Some(larger));
        }
    }

    /// Most bytes that can be unread.
    pub(crate) fn capacity(&self) -> usize {
        self.buf.as_ref().map_or(0, |buf| buf.len())
    }

    /// Bytes received and not taken.
    pub(crate) fn unread(&self) -> &[u8] {
        self.buf.as_ref().map_or(&[], |buf| &buf[self.start..self.end])
    }

    /// Takes `count` unread bytes.
    pub(crate) fn take(&mut self, count: usize) {
        assert!(count <= self.end - self.start, "{count} bytes taken out of {}", self.end - self.start);
        self.start += count;
    }

    /// Takes as many unread bytes as `to` has room for, and fills it with them.
    pub(crate) fn take_into(&mut self, to: &mut [u8]) {
        to.copy_from_slice(&self.unread()[..to.len()]);
        self.take(to.len());
    }

    /// Receives once.
    pub(crate) async fn fill(&mut self, stop: &StopSignal) -> Result<(), End> {
        let Some(mut buf) = self.buf.take() else { return Err(End::Stopped) };
        // The rest is less than a request and its small payload.
        buf.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        assert!(self.end < buf.len(), "a full buffer cannot be filled");
        let Some((result, buf)) = self.receive(buf, self.end, stop).await else {
            self.end = 0;
            return Err(End::Stopped);
        };
        self.buf = Some(buf);
        self.end += received(result)?;
        Ok(())
    }

    /// Receives until `count` bytes are unread; at most [`Inlet::capacity`].
    pub(crate) async fn need(&mut self, count: usize, stop: &StopSignal) -> Result<(), End> {
        while self.unread().len() < count {
            self.fill(stop).await?;
        }
        Ok(())
    }

    /// Fills `buf` from byte `at` on: with unread bytes first, then straight from the stream. The buffer is returned on
    /// an error too, unless the stop signal was set.
    pub(crate) async fn fill_buf(
        &mut self,
        buf: IoBuf,
        mut at: usize,
        stop: &StopSignal,
    ) -> (Result<(), End>, Option<IoBuf>) {
        let mut buf = buf;
        let count = self.unread().len().min(buf.len() - at);
        self.take_into(&mut buf[at..at + count]);
        at += count;
        while at < buf.len() {
            let Some((result, back)) = self.receive(buf, at, stop).await else {
                return (Err(End::Stopped), None);
            };
            buf = back;
            match received(result) {
                Ok(count) => at += count,
                Err(end) => return (Err(end), Some(buf)),
            }
        }
        (Ok(()), Some(buf))
    }

    /// Takes and discards `count` bytes.
    pub(crate) async fn skip(&mut self, mut count: usize, stop: &StopSignal) -> Result<(), End> {
        loop {
            let part = count.min(self.unread().len());
            self.take(part);
            count -= part;
            if count == 0 {
                return Ok(());
            }
            self.fill(stop).await?;
        }
    }
}

fn buffer(bytes: usize, memory: &Stage) -> Option<IoBuf> {
    memory.try_take(cost_of(bytes))?.buffer(bytes).ok()
}

fn received(result: Result<usize, Errno>) -> Result<usize, End> {
    match result {
        Ok(0) => Err(End::Closed),
        Ok(count) => Ok(count),
        Err(error) => Err(End::Broken(error)),
    }
}
