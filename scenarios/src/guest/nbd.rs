//! Clients of an NBD server: several connections that serve one disk, and a client that sends bytes, valid or not.
//!
//! The bytes are made here without the stack's code; only the structs of the wire are shared.

use super::{DirectDisk, GuestDisk};
use kernel_model::ProcessStream;
use sim::{Entity, Label, Sim};
use std::rc::Rc;
use tap_abi::nbd::{
    BASE_ALLOCATION, CMD_BLOCK_STATUS, CMD_CACHE, CMD_DISC, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE,
    CMD_WRITE_ZEROES, OPT_GO, OPT_INFO, OPT_LIST, OPT_SET_META_CONTEXT, OPT_STARTTLS, OPT_STRUCTURED_REPLY,
    OptionHeader, RequestHeader, handshake,
};
use tap_core::ZeroFlags;
use tap_host::{Errno, IoBuf, SectorRange, SendList, Stream};
use zerocopy::IntoBytes;

/// What a hostile client does to one of its messages: kind in the low 4 bits, a place in the next 16, a byte in the
/// next 8; 0 for nothing.
pub static NBD_TRICK: Label = Label::packed("nbd-trick", "message {n} of the client: trick {}", &[4, 16, 8]);

/// A disk served through several connections. Writes avoid the last one, on which flushes are sent: a flush that
/// covered only the writes of its own connection would cover none.
#[derive(Clone)]
pub struct Spread(Rc<Vec<DirectDisk>>);

impl Spread {
    /// One disk for each connection, at least one.
    pub fn new(disks: Vec<DirectDisk>) -> Self {
        assert!(!disks.is_empty(), "a disk without connections");
        Self(Rc::new(disks))
    }

    /// Bytes of buffers that have not come back.
    pub fn buffers_out(&self) -> usize {
        self.0.iter().map(DirectDisk::buffers_out).sum()
    }

    fn among(&self, connections: usize, range: SectorRange) -> &DirectDisk {
        &self.0[(range.start.0 / 8) as usize % connections.max(1)]
    }
    fn writer(&self, range: SectorRange) -> &DirectDisk {
        self.among(self.0.len() - 1, range)
    }
}

impl GuestDisk for Spread {
    async fn read<R>(&self, range: SectorRange, look: impl FnOnce(&[u8]) -> R) -> Result<R, Errno> {
        self.among(self.0.len(), range).read(range, look).await
    }
    async fn write(&self, range: SectorRange, fill: impl FnOnce(&mut [u8])) -> Result<(), Errno> {
        self.writer(range).write(range, fill).await
    }
    async fn flush(&self) -> Result<(), Errno> {
        self.0[self.0.len() - 1].flush().await
    }
    async fn write_zeroes(&self, range: SectorRange, flags: ZeroFlags) -> Result<(), Errno> {
        self.writer(range).write_zeroes(range, flags).await
    }
    async fn discard(&self, range: SectorRange) -> Result<(), Errno> {
        self.writer(range).discard(range).await
    }
    fn makes_zeros(&self) -> bool {
        true
    }
    fn max_sectors(&self) -> u32 {
        128
    }
}

/// A connected client that sends arbitrary bytes.
#[derive(Clone)]
pub struct RawNbd<S>(S);

impl<S: Stream> RawNbd<S> {
    /// A client on `stream`.
    pub fn new(stream: S) -> Self {
        Self(stream)
    }

    /// Sends all of `bytes`.
    ///
    /// # Errors
    /// Those of the stream.
    pub async fn send(&self, bytes: &[u8]) -> Result<(), Errno> {
        let mut list = SendList::new();
        list.push_bytes(bytes);
        while !list.is_empty() {
            let (result, rest) = self.0.send(list).await;
            result?;
            list = rest;
        }
        Ok(())
    }

    /// The next `count` bytes; `None` if the stream ends earlier.
    pub async fn take(&self, count: usize) -> Option<Vec<u8>> {
        let mut all = Vec::with_capacity(count);
        while all.len() < count {
            let buf = IoBuf::unpooled((count - all.len()).min(64 << 10)).ok()?;
            match self.0.recv(buf, 0).await {
                (Ok(n), buf) if n > 0 => all.extend_from_slice(&buf[..n]),
                _ => return None,
            }
        }
        Some(all)
    }

    /// Receives until the end. Returns the number of bytes.
    pub async fn drain(&self) -> u64 {
        let mut count = 0;
        let mut room = IoBuf::unpooled(64 << 10);
        while let Ok(buf) = room {
            let (got, buf) = self.0.recv(buf, 0).await;
            match got {
                Ok(0) | Err(_) => break,
                Ok(n) => count += n as u64,
            }
            room = Ok(buf);
        }
        count
    }

    /// Everything until the end.
    pub async fn take_all(&self) -> Vec<u8> {
        let mut all = Vec::new();
        while let Ok(buf) = IoBuf::unpooled(4 << 10) {
            match self.0.recv(buf, 0).await {
                (Ok(n), buf) if n > 0 => all.extend_from_slice(&buf[..n]),
                _ => break,
            }
        }
        all
    }

    /// Receives once. Returns the number of bytes, 0 at the end.
    pub async fn some(&self) -> u64 {
        let Ok(buf) = IoBuf::unpooled(64 << 10) else { return 0 };
        self.0.recv(buf, 0).await.0.map_or(0, |n| n as u64)
    }

    /// Closes it.
    pub fn close(&self) {
        self.0.shutdown();
    }
}

impl RawNbd<ProcessStream> {
    /// Shuts down sending, and still receives.
    pub fn finish(&self) {
        self.0.finish();
    }
}

/// The messages of a session.
pub struct NbdScript(pub Vec<Vec<u8>>);

impl NbdScript {
    /// From the first byte to the choice of `export`: with every option that a client may use if `curious`, else with
    /// the necessary ones only.
    pub fn negotiation(export: &str, curious: bool) -> Self {
        let flags = u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        let mut all = vec![flags.to_be_bytes().to_vec()];
        let len = |n: usize| (n as u32).to_be_bytes();
        let name = [&len(export.len())[..], export.as_bytes()].concat();
        let mut option = |option: u32, data: &[u8]| {
            all.push([OptionHeader::new(option, data.len() as u32).as_bytes(), data].concat());
        };
        if curious {
            option(OPT_LIST, &[]);
            option(OPT_STARTTLS, &[]);
            option(OPT_INFO, &[&name[..], &[0, 2, 0, 1, 0, 2]].concat());
        }
        option(OPT_STRUCTURED_REPLY, &[]);
        let query = [&len(1)[..], &len(BASE_ALLOCATION.len()), BASE_ALLOCATION.as_bytes()].concat();
        option(OPT_SET_META_CONTEXT, &[&name[..], &query].concat());
        option(OPT_GO, &[&name[..], &[0, 1, 0, 3]].concat());
        Self(all)
    }

    /// Appends request `n`; `data` follows the header.
    pub fn request(&mut self, command: u16, flags: u16, n: u64, offset: u64, len: u32, data: &[u8]) {
        self.0.push([RequestHeader::new(command, flags, n, offset, len).as_bytes(), data].concat());
    }

    /// A session that uses every command of the protocol.
    pub fn session(export: &str, requests: u64) -> Self {
        let mut script = Self::negotiation(export, true);
        let commands = [
            CMD_WRITE,
            CMD_READ,
            CMD_BLOCK_STATUS,
            CMD_FLUSH,
            CMD_WRITE_ZEROES,
            CMD_READ,
            CMD_TRIM,
            CMD_WRITE,
            CMD_CACHE,
        ];
        for n in 0..requests {
            let command = commands[n as usize % commands.len()];
            let len = 512 << (n % 8);
            let (offset, len) = if command == CMD_FLUSH { (0, 0) } else { (n * 4096, len) };
            let data = if command == CMD_WRITE { vec![n as u8; len as usize] } else { Vec::new() };
            script.request(command, (n % 2) as u16, n, offset, len, &data);
        }
        script.request(CMD_DISC, 0, 0, 0, 0, &[]);
        script
    }

    /// Damages messages as decided.
    pub fn spoil(&mut self, sim: &Sim, who: Entity) {
        for (i, message) in self.0.iter_mut().enumerate() {
            let trick = sim.decide(who, &NBD_TRICK, i as u32, |d| {
                if d.below(6) > 0 {
                    0
                } else {
                    (1 + d.below(7)) | (d.below(1 << 16) << 4) | (d.below(256) << 20)
                }
            });
            apply(trick, message);
        }
    }
}

/// Applies an [`NBD_TRICK`] value.
fn apply(trick: u64, message: &mut Vec<u8>) {
    let (at, byte) = ((trick >> 4) as u16 as usize % message.len().max(1), (trick >> 20) as u8);
    let header = message.len().clamp(1, RequestHeader::BYTES);
    match trick & 15 {
        1 => message[at % header] = byte,
        2 => message[at] ^= byte | 1,
        3 => message.truncate(at),
        4 => message.insert(at, byte),
        5 => drop(message.remove(at)),
        6 => {
            // The length of an option, or of a request.
            let end = if message.starts_with(b"IHAVEOPT") { 16 } else { 28 };
            if let Some(len) = message.get_mut(end - 4..end) {
                len.copy_from_slice(&[byte, 0xff, at as u8, 0]);
            }
        }
        7 => message.extend(std::iter::repeat_n(byte, at)),
        _ => {}
    }
}

/// An [`NBD_TRICK`] value in words.
pub fn describe_nbd_trick(value: u64) -> String {
    let (at, byte) = ((value >> 4) as u16, (value >> 20) as u8);
    match value & 15 {
        1 => format!("byte {at} of its header is {byte:#x}"),
        2 => format!("byte {at} is changed"),
        3 => format!("it is cut after {at} bytes"),
        4 => format!("byte {byte:#x} is inserted at {at}"),
        5 => format!("byte {at} is left out"),
        6 => "its length is another".into(),
        7 => format!("{at} bytes {byte:#x} follow"),
        _ => "as it should be".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_trick_applies_to_any_message() {
        let whole = NbdScript::session("disk", 9);
        for kind in 0..16 {
            for at in [0, 1, 27, 28, 600, 0xffff] {
                for message in whole.0.iter().chain([&vec![7]]) {
                    let mut spoilt = message.clone();
                    apply(kind | at << 4 | 0x5a << 20, &mut spoilt);
                    match kind {
                        2 | 4 | 5 => assert_ne!(spoilt, *message, "trick {kind} at {at}"),
                        0 | 8.. => assert_eq!(spoilt, *message, "trick {kind} at {at}"),
                        _ => {}
                    }
                }
            }
        }
    }
}
