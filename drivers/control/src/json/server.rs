//! The end of tapdisk.

use super::vocabulary::{Answer, Reply, Request};
use crate::Refusal;
use crate::server::{ControlHost, Protocol, send_in_time};
use crate::wire::{Line, receive_line};
use std::future::Future;
use std::rc::Rc;
use tap_host::Errno;

tap_host::listed! {
    pub(super) BUGS: Bug;
    JSON_CUT_TAKEN = "json-cut-taken", "a request of the JSON socket is carried out although its line has no end";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    JSON_REFUSED = "json-refused", "a line at the JSON socket was no request";
    JSON_CUT = "json-cut", "a client of the JSON socket sent a part of a line and left";
}

/// Longest line of a request, in bytes, with its end.
pub const REQUEST_BYTES_MAX: usize = 64 << 10;

/// What a tapdisk does when it is asked.
pub trait Verbs: 'static {
    /// Does what `request` asks for. Runs to its end, however long that takes, and whether its client waits or not.
    /// Several run at the same time.
    fn carry_out(&self, request: Request) -> impl Future<Output = Result<Reply, Refusal>>;
}

/// Requests in JSON, for whoever has [`Verbs`].
#[derive(Debug)]
pub struct Json<V>(pub Rc<V>);

impl<H: ControlHost, V: Verbs> Protocol<H> for Json<V> {
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

    fn waits_for(request: &Self::Request) -> Option<u16> {
        match request {
            Ok(Request::Snapshot { minor, .. }) => Some(*minor),
            Err(_) | Ok(Request::List {} | Request::Stats { .. } | Request::Metrics {}) => None,
        }
    }

    async fn refuse(&self, host: &H, _request: Self::Request, why: Refusal, stream: &H::Stream) {
        tell(host, stream, Err(why)).await;
    }

    async fn answer(&self, host: &H, request: Self::Request, stream: &H::Stream) {
        let outcome = match request {
            Ok(request) => self.0.carry_out(request).await,
            Err(refusal) => Err(refusal),
        };
        tell(host, stream, outcome).await;
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
