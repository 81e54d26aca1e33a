//! The verbs that name an image: `open`, `create`, `unpause`.

use super::{AT_ONCE_S, Ctl, CtlHost, DiskArgs, FOR_EVER_S, Failure, Launch, MinorArgs, PidArgs};
use clap::Args;
use serde_json::json;
use tap_abi::tapctl::{Image, Kind, Message, Params, TEXT_BYTES_MAX, Text, flags};
use tap_host::Errno;

/// What to open, and how.
#[derive(Args, Clone, Debug)]
struct ImageArgs {
    /// The image, such as raw:/images/a.raw
    #[arg(short = 'a', value_name = "TYPE:PATH")]
    image: String,
    /// For reading only
    #[arg(short = 'R')]
    read_only: bool,
    /// Through the page cache, without O_DIRECT
    #[arg(short = 'D')]
    cached: bool,
    #[command(flatten)]
    others: Others,
}

/// Options of tapdisk3 that are refused by name.
#[derive(Args, Clone, Debug)]
struct Others {
    /// Read caching into the leaf
    #[arg(short = 'r', hide = true)]
    read_cache: bool,
    /// On the chain of another disk
    #[arg(short = 'e', hide = true, value_name = "MINOR")]
    parent: Option<String>,
    /// A second image
    #[arg(short = '2', hide = true, value_name = "TYPE:PATH")]
    secondary: Option<String>,
    /// Fail over to the second image
    #[arg(short = 's', hide = true)]
    standby: bool,
    /// A log of changed blocks
    #[arg(short = 'C', hide = true, value_name = "FILE")]
    log: Option<String>,
    /// A key from standard input
    #[arg(short = 'E', hide = true)]
    encrypted: bool,
    /// A time limit of requests
    #[arg(short = 't', hide = true, value_name = "SECONDS", default_value_t = 0)]
    timeout: u16,
}

impl Others {
    fn refuse(&self) -> Result<(), Failure> {
        let refused = [
            (self.read_cache, "a cache on local storage (-r)"),
            (self.parent.is_some(), "a disk on the chain of another (-e)"),
            (self.secondary.is_some(), "a second image (-2)"),
            (self.standby, "a second image for when the first is full (-s)"),
            (self.log.is_some(), "a log of changed blocks (-C)"),
            (self.encrypted, "an encrypted image (-E)"),
        ];
        match refused.iter().find(|(set, _)| *set) {
            None => Ok(()),
            Some((_, what)) => Err(Failure::new(Errno::EOPNOTSUPP, format!("open: {what} is not supported"))),
        }
    }
}

#[derive(Args, Clone, Debug)]
pub(super) struct OpenArgs {
    #[command(flatten)]
    disk: DiskArgs,
    #[command(flatten)]
    image: ImageArgs,
}

#[derive(Args, Clone, Debug)]
pub(super) struct CreateArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// Options of `tapdisk control`, behind --
    #[arg(last = true, value_name = "OPTIONS")]
    options: Vec<String>,
}

#[derive(Args, Clone, Debug)]
pub(super) struct UnpauseArgs {
    #[command(flatten)]
    disk: DiskArgs,
    /// Another image in the place of the disk's own
    #[arg(short = 'a', value_name = "TYPE:PATH")]
    image: Option<String>,
    /// A second image
    #[arg(short = '2', hide = true, value_name = "TYPE:PATH")]
    secondary: Option<String>,
    /// A log of changed blocks
    #[arg(short = 'c', hide = true, value_name = "FILE")]
    log: Option<String>,
}

fn text(image: &str) -> Result<Text, Failure> {
    Text::new(image).ok_or_else(|| {
        let words = format!("name the image {image}: the protocol has room for {TEXT_BYTES_MAX} bytes");
        Failure::new(Errno::ENAMETOOLONG, words)
    })
}

impl ImageArgs {
    fn message(&self, minor: u16) -> Result<Message, Failure> {
        self.others.refuse()?;
        let read_only = if self.read_only { flags::RDONLY } else { 0 };
        let cached = if self.cached { flags::NO_O_DIRECT } else { 0 };
        let params = Params {
            flags: (read_only | cached).into(),
            devnum: u32::from(minor).into(),
            path: text(&self.image)?,
            prt_devnum: (-1).into(),
            req_timeout_s: self.others.timeout.into(),
            ..Params::default()
        };
        Ok(Message::with(Kind::Open, minor, &params))
    }
}

impl<H: CtlHost, L: Launch> Ctl<'_, H, L> {
    pub(super) async fn open(&self, args: &OpenArgs) -> Result<(), Failure> {
        let message = args.image.message(args.disk.minor.minor)?;
        let answer = self.tapdisk(args.disk.pid.pid, FOR_EVER_S).call(&message).await?;
        if self.json {
            let image: Image = answer.body();
            let (sectors, size) = (image.sectors.get(), image.sector_size.get());
            self.console.out(&json!({ "sectors": sectors, "sector_size": size }).to_string());
        }
        Ok(())
    }

    pub(super) async fn unpause(&self, args: &UnpauseArgs) -> Result<(), Failure> {
        let refused = [
            (args.secondary.is_some(), "a second image (-2)"),
            (args.log.is_some(), "a log of changed blocks (-c)"),
        ];
        if let Some((_, what)) = refused.iter().find(|(set, _)| *set) {
            return Err(Failure::new(Errno::EOPNOTSUPP, format!("unpause: {what} is not supported")));
        }
        let params = Params { path: text(args.image.as_deref().unwrap_or_default())?, ..Params::default() };
        let message = Message::with(Kind::Resume, args.disk.minor.minor, &params);
        self.tapdisk(args.disk.pid.pid, FOR_EVER_S).call(&message).await?;
        Ok(())
    }

    /// Everything at once. What was begun is taken back when something fails.
    pub(super) async fn create(&self, args: &CreateArgs) -> Result<(), Failure> {
        // Before anything is begun.
        args.image.message(0)?;
        let minor = self.allocate().await?;
        let created = self.create_at(minor, args).await;
        match created {
            Ok(()) => self.say_minor(minor),
            Err(_) => {
                if let Err(second) = self.free(minor).await {
                    self.console.err(&format!("tap-ctl: failed to {}", second.words));
                }
            }
        }
        created
    }

    async fn create_at(&self, minor: u16, args: &CreateArgs) -> Result<(), Failure> {
        let pid = self.spawn(&args.options).await?;
        let disk = DiskArgs { pid: PidArgs { pid }, minor: MinorArgs { minor } };
        if let Err(failure) = self.ask(disk, Kind::Attach, AT_ONCE_S).await {
            // A tapdisk that never had a minor number does not end by itself.
            if let Err(second) = self.tapdisk(pid, AT_ONCE_S).exit().await {
                self.console.err(&format!("tap-ctl: failed to end tapdisk {pid}: {second}"));
            }
            return Err(failure);
        }
        let opened = self.open(&OpenArgs { disk, image: args.image.clone() }).await;
        if opened.is_err()
            && let Err(second) = self.ask(disk, Kind::Detach, AT_ONCE_S).await
        {
            self.console.err(&format!("tap-ctl: failed to {}", second.words));
        }
        opened
    }
}
