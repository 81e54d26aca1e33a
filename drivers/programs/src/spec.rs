//! Names of disks.
//!
//! ```text
//!   FORMAT:PATH                 a file or block device, in this format
//!   PATH                        a file whose format is probed, if the command allows that
//!   mason:PATH                  the disk of a graph; mason:NAME@/PATH if it offers several
//!   nbd:ADDRESS                 the default export of an NBD server: nbd:unix:/run/x.sock, nbd:host:10809
//!   nbd://HOST[:PORT]/EXPORT    the syntax of the NBD project
//!   nbd+unix:///EXPORT?socket=PATH
//!   nbds://HOST[:PORT]/EXPORT?tls-certificates=FOLDER[&tls-hostname=NAME]       secured by TLS
//!   nbds+unix:///EXPORT?socket=PATH&tls-certificates=FOLDER[&tls-hostname=NAME]
//! ```
//!
//! Names that blktap's users have written before are in `old_names.rs`.

use crate::old_names;
use rustls::pki_types::ServerName;
use std::fmt;
use std::str::FromStr;
use tap_host::SocketAddress;
use tap_images::{ImageFormat, ImageSpec, SHIPPED, format_called};

/// The port of NBD.
pub const NBD_PORT: u16 = 10809;

/// A disk by name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DiskSpec {
    /// A file.
    Image(ImageSpec),
    /// An export of an NBD server.
    Nbd {
        /// The address of the server.
        address: SocketAddress,
        /// The name of the export; the default one has an empty name.
        export: String,
        /// How the connection is secured.
        tls: Option<TlsSpec>,
    },
    /// A disk of a graph.
    Mason {
        /// The file with the text of the graph.
        path: String,
        /// Which of its disks, if it offers several.
        disk: Option<String>,
    },
}

/// TLS to a server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TlsSpec {
    /// The folder of certificates.
    pub folder: String,
    /// The name that the server's certificate must be for.
    pub name: ServerName<'static>,
}

impl FromStr for DiskSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(today) = old_names::renamed(text)? {
            return Self::from_str(&today);
        }
        for (prefix, secure) in [("nbd+unix://", false), ("nbds+unix://", true)] {
            if let Some(rest) = text.strip_prefix(prefix) {
                return nbd_unix(text, rest, secure);
            }
        }
        if let Some(rest) = text.strip_prefix("nbd://") {
            return nbd_tcp(text, rest);
        }
        if let Some(rest) = text.strip_prefix("nbds://") {
            return nbds_tcp(text, rest);
        }
        if text.starts_with("nbds:") {
            return Err(format!(
                "{text} is no address with TLS: write nbds://HOST/EXPORT?tls-certificates=FOLDER"
            ));
        }
        if let Some(address) = text.strip_prefix("nbd:") {
            return Ok(DiskSpec::Nbd { address: address.parse()?, export: String::new(), tls: None });
        }
        if let Some(rest) = text.strip_prefix("mason:") {
            return mason(text, rest);
        }
        let (format, path) = match text.split_once(':') {
            Some((name, path)) if is_scheme(name) => match format_called(name) {
                Some(format) => (ImageFormat::As(format), path),
                None => return Err(unknown_format(name, text)),
            },
            _ => (ImageFormat::Probe, text),
        };
        if path.is_empty() || path.contains('\0') {
            return Err(format!("'{text}' names no file"));
        }
        Ok(DiskSpec::Image(ImageSpec { format, path: path.to_owned() }))
    }
}

fn unknown_format(name: &str, text: &str) -> String {
    let known: Vec<&str> = SHIPPED.iter().map(|format| format.name()).collect();
    format!(
        "'{name}' is not a known format; there are {}, mason and nbd (a file called that is ./{text})",
        known.join(", ")
    )
}

/// `PATH` or `NAME@/PATH`: what is before the first `@` is the name of a disk if it can be one, and an absolute path
/// follows.
fn mason(text: &str, rest: &str) -> Result<DiskSpec, String> {
    let is_name =
        |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    let (disk, path) = match rest.split_once('@') {
        Some((name, path)) if is_name(name) && path.starts_with('/') => (Some(name.to_owned()), path),
        _ => (None, rest),
    };
    if path.is_empty() || path.contains('\0') {
        return Err(format!("'{text}' names no file"));
    }
    Ok(DiskSpec::Mason { path: path.to_owned(), disk })
}

/// Whether text before a colon is meant as a format, not as a part of a path.
fn is_scheme(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'+' || b == b'-')
}

fn nbd_tcp(text: &str, rest: &str) -> Result<DiskSpec, String> {
    let (host, export) = rest.split_once('/').unwrap_or((rest, ""));
    let has_port = host.rsplit_once(':').is_some_and(|(_, port)| !port.ends_with(']'));
    let address = if has_port { host.to_owned() } else { format!("{host}:{NBD_PORT}") };
    let address = address.parse().map_err(|why| format!("{text}: {why}"))?;
    if matches!(address, SocketAddress::Unix(_)) {
        return Err(format!("{text} names no host (a socket is nbd+unix:///EXPORT?socket=PATH)"));
    }
    Ok(DiskSpec::Nbd { address, export: decoded(export)?, tls: None })
}

fn nbds_tcp(text: &str, rest: &str) -> Result<DiskSpec, String> {
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let DiskSpec::Nbd { address, export, .. } = nbd_tcp(text, place)? else {
        return Err(format!("{text} names no server"));
    };
    let SocketAddress::Tcp { host, .. } = &address else { return Err(format!("{text} names no host")) };
    let tls = Some(tls_of(text, query, host, &[])?);
    Ok(DiskSpec::Nbd { address, export, tls })
}

/// What the query of an address says about TLS; `host` is whom the certificate is for unless it says otherwise.
fn tls_of(text: &str, query: &str, host: &str, others: &[&str]) -> Result<TlsSpec, String> {
    let (mut folder, mut name) = (None, host.to_owned());
    for part in query.split('&').filter(|part| !part.is_empty()) {
        match part.split_once('=') {
            Some(("tls-certificates", value)) => folder = Some(decoded(value)?),
            Some(("tls-hostname", value)) => name = decoded(value)?,
            Some((other, _)) if others.contains(&other) => {}
            // Ignored, it might weaken what the address asks for.
            _ => return Err(format!("{text}: the parameter '{part}' is not known")),
        }
    }
    let folder = folder.filter(|folder| !folder.is_empty() && !folder.contains('\0'));
    let Some(folder) = folder else {
        return Err(format!("{text} names no certificates: add tls-certificates=FOLDER"));
    };
    let name =
        ServerName::try_from(name).map_err(|_| format!("{text}: the name of the server is not valid"))?;
    Ok(TlsSpec { folder, name })
}

fn nbd_unix(text: &str, rest: &str, secure: bool) -> Result<DiskSpec, String> {
    let (export, query) = rest.split_once('?').unwrap_or((rest, ""));
    let socket = query.split('&').find_map(|part| part.strip_prefix("socket="));
    let Some(socket) = socket else {
        let scheme = if secure { "nbds" } else { "nbd" };
        return Err(format!("{text} names no socket: write {scheme}+unix:///EXPORT?socket=PATH"));
    };
    let address = SocketAddress::from_str(&format!("unix:{}", decoded(socket)?))?;
    let tls = if secure { Some(tls_of(text, query, "localhost", &["socket"])?) } else { None };
    Ok(DiskSpec::Nbd { address, export: decoded(export.trim_start_matches('/'))?, tls })
}

/// Decodes the percent encoding of URIs.
fn decoded(text: &str) -> Result<String, String> {
    let bad = || format!("'{text}' is not a valid URI part: a percent sign needs two hexadecimal digits");
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = rest.get(..2).and_then(|d| std::str::from_utf8(d).ok()).ok_or_else(bad)?;
        bytes.push(u8::from_str_radix(digits, 16).map_err(|_| bad())?);
        rest = &rest[2..];
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

impl fmt::Display for DiskSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DiskSpec::Image(image) => match image.format {
                ImageFormat::Probe => f.write_str(&image.path),
                ImageFormat::As(format) => write!(f, "{format}:{}", image.path),
            },
            DiskSpec::Nbd { address, export, tls } => {
                if !export.is_empty() {
                    write!(f, "export '{export}' of ")?;
                }
                write!(f, "{}:{address}", if tls.is_some() { "nbds" } else { "nbd" })
            }
            DiskSpec::Mason { path, disk: None } => write!(f, "mason:{path}"),
            DiskSpec::Mason { path, disk: Some(disk) } => write!(f, "mason:{disk}@{path}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(format: ImageFormat, path: &str) -> DiskSpec {
        DiskSpec::Image(ImageSpec { format, path: path.to_owned() })
    }

    #[test]
    fn every_format_is_a_prefix_of_image_names() {
        for format in SHIPPED {
            for name in [format.name()].iter().chain(format.info().aliases) {
                let spec: DiskSpec = format!("{name}:/a").parse().unwrap();
                assert_eq!(spec, image((*format).into(), "/a"));
                assert_eq!(spec.to_string(), format!("{format}:/a"));
                assert!(format!("{name}:").parse::<DiskSpec>().is_err(), "{name}");
            }
        }
    }

    #[test]
    fn names_of_disks_are_parsed() {
        let unix = |export: &str| DiskSpec::Nbd {
            address: SocketAddress::Unix("/run/x y".into()),
            export: export.into(),
            tls: None,
        };
        let tcp = |port, export: &str| DiskSpec::Nbd {
            address: SocketAddress::Tcp { host: "::1".into(), port },
            export: export.into(),
            tls: None,
        };
        for (text, spec) in [
            ("raw:a:b", image(tap_images::formats::raw::FORMAT.into(), "a:b")),
            ("mason:/a@b", DiskSpec::Mason { path: "/a@b".into(), disk: None }),
            ("mason:a@b", DiskSpec::Mason { path: "a@b".into(), disk: None }),
            ("mason:vm1@/a@b", DiskSpec::Mason { path: "/a@b".into(), disk: Some("vm1".into()) }),
            ("/dev/vg/lv", image(ImageFormat::Probe, "/dev/vg/lv")),
            ("./odd:name", image(ImageFormat::Probe, "./odd:name")),
            ("nbd:unix:/run/x y", unix("")),
            ("nbd+unix:///disk%2F1?socket=/run/x%20y", unix("disk/1")),
            ("nbd://[::1]/", tcp(10809, "")),
            ("nbd://[::1]:7/sda", tcp(7, "sda")),
            ("tap:aio:/a", image(tap_images::formats::raw::FORMAT.into(), "/a")),
            ("tap2:tapdisk:qcow:/a", image(tap_images::formats::qcow::FORMAT.into(), "/a")),
        ] {
            assert_eq!(text.parse(), Ok(spec), "{text}");
        }
        for bad in [
            "",
            "raw:",
            "vhd:/a",
            "nbd:",
            "nbd+unix:///x",
            "nbd://:7/",
            "nbd+unix:///%g?socket=/a",
            "tap:vhd:/a",
        ] {
            assert!(DiskSpec::from_str(bad).is_err(), "{bad}");
        }
        assert!(DiskSpec::from_str("vhd:/a").unwrap_err().contains("not a known format"));
    }

    #[test]
    fn addresses_with_tls_name_certificates_and_whom_they_are_for() {
        for (text, whom, folder, shown) in [
            ("nbds://host/a?tls-certificates=/pki", "host", "/pki", "export 'a' of nbds:tcp:host:10809"),
            ("nbds://[::1]:7?tls-certificates=a%20b", "::1", "a b", "nbds:tcp:[::1]:7"),
            (
                "nbds://1.2.3.4/?tls-hostname=x.example&tls-certificates=p",
                "x.example",
                "p",
                "nbds:tcp:1.2.3.4:10809",
            ),
            ("nbds+unix:///?socket=/s&tls-certificates=p", "localhost", "p", "nbds:unix:/s"),
            (
                "nbds+unix:///a?tls-hostname=me&tls-certificates=p&socket=/s",
                "me",
                "p",
                "export 'a' of nbds:unix:/s",
            ),
        ] {
            let spec: DiskSpec = text.parse().unwrap();
            assert_eq!(spec.to_string(), shown);
            let DiskSpec::Nbd { tls: Some(tls), .. } = spec else { panic!("{text}") };
            assert_eq!((tls.folder, tls.name), (folder.to_owned(), whom.try_into().unwrap()), "{text}");
        }
        for (bad, words) in [
            ("nbds://host/a", "tls-certificates"),
            ("nbds://host/a?tls-certificates=", "tls-certificates"),
            ("nbds://host/a?tls-certificates=p&tls-verify-peer=0", "tls-verify-peer"),
            ("nbds://a_b*c/?tls-certificates=p", "not valid"),
            ("nbds+unix:///?socket=/a", "tls-certificates"),
            ("nbds+unix:///?tls-certificates=p", "socket"),
            ("nbds:unix:/a", "nbds://"),
            ("nbds://unix:a/x?tls-certificates=p", "names no host"),
            ("nbd://unix:a/x", "names no host"),
            ("nbd://./x", "names no host"),
        ] {
            let why = DiskSpec::from_str(bad).unwrap_err();
            assert!(why.contains(words), "{bad}: {why}");
        }
    }
}
