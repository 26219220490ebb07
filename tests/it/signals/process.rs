//! The process that a command starts as, and what becomes of what it leaves behind.

use super::*;
use testbed::{Action, eventually, missing};

#[test]
fn a_command_starts_with_default_dispositions_and_nothing_blocked() {
    let (queue, proxy) = one_message("dispositions", QueueKind::Classic);
    // With CHLD blocked a careless qconsume would never hear of its command's end.
    let finished = worker(&queue, &proxy)
        .args(["--", "grep", "-E", "^Sig(Blk|Ign):", "/proc/self/status"])
        .through(["env"])
        .through(["--ignore-signal=PIPE,HUP,INT,QUIT,USR1,CHLD,TSTP,ALRM"])
        .through(["--block-signal=CHLD,TERM,INT,USR2,ALRM,TSTP,PIPE"])
        .run();
    finished.assert_status(0);
    let none = "0000000000000000";
    assert_eq!(
        finished.stdout_text(),
        format!("SigBlk:\t{none}\nSigIgn:\t{none}\n")
    );
}

#[test]
fn a_command_inherits_no_descriptor() {
    let (queue, proxy) = one_message("descriptors", QueueKind::Classic);
    let finished = worker(&queue, &proxy)
        .args(["--", "ls", "/proc/self/fd"])
        .through(["sh", "-c", "exec 7</dev/null 9>&2; exec \"$0\" \"$@\""])
        .run();
    finished.assert_status(0);
    // 3 is what ls itself reads the folder by.
    assert_eq!(finished.stdout_text(), "0\n1\n2\n3\n");
}

#[test]
fn a_command_and_who_waits_for_it_may_use_every_cpu() {
    if std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() < 2) {
        return missing("two CPUs");
    }
    let (queue, proxy) = one_message("cpus", QueueKind::Classic);
    let finished = worker(&queue, &proxy)
        .shell("cd /proc; grep -h Cpus_allowed: self/status $PPID/task/*/status | uniq -c")
        .run();
    finished.assert_status(0);
    let ours = std::fs::read_to_string("/proc/self/status").unwrap();
    let mut ours = ours
        .lines()
        .filter(|line| line.starts_with("Cpus_allowed:"));
    // The command, our thread and lapin's.
    let expected = format!("3 {}", ours.next().unwrap());
    assert_eq!(finished.stdout_text().trim(), expected);
}

#[test]
fn a_command_leads_a_process_group_of_its_own() {
    let (queue, proxy) = one_message("group", QueueKind::Classic);
    let running = worker(&queue, &proxy)
        .args(["--", "cut", "-d ", "-f1,4,5", "/proc/self/stat"])
        .spawn();
    let text = running.finish(PATIENCE).stdout_text();
    let numbers: Vec<i32> = text
        .split_whitespace()
        .map(|n| n.parse().unwrap())
        .collect();
    let [pid, parent, group] = numbers[..] else {
        panic!("{text:?}");
    };
    assert_eq!((parent, group), (running.pid(), pid));
}

#[test]
fn a_command_dies_with_a_killed_qconsume() {
    for kind in QueueKind::ALL {
        let (queue, proxy) = one_message("orphan", kind);
        let running = running(worker(&queue, &proxy).shell(&format!("trap '' TERM HUP; {WAITS}")));
        stop(&running, Signal::SIGKILL).assert_status(137);
        assert_back(&queue);
    }
}

#[test]
fn what_a_command_leaves_in_its_group_is_killed_before_the_settlement() {
    for (script, status, hold) in [
        (
            "trap '' TERM HUP; sleep 1000 & exit 0",
            0,
            Method::BASIC_ACK,
        ),
        // The leader's death by a signal is an end like any other.
        ("sleep 1000 & kill -KILL $$", 137, Method::BASIC_REJECT),
        // A pipe is the classic way to wait for ever.
        (
            "sh -c 'sleep 1000 | sleep 1000' & exit 5",
            5,
            Method::BASIC_REJECT,
        ),
    ] {
        let (queue, proxy) = one_message("background", QueueKind::Classic);
        proxy.once(Direction::ToBroker, hold, Action::Hold);
        let running = worker(&queue, &proxy).shell(script).spawn();
        proxy.wait_for(Direction::ToBroker, hold, PATIENCE);
        // Nothing is settled yet, and qconsume itself is still there.
        running.wait_no_leftovers(PROMPT);
        assert!(!running.has_ended());
        proxy.release();
        running.finish(PROMPT).assert_status(status);
    }
}

#[test]
fn a_child_that_holds_stdin_open_holds_nothing_up() {
    // More than the pipe takes, so that there is something left to write when the command has ended. The child holds it
    // behind another number: the shell gives what it starts in the background /dev/null to read.
    let broker = Broker::shared();
    for detach in ["", "setsid "] {
        let queue = broker.queue("stdin-held");
        queue.publish(vec![b'x'; 3_000_000]);
        let started = testbed::owner::temp_folder("stdin-held").join("started");
        let running = qconsume()
            .url(&broker.url())
            .queue(queue.name())
            .env("STARTED", &started)
            .shell(&format!(
                "exec 3<&0; {detach}sh -c 'echo >$STARTED; exec sleep 1000' &
                while [ ! -s $STARTED ]; do sleep 0.02; done; head -c 10 >/dev/null; exit 0"
            ))
            .spawn();
        let finished = running.finish(PATIENCE);
        finished.assert_status(0);
        assert_gone(&queue);
        // Who has left the group is nobody's business but PID 1's.
        let expected = usize::from(!detach.is_empty());
        assert!(eventually(PROMPT, || running.leftovers().len() == expected));
    }
}

#[test]
fn nohup_keeps_a_hangup_from_qconsume() {
    let broker = Broker::shared();
    let queue = broker.queue("nohup");
    let running = qconsume()
        .url(&broker.url())
        .queue(queue.name())
        .through(["nohup"])
        .shell("exit 6")
        .spawn();
    queue.wait_consumers(1);
    running.signal(Signal::SIGHUP);
    queue.publish("the message");
    running.wait(PATIENCE).assert_status(6);
    assert_back(&queue);
}
