//! The end of tapdisk.

use crate::wire::{Received, receive_message, send};
use std::future::Future;
use std::rc::Rc;
use tap_abi::tapctl::{ALL, Announced, Entry, Kind, Message};
use tap_core::wait::{Event as Flag, Permit, Semaphore};
use tap_host::{Either, Errno, Event, Listener, Log, Probe, Sockets, Tasks, Time, select, unless};
use zerocopy::IntoBytes;

tap_host::listed! {
    pub(super) BUGS: Bug;
    CONTROL_DEAF_KEPT = "control-deaf-kept", "a client of the control socket that sends nothing keeps its place";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    CONTROL_CROWDED = "control-crowded", "the control socket had as many clients as it takes";
    CONTROL_DROPPED = "control-dropped", "a client of the control socket was dropped because it sent no whole request";
}

/// Most connections at one time, as in tapdisk3.
pub const CONNECTIONS_MAX: usize = 10;
/// How long a client may take to send its request, and again to take the answer, in nanoseconds.
pub const MESSAGE_NS: u64 = 10_000_000_000;
/// How long the server waits after a connection could not be accepted, in nanoseconds.
const ACCEPT_PAUSE_NS: u64 = 100_000_000;

/// What is sent back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    messages: Vec<Message>,
    text: String,
}

impl From<Message> for Answer {
    fn from(message: Message) -> Self {
        Self { messages: vec![message], text: String::new() }
    }
}

impl Answer {
    /// The answer to [`Kind::List`]: these disks, counted down, and the end.
    pub fn list(mut entries: Vec<Entry>) -> Self {
        let mut left = i32::try_from(entries.len()).expect("a process has few disks");
        entries.push(Entry { minor: (-1).into(), ..Entry::default() });
        let message = |mut entry: Entry| {
            entry.count = left.into();
            left -= 1;
            Message::with(Kind::ListRsp, ALL, &entry)
        };
        Self { messages: entries.into_iter().map(message).collect(), text: String::new() }
    }

    /// The answer to [`Kind::Stats`] about the disk `cookie`.
    pub fn text(cookie: u16, text: String) -> Self {
        let announced = Announced { length: (text.len() as u64).into(), ..Announced::default() };
        Self { messages: vec![Message::with(Kind::StatsRsp, cookie, &announced)], text }
    }

    /// The answer to [`Kind::Exit`]: the end of the connection.
    pub fn nothing() -> Self {
        Self { messages: Vec::new(), text: String::new() }
    }

    fn bytes(&self) -> Vec<u8> {
        let messages = self.messages.iter().flat_map(|message| message.as_bytes());
        messages.copied().chain(self.text.bytes()).collect()
    }
}

/// What a tapdisk does when it is asked.
pub trait Verbs: 'static {
    /// Does what `message` of this kind, a request, asks for, and says what came of it. Runs to its end, whether its
    /// client waits or not. Several run at the same time.
    fn carry_out(&self, kind: Kind, message: Message) -> impl Future<Output = Answer>;
}

/// The parts of a host that the server uses.
pub trait ControlHost: Sockets + Time + Tasks + Log + Probe {}
impl<T: Sockets + Time + Tasks + Log + Probe> ControlHost for T {}

/// A server of the control protocol.
pub struct Control<H, V> {
    host: H,
    verbs: Rc<V>,
    places: Semaphore,
    /// Set once no request is taken any more.
    over: Rc<Flag>,
}

impl<H: ControlHost, V: Verbs> Control<H, V> {
    /// A server for whoever has `verbs`.
    pub fn new(host: H, verbs: Rc<V>) -> Self {
        Self { host, verbs, places: Semaphore::new(CONNECTIONS_MAX), over: Rc::new(Flag::new()) }
    }

    /// Serves `listener` until `stop` completes, and then until the requests that have arrived are answered.
    pub async fn serve(&self, listener: H::Listener, stop: impl Future<Output = ()>) {
        let accept = async {
            let mut connection = 0;
            loop {
                if self.places.free() == 0 {
                    self.host.mark(&CONTROL_CROWDED);
                }
                let place = self.places.acquire().await;
                match listener.accept().await {
                    Ok(stream) => {
                        connection += 1;
                        self.start(connection, stream, place);
                    }
                    Err(error) => {
                        self.host.log(Event::ControlNotAccepted { error });
                        self.host.sleep_ns(ACCEPT_PAUSE_NS).await;
                    }
                }
            }
        };
        let Either::First(()) = select(stop, accept).await;
        drop(listener);
        self.over.set();
        let mut ended = Vec::new();
        for _ in 0..CONNECTIONS_MAX {
            ended.push(self.places.acquire().await);
        }
    }

    fn start(&self, connection: u64, stream: H::Stream, place: Permit) {
        let (host, verbs, over) = (self.host.clone(), Rc::clone(&self.verbs), Rc::clone(&self.over));
        self.host.spawn("control connection", connection, async move {
            if let Err(why) = converse(&host, &*verbs, &stream, &over).await {
                host.mark(&CONTROL_DROPPED);
                host.log(Event::ControlDropped { connection, why });
            }
            drop(place);
        });
    }
}

/// Takes a request from `stream` and answers it.
async fn converse<H: ControlHost>(
    host: &H,
    verbs: &impl Verbs,
    stream: &H::Stream,
    over: &Flag,
) -> Result<(), &'static str> {
    let patience = async {
        host.sleep_ns(MESSAGE_NS).await;
        if host.bug(&CONTROL_DEAF_KEPT) {
            std::future::pending::<()>().await;
        }
    };
    let received = match select(unless(patience, receive_message(host, stream)), over.wait()).await {
        Either::First(received) => received,
        Either::Second(()) => return Err("the tapdisk ends"),
    };
    let message = match received {
        None => return Err("it sent no request in time"),
        Some(Err(_)) => return Err("its connection broke"),
        Some(Ok(Received::Ended(0))) => return Err("it left without a request"),
        Some(Ok(Received::Ended(_))) => return Err("its request is not as long as those of tapdisk3"),
        Some(Ok(Received::Message(message))) => *message,
    };
    let answer = match message.kind() {
        Some(kind) if kind.answer().is_some() || kind == Kind::Exit => verbs.carry_out(kind, message).await,
        _ => {
            let words = format!("carry out message {}: there is no such request", message.number());
            Message::error(message.cookie(), Errno::EINVAL.0, &words).into()
        }
    };
    // A client that has left does not need it.
    let _sent = unless(host.sleep_ns(MESSAGE_NS), send(stream, &answer.bytes())).await;
    Ok(())
}
