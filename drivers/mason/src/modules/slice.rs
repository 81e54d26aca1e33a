//! `slice`: a part of a disk.

use super::split::{Layout, Place};
use crate::graph::signature::{Arity, Below, Keeps, Need, Param, Params, Port, Signature};
use crate::graph::value::{Type, Value};
use std::ops::Range;
use tap_host::{Probe, SECTOR_BYTES};

tap_host::listed! {
    pub(crate) BUGS: Bug;
    SLICE_SHIFTED = "slice-shifted", "a part of a disk begins one sector too late";
}

pub(super) fn signature() -> Signature {
    Signature {
        name: "slice",
        about: "a part of a disk",
        params: vec![
            Param::new("range", Type::ByteRange, "which part, from its first byte to the one after its last")
                .within(0, 1 << 62)
                .multiple_of(SECTOR_BYTES),
        ],
        ports: vec![Port { name: "whole", arity: Arity::One, need: Need::AsAbove, about: "the disk" }],
        writable: true,
        keeps: Keeps::Nothing,
        agree: None,
        size: Some(size),
    }
}

fn size(params: &Params, below: &[Below]) -> Result<u64, String> {
    let (from, to) = params.range(0);
    match below.first().map_or(0, |whole| whole.size_bytes) {
        whole if to > whole => {
            Err(format!("it ends at {}, and the disk below it at {}", Value::Bytes(to), Value::Bytes(whole)))
        }
        _ => Ok(to - from),
    }
}

/// Sectors from one on.
pub struct Slice {
    first: u64,
    count: u64,
}

impl Slice {
    /// `count` sectors from `first` on.
    pub fn new(host: &impl Probe, first: u64, count: u64) -> Self {
        let first = if host.bug(&SLICE_SHIFTED) { first + 1 } else { first };
        Self { first, count }
    }
}

impl Layout for Slice {
    fn place(&self, sector: u64) -> Place {
        Place { node: 0, sector: self.first + sector, count: self.count - sector }
    }

    fn ranges(&self, range: Range<u64>) -> Vec<(usize, Range<u64>)> {
        vec![(0, self.first + range.start..self.first + range.end)]
    }
}
