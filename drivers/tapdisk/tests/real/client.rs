//! A plain NBD client: requests are sent at once, replies come back in any order.

use libtest_mimic::Failed;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const WRITE_ZEROES: u16 = 6;
/// Flag of WRITE_ZEROES: the space stays allocated.
pub(crate) const NO_HOLE: u16 = 2;

/// A connection to the default export.
pub(crate) struct Client {
    stream: UnixStream,
    pub(crate) size_bytes: u64,
}

/// The reply to the request with this cookie.
pub(crate) struct Reply {
    pub(crate) cookie: u64,
    /// An error number of NBD, or 0.
    pub(crate) error: u32,
}

impl Client {
    pub(crate) fn connect(socket: &Path) -> Result<Self, Failed> {
        let mut stream = UnixStream::connect(socket)?;
        let mut hello = [0; 18];
        stream.read_exact(&mut hello)?;
        if &hello[..16] != b"NBDMAGICIHAVEOPT" {
            return Err("no NBD server".into());
        }
        // Fixed newstyle without zeros, and EXPORT_NAME of the default export.
        let mut bytes = 3_u32.to_be_bytes().to_vec();
        bytes.extend(b"IHAVEOPT");
        bytes.extend(1_u32.to_be_bytes());
        bytes.extend(0_u32.to_be_bytes());
        stream.write_all(&bytes)?;
        let mut export = [0; 10];
        stream.read_exact(&mut export)?;
        let size_bytes = u64::from_be_bytes(export[..8].try_into()?);
        Ok(Self { stream, size_bytes })
    }

    /// Sends a request; `data` is the payload of a write, `len` the length of any other request. Zeros keep their
    /// space.
    pub(crate) fn send(
        &mut self,
        command: u16,
        cookie: u64,
        offset: u64,
        len: u32,
        data: &[u8],
    ) -> std::io::Result<()> {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        let flags = if command == WRITE_ZEROES { NO_HOLE } else { 0 };
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(if command == WRITE { data.len() as u32 } else { len }.to_be_bytes());
        bytes.extend(data);
        self.stream.write_all(&bytes)
    }

    /// Waits for the next reply to a request without data.
    pub(crate) fn reply(&mut self) -> std::io::Result<Reply> {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head)?;
        assert_eq!(head[..4], 0x6744_6698_u32.to_be_bytes(), "a simple reply");
        let error = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
        let (_, cookie) = head.split_at(8);
        Ok(Reply { cookie: cookie.iter().fold(0, |n, b| n << 8 | u64::from(*b)), error })
    }

    /// Reads while nothing else is in flight.
    pub(crate) fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>, Failed> {
        self.send(READ, 1, offset, len, &[])?;
        let reply = self.reply()?;
        if reply.error != 0 {
            return Err(format!("reading at {offset} failed with {}", reply.error).into());
        }
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    /// Makes `len` bytes zeros that keep their space, while nothing else is in flight; returns the error of the reply.
    pub(crate) fn zero(&mut self, offset: u64, len: u32) -> Result<u32, Failed> {
        self.send(WRITE_ZEROES, 1, offset, len, &[])?;
        Ok(self.reply()?.error)
    }

    /// One request whose reply has only an error, while nothing else is in flight.
    pub(crate) fn ask(&mut self, command: u16, offset: u64, data: &[u8]) -> Result<u32, Failed> {
        self.send(command, 1, offset, 0, data)?;
        Ok(self.reply()?.error)
    }
}
