//! `mason check`.

use super::{Outcome, read, tell};
use crate::Console;
use clap::Args;
use serde::Serialize;
use std::collections::BTreeMap;
use tap_images::{ImageHost, ImageSpec};
use tap_mason::graph::NodeId;
use tap_mason::graph::canonical::{canonical, digest};
use tap_mason::graph::check::Checked;
use tap_mason::graph::value::Value;
use tap_mason::lang::Diagnostic;
use tap_mason::load::Loaded;
use tap_mason::modules::Modules;

/// Checks a graph.
#[derive(Args, Debug)]
pub(super) struct Check {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Do not look at the images; the sizes of their disks are not known then
    #[arg(long)]
    text_only: bool,
    /// The text of the graph
    file: String,
}

#[derive(Serialize)]
struct Report<'a> {
    file: &'a str,
    good: bool,
    digest: Option<String>,
    disks: Vec<DiskOf<'a>>,
    messages: Vec<Message<'a>>,
}

#[derive(Serialize)]
struct DiskOf<'a> {
    name: &'a str,
    size_bytes: Option<u64>,
    read_only: bool,
}

#[derive(Serialize)]
struct Message<'a> {
    code: &'a str,
    severity: &'static str,
    title: &'a str,
    labels: Vec<Label<'a>>,
    helps: &'a [String],
}

#[derive(Serialize)]
struct Label<'a> {
    file: &'a str,
    line: usize,
    column: usize,
    text: &'a str,
}

impl Check {
    pub(super) async fn run<H: ImageHost>(
        &self,
        host: &H,
        modules: &Modules<H>,
        console: &dyn Console,
    ) -> Outcome {
        let mut loaded = read(host, modules, &self.file).await?;
        let sizes = match loaded.is_good() && !self.text_only {
            true => sizes(host, modules, &mut loaded).await,
            false => BTreeMap::new(),
        };
        let checked = loaded.check(&modules.classes, &|id| sizes.get(&id).copied());
        let good = loaded.is_good();
        match self.json {
            true => {
                let report = self.report(modules, &loaded, checked.as_ref());
                let text =
                    serde_json::to_string_pretty(&report).expect("texts and numbers serialise to JSON");
                console.out(&text);
            }
            false => {
                tell(&loaded, console);
                if let Some(checked) = checked.filter(|_| good) {
                    self.summary(modules, &loaded, &checked, console);
                }
            }
        }
        Ok(u8::from(!good))
    }

    /// The disks that a right graph offers.
    fn summary<H: ImageHost>(
        &self,
        modules: &Modules<H>,
        loaded: &Loaded,
        checked: &Checked,
        console: &dyn Console,
    ) {
        let graph = &loaded.graph;
        for id in graph.roots(&modules.classes.0) {
            let size =
                checked.sizes[id].map_or("size unknown".to_owned(), |size| Value::Bytes(size).to_string());
            let read_only = if checked.written[id] { "" } else { ", read-only" };
            let count = graph.below(id).len() - 1;
            let nodes = if count == 1 { "node" } else { "nodes" };
            let name = &graph.nodes[id].name;
            console.out(&format!("{name}: {size}{read_only}, {count} {nodes} below"));
        }
        console.out(&format!("digest {}", digest(&canonical(&modules.classes, graph))));
    }

    fn report<'a, H: ImageHost>(
        &'a self,
        modules: &Modules<H>,
        loaded: &'a Loaded,
        checked: Option<&Checked>,
    ) -> Report<'a> {
        let good = loaded.is_good();
        let checked = checked.filter(|_| good);
        let graph = &loaded.graph;
        let disks = checked.map_or_else(Vec::new, |checked| {
            let disk = |id: NodeId| DiskOf {
                name: &graph.nodes[id].name,
                size_bytes: checked.sizes[id],
                read_only: !checked.written[id],
            };
            graph.roots(&modules.classes.0).map(disk).collect()
        });
        Report {
            file: &self.file,
            good,
            digest: checked.map(|_| digest(&canonical(&modules.classes, graph))),
            disks,
            messages: loaded.messages.iter().map(|message| message_of(loaded, message)).collect(),
        }
    }
}

fn message_of<'a>(loaded: &'a Loaded, message: &'a Diagnostic) -> Message<'a> {
    let labels = message.labels.iter().map(|(span, text)| {
        let (file, line, column) = loaded.sources.position(*span);
        Label { file, line, column, text }
    });
    Message {
        code: message.code,
        severity: if message.is_warning { "warning" } else { "error" },
        title: &message.title,
        labels: labels.collect(),
        helps: &message.helps,
    }
}

/// The sizes of the disks of all images, in bytes. One that cannot be read is reported.
async fn sizes<H: ImageHost>(host: &H, modules: &Modules<H>, loaded: &mut Loaded) -> BTreeMap<NodeId, u64> {
    let mut sizes = BTreeMap::new();
    for (id, node) in loaded.graph.nodes.iter().enumerate() {
        let Some((format, path)) = modules.image(node) else { continue };
        let spec = ImageSpec { format: format.into(), path: path.to_owned() };
        match modules.formats.describe(host, &spec, true).await {
            Ok(about) => drop(sizes.insert(id, about.disk_bytes)),
            Err(error) => {
                let title = format!("failed to {error}");
                let message = Diagnostic::error("M5002", title, node.span, "this image");
                loaded.messages.push(message.help("with --text-only images are not looked at"));
            }
        }
    }
    sizes
}
