//! Names of disks as blktap's users have written them since 2006, in terms of today's.
//!
//! ```text
//!   tap:aio:PATH  tap2:aio:PATH  tap:tapdisk:aio:PATH  aio:PATH      raw:PATH
//!   tap:qcow:PATH  ...                                               qcow:PATH
//!   tap:ioemu:PATH                                                   QEMU's business
//!   tap2:remus:HOST:PORT|aio:PATH  x-chain:...                       stacks of drivers, refused
//! ```
//!
//! They are accepted, with a line that shows the new form (`notes`).

/// What xend, xl and blktapctrl write before a type.
const PREFIXES: [&str; 2] = ["tap:", "tap2:"];
/// What may stand between prefix and type.
const PROGRAM: &str = "tapdisk:";
/// Old names of types that have another name now.
const RENAMED: [(&str, &str); 2] = [("aio:", "raw:"), ("sync:", "raw:")];

/// The name of today for `text`; `None` if that is one already.
///
/// # Errors
/// Why an old name cannot be used, and what can.
pub(crate) fn renamed(text: &str) -> Result<Option<String>, String> {
    if text.starts_with("x-chain:") {
        return Err(format!(
            "{text}: chains of drivers are not supported; name the disk alone, like raw:/images/a.img"
        ));
    }
    let stripped = PREFIXES.iter().find_map(|prefix| text.strip_prefix(prefix));
    let rest = stripped.unwrap_or(text);
    let rest = if stripped.is_some() { rest.strip_prefix(PROGRAM).unwrap_or(rest) } else { rest };
    let renamed = RENAMED.iter().find_map(|(old, new)| Some(format!("{new}{}", rest.strip_prefix(old)?)));
    if stripped.is_none() {
        return Ok(renamed);
    }
    if rest.contains('|') {
        return Err(format!(
            "{text}: stacks of drivers are not supported; name the disk alone, like raw:/images/a.img"
        ));
    }
    if let Some(path) = rest.strip_prefix("ioemu:") {
        return Err(format!(
            "{text}: QEMU serves such disks; in xl's configuration write 'format=raw, vdev=xvda, access=rw, \
             backendtype=qdisk, target={path}'"
        ));
    }
    Ok(Some(renamed.unwrap_or_else(|| rest.to_owned())))
}

/// A line for each of `arguments` that has an old name: what to write instead.
pub(crate) fn notes<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    arguments.into_iter().filter_map(note).collect()
}

/// The line for one argument: the name of a disk, perhaps after a name and an equals sign.
pub(crate) fn note(argument: &str) -> Option<String> {
    let of = |text: &str| Some((text.to_owned(), renamed(text).ok()??));
    let (old, new) = of(argument).or_else(|| of(argument.split_once('=')?.1))?;
    Some(format!("warning: '{old}' is an old name; write {new}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_names_have_a_new_form() {
        for (old, new) in [
            ("tap:aio:/a:b", "raw:/a:b"),
            ("tap2:aio:/a", "raw:/a"),
            ("tap:tapdisk:aio:/a", "raw:/a"),
            ("tap2:tapdisk:qcow:/a", "qcow:/a"),
            ("tap:qcow:/a", "qcow:/a"),
            ("tap2:vhd:/a", "vhd:/a"),
            ("aio:/a", "raw:/a"),
            ("sync:/a", "raw:/a"),
        ] {
            assert_eq!(renamed(old), Ok(Some(new.to_owned())), "{old}");
        }
        for name in ["raw:/a", "qcow:/a|b", "/tap:aio:/a", "tapdisk:aio:/a", "nbd:h:1", "tap2", ""] {
            assert_eq!(renamed(name), Ok(None), "{name}");
        }
    }

    #[test]
    fn what_needs_another_program_or_a_stack_is_refused_by_name() {
        for (old, words) in [
            ("tap:ioemu:/a", "backendtype=qdisk, target=/a'"),
            ("tap2:remus:host:9000|aio:/a", "stacks of drivers"),
            ("tap:tapdisk:log:x|aio:/a", "stacks of drivers"),
            ("x-chain:/a", "chains of drivers"),
        ] {
            let why = renamed(old).unwrap_err();
            assert!(why.starts_with(old) && why.contains(words), "{why}");
            assert_eq!(note(old), None, "it is an error instead");
        }
    }

    #[test]
    fn a_line_shows_what_to_write() {
        let all = ["xen", "--run-dir", "3/xvda=tap:aio:/a", "disk=aio:/b", "raw:/c", "a=b=c"];
        assert_eq!(
            notes(all),
            [
                "warning: 'tap:aio:/a' is an old name; write raw:/a",
                "warning: 'aio:/b' is an old name; write raw:/b"
            ]
        );
    }
}
