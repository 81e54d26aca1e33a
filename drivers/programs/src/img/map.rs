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
use tap_host::{Errno, SECTOR_BYTES};
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
    /// The map is damaged here, or cannot be read; QEMU's tool fails instead.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    damaged: bool,
    /// What reading it fails with.
    #[serde(skip)]
    error: Option<Errno>,
    /// For human output.
    #[serde(skip)]
    file: &'a str,
}

impl Shown<'_> {
    /// Whether `next`, which begins where this ends, continues this run.
    fn continues_with(&self, next: &Shown<'_>) -> bool {
        let same = (self.depth, self.present, self.zero, self.data, self.compressed, self.error)
            == (next.depth, next.present, next.zero, next.data, next.compressed, next.error);
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
        let damaged = print(&node, &spec, self.output, console).await?;
        node.close().await.map_err(|e| Failure::new(format!("close {spec}: {e}")))?;
        if damaged > 0 {
            let text =
                format!("read all of the map of {spec}: it is damaged, for {damaged} bytes of the disk");
            return Err(Failure::new(text));
        }
        Ok(0)
    }
}

/// Prints the map of `node`, which is `spec`. Returns how many bytes of the disk it is damaged for.
async fn print(
    node: &Rc<dyn Node>,
    spec: &DiskSpec,
    output: Output,
    console: &dyn Console,
) -> Result<u64, Failure> {
    let sources = Sources::of(node, spec);
    let is_json = output == Output::Json;
    let mut printer = Printer { console, spec, is_json, before: None, count: 0, damaged: 0 };
    printer.start();
    let mut extents = Extents::new(node);
    loop {
        match extents.next(u64::MAX).await {
            Ok(Some(run)) => printer.take(sources.shown(&run))?,
            Ok(None) => return printer.finish(),
            // Nothing tells how far the damage reaches. An array that was begun stays open, so that part of a map is
            // never taken for the whole.
            Err(e) => {
                printer.flush(",")?;
                return Err(Failure::new(format!("read the map of {spec}: {e}")));
            }
        }
    }
}

/// Prints runs as they arrive, adjacent ones as one. A map may have millions of them, so only the last is kept.
struct Printer<'a> {
    console: &'a dyn Console,
    /// The disk.
    spec: &'a DiskSpec,
    /// JSON, not human output.
    is_json: bool,
    /// The last run, not printed yet because the next may continue it.
    before: Option<Shown<'a>>,
    /// Objects of the array printed so far.
    count: u64,
    /// Bytes in damaged runs printed so far.
    damaged: u64,
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

    /// Ends the map; returns the bytes in damaged runs.
    fn finish(mut self) -> Result<u64, Failure> {
        if self.before.is_none() && self.is_json {
            self.console.out("[]");
        }
        self.flush("]")?;
        Ok(self.damaged)
    }

    /// Prints the last run, if there is one; `after` follows it in the array.
    fn flush(&mut self, after: &str) -> Result<(), Failure> {
        self.before.take().map_or(Ok(()), |last| self.print(&last, after))
    }

    /// Prints one run; `after` follows it in the array.
    fn print(&mut self, run: &Shown<'_>, after: &str) -> Result<(), Failure> {
        if let Some(error) = run.error {
            self.damaged += run.length;
            let (spec, start, len) = (self.spec, run.start, run.length);
            let text = format!("the map of {spec} is damaged for {len} bytes from byte {start} on: {error}");
            self.console.err(&format!("tap-img: warning: {text}"));
        }
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
                None if run.damaged => "damaged".to_owned(),
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
            Source::Unreadable { name, .. } => (name.as_ref(), true, false, None),
        };
        let error = run.extent.source.error();
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
            damaged: error.is_some(),
            error,
            file: known.map_or("", |(_, text)| text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};
    use tap_core::{Extent, LocalBoxFuture, NodeInfo, Request, Response};
    use tap_host::SectorRange;

    #[derive(Default)]
    struct Lines(RefCell<Vec<String>>, RefCell<Vec<String>>);

    impl Console for Lines {
        fn out(&self, line: &str) {
            self.0.borrow_mut().push(line.to_owned());
        }
        fn err(&self, line: &str) {
            self.1.borrow_mut().push(line.to_owned());
        }
        fn progress(&self, _: u64, _: u64) {}
    }

    fn data(offset: Option<u64>, compressed: bool) -> Source {
        Source::Node { name: Some(NodeName::new("/a")), offset, compressed }
    }

    fn damaged(error: Errno) -> Source {
        Source::Unreadable { name: Some(NodeName::new("/a")), error }
    }

    /// A disk of one sector for each source. A query returns one extent; that of `fails` fails.
    struct Disk {
        sources: Vec<Source>,
        fails: Option<u64>,
    }

    impl Node for Disk {
        fn submit(&self, request: Request) -> LocalBoxFuture<Response> {
            Box::pin(std::future::ready(Response { result: Err(Errno::EIO), bufs: request.bufs }))
        }
        fn extents(&self, range: SectorRange, _: usize) -> LocalBoxFuture<Result<Vec<Extent>, Errno>> {
            let (at, fails) = (range.start.0, self.fails == Some(range.start.0));
            let source = self.sources[at as usize].clone();
            let one = Extent { count: 1, source, zero: false, allocated: true };
            Box::pin(std::future::ready(if fails { Err(Errno::EIO) } else { Ok(vec![one]) }))
        }
        fn info(&self) -> NodeInfo {
            NodeInfo::new(self.sources.len() as u64, true)
        }
        fn name(&self) -> Option<NodeName> {
            Some(NodeName::new("/a"))
        }
        fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
            Box::pin(std::future::ready(Ok(())))
        }
    }

    /// The lines of both outputs, and the damaged bytes or the error.
    fn printed(output: Output, sources: &[Source], fails: Option<u64>) -> (Lines, Result<u64, String>) {
        let (lines, sources) = (Lines::default(), sources.to_vec());
        let (node, spec): (Rc<dyn Node>, _) = (Rc::new(Disk { sources, fails }), "raw:/a".parse().unwrap());
        let mut work = Box::pin(print(&node, &spec, output, &lines));
        let Poll::Ready(done) = pin!(work.as_mut()).poll(&mut Context::from_waker(Waker::noop())) else {
            panic!("nothing waits");
        };
        drop(work);
        (lines, done.map_err(|failure| failure.text))
    }

    /// Of a table, the words of each line after the first.
    fn table(lines: &Lines) -> Vec<String> {
        let words = |line: &String| line.split_whitespace().collect::<Vec<_>>().join(" ");
        lines.0.borrow().iter().skip(1).map(words).collect()
    }

    #[test]
    fn unknown_offsets_are_not_shown_as_compressed() {
        let runs = [data(Some(4096), false), data(Some(4608), false), data(None, true), data(None, false)];
        let (lines, done) = printed(Output::Human, &runs, None);
        assert_eq!(table(&lines), ["0 0x400 0x1000 /a", "0x400 0x200 compressed /a", "0x600 0x200 - /a"]);
        assert_eq!((done, lines.1.take()), (Ok(0), vec![]));
    }

    #[test]
    fn every_array_is_closed() {
        assert_eq!(printed(Output::Json, &[], None).0.0.take(), ["[]"]);
        for count in 1..4 {
            let runs = [data(Some(0), false), data(None, false), data(Some(0), false)];
            let lines = printed(Output::Json, &runs[..count], None).0.0.take();
            let all: Vec<serde_json::Value> = serde_json::from_str(&lines.join("\n")).unwrap();
            assert_eq!((all.len(), lines.len()), (count, count), "{lines:?}");
        }
    }

    #[test]
    fn damaged_runs_are_marked_and_named() {
        let runs = [data(Some(0), false), damaged(Errno::EIO), damaged(Errno::EIO), data(Some(1536), false)];
        let (lines, done) = printed(Output::Human, &runs, None);
        assert_eq!(table(&lines), ["0 0x200 0 /a", "0x200 0x400 damaged /a", "0x600 0x200 0x600 /a"]);
        let warning = "tap-img: warning: the map of raw:/a is damaged for 1024 bytes from byte 512 on: ";
        assert_eq!(done, Ok(1024));
        let warnings = lines.1.take();
        assert!(warnings.len() == 1 && warnings[0].starts_with(warning), "{warnings:?}");
        let (lines, done) = printed(Output::Json, &runs, None);
        let all: Vec<serde_json::Value> = serde_json::from_str(&lines.0.take().join("\n")).unwrap();
        let marks: Vec<_> = all.iter().map(|run| (run["data"].as_bool(), run["damaged"].as_bool())).collect();
        assert_eq!(marks, [(Some(true), None), (Some(true), Some(true)), (Some(true), None)]);
        assert_eq!((done, lines.1.take().len()), (Ok(1024), 1));
        // Different errors are different runs.
        let (lines, _) = printed(Output::Human, &[damaged(Errno::EIO), damaged(Errno::ENOSPC)], None);
        assert_eq!((table(&lines).len(), lines.1.take().len()), (2, 2));
    }

    #[test]
    fn a_map_that_cannot_be_read_on_ends_with_what_was_there() {
        let runs = [data(Some(0), false), data(Some(512), false), data(None, false), data(None, true)];
        for output in [Output::Human, Output::Json] {
            let (lines, done) = printed(output, &runs, Some(2));
            let text = done.unwrap_err();
            assert!(text.starts_with("read the map of raw:/a: ") && text.ends_with("(EIO)"), "{text}");
            let out = lines.0.take();
            match output {
                Output::Human => assert_eq!(out.len(), 2, "the head and one run: {out:?}"),
                Output::Json => assert!(out.len() == 1 && out[0].ends_with("},"), "an open array: {out:?}"),
            }
        }
    }
}
