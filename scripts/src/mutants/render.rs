//! Mutants as edits of a source text, and the text with a set of them in it.
//!
//! An edit replaces a range by pieces; a piece may be a range of the original, in which further edits are applied. So
//! edits nest, and a mutant inside a statement that another mutant duplicates is in both copies.

use std::ops::Range;

/// A part of an edit's replacement.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Piece {
    /// Literal text.
    Text(String),
    /// The expression that is true when this mutant is selected.
    Selected,
    /// Bytes of the original, with further edits.
    Source(Range<usize>),
}

/// A replacement of `span`, in bytes of the original.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Edit {
    /// What is replaced; may be empty.
    pub span: Range<usize>,
    /// The replacement.
    pub pieces: Vec<Piece>,
}

/// Whether two edits can be in one text: one lies inside the other, or they are disjoint.
pub(crate) fn compatible(a: &Range<usize>, b: &Range<usize>) -> bool {
    let within = |x: &Range<usize>, y: &Range<usize>| y.start <= x.start && x.end <= y.end;
    a.end <= b.start || b.end <= a.start || within(a, b) || within(b, a)
}

/// A file with edits in it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rendered {
    /// The text.
    pub text: String,
    /// The ranges of the text in which mutants have an effect, ordered by start.
    pub places: Vec<(Range<usize>, u32)>,
}

impl Rendered {
    /// The innermost mutant whose text contains the byte `at`.
    pub(crate) fn innermost(&self, at: usize) -> Option<u32> {
        let around = self.places.iter().filter(|(place, _)| place.contains(&at));
        around.min_by_key(|(place, _)| place.len()).map(|(_, number)| *number)
    }
}

/// Puts `edits`, each with its mutant's number, into `source`. All must be [`compatible`].
pub(crate) fn render(source: &str, edits: &[(u32, Edit)]) -> Rendered {
    let mut order: Vec<&(u32, Edit)> = edits.iter().collect();
    // The outer one first; an insertion belongs to a range that begins at its position.
    order.sort_by_key(|(number, edit)| (edit.span.start, std::cmp::Reverse(edit.span.end), *number));
    let mut out = Rendered::default();
    write(source, 0..source.len(), &order, &mut out);
    out.places.sort_by_key(|(place, _)| place.start);
    out
}

fn write(source: &str, range: Range<usize>, edits: &[&(u32, Edit)], out: &mut Rendered) {
    let mut at = range.start;
    for (i, (number, edit)) in edits.iter().enumerate() {
        // An insertion at the end of a range belongs before what follows.
        let follows = edit.span.is_empty() && edit.span.start == range.end;
        if edit.span.start < at || edit.span.end > range.end || follows {
            continue;
        }
        out.text += &source[at..edit.span.start];
        let start = out.text.len();
        for piece in &edit.pieces {
            match piece {
                Piece::Text(text) => out.text += text,
                Piece::Selected => out.text += &format!("::tap_host::mutant::is({number})"),
                Piece::Source(part) => write(source, part.clone(), &edits[i + 1..], out),
            }
        }
        out.places.push((start..out.text.len(), *number));
        at = edit.span.end;
    }
    out.text += &source[at..range.end];
}

#[cfg(test)]
mod tests {
    use super::*;
    use Piece::{Selected, Source, Text};

    fn skip(span: Range<usize>) -> Edit {
        let pieces =
            vec![Text("if !".into()), Selected, Text("{".into()), Source(span.clone()), Text("}".into())];
        Edit { span, pieces }
    }

    #[test]
    fn edits_nest_and_are_found_again() {
        let source = "a(b); c();";
        let inner = Edit { span: 2..3, pieces: vec![Text("[".into()), Source(2..3), Text("]".into())] };
        let out = render(source, &[(1, inner), (2, skip(0..5)), (3, skip(6..10))]);
        let is = |n: u32| format!("::tap_host::mutant::is({n})");
        assert_eq!(out.text, format!("if !{}{{a([b]);}} if !{}{{c();}}", is(2), is(3)));
        let at = |text: &str| out.text.find(text).unwrap();
        assert_eq!(out.innermost(at("[b]")), Some(1));
        assert_eq!(out.innermost(at("a(")), Some(2));
        assert_eq!(out.innermost(at("c()")), Some(3));
        assert_eq!(out.innermost(at("} if") + 1), None);
    }

    #[test]
    fn copies_have_what_lies_in_them_twice() {
        let swap = Edit { span: 0..4, pieces: vec![Source(2..4), Source(0..2)] };
        let inside = Edit { span: 2..2, pieces: vec![Text("!".into())] };
        assert_eq!(render("a;b;", &[(1, swap), (2, inside)]).text, "!b;a;");
    }

    #[test]
    fn edits_that_cross_are_not_compatible() {
        assert!(compatible(&(0..4), &(4..6)) && compatible(&(0..4), &(1..2)) && compatible(&(1..2), &(0..4)));
        assert!(!compatible(&(0..4), &(3..6)));
    }
}
