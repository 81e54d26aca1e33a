//! Computes values, and turns conditions into facts about the graph.

use super::{Named, Resolver, Scope, unknown};
use crate::graph::value::{Type, Value};
use crate::graph::{Fact, NodeId};
use crate::lang::ast::{Arg, Expr, ExprKind, Name};
use crate::lang::{Diagnostic, Span};
use tap_images::resolve as beside;

/// What can be asked of nodes in a condition, and of how many.
const QUESTIONS: [(&str, usize); 4] = [("size", 1), ("immutable", 1), ("volatile", 1), ("reaches", 2)];

impl<'a> Resolver<'a> {
    /// The value of `expr`, which must have the type `wanted` if there is one; `None` after a mistake.
    pub(super) fn evaluate(&mut self, expr: &'a Expr, wanted: Option<&Type>, scope: &Scope) -> Option<Value> {
        let value = self.any_value(expr, wanted, scope)?;
        let value = match (wanted, value) {
            (Some(Type::Path), Value::Text(path)) => self.path(&path, expr.span)?,
            (_, value) => value,
        };
        match wanted {
            Some(ty) if !ty.has(&value) => {
                let title = match (&value, ty) {
                    (Value::Count(n), Type::Bytes | Type::Duration | Type::ByteRate | Type::RequestRate) => {
                        format!("`{n}` has no unit, and {ty} is meant here")
                    }
                    _ => format!("{ty} is meant here, and this is {}", value.ty()),
                };
                let message = Diagnostic::error("M2006", title, expr.span, format!("`{value}`"));
                self.say(message.help(match (&value, ty) {
                    (Value::Count(n), Type::Bytes) => {
                        format!("did you mean {n} B, {n} KiB, {n} MiB or {n} sectors?")
                    }
                    (Value::Count(n), Type::Duration) => format!("did you mean {n} ms or {n} s?"),
                    _ => format!("write it like `{}`", ty.example()),
                }));
                None
            }
            _ => Some(value),
        }
    }

    fn any_value(&mut self, expr: &'a Expr, wanted: Option<&Type>, scope: &Scope) -> Option<Value> {
        let wrong = |why: String| Diagnostic::error("M2006", why, expr.span, "in this");
        match &expr.kind {
            ExprKind::Quantity(quantity) => match Value::of(quantity) {
                Ok(value) => Some(value),
                Err(why) => {
                    self.say(wrong(why));
                    None
                }
            },
            ExprKind::Text(text) => Some(Value::Text(text.clone())),
            ExprKind::Param(name) => self.param(name, expr.span, scope),
            ExprKind::Name(name) => {
                let word = name.to_string();
                match (word.as_str(), wanted) {
                    ("true" | "false", None | Some(Type::Bool)) => Some(Value::Bool(word == "true")),
                    (_, Some(Type::OneOf(_))) => Some(Value::Word(word)),
                    _ => {
                        let title = format!("`{word}` is no value");
                        let message = Diagnostic::error("M2006", title, expr.span, "this word");
                        self.say(match wanted {
                            Some(ty) => message.help(format!("write it like `{}`", ty.example())),
                            None => message,
                        });
                        None
                    }
                }
            }
            ExprKind::Range(from, to) => {
                let from = self.evaluate(from, Some(&Type::Bytes), scope)?.number()?;
                let to = self.evaluate(to, Some(&Type::Bytes), scope)?.number()?;
                if from >= to {
                    self.say(wrong("a range ends after it begins".into()));
                    return None;
                }
                Some(Value::ByteRange(from, to))
            }
            ExprKind::Binary(op, a, b) => {
                let (a, b) = (self.any_value(a, None, scope), self.any_value(b, None, scope));
                match Value::combine(op.node, &a?, &b?) {
                    Ok(value) => Some(value),
                    Err(why) => {
                        self.say(wrong(why));
                        None
                    }
                }
            }
            ExprKind::Call(..) | ExprKind::List(_) | ExprKind::Not(_) => {
                self.say(wrong("this is no value: it may stand in a `check`, not here".into()));
                None
            }
        }
    }

    fn param(&mut self, name: &str, span: Span, scope: &Scope) -> Option<Value> {
        if let Some(value) = scope.params.get(name) {
            return Some(value.clone());
        }
        if !scope.broken.iter().any(|broken| broken == name) {
            let written = Name { node: format!("${name}"), span };
            let known: Vec<String> = scope.params.keys().map(|known| format!("${known}")).collect();
            let message = unknown("M2008", "value", &written, known.iter().map(String::as_str));
            self.say(message.help("a value is defined before it is used, and outside of the class"));
        }
        None
    }

    /// A path as the text at `span` means it.
    fn path(&mut self, path: &str, span: Span) -> Option<Value> {
        if path.is_empty() || path.contains('\0') {
            self.say(Diagnostic::error("M2006", "this is no path", span, "a path names a file"));
            return None;
        }
        let folder = self.texts.get(usize::from(span.file)).map_or("", |text| text.folder.as_str());
        Some(Value::Path(beside(folder, path)))
    }

    /// What a condition says of the graph; `None` after a mistake.
    pub(super) fn fact(&mut self, expr: &'a Expr, scope: &Scope) -> Option<Fact> {
        match &expr.kind {
            ExprKind::Call(name, args) => self.question(name, args, scope),
            ExprKind::Not(inner) => Some(Fact::Not(Box::new(self.fact(inner, scope)?))),
            ExprKind::Binary(op, a, b) => {
                let (a, b) = (self.fact(a, scope), self.fact(b, scope));
                Some(Fact::Binary(op.node, Box::new(a?), Box::new(b?)))
            }
            _ => self.any_value(expr, None, scope).map(Fact::Value),
        }
    }

    fn question(&mut self, name: &Name, args: &'a [Arg], scope: &Scope) -> Option<Fact> {
        let Some((_, count)) = QUESTIONS.iter().find(|(known, _)| *known == name.node) else {
            let message = unknown("M7002", "question", name, QUESTIONS.iter().map(|(known, _)| *known));
            self.say(message);
            return None;
        };
        if args.len() != *count {
            let nodes = if *count == 1 { "one node" } else { "two nodes" };
            let title = format!("`{}` is about {nodes}", name.node);
            self.say(Diagnostic::error(
                "M7002",
                title,
                name.span,
                format!("this has {} arguments", args.len()),
            ));
            return None;
        }
        let mut ids = Vec::new();
        for arg in args {
            ids.push(self.node(&arg.value, scope)?);
        }
        Some(match name.node.as_str() {
            "size" => Fact::Size(ids[0]),
            "immutable" => Fact::Immutable(ids[0]),
            "volatile" => Fact::Volatile(ids[0]),
            _ => Fact::Reaches(ids[0], ids[1]),
        })
    }

    /// The place that an argument of a question names.
    fn node(&mut self, expr: &'a Expr, scope: &Scope) -> Option<NodeId> {
        let ExprKind::Name(name) = &expr.kind else {
            self.say(Diagnostic::error("M7002", "questions are about nodes", expr.span, "this is no node"));
            return None;
        };
        match self.look_up(name, scope)? {
            Named::Node(at) | Named::Port(at) => Some(at),
            // A module is what is below its port above.
            Named::Module { above, .. } => Some(above),
            Named::Broken => None,
        }
    }
}

impl Fact {
    /// Puts the numbers of nodes in the place of those of items; `None` if one has none.
    pub(super) fn renumber(&mut self, number_of: &impl Fn(usize) -> Option<NodeId>) -> Option<()> {
        match self {
            Fact::Value(_) => {}
            Fact::Size(id) | Fact::Immutable(id) | Fact::Volatile(id) => *id = number_of(*id)?,
            Fact::Reaches(a, b) => (*a, *b) = (number_of(*a)?, number_of(*b)?),
            Fact::Not(inner) => inner.renumber(number_of)?,
            Fact::Binary(_, a, b) => {
                a.renumber(number_of)?;
                b.renumber(number_of)?;
            }
        }
        Some(())
    }
}
