//! qconsume on a terminal.

use super::{states::late_confirmation, *};
use crate::common::terminal::Terminal;
use std::sync::atomic::Ordering::Relaxed;
use testbed::owner;

const CTRL_C: &str = "\x03";
const CTRL_Z: &str = "\x1a";

/// Starts the worker as the session's leader, or `through` with the worker's command line as its last arguments.
fn start(queue: &Queue, proxy: &Proxy, through: &[&str], arguments: &[&str]) -> Terminal {
    start_at(&proxy.url(), queue.name(), through, arguments)
}

fn start_at(url: &str, queue: &str, through: &[&str], arguments: &[&str]) -> Terminal {
    let qconsume = crate::common::qconsume_path();
    let words = [through, &[qconsume.to_str().unwrap()], arguments].concat();
    Terminal::start(&words, &[("BROKER_URL", url), ("QUEUE", queue)])
}

/// Waits until qconsume has noticed the command's start and sleeps. Before that, qconsume forwards even a terminal's
/// signals, as they may be older than the command, which so may get them twice.
const NOTICED: &str = "until grep -q ') S' /proc/$PPID/stat; do sleep 0.01; done";

/// Counts its interrupts, for half a second after the first.
const COUNTS: &str = "n=0; trap 'n=$((n+1))' INT; echo run''ning; while [ $n = 0 ]; do sleep 0.05; done
    for i in 1 2 3 4 5; do sleep 0.1; done; echo interrupted $n time; exit 5";

#[test]
fn ctrl_c_interrupts_the_command_only_once() {
    let counts = format!("{NOTICED}; {COUNTS}");
    for (script, status) in [("echo run''ning; exec sleep 1000", 130), (&counts, 5)] {
        let (queue, proxy) = one_message("terminal", QueueKind::Classic);
        let mut terminal = start(&queue, &proxy, &[], &["sh", "-c", script]);
        terminal.wait_for("running");
        terminal.press(CTRL_C);
        if status == 5 {
            terminal.wait_for("interrupted 1 time");
        }
        assert_eq!(terminal.wait_end().code(), Some(status));
        assert_settled(&proxy, Method::BASIC_NACK);
        assert_back(&queue);
    }
}

#[test]
fn a_command_can_read_from_the_terminal() {
    let (queue, proxy) = one_message("terminal-read", QueueKind::Classic);
    let script = "stty -echo </dev/tty; echo pass''word:; read x </dev/tty; stty echo </dev/tty; echo \"<$x>\"";
    let mut terminal = start(&queue, &proxy, &[], &["sh", "-c", script]);
    terminal.wait_for("password:");
    terminal.press("secret\r");
    terminal.wait_for("<secret>");
    assert_eq!(terminal.wait_end().code(), Some(0));
    assert_gone(&queue);
}

#[test]
fn a_signal_that_is_not_the_terminals_is_forwarded() {
    for signal in [Signal::SIGTERM, Signal::SIGHUP] {
        let (queue, proxy) = one_message("terminal-kill", QueueKind::Classic);
        // The command's child gets the signal, too, as it would in a process group of the command.
        let script = "trap 'wait; exit 9' TERM HUP
            sh -c 'trap \"echo chi\"\"ld got it; exit\" TERM HUP; echo run\"\"ning
            while :; do sleep 0.02; done' & wait";
        let mut terminal = start(&queue, &proxy, &[], &["sh", "-c", script]);
        terminal.wait_for("running");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(terminal.leader.pid()), signal).unwrap();
        assert_eq!(terminal.wait_end().code(), Some(9));
        assert_back(&queue);
    }
}

#[test]
fn a_hang_up_reaches_the_command() {
    // The kernel sends SIGHUP only to the session's leader: qconsume, or a shell, at whose exit all others get it.
    for through in [&[][..], &["sh", "-c", "\"$0\" \"$@\"; exit"]] {
        let (queue, proxy) = one_message("terminal-hang-up", QueueKind::Classic);
        let folder = owner::temp_folder("hang-up");
        let counts = COUNTS.replace("INT", "HUP").replace("exit 5", "echo $n >$0/hang-ups; exit 7");
        let script = format!("{NOTICED}; {counts}");
        let mut terminal = start(&queue, &proxy, through, &["sh", "-c", &script, folder.to_str().unwrap()]);
        terminal.wait_for("running");
        let mut leader = terminal.hang_up();
        let status = leader.wait_end("");
        assert_eq!(status.code(), through.is_empty().then_some(7));
        assert_back(&queue);
        assert_settled(&proxy, Method::BASIC_NACK);
        assert_eq!(std::fs::read_to_string(folder.join("hang-ups")).unwrap(), "1\n");
    }
}

#[test]
fn ctrl_c_reaches_a_command_that_has_left_the_terminals_group() {
    let (queue, proxy) = one_message("terminal-left", QueueKind::Classic);
    // timeout(1) makes a process group of its own, which is not the foreground group.
    let script = "echo run''ning; exec sleep 1000";
    let mut terminal = start(&queue, &proxy, &[], &["timeout", "1000", "sh", "-c", script]);
    terminal.wait_for("running");
    // Before that, the key counts as older than the command.
    let stat = format!("/proc/{}/stat", terminal.leader.pid());
    assert!(eventually(PATIENCE, || std::fs::read_to_string(&stat).unwrap().contains(") S")), "it doesn't wait");
    terminal.press(CTRL_C);
    assert_eq!(terminal.wait_end().code(), Some(130));
    assert_back(&queue);
    assert_settled(&proxy, Method::BASIC_NACK);
}

#[test]
fn ctrl_c_interrupts_what_a_success_has_left_only_once() {
    if emulator_lacks("PR_SET_CHILD_SUBREAPER") {
        return;
    }
    let (queue, proxy) = one_message("terminal-after", QueueKind::Classic);
    // One is in a session of its own, the other one in the terminal's foreground group. A shell starts background
    // processes with SIGINT ignored.
    let counts = COUNTS.replace("run''ning", "$1 run''ning").replace("interrupted", "$1 interrupted");
    let left = format!("while [ -e /proc/$LEADER ]; do sleep 0.02; done; {counts}");
    let script = "export LEADER=$$; setsid -f sh -c \"$0\" sh elsewhere
        env --default-signal=INT sh -c \"$0\" sh here & exit 0";
    let arguments = ["--kill-after", "600s", "sh", "-c", script, &left];
    let mut terminal = start(&queue, &proxy, &[], &arguments);
    for _ in 0..2 {
        terminal.wait_for(" running");
    }
    terminal.press(CTRL_C);
    // The terminal shows the key as "^C".
    let mut interrupted: Vec<String> = (0..2)
        .map(|_| terminal.wait_for(" interrupted 1 time").lines().last().unwrap().trim_start_matches("^C").to_owned())
        .collect();
    interrupted.sort();
    assert_eq!(interrupted, ["elsewhere", "here"]);
    // Not "after qconsume received SIGINT": the signal came after the success.
    terminal.wait_for("command succeeded; message acknowledged");
    assert_eq!(terminal.wait_end().code(), Some(0));
    assert_gone(&queue);
}

#[test]
fn ctrl_z_stops_both_and_fg_continues_both() {
    let (queue, proxy) = one_message("terminal-stop", QueueKind::Classic);
    // A shell with job control.
    let shell = ["bash", "--norc", "-ic", "\"$0\" \"$@\"; echo stop''ped; fg; echo status $?"];
    let script = "trap 'echo con''tinued; exit 4' CONT; echo run''ning; while :; do sleep 0.05; done";
    let mut terminal = start(&queue, &proxy, &shell, &["sh", "-c", script]);
    terminal.wait_for("running");
    terminal.press(CTRL_Z);
    terminal.wait_for("stopped");
    terminal.wait_for("continued");
    terminal.wait_for("status 4");
    terminal.wait_end();
    assert_back(&queue);
}

#[test]
fn ctrl_c_between_the_message_and_the_command_starts_none() {
    let (peer, answer) = late_confirmation();
    let arguments = ["--no-ack", "sh", "-c", "echo started; sleep 600"];
    let mut terminal = start_at(&peer.url(), "q", &[], &arguments);
    assert!(eventually(PATIENCE, || peer.count(Method::BASIC_QOS) == 2));
    terminal.press(CTRL_C);
    answer.store(true, Relaxed);
    terminal.wait_for("stopped by SIGINT before the command was started");
    assert_eq!(terminal.wait_end().code(), Some(130));
}
