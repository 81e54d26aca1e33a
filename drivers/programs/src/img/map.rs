//! `tap-img map`.

use super::open_node;
use super::pump::{Extents, Run};
use super::{BackingArgs, Failure, Outcome, Output};
use crate::Console;
use crate::disk::{BackingArg, DiskHost, DiskOptions, format_parser};
use crate::spec::DiskSpec;
use clap::Args;
use serde::Serialize;
use tap_core::Source;
use tap_host::SECTOR_BYTES;
use tap_images::{Format, Formats, ImageHost, ImageSpec, MAX_CHAIN};

#[derive(Args, Debug)]
pub(super) struct Map {
    /// Format of the image, instead of finding it out
    #[arg(short, long, value_parser = format_parser(), value_name = "FORMAT")]
    format: Option<Format>,
    /// How to print it
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    backing: BackingArgs,
    /// The image
    file: String,
}

/// The keys of `qemu-img map --output=json`.
#[derive(Serialize, Clone, Copy)]
struct Shown {
    start: u64,
    length: u64,
    depth: u32,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
}

impl Shown {
    /// Whether `next`, which begins where this ends, is more of the same.
    fn goes_on_with(&self, next: &Shown) -> bool {
        let same = (self.depth, self.present, self.zero, self.data, self.compressed)
            == (next.depth, next.present, next.zero, next.data, next.compressed);
        let place_goes_on = match (self.offset, next.offset) {
            (Some(a), Some(b)) => a.checked_add(self.length) == Some(b),
            (a, b) => a.is_none() && b.is_none(),
        };
        same && place_goes_on
    }
}

impl Map {
    pub(super) async fn run<H: DiskHost>(&self, host: &H, console: &dyn Console) -> Outcome {
        let spec = super::disk(&self.file, self.format).map_err(Failure::new)?;
        let backing = self.backing.backing;
        let options = DiskOptions { backing: backing.policy(), ..DiskOptions::default() };
        let node = open_node(host, &spec, &options).await.map_err(Failure::new)?;
        let files = match self.output {
            Output::Json => None,
            Output::Human => Some(files(host, spec.clone(), backing).await?),
        };
        let mut printer = Printer { console, files, before: None, count: 0 };
        printer.start();
        let mut extents = Extents::new(&node);
        loop {
            match extents.next(u64::MAX).await {
                Ok(Some(run)) => printer.take(shown(&run))?,
                Ok(None) => break,
                // An array that was begun stays open: nobody takes a part of the map for the whole.
                Err(e) => return Err(Failure::new(format!("read the map of {spec}: {e}"))),
            }
        }
        printer.finish()?;
        node.close().await.map_err(|e| Failure::new(format!("close {spec}: {e}")))?;
        Ok(0)
    }
}

/// Prints runs as they come, those that go on as one. A map may have millions of them, so only the last is kept.
struct Printer<'a> {
    console: &'a dyn Console,
    /// The files of the chain, for people; `None` for JSON.
    files: Option<Vec<String>>,
    /// What is not printed yet, because it may go on.
    before: Option<Shown>,
    /// Objects of the array that were printed.
    count: u64,
}

impl Printer<'_> {
    fn start(&self) {
        if self.files.is_some() {
            self.console.out(&format!("{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to"));
        }
    }

    fn take(&mut self, run: Shown) -> Result<(), Failure> {
        match &mut self.before {
            Some(before) if before.goes_on_with(&run) => before.length += run.length,
            before => {
                if let Some(done) = before.replace(run) {
                    self.print(&done, ",")?;
                }
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<(), Failure> {
        match self.before.take() {
            Some(last) => self.print(&last, "]"),
            None => {
                if self.files.is_none() {
                    self.console.out("[]");
                }
                Ok(())
            }
        }
    }

    /// Prints one run; `after` follows it in the array.
    fn print(&mut self, run: &Shown, after: &str) -> Result<(), Failure> {
        let Some(files) = &self.files else {
            let text = serde_json::to_string(run).map_err(|e| Failure::new(format!("print JSON: {e}")))?;
            let open = if self.count == 0 { "[" } else { "" };
            self.console.out(&format!("{open}{text}{after}"));
            self.count += 1;
            return Ok(());
        };
        if run.data {
            let place = match run.offset {
                Some(offset) => format!("{offset:#x}"),
                None if run.compressed => "compressed".to_owned(),
                None => "-".to_owned(),
            };
            let file = files.get(run.depth as usize).map_or("", String::as_str);
            let (start, length) = (format!("{:#x}", run.start), format!("{:#x}", run.length));
            self.console.out(&format!("{start:<16}{length:<16}{place:<16}{file}"));
        }
        Ok(())
    }
}

/// The paths of the chain, the image first, each read as it was opened.
async fn files<H: ImageHost>(host: &H, spec: DiskSpec, backing: BackingArg) -> Result<Vec<String>, Failure> {
    let DiskSpec::Image(spec) = spec else { return Ok(vec![spec.to_string()]) };
    let (mut files, mut next) = (Vec::new(), Some(spec));
    // Opening has found the chain to be of bounded length; it may be another one by now.
    while let Some(spec) = next.filter(|_| files.len() < MAX_CHAIN) {
        let image = Formats::shipped().describe(host, &spec).await.map_err(Failure::new)?;
        files.push(spec.path);
        next = backing.format().zip(image.backing_path).map(|(format, path)| ImageSpec { format, path });
    }
    Ok(files)
}

fn shown(run: &Run) -> Shown {
    let (depth, present, compressed, offset) = match run.extent.source {
        Source::Nothing => (0, false, false, None),
        Source::Image { depth, offset, compressed } => (depth, true, compressed, offset),
    };
    Shown {
        start: run.start * SECTOR_BYTES,
        length: run.count * SECTOR_BYTES,
        depth,
        present,
        zero: run.extent.zero,
        data: run.extent.allocated && !run.extent.zero,
        compressed,
        offset,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[derive(Default)]
    struct Lines(RefCell<Vec<String>>);

    impl Console for Lines {
        fn out(&self, line: &str) {
            self.0.borrow_mut().push(line.to_owned());
        }
        fn err(&self, line: &str) {
            panic!("nothing is wrong: {line}");
        }
        fn progress(&self, _: u64, _: u64) {}
    }

    /// What is printed for runs of 512 bytes: offset, and whether compressed.
    fn printed(files: Option<Vec<String>>, runs: &[(Option<u64>, bool)]) -> Vec<String> {
        let lines = Lines::default();
        let mut printer = Printer { console: &lines, files, before: None, count: 0 };
        printer.start();
        for (start, (offset, compressed)) in (0..).step_by(512).zip(runs.iter().copied()) {
            let run = Shown {
                start,
                length: 512,
                depth: 0,
                present: true,
                zero: false,
                data: true,
                compressed,
                offset,
            };
            assert!(printer.take(run).is_ok());
        }
        assert!(printer.finish().is_ok());
        lines.0.take()
    }

    #[test]
    fn places_that_are_not_known_are_not_called_compressed() {
        let runs = [(Some(4096), false), (Some(4608), false), (None, true), (None, false)];
        let lines = printed(Some(vec!["/a".to_owned()]), &runs);
        let places = lines.iter().map(|l| l.split_whitespace().skip(1).collect::<Vec<_>>().join(" "));
        let want = ["Length Mapped to File", "0x400 0x1000 /a", "0x200 compressed /a", "0x200 - /a"];
        assert_eq!(places.collect::<Vec<_>>(), want);
    }

    #[test]
    fn every_array_is_closed() {
        assert_eq!(printed(None, &[]), ["[]"]);
        for count in 1..4 {
            let lines = printed(None, &[(Some(0), false), (None, false), (Some(0), false)][..count]);
            let all: Vec<serde_json::Value> = serde_json::from_str(&lines.join("\n")).unwrap();
            assert_eq!((all.len(), lines.len()), (count, count), "{lines:?}");
        }
    }
}
