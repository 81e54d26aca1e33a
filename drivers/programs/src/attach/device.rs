//! The kernel's device of a disk, and the task that serves it.

use super::record::Record;
use super::{AttachHost, BUSY_PATIENCE_NS, is_used};
use std::cell::Cell;
use std::rc::Rc;
use tap_core::wait::Event;
use tap_host::{Errno, NbdClaim, NbdConfig, NbdIndex, Patience, unless};
use tap_nbd::{Parted, Server};

tap_host::listed! {
    pub(super) BUGS: Bug;
    DEVICE_TAKEN_IN_USE = "device-taken-in-use",
        "tapdisk that is asked to stop takes its block device away although someone uses it";
    DEVICE_NOT_TAKEN_UP = "device-not-taken-up",
        "a block device whose stream breaks while tapdisk lives gets no new one";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    DEVICE_SERVED_AGAIN = "device-served-again", "a block device got a new stream while tapdisk lived";
    DEVICE_LEFT = "device-left", "tapdisk was asked to stop, and left its block device, which is in use";
    DEVICE_TAKEN = "device-taken", "tapdisk was asked to stop, and took its block device away";
}

/// Pause before a device gets a new stream, in nanoseconds: the kernel may not have noticed that the old one has ended.
const AGAIN_PAUSE_NS: u64 = 50_000_000;

/// How the service of a device has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ended {
    /// It is no longer there.
    Gone,
    /// It is there and has requests, for another process.
    Left,
    /// The same, because it cannot be had again.
    Lost(Errno),
}

/// A device and its server.
pub(super) struct Device<H: AttachHost> {
    host: H,
    server: Server<H>,
    record: Record<H>,
    config: NbdConfig,
    pub(super) index: NbdIndex,
    /// The device is to be left.
    leaving: Event,
    how: Cell<Option<Ended>>,
    ended: Event,
}

impl<H: AttachHost> Device<H> {
    /// Serves the device `index` over `stream`, in a task of its own.
    pub(super) fn serve(
        host: &H,
        server: Server<H>,
        record: Record<H>,
        config: NbdConfig,
        (index, stream): (NbdIndex, H::DeviceStream),
    ) -> Rc<Self> {
        let (leaving, how, ended) = (Event::new(), Cell::new(None), Event::new());
        let device = Self { host: host.clone(), server, record, config, index, leaving, how, ended };
        let device = Rc::new(device);
        let own = Rc::clone(&device);
        host.spawn("nbd-device", u64::from(index.0), async move {
            own.how.set(Some(own.transmit(stream).await));
            own.ended.set();
        });
        device
    }

    async fn transmit(&self, stream: H::DeviceStream) -> Ended {
        let mut next = Some(stream);
        while let Some(stream) = next {
            match self.server.transmit(stream).await {
                Parted::InOrder => return Ended::Gone,
                Parted::Stopped => return Ended::Left,
                // The kernel may end the stream before its disconnect was read.
                Parted::Broken if self.record.is_leaving() => return Ended::Gone,
                Parted::Broken => {}
            }
            match self.again().await {
                Ok(stream) => next = stream,
                // The kernel does not know it any more.
                Err(Errno::EINVAL) => return Ended::Gone,
                Err(error) => return Ended::Lost(error),
            }
        }
        Ended::Left
    }

    /// A new stream for the device, whose old one broke; `None` if the device is to be left.
    ///
    /// # Errors
    /// `EINVAL` if the device is gone; what the driver says.
    async fn again(&self) -> Result<Option<H::DeviceStream>, Errno> {
        if self.host.bug(&DEVICE_NOT_TAKEN_UP) {
            return Ok(None);
        }
        let mut patience = Patience::until();
        let until_ns = self.host.now_ns().saturating_add(BUSY_PATIENCE_NS);
        loop {
            if unless(self.leaving.wait(), self.host.sleep_ns(AGAIN_PAUSE_NS)).await.is_none() {
                return Ok(None);
            }
            if self.record.is_leaving() {
                return Err(Errno::EINVAL);
            }
            match self.host.reattach(self.index, &self.config).await {
                // Taken away meanwhile: whoever has it open would have it back.
                Ok(_) if self.record.is_leaving() => {
                    return self.host.detach(self.index).await.and(Err(Errno::EINVAL));
                }
                Ok(stream) => {
                    self.host.mark(&DEVICE_SERVED_AGAIN);
                    return Ok(Some(stream));
                }
                Err(Errno::EINVAL) => return Err(Errno::EINVAL),
                Err(error) if !patience.again_before(&self.host, until_ns).await => return Err(error),
                Err(_) => {}
            }
        }
    }

    /// Completes when the device is no longer served.
    pub(super) async fn ended(&self) -> Ended {
        self.ended.wait().await;
        self.how.get().unwrap_or(Ended::Left)
    }

    /// Ends the service: takes the device away if nobody uses it, and leaves it for another process otherwise.
    pub(super) async fn leave(&self) -> Ended {
        let claim = self.host.claim(self.index).await;
        let used = is_used(&self.host, self.index, &claim).await;
        if self.host.bug(&DEVICE_TAKEN_IN_USE) || !used && is_written(&claim).await {
            self.record.set_leaves(true);
            if self.host.detach(self.index).await.is_ok() {
                drop(claim);
                self.host.mark(&DEVICE_TAKEN);
                return self.ended().await;
            }
            self.record.set_leaves(false);
        }
        if used {
            self.host.mark(&DEVICE_LEFT);
        }
        self.leaving.set();
        self.server.stop().await;
        self.ended().await
    }

    /// The record, once the device is no longer served.
    pub(super) fn into_record(self: Rc<Self>) -> Option<Record<H>> {
        Rc::into_inner(self).map(|device| device.record)
    }
}

/// Whether a device that is claimed has nothing left to write.
async fn is_written<C: NbdClaim>(claim: &Result<C, Errno>) -> bool {
    match claim {
        Ok(claim) => claim.sync().await.is_ok(),
        Err(_) => false,
    }
}
