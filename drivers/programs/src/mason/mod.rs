//! `mason`: checks, lays out, draws and explains graphs of disks, without opening one.

mod check;
mod show;

use crate::Console;
use crate::help;
use clap::{Parser, Subcommand};
use tap_images::{Formats, ImageHost};
use tap_mason::codes::explain;
use tap_mason::load::{LoadError, Loaded, load};
use tap_mason::modules::Modules;

/// The command line of `mason`.
#[derive(Parser, Debug)]
#[command(name = "mason", version, about = "Checks, lays out, draws and explains graphs of disks")]
#[command(after_help = help::mason())]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Checks a graph: its text, its wiring, who writes to what, and the sizes of its disks
    Check(check::Check),
    /// Prints a text, laid out
    Fmt(show::Fmt),
    /// Draws a graph
    Graph(show::Graph),
    /// Explains the code of a message
    Explain {
        /// The code, such as M4001; without one, all are listed
        code: Option<String>,
    },
    /// Lists the classes of nodes, or shows the parameters and the ports of one
    Modules {
        /// The class
        class: Option<String>,
    },
}

/// Runs `mason` and returns its exit status.
pub async fn run<H: ImageHost>(host: H, cli: Cli, console: &dyn Console) -> u8 {
    let modules = Modules::<H>::new(Formats::shipped());
    let outcome = match cli.command {
        Command::Check(args) => args.run(&host, &modules, console).await,
        Command::Fmt(args) => args.run(&host, console).await,
        Command::Graph(args) => args.run(&host, &modules, console).await,
        Command::Explain { code } => explained(code.as_deref(), console),
        Command::Modules { class } => show::modules(&modules, class.as_deref(), console),
    };
    outcome.unwrap_or_else(|text| {
        console.err(&format!("mason: failed to {text}"));
        1
    })
}

/// An exit status, or the text after "failed to".
type Outcome = Result<u8, String>;

/// The graph at `path`.
async fn read<H: ImageHost>(host: &H, modules: &Modules<H>, path: &str) -> Result<Loaded, String> {
    load(host, path, &modules.classes).await.map_err(|error: LoadError| error.to_string())
}

/// Prints what is wrong with a graph as people read it.
fn tell(loaded: &Loaded, console: &dyn Console) {
    for message in &loaded.messages {
        let text = loaded.sources.render(std::slice::from_ref(message), false);
        text.lines().for_each(|line| console.err(line));
        console.err("");
    }
}

fn explained(code: Option<&str>, console: &dyn Console) -> Outcome {
    let Some(code) = code else {
        for known in tap_mason::codes::ALL {
            console.out(&format!("{}  {}", known.code, known.title));
        }
        return Ok(0);
    };
    let known = explain(code).ok_or_else(|| format!("explain {code}: there is no such code"))?;
    console.out(&format!("{}: {}", known.code, known.title));
    console.out("");
    wrapped(known.text).iter().for_each(|line| console.out(line));
    for (what, text) in [("Wrong:", known.wrong), ("Right:", known.right)] {
        if !text.is_empty() {
            console.out("");
            console.out(what);
            wrapped(text).iter().for_each(|line| console.out(&format!("  {line}")));
        }
    }
    Ok(0)
}

/// `text` in lines of at most 78 characters.
fn wrapped(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.len() + word.len() < 78 => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}
