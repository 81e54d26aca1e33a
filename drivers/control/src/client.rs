//! The end of tap-ctl.

use crate::json::{Answer, ErrorAnswer, News, Request};
use crate::wire::{Line, Received, receive_line, receive_message, receive_next, receive_text, send};
use crate::{Refusal, json_socket_of, socket_of};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::future::Future;
use tap_abi::tapctl::{ALL, Announced, Entry, Kind, Message, Outcome};
use tap_host::{Errno, Probe, SocketAddress, Sockets, Stream, Time, unless};
use zerocopy::IntoBytes;

/// Most disks that a list may announce.
const DISKS_MAX: usize = 65_536;
/// Longest text that is taken, in bytes.
const TEXT_MAX: u64 = 1 << 20;
/// Longest line that is taken, in bytes.
const LINE_MAX: usize = 16 << 20;

/// Why a tapdisk did not do what it was asked for; the text continues "failed to".
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody is there.
    #[error("reach the tapdisk at {path}: {error}{}", hint(*error))]
    Connect {
        /// The control socket.
        path: String,
        /// As connect(2).
        error: Errno,
    },
    /// The connection broke.
    #[error("talk to the tapdisk at {path}: {error}")]
    Broken {
        /// The control socket.
        path: String,
        /// As send(2) or recv(2).
        error: Errno,
    },
    /// It sent less than an answer.
    #[error("get an answer from {path}: it ended after {bytes} bytes; is it a tapdisk of another version?")]
    Ended {
        /// The control socket.
        path: String,
        /// Bytes of a message that had arrived.
        bytes: usize,
    },
    /// It did not answer in time. It may still do what it was asked for.
    #[error("get an answer from {path} within {seconds} s; it may still carry the request out")]
    Late {
        /// The control socket.
        path: String,
        /// How long was waited.
        seconds: u64,
    },
    /// It answered something else.
    #[error("understand the answer from {path}: it is message {number}; is it a tapdisk of another version?")]
    Strange {
        /// The control socket.
        path: String,
        /// The number of the message's kind.
        number: u16,
    },
    /// It sent a line that is no answer.
    #[error("understand the answer from {path}: {why}; is it a tapdisk of another version?")]
    Garbled {
        /// The control socket.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// It refused.
    #[error("{words}")]
    Refused {
        /// Why.
        error: Errno,
        /// In its words.
        words: String,
    },
}

fn hint(error: Errno) -> &'static str {
    match error {
        Errno::ENOENT => {
            "; there is no such process, or one that has not this socket; tap-ctl list shows those that are"
        }
        Errno::ECONNREFUSED => "; that process has ended",
        Errno::EACCES => "; only root, and the user that it runs as, may",
        _ => "",
    }
}

impl CallError {
    /// The number for it: that of the failed call, or the tapdisk's own.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Connect { error, .. } | Self::Broken { error, .. } | Self::Refused { error, .. } => *error,
            Self::Ended { .. } => Errno::EIO,
            Self::Late { .. } => Errno::ETIME,
            Self::Strange { .. } | Self::Garbled { .. } => Errno::EINVAL,
        }
    }
}

/// The parts of a host that clients use.
pub trait ClientHost: Sockets + Time + Probe {}
impl<T: Sockets + Time + Probe> ClientHost for T {}

/// A tapdisk, at its control sockets.
#[derive(Clone, Debug)]
pub struct Tapdisk<H> {
    /// The caller's host.
    pub host: H,
    /// The folder of the sockets.
    pub folder: String,
    /// Its process number.
    pub pid: u32,
    /// How long to wait for an answer, in seconds; 0 for ever.
    pub limit_s: u64,
}

impl<H: ClientHost> Tapdisk<H> {
    /// Sends `request`, and returns the answer, which is of the kind that the request is answered with.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn call(&self, request: &Message) -> Result<Message, CallError> {
        let call = self.at_messages();
        call.within(async {
            let stream = call.ask(request.as_bytes()).await?;
            let answer = call.next(&stream).await?;
            call.expect(answer, request)
        })
        .await
    }

    /// The process's disks: minor number, state and `TYPE:PATH`, which is empty without an image.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn list(&self) -> Result<Vec<Entry>, CallError> {
        let request = Message::new(Kind::List, ALL);
        let call = self.at_messages();
        call.within(async {
            let stream = call.ask(request.as_bytes()).await?;
            let mut disks = Vec::new();
            loop {
                let answer = call.next(&stream).await?;
                let entry: Entry = call.expect(answer, &request)?.body();
                if entry.count.get() <= 0 {
                    return Ok(disks);
                }
                if disks.len() == DISKS_MAX {
                    return Err(call.strange(Kind::ListRsp.number()));
                }
                disks.push(entry);
            }
        })
        .await
    }

    /// The counters of the disk `minor`, as JSON.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn stats(&self, minor: u16) -> Result<String, CallError> {
        let request = Message::new(Kind::Stats, minor);
        let call = self.at_messages();
        call.within(async {
            let stream = call.ask(request.as_bytes()).await?;
            let answer = call.next(&stream).await?;
            let length = call.expect(answer, &request)?.body::<Announced>().length.get();
            if length > TEXT_MAX {
                return Err(call.strange(Kind::StatsRsp.number()));
            }
            let text = receive_text(&stream, usize::try_from(length).expect("it is small")).await;
            text.map_err(|error| call.broken(error))?.ok_or_else(|| call.strange(Kind::StatsRsp.number()))
        })
        .await
    }

    /// Asks a process without disks to end.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn exit(&self) -> Result<(), CallError> {
        let request = Message::new(Kind::Exit, ALL);
        let call = self.at_messages();
        call.within(async {
            let stream = call.ask(request.as_bytes()).await?;
            match receive_message(&self.host, &stream).await {
                Ok(Received::Message(answer)) => call.expect(*answer, &request).map(drop),
                Ok(Received::Ended(_)) => Ok(()),
                Err(error) => Err(call.broken(error)),
            }
        })
        .await
    }

    /// Sends `request` to the socket for JSON, and returns what it is answered with.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn json<T: DeserializeOwned>(&self, request: &Request) -> Result<T, CallError> {
        let call = Call { tapdisk: self, path: json_socket_of(&self.folder, self.pid) };
        let mut line = serde_json::to_vec(request).expect("maps have texts as keys");
        line.push(b'\n');
        call.within(async {
            let stream = call.ask(&line).await?;
            let answer = match receive_line(&self.host, &stream, LINE_MAX).await {
                Ok(Line::Whole(line)) => line,
                Ok(Line::Ended(line)) => return Err(call.ended(line.len())),
                Ok(Line::TooLong) => return Err(call.garbled(format!("it has more than {LINE_MAX} bytes"))),
                Err(error) => return Err(call.broken(error)),
            };
            match serde_json::from_slice(&answer) {
                Ok(Answer::Ok(reply)) => Ok(reply),
                Ok(Answer::Error(error)) => {
                    let Refusal { error, words } = error.into();
                    Err(CallError::Refused { error, words })
                }
                Err(why) => Err(call.garbled(why.to_string())),
            }
        })
        .await
    }

    /// Listens for what happens to its disks, from now on. Connecting has the limit of time, listening has none.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn events(&self) -> Result<Events<'_, H>, CallError> {
        let call = Call { tapdisk: self, path: json_socket_of(&self.folder, self.pid) };
        let mut line = serde_json::to_vec(&Request::Events {}).expect("maps have texts as keys");
        line.push(b'\n');
        let stream = call.within(call.ask(&line)).await?;
        Ok(Events { call, stream, ahead: Vec::new() })
    }

    fn at_messages(&self) -> Call<'_, H> {
        Call { tapdisk: self, path: socket_of(&self.folder, self.pid) }
    }
}

/// A stream of events.
pub struct Events<'a, H: ClientHost> {
    call: Call<'a, H>,
    stream: H::Stream,
    /// Received, and not told yet.
    ahead: Vec<u8>,
}

/// A line of it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Told {
    Refused { error: ErrorAnswer },
    News(News),
}

impl<H: ClientHost> Events<'_, H> {
    /// The next one; `None` once the tapdisk has ended.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn next(&mut self) -> Result<Option<News>, CallError> {
        let call = &self.call;
        let line = receive_next(&call.tapdisk.host, &self.stream, LINE_MAX, &mut self.ahead).await;
        let line = match line.map_err(|error| call.broken(error))? {
            Line::Whole(line) => line,
            Line::Ended(line) if line.is_empty() => return Ok(None),
            Line::Ended(line) => return Err(call.ended(line.len())),
            Line::TooLong => return Err(call.garbled(format!("a line has more than {LINE_MAX} bytes"))),
        };
        match serde_json::from_slice(&line) {
            Ok(Told::News(news)) => Ok(Some(news)),
            Ok(Told::Refused { error }) => {
                let Refusal { error, words } = error.into();
                Err(CallError::Refused { error, words })
            }
            Err(why) => Err(call.garbled(why.to_string())),
        }
    }
}

/// A call at one of a tapdisk's sockets.
struct Call<'a, H> {
    tapdisk: &'a Tapdisk<H>,
    /// The socket.
    path: String,
}

impl<H: ClientHost> Call<'_, H> {
    async fn within<T>(&self, work: impl Future<Output = Result<T, CallError>>) -> Result<T, CallError> {
        let (host, limit_s) = (&self.tapdisk.host, self.tapdisk.limit_s);
        let limit = async {
            match limit_s {
                0 => std::future::pending().await,
                seconds => host.sleep_ns(seconds.saturating_mul(1_000_000_000)).await,
            }
        };
        let late = || CallError::Late { path: self.path.clone(), seconds: limit_s };
        unless(limit, work).await.unwrap_or_else(|| Err(late()))
    }

    async fn ask(&self, request: &[u8]) -> Result<H::Stream, CallError> {
        let address = SocketAddress::Unix(self.path.clone());
        let stream = self.tapdisk.host.connect(&address).await;
        let stream = stream.map_err(|error| CallError::Connect { path: self.path.clone(), error })?;
        send(&stream, request).await.map_err(|error| self.broken(error))?;
        Ok(stream)
    }

    async fn next(&self, stream: &impl Stream) -> Result<Message, CallError> {
        match receive_message(&self.tapdisk.host, stream).await {
            Ok(Received::Message(message)) => Ok(*message),
            Ok(Received::Ended(bytes)) => Err(self.ended(bytes)),
            Err(error) => Err(self.broken(error)),
        }
    }

    /// `answer`, if it is one to `request` that says that it was done.
    fn expect(&self, answer: Message, request: &Message) -> Result<Message, CallError> {
        let wanted = request.kind().and_then(Kind::answer);
        match answer.kind() {
            Some(kind) if Some(kind) == wanted => Ok(answer),
            Some(Kind::Error) => Err(refused(&answer, request)),
            _ => Err(self.strange(answer.number())),
        }
    }

    fn broken(&self, error: Errno) -> CallError {
        CallError::Broken { path: self.path.clone(), error }
    }

    fn ended(&self, bytes: usize) -> CallError {
        CallError::Ended { path: self.path.clone(), bytes }
    }

    fn strange(&self, number: u16) -> CallError {
        CallError::Strange { path: self.path.clone(), number }
    }

    fn garbled(&self, why: String) -> CallError {
        CallError::Garbled { path: self.path.clone(), why }
    }
}

/// The tapdisk's refusal; those of others have no words, and some have negative numbers.
fn refused(answer: &Message, request: &Message) -> CallError {
    let outcome: Outcome = answer.body();
    let error = Errno(outcome.error.get().checked_abs().filter(|&error| error != 0).unwrap_or(Errno::EIO.0));
    let words = match outcome.message.as_str() {
        Some(words) if !words.is_empty() => words.to_owned(),
        _ => format!("have tapdisk do {request:?}: {error}"),
    };
    CallError::Refused { error, words }
}
