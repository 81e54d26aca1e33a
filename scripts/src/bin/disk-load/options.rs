//! The command line.

use super::Result;
use super::lane::LARGEST_SECTORS;

pub(crate) const HELP: &str = "\
Usage: disk-load verify|measure DEVICE [OPTIONS]

  verify     random writes, reads and flushes of 4 to 128 KiB; every read and at last the whole device are compared
  measure    random reads and writes of one size, not compared

Options:
  --depth N      requests in flight (1)
  --requests N   ends after so many requests
  --seconds N    ends after so many seconds
  --until-told   ends when a line comes on standard input
  --size-kib N   measure: size of a request, at most 128 (4)
  --seed N       another sequence (1)";

/// What the command line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    /// Compare what is read.
    pub(crate) verify: bool,
    pub(crate) device: String,
    /// Requests in flight, at least 1.
    pub(crate) depth: u64,
    pub(crate) requests: Option<u64>,
    pub(crate) seconds: Option<u64>,
    pub(crate) until_told: bool,
    /// Sectors of a measured request, 2 to [`LARGEST_SECTORS`].
    pub(crate) size_sectors: u64,
    pub(crate) seed: u64,
}

impl Options {
    /// Fails with what is wrong with `args`.
    pub(crate) fn parse(args: &[String]) -> Result<Self> {
        let [mode, device, rest @ ..] = args else { return Err("it wants a mode and a device".into()) };
        let verify = match mode.as_str() {
            "verify" => true,
            "measure" => false,
            other => return Err(format!("unknown mode {other}").into()),
        };
        let mut options = Self {
            verify,
            device: device.clone(),
            depth: 1,
            requests: None,
            seconds: None,
            until_told: false,
            size_sectors: 8,
            seed: 1,
        };
        let mut rest = rest.iter();
        while let Some(name) = rest.next() {
            let mut number = || -> Result<u64> {
                let text = rest.next().ok_or_else(|| format!("{name} wants a number"))?;
                Ok(text.parse().map_err(|e| format!("{name} {text}: {e}"))?)
            };
            match name.as_str() {
                "--depth" => options.depth = number()?,
                "--requests" => options.requests = Some(number()?),
                "--seconds" => options.seconds = Some(number()?),
                "--until-told" => options.until_told = true,
                "--size-kib" => options.size_sectors = number()?.saturating_mul(2),
                "--seed" => options.seed = number()?,
                other => return Err(format!("unknown option {other}").into()),
            }
        }
        if options.requests.is_none() && options.seconds.is_none() && !options.until_told {
            return Err("it would never end: --requests, --seconds or --until-told says when".into());
        }
        if options.depth == 0 || !(2..=LARGEST_SECTORS).contains(&options.size_sectors) {
            return Err("--depth is at least 1, --size-kib 1 to 128".into());
        }
        Ok(options)
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
    fn all_options_are_read() {
        let options = parse("measure /dev/xvda --depth 16 --requests 9 --seconds 3 --size-kib 128 --seed 7");
        let expected = Options {
            verify: false,
            device: "/dev/xvda".into(),
            depth: 16,
            requests: Some(9),
            seconds: Some(3),
            until_told: false,
            size_sectors: 256,
            seed: 7,
        };
        assert_eq!(options.expect("good"), expected);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (line, reason) in [
            ("verify", "it wants a mode"),
            ("write a --seconds 1", "unknown mode write"),
            ("verify a", "it would never end"),
            ("verify a --seconds", "--seconds wants a number"),
            ("verify a --seconds x", "--seconds x: "),
            ("verify a --seconds 1 --fast", "unknown option --fast"),
            ("verify a --seconds 1 --depth 0", "--depth is at least 1"),
            ("verify a --seconds 1 --size-kib 129", "--depth is at least 1, --size-kib 1 to 128"),
        ] {
            let error = parse(line).expect_err(line).to_string();
            assert!(error.starts_with(reason), "{line}: {error}");
        }
    }
}
