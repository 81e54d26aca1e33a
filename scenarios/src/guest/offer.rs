//! What an honest NBD server offers: the protocol permits many variants, and lesser ones. A client that asks for what
//! was not offered breaks N3.

use super::LyingServer;
use super::lying::{Asked, Chunk, Queue};
use crate::check::Invariant;
use crate::world::World;
use sim::Label;
use tap_abi::nbd::{
    BASE_ALLOCATION, CHUNK_BLOCK_STATUS, CHUNK_BLOCK_STATUS_EXT, CMD_BLOCK_STATUS, CMD_FLUSH, CMD_READ,
    CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, EXPORT_PADDING_BYTES, ExportReply, INFO_BLOCK_SIZE, INFO_EXPORT,
    InfoBlockSize, InfoExport, OPT_EXPORT_NAME, OPT_EXTENDED_HEADERS, OPT_GO, OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY, OptionReply, REP_ACK, REP_ERR_UNSUP, REP_ERROR, REP_INFO, REP_META_CONTEXT,
    command, export, handshake,
};
use tap_host::SECTOR_BYTES;
use zerocopy::IntoBytes;

/// What a server no longer offers on a connection after the first, bit by bit: flushes, `FUA`, trims, zeroes, writes,
/// half of its disk, half of its requests, structured replies, contexts; 0 for the same as before.
pub static NBD_LESS: Label = Label::new("nbd-less", "the server comes back with less: {}");

/// The bits of [`NBD_LESS`].
pub(super) const LESS_BITS: u64 = 9;

/// The id of `base:allocation` here.
pub(super) const CONTEXT: u32 = 7;
/// `INFO` of a kind that no client asks for, which a server may send anyway.
const INFO_DESCRIPTION: [u8; 6] = [0, 2, b'd', b'i', b's', b'k'];

/// What is offered on a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Offer {
    /// Flags of the handshake.
    pub hello: u16,
    /// Flags of the export.
    pub flags: u16,
    /// Bytes of the disk.
    pub size_bytes: u64,
    /// Maximum number of bytes of one read or write.
    pub request_bytes: u32,
    /// Structured replies.
    pub structured: bool,
    /// Extended headers.
    pub extended: bool,
    /// `base:allocation`.
    pub context: bool,
    /// The option `GO`.
    pub go: bool,
    /// The unit of extents in bytes: a divisor of 512.
    pub grain_bytes: usize,
}

const CHANGES: u16 =
    export::SEND_TRIM | export::SEND_WRITE_ZEROES | export::SEND_FAST_ZERO | export::SEND_FUA;

impl Offer {
    /// What [`LyingServer`] offers when it lies in its answers.
    pub fn plain(size_bytes: u64, structured: bool, request_bytes: u32) -> Self {
        Self {
            hello: handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES,
            flags: export::HAS_FLAGS | export::SEND_FLUSH | export::SEND_TRIM | export::SEND_WRITE_ZEROES,
            size_bytes,
            request_bytes,
            structured,
            extended: false,
            context: structured,
            go: true,
            grain_bytes: SECTOR_BYTES as usize,
        }
    }

    /// An offer as any server may make it.
    pub fn draw(world: &World, size_bytes: u64) -> Self {
        let structured = world.setting("nbd-structured", &[true, false]);
        let request_bytes = world.setting("nbd-server-request", &[32 << 20, 64 << 10, 4096]);
        let (all, fixed) = (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES, handshake::FIXED_NEWSTYLE);
        let flags = export::HAS_FLAGS | export::SEND_FLUSH | CHANGES;
        let lacks = world.setting(
            "nbd-lacks",
            &[
                0,
                export::SEND_FUA,
                export::SEND_FLUSH,
                export::SEND_FLUSH | export::SEND_FUA,
                export::SEND_TRIM,
                export::SEND_WRITE_ZEROES,
                export::SEND_FAST_ZERO,
                CHANGES,
                u16::MAX,
                // Without this flag the others mean nothing.
                export::HAS_FLAGS,
            ],
        );
        let read_only = world.setting("nbd-read-only", &[0, 0, 0, export::READ_ONLY]);
        let mut offer = Self {
            hello: world.setting("nbd-hello", &[all, all, fixed, handshake::NO_ZEROES, 0]),
            flags: (flags & !lacks) | read_only,
            context: structured && world.setting("nbd-context", &[true, false]),
            go: world.setting("nbd-go", &[true, false]),
            extended: structured && world.setting("nbd-extended", &[false, true]),
            grain_bytes: world.setting("nbd-grain", &[512, 128]),
            ..Self::plain(size_bytes, structured, request_bytes)
        };
        if offer.hello & handshake::FIXED_NEWSTYLE == 0 {
            (offer.structured, offer.context, offer.go) = (false, false, false);
        }
        // There is no other way in with them.
        offer.extended &= offer.structured && offer.go;
        if !offer.go {
            // There is no other way to report it.
            offer.request_bytes = 32 << 20;
        }
        offer
    }

    /// The reduced offer of a later connection.
    pub(super) fn less(self, bits: u64) -> Self {
        let lost = [export::SEND_FLUSH, export::SEND_FUA, export::SEND_TRIM, export::SEND_WRITE_ZEROES];
        let mut offer = self;
        for (i, flag) in lost.into_iter().enumerate() {
            if bits & 1 << i != 0 {
                offer.flags &= !flag;
            }
        }
        if bits & 16 != 0 {
            offer.flags |= export::READ_ONLY;
        }
        if bits & 32 != 0 {
            offer.size_bytes /= 2;
        }
        if bits & 64 != 0 && offer.go {
            offer.request_bytes = (offer.request_bytes / 2).max(512);
        }
        if bits & 128 != 0 {
            (offer.structured, offer.extended, offer.context) = (false, false, false);
        }
        if bits & 256 != 0 {
            offer.context = false;
        }
        offer
    }

    /// Whether it offers changes that are durable when answered.
    pub fn has_fua(&self) -> bool {
        self.has(export::SEND_FUA)
    }

    /// Whether it offers trims.
    pub fn has_trim(&self) -> bool {
        self.has(export::SEND_TRIM)
    }

    /// Whether it accepts no changes.
    pub fn is_read_only(&self) -> bool {
        self.has(export::READ_ONLY)
    }

    fn has(&self, flags: u16) -> bool {
        // Without the first flag the others mean nothing.
        self.flags & flags == flags && self.flags & export::HAS_FLAGS != 0
    }

    /// Whether writes are kept in memory until a flush.
    pub fn caches(&self) -> bool {
        self.has(export::SEND_FLUSH)
    }

    /// What is wrong with a request, if anything; `context` is whether `base:allocation` was chosen.
    pub(super) fn violation(&self, asked: &Asked, context: bool) -> Option<&'static str> {
        let end = asked.offset.saturating_add(asked.len as u64);
        let data = asked.command == CMD_READ || asked.command == CMD_WRITE;
        let changes = [CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES].contains(&asked.command);
        let offered = match asked.command {
            CMD_READ | CMD_WRITE => true,
            CMD_FLUSH => self.has(export::SEND_FLUSH),
            CMD_TRIM => self.has(export::SEND_TRIM),
            CMD_WRITE_ZEROES => self.has(export::SEND_WRITE_ZEROES),
            CMD_BLOCK_STATUS => context,
            _ => false,
        };
        let fua = if changes && self.has(export::SEND_FUA) { command::FUA } else { 0 };
        let fast = if self.has(export::SEND_FAST_ZERO) { command::FAST_ZERO } else { 0 };
        let allowed = match asked.command {
            CMD_WRITE_ZEROES => fua | fast | command::NO_HOLE,
            CMD_BLOCK_STATUS => command::REQ_ONE,
            _ => fua,
        };
        let announced = if asked.extended && asked.command == CMD_WRITE { command::PAYLOAD_LEN } else { 0 };
        if asked.flags & command::PAYLOAD_LEN != announced {
            return Some("a payload that is not announced as it must be");
        }
        let allowed = allowed | announced;
        if !offered {
            Some("a command that was not offered")
        } else if asked.flags & !allowed != 0 {
            Some("a flag that was not offered")
        } else if changes && self.has(export::READ_ONLY) {
            Some("a change of a read-only export")
        } else if end > self.size_bytes || (asked.len == 0) != (asked.command == CMD_FLUSH) {
            Some("a range outside the disk")
        } else if data && asked.len > self.request_bytes as usize {
            Some("more bytes than the server accepts")
        } else {
            None
        }
    }
}

/// The allocation of the disk, in units of `grain` bytes.
pub(super) fn status(asked: &Asked, bytes: &[u8], grain: usize) -> Chunk {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for sector in bytes.chunks(grain) {
        let state = if sector.iter().all(|byte| *byte == 0) { 3 } else { 0 };
        match runs.last_mut() {
            Some((len, last)) if *last == state => *len += sector.len() as u32,
            _ => runs.push((sector.len() as u32, state)),
        }
    }
    let mut payload = CONTEXT.to_be_bytes().to_vec();
    if asked.extended {
        payload.extend((runs.len() as u32).to_be_bytes());
        for (len, state) in runs {
            payload.extend([u64::from(len).to_be_bytes(), u64::from(state).to_be_bytes()].concat());
        }
        return Chunk::new(asked, CHUNK_BLOCK_STATUS_EXT, payload);
    }
    for (len, state) in runs {
        payload.extend([len.to_be_bytes(), state.to_be_bytes()].concat());
    }
    Chunk::new(asked, CHUNK_BLOCK_STATUS, payload)
}

/// State of a negotiation.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Agreed {
    pub(super) structured: bool,
    pub(super) extended: bool,
    pub(super) context: bool,
    pub(super) chosen: bool,
}

impl Agreed {
    /// What is wrong with asking for `option` now, if anything.
    fn violation(&self, option: u32) -> Option<&'static str> {
        match option {
            _ if self.chosen => Some("after the export was chosen"),
            OPT_STRUCTURED_REPLY | OPT_EXTENDED_HEADERS if self.structured => {
                Some("which was agreed on before")
            }
            OPT_EXPORT_NAME if self.extended => Some("which has no room for extended headers"),
            OPT_SET_META_CONTEXT if !self.structured => Some("without structured replies"),
            OPT_STRUCTURED_REPLY | OPT_EXTENDED_HEADERS | OPT_SET_META_CONTEXT | OPT_GO | OPT_EXPORT_NAME => {
                None
            }
            _ => Some("which no client of ours needs"),
        }
    }
}

impl LyingServer {
    /// Answers an option.
    pub(super) fn option(&self, offer: &Offer, option: u32, agreed: &mut Agreed, queue: &Queue) {
        let reply = |kind: u32, data: &[u8]| {
            queue.put(OptionReply::new(option, kind, data.len() as u32).as_bytes());
            queue.put(data);
        };
        if offer.hello & handshake::FIXED_NEWSTYLE == 0 && option != OPT_EXPORT_NAME {
            let text = format!("option {option} was sent to a server that knows one option");
            return self.world.fail(Invariant::N3, text);
        }
        if let Some(why) = agreed.violation(option) {
            self.world.fail(Invariant::N3, format!("option {option} {why}"));
        }
        match option {
            OPT_STRUCTURED_REPLY if offer.structured => {
                agreed.structured = true;
                reply(REP_ACK, &[]);
            }
            OPT_EXTENDED_HEADERS if offer.extended => {
                (agreed.structured, agreed.extended) = (true, true);
                reply(REP_ACK, &[]);
            }
            OPT_SET_META_CONTEXT if agreed.structured => {
                if offer.context {
                    agreed.context = true;
                    reply(REP_META_CONTEXT, &[&CONTEXT.to_be_bytes(), BASE_ALLOCATION.as_bytes()].concat());
                }
                reply(REP_ACK, &[]);
            }
            OPT_GO if offer.go => {
                let (size, flags) = (offer.size_bytes, offer.flags);
                let info = InfoExport { kind: INFO_EXPORT.into(), size: size.into(), flags: flags.into() };
                reply(REP_INFO, info.as_bytes());
                reply(REP_INFO, &INFO_DESCRIPTION);
                let sizes = InfoBlockSize {
                    kind: INFO_BLOCK_SIZE.into(),
                    minimum: 1.into(),
                    preferred: 4096.into(),
                    maximum: offer.request_bytes.into(),
                };
                reply(REP_INFO, sizes.as_bytes());
                reply(REP_ACK, &[]);
                agreed.chosen = true;
            }
            OPT_EXPORT_NAME => {
                let (size, flags) = (offer.size_bytes, offer.flags);
                queue.put(ExportReply { size: size.into(), flags: flags.into() }.as_bytes());
                if offer.hello & handshake::NO_ZEROES == 0 {
                    queue.put(&[0; EXPORT_PADDING_BYTES]);
                }
                agreed.chosen = true;
            }
            // Some servers add a reason.
            OPT_GO => reply(REP_ERR_UNSUP, b"what is that?"),
            OPT_SET_META_CONTEXT => reply(REP_ERROR | 3, &[]),
            _ => reply(REP_ERR_UNSUP, &[]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_out_of_order_are_detected() {
        let (begun, structured) = (Agreed::default(), Agreed { structured: true, ..Agreed::default() });
        let chosen = Agreed { chosen: true, ..structured };
        for (agreed, option) in [
            (begun, OPT_SET_META_CONTEXT),
            (structured, OPT_STRUCTURED_REPLY),
            (structured, OPT_EXTENDED_HEADERS),
            (Agreed { extended: true, ..structured }, OPT_EXPORT_NAME),
            (chosen, OPT_SET_META_CONTEXT),
            (begun, 77),
        ] {
            assert!(agreed.violation(option).is_some(), "{option} with {agreed:?}");
        }
        for (agreed, option) in [
            (begun, OPT_STRUCTURED_REPLY),
            (structured, OPT_SET_META_CONTEXT),
            (begun, OPT_GO),
            (structured, OPT_EXPORT_NAME),
        ] {
            assert_eq!(agreed.violation(option), None, "{option} with {agreed:?}");
        }
    }

    #[test]
    fn requests_that_were_not_offered_are_detected() {
        let offer = Offer::plain(1 << 20, true, 4096);
        let asked =
            |command, flags, offset, len| Asked { command, flags, cookie: 1, offset, len, extended: false };
        for fine in [
            asked(CMD_READ, 0, 0, 4096),
            asked(CMD_FLUSH, 0, 0, 0),
            asked(CMD_TRIM, 0, 512, 1 << 19),
            asked(CMD_WRITE_ZEROES, command::NO_HOLE, 0, 512),
            asked(CMD_BLOCK_STATUS, 0, 0, 1 << 20),
        ] {
            assert_eq!(offer.violation(&fine, true), None, "{fine:?}");
        }
        for wrong in [
            asked(CMD_READ, 0, 0, 8192),
            asked(CMD_READ, 0, 1 << 20, 512),
            asked(CMD_WRITE, command::FUA, 0, 512),
            asked(CMD_WRITE_ZEROES, command::FAST_ZERO, 0, 512),
            asked(CMD_FLUSH, 0, 0, 512),
            asked(CMD_WRITE, 0, 0, 0),
            asked(9, 0, 0, 512),
        ] {
            assert!(offer.violation(&wrong, true).is_some(), "{wrong:?}");
        }
        let status = asked(CMD_BLOCK_STATUS, 0, 0, 512);
        assert!(offer.violation(&status, false).is_some(), "without a context");
        let write = |flags, extended| Asked { extended, ..asked(CMD_WRITE, flags, 0, 512) };
        for (flags, extended, fine) in [
            (0, false, true),
            (0, true, false),
            (command::PAYLOAD_LEN, true, true),
            (command::PAYLOAD_LEN, false, false),
        ] {
            assert_eq!(offer.violation(&write(flags, extended), true).is_none(), fine, "{flags} {extended}");
        }
        assert!(offer.less(1).violation(&asked(CMD_FLUSH, 0, 0, 0), true).is_some());
        assert!(offer.less(16).violation(&asked(CMD_WRITE, 0, 0, 512), true).is_some());
        assert!(offer.less(32).violation(&asked(CMD_READ, 0, 1 << 19, 512), true).is_some());
        assert!(offer.less(64).violation(&asked(CMD_READ, 0, 0, 4096), true).is_some());
    }
}
