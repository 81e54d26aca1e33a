//! What tapdisk does with the messages of tap-ctl.

use crate::Refusal;
use crate::server::{ControlHost, Place, Protocol, send_in_time};
use crate::wire::{Received, receive_message};
use std::future::Future;
use std::rc::Rc;
use tap_abi::tapctl::{ALL, Announced, Entry, Kind, Message};
use tap_host::Errno;
use zerocopy::IntoBytes;

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

/// The protocol of tap-ctl, for whoever has [`Verbs`].
#[derive(Debug)]
pub struct TapCtl<V>(pub Rc<V>);

impl<H: ControlHost, V: Verbs> Protocol<H> for TapCtl<V> {
    const TASK: &'static str = "control connection";
    type Request = Message;

    async fn receive(host: &H, stream: &H::Stream) -> Result<Message, &'static str> {
        match receive_message(host, stream).await {
            Err(_) => Err("its connection broke"),
            Ok(Received::Ended(0)) => Err("it left without a request"),
            Ok(Received::Ended(_)) => Err("its request is not as long as those of tapdisk3"),
            Ok(Received::Message(message)) => Ok(*message),
        }
    }

    fn place_of(message: &Message) -> Place {
        match message.kind() {
            Some(
                Kind::Pid
                | Kind::List
                | Kind::ListMinors
                | Kind::Stats
                | Kind::DiskInfo
                | Kind::XenblkifConnect
                | Kind::Exit,
            )
            | None => Place::Heard,
            Some(_) => Place::Waits(message.cookie()),
        }
    }

    async fn refuse(&self, host: &H, message: Message, why: Refusal, stream: &H::Stream) {
        let answer = Message::error(message.cookie(), why.error.0, &why.words);
        send_in_time(host, stream, answer.as_bytes()).await;
    }

    async fn answer(&self, host: &H, message: Message, stream: &H::Stream) {
        let answer = match message.kind() {
            Some(kind) if kind.answer().is_some() || kind == Kind::Exit => {
                self.0.carry_out(kind, message).await
            }
            _ => {
                let words = format!("carry out message {}: there is no such request", message.number());
                Message::error(message.cookie(), Errno::EINVAL.0, &words).into()
            }
        };
        send_in_time(host, stream, &answer.bytes()).await;
    }
}
