//! Paths: `/local/domain/5/device`, or relative to the caller's own directory.

use tap_host::{DomId, Errno};

/// Longest path in bytes, without a leading `/local/domain/N/`.
const PATH_BYTES_MAX: usize = 2048;

/// The absolute form of `path`, as used by `dom`.
pub(crate) fn absolute(dom: DomId, path: &str) -> Result<String, Errno> {
    let legal = |c: u8| c.is_ascii_alphanumeric() || b"-/_@".contains(&c);
    let whole = match path.as_bytes().first() {
        None => return Err(Errno::EINVAL),
        Some(b'/') => path.into(),
        Some(_) => format!("/local/domain/{}/{path}", dom.0),
    };
    if within_domain(&whole).unwrap_or(&whole).len() > PATH_BYTES_MAX || !path.bytes().all(legal) {
        return Err(Errno::EINVAL);
    }
    if path != "/" && (path.ends_with('/') || path.contains("//")) {
        return Err(Errno::EINVAL);
    }
    Ok(whole)
}

/// What follows `/local/domain/N/`.
fn within_domain(path: &str) -> Option<&str> {
    let (number, rest) = path.strip_prefix("/local/domain/")?.split_once('/')?;
    number.parse::<u16>().is_ok().then_some(rest)
}

/// The directory that holds `path`; the root's is itself.
pub(crate) fn parent(path: &str) -> &str {
    match path.rfind('/') {
        None | Some(0) => "/",
        Some(at) => &path[..at],
    }
}

/// The last part of `path`.
pub(crate) fn name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or("")
}

/// Whether `path` is `top` or lies below it.
pub(crate) fn within(path: &str, top: &str) -> bool {
    if top == "/" {
        return path.starts_with('/');
    }
    path.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The path of `top`'s child `name`.
pub(crate) fn child(top: &str, name: &str) -> String {
    if top == "/" { format!("/{name}") } else { format!("{top}/{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_checked_and_made_absolute() {
        let dom = DomId(3);
        assert_eq!(absolute(dom, "/a/b").unwrap(), "/a/b");
        assert_eq!(absolute(dom, "device/vbd").unwrap(), "/local/domain/3/device/vbd");
        assert_eq!(absolute(dom, "/").unwrap(), "/");
        for bad in ["", "/a/", "//a", "/a//b", "/a b", "/a\0", "/ä"] {
            assert_eq!(absolute(dom, bad), Err(Errno::EINVAL), "{bad:?}");
        }
    }

    /// Observed with the xenstored of Xen 4.17.
    #[test]
    fn a_domains_directory_does_not_count() {
        for prefix in
            ["/", "/a/", "/local/domain/", "/local/domains/77/", "/local/domain/0/", "/local/domain/77/", ""]
        {
            let counted = if within_domain(&format!("{prefix}a")).is_some() { 0 } else { prefix.len() };
            let path = |len: usize| format!("{prefix}{}", "n".repeat(len - counted));
            assert!(absolute(DomId(3), &path(2048)).is_ok(), "{prefix}");
            assert_eq!(absolute(DomId(3), &path(2049)), Err(Errno::EINVAL), "{prefix}");
        }
    }

    #[test]
    fn kinship() {
        assert_eq!((parent("/a/b"), parent("/a"), parent("/")), ("/a", "/", "/"));
        assert_eq!((name("/a/b"), child("/", "a"), child("/a", "b")), ("b", "/a".into(), "/a/b".into()));
        assert!(within("/a/b", "/a") && within("/a", "/a") && within("/a", "/"));
        assert!(!within("/ab", "/a") && !within("/a", "/a/b"));
    }
}
