//! The conformance suite on a real Xen, in its dom0: the same bodies that xen-model/tests/conformance.rs runs.
//!
//! ```text
//!     LinuxHost   /dev/xen/gntdev, /dev/xen/evtchn, xenstored        the host under test
//!                 by its socket, and by /dev/xen/xenbus
//!     Dom0        /dev/xen/gntalloc, another /dev/xen/evtchn         its peer, which is dom0 as well
//! ```
//!
//! Elsewhere every test is reported as ignored. `cargo xtask xen-host test conformance` runs it in an emulated dom0.

mod peer;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use peer::Dom0;
use std::path::Path;
use std::process::ExitCode;
use tap_conformance::{Pair, Place, Test, events, grants, pages, store, transactions, watches};
use tap_host::{DomId, Xenstore};
use tap_linux::{LinuxHost, Options, Rings, StorePlaces, XenOptions, run};

/// The devices that these tests need.
const DEVICES: [&str; 4] = ["/dev/xen/gntdev", "/dev/xen/gntalloc", "/dev/xen/evtchn", XENBUS];
/// The device through which a domain without its own xenstored reaches it.
const XENBUS: &str = "/dev/xen/xenbus";
const OWN: DomId = DomId(0);
/// A domain that does not exist.
const STRANGER: DomId = DomId(0x7000);

fn main() -> ExitCode {
    let mut args = Arguments::from_args();
    // All tests share one domain: a grant that one has ended may be reused by another.
    args.test_threads = Some(1);
    let mut trials = Vec::new();
    for (kind, list) in [("grants", grants::all()), ("events", events::all())] {
        let xenstored = StorePlaces::usual;
        trials.extend(list.into_iter().map(|test| trial(kind.into(), xenstored(), test, pair)));
    }
    trials.extend(
        pages::all().into_iter().map(|test| trial("pages".into(), StorePlaces::usual(), test, place)),
    );
    for (way, xenstored) in [("socket", StorePlaces::usual()), ("device", StorePlaces::only(XENBUS))] {
        let lists =
            [("store", store::all()), ("transactions", transactions::all()), ("watches", watches::all())];
        for (kind, list) in lists {
            let kind = format!("{way}/{kind}");
            trials.extend(list.into_iter().map(|test| trial(kind.clone(), xenstored.clone(), test, place)));
        }
    }
    libtest_mimic::run(&args, trials).exit_code()
}

fn pair(host: LinuxHost, _: &str) -> Result<Pair<LinuxHost, Dom0>, String> {
    Ok(Pair { host, peer: Dom0::open()?, own: OWN, stranger: STRANGER })
}

fn place(host: LinuxHost, folder: &str) -> Result<Place<LinuxHost>, String> {
    Ok(Place { host, folder: folder.to_owned(), direct: false, device: None, tcp: false })
}

type MakePlace<P> = fn(LinuxHost, &str) -> Result<P, String>;

fn trial<P: 'static>(kind: String, store: StorePlaces, test: Test<P>, place: MakePlace<P>) -> Trial {
    Trial::ignorable_test(format!("{kind}/{}", test.name), move || match missing() {
        Some(device) => Ok(Completion::ignored_with(format!("there is no {device}"))),
        None => in_dom0(store, &test, place).map(|()| Completion::Completed),
    })
}

fn missing() -> Option<&'static str> {
    DEVICES.into_iter().find(|device| !Path::new(device).exists())
}

fn in_dom0<P: 'static>(store: StorePlaces, test: &Test<P>, place: MakePlace<P>) -> Result<(), Failed> {
    let run_folder = tempfile::tempdir()?;
    let options = Options {
        run_folder: Some(run_folder.path().into()),
        xen: Some(XenOptions { rings: Rings::Needed, store: Some(store) }),
        ..Options::default()
    };
    let folder = format!("/tap-conformance-{}-{}", std::process::id(), test.name);
    let body = test.body;
    let outcome = run(&options, |host| async move {
        let say = |what, e| format!("failed to {what} {folder}: {e}");
        host.write(&folder, b"").await.map_err(|e| say("make", e))?;
        let outcome = match place(host.clone(), &folder) {
            Ok(place) => body(place).await,
            Err(why) => Err(why),
        };
        host.remove(&folder).await.map_err(|e| say("remove", e))?;
        outcome
    })?;
    Ok(outcome?)
}
