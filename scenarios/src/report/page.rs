//! A run as one page of HTML that needs nothing else: no network, no other file.
//!
//! Story, images and decisions are readable without scripts; a script draws the timeline.

use super::images::{FileMap, Images, Part, State};
use super::{Line, Mark, Report, Row, Weight};
use serde::Serialize;
use sim::micros;
use std::fmt::Write as _;

const PAGE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// Work that the timeline of one page has.
const ROWS_MAX: usize = 6000;
/// Lines that a page has.
const LINES_MAX: usize = 4000;
/// Sectors of one run that are drawn as wide as they are many.
const WIDE_MAX: u64 = 24;

/// The data of the timeline; the script reads these names.
#[derive(Serialize)]
struct Timeline<'a> {
    end: u64,
    rows: Vec<Bar<'a>>,
    marks: Vec<Tick<'a>>,
    events: Vec<Tick<'a>>,
}

#[derive(Serialize)]
struct Bar<'a> {
    layer: u8,
    track: &'a str,
    name: &'a str,
    begin: u64,
    end: Option<u64>,
    outcome: &'a str,
    matters: bool,
    failed: bool,
}

#[derive(Serialize)]
struct Tick<'a> {
    at: u64,
    who: &'a str,
    kind: &'a str,
    text: &'a str,
}

/// The page of a run; `replay` is the command that repeats it.
pub(super) fn page(report: &Report, replay: &str) -> String {
    let mut body = String::new();
    header(&mut body, report, replay);
    timeline(&mut body, report);
    report.images.iter().for_each(|images| image_maps(&mut body, images));
    lines(&mut body, report);
    decisions(&mut body, report);
    let _ = write!(body, "<script>\n{SCRIPT}</script>");
    fill(&report.heading, &body)
}

/// A page with this title and content.
pub(super) fn fill(title: &str, body: &str) -> String {
    // The content comes last: what it says is not filled in again.
    PAGE.replace("{{title}}", &escaped(title)).replace("{{style}}", STYLE).replace("{{body}}", body)
}

fn header(out: &mut String, report: &Report, replay: &str) {
    let (heading, about) = (escaped(&report.heading), escaped(report.about));
    let _ = write!(out, "<header><h1>{heading}</h1>\n<p class=\"faint\">{about}</p>\n");
    if let Some(mistake) = &report.mistake {
        let _ = writeln!(out, "<p>{}</p>", escaped(mistake));
    }
    *out += "</header>\n<main>\n<section id=\"verdict\">\n";
    match &report.broken {
        Some(b) => {
            let (at, invariant, sentence) = (micros(b.at_ns), escaped(&b.invariant), escaped(b.sentence));
            let _ = write!(
                out,
                "<div class=\"broken\"><p><strong>Broken at {at} \u{b5}s: {invariant}</strong>: {sentence}</p>\n\
                 <pre>{}</pre></div>\n",
                escaped(&b.detail)
            );
        }
        None => *out += "<p><strong>Nothing is broken.</strong></p>\n",
    }
    if !report.named.is_empty() {
        *out += "<h2>The requests that this is about</h2>\n<p class=\"faint\">In the order of their submission.</p>\n\
                 <ol id=\"named\">\n";
        report.named.iter().for_each(|request| *out += &format!("<li>{}</li>\n", escaped(request)));
        *out += "</ol>\n";
    }
    let replay = escaped(replay);
    let _ = write!(out, "<h2>To repeat it</h2>\n<pre id=\"replay\">{replay}</pre>\n</section>\n");
}

const TOOLS: &str = "\
<div class=\"tools\" role=\"toolbar\" aria-label=\"Timeline\">
<button id=\"zoom-in\">Zoom in</button><button id=\"zoom-out\">Zoom out</button><button id=\"whole\">Whole run</button>
<button id=\"left\">Earlier</button><button id=\"right\">Later</button>
<button id=\"previous\">Previous mark</button><button id=\"next\">Next mark</button>
<button id=\"fold\" aria-pressed=\"false\">All requests</button><button id=\"idle\" aria-pressed=\"false\">Idle time</button>
</div>
<div id=\"chart\" tabindex=\"0\" role=\"group\" aria-label=\"Timeline; keys are listed below\"></div>
<p id=\"detail\" role=\"status\">Choose a request or a mark.</p>
<details><summary>Keys and signs</summary>
<p>In the timeline: + and - zoom, arrows left and right move, arrows up and down go through the requests, n and p
through the marks, 0 shows the whole run, f folds, i shows idle time as long as it is. A control key with the mouse wheel
zooms, dragging moves.</p>
<p>C: a crash, a solid line. F: a fault, dashed. D: another decision, dotted. X: where the failure was noticed. Dark bars
explain the failure, light ones are the rest, hatched ones failed, and dashed outlines never ended. Idle time is cut short.</p>
</details>
";

const HATCH: &str = "<svg width=\"0\" height=\"0\" aria-hidden=\"true\"><defs><pattern id=\"hatch\" width=\"6\" \
height=\"6\" patternUnits=\"userSpaceOnUse\"><path d=\"M0 6L6 0\" stroke=\"currentColor\"/></pattern></defs></svg>\n";

fn timeline(out: &mut String, report: &Report) {
    let kept = choose(&report.rows);
    let events = report.lines.iter().filter(|line| line.is_event() && line.weight > Weight::None);
    let data = Timeline {
        end: report.end_ns,
        rows: kept.iter().map(|row| bar(row)).collect(),
        marks: report.marks.iter().map(mark).collect(),
        events: events.take(LINES_MAX).map(event).collect(),
    };
    let data = serde_json::to_string(&data).unwrap_or_else(|_| "null".into()).replace('<', "\\u003c");
    *out += "<section id=\"timeline\" hidden>\n<h2>Timeline, from guests to files</h2>\n";
    if kept.len() < report.rows.len() {
        let _ = writeln!(out, "<p class=\"faint\">{} of {} requests.</p>", kept.len(), report.rows.len());
    }
    let _ = write!(
        out,
        "{TOOLS}{HATCH}<script type=\"application/json\" id=\"data\">{data}</script>\n</section>\n"
    );
}

fn mark(mark: &Mark) -> Tick<'_> {
    Tick { at: mark.at_ns, who: "", kind: mark.kind.name(), text: &mark.text }
}

fn event(line: &Line) -> Tick<'_> {
    Tick { at: line.at_ns, who: &line.who, kind: "event", text: &line.text }
}

fn bar(row: &Row) -> Bar<'_> {
    Bar {
        // Events of processes are layer 2, between rings and files.
        layer: [0, 1, 3][row.layer as usize],
        track: &row.track,
        name: &row.name,
        begin: row.begin_ns,
        end: row.end_ns,
        outcome: &row.outcome,
        matters: row.matters,
        failed: row.is_failed(),
    }
}

/// Of much work, what matters and the last of the rest.
fn choose(rows: &[Row]) -> Vec<&Row> {
    let room = ROWS_MAX.saturating_sub(rows.iter().filter(|row| row.matters).count());
    let rest = rows.iter().filter(|row| !row.matters).count();
    let mut seen = 0;
    let keep = |row: &&Row| {
        seen += usize::from(!row.matters);
        row.matters || seen > rest.saturating_sub(room)
    };
    let mut kept: Vec<&Row> = rows.iter().filter(keep).collect();
    kept.drain(..kept.len().saturating_sub(ROWS_MAX));
    kept
}

fn image_maps(out: &mut String, images: &Images) {
    let at = micros(images.at_ns);
    let title = match images.cut {
        Some(n) => format!("The images at power cut {n}, at {at} \u{b5}s"),
        None => format!("The images at the end, at {at} \u{b5}s"),
    };
    let _ = write!(out, "<section class=\"images\">\n<h2>{title}</h2>\n");
    if images.cut.is_none() {
        *out += "<p class=\"faint\">The power was not cut. A cut now could take what is not durable.</p>\n";
    }
    if !images.files.is_empty() {
        *out += LEGEND;
    }
    images.files.iter().for_each(|file| file_map(out, file));
    if images.others > 0 || images.files.is_empty() {
        let _ = writeln!(out, "<p class=\"faint\">{} other files were durable.</p>", images.others);
    }
    *out += "</section>\n";
}

fn file_map(out: &mut String, file: &FileMap) {
    let size = match file.size_after {
        Some(after) if after == file.size => format!("{} bytes", file.size),
        Some(after) => format!("{} bytes before, {after} bytes after", file.size),
        None => "lost: its name was not durable".into(),
    };
    let _ = writeln!(out, "<h3>{}, {}, {size}</h3>", escaped(&file.name), file.format);
    if let Some(after) = &file.after {
        let _ = writeln!(out, "<p>What is left of its metadata is not valid. {}</p>", escaped(after));
    }
    if file.parts.is_empty() {
        *out += "<p class=\"faint\">Everything in it was durable.</p>\n";
        return;
    }
    *out += "<table class=\"parts\"><thead><tr><th>Structure</th><th>State</th><th>Sectors, in order</th></tr></thead>\n\
             <tbody>\n";
    file.parts.iter().for_each(|part| row(out, part));
    *out += "</tbody></table>\n";
    if file.hidden > 0 {
        let _ = writeln!(out, "<p class=\"faint\">{} more structures are not shown.</p>", file.hidden);
    }
}

fn row(out: &mut String, part: &Part) {
    let class = if part.focus { " class=\"focus\"" } else { "" };
    let leads = match part.wrong {
        Some((nth, state)) => format!("<br>holds the wrong sector, number {nth} of it: {}", state.word()),
        None if part.focus => "<br>leads to the wrong sector".into(),
        None => String::new(),
    };
    let _ = write!(
        out,
        "<tr{class}><th scope=\"row\">{}<br><span class=\"faint\">{:#x}, {} sectors</span>{leads}</th>\
         <td>{}</td><td><div class=\"cells\">",
        escaped(&part.name),
        part.start,
        part.len / tap_host::SECTOR_BYTES,
        part.state.word()
    );
    for cells in &part.cells {
        let (word, n, grow) = (cells.state.word(), cells.sectors, cells.sectors.min(WIDE_MAX));
        let letter = match cells.state {
            State::Durable => "d",
            State::Kept => "K",
            State::Pending => "N",
            State::Lost | State::Torn => "L",
        };
        let class = if cells.state == State::Pending { "pending" } else { word };
        let count = if n > 1 { n.to_string() } else { String::new() };
        let _ = write!(
            out,
            "<span class=\"{class}\" style=\"flex-grow:{grow}\" title=\"{n} sectors: {word}\"><b>{letter}{count}</b></span>"
        );
    }
    *out += "</div>";
    part.writers.iter().for_each(|by| *out += &format!("<span class=\"faint\">{}</span><br>", escaped(by)));
    *out += "</td></tr>\n";
}

const LEGEND: &str = "<p class=\"faint\">d: durable before. K: not durable, reached the medium. L: not durable, lost. \
                      Torn: some of both. N: not durable.</p>\n";

/// The lines of the story, and the others folded between them.
fn lines(out: &mut String, report: &Report) {
    *out += "<section id=\"story\">\n<h2>What happened</h2>\n\
             <p class=\"faint\">Times are in microseconds. A star is a decision that differs from the boring run.</p>\n\
             <ul class=\"lines\">\n";
    let first = report.lines.len().saturating_sub(LINES_MAX);
    let kept = report.relevant();
    let mut rest = report.lines.iter().zip(kept).skip(first).peekable();
    while let Some((next, kept)) = rest.next() {
        if kept {
            line(out, next);
            continue;
        }
        let mut folded = vec![next];
        while let Some((other, _)) = rest.next_if(|(_, kept)| !kept) {
            folded.push(other);
        }
        let _ =
            writeln!(out, "<li><details><summary>{} more lines</summary><ul class=\"lines\">", folded.len());
        folded.into_iter().for_each(|other| line(out, other));
        *out += "</ul></details></li>\n";
    }
    if let Some(b) = &report.broken {
        let (at, text) = (micros(b.at_ns), escaped(b.detail.lines().next().unwrap_or_default()));
        let _ = writeln!(
            out,
            "<li class=\"end most\"><span class=\"when\">{at}</span>{}: {text}</li>",
            b.invariant
        );
    }
    *out += "</ul>\n</section>\n";
}

fn line(out: &mut String, line: &Line) {
    let class = match line.weight {
        _ if line.is_decision() => "decision most",
        Weight::Most => "most",
        _ => "",
    };
    let (at, who, text) = (micros(line.at_ns), escaped(&line.who), escaped(&line.text));
    let _ = writeln!(out, "<li class=\"{class}\"><span class=\"when\">{at}</span>{who} {text}</li>");
}

fn decisions(out: &mut String, report: &Report) {
    let count = report.decisions.len();
    let _ = write!(
        out,
        "<section id=\"decisions\">\n<h2>Decisions</h2>\n<details{}><summary>{count} decisions differ from the boring \
         run</summary>\n<ul class=\"lines\">\n",
        if count <= 40 { " open" } else { "" }
    );
    for d in report.decisions.iter().take(LINES_MAX) {
        let (at, text) = (micros(d.at_ns), escaped(&d.text));
        let _ = writeln!(out, "<li><span class=\"when\">{at}</span>{text}</li>");
    }
    *out += "</ul></details>\n</section>\n</main>\n";
}

/// Text as HTML or XML, also within quotes.
pub(crate) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            c => out.push(c),
        }
    }
    out
}
