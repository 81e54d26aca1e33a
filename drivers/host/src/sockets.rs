//! Byte streams to other processes and machines.
//!
//! ```text
//!   listen ──► Listener ──accept──► Stream ◄──connect
//!                                   recv: some bytes into a part of one buffer
//!                                   send: a list of small pieces and whole buffers, as much as goes
//! ```
//!
//! Streams behave as stream sockets do: bytes in order, split anywhere. A peer may stop reading, send half of a
//! message, or disappear at any moment.

use crate::{Errno, IoBuf};
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::rc::Rc;
use std::str::FromStr;

/// Where a stream socket is.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum SocketAddress {
    /// A path in the file system.
    Unix(String),
    /// A host name or address, and a TCP port; port 0 lets the system choose when listening.
    Tcp {
        /// A name, an IPv4 address, or an IPv6 address without brackets.
        host: String,
        /// The port.
        port: u16,
    },
}

impl fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SocketAddress::Unix(path) => write!(f, "unix:{path}"),
            SocketAddress::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            SocketAddress::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
        }
    }
}

/// Longest path of a unix socket in bytes (sun_path without its final zero).
const UNIX_PATH_MAX: usize = 107;

impl FromStr for SocketAddress {
    type Err = String;

    /// `unix:PATH`, a path that begins with `/` or `.`, `tcp:HOST:PORT` or `HOST:PORT`.
    fn from_str(text: &str) -> Result<Self, String> {
        let path = text.strip_prefix("unix:").or_else(|| text.starts_with(['/', '.']).then_some(text));
        if let Some(path) = path {
            return if path.is_empty() || path.len() > UNIX_PATH_MAX || path.contains('\0') {
                Err(format!("the path of a unix socket has 1 to {UNIX_PATH_MAX} bytes, not {}", path.len()))
            } else {
                Ok(SocketAddress::Unix(path.to_owned()))
            };
        }
        let Some((host, port)) = text.strip_prefix("tcp:").unwrap_or(text).rsplit_once(':') else {
            return Err(format!("'{text}' is no address: write unix:PATH or HOST:PORT"));
        };
        let Ok(port) = port.parse() else {
            return Err(format!("the port '{port}' is not a number from 0 to 65535"));
        };
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        if host.is_empty() {
            return Err(format!("'{text}' names no host: write for example 127.0.0.1:{port}"));
        }
        Ok(SocketAddress::Tcp { host: host.to_owned(), port })
    }
}

/// One piece of data to send.
#[derive(Debug)]
pub enum Piece {
    /// Bytes that live in the list, such as a header.
    Bytes(SmallVec<[u8; 32]>),
    /// A whole buffer.
    Buf(IoBuf),
    /// A whole buffer that its owner keeps, to send it again if it gets lost.
    Shared(Rc<IoBuf>),
}

impl Piece {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Piece::Bytes(bytes) => bytes,
            Piece::Buf(buf) => buf,
            Piece::Shared(buf) => buf,
        }
    }
}

/// Data to send, in order: small pieces and whole buffers. Some bytes of the first one may have been sent already.
#[derive(Debug, Default)]
pub struct SendList {
    pieces: VecDeque<Piece>,
    /// Bytes of the first piece that were sent.
    skip: usize,
    len: usize,
}

impl SendList {
    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }
    /// Appends a copy of `bytes`; to the last piece if that has room without the heap, since each piece costs its
    /// place in a system call.
    pub fn push_bytes(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.len += bytes.len();
        match self.pieces.back_mut() {
            Some(Piece::Bytes(last)) if last.len() + bytes.len() <= last.inline_size() => {
                last.extend_from_slice(bytes);
            }
            _ => self.pieces.push_back(Piece::Bytes(SmallVec::from_slice(bytes))),
        }
    }
    /// Appends a whole buffer.
    pub fn push_buf(&mut self, buf: IoBuf) {
        if !buf.is_empty() {
            self.len += buf.len();
            self.pieces.push_back(Piece::Buf(buf));
        }
    }
    /// Appends a whole buffer without taking it.
    pub fn push_shared(&mut self, buf: Rc<IoBuf>) {
        if !buf.is_empty() {
            self.len += buf.len();
            self.pieces.push_back(Piece::Shared(buf));
        }
    }
    /// Appends everything that `other` has left.
    pub fn append(&mut self, mut other: SendList) {
        if other.skip > 0 {
            // The rest of a piece that was partly sent becomes a piece of its own.
            let rest = SmallVec::from_slice(&other.pieces[0].bytes()[other.skip..]);
            other.pieces[0] = Piece::Bytes(rest);
        }
        self.len += other.len;
        self.pieces.append(&mut other.pieces);
    }
    /// Bytes left.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// The bytes left, piece by piece, at most `max` pieces.
    pub fn slices(&self, max: usize) -> impl Iterator<Item = &[u8]> {
        let skip = self.skip;
        self.pieces
            .iter()
            .take(max)
            .enumerate()
            .map(move |(i, p)| &p.bytes()[if i == 0 { skip } else { 0 }..])
    }
    /// Takes `count` bytes off the front; pieces that were sent whole are dropped. `count` is at most
    /// [`SendList::len`].
    pub fn advance(&mut self, count: usize) {
        assert!(count <= self.len, "{count} bytes sent out of {}", self.len);
        self.len -= count;
        self.skip += count;
        while let Some(first) = self.pieces.front() {
            let len = first.bytes().len();
            if self.skip < len {
                return;
            }
            self.skip -= len;
            self.pieces.pop_front();
        }
    }
}

/// Stream sockets of the unix and TCP families.
pub trait Sockets: Clone + 'static {
    /// A listening socket.
    type Listener: Listener<Stream = Self::Stream>;
    /// A connected socket.
    type Stream: Stream;
    /// Listens at `address`. The path of a unix socket that has no listener any more is taken over; it is removed
    /// when the listener is dropped.
    ///
    /// # Errors
    /// As bind(2) and listen(2): `EADDRINUSE`, `EACCES`, `ENOENT` for a path without directory, `EADDRNOTAVAIL`;
    /// `ENOTSOCK` for the path of a file or folder, `EHOSTUNREACH` for an unknown name.
    fn listen(&self, address: &SocketAddress) -> impl Future<Output = Result<Self::Listener, Errno>>;
    /// As [`Sockets::listen`] at a unix socket's path; only processes of the same user, and of root, can connect.
    ///
    /// # Errors
    /// As [`Sockets::listen`].
    fn listen_private(&self, path: &str) -> impl Future<Output = Result<Self::Listener, Errno>>;
    /// Connects to `address`.
    ///
    /// # Errors
    /// As connect(2): `ECONNREFUSED`, `ENOENT`, `EHOSTUNREACH` (also for an unknown name), `ETIMEDOUT`; `ENOTSOCK`
    /// for a path of another kind.
    fn connect(&self, address: &SocketAddress) -> impl Future<Output = Result<Self::Stream, Errno>>;
    /// Listening sockets that the process was started with (LISTEN_FDS), once; empty without any.
    fn inherited(&self) -> Vec<Self::Listener>;
}

/// A listening socket; closed when dropped.
pub trait Listener: 'static {
    /// What it accepts.
    type Stream: Stream;
    /// The next connection.
    ///
    /// # Errors
    /// As accept(2); after `EMFILE` and the like it can be called again later.
    fn accept(&self) -> impl Future<Output = Result<Self::Stream, Errno>>;
    /// Where it listens, with the port that the system chose.
    fn address(&self) -> SocketAddress;
}

/// A connected socket; clones share it, and it is closed when the last one is dropped. One receive and one send may run
/// at the same time.
pub trait Stream: Clone + 'static {
    /// Receives at least one byte into `buf[from..]`, which is not empty. Returns the count; 0 when the peer will send
    /// no more. A future that is dropped may have consumed bytes.
    ///
    /// # Errors
    /// As recv(2): `ECONNRESET`, `ETIMEDOUT`.
    fn recv(&self, buf: IoBuf, from: usize) -> impl Future<Output = (Result<usize, Errno>, IoBuf)> + 'static;
    /// Sends at least one byte of a list that is not empty, and removes what was sent.
    ///
    /// # Errors
    /// As send(2): `EPIPE` (without a signal), `ECONNRESET`.
    fn send(&self, list: SendList) -> impl Future<Output = (Result<(), Errno>, SendList)> + 'static;
    /// Ends both directions: the peer sees the end, and running operations here end. What was sent still arrives.
    fn shutdown(&self);
    /// As [`Stream::shutdown`], and data that was sent and has not arrived at the peer's machine never will:
    /// afterwards nothing of this stream can arrive later than what is sent on another one, except data that
    /// already waits there to be received.
    fn abort(&self);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_printed() {
        for (text, shown) in [
            ("unix:/run/x", "unix:/run/x"),
            ("/run/x", "unix:/run/x"),
            ("./x", "unix:./x"),
            ("localhost:10809", "tcp:localhost:10809"),
            ("tcp:[::1]:0", "tcp:[::1]:0"),
        ] {
            let address: SocketAddress = text.parse().unwrap();
            assert_eq!(address.to_string(), shown);
            assert_eq!(shown.parse(), Ok(address));
        }
        for bad in ["", "unix:", "nothing", "host:", "host:70000", ":1", "tcp::1"] {
            assert!(SocketAddress::from_str(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn lists_go_piece_by_piece() {
        let mut list = SendList::new();
        list.push_bytes(b"abc");
        list.push_buf(IoBuf::copy_of(b"de").unwrap());
        let kept = Rc::new(IoBuf::copy_of(b"fg").unwrap());
        list.push_shared(Rc::clone(&kept));
        list.advance(2);
        let mut more = SendList::new();
        more.push_bytes(b"hi");
        more.advance(1);
        list.append(more);
        let left = |list: &SendList| list.slices(8).collect::<Vec<_>>().concat();
        assert_eq!((left(&list).as_slice(), list.len()), (&b"cdefgi"[..], 6));
        list.advance(3);
        assert_eq!(left(&list), b"fgi");
        let mut front = SendList::new();
        front.append(list);
        assert_eq!(left(&front), b"fgi");
        front.advance(3);
        assert!(front.is_empty());
        assert_eq!((Rc::strong_count(&kept), &kept[..]), (1, &b"fg"[..]), "sent, and still there");
    }

    #[test]
    fn small_pieces_in_a_row_are_one() {
        let mut list = SendList::new();
        list.push_bytes(&[1; 20]);
        list.advance(19);
        list.push_bytes(&[2; 12]);
        assert_eq!(list.slices(8).map(<[u8]>::len).collect::<Vec<_>>(), [13]);
        list.push_bytes(&[3]);
        list.push_buf(IoBuf::copy_of(b"de").unwrap());
        list.push_bytes(&[4]);
        let all: Vec<u8> = [vec![1], vec![2; 12], vec![3], b"de".to_vec(), vec![4]].concat();
        assert_eq!(list.slices(8).collect::<Vec<_>>().concat(), all);
        assert_eq!((list.len(), list.slices(8).count()), (17, 4), "a piece takes only what fits in it");
    }
}
