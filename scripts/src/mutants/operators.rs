//! The slips: mistakes that engineers make by accident, found as places in a syntax tree.

mod felt;

use super::render::{Edit, Piece};
use proc_macro2::Span;
use std::ops::Range;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{BinOp, Block, Expr, ExprMatch, Pat, ReturnType, Signature, Stmt};

/// A possible slip at one place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Slip {
    /// Its kind.
    pub operator: &'static str,
    /// The edit that makes it.
    pub edit: Edit,
    /// The original code, on one line.
    pub was: String,
    /// The code with the slip.
    pub becomes: String,
}

/// Functions that only produce output for people.
const TALK: [&str; 14] = [
    "fmt",
    "describe",
    "sentence",
    "name",
    "names",
    "help",
    "usage",
    "report",
    "explain",
    "refused",
    "statistics",
    "stats",
    "print",
    "words",
];
/// Calls that only produce output for people, or for the testbed.
const SAID: [&str; 10] = [
    ".log(",
    ".mark(",
    ".work(",
    ".bug(",
    "print!",
    "println!",
    ".stats",
    "thread::panicking()",
    "console.progress(",
    "inner.refused(",
];
/// Longest code that a report shows, in characters.
const SHOWN: usize = 110;

/// All slips of one source text.
///
/// # Errors
/// Why the text is not Rust.
pub(crate) fn slips(source: &str) -> Result<Vec<Slip>, String> {
    let file = syn::parse_file(source).map_err(|e| format!("line {}: {e}", e.span().start().line))?;
    let mut finder =
        Finder { source, slips: Vec::new(), gives: Vec::new(), ends: Vec::new(), asserts: Vec::new() };
    finder.visit_file(&file);
    Ok(finder.slips)
}

/// What a function returns, as far as slips depend on it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Gives {
    Nothing,
    /// `Result<(), _>`
    Done,
    Bool,
    Other,
}

struct Finder<'a> {
    source: &'a str,
    slips: Vec<Slip>,
    /// Return kinds of the enclosing functions, and `Other` for closures and async blocks.
    gives: Vec<Gives>,
    /// Where the last expression of each of these functions begins, if it has one.
    ends: Vec<usize>,
    /// Where nothing but assertions is left of each of these functions.
    asserts: Vec<usize>,
}

fn text(text: &str) -> Piece {
    Piece::Text(text.into())
}

fn range(span: Span) -> Range<usize> {
    span.byte_range()
}

/// `if SELECTED { mutated } else { original }`, as an expression.
fn either(mutated: Vec<Piece>, original: Range<usize>) -> Vec<Piece> {
    let mut pieces = vec![text("(if "), Piece::Selected, text(" { ")];
    pieces.extend(mutated);
    pieces.extend([text(" } else { "), Piece::Source(original), text(" })")]);
    pieces
}

/// The same as a statement.
fn either_statement(mutated: Vec<Piece>, original: Range<usize>) -> Vec<Piece> {
    let mut pieces = vec![text("if "), Piece::Selected, text(" { ")];
    pieces.extend(mutated);
    pieces.extend([text(" } else { "), Piece::Source(original), text(" }")]);
    pieces
}

fn unless(original: Range<usize>) -> Vec<Piece> {
    vec![text("if !"), Piece::Selected, text(" { "), Piece::Source(original), text(" }")]
}

impl Finder<'_> {
    fn code(&self, at: Range<usize>) -> String {
        let words: Vec<&str> = self.source[at].split_whitespace().collect();
        let line = words.join(" ");
        if line.chars().count() <= SHOWN {
            return line;
        }
        line.chars().take(SHOWN).chain(['…']).collect()
    }

    fn is_said(&self, at: Range<usize>) -> bool {
        SAID.iter().any(|word| self.source[at.clone()].contains(word))
    }

    fn slip(&mut self, operator: &'static str, span: Range<usize>, pieces: Vec<Piece>, becomes: String) {
        let was = self.code(span.clone());
        self.slips.push(Slip { operator, edit: Edit { span, pieces }, was, becomes });
    }

    /// Replaces an expression by `mutated`.
    fn expression(&mut self, operator: &'static str, span: Range<usize>, mutated: Vec<Piece>) {
        let becomes: String = mutated
            .iter()
            .map(|piece| match piece {
                Piece::Text(text) => text.clone(),
                Piece::Source(part) => self.code(part.clone()),
                Piece::Selected => String::new(),
            })
            .collect();
        let pieces = either(mutated, span.clone());
        self.slip(operator, span, pieces, becomes);
    }

    fn function(&mut self, sig: &Signature, block: &Block, visit: impl FnOnce(&mut Self)) {
        let name = sig.ident.to_string();
        let talks =
            TALK.contains(&name.as_str()) || name.starts_with("print_") || name.starts_with("describe_");
        if talks || sig.constness.is_some() {
            return;
        }
        let gives = match &sig.output {
            ReturnType::Default => Gives::Nothing,
            ReturnType::Type(_, ty) => {
                let ty: String = self.source[range(ty.span())].split_whitespace().collect();
                match ty.as_str() {
                    "bool" => Gives::Bool,
                    ty if ty.starts_with("Result<(),") => Gives::Done,
                    _ => Gives::Other,
                }
            }
        };
        self.gives.push(gives);
        let mut end = usize::MAX;
        if let Some(Stmt::Expr(tail, None)) = block.stmts.last() {
            end = range(tail.span()).start;
            self.tail(tail, gives);
        }
        self.ends.push(end);
        let asserts = felt::asserts_at_the_end(block).map_or(usize::MAX, |first| range(first.span()).start);
        self.asserts.push(asserts);
        visit(self);
        self.asserts.pop();
        self.ends.pop();
        self.gives.pop();
    }

    /// The last expression of a function.
    fn tail(&mut self, tail: &Expr, gives: Gives) {
        let span = range(tail.span());
        let simple = matches!(tail, Expr::MethodCall(_) | Expr::Await(_) | Expr::Call(_) | Expr::Path(_));
        if !simple || self.is_said(span.clone()) {
            return;
        }
        match gives {
            Gives::Nothing => self.lost(tail, span),
            Gives::Done if !self.source[span.clone()].starts_with("Ok(") => {
                let mutated = vec![text("let _ = "), Piece::Source(span.clone()), text("; Ok(())")];
                self.slip(
                    "error ignored",
                    span.clone(),
                    either(mutated, span),
                    "its result is ignored, Ok(())".into(),
                );
            }
            _ => {}
        }
    }

    /// Skips a statement.
    fn lost(&mut self, expr: &Expr, span: Range<usize>) {
        let code = &self.source[span.clone()];
        let has = |words: &[&str]| words.iter().any(|word| code.contains(word));
        // The kind is chosen by words in the code: what is synchronised, woken or released is most easily forgotten.
        let operator = match expr {
            Expr::Assign(_) | Expr::Binary(_) => "assignment lost",
            _ if has(&["wake", "notify", ".signal"]) => "wake lost",
            _ if has(&["sync", "barrier"]) => "sync lost",
            _ if has(&[
                "drop(",
                "release",
                "free",
                "close",
                "give_back",
                "remove",
                "clear",
                "abort",
                "shutdown",
                "unmap",
            ]) =>
            {
                "release lost"
            }
            _ if has(&[".await"]) => "await lost",
            _ if has(&[".set(", ".insert(", ".push", ".extend", ".replace(", ".take()"]) => "assignment lost",
            _ => "call lost",
        };
        self.slip(operator, span.clone(), unless(span), "left out".into());
    }

    fn statements(&mut self, block: &Block) {
        for (i, statement) in block.stmts.iter().enumerate() {
            let (before, after) = (&block.stmts[..i], &block.stmts[i + 1..]);
            if !felt::ends_anyway(self.source, before, statement, after) {
                self.statement(statement);
            }
            if i > 0 {
                self.early_return(range(statement.span()).start);
                self.neighbours(&block.stmts[i - 1], statement);
            }
        }
    }

    fn statement(&mut self, statement: &Stmt) {
        let whole = range(statement.span());
        if self.is_said(whole.clone()) {
            return;
        }
        match statement {
            Stmt::Expr(
                expr @ (Expr::MethodCall(_) | Expr::Call(_) | Expr::Await(_) | Expr::Assign(_)),
                Some(_),
            ) => {
                self.lost(expr, whole);
            }
            Stmt::Expr(expr @ Expr::Binary(_), Some(_)) => self.lost(expr, whole),
            Stmt::Expr(expr @ Expr::Try(tried), Some(_)) => {
                self.lost(expr, whole.clone());
                let inner = range(tried.expr.span());
                let mutated = vec![text("let _ = "), Piece::Source(inner), text(";")];
                self.slip(
                    "error ignored",
                    whole.clone(),
                    either_statement(mutated, whole),
                    "`?` lost".into(),
                );
            }
            Stmt::Expr(Expr::Return(back), _) => self.error_returned(back, whole),
            Stmt::Expr(Expr::Continue(_), Some(_)) => {
                let pieces = either_statement(vec![text("break;")], whole.clone());
                self.slip("loop left", whole, pieces, "break;".into());
            }
            Stmt::Expr(Expr::Break(left), Some(_)) if left.expr.is_none() && left.label.is_none() => {
                let pieces = either_statement(vec![text("continue;")], whole.clone());
                self.slip("loop not left", whole, pieces, "continue;".into());
            }
            Stmt::Expr(Expr::Match(all), _) => self.arms(all),
            Stmt::Local(local) => self.guard(local),
            _ => {}
        }
    }

    /// `return Err(..)` in a function whose success has no value.
    fn error_returned(&mut self, back: &syn::ExprReturn, whole: Range<usize>) {
        let fails = back.expr.as_ref().is_some_and(|e| self.source[range(e.span())].starts_with("Err("));
        if fails && self.gives.last() == Some(&Gives::Done) {
            let pieces = either_statement(vec![text("return Ok(());")], whole.clone());
            self.slip("error ignored", whole, pieces, "return Ok(());".into());
        }
    }

    /// Arms of a match whose value is not used.
    fn arms(&mut self, all: &ExprMatch) {
        for arm in &all.arms {
            let body = range(arm.body.span());
            let empty = matches!(&*arm.body, Expr::Block(b) if b.block.stmts.is_empty());
            let seeded = matches!(&arm.pat, Pat::Guard(guard) if felt::takes_bug(&guard.guard));
            if empty
                || seeded
                || self.is_said(body.clone())
                || self.source[body.clone()].starts_with("unreachable!")
            {
                continue;
            }
            let mut pieces = vec![text("{ ")];
            pieces.extend(unless(body.clone()));
            pieces.push(text(" }"));
            self.slip("arm lost", body, pieces, "{}".into());
        }
    }

    /// `let _turn = ..`: a value held until the end of the block.
    fn guard(&mut self, local: &syn::Local) {
        let (Pat::Ident(name), Some(init)) = (&local.pat, &local.init) else { return };
        if !name.ident.to_string().starts_with('_') || init.diverge.is_some() {
            return;
        }
        let span = range(init.expr.span());
        let value = || Piece::Source(span.clone());
        let without =
            vec![text("(if "), Piece::Selected, text(" { None } else { Some("), value(), text(") })")];
        // An existing variable lives on, whether it gets another name or not.
        if !matches!(&*init.expr, Expr::Path(_)) {
            self.slip("guard lost", span.clone(), without, "left out".into());
        }
        let early = vec![
            text("(if "),
            Piece::Selected,
            text(" { drop("),
            value(),
            text("); None } else { Some("),
            value(),
            text(") })"),
        ];
        self.slip("guard released early", span, early, "dropped at once".into());
    }

    fn early_return(&mut self, at: usize) {
        let (back, shown) = match self.gives.last() {
            Some(Gives::Nothing) => (" { return; } ", "return; before it"),
            Some(Gives::Done) => (" { return Ok(()); } ", "return Ok(()); before it"),
            Some(Gives::Bool) => (" { return false; } ", "return false; before it"),
            _ => return,
        };
        // Before a return, or at the end of a function, of the same value, it would change nothing.
        let ends = |value: &str| self.ends.last() == Some(&at) && self.source[at..].starts_with(value);
        // Nor before assertions that hold, and nothing else.
        let asserts = self.asserts.last().is_some_and(|first| at >= *first);
        if asserts || self.source[at..].starts_with("return") || ends("false") || ends("Ok(())") {
            return;
        }
        let pieces = vec![text("if "), Piece::Selected, text(back)];
        let line = self.source[at..].find('\n').map_or(self.source.len(), |n| at + n);
        let was = self.code(at..line);
        let edit = Edit { span: at..at, pieces };
        self.slips.push(Slip { operator: "early return", edit, was, becomes: shown.into() });
    }

    /// Two statements, one after the other.
    fn neighbours(&mut self, first: &Stmt, second: &Stmt) {
        let (a, b) = (range(first.span()), range(second.span()));
        if self.is_said(a.clone()) || self.is_said(b.clone()) || !is_action(first) {
            return;
        }
        if !felt::order(self.source, first, second) {
            return;
        }
        if is_action(second) {
            let mutated = vec![Piece::Source(b.clone()), text(" "), Piece::Source(a.clone())];
            let becomes = format!("{} {}", self.code(b.clone()), self.code(a.clone()));
            let pieces = either_statement(mutated, a.start..b.end);
            self.slip("order turned round", a.start..b.end, pieces, becomes);
        }
        if let Stmt::Local(local) = second {
            self.stale(a, b, local);
        }
    }

    /// A value read after an action is read before it instead.
    fn stale(&mut self, action: Range<usize>, read: Range<usize>, local: &syn::Local) {
        let Some(init) = &local.init else { return };
        let value = range(init.expr.span());
        let reads = [".get()", ".borrow()", "load_", ".len()", ".is_", "now_ns", ".seen", ".clone()"];
        let code = &self.source[value.clone()];
        if init.diverge.is_some() || !reads.iter().any(|r| code.contains(r)) {
            return;
        }
        if !felt::stale(&self.source[action.clone()], code) {
            return;
        }
        let name = format!("stale_{}", value.start);
        let pieces = vec![
            text(&format!("let {name} = if ")),
            Piece::Selected,
            text(" { Some("),
            Piece::Source(value.clone()),
            text(") } else { None }; "),
            Piece::Source(action.clone()),
            text(" let "),
            Piece::Source(range(local.pat.span())),
            text(&format!(" = match {name} {{ Some(value) => value, None => ")),
            Piece::Source(value),
            text(" };"),
        ];
        let becomes = format!("{} {}", self.code(read.clone()), self.code(action.clone()));
        self.slip("stale copy", action.start..read.end, pieces, becomes);
    }

    fn condition(&mut self, cond: &Expr) {
        let span = range(cond.span());
        if self.is_said(span.clone()) {
            return;
        }
        if has_let(cond) {
            let pieces = vec![text("!"), Piece::Selected, text(" && "), Piece::Source(span.clone())];
            self.slip("condition false", span, pieces, "false".into());
            return;
        }
        self.expression("condition false", span.clone(), vec![text("false")]);
        self.expression("condition true", span.clone(), vec![text("true")]);
        self.expression("condition negated", span.clone(), vec![text("!("), Piece::Source(span), text(")")]);
    }

    fn binary(&mut self, e: &syn::ExprBinary) {
        let (span, left, right) = (range(e.span()), range(e.left.span()), range(e.right.span()));
        let with = |op: &str| {
            vec![Piece::Source(left.clone()), text(&format!(" {op} ")), Piece::Source(right.clone())]
        };
        match e.op {
            BinOp::Lt(_) => self.expression("bound off by one", span, with("<=")),
            BinOp::Le(_) => self.expression("bound off by one", span, with("<")),
            BinOp::Gt(_) => self.expression("bound off by one", span, with(">=")),
            BinOp::Ge(_) => self.expression("bound off by one", span, with(">")),
            BinOp::And(_) | BinOp::Or(_)
                if !has_let(&e.left) && !has_let(&e.right) && !self.is_said(span.clone()) =>
            {
                self.expression("condition lost", span.clone(), vec![Piece::Source(left.clone())]);
                self.expression("condition lost", span, vec![Piece::Source(right.clone())]);
            }
            BinOp::Add(_) | BinOp::Sub(_) if &self.source[right.clone()] == "1" => {
                self.expression("bound off by one", span, vec![Piece::Source(left)]);
            }
            _ => {}
        }
    }
}

/// A statement that binds no name and continues to the next one.
fn is_action(statement: &Stmt) -> bool {
    let Stmt::Expr(expr, Some(_)) = statement else { return false };
    matches!(
        expr,
        Expr::MethodCall(_)
            | Expr::Call(_)
            | Expr::Await(_)
            | Expr::Try(_)
            | Expr::Assign(_)
            | Expr::Binary(_)
    )
}

fn has_let(expr: &Expr) -> bool {
    match expr {
        Expr::Let(_) => true,
        Expr::Binary(b) => has_let(&b.left) || has_let(&b.right),
        Expr::Paren(p) => has_let(&p.expr),
        _ => false,
    }
}

fn is_test(attrs: &[syn::Attribute]) -> bool {
    attrs.iter().any(|a| {
        let cfg_test = || a.parse_args::<syn::Ident>().is_ok_and(|word| word == "test");
        a.path().is_ident("test") || (a.path().is_ident("cfg") && cfg_test())
    })
}

impl<'ast> Visit<'ast> for Finder<'_> {
    fn visit_item_mod(&mut self, i: &'ast syn::ItemMod) {
        if !is_test(&i.attrs) {
            visit::visit_item_mod(self, i);
        }
    }
    fn visit_item_impl(&mut self, i: &'ast syn::ItemImpl) {
        let of = i.trait_.as_ref().and_then(|(path, _)| path.segments.last()).map(|s| s.ident.to_string());
        let talks = matches!(of.as_deref(), Some("Display" | "Debug" | "Error" | "Serialize"));
        if !talks && !is_test(&i.attrs) {
            visit::visit_item_impl(self, i);
        }
    }
    fn visit_item_fn(&mut self, i: &'ast syn::ItemFn) {
        if !is_test(&i.attrs) {
            self.function(&i.sig, &i.block, |s| visit::visit_item_fn(s, i));
        }
    }
    fn visit_impl_item_fn(&mut self, i: &'ast syn::ImplItemFn) {
        if !is_test(&i.attrs) {
            self.function(&i.sig, &i.block, |s| visit::visit_impl_item_fn(s, i));
        }
    }
    // Not executed, or executed at compile time.
    fn visit_item_const(&mut self, _: &'ast syn::ItemConst) {}
    fn visit_item_static(&mut self, _: &'ast syn::ItemStatic) {}
    fn visit_impl_item_const(&mut self, _: &'ast syn::ImplItemConst) {}
    fn visit_type(&mut self, _: &'ast syn::Type) {}
    fn visit_attribute(&mut self, _: &'ast syn::Attribute) {}
    fn visit_pat(&mut self, i: &'ast Pat) {
        if let Pat::Guard(guard) = i {
            self.condition(&guard.guard);
            self.visit_expr(&guard.guard);
        }
    }

    fn visit_expr_closure(&mut self, i: &'ast syn::ExprClosure) {
        self.gives.push(Gives::Other);
        visit::visit_expr_closure(self, i);
        self.gives.pop();
    }
    fn visit_expr_async(&mut self, i: &'ast syn::ExprAsync) {
        self.gives.push(Gives::Other);
        visit::visit_expr_async(self, i);
        self.gives.pop();
    }
    fn visit_block(&mut self, i: &'ast Block) {
        self.statements(i);
        visit::visit_block(self, i);
    }
    fn visit_expr_if(&mut self, i: &'ast syn::ExprIf) {
        // A slip in output alone has no effect.
        let then = &i.then_branch.stmts;
        if i.else_branch.is_none() && then.iter().all(|s| self.is_said(range(s.span()))) {
            return;
        }
        // Nor has one in code that runs only with a seeded bug.
        if felt::takes_bug(&i.cond) {
            self.visit_expr(&i.cond);
            if let Some((_, otherwise)) = &i.else_branch {
                self.visit_expr(otherwise);
            }
            return;
        }
        if !felt::chooses_words(i) {
            self.condition(&i.cond);
        }
        visit::visit_expr_if(self, i);
    }
    fn visit_expr_while(&mut self, i: &'ast syn::ExprWhile) {
        if !has_let(&i.cond) {
            self.expression("condition false", range(i.cond.span()), vec![text("false")]);
        }
        visit::visit_expr_while(self, i);
    }
    fn visit_expr_binary(&mut self, i: &'ast syn::ExprBinary) {
        // Without the seeded bug it is false, whatever its other side is.
        if matches!(i.op, BinOp::And(_)) && (felt::takes_bug(&i.left) || felt::takes_bug(&i.right)) {
            return;
        }
        self.binary(i);
        visit::visit_expr_binary(self, i);
    }
    fn visit_expr_method_call(&mut self, i: &'ast syn::ExprMethodCall) {
        let (name, args) = (i.method.to_string(), i.args.len());
        let first = i.args.first().map(|a| &self.source[range(a.span())]);
        let is_step =
            matches!(name.as_str(), "wrapping_add" | "wrapping_sub" | "saturating_sub") && first == Some("1");
        let is_bound = matches!(name.as_str(), "min" | "max" | "next_multiple_of") && args == 1;
        let receiver = Piece::Source(range(i.receiver.span()));
        if is_step {
            self.expression("bound off by one", range(i.span()), vec![receiver]);
        } else if is_bound {
            self.expression("bound lost", range(i.span()), vec![receiver]);
        }
        visit::visit_expr_method_call(self, i);
    }
}

#[cfg(test)]
mod tests;
