//! Messages out of a byte stream that arrives in arbitrary pieces.

use super::StoreLost;
use tap_abi::xenstore::{MessageHeader, PAYLOAD_BYTES_MAX};

/// Room for a few messages of the largest size; most are far smaller.
const BUFFER_BYTES: usize = 4 * (MessageHeader::BYTES + PAYLOAD_BYTES_MAX);

/// Bytes that have arrived and were not parsed yet.
pub(super) struct Inbox {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self { buffer: vec![0; BUFFER_BYTES].into(), start: 0, end: 0 }
    }

    /// Where the next bytes go; never empty once all whole messages were taken out.
    pub(super) fn space(&mut self) -> &mut [u8] {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        &mut self.buffer[self.end..]
    }

    /// `count` bytes were put into the space.
    pub(super) fn filled(&mut self, count: usize) {
        self.end += count;
    }

    /// Takes out the next message, if all of it is there.
    ///
    /// # Errors
    /// An impossible header.
    pub(super) fn next(&mut self) -> Result<Option<(MessageHeader, &[u8])>, StoreLost> {
        let arrived = &self.buffer[self.start..self.end];
        let Some((header, rest)) = arrived.split_first_chunk() else { return Ok(None) };
        let header = MessageHeader::parse(header).map_err(StoreLost::TooLong)?;
        let Some(payload) = rest.get(..header.payload_bytes()) else { return Ok(None) };
        self.start += MessageHeader::BYTES + payload.len();
        Ok(Some((header, payload)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tap_abi::xenstore::MessageKind;

    fn message(request: u32, payload: &[u8]) -> Vec<u8> {
        let header = MessageHeader::new(MessageKind::Read, request, 0, payload.len());
        [&header.to_bytes()[..], payload].concat()
    }

    #[test]
    fn messages_come_out_whole_whatever_the_pieces() {
        let sent: Vec<u8> = (0..40).flat_map(|i| message(i, &vec![i as u8; i as usize * 105])).collect();
        for piece in [1, 7, 16, 17, 4096, BUFFER_BYTES] {
            let (mut inbox, mut rest, mut seen) = (Inbox::new(), &sent[..], 0);
            while !rest.is_empty() {
                let space = inbox.space();
                let count = piece.min(space.len()).min(rest.len());
                space[..count].copy_from_slice(&rest[..count]);
                inbox.filled(count);
                rest = &rest[count..];
                while let Some((header, payload)) = inbox.next().unwrap() {
                    assert_eq!(header.request(), seen);
                    assert_eq!(payload, vec![seen as u8; seen as usize * 105]);
                    seen += 1;
                }
            }
            assert_eq!(seen, 40, "in pieces of {piece}");
        }
    }

    #[test]
    fn there_is_always_room_for_the_rest_of_a_message() {
        let mut inbox = Inbox::new();
        let largest = message(1, &[7; PAYLOAD_BYTES_MAX]);
        for _ in 0..10 {
            for piece in [&largest[..largest.len() - 1], &largest[largest.len() - 1..]] {
                inbox.space()[..piece.len()].copy_from_slice(piece);
                inbox.filled(piece.len());
                let whole = piece.len() == 1;
                assert_eq!(inbox.next().unwrap().is_some(), whole);
            }
        }
    }

    #[test]
    fn a_length_that_cannot_be_is_an_error() {
        let mut inbox = Inbox::new();
        let mut bytes = message(1, b"");
        bytes[12..].copy_from_slice(&4097_u32.to_le_bytes());
        inbox.space()[..16].copy_from_slice(&bytes);
        inbox.filled(16);
        assert_eq!(inbox.next(), Err(StoreLost::TooLong(4097)));
    }
}
