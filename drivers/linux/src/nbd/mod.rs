//! Block devices of the kernel's nbd driver, by netlink.
//!
//! ```text
//!   connect, reconfigure, disconnect, status     netlink.rs     to the driver
//!   identifier, size, who uses it                sysfs.rs       from /sys and /proc
//!   requests of a device                         one end of a socket pair, of which the kernel has the other
//! ```
//!
//! The driver sends a request that was in flight when its server died again only when that request's timer fires, and
//! takes the server for dead if a request has a time limit and exceeds it. So the devices have no time limit, and a
//! short timer ([`LOOK_AGAIN_MS`]), at which the kernel only looks whether there is a new server.
//!
//! Every call here may wait for the device, which may be served by the calling thread: all are made on other threads.

mod netlink;
mod sysfs;

use crate::files::{blocking, errno, of_rustix};
use crate::sockets::LinuxStream;
use crate::{Level, LinuxHost};
use netlink::{Message, Netlink, attribute, attribute_of, attributes, command, u32_of};
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair, sockopt};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use sysfs::Shown;
use tap_host::{Errno, NbdClaim, NbdConfig, NbdDevice, NbdDevices, NbdIndex, SECTOR_BYTES};

/// After this time, in milliseconds, the kernel looks whether a request has to be sent again, and notes in its log that
/// it takes long.
const LOOK_AGAIN_MS: u32 = 5_000;
/// Room for some large requests and replies on their way, in bytes.
const SOCKET_BYTES: usize = 1 << 20;

/// Two ends of a stream: ours, and the kernel's.
fn pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(of_rustix)?;
    for end in [&pair.0, &pair.1] {
        // Less room only costs time.
        let _less = sockopt::set_socket_send_buffer_size_force(end, SOCKET_BYTES);
    }
    Ok(pair)
}

/// `message` with what both an attached and a reattached device have.
fn describe(message: Message, config: &NbdConfig, socket: &OwnedFd) -> Message {
    let fd = socket.as_raw_fd().cast_unsigned();
    let identifier = [config.identifier.as_bytes(), b"\0"].concat();
    message
        .with(attribute::SIZE_BYTES, &config.size_bytes.to_ne_bytes())
        .with(attribute::BLOCK_SIZE_BYTES, &SECTOR_BYTES.to_ne_bytes())
        .with(attribute::DEAD_CONNECTION_TIMEOUT, &u64::from(config.patience_s).to_ne_bytes())
        .with(attribute::BACKEND_IDENTIFIER, &identifier)
        .with_nested(attribute::SOCKETS, attribute::SOCKET_ITEM, attribute::SOCKET_FD, &fd.to_ne_bytes())
}

fn indices() -> Result<Vec<NbdIndex>, Errno> {
    let mut driver = Netlink::open()?;
    let reply = driver.call(driver.message(command::STATUS))?;
    let list = attribute_of(&reply, attribute::DEVICE_LIST).unwrap_or_default();
    let items = attributes(list).filter(|(kind, _)| *kind == attribute::DEVICE_ITEM);
    let index = |item: &[u8]| attribute_of(item, attribute::DEVICE_INDEX).and_then(u32_of);
    Ok(items.filter_map(|(_, item)| index(item)).map(NbdIndex).collect())
}

fn attached() -> Result<Vec<NbdDevice>, Errno> {
    let mut found: Vec<NbdDevice> = indices()?.into_iter().filter_map(|i| Shown::new().device(i)).collect();
    found.sort_unstable_by_key(|device| device.index);
    Ok(found)
}

fn attach(config: &NbdConfig, socket: &OwnedFd) -> Result<NbdIndex, Errno> {
    let mut driver = Netlink::open()?;
    let mut message = describe(driver.message(command::CONNECT), config, socket)
        .with(attribute::SERVER_FLAGS, &u64::from(config.flags).to_ne_bytes());
    if let Some(index) = config.index {
        message = message.with(attribute::INDEX, &index.0.to_ne_bytes());
    }
    let reply = driver.call(message)?;
    attribute_of(&reply, attribute::INDEX).and_then(u32_of).map(NbdIndex).ok_or(Errno::EPROTO)
}

fn reattach(index: NbdIndex, config: &NbdConfig, socket: &OwnedFd) -> Result<(), Errno> {
    // Before the first request on the new stream.
    limit_requests(index, config)?;
    let mut driver = Netlink::open()?;
    let message = describe(driver.message(command::RECONFIGURE), config, socket)
        .with(attribute::INDEX, &index.0.to_ne_bytes());
    driver.call(message).map(|_| ())
}

/// Has the kernel divide requests that are larger than the server takes. Requests that it has already made stay.
fn limit_requests(index: NbdIndex, config: &NbdConfig) -> Result<(), Errno> {
    let path = Shown::new().queue(index, "max_sectors_kb");
    let now = std::fs::read_to_string(&path).map_err(|error| errno(&error))?;
    let most = config.request_bytes >> 10;
    if now.trim_end().parse::<u32>().is_ok_and(|now| now <= most) {
        return Ok(());
    }
    std::fs::write(path, most.to_string()).map_err(|error| errno(&error))
}

fn detach(index: NbdIndex) -> Result<(), Errno> {
    let mut driver = Netlink::open()?;
    let message = driver.message(command::DISCONNECT).with(attribute::INDEX, &index.0.to_ne_bytes());
    driver.call(message).map(|_| ())
}

fn open(index: NbdIndex, flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | flags;
    rustix::fs::open(index.to_string(), flags, Mode::empty()).map_err(of_rustix)
}

/// A device that is held open for ourselves.
pub struct LinuxClaim(Option<Arc<OwnedFd>>);

impl NbdClaim for LinuxClaim {
    async fn sync(&self) -> Result<(), Errno> {
        let Some(fd) = self.0.clone() else { return Ok(()) };
        blocking(move || rustix::fs::fsync(&*fd).map_err(of_rustix)).await
    }
}

impl Drop for LinuxClaim {
    fn drop(&mut self) {
        // The last one who closes a device waits until it has written everything.
        let fd = self.0.take();
        drop(tokio::task::spawn_blocking(move || drop(fd)));
    }
}

impl NbdDevices for LinuxHost {
    type DeviceStream = LinuxStream;
    type Claim = LinuxClaim;

    async fn attached(&self) -> Result<Vec<NbdDevice>, Errno> {
        blocking(attached).await
    }

    async fn attach(&self, config: &NbdConfig) -> Result<(NbdIndex, LinuxStream), Errno> {
        let (own, kernels) = pair()?;
        let stream = LinuxStream::new(own, false)?;
        let config = config.clone();
        let (index, timer) = blocking(move || {
            let index = attach(&config, &kernels)?;
            let timer = std::fs::write(Shown::new().queue(index, "io_timeout"), LOOK_AGAIN_MS.to_string());
            if let Err(error) = limit_requests(index, &config) {
                detach(index)?;
                return Err(error);
            }
            Ok((index, timer.map_err(|error| errno(&error))))
        })
        .await?;
        if let Err(error) = timer {
            let text = format_args!(
                "failed to set io_timeout of {index}: {error}; after a restart requests in flight wait for half a minute"
            );
            self.say(Level::Warning, text);
        }
        Ok((index, stream))
    }

    async fn reattach(&self, index: NbdIndex, config: &NbdConfig) -> Result<LinuxStream, Errno> {
        let (own, kernels) = pair()?;
        let stream = LinuxStream::new(own, false)?;
        let config = config.clone();
        blocking(move || reattach(index, &config, &kernels)).await?;
        Ok(stream)
    }

    async fn detach(&self, index: NbdIndex) -> Result<(), Errno> {
        blocking(move || detach(index)).await
    }

    async fn look_for_partitions(&self, index: NbdIndex) -> Result<(), Errno> {
        blocking(move || open(index, OFlags::empty()).map(drop)).await
    }

    async fn claim(&self, index: NbdIndex) -> Result<LinuxClaim, Errno> {
        let fd = blocking(move || open(index, OFlags::EXCL)).await?;
        Ok(LinuxClaim(Some(Arc::new(fd))))
    }

    async fn users(&self, index: NbdIndex) -> Vec<String> {
        let own = std::process::id();
        let found = blocking(move || Ok(Shown::new().users(index, own))).await;
        // Fails only while the program ends.
        found.unwrap_or_default()
    }
}
