//! What the codes of messages mean, for `mason explain`.
//!
//! | code | about |
//! |---|---|
//! | `M1...` | the text: characters, statements |
//! | `M2...` | names, values, parameters |
//! | `M3...` | wiring |
//! | `M4...` | who writes to what |
//! | `M5...` | sizes |
//! | `M6...` | what is lost with the process |
//! | `M7...` | conditions |

/// What a code means.
pub struct Explanation {
    /// The code.
    pub code: &'static str,
    /// What is wrong, in a line.
    pub title: &'static str,
    /// Why it is wrong and what to do.
    pub text: &'static str,
    /// A text with this mistake only.
    pub wrong: &'static str,
    /// The same without it.
    pub right: &'static str,
}

/// What `code` means.
pub fn explain(code: &str) -> Option<&'static Explanation> {
    ALL.iter().find(|explanation| explanation.code.eq_ignore_ascii_case(code))
}

macro_rules! codes {
    ($($code:literal $title:literal $text:literal $wrong:literal $right:literal)*) => {
        /// All codes, in order.
        pub static ALL: &[Explanation] = &[$(
            Explanation { code: $code, title: $title, text: $text, wrong: $wrong, right: $right },
        )*];
    };
}

codes! {
    "M1001" "characters that mean nothing"
    "Names are made of letters, digits and `_`, and the name of a value begins with `$`. Everything else that may be \
     written outside of texts in quotes and comments is a sign of the language."
    "vm :: disk(); vm -> @ zero(1 MiB);"
    "readonly vm :: disk(); vm -> zero(1 MiB);"

    "M1002" "a text in quotes without an end, or with an unknown escape"
    "A text ends on the line on which it begins. Within it, `\\\"`, `\\\\`, `\\n` and `\\t` stand for a quote, a backslash, \
     a new line and a tab."
    "readonly vm :: disk(); vm -> raw(\"a\\qb\");"
    "readonly vm :: disk(); vm -> a :: raw(\"a\\\\qb\");"

    "M1003" "a number with too many digits"
    "Numbers are counted in 64 bits. Use a larger unit."
    "readonly vm :: disk(); vm -> zero(99999999999999999999 B);"
    "readonly vm :: disk(); vm -> zero(64 TiB);"

    "M1004" "a comment without an end"
    "A comment that begins with `/*` ends with `*/`. One that begins with `//` ends with its line."
    "readonly vm :: disk(); vm -> zero(1 MiB); /* a comment"
    "readonly vm :: disk(); vm -> zero(1 MiB); /* a comment */"

    "M1005" "something else is expected here"
    "The message says what. Often a `;` is missing at the end of the statement before."
    "readonly vm :: disk() vm -> zero(1 MiB);"
    "readonly vm :: disk(); vm -> zero(1 MiB);"

    "M1006" "a statement that does nothing"
    "A statement declares a node (`name :: class(...);`), connects nodes (`a -> b;`), or begins with a word of the \
     language. What is said of a node (`shared`, `readonly`, `volatile`) is said where it is declared."
    "readonly vm :: disk(); vm -> zero(1 MiB); vm;"
    "readonly vm :: disk(); vm -> zero(1 MiB);"

    "M1007" "braces that do not match"
    "Each `{` of a class has its `}`."
    "readonly vm :: disk(); vm -> zero(1 MiB); }"
    "readonly vm :: disk(); vm -> zero(1 MiB);"

    "M1008" "the version of the language"
    "A text may begin with `mason 1;`, and this program knows version 1 only. The version is not said anywhere else."
    "mason 2; readonly vm :: disk(); vm -> zero(1 MiB);"
    "mason 1; readonly vm :: disk(); vm -> zero(1 MiB);"

    "M1009" "a word that cannot be a name"
    "Words of the language cannot be names, nor can those that are kept for later versions: group, transition, patch, \
     against, splice, drop, replace, set, rewire, old."
    "readonly vm :: disk(); vm -> patch :: zero(1 MiB);"
    "readonly vm :: disk(); vm -> z :: zero(1 MiB);"

    "M1010" "a text that is too long"
    "A text has at most 1 MiB. Divide it with `import`."
    "" ""

    "M1011" "too many levels within one another"
    "Parentheses, lists and classes may be 64 levels deep, and a statement may have 256 operators. Give a part of it a name \
     with `let`."
    "let $a = ((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((1))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))));"
    "let $a = (1); readonly vm :: disk(); vm -> zero(1 MiB);"

    "M1012" "not a unit"
    "kB, MB, GB and TB are powers of 1000, and KiB, MiB, GiB and TiB powers of 1024; `K`, `M` and `KB` mean one here and \
     the other there, and are not taken. `sectors` are 512 bytes. Rates are per second: `40 MiB/s`, `500 io/s`."
    "readonly vm :: disk(); vm -> zero(1 M);"
    "readonly vm :: disk(); vm -> zero(1 MiB);"

    "M2001" "an unknown class"
    "`mason modules` lists the classes of this program. Others are defined with `class` in the text, or in one that it \
     imports."
    "readonly vm :: disk(); vm -> zeros(1 MiB);"
    "readonly vm :: disk(); vm -> zero(1 MiB);"

    "M2002" "an unknown node"
    "A node is declared somewhere in the same text or class. A node of a module is called `module/node`."
    "readonly vm :: disk(); vm -> a; b :: zero(1 MiB);"
    "readonly vm :: disk(); vm -> b; b :: zero(1 MiB);"

    "M2003" "a name that is there twice"
    "Nodes, values and classes have one name each, which means one thing."
    "readonly vm :: disk(); vm -> a; a :: zero(1 MiB); a :: zero(2 MiB);"
    "readonly vm :: disk(); vm -> a; a :: zero(1 MiB);"

    "M2004" "an argument that there is no parameter for"
    "`mason modules CLASS` shows the parameters of a class. Arguments without a name are for the parameters in their \
     order."
    "readonly vm :: disk(); vm -> zero(length = 1 MiB, size = 1 MiB);"
    "readonly vm :: disk(); vm -> zero(size = 1 MiB);"

    "M2005" "a parameter without a value"
    "Some parameters have no default, because there is none that is right for everybody."
    "readonly vm :: disk(); vm -> zero();"
    "readonly vm :: disk(); vm -> zero(1 MiB);"

    "M2006" "a value of another type"
    "A number says its unit: only that makes it bytes or time. Arithmetic keeps types: bytes can be added to bytes, and \
     multiplied by numbers without a unit."
    "readonly vm :: disk(); vm -> zero(1);"
    "readonly vm :: disk(); vm -> zero(1 MiB);"

    "M2007" "a value that the parameter does not take, or a type that there is not"
    "The message says which values there are."
    "readonly vm :: disk(); vm -> zero(100 B);"
    "readonly vm :: disk(); vm -> zero(1024 B);"

    "M2008" "an unknown value"
    "A value is defined with `let` before it is used. Within a class there are only its parameters and its own values."
    "readonly vm :: disk(); vm -> zero($size);"
    "let $size = 1 MiB; readonly vm :: disk(); vm -> zero($size);"

    "M2009" "a node that keeps something has no name"
    "A node may be anonymous if another one of the same class would be as good. One that keeps something, as an image does, \
     is found again by its name when the graph is changed."
    "vm :: disk(); vm -> raw(\"a.img\");"
    "vm :: disk(); vm -> a :: raw(\"a.img\");"

    "M2010" "a graph that is too large"
    "A graph has at most 4096 nodes, 100000 statements and 1000 conditions, those of a class counted each time that it is \
     used."
    "" ""

    "M2011" "a text that others import has only classes and values"
    "Nodes, chains and conditions belong to the text that is opened."
    "" ""

    "M2012" "classes within one another"
    "A class does not define another one, and does not use itself. There are at most 16 levels of modules."
    "class A() [in] -> [] { in -> a :: A(); } readonly vm :: disk(); vm -> x :: A();"
    "class A() [in] -> [] { in -> zero(1 MiB); } readonly vm :: disk(); vm -> x :: A();"

    "M2013" "something is said of a node that means nothing there"
    "`volatile` is said of nodes that keep what is written to them in memory. Nothing is said of a module, but of the nodes \
     in its class."
    "readonly vm :: disk(); volatile z :: zero(1 MiB); vm -> z;"
    "readonly vm :: disk(); z :: zero(1 MiB); vm -> z;"

    "M2014" "nodes that share something differ"
    "Throttles of one group share one limit, so they have the same parameters."
    "vm :: disk(); vm -> c :: concat() => a :: throttle(rate = 1 MiB/s, group = \"g\"), b :: throttle(rate = 2 MiB/s, group \
     = \"g\"); a -> x :: raw(\"x\"); b -> y :: raw(\"y\");"
    "vm :: disk(); vm -> c :: concat() => a :: throttle(rate = 1 MiB/s, group = \"g\"), b :: throttle(rate = 1 MiB/s, group \
     = \"g\"); a -> x :: raw(\"x\"); b -> y :: raw(\"y\");"

    "M2015" "a text that cannot be imported"
    "The path is relative to the folder of the text that imports it. A graph has at most 64 texts."
    "" ""

    "M3001" "a port that nothing is connected to"
    "`mason modules CLASS` shows the ports of a class and what they are for."
    "readonly vm :: disk(); vm -> d :: delay(read = 1 ms);"
    "readonly vm :: disk(); vm -> d :: delay(read = 1 ms) -> zero(1 MiB);"

    "M3002" "a port that too much is connected to"
    "Most ports take one node."
    "readonly vm :: disk(); vm -> zero(1 MiB); vm -> zero(2 MiB);"
    "readonly vm :: disk(); vm -> zero(1 MiB);"

    "M3003" "an unknown port"
    "A port below a node is named after it, `a [port] -> b`, and one above a module before it."
    "vm :: disk(); vm -> q :: qcow(\"a.qcow\"); q [parent] -> zero(1 MiB);"
    "vm :: disk(); vm -> q :: qcow(\"a.qcow\"); q [backing] -> zero(1 MiB);"

    "M3004" "a node that several others use is not declared shared"
    "Sharing is never an accident: it is said."
    "readonly vm :: disk(); vm -> concat() => z, z; z :: zero(1 MiB);"
    "readonly vm :: disk(); vm -> concat() => z, z; shared z :: zero(1 MiB);"

    "M3005" "a cycle"
    "No node is below itself."
    "readonly vm :: disk(); vm -> a :: delay() -> b :: delay() -> c :: delay() -> d; shared d :: concat() => a2, zero(1 MiB); \
     a2 :: delay() -> d;"
    "readonly vm :: disk(); vm -> a :: delay() -> zero(1 MiB);"

    "M3006" "a disk below another node"
    "Disks are what the graph offers. To use the contents of one below another, connect both to the same node."
    "readonly vm :: disk(); readonly other :: disk(); vm -> delay() -> other -> zero(1 MiB);"
    "readonly vm :: disk(); readonly other :: disk(); vm -> delay() -> z; other -> z; shared z :: zero(1 MiB);"

    "M3007" "two nodes open one file"
    "Each would write over the other's changes. Use one node, and declare it shared."
    "vm :: disk(); vm -> concat() => a :: raw(\"x\"), b :: raw(\"./x\");"
    "vm :: disk(); vm -> concat() => a :: raw(\"x\"), b :: raw(\"y\");"

    "M3008" "a key where there are none"
    "Legs have keys where they may be taken out one by one. No class of this version has such ports."
    "readonly vm :: disk(); vm -> concat() => first: zero(1 MiB), zero(1 MiB);"
    "readonly vm :: disk(); vm -> concat() => zero(1 MiB), zero(1 MiB);"

    "M3009" "a class without one port above"
    "A class stands for one disk, which its port above offers."
    "class A() [] -> [] { z :: zero(1 MiB); } readonly vm :: disk(); vm -> zero(1 MiB);"
    "class A() [in] -> [] { in -> zero(1 MiB); } readonly vm :: disk(); vm -> zero(1 MiB);"

    "M3010" "a graph without a disk"
    "At least one node is a `disk`: that is what can be opened."
    "z :: zero(1 MiB);"
    "readonly vm :: disk(); vm -> z; z :: zero(1 MiB);"

    "M3011" "a node that no disk uses"
    "It would not be opened. This is a warning."
    "readonly vm :: disk(); vm -> zero(1 MiB); z :: zero(1 MiB);"
    "readonly vm :: disk(); vm -> zero(1 MiB);"

    "M3012" "too many nodes above one another"
    "A request passes through all of them. There are at most 64, counting the disk and the image."
    "" ""

    "M4001" "a node that takes no writes would be written to"
    "Either the disk is only read, and is declared readonly, or its contents need a place that can be written to. The \
     message shows the way of the writes."
    "vm :: disk(); vm -> delay() -> z :: zero(1 MiB);"
    "readonly vm :: disk(); vm -> delay() -> z :: zero(1 MiB);"

    "M4002" "a node would change while another one relies on it"
    "An image over a backing file shows the contents of that where nothing was written. If they change, so does the disk."
    "vm :: disk(); other :: disk(); vm -> q :: qcow(\"a.qcow\") -> base; shared base :: raw(\"base\"); other -> base;"
    "vm :: disk(); readonly other :: disk(); vm -> q :: qcow(\"a.qcow\") -> base; shared base :: raw(\"base\"); other -> \
     base;"

    "M5001" "a disk that there cannot be"
    "Its size follows from the nodes below it and from its parameters."
    "readonly vm :: disk(); vm -> slice(1 MiB .. 2 MiB) -> zero(1 MiB);"
    "readonly vm :: disk(); vm -> slice(0 B .. 1 MiB) -> zero(1 MiB);"

    "M5002" "an image that cannot be read"
    "The sizes of disks follow from those of the images, which are looked at for that. Images that are not there yet, or may \
     not be read, are left out with `mason check --text-only`."
    "" ""

    "M6001" "what is written is lost when the process ends"
    "It is kept in memory only. If that is meant, the node is declared volatile."
    "vm :: disk(); vm -> r :: ram(1 MiB);"
    "vm :: disk(); vm -> r; volatile r :: ram(1 MiB);"

    "M7001" "a condition that is not true"
    "The text asks for it with `check`."
    "readonly vm :: disk(); vm -> zero(1 MiB); check size(vm) == 2 MiB;"
    "readonly vm :: disk(); vm -> zero(1 MiB); check size(vm) == 1 MiB;"

    "M7002" "something that is no condition"
    "A condition compares values, or asks of nodes: `size(a)`, `immutable(a)`, `volatile(a)`, `reaches(a, b)`; and joins \
     these with `not`, `and`, `or` and `implies`."
    "readonly vm :: disk(); vm -> zero(1 MiB); check size(vm);"
    "readonly vm :: disk(); vm -> zero(1 MiB); check size(vm) >= 1 MiB;"
}
