//! One history of an image: writes and flushes, perhaps an error, perhaps a stop, a crash, and the checks after it.
//!
//! Every sector has a list of versions. After a crash it must read as one that is not older than the last durable one;
//! after the death of the process alone, as one that is not older than the last acknowledged one. From then on it does
//! not change, and later writes change no other sector.

use super::*;
use crate::testing::{Effect, Fault};
use futures_util::future::join_all;

/// The parameters of a history.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trial {
    pub(super) setup: Setup,
    pub(super) seed: u64,
    pub(super) bug: Option<&'static str>,
    /// An operation that fails, counted from opening.
    pub(super) fault: Option<Fault>,
    /// No operation from this one on, counted from opening, takes effect.
    pub(super) stop: Option<u64>,
    pub(super) end: End,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum End {
    /// Only the process dies.
    Kill,
    /// Each sector that is not durable is kept with this probability in 256.
    Crash(u64),
}

#[derive(Default)]
struct Sector {
    versions: Vec<u8>,
    acked: usize,
    durable: usize,
}

struct History {
    sectors: Vec<Sector>,
    /// The page cache has lost writes: flushes no longer make anything durable.
    cache_lies: bool,
    next_fill: u8,
}

impl History {
    fn new(setup: &Setup) -> Self {
        let sector = |s| Sector { versions: vec![setup.initial(s)], ..Sector::default() };
        Self { sectors: (0..setup.sectors).map(sector).collect(), cache_lies: false, next_fill: 0 }
    }

    /// Values below 100, which no base file has.
    fn fill(&mut self) -> u8 {
        self.next_fill = self.next_fill % 99 + 1;
        self.next_fill
    }

    fn begin(&mut self, start: u64, count: u32, fill: u8) {
        for sector in &mut self.sectors[start as usize..][..count as usize] {
            sector.versions.push(fill);
        }
    }

    fn acked(&mut self, start: u64, count: u32) {
        for sector in &mut self.sectors[start as usize..][..count as usize] {
            sector.acked = sector.versions.len() - 1;
        }
    }

    fn allows(&self, sector: usize, end: End, got: Option<u8>) -> bool {
        let sector = &self.sectors[sector];
        let oldest = if end == End::Kill { sector.acked } else { sector.durable };
        got.is_some_and(|got| sector.versions[oldest..].contains(&got))
    }
}

/// The workload: batches of disjoint writes, flushes between them, and retries after errors.
async fn work(world: World, setup: Setup, mut qcow: Rc<Qcow<World>>, history: Rc<RefCell<History>>) {
    for _ in 0..8 {
        let mut writes: Vec<(u64, u32, u8)> = Vec::new();
        for _ in 0..1 + world.random(4) {
            let (start, count) = (world.random(setup.sectors - 12), 1 + world.random(12) as u32);
            let meets = |w: &(u64, u32, u8)| w.0 < start + u64::from(count) && start < w.0 + u64::from(w.1);
            if !writes.iter().any(meets) {
                writes.push((start, count, history.borrow_mut().fill()));
            }
        }
        let mut tries = 0;
        while !writes.is_empty() {
            writes.iter().for_each(|(start, count, fill)| history.borrow_mut().begin(*start, *count, *fill));
            let answers = join_all(writes.iter().map(|(s, n, f)| write(&qcow, *s, *n, *f))).await;
            let mut answers = answers.into_iter();
            writes.retain(|(start, count, _)| {
                let failed = answers.next().is_none_or(|a| a.result.is_err());
                if !failed {
                    history.borrow_mut().acked(*start, *count);
                }
                failed
            });
            tries += 1;
            if !writes.is_empty() {
                // Space is available again.
                world.fail(world.fault().filter(|f| !f.sticky));
                if tries > 2 {
                    qcow = reopen(&world, &setup, &qcow, &history).await;
                }
            }
        }
        if world.random(2) == 0 {
            let acked: Vec<usize> = history.borrow().sectors.iter().map(|s| s.acked).collect();
            match qcow.submit(Request::flush()).await.result {
                Ok(()) => {
                    let mut history = history.borrow_mut();
                    if !history.cache_lies {
                        history.sectors.iter_mut().zip(acked).for_each(|(s, acked)| s.durable = acked);
                    }
                }
                Err(_) => qcow = reopen(&world, &setup, &qcow, &history).await,
            }
        }
    }
}

async fn reopen(
    world: &World,
    setup: &Setup,
    qcow: &Rc<Qcow<World>>,
    history: &Rc<RefCell<History>>,
) -> Rc<Qcow<World>> {
    // The reason is a failed synchronisation, after which a page cache cannot be trusted.
    history.borrow_mut().cache_lies |= !setup.direct;
    world.fail(None);
    // The flush at closing fails as well, for the same reason.
    qcow.close().await.err();
    // The history continues as on a host without a folder for pages that outlive a process: with one, no flush would
    // succeed before a reboot.
    world.forget_pages();
    Rc::new(open(world, &setup.options(true)).await.expect("an image opens again"))
}

impl Trial {
    /// Runs it; the error says which check failed.
    pub(super) fn run(&self) -> Result<(), String> {
        let world = World::new(self.seed);
        self.setup.create(&world);
        if self.setup.direct {
            world.set_align(4096);
        }
        let qcow = self.setup.open(&world);
        world.make_shuffled();
        if self.seed.is_multiple_of(2) {
            world.make_short();
        }
        self.bug.into_iter().for_each(|bug| world.switch_on(bug));
        let opened = world.ops();
        world.fail(self.fault.map(|f| Fault { nth: f.nth + opened, ..f }));
        if let Some(stop) = self.stop {
            world.stop_at(opened + stop);
        }
        let history = Rc::new(RefCell::new(History::new(&self.setup)));
        world.run(work(world.clone(), self.setup, Rc::clone(&qcow), Rc::clone(&history)));
        world.kill_tasks();
        drop(qcow);
        let keep = match self.end {
            End::Kill => 256,
            End::Crash(keep) => keep,
        };
        let after = if keep == 256 { world.as_seen() } else { world.after_crash(keep) };
        // The recovering program has the bug as well.
        self.bug.into_iter().for_each(|bug| after.switch_on(bug));
        self.verify(&after, &history.borrow())
    }

    fn verify(&self, world: &World, history: &History) -> Result<(), String> {
        let report = checked(world);
        if report.problem_count > 0 {
            return Err(format!("check: {}", report.problems[0]));
        }
        let mut qcow = self.setup.try_open(world, true).map_err(|e| e.to_string())?;
        let mut seen = all(world, &qcow);
        let wrong = (0..seen.len()).find(|s| !history.allows(*s, self.end, seen[*s]));
        if let Some(sector) = wrong {
            let of = &history.sectors[sector];
            return Err(format!(
                "sector {sector} shows {:?}; versions {:?}, acknowledged {}, durable {}",
                seen[sector], of.versions, of.acked, of.durable
            ));
        }
        // New writes change their own sectors only, also after opening again.
        for start in (0..self.setup.sectors - 3).step_by(17) {
            world.block_on(write(&qcow, start, 3, 99)).result.map_err(|e| format!("probe: {e}"))?;
            seen[start as usize..start as usize + 3].fill(Some(99));
        }
        for _ in 0..2 {
            let now = all(world, &qcow);
            if let Some(sector) = (0..seen.len()).find(|s| now[*s] != seen[*s]) {
                return Err(format!("sector {sector} changes from {:?} to {:?}", seen[sector], now[sector]));
            }
            world.block_on(qcow.close()).map_err(|e| format!("close: {e}"))?;
            qcow = self.setup.try_open(world, true).map_err(|e| e.to_string())?;
        }
        Ok(())
    }
}

pub(super) const OVERLAY: Setup = Setup { base_sectors: Some(200), cluster_bits: 11, ..SMALL };
pub(super) const DEVICE: Setup = Setup { device: Some(1 << 20), ..SMALL };
pub(super) const PACKED: Setup = Setup { compressed: true, ..SMALL };
pub(super) const DIRECT: Setup = Setup { direct: true, tables: 1, ..SMALL };

fn must_hold(trial: Trial) {
    if let Err(what) = trial.run() {
        panic!("{what}\n{trial:?}");
    }
}

/// Multiplies the number of trials, with more seeds.
fn rounds() -> u64 {
    std::env::var("TAP_TRIAL_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

const PLAIN: Trial = Trial { setup: SMALL, seed: 0, bug: None, fault: None, stop: None, end: End::Crash(0) };

#[test]
fn a_crash_at_any_operation_leaves_allowed_versions() {
    for (number, setup) in [SMALL, OVERLAY, DEVICE, DIRECT, PACKED].into_iter().enumerate() {
        for stop in 0..60 {
            for keep in [0, 64, 128, 192] {
                for round in 0..rounds() {
                    let seed = round * 10_000 + number as u64 * 1000 + stop + keep;
                    must_hold(Trial { setup, seed, stop: Some(stop), end: End::Crash(keep), ..PLAIN });
                }
            }
        }
    }
}

#[test]
fn the_death_of_the_process_loses_no_acknowledged_write() {
    for (number, setup) in [SMALL, OVERLAY, DEVICE, DIRECT, PACKED].into_iter().enumerate() {
        for stop in 0..80 {
            for round in 0..rounds() {
                let seed = round * 10_000 + number as u64 + stop;
                must_hold(Trial { setup, seed, stop: Some(stop), end: End::Kill, ..PLAIN });
            }
        }
    }
}

#[test]
fn after_any_failed_operation_the_request_can_be_repeated() {
    for (number, setup) in [SMALL, OVERLAY, DEVICE, DIRECT, PACKED].into_iter().enumerate() {
        for nth in 0..60 {
            for (turn, effect) in [Effect::None, Effect::Half, Effect::All].into_iter().enumerate() {
                let error = if turn == 0 { Errno::ENOSPC } else { Errno::EIO };
                let fault = Some(Fault { nth, error, effect, sticky: turn == 0 });
                for round in 0..rounds() {
                    let seed = round * 10_000 + number as u64 * 1000 + nth;
                    for (end, stop) in [(End::Kill, None), (End::Crash(100), Some(nth + 1 + seed % 20))] {
                        must_hold(Trial { setup, seed, fault, stop, end, ..PLAIN });
                    }
                }
            }
        }
    }
}
