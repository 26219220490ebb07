//! Configuration: precedence of flags, variables and defaults; secrets in files; no password in any message.

use super::{assert_gone, worker};
use crate::common::{qconsume, qconsume_path};
use std::{fs, path::PathBuf};
use testbed::{Broker, Finished, Program, emulator_lacks, owner::temp_folder};

/// No message may contain this.
const PASSWORD: &str = "s3cr3t-hunter2";

fn file(text: impl AsRef<[u8]>) -> PathBuf {
    let path = temp_folder("url").join("url");
    fs::write(&path, text).unwrap();
    path
}

/// Checks that the program ends with a usage error that says this, and doesn't show the password.
#[track_caller]
fn refuses(program: Program, says: &str) -> Finished {
    let done = program.run();
    done.assert_status(64).assert_stderr(says);
    let all = format!("{}{}", done.stdout_text(), done.stderr);
    assert!(!all.contains(PASSWORD), "the password is shown:\n{all}");
    done
}

#[test]
fn an_address_must_be_given_and_only_once() {
    let url = format!("amqp://user:{PASSWORD}@localhost");
    let start = || qconsume().queue("q");
    let command = |program: Program| program.args(["--", "cat"]);
    refuses(command(start()), "no broker: set BROKER_URL");
    refuses(command(start().url("")), "BROKER_URL: the URL is empty");
    refuses(command(start().url("\n")), "BROKER_URL: the URL is empty");
    refuses(
        command(start().url(&url).env("BROKER_URL_FILE", file(&url))),
        "BROKER_URL and BROKER_URL_FILE are both set",
    );
    refuses(command(start().url("").env("BROKER_URL_FILE", file(&url))), "BROKER_URL and BROKER_URL_FILE are both set");
    refuses(command(start().args(["--url", &url, "--url-file"]).arg(file(&url))), "--url and --url-file are both set");
    refuses(command(start().env("BROKER_URL_FILE", file(""))), "BROKER_URL_FILE: the URL is empty");
    refuses(command(start().env("BROKER_URL_FILE", file(format!("{url}\n\n")))), "BROKER_URL_FILE: the URL ends with");
    let missing = command(start().env("BROKER_URL_FILE", "/no/such/secret")).run();
    missing.assert_status(78).assert_stderr("BROKER_URL_FILE: /no/such/secret can't be read");
    let folder = command(start().env("BROKER_URL_FILE", "/")).run();
    folder.assert_status(78);
    for (path, problem) in [("/no/such/secret".into(), "can't be read: No such file"), (file("\n"), "is empty")] {
        let says = format!("QCONSUME_PASSWORD_FILE: {} {problem}", path.display());
        let done = command(start().url(&url).env("QCONSUME_PASSWORD_FILE", path)).run();
        done.assert_status(78).assert_stderr(&says);
    }
}

#[test]
fn a_queue_must_be_given() {
    let start = || qconsume().url("amqp://127.0.0.1").args(["--", "cat"]);
    refuses(start(), "no queue: set QUEUE");
    refuses(start().queue(""), "the queue's name is empty");
    refuses(start().queue(&"q".repeat(256)), "has 256 bytes");
    refuses(qconsume().url("amqp://127.0.0.1").queue("q").args(["--queue", "", "cat"]), "the queue's name is empty");
}

#[test]
fn a_switch_takes_the_usual_values_and_refuses_all_others() {
    let start = |variable, value| {
        let program = qconsume().url("amqp://127.0.0.1:1").queue("q");
        let program = program.args(["--connect-timeout", "10ms"]);
        program.env(variable, value).args(["--", "cat"])
    };
    let switches = [
        "QCONSUME_NO_ACK",
        "QCONSUME_DRAIN",
        "QCONSUME_KEEP_GOING",
        "QCONSUME_HIDE_URL",
        "QCONSUME_DECLARE",
        "QCONSUME_EXCLUSIVE",
        "QCONSUME_SSL",
        "QCONSUME_NO_DEFAULT_CERT_PATHS",
    ];
    for variable in switches {
        for off in ["", "false ", "No", "OFF", "0\n"] {
            start(variable, off).run().assert_status(69);
        }
        for wrong in ["disabled", "null", "\"false\"", " ", "2"] {
            refuses(start(variable, wrong), variable);
        }
    }
    for on in ["true", " Yes", "ON", "1"] {
        refuses(start("QCONSUME_SSL", on), "QCONSUME_SSL asks for TLS");
    }
}

#[test]
fn an_empty_variable_is_an_unset_one() {
    let variables = [
        "BROKER_URL_FILE",
        "QCONSUME_PASSWORD_FILE",
        "QCONSUME_WAIT",
        "QCONSUME_EMPTY_EXIT_CODE",
        "QCONSUME_COUNT",
        "QCONSUME_TIMEOUT",
        "QCONSUME_KILL_AFTER",
        "QCONSUME_ON_LOST",
        "QCONSUME_REJECT_ON",
        "QCONSUME_MAX_ATTEMPTS",
        "QCONSUME_HEARTBEAT",
        "QCONSUME_CACERT",
        "QCONSUME_SERVER",
        "QCONSUME_USERNAME",
        "QCONSUME_EXCHANGE",
        "QCONSUME_ROUTING_KEY",
        "QCONSUME_LOG",
        "QCONSUME_LOG_FORMAT",
        "QCONSUME_TERMINATION_LOG",
        "QCONSUME_UNKNOWN",
    ];
    let program = qconsume().url("amqp://127.0.0.1:1").queue("q");
    let program = program.args(["--connect-timeout", "10ms", "cat"]);
    let set = |program: Program, variable: &&str| program.env(variable, "");
    variables.iter().fold(program, set).run().assert_status(69);
}

#[test]
fn keep_going_is_for_messages_that_are_dead_lettered_in_the_end() {
    let start = || qconsume().url("amqp://127.0.0.1:1").queue("q");
    let start = || start().args(["--connect-timeout", "10ms", "--keep-going"]);
    refuses(start().args(["--max-attempts", "3", "cat"]), "only for --drain and --count");
    refuses(start().args(["--drain", "cat"]), "needs --max-attempts or --reject-on");
    for arguments in [["--drain", "--reject-on=1", "cat"], ["--count=0", "--max-attempts=3", "cat"]] {
        start().args(arguments).run().assert_status(69);
    }
}

#[test]
fn a_backtrace_that_somebody_asks_for_changes_nothing() {
    let url = "amqp://127.0.0.1:1";
    for arguments in [
        &["--bogus"][..],
        &["--url", "x", "cat"],
        &["--url", url, "no-such-command"],
        // The time is up before the first attempt ends, so no line announces another one.
        &["--url", url, "--connect-timeout", "1ns", "cat"],
    ] {
        let plain = qconsume().queue("q").args(arguments).run();
        let asked = qconsume().queue("q").args(arguments);
        let asked = asked.env("RUST_BACKTRACE", "full").run();
        asked.assert_status(plain.status());
        assert_eq!(asked.stderr.lines().count(), plain.stderr.lines().count());
    }
}

#[test]
fn a_shortage_of_descriptors_is_71_and_no_defect() {
    if emulator_lacks("a start with so few descriptors") {
        return;
    }
    let mut limit = 4;
    loop {
        let line = format!("ulimit -n {limit}; exec \"$0\" \"$@\"");
        let done = Program::new("/bin/sh")
            .args(["-c", &line])
            .arg(qconsume_path())
            .url("amqp://127.0.0.1:1")
            .queue("q")
            .args(["--connect-timeout", "10ms", "cat"])
            .run();
        if done.status() == 69 {
            break;
        }
        done.assert_status(71)
            .assert_stderr("no more files may be open in one process (ulimit -n)")
            .assert_stderr("another try may help");
        limit += 1;
    }
    assert!(limit > 6, "{limit} descriptors were enough");
}

#[test]
fn a_command_must_be_given() {
    for arguments in [&[][..], &["--"]] {
        refuses(qconsume().url("amqp://127.0.0.1").queue("q").args(arguments), "COMMAND");
    }
}

#[test]
fn no_message_shows_the_password() {
    let urls = [
        format!("amqp://user:{PASSWORD}@host:notaport"),
        format!("amqp://user:{PASSWORD}@host/%zz"),
        format!("amqp://user:{PASSWORD}@host?unknown={PASSWORD}"),
        format!("amqp://user:{PASSWORD}/x@host"),
        format!("amqp://user:{PASSWORD}@x@host"),
        format!("amqp://user:{PASSWORD}#@host"),
        format!("amqp://user:{PASSWORD} @host"),
        format!("amqp:/user:{PASSWORD}@host"),
        format!("user:{PASSWORD}@host"),
        format!("amqp://user:{PASSWORD}@[::1"),
        format!("amqp://user:{PASSWORD}@::1"),
        format!("http://user:{PASSWORD}@host"),
        format!("amqp://h1,amqp://user:{PASSWORD}@host:0"),
    ];
    for url in &urls {
        let start = || qconsume().queue("q").args(["--log-level", "debug"]);
        let given = [
            start().url(url).args(["--", "cat"]),
            start().args(["--url", url, "--", "cat"]),
            start().args([&format!("--url={url}"), "--", "cat"]),
            start().args([&format!("-u{url}"), "--", "cat"]),
            start().env("BROKER_URL_FILE", file(url)).args(["--", "cat"]),
        ];
        for program in given {
            let says = refuses(program, ": ").stderr;
            let named = ["--url: ", "BROKER_URL_FILE: ", "BROKER_URL: "];
            assert!(named.iter().any(|name| says.contains(name)), "{says}");
        }
    }
}

#[test]
fn slips_on_the_command_line_do_not_show_the_password_either() {
    let url = format!("amqp://user:{PASSWORD}@127.0.0.1");
    let start = || qconsume().url(&url).queue("q");
    refuses(start().args([&format!("--uri={url}"), "cat"]), "--uri");
    refuses(start().args(["--uri", &url, "cat"]), "--uri");
    refuses(start().args(["-r", &url, "cat"]), "-r");
    refuses(start().args([&format!("-r{url}"), "cat"]), "-r");
    refuses(start().args(["-u", &url, "-u", &url, "cat"]), "--url");
    refuses(start().args(["--wait", "never", "cat"]), "--wait");
    refuses(start().args(["--connect-timeout", &url, "cat"]), "--connect-timeout");
    refuses(start().args(["--on-lost", &url, "cat"]), "--on-lost");
    refuses(start().args(["--heartbeat", &url, "cat"]), "--heartbeat");
    refuses(start().args([&format!("--drain={url}"), "cat"]), "--drain");
    refuses(start().env("QCONSUME_WAIT", &url).arg("cat"), "--wait");
}

#[test]
fn help_and_version_do_not_show_the_password() {
    for argument in ["--help", "-h", "--version", "-V"] {
        let done = qconsume().url(&format!("amqp://user:{PASSWORD}@host")).queue("q").arg(argument).run();
        done.assert_status(0);
        assert!(!done.stdout.is_empty(), "{argument} shows nothing");
        assert!(!done.stdout_text().contains(PASSWORD), "{argument} shows the password");
        assert_eq!(done.stderr, "");
    }
    let help = qconsume().arg("--help").run().stdout_text();
    for status in ["64", "66", "69", "70", "71", "75", "77", "78", "124", "126", "127", "128+N"] {
        assert!(help.contains(&format!("\n  {status} ")), "{status} isn't explained");
    }
}

#[test]
fn a_wrong_option_is_64_and_the_right_one_is_suggested() {
    let start = || qconsume().url("amqp://127.0.0.1").queue("q");
    refuses(start().args(["--weit", "1s", "cat"]), "--wait");
    refuses(start().args(["--wait", "soon", "cat"]), "such as 500ms, 10s, 5m, 1h30m");
    refuses(start().args(["--timeout", "0", "cat"]), "--timeout");
    refuses(start().args(["--reject-on", "0", "cat"]), "0 is not a failure");
    refuses(start().args(["--empty-exit-code", "256", "cat"]), "--empty-exit-code");
    refuses(start().args(["--failure-exit-code", "0", "cat"]), "--failure-exit-code");
    let done = refuses(start().args(["--on-lost", "explode", "cat"]), "terminate, finish");
    assert!(done.stderr.starts_with("qconsume: "), "{}", done.stderr);
}

#[test]
fn a_flag_takes_precedence_over_its_variable_and_that_over_the_default() {
    let broker = Broker::shared();
    let queue = broker.queue("precedence");
    let dead = "amqp://127.0.0.1:1";
    let start = || qconsume().args(["--wait", "0"]);
    let empty = |program: Program| program.args(["--", "cat"]).run().assert_status(66).clone();

    // The flag for the address takes precedence over either variable.
    empty(start().url(dead).queue(queue.name()).args(["--url", &broker.url()]));
    empty(start().env("BROKER_URL_FILE", file(dead)).queue(queue.name()).args(["-u", &broker.url()]));
    empty(start().url(dead).queue(queue.name()).arg("--url-file").arg(file(broker.url())));
    // The queue.
    empty(start().url(&broker.url()).queue("no-such-queue").args(["--queue", queue.name()]));
    // Numbers and durations.
    let numbered = |program: Program, status| {
        let done = program.url(&broker.url()).queue(queue.name()).args(["--", "cat"]).run();
        done.assert_status(status);
    };
    numbered(start().env("QCONSUME_EMPTY_EXIT_CODE", "7"), 7);
    numbered(start().env("QCONSUME_EMPTY_EXIT_CODE", "7").args(["--empty-exit-code", "8"]), 8);
    numbered(qconsume().env("QCONSUME_WAIT", "10ms"), 66);
    numbered(start().env("QCONSUME_WAIT", "1h"), 66);
}

#[test]
fn a_secret_file_and_its_variable_may_end_with_a_newline() {
    let queue = Broker::shared().queue("newline");
    let url = Broker::shared().url();
    for end in ["", "\n", "\r\n"] {
        let text = format!("{url}{end}");
        queue.publish("fig");
        let done = qconsume().env("BROKER_URL_FILE", file(&text)).queue(queue.name()).args(["--", "cat"]).run();
        done.assert_status(0);
        assert_eq!(done.stdout_text(), "fig");
        queue.publish("grape");
        worker(&queue).url(&text).arg("cat").run().assert_status(0);
    }
}

#[test]
fn a_queues_variable_may_end_with_a_newline_and_a_file_begin_with_a_byte_order_mark() {
    let queue = Broker::shared().queue("newline");
    queue.publish("fig");
    let done = qconsume()
        .env("BROKER_URL_FILE", file(format!("\u{feff}{}\n", Broker::shared().url())))
        .queue(&format!("{}\n", queue.name()))
        .args(["--", "cat"])
        .run();
    done.assert_status(0);
    assert_eq!(done.stdout_text(), "fig");
}

#[test]
fn everything_after_the_first_word_that_is_no_option_belongs_to_the_command() {
    let queue = Broker::shared().queue("words");
    let body = b"0123456789abcdef";
    for (words, output) in [
        (&["head", "-c", "10"][..], "0123456789"),
        (&["--", "head", "-c", "10"], "0123456789"),
        (&["--wait", "10s", "head", "-c", "3"], "012"),
        (&["sh", "-c", "echo \"$@\"", "sh", "--", "-q", "--help", "--wait"], "-- -q --help --wait\n"),
        (&["--", "sh", "-c", "echo \"$@\"", "sh", "--", "-V", ""], "-- -V \n"),
        (&["printf", "<%s>", "--version"], "<--version>"),
    ] {
        queue.publish(body);
        let done = worker(&queue).args(words).run();
        done.assert_status(0);
        assert_eq!(done.stdout_text(), output, "{words:?}");
    }
    assert_gone(&queue);
}
