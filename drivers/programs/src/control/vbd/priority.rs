//! The I/O priority of one disk: of every operation on every file of its chain, also of those that are opened later,
//! until the disk is closed.
//!
//! The files of a disk are a group of the host ([`Files::apart`](tap_host::Files::apart)), and whatever opens one of
//! them does so through [`Open::files`](super::Open). So there is nothing to walk, and nothing to set again.

use super::{ControlledHost, Open, Vbd};
use crate::control::settings::Settings;
use crate::spec::DiskSpec;
use tap_control::Refusal;
use tap_control::json::{Happened, SetFor};
use tap_host::Errno;

tap_host::listed! {
    pub(super) BUGS: Bug;
    PRIORITY_LOST = "priority-lost", "a disk that is resumed goes on without its I/O priority";
    PRIORITY_SHARED = "priority-shared", "a disk has the I/O priority that was set for another one";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    PRIORITY_SET = "priority-set", "a disk has got an I/O priority of its own";
    PRIORITY_REFUSED = "priority-refused", "a disk has not got an I/O priority that the process may not have";
}

/// What stands for the priority of the process.
const NONE: &str = "none";

/// A host for the files of one more disk.
pub(super) fn files_of_disk<H: ControlledHost>(host: &H) -> H {
    if host.bug(&PRIORITY_SHARED) { host.clone() } else { host.apart() }
}

impl<H: ControlledHost> Open<H> {
    /// A host for the files that the disk goes on with.
    pub(super) fn files_to_resume(&self, settings: &Settings<H>) -> H {
        if settings.host.bug(&PRIORITY_LOST) { settings.host.clone() } else { self.files.clone() }
    }
}

impl<H: ControlledHost> Vbd<H> {
    /// Sets what is given, and says what holds then.
    pub(in crate::control) async fn set(
        &self,
        settings: &Settings<H>,
        ionice: Option<&str>,
    ) -> Result<SetFor, Refusal> {
        let what = format!("set the priority of minor {}", self.minor);
        let open = self.opened(&what)?;
        let Some(text) = ionice else { return Ok(self.set_for(&open)) };
        let asked = match text {
            NONE => None,
            text => {
                let asked = text.parse();
                Some(asked.map_err(|why| Refusal::new(Errno::EINVAL, format!("{what}: {why}, or {NONE}")))?)
            }
        };
        if let Ok(DiskSpec::Nbd { .. }) = open.name.borrow().parse() {
            let words =
                format!("{what}: its image is the export of another server, which has its own priority");
            return Err(Refusal::new(Errno::EOPNOTSUPP, words));
        }
        if let Err(error) = open.files.set_priority(asked).await {
            settings.host.mark(&PRIORITY_REFUSED);
            let hint = if error == Errno::EPERM { "; the tapdisk needs CAP_SYS_NICE for it" } else { "" };
            return Err(Refusal::new(error, format!("{what} to {text}: {error}{hint}")));
        }
        settings.host.mark(&PRIORITY_SET);
        self.tell(settings, Happened::Set);
        Ok(self.set_for(&open))
    }

    fn set_for(&self, open: &Open<H>) -> SetFor {
        SetFor { minor: self.minor, ionice: open.ionice() }
    }
}

impl<H: ControlledHost> Open<H> {
    /// The priority that was set.
    pub(super) fn ionice(&self) -> Option<String> {
        self.files.priority().map(|priority| priority.to_string())
    }
}
