//! The requests, inside or outside a transaction.

use super::shared::Shared;
use super::{Client, paths};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use tap_abi::xenstore::{MessageKind, NO_TRANSACTION, split_string};
use tap_host::Errno;

/// Most bytes of names of one directory. A guest's own has far fewer, by its quota of nodes.
const DIRECTORY_BYTES_MAX: usize = 1 << 20;
/// How often a large directory is read again because it changed while it was read.
const DIRECTORY_ROUNDS_MAX: u32 = 100;

/// A connection, and the transaction in which requests are made.
#[derive(Clone)]
pub(super) struct Session {
    pub(super) client: Rc<Client>,
    pub(super) transaction: u32,
}

impl Session {
    /// Requests that belong to no transaction.
    pub(super) fn outside(client: Rc<Client>) -> Self {
        Self { client, transaction: NO_TRANSACTION }
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.client.0
    }

    /// Makes a request whose payload is the concatenation of `parts`, and completes with the payload of the answer.
    ///
    /// # Errors
    /// At once those of [`Shared::request`], later those of xenstored.
    pub(super) fn ask(&self, kind: MessageKind, parts: &[&[u8]]) -> Result<Asked, Errno> {
        let request = self.shared().request(kind, self.transaction, parts)?;
        Ok(Asked { client: Rc::clone(&self.client), request: Some(request) })
    }

    pub(super) async fn read(&self, path: &str) -> Result<Vec<u8>, Errno> {
        paths::check(path)?;
        self.ask(MessageKind::Read, &[path.as_bytes(), b"\0"])?.await
    }

    pub(super) async fn write(&self, path: &str, value: &[u8]) -> Result<(), Errno> {
        paths::check(path)?;
        if path.len() + 1 + value.len() > self.shared().payload_bytes_max() {
            return Err(Errno::ENOSPC);
        }
        self.ask(MessageKind::Write, &[path.as_bytes(), b"\0", value])?.await?;
        Ok(())
    }

    pub(super) async fn remove(&self, path: &str) -> Result<(), Errno> {
        paths::check(path)?;
        self.ask(MessageKind::Rm, &[path.as_bytes(), b"\0"])?.await?;
        Ok(())
    }

    pub(super) async fn directory(&self, path: &str) -> Result<Vec<String>, Errno> {
        paths::check(path)?;
        let list = match self.ask(MessageKind::Directory, &[path.as_bytes(), b"\0"])?.await {
            Err(Errno::E2BIG) => self.large_directory(path).await?,
            list => list?,
        };
        names(&list)
    }

    /// The list of a directory that does not fit into one message, assembled from pieces of the same generation.
    async fn large_directory(&self, path: &str) -> Result<Vec<u8>, Errno> {
        let (mut generation, mut list) = (Vec::new(), Vec::new());
        let mut rounds = 1;
        loop {
            let offset = list.len().to_string();
            let parts = [path.as_bytes(), b"\0", offset.as_bytes(), b"\0"];
            let answer = self.ask(MessageKind::DirectoryPart, &parts)?.await?;
            let (now, piece) = split_string(&answer).ok_or(Errno::EPROTO)?;
            if list.is_empty() {
                generation = now.to_vec();
            } else if generation != now {
                // A guest that keeps changing its directory must not keep us here.
                rounds += 1;
                if rounds > DIRECTORY_ROUNDS_MAX {
                    return Err(Errno::EAGAIN);
                }
                list.clear();
                continue;
            }
            // Names are never empty, so an empty string is the end.
            let last = piece.strip_suffix(b"\0").filter(|names| names.is_empty() || names.ends_with(b"\0"));
            list.extend_from_slice(last.unwrap_or(piece));
            match (last, piece) {
                (Some(_), _) => return Ok(list),
                (None, []) => return Err(Errno::EPROTO),
                _ if list.len() > DIRECTORY_BYTES_MAX => return Err(Errno::EOVERFLOW),
                _ => {}
            }
        }
    }
}

/// The names in a list of NUL-terminated names, sorted.
///
/// # Errors
/// `EPROTO` if it is not such a list, or not text.
fn names(mut list: &[u8]) -> Result<Vec<String>, Errno> {
    let mut names = Vec::new();
    while !list.is_empty() {
        let (name, rest) = split_string(list).ok_or(Errno::EPROTO)?;
        names.push(std::str::from_utf8(name).map_err(|_| Errno::EPROTO)?.to_owned());
        list = rest;
    }
    names.sort_unstable();
    Ok(names)
}

/// A pending answer. Dropping it does not cancel the request.
pub(super) struct Asked {
    client: Rc<Client>,
    /// `None` once it has arrived.
    request: Option<u32>,
}

impl Future for Asked {
    type Output = Result<Vec<u8>, Errno>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(request) = self.request else { unreachable!("an answer is polled after its end") };
        let answer = self.client.0.poll_answer(request, cx);
        if answer.is_ready() {
            self.request = None;
        }
        answer
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if let Some(request) = self.request {
            self.client.0.give_up(request);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_sorted() {
        assert_eq!(names(b"").unwrap(), [""; 0]);
        assert_eq!(names(b"b\0a\0").unwrap(), ["a", "b"]);
        assert_eq!(names(b"a"), Err(Errno::EPROTO));
        assert_eq!(names(b"a\0\xff\0"), Err(Errno::EPROTO));
    }
}
