//! Unix and TCP stream sockets: listening, connecting, and sockets that the process was started with.
//!
//! Names are resolved on another thread. A unix path without a listener is taken over; a listener removes its path when
//! it ends, if it is still the same one.

mod dead;
mod peer;
mod stream;

pub use dead::remove_dead_sockets;
pub use stream::LinuxStream;

use crate::files::{blocking, errno, of_rustix};
use crate::watch::watch;
use crate::{Level, LinuxHost};
use rustix::fs::{FileType, FlockOperation, Mode, OFlags, fchmod, flock, lstat, stat};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, socket_with, sockopt,
};
use rustix::process::geteuid;
use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;
use tap_host::{Errno, Event, Listener, Log, SocketAddress, Sockets};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How long a connect waits before it tries again while the listener's queue is full; nothing signals when there is
/// room.
const QUEUE_FULL_RETRY: Duration = Duration::from_millis(5);
/// How often, and after which time each, to retry locking a directory that another process has locked.
const ALONE_TRIES: u32 = 200;
const ALONE_RETRY: Duration = Duration::from_millis(5);
/// The first descriptor that a service manager passes.
const LISTEN_FDS_START: RawFd = 3;

/// A listening socket.
pub struct LinuxListener {
    socket: AsyncFd<OwnedFd>,
    address: SocketAddress,
    /// Set if it is only for our user and root: where others are reported.
    private: Option<LinuxHost>,
    _path: Option<BoundPath>,
}

/// A path that we made, to be removed if it is still the same one.
struct BoundPath {
    path: String,
    device: u64,
    inode: u64,
}

impl BoundPath {
    fn of(path: &str) -> Result<Self, Errno> {
        let stat = lstat(path).map_err(of_rustix)?;
        Ok(Self { path: path.to_owned(), device: stat.st_dev, inode: stat.st_ino })
    }
}

impl Drop for BoundPath {
    fn drop(&mut self) {
        // A path that is gone already, or was taken over by another process, is not ours.
        if lstat(&self.path).is_ok_and(|s| (s.st_dev, s.st_ino) == (self.device, self.inode)) {
            let _removed = rustix::fs::unlink(&self.path);
        }
    }
}

impl LinuxListener {
    fn new(socket: OwnedFd, address: SocketAddress, path: Option<BoundPath>) -> Result<Self, Errno> {
        rustix::io::ioctl_fionbio(&socket, true).map_err(of_rustix)?;
        let socket = watch(socket, Interest::READABLE)?;
        Ok(Self { socket, address, private: None, _path: path })
    }

    async fn unix(path: &str, private: Option<LinuxHost>) -> Result<Self, Errno> {
        // Between checking that a path has no listener and removing it, and between a bind and its listen, another
        // server could start and lose its path.
        let _alone = Alone::at(path).await;
        let socket = match listen_unix(path, private.is_some()) {
            Err(Errno::EADDRINUSE) if is_stale(path) => {
                rustix::fs::unlink(path).map_err(of_rustix)?;
                listen_unix(path, private.is_some())?
            }
            Err(Errno::EADDRINUSE) if !is_socket(path) => return Err(Errno::ENOTSOCK),
            bound => bound?,
        };
        let bound = BoundPath::of(path)?;
        let listener = Self::new(socket, SocketAddress::Unix(path.to_owned()), Some(bound))?;
        Ok(Self { private, ..listener })
    }

    /// Whether the process at the other end of `socket` may connect.
    fn admits(&self, socket: &OwnedFd) -> bool {
        let Some(host) = &self.private else { return true };
        let user = peer::user_of(socket);
        let admitted = user.is_ok_and(|uid| uid == 0 || uid == geteuid().as_raw());
        if !admitted {
            host.log(Event::PeerRefused { uid: user.unwrap_or(u32::MAX) });
        }
        admitted
    }

    async fn tcp(host: &str, port: u16) -> Result<Self, Errno> {
        let mut last = Errno::EHOSTUNREACH;
        for address in resolve(host, port).await? {
            match TcpListener::bind(address).map_err(|e| errno(&e)) {
                Ok(listener) => {
                    let port = listener.local_addr().map_err(|e| errno(&e))?.port();
                    return Self::new(
                        listener.into(),
                        SocketAddress::Tcp { host: host.to_owned(), port },
                        None,
                    );
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// A socket that a service manager listens at for us.
    fn inherited(fd: RawFd) -> Result<Self, Errno> {
        // SAFETY: only the kernel uses the number, and it returns an error if it is not open.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        // If fewer sockets were passed than announced, the number may be one of our own descriptors by now: it is left
        // alone.
        if !sockopt::socket_acceptconn(borrowed).map_err(of_rustix)? {
            return Err(Errno::EINVAL);
        }
        // SAFETY: LISTEN_FDS and LISTEN_PID say that this descriptor is passed to this process, which takes it once.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC).map_err(of_rustix)?;
        let name = rustix::net::getsockname(&socket).map_err(of_rustix)?;
        let address = if name.address_family() == AddressFamily::UNIX {
            let unix = SocketAddrUnix::try_from(name).map_err(of_rustix)?;
            let path = unix.path_bytes().unwrap_or_default();
            SocketAddress::Unix(String::from_utf8_lossy(path).into_owned())
        } else {
            let ip = SocketAddr::try_from(name).map_err(of_rustix)?;
            SocketAddress::Tcp { host: ip.ip().to_string(), port: ip.port() }
        };
        Self::new(socket, address, None)
    }
}

/// Connections that may wait to be accepted; the kernel's own limit may be lower.
const BACKLOG: i32 = 4096;

/// A unix socket that listens at `path`, `private` for processes that may read and write what is our user's.
///
/// # Errors
/// As bind(2).
fn listen_unix(path: &str, private: bool) -> Result<OwnedFd, Errno> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(of_rustix)?;
    if private {
        // A path gets the mode that its socket has when it is bound, so that nobody can connect before.
        fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(of_rustix)?;
    }
    let address = SocketAddrUnix::new(path).map_err(of_rustix)?;
    rustix::net::bind(&socket, &address).map_err(of_rustix)?;
    rustix::net::listen(&socket, BACKLOG).map_err(of_rustix)?;
    Ok(socket)
}

/// A lock on a socket's directory, which every tapdisk takes before it begins to listen there.
struct Alone {
    _directory: Option<OwnedFd>,
}

impl Alone {
    /// Waits for its turn, for a limited time: others may have reasons of their own to lock a directory, and not every
    /// file system supports it.
    async fn at(path: &str) -> Self {
        let parent = Path::new(path).parent().filter(|parent| !parent.as_os_str().is_empty());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(parent.unwrap_or(Path::new(".")), flags, Mode::empty()).ok();
        for _ in 0..ALONE_TRIES {
            let Some(directory) = &directory else { break };
            match flock(directory, FlockOperation::NonBlockingLockExclusive) {
                Err(rustix::io::Errno::WOULDBLOCK) => tokio::time::sleep(ALONE_RETRY).await,
                _ => break,
            }
        }
        Self { _directory: directory }
    }
}

/// Whether `path` is a socket without a listener.
fn is_stale(path: &str) -> bool {
    is_socket(path) && try_connect_unix(path).is_err_and(|e| e == Errno::ECONNREFUSED)
}

/// Whether `path`, which may be a symbolic link, leads to a socket.
fn leads_to_socket(path: &str) -> bool {
    stat(path).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Socket)
}

/// Whether `path` itself is a socket.
fn is_socket(path: &str) -> bool {
    lstat(path).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Socket)
}

/// Connects to a unix socket; waits while the listener's queue is full.
///
/// # Errors
/// As connect(2).
pub(crate) async fn connect_unix(path: &str) -> Result<OwnedFd, Errno> {
    loop {
        match try_connect_unix(path) {
            Err(Errno::EAGAIN) => tokio::time::sleep(QUEUE_FULL_RETRY).await,
            connected => return connected,
        }
    }
}

/// Connects to a unix socket without waiting.
///
/// # Errors
/// As connect(2); `EAGAIN` while the listener's queue is full.
fn try_connect_unix(path: &str) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(of_rustix)?;
    let address = SocketAddrUnix::new(path).map_err(of_rustix)?;
    rustix::net::connect(&socket, &address).map_err(of_rustix)?;
    Ok(socket)
}

/// The addresses of a host.
///
/// # Errors
/// `EHOSTUNREACH` for an unknown name.
async fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, Errno> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    let host = host.to_owned();
    let look = move || (host.as_str(), port).to_socket_addrs().map_err(|_| Errno::EHOSTUNREACH);
    Ok(blocking(look).await?.collect())
}

async fn connect_tcp(host: &str, port: u16) -> Result<OwnedFd, Errno> {
    let mut last = Errno::EHOSTUNREACH;
    for address in resolve(host, port).await? {
        match tokio::net::TcpStream::connect(address).await.and_then(|s| s.into_std()) {
            Ok(stream) => return Ok(stream.into()),
            Err(error) => last = errno(&error),
        }
    }
    Err(last)
}

/// How many sockets a service manager has passed to this process.
pub(crate) fn passed_sockets() -> i32 {
    let number = |name| std::env::var(name).ok().and_then(|v| v.parse::<i32>().ok());
    let ours = number("LISTEN_PID") == Some(std::process::id().cast_signed());
    if ours { number("LISTEN_FDS").unwrap_or(0) } else { 0 }
}

impl Sockets for LinuxHost {
    type Listener = LinuxListener;
    type Stream = LinuxStream;

    async fn listen(&self, address: &SocketAddress) -> Result<LinuxListener, Errno> {
        match address {
            SocketAddress::Unix(path) => LinuxListener::unix(path, None).await,
            SocketAddress::Tcp { host, port } => LinuxListener::tcp(host, *port).await,
        }
    }

    async fn listen_private(&self, path: &str) -> Result<LinuxListener, Errno> {
        LinuxListener::unix(path, Some(self.clone())).await
    }

    async fn connect(&self, address: &SocketAddress) -> Result<LinuxStream, Errno> {
        let socket = match address {
            SocketAddress::Unix(path) => match connect_unix(path).await {
                Err(Errno::ECONNREFUSED) if !leads_to_socket(path) => return Err(Errno::ENOTSOCK),
                connected => connected?,
            },
            SocketAddress::Tcp { host, port } => connect_tcp(host, *port).await?,
        };
        LinuxStream::new(socket, matches!(address, SocketAddress::Tcp { .. }))
    }

    fn inherited(&self) -> Vec<LinuxListener> {
        if self.0.inherited.replace(true) {
            return Vec::new();
        }
        let end = LISTEN_FDS_START.saturating_add(passed_sockets());
        let mut listeners = Vec::new();
        for fd in LISTEN_FDS_START..end {
            match LinuxListener::inherited(fd) {
                Ok(listener) => listeners.push(listener),
                Err(error) => {
                    let text =
                        format_args!("descriptor {fd} of LISTEN_FDS is not a listening socket: {error}");
                    self.say(Level::Warning, text);
                }
            }
        }
        if !listeners.is_empty() {
            self.0.stop.with_parent();
        }
        listeners
    }
}

impl Listener for LinuxListener {
    type Stream = LinuxStream;

    async fn accept(&self) -> Result<LinuxStream, Errno> {
        loop {
            let mut ready = self.socket.readable().await.map_err(|e| errno(&e))?;
            match accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).map_err(of_rustix) {
                Ok(socket) if !self.admits(&socket) => {}
                Ok(socket) => {
                    return LinuxStream::new(socket, matches!(self.address, SocketAddress::Tcp { .. }));
                }
                Err(Errno::EAGAIN) => ready.clear_ready(),
                // A client that gave up before it was accepted is not an error of the listener.
                Err(Errno::EINTR | Errno::ECONNABORTED) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn address(&self) -> SocketAddress {
        self.address.clone()
    }
}
