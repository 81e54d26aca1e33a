//! Zeros made in place below a page cache, where a failure may revert accepted writes.
//!
//! ```text
//!   write v2 ──accepted──┐
//!   zeros: drop dirty pages ─► no space, no such command, an error ─► returned    reads show v1 again
//!   settle: punch a hole ─► else write zeros ─► else give the file up             reads show zeros: allowed
//! ```
//!
//! | file | zeros that keep their space | holes |
//! |---|---|---|
//! | ext4 | drops the dirty pages of whole blocks before it looks for space | drops them before it asks its journal |
//! | ext4 before 6.14 | the same | safe, except for stable kernels with that change: writes them back first |
//! | xfs | safe | safe: writes the dirty pages back first |
//! | a block device | Linux drops the dirty pages before it asks the drive | the same, even if it cannot |
//! | any with O_DIRECT | safe: there are no dirty pages | safe |
//!
//! Then v2 is lost, and v1 must not come back, so the range is set to what the failed request may have left: zeros. A
//! hole takes no space.
//!
//! Whether a drive can make holes is only known after a try, when the pages are already dropped. So the first try is on
//! a small part, whose bytes are read before and written back if the drive refuses: then nothing has changed, whatever
//! the size of the request. It is tried once only, and never on ranges that are not whole sectors.
//!
//! Only whole pages are zeroed in this way, because what settles them must not have to read: see `zero.rs`. The rest of
//! a request is written.
//!
//! While a part is settled, synchronisations wait; so a request is cut into parts. A synchronisation concurrent with a
//! failure may have missed the dropped pages, and its result is void. It is repeated once the part is settled, so that
//! the zeros, or the bytes written back, are durable in their place.

use super::{ImageFile, is_transient};
use crate::ImageHost;
use crate::calls::LONE_REPEATS;
use crate::memory::PART_BYTES;
use smallvec::smallvec;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use tap_core::wait;
use tap_host::{Errno, File, FileInfo, IoVec, Patience, Probe, Time, ZeroMode};

tap_host::listed! {
    pub(super) BUGS: Bug;
    FLUSH_PASSES_ZEROS = "flush-passes-zeros",
        "a flush does not wait for zeros that are in flight and may still fail";
    FLUSH_BESIDE_FAILED_ZEROS = "flush-beside-failed-zeros",
        "a flush that ran while zeros failed counts as a success";
    HOLES_TRUSTED = "holes-trusted", "a hole that could not be made is taken to have left its file as it was";
    FAILED_ZEROS_LEFT = "failed-zeros-left", "zeros that failed leave the range as the host left it";
    DEVICE_TRUSTED = "device-trusted",
        "a block device that says it cannot make holes is taken to have changed nothing";
    HOLES_ASKED_AGAIN = "holes-asked-again",
        "a block device that cannot make holes is asked with each discard";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    FILE_GIVEN_UP = "file-given-up",
        "accepted writes of a file were gone, and nothing could be put in their place";
    FAILED_ZEROS_SETTLED = "failed-zeros-settled",
        "zeros failed in a way that may have lost accepted writes, and a hole was made";
}

/// Retries of settling a part after errors that may last.
const REPEATS: u32 = 7;
/// Limit of bytes zeroed in one operation, once the drive is known to support it. If it fails all of them have to be
/// settled, while synchronisations wait.
const MAX_AT_ONCE_BYTES: u64 = 64 << 20;

/// State of zeros made in place in one file, where a failure may lose dirty pages.
#[derive(Default)]
pub(super) struct KeptZeros {
    /// What a block device supports: holes, and zeros that keep their space.
    answers: [Cell<Answer>; 2],
    /// The numbers of running zeros, which the end of a concurrent synchronisation waits for.
    running: RefCell<BTreeSet<u64>>,
    /// The number of the next zeros.
    next: Cell<u64>,
    /// Set when zeros have ended.
    ended: wait::Event,
    /// Failures that may have lost dirty pages, and are settled or given up.
    failures: Cell<u64>,
    /// Accepted writes are lost and could not be replaced.
    given_up: Cell<bool>,
}

/// Whether a block device supports one way to make zeros.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum Answer {
    /// Not tried yet.
    #[default]
    Unknown,
    Yes,
    No,
}

impl KeptZeros {
    /// Whether the file has lost accepted writes, so that it must not be used.
    pub(super) fn gave_up(&self) -> bool {
        self.given_up.get()
    }

    /// Whether a failure of zeros in place may lose dirty pages of the file.
    pub(super) fn concerns(host: &impl Probe, info: &FileInfo, mode: ZeroMode) -> bool {
        let trusted = !info.block_device && mode == ZeroMode::Unmap && host.bug(&HOLES_TRUSTED);
        !info.direct && !trusted
    }

    fn answer(&self, mode: ZeroMode) -> &Cell<Answer> {
        &self.answers[usize::from(mode == ZeroMode::Keep)]
    }

    /// Limit of bytes to zero in one operation.
    pub(super) fn max_at_once(&self, host: &impl Probe, info: &FileInfo, mode: ZeroMode) -> u64 {
        match self.answer(mode).get() {
            _ if !Self::concerns(host, info, mode) => u64::MAX,
            Answer::Unknown if info.block_device => PART_BYTES as u64,
            _ => MAX_AT_ONCE_BYTES,
        }
    }

    /// The number of failures so far; to be read before a synchronisation.
    pub(super) fn failures(&self) -> u64 {
        self.failures.get()
    }

    /// Whether zeros have failed since `failures` was read, including those that run now: data synchronised meanwhile
    /// may not be durable.
    pub(super) async fn failed_since(&self, host: &impl Probe, failures: u64) -> bool {
        // Zeros that begin when the host has synchronised drop no page that was to become durable.
        let next = self.next.get();
        let waits = || self.running.borrow().first().is_some_and(|first| *first < next);
        while waits() && !host.bug(&FLUSH_PASSES_ZEROS) {
            self.ended.wait().await;
        }
        self.failures.get() != failures
    }
}

impl<H: ImageHost> ImageFile<H> {
    /// Zeroes a part of at most [`KeptZeros::max_at_once`] bytes where a failure may lose dirty pages.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if the file cannot do it, with nothing changed. After other errors the part reads as zeros, or the
    /// file is given up.
    pub(super) async fn zero_kept(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<(), Errno> {
        let (kept, host) = (&self.kept, &self.host);
        let answer = kept.answer(mode);
        if answer.get() == Answer::No {
            return Err(Errno::EOPNOTSUPP);
        }
        let _running = Running::new(kept);
        let before = match self.bytes_to_put_back(offset, len, mode).await {
            Ok(before) => before,
            // The old bytes cannot be read, so they could not be written back. The drive is tried another time.
            Err(error) => return Err(if is_transient(error) { error } else { Errno::EOPNOTSUPP }),
        };
        let result = self.file.zero_at(offset, len, mode).await;
        let Err(error) = result else {
            answer.set(Answer::Yes);
            return result;
        };
        let refused = error == Errno::EOPNOTSUPP;
        // The file cannot do it, or the call did not begin: nothing was changed.
        if error == Errno::EAGAIN || refused && (!self.info.block_device || host.bug(&DEVICE_TRUSTED)) {
            return result;
        }
        if host.bug(&FAILED_ZEROS_LEFT) {
            return result;
        }
        if refused && !host.bug(&HOLES_ASKED_AGAIN) {
            answer.set(Answer::No);
        }
        let restored = before.is_some() && refused;
        let settled = match before {
            Some(bufs) if refused => self.put_back(offset, bufs).await,
            before => {
                drop(before);
                host.mark(&FAILED_ZEROS_SETTLED);
                self.settle_as_zeros(offset, len).await
            }
        };
        if settled.is_err() {
            host.mark(&FILE_GIVEN_UP);
            kept.given_up.set(true);
        }
        // Counted only now: a synchronisation that began while the part was being settled may have missed the end.
        if !host.bug(&FLUSH_BESIDE_FAILED_ZEROS) {
            kept.failures.set(kept.failures.get() + 1);
        }
        match settled {
            Err(_) if refused => Err(Errno::EIO),
            // A drive that did it before and refuses now: the zeros were written instead.
            Ok(()) if refused && !restored => Ok(()),
            _ => result,
        }
    }

    /// The bytes of the part on which a block device is tried for the first time.
    async fn bytes_to_put_back(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<Option<IoVec>, Errno> {
        if !self.info.block_device || self.kept.answer(mode).get() != Answer::Unknown {
            return Ok(None);
        }
        let bufs: IoVec = smallvec![self.buffer(len as usize).await?];
        let (result, bufs) = self.read(offset, bufs).await;
        result.map(|()| Some(bufs))
    }

    /// Writes back the bytes of a part whose dirty pages may be lost.
    async fn put_back(&self, offset: u64, mut bufs: IoVec) -> Result<(), Errno> {
        let mut patience = SettlePatience::new();
        loop {
            let (result, back) = self.write(offset, bufs).await;
            let Err(error) = result else { return Ok(()) };
            if !patience.again(&self.host, is_transient(error)).await {
                return result;
            }
            bufs = back;
        }
    }

    /// Zeroes a part whose dirty pages may be lost.
    async fn settle_as_zeros(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let mut patience = SettlePatience::new();
        loop {
            let Err(hole) = self.file.zero_at(offset, len, ZeroMode::Unmap).await else { return Ok(()) };
            let Err(error) = self.write_zeros_over_data(offset, len).await else { return Ok(()) };
            if !patience.again(&self.host, is_transient(hole) || is_transient(error)).await {
                return Err(hole);
            }
        }
    }

    /// Writes zeros where the part has data: a hole in a file already reads as zeros, and takes no space.
    async fn write_zeros_over_data(&self, mut offset: u64, len: u64) -> Result<(), Errno> {
        let end = offset + len;
        while offset < end {
            let (run, data) = match self.info.block_device {
                true => (end - offset, true),
                false => self.extent(offset, end - offset).await?,
            };
            if data {
                self.write_zeros(offset, run).await?;
            }
            offset += run;
        }
        Ok(())
    }
}

/// Repetitions of what settles a part. Giving up ends the use of the file, so transient errors are waited out as long
/// as requests wait; the others are repeated a few times.
struct SettlePatience {
    transient: Patience,
    lasting: Patience,
}

impl SettlePatience {
    fn new() -> Self {
        Self { transient: Patience::of(LONE_REPEATS), lasting: Patience::of(REPEATS) }
    }

    /// Takes one repetition and waits until it is due; `false` if none is left.
    async fn again(&mut self, time: &impl Time, transient: bool) -> bool {
        let patience = if transient { &mut self.transient } else { &mut self.lasting };
        patience.again(time).await
    }
}

/// Running zeros.
struct Running<'a>(&'a KeptZeros, u64);

impl<'a> Running<'a> {
    fn new(kept: &'a KeptZeros) -> Self {
        let number = kept.next.replace(kept.next.get() + 1);
        kept.running.borrow_mut().insert(number);
        Self(kept, number)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        // A second panic here would abort the process.
        if !std::thread::panicking() {
            self.0.running.borrow_mut().remove(&self.1);
            self.0.ended.set();
            self.0.ended.clear();
        }
    }
}
