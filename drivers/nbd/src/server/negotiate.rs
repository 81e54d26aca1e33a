//! From the first byte to the chosen export.

use super::reply::Form;
use super::status::Contexts;
use super::{Export, FULL, Inner, Served};
use crate::inlet::{End, Inlet};
use crate::outbox::send_all;
use crate::stop::StopSignal;
use crate::wire::Wire;
use rustls::{ServerConfig, ServerConnection};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use tap_abi::nbd::{
    ALLOCATION_DEPTH, BASE_ALLOCATION, EXPORT_PADDING_BYTES, ExportReply, Hello, INFO_BLOCK_SIZE,
    INFO_DESCRIPTION, INFO_EXPORT, INFO_NAME, InfoBlockSize, InfoExport, InfoQuery, MetaQuery, OPT_ABORT,
    OPT_EXPORT_NAME, OPT_EXTENDED_HEADERS, OPT_GO, OPT_INFO, OPT_LIST, OPT_LIST_META_CONTEXT,
    OPT_SET_META_CONTEXT, OPT_STARTTLS, OPT_STRUCTURED_REPLY, OPTION_MAGIC, OptionHeader, OptionReply,
    REP_ACK, REP_ERR_EXT_HEADER_REQD, REP_ERR_INVALID, REP_ERR_POLICY, REP_ERR_TLS_REQD, REP_ERR_TOO_BIG,
    REP_ERR_UNKNOWN, REP_ERR_UNSUP, REP_INFO, REP_META_CONTEXT, REP_SERVER, STRING_BYTES_MAX, export,
    handshake,
};
use tap_host::{Log, Probe, SECTOR_BYTES, SendList, Stream, Tasks, Time};
use zerocopy::byteorder::big_endian::{U16, U32};
use zerocopy::{FromBytes, IntoBytes};

/// What both sides agreed on.
pub(super) struct Agreed {
    pub(super) export: Rc<Served>,
    /// The form of replies, and of the headers of requests.
    pub(super) form: Form,
    /// What `BLOCK_STATUS` reports.
    pub(super) contexts: Contexts,
}

impl Agreed {
    /// Without negotiation: simple replies and no metadata contexts.
    pub(super) fn beforehand(export: Rc<Served>) -> Self {
        Self { export, form: Form::Simple, contexts: Contexts::default() }
    }
}

/// The number that stands for `base:allocation` on every connection.
pub(super) const ALLOCATION_ID: u32 = 1;
/// The same for `qemu:allocation-depth`.
pub(super) const DEPTH_ID: u32 = 2;
/// Any offset and length is served.
const MINIMUM_BYTES: u32 = 1;
/// Preferred block size: a page.
const PREFERRED_BYTES: u32 = 4096;
/// Room for the longest name and several hundred information requests.
const OPTION_BYTES_MAX: usize = 8 << 10;

/// Why an option is refused before the handshake.
const TLS_FIRST: &str = "this server requires TLS";

/// Why the negotiation failed.
type Why = &'static str;

/// The client has sent its last byte; it may still read.
pub(super) const CLOSED: Why = "the client closed it";

pub(super) fn why(end: End) -> Why {
    match end {
        End::Closed => CLOSED,
        End::Broken(_) => "it broke",
        End::Stopped => "it was given up",
    }
}

pub(super) struct Negotiation<'a, H, S> {
    pub(super) server: &'a Rc<Inner<H>>,
    pub(super) stream: &'a Wire<S>,
    pub(super) inlet: &'a mut Inlet<Wire<S>>,
    pub(super) stop: &'a StopSignal,
    number: u64,
    no_zeroes: bool,
    form: Form,
    /// The contexts that were chosen, and the export for which.
    chosen: Option<(Rc<Served>, Contexts)>,
}

/// The outcome of an option.
enum Next {
    More,
    Secure(Arc<ServerConfig>),
    Begin(Rc<Served>),
    End(Why),
}

impl<'a, H: Log + Tasks + Time + Probe, S: Stream> Negotiation<'a, H, S> {
    pub(super) fn new(
        server: &'a Rc<Inner<H>>,
        number: u64,
        stream: &'a Wire<S>,
        inlet: &'a mut Inlet<Wire<S>>,
        stop: &'a StopSignal,
    ) -> Self {
        Self { server, stream, inlet, stop, number, no_zeroes: false, form: Form::Simple, chosen: None }
    }

    /// Talks to the client until it has chosen.
    pub(super) async fn run(mut self) -> Result<Agreed, Why> {
        let mut hello = SendList::new();
        hello.push_bytes(Hello::new(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).as_bytes());
        self.send(hello).await?;
        self.inlet.need(4, self.stop).await.map_err(why)?;
        let flags = U32::read_from_prefix(self.inlet.unread()).map_or(0, |(flags, _)| flags.get());
        self.inlet.take(4);
        if flags & !u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES) != 0 {
            return Err("its handshake has unknown flags");
        }
        self.no_zeroes = flags & u32::from(handshake::NO_ZEROES) != 0;
        loop {
            match self.option().await? {
                Next::More => {}
                Next::Secure(config) => self.secure(config).await?,
                Next::End(why) => return Err(why),
                Next::Begin(export) => {
                    let same = self.chosen.filter(|(chosen, _)| Rc::ptr_eq(chosen, &export));
                    let contexts = same.map_or(Contexts::default(), |(_, contexts)| contexts);
                    return Ok(Agreed { export, form: self.form, contexts });
                }
            }
        }
    }

    async fn send(&self, list: SendList) -> Result<(), Why> {
        match self.stop.unless_stopped(pin!(send_all(self.stream, list))).await {
            Some((Ok(()), _)) => Ok(()),
            Some((Err(error), _)) => Err(why(End::Broken(error))),
            None => Err(why(End::Stopped)),
        }
    }

    /// The TLS handshake. All that was agreed on before it is a client's consent to it.
    async fn secure(&self, config: Arc<ServerConfig>) -> Result<(), Why> {
        // It would be taken for something that was sent securely.
        if !self.inlet.unread().is_empty() {
            return Err("it sent data in plain text after STARTTLS");
        }
        let session = ServerConnection::new(config).map_err(|_| "a session of TLS cannot be made")?;
        let secured = self.stream.secure(session.into(), &self.server.memory.tls, &self.server.host);
        self.stop.unless_stopped(pin!(secured)).await.unwrap_or(Err(why(End::Stopped)))
    }

    /// Whether `option` has to wait for TLS.
    fn is_too_early(&self, option: u32) -> bool {
        self.server.tls.is_some() && !self.stream.is_secure() && ![OPT_STARTTLS, OPT_ABORT].contains(&option)
    }

    /// One option and its reply.
    async fn option(&mut self) -> Result<Next, Why> {
        self.inlet.need(OptionHeader::BYTES, self.stop).await.map_err(why)?;
        let Ok((header, _)) = OptionHeader::read_from_prefix(self.inlet.unread()) else {
            return Err("an option without header");
        };
        self.inlet.take(OptionHeader::BYTES);
        if header.magic.get() != OPTION_MAGIC {
            return Err("an option without its magic number");
        }
        let (option, len) = (header.option.get(), header.len.get() as usize);
        if len > OPTION_BYTES_MAX {
            if option == OPT_EXPORT_NAME {
                return Err("an export name longer than 4096 bytes");
            }
            self.inlet.skip(len, self.stop).await.map_err(why)?;
            let mut replies = Replies::new(option);
            match self.is_too_early(option) {
                true => replies.refuse(REP_ERR_TLS_REQD, TLS_FIRST),
                false => {
                    replies.refuse(REP_ERR_TOO_BIG, "the option has more data than any known option needs");
                }
            }
            self.send(replies.list).await?;
            return Ok(Next::More);
        }
        self.inlet.need(len, self.stop).await.map_err(why)?;
        let mut replies = Replies::new(option);
        let next = self.answer(len, &mut replies);
        self.inlet.take(len);
        self.send(replies.list).await?;
        Ok(next)
    }

    fn answer(&mut self, len: usize, replies: &mut Replies) -> Next {
        let data = &self.inlet.unread()[..len];
        match replies.option {
            OPT_EXPORT_NAME if self.is_too_early(OPT_EXPORT_NAME) => {
                return Next::End("it chose an export without TLS");
            }
            option if self.is_too_early(option) => replies.refuse(REP_ERR_TLS_REQD, TLS_FIRST),
            OPT_EXPORT_NAME => return self.export_name(data, replies),
            OPT_INFO | OPT_GO => return self.info(data, replies),
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => {
                let chosen = self.contexts(data, replies);
                if replies.option == OPT_SET_META_CONTEXT {
                    self.chosen = chosen;
                }
            }
            OPT_ABORT => {
                replies.push(REP_ACK, &[]);
                return Next::End("the client gave up the negotiation");
            }
            OPT_STARTTLS => return self.start_tls(data, replies),
            OPT_LIST | OPT_STRUCTURED_REPLY | OPT_EXTENDED_HEADERS if !data.is_empty() => {
                replies.refuse(REP_ERR_INVALID, "the option has data");
            }
            OPT_LIST => {
                for export in &self.server.exports {
                    let len = (export.name.len() as u32).to_be_bytes();
                    let parts = [&len, export.name.as_bytes(), export.description.as_bytes()];
                    replies.push(REP_SERVER, &parts);
                }
                replies.push(REP_ACK, &[]);
            }
            OPT_STRUCTURED_REPLY if self.form == Form::Extended => {
                replies.refuse(REP_ERR_EXT_HEADER_REQD, "extended headers were agreed on");
            }
            OPT_STRUCTURED_REPLY => {
                self.form = Form::Structured;
                replies.push(REP_ACK, &[]);
            }
            OPT_EXTENDED_HEADERS => {
                self.form = Form::Extended;
                replies.push(REP_ACK, &[]);
            }
            _ => replies.refuse(REP_ERR_UNSUP, "the option is unknown here"),
        }
        Next::More
    }

    /// `STARTTLS`: after the reply the handshake follows.
    fn start_tls(&self, data: &[u8], replies: &mut Replies) -> Next {
        let Some(config) = &self.server.tls else {
            replies.refuse(REP_ERR_POLICY, "this server has no certificates, and so no TLS");
            return Next::More;
        };
        if self.stream.is_secure() || !data.is_empty() {
            let secure = self.stream.is_secure();
            let why = if secure { "the connection is secure already" } else { "the option has data" };
            replies.refuse(REP_ERR_INVALID, why);
            return Next::More;
        }
        replies.push(REP_ACK, &[]);
        Next::Secure(Arc::clone(config))
    }

    /// `EXPORT_NAME`: the data is the name, and the only way to refuse is to disconnect.
    fn export_name(&self, data: &[u8], replies: &mut Replies) -> Next {
        if self.form == Form::Extended {
            return Next::End("it chose an export in the old way after extended headers");
        }
        let name = std::str::from_utf8(data).ok().filter(|name| name.len() <= STRING_BYTES_MAX);
        let Some(export) = name.and_then(|name| self.server.export(name)) else {
            return Next::End("it asked for an export that does not exist");
        };
        if !self.server.seat(self.number) {
            return Next::End(FULL);
        }
        let (size, flags) =
            (export.size_sectors() * SECTOR_BYTES, flags_of(export, self.form != Form::Simple));
        let reply = ExportReply { size: size.into(), flags: flags.into() };
        replies.list.push_bytes(reply.as_bytes());
        if !self.no_zeroes {
            replies.list.push_bytes(&[0; EXPORT_PADDING_BYTES]);
        }
        Next::Begin(Rc::clone(export))
    }

    /// `INFO` and `GO`.
    fn info(&self, data: &[u8], replies: &mut Replies) -> Next {
        let query = match InfoQuery::parse(data) {
            Ok(query) => query,
            Err(why) => {
                replies.refuse(REP_ERR_INVALID, why);
                return Next::More;
            }
        };
        let Some(export) = self.server.export(query.name) else {
            replies.refuse(REP_ERR_UNKNOWN, "there is no export of this name");
            return Next::More;
        };
        if replies.option == OPT_GO && !self.server.seat(self.number) {
            replies.refuse(REP_ERR_POLICY, FULL);
            return Next::More;
        }
        let (size, flags) =
            (export.size_sectors() * SECTOR_BYTES, flags_of(export, self.form != Form::Simple));
        let head = InfoExport { kind: INFO_EXPORT.into(), size: size.into(), flags: flags.into() };
        replies.push(REP_INFO, &[head.as_bytes()]);
        for (kind, text) in [(INFO_NAME, &export.name), (INFO_DESCRIPTION, &export.description)] {
            if query.asks(kind) {
                replies.push(REP_INFO, &[U16::new(kind).as_bytes(), text.as_bytes()]);
            }
        }
        // Sent even if not asked for: otherwise a client would not know why its requests fail.
        let sizes = InfoBlockSize {
            kind: INFO_BLOCK_SIZE.into(),
            minimum: MINIMUM_BYTES.into(),
            preferred: export.node.info().physical_block_bytes.max(PREFERRED_BYTES).into(),
            maximum: self.server.limits.request_bytes.into(),
        };
        replies.push(REP_INFO, &[sizes.as_bytes()]);
        replies.push(REP_ACK, &[]);
        if replies.option == OPT_GO { Next::Begin(Rc::clone(export)) } else { Next::More }
    }

    /// `LIST_META_CONTEXT` and `SET_META_CONTEXT`: the export, and the contexts that were among the replies.
    fn contexts(&self, data: &[u8], replies: &mut Replies) -> Option<(Rc<Served>, Contexts)> {
        let choosing = replies.option == OPT_SET_META_CONTEXT;
        if choosing && self.form == Form::Simple {
            replies.refuse(REP_ERR_INVALID, "metadata contexts need structured replies first");
            return None;
        }
        let query = match MetaQuery::parse(data) {
            Ok(query) => query,
            Err(why) => {
                replies.refuse(REP_ERR_INVALID, why);
                return None;
            }
        };
        let Some(export) = self.server.export(query.name) else {
            replies.refuse(REP_ERR_UNKNOWN, "there is no export of this name");
            return None;
        };
        let mut found = |name: &str, space: &str, id: u32| {
            let wanted = |text: &str| text == name || !choosing && text == space;
            let found = query.queries().any(wanted) || !choosing && query.count == 0;
            if found {
                let id = if choosing { id } else { 0 };
                replies.push(REP_META_CONTEXT, &[&id.to_be_bytes(), name.as_bytes()]);
            }
            found
        };
        let allocation = found(BASE_ALLOCATION, "base:", ALLOCATION_ID);
        let depth = found(ALLOCATION_DEPTH, "qemu:", DEPTH_ID);
        replies.push(REP_ACK, &[]);
        Some((Rc::clone(export), Contexts { allocation, depth }))
    }
}

/// The flags of an export for a client that gets structured replies or simple ones.
pub(super) fn flags_of(of: &Export, structured: bool) -> u16 {
    let all = export::HAS_FLAGS
        | export::SEND_FLUSH
        | export::SEND_FUA
        | export::CAN_MULTI_CONN
        | export::SEND_CACHE
        | if structured { export::SEND_DF } else { 0 };
    let mode = if of.is_read_only() {
        export::READ_ONLY
    } else {
        export::SEND_TRIM | export::SEND_WRITE_ZEROES | export::SEND_FAST_ZERO
    };
    all | mode
}

/// The replies to one option.
struct Replies {
    option: u32,
    list: SendList,
}

impl Replies {
    fn new(option: u32) -> Self {
        Self { option, list: SendList::new() }
    }

    fn push(&mut self, reply: u32, parts: &[&[u8]]) {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        self.list.push_bytes(OptionReply::new(self.option, reply, len as u32).as_bytes());
        parts.iter().for_each(|part| self.list.push_bytes(part));
    }

    /// Refuses, with the reason as text for people. `EXPORT_NAME` cannot be refused this way.
    fn refuse(&mut self, error: u32, why: &str) {
        self.push(error, &[why.as_bytes()]);
    }
}
