//! Messages over a stream, which may split them anywhere.

use tap_abi::tapctl::{MESSAGE_BYTES, Message};
use tap_host::{Errno, IoBuf, Probe, SendList, Stream};
use zerocopy::FromBytes;

tap_host::listed! {
    pub(super) BUGS: Bug;
    CONTROL_ONE_READ = "control-one-read", "a message of the control protocol is taken to arrive in one piece";
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
