//! A small xenstored for tests, on threads of its own: a tree, watches and transactions by the rules that a client can
//! see, a record of the requests, and misbehaviour on demand.

pub(crate) mod tree;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use tap_abi::xenstore::{ERRORS, MessageHeader, MessageKind, split_string};
use tap_linux::StorePlaces;
use tree::Tree;

/// A read of this path gets no answer.
pub(crate) const SILENCE: &str = "/bad/silence";
/// A read of this path makes each watch of the connection fire for [`STORM_EVENTS`] different paths, and is then
/// answered.
pub(crate) const STORM: &str = "/bad/storm";
/// Events of a storm, for each watch.
pub(crate) const STORM_EVENTS: usize = 5000;
/// A read of one of these paths ends the connection, each in a different way.
pub(crate) const ENDS: [&str; 7] = [
    "/bad/close",
    "/bad/close-within",
    "/bad/too-long",
    "/bad/not-asked",
    "/bad/other-kind",
    "/bad/unknown-kind",
    "/bad/event",
];

/// A request: kind, transaction, payload.
pub(crate) type Asked = (MessageKind, u32, Vec<u8>);

#[derive(Default)]
struct Watch {
    connection: u64,
    path: String,
    token: Vec<u8>,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) tree: Tree,
    watches: Vec<Watch>,
    transactions: BTreeMap<u32, Tree>,
    numbers: u32,
    connections: BTreeMap<u64, UnixStream>,
    pub(crate) asked: Vec<Asked>,
    /// Answers go out byte by byte.
    pub(crate) byte_by_byte: bool,
    /// How many times a large directory changes while it is read.
    pub(crate) disturbances: u32,
    /// Nothing is read.
    paused: bool,
}

impl State {
    /// Kinds and transactions of the requests.
    pub(crate) fn kinds(&self) -> Vec<(MessageKind, u32)> {
        self.asked.iter().map(|(kind, transaction, _)| (*kind, *transaction)).collect()
    }

    pub(crate) fn watch_count(&self) -> usize {
        self.watches.len()
    }

    pub(crate) fn transaction_count(&self) -> usize {
        self.transactions.len()
    }

    pub(crate) fn connection_count(&self) -> usize {
        self.connections.len()
    }

    fn send(&mut self, connection: u64, bytes: &[u8]) {
        let piece = if self.byte_by_byte { 1 } else { bytes.len().max(1) };
        let Some(mut stream) = self.connections.get(&connection) else { return };
        // A client that has disconnected needs no answer.
        drop(bytes.chunks(piece).try_for_each(|piece| stream.write_all(piece)));
    }

    fn message(&mut self, connection: u64, kind: MessageKind, request: u32, payload: &[u8]) {
        let header = MessageHeader::new(kind, request, 0, payload.len());
        self.send(connection, &[&header.to_bytes()[..], payload].concat());
    }

    fn fire(&mut self, path: &str) {
        let hit: Vec<(u64, Vec<u8>)> = self
            .watches
            .iter()
            .filter(|watch| tree::within(path, &watch.path))
            .map(|watch| (watch.connection, [path.as_bytes(), b"\0", &watch.token, b"\0"].concat()))
            .collect();
        for (connection, payload) in hit {
            self.message(connection, MessageKind::WatchEvent, 0, &payload);
        }
    }

    fn storm(&mut self, connection: u64) {
        let own = self.watches.iter().filter(|watch| watch.connection == connection);
        let own: Vec<(String, Vec<u8>)> = own.map(|w| (w.path.clone(), w.token.clone())).collect();
        for (path, token) in own {
            for i in 0..STORM_EVENTS {
                let payload = [format!("{path}/{i}").as_bytes(), b"\0", &token, b"\0"].concat();
                self.message(connection, MessageKind::WatchEvent, 0, &payload);
            }
        }
    }

    /// Misbehaves, if `path` asks for it; otherwise returns false.
    fn misbehave(&mut self, connection: u64, request: u32, path: &str) -> bool {
        match path {
            SILENCE => {}
            STORM => {
                self.storm(connection);
                self.message(connection, MessageKind::Read, request, b"");
            }
            "/bad/close" => self.hang_up(connection),
            "/bad/close-within" => {
                let header = MessageHeader::new(MessageKind::Read, request, 0, 7).to_bytes();
                self.send(connection, &header[..11]);
                self.hang_up(connection);
            }
            "/bad/too-long" => {
                let mut header = MessageHeader::new(MessageKind::Read, request, 0, 0).to_bytes();
                header[12..].copy_from_slice(&4097_u32.to_le_bytes());
                self.send(connection, &header);
            }
            "/bad/not-asked" => self.message(connection, MessageKind::Read, request + 1000, b""),
            "/bad/other-kind" => self.message(connection, MessageKind::Write, request, b"OK\0"),
            "/bad/unknown-kind" => {
                let mut header = MessageHeader::new(MessageKind::Read, request, 0, 0).to_bytes();
                header[..4].copy_from_slice(&99_u32.to_le_bytes());
                self.send(connection, &header);
            }
            "/bad/event" => self.message(connection, MessageKind::WatchEvent, 0, b"/a\0token"),
            _ => return false,
        }
        true
    }

    fn hang_up(&mut self, connection: u64) {
        if let Some(stream) = self.connections.remove(&connection) {
            drop(stream.shutdown(std::net::Shutdown::Both));
        }
        self.watches.retain(|watch| watch.connection != connection);
    }

    /// The answer to a request, or the name of an error.
    fn answer(
        &mut self,
        connection: u64,
        kind: MessageKind,
        transaction: u32,
        payload: &[u8],
    ) -> Result<Vec<u8>, &'static str> {
        let (first, rest) = split_string(payload).ok_or("EINVAL")?;
        let first = std::str::from_utf8(first).map_err(|_| "EINVAL")?;
        let ok = b"OK\0".to_vec();
        match kind {
            MessageKind::Watch => {
                let (token, _) = split_string(rest).ok_or("EINVAL")?;
                let (path, token) = (first.to_owned(), token.to_vec());
                self.watches.push(Watch { connection, path, token });
                Ok(ok)
            }
            MessageKind::Unwatch => {
                let (token, _) = split_string(rest).ok_or("EINVAL")?;
                let before = self.watches.len();
                self.watches.retain(|w| (w.connection, &*w.path, &*w.token) != (connection, first, token));
                if self.watches.len() < before { Ok(ok) } else { Err("ENOENT") }
            }
            MessageKind::TransactionStart => {
                self.numbers += 1;
                self.transactions.insert(self.numbers, self.tree.clone());
                Ok(format!("{}\0", self.numbers).into_bytes())
            }
            MessageKind::TransactionEnd => {
                let view = self.transactions.remove(&transaction).ok_or("ENOENT")?;
                if first == "T" {
                    for path in self.tree.take_over(view)? {
                        self.fire(&path);
                    }
                }
                Ok(ok)
            }
            MessageKind::DirectoryPart => {
                let offset =
                    std::str::from_utf8(rest).ok().and_then(|text| text.trim_end_matches('\0').parse().ok());
                let offset: usize = offset.ok_or("EINVAL")?;
                if offset > 0 && self.disturbances > 0 {
                    self.disturbances -= 1;
                    self.tree.write(&format!("{first}/disturbance-{}", self.disturbances), b"")?;
                }
                self.tree.directory_part(first, offset)
            }
            _ if transaction != 0 => {
                let view = self.transactions.get_mut(&transaction).ok_or("ENOENT")?;
                view.apply(kind, first, rest)
            }
            _ => {
                let answer = self.tree.apply(kind, first, rest)?;
                for path in self.tree.changed() {
                    self.fire(&path);
                }
                Ok(answer)
            }
        }
    }

    fn handle(&mut self, connection: u64, header: &MessageHeader, payload: Vec<u8>) {
        let (kind, request, transaction) = (header.kind().unwrap(), header.request(), header.transaction());
        self.asked.push((kind, transaction, payload.clone()));
        let path = split_string(&payload).map(|(path, _)| String::from_utf8_lossy(path).into_owned());
        let path = path.unwrap_or_default();
        if kind == MessageKind::Read && self.misbehave(connection, request, &path) {
            return;
        }
        match self.answer(connection, kind, transaction, &payload) {
            Ok(answer) if answer.len() > 4096 => {
                self.message(connection, MessageKind::Error, request, b"E2BIG\0");
            }
            Ok(answer) => self.message(connection, kind, request, &answer),
            Err(name) => {
                assert!(ERRORS.iter().any(|(known, _)| *known == name));
                self.message(connection, MessageKind::Error, request, format!("{name}\0").as_bytes());
            }
        }
        if kind == MessageKind::Watch {
            let (_, token) = split_string(&payload).unwrap();
            let event = [path.as_bytes(), b"\0", token].concat();
            self.message(connection, MessageKind::WatchEvent, 0, &event);
        }
    }
}

#[derive(Default)]
struct Server {
    state: Mutex<State>,
    resumed: Condvar,
}

impl Server {
    fn serve(&self, connection: u64, mut stream: UnixStream) {
        loop {
            let paused = self.resumed.wait_while(self.state.lock().unwrap(), |state| state.paused);
            drop(paused.unwrap());
            let mut header = [0; MessageHeader::BYTES];
            if stream.read_exact(&mut header).is_err() {
                break;
            }
            let header = MessageHeader::parse(&header).expect("no message is too large");
            let mut payload = vec![0; header.payload_bytes()];
            if stream.read_exact(&mut payload).is_err() {
                break;
            }
            self.state.lock().unwrap().handle(connection, &header, payload);
        }
        self.state.lock().unwrap().hang_up(connection);
    }
}

/// A running xenstored.
pub(crate) struct Xenstored {
    server: Arc<Server>,
    folder: tempfile::TempDir,
}

impl Xenstored {
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
        let server = Arc::new(Server::default());
        let accepts = Arc::clone(&server);
        // Runs until the process of the tests ends.
        std::thread::spawn(move || {
            for (connection, stream) in (0..).zip(listener.incoming()) {
                let stream = stream.unwrap();
                let server = Arc::clone(&accepts);
                let ours = stream.try_clone().unwrap();
                server.state.lock().unwrap().connections.insert(connection, ours);
                std::thread::spawn(move || server.serve(connection, stream));
            }
        });
        Self { server, folder }
    }

    pub(crate) fn place(&self) -> StorePlaces {
        StorePlaces::only(self.folder.path().join("socket").to_str().unwrap())
    }

    /// For inspection and changes. Everything waits meanwhile.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.server.state.lock().unwrap()
    }

    /// From the next message on, nothing is read.
    pub(crate) fn pause(&self) {
        self.state().paused = true;
    }

    /// Reading continues.
    pub(crate) fn resume(&self) {
        self.state().paused = false;
        self.server.resumed.notify_all();
    }
}
