//! A run that does not end, in words.

use sim::{Stall, StallKind, WaitingTask, micros};

/// A run that does not end, in words: the requests without an answer, what requests wait for, and the tasks.
pub fn describe(stall: &Stall) -> String {
    let why = match stall.kind {
        StallKind::Deadlock => "all tasks wait",
        StallKind::TurnLimit => "the run never comes to rest",
        StallKind::TimeLimit => "a task waits too long",
    };
    let mut out = format!("{why}: at {}\n", micros(stall.at_ns));
    for span in &stall.open {
        let (since, kind) = (micros(span.begin_ns), span.kind);
        out += &match span.number {
            Some(_) => format!("  not answered: {} of {}, submitted at {since}\n", span.name, span.track),
            None => format!("  not ended: {kind} of {} for {}, since {since}\n", span.track, span.name),
        };
    }
    stall.reports.iter().for_each(|line| out += &format!("  {line}\n"));
    for task in &stall.tasks {
        out += &format!("  waiting: {}\n", waiting(task));
    }
    out
}

/// A task by the work that it does.
fn waiting(task: &WaitingTask) -> String {
    let WaitingTask { node, role, key } = task;
    let work = match *role {
        "root" => return "the scenario".into(),
        "main" => "its main task".into(),
        "stop" => "the task that waits for a signal".into(),
        "responses" => format!("the front end's task for responses of disk {key}"),
        "op" => format!("operation {key}"),
        "ring" => format!("the ring of vbd{key}"),
        "vbd" => format!("the life of disk {key:#x}"),
        "allocate" => format!("the write that allocates from cluster {key} on"),
        "flush" => format!("the flush in slot {key}"),
        "given up" => format!("requests of disk {key} that were given up"),
        "nbd-connection" => format!("NBD connection {key}"),
        "nbd-replies" => format!("replies on NBD connection {key}"),
        "nbd-status" => format!("block status from sector {key} on"),
        "nbd-places" => "the next NBD client's place".into(),
        "nbd-client" => "the NBD client's connection".into(),
        "nbd-requests" => "requests of the NBD client".into(),
        "nbd-patience" => "the NBD client's limit of time".into(),
        _ => format!("{role} {key:#x}"),
    };
    format!("{node}: {work}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadlock_names_requests_and_the_work_of_tasks() {
        let span =
            sim::Span { track: "guest 1".into(), number: Some(3), begin_ns: 5000, ..Default::default() };
        let task = |role, key| WaitingTask { node: "tapdisk".into(), role, key };
        let text = describe(&Stall {
            kind: StallKind::Deadlock,
            at_ns: 476_000,
            tasks: vec![task("ring", 51712), task("other", 16)],
            open: vec![sim::Span { name: "read 8+8".into(), ..span }],
            reports: vec!["read 8 waits for the node below".into()],
        });
        let lines: Vec<&str> = text.lines().collect();
        let wanted = [
            "all tasks wait: at 476.000",
            "  not answered: read 8+8 of guest 1, submitted at 5.000",
            "  read 8 waits for the node below",
            "  waiting: tapdisk: the ring of vbd51712",
            "  waiting: tapdisk: other 0x10",
        ];
        assert_eq!(lines, wanted);
    }
}
