//! Compatibility with amqp-consume: its options, command lines that use it, and the intended differences.

use crate::common::qconsume;
use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::PathBuf,
    process::Command,
};
use testbed::{
    Broker, PATIENCE, Program, Proxy, Queue, QueueKind, Signal, missing,
    owner::{find_in_path, temp_folder},
};

fn worker() -> Program {
    qconsume().url(&Broker::shared().url())
}

fn repository() -> PathBuf {
    env!("CARGO_MANIFEST_DIR").into()
}

/// A PATH in which scripts find qconsume by its name.
fn path_with_qconsume() -> String {
    let folder = temp_folder("path");
    symlink(crate::common::qconsume_path(), folder.join("qconsume")).unwrap();
    format!("{}:{}", folder.display(), std::env::var("PATH").unwrap())
}

fn queue() -> Queue {
    Broker::shared().queue("compat")
}

/// The name of a queue that doesn't exist; if the test creates it, it is deleted at the end.
fn absent() -> Queue {
    Broker::shared().declare("compat").absent()
}

#[test]
fn the_lines_of_the_kubernetes_documentation_run_with_the_name_changed() {
    let queue = queue();
    queue.publish("Hello");
    let line = r#"qconsume --url=$BROKER_URL -q foo -c 1 cat && echo"#.replace("foo", queue.name());
    let shell = |line: &str| {
        Program::new("/bin/sh")
            .args(["-c", line])
            .url(&Broker::shared().url())
            .queue(queue.name())
            .env("PATH", path_with_qconsume())
    };
    let ended = shell(&line).run();
    ended.assert_status(0);
    assert_eq!(ended.stdout_text(), "Hello\n");

    let folder = temp_folder("worker");
    let script = folder.join("worker.py");
    fs::write(&script, "#!/bin/sh\necho \"Processing $(cat)\"\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    queue.publish("apple");
    let line = r#"/usr/bin/qconsume --url=$BROKER_URL -q $QUEUE -c 1 /worker.py"#
        .replace("/usr/bin/qconsume", &crate::common::qconsume_path().to_string_lossy())
        .replace("/worker.py", &script.display().to_string());
    let ended = shell(&line).run();
    ended.assert_status(0);
    assert_eq!(ended.stdout_text(), "Processing apple\n");
    queue.wait_ready(0);
}

#[test]
fn options_after_the_command_belong_to_the_command() {
    let queue = queue();
    queue.publish("0123456789abc");
    let ended = worker().args(["-q", queue.name(), "head", "-c", "10"]).run();
    ended.assert_status(0);
    assert_eq!(ended.stdout_text(), "0123456789");
}

#[test]
fn the_parts_of_an_address_take_the_place_of_a_url() {
    let broker = Broker::shared();
    if !broker.url().starts_with("amqp://guest:guest@") {
        missing("a broker with the user guest");
        return;
    }
    let queue = queue();
    let (host, port) = (broker.addr().ip().to_string(), broker.port().to_string());
    let authfile = temp_folder("auth").join("auth");
    fs::write(&authfile, "\u{feff}username:guest\npassword:guest\n").unwrap();
    let authfile = authfile.display().to_string();
    let password_file = temp_folder("password").join("password");
    fs::write(&password_file, "guest\n").unwrap();
    let password_file = password_file.display().to_string();
    let with_port = format!("{host}:{port}");
    let lines: [&[&str]; 6] = [
        &["-s", &host, "--port", &port],
        &["--server", &with_port],
        &["-s", &host, "--port", &port, "--vhost=/", "--username=guest", "--password=guest"],
        &["-s", &host, "--port", &port, "--authfile", &authfile],
        &["-s", &with_port, "--username=guest", "--password-file", &password_file],
        &["-s", &host, "--port", &port, "--heartbeat=30"],
    ];
    for line in lines {
        queue.publish("x");
        let ended = qconsume().args(line).args(["-q", queue.name(), "cat"]).run();
        ended.assert_status(0);
        assert_eq!(ended.stdout_text(), "x", "{line:?}");
    }
    // From variables; and a flag takes precedence over the address in the environment.
    queue.publish_all(["x", "y"]);
    let ended = qconsume()
        .env("QCONSUME_SERVER", &with_port)
        .env("QCONSUME_USERNAME", "guest")
        .env("QCONSUME_PASSWORD", "guest")
        .env("QCONSUME_VHOST", "/")
        .args(["-q", queue.name(), "cat"])
        .run();
    ended.assert_status(0);
    let ended = qconsume().url("amqp://127.0.0.1:1").args(["--server", &with_port, "-q", queue.name(), "cat"]).run();
    ended.assert_status(0);
    // A flag takes precedence over a variable, also if one of them names a file.
    for (line, variable, value) in [
        (["--password", "guest"], "QCONSUME_PASSWORD_FILE", "/not/there"),
        (["--password-file", &password_file], "QCONSUME_PASSWORD", "wrong"),
        (["--authfile", &authfile], "QCONSUME_PASSWORD_FILE", "/not/there"),
    ] {
        queue.publish("x");
        let program = qconsume().args(["--server", &with_port]).args(line).env(variable, value);
        program.args(["-q", queue.name(), "cat"]).run().assert_status(0);
    }
    // No message shows a wrong password.
    for level in ["error", "info", "debug"] {
        let ended = qconsume()
            .args(["--server", &with_port, "--username", "guest"])
            .args(["--log-level", level, "-q", queue.name(), "cat"])
            .env("QCONSUME_PASSWORD", "wrong-secret")
            .run();
        ended.assert_status(77);
        assert!(!ended.stderr.contains("wrong-secret"), "{}", ended.stderr);
    }
}

#[test]
fn amqp_url_is_used_if_broker_url_is_not_set() {
    let queue = queue();
    let url = Broker::shared().url();
    queue.publish_all(["1", "2"]);
    let program = || qconsume().args(["-q", queue.name(), "cat"]);
    program().env("AMQP_URL", &url).run().assert_status(0);
    program().env("AMQP_URL", "amqp://127.0.0.1:1").url(&url).run().assert_status(0);
    program()
        .env("AMQP_URL", "amqp://u:hunter2@h:x")
        .run()
        .assert_status(64)
        .assert_stderr("AMQP_URL: the port must be");
}

#[test]
fn contradictory_options_are_a_usage_error() {
    let file = temp_folder("files").join("auth");
    fs::write(&file, "user:guest\npassword:hunter2\n").unwrap();
    let file = file.display().to_string();
    let url = "--url=amqp://u:hunter2@127.0.0.1:1";
    let safe = "--url=amqps://u:hunter2@127.0.0.1:1";
    let lines: &[(&[&str], &str)] = &[
        (&[url, "--server=h"], "--server and --url can't be used at the same time"),
        (&[url, "--authfile=/f"], "leave --authfile out, and write its user and password into the URL"),
        (&[url, "--port=1"], "--port and --url"),
        (&[url, "--vhost=v"], "--vhost and --url"),
        (&[url, "--username=u"], "--username and --url"),
        (&[url, "--password=hunter2"], "--password and --url"),
        (&[url, "--authfile", &file], "--authfile and --url"),
        (&[url, "--url-file", &file], "--url and --url-file"),
        (&[url, "--ssl"], "make it amqps://"),
        (&[url, "--cacert", &file], "--cacert (QCONSUME_CACERT) needs TLS"),
        (&[url, "--cert", &file], "needs TLS"),
        (&[url, "--server-name", "h"], "needs TLS"),
        (&[safe, "--no-default-cert-paths"], "leaves no CA to trust"),
        (&["--port=1"], "no broker"),
        (&["--username=u", "--password=hunter2"], "no broker"),
        (&["--server="], "--server names no host"),
        (&["--server=h:1", "--port=2"], "both name the port"),
        (&["--server=amqp://u:hunter2@h"], "--server is an amqp:// address, which goes to BROKER_URL or --url"),
        (&["--server=h", "--port=0"], "--port"),
        (&["--server=h", "--authfile", &file], "two lines, username:USER and password:PASSWORD"),
        (&["--server=h", "--authfile", &file, "--username=u"], "--authfile and --username are both set: leave one out"),
        (&["--server=h", "--authfile", &file, "--password-file", &file], "--authfile and --password-file are both set"),
        (
            &["--server=h", "--password=hunter2", "--password-file", &file],
            "--password and --password-file are both set",
        ),
        (&["--password-file", &file], "no broker"),
        (&[url, "-e", "amq.fanout"], "--exchange needs --routing-key"),
        (&[url, "-r", "key"], "--routing-key needs --exchange"),
        (&[url, "-e", "", "-r", "key"], "--exchange is empty"),
        (&[url, "-A", "--reject-on=1"], "no message is left to requeue"),
        (&["--url=amqp://h?auth_mechanism=external"], "needs amqps:// and --cert"),
    ];
    for (arguments, text) in lines {
        let ended = qconsume().args(*arguments).args(["-q", "q", "cat"]).run();
        ended.assert_status(64).assert_stderr(text);
        assert!(!ended.stderr.contains("hunter2"), "{arguments:?}: {}", ended.stderr);
    }
    let ended = qconsume().url("amqp://127.0.0.1:1").queue("q").args(["amqp://u:hunter2@h", "cat"]).run();
    ended.assert_status(64).assert_stderr("COMMAND is an amqp:// address: give it to --url");
    assert!(!ended.stderr.contains("hunter2"), "{}", ended.stderr);
    let ended =
        qconsume().url("amqp://u:hunter2@127.0.0.1:1").env("QCONSUME_SERVER", "h").args(["-q", "q", "cat"]).run();
    ended.assert_status(64).assert_stderr("QCONSUME_SERVER and BROKER_URL can't be used at the same time");
    let ended = qconsume().args(["--server=h", "--authfile=/not/there", "-q", "q", "cat"]).run();
    ended.assert_status(78).assert_stderr("--authfile: /not/there can't be read");
}

#[test]
fn a_queue_is_declared_if_it_is_not_there() {
    let queue = absent();
    let ended = worker().args(["-d", "-q", queue.name(), "--wait=0", "cat"]).run();
    ended.assert_status(66).assert_stderr("declared queue");
    // The 404 for the missing queue closes the channel, which must not look like a lost connection.
    assert!(!ended.stderr.contains("connecting again"), "{}", ended.stderr);
    assert!(queue.exists());
    // The queue and its messages outlive the worker, and --declare accepts an existing queue.
    queue.publish("1");
    let ended = worker().args(["-d", "-q", queue.name(), "cat"]).run();
    ended.assert_status(0);
    assert!(!ended.stderr.contains("declared"), "{}", ended.stderr);
    assert!(queue.exists());
}

#[test]
fn a_queue_of_any_kind_satisfies_declare() {
    for kind in QueueKind::ALL {
        let queue = Broker::shared().declare("compat").kind(kind).create();
        queue.publish("1");
        worker().args(["-d", "-q", queue.name(), "cat"]).run().assert_status(0);
    }
}

#[test]
fn a_queue_that_was_waited_for_keeps_its_first_message() {
    let broker = Broker::shared();
    let queue = absent();
    let running = worker().args(["-q", queue.name(), "--log-level=debug"]).shell("sleep 1; cat").spawn();
    running.wait_for_stderr("there is no queue", PATIENCE);
    let queue = broker.declare("compat").exact_name(queue.name()).create();
    queue.publish("1");
    let ended = running.wait(PATIENCE);
    ended.assert_status(0);
    assert_eq!(ended.stdout_text(), "1");
    assert!(!ended.stderr.contains("lost"), "{}", ended.stderr);
}

#[test]
fn an_exchange_is_bound_to_a_queue_of_the_workers_own() {
    let broker = Broker::shared();
    let running = worker()
        .args(["-e", "amq.direct", "-r", "red,blue", "-c", "2"])
        .shell("cat; echo; echo $MESSAGE_QUEUE $MESSAGE_ROUTING_KEY")
        .spawn();
    running.wait_for_stderr("server provided queue name: amq.gen-", PATIENCE);
    let name = running.stderr();
    let (_, name) = name.split_once("queue name: ").unwrap();
    let name = name.split_whitespace().next().unwrap().to_owned();
    for key in ["green", "red", "blue"] {
        publish(broker, "amq.direct", key, key);
    }
    let ended = running.wait(PATIENCE);
    ended.assert_status(0);
    assert_eq!(ended.stdout_text(), format!("red\n{name} red\nblue\n{name} blue\n"));
    assert_eq!(broker.client().counts(&name).unwrap(), None);
}

#[test]
fn an_exchange_is_bound_to_the_queue_that_is_named() {
    let broker = Broker::shared();
    let queue = queue();
    let running = worker().args(["-q", queue.name(), "-e", "amq.fanout", "-r", ""]).args(["--", "cat"]).spawn();
    queue.wait_consumers(1);
    publish(broker, "amq.fanout", "any", "to all");
    let ended = running.wait(PATIENCE);
    ended.assert_status(0);
    assert_eq!(ended.stdout_text(), "to all");
}

#[test]
fn an_exchange_that_is_not_there_is_asked_for_again_and_then_78() {
    let ended = worker().args(["-e", "compat.nowhere", "-r", "x", "--connect-timeout=10s", "cat"]).run();
    ended
        .assert_status(78)
        .assert_stderr("trying again")
        .assert_stderr("gave up after 10s (--connect-timeout)")
        .assert_stderr("no exchange 'compat.nowhere'");
}

#[test]
fn a_queue_of_the_connections_own_is_not_looked_for_after_it() {
    let broker = Broker::shared();
    let proxy = Proxy::of(broker);
    let name = absent();
    let running = qconsume().url(&proxy.url()).args(["--log-level=debug", "-x", "-q", name.name(), "cat"]).spawn();
    // The queue is exclusive, so only the worker can tell that it consumes from it.
    running.wait_for_stderr("waiting for a message", PATIENCE);
    proxy.cut();
    let ended = running.wait(PATIENCE);
    ended.assert_status(69).assert_stderr("is gone with its messages: it belonged to the lost connection");
}

#[test]
fn a_queue_of_the_connections_own_keeps_its_messages_with_an_acknowledgement_timeout() {
    let queue = absent();
    // RabbitMQ 4.3 would refuse basic.consume with such a timeout, and each message needs a new basic.consume.
    let running = worker()
        .args(["--log-level=debug", "-x", "-q", queue.name(), "--no-ack"])
        .args(["--ack-timeout", "1h", "--count", "2", "--wait", "30s", "cat"])
        .spawn();
    running.wait_for_stderr("waiting for a message", PATIENCE);
    queue.publish_all(["one", "two"]);
    let ended = running.wait(PATIENCE);
    ended.assert_status(0);
    assert_eq!(ended.stdout_text(), "onetwo");
}

#[test]
fn no_ack_takes_one_message_and_settles_it_before_the_command_starts() {
    let queue = queue();
    queue.publish_all(["1", "2", "3"]);
    // amqp-consume -A -c 1 loses the other two messages.
    let running =
        worker().args(["-A", "-q", queue.name(), "-c", "1"]).shell("cat; echo started >&2; sleep 600").spawn();
    running.wait_for_stderr("started", PATIENCE);
    queue.wait_consumers(0);
    queue.wait_ready(2);
    running.signal(Signal::SIGKILL);
    running.wait(PATIENCE);
    // The message wasn't requeued, and the other two were never taken.
    assert_eq!(queue.ready(), 2);
    // A failure's status is passed on, and the message is gone.
    let ended = worker().args(["-A", "-q", queue.name()]).shell("exit 3").run();
    ended.assert_status(3).assert_stderr("message was acknowledged before the command (--no-ack)");
    assert_eq!(queue.ready(), 1);
    let got = queue.get().unwrap();
    assert_eq!(got.data, b"3");
    assert!(!got.redelivered);
}

#[test]
fn no_ack_goes_on_until_the_count_or_a_failure() {
    let queue = queue();
    queue.publish_all(["1", "2", "3"]);
    let ended = worker().args(["-A", "-c", "2", "-q", queue.name()]).shell("cat").run();
    ended.assert_status(0);
    assert_eq!(ended.stdout_text(), "12");
    queue.publish("4");
    let ended = worker().args(["-A", "-c", "0", "-q", queue.name()]).shell("cat; exit 9").run();
    ended.assert_status(9);
    assert_eq!(ended.stdout_text(), "3");
    // The next message was not taken, not even for a moment.
    let got = queue.get().unwrap();
    assert_eq!((got.data.as_slice(), got.redelivered), (&b"4"[..], false));
    // An exclusive queue is bound once for all messages.
    let running =
        worker().args(["-A", "-x", "-e", "amq.direct", "-r", queue.name(), "-c", "2"]).args(["--", "cat"]).spawn();
    running.wait_for_stderr("server provided queue name", PATIENCE);
    publish(Broker::shared(), "amq.direct", queue.name(), "a");
    publish(Broker::shared(), "amq.direct", queue.name(), "b");
    let ended = running.wait(PATIENCE);
    ended.assert_status(0);
    assert_eq!(ended.stdout_text(), "ab");
}

#[test]
fn a_prefetch_count_is_accepted_and_changes_nothing() {
    let queue = queue();
    queue.publish_all(["x", "y"]);
    let ended = worker().args(["-p", "5", "-q", queue.name(), "cat"]).run();
    ended.assert_status(0);
    assert_eq!(queue.ready(), 1);
}

#[test]
fn hide_url_keeps_the_address_and_passwords_from_the_command() {
    let queue = queue();
    let password_file = temp_folder("hide").join("hunter2");
    fs::write(&password_file, "guest").unwrap();
    let password_file = password_file.display().to_string();
    let secrets = [
        ("AMQP_URL", "amqp://u:hunter2@h"),
        ("BROKER_URL_FILE", "/run/hunter2"),
        ("QCONSUME_SERVER", "hunter2.example"),
        ("QCONSUME_USERNAME", "hunter2"),
        ("QCONSUME_PASSWORD", "hunter2"),
        ("QCONSUME_PASSWORD_FILE", &password_file),
        ("QCONSUME_AUTHFILE", "/run/hunter2"),
    ];
    let program = || {
        let program = worker().queue(queue.name());
        secrets.iter().fold(program, |program, (name, value)| program.env(name, value))
    };
    // The flag takes precedence over the variables, so they don't contradict it.
    let run = |program: Program| {
        queue.publish("x");
        let ended = program.args(["--url", &Broker::shared().url()]).args(["--", "env"]).run();
        ended.assert_status(0);
        ended.stdout_text()
    };
    assert!(run(program()).contains("hunter2"));
    for program in [program().arg("--hide-url"), program().env("QCONSUME_HIDE_URL", "true")] {
        let environment = run(program);
        assert!(!environment.contains("hunter2"), "{environment}");
        for name in ["BROKER_URL", "AMQP_URL"].into_iter().chain(secrets.map(|(name, _)| name)) {
            assert!(!environment.contains(&format!("{name}=")), "{environment}");
        }
        // Other variables are still set.
        assert!(environment.contains(&format!("QUEUE={}", queue.name())));
    }
}

#[test]
fn amqp_consumes_options_for_help_work() {
    for option in ["-?", "--usage", "--help"] {
        let ended = qconsume().arg(option).run();
        ended.assert_status(0);
        let help = ended.stdout_text();
        let words: Vec<_> = help.split_whitespace().collect();
        let help = words.join(" ");
        assert!(help.contains("As in amqp-tools:"), "{option}");
        assert!(help.contains("every user of the machine can see it"), "{option}");
    }
    let ended = qconsume().env("QCONSUME_PASSWORD", "hunter2").url("amqp://u:hunter2@h").arg("--help").run();
    assert!(!ended.stdout_text().contains("hunter2"));
}

#[test]
fn the_table_of_options_is_complete_and_up_to_date() {
    for program in ["amqp-consume", "amqp-publish", "python3"] {
        if find_in_path(program).is_none() {
            missing(program);
            return;
        }
    }
    let ran = Command::new("python3")
        .arg(repository().join("tests/options-table.py"))
        .arg("--check")
        .args([crate::common::qconsume_path(), crate::common::qpublish_path()])
        .env_remove("BROKER_URL")
        .output()
        .unwrap();
    assert!(ran.status.success(), "{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
}

/// Runs both programs for each row of the page's table.
#[test]
fn the_exit_statuses_beside_amqp_consumes_are_as_the_page_says() {
    if find_in_path("amqp-consume").is_none() {
        return missing("amqp-consume");
    }
    let broker = Broker::shared();
    let folder = temp_folder("statuses");
    // amqp-consume parses a command's options as its own, so the commands have none.
    let script = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, format!("#!/bin/sh\ncat >/dev/null\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.display().to_string()
    };
    let (url, wrong) = (broker.url(), broker.url_for("guest", "wrong", "/"));
    let (fails, killed) = (script("fails", "exit 3"), script("killed", "kill -KILL $$"));
    let page = fs::read_to_string(repository().join("docs/moving-from-amqp-tools.md")).unwrap();
    for (what, url, is_there, command) in [
        ("the command exits 3", url.as_str(), true, fails.as_str()),
        ("the command is killed by SIGKILL", &url, true, &killed),
        ("the command isn't there", &url, true, "no-such-command"),
        ("the queue isn't there", &url, false, "cat"),
        ("the password is wrong", &wrong, true, "cat"),
        ("no broker answers", "amqp://guest:guest@127.0.0.1:1", true, "cat"),
        ("the URL is malformed", "http://localhost", true, "cat"),
    ] {
        let queue = broker.declare("statuses");
        let queue = if is_there { queue.create() } else { queue.absent() };
        let status = |program: Program| {
            if is_there {
                queue.purge();
                queue.publish("apple");
            }
            program.args(["-u", url, "-c", "1", "-q", queue.name(), command]).run().status()
        };
        let theirs = status(Program::new("amqp-consume"));
        let ours = status(qconsume().env("QCONSUME_CONNECT_TIMEOUT", "1s"));
        let row = format!("| {what} | {theirs} | {ours} |");
        assert!(page.contains(&row), "the page lacks {row}");
    }
}

fn publish(broker: &Broker, exchange: &str, key: &str, body: &str) {
    let channel = broker.client().channel().unwrap();
    testbed::block_on(async {
        let sent = channel
            .basic_publish(
                exchange.into(),
                key.into(),
                testbed::lapin::options::BasicPublishOptions::default(),
                body.as_bytes(),
                testbed::BasicProperties::default(),
            )
            .await
            .unwrap();
        sent.await.unwrap();
        channel.close(200, "".into()).await.unwrap();
    });
}
