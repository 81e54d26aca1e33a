//! The toolstack's work for a disk: the directories of both ends in xenstore.

use crate::port::XenPort;
use crate::store::Perms;
use tap_host::{DomId, Errno, VbdId, Xenstore};

/// Where the two ends of a disk are in xenstore.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VbdPaths {
    /// The back end's directory.
    pub backend: String,
    /// The front end's directory.
    pub frontend: String,
}

impl VbdPaths {
    /// The directories of `vbd` of `guest`, served by the control domain as device type `kind` ("vbd").
    pub fn new(kind: &str, guest: DomId, vbd: VbdId) -> Self {
        Self {
            backend: format!("/local/domain/0/backend/{kind}/{}/{}", guest.0, vbd.0),
            frontend: format!("/local/domain/{}/device/vbd/{}", guest.0, vbd.0),
        }
    }
}

/// Makes both directories of a disk, with the permissions that xl gives them and both ends in state 1. `toolstack`
/// belongs to the control domain.
///
/// # Errors
/// As xenstore's.
pub async fn attach_vbd(
    toolstack: &XenPort,
    guest: DomId,
    vbd: VbdId,
    paths: &VbdPaths,
    read_only: bool,
) -> Result<(), Errno> {
    let (back, own) = (&paths.backend, toolstack.dom());
    toolstack.write(back, b"").await?;
    toolstack.write(&paths.frontend, b"").await?;
    // Children inherit the permissions that their parent has when they are created.
    toolstack.set_perms(back, Perms::readable(own, guest)).await?;
    toolstack.set_perms(&paths.frontend, Perms::readable(guest, own)).await?;
    let write = async |dir: &str, key: &str, value: &str| {
        toolstack.write(&format!("{dir}/{key}"), value.as_bytes()).await
    };
    write(back, "frontend", &paths.frontend).await?;
    write(back, "frontend-id", &guest.0.to_string()).await?;
    write(back, "online", "1").await?;
    write(back, "mode", if read_only { "r" } else { "w" }).await?;
    write(back, "device-type", "disk").await?;
    write(back, "state", "1").await?;
    write(&paths.frontend, "backend", back).await?;
    write(&paths.frontend, "backend-id", &own.0.to_string()).await?;
    write(&paths.frontend, "virtual-device", &vbd.0.to_string()).await?;
    write(&paths.frontend, "device-type", "disk").await?;
    write(&paths.frontend, "state", "1").await
}

/// Removes both directories.
///
/// # Errors
/// As xenstore's.
pub async fn remove_vbd(toolstack: &XenPort, paths: &VbdPaths) -> Result<(), Errno> {
    toolstack.remove(&paths.frontend).await?;
    toolstack.remove(&paths.backend).await
}
