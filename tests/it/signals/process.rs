//! The command's process, and the processes that it leaves behind.

use super::*;
use nix::{errno::Errno, sys::signal::killpg, unistd::Pid};
use std::collections::BTreeSet;
use testbed::{Action, eventually, missing, owner};

#[test]
fn a_command_starts_with_default_dispositions_and_nothing_blocked() {
    if emulator_lacks("signals in /proc/self/status as they are") {
        return;
    }
    let (queue, proxy) = one_message("dispositions", QueueKind::Classic);
    // If SIGCHLD stayed blocked, qconsume wouldn't notice the command's end.
    let finished = behind(&proxy, &queue)
        .args(["--", "grep", "-E", "^Sig(Blk|Ign):", "/proc/self/status"])
        .through(["env"])
        .through(["--ignore-signal=PIPE,HUP,INT,QUIT,USR1,CHLD,TSTP,ALRM"])
        .through(["--block-signal=CHLD,TERM,INT,USR2,ALRM,TSTP,PIPE"])
        .run();
    finished.assert_status(0);
    let none = "0000000000000000";
    assert_eq!(finished.stdout_text(), format!("SigBlk:\t{none}\nSigIgn:\t{none}\n"));
}

#[test]
fn a_command_inherits_the_descriptors_that_qconsume_was_started_with_and_none_of_its_own() {
    let (queue, proxy) = one_message("descriptors", QueueKind::Classic);
    let opens = ["sh", "-c", "exec 7</dev/null 9>&2; exec \"$0\" \"$@\""];
    let finished = behind(&proxy, &queue).args(["--", "ls", "/proc/self/fd"]).through(opens).run();
    finished.assert_status(0);
    // Descriptors of the tests themselves may be inherited, too.
    let without = Program::new("ls").arg("/proc/self/fd").through(opens).run();
    assert_eq!(finished.stdout_text(), without.stdout_text());
    assert!(finished.stdout_text().contains("\n7\n"));
}

#[test]
fn a_shells_process_substitution_reaches_the_command() {
    let (queue, proxy) = one_message("substitution", QueueKind::Classic);
    let finished = behind(&proxy, &queue).through(["bash", "-c", "exec \"$0\" -- cat <(echo of the shell)"]).run();
    finished.assert_status(0);
    assert_eq!(finished.stdout_text(), "of the shell\n");
}

const NO_PROCESS: &str = "no more processes or threads may be started (pids limit, ulimit -u)";

#[test]
fn a_shortage_of_processes_is_no_broken_command() {
    if !owner::is_root() || owner::find_in_path("setpriv").is_none() {
        return missing("root, and setpriv");
    }
    let broker = Broker::shared();
    let queue = broker.queue("shortage");
    queue.publish("the message");
    // The kernel counts processes for each user, so the test needs an unused one, and a copy of the program that it can
    // reach.
    let user = 1_000_000 + std::process::id();
    let program = owner::temp_folder("shortage").join("qconsume");
    std::fs::copy(crate::common::qconsume_path(), &program).unwrap();
    // With the lowest limit lapin's thread is refused, with the next one the command.
    let mut refused = BTreeSet::new();
    for limit in 1.. {
        let finished = Program::new(&program)
            .url(&broker.url())
            .queue(queue.name())
            .args(["--connect-timeout", "20s", "--", "cat"])
            .through(["setpriv", &format!("--reuid={user}"), "--clear-groups"])
            .through(["prlimit", &format!("--nproc={limit}")])
            .run();
        if finished.status() == 0 {
            break;
        }
        finished.assert_status(71).assert_stderr(NO_PROCESS).assert_stderr("another try");
        for what in ["the AMQP handshake failed: ", "the command can't be started: "] {
            if finished.stderr.contains(what) {
                refused.insert(what);
            }
        }
        assert_eq!(queue.wait_get().text(), "the message");
        queue.publish("the message");
        assert!(limit < 10, "{finished:?}");
    }
    assert_eq!(refused.len(), 2, "no limit was just too small for {refused:?}");
}

#[test]
fn a_signal_that_may_not_be_sent_is_warned_about() {
    if !owner::is_root() || owner::find_in_path("setpriv").is_none() {
        return missing("root, and setpriv");
    }
    let (queue, proxy) = one_message("not-permitted", QueueKind::Classic);
    let go = owner::temp_folder("not-permitted").join("go");
    let worker = behind(&proxy, &queue)
        .env("GO", &go)
        .args(["--", "setpriv", "--reuid=65534", "--clear-groups", "sh", "-c"])
        .arg("echo running; while [ ! -e $GO ]; do sleep 0.02; done; exit 3")
        .through(["setpriv", "--bounding-set=-kill"]);
    let running = running(worker);
    running.signal(Signal::SIGTERM);
    running.wait_for_stderr("SIGTERM can't be sent", PATIENCE);
    running.wait_for_stderr("CAP_KILL", PATIENCE);
    std::fs::write(&go, "").unwrap();
    running.finish(PATIENCE).assert_status(3);
    assert_back(&queue);
}

#[test]
fn a_command_leads_a_process_group_of_its_own() {
    let (queue, proxy) = one_message("group", QueueKind::Classic);
    let running = behind(&proxy, &queue).args(["--", "cut", "-d ", "-f1,4,5", "/proc/self/stat"]).spawn();
    let text = running.finish(PATIENCE).stdout_text();
    let numbers: Vec<i32> = text.split_whitespace().map(|n| n.parse().unwrap()).collect();
    let [pid, parent, group] = numbers[..] else {
        panic!("{text:?}");
    };
    assert_eq!((parent, group), (running.pid(), pid));
}

#[test]
fn a_command_dies_with_a_killed_qconsume() {
    for kind in QueueKind::ALL {
        let (queue, proxy) = one_message("orphan", kind);
        let running = running(behind(&proxy, &queue).shell(&format!("trap '' TERM HUP; {WAITS}")));
        stop(&running, Signal::SIGKILL).assert_status(137);
        assert_back(&queue);
    }
}

/// Ways to leave a process behind that isn't in the command's process group.
pub(super) const AWAY: [&str; 4] = [
    "setsid sh -c \"$LATER\" &",
    "timeout 1000 sh -c \"$LATER\" &",
    "set -m; sh -c \"$LATER\" &",
    "python3 -c 'import os, subprocess
subprocess.Popen([\"sh\", \"-c\", os.environ[\"LATER\"]], start_new_session=True)'",
];

#[test]
fn what_a_success_leaves_behind_may_finish_before_the_settlement() {
    if emulator_lacks("PR_SET_CHILD_SUBREAPER") {
        return;
    }
    for away in AWAY {
        let (queue, proxy) = one_message("finishes", QueueKind::Classic);
        let folder = owner::temp_folder("finishes");
        let running = behind(&proxy, &queue)
            .args(["--kill-after", "60s"])
            .env("LATER", "echo left; while [ ! -e go ]; do sleep 0.02; done; echo finished")
            .current_dir(&folder)
            .shell(away)
            .spawn();
        running.wait_for_stdout("left", PATIENCE);
        assert!(!running.has_ended());
        assert_eq!(proxy.count(Direction::ToBroker, Method::BASIC_ACK), 0);
        std::fs::write(folder.join("go"), "").unwrap();
        let finished = running.finish(PATIENCE);
        finished.assert_status(0);
        assert_eq!(finished.stdout_text(), "left\nfinished\n", "{away}");
        assert!(!finished.stderr.contains("warning"), "{}", finished.stderr);
        assert_gone(&queue);
    }
}

#[test]
fn a_file_that_is_compressed_on_the_side_is_whole() {
    let broker = Broker::shared();
    let queue = broker.queue("tee");
    let folder = owner::temp_folder("tee");
    for run in 0..10 {
        queue.publish(vec![b'x'; 3_000_000]);
        worker(&queue)
            .current_dir(&folder)
            .args(["--", "bash", "-c", "tee >(gzip >f) >/dev/null"])
            .run()
            .assert_status(0);
        let whole = Program::new("gzip").args(["-t", "f"]).current_dir(&folder);
        assert_eq!(whole.run().status(), 0, "run {run}");
    }
}

#[test]
fn what_a_success_leaves_too_long_is_killed_with_a_warning() {
    if emulator_lacks("PR_SET_CHILD_SUBREAPER") {
        return;
    }
    for away in AWAY.iter().chain(&["sh -c \"$LATER\" &"]) {
        let (queue, proxy) = one_message("too-long", QueueKind::Classic);
        let running = behind(&proxy, &queue)
            .args(["--kill-after", "500ms"])
            .env("LATER", "trap '' TERM HUP; sleep 1000 & sleep 1000")
            .shell(away)
            .spawn();
        let finished = running.finish(PATIENCE);
        finished
            .assert_status(0)
            // Their number depends on timing.
            .assert_stderr(" still running ")
            .assert_stderr("--kill-after");
        running.wait_no_leftovers(PROMPT);
        assert_settled(&proxy, Method::BASIC_ACK);
        assert_gone(&queue);
    }
}

#[test]
fn what_a_failure_leaves_is_killed_before_the_settlement() {
    if emulator_lacks("PR_SET_CHILD_SUBREAPER") {
        return;
    }
    // Also if a signal ends the command.
    for (end, status) in [("exit 5", 5), ("kill -KILL $$", 137)] {
        for away in AWAY.iter().chain(&["sh -c \"$LATER\" &"]) {
            let (queue, proxy) = one_message("background", QueueKind::Classic);
            proxy.once(Direction::ToBroker, Method::BASIC_REJECT, Action::Hold);
            // Processes that hold a pipe open are a classic reason to wait for ever.
            let running = behind(&proxy, &queue)
                .env("LATER", "trap '' TERM; echo left; sleep 1000 | sleep 1000")
                .args(["--kill-after", "600s"])
                .shell(&format!("{{ {away}\n}} >out; until [ -s out ]; do sleep 0.02; done; {end}"))
                .current_dir(owner::temp_folder("background"))
                .spawn();
            proxy.wait_for(Direction::ToBroker, Method::BASIC_REJECT);
            // Before the settlement, while qconsume still runs.
            running.wait_no_leftovers(PROMPT);
            assert!(!running.has_ended());
            proxy.release();
            running.finish(PATIENCE).assert_status(status);
        }
    }
}

/// An endless chain: each process starts its successor and exits, within milliseconds. If it escaped even the testbed,
/// it would end when its folder is deleted. Each link executes a new program, as mere forks are so fast that their
/// zombies use up all process ids.
const CHAIN: &str = "echo left; [ -e out ] && sh -c \"$CHAIN\" &";

#[test]
fn a_process_that_forks_for_its_life_does_not_escape() {
    if emulator_lacks("PR_SET_CHILD_SUBREAPER") {
        return;
    }
    // With a thousand other processes in /proc, and one processor for qconsume and the chain, reading /proc takes
    // longer than a process of the chain lives.
    let crowd = "for i in $(seq 1000); do sleep 1000 & done; echo running; wait";
    let _crowd = running(Program::new("sh").args(["-c", crowd]));
    let own_status = std::fs::read_to_string("/proc/self/status").unwrap();
    let (_, cpus) = own_status.split_once("Cpus_allowed_list:\t").unwrap();
    let cpu = cpus.split([',', '-', '\n']).next().unwrap();
    for (end, status) in [("exit 5", 5), ("exit 0", 0)] {
        let (queue, proxy) = one_message("forks", QueueKind::Classic);
        let folder = owner::temp_folder("forks");
        let running = behind(&proxy, &queue)
            .args(["--kill-after", "1s"])
            .env("CHAIN", CHAIN)
            .env("START", "echo $$ >group; exec sh -c \"$CHAIN\"")
            .shell(&format!("setsid sh -c \"$START\" >out & until [ -s out ]; do sleep 0.02; done; {end}"))
            .through(["taskset", "--cpu-list", cpu])
            .current_dir(&folder)
            .spawn();
        let finished = running.finish(PATIENCE);
        finished.assert_status(status);
        // The test can't read /proc fast enough either, so it asks the kernel for the process group.
        let group = std::fs::read_to_string(folder.join("group")).unwrap();
        let group = Pid::from_raw(group.trim().parse().unwrap());
        let is_gone = || killpg(group, None) == Err(Errno::ESRCH);
        assert!(eventually(PROMPT, is_gone), "a process of the chain has escaped");
        if status == 0 {
            finished.assert_stderr("--kill-after");
            assert_gone(&queue);
        } else {
            assert_back(&queue);
        }
    }
}

#[test]
fn orphans_are_reaped_however_many_end_at_once() {
    let (queue, proxy) = one_message("orphans", QueueKind::Classic);
    let crowd = "for i in $(seq 1000); do sleep 1000 & done; kill -KILL 0";
    // qconsume is the parent of the command and of the orphans; in the end, the command must be its only child.
    let children = "cat /proc/[0-9]*/stat 2>/dev/null | grep -c \") . $PPID \"";
    behind(&proxy, &queue)
        .env("CROWD", crowd)
        .shell(&format!("setsid -w sh -c \"$CROWD\"; until [ $({children}) = 1 ]; do sleep 0.02; done"))
        .run()
        .assert_status(0);
    assert_gone(&queue);
}

/// A worker whose command succeeds at once, and leaves this script behind in another session; it starts after the
/// command has ended.
fn left(worker: Program, script: &str) -> Program {
    let left = format!("while [ -e /proc/$LEADER ]; do sleep 0.02; done; {script}");
    worker.args(["--kill-after", "600s"]).env("LEFT", left).shell("LEADER=$$ setsid sh -c \"$LEFT\" & exit 0")
}

#[test]
fn a_stop_ends_what_a_success_has_left() {
    if emulator_lacks("PR_SET_CHILD_SUBREAPER") {
        return;
    }
    let (queue, proxy) = one_message("left-stop", QueueKind::Classic);
    let script = "trap 'echo got TERM; exit' TERM; echo running; while :; do sleep 0.02; done";
    let running = running(left(behind(&proxy, &queue), script));
    let finished = stop(&running, Signal::SIGTERM);
    finished.assert_status(0);
    assert_eq!(finished.stdout_text(), "running\ngot TERM\n");
    assert_settled(&proxy, Method::BASIC_ACK);
    assert_gone(&queue);
}

#[test]
fn a_delivery_lost_while_a_process_is_left_is_no_success() {
    if emulator_lacks("PR_SET_CHILD_SUBREAPER") {
        return;
    }
    let (queue, proxy) = one_message("left-lost", QueueKind::Classic);
    let running = running(left(behind(&proxy, &queue), WAITS));
    proxy.cut();
    running.finish(PATIENCE).assert_status(75);
    running.wait_no_leftovers(PROMPT);
    assert_back(&queue);
}

#[test]
fn children_from_before_the_command_are_left_alone() {
    // A shell starts a process and then becomes qconsume, which so has a child already; as PID 1 it may have others,
    // too.
    let (queue, proxy) = one_message("stranger", QueueKind::Classic);
    let script = "(sleep 1000; :) & exec \"$0\" \"$@\"";
    let running = behind(&proxy, &queue).shell("sleep 1000 & exit 3").through(["sh", "-c", script]).spawn();
    running.finish(PATIENCE).assert_status(3);
    // The subshell and its sleep.
    let both = || running.leftovers().len() == 2;
    assert!(eventually(PATIENCE, both), "{:?}", running.leftovers());
    assert_back(&queue);
    // A success doesn't wait for it either.
    queue.publish("the message");
    let running =
        behind(&proxy, &queue).args(["--kill-after", "600s"]).shell("exit 0").through(["sh", "-c", script]).spawn();
    running.finish(PATIENCE).assert_status(0);
}

#[test]
fn a_child_that_holds_stdin_open_holds_nothing_up() {
    if emulator_lacks("PR_SET_CHILD_SUBREAPER") {
        return;
    }
    // The body is in a file. The child holds it as descriptor 3, as the shell redirects a background process's standard
    // input from /dev/null.
    let broker = Broker::shared();
    for detach in ["", "setsid "] {
        let queue = broker.queue("stdin-held");
        queue.publish(vec![b'x'; 3_000_000]);
        let started = owner::temp_folder("stdin-held").join("started");
        let running = worker(&queue)
            .args(["--kill-after", "200ms"])
            .env("STARTED", &started)
            .shell(&format!(
                "exec 3<&0; {detach}sh -c 'echo >$STARTED; exec sleep 1000' &
                while [ ! -s $STARTED ]; do sleep 0.02; done; head -c 10 >/dev/null; exit 0"
            ))
            .spawn();
        let finished = running.finish(PATIENCE);
        finished.assert_status(0).assert_stderr("1 process left by the command");
        assert_gone(&queue);
        running.wait_no_leftovers(PROMPT);
    }
}

#[test]
fn the_command_gets_an_empty_termination_log_variable() {
    let (queue, proxy) = one_message("termination", QueueKind::Classic);
    let finished = behind(&proxy, &queue)
        .env("QCONSUME_TERMINATION_LOG", "/dev/null")
        .shell("echo \"<${QCONSUME_TERMINATION_LOG-unset}>\"")
        .run();
    finished.assert_status(0);
    assert_eq!(finished.stdout_text(), "<>\n");
}

#[test]
fn nohup_keeps_a_hangup_from_qconsume() {
    if emulator_lacks("signals in /proc/self/status as they are") {
        return;
    }
    let broker = Broker::shared();
    let queue = broker.queue("nohup");
    let running = worker(&queue).through(["nohup"]).shell("exit 6").spawn();
    queue.wait_consumers(1);
    running.signal(Signal::SIGHUP);
    queue.publish("the message");
    running.wait(PATIENCE).assert_status(6);
    assert_back(&queue);
}

#[test]
fn signals_that_are_ignored_at_the_start_stay_ignored() {
    if emulator_lacks("signals in /proc/self/status as they are") {
        return;
    }
    let broker = Broker::shared();
    let queue = broker.queue("ignored");
    let running = worker(&queue).through(["env", "--ignore-signal=INT,QUIT,HUP"]).shell("exit 6").spawn();
    queue.wait_consumers(1);
    for signal in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP] {
        running.signal(signal);
    }
    queue.publish("the message");
    running.wait(PATIENCE).assert_status(6);
    assert_back(&queue);
}
