//! Certificates for servers and clients of a world.
//!
//! They are constants, so that runs do not depend on when, or on which machine, they were made. Keys of sessions are
//! random all the same; only lengths reach the trace, and with Ed25519 every message has the same length in each run.
//! The certificates are valid from 2000 to 2100, because worlds have a clock of their own. The keys are for tests.

use crate::world::World;

/// Where the certificates are.
const FOLDER: &str = "/pki";

const FILES: [(&str, &str); 5] = [
    ("ca-cert.pem", include_str!("pki/ca-cert.pem")),
    ("server-cert.pem", include_str!("pki/server-cert.pem")),
    ("server-key.pem", include_str!("pki/server-key.pem")),
    ("client-cert.pem", include_str!("pki/client-cert.pem")),
    ("client-key.pem", include_str!("pki/client-key.pem")),
];

/// The export of guests as a disk that is reached through TLS.
pub(super) const SECURED: [&str; 2] = [
    "nbds+unix:///disk?socket=/run/tapdisk.nbd&tls-certificates=/pki",
    "nbds://[::1]:10810/disk?tls-certificates=%2Fpki",
];

/// Puts the certificates where both sides look for them, and returns the option of a server.
pub(super) fn certificates(world: &World) -> String {
    for (name, text) in FILES {
        world.storage.put_bytes(&format!("{FOLDER}/{name}"), text.as_bytes());
    }
    format!("--tls-creds {FOLDER}")
}
