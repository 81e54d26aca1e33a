//! Linux's block layer above the driver of a block device: who has it open, its size, its queue.
//!
//! ```text
//!   Opener ── submit(Bio) ──► split by the limits ──► [ waiting, first come ──► at most `depth` started ]
//!                                                                                   │ queue      ▲ end
//!                                                                                   ▼            │
//!                                                                              BlockDriver ──────┘
//! ```
//!
//! An opener has the device open with O_DIRECT: there is no page cache, and nothing is merged or reordered here. Each
//! request belongs to the block layer until the driver has answered it, whatever becomes of the opener: what a dead
//! opener has submitted still lands.
//!
//! As in Linux, a device without a write cache gets no flushes, one that does not know FUA gets a flush after the
//! write, and a bio beyond the end fails with EIO.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::{Future, poll_fn};
use std::rc::{Rc, Weak};
use std::task::Poll;
use tap_host::{Errno, IoKind, OneWaiter, SECTOR_BYTES, SectorRange};

/// What a driver says about its device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueueLimits {
    /// Requests that the driver has at one time, at least 1.
    pub depth: usize,
    /// Smallest unit of reads and writes in bytes, a power of two of at least 512.
    pub logical_block_bytes: u32,
    /// Most sectors of a read or write that is not split, at least 1.
    pub max_sectors: u32,
    /// Most sectors of a discard; 0 if there is none.
    pub max_discard_sectors: u32,
    /// Most sectors of zeros; 0 if there is no such request.
    pub max_zeroes_sectors: u32,
    /// Writes are durable after a flush only.
    pub write_cache: bool,
    /// The driver takes writes that are durable when answered.
    pub fua: bool,
}

/// What an opener asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bio {
    /// What it does.
    pub kind: IoKind,
    /// Where; empty for a flush.
    pub range: SectorRange,
    /// A change that is durable when answered.
    pub fua: bool,
    /// Zeros that may give back their space.
    pub unmap: bool,
    /// The bytes of a read or write, as many as the range has.
    pub data: Vec<u8>,
}

impl Bio {
    /// A request without data or flags.
    pub fn new(kind: IoKind, range: SectorRange) -> Self {
        Self { kind, range, fua: false, unmap: false, data: Vec::new() }
    }
}

/// The driver of a device.
pub trait BlockDriver {
    /// Takes a request, and calls [`BlockRequest::end`] once, now or later. Requests come in the order of their
    /// submission.
    fn queue(&self, request: Rc<BlockRequest>);
    /// The last opener has closed the device.
    fn released(&self) {}
}

/// A request that a driver has or will have.
pub struct BlockRequest {
    disk: Weak<Inner>,
    number: u64,
    /// What it does.
    pub kind: IoKind,
    /// Where; empty for a flush.
    pub range: SectorRange,
    /// A write that is durable when answered; only if the driver knows that.
    pub fua: bool,
    /// Zeros that may give back their space.
    pub unmap: bool,
    data: RefCell<Vec<u8>>,
    result: Cell<Option<Result<(), Errno>>>,
    opener: OneWaiter,
}

impl BlockRequest {
    /// Passes the bytes of a write, or of a read so far, to `look`.
    pub fn with<R>(&self, look: impl FnOnce(&[u8]) -> R) -> R {
        look(&self.data.borrow())
    }

    /// Lets `change` fill in the bytes of a read.
    pub fn with_mut<R>(&self, change: impl FnOnce(&mut [u8]) -> R) -> R {
        change(&mut self.data.borrow_mut())
    }

    /// Answers it, and starts others that waited. Returns whether it was not answered yet; otherwise nothing happens.
    pub fn end(&self, result: Result<(), Errno>) -> bool {
        if self.result.get().is_some() {
            return false;
        }
        self.result.set(Some(result));
        self.opener.wake();
        if let Some(disk) = self.disk.upgrade() {
            let at = disk.started.borrow().binary_search_by_key(&self.number, |one| one.number);
            let Ok(at) = at else { panic!("request {} was answered before it was started", self.number) };
            disk.started.borrow_mut().remove(at);
            disk.start();
        }
        true
    }

    async fn ended(&self) -> Result<(), Errno> {
        poll_fn(|cx| {
            let Some(result) = self.result.get() else {
                self.opener.wait(cx.waker());
                return Poll::Pending;
            };
            Poll::Ready(result)
        })
        .await
    }
}

/// Who has a device open.
#[derive(Clone, PartialEq, Eq, Debug)]
struct OpenedBy {
    name: String,
    exclusive: bool,
}

struct Inner {
    name: String,
    limits: Cell<QueueLimits>,
    size_sectors: Cell<u64>,
    read_only: Cell<bool>,
    driver: RefCell<Option<Rc<dyn BlockDriver>>>,
    openers: RefCell<BTreeMap<u64, OpenedBy>>,
    waiting: RefCell<VecDeque<Rc<BlockRequest>>>,
    /// Those that the driver has, in order of their numbers.
    started: RefCell<Vec<Rc<BlockRequest>>>,
    /// Numbers of requests and openers.
    next: Cell<u64>,
    /// Requests are being handed to the driver.
    starting: Cell<bool>,
}

impl Inner {
    fn number(&self) -> u64 {
        self.next.replace(self.next.get() + 1)
    }

    /// Hands the driver as many requests as it may have.
    fn start(&self) {
        // A driver may answer at once, which leads here again: the first call goes on.
        if self.starting.replace(true) {
            return;
        }
        let driver = self.driver.borrow().clone();
        while let Some(driver) = &driver
            && self.started.borrow().len() < self.limits.get().depth
        {
            let Some(request) = self.waiting.borrow_mut().pop_front() else { break };
            self.started.borrow_mut().push(Rc::clone(&request));
            driver.queue(request);
        }
        self.starting.set(false);
    }
}

/// A block device; clones share it.
#[derive(Clone)]
pub struct Gendisk(Rc<Inner>);

impl Gendisk {
    /// A device called `name` without a driver, of size 0. Requests wait until it has a driver.
    pub fn new(name: &str, limits: QueueLimits) -> Self {
        assert!(limits.depth > 0 && limits.max_sectors > 0, "a queue without room: {limits:?}");
        Self(Rc::new(Inner {
            name: name.to_owned(),
            limits: Cell::new(limits),
            size_sectors: Cell::new(0),
            read_only: Cell::new(false),
            driver: RefCell::default(),
            openers: RefCell::default(),
            waiting: RefCell::default(),
            started: RefCell::default(),
            next: Cell::new(0),
            starting: Cell::new(false),
        }))
    }

    /// Its name, without `/dev/`.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Sets the driver, which gets the requests that wait.
    pub fn set_driver(&self, driver: Rc<dyn BlockDriver>) {
        *self.0.driver.borrow_mut() = Some(driver);
        self.0.start();
    }

    /// The limits of its queue.
    pub fn limits(&self) -> QueueLimits {
        self.0.limits.get()
    }

    /// Changes the limits, for bios submitted from now on.
    pub fn set_limits(&self, limits: QueueLimits) {
        self.0.limits.set(limits);
        self.0.start();
    }

    /// Size in sectors of 512 bytes.
    pub fn size_sectors(&self) -> u64 {
        self.0.size_sectors.get()
    }

    /// Changes the size, whoever has it open. Requests that were submitted before go on.
    pub fn set_size(&self, sectors: u64) {
        self.0.size_sectors.set(sectors);
    }

    /// Whether it may only be read.
    pub fn is_read_only(&self) -> bool {
        self.0.read_only.get()
    }

    /// Says whether it may only be read.
    pub fn set_read_only(&self, read_only: bool) {
        self.0.read_only.set(read_only);
    }

    /// Opens it as `name`. With `exclusive` nobody else may have it open exclusively, as mounts have.
    ///
    /// # Errors
    /// `EROFS` for writing to a device that may only be read, `EBUSY`.
    pub fn open(&self, name: &str, write: bool, exclusive: bool) -> Result<Opener, Errno> {
        if write && self.is_read_only() {
            return Err(Errno::EROFS);
        }
        let mut openers = self.0.openers.borrow_mut();
        if exclusive && openers.values().any(|other| other.exclusive) {
            return Err(Errno::EBUSY);
        }
        let number = self.0.number();
        openers.insert(number, OpenedBy { name: name.to_owned(), exclusive });
        Ok(Opener { disk: self.clone(), number })
    }

    /// The names of those who have it open, in the order in which they opened it.
    pub fn openers(&self) -> Vec<String> {
        self.0.openers.borrow().values().map(|opener| opener.name.clone()).collect()
    }

    /// Requests that the driver has.
    pub fn started(&self) -> Vec<Rc<BlockRequest>> {
        self.0.started.borrow().clone()
    }

    /// Requests that were submitted and are not answered.
    pub fn outstanding(&self) -> usize {
        self.0.started.borrow().len() + self.0.waiting.borrow().len()
    }

    /// Fails every request that is not answered, also those that the driver does not have yet.
    pub fn fail_all(&self, error: Errno) {
        let waiting = std::mem::take(&mut *self.0.waiting.borrow_mut());
        for request in waiting {
            request.result.set(Some(Err(error)));
            request.opener.wake();
        }
        self.started().iter().for_each(|request| {
            request.end(Err(error));
        });
    }

    fn put(&self, request: BlockRequest) -> Rc<BlockRequest> {
        let request = Rc::new(request);
        self.0.waiting.borrow_mut().push_back(Rc::clone(&request));
        self.0.start();
        request
    }

    fn request(&self, bio: &Bio, range: SectorRange, data: Vec<u8>) -> Rc<BlockRequest> {
        let limits = self.limits();
        self.put(BlockRequest {
            disk: Rc::downgrade(&self.0),
            number: self.0.number(),
            kind: bio.kind,
            range,
            fua: bio.fua && limits.write_cache && limits.fua,
            unmap: bio.unmap,
            data: RefCell::new(data),
            result: Cell::new(None),
            opener: OneWaiter::default(),
        })
    }

    /// Most sectors of a request of `kind`.
    fn most(&self, kind: IoKind) -> u32 {
        let limits = self.limits();
        match kind {
            IoKind::Read | IoKind::Write => limits.max_sectors,
            IoKind::Discard => limits.max_discard_sectors,
            IoKind::WriteZeroes => limits.max_zeroes_sectors,
            IoKind::Flush => u32::MAX,
        }
    }

    fn check(&self, bio: &Bio) -> Result<(), Errno> {
        let has_data = matches!(bio.kind, IoKind::Read | IoKind::Write);
        let bytes = if has_data { bio.range.len_bytes() as usize } else { 0 };
        assert_eq!(bio.data.len(), bytes, "the data of a {} of {}", bio.kind, bio.range);
        let block = u64::from(self.limits().logical_block_bytes) / SECTOR_BYTES;
        if bio.kind != IoKind::Flush && !bio.range.fits(self.size_sectors()) {
            return Err(Errno::EIO);
        }
        if !bio.range.start.0.is_multiple_of(block) || !u64::from(bio.range.count).is_multiple_of(block) {
            return Err(Errno::EINVAL);
        }
        if self.is_read_only() && !matches!(bio.kind, IoKind::Read | IoKind::Flush) {
            return Err(Errno::EPERM);
        }
        if self.most(bio.kind) == 0 { Err(Errno::EOPNOTSUPP) } else { Ok(()) }
    }

    async fn submit(&self, mut bio: Bio) -> (Result<(), Errno>, Vec<u8>) {
        if let Err(error) = self.check(&bio) {
            return (Err(error), bio.data);
        }
        if bio.kind == IoKind::Flush {
            return (self.flush(&bio).await, bio.data);
        }
        let (most, mut rest) = (self.most(bio.kind), std::mem::take(&mut bio.data));
        let (mut at, mut left) = (bio.range.start.0, bio.range.count);
        let mut parts = Vec::new();
        while left > 0 {
            let range = SectorRange::new(at, left.min(most));
            let after = rest.split_off(rest.len().min(range.len_bytes() as usize));
            parts.push(self.request(&bio, range, std::mem::replace(&mut rest, after)));
            (at, left) = (at + u64::from(range.count), left - range.count);
        }
        let (mut result, mut data) = (Ok(()), Vec::new());
        for part in parts {
            result = result.and(part.ended().await);
            match data.is_empty() {
                true => data = part.data.take(),
                false => data.append(&mut part.data.borrow_mut()),
            }
        }
        let limits = self.limits();
        if bio.fua && result.is_ok() && limits.write_cache && !limits.fua {
            result = self.flush(&Bio::new(IoKind::Flush, SectorRange::default())).await;
        }
        (result, data)
    }

    async fn flush(&self, bio: &Bio) -> Result<(), Errno> {
        if !self.limits().write_cache {
            return Ok(());
        }
        self.request(bio, SectorRange::default(), Vec::new()).ended().await
    }
}

/// A device that somebody has open; closed when dropped.
pub struct Opener {
    disk: Gendisk,
    number: u64,
}

impl Opener {
    /// The device.
    pub fn disk(&self) -> &Gendisk {
        &self.disk
    }

    /// Submits `bio` at the first poll; returns its data as well. A future that is dropped does not take it back.
    ///
    /// # Errors
    /// `EIO` beyond the end, `EINVAL` for a part of a logical block, `EPERM` for a change of a device that may only be
    /// read, `EOPNOTSUPP` for what the device does not know; those of the driver.
    pub fn submit(&self, bio: Bio) -> impl Future<Output = (Result<(), Errno>, Vec<u8>)> + 'static {
        let disk = self.disk.clone();
        async move { disk.submit(bio).await }
    }
}

impl Drop for Opener {
    fn drop(&mut self) {
        let mut openers = self.disk.0.openers.borrow_mut();
        openers.remove(&self.number);
        let last = openers.is_empty();
        drop(openers);
        let driver = self.disk.0.driver.borrow().clone();
        if last && let Some(driver) = driver {
            driver.released();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::{Context, Waker};

    const LIMITS: QueueLimits = QueueLimits {
        depth: 2,
        logical_block_bytes: 512,
        max_sectors: 8,
        max_discard_sectors: 16,
        max_zeroes_sectors: 0,
        write_cache: true,
        fua: false,
    };

    /// Keeps what it gets.
    #[derive(Default)]
    struct Held {
        requests: RefCell<Vec<Rc<BlockRequest>>>,
        released: Cell<u32>,
    }

    impl BlockDriver for Held {
        fn queue(&self, request: Rc<BlockRequest>) {
            self.requests.borrow_mut().push(request);
        }
        fn released(&self) {
            self.released.set(self.released.get() + 1);
        }
    }

    impl Held {
        fn seen(&self) -> Vec<(IoKind, SectorRange)> {
            self.requests.borrow().iter().map(|r| (r.kind, r.range)).collect()
        }
    }

    fn device() -> (Gendisk, Rc<Held>) {
        let (disk, driver) = (Gendisk::new("nbd0", LIMITS), Rc::<Held>::default());
        disk.set_driver(Rc::clone(&driver) as Rc<dyn BlockDriver>);
        disk.set_size(64);
        (disk, driver)
    }

    fn write(start: u64, count: u32) -> Bio {
        let range = SectorRange::new(start, count);
        Bio { data: vec![7; range.len_bytes() as usize], ..Bio::new(IoKind::Write, range) }
    }

    fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn a_bio_is_split_and_waits_for_its_turn_and_its_flush() {
        let (disk, driver) = device();
        let opener = disk.open("dd", true, false).unwrap();
        let mut bio = pin!(opener.submit(Bio { fua: true, ..write(0, 20) }));
        assert!(poll(bio.as_mut()).is_pending());
        let ranges = [SectorRange::new(0, 8), SectorRange::new(8, 8), SectorRange::new(16, 4)];
        assert_eq!(
            (driver.seen(), disk.outstanding()),
            (vec![(IoKind::Write, ranges[0]), (IoKind::Write, ranges[1])], 3)
        );
        let first = Rc::clone(&driver.requests.borrow()[0]);
        assert!(first.end(Ok(())) && !first.end(Err(Errno::EIO)));
        assert_eq!(driver.seen().last(), Some(&(IoKind::Write, ranges[2])));
        for i in [2, 1] {
            driver.requests.borrow()[i].with(|bytes| assert_eq!(bytes.len() as u64, ranges[i].len_bytes()));
            let request = Rc::clone(&driver.requests.borrow()[i]);
            request.end(Ok(()));
        }
        assert!(poll(bio.as_mut()).is_pending());
        let flush = driver.requests.borrow().last().map(Rc::clone).unwrap();
        assert_eq!((flush.kind, flush.range.count), (IoKind::Flush, 0));
        flush.end(Ok(()));
        assert_eq!(poll(bio.as_mut()), Poll::Ready((Ok(()), vec![7; 20 * 512])));
        assert_eq!(disk.outstanding(), 0);
    }

    #[test]
    fn the_bytes_of_a_read_come_back_in_order() {
        let (disk, driver) = device();
        let opener = disk.open("dd", false, false).unwrap();
        let bio = Bio { data: vec![0; 9 * 512], ..Bio::new(IoKind::Read, SectorRange::new(1, 9)) };
        let mut bio = pin!(opener.submit(bio));
        assert!(poll(bio.as_mut()).is_pending());
        for (request, byte) in disk.started().iter().zip(1..) {
            request.with_mut(|bytes| bytes.fill(byte));
            request.end(Ok(()));
        }
        let Poll::Ready((Ok(()), data)) = poll(bio.as_mut()) else { panic!("it is answered") };
        assert_eq!((data.len(), data[8 * 512 - 1], data[8 * 512]), (9 * 512, 1, 2));
        assert_eq!(driver.seen().len(), 2);
    }

    #[test]
    fn what_makes_no_sense_is_refused_before_the_driver_sees_it() {
        let (disk, driver) = device();
        let opener = disk.open("dd", true, false).unwrap();
        let refused = |bio: Bio| poll(pin!(opener.submit(bio))).map(|(result, _)| result);
        assert_eq!(refused(write(60, 8)), Poll::Ready(Err(Errno::EIO)));
        let zeroes = Bio::new(IoKind::WriteZeroes, SectorRange::new(0, 8));
        assert_eq!(refused(zeroes), Poll::Ready(Err(Errno::EOPNOTSUPP)));
        disk.set_limits(QueueLimits { logical_block_bytes: 4096, write_cache: false, ..LIMITS });
        assert_eq!(refused(write(1, 8)), Poll::Ready(Err(Errno::EINVAL)));
        assert_eq!(refused(Bio::new(IoKind::Flush, SectorRange::default())), Poll::Ready(Ok(())));
        disk.set_read_only(true);
        let discard = Bio::new(IoKind::Discard, SectorRange::new(0, 8));
        assert_eq!(refused(discard), Poll::Ready(Err(Errno::EPERM)));
        assert!(driver.seen().is_empty() && disk.is_read_only());
        assert_eq!(disk.open("dd", true, false).err(), Some(Errno::EROFS));
    }

    #[test]
    fn openers_come_and_go_and_requests_outlive_them() {
        let (disk, driver) = device();
        let mount = disk.open("mount", true, true).unwrap();
        assert_eq!(disk.open("blkback", true, true).err(), Some(Errno::EBUSY));
        let other = disk.open("dd", true, false).unwrap();
        assert_eq!(disk.openers(), ["mount", "dd"]);
        {
            let mut dropped = pin!(other.submit(write(0, 24)));
            assert!(poll(dropped.as_mut()).is_pending());
        }
        drop((mount, other));
        assert_eq!((driver.released.get(), disk.outstanding(), disk.name()), (1, 3, "nbd0"));
        disk.fail_all(Errno::EIO);
        assert_eq!((disk.outstanding(), driver.seen().len()), (0, 2), "the third never reached the driver");
    }
}
