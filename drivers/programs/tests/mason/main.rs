//! `mason` and graphs of disks in a simulated host: effects, output and exit status.

mod guide;
mod opened;

use clap::Parser;
use kernel_model::faults::FaultPlan;
use kernel_model::{Kernel, Process, Storage, StorageConfig};
use sim::{Config, Sim};
use std::cell::RefCell;
use std::rc::Rc;
use tap_programs::{Console, img, mason};

/// Records the output, both streams together.
#[derive(Default)]
struct Printed(RefCell<Vec<String>>);

impl Console for Printed {
    fn out(&self, line: &str) {
        self.0.borrow_mut().push(line.to_owned());
    }
    fn err(&self, line: &str) {
        self.0.borrow_mut().push(line.to_owned());
    }
    fn progress(&self, _: u64, _: u64) {}
}

/// A machine that runs one command after the other.
struct Machine {
    sim: Sim,
    kernel: Kernel,
}

impl Machine {
    fn new() -> Self {
        let sim = Sim::new(&Config::new(1));
        let config = StorageConfig { faults: FaultPlan::default(), ..StorageConfig::default() };
        let kernel = Kernel::new(&sim, &Storage::new(&sim, config));
        Self { sim, kernel }
    }

    fn put(&self, path: &str, text: impl AsRef<[u8]>) {
        self.kernel.storage().put_bytes(path, text.as_ref());
    }

    /// The result of `work` in a process.
    fn within<T: 'static, F: Future<Output = T> + 'static>(&self, work: impl FnOnce(Process) -> F) -> T {
        let result = Rc::new(RefCell::new(None));
        let (out, work) = (Rc::clone(&result), work(self.kernel.process("test", 1)));
        self.sim.run(async move { *out.borrow_mut() = Some(work.await) }).unwrap();
        result.take().expect("it ends")
    }

    /// Exit status and output of a command line.
    fn run(&self, line: &str) -> (u8, String) {
        let printed = Rc::new(Printed::default());
        let (words, p) =
            (line.split_whitespace().map(str::to_owned).collect::<Vec<_>>(), Rc::clone(&printed));
        let status = self.within(async move |host| match words[0].as_str() {
            "mason" => mason::run(host, mason::Cli::try_parse_from(words).unwrap(), &*p).await,
            "tap-img" => img::run(host, img::Cli::try_parse_from(words).unwrap(), &*p).await,
            other => panic!("no program is called {other}"),
        });
        (status, printed.0.borrow().join("\n"))
    }
}

const GRAPH: &str = "readonly vm :: disk();\nvm -> zero(1 MiB);\n";

#[test]
fn a_graph_is_checked_and_reported_as_json() {
    let machine = Machine::new();
    machine.put("/g.mason", GRAPH);
    let (status, out) = machine.run("mason check --json /g.mason");
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (status, &report["good"], &report["disks"][0]["size_bytes"]),
        (0, &true.into(), &1_048_576.into())
    );
    assert_eq!(report["disks"][0]["read_only"], true);
    machine.put("/g.mason", "vm :: disk();\nvm -> a;\n");
    let (status, out) = machine.run("mason check --json /g.mason");
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((status, &report["good"], &report["digest"]), (1, &false.into(), &serde_json::Value::Null));
    let message = &report["messages"][0];
    assert_eq!((&message["code"], &message["severity"]), (&"M2002".into(), &"error".into()));
    assert_eq!((&message["labels"][0]["line"], &message["labels"][0]["column"]), (&2.into(), &7.into()));
}

#[test]
fn warnings_do_not_make_a_graph_wrong() {
    let machine = Machine::new();
    machine.put("/g.mason", format!("{GRAPH}z :: zero(2 MiB);\n"));
    let (status, out) = machine.run("mason check /g.mason");
    assert_eq!(status, 0, "{out}");
    assert!(
        out.contains("warning[M3011]: `z` is below no disk")
            && out.contains("vm: 1 MiB, read-only, 1 node below")
    );
}

#[test]
fn texts_import_classes_from_others() {
    let machine = Machine::new();
    machine.put(
        "/lib/b.mason",
        "import \"/g.mason\";\nlet $size = 3 MiB;\nclass Zero() [in] -> [] {\n    in -> zero(2 MiB);\n}\n",
    );
    machine.put("/g.mason", "import \"lib/b.mason\";\nreadonly vm :: disk();\nvm -> z :: Zero();\n");
    let (status, out) = machine.run("mason check /g.mason");
    assert!(status == 0 && out.starts_with("vm: 2 MiB"), "{out}");
    machine.put("/g.mason", "import \"lib/c.mason\";\nreadonly vm :: disk();\nvm -> zero(1 MiB);\n");
    let (status, out) = machine.run("mason check /g.mason");
    let words = "error[M2015]: failed to read /lib/c.mason: no such file or directory (ENOENT)";
    assert!(status == 1 && out.contains(words), "{out}");
    // What is wrong there is shown there.
    machine.put("/lib/c.mason", "\n\nclass A() [in] -> [] { in -> zero(1 M); }\n");
    let (status, out) = machine.run("mason check /g.mason");
    assert!(status == 1 && out.contains("M1012") && out.contains("--> /lib/c.mason:3:37"), "{out}");
    machine.put("/lib/c.mason", "z :: zero(1 MiB);\n");
    assert!(machine.run("mason check /g.mason").1.contains("M2011"));
}

#[test]
fn files_that_are_no_texts_are_refused_in_a_line() {
    let machine = Machine::new();
    machine.put("/bytes", [0xff, 0xfe]);
    machine.put("/long", vec![b' '; (1 << 20) + 1]);
    for (command, words) in [
        ("check /none", "mason: failed to read /none: no such file or directory (ENOENT)"),
        ("fmt /none", "mason: failed to read /none: no such file or directory (ENOENT)"),
        ("check /bytes", "mason: failed to read /bytes: it is not text in UTF-8"),
        ("graph /long", "mason: failed to read /long: file too large (EFBIG)"),
        ("explain M9999", "mason: failed to explain M9999: there is no such code"),
        ("modules raid6", "mason: failed to show raid6: there is no such class; mason modules lists them"),
    ] {
        assert_eq!(machine.run(&format!("mason {command}")), (1, words.to_owned()));
    }
}

#[test]
fn an_image_that_cannot_be_read_is_a_mistake_unless_only_the_text_counts() {
    let machine = Machine::new();
    machine.put("/g.mason", "vm :: disk();\nvm -> a :: raw(\"a.img\");\n");
    let (status, out) = machine.run("mason check /g.mason");
    assert!(status == 1 && out.contains("error[M5002]: failed to open /a.img: no such file"), "{out}");
    let (status, out) = machine.run("mason check --text-only /g.mason");
    assert!(status == 0 && out.starts_with("vm: size unknown, 1 node below"), "{out}");
}

#[test]
fn a_text_is_laid_out_or_said_not_to_be() {
    let machine = Machine::new();
    machine.put("/g.mason", "readonly vm::disk( );\nvm->zero(1MiB);");
    assert_eq!(machine.run("mason fmt /g.mason"), (0, GRAPH.trim_end().to_owned()));
    assert_eq!(
        machine.run("mason fmt --check /g.mason"),
        (1, "mason: /g.mason is not laid out; see mason fmt".to_owned())
    );
    machine.put("/g.mason", GRAPH);
    assert_eq!(machine.run("mason fmt --check /g.mason"), (0, String::new()));
    machine.put("/g.mason", "vm ::");
    let (status, out) = machine.run("mason fmt /g.mason");
    assert!(status == 1 && out.contains("M1005"), "{out}");
}

#[test]
fn graphs_are_drawn_in_each_form() {
    let machine = Machine::new();
    machine.put("/g.mason", GRAPH);
    for (form, words) in [
        ("", "vm: disk, readonly, 1 MiB\n└─ vm.zero: zero(size = 1 MiB), 1 MiB"),
        ("--dot", "digraph mason {"),
        ("--svg", "<svg xmlns="),
        (
            "--canonical",
            "mason 1;\nreadonly vm :: disk();\nvm [lower] -> vm.zero;\nvm.zero :: zero(size = 1 MiB);",
        ),
    ] {
        let (status, out) = machine.run(&format!("mason graph {form} /g.mason"));
        assert!(status == 0 && out.starts_with(words), "{out}");
    }
    assert!(mason::Cli::try_parse_from(["mason", "graph", "--dot", "--svg", "/g"]).is_err());
}

#[test]
fn every_code_is_explained() {
    let machine = Machine::new();
    let (_, list) = machine.run("mason explain");
    for line in list.lines() {
        let (code, title) = line.split_once("  ").unwrap();
        let (status, out) = machine.run(&format!("mason explain {}", code.to_lowercase()));
        assert!(status == 0 && out.starts_with(&format!("{code}: {title}\n\n")), "{out}");
        assert!(out.lines().all(|line| line.len() <= 80 || !line.trim().contains(' ')), "{out}");
    }
    assert!(list.lines().count() > 30);
}
