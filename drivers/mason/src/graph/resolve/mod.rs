//! Looks up names, computes values, and replaces modules by what they stand for.
//!
//! ```text
//!   class Fast($path: Path) [in] -> [] { in -> th :: throttle(...) -> img :: raw($path); }
//!   vm -> d1 :: Fast("a.img");
//!
//!   vm ──► d1 ──► d1/th ──► d1/img        while it is resolved: a module's ports are places of their own
//!   vm ─────────► d1/th ──► d1/img        in the graph
//! ```
//!
//! Mistakes are collected. A part that is wrong is left out, so that what depends on it may be blamed for nothing.

mod bind;
mod expr;
mod wire;

pub(crate) use wire::takes;

use super::signature::{Classes, Params};
use super::value::{Type, Value};
use super::{Condition, Graph, MAX_NODES, Node};
use crate::lang::ast::{self, Class, Ctor, Modifier, Name, NodeRef, Statement};
use crate::lang::{Diagnostic, Span};
use std::collections::BTreeMap;

/// Modules within modules, at most.
const MAX_DEPTH: usize = 16;
/// Statements of a graph, at most, those of a class counted each time that it is used.
const MAX_STATEMENTS: usize = 100_000;
/// Conditions of a graph, at most: each may look at all of it.
const MAX_CONDITIONS: usize = 1000;
/// Messages about one graph, at most.
const MAX_MESSAGES: usize = 100;

/// A text that is resolved.
pub struct Text<'a> {
    /// Its statements.
    pub file: &'a ast::File,
    /// Its folder: empty, or with a slash at its end. Paths in it are relative to this.
    pub folder: String,
}

/// Resolves `texts`: the first one is the graph, and the others, which it imports, have classes and values for it.
/// `file` in the places of a text is its number in `texts`.
pub fn resolve(classes: &Classes, texts: &[Text<'_>]) -> (Graph, Vec<Diagnostic>) {
    let mut resolver = Resolver {
        classes,
        texts,
        modules: BTreeMap::new(),
        items: Vec::new(),
        wires: Vec::new(),
        excused: Vec::new(),
        conditions: Vec::new(),
        messages: Vec::new(),
        full: false,
        statements: 0,
    };
    let mut scope = Scope::default();
    for text in texts.iter().skip(1) {
        resolver.library(text.file, &mut scope);
    }
    if let Some(text) = texts.first() {
        resolver.learn_classes(&text.file.statements);
        resolver.body(&text.file.statements, &mut scope);
    }
    resolver.finish()
}

/// A place of the graph while it is resolved.
enum Item {
    /// A node.
    Node(Node),
    /// A port of a module. It stands for the one place that is connected below it.
    Port {
        /// The module and the port, for messages.
        name: String,
        /// Where the port is defined.
        span: Span,
    },
}

/// A connection between two places.
struct Wire {
    from: usize,
    /// The port by its name, if one is named.
    port: Option<ast::PortRef>,
    to: usize,
    span: Span,
}

/// What a name means.
#[derive(Clone)]
enum Named {
    /// A node.
    Node(usize),
    /// A port of the module that the name is in.
    Port(usize),
    /// A module: the places of its ports, and the names in it.
    Module { above: usize, below: Vec<(String, usize)>, names: BTreeMap<String, Named> },
    /// Something with a mistake in it.
    Broken,
}

/// Where names are looked up.
#[derive(Default)]
struct Scope {
    /// The names of the modules that this is in, each with a slash.
    prefix: String,
    depth: usize,
    params: BTreeMap<String, Value>,
    /// Parameters with a mistake in them.
    broken: Vec<String>,
    names: BTreeMap<String, Named>,
    /// Where names are defined.
    spans: BTreeMap<String, Span>,
}

struct Resolver<'a> {
    classes: &'a Classes,
    texts: &'a [Text<'a>],
    modules: BTreeMap<String, &'a Class>,
    items: Vec<Item>,
    wires: Vec<Wire>,
    /// Places that are connected to something with a mistake in it.
    excused: Vec<usize>,
    conditions: Vec<Condition>,
    messages: Vec<Diagnostic>,
    /// The limit of nodes or statements was reported.
    full: bool,
    /// Statements that were carried out, those of modules each time.
    statements: usize,
}

impl<'a> Resolver<'a> {
    fn say(&mut self, message: Diagnostic) {
        if self.messages.len() < MAX_MESSAGES {
            self.messages.push(message);
        }
    }

    /// The classes and values of a text that others import.
    fn library(&mut self, file: &'a ast::File, scope: &mut Scope) {
        self.learn_classes(&file.statements);
        for statement in &file.statements {
            match statement {
                Statement::Let { .. } => self.value(statement, scope),
                Statement::Class(_) | Statement::Import { .. } => {}
                Statement::Declare(_) | Statement::Chain(_) | Statement::Check { .. } => {
                    let title = "a text that others import has only classes and values";
                    let message = Diagnostic::error("M2011", title, statement.span(), "this is neither");
                    self.say(message.help("move it to the text that is opened, or into a class"));
                }
            }
        }
    }

    /// There is more than a graph may have, at `span`; said once.
    fn too_much(&mut self, span: Span) {
        if !std::mem::replace(&mut self.full, true) {
            let most =
                format!("{MAX_NODES} nodes, {MAX_STATEMENTS} statements or {MAX_CONDITIONS} conditions");
            let title = format!("the graph has more than {most}");
            let message = Diagnostic::error("M2010", title, span, "at this one");
            self.say(message.help("the statements of a class count each time that it is used"));
        }
    }

    fn learn_classes(&mut self, statements: &'a [Statement]) {
        for statement in statements {
            let Statement::Class(class) = statement else { continue };
            let name = &class.name.node;
            if self.classes.find(name).is_some() {
                let title = format!("`{name}` is a class of this program already");
                self.say(Diagnostic::error("M2003", title, class.name.span, "defined again here"));
            } else if let Some(first) = self.modules.get(name) {
                let first = first.name.span;
                let title = format!("class `{name}` is defined twice");
                let message = Diagnostic::error("M2003", title, class.name.span, "the second time");
                self.say(message.label(first, "the first time"));
            } else {
                if class.above.len() != 1 {
                    let title = format!("class `{name}` must have one port above");
                    let message = Diagnostic::error("M3009", title, class.name.span, "this class");
                    self.say(message.help(format!("write `class {name}(...) [in] -> [...]`")));
                }
                self.modules.insert(name.clone(), class);
            }
        }
    }

    /// The statements of a text or of a module.
    fn body(&mut self, statements: &'a [Statement], scope: &mut Scope) {
        self.statements += statements.len();
        if self.statements > MAX_STATEMENTS {
            self.too_much(statements.first().map_or_else(Span::default, Statement::span));
            return;
        }
        for statement in statements {
            match statement {
                Statement::Let { .. } => self.value(statement, scope),
                Statement::Class(class) if scope.depth > 0 => {
                    let title = "a class within a class";
                    self.say(Diagnostic::error(
                        "M2012",
                        title,
                        class.name.span,
                        "move it out of the other one",
                    ));
                }
                _ => {}
            }
        }
        for statement in statements {
            match statement {
                Statement::Declare(declare) => {
                    for name in &declare.names {
                        let modifiers = declare.modifiers.iter().map(|m| m.node).collect();
                        self.declare(name, modifiers, &declare.ctor, scope);
                    }
                }
                Statement::Chain(chain) => {
                    let hops = chain.hops.iter().chain(chain.fan.iter().map(|leg| &leg.hop));
                    for hop in hops {
                        if let NodeRef::New { modifiers, name: Some(name), ctor } = &hop.node {
                            self.declare(name, modifiers.iter().map(|m| m.node).collect(), ctor, scope);
                        }
                    }
                }
                _ => {}
            }
        }
        for statement in statements {
            match statement {
                Statement::Chain(chain) => self.chain(chain, scope),
                Statement::Check { span, .. } if self.conditions.len() >= MAX_CONDITIONS => {
                    self.too_much(*span)
                }
                Statement::Check { expr, span } => {
                    if let Some(fact) = self.fact(expr, scope) {
                        self.conditions.push(Condition { fact, span: *span });
                    }
                }
                _ => {}
            }
        }
    }

    /// `let $NAME: TYPE = VALUE;`
    fn value(&mut self, statement: &'a Statement, scope: &mut Scope) {
        let Statement::Let { name, ty, value, .. } = statement else { return };
        let ty = match ty.as_ref().map(Type::of).transpose() {
            Ok(ty) => ty,
            Err(why) => {
                let span = ty.as_ref().map_or(name.span, |ty| ty.span);
                self.say(Diagnostic::error("M2007", why, span, "this type"));
                scope.broken.push(name.node.clone());
                return;
            }
        };
        let key = format!("${}", name.node);
        if let Some(first) = scope.spans.insert(key, name.span) {
            let title = format!("`${}` is defined twice", name.node);
            let message = Diagnostic::error("M2003", title, name.span, "the second time");
            self.say(message.label(first, "the first time"));
        }
        match self.evaluate(value, ty.as_ref(), scope) {
            Some(value) => drop(scope.params.insert(name.node.clone(), value)),
            None => scope.broken.push(name.node.clone()),
        }
    }

    /// Declares a node or a module called `name`.
    fn declare(&mut self, name: &'a Name, modifiers: Vec<Modifier>, ctor: &'a Ctor, scope: &mut Scope) {
        if let Some(first) = scope.spans.get(&name.node) {
            let title = format!("`{}` is declared twice", name.node);
            let message = Diagnostic::error("M2003", title, name.span, "the second time");
            let message = message.label(*first, "the first time");
            self.say(message);
            return;
        }
        scope.spans.insert(name.node.clone(), name.span);
        let full = format!("{}{}", scope.prefix, name.node);
        let named = self.instance(full, true, name.span, modifiers, ctor, scope);
        scope.names.insert(name.node.clone(), named);
    }

    /// A node of a class, or a module.
    fn instance(
        &mut self,
        name: String,
        is_named: bool,
        span: Span,
        modifiers: Vec<Modifier>,
        ctor: &'a Ctor,
        scope: &Scope,
    ) -> Named {
        if self.items.len() >= MAX_NODES {
            self.too_much(ctor.span);
            return Named::Broken;
        }
        if let Some(class) = self.classes.find(&ctor.class.node) {
            let signature = &self.classes.0[class];
            let Some(values) = self.arguments(signature, ctor, scope) else { return Named::Broken };
            let (params, below) = (Params(values), Vec::new());
            self.items.push(Item::Node(Node { name, is_named, class, params, modifiers, below, span }));
            return Named::Node(self.items.len() - 1);
        }
        match self.modules.get(&ctor.class.node).copied() {
            Some(class) => self.module(name, class, &modifiers, ctor, scope),
            None => {
                let known =
                    self.classes.0.iter().map(|c| c.name).chain(self.modules.keys().map(String::as_str));
                let message = unknown("M2001", "class", &ctor.class, known);
                self.say(message);
                Named::Broken
            }
        }
    }

    /// What a module stands for.
    fn module(
        &mut self,
        name: String,
        class: &'a Class,
        modifiers: &[Modifier],
        ctor: &'a Ctor,
        scope: &Scope,
    ) -> Named {
        if !modifiers.is_empty() {
            let title = format!("`{}` is a module: say of its nodes what is to be said", modifiers[0].word());
            self.say(Diagnostic::error("M2013", title, ctor.span, "a module"));
        }
        if scope.depth >= MAX_DEPTH {
            let title = format!("modules within modules, more than {MAX_DEPTH}");
            let message = Diagnostic::error("M2012", title, ctor.span, "at this one");
            self.say(message.help("does a class use itself?"));
            return Named::Broken;
        }
        let mut inner = Scope { prefix: format!("{name}/"), depth: scope.depth + 1, ..Scope::default() };
        if !self.formals(class, ctor, scope, &mut inner) {
            return Named::Broken;
        }
        let mut port = |def: &ast::PortDef, inner: &mut Scope| {
            self.items.push(Item::Port { name: format!("{name} [{}]", def.name.node), span: def.name.span });
            let at = self.items.len() - 1;
            inner.names.insert(def.name.node.clone(), Named::Port(at));
            inner.spans.insert(def.name.node.clone(), def.name.span);
            at
        };
        let Some(above) = class.above.first().map(|def| port(def, &mut inner)) else { return Named::Broken };
        let below: Vec<(String, usize)> =
            class.below.iter().map(|def| (def.name.node.clone(), port(def, &mut inner))).collect();
        self.body(&class.body, &mut inner);
        Named::Module { above, below, names: inner.names }
    }
}

/// The message that there is no `kind` called `name`, with the nearest of those that there are.
fn unknown<'n>(
    code: &'static str,
    kind: &str,
    name: &Name,
    known: impl Iterator<Item = &'n str>,
) -> Diagnostic {
    let message =
        Diagnostic::error(code, format!("there is no {kind} `{}`", name.node), name.span, "not known here");
    let mut known: Vec<&str> = known.collect();
    known.sort_unstable();
    let distance = |other: &&&str| edits(&name.node, other);
    match known.iter().min_by_key(distance).filter(|near| edits(&name.node, near) <= 1 + name.node.len() / 4)
    {
        Some(near) => message.help(format!("did you mean `{near}`?")),
        None if known.is_empty() || known.len() > 30 => message,
        None => message.help(format!("there are {}", known.join(", "))),
    }
}

/// How many characters have to be changed, added or removed to make `b` of `a`. Only the first 40 count.
fn edits(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(40).collect(), b.chars().take(40).collect());
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut before = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let changed = before + usize::from(x != y);
            before = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(before + 1);
        }
    }
    row[b.len()]
}
