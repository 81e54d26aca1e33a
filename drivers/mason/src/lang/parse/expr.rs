//! Expressions: operators by their strength, quantities with units.

use super::{MAX_OPERATORS, Parsed, Parser, Wrong};
use crate::lang::ast::{BinaryOp, Expr, ExprKind, Quantity, Spanned, UNITS, Unit};
use crate::lang::lex::Kind;
use crate::lang::{Diagnostic, Span};

/// Operators by the level on which they bind, the weakest first.
const LEVELS: [&[(&str, BinaryOp)]; 3] = [
    &[("or", BinaryOp::Or)],
    &[("and", BinaryOp::And)],
    &[
        ("==", BinaryOp::Equal),
        ("!=", BinaryOp::NotEqual),
        ("<=", BinaryOp::AtMost),
        (">=", BinaryOp::AtLeast),
        ("<", BinaryOp::Less),
        (">", BinaryOp::Greater),
    ],
];
const SUMS: &[(&str, BinaryOp)] = &[("+", BinaryOp::Add), ("-", BinaryOp::Subtract)];
const PRODUCTS: &[(&str, BinaryOp)] = &[("*", BinaryOp::Multiply)];

impl Parser<'_> {
    pub(super) fn expr(&mut self) -> Parsed<Expr> {
        self.within(|parser| {
            let left = parser.level(0)?;
            if !parser.is_word("implies") {
                return Ok(left);
            }
            let op = Spanned { node: BinaryOp::Implies, span: parser.bump().span };
            let right = parser.expr()?;
            Ok(binary(op, left, right))
        })
    }

    fn level(&mut self, level: usize) -> Parsed<Expr> {
        match LEVELS.get(level) {
            None => self.range(),
            // `not` binds weaker than comparisons.
            Some(_) if level == 2 && self.is_word("not") => {
                let start = self.bump().span;
                let inner = self.within(|parser| parser.level(2))?;
                let span = start.to(inner.span);
                Ok(Expr { kind: ExprKind::Not(Box::new(inner)), span })
            }
            // A comparison is not compared again.
            Some(ops) if level == 2 => {
                let left = self.range()?;
                match self.operator(ops) {
                    Some(op) => {
                        let right = self.range()?;
                        Ok(binary(op, left, right))
                    }
                    None => Ok(left),
                }
            }
            Some(ops) => self.row(ops, |parser| parser.level(level + 1)),
        }
    }

    fn range(&mut self) -> Parsed<Expr> {
        let from = self.sum()?;
        if !self.eat("..") {
            return Ok(from);
        }
        let to = self.sum()?;
        let span = from.span.to(to.span);
        Ok(Expr { kind: ExprKind::Range(Box::new(from), Box::new(to)), span })
    }

    fn sum(&mut self) -> Parsed<Expr> {
        self.row(SUMS, |parser| parser.row(PRODUCTS, Self::atom))
    }

    /// Operators of one strength, which bind to the left.
    fn row(
        &mut self,
        ops: &[(&str, BinaryOp)],
        mut part: impl FnMut(&mut Self) -> Parsed<Expr>,
    ) -> Parsed<Expr> {
        let mut left = part(self)?;
        while let Some(op) = self.operator(ops) {
            // A row makes a tree that is as high as the row is long.
            self.operators += 1;
            if self.operators > MAX_OPERATORS {
                return self.too_deep();
            }
            let right = part(self)?;
            left = binary(op, left, right);
        }
        Ok(left)
    }

    fn operator(&mut self, ops: &[(&str, BinaryOp)]) -> Option<Spanned<BinaryOp>> {
        let (_, op) = *ops.iter().find(|(text, _)| self.is(text) || self.is_word(text))?;
        Some(Spanned { node: op, span: self.bump().span })
    }

    fn atom(&mut self) -> Parsed<Expr> {
        let token = self.peek().clone();
        let at = |kind, span: Span| Ok(Expr { kind, span });
        match token.kind {
            Kind::Number(digits, decimals) => {
                self.bump();
                let quantity = self.quantity(digits, decimals)?;
                let span = token.span.to(self.last());
                at(ExprKind::Quantity(quantity), span)
            }
            Kind::Param => {
                self.bump();
                at(ExprKind::Param(self.source(token.span)[1..].to_owned()), token.span)
            }
            Kind::Text(text) => {
                self.bump();
                at(ExprKind::Text(text), token.span)
            }
            Kind::Sign("(") => {
                self.bump();
                let inner = self.expr()?;
                let end = self.expect(")")?;
                at(inner.kind, token.span.to(end))
            }
            Kind::Sign("[") => {
                self.bump();
                let mut items = Vec::new();
                while !self.is("]") {
                    items.push(self.expr()?);
                    if !self.eat(",") {
                        break;
                    }
                }
                let end = self.expect("]")?;
                at(ExprKind::List(items), token.span.to(end))
            }
            Kind::Word if self.ahead_is(1, "(") => {
                let name = self.name("a question")?;
                let args = self.args()?;
                let span = token.span.to(self.last());
                at(ExprKind::Call(name, args), span)
            }
            Kind::Word => {
                let name = self.qname()?;
                let span = name.span;
                at(ExprKind::Name(name), span)
            }
            _ => self.expected("a value"),
        }
    }

    fn quantity(&mut self, digits: u64, decimals: u32) -> Parsed<Quantity> {
        let unit = self.unit()?;
        let per = match unit.is_some() && self.is("/") {
            true => {
                self.bump();
                match self.unit()? {
                    Some(per) => Some(per),
                    None => return self.expected("a unit of time: `s`"),
                }
            }
            false => None,
        };
        Ok(Quantity { digits, decimals, unit, per })
    }

    /// The unit that follows, if any.
    fn unit(&mut self) -> Parsed<Option<Spanned<Unit>>> {
        let token = self.peek().clone();
        if self.is("%") {
            self.bump();
            return Ok(Some(Spanned { node: Unit::Percent, span: token.span }));
        }
        if token.kind != Kind::Word || ["implies", "or", "and", "not"].iter().any(|word| self.is_word(word)) {
            return Ok(None);
        }
        let word = self.source(token.span);
        if let Some((_, unit)) = UNITS.iter().find(|(name, _)| *name == word) {
            let node = *unit;
            self.bump();
            return Ok(Some(Spanned { node, span: token.span }));
        }
        let title = format!("`{word}` is not a unit");
        let help = match nearest(word) {
            Some(units) => format!("did you mean {units}?"),
            None => {
                "units are B, kB, MB, GB, TB, KiB, MiB, GiB, TiB, sectors, ns, us, ms, s, min, h, % and io/s"
                    .into()
            }
        };
        self.say(Diagnostic::error("M1012", title, token.span, "expected a unit, or nothing").help(help));
        Err(Wrong)
    }
}

/// What somebody who wrote `word` for a unit may have meant. Who means 1000 and who 1024 is not guessed.
fn nearest(word: &str) -> Option<&'static str> {
    let lower = word.to_ascii_lowercase();
    Some(match lower.trim_end_matches("ps") {
        "k" | "kb" | "ki" | "kib" | "kbyte" | "kbytes" => "kB (1000 bytes) or KiB (1024 bytes)",
        "m" | "mb" | "mi" | "mib" | "mbyte" | "mbytes" => "MB (1000 kB), MiB (1024 KiB), or min",
        "g" | "gb" | "gi" | "gib" | "gbyte" | "gbytes" => "GB (1000 MB) or GiB (1024 MiB)",
        "t" | "tb" | "ti" | "tib" => "TB (1000 GB) or TiB (1024 GiB)",
        "b" | "byte" | "bytes" => "B",
        "sec" | "secs" | "second" | "seconds" => "s",
        "msec" | "msecs" | "millis" => "ms",
        "usec" | "usecs" | "micros" => "us",
        "hour" | "hours" => "h",
        "minute" | "minutes" | "mins" => "min",
        "io" | "ios" | "req" | "reqs" | "requests" => "io/s",
        _ => return None,
    })
}

fn binary(op: Spanned<BinaryOp>, left: Expr, right: Expr) -> Expr {
    let span = left.span.to(right.span);
    Expr { kind: ExprKind::Binary(op, Box::new(left), Box::new(right)), span }
}
