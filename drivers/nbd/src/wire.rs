//! The stream of a connection: bytes as they are, and through TLS once both sides have agreed on it (`STARTTLS`).
//!
//! ```text
//!   recv ◄── plain text ◄── session ◄── records ◄── the stream of the host
//!   send ──► plain text ──► session ──► records ──►
//!            └ without TLS: straight through ──────┘
//! ```
//!
//! # Contract
//!
//! * Without TLS it hands every call to the stream of the host, with its buffers.
//! * The peer is known after [`Wire::secure`]: the session checks certificates as its configuration says.
//! * Bytes that were received before the handshake never become plain text of the session: the caller checks that it
//!   has none left, and the session refuses what is not a record of TLS.
//! * A session holds at most [`TLS_BYTES`], whatever the peer sends.
//! * A stream that ends without the peer's word (`close_notify`) is broken, not closed: bytes may be missing.

use crate::outbox::send_all;
use futures_util::future::{Either, LocalBoxFuture};
use rustls::{AlertDescription, CertificateError, Connection};
use smallvec::SmallVec;
use std::cell::{Cell, OnceCell, RefCell};
use std::future::Future;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Waker};
use tap_host::{Errno, IoBuf, Probe, SendList, Share, Stage, Stream};

tap_host::listed! {
    pub(crate) BUGS: Bug;
    TLS_REST_UNSENT = "tls-rest-unsent",
        "of data that is more than what is sealed for TLS at once, the rest counts as sent";
}

tap_host::listed! {
    pub(crate) MARKS: Mark;
    TLS_AGREED = "tls-agreed", "an NBD connection was secured";
}

/// Most bytes of memory of one session: a whole handshake message (64 KiB) and its answer, or one record that is
/// received and two that are sent, and the buffer that records are received into.
pub(crate) const TLS_BYTES: usize = 160 << 10;
/// Records are received into a buffer of this many bytes.
const RECORDS_BYTES: usize = 16 << 10;
/// Most plain text that is sealed at once, in bytes: two records.
const SEAL_BYTES: usize = 32 << 10;
/// Most pieces of a list that are sealed at once.
const SEAL_PIECES: usize = 64;

/// Why a handshake failed; continues "it ended because".
pub(crate) type Why = &'static str;

/// A stream that may become secure; clones share it.
pub(crate) struct Wire<S>(Rc<Inner<S>>);

struct Inner<S> {
    stream: S,
    session: OnceCell<Rc<Session<S>>>,
}

impl<S> Clone for Wire<S> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<S: Stream> Wire<S> {
    /// A stream without TLS.
    pub(crate) fn new(stream: S) -> Self {
        Self(Rc::new(Inner { stream, session: OnceCell::new() }))
    }

    /// Why the session refused what the peer sent, if it did.
    pub(crate) fn failure(&self) -> Option<Why> {
        self.0.session.get().and_then(|session| session.failure.get())
    }

    /// Whether everything goes through TLS.
    pub(crate) fn is_secure(&self) -> bool {
        self.0.session.get().is_some()
    }

    /// Agrees with the peer on keys, and sends and receives everything through TLS from then on. Nothing else may be
    /// received or sent meanwhile.
    ///
    /// # Errors
    /// Why there is no secure connection; the stream is then of no further use.
    pub(crate) async fn secure(
        &self,
        mut connection: Connection,
        memory: &Stage,
        probe: &impl Probe,
    ) -> Result<(), Why> {
        let mut share = memory.try_take(TLS_BYTES).ok_or("there is no memory for TLS")?;
        let buf = share.buffer(RECORDS_BYTES).map_err(|_| "there is no memory for TLS")?;
        let mut records = Records { buf, start: 0, end: 0 };
        connection.set_buffer_limit(Some(SEAL_BYTES));
        loop {
            let (sent, _) = send_all(&self.0.stream, sealed(&mut connection)).await;
            sent.map_err(|_| "the connection broke in the TLS handshake")?;
            if !connection.is_handshaking() {
                break;
            }
            if records.is_empty() {
                let received = records.receive(&self.0.stream).await;
                records = received.map_err(|_| "the connection broke in the TLS handshake")?;
                if records.is_empty() {
                    return Err("the connection was closed in the TLS handshake");
                }
            }
            if let Err(error) = records.put_into(&mut connection) {
                // Tells the peer why, if it still listens.
                let _told = send_all(&self.0.stream, sealed(&mut connection)).await;
                return Err(why(&error));
            }
        }
        let session = Session {
            stream: self.0.stream.clone(),
            connection: RefCell::new(connection),
            records: RefCell::new(Some(records)),
            sending: Cell::new(false),
            failure: Cell::new(None),
            rest_unsent: probe.bug(&TLS_REST_UNSENT),
            _memory: share,
        };
        probe.mark(&TLS_AGREED);
        assert!(self.0.session.set(Rc::new(session)).is_ok(), "a stream is secured once");
        Ok(())
    }
}

impl<S: Stream> Stream for Wire<S> {
    fn recv(&self, buf: IoBuf, from: usize) -> impl Future<Output = (Result<usize, Errno>, IoBuf)> + 'static {
        match self.0.session.get() {
            None => Either::Left(self.0.stream.recv(buf, from)),
            Some(session) => {
                let session = Rc::clone(session);
                let received: LocalBoxFuture<'static, _> =
                    Box::pin(async move { session.recv(buf, from).await });
                Either::Right(received)
            }
        }
    }

    fn send(&self, list: SendList) -> impl Future<Output = (Result<(), Errno>, SendList)> + 'static {
        match self.0.session.get() {
            None => Either::Left(self.0.stream.send(list)),
            Some(session) => {
                let session = Rc::clone(session);
                let sent: LocalBoxFuture<'static, _> = Box::pin(async move { session.send(list).await });
                Either::Right(sent)
            }
        }
    }

    fn shutdown(&self) {
        if let Some(session) = self.0.session.get() {
            session.leave();
        }
        self.0.stream.shutdown();
    }

    fn abort(&self) {
        self.0.stream.abort();
    }
}

/// Records received, and not yet taken by the session.
struct Records {
    buf: IoBuf,
    start: usize,
    end: usize,
}

impl Records {
    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Receives once; empty if the peer will send no more.
    async fn receive<S: Stream>(self, stream: &S) -> Result<Self, Errno> {
        let (result, buf) = stream.recv(self.buf, 0).await;
        Ok(Self { buf, start: 0, end: result? })
    }

    /// Lets the session take some.
    fn put_into(&mut self, connection: &mut Connection) -> Result<(), rustls::Error> {
        let mut rest = &self.buf[self.start..self.end];
        let taken = connection.read_tls(&mut rest).map_err(|e| rustls::Error::General(e.to_string()))?;
        self.start += taken;
        connection.process_new_packets().map(|_| ())
    }
}

/// The secure part of a stream.
struct Session<S> {
    stream: S,
    connection: RefCell<Connection>,
    /// `None` while a receive is under way, and for good once one was abandoned.
    records: RefCell<Option<Records>>,
    /// Records are being sent, or a part of them was.
    sending: Cell<bool>,
    failure: Cell<Option<Why>>,
    /// [`TLS_REST_UNSENT`].
    rest_unsent: bool,
    _memory: Share,
}

impl<S: Stream> Session<S> {
    async fn recv(&self, mut buf: IoBuf, from: usize) -> (Result<usize, Errno>, IoBuf) {
        let records = self.records.borrow_mut().take();
        let Some(mut records) = records else { return (Err(Errno::ECONNRESET), buf) };
        loop {
            match self.open(&mut records, &mut buf[from..]) {
                Ok(None) => {}
                Ok(Some(count)) => {
                    *self.records.borrow_mut() = Some(records);
                    return (Ok(count), buf);
                }
                Err(error) => return (Err(error), buf),
            }
            records = match records.receive(&self.stream).await {
                Ok(records) if records.is_empty() => return (Err(Errno::ECONNRESET), buf),
                Ok(records) => records,
                Err(error) => return (Err(error), buf),
            };
        }
    }

    /// Plain text from `records`; 0 bytes if the peer has said that it sends no more, `None` if they are used up.
    fn open(&self, records: &mut Records, to: &mut [u8]) -> Result<Option<usize>, Errno> {
        let mut connection = self.connection.borrow_mut();
        loop {
            match connection.reader().read(to) {
                Ok(count) => return Ok(Some(count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return Err(Errno::ECONNRESET),
            }
            if records.is_empty() {
                return Ok(None);
            }
            if let Err(error) = records.put_into(&mut connection) {
                self.failure.set(Some(why(&error)));
                return Err(Errno::ECONNABORTED);
            }
        }
    }

    async fn send(&self, mut list: SendList) -> (Result<(), Errno>, SendList) {
        let (records, taken) = match self.seal(&list) {
            Ok(sealed) => sealed,
            Err(error) => return (Err(error), list),
        };
        self.sending.set(true);
        let (result, _) = send_all(&self.stream, records).await;
        if result.is_ok() {
            self.sending.set(false);
            list.advance(if self.rest_unsent { list.len() } else { taken });
        } else {
            self.hear_last().await;
        }
        (result, list)
    }

    /// A peer that does not take our certificate says so after its own handshake, and closes: what we send by then
    /// fails before the reason is read. Looks whether it has arrived.
    async fn hear_last(&self) {
        let Some(records) = self.records.borrow_mut().take() else { return };
        if let Ok(mut records) = records.receive(&self.stream).await
            && !records.is_empty()
            && let Err(error) = records.put_into(&mut self.connection.borrow_mut())
        {
            self.failure.set(Some(why(&error)));
        }
    }

    /// The begin of `list` as records, and its length in bytes.
    fn seal(&self, list: &SendList) -> Result<(SendList, usize), Errno> {
        let mut connection = self.connection.borrow_mut();
        let mut room = SEAL_BYTES;
        let mut slices = SmallVec::<[IoSlice<'_>; SEAL_PIECES]>::new();
        for slice in list.slices(SEAL_PIECES) {
            let part = slice.len().min(room);
            slices.push(IoSlice::new(&slice[..part]));
            room -= part;
        }
        let taken = connection.writer().write_vectored(&slices).map_err(|_| Errno::EPIPE)?;
        let records = sealed(&mut connection);
        // Sealing takes nothing only if it is out of room, which is emptied each time. A session whose keys are used up
        // (AES-GCM of TLS 1.2 after 2^24 records) takes everything and seals nothing.
        if taken == 0 || records.len() < taken { Err(Errno::EPIPE) } else { Ok((records, taken)) }
    }

    /// Says that nothing more is sent, if the stream takes that at once.
    fn leave(&self) {
        if self.sending.replace(true) {
            return;
        }
        let mut connection = self.connection.borrow_mut();
        connection.send_close_notify();
        let sent = pin!(self.stream.send(sealed(&mut connection)));
        let _done = sent.poll(&mut Context::from_waker(Waker::noop()));
    }
}

/// Everything that the session wants to send.
fn sealed(connection: &mut Connection) -> SendList {
    let mut list = Sealed(SendList::new());
    // Writing to a list does not fail.
    while connection.wants_write() && connection.write_tls(&mut list).is_ok() {}
    list.0
}

struct Sealed(SendList);

impl Write for Sealed {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.push_bytes(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Why a handshake failed.
fn why(error: &rustls::Error) -> Why {
    match error {
        rustls::Error::NoCertificatesPresented => "it has no certificate, which TLS needs here",
        rustls::Error::InvalidCertificate(why) => match why {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "its certificate has expired"
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "its certificate is not valid yet"
            }
            CertificateError::Revoked => "its certificate was revoked",
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "its certificate is from an authority that is not trusted here"
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                "its certificate is for another name"
            }
            _ => "its certificate is not valid",
        },
        rustls::Error::AlertReceived(alert) => match alert {
            AlertDescription::CertificateRequired => "it wants a certificate of ours",
            AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::DecryptError => "it does not trust our certificate",
            AlertDescription::CertificateExpired | AlertDescription::CertificateRevoked => {
                "it says that our certificate has expired or was revoked"
            }
            _ => "it gave up the TLS handshake",
        },
        rustls::Error::PeerIncompatible(_) => {
            "there is no version of TLS, or no cipher, that both sides have"
        }
        _ => "it does not speak TLS as it should",
    }
}
