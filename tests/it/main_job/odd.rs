//! Unusual environments of a worker, and unusual commands.

use super::{assert_gone, assert_returned, queues, worker};
use crate::common::{qconsume, qconsume_path};
use std::{fs, os::unix::fs::PermissionsExt};
use testbed::{
    BasicProperties, Broker, PATIENCE, emulator_lacks, missing,
    owner::temp_folder,
    types::{AMQPValue, FieldTable},
};

#[test]
fn closed_standard_streams_change_nothing() {
    let queue = Broker::shared().queue("closed-streams");
    for close in ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"] {
        let folder = temp_folder("closed");
        let own = folder.join("body");
        let script = format!("exec {close}; exec \"$0\" --wait 10s sh -c 'cat >\"$1\"' sh \"$1\"");
        let start = || {
            testbed::Program::new("/bin/sh")
                .url(&Broker::shared().url())
                .queue(queue.name())
                .args(["-c", &script])
                .arg(qconsume_path())
                .arg(&own)
        };
        queue.publish("apple");
        start().run().assert_status(0);
        assert_eq!(fs::read(&own).unwrap(), b"apple", "{close}");
    }
    // Nobody reads its standard error.
    queue.publish("banana");
    let script = "{ \"$0\" sh -c 'cat >/dev/null; exit 4'; echo $? >\"$1\"; } 2>&1 | true";
    let status = temp_folder("pipe").join("status");
    testbed::Program::new("/bin/bash")
        .url(&Broker::shared().url())
        .queue(queue.name())
        .args(["-c", script])
        .arg(qconsume_path())
        .arg(&status)
        .run();
    assert_eq!(fs::read_to_string(&status).unwrap(), "4\n");
    assert_returned(&queue, "banana");
}

#[test]
fn without_path_commands_are_found_where_execvp_looks() {
    let queue = Broker::shared().queue("path");
    queue.publish("cherry");
    worker(&queue).env_remove("PATH").arg("cat").run().assert_status(0);
    worker(&queue).env("PATH", "").arg("cat").run().assert_status(127);
    worker(&queue).env("PATH", "/no/such/folder").arg("cat").run().assert_status(127);
    queue.publish("date");
    let done = worker(&queue).env("PATH", "").current_dir("/bin").arg("cat").run();
    done.assert_status(0);
    assert_eq!(done.stdout_text(), "date");
}

#[test]
fn blocked_and_ignored_signals_are_not_passed_on_to_the_command() {
    if emulator_lacks("signals in /proc/self/status as they are") {
        return;
    }
    if testbed::owner::find_in_path("python3").is_none() {
        return missing("python3");
    }
    let queue = Broker::shared().queue("signal-mask");
    for before in [
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))",
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
        "[signal.signal(s, signal.SIG_IGN) for s in (1, 2, 3, 13, 15, 17)]",
    ] {
        queue.publish("elderberry");
        let python = format!("import os, signal, sys; {before}; os.execv(sys.argv[1], sys.argv[1:])");
        let done = worker(&queue)
            .through(["python3", "-c", &python])
            .args(["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"])
            .run();
        done.assert_status(0);
        assert_eq!(done.stdout_text(), "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n", "{before}");
    }
    assert_gone(&queue);
}

#[test]
fn a_file_that_the_kernel_cannot_execute_releases_the_message() {
    // glibc's execvp(3) runs such a file with sh, as env(1) and timeout(1) do; musl's, in the released program,
    // doesn't.
    let has_glibc = fs::read(qconsume_path()).unwrap().windows(13).any(|bytes| bytes == b"GNU C Library");
    let folder = temp_folder("formats");
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    };
    // The header of a program for AArch64, a script without a #! line, and an empty file.
    let foreign = file("foreign", b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\xfd\xff\x01\0\0\0");
    let bare = file("bare", b"cat\nexit 0\n");
    let empty = file("empty", b"");
    for queue in queues("formats") {
        for path in [&foreign, &bare, &empty] {
            queue.publish("fig");
            let done = worker(&queue).arg(path).run();
            if has_glibc {
                done.assert_status(testbed::Program::new("env").arg(path).run().status());
                continue;
            }
            done.assert_status(126)
                .assert_stderr("built for another machine, or a script without a #! line")
                .assert_stderr("message released");
            assert_returned(&queue, "fig");
        }
    }
}

#[test]
fn too_long_an_argument_list_releases_the_message() {
    let queue = Broker::shared().queue("too-long");
    let mut headers = FieldTable::default();
    headers.insert("long".into(), AMQPValue::LongString("h".repeat(100_000).into()));
    let properties = BasicProperties::default().with_headers(headers);
    queue.publish_with(properties, "grape");
    // Arguments and environment may take a quarter of the stack: 256 KiB, of which the arguments take about 200.
    let long = "a".repeat(100_000);
    worker(&queue)
        .through(["sh", "-c", "ulimit -s 1024; exec \"$0\" \"$@\""])
        .args(["true", &long, &long])
        .run()
        .assert_status(126)
        .assert_stderr("arguments and environment are too long");
    assert_returned(&queue, "grape");
}

#[test]
fn a_large_body_that_nobody_reads_does_not_outlive_its_command() {
    if emulator_lacks("PR_SET_CHILD_SUBREAPER") {
        return;
    }
    let queue = Broker::shared().queue("background");
    let body = super::binary(4 * super::MEBIBYTE);
    queue.publish(&body);
    // A process that the command leaves behind holds standard input open without reading it: as descriptor 3, since the
    // shell redirects a background process's standard input from /dev/null.
    let running = worker(&queue).args(["--kill-after", "100ms"]).shell("exec 3<&0; sleep 1000 & exit 0").spawn();
    running.finish(PATIENCE).assert_status(0);
    running.wait_no_leftovers(PATIENCE);
    // The same with a process in another session. Nor does qconsume keep the body, or descriptors of it, when it goes
    // on with the next message.
    queue.publish_all([&body, &body, &body]);
    let away = temp_folder("away");
    let script = "exec 3<&0; setsid sh -c 'echo >away; exec sleep 1000' &
        until [ -s away ]; do sleep 0.02; done; rm away
        while ls -l /proc/$PPID/fd | grep -q memfd:message; do sleep 0.02; done
        set -- /proc/$PPID/fd/*; echo $#";
    let running =
        worker(&queue).args(["--count", "3", "--kill-after", "100ms"]).shell(script).current_dir(&away).spawn();
    let done = running.finish(PATIENCE);
    done.assert_status(0);
    let text = done.stdout_text();
    let descriptors: Vec<&str> = text.lines().collect();
    assert_eq!(descriptors.len(), 3);
    assert!(descriptors.iter().all(|n| *n == descriptors[0]), "{text}");
    assert_gone(&queue);
}

#[test]
fn a_command_that_closes_its_input_and_goes_on_is_waited_for() {
    let queue = Broker::shared().queue("goes-on");
    queue.publish(super::binary(super::MEBIBYTE * 2));
    let done = worker(&queue)
        .shell("exec <&-; i=0; while [ $i -lt 20 ]; do i=$((i + 1)); sleep 0.02; done; echo done; exit 7")
        .run();
    done.assert_status(7);
    assert_eq!(done.stdout_text(), "done\n");
}

#[test]
fn odd_names_of_queues_work() {
    for name in ["with blank", "ümläut-✓", "a/b?c#d%e", "-q", "quote'\"s", &"x".repeat(240)] {
        let name = format!("{name}-{}", std::process::id());
        let queue = Broker::shared().declare("").exact_name(&name).create();
        queue.publish("honeydew");
        let done = qconsume()
            .url(&Broker::shared().url())
            .queue(&name)
            .args(["--", "sh", "-c", "printf %s \"$MESSAGE_QUEUE\""])
            .run();
        done.assert_status(0);
        assert_eq!(done.stdout_text(), name);
    }
}
