//! From tokens to statements, by recursive descent.
//!
//! A mistake ends its statement: parsing goes on after the next `;`, or before the `}` that closes the class. So each
//! mistake is reported once, and the statements around it are understood.

mod expr;

use super::ast::{
    Arg, Chain, Class, Ctor, Declare, File, Formal, Hop, Leg, Modifier, Name, NodeRef, PortDef, PortRef,
    QName, Spanned, Statement, Type, TypeKind,
};
use super::lex::{Kind, Lexed, Token, lex};
use super::{Diagnostic, Span};

/// Expressions and types within one another, at most.
const MAX_DEPTH: usize = 64;
/// Operators of one statement, at most.
const MAX_OPERATORS: usize = 256;
/// Messages about one text, at most.
const MAX_MESSAGES: usize = 100;

/// Words that cannot be names.
const WORDS: [&str; 13] = [
    "mason", "import", "let", "class", "check", "shared", "readonly", "volatile", "implies", "or", "and",
    "not", "one",
];
/// Words that are kept for statements to come.
const KEPT: [&str; 10] =
    ["group", "transition", "patch", "against", "splice", "drop", "replace", "set", "rewire", "old"];

/// A mistake was reported, and the statement is left.
struct Wrong;
type Parsed<T> = Result<T, Wrong>;

struct Parser<'t> {
    text: &'t str,
    tokens: Vec<Token>,
    at: usize,
    depth: usize,
    /// Operators of this statement.
    operators: usize,
    messages: Vec<Diagnostic>,
}

/// The statements of `text`, which is number `file` of the texts that are read, and what is wrong with it.
pub fn parse(file: u16, text: &str) -> (File, Vec<Diagnostic>) {
    let Lexed { tokens, messages, .. } = lex(file, text);
    let mut parser = Parser { text, tokens, at: 0, depth: 0, operators: 0, messages };
    let mut parsed = File::default();
    if parser.is_word("mason") {
        match parser.version() {
            Ok(version) => parsed.version = Some(version),
            Err(Wrong) => parser.recover(0),
        }
    }
    while parser.peek().kind != Kind::End {
        if parser.is("}") {
            let span = parser.bump().span;
            parser.say(Diagnostic::error("M1007", "`}` closes nothing", span, "remove it"));
            continue;
        }
        let start = parser.at;
        match parser.statement() {
            Ok(statement) => parsed.statements.push(statement),
            Err(Wrong) => parser.recover(start),
        }
    }
    parser.messages.sort_by_key(|message| message.labels.first().map(|(span, _)| *span));
    parser.messages.truncate(MAX_MESSAGES);
    (parsed, parser.messages)
}

impl Parser<'_> {
    fn say(&mut self, message: Diagnostic) {
        if self.messages.len() < 2 * MAX_MESSAGES {
            self.messages.push(message);
        }
    }

    fn peek(&self) -> &Token {
        &self.tokens[self.at]
    }

    fn ahead(&self, n: usize) -> &Token {
        &self.tokens[(self.at + n).min(self.tokens.len() - 1)]
    }

    fn bump(&mut self) -> Token {
        let token = self.peek().clone();
        self.at = (self.at + 1).min(self.tokens.len() - 1);
        token
    }

    fn source(&self, span: Span) -> &str {
        &self.text[span.from as usize..span.to as usize]
    }

    fn is(&self, sign: &str) -> bool {
        matches!(self.peek().kind, Kind::Sign(found) if found == sign)
    }

    fn ahead_is(&self, n: usize, sign: &str) -> bool {
        matches!(self.ahead(n).kind, Kind::Sign(found) if found == sign)
    }

    fn is_word(&self, word: &str) -> bool {
        let token = self.peek();
        token.kind == Kind::Word && self.source(token.span) == word
    }

    fn eat(&mut self, sign: &str) -> bool {
        let found = self.is(sign);
        if found {
            self.bump();
        }
        found
    }

    /// Where the token before this one ended.
    fn last(&self) -> Span {
        self.tokens[self.at.saturating_sub(1)].span
    }

    fn found(&self) -> String {
        match &self.peek().kind {
            Kind::End => "the end of the text".into(),
            _ => format!("`{}`", self.source(self.peek().span)),
        }
    }

    fn expected<T>(&mut self, what: &str) -> Parsed<T> {
        let (title, span) = (format!("expected {what}, found {}", self.found()), self.peek().span);
        self.say(Diagnostic::error("M1005", title, span, format!("expected {what}")));
        Err(Wrong)
    }

    fn expect(&mut self, sign: &'static str) -> Parsed<Span> {
        if self.is(sign) {
            return Ok(self.bump().span);
        }
        if sign == ";" {
            let last = self.last();
            let span = Span { from: last.to.saturating_sub(1).max(last.from), ..last };
            let title = format!("expected `;`, found {}", self.found());
            self.say(Diagnostic::error("M1005", title, span, "a statement ends with `;`"));
            return Err(Wrong);
        }
        self.expected(&format!("`{sign}`"))
    }

    /// Leaves a statement with a mistake that began at token `start`: to after its `;`, or to the `}` that closes what
    /// it is in.
    fn recover(&mut self, start: usize) {
        let mut open = 0usize;
        // A statement without its end is followed by the next one, which is not to be lost.
        if self.at > start && self.begins_line() && self.begins_statement() {
            return;
        }
        loop {
            match self.peek().kind {
                Kind::End => return,
                Kind::Sign("{") => open += 1,
                Kind::Sign("}") if open == 0 => return,
                Kind::Sign("}") => {
                    open -= 1;
                    if open == 0 {
                        self.bump();
                        return;
                    }
                }
                Kind::Sign(";") if open == 0 => {
                    self.bump();
                    return;
                }
                _ => {}
            }
            self.bump();
        }
    }

    /// Whether this token is the first one of its line, and the one before it does not go on.
    fn begins_line(&self) -> bool {
        let Some(before) = self.at.checked_sub(1).map(|at| &self.tokens[at]) else { return true };
        let between = &self.text[before.span.to as usize..self.peek().span.from as usize];
        between.contains('\n')
    }

    fn begins_statement(&self) -> bool {
        ["import", "let", "class", "check"].iter().any(|word| self.is_word(word))
            || self.modifier().is_some()
            || self.peek().kind == Kind::Word
                && ["::", "->", "[", "(", ","].iter().any(|sign| self.ahead_is(1, sign))
    }

    fn version(&mut self) -> Parsed<Spanned<u64>> {
        self.bump();
        let token = self.peek().clone();
        let Kind::Number(version, 0) = token.kind else {
            return self.expected("the version of the language: `1`");
        };
        self.bump();
        if version != 1 {
            let title = format!("version {version} of the language is not known");
            let message = Diagnostic::error("M1008", title, token.span, "this program knows version 1");
            self.say(message);
        }
        self.expect(";")?;
        Ok(Spanned { node: version, span: token.span })
    }

    fn statement(&mut self) -> Parsed<Statement> {
        self.operators = 0;
        let start = self.peek().span;
        if self.is_word("import") {
            self.bump();
            let path = self.quoted("the path of another text, in quotes")?;
            let end = self.expect(";")?;
            return Ok(Statement::Import { path, span: start.to(end) });
        }
        if self.is_word("let") {
            self.bump();
            let name = self.param()?;
            let ty = if self.eat(":") { Some(self.ty()?) } else { None };
            self.expect("=")?;
            let value = self.expr()?;
            let end = self.expect(";")?;
            return Ok(Statement::Let { name, ty, value, span: start.to(end) });
        }
        if self.is_word("class") {
            return self.class().map(Statement::Class);
        }
        if self.is_word("check") {
            self.bump();
            let expr = self.expr()?;
            let end = self.expect(";")?;
            return Ok(Statement::Check { expr, span: start.to(end) });
        }
        if self.is_word("mason") {
            let title = "the version is said once, at the beginning";
            self.say(Diagnostic::error("M1008", title, start, "not here"));
            return Err(Wrong);
        }
        self.nodes()
    }

    /// A declaration or a chain.
    fn nodes(&mut self) -> Parsed<Statement> {
        let start = self.peek().span;
        let mark = self.at;
        let modifiers = self.modifiers();
        if self.peek().kind == Kind::Word && (self.ahead_is(1, ",") || self.ahead_is(1, "::")) {
            let mut names = vec![self.name("the name of a node")?];
            while self.eat(",") {
                names.push(self.name("the name of a node")?);
            }
            self.expect("::")?;
            let ctor = self.ctor()?;
            if names.len() > 1 || self.is(";") {
                let end = self.expect(";")?;
                return Ok(Statement::Declare(Declare { modifiers, names, ctor, span: start.to(end) }));
            }
        }
        self.at = mark;
        self.chain().map(Statement::Chain)
    }

    fn modifier(&self) -> Option<Modifier> {
        Modifier::ALL.into_iter().find(|modifier| self.is_word(modifier.word()))
    }

    fn modifiers(&mut self) -> Vec<Spanned<Modifier>> {
        let mut modifiers = Vec::new();
        while let Some(node) = self.modifier() {
            modifiers.push(Spanned { node, span: self.bump().span });
        }
        modifiers
    }

    fn chain(&mut self) -> Parsed<Chain> {
        let start = self.peek().span;
        let mut hops = vec![self.hop()?];
        while self.eat("->") {
            hops.push(self.hop()?);
        }
        let mut fan = Vec::new();
        if self.eat("=>") {
            loop {
                let key = match self.peek().kind == Kind::Word && self.ahead_is(1, ":") {
                    true => {
                        let key = self.name("a key")?;
                        self.expect(":")?;
                        Some(key)
                    }
                    false => None,
                };
                fan.push(Leg { key, hop: self.hop()? });
                if !self.eat(",") {
                    break;
                }
            }
        }
        if hops.len() == 1 && fan.is_empty() {
            return match self.is(";") {
                true => {
                    let span = start.to(self.last());
                    let title = "a statement that does nothing";
                    let message = Diagnostic::error("M1006", title, span, "a node, connected to nothing");
                    self.say(message.help("write `name :: class(...);` or `a -> b;`"));
                    Err(Wrong)
                }
                false if matches!(hops[0].node, NodeRef::New { .. }) => self.expect(";").and(Err(Wrong)),
                false => self.expected("`::`, `->` or `=>`"),
            };
        }
        let end = self.expect(";")?;
        Ok(Chain { hops, fan, span: start.to(end) })
    }

    fn hop(&mut self) -> Parsed<Hop> {
        let start = self.peek().span;
        let above = if self.is("[") { Some(self.port_ref()?) } else { None };
        let modifiers = self.modifiers();
        if self.peek().kind != Kind::Word {
            return self.expected("a node");
        }
        let node = if self.ahead_is(1, "(") {
            NodeRef::New { modifiers, name: None, ctor: self.ctor()? }
        } else if self.ahead_is(1, "::") {
            let name = self.name("the name of a node")?;
            self.expect("::")?;
            NodeRef::New { modifiers, name: Some(name), ctor: self.ctor()? }
        } else if let Some(modifier) = modifiers.first() {
            let title = format!("`{}` without a declaration", modifier.node.word());
            let message =
                Diagnostic::error("M1006", title, modifier.span, "said of a node that is declared here");
            self.say(message.help("say it where the node is declared"));
            return Err(Wrong);
        } else {
            NodeRef::Named(self.qname()?)
        };
        let below = if self.is("[") { Some(self.port_ref()?) } else { None };
        Ok(Hop { above, node, below, span: start.to(self.last()) })
    }

    fn port_ref(&mut self) -> Parsed<PortRef> {
        let start = self.expect("[")?;
        let name = self.name("the name of a port")?;
        let key = match self.eat(".") {
            true if matches!(self.peek().kind, Kind::Number(_, 0)) => {
                let span = self.bump().span;
                Some(Name { node: self.source(span).to_owned(), span })
            }
            true => Some(self.name("a key")?),
            false => None,
        };
        let end = self.expect("]")?;
        Ok(PortRef { name, key, span: start.to(end) })
    }

    fn ctor(&mut self) -> Parsed<Ctor> {
        let class = self.name("the name of a class")?;
        let args = self.args()?;
        let span = class.span.to(self.last());
        Ok(Ctor { class, args, span })
    }

    /// `(ARGUMENT, ...)`
    fn args(&mut self) -> Parsed<Vec<Arg>> {
        self.expect("(")?;
        let mut args = Vec::new();
        while !self.is(")") {
            let name = match self.peek().kind == Kind::Word && self.ahead_is(1, "=") {
                true => {
                    // Any word will do: no statement begins here.
                    let span = self.bump().span;
                    let name = Name { node: self.source(span).to_owned(), span };
                    self.expect("=")?;
                    Some(name)
                }
                false => None,
            };
            args.push(Arg { name, value: self.expr()? });
            if !self.eat(",") {
                break;
            }
        }
        self.expect(")")?;
        Ok(args)
    }

    fn name(&mut self, what: &str) -> Parsed<Name> {
        let token = self.peek().clone();
        if token.kind != Kind::Word {
            return self.expected(what);
        }
        let word = self.source(token.span).to_owned();
        if KEPT.contains(&word.as_str()) {
            let title = format!("`{word}` is a reserved word");
            let message = Diagnostic::error("M1009", title, token.span, "it is kept for later versions");
            self.say(message.help("choose another name"));
            return Err(Wrong);
        }
        if WORDS.contains(&word.as_str()) {
            let title = format!("`{word}` is a word of the language, and {what} is expected");
            self.say(Diagnostic::error("M1009", title, token.span, format!("expected {what}")));
            return Err(Wrong);
        }
        self.bump();
        Ok(Name { node: word, span: token.span })
    }

    fn qname(&mut self) -> Parsed<QName> {
        let mut parts = vec![self.name("the name of a node")?];
        while self.is("/") && self.ahead(1).kind == Kind::Word {
            self.bump();
            parts.push(self.name("the name of a node")?);
        }
        let span = parts[0].span.to(self.last());
        Ok(QName { parts, span })
    }

    fn param(&mut self) -> Parsed<Name> {
        let token = self.peek().clone();
        if token.kind != Kind::Param {
            return self.expected("a name that begins with `$`");
        }
        self.bump();
        Ok(Name { node: self.source(token.span)[1..].to_owned(), span: token.span })
    }

    fn quoted(&mut self, what: &str) -> Parsed<Spanned<String>> {
        match self.peek().kind.clone() {
            Kind::Text(node) => Ok(Spanned { node, span: self.bump().span }),
            _ => self.expected(what),
        }
    }

    fn class(&mut self) -> Parsed<Class> {
        let start = self.bump().span;
        let name = self.name("the name of a class")?;
        self.expect("(")?;
        let mut formals = Vec::new();
        while !self.is(")") {
            let name = self.param()?;
            self.expect(":")?;
            let ty = self.ty()?;
            let default = if self.eat("=") { Some(self.expr()?) } else { None };
            formals.push(Formal { name, ty, default });
            if !self.eat(",") {
                break;
            }
        }
        self.expect(")")?;
        let above = self.ports()?;
        self.expect("->")?;
        let below = self.ports()?;
        let opened = self.expect("{")?;
        let mut body = Vec::new();
        while !self.is("}") {
            if self.peek().kind == Kind::End {
                let title = "a class without an end";
                self.say(Diagnostic::error("M1007", title, opened, "nothing closes this"));
                return Err(Wrong);
            }
            let (start, depth) = (self.at, self.depth);
            match self.within(Self::statement) {
                Ok(statement) => body.push(statement),
                Err(Wrong) => {
                    self.depth = depth;
                    self.recover(start);
                }
            }
        }
        let end = self.bump().span;
        Ok(Class { name, formals, above, below, body, span: start.to(end) })
    }

    fn ports(&mut self) -> Parsed<Vec<PortDef>> {
        self.expect("[")?;
        let mut ports = Vec::new();
        while !self.is("]") {
            let name = self.name("the name of a port")?;
            let access = if self.eat(":") { Some(self.access()?) } else { None };
            ports.push(PortDef { name, access });
            if !self.eat(",") {
                break;
            }
        }
        self.expect("]")?;
        Ok(ports)
    }

    fn access(&mut self) -> Parsed<Name> {
        match self.is_word("ro") || self.is_word("rw") {
            true => self.name("`ro` or `rw`"),
            false => self.expected("`ro` or `rw`"),
        }
    }

    fn ty(&mut self) -> Parsed<Type> {
        let start = self.peek().span;
        let kind = if self.is_word("one") {
            self.bump();
            if !self.is_word("of") {
                return self.expected("`of`");
            }
            self.bump();
            self.expect("{")?;
            let mut words = vec![self.name("a word")?];
            while self.eat(",") {
                words.push(self.name("a word")?);
            }
            self.expect("}")?;
            TypeKind::OneOf(words)
        } else {
            let name = self.name("a type")?.node;
            match self.eat("<") {
                true => {
                    let inner = self.within(Self::ty)?;
                    self.expect(">")?;
                    TypeKind::Of(name, Box::new(inner))
                }
                false => TypeKind::Named(name),
            }
        };
        Ok(Type { kind, span: start.to(self.last()) })
    }

    /// One level deeper.
    fn within<T>(&mut self, parse: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        if self.depth >= MAX_DEPTH {
            return self.too_deep();
        }
        self.depth += 1;
        let parsed = parse(self);
        self.depth = self.depth.saturating_sub(1);
        parsed
    }

    fn too_deep<T>(&mut self) -> Parsed<T> {
        let title = format!("more than {MAX_DEPTH} levels within one another, or {MAX_OPERATORS} operators");
        let message = Diagnostic::error("M1011", title, self.peek().span, "here");
        self.say(message.help("give a part of it a name with `let`, or a class of its own"));
        Err(Wrong)
    }
}
