//! Serves one disk that a toolstack assigned to us, from opening its image to its end, and retries whatever fails.
//!
//! ```text
//!   open the image ──► Backend::run ──► its end
//!        │ cannot           │ ring not taken
//!        ▼                  ▼
//!   state 1: say why in hotplug-error, state 2; the toolstack takes it away
//!   a guest has it: change nothing, try again later
//! ```

use crate::config::{BackendConfig, BackendEnd, BackendError, XenHost};
use crate::disk::ServedDisk;
use crate::keys;
use crate::lock::{Lock, is_over};
use crate::machine::Backend;
use crate::patience::patiently;
use crate::states::{self, Written};
use std::future::{Future, pending};
use std::rc::Rc;
use tap_abi::xenbus::XenbusState;
use tap_core::wait;
use tap_host::{Either, Tried, Watcher, select};

tap_host::listed! {
    pub(super) BUGS: Bug;
    PAUSE_STAYS = "pause-stays", "the pause between two attempts to serve a disk does not grow";
    REFUSAL_UNTOLD = "refusal-untold", "a disk that cannot be served is neither refused nor served";
    PAUSE_UNHEARD = "pause-unheard", "the end of a pause is noticed only when something else happens";
}

/// First pause before another attempt, in nanoseconds; each further one is twice as long, up to [`PAUSE_MAX_NS`].
const PAUSE_NS: u64 = 1_000_000_000;
/// Longest pause between two attempts.
const PAUSE_MAX_NS: u64 = 30_000_000_000;

/// Drives a disk to its end. `open` opens its image, and returns what is wrong with it if that fails; `tell` is
/// called with each reason why the disk is not served. `release` is as [`ServedDisk::release`], for a device that ends
/// without having been served.
///
/// A new device is refused then: `hotplug-error` has the reason, which xl shows when its script fails. A device that a
/// guest is connected to is tried again until it works, because the operator expects it to recover by itself: its image
/// may be on a server that is unreachable, or another process may be serving it.
///
/// # Errors
/// Those of [`BackendError`] that have nothing to do with this disk.
pub async fn lead<H: XenHost, D: ServedDisk<H>, F: Future<Output = Result<D, String>>>(
    host: &H,
    config: &BackendConfig,
    leave: &Rc<wait::Event>,
    open: impl Fn() -> F,
    tell: impl Fn(&str),
    release: impl AsyncFn(),
) -> Result<BackendEnd, BackendError> {
    let mut pause_ns = PAUSE_NS;
    let mut told = String::new();
    let mut lock = None;
    let end = loop {
        // Before the image is opened: what is read of an image that another process writes is soon wrong.
        let mut why = None;
        if lock.as_ref().is_none_or(Lock::is_given_up) {
            lock = None;
            match Lock::take(host, config, config.bind_patience_ns).await {
                Ok(taken) => lock = Some(taken),
                Err(error) => {
                    why = Some(error.error(config).to_string());
                }
            }
        }
        let why = match (why, &lock) {
            (None, Some(lock)) => match open().await {
                Ok(disk) => {
                    match Backend::run_owned(host.clone(), config.clone(), lock, disk, Rc::clone(leave)).await
                    {
                        Err(error) if passes(&error) => error.to_string(),
                        end => break end,
                    }
                }
                Err(why) => why,
            },
            (why, _) => why.unwrap_or_default(),
        };
        if why != told {
            tell(&why);
            told.clone_from(&why);
        }
        // A process without the lock writes nothing, whatever the reason.
        let leads = lock.as_ref().is_some_and(|lock| !lock.is_given_up());
        let refusal = (leads && !host.bug(&REFUSAL_UNTOLD)).then(|| format!("failed to {why}"));
        match stand_by(host, config, refusal.as_deref(), pause_ns, leave, &release).await {
            Ok(Some(end)) => {
                let end = Ok(end);
                if leads && is_over(&end) {
                    release().await;
                }
                break end;
            }
            Ok(None) => {}
            // Xenstore cannot be read at the moment, and nothing is urgent.
            Err(error) if passes(&error) && !leave.is_set() => host.sleep_ns(pause_ns).await,
            Err(error) => break Err(error),
        }
        if !host.bug(&PAUSE_STAYS) {
            pause_ns = (pause_ns * 2).min(PAUSE_MAX_NS);
        }
    };
    if let Some(lock) = lock {
        lock.give_up(host, &end);
    }
    end
}

/// Whether another attempt may succeed.
fn passes(error: &BackendError) -> bool {
    match error.first() {
        BackendError::NotTaken { .. } | BackendError::NotOurs { .. } => true,
        BackendError::Store { error, .. } => Tried::Store.may_pass(*error),
        _ => false,
    }
}

/// Waits for the end of a device that is not served or, if a guest is connected to it, for a pause. A new device is
/// refused with the reason `why`; without one, another process drives the device, and nothing is written.
async fn stand_by<H: XenHost>(
    host: &H,
    config: &BackendConfig,
    why: Option<&str>,
    pause_ns: u64,
    leave: &wait::Event,
    release: &impl AsyncFn(),
) -> Result<Option<BackendEnd>, BackendError> {
    let path = &config.backend_path;
    let failed = |error| BackendError::Store { what: "watch", path: path.clone(), error };
    let watch = patiently(host, async || host.watch(path).await).await.map_err(failed)?;
    let until_ns = host.now_ns().saturating_add(pause_ns);
    let (mut refused, mut is_known) = (false, false);
    loop {
        // The state is read last: a device that is gone by then was not offline either.
        let offline = keys::is_offline(keys::read(host, path, "online").await?.as_deref());
        let Some(state) = keys::state(host, path).await? else { return Ok(Some(BackendEnd::BackendGone)) };
        is_known |= state != XenbusState::Initialising;
        match state {
            // Another device in the same directory: what is wrong with the first says nothing about it. The answer to
            // the first may have been written although that seemed to fail.
            XenbusState::Initialising if is_known => return Ok(Some(BackendEnd::BackendGone)),
            XenbusState::Initialising if let Some(why) = why => {
                is_known = true;
                // xl runs its script in state 2 and not before; the script finds the reason and fails.
                let keys = [("hotplug-error", why.to_owned())];
                refused =
                    states::write(host, path, state, XenbusState::InitWait, &keys).await? == Written::Yes;
            }
            XenbusState::Closed if offline => return Ok(Some(BackendEnd::Offline)),
            XenbusState::Closing
                if why.is_some() && offline && (refused || !is_in_use(host, path).await?) =>
            {
                release().await;
                states::write(host, path, state, XenbusState::Closed, &[]).await?;
            }
            _ if leave.is_set() => return Ok(Some(BackendEnd::Left)),
            _ if !refused && host.now_ns() >= until_ns => return Ok(None),
            _ => wait_for_any(host, &watch, leave, until_ns, refused).await.map_err(failed)?,
        }
    }
}

/// Whether a front end has, or may have, a ring there.
async fn is_in_use<H: XenHost>(host: &H, path: &str) -> Result<bool, BackendError> {
    let Some(frontend) = keys::read(host, path, "frontend").await? else { return Ok(false) };
    let state = keys::state(host, &String::from_utf8_lossy(&frontend)).await?;
    Ok(matches!(state, Some(XenbusState::Initialised | XenbusState::Connected | XenbusState::Closing)))
}

/// Completes when a watch fires, `leave` is set, or (unless `for_good`) the pause is over.
async fn wait_for_any<H: XenHost>(
    host: &H,
    watch: &impl Watcher,
    leave: &wait::Event,
    until_ns: u64,
    for_good: bool,
) -> Result<(), tap_host::Errno> {
    let pause_ns = until_ns.saturating_sub(host.now_ns());
    let over = async {
        if for_good || host.bug(&PAUSE_UNHEARD) { pending().await } else { host.sleep_ns(pause_ns).await }
    };
    match select(watch.next(), select(over, leave.wait())).await {
        Either::First(event) => event.map(drop),
        Either::Second(_) => Ok(()),
    }
}
