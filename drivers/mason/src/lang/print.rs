//! Lays a text out.
//!
//! * A statement begins on its own line, indented by four for each class that it is in.
//! * A break within a statement stays where it was, if it was before `->` or `=>`, or after `,` or an opening bracket;
//!   what follows is indented by four more.
//! * At most one empty line stays between lines. Comments stay, at the end of their line or on lines of their own.

use super::Diagnostic;
use super::ast::Span;
use super::lex::{Kind, Lexed, Token, lex};
use super::parse::parse;

/// `text`, laid out.
///
/// # Errors
/// What is wrong with a text that cannot be parsed.
pub fn format(text: &str) -> Result<String, Vec<Diagnostic>> {
    let (_, messages) = parse(0, text);
    if !messages.is_empty() {
        return Err(messages);
    }
    let Lexed { tokens, comments, .. } = lex(0, text);
    let mut layout = Layout { text, out: String::new(), ..Layout::default() };
    let mut comments = comments.into_iter().peekable();
    for token in &tokens {
        while let Some(comment) = comments.next_if(|comment| comment.from < token.span.from) {
            layout.comment(comment);
        }
        if token.kind != Kind::End {
            layout.token(token);
        }
    }
    comments.for_each(|comment| layout.comment(comment));
    if !layout.out.is_empty() && !layout.out.ends_with('\n') {
        layout.out.push('\n');
    }
    Ok(layout.out)
}

#[derive(Default)]
struct Layout<'t> {
    text: &'t str,
    out: String,
    /// What the last token was.
    last: String,
    last_to: usize,
    /// Brackets that are open, by kind.
    open: Vec<&'static str>,
    /// A statement has begun.
    within: bool,
    /// The last thing was a comment that ends its line.
    line_ended: bool,
}

impl Layout<'_> {
    /// Line breaks in the text before `from`.
    fn breaks(&self, from: usize) -> usize {
        self.text[self.last_to..from].matches('\n').count()
    }

    fn classes(&self) -> usize {
        self.open.iter().filter(|open| **open == "{").count()
    }

    /// Begins a line, after an empty one if there was one.
    fn line(&mut self, from: usize, more: usize) {
        if self.out.is_empty() {
            return;
        }
        let empty = self.breaks(from) > 1 && self.last != "{";
        if !self.out.ends_with('\n') {
            self.out.push('\n');
        }
        if empty && !self.out.ends_with("\n\n") {
            self.out.push('\n');
        }
        let indent = 4 * (self.classes() + more);
        self.out.push_str(&" ".repeat(indent));
    }

    fn comment(&mut self, span: Span) {
        let (from, to) = (span.from as usize, span.to as usize);
        let comment = self.text[from..to].trim_end();
        let is_line = comment.starts_with("//");
        if self.out.is_empty() || self.breaks(from) > 0 || self.line_ended {
            self.line(from, usize::from(self.within));
        } else {
            self.out.push(' ');
        }
        self.out.push_str(comment);
        // A comment within a line goes on with what follows, one at its end does not.
        self.line_ended = is_line || self.text[to..].trim_start_matches([' ', '\t', '\r']).starts_with('\n');
        self.last_to = to;
    }

    fn token(&mut self, token: &Token) {
        let (from, to) = (token.span.from as usize, token.span.to as usize);
        let word = &self.text[from..to];
        let is_type = self.open.last() == Some(&"one");
        if word == "}" && !is_type {
            self.open.pop();
            match self.last == "{" && !self.line_ended {
                true => {}
                false => self.line(from, 0),
            }
        } else if !self.within {
            self.line(from, 0);
        } else if self.line_ended || self.breaks(from) > 0 && self.may_break(word) {
            let close = [")", "]"].contains(&word);
            let depth = self.open.iter().filter(|open| ["(", "["].contains(open)).count();
            self.line(from, if close { depth } else { depth + 1 });
        } else if self.has_space(word) {
            self.out.push(' ');
        }
        self.out.push_str(word);
        self.after(word, is_type);
        (self.last, self.last_to) = (word.to_owned(), to);
        self.line_ended = false;
    }

    fn after(&mut self, word: &str, is_type: bool) {
        self.within = true;
        match word {
            "(" => self.open.push("("),
            "[" => self.open.push("["),
            "{" if self.last == "of" => self.open.push("one"),
            "{" => {
                self.open.push("{");
                self.within = false;
            }
            ")" | "]" => drop(self.open.pop()),
            "}" if is_type => drop(self.open.pop()),
            "}" | ";" => self.within = false,
            _ => {}
        }
    }

    /// Whether a line may begin with `word`.
    fn may_break(&self, word: &str) -> bool {
        ["->", "=>", ")", "]"].contains(&word) && self.last != "(" && self.last != "["
            || [",", "(", "=>"].contains(&self.last.as_str()) && ![")", "]"].contains(&word)
    }

    /// Whether a space comes before `word`.
    fn has_space(&self, word: &str) -> bool {
        let last = self.last.as_str();
        if ["(", "[", "$", "<"].contains(&last) && self.is_tight(last) {
            return false;
        }
        match word {
            "," | ";" | ")" | "]" | ":" | "." => false,
            "(" => !self.last_is_name(),
            "<" | ">" => !self.is_tight(word),
            "/" => false,
            _ => !(last == "/" || last == "."),
        }
    }

    /// `<` and `>` of a type, and brackets, are written close to what is in them.
    fn is_tight(&self, sign: &str) -> bool {
        match sign {
            "<" | ">" => self.is_type_bracket(),
            _ => true,
        }
    }

    /// Whether `<` or `>` here belongs to `Rate<...>` or `Range<...>`: what is before it in the text is that word, or
    /// what is within it.
    fn is_type_bracket(&self) -> bool {
        let line = self.out.rsplit(['\n', ';', '{', ',', '(']).next().unwrap_or("");
        ["Rate", "Range"].iter().any(|word| {
            line.rfind(word).is_some_and(|at| {
                let rest = &line[at + word.len()..];
                rest.chars().all(|c| c == '<' || c == '>' || c.is_ascii_alphanumeric())
            })
        })
    }

    fn last_is_name(&self) -> bool {
        let last = self.last.as_str();
        let is_word = last.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        is_word && !["and", "or", "not", "implies", "check"].contains(&last)
    }
}
