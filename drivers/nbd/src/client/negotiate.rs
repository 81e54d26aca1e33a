//! The client's half of a negotiation.

use super::{ClientConfig, ClientError, ClientTls};
use crate::inlet::{End, Inlet};
use crate::outbox::send_all;
use crate::stop::StopSignal;
use crate::wire::{TLS_BYTES, Wire};
use rustls::ClientConnection;
use std::sync::Arc;
use tap_abi::nbd::{
    BASE_ALLOCATION, EXPORT_PADDING_BYTES, ExportReply, HELLO_MAGIC, Hello, INFO_BLOCK_SIZE, INFO_EXPORT,
    InfoBlockSize, InfoExport, OPT_EXPORT_NAME, OPT_EXTENDED_HEADERS, OPT_GO, OPT_SET_META_CONTEXT,
    OPT_STARTTLS, OPT_STRUCTURED_REPLY, OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionHeader, OptionReply, REP_ACK,
    REP_ERR_TLS_REQD, REP_ERR_UNSUP, REP_ERROR, REP_INFO, REP_META_CONTEXT, STRING_BYTES_MAX, export,
    handshake,
};
use tap_host::{Errno, Probe, SECTOR_BYTES, SendList, Stage, Stream, cost_of};
use zerocopy::byteorder::big_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

tap_host::listed! {
    pub(super) BUGS: Bug;
    NBD_BLOCKS_IGNORED = "nbd-blocks-ignored",
        "an NBD client takes an export whose blocks are larger than its own";
}

/// What a server offers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Terms {
    pub(super) size_bytes: u64,
    flags: u16,
    /// Most bytes of one read or write, in whole sectors.
    pub(super) request_bytes: u32,
    /// Block that the server prefers, in bytes: a power of two of at least 512.
    pub(super) block_bytes: u32,
    pub(super) structured: bool,
    /// Headers are extended, and replies structured.
    pub(super) extended: bool,
    /// The number of `base:allocation`.
    pub(super) context: Option<u32>,
}

/// Largest block that a server may prefer, in bytes; more is taken as this.
const BLOCK_BYTES_MAX: u32 = 1 << 20;
/// Assumed when a server does not say how much it accepts.
const REQUEST_BYTES: u32 = 32 << 20;

impl Terms {
    /// Whether all of `flags` are set.
    pub(super) fn has(&self, flags: u16) -> bool {
        self.flags & flags == flags
    }

    /// Why requests made for `self` cannot go to a server with the terms `other`.
    pub(super) fn broken_by(&self, other: &Terms) -> Option<&'static str> {
        let lost = self.flags & !other.flags & !export::READ_ONLY;
        // A disk may have become larger meanwhile; its users keep the size that they know.
        if other.size_bytes < self.size_bytes {
            Some("it came back with a smaller size")
        } else if lost != 0 || other.has(export::READ_ONLY) && !self.has(export::READ_ONLY) {
            Some("it came back and can do less than before")
        } else if other.request_bytes < self.request_bytes
            || self.structured && !other.structured
            || self.extended && !other.extended
            || self.context.is_some() && other.context.is_none()
        {
            Some("it came back with smaller limits than before")
        } else {
            None
        }
    }
}

/// What ends a negotiation.
enum Stop {
    Broken(&'static str),
    Refused(String),
}

impl From<End> for Stop {
    fn from(end: End) -> Self {
        Stop::Broken(match end {
            End::Broken(Errno::ECONNRESET) => "it reset the connection",
            _ => "it closed the connection",
        })
    }
}

struct Talk<'a, S, P> {
    host: &'a P,
    stream: &'a Wire<S>,
    inlet: Inlet<Wire<S>>,
    /// Memory for a session of TLS.
    sessions: &'a Stage,
    /// Never set: a timeout drops the whole negotiation.
    stop: StopSignal,
}

/// The smallest receive buffer, in bytes.
const RECEIVE_BYTES_MIN: usize = 16 << 10;

/// Where receive buffers come from. It is reserved before there are requests, because the requests that wait for the
/// next connection may hold all the rest.
pub(super) struct Memory {
    /// The minimum that a connection begins with; there is room for two, because the last connection ends after the
    /// next has begun.
    inlets: Stage,
    /// Larger ones, if there is room.
    spare: Stage,
    /// Sessions of TLS, two of them as well.
    sessions: Stage,
}

impl Memory {
    pub(super) fn of(config: &ClientConfig) -> Result<Self, ClientError> {
        let stage =
            |bytes| config.memory.stage(bytes).map_err(|_| ClientError::Memory(config.address.clone()));
        let sessions = stage(if config.tls.is_some() { 2 * TLS_BYTES } else { 0 })?;
        Ok(Self { inlets: stage(2 * cost_of(RECEIVE_BYTES_MIN))?, spare: stage(0)?, sessions })
    }
}

/// Agrees with the server at the other end of `stream` about the export.
pub(super) async fn negotiate<S: Stream>(
    host: &impl Probe,
    stream: &Wire<S>,
    config: &ClientConfig,
    memory: &Memory,
) -> Result<(Terms, Inlet<Wire<S>>), ClientError> {
    let receive_bytes = config.receive_bytes.clamp(RECEIVE_BYTES_MIN, 4 << 20);
    let short = || ClientError::Memory(config.address.clone());
    let mut inlet = Inlet::new(stream.clone(), RECEIVE_BYTES_MIN, &memory.inlets).ok_or_else(short)?;
    inlet.grow(receive_bytes, &memory.spare);
    let sessions = &memory.sessions;
    let mut talk = Talk { host, stream, inlet, sessions, stop: StopSignal::default() };
    match talk.run(&config.export, config.tls.as_ref()).await {
        Ok(terms) => Ok((terms, talk.inlet)),
        Err(Stop::Broken(why)) => {
            let why = stream.failure().unwrap_or(why);
            Err(ClientError::Negotiation(config.address.clone(), why))
        }
        Err(Stop::Refused(text)) => {
            Err(ClientError::Refused(config.address.clone(), config.export.clone(), text))
        }
    }
}

const NOT_NBD: Stop = Stop::Broken("it does not speak the new style of NBD");

impl<S: Stream, P: Probe> Talk<'_, S, P> {
    async fn run(&mut self, name: &str, tls: Option<&ClientTls>) -> Result<Terms, Stop> {
        if name.len() > STRING_BYTES_MAX {
            return Err(Stop::Refused("no export has a name of more than 4096 bytes".into()));
        }
        let hello: Hello = self.value().await?;
        if hello.magic.get() != HELLO_MAGIC || hello.style.get() != OPTION_MAGIC {
            return Err(NOT_NBD);
        }
        let flags = hello.flags.get() & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        self.send(&[&u32::from(flags).to_be_bytes()]).await?;
        if let Some(tls) = tls {
            self.secure(tls, flags).await?;
        }
        if flags & handshake::FIXED_NEWSTYLE == 0 {
            return self.export_name(name, flags, false).await;
        }
        let extended = self.agrees_to(OPT_EXTENDED_HEADERS).await?;
        let structured = extended || self.agrees_to(OPT_STRUCTURED_REPLY).await?;
        let context = if structured { self.context(name).await? } else { None };
        match self.go(name).await? {
            Some(terms) => Ok(Terms { structured, extended, context, ..terms }),
            // The old way in has no room for them.
            None if extended => Err(NOT_NBD),
            None => self.export_name(name, flags, structured).await,
        }
    }

    /// `STARTTLS` and the handshake, or nothing.
    async fn secure(&mut self, tls: &ClientTls, flags: u16) -> Result<(), Stop> {
        if flags & handshake::FIXED_NEWSTYLE == 0 || !self.agrees_to(OPT_STARTTLS).await? {
            return Err(Stop::Broken("it offers no TLS"));
        }
        // It would be taken for something that was sent securely.
        if !self.inlet.unread().is_empty() {
            return Err(Stop::Broken("it sent data in plain text before the TLS handshake"));
        }
        let session = ClientConnection::new(Arc::clone(&tls.config), tls.name.clone());
        let session = session.map_err(|_| Stop::Broken("a session of TLS cannot be made"))?;
        self.stream.secure(session.into(), self.sessions, self.host).await.map_err(Stop::Broken)
    }

    /// Whether the server accepts an option without data.
    async fn agrees_to(&mut self, option: u32) -> Result<bool, Stop> {
        self.option(option, &[]).await?;
        Ok(self.reply(option).await?.0 == REP_ACK)
    }

    /// Asks for `base:allocation`.
    async fn context(&mut self, name: &str) -> Result<Option<u32>, Stop> {
        let (len, query) = ((name.len() as u32).to_be_bytes(), BASE_ALLOCATION.as_bytes());
        let query_len = (query.len() as u32).to_be_bytes();
        let parts = [&len[..], name.as_bytes(), &1_u32.to_be_bytes(), &query_len, query];
        self.option(OPT_SET_META_CONTEXT, &parts).await?;
        let mut context = None;
        loop {
            let (reply, data) = self.reply(OPT_SET_META_CONTEXT).await?;
            match reply {
                REP_META_CONTEXT => {
                    let Ok((id, text)) = U32::read_from_prefix(&data) else { return Err(NOT_NBD) };
                    if text == BASE_ALLOCATION.as_bytes() {
                        context = Some(id.get());
                    }
                }
                REP_ACK => return Ok(context),
                // Continue without it.
                _ if reply & REP_ERROR != 0 => return Ok(None),
                _ => return Err(NOT_NBD),
            }
        }
    }

    /// `GO`; `None` if the server does not know it.
    async fn go(&mut self, name: &str) -> Result<Option<Terms>, Stop> {
        let (len, kinds) = ((name.len() as u32).to_be_bytes(), [0, 1, 0, INFO_BLOCK_SIZE as u8]);
        self.option(OPT_GO, &[&len, name.as_bytes(), &kinds]).await?;
        let mut terms = None;
        let (mut request_bytes, mut block_bytes) = (REQUEST_BYTES, SECTOR_BYTES as u32);
        loop {
            let (reply, data) = self.reply(OPT_GO).await?;
            match reply {
                REP_INFO => {
                    if let Ok((info, _)) = InfoExport::read_from_prefix(&data)
                        && info.kind.get() == INFO_EXPORT
                    {
                        terms = Some((info.size.get(), info.flags.get()));
                    } else if let Ok((sizes, _)) = InfoBlockSize::read_from_prefix(&data)
                        && sizes.kind.get() == INFO_BLOCK_SIZE
                    {
                        if sizes.minimum.get() > SECTOR_BYTES as u32 && !self.host.bug(&NBD_BLOCKS_IGNORED) {
                            return Err(Stop::Refused("it wants blocks of more than 512 bytes".into()));
                        }
                        request_bytes = request_bytes.min(sizes.maximum.get());
                        let preferred = sizes.preferred.get();
                        if preferred.is_power_of_two() {
                            block_bytes = preferred.clamp(SECTOR_BYTES as u32, BLOCK_BYTES_MAX);
                        }
                    }
                }
                REP_ACK => {
                    let Some((size_bytes, flags)) = terms else { return Err(NOT_NBD) };
                    let terms = checked(size_bytes, flags, request_bytes)?;
                    return Ok(Some(Terms { block_bytes, ..terms }));
                }
                REP_ERR_UNSUP => return Ok(None),
                REP_ERR_TLS_REQD if !self.stream.is_secure() => {
                    return Err(Stop::Broken("it requires TLS: use nbds instead of nbd"));
                }
                _ if reply & REP_ERROR != 0 => {
                    let text = String::from_utf8_lossy(&data).into_owned();
                    let text = if text.is_empty() { format!("error {}", reply & !REP_ERROR) } else { text };
                    return Err(Stop::Refused(text));
                }
                _ => return Err(NOT_NBD),
            }
        }
    }

    async fn export_name(&mut self, name: &str, flags: u16, structured: bool) -> Result<Terms, Stop> {
        self.option(OPT_EXPORT_NAME, &[name.as_bytes()]).await?;
        let reply: ExportReply = self.value().await?;
        if flags & handshake::NO_ZEROES == 0 {
            self.inlet.skip(EXPORT_PADDING_BYTES, &self.stop).await?;
        }
        let terms = checked(reply.size.get(), reply.flags.get(), REQUEST_BYTES)?;
        Ok(Terms { structured, ..terms })
    }

    async fn send(&self, parts: &[&[u8]]) -> Result<(), Stop> {
        let mut list = SendList::new();
        parts.iter().for_each(|part| list.push_bytes(part));
        send_all(self.stream, list).await.0.map_err(|error| End::Broken(error).into())
    }

    async fn option(&self, option: u32, parts: &[&[u8]]) -> Result<(), Stop> {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        let header = OptionHeader::new(option, len as u32);
        let mut all = vec![header.as_bytes()];
        all.extend_from_slice(parts);
        self.send(&all).await
    }

    async fn value<T>(&mut self) -> Result<T, Stop>
    where
        T: FromBytes + Immutable + KnownLayout + Unaligned,
    {
        self.inlet.need(size_of::<T>(), &self.stop).await?;
        let Ok((value, _)) = T::read_from_prefix(self.inlet.unread()) else { return Err(NOT_NBD) };
        self.inlet.take(size_of::<T>());
        Ok(value)
    }

    /// One reply to `option`: its type and data.
    async fn reply(&mut self, option: u32) -> Result<(u32, Vec<u8>), Stop> {
        let head: OptionReply = self.value().await?;
        let len = head.len.get() as usize;
        if head.magic.get() != OPTION_REPLY_MAGIC || head.option.get() != option {
            return Err(NOT_NBD);
        }
        if len > self.inlet.capacity() {
            return Err(Stop::Broken("it answers with more than any option needs"));
        }
        self.inlet.need(len, &self.stop).await?;
        let data = self.inlet.unread()[..len].to_vec();
        self.inlet.take(len);
        Ok((head.reply.get(), data))
    }
}

/// The terms of a server, if they make sense.
fn checked(size_bytes: u64, flags: u16, request_bytes: u32) -> Result<Terms, Stop> {
    let request_bytes = request_bytes - request_bytes % SECTOR_BYTES as u32;
    if request_bytes == 0 || size_bytes > i64::MAX as u64 {
        return Err(Stop::Refused("its size, or that of its requests, cannot be".into()));
    }
    let flags = if flags & export::HAS_FLAGS == 0 { 0 } else { flags };
    let block_bytes = SECTOR_BYTES as u32;
    Ok(Terms {
        size_bytes,
        flags,
        request_bytes,
        block_bytes,
        structured: false,
        extended: false,
        context: None,
    })
}
