//! The executor: one thread, virtual nanoseconds, every turn decided.

use crate::config::{Config, Limits, Scheduling, Stall, StallKind, WaitingTask};
use crate::decide::{DecisionMap, Decisions, Draw, Label};
use crate::fault::Swarm;
use crate::guard;
use crate::mix::{Entity, mix2, text_hash};
use crate::nested::Work;
use crate::node::{Node, NodeInner};
use crate::task::{BoxedTask, Identity, Task, pop_woken, push_cleared, push_woken, swap_woken, task_id};
use crate::time::{Action, Sleep, Timed, Timers};
use crate::trace::{Span, SpanId, Trace, TraceEvent, TraceLevel, TraceReport};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::rc::{Rc, Weak};
use std::task::{Context, Poll};

/// How far the turn of a woken task is delayed.
pub static WAKE: Label = Label::new("wake", "its turn {n} is delayed by {} ns");

/// Shells of ended tasks that are kept for reuse.
const SHELLS_MAX: usize = 256;

type Reporter = Box<dyn Fn() -> Vec<String>>;

pub(crate) struct Core {
    pub(crate) now: Cell<u64>,
    pub(crate) timers: RefCell<Timers>,
    pub(crate) doomed: RefCell<Vec<Rc<NodeInner>>>,
    pub(crate) tasks: RefCell<Vec<Option<Rc<Task>>>>,
    free: RefCell<Vec<u32>>,
    /// Shells of ended tasks.
    shells: RefCell<Vec<Rc<Task>>>,
    generation: Cell<u32>,
    pub(crate) nodes: RefCell<Vec<Rc<NodeInner>>>,
    pub(crate) current: RefCell<Option<Rc<Task>>>,
    pub(crate) decisions: RefCell<Decisions>,
    trace: RefCell<Trace>,
    scheduling: Cell<Scheduling>,
    swarm: Swarm,
    limits: Limits,
    turns: Cell<u64>,
    /// What the running turn has done so far.
    pub(crate) work: Cell<u64>,
    pub(crate) longest: Cell<Work>,
    /// Set while tasks of other nodes run inside a turn.
    pub(crate) nested: Cell<bool>,
    reporters: RefCell<Vec<Reporter>>,
}

/// A world's engine; clones share it.
#[derive(Clone)]
pub struct Sim(pub(crate) Rc<Core>);

/// Tells whether an engine still exists, without keeping it.
pub struct Witness(Weak<Core>);

impl Witness {
    /// Whether the engine was freed. After a run and the drop of every handle that its owner holds, an engine that is
    /// not freed is kept by a circle of references, and with it all that belongs to the circle.
    pub fn is_gone(&self) -> bool {
        self.0.strong_count() == 0
    }
}

impl Sim {
    /// A witness of this engine.
    pub fn witness(&self) -> Witness {
        Witness(Rc::downgrade(&self.0))
    }

    /// An engine with no tasks at time 0.
    pub fn new(config: &Config) -> Self {
        let world = Rc::new(NodeInner::new(0, "world".into(), Entity::WORLD));
        Self(Rc::new(Core {
            now: Cell::new(0),
            timers: RefCell::default(),
            doomed: RefCell::default(),
            tasks: RefCell::default(),
            free: RefCell::default(),
            shells: RefCell::default(),
            generation: Cell::new(0),
            nodes: RefCell::new(vec![world]),
            current: RefCell::default(),
            decisions: RefCell::new(Decisions::new(
                config.seed,
                &config.source,
                config.record,
                config.record && config.trace != TraceLevel::Hash,
            )),
            trace: RefCell::new(Trace::new(config.trace)),
            scheduling: Cell::new(config.scheduling),
            swarm: Swarm::new(config.seed, config.faults),
            limits: config.limits,
            turns: Cell::new(0),
            work: Cell::new(0),
            longest: Cell::default(),
            nested: Cell::new(false),
            reporters: RefCell::default(),
        }))
    }

    /// Virtual time in nanoseconds since the start.
    #[inline]
    pub fn now_ns(&self) -> u64 {
        self.0.now.get()
    }

    /// Completes `ns` nanoseconds from now.
    pub fn sleep_ns(&self, ns: u64) -> Sleep {
        Sleep::new(Rc::clone(&self.0), self.now_ns().saturating_add(ns))
    }

    /// Gives every task that is ready now its turn.
    pub fn yield_now(&self) -> impl Future<Output = ()> + 'static {
        let mut yielded = false;
        poll_fn(move |cx| {
            if std::mem::replace(&mut yielded, true) {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
    }

    /// Calls `timed` with `token` at `at_ns` (now, if that has passed), whatever is killed in the meantime.
    pub fn call_at(&self, at_ns: u64, timed: Rc<dyn Timed>, token: u64) {
        self.0.timers.borrow_mut().add(at_ns.max(self.now_ns()), Action::Call(timed, token));
    }

    /// When the last delayed turn of any node other than `except` is due; `None` when there is none. A check that
    /// nothing moves must look again then, because a task whose turn was delayed is not asleep.
    pub fn put_back_until_ns(&self, except: &Node) -> Option<u64> {
        let nodes = self.0.nodes.borrow();
        let others = nodes.iter().filter(|node| node.entity != except.entity());
        others.map(|node| node.put_back_until_ns.get()).max().filter(|until_ns| *until_ns > self.now_ns())
    }

    /// A new node. Its entity is derived from `name` and `key`.
    pub fn node(&self, name: impl Into<String>, key: u64) -> Node {
        let name = name.into();
        let entity = Entity::WORLD.child(&name, key);
        self.name_entity(entity, || name.clone());
        let mut nodes = self.0.nodes.borrow_mut();
        let inner = Rc::new(NodeInner::new(nodes.len() as u32, name, entity));
        nodes.push(Rc::clone(&inner));
        Node::new(Rc::clone(&self.0), inner)
    }

    /// Starts a task of the node whose task is running now.
    pub fn spawn(&self, role: &'static str, key: u64, task: impl Future<Output = ()> + 'static) {
        let node = self.0.current.borrow().as_ref().map_or(0, |t| t.node);
        self.0.spawn(node, role, key, Box::pin(task));
    }

    /// As [`Sim::spawn`] for a pair of `role` and `key` that the running task uses only once; costs less.
    pub fn spawn_once(&self, role: &'static str, key: u64, task: impl Future<Output = ()> + 'static) {
        let (entity, node) = match self.0.current.borrow().as_ref() {
            Some(parent) => (parent.entity.child(role, key), parent.node),
            None => (Entity::WORLD.child(role, key), 0),
        };
        self.0.start(entity, node, role, key, Box::pin(task));
    }

    /// The entity of the running task; outside of tasks, the world's entity.
    pub fn current(&self) -> Entity {
        self.0.current.borrow().as_ref().map_or(Entity::WORLD, |t| t.entity)
    }

    /// An entity for a piece of work of the running task: (task, role, key, how often the task used this pair). It has
    /// no name yet.
    #[inline]
    pub fn derive(&self, role: &'static str, key: u64) -> Entity {
        let current = self.0.current.borrow();
        let Some(task) = current.as_ref() else { return Entity::WORLD.child(role, key) };
        self.0.ordinal_child(task, role, key)
    }

    /// Takes the decision about (`entity`, `label`, `attempt`); `draw` makes it from hash bits if no stored one
    /// applies. 0 is the boring answer.
    #[inline]
    pub fn decide(
        &self,
        entity: Entity,
        label: &'static Label,
        attempt: u32,
        draw: impl FnOnce(&mut Draw) -> u64,
    ) -> u64 {
        self.0.decisions.borrow_mut().decide(entity, label, attempt, self.0.now.get(), draw)
    }

    /// As [`Sim::decide`] for a fault with the given rate: once faults are stopped, no more are drawn.
    #[inline]
    pub fn fault(
        &self,
        entity: Entity,
        label: &'static Label,
        rate_ppm: u32,
        draw: impl FnOnce(&mut Draw) -> u64,
    ) -> u64 {
        self.nth_fault(entity, label, 0, rate_ppm, draw)
    }

    /// As [`Sim::fault`], for an entity that is asked more than once.
    #[inline]
    pub fn nth_fault(
        &self,
        entity: Entity,
        label: &'static Label,
        attempt: u32,
        rate_ppm: u32,
        draw: impl FnOnce(&mut Draw) -> u64,
    ) -> u64 {
        let mut decisions = self.0.decisions.borrow_mut();
        if decisions.faults_stopped {
            return 0;
        }
        decisions.decide(
            entity,
            label,
            attempt,
            self.0.now.get(),
            |d| if d.ppm(rate_ppm) { draw(d) } else { 0 },
        )
    }

    /// Whether decisions come only from a map: nothing is drawn.
    pub fn is_replaying(&self) -> bool {
        self.0.decisions.borrow().is_replaying()
    }

    /// Whether some decisions are given, so that a decision must be asked for even if none would be drawn.
    #[inline]
    pub fn has_given_decisions(&self) -> bool {
        self.0.decisions.borrow().has_given()
    }

    /// Ends the fault phase: what is in flight must now drain.
    pub fn stop_faults(&self) {
        self.0.decisions.borrow_mut().faults_stopped = true;
        self.0.scheduling.set(Scheduling::Fifo);
    }

    /// Whether [`Sim::stop_faults`] was called.
    pub fn have_faults_stopped(&self) -> bool {
        self.0.decisions.borrow().faults_stopped
    }

    /// The fault rates of this seed.
    pub fn swarm(&self) -> Swarm {
        self.0.swarm
    }

    /// Gives an entity a readable name, unless it has one; evaluated only while names are kept.
    #[inline]
    pub fn name_entity(&self, entity: Entity, name: impl FnOnce() -> String) {
        if self.0.decisions.borrow().naming() {
            let name = name();
            self.0.decisions.borrow_mut().name(entity, || name);
        }
    }

    /// The name of an entity; a number if names are not kept or it has none.
    pub fn name_of(&self, entity: Entity) -> String {
        let decisions = self.0.decisions.borrow();
        decisions.name_of(entity).map_or_else(|| format!("{:016x}", entity.0), str::to_string)
    }

    /// Adds `event` to the trace.
    #[inline]
    pub fn trace(&self, who: &str, event: &impl TraceEvent) {
        self.0.trace.borrow_mut().event(self.0.now.get(), who, event);
    }

    /// Adds a readable line to the trace; not part of the hash, and evaluated only if lines are kept.
    #[inline]
    pub fn remark(&self, who: &str, text: impl FnOnce() -> String) {
        if self.0.trace.borrow().keeps_lines() {
            let text = text();
            self.0.trace.borrow_mut().line(self.0.now.get(), who, &text);
        }
    }

    /// A span begins; `make` is called only if spans are kept, and need not know the time.
    #[inline]
    pub fn begin_span(&self, make: impl FnOnce() -> Span) -> SpanId {
        if !self.keeps_lines() {
            return SpanId::default();
        }
        let span = Span { begin_ns: self.now_ns(), ..make() };
        self.0.trace.borrow_mut().begin(span)
    }

    /// The span ends now; of several ends the first counts.
    #[inline]
    pub fn end_span(&self, id: SpanId, outcome: impl FnOnce() -> String) {
        if id != SpanId::default() {
            let outcome = outcome();
            self.0.trace.borrow_mut().end(id, self.now_ns(), outcome);
        }
    }

    /// Whether lines and spans are kept, for a report.
    pub fn keeps_lines(&self) -> bool {
        self.0.trace.borrow().keeps_lines()
    }

    /// The trace hash so far.
    pub fn trace_hash(&self) -> u64 {
        self.0.trace.borrow().hash()
    }

    /// Adds a source of lines to the report of a stalled run.
    pub fn on_stall(&self, reporter: impl Fn() -> Vec<String> + 'static) {
        self.0.reporters.borrow_mut().push(Box::new(reporter));
    }

    /// Runs `root` to its end.
    ///
    /// # Errors
    /// A [`Stall`] when nothing can continue, or a limit is reached.
    pub fn run<T: 'static>(&self, root: impl Future<Output = T> + 'static) -> Result<T, Stall> {
        let _own = WokenScope(swap_woken(VecDeque::new()));
        let out = Rc::new(RefCell::new(None));
        let slot = Rc::clone(&out);
        self.0.spawn(0, "root", 0, Box::pin(async move { *slot.borrow_mut() = Some(root.await) }));
        let result = loop {
            if let Some(value) = out.borrow_mut().take() {
                break Ok(value);
            }
            if let Some(kind) = self.0.turn() {
                break Err(self.0.stall(kind));
            }
        };
        self.0.clear();
        result
    }

    /// Ends the world; returns the trace and the recorded decisions.
    pub fn finish(&self) -> (TraceReport, DecisionMap) {
        (self.0.trace.borrow_mut().take(), self.0.decisions.borrow_mut().take_record())
    }

    /// As [`Sim::finish`], from wherever a run stopped: `None` if the engine was in the middle of changing them.
    pub fn salvage(&self) -> Option<(TraceReport, DecisionMap)> {
        let (mut trace, mut decisions) =
            (self.0.trace.try_borrow_mut().ok()?, self.0.decisions.try_borrow_mut().ok()?);
        Some((trace.take(), decisions.take_record()))
    }

    /// Turns of tasks so far.
    pub fn turns(&self) -> u64 {
        self.0.turns.get()
    }
}

/// Restores the outer run's list of woken tasks, also when a panic unwinds.
struct WokenScope(VecDeque<u64>);
impl Drop for WokenScope {
    fn drop(&mut self) {
        swap_woken(std::mem::take(&mut self.0));
    }
}

impl Core {
    fn ordinal_child(&self, task: &Task, role: &'static str, key: u64) -> Entity {
        let base = task.entity.child_hashed(text_hash(role), key);
        match task.ordinals.borrow_mut().next(base.0) {
            0 => base,
            n => Entity(mix2(base.0, u64::from(n))),
        }
    }

    pub(crate) fn spawn(&self, node: u32, role: &'static str, key: u64, future: BoxedTask) {
        // When spawned by a task, that task is the parent; otherwise the node is.
        let current = self.current.borrow();
        let entity = match current.as_ref().filter(|t| t.node == node) {
            Some(parent) => self.ordinal_child(parent, role, key),
            None => self.nodes.borrow()[node as usize].entity.child(role, key),
        };
        drop(current);
        self.start(entity, node, role, key, future);
    }

    fn start(&self, entity: Entity, node: u32, role: &'static str, key: u64, future: BoxedTask) {
        let mut decisions = self.decisions.borrow_mut();
        decisions.name(entity, || format!("{} {role} {key}", self.nodes.borrow()[node as usize].name));
        drop(decisions);
        let slot = self.free.borrow_mut().pop();
        let mut tasks = self.tasks.borrow_mut();
        let slot = slot.unwrap_or_else(|| {
            tasks.push(None);
            (tasks.len() - 1) as u32
        });
        self.generation.set(self.generation.get().wrapping_add(1));
        let id = task_id(slot, self.generation.get());
        let who = Identity { id, entity, role, key, node };
        let mut shell = self.shells.borrow_mut().pop();
        let task = match shell.as_mut().and_then(Rc::get_mut) {
            Some(shell) => {
                shell.reuse(who, future);
                None
            }
            None => Some(Rc::new(Task::new(who, future))),
        };
        tasks[slot as usize] = task.or(shell);
        push_woken(id);
    }

    /// Keeps the shell of an ended task for reuse, unless a waker of it is still held.
    fn retire(&self, task: Rc<Task>) {
        let mut shells = self.shells.borrow_mut();
        if Rc::strong_count(&task) == 1 && task.is_reusable() && shells.len() < SHELLS_MAX {
            shells.push(task);
        }
    }

    /// Runs one task or timer. `Some` when the run cannot continue.
    fn turn(&self) -> Option<StallKind> {
        let Some((id, cleared)) = pop_woken() else { return self.advance() };
        let task = self.task(id)?;
        self.work.set(0);
        let stall = self.turn_of(task, cleared);
        if !self.doomed.borrow().is_empty() {
            self.reap();
        }
        stall
    }

    /// The living task with this number.
    pub(crate) fn task(&self, id: u64) -> Option<Rc<Task>> {
        let tasks = self.tasks.borrow();
        tasks.get((id & 0xffff_ffff) as usize)?.as_ref().filter(|task| task.id == id).cloned()
    }

    /// One turn of `task`, unless it is delayed or already running.
    pub(crate) fn turn_of(&self, task: Rc<Task>, cleared: bool) -> Option<StallKind> {
        let slot = (task.id & 0xffff_ffff) as usize;
        if cleared {
            task.put_back.set(false);
        } else if self.put_back(&task) {
            return None;
        }
        if self.turns.replace(self.turns.get() + 1) >= self.limits.turns {
            return Some(StallKind::TurnLimit);
        }
        self.trace
            .borrow_mut()
            .turn(task.entity.0, self.now.get(), || format!("{} {:#x} runs", task.role, task.key));
        // A task that wakes itself while it runs is polled again later, never recursively.
        let mut future = task.future.take()?;
        let outer = self.current.replace(Some(Rc::clone(&task)));
        let poll = future.as_mut().poll(&mut Context::from_waker(&task.waker));
        match poll {
            Poll::Ready(()) => {
                drop(future);
                self.note_work(&task);
                self.tasks.borrow_mut()[slot] = None;
                self.free.borrow_mut().push(slot as u32);
                self.current.replace(outer);
                self.retire(task);
            }
            Poll::Pending => {
                self.note_work(&task);
                task.future.set(Some(future));
                self.current.replace(outer);
            }
        }
        None
    }

    fn put_back(&self, task: &Task) -> bool {
        let Scheduling::Random { one_in, bits } = self.scheduling.get() else { return false };
        if task.put_back.get() {
            return true;
        }
        let attempt = task.wakes.replace(task.wakes.get() + 1);
        let late_ns = self.decisions.borrow_mut().decide(task.entity, &WAKE, attempt, self.now.get(), |d| {
            if d.below(u64::from(one_in)) == 0 { d.magnitude(bits) } else { 0 }
        });
        if late_ns > 0 {
            let due_ns = self.now.get().saturating_add(late_ns);
            task.put_back.set(true);
            self.timers.borrow_mut().add(due_ns, Action::Run(task.id));
            let until_ns = &self.nodes.borrow()[task.node as usize].put_back_until_ns;
            until_ns.set(until_ns.get().max(due_ns));
        }
        late_ns > 0
    }

    fn advance(&self) -> Option<StallKind> {
        let Some((at_ns, action)) = self.timers.borrow_mut().pop() else { return Some(StallKind::Deadlock) };
        let now = self.now.get();
        if at_ns > now {
            if at_ns > self.limits.time_ns {
                return Some(StallKind::TimeLimit);
            }
            self.now.set(at_ns);
            guard::advance(at_ns - now);
        }
        match action {
            Action::Wake(waker) => waker.wake(),
            Action::Run(id) => push_cleared(id),
            Action::Call(timed, token) => timed.fire(token),
        }
        if !self.doomed.borrow().is_empty() {
            self.reap();
        }
        None
    }

    /// Drops the tasks of dead nodes, then lets the models clean up after them.
    fn reap(&self) {
        while let Some(node) = { self.doomed.borrow_mut().pop() } {
            let victims: Vec<Rc<Task>> =
                self.tasks.borrow().iter().flatten().filter(|t| t.node == node.id).cloned().collect();
            for task in victims {
                let slot = (task.id & 0xffff_ffff) as usize;
                self.tasks.borrow_mut()[slot] = None;
                self.free.borrow_mut().push(slot as u32);
                let future = task.future.take();
                drop(future);
            }
            node.finish();
        }
    }

    /// Drops everything that remains: tasks hold the engine and the engine holds the tasks.
    fn clear(&self) {
        for node in self.nodes.borrow().iter() {
            node.alive.set(false);
        }
        let tasks = std::mem::take(&mut *self.tasks.borrow_mut());
        for task in tasks.into_iter().flatten() {
            let future = task.future.take();
            drop(future);
        }
        self.free.borrow_mut().clear();
        let timers = std::mem::take(&mut *self.timers.borrow_mut());
        drop(timers);
        let reporters = std::mem::take(&mut *self.reporters.borrow_mut());
        drop(reporters);
        let nodes = std::mem::take(&mut *self.nodes.borrow_mut());
        for node in &nodes {
            node.finish_quietly();
        }
    }

    fn stall(&self, kind: StallKind) -> Stall {
        let nodes = self.nodes.borrow();
        let waiting = |task: &Rc<Task>| {
            let node = nodes[task.node as usize].name.clone();
            WaitingTask { node, role: task.role, key: task.key }
        };
        Stall {
            kind,
            at_ns: self.now.get(),
            tasks: self.tasks.borrow().iter().flatten().map(waiting).collect(),
            open: self.trace.borrow().open(),
            reports: self.reporters.borrow().iter().flat_map(|reporter| reporter()).collect(),
        }
    }
}
