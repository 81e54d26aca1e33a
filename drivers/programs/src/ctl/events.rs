//! `tap-ctl events`.

use super::list::printable;
use super::{AT_ONCE_S, Ctl, CtlHost, Failure, Launch};
use crate::vdev;
use clap::Args;
use futures_util::stream::{FuturesUnordered, StreamExt};
use serde::Serialize;
use serde_json::json;
use std::collections::BTreeSet;
use std::future::pending;
use std::pin::pin;
use tap_control::client::CallError;
use tap_control::json::{Guest, News, Standing};
use tap_host::{DomId, Errno, VbdId, unless};

tap_host::listed! {
    pub(super) MARKS: Mark;
    EVENTS_INTERRUPTED = "events-interrupted", "tap-ctl printed events until it was interrupted";
}

#[derive(Args, Clone, Copy, Debug)]
pub(super) struct EventsArgs {
    /// Only of this tapdisk, until it ends; without it of all, also those that start later
    #[arg(short, value_name = "PID")]
    pid: Option<u32>,
}

/// How often to look for tapdisks that have started, in nanoseconds.
const LOOK_NS: u64 = 1_000_000_000;

/// A line, for programs.
#[derive(Serialize)]
struct Row<'a> {
    pid: u32,
    #[serde(flatten)]
    news: &'a News,
}

/// A guest, and its disk in it.
fn guest(guest: &Guest) -> String {
    vdev::of_guest(DomId(guest.domid), VbdId(guest.devid))
}

/// The lines for people: one, or for a state one for each disk.
fn lines(pid: u32, news: &News) -> Vec<String> {
    let event = json!(news.event);
    let seconds = format!("{}.{:06}", news.ns / 1_000_000_000, news.ns / 1000 % 1_000_000);
    let begin = format!("{seconds} pid={pid} seq={} event={}", news.seq, event.as_str().unwrap_or_default());
    let of_disk = |minor: u16, disk: Option<&Standing>| {
        let disk = disk.map(|disk| {
            let state = json!(disk.state);
            let args = disk.image.as_ref().map(|image| format!(" args={}", printable(image)));
            let state = state.as_str().unwrap_or_default();
            let guests: Vec<String> = disk.guests.iter().map(guest).collect();
            let guests =
                if guests.is_empty() { String::new() } else { format!(" guests={}", guests.join(",")) };
            format!(" state={state} nbd_clients={}{guests}{}", disk.nbd_clients, args.unwrap_or_default())
        });
        format!("{begin} minor={minor}{}", disk.unwrap_or_default())
    };
    match news {
        News { disks: Some(disks), .. } if !disks.is_empty() => {
            disks.iter().map(|disk| of_disk(disk.minor, Some(disk))).collect()
        }
        News { minor: Some(minor), disk, words, .. } => {
            let words = words.as_ref().map(|words| format!(": {}", printable(words))).unwrap_or_default();
            vec![format!("{}{words}", of_disk(*minor, disk.as_ref()))]
        }
        News { lost: Some(lost), .. } => vec![format!("{begin} lost={lost}")],
        News { .. } => vec![begin],
    }
}

impl<H: CtlHost, L: Launch> Ctl<'_, H, L> {
    /// Prints events until it is interrupted, its reader has gone, or there are no more.
    pub(super) async fn events(&self, args: EventsArgs) -> Result<(), Failure> {
        let stopped = self.host.asked_to_stop();
        let heard = async {
            match args.pid {
                Some(pid) => Ok(self.follow(pid).await?),
                None => self.follow_all().await,
            }
        };
        unless(stopped, heard).await.unwrap_or_else(|| {
            self.host.mark(&EVENTS_INTERRUPTED);
            Ok(())
        })
    }

    async fn follow(&self, pid: u32) -> Result<(), CallError> {
        let tapdisk = self.tapdisk(pid, AT_ONCE_S);
        let mut events = tapdisk.events().await?;
        while let Some(news) = events.next().await? {
            match self.json {
                true => self.console.out(&json!(Row { pid, news: &news }).to_string()),
                false => lines(pid, &news).iter().for_each(|line| self.console.out(line)),
            }
            if !self.console.is_read() {
                break;
            }
        }
        Ok(())
    }

    async fn follow_all(&self) -> Result<(), Failure> {
        let (mut followed, mut all) = (BTreeSet::new(), FuturesUnordered::new());
        while self.console.is_read() {
            for pid in self.pids().await? {
                if followed.insert(pid) {
                    all.push(async move { (pid, self.follow(pid).await) });
                }
            }
            let mut look = pin!(self.host.sleep_ns(LOOK_NS));
            let mut gone = Vec::new();
            loop {
                let next = async {
                    match all.next().await {
                        Some(ended) => ended,
                        None => pending().await,
                    }
                };
                let Some((pid, outcome)) = unless(look.as_mut(), next).await else { break };
                match outcome {
                    Ok(()) => gone.push(pid),
                    // What it leaves behind when it is killed, or it has just ended, or it is a tapdisk3.
                    Err(CallError::Connect { error: Errno::ECONNREFUSED | Errno::ENOENT, .. }) => {
                        gone.push(pid)
                    }
                    Err(error) => {
                        self.console.err(&format!("tap-ctl: failed to {error}"));
                        // It is asked again only if it was there.
                        if matches!(error, CallError::Broken { .. } | CallError::Ended { .. }) {
                            gone.push(pid);
                        }
                    }
                }
                if !self.console.is_read() {
                    return Ok(());
                }
            }
            followed.retain(|pid| !gone.contains(pid));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tap_control::json::{Happened, State};

    #[test]
    fn people_read_a_line_for_each_disk() {
        let disk = |minor| Standing {
            minor,
            state: State::Running,
            image: Some("raw:/a\u{1b}".into()),
            size_sectors: Some(8),
            read_only: Some(false),
            nbd_clients: 2,
            ionice: None,
            guests: Vec::new(),
        };
        let closed = Standing { state: State::Closed, image: None, nbd_clients: 0, ..disk(4) };
        let guests = vec![Guest { domid: 7, devid: 51712, read_only: false, error: None }];
        let used = News { disk: Some(Standing { guests, ..disk(3) }), ..News::of(8, 0, Happened::Guests) };
        assert_eq!(
            lines(17, &News { minor: Some(3), ..used }),
            [
                "0.000000 pid=17 seq=8 event=guests minor=3 state=running nbd_clients=2 guests=7/xvda args=raw:/a\\u{1b}"
            ]
        );
        let state =
            News { disks: Some(vec![disk(3), closed]), ..News::of(7, 1_000_234_567, Happened::State) };
        assert_eq!(
            lines(17, &state),
            [
                "1.000234 pid=17 seq=7 event=state minor=3 state=running nbd_clients=2 args=raw:/a\\u{1b}",
                "1.000234 pid=17 seq=7 event=state minor=4 state=closed nbd_clients=0",
            ]
        );
        let none = News { disks: Some(Vec::new()), ..News::of(0, 0, Happened::State) };
        assert_eq!(lines(17, &none), ["0.000000 pid=17 seq=0 event=state"]);
        let lost = News { lost: Some(5), ..News::of(9, 0, Happened::Lost) };
        assert_eq!(lines(17, &lost), ["0.000000 pid=17 seq=9 event=lost lost=5"]);
        let gone = News { minor: Some(3), ..News::of(9, 0, Happened::Detached) };
        assert_eq!(lines(17, &gone), ["0.000000 pid=17 seq=9 event=detached minor=3"]);
        let hangs = News { words: Some("vbd3 hangs".into()), ..News { event: Happened::Hangs, ..gone } };
        assert_eq!(lines(17, &hangs), ["0.000000 pid=17 seq=9 event=hangs minor=3: vbd3 hangs"]);
    }
}
