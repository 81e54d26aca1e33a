//! `tapdisk serve`: disks as exports of an NBD server.
//!
//! ```text
//!   open every disk ─► listen ─► report it ─► serve ─┬─ asked to stop ───────┬─► answer what is in flight ─► close
//!                                                    └─ the last client left ┘
//! ```

use crate::disk::{
    DiskHost, ImageArgs, disk_summary, memory_summary, open_disk, require_format, stats_summary,
};
use crate::spec::DiskSpec;
use crate::{Console, Tuning, tls};
use clap::Args;
use futures_util::future::join_all;
use std::path::PathBuf;
use std::rc::Rc;
use std::str::FromStr;
use tap_core::{Disks, Listed};
use tap_host::{Budget, Either, Errno, Listener, OpenMode, Signals, SocketAddress, VbdId, select};
use tap_images::Formats;
use tap_nbd::{Export, Server, ServerLimits};

tap_host::listed! {
    pub(super) MARKS: Mark;
    EXPORTS_SERVED = "exports-served", "tapdisk serve listened";
    SERVE_REFUSED = "serve-refused", "tapdisk serve ended because a disk could not be opened";
    LAST_CLIENT_LEFT = "last-client-left", "tapdisk serve ended because its last client had left";
    SERVE_STOPPED = "serve-stopped", "tapdisk serve was asked to stop, and closed its disks";
}

/// The parts of a host that serving uses.
pub trait ServeHost: DiskHost + Signals {}
impl<T: DiskHost + Signals> ServeHost for T {}

/// The command line of `tapdisk serve`. The main carries out `fork` and `pid_file` before there is a host; in a world
/// they have no effect.
#[derive(Args, Clone, Debug)]
pub struct ServeArgs {
    /// Address to listen at, unix:PATH or HOST:PORT; may be repeated. Not needed with sockets from systemd
    #[arg(long, value_name = "ADDRESS")]
    nbd: Vec<SocketAddress>,
    /// Folder for the records of files that lost data, for the next tapdisk; on a tmpfs
    #[arg(long, value_name = "FOLDER", default_value = "/run/tapdisk")]
    pub run_dir: PathBuf,
    #[command(flatten)]
    images: ImageArgs,
    /// Limit of connections at one time
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    connections: u16,
    /// End once the last client has left, as if asked to stop; clients that only list exports do not count
    #[arg(long)]
    end_with_last_client: bool,
    /// Folder of certificates for TLS, which every client must then use: ca-cert.pem, server-cert.pem, server-key.pem
    #[arg(long, value_name = "FOLDER")]
    tls_creds: Option<String>,
    /// Whether clients need a certificate that ca-cert.pem has signed
    #[arg(long, value_name = "yes|no", requires = "tls_creds", default_value = "yes", value_parser = yes_or_no,
          action = clap::ArgAction::Set)]
    tls_verify_peer: bool,
    /// Return once clients can connect, and serve in the background; with the status 1 and a message if that failed
    #[arg(long)]
    pub fork: bool,
    /// File for the number of the serving process; removed at the end
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// The disks: SPEC for a single one, NAME=SPEC for each of several
    #[arg(required = true, value_name = "[NAME=]SPEC")]
    disks: Vec<NamedDisk>,
}

fn yes_or_no(text: &str) -> Result<bool, &'static str> {
    match text {
        "yes" | "on" => Ok(true),
        "no" | "off" => Ok(false),
        _ => Err("it is yes or no"),
    }
}

/// A disk and the name of its export.
#[derive(Clone, PartialEq, Eq, Debug)]
struct NamedDisk {
    name: Option<String>,
    spec: DiskSpec,
}

impl FromStr for NamedDisk {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // A name has no slash and no colon, so that paths and addresses may have equals signs.
        let named = text.split_once('=').filter(|(name, _)| !name.contains(['/', ':']));
        let (name, spec) = match named {
            Some((name, spec)) => (Some(name.to_owned()), spec),
            None => (None, text),
        };
        Ok(Self { name, spec: spec.parse()? })
    }
}

/// Where the lines of the result go.
struct Output<'a> {
    console: &'a dyn Console,
    /// Standard output may belong to someone else.
    quiet: bool,
}

impl Output<'_> {
    fn say(&self, line: &str) {
        if self.quiet { self.console.err(line) } else { self.console.out(line) }
    }
}

/// Runs `tapdisk serve` until it is asked to stop, and returns its exit status.
pub async fn run<H: ServeHost>(
    host: H,
    args: ServeArgs,
    tuning: Tuning,
    disks: &Disks<H>,
    console: &dyn Console,
) -> u8 {
    // Whoever passes a socket may have lent its standard output, too, and expects nothing there but data.
    let inherited = host.inherited();
    let out = Output { console, quiet: !inherited.is_empty() };
    let mut listed = Vec::new();
    let memory = args.images.budget(&tuning);
    let outcome = match args.open(&host, disks, &mut listed, &memory, &tuning).await {
        Ok(exports) => args.serve(&host, disks, (exports, inherited), &out, &memory, &tuning).await,
        Err(why) => {
            host.mark(&SERVE_REFUSED);
            Err(why)
        }
    };
    if outcome.is_ok() {
        for disk in disks.list().0 {
            out.say(&format!("export '{}': {}", disk.name, stats_summary(&disk.stats)));
        }
        out.say(&memory_summary(&memory));
    }
    let mut status = 0;
    if let Err(text) = outcome {
        console.err(&format!("tapdisk: failed to {text}"));
        status = 1;
    }
    for (disk, error) in disks.close_all().await {
        console.err(&format!(
            "tapdisk: failed to close {}: {error}; data written since the last flush may be lost",
            disk.about
        ));
        status = 1;
    }
    status
}

impl ServeArgs {
    /// Opens all disks, puts them in the list, and returns their exports.
    async fn open<H: ServeHost>(
        &self,
        host: &H,
        disks: &Disks<H>,
        listed: &mut Vec<Listed<H>>,
        memory: &Budget,
        tuning: &Tuning,
    ) -> Result<Vec<Export>, String> {
        let mut exports = Vec::new();
        let options = self.images.options(!self.images.read_only, memory, tuning);
        for (disk, id) in self.disks.iter().zip(0..) {
            let name = match &disk.name {
                Some(name) => name.clone(),
                None if self.disks.len() == 1 => String::new(),
                None => return Err(format!("serve {}: several disks need names: NAME=SPEC", disk.spec)),
            };
            require_format(&disk.spec)?;
            let mut place = disks.reserve(&name).map_err(|e| e.to_string())?;
            let (spec, description) = (&disk.spec, disk.spec.to_string());
            let disk = open_disk(&host.apart(), Formats::shipped(), VbdId(id), spec, &options).await;
            let disk = match disk {
                Ok(disk) => Rc::new(disk),
                Err(error) => {
                    let denied = [Some(Errno::EACCES), Some(Errno::EROFS)].contains(&error.errno());
                    let hint = if denied && options.write { kept_out(host, spec).await } else { "" };
                    return Err(format!("{error}{hint}"));
                }
            };
            place.fill(&description, &disk);
            listed.push(place);
            let (node, read_only) = (tuning.disk(spec, disk.node()), self.images.read_only);
            // Not its path, which is none of the clients' business.
            let description = match spec {
                DiskSpec::Image(image) => format!("{} image", image.format.name()),
                DiskSpec::Nbd { .. } => "disk of another server".to_owned(),
                DiskSpec::Mason { .. } => "disk of a graph".to_owned(),
            };
            exports.push(Export { name, description, node, read_only });
        }
        Ok(exports)
    }

    /// The sockets to serve: those that the process was started with, and those of its options.
    async fn listen<H: ServeHost>(
        &self,
        host: &H,
        mut listeners: Vec<H::Listener>,
    ) -> Result<Vec<H::Listener>, String> {
        if listeners.is_empty() && self.nbd.is_empty() {
            return Err(
                "serve: there is no address to listen at; give one with --nbd unix:PATH or --nbd HOST:PORT"
                    .into(),
            );
        }
        for address in &self.nbd {
            let listener = host.listen(address).await.map_err(|error| match error {
                Errno::EADDRINUSE => format!("listen at {address}: {error}; another server is there"),
                Errno::ENOTSOCK => {
                    format!("listen at {address}: {error}; a file or folder is there, choose another path")
                }
                Errno::EHOSTUNREACH => format!("listen at {address}: {error}; no host of this name is known"),
                error => format!("listen at {address}: {error}"),
            })?;
            listeners.push(listener);
        }
        Ok(listeners)
    }

    async fn serve<H: ServeHost>(
        &self,
        host: &H,
        disks: &Disks<H>,
        (exports, inherited): (Vec<Export>, Vec<H::Listener>),
        out: &Output<'_>,
        memory: &Budget,
        tuning: &Tuning,
    ) -> Result<(), String> {
        let limits = ServerLimits { connections: usize::from(self.connections), ..tuning.server };
        let server = match &self.tls_creds {
            Some(folder) => {
                let tls = tls::of_server(host, folder, self.tls_verify_peer).await?;
                Server::with_tls(host.clone(), exports, limits, memory, tls)
            }
            None => Server::new(host.clone(), exports, limits, memory),
        };
        let server = server.map_err(|e| e.to_string())?;
        // Registered before the socket exists: a process that sees the socket may send a signal.
        let stopped = host.asked_to_stop();
        let listeners = self.listen(host, inherited).await?;
        for disk in disks.list().0 {
            out.say(&format!("export '{}': {}", disk.name, disk_summary(&disk)));
        }
        host.mark(&EXPORTS_SERVED);
        let mut accepting = Vec::new();
        for listener in listeners {
            out.say(&format!("listening at {}", listener.address()));
            accepting.push(server.serve(listener));
        }
        out.console.ready();
        let left = async {
            match self.end_with_last_client {
                true => server.left().await,
                false => std::future::pending().await,
            }
        };
        let stop = async {
            match select(stopped, left).await {
                Either::First(_) => host.mark(&SERVE_STOPPED),
                Either::Second(()) => host.mark(&LAST_CLIENT_LEFT),
            }
            server.stop().await;
        };
        futures_util::future::join(join_all(accepting), stop).await;
        Ok(())
    }
}

/// What to do about an image that may not be opened for writing.
async fn kept_out<H: ServeHost>(host: &H, spec: &DiskSpec) -> &'static str {
    let DiskSpec::Image(image) = spec else { return "" };
    match host.open(&image.path, OpenMode::READ).await {
        Ok(_) => "; with --read-only it need not be writable",
        Err(_) => "; nor may it be read: see its permissions, and ProtectHome if this is a service",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_may_have_names() {
        let disk = |text: &str| NamedDisk::from_str(text).unwrap();
        assert_eq!(disk("raw:/a=b").name, None);
        assert_eq!(disk("a=raw:/b=c").name.as_deref(), Some("a"));
        assert_eq!(disk("=raw:/b").name.as_deref(), Some(""));
        assert_eq!(disk("a=raw:/b=c").spec, "raw:/b=c".parse().unwrap());
        assert!(NamedDisk::from_str("a=").is_err());
    }
}
