//! Slips that cannot have an effect, judged by their form alone: they are left out.

use std::ops::Range;
use syn::spanned::Spanned;
use syn::{Block, Expr, ExprIf, Lit, Stmt};

fn range(statement: &Stmt) -> Range<usize> {
    statement.span().byte_range()
}

/// Whether the order of two neighbours may matter.
pub(super) fn order(source: &str, first: &Stmt, second: &Stmt) -> bool {
    let (a, b) = (&source[range(first)], &source[range(second)]);
    let said = is_asserted(first) || is_asserted(second);
    !said && !only_wakes(a, b) && !only_wakes(b, a) && meet((first, a), (second, b))
}

/// Whether it may matter that `value` was read before `action`: not if it is new memory, or about another name, or of
/// another cell than the one that the action changes. The clock does not advance within a turn.
pub(super) fn stale(action: &str, value: &str) -> bool {
    let receiver = action.split(['.', '(', ' ']).next().unwrap_or_default();
    let shared = ["self", "get()", "borrow", "load_"].iter().any(|word| value.contains(word));
    let apart = !action.contains(".await") && !shared && !words(value).contains(&receiver);
    let cells = changed_cell(action).is_some_and(|cell| read_cell(value).is_some_and(|read| read != cell));
    let copies = changed_cell(action).is_some() && only_copies(value);
    !apart && !cells && !copies && !value.contains("::with_capacity(")
}

/// Whether an expression only copies what is in no cell: a change of a cell cannot change it.
fn only_copies(value: &str) -> bool {
    let rest = value.replace(".clone()", "").replace("Rc::clone(", "(").replace("Rc::downgrade(", "(");
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '_' | '.');
    // A name before a parenthesis is a call.
    let calls = rest.match_indices('(').any(|(at, _)| rest[..at].ends_with(plain));
    !calls && rest.chars().all(|c| plain(c) || matches!(c, '(' | ')' | ',' | '&' | ' '))
}

/// The cell that an expression reads, such as `self.all` of `self.all.borrow().len()`.
fn read_cell(value: &str) -> Option<&str> {
    let at = [".borrow()", ".get()"].iter().filter_map(|read| value.find(read)).min()?;
    let name = &value[..at];
    name.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '.')).then_some(name)
}

/// `drop(name);` followed only by wake-ups: woken tasks have their turn after the block is left. At the end of the
/// block that binds the name, the drop happens anyway.
pub(super) fn ends_anyway(source: &str, before: &[Stmt], statement: &Stmt, after: &[Stmt]) -> bool {
    let code = &source[range(statement)];
    let Some(dropped) = code.strip_prefix("drop(").and_then(|rest| rest.strip_suffix(");")) else {
        return false;
    };
    if !dropped.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '(' | ')' | ',' | ' ')) {
        return false;
    }
    let lets: Vec<&str> = before
        .iter()
        .filter_map(|s| {
            if let Stmt::Local(local) = s { Some(&source[local.pat.span().byte_range()]) } else { None }
        })
        .flat_map(words)
        .collect();
    match after {
        [] => words(dropped).iter().all(|name| name.is_empty() || lets.contains(name)),
        after => after.iter().all(|s| wakes(&source[range(s)])),
    }
}

/// Whether `cond` holds only with a seeded bug.
pub(super) fn takes_bug(cond: &Expr) -> bool {
    match cond {
        Expr::MethodCall(call) => call.method == "bug",
        Expr::Binary(e) if matches!(e.op, syn::BinOp::And(_)) => takes_bug(&e.left) || takes_bug(&e.right),
        Expr::Paren(e) => takes_bug(&e.expr),
        _ => false,
    }
}

/// The first of the assertions that a function ends with.
pub(super) fn asserts_at_the_end(body: &Block) -> Option<&Stmt> {
    let asserts = |statement: &&Stmt| {
        let Stmt::Macro(says) = statement else { return false };
        says.mac.path.get_ident().is_some_and(|name| name.to_string().starts_with("assert"))
    };
    body.stmts.iter().rev().take_while(asserts).last()
}

/// Whether an `if` chooses between two texts.
pub(super) fn chooses_words(choice: &ExprIf) -> bool {
    let text = |block: &Block| {
        let [Stmt::Expr(Expr::Lit(one), None)] = block.stmts.as_slice() else { return false };
        matches!(one.lit, Lit::Str(_))
    };
    let Some((_, otherwise)) = &choice.else_branch else { return false };
    text(&choice.then_branch) && matches!(&**otherwise, Expr::Block(b) if text(&b.block))
}

fn wakes(code: &str) -> bool {
    code.contains("Waker::wake") || code.ends_with(".wake();")
}

/// Whether one of two statements only wakes a task, whose turn comes after both of them.
fn only_wakes(one: &str, other: &str) -> bool {
    wakes(one) && !one.contains("&&") && !other.contains(".await") && !other.contains("waker")
}

/// Whether one of two statements may affect the other: not if one only counts in a variable of its own, or if both
/// change cells and these are different.
fn meet((first, a): (&Stmt, &str), (second, b): (&Stmt, &str)) -> bool {
    let apart = |one: &Stmt, other: &str| {
        counted(one).is_some_and(|name| !words(other).contains(&name.to_string().as_str()))
    };
    if apart(first, b) || apart(second, a) {
        return false;
    }
    if listed(first, a, b) || listed(second, b, a) {
        return false;
    }
    if let (Some(one), Some(other)) = (changed_place(first, a), changed_place(second, b))
        && !a.contains(other)
        && !b.contains(one)
    {
        return false;
    }
    match (changed_cell(a), changed_cell(b)) {
        (Some(one), Some(other)) => b.contains(one) || a.contains(other),
        _ => true,
    }
}

/// Whether `statement` only puts a value into a local list that `other` does not name, and whose value `other` does not
/// change.
fn listed(statement: &Stmt, code: &str, other: &str) -> bool {
    let Stmt::Expr(Expr::MethodCall(call), Some(_)) = statement else { return false };
    let Expr::Path(list) = &*call.receiver else { return false };
    let leaves = [".await", "?", "return", "break", "continue"].iter().any(|word| other.contains(word));
    let target = other.split(['.', '(', ' ', '[']).next().unwrap_or_default().trim_start_matches('*');
    let quiet = changed_place(statement, code).is_some() && !words(code).contains(&target);
    let named = list.path.get_ident().is_none_or(|name| words(other).contains(&name.to_string().as_str()));
    quiet && !leaves && !named
}

fn words(code: &str) -> Vec<&str> {
    code.split(|c: char| !c.is_alphanumeric() && c != '_').collect()
}

/// The cell that a statement changes, if it does nothing else, such as `self.free` of
/// `self.free.borrow_mut().clear();`.
fn changed_cell(code: &str) -> Option<&str> {
    const CHANGES: [&str; 8] = [
        ".set(",
        ".borrow_mut().retain(",
        ".borrow_mut().push(",
        ".borrow_mut().push_back(",
        ".borrow_mut().insert(",
        ".borrow_mut().remove(",
        ".borrow_mut().clear(",
        ".borrow_mut().extend(",
    ];
    let (at, _) = CHANGES.iter().filter_map(|change| Some((code.find(change)?, change))).min()?;
    let name = &code[..at];
    let plain = name.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '.'));
    (plain && !code.contains(".await") && !code.contains('?')).then_some(name)
}

/// The place that a statement changes by itself, if it does nothing else, such as `self.end` of `self.end += 1;`, or
/// `list[0]` of `list[0].push(x);` and `list[0].clear();`. Nothing reads it between the statement and its neighbour.
fn changed_place<'a>(statement: &Stmt, code: &'a str) -> Option<&'a str> {
    let Stmt::Expr(expr, Some(_)) = statement else { return None };
    let (place, quiet) = match expr {
        Expr::Assign(e) => (&e.left, is_quiet(&e.right)),
        Expr::Binary(e) => (&e.left, is_quiet(&e.right)),
        Expr::MethodCall(e) => {
            let changes =
                e.method == "push" || e.method == "push_back" || e.method == "clear" && e.args.is_empty();
            (&e.receiver, changes && e.args.iter().all(is_quiet))
        }
        _ => return None,
    };
    let start = statement.span().byte_range().start;
    let range = place.span().byte_range();
    (quiet && is_quiet(place)).then(|| code[range.start - start..range.end - start].trim_start_matches('*'))
}

/// An expression that changes nothing and does not wait: as [`is_plain`], places in lists, the larger of two, copies,
/// and values that are put together from such.
fn is_quiet(expr: &Expr) -> bool {
    match expr {
        Expr::Index(e) => is_quiet(&e.expr) && is_quiet(&e.index),
        Expr::Unary(e) => is_quiet(&e.expr),
        Expr::Field(e) => is_quiet(&e.base),
        Expr::Cast(e) => is_quiet(&e.expr),
        Expr::Paren(e) => is_quiet(&e.expr),
        Expr::Binary(e) => is_quiet(&e.left) && is_quiet(&e.right),
        Expr::Tuple(e) => e.elems.iter().all(is_quiet),
        Expr::Call(e) => {
            let some = matches!(&*e.func, Expr::Path(name) if name.path.is_ident("Some"));
            some && e.args.iter().all(is_quiet)
        }
        Expr::MethodCall(e) => {
            let known = ["max", "min", "len", "clone"].iter().any(|name| e.method == name);
            known && is_quiet(&e.receiver) && e.args.iter().all(is_quiet)
        }
        other => is_plain(other),
    }
}

/// A statement that can only fail, and has no effect.
fn is_asserted(statement: &Stmt) -> bool {
    let Stmt::Expr(Expr::MethodCall(call), Some(_)) = statement else { return false };
    call.method == "expect" || call.method == "unwrap"
}

/// The local variable that a statement without function calls sets or changes.
fn counted(statement: &Stmt) -> Option<&syn::Ident> {
    let Stmt::Expr(expr, Some(_)) = statement else { return None };
    let (left, right) = match expr {
        Expr::Assign(e) => (&e.left, &e.right),
        Expr::Binary(e) => (&e.left, &e.right),
        _ => return None,
    };
    let Expr::Path(name) = &**left else { return None };
    if is_plain(right) { name.path.get_ident() } else { None }
}

/// An expression without effects: names, fields, numbers, and lengths.
fn is_plain(expr: &Expr) -> bool {
    match expr {
        Expr::Path(_) | Expr::Lit(_) => true,
        Expr::Field(e) => is_plain(&e.base),
        Expr::Cast(e) => is_plain(&e.expr),
        Expr::Paren(e) => is_plain(&e.expr),
        Expr::Binary(e) => is_plain(&e.left) && is_plain(&e.right),
        Expr::MethodCall(e) => e.method == "len" && is_plain(&e.receiver),
        _ => false,
    }
}
