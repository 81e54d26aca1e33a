//! What tap-ctl asks to be opened, in terms of disks.

use crate::spec::DiskSpec;
use tap_abi::tapctl::{Params, TEXT_BYTES_MAX, flags};
use tap_control::Refusal;
use tap_host::Errno;

/// What a flag that cannot be had stands for, and the option of tap-ctl that sets it.
const REFUSED: [(u32, &str); 8] = [
    (flags::SHARED, "an image that others write at the same time"),
    (flags::ADD_CACHE, "a cache in memory"),
    (flags::VHD_INDEX, "an index of a VHD"),
    (flags::ADD_LOG, "a log of changed blocks (-C)"),
    (flags::ADD_LCACHE, "a cache on local storage (-r)"),
    (flags::REUSE_PRT, "a disk on the chain of another (-e)"),
    (flags::SECONDARY | flags::STANDBY, "a second image (-2, -s)"),
    (flags::OPEN_ENCRYPTED, "an encrypted image (-E)"),
];

/// What is to be opened, and how.
pub(super) struct Asked {
    /// TYPE:PATH as it was given; empty for the same one.
    pub name: String,
    pub read_only: bool,
    pub direct: bool,
}

impl Asked {
    /// What `params` ask for in a request to `what` ("open minor 5").
    pub(super) fn of(params: &Params, what: &str) -> Result<Self, Refusal> {
        let set = params.flags.get();
        if let Some((_, words)) = REFUSED.iter().find(|(flag, _)| set & flag != 0) {
            return Err(Refusal::new(Errno::EOPNOTSUPP, format!("{what}: {words} is not supported")));
        }
        let known = flags::RDONLY | flags::NO_O_DIRECT;
        if set & !known != 0 {
            return Err(Refusal::new(Errno::EINVAL, format!("{what}: the flags {set:#x} are not known")));
        }
        let name = params.path.as_str().ok_or_else(|| too_long(what))?.to_owned();
        check_name(&name, what)?;
        let (read_only, direct) = (set & flags::RDONLY != 0, set & flags::NO_O_DIRECT == 0);
        Ok(Self { name, read_only, direct })
    }
}

fn too_long(what: &str) -> Refusal {
    let words = format!("{what}: the image's name has more than {TEXT_BYTES_MAX} bytes, or is no text");
    Refusal::new(Errno::ENAMETOOLONG, words)
}

/// Whether an image may have this name: the protocol of tap-ctl has room for it, and it can be shown.
///
/// # Errors
/// `ENAMETOOLONG`, `EINVAL`.
pub(super) fn check_name(name: &str, what: &str) -> Result<(), Refusal> {
    // One of 255 bytes may have been cut by the program that sent it.
    if name.len() > TEXT_BYTES_MAX {
        return Err(too_long(what));
    }
    // A list has a line for each disk, and a terminal obeys some of them.
    if name.chars().any(char::is_control) {
        let words = format!("{what}: the image's name {name:?} has control characters");
        return Err(Refusal::new(Errno::EINVAL, words));
    }
    Ok(())
}

/// The disk that `name`, TYPE:PATH, stands for.
pub(super) fn spec_of(name: &str, what: &str) -> Result<DiskSpec, Refusal> {
    let spec: Result<DiskSpec, String> = name.parse();
    let spec = spec.map_err(|why| Refusal::new(Errno::EINVAL, format!("{what}: {why}")))?;
    crate::disk::require_format(&spec).map_err(|_| {
        Refusal::new(Errno::EINVAL, format!("{what}: name the format of {name}, as in raw:{name}"))
    })?;
    Ok(spec)
}
