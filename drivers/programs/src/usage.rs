//! Reports command lines that cannot be parsed, in one line.
//!
//! ```text
//!   error: the following required arguments were not provided:      tap-img: the following required arguments
//!     <FILE>                                                   ─►   were not provided: <FILE>; see tap-img --help
//!
//!   Usage: tap-img info <FILE> ...
//! ```

use crate::{Console, old_names};
use clap::Parser;
use clap::error::ErrorKind;
use std::ffi::OsString;
use std::io;

/// Parses the command line of a program, which is called `program` and says that it is `version`. Help and version are
/// printed by clap; any error is one line on `console`, and so is each old name of a disk, with what to write instead.
///
/// # Errors
/// The exit status: 0 after help and version, `unusable` if the command line cannot be parsed.
pub fn parse<C: Parser>(
    (program, version): (&str, &'static str),
    args: impl IntoIterator<Item = OsString>,
    unusable: u8,
    console: &dyn Console,
) -> Result<C, u8> {
    let args: Vec<OsString> = args.into_iter().collect();
    let parsed = C::command().version(version).try_get_matches_from(&args);
    let parsed = parsed.and_then(|mut matches| C::from_arg_matches_mut(&mut matches));
    if parsed.is_ok() {
        let words = args.iter().filter_map(|arg| arg.to_str());
        old_names::notes(words).iter().for_each(|note| console.err(&format!("{program}: {note}")));
    }
    parsed.map_err(|error| {
        if !matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
            console.err(&one_line(program, subcommand::<C>(&args).as_deref(), &error));
            return unusable;
        }
        match error.print() {
            Err(why) if why.kind() != io::ErrorKind::BrokenPipe => {
                console.err(&format!("{program}: failed to print: {why}"));
                1
            }
            _ => 0,
        }
    })
}

/// The name of the subcommand in `args`, if there is one.
fn subcommand<C: Parser>(args: &[OsString]) -> Option<String> {
    let command = C::command();
    let is_name = |arg: &&OsString| command.get_subcommands().any(|sub| arg.to_str() == Some(sub.get_name()));
    args.iter().skip(1).find(is_name).and_then(|name| name.to_str()).map(str::to_owned)
}

/// The first paragraph of clap's message: the rest is usage and tips, which `--help` has as well.
fn one_line(program: &str, subcommand: Option<&str>, error: &clap::Error) -> String {
    let text = error.to_string();
    let what = if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        "a command is missing".to_owned()
    } else {
        let text = text.strip_prefix("error: ").unwrap_or(&text);
        let lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
        lines.collect::<Vec<_>>().join(" ")
    };
    let help = subcommand.map_or_else(|| program.to_owned(), |name| format!("{program} {name}"));
    format!("{program}: {what}; see {help} --help")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{daemon, img};

    fn line<C: Parser>(program: &str, args: &str) -> String {
        let args: Vec<OsString> =
            std::iter::once(program).chain(args.split_whitespace()).map(OsString::from).collect();
        let error = C::try_parse_from(&args).err().expect("it cannot be parsed");
        one_line(program, subcommand::<C>(&args).as_deref(), &error)
    }

    #[test]
    fn each_error_is_one_line_with_the_cause() {
        let formats: Vec<&str> = tap_images::SHIPPED.iter().map(|format| format.name()).collect();
        let formats = formats.join(", ");
        let no_format = format!("invalid value 'vhd' for '--format <FORMAT>' [possible values: {formats}]");
        for (args, help, words) in [
            ("", "", "a command is missing"),
            ("shrink", "", "unrecognized subcommand 'shrink'"),
            ("info", "info ", "were not provided: <FILE>"),
            ("info --wide a", "info ", "unexpected argument '--wide' found"),
            ("create -f vhd a 1M", "create ", &no_format),
            (
                "convert -m 65 a b",
                "convert ",
                "invalid value '65' for '--parallel <PARALLEL>': 65 is not in 1..=64",
            ),
        ] {
            let line = line::<img::Cli>("tap-img", args);
            let end = format!("; see tap-img {help}--help");
            let inside = line.strip_prefix("tap-img: ").and_then(|l| l.strip_suffix(&end));
            assert!(inside.is_some_and(|l| l.contains(words) && !l.contains(['\n', '\u{1b}'])), "{line}");
        }
        let line = line::<daemon::Cli>("tapdisk", "serve --nbd nowhere raw:a");
        assert!(line.starts_with("tapdisk: invalid value 'nowhere' for '--nbd <ADDRESS>': "), "{line}");
    }

    #[derive(Default)]
    struct Heard(std::cell::RefCell<Vec<String>>);

    impl Console for Heard {
        fn out(&self, _: &str) {}
        fn err(&self, line: &str) {
            self.0.borrow_mut().push(line.to_owned());
        }
        fn progress(&self, _: u64, _: u64) {}
    }

    #[test]
    fn an_old_name_of_a_disk_is_noted_once() {
        let heard = Heard::default();
        let args = ["tapdisk", "xen", "3/xvda=tap:aio:/a", "3/xvdb=raw:/b"].map(OsString::from);
        assert!(parse::<daemon::Cli>(("tapdisk", "1"), args, 2, &heard).is_ok());
        let line = "tapdisk: warning: 'tap:aio:/a' is an old name; write raw:/a";
        assert_eq!(*heard.0.borrow(), [line]);
        let heard = Heard::default();
        let args = ["tapdisk", "xen", "3/xvda=tap:ioemu:/a"].map(OsString::from);
        assert_eq!(parse::<daemon::Cli>(("tapdisk", "1"), args, 2, &heard).err(), Some(2));
        assert!(matches!(&heard.0.borrow()[..], [line] if line.contains("backendtype=qdisk")));
    }
}
