//! A connected socket.
//!
//! One receive takes what has arrived with one recv. A short receive has emptied the socket, so the next one waits for
//! the kernel's event instead of provoking an `EAGAIN`; events are edge-triggered, and anything that arrives from then
//! on raises a new one. The same holds for sends.

use crate::files::{errno, of_rustix};
use crate::spin::Listed;
use crate::watch::watch;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recv, send, sendmsg, sockopt};
use smallvec::SmallVec;
use std::future::{Future, poll_fn};
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tap_host::{Errno, IoBuf, SendList, Stream};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Most pieces of one send (UIO_MAXIOV).
const SLICES_MAX: usize = 1024;

/// A connected unix or TCP socket; clones share it.
#[derive(Clone)]
pub struct LinuxStream(Rc<Socket>);

struct Socket {
    // Taken off the list before it is closed.
    _listed: Listed,
    fd: AsyncFd<OwnedFd>,
    tcp: bool,
}

/// A silent TCP peer is probed after this time, in seconds, and again at the interval of the next constant; it is gone
/// when it has not answered that many probes, or has left sent bytes unacknowledged for [`UNANSWERED_MS`].
const KEEPALIVE_S: u64 = 30;
const KEEPALIVE_AGAIN_S: u64 = 10;
const KEEPALIVE_TIMES: u32 = 3;
const UNANSWERED_MS: u32 = 60_000;

fn set_up_tcp(socket: &OwnedFd) -> rustix::io::Result<()> {
    // A reply is sent at once.
    sockopt::set_tcp_nodelay(socket, true)?;
    // A machine that lost power sends nothing: its connections would stay open forever.
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, Duration::from_secs(KEEPALIVE_S))?;
    sockopt::set_tcp_keepintvl(socket, Duration::from_secs(KEEPALIVE_AGAIN_S))?;
    sockopt::set_tcp_keepcnt(socket, KEEPALIVE_TIMES)?;
    sockopt::set_tcp_user_timeout(socket, UNANSWERED_MS)
}

impl LinuxStream {
    /// `socket` does not block.
    pub(crate) fn new(socket: OwnedFd, tcp: bool) -> Result<Self, Errno> {
        if tcp {
            set_up_tcp(&socket).map_err(of_rustix)?;
        }
        let fd = watch(socket, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self(Rc::new(Socket { _listed: Listed::new(fd.as_raw_fd()), fd, tcp })))
    }

    fn poll_recv(&self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<Result<usize, Errno>> {
        loop {
            let mut ready = ready!(self.0.fd.poll_read_ready(cx)).map_err(|e| errno(&e))?;
            match recv(&self.0.fd, &mut *buf, RecvFlags::empty()).map_err(of_rustix) {
                Ok((_, count)) => {
                    if count < buf.len() {
                        ready.clear_ready();
                    }
                    return Poll::Ready(Ok(count));
                }
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(Errno::EINTR) => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn poll_send(&self, cx: &mut Context<'_>, list: &mut SendList) -> Poll<Result<(), Errno>> {
        loop {
            let mut ready = ready!(self.0.fd.poll_write_ready(cx)).map_err(|e| errno(&e))?;
            match self.send_now(list) {
                Ok((count, offered)) => {
                    list.advance(count);
                    if count < offered {
                        ready.clear_ready();
                    }
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(Errno::EINTR) => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Sends as much as the socket takes; returns the bytes sent and the bytes offered.
    fn send_now(&self, list: &SendList) -> Result<(usize, usize), Errno> {
        // Room for the replies to 64 reads without the heap, where 2 KiB at once make malloc tidy up each time.
        let mut slices = SmallVec::<[IoSlice<'_>; 128]>::new();
        slices.extend(list.slices(SLICES_MAX).map(IoSlice::new));
        let offered = slices.iter().map(|s| s.len()).sum();
        let sent = match slices.as_slice() {
            [one] => send(&self.0.fd, one, SendFlags::NOSIGNAL),
            _ => sendmsg(&self.0.fd, &slices, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL),
        };
        Ok((sent.map_err(of_rustix)?, offered))
    }
}

impl Stream for LinuxStream {
    fn recv(&self, buf: IoBuf, from: usize) -> impl Future<Output = (Result<usize, Errno>, IoBuf)> + 'static {
        let (stream, mut buf) = (self.clone(), Some(buf));
        poll_fn(move |cx| {
            let Some(bytes) = &mut buf else { unreachable!("a receive is polled after its end") };
            let result = ready!(stream.poll_recv(cx, &mut bytes[from..]));
            let Some(bytes) = buf.take() else { unreachable!("it was there") };
            Poll::Ready((result, bytes))
        })
    }

    fn send(&self, list: SendList) -> impl Future<Output = (Result<(), Errno>, SendList)> + 'static {
        let (stream, mut list) = (self.clone(), list);
        poll_fn(move |cx| {
            let result = ready!(stream.poll_send(cx, &mut list));
            Poll::Ready((result, std::mem::take(&mut list)))
        })
    }

    fn abort(&self) {
        if self.0.tcp {
            // Empties the send queue and sends the peer a reset; after a mere shutdown the kernel continues sending,
            // for as long as the network needs. Fails only if there is nothing left to send.
            let _aborted = rustix::net::connect_unspec(&self.0.fd);
        }
        self.shutdown();
    }

    fn shutdown(&self) {
        // Fails only if the connection is gone already, which is the goal.
        let _shut = rustix::net::shutdown(&self.0.fd, Shutdown::Both);
    }
}
