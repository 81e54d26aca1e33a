//! The end of tapdisk.

use super::feed::Feed;
use super::news::Standing;
use super::vocabulary::{Answer, Reply, Request};
use crate::Refusal;
use crate::server::{ControlHost, MESSAGE_NS, Place, Protocol, send_in_time};
use crate::wire::{Line, receive_line, send};
use std::future::Future;
use std::rc::Rc;
use tap_host::{Errno, IoBuf, Probe, Stream, select};

tap_host::listed! {
    pub(super) BUGS: Bug;
    EVENTS_FROM_LATER = "events-from-later", "a client gets events only from a moment after the first state on";
    EVENTS_HANG_UP_MISSED = "events-hang-up-missed", "a client that listens for events keeps its place when it hangs up";
    JSON_CUT_TAKEN = "json-cut-taken", "a request of the JSON socket is carried out although its line has no end";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    JSON_REFUSED = "json-refused", "a line at the JSON socket was no request";
    JSON_CUT = "json-cut", "a client of the JSON socket sent a part of a line and left";
}

/// Longest line of a request, in bytes, with its end.
pub const REQUEST_BYTES_MAX: usize = 64 << 10;

/// How much is received at once of what nobody reads, in bytes.
const IGNORED_BYTES: usize = 512;

/// What a tapdisk does when it is asked.
pub trait Verbs<H>: 'static {
    /// Does what `request` asks for, which is not [`Request::Events`]. Runs to its end, however long that takes, and
    /// whether its client waits or not. Several run at the same time.
    fn carry_out(&self, request: Request) -> impl Future<Output = Result<Reply, Refusal>>;

    /// What happens to its disks.
    fn feed(&self) -> &Feed<H>;

    /// Its disks as they are, in the order of their minor numbers.
    fn present(&self) -> Vec<Standing>;
}

/// Requests in JSON, for whoever has [`Verbs`].
#[derive(Debug)]
pub struct Json<V>(pub Rc<V>);

impl<H: ControlHost, V: Verbs<H>> Protocol<H> for Json<V> {
    const TASK: &'static str = "json connection";
    type Request = Result<Request, Refusal>;

    async fn receive(host: &H, stream: &H::Stream) -> Result<Self::Request, &'static str> {
        let refuse = |words: String| {
            host.mark(&JSON_REFUSED);
            Ok(Err(Refusal::new(Errno::EINVAL, format!("understand the request: {words}"))))
        };
        match receive_line(host, stream, REQUEST_BYTES_MAX).await {
            Err(_) => Err("its connection broke"),
            Ok(Line::Ended(line)) if line.is_empty() => Err("it left without a request"),
            Ok(Line::Ended(_)) if !host.bug(&JSON_CUT_TAKEN) => {
                host.mark(&JSON_CUT);
                refuse("its line has no end".to_owned())
            }
            Ok(Line::TooLong) => refuse(format!("it has more than {REQUEST_BYTES_MAX} bytes")),
            Ok(Line::Whole(line) | Line::Ended(line)) => match Request::of(&line) {
                Ok(request) => Ok(Ok(request)),
                Err(why) => refuse(why),
            },
        }
    }

    fn place_of(request: &Self::Request) -> Place {
        match request {
            Ok(
                Request::Snapshot { minor, .. }
                | Request::Commit { minor, .. }
                | Request::Cancel { minor }
                | Request::Set { minor, .. }
                | Request::Resize { minor, .. },
            ) => Place::Waits(*minor),
            Ok(Request::Events {}) => Place::Listens,
            Err(_)
            | Ok(
                Request::List {}
                | Request::Query { .. }
                | Request::Connect { .. }
                | Request::Stats { .. }
                | Request::Metrics {},
            ) => Place::Heard,
        }
    }

    async fn refuse(&self, host: &H, _request: Self::Request, why: Refusal, stream: &H::Stream) {
        tell(host, stream, Err(why)).await;
    }

    async fn answer(&self, host: &H, request: Self::Request, stream: &H::Stream) {
        let outcome = match request {
            Ok(Request::Events {}) => return events(host, &*self.0, stream).await,
            Ok(request) => self.0.carry_out(request).await,
            Err(refusal) => Err(refusal),
        };
        tell(host, stream, outcome).await;
    }
}

/// Sends a line for each event, until the client hangs up or nothing happens any more.
async fn events<H: ControlHost>(host: &H, verbs: &impl Verbs<H>, stream: &H::Stream) {
    let lines = async {
        let mut ear = verbs.feed().listen();
        let mut is_first = true;
        while let Some(lines) = ear.next(|| verbs.present()).await {
            if send(stream, &lines).await.is_err() {
                return;
            }
            if std::mem::take(&mut is_first) && host.bug(&EVENTS_FROM_LATER) {
                host.sleep_ns(1_000_000).await;
                ear.skip();
            }
        }
    };
    // What is left is sent to who takes it.
    let late = async {
        select(hung_up(host, stream), async {
            verbs.feed().ended().await;
            host.sleep_ns(MESSAGE_NS).await;
        })
        .await;
    };
    select(lines, late).await;
}

/// Completes once the client sends no more. What it sends is of no interest.
async fn hung_up(host: &impl Probe, stream: &impl Stream) {
    if host.bug(&EVENTS_HANG_UP_MISSED) {
        std::future::pending::<()>().await;
    }
    let Ok(mut buf) = IoBuf::unpooled(IGNORED_BYTES) else { return };
    loop {
        let (count, back) = stream.recv(buf, 0).await;
        if !matches!(count, Ok(1..)) {
            return;
        }
        buf = back;
    }
}

/// Sends what came of a request.
async fn tell<H: ControlHost>(host: &H, stream: &H::Stream, outcome: Result<Reply, Refusal>) {
    let answer = match outcome {
        Ok(reply) => Answer::Ok(reply),
        Err(refusal) => Answer::Error(refusal.into()),
    };
    let mut line = serde_json::to_vec(&answer).expect("maps have texts as keys");
    line.push(b'\n');
    send_in_time(host, stream, &line).await;
}
