//! Messages about a text: what is wrong, where, and what to do.

use super::ast::Span;
use annotate_snippets::{AnnotationKind, Element, Group, Level, Renderer, Snippet};

/// One message about a text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Diagnostic {
    /// The code, such as `M1001`, by which `mason explain` knows more.
    pub code: &'static str,
    /// A warning; otherwise an error.
    pub is_warning: bool,
    /// What is wrong, in one line.
    pub title: String,
    /// Places and what is there, the main one first.
    pub labels: Vec<(Span, String)>,
    /// What to do; a line each.
    pub helps: Vec<String>,
}

impl Diagnostic {
    /// An error `title` at `span`, where `label` is.
    pub fn error(code: &'static str, title: impl Into<String>, span: Span, label: impl Into<String>) -> Self {
        Self {
            code,
            is_warning: false,
            title: title.into(),
            labels: vec![(span, label.into())],
            helps: vec![],
        }
    }

    /// The same as a warning.
    pub fn warning(self) -> Self {
        Self { is_warning: true, ..self }
    }

    /// The same with another place.
    pub fn label(mut self, span: Span, label: impl Into<String>) -> Self {
        self.labels.push((span, label.into()));
        self
    }

    /// The same with advice.
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.helps.push(help.into());
        self
    }
}

/// The texts that were read, by their numbers.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    texts: Vec<(String, String)>,
}

impl Sources {
    /// Adds a text, read from `name`, and returns its number.
    pub fn add(&mut self, name: &str, text: String) -> u16 {
        self.texts.push((name.to_owned(), text));
        u16::try_from(self.texts.len() - 1).expect("whoever reads texts limits how many")
    }

    /// The name and the text of number `file`.
    pub fn get(&self, file: u16) -> Option<(&str, &str)> {
        self.texts.get(usize::from(file)).map(|(name, text)| (name.as_str(), text.as_str()))
    }

    /// The name of the text of `span`, its line and its column, from 1 on.
    pub fn position(&self, span: Span) -> (&str, usize, usize) {
        let Some((name, text)) = self.get(span.file) else { return ("", 1, 1) };
        let before = &text[..cut(text, span.from)];
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
        (name, line, column)
    }

    /// The messages as people read them, with the lines that they are about.
    pub fn render(&self, messages: &[Diagnostic], colour: bool) -> String {
        let renderer = if colour { Renderer::styled() } else { Renderer::plain() };
        let groups: Vec<Group<'_>> = messages.iter().map(|message| self.group(message)).collect();
        // One after the other: a report of several groups would be one message with further notes.
        let texts: Vec<String> = groups.into_iter().map(|group| renderer.render(&[group])).collect();
        texts.join("\n\n")
    }

    /// One message in a line: `NAME:LINE:COLUMN: TITLE (CODE)`.
    pub fn line(&self, message: &Diagnostic) -> String {
        let span = message.labels.first().map_or_else(Span::default, |(span, _)| *span);
        let (name, line, column) = self.position(span);
        format!("{name}:{line}:{column}: {} ({})", message.title, message.code)
    }

    fn group<'a>(&'a self, message: &'a Diagnostic) -> Group<'a> {
        let level = if message.is_warning { Level::WARNING } else { Level::ERROR };
        let mut group =
            level.primary_title(message.title.as_str()).id(message.code).elements(Vec::<Element<'_>>::new());
        // A text with its labels, in the order in which the texts are first mentioned.
        let mut files: Vec<u16> = Vec::new();
        for (span, _) in &message.labels {
            if !files.contains(&span.file) {
                files.push(span.file);
            }
        }
        for file in files {
            let Some((name, text)) = self.get(file) else { continue };
            let labels = message.labels.iter().enumerate().filter(|(_, (span, _))| span.file == file);
            let marks = labels.map(|(i, (span, label))| {
                let kind = if i == 0 { AnnotationKind::Primary } else { AnnotationKind::Context };
                kind.span(cut(text, span.from)..cut(text, span.to.max(span.from))).label(label.as_str())
            });
            group = group.element(Snippet::source(text).path(name).annotations(marks));
        }
        for help in &message.helps {
            group = group.element(Level::HELP.message(help.as_str()));
        }
        group
    }
}

/// `at`, within `text` and between two characters.
fn cut(text: &str, at: u32) -> usize {
    let mut at = (at as usize).min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}
