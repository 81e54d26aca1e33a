//! `zero`, `pattern` and `error`: disks without a place for what is written.
//!
//! | class | a read |
//! |---|---|
//! | `zero` | zeros |
//! | `pattern` | numbers that follow from the seed and the place |
//! | `error` | fails, and so does a write |

use crate::graph::signature::{Below, Keeps, Param, Params, Signature};
use crate::graph::value::{Type, Value};
use std::future::ready;
use tap_core::{Durable, Extent, LocalBoxFuture, Node, NodeInfo, Op, Request, Response, Source};
use tap_host::{Errno, SECTOR_BYTES, SectorRange, copy_from_slice};

/// Largest disk, in bytes.
const MAX_BYTES: u64 = 1 << 50;

fn sized() -> Param {
    Param::new("size", Type::Bytes, "size of the disk")
        .within(SECTOR_BYTES, MAX_BYTES)
        .multiple_of(SECTOR_BYTES)
}

fn size(params: &Params, _: &[Below]) -> Result<u64, String> {
    Ok(params.number(0))
}

fn signature(name: &'static str, about: &'static str, writable: bool, more: Vec<Param>) -> Signature {
    Signature {
        name,
        about,
        params: std::iter::once(sized()).chain(more).collect(),
        ports: vec![],
        writable,
        keeps: Keeps::Nothing,
        agree: None,
        size: Some(size),
    }
}

pub(super) fn zero() -> Signature {
    signature("zero", "reads as zeros", false, vec![])
}

pub(super) fn pattern() -> Signature {
    let seed = Param::new("seed", Type::Count, "another seed makes another pattern").or(Value::Count(0));
    signature("pattern", "reads as numbers that follow from a seed and from the place", false, vec![seed])
}

/// The errors that `error` may answer with.
const ERRORS: [(&str, Errno); 4] = [
    ("eio", Errno::EIO),
    ("enospc", Errno::ENOSPC),
    ("enomem", Errno::ENOMEM),
    ("etimedout", Errno::ETIMEDOUT),
];

pub(super) fn error() -> Signature {
    let words = ERRORS.iter().map(|(word, _)| (*word).to_owned()).collect();
    let errno = Param::new("errno", Type::OneOf(words), "the error").or(Value::Word("eio".into()));
    signature("error", "fails every read and write", true, vec![errno])
}

/// What a disk without a place for data answers.
#[derive(Clone, Copy)]
pub enum Answer {
    /// Zeros.
    Zeros,
    /// A pattern, with its seed.
    Pattern(u64),
    /// An error.
    Error(Errno),
}

/// A disk without a place for data.
pub struct Fixed {
    info: NodeInfo,
    answer: Answer,
}

impl Fixed {
    /// A disk of `size_bytes` that answers with `answer`.
    pub fn new(size_bytes: u64, answer: Answer) -> Self {
        let read_only = !matches!(answer, Answer::Error(_));
        let info =
            NodeInfo { durable: Durable::AtAnswer, ..NodeInfo::new(size_bytes / SECTOR_BYTES, read_only) };
        Self { info, answer }
    }

    /// The error called `word`.
    pub(super) fn error_called(word: &str) -> Errno {
        ERRORS.iter().find(|(known, _)| *known == word).map_or(Errno::EIO, |(_, errno)| *errno)
    }
}

/// The bytes of a pattern in `sector`.
pub fn pattern_of(seed: u64, sector: u64) -> [u8; SECTOR_BYTES as usize] {
    let mut bytes = [0; SECTOR_BYTES as usize];
    for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
        // SplitMix64: each place has its own number.
        let mut n = seed ^ (sector * (SECTOR_BYTES / 8) + i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word.copy_from_slice(&(n ^ (n >> 31)).to_le_bytes());
    }
    bytes
}

impl Node for Fixed {
    fn submit(&self, mut request: Request) -> LocalBoxFuture<Response> {
        let mut result = self.info.check(&request);
        if result.is_ok() && request.op != Op::Flush {
            match self.answer {
                Answer::Zeros => request.bufs.iter_mut().for_each(|buf| buf.fill(0)),
                Answer::Pattern(seed) => {
                    for i in 0..u64::from(request.range.count) {
                        let bytes = pattern_of(seed, request.range.start.0 + i);
                        copy_from_slice(&mut request.bufs, (i * SECTOR_BYTES) as usize, &bytes);
                    }
                }
                Answer::Error(error) => result = Err(error),
            }
        }
        Box::pin(ready(Response { result, bufs: request.bufs }))
    }

    fn extents(&self, range: SectorRange, _: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
        let zero = matches!(self.answer, Answer::Zeros);
        let source = if zero { Source::Nothing } else { Source::UNKNOWN };
        let extent = Extent { count: range.count.into(), source, zero, allocated: !zero };
        Box::pin(ready(Ok(vec![extent])))
    }

    fn info(&self) -> NodeInfo {
        self.info
    }

    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        Box::pin(ready(Ok(())))
    }
}
