//! Messages over a stream, which may split them anywhere.

use tap_abi::tapctl::{MESSAGE_BYTES, Message};
use tap_host::{Errno, IoBuf, Probe, SendList, Stream};
use zerocopy::FromBytes;

tap_host::listed! {
    pub(super) BUGS: Bug;
    CONTROL_ONE_READ = "control-one-read", "a message of the control protocol is taken to arrive in one piece";
    LINE_ONE_READ = "line-one-read", "a line of the JSON socket is taken to arrive in one piece";
}

/// Receives `len` bytes; fewer if the peer sends no more, or `once` if the first piece has fewer.
async fn receive(stream: &impl Stream, len: usize, once: bool) -> Result<Vec<u8>, Errno> {
    let mut bytes = Vec::with_capacity(len);
    let mut buf = IoBuf::unpooled(len)?;
    while bytes.len() < len {
        // Into the end of the buffer, so that nothing behind the message is taken.
        let from = bytes.len();
        let (count, back) = stream.recv(buf, from).await;
        buf = back;
        match count? {
            0 => break,
            count => bytes.extend_from_slice(&buf[from..from + count]),
        }
        if once {
            break;
        }
    }
    Ok(bytes)
}

/// What a peer has sent.
#[derive(Debug)]
pub(crate) enum Received {
    /// A whole message.
    Message(Box<Message>),
    /// So many bytes, less than a message, and then the end.
    Ended(usize),
}

pub(crate) async fn receive_message(host: &impl Probe, stream: &impl Stream) -> Result<Received, Errno> {
    let bytes = receive(stream, MESSAGE_BYTES, host.bug(&CONTROL_ONE_READ)).await?;
    Ok(match Message::read_from_bytes(&bytes) {
        Ok(message) => Received::Message(Box::new(message)),
        Err(_) => Received::Ended(bytes.len()),
    })
}

/// Receives a text of `len` bytes; `None` if the peer sends fewer, or something else than text.
pub(crate) async fn receive_text(stream: &impl Stream, len: usize) -> Result<Option<String>, Errno> {
    if len == 0 {
        return Ok(Some(String::new()));
    }
    let bytes = receive(stream, len, false).await?;
    Ok(String::from_utf8(bytes).ok().filter(|text| text.len() == len))
}

/// How much of a line is received at once, in bytes.
const PIECE_BYTES: usize = 16 << 10;

/// What a peer has sent instead of a line, or a line.
#[derive(PartialEq, Eq, Debug)]
pub(crate) enum Line {
    /// A line, without its end. What follows it is not read, or dropped.
    Whole(Vec<u8>),
    /// These bytes, and then the end of the connection.
    Ended(Vec<u8>),
    /// More bytes than it may have.
    TooLong,
}

/// Receives a line of at most `max` bytes, with its end.
pub(crate) async fn receive_line(host: &impl Probe, stream: &impl Stream, max: usize) -> Result<Line, Errno> {
    receive_next(host, stream, max, &mut Vec::new()).await
}

/// The same; `ahead` has what was received before, and gets what was received behind the line.
pub(crate) async fn receive_next(
    host: &impl Probe,
    stream: &impl Stream,
    max: usize,
    ahead: &mut Vec<u8>,
) -> Result<Line, Errno> {
    let mut line = Vec::new();
    let mut buf = IoBuf::unpooled(max.min(PIECE_BYTES))?;
    let mut piece = std::mem::take(ahead);
    loop {
        let end = piece.iter().position(|byte| *byte == b'\n');
        line.extend_from_slice(&piece[..end.unwrap_or(piece.len())]);
        if line.len() >= max {
            return Ok(Line::TooLong);
        }
        if let Some(end) = end {
            *ahead = piece.split_off(end + 1);
            return Ok(Line::Whole(line));
        }
        if !piece.is_empty() && host.bug(&LINE_ONE_READ) {
            return Ok(Line::Ended(line));
        }
        let (count, back) = stream.recv(buf, 0).await;
        buf = back;
        let received = &buf[..count?];
        if received.is_empty() {
            return Ok(Line::Ended(line));
        }
        piece.clear();
        piece.extend_from_slice(received);
    }
}

/// Sends everything.
pub(crate) async fn send(stream: &impl Stream, bytes: &[u8]) -> Result<(), Errno> {
    let mut list = SendList::new();
    if !bytes.is_empty() {
        list.push_buf(IoBuf::copy_of(bytes)?);
    }
    while !list.is_empty() {
        let (sent, rest) = stream.send(list).await;
        sent?;
        list = rest;
    }
    Ok(())
}
