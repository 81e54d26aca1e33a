//! A peer of our NBD client that is no NBD server, speaks a dialect that our client does not, or has an export that it
//! cannot use. The client must say so, and soon.

use super::RawNbd;
use sim::Label;
use tap_abi::nbd::{
    BASE_ALLOCATION, Hello, INFO_BLOCK_SIZE, INFO_EXPORT, InfoBlockSize, InfoExport, OPT_GO,
    OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY, OptionHeader, OptionReply, REP_ACK, REP_ERR_UNSUP, REP_INFO,
    REP_META_CONTEXT, REP_SERVER, export, handshake,
};
use tap_host::Stream;
use zerocopy::{FromBytes, IntoBytes};

/// What is wrong with a greeting: an index into `Wrong::ALL` plus one in 4 bits, and the option whose reply it is in
/// 2; 0 for nothing.
pub static NBD_GREETING: Label = Label::packed("nbd-greeting", "greeting {n} is wrong: {}", &[4, 2]);

/// The kinds of [`NBD_GREETING`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wrong {
    /// The first eight bytes.
    Magic,
    /// The next eight: those of the old style.
    Style,
    /// The magic of a reply to an option.
    ReplyMagic,
    /// A reply to another option.
    OtherOption,
    /// A reply that claims more bytes than any option needs.
    LongReply,
    /// A reply of a kind that does not belong to the option.
    Kind,
    /// The stream ends instead of a reply.
    Ends,
    /// There is no reply.
    Silent,
    /// A context without a whole number.
    CutContext,
    /// The choice is granted, but the export is not described.
    NoExport,
    /// Blocks of more than a sector.
    LargeBlocks,
    /// Requests of less than a sector.
    SmallRequests,
    /// More bytes than an offset can count.
    Huge,
}

impl Wrong {
    const ALL: [Self; 13] = [
        Self::Magic,
        Self::Style,
        Self::ReplyMagic,
        Self::OtherOption,
        Self::LongReply,
        Self::Kind,
        Self::Ends,
        Self::Silent,
        Self::CutContext,
        Self::NoExport,
        Self::LargeBlocks,
        Self::SmallRequests,
        Self::Huge,
    ];
}

/// Draws a value of [`NBD_GREETING`].
pub fn draw_greeting(mut below: impl FnMut(u64) -> u64) -> u64 {
    match below(4) {
        0 => 0,
        _ => (1 + below(Wrong::ALL.len() as u64)) | (below(4) << 4),
    }
}

/// Whether a value of [`NBD_GREETING`] is one that the client must refuse.
pub fn is_wrong(value: u64) -> bool {
    wrong(value).is_some()
}

/// A value of [`NBD_GREETING`] in words.
pub fn describe_greeting(value: u64) -> String {
    wrong(value).map_or("nothing".into(), |wrong| format!("{wrong:?}, option {}", place(wrong, value)))
}

fn wrong(value: u64) -> Option<Wrong> {
    (value & 15).checked_sub(1).and_then(|at| Wrong::ALL.get(at as usize).copied())
}

/// The option whose reply is wrong, from 0. Those that a client asks first may be answered in ways that mean no.
fn place(wrong: Wrong, value: u64) -> u64 {
    if wrong == Wrong::Kind { value >> 4 | 2 } else { value >> 4 }
}

type Replies = Vec<(u32, Vec<u8>)>;

/// The replies to `option`, in which `wrong` may be wrong.
fn replies(option: u32, wrong: Option<Wrong>, size_bytes: u64) -> Replies {
    match option {
        OPT_STRUCTURED_REPLY => vec![(REP_ACK, Vec::new())],
        OPT_SET_META_CONTEXT => {
            let mut context = [&1_u32.to_be_bytes(), BASE_ALLOCATION.as_bytes()].concat();
            if wrong == Some(Wrong::CutContext) {
                context.truncate(3);
            }
            vec![(REP_META_CONTEXT, context), (REP_ACK, Vec::new())]
        }
        OPT_GO => {
            let flags = (export::HAS_FLAGS | export::SEND_FLUSH).into();
            let size = if wrong == Some(Wrong::Huge) { 1 << 63 } else { size_bytes };
            let info = InfoExport { kind: INFO_EXPORT.into(), size: size.into(), flags };
            let sizes = InfoBlockSize {
                kind: INFO_BLOCK_SIZE.into(),
                minimum: if wrong == Some(Wrong::LargeBlocks) { 4096 } else { 1 }.into(),
                preferred: 4096.into(),
                maximum: if wrong == Some(Wrong::SmallRequests) { 511 } else { 1 << 20 }.into(),
            };
            let mut all = vec![(REP_INFO, sizes.as_bytes().to_vec()), (REP_ACK, Vec::new())];
            if wrong != Some(Wrong::NoExport) {
                all.insert(0, (REP_INFO, info.as_bytes().to_vec()));
            }
            all
        }
        _ => vec![(REP_ERR_UNSUP, Vec::new())],
    }
}

/// Greets a client on `raw` as `value` of [`NBD_GREETING`] says, answers its options, and then listens until it has
/// gone.
pub async fn greet<S: Stream>(raw: &RawNbd<S>, value: u64, size_bytes: u64) {
    let wrong = wrong(value);
    let mut hello = Hello::new(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).as_bytes().to_vec();
    match wrong {
        Some(Wrong::Magic) => hello[7] ^= 1,
        Some(Wrong::Style) => hello[8..16].copy_from_slice(&0x0000_4202_8186_1253_u64.to_be_bytes()),
        _ => {}
    }
    let _gone = raw.send(&hello).await;
    let _ended = answer_options(raw, wrong, wrong.map_or(0, |wrong| place(wrong, value)), size_bytes).await;
    raw.drain().await;
}

/// `None` once the client or this side has ended the stream.
async fn answer_options<S: Stream>(
    raw: &RawNbd<S>,
    wrong: Option<Wrong>,
    place: u64,
    size_bytes: u64,
) -> Option<()> {
    raw.take(4).await?;
    for n in 0.. {
        let asked = OptionHeader::read_from_bytes(&raw.take(OptionHeader::BYTES).await?).ok()?;
        raw.take(asked.len.get() as usize).await?;
        let option = asked.option.get();
        // What can be wrong with any reply.
        let here = wrong.filter(|_| n == place);
        for (kind, data) in replies(option, wrong, size_bytes) {
            let named = if here == Some(Wrong::OtherOption) { option ^ 1 } else { option };
            let kind = if here == Some(Wrong::Kind) { REP_SERVER } else { kind };
            let len = if here == Some(Wrong::LongReply) { 1 << 30 } else { data.len() as u32 };
            let mut head = OptionReply::new(named, kind, len).as_bytes().to_vec();
            match here {
                Some(Wrong::ReplyMagic) => head[0] ^= 0x80,
                Some(Wrong::Ends) => {
                    raw.close();
                    return None;
                }
                Some(Wrong::Silent) => return None,
                _ => {}
            }
            raw.send(&[head, data].concat()).await.ok()?;
        }
    }
    None
}
