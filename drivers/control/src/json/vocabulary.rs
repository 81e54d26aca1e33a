//! What can be asked for, and what is answered.

use crate::Refusal;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tap_host::Errno;

/// What a tapdisk can be asked for.
// Variants without fields have braces: serde refuses unknown fields only of those.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// All minor numbers.
    List {},
    /// A snapshot of a disk in use, with one of `keep` and `image`.
    Snapshot {
        /// The minor number.
        minor: u16,
        /// The disk keeps its name, and its image so far gets this path.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        keep: Option<String>,
        /// The disk goes on with this new image, `TYPE:PATH`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        image: Option<String>,
    },
    /// Begins to merge an image below a disk in use into its backing file.
    Commit {
        /// The minor number.
        minor: u16,
        /// The image, `TYPE:PATH`.
        image: String,
        /// Its backing file, which must be this one: a request that is repeated then never merges the next one, too.
        base: String,
        /// Most bytes that are moved in a second.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rate: Option<u64>,
    },
    /// The last merge below a disk.
    Query {
        /// The minor number.
        minor: u16,
    },
    /// Ends the merge below a disk.
    Cancel {
        /// The minor number.
        minor: u16,
    },
    /// Sets what can be changed while a disk is open; answered with what holds then.
    Set {
        /// The minor number.
        minor: u16,
        /// The I/O priority, `CLASS`, `CLASS:LEVEL`, or `none` for that of the process.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ionice: Option<String>,
    },
    /// Makes a disk in use larger.
    Resize {
        /// The minor number.
        minor: u16,
        /// Its new size.
        size_bytes: u64,
    },
    /// Serves a guest's ring, as `XENBLKIF_CONNECT` does, if the disk is what the guest was told.
    Connect {
        /// The minor number.
        minor: u16,
        /// The guest.
        domid: u16,
        /// The device's number in it.
        devid: u32,
        /// The grant of the ring's page, whose layout is that of x86_64.
        ring_ref: u32,
        /// The guest's port.
        port: u32,
        /// That of the minor number when the guest got its disk.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        allocation: Option<String>,
        /// The disk's size, as the guest knows it.
        size_sectors: u64,
        /// The guest may only read, whatever the disk permits.
        #[serde(default)]
        read_only: bool,
    },
    /// The counters of the disk of one minor number, or of all that are open.
    Stats {
        /// The minor number.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        minor: Option<u16>,
    },
    /// The metrics of the process.
    Metrics {},
    /// What happens to disks, from now on.
    Events {},
}

impl Request {
    /// The request that a line stands for.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn of(line: &[u8]) -> Result<Self, String> {
        // serde takes an array, too.
        if !line.trim_ascii_start().starts_with(b"{") {
            return Err("it is no object".to_owned());
        }
        serde_json::from_slice(line).map_err(|why| why.to_string())
    }
}

/// What a request that was carried out is answered with.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(untagged)]
pub enum Reply {
    /// To [`Request::List`].
    List(Disks<Disk>),
    /// To [`Request::Stats`].
    Stats(Disks<Stats>),
    /// To [`Request::Metrics`].
    Metrics(Metrics),
    /// To [`Request::Snapshot`].
    Snapshot(Taken),
    /// To [`Request::Set`].
    Set(SetFor),
    /// To [`Request::Resize`].
    Resized(Resized),
    /// To [`Request::Connect`].
    Guest(Guest),
    /// To [`Request::Commit`], [`Request::Query`] and [`Request::Cancel`].
    Job(Job),
}

/// The answer to a request.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer<T> {
    /// It was carried out.
    Ok(T),
    /// It was not.
    Error(ErrorAnswer),
}

/// A refusal.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ErrorAnswer {
    /// The error's number.
    pub errno: i32,
    /// Its name, such as `EINVAL`.
    pub name: String,
    /// Continue "failed to".
    pub words: String,
}

impl From<Refusal> for ErrorAnswer {
    fn from(Refusal { error, words }: Refusal) -> Self {
        Self { errno: error.0, name: format!("{error:?}"), words }
    }
}

impl From<ErrorAnswer> for Refusal {
    fn from(ErrorAnswer { errno, words, .. }: ErrorAnswer) -> Self {
        Self { error: Errno(if errno > 0 { errno } else { Errno::EIO.0 }), words }
    }
}

/// A text in the format of OpenMetrics 1.0.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Metrics {
    /// Its lines.
    pub text: String,
}

/// Something of several disks, by minor number.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Disks<T> {
    /// In the order of their minor numbers.
    pub disks: Vec<T>,
}

/// What a minor number's disk does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// No image was opened yet.
    Attached,
    /// Its image was closed.
    Closed,
    /// Requests are carried out.
    Running,
    /// It waits for requests to end, and will be paused.
    Pausing,
    /// Requests wait, and it has let go of its image.
    Paused,
    /// Paused, because no image could be opened.
    Stranded,
    /// It is being closed.
    Closing,
}

/// A minor number in a list; what only open disks have is null for others.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Disk {
    /// The minor number.
    pub minor: u16,
    /// Another text after the number was freed and allocated again.
    #[serde(default)]
    pub allocation: String,
    /// What it does.
    pub state: State,
    /// `TYPE:PATH`, as it was given.
    pub image: Option<String>,
    /// The disk's size.
    pub size_sectors: Option<u64>,
    /// Whether it refuses writes.
    pub read_only: Option<bool>,
    /// Requests that are being carried out.
    pub in_flight: u64,
    /// Requests that wait, because the disk is paused.
    pub waiting: u64,
    /// Clients that are connected over NBD.
    pub nbd_clients: u64,
    /// The I/O priority that was set for it, `CLASS` or `CLASS:LEVEL`; null is that of the process.
    pub ionice: Option<String>,
    /// Guests that use it through a ring.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub guests: Vec<Guest>,
}

/// What is set for a disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SetFor {
    /// The minor number.
    pub minor: u16,
    /// The I/O priority, `CLASS` or `CLASS:LEVEL`; null is that of the process.
    pub ionice: Option<String>,
}

/// A guest that uses a disk through a ring.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Guest {
    /// The guest.
    pub domid: u16,
    /// The device's number in it.
    pub devid: u32,
    /// It may only read, although the disk can be written to.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
    /// Why its ring is not served any more; absent if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The images of a disk after a snapshot, as `TYPE:PATH`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Taken {
    /// What the disk has now.
    pub image: String,
    /// What is below it, and no longer changes.
    pub base: String,
}

/// A disk that was made larger.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Resized {
    /// The minor number.
    pub minor: u16,
    /// Its size.
    pub size_sectors: u64,
}

/// Whether images are being merged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// They are.
    Running,
    /// They were, and the disk goes on without the image.
    Done,
    /// It was told to end, or the disk was paused or closed. It can be begun again.
    Ended,
    /// It failed. It can be begun again.
    Failed,
}

/// A merge of an image into its backing file, below a disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Job {
    /// The disk's minor number.
    pub minor: u16,
    /// The image, `TYPE:PATH`.
    pub image: String,
    /// Its backing file, likewise.
    pub base: String,
    /// Whether it runs.
    pub state: JobState,
    /// How much of the image was looked at, in bytes of the disk.
    pub done_bytes: u64,
    /// Bytes of the disk.
    pub total_bytes: u64,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorAnswer>,
}

/// The counters of an open disk. Those of tapdisk3 (`name`, `secs`, `images`) are as there.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Stats {
    /// The minor number.
    pub minor: u16,
    /// `TYPE:PATH`, as it was given.
    pub name: String,
    /// Sectors read and written.
    pub secs: [u64; 2],
    /// The image, with the same counters.
    pub images: [ImageStats; 1],
    /// What it does.
    pub state: State,
    /// The disk's size.
    pub size_sectors: u64,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// Requests that are being carried out.
    pub in_flight: u64,
    /// Requests that wait, because the disk is paused.
    pub waiting: u64,
    /// Read requests.
    pub reads: u64,
    /// Write requests.
    pub writes: u64,
    /// Flush requests.
    pub flushes: u64,
    /// Requests to make sectors zero.
    pub zeroes: u64,
    /// Requests to discard sectors.
    pub discards: u64,
    /// Sectors made zero.
    pub sectors_zeroed: u64,
    /// Sectors discarded.
    pub sectors_discarded: u64,
    /// Requests that went to the image as part of another.
    pub merged: u64,
    /// Requests that were sent to the image again.
    pub retries: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Clients that are connected over NBD.
    pub nbd_clients: u64,
    /// What the requests of its users did, by kind: `read`, `write`, `flush`, `write-zeroes`, `discard`.
    pub operations: BTreeMap<String, Operation>,
}

/// What requests of one kind did.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Operation {
    /// Requests that were answered.
    pub requests: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// Those that failed.
    pub errors: u64,
    /// Those that are not answered yet, including those that wait because the disk is paused.
    pub in_flight: u64,
    /// How long the answered ones took.
    pub latency: Latency,
}

/// How long requests took, from their arrival at the disk to their answer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Latency {
    /// Sum of all times, in nanoseconds.
    pub sum_ns: u64,
    /// Longest time, in nanoseconds.
    pub max_ns: u64,
    /// How many took longer than the bound before and at most this one, in nanoseconds; null is no bound. Those without
    /// any are left out.
    pub buckets: Vec<(Option<u64>, u64)>,
}

/// The counters of an image.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ImageStats {
    /// `TYPE:PATH`, as it was given.
    pub name: String,
    /// Sectors read and written.
    pub hits: [u64; 2],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_understood_or_refused_by_name() {
        let parse = |text: &str| Request::of(text.as_bytes());
        assert_eq!(parse(r#"{"verb":"list"}"#), Ok(Request::List {}));
        assert_eq!(parse(r#" { "minor": 5, "verb": "stats" } "#), Ok(Request::Stats { minor: Some(5) }));
        assert_eq!(parse(r#"{"verb":"stats"}"#), Ok(Request::Stats { minor: None }));
        let snapshot = Request::Snapshot { minor: 5, keep: Some("/a".into()), image: None };
        assert_eq!(parse(r#"{"verb":"snapshot","minor":5,"keep":"/a"}"#), Ok(snapshot));
        let (image, base) = ("qcow:/b".to_owned(), "/a".to_owned());
        let commit = Request::Commit { minor: 5, image, base, rate: None };
        assert_eq!(parse(r#"{"verb":"commit","minor":5,"image":"qcow:/b","base":"/a"}"#), Ok(commit));
        for (text, word) in [
            (r#"{"verb":"commit","minor":5}"#, "missing field `image`"),
            (r#"{"verb":"list","minor":5}"#, "unknown field `minor`"),
            (r#"{"verb":"stats","minr":5}"#, "unknown field `minr`"),
            (r#"{"verb":"fly"}"#, "unknown variant `fly`"),
            (r#"{"minor":5}"#, "missing field `verb`"),
            (r#"{"verb":"stats","minor":65536}"#, "65536"),
            (r#"{"verb":"stats","minor":-1}"#, "-1"),
            (r#"{"verb":"stats","minor":5,"minor":6}"#, "duplicate field"),
            (r#"{"verb":"stats","verb":"list"}"#, "duplicate field"),
            (r#"{"verb":"list"} {"verb":"list"}"#, "trailing characters"),
            (r#"["list"]"#, "no object"),
            (r#"{"verb":"list""#, "EOF"),
            ("", "no object"),
        ] {
            let why = parse(text).unwrap_err();
            assert!(why.contains(word), "{text}: {why}");
        }
    }

    #[test]
    fn a_refusal_survives_the_way() {
        let refusal = Refusal::new(Errno::ENODEV, "find \"it\"");
        let answer = Answer::<Disks<Disk>>::Error(refusal.clone().into());
        let text = serde_json::to_string(&answer).unwrap();
        assert_eq!(text, r#"{"error":{"errno":19,"name":"ENODEV","words":"find \"it\""}}"#);
        let Ok(Answer::<Disks<Disk>>::Error(back)) = serde_json::from_str(&text) else { panic!("{text}") };
        assert_eq!(Refusal::from(back), refusal);
    }
}
