//! The end of tapdisk: connections, whatever is said on them.

use crate::wire::send;
use std::future::Future;
use std::rc::Rc;
use tap_core::wait::{Event as Flag, Permit, Semaphore};
use tap_host::{Either, Event, Listener, Log, Probe, Sockets, Tasks, Time, select, unless};

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

/// The parts of a host that the server uses.
pub trait ControlHost: Sockets + Time + Tasks + Log + Probe {}
impl<T: Sockets + Time + Tasks + Log + Probe> ControlHost for T {}

/// A protocol in which a connection carries one request and what comes of it.
pub trait Protocol<H: ControlHost>: 'static {
    /// Names the tasks of connections.
    const TASK: &'static str;
    /// A request.
    type Request;

    /// Takes a request from a client; it is dropped if it takes too long to send one.
    ///
    /// # Errors
    /// Why there is none: the client gets no answer.
    fn receive(host: &H, stream: &H::Stream) -> impl Future<Output = Result<Self::Request, &'static str>>;

    /// Carries `request` out to its end, whether the client waits or not, and sends what came of it.
    fn answer(&self, host: &H, request: Self::Request, stream: &H::Stream) -> impl Future<Output = ()>;
}

/// A server of one control socket.
pub struct Control<H, P> {
    host: H,
    protocol: Rc<P>,
    places: Semaphore,
    /// Set once no request is taken any more.
    over: Rc<Flag>,
}

impl<H: ControlHost, P: Protocol<H>> Control<H, P> {
    /// A server of `protocol`.
    pub fn new(host: H, protocol: P) -> Self {
        let protocol = Rc::new(protocol);
        Self { host, protocol, places: Semaphore::new(CONNECTIONS_MAX), over: Rc::new(Flag::new()) }
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
        let (host, protocol, over) = (self.host.clone(), Rc::clone(&self.protocol), Rc::clone(&self.over));
        self.host.spawn(P::TASK, connection, async move {
            if let Err(why) = converse(&host, &*protocol, &stream, &over).await {
                host.mark(&CONTROL_DROPPED);
                host.log(Event::ControlDropped { connection, why });
            }
            drop(place);
        });
    }
}

/// Takes a request from `stream` and answers it.
async fn converse<H: ControlHost, P: Protocol<H>>(
    host: &H,
    protocol: &P,
    stream: &H::Stream,
    over: &Flag,
) -> Result<(), &'static str> {
    let patience = async {
        host.sleep_ns(MESSAGE_NS).await;
        if host.bug(&CONTROL_DEAF_KEPT) {
            std::future::pending::<()>().await;
        }
    };
    let received = match select(unless(patience, P::receive(host, stream)), over.wait()).await {
        Either::First(received) => received,
        Either::Second(()) => return Err("the tapdisk ends"),
    };
    let request = received.ok_or("it sent no request in time")??;
    protocol.answer(host, request, stream).await;
    Ok(())
}

/// Sends `bytes` to a client that takes them in time. One that has left does not need them.
pub(crate) async fn send_in_time<H: ControlHost>(host: &H, stream: &H::Stream, bytes: &[u8]) {
    let _sent = unless(host.sleep_ns(MESSAGE_NS), send(stream, bytes)).await;
}
