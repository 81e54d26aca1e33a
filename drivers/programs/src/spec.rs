//! Names of disks.
//!
//! ```text
//!   FORMAT:PATH                 a file or block device, in this format
//!   PATH                        a file whose format is probed, if the command allows that
//!   nbd:ADDRESS                 the default export of an NBD server: nbd:unix:/run/x.sock, nbd:host:10809
//!   nbd://HOST[:PORT]/EXPORT    the syntax of the NBD project
//!   nbd+unix:///EXPORT?socket=PATH
//! ```

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
    },
}

impl FromStr for DiskSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(rest) = text.strip_prefix("nbd+unix://") {
            return nbd_unix(text, rest);
        }
        if let Some(rest) = text.strip_prefix("nbd://") {
            return nbd_tcp(text, rest);
        }
        if text.starts_with("nbds:") || text.starts_with("nbds+") {
            return Err(format!(
                "{text} is NBD with TLS, which is not supported: use nbd:// through a tunnel"
            ));
        }
        if let Some(address) = text.strip_prefix("nbd:") {
            return Ok(DiskSpec::Nbd { address: address.parse()?, export: String::new() });
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
        "'{name}' is not a known format; there are {} and nbd (a file called that is ./{text})",
        known.join(", ")
    )
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
    Ok(DiskSpec::Nbd { address, export: decoded(export)? })
}

fn nbd_unix(text: &str, rest: &str) -> Result<DiskSpec, String> {
    let (export, query) = rest.split_once('?').unwrap_or((rest, ""));
    let socket = query.split('&').find_map(|part| part.strip_prefix("socket="));
    let Some(socket) = socket else {
        return Err(format!("{text} names no socket: write nbd+unix:///EXPORT?socket=PATH"));
    };
    let address = SocketAddress::from_str(&format!("unix:{}", decoded(socket)?))?;
    Ok(DiskSpec::Nbd { address, export: decoded(export.trim_start_matches('/'))? })
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
            DiskSpec::Nbd { address, export } if export.is_empty() => write!(f, "nbd:{address}"),
            DiskSpec::Nbd { address, export } => write!(f, "export '{export}' of nbd:{address}"),
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
        };
        let tcp = |port, export: &str| DiskSpec::Nbd {
            address: SocketAddress::Tcp { host: "::1".into(), port },
            export: export.into(),
        };
        for (text, spec) in [
            ("raw:a:b", image(tap_images::formats::raw::FORMAT.into(), "a:b")),
            ("/dev/vg/lv", image(ImageFormat::Probe, "/dev/vg/lv")),
            ("./odd:name", image(ImageFormat::Probe, "./odd:name")),
            ("nbd:unix:/run/x y", unix("")),
            ("nbd+unix:///disk%2F1?socket=/run/x%20y", unix("disk/1")),
            ("nbd://[::1]/", tcp(10809, "")),
            ("nbd://[::1]:7/sda", tcp(7, "sda")),
        ] {
            assert_eq!(text.parse(), Ok(spec), "{text}");
        }
        for bad in ["", "raw:", "vhd:/a", "nbd:", "nbd+unix:///x", "nbd://:7/", "nbd+unix:///%g?socket=/a"] {
            assert!(DiskSpec::from_str(bad).is_err(), "{bad}");
        }
        assert!(DiskSpec::from_str("vhd:/a").unwrap_err().contains("not a known format"));
        for tls in ["nbds://host/a", "nbds+unix:///?socket=/a"] {
            assert!(DiskSpec::from_str(tls).unwrap_err().contains("TLS"), "{tls}");
        }
    }
}
