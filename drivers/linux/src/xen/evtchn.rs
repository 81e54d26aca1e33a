//! Event channels: /dev/xen/evtchn, one descriptor for all channels of the process.
//!
//! ```text
//!   Xen ─► kernel masks the port, queues its number ─► read by one task ─► pending, the waiter is woken
//!                     ▲                                                                 │
//!                     └──────── number written: unmasked ◄── next wait ◄── wait ends, pending cleared
//! ```
//!
//! A port that was queued stays masked until it is waited for again, so a guest that raises events endlessly costs one
//! of them per turn of its ring. Xen keeps what it raises meanwhile and delivers it when the port is unmasked.

use super::ioctl::{BindInterdomain, Notify, Reset, Unbind, call};
use crate::files::{errno, of_rustix};
use crate::spin::Listed;
use crate::watch::watch;
use crate::{Level, LinuxHost};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::task::Poll;
use tap_host::{DomId, Errno, EventChannel, OneWaiter, Port};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Bytes of a port's number in the queue.
const PORT_BYTES: usize = size_of::<u32>();
/// Numbers that are read at a time.
const PORTS_AT_A_TIME: usize = 64;

/// The device and its open channels.
pub(super) struct Evtchn {
    // Removed from the list before it is closed.
    _listed: Listed,
    fd: AsyncFd<OwnedFd>,
    channels: RefCell<BTreeMap<u32, Rc<Channel>>>,
    /// Events can no longer be read: every channel is deaf, including those bound later.
    lost: Cell<bool>,
}

#[derive(Default)]
struct Channel {
    pending: Cell<bool>,
    /// To be unmasked at the next wait.
    masked: Cell<bool>,
    gone: Cell<bool>,
    waiter: OneWaiter,
}

impl Channel {
    fn raise(&self) {
        self.pending.set(true);
        self.masked.set(true);
        self.waiter.wake();
    }
}

impl Evtchn {
    /// `fd` does not block. [`Evtchn::read_all`] has to run.
    pub(super) fn new(fd: OwnedFd) -> Result<Rc<Self>, Errno> {
        let fd = watch(fd, Interest::READABLE)?;
        Ok(Rc::new(Self {
            _listed: Listed::new(fd.as_raw_fd()),
            fd,
            channels: RefCell::default(),
            lost: Cell::new(false),
        }))
    }

    /// See [`tap_host::Events::bind_interdomain`].
    pub(super) fn bind(self: &Rc<Self>, dom: DomId, remote: Port) -> Result<LinuxChannel, Errno> {
        let mut bind = BindInterdomain { dom: dom.0.into(), port: remote.0 };
        // SAFETY: the device is evtchn; the structure has no addresses.
        let port = unsafe { call(self.fd.get_ref(), &mut bind)? };
        let Ok(port) = u32::try_from(port) else { unreachable!("a negative port is an error") };
        Ok(LinuxChannel { device: Rc::clone(self), port: Port(port), channel: self.channel(port) })
    }

    fn channel(&self, port: u32) -> Rc<Channel> {
        let channel = Rc::new(Channel { gone: Cell::new(self.lost.get()), ..Channel::default() });
        self.channels.borrow_mut().insert(port, Rc::clone(&channel));
        channel
    }

    /// Reads events for all channels, forever.
    pub(super) async fn read_all(self: Rc<Self>, host: LinuxHost) {
        loop {
            let error = match self.fd.readable().await {
                Ok(mut ready) => match self.read() {
                    // Read until there is none: the kernel reports readiness only when its queue was empty before.
                    Ok(()) => continue,
                    Err(Errno::EAGAIN) => {
                        ready.clear_ready();
                        continue;
                    }
                    Err(error) => error,
                },
                Err(error) => errno(&error),
            };
            host.say(Level::Error, format_args!("events of guests can no longer be read: {error}"));
            self.lost.set(true);
            for channel in self.channels.borrow().values() {
                channel.gone.set(true);
                channel.waiter.wake();
            }
            return;
        }
    }

    fn read(&self) -> Result<(), Errno> {
        let mut bytes = [0; PORTS_AT_A_TIME * PORT_BYTES];
        match rustix::io::read(&self.fd, &mut bytes).map_err(of_rustix) {
            Ok(count) => {
                let channels = self.channels.borrow();
                for number in bytes[..count].as_chunks::<PORT_BYTES>().0 {
                    // A channel that was closed meanwhile is not in the map.
                    if let Some(channel) = channels.get(&u32::from_ne_bytes(*number)) {
                        channel.raise();
                    }
                }
                Ok(())
            }
            Err(Errno::EINTR) => Ok(()),
            // The queue overflowed and its content is lost: any channel may have had an event.
            Err(Errno::EFBIG) => {
                // SAFETY: the device is evtchn, which takes no argument here.
                unsafe { call(self.fd.get_ref(), &mut Reset)? };
                self.channels.borrow().values().for_each(|channel| channel.raise());
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

/// One end of an event channel; closed when dropped.
pub struct LinuxChannel {
    device: Rc<Evtchn>,
    port: Port,
    channel: Rc<Channel>,
}

impl LinuxChannel {
    /// Lets the next event through.
    fn unmask(&self) -> Result<(), Errno> {
        loop {
            match rustix::io::write(&self.device.fd, &self.port.0.to_ne_bytes()).map_err(of_rustix) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl EventChannel for LinuxChannel {
    fn notify(&self) {
        let mut notify = Notify { port: self.port.0 };
        // SAFETY: the device is evtchn; the structure has no addresses.
        let _swallowed = unsafe { call(self.device.fd.get_ref(), &mut notify) };
    }

    fn wait(&self) -> impl Future<Output = Result<(), Errno>> {
        poll_fn(|cx| {
            let channel = &self.channel;
            if channel.pending.take() {
                return Poll::Ready(Ok(()));
            }
            if channel.gone.get() || (channel.masked.take() && self.unmask().is_err()) {
                return Poll::Ready(Err(Errno::ESHUTDOWN));
            }
            channel.waiter.wait(cx.waker());
            Poll::Pending
        })
    }

    fn local_port(&self) -> Port {
        self.port
    }
}

impl Drop for LinuxChannel {
    fn drop(&mut self) {
        self.device.channels.borrow_mut().remove(&self.port.0);
        let mut unbind = Unbind { port: self.port.0 };
        // SAFETY: the device is evtchn; the structure has no addresses.
        let closed = unsafe { call(self.device.fd.get_ref(), &mut unbind) };
        assert!(closed.is_ok() || std::thread::panicking(), "failed to close our own port: {closed:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Options, run};
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_channel_that_is_bound_after_the_device_was_lost_is_as_deaf_as_those_before() {
        run(&Options::default(), |host| async move {
            let (fd, peer) = UnixStream::pair().unwrap();
            fd.set_nonblocking(true).unwrap();
            // A peer that disappears with unread data makes the next read fail, as a lost device does.
            (&fd).write_all(b"unread").unwrap();
            drop(peer);
            let device = Evtchn::new(fd.into()).unwrap();
            let before = device.channel(1);
            assert!(!before.gone.get());
            Rc::clone(&device).read_all(host).await;
            assert!(before.gone.get());
            assert!(device.channel(2).gone.get());
        })
        .unwrap();
    }
}
