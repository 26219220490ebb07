//! Log lines, the last line of a run, and the termination message.

use crate::common::{private_broker, qconsume, qpublish, worker};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};
use testbed::{
    BasicProperties, Broker, Finished, PATIENCE, Program, Proxy, Queue, Signal, missing, owner::temp_folder,
};

/// In bytes: what Kubernetes keeps of a termination message.
const TERMINATION_MESSAGE_MAX: usize = 4096;

/// An empty file, as Kubernetes makes one for the termination message.
fn empty_file() -> PathBuf {
    let path = temp_folder("report").join("termination");
    fs::write(&path, "").expect("the temporary folder can be written to");
    path
}

fn read(file: &Path) -> String {
    fs::read_to_string(file).expect("the file can be read")
}

/// A queue with one message that has an id.
fn queue_with_order_7(name: &str) -> Queue {
    let queue = Broker::shared().queue(name);
    queue.publish_with(BasicProperties::default().with_message_id("order-7".into()), "apple");
    queue
}

/// qconsume's lines; the commands in these tests write none.
fn lines(run: &Finished) -> Vec<&str> {
    run.stderr.lines().collect()
}

fn last(run: &Finished) -> &str {
    run.stderr.lines().last().unwrap_or_default()
}

fn objects(run: &Finished) -> Vec<serde_json::Map<String, serde_json::Value>> {
    lines(run)
        .into_iter()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line:?} is no JSON object: {error}")))
        .collect()
}

#[track_caller]
fn assert_contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
}

#[test]
fn a_run_that_succeeds_says_two_lines() {
    let run = worker(&queue_with_order_7("report-two")).shell("cat >/dev/null").run();
    run.assert_status(0);
    let lines = lines(&run);
    assert_eq!(lines.len(), 2, "{}", run.stderr);
    assert_contains(lines[0], &["qconsume: message taken", "id=\"order-7\"", "attempt=1", "size=5"]);
    assert_contains(
        lines[1],
        &[
            "qconsume: command succeeded; message acknowledged",
            "id=\"order-7\"",
            "attempt=1",
            "size=5",
            "seconds=",
            "status=0",
            "source=\"command\"",
        ],
    );
    assert!(run.stdout.is_empty(), "only the command may write to standard output");
}

#[test]
fn at_level_error_success_is_silent_and_failure_says_one_line() {
    let queue = queue_with_order_7("report-quiet");
    let failed = worker(&queue).args(["--log-level", "error"]).shell("exit 3").run();
    failed.assert_status(3);
    assert_eq!(lines(&failed).len(), 1, "{}", failed.stderr);
    let succeeded = worker(&queue).env("QCONSUME_LOG", "error").shell("exit 0").run();
    succeeded.assert_status(0);
    assert_eq!(succeeded.stderr, "");
}

#[test]
fn the_last_line_of_a_failed_run_says_why_and_what_became_of_the_message() {
    let queue = queue_with_order_7("report-last");
    let run = |program: Program, script: &str| program.shell(script).run();

    let failed = run(worker(&queue), "exit 3");
    failed.assert_status(3);
    assert_contains(
        last(&failed),
        &[
            "error: command exited with status 3; message requeued",
            "id=\"order-7\"",
            "outcome=\"requeued\"",
            "status=3 source=\"command\"",
        ],
    );
    let killed = run(worker(&queue), "kill -KILL $$");
    killed.assert_status(137);
    assert_contains(
        last(&killed),
        &["command was killed by SIGKILL (often: out of memory); message requeued", "status=137"],
    );
    let late = run(worker(&queue).args(["--timeout", "50ms"]), "sleep 60");
    late.assert_status(124);
    assert_contains(
        last(&late),
        &[
            "command was killed by SIGTERM after its time limit (--timeout); message requeued",
            "status=124 source=\"qconsume\"",
        ],
    );
    // qconsume sends this SIGKILL itself.
    let stubborn = run(worker(&queue).args(["--timeout", "50ms", "--kill-after", "50ms"]), "trap '' TERM; sleep 60");
    stubborn.assert_status(124);
    assert_contains(
        last(&stubborn),
        &["command was killed by SIGKILL after its time limit (--timeout); message requeued"],
    );
    let rejected = run(worker(&queue).args(["--reject-on", "3"]), "exit 3");
    rejected.assert_status(3);
    assert_contains(last(&rejected), &["message dead-lettered, or dropped", "outcome=\"dead-lettered\""]);
    let empty = run(worker(&queue).args(["--wait", "0"]), "exit 3");
    empty.assert_status(66);
    assert_contains(last(&empty), &["no message in queue", "(--wait)", "status=66 source=\"qconsume\""]);
}

#[test]
fn the_last_line_of_a_stopped_run_says_what_became_of_the_message() {
    let queue = queue_with_order_7("report-stop");
    let running = worker(&queue).shell("echo here; sleep 60").spawn();
    running.wait_for_stdout("here", PATIENCE);
    running.signal(Signal::SIGTERM);
    let run = running.wait(PATIENCE);
    run.assert_status(143);
    assert_contains(
        last(&run),
        &[
            "command was killed by SIGTERM after qconsume received SIGTERM; message released",
            "outcome=\"released\"",
            "status=143 source=\"command\"",
        ],
    );

    queue.purge();
    let waiting = worker(&queue).args(["--log-level", "debug"]).shell("exit 0").spawn();
    waiting.wait_for_stderr("waiting for a message", PATIENCE);
    waiting.signal(Signal::SIGTERM);
    let run = waiting.wait(PATIENCE);
    run.assert_status(143);
    assert_contains(last(&run), &["stopped by SIGTERM before a command was started", "source=\"qconsume\""]);
}

#[test]
fn long_waits_are_mentioned_with_what_is_waited_for() {
    let silent = Proxy::silent();
    let broker = qconsume().url(&silent.url()).args(["-q", "x", "--", "true"]).spawn();
    let idle = Broker::shared().queue("report-idle");
    let message = worker(&idle).args(["--", "true"]).spawn();
    let queue = queue_with_order_7("report-stubborn");
    let command = worker(&queue).shell("trap '' TERM; echo here; while :; do sleep 1; done").spawn();
    command.wait_for_stdout("here", PATIENCE);
    command.signal(Signal::SIGTERM);
    broker.wait_for_stderr("still waiting for the AMQP handshake with", PATIENCE);
    command.wait_for_stderr("and still runs; without --grace it isn't killed", PATIENCE);
    message.wait_for_stderr(&format!("still waiting for a message in queue {:?}, for ", idle.name()), 2 * PATIENCE);
}

#[test]
fn what_ends_a_run_before_it_has_begun_is_one_line_that_says_what_to_do() {
    let run = qconsume().args(["--drian", "--", "cat"]).run();
    run.assert_status(64);
    assert_eq!(
        run.stderr,
        "qconsume: error: unexpected argument '--drian' found; tip: a similar argument exists: '--drain'; see --help status=64 source=\"qconsume\"\n"
    );
    for (variable, value, says) in [
        ("QCONSUME_WAIT", "soon", "'soon' for '--wait <DURATION>' (QCONSUME_WAIT): not a duration"),
        ("QCONSUME_COUNT", "x", "'--count <N>' (QCONSUME_COUNT)"),
        ("QCONSUME_DRAIN", "disabled", "'--drain' (QCONSUME_DRAIN)"),
        ("QCONSUME_ON_LOST", "x", "'--on-lost <WHAT>' (QCONSUME_ON_LOST) [possible"),
    ] {
        let run = qconsume().env(variable, value).arg("cat").run();
        run.assert_status(64);
        assert_contains(&run.stderr, &[says]);
    }
    let run = qconsume().args(["--wait", "soon", "cat"]).run();
    run.assert_status(64);
    assert!(!run.stderr.contains("QCONSUME_WAIT"), "{}", run.stderr);
    let run = qconsume().args(["--", "cat"]).run();
    run.assert_status(64);
    assert_eq!(lines(&run).len(), 1, "{}", run.stderr);
    assert_contains(&run.stderr, &["no broker: set BROKER_URL"]);
    let run = qconsume().url("amqp://localhost").queue("x").args(["--", "no-such-command"]).run();
    run.assert_status(127);
    assert_eq!(lines(&run).len(), 1, "{}", run.stderr);
    assert_contains(&run.stderr, &["no-such-command", "status=127"]);
}

#[test]
fn json_is_one_object_a_line_with_the_documented_names() {
    let queue = queue_with_order_7("report-json");
    let json = || worker(&queue).args(["--log-format", "json", "--log-level", "debug"]);
    let failed = json().shell("exit 3").run();
    failed.assert_status(3);
    let objects_of_failure = objects(&failed);
    for object in &objects_of_failure {
        for name in ["time", "level", "message"] {
            assert!(object[name].is_string(), "{object:?} lacks {name}");
        }
    }
    let word = objects_of_failure.last().expect("there are lines");
    assert_eq!(word["level"], "error");
    assert_eq!(word["queue"], queue.name());
    assert_eq!(word["id"], "order-7");
    assert_eq!(word["attempt"], 1);
    assert_eq!(word["size"], 5);
    assert!(word["seconds"].is_f64());
    assert_eq!(word["outcome"], "requeued");
    assert_eq!(word["status"], 3);
    assert_eq!(word["source"], "command");
    let taken = &objects_of_failure.iter().find(|object| object["message"] == "message taken").expect("a line");
    assert_eq!(taken["level"], "info");
    assert_eq!(taken["queue"], queue.name());

    let succeeded = json().shell("cat").run();
    succeeded.assert_status(0);
    let objects_of_success = objects(&succeeded);
    let word = objects_of_success.last().expect("there are lines");
    assert_eq!(word["level"], "info");
    assert_eq!(word["outcome"], "acknowledged");
    assert_eq!(word["status"], 0);

    assert_eq!(word["queue"], queue.name());

    let empty = json().args(["--drain", "cat"]).run();
    empty.assert_status(0);
    assert_eq!(objects(&empty).last().expect("there are lines")["queue"], queue.name());

    let publish = |queue: &str| {
        let broker = Broker::shared();
        qpublish().url(&broker.url()).args(["--log-format", "json", "-q", queue, "apple", "banana"]).run()
    };
    let published = publish(queue.name());
    published.assert_status(0);
    let objects_of_publishing = objects(&published);
    let word = objects_of_publishing.last().expect("there are lines");
    assert_eq!((word["sent"].as_u64(), word["confirmed"].as_u64()), (Some(2), Some(2)));
    assert_eq!((word["status"].as_u64(), word["source"].as_str()), (Some(0), Some("qpublish")));
    let lost = publish("report-json-no-such-queue");
    lost.assert_status(78);
    let objects_of_losing = objects(&lost);
    let word = objects_of_losing.last().expect("there are lines");
    assert_eq!(word["confirmed"], 0);
    assert!(word["sent"].is_u64(), "{word:?}");

    // logs.md documents every field.
    let page = include_str!("../../docs/logs.md");
    let all = [objects_of_failure, objects_of_success, objects_of_publishing, objects_of_losing].concat();
    for object in &all {
        for name in object.keys() {
            assert!(page.contains(&format!("| `{name}` |")), "docs/logs.md lacks {name}");
        }
    }
}

#[test]
fn json_is_kept_when_the_options_themselves_are_wrong() {
    let ways: [Program; 4] = [
        qconsume().args(["--log-format", "json", "--timeot", "5s"]),
        qconsume().args(["--timeot", "5s", "--log-format=json"]),
        qconsume().env("QCONSUME_LOG_FORMAT", "json").arg("--timeot"),
        // clap accepts this URL, but qconsume doesn't.
        qconsume().args(["--log-format", "json", "--url", "http://localhost", "cat"]),
    ];
    for way in ways {
        let run = way.run();
        run.assert_status(64);
        let objects = objects(&run);
        assert_eq!(objects.len(), 1, "{}", run.stderr);
        assert_eq!(objects[0]["status"], 64);
        assert_eq!(objects[0]["source"], "qconsume");
    }
}

/// Runs qconsume on a new terminal; returns its output, or `None` without Python.
fn on_a_terminal(queue: &Queue, environment: &[(&str, &str)], options: &[&str]) -> Option<String> {
    let script = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))";
    let program = crate::common::qconsume_path();
    let mut python = Program::new("python3").args(["-c", script]);
    if !Command::new("python3").args(["-c", "import pty"]).status().is_ok_and(|status| status.success()) {
        missing("python3, for a terminal");
        return None;
    }
    python = python.arg(program).args(options);
    for (name, value) in environment {
        python = python.env(name, value);
    }
    if environment.iter().all(|(name, _)| *name != "NO_COLOR") {
        python = python.env_remove("NO_COLOR");
    }
    let run = python.url(&Broker::shared().url()).queue(queue.name()).args(["--", "false"]).run();
    run.assert_status(1);
    let text = run.stdout_text();
    assert_contains(&text, &["command exited with status 1"]);
    Some(text)
}

#[test]
fn only_a_terminal_gets_colour_and_not_with_no_color_or_json() {
    let queue = queue_with_order_7("report-colour");
    let Some(text) = on_a_terminal(&queue, &[], &[]) else {
        return;
    };
    assert_contains(&text, &["qconsume: \u{1b}[31merror: \u{1b}[0mcommand"]);
    for (environment, options) in [(vec![("NO_COLOR", "1")], vec![]), (vec![], vec!["--log-format", "json"])] {
        let text = on_a_terminal(&queue, &environment, &options).expect("as before");
        assert!(!text.contains('\u{1b}'), "{text:?}");
    }
    // An empty NO_COLOR counts as unset (no-color.org).
    let text = on_a_terminal(&queue, &[("NO_COLOR", "")], &[]).expect("as before");
    assert!(text.contains('\u{1b}'), "{text:?}");
    let run = worker(&queue).args(["--", "false"]).run();
    run.assert_status(1);
    assert!(!run.stderr.contains('\u{1b}'), "{}", run.stderr);
}

#[test]
fn the_termination_message_says_who_ended_the_run_and_what_became_of_the_message() {
    let queue = queue_with_order_7("report-termination");
    let log = empty_file();
    let run = worker(&queue).arg("--termination-log").arg(&log).shell("exit 3").run();
    run.assert_status(3);
    assert_eq!(
        read(&log),
        "command exited with status 3; message requeued (status=3 source=command id=\"order-7\" attempt=1)\n"
    );
    // A file that isn't empty is left alone.
    let run = worker(&queue).arg("--termination-log").arg(&log).shell("exit 4").run();
    run.assert_status(4);
    assert_contains(&read(&log), &["status=3"]);

    let log = empty_file();
    let run = worker(&queue).env("QCONSUME_TERMINATION_LOG", &log).shell("exit 0").run();
    run.assert_status(0);
    assert_contains(&read(&log), &["command succeeded; message acknowledged (status=0 source=command id=\"order-7\""]);
}

#[test]
fn what_the_command_leaves_as_a_termination_message_is_kept() {
    let queue = queue_with_order_7("report-kept");
    let log = empty_file();
    let run =
        worker(&queue).arg("--termination-log").arg(&log).env("LOG", &log).shell("echo mine >\"$LOG\"; exit 3").run();
    run.assert_status(3);
    assert_eq!(read(&log), "mine\n");
}

#[test]
fn an_empty_termination_log_turns_it_off() {
    let run = qconsume().env("QCONSUME_TERMINATION_LOG", "").args(["--log-level", "debug", "--", "cat"]).run();
    run.assert_status(64);
    assert!(!run.stderr.contains("termination"), "{}", run.stderr);
}

#[test]
fn a_termination_log_that_does_not_exist_is_not_created() {
    let queue = queue_with_order_7("report-nobody");
    let log = empty_file();
    fs::remove_file(&log).expect("the file can be removed");
    let run = worker(&queue).arg("--termination-log").arg(&log).shell("exit 3").run();
    run.assert_status(3);
    assert!(!log.exists());
}

#[test]
fn the_termination_message_is_one_line_of_4096_bytes_at_most_whatever_it_is_about() {
    // No file can have this name, but it gets into the message.
    let log = empty_file();
    let name = format!("/\n{}", "ä/".repeat(5000));
    let run =
        qconsume().url("amqp://localhost").queue("x").arg("--termination-log").arg(&log).arg("--").arg(name).run();
    run.assert_status(126);
    assert_eq!(lines(&run).len(), 1, "{}", run.stderr);
    let message = read(&log);
    assert!(message.len() <= TERMINATION_MESSAGE_MAX, "{}", message.len());
    assert!(message.len() > TERMINATION_MESSAGE_MAX - 3, "{}", message.len());
    assert_eq!(message.matches('\n').count(), 1);
    assert!(message.ends_with(" (status=126 source=qconsume)\n"), "{message:?}");
}

#[test]
fn usage_errors_get_into_the_termination_message_too() {
    type Change = fn(Program, &Path) -> Program;
    let ways: [(&str, Change); 4] = [
        ("variable", |program, log| program.env("QCONSUME_TERMINATION_LOG", log).arg("--drian")),
        ("option", |program, log| program.arg("--termination-log").arg(log).arg("--drian")),
        ("after", |program, log| program.arg("--drian").arg("--termination-log").arg(log)),
        ("no-broker", |program, log| program.arg("--termination-log").arg(log).arg("cat")),
    ];
    for (name, change) in ways {
        let log = empty_file();
        let run = change(qconsume(), &log).run();
        run.assert_status(64);
        assert!(read(&log).ends_with(" (status=64 source=qconsume)\n"), "{name}: {:?}", read(&log));
    }
}

#[test]
fn a_messages_properties_cannot_forge_log_lines() {
    let queue = Broker::shared().queue("report-hostile");
    let id = "x\nqconsume: command succeeded\u{1b}[2J\u{9b}31m";
    queue.publish_with(BasicProperties::default().with_message_id(id.into()), "");
    let log = empty_file();
    let run = worker(&queue).arg("--termination-log").arg(&log).shell("exit 3").run();
    run.assert_status(3);
    assert_eq!(lines(&run).len(), 2, "{}", run.stderr);
    assert_eq!(read(&log).lines().count(), 1);
    for text in [&run.stderr, &read(&log)] {
        let hidden = text.chars().find(|c| c.is_control() && *c != '\n');
        assert_eq!(hidden, None, "{text:?}");
    }
    let run = worker(&queue).args(["--log-format", "json"]).shell("exit 0").run();
    run.assert_status(0);
    assert_eq!(objects(&run)[1]["id"], id);
}

#[test]
fn rabbitmqs_list_of_connections_tells_which_pod_works_on_which_queue() {
    let broker = private_broker();
    let queue = broker.queue("report-connection");
    queue.publish("apple");
    let host = format!("pod-{}", queue.name());
    let running = worker(&queue).env("HOSTNAME", &host).shell("echo here; cat >/dev/null; sleep 60").spawn();
    running.wait_for_stdout("here", PATIENCE);
    let listed =
        broker.ctl(&["list_connections", "user", "client_properties"]).unwrap_or_else(|error| panic!("{error:#}"));
    let line = listed
        .lines()
        .find(|line| line.contains(&host))
        .unwrap_or_else(|| panic!("no connection of {host} in:\n{listed}"));
    let name = format!("qconsume {host} {}", queue.name());
    assert_contains(
        line,
        &[
            "guest",
            &format!("{{\"connection_name\",\"{name}\"}}"),
            "{\"product\",\"qconsume\"}",
            &format!("{{\"version\",\"{}\"}}", env!("CARGO_PKG_VERSION")),
        ],
    );
    println!("{line}");
}
