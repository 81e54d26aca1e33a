//! The language and the checks, from text to messages.

use crate::codes::ALL;
use crate::graph::check::{Checked, check};
use crate::graph::resolve::{Text, resolve};
use crate::graph::show::Picture;
use crate::graph::signature::Classes;
use crate::graph::{Graph, canonical::canonical, canonical::digest};
use crate::lang::ast::File;
use crate::lang::lex::{Kind, lex};
use crate::lang::{Diagnostic, Sources, Span, format, parse};
use crate::modules::signatures;
use proptest::prelude::*;
use tap_images::SHIPPED;

fn classes() -> Classes {
    Classes(signatures(SHIPPED.iter().copied()))
}

/// The graph of `text`, and all messages about it.
fn graph_of(text: &str) -> (Graph, Option<Checked>, Vec<Diagnostic>) {
    let classes = classes();
    let (file, mut messages) = parse(0, text);
    if !messages.is_empty() {
        return (Graph::default(), None, messages);
    }
    let (graph, found) = resolve(&classes, &[Text { file: &file, folder: "/disks/".into() }]);
    messages.extend(found);
    if !messages.is_empty() {
        return (graph, None, messages);
    }
    let checked = check(&classes, &graph, &|_| None);
    messages.extend(checked.messages.iter().cloned());
    (graph, Some(checked), messages)
}

fn rendered(text: &str) -> String {
    let (_, _, messages) = graph_of(text);
    let mut sources = Sources::default();
    sources.add("t.mason", text.to_owned());
    sources.render(&messages, false)
}

#[test]
fn each_code_has_a_text_with_this_mistake_only_and_one_without() {
    let mut wrong = String::new();
    for explanation in ALL.iter().filter(|explanation| !explanation.wrong.is_empty()) {
        let (_, _, messages) = graph_of(explanation.wrong);
        let codes: Vec<&str> = messages.iter().map(|message| message.code).collect();
        if codes != [explanation.code] {
            wrong +=
                &format!("{}: {}\n{}\n\n", explanation.code, explanation.wrong, rendered(explanation.wrong));
        }
        if !graph_of(explanation.right).2.is_empty() {
            wrong += &format!("{} right: {}\n\n", explanation.code, rendered(explanation.right));
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    assert!(ALL.is_sorted_by_key(|explanation| explanation.code));
}

const EXAMPLES: [&str; 3] = [
    include_str!("../examples/desktop.mason"),
    include_str!("../examples/desktops.mason"),
    include_str!("../examples/stripe.mason"),
];

#[test]
fn the_examples_are_right_and_laid_out() {
    for text in EXAMPLES {
        assert!(graph_of(text).2.is_empty(), "{}", rendered(text));
        assert_eq!(format(text).as_deref(), Ok(text));
    }
}

#[test]
fn a_text_is_laid_out() {
    let text = "mason 1; // version\n\n\n\nclass A ( $a:Bytes=1MiB,$r : Range < Bytes > = 0B..1MiB ) [in]->[x:ro,y] {in->z::zero ( $a ) ;}\n\
                readonly   vm::disk( ) ;vm->[in]a::A ( a = 2*( 1 MiB+ 512B ) )\n->b[ x . 1 ]=>\n c, k : d ; // end\n\
                check   size( vm )<=1MiB and not a/z==2 implies immutable(b)/* here */;";
    let laid_out = "\
mason 1; // version

class A($a: Bytes = 1 MiB, $r: Range<Bytes> = 0 B .. 1 MiB) [in] -> [x: ro, y] {
    in -> z :: zero($a);
}
readonly vm :: disk();
vm -> [in] a :: A(a = 2 * (1 MiB + 512 B))
    -> b [x.1] =>
    c, k: d; // end
check size(vm) <= 1 MiB and not a/z == 2 implies immutable(b) /* here */;
";
    let found = format(text).unwrap();
    assert_eq!(found, laid_out);
    assert_eq!(format(&found).unwrap(), found);
}

#[test]
fn a_graph_is_drawn() {
    let (graph, checked, _) = graph_of(EXAMPLES[1]);
    let (classes, checked) = (classes(), checked.unwrap());
    let picture = Picture { classes: &classes, graph: &graph, checked: &checked };
    assert_eq!(
        picture.tree(),
        "\
vm1: disk
└─ d1/qos: throttle(rate = 20 MiB/s)
   └─ d1/leaf: qcow(\"/disks/d1.qcow\")
      └─ golden: raw(\"/disks/golden.img\"), shared, readonly
vm2: disk
└─ d2/qos: throttle(rate = 20 MiB/s)
   └─ d2/leaf: qcow(\"/disks/d2.qcow\")
      └─ golden (above)
vm3: disk
└─ d3/qos: throttle(rate = 80 MiB/s)
   └─ d3/leaf: qcow(\"/disks/d3.qcow\")
      └─ golden (above)
"
    );
    let dot = picture.dot();
    assert!(dot.contains("label=\"golden\\nraw(\\\"/disks/golden.img\\\"), shared, readonly\""), "{dot}");
    assert_eq!(dot.matches(" -> ").count(), 9);
    let svg = picture.svg();
    assert_eq!((svg.matches("<rect").count(), svg.matches("<line").count()), (11, 9), "{svg}");
    // What is shared is drawn once, below everything that uses it.
    assert!(svg.contains("raw(\"/disks/golden.img\")") && svg.ends_with("</svg>\n"));
}

#[test]
fn texts_that_mean_the_same_have_one_digest() {
    let one = "readonly vm :: disk(); vm -> c :: concat() => a, b; a :: zero(1 MiB); b :: pattern(size = 1024 KiB);";
    let same = "/* as above */ class C() [in] -> [x, y] { in -> x; y -> x; }
                readonly vm :: disk(); b :: pattern(1 MiB, seed = 0); a :: zero(2 * 512 KiB);
                c :: concat(); c -> a; c -> b; vm -> c;";
    let same = same.replace("class C() [in] -> [x, y] { in -> x; y -> x; }", "");
    let other = one.replace("=> a, b", "=> b, a");
    let form = |text: &str| {
        let (graph, _, messages) = graph_of(text);
        assert!(messages.is_empty(), "{}", rendered(text));
        canonical(&classes(), &graph)
    };
    assert_eq!(
        form(one),
        "\
mason 1;
a :: zero(size = 1 MiB);
b :: pattern(size = 1 MiB, seed = 0);
c :: concat();
c [parts] -> a;
c [parts] -> b;
readonly vm :: disk();
vm [lower] -> c;
"
    );
    assert_eq!(form(one), form(&same));
    assert_ne!(digest(&form(one)), digest(&form(&other)));
    assert_eq!(digest("").len(), 16);
}

#[test]
fn every_mistake_of_a_text_is_reported_once() {
    let text = "\
let $a Bytes = 1;
vm :: disk()
vm -> zero(1 MB/s);
vm -> a -> ;
class A() [in] -> [] { in -> ; z :: zero(1 KB); }
check not;
b :: raw(\"x\") [backing] -> 5;
";
    let (_, messages) = parse(0, text);
    let found: Vec<(&str, usize)> = messages.iter().map(|m| (m.code, line_of(text, m.labels[0].0))).collect();
    let expected =
        [("M1005", 1), ("M1005", 2), ("M1005", 4), ("M1005", 5), ("M1012", 5), ("M1005", 6), ("M1005", 7)];
    assert_eq!(found, expected, "{messages:#?}");
}

fn line_of(text: &str, span: Span) -> usize {
    text[..span.from as usize].matches('\n').count() + 1
}

#[test]
fn a_message_shows_where_and_what_to_do() {
    let text = "vm :: disk();\nvm -> a :: delay()\n    -> golden;\nreadonly golden :: raw(\"golden.img\");\n";
    assert_eq!(
        rendered(text),
        "\
error[M4001]: `golden` would be written to, and is declared readonly
 --> t.mason:4:10
  |
4 | readonly golden :: raw(\"golden.img\");
  |          ^^^^^^ vm -> a -> golden
  |
  = help: declare `readonly vm` if the disk is only read"
    );
    let text = "readonly vm :: disk();\nvm -> concat() => a, a;\na :: zero(1);\nvm2 :: disc();\n";
    assert_eq!(
        rendered(text),
        "\
error[M2006]: `1` has no unit, and Bytes is meant here
 --> t.mason:3:11
  |
3 | a :: zero(1);
  |           ^ `1`
  |
  = help: did you mean 1 B, 1 KiB, 1 MiB or 1 sectors?

error[M2001]: there is no class `disc`
 --> t.mason:4:8
  |
4 | vm2 :: disc();
  |        ^^^^ not known here
  |
  = help: did you mean `disk`?"
    );
}

#[test]
fn a_graph_that_grows_without_limit_is_stopped() {
    let mut text = String::from("readonly vm :: disk(); vm -> x :: A0();");
    for level in 0..15 {
        let next = level + 1;
        text +=
            &format!("class A{level}() [in] -> [] {{ in -> concat() => a :: A{next}(), b :: A{next}(); }}");
    }
    text += "class A15() [in] -> [] { in -> zero(1 MiB); }";
    let (graph, _, messages) = graph_of(&text);
    assert!(graph.nodes.len() <= crate::graph::MAX_NODES);
    assert_eq!(messages.first().map(|message| message.code), Some("M2010"), "{messages:#?}");
    assert!(messages.len() <= 100);
}

#[test]
fn what_costs_more_than_its_text_is_limited() {
    let chain = |levels: usize| {
        let nodes: String = (0..levels).map(|i| format!(" -> d{i} :: delay()")).collect();
        format!("readonly vm :: disk(); vm{nodes} -> zero(1 MiB);")
    };
    assert!(graph_of(&chain(62)).2.is_empty());
    let codes = |text: &str| graph_of(text).2.iter().map(|message| message.code).collect::<Vec<_>>();
    assert_eq!(codes(&chain(63)), ["M3012"]);
    let conditions = |count: usize| chain(1) + &"check reaches(vm, d0);".repeat(count);
    assert!(graph_of(&conditions(1000)).2.is_empty());
    assert_eq!(codes(&conditions(1001)), ["M2010"]);
}

#[test]
fn deep_texts_do_not_exhaust_the_stack() {
    for (open, close) in
        [("(", ")"), ("[", "]"), ("not ", ""), ("f(", ")"), ("1 + ", "1"), ("a implies ", "a")]
    {
        let text = format!("check {}1{};", open.repeat(50_000), close.repeat(50_000));
        let (_, messages) = parse(0, &text);
        assert_eq!(messages.first().map(|message| message.code), Some("M1011"), "{open}");
    }
    // The highest tree that is taken can be computed.
    let row = |n: usize| format!("({}1)", "1 + ".repeat(n));
    let (file, messages) = parse(0, &format!("let $a = {}{};", "(".repeat(60), row(250) + &")".repeat(60)));
    assert!(messages.is_empty(), "{messages:?}");
    resolve(&classes(), &[Text { file: &file, folder: String::new() }]);
    let rows = (0..60).fold(String::from("1"), |inner, _| format!("({inner}{})", " + 1".repeat(60)));
    assert_eq!(parse(0, &format!("let $a = {rows};")).1[0].code, "M1011");
    let (_, messages) = parse(0, &"class A() [in] -> [] {".repeat(10_000));
    assert!(messages.iter().any(|message| message.code == "M1011"));
    let (_, messages) = parse(0, &format!("class A($a: {}) [in] -> [] {{}}", "List<".repeat(10_000)));
    assert_eq!(messages.first().map(|message| message.code), Some("M1011"));
}

/// The statements, without their places.
fn meaning(file: &File) -> String {
    let text = format!("{file:?}");
    let mut parts = text.split("Span {");
    let first = parts.next().unwrap_or("").to_owned();
    first + &parts.map(|part| part.split_once('}').map_or("", |(_, rest)| rest)).collect::<String>()
}

/// The comments of a text, without the spaces at their ends.
fn comments(text: &str) -> Vec<String> {
    lex(0, text).comments.iter().map(|c| text[c.from as usize..c.to as usize].trim_end().to_owned()).collect()
}

/// A right text with other spaces, line breaks and comments.
fn spaced() -> impl Strategy<Value = String> {
    let gap = prop_oneof![
        4 => Just(" "),
        2 => Just("\n"),
        1 => Just("\n\n\n"),
        1 => Just(" // c\n"),
        1 => Just("\n// d, e\n  "),
        1 => Just(" /* f */ "),
        1 => Just("\n/* g\n h */ "),
        1 => Just("\t"),
    ];
    (0..EXAMPLES.len(), prop::collection::vec(gap, 160)).prop_map(|(example, gaps)| {
        let text = EXAMPLES[example];
        let tokens = lex(0, text).tokens;
        let words = tokens.iter().map(|token| &text[token.span.from as usize..token.span.to as usize]);
        words.zip(gaps.iter().cycle()).fold(String::new(), |all, (word, gap)| all + gap + word)
    })
}

/// Words and signs of the language in any order.
fn babble() -> impl Strategy<Value = String> {
    let word = prop::sample::select(vec![
        "mason", "import", "let", "class", "check", "shared", "readonly", "implies", "or", "not", "one",
        "of", "a", "b", "disk", "zero", "$a", "1", "2.5", "MiB", "s", "%", "\"x\"", "->", "=>", "::", ":",
        ";", ",", "(", ")", "[", "]", "{", "}", "<", ">", "=", "==", "..", "+", "*", "/", ".", "//x\n",
        "/*y*/", "\n", "@", "é", "\"",
    ]);
    prop::collection::vec(word, 0..120).prop_map(|words| words.join(" "))
}

proptest! {
    #[test]
    fn a_layout_changes_neither_statements_nor_comments(text in spaced()) {
        let laid_out = format(&text).expect("it is right");
        let (before, after) = (parse(0, &text), parse(0, &laid_out));
        prop_assert!(after.1.is_empty());
        prop_assert_eq!(meaning(&before.0), meaning(&after.0));
        prop_assert_eq!(comments(&text), comments(&laid_out));
        prop_assert_eq!(format(&laid_out).expect("it is right"), laid_out.clone(), "{}", text);
    }

    #[test]
    fn any_text_is_taken(text in prop_oneof![babble(), any::<String>()]) {
        let (_, _, messages) = graph_of(&text);
        let mut sources = Sources::default();
        sources.add("t", text.clone());
        prop_assert!(messages.len() <= 300);
        for message in &messages {
            prop_assert!(crate::codes::explain(message.code).is_some(), "{} is not explained", message.code);
            prop_assert!(sources.line(message).starts_with("t:"));
        }
        sources.render(&messages, true);
        if let Ok(laid_out) = format(&text) {
            prop_assert_eq!(format(&laid_out), Ok(laid_out.clone()));
        }
    }

    #[test]
    fn a_right_text_with_a_part_replaced_is_taken(
        example in 0..EXAMPLES.len(), from in 0usize..2000, len in 0usize..40, new in babble(),
    ) {
        let tokens = lex(0, EXAMPLES[example]).tokens;
        let at = |n: usize| tokens[n.min(tokens.len() - 1)].span.from as usize;
        let (from, to) = (at(from % tokens.len()), at(from % tokens.len() + len));
        let text = format!("{}{} {}", &EXAMPLES[example][..from], new, &EXAMPLES[example][to..]);
        let (_, _, messages) = graph_of(&text);
        prop_assert!(messages.iter().all(|message| crate::codes::explain(message.code).is_some()));
    }

    #[test]
    fn tokens_do_not_overlap_and_are_in_order(text in prop_oneof![babble(), any::<String>()]) {
        let tokens = lex(0, &text).tokens;
        prop_assert!(tokens.windows(2).all(|pair| pair[0].span.to <= pair[1].span.from));
        prop_assert_eq!(&tokens.last().expect("there is an end").kind, &Kind::End);
    }
}
