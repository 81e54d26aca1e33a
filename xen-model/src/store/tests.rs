//! Each rule by itself, then transactions against a naive model.

use super::*;
use proptest::prelude::*;

const DOM0: Client = Client { dom: DomId(0), conn: 1 };
const GUEST: Client = Client { dom: DomId(5), conn: 2 };
const OTHER: Client = Client { dom: DomId(6), conn: 3 };

fn store() -> Store {
    let mut store = Store::new(Quota { nodes: 8, value_bytes: 16, watches: 2, transactions: 1 });
    store.write(DOM0, None, "/local/domain/5", b"").unwrap();
    store.set_perms(DOM0, None, "/local/domain/5", Perms::private(DomId(5))).unwrap();
    store
}

fn events(store: &mut Store, watch: u64) -> Vec<String> {
    let mut out = Vec::new();
    while store.poll_watch(watch, Waker::noop()).unwrap() {
        out.push(store.take_watch(watch).unwrap());
    }
    out
}

#[test]
fn parents_are_made_and_listed_in_order() {
    let mut s = store();
    s.write(DOM0, None, "/a/b/c", b"1").unwrap();
    s.write(DOM0, None, "/a/a", b"2").unwrap();
    assert_eq!(s.directory(DOM0, None, "/a").unwrap(), ["a", "b"]);
    assert_eq!(s.read(DOM0, None, "/a/b").unwrap(), b"");
    assert_eq!(s.read(DOM0, None, "/a/b/d"), Err(Errno::ENOENT));
    s.remove(DOM0, None, "/a/b").unwrap();
    assert_eq!(s.read(DOM0, None, "/a/b/c"), Err(Errno::ENOENT));
    assert_eq!(s.directory(DOM0, None, "/a").unwrap(), ["a"]);
    assert!(s.remove(DOM0, None, "/a/b").is_ok(), "absent below a parent");
    assert_eq!(s.remove(DOM0, None, "/x/y").unwrap_err(), Errno::ENOENT);
    assert_eq!(s.remove(DOM0, None, "/").unwrap_err(), Errno::EINVAL);
}

#[test]
fn a_guest_has_its_own_directory_and_nothing_else() {
    let mut s = store();
    s.write(GUEST, None, "device/x", b"1").unwrap();
    assert_eq!(s.read(DOM0, None, "/local/domain/5/device/x").unwrap(), b"1");
    assert_eq!(s.perms(GUEST, None, "device/x").unwrap(), Perms::private(DomId(5)));
    assert_eq!(s.read(OTHER, None, "/local/domain/5/device/x"), Err(Errno::EACCES));
    assert_eq!(s.read(OTHER, None, "/local/domain/5/device/absent"), Err(Errno::EACCES), "nothing is told");
    assert_eq!(s.write(GUEST, None, "/local/y", b"").unwrap_err(), Errno::EACCES);
    s.set_perms(GUEST, None, "device/x", Perms::readable(DomId(5), DomId(6))).unwrap();
    assert_eq!(s.read(OTHER, None, "/local/domain/5/device/x").unwrap(), b"1");
    assert_eq!(s.write(OTHER, None, "/local/domain/5/device/x", b"").unwrap_err(), Errno::EACCES);
    assert_eq!(s.set_perms(GUEST, None, "device/x", Perms::private(DomId(6))).unwrap_err(), Errno::EACCES);
}

#[test]
fn quotas_bind_guests_only() {
    let mut s = store();
    assert_eq!(s.write(GUEST, None, "big", &[0; 17]).unwrap_err(), Errno::ENOSPC);
    s.write(DOM0, None, "/big", &[0; 4091]).unwrap();
    assert_eq!(s.write(DOM0, None, "/big", &[0; 4092]).unwrap_err(), Errno::ENOSPC);
    assert_eq!(s.write(GUEST, None, "big", &[0; 4093]).unwrap_err(), Errno::ENOSPC);
    for i in 0..7 {
        s.write(GUEST, None, &format!("n{i}"), b"").unwrap();
    }
    assert_eq!(s.write(GUEST, None, "one-more", b"").unwrap_err(), Errno::ENOSPC);
    s.remove(GUEST, None, "n0").unwrap();
    assert_eq!(s.write(GUEST, None, "two/more", b"").unwrap_err(), Errno::ENOSPC);
    let tx = s.start(GUEST).unwrap();
    assert_eq!(s.start(GUEST), Err(Errno::ENOSPC));
    s.write(GUEST, Some(tx), "in-tx", b"").unwrap();
    assert_eq!(s.write(GUEST, Some(tx), "in-tx-too", b"").unwrap_err(), Errno::ENOSPC);
    s.abort(tx);
    s.watch(GUEST, "a").unwrap();
    s.watch(GUEST, "b").unwrap();
    assert_eq!(s.watch(GUEST, "c"), Err(Errno::ENOSPC));
    assert_eq!((s.watch_count(DomId(5)), s.transaction_count(DomId(5))), (2, 0));
}

#[test]
fn watches_fire_at_registration_below_and_on_removal_above() {
    let mut s = store();
    s.write(DOM0, None, "/a/b/c", b"").unwrap();
    let (top, leaf, elsewhere) =
        (s.watch(DOM0, "/a").unwrap(), s.watch(DOM0, "/a/b/c").unwrap(), s.watch(DOM0, "/ab").unwrap());
    assert_eq!((events(&mut s, top), events(&mut s, leaf)), (vec!["/a".into()], vec!["/a/b/c".into()]));
    assert_eq!(events(&mut s, elsewhere), ["/ab"]);
    s.write(DOM0, None, "/a/b", b"1").unwrap();
    s.write(DOM0, None, "/a/b", b"2").unwrap();
    assert_eq!(events(&mut s, top), ["/a/b"], "the same event is queued once");
    assert!(events(&mut s, leaf).is_empty());
    s.remove(DOM0, None, "/a").unwrap();
    assert_eq!((events(&mut s, top), events(&mut s, leaf)), (vec!["/a".into()], vec!["/a/b/c".into()]));
    assert!(events(&mut s, elsewhere).is_empty());
}

#[test]
fn too_many_events_become_one_of_the_watched_path() {
    let mut s = Store::new(Quota::default());
    let watch = s.watch(DOM0, "/a").unwrap();
    events(&mut s, watch);
    for i in 0..64 {
        s.write(DOM0, None, &format!("/a/{i}"), b"").unwrap();
    }
    assert_eq!(events(&mut s, watch).len(), 64);
    for i in 0..100 {
        s.write(DOM0, None, &format!("/a/{i}"), b"").unwrap();
    }
    assert_eq!(events(&mut s, watch), ["/a"]);
    s.write(DOM0, None, "/a/0", b"").unwrap();
    assert_eq!(events(&mut s, watch), ["/a/0"]);
}

#[test]
fn a_watch_fires_only_for_readable_nodes() {
    let mut s = store();
    let (own, foreign) = (s.watch(GUEST, "x").unwrap(), s.watch(OTHER, "/local/domain/5").unwrap());
    assert_eq!((events(&mut s, own).len(), events(&mut s, foreign).len()), (1, 1));
    s.write(GUEST, None, "x", b"").unwrap();
    assert_eq!((events(&mut s, own).len(), events(&mut s, foreign).len()), (1, 0));
}

#[test]
fn transactions_fire_at_the_end_and_conflict_on_what_they_saw() {
    let mut s = store();
    s.write(DOM0, None, "/a", b"0").unwrap();
    let watch = s.watch(DOM0, "/a").unwrap();
    events(&mut s, watch);
    let tx = s.start(DOM0).unwrap();
    s.write(DOM0, Some(tx), "/a/x", b"1").unwrap();
    assert_eq!(s.read(DOM0, Some(tx), "/a/x").unwrap(), b"1");
    assert_eq!(s.read(DOM0, None, "/a/x"), Err(Errno::ENOENT));
    assert!(events(&mut s, watch).is_empty());
    s.commit(tx).unwrap();
    assert_eq!(events(&mut s, watch), ["/a/x"]);

    let tx = s.start(DOM0).unwrap();
    assert!(s.read(DOM0, Some(tx), "/a/absent").is_err());
    s.write(DOM0, Some(tx), "/b", b"").unwrap();
    s.write(DOM0, None, "/a/absent", b"").unwrap();
    assert_eq!(s.commit(tx).unwrap_err(), Errno::EAGAIN);
    assert_eq!(s.read(DOM0, None, "/b"), Err(Errno::ENOENT), "no effect");
    assert_eq!(s.commit(tx).unwrap_err(), Errno::ENOENT, "it is over");
}

#[test]
fn a_connection_takes_its_watches_and_transactions_along() {
    let mut s = store();
    let watch = s.watch(GUEST, "x").unwrap();
    let tx = s.start(GUEST).unwrap();
    s.disconnect(GUEST.conn);
    assert_eq!(s.poll_watch(watch, Waker::noop()), Err(Errno::ESHUTDOWN));
    assert_eq!(s.commit(tx).unwrap_err(), Errno::ENOENT);
    assert_eq!((s.watch_count(DomId(5)), s.transaction_count(DomId(5))), (0, 0));
}

#[derive(Clone, Debug)]
enum Op {
    Read(&'static str),
    List(&'static str),
    Write(&'static str, u8),
    Remove(&'static str),
}

#[derive(Clone, Debug)]
enum Step {
    Start(usize),
    /// Within the transaction in a slot, or outside any.
    Do(Option<usize>, Op),
    Commit(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let path = || prop::sample::select(vec!["/a", "/b", "/a/x", "/a/y", "/a/x/p", "/b/x/q"]);
    prop_oneof![
        path().prop_map(Op::Read),
        path().prop_map(Op::List),
        (path(), any::<u8>()).prop_map(|(p, v)| Op::Write(p, v)),
        path().prop_map(Op::Remove),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        1 => (0_usize..3).prop_map(Step::Start),
        4 => (prop::option::of(0_usize..3), op()).prop_map(|(tx, op)| Step::Do(tx, op)),
        1 => (0_usize..3).prop_map(Step::Commit),
    ]
}

/// Paths and values, nothing else.
#[derive(Clone, PartialEq, Debug, Default)]
struct Naive(BTreeMap<String, Vec<u8>>);

type Answer = Result<Vec<Vec<u8>>, Errno>;

impl Naive {
    fn run(&mut self, op: &Op) -> Answer {
        match *op {
            Op::Read(p) => self.0.get(p).map(|v| vec![v.clone()]).ok_or(Errno::ENOENT),
            Op::List(p) => {
                self.0.get(p).ok_or(Errno::ENOENT)?;
                let below = format!("{p}/");
                let names = self.0.keys().filter_map(|k| k.strip_prefix(&below)).filter(|n| !n.contains('/'));
                Ok(names.map(|n| n.as_bytes().to_vec()).collect())
            }
            Op::Write(p, v) => {
                for (at, _) in p.match_indices('/').skip(1) {
                    self.0.entry(p[..at].into()).or_default();
                }
                self.0.insert(p.into(), vec![v]);
                Ok(vec![])
            }
            Op::Remove(p) => {
                let parent = &p[..p.rfind('/').unwrap()];
                if !parent.is_empty() && !self.0.contains_key(parent) {
                    return Err(Errno::ENOENT);
                }
                let below = format!("{p}/");
                self.0.retain(|k, _| k != p && !k.starts_with(&below));
                Ok(vec![])
            }
        }
    }
}

fn run(store: &mut Store, tx: Option<u64>, op: &Op) -> Answer {
    match *op {
        Op::Read(p) => store.read(DOM0, tx, p).map(|v| vec![v]),
        Op::List(p) => {
            store.directory(DOM0, tx, p).map(|names| names.into_iter().map(String::into_bytes).collect())
        }
        Op::Write(p, v) => store.write(DOM0, tx, p, &[v]).map(|_| vec![]),
        Op::Remove(p) => store.remove(DOM0, tx, p).map(|_| vec![]),
    }
}

struct Running {
    id: u64,
    log: Vec<(Op, Answer)>,
    /// Nothing else has happened since its start.
    alone: bool,
}

proptest! {
    /// A committed transaction saw and did what it would have seen and done if run as a whole at its end; one that
    /// fails to commit has no effect; and one that ran alone commits.
    #[test]
    fn transactions_are_serial(steps in prop::collection::vec(step(), 1..60)) {
        let mut store = Store::new(Quota::default());
        let mut naive = Naive::default();
        let mut running: [Option<Running>; 3] = [None, None, None];
        for step in steps {
            match step {
                Step::Start(slot) => {
                    let old = running[slot].replace(Running { id: store.start(DOM0).unwrap(), log: vec![], alone: true });
                    if let Some(old) = old {
                        store.abort(old.id);
                    }
                }
                Step::Do(None, op) => {
                    prop_assert_eq!(run(&mut store, None, &op), naive.run(&op));
                    if !matches!(op, Op::Read(_) | Op::List(_)) {
                        running.iter_mut().flatten().for_each(|tx| tx.alone = false);
                    }
                }
                Step::Do(Some(slot), op) => {
                    if let Some(tx) = &mut running[slot] {
                        let answer = run(&mut store, Some(tx.id), &op);
                        tx.log.push((op, answer));
                    }
                }
                Step::Commit(slot) => {
                    let Some(tx) = running[slot].take() else { continue };
                    match store.commit(tx.id) {
                        Ok(_) => {
                            for (op, answer) in tx.log {
                                prop_assert_eq!(naive.run(&op), answer);
                            }
                            running.iter_mut().flatten().for_each(|tx| tx.alone = false);
                        }
                        Err(e) => {
                            prop_assert_eq!(e, Errno::EAGAIN);
                            prop_assert!(!tx.alone, "a conflict without another party");
                        }
                    }
                }
            }
        }
        for path in ["/a", "/b", "/a/x", "/a/y", "/a/x/p", "/b/x", "/b/x/q"] {
            prop_assert_eq!(run(&mut store, None, &Op::Read(path)), naive.run(&Op::Read(path)));
            prop_assert_eq!(run(&mut store, None, &Op::List(path)), naive.run(&Op::List(path)));
        }
    }
}
