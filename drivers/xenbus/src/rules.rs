//! What to do next: a function of our phase and of what xenstore says.

use crate::config::BackendEnd;
use tap_abi::xenbus::XenbusState;

/// Where the back end is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    /// Offered, no ring.
    Waiting,
    /// The ring is served.
    Serving,
    /// The ring takes no more requests.
    Draining,
    /// The front end has released its ring, and so have we.
    Drained,
    /// The ring takes no more requests; another process will.
    Leaving,
    /// Closing, no ring: something is wrong with the front end.
    Failed,
    /// Closed, no ring.
    Closed,
}

/// What xenstore says now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Seen {
    /// Our state; `None` when the directory is gone.
    pub(crate) backend: Option<XenbusState>,
    /// The front end's; `None` when its directory is gone.
    pub(crate) frontend: Option<XenbusState>,
    /// There was one before, as far as we know. A toolstack that does not write both directories in one transaction
    /// makes the front end's after ours.
    pub(crate) frontend_known: bool,
    pub(crate) online: bool,
    /// The hotplug script is done, or there is none to wait for.
    pub(crate) hotplugged: bool,
    /// We should leave the disk to another process.
    pub(crate) leave: bool,
    /// The disk of the ring is larger than the front end was told.
    pub(crate) grown: bool,
}

impl Seen {
    /// The toolstack wants the device closed.
    pub(crate) fn asked_to_close(&self) -> bool {
        !self.online && matches!(self.backend, Some(XenbusState::Closing | XenbusState::Closed))
    }
}

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Action {
    /// Nothing before something changes.
    Wait,
    /// Publish features, state 2.
    Offer,
    /// Connect the ring, publish the disk, state 4.
    Connect,
    /// Publish the disk's new size, and state 4 again.
    Grow,
    /// State 5: the front end is about to close. Until it has, it may use its ring.
    Echo,
    /// Take no more requests; state 6 once those in flight are answered.
    Drain,
    /// Take no more requests; end once those in flight are answered.
    Leave,
    /// State 6.
    Close,
    /// Take no more requests, wait for those in flight, and end.
    End(BackendEnd),
}

/// How a process that finds these states begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Start {
    /// Nothing was connected: the same as [`Action::Offer`].
    Offer,
    /// A predecessor served this ring: take it over.
    Resume,
    /// Continue as if in this phase.
    In(Phase),
}

pub(crate) fn start(seen: &Seen) -> Start {
    use XenbusState::*;
    match (seen.backend, seen.frontend) {
        // Also if the front end or the toolstack has begun to close it: the front end has its ring until it says 6.
        (Some(Connected), Some(Connected | Closing)) | (Some(Closing), Some(Closing)) => Start::Resume,
        (Some(Closing), Some(Connected)) if !seen.online => Start::Resume,
        // The predecessor published the disk, or the front end has made another ring since: in both cases connect
        // now.
        (Some(Connected), Some(Initialised)) => Start::In(Phase::Waiting),
        // The predecessor died half way through closing, or the front end started over: it has no ring, and a state
        // 6 now would make it close again.
        (Some(Connected | Closing | Reconfiguring | Reconfigured), Some(Initialising)) if seen.online => {
            Start::Offer
        }
        (Some(Connected | Closing | Reconfiguring | Reconfigured), _) => Start::In(Phase::Failed),
        (Some(Closed), _) => Start::In(Phase::Closed),
        (None | Some(Unknown | Initialising | InitWait | Initialised), _) => Start::Offer,
    }
}

/// Whether the front end may use, or be about to use, a ring that a predecessor had served. It uses none before it was
/// told that it is connected.
pub(crate) fn ring_may_be_used(seen: &Seen) -> bool {
    use XenbusState::*;
    matches!(seen.backend, Some(Connected | Closing | Reconfiguring | Reconfigured))
        && matches!(seen.frontend, Some(Initialised | Connected | Closing))
}

pub(crate) fn next(phase: Phase, seen: &Seen) -> Action {
    use XenbusState::*;
    // We have already written a state; if the first one is back, another device is in the same directory.
    if matches!(seen.backend, None | Some(Initialising)) {
        return Action::End(BackendEnd::BackendGone);
    }
    let Some(front) = seen.frontend else {
        let to_come = phase == Phase::Waiting && !seen.frontend_known && !seen.asked_to_close();
        return match to_come {
            true if seen.leave => Action::End(BackendEnd::Left),
            true => Action::Wait,
            false => Action::End(BackendEnd::FrontendGone),
        };
    };
    let closing = matches!(front, Closing | Closed);
    match phase {
        Phase::Waiting | Phase::Failed | Phase::Closed if seen.leave => Action::End(BackendEnd::Left),
        Phase::Waiting if closing || seen.asked_to_close() => close(seen),
        Phase::Waiting if matches!(front, Initialised | Connected) && seen.hotplugged => Action::Connect,
        Phase::Serving if front == Closed => Action::Drain,
        Phase::Serving if seen.leave => Action::Leave,
        // Linux before 5.15 says this of a mounted disk, and continues to use it.
        Phase::Serving if front == Closing && seen.backend == Some(Connected) => Action::Echo,
        // A front end in another state would take the 4 for the beginning or the end of something.
        Phase::Serving
            if seen.grown && matches!(front, Initialised | Connected) && seen.backend == Some(Connected) =>
        {
            Action::Grow
        }
        Phase::Failed if closing || front == Initialising || seen.asked_to_close() => close(seen),
        Phase::Drained => close(seen),
        Phase::Closed if !seen.online => Action::End(BackendEnd::Offline),
        Phase::Closed if matches!(front, Initialising | Initialised) => Action::Offer,
        Phase::Waiting
        | Phase::Serving
        | Phase::Draining
        | Phase::Leaving
        | Phase::Failed
        | Phase::Closed => Action::Wait,
    }
}

/// State 6: at once for a front end that may return, otherwise when everything is released.
fn close(seen: &Seen) -> Action {
    if seen.online { Action::Close } else { Action::End(BackendEnd::Offline) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use XenbusState::*;

    fn seen(backend: XenbusState, frontend: XenbusState) -> Seen {
        Seen {
            backend: Some(backend),
            frontend: Some(frontend),
            frontend_known: true,
            online: true,
            hotplugged: true,
            leave: false,
            grown: false,
        }
    }

    #[test]
    fn every_front_end_state_in_every_phase() {
        use Action::*;
        // Unknown, Initialising, InitWait, Initialised, Connected, Closing, Closed, Reconfiguring, Reconfigured
        let table = [
            (Phase::Waiting, InitWait, [Wait, Wait, Wait, Connect, Connect, Close, Close, Wait, Wait]),
            (Phase::Serving, Connected, [Wait, Wait, Wait, Wait, Wait, Echo, Drain, Wait, Wait]),
            (Phase::Serving, Closing, [Wait, Wait, Wait, Wait, Wait, Wait, Drain, Wait, Wait]),
            (Phase::Drained, Closing, [Close; 9]),
            (Phase::Draining, Closing, [Wait; 9]),
            (Phase::Leaving, Connected, [Wait; 9]),
            (Phase::Failed, Closing, [Wait, Close, Wait, Wait, Wait, Close, Close, Wait, Wait]),
            (Phase::Closed, Closed, [Wait, Offer, Wait, Offer, Wait, Wait, Wait, Wait, Wait]),
        ];
        for (phase, backend, actions) in table {
            for (frontend, action) in XenbusState::ALL.into_iter().zip(actions) {
                assert_eq!(next(phase, &seen(backend, frontend)), action, "{phase:?} {frontend:?}");
            }
        }
    }

    #[test]
    fn a_missing_end_ends_every_phase() {
        for phase in
            [Phase::Waiting, Phase::Serving, Phase::Draining, Phase::Leaving, Phase::Failed, Phase::Closed]
        {
            let both = seen(Connected, Connected);
            assert_eq!(next(phase, &Seen { frontend: None, ..both }), Action::End(BackendEnd::FrontendGone));
            for gone in [None, Some(Initialising)] {
                assert_eq!(
                    next(phase, &Seen { backend: gone, ..both }),
                    Action::End(BackendEnd::BackendGone)
                );
            }
        }
    }

    #[test]
    fn a_front_end_that_is_not_there_yet_is_waited_for() {
        let alone = Seen { frontend: None, frontend_known: false, ..seen(InitWait, Unknown) };
        assert_eq!(next(Phase::Waiting, &alone), Action::Wait);
        let leaves = Seen { leave: true, ..alone };
        assert_eq!(next(Phase::Waiting, &leaves), Action::End(BackendEnd::Left));
        let gone = Action::End(BackendEnd::FrontendGone);
        for phase in [Phase::Serving, Phase::Failed, Phase::Closed] {
            assert_eq!(next(phase, &alone), gone, "{phase:?}");
        }
        let closed = Seen { online: false, backend: Some(Closing), ..alone };
        assert_eq!(next(Phase::Waiting, &closed), gone);
    }

    #[test]
    fn a_toolstack_that_wants_it_closed_waits_for_a_front_end_in_use() {
        let asked = |front| Seen { online: false, ..seen(Closing, front) };
        let end = Action::End(BackendEnd::Offline);
        assert_eq!(next(Phase::Serving, &asked(Connected)), Action::Wait);
        assert_eq!(next(Phase::Serving, &asked(Closing)), Action::Wait, "it may refuse");
        assert_eq!(next(Phase::Serving, &asked(Closed)), Action::Drain);
        for (phase, front) in [
            (Phase::Waiting, Initialised),
            (Phase::Failed, Connected),
            (Phase::Drained, Closed),
            (Phase::Closed, Closed),
        ] {
            assert_eq!(next(phase, &asked(front)), end, "{phase:?}");
        }
        let offline_only = Seen { online: false, ..seen(Connected, Connected) };
        assert_eq!(next(Phase::Serving, &offline_only), Action::Wait);
    }

    #[test]
    fn who_leaves_does_not_change_what_others_see() {
        let leave = |back, front| Seen { leave: true, ..seen(back, front) };
        assert_eq!(next(Phase::Serving, &leave(Connected, Connected)), Action::Leave);
        assert_eq!(
            next(Phase::Serving, &leave(Connected, Closed)),
            Action::Drain,
            "a close that was begun is finished"
        );
        assert_eq!(next(Phase::Serving, &leave(Closing, Closing)), Action::Leave);
        assert_eq!(next(Phase::Draining, &leave(Closing, Closing)), Action::Wait);
        for (phase, back) in [(Phase::Waiting, InitWait), (Phase::Failed, Closing), (Phase::Closed, Closed)] {
            let end = Action::End(BackendEnd::Left);
            assert_eq!(next(phase, &leave(back, Initialised)), end, "{phase:?}");
        }
    }

    #[test]
    fn a_larger_disk_is_published_to_front_ends_in_use() {
        let grown = |back, front| Seen { grown: true, ..seen(back, front) };
        let expected = |front| match front {
            Initialised | Connected => Action::Grow,
            Closing => Action::Echo,
            Closed => Action::Drain,
            _ => Action::Wait,
        };
        for front in XenbusState::ALL {
            assert_eq!(next(Phase::Serving, &grown(Connected, front)), expected(front), "{front:?}");
        }
        assert_eq!(next(Phase::Serving, &grown(Closing, Connected)), Action::Wait);
        assert_eq!(next(Phase::Draining, &grown(Connected, Connected)), Action::Wait);
        let leaves = Seen { leave: true, ..grown(Connected, Connected) };
        assert_eq!(next(Phase::Serving, &leaves), Action::Leave, "whoever comes next publishes it");
    }

    #[test]
    fn a_script_is_waited_for() {
        let not_yet = Seen { hotplugged: false, ..seen(InitWait, Initialised) };
        assert_eq!(next(Phase::Waiting, &not_yet), Action::Wait);
    }

    #[test]
    fn where_a_new_process_begins() {
        assert_eq!(start(&seen(Initialising, Initialising)), Start::Offer);
        assert_eq!(start(&seen(InitWait, Initialised)), Start::Offer);
        assert_eq!(start(&seen(Connected, Connected)), Start::Resume);
        assert_eq!(start(&seen(Connected, Initialising)), Start::Offer);
        assert_eq!(start(&Seen { online: false, ..seen(Closing, Initialising) }), Start::In(Phase::Failed));
        assert_eq!(start(&seen(Connected, Initialised)), Start::In(Phase::Waiting));
        assert_eq!(start(&seen(Connected, Closing)), Start::Resume);
        assert_eq!(start(&seen(Closing, Closing)), Start::Resume);
        assert_eq!(start(&seen(Connected, Closed)), Start::In(Phase::Failed));
        assert_eq!(start(&seen(Closing, Connected)), Start::In(Phase::Failed));
        assert_eq!(start(&Seen { online: false, ..seen(Closing, Connected) }), Start::Resume);
        assert_eq!(start(&seen(Closed, Initialising)), Start::In(Phase::Closed));
    }
}
