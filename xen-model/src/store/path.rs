//! Paths: `/local/domain/5/device`, or relative to the caller's own directory.

use tap_host::{DomId, Errno};

/// Longest absolute path in bytes.
const MAX_ABSOLUTE: usize = 3072;
/// Longest relative path in bytes.
const MAX_RELATIVE: usize = 2048;

/// The absolute form of `path` as `dom` means it.
pub(crate) fn absolute(dom: DomId, path: &str) -> Result<String, Errno> {
    let limit = if path.starts_with('/') { MAX_ABSOLUTE } else { MAX_RELATIVE };
    let legal = |c: u8| c.is_ascii_alphanumeric() || b"-/_@".contains(&c);
    if path.is_empty() || path.len() > limit || !path.bytes().all(legal) {
        return Err(Errno::EINVAL);
    }
    if path == "/" {
        return Ok(path.into());
    }
    if path.ends_with('/') || path.contains("//") {
        return Err(Errno::EINVAL);
    }
    match path.as_bytes()[0] {
        b'/' => Ok(path.into()),
        _ => Ok(format!("/local/domain/{}/{path}", dom.0)),
    }
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
        assert!(absolute(dom, &format!("/{}", "a".repeat(3071))).is_ok());
        assert!(absolute(dom, &format!("/{}", "a".repeat(3072))).is_err());
        assert!(absolute(dom, &"a".repeat(2049)).is_err());
    }

    #[test]
    fn kinship() {
        assert_eq!((parent("/a/b"), parent("/a"), parent("/")), ("/a", "/", "/"));
        assert_eq!((name("/a/b"), child("/", "a"), child("/a", "b")), ("b", "/a".into(), "/a/b".into()));
        assert!(within("/a/b", "/a") && within("/a", "/a") && within("/a", "/"));
        assert!(!within("/ab", "/a") && !within("/a", "/a/b"));
    }
}
