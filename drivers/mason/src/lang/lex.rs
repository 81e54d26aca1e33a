//! From characters to tokens. Comments are kept beside them, for the layout.

use super::{Diagnostic, Span};

/// Longest text, in bytes.
pub const MAX_TEXT_BYTES: usize = 1 << 20;

/// What a token is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A name or a word of the language.
    Word,
    /// `$NAME`.
    Param,
    /// Digits, and how many of them are after the point.
    Number(u64, u32),
    /// Text in quotes, with its escapes resolved.
    Text(String),
    /// A sign of one or two characters.
    Sign(&'static str),
    /// The end of the text.
    End,
}

/// A token and its place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Token {
    /// What it is.
    pub kind: Kind,
    /// Where it is.
    pub span: Span,
}

/// What a text consists of.
#[derive(Debug, Default)]
pub struct Lexed {
    /// Its tokens; the last one is the end.
    pub tokens: Vec<Token>,
    /// Its comments.
    pub comments: Vec<Span>,
    /// What is wrong.
    pub messages: Vec<Diagnostic>,
}

/// The signs, those that begin like another one first.
const SIGNS: [&str; 26] = [
    "->", "=>", "::", "==", "!=", "<=", ">=", "..", ":", ";", ",", "(", ")", "[", "]", "{", "}", "<", ">",
    "=", "+", "-", "*", "/", "%", ".",
];

struct Lexer<'t> {
    file: u16,
    text: &'t str,
    at: usize,
    lexed: Lexed,
}

/// The tokens of `text`, which is number `file`.
pub fn lex(file: u16, text: &str) -> Lexed {
    let mut lexer = Lexer { file, text, at: 0, lexed: Lexed::default() };
    if text.len() > MAX_TEXT_BYTES {
        let title = format!("the text is longer than {} MiB", MAX_TEXT_BYTES >> 20);
        let message = Diagnostic::error("M1010", title, lexer.span(0, 0), "not read further");
        lexer.lexed.messages.push(message);
        lexer.text = "";
    }
    while lexer.at < lexer.text.len() {
        lexer.next();
    }
    let end = lexer.span(lexer.text.len(), lexer.text.len());
    lexer.lexed.tokens.push(Token { kind: Kind::End, span: end });
    lexer.lexed
}

impl Lexer<'_> {
    fn span(&self, from: usize, to: usize) -> Span {
        Span { file: self.file, from: from as u32, to: to as u32 }
    }

    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    /// The bytes from here on for which `belongs` holds.
    fn run(&self, from: usize, belongs: impl Fn(u8) -> bool) -> usize {
        let bytes = self.text.as_bytes();
        from + bytes[from..].iter().take_while(|byte| belongs(**byte)).count()
    }

    fn token(&mut self, kind: Kind, to: usize) {
        let span = self.span(self.at, to);
        self.lexed.tokens.push(Token { kind, span });
        self.at = to;
    }

    fn wrong(&mut self, code: &'static str, title: &str, (from, to): (usize, usize), label: &str) {
        let span = self.span(from, to);
        self.lexed.messages.push(Diagnostic::error(code, title, span, label));
    }

    fn next(&mut self) {
        let rest = self.rest();
        let first = rest.as_bytes()[0];
        let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        match first {
            b' ' | b'\t' | b'\r' | b'\n' => self.at += 1,
            b'/' if rest.starts_with("//") => {
                let to = self.at + rest.find('\n').unwrap_or(rest.len());
                self.comment(to);
            }
            b'/' if rest.starts_with("/*") => {
                let end = rest.find("*/");
                if end.is_none() {
                    self.wrong("M1004", "a comment without an end", (self.at, self.at + 2), "it begins here");
                }
                let to = end.map_or(self.text.len(), |end| self.at + end + 2);
                self.comment(to);
            }
            b'"' => self.quoted(),
            b'$' => match self.run(self.at + 1, is_word) {
                to if to == self.at + 1 => {
                    self.wrong("M1001", "`$` without a name", (self.at, to), "a value is called `$name`");
                    self.at = to;
                }
                to => self.token(Kind::Param, to),
            },
            b'0'..=b'9' => self.number(),
            byte if byte.is_ascii_alphabetic() || byte == b'_' => {
                let to = self.run(self.at, is_word);
                self.token(Kind::Word, to);
            }
            _ => match SIGNS.iter().find(|sign| rest.starts_with(**sign)) {
                Some(sign) => self.token(Kind::Sign(sign), self.at + sign.len()),
                None => self.strange(),
            },
        }
    }

    fn comment(&mut self, to: usize) {
        let span = self.span(self.at, to);
        self.lexed.comments.push(span);
        self.at = to;
    }

    /// Characters that mean nothing.
    fn strange(&mut self) {
        let known = |c: char| {
            c.is_ascii_alphanumeric() || " \t\r\n_$\"".contains(c) || ":;,()[]{}<>=+-*/%.!".contains(c)
        };
        let rest = self.rest();
        let skip = rest.chars().next().map_or(1, char::len_utf8);
        let to = self.at + rest[skip..].find(known).map_or(rest.len(), |len| skip + len);
        self.wrong("M1001", "characters that mean nothing here", (self.at, to), "remove them");
        self.at = to;
    }

    fn number(&mut self) {
        let digit = |byte: u8| byte.is_ascii_digit() || byte == b'_';
        let start = self.at;
        let mut to = self.run(start, digit);
        let mut decimals = 0;
        let after = self.text.as_bytes();
        if after.get(to) == Some(&b'.') && after.get(to + 1).is_some_and(u8::is_ascii_digit) {
            let end = self.run(to + 1, |byte| byte.is_ascii_digit());
            decimals = (end - to - 1) as u32;
            to = end;
        }
        let digits: String = self.text[start..to].chars().filter(char::is_ascii_digit).collect();
        let value = digits.parse().unwrap_or_else(|_| {
            self.wrong("M1003", "a number with too many digits", (start, to), "at most 18446744073709551615");
            0
        });
        self.token(Kind::Number(value, decimals), to);
    }

    fn quoted(&mut self) {
        let start = self.at;
        let mut text = String::new();
        let mut chars = self.text[start + 1..].char_indices();
        while let Some((at, c)) = chars.next() {
            let at = start + 1 + at;
            match c {
                '"' => return self.token(Kind::Text(text), at + 1),
                '\n' => {
                    self.wrong(
                        "M1002",
                        "a text without an end",
                        (start, at),
                        "it ends with `\"` on the same line",
                    );
                    return self.token(Kind::Text(text), at);
                }
                '\\' => match chars.next().map(|(_, c)| c) {
                    Some('"') => text.push('"'),
                    Some('\\') => text.push('\\'),
                    Some('n') => text.push('\n'),
                    Some('t') => text.push('\t'),
                    other => {
                        let to = at + 1 + other.map_or(0, char::len_utf8);
                        self.wrong(
                            "M1002",
                            "an escape that means nothing",
                            (at, to),
                            "there are \\\" \\\\ \\n and \\t",
                        );
                    }
                },
                c => text.push(c),
            }
        }
        self.wrong(
            "M1002",
            "a text without an end",
            (start, self.text.len()),
            "it ends with `\"` on the same line",
        );
        self.token(Kind::Text(text), self.text.len());
    }
}
