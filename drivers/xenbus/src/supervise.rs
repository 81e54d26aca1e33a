//! All disks that a toolstack assigns to us, as they come and go.
//!
//! ```text
//!   ROOT/DOM/VBD  with our script in it ──► Device ──► a task that serves it ──► its end
//!        ▲                                                                        │
//!        └───────── state 1: the next life of a directory ◄───────────────────────┘
//! ```
//!
//! A device is served once per life of its directory: a life begins when a toolstack makes it (state 1), or when we
//! start and find it. The toolstack also names the image (`params`); guests cannot write there.

use crate::config::{BackendError, XenHost};
use crate::keys;
use crate::orphans::{remove_orphan, remove_orphans};
use crate::patience::patiently;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use tap_abi::xenbus::XenbusState;
use tap_core::wait;
use tap_host::{DomId, Either, Errno, StorePath, Transaction, VbdId, Watcher, select};

tap_host::listed! {
    pub(super) BUGS: Bug;
    LEFT_UNWATCHED = "left-unwatched",
        "what is left of a device stays if the device goes away before the next process has begun to serve it";
    FOREIGN_ENDS_LOOK = "foreign-ends-look",
        "the search for disks ends at the first one that another program serves";
    SERVED_AGAIN = "served-again",
        "a device whose serving has ended is served again while its directory is there";
}

/// Longest `params` in bytes; no path is longer.
const MAX_PARAMS_BYTES: usize = 4096;

/// A disk that a toolstack wants served.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Device {
    /// The guest.
    pub dom: DomId,
    /// The disk's number.
    pub vbd: VbdId,
    /// The back end's directory.
    pub path: StorePath,
    /// What the toolstack says about the image; any text.
    pub params: String,
}

/// Which devices are served.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceFilter {
    /// The directory with all back ends of a type: `/local/domain/0/backend/vbd`.
    pub root: StorePath,
    /// The file name of the script that marks ours; without one, all are.
    pub script: Option<String>,
    /// Prefix of the names of in-flight records: those named `records-DOMAIN-VBD` of devices that are gone are removed.
    pub records: &'static str,
}

type Id = (DomId, VbdId);

#[derive(Default)]
struct TaskSet {
    running: RefCell<BTreeSet<Id>>,
    /// Tasks that ended and whose devices were not examined since.
    ended: RefCell<BTreeSet<Id>>,
    bell: wait::Event,
}

/// What to examine again.
enum Wakeup {
    Everything,
    These(BTreeSet<Id>),
    Leave,
}

/// Runs `serve` in a task of its own for every device of `filter`, until `leave` is set and all of them have ended.
/// `serve` must take its device out of state 1 or end when the device is gone: if it ends and leaves the device in
/// state 1, it is run again.
///
/// # Errors
/// [`BackendError::Store`]; the tasks continue then.
pub async fn supervise<H: XenHost, F: Future<Output = ()> + 'static>(
    host: &H,
    filter: &DeviceFilter,
    leave: &wait::Event,
    serve: impl Fn(Device) -> F,
) -> Result<(), BackendError> {
    let root = &filter.root;
    let watch_failed = |error| BackendError::Store { what: "watch", path: root.clone(), error };
    let watch = patiently(host, async || host.watch(root).await).await.map_err(watch_failed)?;
    // Of devices that are there, and that nobody may ever serve again.
    let mut left = remove_orphans(host, root, filter.records).await?;
    let tasks = Rc::<TaskSet>::default();
    let mut lived = BTreeSet::new();
    loop {
        let ids = match next_wakeup(&watch, &tasks, leave, root).await.map_err(watch_failed)? {
            Wakeup::Everything => {
                let mut ids = all(host, root).await?;
                lived.retain(|id| ids.contains(id));
                ids.extend(&left);
                ids
            }
            Wakeup::These(ids) => ids,
            Wakeup::Leave => break,
        };
        for id in ids {
            let found = look(host, filter, id).await?;
            if found.is_none() {
                lived.remove(&id);
                if left.contains(&id)
                    && !host.bug(&LEFT_UNWATCHED)
                    && remove_orphan(host, root, filter.records, id).await?
                {
                    left.remove(&id);
                }
                if host.bug(&FOREIGN_ENDS_LOOK) {
                    break;
                }
            }
            // A running task watches its own device; we are notified when it ends.
            let Some((device, state)) = found.filter(|_| !tasks.running.borrow().contains(&id)) else {
                continue;
            };
            if state == XenbusState::Initialising || lived.insert(id) || host.bug(&SERVED_AGAIN) {
                lived.insert(id);
                left.remove(&id);
                start(host, &tasks, id, serve(device));
            }
        }
    }
    while !tasks.running.borrow().is_empty() {
        tasks.bell.clear();
        tasks.bell.wait().await;
    }
    Ok(())
}

fn start<H: XenHost>(host: &H, tasks: &Rc<TaskSet>, id: Id, serving: impl Future<Output = ()> + 'static) {
    tasks.running.borrow_mut().insert(id);
    let tasks = Rc::clone(tasks);
    let key = u64::from(id.0.0) << 32 | u64::from(id.1.0);
    host.spawn("vbd", key, async move {
        serving.await;
        tasks.running.borrow_mut().remove(&id);
        tasks.ended.borrow_mut().insert(id);
        tasks.bell.set();
    });
}

async fn next_wakeup(
    watch: &impl Watcher,
    tasks: &TaskSet,
    leave: &wait::Event,
    root: &str,
) -> Result<Wakeup, Errno> {
    match select(leave.wait(), select(tasks.bell.wait(), watch.next())).await {
        Either::First(()) => Ok(Wakeup::Leave),
        Either::Second(Either::First(())) => {
            tasks.bell.clear();
            Ok(Wakeup::These(tasks.ended.take()))
        }
        Either::Second(Either::Second(event)) => event.map(|event| of_path(&event.path, root)),
    }
}

/// What a change at `path` affects.
fn of_path(path: &str, root: &str) -> Wakeup {
    let Some(below) = path.strip_prefix(root).and_then(|rest| rest.strip_prefix('/')) else {
        return Wakeup::Everything;
    };
    let mut parts = below.split('/');
    let (dom, vbd, key) = (parts.next(), parts.next(), parts.next());
    match (dom.and_then(parse_dom), vbd.map(parse_vbd)) {
        // A whole domain.
        (_, None) => Wakeup::Everything,
        (Some(dom), Some(Some(vbd))) if key.is_none_or(|key| KEYS.contains(&key)) => {
            Wakeup::These(BTreeSet::from([(dom, vbd)]))
        }
        // Another key, or no device.
        _ => Wakeup::These(BTreeSet::new()),
    }
}

/// The keys that identify a device.
const KEYS: [&str; 4] = ["script", "frontend", "online", "state"];

fn parse_dom(name: &str) -> Option<DomId> {
    let number = keys::number(name.as_bytes())?;
    Some(DomId(u16::try_from(number).ok()?))
}

fn parse_vbd(name: &str) -> Option<VbdId> {
    keys::number(name.as_bytes()).map(VbdId)
}

/// All directories that may be devices.
async fn all<H: XenHost>(host: &H, root: &str) -> Result<BTreeSet<Id>, BackendError> {
    let mut ids = BTreeSet::new();
    for dom in keys::names(host, root).await? {
        let Some(id) = parse_dom(&dom) else { continue };
        let vbds = keys::names(host, &format!("{root}/{dom}")).await?;
        ids.extend(vbds.iter().filter_map(|vbd| Some((id, parse_vbd(vbd)?))));
    }
    Ok(ids)
}

/// The device `id` with its state, if it is ours and not already removed. All keys are read in one transaction: the
/// device may be removed and made again meanwhile.
async fn look<H: XenHost>(
    host: &H,
    filter: &DeviceFilter,
    id: Id,
) -> Result<Option<(Device, XenbusState)>, BackendError> {
    let path = format!("{}/{}/{}", filter.root, id.0.0, id.1.0);
    loop {
        let seen = async || {
            let tx = host.transaction().await?;
            let found = look_in(&tx, filter, id, &path).await?;
            tx.commit().await?;
            Ok(found)
        };
        match patiently(host, seen).await {
            Err(Errno::EAGAIN) => {}
            result => return result.map_err(|error| BackendError::Store { what: "read", path, error }),
        }
    }
}

async fn look_in(
    tx: &impl Transaction,
    filter: &DeviceFilter,
    (dom, vbd): Id,
    path: &str,
) -> Result<Option<(Device, XenbusState)>, Errno> {
    let read = async |key: &str, most| keys::known(tx.read(&format!("{path}/{key}")).await, most);
    let short = keys::MAX_VALUE_BYTES;
    let Some(state) = read("state", short).await? else { return Ok(None) };
    let marked = match &filter.script {
        Some(ours) => {
            let script = read("script", short).await?;
            script.is_some_and(|script| script.rsplit(|byte| *byte == b'/').next() == Some(ours.as_bytes()))
        }
        None => true,
    };
    // Without the key `frontend` the directory is incomplete; the key's arrival fires the watch.
    if !marked || read("frontend", short).await?.is_none() {
        return Ok(None);
    }
    let state = keys::state_of(&state);
    let offline = keys::is_offline(read("online", short).await?.as_deref());
    if offline && state == XenbusState::Closed {
        return Ok(None);
    }
    let params = read("params", MAX_PARAMS_BYTES).await?.unwrap_or_default();
    let params = String::from_utf8_lossy(&params).into_owned();
    let device = Device { dom, vbd, path: path.to_owned(), params };
    Ok(Some((device, state)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_change_is_news_of() {
        let root = "/local/domain/0/backend/vbd";
        let one = |path: &str| match of_path(&format!("{root}{path}"), root) {
            Wakeup::Everything => None,
            Wakeup::These(ids) => Some(ids.into_iter().map(|(dom, vbd)| (dom.0, vbd.0)).collect::<Vec<_>>()),
            Wakeup::Leave => unreachable!(),
        };
        for everything in ["", "/3", "x", "/nonsense"] {
            assert_eq!(one(everything), None, "{everything}");
        }
        for device in ["/3/51712", "/3/51712/state", "/3/51712/online"] {
            assert_eq!(one(device), Some(vec![(3, 51712)]), "{device}");
        }
        for nothing in ["/3/51712/sectors", "/3/x", "/70000/51712", "/-1/51712/state", "/3/99999999999"] {
            assert_eq!(one(nothing), Some(vec![]), "{nothing}");
        }
    }
}
