//! `tap-ctl commit`, `query` and `cancel`: a merge of images below a disk in use.

use super::{AT_ONCE_S, Ctl, CtlHost, DiskArgs, FOR_EVER_S, Failure, Launch};
use clap::Args;
use serde_json::json;
use tap_control::json::{Job, JobState, Request};
use tap_host::Errno;
use tap_images::parse_size;

#[derive(Args, Clone, Debug)]
pub(super) struct CommitArgs {
    #[command(flatten)]
    disk: DiskArgs,
    /// The image, which is below the disk's own: take a snapshot to merge that
    #[arg(short = 'a', value_name = "TYPE:PATH")]
    image: String,
    /// Its backing file, which must be this one: a command that is repeated then never merges the next one, too
    #[arg(short = 'b', value_name = "PATH")]
    base: String,
    /// Move at most so many bytes in a second, such as 20M
    #[arg(short = 'r', value_name = "SIZE", value_parser = parse_size)]
    rate: Option<u64>,
    /// Wait until it is done, and show progress
    #[arg(short = 'w')]
    wait: bool,
}

/// How often the progress is asked for, in nanoseconds: at first, and later.
const LOOKS_NS: [u64; 2] = [5_000_000, 500_000_000];

impl<H: CtlHost, L: Launch> Ctl<'_, H, L> {
    pub(super) async fn commit(&self, args: &CommitArgs) -> Result<(), Failure> {
        let minor = args.disk.minor.minor;
        let (image, base, rate) = (args.image.clone(), args.base.clone(), args.rate);
        let request = Request::Commit { minor, image, base, rate };
        let mut job: Job = self.tapdisk(args.disk.pid.pid, FOR_EVER_S).json(&request).await?;
        let [mut look_ns, most_ns] = LOOKS_NS;
        while args.wait && job.state == JobState::Running {
            self.host.sleep_ns(look_ns).await;
            look_ns = (2 * look_ns).min(most_ns);
            job = self.tapdisk(args.disk.pid.pid, AT_ONCE_S).json(&Request::Query { minor }).await?;
            if !self.json {
                self.console.progress(job.done_bytes, job.total_bytes);
            }
        }
        if args.wait && job.state == JobState::Ended {
            let words = format!("merge {} below minor {minor}: it was ended; begin it again", job.image);
            return Err(Failure::new(Errno::ECANCELED, words));
        }
        self.tell(&job)
    }

    pub(super) async fn query(&self, disk: DiskArgs) -> Result<(), Failure> {
        let request = Request::Query { minor: disk.minor.minor };
        let job = self.tapdisk(disk.pid.pid, AT_ONCE_S).json(&request).await?;
        self.tell(&job)
    }

    pub(super) async fn cancel(&self, disk: DiskArgs) -> Result<(), Failure> {
        let request = Request::Cancel { minor: disk.minor.minor };
        let job = self.tapdisk(disk.pid.pid, FOR_EVER_S).json(&request).await?;
        self.tell(&job)
    }

    /// Prints what a merge does; one that has failed is a failure.
    fn tell(&self, job: &Job) -> Result<(), Failure> {
        if let Some(error) = &job.error {
            return Err(Failure::new(Errno(error.errno), error.words.clone()));
        }
        let Job { image, base, done_bytes, total_bytes, .. } = job;
        let state = json!(job.state);
        let state = state.as_str().unwrap_or_default();
        let percent = (u128::from(*done_bytes) * 100).checked_div(u128::from(*total_bytes)).unwrap_or(100);
        let words = format!("state={state} done={percent}% image={image} base={base}");
        self.say(&words, &json!(job));
        Ok(())
    }
}
