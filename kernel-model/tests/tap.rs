//! The conformance suite's bodies about blktap2 on the models of its modules: the same that drivers/linux/tests/tap.rs
//! runs on a real one.

use kernel_model::{Kernel, SimHost, Storage, StorageConfig, TapKind, TapModule};
use libtest_mimic::{Arguments, Trial};
use sim::{Config, Scheduling, Sim};
use std::cell::RefCell;
use std::process::ExitCode;
use std::rc::Rc;
use tap_conformance::{Outcome, Place, Test, tap};
use xen_model::{Options, Xen};

/// Worlds in addition to the quiet one.
const SEEDS: u64 = 6;

fn main() -> ExitCode {
    let mut trials = Vec::new();
    for kind in TapKind::SERVED {
        trials.extend(tap::all().into_iter().map(|test| {
            Trial::test(format!("{kind:?}/{}", test.name), move || {
                for seed in 0..=SEEDS {
                    in_world(seed, kind, &test).map_err(|why| format!("with seed {seed}: {why}"))?;
                }
                Ok(())
            })
        }));
    }
    trials.push(Trial::test("the_documentation_lists_every_body", || {
        let text =
            std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/testing/conformance.md"))?;
        let list: Vec<Test<Place<SimHost>>> = tap::all();
        match list.iter().find(|test| !text.contains(&format!("| `{}` |", test.name))) {
            Some(test) => Err(format!("docs/testing/conformance.md lacks {}", test.name).into()),
            None => Ok(()),
        }
    }));
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn in_world(seed: u64, kind: TapKind, test: &Test<Place<SimHost>>) -> Outcome {
    let scheduling = Scheduling::Random { one_in: 4, bits: 14 };
    let sim = Sim::new(&Config { faults: seed > 0, scheduling, ..Config::new(seed) });
    let storage = Storage::new(&sim, StorageConfig::default());
    let (xen, kernel) = (Xen::new(&sim, Options::default()), Kernel::new(&sim, &storage));
    let module = TapModule::new(&sim, kind, 8, 352);
    let troubles = Rc::<RefCell<Vec<String>>>::default();
    let seen = Rc::clone(&troubles);
    module.on_trouble(move |trouble| seen.borrow_mut().push(format!("{trouble:?}")));
    kernel.load_tap(&module);
    let host = SimHost::start(&kernel, &xen, "conformance", 0);
    let place = Place { host: host.clone(), folder: "/".into(), direct: false, device: None, tcp: false };
    let outcome = Rc::new(RefCell::new(None));
    let (out, running) = (Rc::clone(&outcome), (test.body)(place));
    sim.run(async move {
        let (task, done) = tap_done(async move { *out.borrow_mut() = Some(running.await) });
        host.process.node().spawn("main", 0, task);
        done.await;
    })
    .map_err(|stall| format!("{stall:?}"))?;
    outcome.borrow_mut().take().ok_or("the body was dropped")??;
    if let Some(trouble) = troubles.borrow().first() {
        return Err(trouble.clone());
    }
    if module.minors().is_empty() { Ok(()) } else { Err(format!("minors {:?} are left", module.minors())) }
}

/// A task, and a future that completes when it has ended.
fn tap_done(task: impl Future<Output = ()>) -> (impl Future<Output = ()>, impl Future<Output = ()>) {
    let ended = Rc::<(std::cell::Cell<bool>, tap_host::OneWaiter)>::default();
    let own = Rc::clone(&ended);
    let task = async move {
        task.await;
        own.0.set(true);
        own.1.wake();
    };
    let done = std::future::poll_fn(move |cx| {
        if ended.0.get() {
            return std::task::Poll::Ready(());
        }
        ended.1.wait(cx.waker());
        std::task::Poll::Pending
    });
    (task, done)
}
