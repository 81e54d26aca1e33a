//! `tap-img map`.

use super::open_node;
use super::pump::{Extents, Run};
use super::{Failure, Outcome, Output, SourceArgs};
use crate::Console;
use crate::disk::{DiskHost, format_parser};
use crate::spec::DiskSpec;
use clap::Args;
use serde::Serialize;
use std::collections::BTreeMap;
use std::rc::Rc;
use tap_core::{Node, NodeName, Source, nodes};
use tap_host::SECTOR_BYTES;
use tap_images::Format;

#[derive(Args, Debug)]
pub(super) struct Map {
    /// Format of the image, instead of probing it
    #[arg(short, long, value_parser = format_parser(), value_name = "FORMAT")]
    format: Option<Format>,
    /// Output format
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    reading: SourceArgs,
    /// The image
    file: String,
}

/// The keys of `qemu-img map --output=json`.
#[derive(Serialize, Clone, Copy)]
struct Shown<'a> {
    start: u64,
    length: u64,
    depth: u32,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    /// For human output.
    #[serde(skip)]
    file: &'a str,
}

impl Shown<'_> {
    /// Whether `next`, which begins where this ends, continues this run.
    fn continues_with(&self, next: &Shown<'_>) -> bool {
        let same = (self.depth, self.present, self.zero, self.data, self.compressed)
            == (next.depth, next.present, next.zero, next.data, next.compressed);
        let offset_continues = match (self.offset, next.offset) {
            (Some(a), Some(b)) => a.checked_add(self.length) == Some(b),
            (a, b) => a.is_none() && b.is_none(),
        };
        same && offset_continues
    }
}

impl Map {
    pub(super) async fn run<H: DiskHost>(&self, host: &H, console: &dyn Console) -> Outcome {
        let spec = super::disk(&self.file, self.format).map_err(Failure::new)?;
        let node = open_node(host, &spec, &self.reading.options()).await.map_err(Failure::new)?;
        let sources = Sources::of(&node, &spec);
        let is_json = self.output == Output::Json;
        let mut printer = Printer { console, is_json, before: None, count: 0 };
        printer.start();
        let mut extents = Extents::new(&node);
        loop {
            match extents.next(u64::MAX).await {
                Ok(Some(run)) => printer.take(sources.shown(&run))?,
                Ok(None) => break,
                // An array that was begun stays open, so that part of a map is never taken for the whole.
                Err(e) => return Err(Failure::new(format!("read the map of {spec}: {e}"))),
            }
        }
        printer.finish()?;
        node.close().await.map_err(|e| Failure::new(format!("close {spec}: {e}")))?;
        Ok(0)
    }
}

/// Prints runs as they arrive, adjacent ones as one. A map may have millions of them, so only the last is kept.
struct Printer<'a> {
    console: &'a dyn Console,
    /// JSON, not human output.
    is_json: bool,
    /// The last run, not printed yet because the next may continue it.
    before: Option<Shown<'a>>,
    /// Objects of the array printed so far.
    count: u64,
}

impl<'a> Printer<'a> {
    fn start(&self) {
        if !self.is_json {
            self.console.out(&format!("{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to"));
        }
    }

    fn take(&mut self, run: Shown<'a>) -> Result<(), Failure> {
        match &mut self.before {
            Some(before) if before.continues_with(&run) => before.length += run.length,
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
                if self.is_json {
                    self.console.out("[]");
                }
                Ok(())
            }
        }
    }

    /// Prints one run; `after` follows it in the array.
    fn print(&mut self, run: &Shown<'_>, after: &str) -> Result<(), Failure> {
        if self.is_json {
            let text = serde_json::to_string(run).map_err(|e| Failure::new(format!("print JSON: {e}")))?;
            let open = if self.count == 0 { "[" } else { "" };
            self.console.out(&format!("{open}{text}{after}"));
            self.count += 1;
            return Ok(());
        }
        if run.data {
            // As printf's %#x, which leaves the prefix of 0 out.
            let number = |n: u64| if n == 0 { "0".to_owned() } else { format!("{n:#x}") };
            let place = match run.offset {
                Some(offset) => number(offset),
                None if run.compressed => "compressed".to_owned(),
                None => "-".to_owned(),
            };
            let (start, length) = (number(run.start), number(run.length));
            self.console.out(&format!("{start:<16}{length:<16}{place:<16}{}", run.file));
        }
        Ok(())
    }
}

/// The nodes that bytes come from.
struct Sources(BTreeMap<NodeName, (u32, String)>);

impl Sources {
    /// The nodes of a graph, with their depth and name for people. The first one is the top.
    fn of(top: &Rc<dyn Node>, spec: &DiskSpec) -> Self {
        let mut found = BTreeMap::new();
        for (depth, node) in nodes(Rc::clone(top)) {
            let Some(name) = node.name() else { continue };
            let text = match spec {
                DiskSpec::Nbd { .. } if depth == 0 => spec.to_string(),
                _ => name.to_string(),
            };
            found.entry(name).or_insert((depth as u32, text));
        }
        Self(found)
    }

    fn shown(&self, run: &Run) -> Shown<'_> {
        let (name, present, compressed, offset) = match &run.extent.source {
            Source::Nothing => (None, false, false, None),
            Source::Node { name, offset, compressed } => (name.as_ref(), true, *compressed, *offset),
        };
        let known = name.and_then(|name| self.0.get(name));
        Shown {
            start: run.start * SECTOR_BYTES,
            length: run.count * SECTOR_BYTES,
            depth: known.map_or(0, |(depth, _)| *depth),
            present,
            zero: run.extent.zero,
            data: run.extent.allocated && !run.extent.zero,
            compressed,
            offset,
            file: known.map_or("", |(_, text)| text),
        }
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
            panic!("unexpected error: {line}");
        }
        fn progress(&self, _: u64, _: u64) {}
    }

    /// The output for runs of 512 bytes, given by offset and whether compressed.
    fn printed(is_json: bool, runs: &[(Option<u64>, bool)]) -> Vec<String> {
        let lines = Lines::default();
        let mut printer = Printer { console: &lines, is_json, before: None, count: 0 };
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
                file: "/a",
            };
            assert!(printer.take(run).is_ok());
        }
        assert!(printer.finish().is_ok());
        lines.0.take()
    }

    #[test]
    fn unknown_offsets_are_not_shown_as_compressed() {
        let runs = [(Some(4096), false), (Some(4608), false), (None, true), (None, false)];
        let lines = printed(false, &runs);
        let places = lines.iter().map(|l| l.split_whitespace().skip(1).collect::<Vec<_>>().join(" "));
        let want = ["Length Mapped to File", "0x400 0x1000 /a", "0x200 compressed /a", "0x200 - /a"];
        assert_eq!(places.collect::<Vec<_>>(), want);
    }

    #[test]
    fn every_array_is_closed() {
        assert_eq!(printed(true, &[]), ["[]"]);
        for count in 1..4 {
            let lines = printed(true, &[(Some(0), false), (None, false), (Some(0), false)][..count]);
            let all: Vec<serde_json::Value> = serde_json::from_str(&lines.join("\n")).unwrap();
            assert_eq!((all.len(), lines.len()), (count, count), "{lines:?}");
        }
    }
}
