//! `tap-ctl snapshot`.

use super::{Ctl, CtlHost, DiskArgs, Failure, Launch};
use clap::Args;
use serde_json::json;
use tap_control::json::{Request, Taken};

#[derive(Args, Clone, Debug)]
pub(super) struct SnapshotArgs {
    #[command(flatten)]
    disk: DiskArgs,
    /// The disk keeps its name, and its content so far gets this path, on the same file system
    #[arg(short = 'k', value_name = "PATH", required_unless_present = "image", conflicts_with = "image")]
    keep: Option<String>,
    /// The disk goes on with this image, which is made above its own
    #[arg(short = 'a', value_name = "TYPE:PATH")]
    image: Option<String>,
    /// How long to wait for the tapdisk, in seconds; it may still carry the request out later
    #[arg(short, value_name = "SECONDS", default_value_t = 0)]
    timeout: u32,
}

impl<H: CtlHost, L: Launch> Ctl<'_, H, L> {
    pub(super) async fn snapshot(&self, args: &SnapshotArgs) -> Result<(), Failure> {
        let request = Request::Snapshot {
            minor: args.disk.minor.minor,
            keep: args.keep.clone(),
            image: args.image.clone(),
        };
        let Taken { image, base } =
            self.tapdisk(args.disk.pid.pid, args.timeout.into()).json(&request).await?;
        self.say(&format!("image={image} base={base}"), &json!({ "image": image, "base": base }));
        Ok(())
    }
}
