//! Allocates space for new clusters.

use super::HostOffset;
use std::collections::BTreeMap;
use tap_host::Errno;

/// The space of a file. Allocations are not durable before something refers to them; returned space can be allocated
/// again.
pub trait Allocator: 'static {
    /// Allocates `len` contiguous bytes, a multiple of the cluster size; returns their offset.
    ///
    /// # Errors
    /// `ENOSPC`.
    fn allocate(&mut self, len: u64) -> Result<HostOffset, Errno>;

    /// Returns `len` bytes from `host` on, to which nothing can refer. A retried request gets them first.
    fn take_back(&mut self, host: HostOffset, len: u64);

    /// Whether a new cluster at `host` may contain other bytes than zeros.
    fn is_dirty(&self, host: HostOffset) -> bool;

    /// The least end of the file.
    fn end(&self) -> HostOffset;
}

/// Limit of returned places that are not the last. Above it, the first ones in the file are lost.
const MAX_RETURNED: usize = 256;

/// The space of formats without a free list: it is allocated from the end only.
///
/// ```text
///   header  root  tables and clusters, live and lost │ frontier ──► never used
/// ```
///
/// Past the frontier a file reads as zeros; a block device holds anything. Space of a failed data write is returned to
/// the frontier, or kept for the next allocation that fits. It is then no longer known to be zeros. If the medium
/// failed, the place is lost: the next write would fail there as well.
pub struct Frontier {
    /// A multiple of the cluster size.
    frontier: HostOffset,
    /// The end of a block device.
    limit: HostOffset,
    /// Unmapped space below this may hold anything.
    dirty_until: HostOffset,
    /// Returned places that are not the last, with their lengths in bytes.
    returned: BTreeMap<HostOffset, u64>,
    /// The sum of these lengths.
    returned_bytes: u64,
}

impl Frontier {
    /// The space from `frontier` on, a multiple of the cluster size; on a block device up to `device_bytes`.
    pub fn new(frontier: HostOffset, device_bytes: Option<u64>) -> Self {
        let limit = HostOffset(device_bytes.unwrap_or(i64::MAX as u64));
        let dirty_until = HostOffset(if device_bytes.is_some() { u64::MAX } else { 0 });
        Self { frontier, limit, dirty_until, returned: BTreeMap::new(), returned_bytes: 0 }
    }

    /// Takes the first returned place of at least `len` bytes. It may hold anything.
    fn reuse(&mut self, len: u64) -> Option<HostOffset> {
        let (host, there) = self.returned.iter().find(|(_, there)| **there >= len)?;
        let (host, there) = (*host, *there);
        self.returned.remove(&host);
        if there > len {
            self.returned.insert(host + len, there - len);
        }
        self.returned_bytes -= len;
        self.dirty_until = self.dirty_until.max(host + len);
        self.check();
        Some(host)
    }

    /// Asserts that no returned place is lost or listed twice, and that adjacent ones are one.
    fn check(&self) {
        let (count, bytes) = (self.returned.len(), self.returned.values().sum::<u64>());
        assert!(count <= MAX_RETURNED, "{count} returned places exceed the limit");
        assert_eq!(bytes, self.returned_bytes, "bytes of returned places");
        let mut end = HostOffset(0);
        for (host, len) in &self.returned {
            assert!(*len > 0 && (*host > end || end.0 == 0), "a returned place of {len} bytes at {host:?}");
            end = *host + *len;
        }
        assert!(end <= self.frontier, "returned places past the frontier");
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

    /// Space at the end of the file lowers the frontier; other space is kept for reuse.
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
    fn reused_space_comes_before_new_space() {
        let mut allocator = Frontier::new(place(10), None);
        allocator.take_back(place(2), 1 << 12);
        allocator.take_back(place(4), 1 << 12);
        assert_eq!(allocator.reuse(2 << 12), None, "the two places are not adjacent");
        allocator.take_back(place(3), 1 << 12);
        assert_eq!(allocator.reuse(2 << 12), Some(place(2)));
        assert!(allocator.is_dirty(place(2)), "part of the failed write may be there");
        assert_eq!(allocator.reuse(1 << 12), Some(place(4)));
        assert_eq!((allocator.reuse(1 << 12), allocator.frontier), (None, place(10)));
        allocator.take_back(place(8), 1 << 12);
        allocator.take_back(place(9), 1 << 12);
        assert_eq!(
            allocator.frontier,
            place(8),
            "the last place lowers the frontier, with all free space before it"
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
