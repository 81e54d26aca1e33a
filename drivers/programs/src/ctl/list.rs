//! `tap-ctl list`.

use super::{AT_ONCE_S, Ctl, CtlHost, Failure, Launch};
use clap::Args;
use futures_util::stream::{self, StreamExt};
use serde_json::{Value, json};
use tap_abi::tapctl::Entry;
use tap_control::client::CallError;
use tap_control::pid_of;
use tap_host::{Errno, Files};

tap_host::listed! {
    pub(super) BUGS: Bug;
    LIST_ONE_BY_ONE = "list-one-by-one", "a list asks a tapdisk only after the one before has answered";
    LIST_AS_ANSWERED = "list-as-answered", "a list has tapdisks in the order in which they answered";
}

tap_host::listed! {
    pub(super) MARKS: Mark;
    LIST_SILENT = "list-silent", "a tapdisk did not answer in time when it was asked for its disks";
}

/// How many tapdisks are asked at the same time; those that hang hold up nobody until there are as many.
pub(super) const ASKED_AT_ONCE_MAX: usize = 64;

#[derive(Args, Clone, Debug)]
pub(super) struct ListArgs {
    /// Only this tapdisk
    #[arg(short, value_name = "PID")]
    pid: Option<u32>,
    /// Only this minor number
    #[arg(short, value_name = "MINOR")]
    minor: Option<u16>,
    /// Only disks of this type
    #[arg(short = 't', value_name = "TYPE")]
    kind: Option<String>,
    /// Only disks of this file
    #[arg(short, value_name = "FILE")]
    file: Option<String>,
}

/// A line: a disk, a tapdisk without one, or a minor number without a tapdisk.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Row {
    pid: Option<u32>,
    minor: Option<u16>,
    state: Option<i32>,
    /// Type and path of the image, if one is open.
    args: Option<(String, String)>,
}

impl Row {
    fn of(pid: u32, entry: &Entry) -> Self {
        let args = entry.path.as_str().and_then(|text| text.split_once(':'));
        // Other tapdisks open any name.
        let args = args.map(|(kind, path)| (printable(kind), printable(path)));
        Self {
            pid: Some(pid),
            minor: u16::try_from(entry.minor.get()).ok(),
            state: Some(entry.state.get()),
            args,
        }
    }

    fn matches(&self, args: &ListArgs) -> bool {
        let of = |part: fn(&(String, String)) -> &String| self.args.as_ref().map(part);
        args.pid.is_none_or(|pid| self.pid == Some(pid))
            && args.minor.is_none_or(|minor| self.minor == Some(minor))
            && args.kind.as_ref().is_none_or(|kind| of(|args| &args.0) == Some(kind))
            && args.file.as_ref().is_none_or(|file| of(|args| &args.1) == Some(file))
    }

    /// Fields with their names, as programs read them.
    fn fields(&self) -> String {
        let parts = [
            self.pid.map(|pid| format!("pid={pid}")),
            self.minor.map(|minor| format!("minor={minor}")),
            self.state.map(|state| format!("state={}", hex(state))),
            self.args.as_ref().map(|(kind, path)| format!("args={kind}:{path}")),
        ];
        parts.into_iter().flatten().collect::<Vec<_>>().join(" ")
    }

    /// Columns, for people.
    fn columns(&self) -> String {
        let shown = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let [pid, minor, state] = [
            shown(self.pid.map(|pid| pid.to_string())),
            shown(self.minor.map(|minor| minor.to_string())),
            shown(self.state.map(hex)),
        ];
        let (kind, path) = self.args.clone().unwrap_or_else(|| ("-".to_owned(), "-".to_owned()));
        format!("{pid:>8} {minor:>4} {state:>4} {kind:>10} {path}")
    }

    fn json(&self) -> Value {
        let args = self.args.as_ref();
        json!({
            "pid": self.pid,
            "minor": self.minor,
            "state": self.state,
            "type": args.map(|(kind, _)| kind),
            "file": args.map(|(_, path)| path),
        })
    }
}

/// `text` in one line.
pub(super) fn printable(text: &str) -> String {
    let mut shown = String::new();
    for char in text.chars() {
        match char.is_control() {
            true => shown.extend(char.escape_default()),
            false => shown.push(char),
        }
    }
    shown
}

/// As printf's `%#x` shows it.
fn hex(state: i32) -> String {
    if state == 0 { "0".to_owned() } else { format!("{state:#x}") }
}

/// The process numbers of the tapdisks that have a control socket in `folder`, in order; none if there is no folder.
///
/// # Errors
/// As listing it.
pub(crate) async fn pids_in<H: Files>(host: &H, folder: &str) -> Result<Vec<u32>, Errno> {
    let names = match host.names_in(folder).await {
        Err(Errno::ENOENT) => Vec::new(),
        names => names?,
    };
    let mut pids: Vec<u32> = names.iter().filter_map(|name| pid_of(name)).collect();
    pids.sort_unstable();
    Ok(pids)
}

impl<H: CtlHost, L: Launch> Ctl<'_, H, L> {
    pub(super) async fn list(&self, args: &ListArgs) -> Result<(), Failure> {
        let rows: Vec<Row> = self.rows().await?.into_iter().filter(|row| row.matches(args)).collect();
        if self.json {
            self.console.out(&Value::from_iter(rows.iter().map(Row::json)).to_string());
            return Ok(());
        }
        let show = if self.console.is_terminal() { Row::columns } else { Row::fields };
        rows.iter().for_each(|row| self.console.out(&show(row)));
        Ok(())
    }

    /// The process numbers of the tapdisks that have a control socket, in order.
    pub(super) async fn pids(&self) -> Result<Vec<u32>, Failure> {
        let pids = pids_in(self.host, &self.folder).await;
        pids.map_err(|error| Failure::new(error, format!("list {}: {error}", self.folder)))
    }

    /// Every disk, every tapdisk without one, and every minor number without a tapdisk.
    async fn rows(&self) -> Result<Vec<Row>, Failure> {
        let pids = self.pids().await?;
        let at_once = if self.host.bug(&LIST_ONE_BY_ONE) { 1 } else { ASKED_AT_ONCE_MAX };
        let asked =
            pids.into_iter().map(|pid| async move { (pid, self.tapdisk(pid, AT_ONCE_S).list().await) });
        let mut answers: Vec<_> = stream::iter(asked).buffer_unordered(at_once).collect().await;
        if !self.host.bug(&LIST_AS_ANSWERED) {
            answers.sort_by_key(|(pid, _)| *pid);
        }
        let mut rows = Vec::new();
        for (pid, answer) in answers {
            match answer {
                Ok(disks) if disks.is_empty() => rows.push(Row { pid: Some(pid), ..Row::default() }),
                Ok(disks) => rows.extend(disks.iter().map(|entry| Row::of(pid, entry))),
                // What it leaves behind when it is killed, or it has just ended.
                Err(CallError::Connect { error: Errno::ECONNREFUSED | Errno::ENOENT, .. }) => {}
                Err(error) => {
                    if error.errno() == Errno::ETIME {
                        self.host.mark(&LIST_SILENT);
                    }
                    let errno = error.errno();
                    self.console.err(&format!("tap-ctl: failed to list tapdisk {pid} ({errno:?}): {error}"));
                    rows.push(Row { pid: Some(pid), ..Row::default() });
                }
            }
        }
        let served: Vec<u16> = rows.iter().filter_map(|row| row.minor).collect();
        let alone = self.minors().await?.into_iter().filter(|minor| !served.contains(minor));
        rows.extend(alone.map(|minor| Row { minor: Some(minor), ..Row::default() }));
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tap_abi::tapctl::{Text, state};

    fn row(state: i32, path: &str) -> Row {
        let entry =
            Entry { count: 1.into(), minor: 5.into(), state: state.into(), path: Text::new(path).unwrap() };
        Row::of(17, &entry)
    }

    #[test]
    fn rows_look_like_those_of_tapdisk3() {
        let (open, closed) = (row(0, "raw:/a:b"), row(state::CLOSED, ""));
        assert_eq!(open.fields(), "pid=17 minor=5 state=0 args=raw:/a:b");
        assert_eq!(open.columns(), "      17    5    0        raw /a:b");
        assert_eq!(closed.fields(), "pid=17 minor=5 state=0x2");
        assert_eq!(closed.columns(), "      17    5  0x2          - -");
        let lines = row(0, "raw:/a\nb\u{1b}[2J\u{e9}");
        assert_eq!(lines.fields(), "pid=17 minor=5 state=0 args=raw:/a\\nb\\u{1b}[2J\u{e9}");
        let alone = Row { minor: Some(3), ..Row::default() };
        assert_eq!(
            (alone.fields(), alone.columns()),
            ("minor=3".into(), "       -    3    -          - -".into())
        );
        assert_eq!(open.json(), json!({ "pid": 17, "minor": 5, "state": 0, "type": "raw", "file": "/a:b" }));
    }

    #[test]
    fn options_leave_rows_out() {
        let none = ListArgs { pid: None, minor: None, kind: None, file: None };
        let open = row(0, "raw:/a");
        for (args, matches) in [
            (none.clone(), true),
            (ListArgs { pid: Some(17), minor: Some(5), ..none.clone() }, true),
            (ListArgs { pid: Some(18), ..none.clone() }, false),
            (ListArgs { minor: Some(6), ..none.clone() }, false),
            (ListArgs { kind: Some("raw".into()), file: Some("/a".into()), ..none.clone() }, true),
            (ListArgs { kind: Some("vhd".into()), ..none.clone() }, false),
            (ListArgs { file: Some("/b".into()), ..none }, false),
        ] {
            assert_eq!(open.matches(&args), matches, "{args:?}");
        }
    }
}
