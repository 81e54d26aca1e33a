//! What an NBD client may ask before it chooses an export, valid and invalid, and how a server must reply.

use super::RawNbd;
use crate::check::Invariant;
use crate::world::World;
use sim::{Entity, Label};
use tap_abi::nbd::{
    ALLOCATION_DEPTH, BASE_ALLOCATION, OPT_EXTENDED_HEADERS, OPT_GO, OPT_INFO, OPT_LIST,
    OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT, OPT_STARTTLS, OPT_STRUCTURED_REPLY, OPTION_REPLY_MAGIC,
    OptionHeader, REP_ACK, REP_ERR_INVALID, REP_ERR_POLICY, REP_ERR_TOO_BIG, REP_ERR_UNKNOWN, REP_ERR_UNSUP,
    REP_INFO, REP_META_CONTEXT, REP_SERVER,
};
use tap_host::Stream;
use zerocopy::IntoBytes;

/// An option that a client sends before it chooses; 0 for none, else an index into `Question::ALL` plus one.
pub static NBD_OPTION: Label = Label::new("nbd-option", "asks option {n} before the choice: {}");

/// Maximum number of options that one client sends.
const ASKED_MAX: u32 = 3;

/// An option, and the expected replies.
struct Question {
    option: u32,
    data: Data,
    /// Kind and number of the replies before the last.
    before: (u32, usize),
    last: u32,
}

/// The data of an option.
#[derive(Clone, Copy)]
enum Data {
    Nothing,
    /// Bytes that are not valid for any option.
    Odd,
    /// More than the maximum of any option.
    Much,
    /// The name of the export, or of none that exists, and these bytes.
    Named(&'static [u8]),
    Unknown(&'static [u8]),
    /// The name of the export, and a query for its allocation.
    Query,
    /// The name of the export, and these queries.
    Queries(&'static [&'static str]),
}

const NONE: (u32, usize) = (0, 0);

impl Question {
    const fn new(option: u32, data: Data, before: (u32, usize), last: u32) -> Self {
        Self { option, data, before, last }
    }

    const ALL: [Self; 21] = [
        Self::new(OPT_INFO, Data::Named(&[0, 0]), (REP_INFO, 2), REP_ACK),
        Self::new(OPT_INFO, Data::Odd, NONE, REP_ERR_INVALID),
        Self::new(OPT_INFO, Data::Unknown(&[0, 0]), NONE, REP_ERR_UNKNOWN),
        Self::new(OPT_INFO, Data::Much, NONE, REP_ERR_TOO_BIG),
        Self::new(OPT_GO, Data::Odd, NONE, REP_ERR_INVALID),
        Self::new(OPT_GO, Data::Unknown(&[0, 0]), NONE, REP_ERR_UNKNOWN),
        Self::new(OPT_LIST, Data::Nothing, (REP_SERVER, 1), REP_ACK),
        Self::new(OPT_LIST, Data::Odd, NONE, REP_ERR_INVALID),
        Self::new(OPT_STARTTLS, Data::Nothing, NONE, REP_ERR_POLICY),
        Self::new(OPT_STRUCTURED_REPLY, Data::Odd, NONE, REP_ERR_INVALID),
        // Structured replies come first.
        Self::new(OPT_SET_META_CONTEXT, Data::Query, NONE, REP_ERR_INVALID),
        Self::new(OPT_LIST_META_CONTEXT, Data::Odd, NONE, REP_ERR_INVALID),
        Self::new(OPT_LIST_META_CONTEXT, Data::Unknown(&[0; 4]), NONE, REP_ERR_UNKNOWN),
        Self::new(OPT_LIST_META_CONTEXT, Data::Query, (REP_META_CONTEXT, 1), REP_ACK),
        Self::new(0x7a70, Data::Odd, NONE, REP_ERR_UNSUP),
        // Without a query all contexts are meant, and those of a name space by its name.
        Self::new(OPT_LIST_META_CONTEXT, Data::Named(&[0; 4]), (REP_META_CONTEXT, 2), REP_ACK),
        Self::new(OPT_LIST_META_CONTEXT, Data::Queries(&["base:"]), (REP_META_CONTEXT, 1), REP_ACK),
        Self::new(OPT_LIST_META_CONTEXT, Data::Queries(&["other:", "base:alloc"]), NONE, REP_ACK),
        Self::new(OPT_EXTENDED_HEADERS, Data::Odd, NONE, REP_ERR_INVALID),
        Self::new(OPT_LIST_META_CONTEXT, Data::Queries(&["qemu:"]), (REP_META_CONTEXT, 1), REP_ACK),
        // Also its name and its description.
        Self::new(OPT_INFO, Data::Named(&[0, 2, 0, 1, 0, 2]), (REP_INFO, 4), REP_ACK),
    ];
}

fn named(name: &str) -> Vec<u8> {
    [&(name.len() as u32).to_be_bytes()[..], name.as_bytes()].concat()
}

/// The export `name`, and queries for contexts.
fn queries(name: &str, all: &[&str]) -> Vec<u8> {
    let queries = all.iter().flat_map(|query| named(query)).collect();
    [named(name), (all.len() as u32).to_be_bytes().to_vec(), queries].concat()
}

/// The export `name`, and a query for `base:allocation`, with `depth` also for its depth.
pub(super) fn query(name: &str, depth: bool) -> Vec<u8> {
    let both = [BASE_ALLOCATION, ALLOCATION_DEPTH];
    queries(name, if depth { &both } else { &both[..1] })
}

/// Chooses no context of the export `name`, as the last choice counts.
pub(super) async fn drop_contexts<S: Stream>(world: &World, raw: &RawNbd<S>, name: &str) -> Option<()> {
    let (last, before) = ask(raw, OPT_SET_META_CONTEXT, &queries(name, &[])).await?;
    if last != REP_ACK || !before.is_empty() {
        let text = format!("a choice of no context was answered with {} of them and {last:#x}", before.len());
        world.fail(Invariant::N2, text);
        return None;
    }
    Some(())
}

/// The export `name`, without a request for information.
pub(super) fn choice(name: &str) -> Vec<u8> {
    [named(name), vec![0, 0]].concat()
}

impl Data {
    fn bytes(self, name: &str) -> Vec<u8> {
        match self {
            Self::Nothing => Vec::new(),
            Self::Odd => vec![0xff; 3],
            Self::Much => vec![0; 9000],
            Self::Named(rest) => [&named(name)[..], rest].concat(),
            Self::Unknown(rest) => [&named("no such disk")[..], rest].concat(),
            Self::Query => queries(name, &[BASE_ALLOCATION]),
            Self::Queries(all) => queries(name, all),
        }
    }
}

/// The replies to one option: the kind of the last, and kind and data of those before it. `None` if the stream ends or
/// is invalid.
pub(super) async fn ask<S: Stream>(
    raw: &RawNbd<S>,
    option: u32,
    data: &[u8],
) -> Option<(u32, Vec<(u32, Vec<u8>)>)> {
    let head = OptionHeader::new(option, data.len() as u32);
    raw.send(&[head.as_bytes(), data].concat()).await.ok()?;
    let mut before = Vec::new();
    loop {
        let head = raw.take(20).await?;
        let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap_or_default());
        if u64::from(word(0)) << 32 | u64::from(word(4)) != OPTION_REPLY_MAGIC || word(8) != option {
            return None;
        }
        let (kind, data) = (word(12), raw.take(word(16) as usize).await?);
        if kind == REP_ACK || kind >> 31 == 1 {
            return Some((kind, before));
        }
        before.push((kind, data));
    }
}

/// Sends the options decided for `who`, and checks each reply. `None` if the connection ends.
pub(super) async fn try_options<S: Stream>(
    world: &World,
    raw: &RawNbd<S>,
    who: Entity,
    name: &str,
) -> Option<()> {
    for n in 0..ASKED_MAX {
        let kinds = Question::ALL.len() as u64;
        let kind =
            world.sim.decide(who, &NBD_OPTION, n, |d| if d.below(2) == 0 { 0 } else { 1 + d.below(kinds) });
        let Some(question) = kind.checked_sub(1).and_then(|at| Question::ALL.get(at as usize)) else {
            continue;
        };
        let (last, before) = ask(raw, question.option, &question.data.bytes(name)).await?;
        let (kind, count) = question.before;
        if last != question.last || before.len() != count || before.iter().any(|(other, _)| *other != kind) {
            let kinds: Vec<u32> = before.iter().map(|(kind, _)| *kind).collect();
            let text = format!("option {} was answered with {kinds:?} and {last:#x}", question.option);
            world.fail(Invariant::N2, text);
            return None;
        }
    }
    Some(())
}
