//! A line of a stream of events.
//!
//! ```text
//!   {"seq":4,"ns":120,"event":"state","disks":[...]}            everything up to event 4
//!   {"seq":5,"ns":130,"event":"paused","minor":0,"disk":{...}}  one more; the disk is so now
//!   {"seq":9,"ns":150,"event":"lost","lost":4}                  events 6 to 9 are not told
//!   {"seq":9,"ns":150,"event":"state","disks":[...]}            everything up to event 9
//! ```

use super::{Guest, State};
use serde::{Deserialize, Serialize};

/// What a line tells.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Happened {
    /// All minor numbers, as they are after the event with this number.
    State,
    /// The client did not take its lines: events up to this number are not told.
    Lost,
    /// The tapdisk has the minor number.
    Attached,
    /// An image was opened.
    Opened,
    /// It waits for requests to end, and will be paused.
    Pausing,
    /// Requests wait, and it has let go of its image.
    Paused,
    /// A pause failed, and requests are carried out.
    Unpaused,
    /// Requests are carried out again, perhaps with another image.
    Resumed,
    /// It stays paused, because no image could be opened.
    Stranded,
    /// Its image is a new one, above the one that it had.
    Snapshot,
    /// It has become larger.
    Resized,
    /// It is being closed.
    Closing,
    /// It has no image any more.
    Closed,
    /// The tapdisk has given the minor number up.
    Detached,
    /// A client has connected or left.
    Clients,
    /// It has another I/O priority.
    Set,
    /// A guest's ring was connected or disconnected, or was given up.
    Guests,
    /// A request takes too long.
    Hangs,
    /// A request that took too long has ended.
    Hung,
}

/// What a disk is, apart from its counters; what only open disks have is null for others.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Standing {
    /// The minor number.
    pub minor: u16,
    /// What it does.
    pub state: State,
    /// `TYPE:PATH`, as it was given.
    pub image: Option<String>,
    /// The disk's size.
    pub size_sectors: Option<u64>,
    /// Whether it refuses writes.
    pub read_only: Option<bool>,
    /// Clients that are connected over NBD.
    pub nbd_clients: u64,
    /// The I/O priority that was set for it.
    pub ionice: Option<String>,
    /// Guests that use it through a ring.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub guests: Vec<Guest>,
}

/// A line.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct News {
    /// Counts the events of the process, from 1. That of a state is the number of the last one before.
    pub seq: u64,
    /// When, in nanoseconds since the tapdisk began.
    pub ns: u64,
    /// What.
    pub event: Happened,
    /// Of which minor number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minor: Option<u16>,
    /// What its disk is now; absent if that has not changed, or there is none any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Standing>,
    /// More about it, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub words: Option<String>,
    /// How many events are not told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<u64>,
    /// All minor numbers, in order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<Standing>>,
}

impl News {
    /// A line that tells this, and nothing more.
    pub fn of(seq: u64, ns: u64, event: Happened) -> Self {
        Self { seq, ns, event, minor: None, disk: None, words: None, lost: None, disks: None }
    }

    pub(super) fn line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).expect("maps have texts as keys");
        line.push(b'\n');
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_only_what_it_tells() {
        let disk = Standing {
            minor: 3,
            state: State::Paused,
            image: Some("raw:/a".into()),
            size_sectors: Some(8),
            read_only: Some(false),
            nbd_clients: 1,
            ionice: None,
            guests: Vec::new(),
        };
        let paused = News { minor: Some(3), disk: Some(disk), ..News::of(7, 120, Happened::Paused) };
        let line = paused.line();
        assert_eq!(
            String::from_utf8_lossy(&line),
            "{\"seq\":7,\"ns\":120,\"event\":\"paused\",\"minor\":3,\"disk\":{\"minor\":3,\"state\":\"paused\",\
             \"image\":\"raw:/a\",\"size_sectors\":8,\"read_only\":false,\"nbd_clients\":1,\"ionice\":null}}\n"
        );
        assert_eq!(serde_json::from_slice::<News>(&line).unwrap(), paused);
        let lost = News { lost: Some(4), ..News::of(9, 0, Happened::Lost) };
        assert_eq!(lost.line(), b"{\"seq\":9,\"ns\":0,\"event\":\"lost\",\"lost\":4}\n");
    }
}
