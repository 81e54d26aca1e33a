//! Where new clusters go.

use super::HostOffset;
use std::collections::BTreeMap;
use tap_host::Errno;

/// The space of a file. What is taken is not durable before what refers to it; what was given back can be taken again.
pub trait Allocator: 'static {
    /// Takes `len` contiguous bytes, a multiple of the size of clusters; gives where they begin.
    ///
    /// # Errors
    /// `ENOSPC`.
    fn allocate(&mut self, len: u64) -> Result<HostOffset, Errno>;

    /// Takes `len` bytes from `host` on back, to which nothing can refer. A request that is repeated finds them first.
    fn take_back(&mut self, host: HostOffset, len: u64);

    /// Whether a new cluster at `host` may hold other bytes than zeros.
    fn is_dirty(&self, host: HostOffset) -> bool;

    /// Where the file has to end at least.
    fn end(&self) -> HostOffset;
}

/// Most places that are given back and not the last. Beyond, those that lie first are lost.
const MAX_RETURNED: usize = 256;

/// The space of formats without a list of what is free: it is taken from the end only.
///
/// ```text
///   header  root  tables and clusters, live and lost │ frontier ──► never used
/// ```
///
/// On a file, what is behind the frontier reads as zeros; on a block device it holds anything. What a failed write of
/// data leaves is taken back: to it, or to the next who needs so much. It is then no longer known to be zeros. Where
/// the medium failed, the place is lost: the next would fail there as well.
pub struct Frontier {
    /// A multiple of the cluster size.
    frontier: HostOffset,
    /// The end of a block device.
    limit: HostOffset,
    /// Below this what was never mapped may hold anything.
    dirty_until: HostOffset,
    /// Places that were given back and have others behind them, and how many bytes each has.
    returned: BTreeMap<HostOffset, u64>,
    /// Bytes of them.
    returned_bytes: u64,
}

impl Frontier {
    /// The space from `frontier` on, a multiple of the cluster size; of a block device of `device_bytes`, if it is
    /// one.
    pub fn new(frontier: HostOffset, device_bytes: Option<u64>) -> Self {
        let limit = HostOffset(device_bytes.unwrap_or(i64::MAX as u64));
        let dirty_until = HostOffset(if device_bytes.is_some() { u64::MAX } else { 0 });
        Self { frontier, limit, dirty_until, returned: BTreeMap::new(), returned_bytes: 0 }
    }

    /// The first place of `len` bytes that was given back. It may hold anything.
    fn reuse(&mut self, len: u64) -> Option<HostOffset> {
        let (host, there) = self.returned.iter().find(|(_, there)| **there >= len)?;
        let (host, there) = (*host, *there);
        self.returned.remove(&host);
        if there > len {
            self.returned.insert(host + len, there - len);
        }
        self.returned_bytes -= len;
        self.dirty_until = self.dirty_until.max(host + len);
        Some(host)
    }

    /// No place that was given back is lost, and none is in the list twice.
    fn check(&self) {
        let (count, bytes) = (self.returned.len(), self.returned.values().sum::<u64>());
        assert!(count <= MAX_RETURNED, "{count} places that were given back are remembered");
        assert_eq!(bytes, self.returned_bytes, "bytes of places that were given back");
    }
}

impl Allocator for Frontier {
    fn allocate(&mut self, len: u64) -> Result<HostOffset, Errno> {
        if let Some(host) = self.reuse(len) {
            return Ok(host);
        }
        let offset = self.frontier;
        match offset.0.checked_add(len).map(HostOffset) {
            Some(end) if end <= self.limit => {
                self.frontier = end;
                Ok(offset)
            }
            _ => Err(Errno::ENOSPC),
        }
    }

    /// What is the last of the file is new again; the rest goes to who needs so much next.
    fn take_back(&mut self, host: HostOffset, len: u64) {
        let (mut host, mut end) = (host, host + len);
        if let Some(after) = self.returned.remove(&end) {
            end += after;
        }
        if let Some((before, len)) = self.returned.range(..host).next_back().map(|(at, len)| (*at, *len))
            && before + len == host
        {
            self.returned.remove(&before);
            host = before;
        }
        self.returned_bytes += len;
        if end == self.frontier {
            self.frontier = host;
            self.returned_bytes -= end - host;
            self.dirty_until = self.dirty_until.max(end);
        } else {
            self.returned.insert(host, end - host);
        }
        if self.returned.len() > MAX_RETURNED
            && let Some((_, lost)) = self.returned.pop_first()
        {
            self.returned_bytes -= lost;
        }
        self.check();
    }

    fn is_dirty(&self, host: HostOffset) -> bool {
        host < self.dirty_until
    }

    fn end(&self) -> HostOffset {
        self.frontier
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Place number `n`, of 4096 bytes.
    fn place(n: u64) -> HostOffset {
        HostOffset(n << 12)
    }

    #[test]
    fn what_is_given_back_is_used_before_anything_new() {
        let mut allocator = Frontier::new(place(10), None);
        allocator.take_back(place(2), 1 << 12);
        allocator.take_back(place(4), 1 << 12);
        assert_eq!(allocator.reuse(2 << 12), None, "there is something between");
        allocator.take_back(place(3), 1 << 12);
        assert_eq!(allocator.reuse(2 << 12), Some(place(2)));
        assert!(allocator.is_dirty(place(2)), "a part of the write that failed may be there");
        assert_eq!(allocator.reuse(1 << 12), Some(place(4)));
        assert_eq!((allocator.reuse(1 << 12), allocator.frontier), (None, place(10)));
        allocator.take_back(place(8), 1 << 12);
        allocator.take_back(place(9), 1 << 12);
        assert_eq!(
            allocator.frontier,
            place(8),
            "what is last is taken back with all that is free before it"
        );
        assert!(allocator.is_dirty(place(9)) && !allocator.is_dirty(place(10)));
        allocator.take_back(place(7), 1 << 12);
        assert_eq!(allocator.frontier, place(7));
        for n in 0..2 * MAX_RETURNED as u64 {
            allocator.take_back(place(4 * n), 1 << 12);
            allocator.frontier = HostOffset(u64::MAX << 12);
        }
        assert_eq!(allocator.returned.len(), MAX_RETURNED);
    }
}
