//! `tap-ctl resize`.

use super::{AT_ONCE_S, Ctl, CtlHost, DiskArgs, Failure, Launch};
use crate::size::NewSize;
use clap::Args;
use serde_json::json;
use tap_control::json::{Disk, Disks, Request, Resized};
use tap_host::{Errno, SECTOR_BYTES};

#[derive(Args, Clone, Debug)]
pub(super) struct ResizeArgs {
    #[command(flatten)]
    disk: DiskArgs,
    /// New size of the disk, such as 20G, or what it grows by, such as +5G
    #[arg(short, value_name = "SIZE", value_parser = NewSize::parse)]
    size: NewSize,
    /// How long to wait for the tapdisk, in seconds; it may still carry the request out later
    #[arg(short, value_name = "SECONDS", default_value_t = 0)]
    timeout: u32,
}

impl<H: CtlHost, L: Launch> Ctl<'_, H, L> {
    pub(super) async fn resize(&self, args: &ResizeArgs) -> Result<(), Failure> {
        let (pid, minor) = (args.disk.pid.pid, args.disk.minor.minor);
        let have_bytes = match args.size {
            NewSize::To(_) => 0,
            NewSize::By(_) => self.size_of(pid, minor).await?,
        };
        let size_bytes = args
            .size
            .of(have_bytes)
            .map_err(|why| Failure::new(Errno::EINVAL, format!("resize minor {minor}: {why}")))?;
        let request = Request::Resize { minor, size_bytes };
        let Resized { minor, size_sectors } = self.tapdisk(pid, args.timeout.into()).json(&request).await?;
        self.say(
            &format!("size={}", size_sectors.saturating_mul(SECTOR_BYTES)),
            &json!({ "minor": minor, "size_sectors": size_sectors }),
        );
        Ok(())
    }

    /// The size of a disk, in bytes.
    async fn size_of(&self, pid: u32, minor: u16) -> Result<u64, Failure> {
        let list: Disks<Disk> = self.tapdisk(pid, AT_ONCE_S).json(&Request::List {}).await?;
        let disk = list.disks.into_iter().find(|disk| disk.minor == minor);
        let sectors = disk.and_then(|disk| disk.size_sectors);
        let none = || Failure::new(Errno::EINVAL, format!("resize minor {minor}: it has no image open"));
        Ok(sectors.ok_or_else(none)?.saturating_mul(SECTOR_BYTES))
    }
}
