//! The machine: look, decide by the rules, act, wait.

mod rings;

use crate::config::{BackendConfig, BackendEnd, BackendError, Hotplug, XenHost};
use crate::disk::{DiskSize, ServedDisk, Serving};
use crate::features::Features;
use crate::keys;
use crate::lock::{Lock, is_over};
use crate::pace::Pace;
use crate::rules::{Action, Phase, Seen, Start, next, ring_may_be_used, start};
use crate::states::{self, Keys, Written};
use crate::watches::{changed, watch};
use std::cell::Cell;
use std::future::{Future, pending};
use std::pin::pin;
use std::rc::Rc;
use tap_abi::xenbus::XenbusState;
use tap_core::wait;
use tap_host::{Either, Errno, Event, StorePath, Watcher, select};
use tap_ring::RingEnd;

tap_host::listed! {
    pub(super) BUGS: Bug with [rings::BUGS];
    GONE_NOT_CLOSED = "gone-not-closed",
        "a back end whose front end is gone ends without closing its own end";
    CLOSE_ERROR_FIRST = "close-error-first",
        "the error of closing a disk replaces the error that ended its back end";
    GONE_NOT_SEEN = "gone-not-seen",
        "a front end that vanishes while its ring is taken over counts as a ring that cannot be served";
    SERVED_RING_CLOSED = "served-ring-closed",
        "a ring that another process serves is taken as broken, and its front end is told to close";
    PACE_IGNORED = "pace-ignored", "a front end that reconnects in a loop is never slowed down";
}

tap_host::listed! {
    pub(super) MARKS: Mark with [rings::MARKS];
}

/// How long a toolstack may take to remove what belonged to a domain that is gone, in nanoseconds.
const GONE_PATIENCE_NS: u64 = 1_000_000_000;
/// How often a disk is asked for whose server is away, in nanoseconds.
const AWAY_PAUSE_NS: u64 = 500_000_000;

/// The back end of one disk. See [`Backend::run`].
pub struct Backend<H: XenHost, D> {
    host: H,
    config: BackendConfig,
    features: Features,
    disk: D,
    leave: Rc<wait::Event>,
    frontend: StorePath,
    /// It was there.
    frontend_known: Cell<bool>,
    /// The disk knows that it is named.
    appeared: Cell<bool>,
    watches: [H::Watcher; 2],
    phase: Phase,
    /// What we wrote last, or found.
    state: XenbusState,
    ring: Option<Serving>,
    /// That of the ring's disk.
    size: DiskSize,
    connects: u32,
    pace: Pace,
}

impl<H: XenHost, D: ServedDisk<H>> Backend<H, D> {
    /// Drives the disk through its life until it ends, or until `leave` is set; then the ring is drained and unmapped
    /// and the disk is closed, before a toolstack that waits for that is told. `open` is called once the disk is ours:
    /// what is read of an image while another process writes it is soon wrong.
    ///
    /// # Errors
    /// See [`BackendError`]; [`BackendError::NotTaken`] if another process drives the disk and continues to,
    /// [`BackendError::Open`] with the error of `open`. A front end's mistake is not an error here: it is reported
    /// in xenstore and the device is closed.
    pub async fn run<F: Future<Output = Result<D, String>>>(
        host: H,
        config: BackendConfig,
        open: impl FnOnce() -> F,
        leave: Rc<wait::Event>,
    ) -> Result<BackendEnd, BackendError> {
        let lock = Lock::take(&host, &config, config.bind_patience_ns).await;
        let lock = lock.map_err(|why| why.error(&config))?;
        let disk = open().await.map_err(|why| BackendError::Open { why })?;
        let end = Self::run_owned(host.clone(), config, &lock, disk, leave).await;
        if matches!(end, Err(BackendError::NotOurs { .. })) {
            lock.forget(&host);
        }
        end
    }

    /// As [`Backend::run`], for a disk whose lock the caller holds.
    pub(crate) async fn run_owned(
        host: H,
        config: BackendConfig,
        lock: &Lock<H>,
        disk: D,
        leave: Rc<wait::Event>,
    ) -> Result<BackendEnd, BackendError> {
        let path = config.backend_path.clone();
        let mut backend = match Self::find(host.clone(), config, disk, leave).await {
            Ok(backend) => backend,
            Err((end, disk)) => {
                let closed = disk.close(is_over(&end)).await;
                lock.give_up(&host, &end);
                return with_close(end, closed, path, false);
            }
        };
        let end = backend.live().await;
        // After an error we do not know what will become of the disk: proceed as if we had been asked to leave.
        backend.release_ring(!is_over(&end)).await;
        let closed = backend.disk.close(is_over(&end)).await;
        lock.give_up(&host, &end);
        let said = backend.publish_closed(end.as_ref().ok()).await;
        if let Err(error) = closed
            && backend.host.bug(&CLOSE_ERROR_FIRST)
        {
            return Err(BackendError::Close { path, error });
        }
        with_close(end.and_then(|end| said.map(|()| end)), closed, path, backend.connects > 0)
    }

    /// The back end of a disk whose directory exists; otherwise the reason to end, and the disk.
    async fn find(
        host: H,
        config: BackendConfig,
        disk: D,
        leave: Rc<wait::Event>,
    ) -> Result<Self, (Result<BackendEnd, BackendError>, D)> {
        let found = async {
            let Some(frontend) = find_frontend(&host, &config).await.map_err(Err)? else {
                return Err(Ok(BackendEnd::BackendGone));
            };
            let watches = [
                watch(&host, config.backend_path.clone()).await.map_err(Err)?,
                watch(&host, format!("{frontend}/state")).await.map_err(Err)?,
            ];
            Ok((frontend, watches))
        };
        let (frontend, watches) = match found.await {
            Ok(found) => found,
            Err(end) => return Err((end, disk)),
        };
        Ok(Self {
            host,
            features: Features::of(&config),
            config,
            disk,
            leave,
            frontend,
            frontend_known: Cell::new(false),
            appeared: Cell::new(false),
            watches,
            phase: Phase::Waiting,
            state: XenbusState::Unknown,
            ring: None,
            size: DiskSize::new(0),
            connects: 0,
            pace: Pace::default(),
        })
    }

    /// A toolstack that removes a disk, forcibly or not, waits for state 6 and may then do anything with the image.
    async fn publish_closed(&mut self, end: Option<&BackendEnd>) -> Result<(), BackendError> {
        let waited_for = match end {
            Some(BackendEnd::Offline) => true,
            Some(BackendEnd::FrontendGone) => !self.host.bug(&GONE_NOT_CLOSED),
            Some(BackendEnd::BackendGone | BackendEnd::Left) | None => false,
        };
        if !waited_for {
            return Ok(());
        }
        let state = keys::state(&self.host, &self.config.backend_path).await?;
        if state.is_some_and(|state| state != XenbusState::Closed) {
            self.write_state(XenbusState::Closed, &[]).await?;
        }
        Ok(())
    }

    async fn live(&mut self) -> Result<BackendEnd, BackendError> {
        let seen = self.look().await?;
        self.state = seen.backend.unwrap_or(XenbusState::Unknown);
        // Nothing is promised yet: to leave need not wait for it.
        if !ring_may_be_used(&seen)
            && matches!(select(self.disk.release(), self.leave.wait()).await, Either::Second(()))
        {
            return Ok(BackendEnd::Left);
        }
        match start(&seen) {
            Start::Offer if seen.backend.is_some() => self.offer().await?,
            Start::Offer => {}
            Start::Resume => match self.resume().await? {
                Err(why) if self.host.bug(&SERVED_RING_CLOSED) => self.fail(&why).await?,
                Err(why) => return self.not_taken(why).await,
                Ok(()) => {}
            },
            Start::In(phase) => self.phase = phase,
        }
        loop {
            let seen = self.look().await?;
            match next(self.phase, &seen) {
                Action::Wait => {
                    if seen.hotplugged && !self.appeared.replace(true) {
                        self.disk.appeared().await;
                    }
                    self.wait(&seen).await?;
                }
                Action::Offer if self.pace.wait_ns(&self.host) > 0 && !self.host.bug(&PACE_IGNORED) => {
                    self.hold_back().await?;
                }
                Action::Offer => self.offer().await?,
                Action::Connect => self.connect().await?,
                Action::Grow => self.publish_size().await?,
                Action::Echo => {
                    self.write_state(XenbusState::Closing, &[]).await?;
                }
                Action::Drain => self.drain(),
                Action::Leave => self.leave_ring(),
                Action::Close => self.close().await?,
                Action::End(end) => return Ok(end),
            }
        }
    }

    /// The ring of a predecessor cannot be taken over. If one end has disappeared meanwhile, or does so soon, that is
    /// the reason, and it ends the device: a domain that is destroyed loses its memory before a toolstack removes its
    /// ends.
    async fn not_taken(&self, why: String) -> Result<BackendEnd, BackendError> {
        let mut patience = pin!(self.host.sleep_ns(GONE_PATIENCE_NS));
        loop {
            let seen = self.look().await?;
            match next(Phase::Serving, &seen) {
                Action::End(end) if !self.host.bug(&GONE_NOT_SEEN) => return Ok(end),
                _ if seen.leave => break,
                _ => {}
            }
            let over = select(patience.as_mut(), self.leave.wait());
            match select(over, changed(&self.watches)).await {
                Either::First(_) => break,
                Either::Second(event) => event.map_err(|error| self.watch_failed(error))?,
            }
        }
        Err(BackendError::NotTaken { path: self.config.backend_path.clone(), why })
    }

    async fn look(&self) -> Result<Seen, BackendError> {
        let dir = &self.config.backend_path;
        let online = keys::read(&self.host, dir, "online").await?;
        let hotplugged = match self.config.hotplug {
            Hotplug::Wait => {
                keys::read(&self.host, dir, "hotplug-status").await?.as_deref() == Some(b"connected")
            }
            Hotplug::Ignore | Hotplug::Write => true,
        };
        let (backend, frontend) =
            (keys::state(&self.host, dir).await?, keys::state(&self.host, &self.frontend).await?);
        self.frontend_known.set(self.frontend_known.get() || frontend.is_some());
        Ok(Seen {
            backend,
            frontend,
            frontend_known: self.frontend_known.get(),
            online: !keys::is_offline(online.as_deref()),
            hotplugged,
            leave: self.leave.is_set(),
            grown: self.size.untold_sectors().is_some(),
        })
    }

    /// Waits until something may have changed.
    async fn wait(&mut self, seen: &Seen) -> Result<(), BackendError> {
        match self.change(seen).await? {
            Some(end) => self.ring_ended(end).await,
            None => Ok(()),
        }
    }

    /// Completes when a watch fires, we are asked to leave, the ring ended, or its disk has become larger.
    async fn change(&mut self, seen: &Seen) -> Result<Option<RingEnd>, BackendError> {
        let leave = async { if seen.leave { pending().await } else { self.leave.wait().await } };
        let grown = async { if seen.grown { pending().await } else { self.size.untold().await } };
        let ring = self.ring.as_mut();
        let ended = async {
            match ring {
                // A ring's task ends without saying so only together with us.
                Some(Serving { ended, .. }) => ended.await.unwrap_or(RingEnd::Left),
                None => pending().await,
            }
        };
        let changed = match select(ended, select(changed(&self.watches), select(leave, grown))).await {
            Either::First(end) => return Ok(Some(end)),
            Either::Second(Either::First(changed)) => changed,
            Either::Second(Either::Second(_)) => Ok(()),
        };
        changed.map(|()| None).map_err(|error| self.watch_failed(error))
    }

    /// Delays a front end that reconnects too often. What it does meanwhile is examined afterwards; a toolstack and a
    /// request to leave need not wait.
    async fn hold_back(&self) -> Result<(), BackendError> {
        let pause = self.host.sleep_ns(self.pace.wait_ns(&self.host));
        match select(select(pause, self.leave.wait()), self.watches[0].next()).await {
            Either::First(_) => Ok(()),
            Either::Second(event) => event.map(drop).map_err(|error| self.watch_failed(error)),
        }
    }

    /// Waits a while for whoever serves the disk; whatever else happens comes first.
    async fn pause(&self) -> Result<(), BackendError> {
        let pause = select(self.host.sleep_ns(AWAY_PAUSE_NS), self.leave.wait());
        match select(changed(&self.watches), pause).await {
            Either::First(event) => event.map_err(|error| self.watch_failed(error)),
            Either::Second(_) => Ok(()),
        }
    }

    fn watch_failed(&self, error: Errno) -> BackendError {
        BackendError::Store { what: "watch", path: self.config.backend_path.clone(), error }
    }

    async fn ring_ended(&mut self, end: RingEnd) -> Result<(), BackendError> {
        self.ring = None;
        match end {
            RingEnd::Closed => {
                self.phase = Phase::Drained;
                Ok(())
            }
            // The rules end it: a successor finds what is there now.
            RingEnd::Left | RingEnd::Abandoned => {
                self.phase = Phase::Waiting;
                Ok(())
            }
            RingEnd::Refused(why) => {
                self.fail(&format!("serve the ring: {why}")).await?;
                self.config.record.iter().for_each(|record| self.host.remove_region(record));
                Ok(())
            }
            RingEnd::ChannelGone => Err(BackendError::Deaf { path: self.config.backend_path.clone() }),
        }
    }

    /// Writes our state with `keys`. After [`Written::No`] nothing has changed and the rules are applied again.
    async fn write_state(&mut self, state: XenbusState, keys: Keys<'_>) -> Result<Written, BackendError> {
        let written = states::write(&self.host, &self.config.backend_path, self.state, state, keys).await?;
        if written == Written::Yes {
            self.state = state;
            let (dom, vbd) = (self.config.dom, self.config.vbd);
            self.host.log(Event::BackendState { dom, vbd, state: state.number() });
        }
        Ok(written)
    }

    async fn offer(&mut self) -> Result<(), BackendError> {
        self.pace.offered(&self.host);
        let mut keys = self.features.keys();
        if self.config.hotplug == Hotplug::Write {
            keys.push(("hotplug-status", "connected".into()));
        }
        // Not written if the toolstack closed the device before it was offered.
        let written = self.write_state(XenbusState::InitWait, &keys).await?;
        self.phase = if written == Written::Yes { Phase::Waiting } else { Phase::Failed };
        Ok(())
    }

    async fn close(&mut self) -> Result<(), BackendError> {
        // That of a predecessor, which this process never served.
        self.disk.release().await;
        self.write_state(XenbusState::Closed, &[]).await?;
        self.phase = Phase::Closed;
        Ok(())
    }

    async fn fail(&mut self, why: &str) -> Result<(), BackendError> {
        let told = self.write_state(XenbusState::Closing, &[("error", format!("failed to {why}"))]).await?;
        if told == Written::Yes {
            self.host.log(Event::FrontendRefused { dom: self.config.dom, vbd: self.config.vbd });
        }
        self.phase = Phase::Failed;
        Ok(())
    }
}

/// How a back end ended, given the result of closing its disk. An error that ended it takes precedence; a disk that
/// was not `served` has lost nothing.
fn with_close(
    end: Result<BackendEnd, BackendError>,
    closed: Result<(), Errno>,
    path: String,
    served: bool,
) -> Result<BackendEnd, BackendError> {
    match (end, closed) {
        (Ok(_), Err(error)) => Err(BackendError::Close { path, error }),
        (Err(first), Err(close)) if served => Err(BackendError::AndClose { first: Box::new(first), close }),
        (end, _) => end,
    }
}

/// The front end's directory, as the toolstack wrote it; `None` if the back end has no directory.
async fn find_frontend<H: XenHost>(
    host: &H,
    config: &BackendConfig,
) -> Result<Option<StorePath>, BackendError> {
    let dir = &config.backend_path;
    let not_ours = |why| BackendError::NotOurs { path: dir.clone(), dom: config.dom, why };
    let id = keys::read(host, dir, "frontend-id").await?;
    if id.is_some_and(|id| keys::number(&id) != Some(config.dom.0.into())) {
        return Err(not_ours("frontend-id names another domain"));
    }
    let Some(path) = keys::read(host, dir, "frontend").await? else { return Ok(None) };
    let path = String::from_utf8(path).map_err(|_| not_ours("frontend is not a path"))?;
    if !path.starts_with(&format!("/local/domain/{}/", config.dom.0)) {
        return Err(not_ours("frontend is not a directory of this domain"));
    }
    Ok(Some(path))
}
