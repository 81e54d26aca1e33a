//! `tap-ctl top`: what disks did in the last seconds.

mod rates;
mod table;

use super::list::ASKED_AT_ONCE_MAX;
use super::{Ctl, CtlHost, Failure, Launch};
use clap::Args;
use futures_util::stream::{self, StreamExt};
use rates::{Load, Sample, loads};
use serde::Serialize;
use serde_json::json;
use tap_control::client::CallError;
use tap_control::json::{Disks, Request, Stats};
use tap_host::{Errno, unless};

tap_host::listed! {
    pub(super) BUGS: Bug with [rates::BUGS];
}

tap_host::listed! {
    pub(super) MARKS: Mark with [rates::MARKS];
    TOP_SHOWN = "top-shown", "tap-ctl showed what disks did in an interval";
}

#[derive(Args, Clone, Copy, Debug)]
pub(super) struct TopArgs {
    /// Only the disks of this tapdisk, until it ends; without it of all, also of those that start later
    #[arg(short, value_name = "PID")]
    pid: Option<u32>,
    /// How long an interval is, in seconds
    #[arg(short, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    interval: u32,
    /// How many intervals to show; without it until it is interrupted
    #[arg(short = 'n', value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    count: Option<u32>,
}

/// How long to wait for the counters of a tapdisk, in seconds: others are shown meanwhile only as they were.
const LIMIT_S: u64 = 5;
/// Has a terminal show what follows from its first line on, on an empty screen.
const FROM_THE_TOP: &str = "\u{1b}[H\u{1b}[J";

/// An interval, for programs.
#[derive(Serialize)]
struct Shown<'a> {
    disks: &'a [Load],
    silent: &'a [u32],
}

/// The counters of several tapdisks.
#[derive(Default)]
struct Samples {
    all: Vec<Sample>,
    /// Those that did not answer.
    silent: Vec<u32>,
}

impl<H: CtlHost, L: Launch> Ctl<'_, H, L> {
    /// Shows interval after interval, until there are as many as asked for, it is interrupted, its reader has gone, or
    /// the only tapdisk has ended.
    pub(super) async fn top(&self, args: TopArgs) -> Result<(), Failure> {
        let stopped = self.host.asked_to_stop();
        unless(stopped, self.intervals(args)).await.unwrap_or(Ok(()))
    }

    async fn intervals(&self, args: TopArgs) -> Result<(), Failure> {
        let mut before = self.samples(args.pid).await?;
        let mut shown = 0;
        while args.count.is_none_or(|count| shown < count) && self.console.is_read() {
            self.host.sleep_ns(u64::from(args.interval) * 1_000_000_000).await;
            let after = match self.samples(args.pid).await {
                Ok(after) => after,
                Err(failure) if is_gone(failure.error) => return Ok(()),
                Err(failure) => return Err(failure),
            };
            self.show(&loads(self.host, &before.all, &after.all), &after.silent);
            self.host.mark(&TOP_SHOWN);
            (before, shown) = (after, shown + 1);
        }
        Ok(())
    }

    fn show(&self, loads: &[Load], silent: &[u32]) {
        if self.json {
            return self.console.out(&json!(Shown { disks: loads, silent }).to_string());
        }
        let mut text = table::lines(loads);
        text.extend(silent.iter().map(|pid| format!("{pid:>8} does not answer")));
        match self.console.is_terminal() {
            true => self.console.out(&format!("{FROM_THE_TOP}{}", text.join("\n"))),
            // Blocks, with a line between them.
            false => text.iter().chain([&String::new()]).for_each(|line| self.console.out(line)),
        }
    }

    /// The counters of one tapdisk, or of all.
    async fn samples(&self, pid: Option<u32>) -> Result<Samples, Failure> {
        if let Some(pid) = pid {
            return Ok(Samples { all: vec![self.sample(pid).await?], silent: Vec::new() });
        }
        let asked = self.pids().await?.into_iter().map(|pid| async move { (pid, self.sample(pid).await) });
        let mut answers: Vec<_> = stream::iter(asked).buffer_unordered(ASKED_AT_ONCE_MAX).collect().await;
        answers.sort_by_key(|(pid, _)| *pid);
        let mut samples = Samples::default();
        for (pid, answer) in answers {
            match answer {
                Ok(sample) => samples.all.push(sample),
                // It has ended, or it is a tapdisk3.
                Err(error) if is_gone(error.errno()) => {}
                Err(_) => samples.silent.push(pid),
            }
        }
        Ok(samples)
    }

    async fn sample(&self, pid: u32) -> Result<Sample, CallError> {
        let counted: Disks<Stats> = self.tapdisk(pid, LIMIT_S).json(&Request::Stats { minor: None }).await?;
        Ok(Sample { pid, at_ns: self.host.now_ns(), disks: counted.disks })
    }
}

/// Whether the error of a call says that the tapdisk has ended.
fn is_gone(error: Errno) -> bool {
    [Errno::ECONNREFUSED, Errno::ENOENT, Errno::ECONNRESET, Errno::EPIPE].contains(&error)
}
