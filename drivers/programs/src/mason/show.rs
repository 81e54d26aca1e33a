//! `mason fmt`, `mason graph` and `mason modules`.

use super::{Outcome, read, tell};
use crate::Console;
use clap::Args;
use tap_images::{ImageHost, read_small};
use tap_mason::graph::canonical::canonical;
use tap_mason::graph::show::Picture;
use tap_mason::graph::signature::{Arity, Default, Param, Port};
use tap_mason::lang::lex::MAX_TEXT_BYTES;
use tap_mason::lang::{Sources, format};
use tap_mason::modules::Modules;

/// Prints a text, laid out.
#[derive(Args, Debug)]
pub(super) struct Fmt {
    /// Print nothing; exit status 1 if the text is not laid out
    #[arg(long)]
    check: bool,
    /// The text
    file: String,
}

impl Fmt {
    pub(super) async fn run<H: ImageHost>(&self, host: &H, console: &dyn Console) -> Outcome {
        let bytes = match read_small(host, &self.file, MAX_TEXT_BYTES).await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Err(format!("read {}: {}", self.file, tap_host::Errno::ENOENT)),
            Err(error) => return Err(format!("read {}: {error}", self.file)),
        };
        let text =
            String::from_utf8(bytes).map_err(|_| format!("read {}: it is not text in UTF-8", self.file))?;
        match format(&text) {
            Ok(laid_out) if self.check => {
                if laid_out != text {
                    console.err(&format!("mason: {} is not laid out; see mason fmt", self.file));
                }
                Ok(u8::from(laid_out != text))
            }
            Ok(laid_out) => {
                laid_out.lines().for_each(|line| console.out(line));
                Ok(0)
            }
            Err(messages) => {
                let mut sources = Sources::default();
                sources.add(&self.file, text);
                sources.render(&messages, false).lines().for_each(|line| console.err(line));
                Ok(1)
            }
        }
    }
}

/// Draws a graph.
#[derive(Args, Debug)]
#[group(multiple = false, id = "form")]
pub(super) struct Form {
    /// In the DOT language of Graphviz
    #[arg(long)]
    dot: bool,
    /// As a drawing in SVG
    #[arg(long)]
    svg: bool,
    /// In the canonical form, of which the digest is made
    #[arg(long)]
    canonical: bool,
}

/// Draws a graph.
#[derive(Args, Debug)]
pub(super) struct Graph {
    #[command(flatten)]
    form: Form,
    /// The text of the graph
    file: String,
}

impl Graph {
    pub(super) async fn run<H: ImageHost>(
        &self,
        host: &H,
        modules: &Modules<H>,
        console: &dyn Console,
    ) -> Outcome {
        let mut loaded = read(host, modules, &self.file).await?;
        let checked = loaded.check(&modules.classes, &|_| None);
        tell(&loaded, console);
        let Some(checked) = checked.filter(|_| loaded.is_good()) else { return Ok(1) };
        let picture = Picture { classes: &modules.classes, graph: &loaded.graph, checked: &checked };
        let text = match &self.form {
            Form { dot: true, .. } => picture.dot(),
            Form { svg: true, .. } => picture.svg(),
            Form { canonical: true, .. } => canonical(&modules.classes, &loaded.graph),
            _ => picture.tree(),
        };
        text.lines().for_each(|line| console.out(line));
        Ok(0)
    }
}

/// Lists the classes, or shows one.
pub(super) fn modules<H: ImageHost>(
    modules: &Modules<H>,
    class: Option<&str>,
    console: &dyn Console,
) -> Outcome {
    let classes = &modules.classes.0;
    let Some(name) = class else {
        let wide = classes.iter().map(|class| class.name.len()).max().unwrap_or(0);
        for class in classes {
            console.out(&format!("{:wide$}  {}", class.name, class.about));
        }
        return Ok(0);
    };
    let found = modules.classes.find(name).map(|at| &classes[at]);
    let class =
        found.ok_or_else(|| format!("show {name}: there is no such class; mason modules lists them"))?;
    console.out(&format!("{}: {}", class.name, class.about));
    let rows: Vec<(String, String)> = class.params.iter().map(param).collect();
    table("Parameters", &rows, console);
    let rows: Vec<(String, String)> = class.ports.iter().map(port).collect();
    table("Ports below", &rows, console);
    if !class.writable {
        console.out("");
        console.out("It takes no writes.");
    }
    Ok(0)
}

fn table(title: &str, rows: &[(String, String)], console: &dyn Console) {
    if rows.is_empty() {
        return;
    }
    console.out("");
    console.out(&format!("{title}:"));
    let wide = rows.iter().map(|(left, _)| left.len()).max().unwrap_or(0);
    rows.iter().for_each(|(left, right)| console.out(&format!("  {left:wide$}  {right}")));
}

fn param(param: &Param) -> (String, String) {
    let default = match &param.default {
        Default::None => String::new(),
        Default::Absent => "; may be left out".to_owned(),
        Default::Value(value) => format!("; {value} if left out"),
    };
    (format!("{}: {}", param.name, param.ty), format!("{}{default}", param.about))
}

fn port(port: &Port) -> (String, String) {
    let count = match port.arity {
        Arity::One => "one".to_owned(),
        Arity::Optional => "one or none".to_owned(),
        Arity::Ordered(least) => format!("at least {least}, in order"),
    };
    (format!("[{}] {count}", port.name), port.about.to_owned())
}
