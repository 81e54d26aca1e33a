//! A process that runs to its end, or is killed at an operation of the storage.

use crate::world::World;
use kernel_model::Process;
use std::rc::Rc;
use tap_core::wait::joined;
use tap_host::{Either, Files, poll_once, select};

/// Runs `main` as the main function of `process` and returns its result once the process has ended and its files are
/// closed. `None` if the process was killed first: at operation `cut_after` of the storage, counted from now.
pub(super) async fn run_until_cut<T: 'static>(
    world: &World,
    process: &Process,
    cut_after: Option<u64>,
    main: impl Future<Output = T> + 'static,
) -> Option<T> {
    if let Some(after) = cut_after {
        let (at, node) = (world.storage.ops() + after, process.node().clone());
        world.storage.set_hook(Some(Rc::new(move |op| {
            if op == at {
                node.kill();
            }
        })));
    }
    let host = process.clone();
    let (task, mut ended) = joined(async move {
        let value = main.await;
        host.closed().await;
        value
    });
    process.node().spawn("main", 0, task);
    let result = match select(process.node().dead(), &mut ended).await {
        Either::First(()) => poll_once(ended).await.flatten(),
        Either::Second(result) => result,
    };
    world.storage.set_hook(None);
    process.node().kill();
    process.node().dead().await;
    result
}
