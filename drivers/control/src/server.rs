//! The end of tapdisk: connections, whatever is said on them.

use crate::Refusal;
use crate::wire::send;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::rc::Rc;
use tap_core::wait::{Event as Flag, Permit, Semaphore};
use tap_host::{Either, Errno, Event, Listener, Log, Probe, Sockets, Tasks, Time, select, unless};

tap_host::listed! {
    pub(super) BUGS: Bug;
    CONTROL_DEAF_KEPT = "control-deaf-kept", "a client of the control socket that sends nothing keeps its place";
    CONTROL_WAITERS_HEARD = "control-waiters-heard",
        "requests that wait for a disk keep the places of clients that are heard";
    EVENTS_KEEP_PLACES = "events-keep-places", "clients that listen for events keep the places of clients that are heard";
    EVENTS_UNCOUNTED = "events-uncounted", "any number of clients may listen for events";
    CONTROL_WAITERS_UNCOUNTED = "control-waiters-uncounted", "any number of requests may wait for one disk";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    CONTROL_CROWDED = "control-crowded", "the control socket had as many clients as it takes";
    CONTROL_DROPPED = "control-dropped", "a client of the control socket was dropped because it sent no whole request";
    CONTROL_WAITERS_MANY = "control-waiters-many",
        "a request was refused because as many as may wait for its disk do";
    EVENTS_MANY = "events-many", "a client could not listen for events because as many as may do so";
}

/// Most clients of a socket that are heard at one time, as in tapdisk3.
pub const CONNECTIONS_MAX: usize = 10;
/// Most requests of a socket at one time that have been heard and may wait, for storage or for one another.
pub const WAITING_MAX: usize = 128;
/// Most of them about one disk.
pub const WAITING_OF_ONE_MAX: usize = 16;
/// Most clients of a socket at one time that listen for events.
pub const LISTENING_MAX: usize = 16;
/// How long a client may take to send its request, and again to take the answer, in nanoseconds.
pub const MESSAGE_NS: u64 = 10_000_000_000;
/// How long the server waits after a connection could not be accepted, in nanoseconds.
const ACCEPT_PAUSE_NS: u64 = 100_000_000;

/// The parts of a host that the server uses.
pub trait ControlHost: Sockets + Time + Tasks + Log + Probe {}
impl<T: Sockets + Time + Tasks + Log + Probe> ControlHost for T {}

/// The place that a request has while it is carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// That of a client that is heard: it is carried out at once.
    Heard,
    /// It may wait, for storage or for others about the disk with this minor number.
    Waits(u16),
    /// It lasts as long as its client likes.
    Listens,
}

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

    /// The place that it needs.
    fn place_of(request: &Self::Request) -> Place;

    /// Tells a client that `request` is not carried out.
    fn refuse(
        &self,
        host: &H,
        request: Self::Request,
        why: Refusal,
        stream: &H::Stream,
    ) -> impl Future<Output = ()>;

    /// Carries `request` out to its end, whether the client waits or not, and sends what came of it.
    fn answer(&self, host: &H, request: Self::Request, stream: &H::Stream) -> impl Future<Output = ()>;
}

/// A server of one control socket.
pub struct Control<H, P>(Rc<Inner<H, P>>);

struct Inner<H, P> {
    host: H,
    protocol: P,
    /// Places of clients that are heard.
    places: Semaphore,
    waiting: Waiting,
    /// Places of those that listen.
    listening: Semaphore,
    connections: Cell<usize>,
    /// Set once no request is taken any more.
    over: Flag,
}

impl<H: ControlHost, P: Protocol<H>> Control<H, P> {
    /// A server of `protocol`.
    pub fn new(host: H, protocol: P) -> Self {
        let waiting = Waiting { places: Semaphore::new(WAITING_MAX), of: RefCell::default() };
        let (places, connections) = (Semaphore::new(CONNECTIONS_MAX), Cell::new(0));
        let (listening, over) = (Semaphore::new(LISTENING_MAX), Flag::new());
        Self(Rc::new(Inner { host, protocol, places, waiting, listening, connections, over }))
    }

    /// Serves `listener` until `stop` completes; then no request is taken any more.
    pub async fn serve(&self, listener: H::Listener, stop: impl Future<Output = ()>) {
        let inner = &self.0;
        let accept = async {
            let mut connection = 0;
            loop {
                if inner.places.free() == 0 {
                    inner.host.mark(&CONTROL_CROWDED);
                }
                let place = inner.places.acquire().await;
                match listener.accept().await {
                    Ok(stream) => {
                        connection += 1;
                        self.start(connection, stream, place);
                    }
                    Err(error) => {
                        inner.host.log(Event::ControlNotAccepted { error });
                        inner.host.sleep_ns(ACCEPT_PAUSE_NS).await;
                    }
                }
            }
        };
        let Either::First(()) = select(stop, accept).await;
        drop(listener);
        inner.over.set();
    }

    /// Completes once every request that was taken is answered. No more are: it comes after [`Control::serve`].
    pub async fn answered(&self) {
        let Inner { places, waiting, listening, .. } = &*self.0;
        let all = [(places, CONNECTIONS_MAX), (&waiting.places, WAITING_MAX), (listening, LISTENING_MAX)];
        for (places, all) in all {
            let mut ended = Vec::new();
            for _ in 0..all {
                ended.push(places.acquire().await);
            }
        }
    }

    fn start(&self, connection: u64, stream: H::Stream, place: Permit) {
        let inner = Rc::clone(&self.0);
        let open = inner.connections.get() + 1;
        assert!(
            open <= CONNECTIONS_MAX + WAITING_MAX + LISTENING_MAX,
            "{open} connections of a control socket"
        );
        inner.connections.set(open);
        self.0.host.spawn(P::TASK, connection, async move {
            // Counted until its place is free again.
            let _counted = Counted(&inner.connections);
            if let Err(why) = inner.converse(&stream, place).await {
                inner.host.mark(&CONTROL_DROPPED);
                inner.host.log(Event::ControlDropped { connection, why });
            }
        });
    }
}

impl<H: ControlHost, P: Protocol<H>> Inner<H, P> {
    /// Takes a request from `stream`, which is heard at `place`, and answers it.
    async fn converse(&self, stream: &H::Stream, place: Permit) -> Result<(), &'static str> {
        let place = Some(place);
        let request = self.hear(stream).await?;
        let minor = match P::place_of(&request) {
            Place::Heard => {
                self.protocol.answer(&self.host, request, stream).await;
                return Ok(());
            }
            Place::Listens => {
                self.listen(request, stream, place).await;
                return Ok(());
            }
            Place::Waits(minor) => minor,
        };
        let Some(_waits) = self.waiting.place(minor, &self.host) else {
            self.host.mark(&CONTROL_WAITERS_MANY);
            let words = format!("wait for minor {minor}: too many requests do so already; try again later");
            self.protocol.refuse(&self.host, request, Refusal::new(Errno::EAGAIN, words), stream).await;
            return Ok(());
        };
        // Whoever waits keeps nobody from being heard.
        let _kept = place.filter(|_| self.host.bug(&CONTROL_WAITERS_HEARD));
        self.protocol.answer(&self.host, request, stream).await;
        Ok(())
    }

    /// Carries out a request that lasts, which was heard at `place`.
    async fn listen(&self, request: P::Request, stream: &H::Stream, place: Option<Permit>) {
        let listens = self.listening.try_acquire();
        if listens.is_none() && !self.host.bug(&EVENTS_UNCOUNTED) {
            self.host.mark(&EVENTS_MANY);
            let words = format!("listen: {LISTENING_MAX} clients do so already");
            return self
                .protocol
                .refuse(&self.host, request, Refusal::new(Errno::EAGAIN, words), stream)
                .await;
        }
        let _kept = place.filter(|_| self.host.bug(&EVENTS_KEEP_PLACES));
        self.protocol.answer(&self.host, request, stream).await;
    }

    async fn hear(&self, stream: &H::Stream) -> Result<P::Request, &'static str> {
        let patience = async {
            self.host.sleep_ns(MESSAGE_NS).await;
            if self.host.bug(&CONTROL_DEAF_KEPT) {
                std::future::pending::<()>().await;
            }
        };
        let heard = unless(patience, P::receive(&self.host, stream));
        match select(heard, self.over.wait()).await {
            Either::First(received) => received.ok_or("it sent no request in time")?,
            Either::Second(()) => Err("the tapdisk ends"),
        }
    }
}

/// Counts one connection less when it is dropped.
struct Counted<'a>(&'a Cell<usize>);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// Requests that have been heard and may wait.
struct Waiting {
    places: Semaphore,
    /// How many there are about each disk.
    of: RefCell<BTreeMap<u16, usize>>,
}

/// The place of one that may wait.
struct Waits<'a> {
    waiting: &'a Waiting,
    minor: u16,
    _place: Permit,
}

impl Waiting {
    /// A place for a request about `minor`, unless as many as may wait do.
    fn place(&self, minor: u16, host: &impl Probe) -> Option<Waits<'_>> {
        let mut of = self.of.borrow_mut();
        let many = of.get(&minor).is_some_and(|count| *count >= WAITING_OF_ONE_MAX);
        if many && !host.bug(&CONTROL_WAITERS_UNCOUNTED) {
            return None;
        }
        let place = self.places.try_acquire()?;
        *of.entry(minor).or_default() += 1;
        Some(Waits { waiting: self, minor, _place: place })
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        let mut of = self.waiting.of.borrow_mut();
        let left = of.get(&self.minor).map_or(0, |count| count - 1);
        match left {
            0 => of.remove(&self.minor),
            left => of.insert(self.minor, left),
        };
    }
}

/// Sends `bytes` to a client that takes them in time. One that has left does not need them.
pub(crate) async fn send_in_time<H: ControlHost>(host: &H, stream: &H::Stream, bytes: &[u8]) {
    let _sent = unless(host.sleep_ns(MESSAGE_NS), send(stream, bytes)).await;
}
