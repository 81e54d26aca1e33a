//! Event channels between two domains.

use crate::pair::{Ends, Pair, Peer, XenHost};
use crate::{EVENTS_MAX, OrFail, Outcome, QUIET_NS, Test, holds, same, soon, tests, until, within_ns};
use std::cell::RefCell;
use std::pin::pin;
use std::rc::Rc;
use tap_host::{Errno, EventChannel, Port, SharedPage, Time, poll_once};

/// All bodies.
pub fn all<H: XenHost, P: Peer>() -> Vec<Test<Pair<H, P>>> {
    tests![
        a_channel_starts_pending,
        an_event_reaches_the_other_end,
        an_event_wakes_who_waits,
        an_event_waits_to_be_taken,
        an_event_is_taken_once,
        events_merge_and_the_last_is_heard,
        a_dropped_wait_takes_no_event,
        stores_before_an_event_are_seen_after_it,
        channels_do_not_mix,
        many_channels_are_waited_for_at_once,
        local_ports_differ,
        a_missing_port_is_not_bound,
        a_bound_port_is_not_bound_again,
        a_port_for_another_domain_is_not_bound,
        a_closed_end_is_bound_again,
        an_event_before_binding_is_not_missed,
        an_event_to_a_closed_end_is_swallowed,
        an_end_outlives_its_peer,
    ]
}

/// Waits for an event that must come.
async fn heard(time: &impl Time, what: &str, channel: &impl EventChannel) -> Outcome {
    soon(time, what, channel.wait()).await?.or_fail("wait for an event")
}

/// Takes events until none comes; returns their number.
async fn drain(time: &impl Time, channel: &impl EventChannel) -> Result<u32, String> {
    for count in 0..EVENTS_MAX {
        match within_ns(time, QUIET_NS, channel.wait()).await {
            Some(event) => event.or_fail("wait for an event")?,
            None => return Ok(count),
        }
    }
    Err("events come without end".into())
}

/// A bound channel with nothing pending at either end.
async fn quiet_channel<H: XenHost, P: Peer>(pair: &Pair<H, P>) -> Result<Ends<H, P>, String> {
    let (near, far) = pair.channel()?;
    heard(&pair.host, "the first event", &near).await?;
    drain(&pair.host, &near).await?;
    drain(&pair.host, &far).await?;
    Ok((near, far))
}

async fn a_channel_starts_pending<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (near, _far) = pair.channel()?;
    heard(&pair.host, "the first event", &near).await?;
    same("events after the first", drain(&pair.host, &near).await?, 0)
}

async fn an_event_reaches_the_other_end<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (near, far) = quiet_channel(&pair).await?;
    for _ in 0..10 {
        near.notify();
        heard(&pair.host, "an event at the peer", &far).await?;
        far.notify();
        heard(&pair.host, "an event at the host", &near).await?;
    }
    Ok(())
}

async fn an_event_wakes_who_waits<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (near, far) = quiet_channel(&pair).await?;
    let woken = Rc::new(RefCell::new(Vec::new()));
    let note = Rc::clone(&woken);
    pair.host.spawn("waiter", 0, async move {
        for _ in 0..EVENTS_MAX {
            let event = near.wait().await;
            note.borrow_mut().push(event);
        }
    });
    pair.host.sleep_ns(QUIET_NS).await;
    same("wake-ups without an event", woken.borrow().len(), 0)?;
    for i in 1..=5 {
        far.notify();
        until(&pair.host, "a wake-up", || woken.borrow().len() == i).await?;
    }
    pair.host.sleep_ns(QUIET_NS).await;
    let all = woken.borrow().clone();
    same("wake-ups", all, vec![Ok(()); 5])
}

async fn an_event_waits_to_be_taken<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (near, far) = quiet_channel(&pair).await?;
    near.notify();
    far.notify();
    pair.host.sleep_ns(QUIET_NS).await;
    heard(&pair.host, "an event raised before the wait", &near).await?;
    heard(&pair.host, "the same at the peer", &far).await
}

async fn an_event_is_taken_once<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (near, far) = quiet_channel(&pair).await?;
    for _ in 0..3 {
        far.notify();
        heard(&pair.host, "an event", &near).await?;
        same("events without another notification", drain(&pair.host, &near).await?, 0)?;
    }
    same("events at the end that raised them", drain(&pair.host, &far).await?, 0)
}

async fn events_merge_and_the_last_is_heard<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (near, far) = quiet_channel(&pair).await?;
    for round in 0..3 {
        for _ in 0..100 {
            far.notify();
        }
        let count = drain(&pair.host, &near).await?;
        holds(
            &format!("in round {round} 100 notifications make 1 to 100 events"),
            (1..=100).contains(&count),
        )?;
    }
    far.notify();
    heard(&pair.host, "the event after them", &near).await
}

async fn a_dropped_wait_takes_no_event<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (near, far) = quiet_channel(&pair).await?;
    for _ in 0..10 {
        same("an event that was not raised", poll_once(near.wait()).await, None)?;
        {
            let mut wait = pin!(near.wait());
            let waits = poll_once(wait.as_mut()).await.is_none();
            holds("nothing is pending", waits)?;
            far.notify();
            // The event comes, and who waits for it goes without having looked.
            pair.host.sleep_ns(QUIET_NS / 10).await;
        }
        heard(&pair.host, "the event that a dropped wait was woken for", &near).await?;
    }
    Ok(())
}

async fn stores_before_an_event_are_seen_after_it<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (near, far) = quiet_channel(&pair).await?;
    let (gref, far_page) = pair.grant(true)?;
    let page = pair.map(gref, true)?;
    pair.host.spawn("echo", 0, async move {
        for _ in 0..EVENTS_MAX {
            if far.wait().await.is_err() {
                break;
            }
            far_page.store_u32(4, far_page.load_u32(0));
            far.notify();
        }
    });
    for i in 1..=50 {
        page.store_u32(0, i);
        near.notify();
        heard(&pair.host, "the echo", &near).await?;
        same("the number that came back", page.load_u32(4), i)?;
    }
    Ok(())
}

async fn channels_do_not_mix<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (one, far_one) = quiet_channel(&pair).await?;
    let (two, far_two) = quiet_channel(&pair).await?;
    far_one.notify();
    heard(&pair.host, "an event of the first channel", &one).await?;
    same("events of the second", drain(&pair.host, &two).await?, 0)?;
    two.notify();
    heard(&pair.host, "an event of the second channel", &far_two).await?;
    same("events of the first", drain(&pair.host, &far_one).await?, 0)?;
    drop((one, far_one));
    far_two.notify();
    heard(&pair.host, "an event after the first channel has gone", &two).await
}

async fn many_channels_are_waited_for_at_once<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    const CHANNELS: usize = 32;
    let woken = Rc::new(RefCell::new(vec![0; CHANNELS]));
    let mut peers = Vec::new();
    for i in 0..CHANNELS {
        let (near, far) = pair.channel()?;
        heard(&pair.host, "the first event", &near).await?;
        peers.push(far);
        let woken = Rc::clone(&woken);
        pair.host.spawn("waiter", i as u64, async move {
            for _ in 0..EVENTS_MAX {
                if near.wait().await.is_ok() {
                    woken.borrow_mut()[i] += 1;
                }
            }
        });
    }
    pair.host.sleep_ns(QUIET_NS).await;
    woken.borrow_mut().fill(0);
    peers.iter().for_each(EventChannel::notify);
    until(&pair.host, "an event of every channel", || woken.borrow().iter().all(|count| *count == 1)).await?;
    peers.iter().step_by(2).for_each(EventChannel::notify);
    let want: Vec<u32> = (0..CHANNELS).map(|i| if i % 2 == 0 { 2 } else { 1 }).collect();
    until(&pair.host, "an event of every second channel", || *woken.borrow() == want).await?;
    pair.host.sleep_ns(QUIET_NS).await;
    let events = woken.borrow().clone();
    same("events", events, want)
}

async fn local_ports_differ<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let channels = (0..8).map(|_| pair.channel()).collect::<Result<Vec<_>, _>>()?;
    let mut near: Vec<Port> = channels.iter().map(|(near, _)| near.local_port()).collect();
    near.sort_unstable();
    near.dedup();
    same("ports of eight channels", near.len(), 8)
}

async fn a_missing_port_is_not_bound<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let dom = pair.peer.dom();
    for port in [0, 4095, 1 << 20, u32::MAX] {
        let bound = pair.host.bind_interdomain(dom, Port(port)).err();
        same(&format!("bind port {port}"), bound, Some(Errno::EINVAL))?;
    }
    let far = pair.unbound()?;
    let port = far.local_port();
    let bound = pair.host.bind_interdomain(pair.stranger, port).err();
    same("bind a port of a domain that does not exist", bound, Some(Errno::ESRCH))?;
    drop(far);
    same("bind a closed port", pair.host.bind_interdomain(dom, port).err(), Some(Errno::EINVAL))
}

async fn a_bound_port_is_not_bound_again<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (near, far) = quiet_channel(&pair).await?;
    let again = pair.host.bind_interdomain(pair.peer.dom(), far.local_port());
    same("bind a port twice", again.err(), Some(Errno::EINVAL))?;
    far.notify();
    heard(&pair.host, "an event of the channel that is bound", &near).await
}

async fn a_port_for_another_domain_is_not_bound<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let far = pair.peer.alloc_unbound(pair.stranger).or_fail("make a channel for a stranger")?;
    let bound = pair.host.bind_interdomain(pair.peer.dom(), far.local_port());
    same("bind a port that waits for another domain", bound.err(), Some(Errno::EINVAL))
}

async fn a_closed_end_is_bound_again<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (mut near, far) = quiet_channel(&pair).await?;
    for _ in 0..5 {
        drop(near);
        near = pair.bind(far.local_port())?;
        heard(&pair.host, "the first event of a new binding", &near).await?;
        far.notify();
        heard(&pair.host, "an event at the host", &near).await?;
        near.notify();
        heard(&pair.host, "an event at the peer", &far).await?;
    }
    Ok(())
}

async fn an_event_before_binding_is_not_missed<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let far = pair.unbound()?;
    far.notify();
    let near = pair.bind(far.local_port())?;
    heard(&pair.host, "an event from before", &near).await?;
    drain(&pair.host, &near).await?;
    far.notify();
    drop(near);
    let near = pair.bind(far.local_port())?;
    heard(&pair.host, "an event that the old end may have had", &near).await
}

async fn an_event_to_a_closed_end_is_swallowed<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (near, far) = quiet_channel(&pair).await?;
    drop(far);
    near.notify();
    near.notify();
    match within_ns(&pair.host, QUIET_NS, near.wait()).await {
        None | Some(Err(Errno::ESHUTDOWN)) => Ok(()),
        other => Err(format!("a wait whose peer is gone returns {other:?}")),
    }
}

async fn an_end_outlives_its_peer<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (near, far) = quiet_channel(&pair).await?;
    let (other, far_other) = quiet_channel(&pair).await?;
    let port = near.local_port();
    drop(far);
    near.notify();
    same("its port", near.local_port(), port)?;
    let (third, far_third) = quiet_channel(&pair).await?;
    holds("a new channel gets another port", third.local_port() != port)?;
    for (near, far) in [(&other, &far_other), (&third, &far_third)] {
        far.notify();
        heard(&pair.host, "an event of a channel beside it", near).await?;
    }
    drop(near);
    far_other.notify();
    heard(&pair.host, "an event after it was closed", &other).await
}
