//! A disk that cannot be served, told to the toolstack in its own words.

use crate::config::{BackendEnd, BackendError, XenHost};
use crate::keys;
use crate::states::{self, Written};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;
use tap_abi::xenbus::XenbusState;
use tap_core::wait;
use tap_host::Watcher;

/// Says in the device's directory why its disk cannot be served (`hotplug-error`, which xl shows), and waits until the
/// toolstack has taken it away or `leave` is set. A device that a front end is connected to keeps its state: whoever
/// mends what is wrong can have it served again by another process.
///
/// # Errors
/// [`BackendError::Store`].
pub async fn refuse<H: XenHost>(
    host: &H,
    path: &str,
    why: &str,
    leave: &wait::Event,
) -> Result<BackendEnd, BackendError> {
    let watch = host.watch(path).await.map_err(|error| store("watch", path, error))?;
    let mut told = false;
    loop {
        let Some(state) = keys::state(host, path).await? else { return Ok(BackendEnd::BackendGone) };
        let online = keys::read(host, path, "online").await?;
        let offline = online.is_some_and(|value| keys::number(&value) == Some(0));
        match state {
            // xl runs its script in state 2 and not before; the script finds the reason and fails.
            XenbusState::Initialising if !told => {
                let keys = [("hotplug-error", why.to_owned())];
                let written = states::write(host, path, state, XenbusState::InitWait, &keys).await?;
                told = written == Written::Yes;
            }
            XenbusState::Closing if offline => {
                states::write(host, path, state, XenbusState::Closed, &[]).await?;
            }
            XenbusState::Closed if offline => return Ok(BackendEnd::Offline),
            _ if leave.is_set() => return Ok(BackendEnd::Left),
            _ => wait_for_either(&watch, leave).await.map_err(|error| store("watch", path, error))?,
        }
    }
}

fn store(what: &'static str, path: &str, error: tap_host::Errno) -> BackendError {
    BackendError::Store { what, path: path.to_owned(), error }
}

/// Completes when a watch fires or `leave` is set.
async fn wait_for_either(watch: &impl Watcher, leave: &wait::Event) -> Result<(), tap_host::Errno> {
    let (mut changed, mut left) = (pin!(watch.next()), pin!(leave.wait()));
    poll_fn(|cx| {
        if let Poll::Ready(event) = changed.as_mut().poll(cx) {
            return Poll::Ready(event.map(drop));
        }
        left.as_mut().poll(cx).map(Ok)
    })
    .await
}
