//! Random concurrent requests on a slow disk: the observed order must be that of submission.

use super::*;
use proptest::prelude::*;
use std::cell::{Cell, RefCell};
use tap_host::{IoBuf, SECTOR_BYTES, copy_from_slice};

const SECTORS: u64 = 64;

/// A disk in memory. An operation takes effect after some turns, as a whole or not at all.
struct Disk {
    pool: Pool,
    sectors: RefCell<Vec<u8>>,
    bad: Option<u64>,
    random: Cell<u64>,
    running: RefCell<Vec<(Op, SectorRange)>>,
}

/// Removes an operation from the running ones, also when its future is dropped.
struct Running<'a>(&'a Disk, (Op, SectorRange));

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut running = self.0.running.borrow_mut();
        let at = running.iter().position(|r| *r == self.1).expect("a running operation is listed");
        running.swap_remove(at);
    }
}

impl Disk {
    fn begin(&self, op: Op, range: SectorRange) -> Running<'_> {
        let mut running = self.running.borrow_mut();
        let conflict = running.iter().any(|r| r.1.overlaps(range) && (r.0 == Op::Write || op == Op::Write));
        assert!(!conflict, "{op:?} {range} overlaps one of {running:?}");
        running.push((op, range));
        Running(self, (op, range))
    }

    fn turns(&self) -> u64 {
        let next = self.random.get().wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        self.random.set(next);
        next >> 61
    }
}

struct DiskNode(Rc<Disk>);

impl Node for DiskNode {
    fn submit(&self, mut request: Request) -> LocalBoxFuture<Response> {
        let disk = Rc::clone(&self.0);
        Box::pin(async move {
            let _running = disk.begin(request.op, request.range);
            for _ in 0..disk.turns() {
                disk.pool.yield_now().await;
            }
            let (start, count) = (request.range.start.0, u64::from(request.range.count));
            let bufs = &mut request.bufs;
            if disk.bad.is_some_and(|bad| (start..start + count).contains(&bad)) {
                return Response { result: Err(Errno::EIO), bufs: request.bufs };
            }
            let mut sectors = disk.sectors.borrow_mut();
            for i in 0..count {
                let (at, sector) = ((i * SECTOR_BYTES) as usize, &mut sectors[(start + i) as usize]);
                let mut byte = [0];
                match request.op {
                    Op::Read => copy_from_slice(bufs, at, &[*sector; SECTOR_BYTES as usize]),
                    _ => {
                        copy_to_slice(bufs, at, &mut byte);
                        *sector = byte[0];
                    }
                }
            }
            Response { result: Ok(()), bufs: request.bufs }
        })
    }
    fn info(&self) -> NodeInfo {
        NodeInfo::new(SECTORS, false)
    }
    fn close(&self) -> LocalBoxFuture<Result<(), Errno>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

#[derive(Clone, Debug)]
struct Plan {
    write: bool,
    start: u64,
    count: u32,
    /// How much runs before the next one is submitted: 0 everything, 1 and 2 one turn, above that nothing.
    pace: u8,
}

fn plans() -> impl Strategy<Value = Vec<Plan>> {
    let plan = (any::<bool>(), 0..SECTORS - 8, 1_u32..8, 0_u8..12);
    let plan = plan.prop_map(|(write, start, count, pace)| Plan { write, start, count, pace });
    prop::collection::vec(plan, 1..60)
}

fn filled(count: u32, fill: u8) -> tap_host::IoVec {
    let mut buf = IoBuf::unpooled(count as usize * SECTOR_BYTES as usize).unwrap();
    buf.fill(fill);
    std::iter::once(buf).collect()
}

/// A request in flight, and the values it reads.
struct Flight {
    outcome: Outcome<Response>,
    plan: Plan,
    sees: Vec<u8>,
}

fn run(plans: Vec<Plan>, limits: SchedulerLimits, bad: Option<u64>, seed: u64) {
    let pool = Pool::new();
    let disk = Rc::new(Disk {
        pool: pool.clone(),
        sectors: RefCell::new(vec![0; SECTORS as usize]),
        bad,
        random: Cell::new(seed),
        running: RefCell::default(),
    });
    let scheduler = Scheduler::new(pool.clone(), Rc::new(DiskNode(Rc::clone(&disk))), limits);
    // The value of each sector, in the order of submission.
    let mut model = vec![0_u8; SECTORS as usize];
    let mut flights: Vec<Flight> = Vec::new();
    for (number, plan) in plans.into_iter().enumerate() {
        let fill = number as u8 + 1;
        let range = SectorRange::new(plan.start, plan.count);
        let span = plan.start as usize..(plan.start + u64::from(plan.count)) as usize;
        let fails = bad.is_some_and(|bad| span.contains(&(bad as usize)));
        let sees = model[span.clone()].to_vec();
        let request = if plan.write {
            for value in model[span].iter_mut().filter(|_| !fails) {
                *value = fill;
            }
            Request::write(range, filled(plan.count, fill))
        } else {
            Request::read(range, filled(plan.count, 0))
        };
        let future = scheduler.submit(request);
        let outcome = pool.defer(future);
        match plan.pace {
            0 => pool.run(),
            1 | 2 => {
                pool.turn();
            }
            _ => {}
        }
        flights.push(Flight { outcome, plan, sees });
    }
    pool.run();
    for flight in &flights {
        let response = flight.outcome.take().expect("every request is answered");
        let span = flight.plan.start..flight.plan.start + u64::from(flight.plan.count);
        let fails = bad.is_some_and(|bad| span.contains(&bad));
        assert_eq!(response.result.is_err(), fails, "{:?}", flight.plan);
        if !flight.plan.write && !fails {
            let seen = response.bufs[0].chunks(SECTOR_BYTES as usize);
            assert!(seen.zip(&flight.sees).all(|(s, value)| s[0] == *value), "{:?}", flight.plan);
        }
    }
    let sectors = disk.sectors.borrow();
    assert_eq!(*sectors, model);
    assert!(scheduler.0.line.borrow().is_idle(limits.depth) && scheduler.0.tracker.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn overlapping_requests_see_the_order_of_submission(
        plans in plans(), depth in 1_usize..5, merge_sectors in prop::sample::select(vec![0_u32, 1, 8, 16, 64]),
        bad in prop::option::of(0..SECTORS), seed in any::<u64>(),
    ) {
        run(plans, SchedulerLimits { depth, merge_sectors, ..FEW }, bad, seed);
    }
}
