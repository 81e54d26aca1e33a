//! `tap-ctl set`.

use super::{Ctl, CtlHost, DiskArgs, Failure, Launch};
use clap::Args;
use serde_json::json;
use tap_control::json::{Request, SetFor};

#[derive(Args, Clone, Debug)]
pub(super) struct SetArgs {
    #[command(flatten)]
    disk: DiskArgs,
    /// I/O priority of this disk, until it is closed: realtime[:0-7], best-effort[:0-7], idle, or none for that of the
    /// process
    #[arg(long, value_name = "CLASS[:LEVEL]")]
    ionice: Option<String>,
    /// How long to wait for the tapdisk, in seconds; it may still carry the request out later
    #[arg(short, value_name = "SECONDS", default_value_t = 0)]
    timeout: u32,
}

impl<H: CtlHost, L: Launch> Ctl<'_, H, L> {
    pub(super) async fn set(&self, args: &SetArgs) -> Result<(), Failure> {
        let request = Request::Set { minor: args.disk.minor.minor, ionice: args.ionice.clone() };
        let SetFor { minor, ionice } =
            self.tapdisk(args.disk.pid.pid, args.timeout.into()).json(&request).await?;
        let words = format!("ionice={}", ionice.as_deref().unwrap_or("none"));
        self.say(&words, &json!({ "minor": minor, "ionice": ionice }));
        Ok(())
    }
}
