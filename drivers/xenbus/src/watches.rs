//! What a back end watches in xenstore: both ends of its device.

use crate::config::{BackendError, XenHost};
use crate::patience::patiently;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;
use tap_host::{Errno, StorePath, Watcher};

/// Completes when one of `watches` has an event. The events of both are taken: the look that follows sees the causes of
/// both.
pub(crate) async fn changed<W: Watcher>([backend, frontend]: &[W; 2]) -> Result<(), Errno> {
    let (mut backend, mut frontend) = (pin!(backend.next()), pin!(frontend.next()));
    poll_fn(|cx| {
        let both = [backend.as_mut().poll(cx), frontend.as_mut().poll(cx)];
        both.into_iter()
            .find(Poll::is_ready)
            .map_or(Poll::Pending, |event| event.map(|event| event.map(drop)))
    })
    .await
}

pub(crate) async fn watch<H: XenHost>(host: &H, path: StorePath) -> Result<H::Watcher, BackendError> {
    let watching = patiently(host, async || host.watch(&path).await).await;
    watching.map_err(|error| BackendError::Store { what: "watch", path, error })
}
