//! Requests to a disk, and a client whose timeouts suit virtual time.

use super::address;
use tap_core::{Node, Request};
use tap_host::{Errno, IoBuf, IoVec, SECTOR_BYTES, SectorRange, bytes_of};
use tap_nbd::ClientConfig;

/// Timeouts that suit virtual time.
pub fn config() -> ClientConfig {
    ClientConfig {
        request_ns: 1_000_000_000,
        pause_ns: 1_000_000,
        pause_most_ns: 8_000_000,
        reconnect_ns: 500_000_000,
        refused_ns: 500_000_000,
        ..ClientConfig::new(address())
    }
}

/// Buffers of the given lengths, filled with `byte`.
pub fn bufs(lens: &[usize], byte: u8) -> IoVec {
    let one = |len: &usize| {
        let mut buf = IoBuf::unpooled(*len).unwrap();
        buf.fill(byte);
        buf
    };
    lens.iter().map(one).collect()
}

pub fn joined(bufs: &IoVec) -> Vec<u8> {
    bufs.iter().flat_map(|buf| buf.to_vec()).collect()
}

pub fn range(start: u64, bytes: usize) -> SectorRange {
    SectorRange::new(start, (bytes as u64 / SECTOR_BYTES) as u32)
}

pub async fn write(node: &dyn Node, start: u64, len: usize, byte: u8) -> Result<(), Errno> {
    let response = node.submit(Request::write(range(start, len), bufs(&[len], byte))).await;
    assert_eq!((response.bufs.len(), bytes_of(&response.bufs)), (1, len), "buffers are returned");
    response.result
}

pub async fn read(node: &dyn Node, start: u64, len: usize) -> Result<Vec<u8>, Errno> {
    let response = node.submit(Request::read(range(start, len), bufs(&[len], 0xee))).await;
    assert_eq!(bytes_of(&response.bufs), len, "buffers are returned");
    response.result.map(|()| joined(&response.bufs))
}

pub async fn flush(node: &dyn Node) -> Result<(), Errno> {
    node.submit(Request::flush()).await.result
}
