//! The command line of `cargo xtask xen-host`.

use super::Result;
use std::path::PathBuf;
use std::time::Duration;

pub(super) const HELP: &str = "\
A real Xen host in software: Debian's Xen with a Debian dom0 under QEMU's emulation. Needs no root.

Usage: cargo xtask xen-host build|run SCRIPT|shell|test [NAME...] [OPTIONS]

  build            download Debian's packages and make dom0's image, if the cache does not have them
  run SCRIPT       boot, run a bash script in dom0 as root, bring back what it left in /out; exits with its status
  shell            boot, and open a shell on dom0's console; `exit` ends the machine
  test [NAME...]   boot once and run the tests in scripts/xen-host/tests, or those named; ends with a table

Options:
  --cache DIR      downloads and images (target/xen-host, 0.55 GB); one machine at a time uses a cache
  --deb FILE       the package that is installed in dom0 (that of `cargo xtask dist`, which is built first)
  --no-deb         install no package
  --blktap-module FILE
                   a blktap2 module for dom0's kernel, which is not ours: tests with blktap in their names load it
  --copy FILE      copy a file into dom0's /root, where scripts start; repeatable
  -x, --tree DIR   copy what is in DIR over dom0's /; repeatable
  --out DIR        where /out of dom0 goes (CACHE/run/out)
  --shell          open a shell after the script or the tests; `exit` goes on
  --keep           keep the initrd and disk of the run, and print QEMU's command line
  --timeout N      seconds from start to end of the machine (run: 600, test: 1200, shell: none)
  --memory MIB     memory of the machine (2048), half of which is dom0's
  --cpus N         virtual CPUs (1; with more, programs in dom0 were seen to crash at random)
  --icount         the machine's clock counts instructions, 8 ns each: figures of CPU time do not depend on what else
                   this machine does. Half as fast
  --list           test: list the tests and do nothing

Exit status: the script's; or 124 when the time was up, 125 when the machine ended without one, 126 when it could not
be built or started. `test`: 0 when all passed, 1 when not.

Examples:
  cargo xtask xen-host test
  cargo xtask xen-host test nbd-kernel --deb target/dist/tapdisk_*.deb
  cargo xtask xen-host test peers --icount
  cargo xtask xen-host run my.sh --copy disk.img --out /tmp/out
  cargo xtask xen-host shell
";

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Help,
    Build,
    Run(PathBuf),
    Shell,
    /// The named tests, or all.
    Test(Vec<String>),
    /// Print the names of tests.
    List,
}

/// What the command line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) action: Action,
    pub(super) cache: PathBuf,
    pub(super) deb: Option<PathBuf>,
    pub(super) take_deb: bool,
    /// A module that is not part of this repository.
    pub(super) blktap_module: Option<PathBuf>,
    pub(super) copy: Vec<PathBuf>,
    pub(super) trees: Vec<PathBuf>,
    pub(super) out: Option<PathBuf>,
    pub(super) shell: bool,
    pub(super) keep: bool,
    pub(super) timeout: Option<Duration>,
    pub(super) memory_mib: u64,
    pub(super) cpus: u32,
    pub(super) icount: bool,
}

impl Options {
    /// Fails with what is wrong with `args`.
    pub(super) fn parse(args: &[String]) -> Result<Self> {
        let mut options = Self {
            action: Action::Help,
            cache: PathBuf::from("target/xen-host"),
            deb: None,
            take_deb: true,
            blktap_module: None,
            copy: Vec::new(),
            trees: Vec::new(),
            out: None,
            shell: false,
            keep: false,
            timeout: None,
            memory_mib: 2048,
            cpus: 1,
            icount: false,
        };
        let mut list = false;
        let mut words = Vec::new();
        let mut args = args.iter();
        while let Some(name) = args.next() {
            let mut value = || args.next().cloned().ok_or_else(|| format!("{name} needs a value"));
            match name.as_str() {
                "--help" | "-h" => return Ok(Self { action: Action::Help, ..options }),
                "--cache" => options.cache = value()?.into(),
                "--deb" => options.deb = Some(value()?.into()),
                "--no-deb" => options.take_deb = false,
                "--blktap-module" => options.blktap_module = Some(value()?.into()),
                "--copy" => options.copy.push(value()?.into()),
                "--tree" | "-x" => options.trees.push(value()?.into()),
                "--out" => options.out = Some(value()?.into()),
                "--shell" => options.shell = true,
                "--keep" => options.keep = true,
                "--icount" => options.icount = true,
                "--list" => list = true,
                "--timeout" => options.timeout = Some(Duration::from_secs(number(name, &value()?, 1)?)),
                "--memory" => options.memory_mib = number(name, &value()?, 1024)?,
                "--cpus" => options.cpus = number(name, &value()?, 1)?.try_into()?,
                other if other.starts_with('-') => {
                    return Err(format!("unknown option {other}; see cargo xtask xen-host --help").into());
                }
                word => words.push(word.to_owned()),
            }
        }
        options.action = action(&words, list)?;
        options.shell |= options.action == Action::Shell;
        let limit = match options.action {
            Action::Test(_) => Some(1200),
            Action::Run(_) => Some(600),
            _ => None,
        };
        // A shell has no time limit: the user ends it with `exit`.
        if !options.shell {
            options.timeout = options.timeout.or(limit.map(Duration::from_secs));
        }
        Ok(options)
    }
}

fn action(words: &[String], list: bool) -> Result<Action> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        [] => Ok(Action::Help),
        ["build"] => Ok(Action::Build),
        ["shell"] => Ok(Action::Shell),
        ["run", script] => Ok(Action::Run(script.into())),
        ["run", ..] => Err("run wants one SCRIPT".into()),
        ["test"] if list => Ok(Action::List),
        ["test", names @ ..] => Ok(Action::Test(names.iter().map(|&n| n.to_owned()).collect())),
        ["build" | "shell", extra, ..] => {
            Err(format!("what is {extra}? See cargo xtask xen-host --help").into())
        }
        [other, ..] => Err(format!("unknown action {other}; see cargo xtask xen-host --help").into()),
    }
}

fn number(name: &str, text: &str, least: u64) -> Result<u64> {
    match text.parse() {
        Ok(number) if number >= least => Ok(number),
        _ => Err(format!("{name} wants a number of at least {least}, not {text}").into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        Options::parse(&words)
    }

    #[test]
    fn options_may_stand_anywhere() {
        let options = parse("--cpus 2 run --copy a my.sh -x b --icount --copy c --timeout 5").expect("good");
        assert_eq!(options.action, Action::Run("my.sh".into()));
        assert_eq!(options.copy, [PathBuf::from("a"), PathBuf::from("c")]);
        assert_eq!(options.trees, [PathBuf::from("b")]);
        assert_eq!((options.cpus, options.timeout), (2, Some(Duration::from_secs(5))));
        assert!(options.icount);
    }

    #[test]
    fn each_action_has_its_time_limit() {
        assert_eq!(parse("run a").expect("good").timeout, Some(Duration::from_secs(600)));
        assert_eq!(parse("test").expect("good").timeout, Some(Duration::from_secs(1200)));
        assert_eq!(parse("shell").expect("good").timeout, None);
        assert_eq!(parse("test --shell").expect("good").timeout, None);
        assert_eq!(parse("shell --timeout 9").expect("good").timeout, Some(Duration::from_secs(9)));
    }

    #[test]
    fn tests_are_named_or_all() {
        assert_eq!(parse("test").expect("good").action, Action::Test(Vec::new()));
        assert_eq!(parse("test a b").expect("good").action, Action::Test(vec!["a".into(), "b".into()]));
        assert_eq!(parse("test --list").expect("good").action, Action::List);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (line, reason) in [
            ("run", "run wants one SCRIPT"),
            ("run a b", "run wants one SCRIPT"),
            ("build now", "what is now?"),
            ("fly", "unknown action fly"),
            ("test --fast", "unknown option --fast"),
            ("test --cpus", "--cpus needs a value"),
            ("test --memory 12", "--memory wants a number of at least 1024, not 12"),
        ] {
            let error = parse(line).expect_err(line).to_string();
            assert!(error.starts_with(reason), "{line}: {error}");
        }
    }
}
