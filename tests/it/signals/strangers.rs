//! Strangers: children of qconsume that the command didn't start, beside processes that it did.

use super::{process::AWAY, *};
use std::{fs, os::unix::fs::PermissionsExt, path::Path};
use testbed::{missing, owner};

/// Ways in which a shell may start a stranger before it becomes qconsume: in its own group, in another, in another
/// session.
const STRANGERS: [&str; 3] = [
    "sh -c \"$STRANGER\" & exec \"$0\" \"$@\"",
    // With job control, the shell starts it in another group.
    "set -m; sh -c \"$STRANGER\" & set +m; exec \"$0\" \"$@\"",
    "setsid sh -c \"$STRANGER\" & exec \"$0\" \"$@\"",
];

/// Leaves an orphan behind when the file `go` appears. The inner shell exits, so the orphan's parent is gone.
const STRANGER: &str = "echo >before; until [ -e go ]; do sleep 0.02; done; sh -c 'sleep 1000 & echo $! >orphan'";

/// Makes the stranger leave its orphan behind, and waits for it.
const LEAVE: &str = "touch go; until [ -s orphan ]; do sleep 0.02; done";

/// Waits until qconsume, the parent of this shell, has adopted the orphan.
const ADOPTED: &str = "until grep -q \") . $PPID \" /proc/$(cat orphan)/stat; do sleep 0.02; done";

/// Starts the program through a shell that starts a stranger before.
fn beside_stranger(program: Program, how: &str, folder: &Path) -> Program {
    program.through(["bash", "-c", how]).env("STRANGER", STRANGER).current_dir(folder)
}

/// Whether the process whose id is in this file still runs. A zombie has no command line.
fn is_there(number: &Path) -> bool {
    let pid = fs::read_to_string(number).unwrap();
    fs::read(format!("/proc/{}/cmdline", pid.trim())).is_ok_and(|line| !line.is_empty())
}

fn wait_for_stranger(folder: &Path) {
    assert!(eventually(PATIENCE, || folder.join("before").exists()));
}

#[test]
fn a_strangers_orphan_is_not_killed_with_the_command() {
    let broker = Broker::shared();
    for how in STRANGERS {
        for (end, status) in [("exit 0", 0), ("exit 3", 3)] {
            let queue = broker.queue("strangers");
            let folder = owner::temp_folder("strangers");
            let script = format!("{LEAVE}; {ADOPTED}; {end}");
            let worker = worker(&queue).args(["--kill-after", "600s"]).shell(&script);
            let running = beside_stranger(worker, how, &folder).spawn();
            wait_for_stranger(&folder);
            queue.publish(MESSAGE);
            let finished = running.finish(PATIENCE);
            finished.assert_status(status);
            assert!(is_there(&folder.join("orphan")), "{how}: the orphan was killed:\n{}", finished.stderr);
            if status == 0 {
                assert_gone(&queue);
            } else {
                assert_back(&queue);
            }
        }
    }
}

#[test]
fn a_strangers_orphan_outlives_tini_and_amqp_consume_too() {
    let broker = Broker::shared();
    for (name, program) in [
        ("tini", Program::new("tini").args(["-s", "--"])),
        ("amqp-consume", Program::new("amqp-consume").args(["-u", &broker.url(), "-c", "1", "-q"])),
    ] {
        if owner::find_in_path(name).is_none() {
            missing(name);
            continue;
        }
        for how in STRANGERS {
            let queue = broker.queue("strangers-of-others");
            let folder = owner::temp_folder("strangers-of-others");
            // amqp-consume parses a command's options as its own, so this command has none.
            let script = folder.join("script");
            fs::write(&script, format!("#!/bin/sh\n{LEAVE}\n")).unwrap();
            fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
            let program = if name == "tini" { program.clone() } else { program.clone().arg(queue.name()) };
            let program = program.arg(&script);
            queue.publish(MESSAGE);
            let running = beside_stranger(program, how, &folder).spawn();
            running.finish(PATIENCE).assert_status(0);
            assert!(is_there(&folder.join("orphan")), "{name}, {how}");
        }
    }
}

#[test]
fn the_commands_orphans_are_told_from_strangers_orphans() {
    let broker = Broker::shared();
    for how in STRANGERS {
        // The last two are double forks, whose parents are gone already.
        for away in AWAY.iter().chain(&["(setsid sh -c \"$LATER\" &)", "setsid sh -c '(sh -c \"$LATER\" &)'"]) {
            for (end, status) in [("exit 5", 5), ("exit 0", 0)] {
                let queue = broker.queue("found");
                let folder = owner::temp_folder("found");
                let script = format!("{LEAVE}; {ADOPTED}\n{away}\nuntil [ -s left ]; do sleep 0.02; done; {end}");
                let worker = worker(&queue)
                    .args(["--kill-after", "200ms"])
                    .env("LATER", "trap '' TERM HUP; echo $$ >left; while :; do sleep 0.02; done")
                    .shell(&script);
                let running = beside_stranger(worker, how, &folder).spawn();
                wait_for_stranger(&folder);
                queue.publish(MESSAGE);
                let finished = running.finish(PATIENCE);
                finished.assert_status(status);
                if status == 0 {
                    finished.assert_stderr("--kill-after");
                }
                assert!(!is_there(&folder.join("left")), "{how}, {away}: the command's process has escaped");
                assert!(is_there(&folder.join("orphan")), "{how}, {away}: the stranger's orphan was killed");
            }
        }
    }
}
