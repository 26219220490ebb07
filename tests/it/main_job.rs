//! One message, one command, one status.

mod configuration;
mod exit_zero;
mod input;
mod look_up;
mod odd;
mod refused;
mod settlement;
mod static_binary;

use crate::common::{assert_gone, assert_returned, behind, queues, worker};
use testbed::{Broker, Program, QueueKind, emulator_lacks, owner::temp_folder};

/// Pseudo-random bytes. A repeating pattern could hide that a frame or a buffer was lost.
fn binary(size: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

const MEBIBYTE: usize = 1024 * 1024;

#[test]
fn a_command_that_succeeds_gets_the_message_and_has_it_acknowledged() {
    for queue in queues("success") {
        queue.publish("apple");
        let done = worker(&queue).shell("cat; echo to stderr >&2").run();
        done.assert_status(0).assert_stderr("to stderr\n");
        assert_eq!(done.stdout_text(), "apple");
        assert_gone(&queue);
    }
}

#[test]
fn a_command_that_fails_gives_its_status_and_the_message_comes_back() {
    for queue in queues("failure") {
        for status in [1, 3, 64, 75, 127, 255] {
            queue.publish("banana");
            let done = worker(&queue).shell(&format!("cat; exit {status}")).run();
            done.assert_status(status).assert_stderr(&format!("command exited with status {status}"));
            assert_eq!(done.stdout_text(), "banana");
            assert_returned(&queue, "banana");
        }
    }
}

#[test]
fn a_command_that_dies_of_a_signal_gives_128_and_the_signal_and_the_message_comes_back() {
    for queue in queues("killed") {
        for (signal, status) in [("KILL", 137), ("TERM", 143), ("SEGV", 139), ("RTMIN", 162)] {
            if signal == "RTMIN" && emulator_lacks("the first real-time signals") {
                continue;
            }
            queue.publish("cherry");
            worker(&queue)
                .args(["--", "bash", "-c", &format!("ulimit -c 0; kill -{signal} $$")])
                .run()
                .assert_status(status)
                .assert_stderr("command was killed by ");
            assert_returned(&queue, "cherry");
        }
    }
}

#[test]
fn a_body_of_12_mebibytes_arrives_byte_for_byte() {
    let body = binary(12 * MEBIBYTE);
    let expected = Program::new("/usr/bin/sha256sum").stdin(body.clone()).run();
    for queue in queues("large") {
        queue.publish(&body);
        let done = worker(&queue).arg("sha256sum").run();
        done.assert_status(0);
        assert_eq!(done.stdout_text(), expected.stdout_text());
        assert_gone(&queue);
    }
}

#[test]
fn bodies_of_every_size_arrive_byte_for_byte() {
    let queue = Broker::shared().queue("sizes");
    // Around the capacities of a pipe (64 KiB, or 1 MiB if set) and of a frame (128 KiB less 8 bytes of framing).
    let edges = [65_536, 131_064, 131_072, MEBIBYTE, 2 * MEBIBYTE];
    let around = |size| [size - 1, size, size + 1];
    for size in [0, 1].into_iter().chain(edges.into_iter().flat_map(around)) {
        let body = binary(size);
        queue.publish(&body);
        let done = worker(&queue).arg("cat").run();
        done.assert_status(0);
        assert!(done.stdout == body, "{size} bytes arrived as {}", done.stdout.len());
    }
    let nuls = [b"\0a\0\0b\n\r\0\xff\xfe".as_slice(), &[0; 100_000]].concat();
    queue.publish(&nuls);
    let done = worker(&queue).arg("cat").run();
    done.assert_status(0);
    assert!(done.stdout == nuls);
    assert_gone(&queue);
}

#[test]
fn the_command_sees_an_empty_body_as_the_end_of_its_input() {
    for queue in queues("empty-body") {
        queue.publish("");
        let done = worker(&queue).shell("wc -c").run();
        done.assert_status(0);
        assert_eq!(done.stdout_text().trim(), "0");
        assert_gone(&queue);
    }
}

#[test]
fn a_command_that_does_not_read_the_body_succeeds_or_fails_by_its_status() {
    let body = binary(12 * MEBIBYTE);
    for queue in queues("unread") {
        for script in ["exit 0", "exec <&-; exit 0", "head -c 10 >/dev/null"] {
            queue.publish(&body);
            worker(&queue).shell(script).run().assert_status(0);
            assert_gone(&queue);
        }
        queue.publish(&body);
        worker(&queue).shell("exit 5").run().assert_status(5);
        assert_returned(&queue, &body);
    }
}

#[test]
fn a_command_that_cannot_be_executed_is_noticed_before_the_broker_is_touched() {
    use std::{fs, os::unix::fs::PermissionsExt};
    let broker = Broker::shared();
    let proxy = testbed::Proxy::of(broker);
    let folder = temp_folder("commands");
    let file = |name: &str, text: &str, mode| {
        let path = folder.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path.into_os_string().into_string().unwrap()
    };
    let plain = file("plain", "#!/bin/sh\n", 0o644);
    let lost = file("lost", "#!/no/such/interpreter\n", 0o755);
    let env = file("env", "#!/usr/bin/env no-such-program\n", 0o755);
    let env_s = file("env-s", "#!/usr/bin/env -S A=b no-such-program -u\n", 0o755);
    let env_plain = file("env-plain", &format!("#!/usr/bin/env {plain}\n"), 0o755);
    let windows = file("windows", "#!/bin/sh\r\nexit 0\r\n", 0o755);
    let folder_itself = folder.to_str().unwrap().to_owned();
    for queue in queues("untouched") {
        queue.publish("date");
        for (command, status, says) in [
            ("no-such-command", 127, "command not found: no-such-command"),
            ("/no/such/file", 127, "command not found: no file /no/such/file"),
            ("", 127, "empty word"),
            (&plain, 126, "set its execute bit (chmod +x)"),
            (&folder_itself, 126, "is a folder"),
            (&lost, 127, "/no/such/interpreter, which isn't there"),
            (&env, 127, "env for no-such-program, which is in none of the folders of PATH"),
            (&env_s, 127, "env for no-such-program, which is in none of the folders of PATH"),
            (&env_plain, 126, "plain, which can't be executed: set its execute bit"),
            (&windows, 127, "Windows line ends"),
        ] {
            behind(&proxy, &queue).args(["--", command]).run().assert_status(status).assert_stderr(says);
        }
        assert_eq!(proxy.accepted(), 0, "qconsume connected to the broker");
        let got = queue.get().expect("the message is still there");
        assert!(!got.redelivered, "the message was taken");
        assert_eq!(got.delivery_count().unwrap_or(0), 0);
    }
}

#[test]
fn the_next_message_after_a_success_is_untouched() {
    for queue in queues("next") {
        for round in 0..20 {
            queue.publish_all(["first", "second"]);
            let done = worker(&queue).arg("cat").run();
            done.assert_status(0);
            assert_eq!(done.stdout_text(), "first");
            let next = queue.wait_get();
            assert_eq!(next.text(), "second");
            assert!(!next.redelivered, "round {round}: it was pushed to a worker that exited");
            assert_eq!(next.delivery_count().unwrap_or(0), 0, "round {round}");
        }
    }
}

#[test]
fn the_next_message_after_a_failure_is_untouched() {
    for queue in queues("next-failure") {
        for round in 0..5 {
            queue.publish_all(["first", "second"]);
            worker(&queue).shell("exit 1").run().assert_status(1);
            let mut both = [queue.wait_get(), queue.wait_get()];
            both.sort_by_key(testbed::Got::text);
            let [first, second] = both;
            assert_eq!((first.text(), second.text()), ("first".into(), "second".into()));
            assert!(first.redelivered);
            assert!(!second.redelivered, "round {round}: it was pushed to a worker that exited");
        }
    }
}

#[test]
fn a_message_that_comes_later_is_waited_for() {
    for queue in queues("later") {
        let running = worker(&queue).args(["--", "cat"]).spawn();
        queue.wait_consumers(1);
        queue.publish("elderberry");
        let done = running.wait(testbed::PATIENCE);
        done.assert_status(0);
        assert_eq!(done.stdout_text(), "elderberry");
    }
}

#[test]
fn no_message_within_the_wait_is_66_or_what_was_asked_for() {
    let queue = Broker::shared().queue("wait");
    let done = worker(&queue).args(["--wait", "1s", "cat"]).run();
    done.assert_status(66).assert_stderr("within 1s (--wait)");
    assert!(done.wall.as_secs_f64() >= 1.0, "gave up after {:?}", done.wall);
    for (arguments, status) in [(["--empty-exit-code", "0"], 0), (["--empty-exit-code", "42"], 42)] {
        let done = worker(&queue).env("QCONSUME_WAIT", "100ms").args(arguments).shell("echo ran").run();
        done.assert_status(status);
        assert!(done.stdout.is_empty(), "the command ran without a message");
    }
    queue.publish("fig");
    let done = worker(&queue).args(["-w", "0", "cat"]).run();
    done.assert_status(0);
    assert_eq!(done.stdout_text(), "fig");
}

#[test]
fn a_broker_that_goes_and_comes_back_while_qconsume_waits_is_waited_for() {
    let broker = Broker::start();
    let queues = QueueKind::ALL.map(|kind| broker.declare("restart").kind(kind).create());
    let waiting: Vec<_> = queues
        .iter()
        .map(|queue| {
            let running = worker(queue).args(["--connect-timeout", "5m", "--", "cat"]).spawn();
            queue.wait_consumers(1);
            running
        })
        .collect();
    broker.client().disconnect();
    broker.restart().unwrap();
    for (queue, running) in queues.iter().zip(waiting) {
        running.wait_for_stderr("while waiting for a message", testbed::PATIENCE);
        queue.publish("grape");
        let done = running.wait(testbed::PATIENCE);
        done.assert_status(0);
        assert_eq!(done.stdout_text(), "grape");
    }
}

#[test]
fn a_command_never_runs_on_a_part_of_a_body() {
    use testbed::{Action, Direction::ToClient, Method, PATIENCE, Proxy};
    let body = binary(MEBIBYTE);
    let whole = Program::new("/usr/bin/sha256sum").stdin(body.clone()).run();
    for queue in queues("truncated") {
        queue.publish(&body);
        let proxy = Proxy::of(Broker::shared());
        // The connection is cut after the content header and the first of about eight body frames.
        proxy.once(ToClient, Method::BODY, Action::CutAfter);
        let running = behind(&proxy, &queue).args(["--", "sha256sum"]).spawn();
        proxy.wait_accepted(2);
        let done = running.wait(PATIENCE);
        done.assert_status(0);
        assert_eq!(done.stdout_text(), whole.stdout_text());
        assert_gone(&queue);
    }
}
