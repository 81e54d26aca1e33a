//! How a tapdisk is controlled: the protocol of tap-ctl, and one of JSON beside it; both ends.
//!
//! ```text
//!   tap-ctl                                              tapdisk
//!   Tapdisk::call ──ctl<pid>: a message──► Control::serve ──► Verbs::carry_out: attach, open, pause ...
//!        ▲ ▲                                    ▲     │
//!        │ └───── messages, perhaps a text ◄────┼─────┘
//!   Tapdisk::json ──json<pid>: a line───────────┘ ──► json::Verbs::carry_out
//!          ▲                                          │
//!          └─────── a line, or one for each event ◄────┘
//! ```
//!
//! # Contract
//!
//! * A connection carries one request and its answer. Both ends take messages and lines in any pieces.
//! * **The server is bounded**: at each socket it hears at most [`CONNECTIONS_MAX`] clients at a time, others wait to
//!   be accepted. One that does not send its request within [`MESSAGE_NS`], or does not take the answer in that time,
//!   is dropped. A request may take as long as it takes to carry out, and is carried out to its end even if its client
//!   leaves.
//! * **Who waits keeps nobody out**: requests that may wait for storage ([`Place::Waits`]) have places of their
//!   own, [`WAITING_MAX`] of them, [`WAITING_OF_ONE_MAX`] for one disk; what finds none is refused with `EAGAIN`. So
//!   lists and counters can be had whatever the storage does. Those who listen for events have [`LISTENING_MAX`] other
//!   places, as long as they like.
//! * **The client is bounded**: it gives up after the time that its caller allows, and takes no more disks and no
//!   longer text than a tapdisk has.
//! * Messages that are no request, or whose number nobody knows, are answered with `EINVAL` and words.
//!
//! [`json`] says what holds for the second socket. Layouts of messages are in [`tap_abi::tapctl`]. What differs from
//! tapdisk3, whose clients and servers work with these: an answer of the kind `ERROR` has words; texts that do not fit
//! are refused.

pub mod client;
pub mod json;
mod refusal;
mod server;
mod tap_ctl;
mod wire;

pub use refusal::Refusal;
pub use server::{
    CONNECTIONS_MAX, Control, ControlHost, LISTENING_MAX, MESSAGE_NS, Place, Protocol, WAITING_MAX,
    WAITING_OF_ONE_MAX,
};
pub use tap_ctl::{Answer, TapCtl, Verbs};

tap_host::listed! {
    /// The seeded bugs of this crate.
    pub BUGS: Bug with [wire::BUGS, server::BUGS, json::BUGS];
}

tap_host::listed! {
    /// The marks of this crate.
    pub MARKS: Mark with [server::MARKS, json::MARKS];
}

/// Where tap-ctl and tapdisk meet: control sockets, NBD sockets, and below it the marks of minor numbers in use.
pub const FOLDER: &str = "/run/blktap-control";

/// The socket of the tapdisk with this process number, in `folder`.
pub fn socket_of(folder: &str, pid: u32) -> String {
    format!("{folder}/ctl{pid}")
}

/// The socket for JSON of the tapdisk with this process number, in `folder`.
pub fn json_socket_of(folder: &str, pid: u32) -> String {
    format!("{folder}/json{pid}")
}

/// The process number that a socket's name in the folder tells; `None` if it is not a control socket.
pub fn pid_of(name: &str) -> Option<u32> {
    name.strip_prefix("ctl")?.parse().ok()
}

/// The process number in the name of any socket in the folder; `None` if it is not of a tapdisk.
pub fn owner_of(name: &str) -> Option<u32> {
    let nbd = || name.strip_prefix("nbd")?.split_once('.').map(|(pid, _)| pid);
    pid_of(name).or_else(|| name.strip_prefix("json").or_else(nbd)?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_socket_tells_its_process() {
        let names = [socket_of("", 17), json_socket_of("", 17), "/nbd17.3".to_owned()];
        assert!(names.iter().all(|name| owner_of(&name[1..]) == Some(17)));
        for other in ["tapdisk", "nbd17", "nbdx.3", "json", "17"] {
            assert_eq!(owner_of(other), None, "{other}");
        }
    }

    #[test]
    fn a_socket_tells_its_process() {
        assert_eq!(socket_of(FOLDER, 17), "/run/blktap-control/ctl17");
        assert_eq!(json_socket_of(FOLDER, 17), "/run/blktap-control/json17");
        assert_eq!(pid_of("ctl17"), Some(17));
        for other in ["ctl", "ctlx", "json17", "nbd17.3", "17", "ctl-1", "ctl17.3"] {
            assert_eq!(pid_of(other), None, "{other}");
        }
    }
}
