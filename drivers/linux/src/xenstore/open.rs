//! Where to look for xenstored, and the error when it is not there.

use super::link::Link;
use std::fmt;
use std::path::Path;
use tap_host::Errno;

/// The variable that names another place, as for Xen's own tools.
const PATH_VARIABLE: &str = "XENSTORED_PATH";
/// The socket of a xenstored in this domain; a domain without one has the kernel's device.
const USUAL: [&str; 3] = ["/run/xenstored/socket", "/var/run/xenstored/socket", "/dev/xen/xenbus"];

/// The sockets and devices at which xenstored may be reached, in the order in which they are tried.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StorePlaces(Vec<String>);

impl StorePlaces {
    /// The one in the environment's `XENSTORED_PATH`; if that is not set, the usual sockets and the kernel's device.
    pub fn usual() -> Self {
        match std::env::var(PATH_VARIABLE) {
            Ok(path) if !path.is_empty() => Self::only(path),
            _ => Self(USUAL.map(String::from).into()),
        }
    }

    /// This one and no other: a socket, or a device like /dev/xen/xenbus.
    pub fn only(path: impl Into<String>) -> Self {
        Self(vec![path.into()])
    }

    /// Opens the first one that can be opened; returns its name too.
    pub(super) async fn open(&self) -> Result<(Link, &str), StoreOpenError> {
        let mut tried = Vec::new();
        for place in &self.0 {
            match Link::open(place).await {
                Ok(link) => return Ok((link, place)),
                Err(error) => tried.push((place.clone(), error)),
            }
        }
        Err(StoreOpenError { tried, on_xen: is_on_xen() })
    }
}

/// Whether Linux says that it runs on Xen.
fn is_on_xen() -> bool {
    let hypervisor = std::fs::read("/sys/hypervisor/type").unwrap_or_default();
    hypervisor.trim_ascii() == b"xen" || Path::new("/proc/xen").exists()
}

/// xenstored cannot be reached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoreOpenError {
    /// Each place and what was wrong with it.
    pub tried: Vec<(String, Errno)>,
    /// Linux says that it runs on Xen.
    pub on_xen: bool,
}

impl fmt::Display for StoreOpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("connect to xenstore")?;
        for (index, (place, error)) in self.tried.iter().enumerate() {
            write!(f, "{} {place}: {error}", if index == 0 { " at" } else { ", nor at" })?;
        }
        let refused = self.tried.iter().any(|(_, error)| matches!(*error, Errno::EACCES | Errno::EPERM));
        match (self.on_xen, refused) {
            (false, _) => f.write_str("; this machine does not run on Xen"),
            (true, true) => f.write_str("; run as root"),
            (true, false) => write!(f, "; start xenstored, or name its socket in {PATH_VARIABLE}"),
        }
    }
}

impl std::error::Error for StoreOpenError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_say_what_to_do() {
        let text = |errors: &[Errno], on_xen| {
            let tried =
                errors.iter().zip(["/a", "/b"]).map(|(error, place)| (place.into(), *error)).collect();
            StoreOpenError { tried, on_xen }.to_string()
        };
        assert_eq!(
            text(&[Errno::ENOENT, Errno::ECONNREFUSED], true),
            "connect to xenstore at /a: no such file or directory (ENOENT), nor at /b: connection refused \
             (ECONNREFUSED); start xenstored, or name its socket in XENSTORED_PATH"
        );
        assert_eq!(
            text(&[Errno::EACCES], true),
            "connect to xenstore at /a: permission denied (EACCES); run as root"
        );
        assert!(text(&[Errno::ENOENT], false).ends_with("; this machine does not run on Xen"));
    }
}
